"""Tests of the table of jobs: that it gives back what it got, and finds what a filter picks."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ending import Ending
from errors import StoreError
from finding import JobFilter
from jobstate import EndReason, Job, Status, UsageSource, Work
from jobtable import GoingOn, JobTable, Row
from limits import NO_LIMITS, Limits, Usage
from outputerrors import Gap
from outputstate import OutputState
from store import Store
from testkit import GUARD_S, small_file_system

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HERE = Path(__file__).resolve().parent
_NOW = datetime(2026, 11, 28, 12, 0, 0, 123456, UTC)
_WORK = Work(["echo", "hi"], "alice", None, NO_LIMITS, None, None, "/", "", {}, Ending())


@pytest.fixture
def table() -> Iterator[JobTable]:
    with Store() as store:
        yield JobTable(store)


def _begin(table: JobTable, work: Work = _WORK, started_at: datetime = _NOW) -> Job:
    """Record a job; return it as the table has it."""
    job_id = str(uuid.uuid4())
    table.begin(job_id, work, limits=work.limits, started_at=started_at)
    return _row(table, job_id).job


def _row(table: JobTable, job_id: str) -> Row:
    row = table.get(job_id)
    assert row is not None
    return row


def _end(table: JobTable, job: Job, size: int = 0) -> Job:
    final = replace(
        job,
        status=Status.FINISHED,
        end_reason=EndReason.EXITED,
        exit_code=0,
        ended_at=_NOW,
        output_bytes=size,
    )
    table.end(final, OutputState(size))
    return final


def test_row_has_all_that_a_job_has(tmp_path: Path) -> None:
    """To the microsecond and the last digit, and what is not text; a later process reads it."""
    argv = ["sh", "-c", "\udcff\n\0", "\N{PILE OF POO}"]
    work = _WORK._replace(
        argv=argv,
        uid=70_001,
        directory="/tmp",
        name="nightly",
        labels={"team": "data", "a.b/c-d": '"quoted"'},
        limits=Limits(cpu_cores=0.1, pids=None),
        ending=Ending(timeout=1.5, grace=3, linger=0),
        stdin=True,
    )
    with Store(tmp_path / "store") as store:
        table = JobTable(store)
        job_id = str(uuid.uuid4())
        table.begin(
            job_id, work, limits=work.limits, started_at=_NOW, kept_tmp="/t/x", has_cgroup=True
        )
        running = _row(table, job_id)
        gap = Gap(10, 20)
        final = replace(
            running.job,
            status=Status.STOPPED,
            end_reason=EndReason.STOPPED,
            stop_reason="by me",
            exit_code=None,
            signal=9,
            ended_at=_NOW + timedelta(microseconds=1),
            output_bytes=100,
            output_lost_bytes=20,
            output_gap=gap,
            usage=Usage(cpu_user_s=0.1 + 0.2, io_reads=1 << 60),
            usage_source=UsageSource.CGROUP,
            may_have_escaped=True,
            killed_after_exit=3,
            input_bytes=7,
            input_ended=True,
        )
        output = OutputState(100, gap, (28, "the disk is full"), 110, b"\0\1", 5)
        table.end(final, output)
        assert table.last_number == 1
    with Store(tmp_path / "store") as store:
        table = JobTable(store)
        row = _row(table, job_id)
        assert row.job == final
        assert (row.job.command, list(row.job.args)) == (argv[0], argv[1:])
        assert row.output._replace(times=table.times(job_id) or b"") == output
        assert row.going_on == running.going_on
        assert row.going_on._replace(started_s=None) == GoingOn(70_001, 3, 0, True, True)
        assert (row.position, row.number) == (table.last_position, 1)
        assert row.argv_bytes > sum(map(len, argv))


def test_jobs_have_positions_in_the_order_of_their_starts(tmp_path: Path) -> None:
    """Also over restarts, and if the clock is set back; the number of others cannot be learned."""
    for _ in range(3):
        with Store(tmp_path / "store") as store:
            table = JobTable(store)
            before = table.last_position
            positions = [_row(table, _begin(table).job_id).position for _ in range(3)]
            assert [before, *positions] == sorted({before, *positions})
            store.execute("UPDATE jobs SET position = position + 1000000000000")


@pytest.mark.parametrize("seed", range(10))
def test_page_has_what_the_filter_picks(table: JobTable, seed: int) -> None:
    """The database and `JobFilter` agree on random jobs and filters, in pages of any size."""
    dice = random.Random(seed)
    jobs = []
    for number in range(60):
        labels = {key: dice.choice("xy") for key in ("a", 'b"', "c/d") if dice.random() < 0.5}
        work = _WORK._replace(owner=dice.choice("AB"), name=dice.choice(["", "n"]), labels=labels)
        job = _begin(table, work, _NOW + timedelta(seconds=number))
        jobs.append(_end(table, job) if dice.random() < 0.5 else job)
    for _ in range(60):
        some = dice.sample(jobs, 3)
        parts = [some[0].job_id, some[1].job_id[: dice.randint(1, 9)], some[2].job_id[:1]]
        matching = JobFilter(
            statuses=dice.choice([(), (), (Status.RUNNING,), (Status.FINISHED, Status.STOPPED)]),
            owner=dice.choice([None, None, "A"]),
            name=dice.choice([None, None, "n"]),
            labels=dice.choice([{}, {}, {"a": "x"}, {"a": "y", 'b"': "x"}, {"c/d": "%"}]),
            since=dice.choice([None, None, some[0].started_at]),
            job_ids=dice.choice([(), (), parts, parts[:1]]),
        )
        expected = [job for job in jobs if matching.concerns(job) and matching.accepts(job.status)]
        for newest_first in (False, True):
            found, after, most = [], 0, dice.randint(1, 70)
            while page := table.page(matching, after=after, newest_first=newest_first, most=most):
                found += [row.job for row in page]
                after = page[-1].position
            assert found == (expected[::-1] if newest_first else expected)


def test_owner_is_that_of_the_very_job(table: JobTable) -> None:
    """IDs before, between and after those that there are have none."""
    assert table.owner(str(uuid.uuid4())) is None
    owners = {}
    for owner in ("alice", "bob", "carol"):
        owners[_begin(table, _WORK._replace(owner=owner)).job_id] = owner
    assert {job_id: table.owner(job_id) for job_id in owners} == owners
    for job_id in owners:
        number = uuid.UUID(job_id).int
        for absent in (uuid.UUID(int=number - 1), uuid.UUID(int=number + 1)):
            assert table.owner(str(absent)) is None
    for absent in (uuid.UUID(int=0), uuid.UUID(int=(1 << 128) - 1)):
        assert table.owner(str(absent)) is None
    removed = next(iter(owners))
    table.delete(removed)
    assert table.owner(removed) is None


def test_job_is_found_by_its_request(table: JobTable) -> None:
    """By that of its owner only, and as long as it is kept."""
    job = _begin(table, _WORK._replace(request_id="r", digest=b"\0d"))
    assert table.of_request("alice", "r") == (job.job_id, b"\0d")
    assert table.of_request("bob", "r") is None
    with pytest.raises(StoreError, match="UNIQUE"):
        _begin(table, _WORK._replace(request_id="r", digest=b"other"))
    for _ in range(2):
        table.delete(job.job_id)
    assert table.of_request("alice", "r") is None


def test_jobs_that_ran_when_their_process_died_are_lost(tmp_path: Path) -> None:
    """Those that had ended stay as they were."""
    with Store(tmp_path / "store") as store:
        table = JobTable(store)
        ended, running = _end(table, _begin(table)), _begin(table)
    with Store(tmp_path / "store") as store:
        table = JobTable(store)
        assert [row.job for row in table.running()] == [running]
        table.end_lost(lambda _: OutputState(7, taken=7))
        assert table.running() == []
        lost = _row(table, running.job_id).job
        assert (lost.status, lost.end_reason) == (Status.FINISHED, EndReason.LOST)
        assert (lost.output_bytes, lost.may_have_escaped) == (7, True)
        assert _row(table, ended.job_id).job == ended
        assert table.amounts()[0][:3] == ("alice", 2, 7)


def test_lost_job_ends_not_before_its_start() -> None:
    """The clock may have been set back before the next process notes the end."""
    table = JobTable(Store())
    began = datetime.now(UTC) + timedelta(days=3650)
    table.begin("a", _WORK, limits=NO_LIMITS, started_at=began)
    table.end_lost(lambda _: OutputState(0))
    job = _row(table, "a").job
    assert job.ended_at == job.started_at


def test_ends_and_removals_on_a_full_disk_are_written_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Until then every answer is as if they had been; no start is taken that is not recorded."""
    with small_file_system("512k") as disk:
        filler = disk / "filler"
        with Store(disk / "store") as store:
            table = JobTable(store)
            first, second, third = (_begin(table) for _ in range(3))
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            long = _WORK._replace(argv=["x" * 100_000])
            with pytest.raises(StoreError, match="the disk is full"):
                _begin(table, long)
            ended = _end(table, first, 5)
            table.delete(second.job_id)
            assert caplog.text.count("is NOT IN THE STORE: the store") == 2

            def answers() -> list[object]:
                found = [table.get(job.job_id) for job in (first, second, third)]
                finished = table.page(JobFilter(statuses=(Status.FINISHED, Status.STOPPED)))
                jobs = [row.job for row in finished if row.number]
                return [*found, jobs, [row.job for row in table.running()]]

            before = answers()
            assert before[3:] == [[ended], [third]]
            filler.unlink()
            table.catch_up()
            assert answers() == before
        with Store(disk / "store") as store:
            table = JobTable(store)
            assert answers() == before


@contextlib.contextmanager
def _read_only(table: JobTable) -> Iterator[None]:
    """Within this context the store refuses every write."""
    table._store.query("PRAGMA query_only=ON")
    yield
    table._store.query("PRAGMA query_only=OFF")


def test_removal_that_is_not_written_shortens_no_page(table: JobTable) -> None:
    """The next row is found in place of the removed one: a short page is the last one."""
    first, second, third, fourth = (_end(table, _begin(table), 5) for _ in range(4))
    with _read_only(table):
        table.delete(first.job_id)
        table.delete(second.job_id)
        assert [row.job for row in table.page(most=2)] == [third, fourth]
        newest = table.page(JobFilter(owner="alice"), newest_first=True, most=3)
        assert [row.job for row in newest] == [fourth, third]
        oldest = table.oldest(), table.oldest("alice"), table.with_output("alice", [])
        assert [row and row.job for row in oldest] == [third] * 3


class _Interrupted(Store):
    """A store in which something happens right after a query, as another thread would do it."""

    def __init__(self) -> None:
        super().__init__()
        self.then: Callable[[], object] | None = None

    def query(self, sql: str, values: Any = ()) -> list[Any]:
        rows = super().query(sql, values)
        then, self.then = self.then, None
        if then is not None:
            then()
        return rows


@pytest.mark.parametrize(
    "read",
    [
        lambda table, job: table.get(job.job_id),
        lambda table, _: table.page(),
        lambda table, _: table.running(),
        lambda table, job: table.owner(job.job_id),
        lambda table, job: table.times(job.job_id),
        lambda table, _: table.of_request("alice", "r"),
    ],
)
@pytest.mark.parametrize("is_removed", [False, True])
def test_reader_misses_nothing_that_is_written_meanwhile(
    read: Callable[[JobTable, Job], object], is_removed: bool
) -> None:
    """An end or a removal that is written between a reader's query and its answer counts."""
    with _Interrupted() as store:
        table = JobTable(store)
        job = _begin(table, _WORK._replace(request_id="r", digest=b"d"))
        with _read_only(table):
            _end(table, job)
            if is_removed:
                table.delete(job.job_id)
        store.then = table.catch_up
        answer = read(table, job)
        assert table._unwritten == {}
        assert answer == read(table, job)


def test_damaged_row_is_told(table: JobTable) -> None:
    """The error names the job and the remedy."""
    job = _begin(table)
    table._store.execute("UPDATE jobs SET start = '{}'")
    with pytest.raises(StoreError, match=f"damaged row of job '{job.job_id}'.*restore the store"):
        table.get(job.job_id)


_MANY = """
import gc, sys, uuid
from datetime import UTC, datetime
from ending import Ending
from jobstate import Work
from jobtable import JobTable
from limits import Limits
from outputstate import OutputState
from store import Store

def memory():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096

argv, labels = ["sh", "-c", "echo hello world"], {"team": "data"}
work = Work(argv, "alice", None, Limits(), None, None, "/", "nightly", labels, Ending())

def add(table, count):
    for _ in range(count):
        job_id = str(uuid.uuid4())
        table.begin(job_id, work, limits=work.limits, started_at=datetime.now(UTC))
    table.end_lost(lambda _: OutputState(5, taken=5))

with Store(sys.argv[1]) as store:
    table = JobTable(store)
    add(table, 100)
    before = memory()
    for _ in range(100):
        add(table, 100)
    table.page(most=100)
    print(table.amounts()[0][1], memory() - before)
"""


def test_finished_jobs_take_no_memory(tmp_path: Path) -> None:
    """10,000 more of them take less than 5 MiB, which is what SQLite caches of its file."""
    run = [sys.executable, "-S", "-c", _MANY, str(tmp_path / "store")]
    count, size = subprocess.check_output(run, cwd=_HERE, text=True, timeout=GUARD_S).split()
    assert int(count) == 10_100
    assert int(size) < 5 * 1024 * 1024
