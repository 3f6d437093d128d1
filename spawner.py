"""Starts the fork server and asks it for processes: the main process's side.

`Spawner` runs `forkserver.py` as a program of its own and asks it, over a socket, to fork.
The fork server is the parent of all jobs. Only it waits for them and signals their process
groups, so no signal can reach a stranger who was given the number of a reaped process.

    with Spawner() as spawner:
        read_end, exit_fd = os.pipe()
        process = spawner.fork("a", stdout_fd=1, exit_fd=exit_fd)
        os.close(exit_fd)
        pid, pidfd = process.execute(["/bin/echo", "hi"], {})
        read_exit(read_end)        # blocks until the leader has ended

Fork and exec are two steps, so that the fork can be done before a job is asked for. The
forked process waits in its job's cgroup until `Process.execute` tells it what to execute.

The exit pipe tells a job's end: one JSON line when the leader has ended, then end-of-file
when the leader's process group is gone. End-of-file without a line means that the fork
server died.

Each request carries a socket for its answer; end-of-file on that socket ends the answer. The
forked process inherits that socket. It receives the program on it and reports errors on it;
a successful exec closes it. So no start waits for another.

Thread safety: a `Spawner` and its processes may be used from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import forkserver
from forkserver import AttachError, close_all, receive, send, wait_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["AttachError", "Exit", "Process", "Spawner", "SpawnerDiedError", "read_exit"]

_CLOSE_S = 5.0


class SpawnerDiedError(RuntimeError):
    """The fork server is gone; nothing can be started any more."""

    def __init__(self) -> None:
        super().__init__("the fork server has died; no job can start until this program restarts")


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
    """The owner's side. Starts the fork server; `close` (or leaving the context) ends it.

    `jobs_cgroup`: the cgroup that holds the cgroups of the jobs, each of which has the
    job's name and must exist before `spawn`; the fork server kills it whole when the owner
    is gone. `uids`: jobs run as one of these users (see `can_change_user`) and not as
    ours. `dismantle`: arguments for `cgroups.dismantle`, see `dismantle_at_end`. `files`: what
    the fork server opens for us then, each path with the flags of open(2).
    """

    def __init__(
        self,
        *,
        jobs_cgroup: Path | None = None,
        uids: range | None = None,
        dismantle: Sequence[Any] | None = None,
        files: Mapping[str, int] | None = None,
    ) -> None:
        # Guards the socket, whose number is another's once it is closed. Held while a
        # request is sent, not while its answer is awaited.
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(self._socket.close)
            # No site-packages, no PYTHON* variables, no terminal signals (own session).
            # Without preexec_fn Popen uses vfork, which is safe among threads.
            duties = {
                "jobs_cgroup": str(jobs_cgroup) if jobs_cgroup else None,
                "uids": [uids.start, uids.stop] if uids else None,
                "dismantle": dismantle,
                "files": dict(files or {}),
            }
            command = [sys.executable, "-E", "-s", "-S", forkserver.__file__]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), json.dumps(duties)],
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

    def fork(self, job: str, *, stdout_fd: int, exit_fd: int) -> Process:
        """Have a process forked that can be told what to execute; it will lead a session.

        Its stdin is /dev/null, its stdout and stderr are `stdout_fd`, its directory is /, no
        other descriptor is open, every signal has its default disposition, the umask is
        077, nothing it executes can gain privileges (no_new_privs), and it dumps no
        core. `exit_fd`, the write end of a pipe, will tell its end (see `read_exit`).
        With `jobs_cgroup` it is in the cgroup `job` in there from its first instruction on.
        The caller keeps its descriptors, and should close its copy of `exit_fd`.

        Does not wait: what fails is told by `Process.execute`. Raises OSError when there is
        no descriptor left, `SpawnerDiedError`.
        """
        return Process(self, job, self._ask({"op": "fork", "job": job}, [stdout_fd, exit_fd]))

    def kill(self, job: str) -> None:
        """SIGKILL the process group of `job`, if its leader has not been reaped.

        Does not wait. Raises `SpawnerDiedError`.
        """
        self._request({"op": "kill", "job": job})

    def dismantle_at_end(self) -> None:
        """Have the fork server dismantle our cgroups at its end: we are about to lose the right.

        Raises `SpawnerDiedError`.
        """
        self._request({"op": "dismantle_at_end"})

    def open(self, path: str) -> int:
        """Open one of `files` with the fork server's rights; return the descriptor.

        A file that is created has mode 0600. Raises OSError, PermissionError for
        another path, `SpawnerDiedError`.
        """
        try:
            received = self._request({"op": "open", "path": path})
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        if not received:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return received[0]

    def _request(self, request: dict[str, Any]) -> list[int]:
        """Ask for something other than a process; return the descriptors that are the answer."""
        answer, received = self._collect(self._ask(request, []))
        if "errno" in answer:
            raise _error(answer)
        return received

    def _ask(self, request: dict[str, Any], fds: list[int]) -> socket.socket:
        """Send a request; return the socket on which the answer will come."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, self._lock:
                send(self._socket, request, [theirs.fileno(), *fds])
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise SpawnerDiedError from error
            raise
        return ours

    def _collect(self, ours: socket.socket) -> tuple[dict[str, Any], list[int]]:
        """Return all that is said in answer, and the descriptors with it, when it has been."""
        answer: dict[str, Any] | None = None
        received: list[int] = []
        with ours:
            try:
                # Awake once, when all has been said: a process's answer comes in two parts.
                wait_ready(ours.fileno(), select.POLLHUP)
                with contextlib.suppress(EOFError):
                    while True:
                        # Said once, and no end, when what we had to say was not read.
                        with contextlib.suppress(ConnectionResetError):
                            message, more = receive(ours)
                            received += more
                            answer = (answer or {}) | message
            except OSError as error:
                close_all(received)
                raise SpawnerDiedError from error
            except BaseException:
                close_all(received)
                raise
        if answer is None:
            if self._is_dead():
                raise SpawnerDiedError
            answer = {"errno": errno.EMFILE}  # it had no number left for where to answer
        return answer, received

    def _is_dead(self) -> bool:
        try:
            # It says nothing here, so this is end-of-file or nothing.
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        """End the fork server, which kills every job that still runs; idempotent.

        Blocks until it has ended; after 5 s it is killed, or left if it may not be.
        """
        with self._lock:
            self._socket.close()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):  # we have given up our rights
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Process:
    """A process that waits to be told what to execute; made by `Spawner.fork`.

    Who does not tell it must `close` it, or leave its context: then it ends.
    """

    def __init__(self, spawner: Spawner, job: str, sock: socket.socket) -> None:
        self._spawner = spawner
        self._job = job
        self._socket = sock

    @property
    def is_waiting(self) -> bool:
        """Whether it can still be told, as far as is known: it may be about to be forked."""
        if self._socket.fileno() < 0 or self._spawner._is_dead():  # noqa: SLF001 -- its other half
            return False
        return not wait_ready(self._socket.fileno(), 0, 0)  # somebody has the other end

    def execute(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        uid: int | None = None,
        timeout_s: float | None = None,
        kill: Callable[[], object] = lambda: None,
    ) -> tuple[int, int]:
        """Have it execute `argv`; return its pid and a pidfd of it.

        `uid` (one of the spawner's `uids`, if those were given, else None): its user and its
        group, the only one it has.

        Blocks until the command is executing. Raises OSError with the errno of fork or exec
        when it cannot be executed, PermissionError for an uid or a name that is not allowed,
        `AttachError` when it could not join the cgroup, `SpawnerDiedError`. It is gone then.
        One that has been killed before is told as having executed: its end tells. When it is
        not executing after `timeout_s`, `kill` is called, which is to kill it, and TimeoutError
        raised: when it is gone, or 5 s later.
        """
        # In a file: a message may not be larger than net.core.wmem_max, an argv may.
        with self, open(os.memfd_create("argv"), "w+b", buffering=0) as program:
            work = {"argv": list(argv), "env": dict(env), "uid": uid}
            program.write(json.dumps(work).encode())
            # If nobody is there, the fork server has said why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                send(self._socket, {}, [program.fileno()])
            is_late = not wait_ready(self._socket.fileno(), select.POLLHUP, timeout_s)
            if is_late:
                kill()
                if not wait_ready(self._socket.fileno(), select.POLLHUP, _CLOSE_S):
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            answer, received = self._spawner._collect(self._socket)  # noqa: SLF001 -- its other half
        if is_late:
            answer["errno"] = errno.ETIMEDOUT
        if not received:  # the kernel drops a descriptor for which we have no number left
            answer.setdefault("errno", errno.EMFILE)
        if "errno" not in answer:
            return answer["pid"], received[0]
        if "pid" in answer:
            # It is on its way out; the fork server reaps it when it next hears from us.
            try:
                for pidfd in received:
                    wait_ready(pidfd, select.POLLIN)
            finally:
                close_all(received)
            self._spawner.kill(self._job)
        raise _error(answer)

    def close(self) -> None:
        """Give it up; idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_exit(fd: int) -> Exit | None:
    """Read a job's exit pipe, of which `fd` is the read end, as far as it has been written.

    Blocks until the leader has ended. None means end-of-file: after an `Exit`, that
    the job's process group is gone; without one, that the fork server died.
    """
    line = os.read(fd, 4096)  # written in one piece, being shorter than PIPE_BUF
    return Exit(**json.loads(line)) if line else None


def _error(answer: dict[str, Any]) -> OSError:
    kind = AttachError if answer.get("attach") else OSError
    return kind(answer["errno"], os.strerror(answer["errno"]))
