"""All jobs by their IDs (`Registry`), and how long finished ones are kept (`Retention`).

Thread safety: every method of `Registry` may be called from any thread. Its lock may be taken
while a job's is held, never the other way round.
"""

from __future__ import annotations

import heapq
import logging
import sys
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from errors import JobRunningError, UnknownJobError
from job import RunningJob

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from broadcaster import OutputLog
    from job import EndReason, Job

__all__ = ["FinishedJob", "FinishedJobs", "Registry", "Retention"]

logger = logging.getLogger(__name__)


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


class FinishedJob:
    """What is kept of a job that has ended; it answers as a `RunningJob` does."""

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

    def wait(self, timeout: float | None) -> bool:  # noqa: ARG002 -- as of a RunningJob
        return True

    def kill(self, reason: EndReason, stop_reason: str = "") -> None:
        """Do nothing: it has ended."""


class _Holding:
    """What one owner has of finished jobs. Attributes: `jobs`, in the order of their ends."""

    __slots__ = ("amounts", "jobs")

    def __init__(self) -> None:
        self.jobs: OrderedDict[str, FinishedJob] = OrderedDict()
        self.amounts = [0, 0, 0]  # as `_amounts` has them

    @property
    def oldest(self) -> FinishedJob:
        return next(iter(self.jobs.values()))


def _amounts(job: FinishedJob) -> tuple[int, int, int]:
    """What a job counts for: the bounds of `Retention`, but for the age, in their order."""
    return 1, job.output_bytes, job.argv_bytes


class FinishedJobs:
    """The finished jobs and what the rule says of them. The registry's lock guards it.

    No operation takes longer the more jobs there are or were, but for the logarithm of
    the number of owners.
    """

    def __init__(self, rule: Retention) -> None:
        self._age_s = rule.age_s
        self._bounds = (rule.jobs, rule.output_bytes, rule.argv_bytes)
        # In the order of their ends. Not plain dicts, whose first item is found by
        # going past all that were deleted before it.
        self._jobs: OrderedDict[str, FinishedJob] = OrderedDict()
        self._holdings: dict[str, _Holding] = {}
        self._totals = [0, 0, 0]
        # For each bound the owners, those with the most first and, of as much, those
        # whose oldest job is older. An entry that is no longer true is passed over.
        self._ranks: tuple[list[tuple[int, int, str]], ...] = ([], [], [])

    def add(self, job: FinishedJob) -> None:
        """Add one that ended after all others."""
        self._jobs[job.job_id] = job
        holding = self._holdings.setdefault(job.owner, _Holding())
        holding.jobs[job.job_id] = job
        self._count(job, holding, 1)

    def discard(self, job: FinishedJob) -> None:
        del self._jobs[job.job_id]
        holding = self._holdings[job.owner]
        del holding.jobs[job.job_id]
        if not holding.jobs:
            del self._holdings[job.owner]
        self._count(job, holding, -1)

    def of(self, owner: str) -> Iterable[FinishedJob]:
        """Return the jobs of the owner, oldest first."""
        holding = self._holdings.get(owner)
        return holding.jobs.values() if holding else ()

    def seconds_left(self) -> float | None:
        """How long it is until the oldest job is too old; None for ever."""
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

    def _count(self, job: FinishedJob, holding: _Holding, sign: int) -> None:
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


class Registry:
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
        self._jobs: dict[str, RunningJob | FinishedJob] = {}  # as they were started
        self._finished = FinishedJobs(rule)
        self._ends = 0
        self._leaving: deque[threading.Thread] = deque()  # of jobs that have ended
        self._ager: threading.Thread | None = None
        self._closed = False

    def add(self, job: RunningJob) -> None:
        """Add a job whose thread does not know it yet."""
        with self._lock:
            self._jobs[job.job_id] = job

    def get(self, job_id: str) -> RunningJob | FinishedJob:
        with self._lock:
            try:
                return self._jobs[job_id]
            except KeyError:
                raise UnknownJobError(job_id) from None

    def all(self) -> tuple[RunningJob | FinishedJob, ...]:
        with self._lock:
            return tuple(self._jobs.values())

    def finish(self, job: RunningJob, final: Job) -> None:
        """Keep of the job, whose thread calls this, what is of use after its end."""
        with self._lock:
            self._ends += 1
            finished = FinishedJob(final, job.output, self._ends)
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
            if isinstance(job, RunningJob):
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

    def _forget_locked(self, job: FinishedJob) -> None:
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


def _delete(job: FinishedJob) -> None:
    try:
        job.output.remove()
    except OSError as error:
        logger.error("job %s: its output stays until the worker is closed: %s", job.job_id, error)
