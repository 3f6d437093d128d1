"""Sizes and times as people write them: 64K, 1.5G; 30m, 7d.

Shared by the command line and the configuration.
"""

from __future__ import annotations

import math
import re

__all__ = ["format_size", "parse_duration", "parse_size"]

_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?", re.ASCII | re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw]?)", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that `text` says: a number and K, M, G or T (powers of 1024) or nothing.

    Raises ValueError.
    """
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * (1 << _POWERS[match[2].upper()]) if match else math.inf
    if size >= 1 << 63:
        raise ValueError(f"{text!r} is not a size; write a number of bytes, or 64K, 256M, 1.5G")
    return int(size)


def parse_duration(text: str) -> float:
    """Return the seconds that `text` says: a number and s, m, h, d or w, or nothing for s.

    Raises ValueError.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else math.inf
    if seconds >= 1 << 63:
        raise ValueError(f"{text!r} is not a time; write a number of seconds, or 30m, 12h, 7d")
    return seconds


def format_size(number: int) -> str:
    """Return the size with up to four digits and its unit: `1.5 GiB`."""
    for unit in ("T", "G", "M", "K"):
        if number >= 1 << _POWERS[unit]:
            return f"{number / (1 << _POWERS[unit]):.4g} {unit}iB"
    return f"{number} bytes"
