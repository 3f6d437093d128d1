"""The tokens that were logged out, on the disk until they expire.

    with Revocations("state/revoked") as revocations:
        revocations.add(token_id, expires_at)
        assert token_id in revocations

The file has a line `TOKEN_ID EXPIRES_AT` for each, in seconds since 1970, and mode 0600.
It is made when there is none, and loses the lines that have expired; then it is kept
open, so that nothing is opened after the process has given up its rights. One process
at a time may use it.

Thread safety: everything may be called from any thread. Reading never waits.
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
    """A logout could not be recorded, so it did not happen: the token is still valid."""


class Revocations:
    """Those in the file `path`; None for in memory only.

    Raises OSError; ValueError that names the line when the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        # Guards the file and the writing of `_expiries`, which is replaced as a whole, so
        # that reading it needs no lock. Held during a write to the disk: logouts queue.
        self._lock = threading.Lock()
        self._expiries: Mapping[str, int] = {}  # by token ID; in seconds since 1970
        self._fd: int | None = None  # -1 when closed, and so refused by the kernel
        if path is not None:
            path = Path(path)
            self._expiries = _load(path)
            self._fd = _open_private(path, os.O_APPEND)
            _sync_directory(path.parent)

    def close(self) -> None:
        """Close the file; after that `add` fails. Idempotent."""
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
        """Revoke a token, for good when this returns; idempotent. Blocks for the disk.

        Raises `RevocationError`, and then nothing has changed.
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
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301 -- like the kernel's
            os.fsync(fd)
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)  # or the next line would end a half one
            raise RevocationError(
                f"the logout cannot be recorded ({error.strerror}), so the token is still "
                "valid; tell the operator, and try again later"
            ) from error


def _load(path: Path) -> dict[str, int]:
    """Return what has not expired of the file, if there is one, and leave no more in it."""
    try:
        *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    # Without its newline the last line was being written when the machine went down: that
    # logout has not been confirmed to anybody.
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
        new = path.with_name(f"{path.name}.new")  # of an earlier try, maybe
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
    """Make sure that the file of a new name is there after a crash."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
