"""Tests of the worker with real jobs: without cgroups, and with them if the host has them.

A job tells the test how far it has come: it writes output, or opens a FIFO. A process that has a
FIFO open for writing keeps the test from reading end-of-file. So end-of-file proves that all such
processes are dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import resource
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest

import job
import processes
from argv import MAX_ARGV_BYTES
from buffers import _BUFFERS, rest_ms
from job import RunningJob
from limits import NO_LIMITS
from spawner import Process
from testkit import (
    ABSENT,
    GUARD_S,
    JOB_VARIABLES,
    LIBRARY,
    SIGNALLED_TREE,
    WITHOUT_FIRST_THREAD,
    await_lines,
    children_of,
    descriptors_of,
    discard_spares,
    hold_executions,
    job_files,
    job_processes,
    kill_fork_server,
    make_fifo,
    notice_close,
    settle_spares,
)
from worker import (
    CgroupError,
    CommandError,
    CommandNotExecutableError,
    CommandNotFoundError,
    Ending,
    EndReason,
    Enforcement,
    Job,
    Limits,
    OffsetError,
    OutputIncompleteError,
    ResourceError,
    SignalError,
    SpawnerDiedError,
    StartTimeoutError,
    Status,
    StopTimeoutError,
    UnknownJobError,
    UsageSource,
    Worker,
    WorkerClosedError,
    WorkerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HERE = Path(__file__).parent
_FOREVER = "exec sleep infinity"
_ENDLESS_MS = 1_000_000_000
# For a test of what happens before or after the fork, where the way to fork does not matter.
_ONE_WAY_TO_FORK = pytest.mark.parametrize("way_to_fork", ["clone3"], indirect=True)


@pytest.fixture(params=["off", "auto"])
def enforcement(request: pytest.FixtureRequest) -> Enforcement:
    return cast("Enforcement", request.param)


@pytest.fixture
def worker(
    enforcement: Enforcement,
    way_to_fork: str,  # noqa: ARG001 -- only to be run first
) -> Iterator[Worker]:
    """A worker with and without cgroups, each with both ways to fork."""
    with Worker(enforcement=enforcement) as worker:
        yield worker


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """A test must close all descriptors, end all threads and processes, and restore the cgroup."""

    def held() -> tuple[object, ...]:
        cgroup = Path("/proc/self/cgroup").read_text()
        return threading.active_count(), children_of(os.getpid()), cgroup

    descriptors, before = descriptors_of(), held()
    yield
    # A subset, because gRPC, which tests of other modules have used, may close descriptors late.
    assert set(descriptors_of()) <= set(descriptors)
    assert held() == before


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


class _Fifo:
    """A named pipe that jobs open for writing, or for reading."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def readline(self) -> bytes:
        """Block for one line from a job."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self.fd], [], [], GUARD_S)[0]
            byte = os.read(self.fd, 1)
            assert byte, line
            line += byte
        return line

    def is_held(self) -> bool:
        """Whether a process has the FIFO open for writing now."""
        try:
            return os.read(self.fd, 1) != b""
        except BlockingIOError:
            return True

    def await_release(self) -> None:
        """Block until no process has the FIFO open for writing."""
        assert select.select([self.fd], [], [], GUARD_S)[0]
        assert not self.is_held()


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[_Fifo]:
    """A FIFO that a job writes reports to, and that its processes hold open."""
    fifo = _Fifo(tmp_path / "fifo")
    yield fifo
    os.close(fifo.fd)


@pytest.fixture
def latch(tmp_path: Path) -> Path:
    """A FIFO that a job reads (`read x <latch`), so that it waits until the test writes a line."""
    path = tmp_path / "latch"
    os.mkfifo(path)
    return path


def _sh(
    worker: Worker,
    script: str,
    *args: str | Path,
    owner: str = "",
    ending: Ending | None = None,
    shell: str = "sh",
) -> str:
    """Start a shell script; its arguments are $1, $2, ..."""
    return worker.start(shell, ["-c", script, "sh", *map(str, args)], owner=owner, ending=ending)


def _polite(worker: Worker, ending: Ending | None = None, *, kind: str = "polite") -> str:
    """Start a job that says bye at SIGTERM and exits with 3, or goes on if it is "deaf"."""
    # The second line waits without a child, because a child that is being forked would miss the
    # signal; and never for long, because bash may take a signal right before it begins to wait.
    script = """
        trap 'echo bye; [ $1 = deaf ] || exit 3' TERM
        exec 3<> <(:); echo ready; while :; do read -t 0.1 -u 3 x; done"""
    job_id = _sh(worker, script, kind, ending=ending, shell="bash")
    assert _first_line(worker, job_id) == b"ready"
    return job_id


def _output(worker: Worker, job_id: str, offset: int = 0) -> bytes:
    """Return all of a job's output. Blocks until the job has ended."""
    with worker.stream(job_id, offset=offset) as chunks:
        return b"".join(chunks)


def _first_line(worker: Worker, job_id: str) -> bytes:
    """Block until the job has written a line; return the line."""
    with worker.stream(job_id) as chunks:
        output = b""
        while b"\n" not in output:
            output += next(chunks)
    return output.partition(b"\n")[0]


def _running(worker: Worker, job_id: str) -> RunningJob:
    """Return the object that looks after a job that has not ended."""
    job = worker._job(job_id)
    assert isinstance(job, RunningJob)
    return job


def _end(job: Job) -> tuple[Status, EndReason | None, int | None, int | None]:
    return job.status, job.end_reason, job.exit_code, job.signal


_STOPPED = (Status.STOPPED, EndReason.STOPPED, None, 9)
_EXITED_0 = (Status.FINISHED, EndReason.EXITED, 0, None)
_EXITED_7 = (Status.FINISHED, EndReason.EXITED, 7, None)
_LOST = (Status.FINISHED, EndReason.LOST, None, None)


def _traces(worker: Worker) -> dict[str, object]:
    """Return everything that a job could leave behind."""
    spawner = worker._spawner
    settle_spares(worker)
    spawner.kill("nobody")  # the fork server answers in order, so it has dealt with the rest
    jobs = worker.subtree.jobs if worker.subtree else None
    return {
        # Only how many, because the numbers of the spare's descriptors vary.
        "descriptors": len(descriptors_of()),
        "fork server's descriptors": len(descriptors_of(spawner.pid)),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": job_files(worker),
        "cgroups": len([path for path in jobs.iterdir() if path.is_dir()]) if jobs else 0,
        "processes": job_processes(spawner.pid),
        "spares": len(children_of(spawner.pid)) - len(job_processes(spawner.pid)),
        "jobs": worker.list(),
    }


def _await_reaped(worker: Worker) -> None:
    """Block until the fork server has reaped every child. No job may be running."""
    discard_spares(worker)
    worker._spawner.kill("nobody")  # the fork server answers in order, so all forks are done
    for pid in children_of(worker._spawner.pid):
        with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid)) as pidfd:
            assert select.select([pidfd], [], [], GUARD_S)[0]
    worker._spawner.kill("nobody")  # the fork server reaps before it answers
    assert children_of(worker._spawner.pid) == []


def _program(source: str, *args: str) -> list[str]:
    """Return the argv that runs `source` as a program that can import the library."""
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(_HERE)!r})\n{source}",
        *args,
    ]


# --- start ------------------------------------------------------------------------------------


def test_job_runs_and_tells_all_about_itself(worker: Worker) -> None:
    """A short job has a random UUID4, and after its end its output, exit code and times."""
    before = datetime.now(UTC)
    job_id = worker.start("sh", ["-c", "echo hi; exit 7"], owner="alice")
    job = worker.wait(job_id, GUARD_S)
    assert uuid.UUID(job_id).version == 4
    assert str(uuid.UUID(job_id)) == job_id == job.job_id
    assert (job.owner, job.command, job.args) == ("alice", "sh", ("-c", "echo hi; exit 7"))
    assert _end(job) == _EXITED_7
    assert job.ended_at is not None
    assert before <= job.started_at <= job.ended_at <= datetime.now(UTC)
    assert (job.output_bytes, job.subscribers) == (3, ())
    assert _output(worker, job_id) == b"hi\n"
    assert worker.status(job_id) == job


def test_running_job_has_no_end(worker: Worker) -> None:
    """While a job runs, it has no end time, no exit code and no end reason."""
    job = worker.status(_sh(worker, _FOREVER))
    assert _end(job) == (Status.RUNNING, None, None, None)
    assert job.ended_at is None


def test_without_cgroups_no_limit_is_claimed() -> None:
    """The status shows only limits that are in force; "off" enforces none."""
    with Worker(enforcement="off", limits=Limits(pids=5)) as worker:
        job = worker.status(worker.start("true"))
    assert job.limits == NO_LIMITS


_ARGVS = [
    ["two words", "", " ", "line\nbreak", "tab\t", ""],
    ["'single'", '"double"', "back\\slash", "`id`", "$HOME", "$(id)", "*", "~", ";", "|", "&"],
    ["ünï©ødé", "日本", "\N{PILE OF POO}", "not UTF-8: \udcff"],
    ["--", "-x", "--help", "--", "-"],
    ["x" * 100 * 1024],
]


def test_argv_arrives_as_given(worker: Worker) -> None:
    """The program gets the caller's arguments byte for byte: no shell, no quoting, no decoding."""
    for args in _ARGVS:
        job_id = worker.start("printf", ["%s\\0", *args])
        received = _output(worker, job_id).split(b"\0")[:-1]
        assert received == [os.fsencode(arg) for arg in args]
        assert worker.status(job_id).args[1:] == tuple(args)


def test_shell_syntax_is_not_a_command(worker: Worker) -> None:
    """A whole command line as the command is taken as the name of one program, which is missing."""
    with pytest.raises(CommandNotFoundError):
        worker.start("echo hello; id")


def test_leader_has_its_own_session_null_stdin_and_no_extra_descriptor(worker: Worker) -> None:
    """The job has no terminal and no input, and inherits no descriptor of the worker."""
    with open(__file__) as leak:
        os.set_inheritable(leak.fileno(), True)
        script = "cat /proc/$$/stat; echo $$; readlink /proc/$$/fd/0; pwd; ls -m /proc/self/fd"
        job_id = _sh(worker, script)
        stat_line, pid, stdin, directory, fds = _output(worker, job_id).decode().splitlines()
    _ppid, group, session, terminal = stat_line.rpartition(") ")[2].split()[1:5]
    assert (group, session, terminal) == (pid, pid, "0")
    assert (stdin, fds) == ("/dev/null", "0, 1, 2, 3")  # 3 is ls's own
    assert directory in {os.path.realpath(Path.home()), "/"}


def test_stdout_and_stderr_are_one_stream(worker: Worker) -> None:
    """Output on stdout and stderr is kept in the order in which it was written."""
    job_id = _sh(worker, "echo 1; echo 2 >&2; echo 3; echo 4 >&2")
    assert _output(worker, job_id) == b"1\n2\n3\n4\n"


def test_environment_is_exactly_the_documented_one(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job does not get the worker's own variables, some of which may be secrets."""
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    job_id = worker.start("env", ["-0"])
    entries = _output(worker, job_id).decode().split("\0")[:-1]
    environment = dict(entry.split("=", 1) for entry in entries)
    assert len(entries) == len(environment)
    assert environment.keys() == JOB_VARIABLES
    assert environment["JOB_ID"] == job_id
    assert environment["LANG"] == "C.UTF-8"
    assert environment["PATH"].endswith("/usr/bin:/sbin:/bin")
    assert environment["HOME"].startswith("/")
    assert environment["USER"]


_NOT_COMMANDS: list[tuple[str, list[str], type[CommandError], str]] = [
    ("", [], CommandError, "empty"),
    ("tr\0ue", [], CommandError, "NUL"),
    ("true", ["a\0b"], CommandError, "NUL"),
    ("true", ["\ud800"], CommandError, "encoded"),
    ("no-such-command", [], CommandNotFoundError, "not found in /usr/local/sbin:"),
    ("/no/such/file", [], CommandNotFoundError, "no such file"),
    ("/etc/passwd/x", [], CommandNotFoundError, "no such file"),
    ("ls -l", [], CommandNotFoundError, "or start sh -c 'ls -l'"),
    ("/bin/ls -l", [], CommandNotFoundError, "no such file; no shell reads it"),
    ("a|b", [], CommandNotFoundError, "or start sh -c 'a.b'"),
    ("~/x", [], CommandNotFoundError, "or start sh -c '~/x'"),
    ("'ls'", [], CommandNotFoundError, "no shell reads it: give each argument by itself"),
    ("/bin/l?", [], CommandNotFoundError, "no shell reads it: give each argument by itself"),
    ("NAME=x", [], CommandNotFoundError, "no shell reads it: give each argument by itself"),
    ("cd", [], CommandNotFoundError, "it is a word of the shell, and no shell reads it"),
    ("./x.sh", [], CommandNotFoundError, "directory is /.*, so this is /.*/?x.sh"),
    ("no/such", [], CommandNotFoundError, "directory is /.*, so this is /.*/?no/such"),
    ("/", [], CommandNotExecutableError, "directory"),
    ("/etc/passwd", [], CommandNotExecutableError, "permission denied"),
    ("/" + "x" * 300, [], CommandError, "too long"),
    ("true", ["x" * 50] * 3000, CommandError, str(MAX_ARGV_BYTES)),
]


def _assert_start_fails_cleanly(
    worker: Worker, command: str, args: list[str], error: type[CommandError], text: str
) -> None:
    before = _traces(worker)
    with pytest.raises(error, match=text) as caught:
        worker.start(command, args)
    assert _traces(worker) == before
    assert type(caught.value) is error
    assert caught.value.command == command
    assert repr(command)[:200] in str(caught.value)  # the message shortens a long command
    assert "\n" not in str(caught.value)


def test_command_that_cannot_be_executed_is_named_and_leaves_nothing(worker: Worker) -> None:
    """Each cause has its own error; no ID, file, descriptor, thread or process is left."""
    for case in _NOT_COMMANDS:
        _assert_start_fails_cleanly(worker, *case)


_NOT_SCRIPTS: list[tuple[int, str, type[CommandError], str]] = [
    (0o644, "#!/bin/sh\n", CommandNotExecutableError, "permission denied"),
    (0o755, "echo no magic\n", CommandNotExecutableError, "#!"),
    (0o755, "#!/no/such/interpreter\n", CommandNotFoundError, "interpreter"),
    (0o755, "#!/bin/sh\r\ntrue\r\n", CommandNotFoundError, "CR LF"),
    (0o755, "\ufeff#!/bin/sh\n", CommandNotExecutableError, "byte order mark"),
]


def test_script_that_cannot_be_executed_is_named_and_leaves_nothing(
    worker: Worker, tmp_path: Path
) -> None:
    """The error says what is missing: the permission, the #! line or the interpreter."""
    path = tmp_path / "script"
    for mode, content, error, text in _NOT_SCRIPTS:
        path.write_text(content)
        path.chmod(mode)
        _assert_start_fails_cleanly(worker, str(path), [], error, text)


def test_start_that_the_kernel_holds_up_fails_after_a_while_and_leaves_nothing(
    worker: Worker,
    pool: ThreadPoolExecutor,
    leased: tuple[Path, Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A leased file blocks exec, as a dead file server does. Such starts raise after a time."""
    monkeypatch.setattr("starting._START_TIMEOUT_S", 0.5)
    before = _traces(worker)
    starts = [pool.submit(worker.start, str(leased[0])) for _ in range(8)]
    for start in starts:
        with pytest.raises(StartTimeoutError, match=r"leased' was not executing after 0\.5 s"):
            start.result(GUARD_S)
    pool.shutdown()  # otherwise the pool's threads would be counted
    assert _traces(worker) == before


def test_start_that_the_kernel_holds_up_goes_on_later_and_holds_up_no_other(
    worker: Worker,
    pool: ThreadPoolExecutor,
    leased: tuple[Path, Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While eight starts wait for a leased file, another job runs; then the eight succeed."""
    path, release = leased
    monkeypatch.setattr("starting._START_TIMEOUT_S", GUARD_S)
    starts = [pool.submit(worker.start, str(path)) for _ in range(8)]
    assert worker.wait(worker.start("true"), GUARD_S).exit_code == 0
    assert not any(start.done() for start in starts)
    release()
    for start in starts:
        assert _first_line(worker, start.result(GUARD_S)) == b"begun"


@_ONE_WAY_TO_FORK
def test_wrong_types_are_refused(worker: Worker) -> None:
    """One string in place of the arguments, a number among them, or an owner None: TypeError."""
    with pytest.raises(TypeError, match="not one string"):
        worker.start("echo", "hello")
    with pytest.raises(TypeError, match="not int"):
        worker.start("echo", cast("list[str]", [1]))
    with pytest.raises(TypeError, match="an owner must be a string, not NoneType"):
        worker.start("echo", owner=cast("str", None))
    assert worker.list() == ()


def test_longest_argv_is_accepted(worker: Worker) -> None:
    """An argv of exactly `MAX_ARGV_BYTES` is accepted; one byte more is refused."""
    args = ["x" * 1023] * (MAX_ARGV_BYTES // 1024 - 1)
    room = MAX_ARGV_BYTES - sum(len(arg) + 1 for arg in args) - len("true\0")
    job_id = worker.start("true", [*args, "y" * (room - 1)])
    assert _end(worker.wait(job_id, GUARD_S)) == _EXITED_0
    with pytest.raises(CommandError):
        worker.start("true", [*args, "y" * room])


def test_start_without_a_thread_fails_cleanly(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started for the job, the command is not executed and nothing is left."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = _traces(worker)
    executed = tmp_path / "executed"
    discard_spares(worker)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(ResourceError, match="thread") as caught:
            _sh(worker, 'echo >"$1"', executed)
    assert caught.value.retry_after_s == 1
    _await_reaped(worker)
    assert not executed.exists()
    assert _traces(worker) == before
    worker.wait(_sh(worker, 'echo >"$1"', executed), GUARD_S)
    assert executed.exists()


@contextlib.contextmanager
def _descriptors_left(count: int) -> Iterator[None]:
    """Let this process open `count` more descriptors and then no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_jobs_end_and_are_stopped_without_descriptors_left(worker: Worker, tmp_path: Path) -> None:
    """The reserve serves both: a job that exits with 0 is not lost, and a stop does not fail."""
    fifo = make_fifo(tmp_path / "fifo")
    ends, runs = _sh(worker, 'echo ready; read -r _ <"$1"', fifo), _sh(worker, "sleep infinity")
    assert _first_line(worker, ends) == b"ready"
    with fifo.open("r+b", buffering=0) as other_end, _descriptors_left(0):
        other_end.write(b"\n")
        worker.wait(ends, GUARD_S)
        ended, stopped = worker.status(ends), worker.stop(runs)
    assert (ended.end_reason, ended.exit_code) == (EndReason.EXITED, 0)
    assert stopped.end_reason is EndReason.STOPPED


@pytest.mark.parametrize("left", range(10))
def test_start_without_descriptors_left_works_or_fails_cleanly(worker: Worker, left: int) -> None:
    """With few descriptors left, a job is started completely or not at all."""
    before = _traces(worker)
    with _descriptors_left(left):
        try:
            job_id = _sh(worker, _FOREVER)
        except (ResourceError, CgroupError):
            job_id = None
    if job_id is None:
        _await_reaped(worker)
        assert _traces(worker) == before
    else:
        assert _end(worker.stop(job_id)) == _STOPPED


def test_many_jobs_start_at_once(worker: Worker, pool: ThreadPoolExecutor) -> None:
    """Forty starts from 32 threads make forty jobs, each with its own output."""
    starts = [pool.submit(worker.start, "echo", [str(i)]) for i in range(40)]
    job_ids = [start.result(GUARD_S) for start in starts]
    assert len(set(job_ids)) == 40
    assert [_output(worker, job_id) for job_id in job_ids] == [b"%d\n" % i for i in range(40)]


def test_ended_jobs_keep_their_output_and_nothing_else(worker: Worker) -> None:
    """After fifty jobs there are fifty more files, and no more descriptors, threads, processes."""
    before = _traces(worker)
    job_ids = [worker.start("true") for _ in range(50)]
    for job_id in job_ids:
        worker.wait(job_id, GUARD_S)
    for thread in threading.enumerate():  # a job's thread publishes the end before it ends itself
        if thread.name.startswith("job-"):
            thread.join(GUARD_S)
    after = _traces(worker)
    assert after.pop("files") == sorted(f"{job_id}.out" for job_id in job_ids)
    assert len(cast("tuple[Job, ...]", after.pop("jobs"))) == 50
    assert after == {key: before[key] for key in after}


# --- spares ---------------------------------------------------------------------------------


def _spare(worker: Worker) -> int:
    """Return the pid of the spare's process."""
    settle_spares(worker)
    worker._spawner.kill("nobody")  # the fork server answers in order, so it has forked the spare
    (spare,) = set(children_of(worker._spawner.pid)) - set(job_processes(worker._spawner.pid))
    return spare


def _pid(worker: Worker, **options: Any) -> int:
    """Run a job to its end; return the pid of its leader."""
    job_id = worker.start("sh", ["-c", "echo $$"], **options)
    pid = int(_output(worker, job_id))
    worker.wait(job_id, GUARD_S)
    return pid


def test_the_next_jobs_process_is_there_before_its_start(worker: Worker) -> None:
    """From the first job on, the spare's process becomes the leader, and a new spare is made."""
    for _ in range(5):
        spare = _spare(worker)
        assert _pid(worker) == spare


def test_after_a_failed_start_a_new_spare_is_made(worker: Worker) -> None:
    """The process and everything else of the used spare are gone."""
    before, spare = _traces(worker), _spare(worker)
    for command in ("/no/such", "/etc", "no-such-command"):
        with pytest.raises(CommandError):
            worker.start(command)
    _await_reaped(worker)
    assert _traces(worker) == before
    assert _spare(worker) != spare


def test_spare_whose_process_was_killed_is_replaced(worker: Worker) -> None:
    """If somebody kills the spare's process, the next job gets a new process in that cgroup."""
    spare = _spare(worker)
    pidfd = os.pidfd_open(spare)
    os.kill(spare, signal.SIGKILL)
    assert select.select([pidfd], [], [], GUARD_S)[0]
    os.close(pidfd)
    assert _pid(worker) != spare
    assert _pid(worker) != spare


def _put_a_directory_in_place_of_the_output(worker: Worker, directory: Path) -> None:
    """Have the spare's output undeletable."""
    settle_spares(worker)
    (path,) = (each for each in directory.glob("*.out") if each.is_file())
    path.unlink()
    path.mkdir()


def test_output_that_cannot_be_deleted_hides_no_error_of_a_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk may have become read-only. The start tells its own error, and `close` raises none.

    Here a directory is in the place of the file.
    """
    with Worker(enforcement="off", output_dir=tmp_path) as worker:
        _put_a_directory_in_place_of_the_output(worker, tmp_path)
        with pytest.raises(CommandNotFoundError):
            worker.start("/no/such")
        _put_a_directory_in_place_of_the_output(worker, tmp_path)
    assert caplog.text.count("its output stays until the next worker") == 2


# --- ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 7, 126, 127, 137, 255])
def test_exit_code_is_the_leaders_own(worker: Worker, code: int) -> None:
    """Codes with a special meaning in shells, like 126, 127 and 137, are reported as they are."""
    job = worker.wait(_sh(worker, f"exit {code}"), GUARD_S)
    assert _end(job) == (Status.FINISHED, EndReason.EXITED, code, None)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGPIPE])
def test_signal_that_we_did_not_send_is_reported(worker: Worker, number: signal.Signals) -> None:
    """A leader killed by a signal of its own is FINISHED and SIGNALLED, even with SIGKILL."""
    job = worker.wait(_sh(worker, f"ulimit -c 0; kill -{number:d} $$"), GUARD_S)
    assert _end(job) == (Status.FINISHED, EndReason.SIGNALLED, None, number)


@pytest.mark.parametrize("keeper", ["", "setsid"])
def test_grandchild_that_holds_stdout_hangs_nothing(
    worker: Worker, fifo: _Fifo, latch: Path, keeper: str
) -> None:
    """When the leader exits, the job ends with all its output, even if a child holds the pipe."""
    script = f"""
        {keeper} sh -c 'exec 3>"$1"; read x <"$2"; echo >&3; {_FOREVER}' sh "$1" "$2" &
        echo >"$2"; read x <"$1.go"; echo last words; exit 7"""
    go = Path(f"{fifo.path}.go")
    os.mkfifo(go)
    job_id = _sh(worker, script, fifo.path, latch)
    assert fifo.readline() == b"\n"
    go.write_text("\n")
    assert _output(worker, job_id) == b"last words\n"
    assert _end(worker.status(job_id)) == _EXITED_7
    if worker.subtree is not None or not keeper:
        assert not fifo.is_held()
    worker.close()  # without cgroups, a process in another session lives until here
    assert not fifo.is_held()


def test_background_writer_does_not_keep_the_job_alive(worker: Worker) -> None:
    """When the leader exits, a child that writes for ever is killed, and the job ends."""
    job_id = _sh(worker, "yes & exit 7")
    output = _output(worker, job_id)
    assert _end(worker.status(job_id)) == _EXITED_7
    assert len(output) == worker.status(job_id).output_bytes


def test_job_that_closes_its_output_runs_on(worker: Worker, latch: Path) -> None:
    """A job that closes stdout and stderr is still RUNNING, and its thread uses no CPU."""
    job_id = _sh(worker, 'echo hi; exec >&- 2>&-; read x <"$1"; exit 7', latch)
    with latch.open("w") as release:  # blocks until the job has closed its output
        ident = _running(worker, job_id).thread.ident
        assert ident is not None
        clock = time.pthread_getcpuclockid(ident)
        before, ours = time.clock_gettime(clock), time.thread_time()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000)
        assert time.clock_gettime(clock) - before < (time.thread_time() - ours) / 4
        assert worker.status(job_id).status is Status.RUNNING
        release.write("\n")
    assert _output(worker, job_id) == b"hi\n"
    assert _end(worker.status(job_id)) == _EXITED_7


def test_end_of_output_and_terminal_status_come_together(
    worker: Worker, pool: ThreadPoolExecutor
) -> None:
    """A stream ends only after the job has ended; a job that has ended has all its output."""

    def stream(job_id: str) -> tuple[int, Job]:
        return len(_output(worker, job_id)), worker.status(job_id)

    for _ in range(50):
        job_id = _sh(worker, "head -c 100000 /dev/zero; exit 7")
        streamed = pool.submit(stream, job_id)
        job = worker.wait(job_id, GUARD_S)
        assert (job.output_bytes, _end(job)) == (100_000, _EXITED_7)
        size, then = streamed.result(GUARD_S)
        assert (size, _end(then)) == (100_000, _EXITED_7)


def test_output_left_in_the_pipe_when_the_leader_ends_is_kept(
    worker: Worker, latch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's thread reads what is still in the pipe when it learns of the leader's end."""
    script = 'exec 3<"$1"; read n <&3; printf x; read m <&3; head -c "$n" /dev/zero; exit 7'
    job_id = _sh(worker, script, latch)
    job, entered = _running(worker, job_id), threading.Event()
    real_append = job.output.append

    def append(data: memoryview) -> None:  # holds up the job's thread until the leader has ended
        entered.set()
        assert select.select([job._exit_fd], [], [], GUARD_S)[0]
        real_append(data)

    monkeypatch.setattr(job.output, "append", append)
    size = fcntl.fcntl(job._output_fd, fcntl.F_GETPIPE_SZ) - 16 * 1024  # fits into the pipe
    with latch.open("w", buffering=1) as orders:
        orders.write(f"{size}\n")
        assert entered.wait(GUARD_S)
        orders.write("\n")
    job_after = worker.wait(job_id, GUARD_S)
    assert (job_after.output_bytes, _end(job_after)) == (1 + size, _EXITED_7)


def test_tiny_writes_are_taken_together_and_the_first_at_once(
    worker: Worker, latch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line comes at once; all that is written in the pause after it is one chunk.

    The pause is endless in this test. So only the end of the job can have ended it.
    """
    monkeypatch.setattr("buffers.rest_ms", lambda *_: _ENDLESS_MS)
    script = 'echo first; read x <"$1"; for x in $(seq 1000); do echo $x; done; exit 7'
    job_id = _sh(worker, script, latch)
    with worker.stream(job_id) as chunks:
        assert next(chunks) == b"first\n"
        latch.write_text("\n")
        assert list(chunks) == [b"".join(b"%d\n" % number for number in range(1, 1001))]
    assert _end(worker.status(job_id)) == _EXITED_7


def test_line_after_a_silence_is_taken_at_once(
    worker: Worker, latch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause ends after its time, even if the job wrote nothing in it."""
    monkeypatch.setattr("buffers.rest_ms", lambda *_: 1)
    job_id = _sh(worker, 'exec 3<"$1"; while read x <&3; do echo "$x"; done; exit 7', latch)
    with latch.open("w", buffering=1) as orders, worker.stream(job_id) as chunks:
        for number in range(100):
            orders.write(f"{number}\n")
            assert next(chunks) == b"%d\n" % number


@pytest.mark.parametrize(
    ("size", "before", "time_s", "pipe_bytes", "expected_ms"),
    [
        (6, 0, 1.0, 65_536, 4),
        (4095, 0, 1.0, 65_536, 4),
        (4096, 0, 1.0, 65_536, 1),
        (8192, 8192, 0.001, 65_536, 1),
        (32_768, 0, 0.0011, 65_536, 1),
        (32_769, 0, 1.0, 65_536, 0),  # more than half of the pipe, however long that took
        (8192, 8192, 0.0002, 65_536, 0),  # in a pause at this rate it would be more than half
        (8192, 8192, 0.0002, 1_048_576, 1),
        (2000, 2000, 0.0002, 65_536, 0),  # the same rate with tiny writes
        (2000, 2000, 0.0002, 1_048_576, 4),
        (2000, 32_769, 0.01, 65_536, 0),  # the job may have waited for room before
        (2048, 0, 1.0, 8192, 4),
        (8192, 0, 1.0, 8192, 0),
        (0, 0, 0.0, 65_536, 4),
    ],
)
def test_job_gets_a_pause_but_none_in_which_its_pipe_could_be_full(
    size: int, before: int, time_s: float, pipe_bytes: int, expected_ms: int
) -> None:
    """The pause is 0 if a job that goes on at its rate would fill more than half of the pipe."""
    assert rest_ms(size, before, time_s, pipe_bytes) == expected_ms


def test_job_that_writes_much_gets_a_larger_pipe(worker: Worker, latch: Path) -> None:
    """The pipe of a job that writes 10 MB grows from 64 KiB to 1 MiB."""
    size = 10_000_000
    script = 'exec 3<"$1"; read x <&3; head -c $x /dev/zero; read x <&3'
    job_id = _sh(worker, script, latch)
    pipe_fd = _running(worker, job_id)._output_fd
    with latch.open("w", buffering=1) as orders, worker.stream(job_id) as chunks:
        assert fcntl.fcntl(pipe_fd, fcntl.F_GETPIPE_SZ) == 64 * 1024
        orders.write(f"{size}\n")
        offset = 0
        while offset < size:
            offset += len(next(chunks))
        assert fcntl.fcntl(pipe_fd, fcntl.F_GETPIPE_SZ) == 1024 * 1024
        orders.write("\n")
    assert worker.wait(job_id, GUARD_S).output_bytes == size


def test_pipe_grows_for_a_job_that_fills_it(
    worker: Worker, latch: Path, fifo: _Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipe keeps 64 KiB until it is full, because the pipes of one user share a quota."""
    script = (
        'exec 3<"$2"; read x <&3; printf x; read x <&3; head -c 65536 /dev/zero; echo >"$1"; '
        "read x <&3; printf y; read x <&3"
    )
    job_id = _sh(worker, script, fifo.path, latch)
    job, moved, go_on = _running(worker, job_id), threading.Semaphore(0), threading.Event()
    real_append = job.output.append

    def append(data: memoryview) -> None:
        real_append(data)
        moved.release()
        assert go_on.wait(GUARD_S)

    monkeypatch.setattr(job.output, "append", append)
    with latch.open("w", buffering=1) as orders:
        orders.write("\n")
        assert moved.acquire(timeout=GUARD_S)  # the job's thread has moved one byte
        assert fcntl.fcntl(job._output_fd, fcntl.F_GETPIPE_SZ) == 65536
        orders.write("\n")
        fifo.readline()  # the pipe is full
        go_on.set()
        assert moved.acquire(timeout=GUARD_S)
        orders.write("\n")
        assert moved.acquire(timeout=GUARD_S)  # "y", moved after the pipe was made larger
        assert fcntl.fcntl(job._output_fd, fcntl.F_GETPIPE_SZ) == 1024 * 1024
        orders.write("\n")
    assert worker.wait(job_id, GUARD_S).output_bytes == 1 + 65536 + 1


def test_job_does_not_wait_for_a_buffer_that_other_jobs_have(worker: Worker) -> None:
    """While other jobs keep all large buffers, a job's output still arrives, every byte of it."""
    script = "for x in 1 2 3; do head -c 100000 /dev/zero; echo $x; done"
    with contextlib.ExitStack() as others:
        for _ in range(_BUFFERS):
            others.enter_context(worker._starter._buffers.lent())
        job_id = _sh(worker, script)
        assert _output(worker, job_id) == b"".join(bytes(100_000) + b"%d\n" % x for x in (1, 2, 3))
        assert _end(worker.wait(job_id, GUARD_S)) == (Status.FINISHED, EndReason.EXITED, 0, None)


# The byte makes the pipe readable. The kernel keeps the pipe's lock while the splice waits.
_BLOCKS_ITS_PIPE = """
import os, socket, sys
idle, _ = socket.socketpair()
report = open(sys.argv[1], "w")
os.write(1, b"x")
report.write("blocked\\n")
report.flush()
if sys.argv[2] == "splice":
    os.splice(idle.fileno(), 1, 1)
else:
    os.sendfile(1, idle.fileno(), None, 1)
"""


@pytest.mark.parametrize("call", ["splice", "sendfile"])
def test_jobs_that_block_their_own_pipes_hold_up_nobody_else(
    worker: Worker, fifo: _Fifo, call: str
) -> None:
    """A read of such a pipe waits for ever, and there are more such jobs than large buffers."""
    if call == "sendfile" and tuple(map(int, os.uname().release.split(".")[:2])) < (5, 12):
        pytest.skip("before Linux 5.12, sendfile(2) takes nothing from a socket")
    argv = ["-c", _BLOCKS_ITS_PIPE, fifo.path, call]
    blocked = [worker.start(sys.executable, argv) for _ in range(2 * _BUFFERS)]
    for _ in blocked:
        assert fifo.readline() == b"blocked\n"
    assert _output(worker, _sh(worker, "echo hello")) == b"hello\n"
    for job_id in blocked:
        assert worker.status(job_id).status is Status.RUNNING
        assert _end(worker.stop(job_id)) == _STOPPED


# --- stop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["", "by its owner"])
def test_stop_ends_a_deaf_job_and_records_the_reason(worker: Worker, reason: str) -> None:
    """A job that ignores all signals it can ignore is STOPPED, and keeps its output."""
    job_id = _sh(worker, "trap '' TERM INT HUP QUIT; echo ready; while :; do sleep 100; done")
    assert _first_line(worker, job_id) == b"ready"
    job = worker.stop(job_id, reason=reason)
    assert (*_end(job), job.stop_reason) == (*_STOPPED, reason)
    assert job.ended_at is not None
    assert worker.status(job_id) == job
    assert _output(worker, job_id) == b"ready\n"


def test_stop_is_idempotent_and_keeps_the_first_reason(worker: Worker) -> None:
    """A second stop, with another reason, succeeds and changes nothing."""
    job_id = _sh(worker, _FOREVER)
    job = worker.stop(job_id)
    assert worker.stop(job_id, reason="another") == job
    assert job.stop_reason == ""
    assert _end(job) == _STOPPED


def test_stop_of_a_finished_job_changes_nothing(worker: Worker) -> None:
    """A job that ended by itself stays FINISHED with its own exit code."""
    job_id = _sh(worker, "exit 7")
    job = worker.wait(job_id, GUARD_S)
    assert worker.stop(job_id) == job
    assert _end(job) == _EXITED_7


def test_stop_of_a_stopped_process_works(worker: Worker) -> None:
    """A process stopped by SIGSTOP is killed like any other."""
    job_id = _sh(worker, "(kill -STOP $$; echo stopped); " + _FOREVER)
    assert _first_line(worker, job_id) == b"stopped"
    assert _end(worker.stop(job_id)) == _STOPPED


# --- stop with a grace ------------------------------------------------------------------------


def test_stop_with_a_grace_lets_the_leader_end_by_itself(worker: Worker) -> None:
    """The job is STOPPED, with the exit code and the last output of its leader."""
    job_id = _polite(worker)
    job = worker.stop(job_id, reason="mine", grace=GUARD_S)
    assert (*_end(job), job.stop_reason) == (Status.STOPPED, EndReason.STOPPED, 3, None, "mine")
    assert _output(worker, job_id) == b"ready\nbye\n"


def test_stop_with_a_grace_kills_what_is_left(worker: Worker) -> None:
    """A deaf job is killed after the grace."""
    job_id = _polite(worker, kind="deaf")
    assert _end(worker.stop(job_id, grace=0.5)) == _STOPPED
    assert _output(worker, job_id) == b"ready\nbye\n"


def test_stop_without_a_grace_ends_another_ones_grace(
    worker: Worker, pool: ThreadPoolExecutor
) -> None:
    """Both stops return the same end."""
    job_id = _polite(worker, kind="deaf")
    polite = pool.submit(worker.stop, job_id, grace=GUARD_S)
    await_lines(worker, job_id, b"bye", 1)
    assert _end(worker.stop(job_id)) == _end(polite.result(GUARD_S)) == _STOPPED


def test_grace_of_a_stop_is_for_every_process(worker: Worker, tmp_path: Path) -> None:
    """The leader dies of SIGTERM at once. A child of it still writes 200 KiB, and ends."""
    child = """
        trap 'sleep 0.2; head -c 200000 /dev/zero; echo bye; exit' TERM
        echo up; while :; do read -t 1 x <&3; done"""
    job_id = _sh(
        worker, f'(bash -c "$1" 3<>"$2") & {_FOREVER}', child, make_fifo(tmp_path / "idle")
    )
    await_lines(worker, job_id, b"up", 1)
    job = worker.stop(job_id, grace=GUARD_S)
    assert (job.status, job.signal) == (Status.STOPPED, signal.SIGTERM)
    assert _output(worker, job_id) == b"up\n" + bytes(200_000) + b"bye\n"


def test_stop_with_a_grace_kills_what_outlives_the_leader(worker: Worker, fifo: _Fifo) -> None:
    """A deaf process in a session of its own has lost its parent by then, and dies all the same."""
    deaf = "trap '' TERM; echo >&3; while :; do sleep 99; done"
    job_id = _sh(worker, f'exec 3>"$1"; setsid sh -c "{deaf}" & {_FOREVER}', fifo.path)
    fifo.readline()
    job = worker.stop(job_id, grace=0.2)
    assert (job.status, job.signal) == (Status.STOPPED, signal.SIGTERM)
    assert not fifo.is_held()
    assert not job.may_have_escaped


def test_stop_with_a_grace_wakes_a_stopped_process(worker: Worker) -> None:
    """A process that SIGSTOP has stopped could not end by itself otherwise."""
    job_id = _sh(worker, "trap 'exit 3' TERM; echo ready; kill -STOP $$; sleep infinity")
    assert _first_line(worker, job_id) == b"ready"
    assert worker.stop(job_id, grace=GUARD_S).exit_code == 3


# --- timeout --------------------------------------------------------------------------------


@_ONE_WAY_TO_FORK
def test_job_that_runs_for_too_long_is_stopped_with_its_grace(worker: Worker) -> None:
    """It is STOPPED and TIMED_OUT, with the exit code and the last output of its leader."""
    job_id = _polite(worker, Ending(timeout=1.5, grace=GUARD_S))
    job = worker.wait(job_id, GUARD_S)
    assert _end(job) == (Status.STOPPED, EndReason.TIMED_OUT, 3, None)
    assert (job.timeout, _output(worker, job_id)) == (1.5, b"ready\nbye\n")


@_ONE_WAY_TO_FORK
@pytest.mark.parametrize("grace", [0, 0.2])
def test_job_that_timed_out_is_killed_after_its_grace(worker: Worker, grace: float) -> None:
    """A grace of 0 sends no SIGTERM."""
    job_id = _polite(worker, Ending(timeout=1.5, grace=grace), kind="deaf")
    job = worker.wait(job_id, GUARD_S)
    assert _end(job) == (Status.STOPPED, EndReason.TIMED_OUT, None, signal.SIGKILL)
    assert _output(worker, job_id) == (b"ready\nbye\n" if grace else b"ready\n")


def test_timeout_changes_nothing_for_a_job_that_ends_before(worker: Worker) -> None:
    """The longest timeout is no shorter than the longest wait of poll(2)."""
    for timeout in (GUARD_S, 1e9):
        job_id = _sh(worker, "echo hi; exit 7", ending=Ending(timeout=timeout))
        assert _end(worker.wait(job_id, GUARD_S)) == _EXITED_7


@_ONE_WAY_TO_FORK
def test_timeout_leaves_a_stop_its_grace(worker: Worker, pool: ThreadPoolExecutor) -> None:
    """The job is STOPPED by the stop, and has the whole grace of the stop."""
    job_id = _polite(worker, Ending(timeout=1.5, grace=0), kind="deaf")
    stop = pool.submit(worker.stop, job_id, grace=GUARD_S)
    with pytest.raises(TimeoutError):
        worker.wait(job_id, 2)
    worker.stop(job_id)
    assert _end(stop.result(GUARD_S)) == _STOPPED


@pytest.mark.parametrize(
    "times",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"grace": -1},
        {"grace": 601},
        {"linger": -0.1},
        {"linger": float("nan")},
    ],
)
def test_times_out_of_range_are_refused(times: dict[str, float]) -> None:
    """The error names the time and its range."""
    with pytest.raises(ValueError, match=f"{next(iter(times))} must be"):
        Ending(**times)
    with Worker(enforcement="off") as worker, pytest.raises(ValueError, match="grace must be"):
        worker.stop(_sh(worker, _FOREVER), grace=-1)


# --- what outlives the leader ---------------------------------------------------------------


def test_output_of_a_filter_that_outlives_the_leader_is_complete(
    worker: Worker, tmp_path: Path
) -> None:
    """All of it is there, each time, and nothing is said to have been killed."""
    script = 'exec > >(tee "$1") 2>&1; echo begun; seq 1000; echo RESULT; exit 7'
    expected = b"begun\n" + b"".join(b"%d\n" % n for n in range(1, 1001)) + b"RESULT\n"
    for i in range(50):
        log = tmp_path / str(i)
        job_id = _sh(worker, script, log, shell="bash")
        job = worker.wait(job_id, GUARD_S)
        assert (*_end(job), job.killed_after_exit) == (*_EXITED_7, 0)
        assert _output(worker, job_id) == log.read_bytes() == expected


def test_slow_filter_may_go_on_for_the_linger(worker: Worker) -> None:
    """Its output comes some time after the leader has ended."""
    script = "exec > >(sleep 0.3; cat); echo RESULT; exit 7"
    job_id = _sh(worker, script, ending=Ending(linger=GUARD_S), shell="bash")
    assert _end(worker.wait(job_id, GUARD_S)) == _EXITED_7
    assert _output(worker, job_id) == b"RESULT\n"


def test_what_holds_the_output_for_longer_is_killed_and_counted(
    worker: Worker, fifo: _Fifo
) -> None:
    """The job keeps its own end, and its status says how many processes were killed."""
    script = 'exec 3>"$1"; for i in 1 2 3; do sleep infinity & done; echo >&3; exit 7'
    job_id = _sh(worker, script, fifo.path, ending=Ending(linger=0.3))
    job = worker.wait(job_id, GUARD_S)
    assert (*_end(job), job.killed_after_exit) == (*_EXITED_7, 3)
    assert fifo.readline() == b"\n"
    assert not fifo.is_held()


@pytest.mark.parametrize("linger", [0, GUARD_S])
def test_what_does_not_hold_the_output_is_killed_without_linger(
    worker: Worker, fifo: _Fifo, linger: float
) -> None:
    """It is counted, too. A linger of 0 treats all alike."""
    silent = "" if linger == 0 else ">/dev/null 2>&1"
    script = f'exec 3>"$1"; sleep infinity {silent} & echo >&3; exit 7'
    job_id = _sh(worker, script, fifo.path, ending=Ending(linger=linger))
    job = worker.wait(job_id, GUARD_S / 2)
    assert (*_end(job), job.killed_after_exit) == (*_EXITED_7, 1)
    assert fifo.readline() == b"\n"
    assert not fifo.is_held()


@pytest.mark.parametrize("daemon", ["sleep infinity", "setsid sleep infinity"])
@pytest.mark.parametrize("grace", [0, 0.2])
def test_stop_does_not_wait_for_the_linger(worker: Worker, daemon: str, grace: float) -> None:
    """The job has ended by itself, and keeps its exit code."""
    job_id = _sh(worker, f"{daemon} & exit 7", ending=Ending(linger=GUARD_S * 2))
    assert select.select([_running(worker, job_id)._pidfd], [], [], GUARD_S)[0]
    assert worker.status(job_id).status is Status.RUNNING
    assert _end(worker.stop(job_id, grace=grace)) == _EXITED_7


def test_end_of_the_worker_does_not_wait_for_the_linger() -> None:
    """It kills what is left of the job."""
    with Worker(enforcement="off", ending=Ending(linger=GUARD_S * 2)) as worker:
        job_id = _sh(worker, "sleep infinity & exit 7")
        assert select.select([_running(worker, job_id)._pidfd], [], [], GUARD_S)[0]


def test_close_with_a_grace_lets_every_job_end(pool: ThreadPoolExecutor) -> None:
    """Each is CLOSED with its own exit code. A second close kills those that are deaf, at once."""
    with Worker(enforcement="off") as worker:
        polite, deaf = _polite(worker), _polite(worker, kind="deaf")
        ends = [worker.observe(job_id) for job_id in (polite, deaf)]
        with worker.stream(deaf) as chunks:
            closing = pool.submit(worker.close, grace=GUARD_S * 2)
            output = b""
            while b"bye" not in output:
                output += next(chunks)
        worker.wait(polite, GUARD_S)
        worker.close()
        closing.result(GUARD_S)
    closed = (Status.STOPPED, EndReason.CLOSED)
    assert [_end(end()) for end in ends] == [(*closed, 3, None), (*closed, None, signal.SIGKILL)]


# --- signal ---------------------------------------------------------------------------------


def test_signal_reaches_the_leader_alone(worker: Worker) -> None:
    """Its children do not get the signal. The job ends as its leader decides."""
    job_id = worker.start(sys.executable, ["-c", SIGNALLED_TREE, "3"])
    await_lines(worker, job_id, b"up", 4)
    worker.signal(job_id, signal.SIGUSR1)
    assert _end(worker.wait(job_id, GUARD_S)) == _EXITED_7
    assert _output(worker, job_id).count(b"leader") == 1
    assert b"child" not in _output(worker, job_id)


def test_signal_to_everything_reaches_every_process_once(worker: Worker) -> None:
    """The leader and its children each get the signal."""
    job_id = worker.start(sys.executable, ["-c", SIGNALLED_TREE, "3", "wait", "setsid"])
    await_lines(worker, job_id, b"up", 4)
    worker.signal(job_id, signal.SIGUSR1, everything=True)
    assert _end(worker.wait(job_id, GUARD_S)) == _EXITED_7
    assert _output(worker, job_id).count(b"leader") == 1
    assert _output(worker, job_id).count(b"child") == 3


@pytest.mark.parametrize("everything", [False, True])
def test_job_that_a_signal_kills_is_signalled_and_not_stopped(
    worker: Worker, everything: bool
) -> None:
    """That holds for SIGKILL, too."""
    job_id = _sh(worker, _FOREVER)
    worker.signal(job_id, signal.SIGKILL, everything=everything)
    assert _end(worker.wait(job_id, GUARD_S)) == _KILLED_ITSELF


@pytest.mark.parametrize("everything", [False, True])
def test_no_signal_is_sent_to_a_job_that_has_ended(worker: Worker, everything: bool) -> None:
    """The error says that the job has ended; of an unknown job, that it is unknown."""
    job_id = _sh(worker, "exit 7")
    worker.wait(job_id, GUARD_S)
    with pytest.raises(SignalError, match=f"{job_id}: it has ended"):
        worker.signal(job_id, signal.SIGTERM, everything=everything)
    worker.remove(job_id)
    with pytest.raises(UnknownJobError):
        worker.signal(job_id, signal.SIGTERM, everything=everything)


def test_number_that_is_no_signal_is_refused(worker: Worker) -> None:
    """It reaches no process."""
    job_id = _sh(worker, _FOREVER)
    for number in (-1, 0, 65, 9999):
        with pytest.raises(ValueError, match="not the number of a signal"):
            worker.signal(job_id, number, everything=True)
    assert worker.status(job_id).status is Status.RUNNING


def test_no_signal_is_sent_to_a_leader_that_ends_just_then(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after it was seen alive."""
    job_id = _sh(worker, _FOREVER)
    running = _running(worker, job_id)

    def look(pidfd: int, timeout: float | None = 0) -> bool:
        found = real_look(pidfd, timeout)
        os.kill(running._pid, signal.SIGKILL)
        assert select.select([running._exit_fd], [], [], GUARD_S)[0]  # it is reaped
        return found

    real_look = job._is_readable
    with monkeypatch.context() as patch:
        patch.setattr(job, "_is_readable", look)
        with pytest.raises(SignalError, match="it has ended"):
            worker.signal(job_id, signal.SIGTERM)
    assert _end(worker.wait(job_id, GUARD_S)) == _KILLED_ITSELF


def test_signal_to_everything_that_reaches_nothing_is_an_error(worker: Worker) -> None:
    """The leader is dead, and the fork server has not reported the end."""
    job_id = _sh(worker, _FOREVER)
    running = _running(worker, job_id)
    if running._cgroup is None:
        pytest.skip("without cgroups the fork server is asked, and knows of the end")
    os.kill(worker._spawner.pid, signal.SIGSTOP)
    try:
        os.kill(running._pid, signal.SIGKILL)
        assert select.select([running._pidfd], [], [], GUARD_S)[0]
        with pytest.raises(SignalError, match="it has ended"):
            worker.signal(job_id, signal.SIGTERM, everything=True)
    finally:
        os.kill(worker._spawner.pid, signal.SIGCONT)


_KILLED_ITSELF = (Status.FINISHED, EndReason.SIGNALLED, None, 9)


@pytest.mark.parametrize(("script", "end"), [("exit 7", _EXITED_7), ("kill -9 $$", _KILLED_ITSELF)])
def test_leader_that_ended_just_before_the_stop_keeps_its_own_end(
    worker: Worker, fifo: _Fifo, latch: Path, script: str, end: tuple[object, ...]
) -> None:
    """The leader is dead, the fork server has not reported the end, and a stop comes.

    The job ends as the leader ended, and the stop kills only the other processes.
    """
    script = f'exec 3>"$1"; sleep infinity & read x <"$2"; {script}'
    job_id = _sh(worker, script, fifo.path, latch)
    job, fork_server = _running(worker, job_id), worker._spawner.pid
    real_kill = job._kill_processes

    def kill_processes() -> None:  # called after the stop has looked whether the leader lives
        os.kill(fork_server, signal.SIGCONT)
        real_kill()

    os.kill(fork_server, signal.SIGSTOP)  # it cannot report the leader's end
    try:
        latch.write_text("\n")
        assert select.select([job._pidfd], [], [], GUARD_S)[0]
        assert worker.status(job_id).status is Status.RUNNING
        assert fifo.is_held()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "_kill_processes", kill_processes)
            assert _end(worker.stop(job_id)) == end
    finally:
        os.kill(fork_server, signal.SIGCONT)
    assert not fifo.is_held()


def test_racing_stop_and_exit_are_never_mixed(worker: Worker) -> None:
    """If a stop and the leader's exit race, the job is STOPPED by the stop or FINISHED with 7."""
    ends = []
    for i in range(50):
        job_id = _sh(worker, "exit 7")
        for _ in range(i * 300):  # from round to round the exit has more time to come first
            pass
        job = worker.stop(job_id)
        assert worker.status(job_id) == job
        ends.append(_end(job))
    assert set(ends) <= {_STOPPED, _EXITED_7}


def test_stop_right_after_start(worker: Worker, fifo: _Fifo) -> None:
    """A job that is stopped right after its start is STOPPED, and its processes are gone."""
    for _ in range(50):
        job_id = _sh(worker, f'exec 3>"$1"; {_FOREVER}', fifo.path)
        assert _end(worker.stop(job_id)) == _STOPPED
        assert not fifo.is_held()


def test_stop_from_twenty_threads_at_once(worker: Worker, pool: ThreadPoolExecutor) -> None:
    """All twenty stops return the same result."""
    for _ in range(5):
        job_id = _sh(worker, _FOREVER)
        barrier = threading.Barrier(20)

        def stop(job_id: str = job_id, barrier: threading.Barrier = barrier) -> Job:
            barrier.wait(GUARD_S)
            return worker.stop(job_id)

        jobs = {future.result(GUARD_S) for future in [pool.submit(stop) for _ in range(20)]}
        assert [_end(job) for job in jobs] == [_STOPPED]


def test_stop_leaves_no_process_of_a_big_tree(worker: Worker, fifo: _Fifo) -> None:
    """When a stop returns, all children and grandchildren are dead, not only signalled."""
    script = f"""
        exec 3>"$1"
        for i in 1 2 3 4 5 6 7 8 9 10; do
            sh -c 'sleep infinity & sleep infinity & echo >&3; trap "" TERM; {_FOREVER}' &
        done; wait"""
    job_id = _sh(worker, script, fifo.path)
    for _ in range(10):
        fifo.readline()
    assert _end(worker.stop(job_id)) == _STOPPED
    assert not fifo.is_held()
    assert job_processes(worker._spawner.pid) == []


@pytest.mark.usefixtures("way_to_fork")
def test_stop_reaches_processes_in_other_sessions(fifo: _Fifo) -> None:
    """With a cgroup, a stop also kills a process that left the session and the process group."""
    with Worker(enforcement="auto") as worker:
        if worker.subtree is None:
            pytest.skip("no cgroup v2 that this process may use")
        daemon = f"echo >&3; {_FOREVER}"
        script = f"exec 3>\"$1\"; setsid --fork setsid --fork sh -c '{daemon}'; {_FOREVER}"
        job_id = _sh(worker, script, fifo.path)
        fifo.readline()
        assert _end(worker.stop(job_id)) == _STOPPED
        assert not fifo.is_held()


@pytest.mark.parametrize(
    "escape",
    [
        "timeout 1000 $UP",  # another process group
        "setsid $UP",  # another session, but a child of the job
        "setsid sh -c 'setsid $UP & wait'",
        "sh -c 'timeout 1000 $UP & exec true'; sleep infinity",  # without its parent
    ],
)
def test_stop_without_cgroups_reaches_other_groups_and_sessions(
    fifo: _Fifo, tmp_path: Path, escape: str
) -> None:
    """When the stop has been answered, they are dead, and nothing is said to have escaped."""
    with Worker(enforcement="off") as worker:
        up = tmp_path / "up"
        up.write_text("#!/bin/sh\necho >&3; sleep infinity\n")
        up.chmod(0o755)
        script = f'exec 3>"$1"; export UP="$2"; ({escape}) & {_FOREVER}'
        job_id = _sh(worker, script, fifo.path, up)
        fifo.readline()
        job = worker.stop(job_id)
        assert _end(job) == _STOPPED
        assert not fifo.is_held()
        assert not job.may_have_escaped


def test_end_without_cgroups_ends_a_process_without_its_first_thread(
    fifo: _Fifo, tmp_path: Path
) -> None:
    """It looks like one that has ended, but another of its threads goes on."""
    with Worker(enforcement="off") as worker:
        script = 'exec 3>"$1"; timeout 1000 "$3" -c "$4" 3 & read x <"$2"'
        latch = make_fifo(tmp_path / "latch")
        job_id = _sh(worker, script, fifo.path, latch, sys.executable, WITHOUT_FIRST_THREAD)
        assert fifo.readline() == b"up\n"
        latch.write_text("go on\n")
        job = worker.wait(job_id, GUARD_S)
        assert job.end_reason is EndReason.EXITED
        assert not fifo.is_held()
        assert not job.may_have_escaped


def test_end_without_cgroups_ends_what_has_the_jobs_session(fifo: _Fifo, tmp_path: Path) -> None:
    """A process of another group that the leader left behind is dead when the job has ended."""
    with Worker(enforcement="off") as worker:
        script = 'exec 3>"$1"; timeout 1000 sh -c "echo >&3; sleep infinity" & read x <"$2"'
        latch = make_fifo(tmp_path / "latch")
        job_id = _sh(worker, script, fifo.path, latch)
        fifo.readline()
        latch.write_text("go on\n")
        job = worker.wait(job_id, GUARD_S)
        assert job.end_reason is EndReason.EXITED
        assert not fifo.is_held()
        assert not job.may_have_escaped


def test_known_processes_are_looked_through_once_without_cgroups() -> None:
    """Not for each of the others: the fork server serves nobody meanwhile, and there are 8,192."""

    class Known(list[processes.Entry]):
        passes = 0

        def __iter__(self) -> Iterator[processes.Entry]:
            self.passes += 1
            return super().__iter__()

    known = Known(processes.Entry(pid, "S", 1, pid, 7, 0, 1) for pid in range(10, 110))
    later = processes.Entry(10, "S", 1, 10, 8, 0, 1)  # another process with the same number
    table = {each.pid: each for each in [*known, later]}
    assert {each.pid for each in processes.members(table, 9, known)} == set(range(11, 110))
    assert known.passes <= 3


def test_what_may_have_escaped_without_cgroups_is_told(fifo: _Fifo) -> None:
    """A daemon that left the session and lost its parents lives; job and answer say so."""
    with Worker(enforcement="off") as worker:
        before = worker.start("sleep", ["infinity"])
        daemon = f"echo >&3; {_FOREVER}"
        script = f"exec 3>\"$1\"; setsid --fork setsid --fork sh -c '{daemon}'; {_FOREVER}"
        job_id = _sh(worker, script, fifo.path)
        fifo.readline()
        stopped = worker.stop(job_id)
        assert _end(stopped) == _STOPPED
        assert stopped.may_have_escaped
        assert worker.status(job_id).may_have_escaped
        assert fifo.is_held()
        # A job whose process was forked later, by a tick of 10 ms or more, cannot have made it.
        later = [worker.wait(worker.start("sleep", ["0.1"]), GUARD_S) for _ in range(3)]
        assert not later[-1].may_have_escaped
        assert worker.status(before).status is Status.RUNNING
    assert not fifo.is_held()


def test_a_stop_that_takes_long_holds_up_nobody_else(
    worker: Worker, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the stop of one job blocks, other jobs are started, listed, streamed and stopped."""
    slow = _running(worker, _sh(worker, _FOREVER, owner="slow"))
    entered, go_on = threading.Event(), threading.Event()
    real_kill = slow._kill_processes

    def kill_processes() -> None:
        entered.set()
        assert go_on.wait(GUARD_S)
        real_kill()

    monkeypatch.setattr(slow, "_kill_processes", kill_processes)
    stopping = pool.submit(worker.stop, slow.job_id)
    try:
        assert entered.wait(GUARD_S)

        def everything_else() -> Job:
            job_id = _sh(worker, "echo hi; " + _FOREVER)
            assert _first_line(worker, job_id) == b"hi"
            assert worker.status(slow.job_id).status is Status.RUNNING
            assert len(worker.list()) == 2
            return worker.stop(job_id)

        assert _end(pool.submit(everything_else).result(GUARD_S)) == _STOPPED
    finally:
        go_on.set()
    assert _end(stopping.result(GUARD_S)) == _STOPPED


def test_starts_and_stops_in_parallel_leave_nothing(
    worker: Worker, pool: ThreadPoolExecutor, fifo: _Fifo
) -> None:
    """Eight threads start, stop and wait for jobs; every end is right and no process is left."""

    def live(i: int) -> None:
        for n in range(6):
            if (i + n) % 2:
                job_id = _sh(worker, f'exec 3>"$1"; {_FOREVER}', fifo.path)
                assert _end(worker.stop(job_id)) == _STOPPED
            else:
                job_id = _sh(worker, 'exec 3>"$1"; sleep infinity & echo hi; exit 7', fifo.path)
                assert _output(worker, job_id) == b"hi\n"
                assert _end(worker.status(job_id)) == _EXITED_7

    for future in [pool.submit(live, i) for i in range(8)]:
        future.result(GUARD_S)
    assert not fifo.is_held()
    assert job_processes(worker._spawner.pid) == []


def test_processes_that_will_not_die_are_reported(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the kernel does not end the processes, the stop raises, and the job is still RUNNING."""
    job_id = _sh(worker, _FOREVER)
    with monkeypatch.context() as patch:
        patch.setattr("worker._STOP_TIMEOUT_S", 0.01)
        patch.setattr(_running(worker, job_id), "_kill_processes", lambda: None)
        with pytest.raises(StopTimeoutError, match=job_id):
            worker.stop(job_id)
    assert worker.status(job_id).status is Status.RUNNING
    assert _end(worker.stop(job_id)) == _STOPPED


# --- output --------------------------------------------------------------------------------


def test_bytes_are_delivered_when_they_come(worker: Worker, latch: Path) -> None:
    """A subscriber gets a single byte without a newline while the job waits."""
    job_id = _sh(worker, 'printf x; read x <"$1"; printf y', latch)
    with worker.stream(job_id) as chunks:
        assert next(chunks) == b"x"
        latch.write_text("\n")
        assert b"".join(chunks) == b"y"


def test_every_byte_value_passes_untouched(worker: Worker, tmp_path: Path) -> None:
    """All 256 values of a byte reach a subscriber unchanged."""
    data = bytes(range(256)) * 1000
    (tmp_path / "data").write_bytes(data)
    assert _output(worker, worker.start("cat", [str(tmp_path / "data")])) == data


def test_twenty_megabytes_reach_early_and_late_subscribers_alike(
    worker: Worker, pool: ThreadPoolExecutor
) -> None:
    """Subscribers that begin before, during and after the output get the same 20 MB."""
    count = 2_700_000
    digest = hashlib.sha256()
    for i in range(0, count, 10_000):
        digest.update(b"".join(b"%d\n" % n for n in range(i + 1, i + 10_001)))

    def read() -> bytes:
        sha = hashlib.sha256()
        with worker.stream(job_id) as chunks:
            for chunk in chunks:
                sha.update(chunk)
        return sha.digest()

    job_id = worker.start("seq", [str(count)])
    readers = [pool.submit(read) for _ in range(3)]
    with worker.stream(job_id) as chunks:
        for chunk in chunks:
            if len(readers) == 3 and chunks.offset > 5_000_000:
                readers.append(pool.submit(read))
            assert chunk
    readers.append(pool.submit(read))
    assert {reader.result(GUARD_S) for reader in readers} == {digest.digest()}
    assert len(readers) == 5


def test_offsets_of_a_stream(worker: Worker) -> None:
    """A stream begins at its offset; an offset past the end of an ended job is an error."""
    job_id = worker.start("printf", ["0123456789"])
    worker.wait(job_id, GUARD_S)
    assert [_output(worker, job_id, offset) for offset in (0, 4, 10)] == [
        b"0123456789",
        b"456789",
        b"",
    ]
    with pytest.raises(OffsetError):
        worker.stream(job_id, offset=11)
    with pytest.raises(ValueError, match="negative"):
        worker.stream(job_id, offset=-1)


def test_stream_ahead_of_a_job_that_ends_short_is_an_error(worker: Worker) -> None:
    """A subscriber whose offset the output never reaches gets an `OffsetError` at the end."""
    job_id = _sh(worker, _FOREVER)
    with worker.stream(job_id, offset=5) as chunks:
        worker.stop(job_id)
        with pytest.raises(OffsetError):
            next(chunks)


def test_stop_ends_streams(worker: Worker, pool: ThreadPoolExecutor) -> None:
    """Subscribers of a job that is stopped get all of its output, and then their streams end."""
    job_id = _sh(worker, "echo ready; " + _FOREVER)
    followers = [pool.submit(_output, worker, job_id) for _ in range(5)]
    assert _first_line(worker, job_id) == b"ready"
    worker.stop(job_id)
    assert [follower.result(GUARD_S) for follower in followers] == [b"ready\n"] * 5


def test_subscribers_are_recorded_while_they_stream(worker: Worker) -> None:
    """The status has the name of each subscriber once, and no name after the streams ended."""
    job_id = _sh(worker, _FOREVER)
    with (
        worker.stream(job_id, subscriber="bob"),
        worker.stream(job_id, subscriber="alice"),
        worker.stream(job_id, subscriber="bob"),
    ):
        assert worker.status(job_id).subscribers == ("alice", "bob")
    assert list(worker.status(job_id).subscribers) == []


def test_full_disk_loses_output_but_not_the_job(worker: Worker, latch: Path) -> None:
    """A job whose output cannot be stored runs to its end, and its subscribers get an error."""
    job_id = _sh(
        worker, 'printf 0123456789; read x <"$1"; head -c 3000000 /dev/zero; exit 7', latch
    )
    with worker.stream(job_id) as chunks:
        assert next(chunks) == b"0123456789"
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            latch.write_text("\n")
            assert _end(worker.wait(job_id, GUARD_S)) == _EXITED_7
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert next(chunks) == bytes(990)
        with pytest.raises(OutputIncompleteError) as caught:
            next(chunks)
    assert caught.value.lost_bytes == 3_000_010 - 1000
    assert worker.status(job_id).output_bytes == 1000


_GROWTH = """
from worker import Worker

def memory_kb(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

with Worker(enforcement="off") as worker:
    worker.wait(worker.start("true"))
    before = memory_kb("VmRSS")
    job_id = worker.start("head", ["-c", str(64 * 1024 * 1024), "/dev/zero"])
    stalled = worker.stream(job_id)
    next(stalled)
    with worker.stream(job_id) as chunks:
        assert sum(map(len, chunks)) == 64 * 1024 * 1024
    print(memory_kb("VmHWM") - before)
    assert stalled.offset < 1024 * 1024
    stalled.close()
"""


def test_output_does_not_live_in_memory() -> None:
    """A job writes 64 MiB, one subscriber does not read; memory grows by less than 16 MiB."""
    growth_kb = int(subprocess.check_output(_program(_GROWTH), timeout=GUARD_S))
    assert growth_kb < 16 * 1024


# --- usage ------------------------------------------------------------------------------------

_BURN = """
import os, sys, time
def burn():
    end = time.process_time() + 0.3
    while time.process_time() < end: sum(range(100_000))
"""


def _cpu_s(job: Job) -> float:
    assert job.usage
    assert job.usage.cpu_user_s is not None
    assert job.usage.cpu_system_s is not None
    return job.usage.cpu_user_s + job.usage.cpu_system_s


@pytest.mark.usefixtures("way_to_fork")
def test_without_cgroups_usage_is_what_wait4_reports() -> None:
    """Usage includes a child that the leader waited for; it is there after the end, as RUSAGE."""
    program = (
        f"{_BURN}\nblock = b'x' * {64 << 20}\n"
        "if os.fork() == 0: burn(); os._exit(0)\n"
        "os.wait(); print(flush=True); sys.stdin = open(sys.argv[1]); sys.stdin.readline()"
    )
    with Worker(enforcement="off") as worker, tempfile.TemporaryDirectory() as directory:
        latch = os.path.join(directory, "latch")
        os.mkfifo(latch)
        job_id = worker.start(sys.executable, ["-I", "-S", "-c", program, latch])
        _first_line(worker, job_id)
        running = worker.status(job_id)
        Path(latch).write_text("on\n")
        job = worker.wait(job_id, GUARD_S)
        assert worker.list() == (job,)
    assert (running.usage, running.usage_source) == (None, None)
    assert (job.exit_code, job.usage_source) == (0, UsageSource.RUSAGE)
    assert 0.25 < _cpu_s(job) < GUARD_S
    assert job.usage
    assert (job.usage.cpu_user_s or 0) > 0.15
    assert 64 << 20 <= (job.usage.memory_peak_bytes or 0) < 128 << 20
    told = {"cpu_user_s", "cpu_system_s", "memory_peak_bytes"}
    assert {name for name, value in asdict(job.usage).items() if value is not None} == told


def test_without_cgroups_an_idle_job_has_used_next_to_nothing() -> None:
    """A job's usage does not include CPU time of earlier jobs."""
    with Worker(enforcement="off") as worker:
        busy = worker.start(sys.executable, ["-I", "-S", "-c", f"{_BURN}\nburn()"])
        assert _cpu_s(worker.wait(busy, GUARD_S)) > 0.25
        assert _cpu_s(worker.wait(worker.start("true"), GUARD_S)) < 0.2


def test_stopped_job_has_its_usage() -> None:
    """A stopped job has the CPU time that it used before the stop."""
    with Worker(enforcement="off") as worker:
        program = f"{_BURN}\nburn(); print(flush=True); time.sleep(1000)"
        job_id = worker.start(sys.executable, ["-I", "-S", "-c", program])
        _first_line(worker, job_id)
        job = worker.stop(job_id)
        assert (_cpu_s(job) > 0.25, job.usage_source) == (True, UsageSource.RUSAGE)
        assert worker.stop(job_id) == job


@pytest.mark.usefixtures("way_to_fork")
def test_usage_of_a_cgroup_is_live_and_in_the_end_final(latch: Path) -> None:
    """CPU time only grows, and includes a child that the leader did not wait for."""
    program = (
        f"{_BURN}\nburn(); print(flush=True); open(sys.argv[1]).readline()\n"
        "end, child = os.pipe()\n"
        "if os.fork() == 0: burn(); os._exit(0)\n"
        "os.close(child); os.read(end, 1)"
    )
    with Worker(enforcement="auto") as worker:
        if worker.subtree is None:
            pytest.skip("this host has no usable cgroup v2 hierarchy")
        job_id = worker.start(sys.executable, ["-I", "-S", "-c", program, str(latch)])
        _first_line(worker, job_id)
        first, second = worker.status(job_id), worker.status(job_id)
        assert worker.list()[0].usage is None
        latch.write_text("on\n")
        job = worker.wait(job_id, GUARD_S)
        assert worker.status(job_id) == job == worker.list()[0]
    sources = {first.usage_source, second.usage_source, job.usage_source}
    assert sources == {UsageSource.CGROUP}
    assert 0.25 < _cpu_s(first) <= _cpu_s(second) < _cpu_s(job) - 0.25
    assert job.usage
    assert (job.usage.memory_bytes, job.usage.pids) == (None, None)
    in_force = worker.subtree.controllers if worker.subtree else frozenset()
    for controller, value in {
        "memory": job.usage.memory_peak_bytes,
        "pids": first.usage.pids if first.usage else None,
    }.items():
        assert (value is not None) == (controller in in_force)


# --- status, wait, list -----------------------------------------------------------------------


@_ONE_WAY_TO_FORK
def test_wait_gives_up_after_its_timeout(worker: Worker) -> None:
    """A wait that times out raises TimeoutError, and the job runs on."""
    job_id = _sh(worker, _FOREVER)
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match=job_id):
            worker.wait(job_id, timeout)
    assert worker.status(job_id).status is Status.RUNNING


def test_wait_returns_when_the_job_ends(worker: Worker, pool: ThreadPoolExecutor) -> None:
    """Five threads that wait for a job get the same final state."""
    job_id = _sh(worker, _FOREVER)
    waiting = [pool.submit(worker.wait, job_id) for _ in range(5)]
    job = worker.stop(job_id)
    assert [future.result(GUARD_S) for future in waiting] == [job] * 5


@pytest.mark.parametrize("job_id", ["", "nonsense", ABSENT])
@_ONE_WAY_TO_FORK
def test_unknown_job_is_an_error_everywhere(worker: Worker, job_id: str) -> None:
    """Every method raises `UnknownJobError`, which is a WorkerError and a LookupError."""
    worker.start("true")
    for method in (worker.stop, worker.status, worker.wait, worker.stream):
        with pytest.raises(UnknownJobError) as caught:
            method(job_id)
        assert caught.value.job_id == job_id
        assert isinstance(caught.value, WorkerError)
        assert isinstance(caught.value, LookupError)


@_ONE_WAY_TO_FORK
def test_list_is_in_order_and_by_owner(worker: Worker) -> None:
    """The list has running and ended jobs in the order of their starts, all or one owner's."""
    owners = ["alice", "bob", "alice", ""]
    job_ids = [worker.start("true", owner=owner) for owner in owners]
    worker.wait(job_ids[0], GUARD_S)
    assert [job.job_id for job in worker.list()] == job_ids
    assert [job.job_id for job in worker.list(owner="alice")] == [job_ids[0], job_ids[2]]
    assert [job.job_id for job in worker.list(owner="")] == [job_ids[3]]
    assert worker.list(owner="carol") == ()


# --- several workers, closing, crashing ---------------------------------------------------------


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("older_first", [True, False])
def test_two_workers_in_one_program_are_independent(
    enforcement: Enforcement, older_first: bool, busy: bool
) -> None:
    """Each worker knows only its own jobs; closing one does not affect the other's."""
    with contextlib.ExitStack() as closing:
        workers = [closing.enter_context(Worker(enforcement=enforcement)) for _ in range(2)]
        job_ids = [_sh(worker, _FOREVER) for worker in workers]
        for worker, job_id in zip(workers, job_ids, strict=True):
            assert [job.job_id for job in worker.list()] == [job_id]
            if not busy:
                assert _end(worker.stop(job_id)) == _STOPPED
        closed, other = workers if older_first else reversed(workers)
        closed.close()
        assert _output(other, other.start("echo", ["still here"])) == b"still here\n"
        assert [_end(other.stop(job.job_id)) for job in other.list()] == [_STOPPED, _EXITED_0]
    for worker in workers:
        assert worker.subtree is None or not worker.subtree.path.exists()


def test_close_ends_everything(
    enforcement: Enforcement, fifo: _Fifo, pool: ThreadPoolExecutor
) -> None:
    """Jobs end as CLOSED and streams end; no process, thread, file or cgroup is left."""
    pool.submit(int).result(GUARD_S)
    descriptors = descriptors_of()
    worker = Worker(enforcement=enforcement)
    directory, subtree = worker._parts.output_dir.path, worker.subtree
    done = worker.start("true")
    ended = worker.wait(done, GUARD_S)
    script = f'exec 3>"$1"; setsid --fork sleep infinity; echo ready; {_FOREVER}'
    running = [_sh(worker, script, fifo.path) for _ in range(3)]
    followers = [pool.submit(b"".join, worker.stream(job_id)) for job_id in running]
    for job_id in running:
        assert _first_line(worker, job_id) == b"ready"
    worker.close()
    worker.close()
    assert [future.result(GUARD_S) for future in followers] == [b"ready\n"] * 3
    for job_id in running:
        end = _end(worker.status(job_id))
        assert end == (Status.STOPPED, EndReason.CLOSED, None, 9)
    assert worker.status(done) == ended
    assert not fifo.is_held()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("job-")]
    assert descriptors_of() == descriptors
    assert not directory.exists()
    assert subtree is None or not subtree.path.exists()


_FORKING = """
import os, sys
from worker import Status, Worker
with Worker(enforcement="off") as worker:
    job_id = worker.start("sleep", ["infinity"])
    pid = os.fork()
    if pid == 0:
        sys.exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert worker.status(job_id).status is Status.RUNNING
    assert b"".join(worker.stream(worker.start("echo", ["up"]))) == b"up\\n"
"""


def test_fork_that_closes_the_worker_ends_nothing() -> None:
    """It leaves the context by an exception, say. The jobs are those of the other process."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORKING], cwd=_HERE, check=True, timeout=GUARD_S
    )


def test_closed_worker_refuses_new_work(worker: Worker) -> None:
    """After a close, starts and streams are refused; the state of known jobs can be read."""
    job_id = worker.start("true")
    worker.close()
    with pytest.raises(WorkerClosedError, match="shutting down"):
        worker.start("true")
    with pytest.raises(WorkerClosedError):
        worker.stream(job_id)
    assert worker.stop(job_id) == worker.status(job_id) == worker.wait(job_id, 0)


def test_starts_that_race_with_close_run_or_are_refused(
    enforcement: Enforcement, fifo: _Fifo, pool: ThreadPoolExecutor
) -> None:
    """A close stops every job whose start succeeded, and refuses all other starts."""
    for _ in range(5):
        worker = Worker(enforcement=enforcement)
        barrier = threading.Barrier(9)

        def start(worker: Worker = worker, barrier: threading.Barrier = barrier) -> int:
            started = 0
            barrier.wait(GUARD_S)
            with contextlib.suppress(WorkerClosedError):
                while True:
                    _sh(worker, f'exec 3>"$1"; {_FOREVER}', fifo.path)
                    started += 1
            return started

        starts = [pool.submit(start) for _ in range(8)]
        barrier.wait(GUARD_S)
        worker.close()
        count = sum(future.result(GUARD_S) for future in starts)
        assert not fifo.is_held()
        assert len(worker.list()) == count
        assert {job.end_reason for job in worker.list()} <= {EndReason.CLOSED}


def test_close_ends_starts_that_the_kernel_holds_up(
    worker: Worker, leased: tuple[Path, Callable[[], object]], pool: ThreadPoolExecutor
) -> None:
    """A close ends starts that wait for the kernel; they raise, and leave no job."""
    starts = [pool.submit(worker.start, str(leased[0])) for _ in range(4)]
    while len(worker._starter._executing) < len(starts):
        pass
    worker.close()
    for start in starts:
        with pytest.raises(WorkerClosedError):
            start.result(GUARD_S)
    assert worker.list() == ()


def test_stream_that_races_with_close_ends_or_is_refused_as_closed(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a close comes in the middle of `stream`, the stream ends, or `WorkerClosedError` comes."""
    job_id = worker.start("true")
    worker.wait(job_id, GUARD_S)
    real_job = worker._job

    def close_meanwhile(job_id: str) -> object:
        job = real_job(job_id)
        worker.close()
        return job

    monkeypatch.setattr(worker, "_job", close_meanwhile)
    with contextlib.suppress(WorkerClosedError), worker.stream(job_id) as chunks:
        assert list(chunks) == []


def test_output_directory_is_private_and_for_one_worker(tmp_path: Path) -> None:
    """It has mode 0700, only one worker at a time may use it, and later another may."""
    directory = tmp_path / "new" / "output"
    with Worker(enforcement="off", output_dir=directory) as worker:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        job_id = worker.start("echo", ["hi"])
        assert _output(worker, job_id) == b"hi\n"
        assert stat.S_IMODE((directory / f"{job_id}.out").stat().st_mode) == 0o600
        with pytest.raises(BlockingIOError, match="another worker"):
            Worker(enforcement="off", output_dir=directory)
        assert _output(worker, job_id) == b"hi\n"
    assert list(directory.iterdir()) == []  # the caller gave the directory, so it stays
    with Worker(enforcement="off", output_dir=directory):
        pass


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_output_directory_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    """The error names the chmod to run, and no file in the directory is deleted."""
    left_over = tmp_path / f"{uuid.uuid4()}.out"
    left_over.touch()
    tmp_path.chmod(mode)
    with pytest.raises(PermissionError, match="chmod 700"):
        Worker(enforcement="off", output_dir=tmp_path)
    assert left_over.exists()
    tmp_path.chmod(0o700)


def test_left_over_output_is_swept_and_nothing_else(tmp_path: Path) -> None:
    """Only files whose names are exactly those of output files are deleted."""
    left_over = tmp_path / f"{uuid.uuid4()}.out"
    others = [
        tmp_path / name
        for name in ("notes.out", f"{uuid.uuid4()}.txt", f"{uuid.uuid4()}".upper() + "F.out")
    ]
    for path in (left_over, *others):
        path.touch()
    with Worker(enforcement="off", output_dir=tmp_path) as worker:
        assert not left_over.exists()
        worker.start("true")
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_worker_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong argument raises and leaves no directory, descriptor or process."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="enforcement must be one of"):
        Worker(enforcement=cast("Enforcement", "sometimes"))
    assert list(tmp_path.iterdir()) == []


def test_death_of_the_fork_server_ends_jobs_as_lost(
    worker: Worker, fifo: _Fifo, pool: ThreadPoolExecutor
) -> None:
    """Running jobs end as LOST and their processes are killed; streams, stops and starts end."""
    ended = worker.wait(_sh(worker, "exit 7"), GUARD_S)
    script = f'exec 3>"$1"; sleep infinity & echo ready; {_FOREVER}'
    job_ids = [_sh(worker, script, fifo.path) for _ in range(3)]
    followers = [pool.submit(_output, worker, job_id) for job_id in job_ids]
    for job_id in job_ids:
        assert _first_line(worker, job_id) == b"ready"
    kill_fork_server(worker)
    stops = [pool.submit(worker.stop, job_id) for job_id in job_ids]
    for job_id, follower, stop in zip(job_ids, followers, stops, strict=True):
        assert _end(worker.wait(job_id, GUARD_S)) == _LOST
        assert follower.result(GUARD_S) == b"ready\n"
        assert _end(stop.result(GUARD_S)) == _LOST
    fifo.await_release()
    for _ in range(2):
        with pytest.raises(SpawnerDiedError, match="fork server"):
            worker.start("true")
    assert worker.status(ended.job_id) == ended
    assert len(worker.list()) == 4


def test_start_after_the_fork_server_died_leaves_nothing(worker: Worker) -> None:
    """A start that fails because the fork server is gone removes all that it has made."""

    def held() -> tuple[list[str], int, list[Path]]:
        discard_spares(worker)  # a spare made while the fork server died may seem to be ready
        output = worker._parts.output_dir.path
        return descriptors_of(), threading.active_count(), list(output.iterdir())

    kill_fork_server(worker)
    with pytest.raises(SpawnerDiedError):
        worker.start("true")
    before = held()
    for _ in range(5):
        with pytest.raises(SpawnerDiedError):
            worker.start("true")
    assert held() == before
    assert before[2] == []
    if worker.subtree is not None:
        assert not [path for path in worker.subtree.jobs.iterdir() if path.is_dir()]


def test_start_that_nobody_can_answer_is_not_repeated(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command may have been executed when the fork server died, so the job is kept as LOST."""
    execute = Process.execute

    def execute_and_die(process: Process, *args: Any, **options: Any) -> NoReturn:
        _, pidfd = execute(process, *args, **options)
        kill_fork_server(worker)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # without cgroups nobody else would
        os.close(pidfd)
        raise SpawnerDiedError

    monkeypatch.setattr(Process, "execute", execute_and_die)
    request_id = str(uuid.uuid4())
    with pytest.raises(SpawnerDiedError):
        worker.start("sleep", ["infinity"], request_id=request_id)
    found = worker.started_by("", request_id)
    assert found is not None
    assert worker.status(found[0]).end_reason is EndReason.LOST


def test_start_that_a_close_has_cut_off_is_not_repeated(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    """The command may have run for a moment, so the job is kept, with its true end."""
    executed, goes_on = hold_executions(monkeypatch)
    closing = notice_close(worker, monkeypatch)
    request_id = str(uuid.uuid4())
    start = pool.submit(worker.start, "sleep", ["infinity"], request_id=request_id)
    assert executed.wait(GUARD_S)
    close = pool.submit(worker.close)
    assert closing.wait(GUARD_S)
    goes_on.set()
    with pytest.raises(WorkerClosedError):
        start.result(GUARD_S)
    close.result(GUARD_S)
    found = worker.started_by("", request_id)
    assert found is not None
    assert worker.status(found[0]).end_reason is EndReason.CLOSED


_FORGETFUL = """
from worker import Worker
worker = Worker(enforcement=sys.argv[1])
script = 'exec 3>"$0"; setsid --fork sleep infinity; echo ready; exec sleep infinity'
job_id = worker.start("sh", ["-c", script, sys.argv[2]])
assert next(worker.stream(job_id)) == b"ready\\n"
"""


def test_program_that_forgets_to_close_ends_and_leaves_no_process(
    enforcement: Enforcement, fifo: _Fifo, tmp_path: Path
) -> None:
    """A program that does not close its worker ends all the same, and its jobs are killed."""
    subprocess.run(
        _program(_FORGETFUL, enforcement, fifo.path),
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=GUARD_S,
        check=True,
    )
    fifo.await_release()
    Worker(enforcement=enforcement).close()  # removes the cgroup that the program left


_COPY = """
import sys
from worker import Worker
with Worker(enforcement=sys.argv[1]) as worker:
    job_id = worker.start("echo", ["hello"])
    with worker.stream(job_id) as chunks:
        sys.stdout.buffer.write(b"".join(chunks))
    print(worker.wait(job_id).exit_code, sorted(
        {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__"}))
"""


def test_library_is_its_files_and_the_standard_library(
    enforcement: Enforcement, tmp_path: Path
) -> None:
    """Copied into an empty folder, with no package installed, the library runs a job."""
    subprocess.run(["make", "-s", "library", f"DEST={tmp_path}"], cwd=_HERE, check=True)
    (tmp_path / "program.py").write_text(_COPY)
    output = subprocess.check_output(
        [sys.executable, "-E", "-s", "-S", "program.py", enforcement],
        cwd=tmp_path,
        timeout=GUARD_S,
        text=True,
    )
    # The fork server imports the others, and whoever has a cluster.
    others = {"children", "errands", "estate", "forkserver", "jobstep", "leader", "leaders"}
    others |= {"journal", "others", "slurm", "slurmchannel", "slurminput", "slurmjob"}
    others |= {"slurmreports", "slurmworker"}
    ours = sorted(set(LIBRARY) - others)
    assert output == f"hello\n0 {ours}\n"


def test_end_is_not_before_the_start_whatever_the_clock_does(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is the start and a duration, which a step of the clock does not change."""
    job_id = worker.start("sleep", ["1000000"])
    clock = type("_Clock", (datetime,), {"now": lambda _: datetime(1970, 1, 1, tzinfo=UTC)})
    monkeypatch.setattr("starting.datetime", clock)
    job = worker.stop(job_id)
    assert job.ended_at is not None
    assert timedelta(0) <= job.ended_at - job.started_at < timedelta(seconds=GUARD_S)
