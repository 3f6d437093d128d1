"""The disk that holds output: how much of it stays free, and what the log says when it is full.

    disk = OutputDisk("/private/dir", reserve_bytes=1 << 30)
    disk.check(fd, 4096)
    os.write(fd, bytes(4096))
    if disk.is_full:
        disk.accepted(fd)

Thread safety: every method may be called from any thread.
"""

from __future__ import annotations

import errno
import logging
import os
import threading

__all__ = ["DISK_FULL", "OutputDisk"]

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The errors of a full disk; EDQUOT is that of the disk's own quotas."""

# A disk on which a little less than this is free is still called full. Otherwise small writes
# that succeed between large ones that fail would fill the log.
_ROOM_BYTES = 4 * 1024 * 1024


class OutputDisk:
    """The disk of one directory. `reserve_bytes`: how much of it stays free.

    Attribute: `is_full`, whether it has refused output and has not had room since.
    """

    def __init__(self, path: str | os.PathLike[str], reserve_bytes: int) -> None:
        self._path = os.fspath(path)
        self._reserve_bytes = reserve_bytes
        # Guards the two below; `is_full` may be read without it. Never held during I/O.
        self._lock = threading.Lock()
        self.is_full = False
        self._lost_bytes = 0  # since it is full

    def check(self, fd: int, size: int) -> None:
        """Raise OSError (ENOSPC) if a file cannot grow by `size` without using the reserve."""
        if not self._reserve_bytes:
            return
        disk = os.fstatvfs(fd)  # as in `accepted`; a shared function would slow down each write
        if disk.f_bavail * disk.f_frsize - size < self._reserve_bytes:
            raise OSError(
                errno.ENOSPC, f"the disk is full up to its reserve of {self._reserve_bytes} bytes"
            )

    def refused(self, error: OSError, lost_bytes: int) -> None:
        """Note that `lost_bytes` are not kept because of `error`; log the first such error."""
        with self._lock:
            was_full, self.is_full = self.is_full, True
            self._lost_bytes += lost_bytes
        if not was_full:
            logger.warning(
                "output in %s cannot be kept any more: %s; make room there. Until then each job "
                "keeps the beginning and the latest part of its output",
                self._path,
                error.strerror,
            )

    def accepted(self, fd: int) -> None:
        """Note that a file has grown although the disk `is_full`; log it if there is room again."""
        disk = os.fstatvfs(fd)
        if disk.f_bavail * disk.f_frsize < self._reserve_bytes + _ROOM_BYTES:
            return
        with self._lock:
            was_full, self.is_full = self.is_full, False
            lost_bytes, self._lost_bytes = self._lost_bytes, 0
        if was_full:
            logger.warning(
                "output in %s is kept again; meanwhile %d bytes were not", self._path, lost_bytes
            )
