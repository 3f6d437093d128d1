"""The processes of this host, as /proc shows them: who comes of a job where there are no cgroups.

    for each in members(table(), leader):
        send_signal(each, signal.SIGKILL)

A process belongs to a job if it has the leader's session or comes of the leader. A process whose
parents have ended is a child of the fork server, the subreaper, and shows by its session alone
whose it is.

Thread safety: these functions have no state.

Source: proc(5), /proc/PID/stat.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Entry", "look", "members", "send_signal", "table"]


class Entry(NamedTuple):
    """A process. `start`, in ticks since the boot, tells it from a later one with the same pid."""

    pid: int
    state: str  # "Z" or "X" if it has ended
    parent: int
    session: int
    start: int

    @property
    def lives(self) -> bool:
        """Whether it has not ended."""
        return self.state not in "ZX"


def look(pid: int) -> Entry | None:
    """Return the process with this pid; None if there is none, or none that we may see."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # pid (name) state parent group session ...; the name may contain anything.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return Entry(pid, fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19]))


def table() -> dict[int, Entry]:
    """Return all processes that we may see, by pid."""
    found = (look(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {entry.pid: entry for entry in found if entry is not None}


def members(processes: Mapping[int, Entry], leader: int) -> list[Entry]:
    """Return the living processes of the job with this leader, except the leader itself."""
    return [
        entry
        for entry in processes.values()
        if entry.pid != leader
        and entry.lives
        and (entry.session == leader or _comes_of(processes, entry, leader))
    ]


def _comes_of(processes: Mapping[int, Entry], entry: Entry, ancestor: int) -> bool:
    seen = set()  # the table is no snapshot: it may show a circle
    while entry.parent not in seen:
        if entry.parent == ancestor:
            return True
        seen.add(entry.parent)
        parent = processes.get(entry.parent)
        if parent is None:
            break
        entry = parent
    return False


def send_signal(entry: Entry, number: int) -> None:
    """Send a signal to this process, and to no later one with its pid."""
    # EPERM: we have no right to do so. ESRCH: it has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        pidfd = os.pidfd_open(entry.pid)
        try:
            now = look(entry.pid)
            if now is not None and now.start == entry.start:
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)
