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

import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cgroups import Limits
from units import parse_duration, parse_size
from worker import Retention

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = [
    "STREAMS_IN_ALL",
    "Config",
    "ConfigError",
    "LimitError",
    "Quota",
    "Requests",
    "load_config",
]

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
STREAMS_IN_ALL: Final = _Key("streams", _WHOLE, maximum=100_000, may_be_unlimited=False)
_TABLES: Final = {
    "defaults": _KEYS,
    "ceilings": _KEYS,
    "per_user": _QUOTA_KEYS,
    "in_all": {**_QUOTA_KEYS, "streams": STREAMS_IN_ALL},
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
