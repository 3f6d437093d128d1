"""The pipes between the worker and the step of a job on a cluster, beside the output.

    channel = Channel()
    ...                             # srun gets `channel.their_fds` as its stdin and stderr
    channel.begin()
    channel.send(b"T")              # a frame: `jobstep.py` has the letters
    channel.read()                  # some bytes of the reports
    channel = Channel(kept_fds)     # in the next main process
    channel.former_reports()        # what the former one has read

Thread safety: any thread may call `send` and `close`; one thread reads.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from errors import ResourceError, in_words
from journal import Journal
from messages import close_all

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Channel"]

_REPORT_BYTES = 65536


class Channel:
    """The pipes to and from srun beside the output: frames to the step, and reports from it.

    Attributes: `report_fd`; `their_fds`, srun's stdin and stderr, until `begin` closes them.
    `fds`: the `kept_fds` of a former process, which this one closes.
    Raises `ResourceError` when there is no descriptor left.
    """

    def __init__(self, fds: Sequence[int] = ()) -> None:
        # Guards _fd. Never held during a write that can block: the pipe is non-blocking.
        self._lock = threading.Lock()
        self.their_fds: list[int] = []
        if fds:
            self.report_fd, journal_fd, self._fd = fds
            self._journal = Journal(journal_fd)
            return
        with contextlib.ExitStack() as undo:
            try:
                self._journal = Journal()
                undo.callback(self._journal.close)
                stdin_fd, self._fd = os.pipe()
                undo.callback(close_all, (stdin_fd, self._fd))
                self.report_fd, stderr_fd = os.pipe()
            except OSError as error:
                raise ResourceError(
                    f"no room for the pipes of a new job: {in_words(error)}"
                ) from error
            undo.pop_all()
        self.their_fds = [stdin_fd, stderr_fd]
        os.set_blocking(self._fd, False)
        os.set_blocking(self.report_fd, False)
        for fd in self.their_fds:
            os.fchmod(fd, 0o666)  # srun may run as another user; nobody else can reach the pipe

    @property
    def kept_fds(self) -> list[int]:
        """What the next main process needs."""
        return [self.report_fd, self._journal.fd, self._fd]

    def begin(self) -> None:
        """Close our copies of srun's ends; idempotent."""
        while self.their_fds:
            os.close(self.their_fds.pop())

    def read(self) -> bytes:
        """Return what there is of the reports; b"" at their end. Raises BlockingIOError."""
        return self._journal.take(self.report_fd, _REPORT_BYTES)

    def former_reports(self) -> list[bytes]:
        """Return what was read of the reports, also by former processes: `Journal.parts`."""
        return self._journal.parts()

    def add_reports(self, text: str) -> None:
        """Add the reports that the fork server has left with the end of a job (`Estate.ends`)."""
        self._journal.add(text.encode())

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
                self._journal.close()
            self._fd = -1
