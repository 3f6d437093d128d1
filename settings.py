"""What jobs and users may have: the server's settings, from constants or a TOML file.

    [defaults]                  # for a job that asks for nothing
    cpu_cores = 0.5
    memory = "256M"

    [ceilings]                  # no job gets more, whatever it asks for
    memory = "2G"
    pids = 1024

    [per_user]                  # one user has at most
    running_jobs = 100
    kept_output = "4G"

    [in_all]                    # all users together have at most
    streams = 500

    [per_job]
    kept_output = "100M"

    [requests]
    args = 100

    [retention]                 # finished jobs are kept no longer
    age = "12h"

What the file does not name keeps the value of the constants below. "unlimited" takes
a limit away, but for `streams` of all users, which cost a thread each, and for requests,
which cost memory. A configuration is a value; it may be shared by threads.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from limits import Limits
from units import parse_duration, parse_size
from users import Role
from worker import Retention

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from worker import Enforcement

__all__ = [
    "Config",
    "ConfigError",
    "LimitError",
    "Quota",
    "Requests",
    "Settings",
    "SettingsError",
    "load_config",
    "parse_arguments",
    "split_address",
]

_HERE = Path(__file__).resolve().parent
DEFAULT_LISTEN: Final = "127.0.0.1:50051"
DEFAULT_UIDS: Final = "70000-79999"  # systemd and the distributions leave 65536 to 524287 free
_MAX_PORT = 65_535

_KIB = 1024
_MIB = 1024 * _KIB
_GIB = 1024 * _MIB
DEFAULTS: Final = Limits()
CEILINGS: Final = Limits(
    cpu_cores=8.0,
    memory_bytes=8192 * _MIB,
    swap_bytes=0,
    io_read_bps=1024 * _MIB,
    io_write_bps=1024 * _MIB,
    io_read_iops=100_000,
    io_write_iops=100_000,
    pids=4096,
)

_UNLIMITED = "unlimited"
_INT64_MAX = (1 << 63) - 1
_INT32_MAX = (1 << 31) - 1  # of what gRPC takes as an option

# How a value is written.
_SIZE = 'a size like "256M"'
_WHOLE = "a whole number"
_NUMBER = "a number like 0.5"
_TIME = 'a time like "7d"'


@dataclass(frozen=True, slots=True)
class _Key:
    """A key of the file: the field that it sets, and which values that may have."""

    field: str
    form: str
    minimum: float = 1
    maximum: int = _INT64_MAX
    may_be_unlimited: bool = True

    @property
    def right_form(self) -> str:
        return self.form + (f', or "{_UNLIMITED}"' if self.may_be_unlimited else "")

    def value(self, written: Any) -> float | None:
        """Return what `written` means. Raises ValueError."""
        if self.may_be_unlimited and written == _UNLIMITED:
            return None
        if self.form == _SIZE and isinstance(written, str):
            written = parse_size(written)
        if self.form == _TIME and isinstance(written, str):
            written = parse_duration(written)
        number = int | float if self.form in {_NUMBER, _TIME} else int
        if not isinstance(written, number) or isinstance(written, bool):
            raise ValueError(f"cannot be {written!r}")  # noqa: TRY004 -- one error for all
        if not written >= self.minimum:  # so that not-a-number is refused too
            raise ValueError(f"must be at least {self.minimum}, not {written!r}")
        if written > self.maximum:
            raise ValueError(f"must be at most {self.maximum}, not {written!r}")
        return written


# The tables of the file and their keys. A table sets fields of the value of its name in
# `Config`, or of `Config` itself where there is none.
_KEYS: Final = {
    "cpu_cores": _Key("cpu_cores", _NUMBER, minimum=0.01),
    "memory": _Key("memory_bytes", _SIZE),
    "swap": _Key("swap_bytes", _SIZE, minimum=0),
    "io_read": _Key("io_read_bps", _SIZE),
    "io_write": _Key("io_write_bps", _SIZE),
    "io_read_iops": _Key("io_read_iops", _WHOLE),
    "io_write_iops": _Key("io_write_iops", _WHOLE),
    "pids": _Key("pids", _WHOLE),
}
_QUOTA_KEYS: Final = {
    "running_jobs": _Key("running_jobs", _WHOLE),
    "streams": _Key("streams", _WHOLE),
    "starts_per_second": _Key("starts_per_second", _NUMBER, minimum=0.01),
    "start_burst": _Key("start_burst", _WHOLE),
    "kept_output": _Key("output_bytes", _SIZE),
}
# Each stream has a thread.
_STREAMS_IN_ALL: Final = _Key("streams", _WHOLE, maximum=100_000, may_be_unlimited=False)
_TABLES: Final = {
    "defaults": _KEYS,
    "ceilings": _KEYS,
    "per_user": _QUOTA_KEYS,
    "in_all": {**_QUOTA_KEYS, "streams": _STREAMS_IN_ALL},
    "per_job": {"kept_output": _Key("job_output_bytes", _SIZE)},
    "requests": {
        # No less than a login may need.
        "size": _Key("size", _SIZE, minimum=4 * _KIB, maximum=_INT32_MAX, may_be_unlimited=False),
        "args": _Key("args", _WHOLE, minimum=0, may_be_unlimited=False),
        "arg_length": _Key("arg_length", _SIZE, may_be_unlimited=False),
    },
    "retention": {
        "age": _Key("age_s", _TIME, minimum=0),
        "jobs": _Key("jobs", _WHOLE),
        "output": _Key("output_bytes", _SIZE, minimum=0),
        "argv": _Key("argv_bytes", _SIZE, minimum=0),
    },
}


class ConfigError(ValueError):
    """The configuration is wrong; the message names the file, the line and the right form."""


class LimitError(ValueError):
    """A job asks for a limit that makes no sense or that is above the ceiling."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one user has at most, or all users together. None means no ceiling."""

    running_jobs: int | None = None
    streams: int | None = None
    """Output streams open at once."""
    starts_per_second: float | None = None
    """Jobs started per second, in the long run; no ceiling either if `start_burst` has none."""
    start_burst: int | None = None
    """Jobs started at once, after a pause; no ceiling either if `starts_per_second` has none."""
    output_bytes: int | None = None
    """Output of jobs that is kept."""


@dataclass(frozen=True, slots=True)
class Requests:
    """How large a request may be."""

    size: int = _MIB
    """In bytes, the whole message; gRPC itself refuses a larger one."""
    args: int = 4096
    """How many arguments a command may have."""
    arg_length: int = 64 * _KIB
    """In bytes, of the longest of them, and of the command."""


PER_USER: Final = Quota(
    running_jobs=1000,
    streams=1000,
    starts_per_second=50,
    start_burst=1000,
    output_bytes=16 * _GIB,
)
IN_ALL: Final = Quota(
    running_jobs=2000,
    streams=2000,
    starts_per_second=100,
    start_burst=2000,
    output_bytes=32 * _GIB,
)
JOB_OUTPUT_BYTES: Final = _GIB
# A finished job takes 1.5 KB of memory besides its argv: these take 30 MB. The output is half
# of what one user may have, so that those jobs of theirs that run have room for as much.
RETENTION: Final = Retention(
    age_s=7 * 24 * 3600, jobs=10_000, output_bytes=8 * _GIB, argv_bytes=16 * _MIB
)


@dataclass(frozen=True, slots=True)
class Config:
    """All settings; None means no limit."""

    defaults: Limits = DEFAULTS
    ceilings: Limits = CEILINGS
    per_user: Quota = PER_USER
    in_all: Quota = IN_ALL
    job_output_bytes: int | None = JOB_OUTPUT_BYTES
    """How much of one job's output is kept."""
    requests: Requests = Requests()
    retention: Retention = RETENTION

    def limits(self, asked: Mapping[str, Any]) -> Limits:
        """Return the limits of a job that asks for `asked` (fields of `Limits`).

        Where neither that nor the default sets a limit, the ceiling is the limit. Raises
        `LimitError`, which names the field, the value and what is allowed.
        """
        for name, value in asked.items():
            ceiling = getattr(self.ceilings, name)
            if ceiling is not None and value > ceiling:
                raise LimitError(f"{name} {value} is above this server's ceiling of {ceiling}")
        values = {field.name: getattr(self.defaults, field.name) for field in fields(Limits)}
        values |= asked
        for name, value in values.items():
            if value is None:
                values[name] = getattr(self.ceilings, name)
        try:
            return Limits(**values)
        except ValueError as error:
            raise LimitError(str(error)) from None


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read the configuration. Raises OSError, `ConfigError`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8; save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    source = _Source(path, text)
    config = Config()
    for name, table in tables.items():
        if name not in _TABLES or not isinstance(table, dict):
            known = [f"[{table}]" for table in _TABLES]
            problem = f"unknown; the tables are {', '.join(known[:-1])} and {known[-1]}"
            raise source.error(name, "", problem)
        values = getattr(config, name, config)
        for key, written in table.items():
            values = _set(source, name, key, written, values)
        config = values if isinstance(values, Config) else replace(config, **{name: values})
    for key, kind in _KEYS.items():
        default = getattr(config.defaults, kind.field)
        ceiling = getattr(config.ceilings, kind.field)
        if default is not None and ceiling is not None and default > ceiling:
            table = "defaults" if key in tables.get("defaults", {}) else "ceilings"
            problem = f"the default, {default}, is above the ceiling, {ceiling}"
            raise source.error(table, key, problem)
    return config


def _set(source: _Source, table: str, key: str, written: Any, values: Any) -> Any:
    """Return `values`, a frozen dataclass, with the field that `key` sets."""
    kind = _TABLES[table].get(key)
    if kind is None:
        raise source.error(table, key, f"unknown; the keys are {', '.join(_TABLES[table])}")
    try:
        return replace(values, **{kind.field: kind.value(written)})
    except ValueError as error:
        raise source.error(table, key, f"{error}; write {kind.right_form}") from None


@dataclass(frozen=True, slots=True)
class _Source:
    """The text of the file, to tell lines from: tomllib does not."""

    path: Path
    text: str

    def error(self, table: str, key: str, problem: str) -> ConfigError:
        """Make the error for `key` of `table`, or for the table if `key` is ""."""
        name = f"{table}.{key}" if key else table
        # A key that has no line of its own, as in an inline table, has its table's.
        number = self._line(table, key) or self._line(table, "")
        where = f"{self.path}, line {number}" if number else str(self.path)
        return ConfigError(f"{where}: {name}: {problem}")

    def _line(self, table: str, key: str) -> int | None:
        current = ""
        for number, line in enumerate(self.text.splitlines(), start=1):
            bare = re.sub(r"[\"'\s]", "", line.partition("#")[0])
            if header := re.fullmatch(r"\[+([^\]]+)\]+", bare):
                current = header[1]
            word = bare.partition("=")[0] if "=" in bare else ""
            here = ".".join(part for part in (current, word) if part)
            if here == f"{table}.{key}" or (not key and here.partition(".")[0] == table):
                return number
        return None


# --- the command line -----------------------------------------------------------------------


class SettingsError(Exception):
    """The server cannot start as it was told to; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says, with its defaults."""

    listen: str = DEFAULT_LISTEN
    """HOST:PORT; [HOST]:PORT for IPv6; port 0 for any free one."""
    certs: Path = _HERE / "certs"
    """Where server.pem, server-key.pem and client-ca.pem are."""
    users: Path | None = None
    """The users file; None for the seeded users."""
    state_dir: Path = Path("state")
    """For the token key, the users' uids, the tokens that were logged out, and the output."""
    enforcement: Enforcement = "require"
    cgroup_root: Path | None = None
    max_streams: int | None = None
    """How many streams may be open in all; None for what the configuration says."""
    config: Path | None = None
    """The TOML file with limits and ceilings; None for those of `config.py`."""
    isolation: Literal["require", "auto", "off"] = "off"
    """Whether the jobs of each user run as an uid of their own, and this process stops
    being root, for good: it must be so; if it can be; no."""
    uids: str = DEFAULT_UIDS
    """FIRST-LAST: the first for this process if it is root, the others for users."""
    audit_log: Path | None = None
    """None for audit.log in `state_dir`."""
    audit_required: bool = False
    """Whether what cannot be recorded is refused."""


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `--listen`. Raises `SettingsError`."""
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not colon
        or not bare
        or (":" in bare) != (host != bare)
        or not port.isdecimal()
        or int(port) > _MAX_PORT
    ):
        raise SettingsError(
            f"--listen {address!r} is not HOST:PORT, like {DEFAULT_LISTEN} or [::1]:0"
        )
    return bare, int(port)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the server's command line; exits for `--help` and wrong usage."""
    parser = argparse.ArgumentParser(
        prog="server",
        description="Run commands for clients that log in over mutual TLS.",
        epilog="SIGTERM or Ctrl-C stops the server and every job. SIGHUP has it take up new "
        "certificates, users and a rotated audit log.",
        allow_abbrev=False,
    )
    defaults = Settings()
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=defaults.listen,
        help="where to listen; port 0 takes a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--certs",
        metavar="DIR",
        type=Path,
        default=defaults.certs,
        help="the directory of server.pem, server-key.pem and client-ca.pem (default: %(default)s)",
    )
    parser.add_argument(
        "--users",
        metavar="FILE",
        type=Path,
        help="users instead of the two seeded ones, a line each, made by `server user`",
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        default=defaults.state_dir,
        help="where the token key, the users' uids and the output are kept (default: "
        "./%(default)s)",
    )
    parser.add_argument(
        "--limits",
        choices=("require", "auto", "off"),
        default=defaults.enforcement,
        help="what to do when a job's limits cannot be enforced: refuse to run; enforce what "
        "can be and warn; do not even try (default: %(default)s)",
    )
    parser.add_argument(
        "--cgroup-root",
        metavar="PATH",
        type=Path,
        help="the cgroup v2 directory to work below (default: the one the server is in)",
    )
    parser.add_argument(
        "--max-streams",
        metavar="N",
        type=_streams,
        help="how many output streams may be open at once, whatever the configuration says",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="a TOML file with the jobs' default limits and with all ceilings",
    )
    parser.add_argument(
        "--uids",
        metavar="FIRST-LAST",
        default=defaults.uids,
        help="started as root, the server becomes the first of these, and the jobs of each user "
        "run as one of the others (default: %(default)s)",
    )
    parser.add_argument(
        "--require-isolation",
        action="store_true",
        help="refuse to start if jobs would have to run as the server's own user",
    )
    parser.add_argument(
        "--audit-log",
        metavar="FILE",
        type=Path,
        help="where every call is recorded, a line of JSON each (default: audit.log in the "
        "state directory)",
    )
    parser.add_argument(
        "--audit-required",
        action="store_true",
        help="refuse calls that cannot be recorded",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="other commands")
    user = commands.add_parser(
        "user",
        help="print an entry for the users file",
        description="Ask for a password and print an entry for the file that --users names.",
    )
    user.add_argument("name", metavar="NAME")
    user.add_argument("--role", choices=[role.value for role in Role], default="user")
    check = commands.add_parser(
        "check",
        help="say which limits this host can enforce, and what to do about the rest",
        description="Run probe jobs to find out which limits this host can enforce for this "
        "user. Exit status 0 if all of them, that is if --limits require would work.",
    )
    check.add_argument(
        "--cgroup-root", metavar="PATH", type=Path, help="as for the server", dest="check_root"
    )
    return parser.parse_args(argv)


def _streams(text: str) -> int:
    try:
        _STREAMS_IN_ALL.value(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; write {_STREAMS_IN_ALL.right_form}") from None
    return int(text)
