"""Tests on a real kernel that the limits on memory, disks and processes have effect, and that a
job's usage is correct. The test of the limit on CPU time is in `test_kernel.py`.

Each test of a rate accepts a range around the limit, which an unlimited job would miss.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cgroups
from limits import NO_LIMITS, Limits, Usage
from testkit import GUARD_S, await_output, job_cgroups
from worker import EndReason, Job, Status, UsageSource, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from testkit import ServerProgram

pytestmark = pytest.mark.kernel

_HERE = Path(__file__).parent
_MIB = 1024 * 1024
_DISK, _OTHER_DISK, _PARTITION = (Path("/dev", name) for name in ("ubda", "ubdb", "ubdb1"))
_BPS = 2 * _MIB
_IOPS = 30


@pytest.fixture
def worker(base: Path) -> Iterator[Worker]:
    """A worker that refuses to run a job without its limits."""
    with Worker(enforcement="require", cgroup_root=base) as worker:
        yield worker


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk that exists for tests, with 6 MiB in the file `data`."""
    if not _DISK.exists():
        pytest.skip("needs the disks of scripts/kernel-run")
    subprocess.run(["mount", "-t", "ext2", _DISK, tmp_path], check=True)
    (tmp_path / "data").write_bytes(b"x" * 6 * _MIB)
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")
    yield tmp_path
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()
    subprocess.run(["umount", tmp_path], check=True)


def _run(worker: Worker, script: str, limits: Limits) -> Job:
    return worker.wait(worker.start("sh", ["-ec", script], limits=limits), GUARD_S)


def _usage(job: Job) -> Usage:
    assert job.usage
    assert job.usage_source is UsageSource.CGROUP
    return job.usage


# --- memory -----------------------------------------------------------------------------------


_LINES = 20 * 1024  # of 1 KiB each


@pytest.mark.parametrize("place", ["TMPDIR", "/dev/shm"])
def test_sort_of_a_file_larger_than_the_memory_limit(base: Path, disk: Path, place: str) -> None:
    """sort puts its temporary files into TMPDIR, on a disk. On a tmpfs they count as memory."""
    script = f"""
        cd {disk}; tail -c 1000 data | tr x y >line
        awk -v pad="$(cat line)" -v lines={_LINES} \
            'BEGIN {{ for (i = lines; i; i--) printf "%06d%s\\n", i, pad }}' >many
        sort -S 4M -T "${{TMPDIR}}" many | cut -c1-6 >sorted
        wc -l <sorted; head -n 1 sorted; ls "$TMPDIR" | wc -l
    """
    env = {} if place == "TMPDIR" else {"TMPDIR": place}
    limits = Limits(memory_bytes=14 * _MIB, io_read_bps=None, io_write_bps=None)
    with Worker(enforcement="require", cgroup_root=base, tmp_dir=disk / "tmp") as worker:
        job_id = worker.start("sh", ["-ec", script], limits=limits, env=env)
        job = worker.wait(job_id, GUARD_S)
        with worker.stream(job_id) as chunks:
            output = b"".join(chunks).decode().split()
    (disk / "tmp").rmdir()
    if place == "TMPDIR":
        assert (job.exit_code, output) == (0, [str(_LINES), "000001", "0"])
    else:
        assert job.end_reason is EndReason.OUT_OF_MEMORY


def test_file_on_tmpfs_counts_as_memory(worker: Worker, tmp_path: Path) -> None:
    """A job that fills a tmpfs is killed as a whole at its memory limit; it ends OUT_OF_MEMORY."""
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    script = f"head -c 80M /dev/zero >{tmp_path}/file; echo survived"
    job = _run(worker, script, Limits(memory_bytes=50 * _MIB))
    subprocess.run(["umount", tmp_path], check=True)
    assert (job.end_reason, job.output_bytes) == (EndReason.OUT_OF_MEMORY, 0)
    assert _usage(job).oom_kills
    assert (_usage(job).memory_peak_bytes or 0) <= 50 * _MIB


def test_page_cache_kills_no_job(worker: Worker, disk: Path) -> None:
    """A job may write and read files that are much larger than its memory limit."""
    script = f"head -c 100M /dev/zero >{disk}/file; cat {disk}/file {disk}/file | wc -c"
    limits = Limits(memory_bytes=16 * _MIB, io_read_bps=None, io_write_bps=None)
    job = _run(worker, script, limits)
    assert (job.end_reason, job.exit_code) == (EndReason.EXITED, 0)
    assert _usage(job).oom_kills == 0
    assert 12 * _MIB < (_usage(job).memory_peak_bytes or 0) <= 16 * _MIB


# --- disks ------------------------------------------------------------------------------------


def _seconds(job: Job) -> float:
    assert (job.end_reason, job.exit_code) == (EndReason.EXITED, 0)
    assert job.ended_at
    return (job.ended_at - job.started_at).total_seconds()


@pytest.mark.parametrize(
    "script",
    [
        "dd if=/dev/zero of=new bs=64K count=96 oflag=direct",
        "dd if=/dev/zero of=new bs=64K count=96 conv=fsync",
        "dd if=data of=/dev/null bs=64K iflag=direct",
        "dd if=data of=/dev/null bs=64K",
        f"dd if={_PARTITION} of=/dev/null bs=64K count=96 iflag=direct",
        f"dd if=/dev/zero of={_PARTITION} bs=64K count=96 oflag=direct",
    ],
    ids=["direct write", "write", "direct read", "read", "partition read", "partition write"],
)
def test_disk_rate_has_effect(worker: Worker, disk: Path, script: str) -> None:
    """6 MiB to or from a disk or its partition pass at about the limit's rate."""
    limits = Limits(io_read_bps=_BPS, io_write_bps=_BPS)
    rate = 6 * _MIB / _seconds(_run(worker, f"cd {disk}; {script}", limits))
    assert 0.5 * _BPS < rate < 1.3 * _BPS


@pytest.mark.parametrize(
    "script",
    [
        f"dd if=/dev/zero of={_OTHER_DISK} bs=4K count=90 oflag=direct seek=10000",
        f"dd if={_OTHER_DISK} of=/dev/null bs=4K count=90 iflag=direct",
    ],
    ids=["write", "read"],
)
@pytest.mark.usefixtures("disk")
def test_limit_of_disk_operations_has_effect(worker: Worker, script: str) -> None:
    """90 small operations pass at about the limit's rate, although they are few bytes."""
    limits = Limits(io_read_iops=_IOPS, io_write_iops=_IOPS)
    rate = 90 / _seconds(_run(worker, script, limits))
    assert 0.5 * _IOPS < rate < 1.3 * _IOPS


@pytest.mark.usefixtures("disk")
def test_every_disk_is_limited_and_no_partition(worker: Worker) -> None:
    """io.max has every whole disk. The kernel counts a partition's I/O for its disk."""
    job = worker.start("sleep", ["infinity"], limits=Limits(io_read_bps=_BPS, io_write_bps=None))
    assert worker.subtree
    lines = (worker.subtree.jobs / job / "io.max").read_text().splitlines()
    assert sorted(lines) == [
        f"{number} rbps={_BPS} wbps=max riops=max wiops=max" for number in ("98:0", "98:16")
    ]
    assert cgroups._physical_disks() == ["98:0", "98:16"]


def test_host_without_a_disk_cannot_limit_io(base: Path) -> None:
    """With an empty /sys/block an I/O limit raises an error with a remedy; no limit raises none."""
    program = """
import sys
from cgroups import CgroupError, Subtree
from limits import Limits
try:
    Subtree.open("require", root=sys.argv[1])
except CgroupError as error:
    print(error)
without = Limits(io_read_bps=None, io_write_bps=None)
Subtree.open("require", root=sys.argv[1], limits=without).close()
print("without")
"""
    output = subprocess.check_output(
        [
            *("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/block && exec "$@"'),
            *("sh", sys.executable, "-c", program, base),
        ],
        cwd=_HERE,
        text=True,
    )
    first, second = output.splitlines()
    assert "no physical disk in /sys/block" in first
    assert "attach a disk, or set no I/O limit" in first
    assert second == "without"


# --- processes --------------------------------------------------------------------------------

# In Perl, because the job's user may be unable to execute this Python.
_BOMB = '$| = 1; 1 while defined fork; print "full\\n"; fork while 1'


def test_fork_bomb_stays_inside(
    base: Path, certs: Path, start_server: Callable[..., ServerProgram]
) -> None:
    """Beside a fork bomb the server still runs jobs; a stop ends the bomb within 5 s."""
    if "JOBWORKER_IN_KERNEL" in os.environ and os.uname().release.startswith("6.12."):
        # "Kernel mode fault" in flush_tlb_mm, when copy_process clears up after a refused fork.
        pytest.skip("user-mode Linux 6.12 panics in this fork bomb; 6.1 does not")
    import workerservice_pb2 as worker_pb
    from client import Client

    server = start_server("--limits", "require", "--cgroup-root", str(base))
    with Client(server.address, certs=certs) as client:
        client.login("user", "user")
        bomb = client.start("perl", ["-e", _BOMB], cpu_cores=0.5, pids=30)
        output = client.stream(bomb)
        assert next(output) == b"full\n"
        assert client.status(bomb).usage.pids <= 30
        neighbour = client.start("echo", ["hello"])
        assert b"".join(client.stream(neighbour)) == b"hello\n"
        status = client.status(bomb)
        assert (status.status, status.usage.pids_peak) == (worker_pb.JOB_STATUS_RUNNING, 30)
        began = time.monotonic()
        assert client.stop(bomb).status == worker_pb.JOB_STATUS_STOPPED
        assert time.monotonic() - began < 5  # the bound that is promised
        assert set(b"".join(output).split()) <= {b"full"}
    (jobs,) = base.glob("job-worker-*/jobs")
    assert not job_cgroups(jobs)
    assert server.end() == 0


# --- per-job limits ---------------------------------------------------------------------------


def test_jobs_side_by_side_have_limits_of_their_own(
    base: Path, certs: Path, start_server: Callable[..., ServerProgram]
) -> None:
    """Each job's cgroup and status have the limits of its request, and defaults for the others."""
    from client import Client

    server = start_server("--limits", "require", "--cgroup-root", str(base))
    with Client(server.address, certs=certs) as client:
        client.login("user", "user")
        small = client.start("sleep", ["infinity"], cpu_cores=0.1, memory_bytes=20 * _MIB, pids=3)
        large = client.start("sleep", ["infinity"], cpu_cores=2.5, io_read_bps=_BPS)
        (jobs,) = base.glob("job-worker-*/jobs")
        files = ("cpu.max", "memory.max", "pids.max")
        default = Limits()
        for job, expected in {
            small: ["10000 100000", f"{20 * _MIB}", "3"],
            large: ["250000 100000", f"{default.memory_bytes}", f"{default.pids}"],
        }.items():
            assert [(jobs / job / name).read_text().strip() for name in files] == expected
        assert f"rbps={_BPS} wbps={default.io_write_bps}" in (jobs / large / "io.max").read_text()
        limits = client.status(large).limits
        assert (limits.cpu_cores, limits.io_read_bps, limits.pids) == (2.5, _BPS, default.pids)
    assert server.end() == 0


# --- usage ------------------------------------------------------------------------------------

# Uses two seconds of CPU time and 40 MiB, has four processes, then waits for a line.
_LOAD = """
import os, signal, sys, time
memory = b"x" * (40 << 20)
while time.process_time() < 2: pass
children = [pid for pid in (os.fork() for _ in range(3)) if pid or signal.pause()]
print("up", time.process_time(), flush=True)
open(sys.argv[1]).readline()
"""


def test_usage_is_what_the_job_used(worker: Worker, tmp_path: Path) -> None:
    """CPU time, memory and processes of a known load are right while it runs and after its end."""
    go = tmp_path / "go"
    os.mkfifo(go)
    program = ["-I", "-S", "-c", _LOAD, str(go)]
    job_id = worker.start(sys.executable, program, limits=NO_LIMITS)
    await_output(worker, job_id, b"\n")
    live = _usage(worker.status(job_id))
    go.write_text("\n")
    final = _usage(worker.wait(job_id, GUARD_S))
    for usage in (live, final):
        # The clock of a guest kernel goes on while the host does something else.
        assert 1.9 < (usage.cpu_user_s or 0) + (usage.cpu_system_s or 0) < 4
        assert 40 * _MIB < (usage.memory_peak_bytes or 0) < 60 * _MIB
        assert (usage.cpu_throttled_s, usage.pids_peak, usage.oom_kills) == (0, 4, 0)
        assert usage.io_written_bytes == 0
    assert 40 * _MIB < (live.memory_bytes or 0) < 60 * _MIB
    assert live.pids == 4
    assert (final.memory_bytes, final.pids) == (None, None)
    assert (final.cpu_user_s or 0) >= (live.cpu_user_s or 0)


@pytest.mark.usefixtures("disk")
def test_usage_of_disks_is_exact(worker: Worker) -> None:
    """Direct I/O is counted exactly, in bytes and operations, over all disks together."""
    script = f"""
        dd if=/dev/zero of={_PARTITION} bs=64K count=32 oflag=direct
        dd if={_OTHER_DISK} of=/dev/null bs=64K count=16 iflag=direct
        dd if={_DISK} of=/dev/null bs=32K count=32 iflag=direct"""
    usage = _usage(_run(worker, script, NO_LIMITS))
    assert (usage.io_written_bytes, usage.io_writes) == (2 * _MIB, 32)
    assert (usage.io_read_bytes, usage.io_reads) == (2 * _MIB, 48)


def test_throttled_time_is_counted(worker: Worker) -> None:
    """A job that needs a core and gets a tenth of one is throttled for most of its time."""
    program = "import time\nwhile time.process_time() < 0.3: pass"
    arguments = ["-I", "-S", "-c", program]
    job = worker.start(sys.executable, arguments, limits=Limits(cpu_cores=0.1))
    ended = worker.wait(job, GUARD_S)
    assert ended.ended_at
    took_s = (ended.ended_at - ended.started_at).total_seconds()
    assert 0.6 * took_s < (_usage(ended).cpu_throttled_s or 0) <= took_s


def test_usage_is_final_even_when_the_job_is_stopped(worker: Worker) -> None:
    """The final usage of a stopped job is read before its cgroup is removed."""
    job = worker.start("sh", ["-c", "echo up; while :; do :; done"])
    await_output(worker, job, b"up\n")
    live = _usage(worker.status(job))
    stopped = worker.stop(job)
    assert stopped.status is Status.STOPPED
    final = _usage(stopped)
    assert (final.cpu_user_s or 0) >= (live.cpu_user_s or 0)
    assert final.pids_peak == 1
    assert final == _usage(worker.status(job))
    assert worker.subtree
    assert not (worker.subtree.jobs / job).exists()


def test_status_while_jobs_end_never_fails(worker: Worker) -> None:
    """Reading the usage while the cgroup is being removed gives figures or None, but no error."""
    errors: list[Exception] = []
    done = threading.Event()
    jobs: list[str] = [worker.start("true")]

    def ask() -> None:
        while not done.is_set():
            try:
                worker.status(jobs[-1])
            except Exception as error:  # noqa: BLE001 -- whatever it is
                errors.append(error)
                return

    asker = threading.Thread(target=ask)
    asker.start()
    for _ in range(20):
        jobs.append(worker.start("true"))
        worker.wait(jobs[-1], GUARD_S)
    done.set()
    asker.join(GUARD_S)
    assert not errors
