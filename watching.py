"""What happens to jobs, as it happens: `Watch`, an iterator of `JobEvent`.

    with worker.watch(JobFilter(owner="alice")) as watch:
        for event in watch:
            print(event.kind, event.job.job_id, event.job.status)

The thread that starts, ends or removes a job puts an event into each watch that the job concerns,
and goes on: it never waits for the reader of a watch. A start, an end and a removal cost nothing
while there is no watch.

A watch has room for the events of a number of jobs, so that its memory is bounded however slow its
reader is. If changes of more jobs wait for the reader, the watch ends with `WatchBehindError`. The
reader then begins a new watch, which tells first how all jobs are.

Thread safety: one thread iterates over a watch; any thread may call the rest. The lock of a watch
may be taken while a job's and the registry's are held; no lock is taken while that of a watch is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from errors import WatchBehindError, WorkerClosedError
from finding import Findable
from jobstate import Job, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from finding import JobFilter

__all__ = ["JobEvent", "JobEventKind", "Watch"]

_MOST_JOBS = 1000  # whose changes wait for the reader


class JobEventKind(Enum):
    """What happened to a job."""

    EXISTS = "exists"  # it was there when the watch began; its status may be any
    STARTED = "started"
    ENDED = "ended"
    REMOVED = "removed"  # `JobEvent.job` is what was known of it last


class JobEvent(NamedTuple):
    """One change of one job."""

    kind: JobEventKind
    job: Job
    """The job at that moment, without usage as long as it runs."""


class _Kept(Findable, Protocol):
    """A job that is kept, running or finished."""

    def snapshot(self, *, live_usage: bool = True) -> Job: ...


class Watch:
    """The events of the jobs that a filter picks: an iterator, and a context manager.

    First come the jobs that are there (EXISTS), in the order of their starts, then the changes,
    those of one job in their order. A change is left out if the filter accepts neither the status
    before nor the one after it. The iterator blocks while nothing happens, and never ends by
    itself. After `close` it ends; after the worker was closed it raises `WorkerClosedError`,
    and `WatchBehindError` if its reader is too slow.
    """

    def __init__(self, matching: JobFilter, jobs: Iterable[_Kept]) -> None:
        self._matching = matching
        self._events = self._all_events(jobs)
        # Guards all below. Notified when an event is noted, by `close` and `end`. Reentrant:
        # while a thread holds it, the garbage collector may close another watch in that thread.
        self._changed = threading.Condition(threading.RLock())
        self._pending: OrderedDict[str, list[JobEvent]] = OrderedDict()  # by job, never empty
        self._closed = False
        self._is_over = False  # the worker was closed
        self._is_behind = False  # events were dropped

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> JobEvent:
        """Return the next event, as soon as there is one."""
        return next(self._events)

    def tell(self, kind: JobEventKind, job: Job) -> None:
        """Note a change of a job, if the filter picks it. Does not block."""
        before = (Status.QUEUED, Status.RUNNING) if kind is JobEventKind.ENDED else ()
        if not (self._matching.concerns(job) and self._matching.accepts(job.status, *before)):
            return
        with self._changed:
            if self._closed:
                return
            if len(self._pending) >= _MOST_JOBS and job.job_id not in self._pending:
                self._is_behind = True
                self._pending.clear()
            if not self._is_behind:
                self._pending.setdefault(job.job_id, []).append(JobEvent(kind, job))
            self._changed.notify()

    def end(self) -> None:
        """End the watch after the events that are there, because the worker is closed."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    @property
    def is_closed(self) -> bool:
        """Whether the registry can forget it."""
        return self._closed

    def close(self) -> None:
        """End the watch; idempotent. Wakes a thread that waits in `next`.

        Takes no other lock: the garbage collector may call it in a thread that holds one, even that
        of another watch.
        """
        with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _all_events(self, jobs: Iterable[_Kept]) -> Iterator[JobEvent]:
        for job in jobs:
            if self._closed:
                return
            if self._matching.concerns(job):
                event = self._first_event(job)
                if self._matching.accepts(event.job.status):
                    yield event
        del jobs
        while (events := self._next_events()) is not None:
            yield from events

    def _first_event(self, job: _Kept) -> JobEvent:
        """Return an event that says how the job is, with the changes that are pending."""
        state = job.snapshot(live_usage=False)
        with self._changed:
            events = self._pending.pop(job.job_id, None)
        if events is None:
            return JobEvent(JobEventKind.EXISTS, state)
        last = events[-1]
        return (
            last if last.kind is JobEventKind.REMOVED else JobEvent(JobEventKind.EXISTS, last.job)
        )

    def _next_events(self) -> list[JobEvent] | None:
        """Block until a job has changed; return its events, or None if this is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._pending or self._closed or self._is_over or self._is_behind
            )
            if self._closed:
                return None
            if self._is_behind:
                raise WatchBehindError
            if not self._pending:
                raise WorkerClosedError
            return self._pending.popitem(last=False)[1]
