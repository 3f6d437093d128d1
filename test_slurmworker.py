"""Tests of jobs on a real Slurm cluster: a controller and two nodes on this machine.

Each trap of Slurm that shaped the design has a test here: its exit codes, its signals, and what is
left when a part of it dies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from client import Client
from cluster_plugin import missing
from errors import TakeoverError
from finding import JobFilter
from jobmessages import job_message
from journal import KEPT_BYTES, Journal
from slurm import SlurmSettings
from slurmchannel import Channel
from slurmcheck import check
from slurmjob import SlurmJob
from slurmworker import SlurmWorker
from store import Store
from successor import end_jobs
from testcluster import Cluster
from testkit import GUARD_S, NOBODY, kill_fork_server, make_fifo
from worker import (
    CommandNotExecutableError,
    CommandNotFoundError,
    DirectoryError,
    Ending,
    EndReason,
    Job,
    JobEventKind,
    Limits,
    ResourceError,
    SignalError,
    SpawnerDiedError,
    Status,
    Usage,
    Worker,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from testkit import ServerProgram

_HERE = Path(__file__).resolve().parent
_SMALL = Limits(cpu_cores=1, memory_bytes=64 << 20)
_WHOLE_NODE = Limits(cpu_cores=64, memory_bytes=64 << 20)


@pytest.fixture
def make(cluster: Cluster) -> Iterator[Callable[..., SlurmWorker]]:
    """Make workers of the cluster; at the end nothing of theirs is left on it."""
    with contextlib.ExitStack() as workers:
        made: list[SlurmWorker] = []

        def make(instance: str = "test", **options: Any) -> SlurmWorker:
            settings = SlurmSettings(conf=str(cluster.conf))
            options = {"limits": _SMALL} | options
            made.append(workers.enter_context(SlurmWorker(settings, instance, **options)))
            return made[-1]

        yield make
    for each in made:
        assert not cluster.await_no_jobs(each.cluster.name)


@pytest.fixture
def worker(make: Callable[..., SlurmWorker]) -> SlurmWorker:
    """A worker of the cluster."""
    return make()


def _end(worker: Worker, job_id: str) -> Job:
    return worker.wait(job_id, GUARD_S)


def _run(worker: Worker, *argv: str, **options: Any) -> tuple[Job, bytes]:
    job_id = worker.start(argv[0], argv[1:], **options)
    with worker.stream(job_id) as chunks:
        output = b"".join(chunks)
    return _end(worker, job_id), output


def _begun(worker: Worker, *argv: str, **options: Any) -> str:
    """Start a job and return its ID when it has written its first output."""
    job_id = worker.start(argv[0], argv[1:], **options)
    with worker.stream(job_id) as chunks:
        next(chunks)
    return job_id


def _sruns(job_id: str) -> list[int]:
    """Return the processes of a job's srun, the first one first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if words[0] == b"srun" and any(job_id.encode() in word for word in words):
                found.append(int(path.name))
    return sorted(found)


def _kill_both_sruns(job_id: str) -> None:
    """Stop both, then kill both: one that noticed the end of the other would end the job."""
    for number in signal.SIGSTOP, signal.SIGKILL:
        for pid in _sruns(job_id):
            os.kill(pid, number)


def _number(worker: SlurmWorker, job_id: str) -> str:
    (number,) = [job.number for job in worker.cluster.jobs() if job.job_id == job_id]
    return number


# --- what a job is --------------------------------------------------------------------------


def test_job_runs_on_a_node(worker: SlurmWorker, cluster: Cluster) -> None:
    """Its output, exit code, node, usage and limits are known."""
    job, output = _run(worker, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert output == b"out\nerr\n"
    assert (job.status, job.end_reason, job.exit_code) == (Status.FINISHED, EndReason.EXITED, 7)
    assert job.node in cluster.nodes
    assert job.limits.memory_bytes == 64 << 20
    assert job.usage is not None
    assert job.usage.cpu_user_s is not None
    assert job.reason == ""


@pytest.mark.parametrize(
    ("command", "options", "error"),
    [
        ("no-such-command", {}, CommandNotFoundError),
        ("/etc/passwd", {}, CommandNotExecutableError),
        ("true", {"cwd": "/no/such/directory"}, DirectoryError),
        ("true", {"keep_tmp": True}, ResourceError),
    ],
)
def test_start_that_fails_leaves_nothing(
    worker: SlurmWorker, command: str, options: dict[str, Any], error: type[Exception]
) -> None:
    """It raises what a worker of one machine raises."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        worker.start(command, **options)
    assert worker.list() == ()
    _run(worker, "true")
    assert len(os.listdir("/proc/self/fd")) <= before + 10  # the next job's spare


@pytest.mark.parametrize(
    "script", ["exit 143", "exit 137", "exit 1", "exit 0", "kill -TERM $$", "kill -KILL $$"]
)
def test_end_is_that_of_the_command(worker: SlurmWorker, script: str) -> None:
    """srun's exit code is the same for several of these."""
    job, _ = _run(worker, "sh", "-c", script)
    what, number = script.split()[:2]
    if what == "exit":
        assert (job.end_reason, job.exit_code, job.signal) == (EndReason.EXITED, int(number), None)
    else:
        name = getattr(signal, f"SIG{number[1:]}")
        assert (job.end_reason, job.exit_code, job.signal) == (EndReason.SIGNALLED, None, name)


def test_argv_of_100000_bytes_and_secret_variables(worker: SlurmWorker) -> None:
    """They arrive, and no command line has them."""
    long = "x" * 65_000
    job_id = _begun(
        worker,
        *("sh", "-c", 'echo "$A$1$2" | md5sum; exec sleep 1000', "sh", long, "y" * 35_000),
        env={"A": "geheim"},
    )
    with worker.stream(job_id, follow=False) as chunks:
        output = b"".join(chunks)
    text = f"geheim{long}{'y' * 35_000}\n".encode()
    assert output.split()[0].decode() == hashlib.md5(text, usedforsecurity=False).hexdigest()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert b"geheim" not in path.read_bytes()


def test_50_megabytes_are_exact_through_ten_followers(worker: SlurmWorker, tmp_path: Path) -> None:
    """Each gets every byte."""
    data = os.urandom(50_000_000)
    (tmp_path / "data").write_bytes(data)
    job_id = worker.start("cat", [str(tmp_path / "data")])

    def digest(_: int) -> bytes:
        found = hashlib.sha256()
        with worker.stream(job_id) as chunks:
            for chunk in chunks:
                found.update(chunk)
        return found.digest()

    with ThreadPoolExecutor(10) as pool:
        assert set(pool.map(digest, range(10))) == {hashlib.sha256(data).digest()}
    assert _end(worker, job_id).end_reason is EndReason.EXITED


def test_output_is_live(worker: SlurmWorker) -> None:
    """A follower gets it while the job runs."""
    job_id = worker.start("sh", ["-c", "echo first; exec sleep 1000"])
    with worker.stream(job_id) as chunks:
        assert next(chunks) == b"first\n"
        assert worker.status(job_id).status is Status.RUNNING


def test_tiny_writes_are_taken_together(
    worker: SlurmWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun passes on each; all that comes in the pause after the first line is moved at once.

    The pause is endless in this test, so only the end of the job can end the pause.
    """
    monkeypatch.setattr("buffers.rest_ms", lambda *_: 1_000_000_000)
    move, sizes = SlurmJob._move_output, []

    def move_and_note(job: SlurmJob, most: int | None = None) -> int:
        sizes.append(move(job, most))
        return sizes[-1]

    monkeypatch.setattr(SlurmJob, "_move_output", move_and_note)
    orders, answers = (make_fifo(tmp_path / name) for name in ("orders", "answers"))
    script = (
        f"echo first; exec 3<{orders} 4>{answers}; "
        "for x in $(seq 20); do read y <&3; echo $x; echo >&4; done; exit 7"
    )
    job_id = worker.start("sh", ["-c", script])
    with worker.stream(job_id) as chunks:
        assert next(chunks) == b"first\n"
        with orders.open("w", buffering=1) as order, answers.open() as answer:
            for _ in range(20):
                order.write("\n")
                answer.readline()
        rest = b"".join(chunks)
    assert rest == b"".join(b"%d\n" % number for number in range(1, 21))
    assert [size for size in sizes if size] == [6, len(rest)]
    assert _end(worker, job_id).exit_code == 7


def test_input_reaches_the_job(worker: SlurmWorker) -> None:
    """More than may be on its way at once, to its end."""
    data = os.urandom(300_000)
    job_id = worker.start("sha256sum", stdin=True)
    assert worker.write_input(job_id, data, end=True) == len(data)
    with worker.stream(job_id) as chunks:
        assert b"".join(chunks).split()[0].decode() == hashlib.sha256(data).hexdigest()


# --- how it ends ----------------------------------------------------------------------------


def test_stop_ends_what_left_the_session(worker: SlurmWorker, tmp_path: Path) -> None:
    """All of it is gone when the stop returns."""
    pids = tmp_path / "pids"
    script = (
        f"setsid sh -c 'setsid sleep 1000 & echo $! >{pids}; echo; exec sleep 1000' & sleep 1000"
    )
    job_id = _begun(worker, "sh", "-c", script)
    job = worker.stop(job_id, reason="why")
    assert (job.status, job.end_reason, job.stop_reason) == (
        *(Status.STOPPED, EndReason.STOPPED),
        "why",
    )
    assert not Path(f"/proc/{pids.read_text().strip()}").exists()


def test_stop_with_grace(worker: SlurmWorker) -> None:
    """The job ends as it likes, and is stopped."""
    job_id = _begun(worker, "sh", "-c", "trap 'exit 3' TERM; echo; while :; do sleep 0.1; done")
    job = worker.stop(job_id, grace=GUARD_S)
    assert (job.end_reason, job.exit_code) == (EndReason.STOPPED, 3)


def test_signal_and_timeout(worker: SlurmWorker) -> None:
    """A signal ends a job without stopping it; the timeout stops it."""
    job_id = worker.start("sleep", ["1000"])
    worker.signal(job_id, signal.SIGHUP)
    job = _end(worker, job_id)
    assert (job.end_reason, job.signal) == (EndReason.SIGNALLED, signal.SIGHUP)
    late, _ = _run(worker, "sleep", "1000", ending=Ending(timeout=0.1, grace=0))
    assert (late.status, late.end_reason) == (Status.STOPPED, EndReason.TIMED_OUT)


def test_out_of_memory_is_told_by_the_node(worker: SlurmWorker) -> None:
    """And a leader that lives on keeps its own exit code, although srun reports 1."""
    eater = "x = bytearray(300 << 20)"
    job, _ = _run(worker, "/usr/bin/python3", "-c", eater)
    assert job.end_reason is EndReason.OUT_OF_MEMORY
    survivor, _ = _run(worker, "sh", "-c", f"/usr/bin/python3 -c '{eater}'; exit 5")
    assert (survivor.end_reason, survivor.exit_code) == (EndReason.EXITED, 5)
    assert survivor.usage is not None
    assert survivor.usage.oom_kills


@pytest.mark.parametrize("script", ["exec sleep 1000", "trap '' TERM; while :; do sleep 1; done"])
def test_cancelled_by_the_administrator(worker: SlurmWorker, script: str) -> None:
    """Also if the command ignores SIGTERM, and its wrapper is killed with it."""
    job_id = _begun(worker, "sh", "-c", f"echo; {script}")
    subprocess.run(["scancel", _number(worker, job_id)], env=worker.cluster.environment, check=True)
    job = _end(worker, job_id)
    assert (job.status, job.end_reason) == (Status.FINISHED, EndReason.CANCELLED)
    assert "CANCELLED" in job.reason


def test_cancelled_command_gets_sigterm(worker: SlurmWorker) -> None:
    """So its own end is known, and its TMPDIR is removed."""
    script = "trap 'echo bye; exit 3' TERM; echo $TMPDIR; while :; do sleep 0.1; done"
    job_id = worker.start("sh", ["-c", script])
    with worker.stream(job_id) as chunks:
        tmp = next(chunks)
        number = _number(worker, job_id)
        subprocess.run(["scancel", number], env=worker.cluster.environment, check=True)
        rest = b"".join(chunks)
    job = _end(worker, job_id)
    assert (rest[-4:], job.exit_code, job.end_reason) == (b"bye\n", 3, EndReason.CANCELLED)
    assert not Path(tmp.decode().strip()).exists()


def test_epilog_removes_the_tmpdir_that_a_killed_wrapper_has_left(
    worker: SlurmWorker, cluster: Cluster
) -> None:
    """With all that is in it."""
    script = 'mkdir "$TMPDIR/a"; touch "$TMPDIR/a/b"; echo "$TMPDIR"; exec sleep 1000'
    job_id = worker.start("sh", ["-c", script])
    with worker.stream(job_id) as chunks:
        tmp = Path(next(chunks).decode().strip())
    assert (tmp / "a" / "b").exists()
    cluster.run("scancel", "--signal=KILL", f"{_number(worker, job_id)}.0")
    _end(worker, job_id)
    assert not cluster.await_no_jobs(worker.cluster.name)
    assert not tmp.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="slurmd executes the Epilog as root")
def test_epilog_removes_nothing_else(tmp_path: Path) -> None:
    """Neither what another user has given such a name, nor what a link points to."""
    number = f"{uuid.uuid4().int}"
    theirs, other, link = (Path(f"/tmp/jw-{name}.{number}") for name in ("a", "b", "c"))
    with contextlib.ExitStack() as undo:
        for path in theirs, other, tmp_path / "target":
            path.mkdir()
            (path / "file").touch()
        link.symlink_to(tmp_path / "target")
        undo.callback(link.unlink, missing_ok=True)
        undo.callback(shutil.rmtree, other)
        undo.callback(shutil.rmtree, theirs, ignore_errors=True)
        for path in theirs, theirs / "file", tmp_path / "target", tmp_path / "target" / "file":
            os.chown(path, NOBODY, NOBODY)
        tmp_path.chmod(0o755)
        done = subprocess.run(
            [str(_HERE / "deploy" / "slurm-epilog")],
            env={"PATH": os.defpath, "SLURM_JOB_ID": number, "SLURM_JOB_UID": str(NOBODY)},
            check=True,
            capture_output=True,
        )
        assert not theirs.exists(), done
        assert (other / "file").exists()
        assert (tmp_path / "target" / "file").exists()


def test_job_whose_srun_is_killed_is_lost(worker: SlurmWorker) -> None:
    """Whether the first of its two processes is killed or both; the sweep ends what runs on."""
    job_id = _begun(worker, "sh", "-c", "echo; exec sleep 1000")
    _kill_both_sruns(job_id)
    assert _end(worker, job_id).end_reason is EndReason.LOST
    assert worker.sweep() == [job_id]
    second = _begun(worker, "sh", "-c", "echo; exec sleep 1000")
    os.kill(_sruns(second)[0], signal.SIGKILL)
    assert _end(worker, second).end_reason is EndReason.LOST


def test_what_a_killed_program_left_is_ended(cluster: Cluster, tmp_path: Path) -> None:
    """Its fork server ends each srun, and srun ends its job."""
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[1])\n"
        "from slurmworker import *\n"
        "w = SlurmWorker(SlurmSettings(conf=sys.argv[2]), 'killed', output_dir=sys.argv[3])\n"
        "w.start('sleep', ['1000']); w.start('sleep', ['1000'])\n"
        "print(len(w.cluster.jobs()), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, str(_HERE), str(cluster.conf), str(tmp_path / "o")]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=GUARD_S)
    assert (done.stdout, done.returncode) == (b"2\n", -signal.SIGKILL)
    assert not cluster.await_no_jobs("jw-killed")


def test_left_over_jobs_are_ended_at_the_start(
    make: Callable[..., SlurmWorker], cluster: Cluster
) -> None:
    """By name: those of other workers are not touched."""
    command = ["srun", "--mpi=none", f"--comment={uuid.uuid4()}", "--mem=64", "sleep", "1000"]
    processes = [
        subprocess.Popen(
            [*command[:1], f"--job-name=jw-{name}", *command[1:]],
            env=os.environ | cluster.environment,
            stderr=subprocess.DEVNULL,
        )
        for name in ("left", "other")
    ]
    other = make("other-worker")
    script = 'for i in $(seq 200); do [ "$(squeue -h -t R --name=jw-left,jw-other | wc -l)" = 2 ]'
    subprocess.run(
        ["sh", "-c", f"{script} && exit; sleep 0.1; done; exit 1"],
        env=os.environ | cluster.environment,
        check=True,
    )
    make("left")
    assert processes[0].wait(GUARD_S) != 0
    assert processes[1].poll() is None
    assert other.sweep() == []
    processes[1].terminate()
    processes[1].wait(GUARD_S)


def test_forged_comment_ends_no_job_of_others(
    make: Callable[..., SlurmWorker], cluster: Cluster
) -> None:
    """Neither the start nor the sweep believes the lines of squeue that a user has made up."""

    def begin(name: str, comment: str) -> tuple[subprocess.Popen[bytes], str]:
        options = [f"--job-name={name}", f"--comment={comment}", "--mpi=none", "--mem=64"]
        process = subprocess.Popen(
            ["srun", *options, "sh", "-c", "echo $SLURM_JOB_ID; exec sleep 1000"],
            env=os.environ | cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        return process, process.stdout.readline().decode().strip()

    victim, number = begin("other", "mine")
    lines = [f"{each}|0|{uuid.uuid4()}" for each in (number, "--user=root")]
    forger, _ = begin("jw-forged", "\n".join(["x", *lines, f"{number}|0|y", ""]))
    try:
        shown = cluster.run("squeue", "--noheader", "--name=jw-forged", "--format=%i|%U|%k")
        assert set(lines) <= set(shown.splitlines())
        worker = make("forged")
        assert worker.sweep() == []
        worker.cluster.cancel([number])  # even then: its name is another one
        assert (victim.poll(), forger.poll()) == (None, None)
        running = cluster.run("squeue", "--noheader", f"--jobs={number}", "--format=%T")
        assert running == "RUNNING\n"
    finally:
        for process in victim, forger:
            process.terminate()
            process.communicate()


def test_fork_server_that_dies_takes_the_jobs_with_it(
    make: Callable[..., SlurmWorker], cluster: Cluster
) -> None:
    """They are lost, and nothing of them runs on."""
    worker = make("orphans")
    job_id = _begun(worker, "sh", "-c", "echo; exec sleep 1000")
    kill_fork_server(worker)
    assert _end(worker, job_id).end_reason is EndReason.LOST
    assert not cluster.await_no_jobs("jw-orphans")


def test_job_is_lost_with_its_fork_server_although_its_worker_ends(
    make: Callable[..., SlurmWorker],
) -> None:
    """A worker without a fork server is closed at once, and its jobs' srun may not be gone yet."""
    worker = make("orphans")
    job_id = _begun(worker, "sh", "-c", "echo; exec sleep 1000")
    job, srun = worker.observe(job_id), _sruns(job_id)[0]
    os.kill(srun, signal.SIGSTOP)
    kill_fork_server(worker)
    worker.close()
    os.kill(srun, signal.SIGCONT)
    assert job().end_reason is EndReason.LOST


def test_end_that_the_step_has_told_is_that_of_a_job_whose_fork_server_dies(
    worker: SlurmWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its exit code."""
    take = SlurmJob._take_event

    def take_and_kill(job: SlurmJob, event: dict[str, Any]) -> None:
        take(job, event)
        if event["event"] == "end":
            kill_fork_server(worker)

    monkeypatch.setattr(SlurmJob, "_take_event", take_and_kill)
    job, output = _run(worker, "sh", "-c", "echo all; exit 5")
    assert (output, job.end_reason, job.exit_code) == (b"all\n", EndReason.EXITED, 5)


def test_start_that_its_fork_server_does_not_survive_is_not_repeated(
    worker: SlurmWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command has been executed before the worker knew that, so the job is kept as LOST."""
    is_dead = threading.Event()

    def read_too_late(_: Channel) -> bytes:
        is_dead.wait(GUARD_S)
        return b""

    monkeypatch.setattr(Channel, "read", read_too_late)
    fifo, request_id = make_fifo(tmp_path / "fifo"), str(uuid.uuid4())
    with ThreadPoolExecutor() as pool:
        start = pool.submit(
            worker.start, "sh", ["-c", f"echo >{fifo}; exec sleep 1000"], request_id=request_id
        )
        fifo.read_text()
        kill_fork_server(worker)
        is_dead.set()
        with pytest.raises(SpawnerDiedError):
            start.result(GUARD_S)
    found = worker.started_by("", request_id)
    assert found is not None
    assert worker.status(found[0]).end_reason is EndReason.LOST


def test_job_that_writes_to_the_stderr_of_its_step(
    worker: SlurmWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """As if it were Slurm: a line without an end, and many lines, cost the server little."""
    script = (
        "exec 2>/proc/$PPID/fd/2; head -c 20000000 /dev/zero | tr '\\0' x >&2; echo >&2; "
        "for i in $(seq 300); do echo says $i >&2; done; exit 3"
    )
    caplog.set_level("INFO", "slurmjob")
    tracemalloc.start()
    try:
        job, _ = _run(worker, "sh", "-c", script)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (job.end_reason, job.exit_code) == (EndReason.EXITED, 3)
    assert peak < 10_000_000
    said = [text for text in caplog.messages if "Slurm says" in text]
    assert any("says 1" in text for text in said)
    assert len(said) <= 100
    assert max(map(len, said)) < 2000


_END = {
    "event": "end",
    "exit_code": 0,
    "signal": None,
    "bytes": 0,
    "is_killed": False,
    "is_terminated": False,
    "is_cancelled": False,
    "killed": 0,
    "usage": {},
}
_FORGED: tuple[object, ...] = (
    {"event": []},
    {"event": "started"},
    {"event": "started", "limits": [], "id": "1", "node": "n"},
    {"event": "started", "limits": {"pids": 1 << 70}, "id": "1", "node": "n"},
    {"event": "started", "limits": {}, "id": "1", "node": "\n" * 9},
    {"event": "ack", "bytes": 1 << 200},
    {"event": "ack", "bytes": "x"},
    {"event": "refused", "missing": [1]},
    {"event": "failed", "stage": "exec", "errno": 1 << 70},
    _END | {"exit_code": 1 << 31},
    _END | {"exit_code": True},
    _END | {"exit_code": None, "signal": 1 << 31},
    _END | {"exit_code": None},
    _END | {"bytes": 1 << 70},
    _END | {"bytes": -1},
    _END | {"killed": 1 << 40},
    _END | {"usage": 1},
    _END | {"usage": {"cpu_user_s": "x", "io_reads": 1 << 64, "cpu_system_s": float("nan")}},
)


def test_reports_that_a_job_forges_harm_nobody(worker: SlurmWorker) -> None:
    """They are not of the types, or beyond the numbers, that store and protocol can have."""
    lines = "".join(json.dumps(each) + "\n" for each in _FORGED) + '{"event":' * 5000 + "\n"
    script = "cat <<'X' >/proc/$PPID/fd/2\n" + lines + "X\n"
    job, _ = _run(worker, "sh", "-c", script + "exit 3")
    assert (job.end_reason, job.exit_code) == (EndReason.EXITED, 3)
    killed, _ = _run(worker, "sh", "-c", script + "kill -9 $PPID; exec sleep 1000")
    assert killed.end_reason is EndReason.EXITED  # the last one of these ends makes sense
    assert killed.usage == Usage()
    for each in worker.list():
        job_message(each)


# --- the queue --------------------------------------------------------------------------------


@pytest.fixture
def full(worker: SlurmWorker) -> list[str]:
    """The jobs that take up both nodes."""
    return [_begun(worker, "sh", "-c", "echo; exec sleep 1000", limits=_WHOLE_NODE) for _ in "12"]


def test_job_waits_in_the_queue(worker: SlurmWorker, full: list[str]) -> None:
    """It is listed with Slurm's reason and followed; its stream begins when it starts."""
    with worker.watch() as watch:
        job_id = worker.start("echo", ["hello"], limits=_WHOLE_NODE)
        state = worker.status(job_id)
        assert (state.status, state.node) == (Status.QUEUED, "")
        assert state.reason in {"Resources", "Priority", "queued", "None"}
        assert [
            job.job_id for job in worker.list(matching=JobFilter(statuses={Status.QUEUED}))
        ] == [job_id]
        with pytest.raises(SignalError, match="queue"):
            worker.signal(job_id, signal.SIGHUP)
        with worker.stream(job_id) as chunks, ThreadPoolExecutor(1) as pool:
            output = pool.submit(b"".join, chunks)
            worker.stop(full[0])
            assert output.result(GUARD_S) == b"hello\n"
        assert _end(worker, job_id).end_reason is EndReason.EXITED
        events = []
        for event in watch:
            if event.job.job_id == job_id:
                events.append((event.kind, event.job.status))
                if event.kind is JobEventKind.ENDED:
                    break
    assert events == [
        (JobEventKind.STARTED, Status.QUEUED),
        (JobEventKind.STARTED, Status.RUNNING),
        (JobEventKind.ENDED, Status.FINISHED),
    ]


def test_queued_job_is_stopped(worker: SlurmWorker, full: list[str]) -> None:
    """It never runs, and its stream ends."""
    assert full
    job_id = worker.start("echo", ["hello"], limits=_WHOLE_NODE)
    job = worker.stop(job_id)
    assert (job.status, job.end_reason, job.output_bytes) == (
        *(Status.STOPPED, EndReason.STOPPED),
        0,
    )
    with worker.stream(job_id) as chunks:
        assert list(chunks) == []


def test_start_without_queue_fails(worker: SlurmWorker, full: list[str]) -> None:
    """With Slurm's words, and it leaves nothing."""
    with pytest.raises(ResourceError, match="nodes are busy"):
        worker.start("echo", ["hello"], limits=_WHOLE_NODE, no_queue=True)
    assert len(worker.list()) == len(full)


def test_close_ends_running_and_queued_jobs(make: Callable[..., SlurmWorker]) -> None:
    """And a start that waits."""
    worker = make("closing")
    ids = [worker.start("sleep", ["1000"], limits=_WHOLE_NODE) for _ in "123"]
    waiting = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(waiting.set).result()
        last = pool.submit(worker.start, "true", limits=_WHOLE_NODE, no_queue=True)
        worker.close()
        with pytest.raises(Exception, match=r"shutting down|did not take"):
            last.result(GUARD_S)
    assert {worker.status(each).end_reason for each in ids} == {EndReason.CLOSED}


def test_close_while_jobs_end(make: Callable[..., SlurmWorker]) -> None:
    """A job that ends by itself at that moment does not make it fail."""
    worker = make("ending")
    ids = [worker.start("true") for _ in range(20)]
    worker.close()
    assert {worker.status(each).end_reason for each in ids} <= {
        *(EndReason.EXITED, EndReason.CLOSED)
    }


# --- limits and users -----------------------------------------------------------------------


def test_required_limit_that_no_node_enforces(make: Callable[..., SlurmWorker]) -> None:
    """The job does not run; with memory alone it does."""
    memory = Limits(None, 64 << 20, None, None, None, None)
    worker = make("strict", enforcement="require", limits=memory)
    assert _run(worker, "true")[0].end_reason is EndReason.EXITED
    with pytest.raises(ResourceError, match="io_write_bps"):
        worker.start("true", limits=Limits(None, 64 << 20, None, None, 1 << 20, None))


@pytest.fixture
def cluster_v2() -> Iterator[Cluster]:
    """A node whose limits are those of cgroup v2, with our Prolog. Its kernel is a bootable one."""
    if problem := missing():
        pytest.skip(problem)
    if "JOBWORKER_IN_KERNEL" in os.environ:  # its network is only the loopback
        socket.sethostname("localhost")
        subprocess.run(["ip", "addr", "add", "10.9.9.1/32", "dev", "lo"], check=True)
    top = Path("/sys/fs/cgroup")
    (top / "system.slice").mkdir(exist_ok=True)
    for place in (top, top / "system.slice"):
        (place / "cgroup.subtree_control").write_text("+cpu +io +memory +pids")
    with (
        tempfile.TemporaryDirectory() as name,
        Cluster(Path(name), nodes=1, more=f"Prolog={_HERE}/deploy/slurm-prolog") as cluster,
    ):
        yield cluster


@pytest.mark.kernel
def test_node_enforces_each_limit_with_our_prolog(cluster_v2: Cluster) -> None:
    """So a job that requires them runs; one that requires what Slurm does not enforce does not."""
    settings = SlurmSettings(conf=str(cluster_v2.conf))
    limits = Limits(None, 256 << 20, None, 2 << 20, 1 << 20, 30, 300, 200)
    with SlurmWorker(settings, "v2", enforcement="require", limits=limits) as worker:
        code = (
            "import os\n"
            "try:\n"
            "    for n in range(100):\n"
            "        if os.fork() == 0:\n"
            "            import signal; signal.pause()\n"
            "except OSError as error: print(n, error.errno, flush=True)"
        )
        job, output = _run(worker, "/usr/bin/python3", "-c", code, ending=Ending(linger=0))
        assert job.end_reason is EndReason.EXITED
        assert job.limits == replace(limits, swap_bytes=job.limits.swap_bytes)
        count, number = map(int, output.split())
        assert (count < 30, number) == (True, errno.EAGAIN)
        eater, _ = _run(worker, "/usr/bin/python3", "-c", "x = bytearray(500 << 20)")
        assert eater.end_reason is EndReason.OUT_OF_MEMORY
        # Slurm 22.05 limits swap to the memory limit, whatever cgroup.conf says.
        with pytest.raises(ResourceError, match="does not enforce swap_bytes;"):
            worker.start("true", limits=replace(limits, swap_bytes=0))
        with pytest.raises(ResourceError, match="does not enforce pids;"):
            worker.start("true", limits=replace(limits, pids=1))


def test_check_says_what_the_cluster_enforces(cluster: Cluster) -> None:
    """Memory here, and nothing that Slurm leaves to a Prolog; and why no job runs, if none does."""
    limits = Limits(None, 64 << 20, None, None, 1 << 20, None)
    job, memory, io_write = check(SlurmSettings(conf=str(cluster.conf)), limits)
    assert (job.works, memory.works, io_write.works) == (True, True, False)
    assert "node" in job.detail
    assert "slurm-prolog" in io_write.remedy
    (failed,) = check(SlurmSettings(options=("--partition=none",), conf=str(cluster.conf)), limits)
    assert (failed.works, "nvalid partition" in failed.detail) == (False, True)


def test_user_without_an_account_on_the_cluster(
    make: Callable[..., SlurmWorker], public: Path
) -> None:
    """The start fails with Slurm's words, and leaves nothing."""
    uid = 4_000_000
    uids = range(uid, uid + 1)
    worker = make("strangers", uids=uids, output_dir=public / "o", tmp_dir=public / "t")
    with pytest.raises(ResourceError, match=r"job credential|[Ii]nvalid"):
        worker.start("true", uid=uid)
    assert worker.list() == ()


def test_fraction_of_a_core_is_rounded_up(worker: SlurmWorker) -> None:
    """Slurm gives whole cores."""
    limits = Limits(cpu_cores=1.5, memory_bytes=64 << 20)
    _, output = _run(
        worker,
        "sh",
        "-c",
        "scontrol show job $(squeue -h -o %i) | grep -o NumCPUs=.",
        limits=limits,
        env={"SLURM_CONF": worker.cluster.environment["SLURM_CONF"]},
    )
    assert b"NumCPUs=2" in output


def test_job_runs_as_the_user_of_the_cluster(
    make: Callable[..., SlurmWorker], public: Path
) -> None:
    """With that user's uid and gid, and the sweep ends its jobs, too."""
    worker = make(
        "users",
        uids=range(NOBODY, NOBODY + 1),
        host_accounts=True,
        output_dir=public / "o",
        tmp_dir=public / "t",
    )
    job, output = _run(worker, "sh", "-c", "id -u; id -g", uid=NOBODY)
    assert (job.end_reason, output.split()) == (EndReason.EXITED, [b"65534", b"65534"])
    job_id = _begun(worker, "sh", "-c", "echo; exec sleep 1000", uid=NOBODY)
    _kill_both_sruns(job_id)
    assert _end(worker, job_id).end_reason is EndReason.LOST
    assert worker.sweep() == [job_id]


# --- a restart window. `pytest --slurm test_restart.py` has the rest -----------------------------


_KILLED = """
import json, os, sys
from store import Store
from test_slurmworker import next_worker
directory, conf, jobs = sys.argv[1:]
worker = next_worker(directory, conf, Store(directory + "/store"))
ids = [worker.start("sh", ["-c", each["script"]], stdin=each["stdin"]) for each in json.loads(jobs)]
print(json.dumps(ids), flush=True)
for job_id, size in zip(ids, map(int, sys.stdin.readline().split())):
    worker.write_input(job_id, bytes(range(256)) * (size // 256))
print(flush=True)
sys.stdin.read()
"""


def next_worker(directory: str, conf: str, store: Store, window_s: float = 1e6) -> SlurmWorker:
    """Return the next worker of a directory, which goes on with the jobs of the former one."""
    worker = SlurmWorker(
        SlurmSettings(conf=conf),
        "next",
        limits=_SMALL,
        store=store,
        output_dir=Path(directory) / "output",
        tmp_dir=Path(directory) / "tmp",
        restart_dir=Path(directory) / "restart",
        restart_window=window_s,
    )
    worker.resume()
    return worker


class _Restarts:
    """Workers of one directory, one after the other."""

    def __init__(self, directory: Path, cluster: Cluster) -> None:
        self.directory, self.conf = str(directory), str(cluster.conf)
        self.worker: SlurmWorker | None = None

    def open(self, window_s: float = 1e6) -> SlurmWorker:
        self.store = Store(Path(self.directory) / "store")
        self.worker = next_worker(self.directory, self.conf, self.store, window_s)
        return self.worker

    def leave(self) -> int:
        """Leave the worker to the next one; return the pid of the fork server."""
        assert self.worker is not None
        pid = self.worker._spawner.pid
        self.worker.leave()
        self.worker.close()
        self.store.close()
        return pid

    def again(self) -> SlurmWorker:
        self.leave()
        return self.open()

    @contextlib.contextmanager
    def killed(self, *jobs: dict[str, Any], sizes: str = "") -> Iterator[list[str]]:
        """Have another process start jobs and write inputs; it is killed after this context."""
        command = [sys.executable, "-c", _KILLED, self.directory, self.conf, json.dumps(jobs)]
        with subprocess.Popen(
            command, cwd=_HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            ids = json.loads(process.stdout.readline())
            process.stdin.write(f"{sizes}\n")
            process.stdin.flush()
            process.stdout.readline()
            yield ids
            process.kill()


@pytest.fixture
def restarts(cluster: Cluster, tmp_path: Path) -> Iterator[_Restarts]:
    """Workers of one directory; nothing of theirs is left on the cluster at the end."""
    made = _Restarts(tmp_path, cluster)
    yield made
    if made.worker is not None:
        made.worker.close()
        made.store.close()
    assert not cluster.await_no_jobs("jw-next")


def _on_fifo(path: Path) -> str:
    os.mkfifo(path)
    return f"read x <{path}"


def test_queued_jobs_outlive_their_worker(restarts: _Restarts, tmp_path: Path) -> None:
    """One waits on with the next worker, and runs once; no sweep takes it for a leftover."""
    worker = restarts.open()
    waits = _on_fifo(tmp_path / "fifo"), _on_fifo(tmp_path / "other")
    full = [_begun(worker, "sh", "-c", f"echo; {each}", limits=_WHOLE_NODE) for each in waits]
    script = f"echo $JOB_ID >>{tmp_path}/runs; sleep 0.2; exit 3"
    times = Ending(timeout=GUARD_S)
    job_id = worker.start("sh", ["-c", script], limits=_WHOLE_NODE, ending=times)
    worker = restarts.again()
    assert worker.status(job_id).status is Status.QUEUED
    assert worker.sweep() == []
    restarts.leave()
    (tmp_path / "fifo").write_text("\n")  # the queued job begins while there is no worker
    worker = restarts.open()
    job = _end(worker, job_id)
    assert (job.end_reason, job.exit_code, job.node != "") == (EndReason.EXITED, 3, True)
    assert (tmp_path / "runs").read_text() == f"{job_id}\n"
    assert _end(worker, full[0]).end_reason is EndReason.EXITED
    job = worker.stop(full[1], reason="why")
    assert (job.end_reason, job.stop_reason, job.node != "") == (EndReason.STOPPED, "why", True)


def test_killed_worker_loses_no_byte_of_input_and_output(
    restarts: _Restarts, tmp_path: Path
) -> None:
    """Neither of what was on its way to the command, nor of what it writes meanwhile."""
    data = os.urandom(2_000_000)
    (tmp_path / "data").write_bytes(data)
    waits = _on_fifo(tmp_path / "fifo"), _on_fifo(tmp_path / "other")
    reads = {"script": f"{waits[0]}; sha256sum", "stdin": True}
    writes = {"script": f"echo; {waits[1]}; cat {tmp_path}/data; exit 6", "stdin": False}
    with restarts.killed(reads, writes, sizes=str(80 * 1024)) as (reader, writer):
        pass
    for name in "fifo", "other":
        (tmp_path / name).write_text("\n")
    worker = restarts.open()
    block = bytes(range(256))
    assert worker.status(reader).input_bytes == 80 * 1024
    worker.write_input(reader, block * 100, offset=80 * 1024, end=True)
    with worker.stream(reader) as chunks:
        found = b"".join(chunks).split()[0].decode()
    assert found == hashlib.sha256(block * (320 + 100)).hexdigest()
    with worker.stream(writer) as chunks:
        assert b"".join(chunks) == b"\n" + data
    assert _end(worker, writer).exit_code == 6


def test_jobs_end_when_no_next_worker_comes(restarts: _Restarts, tmp_path: Path) -> None:
    """On the cluster, too; one that had ended by itself has its own end."""
    worker = restarts.open(window_s=1)
    waits = _on_fifo(tmp_path / "fifo")
    ends = worker.start("sh", ["-c", f"{waits}; exit 5"])
    runs = _begun(worker, "sh", "-c", "echo out; exec sleep 1000")
    pid = restarts.leave()
    (tmp_path / "fifo").write_text("\n")
    os.waitpid(pid, 0)
    script = 'squeue -h --name=jw-next -o "%T" | grep -v COMPLETING'
    done = subprocess.run(
        ["sh", "-c", script], env=os.environ | worker.cluster.environment, check=False
    )
    assert done.returncode == 1
    worker = restarts.open()
    job = _end(worker, runs)
    assert (job.status, job.end_reason) == (Status.STOPPED, EndReason.CLOSED)
    assert b"".join(worker.stream(runs)) == b"out\n"
    assert (_end(worker, ends).end_reason, _end(worker, ends).exit_code) == (EndReason.EXITED, 5)


def test_waiting_jobs_are_ended_on_demand(restarts: _Restarts) -> None:
    """As by `server stop --jobs` while no server runs: running and queued ones."""
    worker = restarts.open()
    ids = [worker.start("sleep", ["1000"], limits=_WHOLE_NODE) for _ in "123"]
    assert worker.status(ids[2]).status is Status.QUEUED
    restarts.leave()
    assert end_jobs(Path(restarts.directory) / "restart")
    worker = restarts.open()
    assert {_end(worker, each).end_reason for each in ids} == {EndReason.CLOSED}


def test_next_worker_cancels_what_a_killed_fork_server_has_left(
    restarts: _Restarts, cluster: Cluster
) -> None:
    """The jobs are LOST and run nowhere, although each srun was killed with the fork server."""
    worker = restarts.open()
    job_id = _begun(worker, "sh", "-c", "echo; exec sleep 1000")
    pid = restarts.leave()
    _kill_both_sruns(job_id)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    worker = restarts.open()
    assert _end(worker, job_id).end_reason is EndReason.LOST
    assert not cluster.await_no_jobs("jw-next")


def test_jobs_of_a_cluster_are_refused_to_another_worker(restarts: _Restarts) -> None:
    """One without a cluster, or with another one, could not end them."""
    worker = restarts.open()
    job_id = _begun(worker, "sh", "-c", "echo; exec sleep 1000")
    restarts.leave()
    directory = Path(restarts.directory)
    options: dict[str, Any] = {name: directory / name for name in ("tmp", "restart", "output")}
    options = {f"{name}_dir": path for name, path in options.items()}
    with (
        Store(directory / "store") as store,
        pytest.raises(TakeoverError, match=r"jobs run on the cluster of .*, and not none"),
    ):
        Worker(enforcement="off", store=store, **options)
    assert restarts.open().status(job_id).status is Status.RUNNING


def test_killed_and_ended_servers_go_on_with_jobs_and_followers(
    cluster: Cluster,
    certs: Path,
    public: Path,
    start_server: Callable[..., ServerProgram],
) -> None:
    """As an account of the cluster. A follower notices nothing; input goes on, and a stop works."""
    options = ["--restart-window", "1m", "--config", str(cluster.directory / "server.toml")]
    state = public / "state"
    server = start_server(*options, state=state)
    address = server.address
    with Client(address, certs=certs, retry_for=GUARD_S, connect_for=GUARD_S) as client:
        client.login("user", "user")
        job = client.start("sh", ["-c", "id -un; while read x; do echo $x; done"], stdin=True)
        with contextlib.closing(client.stream(job)) as stream:
            assert next(stream) == b"nobody\n"
            for offset, number in (0, signal.SIGKILL), (8, signal.SIGTERM):
                server.end(number)
                server = start_server("--listen", address, *options, state=state)
                line = f"{number.name}\n".encode()
                client.write_input(job, line, offset, end=False)
                assert next(stream) == line
            assert client.stop(job).node.startswith("node")
            assert list(stream) == []
    assert server.end() == 0


def test_journal_keeps_its_ends_for_another_process() -> None:
    """It goes on where the former one stopped, and the middle costs no memory."""
    read_fd, write_fd = os.pipe()
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, read_fd)
        undo.callback(os.close, write_fd)
        journal = Journal()
        undo.callback(journal.close)
        with pytest.raises(BlockingIOError):
            journal.take(read_fd, 10)
        data = os.urandom(64) * 1000
        for _ in range(40):
            os.write(write_fd, data)
            assert journal.take(read_fd, len(data)) == data
        again = Journal(os.dup(journal.fd))
        undo.callback(again.close)
        assert again.size == 40 * len(data)
        assert again.parts() == [(data * 40)[:KEPT_BYTES], (data * 40)[-KEPT_BYTES:]]
        assert os.fstat(again.fd).st_blocks * 512 < 8 * KEPT_BYTES


# --- a part of the cluster dies -----------------------------------------------------------------


@pytest.fixture
def own_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster that the test may break. Its srun calls wait for the scheduler."""
    assert cluster  # or the test is skipped, like the others
    with (
        tempfile.TemporaryDirectory(prefix="cluster-") as name,
        Cluster(Path(name), more="SchedulerParameters=defer_batch") as own,
    ):
        yield own


def test_controller_that_is_gone_does_not_matter_to_running_jobs(own_cluster: Cluster) -> None:
    """Their output, ends and stops are as ever; starts fail with Slurm's words."""
    with SlurmWorker(SlurmSettings(conf=str(own_cluster.conf)), "x", limits=_SMALL) as worker:
        _lose_the_controller(worker, own_cluster)


def _lose_the_controller(worker: SlurmWorker, cluster: Cluster) -> None:
    assert _run(worker, "echo", "now", no_queue=True)[1] == b"now\n"  # although srun waits
    go_on = _begun(worker, "sh", "-c", "echo; read x; echo $x; exit 9", stdin=True)
    stopped = _begun(worker, "sh", "-c", "echo; exec sleep 1000")
    cluster.kill_controller()
    try:
        worker.write_input(go_on, b"more\n", end=True)
        job = _end(worker, go_on)
        assert (job.end_reason, job.exit_code, job.output_bytes) == (EndReason.EXITED, 9, 6)
        # Although srun asks for the controller for 10 s.
        assert worker.stop(stopped).end_reason is EndReason.STOPPED
        with pytest.raises(ResourceError, match=r"[Uu]nable to"):
            worker.start("true", no_queue=True)
    finally:
        cluster.start_controller()
        cluster.await_nodes()
    worker.sweep()  # the controller has not saved those ends
    assert _run(worker, "echo", "again")[1] == b"again\n"


def test_node_that_dies(worker: SlurmWorker, cluster: Cluster) -> None:
    """Its jobs end with NODE_FAILED, those of the other node go on, and it is used again."""
    limits = Limits(cpu_cores=40, memory_bytes=64 << 20)
    ids = [_begun(worker, "sh", "-c", "echo; exec sleep 1000", limits=limits) for _ in "12"]
    nodes = {worker.status(each).node: each for each in ids}
    first, second = cluster.nodes
    cluster.kill_node(first)
    try:
        job = _end(worker, nodes[first])
        assert (job.status, job.end_reason) == (Status.FINISHED, EndReason.NODE_FAILED)
        assert worker.status(nodes[second]).status is Status.RUNNING
    finally:
        cluster.start_node(first)
        cluster.await_nodes()
    again = [_begun(worker, "sh", "-c", "echo; exec sleep 1000", limits=limits)]
    assert worker.status(again[0]).node == first
