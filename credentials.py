"""Who the user of the command line is: `login`, `logout`, `whoami`, and the kept token.

    token = find_token(arguments)
    for warning in warnings_before_expiry(client, arguments):
        print(warning, file=sys.stderr)

A token is kept in a file of mode 0600, one for each server and profile. The client reads what a
token says, but does not verify it: only the server has the key for that.

Thread safety: only the main thread of the program uses this module.

Source: RFC 7519 section 3 (the parts of a JWT).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
from pathlib import Path
from urllib.parse import quote

from cli import printable
from connection import ClientError

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from connection import Client

__all__ = [
    "explain_refusal",
    "find_token",
    "login",
    "login_command",
    "logout",
    "token_path",
    "warnings_before_expiry",
    "whoami",
]

_DAY_S = 24 * 60 * 60
_WARN_S = 14 * _DAY_S
_RFC_3339 = "%Y-%m-%dT%H:%M:%SZ"
# The time at which a token expires, as the server writes it. `json` takes 3 ms to import.
_EXPIRY = re.compile(rb'"exp":\s*(\d{1,12})\s*[,}]')


# --- the kept token ---------------------------------------------------------------------


def token_path(arguments: argparse.Namespace) -> Path:
    """Return the file of the token for this server and profile. Raises OSError.

    The name contains the server, so no server receives the token of another one. It contains the
    profile, because two profiles may be two users of the same server.
    """
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        message = "no home directory; set XDG_STATE_HOME"
        raise FileNotFoundError(errno.ENOENT, message, "~") from None
    name = f"token-{quote(arguments.server, safe=':[]')}"
    if arguments.profile:
        name += f"@{quote(arguments.profile, safe='')}"
    return Path(state) / "job-worker" / name


def _keep_token(arguments: argparse.Namespace, token: str) -> None:
    """Write the token to its file. Raises OSError."""
    import tempfile

    path = token_path(arguments)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp creates the file with mode 0600. The rename makes the whole token appear at once.
    fd, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(fd, "w") as file:
        file.write(token)
    os.replace(temporary, path)


def _forget_token(arguments: argparse.Namespace, token: str) -> None:
    """Delete the kept token if it is `token`."""
    # An unreadable file keeps no token, and a token that stays is invalid by now.
    with contextlib.suppress(OSError):
        if _read_token(arguments) == token:
            token_path(arguments).unlink()


def _read_token(arguments: argparse.Namespace) -> str:
    # With strange bytes in the file, `Client` still reports that this is not a token.
    return token_path(arguments).read_text(encoding="ascii", errors="replace")


def find_token(arguments: argparse.Namespace) -> str:
    """Return the token given, or that of JOBWORKER_TOKEN, or the kept one. Raises ClientError."""
    token: str = arguments.token or os.environ.get("JOBWORKER_TOKEN", "")
    if not token:
        try:
            token = _read_token(arguments)
        except OSError:
            raise ClientError(
                f"not logged in to {arguments.server}; run: {login_command(arguments)}"
            ) from None
    return token


def login_command(arguments: argparse.Namespace) -> str:
    """Return the command with which the user gets a token for the same server and profile."""
    profile = f" --profile {arguments.profile}" if arguments.profile else ""
    return f"client login{profile}" + ("" if arguments.user else " -u USER")


# --- what a token and a certificate say ---------------------------------------------------


def _read_claims(token: str) -> dict[str, Any]:
    """Return what the token says, which is not verified; empty for what is no token."""
    import json

    try:
        claims = json.loads(_payload(token))
    except ValueError:
        return {}
    return claims if isinstance(claims, dict) else {}


def _payload(token: str) -> bytes:
    """Return the JSON in the middle of the token. Raises ValueError."""
    import binascii

    text = token.split(".")[1] if token.count(".") == 2 else ""  # noqa: PLR2004
    text = text.replace("-", "+").replace("_", "/")
    return binascii.a2b_base64(text + "=" * (-len(text) % 4))


def _expiry(token: str) -> int | None:
    """Return when the token expires, in seconds since 1970; None if it does not say."""
    try:
        match = _EXPIRY.search(_payload(token))
    except ValueError:
        return None
    return int(match[1]) if match else None


def warnings_before_expiry(client: Client, arguments: argparse.Namespace) -> list[str]:
    """Return a line for the token and one for the certificate if they expire within 14 days."""
    renew = "ask the server's operator for a new one"
    certificate_end = client.certificate.expires_at if client.certificate else None
    return [
        f"your {what} expires {_describe(end)}; {remedy}"
        for what, end, remedy in (
            ("token", _expiry(client.token), f"run: {login_command(arguments)}"),
            ("client certificate", certificate_end, renew),
        )
        if end is not None and 0 < end - time.time() <= _WARN_S
    ]


def _describe(expires_at: int) -> str:
    """Return the moment and how far it is away, like `2026-12-28 10:00:00 UTC (in 30 days)`."""
    days = int((expires_at - time.time()) // _DAY_S)
    away = "today" if days < 1 else f"in {days} day{'s'[: days > 1]}"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(expires_at)) + f" ({away})"


def explain_refusal(client: Client, arguments: argparse.Namespace) -> str:
    """Say why the server may have refused the token, as far as the token tells, and what to do."""
    expires_at, certificate = _expiry(client.token), client.certificate
    reason = ""
    if expires_at is not None and expires_at <= time.time():
        reason = f"your token expired {time.strftime('%Y-%m-%d', time.gmtime(expires_at))}; "
    elif certificate and _is_for_another(client.token, certificate.der):
        reason = "your token belongs to another client certificate than the one in use; "
    return f"{reason}run: {login_command(arguments)}"


def _is_for_another(token: str, certificate: bytes) -> bool:
    """Whether the token says that it works only with another certificate (RFC 8705)."""
    import base64
    import hashlib

    bound = _read_claims(token).get("cnf")
    thumbprint = base64.urlsafe_b64encode(hashlib.sha256(certificate).digest()).rstrip(b"=")
    return isinstance(bound, dict) and bound.get("x5t#S256") != thumbprint.decode()


# --- the subcommands ----------------------------------------------------------------------


def login(client: Client, arguments: argparse.Namespace) -> None:
    """Exchange a password for a token; print and keep it."""
    token, _ = client.login(arguments.user, _password(arguments))
    print(token)
    try:
        _keep_token(arguments, token)
    except OSError as error:
        print(
            printable(
                f"client: the token was not kept ({error.filename}: {error.strerror}); use -t"
            ),
            file=sys.stderr,
        )


def _password(arguments: argparse.Namespace) -> str:
    import getpass

    password: str | None = arguments.password
    try:
        if password is None and sys.stdin.isatty():
            password = getpass.getpass(f"Password for {printable(arguments.user)}: ")
        elif password is None or password == "-":  # noqa: S105 -- not a password
            password = sys.stdin.readline().rstrip("\r\n")
        password.encode()
    except EOFError:
        password = ""
    except UnicodeError:  # its text contains the password
        raise ClientError(
            "the password is not valid UTF-8; check the encoding of the terminal or file"
        ) from None
    if not password:
        raise ClientError(
            "no password was given; type it when the client asks, give -p PASSWORD, or send it as "
            "a line to stdin"
        )
    return password


def logout(client: Client, arguments: argparse.Namespace) -> None:
    """Make the token invalid and delete the kept one."""
    token = client.token
    try:
        client.logout()
    except ClientError as error:
        if error.code != "UNAUTHENTICATED":
            raise
        # Not a success: the token may still be valid with another certificate.
        _forget_token(arguments, token)
        raise ClientError(
            "there was nothing to log out of: the server does not accept this token, or not "
            "with this client certificate",
            error.code,
        ) from error
    _forget_token(arguments, token)


def whoami(client: Client, arguments: argparse.Namespace) -> None:
    """Show what the token and the certificate say; the server is not asked."""
    claims = _read_claims(client.token)
    if not claims.get("sub"):
        raise ClientError(f"this is not a token of job-worker; run: {login_command(arguments)}")
    certificate = client.certificate
    facts: dict[str, Any] = {
        "user": claims["sub"],
        "role": claims.get("role"),
        "server": arguments.server,
        "profile": arguments.profile,
        "token_expires_at": _expiry(client.token),
        "certificate": arguments.cert or os.path.join(arguments.certs, "client.pem"),
        "certificate_expires_at": certificate and certificate.expires_at,
    }
    if arguments.json:
        from display import print_json

        for name in ("token_expires_at", "certificate_expires_at"):
            facts[name] = facts[name] and time.strftime(_RFC_3339, time.gmtime(facts[name]))
        print_json(facts)
        return
    for name in ("token", "certificate"):
        end = facts.pop(f"{name}_expires_at")
        text = "does not say when it expires" if end is None else f"expires {_describe(end)}"
        path = facts.pop(name, None)
        facts[name] = f"{path}, {text}" if path else text
    for name, fact in facts.items():
        print(f"{name:<12}{printable(str(fact or '-'))}")
