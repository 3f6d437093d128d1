"""Tests of `server user add`, which adds a user to the users file and an account to the host."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from client import Client
from testkit import GUARD_S, ServerProgram, clean_environment
from users import Role, make_user, parse_users, password_matches

_HERE = Path(__file__).resolve().parent
# Runs the rest of its arguments where /etc is the directory "$1".
_WITH_ETC = ("unshare", "--mount", "sh", "-c", 'mount --bind "$1" /etc; shift; exec "$@"', "sh")


def _server(
    *arguments: str | Path, before: tuple[str, ...] = (), password: str = "secret"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, str(_HERE / "server.py"), *map(str, arguments)],
        input=f"{password}\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=GUARD_S,
        env=clean_environment(),
    )


def test_user_is_added_to_the_file(tmp_path: Path) -> None:
    """The file is made if it is missing, for us alone; other lines of it stay."""
    users = tmp_path / "users"
    done = _server("--users", users, "user", "add", "alice", "--role", "admin")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"added alice to {users}; a server that runs reads it at SIGHUP\n"
    assert stat.S_IMODE(users.stat().st_mode) == 0o600
    users.write_text(f"# ours\n{users.read_text().strip()}")
    assert _server("--users", users, "user", "add", "bob").returncode == 0
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
        (["user", "add", "alice"], "secret", "write: server --users FILE user add NAME"),
        (["--users", "FILE", "user", "add", "alice"], "secret", "has an entry for alice"),
        (["--users", "FILE", "user", "add", "a b"], "secret", "bad user name 'a b'"),
        (["--users", "FILE", "user", "add", "bob"], "", "must not be empty"),
        (["--users", "FILE", "user", "plus", "bob"], "secret", "write `user add bob`"),
    ],
)
def test_mistake_is_told_and_changes_nothing(
    tmp_path: Path, arguments: list[str], password: str, text: str
) -> None:
    """In one line."""
    users = tmp_path / "users"
    users.touch(0o600)
    users.write_text(f"{make_user('alice', 'user', 'x')}\n")
    before = users.read_text()
    words = [str(users) if word == "FILE" else word for word in arguments]
    done = _server(*words, password=password)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert text in done.stderr
    assert users.read_text() == before
    assert os.listdir(tmp_path) == ["users"]


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
    assert (done.returncode, done.stderr) == (0, "")
    # An account that exists is the user's.
    users.unlink()
    done = _server(*options, "user", "add", "carol", "--make-account", before=before)
    assert (done.returncode, done.stderr) == (0, "")
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
