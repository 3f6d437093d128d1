"""Who may call, and what: users, passwords, tokens, and the one permission table.

    authenticator = Authenticator(users=SEEDED_USERS, key=load_key("state/token.key"))
    token, expires_at = authenticator.login("user", "user", certificate)
    identity = authenticator.authenticate(token, certificate)
    identity.reaches(job.owner)

A certificate is given as its DER bytes; a token is worth nothing without the one
that was presented at login. This module does no I/O but for its two files, and
knows nothing of gRPC.

Thread safety: everything may be called from any thread. Nothing is held during a
password's hashing but one of the few places for it.

Sources: RFC 7519 (JWT), RFC 8705 section 3.1 (`cnf`, `x5t#S256`), OWASP Password
Storage Cheat Sheet (scrypt parameters).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
import threading
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jwt

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "PERMISSIONS",
    "SEEDED_USERS",
    "AuthenticationError",
    "Authenticator",
    "Identity",
    "LoginsClosedError",
    "Role",
    "TooManyLoginsError",
    "User",
    "UsersFileError",
    "has_public_password",
    "hash_password",
    "load_key",
    "load_users",
    "may_call",
]

TOKEN_LIFETIME: Final = timedelta(days=30)
_ISSUER = "job-worker"
_AUDIENCE = "jobworker.v1"
_ALGORITHM = "HS256"
_KEY_BYTES = 32
_REQUIRED_CLAIMS = ["iss", "aud", "sub", "role", "iat", "exp", "jti", "cnf"]
_THUMBPRINT = "x5t#S256"

# scrypt as OWASP asks: N=2^17, r=8, p=1. One hash takes about 0.5 s and 128 MiB, so
# only a few run at once and a few more wait.
_SCRYPT_LOG2_N = 17
_SCRYPT_R = 8
_SCRYPT_P = 1
_SCRYPT_MAX_LOG2_N = 20
_SALT_BYTES = 16
_HASH_BYTES = 32
_HASHES_AT_ONCE = 2
_LOGINS_AT_ONCE = 8

_USER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class AuthenticationError(Exception):
    """The caller is not who they must be. The message tells nothing that helps to guess."""


class LoginsClosedError(Exception):
    """The authenticator was closed."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class TooManyLoginsError(Exception):
    """More logins are under way than the server takes at once."""

    def __init__(self) -> None:
        super().__init__("too many logins at once; try again in a few seconds")


class UsersFileError(ValueError):
    """The users file is wrong; the message names the line and the right form."""


class Role(Enum):
    """What a user is."""

    ADMIN = "admin"  # reaches every job
    USER = "user"  # reaches their own jobs


@dataclass(frozen=True, slots=True)
class User:
    """An entry of the users table."""

    name: str
    role: Role
    password_hash: str = field(repr=False)

    def __str__(self) -> str:
        """The entry as it stands in a users file."""
        return f"{self.name}:{self.role.value}:{self.password_hash}"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is calling, as their token and their certificate prove."""

    name: str
    role: Role

    def reaches(self, owner: str) -> bool:
        """Whether this caller may see and stop the jobs of `owner`."""
        return self.role is Role.ADMIN or self.name == owner


_EVERYONE = frozenset(Role)

# Each RPC and the roles that may call it; None: no token is needed. What is not in
# here is denied. Which jobs a caller reaches is `Identity.reaches`.
PERMISSIONS: Final[Mapping[str, frozenset[Role] | None]] = {
    "/jobworker.v1.AuthService/Login": None,
    "/jobworker.v1.WorkerService/StartJob": _EVERYONE,
    "/jobworker.v1.WorkerService/StopJob": _EVERYONE,
    "/jobworker.v1.WorkerService/GetJobStatus": _EVERYONE,
    "/jobworker.v1.WorkerService/StreamOutput": _EVERYONE,
    "/jobworker.v1.WorkerService/ListJobs": _EVERYONE,
}


def may_call(method: str, role: Role) -> bool:
    """Whether `role` may call `method` ("/package.Service/Method")."""
    return role in (PERMISSIONS.get(method) or ())


# Their passwords are their names, as the documentation tells everybody.
SEEDED_USERS: Final = (
    User(
        "admin",
        Role.ADMIN,
        "scrypt$17$8$1$3KPeR6euCs0VcdrazV67eA$uDdjFrRiYb8y8Ua7rYVw0GOA2Wrranw3Q2aWPw4Yo-I",
    ),
    User(
        "user",
        Role.USER,
        "scrypt$17$8$1$8rDromLblb-Hpr595lVKog$3FlVXG5vlZ73LhjAfEiWPoOhbyY9x7UJ4DCZGtWJDnA",
    ),
)


class Authenticator:
    """Checks passwords and tokens against a table of users.

    `key`: the 32 bytes that sign tokens. Raises ValueError for two users of one name
    or none at all.
    """

    def __init__(self, *, users: Iterable[User], key: bytes) -> None:
        users = tuple(users)
        self._users = {user.name: user for user in users}
        if not self._users or len(self._users) != len(users):
            raise ValueError("there must be users, and each name only once")
        self._key = key
        self._logins = threading.BoundedSemaphore(_LOGINS_AT_ONCE)
        self._hashes = threading.BoundedSemaphore(_HASHES_AT_ONCE)
        self._closed = threading.Event()

    def close(self) -> None:
        """Give up the logins that wait for others to be checked; idempotent.

        Does not wait for those that are being checked. Tokens are still accepted.
        """
        self._closed.set()

    def login(self, username: str, password: str, certificate: bytes) -> tuple[str, datetime]:
        """Check the password; return a token bound to `certificate`, and its expiry (UTC).

        Takes about 0.5 s, and up to 2 s when others log in at the same time. Raises
        `AuthenticationError`, the same and after the same time for an unknown user and a
        wrong password; `TooManyLoginsError`, at once; `LoginsClosedError`.
        """
        if not self._logins.acquire(blocking=False):
            raise TooManyLoginsError
        try:
            user = self._users.get(username)
            # For an unknown user somebody's hash is computed all the same.
            some_hash = (user or next(iter(self._users.values()))).password_hash
            with self._hashes:
                if self._closed.is_set():
                    raise LoginsClosedError
                matches = _password_matches(password, some_hash)
        finally:
            self._logins.release()
        if user is None or not matches:
            raise AuthenticationError("wrong user name or password")
        issued_at = datetime.now(UTC).replace(microsecond=0)
        expires_at = issued_at + TOKEN_LIFETIME
        claims = {
            "iss": _ISSUER,
            "aud": _AUDIENCE,
            "sub": user.name,
            "role": user.role.value,
            "iat": issued_at,
            "exp": expires_at,
            "jti": str(uuid.uuid4()),
            "cnf": {_THUMBPRINT: _thumbprint(certificate)},
        }
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM), expires_at

    def authenticate(self, token: str, certificate: bytes) -> Identity:
        """Return who presents `token` over a connection with `certificate`.

        Raises `AuthenticationError`, with one message whatever is wrong.
        """
        with contextlib.suppress(jwt.InvalidTokenError):
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[_ALGORITHM],
                audience=_AUDIENCE,
                issuer=_ISSUER,
                options={"require": _REQUIRED_CLAIMS},
            )
            user = self._users.get(claims["sub"])
            # A role that was changed since makes the token as good as none.
            if (
                user is not None
                and claims["role"] == user.role.value
                and _is_bound_to(claims, certificate)
            ):
                return Identity(user.name, user.role)
        raise AuthenticationError("the token is not valid (any more) here; log in again")


def _is_bound_to(claims: Mapping[str, Any], certificate: bytes) -> bool:
    confirmation = claims["cnf"]
    bound = confirmation.get(_THUMBPRINT) if isinstance(confirmation, dict) else None
    return isinstance(bound, str) and hmac.compare_digest(
        bound.encode(), _thumbprint(certificate).encode()
    )


def _thumbprint(certificate: bytes) -> str:
    return _base64(hashlib.sha256(certificate).digest())


# --- passwords ------------------------------------------------------------------------


def hash_password(password: str) -> str:
    """Return `scrypt$LOG2_N$R$P$SALT$HASH` with a new salt, both in base64url."""
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = _scrypt(password, salt, _SCRYPT_LOG2_N, _SCRYPT_R, _SCRYPT_P)
    cost = f"{_SCRYPT_LOG2_N}${_SCRYPT_R}${_SCRYPT_P}"
    return f"scrypt${cost}${_base64(salt)}${_base64(digest)}"


def has_public_password(user: User) -> bool:
    """Whether `user` is one of the seeded users, or has the same well-known password."""
    return user in SEEDED_USERS or (
        user.name in {seeded.name for seeded in SEEDED_USERS}
        and _password_matches(user.name, user.password_hash)
    )


def _password_matches(password: str, password_hash: str) -> bool:
    cost, salt, digest = _parse_hash(password_hash)
    return hmac.compare_digest(_scrypt(password, salt, *cost), digest)


def _parse_hash(password_hash: str) -> tuple[tuple[int, int, int], bytes, bytes]:
    """Take `hash_password`'s result apart. Raises ValueError."""
    scheme, log2_n, r, p, salt, digest = password_hash.split("$")
    cost = (int(log2_n), int(r), int(p))
    if scheme != "scrypt" or not 1 <= cost[0] <= _SCRYPT_MAX_LOG2_N or min(cost) < 1:
        raise ValueError("not a scrypt hash")
    raw_salt, raw_digest = (base64.urlsafe_b64decode(part + "==") for part in (salt, digest))
    if len(raw_digest) != _HASH_BYTES:
        raise ValueError("not a scrypt hash of 32 bytes")
    return cost, raw_salt, raw_digest


def _scrypt(password: str, salt: bytes, log2_n: int, r: int, p: int) -> bytes:
    n = 1 << log2_n
    return hashlib.scrypt(
        password.encode(),
        salt=salt,
        n=n,
        r=r,
        p=p,
        dklen=_HASH_BYTES,
        maxmem=128 * r * (n + p + 2) + 1024 * 1024,  # RFC 7914 section 2, and some room
    )


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


# --- files ------------------------------------------------------------------------------


def make_user(name: str, role: str, password: str) -> User:
    """Make an entry for the users file. Raises ValueError for a bad name, role or password."""
    if not _USER_NAME.fullmatch(name):
        raise ValueError(
            f"bad user name {name!r}: up to 64 letters, digits and . _ @ -, a letter or digit first"
        )
    if not password:
        raise ValueError("the password must not be empty")
    return User(name, Role(role), hash_password(password))


def load_users(path: str | os.PathLike[str]) -> tuple[User, ...]:
    """Read a users file: one `NAME:ROLE:HASH` a line, blank lines and `#` comments apart.

    Raises OSError; `UsersFileError` for anything that is wrong in it.
    """
    users: dict[str, User] = {}
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        try:
            name, role, password_hash = entry.split(":")
            _parse_hash(password_hash)
            user = User(name, Role(role), password_hash)
        except ValueError:
            user = None
        if user is None or not _USER_NAME.fullmatch(user.name):
            raise UsersFileError(
                f"{path}, line {number}: not NAME:ROLE:HASH with the role admin or user; "
                "make an entry with: ./server user NAME --role ROLE"
            )
        if user.name in users:
            raise UsersFileError(f"{path}, line {number}: a second entry for {user.name}")
        users[user.name] = user
    if not users:
        raise UsersFileError(f"{path}: no users in it")
    return tuple(users.values())


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
