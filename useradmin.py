"""The command `server user`: makes entries for the users file, and accounts of the host.

    print(ask("alice", "user"))                # asks for a password
    add_user(Settings(users=Path("users")), "alice", "user", make_account=True)

A server that runs learns of a new user at its next reload.

Thread safety: only the main thread of the program uses this module.

Source: useradd(8).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from accounts import parse_uids, uid_for
from settings import Settings, SettingsError
from trustedfiles import check
from users import User, make_user, parse_users

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["add_user", "ask"]

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def ask(name: str, role: str) -> User:
    """Ask for a password and return the user's entry. Raises `SettingsError`."""
    if sys.stdin.isatty():
        password = getpass.getpass(f"Password for {name}: ")
        if getpass.getpass("Once more: ") != password:
            raise SettingsError("the two passwords differ")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    try:
        return make_user(name, role, password)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def add_user(settings: Settings, name: str, role: str, *, make_account: bool) -> None:
    """Ask for a password and add the entry to the users file, which is made if it is missing.

    `make_account`: have an account of the host for the user's jobs first: the one of the user's
    name, or a new one. Raises `SettingsError`, `AccountsError`, `UntrustedFileError`, OSError.
    """
    if settings.users is None:
        raise SettingsError("to which file? write: server --users FILE user add NAME")
    before = settings.users.read_bytes() if settings.users.exists() else b""
    if before:
        check(settings.users)
        if name in {user.name for user in parse_users(before, str(settings.users))}:
            raise SettingsError(f"{settings.users} has an entry for {name}; delete it first")
    user = ask(name, role)
    if make_account:
        _make_account(settings, name)
    if before and not before.endswith(b"\n"):
        before += b"\n"
    _replace(settings.users, before + f"{user}\n".encode())


def _replace(path: Path, content: bytes) -> None:
    """Replace the file at once. It belongs to us then, and nobody else may read it."""
    fd, temporary = tempfile.mkstemp(dir=path.absolute().parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _make_account(settings: Settings, name: str) -> None:
    """Have an account of the user's name; with `--accounts range`, with a uid of the range."""
    uids = parse_uids(settings.uids)[1:] if settings.accounts == "range" else None
    with contextlib.suppress(KeyError):
        found = pwd.getpwnam(name).pw_uid
        if uids is not None and found not in uids:
            raise SettingsError(
                f"the host has an account {name} with the uid {found}, which is not one of --uids "
                f"{settings.uids}; choose another name, or --accounts host"
            )
        return
    if uids is None:
        _run("useradd", "--create-home", "--user-group", "--shell=/bin/sh", name)
        return
    uid = uid_for(name, settings.state_dir / "store", uids)
    # The server makes the home when the user's first job starts. The gid of a job is its uid.
    home = settings.state_dir.absolute() / "homes" / name
    _run("groupadd", f"--gid={uid}", name)
    numbers = f"--uid={uid}", f"--gid={uid}"
    _run("useradd", *numbers, "--no-create-home", f"--home-dir={home}", "--shell=/bin/sh", name)


def _run(name: str, *arguments: str) -> None:
    program = shutil.which(name, path=_PATH)
    if program is None:
        raise SettingsError(f"--make-account needs {name} (Debian: apt install passwd)")
    done = subprocess.run([program, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise SettingsError(f"--make-account: {reason}")
