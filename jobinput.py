"""The input of a job: a pipe that is the job's stdin, and those who write to it.

`JobInput` belongs to a job and keeps the write end. An `InputWriter` writes bytes to it, one after
the other:

    job_input = JobInput(job_id)
    ...                            # the leader gets `job_input.read_fd` as its stdin
    job_input.begin()              # closes our copy of the read end
    with job_input.open(offset=0) as writer:
        writer.write(b"hello\\n")  # blocks while the pipe is full
        writer.end()               # the job reads end-of-file
    job_input.finish()             # the job has ended

Only `InputWriter.end` and the end of the job close the pipe. A writer that closes leaves the pipe
open, so another one can continue at `JobInput.size`. A new writer takes over from the former one:
the former one may belong to a connection that is lost, although nobody has noticed yet.

Thread safety: every method may be called from any thread; one thread at a time calls
`InputWriter.write`. No thread holds the lock while it uses the pipe, because any process that has
the pipe can keep the kernel's own lock of it (splice(2) to a full socket does). A `write` then
blocks until that process is gone, whatever wakes it otherwise.

If the job may outlive this process, others have copies of the pipe's descriptors for the next main
process (`kept_fds`, `inputpipe.py`). The job reads end-of-file when all of these are closed.

Sources: pipe(7), poll(2), eventfd(2).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import TYPE_CHECKING, Self

from errors import (
    InputError,
    InputOffsetError,
    InputTakenError,
    ResourceError,
    WorkerClosedError,
    in_words,
)
from inputpipe import InputPipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["InputWriter", "JobInput"]

_TAKE_OVER_S = 5.0  # the thread of the former writer only has to wake up
_NOBODY_READS = "it has closed its stdin, or has ended"
_ENDED = "its input was ended"


class JobInput:
    """The input of one job.

    `pipe`: that of a former main process. `is_kept`: the job may outlive this process. `on_end`:
    called when the input is about to be ended, unless the job has ended; others may then close
    their copies of `kept_fds`. Raises `ResourceError` when there is no descriptor left.
    """

    def __init__(
        self,
        job_id: str,
        pipe: InputPipe | None = None,
        *,
        is_kept: bool = False,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self._job_id = job_id
        self._on_end = on_end
        try:
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            try:
                self._pipe = pipe or InputPipe.make(is_kept=is_kept)
            except OSError:
                os.close(self._wake_fd)
                raise
        except OSError as error:
            raise ResourceError(f"no room for the input of a new job: {in_words(error)}") from error
        # Guards all below, and the wake-up descriptor. Notified when a thread has left the pipe and
        # when a writer takes over. Never held while the pipe is used.
        self._changed = threading.Condition()
        self._over: str | None = None  # why nobody can write any more
        self._is_left = False  # to another process
        self._writer: InputWriter | None = None  # the one that may write
        self._users = 0  # threads that use the pipe or wait for it: nobody closes it meanwhile
        self._closed = False  # the descriptors are closed, or about to be
        if self._pipe.fd < 0:
            self._end(_ENDED)

    @property
    def read_fd(self) -> int:
        """The read end of the pipe, until `begin` closes it."""
        return self._pipe.read_fd

    @property
    def kept_fds(self) -> list[int]:
        """What another process needs to go on with this input."""
        return self._pipe.kept_fds

    @property
    def size(self) -> int:
        """How many bytes the job's pipe has taken."""
        return self._pipe.size

    @property
    def is_over(self) -> bool:
        """Whether the job gets no more input."""
        return self._over is not None

    def begin(self) -> None:
        """Close our copy of the read end: the leader has its own; idempotent."""
        self._pipe.begin()

    def finish(self) -> None:
        """End the input, because the job has ended or did not start; idempotent.

        `size` is final when this returns, unless the kernel holds a writer up.
        """
        self.begin()
        self._end("it has ended")
        with self._changed:
            self._await_users_locked()

    def lose_reader(self) -> None:
        """End the input, because nobody reads it any more; idempotent."""
        self._end(_NOBODY_READS)

    def leave(self) -> None:
        """Leave the input to another process. Writers then get `WorkerClosedError`.

        Nothing is written any more when this returns, unless the kernel holds a writer up.
        """
        self._is_left = True
        self._end("its worker was left")
        with self._changed:
            self._await_users_locked()

    def open(self, offset: int | None = None) -> InputWriter:
        """Return a writer whose first byte is byte `offset` of the input; None: the next one.

        The writer before can write no more; this waits until it has stopped. Raises `InputError` if
        the job gets no more input; `InputOffsetError` if `offset` is not `size`;
        `InputTakenError` if another writer takes over meanwhile, or the kernel holds up the one
        before.
        """
        writer = InputWriter(self)
        with self._changed:
            self._check_locked()
            if self._writer is not None:
                self._close_locked(self._writer, is_taken=True)
            self._writer = writer
            self._changed.notify_all()
            is_free = self._changed.wait_for(
                lambda: not self._users or self._writer is not writer, _TAKE_OVER_S
            )
            if not is_free or self._writer is not writer:
                self._close_locked(writer)
                raise InputTakenError(self._job_id)
            self._check_locked()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)  # it woke the writer before
            if offset is not None and offset != self.size:
                self._close_locked(writer)
                raise InputOffsetError(self._job_id, offset, self.size)
        return writer

    # --- for the writers ---

    def write_some(self, writer: InputWriter, data: memoryview) -> int | None:
        """Write what the pipe takes now; wait if it takes nothing. None if `writer` is closed.

        Raises as `InputWriter.write` does.
        """
        with self._used(writer) as is_open:
            if not is_open:
                return None
            try:
                return self._pipe.write(data)
            except BlockingIOError:
                self._wait(select.POLLOUT)
                return 0
            except BrokenPipeError:
                self._end(_NOBODY_READS)
                raise self._error() from None

    def wait(self, writer: InputWriter) -> None:
        """See `InputWriter.wait`."""
        with self._used(writer) as is_open:
            if is_open and self._wait(0):
                self._end(_NOBODY_READS)
        with self._used(writer):
            pass  # raises if another writer took over, or the job gets no more input

    def end(self, writer: InputWriter) -> None:
        """See `InputWriter.end`."""
        with contextlib.suppress(InputError), self._used(writer) as is_open:
            if is_open:
                self._on_end()
                self._end(_ENDED, writer)

    def close(self, writer: InputWriter) -> None:
        """See `InputWriter.close`."""
        with self._changed:
            self._close_locked(writer)

    def _close_locked(self, writer: InputWriter, *, is_taken: bool = False) -> None:
        if not writer.is_closed:
            writer.is_closed, writer.is_taken = True, is_taken
            if self._writer is writer:
                self._writer = None
                self._wake_locked()

    def _wait(self, events: int) -> bool:
        """Block until the pipe has one of `events` or no reader, or somebody is to wake up.

        Returns whether it has no reader.
        """
        poll = select.poll()
        poll.register(self._pipe.fd, events)
        poll.register(self._wake_fd, select.POLLIN)
        return bool(dict(poll.poll()).get(self._pipe.fd, 0) & select.POLLERR)

    @contextlib.contextmanager
    def _used(self, writer: InputWriter) -> Iterator[bool]:
        """Keep the descriptors open within this context; False if `writer` is closed.

        Raises `InputError`, `InputTakenError`.
        """
        with self._changed:
            if writer.is_taken:
                raise InputTakenError(self._job_id)
            is_open = not writer.is_closed
            if is_open:
                self._check_locked()
            self._users += 1
        try:
            yield is_open
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()
            self._close_if_over()

    def _check_locked(self) -> None:
        if self._over is not None:
            self._await_users_locked()
            raise self._error()

    def _await_users_locked(self) -> None:
        # The job may have read, and ended, before the thread that wrote has counted the bytes.
        # Who learns that the input is over may ask for `size` then.
        self._changed.wait_for(lambda: not self._users, _TAKE_OVER_S)

    def _error(self) -> InputError | WorkerClosedError:
        if self._is_left:
            return WorkerClosedError()
        return InputError(self._job_id, self._over or "")

    def _end(self, why: str, writer: InputWriter | None = None) -> None:
        """Let nobody write any more; `why` does not replace an earlier reason.

        `writer`: the one that ends the input itself, for which this is no error.
        """
        with self._changed:
            if self._over is None:
                self._over = why
                if writer is not None:
                    writer.is_closed = True
                self._wake_locked()
        self._close_if_over()

    def _close_if_over(self) -> None:
        """Close the descriptors once nobody can write any more and nobody uses them."""
        with self._changed:
            if self._closed or self._over is None or self._users:
                return
            self._closed = True
        self._pipe.close()
        os.close(self._wake_fd)

    def _wake_locked(self) -> None:
        if not self._closed:
            os.eventfd_write(self._wake_fd, 1)


class InputWriter:
    """Writes to the input of a job; a context manager. Made by `Worker.open_input`.

    One thread writes; any thread may `wait` or `close`.
    Attributes, which `JobInput` sets: `is_closed`; `is_taken`, closed because another took over.
    """

    def __init__(self, job_input: JobInput) -> None:
        self._input = job_input
        self.is_closed = False
        self.is_taken = False

    @property
    def size(self) -> int:
        """How many bytes of input the job's pipe has taken, from all writers."""
        return self._input.size

    def write(self, data: bytes | memoryview) -> bool:
        """Write all of `data`. Blocks while the job does not read and its pipe is full.

        Returns False if this writer was closed before all was written; `size` tells how much was.
        Raises `InputError` if the job gets no more input, because it has closed its stdin or has
        ended; `InputTakenError` if another writer took over.
        """
        left = memoryview(data)
        while left:
            size = self._input.write_some(self, left)
            if size is None:
                return False
            left = left[size:]
        return True

    def end(self) -> None:
        """End the input: the job reads end-of-file after what was written.

        Nothing happens if the job has closed its stdin or has ended. Raises `InputTakenError`.
        """
        self._input.end(self)

    def wait(self) -> None:
        """Block until this writer is closed. Raises as `write` does, as soon as that is known."""
        self._input.wait(self)

    def close(self) -> None:
        """Stop writing and leave the input open; idempotent. Wakes `write` and `wait`."""
        self._input.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
