"""The directory in which a worker keeps the output of its jobs.

    with OutputDirectory("/private/dir") as directory:
        log = directory.make_log(str(uuid.uuid4()))

Thread safety: `make_log` may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from broadcaster import OutputLog
from errors import in_words
from finding import is_job_id
from finishedlog import FinishedLog
from outputdisk import OutputDisk

if TYPE_CHECKING:
    from collections.abc import Callable

    from budget import Budget
    from outputstate import OutputState

__all__ = ["OutputDirectory"]

logger = logging.getLogger(__name__)

_OUTPUT_SUFFIX = ".out"
_SUFFIXES = {_OUTPUT_SUFFIX, f"{_OUTPUT_SUFFIX}.times", f"{_OUTPUT_SUFFIX}.gap"}

_LOOK_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# The reserve of a disk unless one is given: the smaller of the two.
_RESERVE_SHARE = 0.05
_RESERVE_BYTES = 1024 * 1024 * 1024


class OutputDirectory:
    """A private directory for output logs, ours alone (flock) until closed. A context manager.

    `path`: made with mode 0700 if it does not exist; None for a temporary directory. `keeps`:
    returns whether the job of an ID is kept; None means that no job is. Output of other jobs that
    is in the directory is deleted. `lasting`: another process can continue the output of this one.
    `reserve_bytes`: how much of the disk stays free; None for 5 % of the disk or 1 GiB, whichever
    is less. `uids`: the uids of jobs, none of which may own the directory. Raises BlockingIOError
    if another worker has the directory, PermissionError if other users own it or can enter it,
    OSError. Attribute: `path`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        reserve_bytes: int | None = None,
        uids: range | None = None,
        lasting: bool = False,
        keeps: Callable[[str], bool] | None = None,
    ) -> None:
        self._lasting = lasting
        self._keeps = keeps or (lambda _: False)
        self._temporary = path is None
        self.path = Path(tempfile.mkdtemp(prefix="job-worker-") if path is None else path)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status, above = self.path.stat(), self.path.resolve().parent.stat()
        # A worker that has changed its user has given the directory to that user, so the owner may
        # be another user. But if others can make directories in the parent, anybody may have made
        # this one.
        is_open = above.st_mode & 0o022 or status.st_uid in (uids or ())
        if status.st_uid not in (0, os.geteuid()) and is_open:
            raise PermissionError(
                errno.EPERM,
                f"it belongs to uid {status.st_uid}; remove it, or use another place",
                str(self.path),
            )
        if status.st_mode & 0o077:
            raise PermissionError(
                errno.EPERM, f"others can enter it; run: chmod 700 {self.path}", str(self.path)
            )
        # The directory is used through this descriptor only, which works even if the process
        # has lost the right to walk the path. Locked as long as it is open.
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                "another worker keeps its output here; choose another directory",
                str(self.path),
            ) from None
        if reserve_bytes is None:
            disk = os.fstatvfs(self._fd)
            share = int(disk.f_blocks * disk.f_frsize * _RESERVE_SHARE)
            reserve_bytes = min(share, _RESERVE_BYTES)
        self._disk = OutputDisk(self.path, reserve_bytes)
        self.sweep()

    def make_log(self, job_id: str) -> OutputLog:
        """Make the output log of a job, whose ID is a UUID. Raises OSError."""
        log = OutputLog(f"{job_id}{_OUTPUT_SUFFIX}", dir_fd=self._fd, lasting=self._lasting)
        log.disk = self._disk
        return log

    def open_log(self, job_id: str, state: OutputState, budget: Budget) -> OutputLog:
        """Return the output log of a job that has ended."""
        name = f"{job_id}{_OUTPUT_SUFFIX}"
        return FinishedLog(name, state, dir_fd=self._fd, budget=budget)

    def left_by(self, job_id: str) -> OutputState:
        """Return the state of an output that another process has begun and not completed."""
        log = self.resume_log(job_id)
        log.complete()
        return log.state()._replace(taken=log.size)

    def resume_log(self, job_id: str) -> OutputLog:
        """Continue the output log of a job of another process; make one if its file is missing.

        Raises OSError.
        """
        name = f"{job_id}{_OUTPUT_SUFFIX}"
        try:
            log = OutputLog(name, dir_fd=self._fd, lasting=True, resumed=True)
        except FileNotFoundError:
            # Somebody has deleted it, or restored the store without the output.
            logger.warning("job %s: the file of its output is missing", job_id)
            return self.make_log(job_id)
        log.disk = self._disk
        return log

    def give_to(self, uid: int) -> None:
        """Let the user `uid` keep output here, and read what is here. Raises OSError."""
        os.fchown(self._fd, uid, uid)
        for name in os.listdir(self._fd):
            try:
                fd = os.open(name, _LOOK_FLAGS, dir_fd=self._fd)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
                    continue
                raise
            try:
                status = os.fstat(fd)
                # A former owner may have made a second name of somebody else's file here.
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                    os.fchown(fd, uid, uid)
            finally:
                os.close(fd)

    def leave(self) -> None:
        """Leave the output to another process."""
        os.close(self._fd)

    def close(self) -> None:
        """Delete the output of jobs that are not kept, and the directory if it is temporary."""
        try:
            self.sweep()
        except OSError as error:  # the disk may have become read-only
            logger.error("output of jobs stays in %s: %s", self.path, in_words(error))
        if self._temporary:
            with contextlib.suppress(OSError):  # somebody else put something in it
                self.path.rmdir()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sweep(self) -> None:
        """Delete all output except that of kept jobs. Raises OSError."""
        for name in os.listdir(self._fd):
            job_id, _, suffix = name.partition(".")
            if f".{suffix}" in _SUFFIXES and is_job_id(job_id) and not self._keeps(job_id):
                os.unlink(name, dir_fd=self._fd)
