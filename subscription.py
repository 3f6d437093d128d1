"""One subscriber's reading of an output log; made by `OutputLog.subscribe` (`broadcaster.py`).

    with log.subscribe("alice") as subscription:
        for chunk in subscription:
            os.write(1, chunk)

Thread safety: one thread iterates, any thread may `close`. The lock is the log's.
"""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn, Self

from outputerrors import (
    Gap,
    OffsetError,
    OutputIncompleteError,
    OutputLeftError,
    TornError,
)
from tails import find_tail, line_begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from broadcaster import OutputLog

__all__ = ["Subscription"]

# The largest chunk that a subscriber gets by default. Measured when each chunk is sent as one
# message over a network with TLS: 64 KiB 230-370 MB/s, 256 KiB 420-565, 1 MiB 384.
_CHUNK_BYTES = 256 * 1024

_NS = 1_000_000_000


class Subscription:
    """One subscriber's reading of an `OutputLog`: an iterator of chunks and a context manager.

    Made by `OutputLog.subscribe`. One thread iterates; any thread may `close`.

    Attributes: `subscriber`, the name given. `offset`, of the next byte to be read. `gap`, the
    bytes that are missing right before the last chunk, or before the end; None if none are.
    `written_at`, when the last chunk was written, if times were asked for and are known; they are
    exact to 100 ms at best. `follows`, whether it waits for more output. `chunk_bytes`, a function
    that the iterating thread calls for each chunk: how large the chunk may be, at least 1; 256 KiB
    unless replaced.
    """

    def __init__(self, log: OutputLog, subscriber: str, offset: int) -> None:
        self.subscriber = subscriber
        self.offset = offset
        self.gap: Gap | None = None
        self.written_at: datetime | None = None
        self.chunk_bytes: Callable[[], int] = lambda: _CHUNK_BYTES
        self._log = log
        # Of this subscription alone, so that closing one wakes no other. Notified when bytes
        # were appended, when the log is complete and by `close`.
        self._changed = threading.Condition(log._lock)
        # Both guarded by the log's lock.
        self._closed = False
        self._reading = False
        self._missed_bytes = 0
        self._select(0, None, None, follow=True, timed=False)

    def _select(
        self, end: int, lines: int | None, since: datetime | None, *, follow: bool, timed: bool
    ) -> None:
        """Take what `subscribe` got; `end`: where the output ends now. Before the first read."""
        self._end = end
        self._tail_lines = lines
        self._since = since
        self.follows = follow
        self._timed = timed

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return the next bytes (1 to `chunk_bytes()`), as soon as there are any.

        Blocks, without using the CPU, until bytes are appended, the log is complete or
        `close` is called. Raises StopIteration at the end of the complete output or once closed,
        `OffsetError` when the output ended before the offset asked for, `OutputIncompleteError`
        at the end when there was a gap, `OutputLeftError` when this worker was left.
        """
        if self._tail_lines is not None or self._since is not None:
            self._find_begin()
        while (chunk := self._read()) is None:
            pass
        return chunk

    def _read(self) -> bytes | None:
        """Return the next bytes; None if they came to be in the gap meanwhile."""
        log = self._log
        with log._lock:
            self._changed.wait_for(self._need_not_wait_locked)
            if self._closed:
                raise StopIteration
            begin, end = self._range_locked()
            if begin >= end:
                self._skip(min(begin, end))
                self._end_locked()
            # Until this is False again, close() leaves the descriptor open.
            self._reading = True
            fd = log._fd
        try:
            size = min(end - begin, self.chunk_bytes())
            chunk = os.pread(fd, self._date(begin, size) if self._timed else size, begin)
        finally:
            self._done_reading()
        if not chunk:
            raise OSError(f"the output file was truncated by someone else at byte {begin}")
        if log._is_gap(begin, begin + len(chunk)):
            return None
        self._skip(begin)
        self.offset += len(chunk)
        return chunk

    def _need_not_wait_locked(self) -> bool:
        begin, end = self._range_locked()
        return begin < end or self._closed or self._log._complete or not self.follows

    def _range_locked(self) -> tuple[int, int]:
        """Return where the next bytes to be read begin and end; see `_stored_locked`."""
        begin, end = self._log._stored_locked(self.offset)
        return begin, end if self.follows else min(end, self._end)

    def _find_begin(self) -> None:
        """Go to the first byte that was asked for by lines or time."""
        log, lines, since = self._log, self._tail_lines, self._since
        self._tail_lines = self._since = None
        with log._lock:
            if self._closed:
                raise StopIteration
            fd = log._fd
            self._reading = True
            hole, tail = log._gap
        parts = [(min(tail, self._end), self._end), (0, hole)]

        def read(offset: int, size: int) -> bytes:
            if self._closed:  # a search in a large output takes long
                raise StopIteration
            data = os.pread(fd, size, offset)
            if log._is_gap(offset, offset + size):
                raise TornError
            return data

        try:
            if lines is not None:
                self.offset = max(self.offset, find_tail(read, parts, lines))
            if since is not None:
                offset = log._times.first_since(int(since.timestamp() * _NS))
                if offset is None:
                    offset = self._end
                elif offset > tail or offset <= hole:
                    offset = line_begin(read, tail if offset > tail else 0, offset)
                self.offset = max(self.offset, offset)
        except TornError:
            self.offset = max(self.offset, log._gap[1])
        finally:
            self._done_reading()

    def _date(self, begin: int, size: int) -> int:
        """Set `written_at` for the byte at `begin`; return how many bytes it holds for."""
        span = self._log._times.span(begin)
        self.written_at = span and datetime.fromtimestamp(span[0] / _NS, UTC)
        return size if span is None or span[1] is None else min(size, span[1] - begin)

    def _skip(self, offset: int) -> None:
        """Note that the bytes before `offset` are missing, if there are any left to read."""
        missing = offset - self.offset
        self.gap = Gap(self.offset, missing) if missing > 0 else None
        if missing > 0:
            self.offset = offset
            self._missed_bytes += missing

    def close(self) -> None:
        """Stop reading; idempotent. Wakes a thread that waits in `next`."""
        log = self._log
        with log._lock:
            self._closed = True
            if not self._reading:
                self._release_locked()
            self._changed.notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _done_reading(self) -> None:
        with self._log._lock:
            self._reading = False
            if self._closed:  # while we read
                self._release_locked()

    def _end_locked(self) -> NoReturn:
        """Close, and raise what the end of this complete log means for the subscriber."""
        log = self._log
        self._closed = True
        self._release_locked()
        if log._left and self.follows:
            raise OutputLeftError
        if self._missed_bytes and log._failure is not None:
            raise OutputIncompleteError(log._failure, self._missed_bytes)
        if self.offset > log._end and log._complete:
            raise OffsetError(self.offset, log._end)
        raise StopIteration

    def _release_locked(self) -> None:
        self._log._release_locked(self)
