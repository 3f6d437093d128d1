"""Tests of users, their passwords and the users file.

The tests hash passwords at the lowest cost, except where they test the cost.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any

import pytest

import users
from users import (
    SEEDED_USERS,
    Role,
    User,
    UsersFileError,
    has_public_password,
    hash_password,
    make_user,
    parse_users,
    password_matches,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_SALT, _DIGEST = "A" * 22, "B" * 43
_HASH = f"scrypt$17$8$1${_SALT}${_DIGEST}"
_ALICE = User("alice", Role.USER, _HASH)
_ROOT = User("root", Role.ADMIN, _HASH)


@pytest.fixture
def cheap() -> Iterator[None]:
    """Hashes have the lowest cost, and hashes of that cost are accepted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(users, "_SCRYPT_LOG2_N", 1)
        yield


# --- passwords --------------------------------------------------------------------------


def test_password_hash_has_the_documented_form_and_cost() -> None:
    """A hash is `scrypt$17$8$1$SALT$HASH` with 16 and 32 bytes in base64url."""
    scheme, *cost, salt, digest = hash_password("pässword").split("$")
    assert (scheme, cost) == ("scrypt", ["17", "8", "1"])
    raw_salt, raw_digest = (base64.urlsafe_b64decode(part + "==") for part in (salt, digest))
    assert [len(raw_salt), len(raw_digest)] == [16, 32]
    expected = hashlib.scrypt(
        "pässword".encode(), salt=raw_salt, n=1 << 17, r=8, p=1, dklen=32, maxmem=1 << 28
    )
    assert raw_digest == expected


@pytest.mark.usefixtures("cheap")
def test_two_hashes_of_a_password_differ_and_both_match() -> None:
    """Every hash has a salt of its own, and matches its password and no other."""
    hashes = hash_password("pässword"), hash_password("pässword")
    assert len({text.split("$")[4] for text in hashes}) == 2
    assert all(password_matches("pässword", text) for text in hashes)
    assert not any(password_matches("password", text) for text in hashes)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("password", ["", "\ud800", "\0", "x" * 1_000_000])
def test_any_text_is_only_a_wrong_password(password: str) -> None:
    """Text that is not even UTF-8 does not match, and raises nothing."""
    assert not password_matches(password, hash_password("secret"))


def test_hash_of_another_cost_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before any work, so every login takes the same time."""
    calls: list[object] = []

    def scrypt(*arguments: Any, **options: Any) -> bytes:
        calls.append((arguments, options))
        return bytes(32)

    monkeypatch.setattr(hashlib, "scrypt", scrypt)
    for cost in ("16$8$1", "18$8$1", "17$9$1", "17$8$2", "1$8$1", "017$8$1"):
        with pytest.raises(ValueError, match="not a password hash of the accepted form"):
            password_matches("secret", f"scrypt${cost}${_SALT}${_DIGEST}")
    assert calls == []


def test_seeded_users_have_their_names_as_passwords() -> None:
    """`admin` is an admin and `user` a user, with the documented passwords and the full cost."""
    assert {user.name: user.role for user in SEEDED_USERS} == {
        "admin": Role.ADMIN,
        "user": Role.USER,
    }
    for user in SEEDED_USERS:
        assert user.password_hash.startswith("scrypt$17$8$1$")
        assert password_matches(user.name, user.password_hash)


@pytest.mark.usefixtures("cheap")
def test_public_passwords_are_known_whatever_their_salt() -> None:
    """Public are a seeded user, and a seeded name with itself as password; no other user is."""
    assert all(map(has_public_password, SEEDED_USERS))
    assert has_public_password(make_user("admin", "admin", "admin"))
    assert has_public_password(make_user("admin", "user", "admin"))
    assert not has_public_password(make_user("admin", "admin", "changed"))
    assert not has_public_password(make_user("alice", "user", "alice"))


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("name", "role", "password"),
    [
        *((name, "user", "x") for name in ("", "a:b", "a\n", "-a", "ä", "a" * 65)),
        ("a", "root", "x"),
        ("a", "user", ""),
        ("a", "user", "hunter2\udcff"),
    ],
)
def test_bad_user_is_not_made(name: str, role: str, password: str) -> None:
    """An unusable name, role or password is refused. No error shows a password."""
    with pytest.raises(ValueError, match=r"name|role|password|Role") as caught:
        make_user(name, role, password)
    assert "hunter2" not in repr(caught.value)


def test_hash_does_not_show() -> None:
    """The repr of a user tells name and role only."""
    assert repr(_ALICE) == "User(name='alice', role=<Role.USER: 'user'>)"


# --- the users file ---------------------------------------------------------------------


def _parse(text: str) -> tuple[User, ...]:
    return parse_users(text.encode(), "/etc/users")


def test_users_file_holds_entries_comments_and_blank_lines() -> None:
    """`str(User)` writes entries. Blank lines and lines that begin with # are ignored."""
    text = f"# who may call\n\n{_ALICE}\n   \n  {_ROOT}  \n#{_ALICE}"
    assert _parse(text) == (_ALICE, _ROOT)


@pytest.mark.usefixtures("cheap")
def test_made_user_comes_back_from_the_file() -> None:
    """The entry of `make_user` is the same in the file, and takes its password."""
    made = make_user("bob@example.org", "admin", "c:o:l:o:n ☃")
    loaded = _parse(f"{made}\n")
    assert loaded == (made,)
    assert password_matches("c:o:l:o:n ☃", loaded[0].password_hash)


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice:user",
        f"alice:user:{_HASH}:more:yet",
        f"alice:root:{_HASH}",
        f"alice:Admin:{_HASH}",
        f":user:{_HASH}",
        f"a b:user:{_HASH}",
        f"{'a' * 65}:user:{_HASH}",
        "\ufffd",
    ],
)
def test_bad_line_of_the_users_file_is_named_with_its_number(line: str) -> None:
    """The error names file, line and right form, and does not show the line."""
    text = f"{_ROOT}\n# comment\n{line}\n"
    with pytest.raises(UsersFileError) as caught:
        _parse(text)
    assert "/etc/users, line 3: not NAME:ROLE:HASH" in str(caught.value)
    assert "./server user NAME" in str(caught.value)
    assert _DIGEST not in str(caught.value)


@pytest.mark.parametrize(
    "password_hash",
    [
        "secret",
        "",
        _HASH.replace("scrypt", "md5"),
        _HASH.replace("$17$", "$16$"),
        _HASH.replace("$17$", "$18$"),
        _HASH.replace("$17$", "$x$"),
        _HASH.replace("$8$", "$16$"),
        _HASH.replace("$8$1$", "$8$2$"),
        _HASH[:-1],
        f"{_HASH}A",
        f"{_HASH}ä",
        f"{_SALT}${_DIGEST}",
        _HASH.replace(_SALT, _SALT[1:]),
        _HASH.replace(_SALT, "=" * 22),
    ],
)
def test_hash_of_another_form_or_cost_asks_for_a_new_entry(password_hash: str) -> None:
    """Only one cost is accepted, so every login takes the same time. The error has the command."""
    text = f"{_ROOT}\nalice:admin:{password_hash}\n"
    with pytest.raises(UsersFileError) as caught:
        _parse(text)
    assert str(caught.value) == (
        "/etc/users, line 2: not a password hash of the accepted form "
        "(scrypt$17$8$1$SALT$HASH); make a new entry with: "
        "./server user alice --role admin"
    )


def test_second_entry_of_a_name_is_refused() -> None:
    """The order of entries must not matter."""
    text = f"{_ALICE}\nalice:admin:{_HASH}\n"
    with pytest.raises(UsersFileError, match=r"line 2: a second entry for alice"):
        _parse(text)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_users_file_without_users_is_refused(text: str) -> None:
    """A server that nobody can log in to is a mistake."""
    with pytest.raises(UsersFileError, match="no users in it"):
        _parse(text)


def test_bytes_that_are_no_text_are_a_bad_line() -> None:
    """The error is the same, and in the right line."""
    with pytest.raises(UsersFileError, match=r"^/etc/users, line 2: not NAME:ROLE:HASH"):
        parse_users(f"{_ROOT}\n".encode() + b"\xff:\xfe\n", "/etc/users")
