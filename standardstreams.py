"""The standard streams of a program, usable however its caller has left them.

    prepare_streams(may_be_closed=False)  # first of all

A caller may have closed stdin, stdout or stderr. The next file that we open would then have the
number 0, 1 or 2, and what is written to stderr would get into that file. A caller may also have
sent stderr to a full disk, or to a program that has ended. A warning that nobody can read would
then raise an error and change how the program ends.

Thread safety: the main thread calls `prepare_streams`, before there is another.
"""

from __future__ import annotations

import io
import os
import sys

from replacing import MOST_BYTES

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from typing import Any

__all__ = ["is_journal", "prepare_streams", "read_line"]

_STDERR = 2


def prepare_streams(*, may_be_closed: bool) -> None:
    """Open /dev/null in the place of each standard stream that is closed.

    From then on, writing to `sys.stderr` raises no OSError. `may_be_closed`: do the same for
    `sys.stdin` and `sys.stdout`, which otherwise stay None if they were closed.
    """
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= _STDERR:
        os.set_inheritable(fd, True)
        fd = os.dup(fd)
    os.close(fd)
    if may_be_closed:
        sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
        sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        _Stderr(_STDERR, "wb", closefd=False),  # type: ignore[type-var, unused-ignore]
        encoding=getattr(sys.stderr, "encoding", None),
        errors="backslashreplace",
        line_buffering=True,
    )


def read_line() -> str:
    """Return the next line of stdin, without its end and a byte order mark of Windows before it."""
    return sys.stdin.readline(MOST_BYTES).removeprefix("\ufeff").rstrip("\r\n")


def is_journal(fd: int) -> bool:
    """Whether the descriptor is that of the journal: systemd.exec(5) describes JOURNAL_STREAM."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _Stderr(io.FileIO):
    """A file whose `write` drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data))
