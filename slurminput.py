"""The input of a job on a cluster, on its way from the job's pipe to its step on the node.

    step_input = StepInput.make(channel, job_input)
    ...
    if step_input.fd in ready:               # of poll(2); -1 while nothing may be passed on
        step_input.pass_on()
    step_input.acknowledge(event)            # the step's report

At most 32 KiB are on their way at once. What was taken from the pipe stays in a journal, so the
next main process can send again what this one had taken and not sent. It asks the step first, how
many bytes have come there.

Thread safety: for the job's thread; others may read `fd`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

from errors import ResourceError, in_words
from journal import Journal
from slurmreports import is_count

if TYPE_CHECKING:
    from jobinput import JobInput
    from slurmchannel import Channel

__all__ = ["StepInput"]

_FRAME_BYTES = 4000  # a pipe takes a frame as a whole: below PIPE_BUF
_CREDIT_BYTES = 32 * 1024  # of input that may be on its way to the command


class StepInput:
    """`fd`: the read end of the job's pipe, and `journal`: what was taken from it.

    Both are closed by this object. `is_resumed`: they come from a former main process.
    """

    def __init__(
        self, channel: Channel, fd: int, journal: Journal, *, is_resumed: bool = False
    ) -> None:
        self._channel = channel
        self._fd = fd
        self._journal = journal
        self._is_asking = is_resumed  # how many bytes the step has
        self._is_at_end = False  # of the pipe
        # What is not sent must be known to be acknowledged one day.
        self._acknowledged = max(0, journal.size - _CREDIT_BYTES) if is_resumed else 0
        self._sent = journal.size
        if is_resumed:
            channel.send(b"A")

    @classmethod
    def make(cls, channel: Channel, job_input: JobInput) -> Self:
        """Return that of a new job. Raises `ResourceError`."""
        try:
            fd = os.dup(job_input.read_fd)
            try:
                os.set_blocking(fd, False)
                return cls(channel, fd, Journal())
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise ResourceError(f"no room for the input of a new job: {in_words(error)}") from error

    @property
    def kept_fds(self) -> list[int]:
        """What the next main process needs."""
        return [self._fd, self._journal.fd]

    @property
    def fd(self) -> int:
        """The descriptor from which more can be passed on when it is readable; -1 if none can."""
        is_waiting = self._is_asking or self._is_at_end or self._room <= 0
        return -1 if is_waiting else self._fd

    @property
    def _room(self) -> int:
        """How many more bytes may be on their way."""
        return self._acknowledged + _CREDIT_BYTES - self._journal.size

    def pass_on(self) -> None:
        """Send the step what is in the pipe, or the end."""
        try:
            self._is_at_end = not self._journal.take(self._fd, min(self._room, _FRAME_BYTES))
        except BlockingIOError:
            return
        self._send()

    def acknowledge(self, event: dict[str, Any]) -> None:
        """Take in a report of how much the step has. Raises LookupError."""
        if self._fd < 0:
            return
        if self._is_asking and "received" in event:
            received = event["received"]
            if is_count(received, self._sent) and received >= self._sent - _CREDIT_BYTES:
                self._sent = received
                self._is_asking = False
        if is_count(event["bytes"], self._sent):
            self._acknowledged = max(self._acknowledged, event["bytes"])
        self._send()

    def _send(self) -> None:
        while not self._is_asking and self._sent < self._journal.size:
            data = self._journal.read(self._sent, _FRAME_BYTES)
            if not self._channel.send(b"I", data):
                return  # the next acknowledgement makes room
            self._sent += len(data)
        if self._is_at_end and not self._is_asking and self._channel.send(b"E"):
            self.close()

    def close(self) -> None:
        """Pass nothing on any more; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self._journal.close()
