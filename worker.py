"""Start commands as jobs, watch their output, stop them.

The words, used throughout the project:

    job         one command and every process that comes of it; a random UUID names it
    leader      the process that executes the command
    owner       the name of whoever started the job
    stop        SIGKILL to every process of the job
    subscriber  the name of somebody who is reading a job's output
    chunk       some bytes of output, as they come: not a line, not text

    with Worker() as worker:
        job_id = worker.start("echo", ["hello"])
        with worker.stream(job_id) as chunks:
            for chunk in chunks:
                sys.stdout.buffer.write(chunk)
        print(worker.wait(job_id).exit_code)

With `cgroups.py`, `spawner.py` and `broadcaster.py` beside it this is a library
that needs nothing but the standard library, on Linux 5.4 or newer. It knows no
roles and no network, prints nothing, and logs to `logging.getLogger(__name__)`.

A finished job is kept until it is removed, by `Worker.remove` or by a rule: `Retention`.

Thread safety: every method of `Worker` may be called from any thread. Each running
job has a thread of its own, which moves its output and is the only one that ends
it; with an age in the rule one more thread waits for finished jobs to be too old.
Locks are taken one at a time, except in this order: a job's, the registry's, an
output log's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import heapq
import logging
import os
import pwd
import select
import signal
import sys
import tempfile
import termios
import threading
import time
import uuid
from collections import OrderedDict, deque
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from broadcaster import (
    OffsetError,
    OutputIncompleteError,
    OutputLog,
    OutputRemovedError,
    Subscription,
)
from cgroups import NO_LIMITS, Cgroup, CgroupError, Enforcement, Limits, Subtree, Usage
from privileges import can_change_user, can_kill_any, drop_privileges
from spawner import (
    AttachError,
    Exit,
    Process,
    Spawner,
    SpawnerDiedError,
    read_exit,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from broadcaster import Budget

__all__ = [
    "CgroupError",
    "CommandError",
    "CommandNotExecutableError",
    "CommandNotFoundError",
    "EndReason",
    "Enforcement",
    "Job",
    "JobRunningError",
    "Limits",
    "OffsetError",
    "OutputIncompleteError",
    "ResourceError",
    "Retention",
    "SpawnerDiedError",
    "StartTimeoutError",
    "Status",
    "StopTimeoutError",
    "Subscription",
    "UnknownJobError",
    "Usage",
    "UsageSource",
    "Worker",
    "WorkerClosedError",
    "WorkerError",
]

logger = logging.getLogger(__name__)

MAX_ARGV_BYTES: Final = 128 * 1024
"""The longest argv, in bytes with a terminator each; xargs(1) has the same by default."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LARGE_PIPE_BYTES = 1024 * 1024  # as much as an unprivileged process may ask for (pipe(7))
_BUFFER_BYTES, _BUFFERS = _LARGE_PIPE_BYTES, 4  # what is in a pipe is taken at once
# For how long a job is left alone each time that its output has been taken: see _rest_ms.
_TINY_BYTES = 4096
_TINY_REST_MS, _REST_MS = 4, 1
_HURRY_S, _HURRIES_S = 0.002, 0.02  # how long followers rest: for each of them, and at most
_HEAD_START_S = 0.002  # of a job, before the next one's place is prepared
_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 10.0
_OUTPUT_SUFFIX = ".out"


class WorkerError(Exception):
    """The base of the errors raised here, except ValueError and TypeError for wrong arguments."""


class UnknownJobError(WorkerError, LookupError):
    """There is no job of that ID. Attribute: `job_id`."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id}")
        self.job_id = job_id


class JobRunningError(WorkerError):
    """The job has not ended, so it cannot be removed. Attribute: `job_id`."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} is still running; stop it first")
        self.job_id = job_id


class CommandError(WorkerError, ValueError):
    """The command cannot be executed. Attribute: `command`."""

    def __init__(self, command: str, problem: str) -> None:
        super().__init__(f"cannot execute {_shorten(command)!r}: {problem}")
        self.command = command


class CommandNotFoundError(CommandError):
    """There is no such command, or its interpreter is missing."""


class CommandNotExecutableError(CommandError):
    """The command exists but is not an executable program."""


class ResourceError(WorkerError):
    """The host has run out of something a new job needs: processes, descriptors, disk, memory."""


class StartTimeoutError(WorkerError, TimeoutError):
    """The command was not executing after a while, and was killed. Attribute: `command`."""

    def __init__(self, command: str, timeout: float) -> None:
        super().__init__(
            f"{_shorten(command)!r} was not executing after {timeout:g} s, and was killed: the "
            "kernel waits for its file (on a server that does not answer, or leased by a process), "
            "or its limits are too low; try again later, or with others"
        )
        self.command = command


class StopTimeoutError(WorkerError, TimeoutError):
    """The job's processes were killed but are not gone yet; the job is still RUNNING."""

    def __init__(self, job_id: str, timeout: float) -> None:
        super().__init__(
            f"job {job_id} was killed, but after {timeout:g} s its processes are not all gone "
            "(the kernel waits for a device); stop it again later"
        )


class WorkerClosedError(WorkerError):
    """The worker is closing or closed."""

    def __init__(self) -> None:
        super().__init__("the worker is shutting down")


class Status(Enum):
    """RUNNING becomes one of the others, once, when the output is complete."""

    RUNNING = "running"
    STOPPED = "stopped"  # our stop is what ended it
    FINISHED = "finished"  # it ended by itself, or somebody else ended it


class EndReason(Enum):
    """Why a job is no longer running."""

    EXITED = "exited"
    SIGNALLED = "signalled"  # by a signal that was not our stop
    STOPPED_BY_OWNER = "stopped by its owner"
    STOPPED_BY_ADMIN = "stopped by an admin"
    OUT_OF_MEMORY = "out of memory"
    SERVER_SHUTDOWN = "server shut down"
    LOST = "lost"  # the spawner died: nobody knows how the leader ended


class UsageSource(Enum):
    """Where a job's usage comes from."""

    CGROUP = "cgroup"  # all of the job's processes
    RUSAGE = "rusage"  # its leader and the children that this waited for, once it has ended


@dataclass(frozen=True, slots=True)
class Job:
    """What is known of a job at one moment."""

    job_id: str
    owner: str
    command: str
    args: tuple[str, ...]
    status: Status
    end_reason: EndReason | None  # None while it runs
    exit_code: int | None  # None unless the leader exited
    signal: int | None  # None unless a signal killed the leader
    started_at: datetime  # aware, UTC
    ended_at: datetime | None  # when the leader's end was noticed
    output_bytes: int  # stored so far
    output_lost_bytes: int  # written after those, and not stored
    subscribers: tuple[str, ...]  # the names of those reading now, each once
    limits: Limits  # those in force; None where not
    usage: Usage | None  # None where nothing is known (yet)
    usage_source: UsageSource | None  # None when `usage` is


@dataclass(frozen=True, slots=True)
class Retention:
    """How long finished jobs and their output are kept. None means no bound.

    What is too old is removed. What is too much, of all jobs together, is taken from the
    owner who has the most of it, oldest first; so nobody's jobs push out those of somebody
    who has fewer. The job that ended last is never too much. Jobs that run do not count.
    Raises ValueError for numbers that make no sense.
    """

    age_s: float | None = None
    """Seconds since the job's end."""
    jobs: int | None = None
    output_bytes: int | None = None
    """What is stored of their output."""
    argv_bytes: int | None = None
    """Their commands and arguments, which are kept in memory, as Python stores them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            minimum = 1 if field.name == "jobs" else 0
            if value is not None and not value >= minimum:  # so that not-a-number is refused too
                raise ValueError(f"{field.name} must be at least {minimum}, not {value!r}")


class Worker:
    """Runs jobs until it is closed. A context manager.

    `limits`: for jobs started without their own. `enforcement`: what to do when
    cgroups cannot enforce them: "require" raises `CgroupError`, "auto" logs a warning
    and enforces what it can, "off" uses no cgroups (then a job's stop reaches its
    process group only). With cgroups the calling process moves into a leaf of its own
    below `cgroup_root` (default: the cgroup it is in), and back on `close`.
    `output_dir`: where the output is kept, made with mode 0700; it belongs to one
    worker at a time, and left-over output in it is deleted; default: a temporary one.
    `uids`: each job runs as one of these users, which `start` is told, and not as the
    caller's; needs the right to change users (`spawner.can_change_user`). `files`: for
    `open_file`, each path with the flags of open(2). `retention`: how long finished jobs
    are kept; default: until they are removed.

    There is one process, thread, cgroup and empty output file more than there are jobs: they
    wait for the next one.

    Raises `CgroupError`; OSError when `output_dir` cannot be used; PermissionError when
    `uids` cannot be.
    """

    def __init__(  # noqa: PLR0913 -- all are optional
        self,
        *,
        limits: Limits | None = None,
        enforcement: Enforcement = "auto",
        cgroup_root: str | os.PathLike[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        uids: range | None = None,
        files: Mapping[str, int] | None = None,
        retention: Retention | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._uids = uids
        self._registry = _Registry(retention or Retention())
        self._buffers = _Buffers()
        # Guards the five below. Notified when _busy falls. Never held during I/O.
        self._idle = threading.Condition()
        self._busy = 0  # calls that are starting or removing jobs
        self._executing: dict[str, _Place] = {}  # those of them whose exec is waited for
        self._closed = False
        self._place: _Place | None = None  # prepared for the next job
        self._place_is_wanted = True  # and nobody is preparing one
        with contextlib.ExitStack() as undo:
            self._output_dir = _OutputDir(output_dir)
            undo.callback(self._output_dir.close)
            # The cgroup first: the spawner is to be born in our leaf.
            self._subtree = Subtree.open(enforcement, root=cgroup_root, limits=self._limits)
            if self._subtree is not None:
                undo.callback(self._subtree.close)
            if uids is not None:
                self._check_rights()
            self._spawner = Spawner(
                jobs_cgroup=self._subtree.jobs if self._subtree else None,
                uids=uids,
                dismantle=self._subtree.dismantling if self._subtree else None,
                files=files,
            )
            undo.callback(self._spawner.close)
            undo.callback(self._discard_place)
            self._undo = undo.pop_all()
        if uids is None:
            self._prepare_place()

    @property
    def subtree(self) -> Subtree | None:
        """The cgroups of the jobs; None without."""
        return self._subtree

    def _check_rights(self) -> None:
        if not can_change_user():
            raise PermissionError(
                errno.EPERM, "jobs as other users need root, or CAP_SETUID and CAP_SETGID"
            )
        if self._subtree is None and not can_kill_any():
            raise PermissionError(
                errno.EPERM, "jobs as other users need cgroups, root, or CAP_KILL to be stopped"
            )

    def drop_privileges(self, uid: int) -> None:
        """Make this process the ordinary user `uid`, for good; the worker goes on working.

        Its helper process keeps the rights that jobs need. `uid` must not be one that a
        job may have. Call it before there are jobs or threads, with one open worker in
        the process. Raises `CgroupError`, OSError, `SpawnerDiedError`; the process should
        end then.
        """
        if self._uids is None or uid in self._uids:
            raise ValueError("jobs must run as users of their own, and not as this one")
        if os.geteuid() != uid:
            self._output_dir.give_to(uid)
            if self._subtree is not None:
                self._subtree.hand_over(uid)
                self._spawner.dismantle_at_end()
        drop_privileges(uid)
        self._prepare_place()  # not before, for the cgroup is to be ours

    def open_file(self, path: str) -> int:
        """Open one of `files` with the rights the process had; return the descriptor.

        Raises OSError, PermissionError for another path, `SpawnerDiedError`.
        """
        return self._spawner.open(path)

    def start(  # noqa: PLR0913 -- all but the first are optional
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        owner: str = "",
        limits: Limits | None = None,
        uid: int | None = None,
        budget: Budget | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> str:
        """Execute `command` with `args` as a new job and return its ID, a random UUID4.

        argv is passed on as it is, never through a shell; a command without a slash is
        looked up in a fixed PATH. The leader runs in /, in a session of its own, with
        stdin /dev/null, stdout and stderr on one pipe, umask 077, no core dumps, and only
        PATH, HOME, LANG, USER and JOB_ID in its environment. Nothing it executes gains
        privileges. It is in its cgroup, under every limit, before its first instruction.

        `uid`: who the job runs as, one of the worker's `uids`; None if it has none.
        `budget`: how much output is kept. `on_end` is called when the job's processes are
        gone, right before its end is told to anybody, and must not block; not if the
        start fails.

        Blocks until the command is executing, which may take as long as the kernel waits for
        its file. Raises `StartTimeoutError` if it is not after 10 s; `CommandError` (or the more
        specific `CommandNotFoundError`, `CommandNotExecutableError`), `CgroupError`,
        `ResourceError`, `SpawnerDiedError`, `WorkerClosedError`, ValueError for a wrong
        `uid`; nothing of the job is left then.
        """
        argv = _checked_argv(command, args)
        if (uid is None) != (self._uids is None) or (self._uids and uid not in self._uids):
            raise ValueError(f"the uid {uid} is not one of those of this worker: {self._uids}")
        with self._open():
            job = self._launch(_Work(argv, owner, uid, limits or self._limits, budget, on_end))
            self._registry.add(job)
        return job.job_id

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Hold `close` back. Raises `WorkerClosedError` if it has begun."""
        with self._idle:
            if self._closed:
                raise WorkerClosedError
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _take_place(self) -> _Place:
        """Return the place that is prepared, or a new one."""
        place = self._pop_place()
        if place is not None and not place.process.is_waiting:
            place.discard()  # somebody has killed it
            place = None
        return place or self._make_place()

    def _pop_place(self) -> _Place | None:
        with self._idle:
            place, self._place = self._place, None
            if place is not None:
                self._place_is_wanted = True
            return place

    def _make_place(self) -> _Place:
        """Raises as `start` does."""
        job_id = str(uuid.uuid4())
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            cgroup = None
            if self._subtree is not None:
                cgroup = self._subtree.create(job_id, NO_LIMITS)
                undo.callback(_discard, cgroup)
            try:
                output = self._output_dir.make_log(job_id)
                undo.callback(output.remove)
                output_fd, stdout_fd = _pipe(undo, theirs)
                # A job that runs as our own user can read its pipe, too.
                os.set_blocking(output_fd, False)
                exit_read_fd, exit_fd = _pipe(undo, theirs)
                # For a job that opens /dev/stdout. Only its own user gets at the pipe there.
                os.fchmod(stdout_fd, 0o622)
                process = self._spawner.fork(job_id, stdout_fd=stdout_fd, exit_fd=exit_fd)
            except OSError as error:
                raise ResourceError(f"no room for the output of a new job: {error}") from error
            undo.callback(process.close)
            thread = _JobThread()
            undo.callback(thread.discard)
            parts = cgroup, process, output, output_fd, exit_read_fd, thread
            return _Place(job_id, *parts, undo.pop_all().close)

    def _prepare_place(self) -> None:
        """Prepare the next job's place, if nobody has. What fails fails again at its start."""
        with self._idle:
            if not self._place_is_wanted:
                return
            self._place_is_wanted = False
        try:
            with self._open():
                place = self._make_place()
                with self._idle:
                    self._place = place
        except (WorkerError, CgroupError, SpawnerDiedError):
            with self._idle:
                self._place_is_wanted = True

    def _discard_place(self) -> None:
        place = self._pop_place()
        if place is not None:
            with contextlib.suppress(CgroupError):  # the subtree's end will tell
                place.discard()

    def _launch(self, work: _Work) -> _Job:
        with contextlib.ExitStack() as undo:
            undo.callback(self._prepare_place)
            place = self._take_place()
            # Before it is told: a Ctrl-C may come between that and the answer.
            undo.callback(self._spawner.kill, place.job_id)
            undo.callback(place.discard)
            place.output.budget = work.budget
            started_at = datetime.now(UTC)
            cgroup = None
            if self._subtree is not None and place.cgroup is not None:
                # Not when it was made: what could be enforced then need not be still.
                cgroup = self._subtree.limit(place.cgroup, work.limits)
            try:
                with self._execution(place):
                    pid, pidfd = place.process.execute(
                        work.argv,
                        _environment(place.job_id, work),
                        uid=work.uid,
                        timeout_s=_START_TIMEOUT_S,
                        kill=functools.partial(self._kill, place),
                    )
                    undo.callback(os.close, pidfd)
            except TimeoutError as error:
                raise StartTimeoutError(work.argv[0], _START_TIMEOUT_S) from error
            except AttachError as error:
                path = cgroup.path / "cgroup.procs" if cgroup else Path()
                raise CgroupError(
                    f"a new process cannot enter {path}: {error.strerror}",
                    path=path,
                    value="0",
                    remedy="see the kernel's log",
                    code=error.errno or 0,
                ) from error
            except OSError as error:
                raise _exec_error(work.argv, error) from error
            job = _Job(
                place.job_id,
                work,
                place.output,
                cgroup,
                self._spawner,
                pid,
                _Descriptors(place.output_fd, place.exit_read_fd, pidfd),
                self._registry,
                thread=place.thread,
                buffers=self._buffers,
                started_at=started_at,
                prepare_place=self._prepare_place,
            )
            place.thread.give(job)
            undo.pop_all()
            return job

    @contextlib.contextmanager
    def _execution(self, place: _Place) -> Iterator[None]:
        """Have `close` end what is waited for within this context: WorkerClosedError then."""
        with self._idle:
            if self._closed:
                raise WorkerClosedError
            self._executing[place.job_id] = place
        try:
            yield
        finally:
            with self._idle:
                was_ended = self._executing.pop(place.job_id, None) is None
        if was_ended:
            raise WorkerClosedError

    def _kill(self, place: _Place) -> None:
        """Kill the process there, if it still is. Its start sees to what comes of that."""
        with contextlib.suppress(CgroupError):
            _kill_processes(place.job_id, place.cgroup, self._spawner)

    def stop(self, job_id: str, *, reason: EndReason = EndReason.STOPPED_BY_OWNER) -> Job:
        """SIGKILL every process of the job; return its state once they are gone.

        `reason` is recorded if this is what ends the job; a job that has already ended,
        or whose leader has, keeps its own end. Idempotent. Raises `UnknownJobError`;
        `StopTimeoutError` when the kernel has not let go of the processes after 10 s.
        """
        job = self._job(job_id)
        job.kill(reason)
        if not job.wait(_STOP_TIMEOUT_S):
            raise StopTimeoutError(job_id, _STOP_TIMEOUT_S)
        return job.snapshot()

    def remove(self, job_id: str) -> None:
        """Forget a finished job and delete its output.

        Those who are reading the output still get all of it; the disk has its room back
        when the last of them ends. From now on the job is unknown, to a second removal too.
        Raises `UnknownJobError`, `JobRunningError`, `WorkerClosedError`; OSError when the
        job is forgotten but its output could not be deleted: `close` tries again.
        """
        with self._open():
            self._registry.remove(job_id)

    def make_room(self, owner: str) -> bool:
        """Remove finished jobs of `owner`, oldest first, until that gives back output.

        Jobs whose output somebody is reading are passed over. Returns False when there is
        none left, or the worker is closed.
        """
        try:
            with self._open():
                return self._registry.make_room(owner)
        except WorkerClosedError:
            return False

    def owner(self, job_id: str) -> str:
        """Return whose job it is. Raises `UnknownJobError`."""
        return self._job(job_id).owner

    def status(self, job_id: str) -> Job:
        """Return what is known of the job. Raises `UnknownJobError`."""
        return self._job(job_id).snapshot()

    def list(self, *, owner: str | None = None) -> tuple[Job, ...]:
        """Return all jobs, or those of `owner`, in the order they were started.

        `usage` is None for those that are running; `status` reads it.
        """
        return tuple(
            job.snapshot(live_usage=False)
            for job in self._registry.all()
            if owner is None or job.owner == owner
        )

    def stream(self, job_id: str, *, subscriber: str = "", offset: int = 0) -> Subscription:
        """Read the job's output from byte `offset` to its end, as it comes.

        Returns an iterator of chunks (bytes), which blocks while there is no output
        and ends when the job has. Its `close` may be called from any thread; leave it
        by `with`, or close it. `subscriber` is shown in the job's status meanwhile.
        Raises `UnknownJobError`, `OffsetError`, ValueError (a negative offset),
        `WorkerClosedError`;
        iterating raises `OutputIncompleteError` if output was lost, and `OffsetError`
        if the job ended before its output reached `offset`.
        """
        try:
            return self._job(job_id).output.subscribe(subscriber, offset)
        except OutputRemovedError:
            self._job(job_id)  # has been removed
            raise WorkerClosedError from None

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """Block until the job has ended and return its state.

        Raises `UnknownJobError`; TimeoutError after `timeout` seconds.
        """
        job = self._job(job_id)
        if not job.wait(timeout):
            raise TimeoutError(f"job {job_id} is still running after {timeout:g} s")
        return job.snapshot()

    def close(self) -> None:
        """Start no more jobs, stop those that run, delete all output; idempotent.

        Their end reason is SERVER_SHUTDOWN. Blocks until every process and thread of
        the worker is gone; a process that the kernel does not let go within 10 s is
        logged and left behind.
        """
        with self._idle:
            if self._closed:
                return
            self._closed = True
            executing, self._executing = self._executing, {}
        for place in executing.values():
            self._kill(place)
        with self._idle:
            self._idle.wait_for(lambda: not self._busy, _START_TIMEOUT_S)
        for job in self._registry.all():
            job.kill(EndReason.SERVER_SHUTDOWN)
        self._registry.close(time.monotonic() + _STOP_TIMEOUT_S)
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _job(self, job_id: str) -> _Job | _FinishedJob:
        return self._registry.get(job_id)


class _Place(NamedTuple):
    """Where a job is going to be, the process that is going to be it, and the thread."""

    job_id: str
    cgroup: Cgroup | None  # without limits yet
    process: Process
    output: OutputLog
    output_fd: int  # of two pipes, the read ends; see _Descriptors
    exit_read_fd: int
    thread: _JobThread
    discard: Callable[[], None]
    """Takes it all down again."""


class _JobThread(threading.Thread):
    """The thread of a job, which waits for it: beside the exec it took 0.2 ms to start one.

    Raises `ResourceError` if there is no room for it.
    """

    def __init__(self) -> None:
        # A daemon, lest a program that forgets to close its worker hang at its end.
        super().__init__(name="next-job", daemon=True)
        self._job: SimpleQueue[_Job | None] = SimpleQueue()
        try:
            self.start()
        except RuntimeError as error:
            raise ResourceError(f"no room for another thread: {error}") from error

    def run(self) -> None:
        job = self._job.get()
        if job is not None:
            job.run()

    def give(self, job: _Job) -> None:
        """See the job through. Does not block."""
        self.name = f"job-{job.job_id[:8]}"
        self._job.put(job)

    def discard(self) -> None:
        """End, for there is no job. Blocks until it has."""
        self._job.put(None)
        self.join()


class _Work(NamedTuple):
    """What a job is to be; the arguments of `start`, checked."""

    argv: list[str]
    owner: str
    uid: int | None
    limits: Limits
    budget: Budget | None
    on_end: Callable[[], None] | None


class _Buffers:
    """What output is in on its way from a job's pipe to its file.

    A few for all jobs: one for each would be a gigabyte, and most jobs are silent.
    """

    def __init__(self) -> None:
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(_BUFFER_BYTES)))

    @contextlib.contextmanager
    def lent(self) -> Iterator[memoryview]:
        """Lend one within this context. Blocks until another job's output is in its file."""
        buffer = self._free.get()
        try:
            yield buffer
        finally:
            self._free.put(buffer)


class _Descriptors(NamedTuple):
    """A job's descriptors, owned by its thread, which closes them when the job has ended."""

    output: int  # read end of the pipe that is the job's stdout and stderr
    exit: int  # read end of the pipe on which the spawner tells the end
    leader: int  # pidfd


class _Job:
    """A job and the thread that sees it through."""

    def __init__(  # noqa: PLR0913 -- what _launch has prepared
        self,
        job_id: str,
        work: _Work,
        output: OutputLog,
        cgroup: Cgroup | None,
        spawner: Spawner,
        pid: int,
        fds: _Descriptors,
        registry: _Registry,
        *,
        thread: _JobThread,
        buffers: _Buffers,
        started_at: datetime,
        prepare_place: Callable[[], None],
    ) -> None:
        self.job_id = job_id
        self.owner = work.owner
        self.output = output
        self.thread = thread
        self._argv = tuple(work.argv)
        self._on_end = work.on_end
        self._cgroup = cgroup
        self._limits = cgroup.limits if cgroup else NO_LIMITS
        self._spawner = spawner
        self._pid = pid
        self._fds = fds  # closed, and not to be used, once the job has ended
        self._registry = registry
        self._buffers = buffers
        self._prepare_place = prepare_place
        self.is_finished = False  # the registry's to write and to read
        self._started_at = started_at
        # Guards all below. Notified when the job has ended. Never held during I/O.
        self._ended = threading.Condition()
        self._stop_reason: EndReason | None = None  # set by the stop that found it alive
        self._status = Status.RUNNING
        self._end_reason: EndReason | None = None
        self._exit = Exit()
        self._ended_at: datetime | None = None
        self._usage: Usage | None = None  # the final one

    def snapshot(self, *, live_usage: bool = True) -> Job:
        # Read before the lock is taken, and of no account if there is a final one by then.
        live = self._cgroup.usage() if live_usage and self._cgroup and not self.ended() else None
        with self._ended:
            usage = self._usage or live
            source = UsageSource.CGROUP if self._cgroup else UsageSource.RUSAGE
            return Job(
                job_id=self.job_id,
                owner=self.owner,
                command=self._argv[0],
                args=self._argv[1:],
                status=self._status,
                end_reason=self._end_reason,
                exit_code=self._exit.exit_code,
                signal=self._exit.signal,
                started_at=self._started_at,
                ended_at=self._ended_at,
                output_bytes=self.output.size,
                output_lost_bytes=self.output.lost_bytes,
                subscribers=self.output.subscribers,
                limits=self._limits,
                usage=usage,
                usage_source=source if usage else None,
            )

    def ended(self) -> bool:
        with self._ended:
            return self._status is not Status.RUNNING

    def wait(self, timeout: float | None) -> bool:
        """Block until the job has ended; False after `timeout` seconds."""
        with self._ended:
            return self._ended.wait_for(lambda: self._status is not Status.RUNNING, timeout)

    def kill(self, reason: EndReason) -> None:
        """SIGKILL every process of the job. Does not wait."""
        with self._ended:
            if self._status is not Status.RUNNING:
                return
            # A leader that has ended already was not ended by us, whatever happens to
            # the rest of the job.
            if self._stop_reason is None and not _is_readable(self._fds.leader):
                self._stop_reason = reason
        self._kill_processes()

    def _kill_processes(self) -> None:
        _kill_processes(self.job_id, self._cgroup, self._spawner)

    # --- what the job's thread runs --------------------------------------------------

    def run(self) -> None:
        """See the job through to its end."""
        leader_exit = None
        try:
            leader_exit = self._await_leader()
            ended_at = datetime.now(UTC)
            self._finish_processes(lost=leader_exit is None)
            usage = self._final_usage(leader_exit)
            with self._ended:
                self._usage = usage  # from now on nobody reads the cgroup, which goes
            # All that the job wrote, for none of it lives now. Not until end-of-file: a process
            # that is not of the job, or that escaped where there are no cgroups, may hold the
            # other end for ever.
            self._move_rest()
            if self._cgroup is not None:
                self._remove_cgroup(self._cgroup)
            self._end(leader_exit, ended_at)
        except Exception:
            # Not supposed to happen; but nobody may wait for this job for ever.
            logger.exception("job %s: lost", self.job_id)
            with contextlib.suppress(Exception):
                self._kill_processes()
            self._end(None, datetime.now(UTC))
        self._registry.trim()

    def _await_leader(self) -> Exit | None:
        """Move output until the leader has ended. None when the spawner died."""
        output, leader = self._fds.output, self._fds.exit
        pipe_bytes = fcntl.fcntl(output, fcntl.F_GETPIPE_SZ)
        end = select.poll()
        end.register(leader, select.POLLIN)
        poll = select.poll()
        poll.register(leader, select.POLLIN)
        poll.register(output, select.POLLIN)
        # Not at once: whoever has started this job is being told, and it begins.
        prepare_at: float | None = time.monotonic() + _HEAD_START_S
        taken_at, taken = time.monotonic(), 0
        hurries_until: float | None = None
        while True:
            due = [at for at in (prepare_at, hurries_until) if at is not None]
            left_s = max(0.0, min(due) - time.monotonic()) if due else None
            events = dict(poll.poll(left_s and left_s * 1000))
            now = time.monotonic()
            readable = events.get(output, 0) & select.POLLIN
            size = self._move_output() if readable else 0
            if prepare_at is not None and (leader in events or now >= prepare_at):
                prepare_at = None
                self._prepare_place()
            rest_ms = _rest_ms(size, taken, now - taken_at, pipe_bytes)
            if readable and not rest_ms:
                # It waits for us, and so for what its followers take of the machine. The more
                # they are the longer they rest, and the fewer times are they woken for it.
                hurries_until = now + min(_HURRY_S * self.output.subscriptions, _HURRIES_S)
            elif hurries_until is not None and now >= hurries_until:
                hurries_until = None
            self.output.hurry(on=hurries_until is not None and leader not in events)
            if leader in events:
                return read_exit(leader)
            if readable:
                if rest_ms:
                    end.poll(rest_ms)
                elif pipe_bytes < _LARGE_PIPE_BYTES:
                    # Now, and not at the start: all pipes of a user have only so much memory
                    # in all, and who goes beyond it gets pipes of 8 KiB (pipe(7)).
                    with contextlib.suppress(OSError):  # beyond it
                        pipe_bytes = fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, _LARGE_PIPE_BYTES)
                taken_at, taken = now, size
            elif output in events:
                poll.unregister(output)  # the job closed its output, and runs on

    def _move_output(self, most: int | None = None) -> int:
        """Store what is in the job's pipe, a buffer of it or `most`; return how many bytes.

        That is 0 if there are none: now, or any more.
        """
        with self._buffers.lent() as buffer, contextlib.suppress(BlockingIOError):
            size = os.readv(self._fds.output, [buffer[:most]])
            if size:
                self.output.append(buffer[:size])
            return size
        return 0

    def _move_rest(self) -> None:
        """Store what is in the job's pipe now, of which nobody writes more."""
        answer = fcntl.ioctl(self._fds.output, termios.FIONREAD, bytes(4))
        left = int.from_bytes(answer, sys.byteorder)
        while left and (size := self._move_output(left)):
            left -= size

    def _finish_processes(self, *, lost: bool) -> None:
        """Kill what the leader left behind and block until it is gone."""
        if self._cgroup is not None:
            self._cgroup.kill()
            self._cgroup.wait_empty()
        elif lost:
            # No parent is left to do it. The number is the leader's while that lives.
            if not _is_readable(self._fds.leader):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._pid, signal.SIGKILL)
            _is_readable(self._fds.leader, timeout=None)
        if not lost:
            read_exit(self._fds.exit)  # end-of-file: the process group is gone

    def _final_usage(self, leader_exit: Exit | None) -> Usage | None:
        if self._cgroup is not None:
            return replace(self._cgroup.usage(), memory_bytes=None, pids=None)
        if leader_exit is not None:
            return Usage(
                cpu_user_s=leader_exit.cpu_user_s,
                cpu_system_s=leader_exit.cpu_system_s,
                memory_peak_bytes=leader_exit.max_rss_bytes,
            )
        return None

    def _remove_cgroup(self, cgroup: Cgroup) -> None:
        try:
            cgroup.remove()
        except CgroupError as error:
            logger.error("job %s: its cgroup stays until the next start: %s", self.job_id, error)

    def _end(self, leader_exit: Exit | None, ended_at: datetime) -> None:
        """Make the one transition, out of RUNNING."""
        killed = leader_exit is not None and leader_exit.signal == signal.SIGKILL
        # Before anybody is told: who then starts the next job must find room for it.
        if self._on_end is not None:
            self._on_end()
            self._on_end = None
        with self._ended:
            if self._status is not Status.RUNNING:
                raise RuntimeError(f"job {self.job_id} has ended already")
            # The kernel's word, and not an exit code of 137, which anything can have.
            out_of_memory = self._usage is not None and bool(self._usage.oom_kills)
            if leader_exit is None:
                status, reason = Status.FINISHED, EndReason.LOST
            elif killed and self._stop_reason is not None:
                status, reason = Status.STOPPED, self._stop_reason
            elif killed and out_of_memory:
                status, reason = Status.FINISHED, EndReason.OUT_OF_MEMORY
            elif leader_exit.signal is not None:
                status, reason = Status.FINISHED, EndReason.SIGNALLED
            else:
                status, reason = Status.FINISHED, EndReason.EXITED
            self._status, self._end_reason = status, reason
            self._exit = leader_exit or Exit()
            self._ended_at = ended_at
            for fd in self._fds:
                os.close(fd)
            # In here, so that nobody sees the one without the other: a job that has
            # ended has all its output, and where the output ends the job has ended. Who
            # learns of either can remove it.
            self._registry.finish(self, self.snapshot(live_usage=False))
            self.output.complete()
            self._ended.notify_all()


class _FinishedJob:
    """What is kept of a job that has ended; it answers as a `_Job` does."""

    __slots__ = ("_job", "argv_bytes", "ended_s", "number", "output")

    def __init__(self, job: Job, output: OutputLog, number: int) -> None:
        self._job = replace(job, subscribers=()) if job.subscribers else job
        self.output = output
        self.number = number  # of its end: 1 is the first
        self.ended_s = time.monotonic()
        self.argv_bytes = sum(map(sys.getsizeof, (job.command, job.args, *job.args)))

    @property
    def job_id(self) -> str:
        return self._job.job_id

    @property
    def owner(self) -> str:
        return self._job.owner

    @property
    def output_bytes(self) -> int:
        return self._job.output_bytes

    def snapshot(self, *, live_usage: bool = True) -> Job:  # noqa: ARG002 -- it is final
        subscribers = self.output.subscribers
        return replace(self._job, subscribers=subscribers) if subscribers else self._job

    def wait(self, timeout: float | None) -> bool:  # noqa: ARG002 -- as of a _Job
        return True

    def kill(self, reason: EndReason) -> None:
        pass


class _Holding:
    """What one owner has of finished jobs. Attributes: `jobs`, in the order of their ends."""

    __slots__ = ("amounts", "jobs")

    def __init__(self) -> None:
        self.jobs: OrderedDict[str, _FinishedJob] = OrderedDict()
        self.amounts = [0, 0, 0]  # as `_amounts` has them

    @property
    def oldest(self) -> _FinishedJob:
        return next(iter(self.jobs.values()))


def _amounts(job: _FinishedJob) -> tuple[int, int, int]:
    """What a job counts for: the bounds of `Retention`, but for the age, in their order."""
    return 1, job.output_bytes, job.argv_bytes


class _FinishedJobs:
    """The finished jobs and what the rule says of them. The registry's lock guards it.

    No operation takes longer the more jobs there are or were, but for the logarithm of
    the number of owners.
    """

    def __init__(self, rule: Retention) -> None:
        self._age_s = rule.age_s
        self._bounds = (rule.jobs, rule.output_bytes, rule.argv_bytes)
        # In the order of their ends. Not plain dicts, whose first item is found by
        # going past all that were deleted before it.
        self._jobs: OrderedDict[str, _FinishedJob] = OrderedDict()
        self._holdings: dict[str, _Holding] = {}
        self._totals = [0, 0, 0]
        # For each bound the owners, those with the most first and, of as much, those
        # whose oldest job is older. An entry that is no longer true is passed over.
        self._ranks: tuple[list[tuple[int, int, str]], ...] = ([], [], [])

    def add(self, job: _FinishedJob) -> None:
        """Add one that ended after all others."""
        self._jobs[job.job_id] = job
        holding = self._holdings.setdefault(job.owner, _Holding())
        holding.jobs[job.job_id] = job
        self._count(job, holding, 1)

    def discard(self, job: _FinishedJob) -> None:
        del self._jobs[job.job_id]
        holding = self._holdings[job.owner]
        del holding.jobs[job.job_id]
        if not holding.jobs:
            del self._holdings[job.owner]
        self._count(job, holding, -1)

    def of(self, owner: str) -> Iterable[_FinishedJob]:
        """Return the jobs of the owner, oldest first."""
        holding = self._holdings.get(owner)
        return holding.jobs.values() if holding else ()

    def seconds_left(self) -> float | None:
        """How long it is until the oldest job is too old; None for ever."""
        if self._age_s is None or not self._jobs:
            return None
        oldest = next(iter(self._jobs.values()))
        return max(0.0, oldest.ended_s + self._age_s - time.monotonic())

    def excess(self) -> Iterator[_FinishedJob]:
        """Yield what is too old or too much; the caller discards each before the next."""
        while self.seconds_left() == 0:
            yield next(iter(self._jobs.values()))
        for i, bound in enumerate(self._bounds):
            while bound is not None and self._totals[i] > bound:
                job = self._who_has_most(i).oldest
                if job is next(reversed(self._jobs.values())):
                    break  # it has just ended, and somebody may be about to look at it
                yield job

    def _count(self, job: _FinishedJob, holding: _Holding, sign: int) -> None:
        for i, amount in enumerate(_amounts(job)):
            holding.amounts[i] += sign * amount
            self._totals[i] += sign * amount
            if self._bounds[i] is None:
                continue
            ranks = self._ranks[i]
            if holding.jobs:
                heapq.heappush(ranks, self._rank(i, job.owner, holding))
            if len(ranks) > 2 * len(self._holdings) + 8:  # rarely, as it grows by one a time
                ranks[:] = [self._rank(i, *item) for item in self._holdings.items()]
                heapq.heapify(ranks)

    @staticmethod
    def _rank(i: int, owner: str, holding: _Holding) -> tuple[int, int, str]:
        return -holding.amounts[i], holding.oldest.number, owner

    def _who_has_most(self, i: int) -> _Holding:
        while True:
            rank = self._ranks[i][0]
            holding = self._holdings.get(rank[2])
            if holding is not None and self._rank(i, rank[2], holding) == rank:
                return holding
            heapq.heappop(self._ranks[i])


class _Registry:
    """All jobs by their IDs, and the removal of finished ones.

    Files are deleted by whoever finds that a job is to go: its remover, the thread of
    the job whose end made it too much, or one that waits until it is too old.
    """

    def __init__(self, rule: Retention) -> None:
        self._has_age = rule.age_s is not None
        # Guards all below. Never held during I/O.
        self._lock = threading.RLock()
        # Notified when there is a finished job and was none, and by close.
        self._changed = threading.Condition(self._lock)
        self._jobs: dict[str, _Job | _FinishedJob] = {}  # as they were started
        self._finished = _FinishedJobs(rule)
        self._ends = 0
        self._leaving: deque[threading.Thread] = deque()  # of jobs that have ended
        self._ager: threading.Thread | None = None
        self._closed = False

    def add(self, job: _Job) -> None:
        with self._lock:
            if not job.is_finished:  # before we came here
                self._jobs[job.job_id] = job

    def get(self, job_id: str) -> _Job | _FinishedJob:
        with self._lock:
            try:
                return self._jobs[job_id]
            except KeyError:
                raise UnknownJobError(job_id) from None

    def all(self) -> tuple[_Job | _FinishedJob, ...]:
        with self._lock:
            return tuple(self._jobs.values())

    def finish(self, job: _Job, final: Job) -> None:
        """Keep of the job, whose thread calls this, what is of use after its end."""
        with self._lock:
            job.is_finished = True
            self._ends += 1
            finished = _FinishedJob(final, job.output, self._ends)
            self._jobs[job.job_id] = finished
            if self._finished.seconds_left() is None:
                self._changed.notify_all()
            self._finished.add(finished)
            while self._leaving and not self._leaving[0].is_alive():
                self._leaving.popleft()
            self._leaving.append(job.thread)

    def remove(self, job_id: str) -> None:
        with self._lock:
            job = self.get(job_id)
            if isinstance(job, _Job):
                raise JobRunningError(job_id)
            self._forget_locked(job)
        job.output.remove()

    def make_room(self, owner: str) -> bool:
        while True:
            with self._lock:
                jobs = self._finished.of(owner)
                job = next((job for job in jobs if not job.output.subscriptions), None)
                if job is None:
                    return False
                self._forget_locked(job)
            _delete(job)
            if job.output_bytes:
                return True

    def trim(self) -> None:
        """Remove what is too old or too much; see that the rest is when it gets too old."""
        excess = []
        with self._lock:
            if self._closed:
                return
            for job in self._finished.excess():
                self._forget_locked(job)
                excess.append(job)
            if self._ager is None and self._has_age:
                self._start_ager_locked()
        for job in excess:
            _delete(job)

    def close(self, deadline: float) -> None:
        """Forget nothing, but wait for the threads and delete all output.

        The jobs must have been killed; those that have not ended by `deadline` (monotonic)
        are left behind.
        """
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            threads = [*self._leaving, *([self._ager] if self._ager else [])]
            running = [job for job in self._jobs.values() if isinstance(job, _Job)]
        for each in running:
            each.thread.join(max(0.0, deadline - time.monotonic()))
        for thread in threads:
            thread.join()
        for job in self.all():
            if isinstance(job, _Job):
                logger.error("job %s: its processes cannot be killed; left behind", job.job_id)
            else:
                _delete(job)

    def _forget_locked(self, job: _FinishedJob) -> None:
        del self._jobs[job.job_id]
        self._finished.discard(job)

    def _start_ager_locked(self) -> None:
        self._ager = threading.Thread(target=self._remove_aged, name="retention", daemon=True)
        try:
            self._ager.start()
        except RuntimeError as error:
            self._ager = None  # the next job that ends tries again
            logger.warning("no room for the thread that removes old jobs: %s", error)

    def _remove_aged(self) -> None:
        while True:
            with self._lock:
                while not self._closed and (left := self._finished.seconds_left()) != 0:
                    self._changed.wait(left and min(left, threading.TIMEOUT_MAX))
                if self._closed:
                    return
            self.trim()


def _delete(job: _FinishedJob) -> None:
    try:
        job.output.remove()
    except OSError as error:
        logger.error("job %s: its output stays until the worker is closed: %s", job.job_id, error)


class _OutputDir:
    """A private directory for output, ours alone (flock) until closed. Attribute: `path`."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._temporary = path is None
        self.path = Path(tempfile.mkdtemp(prefix="job-worker-") if path is None else path)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.stat().st_mode & 0o077:
            raise PermissionError(
                errno.EPERM, f"others can enter it; run: chmod 700 {self.path}", str(self.path)
            )
        # Everything is done through this descriptor, which works even if the process has
        # lost the right to walk the path. Locked as long as it is open.
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise BlockingIOError(
                errno.EWOULDBLOCK, "another worker keeps its output here", str(self.path)
            ) from None
        self._delete_output()

    def make_log(self, job_id: str) -> OutputLog:
        """Make the output of a job. Raises OSError."""
        return OutputLog(f"{job_id}{_OUTPUT_SUFFIX}", dir_fd=self._fd)

    def give_to(self, uid: int) -> None:
        """Let the user `uid` keep output here. Raises OSError."""
        os.fchown(self._fd, uid, uid)

    def close(self) -> None:
        """Delete the output, and the directory if it is temporary; idempotent."""
        self._delete_output()
        if self._temporary:
            with contextlib.suppress(OSError):  # somebody else put something in it
                self.path.rmdir()
        os.close(self._fd)

    def _delete_output(self) -> None:
        for name in os.listdir(self._fd):
            job_id = name.removesuffix(_OUTPUT_SUFFIX)
            if job_id != name and _is_uuid(job_id):
                os.unlink(name, dir_fd=self._fd)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _checked_argv(command: str, args: Sequence[str]) -> list[str]:
    if isinstance(args, (str, bytes)):
        raise TypeError("args must be a sequence of strings, not one string")
    argv = [command, *args]
    for argument in argv:
        if not isinstance(argument, str):
            raise TypeError(f"command and args must be strings, not {type(argument).__name__}")
    if not command:
        raise CommandError(command, "the command is empty")
    if any("\0" in argument for argument in argv):
        raise CommandError(command, "the command or an argument contains a NUL character")
    try:
        size = sum(len(os.fsencode(argument)) + 1 for argument in argv)
    except UnicodeEncodeError as error:
        raise CommandError(command, f"it cannot be encoded: {error}") from error
    if size > MAX_ARGV_BYTES:
        raise CommandError(
            command, f"command and arguments have {size} bytes; the limit is {MAX_ARGV_BYTES}"
        )
    return argv


def _exec_error(argv: Sequence[str], error: OSError) -> WorkerError:
    """Say what it means that exec failed with `error`."""
    command = argv[0]
    if error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        return ResourceError(f"no room for another process: {error.strerror}")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if "/" not in command:
            return CommandNotFoundError(command, f"command not found in {_PATH}")
        if os.path.exists(os.path.join("/", command)):
            return CommandNotFoundError(command, "the interpreter its first line names is missing")
        return CommandNotFoundError(command, "no such file")
    if "/" in command and os.path.isdir(os.path.join("/", command)):
        return CommandNotExecutableError(command, "it is a directory")
    if error.errno in (errno.EACCES, errno.EPERM):
        return CommandNotExecutableError(command, "permission denied; is it executable?")
    if error.errno == errno.ENOEXEC:
        return CommandNotExecutableError(
            command, "not a program; a script must begin with #! and its interpreter"
        )
    return CommandError(command, error.strerror or str(error))


def _environment(job_id: str, work: _Work) -> dict[str, str]:
    """The job's whole environment: the server's own carries what is not for jobs."""
    if work.uid is not None:
        # Not an account of this host; so there is no home either.
        name, home = work.owner or str(work.uid), "/"
    else:
        try:
            user = pwd.getpwuid(os.geteuid())
            name, home = user.pw_name, user.pw_dir
        except KeyError:  # an uid without an account, as in many containers
            name, home = str(os.geteuid()), "/"
    return {"PATH": _PATH, "HOME": home, "LANG": "C.UTF-8", "USER": name, "JOB_ID": job_id}


def _shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _pipe(undo: contextlib.ExitStack, ours: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe whose read end `undo` closes, and whose write end `ours` closes."""
    read_fd, write_fd = os.pipe()
    undo.callback(os.close, read_fd)
    ours.callback(os.close, write_fd)
    return read_fd, write_fd


def _rest_ms(size: int, before: int, time_s: float, pipe_bytes: int) -> int:
    """For how long to leave a job alone that wrote `size` in the last `time_s`.

    So that what it writes meanwhile is taken, stored and sent as one: the fewer messages, the
    more is left of the machine for the job. But not if its pipe might be full by then, for it
    would have to wait. `before`: what was taken when that time began, so that the job may have
    spent most of it waiting for room.
    """
    rest_ms = _TINY_REST_MS if size < _TINY_BYTES else _REST_MS
    expected = size * rest_ms / 1000 / max(time_s, 1e-6)
    return rest_ms if max(before, size, expected) <= pipe_bytes / 2 else 0


def _kill_processes(job_id: str, cgroup: Cgroup | None, spawner: Spawner) -> None:
    """SIGKILL every process of a job, or of what is to be one. Raises `CgroupError`."""
    if cgroup is not None:
        cgroup.kill()
    else:
        with contextlib.suppress(SpawnerDiedError):  # whoever waits for the end sees to that
            spawner.kill(job_id)


def _discard(cgroup: Cgroup) -> None:
    """Remove a cgroup with what is in it, unless the kernel does not let that go."""
    cgroup.kill()
    try:
        cgroup.wait_empty(_STOP_TIMEOUT_S)
    except TimeoutError as error:
        logger.error("a start that failed: its cgroup stays until the next server: %s", error)
    else:
        cgroup.remove()


def _is_readable(pidfd: int, timeout: float | None = 0) -> bool:
    """Whether the process has ended; block for that up to `timeout` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))
