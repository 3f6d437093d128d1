"""An append-only output log that any number of subscribers read, each at its own pace.

One writer appends bytes to an `OutputLog`. Every `Subscription` reads them from byte 0 (or an
offset) and gets exactly the bytes appended, whether it began before, while or after they were
written. The bytes are in a file, not in memory: a slow subscriber holds back nobody and costs
nothing but its position.

    log = OutputLog("/private/dir/job.out")
    log.append(b"hello\\n")
    log.complete()
    with log.subscribe("alice") as subscription:
        for chunk in subscription:
            os.write(1, chunk)
    log.remove()

A `Budget` (`budget.py`), which several logs may share, bounds how many bytes are kept. The disk
bounds it, too (`outputdisk.py`). Beyond these bounds a log keeps its head and its tail. The bytes
between them are the gap: the log gives them back to the disk (`holes.py`), and the offsets of all
other bytes stay as they are. A subscriber that is never farther behind than the tail is long gets
every byte. Every other one is told where bytes are missing, and how many.

Thread safety: every method may be called from any thread, but a log has one writer: two calls of
`append` must not overlap. One lock per log guards all its state. It is held for a few
instructions at a time, never while the file is read or written or a caller's code runs. So
`Subscription.close` may be called where blocking is not allowed. Lock order: a log's, then its
budget's, then that budget's parent's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn, Self

from holes import can_punch, punch
from lastinggap import LastingGap
from outputdisk import DISK_FULL
from outputerrors import (
    CeilingError,
    Gap,
    OffsetError,
    OutputIncompleteError,
    OutputLeftError,
    OutputRemovedError,
    TornError,
)
from outputstate import OutputState
from outputtimes import TimeIndex
from sources import Bytes, Pipe
from tails import find_tail, line_begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from budget import Budget
    from outputdisk import OutputDisk
    from sources import Source

__all__ = [
    "Gap",
    "OffsetError",
    "OutputIncompleteError",
    "OutputLog",
    "OutputRemovedError",
    "Subscription",
]

logger = logging.getLogger(__name__)

# The largest chunk by default. Over TLS: 64 KiB 230-370 MB/s, 256 KiB 420-565, 1 MiB 384.
_CHUNK_BYTES = 256 * 1024

# A tail that is not small is given up in steps: of this size, or a quarter of the tail. So the disk
# has fewer holes to make, and a live subscriber time to read the rest.
_GIVEN_UP_BYTES = 1024 * 1024
_SMALL_TAIL_BYTES = 64 * 1024

_NOBODY: frozenset[Subscription] = frozenset()
_NO_GAP = (0, 0)
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC  # another user may have had the directory before
_NS = 1_000_000_000


class OutputLog:
    """Bytes appended by one writer, in a file of mode 0600 that must not exist yet.

    `dir_fd`: the descriptor of a directory in which `path` is a bare name, for a process that
    may use the directory but not walk the path to it. The caller keeps it open until the log is
    removed. `lasting`: another process can continue the log after this one was killed; it does so
    with `resumed`. Raises OSError when the file cannot be created.

    Attributes, to be set before the first byte; each may be None:
    `budget`, out of which every kept byte is taken.
    `make_room`, called when the budget gives less than it is asked for. It makes room in the
    budget, takes up to as many bytes as it is told, and returns as `Budget.take`.
    `disk`, which is asked before the file grows.
    `free_disk`, called as long as the disk is full: it deletes another file and returns True, or
    returns False if there is none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dir_fd: int | None = None,
        budget: Budget | None = None,
        lasting: bool = False,
        resumed: bool = False,
    ) -> None:
        self._path = os.fspath(path)
        self._dir_fd = dir_fd
        self.budget = budget
        self.make_room: Callable[[int], tuple[int, Budget | None]] | None = None
        self.disk: OutputDisk | None = None
        self.free_disk: Callable[[], bool] | None = None
        self._times = TimeIndex(f"{self._path}.times", dir_fd, lasting=lasting)
        self._lasting_gap = LastingGap(f"{self._path}.gap", dir_fd, lasting=lasting)
        # Guards every attribute below. Never held while reading or writing the file.
        # Reentrant, because the garbage collector may close an abandoned subscription.
        self._lock = threading.RLock()
        # Open while the log can grow or has subscribers, who all share it (pread).
        self._fd = self._open(os.O_RDWR if resumed else os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._end = 0  # the offset of the next byte that is appended
        # Where the bytes that are not kept begin and end. Replaced, never changed: it may be read
        # without the lock.
        self._gap = _NO_GAP
        self._taken = 0  # out of the budget, and not given back
        self._room = 0  # how much of that the gap has made free again
        self._can_punch: bool | None = None  # None if not tried yet
        self._complete = False
        self._left = False  # it is complete for this process only
        self._removed = False  # nobody can begin to read it
        self._unlinked = False
        self._failure: OSError | None = None  # why not all is kept
        # Replaced, never changed: most logs have none, and those share the empty one.
        self._subscriptions: frozenset[Subscription] = _NOBODY
        if resumed:
            self._resume()

    def _resume(self) -> None:
        """Continue where another process has ended: the file's size is the truth."""
        status = os.fstat(self._fd)
        self._gap, self._failure = self._lasting_gap.read(status.st_size)
        self._end = max(status.st_size, self._gap[1])
        self._times.resume(status.st_mtime_ns)

    def state(self) -> OutputState:
        """Return what a `FinishedLog` needs. The writer must have finished."""
        times, cause = self._times, self._failure
        failure = (cause.errno or 0, str(cause.strerror)) if cause else None
        taken = self._taken - (self._room if self.budget else 0)
        return OutputState(self.size, self.gap, failure, taken, times.unfiled(), times.filed)

    def charge(self, budget: Budget) -> None:
        """Take what is stored out of a budget, for a log that was resumed."""
        self.budget = budget
        self._taken, _ = budget.take(self.size)

    @property
    def size(self) -> int:
        """How many bytes are stored and can be read."""
        with self._lock:
            return self._end - self.lost_bytes

    @property
    def lost_bytes(self) -> int:
        """How many bytes were appended but are not kept: those of the gap."""
        return self._gap[1] - self._gap[0]

    @property
    def gap(self) -> Gap | None:
        """The bytes that are not kept; None if all are. It only ever grows, at its end."""
        begin, end = self._gap
        return Gap(begin, end - begin) if end > begin else None

    @property
    def subscribers(self) -> tuple[str, ...]:
        """The names of those who are reading now, sorted, each once."""
        return tuple(sorted({s.subscriber for s in self._subscriptions if s.subscriber}))

    @property
    def subscriptions(self) -> int:
        """How many there are now."""
        return len(self._subscriptions)

    def append(self, data: bytes | memoryview) -> None:
        """Store `data` and wake the subscribers. Blocks for file I/O only.

        Bytes for which the budget or the disk has no room raise nothing: the writer must go on
        taking the job's output, or the job would hang. The log then keeps its head and its tail,
        and gives up the oldest bytes between them (`gap`). Where it cannot give the disk back the
        middle of a file, it keeps what it has, and drops `data`. Raises ValueError when the log
        is complete.
        """
        self._keep(Bytes(data))

    def move(self, pipe_fd: int, most: int) -> int:
        """Store up to `most` bytes that are in a pipe now; return how many there were.

        A writer that is killed loses nothing of what there is room for: see `Pipe`. The pipe must
        not block. Raises `NoSpliceError`, and ValueError as `append` does.
        """
        pipe = Pipe(pipe_fd, most)
        size = pipe.left
        self._keep(pipe)
        return size

    def _keep(self, source: Source) -> None:
        if self._complete:
            raise ValueError("the output log is complete")
        if source.left:
            self._times.note(self._end)
        while source.left:
            try:
                self._store(source)
            except EOFError:
                return
            except OSError as error:
                source.skip(self._make_own_room(source.left, error))

    def _store(self, source: Source) -> None:
        """Store some bytes of the source. Raises OSError; EOFError if it has none left."""
        if self._room:
            # In the place of what was given up: nothing is taken from the budget or the reserve.
            stored = source.write(self._fd, self._room, self._end)
            self._grow(stored, 0, -stored)
            return
        granted, refuser = source.left, None
        if self.budget is not None:
            granted, refuser = self.budget.take(source.left)
            if refuser is not None and self.make_room is not None:
                more, refuser = self.make_room(source.left - granted)
                granted += more
        stored = 0
        try:
            if refuser is not None and granted == 0:
                raise CeilingError(errno.EDQUOT, f"{refuser.what} is reached")
            stored = self._write(source, granted)
        finally:
            if stored < granted and self.budget is not None:
                self.budget.give_back(granted - stored)
        self._grow(stored, stored, 0)
        if self.disk is not None and self.disk.is_full:
            self.disk.accepted(self._fd)

    def _write(self, source: Source, size: int) -> int:
        """Write up to `size` bytes of the source; return how many. Raises as `_store`."""
        while True:
            try:
                if self.disk is not None:
                    self.disk.check(self._fd, size)
                return source.write(self._fd, size, self._end)
            except OSError as error:
                if error.errno not in DISK_FULL or self.free_disk is None or not self.free_disk():
                    raise

    def _grow(self, stored: int, taken: int, room: int) -> None:
        with self._lock:
            self._end += stored
            self._taken += taken
            self._room += room
            self._notify_locked()

    def _make_own_room(self, size: int, cause: OSError) -> int:
        """Give up the oldest bytes of the tail, because `cause` refused `size` new ones.

        Returns how many of the new bytes to skip: those that are not kept either.
        """
        if self._failure is None:
            self._failure = cause
        is_full = cause.errno in DISK_FULL
        if is_full and self._can_punch is None:
            self._can_punch = can_punch(self._fd)
        has_gap = self.lost_bytes > 0
        begin = self._gap[0] if has_gap else (self._end + 1) // 2
        tail = self._end - max(begin, self._gap[1])
        skipped = 0
        if not tail or not is_full or not self._can_punch:
            begin = self._gap[0] if has_gap else self._end
            given_up, skipped = tail if has_gap else 0, size
        elif self._room:  # somebody else has taken what was given back to the disk
            given_up = (tail + 1) // 2
        elif tail < _SMALL_TAIL_BYTES:
            given_up, skipped = min(tail, size), max(0, size - tail)
        else:
            given_up = min(tail // 2, max(size, min(tail // 4, _GIVEN_UP_BYTES)))
        self._widen_gap(begin, given_up, skipped)
        if self.disk is not None and not isinstance(cause, CeilingError):
            self.disk.refused(cause, given_up + skipped)
        return skipped

    def _widen_gap(self, begin: int, given_up: int, skipped: int) -> None:
        """Add to the gap: bytes of the tail, and then, if these are all, bytes not yet stored."""
        old_end = max(begin, self._gap[1])
        gap = begin, old_end + given_up + skipped
        self._lasting_gap.write(gap, self._failure, self._fd, self._end + skipped)
        with self._lock:
            self._end += skipped
            # Before the hole is made: a subscriber that reads zeros finds out here.
            self._gap = gap
        if not given_up or not self._can_punch:
            return
        try:
            punch(self._fd, old_end, old_end + given_up, hole_begin=begin)
        except OSError as error:
            logger.warning("the disk does not take back output: %s", error.strerror)
            self._can_punch = False
            return
        with self._lock:
            self._room += given_up

    def complete(self) -> None:
        """Declare that nothing more will be appended; idempotent.

        Subscribers that have read everything end.
        """
        with self._lock:
            self._complete = True
            if self._room and self.budget:
                self.budget.give_back(self._room)
                self._taken -= self._room
            self._room, self.budget = 0, self.budget and self.budget.heir
            self._let_go_locked()
            self._notify_locked()
            self.make_room = self.free_disk = self.disk = None

    def leave(self) -> None:
        """Leave the log to another process; idempotent. The writer must have finished.

        Those who read get what is there, and then `OutputLeftError`.
        """
        with self._lock:
            self._left = not self._complete
        self.complete()

    def remove(self) -> None:
        """Complete the log and delete its file; idempotent. The writer must have finished.

        Those who are reading still get every byte; new subscribers are refused. The budget gets
        its bytes back when the disk does: now, or when the last reader ends. It does not if the
        file cannot be deleted, which raises OSError.
        """
        self.complete()
        with self._lock:
            if self._removed:
                return
            self._removed = True
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path, dir_fd=self._dir_fd)
        self._times.remove()
        self._lasting_gap.remove()
        with self._lock:
            self._unlinked = True
            self._let_go_locked()

    def subscribe(  # noqa: PLR0913 -- all are optional
        self,
        subscriber: str = "",
        offset: int = 0,
        *,
        tail_lines: int | None = None,
        since: datetime | None = None,
        follow: bool = True,
        timestamps: bool = False,
    ) -> Subscription:
        """Start reading at byte `offset`; `subscriber` is listed in `subscribers` meanwhile.

        `tail_lines`: not before the last lines, as many as these, of what is there now. `since`:
        not before the line that was written then, or first after it. `follow`: False reads what
        is there now and then ends. `timestamps`: sets `Subscription.written_at`.

        If the log still grows, an offset past its present end waits until the output gets
        there. Raises `OffsetError` when it never will, `OutputRemovedError`, ValueError for a
        negative offset.
        """
        if offset < 0 or (tail_lines or 0) < 0:
            raise ValueError(f"offset and lines must not be negative: {offset}, {tail_lines}")
        with self._lock:
            if self._removed:
                raise OutputRemovedError
            if self._complete and offset > self._end:
                raise OffsetError(offset, self._end)
            if self._fd < 0:
                self._fd = self._open(os.O_RDONLY)
            subscription = Subscription(self, subscriber, offset)
            subscription._select(self._end, tail_lines, since, follow=follow, timed=timestamps)
            self._subscriptions |= {subscription}
            return subscription

    def _open(self, flags: int) -> int:
        return os.open(self._path, flags | _FLAGS, 0o600, dir_fd=self._dir_fd)

    def _stored_locked(self, offset: int) -> tuple[int, int]:
        """Return where the next bytes that can be read at or after `offset` begin and end.

        If there are none, the second number is not above the first one.
        """
        begin, end = self._gap
        return (offset, begin) if offset < begin else (max(offset, end), self._end)

    def _is_gap(self, begin: int, end: int) -> bool:
        """Whether some of the bytes from `begin` to before `end` are not kept."""
        return begin < self._gap[1] and end > self._gap[0]

    def _notify_locked(self) -> None:
        for subscription in self._subscriptions:
            subscription._changed.notify()

    def _let_go_locked(self) -> None:
        """Close the file if nobody needs it. If it is deleted, too, give its bytes back."""
        if self._complete and not self._subscriptions and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self.budget and self._unlinked and self._fd < 0:
            self.budget.give_back(self._taken)
            self._taken = 0


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
        self._log._subscriptions = self._log._subscriptions - {self} or _NOBODY
        self._log._let_go_locked()
