"""Where the bytes of an output come from: memory, or the job's pipe.

    source = Pipe(pipe_fd, 1 << 20)
    while source.left:
        offset += source.write(file_fd, source.left, offset)

Thread safety: for one thread at a time.

Source: splice(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import termios
from typing import Protocol

from outputerrors import NoSpliceError

__all__ = ["Bytes", "Pipe", "Source", "bytes_in"]

# splice(2) does not work with this file system, is not permitted, or is not in this kernel.
_NO_SPLICE = (errno.EINVAL, errno.EPERM, errno.ENOSYS)


class Source(Protocol):
    """Bytes that are to be stored. Attribute: `left`, how many."""

    left: int

    def write(self, fd: int, size: int, offset: int) -> int:
        """Write up to `size` bytes to a file; return how many. Raises OSError, EOFError."""

    def skip(self, size: int) -> None:
        """Drop bytes."""


class Bytes:
    """Bytes in memory."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._rest = data if isinstance(data, memoryview) else memoryview(data)
        self.left = len(data)

    def write(self, fd: int, size: int, offset: int) -> int:
        """See `Source`."""
        stored = os.pwrite(fd, self._rest[:size], offset)
        self.skip(stored)
        return stored

    def skip(self, size: int) -> None:
        """See `Source`."""
        self._rest = self._rest[size:]
        self.left -= size


class Pipe:
    """Up to `most` bytes of what is in a pipe now; the pipe must not block.

    The kernel takes from the pipe what it has written to the file. So nothing is lost if this
    process is killed. Only of bytes that are skipped, it may then be unknown how many there were.
    """

    def __init__(self, fd: int, most: int) -> None:
        self._fd = fd
        self.left = min(most, bytes_in(fd))

    def write(self, fd: int, size: int, offset: int) -> int:
        """See `Source`. Raises `NoSpliceError`; EOFError if somebody else has read the bytes."""
        try:
            stored = os.splice(self._fd, fd, min(size, self.left), offset_dst=offset)
        except BlockingIOError:
            raise EOFError from None
        except OSError as error:
            if error.errno in _NO_SPLICE:
                raise NoSpliceError from error
            raise
        if not stored:
            raise EOFError
        self.left -= stored
        return stored

    def skip(self, size: int) -> None:
        """See `Source`."""
        if size:
            os.read(self._fd, size)
            self.left -= size


def bytes_in(fd: int) -> int:
    """Return how many bytes can be read from a pipe now. Raises OSError."""
    answer = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)
