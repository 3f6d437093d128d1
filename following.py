"""A job's output as a client reads it, over a connection that may break.

    for data in OutputStream(link, open_call, on_lost=print):
        sys.stdout.buffer.write(data)

`Client.stream` makes it.

Thread safety: one thread iterates; any thread may `close`.
"""

from __future__ import annotations

from clienterrors import ClientError, whole_number
from reopening import Reopening

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from typing import Any, Self

    import workerservice_pb2 as worker_pb
    from link import Link

__all__ = ["JobEnd", "OutputStream"]


class JobEnd:
    """How a job ended, in the names of `workerservice.proto`.

    Attributes: `status` ("FINISHED"; "RUNNING" for a stream that did not wait for the end),
    `end_reason` ("EXITED"), `exit_code` and `signal` (None unless the command exited, or a signal
    killed it).
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.status = metadata["job-status"]
        self.end_reason = metadata.get("job-end-reason", "")
        self.exit_code = whole_number(metadata.get("job-exit-code", ""))
        self.signal = whole_number(metadata.get("job-signal", ""))


class OutputStream:
    """A job's output: an iterator of bytes, which come as the job writes them.

    It ends when the job has ended and all of the output was read. Each step blocks while the job
    writes nothing, and may raise `ClientError`. One with the code DATA_LOSS comes at the end, if
    there was a gap.

    Attributes: `end`, which says how the job ended; None until the stream has ended; it stays None
    if the stream broke off. `offset`, of the next byte; None until the first data. `gap`: the
    offset and number of the bytes that the server did not keep right before the last data, or
    before the end; None if it kept them. `written_at`: when the last data was written; None if
    this was not asked for, or is not known.

    After a lost connection the call is made again, after longer and longer pauses, and continues at
    the next byte.

    `open_call`: makes the call with this metadata, from the beginning (None) or to continue at an
    offset. `on_lost`: is called with the error and the offset when the connection has been lost
    for `on_lost_after` seconds.
    """

    def __init__(
        self,
        link: Link,
        open_call: Callable[[Any, int | None], Any],
        on_lost: Callable[[ClientError, int | None], object] | None = None,
        on_lost_after: float = 0.0,
    ) -> None:
        self._link = link
        self._open_call = open_call
        tell = None if on_lost is None else lambda error: on_lost(error, self.offset)
        self._reopening = Reopening(link, tell, on_lost_after)
        self._missing = 0
        self.end: JobEnd | None = None
        self.offset: int | None = None
        self.gap: tuple[int, int] | None = None
        self.written_at: datetime | None = None
        self._call = open_call(self._reopening.metadata(), None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        gap = None
        while True:
            try:
                message = next(self._call)
            except StopIteration:
                self.gap = gap
                self._find_end()
                if self._missing:  # before the connection was lost, so the server has no error
                    raise ClientError(
                        f"{self._missing} bytes of output were not kept", "DATA_LOSS"
                    ) from None
                raise
            except self._link.rpc_error as error:
                self.gap = gap
                self._find_end()
                self._recover(self._link.explain(error))
                continue
            self._reopening.succeeded()
            if message.HasField("gap"):
                gap = message.gap.offset, message.gap.length
                self.offset = sum(gap)
                self._missing += message.gap.length
                continue
            self.gap = gap
            self.written_at = _moment(message)
            data: bytes = message.data
            self.offset = message.offset + len(data)
            return data

    def _find_end(self) -> None:
        metadata = {item.key: str(item.value) for item in self._call.trailing_metadata() or ()}
        if "job-status" in metadata:
            self.end = JobEnd(metadata)

    def _recover(self, error: ClientError) -> None:
        """Make the call again if its connection was lost; else raise the error."""
        if error.code == "NOT_FOUND" and self._reopening.has_failed:
            raise ClientError(
                f"{error}: it was removed, or a restarted server does not know it",
                error.code,
            ) from error
        if self.end is not None:
            raise error
        self._reopening.recover(error, self._call)
        self._call = self._open_call(self._reopening.metadata(), self.offset)
        if self._reopening.closed.is_set():
            self._call.cancel()

    def close(self) -> None:
        """End the stream; idempotent. A thread that waits for output gets a `ClientError`."""
        self._reopening.closed.set()
        self._call.cancel()


def _moment(message: worker_pb.StreamOutputResponse) -> datetime | None:
    """Return when the data was written; None if it is not known, or no date."""
    if not message.HasField("written_at"):
        return None
    from datetime import UTC

    try:
        return message.written_at.ToDatetime(UTC)
    except (ValueError, OverflowError):
        return None
