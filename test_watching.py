"""Tests of watches: what they tell of jobs, when they end, and what they cost."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest

import watching
from testkit import GUARD_S
from worker import (
    JobEventKind,
    JobFilter,
    Retention,
    Status,
    Watch,
    WatchBehindError,
    Worker,
    WorkerClosedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_EXISTS, _STARTED, _ENDED, _REMOVED = JobEventKind


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(enforcement="off") as worker:
        yield worker


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def _finish(worker: Worker, **options: Any) -> str:
    job_id = worker.start("true", **options)
    worker.wait(job_id, GUARD_S)
    return job_id


def _sleeper(worker: Worker, **options: Any) -> str:
    return worker.start("sleep", ["1000000"], **options)


def _read(watch: Watch, count: int) -> list[tuple[JobEventKind, str]]:
    return [(event.kind, event.job.job_id) for event in islice(watch, count)]


def test_watch_tells_what_exists_and_then_every_change(worker: Worker) -> None:
    """Each job as it was at that moment."""
    finished, running = _finish(worker), _sleeper(worker)
    with worker.watch() as watch:
        events = [next(watch), next(watch)]
        new = worker.start("sh", ["-c", "exit 3"])
        events += [next(watch), next(watch)]
        worker.stop(running, reason="enough")
        events += [next(watch)]
        worker.remove(new)
        events += [next(watch)]
    assert [(event.kind, event.job.job_id, event.job.status) for event in events] == [
        (_EXISTS, finished, Status.FINISHED),
        (_EXISTS, running, Status.RUNNING),
        (_STARTED, new, Status.RUNNING),
        (_ENDED, new, Status.FINISHED),
        (_ENDED, running, Status.STOPPED),
        (_REMOVED, new, Status.FINISHED),
    ]
    assert events[3].job.exit_code == events[5].job.exit_code == 3
    assert events[4].job.stop_reason == "enough"


def test_watch_tells_of_jobs_that_the_rule_removes() -> None:
    """Not only of those that somebody removes."""
    with Worker(enforcement="off", retention=Retention(jobs=1)) as worker, worker.watch() as watch:
        first, second = _finish(worker), _finish(worker)
        events = _read(watch, 5)
    assert (_REMOVED, first) in events
    assert {(_ENDED, first), (_ENDED, second)} < set(events)


def test_watch_tells_only_of_jobs_that_its_filter_picks(worker: Worker) -> None:
    """By owner, name and labels."""
    _finish(worker, owner="bob", name="web")
    matching = JobFilter(owner="alice", name="web", labels={"team": "data"})
    with worker.watch(matching) as watch:
        _finish(worker, owner="alice", name="web")
        picked = _finish(worker, owner="alice", name="web", labels={"team": "data", "a": "b"})
        assert _read(watch, 2) == [(_STARTED, picked), (_ENDED, picked)]


def test_watch_of_a_status_tells_when_a_job_gets_it_and_when_it_loses_it(worker: Worker) -> None:
    """A watch of running jobs tells their ends, one of finished jobs no starts."""
    old = _finish(worker)
    with (
        worker.watch(JobFilter(statuses=[Status.RUNNING])) as running,
        worker.watch(JobFilter(statuses=[Status.FINISHED])) as finished,
        worker.watch(JobFilter(statuses=[Status.STOPPED])) as stopped,
    ):
        job_id = _finish(worker)
        worker.remove(job_id)
        last = _sleeper(worker)
        worker.stop(last)
        assert _read(running, 4) == [
            (_STARTED, job_id),
            (_ENDED, job_id),
            (_STARTED, last),
            (_ENDED, last),
        ]
        assert _read(finished, 3) == [(_EXISTS, old), (_ENDED, job_id), (_REMOVED, job_id)]
        assert _read(stopped, 1) == [(_ENDED, last)]


def test_watch_of_an_id_picks_that_job(worker: Worker) -> None:
    """Whatever else happens."""
    job_id = _sleeper(worker)
    _finish(worker)
    with worker.watch(JobFilter(job_ids=[job_id])) as watch:
        assert _read(watch, 1) == [(_EXISTS, job_id)]
        _finish(worker)
        worker.stop(job_id)
        assert _read(watch, 1) == [(_ENDED, job_id)]


def test_changes_before_the_first_reading_are_told_as_the_present(worker: Worker) -> None:
    """A job that ended or was removed is told once."""
    gone, ended, running = _finish(worker), _sleeper(worker), _sleeper(worker)
    with worker.watch() as watch:
        worker.remove(gone)
        worker.stop(ended)
        events = [next(watch), next(watch), next(watch)]
        worker.stop(running)
        events += [next(watch)]
    assert [(event.kind, event.job.job_id, event.job.status) for event in events] == [
        (_EXISTS, ended, Status.STOPPED),
        (_EXISTS, running, Status.RUNNING),
        (_REMOVED, gone, Status.FINISHED),
        (_ENDED, running, Status.STOPPED),
    ]


def test_reader_that_is_behind_holds_up_nobody_and_takes_bounded_memory(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its watch ends with an error, and a new one tells how all jobs are."""
    monkeypatch.setattr(watching, "_MOST_JOBS", 5)
    with worker.watch() as watch:
        first = _finish(worker)
        assert [next(watch).kind, next(watch).kind] == [_STARTED, _ENDED]
        ids = [first, *(_finish(worker) for _ in range(5))]
        assert len(watch._pending) == 5
        ids += [_finish(worker) for _ in range(5)]
        assert len(watch._pending) == 0
        with pytest.raises(WatchBehindError, match="watch anew"):
            next(watch)
    with worker.watch() as watch:
        assert [next(watch).job.job_id for _ in ids] == ids


def test_close_wakes_the_reader_and_ends_the_iterator(
    worker: Worker, pool: ThreadPoolExecutor
) -> None:
    """From another thread, and for good."""
    watch = worker.watch()
    reader = pool.submit(list, watch)
    watch.close()
    watch.close()
    assert reader.result(GUARD_S) == []
    _finish(worker)
    assert list(watch) == []


def test_closed_worker_ends_a_watch_after_the_last_events(pool: ThreadPoolExecutor) -> None:
    """The ends of the jobs are told first; then `WorkerClosedError` is raised."""
    worker = Worker(enforcement="off")
    job_id = _sleeper(worker)
    watch = worker.watch()
    assert _read(watch, 1) == [(_EXISTS, job_id)]
    reader = pool.submit(next, watch)
    worker.close()
    assert reader.result(GUARD_S).kind is _ENDED
    with pytest.raises(WorkerClosedError):
        next(watch)
    watch.close()
    with pytest.raises(WorkerClosedError):
        worker.watch()


def test_closed_watch_is_forgotten(worker: Worker) -> None:
    """A server may have watches for years. The next change of a job forgets those closed."""
    with worker.watch() as watch:
        reference = weakref.ref(watch)
    del watch
    worker.wait(worker.start("true"), GUARD_S)
    assert worker._registry._watches == ()
    gc.collect()
    assert reference() is None


def test_every_watch_sees_every_job_once_while_jobs_start_end_and_go(
    worker: Worker, pool: ThreadPoolExecutor
) -> None:
    """Watches begin at any time. Whatever they see of a job is in order, and complete."""

    def churn(number: int) -> list[str]:
        kept = []
        for i in range(10):
            job_id = _finish(worker, name=f"n{number}")
            if i % 2:
                worker.remove(job_id)
            else:
                kept.append(job_id)
        return kept

    def read() -> dict[str, list[JobEventKind]]:
        seen: dict[str, list[JobEventKind]] = {}
        with worker.watch() as watch:
            for event in watch:
                seen.setdefault(event.job.job_id, []).append(event.kind)
                if event.job.name == "last" and event.kind is _ENDED:
                    return seen
        raise AssertionError("the watch ended")

    readers = [pool.submit(read)]
    churners = [pool.submit(churn, number) for number in range(4)]
    readers += [pool.submit(read) for _ in range(3)]
    kept = [job_id for churner in churners for job_id in churner.result(GUARD_S)]
    _finish(worker, name="last")
    orders = (
        [_STARTED, _ENDED],
        [_STARTED, _ENDED, _REMOVED],
        [_EXISTS],
        [_EXISTS, _ENDED],
        [_EXISTS, _REMOVED],
        [_REMOVED],
        [_EXISTS, _ENDED, _REMOVED],
    )
    for reader in readers:
        seen = reader.result(GUARD_S)
        assert set(kept) <= set(seen)
        assert all(events in orders for events in seen.values())
        assert all(_REMOVED not in seen[job_id] for job_id in kept)


def test_watch_can_be_closed_while_another_thread_has_the_registry(worker: Worker) -> None:
    """The garbage collector may close it in a thread for whose lock that other thread waits."""
    watch = worker.watch()
    closing = threading.Thread(target=watch.close, daemon=True)
    with worker._registry._lock:
        closing.start()
        closing.join(GUARD_S)
        assert not closing.is_alive()
