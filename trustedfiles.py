"""The files that decide who may do what: keys, certificates, the users file, the audit log.

    files = TrustedFiles({Path("certs/server-key.pem"): READ_FLAGS}, check=True)
    key = files.read(Path("certs/server-key.pem"))
    files.open_with(opener.open)               # of `fileopener.py`

The server opens these files again at SIGHUP, when it is no longer root. Then it asks a
process that still is, with the function given to `open_with`. Only files that were named at
the start can be opened.

Thread safety: `open_with` is called before there are other threads; the rest by any thread.

Source: path_resolution(7).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["READ_FLAGS", "TrustedFiles", "UntrustedFileError", "check_private"]

# Without O_NONBLOCK the opening process would wait at a FIFO.
READ_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
_MODE = 0o600


class UntrustedFileError(Exception):
    """Jobs could change or read a file; the message is the chmod command that prevents it."""


class TrustedFiles:
    """The files in `flags`, each with the flags of open(2).

    `check`: whether `read` refuses a file that `check_private` refuses.
    """

    def __init__(self, flags: Mapping[Path, int], *, check: bool) -> None:
        self.flags = {str(path.absolute()): each for path, each in flags.items()}
        self._check = check
        self._opener: Callable[[str], int] = self._open

    def open_with(self, opener: Callable[[str], int]) -> None:
        """Open files with `opener` from now on; it gets the absolute path."""
        self._opener = opener

    def open(self, path: Path) -> int:
        """Open a file and return its descriptor. Raises OSError, and KeyError for other files."""
        return self._opener(str(path.absolute()))

    def read(self, path: Path) -> bytes:
        """Return the content of a file. Raises OSError, `UntrustedFileError`."""
        if self._check:
            check_private(path)
        with open(self.open(path), "rb") as file:
            os.set_blocking(file.fileno(), True)
            return file.read()

    def _open(self, path: str) -> int:
        return os.open(path, self.flags[path] | os.O_CLOEXEC, _MODE)


def check_private(path: Path) -> None:
    """Raise `UntrustedFileError` if any user of this host could replace or change the file.

    The same for reading it, except for a certificate, which is public. Nothing is wrong
    with a file behind a directory that other users cannot enter.
    """
    public = path.suffix == ".pem" and not path.name.endswith("-key.pem")
    forbidden, remedy = (stat.S_IWOTH, "go-w") if public else (stat.S_IRWXO, "go=")
    try:
        for directory in reversed(path.resolve().parents):
            mode = directory.stat().st_mode
            if not mode & stat.S_IXOTH:
                return
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise UntrustedFileError(
                    f"jobs could replace the files in {directory}; run: chmod o-w {directory}"
                )
        if path.stat().st_mode & forbidden:
            raise UntrustedFileError(
                f"jobs could read or change {path}; run: chmod {remedy} {path}"
            )
    except (PermissionError, FileNotFoundError):
        # Denied: the directory is closed to others, of whom this process is one by now. Missing:
        # whoever reads the file will report it.
        return
