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
when the leader's process group is gone. Without cgroups there are two lines if other processes of
the job outlive the leader: the second one when these have ended or were killed. End-of-file
without a line means that the fork server died.

Each request carries a socket for its answer; end-of-file on that socket ends the answer. The
forked process inherits that socket. It receives the program on it and reports errors on it;
a successful exec closes it. So no start waits for another.

Thread safety: a `Spawner` and its processes may be used from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import select
import signal
import socket
import subprocess
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import takeover
from descriptors import with_reserve
from lifeline import Lifeline
from messages import AttachError, EnterError, close_all, error_of, receive, send, wait_ready
from successor import PROGRAM, open_own_pidfd

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from successor import Heritage

__all__ = [
    "Adopted",
    "AttachError",
    "EnterError",
    "Exit",
    "Process",
    "Restart",
    "Spawner",
    "SpawnerDiedError",
    "duties_of",
    "read_exit",
]

_ANSWER_S = 10.0  # how long the fork server may take to receive a request, and to answer it
_CLOSE_S = 5.0


class Restart(NamedTuple):
    """How jobs outlive this process."""

    directory: Path  # where the fork server waits for a successor: `takeover.py`
    window_s: float  # for how long; above 0
    lock_fd: int | None  # what it keeps locked meanwhile: `cgroups.Subtree`
    store: str | None = None  # the instance ID of the store that has the jobs


class Adopted(NamedTuple):
    """A job of a former main process. The receiver closes the descriptors."""

    pid: int
    output_fd: int  # read end of the job's output pipe
    pidfd: int  # of the leader
    notes: Mapping[str, Any]  # those of `Spawner.note`
    more_fds: Sequence[int] = ()  # of `Spawner.keep`, without what `Spawner.end_input` closed


class SpawnerDiedError(RuntimeError):
    """The fork server has died or does not answer; nothing can be started any more."""

    def __init__(self, problem: str = "has died") -> None:
        super().__init__(f"the fork server {problem}; no job can start until this program restarts")


class Exit(NamedTuple):
    """How a leader ended: either its exit code or the signal that killed it.

    The rest is what the kernel charged to the leader and to those of its children that were
    waited for (getrusage(2)). The job may have used more.
    """

    exit_code: int | None = None
    signal: int | None = None
    cpu_user_s: float = 0.0
    cpu_system_s: float = 0.0
    max_rss_bytes: int = 0  # of the largest of these processes
    # Without cgroups: whether a process may be alive that has left the leader's session; how many
    # processes were killed because they outlived the leader.
    may_have_escaped: bool = False
    killed: int = 0
    # False if other processes of the job go on, without cgroups. Another `Exit` follows when they
    # have ended, or were killed with `Spawner.kill`. It has all fields.
    is_final: bool = True
    # With a restart window only: when the fork server noticed the end, by `time.monotonic`; whether
    # the leader has executed its command; whether the fork server ended the job, because no
    # successor came.
    ended_s: float = 0.0
    was_executed: bool = True
    was_killed: bool = False


class Spawner:
    """The fork server, as the main process sees it. `close`, or leaving the context, ends it.

    `jobs_cgroup`: the directory with the jobs' cgroups. A job's cgroup has the job's name, and
    exists before `fork`. `uids`: jobs run as users of this range; that needs the right to change
    users (`privileges.can_change_user`). Without it they run as the caller. `dismantle`: the
    arguments of `cgroupfs.dismantle`, for `dismantle_at_end`. `homes`: a directory of ours in
    which a missing home of one of the `uids` is made. `tmp`: the directory with the TMPDIRs of the
    jobs, each of which has its job's name and exists before `fork`; it becomes the job's user's.
    `host_accounts`: a job has the groups of the host's account of its uid, not only the group of
    the same number. `cluster`: where jobs run; "" for here. Their leaders get SIGTERM and some
    seconds at the end. `restart`: how jobs outlive this process; None: they do not.
    `heritage`: a fork server whose main process this one has become, and which keeps its duties.

    Attributes: `pid`, `pidfd`, the fork server's; `keeps_jobs`: it does, for a successor.
    """

    def __init__(  # noqa: PLR0913 -- all are optional
        self,
        *,
        jobs_cgroup: Path | None = None,
        uids: range | None = None,
        dismantle: Sequence[Any] | None = None,
        homes: Path | None = None,
        tmp: Path | None = None,
        host_accounts: bool = False,
        restart: Restart | None = None,
        heritage: Heritage | None = None,
        cluster: str = "",
    ) -> None:
        # Guards the socket against being closed while it is used. Held while a request is sent,
        # never while its answer is awaited.
        self._lock = threading.Lock()
        self.keeps_jobs = restart is not None or heritage is not None
        self._process: subprocess.Popen[bytes] | None = None  # None: not a child of ours
        self._lifeline: Lifeline | None = None
        if heritage is not None:
            self._socket, self.pid, self.pidfd = heritage.sock, heritage.pid, heritage.pidfd
            return
        duties = duties_of(
            uids=uids,
            homes=homes,
            tmp=tmp,
            host_accounts=host_accounts,
            cluster=cluster,
            store=restart.store if restart else None,
        )
        duties |= {"jobs_cgroup": jobs_cgroup and str(jobs_cgroup), "dismantle": dismantle}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as given, theirs:
            undo.callback(self._socket.close)
            self._socket.settimeout(_ANSWER_S)
            main_fd = open_own_pidfd()
            given.callback(os.close, main_fd)
            fds = [theirs.fileno(), main_fd]
            duties["restart"] = restart and self._prepare_restart(restart, fds, given)
            # In a session of its own it gets no signals from a terminal. Without a preexec_fn Popen
            # uses vfork, which is safe although this process has threads.
            self._process = subprocess.Popen(
                [*PROGRAM, str(theirs.fileno()), str(main_fd), json.dumps(duties)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,
                cwd="/",
            )
            self.pid = self._process.pid
            self.pidfd = os.pidfd_open(self.pid)
            undo.pop_all()

    def hold_lifeline(self) -> None:
        """Have the fork server notice our end even if a thread of ours hangs in the kernel.

        Call it when this process has given up its rights, and before there are jobs. Where the
        kernel does not permit it, the fork server watches a pidfd (`open_own_pidfd`). Raises
        `SpawnerDiedError`.
        """
        with contextlib.suppress(OSError):
            self._lifeline = Lifeline()
            self._collect(self._ask({"op": "lifeline"}, [self._lifeline.fileno()]), _ANSWER_S)

    def _prepare_restart(
        self, restart: Restart, fds: list[int], given: contextlib.ExitStack
    ) -> dict[str, Any]:
        """Return what the fork server must know to wait for a successor; add to `fds`."""
        listener = given.enter_context(takeover.bind(restart.directory))
        fds.append(listener.fileno())
        if restart.lock_fd is not None:
            fds.append(restart.lock_fd)
        return {
            "directory": os.fspath(restart.directory),
            "window_s": restart.window_s,
            "next_window_s": restart.window_s,
            "listener_fd": listener.fileno(),
            "lock_fd": restart.lock_fd,
        }

    @property
    def has_died(self) -> bool:
        """Whether the fork server has ended; False once `close` was called."""
        with self._lock:
            return self._socket.fileno() >= 0 and wait_ready(self.pidfd, select.POLLIN, 0)

    def fork(self, job: str, *, stdout_fd: int, exit_fd: int, output_fd: int = -1) -> Process:
        """Have a process forked that waits to be told what to execute.

        It leads a session, and its stdout and stderr are `stdout_fd`. Its stdin is /dev/null, its
        directory is /, it has no other descriptor, every signal has its default disposition, the
        umask is 077, nothing it executes gains privileges (no_new_privs), and it dumps no core.
        With `jobs_cgroup` it is in the job's cgroup from its first instruction on. `exit_fd` is
        the write end of the exit pipe (see `read_exit`). The caller keeps both descriptors, and
        should close `exit_fd`. `output_fd`: with a restart window, the read end of the pipe of
        `stdout_fd`, which the fork server keeps for a successor until `forget`.

        Does not wait; `Process.execute` raises what fails. Raises OSError when this process has
        no free descriptor, `SpawnerDiedError`.
        """
        fds = [stdout_fd, exit_fd]
        if self.keeps_jobs:
            fds.append(output_fd)
        return Process(self, job, self._ask({"op": "fork", "job": job}, fds))

    def kill(self, job: str) -> None:
        """SIGKILL the process group of `job`, unless its leader has been reaped.

        Without cgroups also every process that has the leader's session or comes of the leader;
        this works after the leader's end, too.
        Does not wait for the processes' end. Raises `SpawnerDiedError`.
        """
        self._request({"op": "kill", "job": job})

    def signal(self, job: str, number: int, *, uid: int | None, everything: bool) -> None:
        """Send a signal to the leader of `job`, or to every process of the job.

        `uid`: the user that the job runs as, as for `Process.execute`.

        Raises ProcessLookupError if the leader has ended, and no other process may be alive that
        is to get the signal; PermissionError if the kernel does not permit it; another OSError if
        a cgroup cannot be read; `SpawnerDiedError`.
        """
        request = {"op": "signal", "job": job, "signal": int(number), "uid": uid}
        self._request(request | {"everything": everything})

    def terminate(self, job: str, *, uid: int | None) -> None:
        """Send SIGTERM, and then SIGCONT, to every process of `job`, but not to later ones.

        `uid` and errors: see `signal`.
        """
        self._request({"op": "terminate", "job": job, "uid": uid})

    def clear(self, uid: int | None, job: str | None = None) -> tuple[socket.socket, int]:
        """Have a process forked that removes what the jobs of the user `uid` have left behind.

        `job`: remove this job's TMPDIR instead, with all that is in it. None as `uid` if the
        spawner has no `uids`.
        Returns a pidfd of this process, and a socket: when the socket is closed, the process
        ends. Raises OSError, `SpawnerDiedError`.
        """
        with contextlib.ExitStack() as undo:
            ours = self._ask({"op": "clear", "uid": uid, "job": job}, [])
            undo.callback(ours.close)
            if not wait_ready(ours.fileno(), select.POLLIN, _ANSWER_S):
                raise _no_answer()
            try:
                answer, received = receive(ours)
            except EOFError as error:
                raise SpawnerDiedError from error
            if not received:  # we may have no free number for it
                raise error_of({"errno": errno.EMFILE} | answer)
            undo.pop_all()
            return ours, received[0]

    def dismantle_at_end(self) -> None:
        """Have the fork server dismantle our cgroups at its end: we are about to lose the right.

        Raises `SpawnerDiedError`.
        """
        self._request({"op": "dismantle_at_end"})

    def adopt(self, job: str, exit_fd: int) -> Adopted:
        """Take over a job of a former main process.

        `exit_fd`: the write end of an exit pipe; an end that has been reported comes again. Raises
        ProcessLookupError if the fork server has no such job; OSError, `SpawnerDiedError`.
        """
        ours = self._ask({"op": "adopt", "job": job}, [exit_fd])
        answer, received = self._collect(ours, _ANSWER_S)
        if "errno" in answer or len(received) < answer["fds"]:
            close_all(received)
            raise error_of({"errno": errno.EMFILE} | answer)
        output_fd, pidfd, *more_fds = received
        return Adopted(answer["pid"], output_fd, pidfd, answer["notes"], more_fds)

    def note(self, job: str, notes: Mapping[str, Any]) -> None:
        """Leave these notes about a job to a successor, beside earlier ones.

        Does nothing if jobs are not kept. Never raises.
        """
        if self.keeps_jobs:
            with contextlib.suppress(SpawnerDiedError, OSError):
                self._request({"op": "note", "job": job, "notes": dict(notes)})

    def keep(self, job: str, fds: Sequence[int]) -> None:
        """Have the fork server keep these descriptors of a job, too: for example the input's.

        Raises OSError, `SpawnerDiedError`.
        """
        self._request({"op": "keep", "job": job}, fds)

    def end_input(self, job: str, place: int) -> None:
        """Have the fork server close its write end of a job's input. The caller closes its own.

        `place`: its place in `keep`'s list. Does nothing if jobs are not kept. Never raises.
        """
        if self.keeps_jobs:
            with contextlib.suppress(SpawnerDiedError, OSError):
                self._request({"op": "end input", "job": job, "place": place})

    def forget(self, job: str) -> None:
        """Have the fork server keep nothing of a job: its end is recorded, or it did not start.

        Does nothing if jobs are not kept. Never raises.
        """
        if self.keeps_jobs:
            with contextlib.suppress(SpawnerDiedError, OSError):
                self._request({"op": "forget", "job": job})

    def forget_others(self) -> None:
        """End those jobs of a former main process that were not adopted.

        From now on this process's own restart window counts.
        Raises `SpawnerDiedError`.
        """
        self._request({"op": "forget others"})

    def _request(self, request: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Ask for something other than a process; wait until it is done."""
        answer, _ = self._collect(self._ask(request, fds), _ANSWER_S)
        if "errno" in answer:
            raise error_of(answer)

    def _ask(self, request: dict[str, Any], fds: Sequence[int]) -> socket.socket:
        """Send a request; return the socket on which the answer will come."""
        pair = functools.partial(socket.socketpair, socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A request without descriptors is no start. It may be a kill, which must not fail.
        ours, theirs = pair() if fds else with_reserve(pair)
        try:
            with theirs, self._lock:
                send(self._socket, request, [theirs.fileno(), *fds])
        except BaseException as error:
            ours.close()
            if isinstance(error, TimeoutError):
                raise _no_answer() from error
            if isinstance(error, OSError) and error.errno != errno.EMSGSIZE:
                raise SpawnerDiedError from error
            raise
        return ours

    def _collect(
        self, ours: socket.socket, timeout_s: float | None = None
    ) -> tuple[dict[str, Any], list[int]]:
        """Wait for the end of an answer; return all of it, and the descriptors with it."""
        answer: dict[str, Any] | None = None
        received: list[int] = []
        with ours:
            # To wake up once: the fork server and the forked process may both answer.
            if not wait_ready(ours.fileno(), select.POLLHUP, timeout_s):
                raise _no_answer()
            try:
                with contextlib.suppress(EOFError):
                    while True:
                        # ECONNRESET comes once, before the answer, if the other side has not
                        # read what was sent to it.
                        with contextlib.suppress(ConnectionResetError):
                            message, more = receive(ours)
                            received += more
                            answer = (answer or {}) | message
            except BaseException as error:
                close_all(received)
                if isinstance(error, OSError):
                    raise SpawnerDiedError from error
                raise
        if answer is None:
            if self._is_dead():
                raise SpawnerDiedError
            # The fork server had no free descriptor for the socket on which to answer.
            answer = {"errno": errno.EMFILE}
        return answer, received

    def _is_dead(self) -> bool:
        # The fork server sends nothing on this socket. So if it is readable, it is at its end.
        with self._lock:
            fd = self._socket.fileno()
            return fd < 0 or wait_ready(fd, select.POLLIN, 0)

    def close(self) -> None:
        """End the fork server, which kills every job that still runs; idempotent.

        Blocks until the fork server has ended. After 5 s it is killed, if we have the right.
        """
        if self.keeps_jobs and self._socket.fileno() >= 0:
            with contextlib.suppress(SpawnerDiedError, OSError):
                self._request({"op": "end"})
        if not self._hang_up():
            return
        if not wait_ready(self.pidfd, select.POLLIN, _CLOSE_S):
            with contextlib.suppress(OSError):  # EPERM: we have given up our rights
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                wait_ready(self.pidfd, select.POLLIN)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0)
        os.close(self.pidfd)

    def leave(self) -> None:
        """Leave the fork server and its jobs to a successor; idempotent. Does not wait.

        If nobody keeps the jobs, they end. If they come from a former main process, and this one
        has no restart window, they are kept for that of the former one. A fork server that is our
        child remains a zombie when it has ended, until this process ends.
        """
        if self.keeps_jobs and self._socket.fileno() >= 0:
            with contextlib.suppress(SpawnerDiedError, OSError):
                self._request({"op": "leave"})
        if self._hang_up():
            os.close(self.pidfd)
            if self._process is not None:
                self._process.returncode = 0  # so that Popen does not wait for it

    def _hang_up(self) -> bool:
        """Close the socket; return False if it is closed."""
        with self._lock:
            if self._socket.fileno() < 0:
                return False
            # A process that the caller has forked may hold the socket, too.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        if self._lifeline is not None:
            self._lifeline.close()
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Process:
    """A process that waits to be told what to execute; made by `Spawner.fork`.

    It ends if it is closed (`close`, or leaving the context) before it has been told. Attribute:
    `was_told`, whether it may have received what to execute.
    """

    def __init__(self, spawner: Spawner, job: str, sock: socket.socket) -> None:
        self._spawner = spawner
        self._job = job
        self._socket = sock
        self.was_told = False

    @property
    def is_waiting(self) -> bool:
        """False if the process is known to have ended, or has been told. It may not exist yet."""
        if self._socket.fileno() < 0 or self._spawner._is_dead():  # noqa: SLF001 -- its other half
            return False
        return not wait_ready(self._socket.fileno(), 0, 0)  # the other end is open

    def execute(  # noqa: PLR0913 -- what a program needs
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        uid: int | None = None,
        home: str | None = None,
        directory: str | None = None,
        stdin_fd: int | None = None,
        stderr_fd: int | None = None,
        timeout_s: float | None = None,
        kill: Callable[[], object] = lambda: None,
    ) -> tuple[int, int]:
        """Have the process execute `argv`; return its pid and a pidfd of it.

        `uid`: the user, and the only group, that it runs as: one of the spawner's `uids`; None if
        the spawner has none. `home`: the directory in which the process begins, if that user may
        enter it; otherwise, and for None, that is /. `directory`: the one that it enters then.
        `stdin_fd`: its stdin in place of /dev/null; the caller keeps it. `stderr_fd`: its stderr,
        in place of its stdout; only together with `stdin_fd`.

        Blocks until the command is executing. If the process has been killed meanwhile, this
        returns as if the command were: the exit pipe tells the end. Otherwise nothing of the
        process is left after an error. Raises OSError, and `ExecError` with the errno of exec;
        PermissionError for a user or a name that is not allowed; `AttachError` when the process
        could not enter its cgroup, `EnterError` when it could not enter `directory`;
        `SpawnerDiedError`; TimeoutError when the command is not executing after `timeout_s`. Before
        that `kill` is called, which must kill the process, and its end is awaited for up to 5 s.
        """
        # In a file, because argv may be larger than a message (net.core.wmem_max) may be.
        with self, open(os.memfd_create("argv"), "w+b", buffering=0) as program:
            work: dict[str, Any] = {"argv": list(argv), "env": dict(env), "uid": uid}
            work |= {"home": home, "directory": directory}
            program.write(json.dumps(work).encode())
            # If nobody is there to receive it, the answer says why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                others = [each for each in (stdin_fd, stderr_fd) if each is not None]
                send(self._socket, {}, [program.fileno(), *others])
                self.was_told = True
            is_late = not wait_ready(self._socket.fileno(), select.POLLHUP, timeout_s)
            if is_late:
                kill()
                if not wait_ready(self._socket.fileno(), select.POLLHUP, _CLOSE_S):
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            answer, received = self._spawner._collect(self._socket)  # noqa: SLF001 -- its other half
        if is_late:
            answer["errno"] = errno.ETIMEDOUT
        if not received:  # the kernel drops a descriptor for which we have no free number
            answer.setdefault("errno", errno.EMFILE)
        if "errno" not in answer:
            return answer["pid"], received[0]
        if "pid" in answer:
            # The process was forked and is about to end. The fork server is to have reaped it.
            try:
                for pidfd in received:
                    wait_ready(pidfd, select.POLLIN)
            finally:
                close_all(received)
            self._spawner.kill(self._job)
        raise error_of(answer)

    def close(self) -> None:
        """Let the process end if it has not been told what to execute; idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def duties_of(  # noqa: PLR0913 -- each is one
    *,
    uids: range | None,
    homes: Path | None,
    tmp: Path | None,
    host_accounts: bool,
    cluster: str = "",
    store: str | None = None,
) -> dict[str, Any]:
    """Return what must be the same for a successor. `store`: the instance ID of the jobs' store."""
    return {
        "store": store,
        "uids": [uids.start, uids.stop] if uids else None,
        "homes": str(homes) if homes else None,
        "tmp": str(tmp) if tmp else None,
        "host_accounts": host_accounts,
        "cluster": cluster,
    }


def read_exit(fd: int) -> Exit | None:
    """Read the next message of an exit pipe, whose read end is `fd`; the last one of several.

    Blocks until the leader has ended. None means end-of-file: after a final `Exit`, that the
    job's process group is gone; without one, that the fork server died.
    """
    # The fork server writes each line at once, because a line is shorter than PIPE_BUF.
    lines = os.read(fd, 4096).splitlines()
    return Exit(**json.loads(lines[-1])) if lines else None


def _no_answer() -> SpawnerDiedError:
    return SpawnerDiedError(f"has not answered for {_ANSWER_S:g} s")
