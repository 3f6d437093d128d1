"""The pipe that is a job's stdin, on the side of the main process, and how much it has taken.

    pipe = InputPipe.make(is_kept=True)
    ...                                   # the leader gets `pipe.read_fd`
    pipe.write(b"hello\\n")                # what the pipe takes now
    pipe.kept_fds                         # with these the next main process goes on
    pipe = InputPipe.adopt([counter_fd, fd])

If the job may outlive this process (`is_kept`), the number of bytes that the pipe has taken must be
true whenever this process is killed: otherwise bytes would be lost, or there twice. So data goes to
a file in memory first, and from there into the pipe by splice(2), which moves the offset of the
file with the bytes. The number is this offset, which whoever has a copy of the descriptor shares.

Thread safety: one thread at a time writes. `jobinput.py` sees to that.

Source: splice(2), memfd_create(2).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["InputPipe"]

_STEP_BYTES = 64 * 1024  # more does not fit into an empty pipe
_REFUSALS = {errno.EPERM, errno.ENOSYS, errno.EINVAL}  # of splice(2)


class InputPipe:
    """Attributes: `size`, how many bytes the pipe has taken; `fd`, the write end, or -1 once it is
    closed; `read_fd`, the read end, or -1 after `begin`.
    """

    def __init__(self, read_fd: int, fd: int, counter_fd: int) -> None:
        self.read_fd, self.fd, self._counter_fd = read_fd, fd, counter_fd
        self.size = 0 if counter_fd < 0 else os.lseek(counter_fd, 0, os.SEEK_CUR)

    @classmethod
    def make(cls, *, is_kept: bool) -> Self:
        """Make a pipe. Raises OSError."""
        read_fd, fd = os.pipe()
        try:
            os.set_blocking(fd, False)
            # For a job that opens /dev/stdin. Only the job's user gets at the pipe there.
            os.fchmod(read_fd, 0o444)
            return cls(read_fd, fd, os.memfd_create("input") if is_kept else -1)
        except BaseException:
            os.close(read_fd)
            os.close(fd)
            raise

    @classmethod
    def adopt(cls, fds: Sequence[int]) -> Self:
        """Go on with the `kept_fds` of a former process, which the pipe closes.

        Without the second one the input was ended.
        """
        counter_fd, *rest = fds
        return cls(-1, rest[0] if rest else -1, counter_fd)

    @property
    def kept_fds(self) -> list[int]:
        """What the next main process needs."""
        return [self._counter_fd, self.fd]

    def begin(self) -> None:
        """Close the read end: the leader has its own; idempotent."""
        fd, self.read_fd = self.read_fd, -1
        if fd >= 0:
            os.close(fd)

    def write(self, data: memoryview) -> int:
        """Write what the pipe takes now, at least a byte; return how much.

        Raises BlockingIOError if it takes nothing, BrokenPipeError if nobody reads, OSError.
        """
        is_kept = self._counter_fd >= 0
        size = self._splice(data[:_STEP_BYTES]) if is_kept else os.write(self.fd, data)
        self.size += size
        return size

    def _splice(self, data: memoryview) -> int:
        os.pwrite(self._counter_fd, data, self.size)
        try:
            size = os.splice(self._counter_fd, self.fd, len(data))
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            # If this process is killed between these two, the next one writes the bytes again.
            size = os.write(self.fd, data)
            os.lseek(self._counter_fd, size, os.SEEK_CUR)
        # The pipe keeps what it has taken. The memory for the rest is free, the offset stays.
        os.ftruncate(self._counter_fd, 0)
        return size

    def close(self) -> None:
        """Close the write end; idempotent."""
        fds = self.fd, self._counter_fd
        self.fd = self._counter_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
