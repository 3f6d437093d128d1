"""Tests of the worker and the server on a real kernel: limits have their effect, no process of a
job escapes, and nothing is left behind.

In some tests every process of a job holds a FIFO open for writing, and the test reads it.
End-of-file on the FIFO proves that all these processes are dead.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cgroupfs
from cgroupfs import CgroupError, wait_event
from cgroups import _physical_disks
from job import RunningJob
from limits import NO_LIMITS, Limits
from spawner import Process, Spawner
from store import Store
from testkit import (
    GUARD_S,
    SIGNALLED_TREE,
    WITHOUT_FIRST_THREAD,
    await_lines,
    await_output,
    discard_spares,
    job_cgroups,
    job_files,
    job_processes,
    make_fifo,
    own_cgroup,
    public_python,
    settle_spares,
)
from worker import (
    Bounds,
    CommandError,
    Ending,
    EndReason,
    ResourceError,
    StartTimeoutError,
    Status,
    Worker,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from testkit import ServerProgram

pytestmark = pytest.mark.kernel

_HERE = Path(__file__).parent
_MIB = 1024 * 1024
_FOREVER = ["-c", "exec sleep infinity"]
_SIGNALS = "HUP INT QUIT ILL TRAP ABRT BUS FPE USR1 SEGV USR2 PIPE ALRM TERM CHLD CONT TSTP TTIN"


@pytest.fixture
def worker(base: Path) -> Iterator[Worker]:
    """A worker that refuses to run a job without its limits."""
    with Worker(enforcement="require", cgroup_root=base) as worker:
        yield worker


def _cgroup(worker: Worker, job_id: str) -> Path:
    assert worker.subtree
    return worker.subtree.jobs / job_id


def _top(worker: Worker) -> Path:
    """Return the directory where the cgroup hierarchy is mounted."""
    assert worker.subtree
    return worker.subtree.path.parent.parent


def _output(worker: Worker, job_id: str) -> bytes:
    """Block until the job has ended; return all its output."""
    with worker.stream(job_id) as chunks:
        return b"".join(chunks)


def _counters(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {key: int(value) for key, value in lines}


def _pause(worker: Worker, job_id: str, seconds: float) -> None:
    """Let a job run for some seconds; it must not end meanwhile."""
    with pytest.raises(TimeoutError):
        worker.wait(job_id, seconds)


class _Escapees:
    """A script whose processes try to escape a kill, and the FIFO that all of them hold.

    `cgroups`: some of them also enter cgroups that the script makes below the job's. A job with
    a user of its own has no right to make these.
    """

    def __init__(self, path: Path, *, cgroups: bool = True) -> None:
        os.mkfifo(path)
        path.chmod(0o666)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        up = "echo up >&9"
        self.script = f"""
            exec 9>'{path}'
            setsid sh -c '{up}; exec sleep infinity' &
            (setsid sh -c '{up}; (sleep infinity &) ; exec sleep infinity' &)
            sh -c '{up}; kill -STOP $$' &
            sh -c 'exec <&- >&- 2>&-; {up}; exec sleep infinity' &
            sh -c 'trap "" {_SIGNALS}; {up}; while :; do sleep 60; done' &
            {public_python()} -I -S -c '{WITHOUT_FIRST_THREAD}' 9 &
            {up}
            """
        self._count = 7
        if cgroups:
            self._count += 2
            self.script += f"""
            job=$(sed -n 's/[^ ]* \\([^ ]*\\) cgroup2 .*/\\1/p' /proc/self/mounts)
            job=$job$(sed -n s/^0:://p /proc/self/cgroup)
            mkdir -p "$job/its/own" "$job/its/frozen" || exit
            sh -c 'echo 0 >"$0/own/cgroup.procs" && {up}; exec sleep infinity' "$job/its" &
            sh -c 'cd "$0" && echo 0 >cgroup.procs && {up}; echo 1 >cgroup.freeze
                   exec sleep infinity' "$job/its/frozen" &
            """

    def await_up(self, jobs: int = 1) -> None:
        """Block until every process of so many jobs is running."""
        lines = b""
        while lines.count(b"\n") < self._count * jobs:
            assert select.select([self._fd], [], [], GUARD_S)[0]
            lines += os.read(self._fd, 4096)

    def are_dead(self) -> bool:
        """Return whether no process has the FIFO open now."""
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


# --- stop with a grace --------------------------------------------------------------------------


# Says bye at SIGTERM, in a process that it forks, and exits with 3. $0 is a FIFO that nobody writes
# to.
_POLITE = """
    trap 'head -c 200000 /dev/zero; sh -c "sleep 0.2; echo bye"; exit 3' TERM
    exec 3<>"$0"; echo ready; while :; do read -t 1 x <&3; done"""


def test_grace_of_a_stop_is_for_every_process(worker: Worker, tmp_path: Path) -> None:
    """The leader dies of SIGTERM at once. Another session still writes 200 KiB, and ends."""
    idle = str(make_fifo(tmp_path / "idle"))
    job = worker.start(
        "sh", ["-c", 'setsid bash -c "$0" "$1" & exec sleep infinity', _POLITE, idle]
    )
    await_output(worker, job, b"ready")
    ended = worker.stop(job, grace=GUARD_S)
    assert (ended.status, ended.signal) == (Status.STOPPED, signal.SIGTERM)
    assert _output(worker, job) == b"ready\n" + bytes(200_000) + b"bye\n"


def test_grace_of_a_stop_ends_with_a_kill_of_everything(
    worker: Worker, escapees: _Escapees
) -> None:
    """What is deaf to SIGTERM is dead when the stop has been answered, wherever it is."""
    job = worker.start("sh", ["-c", escapees.script + "exec sleep infinity"])
    escapees.await_up()
    assert worker.stop(job, grace=0.5).status is Status.STOPPED
    assert escapees.are_dead()


def test_job_that_timed_out_has_its_grace(worker: Worker, tmp_path: Path) -> None:
    """It is STOPPED and TIMED_OUT, with the exit code of its leader."""
    idle = str(make_fifo(tmp_path / "idle"))
    job = worker.start("bash", ["-c", _POLITE, idle], ending=Ending(timeout=5, grace=GUARD_S))
    ended = worker.wait(job, GUARD_S)
    assert (ended.end_reason, ended.exit_code) == (EndReason.TIMED_OUT, 3)
    assert _output(worker, job).endswith(b"bye\n")


def test_what_holds_the_output_after_the_linger_is_killed_and_counted(worker: Worker) -> None:
    """Also a process that has left the session and lost its parents."""
    script = "setsid --fork sleep infinity; sleep infinity & exit 7"
    job = worker.start("sh", ["-c", script], ending=Ending(linger=0.5))
    ended = worker.wait(job, GUARD_S)
    assert (ended.exit_code, ended.killed_after_exit, ended.may_have_escaped) == (7, 2, False)


def test_filter_that_outlives_the_leader_loses_nothing(worker: Worker) -> None:
    """Its output is complete, and nothing was killed."""
    pipe = "f=$(mktemp -u); mkfifo $f; cat <$f & exec >$f 2>&1; rm $f"
    for _ in range(5):
        job = worker.start("sh", ["-c", f"{pipe}; echo begun; echo RESULT; exit 7"])
        ended = worker.wait(job, GUARD_S)
        assert (ended.exit_code, ended.killed_after_exit) == (7, 0)
        assert _output(worker, job) == b"begun\nRESULT\n"


# --- signals ----------------------------------------------------------------------------------


def test_signal_reaches_processes_in_other_sessions_and_in_cgroups_below(worker: Worker) -> None:
    """A signal to everything reaches each process of the job once, wherever the process is."""
    tree = [sys.executable, "-c", SIGNALLED_TREE, "40", "wait", "setsid"]
    script = """
        cd "$0/$(sed -n s/^0::.//p /proc/self/cgroup)" && mkdir its || exit
        sh -c 'echo 0 >its/cgroup.procs && exec "$@"' sh "$@" &
        exec "$@" """
    job = worker.start("sh", ["-c", script, str(_top(worker)), *tree])
    await_lines(worker, job, b"up", 82)
    worker.signal(job, signal.SIGUSR1, everything=True)
    output = _output(worker, job)
    assert (output.count(b"leader"), output.count(b"child")) == (2, 80)
    assert worker.status(job).exit_code == 7


# Every process of this job tells which process has sent it a signal.
_TELLS_THE_SENDER = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        break
os.write(1, b"up\\n")
os.write(1, b"%d\\n" % signal.sigwaitinfo({signal.SIGUSR1}).si_pid)
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""


def test_signal_to_many_processes_holds_up_no_other_request(base: Path) -> None:
    """The fork server has another process send it, with the rights of the job's user."""
    uid, count = 71_001, 33
    with Worker(enforcement="require", cgroup_root=base, uids=range(uid, uid + 1)) as worker:
        argv = ["-I", "-S", "-c", _TELLS_THE_SENDER, str(count)]
        job = worker.start(public_python(), argv, uid=uid)
        await_lines(worker, job, b"up", count + 1)
        worker._spawner.signal(job, signal.SIGUSR1, uid=uid, everything=True)
        told = _output(worker, job).splitlines()
        assert len(told) == 2 * (count + 1)
        (sender,) = set(told) - {b"up"}
        assert int(sender) not in (worker._spawner.pid, os.getpid())


# --- membership and limits --------------------------------------------------------------------


def test_job_is_in_its_cgroup_from_its_first_instruction(worker: Worker) -> None:
    """500 jobs and their children, four at a time beside a busy job, are all in their cgroups.

    In the tests' own kernel, which has one processor and takes a minute for them, 150.
    """
    count = 150 if "JOBWORKER_IN_KERNEL" in os.environ else 500
    busy = worker.start("sh", ["-c", "while :; do :; done"], limits=Limits(cpu_cores=0.2))
    tell = "read place </proc/self/cgroup; echo $place"
    script = f"{tell}; ({tell})"

    def start(_: int) -> str:
        job = worker.start("sh", ["-c", script])
        place = _output(worker, job).decode()
        expected = f"/jobs/{job}\n"
        inside = [line.endswith(expected) for line in place.splitlines(keepends=True)]
        return "" if inside == [True, True] else place

    with ThreadPoolExecutor(4) as pool:
        outside = [place for place in pool.map(start, range(count)) if place]
    assert not outside
    assert worker.stop(busy).status is Status.STOPPED


def test_limits_are_written_before_the_command_runs(worker: Worker) -> None:
    """The first thing that a job reads in its own cgroup is its limits."""
    script = 'cd "$0/$(sed -n s/^0::.//p /proc/self/cgroup)" && cat cpu.max memory.max pids.max'
    limits = Limits(cpu_cores=0.5, memory_bytes=64 * _MIB, pids=9)
    job = worker.start("sh", ["-c", script, str(_top(worker))], limits=limits)
    assert _output(worker, job) == f"50000 100000\n{64 * _MIB}\n9\n".encode()


def test_every_limit_is_in_force_and_in_the_status(worker: Worker) -> None:
    """A running job's cgroup has all the limits, and its status shows them."""
    limits = Limits(
        cpu_cores=0.5,
        memory_bytes=64 * _MIB,
        swap_bytes=0,
        io_read_bps=2 * _MIB,
        io_write_bps=3 * _MIB,
        io_read_iops=20,
        io_write_iops=30,
        pids=9,
    )
    job = worker.start("sh", _FOREVER, limits=limits)
    path = _cgroup(worker, job)
    assert worker.status(job).limits == limits
    assert (path / "cpu.max").read_text() == "50000 100000\n"
    assert (path / "memory.max").read_text() == f"{64 * _MIB}\n"
    assert (path / "memory.oom.group").read_text() == "1\n"
    assert (path / "pids.max").read_text() == "9\n"
    disks = (path / "io.max").read_text().splitlines()
    assert disks
    assert all(f"rbps={2 * _MIB} wbps={3 * _MIB} riops=20 wiops=30" in disk for disk in disks)
    assert (path / "cgroup.procs").read_text()


def test_default_limits_are_in_force(worker: Worker) -> None:
    """A job that is started without limits has all the defaults."""
    assert worker.status(worker.start("sh", _FOREVER)).limits == Limits()


@pytest.mark.parametrize("processes", [1, 8])
def test_cpu_limit_has_effect(worker: Worker, processes: int) -> None:
    """Busy loops under a limit of 0.2 cores use 0.2 cores together."""
    busy = "while :; do :; done"
    script = f"for i in $(seq {processes - 1}); do ({busy}) & done; {busy}"
    job = worker.start("sh", ["-c", script], limits=Limits(cpu_cores=0.2))
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
def test_memory_limit_has_effect(worker: Worker, script: str) -> None:
    """A job above its memory limit is killed as a whole; its end reason is OUT_OF_MEMORY."""
    limits = Limits(memory_bytes=50 * _MIB)
    job = worker.wait(worker.start("sh", ["-c", script], limits=limits), GUARD_S)
    assert (job.status, job.end_reason) == (Status.FINISHED, EndReason.OUT_OF_MEMORY)
    assert (job.exit_code, job.signal) == (None, signal.SIGKILL)
    assert job.output_bytes == 0


def test_each_killed_process_counts_once(worker: Worker) -> None:
    """The kernel counts the first process of a group that it kills twice."""
    limits = Limits(memory_bytes=50 * _MIB)
    job = worker.wait(worker.start("tail", ["/dev/zero"], limits=limits), GUARD_S)
    assert job.usage
    assert (job.end_reason, job.usage.oom_kills) == (EndReason.OUT_OF_MEMORY, 1)
    script = "sleep infinity & sleep infinity & exec tail /dev/zero"
    job = worker.wait(worker.start("sh", ["-c", script], limits=limits), GUARD_S)
    assert job.usage
    assert (job.end_reason, job.usage.oom_kills) == (EndReason.OUT_OF_MEMORY, 3)


@pytest.mark.parametrize("meanwhile", [True, False])
def test_end_by_a_memory_limit_is_known_to_the_next_worker(
    base: Path, tmp_path: Path, *, meanwhile: bool
) -> None:
    """Whether the kernel kills the job while there is no worker, or afterwards."""
    fifo = make_fifo(tmp_path / "fifo")
    options: dict[str, Any] = {
        "enforcement": "require",
        "cgroup_root": base,
        "output_dir": tmp_path / "output",
        "tmp_dir": tmp_path / "tmp",
        "restart_dir": tmp_path / "restart",
        "restart_window": 1e6,
    }
    limits = Limits(memory_bytes=50 * _MIB)
    with Store(tmp_path / "store") as store:
        former = Worker(store=store, **options)
        script = f"read x <{fifo}; exec tail /dev/zero"
        job_id = former.start("sh", ["-c", script], limits=limits)
        (leader,) = job_processes(former._spawner.pid)
        former.leave()
    if meanwhile:
        with open(os.pidfd_open(leader)) as pidfd:
            fifo.write_text("x\n")
            assert select.select([pidfd], [], [], GUARD_S)[0]
    with Store(tmp_path / "store") as store, Worker(store=store, **options) as worker:
        worker.resume()
        if not meanwhile:
            fifo.write_text("x\n")
        job = worker.wait(job_id, GUARD_S)
        assert (job.status, job.end_reason) == (Status.FINISHED, EndReason.OUT_OF_MEMORY)
        assert (job.signal, job.limits.memory_bytes) == (signal.SIGKILL, limits.memory_bytes)
        assert job.usage
        assert job.usage.oom_kills == 1
    os.waitpid(former._spawner.pid, 0)


def test_memory_of_all_jobs_is_not_the_jobs_own_limit(base: Path) -> None:
    """A job that the kernel kills below its own limit has another end reason."""
    bounds = Bounds(memory_bytes=50 * _MIB)
    with Worker(enforcement="require", cgroup_root=base, bounds=bounds) as worker:
        limits = Limits(memory_bytes=500 * _MIB)
        job = worker.wait(worker.start("tail", ["/dev/zero"], limits=limits), GUARD_S)
    assert job.usage
    assert (job.end_reason, job.usage.oom_kills) == (EndReason.HOST_OUT_OF_MEMORY, 1)
    assert job.usage.memory_limit_hits == 0


def test_refused_forks_are_in_the_status(worker: Worker) -> None:
    """The status tells of a limit of processes that a job has met."""
    script = "(for i in 1 2 3 4 5 6; do sleep infinity & done) 2>&1"
    refused = worker.wait(worker.start("sh", ["-c", script], limits=Limits(pids=4)), GUARD_S)
    assert refused.usage
    assert refused.usage.refused_forks
    job = worker.wait(worker.start("true"), GUARD_S)
    assert job.usage
    assert job.usage.refused_forks == 0


def test_job_below_its_memory_limit_is_left_alone(worker: Worker) -> None:
    """A job that stays below its memory limit ends by itself."""
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
    """Neither an exit code of 137 nor a SIGKILL by another process is reported as OUT_OF_MEMORY."""
    job = worker.wait(worker.start("sh", ["-c", script]), GUARD_S)
    assert (job.end_reason, job.exit_code, job.signal) == (reason, exit_code, number)


def test_pressing_against_the_memory_limit_is_not_out_of_memory(worker: Worker) -> None:
    """The kernel only reclaims the job's page cache. Then a SIGKILL ends the job as SIGNALLED."""
    numbers = _physical_disks()[0]
    uevent = Path("/sys/dev/block", numbers, "uevent").read_text()
    (disk,) = [each[8:] for each in uevent.splitlines() if each.startswith("DEVNAME=")]
    script = f"head -c 60M /dev/{disk} | wc -c; exec sleep infinity"
    limits = Limits(None, 20 * _MIB, None, None, None, None)
    job = worker.start("sh", ["-c", script], limits=limits)
    await_output(worker, job, b"%d\n" % (60 * _MIB))
    assert _counters(_cgroup(worker, job) / "memory.events")["max"] > 0
    inside = worker._job(job)
    assert isinstance(inside, RunningJob)
    os.kill(inside._pid, signal.SIGKILL)
    assert worker.wait(job, GUARD_S).end_reason is EndReason.SIGNALLED


def test_stop_after_a_process_ran_out_of_memory_is_a_stop(worker: Worker) -> None:
    """A job is STOPPED although the kernel had killed one of its processes for memory before."""
    # The greedy process is in a cgroup below the job's, which has a lower limit.
    script = """
        cd "$0/$(sed -n s/^0::.//p /proc/self/cgroup)" && mkdir leader greedy &&
        echo $$ >leader/cgroup.procs && echo +memory >cgroup.subtree_control &&
        echo 20M >greedy/memory.max || exit
        sh -c 'echo 0 >greedy/cgroup.procs; exec tail /dev/zero'
        echo one is dead; exec sleep infinity"""
    job = worker.start("sh", ["-c", script, str(_top(worker))])
    await_output(worker, job, b"one is dead\n")
    usage = worker.status(job).usage
    assert usage
    assert usage.oom_kills
    ended = worker.stop(job)
    assert (ended.status, ended.end_reason) == (Status.STOPPED, EndReason.STOPPED)


# --- all jobs together ------------------------------------------------------------------------


def test_what_outlives_jobs_is_bounded(base: Path) -> None:
    """Jobs that leave shared memory cannot take more than the bound of all jobs together."""
    bounds = Bounds(memory_bytes=96 * _MIB)
    leave = (
        "import ctypes; libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p\n"
        f"number = libc.shmget(0, {40 * _MIB}, 0o1600); print(number, flush=True)\n"
        f"ctypes.memset(libc.shmat(number, None, 0), 1, {40 * _MIB})"
    )
    left = []
    with Worker(enforcement="require", cgroup_root=base, bounds=bounds) as worker:
        assert worker.subtree
        limits = Limits(memory_bytes=64 * _MIB)
        try:
            for _ in range(4):
                job = worker.start(sys.executable, ["-I", "-S", "-c", leave], limits=limits)
                left.append(int(_output(worker, job)))
                assert int((worker.subtree.jobs / "memory.current").read_text()) <= 96 * _MIB
            reasons = [job.end_reason for job in worker.list()]
        finally:
            for number in left:
                ctypes.CDLL(None).shmctl(number, 0, None)
    assert reasons[:2] == [EndReason.EXITED] * 2
    assert EndReason.EXITED not in reasons[2:]


def test_processes_of_all_jobs_are_bounded(base: Path) -> None:
    """Two jobs, each below its limit, cannot have more processes than the bound allows."""
    script = (
        "(for i in 1 2 3 4 5 6 7 8 9; do sleep infinity & done; echo all) 2>&1; exec sleep infinity"
    )
    with Worker(enforcement="require", cgroup_root=base, bounds=Bounds(pids=20)) as worker:
        await_output(worker, worker.start("sh", ["-c", script], limits=Limits(pids=15)), b"all")
        second = worker.start("sh", ["-c", script], limits=Limits(pids=15))
        await_output(worker, second, b"fork")


@pytest.mark.parametrize(
    "script",
    ["mkdir -p 2/3/4 && echo fits; mkdir 2/3/4/5", "mkdir 2 3 4 && echo fits; mkdir 5"],
    ids=["depth", "number"],
)
def test_cgroups_below_jobs_are_bounded(base: Path, script: str) -> None:
    """A job that may make cgroups makes neither deeper nor more of them than the bounds allow."""
    bounds = Bounds(cgroup_depth=4, cgroups=5)  # the job, the next job's spare, and three more
    go = 'cd "$0/$(sed -n s/^0::.//p /proc/self/cgroup)" || exit; exec 2>&1; '
    with Worker(enforcement="require", cgroup_root=base, bounds=bounds) as worker:
        job = worker.start("sh", ["-c", go + script, str(_top(worker))])
        settle_spares(worker)
        output = _output(worker, job).decode()
        assert "fits" in output
        assert "Resource temporarily unavailable" in output


def test_default_bounds_leave_something_to_the_host(worker: Worker) -> None:
    """All jobs together have four fifths of the memory and half of the processes."""
    assert worker.subtree
    memory = int((worker.subtree.jobs / "memory.max").read_text())
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory / total == pytest.approx(0.8, abs=0.01)
    pids = int((worker.subtree.jobs / "pids.max").read_text())
    assert 0 < pids <= int(Path("/proc/sys/kernel/pid_max").read_text()) // 2


def test_process_limit_has_effect(worker: Worker) -> None:
    """At its limit a job cannot fork; another job still starts, and the job can be stopped."""
    script = "(while :; do sleep infinity & done) 2>&1; exec sleep infinity"
    job = worker.start("sh", ["-c", script], limits=Limits(pids=10))
    await_output(worker, job, b"fork")
    path = _cgroup(worker, job)
    assert _counters(path / "pids.events")["max"] >= 1
    assert int((path / "pids.current").read_text()) <= 10
    assert worker.wait(worker.start("true"), GUARD_S).exit_code == 0
    assert worker.stop(job).status is Status.STOPPED
    assert not path.exists()


# --- escapees ---------------------------------------------------------------------------------


def test_stop_reaches_every_escapee(worker: Worker, escapees: _Escapees) -> None:
    """When stop returns, every process of the job is dead: after setsid, after a double fork,
    stopped, without output, ignoring signals, in a cgroup of the job's own, frozen in one."""
    job = worker.start("sh", ["-c", escapees.script + "exec sleep infinity"])
    escapees.await_up()
    path = _cgroup(worker, job)
    assert worker.stop(job).status is Status.STOPPED
    assert escapees.are_dead()
    assert not path.exists()


def test_leaders_exit_ends_every_escapee(
    worker: Worker, escapees: _Escapees, tmp_path: Path
) -> None:
    """When the leader exits by itself, everything that it started is killed."""
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
    """Closing a worker while jobs run leaves no process, no cgroup and no thread."""
    threads = threading.active_count()
    before = own_cgroup()
    with Worker(enforcement="require", cgroup_root=base) as worker:
        for _ in range(3):
            worker.start("sh", ["-c", escapees.script + "exec sleep infinity"])
        escapees.await_up(3)
    assert escapees.are_dead()
    assert not [each for each in base.iterdir() if each.is_dir()]
    assert (threading.active_count(), own_cgroup()) == (threads, before)


def test_process_that_outlives_its_start_counts_until_it_is_gone(
    worker: Worker, leased: tuple[Path, Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may not let go of a process that it lets wait for its file, a dead disk's say.

    Its user has a place less meanwhile, and then its cgroup is removed. Here nobody kills it.
    """
    ended = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr("starting._START_TIMEOUT_S", 0.5)
        patch.setattr("spares._DISCARD_S", 0)
        patch.setattr("cgroups.Cgroup.kill", lambda _: True)
        patch.setattr(worker._spawner, "kill", lambda _: None)
        with pytest.raises(StartTimeoutError) as caught:
            worker.start(str(leased[0]), on_end=ended.set)
    assert caught.value.lives
    assert not ended.is_set()
    settle_spares(worker)
    spare = worker._parts.spares._ready
    assert spare is not None
    jobs = _cgroup(worker, "").iterdir()
    (cgroup,) = (each for each in jobs if each.is_dir() and each.name != spare.job_id)
    cgroupfs.kill_tree(cgroup)
    assert ended.wait(GUARD_S)
    assert not cgroup.exists()


@pytest.mark.parametrize("kill_file", [True, False], ids=["cgroup.kill", "before 5.14"])
def test_stop_reaches_a_frozen_job(
    worker: Worker, escapees: _Escapees, monkeypatch: pytest.MonkeyPatch, *, kill_file: bool
) -> None:
    """A frozen job can be stopped, also on a kernel without cgroup.kill."""
    job = worker.start("sh", ["-c", escapees.script + "exec sleep infinity"])
    escapees.await_up()
    (_cgroup(worker, job) / "cgroup.freeze").write_text("1")
    assert wait_event(_cgroup(worker, job), "frozen", "1", GUARD_S)
    if not kill_file:
        _refuse(monkeypatch, "cgroup.kill", errno.ENOENT)
    assert worker.stop(job).status is Status.STOPPED
    assert escapees.are_dead()
    assert not _cgroup(worker, job).exists()


def test_stop_without_cgroup_kill_tolerates_a_removed_cgroup(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's thread removes the cgroup between the kill and the thaw; stop raises no error."""
    job = worker.start("sleep", ["infinity"])
    _refuse(monkeypatch, "cgroup.kill", errno.ENOENT)
    real, waited = cgroupfs.write, threading.Event()

    def write(path: str, value: str, **options: Any) -> None:
        thaws = (os.path.basename(path), value) == ("cgroup.freeze", "0")
        if thaws and threading.current_thread() is threading.main_thread():
            worker.wait(job, GUARD_S)
            assert not os.path.exists(path)
            waited.set()
        real(path, value, **options)

    monkeypatch.setattr(cgroupfs, "write", write)
    assert worker.stop(job).status is Status.STOPPED
    assert waited.is_set()


def test_leaders_exit_ends_every_escapee_without_cgroup_kill(
    worker: Worker, escapees: _Escapees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a kernel without cgroup.kill, what the leader leaves is frozen and killed."""
    _refuse(monkeypatch, "cgroup.kill", errno.ENOENT)
    go = tmp_path / "go"
    os.mkfifo(go)
    job = worker.start("sh", ["-c", f"{escapees.script} read x <'{go}'; exit 3"])
    escapees.await_up()
    go.write_text("\n")
    assert worker.wait(job, GUARD_S).exit_code == 3
    assert escapees.are_dead()
    assert not _cgroup(worker, job).exists()


def test_cgroup_that_is_busy_for_a_moment_is_removed(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rmdir may fail with EBUSY after the last process has gone; then it is tried again."""
    refusals = [OSError(errno.EBUSY, os.strerror(errno.EBUSY)) for _ in range(3)]
    rmdir = os.rmdir

    def busy_at_first(path: str, *, dir_fd: int | None = None) -> None:
        if refusals and dir_fd is None:  # with a descriptor, TMPDIRs are removed
            raise refusals.pop()
        rmdir(path, dir_fd=dir_fd)

    job = worker.start("cat", ["/proc/self/cgroup"])
    monkeypatch.setattr(os, "rmdir", busy_at_first)
    worker.wait(job, GUARD_S)
    assert not refusals
    assert not _cgroup(worker, job).exists()


# --- failing closed ---------------------------------------------------------------------------


def _held(worker: Worker | None = None) -> tuple[object, ...]:
    """Return what this process and the worker hold; a failed start must not change it."""
    if worker is not None:
        settle_spares(worker)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    held = len(os.listdir("/proc/self/fd")), threading.active_count(), children, own_cgroup()
    if worker is None:
        return held
    worker._spawner.kill("nobody")  # answered in turn: earlier requests are done then
    cgroups = job_cgroups(_cgroup(worker, ""))
    return *held, worker.list(), cgroups, job_files(worker)


def test_worker_that_cannot_enforce_does_not_start(base: Path) -> None:
    """Under require, a root without controllers raises an error with a remedy; nothing is left."""
    bare = base / "bare"
    bare.mkdir()
    before = _held()
    with pytest.raises(CgroupError, match=r"/bare does not have the cpu controller; .*Delegate"):
        Worker(enforcement="require", cgroup_root=bare)
    assert _held() == before
    bare.rmdir()  # possible only when empty


_ALL_LIMITS = Limits(io_read_iops=1000, io_write_iops=1000)
_FILES = ["cpu.max", "memory.max", "memory.oom.group", "memory.swap.max", "io.max", "pids.max"]


def _await_failed_start(worker: Worker, marker: Path, limits: Limits | None = None) -> CgroupError:
    """Start a job that must fail; check that nothing of it is left. Return the error."""
    before = _held(worker)
    with pytest.raises(CgroupError) as caught:
        worker.start("touch", [str(marker)], limits=limits)
    assert _held(worker) == before
    assert not marker.exists()
    assert caught.value.remedy
    return caught.value


def _refuse(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Make every open of a file of that name fail in this process."""
    real = os.open

    def refuse(path: Any, *rest: Any, **options: Any) -> int:
        if not isinstance(path, int) and os.path.basename(path) == name:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)


def test_job_that_cannot_be_limited_does_not_run(worker: Worker, tmp_path: Path) -> None:
    """If the kernel refuses a limit, the start fails before the command runs; nothing is left."""
    marker = tmp_path / "ran"
    error = _await_failed_start(worker, marker, Limits(pids=2**40))
    assert str(error).startswith(f"cannot write '{2**40}' to {error.path}: Invalid argument; ")
    assert error.path.endswith("/pids.max")
    assert worker.wait(worker.start("touch", [str(marker)]), GUARD_S).exit_code == 0
    assert marker.exists()


@pytest.mark.parametrize("controller", ["cpu", "memory", "io", "pids"])
def test_job_without_a_controller_does_not_run(
    worker: Worker, tmp_path: Path, controller: str
) -> None:
    """If a controller disappears, with its files, the next start fails."""
    (_cgroup(worker, "") / "cgroup.subtree_control").write_text(f"-{controller}")
    error = _await_failed_start(worker, tmp_path / "ran")
    assert (error.errno, Path(error.path).name) == (errno.ENOENT, f"{controller}.max")
    assert error.value in str(error)


@pytest.mark.parametrize("name", _FILES)
def test_job_with_one_limit_missing_does_not_run(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whichever limit's file cannot be written, the error has its path, the value and a remedy."""
    _refuse(monkeypatch, name, errno.EIO)
    error = _await_failed_start(worker, tmp_path / "ran", _ALL_LIMITS)
    assert Path(error.path).name == name
    assert error.value
    assert f"cannot write {error.value!r} to {error.path}: Input/output error; " in str(error)


def test_job_whose_cgroup_cannot_be_made_does_not_run(worker: Worker, tmp_path: Path) -> None:
    """If the kernel allows no more cgroups, the command is not executed; nothing is left."""
    discard_spares(worker)
    (_cgroup(worker, "") / "cgroup.max.descendants").write_text("0")
    error = _await_failed_start(worker, tmp_path / "ran")
    assert str(error).startswith(f"cannot make {error.path}: ")


def _remove(path: Path) -> None:
    path.rmdir()


def _make_inner(path: Path) -> None:
    """Enable a controller for its children: no process can enter such a cgroup."""
    (path / "cgroup.subtree_control").write_text("+memory")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(_remove, "No such file or directory"), (_make_inner, "Device or resource busy")],
)
def test_job_that_cannot_enter_its_cgroup_does_not_run(
    worker: Worker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    reason: str,
) -> None:
    """If the cgroup was removed, or no process can enter it, the command is not executed."""
    fork = Spawner.fork

    def fork_too_late(spawner: Spawner, job: str, **options: Any) -> Process:
        spoil(_cgroup(worker, job))
        return fork(spawner, job, **options)

    discard_spares(worker)
    monkeypatch.setattr(worker._parts.spares, "fill", lambda *_: None)
    monkeypatch.setattr(Spawner, "fork", fork_too_late)
    error = _await_failed_start(worker, tmp_path / "ran", NO_LIMITS)
    assert str(error).startswith(f"a new process cannot enter {error.path}: {reason}; ")
    assert error.value == "0"


@pytest.mark.parametrize("command", ["no-such-command", "/etc/passwd", "/proc"])
def test_command_that_cannot_be_executed_leaves_no_cgroup(worker: Worker, command: str) -> None:
    """If the command is missing, not executable or a directory, the cgroup is removed again."""
    before = _held(worker)
    with pytest.raises(CommandError):
        worker.start(command)
    assert _held(worker) == before


def test_job_without_a_thread_does_not_run(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started, the command is not executed; nothing is left."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = _held(worker)
    discard_spares(worker)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResourceError, match="no room for another thread"):
            worker.start("touch", [str(tmp_path / "ran")])
    assert _held(worker) == before
    assert not (tmp_path / "ran").exists()


# --- death of the main process ----------------------------------------------------------------

_MAIN_PROCESS = """
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


def test_death_of_the_main_process_leaves_nothing_running(base: Path, escapees: _Escapees) -> None:
    """SIGKILL of a main process ends its 5 jobs; the next worker removes the cgroups."""
    script = escapees.script + "exec sleep infinity"
    with subprocess.Popen(
        [sys.executable, "-c", _MAIN_PROCESS, base, script], cwd=_HERE
    ) as process:
        try:
            escapees.await_up(5)
        finally:
            process.kill()
    assert wait_event(base, "populated", "0", GUARD_S)
    assert escapees.are_dead()
    (left,) = [each for each in base.iterdir() if each.is_dir()]
    with Worker(enforcement="require", cgroup_root=base) as worker:
        assert not left.exists()
        assert worker.wait(worker.start("true"), GUARD_S).limits == Limits()


@pytest.fixture
def public_escapees() -> Iterator[_Escapees]:
    """Escapees whose FIFO every user can open, because a server's jobs have users of their own."""
    with tempfile.TemporaryDirectory() as directory:  # not pytest's, which is private
        Path(directory).chmod(0o711)
        escapees = _Escapees(Path(directory) / "fifo", cgroups=False)
        yield escapees
        escapees.close()


def test_death_of_the_server_leaves_nothing_running(
    base: Path,
    public_escapees: _Escapees,
    certs: Path,
    start_server: Callable[..., ServerProgram],
    record_property: Callable[[str, object], None],
) -> None:
    """SIGKILL of a server ends its 20 jobs; the next server removes the cgroups and serves.

    In the tests' own kernel, which takes half a minute for their processes, 5 jobs.
    """
    from client import Client

    count = 5 if "JOBWORKER_IN_KERNEL" in os.environ else 20
    escapees = public_escapees
    options = ("--limits", "require", "--cgroup-root", str(base))
    server = start_server(*options)
    with Client(server.address, certs=certs) as client:
        client.login("user", "user")
        for _ in range(count):
            client.start("sh", ["-c", escapees.script + "exec sleep infinity"])
        escapees.await_up(count)
    began = time.monotonic()
    server.process.kill()
    assert wait_event(base, "populated", "0", 10)
    record_property("seconds until all were dead", time.monotonic() - began)
    assert escapees.are_dead()
    server.process.wait()
    successor = start_server(*options)
    with Client(successor.address, certs=certs) as client:
        client.login("user", "user")
        assert b"".join(client.stream(client.start("echo", ["hello"]))) == b"hello\n"
    assert successor.end() == 0
    assert not [each for each in base.iterdir() if each.is_dir()]
