"""The one process that forks: a small, single-threaded helper that starts and reaps jobs.

Forking from a process with threads can deadlock the child, copies the whole heap
while holding the GIL, and with gRPC loaded crashes the child (README of grpc#43055,
cpython#82616). So `Spawner` runs this file as a fresh program and asks it, over a
socketpair, to start each job with `subprocess.Popen`. The helper is the jobs'
parent: only it waits for them and signals their process groups, hence never a
process that has been reaped and whose number belongs to a stranger.

    with Spawner() as spawner:
        read_end, exit_fd = os.pipe()
        pid, pidfd = spawner.spawn("a", ["echo", "hi"], {}, stdout_fd=1, exit_fd=exit_fd)
        os.close(exit_fd)
        read_exit(read_end)        # what ended the leader, once it has ended

This file imports little, for every page of the helper is copied by its forks: with
twice the modules a start took half as long again.

The exit pipe tells a job's end: one JSON line when its leader has exited, then
end-of-file when its process group is gone. End-of-file without a line means that
the helper died. When the socket to the owner closes, for whatever reason, the
helper kills every job and every other descendant, and exits: nothing outlives
the owner, not even after SIGKILL.

Thread safety: `Spawner` may be used from any thread; one lock makes a request and
its answer one unit. The helper itself has one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["AttachError", "Exit", "Spawner", "SpawnerDiedError", "read_exit"]

_MAX_MESSAGE_BYTES = 4096
_MAX_FDS = 4
_CLOSE_S = 5.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_UMASK = 0o022


class SpawnerDiedError(RuntimeError):
    """The helper process is gone; nothing can be started any more."""

    def __init__(self) -> None:
        super().__init__("the spawner process has died; restart the server to start jobs again")


class AttachError(OSError):
    """The new process could not enter its cgroup, so the command was not executed."""


class Exit(NamedTuple):
    """How a leader ended: exactly one of the first two is set.

    The rest is what the kernel charged to it and to those of its children that were
    waited for (getrusage(2)), which need not be the whole job.
    """

    exit_code: int | None = None
    signal: int | None = None
    cpu_user_s: float = 0.0
    cpu_system_s: float = 0.0
    max_rss_bytes: int = 0  # of the largest single process


class Spawner:
    """The owner's side. Starts the helper; `close` (or leaving the context) ends it.

    `kill_root`: the cgroup that holds all the jobs' cgroups, if there is one; the
    helper kills it whole when the owner is gone.
    """

    def __init__(self, *, kill_root: Path | None = None) -> None:
        # Guards the socket and the number: held from a request to its answer.
        self._lock = threading.Lock()
        self._number = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(self._socket.close)
            # No site-packages, no PYTHON* variables, no terminal signals (own session).
            # Without preexec_fn Popen uses vfork, which is safe among threads.
            self._process = subprocess.Popen(
                [sys.executable, "-E", "-s", "-S", __file__, str(theirs.fileno())]
                + ([str(kill_root)] if kill_root else []),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
            )
            undo.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def spawn(  # noqa: PLR0913 -- one request, all of it needed
        self,
        job: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        stdout_fd: int,
        exit_fd: int,
        cgroup_procs_fd: int | None = None,
    ) -> tuple[int, int]:
        """Execute `argv` as the leader of a new session; return its pid and a pidfd of it.

        stdin is /dev/null, stdout and stderr are `stdout_fd`, the directory is /, no
        other descriptor is open, and every signal has its default disposition.
        `exit_fd`, the write end of a pipe, will tell the end (see `read_exit`). With
        `cgroup_procs_fd` the process joins that cgroup before it executes anything.
        The caller keeps its descriptors, and should close its copy of `exit_fd`.

        Blocks until the command is executing. Raises OSError with exec's errno when
        it cannot be executed, `AttachError` when it could not join the cgroup,
        `SpawnerDiedError`. Nothing is left behind then.
        """
        fds = [stdout_fd, exit_fd]
        if cgroup_procs_fd is not None:
            fds.append(cgroup_procs_fd)
        # In a file: a message may not be larger than net.core.wmem_max, an argv may.
        with open(os.memfd_create("argv"), "w+b", buffering=0) as program:
            program.write(json.dumps({"argv": list(argv), "env": dict(env)}).encode())
            answer, received = self._request({"op": "spawn", "job": job}, [program.fileno(), *fds])
        if "errno" in answer:
            kind = AttachError if answer["attach"] else OSError
            raise kind(answer["errno"], os.strerror(answer["errno"]))
        if not received:  # the kernel drops a descriptor for which we have no number left
            self.kill(job)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return answer["pid"], received[0]

    def kill(self, job: str) -> None:
        """SIGKILL the process group of `job`, if its leader has not been reaped.

        Does not wait. Raises `SpawnerDiedError`.
        """
        self._request({"op": "kill", "job": job}, [])

    def _request(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        with self._lock:
            self._number += 1
            try:
                _send(self._socket, {"number": self._number, **request}, fds)
                while True:
                    answer, received = _receive(self._socket)
                    if answer["number"] == self._number:
                        return answer, received
                    # Whoever asked that did not wait for the answer, because of Ctrl-C.
                    _close_all(received)
            except (EOFError, OSError) as error:
                raise SpawnerDiedError from error

    def close(self) -> None:
        """End the helper, which kills every job that still runs; idempotent.

        Blocks until it has ended; after 5 s it is killed.
        """
        with self._lock:
            self._socket.close()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_exit(fd: int) -> Exit | None:
    """Read a job's exit pipe, of which `fd` is the read end, as far as it has been written.

    Blocks until the leader has ended. None means end-of-file: after an `Exit`, that
    the job's process group is gone; without one, that the helper died.
    """
    line = os.read(fd, 4096)  # written in one piece, being shorter than PIPE_BUF
    return Exit(**json.loads(line)) if line else None


# --- both sides: one JSON object a message, with descriptors ------------------------------


def _send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    socket.send_fds(sock, [json.dumps(message).encode()], list(fds))


def _receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Raises EOFError when the other side is gone."""
    data, fds, _, _ = socket.recv_fds(sock, _MAX_MESSAGE_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise EOFError
    return json.loads(data), fds


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


# --- the helper ---------------------------------------------------------------------


class _Helper:
    """The program that `Spawner` runs. One thread; a signal only wakes the poll."""

    def __init__(self, sock: socket.socket, kill_root: str | None) -> None:
        self._socket = sock
        self._kill_root = kill_root
        self._leaders: dict[str, subprocess.Popen[bytes]] = {}  # by job, not yet reaped
        self._exit_fds: dict[int, int] = {}  # by process group, until it is gone
        # Where a child that could not attach leaves its errno: after fork it shares
        # nothing else with us, and Popen keeps such an exception to itself.
        self._attach_errno = mmap.mmap(-1, 4)

    def run(self) -> None:
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        _set_signals()
        # Orphans of a job become our children and not init's, so that we can tell
        # when a process group is gone.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        os.umask(_UMASK)
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll())
                if wake_read in ready:
                    os.read(wake_read, 4096)
                    self._reap()
                if self._socket.fileno() in ready:
                    request, fds = _receive(self._socket)
                    try:
                        self._answer(request, fds)
                    finally:
                        _close_all(fds)
        except (EOFError, ConnectionError):
            pass  # the owner is gone
        finally:
            self._kill_everything()

    def _answer(self, request: dict[str, Any], fds: list[int]) -> None:
        answer: dict[str, Any] = {"number": request["number"]}
        if request["op"] == "kill":
            if leader := self._leaders.get(request["job"]):
                _kill_group(leader.pid)
            _send(self._socket, answer)
            return
        try:
            pid, pidfd = self._spawn(request["job"], *fds)
        except (OSError, ValueError) as error:
            # ValueError: argv or environment that cannot be encoded.
            answer["errno"] = getattr(error, "errno", None) or errno.EINVAL
            answer["attach"] = isinstance(error, AttachError)
            _send(self._socket, answer)
            return
        try:
            _send(self._socket, answer | {"pid": pid}, [pidfd])
        finally:
            os.close(pidfd)

    def _spawn(
        self, job: str, program_fd: int, stdout_fd: int, exit_fd: int, procs_fd: int | None = None
    ) -> tuple[int, int]:
        program = json.loads(os.pread(program_fd, os.fstat(program_fd).st_size, 0))
        self._attach_errno[:] = bytes(4)
        try:
            leader = subprocess.Popen(
                program["argv"],
                env=program["env"],
                stdin=subprocess.DEVNULL,
                stdout=stdout_fd,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
                # One thread, so none can hold a lock that the child would wait for.
                preexec_fn=None if procs_fd is None else lambda: self._attach(procs_fd),  # noqa: PLW1509
            )
        except subprocess.SubprocessError:  # "Exception occurred in preexec_fn."
            number = int.from_bytes(self._attach_errno[:], sys.byteorder)
            raise AttachError(number, os.strerror(number)) from None
        try:
            # Valid even if the leader has ended by now: nobody but us reaps it.
            pidfd = os.pidfd_open(leader.pid)
            try:
                self._exit_fds[leader.pid] = os.dup(exit_fd)
            except BaseException:
                os.close(pidfd)
                raise
        except BaseException:
            leader.kill()
            leader.wait()
            raise
        self._leaders[job] = leader
        return leader.pid, pidfd

    def _attach(self, procs_fd: int) -> None:
        """Join the job's cgroup; runs in the child, between fork and exec."""
        try:
            os.write(procs_fd, b"0")
        except OSError as error:
            self._attach_errno[:] = (error.errno or 0).to_bytes(4, sys.byteorder)
            raise

    def _reap(self) -> None:
        """Reap what has ended: report leaders, close the exit pipes of vanished groups."""
        jobs = {leader.pid: job for job, leader in self._leaders.items()}
        while (pid := _ended_child()) is not None:
            job = jobs.get(pid)
            if job is None:
                os.waitpid(pid, 0)  # an orphan of some job
                continue
            # As long as the leader is not reaped, its group's number is taken.
            _kill_group(pid)
            _, status, usage = os.wait4(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self._leaders.pop(job).returncode = code  # Popen need not wait any more
            end: dict[str, float] = {"exit_code": code} if code >= 0 else {"signal": -code}
            end |= {
                "cpu_user_s": usage.ru_utime,
                "cpu_system_s": usage.ru_stime,
                "max_rss_bytes": usage.ru_maxrss * 1024,
            }
            with contextlib.suppress(BrokenPipeError):  # the owner does not care any more
                os.write(self._exit_fds[pid], json.dumps(end).encode() + b"\n")
        running = {leader.pid for leader in self._leaders.values()}
        for group in self._exit_fds.keys() - running:
            if _group_is_gone(group):
                os.close(self._exit_fds.pop(group))

    def _kill_everything(self) -> None:
        if self._kill_root is not None:
            # Beats concurrent forks. A kernel before 5.14 has no such file.
            with contextlib.suppress(OSError), open(f"{self._kill_root}/cgroup.kill", "w") as kill:
                kill.write("1")
        for leader in self._leaders.values():
            _kill_group(leader.pid)
        # What escaped its group or has no cgroup: as its ancestors die it becomes our
        # child, because we are the subreaper.
        while children := _children():
            for pid in children:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)
            while _ended_child() is not None:
                os.waitpid(-1, 0)


def _set_signals() -> None:
    """Give this process, and so the jobs, an unblocked mask and default dispositions.

    All but the two that are the C library's own, which nobody can set. A handler is
    reset by exec, unlike an ignored signal. The owner's death ends us, not a signal
    meant for it: a service manager sends SIGTERM to all of us at once.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    handled = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, _wake if number in handled else signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # Popen restores it for the jobs


def _wake(signum: int, frame: object) -> None:
    """Do nothing; the byte in the wake-up descriptor is what counts."""


def _kill_group(group: int) -> None:
    # PermissionError: all of it runs set-uid programs and we are not root.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _ended_child() -> int | None:
    """Return a child that has ended, without reaping it."""
    try:
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return info.si_pid if info else None


def _group_is_gone(group: int) -> bool:
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
    _, fd, *kill_root = argv
    with socket.socket(fileno=int(fd)) as sock:
        _Helper(sock, kill_root[0] if kill_root else None).run()
    sys.exit(0)


if __name__ == "__main__":
    _main(sys.argv)
