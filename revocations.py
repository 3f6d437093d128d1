"""The logged-out tokens, kept on the disk until they end; and the time that decides when they end.

    with RunningTime("state/running-time") as running:
        with Revocations("state/logged-out", running) as revocations:
            revocations.add(token_id, ends_s)
            assert token_id in revocations

The clock of a machine can be wrong and is set forward and back. If revoked tokens were forgotten
by that clock, a step forward and back would make them valid again. So a token also ends by the
*running time*: for how many seconds the server has run, over all its starts. It never goes back
while the server runs. After a crash it may go on from an earlier value; tokens and revocations then
end later by the same time.

The file of revocations has mode 0600 and a line `TOKEN_ID ENDS_S` for each token; the second is a
running time. The constructor makes a missing file, and removes the lines of tokens that have
ended. Then the file stays open, because the process may lose the right to open it. Only one process
at a time may use the files.

Thread safety: any thread may call anything. `in` and `RunningTime.now_s` never wait.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from trustedfiles import open_private

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RevocationError", "Revocations", "RunningTime"]

logger = logging.getLogger(__name__)

_LINE = re.compile(r"([0-9a-f-]{36}) ([0-9]{1,12})")
_SECONDS = re.compile(rb"([0-9]{12})\n")


class RevocationError(OSError):
    """The record of logouts is closed, so the token is still valid."""


class RunningTime:
    """The running time, kept in the file `path`; None keeps it in memory only.

    `clock`: returns seconds, and never goes back. Raises OSError, `UntrustedFileError`; ValueError
    if the file is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._clock = clock
        self._fd: int | None = None  # -1 when closed: the kernel refuses it
        before_s = 0
        if path is not None:
            self._fd = open_private(Path(path), os.O_RDWR | os.O_CREAT)
            data = os.pread(self._fd, 64, 0)
            match = _SECONDS.fullmatch(data)
            if data and not match:
                os.close(self._fd)
                raise ValueError(
                    f"{path} is not the server's running time, 12 digits; restore the file, or "
                    "delete it and the token key with it (every token becomes invalid)"
                )
            before_s = int(match[1]) if match else 0
        self._origin_s = clock() - before_s

    def now_s(self) -> int:
        """Return the running time in seconds."""
        return int(self._clock() - self._origin_s)

    def save(self) -> None:
        """Write the running time to the file. A failure is logged; the next call tries again."""
        if self._fd is None:
            return
        try:
            os.pwrite(self._fd, b"%012d\n" % self.now_s(), 0)
        except OSError as error:
            logger.warning("the running time cannot be written: %s", error.strerror)

    def close(self) -> None:
        """Save, and close the file; idempotent."""
        if self._fd is not None and self._fd >= 0:
            self.save()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Revocations:
    """The logged-out tokens in the file `path`; None keeps them in memory only.

    `running`: the running time of the server; None for one that begins now. Raises
    OSError, `UntrustedFileError`; ValueError with the line if the file is damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, running: RunningTime | None = None
    ) -> None:
        self._running = running or RunningTime()
        # Guards all below. Held during a write to the disk, so logouts wait for each other. Reading
        # `_ends` needs no lock.
        self._lock = threading.Lock()
        self._ends: dict[str, int] = {}  # by token ID
        self._unwritten = b""  # lines that the disk had no room for
        self._fd: int | None = None  # -1 when closed: the kernel refuses it
        if path is not None:
            path = Path(path)
            self._ends = _load(path, self._running.now_s())
            self._fd = _open(path, os.O_APPEND)
            _sync_directory(path.parent)
        # The same tokens, so that those that have ended are found without a search.
        self._by_end = [(ends_s, token_id) for token_id, ends_s in self._ends.items()]
        heapq.heapify(self._by_end)

    def close(self) -> None:
        """Close the file; idempotent. A later `add` fails."""
        with self._lock:
            if self._fd is not None and self._fd >= 0:
                self._write_locked(self._fd)
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, token_id: str) -> bool:
        return token_id in self._ends

    def add(self, token_id: str, ends_s: int) -> None:
        """Revoke a token for good; idempotent. Blocks until it is on the disk.

        `ends_s`: the running time at which the token ends anyway. If the disk cannot be written,
        the token is revoked nevertheless, an error is logged, and the next `add` or `write` tries
        again. Raises `RevocationError` after `close`.
        """
        with self._lock:
            if self._fd == -1:
                raise RevocationError(
                    errno.EBADF, "the server is shutting down; the token is still valid"
                )
            if token_id in self._ends:
                return
            self._ends[token_id] = ends_s
            heapq.heappush(self._by_end, (ends_s, token_id))
            now_s = self._running.now_s()
            while self._by_end[0][0] <= now_s:
                del self._ends[heapq.heappop(self._by_end)[1]]
                if not self._by_end:
                    break
            if self._fd is not None:
                self._unwritten += f"{token_id} {ends_s}\n".encode()
                self._write_locked(self._fd)
        self._running.save()

    def write(self) -> None:
        """Write what could not be written before, if anything; an error is logged again."""
        with self._lock:
            if self._fd is not None and self._fd >= 0:
                self._write_locked(self._fd)

    def _write_locked(self, fd: int) -> None:
        if not self._unwritten:
            return
        size = None
        try:
            size = os.fstat(fd).st_size
            if os.write(fd, self._unwritten) < len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301 -- treated like an error of the kernel
            os.fsync(fd)
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)  # otherwise the next line would continue this half line
            logger.critical(
                "%d LOGOUTS ARE NOT ON THE DISK: %s. The tokens are invalid until the server "
                "restarts, and then valid again. Make room on the disk of the state directory, "
                "and send SIGHUP",
                self._unwritten.count(b"\n"),
                error.strerror,
            )
        else:
            self._unwritten = b""


def _load(path: Path, now_s: int) -> dict[str, int]:
    """Return the tokens of the file that have not ended, and remove the others from it."""
    try:
        fd = open_private(path, os.O_RDWR, secret=False)
    except FileNotFoundError:
        return {}
    with open(fd, "rb") as file:
        data = file.read()
        *lines, rest = data.decode(errors="replace").split("\n")
        ends: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            parts = _LINE.fullmatch(line)
            if parts is None:
                raise ValueError(
                    f"{path}, line {number}: not TOKEN_ID ENDS_S; restore the file, or delete it "
                    "and the token key with it (every token becomes invalid)"
                )
            ends[parts[1]] = int(parts[2])
        if rest:
            # This line was being written when the machine went down. Nobody has had a
            # confirmation of that logout.
            os.ftruncate(fd, data.rindex(b"\n") + 1 if b"\n" in data else 0)
    live = {token_id: ends_s for token_id, ends_s in ends.items() if ends_s > now_s}
    if len(live) < len(lines):
        _replace(path, live)
    return live


def _replace(path: Path, ends: dict[str, int]) -> None:
    """Write the file anew. On a full disk it stays as it is, longer than it need be."""
    new = path.with_name(f"{path.name}.new")  # it may exist from an earlier attempt
    try:
        with os.fdopen(_open(new, os.O_TRUNC), "w", encoding="utf-8") as file:
            file.writelines(f"{token_id} {ends_s}\n" for token_id, ends_s in ends.items())
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        logger.warning(
            "%s keeps tokens that have ended, because it cannot be written anew: %s",
            path,
            error.strerror,
        )
        with contextlib.suppress(OSError):
            new.unlink()


def _open(path: Path, flag: int) -> int:
    fd = open_private(path, os.O_WRONLY | os.O_CREAT | flag, secret=False)
    os.fchmod(fd, 0o600)
    return fd


def _sync_directory(path: Path) -> None:
    """Make the name of a new file survive a crash of the machine."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
