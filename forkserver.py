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
descendant, and exits. So nothing outlives the main process, not even after SIGKILL.

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
import stat
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import inherited
import processes
from cgroupfs import dismantle, signal_tree, terminate_tree
from children import children, ended_child, group_is_gone, kill_group, kill_leader
from leader import (
    Grants,
    become,
    clone,
    clone_works,
    detach,
    groups_of,
    limit,
    popen,
    wait_and_execute,
)
from leftovers import clear, clear_directory
from messages import AttachError, close_all, failure, receive, send, wait_ready
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
    PR_SET_PDEATHSIG,
    keep_capabilities,
    prctl,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["JOB_RLIMITS", "set_signals"]

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

_REAPED_AT_ONCE = 32  # then requests are served, however many children keep ending
_UMASK = 0o077
_ROUNDS = 20  # how often to look for more processes of a job that is being killed


class _Leader(NamedTuple):
    """A leader that has not been reaped."""

    job: str
    exit_fd: int


class _ForkServer:
    """Serves the requests of the main process, and reaps.

    `sock`: where the requests come. `main_fd`: a pidfd of the main process.
    """

    def __init__(self, sock: socket.socket, main_fd: int, duties: dict[str, Any]) -> None:
        self._pid = os.getpid()
        self._socket = sock
        self._main_fd = main_fd
        self._jobs_cgroup: str | None = duties["jobs_cgroup"]
        self._uids = range(*duties["uids"]) if duties["uids"] else None
        self._homes: str | None = duties["homes"]
        self._tmp: str | None = duties["tmp"]
        self._host_accounts: bool = duties["host_accounts"]
        self._dismantling: list[Any] | None = duties["dismantle"]
        self._dismantles_at_end = False
        self._fork_child = clone if clone_works() else popen
        self._leaders: dict[int, _Leader] = {}  # by pid
        self._pids: dict[str, int] = {}  # the pids of _leaders, by job
        self._exit_fds: dict[int, int] = {}  # by process group whose leader has been reaped
        # Without cgroups, by leader: the other processes of the job when it last got a signal;
        # what was killed and may not be gone yet.
        self._signalled: dict[int, list[processes.Entry]] = {}
        self._killed: dict[int, set[processes.Entry]] = {}
        # Without cgroups: the leaders that have ended and are not reaped, because others of their
        # jobs may go on. As long as a leader is a zombie, no stranger can have its number.
        self._zombies: set[int] = set()
        # By pid of a process that removes what jobs have left: the TMPDIR that it empties, if any.
        self._clearing: dict[int, str | None] = {}

    def run(self) -> None:
        """Serve until the main process is gone; then kill everything."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        set_signals()
        # Orphans of a job become children of this process instead of init's. So it can tell
        # when a process group is gone.
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._limit_ourselves_and_jobs()
        poll = select.poll()
        for fd in (self._socket.fileno(), self._main_fd, wake_read):
            poll.register(fd, select.POLLIN)
        more_to_reap = False
        try:
            while True:
                ready = dict(poll.poll(0 if more_to_reap else None))
                if self._main_fd in ready:
                    break  # even if somebody else holds the other end of the socket
                if wake_read in ready:
                    os.read(wake_read, 4096)
                if wake_read in ready or more_to_reap:
                    more_to_reap = self._reap_some()
                if self._socket.fileno() in ready:
                    self._serve()
        except (EOFError, ConnectionError):
            pass
        finally:
            # Also after a message that makes no sense: the main process never sends one.
            self._kill_everything()
            if self._dismantles_at_end and self._dismantling:
                dismantle(*self._dismantling)

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
        if self._uids is not None:
            # Nobody may trace this process, or a fork of it that has not executed a program.
            prctl(PR_SET_DUMPABLE, 0)
            keep_capabilities(
                *(CAP_SETUID, CAP_SETGID, CAP_KILL, CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_SYS_RESOURCE)
            )

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
                    self._reap_some()
                    if request["job"] in self._pids:
                        self._kill_or_reap(self._pids[request["job"]])
                        self._close_exit_pipes()
                case "signal":
                    self._signal(request)
                case "terminate":
                    self._terminate(request["job"], request["uid"])
                case "clear":
                    pid, pidfd = self._fork_clearing(request["uid"], request["job"], reply)
                    answer["pid"] = pid
                    passed.append(pidfd)
                case "dismantle_at_end":
                    self._dismantles_at_end = True
                case _:
                    raise ValueError("unknown request")  # noqa: TRY301 -- answered like others
        except (OSError, ValueError, TypeError) as error:
            answer = failure(error)
        try:
            with contextlib.suppress(OSError):  # whoever asked no longer waits
                send(reply, answer, passed)
        finally:
            close_all(passed)

    def _fork(
        self, job: str, reply: socket.socket, stdout_fd: int, exit_fd: int
    ) -> tuple[int, int]:
        """Fork a process that waits for its program; return its pid and a pidfd of it."""
        if job in self._pids or not _is_name(job):
            raise PermissionError(errno.EPERM, "not a job's name, or taken")
        tmp = self._tmp and f"{self._tmp}/{job}"
        grants = Grants(self._uids, self._homes, tmp, self._host_accounts)
        child = functools.partial(wait_and_execute, reply, stdout_fd, grants, self._pid)
        kept_fd = os.dup(exit_fd)
        try:
            with self._opened_cgroup(job) as cgroup_fd:
                pid, pidfd = self._fork_child(cgroup_fd, child)
        except BaseException:
            os.close(kept_fd)
            raise
        self._leaders[pid] = _Leader(job, kept_fd)
        self._pids[job] = pid
        return pid, pidfd

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
        child = functools.partial(_clear, reply, uid, groups, tmp, self._pid)
        pid, pidfd = self._fork_child(None, child)
        self._clearing[pid] = tmp
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

    def _reap_some(self) -> bool:
        """Reap up to 32 children; return whether there may be more.

        Reports the end of leaders, and closes the exit pipe of each process group that is gone.
        """
        reaped = 0
        while reaped < _REAPED_AT_ONCE and (pid := ended_child(self._zombies)) is not None:
            self._reap(pid)
            reaped += 1
        if self._zombies:
            orphans = self._other_children()
            for pid in [each for each in self._zombies if not self._has_others(each, orphans)]:
                self._reap(pid, is_final=True)
        self._close_exit_pipes()
        return reaped == _REAPED_AT_ONCE

    def _close_exit_pipes(self) -> None:
        """Close the exit pipe of each process group that is gone."""
        for group in list(self._exit_fds):  # few: groups do not outlive their leader for long
            if group_is_gone(group) and not self._has_killed_that_live(group):
                os.close(self._exit_fds.pop(group))
                self._killed.pop(group, None)

    def _reap(self, pid: int, *, is_final: bool = False) -> None:
        """Reap a child that has ended, and report a leader's end.

        Without cgroups, what is left of the leader's job is killed first if `is_final`. If not,
        and something is left, the end is reported, and the leader remains a zombie.
        """
        leader = self._leaders.get(pid)
        if leader is None:
            os.waitpid(pid, 0)  # an orphan of some job
            if tmp := self._clearing.pop(pid, None):
                with contextlib.suppress(OSError):  # something is left in it
                    os.rmdir(tmp)
            return
        end: dict[str, float | bool] = {}
        if self._jobs_cgroup is None:
            is_final = is_final or pid in self._killed
            if not is_final and self._has_others(pid, self._other_children()):
                self._zombies.add(pid)
                info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                assert info is not None  # noqa: S101 -- without WNOHANG there is one
                name = "exit_code" if info.si_code == os.CLD_EXITED else "signal"
                _report(leader, {name: info.si_status, "is_final": False})
                return
            killed, may_have_escaped = self._kill_orphans(pid)
            end = {"killed": killed, "may_have_escaped": may_have_escaped}
            # Before the leader is reaped, no other process group can have its number.
            kill_group(pid)
        _, status, usage = os.wait4(pid, 0)
        del self._leaders[pid], self._pids[leader.job]
        self._zombies.discard(pid)
        self._signalled.pop(pid, None)
        self._exit_fds[pid] = leader.exit_fd
        code = os.waitstatus_to_exitcode(status)
        end |= {"exit_code": code} if code >= 0 else {"signal": -code}
        end |= {
            "cpu_user_s": usage.ru_utime,
            "cpu_system_s": usage.ru_stime,
            "max_rss_bytes": usage.ru_maxrss * 1024,
        }
        _report(leader, end)

    def _kill_or_reap(self, pid: int) -> None:
        """Kill a leader and its group; reap it if it has ended, whatever else has."""
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._reap(pid, is_final=True)
        else:
            if self._jobs_cgroup is None:
                self._kill_members(pid)
            kill_leader(pid)

    def _kill_members(self, leader: int) -> int:
        """Kill the leader and all that belongs to its job, without a cgroup.

        Returns how many other processes were killed: 0 for those that were about to end.
        """
        killed = self._killed.setdefault(leader, set())
        count = 0
        # First stop them: a process that forked while its parent is killed would show no parent.
        with contextlib.suppress(PermissionError):
            os.kill(leader, signal.SIGSTOP)  # it has not been reaped
        for _ in range(_ROUNDS):
            known = {*killed, *self._signalled.get(leader, ())}
            found = [
                each
                for each in processes.members(processes.table(), leader, known)
                if not processes.contains(killed, each)
            ]
            for each in found:
                processes.send_signal(each, signal.SIGSTOP)
            killed.update(found)
            count += sum(not each.is_ending for each in found)
            if not found:
                break
        kill_leader(leader)
        for each in killed:
            processes.send_signal(each, signal.SIGKILL)
        return count

    def _kill_orphans(self, leader: int) -> tuple[int, bool]:
        """Kill what a leader that has ended left behind.

        Returns how many processes were killed, and whether more may be alive. A process that has
        left the session and lost its parents could be of any job that started before it, unless
        it was found before.
        """
        if not self._other_children():
            return 0, False
        count = self._kill_members(leader)
        killed = set[processes.Entry]().union(*self._killed.values())
        left = [each for each in self._other_children() if not processes.contains(killed, each)]
        return count, self._has_others(leader, left)

    def _has_others(self, leader: int, orphans: list[processes.Entry]) -> bool:
        """Whether one of these may be of the job whose leader has ended and is not reaped."""
        began = processes.look(leader)
        return any(
            each.session == leader
            or (each.session not in self._leaders and (began is None or each.start >= began.start))
            for each in orphans
        )

    def _other_children(self) -> list[processes.Entry]:
        """Return the living children that are neither leaders nor ours: orphans of jobs."""
        found = (processes.look(pid) for pid in children())
        ours = self._leaders.keys() | self._clearing.keys()
        return [each for each in found if each and each.lives and each.pid not in ours]

    def _has_killed_that_live(self, leader: int) -> bool:
        """Whether a process that was killed with this leader is not gone yet."""
        return any(
            now is not None and now.lives and now.start == each.start
            for each in self._killed.get(leader, ())
            for now in [processes.look(each.pid)]
        )

    def _signal(self, request: dict[str, Any]) -> None:
        """Send a signal to the leader of a job, or to every process of the job."""
        job, number, uid = request["job"], request["signal"], request["uid"]
        if number not in signal.valid_signals():
            raise ValueError("not a signal")
        self._check_uid(uid)
        send = functools.partial(_as_user, uid)
        if not request["everything"]:
            pid = self._pid_of(job)
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise ProcessLookupError(errno.ESRCH, "the leader has ended")
            send(os.kill, pid, number)
        elif self._jobs_cgroup is not None:
            signal_tree(
                self._cgroup_of(job), number, functools.partial(send, signal.pidfd_send_signal)
            )
        else:
            self._signal_members(self._pid_of(job), (number,), send)

    def _terminate(self, job: str, uid: int | None) -> None:
        """Send SIGTERM and SIGCONT to every process of a job."""
        self._check_uid(uid)
        send = functools.partial(_as_user, uid)
        if self._jobs_cgroup is not None:
            terminate_tree(self._cgroup_of(job), functools.partial(send, signal.pidfd_send_signal))
        else:
            self._signal_members(self._pid_of(job), (signal.SIGTERM, signal.SIGCONT), send)

    def _signal_members(
        self, leader: int, numbers: Sequence[int], send: Callable[..., object]
    ) -> None:
        known = self._signalled.get(leader, ())
        others = processes.members(processes.table(), leader, known)
        # A signal may end the very parents that show whose these are.
        self._signalled[leader] = others
        for number in numbers:
            send(os.kill, leader, number)
            for each in others:
                send(processes.send_signal, each, number)

    def _pid_of(self, job: str) -> int:
        """Return a leader's number, which nobody else has until this process reaps the leader."""
        if job not in self._pids:
            raise ProcessLookupError(errno.ESRCH, "the leader has ended")
        return self._pids[job]

    def _cgroup_of(self, job: str) -> str:
        if not _is_name(job):
            raise PermissionError(errno.EPERM, "not a job's name")
        return f"{self._jobs_cgroup}/{job}"

    def _kill_everything(self) -> None:
        if self._jobs_cgroup is not None:
            # This kills processes that are being forked, too. Absent before Linux 5.14.
            with contextlib.suppress(OSError):
                kill_fd = os.open(f"{self._jobs_cgroup}/cgroup.kill", os.O_WRONLY)
                os.write(kill_fd, b"1")
                os.close(kill_fd)
        for pid in self._leaders:
            kill_leader(pid)
        # A process that left its group and has no cgroup becomes a child of this process, the
        # subreaper, when its ancestors die.
        while found := children():
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)
            while ended_child() is not None:
                os.waitpid(-1, 0)


def _is_name(job: str) -> bool:
    """Whether it can be the name of a job's cgroup and of its TMPDIR."""
    return job == os.path.basename(job) and job not in {"", ".", ".."}


def _clear(
    sock: socket.socket,
    uid: int | None,
    groups: Sequence[int],
    tmp: str | None,
    parent: int,
    _: int | None,
) -> NoReturn:
    """Remove what the jobs of a user have left, until the other end of `sock` is closed.

    `tmp`: remove only what is in this directory.
    """

    def is_wanted() -> bool:
        return not wait_ready(sock.fileno(), select.POLLHUP, 0)

    try:
        detach(os.open(os.devnull, os.O_WRONLY), [sock.fileno()])
        inherited.separate(is_alone=uid is not None)
        if uid is not None:
            become(uid, groups)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            if tmp is not None:
                with contextlib.suppress(OSError):
                    os.chmod(tmp, stat.S_IRWXU)
                clear_directory(tmp, None, is_wanted)
            elif uid is not None:
                clear(uid, is_wanted)
    finally:
        os._exit(0)


# --- signals -----------------------------------------------------------------


def set_signals() -> None:
    """Unblock every signal, and give each its default disposition, for this process and jobs.

    A few signals get a handler that does nothing, because a service manager sends SIGTERM to
    every process at once while only the main process's death may end this one. An exec resets
    a handler to the default; it would not reset an ignored signal. Two signals below SIGRTMIN
    stay as they are: they are the C library's own, and it lets nobody set them.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    handled = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE}
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, _wake if number in handled else signal.SIG_DFL)


def _wake(signum: int, frame: object) -> None:
    """Do nothing: the interpreter has written a byte to the wake-up descriptor."""


def _as_user(uid: int | None, send: Callable[[Any, int], object], process: Any, n: int) -> None:
    """Send a signal with the rights of the user `uid`, who has the right to signal their own jobs.

    This process may have no CAP_KILL. Its real and saved uid stay what they are, so the user
    gets no right over this process.
    """
    if uid is None:
        send(process, n)
        return
    own = os.geteuid()
    os.seteuid(uid)
    try:
        send(process, n)
    finally:
        os.seteuid(own)
        prctl(PR_SET_DUMPABLE, 0)  # a change of the uid resets it


def _report(leader: _Leader, end: dict[str, float | bool]) -> None:
    """Tell the main process how a leader ended."""
    with contextlib.suppress(BrokenPipeError):  # the main process no longer waits for it
        os.write(leader.exit_fd, json.dumps(end).encode() + b"\n")


def _main(argv: Sequence[str]) -> NoReturn:
    # Everything is imported. From now on no module is looked for on the disk, where somebody might
    # have put another one meanwhile. Forked processes inherit this.
    sys.meta_path.clear()
    _, fd, main_fd, duties = argv
    with socket.socket(fileno=int(fd)) as sock:
        for inherited in (sock.fileno(), int(main_fd)):
            os.set_inheritable(inherited, False)
        try:
            _ForkServer(sock, int(main_fd), json.loads(duties)).run()
        except Exception as error:  # noqa: BLE001 -- a traceback would be read from the disk
            sys.stderr.write(f"the fork server ends: {error!r}\n")
            sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    _main(sys.argv)
