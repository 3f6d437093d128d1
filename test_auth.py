"""Tests of users, passwords, tokens and permissions.

Hashes are made with the lowest cost here, except where the cost is what is tested.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import stat
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import auth
import authservice_pb2
import workerservice_pb2
from auth import (
    PERMISSIONS,
    SEEDED_USERS,
    AuthenticationError,
    Authenticator,
    Identity,
    Role,
    TooManyLoginsError,
    User,
    UsersFileError,
    has_public_password,
    hash_password,
    load_key,
    load_users,
    make_user,
    may_call,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_GUARD_S = 60  # only a hang takes this long
_KEY = bytes(range(32))
_CERTIFICATE = b"a certificate, DER"
_THUMBPRINT = base64.urlsafe_b64encode(hashlib.sha256(_CERTIFICATE).digest()).rstrip(b"=").decode()


def _user(name: str, role: Role = Role.USER, password: str = "secret") -> User:
    """A user whose password is hashed with a cost that costs nothing."""
    salt = hashlib.sha256(name.encode()).digest()[:16]
    digest = auth._scrypt(password, salt, 1, 8, 1)
    return User(name, role, f"scrypt$1$8$1${auth._base64(salt)}${auth._base64(digest)}")


_ALICE = _user("alice")
_ROOT = _user("root", Role.ADMIN, "toor")


@pytest.fixture
def authenticator() -> Authenticator:
    return Authenticator(users=[_ALICE, _ROOT], key=_KEY)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hash_password` costs nothing."""
    monkeypatch.setattr(auth, "_SCRYPT_LOG2_N", 1)


# --- passwords --------------------------------------------------------------------------


def test_password_hash_has_the_documented_form_and_cost() -> None:
    """A hash is `scrypt$17$8$1$SALT$HASH` with 16 and 32 bytes in base64url."""
    scheme, *cost, salt, digest = hash_password("pässword").split("$")
    assert (scheme, cost) == ("scrypt", ["17", "8", "1"])
    assert [len(base64.urlsafe_b64decode(part + "==")) for part in (salt, digest)] == [16, 32]


@pytest.mark.usefixtures("cheap")
def test_two_hashes_of_a_password_differ_and_both_match() -> None:
    """Every hash has a salt of its own, and matches its password and no other."""
    hashes = hash_password("pässword"), hash_password("pässword")
    assert len({text.split("$")[4] for text in hashes}) == 2
    assert all(auth._password_matches("pässword", text) for text in hashes)
    assert not any(auth._password_matches("password", text) for text in hashes)


def test_seeded_users_have_their_names_as_passwords() -> None:
    """`admin` is an admin and `user` a user, with the documented passwords and the full cost."""
    assert {user.name: user.role for user in SEEDED_USERS} == {
        "admin": Role.ADMIN,
        "user": Role.USER,
    }
    for user in SEEDED_USERS:
        assert user.password_hash.startswith("scrypt$17$8$1$")
        assert auth._password_matches(user.name, user.password_hash)


def test_public_passwords_are_known_whatever_their_salt() -> None:
    """A seeded user is public, as is a seeded name with its name as password; nobody else is."""
    assert all(map(has_public_password, SEEDED_USERS))
    assert has_public_password(_user("admin", password="admin"))
    assert has_public_password(_user("admin", Role.USER, password="admin"))
    assert not has_public_password(_user("admin", password="changed"))
    assert not has_public_password(_user("alice", password="alice"))


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("name", "role", "password"),
    [
        *((name, "user", "x") for name in ("", "a:b", "a\n", "-a", "ä", "a" * 65)),
        ("a", "root", "x"),
        ("a", "user", ""),
    ],
)
def test_bad_user_is_not_made(name: str, role: str, password: str) -> None:
    """A name, role or password that a users file could not hold is refused."""
    with pytest.raises(ValueError, match=r"name|role|password|Role"):
        make_user(name, role, password)


# --- login ------------------------------------------------------------------------------


def test_login_returns_a_token_of_exactly_the_documented_claims(
    authenticator: Authenticator,
) -> None:
    """iss, aud, sub, role, iat, exp after 30 days, a random jti, cnf with the thumbprint."""
    before = int(time.time())
    token, expires_at = authenticator.login("root", "toor", _CERTIFICATE)
    claims = jwt.decode(token, _KEY, algorithms=["HS256"], audience="jobworker.v1")
    issued = claims.pop("iat")
    assert before <= issued <= time.time()
    assert uuid.UUID(claims.pop("jti")).version == 4
    assert claims == {
        "iss": "job-worker",
        "aud": "jobworker.v1",
        "sub": "root",
        "role": "admin",
        "exp": issued + 30 * 24 * 3600,
        "cnf": {"x5t#S256": _THUMBPRINT},
    }
    assert expires_at == datetime.fromtimestamp(claims["exp"], UTC)
    assert jwt.get_unverified_header(token)["alg"] == "HS256"
    assert authenticator.authenticate(token, _CERTIFICATE) == Identity("root", Role.ADMIN)


def test_two_logins_return_different_tokens(authenticator: Authenticator) -> None:
    """The jti tells two tokens of one second apart."""
    tokens = [authenticator.login("alice", "secret", _CERTIFICATE)[0] for _ in range(2)]
    assert tokens[0] != tokens[1]


def test_unknown_user_and_wrong_password_are_the_same(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both get one message and cost one hash of the same cost."""
    scrypt, calls = hashlib.scrypt, []

    def spy(password: bytes, **options: Any) -> bytes:
        calls.append({**options, "salt": b""})
        return scrypt(password, **options)

    monkeypatch.setattr(hashlib, "scrypt", spy)
    messages = set()
    for name, password in (("alice", "wrong"), ("nobody", "secret"), ("", "")):
        with pytest.raises(AuthenticationError) as caught:
            authenticator.login(name, password, _CERTIFICATE)
        messages.add(str(caught.value))
    assert messages == {"wrong user name or password"}
    assert len(calls) == 3
    assert calls[0] == calls[1] == calls[2]


def test_login_beyond_the_eighth_at_once_is_refused_and_then_admitted_again(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With eight logins under way a ninth fails at once; when they are done it succeeds."""
    scrypt, may_hash = hashlib.scrypt, threading.Event()
    under_way = threading.Semaphore(0)
    slots = authenticator._logins

    class _Slots:
        """The real slots; tells when one is taken."""

        def acquire(self, *, blocking: bool) -> bool:
            taken = slots.acquire(blocking=blocking)
            under_way.release()
            return taken

        release = slots.release

    def blocked(password: bytes, **options: Any) -> bytes:
        assert may_hash.wait(_GUARD_S)
        return scrypt(password, **options)

    monkeypatch.setattr(hashlib, "scrypt", blocked)
    monkeypatch.setattr(authenticator, "_logins", _Slots())
    with ThreadPoolExecutor(8) as pool:
        logins = [
            pool.submit(authenticator.login, "alice", "secret", _CERTIFICATE) for _ in range(8)
        ]
        for _ in logins:
            assert under_way.acquire(timeout=_GUARD_S)
        with pytest.raises(TooManyLoginsError, match="too many logins"):
            authenticator.login("alice", "secret", _CERTIFICATE)
        may_hash.set()
        assert all(login.result(_GUARD_S) for login in logins)
    assert authenticator.login("alice", "secret", _CERTIFICATE)


def test_failed_logins_use_up_no_slots(authenticator: Authenticator) -> None:
    """After more wrong passwords than there are slots the right one still works."""
    for _ in range(10):
        with pytest.raises(AuthenticationError):
            authenticator.login("alice", "wrong", _CERTIFICATE)
    assert authenticator.login("alice", "secret", _CERTIFICATE)


@pytest.mark.parametrize("users", [[], [_ALICE, _user("alice", Role.ADMIN)]])
def test_table_without_users_or_with_a_name_twice_is_refused(users: list[User]) -> None:
    """Nobody could log in, or it would be a matter of luck as whom."""
    with pytest.raises(ValueError, match="users"):
        Authenticator(users=users, key=_KEY)


def test_hash_and_password_do_not_show() -> None:
    """Neither the repr of a user nor an error tells a hash or a password."""
    assert _ALICE.password_hash not in repr(_ALICE)
    assert "alice" in repr(_ALICE)
    with pytest.raises(AuthenticationError) as caught:
        Authenticator(users=[_ALICE], key=_KEY).login("alice", "hunter2", _CERTIFICATE)
    assert "hunter2" not in repr(caught.value)


# --- tokens -----------------------------------------------------------------------------


def _claims(**changes: Any) -> dict[str, Any]:
    """Claims that are accepted, with `changes`; a change to ... leaves the claim out."""
    now = int(time.time())
    claims = {
        "iss": "job-worker",
        "aud": "jobworker.v1",
        "sub": "alice",
        "role": "user",
        "iat": now,
        "exp": now + 3600,
        "jti": "1",
        "cnf": {"x5t#S256": _THUMBPRINT},
    } | changes
    return {name: value for name, value in claims.items() if value is not ...}


def _token(**changes: Any) -> str:
    return jwt.encode(_claims(**changes), _KEY, algorithm="HS256")


def _assemble(header: bytes, payload: bytes, key: bytes = _KEY) -> str:
    """A token of any header and payload, with the right HMAC-SHA256 for both."""
    signed = ".".join(
        base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (header, payload)
    )
    mac = hmac.digest(key, signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def _with_header(header: object) -> str:
    return _assemble(json.dumps(header).encode(), json.dumps(_claims()).encode())


_HOUR = timedelta(hours=1)
_FORGERIES: dict[str, Callable[[], str]] = {
    "algorithm none": lambda: jwt.encode(_claims(), None, algorithm="none"),
    "algorithm none, signed": lambda: _with_header({"alg": "none", "typ": "JWT"}),
    "algorithm RS256": lambda: _with_header({"alg": "RS256", "typ": "JWT"}),
    "algorithm HS512": lambda: jwt.encode(_claims(), _KEY * 2, algorithm="HS512"),
    "algorithm missing": lambda: _with_header({"typ": "JWT"}),
    "algorithm a list": lambda: _with_header({"alg": ["HS256"]}),
    "header not an object": lambda: _with_header(["HS256"]),
    "header nested deeply": lambda: _assemble(b"[" * 4000, b"{}"),
    "payload nested deeply": lambda: _assemble(b'{"alg":"HS256"}', b"[" * 4000),
    "payload not an object": lambda: _assemble(b'{"alg":"HS256"}', b"[]"),
    "payload not JSON": lambda: _assemble(b'{"alg":"HS256"}', b"\xff"),
    "another key": lambda: jwt.encode(_claims(), bytes(32), algorithm="HS256"),
    "signature cut off": lambda: _token().rpartition(".")[0] + ".",
    "payload changed": lambda: _spliced(_token(), _token(sub="root", role="admin")),
    "another issuer": lambda: _token(iss="someone"),
    "another audience": lambda: _token(aud="jobworker.v2"),
    "expired": lambda: _token(iat=datetime.now(UTC) - 2 * _HOUR, exp=datetime.now(UTC) - _HOUR),
    "issued in the future": lambda: _token(iat=datetime.now(UTC) + _HOUR),
    "sub unknown": lambda: _token(sub="mallory"),
    "sub a number": lambda: _token(sub=7),
    "sub a list": lambda: _token(sub=["alice"]),
    "role of more": lambda: _token(role="admin"),
    "role in the wrong case": lambda: _token(role="USER"),
    "role a list": lambda: _token(role=["user"]),
    "exp not a number": lambda: _token(exp="later"),
    "cnf empty": lambda: _token(cnf={}),
    "cnf of another certificate": lambda: _token(cnf={"x5t#S256": _THUMBPRINT[::-1]}),
    "cnf of another kind": lambda: _token(cnf={"jkt": _THUMBPRINT}),
    "cnf not an object": lambda: _token(cnf=_THUMBPRINT),
    "cnf null": lambda: _token(cnf=None),
    "cnf with a number": lambda: _token(cnf={"x5t#S256": 1}),
    "cnf not ASCII": lambda: _token(cnf={"x5t#S256": "ä" * 43}),
    "empty": str,
    "garbage": lambda: "garbage",
    "dots": lambda: "..",
    "not ASCII": lambda: "tökén.☃.☃",
    "huge": lambda: "a" * 1_000_000,
    "huge, with dots": lambda: f"{'a' * 500_000}.{'b' * 500_000}.c",
}


def _without(claim: str) -> Callable[[], str]:
    return lambda: _token(**{claim: ...})


for _claim in _claims():
    _FORGERIES[f"{_claim} missing"] = _without(_claim)


def _spliced(token: str, other: str) -> str:
    header, _, signature = token.split(".")
    return f"{header}.{other.split('.')[1]}.{signature}"


def _assert_refused(authenticator: Authenticator, token: str, certificate: bytes) -> None:
    with pytest.raises(AuthenticationError) as caught:
        authenticator.authenticate(token, certificate)
    assert str(caught.value) == "the token is not valid (any more) here; log in again"


def test_token_of_the_forgers_table_would_be_accepted_unchanged(
    authenticator: Authenticator,
) -> None:
    """What the forgeries start from is valid, so each fails for its own reason."""
    for token in (_token(), _with_header({"alg": "HS256", "typ": "JWT"})):
        assert authenticator.authenticate(token, _CERTIFICATE) == Identity("alice", Role.USER)


@pytest.mark.parametrize("forgery", _FORGERIES)
def test_forged_token_is_refused_with_the_one_message(
    authenticator: Authenticator, forgery: str
) -> None:
    """Whatever is wrong with a token, the answer is the same and tells nothing."""
    _assert_refused(authenticator, _FORGERIES[forgery](), _CERTIFICATE)


@given(
    token=st.text()
    | st.lists(st.binary(), min_size=3, max_size=3).map(
        lambda parts: ".".join(base64.urlsafe_b64encode(part).decode() for part in parts)
    )
)
def test_no_text_is_a_token_by_chance(token: str) -> None:
    """Any text is refused in the same way, and never by another error."""
    _assert_refused(Authenticator(users=[_ALICE], key=_KEY), token, _CERTIFICATE)


def test_token_is_worth_nothing_with_another_certificate(authenticator: Authenticator) -> None:
    """A stolen token does not work without the certificate of its login."""
    token, _ = authenticator.login("alice", "secret", _CERTIFICATE)
    _assert_refused(authenticator, token, b"another certificate")
    assert authenticator.authenticate(token, _CERTIFICATE)


def test_token_of_a_removed_or_changed_user_is_refused() -> None:
    """A token ends with its user, and with the role it was issued for."""
    token, _ = Authenticator(users=[_ROOT], key=_KEY).login("root", "toor", _CERTIFICATE)
    for users in ([_ALICE], [_user("root", Role.USER)]):
        _assert_refused(Authenticator(users=users, key=_KEY), token, _CERTIFICATE)


def test_token_survives_a_new_authenticator_of_the_same_key_only() -> None:
    """Tokens outlive a restart, and end with their key."""
    token, _ = Authenticator(users=[_ALICE], key=_KEY).login("alice", "secret", _CERTIFICATE)
    again = Authenticator(users=[_ROOT, _ALICE], key=_KEY)
    assert again.authenticate(token, _CERTIFICATE) == Identity("alice", Role.USER)
    _assert_refused(Authenticator(users=[_ALICE], key=bytes(32)), token, _CERTIFICATE)


# --- permissions ------------------------------------------------------------------------


def test_permission_table_names_exactly_the_methods_of_the_services() -> None:
    """No RPC is forgotten in the table, streams included, and none is in it that is not there."""
    services = [
        *authservice_pb2.DESCRIPTOR.services_by_name.values(),
        *workerservice_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    methods = {
        f"/{service.full_name}/{method.name}" for service in services for method in service.methods
    }
    assert set(PERMISSIONS) == methods


def test_only_login_needs_no_token() -> None:
    """Every other method has its roles."""
    assert [method for method, roles in PERMISSIONS.items() if roles is None] == [
        "/jobworker.v1.AuthService/Login"
    ]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    "method",
    ["", "/jobworker.v1.WorkerService/Nothing", "StartJob", "/jobworker.v1.AuthService/Login"],
)
def test_what_is_not_granted_is_denied(method: str, role: Role) -> None:
    """A method without roles in the table may be called by nobody, admins included."""
    assert not may_call(method, role)


def test_admin_reaches_all_jobs_and_a_user_their_own() -> None:
    """Ownership is by exact name."""
    assert Identity("root", Role.ADMIN).reaches("alice")
    assert Identity("alice", Role.USER).reaches("alice")
    for owner in ("root", "Alice", "alice2", ""):
        assert not Identity("alice", Role.USER).reaches(owner)


# --- the users file ---------------------------------------------------------------------


@pytest.fixture
def users_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "users"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_users_file_holds_entries_comments_and_blank_lines(
    users_file: Callable[[str], Path],
) -> None:
    """Entries are as `str(User)` writes them; what is blank or begins with # does not count."""
    path = users_file(f"# who may call\n\n{_ALICE}\n   \n  {_ROOT}  \n#{_ALICE}")
    assert load_users(path) == (_ALICE, _ROOT)


@pytest.mark.usefixtures("cheap")
def test_made_user_can_log_in_from_the_file(users_file: Callable[[str], Path]) -> None:
    """The entry of `make_user` comes back from the file and takes its password."""
    made = make_user("bob@example.org", "admin", "c:o:l:o:n ☃")
    users = load_users(users_file(f"{made}\n"))
    assert users == (made,)
    assert Authenticator(users=users, key=_KEY).login(made.name, "c:o:l:o:n ☃", _CERTIFICATE)


_HASH = _ALICE.password_hash


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice:user",
        f"alice:user:{_HASH}:more",
        f"alice:root:{_HASH}",
        f"alice:Admin:{_HASH}",
        f":user:{_HASH}",
        f"a b:user:{_HASH}",
        f"{'a' * 65}:user:{_HASH}",
        "alice:user:secret",
        "alice:user:",
        f"alice:user:{_HASH.replace('scrypt', 'md5')}",
        f"alice:user:{_HASH.replace('$1$8$1$', '$0$8$1$')}",
        f"alice:user:{_HASH.replace('$1$8$1$', '$21$8$1$')}",
        f"alice:user:{_HASH.replace('$1$8$1$', '$x$8$1$')}",
        f"alice:user:{_HASH.replace('$1$8$1$', '$1$0$1$')}",
        f"alice:user:{_HASH[:-4]}",
        f"alice:user:{_HASH}ä",
        "\ufffd",
    ],
)
def test_bad_line_of_the_users_file_is_named_with_its_number(
    users_file: Callable[[str], Path], line: str
) -> None:
    """The error names file, line and the right form, and does not show what stands there."""
    path = users_file(f"{_ROOT}\n# comment\n{line}\n")
    with pytest.raises(UsersFileError) as caught:
        load_users(path)
    assert f"{path}, line 3: not NAME:ROLE:HASH" in str(caught.value)
    assert "./server user NAME" in str(caught.value)
    assert _HASH not in str(caught.value)


def test_second_entry_of_a_name_is_refused(users_file: Callable[[str], Path]) -> None:
    """Which of two entries counts must not depend on their order."""
    path = users_file(f"{_ALICE}\n{_user('alice', Role.ADMIN)}\n")
    with pytest.raises(UsersFileError, match=r"line 2: a second entry for alice"):
        load_users(path)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_users_file_without_users_is_refused(users_file: Callable[[str], Path], text: str) -> None:
    """A server that nobody can log in to is a mistake."""
    with pytest.raises(UsersFileError, match="no users in it"):
        load_users(users_file(text))


def test_missing_users_file_is_an_oserror(tmp_path: Path) -> None:
    """It is not taken for an empty one, nor replaced by the seeded users."""
    with pytest.raises(FileNotFoundError):
        load_users(tmp_path / "absent")


# --- the token key ----------------------------------------------------------------------


def test_key_is_made_once_privately_and_kept(tmp_path: Path) -> None:
    """The first call makes 32 random bytes, mode 0600, and leaves nothing else; later ones read."""
    path = tmp_path / "token.key"
    key = load_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path) == key == path.read_bytes()
    assert load_key(tmp_path / "another.key") != key
    assert {entry.name for entry in tmp_path.iterdir()} == {"token.key", "another.key"}


def test_all_who_make_the_key_at_once_get_the_same(tmp_path: Path) -> None:
    """However many start at the same moment, one key wins for all of them."""
    barrier = threading.Barrier(8)

    def load(_: int) -> bytes:
        barrier.wait(_GUARD_S)
        return load_key(tmp_path / "token.key")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(load, range(8)))) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["token.key"]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_key_of_the_wrong_size_is_refused(tmp_path: Path, size: int) -> None:
    """A damaged key is not used and not silently replaced."""
    path = tmp_path / "token.key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(ValueError, match="not a token key of 32 bytes; delete it"):
        load_key(path)
    assert path.read_bytes() == bytes(size)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """The remedy is in the message."""
    path = tmp_path / "token.key"
    load_key(path)
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"chmod 600 {path}"):
        load_key(path)


def test_key_cannot_be_made_where_there_is_no_directory(tmp_path: Path) -> None:
    """The operator's mistake is an OSError, not a key in some other place."""
    with pytest.raises(FileNotFoundError):
        load_key(tmp_path / "absent" / "token.key")
