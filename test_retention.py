"""Tests of how finished jobs are removed: by a user, and by the rule that bounds their number.

The first tests use the library, with real jobs and files. The others use the API and the command
line.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import random
import sys
import threading
import time
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from budget import Budget
from client import ClientError, main
from ending import Ending
from job import RunningJob
from jobstate import Work
from jobtable import JobTable, Row
from limits import NO_LIMITS
from outputstate import OutputState
from retention import FinishedJobs
from spares import JobThread
from store import Store
from testkit import (
    ABSENT,
    FOREVER,
    GUARD_S,
    await_output,
    children_of,
    descriptors_of,
    job_files,
    job_processes,
    settle_spares,
    small_file_system,
)
from worker import (
    EndReason,
    JobRunningError,
    OutputIncompleteError,
    Retention,
    Status,
    UnknownJobError,
    Worker,
    WorkerClosedError,
    WorkerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from client import Client
    from server import Server

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker whose rule has no bounds."""
    with Worker(enforcement="off") as worker:
        yield worker


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def _keeping(**bounds: float) -> Worker:
    return Worker(enforcement="off", retention=Retention(**bounds))  # type: ignore[arg-type]


def _settle(worker: Worker | None) -> None:
    """Block until the threads of all ended jobs are done, and so have removed what is too much."""
    assert worker is not None
    for thread in tuple(worker._registry._leaving):
        thread.join(GUARD_S)


def _descriptors(worker: Worker) -> int:
    """Count this process's descriptors, with those of the spare."""
    settle_spares(worker)
    return len(descriptors_of())


def _finish(worker: Worker, *argv: str, owner: str = "", budget: Budget | None = None) -> str:
    """Run a job to its end, and wait until its thread is done; return its ID."""
    command, *args = argv or ("true",)
    job_id = worker.start(command, args, owner=owner, budget=budget)
    worker.wait(job_id, GUARD_S)
    _settle(worker)
    return job_id


def _write(worker: Worker, size: int, owner: str = "", budget: Budget | None = None) -> str:
    """Finish a job that has written `size` bytes."""
    return _finish(worker, "head", "-c", str(size), "/dev/zero", owner=owner, budget=budget)


def _kept(worker: Worker) -> list[str]:
    """Return the IDs of all known jobs. Exactly these jobs must have an output file."""
    job_ids = [job.job_id for job in worker.list()]
    assert job_files(worker) == sorted(f"{job_id}.out" for job_id in job_ids)
    return job_ids


def _together(pool: ThreadPoolExecutor, *calls: Callable[[], Any]) -> list[Any]:
    """Make all calls at the same time; return their results, or the types of their errors."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait(GUARD_S)
        try:
            return call()
        except (WorkerError, OSError) as error:
            return type(error)

    return [future.result(GUARD_S) for future in [pool.submit(run, call) for call in calls]]


# --- removal ------------------------------------------------------------------------------------


def test_removed_job_is_unknown_and_its_output_is_gone(worker: Worker) -> None:
    """Methods then raise `UnknownJobError`, also `remove`; other jobs are not affected."""
    budget = Budget(None, "none")
    others = [_finish(worker), _finish(worker)]
    job_id = _write(worker, 1000, budget=budget)
    assert (len(_kept(worker)), budget.used) == (3, 1000)
    worker.remove(job_id)
    assert (_kept(worker), budget.used) == (others, 0)
    for method in (worker.remove, worker.status, worker.stop, worker.wait, worker.stream):
        with pytest.raises(UnknownJobError, match=job_id):
            method(job_id)
    assert worker.owner(job_id) is None


@pytest.mark.parametrize("job_id", ["", "nonsense", ABSENT])
def test_removal_of_an_unknown_job_is_an_error(worker: Worker, job_id: str) -> None:
    """Removing a job that does not exist raises `UnknownJobError`."""
    with pytest.raises(UnknownJobError):
        worker.remove(job_id)


def test_running_job_is_not_removed(worker: Worker) -> None:
    """The error says that the job has to be stopped; after a stop the removal succeeds."""
    job_id = worker.start(*FOREVER)
    with pytest.raises(JobRunningError, match=f"{job_id} is still running; stop it first") as error:
        worker.remove(job_id)
    assert error.value.job_id == job_id
    assert worker.status(job_id).status is Status.RUNNING
    worker.stop(job_id)
    worker.remove(job_id)
    assert _kept(worker) == []


@pytest.mark.parametrize("learn", ["stop", "wait", "stream"])
def test_job_can_be_removed_as_soon_as_its_end_is_known(worker: Worker, learn: str) -> None:
    """After a stop, a wait or the end of a stream, a removal succeeds at once."""
    for _ in range(20):
        job_id = worker.start("echo", ["x"])
        if learn == "stream":
            with worker.stream(job_id) as chunks:
                assert list(chunks) == [b"x\n"]
        else:
            getattr(worker, learn)(job_id)
        worker.remove(job_id)
    assert worker.list() == ()


def test_job_can_be_removed_from_the_moment_its_output_ends(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscriber may act on the end of the output while the job's thread still ends the job."""
    job_id = worker.start(*FOREVER)
    outcomes: list[str] = []
    output = worker._job(job_id).output
    real_complete = output.complete

    def complete() -> None:
        real_complete()
        if not outcomes:
            outcomes.append("began")
            worker.remove(job_id)
            outcomes.append("removed")

    monkeypatch.setattr(output, "complete", complete)
    assert worker.stop(job_id).status is Status.STOPPED
    assert outcomes == ["began", "removed"]
    assert _kept(worker) == []


def test_stream_of_a_job_that_is_removed_meanwhile_raises_unknown_job(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a job is removed in the middle of `stream`, the error is not `WorkerClosedError`."""
    job_id, real_job = _finish(worker), worker._job

    def remove_meanwhile(job_id: str) -> object:
        job = real_job(job_id)
        worker.remove(job_id)
        return job

    monkeypatch.setattr(worker, "_job", remove_meanwhile)
    with pytest.raises(UnknownJobError):
        worker.stream(job_id)


def test_readers_of_a_removed_job_get_all_of_its_output(worker: Worker) -> None:
    """Subscribers at any position get the rest; the last one to end gives the budget its bytes."""
    size, budget = 3_000_000, Budget(None, "none")
    job_id = worker.start(
        sys.executable,
        ["-c", f"import sys,random; sys.stdout.buffer.write(random.Random(7).randbytes({size}))"],
        budget=budget,
    )
    worker.wait(job_id, GUARD_S)
    expected = random.Random(7).randbytes(size)
    descriptors = _descriptors(worker)
    readers = [worker.stream(job_id, subscriber=f"reader{i}") for i in range(5)]
    received = [b"".join(next(reader) for _ in range(i)) for i, reader in enumerate(readers)]
    assert len(worker.status(job_id).subscribers) == 5
    worker.remove(job_id)
    assert job_files(worker) == []
    with pytest.raises(UnknownJobError):
        worker.stream(job_id)
    for i, reader in enumerate(readers):
        assert budget.used == size
        assert received[i] + b"".join(reader) == expected
    assert budget.used == 0
    assert _descriptors(worker) <= descriptors  # gRPC, of other tests, may close some late


def test_removal_that_races_with_everything_is_one_removal(
    worker: Worker, pool: ThreadPoolExecutor
) -> None:
    """One of four removals succeeds; a subscriber gets all bytes or an error; nothing is left."""
    _finish(worker)
    descriptors = _descriptors(worker)
    for _ in range(20):
        job_id = _write(worker, 600_000)

        def read(job_id: str = job_id) -> int:
            with worker.stream(job_id) as chunks:
                return sum(map(len, chunks))

        def status(job_id: str = job_id) -> int:
            return worker.status(job_id).output_bytes + worker.stop(job_id).output_bytes

        results = _together(
            pool, *[functools.partial(worker.remove, job_id)] * 4, *[read] * 6, *[status] * 3
        )
        assert sorted(map(str, results[:4])) == sorted(map(str, [None, *[UnknownJobError] * 3]))
        assert set(results[4:10]) <= {600_000, UnknownJobError}
        assert set(results[10:]) <= {1_200_000, UnknownJobError}
    assert len(_kept(worker)) == 1
    assert _descriptors(worker) <= descriptors  # gRPC, of other tests, may close some late


def test_removal_that_races_with_the_end_removes_or_is_refused(
    worker: Worker, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """A removal before the job's end is refused; a removal after the end leaves nothing."""
    latch, outcomes = tmp_path / "latch", set()
    os.mkfifo(latch)
    for _ in range(20):
        job_id = worker.start("sh", ["-c", f"echo x; read line <{latch}; echo y"])
        with worker.stream(job_id) as chunks:
            assert next(chunks) == b"x\n"
            # The first call blocks until the job opens the FIFO. Its line then lets the job end.
            results = _together(
                pool,
                lambda: latch.write_text("\n"),
                *[functools.partial(worker.remove, job_id)] * 4,
            )
            assert b"".join(chunks) == b"y\n"
        outcomes |= set(results[1:])
        if None in results[1:]:
            with pytest.raises(UnknownJobError):
                worker.status(job_id)
        else:
            worker.remove(job_id)
    assert outcomes <= {None, UnknownJobError, JobRunningError}
    assert worker.list() == ()
    _settle(worker)
    assert _kept(worker) == []


def test_removal_that_races_with_close_leaves_nothing(
    pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """A removal succeeds or raises `WorkerClosedError`; in both cases the directory is empty."""
    pool.submit(int).result(GUARD_S)
    for _ in range(10):
        descriptors = descriptors_of()
        with _keeping(jobs=4, age_s=0.001) as worker:
            pass
        worker = Worker(enforcement="off", output_dir=tmp_path / "output")
        job_ids = [_finish(worker) for _ in range(6)]
        removals = [functools.partial(worker.remove, job_id) for job_id in job_ids]
        results = _together(pool, worker.close, *removals)
        assert set(results) <= {None, WorkerClosedError}
        assert len(worker.list()) == results.count(WorkerClosedError)
        assert list((tmp_path / "output").iterdir()) == []
        assert set(descriptors_of()) <= set(descriptors)


class _Watched(threading.Condition):
    """Sets `event` when a thread begins to wait."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self._event = event

    def wait(self, timeout: float | None = None) -> bool:
        self._event.set()
        return super().wait(timeout)


def test_close_waits_for_a_removal(
    worker: Worker, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`close` returns only after a removal that is under way, which needs the directory."""
    job_id, closing = _finish(worker), threading.Event()
    worker._starter._idle = _Watched(closing)
    output = worker._job(job_id).output
    real_remove = output.remove
    was_closed = []

    def remove() -> None:
        close = pool.submit(worker.close)
        close.add_done_callback(lambda _: closing.set())
        assert closing.wait(GUARD_S)
        was_closed.append(close.done())
        real_remove()

    monkeypatch.setattr(output, "remove", remove)
    worker.remove(job_id)
    assert was_closed == [False]


def test_closed_worker_removes_nothing(worker: Worker) -> None:
    """After a close, `remove` and `make_room` raise; the state of a job can still be read."""
    job_id = _finish(worker)
    worker.close()
    with pytest.raises(WorkerClosedError):
        worker.remove(job_id)
    with pytest.raises(WorkerClosedError):
        worker.make_room("", Budget(0, "none"))
    assert worker.status(job_id).exit_code == 0


def test_output_that_cannot_be_deleted_is_reported(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """`remove` raises and forgets the job; a removal to make room logs an error."""
    job_id = _write(worker, 10)
    path = Path(worker._parts.output_dir.path, f"{job_id}.out")
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=job_id):
        worker.remove(job_id)
    with pytest.raises(UnknownJobError):
        worker.status(job_id)
    path.rmdir()

    budget = Budget(10, "ten")
    job_id = _write(worker, 10, "alice", Budget(None, "a job's", budget))
    path = Path(worker._parts.output_dir.path, f"{job_id}.out")
    path.unlink()
    path.mkdir()
    assert worker.make_room("alice", budget) is budget
    path.rmdir()
    assert f"job {job_id}: its output stays until the worker is closed" in caplog.text


def test_job_that_ends_before_its_start_has_returned_is_not_taken_for_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a job is FINISHED, or unknown if the rule has removed it already."""
    with _keeping(jobs=1) as worker:
        real_give = JobThread.give

        def give_and_await(thread: JobThread, job_id: str, work: Callable[[], None]) -> None:
            real_give(thread, job_id, work)
            thread.join(GUARD_S)
            if another:
                another.pop()
                _finish(worker)

        monkeypatch.setattr(JobThread, "give", give_and_await)
        another: list[bool] = []
        job_id = worker.start("true")
        assert worker.status(job_id).status is Status.FINISHED
        another.append(True)
        gone = worker.start("true")
        with pytest.raises(UnknownJobError):
            worker.status(gone)
        assert len(_kept(worker)) == 1


def test_state_of_a_finished_job_changes_only_in_its_subscribers(worker: Worker) -> None:
    """Every method returns the state that `wait` returned, with the present subscribers."""
    job_id = worker.start("sh", ["-c", "echo hi; exit 7"], owner="alice")
    job = worker.wait(job_id, GUARD_S)
    assert (job.exit_code, job.output_bytes, job.args) == (7, 3, ("-c", "echo hi; exit 7"))
    assert worker.status(job_id) == worker.stop(job_id) == worker.list()[0] == job
    with worker.stream(job_id, subscriber="bob"):
        assert worker.status(job_id).subscribers == ("bob",)
    assert worker.status(job_id) == job


def test_of_a_finished_job_only_its_record_stays(worker: Worker) -> None:
    """The job's thread, its `RunningJob`, its condition and its descriptors are gone."""
    _finish(worker)
    descriptors = _descriptors(worker)
    parts: list[weakref.ref[Any]] = []
    for _ in range(5):
        job_id = worker.start(*FOREVER)
        job = worker._job(job_id)
        assert isinstance(job, RunningJob)
        parts += [weakref.ref(job), weakref.ref(job.thread), weakref.ref(job._ended)]
        del job
        worker.stop(job_id)
    _settle(worker)
    _finish(worker)  # the end of this job drops the last references to the earlier ones
    gc.collect()
    assert [part() for part in parts] == [None] * len(parts)
    assert _descriptors(worker) <= descriptors  # gRPC, of other tests, may close some late


# --- the rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds",
    [{"age_s": -1}, {"age_s": float("nan")}, {"jobs": 0}, {"output_bytes": -1}, {"argv_bytes": -1}],
)
def test_senseless_rule_is_an_error(bounds: dict[str, Any]) -> None:
    """The error names the bound and its value."""
    ((name, value),) = bounds.items()
    with pytest.raises(ValueError, match=rf"{name} must be at least [01], not {value}"):
        Retention(**bounds)


def test_without_a_rule_everything_is_kept() -> None:
    """Ten finished jobs are kept, and the worker has no thread more than before."""
    with Worker(enforcement="off") as worker:
        settle_spares(worker)
        threads = threading.active_count()
        job_ids = [_finish(worker) for _ in range(10)]
        assert _kept(worker) == job_ids
        settle_spares(worker)
        assert threading.active_count() == threads


def test_of_too_many_jobs_those_that_ended_first_are_removed() -> None:
    """The order of their starts does not matter; running jobs do not count."""
    with _keeping(jobs=2) as worker:
        running = worker.start(*FOREVER)
        last = worker.start(*FOREVER)
        job_ids = [_finish(worker) for _ in range(3)]
        assert _kept(worker) == [running, last, *job_ids[1:]]
        worker.stop(last)
        _settle(worker)
        assert _kept(worker) == [running, last, job_ids[2]]


def test_for_too_much_output_the_oldest_jobs_are_removed() -> None:
    """As many as needed are removed; the output of a job that a user removed does not count."""
    with _keeping(output_bytes=100) as worker:
        first, second, third = (_write(worker, 30) for _ in range(3))
        worker.remove(second)
        fourth = _write(worker, 30)
        assert _kept(worker) == [first, third, fourth]
        fifth = _write(worker, 60)
        assert _kept(worker) == [fourth, fifth]


def test_job_that_has_just_ended_is_never_too_much() -> None:
    """A job that exceeds the bounds alone is kept until the next job ends."""
    with _keeping(output_bytes=100, argv_bytes=0) as worker:
        large = _write(worker, 1000)
        assert _kept(worker) == [large]
        small = _write(worker, 1)
        assert _kept(worker) == [small]


def test_for_too_much_argv_the_oldest_jobs_are_removed() -> None:
    """Argv counts as it is kept in memory: up to 4 bytes a character, some 50 an argument."""
    with _keeping(argv_bytes=300_000) as worker:
        first = _finish(worker, "true", "x" * 100_000)
        second = _finish(worker, "true", "x" * 100_000)
        assert _kept(worker) == [first, second]
        third = _finish(worker, "true", *(f"{i}" for i in range(10, 2500)))
        assert _kept(worker) == [second, third]
        fourth = _finish(worker, "true", "x" * 30_000 + "\N{PILE OF POO}")
        assert _kept(worker) == [third, fourth]


@pytest.mark.parametrize("bound", ["jobs", "output_bytes"])
def test_one_owners_flood_does_not_push_out_anothers_jobs(bound: str) -> None:
    """Only jobs of the owner who has the most are removed, the oldest first."""
    with _keeping(**{bound: 5 if bound == "jobs" else 50}) as worker:
        alices = [_write(worker, 10, "alice") for _ in range(2)]
        floods = [_write(worker, 10, "mallory") for _ in range(12)]
        assert _kept(worker) == alices + floods[-3:]


def test_of_owners_with_equally_many_jobs_the_oldest_job_is_removed() -> None:
    """So the first job of a new owner is kept."""
    with _keeping(jobs=3) as worker:
        job_ids = [_finish(worker, owner=f"owner{i}") for i in range(6)]
        assert _kept(worker) == job_ids[3:]


class _SignallingBudget(Budget):
    """Sets `given_back` when it gets bytes back, which is when the job's file is deleted."""

    __slots__ = ("given_back",)

    def __init__(self) -> None:
        super().__init__(None, "none")
        self.given_back = threading.Event()

    def give_back(self, size: int) -> None:
        super().give_back(size)
        self.given_back.set()


def test_job_that_is_too_old_is_removed() -> None:
    """No job is removed before its age; every job is removed then, without a call of the worker.

    This also works after all earlier jobs were removed.
    """
    with _keeping(age_s=0.2) as worker:
        for _ in range(3):
            budgets = [_SignallingBudget(), _SignallingBudget()]
            before = time.monotonic()
            for budget in budgets:
                worker.start("echo", budget=budget)
            for budget in budgets:
                assert budget.given_back.wait(GUARD_S)
            assert time.monotonic() - before >= 0.2
            assert _kept(worker) == []


def test_step_of_the_clock_forward_removes_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a year fast for a moment would otherwise remove all finished jobs."""
    with _keeping(age_s=3600) as worker:
        before = _finish(worker)
        fast = SimpleNamespace(**{**vars(time), "time": lambda: time.time() + 365 * 24 * 3600})
        monkeypatch.setattr("retention.time", fast)
        later = _finish(worker)
        assert _kept(worker) == [before, later]


def test_old_job_that_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    """A job that is too old is unknown, but its subscriber still gets all of its output."""
    latch = tmp_path / "latch"
    os.mkfifo(latch)
    with _keeping(age_s=0.1) as worker:
        budget = _SignallingBudget()
        script = f"read line <{latch}; head -c 1000000 /dev/zero"
        job_id = worker.start("sh", ["-c", script], budget=budget)
        job = worker._job(job_id)
        with worker.stream(job_id) as chunks:
            latch.write_text("\n")
            size = len(next(chunks))
            assert job.wait(GUARD_S)
            removed = _SignallingBudget()
            worker.start("echo", budget=removed)  # removed after the job that is read
            assert removed.given_back.wait(GUARD_S)
            with pytest.raises(UnknownJobError):
                worker.stream(job_id)
            assert not budget.given_back.is_set()
            assert size + sum(map(len, chunks)) == 1_000_000
        assert budget.given_back.is_set()


def test_thread_that_waits_for_age_ends_with_the_worker() -> None:
    """The thread begins when the first job ends, there is only one, and `close` ends it."""

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "retention"]

    for age_s in (3600, 1e300):
        with _keeping(age_s=age_s) as worker:
            assert threads() == []
            job_ids = [_finish(worker) for _ in range(3)]
            assert threads() == ["retention"]
            assert _kept(worker) == job_ids
        assert threads() == []


def test_failure_to_start_that_thread_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The jobs that have ended are kept until the thread can be started."""
    real_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "retention":
            raise RuntimeError("can't start new thread")
        real_start(thread)

    with _keeping(age_s=0.1) as worker:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            job_id = _write(worker, 1)
            assert _kept(worker) == [job_id]
        assert "no thread can be started to remove old jobs: can't start" in caplog.text
        budget = _SignallingBudget()
        worker.start("echo", budget=budget)
        assert budget.given_back.wait(GUARD_S)
        assert _kept(worker) == []


def test_a_thousand_jobs_later_there_is_no_more_than_the_rule_says(
    pool: ThreadPoolExecutor,
) -> None:
    """Jobs end, are read and removed at the same time; no thread, descriptor or process is left."""
    with _keeping(jobs=20, age_s=3600) as worker:
        _finish(worker)

        def held() -> tuple[object, ...]:
            worker._spawner.kill("nobody")  # answered in order, so earlier requests are done
            spawner = worker._spawner.pid
            threads = sorted(thread.name for thread in threading.enumerate())
            processes = len(children_of(spawner)), job_processes(spawner)
            return len(descriptors_of()), len(descriptors_of(spawner)), threads, processes

        def use(owner: str) -> None:
            for i in range(40):
                job_id = worker.start("echo", [owner], owner=owner)
                with contextlib.suppress(UnknownJobError), worker.stream(job_id) as chunks:
                    assert b"".join(chunks) == f"{owner}\n".encode()
                if i % 3 == 0:
                    with contextlib.suppress(UnknownJobError):
                        worker.remove(job_id)

        _together(pool, *[int] * 32)  # starts all threads of the pool
        before = held()
        _together(pool, *(lambda i=i: use(f"owner{i % 5}") for i in range(24)))
        _settle(worker)
        assert held() == before
        assert len(_kept(worker)) <= 20
        for _ in range(24):  # 24 threads may have removed a job each after the last end
            _finish(worker)
        assert len(_kept(worker)) == 20


# --- the rule, without jobs ---------------------------------------------------------------------


class _Model:
    """The rule written as simply as possible, without regard to speed."""

    def __init__(self, rule: Retention) -> None:
        self.bounds = (rule.jobs, rule.output_bytes, rule.argv_bytes)
        self.jobs: list[Row] = []

    @staticmethod
    def counts(row: Row) -> tuple[int, int, int]:
        return 1, row.output.size, row.argv_bytes

    def excess(self) -> list[Row]:
        left, gone = list(self.jobs), []
        for i, bound in enumerate(self.bounds):
            while bound is not None and sum(self.counts(row)[i] for row in left) > bound:
                owners = {row.job.owner: 0 for row in left}  # in the order of their oldest jobs
                for row in left:
                    owners[row.job.owner] += self.counts(row)[i]
                most = max(owners, key=lambda owner: owners[owner])
                oldest = next(row for row in left if row.job.owner == most)
                if oldest is left[-1]:
                    break
                left.remove(oldest)
                gone.append(oldest)
        return gone


def _record(table: JobTable, owner: str, size: int, args: tuple[str, ...]) -> Row:
    job_id, now = str(uuid.uuid4()), datetime.now(UTC)
    work = Work(["true", *args], owner, None, NO_LIMITS, None, None, "/", "", {}, Ending())
    table.begin(job_id, work, limits=NO_LIMITS, started_at=now)
    table.end_lost(lambda _: OutputState(size))
    row = table.get(job_id)
    assert row is not None
    return row


@pytest.mark.parametrize("seed", range(20))
def test_rule_removes_what_the_model_removes(seed: int) -> None:
    """300 jobs of some owners end and are removed at random; rule and model agree each time."""
    dice = random.Random(seed)
    rule = Retention(
        jobs=dice.choice([None, 1, 7]),
        output_bytes=dice.choice([None, 0, 50]),
        argv_bytes=dice.choice([None, 0, 2000]),
    )
    table = JobTable(Store())
    model, jobs, budget = _Model(rule), FinishedJobs(rule, table), Budget(None, "none")
    owners = "abcdefgh"[: dice.randint(1, 8)]

    def discard(row: Row) -> None:
        assert table.has(row.job.job_id)
        table.delete(row.job.job_id)
        jobs.discard(row)
        model.jobs.remove(row)

    for _ in range(300):
        args = ("x" * dice.randint(1, 200),) * dice.randint(0, 2)
        row = _record(table, dice.choice(owners), dice.choice([0, 1, 10, 60]), args)
        jobs.add(row, budget)
        model.jobs.append(row)
        expected = model.excess()
        for gone in jobs.excess():
            assert gone == expected.pop(0)
            discard(gone)
        assert expected == []
        while model.jobs and dice.random() < 0.3:
            discard(dice.choice(model.jobs))
        assert table.page(most=1000) == model.jobs
        assert jobs.count == len(model.jobs)


def test_job_whose_row_cannot_be_read_ends_for_all_who_wait(
    pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """Its end is known, and its output ends. An error is logged."""
    with Store() as store, Worker(store=store) as worker:
        job_id = worker.start("sh", ["-c", "echo out; exec sleep infinity"])
        chunks = worker.stream(job_id)
        assert next(chunks) == b"out\n"
        store.execute("UPDATE jobs SET start = '{}'")
        rest, end = pool.submit(list, chunks), pool.submit(worker.wait, job_id, GUARD_S)
        worker.stop(job_id)
        assert rest.result(GUARD_S) == []
        assert end.result(GUARD_S).end_reason is EndReason.STOPPED
    assert f"job {job_id} is not counted: the store has a damaged row" in caplog.text


# --- room for others ----------------------------------------------------------------------------


def test_room_is_made_by_the_oldest_of_the_owner(worker: Worker) -> None:
    """The oldest job that has output is removed, one for each call; other owners lose nothing."""
    alices, bobs = Budget(110, "alice's"), Budget(5, "bob's")
    empty, large, small = (
        _write(worker, size, "alice", Budget(None, "a job's", alices)) for size in (0, 100, 10)
    )
    of_bob = _write(worker, 5, "bob", Budget(None, "a job's", bobs))
    running = worker.start(*FOREVER, owner="alice")
    assert _kept(worker) == [empty, large, small, of_bob, running]
    assert worker.make_room("alice", alices) is None
    assert _kept(worker) == [empty, small, of_bob, running]
    assert worker.make_room("alice", alices) is None
    assert _kept(worker) == [empty, small, of_bob, running]
    assert alices.take(100) == (100, None)
    assert worker.make_room("alice", alices) is None
    assert _kept(worker) == [empty, of_bob, running]
    assert alices.take(10) == (10, None)
    assert worker.make_room("alice", alices) is alices
    assert _kept(worker) == [empty, of_bob, running]


def test_output_that_is_read_makes_no_room(worker: Worker) -> None:
    """Deleting it would free nothing before its subscriber ends, so another job is removed."""
    budget = Budget(20, "twenty")
    first, _ = (_write(worker, 10, "alice", Budget(None, "a job's", budget)) for _ in range(2))
    with worker.stream(first):
        assert worker.make_room("alice", budget) is None
        assert _kept(worker) == [first]
        assert budget.take(10) == (10, None)
        assert worker.make_room("alice", budget) is budget
        assert _kept(worker) == [first]
    assert worker.make_room("alice", budget) is None
    assert _kept(worker) == []


def test_jobs_that_need_room_at_once_lose_nothing(worker: Worker, pool: ThreadPoolExecutor) -> None:
    """Eight jobs write at the ceiling; finished jobs give way, and no byte is lost."""
    budget = Budget(1_000_000, "a million")

    def finish(size: int) -> str:
        return worker.start(
            "head",
            ["-c", str(size), "/dev/zero"],
            owner="alice",
            budget=Budget(None, "a job's", budget),
        )

    for _ in range(20):
        worker.wait(finish(50_000), GUARD_S)
    job_ids = list(pool.map(finish, [100_000] * 8))
    assert [worker.wait(each, GUARD_S).output_lost_bytes for each in job_ids] == [0] * 8
    assert budget.used <= 1_000_000


# --- a full disk ------------------------------------------------------------------------------


def _free(directory: Path) -> int:
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize


_MIB = 1024 * 1024


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of 8 MiB."""
    with small_file_system("8m") as path:
        yield path


def _on(disk: Path, reserve_bytes: int | None = None) -> Worker:
    return Worker(enforcement="off", output_dir=disk / "output", reserve_bytes=reserve_bytes)


@pytest.mark.parametrize("reserve_bytes", [_MIB, 3 * _MIB, None], ids=["1M", "3M", "5%"])
def test_output_leaves_a_reserve_of_the_disk(disk: Path, reserve_bytes: int | None) -> None:
    """A job that writes more than the disk holds ends by itself; what it lost is counted."""
    with _on(disk, reserve_bytes) as worker:
        job_id = worker.start("head", ["-c", "16M", "/dev/zero"])
        job = worker.wait(job_id, GUARD_S)
        assert job.exit_code == 0
        assert job.output_bytes + job.output_lost_bytes == 16 * _MIB
        reserve = 8 * _MIB * 5 // 100 if reserve_bytes is None else reserve_bytes
        assert _free(disk) >= reserve
        assert job.output_bytes > 0
        with worker.stream(job_id) as chunks, pytest.raises(OutputIncompleteError, match="reserve"):
            list(chunks)


@pytest.mark.parametrize("reserve_bytes", [_MIB, 0])
def test_on_a_full_disk_finished_jobs_give_way(disk: Path, reserve_bytes: int) -> None:
    """The oldest first, so that a new job loses nothing; also without a reserve."""
    with _on(disk, reserve_bytes) as worker:
        first, second = (_write(worker, 3 * _MIB) for _ in range(2))
        assert _kept(worker) == [first, second]
        third = _write(worker, 3 * _MIB)
        assert _kept(worker) == [second, third]
        assert worker.status(third).output_lost_bytes == 0
        # What other programs write takes room, too. Somebody reads the second job's output.
        (disk / "filler").write_bytes(bytes(_free(disk)))
        with worker.stream(second):
            fourth = _write(worker, 4096)
            assert _kept(worker) == [second, fourth]


def test_on_a_full_disk_what_gave_way_is_recorded_as_gone(disk: Path) -> None:
    """The store is on that disk: its row is removed when the output has made room."""
    with Store(disk / "store") as store, Worker(output_dir=disk / "output", store=store) as worker:
        budget = Budget(None, "alice's")
        job_id = _write(worker, 3 * _MIB, "alice", budget)
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert worker._registry.give_way("alice", budget)
        assert store.query("SELECT 1 FROM jobs WHERE job_id = ?", (job_id,)) == []


def test_on_a_full_disk_nobody_gives_way_to_who_has_more(disk: Path) -> None:
    """One owner's flood does not push out another's jobs, whether or not there are budgets."""
    everybody = Budget(None, "everybody's")
    alices, bobs = Budget(None, "alice's", everybody), Budget(None, "bob's", everybody)
    with _on(disk, _MIB) as worker:
        of_bob = _write(worker, _MIB, "bob", Budget(None, "a job's", bobs))
        of_alice = _write(worker, 3 * _MIB, "alice", Budget(None, "a job's", alices))
        flood = _write(worker, 16 * _MIB, "alice", Budget(None, "a job's", alices))
        assert _kept(worker) == [of_bob, flood]
        assert worker.status(flood).output_lost_bytes > 0
        of_bob_2 = _write(worker, _MIB, "bob", Budget(None, "a job's", bobs))
        assert _kept(worker) == [of_bob, of_bob_2]
        assert worker.status(of_bob_2).output_lost_bytes == 0
        assert of_alice != flood


# --- over the API -------------------------------------------------------------------------------


def _run(client: Client, *argv: str) -> str:
    """Run a job to its end; return its ID."""
    command, *args = argv or ("true",)
    job_id = client.start(command, args)
    list(client.stream(job_id))
    return job_id


def _refusal(call: Callable[..., Any], *args: Any) -> tuple[str, str]:
    with pytest.raises(ClientError) as caught:
        call(*args)
    return caught.value.code, str(caught.value)


def test_removed_unknown_and_foreign_look_alike(connect: Connect) -> None:
    """Every call that names such a job gets the same status and message."""
    client, admin = connect("user"), connect("admin")
    removed, foreign = _run(client, "echo", "x"), _run(admin)
    client.remove(removed)
    for job_id in (removed, foreign, ABSENT):
        for call in (client.remove, client.status, client.stop, lambda i: list(client.stream(i))):
            assert _refusal(call, job_id) == ("NOT_FOUND", "no such job")
    assert removed not in [job.job_id for job in admin.list()]
    assert admin.status(foreign).job_id == foreign


def test_admin_removes_anybodys_job(connect: Connect) -> None:
    """An admin can remove a user's job, and the user then does not find it."""
    client, admin = connect("user"), connect("admin")
    job_id = _run(client)
    admin.remove(job_id)
    assert _refusal(client.status, job_id)[0] == "NOT_FOUND"


def test_removal_whose_output_stays_is_told(serve: Serve, connect: Connect) -> None:
    """The disk may have become read-only. Here a directory is in the place of the file."""
    server = serve()
    client = connect("user", server.address)
    job_id = _run(client, "echo", "x")
    (path,) = Path(server._settings.state_dir, "output").glob(f"{job_id}.out")
    path.unlink()
    path.mkdir()
    message = "the job is removed, but its output stays on the disk: Is a directory"
    assert _refusal(client.remove, job_id) == ("RESOURCE_EXHAUSTED", message)
    assert _refusal(client.status, job_id)[0] == "NOT_FOUND"
    path.rmdir()


def test_running_job_must_be_stopped_before_it_is_removed(connect: Connect) -> None:
    """The refusal says so to the owner; for a job of somebody else it is "no such job"."""
    client, admin = connect("user"), connect("admin")
    job_id, foreign = client.start(*FOREVER), admin.start(*FOREVER)
    message = f"job {job_id} is still running; stop it first"
    assert _refusal(client.remove, job_id) == ("FAILED_PRECONDITION", message)
    assert _refusal(client.remove, foreign) == ("NOT_FOUND", "no such job")
    client.stop(job_id)
    client.remove(job_id)
    admin.stop(foreign)
    admin.remove(foreign)


@pytest.mark.parametrize("job_id", ["", "x", ABSENT + "0"])
def test_malformed_job_id_is_an_invalid_argument(connect: Connect, job_id: str) -> None:
    """A removal refuses text that is not a UUID, as every other call does."""
    code, message = _refusal(connect().remove, job_id)
    assert code == "INVALID_ARGUMENT"
    assert message.startswith("not a job ID")


def test_open_streams_of_a_removed_job_get_all_of_it(connect: Connect) -> None:
    """The output is far larger than what gRPC buffers; the streams end with OK."""
    client, size = connect(), 30_000_000
    script = f"head -c {size} /dev/zero | tr '\\0' x"
    job_id = client.start("sh", ["-c", script])
    assert sum(map(len, client.stream(job_id))) == size
    streams = [client.stream(job_id) for _ in range(3)]
    digests = [hashlib.sha256(next(stream)) for stream in streams]
    client.remove(job_id)
    for stream, digest in zip(streams, digests, strict=True):
        for data in stream:
            digest.update(data)
    assert {digest.digest() for digest in digests} == {hashlib.sha256(b"x" * size).digest()}


def test_removals_are_on_record(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """The audit log has a line with the job's ID for each removal, also for refused ones."""
    server = serve(audit_log=tmp_path / "audit.log")
    client = connect("user", server.address)
    job_id, running = _run(client), client.start(*FOREVER)
    client.remove(job_id)
    for refused in (job_id, running):
        _refusal(client.remove, refused)
    records = [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]
    assert [
        (record["user"], record["job"], record["outcome"])
        for record in records
        if record["rpc"].endswith("/RemoveJob")
    ] == [
        ("user", job_id, "OK"),
        ("user", job_id, "NOT_FOUND"),
        ("user", running, "FAILED_PRECONDITION"),
    ]


def test_server_keeps_what_its_configuration_says(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """With `jobs = 3` the oldest job of the user who has the most is removed."""
    config = tmp_path / "config.toml"
    config.write_text('[retention]\njobs = 3\nage = "1h"\n')
    server = serve(config=config)
    client, admin = connect("user", server.address), connect("admin", server.address)
    admins = _run(admin)
    _settle(server._worker)
    users = []
    for _ in range(4):
        users.append(_run(client))
        _settle(server._worker)
    assert [job.job_id for job in admin.list()] == [admins, *users[2:]]
    assert _refusal(client.status, users[0]) == ("NOT_FOUND", "no such job")


def _server_with_ceiling(serve: Serve, tmp_path: Path) -> Server:
    config = tmp_path / "config.toml"
    config.write_text('[per_user]\nkept_output = "100K"\n')
    return serve(config=config)


def test_kept_output_of_finished_jobs_blocks_nothing(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """At the ceiling, the oldest finished job gives way to a start and to a running job."""
    server = _server_with_ceiling(serve, tmp_path)
    client = connect("user", server.address)
    write = ("head", "-c", "102400", "/dev/zero")
    first = _run(client, *write)
    second = _run(client, *write)
    assert [job.job_id for job in client.list()] == [second]
    assert client.status(second).output_lost_bytes == 0
    assert _refusal(client.status, first)[0] == "NOT_FOUND"


def test_kept_output_of_running_jobs_blocks_starts_until_it_is_removed(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """The refusal says to stop or remove jobs; after that a start succeeds."""
    server = _server_with_ceiling(serve, tmp_path)
    client = connect("user", server.address)
    # Not a byte more: then the log would give up some in the middle, and a late reader miss them.
    job_id = client.start("sh", ["-c", "head -c 102400 /dev/zero; sleep infinity"])
    await_output(server._worker, job_id, b"\0" * 102_400)
    code, message = _refusal(client.start, "true")
    assert code == "RESOURCE_EXHAUSTED"
    assert "ceiling of 100 KiB (per_user.kept_output) is reached; stop or remove jobs" in message
    client.stop(job_id)
    client.remove(job_id)
    assert [job.job_id for job in client.list()] == []
    _run(client)


def test_restart_keeps_what_the_rule_keeps(
    serve: Serve, connect: Connect, make_state: Callable[[], Path], tmp_path: Path
) -> None:
    """Finished jobs and their output; what a later rule or a user removes is gone for good."""
    state, config = make_state(), tmp_path / "config.toml"
    server = serve(state_dir=state)
    client = connect("user", server.address)
    first, second, third = (_run(client, "echo", str(number)) for number in range(3))
    before = client.status(third)
    server.stop()
    (state / "output" / f"{ABSENT}.out").write_text("of no job")
    config.write_text("[retention]\njobs = 2\n")
    config.chmod(0o600)
    server = serve(state_dir=state, config=config)
    client = connect("user", server.address)
    assert [job.job_id for job in client.list()] == [second, third]
    assert client.status(third) == before
    assert b"".join(client.stream(third)) == b"2\n"
    assert _refusal(client.status, first)[0] == "NOT_FOUND"
    client.remove(second)
    server.stop()
    kept = {path.name for path in (state / "output").iterdir()}
    assert kept == {f"{third}.out"}
    server = serve(state_dir=state)
    assert [job.job_id for job in connect("user", server.address).list()] == [third]


# --- the command line ---------------------------------------------------------------------------


def test_remove_on_the_command_line(
    connect: Connect,
    certs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Success prints nothing; an error prints a line and exits 1; a missing --job exits 2."""
    client = connect()
    monkeypatch.setenv("JOBWORKER_TOKEN", client.token)
    options = ["--server", client._server, "--certs", str(certs)]

    def remove(*arguments: str) -> tuple[int, str, str]:
        status = main(["remove", *options, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    job_id, running = _run(client), client.start(*FOREVER)
    assert remove("-j", job_id) == (0, "", "")
    message = "client: no such job; to see your jobs run: client list\n"
    assert remove("-j", job_id) == (1, "", message)
    message = f"client: job {running} is still running; stop it first\n"
    assert remove("--job", running) == (1, "", message)
    client.stop(running)
    assert remove("--job", running) == (0, "", "")
    with pytest.raises(SystemExit, match="2"):
        remove()
