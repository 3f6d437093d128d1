"""The pipes between the worker and the step of a job on a cluster, beside the output.

    channel = Channel()
    ...                             # srun gets `channel.their_fds` as its stdin and stderr
    channel.begin()
    channel.send(b"T")              # a frame: `jobstep.py` has the letters
    os.read(channel.report_fd, 65536)

Thread safety: any thread may call `send` and `close`; one thread reads.
"""

from __future__ import annotations

import contextlib
import os
import threading

from errors import ResourceError, in_words

__all__ = ["Channel"]


class Channel:
    """The pipes to and from srun beside the output: frames to the step, and reports from it.

    Attributes: `report_fd`; `their_fds`, srun's stdin and stderr, until `begin` closes them.
    """

    def __init__(self) -> None:
        # Guards _fd. Never held during a write that can block: the pipe is non-blocking.
        self._lock = threading.Lock()
        try:
            stdin_fd, self._fd = os.pipe()
            try:
                self.report_fd, stderr_fd = os.pipe()
            except OSError:
                os.close(stdin_fd)
                os.close(self._fd)
                raise
        except OSError as error:
            raise ResourceError(f"no room for the pipes of a new job: {in_words(error)}") from error
        self.their_fds = [stdin_fd, stderr_fd]
        os.set_blocking(self._fd, False)
        os.set_blocking(self.report_fd, False)
        for fd in self.their_fds:
            os.fchmod(fd, 0o666)  # srun may be another user; only that user gets at the pipe

    def begin(self) -> None:
        """Close our copies of srun's ends; idempotent."""
        while self.their_fds:
            os.close(self.their_fds.pop())

    def send(self, kind: bytes, body: bytes = b"") -> bool:
        """Send a frame to the step; False if it cannot be sent now."""
        with self._lock:
            if self._fd < 0:
                return False
            with contextlib.suppress(OSError):  # EAGAIN: the pipe is full; EPIPE: srun has ended
                os.write(self._fd, kind + len(body).to_bytes(4, "big") + body)
                return True
        return False

    def close(self) -> None:
        """Close everything; idempotent."""
        self.begin()
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                os.close(self.report_fd)
            self._fd = -1
