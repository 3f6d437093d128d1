"""Opens a few files with the rights that the server had before it gave them up.

A server that was started as root becomes an ordinary user, but has to open some files again
later: certificates, the users file, a rotated audit log. Before it gives up its rights it makes
a `FileOpener`, which runs this file as a program of its own. That process keeps the right to
open any file, opens no file but those it was told of at its start, and ends with the server.

    with FileOpener({"/etc/job-worker/users": os.O_RDONLY}) as opener:
        privileges.become_ordinary_user(71_000)
        fd = opener.open("/etc/job-worker/users")

The process trusts no request: a path must be one of the given ones, character by character,
and is opened with the flags given at the start.

Thread safety: every method may be called from any thread.
"""

from __future__ import annotations

import array  # noqa: F401 -- socket.send_fds imports it, when this process can import no more
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
_MAX_ANSWER_BYTES = 32
_MAX_NUMBER_BYTES = 20
_MODE = 0o600
_ANSWER_S = 10.0
_CLOSE_S = 1.0


class FileOpener:
    """The server's side: a context manager. `files`: absolute paths, with the flags of open(2).

    Raises OSError if the process cannot be started.
    """

    def __init__(self, files: Mapping[str, int]) -> None:
        # Guards the number. Held until a request is answered, so that each thread gets its own
        # answer: at most _ANSWER_S. `close` does not wait for it.
        self._lock = threading.Lock()
        self._number = 0  # of the last request
        self._files = frozenset(files)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(self._socket.close)
            self._socket.settimeout(_ANSWER_S)
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

    def open(self, path: str) -> int:
        """Open one of the files and return its descriptor; a new file gets mode 0600.

        Raises OSError: PermissionError for any other path, BrokenPipeError if the process has
        died, TimeoutError if the answer does not come within 10 s.
        """
        if path not in self._files:
            raise PermissionError(errno.EPERM, "not one of the server's files", path)
        with self._lock:
            try:
                code, fds = self._ask(path)
            except TimeoutError as error:
                message = "the process that opens the server's files does not answer"
                raise TimeoutError(errno.ETIMEDOUT, message, path) from error
            except OSError as error:
                message = "the process that opens the server's files has died; restart the server"
                raise BrokenPipeError(errno.EPIPE, message, path) from error
        if code:
            raise OSError(code, os.strerror(code), path)
        if not fds:  # the kernel drops a descriptor for which this process has no number left
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        os.set_inheritable(fds[0], False)
        return fds[0]

    def _ask(self, path: str) -> tuple[int, list[int]]:
        """Return errno, or 0 with a descriptor. Raises OSError."""
        self._number += 1
        self._socket.send(b"%d\0%s" % (self._number, os.fsencode(path)))
        while True:
            answer, fds, _, _ = socket.recv_fds(self._socket, _MAX_ANSWER_BYTES, 1)
            if not answer:
                raise BrokenPipeError
            number, code = map(int, answer.split())
            if number == self._number:
                return code, fds
            for fd in fds:  # the answer to a request that is no longer waited for
                os.close(fd)

    def close(self) -> None:
        """End the process; idempotent. Blocks until it has ended, at most a second.

        A call of `open` that waits fails.
        """
        with contextlib.suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)
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
    """Answer requests until the other end is closed.

    A request is a number, NUL and a path. The answer has the number, and errno or 0; with 0 comes a
    descriptor.
    """
    while request := sock.recv(_MAX_REQUEST_BYTES):
        number, _, path = request.partition(b"\0")
        number = number[:_MAX_NUMBER_BYTES]
        if path not in files:
            sock.send(b"%s %d" % (number, errno.EPERM))
            continue
        try:
            fd = os.open(path, files[path] | os.O_CLOEXEC, _MODE)
        except OSError as error:
            sock.send(b"%s %d" % (number, error.errno or errno.EIO))
            continue
        try:
            socket.send_fds(sock, [b"%s 0" % number], [fd])
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
