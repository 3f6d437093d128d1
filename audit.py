"""The audit log: one line of JSON for every decision, in a file that is only appended to.

    log = AuditLog(lambda: os.open("audit.log", AUDIT_FLAGS, 0o600))
    log.record(peer="ipv4:192.0.2.7:40112", user="alice", rpc="StartJob", argv=["ls", "/"])

writes `{"time": "2026-11-24T00:01:15.123456+00:00", "peer": ..., "argv": ["ls", "/"]}`.

A line is pure printable ASCII: whatever a user puts into a name or an argument, it
neither ends the line nor reaches a terminal as a control character. Nothing is cut off.
An escaped character takes up to six times its bytes, so that a line with an argv of 128
KiB can get 768 KiB long.

A record is in the kernel when `record` returns: it survives the end of this process, not
that of the machine. If the disk fills up in the middle of a record, its beginning stays
in the file, on a line of its own that is not JSON; it counts as lost.

To rotate: rename the file, then call `reopen`. Until then records go to the renamed file.

Thread safety: everything may be called from any thread. The lines are in the order of
their times (as long as nobody sets the clock back).

Sources: write(2) (O_APPEND, short writes), RFC 8259 (JSON), RFC 3339 (the time).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["AUDIT_FLAGS", "AuditError", "AuditLog"]

logger = logging.getLogger(__name__)

# How to open the file. It is read only to find out whether it ends with a whole line.
# O_NONBLOCK: what is not a file is refused, instead of waited for.
AUDIT_FLAGS: Final = (
    os.O_RDWR
    | os.O_APPEND
    | os.O_CREAT
    | os.O_CLOEXEC
    | os.O_NOFOLLOW
    | os.O_NOCTTY
    | os.O_NONBLOCK
)
_MODE = 0o600
_CLOSED_FD = -1
# What open(2) with these flags says of links, directories, sockets.
_NOT_REGULAR = (errno.ELOOP, errno.EISDIR, errno.ENXIO)


class AuditError(OSError):
    """The audit log cannot be opened or written; the message says what to do."""


class AuditLog:
    """An audit log in the file that `open_file` opens: a context manager, which closes it.

    `open_file` is called at once and by `reopen`. It opens the file with `AUDIT_FLAGS`, and
    makes it with mode 0600; the descriptor belongs to the log from then on. The file must be
    a regular one that belongs to the user who makes the log (whoever that is later) and
    that nobody else may read or write.

    With `required` a record that cannot be written is an error; without, it is lost, and the
    log of this program says so.

    Raises `AuditError` if it cannot be opened or is not such a file.
    """

    def __init__(self, open_file: Callable[[], int], *, required: bool = False) -> None:
        self._open_file = open_file
        self._required = required
        self._owner = os.geteuid()
        # Guards what follows, and that a record is written whole to one file. It is held
        # while the file is opened, so that no record comes between its being looked at
        # and its use; never held while something is logged.
        self._lock = threading.Lock()
        self._fd, self._torn = self._open()  # torn: the file ends within a line
        self._lost = 0  # records since the last one that could be written
        self._closed = False

    def record(self, **fields: str | int | Sequence[str] | None) -> None:
        """Write one line: `time` (UTC, microseconds), then the fields in the order given.

        Blocks as long as the disk does. A failure is logged as an ERROR once, and as an INFO
        with the number of lost records when it is over.

        Raises `AuditError` if the record could not be written and must be.
        """
        with self._lock:
            time = datetime.now(UTC).isoformat(timespec="microseconds")
            line = json.dumps({"time": time, **fields}).encode("ascii") + b"\n"
            problem = self._write_locked(line)
            if problem:
                self._lost += 1
                lost = self._lost
            else:
                lost, self._lost = self._lost, 0
        if problem and lost == 1:
            logger.error(
                "the audit log cannot be written: %s; %s until it can be. Make room for it, or "
                "move it to another disk and send SIGHUP",
                problem,
                "calls are refused" if self._required else "records are lost",
            )
        if not problem and lost:
            logger.info("the audit log can be written again; lost in between: %d records", lost)
        if problem and self._required:
            raise AuditError(
                f"the audit log cannot be written ({problem}), and without it nothing is done; "
                "make room for it, or move it to another disk and send SIGHUP"
            )

    def _write_locked(self, line: bytes) -> str:
        """Write a line; return why it could not be written, "" if it was."""
        data = b"\n" + line if self._torn else line
        try:
            # One call: what another process appends to the file does not get in between.
            written = os.write(self._fd, data)
        except OSError as error:
            return os.strerror(error.errno or 0)
        if written:
            self._torn = not data[:written].endswith(b"\n")
        if written < len(data):  # the kernel does not say why
            return "only the beginning of a record could be written; is the disk full?"
        return ""

    def reopen(self) -> None:
        """Go on in the file that has the name now, without losing a record.

        If it cannot be opened, that is logged and the old one stays in use. Never raises.
        """
        try:
            with self._lock:
                if self._closed:
                    return
                fd, torn = self._open()
                old, self._fd, self._torn = self._fd, fd, torn
        except Exception as error:  # noqa: BLE001 -- whatever the opener's fault is, the log goes on
            logger.error("the audit log stays in the old file: %s", error)
            return
        with contextlib.suppress(OSError):  # an old file that is not well is not in use any more
            os.close(old)
        logger.info("the audit log was reopened")

    def close(self) -> None:
        """Close the file; idempotent. A record that comes later is one that cannot be written."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            old, self._fd = self._fd, _CLOSED_FD
        os.close(old)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> tuple[int, bool]:
        """Return the descriptor, and whether the file ends within a line."""
        try:
            fd = self._open_file()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            if error.errno in _NOT_REGULAR:
                reason = "it is not a regular file"
            where = f" {error.filename}" if error.filename else ""
            raise AuditError(f"the audit log{where} cannot be opened: {reason}") from error
        try:
            self._check(fd)
            size = os.fstat(fd).st_size
            return fd, size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        except BaseException:
            os.close(fd)
            raise

    def _check(self, fd: int) -> None:
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise AuditError("the audit log cannot be opened: it is not a regular file")
        if status.st_uid != self._owner:
            raise AuditError(
                f"the audit log belongs to uid {status.st_uid}, who could change it; "
                f"chown it to {self._owner}, or name another file"
            )
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise AuditError(
                f"others may read or write the audit log (mode {mode:04o}); "
                "chmod 600 it, or name another file"
            )
        if mode != _MODE:  # made under an umask that takes away our own rights
            with contextlib.suppress(OSError):
                os.fchmod(fd, _MODE)
