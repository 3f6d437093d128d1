"""How many bytes are in a pipe.

    left = bytes_in(fd)

Thread safety: there is no state.
"""

from __future__ import annotations

import fcntl
import sys
import termios

__all__ = ["bytes_in"]


def bytes_in(fd: int) -> int:
    """Return how many bytes can be read from a pipe now. Raises OSError."""
    answer = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)
