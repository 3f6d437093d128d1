"""Bytes that were read from a pipe, for as long as another process may have to read them again.

    journal = Journal()
    data = journal.take(pipe_fd, 4096)     # the next bytes of the pipe; b"" at its end
    again = Journal(journal.fd)            # in another process, with a copy of the descriptor
    again.size, again.read(100)            # all that was ever taken, and a part of it

splice(2) moves the bytes from the pipe to a file in memory, and the offset of the file with them.
Whoever has a copy of the descriptor shares the bytes and the offset. So if this process is killed
at any moment, a byte is either in the pipe or in the journal.

The journal gives back the memory of its middle: the first and the last `KEPT_BYTES` can be read.

Thread safety: for one thread at a time.

Sources: splice(2), memfd_create(2).
"""

from __future__ import annotations

import contextlib
import errno
import os

from holes import punch

__all__ = ["KEPT_BYTES", "Journal"]

KEPT_BYTES = 64 * 1024
_BLOCK_BYTES = 64 * 1024
_REFUSALS = {errno.EPERM, errno.ENOSYS, errno.EINVAL}  # of splice(2)


class Journal:
    """Attributes: `fd`; `size`, how many bytes were taken.

    `fd`: of a journal to go on with, which this one closes; -1: a new one. Raises OSError.
    """

    def __init__(self, fd: int = -1) -> None:
        self.fd = os.memfd_create("journal") if fd < 0 else fd
        self.size = os.lseek(self.fd, 0, os.SEEK_CUR)
        self._hole_end = KEPT_BYTES

    def take(self, pipe_fd: int, most: int) -> bytes:
        """Take up to `most` bytes from a pipe; b"" at its end.

        Raises BlockingIOError if there is nothing now, whether the pipe blocks or not; OSError.
        """
        begin = self.size
        try:
            self.size += os.splice(pipe_fd, self.fd, most, flags=os.SPLICE_F_NONBLOCK)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            # If this process is killed between these two, the bytes are lost.
            self.add(os.read(pipe_fd, most))
        self._give_back()
        return os.pread(self.fd, self.size - begin, begin)

    def add(self, data: bytes) -> None:
        """Add bytes as if they had been taken. Raises OSError."""
        os.write(self.fd, data)
        self.size += len(data)

    def read(self, begin: int, most: int = KEPT_BYTES) -> bytes:
        """Return up to `most` bytes from `begin` on."""
        return os.pread(self.fd, most, begin)

    def parts(self) -> list[bytes]:
        """Return all that was taken, in one or two parts: between two, bytes may be missing."""
        if self.size <= 2 * KEPT_BYTES:
            return [self.read(0, self.size)]
        return [self.read(0), self.read(self.size - KEPT_BYTES)]

    def _give_back(self) -> None:
        end = (self.size - KEPT_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES
        if end > self._hole_end:
            with contextlib.suppress(OSError):
                punch(self.fd, self._hole_end, end, hole_begin=KEPT_BYTES)
            self._hole_end = end

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
