"""An append-only output log that any number of subscribers read, each at its own pace.

One writer appends bytes to an `OutputLog`; every `Subscription` reads them from
byte 0 (or an offset) and gets exactly the bytes appended, whether it joined
before, while or after they were written. The bytes live in a file, not in
memory: a slow subscriber holds back nobody and costs nothing but its position.

This module knows nothing of jobs, users' rights or networks.

    log = OutputLog("/private/dir/job.out")
    log.append(b"hello\\n")
    log.complete()
    with log.subscribe("alice") as subscription:
        for chunk in subscription:
            os.write(1, chunk)
    log.remove()

Thread safety: every method may be called from any thread; there is one writer
at a time (`append` is not atomic against another `append`). One condition per
log guards all its state. It is held for a few instructions at a time, never
while reading or writing the file or while running a caller's code, so
`Subscription.close` may be called where blocking is not allowed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "OffsetError",
    "OutputIncompleteError",
    "OutputLog",
    "OutputRemovedError",
    "Subscription",
]

# The largest chunk a subscriber is given. Measured over gRPC with mutual TLS:
# 64 KiB messages reach 230-370 MB/s, 256 KiB 420-565, 1 MiB 384.
_CHUNK_BYTES = 256 * 1024


class OffsetError(ValueError):
    """The offset lies past the end of an output that will not grow any more.

    Attributes: `offset`, `size` (both in bytes).
    """

    def __init__(self, offset: int, size: int) -> None:
        super().__init__(f"offset {offset} is past the end of the output, which has {size} bytes")
        self.offset = offset
        self.size = size


class OutputRemovedError(ValueError):
    """The output was deleted; nobody can begin to read it."""

    def __init__(self) -> None:
        super().__init__("the output was removed")


class OutputIncompleteError(OSError):
    """The output could not all be stored (disk full, say); raised where the stored part ends.

    Attributes: `lost_bytes`, how many bytes were written but not kept.
    """

    def __init__(self, cause: OSError, lost_bytes: int) -> None:
        super().__init__(cause.errno, f"{lost_bytes} bytes of output were lost: {cause.strerror}")
        self.lost_bytes = lost_bytes


class OutputLog:
    """Bytes appended by one writer, in a file of mode 0600 that must not exist yet.

    Raises OSError when the file cannot be created.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        # Guards every attribute below. Notified when bytes were appended, when the
        # log is complete and when a subscription is closed. Never held while reading or
        # writing the file.
        self._changed = threading.Condition()
        # Open while the log can grow or has subscribers; shared by all of them (pread).
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._size = 0
        self._complete = False
        self._removed = False
        self._failure: OSError | None = None
        self._lost_bytes = 0
        self._subscriptions: set[Subscription] = set()

    @property
    def size(self) -> int:
        """How many bytes are stored and can be read."""
        with self._changed:
            return self._size

    @property
    def subscribers(self) -> tuple[str, ...]:
        """The names of those who are reading now, sorted, each once."""
        with self._changed:
            return tuple(sorted({s.subscriber for s in self._subscriptions if s.subscriber}))

    def append(self, data: bytes | memoryview) -> None:
        """Store `data` and wake the subscribers. Blocks for the file write only.

        A write that fails (ENOSPC, EFBIG, ...) is not raised: the writer must go on
        taking the job's output, or the job would hang. That output and all that
        follows is counted and dropped, and every subscriber is told with
        `OutputIncompleteError` where the stored part ends. Raises ValueError when
        the log is complete.
        """
        with self._changed:
            if self._complete:
                raise ValueError("the output log is complete")
            offset, failure = self._size, self._failure
        stored = 0
        while failure is None and stored < len(data):
            try:
                stored += os.pwrite(self._fd, data[stored:], offset + stored)
            except OSError as error:
                failure = error
        with self._changed:
            self._size += stored
            self._failure = failure
            self._lost_bytes += len(data) - stored
            self._changed.notify_all()

    def complete(self) -> None:
        """Declare that nothing more will be appended; idempotent.

        Subscribers that have read everything end.
        """
        with self._changed:
            self._complete = True
            self._close_if_unused_locked()
            self._changed.notify_all()

    def remove(self) -> None:
        """Complete the log and delete its file; idempotent. The writer must have finished.

        Those who are reading still get every byte; new subscribers are refused.
        """
        self.complete()
        with self._changed:
            if self._removed:
                return
            self._removed = True
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def subscribe(self, subscriber: str = "", offset: int = 0) -> Subscription:
        """Start reading at byte `offset`; `subscriber` is listed in `subscribers` meanwhile.

        On a log that still grows, an offset past its present end waits for the
        output to get there. Raises `OffsetError` when it never will,
        `OutputRemovedError`, ValueError for a negative offset.
        """
        if offset < 0:
            raise ValueError(f"offset must not be negative: {offset}")
        with self._changed:
            if self._removed:
                raise OutputRemovedError
            if self._complete and offset > self._size:
                raise OffsetError(offset, self._size)
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            subscription = Subscription(self, subscriber, offset)
            self._subscriptions.add(subscription)
            return subscription

    def _close_if_unused_locked(self) -> None:
        if self._complete and not self._subscriptions and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Subscription:
    """One subscriber's reading of an `OutputLog`: an iterator of chunks and a context manager.

    Made by `OutputLog.subscribe`. One thread iterates; any thread may `close`.

    Attributes: `subscriber` (the name given), `offset` (of the next byte to be read).
    """

    def __init__(self, log: OutputLog, subscriber: str, offset: int) -> None:
        self.subscriber = subscriber
        self.offset = offset
        self._log = log
        # Both guarded by the log's condition.
        self._closed = False
        self._reading = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return the next bytes (1 to 256 KiB), as soon as there are any.

        Blocks, without using the CPU, until bytes are appended, the log is complete
        or `close` is called. Raises StopIteration at the end of the complete output
        or once closed, `OffsetError` when the output ended before the offset asked
        for, `OutputIncompleteError` when some output was lost.
        """
        log = self._log
        with log._changed:
            log._changed.wait_for(lambda: self._closed or log._complete or log._size > self.offset)
            if self._closed:
                raise StopIteration
            count = min(log._size - self.offset, _CHUNK_BYTES)
            if count <= 0:
                self._end_locked()
            # From here to the end of the read, close() leaves the descriptor open.
            self._reading = True
            fd = log._fd
        try:
            chunk = os.pread(fd, count, self.offset)
        finally:
            self._done_reading()
        if not chunk:
            raise OSError(f"the output file was truncated by someone else at byte {self.offset}")
        self.offset += len(chunk)
        return chunk

    def close(self) -> None:
        """Stop reading; idempotent. Wakes a thread that waits in `next`."""
        log = self._log
        with log._changed:
            self._closed = True
            if not self._reading:
                self._release_locked()
            log._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _done_reading(self) -> None:
        with self._log._changed:
            self._reading = False
            if self._closed:  # while we read
                self._release_locked()

    def _end_locked(self) -> NoReturn:
        """Close and raise what a subscriber at the end of a complete log is due."""
        log = self._log
        self._closed = True
        self._release_locked()
        if log._failure is not None:
            raise OutputIncompleteError(log._failure, log._lost_bytes)
        if self.offset > log._size:
            raise OffsetError(self.offset, log._size)
        raise StopIteration

    def _release_locked(self) -> None:
        self._log._subscriptions.discard(self)
        self._log._close_if_unused_locked()
