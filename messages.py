"""What the main process and the fork server send to each other.

A message is one JSON object, with open descriptors beside it, on a SOCK_SEQPACKET socket, which
keeps messages apart. `spawner.py` describes the requests and their answers.

    send(sock, {"op": "fork", "job": "a"}, [reply_fd, stdout_fd, exit_fd])
    message, fds = receive(sock)

Thread safety: these functions have no state. A message is sent and received whole.
"""

from __future__ import annotations

import array  # noqa: F401 -- socket.send_fds imports it, when the fork server can import no more
import errno
import json
import os
import select
import socket
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AttachError",
    "EnterError",
    "ExecError",
    "close_all",
    "error_of",
    "failure",
    "receive",
    "send",
    "wait_ready",
]

_MAX_MESSAGE_BYTES = 4096
_MAX_FDS = 10
_FD_BYTES = 4


class AttachError(OSError):
    """The new process could not enter its cgroup, so the command was not executed."""


class EnterError(OSError):
    """The new process could not enter the directory that its job asks for."""


class ExecError(OSError):
    """The command could not be executed.

    Attribute: `found`, what its user sees in its place, see `errors.look_at`.
    """

    found = ""


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message. Raises OSError; with EMSGSIZE one that nobody could receive whole."""
    data = json.dumps(message).encode()
    if len(data) > _MAX_MESSAGE_BYTES:
        problem = f"a message of {len(data)} bytes, and not of {_MAX_MESSAGE_BYTES} or fewer"
        raise OSError(errno.EMSGSIZE, problem)
    socket.send_fds(sock, [data], list(fds))


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive one message. Raises EOFError when the other side is gone; OSError, ValueError."""
    # socket.recv_fds would drop MSG_CMSG_CLOEXEC, and programs would inherit the descriptors.
    data, ancillary, _, _ = sock.recvmsg(
        _MAX_MESSAGE_BYTES, socket.CMSG_SPACE(_MAX_FDS * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
    )
    if not data:
        raise EOFError
    fds = [
        int.from_bytes(numbers[i : i + _FD_BYTES], sys.byteorder)
        for level, kind, numbers in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for i in range(0, len(numbers), _FD_BYTES)
    ]
    return json.loads(data), fds


def close_all(fds: Sequence[int]) -> None:
    """Close these descriptors."""
    for fd in fds:
        os.close(fd)


def wait_ready(fd: int, events: int, timeout_s: float | None = None) -> bool:
    """Block until `fd` has one of `events` or its other end is closed; False after `timeout_s`."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def error_of(answer: dict[str, Any]) -> OSError:
    """Return the error that an answer of `failure` tells of."""
    kinds = {kind.__name__: kind for kind in (AttachError, EnterError, ExecError)}
    kind = kinds.get(answer.get("kind", ""), OSError)
    error = kind(answer["errno"], os.strerror(answer["errno"]))
    if isinstance(error, ExecError):
        error.found = str(answer.get("found", ""))
    return error


def failure(error: BaseException) -> dict[str, Any]:
    """Return the answer that tells of an error."""
    return {
        "errno": getattr(error, "errno", None) or errno.EINVAL,
        "kind": type(error).__name__,
    } | ({"found": error.found} if isinstance(error, ExecError) else {})
