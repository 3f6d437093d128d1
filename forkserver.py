"""The fork server: a small program with one thread that starts and reaps jobs.

`spawner.py` starts it and talks to it. The messages that both sides use are in this file, too.

Why it is a process of its own: a fork in a process with threads can deadlock the child, it
copies the page tables of the whole heap while it holds the GIL, and with gRPC loaded it
crashes the child (grpc#43055, cpython#82616).

It is small because each fork copies the memory pages that are written to afterwards. With
twice as many modules imported, a start took half as long again.

A job is forked by clone3(2), straight into its cgroup. Where clone3 is refused, it is forked
by `subprocess.Popen` with a `preexec_fn` that moves the child into the cgroup.

The fork server does not trust the main process, because the main process may have given up its
rights while the fork server keeps four capabilities. What it may do at all is fixed at its
start. It starts jobs only as users of the range `uids`, and finds a job's cgroup by itself.

When the socket to the main process closes, for whatever reason, the fork server kills every
job and every other descendant, and exits. So nothing outlives the main process, not even
after SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from privileges import (
    CAP_DAC_OVERRIDE,
    CAP_KILL,
    CAP_SETGID,
    CAP_SETUID,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    keep_capabilities,
    prctl,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["AttachError", "close_all", "receive", "send", "wait_ready"]

_MAX_MESSAGE_BYTES = 4096
_MAX_FDS = 5
_FD_BYTES = 4
_MAX_PROGRAM_BYTES = 4 * 1024 * 1024  # argv and environment; execve(2) takes less
_UMASK = 0o077

# What a job may have besides its cgroup's limits: soft and hard. That many processes
# are of all the jobs of one user together, and hold where there is no pids controller.
_JOB_DESCRIPTORS = 1024, 65_536  # the fork server needs more
_JOB_RLIMITS = (
    (resource.RLIMIT_NPROC, 8192, 8192),
    (resource.RLIMIT_MEMLOCK, 8 * 1024 * 1024, 8 * 1024 * 1024),
    (resource.RLIMIT_RTPRIO, 0, 0),
    (resource.RLIMIT_NICE, 0, 0),
)

# linux/sched.h; the numbers of system calls this new are the same everywhere
_SYS_CLONE3 = 435
_SYS_CLOSE_RANGE = 436
_CLONE_PIDFD = 0x1000
_CLONE_INTO_CGROUP = 0x2_0000_0000
_LAST_FD = 0xFFFF_FFFF

_libc = ctypes.CDLL(None, use_errno=True)


class AttachError(OSError):
    """The new process could not enter its cgroup, so the command was not executed."""


# --- both sides: one JSON object a message, with descriptors ------------------------------


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message. Raises OSError."""
    socket.send_fds(sock, [json.dumps(message).encode()], list(fds))


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive one message. Raises EOFError when the other side is gone; OSError."""
    # Not socket.recv_fds, which drops the flag: then execs would inherit them.
    data, ancillary, _, _ = sock.recvmsg(
        _MAX_MESSAGE_BYTES, socket.CMSG_SPACE(_MAX_FDS * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
    )
    if not data:
        raise EOFError
    fds = [
        int.from_bytes(numbers[i : i + _FD_BYTES], sys.byteorder)
        for level, kind, numbers in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for i in range(0, len(numbers), _FD_BYTES)
    ]
    return json.loads(data), fds


def close_all(fds: Sequence[int]) -> None:
    """Close these descriptors."""
    for fd in fds:
        os.close(fd)


def wait_ready(fd: int, events: int, timeout_s: float | None = None) -> bool:
    """Block until one of `events`, or the other end's end, is there; False after `timeout_s`."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


# --- the program ---------------------------------------------------------------------


class _Leader(NamedTuple):
    """What the fork server knows of a leader that it has not reaped."""

    job: str
    exit_fd: int


class _Fork(NamedTuple):
    """A process that is to be, or waits to be told what to execute."""

    job: str
    sock: socket.socket  # where it is told, and tells what fails
    stdout_fd: int
    exit_fd: int

    def close(self) -> None:
        self.sock.close()
        close_all([self.stdout_fd, self.exit_fd])


class _Program(NamedTuple):
    """What a process is to execute."""

    argv: list[bytes]
    env: dict[bytes, bytes]
    paths: list[bytes]  # where the file may be
    uid: int | None


class _ForkServer:
    """The program that `Spawner` runs. One thread; a signal only wakes the poll."""

    def __init__(self, sock: socket.socket, duties: dict[str, Any]) -> None:
        self._pid = os.getpid()
        self._socket = sock
        self._jobs_cgroup: str | None = duties["jobs_cgroup"]
        self._uids = range(*duties["uids"]) if duties["uids"] else None
        self._dismantle: list[Any] | None = duties["dismantle"]
        self._files: dict[str, int] = duties["files"]
        self._dismantles_at_end = False
        self._poll = select.poll()
        self._put_off: dict[int, _Fork] = {}  # those that are forked when they are told, by socket
        self._leaders: dict[int, _Leader] = {}  # by pid, until they are reaped
        self._pids: dict[str, int] = {}  # of those, by job
        self._exit_fds: dict[int, int] = {}  # by process group without its leader, until it is gone

    def run(self) -> None:
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        _set_signals()
        # Orphans of a job become our children and not init's, so that we can tell
        # when a process group is gone.
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._limit_ourselves_and_jobs()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(wake_read, select.POLLIN)
        try:
            while True:
                ready = dict(self._poll.poll())
                if wake_read in ready:
                    os.read(wake_read, 4096)
                    self._reap()
                if self._socket.fileno() in ready:
                    self._serve()
                for fd in ready.keys() & self._put_off.keys():
                    self._poll.unregister(fd)
                    with contextlib.closing(self._put_off.pop(fd)) as fork:
                        self._fork_told(fork)
        except (EOFError, ConnectionError):
            pass  # the owner is gone
        finally:
            # Also after a message that makes no sense: that is not our owner any more.
            self._kill_everything()
            if self._dismantles_at_end and self._dismantle:
                # Here, for a start should not pay for a larger fork server.
                from cgroups import dismantle

                dismantle(*self._dismantle)

    def _limit_ourselves_and_jobs(self) -> None:
        """Take what neither we nor the jobs need; what is set here, forks and execs keep."""
        os.umask(_UMASK)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for kind, soft, hard in _JOB_RLIMITS:
            _limit(kind, soft, hard)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for each job
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if self._uids is not None:
            # Not to be traced, nor what we fork before it executes something.
            prctl(PR_SET_DUMPABLE, 0)
            keep_capabilities(CAP_SETUID, CAP_SETGID, CAP_KILL, CAP_DAC_OVERRIDE)

    def _serve(self) -> None:
        """Take one request, and answer on the socket that came with it."""
        request, fds = receive(self._socket)
        try:
            if fds:  # if not, we had no number left for it
                with socket.socket(
                    socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=fds.pop(0)
                ) as reply:
                    self._answer(request, fds, reply)
        finally:
            close_all(fds)

    def _answer(self, request: dict[str, Any], fds: list[int], reply: socket.socket) -> None:
        answer: dict[str, Any] = {}
        passed = []
        try:
            match request["op"]:
                case "fork":
                    pid, pidfd = self._fork(request["job"], reply, *fds)
                    answer["pid"] = pid
                    passed.append(pidfd)
                case "kill":
                    self._reap()
                    if request["job"] in self._pids:
                        _kill_leader(self._pids[request["job"]])
                case "open":
                    passed.append(self._open(request["path"]))
                case "dismantle_at_end":
                    self._dismantles_at_end = True
                case _:
                    raise ValueError("unknown request")  # noqa: TRY301 -- answered like others
        except _PutOffError:
            return
        except (OSError, ValueError, TypeError) as error:
            answer = _failure(error)
        try:
            with contextlib.suppress(OSError):  # the caller does not wait any more
                send(reply, answer, passed)
        finally:
            close_all(passed)

    def _open(self, path: str) -> int:
        if path not in self._files:
            raise PermissionError(errno.EPERM, "not a file of ours", path)
        return os.open(path, self._files[path] | os.O_CLOEXEC, 0o600)

    def _fork(
        self, job: str, reply: socket.socket, stdout_fd: int, exit_fd: int
    ) -> tuple[int, int]:
        """Fork a process that waits; return its pid and a pidfd. Raises `_PutOffError`."""
        self._check_name(job)
        with contextlib.ExitStack() as undo, self._open_cgroup(job) as cgroup_fd:
            kept_fd = os.dup(exit_fd)
            undo.callback(os.close, kept_fd)
            try:
                pid, pidfd = _clone(cgroup_fd)
            except OSError:
                # An older kernel, a filter of system calls (seccomp), a cgroup that takes no
                # process: what works everywhere works, or says why not.
                self._put_off_fork(job, reply, stdout_fd, exit_fd)
                raise _PutOffError from None
            if pid == 0:
                _wait(reply, stdout_fd, self._uids, self._pid)
            self._add_leader(pid, _Leader(job, kept_fd))
            undo.pop_all()
        return pid, pidfd

    def _check_name(self, job: str) -> None:
        if job in self._pids or job != os.path.basename(job) or job in {"", ".", ".."}:
            raise PermissionError(errno.EPERM, "not a job's name, or taken")

    def _add_leader(self, pid: int, leader: _Leader) -> None:
        self._leaders[pid] = leader
        self._pids[leader.job] = pid

    def _put_off_fork(self, job: str, reply: socket.socket, stdout_fd: int, exit_fd: int) -> None:
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(reply.dup())
            own_stdout_fd = os.dup(stdout_fd)
            undo.callback(os.close, own_stdout_fd)
            fork = _Fork(job, sock, own_stdout_fd, os.dup(exit_fd))
            undo.pop_all()
        self._put_off[sock.fileno()] = fork
        self._poll.register(sock, select.POLLIN)

    def _fork_told(self, fork: _Fork) -> None:
        """Fork what has been put off, now that it has been told what to execute, or given up."""
        try:
            program = _receive_program(fork.sock, self._uids)
            self._check_name(fork.job)
            with contextlib.ExitStack() as undo, self._open_cgroup(fork.job) as cgroup_fd:
                exit_fd = os.dup(fork.exit_fd)
                undo.callback(os.close, exit_fd)
                pid, pidfd = _popen(program, fork.stdout_fd, fork.sock, cgroup_fd)
                undo.pop_all()
            self._add_leader(pid, _Leader(fork.job, exit_fd))
            try:
                send(fork.sock, {"pid": pid}, [pidfd])
            finally:
                os.close(pidfd)
        except (EOFError, BrokenPipeError, ConnectionResetError, _ToldError):
            pass
        except (OSError, ValueError, TypeError, LookupError) as error:
            # Not only OSError: argv or environment may be no strings, or not to be encoded.
            with contextlib.suppress(OSError):  # the caller does not wait any more
                send(fork.sock, _failure(error))

    @contextlib.contextmanager
    def _open_cgroup(self, job: str) -> Iterator[int | None]:
        if self._jobs_cgroup is None:
            yield None
            return
        try:
            fd = os.open(f"{self._jobs_cgroup}/{job}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise AttachError(error.errno, error.strerror) from error
        try:
            yield fd
        finally:
            os.close(fd)

    def _reap(self) -> None:
        """Reap what has ended: report leaders, close the exit pipes of vanished groups."""
        while (pid := _ended_child()) is not None:
            leader = self._leaders.get(pid)
            if leader is None:
                os.waitpid(pid, 0)  # an orphan of some job
                continue
            # As long as the leader is not reaped, its group's number is taken.
            _kill_group(pid)
            _, status, usage = os.wait4(pid, 0)
            del self._leaders[pid], self._pids[leader.job]
            self._exit_fds[pid] = leader.exit_fd
            code = os.waitstatus_to_exitcode(status)
            end: dict[str, float] = {"exit_code": code} if code >= 0 else {"signal": -code}
            end |= {
                "cpu_user_s": usage.ru_utime,
                "cpu_system_s": usage.ru_stime,
                "max_rss_bytes": usage.ru_maxrss * 1024,
            }
            with contextlib.suppress(BrokenPipeError):  # the owner does not care any more
                os.write(leader.exit_fd, json.dumps(end).encode() + b"\n")
        for group in list(self._exit_fds):  # those whose leader has ended: few
            if _group_is_gone(group):
                os.close(self._exit_fds.pop(group))

    def _kill_everything(self) -> None:
        if self._jobs_cgroup is not None:
            # Beats concurrent forks. A kernel before 5.14 has no such file.
            with contextlib.suppress(OSError):
                kill_fd = os.open(f"{self._jobs_cgroup}/cgroup.kill", os.O_WRONLY)
                os.write(kill_fd, b"1")
                os.close(kill_fd)
        for pid in self._leaders:
            _kill_leader(pid)
        # What escaped its group or has no cgroup: as its ancestors die it becomes our
        # child, because we are the subreaper.
        while children := _children():
            for pid in children:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)
            while _ended_child() is not None:
                os.waitpid(-1, 0)


# --- from fork to exec ----------------------------------------------------------------


class _PutOffError(Exception):
    """The process is forked when it is told what to execute."""


class _ToldError(Exception):
    """The new process has told by itself what failed."""


def _failure(error: BaseException) -> dict[str, Any]:
    return {
        "errno": getattr(error, "errno", None) or errno.EINVAL,
        "attach": isinstance(error, AttachError),
    }


def _receive_program(sock: socket.socket, uids: range | None) -> _Program:
    """Wait for what is to be executed.

    Raises EOFError if nothing is, OSError, ValueError, TypeError, LookupError.
    """
    _, fds = receive(sock)
    try:
        (fd,) = fds
        size = os.fstat(fd).st_size
        if size > _MAX_PROGRAM_BYTES:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        return _parse_program(os.pread(fd, size, 0), uids)
    finally:
        close_all(fds)


def _parse_program(data: bytes, uids: range | None) -> _Program:
    """Raises OSError, ValueError, TypeError, LookupError."""
    program = json.loads(data)
    uid = program["uid"]
    # A range has floats in it, too.
    if not (uid is None if uids is None else type(uid) is int and uid in uids):
        raise PermissionError(errno.EPERM, "not an uid of ours")
    argv = [os.fsencode(argument) for argument in program["argv"]]
    env = {os.fsencode(name): os.fsencode(value) for name, value in program["env"].items()}
    if not argv or any(b"\0" in each for each in (*argv, *env, *env.values())):
        raise ValueError("no argv, or a NUL character in it or in the environment")
    if any(b"=" in name for name in env):
        raise ValueError("not a name of a variable")
    if b"/" in argv[0]:
        paths = [argv[0]]
    else:
        path = env.get(b"PATH", os.fsencode(os.defpath))
        paths = [os.path.join(each, argv[0]) for each in path.split(b":")]
    return _Program(argv, env, paths, uid)


def _clone(cgroup_fd: int | None) -> tuple[int, int]:
    """Fork, as clone3(2): the child is born in the cgroup. Since Linux 5.7.

    Returns the child's pid and a pidfd, valid even if it has ended by then; in the child
    0, which has one thread, and for which neither Python nor the C library has done what
    they do after fork(2): it should soon execute something. Raises OSError.
    """
    pidfd = ctypes.c_int(-1)
    flags = _CLONE_PIDFD | (0 if cgroup_fd is None else _CLONE_INTO_CGROUP)
    # flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
    # set_tid_size, cgroup
    arguments = (ctypes.c_uint64 * 11)(
        flags, ctypes.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, cgroup_fd or 0
    )
    pid = _libc.syscall(
        ctypes.c_long(_SYS_CLONE3), arguments, ctypes.c_size_t(ctypes.sizeof(arguments))
    )
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"clone3: {os.strerror(number)}")
    return pid, pidfd.value


def _wait(sock: socket.socket, stdout_fd: int, uids: range | None, parent: int) -> NoReturn:
    """The forked process: execute what `sock` says. `parent`: the pid of the fork server."""
    try:
        _detach(sock.fileno(), stdout_fd)
        if not wait_ready(sock.fileno(), select.POLLIN, 0):
            _rehearse()
        # If the fork server dies, this process must too; it may have died before the prctl.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            try:
                _become(_receive_program(sock, uids))
            except BaseException as error:  # noqa: BLE001 -- nothing may escape
                send(sock, _failure(error))
    finally:
        os._exit(127)


def _rehearse() -> None:
    """Do what is to be done when it has been told, but for what cannot be done twice.

    So that most memory pages that are written to then have been copied by now.
    """
    with contextlib.suppress(OSError):  # it is a directory
        _become(_parse_program(b'{"argv": ["/"], "env": {"A": "B"}, "uid": null}', None))


def _detach(sock_fd: int, stdout_fd: int) -> None:
    """Give up what this fork has of the fork server, but for the socket; lead a session."""
    signal.set_wakeup_fd(-1)  # the fork server's
    os.dup2(stdout_fd, 1)  # 0 is /dev/null here, too
    os.dup2(stdout_fd, 2)
    # If the exec hangs (a dead file server), what is others' must not be open here.
    # Before Linux 5.9 it is, until the exec.
    for first, last in ((3, sock_fd - 1), (sock_fd + 1, _LAST_FD)):
        _libc.syscall(
            ctypes.c_long(_SYS_CLOSE_RANGE),
            ctypes.c_uint(first),
            ctypes.c_uint(last),
            ctypes.c_uint(0),
        )
    os.setsid()


def _become(program: _Program) -> NoReturn:
    """Change the user, if it is to be changed, and execute the program. Raises OSError."""
    if program.uid is not None:
        os.setgroups([])
        os.setresgid(program.uid, program.uid, program.uid)
        os.setresuid(program.uid, program.uid, program.uid)
    _prepare(program.uid)
    _execute_first(program)


def _execute_first(program: _Program) -> NoReturn:
    """Execute the first of the paths that can be. Raises OSError, as execvp(3) would."""
    problem = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for path in program.paths:
        try:
            os.execve(path, program.argv, program.env)
        except OSError as error:
            # One that is there says more than all that are not.
            if problem.errno in (errno.ENOENT, errno.ENOTDIR):
                problem = error
    raise problem


def _popen(
    program: _Program, stdout_fd: int, reply: socket.socket, cgroup_fd: int | None
) -> tuple[int, int]:
    """Fork and execute, where clone3 is not to be had; return pid and pidfd.

    The new process tells on `reply` what fails in it. Raises OSError, `_ToldError`.
    """
    # Not for the fork server that does without: it is to be small.
    import subprocess

    procs_fd = None if cgroup_fd is None else _open_procs(cgroup_fd)

    def attach_and_prepare() -> None:
        try:
            if procs_fd is not None:
                _attach(procs_fd)
            _prepare(program.uid)
        except BaseException as error:
            # Popen would keep to itself what it was.
            send(reply, _failure(error))
            raise

    try:
        leader = subprocess.Popen(
            program.argv,
            env=program.env,
            stdin=subprocess.DEVNULL,
            stdout=stdout_fd,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
            close_fds=False,  # none of ours is inheritable, so there is nothing to close
            user=program.uid,
            group=program.uid,
            extra_groups=None if program.uid is None else [],
            # One thread, so none can hold a lock that the child would wait for.
            preexec_fn=attach_and_prepare,  # noqa: PLW1509
        )
    except subprocess.SubprocessError:  # "Exception occurred in preexec_fn."
        raise _ToldError from None
    finally:
        if procs_fd is not None:
            os.close(procs_fd)
    try:
        # Valid even if the leader has ended by now: nobody but us reaps it.
        pidfd = os.pidfd_open(leader.pid)
    except BaseException:
        leader.kill()
        leader.wait()
        raise
    leader.returncode = 0  # Popen need not wait: we do
    return leader.pid, pidfd


def _open_procs(cgroup_fd: int) -> int:
    # The kernel checks the rights of the opener, not of the writer, so a child that has
    # changed its user can still join.
    try:
        return os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup_fd)
    except OSError as error:
        raise AttachError(error.errno, error.strerror) from error


def _attach(procs_fd: int) -> None:
    try:
        os.write(procs_fd, b"0")
    except OSError as error:
        raise AttachError(error.errno, error.strerror) from error


def _prepare(uid: int | None) -> None:
    """Set what a job and the fork server differ in. Runs in the child, as the job's user."""
    # If the fork server is killed: an owner without rights could not kill the job. One with
    # rights kills its group, for which the leader must live.
    prctl(PR_SET_PDEATHSIG, 0 if uid is None else signal.SIGKILL)
    _limit(resource.RLIMIT_NOFILE, *_JOB_DESCRIPTORS)


def _limit(kind: int, soft: int, hard: int) -> None:
    """Set a limit, but not above what it is."""
    _, most = resource.getrlimit(kind)
    limit = hard if most == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(kind, (min(soft, limit), limit))


def _set_signals() -> None:
    """Give this process, and so the jobs, an unblocked mask and default dispositions.

    All but the two that are the C library's own, which nobody can set. A handler is
    reset by exec, unlike an ignored signal. The owner's death ends us, not a signal
    meant for it: a service manager sends SIGTERM to all of us at once.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    handled = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE}
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, _wake if number in handled else signal.SIG_DFL)


def _wake(signum: int, frame: object) -> None:
    """Do nothing; the byte in the wake-up descriptor is what counts."""


def _kill_group(group: int) -> None:
    # PermissionError: there are cgroups, and we may change users but not kill theirs.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _kill_leader(pid: int) -> None:
    """Kill a leader that we have not reaped, and its group, which it may not have made yet."""
    _kill_group(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _ended_child() -> int | None:
    """Return a child that has ended, without reaping it."""
    try:
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return info.si_pid if info else None


def _group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True  # so it is mostly, and waitid looks through all of our children
    except PermissionError:
        pass
    try:
        os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def _children() -> list[int]:
    """List our children; /proc/PID/task/TID/children is not in every kernel."""
    children = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                # pid (comm) state ppid ...; comm may hold anything, brackets included.
                if int(stat.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    children.append(int(name))
    return children


def _main(argv: Sequence[str]) -> NoReturn:
    _, fd, duties = argv
    with socket.socket(fileno=int(fd)) as sock:
        os.set_inheritable(sock.fileno(), False)
        _ForkServer(sock, json.loads(duties)).run()
    sys.exit(0)


if __name__ == "__main__":
    _main(sys.argv)
