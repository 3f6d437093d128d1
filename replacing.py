"""Small files that several processes change: locked for the change, and replaced at once.

    with locked(path.parent):
        content = change(path.read_bytes())
        replace_file(path, content)

A reader needs no lock: it sees the old content or the new one.

Thread safety: any thread may call anything.

Source: flock(2), rename(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MOST_BYTES", "locked", "read_small", "replace_file"]

MOST_BYTES = 4 << 20
"""So much of a small file, or of a line, is read: /dev/zero has no end."""


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold back all others that lock this directory. Blocks while one of them has it.

    Raises OSError.
    """
    import fcntl  # an argument error of the client does without it

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def read_small(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a file. Raises OSError, also if there is more than `MOST_BYTES`."""
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), os.fspath(path))
    return content


def replace_file(
    path: str | os.PathLike[str], content: bytes, *, keeps_rights: bool = False
) -> None:
    """Put a new file in the place of `path`, or make it. A link is replaced, not followed.

    The file is on the disk when this returns. Its mode is 0600; with `keeps_rights` it has the
    owner, group and mode of the file that it replaces. After an error all is as before. Raises
    OSError.
    """
    import tempfile

    fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".")
    try:
        with os.fdopen(fd, "wb") as file:
            if keeps_rights:
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    os.fchown(fd, status.st_uid, status.st_gid)
                    os.fchmod(fd, stat.S_IMODE(status.st_mode))
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
