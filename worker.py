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

With the modules that it imports this is a library that needs nothing but the standard
library, on Linux 5.4 or newer. It knows no roles and no network, prints nothing, and
logs to `logging.getLogger(__name__)`.

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
import functools
import logging
import os
import pwd
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from broadcaster import (
    OffsetError,
    OutputDirectory,
    OutputIncompleteError,
    OutputLog,
    OutputRemovedError,
    Subscription,
)
from cgroups import Cgroup, CgroupError, Subtree
from errors import (
    CommandError,
    CommandNotExecutableError,
    CommandNotFoundError,
    JobRunningError,
    ResourceError,
    StartTimeoutError,
    StopTimeoutError,
    UnknownJobError,
    WorkerClosedError,
    WorkerError,
)
from job import (
    Buffers,
    Descriptors,
    EndReason,
    Job,
    JobThread,
    RunningJob,
    Status,
    UsageSource,
    Work,
    kill_processes,
)
from limits import NO_LIMITS, Enforcement, Limits, Usage
from privileges import can_change_user, can_kill_any, drop_privileges
from retention import FinishedJob, Registry, Retention
from spawner import (
    AttachError,
    Process,
    Spawner,
    SpawnerDiedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

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
_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 10.0


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
        self._registry = Registry(retention or Retention())
        self._buffers = Buffers()
        # Guards the five below. Notified when _busy falls. Never held during I/O.
        self._idle = threading.Condition()
        self._busy = 0  # calls that are starting or removing jobs
        self._executing: dict[str, _Place] = {}  # those of them whose exec is waited for
        self._closed = False
        self._place: _Place | None = None  # prepared for the next job
        self._place_is_wanted = True  # and nobody is preparing one
        with contextlib.ExitStack() as undo:
            self._output_dir = OutputDirectory(output_dir)
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
            return self._launch(Work(argv, owner, uid, limits or self._limits, budget, on_end))

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
            thread = JobThread()
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

    def _launch(self, work: Work) -> str:
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
            job = RunningJob(
                place.job_id,
                work,
                place.output,
                cgroup,
                self._spawner,
                pid,
                Descriptors(place.output_fd, place.exit_read_fd, pidfd),
                finish=self._registry.finish,
                trim=self._registry.trim,
                thread=place.thread,
                buffers=self._buffers,
                started_at=started_at,
                prepare_place=self._prepare_place,
            )
            undo.pop_all()
            # Before the thread has it, which may finish it at once.
            self._registry.add(job)
            place.thread.give(job)
            return job.job_id

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
            kill_processes(place.job_id, place.cgroup, self._spawner)

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

    def _job(self, job_id: str) -> RunningJob | FinishedJob:
        return self._registry.get(job_id)


class _Place(NamedTuple):
    """Where a job is going to be, the process that is going to be it, and the thread."""

    job_id: str
    cgroup: Cgroup | None  # without limits yet
    process: Process
    output: OutputLog
    output_fd: int  # of two pipes, the read ends; see Descriptors
    exit_read_fd: int
    thread: JobThread
    discard: Callable[[], None]
    """Takes it all down again."""


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


def _environment(job_id: str, work: Work) -> dict[str, str]:
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


def _pipe(undo: contextlib.ExitStack, ours: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe whose read end `undo` closes, and whose write end `ours` closes."""
    read_fd, write_fd = os.pipe()
    undo.callback(os.close, read_fd)
    ours.callback(os.close, write_fd)
    return read_fd, write_fd


def _discard(cgroup: Cgroup) -> None:
    """Remove a cgroup with what is in it, unless the kernel does not let that go."""
    cgroup.kill()
    try:
        cgroup.wait_empty(_STOP_TIMEOUT_S)
    except TimeoutError as error:
        logger.error("a start that failed: its cgroup stays until the next server: %s", error)
    else:
        cgroup.remove()
