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
import os
import stat

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["locked", "replace_file"]


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
