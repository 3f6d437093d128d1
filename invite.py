"""The command `server invite`: an account, a client certificate, and a bundle for the user.

    password = invite(settings, "alice", Invitation(address="jobs.example.org:50051", ...))

The new key is in the bundle alone: it is made in a temporary directory, which is removed.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import bundle
from certcheck import UnusableError, check_ca, check_pair
from settings import Settings, SettingsError
from units import parse_address
from useradmin import UsersFile, create_account
from users import Role, make_user

__all__ = ["Invitation", "invite"]

_GENERATE: Final = Path(__file__).resolve().parent / "certs" / "generate.sh"
_CA, _CA_KEY = "client-ca.pem", "client-ca-key.pem"
_MODE = 0o600
_PASSWORD_BYTES = 12


@dataclass(frozen=True, slots=True)
class Invitation:
    """What `server invite` is asked for."""

    address: str
    """HOST:PORT at which the user reaches the server."""
    ca: Path
    """The directory of client-ca.pem, client-ca-key.pem and server-ca.pem."""
    output: Path
    """The bundle, which must not exist yet."""
    role: str = Role.USER.value
    make_account: bool = False


def invite(settings: Settings, name: str, invitation: Invitation) -> str:
    """Make the user, if the users file has no such user, and the bundle.

    Return the new user's password; "" if the user was there before, or if the settings name no
    users file. Raises `SettingsError`, `AccountsError`, `UntrustedFileError`, OSError.
    """
    try:
        parse_address(invitation.address)
    except ValueError as error:
        raise SettingsError(f"--address {error}") from None
    if invitation.output.exists():
        raise SettingsError(f"{invitation.output} exists; remove it, or name another with --output")
    password = secrets.token_hex(_PASSWORD_BYTES)  # begins with no dash, as an option does
    try:
        user = make_user(name, invitation.role, password)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    profile = f"server = {json.dumps(invitation.address)}\nuser = {json.dumps(name)}\n"
    files = _certificate(name, invitation.ca) | {bundle.PROFILE: profile.encode()}
    # First the bundle, which may fail: a user without it would have a password that nobody knows.
    fd = os.open(invitation.output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    try:
        with open(fd, "wb") as file:
            file.write(bundle.pack(files))
        is_new = False
        if settings.users is not None:
            users = UsersFile.of(settings)
            is_new = name not in {each.name for each in users.users()}
            if is_new and invitation.make_account:
                create_account(settings, name)
            if is_new:
                users.add(user)
    except BaseException:
        invitation.output.unlink(missing_ok=True)
        raise
    return password if is_new else ""


def _certificate(name: str, ca: Path) -> dict[str, bytes]:
    """Return a new client certificate with its key, and the server's CA."""
    for each in (_CA, _CA_KEY, bundle.CA):
        if not (ca / each).exists():
            raise SettingsError(
                f"{ca / each} is missing, and `invite` needs it to sign the certificate; run it "
                "where the keys of the CAs are kept, or name their directory with --ca (without a "
                "users file it makes no account)"
            )
    with tempfile.TemporaryDirectory() as directory:
        for each in (_CA, _CA_KEY, bundle.CA):
            os.symlink((ca / each).absolute(), os.path.join(directory, each))
        done = subprocess.run(
            [_GENERATE, "--dir", directory, name], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise SettingsError(" ".join(done.stderr.split()).replace(directory, str(ca)))
        made = {
            bundle.CERTIFICATE: Path(directory, f"{name}.pem").read_bytes(),
            bundle.KEY: Path(directory, f"{name}-key.pem").read_bytes(),
            bundle.CA: (ca / bundle.CA).read_bytes(),
        }
    try:
        check_ca(str(ca / bundle.CA), made[bundle.CA])
        check_pair(
            "client", f"{name}.pem", made[bundle.CERTIFICATE], f"{name}-key.pem", made[bundle.KEY]
        )
    except UnusableError as error:
        raise SettingsError(str(error)) from error
    return made
