"""Authentication: logins, tokens and how long they last, logouts, and what each role may call.

    running = RunningTime(store)
    authenticator = Authenticator(
        users=SEEDED_USERS,
        key=load_key("state/token.key"),
        revocations=Revocations(store, running),
        running=running,
        store=store,
    )
    token, expires_at = authenticator.login("user", "user", certificate, "192.0.2.1")
    identity = authenticator.authenticate(token, certificate)
    identity.reaches(job.owner)
    token, expires_at = authenticator.refresh(identity, certificate)
    authenticator.logout(identity)

A certificate is given as its DER bytes. A token is valid only together with the certificate
of its login. It ends with its expiry, with a logout, and with any change of the name, role
or password of its user.

A *session* begins with a login. A valid token can be refreshed: exchanged for a new one of the same
session, until the session ends. The old token stays valid until its own expiry. No token outlives
its session. A logout ends the session, so it ends every token of the session at once, and none of
them can be refreshed any more.

This module reads and writes only the file of the key, and knows nothing of gRPC.

Thread safety: any thread may call anything. One login at a time hashes its password, for which the
others wait. No lock is taken inside another.

Sources: RFC 7519 (JWT), RFC 8725 (its pitfalls), RFC 8705 section 3.1 (`cnf`, `x5t#S256`).
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
import time
import uuid
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeGuard

import jwt

import memory
from revocations import RevocationError, Revocations, RunningTime
from throttle import LoginThrottle, TooManyLoginsError
from trustedfiles import open_private
from users import Role, User, base64url, password_matches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from store import Store

__all__ = [
    "PERMISSIONS",
    "AuthenticationError",
    "Authenticator",
    "Identity",
    "LoginMemoryError",
    "LoginsClosedError",
    "RevocationError",
    "Revocations",
    "Role",
    "RunningTime",
    "Session",
    "TokenError",
    "TooManyLoginsError",
    "load_key",
    "may_call",
]

TOKEN_LIFETIME: Final = timedelta(days=30)
SESSION_LIFETIME: Final = timedelta(days=30)
_ISSUER = "job-worker"
_AUDIENCE = "jobworker.v1"
_ALGORITHM = "HS256"
_KEY_BYTES = 32
_ENTRY_BYTES = 16
_THUMBPRINT = "x5t#S256"
_TOKEN_MAX_CHARACTERS = 2048  # a token has some 750
_KNOWN_TOKENS = 1024
# In the order of the fields of `Session`.
_SESSION_CLAIMS = ("sid", "auth_time", "session_exp", "session_run")
_REQUIRED_CLAIMS = ["sub", "iat", "exp", "jti", "run", *_SESSION_CLAIMS]
_TOKEN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# PyJWT tries to read the key as JSON, and one key in a hundred looks like UTF-16 or UTF-32. So the
# codecs are loaded now: a server that has given up root may be unable to read Python's files.
for _encoding in (
    *("utf-8-sig", "utf-16", "utf-16-be", "utf-16-le"),
    *("utf-32", "utf-32-be", "utf-32-le"),
):
    codecs.lookup(_encoding)

# A hash takes a core, 128 MiB and about 0.5 s. One at a time: that bounds the need for memory.
_HASHES_AT_ONCE = 1
# What must be left for a hash: its memory, and some for everything else meanwhile.
_HASH_BYTES = 160 * 1024 * 1024

# The owner of an IPv6 address has all addresses with the same first 64 bits (RFC 6177).
_IPV6_PEER_BITS = 64


class AuthenticationError(Exception):
    """The login failed. The message is the same for each cause, so it helps nobody to guess."""


class TokenError(AuthenticationError):
    """The token is missing or invalid. The message is the same for each cause."""

    def __init__(self) -> None:
        super().__init__(
            "no valid token in the metadata `authorization: Bearer TOKEN`: it has expired, was "
            "revoked, or belongs to another client certificate; log in again"
        )


class LoginMemoryError(Exception):
    """There is too little memory for a login. Attribute: `retry_after_s`."""

    retry_after_s = 5

    def __init__(self) -> None:
        super().__init__(
            "a login needs 128 MiB of memory for a moment, which the server does not have left; "
            f"try again in {self.retry_after_s} s, or tell the operator"
        )


class LoginsClosedError(Exception):
    """The authenticator was closed."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


@dataclass(frozen=True, slots=True)
class Session:
    """What begins with a login, and ends with a logout or after the lifetime of sessions."""

    id: str
    """The `jti` of the login's token; the claim `sid` of all tokens of the session."""
    began_at_s: int
    """The time of the login, in seconds since 1970: the claim `auth_time`."""
    expires_at_s: int
    """The end of the session, in seconds since 1970."""
    ends_s: int
    """The running time of the server (`RunningTime`) at which the session ends at the latest."""

    @property
    def expires_at(self) -> datetime:
        """The end of the session, in UTC."""
        return datetime.fromtimestamp(self.expires_at_s, UTC)


@dataclass(frozen=True, slots=True)
class Identity:
    """The user who is calling, as proved by a token and its certificate."""

    name: str
    role: Role
    expires_at: datetime
    """The expiry of the token, in UTC."""
    ends_s: int
    """The running time of the server (`RunningTime`) at which the token ends at the latest."""
    entry: str = field(repr=False)
    """A digest of the user's entry in the users file: it changes with the entry."""
    session: Session

    def reaches(self, owner: str | None) -> TypeGuard[str]:
        """Whether this user may see and stop the jobs of `owner`. None is no owner: False.

        Does the same work for None and for somebody else.
        """
        return self.only_owner in (None, owner) and owner is not None

    @property
    def only_owner(self) -> str | None:
        """The owner whose jobs alone this user may see and stop; None: those of everybody."""
        return None if self.role is Role.ADMIN else self.name


_EVERYONE = frozenset(Role)

# Each RPC with the roles that may call it; None: it needs no token. An RPC that is missing here is
# denied. `Identity.reaches` decides about the job that a call is for.
PERMISSIONS: Final[Mapping[str, frozenset[Role] | None]] = {
    "/jobworker.v1.AuthService/Login": None,
    "/jobworker.v1.AuthService/Refresh": _EVERYONE,
    "/jobworker.v1.AuthService/Logout": _EVERYONE,
    "/jobworker.v1.WorkerService/StartJob": _EVERYONE,
    "/jobworker.v1.WorkerService/StopJob": _EVERYONE,
    "/jobworker.v1.WorkerService/SignalJob": _EVERYONE,
    "/jobworker.v1.WorkerService/GetJobStatus": _EVERYONE,
    "/jobworker.v1.WorkerService/StreamOutput": _EVERYONE,
    "/jobworker.v1.WorkerService/WriteInput": _EVERYONE,
    "/jobworker.v1.WorkerService/ListJobs": _EVERYONE,
    "/jobworker.v1.WorkerService/WatchJobs": _EVERYONE,
    "/jobworker.v1.WorkerService/RemoveJob": _EVERYONE,
    # What gRPC defines for every server; see standardservices.py.
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/List": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": None,
}


def may_call(method: str, role: Role) -> bool:
    """Whether `role` may call `method` ("/package.Service/Method")."""
    return role in (PERMISSIONS.get(method) or ())


class Authenticator:
    """Checks passwords and tokens against a table of users.

    `key`: the 32 bytes that sign tokens. `revocations`: the logged-out sessions, which the
    creator of the authenticator closes; None keeps them in memory only. `running`: the running
    time of the server, the same as that of `revocations`. `token_lifetime`, `session_lifetime`: in
    whole seconds; a token or session that was made for longer, before a restart, is not accepted.
    `store`: where failed logins are kept. Raises ValueError if there is no user, or if two users
    have the same name; `StoreError`.
    """

    def __init__(  # noqa: PLR0913 -- most are optional
        self,
        *,
        users: Iterable[User],
        key: bytes,
        revocations: Revocations | None = None,
        running: RunningTime | None = None,
        token_lifetime: timedelta = TOKEN_LIFETIME,
        session_lifetime: timedelta = SESSION_LIFETIME,
        store: Store | None = None,
    ) -> None:
        self._key = key
        self._token_lifetime_s = int(token_lifetime.total_seconds())
        self._session_lifetime_s = int(session_lifetime.total_seconds())
        self._running = RunningTime() if running is None else running
        self._revocations = Revocations(None, self._running) if revocations is None else revocations
        self._throttle = LoginThrottle(clock=self._running.seconds, store=store)
        self._hashes = threading.BoundedSemaphore(_HASHES_AT_ONCE)
        self._closed = threading.Event()
        # Guards `_watchers`. Never held while a watcher is called.
        self._lock = threading.Lock()
        self._watchers: dict[object, tuple[Identity, Callable[[], None]]] = {}
        # A cache, because the check of a signature takes time: the identities of valid tokens by
        # token and certificate. At most _KNOWN_TOKENS; a full cache is emptied.
        self._known: dict[tuple[str, bytes], Identity] = {}
        self._signed: dict[str, object] = {}  # the queues of tokens that are ours, as many
        # By name. Replaced as a whole, so reading them needs no lock.
        self._users: Mapping[str, User] = {}
        self._entries: Mapping[str, str] = {}
        self.set_users(users)

    def close(self) -> None:
        """Make the waiting logins fail; idempotent.

        Does not wait for the logins whose password is being hashed. Tokens stay valid.
        """
        self._closed.set()

    @property
    def user_count(self) -> int:
        """How many users there are."""
        return len(self._users)

    def set_users(self, users: Iterable[User]) -> None:
        """Replace the table of users, for all threads at once.

        A token is invalid from now on if its user is gone, or has another role or password
        hash. Raises ValueError like the constructor, and then changes nothing.
        """
        users = tuple(users)
        by_name = {user.name: user for user in users}
        if not by_name or len(by_name) != len(users):
            raise ValueError("there must be users, and each name only once")
        self._entries = {user.name: self._entry(user) for user in users}
        self._users = by_name
        self._tell_watchers()

    def login(
        self, username: str, password: str, certificate: bytes, peer: str
    ) -> tuple[str, datetime]:
        """Check the password; return a token bound to `certificate`, and its expiry (UTC).

        `peer`: the network address of the client. Takes about 0.5 s, and up to 4 s while
        others log in. Raises `AuthenticationError`, with the same text and after the same
        time for an unknown user and for a wrong password; `TooManyLoginsError`, at once;
        `LoginMemoryError`; `LoginsClosedError`.
        """
        users = self._users
        user = users.get(username)
        # For an unknown user the hash of another user is computed, which takes the same time.
        some_hash = (user or next(iter(users.values()))).password_hash
        with (
            self._throttle.attempt(
                username, _peer_key(peer, certificate), _thumbprint(certificate)
            ) as attempt,
            self._hashes,
        ):
            if self._closed.is_set():
                raise LoginsClosedError
            if memory.left_bytes() < _HASH_BYTES:
                raise LoginMemoryError
            try:
                matches = password_matches(password, some_hash)
            except (MemoryError, ValueError) as error:  # OpenSSL got no memory
                raise LoginMemoryError from error
            attempt.succeeded = matches and user is not None
        if user is None or not attempt.succeeded:
            raise AuthenticationError("wrong user name or password")
        now, running_s, token_id = int(time.time()), self._running.now_s(), str(uuid.uuid4())
        ends_s = running_s + self._session_lifetime_s
        session = Session(token_id, now, now + self._session_lifetime_s, ends_s)
        return self._issue(user, session, token_id, (now, running_s), certificate)

    def refresh(self, identity: Identity, certificate: bytes) -> tuple[str, datetime]:
        """Return a new token of the same session, and its expiry (UTC), which the session bounds.

        The token of `identity`, which came with `certificate`, stays valid until its own expiry.
        Raises `TokenError` if it is not valid any more, or if the session has ended.
        """
        user = self._users.get(identity.name)
        issued = int(time.time()), self._running.now_s()
        if user is None or not self.is_valid(identity) or _life_s(identity.session, issued) <= 0:
            raise TokenError
        return self._issue(user, identity.session, str(uuid.uuid4()), issued, certificate)

    def _issue(
        self,
        user: User,
        session: Session,
        token_id: str,
        issued: tuple[int, int],
        certificate: bytes,
    ) -> tuple[str, datetime]:
        """Return a new token and its expiry. `issued`: see `_token`."""
        life_s = min(self._token_lifetime_s, _life_s(session, issued))
        expires_at_s = issued[0] + life_s
        token = self._token(user, session, token_id, (*issued, expires_at_s), certificate)
        self._running.save()
        return token, datetime.fromtimestamp(expires_at_s, UTC)

    def authenticate(self, token: str, certificate: bytes) -> Identity:
        """Return the user of `token`, which came over a connection with `certificate`.

        Raises `TokenError`.
        """
        if len(token) <= _TOKEN_MAX_CHARACTERS and token.isascii():
            key = token, certificate
            identity = self._known.get(key) or self._decode(token, certificate)
            if identity is not None and self.is_valid(identity):
                if len(self._known) >= _KNOWN_TOKENS:
                    self._known.clear()
                self._known[key] = identity
                return identity
        # A thief of the token, or of one that has ended, is not to fill the queue of its user.
        if isinstance(name := self._signed.get(token), str):
            self._signed[token] = name, "refused"
        raise TokenError

    def signed_for(self, token: str) -> object | None:
        """Return whose queue a call with `token` waits in; None if this server has not signed it.

        That of the user whom the token names, or another one of the user's once the token has been
        refused: `authenticate` checks the token. Takes some microseconds.
        """
        name = self._signed.get(token)
        if name is not None or len(token) > _TOKEN_MAX_CHARACTERS or not token.isascii():
            return name
        signed, _, signature = token.rpartition(".")
        if not hmac.compare_digest(
            signature, base64url(hmac.digest(self._key, signed.encode(), "sha256"))
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
        """Return the identity in a token that `login` made; None for any other token."""
        # Nobody without the key gets past the signature. Nevertheless only a token exactly as
        # `login` writes it is accepted.
        with contextlib.suppress(jwt.InvalidTokenError, OverflowError, ValueError):
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[_ALGORITHM],
                audience=_AUDIENCE,
                issuer=_ISSUER,
                # The time of issue is in the future if the clock was fast then.
                options={"require": _REQUIRED_CLAIMS, "verify_iat": False},
            )
            user = self._users.get(claims["sub"])
            token_id = claims["jti"]
            times = claims["iat"], claims["run"], claims["exp"]
            session = Session(*(claims[name] for name in _SESSION_CLAIMS))
            # This comparison covers the header, the role, the entry, `cnf`, the spelling, and
            # claims that are missing, superfluous or of a wrong type.
            if (
                user is not None
                and self._are_possible(times, session)
                and _TOKEN_ID.fullmatch(token_id)
                and _TOKEN_ID.fullmatch(str(session.id))
                and hmac.compare_digest(
                    token, self._token(user, session, token_id, times, certificate)
                )
            ):
                issued_at, issued_s, expires_at = times
                return Identity(
                    user.name,
                    user.role,
                    datetime.fromtimestamp(expires_at, UTC),
                    issued_s + expires_at - issued_at,
                    self._entry(user),
                    session,
                )
        return None

    def _are_possible(self, times: tuple[int, int, int], session: Session) -> bool:
        """Whether a token can have these times: they are whole numbers, no life is too long."""
        moments = (*times, session.began_at_s, session.expires_at_s, session.ends_s)
        return (
            all(type(moment) is int for moment in moments)
            and times[2] - times[0] <= self._token_lifetime_s
            and session.expires_at_s - session.began_at_s <= self._session_lifetime_s
        )

    def is_valid(self, identity: Identity) -> bool:
        """Whether the token of `identity` is valid: not expired, not logged out, user unchanged."""
        return (
            identity.entry == self._entries.get(identity.name)
            and identity.session.id not in self._revocations
            and not self.has_expired(identity)
        )

    def has_expired(self, identity: Identity) -> bool:
        """Whether the token of `identity` has expired: by the clock, or by the running time."""
        return datetime.now(UTC) >= identity.expires_at or self._running.now_s() >= identity.ends_s

    def logout(self, identity: Identity) -> None:
        """End the session of `identity`: make all its tokens invalid for good; idempotent.

        Blocks until the logout is on the disk, or has been logged because the disk is full. Raises
        `RevocationError`, and then the tokens stay valid.
        """
        self._revocations.add(identity.session.id, identity.session.ends_s)
        self._tell_watchers()

    def watch(self, identity: Identity, on_invalid: Callable[[], None]) -> Callable[[], None]:
        """Have `on_invalid` called once when a logout or `set_users` ends the token of `identity`.

        If the token is invalid already, `on_invalid` is called at once. The expiry of a token
        calls nothing; use `has_expired`. The thread that ends the token makes the
        call, so `on_invalid` must not block or raise. Returns an idempotent function that
        cancels the watch; a call that has begun continues.
        """
        key = object()
        with self._lock:
            # Under the lock, so that no end of the token is missed between check and entry.
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

    def _token(
        self,
        user: User,
        session: Session,
        token_id: str,
        times: tuple[int, int, int],
        certificate: bytes,
    ) -> str:
        """Return the token.

        `times`: of its issue, in seconds since 1970 and as running time; and of its expiry.
        """
        issued_at, issued_s, expires_at = times
        claims = {
            "iss": _ISSUER,
            "aud": _AUDIENCE,
            "sub": user.name,
            "role": user.role.value,
            "entry": self._entry(user),
            "iat": issued_at,
            "exp": expires_at,
            "run": issued_s,
            "jti": token_id,
            **dict(zip(_SESSION_CLAIMS, astuple(session), strict=True)),
            "cnf": {_THUMBPRINT: _thumbprint(certificate)},
        }
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM)

    def _entry(self, user: User) -> str:
        # A keyed digest, so the token tells nothing about the password hash. The same key signs
        # tokens, but no token's signed text has a colon, and an entry always has.
        return base64url(hmac.digest(self._key, str(user).encode(), "sha256")[:_ENTRY_BYTES])


def _life_s(session: Session, now: tuple[int, int]) -> int:
    """Return how long the session lasts. `now`: in seconds since 1970, and as running time."""
    # By both clocks, so that a clock that is set back lengthens no session.
    return min(session.expires_at_s - now[0], session.ends_s - now[1])


def _thumbprint(certificate: bytes) -> str:
    return base64url(hashlib.sha256(certificate).digest())


def _peer_key(peer: str, certificate: bytes) -> str:
    """Return the peer as the throttle counts it: network and certificate."""
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv6Address(peer)
        if address.ipv4_mapped is None:
            network = ipaddress.IPv6Network((int(address), _IPV6_PEER_BITS), strict=False)
            peer = str(network)
    return f"{peer} {_thumbprint(certificate)}"


# --- the token key ---------------------------------------------------------------------


def load_key(path: str | os.PathLike[str]) -> bytes:
    """Return the token key in the file `path`; a missing file is made, with mode 0600.

    Raises OSError; ValueError if the file is not a key; `UntrustedFileError` if others could have
    made, read or changed it.
    """
    path = Path(path)
    with (
        contextlib.suppress(FileNotFoundError),
        open(open_private(path, os.O_RDONLY), "rb") as file,
    ):
        key = file.read(_KEY_BYTES + 1)
        if len(key) != _KEY_BYTES:
            raise ValueError(
                f"{path} is not a token key of {_KEY_BYTES} bytes; delete it to get a new one "
                "(every token becomes invalid)"
            )
        return key
    # A link makes the whole key appear at once, and keeps the key of a process that was faster.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".key-") as new:
        new.write(secrets.token_bytes(_KEY_BYTES))
        new.flush()
        os.fsync(new.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(new.name, path)
    return load_key(path)
