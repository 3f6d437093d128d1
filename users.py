"""Users and their passwords: the users file, the seeded users, and the hash of a password.

    user = make_user("alice", "user", "correct horse")
    users = parse_users(f"{user}\n".encode(), "the users file")
    password_matches("correct horse", users[0].password_hash)

`auth.py` decides what a user may do and how users log in. This module does no I/O.

Thread safety: there is no shared state.

Sources: OWASP Password Storage Cheat Sheet (scrypt parameters), RFC 7914 (scrypt).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

__all__ = [
    "SEEDED_USERS",
    "Role",
    "User",
    "UsersFileError",
    "base64url",
    "has_public_password",
    "hash_password",
    "make_user",
    "parse_users",
    "password_matches",
]

# The parameters that OWASP asks for: N=2^17, r=8, p=1. One hash takes about 0.5 s and 128 MiB. No
# other parameters are accepted: the time of a login would reveal the users that have them.
_SCRYPT_LOG2_N = 17
_SCRYPT_R = 8
_SCRYPT_P = 1
_SALT_BYTES = 16
_HASH_BYTES = 32

_USER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SALT_AND_HASH = re.compile(r"([A-Za-z0-9_-]{22})\$([A-Za-z0-9_-]{43})")


class UsersFileError(ValueError):
    """The users file is wrong; the message names the line and the right form."""


class Role(Enum):
    """The rights of a user."""

    ADMIN = "admin"  # may see and stop every job
    USER = "user"  # may see and stop their own jobs


@dataclass(frozen=True, slots=True)
class User:
    """A user, as in one line of the users file."""

    name: str
    role: Role
    password_hash: str = field(repr=False)
    account: str = field(default="", repr=False)
    """The host's account that jobs run as, where they run as accounts; "" for that of the name."""

    def __str__(self) -> str:
        """Return the line of the users file."""
        line = f"{self.name}:{self.role.value}:{self.password_hash}"
        return f"{line}:{self.account}" if self.account else line


# Their passwords are their names, and the documentation says so.
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


def make_user(name: str, role: str, password: str) -> User:
    """Make an entry for the users file. Raises ValueError for a bad name, role or password."""
    if not _USER_NAME.fullmatch(name):
        raise ValueError(
            f"bad user name {name!r}; use up to 64 letters, digits and . _ @ -, and begin with a "
            "letter or digit"
        )
    if not password:
        raise ValueError("the password must not be empty; type one, or send it as a line to stdin")
    try:
        password.encode()
    except UnicodeEncodeError:
        # The text of that error contains a part of the password.
        raise ValueError("the password must be UTF-8, or no login could send it") from None
    return User(name, Role(role), hash_password(password))


def parse_users(data: bytes, source: str) -> tuple[User, ...]:
    """Return the users of a file: `NAME:ROLE:HASH`, or `NAME:ROLE:HASH:ACCOUNT`, in each line.

    Blank lines and comments are skipped.

    `data`: the content of the file. `source`: its name, for errors. A comment begins with
    `#`. Raises `UsersFileError`.
    """
    users: dict[str, User] = {}
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        try:
            name, role, password_hash, *account = entry.split(":")
            user = User(name, Role(role), password_hash, *account)
        except (ValueError, TypeError):  # TypeError: there are more fields
            user = None
        if user is None or not _USER_NAME.fullmatch(user.name):
            raise UsersFileError(
                f"{source}, line {number}: not NAME:ROLE:HASH or "
                "NAME:ROLE:HASH:ACCOUNT with the role admin or user; "
                "make an entry with: ./server user NAME --role ROLE"
            )
        try:
            _parse_hash(user.password_hash)
        except ValueError as error:
            raise UsersFileError(
                f"{source}, line {number}: {error}; make a new entry with: "
                f"./server user {user.name} --role {user.role.value}"
            ) from None
        if user.name in users:
            raise UsersFileError(
                f"{source}, line {number}: a second entry for {user.name}; delete one of them"
            )
        users[user.name] = user
    if not users:
        raise UsersFileError(
            f"{source}: no users in it; make an entry with: ./server user NAME --role ROLE"
        )
    return tuple(users.values())


def base64url(data: bytes) -> str:
    """Return the data in base64url without padding, as hashes and tokens have it."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def has_public_password(user: User) -> bool:
    """Whether `user` has the well-known password of a seeded user."""
    return user in SEEDED_USERS or (
        user.name in {seeded.name for seeded in SEEDED_USERS}
        and password_matches(user.name, user.password_hash)
    )


# --- passwords ------------------------------------------------------------------------


def hash_password(password: str) -> str:
    """Return `scrypt$LOG2_N$R$P$SALT$HASH` with a new salt. Takes 0.5 s and 128 MiB.

    SALT and HASH are in base64url.
    """
    salt = secrets.token_bytes(_SALT_BYTES)
    return f"{_prefix()}{base64url(salt)}${base64url(_scrypt(password, salt))}"


def password_matches(password: str, password_hash: str) -> bool:
    """Whether the hash is that of `password`. Always takes 0.5 s and 128 MiB.

    Raises ValueError if `password_hash` was not made by `hash_password`.
    """
    salt, digest = _parse_hash(password_hash)
    return hmac.compare_digest(_scrypt(password, salt), digest)


def _prefix() -> str:
    return f"scrypt${_SCRYPT_LOG2_N}${_SCRYPT_R}${_SCRYPT_P}$"


def _parse_hash(password_hash: str) -> tuple[bytes, bytes]:
    """Return salt and hash of a result of `hash_password`. Raises ValueError."""
    prefix = _prefix()
    parts = _SALT_AND_HASH.fullmatch(password_hash.removeprefix(prefix))
    if not password_hash.startswith(prefix) or parts is None:
        raise ValueError(f"not a password hash of the accepted form ({prefix}SALT$HASH)")
    salt, digest = (base64.urlsafe_b64decode(part + "==") for part in parts.groups())
    return salt, digest


def _scrypt(password: str, salt: bytes) -> bytes:
    n = 1 << _SCRYPT_LOG2_N
    return hashlib.scrypt(
        # A password with a lone surrogate is just a wrong password.
        password.encode(errors="surrogatepass"),
        salt=salt,
        n=n,
        r=_SCRYPT_R,
        p=_SCRYPT_P,
        dklen=_HASH_BYTES,
        # the need by RFC 7914 section 2, and some reserve
        maxmem=128 * _SCRYPT_R * (n + _SCRYPT_P + 2) + 1024 * 1024,
    )
