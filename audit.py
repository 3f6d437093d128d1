"""The audit log: one line of JSON for every decision, in a file that only grows, or in a stream.

    log = AuditLog(lambda: os.open("audit.log", AUDIT_FLAGS, 0o600))
    log.record(peer="ipv4:192.0.2.7:40112", user="alice", rpc="StartJob", argv=["ls", "/"])

writes `{"time": "2026-11-24T00:01:15.123456+00:00", "peer": ..., "argv": ["ls", "/"]}`.

A line is printable ASCII. A name or argument, whatever it contains, cannot end the line, and
cannot send a control character to a terminal. Nothing is cut off. An escaped character takes
up to six bytes for one, so the line for an argv of 128 KiB can have 768 KiB.

When `record` returns, the kernel has the record: it survives the end of this process, but
not that of the machine. If the disk is full in the middle of a record, its beginning stays in
the file, in a line of its own that is not JSON. Such a record counts as lost.

A stream (`Stream`) is this process's stdout, or its connection to systemd's journal. Nobody tells
the log whether what reads a stream has kept a line.

To rotate the log, rename the file, then call `reopen`. Records go to the renamed file until
then.

Thread safety: any thread may call anything. The lines are in the order of their times,
unless somebody sets the clock back.

Sources: write(2) (O_APPEND, short writes), RFC 8259 (JSON), RFC 3339 (the time); systemd.exec(5)
(JOURNAL_STREAM), sd-daemon(3) (priorities).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Self

from errors import in_words
from standardstreams import is_journal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["AUDIT_FLAGS", "JOURNAL", "STDOUT", "AuditError", "AuditLog", "Stream", "stream_named"]

logger = logging.getLogger(__name__)

# The flags of open(2) for the file. The log reads only its end, to see whether a line is complete.
# O_NONBLOCK: a FIFO is refused at once; without the flag open(2) would wait for its other end.
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
# The errors of open(2) with these flags for a link, a directory and a socket.
_NOT_REGULAR = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
_WRONG_PLACE = (*_NOT_REGULAR, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS)
_OTHER_PLACE = "; name a file in a directory that exists and belongs to the server"


_MAKE_ROOM = "Make room on its disk, or move it to another disk and send SIGHUP"
STDOUT: Final = "stdout"
JOURNAL: Final = "journal"
# The priority "notice", which no line of the server's own log has.
_JOURNAL_PREFIX = b"<5>"


class AuditError(OSError):
    """The audit log cannot be opened or written; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream in place of a file. `fd`: stays open; `prefix`: what each line begins with."""

    fd: int
    prefix: bytes = b""


def stream_named(name: str) -> Stream:
    """Return the stream `STDOUT` or `JOURNAL`.

    The journal is the one that systemd has connected to stdout or stderr of this process. Raises
    `AuditError` if there is none.
    """
    if name == STDOUT:
        return Stream(1)
    for fd in (1, 2):
        if is_journal(fd):
            return Stream(fd, _JOURNAL_PREFIX)
    raise AuditError(
        "the audit log cannot be in the journal: neither stdout nor stderr of the server is it; "
        "start the server as a unit of systemd, or name a file or `stdout`"
    )


class AuditLog:
    """An audit log in the file that `open_file` opens: a context manager, which closes it.

    The constructor and `reopen` call `open_file`. It opens the file with `AUDIT_FLAGS`, makes a
    missing file with mode 0600, and returns the descriptor, which the log closes. The file
    must be a regular file. It must belong to the user who created the log, even if this
    process becomes another user later. Nobody else may read or write it.

    `required`: whether a record that cannot be written is an error. Otherwise it is lost, and
    a line in the program's own log says so. `stream`: where lines go in place of a file.

    Raises `AuditError` if the file cannot be opened or is not such a file.
    """

    def __init__(
        self,
        open_file: Callable[[], int],
        *,
        required: bool = False,
        stream: Stream | None = None,
    ) -> None:
        self._open_file = open_file
        self._stream = stream
        self._prefix = stream.prefix if stream else b""
        self._required = required
        self._owner = os.geteuid()
        # Guards the attributes below, and keeps each record whole and in one file. Never
        # held while a file is opened, because the process that opens it may not answer, or while
        # something is logged.
        self._lock = threading.Lock()
        self._fd = self._open()
        self._torn = _is_torn(self._fd)  # the last line is not complete
        self._lost = 0  # records since the last one that could be written
        self._closed = False

    @property
    def is_writable(self) -> bool:
        """Whether the last record could be written, or none has been tried."""
        with self._lock:
            return not self._lost

    def record(self, **fields: str | int | Sequence[str] | None) -> int:
        """Write one line: `time` (UTC, microseconds), then the fields in the order given.

        Returns its size in bytes. Blocks as long as the disk does. The first failure is logged as
        an ERROR; the first success after it as an INFO, with the number of lost records.

        Raises `AuditError` if records are required and this one could not be written.
        """
        with self._lock:
            time = datetime.now(UTC).isoformat(timespec="microseconds")
            line = self._prefix + json.dumps({"time": time, **fields}).encode("ascii") + b"\n"
            problem = self._write_locked(line)
            if problem:
                self._lost += 1
                lost = self._lost
            else:
                lost, self._lost = self._lost, 0
        if problem and lost == 1:
            logger.error(
                "the audit log cannot be written: %s; %s until it can be. %s",
                problem,
                "calls are refused" if self._required else "records are lost",
                "See what reads it" if self._stream else _MAKE_ROOM,
            )
        if not problem and lost:
            logger.info("the audit log can be written again; %d records were lost", lost)
        if problem and self._required:
            raise AuditError(
                f"the call is refused, because the audit log cannot be written ({problem}); "
                "tell the operator to make room on its disk, or to move it and send SIGHUP"
            )
        return len(line)

    def _write_locked(self, line: bytes) -> str:
        """Write a line; return the reason of a failure, or ""."""
        data = b"\n" + line if self._torn else line
        try:
            # One write, so another process that appends to the file cannot write in between.
            written = os.write(self._fd, data)
        except OSError as error:
            return os.strerror(error.errno or 0)
        if written:
            self._torn = not data[:written].endswith(b"\n")
        if written < len(data):  # the kernel does not tell the reason
            return "only the beginning of a record could be written; is the disk full?"
        return ""

    def reopen(self) -> str:
        """Continue in the file that has the name now; no record is lost. Returns "".

        If it cannot be opened, the old file stays in use, and an error is logged and returned.
        Never raises. A stream stays as it is.
        """
        if self._stream is not None:
            return ""
        try:
            fd = self._open()
        except Exception as error:  # noqa: BLE001 -- an unforeseen error of the opener must not end the log
            problem = f"the audit log stays in the old file: {in_words(error)}"
            logger.error("%s", problem)
            return problem
        with self._lock:
            if self._closed:
                old = fd
            else:
                # It may still be the old file, in which a record was written meanwhile.
                self._torn = _is_torn(fd)
                old, self._fd = self._fd, fd
        with contextlib.suppress(OSError):  # an error of the old file no longer matters
            os.close(old)
        logger.info("the audit log was reopened")
        return ""

    def close(self) -> None:
        """Close the file; idempotent. A later `record` fails like any write error."""
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

    def _open(self) -> int:
        """Open and check the file; return the descriptor."""
        if self._stream is not None:
            return os.dup(self._stream.fd)
        try:
            fd = self._open_file()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            if error.errno in _NOT_REGULAR:
                reason = "it is not a regular file"
            where = f" {error.filename}" if error.filename else ""
            remedy = _OTHER_PLACE if error.errno in _WRONG_PLACE else ""
            raise AuditError(f"the audit log{where} cannot be opened: {reason}{remedy}") from error
        try:
            self._check(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check(self, fd: int) -> None:
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise AuditError(
                f"the audit log cannot be opened: it is not a regular file{_OTHER_PLACE}"
            )
        if status.st_uid != self._owner:
            raise AuditError(
                f"the audit log belongs to uid {status.st_uid}, which could change it; "
                f"run: chown {self._owner} FILE, or name another file"
            )
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise AuditError(
                f"other users may read or write the audit log (mode {mode:04o}); "
                "run: chmod 600 FILE, or name another file"
            )
        if mode != _MODE:  # the umask took away the owner's rights
            with contextlib.suppress(OSError):
                os.fchmod(fd, _MODE)


def _is_torn(fd: int) -> bool:
    """Whether the last line of the file is incomplete. Nobody knows that of a stream."""
    status = os.fstat(fd)
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size > 0 and os.pread(fd, 1, size - 1) != b"\n"
