"""Tests of jobs that outlive their worker: whole workers, with and without cgroups.

`test_takeover.py` has the tests of the fork server alone, `test_crashes.py` those of servers that
are killed at random.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cgroups
from errors import TakeoverError, WorkerClosedError
from privileges import can_change_user
from slurm import SlurmSettings
from slurmworker import SlurmWorker
from store import Store
from testkit import (
    GUARD_S,
    await_output,
    descriptors_of,
    hold_executions,
    kill_with_children,
    notice_close,
    refuse_call,
)
from worker import (
    Ending,
    EndReason,
    InputError,
    Job,
    Limits,
    OutputLeftError,
    Retention,
    Status,
    Worker,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from budget import Budget

_HERE = Path(__file__).resolve().parent
_FOREVER_S = 1e6


def maker(kind: Any) -> Callable[..., Worker]:
    """Return what makes a worker with this enforcement, or of the cluster of this slurm.conf."""
    if kind in {"auto", "off"}:
        return functools.partial(Worker, enforcement=kind)
    limits = Limits(memory_bytes=64 << 20)
    return functools.partial(SlurmWorker, SlurmSettings(kind), "house", limits=limits)


class _House:
    """Workers of one store, one after the other. `kind`: see `maker`."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        self.kind = kind
        self.store: Store | None = None
        self.worker: Worker | None = None
        self.fork_servers: set[int] = set()

    def open(self, window_s: float = _FOREVER_S, *, resumes: bool = True) -> Worker:
        """Make the next worker."""
        self.store = Store(self.directory / "store")
        try:
            self.worker = maker(self.kind)(
                store=self.store,
                output_dir=self.directory / "output",
                tmp_dir=self.directory / "tmp",
                restart_dir=self.directory / "restart",
                restart_window=window_s,
                retention=Retention(),
            )
        except BaseException:
            self.store.close()
            raise
        self.fork_servers.add(self.worker._spawner.pid)
        if resumes:
            self.worker.resume()
        return self.worker

    def leave(self) -> None:
        assert self.worker is not None
        assert self.store is not None
        self.worker.leave()
        self.worker.close()  # as at the end of a `with`: it changes nothing any more
        self.store.close()
        own = cgroups._own_cgroup(cgroups._cgroup2_mounts())
        if own is not None and own.name == "main":
            # A main process that leaves then ends. This one at least leaves the leaf, for which
            # every other worker on the host would wait at its start.
            (own.parent.parent / "cgroup.procs").write_text("0")

    def again(self, window_s: float = _FOREVER_S) -> Worker:
        """Leave the worker, and make the next one."""
        self.leave()
        return self.open(window_s)

    def kill_fork_servers(self) -> None:
        while self.fork_servers:
            kill_with_children(self.fork_servers.pop())

    def close(self) -> None:
        if self.worker is not None and self.store is not None:
            self.worker.close()
            self.store.close()
        for pid in self.fork_servers:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have each test of a house run with cgroups and without, or with `--slurm` on a cluster."""
    if "house" in metafunc.fixturenames:
        kinds = ["cluster"] if metafunc.config.getoption("--slurm") else ["auto", "off"]
        metafunc.parametrize("house", kinds, indirect=True)


@pytest.fixture
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_House]:
    """Workers with cgroups, if the host has them, or without, or of a cluster."""
    kind = request.param
    if kind == "cluster":
        kind = str(request.getfixturevalue("cluster").conf)
    descriptors, threads = descriptors_of(), threading.active_count()
    made = _House(tmp_path, kind)
    yield made
    made.close()
    assert set(descriptors_of()) <= set(descriptors)
    assert threading.active_count() == threads


def _wait_on(fifo: Path) -> str:
    os.mkfifo(fifo)
    return f"read x <{fifo}"


def test_job_output_and_end_are_those_of_a_job_that_was_never_left(
    house: _House, tmp_path: Path
) -> None:
    """It writes before, meanwhile and afterwards; it ends by itself."""
    worker = house.open()
    waits = _wait_on(tmp_path / "fifo")
    script = f"echo before; {waits}; echo after; exit 4"
    job_id = worker.start("sh", ["-c", script], owner="alice", name="n", labels={"a": "b"})
    await_output(worker, job_id, b"before\n")
    before = worker.status(job_id)
    worker = house.again()
    now = worker.status(job_id)
    assert (now.status, now.owner, now.name, now.labels) == (
        Status.RUNNING,
        "alice",
        "n",
        {"a": "b"},
    )
    assert (now.args, now.started_at, now.output_bytes) == (before.args, before.started_at, 7)
    (tmp_path / "fifo").write_text("\n")
    job = worker.wait(job_id, GUARD_S)
    assert (job.status, job.end_reason, job.exit_code) == (Status.FINISHED, EndReason.EXITED, 4)
    assert not job.may_have_escaped
    assert b"".join(worker.stream(job_id)) == b"before\nafter\n"
    assert [each.job_id for each in worker.list()] == [job_id]


def test_job_that_ended_without_a_worker_has_its_true_end(house: _House, tmp_path: Path) -> None:
    """Exit code and signal; the time is that of the end, not that of the next start."""
    worker = house.open()
    # One each: a reader that finds the line taken by the other would go on without one.
    fifos = tmp_path / "first", tmp_path / "second"
    waits, also_waits = map(_wait_on, fifos)
    exits = worker.start("sh", ["-c", f"{waits}; echo out; exit 4"])
    dies = worker.start("sh", ["-c", f"{also_waits}; kill -TERM $$"])
    house.leave()
    for fifo in fifos:
        fifo.write_text("\n")
    fork_server = house.fork_servers.copy().pop()
    while any(_lives(fork_server)):  # each pass waits for an event
        pass
    ended_by = time.time()
    worker = house.open()
    job = worker.wait(exits, GUARD_S)
    assert (job.exit_code, job.ended_at is not None) == (4, True)
    assert job.ended_at is not None
    assert job.ended_at.timestamp() <= ended_by
    assert b"".join(worker.stream(exits)) == b"out\n"
    assert worker.wait(dies, GUARD_S).signal == signal.SIGTERM


def _lives(parent: int) -> Iterator[bool]:
    """Yield once for each child that lives, when it has ended."""
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(int(pid))) as pidfd:
            import select

            select.select([pidfd], [], [], GUARD_S)
            yield True


def test_jobs_survive_many_workers(house: _House) -> None:
    """The bytes of a job that writes all the time are all there, in order."""
    worker = house.open()
    script = "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done"
    job_id = worker.start("sh", ["-c", script])
    for _ in range(5):
        worker = house.again()
    assert worker.wait(job_id, GUARD_S).exit_code == 0
    expected = "".join(f"{i}\n" for i in range(20000)).encode()
    assert b"".join(worker.stream(job_id)) == expected


def test_input_goes_on_at_the_byte_that_the_job_has_got(house: _House) -> None:
    """The job reads end-of-file when the input is ended, and not when a worker ends."""
    worker = house.open()
    job_id = worker.start("cat", stdin=True)
    assert worker.write_input(job_id, b"one ") == 4
    with worker.open_input(job_id) as writer:
        house.leave()
        with pytest.raises(WorkerClosedError):
            writer.write(b"lost")
    worker = house.open()
    assert worker.status(job_id).input_bytes == 4
    assert worker.write_input(job_id, b"two ", offset=4) == 8
    worker = house.again()
    assert worker.write_input(job_id, b"three", offset=8, end=True) == 13
    job = worker.wait(job_id, GUARD_S)
    assert (job.exit_code, job.input_bytes, job.input_ended) == (0, 13, True)
    assert b"".join(worker.stream(job_id)) == b"one two three"


def test_ended_input_is_ended_for_the_next_worker(house: _House) -> None:
    """It says how many bytes the job has got."""
    worker = house.open()
    job_id = worker.start("sh", ["-c", "cat; echo; exec sleep infinity"], stdin=True)
    worker.write_input(job_id, b"all", end=True)
    await_output(worker, job_id, b"all\n")
    worker = house.again()
    job = worker.status(job_id)
    assert (job.input_bytes, job.input_ended) == (3, True)
    with pytest.raises(InputError, match="its input was ended"):
        worker.open_input(job_id)


def test_input_whose_job_ended_meanwhile_is_over(house: _House, tmp_path: Path) -> None:
    """Its status has the bytes that the job had got."""
    worker = house.open()
    waits = _wait_on(tmp_path / "fifo")
    job_id = worker.start("sh", ["-c", f"{waits}; head -c 3"], stdin=True)
    worker.write_input(job_id, b"enough")
    house.leave()
    (tmp_path / "fifo").write_text("\n")
    worker = house.open()
    job = worker.wait(job_id, GUARD_S)
    assert (job.exit_code, job.input_bytes, job.input_ended) == (0, 6, True)
    assert b"".join(worker.stream(job_id)) == b"eno"


def test_start_that_has_begun_goes_on_when_its_worker_is_left(
    house: _House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither refused nor killed: the next worker has the job."""
    worker = house.open()
    executed, goes_on = hold_executions(monkeypatch)
    closing = notice_close(worker, monkeypatch)
    started: list[str] = []
    start = threading.Thread(target=lambda: started.append(worker.start("sleep", ["infinity"])))
    start.start()
    assert executed.wait(GUARD_S)
    leave = threading.Thread(target=house.leave)
    leave.start()
    assert closing.wait(GUARD_S)
    goes_on.set()
    start.join(GUARD_S)
    leave.join(GUARD_S)
    worker = house.open()
    assert worker.status(started[0]).status is Status.RUNNING


def test_reader_and_waiter_are_told_that_the_worker_is_left(house: _House) -> None:
    """The reader has got all bytes by then, so it can continue with the next worker."""
    worker = house.open()
    job_id = worker.start("sh", ["-c", "echo hello; exec sleep infinity"])
    stream = worker.stream(job_id)
    assert next(stream) == b"hello\n"
    raised: list[BaseException] = []

    def expect(call: Callable[[], object]) -> None:
        try:
            call()
        except (OutputLeftError, WorkerClosedError) as error:
            raised.append(error)

    waits = [threading.Thread(target=expect, args=(lambda: next(stream),))]
    waits.append(threading.Thread(target=expect, args=(lambda: worker.wait(job_id),)))
    for thread in waits:
        thread.start()
    house.leave()
    for thread in waits:
        thread.join(GUARD_S)
    assert {type(error) for error in raised} == {OutputLeftError, WorkerClosedError}
    worker = house.open()
    with worker.stream(job_id, offset=6) as rest:
        worker.stop(job_id)
        assert b"".join(rest) == b""
    assert worker.status(job_id).end_reason is EndReason.STOPPED


@pytest.mark.parametrize("years", [-30, 30])
def test_step_of_the_clock_between_two_workers_changes_no_times(
    house: _House, years: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's duration and its timeout are measured by a clock without steps."""
    worker = house.open()
    job_id = worker.start("sleep", ["infinity"], ending=Ending(timeout=3600, grace=0))
    short_id = worker.start("sleep", ["infinity"], ending=Ending(timeout=0.2, grace=0))
    house.leave()
    now = datetime.now(UTC) + timedelta(days=365 * years)
    clock = type("_Clock", (datetime,), {"now": lambda _: now})
    for module in ("starting", "jobtable"):
        monkeypatch.setattr(f"{module}.datetime", clock)
    worker = house.open()
    assert worker.wait(short_id, GUARD_S).end_reason is EndReason.TIMED_OUT
    assert worker.status(job_id).status is Status.RUNNING
    for job in (worker.stop(job_id), worker.status(short_id)):
        assert job.ended_at is not None
        assert timedelta(0) <= job.ended_at - job.started_at < timedelta(seconds=GUARD_S)


def test_timeout_goes_on_from_the_start_of_the_job(house: _House) -> None:
    """Although no worker was there when it was over."""
    worker = house.open()
    job_id = worker.start("sleep", ["infinity"], ending=Ending(timeout=0.2, grace=0))
    house.leave()
    worker = house.open()
    job = worker.wait(job_id, GUARD_S)
    assert (job.status, job.end_reason) == (Status.STOPPED, EndReason.TIMED_OUT)


def test_grace_of_a_stop_goes_on(house: _House) -> None:
    """A job that ignores SIGTERM is killed, and was stopped for the reason that was given."""
    worker = house.open()
    script = "trap 'echo; echo term' TERM; echo ready; while :; do sleep 0.1; done"
    job_id = worker.start("sh", ["-c", script])
    await_output(worker, job_id, b"ready\n")

    def stop() -> None:
        with contextlib.suppress(WorkerClosedError):
            worker.stop(job_id, reason="r", grace=0.5)

    stops = threading.Thread(target=stop)
    stops.start()
    await_output(worker, job_id, b"\nterm\n")
    house.leave()
    stops.join(GUARD_S)
    worker = house.open()
    ended = worker.wait(job_id, GUARD_S)
    assert (ended.end_reason, ended.stop_reason) == (EndReason.STOPPED, "r")


@pytest.mark.parametrize("character", ["x", "\U0001f40c"])
def test_long_reason_of_a_stop_costs_no_other_job(house: _House, character: str) -> None:
    """A successor is told its beginning; the worker that stops the job keeps all of it."""
    worker = house.open()
    other = worker.start("sleep", ["infinity"])
    script = "trap 'echo; echo term' TERM; echo ready; while :; do sleep 0.1; done"
    job_id = worker.start("sh", ["-c", script])
    await_output(worker, job_id, b"ready\n")
    reason = character * 5000

    def stop() -> None:
        with contextlib.suppress(WorkerClosedError):
            worker.stop(job_id, reason=reason, grace=3600)

    stops = threading.Thread(target=stop)
    stops.start()
    await_output(worker, job_id, b"\nterm\n")
    house.leave()
    stops.join(GUARD_S)
    worker = house.open()
    assert worker.stop(job_id).stop_reason == character * 256
    assert worker.stop(other, reason=reason).stop_reason == reason


# A job tells the errno of a splice between two pipes of its own, by the number of each ABI.
_SPLICES = """
import ctypes, os, sys
full, fill = os.pipe()
os.write(fill, b"x")
_, into = os.pipe()
libc = ctypes.CDLL(None, use_errno=True)
for number in map(int, sys.argv[1:]):
    moved = libc.syscall(ctypes.c_long(number), full, None, into, None, 1, 0)
    print(moved if moved >= 0 else ctypes.get_errno())
status = open("/proc/self/status").read()
print("filters", status.partition("Seccomp_filters:")[2].split()[0])
"""
_TEE_AND_SPLICES = {"x86_64": (276, 275, 0x4000_0000 | 275), "aarch64": (77, 76)}


@pytest.mark.skipif(os.uname().machine not in _TEE_AND_SPLICES, reason="other numbers")
def test_jobs_cannot_splice_where_the_service_cannot_tee(
    house: _House, caplog: pytest.LogCaptureFixture
) -> None:
    """The service still can, which moves the output. A successor's jobs have the same filters."""
    tee, *splices = _TEE_AND_SPLICES[os.uname().machine]
    argv = ["-c", _SPLICES, *map(str, splices)]

    def probe(worker: Worker) -> list[bytes]:
        return b"".join(worker.stream(worker.start(sys.executable, argv))).splitlines()

    def compare() -> None:
        assert probe(house.open())[0] == b"1"
        house.close()
        refuse_call(tee, errno.EPERM)
        worker = house.open()
        refused = probe(worker)
        assert refused[:-1] == [b"%d" % errno.EINVAL] * len(splices)
        # A job that goes on has the next worker take over this fork server.
        worker.start("sleep", ["1000"])
        assert probe(house.again()) == refused

    # A filter belongs to a thread, and to what the thread starts.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(compare).result()
    assert "does not splice" not in caplog.text


def test_descriptor_that_a_hanging_thread_waits_on_stays_open(
    house: _House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise another file of this process could get its number."""
    monkeypatch.setattr("parts._LEAVE_S", 0)
    worker = house.open()
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        goes_on.wait()

    job_id = worker.start("true", on_end=hang)
    assert hangs.wait(GUARD_S)
    keeper = worker._parts.keeper
    assert keeper is not None
    worker.leave()
    try:
        os.fstat(keeper.leave_fd)
    finally:
        goes_on.set()
        worker.wait(job_id, GUARD_S)
    keeper.close()
    house.again()  # ends the fork server, which has not heard that the job has ended


def test_window_needs_root_for_jobs_as_other_users(tmp_path: Path) -> None:
    """A main process without capabilities could have the fork server execute its own program."""
    if os.getuid() or not can_change_user():
        pytest.skip("needs root")
    os.setresuid(65534, 0, 0)  # it keeps all capabilities
    try:
        with (
            Store(tmp_path / "store") as store,
            pytest.raises(PermissionError, match="start as root, or without a window"),
        ):
            Worker(
                uids=range(76000, 76010),
                store=store,
                restart_dir=tmp_path / "restart",
                restart_window=1,
            )
    finally:
        os.setresuid(0, 0, 0)


def test_when_the_window_is_over_the_next_worker_knows_how_each_job_ended(
    house: _House, tmp_path: Path
) -> None:
    """Killed jobs are CLOSED; one that had ended before has its own end."""
    worker = house.open(window_s=0.01)
    waits = _wait_on(tmp_path / "fifo")
    killed = worker.start("sh", ["-c", f"echo out; {waits}"])
    await_output(worker, killed, b"out\n")
    house.leave()
    for pid in house.fork_servers:
        os.waitpid(pid, 0)
    house.fork_servers.clear()
    worker = house.open()
    job = worker.wait(killed, GUARD_S)
    assert (job.status, job.end_reason) == (Status.STOPPED, EndReason.CLOSED)
    assert b"".join(worker.stream(killed)) == b"out\n"


def test_worker_that_leaves_waits_for_no_start_that_the_kernel_holds_up(
    house: _House,
    leased: tuple[Path, Callable[[], object]],
    lease_is_asked_for: Callable[[], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or else a user with a lease could hold up each restart. The start is ended after a second."""
    monkeypatch.setattr("starting._START_TIMEOUT_S", GUARD_S)
    monkeypatch.setattr("starting._LEAVE_S", 0.1)
    worker = house.open()
    with ThreadPoolExecutor() as pool:
        start = pool.submit(worker.start, str(leased[0]))
        assert lease_is_asked_for()
        house.again()
        with pytest.raises(WorkerClosedError):
            start.result(0)


def test_fork_server_that_was_killed_too_leaves_lost_jobs(house: _House) -> None:
    """Nobody knows how they ended. Their output is there."""
    worker = house.open()
    job_id = worker.start("sh", ["-c", "echo out; exec sleep infinity"])
    await_output(worker, job_id, b"out\n")
    house.leave()
    house.kill_fork_servers()
    worker = house.open()
    job = worker.wait(job_id, GUARD_S)
    assert (job.status, job.end_reason) == (Status.FINISHED, EndReason.LOST)
    assert b"".join(worker.stream(job_id)) == b"out\n"


@pytest.mark.parametrize("window_s", [_FOREVER_S, 0])
def test_store_that_was_restored_without_the_output_is_served(
    house: _House, window_s: float
) -> None:
    """A job that ran when the store was copied is LOST, and nothing of its output is there."""
    worker = house.open()
    job_id = worker.start("sh", ["-c", "echo out; exec sleep infinity"])
    await_output(worker, job_id, b"out\n")
    house.leave()
    house.kill_fork_servers()
    for file in (house.directory / "output").iterdir():
        file.unlink()
    worker = house.open(window_s)
    assert worker.wait(job_id, GUARD_S).end_reason is EndReason.LOST
    assert list(worker.stream(job_id)) == []


def test_budget_and_end_of_a_job_are_those_that_the_next_worker_gives(house: _House) -> None:
    """What is stored counts; the function is called once, before the end is known."""
    from budget import Budget

    worker = house.open()
    job_id = worker.start("sh", ["-c", "echo out; exec sleep infinity"], owner="alice")
    await_output(worker, job_id, b"out\n")
    house.leave()
    worker = house.open(resumes=False)
    budget, ended, seen = Budget(100, "a ceiling"), [], []

    def terms(job: Job) -> tuple[Budget, Callable[[], None]]:
        seen.append((job.job_id, job.owner))
        return budget, lambda: ended.append(worker.status(job_id).status)

    worker.resume(terms)
    assert (seen, budget.used, ended) == ([(job_id, "alice")], 4, [])
    worker.stop(job_id)
    assert ended == [Status.RUNNING]


def test_worker_without_a_window_takes_over_too_and_ends_the_jobs_with_itself(
    house: _House,
) -> None:
    """So an operator can give up the window without losing a job at that moment."""
    worker = house.open()
    job_id = worker.start("sleep", ["infinity"])
    worker = house.again(window_s=0)
    assert worker.status(job_id).status is Status.RUNNING
    worker.close()
    assert house.store is not None
    house.store.close()
    worker = house.open()
    assert worker.status(job_id).end_reason is EndReason.CLOSED


def test_other_settings_are_refused_and_nothing_is_lost(house: _House, tmp_path: Path) -> None:
    """The error says what to do; the former settings can take over afterwards."""
    worker = house.open()
    job_id = worker.start("sleep", ["infinity"])
    house.leave()
    error = pytest.raises(TakeoverError, match="start with the former settings, or end these jobs")
    with Store(tmp_path / "store") as store, error:
        maker(house.kind)(
            store=store,
            output_dir=tmp_path / "output",
            tmp_dir=tmp_path / "elsewhere",
            restart_dir=tmp_path / "restart",
        )
    worker = house.open()
    assert worker.status(job_id).status is Status.RUNNING


def test_worker_that_cannot_be_made_leaves_the_jobs_to_the_next(
    house: _House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error after the takeover costs neither a job nor its TMPDIR."""
    script = "echo x >$TMPDIR/file; echo ready; exec sleep infinity"
    worker = house.open()
    job_id = worker.start("sh", ["-c", script])
    await_output(worker, job_id, b"ready\n")
    house.leave()

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr("parts.Spares", fail)
        with pytest.raises(OSError, match="Too many open files"):
            house.open()
    worker = house.open()
    assert worker.status(job_id).status is Status.RUNNING
    assert (house.directory / "tmp" / job_id / "file").exists()


def test_tmpdir_of_a_job_stays_until_the_job_has_ended(house: _House, tmp_path: Path) -> None:
    """The next worker removes those of jobs that it does not know."""
    worker = house.open()
    waits = _wait_on(tmp_path / "fifo")
    script = f"echo x >$TMPDIR/file; echo ready; {waits}; cat $TMPDIR/file"
    job_id = worker.start("sh", ["-c", script])
    await_output(worker, job_id, b"ready\n")
    worker = house.again()
    (tmp_path / "fifo").write_text("\n")
    worker.wait(job_id, GUARD_S)
    assert b"".join(worker.stream(job_id)) == b"ready\nx\n"
    assert not (tmp_path / "tmp" / job_id).exists()


_KILLED = """
import os, sys, time
from store import Store
from test_restart import maker
d, kind = sys.argv[1:]
worker = maker(kind)(
    store=Store(d + "/store"), output_dir=d + "/output",
    tmp_dir=d + "/tmp", restart_dir=d + "/restart", restart_window=1e6,
)
worker.resume()
script = "i=0; while [ $i -lt 30000 ]; do echo $i; i=$((i+1)); done; exit 9"
print(worker.start("sh", ["-c", script]), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("killed_after", [0, 1000, 60_000])
def test_killed_process_loses_no_byte_and_no_end(
    house: _House, tmp_path: Path, killed_after: int
) -> None:
    """SIGKILL at any moment: the next worker has every byte once."""
    command = [sys.executable, "-c", _KILLED, str(tmp_path), house.kind]
    with subprocess.Popen(
        command, cwd=_HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        job_id = process.stdout.readline().strip()
        output = tmp_path / "output" / f"{job_id}.out"
        while output.stat().st_size < killed_after:
            pass
        process.kill()
    worker = house.open()
    job = worker.wait(job_id, GUARD_S)
    assert (job.end_reason, job.exit_code) == (EndReason.EXITED, 9)
    expected = "".join(f"{i}\n" for i in range(30000)).encode()
    assert b"".join(worker.stream(job_id)) == expected
