"""Tests of logins, tokens, logouts and permissions.

The tests hash passwords at the lowest cost.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import resource
import stat
import subprocess
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import assume, given
from hypothesis import strategies as st

import authservice_pb2
import users
import workerservice_pb2
from auth import (
    PERMISSIONS,
    AuthenticationError,
    Authenticator,
    Identity,
    LoginMemoryError,
    LoginsClosedError,
    RevocationError,
    Revocations,
    Role,
    RunningTime,
    Session,
    TokenError,
    TooManyLoginsError,
    load_key,
    may_call,
)
from store import Store
from testkit import GUARD_S, NOBODY, Clock, Hashing
from trustedfiles import UntrustedFileError
from users import User

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LIFETIME_S = 30 * 24 * 3600
_KEY = bytes(range(32))
_CERTIFICATE = b"a certificate, DER"
_OTHER_CERTIFICATE = b"another certificate, DER"
_PEER = "192.0.2.1"
_TOKEN_ID = "6f1c2c1e-6a0b-4c57-8a3e-0d2f6f0f7a11"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


_THUMBPRINT = _base64(hashlib.sha256(_CERTIFICATE).digest())


@pytest.fixture(scope="module", autouse=True)
def _cheap() -> Iterator[None]:
    """Hashes have the lowest cost, and hashes of that cost are accepted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(users, "_SCRYPT_LOG2_N", 1)
        yield


def _user(name: str, role: Role = Role.USER, password: str = "secret") -> User:
    """Return a user whose password is hashed at the lowest cost."""
    salt = hashlib.sha256(name.encode()).digest()[:16]
    digest = hashlib.scrypt(password.encode(), salt=salt, n=2, r=8, p=1, dklen=32)
    return User(name, role, f"scrypt$1$8$1${_base64(salt)}${_base64(digest)}")


_ALICE = _user("alice")
_ROOT = _user("root", Role.ADMIN, "toor")


def _entry(user: User, key: bytes = _KEY) -> str:
    return _base64(hmac.digest(key, str(user).encode(), "sha256")[:16])


def _identity(user: User, session_id: str = _TOKEN_ID) -> Identity:
    expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
    now = int(expires_at.timestamp()) - _LIFETIME_S
    session = Session(session_id, now, now + _LIFETIME_S, _LIFETIME_S)
    return Identity(user.name, user.role, expires_at, _LIFETIME_S, _entry(user), session)


@pytest.fixture
def authenticator() -> Authenticator:
    return Authenticator(users=[_ALICE, _ROOT], key=_KEY)


def _login(authenticator: Authenticator, name: str = "alice", password: str = "secret") -> str:
    return authenticator.login(name, password, _CERTIFICATE, _PEER)[0]


# --- login ------------------------------------------------------------------------------


def test_login_returns_a_token_of_exactly_the_documented_claims(
    authenticator: Authenticator,
) -> None:
    """iss, aud, sub, role, entry, iat, exp after 30 days, run, a random jti, the session, cnf."""
    before = int(time.time())
    token, expires_at = authenticator.login("root", "toor", _CERTIFICATE, _PEER)
    claims = jwt.decode(token, _KEY, algorithms=["HS256"], audience="jobworker.v1")
    issued, token_id = claims.pop("iat"), claims.pop("jti")
    assert before <= issued <= time.time()
    assert uuid.UUID(token_id).version == 4
    assert claims == {
        "iss": "job-worker",
        "aud": "jobworker.v1",
        "sub": "root",
        "role": "admin",
        "entry": _entry(_ROOT),
        "exp": issued + _LIFETIME_S,
        "run": 0,
        "sid": token_id,
        "auth_time": issued,
        "session_exp": issued + _LIFETIME_S,
        "session_run": _LIFETIME_S,
        "cnf": {"x5t#S256": _THUMBPRINT},
    }
    assert expires_at == datetime.fromtimestamp(claims["exp"], UTC)
    assert jwt.get_unverified_header(token)["alg"] == "HS256"
    assert authenticator.authenticate(token, _CERTIFICATE) == Identity(
        "root",
        Role.ADMIN,
        expires_at,
        _LIFETIME_S,
        _entry(_ROOT),
        Session(token_id, issued, issued + _LIFETIME_S, _LIFETIME_S),
    )


def test_two_logins_return_different_tokens(authenticator: Authenticator) -> None:
    """Two tokens of the same second differ in their jti."""
    assert _login(authenticator) != _login(authenticator)


def test_unknown_user_and_wrong_password_are_the_same(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both get the same message after one hash of the same cost."""
    scrypt, calls = hashlib.scrypt, []

    def spy(password: bytes, **options: Any) -> bytes:
        calls.append({**options, "salt": b""})
        return scrypt(password, **options)

    monkeypatch.setattr(hashlib, "scrypt", spy)
    messages = set()
    for name, password in (
        ("alice", "wrong"),
        ("nobody", "secret"),
        ("", ""),
        ("\ud800", "\ud800"),
    ):
        with pytest.raises(AuthenticationError) as caught:
            _login(authenticator, name, password)
        messages.add(str(caught.value))
    assert messages == {"wrong user name or password"}
    assert len(calls) == 4
    assert all(call == calls[0] for call in calls)


def test_one_hash_is_made_at_a_time(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three logins two wait, so the server needs no more than 128 MiB for logins."""
    hashing = Hashing(monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        logins = [
            pool.submit(authenticator.login, "alice", "secret", bytes([number]), "192.0.2.1")
            for number in range(3)
        ]
        assert hashing.begun.acquire(timeout=GUARD_S)
        assert authenticator._hashes.acquire(blocking=False) is False
        assert hashing.begun.acquire(blocking=False) is False
        hashing.go_on.set()
        assert all(login.result(GUARD_S) for login in logins)


def test_addresses_give_a_certificate_no_more_guesses(authenticator: Authenticator) -> None:
    """Of 50 guesses of one certificate from 50 networks, 6 are checked. Others can log in."""
    checked = 0
    for number in range(50):
        try:
            authenticator.login("alice", "guess", _CERTIFICATE, f"2001:db8:{number:x}::1")
        except TooManyLoginsError:
            continue
        except AuthenticationError:
            checked += 1
    assert checked == 6
    assert authenticator.login("alice", "secret", _OTHER_CERTIFICATE, "192.0.2.1")


def test_login_without_memory_is_refused_and_not_counted(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would kill the server or a job otherwise. No failure is counted."""
    for left in (0, 128 * 1024 * 1024):
        monkeypatch.setattr("memory.left_bytes", lambda left=left: left)
        for _ in range(20):
            with pytest.raises(LoginMemoryError, match="needs 128 MiB of memory"):
                _login(authenticator, password="wrong")
    monkeypatch.setattr("memory.left_bytes", lambda: 1 << 30)
    assert _login(authenticator)


def test_login_for_which_malloc_fails_is_refused(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of the address space (ulimit -v) shows only then."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(users, "_SCRYPT_LOG2_N", 17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(users, "_parse_hash", lambda _: (bytes(16), bytes(32)))
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 1024 * 1024, before[1]))
        try:
            with pytest.raises(LoginMemoryError):
                _login(authenticator)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


def test_login_that_waits_is_given_up_when_the_authenticator_is_closed(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiting login is neither hashed nor counted as a failure. Tokens stay valid."""
    token = _login(authenticator)
    hashing = Hashing(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        authenticator._hashes.acquire()
        waiting = pool.submit(_login, authenticator)
        authenticator.close()
        authenticator.close()
        authenticator._hashes.release()
        with pytest.raises(LoginsClosedError, match="shutting down"):
            waiting.result(GUARD_S)
    assert hashing.begun.acquire(blocking=False) is False
    assert authenticator.authenticate(token, _CERTIFICATE)


def _is_throttled(
    authenticator: Authenticator,
    name: str,
    peer: str,
    certificate: bytes = _CERTIFICATE,
    password: str = "wrong",
) -> bool:
    """Whether an attempt with a wrong password is refused without a check."""
    try:
        authenticator.login(name, password, certificate, peer)
    except TooManyLoginsError:
        return True
    except AuthenticationError:
        return False
    raise AssertionError("the wrong password was right")


def _fail(authenticator: Authenticator, name: str, peer: str) -> None:
    for _ in range(10):
        if _is_throttled(authenticator, name, peer):
            return
    raise AssertionError("ten wrong passwords did no harm")


@pytest.mark.parametrize("name", ["alice", "nobody"])
def test_wrong_passwords_have_to_wait_by_user_and_peer(
    authenticator: Authenticator, name: str
) -> None:
    """Unknown users wait, too. The true user gets in from another address or certificate."""
    _fail(authenticator, name, _PEER)
    assert _is_throttled(authenticator, name, _PEER)
    assert not _is_throttled(authenticator, "root", _PEER)
    assert not _is_throttled(authenticator, name, "192.0.2.2")
    assert not _is_throttled(authenticator, name, _PEER, _OTHER_CERTIFICATE)


def test_unknown_user_with_the_password_of_another_is_a_failure(
    authenticator: Authenticator,
) -> None:
    """The hash of another user is computed for an unknown user; a match is no login."""
    attempts = [_is_throttled(authenticator, "nobody", _PEER, password="secret") for _ in range(10)]
    assert attempts[0] is False
    assert attempts[-1] is True


def test_right_password_is_not_checked_while_it_has_to_wait(authenticator: Authenticator) -> None:
    """If it were checked, a guesser could learn the password during the wait."""
    _fail(authenticator, "alice", _PEER)
    with pytest.raises(TooManyLoginsError) as caught:
        _login(authenticator)
    assert caught.value.retry_after_s >= 1
    assert authenticator.login("alice", "secret", _CERTIFICATE, "192.0.2.2")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("::1", "::2", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("", "unix", False),
    ],
)
def test_peer_is_an_ipv4_address_or_an_ipv6_network(first: str, second: str, same: bool) -> None:
    """The owner of an IPv6 address can guess from 2^64 addresses."""
    authenticator = Authenticator(users=[_ALICE], key=_KEY)
    _fail(authenticator, "alice", first)
    assert _is_throttled(authenticator, "alice", second) is same


@pytest.mark.parametrize("table", [[], [_ALICE, _user("alice", Role.ADMIN)]])
def test_table_without_users_or_with_a_name_twice_is_refused(table: list[User]) -> None:
    """Such a table is refused, and the former table stays in force."""
    with pytest.raises(ValueError, match="users"):
        Authenticator(users=table, key=_KEY)
    authenticator = Authenticator(users=[_ALICE], key=_KEY)
    token = _login(authenticator)
    with pytest.raises(ValueError, match="users"):
        authenticator.set_users(table)
    assert authenticator.authenticate(token, _CERTIFICATE)


# --- forged tokens ----------------------------------------------------------------------


def _claims(**changes: Any) -> dict[str, Any]:
    """Return valid claims with `changes`; the value ... removes a claim."""
    now = int(time.time())
    claims = {
        "iss": "job-worker",
        "aud": "jobworker.v1",
        "sub": "alice",
        "role": "user",
        "entry": _entry(_ALICE),
        "iat": now,
        "exp": now + _LIFETIME_S,
        "run": 0,
        "jti": _TOKEN_ID,
        "sid": _TOKEN_ID,
        "auth_time": now,
        "session_exp": now + _LIFETIME_S,
        "session_run": _LIFETIME_S,
        "cnf": {"x5t#S256": _THUMBPRINT},
    } | changes
    return {name: value for name, value in claims.items() if value is not ...}


def _token(**changes: Any) -> str:
    return jwt.encode(_claims(**changes), _KEY, algorithm="HS256")


def _issued(seconds_ago: int) -> dict[str, int]:
    issued = int(time.time()) - seconds_ago
    return {"iat": issued, "exp": issued + _LIFETIME_S}


def _assemble(header: bytes, payload: bytes) -> str:
    """Return a token of any header and payload, with the right signature."""
    signed = f"{_base64(header)}.{_base64(payload)}"
    return f"{signed}.{_base64(hmac.digest(_KEY, signed.encode(), 'sha256'))}"


_HEADER = b'{"alg":"HS256","typ":"JWT"}'


def _payload(**changes: Any) -> bytes:
    return json.dumps(_claims(**changes), separators=(",", ":")).encode()


def _with_header(header: object) -> str:
    return _assemble(json.dumps(header, separators=(",", ":")).encode(), _payload())


def _with_number(claim: str, literal: str) -> str:
    """Return a token whose claim is `literal` in the JSON text, valid or not."""
    return _assemble(
        _HEADER, _payload(**{claim: "LITERAL"}).replace(b'"LITERAL"', literal.encode())
    )


def _with_detached_payload() -> str:
    """RFC 7797: the payload is not in base64url, and not in the token."""
    header = _base64(b'{"alg":"HS256","b64":false,"crit":["b64"]}')
    mac = hmac.digest(_KEY, f"{header}.".encode() + _payload(), "sha256")
    return f"{header}..{_base64(mac)}"


def _spliced(token: str, other: str) -> str:
    header, _, signature = token.split(".")
    return f"{header}.{other.split('.')[1]}.{signature}"


_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def _respelt(token: str) -> str:
    """Respell the last character of the signature: two of its bits are unused."""
    return token[:-1] + _ALPHABET[_ALPHABET.index(token[-1]) + 1]


_NO_WHOLE_NUMBERS: list[Any] = [float(_LIFETIME_S), True, None, "0", [0], {}]
_FORGERIES: dict[str, Callable[[], str]] = {
    # The header
    "alg none": lambda: jwt.encode(_claims(), None, algorithm="none"),
    "alg none, signed": lambda: _with_header({"alg": "none", "typ": "JWT"}),
    "alg None": lambda: _with_header({"alg": "None", "typ": "JWT"}),
    "alg RS256": lambda: _with_header({"alg": "RS256", "typ": "JWT"}),
    "alg HS512": lambda: jwt.encode(_claims(), _KEY * 2, algorithm="HS512"),
    "alg in lower case": lambda: _with_header({"alg": "hs256", "typ": "JWT"}),
    "alg missing": lambda: _with_header({"typ": "JWT"}),
    "alg null": lambda: _with_header({"alg": None}),
    "alg a list": lambda: _with_header({"alg": ["HS256"]}),
    "alg an object": lambda: _with_header({"alg": {"HS256": 1}}),
    "header not an object": lambda: _with_header(["HS256"]),
    "header nested deeply": lambda: _assemble(b"[" * 1000, b"{}"),
    "header nested very deeply": lambda: _assemble(b'{"alg":' * 100_000, b"{}"),
    "header not UTF-8": lambda: _assemble(b'{"alg":"HS256","\xff":1}', _payload()),
    "header with a name twice": lambda: _assemble(
        b'{"alg":"none","alg":"HS256","typ":"JWT"}', _payload()
    ),
    "header with spaces": lambda: _assemble(b'{"alg": "HS256", "typ": "JWT"}', _payload()),
    "crit": lambda: _with_header({"alg": "HS256", "typ": "JWT", "crit": ["exp"]}),
    "crit empty": lambda: _with_header({"alg": "HS256", "typ": "JWT", "crit": []}),
    "crit not a list": lambda: _with_header({"alg": "HS256", "typ": "JWT", "crit": 1}),
    "crit of lists": lambda: _with_header({"alg": "HS256", "typ": "JWT", "crit": [[]]}),
    "kid a path": lambda: _with_header({"alg": "HS256", "typ": "JWT", "kid": "../../dev/null"}),
    "kid a list": lambda: _with_header({"alg": "HS256", "typ": "JWT", "kid": []}),
    "jwk": lambda: _with_header({"alg": "HS256", "typ": "JWT", "jwk": {"kty": "oct", "k": "AA"}}),
    "b64 false": lambda: _with_header({"alg": "HS256", "typ": "JWT", "b64": False}),
    "b64 false, critical": lambda: _with_header({"alg": "HS256", "b64": False, "crit": ["b64"]}),
    "b64 false, detached": _with_detached_payload,
    "another typ": lambda: _with_header({"alg": "HS256", "typ": "at+jwt"}),
    "no typ": lambda: _with_header({"alg": "HS256"}),
    # The signature
    "another key": lambda: jwt.encode(_claims(), bytes(32), algorithm="HS256"),
    "signature cut off": lambda: _token().rpartition(".")[0] + ".",
    "signature of something else": lambda: _spliced(_token(), _token(sub="root", role="admin")),
    "signature spelt differently": lambda: _respelt(_token()),
    "signature padded": lambda: _token() + "=",
    # The payload
    "payload nested deeply": lambda: _assemble(_HEADER, b"[" * 1000),
    "payload nested very deeply": lambda: _assemble(_HEADER, b'{"a":' * 100_000),
    "payload not an object": lambda: _assemble(_HEADER, b"[]"),
    "payload not JSON": lambda: _assemble(_HEADER, b"x"),
    "payload not UTF-8": lambda: _assemble(_HEADER, b'{"\xff":1}'),
    "payload empty": lambda: _assemble(_HEADER, b""),
    "payload with a name twice": lambda: _assemble(
        _HEADER, _payload().replace(b'"sub":"alice"', b'"sub":"root","sub":"alice"')
    ),
    "payload with spaces": lambda: _assemble(_HEADER, _payload().replace(b",", b", ")),
    "payload in another order": lambda: _assemble(
        _HEADER, json.dumps(_claims(), separators=(",", ":"), sort_keys=True).encode()
    ),
    "payload with one more claim": lambda: _token(admin=True),
    "another issuer": lambda: _token(iss="someone"),
    "issuer a list": lambda: _token_of_any_type(iss=["job-worker"]),
    "another audience": lambda: _token(aud="jobworker.v2"),
    "audience a list": lambda: _token(aud=["jobworker.v1"]),
    "audience a list of lists": lambda: _token(aud=[["jobworker.v1"]]),
    "audience an object": lambda: _token(aud={"jobworker.v1": 1}),
    "expired": lambda: _token(**_issued(_LIFETIME_S + 3600)),
    "expired in this second": lambda: _token(**_issued(_LIFETIME_S)),
    "valid for longer": lambda: _token(exp=int(time.time()) + _LIFETIME_S + 3600),
    "valid for ever": lambda: _token(exp=1 << 62),
    "exp a text": lambda: _token(exp="later"),
    "exp a number as text": lambda: _token(exp=str(_claims()["exp"])),
    "exp a fraction": lambda: _token(exp=float(_claims()["exp"])),
    "exp true": lambda: _token(exp=True),
    "exp null": lambda: _token(exp=None),
    "exp a list": lambda: _token(exp=[_claims()["exp"]]),
    **{
        f"{claim} {literal[:9]}": lambda claim=claim, literal=literal: _with_number(claim, literal)  # type: ignore[misc]
        for claim in ("exp", "iat", "nbf")
        for literal in ("NaN", "Infinity", "-Infinity", "1e400", "1e18", "9" * 900, "-" + "9" * 900)
    },
    "run a fraction": lambda: _token(run=0.0),
    "run false": lambda: _token(run=False),
    "run a text": lambda: _token(run="0"),
    "run missing": lambda: _token(run=...),
    "iat a fraction": lambda: _token(iat=float(_claims()["iat"])),
    "iat and exp fractions": lambda: _token(
        **{claim: float(moment) for claim, moment in _issued(60).items()}
    ),
    "iat true": lambda: _token(iat=True),
    "iat a text": lambda: _token(iat="now"),
    "not before the future": lambda: _token(nbf=int(time.time()) + 3600),
    "not before now": lambda: _token(nbf=int(time.time())),
    "sub unknown": lambda: _token(sub="mallory"),
    "sub in the wrong case": lambda: _token(sub="Alice"),
    "sub empty": lambda: _token(sub=""),
    "sub a number": lambda: _token_of_any_type(sub=7),
    "sub a list": lambda: _token_of_any_type(sub=["alice"]),
    "sub an object": lambda: _token_of_any_type(sub={}),
    "sub a lone surrogate": lambda: _token(sub="\ud800"),
    "sub of somebody else": lambda: _token(sub="root"),
    "another role": lambda: _token(role="admin"),
    "role in the wrong case": lambda: _token(role="USER"),
    "role a list": lambda: _token(role=["user"]),
    "entry of before": lambda: _token(entry=_entry(_user("alice", password="before"))),
    "entry of somebody else": lambda: _token(entry=_entry(_ROOT)),
    "entry under another key": lambda: _token(entry=_entry(_ALICE, bytes(32))),
    "entry empty": lambda: _token(entry=""),
    "entry not ASCII": lambda: _token(entry="ä" * 22),
    "entry a number": lambda: _token(entry=1),
    "cnf empty": lambda: _token(cnf={}),
    "cnf of another certificate": lambda: _token(
        cnf={"x5t#S256": _base64(hashlib.sha256(_OTHER_CERTIFICATE).digest())}
    ),
    "cnf of another kind": lambda: _token(cnf={"jkt": _THUMBPRINT}),
    "cnf of two kinds": lambda: _token(cnf={"x5t#S256": _THUMBPRINT, "jkt": _THUMBPRINT}),
    "cnf not an object": lambda: _token(cnf=_THUMBPRINT),
    "cnf a list": lambda: _token(cnf=[_THUMBPRINT]),
    "cnf null": lambda: _token(cnf=None),
    "cnf with a number": lambda: _token(cnf={"x5t#S256": 1}),
    "cnf with null": lambda: _token(cnf={"x5t#S256": None}),
    "cnf not ASCII": lambda: _token(cnf={"x5t#S256": "ä" * 43}),
    "cnf a lone surrogate": lambda: _token(cnf={"x5t#S256": "\ud800" * 43}),
    "jti a number": lambda: _token_of_any_type(jti=1),
    "jti a list": lambda: _token_of_any_type(jti=[_TOKEN_ID]),
    "jti empty": lambda: _token(jti=""),
    "jti of two lines": lambda: _token(jti=f"{_TOKEN_ID}\n"),
    "sid empty": lambda: _token(sid=""),
    "sid of two lines": lambda: _token(sid=f"{_TOKEN_ID}\n"),
    "sid a list": lambda: _token(sid=[_TOKEN_ID]),
    "session for longer": lambda: _token(session_exp=int(time.time()) + _LIFETIME_S + 3600),
    **{
        f"{claim} {value!r}": lambda claim=claim, value=value: _token(**{claim: value})  # type: ignore[misc]
        for claim in ("auth_time", "session_exp", "session_run")
        for value in _NO_WHOLE_NUMBERS
    },
    "jti in upper case": lambda: _token(jti=_TOKEN_ID.upper()),
    # Not tokens
    "empty": str,
    "spaces": lambda: "   ",
    "space before": lambda: f" {_token()}",
    "space after": lambda: f"{_token()} ",
    "newline after": lambda: f"{_token()}\n",
    "NUL after": lambda: f"{_token()}\0",
    "NUL within": lambda: _token().replace(".", ".\0", 1),
    "rubbish after": lambda: f"{_token()}.x",
    "two tokens": lambda: f"{_token()},{_token()}",
    "scheme twice": lambda: f"Bearer {_token()}",
    "not a JWT": lambda: "garbage",
    "dots": lambda: "..",
    "JWE": lambda: "a.b.c.d.e",
    "JWE of the right parts": lambda: f"{_token()}.AA.AA",
    "four parts": lambda: f"{_token()}.",
    "not ASCII": lambda: "tökén.☃.☃",
    "full-width": lambda: _token().replace("e", "\uff45"),
    "lone surrogate": lambda: f"{_token()}\udcff",
    "huge": lambda: "a" * (1 << 20),
    "huge, with dots": lambda: f"{'a' * 500_000}.{'b' * 500_000}.c",
    "huge, signed": lambda: _token(more="x" * (1 << 20)),
    **{
        f"{claim} missing": lambda claim=claim: _token(**{claim: ...})  # type: ignore[misc]
        for claim in _claims()
    },
}


def _token_of_any_type(**changes: Any) -> str:
    """Return a token with a claim of a type that `jwt.encode` would not sign."""
    return _assemble(_HEADER, _payload(**changes))


_ONE_MESSAGE = (
    "no valid token in the metadata `authorization: Bearer TOKEN`: it has expired, was revoked, or "
    "belongs to another client certificate; log in again"
)


def _assert_refused(
    authenticator: Authenticator, token: str, certificate: bytes = _CERTIFICATE
) -> None:
    with pytest.raises(TokenError) as caught:
        authenticator.authenticate(token, certificate)
    assert str(caught.value) == _ONE_MESSAGE
    # The error carries no cause, so no log can show why the token was refused.
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


def test_token_of_the_forgers_table_would_be_accepted_unchanged(
    authenticator: Authenticator,
) -> None:
    """The forgeries start from a valid token, so each fails for its own reason."""
    accepted = [
        _token(),
        _token_of_any_type(),
        _with_header({"alg": "HS256", "typ": "JWT"}),
        _with_number("iat", str(_claims()["iat"])),
        _token(**_issued(_LIFETIME_S - 3600)),
    ]
    for token in accepted:
        assert authenticator.authenticate(token, _CERTIFICATE).name == "alice"
    assert _respelt(accepted[0]) != accepted[0]
    spellings = (
        base64.urlsafe_b64decode(f"{token.rpartition('.')[2]}=")
        for token in (accepted[0], _respelt(accepted[0]))
    )
    assert len(set(spellings)) == 1


@pytest.mark.parametrize("forgery", _FORGERIES)
def test_forged_token_is_refused_with_the_one_message(
    authenticator: Authenticator, forgery: str
) -> None:
    """The answer is the same for each forgery, and tells nothing."""
    _assert_refused(authenticator, _FORGERIES[forgery]())


@pytest.mark.parametrize("forgery", ["huge", "huge, signed", "header nested very deeply"])
def test_what_is_longer_than_any_token_is_not_looked_at(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch, forgery: str
) -> None:
    """A text that is longer than any token is refused before it is parsed."""
    token = _FORGERIES[forgery]()
    calls: list[object] = []
    monkeypatch.setattr(jwt, "decode", lambda *arguments, **_: calls.append(arguments))
    _assert_refused(authenticator, token)
    assert calls == []


@given(
    token=st.text()
    | st.lists(st.binary(), min_size=3, max_size=3).map(
        lambda parts: ".".join(base64.urlsafe_b64encode(part).decode() for part in parts)
    )
)
def test_no_text_is_a_token_by_chance(token: str) -> None:
    """Any text gets the same error."""
    _assert_refused(Authenticator(users=[_ALICE], key=_KEY), token)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=5,
)


_MOMENTS = {"run", "exp", "auth_time", "session_exp", "session_run"}


@given(claim=st.sampled_from(sorted(_claims())), value=_JSON)
def test_claim_of_any_value_is_refused_even_with_the_right_key(claim: str, value: Any) -> None:
    """Only a token as a login writes it is valid, whatever the types of its claims."""
    # No other claim tells which of the whole numbers is right.
    assume(claim not in _MOMENTS or type(value) is not int)
    if value != _claims()[claim]:
        token = _token_of_any_type(**{claim: value})
        _assert_refused(Authenticator(users=[_ALICE], key=_KEY), token)


@given(data=st.data())
def test_token_with_any_character_changed_is_refused(data: st.DataObject) -> None:
    """Every character of a token matters."""
    token = _token()
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.sampled_from(f"{_ALPHABET}.= \n").filter(lambda c: c != token[at]))
    _assert_refused(
        Authenticator(users=[_ALICE], key=_KEY), f"{token[:at]}{other}{token[at + 1 :]}"
    )


# --- tokens that end --------------------------------------------------------------------


def test_token_is_worth_nothing_with_another_certificate(authenticator: Authenticator) -> None:
    """A stolen token does not work without the certificate of its login."""
    token = _login(authenticator)
    for _ in range(2):  # before it is known, and after
        for certificate in (_OTHER_CERTIFICATE, b"", _CERTIFICATE + b"\0"):
            _assert_refused(authenticator, token, certificate)
        assert authenticator.authenticate(token, _CERTIFICATE)


def test_refused_token_does_not_fill_the_queue_of_its_user(authenticator: Authenticator) -> None:
    """Whoever has stolen it holds up calls with the user's other tokens no longer."""
    stolen, ended, good = (_token(jti=str(uuid.uuid4())) for _ in range(3))
    assert authenticator.signed_for(stolen) == authenticator.signed_for(ended) == "alice"
    authenticator.logout(authenticator.authenticate(ended, _CERTIFICATE))
    for token, certificate in ((stolen, _OTHER_CERTIFICATE), (ended, _CERTIFICATE)):
        _assert_refused(authenticator, token, certificate)
        assert authenticator.signed_for(token) not in {"alice", None}
    assert authenticator.signed_for(stolen) == authenticator.signed_for(ended)  # one more queue
    assert authenticator.signed_for(good) == "alice"


def test_tokens_that_are_known_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many logins do not fill the memory. All their tokens stay valid."""
    monkeypatch.setattr("auth._KNOWN_TOKENS", 3)
    authenticator = Authenticator(users=[_ALICE], key=_KEY)
    tokens = [_token(jti=str(uuid.uuid4())) for _ in range(5)]
    for token in tokens * 2:
        assert authenticator.authenticate(token, _CERTIFICATE)
        assert len(authenticator._known) <= 3


_ALICE_IS_ADMIN = replace(_ALICE, role=Role.ADMIN)
_ALICE_WITH_A_NEW_PASSWORD = _user("alice", password="changed")
_ALICE_WITH_A_NEW_SALT = replace(_ALICE, password_hash=_ROOT.password_hash)
_CHANGES = {
    "removed": [_ROOT],
    "role changed": [_ALICE_IS_ADMIN, _ROOT],
    "password changed": [_ALICE_WITH_A_NEW_PASSWORD],
    "hash changed": [_ALICE_WITH_A_NEW_SALT],
    "renamed": [replace(_ALICE, name="Alice")],
}


@pytest.mark.parametrize("change", _CHANGES)
def test_token_ends_with_any_change_of_its_user(authenticator: Authenticator, change: str) -> None:
    """It ends at once, and stays ended after a restart. With the old entry it is valid again."""
    token = _login(authenticator)
    identity = authenticator.authenticate(token, _CERTIFICATE)
    authenticator.set_users(_CHANGES[change])
    _assert_refused(authenticator, token)
    assert not authenticator.is_valid(identity)
    _assert_refused(Authenticator(users=_CHANGES[change], key=_KEY), token)
    authenticator.set_users([_ALICE])
    assert authenticator.authenticate(token, _CERTIFICATE) == identity


def test_token_does_not_end_when_others_change(authenticator: Authenticator) -> None:
    """A new order of the entries, or a new entry, ends no token of the other users."""
    token = _login(authenticator)
    identity = authenticator.authenticate(token, _CERTIFICATE)
    authenticator.set_users([_user("bob"), _user("root", password="x"), _ALICE])
    assert authenticator.authenticate(token, _CERTIFICATE) == identity
    assert authenticator.is_valid(identity)


def test_new_users_log_in_and_removed_ones_do_not(authenticator: Authenticator) -> None:
    """The new table applies to logins, too."""
    authenticator.set_users([_user("bob", password="builder"), _ALICE_WITH_A_NEW_PASSWORD])
    assert _login(authenticator, "bob", "builder")
    assert _login(authenticator, "alice", "changed")
    for name, password in (("root", "toor"), ("alice", "secret")):
        with pytest.raises(AuthenticationError, match="wrong user name or password"):
            _login(authenticator, name, password)


def test_token_of_a_login_that_was_overtaken_by_a_change_is_not_valid(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user got a new password while the old one was being checked."""
    hashing = Hashing(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        login = pool.submit(_login, authenticator)
        assert hashing.begun.acquire(timeout=GUARD_S)
        authenticator.set_users([_ALICE_WITH_A_NEW_PASSWORD])
        hashing.go_on.set()
        _assert_refused(authenticator, login.result(GUARD_S))


def test_token_survives_a_new_authenticator_of_the_same_key_only(
    authenticator: Authenticator,
) -> None:
    """Tokens survive a restart, but not another key."""
    token = _login(authenticator)
    again = Authenticator(users=[_ROOT, _ALICE], key=_KEY)
    assert again.authenticate(token, _CERTIFICATE).name == "alice"
    _assert_refused(Authenticator(users=[_ALICE], key=bytes(32)), token)


def test_identity_is_valid_until_it_expires(authenticator: Authenticator) -> None:
    """A stream asks `Identity` whether its token has expired, and ends if it has."""
    identity = authenticator.authenticate(_token(), _CERTIFICATE)
    assert authenticator.is_valid(identity)
    assert not authenticator.is_valid(replace(identity, expires_at=datetime.now(UTC)))


def test_token_that_is_logged_out_is_refused_for_good(tmp_path: Path) -> None:
    """It is refused after restarts and in another spelling. Other tokens stay valid."""
    path = tmp_path / "store"
    with Store(path) as store, Revocations(store) as revocations:
        authenticator = Authenticator(users=[_ALICE], key=_KEY, revocations=revocations)
        token, other = _login(authenticator), _login(authenticator)
        identity = authenticator.authenticate(token, _CERTIFICATE)
        authenticator.logout(identity)
        authenticator.logout(identity)
        assert not authenticator.is_valid(identity)
        for spelling in (token, _respelt(token), f"{token}="):
            _assert_refused(authenticator, spelling)
        assert authenticator.authenticate(other, _CERTIFICATE)
    for _ in range(2):
        with Store(path) as store, Revocations(store) as revocations:
            again = Authenticator(users=[_ALICE], key=_KEY, revocations=revocations)
            _assert_refused(again, token)
            assert again.authenticate(other, _CERTIFICATE)
    with Store(path) as store:
        assert store.query("SELECT * FROM revoked") == [(identity.session.id, _LIFETIME_S)]


# --- sessions -----------------------------------------------------------------------------


def _id_of(token: str) -> str:
    claims = jwt.decode(token, options={"verify_signature": False})
    return str(claims["jti"])


def _with_short_tokens(**options: Any) -> Authenticator:
    """Tokens of 15 minutes, sessions of an hour."""
    lifetimes: dict[str, Any] = {
        "token_lifetime": timedelta(minutes=15),
        "session_lifetime": timedelta(hours=1),
    }
    return Authenticator(users=[_ALICE, _ROOT], key=_KEY, **lifetimes, **options)


def test_token_is_refreshed_until_the_session_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each new token has an ID of its own and 15 minutes, the last ones until the session ends.

    The old tokens stay valid until their own expiry, so a lost answer loses nothing.
    """
    clocks = _Clocks(monkeypatch)
    authenticator = _with_short_tokens(running=RunningTime(clock=clocks.durations))
    token, expires_at = authenticator.login("alice", "secret", _CERTIFICATE, _PEER)
    first = authenticator.authenticate(token, _CERTIFICATE)
    began = int(clocks.wall)
    assert expires_at == datetime.fromtimestamp(began + 900, UTC) == first.expires_at
    assert first.session == Session(_id_of(token), began, began + 3600, 3600)
    identity, seen = first, {_id_of(token)}
    for passed_s, left_s in ((600, 900), (1200, 900), (1800, 900), (2400, 900), (3000, 600)):
        clocks.wall, clocks.durations.now = began + passed_s, 1000 + passed_s
        token, expires_at = authenticator.refresh(identity, _CERTIFICATE)
        assert expires_at == datetime.fromtimestamp(began + passed_s + left_s, UTC)
        assert authenticator.is_valid(identity)
        identity = authenticator.authenticate(token, _CERTIFICATE)
        assert identity.session == first.session
        seen.add(_id_of(token))
    assert len(seen) == 6
    with pytest.raises(TokenError):
        authenticator.refresh(first, _CERTIFICATE)
    clocks.wall, clocks.durations.now = began + 3600, 4600
    for ended in (identity, first):
        with pytest.raises(TokenError):
            authenticator.refresh(ended, _CERTIFICATE)


def test_clock_that_is_set_back_lengthens_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session ends after an hour of running time, whatever the wall clock says."""
    clocks = _Clocks(monkeypatch)
    authenticator = _with_short_tokens(running=RunningTime(clock=clocks.durations))
    identity = authenticator.authenticate(_login(authenticator), _CERTIFICATE)
    for passed_s in (800, 1600, 2400, 3200):
        clocks.durations.now = 1000 + passed_s
        token, _ = authenticator.refresh(identity, _CERTIFICATE)
        identity = authenticator.authenticate(token, _CERTIFICATE)
    clocks.durations.now = 4600
    _assert_refused(authenticator, token)
    with pytest.raises(TokenError):
        authenticator.refresh(identity, _CERTIFICATE)


def test_logout_ends_all_tokens_of_its_session(tmp_path: Path) -> None:
    """Also those that were refreshed, before and after; and after a restart. Other logins go on."""
    told: list[str] = []
    with Store(tmp_path / "store") as store, Revocations(store) as revocations:
        authenticator = _with_short_tokens(revocations=revocations)
        old, other = _login(authenticator), _login(authenticator)
        identity = authenticator.authenticate(old, _CERTIFICATE)
        new, _ = authenticator.refresh(identity, _CERTIFICATE)
        newer, _ = authenticator.refresh(identity, _CERTIFICATE)
        authenticator.watch(
            authenticator.authenticate(newer, _CERTIFICATE), lambda: told.append(newer)
        )
        authenticator.watch(
            authenticator.authenticate(other, _CERTIFICATE), lambda: told.append(other)
        )
        authenticator.logout(authenticator.authenticate(new, _CERTIFICATE))
        assert told == [newer]
        with pytest.raises(TokenError):
            authenticator.refresh(identity, _CERTIFICATE)
        for token in (old, new, newer):
            _assert_refused(authenticator, token)
        assert authenticator.authenticate(other, _CERTIFICATE)
    with Store(tmp_path / "store") as store, Revocations(store) as revocations:
        assert store.query("SELECT * FROM revoked") == [(identity.session.id, 3600)]
        again = _with_short_tokens(revocations=revocations)
        for token in (old, new, newer):
            _assert_refused(again, token)
        assert again.authenticate(other, _CERTIFICATE)


@pytest.mark.parametrize("change", _CHANGES)
def test_change_of_the_user_ends_the_session(change: str) -> None:
    """A token whose user is gone, or has another role or password, is not refreshed."""
    authenticator = _with_short_tokens()
    identity = authenticator.authenticate(_login(authenticator), _CERTIFICATE)
    authenticator.set_users(_CHANGES[change])
    with pytest.raises(TokenError):
        authenticator.refresh(identity, _CERTIFICATE)


def test_refreshed_token_is_bound_to_the_certificate() -> None:
    """The new token works with the certificate of the login, and with no other."""
    authenticator = _with_short_tokens()
    identity = authenticator.authenticate(_login(authenticator), _CERTIFICATE)
    token, _ = authenticator.refresh(identity, _CERTIFICATE)
    assert authenticator.authenticate(token, _CERTIFICATE)
    _assert_refused(authenticator, token, _OTHER_CERTIFICATE)


def test_shorter_lifetimes_end_the_longer_tokens(authenticator: Authenticator) -> None:
    """A restart with shorter lifetimes ends a longer token; one with longer ones ends none."""
    long, short = _login(authenticator), _login(_with_short_tokens())
    _assert_refused(_with_short_tokens(), long)
    assert authenticator.authenticate(short, _CERTIFICATE)


_DAY_S = 24 * 3600


class _Clocks:
    """A wall clock and a clock of durations that show what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.durations = time.time(), Clock()
        clocks = self

        class Datetime(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.fromtimestamp(clocks.wall, tz)

        monkeypatch.setattr("auth.datetime", Datetime)
        monkeypatch.setattr("jwt.api_jwt.datetime", Datetime)
        monkeypatch.setattr(time, "time", lambda: clocks.wall)


@contextmanager
def _started(tmp_path: Path, clocks: _Clocks) -> Iterator[Authenticator]:
    """Start as a server does, with the files in the directory."""
    with (
        Store(tmp_path / "store") as store,
        RunningTime(store, clock=clocks.durations) as running,
        Revocations(store, running) as revocations,
    ):
        yield Authenticator(users=[_ALICE], key=_KEY, revocations=revocations, running=running)


@pytest.mark.parametrize("restarts", [True, False])
def test_revoked_token_stays_revoked_after_a_step_of_the_clock_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: bool
) -> None:
    """Whatever happens while the clock is ten years fast: a restart, or another logout."""
    clocks = _Clocks(monkeypatch)
    with ExitStack() as running:
        authenticator = running.enter_context(_started(tmp_path, clocks))
        token, other = _login(authenticator), _login(authenticator)
        authenticator.logout(authenticator.authenticate(token, _CERTIFICATE))
        clocks.wall += 3650 * _DAY_S
        _assert_refused(authenticator, other)
        if restarts:
            running.close()
            authenticator = running.enter_context(_started(tmp_path, clocks))
        fast = _login(authenticator)
        authenticator.logout(authenticator.authenticate(fast, _CERTIFICATE))
        clocks.wall -= 3650 * _DAY_S
        for revoked in (token, fast):
            _assert_refused(authenticator, revoked)
        assert authenticator.authenticate(other, _CERTIFICATE)
    with _started(tmp_path, clocks) as authenticator:
        for revoked in (token, fast):
            _assert_refused(authenticator, revoked)
        assert authenticator.authenticate(other, _CERTIFICATE)


def test_token_issued_while_the_clock_was_fast_is_valid_for_30_days(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a restart. It ends by the running time of the server."""
    clocks = _Clocks(monkeypatch)
    clocks.wall += 3650 * _DAY_S
    with _started(tmp_path, clocks) as authenticator:
        token = _login(authenticator)
        assert authenticator.authenticate(token, _CERTIFICATE)
        clocks.wall -= 3650 * _DAY_S
    for _ in range(2):
        with _started(tmp_path, clocks) as authenticator:
            identity = authenticator.authenticate(token, _CERTIFICATE)
            clocks.durations.now += 15 * _DAY_S - 1
            assert authenticator.is_valid(identity)
    with _started(tmp_path, clocks) as authenticator:
        clocks.durations.now += 2
        _assert_refused(authenticator, token)
        assert authenticator.has_expired(identity)


def test_revocations_of_tokens_that_have_ended_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the running time, at the next logout."""
    clocks = _Clocks(monkeypatch)
    with _started(tmp_path, clocks) as authenticator:
        for _ in range(2):
            authenticator.logout(authenticator.authenticate(_login(authenticator), _CERTIFICATE))
            clocks.durations.now += 20 * _DAY_S
            clocks.wall += 20 * _DAY_S
        authenticator.logout(authenticator.authenticate(_login(authenticator), _CERTIFICATE))
    with _started(tmp_path, clocks):
        pass
    with Store(tmp_path / "store") as store:
        ends = store.query("SELECT ends_s / 86400 FROM revoked ORDER BY 1")
    assert ends == [(50,), (70,)]


def test_token_stays_valid_when_its_logout_cannot_be_recorded() -> None:
    """The logout fails, because a restart would make the token valid again."""
    revocations = Revocations(None)
    authenticator = Authenticator(users=[_ALICE], key=_KEY, revocations=revocations)
    token = _login(authenticator)
    identity = authenticator.authenticate(token, _CERTIFICATE)
    called: list[str] = []
    authenticator.watch(identity, lambda: called.append("ended"))
    revocations.close()
    with pytest.raises(RevocationError):
        authenticator.logout(identity)
    assert authenticator.authenticate(token, _CERTIFICATE) == identity
    assert called == []


# --- watching ---------------------------------------------------------------------------


class _Watcher:
    """Counts its calls. Each call asks the authenticator, which would hang if a lock were held."""

    def __init__(self, authenticator: Authenticator, identity: Identity) -> None:
        self.calls = 0
        self._authenticator = authenticator
        self._identity = identity
        self.forget = authenticator.watch(identity, self._on_invalid)

    def _on_invalid(self) -> None:
        assert not self._authenticator.is_valid(self._identity)
        self._authenticator.watch(_identity(_ROOT), threading.Event().set)()
        self.calls += 1


@pytest.fixture
def watched(authenticator: Authenticator) -> tuple[Identity, list[_Watcher]]:
    """Watched identities: Alice twice with one token, Alice with another, and root."""
    first, second = (
        authenticator.authenticate(_login(authenticator), _CERTIFICATE) for _ in range(2)
    )
    identities = (first, first, second, _identity(_ROOT))
    return first, [_Watcher(authenticator, identity) for identity in identities]


def test_logout_calls_those_who_watch_that_token_once(
    authenticator: Authenticator, watched: tuple[Identity, list[_Watcher]]
) -> None:
    """All watchers of the token are called, no others, and only once."""
    identity, watchers = watched
    authenticator.logout(identity)
    assert [watcher.calls for watcher in watchers] == [1, 1, 0, 0]
    authenticator.logout(identity)
    authenticator.set_users([_ROOT])
    assert [watcher.calls for watcher in watchers] == [1, 1, 1, 0]


@pytest.mark.parametrize("change", _CHANGES)
def test_change_of_a_user_calls_those_who_watch_their_tokens(
    authenticator: Authenticator, watched: tuple[Identity, list[_Watcher]], change: str
) -> None:
    """Any change of a user calls them. The watchers of an unchanged user are not called."""
    _, watchers = watched
    authenticator.set_users([*(u for u in _CHANGES[change] if u != _ROOT), _ROOT])
    assert [watcher.calls for watcher in watchers] == [1, 1, 1, 0]


def test_who_has_forgotten_is_not_called(
    authenticator: Authenticator, watched: tuple[Identity, list[_Watcher]]
) -> None:
    """Cancelling a watch is idempotent, also after the end, and affects one watcher only."""
    identity, watchers = watched
    watchers[0].forget()
    watchers[0].forget()
    authenticator.logout(identity)
    for watcher in watchers:
        watcher.forget()
    assert [watcher.calls for watcher in watchers] == [0, 1, 0, 0]
    assert authenticator._watchers == {}


def test_who_comes_too_late_is_called_at_once(
    authenticator: Authenticator, watched: tuple[Identity, list[_Watcher]]
) -> None:
    """A watch of an invalid token calls the watcher at once."""
    identity, _ = watched
    authenticator.logout(identity)
    expired = replace(_identity(_ALICE, str(uuid.uuid4())), expires_at=datetime.now(UTC))
    late = [identity, expired]
    watchers = [_Watcher(authenticator, each) for each in late]
    authenticator.set_users([_ROOT])
    for watcher in watchers:
        watcher.forget()
    assert [watcher.calls for watcher in watchers] == [1, 1]


def test_no_end_falls_between_asking_and_watching(authenticator: Authenticator) -> None:
    """Many watches begin beside a logout, and each watcher is called exactly once."""
    barrier = threading.Barrier(8)

    def watch(identity: Identity) -> list[_Watcher]:
        barrier.wait(GUARD_S)
        return [_Watcher(authenticator, identity) for _ in range(50)]

    def logout(identity: Identity) -> list[_Watcher]:
        barrier.wait(GUARD_S)
        authenticator.logout(identity)
        return []

    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            identity = _identity(_ALICE, str(uuid.uuid4()))
            actions = [*([watch] * 7), logout]
            results = [pool.submit(action, identity) for action in actions]
            watchers = [each for result in results for each in result.result(GUARD_S)]
            assert [watcher.calls for watcher in watchers] == [1] * 350
    assert authenticator._watchers == {}


# --- what does not show -----------------------------------------------------------------


def test_no_password_hash_key_or_token_shows(caplog: pytest.LogCaptureFixture) -> None:
    """No repr, text, traceback or log contains a password, hash, key or token."""
    caplog.set_level(logging.DEBUG)
    revocations = Revocations(None)
    password = "hunter2"  # and nowhere else here: tracebacks have the lines of this test
    alice = _user("alice", password=password)
    authenticator = Authenticator(users=[alice], key=_KEY, revocations=revocations)
    token = _login(authenticator, "alice", password)
    identity = authenticator.authenticate(token, _CERTIFICATE)
    shown = [identity, alice, authenticator, revocations, authenticator._throttle]
    texts = [*map(repr, shown), *map(str, (identity, authenticator, revocations))]

    def caught(action: Callable[[], object]) -> None:
        try:
            action()
        except (AuthenticationError, TooManyLoginsError, RevocationError) as error:
            texts.extend((repr(error), str(error), "".join(traceback.format_exception(error))))
            texts.append(repr(vars(error)))

    for name, wrong in (
        ("alice", f"{password}2"),
        (password, password),
        ("alice", f"{password}\ud800"),
    ):
        caught(lambda name=name, wrong=wrong: _login(authenticator, name, wrong))  # type: ignore[misc]
    _fail(authenticator, "alice", _PEER)
    caught(lambda: _login(authenticator, "alice", password))
    for forged in (token + "x", _spliced(token, _token(sub="root")), token + "\udcff"):
        caught(lambda forged=forged: authenticator.authenticate(forged, _CERTIFICATE))  # type: ignore[misc]
    caught(lambda: authenticator.authenticate(token, _OTHER_CERTIFICATE))
    revocations.close()
    caught(lambda: authenticator.logout(identity))
    assert len(texts) == 8 + 9 * 4
    everything = "\n".join([*texts, caplog.text])
    secrets = [password, alice.password_hash, alice.password_hash.split("$")[-1], token]
    secrets += [*token.split(".")[1:], identity.entry, repr(_KEY)]
    assert [secret for secret in secrets if secret in everything] == []


# --- permissions ------------------------------------------------------------------------


def test_permission_table_names_exactly_the_methods_of_the_services() -> None:
    """The table has every RPC, streams included, and no other."""
    files = (
        *(authservice_pb2.DESCRIPTOR, workerservice_pb2.DESCRIPTOR),
        *(health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR),
    )
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert set(PERMISSIONS) == methods


def test_only_login_health_and_reflection_need_no_token() -> None:
    """Every other method has its roles in the table."""
    assert [method for method, roles in PERMISSIONS.items() if roles is None] == [
        "/jobworker.v1.AuthService/Login",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    "method",
    ["", "/jobworker.v1.WorkerService/Nothing", "StartJob", "/jobworker.v1.AuthService/Login"],
)
def test_what_is_not_granted_is_denied(method: str, role: Role) -> None:
    """Nobody, not even an admin, may call a method without roles in the table."""
    assert not may_call(method, role)


def test_admin_reaches_all_jobs_and_a_user_their_own() -> None:
    """The owner is compared by the exact name."""
    assert _identity(_ROOT).reaches("alice")
    assert _identity(_ALICE).reaches("alice")
    for owner in ("root", "Alice", "alice2", "", None):
        assert not _identity(_ALICE).reaches(owner)
    assert not _identity(_ROOT).reaches(None)


# --- the token key ----------------------------------------------------------------------


def test_key_is_made_once_privately_and_kept(tmp_path: Path) -> None:
    """The first call makes a file of 32 random bytes with mode 0600. Later calls read it."""
    path = tmp_path / "token.key"
    key = load_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path) == key == path.read_bytes()
    assert load_key(tmp_path / "another.key") != key
    assert {entry.name for entry in tmp_path.iterdir()} == {"token.key", "another.key"}


def test_all_who_make_the_key_at_once_get_the_same(tmp_path: Path) -> None:
    """Of many simultaneous starts all get the same key."""
    barrier = threading.Barrier(8)

    def load(_: int) -> bytes:
        barrier.wait(GUARD_S)
        return load_key(tmp_path / "token.key")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(load, range(8)))) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["token.key"]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_key_of_the_wrong_size_is_refused(tmp_path: Path, size: int) -> None:
    """A damaged key is neither used nor replaced."""
    path = tmp_path / "token.key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(ValueError, match="not a token key of 32 bytes; delete it"):
        load_key(path)
    assert path.read_bytes() == bytes(size)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """The error shows the chmod command that makes the key private."""
    path = tmp_path / "token.key"
    load_key(path)
    path.chmod(mode)
    with pytest.raises(UntrustedFileError, match=f"chmod 600 {path}"):
        load_key(path)


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_key_that_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """A FIFO without a writer does not hang the start."""
    path = tmp_path / "token.key"
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "link":
        load_key(tmp_path / "other")
        path.symlink_to(tmp_path / "other")
    else:
        path.mkdir()
    with pytest.raises(UntrustedFileError, match=f"{path} is not a regular file; remove it"):
        load_key(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_key_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Somebody else knows that key and could sign tokens with it."""
    path = tmp_path / "token.key"
    load_key(path)
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(UntrustedFileError, match=f"{path} belongs to uid {NOBODY}"):
        load_key(path)


def test_key_cannot_be_made_where_there_is_no_directory(tmp_path: Path) -> None:
    """If its directory does not exist, `load_key` raises FileNotFoundError."""
    with pytest.raises(FileNotFoundError):
        load_key(tmp_path / "absent" / "token.key")


# For each encoding that json detects: the first bytes by which it detects that encoding.
_BEGINNINGS = (
    *("00000041", "00000000", "00410042", "41004200", "41000000"),
    *("feff0041", "fffe4100", "fffe0000", "0000feff", "efbbbf41"),
)


def test_every_key_works_in_a_process_that_can_import_nothing_more() -> None:
    """Such a process is a server without root whose Python is in a closed directory."""
    source = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import users
from auth import Authenticator
users._SCRYPT_LOG2_N = 1
known = [users.make_user("alice", "user", "secret")]
Authenticator(users=known, key=bytes(range(1, 33))).login("alice", "secret", b"", "peer")
sys.path.clear()
sys.meta_path.clear()
for beginning in {_BEGINNINGS!r}:
    key = bytes.fromhex(beginning) + bytes(range(100, 128))
    authenticator = Authenticator(users=known, key=key)
    token, _ = authenticator.login("alice", "secret", b"", "peer")
    assert authenticator.authenticate(token, b"").name == "alice"
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=GUARD_S)
