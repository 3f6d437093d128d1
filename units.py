"""Values as people write them: sizes (64K, 1.5G), times (30m, 7d) and addresses (HOST:PORT).

    parse_size("1.5K")  # 1536
    parse_duration("30m")  # 1800.0
    parse_address("[::1]:50051")  # ("::1", 50051)

The server's settings and the client's command line use the same forms.

Thread safety: there is no state.
"""

from __future__ import annotations

import math
import re

__all__ = [
    "format_duration",
    "format_size",
    "join_address",
    "parse_address",
    "parse_duration",
    "parse_size",
]

_MAX_PORT = 65_535

_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?", re.ASCII | re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw]?)", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return a size in bytes: a number, then K, M, G or T (powers of 1024) or nothing.

    Raises ValueError, which tells the right form.
    """
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * (1 << _POWERS[match[2].upper()]) if match else math.inf
    if size >= 1 << 63:
        raise ValueError(f"{text!r} is not a size; write a number of bytes, or 64K, 256M, 1.5G")
    return int(size)


def parse_duration(text: str) -> float:
    """Return a time in seconds: a number, then s, m, h, d or w, or nothing for s.

    Raises ValueError, which tells the right form.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else math.inf
    if seconds >= 1 << 63:
        raise ValueError(f"{text!r} is not a time; write a number of seconds, or 30m, 12h, 7d")
    return seconds


def format_size(number: int) -> str:
    """Return the size with up to four digits and its unit, like `1.5 GiB`."""
    for unit in ("T", "G", "M", "K"):
        if number >= 1 << _POWERS[unit]:
            return f"{number / (1 << _POWERS[unit]):.4g} {unit}iB"
    return f"{number} bytes"


def format_duration(seconds: float) -> str:
    """Return the time in its two largest units, like `3d 4h`; without the second if it is 0."""
    parts: list[str] = []
    left = int(seconds)
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, _SECONDS[unit])
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join(part for part in parts[:2] if part[0] != "0") or "0s"


def parse_address(text: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of HOST:PORT or [IPV6]:PORT.

    Raises ValueError, which tells the right form.
    """
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not bare
        or (":" in bare) != (host != bare)
        or not re.fullmatch("[0-9]{1,5}", port)
        or int(port) > _MAX_PORT
        or re.search(r"\s", host)
    ):
        raise ValueError(f"{text!r} is not HOST:PORT, like 127.0.0.1:50051 or [::1]:50051")
    return bare, int(port)


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, or [HOST]:PORT for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
