"""How jobs outlive the main process: how the fork server and the next main process find each other.

A fork server with a restart window does not end with its main process. It listens on a socket in
the restart directory, and the next main process, the *successor*, takes over:

    connection = connect(directory)                 # the successor
    send(connection, {"op": "take over", ...}, [main_fd])

    listener = bind(directory); listener.listen()   # the fork server
    if is_trusted(connection): ...

Only root and the user that started the fork server may take over: the socket has mode 0600, and
the kernel names the user at the other end of a connection (SO_PEERCRED). So a main process that has
given up root, and that somebody else controls, gains nothing here. The successor also names the
instance ID of its store. A main process with another store would not know the jobs, and would end
them. So it is refused, like one with other settings (`refusal`).

If no successor comes in time, the fork server kills the jobs and writes how each one ended into a
file of the restart directory (`write_ends`), for the next start (`read_ends`).

Thread safety: these functions have no state.

Source: unix(7).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import unixsockets
from privileges import pass_on_capabilities

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "PROTOCOL",
    "bind",
    "connect",
    "execute_anew",
    "is_trusted",
    "read_ends",
    "refusal",
    "write_ends",
]

PROTOCOL = 2
"""The version of what a fork server and a successor say to each other, and of its saved state."""

_SOCKET = "fork-server.sock"
_ENDS = "ended-jobs"

# The duties of a fork server that a successor must not change, and their names in a refusal.
_LASTING = {
    "store": "the store is",
    "uids": "--uids: jobs run as the users",
    "homes": "homes are in",
    "tmp": "TMPDIRs are in",
    "host_accounts": "--accounts is",
    "cluster": "[slurm]: jobs run on the cluster of",
}


def bind(directory: str | os.PathLike[str]) -> socket.socket:
    """Return a socket with a name in the directory, for the fork server to listen on.

    The name of a fork server that has ended is replaced. Raises OSError.
    """
    path = os.path.join(directory, _SOCKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return unixsockets.bind(path, 0o600, socket.SOCK_SEQPACKET)


def connect(directory: str | os.PathLike[str]) -> socket.socket | None:
    """Connect to a fork server that waits for a successor; None if there is none.

    Raises OSError; PermissionError if it is not a fork server that root or this user has started.
    """
    try:
        sock = unixsockets.connect(os.path.join(directory, _SOCKET), socket.SOCK_SEQPACKET)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    if not is_trusted(sock):
        sock.close()
        raise PermissionError(f"another user's process listens on {directory}/{_SOCKET}")
    return sock


def is_trusted(connection: socket.socket) -> bool:
    """Whether root or the user of this process is at the other end."""
    return unixsockets.peer(connection).uid in (0, os.getuid())


def write_ends(directory: str, ends: dict[str, dict[str, Any]]) -> None:
    """Leave the ends of jobs, by job, to the next main process; take the socket away."""
    with contextlib.suppress(OSError):
        os.unlink(f"{directory}/{_SOCKET}")
    if not ends:
        return
    new = f"{directory}/{_ENDS}.new"
    with open(new, "w", encoding="utf-8", opener=_open_private) as file:
        json.dump(ends, file)
    os.rename(new, f"{directory}/{_ENDS}")


def refusal(
    duties: Mapping[str, Any], dismantling: Sequence[Any] | None, request: dict[str, Any]
) -> str:
    """Return why the process that sent a request may not take over; "" if it may.

    `duties`, `dismantling`: of the fork server.
    """
    if request["protocol"] != PROTOCOL:
        return f"its version of the takeover is {PROTOCOL}, and not {request['protocol']}"
    differing = [
        f"{what} {_as_option(duties.get(name))}, and not {_as_option(request['duties'][name])}"
        for name, what in _LASTING.items()
        if (duties.get(name) or None) != (request["duties"][name] or None)
    ]
    base = os.path.dirname(dismantling[0]) if dismantling else None
    if base not in request["bases"]:
        differing.append(f"cgroups below {base}, and not below {request['bases'][0]}")
    return "; ".join(differing)


def _as_option(duty: Any) -> str:
    """Return a duty as the command line writes it."""
    if isinstance(duty, bool):
        return "host" if duty else "range"
    if isinstance(duty, list):
        first, end = duty
        return f"{first}-{end - 1}"
    return str(duty) if duty else "none"


def read_ends(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return what a fork server has left with `write_ends`; nothing if there is nothing."""
    try:
        with open(f"{os.fspath(directory)}/{_ENDS}", encoding="utf-8") as file:
            found: dict[str, dict[str, Any]] = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    return found


def execute_anew(command: list[str], state: dict[str, Any], fds: Sequence[int]) -> None:
    """Execute another program in this process, which keeps its pid, children and capabilities.

    The program inherits `fds`, and its last argument is the descriptor of a file with `state`. All
    signals wait until it unblocks them. Returns only if that fails, and nothing has changed then.
    """
    wakeup_fd = signal.set_wakeup_fd(-1)
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    state_fd = os.memfd_create("state")
    try:
        with open(state_fd, "w", encoding="utf-8", closefd=False) as file:
            json.dump(state, file)
        os.lseek(state_fd, 0, os.SEEK_SET)
        for fd in (*fds, state_fd):
            os.set_inheritable(fd, True)
        pass_on_capabilities()
        os.execv(command[0], [*command, str(state_fd)])
    except OSError:
        for fd in fds:
            os.set_inheritable(fd, False)
    finally:
        os.close(state_fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
