"""The fork server: a small program with one thread that forks and reaps jobs.

`spawner.py` runs it and talks to it over a socket.

Why it is a process of its own: a fork in a process with threads can deadlock the child, it
copies the page tables of the whole heap while it holds the GIL, and some libraries crash in the
child (cpython#82616).

It is small because each fork copies the memory pages that either side writes to afterwards.
With twice as many modules a start took half as long again.

It waits for no exec: `leader.py` describes how a forked process receives its program.

It does not trust the main process: the main process may have given up its rights, while the
fork server keeps six capabilities. What the fork server may do is fixed when it starts. It
runs jobs only as users of the range `uids`, finds a job's cgroup by the job's name, and opens
only the files named at its start.

When the main process dies or closes its socket, the fork server kills every job and every other
descendant, and exits. So nothing outlives the main process, not even after SIGKILL. With a restart
window it first waits for another main process: `takeover.py`, `estate.py`.

Thread safety: the program has one thread. A signal only wakes its poll.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

import inherited
from cgroupfs import count_processes, dismantle, has_survivors
from children import end_children
from errands import clear_up, signal_all, signal_cgroup
from estate import Estate
from leader import (
    Grants,
    clone,
    clone_works,
    groups_of,
    limit,
    popen,
    wait_and_execute,
)
from leaders import Leaders
from leftovers import MESSAGE_QUEUES
from messages import AttachError, close_all, failure, receive, send
from privileges import (
    CAP_CHOWN,
    CAP_DAC_OVERRIDE,
    CAP_KILL,
    CAP_SETGID,
    CAP_SETUID,
    CAP_SYS_RESOURCE,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    as_user,
    keep_capabilities,
    prctl,
)
from takeover import PROTOCOL, execute_anew, is_trusted, refusal, write_ends

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estate import Kept

__all__ = ["JOB_RLIMITS"]

JOB_RLIMITS = (
    (resource.RLIMIT_NPROC, 8192, 8192),
    (resource.RLIMIT_MEMLOCK, 8 * 1024 * 1024, 8 * 1024 * 1024),
    (resource.RLIMIT_RTPRIO, 0, 0),
    (resource.RLIMIT_NICE, 0, 0),
)
"""What a job may have, soft and hard, besides its cgroup's limits.

The number of processes counts all jobs of one user together. It matters where there is no
pids controller.
"""

_UMASK = 0o077
_FEW_PROCESSES = 32  # that a request may signal while the others wait
_DAY_S = 24 * 3600  # the longest wait, because the timeout of poll(2) is an int
_SUCCESSOR_S = 5.0  # how long a successor may take to say what it wants
_CAPABILITIES = (
    CAP_SETUID,
    CAP_SETGID,
    CAP_KILL,
    CAP_CHOWN,
    CAP_DAC_OVERRIDE,
    CAP_SYS_RESOURCE,
)


class _ForkServer:
    """Serves the requests of the main process, and reaps.

    `sock`: where the requests come. `main_fd`: readable when the main process ends: a pidfd, later
    a `Lifeline`. `state`: what another program has left that this process executed before
    (`_execute_anew`), as JSON; "" for none.
    """

    def __init__(
        self,
        sock: socket.socket,
        main_fd: int,
        duties: dict[str, Any],
        state: str,
    ) -> None:
        self._pid = os.getpid()
        self._duties = duties
        self._socket = sock
        self._main_fd = main_fd
        self._jobs_cgroup: str | None = duties["jobs_cgroup"]
        self._uids = range(*duties["uids"]) if duties["uids"] else None
        self._homes: str | None = duties["homes"]
        self._tmp: str | None = duties["tmp"]
        self._host_accounts: bool = duties["host_accounts"]
        self._is_for_cluster = bool(duties.get("cluster"))
        self._dismantling: list[Any] | None = duties["dismantle"]
        self._dismantles_at_end = False
        self._fork_child = clone if clone_works() else popen
        self._unadopted: set[str] = set()  # jobs of a former main process, not taken over yet
        self._until_s = 0.0  # how long it waits for a successor, by `time.monotonic`
        self._is_over = False  # the main process has ended as it should, or nobody is awaited
        self._restart: dict[str, Any] | None = duties["restart"]  # None: without a window
        self._estate = Estate() if self._restart else None
        self._leaders = Leaders(self._estate, has_cgroups=self._jobs_cgroup is not None)
        self._listener: socket.socket | None = None
        if self._restart:
            # How long to wait for a successor. That of this main process counts when the main
            # process has taken everything over.
            self._window_s: float = self._restart["window_s"]
            self._listener = socket.socket(fileno=self._restart["listener_fd"])
            self._listener.listen()
        self._state = state

    def run(self) -> None:
        """Serve until the main process is gone; then kill everything."""
        try:
            wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
            inherited.set_signals()
            # Orphans of a job become children of this process instead of init's. So it can tell
            # when a process group is gone.
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            self._limit_ourselves_and_jobs()
            if self._state:
                self._load(json.loads(self._state))
            self._serve_main(wake_read)
            self._await_successor(wake_read)
        finally:
            # Also after a message that makes no sense: the main process never sends one.
            self._kill_everything()
            if self._restart and self._estate:
                ends = self._estate.ends(has_reports=self._is_for_cluster)
                write_ends(self._restart["directory"], ends)
            if self._dismantles_at_end and self._dismantling:
                dismantle(*self._dismantling)

    def _serve_main(self, wake_read: int) -> None:
        """Serve until the main process is gone, or has said that this is over."""
        poll = select.poll()
        for fd in (self._socket.fileno(), self._main_fd, wake_read):
            poll.register(fd, select.POLLIN)
        more_to_reap = True  # there may be some from before this program was executed
        with contextlib.suppress(EOFError, ConnectionError):
            while not self._is_over:
                ready = dict(poll.poll(0 if more_to_reap else None))
                if self._main_fd in ready:
                    break  # even if somebody else holds the other end of the socket
                if wake_read in ready:
                    os.read(wake_read, 4096)
                if wake_read in ready or more_to_reap:
                    more_to_reap = self._leaders.reap_some()
                if self._socket.fileno() in ready:
                    self._serve()

    def _await_successor(self, wake_read: int) -> None:
        """Wait for the next main process, for as long as the restart window.

        If one comes, this process executes its program. Does not wait if there is nothing to take
        over, or if the main process said so.
        """
        self._socket.close()
        os.close(self._main_fd)
        self._main_fd = -1
        if self._restart is None or self._listener is None or self._estate is None:
            return
        self._until_s = time.monotonic() + self._window_s
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        more_to_reap = True
        while self._estate.jobs and not self._is_over:
            left_s = self._until_s - time.monotonic()
            if left_s <= 0:
                return
            ready = dict(poll.poll(0 if more_to_reap else min(left_s, _DAY_S) * 1000))
            if wake_read in ready:
                os.read(wake_read, 4096)
            if wake_read in ready or more_to_reap:
                more_to_reap = self._leaders.reap_some()
            if self._listener.fileno() in ready:
                self._receive_successor(self._listener)

    def _receive_successor(self, listener: socket.socket) -> None:
        """Let a process take over, if it may. Returns only if none has."""
        connection, _ = listener.accept()
        connection.settimeout(_SUCCESSOR_S)
        # What the other process sends may make no sense, or never come.
        with (
            contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError),
            contextlib.ExitStack() as undo,
        ):
            if not is_trusted(connection):
                connection.close()
                return
            request, fds = receive(connection)
            undo.callback(close_all, fds)
            if request["op"] == "end":
                self._is_over = True
                self._socket = connection  # closed when this process ends, which the other awaits
                self._bid_farewell()
                return
            if request["op"] == "status" and self._estate is not None:
                left_s = self._until_s - time.monotonic()
                send(connection, {"jobs": self._estate.count_running(), "left_s": left_s})
            elif problem := refusal(self._duties, self._dismantling, request):
                send(connection, {"refused": problem})
            else:
                (main_fd,) = fds
                self._execute_anew(connection, main_fd, request)
        connection.close()

    def _limit_ourselves_and_jobs(self) -> None:
        """Give up what neither this process nor a job needs; forks and execs inherit this."""
        inherited.reset()
        os.umask(_UMASK)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for kind, soft, hard in JOB_RLIMITS:
            limit(kind, soft, hard)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each job needs one here
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        inherited.refuse_splice()
        if self._uids is not None:
            if not os.path.ismount(MESSAGE_QUEUES):
                limit(resource.RLIMIT_MSGQUEUE, 0, 0)  # nobody could find what is left
            # Nobody may trace this process, or a fork of it that has not executed a program.
            prctl(PR_SET_DUMPABLE, 0)
            # With a restart window this process executes its program again.
            keep_capabilities(*_CAPABILITIES, inheritable=self._restart is not None)

    def _serve(self) -> None:
        """Receive one request and answer on the socket that came with it."""
        request, fds = receive(self._socket)
        try:
            if fds:  # none come when this process has no free descriptor number
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
                    self._leaders.kill(request["job"])
                case "signal" | "terminate":
                    if self._signal(request, reply):
                        return
                case "clear":
                    pid, pidfd = self._fork_clearing(request["uid"], request["job"], reply)
                    answer["pid"] = pid
                    passed.append(pidfd)
                case "adopt":
                    kept = self._adopt(request["job"], *fds)
                    answer = {"pid": kept.pid, "notes": kept.notes, "fds": len(kept.fds)}
                    passed += map(os.dup, kept.fds)
                case "lifeline":
                    os.dup2(fds[0], self._main_fd, inheritable=False)
                case other:
                    self._do(other, request, fds)
        except (OSError, ValueError, TypeError, LookupError) as error:
            answer = failure(error)
        try:
            with contextlib.suppress(OSError):  # whoever asked no longer waits
                send(reply, answer, passed)
        finally:
            close_all(passed)

    def _fork(
        self,
        job: str,
        reply: socket.socket,
        stdout_fd: int,
        exit_fd: int,
        output_fd: int | None = None,
    ) -> tuple[int, int]:
        """Fork a process that waits for its program; return its pid and a pidfd of it.

        `output_fd`: the read end of the pipe of `stdout_fd`, which is kept for a successor.
        """
        if (output_fd is None) != (self._estate is None):
            raise TypeError("a number of descriptors")
        if job in self._leaders.jobs or not _is_name(job):
            raise PermissionError(errno.EPERM, "not a job's name, or taken")
        tmp = self._tmp and f"{self._tmp}/{job}"
        failures_fd = self._estate.failures_fd if self._estate else -1
        grants = Grants(self._uids, self._homes, tmp, self._host_accounts, failures_fd)
        child = functools.partial(wait_and_execute, reply, stdout_fd, grants, self._pid)
        kept_fd = os.dup(exit_fd)
        try:
            with self._opened_cgroup(job) as cgroup_fd:
                pid, pidfd = self._fork_child(cgroup_fd, child)
        except BaseException:
            os.close(kept_fd)
            raise
        self._leaders.add(job, pid, kept_fd)
        if self._estate is not None and output_fd is not None:
            try:
                self._estate.add(job, pid, output_fd, pidfd)
            except BaseException:  # the process must not wait for a program, nor execute it
                os.close(pidfd)
                self._leaders.kill(job)
                raise
        return pid, pidfd

    def _do(self, what: str, request: dict[str, Any], fds: list[int]) -> None:
        """Do what needs no answer. Raises ValueError for an unknown request, KeyError."""
        match what:
            case "dismantle_at_end":
                self._dismantles_at_end = True
            case "end":
                self._is_over = True
            case "leave":
                if self._restart is not None:  # its start failed, if it has no window itself
                    self._window_s = self._window_s or self._restart["window_s"]
            case "forget others":
                self._forget_unadopted()
            case _:
                if self._estate is None:
                    raise ValueError("unknown request")
                self._estate.serve(what, request, fds)

    def _adopt(self, job: str, exit_fd: int) -> Kept:
        """Hand a job over to a main process.

        `exit_fd`: where the job's end is reported from now on.
        """
        if self._estate is None or job not in self._estate.jobs:
            raise ProcessLookupError(errno.ESRCH, "no such job is kept")
        kept = self._estate.jobs[job]
        self._unadopted.discard(job)
        self._leaders.adopt(job, kept, exit_fd)
        return kept

    def _forget_unadopted(self) -> None:
        """Kill what the main process did not take over: it knows nothing of these."""
        for job in self._unadopted:
            self._leaders.kill(job)
            if self._estate is not None:
                self._estate.forget(job)
        self._unadopted = set()
        if self._restart is not None:
            self._window_s = self._restart["next_window_s"]

    def _execute_anew(
        self, connection: socket.socket, main_fd: int, request: dict[str, Any]
    ) -> None:
        """Execute the successor's fork server in the place of this one, with all that is kept.

        So the program is always that of the main process. Returns only if that fails.
        """
        assert self._restart is not None  # noqa: S101
        assert self._estate is not None  # noqa: S101
        windows = {"window_s": self._window_s, "next_window_s": request["window_s"]}
        duties = self._duties | {"restart": self._restart | windows}
        state = {
            "estate": self._estate.save(),
            "leaders": self._leaders.save(),
        }
        fds = [connection.fileno(), main_fd, *self._lasting_fds()]
        arguments = [*request["program"], str(connection.fileno()), str(main_fd)]
        execute_anew([*arguments, json.dumps(duties)], state, fds)

    def _lasting_fds(self) -> list[int]:
        """All that is open for longer than a main process lives."""
        assert self._restart is not None  # noqa: S101
        assert self._estate is not None  # noqa: S101
        lock_fd = self._restart["lock_fd"]
        locks = [] if lock_fd is None else [lock_fd]
        return [self._restart["listener_fd"], *locks, *self._leaders.fds, *self._estate.fds]

    def _load(self, state: dict[str, Any]) -> None:
        """Take over from the program that was here before, and tell the main process so."""
        assert self._restart is not None  # noqa: S101
        assert self._estate is not None  # noqa: S101
        self._estate.load(state["estate"])
        self._leaders.load(state["leaders"])
        self._unadopted = set(self._estate.jobs)
        for fd in self._lasting_fds():
            os.set_inheritable(fd, False)
        lock_fd = self._restart["lock_fd"]
        self._socket.setblocking(True)
        pidfd = os.pidfd_open(self._pid)
        answer = {"pid": self._pid, "dismantle": self._dismantling}
        # The successor may have died, or waits no longer. Then `_serve_main` finds its end closed.
        with contextlib.suppress(OSError):
            send(self._socket, answer, [pidfd, *([] if lock_fd is None else [lock_fd])])
        os.close(pidfd)

    def _fork_clearing(
        self, uid: int | None, job: str | None, reply: socket.socket
    ) -> tuple[int, int]:
        """Fork a process that removes what the user's jobs have left; return as `_fork` does.

        With a `job` it empties the TMPDIR of this job instead.
        """
        self._check_uid(uid)
        tmp = None
        if job is not None or uid is None:
            if self._tmp is None or job is None or not _is_name(job):
                raise PermissionError(errno.EPERM, "not the name of a job with a TMPDIR")
            tmp = f"{self._tmp}/{job}"
        groups = groups_of(uid) if self._host_accounts and uid is not None else ()
        child = functools.partial(clear_up, reply, uid, groups, tmp, self._pid)
        pid, pidfd = self._fork_child(None, child)
        self._leaders.errands.add(pid)
        return pid, pidfd

    def _check_uid(self, uid: int | None) -> None:
        if self._uids is None and uid is None:
            return
        if self._uids is None or type(uid) is not int or uid not in self._uids:
            raise PermissionError(errno.EPERM, "not one of the users named at the start")

    @contextlib.contextmanager
    def _opened_cgroup(self, job: str) -> Iterator[int | None]:
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

    def _signal(self, request: dict[str, Any], reply: socket.socket) -> bool:
        """Send a signal to the leader of a job, or to every process of the job.

        Returns whether another process does, and answers.
        """
        job, uid = request["job"], request["uid"]
        self._check_uid(uid)
        if request["op"] == "terminate":
            return self._signal_all(job, None, uid, reply)
        number = request["signal"]
        if number not in signal.valid_signals():
            raise ValueError("not a signal")
        if request["everything"]:
            return self._signal_all(job, number, uid, reply)
        pid = self._leaders.pid_of(job)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise ProcessLookupError(errno.ESRCH, "the leader has ended")
        as_user(uid, os.kill, pid, number)
        return False

    def _signal_all(
        self, job: str, number: int | None, uid: int | None, reply: socket.socket | None = None
    ) -> bool:
        """Signal every process of a job; None: with SIGTERM and SIGCONT. Return as `_signal` does.

        With a `reply`, another process does it if there are many: all other requests would wait.
        """
        send = functools.partial(as_user, uid)
        if self._jobs_cgroup is None:
            numbers = (signal.SIGTERM, signal.SIGCONT) if number is None else (number,)
            self._leaders.others.signal(self._leaders.pid_of(job), numbers, send)
            return False
        cgroup = self._cgroup_of(job)
        if reply is not None and count_processes(cgroup) > _FEW_PROCESSES:
            child = functools.partial(signal_all, reply, cgroup, number, uid, self._pid)
            with contextlib.suppress(OSError):  # there is no room for a process
                pid, pidfd = self._fork_child(None, child)
                os.close(pidfd)
                self._leaders.errands.add(pid)
                return True
        signal_cgroup(cgroup, number, functools.partial(send, signal.pidfd_send_signal))
        return False

    def _bid_farewell(self) -> None:
        """Send SIGTERM to every process of every job, and give them some seconds."""
        assert self._estate is not None  # noqa: S101
        self._leaders.reap_some()
        if self._is_for_cluster:
            self._leaders.say_farewell()
            return
        self._estate.is_farewell = True
        for job in self._estate.jobs:
            # ESRCH: the job has ended. EPERM: its leader has not begun, and has no user yet.
            with contextlib.suppress(OSError):
                self._signal_all(job, None, self._user_of(job))
        self._leaders.await_ends()

    def _user_of(self, job: str) -> int | None:
        """Return the user of a job, as the owner of its TMPDIR: only the main process knows it."""
        return os.stat(f"{self._tmp}/{job}").st_uid if self._uids and self._tmp else None

    def _cgroup_of(self, job: str) -> str:
        if not _is_name(job):
            raise PermissionError(errno.EPERM, "not a job's name")
        return f"{self._jobs_cgroup}/{job}"

    def _kill_everything(self) -> None:
        if self._is_for_cluster:
            self._leaders.say_farewell()
        if self._jobs_cgroup is not None:
            with contextlib.suppress(OSError):
                self._kill_cgroups(self._jobs_cgroup)
        self._leaders.kill_all()
        end_children()

    def _kill_cgroups(self, jobs_cgroup: str) -> None:
        """Kill all that is in the cgroups of jobs. Raises OSError."""
        with os.scandir(jobs_cgroup) as entries:
            jobs = [each.name for each in entries if each.is_dir() and has_survivors(each.path)]
        # This kills processes that are being forked, too. Absent before Linux 5.14.
        kill_fd = os.open(f"{jobs_cgroup}/cgroup.kill", os.O_WRONLY)
        os.write(kill_fd, b"1")
        os.close(kill_fd)
        for job in jobs:
            with contextlib.suppress(OSError):
                self._signal_all(job, signal.SIGKILL, self._user_of(job))


def _is_name(job: str) -> bool:
    """Whether it can be the name of a job's cgroup and of its TMPDIR."""
    return job == os.path.basename(job) and job not in {"", ".", ".."}


def _main(argv: Sequence[str]) -> NoReturn:
    # Everything is imported. From now on no module is looked for on the disk, where somebody might
    # have put another one meanwhile. Forked processes inherit this.
    sys.meta_path.clear()
    if argv[1:] == ["--check"]:
        sys.stdout.write(f"{PROTOCOL}\n")
        sys.exit(0)
    _, fd, main_fd, duties, *saved = argv
    with socket.socket(fileno=int(fd)) as sock:
        for each in (sock.fileno(), int(main_fd)):
            os.set_inheritable(each, False)
        try:
            state = ""
            if saved:
                with open(int(saved[0]), encoding="utf-8") as file:
                    state = file.read()
            _ForkServer(sock, int(main_fd), json.loads(duties), state).run()
        except Exception as error:  # noqa: BLE001 -- a traceback would be read from the disk
            sys.stderr.write(f"the fork server ends: {error!r}\n")
            # If the former program has left what makes no sense here, `run` was not reached. The
            # jobs must not go on when nobody can have them, and end before the socket is closed.
            end_children()
            sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    _main(sys.argv)
