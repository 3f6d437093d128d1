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

A complete log that nobody reads has no descriptor open and costs some 800 bytes.

This module knows nothing of processes, users' rights or networks.

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
from pipes import bytes_in
from typing import TYPE_CHECKING

from holes import can_punch, punch
from lastinggap import LastingGap
from outputdisk import DISK_FULL
from outputerrors import (
    CeilingError,
    Gap,
    NoSpliceError,
    OffsetError,
    OutputIncompleteError,
    OutputRemovedError,
)
from outputtimes import TimeIndex
from subscription import Subscription

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from budget import Budget
    from outputdisk import OutputDisk

__all__ = [
    "Gap",
    "OffsetError",
    "OutputIncompleteError",
    "OutputLog",
    "OutputRemovedError",
    "Subscription",
]

logger = logging.getLogger(__name__)

# A tail that is not small is given up in steps: of this size, or a quarter of the tail. So the disk
# has fewer holes to make, and a live subscriber time to read the rest.
_GIVEN_UP_BYTES = 1024 * 1024
_SMALL_TAIL_BYTES = 64 * 1024

# splice(2): not for this file system, not permitted, not in this kernel.
_NO_SPLICE = (errno.EINVAL, errno.EPERM, errno.ENOSYS)

_NOBODY: frozenset[Subscription] = frozenset()
_NO_GAP = (0, 0)


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
        self._lasting_gap = LastingGap(f"{self._path}.gap", dir_fd) if lasting else None
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
        self._end = status.st_size
        self._times.resume(status.st_mtime_ns)
        if self._lasting_gap is not None:
            self._gap, self._failure = self._lasting_gap.read()

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
        begin, end = self._gap
        return end - begin

    @property
    def gap(self) -> Gap | None:
        """The bytes that are not kept; None if all are. It only ever grows, at its end."""
        begin, end = self._gap
        return Gap(begin, end - begin) if end > begin else None

    @property
    def subscribers(self) -> tuple[str, ...]:
        """The names of those who are reading now, sorted, each once."""
        with self._lock:
            return tuple(sorted({s.subscriber for s in self._subscriptions if s.subscriber}))

    @property
    def subscriptions(self) -> int:
        """How many there are now."""
        with self._lock:
            return len(self._subscriptions)

    def append(self, data: bytes | memoryview) -> None:
        """Store `data` and wake the subscribers. Blocks for file I/O only.

        Bytes for which the budget or the disk has no room raise nothing: the writer must go on
        taking the job's output, or the job would hang. The log then keeps its head and its tail,
        and gives up the oldest bytes between them (`gap`). Where it cannot give the disk back the
        middle of a file, it keeps what it has, and drops `data`. Raises ValueError when the log
        is complete.
        """
        rest = memoryview(data)

        def write(size: int) -> int:
            nonlocal rest
            stored = os.pwrite(self._fd, rest[:size], self._end)
            rest = rest[stored:]
            return stored

        def skip(size: int) -> None:
            nonlocal rest
            rest = rest[size:]

        self._keep(len(data), write, skip)

    def move(self, pipe_fd: int, most: int) -> int:
        """Store up to `most` bytes that are in a pipe now; return how many there were.

        The kernel takes from the pipe what it has written to the file, so a writer that is killed
        loses nothing. Of bytes for which there is no room, those may be missing in `gap` that the
        writer had taken from the pipe when it was killed. The pipe must not block. Raises
        `NoSpliceError`, ValueError as `append` does.
        """
        size = min(most, bytes_in(pipe_fd))

        def write(size: int) -> int:
            try:
                return os.splice(pipe_fd, self._fd, size, offset_dst=self._end)
            except OSError as error:
                if error.errno in _NO_SPLICE:
                    raise NoSpliceError from error
                raise

        self._keep(size, write, lambda size: os.read(pipe_fd, size))
        return size

    def _keep(self, left: int, write: Callable[[int], int], skip: Callable[[int], object]) -> None:
        """Store `left` bytes with `write`, which stores up to so many at the end of the file.

        `skip`: drops some of them instead.
        """
        if self._complete:
            raise ValueError("the output log is complete")
        if left:
            self._times.note(self._end)
        while left:
            try:
                stored = self._store(left, write)
            except BlockingIOError:
                return  # somebody else has read from the pipe
            except OSError as error:
                stored = self._make_own_room(left, error)
                if stored:
                    skip(stored)
            else:
                if not stored:
                    return  # likewise
            left -= stored

    def _store(self, size: int, write: Callable[[int], int]) -> int:
        """Store some of `size` bytes; return how many. Raises OSError."""
        if self._room:
            # In the place of what was given up: nothing is taken from the budget or the reserve.
            stored = write(min(size, self._room))
            self._grow(stored, 0, -stored)
            return stored
        granted, refuser = size, None
        if self.budget is not None:
            granted, refuser = self.budget.take(granted)
            if refuser is not None and self.make_room is not None:
                more, refuser = self.make_room(size - granted)
                granted += more
        stored = 0
        try:
            if refuser is not None and granted == 0:
                raise CeilingError(errno.EDQUOT, f"{refuser.what} is reached")
            stored = self._write(granted, write)
        finally:
            if stored < granted and self.budget is not None:
                self.budget.give_back(granted - stored)
        self._grow(stored, stored, 0)
        if self.disk is not None and self.disk.is_full:
            self.disk.accepted(self._fd)
        return stored

    def _write(self, size: int, write: Callable[[int], int]) -> int:
        """Write some of `size` bytes to the file; return how many. Raises OSError."""
        while True:
            try:
                if self.disk is not None:
                    self.disk.check(self._fd, size)
                return write(size)
            except OSError as error:
                if error.errno not in DISK_FULL or self.free_disk is None or not self.free_disk():
                    raise

    def _grow(self, stored: int, taken: int, room: int) -> None:
        with self._lock:
            self._end += stored
            self._taken += taken
            self._room += room
            for subscription in self._subscriptions:
                subscription._changed.notify()

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
        if self._lasting_gap is not None:
            self._lasting_gap.write((begin, old_end + given_up + skipped), self._failure)
            if skipped:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._end + skipped)  # takes no room
        with self._lock:
            self._end += skipped
            # Before the hole is made: a subscriber that reads zeros finds out here.
            self._gap = begin, old_end + given_up + skipped
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
            self._room = 0
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
        if self._lasting_gap is not None:
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
        return os.open(self._path, flags | os.O_CLOEXEC, 0o600, dir_fd=self._dir_fd)

    def _stored_locked(self, offset: int) -> tuple[int, int]:
        """Return where the next bytes that can be read at or after `offset` begin and end.

        If there are none, the second number is not above the first one.
        """
        begin, end = self._gap
        return (offset, begin) if offset < begin else (max(offset, end), self._end)

    def _is_gap(self, begin: int, end: int) -> bool:
        """Whether some of the bytes from `begin` to before `end` are not kept."""
        gap_begin, gap_end = self._gap
        return begin < gap_end and end > gap_begin

    def _notify_locked(self) -> None:
        for subscription in self._subscriptions:
            subscription._changed.notify()

    def _release_locked(self, subscription: Subscription) -> None:
        """Forget a subscription that is closed."""
        self._subscriptions = self._subscriptions - {subscription} or _NOBODY
        self._let_go_locked()

    def _let_go_locked(self) -> None:
        """Close the file if nobody needs it. If it is deleted, too, give its bytes back."""
        if self._complete and not self._subscriptions and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self.budget and self._unlinked and self._fd < 0:
            self.budget.give_back(self._taken)
            self._taken = 0
