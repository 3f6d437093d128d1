"""The jobs by their IDs.

A job that runs is an object in memory. A finished job is a row of the store (`jobtable.py`): it
takes no memory, and a `FinishedJob` is made of it when somebody asks.

    registry = Registry(Retention(jobs=100), table, directory.open_log, remove_tmp)
    registry.add(job)
    row = registry.record(job, final_state)  # in the job's thread, before anybody knows of its end
    registry.finish(job, final_state, row)   # in the job's thread, when the job ends for everybody
    registry.trim()

The thread that finds that a finished job has to go deletes its files: the thread of a call that
removes the job, the thread of another job whose end exceeds the retention or whose output needs the
room, or the thread that waits until jobs are too old.

Thread safety: every method of `Registry` may be called from any thread. Its lock may be taken
while a job's is held, and an output log's, a budget's, a watch's or the table's while the
registry's is held; never the other way round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn
from weakref import WeakValueDictionary

from errors import (
    InputError,
    JobRunningError,
    SignalError,
    StoreError,
    UnknownJobError,
    WorkerClosedError,
    in_words,
)
from finding import EVERY_JOB
from outputerrors import OutputRemovedError
from retention import FinishedJobs
from watching import JobEventKind, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime

    from broadcaster import OutputLog
    from budget import Budget
    from finding import JobFilter
    from job import RunningJob
    from jobstate import EndReason, Job
    from jobtable import JobTable, Row
    from outputstate import OutputState
    from retention import Retention

__all__ = ["Counts", "FinishedJob", "Registry"]

logger = logging.getLogger(__name__)

# Rows of the store that are read at once: a page of a list, and the row that says whether there is
# another page.
_PAGE_JOBS = 101


class Counts(NamedTuple):
    """How many jobs there are."""

    running: int
    finished: int
    """Those that are kept."""
    ended: Mapping[EndReason, int]
    """How many have ended since the worker was made, also those that are no longer kept."""


class FinishedJob:
    """A job that has ended, as the store has it. It has the methods of a `RunningJob`."""

    def __init__(self, row: Row, registry: Registry) -> None:
        self.row = row
        self._registry = registry

    @property
    def job_id(self) -> str:
        return self.row.job.job_id

    @property
    def owner(self) -> str:
        return self.row.job.owner

    @property
    def name(self) -> str:
        return self.row.job.name

    @property
    def labels(self) -> Mapping[str, str]:
        return self.row.job.labels

    @property
    def started_at(self) -> datetime:
        return self.row.job.started_at

    @property
    def position(self) -> int:
        """In the order of all starts."""
        return self.row.position

    @property
    def output(self) -> OutputLog:
        return self._registry.log_of(self.row)

    def snapshot(self, *, live_usage: bool = True) -> Job:  # noqa: ARG002 -- it is final
        subscribers = self._registry.subscribers(self.row.job.job_id)
        return replace(self.row.job, subscribers=subscribers) if subscribers else self.row.job

    def wait(self, timeout: float | None) -> bool:  # noqa: ARG002 -- like RunningJob
        return True

    def kill(self, reason: EndReason, stop_reason: str = "") -> None:
        """Do nothing: it has ended."""

    def terminate(self, reason: EndReason, stop_reason: str, grace_s: float) -> bool:  # noqa: ARG002
        return False  # it has ended

    def signal(self, number: int, *, everything: bool) -> NoReturn:  # noqa: ARG002
        raise SignalError(self.job_id, "it has ended")

    def open_input(self, offset: int | None) -> NoReturn:  # noqa: ARG002
        raise InputError(self.job_id, "it has ended")


class Registry:
    """The running and the finished jobs by their IDs.

    `open_log`: returns the output log of a finished job. `remove_tmp`: removes the TMPDIR of a job
    that has kept it; called when the job is removed.
    """

    def __init__(
        self,
        rule: Retention,
        table: JobTable,
        open_log: Callable[[str, OutputState, Budget], OutputLog],
        remove_tmp: Callable[[str], object],
    ) -> None:
        self._table = table
        self._open_log = open_log
        self._remove_tmp = remove_tmp
        # Guards all below. Held while the store is read, and while a removal is written to it.
        self._lock = threading.RLock()
        # Notified when the first finished job is there, and by `close`.
        self._changed = threading.Condition(self._lock)
        self._running: dict[str, RunningJob] = {}  # in the order of their starts
        self._finished = FinishedJobs(rule, table)
        self._ended: Counter[EndReason] = Counter()
        # Of finished jobs, as long as somebody uses them.
        self._logs: WeakValueDictionary[str, OutputLog] = WeakValueDictionary()
        self._leaving: deque[threading.Thread] = deque()  # threads of jobs that have ended
        self._ager: threading.Thread | None = None
        self._watches: tuple[Watch, ...] = ()  # replaced as a whole
        self._closed = False

    def add(self, job: RunningJob) -> None:
        """Add a job that the table has. Its thread must not run it yet."""
        with self._lock:
            self._running[job.job_id] = job
            watches = self._watches  # a later one finds the job in the registry
        # Outside the lock, because a job's lock is never taken while the registry's is held.
        _tell_started(watches, job)

    def budget_for(self, owner: str) -> Budget:
        """Return a budget without limit, for a job that is started without one."""
        with self._lock:
            return self._finished.budget_for(owner)

    def charge(self, budget_for: Callable[[str], Budget]) -> None:
        """Have the budgets of the owners count the output that former processes have kept."""
        with self._lock:
            self._finished.charge(budget_for)

    def tell_started(self, job: RunningJob) -> None:
        """Tell the watches that a job which was queued is running now."""
        _tell_started(self._watches, job)

    def watch(self, matching: JobFilter) -> Watch:
        """Return a watch of the jobs that are there and will be. Raises `WorkerClosedError`."""
        with self._lock:
            if self._closed:
                raise WorkerClosedError
            there = self._there(matching, dict(self._running), self._table.last_position)
            watch = Watch(matching, there)
            self._watches = (*(each for each in self._watches if not each.is_closed), watch)
            return watch

    def _there(
        self, matching: JobFilter, running: dict[str, RunningJob], last: int
    ) -> Iterator[RunningJob | FinishedJob]:
        """Yield what is there now: the jobs `running`, and those that had ended by then."""
        matching = replace(matching, statuses=())  # a job that runs now may end meanwhile
        for row in self._rows(matching, up_to=last):
            if row.job.job_id in running:
                yield running[row.job.job_id]
            elif row.number is not None:
                yield FinishedJob(row, self)

    def _tell_locked(self, kind: JobEventKind, job: Job) -> None:
        """Tell the watches, and forget those that are closed."""
        for watch in self._watches:
            watch.tell(kind, job)
        if any(watch.is_closed for watch in self._watches):
            self._watches = tuple(each for each in self._watches if not each.is_closed)

    def get(self, job_id: str, owner: str | None = None) -> RunningJob | FinishedJob:
        """Return a job. Raises `UnknownJobError`; with `owner` also for a job of somebody else.

        A job of somebody else takes as long as a job that does not exist.
        """
        with self._lock:
            job = self._running.get(job_id)
        if job is not None and owner in (None, job.owner):
            return job
        # A job that has ended is in the table before it is no longer running.
        row = self._table.get(job_id, owner)
        if row is None or row.number is None:  # it is about to start, or could not
            raise UnknownJobError(job_id)
        return FinishedJob(row, self)

    def owner(self, job_id: str) -> str | None:
        """Return whose job it is; None if there is no such job.

        Takes the same time for a job that runs, one that has ended and one that never was.
        """
        return self._table.owner(job_id)

    def counts(self) -> Counts:
        """Return how many jobs there are and were."""
        with self._lock:
            return Counts(len(self._running), self._finished.count, dict(self._ended))

    def running(self) -> tuple[RunningJob, ...]:
        """Return the jobs that run, in the order of their starts."""
        with self._lock:
            return tuple(self._running.values())

    def all(
        self, matching: JobFilter = EVERY_JOB, after: int = 0, *, newest_first: bool = False
    ) -> Iterator[RunningJob | FinishedJob]:
        """Yield the jobs that a filter picks with a higher position than `after`, in that order.

        With `newest_first`: in the opposite order, those with a lower position; 0 means all. The
        status of a job may have changed since it was picked.
        """
        for row in self._rows(matching, after, newest_first=newest_first):
            with self._lock:
                job = self._running.get(row.job.job_id)
            if job is not None:
                yield job
            elif row.number is not None:
                yield FinishedJob(row, self)
            elif (ended := self._table.get(row.job.job_id)) and ended.number is not None:
                yield FinishedJob(ended, self)  # it has ended since its row was read

    def _rows(
        self,
        matching: JobFilter,
        after: int = 0,
        *,
        up_to: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[Row]:
        while True:
            rows = self._table.page(
                matching, after=after, up_to=up_to, newest_first=newest_first, most=_PAGE_JOBS
            )
            yield from rows
            if len(rows) < _PAGE_JOBS:
                return
            after = rows[-1].position

    def log_of(self, row: Row) -> OutputLog:
        """Return the output log of a finished job.

        Raises `WorkerClosedError`; `OutputRemovedError` if the job was removed meanwhile.
        """
        with self._lock:
            if self._closed:
                raise WorkerClosedError
            log = self._logs.get(row.job.job_id)
            if log is None:
                times = self._table.times(row.job.job_id)
                if times is None:
                    raise OutputRemovedError
                state = row.output._replace(times=times)
                log = self._open_log(row.job.job_id, state, self._finished.budget_of(row))
                self._logs[row.job.job_id] = log
            return log

    def subscribers(self, job_id: str) -> tuple[str, ...]:
        """Return who reads the output of a finished job now."""
        with self._lock:
            log = self._logs.get(job_id)
        return log.subscribers if log is not None else ()

    def record(self, job: RunningJob, final: Job) -> Row | None:
        """Write the end of a job to the store; return its row, or None if that cannot be read.

        The job's thread calls this, before `finish`.
        """
        self._table.end(final, job.output.state())
        try:
            return self._table.get(job.job_id)
        except StoreError as error:
            logger.error("job %s is not counted: %s", job.job_id, error)
            return None

    def is_recorded(self, job: RunningJob) -> bool:
        """Whether what `record` was given is in the store by now."""
        return self._table.is_written(job.job_id)

    def finish(self, job: RunningJob, final: Job, row: Row | None) -> None:
        """Keep the row of the store instead of the job, whose thread calls this."""
        budget = job.output.budget
        with self._lock:
            if final.end_reason is not None:
                self._ended[final.end_reason] += 1
            del self._running[job.job_id]
            self._logs[job.job_id] = job.output
            if row is not None:
                self._finished.add(row, budget.heir if budget else self.budget_for(job.owner))
            if self._finished.count == 1:
                self._changed.notify_all()
            self._tell_locked(JobEventKind.ENDED, final)
            while self._leaving and not self._leaving[0].is_alive():
                self._leaving.popleft()
            self._leaving.append(job.thread)

    def discard(self, job: RunningJob) -> None:
        """Forget a job whose command never began. Its thread calls this in place of `finish`."""
        with self._lock:
            del self._running[job.job_id]
            self._table.delete(job.job_id)
            self._leaving.append(job.thread)

    def remove(self, job_id: str) -> None:
        """Forget a finished job and delete its output.

        Raises `UnknownJobError`, `JobRunningError`; OSError when the output stays.
        """
        job = self.get(job_id)
        if not isinstance(job, FinishedJob):
            raise JobRunningError(job_id)
        with self._lock:
            try:
                log = self.log_of(job.row)
            except OutputRemovedError:
                raise UnknownJobError(job_id) from None
            self._forget_locked(job.row)
        self._discard_tmp(job.row)
        log.remove()
        self._table.catch_up()  # the disk may have been full

    def take(self, owner: str, budget: Budget, size: int) -> tuple[int, Budget | None]:
        """Take up to `size` bytes from a budget of the owner, while finished jobs give way.

        Returns as `Budget.take`: how many, and the budget that has no more. `FinishedJobs.giver`
        has the order in which jobs are removed. None is removed once the registry is closed.
        """
        taken, refuser = budget.take(size)
        while refuser is not None and self.give_way(owner, budget, refuser):
            more, refuser = budget.take(size - taken)
            taken += more
        return taken, refuser

    def give_way(self, owner: str, budget: Budget, refuser: Budget | None = None) -> bool:
        """Remove the job that `FinishedJobs.giver` chooses. Returns False if there is none."""
        with self._lock:
            read = [job_id for job_id, log in self._logs.items() if log.subscriptions]
            row = None if self._closed else self._finished.giver(owner, budget, refuser, read)
            if row is None or row.job.job_id in self._running:
                return False
            log = self.log_of(row)
            self._forget_locked(row)
        self._discard_tmp(row)
        _delete(row, log)
        self._table.catch_up()  # the disk may have been full
        return True

    def trim(self) -> None:
        """Remove what is too old or too much, and wait in a thread for what gets too old."""
        excess = []
        with self._lock:
            if self._closed:
                return
            for row in self._finished.excess():
                if row.job.job_id in self._running:
                    break  # its end is in the table, and counted in a moment
                excess.append((row, self.log_of(row)))
                self._forget_locked(row)
            if self._ager is None and self._finished.seconds_left() is not None:
                self._start_ager_locked()
        for row, log in excess:
            self._discard_tmp(row)
            _delete(row, log)

    def terminate(self, reason: EndReason, grace: float) -> None:
        """SIGTERM every process of every job; block for up to `grace` seconds until all ended.

        If there are too many jobs to tell all of them in this time, some are not told. The caller
        must kill the jobs afterwards.
        """
        deadline, told = time.monotonic() + grace, []
        for job in self.running():
            if (left := deadline - time.monotonic()) <= 0:
                break
            if job.terminate(reason, "", left):
                told.append(job)
        for job in told:
            job.wait(max(0.0, deadline - time.monotonic()))

    def _discard_tmp(self, row: Row) -> None:
        """Remove the TMPDIR that was kept with a job that has been forgotten."""
        if row.job.tmp_directory:
            self._remove_tmp(row.job.job_id)

    def close(self, deadline: float) -> None:
        """Forget nothing, but wait for all threads, and let nobody begin to read an output.

        The jobs must have been killed. Those that have not ended by `deadline` (monotonic) are
        left behind.
        """
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            threads = [*self._leaving, *([self._ager] if self._ager else [])]
            running = tuple(self._running.values())
        for each in running:
            each.thread.join(max(0.0, deadline - time.monotonic()))
        for thread in threads:
            thread.join()
        for job in self.running():
            if job.thread.is_alive():  # otherwise it was left to another process
                logger.error("job %s: its processes cannot be killed; left behind", job.job_id)
        self._table.catch_up()
        for watch in self._watches:
            watch.end()

    def _forget_locked(self, row: Row) -> None:
        self._table.delete(row.job.job_id)
        self._finished.discard(row)
        self._logs.pop(row.job.job_id, None)
        self._tell_locked(JobEventKind.REMOVED, row.job)

    def _start_ager_locked(self) -> None:
        self._ager = threading.Thread(target=self._remove_aged, name="retention", daemon=True)
        try:
            self._ager.start()
        except RuntimeError as error:
            self._ager = None  # the next job that ends tries again
            logger.warning("no thread can be started to remove old jobs: %s", error)

    def _remove_aged(self) -> None:
        while True:
            with self._lock:
                while not self._closed and (left := self._finished.seconds_left()) != 0:
                    self._changed.wait(left and min(left, threading.TIMEOUT_MAX))
                if self._closed:
                    return
            self.trim()


def _tell_started(watches: tuple[Watch, ...], job: RunningJob) -> None:
    if watches:
        state = job.snapshot(live_usage=False)
        for watch in watches:
            watch.tell(JobEventKind.STARTED, state)


def _delete(row: Row, log: OutputLog) -> None:
    try:
        log.remove()
    except OSError as error:
        logger.error(
            "job %s: its output stays until the worker is closed: %s",
            *(row.job.job_id, in_words(error)),
        )
