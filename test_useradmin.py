"""Tests of `server user`, which edits the users file and makes accounts of the host."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from client import Client, ClientError
from testkit import ServerProgram, run_server
from useradmin import UsersFile
from users import Role, User, make_user, parse_users, password_matches

_HERE = Path(__file__).resolve().parent
_made_user = cache(make_user)  # a hash takes half a second
# Runs the rest of its arguments where /etc is the directory "$1".
_WITH_ETC = ("unshare", "--mount", "sh", "-c", 'mount --bind "$1" /etc; shift; exec "$@"', "sh")


def _server(
    *arguments: str | Path, before: tuple[str, ...] = (), password: str = "secret"
) -> subprocess.CompletedProcess[str]:
    return run_server(*arguments, before=before, stdin=f"{password}\n")


def test_user_is_added_to_the_file(tmp_path: Path) -> None:
    """The file is made if it is missing, for us alone; other lines of it stay."""
    users = tmp_path / "users"
    state = ("--state-dir", tmp_path)
    done = _server("--users", users, *state, "user", "add", "alice", "--role", "admin")
    assert (done.returncode, done.stdout) == (0, f"added alice to {users}\n")
    assert done.stderr.startswith("server: no running server has been told: no server runs with ")
    assert stat.S_IMODE(users.stat().st_mode) == 0o600
    users.write_text(f"# ours\n{users.read_text().strip()}")
    assert _server("--users", users, *state, "user", "add", "bob").returncode == 0
    assert users.read_text().startswith("# ours\nalice:")
    alice, bob = parse_users(users.read_bytes(), "users")
    assert [(user.name, user.role) for user in (alice, bob)] == [
        ("alice", Role.ADMIN),
        ("bob", Role.USER),
    ]
    assert password_matches("secret", bob.password_hash)
    assert os.listdir(tmp_path) == ["users"]


@pytest.mark.parametrize(
    ("arguments", "password", "text"),
    [
        (["user", "add", "alice"], "secret", "which users file? name it: server --users FILE user"),
        (["--users", "FILE", "user", "add", "alice"], "secret", "has an entry for alice"),
        (["--users", "FILE", "user", "add", "a b"], "secret", "bad user name 'a b'"),
        (["--users", "FILE", "user", "add", "bob"], "", "must not be empty"),
        (["--users", "FILE", "user", "plus", "bob"], "secret", "write `user add NAME`"),
        (["--users", "FILE", "user", "role", "alice", "root"], "", "write `user add NAME`"),
        (["--users", "FILE", "user", "list", "alice"], "", "write `user add NAME`"),
        (
            ["--users", "/no/such", "user", "list"],
            "",
            "--users /no/such: No such file or directory",
        ),
        (["--users", "FILE", "user", "passwd"], "", "write `user add NAME`"),
        (["--users", "FILE", "user", "passwd", "bob"], "secret", "no entry for bob"),
        (["--users", "FILE", "user", "passwd", "alice"], "", "must not be empty"),
        (["--users", "FILE", "user", "role", "bob", "admin"], "", "no entry for bob"),
        (["--users", "FILE", "user", "remove", "bob"], "", "no entry for bob"),
        (["--users", "FILE", "user", "remove", "alice"], "", "alice is the last user"),
    ],
)
def test_mistake_is_told_and_changes_nothing(
    tmp_path: Path, arguments: list[str], password: str, text: str
) -> None:
    """In one line."""
    users = tmp_path / "users"
    users.touch(0o600)
    users.write_text(f"{_made_user('alice', 'user', 'x')}\n")
    before = users.read_text()
    words = [str(users) if word == "FILE" else word for word in arguments]
    done = _server(*words, password=password)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert text in done.stderr
    assert users.read_text() == before
    assert os.listdir(tmp_path) == ["users"]


def _users(path: Path) -> dict[str, User]:
    return {user.name: user for user in parse_users(path.read_bytes(), "users")}


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """A users file with a comment, an account, a byte that is no UTF-8, and a mode of its own."""
    path = tmp_path / "users"
    alice, bob = _made_user("alice", "user", "x"), _made_user("bob", "admin", "y")
    path.write_bytes(f"# ours\n\n  {alice}:ann\n# alice: ".encode() + b"\xff\n" + f"{bob}".encode())
    path.chmod(0o640)
    return path


def test_role_and_password_of_a_user_change(users: Path) -> None:
    """All else stays: other lines, the account, owner and mode; also of the file behind a link."""
    if os.geteuid() == 0:
        os.chown(users, 0, 4711)
    link = users.with_name("link")
    link.symlink_to(users)
    before, of_before = users.read_bytes(), users.stat()
    lines = before.splitlines()
    options = ("--users", link, "--state-dir", users.parent)
    done = _server(*options, "user", "role", "alice", "admin")
    assert (done.returncode, done.stdout) == (0, "alice has the role admin\n")
    alice = _users(users)["alice"]
    assert (alice.role, alice.account) == (Role.ADMIN, "ann")
    done = _server(*options, "user", "passwd", "alice", password="new")
    assert done.returncode == 0, done.stderr
    changed = _users(users)["alice"]
    assert (changed.role, changed.account) == (Role.ADMIN, "ann")
    assert password_matches("new", changed.password_hash)
    after = users.read_bytes().splitlines()
    assert [line for number, line in enumerate(after) if number != 2] == [
        line for number, line in enumerate(lines) if number != 2
    ]
    of_after = users.stat()
    for name in ("st_mode", "st_uid", "st_gid"):
        assert getattr(of_after, name) == getattr(of_before, name)
    assert link.is_symlink()
    assert sorted(os.listdir(users.parent)) == ["link", "users"]


def test_users_are_listed_and_removed(users: Path) -> None:
    """A list has name, role and account, with tabs between."""
    options = ("--users", users, "--state-dir", users.parent)
    done = _server(*options, "user", "list")
    assert (done.returncode, done.stdout) == (0, "alice\tuser\tann\nbob\tadmin\t-\n")
    done = _server(*options, "user", "remove", "alice")
    assert (done.returncode, done.stdout) == (0, f"removed alice from {users}\n")
    assert list(_users(users)) == ["bob"]
    assert users.read_bytes().startswith(b"# ours\n\n# alice: \xff\nbob:")


def test_edits_at_the_same_time_all_count(users: Path) -> None:
    """Each waits for the one that has begun."""
    names = [f"user{number}" for number in range(12)]
    user = _made_user("user", "user", "x")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: UsersFile(users).add(replace(user, name=name)), names))
    assert set(_users(users)) == {"alice", "bob", *names}


def test_running_server_reads_an_edit_at_once(certs: Path, public: Path) -> None:
    """Without a signal. What the server refuses is told, and the exit status is then 1."""
    users, state = public / "users", public / "state"
    users.touch(0o600)
    users.write_text(f"{_made_user('alice', 'user', 'x')}\n")
    options = ("--users", users, "--state-dir", state)
    server = ServerProgram(
        public / "log",
        *("--listen", "127.0.0.1:0", "--limits", "off", "--certs", str(certs)),
        *map(str, options),
    )
    done = _server(*options, "user", "add", "bob")
    assert (done.returncode, done.stderr) == (0, "")
    with Client(server.address, certs=certs) as client:
        client.login("bob", "secret")
        assert _server(*options, "user", "remove", "bob").returncode == 0
        with pytest.raises(ClientError, match="log in"):
            client.list()
    users.chmod(0o666)
    done = _server("--users", public / "others", "--state-dir", state, "user", "add", "eve")
    assert done.returncode == 1
    assert "the running server: the users stay as they were: " in done.stderr
    assert server.end() == 0


@pytest.mark.parametrize("accounts", ["range", "host"])
def test_user_with_an_account_logs_in_and_finds_a_home(
    public: Path, certs: Path, accounts: str
) -> None:
    """Here in a copy of /etc, so that this host keeps its accounts."""
    if os.geteuid() != 0 or shutil.which("useradd", path="/usr/sbin:/sbin") is None:
        pytest.skip("needs root and useradd")
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    etc, state, users = public / "etc", public / "state", public / "users"
    shutil.copytree("/etc", etc, symlinks=True)
    if accounts == "host":  # its home must not be one of this host
        (etc / "default" / "useradd").write_text(f"HOME={public}\n")
    before = (*_WITH_ETC, str(etc))
    options = ("--users", users, "--state-dir", state, "--accounts", accounts)
    done = _server(*options, "user", "add", "carol", "--make-account", before=before)
    assert done.returncode == 0, done.stderr
    # An account that exists is the user's.
    users.unlink()
    done = _server(*options, "user", "add", "carol", "--make-account", before=before)
    assert done.returncode == 0, done.stderr
    server = ServerProgram(
        public / "log",
        *("--listen", "127.0.0.1:0", "--limits", "off", "--certs", str(certs)),
        *map(str, options),
        before=before,
    )
    with Client(server.address, certs=certs) as client:
        client.login("carol", "secret")
        job_id = client.start("sh", ["-c", "id -un; id -gn; id -u; pwd; echo ~carol"])
        told = b"".join(client.stream(job_id)).decode().splitlines()
    assert server.end() == 0
    home = str(state / "homes" / "carol" if accounts == "range" else public / "carol")
    assert told[:2] == ["carol", "carol"], server.log.read_text()
    assert told[3:] == [home, home]
    assert (int(told[2]) in range(70_001, 80_000)) is (accounts == "range")


def test_account_with_another_uid_is_an_error(public: Path) -> None:
    """It is somebody else's. The users file stays as it was."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    users = public / "users"
    done = _server("--users", users, "user", "add", "nobody", "--make-account")
    assert done.returncode == 1
    assert "an account nobody with the uid 65534, which is not one of --uids" in done.stderr
    assert not users.exists()
