"""What is prepared for the next jobs, so that a start only has to execute a command.

A spare is all that a job needs before its command is known: an ID, a cgroup without limits,
a forked process that waits to be told what to execute, two pipes, an empty output log and a
thread. `Spares` keeps one ready and makes the next one in a thread of its own:

    spares = Spares(subtree, output_directory, scratch, spawner)
    spares.fill()
    spare = spares.take()          # a ready one, or one that is made now
    ...
    spares.close()

Thread safety: every method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from cgroups import CgroupError
from errors import ResourceError, WorkerError, in_words
from limits import NO_LIMITS
from spawner import SpawnerDiedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from broadcaster import OutputLog
    from cgroups import Cgroup, Subtree
    from outputdirectory import OutputDirectory
    from scratch import Scratch
    from spawner import Process, Spawner

__all__ = ["Body", "JobThread", "Spare", "Spares"]

logger = logging.getLogger(__name__)

# A new spare is made this long after the last one was taken, because making it would slow down
# the start that took it. A start takes 1 to 2 ms, and telling its caller some more.
_HEAD_START_S = 0.003
_DISCARD_S = 10.0  # how long killed processes may take to be gone


class Body(NamedTuple):
    """What a job consists of, except its processes. `RunningJob` closes the descriptors."""

    job_id: str
    output: OutputLog
    output_fd: int  # read end of the pipe that is the job's stdout and stderr
    exit_fd: int  # read end of the pipe on which the fork server tells the end
    thread: JobThread


class Spare(NamedTuple):
    """What the next job will consist of. `discard` removes all of it."""

    body: Body
    cgroup: Cgroup | None  # without limits
    process: Process
    discard: Callable[[], None]

    @property
    def job_id(self) -> str:
        """The ID of the next job."""
        return self.body.job_id


class Spares:
    """Keeps one spare ready. Nothing is made before the first `fill` or `take`.

    `subtree`: where the cgroups are made; None for jobs without. `scratch`: for the TMPDIRs.
    """

    def __init__(
        self,
        subtree: Subtree | None,
        output_directory: OutputDirectory,
        scratch: Scratch,
        spawner: Spawner,
    ) -> None:
        self._subtree = subtree
        self._output_directory = output_directory
        self._scratch = scratch
        self._spawner = spawner
        # Guards all below. Notified when a spare is to be made, when one was made and by
        # `close`. Never held while a spare is made or discarded.
        self._changed = threading.Condition()
        self._ready: Spare | None = None
        self._due_s: float | None = None  # monotonic; when to make one; None for not at all
        self._thread: threading.Thread | None = None
        self._closed = False

    def take(self) -> Spare:
        """Return a ready spare, or a new one if none is ready. The caller owns it.

        Raises `CgroupError`, `ResourceError`, `SpawnerDiedError`.
        """
        spare = self._pop()
        if spare is not None and not spare.process.is_waiting:  # somebody killed its process
            spare.discard()
            spare = None
        self.fill(_HEAD_START_S)
        return spare or self._make()

    def fill(self, delay_s: float = 0.0) -> None:
        """Have a spare made if there is none, `delay_s` seconds from now. Does not block.

        A spare that cannot be made is not reported: the next `take` meets the same error.
        """
        with self._changed:
            if self._closed or self._due_s is not None or self._ready is not None:
                return
            self._due_s = time.monotonic() + delay_s
            if self._thread is None:
                self._start_thread_locked()
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread and discard the spare; idempotent. Nobody may take any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        if (spare := self._pop()) is not None:
            with contextlib.suppress(CgroupError):  # the end of the subtree reports it
                spare.discard()

    def _pop(self) -> Spare | None:
        with self._changed:
            spare, self._ready = self._ready, None
            return spare

    def _start_thread_locked(self) -> None:
        # A daemon, so that a program which does not close its worker can end.
        thread = threading.Thread(target=self._run, name="spares", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._due_s = None  # the next `take` tries again
            logger.warning("no thread can be started to prepare jobs; starts are slower: %s", error)
        else:
            self._thread = thread

    def _run(self) -> None:
        while self._await_due():
            try:
                spare = self._make()
            except (WorkerError, CgroupError, SpawnerDiedError):
                spare = None  # the next `take` meets the same error and asks again
            with self._changed:
                self._ready, self._due_s = spare, None
                self._changed.notify_all()
            del spare  # or this thread would keep the parts of a job that has ended

    def _await_due(self) -> bool:
        """Block until a spare is to be made; False once `close` was called."""
        with self._changed:
            while not self._closed:
                left_s = None if self._due_s is None else self._due_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return True
                self._changed.wait(left_s)
            return False

    def _make(self) -> Spare:
        job_id = str(uuid.uuid4())
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            cgroup = None
            if self._subtree is not None:
                cgroup = self._subtree.create(job_id, NO_LIMITS)
                undo.callback(_discard_cgroup, cgroup)
            try:
                self._scratch.make(job_id)
                undo.callback(self._scratch.remove, job_id)
                output = self._output_directory.make_log(job_id)
                undo.callback(_discard_output, output)
                output_fd, stdout_fd = _pipe(undo, theirs)
                # A job that runs as our own user can read its pipe, too.
                os.set_blocking(output_fd, False)
                exit_fd, their_exit_fd = _pipe(undo, theirs)
                # For a job that opens /dev/stdout. Only the job's user gets at the pipe there.
                os.fchmod(stdout_fd, 0o622)
                process = self._spawner.fork(
                    job_id, stdout_fd=stdout_fd, exit_fd=their_exit_fd, output_fd=output_fd
                )
            except OSError as error:
                raise ResourceError(
                    f"no room for the files of a new job: {in_words(error)}"
                ) from error
            undo.callback(self._spawner.forget, job_id)
            undo.callback(process.close)
            thread = JobThread()
            undo.callback(thread.discard)
            body = Body(job_id, output, output_fd, exit_fd, thread)
            return Spare(body, cgroup, process, undo.pop_all().close)


class JobThread(threading.Thread):
    """The thread of a job, started before the job: to start it beside the exec took 0.2 ms.

    Raises `ResourceError` if it cannot be started.
    """

    def __init__(self) -> None:
        # A daemon, so that a program which does not close its worker can end.
        super().__init__(name="spare-job", daemon=True)
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        try:
            self.start()
        except RuntimeError as error:
            raise ResourceError(f"no room for another thread: {error}", retry_after_s=1) from error

    def run(self) -> None:
        work = self._work.get()
        if work is not None:
            work()

    def give(self, job_id: str, work: Callable[[], None]) -> None:
        """Run `work` and end. Does not block."""
        self.name = f"job-{job_id[:8]}"
        self._work.put(work)

    def discard(self) -> None:
        """End without any work. Blocks until the thread has ended."""
        self._work.put(None)
        self.join()


def _pipe(undo: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe whose read end `undo` closes, and whose write end `theirs` closes."""
    read_fd, write_fd = os.pipe()
    undo.callback(os.close, read_fd)
    theirs.callback(os.close, write_fd)
    return read_fd, write_fd


def _discard_output(output: OutputLog) -> None:
    """Remove the output log of a job that did not start: its disk may be read-only by now."""
    try:
        output.remove()
    except OSError as error:
        logger.error(
            "a job that did not start: its output stays until the next worker: %s", in_words(error)
        )


def _discard_cgroup(cgroup: Cgroup) -> None:
    """Remove the cgroup of a job that did not start, with the processes in it."""
    if cgroup.remove_if_unused():
        return
    cgroup.kill()
    try:
        cgroup.wait_empty(_DISCARD_S)
    except TimeoutError as error:
        reason = in_words(error)
        logger.error("a job that did not start: its cgroup stays until it is empty: %s", reason)
    else:
        cgroup.remove()
