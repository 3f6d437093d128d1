"""Tests of the worker and the server on a real kernel: limits that are felt, jobs that do
not get away, and nothing left behind.

Every process of a job may hold a FIFO that the test reads; end-of-file on that proves
that all of them are dead.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cgroups import CgroupError, Limits, _physical_disks, _wait_event
from conftest import GUARD_S, own_cgroup
from spawner import Spawner
from worker import CommandNotFoundError, EndReason, Status, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import ServerProgram

pytestmark = pytest.mark.kernel

_HERE = Path(__file__).parent
_MIB = 1024 * 1024
_FOREVER = ["-c", "exec sleep infinity"]


@pytest.fixture
def worker(base: Path) -> Iterator[Worker]:
    """A worker that fails rather than go without a limit."""
    with Worker(enforcement="require", cgroup_root=base) as worker:
        yield worker


def _cgroup(worker: Worker, job_id: str) -> Path:
    assert worker._subtree
    return worker._subtree.jobs / job_id


def _top(worker: Worker) -> Path:
    """Where the cgroup hierarchy is mounted."""
    assert worker._subtree
    return worker._subtree.path.parent.parent


def _output(worker: Worker, job_id: str) -> bytes:
    """Block until the job has ended; all it has written."""
    with worker.stream(job_id) as chunks:
        return b"".join(chunks)


def _await_output(worker: Worker, job_id: str, text: bytes) -> None:
    """Block until the job has written `text`."""
    output = b""
    with worker.stream(job_id) as chunks:
        for chunk in chunks:
            output += chunk
            if text in output:
                return
    pytest.fail(f"the job ended without writing {text!r}: {output!r}")


def _counters(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {key: int(value) for key, value in lines}


def _pause(worker: Worker, job_id: str, seconds: float) -> None:
    """Let a job run for some time, which it must not end in."""
    with pytest.raises(TimeoutError):
        worker.wait(job_id, seconds)


class _Escapees:
    """A script that tries to get away, and the FIFO that every process of it holds."""

    _COUNT = 6

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        up = "echo up >&9"
        self.script = f"""
            exec 9>'{path}'
            setsid sh -c '{up}; exec sleep infinity' &
            (setsid sh -c '{up}; (sleep infinity &) ; exec sleep infinity' &)
            sh -c '{up}; kill -STOP $$' &
            sh -c 'exec <&- >&- 2>&-; {up}; exec sleep infinity' &
            sh -c 'trap "" TERM INT HUP; {up}; while :; do sleep 1; done' &
            {up}
            """

    def await_up(self, jobs: int = 1) -> None:
        """Block until every process of so many jobs is at large."""
        lines = b""
        while lines.count(b"\n") < self._COUNT * jobs:
            assert select.select([self._fd], [], [], GUARD_S)[0]
            lines += os.read(self._fd, 4096)

    def are_dead(self) -> bool:
        """Whether no process has the FIFO open, at this moment."""
        try:
            return os.read(self._fd, 1) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def escapees(tmp_path: Path) -> Iterator[_Escapees]:
    escapees = _Escapees(tmp_path / "fifo")
    yield escapees
    escapees.close()


# --- membership and limits --------------------------------------------------------------------


def test_job_is_in_its_cgroup_from_its_first_instruction(worker: Worker) -> None:
    """Of 100 jobs whose only act is to tell where they are, none is elsewhere."""
    jobs = [worker.start("cat", ["/proc/self/cgroup"]) for _ in range(100)]
    outside = {
        job: output
        for job in jobs
        if not (output := _output(worker, job)).endswith(f"/jobs/{job}\n".encode())
    }
    assert not outside


def test_limits_are_written_before_the_command_runs(worker: Worker) -> None:
    """What a job reads in its own cgroup first of all are its limits."""
    script = 'cd "$0/$(sed -n s/^0::.//p /proc/self/cgroup)" && cat cpu.max memory.max pids.max'
    limits = Limits(0.5, 64 * _MIB, 0, _MIB, _MIB, 9)
    job = worker.start("sh", ["-c", script, str(_top(worker))], limits=limits)
    assert _output(worker, job) == f"50000 100000\n{64 * _MIB}\n9\n".encode()


def test_every_limit_is_in_force_and_told(worker: Worker) -> None:
    """A running job's cgroup has all the limits, and its status shows them."""
    limits = Limits(0.5, 64 * _MIB, 0, 2 * _MIB, 3 * _MIB, 9)
    job = worker.start("sh", _FOREVER, limits=limits)
    path = _cgroup(worker, job)
    assert worker.status(job).limits == limits
    assert (path / "cpu.max").read_text() == "50000 100000\n"
    assert (path / "memory.max").read_text() == f"{64 * _MIB}\n"
    assert (path / "memory.oom.group").read_text() == "1\n"
    assert (path / "pids.max").read_text() == "9\n"
    disks = (path / "io.max").read_text().splitlines()
    assert disks
    assert all(f"rbps={2 * _MIB} wbps={3 * _MIB}" in disk for disk in disks)
    assert (path / "cgroup.procs").read_text()


def test_default_limits_are_in_force(worker: Worker) -> None:
    """A job started without limits of its own has the defaults, none of them missing."""
    assert worker.status(worker.start("sh", _FOREVER)).limits == Limits()


def test_cpu_limit_is_felt(worker: Worker) -> None:
    """A busy loop under a limit of 0.2 cores uses that and no more."""
    job = worker.start("sh", ["-c", "while :; do :; done"], limits=Limits(cpu_cores=0.2))
    stat = _cgroup(worker, job) / "cpu.stat"
    before, began = _counters(stat), time.monotonic()
    _pause(worker, job, 5)
    after, took_s = _counters(stat), time.monotonic() - began
    used = (after["usage_usec"] - before["usage_usec"]) / 1e6 / took_s
    assert used == pytest.approx(0.2, abs=0.05)
    assert after["nr_throttled"] > before["nr_throttled"]


@pytest.mark.parametrize(
    "script", ["exec tail /dev/zero", "tail /dev/zero; echo survived"], ids=["leader", "child"]
)
def test_memory_limit_is_felt(worker: Worker, script: str) -> None:
    """A job over its memory limit is killed whole, and out of memory is why it ended."""
    limits = Limits(memory_bytes=50 * _MIB)
    job = worker.wait(worker.start("sh", ["-c", script], limits=limits), GUARD_S)
    assert (job.status, job.end_reason) == (Status.FINISHED, EndReason.OUT_OF_MEMORY)
    assert (job.exit_code, job.signal) == (None, signal.SIGKILL)
    assert job.output_bytes == 0


def test_job_below_its_memory_limit_is_left_alone(worker: Worker) -> None:
    """What fits into the limit ends by itself."""
    script = "head -c 20M /dev/zero | tail | wc -c"
    job = worker.start("sh", ["-c", script], limits=Limits(memory_bytes=50 * _MIB))
    assert _output(worker, job) == f"{20 * _MIB}\n".encode()
    assert worker.wait(job).end_reason is EndReason.EXITED


@pytest.mark.parametrize(
    ("script", "reason", "exit_code", "number"),
    [
        ("exit 137", EndReason.EXITED, 137, None),
        ("kill -KILL $$", EndReason.SIGNALLED, None, signal.SIGKILL),
    ],
)
def test_only_the_kernel_says_out_of_memory(
    worker: Worker, script: str, reason: EndReason, exit_code: int | None, number: int | None
) -> None:
    """An exit code of 137 or a SIGKILL by somebody else is told as what it is."""
    job = worker.wait(worker.start("sh", ["-c", script]), GUARD_S)
    assert (job.end_reason, job.exit_code, job.signal) == (reason, exit_code, number)


def test_pressing_against_the_memory_limit_is_not_out_of_memory(worker: Worker) -> None:
    """A job that the kernel only took page cache from, and somebody then killed, was SIGNALLED."""
    numbers = _physical_disks()[0]
    uevent = Path("/sys/dev/block", numbers, "uevent").read_text()
    (disk,) = [each[8:] for each in uevent.splitlines() if each.startswith("DEVNAME=")]
    script = f"head -c 60M /dev/{disk} | wc -c; exec sleep infinity"
    limits = Limits(None, 20 * _MIB, None, None, None, None)
    job = worker.start("sh", ["-c", script], limits=limits)
    _await_output(worker, job, b"%d\n" % (60 * _MIB))
    assert _counters(_cgroup(worker, job) / "memory.events")["max"] > 0
    os.kill(worker._job(job)._pid, signal.SIGKILL)
    assert worker.wait(job, GUARD_S).end_reason is EndReason.SIGNALLED


def test_stop_after_a_process_ran_out_of_memory_is_a_stop(worker: Worker) -> None:
    """What our stop ended is STOPPED, although the kernel had to kill a process of it before."""
    # The greedy one is in a cgroup below the job's, with a lower limit of its own.
    script = """
        cd "$0/$(sed -n s/^0::.//p /proc/self/cgroup)" && mkdir leader greedy &&
        echo $$ >leader/cgroup.procs && echo +memory >cgroup.subtree_control &&
        echo 20M >greedy/memory.max || exit
        sh -c 'echo 0 >greedy/cgroup.procs; exec tail /dev/zero'
        echo one is dead; exec sleep infinity"""
    job = worker.start("sh", ["-c", script, str(_top(worker))])
    _await_output(worker, job, b"one is dead\n")
    assert worker._job(job)._cgroup.oom_kills() >= 1  # type: ignore[union-attr]
    ended = worker.stop(job)
    assert (ended.status, ended.end_reason) == (Status.STOPPED, EndReason.STOPPED_BY_OWNER)


def test_process_limit_is_felt(worker: Worker) -> None:
    """At its limit a job cannot fork; other jobs and its own stop do not notice."""
    script = "(while :; do sleep infinity & done) 2>&1; exec sleep infinity"
    job = worker.start("sh", ["-c", script], limits=Limits(pids=10))
    _await_output(worker, job, b"fork")
    path = _cgroup(worker, job)
    assert _counters(path / "pids.events")["max"] >= 1
    assert int((path / "pids.current").read_text()) <= 10
    assert worker.wait(worker.start("true"), GUARD_S).exit_code == 0
    assert worker.stop(job).status is Status.STOPPED
    assert not path.exists()


# --- escapees ---------------------------------------------------------------------------------


def test_stop_reaches_every_escapee(worker: Worker, escapees: _Escapees) -> None:
    """When stop returns nothing of the job lives: setsid, double fork, SIGSTOP, closed output."""
    job = worker.start("sh", ["-c", escapees.script + "exec sleep infinity"])
    escapees.await_up()
    path = _cgroup(worker, job)
    assert worker.stop(job).status is Status.STOPPED
    assert escapees.are_dead()
    assert not path.exists()


def test_leaders_exit_ends_every_escapee(
    worker: Worker, escapees: _Escapees, tmp_path: Path
) -> None:
    """When a job has FINISHED by itself nothing that it started lives."""
    go = tmp_path / "go"
    os.mkfifo(go)
    job = worker.start("sh", ["-c", f"{escapees.script} read x <'{go}'; exit 3"])
    escapees.await_up()
    go.write_text("\n")
    ended = worker.wait(job, GUARD_S)
    assert (ended.status, ended.exit_code) == (Status.FINISHED, 3)
    assert escapees.are_dead()
    assert not _cgroup(worker, job).exists()


def test_close_leaves_nothing(base: Path, escapees: _Escapees) -> None:
    """A worker that closes while jobs run leaves no process, no cgroup and no thread."""
    threads = threading.active_count()
    before = own_cgroup()
    with Worker(enforcement="require", cgroup_root=base) as worker:
        for _ in range(3):
            worker.start("sh", ["-c", escapees.script + "exec sleep infinity"])
        escapees.await_up(3)
    assert escapees.are_dead()
    assert not [each for each in base.iterdir() if each.is_dir()]
    assert (threading.active_count(), own_cgroup()) == (threads, before)


# --- failing closed ---------------------------------------------------------------------------


def _held(worker: Worker | None = None) -> tuple[object, ...]:
    """What a failed start must give back."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    held = sorted(os.listdir("/proc/self/fd")), threading.active_count(), children, own_cgroup()
    if worker is None:
        return held
    cgroups = [each for each in _cgroup(worker, "").iterdir() if each.is_dir()]
    return *held, worker.list(), cgroups, os.listdir(worker._output_dir.path)


def test_worker_that_cannot_enforce_does_not_start(base: Path) -> None:
    """Under require a root without controllers is an error with a remedy; nothing is left."""
    bare = base / "bare"
    bare.mkdir()
    before = _held()
    with pytest.raises(CgroupError, match=r"controllers missing in .*/bare: .*; .*Delegate"):
        Worker(enforcement="require", cgroup_root=bare)
    assert _held() == before
    bare.rmdir()  # possible only when empty


def test_job_that_cannot_be_limited_does_not_run(worker: Worker, tmp_path: Path) -> None:
    """A limit that the kernel refuses fails the start before the command; nothing is left."""
    marker = tmp_path / "ran"
    before = _held(worker)
    with pytest.raises(CgroupError, match=r"pids\.max"):
        worker.start("touch", [str(marker)], limits=Limits(pids=2**40))
    assert _held(worker) == before
    assert not marker.exists()
    assert worker.wait(worker.start("touch", [str(marker)]), GUARD_S).exit_code == 0
    assert marker.exists()


def test_job_whose_cgroup_cannot_be_made_does_not_run(worker: Worker, tmp_path: Path) -> None:
    """Where no more cgroups are allowed the command is not executed; nothing is left."""
    marker = tmp_path / "ran"
    before = _held(worker)
    (_cgroup(worker, "") / "cgroup.max.descendants").write_text("0")
    with pytest.raises(CgroupError, match="cannot make ") as caught:
        worker.start("touch", [str(marker)])
    assert caught.value.remedy
    assert _held(worker) == before
    assert not marker.exists()


def test_job_that_cannot_enter_its_cgroup_does_not_run(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the new process cannot join its cgroup the command is not executed."""
    marker = tmp_path / "ran"
    spawn = Spawner.spawn

    def spawn_too_late(spawner: Spawner, job: str, *rest: Any, **options: Any) -> tuple[int, int]:
        _cgroup(worker, job).rmdir()
        return spawn(spawner, job, *rest, **options)

    monkeypatch.setattr(Spawner, "spawn", spawn_too_late)
    before = _held(worker)
    with pytest.raises(CgroupError, match=r"a new process cannot enter .*: No such device"):
        worker.start("touch", [str(marker)])
    assert _held(worker) == before
    assert not marker.exists()


def test_command_that_cannot_be_executed_leaves_no_cgroup(worker: Worker) -> None:
    """A command that does not exist has had a cgroup for a moment, which is gone."""
    before = _held(worker)
    with pytest.raises(CommandNotFoundError):
        worker.start("no-such-command")
    assert _held(worker) == before


# --- the death of the owner -------------------------------------------------------------------

_OWNER = """
import signal, sys
from pathlib import Path
from spawner import Spawner
from worker import Worker
root, script = sys.argv[1:]
Path(root, "cgroup.procs").write_text("0")
worker = Worker(enforcement="require")
for _ in range(5):
    worker.start("sh", ["-c", script])
signal.pause()
"""


def test_death_of_the_owner_leaves_nothing_running(base: Path, escapees: _Escapees) -> None:
    """SIGKILL of a program with 5 jobs ends them all; the next worker removes the cgroups."""
    script = escapees.script + "exec sleep infinity"
    with subprocess.Popen([sys.executable, "-c", _OWNER, base, script], cwd=_HERE) as owner:
        try:
            escapees.await_up(5)
        finally:
            owner.kill()
    assert _wait_event(base, "populated", "0", GUARD_S)
    assert escapees.are_dead()
    (left,) = [each for each in base.iterdir() if each.is_dir()]
    with Worker(enforcement="require", cgroup_root=base) as worker:
        assert not left.exists()
        assert worker.wait(worker.start("true"), GUARD_S).limits == Limits()


def test_death_of_the_server_leaves_nothing_running(
    base: Path,
    escapees: _Escapees,
    certs: Path,
    start_server: Callable[..., ServerProgram],
) -> None:
    """The same for the server itself, started with --limits require."""
    from client import Client

    options = ("--limits", "require", "--cgroup-root", str(base))
    server = start_server(*options)
    with Client(server.address, certs=certs) as client:
        client.login("user", "user")
        client.start("sh", ["-c", escapees.script + "exec sleep infinity"])
    escapees.await_up()
    server.process.kill()
    server.process.wait()
    assert _wait_event(base, "populated", "0", GUARD_S)
    assert escapees.are_dead()
    start_server(*options).end()
    assert not [each for each in base.iterdir() if each.is_dir()]
