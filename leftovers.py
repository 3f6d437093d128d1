"""Removes what the jobs of a user leave behind outside of any process.

Some things outlive the job that made them: shared memory, semaphores and message queues of System V
and of POSIX, and files in the directories that everybody may write to. They go on taking memory, or
count for a limit of the whole host. So they are removed when the user's last job has ended.

    leftovers = Leftovers(spawner.clear)
    leftovers.begin(71_001)       # before a job of this user starts
    ...
    leftovers.end(71_001)         # when the processes of the job are gone
    leftovers.close()

The removal happens in a process that runs as the user (`clear`), which the fork server forks. It
ends early if the user starts another job, so that it takes nothing away from this job.

Thread safety: the methods of `Leftovers` may be called from any thread. `clear` belongs to a
process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import stat
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from messages import wait_ready

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

__all__ = ["DIRECTORIES", "MESSAGE_QUEUES", "Leftovers", "Removal", "clear", "clear_directory"]

MESSAGE_QUEUES = "/dev/mqueue"
DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", MESSAGE_QUEUES)  # noqa: S108
"""Where every user may make files. The last one has the POSIX message queues. If it is not mounted,
jobs of users get none (`forkserver.py`), because nobody could find what they leave."""

_CLEARING_S = 2.0  # how long the end of a job waits for this; the removal itself may take longer
# How many files, and bytes of a list, the main process looks at. If there are more, `clear` looks.
_FEW, _MUCH_BYTES = 1000, 64 * 1024
_QUIET_NS = 1_000_000_000  # a directory that changed so lately may change within the same tick
_IPC_RMID = 0
# The files of proc(5) that list the objects, and the call that removes one.
_SYSTEM_V = {"shm": "shmctl", "sem": "semctl", "msg": "msgctl"}

_State = tuple[int, int, int]  # device, inode and mtime (ns) of a directory

_libc = ctypes.CDLL(None, use_errno=True)


class Leftovers:
    """Counts the jobs of each user, and has the rest removed when the last one has ended.

    `clear`: has a process forked that runs `clear` as a user; returns a socket, whose end ends
    that process, and a pidfd of it.
    """

    def __init__(self, clear: Callable[[int], tuple[socket.socket, int]]) -> None:
        self._clear = clear
        # Guards both below. Notified when a removal has begun. Never held during I/O.
        self._changed = threading.Condition()
        self._jobs: dict[int, int] = {}  # the running jobs of each uid that has any
        self._clearing: dict[int, Removal] = {}  # by uid
        # What was found in each directory, and in which state of the directory. Needs no lock: a
        # thread only ever replaces a whole value, and each value is true.
        self._found: dict[str, tuple[_State, frozenset[int]]] = {}

    def begin(self, uid: int) -> None:
        """Count a job that is about to start. Blocks until nothing is removed any more."""
        with self._changed:
            self._jobs[uid] = self._jobs.get(uid, 0) + 1
            self._changed.wait_for(lambda: self._clearing.get(uid) is not _ABOUT_TO_BEGIN)
            running = self._clearing.pop(uid, None)
        if running is not None:
            running.end()

    def end(self, uid: int) -> None:
        """Count a job whose processes are gone. If it was the user's last one, clear up.

        Blocks until that is done, at most 2 s.
        """
        with self._changed:
            self._jobs[uid] -= 1
            if self._jobs[uid]:
                return
            del self._jobs[uid]
            # Nobody else clears up for this uid: `begin` has ended every former removal.
            self._clearing[uid] = _ABOUT_TO_BEGIN
        removal = None
        try:
            # RuntimeError: the fork server has died. OSError: there is no room for a process.
            with contextlib.suppress(OSError, RuntimeError):
                if self._has_left_any(uid):
                    removal = Removal(*self._clear(uid))
        finally:
            with self._changed:
                if removal is None:
                    del self._clearing[uid]
                else:
                    self._clearing[uid] = removal
                self._changed.notify_all()
        if removal is not None and wait_ready(removal.pidfd, select.POLLIN, _CLEARING_S):
            with self._changed:
                is_ours = self._clearing.get(uid) is removal
                if is_ours:
                    del self._clearing[uid]
            if is_ours:  # otherwise somebody has it who ends it
                removal.end()

    def _has_left_any(self, uid: int) -> bool:
        """Whether the user has left something, or so much is there that `clear` must look."""
        for kind in _SYSTEM_V:
            with contextlib.suppress(OSError), open(f"/proc/sysvipc/{kind}", "rb") as file:
                text = file.read(_MUCH_BYTES)
                if len(text) == _MUCH_BYTES or any(_of_user(text, uid)):
                    return True
        for directory in DIRECTORIES:
            with contextlib.suppress(OSError):
                uids = self._uids_in(directory)
                if uids is None or uid in uids:
                    return True
        return False

    def _uids_in(self, directory: str) -> frozenset[int] | None:
        """Return what the function of this name does, which is called only after a change.

        Whatever is made or removed changes the directory's mtime, which only its owner can set. All
        changes within a tick of the kernel's clock (10 ms at most) have the same mtime.
        """
        status = os.stat(directory)
        state = (status.st_dev, status.st_ino, status.st_mtime_ns)
        before, uids = self._found.get(directory, (None, None))
        if state != before:
            is_quiet = time.time_ns() - status.st_mtime_ns > _QUIET_NS
            uids = _uids_in(directory)
            if uids is not None and is_quiet:
                self._found[directory] = state, uids
        return uids

    def close(self) -> None:
        """End the removals that go on. Nobody may begin or end a job any more."""
        with self._changed:
            removals, self._clearing = self._clearing, {}
        for removal in removals.values():
            removal.end()


def clear(uid: int, is_wanted: Callable[[], bool]) -> None:
    """Remove all that the user `uid` has left; for a process of this user.

    Stops when `is_wanted` returns False. What cannot be removed stays.
    """
    for kind, call in _SYSTEM_V.items():
        with contextlib.suppress(OSError), open(f"/proc/sysvipc/{kind}", "rb") as file:
            for number in list(_of_user(file.read(), uid)):
                if not is_wanted():
                    return
                # semctl takes the index of a semaphore before the command; IPC_RMID ignores it.
                before = (0,) if kind == "sem" else ()
                getattr(_libc, call)(number, *before, _IPC_RMID, None)
    for directory in DIRECTORIES:
        clear_directory(directory, uid, is_wanted)


class Removal(NamedTuple):
    """A process that runs `clear`. It ends when the other end of its socket is closed."""

    sock: socket.socket | None
    pidfd: int

    def cut_short(self) -> None:
        """Have the process end, although another thread waits for it."""
        if self.sock is not None:
            self.sock.close()

    def end(self) -> None:
        """Have the process end, and wait for that: a system call that it is in takes a moment."""
        if self.sock is not None:
            self.sock.close()
            wait_ready(self.pidfd, select.POLLIN, _CLEARING_S)
            os.close(self.pidfd)


_ABOUT_TO_BEGIN = Removal(None, -1)


def _uids_in(directory: str) -> frozenset[int] | None:
    """Return the uids that have something in the directory; None if much is there to look at."""
    uids = set()
    with os.scandir(directory) as entries:
        for count, entry in enumerate(entries):
            if count == _FEW:
                return None
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                uids.add(entry.stat(follow_symlinks=False).st_uid)
    return frozenset(uids)


def _of_user(text: bytes, uid: int) -> Iterator[int]:
    """Yield the IDs of the user's objects in a file of /proc/sysvipc. The second column has IDs."""
    first, *lines = text.splitlines() or [b""]
    columns = [first.split().index(name) for name in (b"uid", b"cuid") if name in first.split()]
    for line in lines:
        values = line.split()
        if any(column < len(values) and int(values[column]) == uid for column in columns):
            yield int(values[1])


def _is_of_user(entry: os.DirEntry[str], uid: int) -> bool:
    try:
        return entry.stat(follow_symlinks=False).st_uid == uid
    except OSError:  # removed meanwhile
        return False


def clear_directory(directory: str, uid: int | None, is_wanted: Callable[[], bool]) -> None:
    """Remove the files and directories of the user `uid` in a directory; None for all of them.

    For a process of the user to whom they belong. Stops when `is_wanted` returns False.
    Keeps no list of what is there: no cgroup of a job bounds the memory of this process.
    """
    if uid is None:
        _empty(directory, is_wanted)
        return
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if not is_wanted():
                return
            if _is_of_user(entry, uid):
                with contextlib.suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.path)
                        continue
                    os.chmod(entry.path, stat.S_IRWXU)
                    _empty(entry.path, is_wanted)
                    os.rmdir(entry.path)


def _empty(top: str, is_wanted: Callable[[], bool]) -> None:
    """Remove all that is in a directory.

    A tree may be deeper than a path can be long. So each directory in it is first moved to the top.
    """
    new_names = (f"{top}/.{os.urandom(8).hex()}-{number}" for number in itertools.count())
    has_moved = True
    while has_moved:  # this pass need not have met what was moved to the top meanwhile
        has_moved = False
        with contextlib.suppress(OSError), os.scandir(top) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if not is_wanted():
                        return
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.path)
                        continue
                    os.chmod(entry.path, stat.S_IRWXU)
                    has_moved |= _move_up(entry.path, new_names, is_wanted)
                    os.rmdir(entry.path)


def _move_up(path: str, new_names: Iterator[str], is_wanted: Callable[[], bool]) -> bool:
    """Remove the files in a directory, and move its directories; return whether there were any."""
    has_moved = False
    with os.scandir(path) as entries:
        for entry in entries:
            if not is_wanted():
                break
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, stat.S_IRWXU)
                    os.rename(entry.path, next(new_names))
                    has_moved = True
                else:
                    os.unlink(entry.path)
    return has_moved
