"""Unix sockets that have a name, and who is at the other end.

    listener = bind("/var/lib/jobs/status.sock", 0o600)
    listener.listen()
    ...
    connection = connect("/var/lib/jobs/status.sock")
    peer(connection).uid

Thread safety: `bind` changes the umask of the process for a moment; the rest has no state.

Source: unix(7).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    AnyPath = str | os.PathLike[str]

__all__ = ["Peer", "bind", "connect", "peer"]

_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid: struct ucred


class Peer(NamedTuple):
    """The process that made the other end of a connection, as the kernel names it."""

    pid: int
    uid: int


def peer(connection: socket.socket) -> Peer:
    """Return who is at the other end (SO_PEERCRED). Raises OSError."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return Peer(pid, uid)


def bind(path: AnyPath, mode: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Return a socket bound to `path`, whose file is new and has this mode. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with _short_name(path) as name:
            # No chmod: whoever owns the directory could have put a link there by then.
            mask = os.umask(0o777 & ~mode)
            try:
                sock.bind(name)
            finally:
                os.umask(mask)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: AnyPath, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Connect to the socket at `path`. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with _short_name(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _short_name(path: AnyPath) -> Iterator[str]:
    """Provide a name of any path that the 108 bytes of sockaddr_un have room for."""
    directory, name = os.path.split(path)
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
