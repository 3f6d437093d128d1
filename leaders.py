"""The leaders of jobs, as the fork server sees them: their ends, and who is told.

    leaders = Leaders(estate, has_cgroups=True)
    leaders.add("a", pid, exit_fd)
    more = leaders.reap_some()          # after SIGCHLD
    leaders.kill("a")

Each job has an exit pipe. A line with the end is written to it when the leader has ended, and it is
closed when the leader's process group is gone. Without cgroups, two lines are written if other
processes of the job go on: the leader remains a zombie until these have ended or are killed.

Thread safety: for the fork server, which has one thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from children import children, ended_child, group_is_gone, kill_group, kill_leader
from others import Others

if TYPE_CHECKING:
    from collections.abc import Collection

    from estate import Estate, Kept

__all__ = ["Leaders"]

_REAPED_AT_ONCE = 32  # then requests are served, however many children keep ending
_FAREWELL_S = 5.0


class _Leader(NamedTuple):
    """A leader that has not been reaped."""

    job: str
    exit_fd: int


class Leaders:
    """Reaps the leaders of jobs, reports their ends, and kills them.

    `estate`: what is kept for a successor; None without a restart window.

    Attributes: `others`, the other processes of jobs without cgroups; `errands`, the pids of
    processes of `errands.py`.
    """

    def __init__(self, estate: Estate | None, *, has_cgroups: bool) -> None:
        self._estate = estate
        self._has_cgroups = has_cgroups
        self._leaders: dict[int, _Leader] = {}  # by pid
        self._pids: dict[str, int] = {}  # the pids of _leaders, by job
        # By process group whose leader has been reaped.
        self._exit_fds: dict[int, _Leader] = {}
        # Without cgroups: the leaders that have ended and are not reaped, because others of their
        # jobs may go on. As long as a leader is a zombie, no stranger can have its number.
        self._zombies: set[int] = set()
        self.errands: set[int] = set()
        self.others = Others(self._leaders.keys(), self.errands)

    @property
    def jobs(self) -> Collection[str]:
        """The jobs whose leader has not been reaped."""
        return self._pids.keys()

    @property
    def fds(self) -> list[int]:
        """The write ends of all exit pipes."""
        return [each.exit_fd for each in (*self._leaders.values(), *self._exit_fds.values())]

    def add(self, job: str, pid: int, exit_fd: int) -> None:
        """Add a leader that was forked. `exit_fd` is closed when it is not needed any more."""
        self._leaders[pid] = _Leader(job, exit_fd)
        self._pids[job] = pid

    def kill(self, job: str) -> None:
        """Kill a leader and its group. A leader that has ended is reaped, however many wait."""
        self.reap_some()
        pid = self._pids.get(job)
        if pid is None:
            return
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._reap(pid, is_final=True)
        else:
            if not self._has_cgroups:
                self.others.kill(pid)
            kill_leader(pid)
        self._close_exit_pipes()

    def say_farewell(self) -> None:
        """SIGTERM the leaders, and `await_ends`. Ends from now on are noted as `was_killed`."""
        if self._estate is not None:
            self._estate.is_farewell = True
        for pid in self._leaders:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
        self.await_ends()

    def await_ends(self) -> None:
        """Reap until all children have ended, for up to 5 s."""
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
        until_s = time.monotonic() + _FAREWELL_S
        while (more := self.reap_some()) or children():
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            if not more:
                signal.sigtimedwait((signal.SIGCHLD,), left_s)

    def kill_all(self) -> None:
        """Kill every leader and its group."""
        for pid in self._leaders:
            kill_leader(pid)

    def adopt(self, job: str, kept: Kept, exit_fd: int) -> None:
        """Report the end of a job to `exit_fd` from now on, for another main process.

        An end that was reported to the former one is reported again.
        """
        leader = _Leader(job, os.dup(exit_fd))
        if kept.end is not None:
            _report(leader, kept.end)
        if self._pids.get(job) == kept.pid:
            os.close(self._leaders[kept.pid].exit_fd)
            self._leaders[kept.pid] = leader
        elif kept.pid in self._exit_fds and self._exit_fds[kept.pid].job == job:
            os.close(self._exit_fds[kept.pid].exit_fd)
            self._exit_fds[kept.pid] = leader
        else:
            os.close(leader.exit_fd)  # no process of its group is left

    def reap_some(self) -> bool:
        """Reap up to 32 children; return whether there may be more.

        Reports the end of leaders, and closes the exit pipe of each process group that is gone.
        """
        reaped = 0
        while reaped < _REAPED_AT_ONCE and (pid := ended_child(self._zombies)) is not None:
            self._reap(pid)
            reaped += 1
        if self._zombies:
            orphans = self.others.orphans()
            for pid in [
                each for each in self._zombies if not self.others.may_include(each, orphans)
            ]:
                self._reap(pid, is_final=True)
        self._close_exit_pipes()
        return reaped == _REAPED_AT_ONCE

    def _close_exit_pipes(self) -> None:
        """Close the exit pipe of each process group that is gone."""
        for group in list(self._exit_fds):  # few: groups do not outlive their leader for long
            if group_is_gone(group) and not self.others.has_killed_that_live(group):
                os.close(self._exit_fds.pop(group).exit_fd)
                self.others.forget_killed(group)

    def _reap(self, pid: int, *, is_final: bool = False) -> None:
        """Reap a child that has ended, and report a leader's end.

        Without cgroups, what is left of the leader's job is killed first if `is_final`. If not,
        and something is left, the end is reported, and the leader remains a zombie.
        """
        leader = self._leaders.get(pid)
        if leader is None:
            os.waitpid(pid, 0)  # an orphan of some job
            self.errands.discard(pid)
            return
        end: dict[str, float | bool] = {}
        if self._estate is not None:
            was_executed = self._estate.was_executed(pid)
            end = {"ended_s": time.monotonic(), "was_executed": was_executed}
        if not self._has_cgroups:
            is_final = is_final or self.others.was_killed(pid)
            if not is_final and self.others.may_include(pid, self.others.orphans()):
                self._zombies.add(pid)
                info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                assert info is not None  # noqa: S101 -- without WNOHANG there is one
                name = "exit_code" if info.si_code == os.CLD_EXITED else "signal"
                self._tell(leader, {name: info.si_status, "is_final": False} | end)
                return
            killed, may_have_escaped = self.others.kill_orphans(pid)
            end |= {"killed": killed, "may_have_escaped": may_have_escaped}
            # Before the leader is reaped, no other process group can have its number.
            kill_group(pid)
        _, status, usage = os.wait4(pid, 0)
        del self._leaders[pid], self._pids[leader.job]
        self._zombies.discard(pid)
        self.others.forget_signalled(pid)
        self._exit_fds[pid] = leader
        code = os.waitstatus_to_exitcode(status)
        end |= {"exit_code": code} if code >= 0 else {"signal": -code}
        end |= {
            "cpu_user_s": usage.ru_utime,
            "cpu_system_s": usage.ru_stime,
            "max_rss_bytes": usage.ru_maxrss * 1024,
        }
        self._tell(leader, end)

    def _tell(self, leader: _Leader, end: dict[str, float | bool]) -> None:
        """Tell the main process, and keep for a successor, how a leader ended."""
        _report(leader, end)
        if self._estate is not None:
            self._estate.note_end(leader.job, end)

    def pid_of(self, job: str) -> int:
        """Return a leader's pid, which no other process gets until this one reaps the leader."""
        if job not in self._pids:
            raise ProcessLookupError(errno.ESRCH, "the leader has ended")
        return self._pids[job]

    def save(self) -> dict[str, Any]:
        """Return what `load` needs in another program that this process executes."""
        return {
            "leaders": [[pid, *leader] for pid, leader in self._leaders.items()],
            "exit_fds": [[pid, *leader] for pid, leader in self._exit_fds.items()],
            "zombies": list(self._zombies),
            # With a second value, which programs of the same protocol once used.
            "clearing": [[pid, None] for pid in self.errands],
            "others": self.others.save(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue with what `save` returned."""
        for pid, job, exit_fd in state["leaders"]:
            self.add(job, pid, exit_fd)
        self._exit_fds = {pid: _Leader(job, fd) for pid, job, fd in state["exit_fds"]}
        self._zombies = set(state["zombies"])
        self.errands.update(pid for pid, _ in state["clearing"])
        self.others.load(state["others"])


def _report(leader: _Leader, end: dict[str, float | bool]) -> None:
    """Tell the main process how a leader ended."""
    with contextlib.suppress(BrokenPipeError):  # the main process no longer waits for it
        os.write(leader.exit_fd, json.dumps(end).encode() + b"\n")
