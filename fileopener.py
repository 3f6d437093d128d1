"""Opens a few files with the rights that the server had before it gave them up.

A server that was started as root becomes an ordinary user, but has to open some files again
later: certificates, the users file, a rotated audit log. Before it gives up its rights it makes
a `FileOpener`, which runs this file as a program of its own. That process keeps the right to
open any file, opens no file but those it was told of at its start, and ends with the server.

    with FileOpener({"/etc/job-worker/users": os.O_RDONLY}) as opener:
        privileges.drop_privileges(71_000)
        fd = opener.open("/etc/job-worker/users")

The process trusts no request: a path must be one of the given ones, character by character,
and is opened with the flags given at the start.

Thread safety: every method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, NoReturn, Self

import privileges

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["FileOpener"]

_MAX_REQUEST_BYTES = 8192  # a path has at most 4096 (PATH_MAX)
_MAX_ANSWER_BYTES = 16
_FD_BYTES = 4
_MODE = 0o600
_CLOSE_S = 5.0


class FileOpener:
    """The server's side: a context manager. `files`: absolute paths, with the flags of open(2).

    Raises OSError if the process cannot be started.
    """

    def __init__(self, files: Mapping[str, int]) -> None:
        # Guards the socket. Held until a request is answered, so that each thread gets its own
        # answer.
        self._lock = threading.Lock()
        self._files = frozenset(files)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(self._socket.close)
            # No site-packages, no PYTHON* variables. A session of its own: a Ctrl-C does not
            # reach it.
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-E", "-s", "-S", __file__),
                    *(str(theirs.fileno()), json.dumps(dict(files))),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
            )
            undo.pop_all()

    @property
    def pid(self) -> int:
        """The process that opens the files."""
        return self._process.pid

    def open(self, path: str) -> int:
        """Open one of the files and return its descriptor; a new file gets mode 0600.

        Raises OSError: PermissionError for any other path, BrokenPipeError if the process has
        died.
        """
        if path not in self._files:
            raise PermissionError(errno.EPERM, "not one of the server's files", path)
        with self._lock:
            try:
                self._socket.send(os.fsencode(path))
                answer, fds, _, _ = socket.recv_fds(self._socket, _MAX_ANSWER_BYTES, 1)
            except OSError:
                answer, fds = b"", []
        if not answer:
            message = "the process that opens the server's files has died; restart the server"
            raise BrokenPipeError(errno.EPIPE, message, path)
        if number := int(answer):
            raise OSError(number, os.strerror(number), path)
        if not fds:  # the kernel drops a descriptor for which this process has no number left
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        os.set_inheritable(fds[0], False)
        return fds[0]

    def close(self) -> None:
        """End the process; idempotent. Blocks until it has ended, at most 5 s."""
        with self._lock:
            self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a file system holds it up
            self._process.wait(_CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- the program ------------------------------------------------------------------------


def _serve(sock: socket.socket, files: Mapping[bytes, int]) -> None:
    """Answer requests until the other end is closed: errno as text, or 0 with a descriptor."""
    while path := sock.recv(_MAX_REQUEST_BYTES):
        if path not in files:
            sock.send(b"%d" % errno.EPERM)
            continue
        try:
            fd = os.open(path, files[path] | os.O_CLOEXEC, _MODE)
        except OSError as error:
            sock.send(b"%d" % (error.errno or errno.EIO))
            continue
        try:
            socket.send_fds(sock, [b"0"], [fd])
        finally:
            os.close(fd)


def _main(argv: Sequence[str]) -> NoReturn:
    sys.meta_path.clear()  # everything is imported; nothing more is read from the disk
    _, fd, files = argv
    # A service manager sends these to all processes of the service. Only the server's end, which
    # closes the socket, ends this process.
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE}
    )
    os.umask(0o077)
    # Jobs can neither trace this process nor read its memory.
    privileges.prctl(privileges.PR_SET_DUMPABLE, 0)
    privileges.prctl(privileges.PR_SET_NO_NEW_PRIVS, 1)
    privileges.keep_capabilities(privileges.CAP_DAC_OVERRIDE)
    with contextlib.suppress(ConnectionError), socket.socket(fileno=int(fd)) as sock:
        _serve(sock, {os.fsencode(path): flags for path, flags in json.loads(files).items()})
    os._exit(0)  # at once, because the server's cgroup is to be removed


if __name__ == "__main__":
    _main(sys.argv)
