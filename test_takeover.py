"""Tests of how jobs outlive their main process, at the level of spawners: real fork servers.

Each test runs with both ways to fork. `test_restart.py` has the tests of whole workers.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import successor
import takeover
from errors import TakeoverError
from messages import ExecError, receive, send
from privileges import can_change_user
from spawner import Exit, Restart, Spawner, SpawnerDiedError, duties_of, read_exit
from successor import Heritage, end_jobs, take_over
from testkit import children_of, descriptors_of, kill_with_children

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
_ENV = {"PATH": os.defpath}
_FOREVER_S = 1e6
_NOBODY = 65534

pytestmark = pytest.mark.usefixtures("way_to_fork")


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    descriptors = descriptors_of()
    yield
    assert set(descriptors_of()) <= set(descriptors)


class _Pipes:
    """The pipes of a job, for as long as one main process has it."""

    def __init__(self) -> None:
        self.output_fd, self.stdout_fd = os.pipe()
        self.exit_fd, self.their_exit_fd = os.pipe()

    def close(self, *fds: int) -> None:
        for fd in fds or (self.output_fd, self.exit_fd):
            os.close(fd)


def _duties(uids: range | None = None) -> dict[str, object]:
    return duties_of(uids=uids, homes=None, tmp=None, host_accounts=False)


def _restart(directory: Path, window_s: float = _FOREVER_S) -> Restart:
    return Restart(directory, window_s, None)


def _start(spawner: Spawner, job: str, *argv: str) -> _Pipes:
    pipes = _Pipes()
    process = spawner.fork(
        job, stdout_fd=pipes.stdout_fd, exit_fd=pipes.their_exit_fd, output_fd=pipes.output_fd
    )
    pipes.close(pipes.stdout_fd, pipes.their_exit_fd)
    _, pidfd = process.execute(argv, _ENV)
    os.close(pidfd)
    return pipes


def _await_end(former: Spawner) -> int:
    """Return the status of a fork server that was left, and that is our child."""
    return os.waitstatus_to_exitcode(os.waitpid(former.pid, 0)[1])


def _succeed(directory: Path) -> Heritage:
    heritage = take_over(directory, _duties(), bases=[None], window_s=_FOREVER_S)
    assert heritage is not None
    return heritage


def _read_to_end(fd: int) -> bytes:
    data = b""
    while more := os.read(fd, 65536):
        data += more
    return data


def _ends(fd: int) -> Exit | None:
    """Read an exit pipe to its end."""
    found = None
    while (more := read_exit(fd)) is not None:
        found = more
    return found


class _Adopted:
    """A job as the successor has it."""

    def __init__(self, spawner: Spawner, job: str) -> None:
        self.exit_fd, theirs = os.pipe()
        try:
            self.job = spawner.adopt(job, theirs)
        except OSError:
            os.close(self.exit_fd)
            raise
        finally:
            os.close(theirs)

    @property
    def fds(self) -> tuple[int, ...]:
        return self.exit_fd, self.job.output_fd, self.job.pidfd

    def finish(self) -> tuple[bytes, Exit | None]:
        """Return the rest of the output, and how the leader ended."""
        found = _read_to_end(self.job.output_fd), _ends(self.exit_fd)
        for fd in self.fds:
            os.close(fd)
        return found


def test_job_goes_on_without_its_main_process_and_with_the_next(tmp_path: Path) -> None:
    """The next main process gets its output and its end; the fork server keeps its pid."""
    (tmp_path / "go").touch()
    os.mkfifo(tmp_path / "fifo")
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sh", "-c", f"echo one; read x <{tmp_path}/fifo; echo $x; exit 3")
    assert os.read(pipes.output_fd, 4) == b"one\n"
    former.leave()
    pipes.close()
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        assert spawner.pid == former.pid
        job = _Adopted(spawner, "a")
        spawner.forget_others()
        (tmp_path / "fifo").write_text("two\n")
        output, end = job.finish()
        assert output == b"two\n"
        assert end is not None
        assert end.exit_code == 3
        spawner.forget("a")
        with pytest.raises(ProcessLookupError):
            _Adopted(spawner, "a")
        pipes = _start(spawner, "b", "echo", "hello")  # also the next main process starts jobs
        assert _read_to_end(pipes.output_fd) == b"hello\n"
        pipes.close()
    assert _await_end(former) == 0
    assert not (tmp_path / "fork-server.sock").exists()


def test_end_without_a_main_process_is_told_to_the_next(tmp_path: Path) -> None:
    """Also if the former one was told: it may have died before it recorded the end."""
    former = Spawner(restart=_restart(tmp_path))
    jobs = {"told": "exit 7", "not told": f"read x <{tmp_path}/fifo; kill -9 $$"}
    os.mkfifo(tmp_path / "fifo")
    pipes = {job: _start(former, job, "sh", "-c", text) for job, text in jobs.items()}
    told = _ends(pipes["told"].exit_fd)
    assert told is not None
    former.leave()
    (tmp_path / "fifo").write_text("x\n")
    for each in pipes.values():
        assert _read_to_end(each.output_fd) == b""
        each.close()
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        _, end = _Adopted(spawner, "told").finish()
        assert end == told
        _, end = _Adopted(spawner, "not told").finish()
        assert end is not None
        assert end.signal == signal.SIGKILL
        assert end.ended_s > told.ended_s
    _await_end(former)


def test_output_that_nobody_reads_makes_the_job_wait_and_is_not_lost(tmp_path: Path) -> None:
    """The pipe takes some; the rest is written when the next main process reads."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "head", "-c", "3000000", "/dev/zero")
    former.leave()
    pipes.close()
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        output, end = _Adopted(spawner, "a").finish()
        assert len(output) == 3_000_000
        assert end is not None
        assert end.exit_code == 0
    _await_end(former)


def test_job_that_the_next_main_process_does_not_know_is_killed(tmp_path: Path) -> None:
    """It was never recorded, so nobody has been told of it."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        spawner.forget_others()
        assert _read_to_end(pipes.output_fd) == b""  # the process is gone
        with pytest.raises(ProcessLookupError):
            _Adopted(spawner, "a")
    pipes.close()
    _await_end(former)


def test_process_that_waits_for_its_command_is_no_job(tmp_path: Path) -> None:
    """It ends with its main process. Nothing is kept of it, nor of a failed start."""
    former = Spawner(restart=_restart(tmp_path))
    job = _start(former, "job", "sleep", "infinity")
    pipes = [_Pipes(), _Pipes()]
    fds = [
        {"stdout_fd": each.stdout_fd, "exit_fd": each.their_exit_fd, "output_fd": each.output_fd}
        for each in pipes
    ]
    with former.fork("failed", **fds[0]) as failed, pytest.raises(ExecError, match="No such file"):
        failed.execute(["/absent"], _ENV)
    waiting = former.fork("waiting", **fds[1])
    former.leave()
    waiting.close()
    for each in pipes:
        each.close(each.stdout_fd, each.their_exit_fd)
        assert _read_to_end(each.output_fd) == b""
        _ends(each.exit_fd)
        each.close()
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        for name in ("failed", "waiting"):
            with pytest.raises(ProcessLookupError):
                _Adopted(spawner, name)
    job.close()
    _await_end(former)


def test_without_jobs_nobody_is_awaited(tmp_path: Path) -> None:
    """The fork server ends at once, although its window is long."""
    former = Spawner(restart=_restart(tmp_path))
    former.leave()
    assert _await_end(former) == 0
    assert take_over(tmp_path, _duties(), bases=[None], window_s=1) is None


def test_when_the_window_is_over_the_jobs_are_killed_and_their_ends_are_left(
    tmp_path: Path,
) -> None:
    """A job that had ended by itself is left with its own end."""
    former = Spawner(restart=_restart(tmp_path, window_s=0.01))
    jobs = {"ended": "exit 5", "killed": "sleep infinity"}
    pipes = {job: _start(former, job, "sh", "-c", text) for job, text in jobs.items()}
    _ends(pipes["ended"].exit_fd)
    former.leave()
    assert _await_end(former) == 0
    for each in pipes.values():
        each.close()
    ends = takeover.read_ends(tmp_path)
    assert ends.keys() == jobs.keys()
    assert (ends["ended"]["exit_code"], ends["killed"]["was_killed"]) == (5, True)
    assert ends["ended"]["ended_at"] < ends["killed"]["ended_at"]


def test_closed_spawner_leaves_nothing_to_a_successor(tmp_path: Path) -> None:
    """Its jobs end with it, window or not."""
    with Spawner(restart=_restart(tmp_path)) as spawner:
        pipes = _start(spawner, "a", "sleep", "infinity")
    assert _read_to_end(pipes.output_fd) == b""
    assert not (tmp_path / "fork-server.sock").exists()
    pipes.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"store": "another"}, "the store is none, and not another"),
        ({"uids": [70000, 70100]}, "--uids: jobs run as the users none, and not 70000-70099"),
        ({"host_accounts": True}, "--accounts is range, and not host"),
        ({"tmp": "/elsewhere"}, "TMPDIRs are in none, and not /elsewhere"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    """The error says which differ. The former settings can still take over."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    with pytest.raises(TakeoverError, match=words):
        take_over(tmp_path, _duties() | change, bases=[None], window_s=1)
    with pytest.raises(TakeoverError, match="cgroups below None, and not below /base"):
        take_over(tmp_path, _duties(), bases=["/base"], window_s=1)
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        spawner.kill("a")
        assert _Adopted(spawner, "a").finish()[0] == b""
    pipes.close()
    _await_end(former)


def test_version_that_cannot_take_over_is_refused_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another protocol nor a program that cannot be executed costs a job."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    monkeypatch.setattr(successor, "PROGRAM", (*successor.PROGRAM[:-1], str(tmp_path / "absent")))
    with pytest.raises(TakeoverError, match="absent cannot be executed"):
        take_over(tmp_path, _duties(), bases=[None], window_s=1)
    monkeypatch.undo()
    with takeover.connect(tmp_path) or pytest.fail("nobody waits") as sock:
        send(sock, {"op": "take over", "protocol": takeover.PROTOCOL + 1})
        answer, _ = receive(sock)
        assert f"is {takeover.PROTOCOL}, and not {takeover.PROTOCOL + 1}" in answer["refused"]
    for nonsense in (b"{", b'{"op": "take over"}', b"[]"):
        with takeover.connect(tmp_path) or pytest.fail("nobody waits") as sock:
            sock.send(nonsense)
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        spawner.kill("a")
        assert _Adopted(spawner, "a").finish()[0] == b""
    pipes.close()
    _await_end(former)


@pytest.mark.parametrize("lives", [True, False])
def test_successor_that_goes_away_during_the_takeover_costs_no_job(
    tmp_path: Path, *, lives: bool
) -> None:
    """Nobody waits for the answer of the fork server, which then waits for the next successor."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    request = {
        "op": "take over",
        "protocol": takeover.PROTOCOL,
        "duties": _duties(),
        "bases": [None],
        "window_s": _FOREVER_S,
        "program": successor.PROGRAM,
    }
    with (
        takeover.connect(tmp_path) or pytest.fail("nobody waits") as sock,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process,
        open(os.pidfd_open(process.pid)) as main_fd,
    ):
        if not lives:
            process.kill()
        send(sock, request, [main_fd.fileno()])
        sock.close()
        with Spawner(heritage=_succeed(tmp_path)) as spawner:
            assert spawner.pid == former.pid
            spawner.kill("a")
            assert _Adopted(spawner, "a").finish()[0] == b""
    pipes.close()
    _await_end(former)


def test_takeover_that_fails_leaves_no_descriptor_in_the_fork_server(tmp_path: Path) -> None:
    """Whether it is refused, makes no sense, or asks for a program that cannot be executed."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    request = {"op": "take over", "protocol": takeover.PROTOCOL + 1}
    known = {"duties": _duties(), "bases": [None], "window_s": 1, "program": ["/absent"]}
    counts = []
    for message in ({}, request, {}, request | known | {"protocol": takeover.PROTOCOL}):
        with takeover.connect(tmp_path) or pytest.fail("nobody waits") as sock:
            send(sock, message, [sock.fileno()])
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    receive(sock)
        counts.append(len(os.listdir(f"/proc/{former.pid}/fd")))
    assert len(set(counts)) == 1
    with Spawner(heritage=_succeed(tmp_path)):
        pass
    pipes.close()
    _await_end(former)


def test_start_for_which_the_fork_server_has_too_few_descriptors_leaves_nothing(
    tmp_path: Path,
) -> None:
    """Wherever the start fails, no process is left to execute the command, and no descriptor."""
    with Spawner(restart=_restart(tmp_path)) as spawner:
        fds = f"/proc/{spawner.pid}/fd"
        first = _start(spawner, "first", "true")
        _ends(first.exit_fd)
        first.close()
        spawner.forget("first")
        before = len(os.listdir(fds))
        _, most = resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE)
        for more in range(3, 100):
            resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE, (before + more, most))
            pipes = _Pipes()
            process = spawner.fork(
                "a",
                stdout_fd=pipes.stdout_fd,
                exit_fd=pipes.their_exit_fd,
                output_fd=pipes.output_fd,
            )
            pipes.close(pipes.stdout_fd, pipes.their_exit_fd)
            try:
                _, pidfd = process.execute(["sleep", "infinity"], _ENV)
            except OSError:
                assert _read_to_end(pipes.output_fd) == b""
                _ends(pipes.exit_fd)
                pipes.close()
                spawner.kill("absent")  # once this is answered, what came before is over
                assert len(os.listdir(fds)) == before
            else:
                break
        assert more > 3  # at least one start has failed
        os.close(pidfd)
    pipes.close()


def test_another_copy_of_the_program_takes_over_in_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork server then runs the program of the copy; the job is still its child."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    copy = tmp_path / "copy"
    subprocess.run(["make", "-s", "library", f"DEST={copy}"], cwd=_HERE, check=True)
    program = str(copy / "forkserver.py")
    monkeypatch.setattr(successor, "PROGRAM", (*successor.PROGRAM[:-1], program))
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        assert program.encode() in Path(f"/proc/{spawner.pid}/cmdline").read_bytes()
        job = _Adopted(spawner, "a")
        assert children_of(spawner.pid) == [job.job.pid]
        spawner.kill("a")
        _, end = job.finish()
        assert end is not None
        assert end.signal == signal.SIGKILL
    pipes.close()
    _await_end(former)


_TAMPERS = """
import json, os, sys
*before, state_fd = sys.argv[2:]
if before:
    with open(int(state_fd), "r+", closefd=False) as file:
        state = json.load(file)
        file.seek(0)
        file.truncate()
        {change}
        file.seek(0)
    os.lseek(int(state_fd), 0, 0)
os.execv(sys.executable, [sys.executable, "-ESs", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    "change",
    [
        'file.write("{")',
        'del state["leaders"]; json.dump(state, file)',
        'state["estate"]["jobs"]["a"] = []; json.dump(state, file)',
        'sys.argv[-2] = "{}"; json.dump(state, file)',
    ],
)
def test_state_that_makes_no_sense_to_the_next_program_ends_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """No main process could take the jobs over any more, so they must not go on unseen."""
    former = Spawner(restart=_restart(tmp_path))
    # A process that has left the leader's session ends, too.
    pipes = _start(former, "a", "sh", "-c", "setsid sleep infinity & exec sleep infinity")
    former.leave()
    script = _TAMPERS.replace("{change}", change)
    program = (sys.executable, "-c", script, str(_HERE / "forkserver.py"))
    monkeypatch.setattr(successor, "PROGRAM", program)
    assert take_over(tmp_path, _duties(), bases=[None], window_s=1) is None
    assert _read_to_end(pipes.output_fd) == b""  # no process of the job is left
    assert _await_end(former) == 1
    pipes.close()


@pytest.mark.parametrize("takes_all", [False, True])
def test_successor_without_a_window_that_gives_up_leaves_the_jobs(
    tmp_path: Path, *, takes_all: bool
) -> None:
    """They wait for another successor, for the window of the main process that started them."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    heritage = take_over(tmp_path, _duties(), bases=[None], window_s=0)
    spawner = Spawner(heritage=heritage)
    if takes_all:
        for fd in _Adopted(spawner, "a").fds:
            os.close(fd)
        spawner.forget_others()
    spawner.leave()
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        spawner.kill("a")
        _Adopted(spawner, "a").finish()
    pipes.close()
    _await_end(former)


def test_successor_without_a_window_ends_its_jobs_with_itself(tmp_path: Path) -> None:
    """However it ends, once it has taken everything over."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    heritage = take_over(tmp_path, _duties(), bases=[None], window_s=0)
    assert heritage is not None
    spawner = Spawner(heritage=heritage)
    adopted = _Adopted(spawner, "a")
    spawner.forget_others()
    heritage.close()  # as the kernel does when a process is killed
    assert adopted.finish()[0] == b""
    pipes.close()
    assert _await_end(former) == 0


def test_jobs_can_be_ended_without_a_main_process(tmp_path: Path) -> None:
    """For an operator who does not want to start the next one."""
    os.mkfifo(tmp_path / "fifo")
    former = Spawner(restart=_restart(tmp_path))
    script = "trap 'echo bye; exit 5' TERM; echo up; read -r _ <>$0"
    pipes = _start(former, "a", "sh", "-c", script, str(tmp_path / "fifo"))
    assert os.read(pipes.output_fd, 100) == b"up\n"
    former.leave()
    assert end_jobs(tmp_path)
    assert _read_to_end(pipes.output_fd) == b"bye\n"  # after SIGTERM
    end = takeover.read_ends(tmp_path)["a"]
    assert (end["exit_code"], end["was_killed"]) == (5, True)
    assert not end_jobs(tmp_path)
    pipes.close()
    _await_end(former)


_KILLED = """
import os, sys, time
from pathlib import Path
from spawner import Restart, Spawner
spawner = Spawner(restart=Restart(Path(sys.argv[1]), 1e6, None))
output_fd, stdout_fd = os.pipe()
exit_fd, their_exit_fd = os.pipe()
process = spawner.fork("a", stdout_fd=stdout_fd, exit_fd=their_exit_fd, output_fd=output_fd)
process.execute(["sh", "-c", "echo begun; exec sleep infinity"], {"PATH": os.defpath})
print(spawner.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_killed_main_process_does_not_end_its_jobs(tmp_path: Path) -> None:
    """Nor does a successor that dies before it has adopted anything."""
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    killed = subprocess.run(command, cwd=_HERE, check=False, stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    _succeed(tmp_path).close()
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        assert spawner.pid == int(killed.stdout)
        job = _Adopted(spawner, "a")
        assert os.read(job.job.output_fd, 6) == b"begun\n"
        spawner.kill("a")
        job.finish()


def test_fork_server_that_another_user_started_is_not_believed(tmp_path: Path) -> None:
    """Whoever can put a socket into the directory must not become the fork server."""
    if not can_change_user():
        pytest.skip("needs the right to change users")
    sock = takeover.bind(tmp_path)
    with sock:
        os.seteuid(_NOBODY)
        try:
            sock.listen()
        finally:
            os.seteuid(0)
        with pytest.raises(TakeoverError, match="another user's process listens"):
            take_over(tmp_path, _duties(), bases=[None], window_s=1)


def test_other_users_cannot_take_over(tmp_path: Path) -> None:
    """Neither a job nor a main process that has given up root: the kernel says who connects."""
    if not can_change_user():
        pytest.skip("needs the right to change users")
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    assert (tmp_path / "fork-server.sock").stat().st_mode & 0o777 == 0o600
    os.chmod(tmp_path / "fork-server.sock", 0o666)  # the second line of defence
    script = (
        "import os, socket, sys; fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "s.connect(f'/proc/self/fd/{fd}/fork-server.sock')\n"
        'try: s.send(b\'{"op": "end"}\'); sys.exit(len(s.recv(100)))\n'
        "except ConnectionError: pass"
    )
    tmp_path.chmod(0o755)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        spawner.kill("a")
        _Adopted(spawner, "a").finish()
    pipes.close()
    _await_end(former)


def test_death_of_a_fork_server_is_noticed_by_its_second_main_process(tmp_path: Path) -> None:
    """Although the fork server is not a child of that process."""
    former = Spawner(restart=_restart(tmp_path))
    pipes = _start(former, "a", "sleep", "infinity")
    former.leave()
    with Spawner(heritage=_succeed(tmp_path)) as spawner:
        kill_with_children(spawner.pid)
        assert spawner.has_died
        with pytest.raises(SpawnerDiedError):
            spawner.forget_others()
    pipes.close()


def test_long_path_of_a_directory_is_no_problem(tmp_path: Path) -> None:
    """A socket's own name may have 107 bytes only."""
    directory = tmp_path / ("d" * 200)
    directory.mkdir()
    with takeover.bind(directory) as sock:
        sock.listen()
        with takeover.connect(directory) or socket.socket() as connection:
            assert takeover.is_trusted(connection)
