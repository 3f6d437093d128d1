"""What the user of the command line can do after an error that a server answered.

    raise ClientError(explain(error, client, arguments), error.code)

A server speaks to programs of every kind: it names fields of the protocol, and not the options
and subcommands of this client.

Thread safety: there is no state.
"""

from __future__ import annotations

import re

from cli import LIMIT_OPTIONS, TIME_FIELDS
from credentials import explain_refusal, login_command
from units import format_size

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse

    from connection import Client, ClientError

__all__ = ["explain"]

_OPTIONS = {field: option for option, (field, *_) in LIMIT_OPTIONS.items()}
_FIELD = re.compile(rf"(?<![\w-])({'|'.join(_OPTIONS)})\b")
_TIME = re.compile(rf"\A(?=({'|'.join(TIME_FIELDS)})\b)")
_ABOVE = re.compile(rf"\b({'|'.join(_OPTIONS)}) (\S+) is above this server's ceiling of ([\d.]+)")
# The words of the server, and those for a user, who never sees metadata. The causes are told where
# the token itself does not tell the cause.
_NO_TOKEN = re.compile(r"no valid token in the metadata .*?; log in again")
_INVALID = "your login is no longer valid"
_CAUSES = ": it has expired, was ended by a logout, or your password or role has changed"


def explain(error: ClientError, client: Client, arguments: argparse.Namespace) -> str:
    """Return the message of the error in the words of the command line, with what to do next."""
    text = str(error)
    if error.code == "INVALID_ARGUMENT":
        text = _FIELD.sub(lambda match: _OPTIONS[match[1]], _ABOVE.sub(_ceiling, text))
        text = _TIME.sub("--", text)
    hint = _hint(error, client, arguments)
    if error.code == "UNAUTHENTICATED":
        text = _NO_TOKEN.sub(_INVALID + (_CAUSES if hint.startswith("run: ") else ""), text)
    return f"{text}; {hint}" if hint else text


def _ceiling(match: re.Match[str]) -> str:
    field, asked, ceiling = match.groups()
    if field.endswith(("_bytes", "_bps")):
        asked, ceiling = format_size(int(asked)), format_size(int(ceiling))
    else:
        asked, ceiling = asked.removesuffix(".0"), ceiling.removesuffix(".0")
    return f"{_OPTIONS[field]} {asked} is above this server's ceiling of {ceiling}; ask for less"


def _hint(error: ClientError, client: Client, arguments: argparse.Namespace) -> str:
    """Return what to do next; empty if the server's words say it."""
    subcommand, text = arguments.subcommand, str(error)
    if "your client certificate" in text:
        return ""
    if error.code == "UNAUTHENTICATED" and subcommand == "login":
        return "type them again, or ask the server's operator for a new password"
    if error.code == "UNAUTHENTICATED" and subcommand == "logout":
        return f"to get a new token run: {login_command(arguments)}"
    if error.code == "UNAUTHENTICATED":
        return explain_refusal(client, arguments)
    hints = (
        ("NOT_FOUND", True, "to see your jobs run: client list"),
        ("PERMISSION_DENIED", True, "ask an admin of the server to do it"),
        ("FAILED_PRECONDITION", subcommand == "signal", "to see how it ended run: client status"),
        ("OUT_OF_RANGE", subcommand == "stream", "give a smaller --offset"),
        ("RESOURCE_EXHAUSTED", "no room for" in text, "stop a job, or try again later"),
        ("UNAVAILABLE", text.endswith("shutting down"), "try again when it runs again"),
    )
    return next((hint for code, fits, hint in hints if code == error.code and fits), "")
