"""Who the user of the command line is: `login`, `logout`, `whoami`, and the kept token.

    token = find_token(arguments)
    for warning in warnings_before_expiry(client, arguments):
        warn(warning)

A token is kept in a file of mode 0600, one for each server and profile. The client reads what a
token says, but does not verify it: only the server has the key for that.

Thread safety: only the main thread of the program uses this module.

Source: RFC 7519 section 3 (the parts of a JWT).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from pathlib import Path
from urllib.parse import quote

from cli import printable, warn
from connection import ClientError
from replacing import locked, read_small, replace_file
from standardstreams import read_line
from tokentimes import TokenTimes, payload, session_of

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from connection import Client

__all__ = [
    "explain_refusal",
    "find_token",
    "keep_newer",
    "login",
    "login_command",
    "logout",
    "token_path",
    "warnings_before_expiry",
    "whoami",
]

_MINUTE_S, _HOUR_S, _DAY_S = 60, 60 * 60, 24 * 60 * 60
_WARN_S = 14 * _DAY_S
_RFC_3339 = "%Y-%m-%dT%H:%M:%SZ"


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
    path = token_path(arguments)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path.parent):
        replace_file(path, token.encode())


def keep_newer(arguments: argparse.Namespace) -> Callable[[str, str], None] | None:
    """Return what keeps a token that was refreshed; None if the token in use is not the kept one.

    A login or logout by another process counts more: the newer token replaces only one of the same
    session.
    """
    if _given_token(arguments):
        return None

    def keep(old: str, new: str) -> None:
        path = token_path(arguments)
        # The old token works on without the file.
        with contextlib.suppress(OSError), locked(path.parent):
            if session_of(_read_token(arguments)) == session_of(old):
                replace_file(path, new.encode())

    return keep


def _forget_token(arguments: argparse.Namespace, token: str) -> None:
    """Delete the kept token if it is `token`, or one of the same session."""
    # An unreadable file keeps no token, and a token that stays is invalid by now.
    path = token_path(arguments)
    with contextlib.suppress(OSError), locked(path.parent):
        kept = _read_token(arguments)
        if kept == token or (session_of(kept) or b"-") == session_of(token):
            path.unlink()


def _read_token(arguments: argparse.Namespace) -> str:
    # With strange bytes in the file, `Client` still reports that this is not a token.
    return read_small(token_path(arguments)).decode("ascii", "replace")


def _given_token(arguments: argparse.Namespace) -> str:
    """Return the token of the command line or of the environment; empty if there is none."""
    given = getattr(arguments, "token", None) or os.environ.get("JOBWORKER_TOKEN", "")
    return str(given).rstrip("\r\n") or str(given)  # $(cat FILE) of Windows leaves a CR


def find_token(arguments: argparse.Namespace) -> str:
    """Return the token given, or that of JOBWORKER_TOKEN, or the kept one. Raises ClientError."""
    token = _given_token(arguments)
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
    server = f" --server {arguments.login_server}" if arguments.login_server else ""
    return f"client login{profile}{server}" + ("" if arguments.user else " -u USER")


# --- what a token and a certificate say ---------------------------------------------------


def _read_claims(token: str) -> dict[str, Any]:
    """Return what the token says, which is not verified; empty for what is no token."""
    import json

    try:
        claims = json.loads(payload(token))
    except ValueError:
        return {}
    return claims if isinstance(claims, dict) else {}


def warnings_before_expiry(client: Client, arguments: argparse.Namespace) -> list[str]:
    """Return a line for the token and one for the certificate if they expire within 14 days.

    For a token that is refreshed by itself, the end of its session counts; of a session shorter
    than that, the second half.
    """
    lines = []
    times = TokenTimes.read(client.token)
    if times is not None:
        what = "session ends" if times.can_be_refreshed else "token expires"
        life_s = times.session_expires_at - times.session_began_at
        if 0 < times.session_expires_at - time.time() <= min(_WARN_S, life_s / 2):
            lines.append(
                f"your {what} {_describe(times.session_expires_at)}; run: "
                f"{login_command(arguments)}"
            )
    end = client.certificate.expires_at if client.certificate else None
    if end is not None and 0 < end - time.time() <= _WARN_S:
        lines.append(
            f"your client certificate expires {_describe(end)}; ask the server's operator for a "
            "new one"
        )
    return lines


def _describe(expires_at: int) -> str:
    """Return a moment and how far it is away, like `2026-12-28 10:00:00 UTC (in 30 days)`."""
    left_s = int(expires_at - time.time())
    away = "today" if _HOUR_S <= left_s < _DAY_S else f"in {_in_units(left_s)}"
    if left_s <= 0:
        away = f"{_in_units(-left_s)} ago"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(expires_at)) + f" ({away})"


def _in_units(seconds: int) -> str:
    for name, unit_s in (("day", _DAY_S), ("h", _HOUR_S), ("min", _MINUTE_S)):
        if seconds >= unit_s:
            number = seconds // unit_s
            return f"{number} {name}{'s' if name == 'day' and number > 1 else ''}"
    return f"{seconds} s"


def _renewal(times: TokenTimes) -> str:
    """Say how the token lasts as long as its session."""
    life = _in_units(times.life_s)
    return f"; the token is renewed while you use it, after {life} without a call log in again"


def explain_refusal(client: Client, arguments: argparse.Namespace) -> str:
    """Say why the server may have refused the token, as far as the token tells, and what to do."""
    times, certificate = TokenTimes.read(client.token), client.certificate
    reason = ""
    if times is not None and times.expires_at <= time.time():
        moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(times.expires_at))
        reason = f"your token expired {moment}; "
    elif certificate and _is_for_another(client.token, certificate.der):
        reason = "your token belongs to another client certificate than the one in use; "
    use = ""
    if _given_token(arguments) and not getattr(arguments, "token", None):
        use = ", and set JOBWORKER_TOKEN to the new token, or unset it"
    return f"{reason}run: {login_command(arguments)}{use}"


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
    try:
        _keep_token(arguments, token)
    except OSError as error:
        warn(f"the token was not kept ({error.filename}: {error.strerror}); use -t")
    print(token)


def _password(arguments: argparse.Namespace) -> str:
    import getpass

    password: str | None = arguments.password
    try:
        if password is None and sys.stdin.isatty():
            password = getpass.getpass(f"Password for {printable(arguments.user)}: ")
        elif password is None or password == "-":  # noqa: S105 -- not a password
            password = read_line()
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
    certificate, times = client.certificate, TokenTimes.read(client.token)
    facts: dict[str, Any] = {
        "user": claims["sub"],
        "role": claims.get("role"),
        "server": arguments.server,
        "profile": arguments.profile,
        "token_expires_at": times and times.expires_at,
        "session_expires_at": times and times.session_expires_at,
        "certificate": arguments.cert or os.path.join(arguments.certs, "client.pem"),
        "certificate_expires_at": certificate and certificate.expires_at,
    }
    if arguments.json:
        from display import print_json

        for name in ("token_expires_at", "session_expires_at", "certificate_expires_at"):
            facts[name] = facts[name] and time.strftime(_RFC_3339, time.gmtime(facts[name]))
        print_json(facts)
        return
    session_end, now = facts.pop("session_expires_at"), time.time()
    if session_end is not None:
        facts["session"] = f"{'ended' if session_end <= now else 'ends'} {_describe(session_end)}"
        if times and times.can_be_refreshed and times.expires_at > now:
            facts["session"] += _renewal(times)
    for name in ("token", "certificate"):
        end = facts.pop(f"{name}_expires_at")
        verb = "expired" if end is not None and end <= now else "expires"
        text = "does not say when it expires" if end is None else f"{verb} {_describe(end)}"
        path = facts.pop(name, None)
        facts[name] = f"{path}, {text}" if path else text
    if times is not None and times.expires_at <= now:
        facts["token"] += f"; run: {login_command(arguments)}"
    for name, fact in facts.items():
        print(f"{name:<12}{printable(str(fact or '-'))}")
