"""The files that decide who may do what: keys, certificates, the users file, the program itself.

    check(Path("state"))                       # could anybody else replace or change it?
    fd = open_private(Path("state/token.key"), os.O_RDONLY)

    files = TrustedFiles({Path("certs/server-key.pem"): READ_FLAGS}, private=True)
    key = files.read(Path("certs/server-key.pem"))
    files.open_with(opener.open)               # of `fileopener.py`

*Trusted* are four users: root, the user of this process, the owner of this program, and the owner
of the directory / (who is not root in a user namespace). A file is trusted if it, each directory
above it and each link on the way belong to one of them, and if nobody else may write there. In a
directory with the sticky bit, like /tmp, nobody can replace what belongs to others.

A `TrustedFiles` checks a file each time that it reads the file. The server reads some files
again at SIGHUP, when it is no longer root. Then it asks a process that still is, with the
function given to `open_with`. Only files that were named at the start can be opened.

Thread safety: `open_with` is called before there are other threads; the rest by any thread.

Source: path_resolution(7), inode(7).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "PROGRAM_OWNER",
    "READ_FLAGS",
    "TrustedFiles",
    "UntrustedFileError",
    "check",
    "check_code",
    "open_private",
]

# Without O_NONBLOCK the opening process would wait at a FIFO.
READ_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
_MODE = 0o600
_MOST_LINKS = 40  # the kernel follows no more

_HERE = Path(__file__).resolve().parent
PROGRAM_OWNER: Final = os.stat(__file__).st_uid
# Fixed now: when the process has become another user, root's files are still the ones to trust.
_OWNERS = {0, os.geteuid(), PROGRAM_OWNER, os.stat("/").st_uid}


class UntrustedFileError(Exception):
    """Somebody else could change or read a file; the message has the command that prevents it."""


class TrustedFiles:
    """The files in `flags`, each with the flags of open(2).

    `private`: whether jobs run as other users, so that files which everybody can read are refused.
    """

    def __init__(self, flags: Mapping[Path, int], *, private: bool) -> None:
        self.flags = {str(path.absolute()): each for path, each in flags.items()}
        self._private = private
        self._opener: Callable[[str], int] = self._open

    def open_with(self, opener: Callable[[str], int]) -> None:
        """Open files with `opener` from now on; it gets the absolute path."""
        self._opener = opener

    def open(self, path: Path) -> int:
        """Open a file and return its descriptor.

        Raises OSError, `UntrustedFileError`, and KeyError for other files.
        """
        name = str(path.absolute())
        # Only the audit log is written. In Ubuntu a group may write to /var/log.
        is_log = self.flags[name] & os.O_ACCMODE != os.O_RDONLY
        check(path, private=self._private, groups=not is_log)
        return self._opener(name)

    def read(self, path: Path) -> bytes:
        """Return the content of a file. Raises OSError, `UntrustedFileError`."""
        fd = self.open(path)
        try:
            _check_opened(path, os.fstat(fd))
        except UntrustedFileError:
            os.close(fd)
            raise
        with open(fd, "rb") as file:
            os.set_blocking(fd, True)
            return file.read()

    def _open(self, path: str) -> int:
        return os.open(path, self.flags[path] | os.O_CLOEXEC, _MODE)


def open_private(path: Path, flags: int, *, secret: bool = True) -> int:
    """Open a file that only we may change, and return its descriptor; a new one gets mode 0600.

    `secret`: refuse a file that others can read, too. Raises OSError; `UntrustedFileError` also for
    what is not a regular file.
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags, _MODE)
    except OSError as error:
        # The errors for a link, a directory, and a FIFO or socket.
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _irregular(path) from error
        raise
    try:
        _check_opened(path, os.fstat(fd), private=True, secret=secret)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check(
    path: Path,
    *,
    private: bool = False,
    known: set[str] | None = None,
    owner: int | None = None,
    groups: bool = True,
) -> None:
    """Raise `UntrustedFileError` for a FIFO, and if somebody else could replace or change the file.

    `private`: the same for reading it, except for a certificate, which is public. The modes of
    what is behind a directory that others cannot enter do not matter. `known`: paths that need no
    check; those that were checked are added. `owner`: one more user to whom it may belong, but not
    what is on the way to it. `groups`: whether a group must not be able to, either.
    """
    public = path.suffix == ".pem" and not path.name.endswith("-key.pem")
    unreadable = stat.S_IROTH | stat.S_IXOTH if private and not public else 0
    known = set() if known is None else known
    writers = stat.S_IWOTH | (stat.S_IWGRP if groups else 0)
    owned = None if owner is None else os.path.realpath(path)
    try:
        for each, status in _steps(path):
            if each not in known:
                if status.st_uid != owner or each != owned:
                    _check_owner(each, status)
                if stat.S_ISFIFO(status.st_mode):  # whoever opens it may wait for ever
                    raise _irregular(path)
                if not stat.S_ISLNK(status.st_mode):
                    _check_mode(each, status, writers, unreadable)
                known.add(each)
            if stat.S_ISDIR(status.st_mode):
                if not status.st_mode & stat.S_IXOTH:
                    writers &= ~stat.S_IWOTH
                    unreadable = 0
                if not status.st_mode & stat.S_IXGRP:
                    writers &= ~stat.S_IWGRP
    except (PermissionError, FileNotFoundError):
        # Denied: the directory is closed to others, of whom this process is one by now. Missing:
        # whoever reads the file will report it.
        return


def check_code() -> None:
    """Check all code of this program: its own files, what Python has loaded, and Python itself.

    Raises `UntrustedFileError`.
    """
    known: set[str] = set()
    for path in _code():
        check(path, known=known)


def _code() -> Iterator[Path]:
    for pattern in ("*.py", "__pycache__/*.pyc", "server"):
        yield from _HERE.glob(pattern)
    executable = Path(sys.executable)
    yield executable
    yield executable.parent.parent / "pyvenv.cfg"
    if places := os.environ.get("LD_LIBRARY_PATH"):  # of libraries that are loaded later, too
        yield from map(Path, places.replace(";", ":").split(":"))
    for entry in sys.path:  # "": the present directory
        yield Path(entry)
        yield from Path(entry).glob("*.pth")  # Python executes lines of these
    for module in tuple(sys.modules.values()):
        for name in ("__file__", "__cached__"):
            with contextlib.suppress(Exception):  # a module may define any __getattr__
                yield Path(getattr(module, name))
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, _, path = line.partition("/")
        if path and not path.endswith(" (deleted)"):
            yield Path(f"/{path}")


def _steps(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield every directory and link on the way to the file, from / on, and then the file."""
    yield "/", os.stat("/")
    here, left, links = "/", [*reversed(path.absolute().parts[1:])], 0
    while left:
        name = left.pop()
        if name == "..":
            here = os.path.dirname(here)
            continue
        step = os.path.join(here, name)
        status = os.lstat(step)
        yield step, status
        if not stat.S_ISLNK(status.st_mode):
            here = step
            continue
        links += 1
        if links > _MOST_LINKS:
            raise FileNotFoundError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = os.readlink(step)
        if target.startswith("/"):
            here = "/"
        left += [part for part in reversed(target.split("/")) if part not in ("", ".")]


def _check_owner(path: str | Path, status: os.stat_result) -> None:
    if status.st_uid not in _OWNERS:
        raise UntrustedFileError(
            f"{path} belongs to uid {status.st_uid}, who could change it and what is in it; "
            f"run: chown {os.geteuid()} {path}, or use another place"
        )


def _check_mode(path: str, status: os.stat_result, writers: int, unreadable: int) -> None:
    mode = status.st_mode
    # The group that many systems make for each user has no other member.
    if status.st_gid == status.st_uid != 0:
        writers &= ~stat.S_IWGRP
    if stat.S_ISDIR(mode):
        if mode & writers and not mode & stat.S_ISVTX:
            whose = "o-w" if mode & writers & stat.S_IWOTH else "g-w"
            raise UntrustedFileError(
                f"jobs or other users could replace the files in {path}; run: chmod {whose} {path}"
            )
    elif mode & (writers | unreadable):
        remedy = "go=" if unreadable else "go-w"
        raise UntrustedFileError(f"jobs could read or change {path}; run: chmod {remedy} {path}")


def _check_opened(
    path: Path, status: os.stat_result, *, private: bool = False, secret: bool = False
) -> None:
    """Check the file that was opened, whatever has its name now."""
    if not stat.S_ISREG(status.st_mode):
        raise _irregular(path)
    _check_owner(path, status)
    others = stat.S_IWGRP | stat.S_IWOTH if private else 0
    if secret:
        others = stat.S_IRWXG | stat.S_IRWXO
    if status.st_mode & others:
        raise UntrustedFileError(f"other users may read or change {path}; run: chmod 600 {path}")


def _irregular(path: Path) -> UntrustedFileError:
    return UntrustedFileError(f"{path} is not a regular file; remove it, or use another place")
