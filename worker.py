"""Start commands as jobs, watch their output, stop them.

The words, used throughout the project:

    job         one command and every process that comes of it; a random UUID names it
    leader      the process that executes the command
    owner       the name of the user that a job belongs to
    stop        SIGKILL to every process of the job
    grace       the time between SIGTERM and SIGKILL, if a stop has one
    linger      the time that other processes may hold the output after the leader's own end
    subscriber  the name of a user who is reading a job's output
    chunk       some bytes of output, as they come: not a line, not text
    spare       what is prepared for the next job: a process, a cgroup, a thread, an output log

    with Worker() as worker:
        job_id = worker.start("echo", ["hello"])
        with worker.stream(job_id) as chunks:
            for chunk in chunks:
                sys.stdout.buffer.write(chunk)
        print(worker.wait(job_id).exit_code)

This module and those it imports are a library. It needs nothing but the standard library and
runs on Linux 5.4 or newer. It knows no roles and no network, prints nothing, and logs to the
loggers named after its modules. `make library` copies its files.

A finished job is kept until it is removed, by `Worker.remove` or by a rule: `Retention`.

Processes: the main process holds the `Worker`. The fork server, a child of it, forks and reaps
the jobs (`forkserver.py`).

Thread safety: every method of `Worker` may be called from any thread. Each running job has a
thread of its own (`job.py`). One thread makes spares (`spares.py`). With an age in the rule one
more thread waits for finished jobs to be too old (`retention.py`). Locks are taken one at a
time, except in this order: a job's, the registry's, an output log's or a watch's.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import privileges
from argv import checked_argv
from broadcaster import Gap, OffsetError, OutputIncompleteError, OutputRemovedError, Subscription
from cgroups import CgroupError, Subtree
from ending import Ending
from environment import Account, Surroundings, account_of, problem_of
from errors import (
    CommandError,
    CommandNotExecutableError,
    CommandNotFoundError,
    DirectoryError,
    InputError,
    InputOffsetError,
    InputTakenError,
    JobRunningError,
    ResourceError,
    SignalError,
    StartTimeoutError,
    StopTimeoutError,
    StoreError,
    TakeoverError,
    UnknownJobError,
    WatchBehindError,
    WorkerClosedError,
    WorkerError,
)
from finding import EVERY_JOB, JobFilter, check_name, check_owner, checked_labels
from jobinput import InputWriter
from jobstate import EndReason, Job, Status, UsageSource, Work
from limits import Bounds, Enforcement, Limits, Usage
from outputerrors import OutputLeftError
from parts import Parts
from registry import Counts
from resuming import no_terms
from retention import Retention
from spawner import SpawnerDiedError
from watching import JobEvent, JobEventKind, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from budget import Budget
    from job import RunningJob
    from registry import FinishedJob
    from resuming import Terms
    from store import Store

__all__ = [
    "Account",
    "Bounds",
    "CgroupError",
    "CommandError",
    "CommandNotExecutableError",
    "CommandNotFoundError",
    "Counts",
    "DirectoryError",
    "EndReason",
    "Ending",
    "Enforcement",
    "Gap",
    "InputError",
    "InputOffsetError",
    "InputTakenError",
    "InputWriter",
    "Job",
    "JobEvent",
    "JobEventKind",
    "JobFilter",
    "JobRunningError",
    "Limits",
    "OffsetError",
    "OutputIncompleteError",
    "OutputLeftError",
    "ResourceError",
    "Retention",
    "SignalError",
    "SpawnerDiedError",
    "StartTimeoutError",
    "Status",
    "StopTimeoutError",
    "StoreError",
    "Subscription",
    "TakeoverError",
    "UnknownJobError",
    "Usage",
    "UsageSource",
    "Watch",
    "WatchBehindError",
    "Worker",
    "WorkerClosedError",
    "WorkerError",
    "account_of",
]

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 10.0


class Worker:
    """Runs jobs until it is closed. A context manager.

    `limits`: for jobs that are started without their own. `enforcement`: what to do when
    cgroups cannot enforce limits. "require" raises `CgroupError`; "auto" logs a warning and
    enforces what it can; "off" uses no cgroups. Then a stop reaches what has the leader's session
    or comes of the leader, and `Job.may_have_escaped` says if more may be alive. With cgroups the
    main process moves into a leaf of its own below `cgroup_root` (default: the cgroup it is in),
    and `close` moves it back.
    `output_dir`: where output is kept; made with mode 0700; default: a temporary directory. It
    belongs to one worker at a time, and output that a former worker left in it is deleted.
    `reserve_bytes`: how much of its disk output leaves free; default: 5 % of the disk or 1 GiB,
    whichever is less. Finished jobs give way before output is lost.
    `uids`: each job runs as the one of these users that `start` is given, and not as the user of
    the main process. Needs the right to change users (`privileges.can_change_user`).
    What a user's jobs leave behind is removed when the last of them ends: System V and POSIX IPC
    objects, and files in /tmp, /var/tmp, /dev/shm and /run/lock.
    `host_accounts`: the `uids` are those of accounts of the host. A job has the groups of its
    account, and what it leaves in these places stays, because the account's user may have other
    processes.
    `bounds`: what all jobs together may have, where there are cgroups; default: `Bounds()`.
    `retention`: how long finished jobs are kept; default: until they are removed.
    `environment`: variables that every job gets, like PATH, unless it asks for others.
    `homes`: a directory in which the home of an `Account` is made when its first job starts, with
    mode 0700. `tmp_dir`: where each job has its TMPDIR; default: a temporary directory. All that
    a former worker left there is removed. Other users must be able to pass through both. With
    `uids`, both need CAP_CHOWN; without it the attribute `homes` is None, and TMPDIR is /tmp.
    `ending`: the timeout, grace and linger of jobs that are started without their own.
    `store`: where jobs are recorded, so that those that have ended survive this process, and what
    they have in `output_dir` and `tmp_dir`; it is not closed here. Default: in memory. A job that
    ran when a former worker of the store ended, and that nobody has gone on with, is LOST.

    `restart_dir`: a directory of ours alone. With it and a `store` on disk, jobs that run are left
    to the next worker: for `restart_window` seconds after this process has ended, even by SIGKILL,
    the fork server keeps them. Then it kills them. The next worker goes on with them in `resume`.
    It needs the same `uids`, `homes`, `tmp_dir` and cgroups; otherwise `TakeoverError` is raised,
    and nothing is lost. `close` ends all jobs, `leave` does not.

    Raises ValueError for an `environment` that no job can have; `CgroupError`; OSError when
    `output_dir` cannot be used; PermissionError when `uids` cannot be.
    """

    def __init__(  # noqa: PLR0913 -- all are optional
        self,
        *,
        limits: Limits | None = None,
        bounds: Bounds | None = None,
        enforcement: Enforcement = "auto",
        cgroup_root: str | os.PathLike[str] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        reserve_bytes: int | None = None,
        uids: range | None = None,
        retention: Retention | None = None,
        environment: Mapping[str, str] | None = None,
        homes: str | os.PathLike[str] | None = None,
        tmp_dir: str | os.PathLike[str] | None = None,
        ending: Ending | None = None,
        host_accounts: bool = False,
        store: Store | None = None,
        restart_dir: str | os.PathLike[str] | None = None,
        restart_window: float = 0,
    ) -> None:
        environment = dict(environment or {})
        if problem := problem_of(environment):
            raise ValueError(problem)
        self._limits = limits or Limits()
        self._ending = ending or Ending()
        self._uids = uids
        parts = self._parts = self._make_parts(
            limits=self._limits,
            bounds=bounds,
            enforcement=enforcement,
            cgroup_root=cgroup_root,
            output_dir=output_dir,
            reserve_bytes=reserve_bytes,
            uids=uids,
            retention=retention or Retention(),
            environment=environment,
            homes=homes,
            tmp_dir=tmp_dir,
            host_accounts=host_accounts,
            store=store,
            restart_dir=restart_dir,
            restart_window=restart_window,
        )
        self._scratch, self._table, self._registry = parts.scratch, parts.table, parts.registry
        self._spawner, self._starter = parts.spawner, parts.starter
        self.homes = parts.homes
        if uids is None:
            # With `uids`, `drop_privileges` does this: it needs a process without threads.
            parts.begin()

    def _make_parts(self, **options: Any) -> Parts:
        return Parts(**options)

    @property
    def subtree(self) -> Subtree | None:
        """The cgroups of the jobs; None without."""
        return self._parts.subtree

    @property
    def is_broken(self) -> bool:
        """Whether no job can start any more, because the fork server has died."""
        return self._spawner.has_died

    @property
    def fork_server_fd(self) -> int:
        """A pidfd of the fork server; valid until the worker is closed or left."""
        return self._spawner.pidfd

    @property
    def has_taken_over(self) -> bool:
        """Whether the fork server, and the jobs that run, come from a former worker."""
        return self._parts.has_taken_over

    def drop_privileges(self, uid: int) -> None:
        """Make the main process the ordinary user `uid`, for good; jobs can still be started.

        The fork server keeps the rights that jobs need. `uid` must not be one that a job may
        have. Call it before there are jobs or threads, with one open worker in the process.
        Raises `CgroupError`, OSError, `SpawnerDiedError`; the process should end then.
        """
        if self._uids is None or uid in self._uids:
            raise ValueError("jobs must run as users of their own, and not as this one")
        if os.geteuid() != uid:
            self._parts.give_to(uid)
        privileges.become_ordinary_user(uid)
        self._parts.begin()  # not before, because the spare's cgroup must belong to `uid`

    def resume(self, terms: Terms = no_terms) -> None:
        """Go on with the jobs that a former worker of the store and of `restart_dir` has left.

        A job that has ended meanwhile gets its true end. `terms`: is given each job as it was
        started, and returns what `start` got as `budget` and `on_end`; default: neither. Call it
        once, when this process has given up its rights, and before the first start. Raises OSError,
        `ResourceError`, `SpawnerDiedError`.
        """
        self._parts.resume(terms)

    def start(  # noqa: PLR0913 -- all but the first are optional
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        owner: str = "",
        limits: Limits | None = None,
        uid: int | None = None,
        account: Account | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        keep_tmp: bool = False,
        budget: Budget | None = None,
        on_end: Callable[[], None] | None = None,
        name: str = "",
        labels: Mapping[str, str] | None = None,
        stdin: bool = False,
        ending: Ending | None = None,
        request_id: str = "",
        digest: bytes = b"",
        no_queue: bool = False,
    ) -> str:
        """Execute `command` with `args` as a new job and return its ID, a random UUID4.

        argv is passed on as it is, never through a shell; a command without a slash is
        looked up in the job's PATH. The leader runs in a session of its own, with stdin /dev/null,
        stdout and stderr on one pipe, umask 077 and no core dumps. It gains no rights by an exec.
        It is in its cgroup, under every limit, before its first instruction.

        `uid`: the user that the job runs as, one of the worker's `uids`; None if it has none.
        `account`: that user's name, home and shell, as the job is told; default: those of the
        host's account, or a user of the owner's name whose home is /.
        `env`: variables beside PATH, HOME, USER, LOGNAME, SHELL, LANG, TERM, PYTHONUNBUFFERED,
        TMPDIR and JOB_ID. They replace all of these but JOB_ID, and the worker's `environment`.
        `cwd`: the directory that the job begins in. It is entered as the job's user. A relative
        path begins at the home. "" means the home, or / if the user may not enter that.
        `keep_tmp`: keep TMPDIR (`Job.tmp_directory`) as long as the job. `ending`: its times.
        `budget`: bounds how much output is kept. When it or the disk has no byte left, finished
        jobs give way: `FinishedJobs.giver`. `on_end` is called when the job's processes are gone,
        before anybody can learn of its end; if the start fails, only if the error has `lives`.
        `name`, `labels`: what the job can be found by; `finding.py` has the rules. `stdin`: its
        stdin is a pipe, which `open_input` writes to, and not /dev/null.
        `request_id`, `digest`: of `started_by`. `no_queue`: of `SlurmWorker`; here no job waits.

        Blocks until the command is executing. That takes as long as the kernel waits for the
        command's file. Raises `StartTimeoutError` if it takes 10 s; `CommandError` (or the more
        specific `CommandNotFoundError`, `CommandNotExecutableError`, `DirectoryError`; also for
        an `env` or `cwd` that no process can have), `CgroupError`, `ResourceError`,
        `SpawnerDiedError`, `StoreError`, `WorkerClosedError`, ValueError. Nothing is left then.
        """
        argv = checked_argv(command, args)
        check_name(name)
        labels = checked_labels(labels) if labels else {}
        self._check_user(owner, uid)
        account = account or account_of(os.geteuid() if uid is None else uid, owner)
        around = Surroundings(command, account, env or {}, cwd)
        limits, times, begin = limits or self._limits, ending or self._ending, around.directory
        work = Work(argv, owner, uid, limits, budget, on_end, begin, name, labels, times, stdin)
        work = work._replace(keep_tmp=keep_tmp, request_id=request_id, digest=digest)
        return self._starter.start(work._replace(no_queue=no_queue), around)

    def _check_user(self, owner: str, uid: int | None) -> None:
        check_owner(owner)
        if (uid is None) != (self._uids is None) or (self._uids and uid not in self._uids):
            raise ValueError(f"the uid {uid} is not one of those of this worker: {self._uids}")

    def stop(self, job_id: str, *, reason: str = "", grace: float = 0) -> Job:
        """SIGKILL every process of the job; return its state once they are gone.

        `grace`: if not 0, every process gets SIGTERM first, and only what is left after so many
        seconds is killed. A job that ends meanwhile is STOPPED, with the exit code or signal of
        its leader. A stop without grace ends the grace of another one.
        `reason`: any text. If this stop ends the job, the text becomes its `stop_reason`. A job
        that has ended before, or whose leader has, keeps its own end. Idempotent. Raises
        `UnknownJobError`; `StopTimeoutError` when the kernel has not let go of the processes
        after 10 s; ValueError for a negative grace.
        """
        if not grace >= 0:  # refuses not-a-number, too
            raise ValueError(f"grace must be 0 seconds or more, not {grace!r}")
        job = self._job(job_id)
        try:
            if grace and job.terminate(EndReason.STOPPED, reason, grace):
                job.wait(grace)
        finally:  # also if a Ctrl-C (KeyboardInterrupt) ends the wait
            job.kill(EndReason.STOPPED, reason)
        if not job.wait(_STOP_TIMEOUT_S):
            raise StopTimeoutError(job_id, _STOP_TIMEOUT_S)
        return job.snapshot()

    def signal(self, job_id: str, number: int, *, everything: bool = False) -> None:
        """Send a signal to the leader of a job, or to every process of the job.

        `number`: of `signal.valid_signals()`. `everything`: each process gets the signal once, also
        one that is forked meanwhile. Without cgroups a process does not get it that is forked
        meanwhile, or that has left the leader's session and lost its parents.
        Does not wait for what the signal does. A job that the signal ends is FINISHED, even if
        it is SIGKILL. Raises `UnknownJobError`; `SignalError` when the leader has ended, or the
        kernel does not permit it; `CgroupError`, OSError, `SpawnerDiedError`, ValueError.
        """
        if number not in signal.valid_signals():
            raise ValueError(f"{number!r} is not the number of a signal")
        self._job(job_id).signal(number, everything=everything)

    def remove(self, job_id: str) -> None:
        """Forget a finished job and delete its output.

        Those who are reading the output still get all of it; the disk has its room back
        when the last of them ends. From now on the job is unknown, to a second removal too.
        Raises `UnknownJobError`, `JobRunningError`, `WorkerClosedError`; OSError when the
        job is forgotten but its output could not be deleted: `close` tries again.
        """
        with self._starter.open():
            self._registry.remove(job_id)

    def make_room(self, owner: str, budget: Budget) -> Budget | None:
        """See that a budget of `owner` has a byte left; finished jobs give way if it has none.

        Returns None, or the budget (this one or a parent) that still has none. Raises
        `WorkerClosedError`.
        """
        with self._starter.open():
            taken, refuser = self._registry.take(owner, budget, 1)
            budget.give_back(taken)
            return refuser

    def started_by(self, owner: str, request_id: str) -> tuple[str, bytes] | None:
        """Return the ID of the job of a request, and the request's digest; None if none is kept."""
        return self._table.of_request(owner, request_id)

    def charge(self, budget_for: Callable[[str], Budget]) -> None:
        """Have budgets count the output that former workers of the store have kept.

        `budget_for`: returns a budget like those that the owner's jobs are started with. Call it
        before the first start.
        """
        self._registry.charge(budget_for)

    def owner(self, job_id: str) -> str | None:
        """Return whose job it is; None if there is no such job."""
        return self._registry.owner(job_id)

    def status(self, job_id: str, *, live_usage: bool = True, owner: str | None = None) -> Job:
        """Return what is known of the job. Raises `UnknownJobError`.

        `live_usage`: see `list`. `owner`: a job of anybody else counts as unknown.
        """
        return self._registry.get(job_id, owner).snapshot(live_usage=live_usage)

    def observe(self, job_id: str) -> Callable[[], Job]:
        """Return a function that returns the job's state, also after the job was removed.

        Raises `UnknownJobError`.
        """
        return self._job(job_id).snapshot

    def list(
        self, *, owner: str | None = None, matching: JobFilter = EVERY_JOB, live_usage: bool = False
    ) -> tuple[Job, ...]:
        """Return all jobs, or those of `owner` and of a filter, in the order they were started.

        `usage` is None for those that are running, unless `live_usage`.
        """
        found = self.list_after(0, owner=owner, matching=matching, live_usage=live_usage)
        return tuple(job for _, job in found)

    def list_after(
        self,
        position: int,
        *,
        owner: str | None = None,
        matching: JobFilter = EVERY_JOB,
        live_usage: bool = False,
        newest_first: bool = False,
    ) -> Iterator[tuple[int, Job]]:
        """Yield jobs like `list`, each with its position in the order of all starts.

        Begins after `position`, so that a list can be read in parts; 0 is before all. A job keeps
        its position when others are removed. A job is looked at when it is yielded.
        `newest_first`: in the opposite order.
        """
        if owner is not None and matching.owner not in (None, owner):
            return
        wanted = replace(matching, owner=owner) if owner is not None else matching
        for job in self._registry.all(wanted, position, newest_first=newest_first):
            state = job.snapshot(live_usage=live_usage)
            if matching.accepts(state.status):
                yield job.position, state

    def counts(self) -> Counts:
        """Return how many jobs there are, and how many have ended and why."""
        return self._registry.counts()

    def watch(self, matching: JobFilter = EVERY_JOB) -> Watch:
        """Return an iterator of what happens to the jobs that a filter picks; see `Watch`.

        It blocks while nothing happens. Its `close` may be called from any thread; leave it by
        `with`, or close it. Raises `WorkerClosedError`, as does the iterator once the worker is
        closed and all events were read.
        """
        return self._registry.watch(matching)

    def stream(  # noqa: PLR0913 -- all but the first are optional
        self,
        job_id: str,
        *,
        subscriber: str = "",
        offset: int = 0,
        tail_lines: int | None = None,
        since: datetime | None = None,
        follow: bool = True,
        timestamps: bool = False,
    ) -> Subscription:
        """Read the job's output from byte `offset` to its end, as it comes.

        `tail_lines`: begin no earlier than with the last lines, as many as these, of the output so
        far. `since`: begin no earlier than with what was written then or later; up to 100 ms more,
        and more for the early output of a long job. `follow`: False ends with the output so far.
        `timestamps`: set `Subscription.written_at`, when each chunk was written.

        Returns an iterator of chunks (bytes), which blocks while there is no output
        and ends when the job has. Its `close` may be called from any thread; leave it
        by `with`, or close it. `subscriber` is shown in the job's status meanwhile.
        Raises `UnknownJobError`, `OffsetError`, `WorkerClosedError`, ValueError (a negative
        number); iterating raises `OffsetError` if the job ended before its output reached `offset`.
        Output beyond a ceiling or the disk is kept in part: its head and its latest bytes.
        `Subscription.gap` tells where bytes are missing, and `OutputIncompleteError` is raised
        at the end for a subscriber that missed some. One that keeps up misses none.
        """
        try:
            return self._job(job_id).output.subscribe(
                subscriber,
                offset,
                tail_lines=tail_lines,
                since=since,
                follow=follow,
                timestamps=timestamps,
            )
        except OutputRemovedError:
            self._job(job_id)  # has been removed
            raise WorkerClosedError from None

    def open_input(self, job_id: str, offset: int | None = None) -> InputWriter:
        """Return a writer to the job's stdin, a context manager that leaves the stdin open.

        `offset`: the byte of the input with which it continues, as a check; None: the next one.
        Any thread may close the writer. A new writer takes over from the one before; that one's
        methods then raise `InputTakenError`. Raises `UnknownJobError`, `InputOffsetError`;
        `InputError` if the job was started without `stdin`, or gets no more input.
        """
        return self._job(job_id).open_input(offset)

    def write_input(
        self, job_id: str, data: bytes, *, offset: int | None = None, end: bool = False
    ) -> int:
        """Write `data` to the job's stdin; `end`: the job reads end-of-file after it.

        Blocks while the job does not read and its pipe is full. Returns how many bytes the job has
        got altogether. Raises as `open_input` and `InputWriter.write` do.
        """
        with self.open_input(job_id, offset) as writer:
            writer.write(data)
            if end:
                writer.end()
            return writer.size

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """Block until the job has ended and return its state.

        Raises `UnknownJobError`; TimeoutError after `timeout` seconds.
        """
        job = self._job(job_id)
        if not job.wait(timeout):
            raise TimeoutError(f"job {job_id} is still running after {timeout:g} s")
        return job.snapshot()

    def leave(self) -> None:
        """End this worker, and leave the jobs that run to the next one; idempotent.

        For a worker with a `restart_window`. Those who read, wait or stop meanwhile get an error:
        `OutputLeftError`, `WorkerClosedError`.
        """
        self._scratch.hurry()
        if self._starter.close(kills=False):
            self._parts.leave()

    def close(self, *, grace: float = 0) -> None:
        """Start no more jobs, stop those that run, delete output that is not kept; idempotent.

        The end reason of those jobs is CLOSED. `grace`: for how many seconds they may go on after
        SIGTERM; 0 kills them at once. A `close` in another thread meanwhile ends the grace, and
        does not wait. Blocks until every process and thread of the worker is gone. A process that
        the kernel does not let go within 10 s is left behind. Does nothing in a forked process.
        """
        if not self._parts.are_ours():
            return
        self._scratch.hurry()
        if is_first := self._starter.close():
            self._registry.terminate(EndReason.CLOSED, grace)
        for job in self._registry.running():
            job.kill(EndReason.CLOSED)
        if is_first:
            self._registry.close(time.monotonic() + _STOP_TIMEOUT_S)
            self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _job(self, job_id: str) -> RunningJob | FinishedJob:
        return self._registry.get(job_id)
