"""TMPDIR: a directory of its own for each job, which is removed after the job.

    scratch = Scratch("/var/lib/jobs/tmp", uids=range(71_000, 72_000))
    scratch.sweep(spawner.clear)     # what a former worker has left
    scratch.make(job_id)             # before the job starts
    ...
    scratch.remove(job_id)           # when the job's processes are gone
    scratch.empty()                  # while the fork server is there
    scratch.close()

The directory of a job belongs to the job's user; the leader sees to that before its exec. Most jobs
leave it empty, and then one system call removes it. For the others the fork server forks a process
that has only the rights of the job's user. So no link that a job has left can make anybody
remove what the user could not.

Thread safety: every method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from finding import is_job_id
from leftovers import Removal
from messages import wait_ready
from privileges import CAP_CHOWN, has_capabilities
from removals import Removals

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection

__all__ = ["Scratch", "make_homes"]

logger = logging.getLogger(__name__)

_REMOVAL_S = 2.0  # how long the end of a job waits for this; the removal itself may take longer
_SWEEP_S = 10.0
_EMPTY_S = 0.5
_JOIN_S = 0.1  # for a removal that was cut short; a worker that ends has no time


class Scratch:
    """The directory `path` with the directories of the jobs; ours alone (flock) until closed.

    `path`: made if it does not exist; None for a temporary directory. `uids`: those that jobs run
    as; None if they run as the user of this process. With `uids` but without CAP_CHOWN there are no
    directories, and every method does nothing. `keeps`: says of the ID of a job whether its
    directory outlives this process; None means that none does. Raises BlockingIOError if another
    worker has the directory, OSError. Attribute: `path`, absolute; None if there is none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        uids: range | None,
        keeps: Callable[[str], bool] | None = None,
    ) -> None:
        self._uids = uids
        self._keeps = keeps or (lambda _: False)
        self._clear: Callable[[int | None, str], tuple[socket.socket, int]] | None = None
        self._removals = Removals()
        # Guards _emptying. Never held during I/O.
        self._lock = threading.Lock()
        # The threads that remove a directory, each with the process that empties it, once begun.
        self._emptying: dict[threading.Thread, Removal | None] = {}
        self._is_hurried = False
        self.path: Path | None = None
        self._temporary = path is None
        self._fd = -1
        if uids is not None and not has_capabilities(CAP_CHOWN):
            logger.warning("jobs have no TMPDIR and no home: this process lacks CAP_CHOWN")
            return
        self.path = Path(tempfile.mkdtemp(prefix="job-worker-tmp-") if path is None else path)
        self.path = self.path.absolute()
        # Other users may pass through it to their own directories, and not list it.
        self._fd = _open_directory(self.path, 0o700 if uids is None else 0o711)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(self._fd)
            raise

    def give_to(self, uid: int) -> None:
        """Let the user `uid` make and remove directories here. Raises OSError."""
        if self._fd >= 0:
            os.fchown(self._fd, uid, uid)

    def path_of(self, job_id: str) -> str:
        """Return the path of a job's directory; "" if there is none."""
        return f"{self.path}/{job_id}" if self.path else ""

    def make(self, job_id: str) -> None:
        """Make the directory of a job. Raises OSError."""
        if self._fd >= 0:
            os.mkdir(job_id, 0o700, dir_fd=self._fd)

    def remove(self, job_id: str) -> None:
        """Remove the directory of a job with all that is in it. What cannot be removed stays.

        Blocks until that is done, at most 2 s; then the removal goes on by itself. After `hurry`
        it stays for `empty`, unless nothing is in it.
        """
        self._remove(job_id, time.monotonic() + (0 if self._is_hurried else _REMOVAL_S))

    def hurry(self) -> None:
        """Have no end of a job wait for a removal from now on: a worker that ends has no time."""
        self._is_hurried = True

    def sweep(
        self,
        clear: Callable[[int | None, str], tuple[socket.socket, int]],
        kept: Collection[str] = (),
    ) -> None:
        """Remove what a former worker has left here. Blocks for at most 10 s.

        `clear`: `Spawner.clear`; `remove` uses it, too. `kept`: jobs that keep their directories.
        """
        self._clear = clear
        left = self._remove_all(_SWEEP_S, kept)
        if left:
            logger.warning("%d directories of former jobs are still in %s", left, self.path)

    def empty(self) -> None:
        """Remove all that is not kept, and end the removals that take long.

        Blocks for little more than half a second.
        """
        self._remove_all(_EMPTY_S)
        self._end_removals()

    def _end_removals(self) -> None:
        """End the threads; a removal in one system call of the kernel that takes long goes on."""
        with self._lock:
            emptying = dict(self._emptying)
        for removal in emptying.values():
            if removal is not None:
                removal.cut_short()
        deadline = time.monotonic() + _JOIN_S
        for thread in emptying:
            thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Leave the directory; remove it if it is temporary."""
        if self.path is None:
            return
        if self._temporary:
            with contextlib.suppress(OSError):  # something of a job is in it
                self.path.rmdir()
        self._close()

    def leave(self) -> None:
        """Leave the directories to another process."""
        if self.path is not None:
            self._close()

    def _close(self) -> None:
        self._end_removals()
        fd, self._fd = self._fd, -1  # a thread may still be removing something
        os.close(fd)

    def _remove_all(self, timeout_s: float, kept: Collection[str] = ()) -> int:
        """Return how many are left."""
        deadline = time.monotonic() + timeout_s
        # A removal that takes long would hold this up, too.
        names = (self._removals.make(lambda: os.listdir(self._fd)) or []) if self.path else []
        names = [name for name in names if is_job_id(name) and name not in kept]
        names = [name for name in names if not self._keeps(name)]
        return sum(not self._remove(name, deadline) for name in names)

    def _remove(self, name: str, deadline: float) -> bool:
        """Return whether the directory is gone."""
        if self.path is None:
            return True
        is_gone = self._removals.make(lambda: self._rmdir(name))
        left_s = deadline - time.monotonic()
        if is_gone or self._clear is None or left_s <= 0:
            return bool(is_gone)
        gone = threading.Event()
        thread = threading.Thread(
            target=self._remove_in_thread, args=(name, gone), name=f"tmp-{name[:8]}", daemon=True
        )
        try:
            with self._lock:  # the thread cannot end before it is noted
                thread.start()
                self._emptying[thread] = None
        except RuntimeError:
            return False
        # Nobody waits for the removals of others.
        thread.join(0 if is_gone is None else left_s)
        return gone.is_set()

    def _rmdir(self, name: str) -> bool:
        """Remove the directory if nothing is in it; return whether it is gone."""
        try:
            os.rmdir(name, dir_fd=self._fd)
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        return True

    def _remove_in_thread(self, name: str, gone: threading.Event) -> None:
        """What a thread of its own does: set `gone` if the directory is gone."""
        try:
            # The fork server has died, or the directory belongs to none of our users.
            with contextlib.suppress(RuntimeError, OSError):
                if self._empty_and_remove(name):
                    gone.set()
        finally:
            with self._lock:
                del self._emptying[threading.current_thread()]

    def _empty_and_remove(self, name: str) -> bool:
        """Remove the directory with all that is in it; return whether it is gone."""
        if self._removals.make(lambda: self._rmdir(name), None):
            return True
        # A job cannot give its directory to another user.
        owner = os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_uid
        assert self._clear is not None  # noqa: S101 -- `_remove` has looked
        removal = Removal(*self._clear(None if self._uids is None else owner, name))
        with self._lock:
            self._emptying[threading.current_thread()] = removal
        wait_ready(removal.pidfd, select.POLLIN)
        removal.end()
        return bool(self._removals.make(lambda: self._rmdir(name), None))


def make_homes(path: str | os.PathLike[str] | None) -> Path | None:
    """Make a directory for homes: every user can pass through it, and only we can write to it.

    Returns its absolute path; None if `path` is None. Raises OSError.
    """
    if path is None:
        return None
    homes = Path(path).absolute()
    fd = _open_directory(homes, 0o711)
    owner = os.fstat(fd).st_uid
    os.close(fd)
    if owner != os.geteuid():
        problem = f"it belongs to another user; run: chown {os.geteuid()} {homes}"
        raise PermissionError(errno.EPERM, problem, str(homes))
    return homes


def _open_directory(path: Path, mode: int) -> int:
    """Make the directory if it does not exist, give it this mode and open it. Raises OSError."""
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # After a first run the directory may belong to another user, the one that the process has
        # become. Its mode is right then, and to change it would need CAP_FOWNER.
        if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
            os.fchmod(fd, mode)
    except BaseException:
        os.close(fd)
        raise
    return fd
