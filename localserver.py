"""A socket of this host on which one thread answers one request after the other.

    path = Path("state/admin.sock")
    sock = bind_unix(path, 0o600)
    server = LocalServer("admin", sock, lambda request: b"pong\n", end=b"\n", path=path)
    server.start()
    ...
    server.close()

    with unixsockets.connect(path) as sock:
        sock.sendall(b"ping\n")

A connection carries one request and one answer. Whoever connects can hold up others who connect,
for `_REQUEST_S` and `_ANSWER_S`, and nobody else. So this serves the tools of an operator.

Thread safety: any thread may call `close`. The thread of a server has the server's name, begins
with `start` and ends with `close`.

Sources: unix(7), accept(2), shutdown(2).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import stat
import threading
import time
from typing import TYPE_CHECKING

import unixsockets
from descriptors import with_reserve
from errors import in_words

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["LocalServer", "bind_unix"]

logger = logging.getLogger(__name__)

_MAX_REQUEST_BYTES = 64 * 1024
_REQUEST_S = 5.0  # for a whole request to arrive
_ANSWER_S = 5.0  # for a whole answer to be taken
_PAUSE_S = 1.0  # after an error of accept, which would come again at once
_JOIN_S = 1.0
_BACKLOG = 16


class LocalServer:
    """Answers on the listening socket `sock`, which it closes.

    `answer`: gets the bytes of a request, which end with `end`, or with the connection's end, and
    returns those of the answer. `may_ask`: whether a connection is answered at all. `path`: the
    file of the socket, removed at the end if this process may do that.
    """

    def __init__(  # noqa: PLR0913 -- what differs between the servers
        self,
        name: str,
        sock: socket.socket,
        answer: Callable[[bytes], bytes],
        *,
        end: bytes,
        may_ask: Callable[[socket.socket], bool] = lambda _: True,
        path: Path | None = None,
    ) -> None:
        self._socket = sock
        self._answer = answer
        self._end = end
        self._may_ask = may_ask
        self._path = path
        self._closed = threading.Event()
        # A daemon, so that an answer which hangs does not keep the program alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to answer. Raises RuntimeError if the system allows no more threads."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; idempotent. Waits for an answer under way, at most a second."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._path is not None:
            # Before the socket is closed: from then on the file may be that of a successor.
            with contextlib.suppress(OSError):
                self._path.unlink()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
        self._socket.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = with_reserve(self._socket.accept)
            except OSError as error:
                if not self._closed.is_set():
                    logger.warning(
                        "%s: cannot accept a connection: %s", self._thread.name, in_words(error)
                    )
                self._closed.wait(_PAUSE_S)
                continue
            with contextlib.suppress(OSError), connection:  # the other side has gone
                if self._may_ask(connection):
                    self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        request = _receive(connection, self._end)
        try:
            answer = self._answer(request)
        except Exception:
            logger.exception("%s: a request has failed", self._thread.name)
            return
        connection.settimeout(_ANSWER_S)
        connection.sendall(answer)


def _receive(connection: socket.socket, end: bytes) -> bytes:
    """Return what comes up to `end`, or up to the connection's end. Raises OSError."""
    data, deadline = b"", time.monotonic() + _REQUEST_S
    while end not in data and len(data) < _MAX_REQUEST_BYTES:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        more = connection.recv(_MAX_REQUEST_BYTES)
        if not more:
            break
        data += more
    return data


def bind_unix(path: Path, mode: int) -> socket.socket:
    """Return a listening Unix socket at `path`, whose file has this mode.

    The file of a server that has ended is replaced. Raises FileExistsError if another server
    answers there or if the path is not a socket; OSError.
    """
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "is not a socket; choose another path", str(path))
        with (
            contextlib.suppress(ConnectionRefusedError, FileNotFoundError),
            unixsockets.connect(path),
        ):
            raise FileExistsError(errno.EEXIST, "another server listens here", str(path))
        path.unlink(missing_ok=True)
    sock = unixsockets.bind(path, mode)
    try:
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
