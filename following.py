"""A job's output as a client reads it, over a connection that may break.

    with_retry = OutputStream(open_call, grpc.RpcError, explain, on_lost=print)
    for data in with_retry:
        sys.stdout.buffer.write(data)

`Client.stream` makes it.

Thread safety: one thread iterates; any thread may `close`.
"""

from __future__ import annotations

import time

from clienterrors import ClientError, whole_number

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from typing import Any, Self

    import workerservice_pb2 as worker_pb

__all__ = ["JobEnd", "OutputStream"]

# Before a lost stream is continued: the first pause, the longest one, and how long to try.
_FIRST_PAUSE_S, _LAST_PAUSE_S, _GIVE_UP_S = 0.1, 10.0, 300.0


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

    `open_call`: makes the call, from the beginning (None) or to continue at an offset. `on_lost`:
    is called with the error and the offset when the connection is lost after the server had
    accepted the call. Then the call is made again, after longer and longer pauses, for up to five
    minutes. Without `on_lost` a lost connection is an error like others.
    """

    def __init__(
        self,
        open_call: Callable[[int | None], Any],
        rpc_error: type[Exception],
        explain: Callable[[Any], ClientError],
        on_lost: Callable[[ClientError, int | None], object] | None = None,
    ) -> None:
        import threading  # gRPC has imported it

        self._open_call = open_call
        self._rpc_error = rpc_error
        self._explain = explain
        self._on_lost = on_lost
        self._closed = threading.Event()
        self._was_accepted = False
        self._lost_s: float | None = None  # since when there is no connection
        self._pause_s = _FIRST_PAUSE_S
        self._missing = 0
        self.end: JobEnd | None = None
        self.offset: int | None = None
        self.gap: tuple[int, int] | None = None
        self.written_at: datetime | None = None
        self._call = open_call(None)

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
            except self._rpc_error as error:
                self.gap = gap
                self._find_end()
                self._recover(self._explain(error))
                continue
            self._lost_s = None
            self._pause_s = _FIRST_PAUSE_S
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
        self._was_accepted = self._was_accepted or any(
            item.key == "accepted" for item in self._call.initial_metadata() or ()
        )
        is_again = self._lost_s is not None
        if error.code == "NOT_FOUND" and is_again:
            raise ClientError(
                f"{error}: it was removed, or the server was started anew and has forgotten it",
                error.code,
            ) from error
        is_lost = error.code in {"UNAVAILABLE", "CANCELLED"}
        may_pass = error.retry_after_s is not None and is_again
        if (
            self._on_lost is None
            or self.end is not None
            or not self._was_accepted
            or not (is_lost or may_pass)
            or self._closed.is_set()
        ):
            raise error
        if self._lost_s is None:
            self._lost_s = time.monotonic()
            self._on_lost(error, self.offset)
        if time.monotonic() - self._lost_s > _GIVE_UP_S:
            raise error
        if self._closed.wait(error.retry_after_s or self._pause_s):
            raise error
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
        self._call = self._open_call(self.offset)
        if self._closed.is_set():
            self._call.cancel()

    def close(self) -> None:
        """End the stream; idempotent. A thread that waits for output gets a `ClientError`."""
        self._closed.set()
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
