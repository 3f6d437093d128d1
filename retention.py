"""The jobs by their IDs (`Registry`), and how long finished ones are kept (`Retention`).

Retention: what is too old is removed, and what is too much for the rule. Besides, finished jobs
give way when a budget of output (`budget.Budget`) or the disk has no byte left for a running
job.

    registry = Registry(Retention(jobs=100))
    registry.add(job)
    registry.finish(job, final_state)     # by the job's thread, in the moment of its end
    registry.trim()

Files are deleted by the thread that finds that a job is to go: that of its remover, that of the
job whose end made it too much or whose output needs the room, or the one that waits until jobs
are too old.

Thread safety: every method of `Registry` may be called from any thread. Its lock may be taken
while a job's is held, and an output log's, a budget's or a watch's while the registry's is held;
never the other way round.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from bisect import bisect_right
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from errors import (
    InputError,
    JobRunningError,
    SignalError,
    UnknownJobError,
    WorkerClosedError,
    in_words,
)
from job import RunningJob
from watching import JobEventKind, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from broadcaster import OutputLog
    from budget import Budget
    from finding import JobFilter
    from jobstate import EndReason, Job

__all__ = ["Counts", "FinishedJob", "FinishedJobs", "Registry", "Retention"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retention:
    """How long finished jobs and their output are kept. None means no bound.

    Jobs that are too old are removed. If there is too much of all jobs together, the owner who
    has the most of it loses jobs, oldest first. So nobody's jobs push out those of an owner who
    has fewer. The job that ended last is never removed for being too much. Running jobs do not
    count. Raises ValueError for numbers that make no sense.
    """

    age_s: float | None = None
    """Seconds since the job's end."""
    jobs: int | None = None
    output_bytes: int | None = None
    """Their stored output."""
    argv_bytes: int | None = None
    """The memory that their commands, arguments, names and labels take, as Python stores them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            minimum = 1 if field.name == "jobs" else 0
            if value is not None and not value >= minimum:  # refuses not-a-number, too
                raise ValueError(f"{field.name} must be at least {minimum}, not {value!r}")


class Counts(NamedTuple):
    """How many jobs there are."""

    running: int
    finished: int
    """Those that are kept."""
    ended: Mapping[EndReason, int]
    """How many have ended since the worker was made, also those that are no longer kept."""


class FinishedJob:
    """What is kept of a job that has ended. It has the methods of a `RunningJob`."""

    __slots__ = ("_job", "argv_bytes", "ended_s", "number", "output", "position")

    def __init__(self, job: Job, output: OutputLog, position: int, number: int) -> None:
        self._job = replace(job, subscribers=()) if job.subscribers else job
        self.output = output
        self.position = position  # in the order of all starts
        self.number = number  # of its end: 1 is the first
        self.ended_s = time.monotonic()
        names = (job.name, *job.labels, *job.labels.values()) if job.name or job.labels else ()
        self.argv_bytes = sum(map(sys.getsizeof, (job.command, job.args, *job.args, *names)))

    @property
    def job_id(self) -> str:
        return self._job.job_id

    @property
    def owner(self) -> str:
        return self._job.owner

    @property
    def name(self) -> str:
        return self._job.name

    @property
    def labels(self) -> Mapping[str, str]:
        return self._job.labels

    @property
    def started_at(self) -> datetime:
        return self._job.started_at

    @property
    def has_tmp(self) -> bool:
        """Whether its TMPDIR is kept."""
        return bool(self._job.tmp_directory)

    @property
    def output_bytes(self) -> int:
        return self._job.output_bytes

    @property
    def final(self) -> Job:
        """The job when it had ended, without subscribers."""
        return self._job

    def snapshot(self, *, live_usage: bool = True) -> Job:  # noqa: ARG002 -- it is final
        subscribers = self.output.subscribers
        return replace(self._job, subscribers=subscribers) if subscribers else self._job

    def wait(self, timeout: float | None) -> bool:  # noqa: ARG002 -- as of a RunningJob
        return True

    def kill(self, reason: EndReason, stop_reason: str = "") -> None:
        """Do nothing: it has ended."""

    def terminate(self, reason: EndReason, stop_reason: str, grace_s: float) -> bool:  # noqa: ARG002
        return False  # it has ended

    def signal(self, number: int, *, everything: bool) -> NoReturn:  # noqa: ARG002
        raise SignalError(self.job_id, "it has ended")

    def open_input(self, offset: int | None) -> NoReturn:  # noqa: ARG002
        raise InputError(self.job_id, "it has ended")


class _Holding:
    """The finished jobs of one owner. Attributes: `jobs`, in the order of their ends."""

    __slots__ = ("amounts", "jobs")

    def __init__(self) -> None:
        self.jobs: OrderedDict[str, FinishedJob] = OrderedDict()
        self.amounts = [0, 0, 0]  # see `_amounts`

    @property
    def oldest(self) -> FinishedJob:
        return next(iter(self.jobs.values()))


def _amounts(job: FinishedJob) -> tuple[int, int, int]:
    """Return what the job counts for each bound of `Retention` but the age."""
    return 1, job.output_bytes, job.argv_bytes


class FinishedJobs:
    """The finished jobs, and which of them the rule or a budget wants removed.

    The registry's lock guards it. No operation takes longer the more jobs there are or were;
    those that choose an owner look at every owner.
    """

    def __init__(self, rule: Retention) -> None:
        self._age_s = rule.age_s
        self._bounds = (rule.jobs, rule.output_bytes, rule.argv_bytes)
        # In the order of their ends. Not plain dicts: those find their first item by walking
        # over all that were deleted before it.
        self._jobs: OrderedDict[str, FinishedJob] = OrderedDict()
        self._holdings: dict[str, _Holding] = {}
        self._totals = [0, 0, 0]

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: FinishedJob) -> None:
        """Add a job that ended after all others."""
        self._jobs[job.job_id] = job
        holding = self._holdings.setdefault(job.owner, _Holding())
        holding.jobs[job.job_id] = job
        self._count(job, holding, 1)

    def discard(self, job: FinishedJob) -> None:
        """Take out a job that was added."""
        del self._jobs[job.job_id]
        holding = self._holdings[job.owner]
        del holding.jobs[job.job_id]
        self._count(job, holding, -1)
        if not holding.jobs:
            del self._holdings[job.owner]

    def seconds_left(self) -> float | None:
        """Return in how many seconds the oldest job is too old; None for never."""
        if self._age_s is None or not self._jobs:
            return None
        oldest = next(iter(self._jobs.values()))
        return max(0.0, oldest.ended_s + self._age_s - time.monotonic())

    def excess(self) -> Iterator[FinishedJob]:
        """Yield what is too old or too much; the caller discards each before the next."""
        while self.seconds_left() == 0:
            yield next(iter(self._jobs.values()))
        for i, bound in enumerate(self._bounds):
            while bound is not None and self._totals[i] > bound:
                job = self._who_has_most(i).oldest
                if job is next(reversed(self._jobs.values())):
                    break  # it has just ended, and somebody may be about to look at it
                yield job

    def giver(self, owner: str, budget: Budget, refuser: Budget | None) -> FinishedJob | None:
        """Return the job whose removal gives `budget` bytes that `refuser` refused; None if none.

        `refuser` is `budget` or a parent of it, and has no bytes left; None means the disk. If
        several owners draw on `refuser`, the one who uses most gives first, and nobody gives to an
        owner who uses more. Each owner gives the oldest job first. Output that somebody reads
        gives nothing back now, so it stays. The budgets of one owner's jobs are expected to have
        the same parents.
        """
        mine = _branch(budget, refuser)
        givers: list[tuple[int, _Holding]] = []
        for other, holding in self._holdings.items():
            its = holding.oldest.output.budget
            branch = _branch(its, refuser) if its else None
            if branch is None:
                continue
            used = branch.used
            if other == owner or (mine is not None and used >= mine.used):
                givers.append((used, holding))
        givers.sort(key=lambda giver: giver[0], reverse=True)
        jobs = (job for _, holding in givers for job in holding.jobs.values())
        unread = (job for job in jobs if job.output_bytes and not job.output.subscriptions)
        return next(unread, None)

    def _count(self, job: FinishedJob, holding: _Holding, sign: int) -> None:
        for i, amount in enumerate(_amounts(job)):
            holding.amounts[i] += sign * amount
            self._totals[i] += sign * amount

    def _who_has_most(self, i: int) -> _Holding:
        """Return whose amounts are largest; of several the one whose oldest job is older."""
        holdings = self._holdings.values()
        return max(holdings, key=lambda each: (each.amounts[i], -each.oldest.number))


def _branch(budget: Budget, refuser: Budget | None) -> Budget | None:
    """Return the budget that counts what the owner of `budget` takes from `refuser`."""
    return budget.branch_of(refuser) if refuser is not None else budget.below_root


class Registry:
    """The running and the finished jobs by their IDs.

    `remove_tmp`: removes the TMPDIR of a job that has kept it; called when the job is removed.
    """

    def __init__(self, rule: Retention, remove_tmp: Callable[[str], object]) -> None:
        self._remove_tmp = remove_tmp
        self._has_age = rule.age_s is not None
        # Guards all below. Never held during I/O.
        self._lock = threading.RLock()
        # Notified when the first finished job is there, and by `close`.
        self._changed = threading.Condition(self._lock)
        self._jobs: dict[str, RunningJob | FinishedJob] = {}  # in the order of their starts
        self._finished = FinishedJobs(rule)
        self._last_position = 0
        self._ends = 0
        self._ended: Counter[EndReason] = Counter()
        self._leaving: deque[threading.Thread] = deque()  # threads of jobs that have ended
        self._ager: threading.Thread | None = None
        self._watches: tuple[Watch, ...] = ()  # replaced as a whole
        self._closed = False

    def add(self, job: RunningJob) -> None:
        """Add a job. Its thread must not run it yet."""
        with self._lock:
            # The time and not a number, so that a user to whom it is shown does not learn how many
            # jobs the others have started.
            job.position = max(self._last_position + 1, time.monotonic_ns())
            self._last_position = job.position
            self._jobs[job.job_id] = job
            watches = self._watches  # a later one finds the job in the registry
        if watches:
            # Outside the lock, because a job's lock is never taken while the registry's is held.
            state = job.snapshot(live_usage=False)
            for watch in watches:
                watch.tell(JobEventKind.STARTED, state)

    def watch(self, matching: JobFilter) -> Watch:
        """Return a watch of the jobs that are there and will be. Raises `WorkerClosedError`."""
        with self._lock:
            if self._closed:
                raise WorkerClosedError
            watch = Watch(matching, tuple(self._jobs.values()))
            self._watches = (*(each for each in self._watches if not each.is_closed), watch)
            return watch

    def _tell_locked(self, kind: JobEventKind, job: Job) -> None:
        """Tell the watches, and forget those that are closed."""
        for watch in self._watches:
            watch.tell(kind, job)
        if any(watch.is_closed for watch in self._watches):
            self._watches = tuple(each for each in self._watches if not each.is_closed)

    def get(self, job_id: str) -> RunningJob | FinishedJob:
        """Raises `UnknownJobError`."""
        with self._lock:
            try:
                return self._jobs[job_id]
            except KeyError:
                raise UnknownJobError(job_id) from None

    def counts(self) -> Counts:
        """Return how many jobs there are and were."""
        with self._lock:
            finished = len(self._finished)
            return Counts(len(self._jobs) - finished, finished, dict(self._ended))

    def all(
        self, after: int = 0, *, newest_first: bool = False
    ) -> Sequence[RunningJob | FinishedJob]:
        """Return the jobs with a higher position than `after`, in the order of their starts.

        With `newest_first`: in the opposite order, those with a lower position; 0 means all.
        """
        with self._lock:
            jobs = tuple(self._jobs.values())
        begin = bisect_right(jobs, after, key=lambda job: job.position)
        if not newest_first:
            return jobs[begin:]
        return jobs[: begin - 1 if after else None][::-1]

    def finish(self, job: RunningJob, final: Job) -> None:
        """Keep `final` instead of the job, whose thread calls this."""
        with self._lock:
            self._ends += 1
            if final.end_reason is not None:
                self._ended[final.end_reason] += 1
            finished = FinishedJob(final, job.output, job.position, self._ends)
            self._jobs[job.job_id] = finished
            if self._finished.seconds_left() is None:
                self._changed.notify_all()
            self._finished.add(finished)
            self._tell_locked(JobEventKind.ENDED, finished.final)
            while self._leaving and not self._leaving[0].is_alive():
                self._leaving.popleft()
            self._leaving.append(job.thread)

    def discard(self, job: RunningJob) -> None:
        """Forget a job whose command never began. Its thread calls this in place of `finish`."""
        with self._lock:
            del self._jobs[job.job_id]
            self._leaving.append(job.thread)

    def remove(self, job_id: str) -> None:
        """Forget a finished job and delete its output.

        Raises `UnknownJobError`, `JobRunningError`; OSError when the output stays.
        """
        with self._lock:
            job = self.get(job_id)
            if isinstance(job, RunningJob):
                raise JobRunningError(job_id)
            self._forget_locked(job)
        self._discard_tmp(job)
        job.output.remove()

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
            job = None if self._closed else self._finished.giver(owner, budget, refuser)
            if job is None:
                return False
            self._forget_locked(job)
        self._discard_tmp(job)
        _delete(job)
        return True

    def trim(self) -> None:
        """Remove what is too old or too much, and wait in a thread for what gets too old."""
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
            self._discard_tmp(job)
            _delete(job)

    def terminate(self, reason: EndReason, grace: float) -> None:
        """SIGTERM every process of every job; block for up to `grace` seconds until all ended.

        If there are too many jobs to tell all of them in this time, some are not told. The caller
        must kill the jobs afterwards.
        """
        deadline, told = time.monotonic() + grace, []
        for job in self.all():
            if (left := deadline - time.monotonic()) <= 0:
                break
            if job.terminate(reason, "", left):
                told.append(job)
        for job in told:
            job.wait(max(0.0, deadline - time.monotonic()))

    def _discard_tmp(self, job: FinishedJob) -> None:
        """Remove the TMPDIR that was kept with a job that has been forgotten."""
        if job.has_tmp:
            self._remove_tmp(job.job_id)

    def close(self, deadline: float) -> None:
        """Forget nothing, but wait for all threads and delete all output.

        The jobs must have been killed. Those that have not ended by `deadline` (monotonic) are
        left behind.
        """
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            threads = [*self._leaving, *([self._ager] if self._ager else [])]
            running = [job for job in self._jobs.values() if isinstance(job, RunningJob)]
        for each in running:
            each.thread.join(max(0.0, deadline - time.monotonic()))
        for thread in threads:
            thread.join()
        for job in self.all():
            if isinstance(job, RunningJob):
                logger.error("job %s: its processes cannot be killed; left behind", job.job_id)
            else:
                _delete(job)
        for watch in self._watches:
            watch.end()

    def _forget_locked(self, job: FinishedJob) -> None:
        del self._jobs[job.job_id]
        self._finished.discard(job)
        self._tell_locked(JobEventKind.REMOVED, job.final)

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


def _delete(job: FinishedJob) -> None:
    try:
        job.output.remove()
    except OSError as error:
        logger.error(
            "job %s: its output stays until the worker is closed: %s", job.job_id, in_words(error)
        )
