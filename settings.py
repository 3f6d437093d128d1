"""The server's settings: `Settings`, and the TOML file that `--config` names.

    settings = Settings(listen="127.0.0.1:0", config=Path("limits.toml"))
    config = load_config(settings.config)

The file sets limits, ceilings, quotas and retention:

    [defaults]                  # limits of a job that asks for none
    cpu_cores = 0.5
    memory = "256M"

    [ceilings]                  # the highest limits that a job may ask for
    memory = "2G"
    pids = 1024

    [per_user]                  # quotas of one user
    running_jobs = 100
    kept_output = "4G"

    [in_all]                    # quotas of all users together
    streams = 500

    [all_jobs]                  # bounds of the cgroup that all jobs are in
    memory = "24G"

    [per_job]
    kept_output = "100M"

    [disk]
    reserve = "2G"              # output leaves this much free

    [environment]               # variables that every job gets
    PATH = "/opt/tools/bin:/usr/bin:/bin"

    [requests]                  # the size of a request
    args = 100

    [ending]                    # the times of a job that asks for none
    timeout = "8h"

    [retention]                 # how long finished jobs are kept
    age = "12h"

    [slurm]                     # jobs run on a cluster: see slurm.py
    options = ["--partition=main"]

    [server]                    # options of the command line: see serveroptions.py
    listen = "0.0.0.0:50051"

A key that the file does not name keeps its value from the constants below. "unlimited"
removes a limit. It is refused for the `streams` of all users, because each stream has a
thread, and for requests, because a request is held in memory.

Thread safety: all values are immutable, so threads may share them.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from ending import MAX_GRACE_S, Ending
from environment import problem_of
from limits import Bounds, Limits
from slurm import SlurmSettings
from units import parse_duration, parse_size
from worker import Retention

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from worker import Enforcement

__all__ = [
    "ENVIRONMENT",
    "LIFETIME",
    "RESTART_WINDOW",
    "SERVER",
    "SIZE",
    "SLURM",
    "STREAMS_IN_ALL",
    "TABLES",
    "TIME",
    "UNLIMITED",
    "Config",
    "ConfigError",
    "ConfigFile",
    "Key",
    "LimitError",
    "Quota",
    "Requests",
    "Settings",
    "SettingsError",
    "load_config",
]

_HERE = Path(__file__).resolve().parent
DEFAULT_LISTEN: Final = "127.0.0.1:50051"
DEFAULT_UIDS: Final = "70000-79999"  # systemd and distributions use no uid of 65536 to 524287

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

UNLIMITED = "unlimited"
_MOST_CONFIG_BYTES = _MIB  # /dev/zero, for example, has no end
_INT64_MAX = (1 << 63) - 1
_INT32_MAX = (1 << 31) - 1  # the highest value of a gRPC option

# The forms of a value in the file.
SIZE = 'a size like "256M"'
_WHOLE = "a whole number"
_NUMBER = "a number like 0.5"
TIME = 'a time like "7d"'
_MAX_GRACE = int(MAX_GRACE_S)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the file: the field that it sets, and the values that it accepts."""

    field: str
    form: str
    minimum: float = 1
    maximum: int = _INT64_MAX
    may_be_unlimited: bool = True

    @property
    def right_form(self) -> str:
        return self.form + (f', or "{UNLIMITED}"' if self.may_be_unlimited else "")

    def value(self, written: Any) -> float | None:
        """Convert a value of the file; None for "unlimited". Raises ValueError."""
        if self.may_be_unlimited and written == UNLIMITED:
            return None
        parse = {SIZE: parse_size, TIME: parse_duration}.get(self.form)
        if parse and isinstance(written, str):
            try:
                written = parse(written)
            except ValueError as error:
                # Without the form that it proposes: the caller knows the one of the file.
                raise ValueError(str(error).partition("; write")[0]) from None
        number = int | float if self.form in {_NUMBER, TIME} else int
        if not isinstance(written, number) or isinstance(written, bool):
            raise ValueError(f"cannot be {written!r}")  # noqa: TRY004 -- callers expect one error
        if not written >= self.minimum:  # `written < minimum` would accept not-a-number
            raise ValueError(f"must be at least {self.minimum}, not {written!r}")
        if written > self.maximum:
            raise ValueError(f"must be at most {self.maximum}, not {written!r}")
        return written


# The tables of the file and their keys. A table sets fields of the `Config` attribute of the
# same name, or of `Config` itself if there is no such attribute.
_KEYS: Final = {
    "cpu_cores": Key("cpu_cores", _NUMBER, minimum=0.01),
    "memory": Key("memory_bytes", SIZE),
    "swap": Key("swap_bytes", SIZE, minimum=0),
    "io_read": Key("io_read_bps", SIZE),
    "io_write": Key("io_write_bps", SIZE),
    "io_read_iops": Key("io_read_iops", _WHOLE),
    "io_write_iops": Key("io_write_iops", _WHOLE),
    "pids": Key("pids", _WHOLE),
}
_QUOTA_KEYS: Final = {
    "running_jobs": Key("running_jobs", _WHOLE),
    "running_argv": Key("argv_bytes", SIZE),
    "streams": Key("streams", _WHOLE),
    "starts_per_second": Key("starts_per_second", _NUMBER, minimum=0.01),
    "start_burst": Key("start_burst", _WHOLE),
    "kept_output": Key("output_bytes", SIZE),
}
RESTART_WINDOW: Final = Key("restart_window", TIME, 0, 24 * 3600, may_be_unlimited=False)
# The maximum is finite because each stream has a thread.
STREAMS_IN_ALL: Final = Key("streams", _WHOLE, maximum=100_000, may_be_unlimited=False)
TABLES: Final = {
    "defaults": _KEYS,
    "ceilings": _KEYS,
    "per_user": _QUOTA_KEYS,
    "in_all": {**_QUOTA_KEYS, "streams": STREAMS_IN_ALL},
    "per_job": {"kept_output": Key("job_output_bytes", SIZE)},
    "requests": {
        # The minimum leaves room for a login.
        "size": Key("size", SIZE, minimum=4 * _KIB, maximum=_INT32_MAX, may_be_unlimited=False),
        "args": Key("args", _WHOLE, minimum=0, may_be_unlimited=False),
        "arg_length": Key("arg_length", SIZE, may_be_unlimited=False),
    },
    "all_jobs": {
        "memory": Key("memory_bytes", SIZE, minimum=_MIB, may_be_unlimited=False),
        "pids": Key("pids", _WHOLE, maximum=1 << 22, may_be_unlimited=False),
        "cgroups": Key("cgroups", _WHOLE, maximum=_INT32_MAX, may_be_unlimited=False),
        "cgroup_depth": Key("cgroup_depth", _WHOLE, maximum=_INT32_MAX, may_be_unlimited=False),
    },
    "disk": {"reserve": Key("disk_reserve_bytes", SIZE, minimum=0, may_be_unlimited=False)},
    "ending": {
        "timeout": Key("timeout", TIME, minimum=0.001),
        "grace": Key("grace", TIME, 0, _MAX_GRACE, may_be_unlimited=False),
        "linger": Key("linger", TIME, 0, _MAX_GRACE, may_be_unlimited=False),
    },
    # The systemd unit kills the server after 15 s.
    "shutdown": {"grace": Key("shutdown_grace_s", TIME, 0, _MAX_GRACE, may_be_unlimited=False)},
    "retention": {
        "age": Key("age_s", TIME, minimum=0),
        "jobs": Key("jobs", _WHOLE),
        "output": Key("output_bytes", SIZE, minimum=0),
        "argv": Key("argv_bytes", SIZE, minimum=0),
    },
}


ENVIRONMENT: Final = "environment"  # the table whose keys the operator chooses
# A token's times are whole seconds, and dates.
LIFETIME: Final = Key("", TIME, minimum=1, maximum=10 * 365 * 24 * 3600, may_be_unlimited=False)
SERVER: Final = "server"  # the table of options, which serveroptions.py reads
SLURM: Final = "slurm"  # the table that has jobs run on a cluster


class ConfigError(ValueError):
    """The file is wrong; the message names the file, the line and the right form."""


class LimitError(ValueError):
    """A job asks for a limit that is invalid or above the ceiling."""


@dataclass(frozen=True, slots=True)
class Quota:
    """The most that one user may have, or all users together. None means no quota."""

    running_jobs: int | None = None
    argv_bytes: int | None = None
    """Memory of the commands and arguments of running jobs, as Python stores them."""
    streams: int | None = None
    """Output streams open at once."""
    starts_per_second: float | None = None
    """Jobs started per second on average; applies only together with `start_burst`."""
    start_burst: int | None = None
    """Jobs started at once after a pause; applies only together with `starts_per_second`."""
    output_bytes: int | None = None
    """Kept output of jobs, in bytes."""


@dataclass(frozen=True, slots=True)
class Requests:
    """The largest request."""

    size: int = _MIB
    """Of the whole message, in bytes."""
    args: int = 4096
    """The number of arguments of a command."""
    arg_length: int = 64 * _KIB
    """Of the command and of each argument, in bytes."""


PER_USER: Final = Quota(
    running_jobs=1000,
    argv_bytes=16 * _MIB,
    streams=1000,
    starts_per_second=50,
    start_burst=1000,
    output_bytes=16 * _GIB,
)
IN_ALL: Final = Quota(
    running_jobs=2000,
    argv_bytes=32 * _MIB,
    streams=2000,
    starts_per_second=100,
    start_burst=2000,
    output_bytes=32 * _GIB,
)
BOUNDS: Final = Bounds()
JOB_OUTPUT_BYTES: Final = _GIB
# A finished job takes 1.5 KB of memory besides its argv, so 10,000 jobs with 16 MiB of argv take
# 30 MB. Finished jobs keep half of a user's output quota; running jobs have the other half.
RETENTION: Final = Retention(
    age_s=7 * 24 * 3600, jobs=10_000, output_bytes=8 * _GIB, argv_bytes=16 * _MIB
)
ENDING: Final = Ending()


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of the file; None means no limit."""

    defaults: Limits = DEFAULTS
    ceilings: Limits = CEILINGS
    per_user: Quota = PER_USER
    in_all: Quota = IN_ALL
    all_jobs: Bounds = BOUNDS
    """What the cgroup of all jobs may have."""
    job_output_bytes: int | None = JOB_OUTPUT_BYTES
    """Kept output of one job, in bytes."""
    disk_reserve_bytes: int | None = None
    """How much of the disk output leaves free, in bytes; None for the rule of `Worker`."""
    requests: Requests = Requests()
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Variables that every job gets, unless it asks for others."""
    retention: Retention = RETENTION
    ending: Ending = ENDING
    """The times of a job that asks for none."""
    shutdown_grace_s: float = 3.0
    """How long jobs may go on after SIGTERM when the server shuts down."""

    slurm: SlurmSettings | None = None
    """The cluster on which jobs run; None: they run on this machine."""

    def limits(self, asked: Mapping[str, Any]) -> Limits:
        """Return the limits of a job that asks for `asked`, by the names of fields of `Limits`.

        A field that is not asked for gets its default, or else its ceiling. Raises
        `LimitError`, which names the field, the value and the allowed range.
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
    """Read all tables of the file but [server]. Raises OSError, `ConfigError`."""
    source = ConfigFile.read(Path(path))
    tables = source.tables
    config = Config()
    for name, table in tables.items():
        if name == SERVER and isinstance(table, dict):
            continue
        if name == ENVIRONMENT and isinstance(table, dict):
            config = replace(config, environment=_variables(source, table))
            continue
        if name == SLURM and isinstance(table, dict):
            config = replace(config, slurm=_slurm(source, table))
            continue
        if name not in TABLES or not isinstance(table, dict):
            known = [f"[{table}]" for table in (*TABLES, ENVIRONMENT, SLURM, SERVER)]
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


def _variables(source: ConfigFile, table: Mapping[str, Any]) -> Mapping[str, str]:
    for name, value in table.items():
        problem = problem_of({name: value}) if isinstance(value, str) else f"cannot be {value!r}"
        if problem:
            raise source.error(ENVIRONMENT, name, f'{problem}; write a text like "C.UTF-8"')
    if problem := problem_of(table):
        raise source.error(ENVIRONMENT, "", problem)
    return MappingProxyType(dict(table))


def _slurm(source: ConfigFile, table: Mapping[str, Any]) -> SlurmSettings:
    settings = SlurmSettings()
    for key, value in table.items():
        if key not in (names := [field.name for field in fields(SlurmSettings)]):
            raise source.error(SLURM, key, f"unknown; the keys are {', '.join(names)}")
        is_list = key == "options"
        of_text = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if not (of_text if is_list else isinstance(value, str)):
            form = '["--partition=main"]' if is_list else 'a path like "/etc/slurm/slurm.conf"'
            raise source.error(SLURM, key, f"cannot be {value!r}; write {form}")
        try:
            changed: dict[str, Any] = {key: tuple(value) if is_list else value}
            settings = replace(settings, **changed)
        except ValueError as error:
            raise source.error(SLURM, key, str(error)) from None
    return settings


def _set(source: ConfigFile, table: str, key: str, written: Any, values: Any) -> Any:
    """Return a copy of the dataclass `values` with the field that `key` sets."""
    kind = TABLES[table].get(key)
    if kind is None:
        raise source.error(table, key, f"unknown; the keys are {', '.join(TABLES[table])}")
    try:
        return replace(values, **{kind.field: kind.value(written)})
    except ValueError as error:
        raise source.error(table, key, f"{error}; write {kind.right_form}") from None


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The file: its tables, and its text for the line numbers, which tomllib does not keep."""

    path: Path
    text: str
    tables: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read the file. Raises OSError, and `ConfigError` if it is too large or not TOML."""
        with open(path, "rb") as file:
            content = file.read(_MOST_CONFIG_BYTES + 1)
        if len(content) > _MOST_CONFIG_BYTES:
            raise ConfigError(
                f"{path}: larger than {_MOST_CONFIG_BYTES >> 20} MiB; name the configuration file"
            )
        try:
            text = content.decode()
            return cls(path, text, tomllib.loads(text))
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ConfigError(f"{path}, line {line}: not UTF-8; save it as UTF-8") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not TOML: {error}") from error

    def error(self, table: str, key: str, problem: str) -> ConfigError:
        """Return the error for `key` of `table`, or for the table if `key` is ""."""
        name = f"{table}.{key}" if key else table
        return ConfigError(f"{self.where(table, key)}: {name}: {problem}")

    def where(self, table: str, key: str) -> str:
        """Return the path and the line of `key`, or of the table if `key` is ""."""
        # A key of an inline table has no line of its own, so its table's line is reported.
        number = self._line(table, key) or self._line(table, "")
        return f"{self.path}, line {number}" if number else str(self.path)

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


# --- the table [server], which is also the command line ---------------------------------------


class SettingsError(Exception):
    """The server cannot start with these settings; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server is started with: the options of serveroptions.py, with their defaults."""

    listen: str = DEFAULT_LISTEN
    """HOST:PORT, or [HOST]:PORT for IPv6; port 0 for any free one."""
    certs: Path = _HERE / "certs"
    """The directory of server.pem, server-key.pem and client-ca.pem."""
    users: Path | None = None
    """The users file; None for the seeded users."""
    state_dir: Path = Path("state")
    """The directory of the token key, the users' uids, the logged-out tokens and the output."""
    enforcement: Enforcement = "require"
    cgroup_root: Path | None = None
    max_streams: int | None = None
    """The quota of streams of all users; None for that of the configuration file."""
    config: Path | None = None
    """The configuration file; None for the constants of this module. Its table [server] is for the
    program `server`, which makes these settings of it and of the command line."""
    isolation: Literal["require", "auto", "off"] = "off"
    """Whether the jobs of each user run as a uid of their own, and this process gives up root
    for good. "require": refuse to start without that. "auto": if possible."""
    uids: str = DEFAULT_UIDS
    """FIRST-LAST. A server started as root becomes the first; users get the others."""
    accounts: Literal["range", "host"] = "range"
    """What jobs run as: uids of `uids`, or accounts of the host."""
    audit_log: Path | None = None
    """None for audit.log in `state_dir`; "stdout" and "journal" stand for themselves."""
    audit_required: bool = False
    """Whether the server refuses a call that it cannot record."""
    token_lifetime: float = 30 * 24 * 3600
    """For how many seconds a token is valid; a refreshed one, too."""
    session_lifetime: float = 30 * 24 * 3600
    """For how many seconds after the login tokens can be refreshed. No token lasts longer."""
    restart_window: float = 0.0
    """How many seconds the jobs wait for the next server when this one has ended; 0: not at all."""
    metrics: str | None = None
    """HOST:PORT of this host, or unix:PATH, on which metrics are served; None for nowhere."""
    health: str = "auto"
    reflection: str = "auto"
    """Whether gRPC's own services are there: see standardservices.py."""
    log_format: str = "text"
    log_level: str = "info"
    """How the program writes its own log: see serverlog.py."""
