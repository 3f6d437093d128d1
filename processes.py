"""The processes of this host, as /proc shows them: who comes of a job where there are no cgroups.

    for each in members(table(), leader):
        send_signal(each, signal.SIGKILL)

A process belongs to a job if it has the leader's session or comes of the leader. A process whose
parents have ended is a child of the fork server, the subreaper. Its session alone shows whose it
is, unless it was found before.

Thread safety: these functions have no state.

Source: proc(5), /proc/PID/stat.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["Entry", "look", "members", "send_signal", "table"]


_PF_EXITING = 0x4  # linux/sched.h


class Entry(NamedTuple):
    """A process. `start`, in ticks since the boot, tells it from a later one with the same pid."""

    pid: int
    state: str  # "Z" or "X" if its first thread has ended
    parent: int
    session: int
    start: int
    flags: int  # PF_… of linux/sched.h
    threads: int  # 1 or 0 if it has ended

    @property
    def identity(self) -> tuple[int, int]:
        """What is the same in every state of this process, and of no other process."""
        return self.pid, self.start

    @property
    def lives(self) -> bool:
        """Whether it has not ended. The first thread alone may have, which shows as "Z", too."""
        return self.state not in "ZX" or self.threads > 1

    @property
    def is_ending(self) -> bool:
        """Whether it has ended, or is about to close its files and end: what the kernel is doing.

        Also true if only the first thread has ended.
        """
        return self.state in "ZX" or bool(self.flags & _PF_EXITING)


def look(pid: int) -> Entry | None:
    """Return the process with this pid; None if there is none, or none that we may see."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # pid (name) state parent group session ...; the name may contain anything.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    parent, session, start, flags, threads = (int(fields[i]) for i in (1, 3, 19, 6, 17))
    return Entry(pid, fields[0].decode(), parent, session, start, flags, threads)


def table() -> dict[int, Entry]:
    """Return all processes that we may see, by pid."""
    found = (look(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {entry.pid: entry for entry in found if entry is not None}


def members(
    processes: Mapping[int, Entry], leader: int, known: Collection[Entry] = ()
) -> list[Entry]:
    """Return the living processes of the job with this leader, except the leader itself.

    `known`: processes that were found to be of the job before. The leader must not have been
    reaped.
    """
    identities = {each.identity for each in known}
    found = (processes.get(pid) for pid, _ in identities)
    roots = {each.pid for each in found if each is not None and each.identity in identities}
    ancestors = roots | {leader}
    return [
        entry
        for entry in processes.values()
        if entry.pid != leader
        and entry.lives
        and (
            entry.session == leader or entry.pid in roots or _comes_of(processes, entry, ancestors)
        )
    ]


def _comes_of(processes: Mapping[int, Entry], entry: Entry, ancestors: Collection[int]) -> bool:
    seen = set()  # the table is no snapshot: it may show a circle
    while entry.parent not in seen:
        if entry.parent in ancestors:
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
