"""Who may call, and what: logins, tokens, logouts, and the one permission table.

    authenticator = Authenticator(
        users=SEEDED_USERS,
        key=load_key("state/token.key"),
        revocations=Revocations("state/revoked"),
    )
    token, expires_at = authenticator.login("user", "user", certificate, "192.0.2.1")
    identity = authenticator.authenticate(token, certificate)
    identity.reaches(job.owner)
    authenticator.logout(identity)

A certificate is given as its DER bytes; a token is worth nothing without the one
that was presented at login. It ends with its expiry, a logout, and any change of its
user's name, role or password. This module does no I/O but for the key's file, and
knows nothing of gRPC.

Thread safety: everything may be called from any thread. Nothing is held during a
password's hashing but one of the few places for it. No lock is taken inside another.

Sources: RFC 7519 (JWT), RFC 8725 (its pitfalls), RFC 8705 section 3.1 (`cnf`,
`x5t#S256`).
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import tempfile
import threading
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import jwt

from revocations import RevocationError, Revocations
from throttle import LoginThrottle, TooManyLoginsError
from users import Role, User, password_matches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "PERMISSIONS",
    "AuthenticationError",
    "Authenticator",
    "Identity",
    "LoginsClosedError",
    "RevocationError",
    "Revocations",
    "Role",
    "TokenError",
    "TooManyLoginsError",
    "load_key",
    "may_call",
]

TOKEN_LIFETIME: Final = timedelta(days=30)
_ISSUER = "job-worker"
_AUDIENCE = "jobworker.v1"
_ALGORITHM = "HS256"
_KEY_BYTES = 32
_ENTRY_BYTES = 16
_THUMBPRINT = "x5t#S256"
_TOKEN_MAX_CHARACTERS = 2048  # ours have some 600; nothing longer is looked at
_KNOWN_TOKENS = 1024
_TOKEN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# PyJWT looks whether the key is JSON, for which one key of a hundred looks like UTF-16 or
# UTF-32. A server that has given up its rights may be unable to read the library of Python.
for _encoding in (
    *("utf-8-sig", "utf-16", "utf-16-be", "utf-16-le"),
    *("utf-32", "utf-32-be", "utf-32-le"),
):
    codecs.lookup(_encoding)

# Each takes a core, 128 MiB and about 0.5 s.
_HASHES_AT_ONCE = 2

# Whoever has one IPv6 address has all that share these bits with it (RFC 6177).
_IPV6_PEER_BITS = 64


class AuthenticationError(Exception):
    """The caller is not who they must be. The message tells nothing that helps to guess."""


class TokenError(AuthenticationError):
    """There is no token, or it is not valid: one message, whatever is wrong."""

    def __init__(self) -> None:
        super().__init__(
            "no valid token; log in (again), and send it as the metadata `authorization: "
            "Bearer TOKEN`, with the client certificate of the login"
        )


class LoginsClosedError(Exception):
    """The authenticator was closed."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is calling, as their token and their certificate prove."""

    name: str
    role: Role
    token_id: str
    """The token's `jti`."""
    expires_at: datetime
    """When the token does, UTC."""
    entry: str = field(repr=False)
    """A digest of the user's entry, to see whether it has changed."""

    def reaches(self, owner: str) -> bool:
        """Whether this caller may see and stop the jobs of `owner`."""
        return self.role is Role.ADMIN or self.name == owner

    def has_expired(self) -> bool:
        """Whether the token's time is over."""
        return datetime.now(UTC) >= self.expires_at


_EVERYONE = frozenset(Role)

# Each RPC and the roles that may call it; None: no token is needed. What is not in
# here is denied. Which jobs a caller reaches is `Identity.reaches`.
PERMISSIONS: Final[Mapping[str, frozenset[Role] | None]] = {
    "/jobworker.v1.AuthService/Login": None,
    "/jobworker.v1.AuthService/Logout": _EVERYONE,
    "/jobworker.v1.WorkerService/StartJob": _EVERYONE,
    "/jobworker.v1.WorkerService/StopJob": _EVERYONE,
    "/jobworker.v1.WorkerService/GetJobStatus": _EVERYONE,
    "/jobworker.v1.WorkerService/StreamOutput": _EVERYONE,
    "/jobworker.v1.WorkerService/ListJobs": _EVERYONE,
    "/jobworker.v1.WorkerService/RemoveJob": _EVERYONE,
}


def may_call(method: str, role: Role) -> bool:
    """Whether `role` may call `method` ("/package.Service/Method")."""
    return role in (PERMISSIONS.get(method) or ())


class Authenticator:
    """Checks passwords and tokens against a table of users.

    `key`: the 32 bytes that sign tokens. `revocations`: where logouts are kept, the
    caller's to close; None for in memory only. Raises ValueError for two users of one
    name or none at all.
    """

    def __init__(
        self, *, users: Iterable[User], key: bytes, revocations: Revocations | None = None
    ) -> None:
        self._key = key
        self._revocations = Revocations(None) if revocations is None else revocations
        self._throttle = LoginThrottle()
        self._hashes = threading.BoundedSemaphore(_HASHES_AT_ONCE)
        self._closed = threading.Event()
        # Guards the watchers, whose keys only tell them apart. Never held while one is called.
        self._lock = threading.Lock()
        self._watchers: dict[object, tuple[Identity, Callable[[], None]]] = {}
        # Those who came with a token that is ours, which takes a while to find out, by the
        # digests of token and certificate; no more than _KNOWN_TOKENS.
        self._known: dict[bytes, Identity] = {}
        self._signed: dict[str, str] = {}  # the users of tokens that are ours, as many
        # By name; only ever replaced as a whole, so whoever reads it once has one state.
        self._users: Mapping[str, User] = {}
        self.set_users(users)

    def close(self) -> None:
        """Give up the logins that wait for others to be checked; idempotent.

        Does not wait for those that are being checked. Tokens are still accepted.
        """
        self._closed.set()

    def set_users(self, users: Iterable[User]) -> None:
        """Replace the table of users, for all threads at once.

        The tokens of those who are not in it any more, or with another role or password
        hash, are invalid from now on. Raises ValueError, as the constructor does, and then
        changes nothing.
        """
        users = tuple(users)
        by_name = {user.name: user for user in users}
        if not by_name or len(by_name) != len(users):
            raise ValueError("there must be users, and each name only once")
        self._users = by_name
        self._tell_watchers()

    def login(
        self, username: str, password: str, certificate: bytes, peer: str
    ) -> tuple[str, datetime]:
        """Check the password; return a token bound to `certificate`, and its expiry (UTC).

        `peer`: the network address of the caller. Takes about 0.5 s, and up to 2 s when
        others log in at the same time. Raises `AuthenticationError`, the same and after the
        same time for an unknown user and a wrong password; `TooManyLoginsError`, at once;
        `LoginsClosedError`.
        """
        users = self._users
        user = users.get(username)
        # For an unknown user somebody's hash is computed all the same.
        some_hash = (user or next(iter(users.values()))).password_hash
        with (
            self._throttle.attempt(username, _peer_key(peer, certificate)) as attempt,
            self._hashes,
        ):
            if self._closed.is_set():
                raise LoginsClosedError
            attempt.succeeded = password_matches(password, some_hash) and user is not None
        if user is None or not attempt.succeeded:
            raise AuthenticationError("wrong user name or password")
        now = datetime.now(UTC).replace(microsecond=0)
        token = self._token(user, str(uuid.uuid4()), int(now.timestamp()), certificate)
        return token, now + TOKEN_LIFETIME

    def authenticate(self, token: str, certificate: bytes) -> Identity:
        """Return who presents `token` over a connection with `certificate`.

        Raises `TokenError`, whatever is wrong.
        """
        if len(token) <= _TOKEN_MAX_CHARACTERS and token.isascii():
            key = _digest(token.encode()) + _digest(certificate)
            identity = self._known.get(key) or self._decode(token, certificate)
            if identity is not None and self.is_valid(identity):
                if len(self._known) >= _KNOWN_TOKENS:
                    self._known.clear()
                self._known[key] = identity
                return identity
        raise TokenError

    def signed_for(self, token: str) -> str | None:
        """Return the user named in `token` if this server has signed it, else None.

        This says whose queue a call waits in, and nothing more: `authenticate` checks the token.
        Takes some microseconds.
        """
        name = self._signed.get(token)
        if name is not None or len(token) > _TOKEN_MAX_CHARACTERS or not token.isascii():
            return name
        signed, _, signature = token.rpartition(".")
        if not hmac.compare_digest(
            signature, _base64(hmac.digest(self._key, signed.encode(), "sha256"))
        ):
            return None
        payload = signed.partition(".")[2]
        try:
            name = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["sub"]
        except (ValueError, LookupError, TypeError, RecursionError):  # not written by `login`
            return None
        if not isinstance(name, str) or name not in self._users:
            return None
        if len(self._signed) >= _KNOWN_TOKENS:
            self._signed.clear()
        self._signed[token] = name
        return name

    def _decode(self, token: str, certificate: bytes) -> Identity | None:
        """Return whom a token of ours was given to; None if it is not ours."""
        # Without the key nobody gets further than the signature: what is in the payload
        # is ours. All the same, nothing but what `login` writes is accepted.
        with contextlib.suppress(jwt.InvalidTokenError):
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[_ALGORITHM],
                audience=_AUDIENCE,
                issuer=_ISSUER,
                options={"require": ["sub", "iat", "exp", "jti"]},
            )
            user = self._users.get(claims["sub"])
            issued_at, token_id = claims["iat"], claims["jti"]
            # The one comparison that covers header, role, entry, `cnf`, spelling, and
            # claims too many, too few or of the wrong type.
            if (
                user is not None
                and type(issued_at) is int
                and _TOKEN_ID.fullmatch(token_id)
                and hmac.compare_digest(token, self._token(user, token_id, issued_at, certificate))
            ):
                expires_at = datetime.fromtimestamp(claims["exp"], UTC)
                return Identity(user.name, user.role, token_id, expires_at, self._entry(user))
        return None

    def is_valid(self, identity: Identity) -> bool:
        """Whether the token of `identity` is still good: no expiry, logout or change of user."""
        user = self._users.get(identity.name)
        return (
            user is not None
            and hmac.compare_digest(identity.entry, self._entry(user))
            and identity.token_id not in self._revocations
            and not identity.has_expired()
        )

    def logout(self, identity: Identity) -> None:
        """Make the token of `identity` invalid for good; idempotent.

        Blocks until it is on the disk. Raises `RevocationError`, and then the token is as
        valid as before.
        """
        self._revocations.add(identity.token_id, identity.expires_at)
        self._tell_watchers()

    def watch(self, identity: Identity, on_invalid: Callable[[], None]) -> Callable[[], None]:
        """Have `on_invalid` called once when a logout or `set_users` ends the token of `identity`.

        At once if it is not valid now. Expiry alone calls nothing: ask `Identity.has_expired`. The
        call comes from the thread that ended the token; it must not block or raise. Returns
        a function, idempotent, that takes this back; a call that has begun goes on.
        """
        key = object()
        with self._lock:
            # Looked at while nobody can tell the watchers, so that no end falls between.
            is_valid = self.is_valid(identity)
            if is_valid:
                self._watchers[key] = (identity, on_invalid)
        if not is_valid:
            on_invalid()

        def forget() -> None:
            with self._lock:
                self._watchers.pop(key, None)

        return forget

    def _tell_watchers(self) -> None:
        with self._lock:
            invalid = {
                key: on_invalid
                for key, (identity, on_invalid) in self._watchers.items()
                if not self.is_valid(identity)
            }
            for key in invalid:
                del self._watchers[key]
        for on_invalid in invalid.values():
            on_invalid()

    def _token(self, user: User, token_id: str, issued_at: int, certificate: bytes) -> str:
        claims = {
            "iss": _ISSUER,
            "aud": _AUDIENCE,
            "sub": user.name,
            "role": user.role.value,
            "entry": self._entry(user),
            "iat": issued_at,
            "exp": issued_at + int(TOKEN_LIFETIME.total_seconds()),
            "jti": token_id,
            "cnf": {_THUMBPRINT: _thumbprint(certificate)},
        }
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM)

    def _entry(self, user: User) -> str:
        # Keyed, so that a token tells nothing about the hash. The key signs tokens as well,
        # but what is signed there has no colon and this always has.
        return _base64(hmac.digest(self._key, str(user).encode(), "sha256")[:_ENTRY_BYTES])


def _thumbprint(certificate: bytes) -> str:
    return _base64(_digest(certificate))


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _peer_key(peer: str, certificate: bytes) -> str:
    """Return what the throttle takes for one place to log in from."""
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv6Address(peer)
        if address.ipv4_mapped is None:
            network = ipaddress.IPv6Network((int(address), _IPV6_PEER_BITS), strict=False)
            peer = str(network)
    return f"{peer} {_thumbprint(certificate)}"


# --- the token key ---------------------------------------------------------------------


def load_key(path: str | os.PathLike[str]) -> bytes:
    """Return the token key kept in `path`, made with mode 0600 when there is none yet.

    Raises OSError; ValueError when the file is not a key or others may read it.
    """
    path = Path(path)
    with contextlib.suppress(FileNotFoundError):
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise ValueError(
                f"{path} is not a token key of {_KEY_BYTES} bytes; delete it to get a new one "
                "(every token becomes invalid)"
            )
        if path.stat().st_mode & 0o077:
            raise ValueError(f"others can read the token key; run: chmod 600 {path}")
        return key
    # A link appears whole or not at all, whoever else is making one at this moment.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".key-") as new:
        new.write(secrets.token_bytes(_KEY_BYTES))
        new.flush()
        os.fsync(new.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(new.name, path)
    return load_key(path)
