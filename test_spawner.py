"""Tests of the spawner and the fork server: a real fork server and real jobs.

Each test runs with both ways to fork. A process holds a pipe open; end-of-file on that pipe
proves that the process is dead.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cgroupfs
import forkserver
import leader
import privileges
import spawner as spawner_module
import successor
from cgroups import Subtree
from limits import NO_LIMITS
from messages import ExecError
from privileges import can_change_user, can_kill_any
from spawner import Exit, Spawner, SpawnerDiedError, read_exit
from testkit import GUARD_S, children_of, descriptors_of, status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_ENV = {"PATH": os.defpath}
_FOREVER = "sleep infinity"
_POPEN_ONLY = pytest.mark.parametrize("way_to_fork", ["popen"], indirect=True)

pytestmark = pytest.mark.usefixtures("way_to_fork")
_UIDS = range(71_001, 71_005)
_SERVER_UID = 71_000


class _Job:
    """A job of a spawner, with the read ends of its output pipe and its exit pipe."""

    def __init__(
        self,
        spawner: Spawner,
        argv: list[str],
        name: str,
        uid: int | None = None,
        *,
        prepared: bool = False,
    ) -> None:
        self._kill = functools.partial(spawner.kill, name)
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self._output_fd, stdout_fd = os.pipe()
            self._exit_fd, exit_fd = os.pipe()
            for fd in (self._output_fd, self._exit_fd):
                undo.callback(os.close, fd)
            for fd in (stdout_fd, exit_fd):
                theirs.callback(os.close, fd)
            with spawner.fork(name, stdout_fd=stdout_fd, exit_fd=exit_fd) as process:
                if prepared:
                    spawner.kill(
                        "nobody"
                    )  # the answer comes after the fork, which was requested before
                self.pid, self.pidfd = process.execute(argv, _ENV, uid=uid)
            undo.callback(os.close, self.pidfd)
            self.close = undo.pop_all().close

    def read(self) -> bytes:
        """Return all output; blocks until no process holds the pipe."""
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
        """Block until no process holds the job's output pipe; False after a minute."""
        return _is_abandoned(self._output_fd)

    def exit(self) -> Exit | None:
        """Return how the leader ended, without its usage; kill what goes on."""
        end = self.first_exit()
        if end is not None and not end.is_final:
            self._kill()
            end = self.first_exit()
            assert end is None or end.is_final
        return end and Exit(end.exit_code, end.signal)

    def first_exit(self) -> Exit | None:
        """Return what the exit pipe tells next."""
        return read_exit(self._exit_fd)


def _is_abandoned(read_fd: int) -> bool:
    """Block until no process holds the write end of this silent pipe; False after a minute."""
    return bool(select.select([read_fd], [], [], GUARD_S)[0]) and os.read(read_fd, 1) == b""


def _await_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], GUARD_S)[0]


def _program(source: str, *args: str) -> list[str]:
    """Return a command that runs `source`, which can import the library."""
    path = str(Path(__file__).parent)
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{source}", *args]


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Every test must close all its descriptors and leave no process."""
    before = descriptors_of(), children_of(os.getpid())
    yield
    # Fewer descriptors are no leak: gRPC, which other test modules use, may close some late.
    assert set(descriptors_of()) <= set(before[0])
    assert children_of(os.getpid()) == before[1]


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    with Spawner() as spawner:
        yield spawner


@pytest.fixture(params=[False, True], ids=["forked", "prepared"])
def prepared(request: pytest.FixtureRequest) -> bool:
    """Whether the fork is done before the process receives its program."""
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
    """One line reports the leader's end; end-of-file reports that its process group is gone."""
    job = spawn("sh", "-c", f"{_FOREVER} & {script}")
    assert job.exit() == end
    assert job.exit() is None
    assert job.read() == b""  # the sleeper is dead, or its output would be open


def test_stdout_and_stderr_share_one_pipe_in_order(spawn: Callable[..., _Job]) -> None:
    """Bytes arrive unchanged, in the order in which the job wrote them."""
    job = spawn("sh", "-c", "echo out; echo err >&2; printf 'a\\0b\\377'")
    assert job.read() == b"out\nerr\na\0b\xff"


def test_pid_and_pidfd_are_the_leaders(spawn: Callable[..., _Job]) -> None:
    """The pidfd still means the same process after its end."""
    job = spawn("sh", "-c", "echo $$; read line")
    assert job.exit() == Exit(exit_code=1)  # stdin is at its end
    _await_end(job.pidfd)
    assert int(job.read()) == job.pid
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(job.pidfd, signal.SIGKILL)


def test_leader_has_its_own_session_null_stdin_and_the_root_directory(
    spawn: Callable[..., _Job],
) -> None:
    """Its pid, process group and session are one number. It has no terminal."""
    job = spawn("sh", "-c", "cat /proc/$$/stat; readlink /proc/$$/fd/0; pwd; umask")
    stat, stdin, directory, umask = job.read().decode().splitlines()
    _ppid, group, session, terminal = stat.rpartition(") ")[2].split()[1:5]
    assert [int(group), int(session), int(terminal)] == [job.pid, job.pid, 0]
    assert (stdin, directory, umask) == ("/dev/null", "/", "0077")


def test_argument_of_100_kib_arrives_whole(spawn: Callable[..., _Job]) -> None:
    """An argument may be larger than the largest packet of a socket."""
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


def test_end_is_told_at_once_and_in_full_when_the_others_have_ended(
    spawn: Callable[..., _Job], tmp_path: Path
) -> None:
    """Meanwhile the leader is a zombie, so nobody gets its number; and other jobs end as usual."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    job = spawn("sh", "-c", 'read x <"$0" & exit 7', str(fifo))
    assert job.first_exit() == Exit(exit_code=7, is_final=False)
    assert status_of(job.pid)["State"] == "Z (zombie)"
    other = spawn("true", name="other")
    assert [other.exit(), other.exit()] == [Exit(exit_code=0), None]
    fifo.write_text("go\n")
    end = job.first_exit()
    assert end is not None
    assert (end.exit_code, end.is_final, end.killed) == (7, True, 0)
    assert job.first_exit() is None
    assert not Path(f"/proc/{job.pid}").exists()


def test_kill_after_the_leaders_end_kills_and_counts_the_others(
    spawner: Spawner, spawn: Callable[..., _Job], tmp_path: Path
) -> None:
    """Each signal to everything reaches them, too."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = 'trap "echo told" USR1; echo up; while :; do read -t 1 x <&3; done'
    job = spawn("bash", "-c", f'exec 3<>"$0"; ({child}) & exit 7', str(fifo))
    assert job.first_exit() == Exit(exit_code=7, is_final=False)
    assert job.readline() == b"up\n"
    spawner.signal("job", signal.SIGUSR1, uid=None, everything=True)
    assert job.readline() == b"told\n"
    with pytest.raises(ProcessLookupError):
        spawner.signal("job", signal.SIGUSR1, uid=None, everything=False)
    spawner.kill("job")
    end = job.first_exit()
    assert end is not None
    assert (end.exit_code, end.is_final, end.killed) == (7, True, 1)
    assert job.first_exit() is None
    assert job.has_no_process()


def test_kill_of_an_ended_or_unknown_job_does_nothing(
    spawner: Spawner, spawn: Callable[..., _Job]
) -> None:
    """The kernel may reuse a reaped leader's pid, so the fork server signals nobody."""
    job = spawn("sh", "-c", "exit 5")
    assert [job.exit(), job.exit()] == [Exit(exit_code=5), None]
    spawner.kill("job")
    spawner.kill("never started")


def test_kill_hits_only_the_job_it_names(spawner: Spawner, spawn: Callable[..., _Job]) -> None:
    """The other jobs keep running."""
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
    """The error of a start is the one of execve(2)."""
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
    """The fork server keeps neither a child nor a descriptor of a failed start."""
    spawner.kill("warm-up")
    before = descriptors_of(), descriptors_of(spawner.pid)
    for _ in range(5):
        with pytest.raises(OSError, match=os.strerror(code)):
            spawn(*argv)
    spawner.kill("nobody")  # the fork server cleans up before it answers
    assert (descriptors_of(), descriptors_of(spawner.pid)) == before
    assert children_of(spawner.pid) == []
    assert spawn("echo", "fine").read() == b"fine\n"


def test_fork_server_keeps_nothing_of_ended_jobs(
    spawner: Spawner, spawn: Callable[..., _Job]
) -> None:
    """After thirty jobs it has as many descriptors and children as before."""
    spawner.kill("warm-up")
    before = descriptors_of(spawner.pid)
    for i in range(30):
        job = spawn("true", name=str(i))
        assert [job.exit(), job.exit()] == [Exit(exit_code=0), None]
    spawner.kill("nobody")
    assert descriptors_of(spawner.pid) == before
    assert children_of(spawner.pid) == []


def test_orphans_are_reaped(spawner: Spawner, spawn: Callable[..., _Job], tmp_path: Path) -> None:
    """A daemon that left its job's group becomes a child of the fork server, which reaps it."""
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
    other = spawn("true", name="other")  # its end makes the fork server reap
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

_HOSTILE_MAIN = """
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


def _from_hostile_main(*argv: str) -> str:
    """Run a job under a main process that ignores signals and has descriptors to leak."""
    return subprocess.check_output(_program(_HOSTILE_MAIN, *argv), text=True, timeout=GUARD_S)


def test_job_has_default_signals_whatever_the_main_process_did() -> None:
    """No signal is blocked, ignored, caught or pending.

    Two signals below SIGRTMIN are excepted. They belong to the C library, which lets nobody set
    them; its posix_spawn, which make uses, leaves them ignored.
    """
    lines = _from_hostile_main("/bin/cat", "/proc/self/status").splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    ours = sum(1 << (number - 1) for number in signal.valid_signals())
    signals = {key: int(status[key], 16) & ours for key in ("SigBlk", "SigIgn", "SigCgt", "SigPnd")}
    assert signals == {"SigBlk": 0, "SigIgn": 0, "SigCgt": 0, "SigPnd": 0}


def test_job_has_no_descriptor_but_the_three() -> None:
    """No descriptor of the main process or the fork server reaches a job; 3 is ls's own."""
    assert _from_hostile_main("/bin/ls", "/proc/self/fd").split() == ["0", "1", "2", "3"]


def test_job_has_only_the_environment_it_was_given() -> None:
    """No variable of the main process reaches a job."""
    assert _from_hostile_main("/usr/bin/env") == "ONLY=this\n"


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
        text = b"".join(chunks).decode().replace(job_id, "JOB")
    return re.sub("job-worker-tmp-[^/]*", "TMP", text)

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
    """Cgroup, user, rights, signals, limits, descriptors and errors do not depend on the way."""

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
    """While a new process is frozen before its exec, another job starts and ends."""
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
    spawner: Spawner,
    leased: tuple[Path, Callable[[], object]],
    lease_is_asked_for: Callable[[], bool],
    *,
    prepared: bool,
) -> None:
    """One user's write lease on a script keeps only the start of that script waiting."""
    path, _release = leased
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(_Job, spawner, [str(path)], "leased", prepared=prepared)
        assert lease_is_asked_for()
        for name in ("first", "second"):
            with contextlib.closing(_Job(spawner, ["sleep", "infinity"], name)) as other:
                spawner.kill(name)
                assert [other.exit(), other.exit()] == [Exit(signal=signal.SIGKILL), None]
        assert not hanging.done()
        spawner.kill("leased")
        with contextlib.closing(hanging.result(GUARD_S)) as job:
            assert [job.exit(), job.exit()] == [Exit(signal=signal.SIGKILL), None]


def test_process_that_dies_before_its_exec_counts_as_a_killed_job(*, prepared: bool) -> None:
    """A process killed between fork and exec counts as a job that SIGKILL ended."""
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
    """A forked process that has not received its program."""

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
    """The forked process itself executes the program."""
    assert waiting.process.is_waiting
    pid, pidfd = waiting.process.execute(["sh", "-c", "echo $$"], _ENV)
    os.close(pidfd)
    assert pid == waiting.pid
    assert os.read(waiting.output_fd, 100) == f"{pid}\n".encode()
    assert read_exit(waiting.exit_fd)
    assert read_exit(waiting.exit_fd) is None
    assert not waiting.process.is_waiting


def test_waiting_processes_receive_their_programs_in_any_order(spawner: Spawner) -> None:
    """Each process receives its program on a socket of its own."""
    with contextlib.ExitStack() as stack:
        several = [
            stack.enter_context(contextlib.closing(_Waiting(spawner, str(i)))) for i in range(5)
        ]
        for i in (3, 0, 4, 1, 2):
            _, pidfd = several[i].process.execute(["echo", str(i)], _ENV)
            os.close(pidfd)
            assert os.read(several[i].output_fd, 100) == b"%d\n" % i


@pytest.mark.parametrize("way", ["given up", "killed by name", "killed by somebody"])
def test_process_that_receives_no_program_ends(
    spawner: Spawner, waiting: _Waiting, way: str
) -> None:
    """The fork server keeps nothing of it, and another job can have its name."""
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


def test_program_for_a_killed_process_counts_as_a_killed_job(
    spawner: Spawner, waiting: _Waiting
) -> None:
    """Nobody knows whether the program had begun, so only the process's end is reported."""
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
    """It holds no descriptor of the fork server or of other jobs, and leads a session."""
    tell = ["sh", "-c", "ls -l /proc/self/fd | grep -c ' [0-9]* -> '; ps -o sid= $$"]
    with (
        contextlib.closing(_Job(spawner, ["sleep", "infinity"], "running")),
        contextlib.closing(_Waiting(spawner)) as waiting,
    ):
        # A waiting process may still be closing descriptors. After the exec it has closed them.
        pid, pidfd = waiting.process.execute(tell, _ENV)
        os.close(pidfd)
        with open(waiting.output_fd, "rb", closefd=False) as output:
            count, sid = output.read().split()
    assert int(sid) == pid
    assert int(count) == 4  # the three, and that of the directory


def test_process_that_waits_is_in_its_jobs_cgroup() -> None:
    """It is there before it receives its program, so the job's first instruction runs there."""
    with _subtree() as subtree, Spawner(jobs_cgroup=subtree.jobs) as spawner:
        cgroup = subtree.create("job", NO_LIMITS)
        with contextlib.closing(_Waiting(spawner)) as waiting:
            assert cgroupfs.wait_event(cgroup.path, "populated", "1", GUARD_S)
            assert (cgroup.path / "cgroup.procs").read_text().split() == [str(waiting.pid)]
        assert cgroupfs.wait_event(cgroup.path, "populated", "0", GUARD_S)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_death_of_the_fork_server_ends_the_process_that_waits(
    spawner: Spawner, waiting: _Waiting, number: signal.Signals
) -> None:
    """A waiting process ends with the fork server, and on a SIGTERM of its own."""
    if number == signal.SIGTERM:
        os.kill(waiting.pid, number)  # as a service manager does to every process
        spawner.close()
    else:
        os.kill(spawner.pid, number)
    _await_end(waiting.pidfd)
    assert not waiting.process.is_waiting
    with pytest.raises(SpawnerDiedError):
        spawner.fork("other", stdout_fd=1, exit_fd=1).execute(["true"], _ENV)


# --- many -----------------------------------------------------------------------------------------


def test_many_starts_at_once_keep_apart(spawner: Spawner, *, prepared: bool) -> None:
    """Sixteen threads start jobs, some of which fail. Each gets its own pid, output and end."""
    spawner.kill("warm-up")
    before = descriptors_of(spawner.pid)

    def start(number: int) -> None:
        for i in range(5):
            name = f"{number}-{i}"
            if i % 2:
                with pytest.raises(ExecError, match="No such file"):
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


# --- the fork server -------------------------------------------------------------------------


def test_fork_server_is_small_and_single_threaded(
    spawner: Spawner, spawn: Callable[..., _Job]
) -> None:
    """preexec_fn is safe only in a process with one thread."""
    spawn("true").exit()
    fields = status_of(spawner.pid)
    assert fields["Threads"] == "1"
    assert int(fields["VmRSS"].split()[0]) < 32 * 1024  # kB


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE])
def test_fork_server_survives_signals_to_the_whole_service(
    spawner: Spawner, spawn: Callable[..., _Job], number: signal.Signals
) -> None:
    """A service manager signals every process. The fork server ends only with the main process."""
    running = spawn("sh", "-c", f"echo; {_FOREVER}", name="running")
    running.readline()
    for _ in range(3):
        os.kill(spawner.pid, number)
    assert spawn("echo", "still here", name="next").read() == b"still here\n"
    assert not select.select([running.pidfd], [], [], 0)[0]


def test_death_of_the_fork_server_is_end_of_file_and_an_error(
    spawner: Spawner, spawn: Callable[..., _Job]
) -> None:
    """The exit pipe has no line, because nobody knows the job's end. Requests fail."""
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
    """When close returns, no process of any job is left, not even in another session."""
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


_MAIN = """
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
def test_nothing_outlives_the_main_process(number: signal.Signals) -> None:
    """A signal that kills the main process ends the fork server and every process of the job."""
    script = f"""
        setsid sh -c 'echo escaped; {_FOREVER}' &
        (setsid sh -c 'setsid sh -c "echo twice; {_FOREVER}" & exit' &)
        sh -c 'trap "" TERM INT HUP; echo deaf; while :; do {_FOREVER}; done' &
        echo leader; wait"""
    # The main process, the fork server (its stderr) and all of the job hold the pipe.
    with subprocess.Popen(
        _program(_MAIN, "sh", "-c", script),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as main:
        assert main.stdout is not None
        lines = {main.stdout.readline() for _ in range(4)}
        assert lines == {b"escaped\n", b"twice\n", b"deaf\n", b"leader\n"}
        main.send_signal(number)
        assert main.stdout.read() == b""
        assert main.wait(GUARD_S) == -number


_FORKING_MAIN = """
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


def test_fork_server_does_not_wait_for_ever_for_what_the_kernel_does_not_let_go() -> None:
    """A process can wait for a disk that is gone. Here nobody kills the child.

    Otherwise the next main process would find a fork server that does not answer.
    """
    program = """if True:
        import children, os, subprocess
        children._DEATH_S = 0.1
        kill, os.kill = os.kill, lambda *_: None
        child = subprocess.Popen(["sleep", "infinity"])
        children.end_children()
        kill(child.pid, 9)
        print(child.wait())
        """
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_S, check=True)
    assert run.stdout == "-9\n"


def test_child_of_the_main_process_keeps_no_job_alive() -> None:
    """The main process is killed while a fork of it still holds the fork server's socket."""
    theirs, ours = socket.socketpair()
    with ours, theirs:
        # Descriptor 3 is the socket.
        program = ["sh", "-c", 'exec 3<&0 "$@"', "sh", *_program(_FORKING_MAIN)]
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
        assert spawner._process is not None
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
    """After a Ctrl-C during a start, the next start does not receive the answer of the first."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spawner_module, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            spawn("sh", "-c", _FOREVER, name="interrupted")
    try:
        job = spawn("sh", "-c", "echo $$", name="next")
    except SpawnerDiedError:
        return  # an error is a correct answer, too
    assert int(job.read()) == job.pid


def test_exit_line_and_end_of_file_are_read() -> None:
    """read_exit parses the fork server's line, and returns None at end-of-file."""
    read_end, write_end = os.pipe()
    os.write(write_end, json.dumps({"signal": 9}).encode() + b"\n")
    os.close(write_end)
    assert read_exit(read_end) == Exit(signal=9)
    assert read_exit(read_end) is None
    os.close(read_end)


# --- what no job gains ------------------------------------------------------------------------


def _in_child(function: Callable[[], object]) -> None:
    """Call `function` in a forked process, which may give up its rights."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:  # noqa: BLE001 -- the fork must not return to pytest
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_fork_server_and_jobs_gain_no_privileges_and_dump_no_core(
    spawner: Spawner, spawn: Callable[..., _Job]
) -> None:
    """no_new_privs is set, and the soft and hard core limits are 0."""
    job = spawn("sh", "-c", "grep NoNewPrivs /proc/$$/status; ulimit -Sc; ulimit -Hc")
    assert job.read().split() == [b"NoNewPrivs:", b"1", b"0", b"0"]
    assert status_of(spawner.pid)["NoNewPrivs"] == "1"
    assert resource.prlimit(spawner.pid, resource.RLIMIT_CORE) == (0, 0)


def test_job_has_sane_limits(spawn: Callable[..., _Job]) -> None:
    """Descriptors, processes, locked memory and priority are bounded."""
    job = spawn("sh", "-c", f"echo; {_FOREVER}")
    job.readline()
    descriptors = (resource.RLIMIT_NOFILE, *leader.JOB_DESCRIPTORS)
    for kind, soft, hard in (descriptors, *forkserver.JOB_RLIMITS):
        assert soft <= hard
        _, ours = resource.getrlimit(kind)
        most = hard if ours == resource.RLIM_INFINITY else min(hard, ours)
        assert resource.prlimit(job.pid, kind) == (min(soft, most), most)


def test_job_has_no_higher_limit_than_the_main_process() -> None:
    """A lower hard limit of the main process stays in force."""

    def lower_and_spawn() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (600, 700))
        with (
            Spawner() as spawner,
            contextlib.closing(_Job(spawner, ["cat", "/proc/self/limits"], "job")) as job,
        ):
            (line,) = [each for each in job.read().split(b"\n") if b"Max processes" in each]
        assert line.split()[2:4] == [b"700", b"700"]

    _in_child(lower_and_spawn)


# --- a hostile main process -------------------------------------------------------------------
#
# An attacker who has taken over the main process can send anything to the fork server.


@pytest.fixture
def as_root() -> None:
    """Skip the test without the right to change users; in CI fail it."""
    if not (can_change_user() and can_kill_any()):
        problem = "needs root, or CAP_SETUID, CAP_SETGID and CAP_KILL"
        if os.environ.get("JOBWORKER_REQUIRE_KERNEL") == "1":
            pytest.fail(f"JOBWORKER_REQUIRE_KERNEL=1, but this test {problem}")
        pytest.skip(problem)


class _Attacker:
    """An attacker with the main process's end of the socket, and an honest job that runs."""

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
        """Send a request and what the forked process is to receive, both with descriptors.

        Returns the answer, None if the fork server has ended.
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
        """Only the honest job runs after an error. Without an answer, everything has ended."""
        if answer is None:
            assert self.honest.has_no_process()
            assert self.spawner._process is not None
            self.spawner._process.wait(GUARD_S)
            return
        assert answer["errno"] > 0
        assert not select.select([self.honest.pidfd], [], [], 0)[0]
        for pid in set(children_of(self.spawner.pid)) - {self.honest.pid}:
            # A forked process that has reported its error is about to end.
            with contextlib.suppress(ProcessLookupError), contextlib.closing(_Pidfd(pid)) as pidfd:
                _await_end(pidfd.fd)
        assert children_of(self.honest.pid) == []
        status = status_of(self.honest.pid)
        if self.uid is not None:
            assert status["Uid"].split() == status["Gid"].split() == [str(self.uid)] * 4
            assert status["Groups"] == ""
        assert Path(f"/proc/{self.honest.pid}/cgroup").read_text() == self.cgroup

    def attack(self, program: bytes | None = None, **request: Any) -> None:
        """Request a process with something wrong; no process may come of it."""
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
        """Like `attack`, with any descriptors and any message to the forked process."""
        with _pipes() as (fds, output_fd):
            answer = self.ask(request, fds, told)
            for fd in fds:
                os.close(fd)
            self.assert_nothing_gained(answer)
            assert _is_abandoned(output_fd)


_MISSING = object()


@contextlib.contextmanager
def _pipes() -> Iterator[tuple[list[int], int]]:
    """Make the descriptors of a request, which the user closes, and the output's read end."""
    output_fd, stdout_fd = os.pipe()
    exit_read_fd, exit_fd = os.pipe()
    try:
        yield [stdout_fd, exit_fd], output_fd
    finally:
        os.close(output_fd)
        os.close(exit_read_fd)


@pytest.fixture
def attacker(as_root: None) -> Iterator[_Attacker]:  # noqa: ARG001 -- only to be run first
    with contextlib.closing(_Attacker()) as attacker:
        yield attacker


@pytest.mark.parametrize(
    "uid",
    [
        *(0, 1, -1, _SERVER_UID, _UIDS.stop, _UIDS[0] - 65_536, _UIDS[0] + 2**32, 2**64, 10**4000),
        *(float(_UIDS[0]), _UIDS[0] + 0.5, float("nan"), float("inf"), True, False, None, _MISSING),
        *(str(_UIDS[0]), "root", "0", "", [], [_UIDS[0]], {}, {"uid": _UIDS[0]}),
    ],
    ids=lambda value: "missing" if value is _MISSING else repr(value)[:20],
)
def test_no_process_with_an_uid_that_is_not_of_the_range(attacker: _Attacker, uid: object) -> None:
    """Root, the main process's uid, other users and values that are no uid are refused."""
    attacker.attack(uid=uid)


def test_every_uid_of_the_range_is_allowed(attacker: _Attacker) -> None:
    """Jobs run with each uid and the same gid. So the refusals above have their reason."""
    for uid in _UIDS:
        argv = ["sh", "-c", "grep -E '^(Uid|Gid|Groups|Cap)' /proc/$$/status; umask"]
        with contextlib.closing(_Job(attacker.spawner, argv, "next", uid)) as job:
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
    """A fork server without a range changes no user."""
    with contextlib.closing(_Attacker(uids=None)) as attacker:
        attacker.attack(uid=uid)


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
    """A job's name is one path component, not in use, and names a cgroup below `jobs_cgroup`."""
    # Plain directories, which could all be opened if the fork server accepted the name.
    jobs = tmp_path / "jobs"
    for directory in (tmp_path, jobs, jobs / "honest", jobs / "a"):
        directory.mkdir(exist_ok=True)
        (directory / "cgroup.procs").touch()
    with contextlib.closing(_Attacker(jobs_cgroup=jobs)) as attacker:
        assert (jobs / "honest/cgroup.procs").read_text() == "0"
        attacker.attack(job=job)
    assert (tmp_path / "cgroup.procs").read_text() == ""
    assert (jobs / "cgroup.procs").read_text() == ""


@_POPEN_ONLY
@pytest.mark.usefixtures("as_root")
def test_no_process_without_its_cgroup(tmp_path: Path) -> None:
    """No command is executed if the job's cgroup is absent or is no cgroup."""
    jobs = tmp_path / "jobs"
    (jobs / "honest").mkdir(parents=True)
    (jobs / "honest/cgroup.procs").touch()
    (jobs / "file").touch()
    (jobs / "empty").mkdir()
    with contextlib.closing(_Attacker(jobs_cgroup=jobs)) as attacker:
        for job in ("absent", "file", "empty"):
            attacker.attack(job=job)
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
def test_no_process_for_a_program_that_makes_no_sense(attacker: _Attacker, program: bytes) -> None:
    """A malformed program is an error."""
    attacker.attack(program)


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket", "/dev/zero", "sparse", "write"])
def test_no_process_for_a_program_that_is_no_file(
    attacker: _Attacker, tmp_path: Path, kind: str
) -> None:
    """The forked process neither waits for such a descriptor nor reads it without end."""
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
        attacker.attack_with({"op": "fork", "job": "job"}, (b"{}", [bad]))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 20])
def test_no_process_with_another_number_of_descriptors(attacker: _Attacker, count: int) -> None:
    """Any other number of descriptors is refused, and the fork server closes all of them."""
    attacker.spawner.kill("nobody")
    before = descriptors_of(attacker.spawner.pid)
    program = json.dumps({"argv": ["sleep", "infinity"], "env": _ENV, "uid": attacker.uid}).encode()
    with open(os.memfd_create("argv"), "w+b", buffering=0) as file, _pipes() as (fds, output_fd):
        file.write(program)
        request = {"op": "fork", "job": "job"}
        answer = attacker.ask(request, (fds * 10)[:count], (b"{}", [file.fileno()]))
        for fd in fds:
            os.close(fd)
        attacker.assert_nothing_gained(answer)
        assert _is_abandoned(output_fd)
    if answer is not None:
        attacker.spawner.kill("nobody")
        assert descriptors_of(attacker.spawner.pid) == before


@pytest.mark.parametrize("count", [0, 4, 5, 20])  # the others are the stdin and the stderr
@pytest.mark.parametrize("is_whole", [True, False])
def test_process_that_receives_a_malformed_message_ends(
    attacker: _Attacker, count: int, *, is_whole: bool
) -> None:
    """The forked process still has the fork server's rights, so it executes nothing."""
    program = json.dumps({"argv": ["sleep", "infinity"], "env": _ENV, "uid": attacker.uid}).encode()
    with open(os.memfd_create("argv"), "w+b", buffering=0) as file:
        file.write(program)
        told = b"{}" if is_whole else b"\xff{"
        attacker.attack_with({"op": "fork", "job": "job"}, (told, [file.fileno()] * count))


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
    attacker: _Attacker, message: bytes | dict[str, Any]
) -> None:
    """A malformed message is an error, or ends the fork server and all jobs."""
    attacker.assert_nothing_gained(attacker.ask(message))


def test_message_larger_than_the_socket_takes_is_refused_by_the_kernel(attacker: _Attacker) -> None:
    """It does not reach the fork server, which goes on."""
    with pytest.raises(OSError, match="Message too long"):
        attacker.ask(b"x" * (8 << 20))
    attacker.assert_nothing_gained(attacker.ask({"op": "?"}))


@pytest.mark.parametrize("job", ["nobody", "../honest", "", "1", 1, "ours", -1])
def test_kill_reaches_only_jobs(attacker: _Attacker, job: object) -> None:
    """A kill accepts only the name of a running job, no pid (as "ours") and no path."""
    job = str(os.getpid()) if job == "ours" else job
    attacker.ask({"op": "kill", "job": job})
    assert not select.select([attacker.honest.pidfd], [], [], 0)[0]
    assert not attacker.spawner.has_died
    attacker.spawner.kill("honest")
    assert attacker.honest.exit() == Exit(signal=signal.SIGKILL)


def test_fork_server_has_no_more_rights_than_it_needs(attacker: _Attacker) -> None:
    """It has six capabilities, passes none on and can gain none."""
    status = status_of(attacker.spawner.pid)
    # CHOWN, DAC_OVERRIDE, KILL, SETGID, SETUID, SYS_RESOURCE
    kept = sum(1 << number for number in (0, 1, 5, 6, 7, 24))
    assert int(status["CapEff"], 16) & ~kept == 0
    assert int(status["CapEff"], 16) >> 6 & 3 == 3
    assert status["CapPrm"] == status["CapEff"]
    for name in ("CapInh", "CapAmb", "CapBnd"):
        assert int(status[name], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Umask"] == "0077"
    assert resource.prlimit(attacker.spawner.pid, resource.RLIMIT_CORE) == (0, 0)


def test_fork_server_cannot_be_looked_into(attacker: _Attacker) -> None:
    """A job's user and the main process's user read nothing of it and cannot signal it."""
    pid = attacker.spawner.pid

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
        privileges.become_ordinary_user(uid)
        look()

    for uid in (_UIDS[0], _SERVER_UID):
        _in_child(functools.partial(as_user, uid))
    assert not attacker.spawner.has_died


def test_main_process_without_rights_stops_jobs_only_through_the_fork_server(
    attacker: _Attacker,
) -> None:
    """The change cannot be undone. Afterwards the fork server still starts and kills jobs."""

    def live_without_rights() -> None:
        privileges.become_ordinary_user(_SERVER_UID)
        status = status_of("self")
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
            lambda: os.kill(attacker.honest.pid, signal.SIGKILL),
            lambda: os.open("/etc/shadow", os.O_RDONLY),
        ):
            with pytest.raises(PermissionError):
                call()
        with contextlib.closing(_Job(attacker.spawner, ["id", "-u"], "mine", _UIDS[1])) as job:
            assert job.read() == b"%d\n" % _UIDS[1]
        attacker.spawner.kill("honest")

    _in_child(live_without_rights)
    assert attacker.honest.exit() == Exit(signal=signal.SIGKILL)


@pytest.mark.usefixtures("as_root")
def test_supplementary_groups_are_given_up() -> None:
    """Neither jobs nor the main process, once it is an ordinary user, keep supplementary groups."""

    def start_and_drop() -> None:
        os.setgroups([0, 4, 24, _UIDS[1]])
        with contextlib.closing(_Attacker()) as attacker:
            with contextlib.closing(_Job(attacker.spawner, ["id", "-G"], "job", _UIDS[0])) as job:
                assert job.read() == b"%d\n" % _UIDS[0]
            privileges.become_ordinary_user(_SERVER_UID)
            assert os.getgroups() == []

    _in_child(start_and_drop)


@pytest.mark.usefixtures("as_root")
def test_death_of_the_fork_server_kills_the_leaders_of_other_users() -> None:
    """The kernel kills them: a main process without rights could not."""
    with contextlib.closing(_Attacker()) as attacker:
        os.kill(attacker.spawner.pid, signal.SIGKILL)
        assert attacker.honest.has_no_process()
        assert attacker.honest.exit() is None


# --- in real cgroups --------------------------------------------------------------------------


def _processes_by_cgroup(top: Path) -> dict[str, list[str]]:
    """Return the processes in each cgroup from `top` down."""
    return {
        directory: Path(directory, "cgroup.procs").read_text().split()
        for directory, _, _ in os.walk(top)
    }


@pytest.mark.kernel
@pytest.mark.usefixtures("as_root")
def test_no_process_in_a_cgroup_that_is_not_a_jobs(base: Path) -> None:
    """No name leads to the parent, the main process's cgroup, a neighbour or a nested cgroup."""
    (base / "neighbour").mkdir()
    with contextlib.closing(Subtree.open("require", root=base)) as subtree:  # type: ignore[type-var]
        assert subtree
        honest = subtree.create("honest", NO_LIMITS)
        (subtree.create("other", NO_LIMITS).path / "inner").mkdir()
        with contextlib.closing(_Attacker(jobs_cgroup=subtree.jobs)) as attacker:
            before = _processes_by_cgroup(base)
            assert before[str(honest.path)] == [str(attacker.honest.pid)]
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
                attacker.attack(job=name)
                assert _processes_by_cgroup(base) == before
    (base / "neighbour").rmdir()


@pytest.mark.kernel
@pytest.mark.usefixtures("as_root")
def test_fork_server_dismantles_our_own_cgroups_and_no_others(base: Path) -> None:
    """What to dismantle was fixed at its start. A request cannot change it."""
    (base / "neighbour").mkdir()
    with subprocess.Popen(["sleep", "infinity"]) as neighbour, contextlib.ExitStack() as undo:
        undo.callback(neighbour.kill)
        (base / "neighbour/cgroup.procs").write_text(str(neighbour.pid))
        subtree = Subtree.open("require", root=base)
        assert subtree
        subtree.create("honest", NO_LIMITS)
        duties = {"jobs_cgroup": subtree.jobs, "dismantle": subtree.dismantling}
        with contextlib.closing(_Attacker(**duties)) as attacker:
            request = {"op": "dismantle_at_end", "dismantle": [str(base / "neighbour")] * 3}
            assert attacker.ask(request) == {}
            assert subtree.path.exists()
            attacker.spawner.close()
            assert attacker.honest.has_no_process()
        assert [each for each in base.iterdir() if each.is_dir()] == [base / "neighbour"]
        assert neighbour.poll() is None
    subtree._delegated = True
    subtree.close()
    cgroupfs.wait_event(base, "populated", "0", GUARD_S)
    (base / "neighbour").rmdir()


@pytest.mark.kernel
@pytest.mark.usefixtures("as_root")
def test_fork_server_leaves_the_cgroups_unless_it_was_asked_to_dismantle_them(base: Path) -> None:
    """A main process that still has its rights removes the cgroups itself."""
    with contextlib.closing(Subtree.open("require", root=base)) as subtree:  # type: ignore[type-var]
        assert subtree
        subtree.create("honest", NO_LIMITS)
        duties = {"jobs_cgroup": subtree.jobs, "dismantle": subtree.dismantling}
        with contextlib.closing(_Attacker(**duties)):
            pass
        assert (subtree.jobs / "honest").is_dir()


# The fork server, run by a program that writes down the names of the files that Python loads after
# the start. It needs what it imports before that.
_WATCHED_FORK_SERVER = """
import os, sys
sys.path.insert(0, {here!r})
import forkserver
loaded = os.open({loaded!r}, os.O_WRONLY | os.O_APPEND)
def note(event, arguments):
    if event == "import" and arguments[0] not in sys.modules:
        os.write(loaded, f"import of {{arguments[0]}}\\n".encode())
    if event == "open" and str(arguments[0]).endswith((".py", ".pyc", ".so", ".zip")):
        os.write(loaded, f"{{arguments[0]}}\\n".encode())
sys.addaudithook(note)
forkserver._main(sys.argv)
"""


@pytest.mark.parametrize("way_to_end", [b"", b"{", b"\xff\xfe", "{".encode("utf-16")])
def test_fork_server_loads_no_code_after_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way_to_end: bytes
) -> None:
    """Whoever can write there later must not have code run with its rights: for jobs or its end.

    The messages end the fork server. For some of them, and for a program that is not UTF-8, Python
    would load a codec.
    """
    loaded, program = tmp_path / "loaded", tmp_path / "forkserver.py"
    loaded.touch()
    here = str(Path(__file__).parent)
    program.write_text(_WATCHED_FORK_SERVER.format(here=here, loaded=str(loaded)))
    command = (*successor.PROGRAM[:-1], str(program))
    monkeypatch.setattr(spawner_module, "PROGRAM", command)
    with Spawner() as spawner:
        for argv in (["true"], ["no-such-command"], ["sh", "-c", "sleep infinity & echo"]):
            with contextlib.suppress(OSError), contextlib.closing(_Job(spawner, argv, "a")) as job:
                assert job.exit() == Exit(exit_code=0)
        program_text = json.dumps({"argv": ["true"], "env": _ENV, "uid": None})
        with (
            _pipes() as (fds, output_fd),
            open(os.memfd_create("argv"), "w+b", buffering=0) as file,
        ):
            file.write(program_text.encode("utf-16"))
            with spawner.fork("b", stdout_fd=fds[0], exit_fd=fds[1]) as process:
                socket.send_fds(process._socket, [b"{}"], [file.fileno()])
                for fd in fds:
                    os.close(fd)
                assert _is_abandoned(output_fd)
        if way_to_end:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours, theirs:
                socket.send_fds(spawner._socket, [way_to_end], [theirs.fileno()])
                assert spawner._process is not None
                spawner._process.wait(GUARD_S)
    assert [line for line in loaded.read_text().splitlines() if not line.startswith("import")] == []
