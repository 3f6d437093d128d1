"""The logged-out tokens, kept on the disk until they expire.

    with Revocations("state/logged-out") as revocations:
        revocations.add(token_id, expires_at)
        assert token_id in revocations

The file has mode 0600 and a line `TOKEN_ID EXPIRES_AT` for each token; the time is in seconds
since 1970. The constructor makes a missing file, and removes the lines of expired tokens.
Then the file stays open, because the process may lose the right to open it. Only one process
at a time may use the file.

Thread safety: any thread may call anything. `in` never waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

__all__ = ["RevocationError", "Revocations"]

_LINE = re.compile(r"([0-9a-f-]{36}) ([0-9]{1,12})")


class RevocationError(OSError):
    """A logout could not be recorded, so the token is still valid."""


class Revocations:
    """The logged-out tokens in the file `path`; None keeps them in memory only.

    Raises OSError; ValueError with the line if the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        # Guards the file, and the replacement of `_expiries`, which is replaced as a whole, so
        # reading it needs no lock. Held during a write to the disk, so logouts wait for each other.
        self._lock = threading.Lock()
        self._expiries: Mapping[str, int] = {}  # by token ID; in seconds since 1970
        self._fd: int | None = None  # -1 when closed: the kernel refuses it
        if path is not None:
            path = Path(path)
            self._expiries = _load(path)
            self._fd = _open_private(path, os.O_APPEND)
            _sync_directory(path.parent)

    def close(self) -> None:
        """Close the file; idempotent. A later `add` fails."""
        with self._lock:
            if self._fd is not None and self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, token_id: str) -> bool:
        return token_id in self._expiries

    def add(self, token_id: str, expires_at: datetime) -> None:
        """Revoke a token for good; idempotent. Blocks until it is on the disk.

        Raises `RevocationError`, and then the token stays valid.
        """
        with self._lock:
            if token_id in self._expiries:
                return
            expiry = int(expires_at.timestamp())
            if self._fd is not None:
                self._append_locked(self._fd, f"{token_id} {expiry}\n".encode())
            now = time.time()
            live = {each: end for each, end in self._expiries.items() if end > now}
            self._expiries = live | {token_id: expiry}

    def _append_locked(self, fd: int, line: bytes) -> None:
        size = None
        try:
            size = os.fstat(fd).st_size
            if os.write(fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301 -- treated like an error of the kernel
            os.fsync(fd)
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)  # otherwise the next line would continue this half line
            raise RevocationError(
                f"the logout cannot be recorded ({error.strerror}), so the token is still "
                "valid; tell the operator, and try again later"
            ) from error


def _load(path: Path) -> dict[str, int]:
    """Return the tokens of the file that have not expired, and remove the others from it."""
    try:
        *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    # A last line without its newline was being written when the machine went down. Nobody has had
    # a confirmation of that logout.
    expiries: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise ValueError(
                f"{path}, line {number}: not TOKEN_ID EXPIRES_AT; restore the file, or delete it "
                "and the token key with it (every token becomes invalid)"
            )
        expiries[parts[1]] = int(parts[2])
    now = time.time()
    live = {token_id: expiry for token_id, expiry in expiries.items() if expiry > now}
    if rest or len(live) < len(lines):
        new = path.with_name(f"{path.name}.new")  # it may exist from an earlier attempt
        with os.fdopen(_open_private(new, os.O_TRUNC), "w", encoding="utf-8") as file:
            file.writelines(f"{token_id} {expiry}\n" for token_id, expiry in live.items())
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    return live


def _open_private(path: Path, flag: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flag
    fd = os.open(path, flags, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def _sync_directory(path: Path) -> None:
    """Make the name of a new file survive a crash of the machine."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
