"""The subcommand `import`: makes a profile of the bundle that `server invite` has made.

    import_command(arguments)     # of `client import --as work alice.tar`

Writes the directory `work` beside the file of the profiles, with the certificate, its key and the
CA, mode 0600 each, and a table [work] in the file. Nothing else is written, whatever the bundle
says: its content is checked before, and gives no path.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import json
import os
import re
import sys

import bundle
from certcheck import UnusableError, check_ca, check_pair
from connection import ClientError
from profiles import DEFAULT_PROFILE, config_path, read_profiles
from replacing import replace_file
from units import parse_address

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

__all__ = ["import_command"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def import_command(arguments: argparse.Namespace) -> int:
    """Run the subcommand; return the exit status. Raises ClientError."""
    name = arguments.name or DEFAULT_PROFILE
    user = _import_bundle(arguments.bundle, name, replace=arguments.replace)
    option = "" if name == DEFAULT_PROFILE else f" --profile {name}"
    print(f"profile {name} is ready; now log in as {user}: client login{option}")
    return 0


def _import_bundle(path: str, name: str, *, replace: bool) -> str:
    """Make the profile `name`, and return its user. `path`: "-" for stdin.

    `replace`: give a profile of an earlier import the files of this one. Raises ClientError.
    """
    if not _NAME.fullmatch(name):
        raise ClientError(f"{name!r} cannot name a profile; use letters, digits, _ and -")
    config = config_path()
    if config is None:
        raise ClientError("there is no home directory for profiles; set XDG_CONFIG_HOME")
    files, profile = _unpack(path)
    profile["certs"] = name
    present = (read_profiles() or {}).get(name)
    directory = os.path.join(os.path.dirname(config), name)
    if present is None and os.path.lexists(directory):
        raise ClientError(f"{directory} exists; remove it, or choose another name with --as NAME")
    if present is not None and not replace:
        raise ClientError(
            f"{config} has a profile {name} already; choose another name with --as NAME, or if it "
            "is of an earlier import, replace its files with --replace"
        )
    if present is not None and (present != profile or os.path.islink(directory)):
        raise ClientError(
            f"{config}, [{name}] is not the profile that this bundle would make; remove it there, "
            "or choose another name with --as NAME"
        )
    try:
        os.makedirs(os.path.dirname(config), mode=0o700, exist_ok=True)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for each in (bundle.CA, bundle.CERTIFICATE, bundle.KEY):
            replace_file(os.path.join(directory, each), files[each])
        if present is None:
            _append(config, name, profile)
    except OSError as error:
        raise ClientError(
            f"cannot write {error.filename or directory}: {error.strerror}; make room or make it "
            "writable for you, and import again"
        ) from error
    return profile["user"]


def _unpack(path: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the files of a bundle that can be used, and the profile in it."""
    data = _read(path)
    try:
        files = bundle.unpack(data)
        profile = _profile(files[bundle.PROFILE])
        check_ca(bundle.CA, files[bundle.CA])
        check_pair(
            "client",
            *(bundle.CERTIFICATE, files[bundle.CERTIFICATE]),
            *(bundle.KEY, files[bundle.KEY]),
        )
    except (bundle.BundleError, UnusableError) as error:
        raise ClientError(f"{path} is no bundle that can be used: {error}") from None
    return files, profile


def _read(path: str) -> bytes:
    try:
        with open(sys.stdin.fileno() if path == "-" else path, "rb") as file:
            return file.read(bundle.MAX_BYTES + 1)
    except OSError as error:
        raise ClientError(f"cannot read {path}: {error.strerror}; check the path") from error


def _profile(data: bytes) -> dict[str, str]:
    """Return `server` and `user`. Raises BundleError."""
    import tomllib

    try:
        profile = tomllib.loads(data.decode())
        parse_address(profile["server"])
        can_be_shown = all(value.isprintable() for value in profile.values())
        if can_be_shown and set(profile) == {"server", "user"}:
            return profile
        error: Exception = ValueError("it has other keys, or characters that cannot be shown")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as caught:
        error = caught
    raise bundle.BundleError(f"{bundle.PROFILE} is wrong: {error}")


def _append(config: str, name: str, profile: Mapping[str, str]) -> None:
    # TOML has no surrogates, with which JSON would write a character beyond U+FFFF.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in profile.items()]
    try:
        with open(config, "rb") as file:
            before = file.read()
    except FileNotFoundError:
        before = b""
    gap = b"" if not before else b"\n" if before.endswith(b"\n") else b"\n\n"
    # A file that is a link, into a repository for example, stays one.
    table = "\n".join([f"[{name}]", *lines, ""]).encode()
    replace_file(os.path.realpath(config), before + gap + table, keeps_rights=True)
