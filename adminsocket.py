"""The socket in the state directory by which the server's operator asks the running server.

    commands = {"status": lambda request: {"uptime_s": 12}}
    admin = AdminSocket(Path("state"), commands)     # makes state/admin.sock, mode 0600
    admin.start()
    ...
    admin.close()

    answer = ask(Path("state"), "status")            # in another process

A request is one line, a JSON object with `command` and the arguments of the command. The answer
is one line, too: what the command returns, or `{"error": ...}`. Only root and the user that started
the server may ask: the file has mode 0600, and the kernel names the user of each connection
(SO_PEERCRED). After a start as root the server is another user, who may not ask.

Thread safety: commands run one after the other, in the thread `admin` of `localserver.py`. A
command that takes long holds up the next one.

Source: unix(7), SO_PEERCRED.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import unixsockets
from localserver import LocalServer, bind_unix

if TYPE_CHECKING:
    import socket
    from pathlib import Path

__all__ = ["AdminError", "AdminSocket", "Command", "NoServerError", "ask"]

logger = logging.getLogger(__name__)

Command = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""What a command does: it gets the request and returns the answer."""

_NAME = "admin.sock"
_MODE = 0o600
_READ_BYTES = 64 * 1024


class AdminError(Exception):
    """The server cannot be asked, or has refused; the message says why and what to do."""


class NoServerError(AdminError):
    """No server runs with the state directory."""


class AdminSocket:
    """The server's side. `commands`: by name.

    A command reports a failure by `AdminError`. Make this before the process gives up its rights,
    and call `start` afterwards. Raises OSError.
    """

    def __init__(self, state_dir: Path, commands: Mapping[str, Command]) -> None:
        self._commands = commands
        self._uids = {0, os.geteuid()}
        path = state_dir / _NAME
        self._server = LocalServer(
            "admin",
            bind_unix(path, _MODE),
            self._answer,
            end=b"\n",
            may_ask=self._may_ask,
            path=path,
        )

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()

    def close(self) -> None:
        """Answer no more; idempotent."""
        self._server.close()

    def _may_ask(self, connection: socket.socket) -> bool:
        pid, uid = unixsockets.peer(connection)
        if uid not in self._uids:
            logger.warning("admin.sock: process %d of uid %d may not ask", pid, uid)
        return uid in self._uids

    def _answer(self, line: bytes) -> bytes:
        try:
            answer = self._run(line)
        except AdminError as error:
            answer = {"error": str(error)}
        except Exception:
            logger.exception("admin.sock: a command has failed")
            answer = {"error": "internal error; the server's log has the details"}
        return json.dumps(answer).encode() + b"\n"

    def _run(self, line: bytes) -> Mapping[str, Any]:
        try:
            request = json.loads(line)
            name = request["command"]
            command = self._commands.get(name)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise AdminError('a request is a line like {"command": "status"}') from None
        if command is None:
            raise AdminError(f"no command {name!r}; there are: {', '.join(self._commands)}")
        return command(request)


def ask(state_dir: Path, command: str, **arguments: Any) -> dict[str, Any]:
    """Have the server that runs with this state directory do a command; return its answer.

    Blocks until the command is done. Raises `AdminError`.
    """
    path = state_dir / _NAME
    data = b""
    try:
        with unixsockets.connect(path) as sock:
            sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            while more := sock.recv(_READ_BYTES):
                data += more
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise NoServerError(
            f"no server runs with the state directory {state_dir}; name that of the server with "
            "--state-dir, or start the server"
        ) from None
    except PermissionError:
        raise AdminError(_not_allowed(path)) from None
    except (ConnectionResetError, BrokenPipeError):
        data = b""
    except OSError as error:
        raise AdminError(f"the server does not answer on {path}: {error.strerror}") from error
    if not data:
        raise AdminError(f"the server has ended, or: {_not_allowed(path)}")
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        raise AdminError(str(answer["error"]))
    return answer


def _not_allowed(path: Path) -> str:
    return f"only root and the user that started the server may use {path}; try with sudo"
