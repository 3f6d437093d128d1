"""Tests of the spawner: a real helper process and real jobs.

That a process is dead is proved by end-of-file on a pipe that it held open.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cgroupfs
import forkserver
import leader
import privileges
import spawner as spawner_module
from cgroups import Subtree
from limits import NO_LIMITS
from privileges import can_change_user, can_kill_any
from spawner import Exit, Spawner, SpawnerDiedError, read_exit
from testkit import GUARD_S, children_of, descriptors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_ENV = {"PATH": os.defpath}
_FOREVER = "sleep infinity"
_POPEN_ONLY = pytest.mark.parametrize("way_to_fork", ["popen"], indirect=True)

pytestmark = pytest.mark.usefixtures("way_to_fork")
_UIDS = range(71_001, 71_005)
_SERVER_UID = 71_000


class _Job:
    """A job as the spawner sees it, with the read ends of its two pipes."""

    def __init__(
        self,
        spawner: Spawner,
        argv: list[str],
        name: str,
        uid: int | None = None,
        *,
        prepared: bool = False,
    ) -> None:
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self._output_fd, stdout_fd = os.pipe()
            self._exit_fd, exit_fd = os.pipe()
            for fd in (self._output_fd, self._exit_fd):
                undo.callback(os.close, fd)
            for fd in (stdout_fd, exit_fd):
                theirs.callback(os.close, fd)
            with spawner.fork(name, stdout_fd=stdout_fd, exit_fd=exit_fd) as process:
                if prepared:
                    spawner.kill("nobody")  # once it answers, it has done what was asked before
                self.pid, self.pidfd = process.execute(argv, _ENV, uid=uid)
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

    def has_no_process(self) -> bool:
        """Block until nobody holds its output any more; False if that takes for ever."""
        return _is_abandoned(self._output_fd)

    def exit(self) -> Exit | None:
        """How it ended, without what it used."""
        end = read_exit(self._exit_fd)
        return end and Exit(end.exit_code, end.signal)


def _is_abandoned(read_fd: int) -> bool:
    """Block until nobody holds the other end of a pipe that nobody writes to."""
    return bool(select.select([read_fd], [], [], GUARD_S)[0]) and os.read(read_fd, 1) == b""


def _status(pid: int | str) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _await_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], GUARD_S)[0]


def _program(source: str, *args: str) -> list[str]:
    """Run `source` as a program that can import the library; it must not use ours."""
    path = str(Path(__file__).parent)
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{source}", *args]


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Every test, whatever it does, must give back all descriptors and processes."""
    before = descriptors_of(), children_of(os.getpid())
    yield
    # Not that there are as many: gRPC, which other modules have used, may close some late.
    assert set(descriptors_of()) <= set(before[0])
    assert children_of(os.getpid()) == before[1]


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    with Spawner() as spawner:
        yield spawner


@pytest.fixture(params=[False, True], ids=["forked", "prepared"])
def prepared(request: pytest.FixtureRequest) -> bool:
    """Whether a job's process is there before it is told what to execute."""
    return bool(request.param)


@pytest.fixture
def spawn(spawner: Spawner, prepared: bool) -> Iterator[Callable[..., _Job]]:
    """Start `argv` as a job and close its pipes after the test."""
    with contextlib.ExitStack() as jobs:

        def spawn(*argv: str, name: str = "job") -> _Job:
            job = _Job(spawner, list(argv), name, prepared=prepared)
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
    assert (stdin, directory, umask) == ("/dev/null", "/", "0077")


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


def _fill(sock: socket.socket) -> None:
    """Let the next send on `sock` block until the other side receives."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"{}")
    sock.setblocking(True)


def test_orphans_that_end_by_the_hundred_do_not_hold_up_a_start(
    spawner: Spawner, spawn: Callable[..., _Job], tmp_path: Path
) -> None:
    """The fork server forks the next job while orphans that have ended are still to be reaped."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as orphans_wait:
        orphans_wait.callback(os.close, os.open(fifo, os.O_RDWR))
        # Each child of a setsid becomes an orphan. It waits for end-of-file on the FIFO.
        script = """exec 3<"$0"
            for i in $(seq 100); do setsid --fork sh -c 'read x <&3'; done
            echo; exec sleep infinity"""
        flood = spawn("sh", "-c", script, str(fifo), name="flood")
        flood.readline()
        orphans = set(children_of(spawner.pid)) - {flood.pid}
        assert len(orphans) == 100
        pidfds = [stack.enter_context(contextlib.closing(_Pidfd(pid))).fd for pid in orphans]
        os.kill(spawner.pid, signal.SIGSTOP)
        stack.callback(os.kill, spawner.pid, signal.SIGCONT)
        orphans_wait.close()
        for pidfd in pidfds:
            _await_end(pidfd)
        # The fork server will block when it answers. So it reaps nothing after the fork.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds, output_fd = stack.enter_context(_pipes())
        with ours, open(os.memfd_create("argv"), "w+b", buffering=0) as program:
            with theirs:
                _fill(theirs)
                request = json.dumps({"op": "fork", "job": "next"}).encode()
                socket.send_fds(spawner._socket, [request], [theirs.fileno(), *fds])
            for fd in fds:
                os.close(fd)
            work = {"argv": ["echo", "forked"], "env": _ENV, "uid": None}
            program.write(json.dumps(work).encode())
            socket.send_fds(ours, [b"{}"], [program.fileno()])
            os.kill(spawner.pid, signal.SIGCONT)
            assert select.select([output_fd], [], [], GUARD_S)[0]
            assert os.read(output_fd, 100) == b"forked\n"
            assert orphans & set(children_of(spawner.pid))


# --- what jobs inherit ------------------------------------------------------------------------

_HOSTILE_OWNER = """
import os, signal
signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE}
for number in signals | {signal.SIGUSR1, signal.SIGRTMIN}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
os.umask(0)
os.environ["SECRET"] = "x"
leak = os.open("/etc/passwd", os.O_RDONLY)
os.set_inheritable(leak, True)

from spawner import Spawner, read_exit
with Spawner() as spawner:
    read_end, exit_fd = os.pipe()
    os.set_inheritable(read_end, True)
    spawner.fork("job", stdout_fd=1, exit_fd=exit_fd).execute(sys.argv[1:], {"ONLY": "this"})
    os.close(exit_fd)
    read_exit(read_end)
"""


def _from_hostile_owner(*argv: str) -> str:
    """Run a job whose owner ignores and blocks signals and has things to leak."""
    return subprocess.check_output(_program(_HOSTILE_OWNER, *argv), text=True, timeout=GUARD_S)


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


# --- how they are forked ----------------------------------------------------------------------

_REFUSE_CLONE3 = "import testkit\ntestkit.refuse_clone3()\n"

_TELL_OF_JOBS = """
import logging, re
logging.disable()  # a host without controllers is said to be one
from privileges import can_change_user, can_kill_any
from worker import CgroupError, CommandError, Worker

uid = 71_001 if can_change_user() and can_kill_any() else None

def output(command, *args):
    job_id = worker.start(command, args, uid=uid)
    with worker.stream(job_id) as chunks:
        return b"".join(chunks).decode().replace(job_id, "JOB")

def error(command):
    try:
        worker.start(command, uid=uid)
    except (CommandError, CgroupError) as error:
        return re.sub("[-0-9a-f]{36}", "JOB", f"{type(error).__name__}: {error}")

with Worker(uids=None if uid is None else range(uid, uid + 1)) as worker:
    told = [output("sh", "-c", "ls -l /proc/self/fd | grep -c ' [0-9]* -> '; env; pwd; ulimit -a")]
    told += output("cat", "/proc/self/cgroup").split("/")[-2:]
    told += map(error, ("no-such-command", "/etc/passwd", "/etc/passwd/x", "/no/such", "/", "/etc"))
    kept = ("Umask", "Uid", "Gid", "Groups", "SigI", "SigB", "SigC", "Cap", "NoNewPrivs", "Threads")
    told += [x for x in output("cat", "/proc/self/status").splitlines() if x.startswith(kept)]
    stat = output("cat", "/proc/self/stat").rpartition(") ")[2].split()
    told += [len(set(stat[2:4])), stat[4]]  # group and session; terminal
    if worker.subtree:
        create = worker.subtree.create
        def make_and_remove(job_id, limits):
            cgroup = create(job_id, limits)
            cgroup.path.rmdir()
            return cgroup
        worker.subtree.create = make_and_remove
        errors = [error("true") for _ in range(3)]  # the first two may have spares made before
        told.append(errors[-1].replace(str(worker.subtree.jobs), "JOBS"))
print(told)
"""


@_POPEN_ONLY
def test_job_is_the_same_where_clone3_is_refused() -> None:
    """Its cgroup, user, rights, signals, limits and descriptors, and the errors of a start."""

    def tell(source: str) -> list[Any]:
        program = _program(source + _TELL_OF_JOBS)
        told: list[Any] = ast.literal_eval(
            subprocess.check_output(program, text=True, timeout=GUARD_S)
        )
        return told

    assert tell(_REFUSE_CLONE3) == tell("")


@contextlib.contextmanager
def _subtree() -> Iterator[Subtree]:
    subtree = Subtree.open("auto")
    if subtree is None:
        pytest.skip("needs a cgroup v2 hierarchy that can be written to")
    with contextlib.closing(subtree):
        yield subtree


def test_start_that_hangs_holds_up_no_other(*, prepared: bool) -> None:
    """Whatever keeps a new process from executing its command, the helper serves the others."""
    with _subtree() as subtree, Spawner(jobs_cgroup=subtree.jobs) as spawner:
        frozen = subtree.create("frozen", NO_LIMITS)
        (frozen.path / "cgroup.freeze").write_text("1")
        subtree.create("other", NO_LIMITS)
        with ThreadPoolExecutor(1) as pool:
            hanging = pool.submit(_Job, spawner, ["echo", "late"], "frozen", prepared=prepared)
            assert cgroupfs.wait_event(frozen.path, "populated", "1", GUARD_S)
            try:
                with contextlib.closing(_Job(spawner, ["echo", "fine"], "other")) as other:
                    assert other.read() == b"fine\n"
                    assert [other.exit(), other.exit()] == [Exit(exit_code=0), None]
                assert not hanging.done()
            finally:
                (frozen.path / "cgroup.freeze").write_text("0")
            with contextlib.closing(hanging.result(GUARD_S)) as job:
                assert job.read() == b"late\n"
                assert [job.exit(), job.exit()] == [Exit(exit_code=0), None]


def test_start_of_a_leased_file_holds_up_neither_starts_nor_kills(
    spawner: Spawner, leased: tuple[Path, Callable[[], object]], *, prepared: bool
) -> None:
    """One user's write lease on a script keeps only the start of that script waiting."""
    path, _release = leased
    asked = threading.Event()  # the kernel has asked for the lease: the exec has begun
    previous = signal.signal(signal.SIGURG, lambda *_: asked.set())
    try:
        with ThreadPoolExecutor(1) as pool:
            hanging = pool.submit(_Job, spawner, [str(path)], "leased", prepared=prepared)
            assert asked.wait(GUARD_S)
            for name in ("first", "second"):
                with contextlib.closing(_Job(spawner, ["sleep", "infinity"], name)) as other:
                    spawner.kill(name)
                    assert [other.exit(), other.exit()] == [Exit(signal=signal.SIGKILL), None]
            assert not hanging.done()
            spawner.kill("leased")
            with contextlib.closing(hanging.result(GUARD_S)) as job:
                assert [job.exit(), job.exit()] == [Exit(signal=signal.SIGKILL), None]
    finally:
        signal.signal(signal.SIGURG, previous)


def test_process_that_dies_before_its_command_is_told_as_its_end(*, prepared: bool) -> None:
    """Killed after the fork and before the exec: no error is made up, and nothing hangs."""
    with _subtree() as subtree, Spawner(jobs_cgroup=subtree.jobs) as spawner:
        frozen = subtree.create("frozen", NO_LIMITS)
        (frozen.path / "cgroup.freeze").write_text("1")
        with ThreadPoolExecutor(1) as pool:
            hanging = pool.submit(_Job, spawner, ["echo", "never"], "frozen", prepared=prepared)
            assert cgroupfs.wait_event(frozen.path, "populated", "1", GUARD_S)
            spawner.kill("frozen")
            with contextlib.closing(hanging.result(GUARD_S)) as job:
                assert job.read() == b""
                assert [job.exit(), job.exit()] == [Exit(signal=signal.SIGKILL), None]


# --- a process that waits ---------------------------------------------------------------------


class _Waiting:
    """A process that has been forked and not been told what to execute."""

    def __init__(self, spawner: Spawner, name: str = "job") -> None:
        before = set(children_of(spawner.pid))
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self.output_fd, stdout_fd = os.pipe()
            self.exit_fd, exit_fd = os.pipe()
            for fd in (self.output_fd, self.exit_fd):
                undo.callback(os.close, fd)
            for fd in (stdout_fd, exit_fd):
                theirs.callback(os.close, fd)
            self.process = undo.enter_context(
                spawner.fork(name, stdout_fd=stdout_fd, exit_fd=exit_fd)
            )
            spawner.kill("nobody")
            (self.pid,) = set(children_of(spawner.pid)) - before
            self.pidfd = os.pidfd_open(self.pid)
            undo.callback(os.close, self.pidfd)
            self.close = undo.pop_all().close


@pytest.fixture
def waiting(spawner: Spawner) -> Iterator[_Waiting]:
    with contextlib.closing(_Waiting(spawner)) as waiting:
        yield waiting


def test_process_that_waits_becomes_the_job(waiting: _Waiting) -> None:
    """The process that is there is the one that executes."""
    assert waiting.process.is_waiting
    pid, pidfd = waiting.process.execute(["sh", "-c", "echo $$"], _ENV)
    os.close(pidfd)
    assert pid == waiting.pid
    assert os.read(waiting.output_fd, 100) == f"{pid}\n".encode()
    assert read_exit(waiting.exit_fd)
    assert read_exit(waiting.exit_fd) is None
    assert not waiting.process.is_waiting


def test_processes_wait_for_what_they_are_told(spawner: Spawner) -> None:
    """Each is told on its own socket, in whatever order."""
    with contextlib.ExitStack() as stack:
        several = [
            stack.enter_context(contextlib.closing(_Waiting(spawner, str(i)))) for i in range(5)
        ]
        for i in (3, 0, 4, 1, 2):
            _, pidfd = several[i].process.execute(["echo", str(i)], _ENV)
            os.close(pidfd)
            assert os.read(several[i].output_fd, 100) == b"%d\n" % i


@pytest.mark.parametrize("way", ["given up", "killed by name", "killed by somebody"])
def test_process_that_is_not_told_anything_ends(
    spawner: Spawner, waiting: _Waiting, way: str
) -> None:
    """The helper keeps nothing of it, and its name can be another's."""
    if way == "given up":
        waiting.process.close()
    elif way == "killed by name":
        spawner.kill("job")
    else:
        os.kill(waiting.pid, signal.SIGKILL)
    _await_end(waiting.pidfd)
    assert read_exit(waiting.exit_fd)
    assert read_exit(waiting.exit_fd) is None
    if way != "given up":
        assert not waiting.process.is_waiting
    with contextlib.closing(_Job(spawner, ["true"], "job")) as job:
        assert [job.exit(), job.exit()] == [Exit(exit_code=0), None]
    spawner.kill("nobody")
    assert children_of(spawner.pid) == []


def test_killed_process_that_is_told_to_execute_is_told_as_its_end(
    spawner: Spawner, waiting: _Waiting
) -> None:
    """Nobody can tell whether it had begun; so that it has ended is all there is to say."""
    os.kill(waiting.pid, signal.SIGKILL)
    _await_end(waiting.pidfd)
    pid, pidfd = waiting.process.execute(["echo", "never"], _ENV)
    os.close(pidfd)
    assert pid == waiting.pid
    assert os.read(waiting.output_fd, 1) == b""
    end = read_exit(waiting.exit_fd)
    assert end is not None
    assert end.signal == signal.SIGKILL
    spawner.kill("nobody")
    assert children_of(spawner.pid) == []


def test_process_that_waits_has_nothing_but_its_socket(spawner: Spawner) -> None:
    """No descriptor of the helper's or of other jobs', and it is in a session of its own."""
    tell = ["sh", "-c", "ls -l /proc/self/fd | grep -c ' [0-9]* -> '; ps -o sid= $$"]
    with (
        contextlib.closing(_Job(spawner, ["sleep", "infinity"], "running")),
        contextlib.closing(_Waiting(spawner)) as waiting,
    ):
        # Not before it has been told, for until then it may be giving up what it has.
        pid, pidfd = waiting.process.execute(tell, _ENV)
        os.close(pidfd)
        with open(waiting.output_fd, "rb", closefd=False) as output:
            count, sid = output.read().split()
    assert int(sid) == pid
    assert int(count) == 4  # the three, and that of the directory


def test_process_that_waits_is_in_its_jobs_cgroup() -> None:
    """Before it is told what to do; so the job is there from its first instruction on."""
    with _subtree() as subtree, Spawner(jobs_cgroup=subtree.jobs) as spawner:
        cgroup = subtree.create("job", NO_LIMITS)
        with contextlib.closing(_Waiting(spawner)) as waiting:
            assert cgroupfs.wait_event(cgroup.path, "populated", "1", GUARD_S)
            assert (cgroup.path / "cgroup.procs").read_text().split() == [str(waiting.pid)]
        assert cgroupfs.wait_event(cgroup.path, "populated", "0", GUARD_S)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_death_of_the_helper_ends_the_process_that_waits(
    spawner: Spawner, waiting: _Waiting, number: signal.Signals
) -> None:
    """It would wait for us, and be nobody's child; and a signal meant for the helper is not."""
    if number == signal.SIGTERM:
        os.kill(waiting.pid, number)  # as to the whole service
        spawner.close()
    else:
        os.kill(spawner.pid, number)
    _await_end(waiting.pidfd)
    assert not waiting.process.is_waiting
    with pytest.raises(SpawnerDiedError):
        spawner.fork("other", stdout_fd=1, exit_fd=1).execute(["true"], _ENV)


# --- many -----------------------------------------------------------------------------------------


def test_many_starts_at_once_keep_apart(spawner: Spawner, *, prepared: bool) -> None:
    """Good ones and bad ones from 16 threads: each gets its own pid, output, end or error."""
    spawner.kill("warm-up")
    before = descriptors_of(spawner.pid)

    def start(number: int) -> None:
        for i in range(5):
            name = f"{number}-{i}"
            if i % 2:
                with pytest.raises(FileNotFoundError):
                    _Job(spawner, [f"/no/such/{name}"], name, prepared=prepared)
                continue
            echo = ["sh", "-c", f"echo {name} $$"]
            with contextlib.closing(_Job(spawner, echo, name, prepared=prepared)) as job:
                assert job.read() == f"{name} {job.pid}\n".encode()
                assert [job.exit(), job.exit()] == [Exit(exit_code=0), None]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(start, range(16)))
    spawner.kill("nobody")
    assert descriptors_of(spawner.pid) == before
    assert children_of(spawner.pid) == []


# --- the helper ------------------------------------------------------------------------------


def test_helper_is_small_and_single_threaded(spawner: Spawner, spawn: Callable[..., _Job]) -> None:
    """preexec_fn is safe only where no other thread can hold a lock."""
    spawn("true").exit()
    fields = _status(spawner.pid)
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
    spawner.fork("job", stdout_fd=1, exit_fd=exit_fd).execute(sys.argv[1:], env)
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
        assert owner.wait(GUARD_S) == -number


_FORKING_OWNER = """
import os, signal
from spawner import Spawner
spawner = Spawner()
_, exit_fd = os.pipe()
spawner.fork("job", stdout_fd=1, exit_fd=exit_fd).execute(sys.argv[1:], {"PATH": os.defpath})
if os.fork() == 0:
    null = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2, exit_fd):
        os.dup2(null, fd)
    for told in (b"forked", b"alive"):
        os.write(3, told)
        os.read(3, 1)
    os._exit(0)
signal.pause()
"""


def test_child_of_the_main_process_keeps_no_job_alive() -> None:
    """The main process is killed while a fork of it still holds the fork server's socket."""
    theirs, ours = socket.socketpair()
    with ours, theirs:
        # Descriptor 3 is the socket.
        program = ["sh", "-c", 'exec 3<&0 "$@"', "sh", *_program(_FORKING_OWNER)]
        with subprocess.Popen(
            [*program, "sh", "-c", f"echo up; {_FOREVER}"],
            stdin=theirs.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as main:
            theirs.close()
            assert main.stdout is not None
            ours.settimeout(GUARD_S)
            assert main.stdout.readline() == b"up\n"
            assert ours.recv(100) == b"forked"
            main.kill()
            assert main.stdout.read() == b""  # the job and the fork server held this pipe
        ours.send(b"x")
        assert ours.recv(100) == b"alive"  # the fork still holds the fork server's socket


def test_child_of_the_main_process_does_not_hold_up_close(
    spawner: Spawner, spawn: Callable[..., _Job]
) -> None:
    """The fork server ends by itself, and is not killed after the time limit of `close`."""
    job = spawn("sh", "-c", f"echo up; {_FOREVER}")
    assert job.readline() == b"up\n"
    wait_fd, end_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end_fd)
        os.read(wait_fd, 1)
        os._exit(0)
    try:
        spawner.close()
        assert spawner._process.returncode == 0
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # the child still holds the socket
        assert job.read() == b""
    finally:
        os.close(end_fd)
        os.close(wait_fd)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("full", [False, True], ids=["answer", "request"])
def test_stopped_fork_server_is_an_error_after_the_time_limit(
    monkeypatch: pytest.MonkeyPatch, *, full: bool
) -> None:
    """A request fails whether the fork server does not answer it or does not even receive it."""
    monkeypatch.setattr(spawner_module, "_ANSWER_S", 0.2)
    with Spawner() as spawner:
        os.kill(spawner.pid, signal.SIGSTOP)
        try:
            if full:
                _fill(spawner._socket)
                spawner._socket.settimeout(spawner_module._ANSWER_S)
            with pytest.raises(SpawnerDiedError, match=r"has not answered for 0\.2 s"):
                spawner.kill("nobody")
        finally:
            os.kill(spawner.pid, signal.SIGCONT)


def test_interrupted_request_does_not_mix_up_the_answers(
    spawn: Callable[..., _Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a Ctrl-C while it waited, the next start is not given the answer of the last."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spawner_module, "receive", interrupted)
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


# --- what no job gains ------------------------------------------------------------------------


def _in_child(function: Callable[[], object]) -> None:
    """Call `function` in a process of its own, which may do with its rights what it likes."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:  # noqa: BLE001 -- nothing may get back into pytest
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_helper_and_jobs_gain_no_privileges_and_dump_no_core(
    spawner: Spawner, spawn: Callable[..., _Job]
) -> None:
    """Whoever the owner is: no_new_privs is set and the core limit is 0, soft and hard."""
    job = spawn("sh", "-c", "grep NoNewPrivs /proc/$$/status; ulimit -Sc; ulimit -Hc")
    assert job.read().split() == [b"NoNewPrivs:", b"1", b"0", b"0"]
    assert _status(spawner.pid)["NoNewPrivs"] == "1"
    assert resource.prlimit(spawner.pid, resource.RLIMIT_CORE) == (0, 0)


def test_job_has_sane_limits(spawn: Callable[..., _Job]) -> None:
    """Descriptors, processes, locked memory and priority are bounded, whatever the owner has."""
    job = spawn("sh", "-c", f"echo; {_FOREVER}")
    job.readline()
    descriptors = (resource.RLIMIT_NOFILE, *leader.JOB_DESCRIPTORS)
    for kind, soft, hard in (descriptors, *forkserver.JOB_RLIMITS):
        assert soft <= hard
        _, ours = resource.getrlimit(kind)
        most = hard if ours == resource.RLIM_INFINITY else min(hard, ours)
        assert resource.prlimit(job.pid, kind) == (min(soft, most), most)


def test_job_may_have_no_more_than_its_owner() -> None:
    """A hard limit of the owner's that is lower stays."""

    def lower_and_spawn() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (600, 700))
        with (
            Spawner() as spawner,
            contextlib.closing(_Job(spawner, ["cat", "/proc/self/limits"], "job")) as job,
        ):
            (line,) = [each for each in job.read().split(b"\n") if b"Max processes" in each]
        assert line.split()[2:4] == [b"700", b"700"]

    _in_child(lower_and_spawn)


# --- the server's seat ------------------------------------------------------------------------
#
# What a server that somebody has taken over could send, which may be anything.


@pytest.fixture
def as_root() -> None:
    """Need the right to change users, or say so; in CI it is an error to go without."""
    if not (can_change_user() and can_kill_any()):
        problem = "needs root, or CAP_SETUID, CAP_SETGID and CAP_KILL"
        if os.environ.get("JOBWORKER_REQUIRE_KERNEL") == "1":
            pytest.fail(f"JOBWORKER_REQUIRE_KERNEL=1, but this test {problem}")
        pytest.skip(problem)


class _Seat:
    """The owner's end of the socket, in hostile hands, and an honest job that is running."""

    def __init__(self, **duties: Any) -> None:
        with contextlib.ExitStack() as undo:
            self.spawner = undo.enter_context(Spawner(**{"uids": _UIDS} | duties))
            self._uids = duties.get("uids", _UIDS)
            self.uid = self._uids[0] if self._uids else None
            script = ["sh", "-c", f"echo; exec {_FOREVER}"]
            self.honest = _Job(self.spawner, script, "honest", self.uid)
            undo.callback(self.honest.close)
            self.honest.readline()
            self.cgroup = Path(f"/proc/{self.honest.pid}/cgroup").read_text()
            self.close = undo.pop_all().close

    def ask(
        self,
        message: bytes | dict[str, Any],
        fds: Sequence[int] = (),
        told: tuple[bytes, Sequence[int]] | None = None,
    ) -> dict[str, Any] | None:
        """Send a message, whole or not, and what a process is told, with descriptors.

        Returns the answer, None if the helper has ended.
        """
        if isinstance(message, dict):
            message = json.dumps(message).encode()
        answer: dict[str, Any] | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, contextlib.suppress(ConnectionError):
            with theirs:
                socket.send_fds(self.spawner._socket, [message], [theirs.fileno(), *fds])
            if told is not None:
                with contextlib.suppress(ConnectionError):
                    socket.send_fds(ours, [told[0]], list(told[1]))
            while True:
                try:
                    data, ancillary, _, _ = ours.recvmsg(65_536, 1024)
                except ConnectionResetError:  # once, if what was told has not been read
                    continue
                for _, _, numbers in ancillary:
                    for i in range(0, len(numbers), 4):
                        os.close(int.from_bytes(numbers[i : i + 4], sys.byteorder))
                if not data:
                    break
                answer = (answer or {}) | json.loads(data)
        return answer

    def assert_nothing_gained(self, answer: dict[str, Any] | None) -> None:
        """An error, and nothing but the honest job runs; or the end of everything."""
        if answer is None:
            assert self.honest.has_no_process()
            self.spawner._process.wait(GUARD_S)
            return
        assert answer["errno"] > 0
        assert not select.select([self.honest.pidfd], [], [], 0)[0]
        for pid in set(children_of(self.spawner.pid)) - {self.honest.pid}:
            # One that has told what it cannot do, and is about to end.
            with contextlib.suppress(ProcessLookupError), contextlib.closing(_Pidfd(pid)) as pidfd:
                _await_end(pidfd.fd)
        assert children_of(self.honest.pid) == []
        status = _status(self.honest.pid)
        if self.uid is not None:
            assert status["Uid"].split() == status["Gid"].split() == [str(self.uid)] * 4
            assert status["Groups"] == ""
        assert Path(f"/proc/{self.honest.pid}/cgroup").read_text() == self.cgroup

    def attack(self, program: bytes | None = None, **request: Any) -> None:
        """Ask for a process with something wrong about it: there may be none."""
        if program is None:
            uid = request.pop("uid", self.uid)
            work = {"argv": ["sleep", "infinity"], "env": _ENV, "uid": uid}
            program = json.dumps({k: v for k, v in work.items() if v is not _MISSING}).encode()
        fields = {"op": "fork", "job": "job"} | request
        fields = {key: value for key, value in fields.items() if value is not _MISSING}
        with open(os.memfd_create("argv"), "w+b", buffering=0) as file:
            file.write(program)
            self.attack_with(fields, (b"{}", [file.fileno()]))

    def attack_with(self, request: dict[str, Any], told: tuple[bytes, Sequence[int]]) -> None:
        """The same, whatever it is told."""
        with _pipes() as (fds, output_fd):
            answer = self.ask(request, fds, told)
            for fd in fds:
                os.close(fd)
            self.assert_nothing_gained(answer)
            assert _is_abandoned(output_fd)


_MISSING = object()


@contextlib.contextmanager
def _pipes() -> Iterator[tuple[list[int], int]]:
    """What goes with a request, to be closed by whoever uses it; and the output."""
    output_fd, stdout_fd = os.pipe()
    exit_read_fd, exit_fd = os.pipe()
    try:
        yield [stdout_fd, exit_fd], output_fd
    finally:
        os.close(output_fd)
        os.close(exit_read_fd)


@pytest.fixture
def seat(as_root: None) -> Iterator[_Seat]:  # noqa: ARG001 -- only to be run first
    with contextlib.closing(_Seat()) as seat:
        yield seat


@pytest.mark.parametrize(
    "uid",
    [
        *(0, 1, -1, _SERVER_UID, _UIDS.stop, _UIDS[0] - 65_536, _UIDS[0] + 2**32, 2**64, 10**4000),
        *(float(_UIDS[0]), _UIDS[0] + 0.5, float("nan"), float("inf"), True, False, None, _MISSING),
        *(str(_UIDS[0]), "root", "0", "", [], [_UIDS[0]], {}, {"uid": _UIDS[0]}),
    ],
    ids=lambda value: "missing" if value is _MISSING else repr(value)[:20],
)
def test_no_process_with_an_uid_that_is_not_of_the_range(seat: _Seat, uid: object) -> None:
    """Root, the server itself, another user of the host, no user at all, and what is no uid."""
    seat.attack(uid=uid)


def test_range_is_there_to_be_had(seat: _Seat) -> None:
    """Every uid of it, with its group and no other: the refusals above are not for all."""
    for uid in _UIDS:
        argv = ["sh", "-c", "grep -E '^(Uid|Gid|Groups|Cap)' /proc/$$/status; umask"]
        with contextlib.closing(_Job(seat.spawner, argv, "next", uid)) as job:
            lines = job.read().decode().splitlines()
            fields = dict(line.replace(" ", "").split(":\t") for line in lines[:-1])
            assert job.exit() == Exit(exit_code=0)
        assert fields.pop("Uid").split() == fields.pop("Gid").split() == [str(uid)] * 4
        assert fields.pop("Groups") == ""
        assert set(fields) == {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"}
        assert {int(value, 16) for value in fields.values()} == {0}
        assert lines[-1] == "0077"


@pytest.mark.parametrize("uid", [0, _UIDS[0], -1, True, "0"])
def test_no_process_with_another_uid_where_there_is_no_range(uid: object) -> None:
    """A helper that was not given a range changes no user, be it root or not."""
    with contextlib.closing(_Seat(uids=None)) as seat:
        seat.attack(uid=uid)


@pytest.mark.parametrize(
    "job",
    [
        *("", ".", "..", "a/b", "/abs", "../job", "job/", "/", "job/../job", "a\0b", "honest"),
        *(None, 5, True, [], ["job"], {}, _MISSING, "x" * 300, "x" * 5000, "\ud800"),
    ],
    ids=lambda value: "missing" if value is _MISSING else repr(value)[:20],
)
@_POPEN_ONLY
@pytest.mark.usefixtures("as_root")
def test_no_process_under_a_name_that_is_none(job: object, tmp_path: Path) -> None:
    """A job's name is one path component, new, and a cgroup in our own root."""
    # Not cgroups: so that each could be opened if only the name were let through.
    jobs = tmp_path / "jobs"
    for directory in (tmp_path, jobs, jobs / "honest", jobs / "a"):
        directory.mkdir(exist_ok=True)
        (directory / "cgroup.procs").touch()
    with contextlib.closing(_Seat(jobs_cgroup=jobs)) as seat:
        assert (jobs / "honest/cgroup.procs").read_text() == "0"
        seat.attack(job=job)
    assert (tmp_path / "cgroup.procs").read_text() == ""
    assert (jobs / "cgroup.procs").read_text() == ""


@_POPEN_ONLY
@pytest.mark.usefixtures("as_root")
def test_no_process_without_its_cgroup(tmp_path: Path) -> None:
    """Where the job's cgroup does not exist, or is none, the command is not executed."""
    jobs = tmp_path / "jobs"
    (jobs / "honest").mkdir(parents=True)
    (jobs / "honest/cgroup.procs").touch()
    (jobs / "file").touch()
    (jobs / "empty").mkdir()
    with contextlib.closing(_Seat(jobs_cgroup=jobs)) as seat:
        for job in ("absent", "file", "empty"):
            seat.attack(job=job)
    assert sorted(os.listdir(jobs)) == ["empty", "file", "honest"]


@pytest.mark.parametrize(
    "program",
    [
        *(b"", b"\0", b"not JSON", b"{", b"[" * 100_000, b"\xff", b"5", b"null", b'"sleep"', b"[]"),
        *(b"{}", b'{"argv": ["sleep", "9999"]}', b'{"env": {}}', b'{"argv": [], "env": {}}'),
        b'{"argv": null, "env": {}}',
        b'{"argv": [1, 2], "env": {}}',
        b'{"argv": [["sleep", "9999"]], "env": {}}',
        b'{"argv": ["/bin/sleep", 9999], "env": {}}',
        b'{"argv": ["/bin/sleep", null], "env": {}}',
        b'{"argv": ["/bin/sleep", "a\\u0000b"], "env": {}}',
        b'{"argv": ["/bin/sleep", "\\ud800"], "env": {}}',
        b'{"argv": ["/bin/sleep", "9999"], "env": {"A": 1}}',
        b'{"argv": ["/bin/sleep", "9999"], "env": {"A=B": "c"}}',
        b'{"argv": ["/bin/sleep", "9999"], "env": ["A"]}',
        b'{"argv": ["/bin/sleep", "9999"], "env": 5}',
        b'{"argv": ["/bin/sleep", "9999"], "env": {}}' + b" " * (5 << 20),
    ],
    ids=lambda program: program[:30].decode(errors="replace"),
)
def test_no_process_for_a_program_that_makes_no_sense(seat: _Seat, program: bytes) -> None:
    """Not JSON, not strings, nested, too large: an error, or the end of the helper."""
    seat.attack(program)


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket", "/dev/zero", "sparse", "write"])
def test_no_process_for_a_program_that_is_no_file(seat: _Seat, tmp_path: Path, kind: str) -> None:
    """The helper neither waits for what never comes nor reads without end."""
    with contextlib.ExitStack() as stack:
        path, flags = {
            "directory": (str(tmp_path), os.O_RDONLY),
            "/dev/zero": ("/dev/zero", os.O_RDONLY),
            "sparse": (str(tmp_path / "sparse"), os.O_RDWR | os.O_CREAT),
            "write": (str(tmp_path / "write"), os.O_WRONLY | os.O_CREAT),
        }.get(kind, ("", 0))
        if kind == "pipe":
            bad, other = os.pipe()
            stack.callback(os.close, other)
        elif kind == "socket":
            one, two = socket.socketpair()
            stack.enter_context(two)
            bad = one.detach()
        else:
            bad = os.open(path, flags, 0o600)
        stack.callback(os.close, bad)
        if kind in {"sparse", "write"}:
            os.ftruncate(bad, 1 << 40 if kind == "sparse" else 10)
        seat.attack_with({"op": "fork", "job": "job"}, (b"{}", [bad]))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 20])
def test_no_process_with_another_number_of_descriptors(seat: _Seat, count: int) -> None:
    """Neither more nor fewer than two; and what was too many is not kept either."""
    seat.spawner.kill("nobody")
    before = descriptors_of(seat.spawner.pid)
    program = json.dumps({"argv": ["sleep", "infinity"], "env": _ENV, "uid": seat.uid}).encode()
    with open(os.memfd_create("argv"), "w+b", buffering=0) as file, _pipes() as (fds, output_fd):
        file.write(program)
        request = {"op": "fork", "job": "job"}
        answer = seat.ask(request, (fds * 10)[:count], (b"{}", [file.fileno()]))
        for fd in fds:
            os.close(fd)
        seat.assert_nothing_gained(answer)
        assert _is_abandoned(output_fd)
    if answer is not None:
        seat.spawner.kill("nobody")
        assert descriptors_of(seat.spawner.pid) == before


@pytest.mark.parametrize("count", [0, 2, 5, 20])
@pytest.mark.parametrize("is_whole", [True, False])
def test_process_that_is_told_no_sense_ends(seat: _Seat, count: int, *, is_whole: bool) -> None:
    """Not one descriptor, or not what we say; it has the helper's rights, so it does nothing."""
    program = json.dumps({"argv": ["sleep", "infinity"], "env": _ENV, "uid": seat.uid}).encode()
    with open(os.memfd_create("argv"), "w+b", buffering=0) as file:
        file.write(program)
        told = b"{}" if is_whole else b"\xff{"
        seat.attack_with({"op": "fork", "job": "job"}, (told, [file.fileno()] * count))


_OPS: list[object] = [*("", "exec", "spawn", "FORK", "dismantle", "_open", "__init__", None, 5, [])]
_NO_NAMES: list[object] = [[], {}]
_MESSAGES: list[bytes | dict[str, Any]] = [
    *({"op": op} for op in _OPS),
    *({"op": "kill", "job": job} for job in _NO_NAMES),
    *({"op": op} for op in ("fork", "kill")),
    *(b"", b"{", b"not JSON", b"\xff\xfe", b"[]", b"5", b"null", b'"fork"', b"{}"),
    *(b'{"job": "honest"}', b"[" * 4000, b"x" * 5000),
    json.dumps({"op": "kill", "job": "x" * 5000}).encode(),
    {"op": "open", "path": "/etc/shadow"},
    json.dumps({"op": "kill", "job": "honest"}).encode()[:-3],
]


@pytest.mark.parametrize("message", _MESSAGES, ids=lambda message: repr(message)[:40])
def test_message_that_makes_no_sense_gains_nothing(
    seat: _Seat, message: bytes | dict[str, Any]
) -> None:
    """Unknown, incomplete, cut off, giant or no message: an error, or the end of everything."""
    seat.assert_nothing_gained(seat.ask(message))


def test_message_larger_than_the_socket_takes_is_refused_by_the_kernel(seat: _Seat) -> None:
    """It never reaches the helper, which works on."""
    with pytest.raises(OSError, match="Message too long"):
        seat.ask(b"x" * (8 << 20))
    seat.assert_nothing_gained(seat.ask({"op": "?"}))


@pytest.mark.parametrize("job", ["nobody", "../honest", "", "1", 1, str(os.getpid()), -1])
def test_kill_reaches_only_jobs(seat: _Seat, job: object) -> None:
    """Neither process numbers nor anything else but the name of a job that runs."""
    seat.ask({"op": "kill", "job": job})
    assert not select.select([seat.honest.pidfd], [], [], 0)[0]
    assert seat.spawner._process.poll() is None
    seat.spawner.kill("honest")
    assert seat.honest.exit() == Exit(signal=signal.SIGKILL)


def test_helper_has_no_more_rights_than_it_needs(seat: _Seat) -> None:
    """Four capabilities, none to pass on, no bounding set: and it can gain none."""
    status = _status(seat.spawner.pid)
    kept = sum(1 << number for number in (1, 5, 6, 7))  # DAC_OVERRIDE, KILL, SETGID, SETUID
    assert int(status["CapEff"], 16) & ~kept == 0
    assert int(status["CapEff"], 16) >> 6 & 3 == 3
    assert status["CapPrm"] == status["CapEff"]
    for name in ("CapInh", "CapAmb", "CapBnd"):
        assert int(status[name], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Umask"] == "0077"
    assert resource.prlimit(seat.spawner.pid, resource.RLIMIT_CORE) == (0, 0)


def test_helper_cannot_be_looked_into(seat: _Seat) -> None:
    """By a user of the range, or as the server: memory, environment, descriptors, ptrace."""
    pid = seat.spawner.pid

    def look() -> None:
        for name in ("mem", "environ", "fd/0", "maps", "cwd", "exe", "root", "auxv", "stack"):
            with pytest.raises(PermissionError):
                os.readlink(f"/proc/{pid}/{name}") if name in {"cwd", "exe", "root", "fd/0"} else (
                    Path(f"/proc/{pid}/{name}").read_bytes()
                )
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, 0):
            with pytest.raises(PermissionError):
                os.kill(pid, number)

    def as_user(uid: int) -> None:
        privileges.drop_privileges(uid)
        look()

    for uid in (_UIDS[0], _SERVER_UID):
        _in_child(functools.partial(as_user, uid))
    assert seat.spawner._process.poll() is None


def test_owner_without_rights_cannot_signal_a_job_but_stop_it(seat: _Seat) -> None:
    """drop_privileges is for good, and the helper still does what a server may ask."""

    def live_without_rights() -> None:
        privileges.drop_privileges(_SERVER_UID)
        status = _status("self")
        assert status["Uid"].split() == status["Gid"].split() == [str(_SERVER_UID)] * 4
        assert status["Groups"] == ""
        assert {int(value, 16) for key, value in status.items() if key.startswith("Cap")} == {0}
        assert status["NoNewPrivs"] == "1"
        for call in (
            lambda: os.setuid(0),
            lambda: os.seteuid(0),
            lambda: os.setresuid(_UIDS[0], -1, -1),
            lambda: os.setgid(0),
            lambda: os.setgroups([0]),
            lambda: os.chroot("/"),
            lambda: os.kill(seat.honest.pid, signal.SIGKILL),
            lambda: os.open("/etc/shadow", os.O_RDONLY),
        ):
            with pytest.raises(PermissionError):
                call()
        with contextlib.closing(_Job(seat.spawner, ["id", "-u"], "mine", _UIDS[1])) as job:
            assert job.read() == b"%d\n" % _UIDS[1]
        seat.spawner.kill("honest")

    _in_child(live_without_rights)
    assert seat.honest.exit() == Exit(signal=signal.SIGKILL)


@pytest.mark.usefixtures("as_root")
def test_supplementary_groups_are_given_up() -> None:
    """Those that the owner was started with are neither the jobs' nor, later, its own."""

    def start_and_drop() -> None:
        os.setgroups([0, 4, 24, _UIDS[1]])
        with contextlib.closing(_Seat()) as seat:
            with contextlib.closing(_Job(seat.spawner, ["id", "-G"], "job", _UIDS[0])) as job:
                assert job.read() == b"%d\n" % _UIDS[0]
            privileges.drop_privileges(_SERVER_UID)
            assert os.getgroups() == []

    _in_child(start_and_drop)


@pytest.mark.usefixtures("as_root")
def test_death_of_the_helper_kills_the_leaders_of_other_users() -> None:
    """An owner that has given up its rights could not, and where there is no cgroup nobody else."""
    with contextlib.closing(_Seat()) as seat:
        os.kill(seat.spawner.pid, signal.SIGKILL)
        assert seat.honest.has_no_process()
        assert seat.honest.exit() is None


# --- in real cgroups --------------------------------------------------------------------------


def _places(top: Path) -> dict[str, list[str]]:
    """Each cgroup below, and the processes in it."""
    return {
        directory: Path(directory, "cgroup.procs").read_text().split()
        for directory, _, _ in os.walk(top)
    }


@pytest.mark.kernel
@pytest.mark.usefixtures("as_root")
def test_no_process_in_a_cgroup_that_is_not_a_jobs(base: Path) -> None:
    """Not in the parent, the server's, a neighbour's, one inside a job's, or none at all."""
    (base / "neighbour").mkdir()
    with contextlib.closing(Subtree.open("require", root=base)) as subtree:  # type: ignore[type-var]
        assert subtree
        honest = subtree.create("honest", NO_LIMITS)
        (subtree.create("other", NO_LIMITS).path / "inner").mkdir()
        with contextlib.closing(_Seat(jobs_cgroup=subtree.jobs)) as seat:
            before = _places(base)
            assert before[str(honest.path)] == [str(seat.honest.pid)]
            for name in (
                *(
                    "..",
                    ".",
                    "",
                    "../server",
                    "../../neighbour",
                    "other/inner",
                    "other/..",
                    "absent",
                ),
                *(
                    str(base),
                    str(base / "neighbour"),
                    "cgroup.procs",
                    "honest",
                    "/",
                    "../jobs/other",
                ),
            ):
                seat.attack(job=name)
                assert _places(base) == before
    (base / "neighbour").rmdir()


@pytest.mark.kernel
@pytest.mark.usefixtures("as_root")
def test_hand_over_dismantles_our_own_cgroups_and_no_others(base: Path) -> None:
    """When the helper ends: whatever is sent with the request, its arguments were fixed before."""
    (base / "neighbour").mkdir()
    with subprocess.Popen(["sleep", "infinity"]) as neighbour, contextlib.ExitStack() as undo:
        undo.callback(neighbour.kill)
        (base / "neighbour/cgroup.procs").write_text(str(neighbour.pid))
        subtree = Subtree.open("require", root=base)
        assert subtree
        subtree.create("honest", NO_LIMITS)
        duties = {"jobs_cgroup": subtree.jobs, "dismantle": subtree.dismantling}
        with contextlib.closing(_Seat(**duties)) as seat:
            request = {"op": "dismantle_at_end", "dismantle": [str(base / "neighbour")] * 3}
            assert seat.ask(request) == {}
            assert subtree.path.exists()
            seat.spawner.close()
            assert seat.honest.has_no_process()
        assert [each for each in base.iterdir() if each.is_dir()] == [base / "neighbour"]
        assert neighbour.poll() is None
    subtree._delegated = True
    subtree.close()
    cgroupfs.wait_event(base, "populated", "0", GUARD_S)
    (base / "neighbour").rmdir()


@pytest.mark.kernel
@pytest.mark.usefixtures("as_root")
def test_without_hand_over_the_cgroups_are_the_owners_to_remove(base: Path) -> None:
    """A helper that ends leaves the cgroups of an owner that still has its rights."""
    with contextlib.closing(Subtree.open("require", root=base)) as subtree:  # type: ignore[type-var]
        assert subtree
        subtree.create("honest", NO_LIMITS)
        duties = {"jobs_cgroup": subtree.jobs, "dismantle": subtree.dismantling}
        with contextlib.closing(_Seat(**duties)):
            pass
        assert (subtree.jobs / "honest").is_dir()
