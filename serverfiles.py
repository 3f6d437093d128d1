"""The files that the server reads at its start and at a reload, checked before they are believed.

    config = config_in_force(settings)
    files = TrustedFiles(read_again(settings), private=True)
    users = load_users(files, settings.users, "127.0.0.1")

`check_files` reads all of them without a server: for `server check --config`.

Thread safety: the functions have no state; any thread may call them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

from errors import StoreError
from privileges import can_change_user
from settings import Config, Settings, SettingsError, load_config
from tls import Certificates, certificate_files
from trustedfiles import READ_FLAGS, TrustedFiles, UntrustedFileError, check, check_code
from units import parse_address
from users import SEEDED_USERS, User, has_public_password, parse_users

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = [
    "check_files",
    "check_own_code",
    "check_state",
    "config_in_force",
    "load_users",
    "read_again",
    "told_if_full",
]

logger = logging.getLogger("server")


def check_own_code(*, is_isolated: bool) -> None:
    """Raise `UntrustedFileError` if somebody else could change the program that root runs."""
    try:
        check_code()
    except UntrustedFileError as error:
        if is_isolated:
            raise
        logger.warning("%s", error)


def check_state(state_dir: Path, server_uid: int | None) -> None:
    """Raise `UntrustedFileError` if somebody else could change the state directory.

    `server_uid`: the user that this process will become (None: it stays). What is in two of the
    directories in it belongs to that user since the first start.
    """
    check(state_dir)
    check(state_dir / "homes")
    for name in ("output", "tmp"):
        check(state_dir / name, owner=server_uid)


@contextlib.contextmanager
def told_if_full(state_dir: Path) -> Iterator[None]:
    """Have the error of a full disk say which disk it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, StoreError):
            raise
        raise SettingsError(
            f"cannot write to the state directory {state_dir}: {error.strerror}; make room on "
            "its disk, or move it to another disk and name it with --state-dir"
        ) from error


def config_in_force(settings: Settings) -> Config:
    """Return what the configuration file says, and --max-streams.

    Raises OSError, `ConfigError`, `UntrustedFileError`.
    """
    config = Config()
    if settings.config:
        check(settings.config)
        config = load_config(settings.config)
    if settings.max_streams is not None:
        return replace(config, in_all=replace(config.in_all, streams=settings.max_streams))
    return config


def read_again(settings: Settings) -> dict[Path, int]:
    """The files that the server reads at its start and at a reload, with the flags of open(2)."""
    files = dict.fromkeys(certificate_files(settings.certs), READ_FLAGS)
    if settings.users:
        files[settings.users] = READ_FLAGS
    return files


def load_users(files: TrustedFiles, path: Path | None, host: str) -> tuple[User, ...]:
    """Return the users of the file; without one, the seeded users.

    Raises OSError, `UsersFileError`, `UntrustedFileError`, `SettingsError`.
    """
    users = parse_users(files.read(path), str(path)) if path else SEEDED_USERS
    _check_exposure(host, users)
    return users


def _check_exposure(host: str, users: Sequence[User]) -> None:
    """Raise SettingsError if the server would be reachable from elsewhere with public passwords."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:  # UnicodeError: the text cannot be a host name
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"--listen: cannot resolve {host!r}: {reason}") from error
    if all(ip_address(str(address).partition("%")[0]).is_loopback for address in addresses):
        return
    public = [user.name for user in users if has_public_password(user)]
    if public:
        raise SettingsError(
            f"the passwords of {' and '.join(public)} are public, so the server refuses to listen "
            f"on {host}, and listens on loopback only; give it users of your own with --users "
            "FILE (this prints a line for it: ./server user NAME --role ROLE)"
        )


def check_files(settings: Settings) -> tuple[User, ...]:
    """Read what a server reads at its start and at a reload, and return the users.

    Raises the same errors.
    """
    host, _ = parse_address(settings.listen)
    private = settings.isolation != "off" and can_change_user()
    files = TrustedFiles(read_again(settings), private=private)
    config_in_force(settings)
    users = load_users(files, settings.users, host)
    Certificates(files.read, settings.certs)
    return users
