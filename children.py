"""The children of this process: which have ended, and how one is killed with its process group.

    while (pid := ended_child()) is not None:
        os.waitpid(pid, 0)

Thread safety: there is no state. Only one thread may reap the children.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from processes import table

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["children", "end_children", "ended_child", "group_is_gone", "kill_group", "kill_leader"]

_DEATH_S = 5.0  # how long killed processes may take to end


def kill_group(group: int) -> None:
    """SIGKILL a process group, if there is one."""
    # EPERM: this process may change users but not kill theirs. Then there are cgroups.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def kill_leader(pid: int) -> None:
    """Kill a leader that has not been reaped, and its group, if it has made one by now."""
    kill_group(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def ended_child(zombies: Collection[int] = ()) -> int | None:
    """Return a child that has ended, without reaping it; none of `zombies`."""
    if zombies:
        for pid in children():
            if pid not in zombies and os.waitid(
                os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                return pid
        return None
    try:
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return info.si_pid if info else None


def end_children() -> None:
    """SIGKILL and reap every child, until there is none.

    A process that left its group and has no cgroup becomes a child of this process, if that is a
    subreaper, when its ancestors die. Gives up when none has ended for 5 s: the kernel may not let
    go of a process that waits for a disk. Blocks SIGCHLD, for good.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    while found := children():
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        while ended_child() is None:
            if signal.sigtimedwait((signal.SIGCHLD,), _DEATH_S) is None:
                return
        while ended_child() is not None:
            os.waitpid(-1, 0)


def group_is_gone(group: int) -> bool:
    """Whether no process of the group is left, not even a zombie."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True  # the usual case, and cheaper than waitid, which looks at every child
    except PermissionError:
        pass
    try:
        os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def children() -> list[int]:
    """List the children."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [int(child) for child in file.read().split()]
    except OSError:  # not every kernel has this file
        return [each.pid for each in table().values() if each.parent == pid]
