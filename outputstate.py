"""What is known of a complete output beside its files: enough for a `FinishedLog`.

Values only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from outputerrors import Gap

__all__ = ["OutputState"]


class OutputState(NamedTuple):
    """What `OutputLog.state` returns, and `FinishedLog` takes."""

    size: int
    """How many bytes are stored and can be read."""
    gap: Gap | None = None
    failure: tuple[int, str] | None = None
    """Why not all is kept: errno, and the reason in words."""
    taken: int = 0
    """How many bytes it takes of its budget."""
    times: bytes = b""
    """Those of `TimeIndex` that are not in its file."""
    filed: int = 0
    """How many times are in the file."""
