"""Tests of the spawner: a real helper process and real jobs.

That a process is dead is proved by end-of-file on a pipe that it held open.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import spawner as spawner_module
from conftest import children_of, descriptors_of
from spawner import Exit, Spawner, SpawnerDiedError, read_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_GUARD_S = 60  # only a hang takes this long
_ENV = {"PATH": os.defpath}
_FOREVER = "sleep infinity"


class _Job:
    """A job as the spawner sees it, with the read ends of its two pipes."""

    def __init__(self, spawner: Spawner, argv: list[str], name: str) -> None:
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self._output_fd, stdout_fd = os.pipe()
            self._exit_fd, exit_fd = os.pipe()
            for fd in (self._output_fd, self._exit_fd):
                undo.callback(os.close, fd)
            for fd in (stdout_fd, exit_fd):
                theirs.callback(os.close, fd)
            self.pid, self.pidfd = spawner.spawn(
                name, argv, _ENV, stdout_fd=stdout_fd, exit_fd=exit_fd
            )
            undo.callback(os.close, self.pidfd)
            self.close = undo.pop_all().close

    def read(self) -> bytes:
        """Everything the job writes, until no process holds its output."""
        with open(self._output_fd, "rb", closefd=False) as output:
            return output.read()

    def readline(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._output_fd, 1)
            assert byte, line
            line += byte
        return line

    def exit(self) -> Exit | None:
        """How it ended, without what it used."""
        end = read_exit(self._exit_fd)
        return end and Exit(end.exit_code, end.signal)


def _await_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], _GUARD_S)[0]


def _program(source: str, *args: str) -> list[str]:
    """Run `source` as a program that can import the library; it must not use ours."""
    path = str(Path(__file__).parent)
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{source}", *args]


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Every test, whatever it does, must give back all descriptors and processes."""
    before = descriptors_of(), children_of(os.getpid())
    yield
    assert (descriptors_of(), children_of(os.getpid())) == before


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    with Spawner() as spawner:
        yield spawner


@pytest.fixture
def spawn(spawner: Spawner) -> Iterator[Callable[..., _Job]]:
    """Start `argv` as a job and close its pipes after the test."""
    with contextlib.ExitStack() as jobs:

        def spawn(*argv: str, name: str = "job") -> _Job:
            job = _Job(spawner, list(argv), name)
            jobs.callback(job.close)
            return job

        yield spawn


# --- one job ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("exit 0", Exit(exit_code=0)),
        ("exit 7", Exit(exit_code=7)),
        ("exit 255", Exit(exit_code=255)),
        ("kill -TERM $$", Exit(signal=signal.SIGTERM)),
        ("kill -KILL $$", Exit(signal=signal.SIGKILL)),
    ],
)
def test_exit_pipe_tells_the_end_and_then_that_the_group_is_gone(
    spawn: Callable[..., _Job], script: str, end: Exit
) -> None:
    """One line says how the leader ended, end-of-file that nothing of its group is left."""
    job = spawn("sh", "-c", f"{_FOREVER} & {script}")
    assert job.exit() == end
    assert job.exit() is None
    assert job.read() == b""  # the sleeper is dead, or its output would be open


def test_stdout_and_stderr_share_one_pipe_in_order(spawn: Callable[..., _Job]) -> None:
    """What a job prints on either comes out as it was written, byte for byte."""
    job = spawn("sh", "-c", "echo out; echo err >&2; printf 'a\\0b\\377'")
    assert job.read() == b"out\nerr\na\0b\xff"


def test_pid_and_pidfd_are_the_leaders(spawn: Callable[..., _Job]) -> None:
    """The pidfd outlives the process and cannot mean another."""
    job = spawn("sh", "-c", "echo $$; read line")
    assert job.exit() == Exit(exit_code=1)  # stdin is at its end
    _await_end(job.pidfd)
    assert int(job.read()) == job.pid
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(job.pidfd, signal.SIGKILL)


def test_leader_has_its_own_session_null_stdin_and_the_root_directory(
    spawn: Callable[..., _Job],
) -> None:
    """Pid, process group and session are one number; there is no terminal."""
    job = spawn("sh", "-c", "cat /proc/$$/stat; readlink /proc/$$/fd/0; pwd; umask")
    stat, stdin, directory, umask = job.read().decode().splitlines()
    _ppid, group, session, terminal = stat.rpartition(") ")[2].split()[1:5]
    assert [int(group), int(session), int(terminal)] == [job.pid, job.pid, 0]
    assert (stdin, directory, umask) == ("/dev/null", "/", "0022")


def test_argument_of_100_kib_arrives_whole(spawn: Callable[..., _Job]) -> None:
    """A request larger than any socket buffer's packet limit is no problem."""
    text = "".join(f"{i:09}\n" for i in range(10_240))
    with_reader = spawn("printf", "%s", text)
    assert with_reader.read() == text.encode()


def test_kill_takes_the_whole_process_group(spawner: Spawner, spawn: Callable[..., _Job]) -> None:
    """Children and grandchildren that stayed in the group die with the leader."""
    job = spawn("sh", "-c", f"({_FOREVER} & {_FOREVER}) & echo; {_FOREVER}; exit 3")
    job.readline()
    spawner.kill("job")
    assert job.exit() == Exit(signal=signal.SIGKILL)
    assert job.exit() is None
    assert job.read() == b""


def test_kill_of_an_ended_or_unknown_job_does_nothing(
    spawner: Spawner, spawn: Callable[..., _Job]
) -> None:
    """Once reaped a leader's number may be a stranger's; nobody is signalled."""
    job = spawn("sh", "-c", "exit 5")
    assert [job.exit(), job.exit()] == [Exit(exit_code=5), None]
    spawner.kill("job")
    spawner.kill("never started")


def test_kill_hits_only_the_job_it_names(spawner: Spawner, spawn: Callable[..., _Job]) -> None:
    """The other jobs run on."""
    first = spawn("sh", "-c", _FOREVER, name="first")
    second = spawn("sh", "-c", "echo alive; " + _FOREVER, name="second")
    spawner.kill("first")
    assert first.exit() == Exit(signal=signal.SIGKILL)
    assert second.readline() == b"alive\n"
    assert not select.select([second.pidfd], [], [], 0)[0]


@pytest.mark.parametrize(
    ("mode", "content", "code"),
    [
        (0o644, "#!/bin/sh\n", errno.EACCES),
        (0o755, "neither magic nor interpreter\n", errno.ENOEXEC),
        (0o755, "#!/no/such/interpreter\n", errno.ENOENT),
    ],
)
def test_exec_error_carries_its_errno(
    spawn: Callable[..., _Job], tmp_path: Path, mode: int, content: str, code: int
) -> None:
    """Why a file could not be executed comes back as the kernel said it."""
    path = tmp_path / "command"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        spawn(str(path))
    assert caught.value.errno == code


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["no-such-command"], errno.ENOENT),
        (["/no/such/file"], errno.ENOENT),
        (["/"], errno.EACCES),
        (["true", "x" * 200 * 1024], errno.E2BIG),
        (["/" + "x" * 300], errno.ENAMETOOLONG),
    ],
)
def test_failed_start_leaves_nothing_and_the_next_one_works(
    spawner: Spawner, spawn: Callable[..., _Job], argv: list[str], code: int
) -> None:
    """The helper keeps neither a child nor a descriptor of a job that never was."""
    spawner.kill("warm-up")
    before = descriptors_of(), descriptors_of(spawner.pid)
    for _ in range(5):
        with pytest.raises(OSError, match=os.strerror(code)):
            spawn(*argv)
    spawner.kill("nobody")  # the helper has cleaned up once it answers this
    assert (descriptors_of(), descriptors_of(spawner.pid)) == before
    assert children_of(spawner.pid) == []
    assert spawn("echo", "fine").read() == b"fine\n"


def test_helper_keeps_nothing_of_ended_jobs(spawner: Spawner, spawn: Callable[..., _Job]) -> None:
    """After thirty jobs it has no more descriptors and children than before."""
    spawner.kill("warm-up")
    before = descriptors_of(spawner.pid)
    for i in range(30):
        job = spawn("true", name=str(i))
        assert [job.exit(), job.exit()] == [Exit(exit_code=0), None]
    spawner.kill("nobody")
    assert descriptors_of(spawner.pid) == before
    assert children_of(spawner.pid) == []


def test_orphans_are_reaped(spawner: Spawner, spawn: Callable[..., _Job], tmp_path: Path) -> None:
    """A daemon that left its job's group becomes the helper's child, and never a zombie."""
    fifo, up = tmp_path / "fifo", tmp_path / "up"
    os.mkfifo(fifo)
    os.mkfifo(up)
    daemon_script = 'echo $$; echo >"$1"; read x <"$0"'
    # The leader must not end before the daemon has left its group, or it would take it along.
    script = 'setsid --fork sh -c "$1" "$2" "$3"; read x <"$3"'
    job = spawn("sh", "-c", script, "sh", daemon_script, str(fifo), str(up))
    daemon = int(job.readline())
    assert [job.exit(), job.exit()] == [Exit(exit_code=0), None]
    assert children_of(spawner.pid) == [daemon]
    with contextlib.closing(_Pidfd(daemon)) as pidfd:
        fifo.write_text("go\n")
        _await_end(pidfd.fd)
    other = spawn("true", name="other")  # the helper reaps all there is when this one ends
    assert [other.exit(), other.exit()] == [Exit(exit_code=0), None]
    assert children_of(spawner.pid) == []


class _Pidfd:
    def __init__(self, pid: int) -> None:
        self.fd = os.pidfd_open(pid)

    def close(self) -> None:
        os.close(self.fd)


# --- what jobs inherit ------------------------------------------------------------------------

_HOSTILE_OWNER = """
import os, signal
signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE}
for number in signals | {signal.SIGUSR1, signal.SIGRTMIN}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
os.umask(0o077)
os.environ["SECRET"] = "x"
leak = os.open("/etc/passwd", os.O_RDONLY)
os.set_inheritable(leak, True)

from spawner import Spawner, read_exit
with Spawner() as spawner:
    read_end, exit_fd = os.pipe()
    os.set_inheritable(read_end, True)
    spawner.spawn("job", sys.argv[1:], {"ONLY": "this"}, stdout_fd=1, exit_fd=exit_fd)
    os.close(exit_fd)
    read_exit(read_end)
"""


def _from_hostile_owner(*argv: str) -> str:
    """Run a job whose owner ignores and blocks signals and has things to leak."""
    return subprocess.check_output(_program(_HOSTILE_OWNER, *argv), text=True, timeout=_GUARD_S)


def test_job_has_default_signals_whatever_the_owner_did() -> None:
    """Nothing is blocked, ignored or pending, so that SIGTERM stops what it is meant for.

    But for the two signals that are the C library's own, below SIGRTMIN: it lets nobody
    set them, and its posix_spawn, which make uses, leaves them ignored.
    """
    lines = _from_hostile_owner("/bin/cat", "/proc/self/status").splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    ours = sum(1 << (number - 1) for number in signal.valid_signals())
    signals = {key: int(status[key], 16) & ours for key in ("SigBlk", "SigIgn", "SigCgt", "SigPnd")}
    assert signals == {"SigBlk": 0, "SigIgn": 0, "SigCgt": 0, "SigPnd": 0}


def test_job_has_no_descriptor_but_the_three() -> None:
    """Neither the owner's nor the helper's sockets and files reach a job; 3 is ls's own."""
    assert _from_hostile_owner("/bin/ls", "/proc/self/fd").split() == ["0", "1", "2", "3"]


def test_job_has_only_the_environment_it_was_given() -> None:
    """No secret of the owner's environment reaches a job."""
    assert _from_hostile_owner("/usr/bin/env") == "ONLY=this\n"


# --- the helper ------------------------------------------------------------------------------


def test_helper_is_small_and_single_threaded(spawner: Spawner, spawn: Callable[..., _Job]) -> None:
    """preexec_fn is safe only where no other thread can hold a lock."""
    spawn("true").exit()
    status = Path(f"/proc/{spawner.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert fields["Threads"] == "1"
    assert int(fields["VmRSS"].split()[0]) < 32 * 1024  # kB


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE])
def test_helper_survives_signals_meant_for_the_service(
    spawner: Spawner, spawn: Callable[..., _Job], number: signal.Signals
) -> None:
    """A service manager signals every process; the helper lives until its owner goes."""
    running = spawn("sh", "-c", f"echo; {_FOREVER}", name="running")
    running.readline()
    for _ in range(3):
        os.kill(spawner.pid, number)
    assert spawn("echo", "still here", name="next").read() == b"still here\n"
    assert not select.select([running.pidfd], [], [], 0)[0]


def test_death_of_the_helper_is_end_of_file_and_an_error(
    spawner: Spawner, spawn: Callable[..., _Job]
) -> None:
    """Without its parent a job's end is unknown: no line is made up, nothing hangs."""
    job = spawn("sh", "-c", f"echo; exec {_FOREVER}")
    job.readline()
    os.kill(spawner.pid, signal.SIGKILL)
    assert job.exit() is None
    for _ in range(2):
        with pytest.raises(SpawnerDiedError):
            spawn("true", name="next")
        with pytest.raises(SpawnerDiedError):
            spawner.kill("job")
    signal.pidfd_send_signal(job.pidfd, signal.SIGKILL)
    assert job.read() == b""


def test_close_kills_jobs_and_daemons_and_is_idempotent(
    spawner: Spawner, spawn: Callable[..., _Job], tmp_path: Path
) -> None:
    """When close returns, no process of any job is left, in whatever session it is."""
    up = tmp_path / "up"
    os.mkfifo(up)
    daemon = f'echo >"$0"; {_FOREVER}'
    job = spawn("sh", "-c", 'setsid --fork sh -c "$0" "$1"; read x <"$1"', daemon, str(up))
    assert job.exit() == Exit(exit_code=0)
    other = spawn("sh", "-c", _FOREVER, name="other")
    spawner.close()
    spawner.close()
    for fd in (job._output_fd, other._output_fd):
        os.set_blocking(fd, False)
        assert os.read(fd, 1) == b""  # end-of-file now, not later
    with pytest.raises(SpawnerDiedError):
        spawn("true", name="late")


_OWNER = """
import os, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from spawner import Spawner, read_exit
with Spawner() as spawner:
    read_end, exit_fd = os.pipe()
    env = {"PATH": os.defpath}
    spawner.spawn("job", sys.argv[1:], env, stdout_fd=1, exit_fd=exit_fd)
    os.close(exit_fd)
    read_exit(read_end)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_nothing_outlives_the_owner(number: signal.Signals) -> None:
    """The owner's sudden death ends the helper, the job, its daemons and its deaf children."""
    script = f"""
        setsid sh -c 'echo escaped; {_FOREVER}' &
        (setsid sh -c 'setsid sh -c "echo twice; {_FOREVER}" & exit' &)
        sh -c 'trap "" TERM INT HUP; echo deaf; while :; do {_FOREVER}; done' &
        echo leader; wait"""
    # Owner, helper (its stderr) and all of the job hold the pipe.
    with subprocess.Popen(
        _program(_OWNER, "sh", "-c", script),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as owner:
        assert owner.stdout is not None
        lines = {owner.stdout.readline() for _ in range(4)}
        assert lines == {b"escaped\n", b"twice\n", b"deaf\n", b"leader\n"}
        owner.send_signal(number)
        assert owner.stdout.read() == b""
        assert owner.wait(_GUARD_S) == -number


def test_interrupted_request_does_not_mix_up_the_answers(
    spawn: Callable[..., _Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a Ctrl-C while it waited, the next start is not given the answer of the last."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spawner_module, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            spawn("sh", "-c", _FOREVER, name="interrupted")
    try:
        job = spawn("sh", "-c", "echo $$", name="next")
    except SpawnerDiedError:
        return  # to give up is honest
    assert int(job.read()) == job.pid


def test_exit_lines_are_json_for_the_owner_only() -> None:
    """read_exit understands what the helper writes, and end-of-file."""
    read_end, write_end = os.pipe()
    os.write(write_end, json.dumps({"signal": 9}).encode() + b"\n")
    os.close(write_end)
    assert read_exit(read_end) == Exit(signal=9)
    assert read_exit(read_end) is None
    os.close(read_end)
