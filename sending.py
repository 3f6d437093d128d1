"""The bytes that a client sends to a job's input, kept until the server has acknowledged them.

    sending = Sending([b"hello\\n"])
    while not sending.is_done:
        stdin = ...                  # call WriteInput with `sending.messages(...)`
        sending.acknowledge(stdin.bytes, ended=stdin.ended)

A call may break off at any byte. What the server has not acknowledged is sent again by the next
call. So that this is never much, a call ends when 4 MiB are not acknowledged, without ending the
input: the server's answer acknowledges them.

Threads: gRPC takes the messages of a call in a thread of its own, which also reads the data to be
sent. That thread cannot be interrupted while it reads from a terminal, say. If its call breaks off
meanwhile, the thread keeps what it then reads for the next call.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    Buffer = bytes | bytearray | memoryview

__all__ = ["Sending"]

_MESSAGE_BYTES = 64 * 1024
_WINDOW_BYTES = 4 * 1024 * 1024


class Sending:
    """One job's input on its way. Any thread may call anything.

    `data`: bytes, or an iterable of bytes, whose `next` may block. `offset`: the place of its first
    byte in the job's input. `ends`: whether the input ends with the data. Raises ValueError for an
    offset that cannot be one: gRPC would not say what is wrong.
    """

    def __init__(
        self, data: Buffer | Iterable[Buffer], offset: int = 0, *, ends: bool = True
    ) -> None:
        if not (isinstance(offset, int) and 0 <= offset < 1 << 62):
            raise ValueError(f"offset is {offset!r}; it must be a number of bytes")
        self._ends = ends
        if isinstance(data, (bytearray, memoryview)):
            data = bytes(data)
        self._chunks = _pieces(data) if isinstance(data, bytes) else _checked(data)
        # Guards all below. Notified when data was read, and when a call has ended. Never held while
        # data is read.
        self._changed = threading.Condition()
        self._kept = bytearray()  # what was read and is not acknowledged
        self._offset = offset  # of the first byte of that: so much is acknowledged
        # Where the data ends, if that is known before its end is read. Then the last message says
        # so, and a job that ends because of its last byte is known to have got all.
        self._end = offset + len(data) if isinstance(data, bytes) else None
        self._is_reading = False
        self._is_read = offset == self._end  # there is no more data
        self._error: Exception | None = None  # why there is no more data
        self._call = 0  # the number of the call that may send
        self.is_done = False

    def messages(self, make: Callable[..., Any], job_id: str) -> Iterator[Any]:
        """Yield the messages of one call. `make` is the class WriteInputRequest.

        Blocks while there is no data. Ends when too much is not acknowledged, with the data, or
        when `acknowledge` was called or another call begins.
        """
        with self._changed:
            self._call += 1
            mine, sent = self._call, self._offset
            self._changed.notify_all()
        yield make(job_id=job_id, offset=sent)
        while (part := self._next(mine, sent)) is not None:
            data, is_end = part
            sent += len(data)
            yield make(data=data, end=is_end)
            if is_end:
                return

    def _next(self, call: int, sent: int) -> tuple[bytes, bool] | None:
        """Return the bytes from offset `sent` on, and whether they are the last.

        None if the call is to end.
        """
        while True:
            with self._changed:
                while self._call == call and self._is_reading and not self._has_more_locked(sent):
                    self._changed.wait()
                if self._call != call:
                    return None
                if self._has_more_locked(sent) or self._is_read:
                    begin = sent - self._offset
                    data = bytes(self._kept[begin : begin + _MESSAGE_BYTES])
                    if self._error is not None or not self._ends:
                        return (data, False) if data else None
                    return data, self._is_read and begin + len(data) == len(self._kept)
                if len(self._kept) >= _WINDOW_BYTES:
                    return None
                self._is_reading = True
            self._read()

    def _has_more_locked(self, sent: int) -> bool:
        return self._offset + len(self._kept) > sent

    def _read(self) -> None:
        chunk, error = None, None
        try:
            chunk = next(self._chunks, None)
        except Exception as problem:  # noqa: BLE001 -- `acknowledge` raises it
            error = problem
        with self._changed:
            self._is_reading = False
            if chunk is None:
                self._is_read, self._error = True, error
            else:
                self._kept += chunk
                self._is_read = self._offset + len(self._kept) == self._end
            self._changed.notify_all()

    def acknowledge(self, size: int, *, ended: bool) -> int:
        """End the call. The job has got `size` bytes of input; `ended`: and gets no more.

        Returns how many bytes this acknowledges. Raises what the data's iterator raised, when all
        that came before is acknowledged; ValueError if the job has got other bytes than these.
        """
        with self._changed:
            self._call += 1
            self._changed.notify_all()
            more = size - self._offset
            if not 0 <= more <= len(self._kept):
                raise ValueError(f"somebody else has written, too: the job has got {size} bytes")
            del self._kept[:more]
            self._offset = size
            if self._is_read and not self._kept:
                if self._error is not None:
                    raise self._error
                self.is_done = ended or not self._ends
            return more


def _pieces(data: bytes) -> Iterator[bytes]:
    return (data[at : at + _MESSAGE_BYTES] for at in range(0, len(data), _MESSAGE_BYTES))


def _checked(data: Iterable[Buffer]) -> Iterator[Buffer]:
    for chunk in data:
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            raise TypeError(f"the data of an input must be bytes, not {type(chunk).__name__}")
        yield chunk
