"""The error that the client raises, and what gRPC's errors mean for its user.

    try:
        method(request)
    except grpc.RpcError as error:
        raise explain("127.0.0.1:50051", error) from error

Thread safety: there is no state.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import grpc

__all__ = ["CALL_TIMEOUT_S", "ClientError", "explain", "strange_answer", "whole_number"]

CALL_TIMEOUT_S = 30.0  # the server may need 10 for a stop


class ClientError(Exception):
    """A call failed, or could not be made; the message is one line and says what to do.

    Attributes: `code`, the name of the gRPC status ("NOT_FOUND"), "" if no call was made;
    `retry_after_s`, the seconds after which the server asks to try again, or None;
    `is_open`, whether the server may have done what it was asked for, although no answer came;
    `may_pass`, whether the server was not reached, or is going down, and may be back soon;
    `was_closed`, whether the server closed the connection, perhaps before any call was sent.
    """

    def __init__(  # noqa: PLR0913 -- only the message is needed
        self,
        message: str,
        code: str = "",
        retry_after_s: int | None = None,
        *,
        is_open: bool = False,
        may_pass: bool = False,
        was_closed: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
        self.is_open = is_open
        self.may_pass = may_pass
        self.was_closed = was_closed


_CLOSED = (
    "{server} closed the connection: the server stopped, or it does not accept your "
    "client certificate (of another client CA, or by the server's clock not valid now); see "
    "--cert, --key and --certs"
)
_SILENT = (
    "{server} does not answer any more: the network is interrupted, or the server hangs; try "
    "again later"
)
_REFUSED = "no server listens on {server}; start the server, or see --server"
_UNREACHED = "cannot connect to {server}; check that the server runs and can be reached from here"
_GOING_DOWN = "{server} is shutting down"
_IS_GOING_DOWN = "the server is shutting down"  # in its own words
_CERTIFICATE = "the certificate of the server at {server} "
_UNTRUSTED = (
    f"{_CERTIFICATE}was not signed by your server CA, or is not for servers; name the CA of that "
    "server, server-ca.pem, with --ca or --certs; its operator has it"
)
_OTHER_HOST = (
    f"{_CERTIFICATE}is not for that host name; see --server, and certs/generate.sh --hosts"
)
_UNRESOLVED = "the host name in {server} cannot be resolved; see --server"
# What may be over soon: a server that restarts, or a network that is interrupted.
_PASSING = {_CLOSED, _SILENT, _REFUSED, _UNREACHED, _UNRESOLVED, _GOING_DOWN, _IS_GOING_DOWN}
# Parts of the texts for a call that did not reach the server, or that the server has not served.
_NOT_SERVED = ("failed to connect", "resol", _IS_GOING_DOWN)
# A part of gRPC's text for a failed connection, and its meaning. A server that rejects the client's
# certificate just closes the connection.
_CONNECTION_FAILURES = (
    ("Connection refused", _REFUSED),
    (
        "certificate is not yet valid",
        f"{_CERTIFICATE}is not valid yet; check the clock of this machine, and that of the server",
    ),
    (
        "certificate has expired",
        f"{_CERTIFICATE}has expired; run certs/generate.sh there, or check this machine's clock",
    ),
    ("CERTIFICATE_VERIFY_FAILED", _UNTRUSTED),
    ("WRONG_VERSION_NUMBER", "what listens on {server} does not speak TLS; see --server"),
    ("Hostname Verification Check failed", _OTHER_HOST),
    ("errors resolving", _UNRESOLVED),
    ("DNS resolution failed", _UNRESOLVED),
    ("ame resolution", _UNRESOLVED),
    ("Cancelling all calls", _GOING_DOWN),
    (_IS_GOING_DOWN, _IS_GOING_DOWN),
    ("ping timeout", _SILENT),
    ("keepalive", _SILENT),
    ("timed out", _SILENT),
    ("o route to host", _SILENT),
    ("unreachable", _SILENT),
    ("ocket closed", _CLOSED),
    ("Connection reset", _CLOSED),
    ("roken pipe", _CLOSED),
    ("failed to connect to all addresses", _UNREACHED),
    ("Stream removed", _CLOSED),
    ("GOAWAY", _CLOSED),
    ("recvmsg", _CLOSED),
    ("Locally cancelled", "this stream was closed"),
    ("Channel closed", "this client was closed"),
)
# The beginnings of gRPC's texts for an answer that no job-worker server gives; whatever the status.
_STRANGE = (
    "Stream removed",
    "No status received",
    "Received http2 header with status",
    "Exception deserializing response",
    "Decompression failed",
    "Compression bit set",
)
_DEADLINE = {"Deadline Exceeded", "Stream removed (Deadline Exceeded)"}
_WEB_STATUS = re.compile(r"(?i)\bstatus:? ([1-5]\d\d)\b")
_WEB_STATUS_AWAY = {"502", "503", "504"}  # of a proxy that does not reach the server


def strange_answer(server: str, details: str = "", code: str = "UNKNOWN") -> ClientError:
    """Return the error for an answer that no job-worker server gives."""
    found = _WEB_STATUS.search(details)
    how = f": it answers like a web server, with status {found[1]}" if found else ""
    return ClientError(
        f"what listens on {server} does not answer as a job-worker server does{how}; see --server",
        code,
        is_open=True,
        may_pass=found is not None and found[1] in _WEB_STATUS_AWAY,
    )


def explain(server: str, error: grpc.RpcError) -> ClientError:
    """Translate gRPC's error for the user."""
    code, details = error.code().name, " ".join((error.details() or "").split())
    if code in {"UNAVAILABLE", "CANCELLED"}:
        is_open = not any(sign in details for sign in _NOT_SERVED)
        for sign, meaning in _CONNECTION_FAILURES:
            if sign in details:
                return ClientError(
                    meaning.format(server=server),
                    code,
                    is_open=is_open,
                    may_pass=meaning in _PASSING,
                    was_closed=meaning == _CLOSED,
                )
    if code == "CANCELLED" and details in {"", code}:
        message = f"{server} ended the call without an answer, perhaps to shut down; try it again"
        return ClientError(message, code, is_open=True, may_pass=True)
    if code == "DEADLINE_EXCEEDED" and details in _DEADLINE:
        message = f"{server} did not answer within {CALL_TIMEOUT_S:g} s; try it again"
        return ClientError(message, code, is_open=True)
    if details.startswith(_STRANGE):
        return strange_answer(server, details, code)
    retry_after_s = None
    for item in error.trailing_metadata() or ():
        if item.key == "retry-after":
            retry_after_s = whole_number(str(item.value))
    return ClientError(details or code, code, retry_after_s)


def whole_number(text: str) -> int | None:
    """Return the number in a server's metadata; None if it is none, or has over 9 digits."""
    is_number = text.isascii() and text.isdecimal() and len(text) <= 9  # noqa: PLR2004
    return int(text) if is_number else None
