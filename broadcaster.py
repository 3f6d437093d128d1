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

A `Budget` (`budget.py`), which several logs may share, bounds how many bytes are kept. Besides,
output leaves a reserve of the disk free. What is written beyond these bounds is counted and
dropped, and every subscriber is told of it at the end.

A complete log that nobody reads has no descriptor open and costs some 300 bytes.

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
import os
import threading
from typing import TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from budget import Budget

__all__ = [
    "OffsetError",
    "OutputIncompleteError",
    "OutputLog",
    "OutputRemovedError",
    "Subscription",
]

# The largest chunk that a subscriber gets by default. Measured when each chunk is sent as one
# message over a network with TLS: 64 KiB 230-370 MB/s, 256 KiB 420-565, 1 MiB 384.
_CHUNK_BYTES = 256 * 1024

# The errors of a full disk; EDQUOT is that of the disk's own quotas.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOBODY: frozenset[Subscription] = frozenset()


class OffsetError(ValueError):
    """The offset is past the end of an output that will not grow any more.

    Attributes: `offset`, `size` (both in bytes).
    """

    def __init__(self, offset: int, size: int) -> None:
        super().__init__(f"offset {offset} is past the end of the output, which has {size} bytes")
        self.offset = offset
        self.size = size


class OutputRemovedError(ValueError):
    """The output was deleted, so nobody can begin to read it."""

    def __init__(self) -> None:
        super().__init__("the output was removed")


class OutputIncompleteError(OSError):
    """The output was not all kept. Raised where the kept part ends.

    `errno` is EDQUOT when a budget was used up, else that of the write that failed (ENOSPC for
    a full disk). Attribute: `lost_bytes`, how many bytes were written but not kept.
    """

    def __init__(self, cause: OSError, lost_bytes: int) -> None:
        message = f"{lost_bytes} bytes of output were not kept: {cause.strerror}"
        super().__init__(cause.errno, message)
        self.lost_bytes = lost_bytes

    def __str__(self) -> str:
        # Without errno's number, which means nothing to the person who ran the job.
        return str(self.strerror)


class OutputLog:
    """Bytes appended by one writer, in a file of mode 0600 that must not exist yet.

    `dir_fd`: the descriptor of a directory in which `path` is a bare name, for a process that
    may use the directory but not walk the path to it. The caller keeps it open until the log is
    removed. Raises OSError when the file cannot be created.

    Attributes, to be set before the first byte: `budget`, out of which every kept byte is taken;
    None for no bound. `make_room`, called once for each append that the budget refuses in part:
    it takes up to as many bytes as it is told from the budget, after it has made room there, and
    returns as `Budget.take`; None for not at all. `reserve_bytes`: how much of the disk must stay
    free. `free_disk`, called as long as the disk is full: it deletes another file and returns
    True, or returns False if there is none; None for not at all.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dir_fd: int | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._path = os.fspath(path)
        self._dir_fd = dir_fd
        self.budget = budget
        self.make_room: Callable[[int], tuple[int, Budget | None]] | None = None
        self.reserve_bytes = 0
        self.free_disk: Callable[[], bool] | None = None
        # Guards every attribute below. Never held while reading or writing the file.
        # Reentrant, because the garbage collector may close an abandoned subscription.
        self._lock = threading.RLock()
        # Open while the log can grow or has subscribers, who all share it (pread).
        self._fd = self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._size = 0
        self._taken = 0  # out of the budget, and not given back
        self._complete = False
        self._removed = False  # nobody can begin to read it
        self._unlinked = False
        self._failure: OSError | None = None  # why the rest is not kept
        self._lost_bytes = 0
        # Replaced, never changed: most logs have none, and those share the empty one.
        self._subscriptions: frozenset[Subscription] = _NOBODY

    @property
    def size(self) -> int:
        """How many bytes are stored and can be read."""
        with self._lock:
            return self._size

    @property
    def lost_bytes(self) -> int:
        """How many bytes were appended but not kept: all from the first such byte on."""
        with self._lock:
            return self._lost_bytes

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

        A write that fails (ENOSPC, EFBIG, ...) or goes beyond the budget raises nothing: the
        writer must go on taking the job's output, or the job would hang. From the first byte
        that is not kept on, all bytes are counted and dropped, even if there is room again, so
        what is stored has no gaps. Every subscriber gets an `OutputIncompleteError` where the
        stored part ends. Raises ValueError when the log is complete.
        """
        size = len(data)
        with self._lock:
            if self._complete:
                raise ValueError("the output log is complete")
            offset, failure = self._size, self._failure
        granted, stored = 0, 0
        if failure is None:
            granted, refuser = self._take(size)
            if refuser is not None:
                failure = OSError(errno.EDQUOT, f"{refuser.what} is reached")
        try:
            while stored < granted:
                stored += self._write(data[stored:granted], offset + stored)
        except OSError as error:
            failure = error  # the failed write is of bytes before those that were refused
        finally:
            if self.budget and stored < granted:
                self.budget.give_back(granted - stored)
        with self._lock:
            self._size += stored
            self._taken += stored
            self._failure = failure
            self._lost_bytes += size - stored
            self._notify_locked()

    def _take(self, size: int) -> tuple[int, Budget | None]:
        if self.budget is None:
            return size, None
        taken, refuser = self.budget.take(size)
        if refuser is not None and self.make_room is not None:
            more, refuser = self.make_room(size - taken)
            taken += more
        return taken, refuser

    def _write(self, data: bytes | memoryview, offset: int) -> int:
        """Write some of `data` to the file; return how much. Raises OSError."""
        while True:
            try:
                self._check_reserve(len(data))
                return os.pwrite(self._fd, data, offset)
            except OSError as error:
                if error.errno not in _FULL or self.free_disk is None or not self.free_disk():
                    raise

    def _check_reserve(self, size: int) -> None:
        if not self.reserve_bytes:
            return
        disk = os.fstatvfs(self._fd)
        if disk.f_bavail * disk.f_frsize - size < self.reserve_bytes:
            raise OSError(
                errno.ENOSPC, f"the disk is full up to its reserve of {self.reserve_bytes} bytes"
            )

    def complete(self) -> None:
        """Declare that nothing more will be appended; idempotent.

        Subscribers that have read everything end.
        """
        with self._lock:
            self._complete = True
            self._let_go_locked()
            self._notify_locked()
            self.make_room = self.free_disk = None

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
        with self._lock:
            self._unlinked = True
            self._let_go_locked()

    def subscribe(self, subscriber: str = "", offset: int = 0) -> Subscription:
        """Start reading at byte `offset`; `subscriber` is listed in `subscribers` meanwhile.

        If the log still grows, an offset past its present end waits until the output gets
        there. Raises `OffsetError` when it never will, `OutputRemovedError`, ValueError for a
        negative offset.
        """
        if offset < 0:
            raise ValueError(f"offset must not be negative: {offset}")
        with self._lock:
            if self._removed:
                raise OutputRemovedError
            if self._complete and offset > self._size:
                raise OffsetError(offset, self._size)
            if self._fd < 0:
                self._fd = self._open(os.O_RDONLY)
            subscription = Subscription(self, subscriber, offset)
            self._subscriptions |= {subscription}
            return subscription

    def _open(self, flags: int) -> int:
        return os.open(self._path, flags | os.O_CLOEXEC, 0o600, dir_fd=self._dir_fd)

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

    Attributes: `subscriber` (the name given), `offset` (of the next byte to be read),
    `chunk_bytes` (a function that the iterating thread calls for each chunk: how large the chunk
    may be, at least 1; 256 KiB unless replaced).
    """

    def __init__(self, log: OutputLog, subscriber: str, offset: int) -> None:
        self.subscriber = subscriber
        self.offset = offset
        self.chunk_bytes: Callable[[], int] = lambda: _CHUNK_BYTES
        self._log = log
        # Of this subscription alone, so that closing one wakes no other. Notified when bytes
        # were appended, when the log is complete and by `close`.
        self._changed = threading.Condition(log._lock)
        # Both guarded by the log's lock.
        self._closed = False
        self._reading = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return the next bytes (1 to `chunk_bytes()`), as soon as there are any.

        Blocks, without using the CPU, until bytes are appended, the log is complete or
        `close` is called. Raises StopIteration at the end of the complete output or once closed,
        `OffsetError` when the output ended before the offset asked for, `OutputIncompleteError`
        when some output was not kept.
        """
        log = self._log
        with log._lock:
            self._changed.wait_for(lambda: self._closed or log._complete or log._size > self.offset)
            if self._closed:
                raise StopIteration
            count = log._size - self.offset
            if count <= 0:
                self._end_locked()
            # Until this is False again, close() leaves the descriptor open.
            self._reading = True
            fd = log._fd
        try:
            chunk = os.pread(fd, min(count, self.chunk_bytes()), self.offset)
        finally:
            self._done_reading()
        if not chunk:
            raise OSError(f"the output file was truncated by someone else at byte {self.offset}")
        self.offset += len(chunk)
        return chunk

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
        if log._failure is not None:
            raise OutputIncompleteError(log._failure, log._lost_bytes)
        if self.offset > log._size:
            raise OffsetError(self.offset, log._size)
        raise StopIteration

    def _release_locked(self) -> None:
        self._log._subscriptions = self._log._subscriptions - {self} or _NOBODY
        self._log._let_go_locked()
