"""A socket of this host on which one thread answers one request after the other.

    path = Path("state/admin.sock")
    sock = bind_unix(path, 0o600)
    server = LocalServer("admin", sock, lambda request: b"pong\n", end=b"\n", path=path)
    server.start()
    ...
    server.close()

    with unixsockets.connect(path) as sock:
        sock.sendall(b"ping\n")

A connection carries one request and one answer. One that sends no request holds up nobody: it waits
beside others for `_REQUEST_S`, and the oldest of too many is closed. Whoever takes no answer can
hold up others who connect, for `_ANSWER_S`, if the answer does not fit into the socket. So this
serves the tools of an operator.

Thread safety: any thread may call `close`. The thread of a server has the server's name, begins
with `start` and ends with `close`.

Sources: unix(7), accept(2), shutdown(2).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
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
_MAX_WAITING = 64  # connections whose request has not arrived
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
        self._fd = sock.fileno()
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
        self._socket.setblocking(False)
        waiting: dict[int, _Request] = {}  # by descriptor, the oldest first
        while not self._closed.is_set():
            ready = self._await(waiting)
            if self._fd in ready:
                for _ in range(_BACKLOG):
                    if not self._accept(waiting):
                        break
            now = time.monotonic()
            for fd, request in list(waiting.items()):
                with contextlib.suppress(OSError):  # the other side has gone
                    if fd in ready and request.receive(self._end):
                        self._serve(request)
                    elif now < request.deadline_s:
                        continue
                del waiting[fd]
                request.connection.close()
        for request in waiting.values():
            request.connection.close()

    def _await(self, waiting: dict[int, _Request]) -> set[int]:
        """Wait until there is something to do; return the descriptors that can be read."""
        poll = select.poll()
        for fd in (self._fd, *waiting):
            poll.register(fd, select.POLLIN)
        deadlines = [request.deadline_s for request in waiting.values()]
        left_ms = max(0, min(deadlines) - time.monotonic()) * 1000 + 1 if deadlines else None
        return {fd for fd, _ in poll.poll(left_ms)}

    def _accept(self, waiting: dict[int, _Request]) -> bool:
        """Accept a connection; return whether there was one."""
        try:
            connection, _ = with_reserve(self._socket.accept)
        except BlockingIOError:
            return False
        except OSError as error:
            if not self._closed.is_set():
                logger.warning(
                    "%s: cannot accept a connection: %s", self._thread.name, in_words(error)
                )
            self._closed.wait(_PAUSE_S)
            return False
        with contextlib.suppress(OSError):  # the other side has gone
            if self._may_ask(connection):
                waiting[connection.fileno()] = _Request(connection)
                if len(waiting) > _MAX_WAITING:
                    waiting.pop(next(iter(waiting))).connection.close()
                return True
        connection.close()
        return True

    def _serve(self, request: _Request) -> None:
        try:
            answer = self._answer(request.data)
        except Exception:
            logger.exception("%s: a request has failed", self._thread.name)
            return
        request.connection.settimeout(_ANSWER_S)
        request.connection.sendall(answer)


class _Request:
    """A connection whose request arrives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.data = b""
        self.deadline_s = time.monotonic() + _REQUEST_S

    def receive(self, end: bytes) -> bool:
        """Read what has come; return whether that is all. Raises OSError."""
        try:
            more = self.connection.recv(_MAX_REQUEST_BYTES)
        except BlockingIOError:
            return False
        self.data += more
        return not more or end in self.data or len(self.data) >= _MAX_REQUEST_BYTES


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
