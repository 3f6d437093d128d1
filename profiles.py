"""Profiles: servers that the user has given names to, in `~/.config/job-worker/config.toml`.

    [work]
    server = "jobs.example.org:50051"
    certs = "work-certs"       # a relative path begins in the directory of this file
    user = "alice"

`client list --profile work` uses this table, and so does JOBWORKER_PROFILE=work. Without either
the client uses the table [default], if there is one. An option counts more than an environment
variable, the variable more than the profile, and the profile more than the built-in default. A
profile that `--profile` names is an option: then the variables do not count.

Thread safety: only the main thread of the program uses this module.

Source: the XDG Base Directory Specification (XDG_CONFIG_HOME).
"""

from __future__ import annotations

import os

from connection import DEFAULT_CERTS, DEFAULT_SERVER, ClientError
from replacing import read_small
from units import parse_address

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

__all__ = ["DEFAULT_PROFILE", "apply_profile", "config_path", "profile_names", "read_profiles"]

DEFAULT_PROFILE = "default"
_PATHS = ("certs", "cert", "key", "ca")
_KEYS = ("server", *_PATHS, "user")


def apply_profile(arguments: argparse.Namespace) -> None:
    """Set the connection's options that are None: from the environment, the profile, the default.

    Afterwards `arguments.profile` is the name of the profile in use, or None; `arguments.user` is
    the user to log in as, or None; `arguments.login_server` is the server if a login has to name
    it, or None. Raises ClientError if the profile is missing or wrong.
    """
    given: str | None = arguments.profile or os.environ.get("JOBWORKER_PROFILE")
    profile = _read_profile(given)
    variables = {} if arguments.profile else os.environ
    arguments.profile = given or (DEFAULT_PROFILE if profile else None)
    given_server = arguments.server
    arguments.server = (
        arguments.server
        or variables.get("JOBWORKER_SERVER")
        or profile.get("server")
        or DEFAULT_SERVER
    )
    # A login that names the profile with `--profile` ignores JOBWORKER_SERVER.
    if arguments.profile:
        names_it = arguments.server != profile.get("server", DEFAULT_SERVER)
    else:
        names_it = given_server is not None
    arguments.login_server = arguments.server if names_it else None
    arguments.user = getattr(arguments, "user", None) or profile.get("user")
    certs = arguments.certs or variables.get("JOBWORKER_CERTS")
    if certs is None:
        # Another directory replaces all files of the profile, because a key belongs to its
        # certificate.
        for name in ("cert", "key", "ca"):
            setattr(arguments, name, getattr(arguments, name) or profile.get(name))
    arguments.certs = certs or profile.get("certs") or DEFAULT_CERTS


def config_path() -> str | None:
    """Return where the file with the profiles is looked for; None if there is no home directory."""
    directory = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return None if directory[0] == "~" else os.path.join(directory, "job-worker", "config.toml")


def profile_names() -> Sequence[str]:
    """Return the names of all profiles. Raises ClientError if the file is wrong."""
    return sorted(read_profiles() or {})


def read_profiles() -> dict[str, Any] | None:
    """Return the tables of the file; None without a file. Raises ClientError if it is wrong."""
    path = config_path()
    if path is None:
        return None
    try:
        text = read_small(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ClientError(
            f"cannot read {path}: {error.strerror}; make it readable, or move it away"
        ) from error
    import tomllib  # here because most users have no such file

    try:
        profiles = tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ClientError(f"{path} is not UTF-8; save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ClientError(f"{path} is not TOML: {error}") from error
    for name, value in profiles.items():
        if not isinstance(value, dict):
            raise ClientError(f"{path}: {name} must stand in a profile, below a line like [work]")
    return profiles


def _read_profile(name: str | None) -> dict[str, str]:
    """Return the profile; empty if `name` is None and there is no profile called `default`."""
    profiles = read_profiles()
    path = config_path()
    profile = (profiles or {}).get(name or DEFAULT_PROFILE)
    if profile is None:
        if name is None:
            return {}
        there = f"has only {', '.join(sorted(profiles))}" if profiles else "has no profile"
        if profiles is None:
            there = "does not exist"
        raise ClientError(
            f"there is no profile {name!r}: {path} {there}; see --profile and JOBWORKER_PROFILE"
        )
    name = name or DEFAULT_PROFILE
    for key, value in profile.items():
        where = f"{path}, [{name}] {key}"
        if key not in _KEYS:
            raise ClientError(f"{where}: there is no such key, only {', '.join(_KEYS)}")
        if not isinstance(value, str) or not value:
            raise ClientError(f'{where}: must be text in quotes, like {key} = "..."')
    try:
        parse_address(profile.get("server", DEFAULT_SERVER))
    except ValueError as error:
        raise ClientError(f"{path}, [{name}] server: {error}") from None
    directory = os.path.dirname(path or "")
    return {
        key: os.path.join(directory, os.path.expanduser(value)) if key in _PATHS else value
        for key, value in profile.items()
    }
