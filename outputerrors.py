"""What is wrong with an output, or with how it is asked for; where an output has a gap.

Thread safety: there is no state.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "CeilingError",
    "Gap",
    "NoSpliceError",
    "OffsetError",
    "OutputIncompleteError",
    "OutputLeftError",
    "OutputRemovedError",
    "TornError",
]


class OffsetError(ValueError):
    """The offset is past the end of an output that will not grow any more.

    Attributes: `offset`, `size` (both in bytes).
    """

    def __init__(self, offset: int, size: int) -> None:
        super().__init__(f"offset {offset} is past the end of the output, which has {size} bytes")
        self.offset = offset
        self.size = size


class OutputRemovedError(ValueError):
    """The output was deleted, so nobody can begin to read it."""

    def __init__(self) -> None:
        super().__init__("the output was removed")


class OutputLeftError(Exception):
    """The job goes on, and another process will continue its output: this worker was left."""

    def __init__(self) -> None:
        super().__init__("the job goes on, but this worker does not; continue with its successor")


class OutputIncompleteError(OSError):
    """This subscriber missed output that was not kept. Raised at the end of the output.

    `errno` is EDQUOT when a budget was used up, else that of the write that failed (ENOSPC for
    a full disk). Attribute: `lost_bytes`, how many bytes this subscriber missed.
    """

    def __init__(self, cause: OSError, lost_bytes: int) -> None:
        message = f"{lost_bytes} bytes of output were not kept: {cause.strerror}"
        super().__init__(cause.errno, message)
        self.lost_bytes = lost_bytes

    def __str__(self) -> str:
        # Without errno's number, which means nothing to the person who ran the job.
        return str(self.strerror)


class CeilingError(OSError):
    """A budget has no byte left."""


class TornError(Exception):
    """What was read has come to be in the gap meanwhile."""


class Gap(NamedTuple):
    """Consecutive bytes of an output that were not kept."""

    offset: int
    length: int


class NoSpliceError(Exception):
    """The kernel does not move bytes from a pipe to this file by splice(2)."""
