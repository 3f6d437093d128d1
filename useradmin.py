"""The command `server user`: edits the users file, and makes accounts of the host.

    users = UsersFile(Path("users"))
    add_user(settings, "alice", Role.USER, make_account=True)     # asks for a password
    users.change("alice", lambda user: replace(user, role=Role.ADMIN))
    new_password(settings, "alice")
    users.remove("alice")

An edit locks the directory of the file, writes a temporary file beside it and renames that file, so
two edits at a time both count, and a reader sees the old content or the new. Comments, the order of
the lines, the owner and the mode stay as they are. A server that runs learns of an edit at its next
reload.

Thread safety: only the main thread of the program uses this module.

Source: useradd(8).
"""

from __future__ import annotations

import contextlib
import getpass
import pwd
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from accounts import parse_uids, uid_for
from environment import PATH
from replacing import locked, replace_file
from settings import Settings, SettingsError
from standardstreams import read_line
from trustedfiles import check
from users import Role, User, make_user, parse_users

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["UsersFile", "add_user", "create_account", "new_entry", "new_password"]


def new_entry(name: str, role: str) -> User:
    """Ask for a password and return an entry of the user. Raises `SettingsError`."""
    if sys.stdin.isatty():
        password = getpass.getpass(f"Password for {name}: ")
        if getpass.getpass("Once more: ") != password:
            raise SettingsError("the two passwords differ")
    else:
        password = read_line()
    try:
        return make_user(name, role, password)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def add_user(settings: Settings, name: str, role: str, *, make_account: bool) -> None:
    """Ask for a password and add the entry to the users file, which is made if it is missing.

    `make_account`: have an account of the host for the user's jobs first: the one of the user's
    name, or a new one. Raises `SettingsError`, `AccountsError`, `UntrustedFileError`, OSError.
    """
    users = UsersFile.of(settings)
    users.must_not_have(name)
    user = new_entry(name, role)
    if make_account:
        create_account(settings, name)
    users.add(user)


class UsersFile:
    """The users file at `path`, for edits; there may be no such file yet.

    The methods raise `SettingsError`, `UntrustedFileError`, OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # a rename would replace a link, and not the file

    @classmethod
    def of(cls, settings: Settings) -> UsersFile:
        """Return the file that the settings name."""
        if settings.users is None:
            raise SettingsError(
                "which users file? name it: server --users FILE user ..., or with --config that of "
                "the server"
            )
        return cls(settings.users)

    def users(self) -> tuple[User, ...]:
        """Return the users of the file; () if there is none."""
        content = self._read()
        return parse_users(content, str(self.path)) if content else ()

    def must_not_have(self, name: str) -> None:
        """Raise `SettingsError` if the file has a user of this name."""
        if name in {user.name for user in self.users()}:
            raise SettingsError(
                f"{self.path} has an entry for {name}; see `server user passwd`, `role`, `remove`"
            )

    def user(self, name: str) -> User:
        """Return the user of this name. Raises `SettingsError` if there is none."""
        for user in self.users():
            if user.name == name:
                return user
        raise SettingsError(f"{self.path} has no entry for {name}; see `server user list`")

    def add(self, user: User) -> None:
        """Add a user; makes the file if it is missing, for its owner alone."""
        with locked(self.path.parent):
            self.must_not_have(user.name)
            content = self._read()
            if content and not content.endswith(b"\n"):
                content += b"\n"
            replace_file(self.path, content + f"{user}\n".encode(), keeps_rights=True)

    def change(self, name: str, change: Callable[[User], User]) -> None:
        """Replace the user's entry by what `change` makes of it."""
        with locked(self.path.parent):
            self._put(name, f"{change(self.user(name))}\n")

    def remove(self, name: str) -> None:
        """Remove the user's entry; the last user cannot be removed."""
        with locked(self.path.parent):
            self.user(name)
            if len(self.users()) == 1:
                raise SettingsError(
                    f"{name} is the last user of {self.path}, and a server needs one; add another "
                    "user first"
                )
            self._put(name, "")

    def _read(self) -> bytes:
        if not self.path.exists():
            return b""
        check(self.path)
        return self.path.read_bytes()

    def _put(self, name: str, line: str) -> None:
        """Put another line in the place of the user's."""
        text = self._read().decode(errors="surrogateescape")
        lines = text.splitlines(keepends=True)
        edited = [line if each.strip().partition(":")[0] == name else each for each in lines]
        content = "".join(edited).encode(errors="surrogateescape")
        replace_file(self.path, content, keeps_rights=True)


def new_password(settings: Settings, name: str) -> None:
    """Ask for a password and give it to a user of the file. Raises like `UsersFile`."""
    users = UsersFile.of(settings)
    users.user(name)
    entry = new_entry(name, Role.USER.value)
    users.change(name, lambda user: replace(user, password_hash=entry.password_hash))


def create_account(settings: Settings, name: str) -> None:
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
    program = shutil.which(name, path=PATH)
    if program is None:
        raise SettingsError(f"--make-account needs {name} (Debian: apt install passwd)")
    done = subprocess.run([program, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise SettingsError(f"--make-account: {reason}")
