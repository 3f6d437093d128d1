"""The gap of an output in a file beside it, so that another process can continue the output.

    file = LastingGap("/private/dir/job.out.gap", None, lasting=True)
    file.write((4096, 8192), OSError(errno.ENOSPC, "No space left on device"), fd, 8192)
    gap, cause = file.read(output_size)

The file is made when the output gets a gap. If it cannot be written, the log has a line. An empty
file, which a full disk leaves, then tells that bytes are missing, but not how many.

Thread safety: for the one writer of an output.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os

__all__ = ["LastingGap"]

logger = logging.getLogger(__name__)

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BYTES = 512  # the text is padded to so many, so that a shorter one replaces a longer one whole


class LastingGap:
    """`path`, `dir_fd`: of the file. `lasting`: False if the output never has such a file.

    Attribute: `exists`, whether the file is there.
    """

    def __init__(self, path: str, dir_fd: int | None, *, lasting: bool) -> None:
        self._path = path
        self._dir_fd = dir_fd
        self._lasting = lasting
        self.exists = False
        self._has_failed = False

    def write(
        self, gap: tuple[int, int], cause: OSError | None, output_fd: int, output_end: int
    ) -> None:
        """Note where the gap begins and ends, and why there is one. Never raises.

        `output_end`: where the output will end; the file of the output gets that size, which takes
        no room.
        """
        if not self._lasting:
            return
        fields = [*gap, cause.errno if cause else 0, str(cause.strerror)[:80] if cause else ""]
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | _FLAGS, 0o600, dir_fd=self._dir_fd)
            self.exists = True
            try:
                os.pwrite(fd, json.dumps(fields).encode().ljust(_BYTES), 0)
                if output_end > os.fstat(output_fd).st_size:
                    os.ftruncate(output_fd, output_end)
            finally:
                os.close(fd)
        except OSError as error:
            if not self._has_failed:
                logger.warning("%s: %s", self._path, error.strerror)
            self._has_failed = True

    def read(self, output_size: int) -> tuple[tuple[int, int], OSError | None]:
        """Return where the gap begins and ends, and its cause; (0, 0) and None if there is none.

        A gap that could not be noted or read is returned as one byte after the output.
        """
        try:
            fd = os.open(self._path, os.O_RDONLY | _FLAGS, dir_fd=self._dir_fd)
        except FileNotFoundError:
            return (0, 0), None
        except OSError as error:  # not what was written here
            return (output_size, output_size + 1), error
        self.exists = True
        try:
            begin, end, number, reason = json.loads(os.pread(fd, _BYTES, 0))
        except ValueError:
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return (output_size, output_size + 1), cause
        finally:
            os.close(fd)
        return (begin, end), OSError(number, reason)

    def remove(self) -> None:
        """Delete the file, if there is one. Raises OSError."""
        if self.exists:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path, dir_fd=self._dir_fd)
