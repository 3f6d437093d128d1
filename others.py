"""The other processes of jobs, where there are no cgroups: which there are, and their end.

A job's leader is a child of the fork server. The others of its job are found in /proc: they have
the leader's session, or come of the leader (`processes.py`). A process that has left the session
and lost its parents is a child of the fork server, the subreaper, and could be of any job.

    others = Others(leaders, helpers)
    others.signal(leader, (signal.SIGTERM,), send)
    count, may_have_escaped = others.kill_orphans(leader)    # the leader has ended
    others.forget_killed(leader)

Thread safety: for the fork server, which has one thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import processes
from children import children, kill_leader

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

__all__ = ["Others"]

_ROUNDS = 20  # how often to look for more processes of a job that is being killed


class Others:
    """`leaders`: the pids of leaders that are not reaped. `helpers`: of other children of ours."""

    def __init__(self, leaders: Collection[int], helpers: Collection[int]) -> None:
        self._leaders = leaders
        self._helpers = helpers
        # By leader: the other processes of the job when it last got a signal; what was killed and
        # may not be gone yet.
        self._signalled: dict[int, list[processes.Entry]] = {}
        self._killed: dict[int, set[processes.Entry]] = {}

    def kill(self, leader: int) -> int:
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
            identities = {each.identity for each in killed}
            found = [
                each
                for each in processes.members(processes.table(), leader, known)
                if each.identity not in identities
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

    def kill_orphans(self, leader: int) -> tuple[int, bool]:
        """Kill what a leader that has ended left behind.

        Returns how many processes were killed, and whether more may be alive. A process that has
        left the session and lost its parents could be of any job that started before it, unless
        it was found before.
        """
        if not self.orphans():
            return 0, False
        count = self.kill(leader)
        killed = {each.identity for found in self._killed.values() for each in found}
        left = [each for each in self.orphans() if each.identity not in killed]
        return count, self.may_include(leader, left)

    def may_include(self, leader: int, orphans: list[processes.Entry]) -> bool:
        """Whether one of these may be of the job whose leader has ended and is not reaped."""
        began = processes.look(leader)
        return any(
            each.session == leader
            or (each.session not in self._leaders and (began is None or each.start >= began.start))
            for each in orphans
        )

    def orphans(self) -> list[processes.Entry]:
        """Return the living children that are neither leaders nor ours: orphans of jobs."""
        found = (processes.look(pid) for pid in children())
        ours = {*self._leaders, *self._helpers}
        return [each for each in found if each and each.lives and each.pid not in ours]

    def has_killed_that_live(self, leader: int) -> bool:
        """Whether a process that was killed with this leader is not gone yet."""
        return any(
            now is not None and now.lives and now.start == each.start
            for each in self._killed.get(leader, ())
            for now in [processes.look(each.pid)]
        )

    def signal(self, leader: int, numbers: Sequence[int], send: Callable[..., object]) -> None:
        known = self._signalled.get(leader, ())
        others = processes.members(processes.table(), leader, known)
        # A signal may end the very parents that show whose these are.
        self._signalled[leader] = others
        for number in numbers:
            send(os.kill, leader, number)
            for each in others:
                send(processes.send_signal, each, number)

    def was_killed(self, leader: int) -> bool:
        """Whether the job was killed."""
        return leader in self._killed

    def forget_signalled(self, leader: int) -> None:
        """Forget what got a signal: the leader has been reaped."""
        self._signalled.pop(leader, None)

    def forget_killed(self, leader: int) -> None:
        """Forget what was killed: all of it is gone."""
        self._killed.pop(leader, None)

    def save(self) -> dict[str, Any]:
        """Return what `load` needs in another program that this process executes."""
        return {
            "signalled": list(self._signalled.items()),
            "killed": [[leader, list(found)] for leader, found in self._killed.items()],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue with what `save` returned."""
        for leader, found in state["signalled"]:
            self._signalled[leader] = [processes.Entry(*each) for each in found]
        for leader, found in state["killed"]:
            self._killed[leader] = {processes.Entry(*each) for each in found}
