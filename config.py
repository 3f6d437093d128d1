"""Which limits a job gets: the server's defaults and ceilings, from constants or a TOML file.

    [defaults]                  # for a job that asks for nothing
    cpu_cores = 0.5
    memory = "256M"

    [ceilings]                  # no job gets more, whatever it asks for
    memory = "2G"
    pids = 1024

What the file does not name keeps the value of the constants below. "unlimited" takes
a limit away.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cgroups import Limits
from units import parse_size

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["Config", "ConfigError", "LimitError", "load_config"]

_MIB = 1024 * 1024
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

# The keys of the file, the field of `Limits` each sets, and whether it is a size.
_KEYS: Final = {
    "cpu_cores": ("cpu_cores", False),
    "memory": ("memory_bytes", True),
    "swap": ("swap_bytes", True),
    "io_read": ("io_read_bps", True),
    "io_write": ("io_write_bps", True),
    "io_read_iops": ("io_read_iops", False),
    "io_write_iops": ("io_write_iops", False),
    "pids": ("pids", False),
}
_UNLIMITED = "unlimited"


class ConfigError(ValueError):
    """The configuration is wrong; the message names the file, the line and the right form."""


class LimitError(ValueError):
    """A job asks for a limit that makes no sense or that is above the ceiling."""


@dataclass(frozen=True, slots=True)
class Config:
    """Defaults and ceilings; None means no limit."""

    defaults: Limits = DEFAULTS
    ceilings: Limits = CEILINGS

    def limits(self, asked: Mapping[str, Any]) -> Limits:
        """Return the limits of a job that asks for `asked` (fields of `Limits`).

        Where neither that nor the default sets a limit, the ceiling is the limit. Raises
        `LimitError`, which names the field, the value and what is allowed.
        """
        for name, value in asked.items():
            ceiling = getattr(self.ceilings, name)
            if ceiling is not None and value > ceiling:
                raise LimitError(f"{name} {value} is above this server's ceiling of {ceiling}")
        try:
            limits = replace(self.defaults, **asked)
        except ValueError as error:
            raise LimitError(str(error)) from None
        unset = {name for name, value in asdict(limits).items() if value is None}
        return replace(limits, **{name: getattr(self.ceilings, name) for name in unset})


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
        if name not in {"defaults", "ceilings"} or not isinstance(table, dict):
            raise source.error(name, "", "unknown; the tables are [defaults] and [ceilings]")
        limits = getattr(config, name)
        for key, value in table.items():
            limits = _set(source, name, key, value, limits)
        config = replace(config, **{name: limits})
    for key, (field, _) in _KEYS.items():
        default, ceiling = getattr(config.defaults, field), getattr(config.ceilings, field)
        if default is not None and ceiling is not None and default > ceiling:
            table = "defaults" if key in tables.get("defaults", {}) else "ceilings"
            problem = f"the default, {default}, is above the ceiling, {ceiling}"
            raise source.error(table, key, problem)
    return config


def _set(source: _Source, table: str, key: str, value: Any, limits: Limits) -> Limits:
    if key not in _KEYS:
        raise source.error(table, key, f"unknown; the keys are {', '.join(_KEYS)}")
    field, is_size = _KEYS[key]
    number = "a number like 0.5" if key == "cpu_cores" else "a whole number"
    form = 'a size like "256M"' if is_size else number
    try:
        if value == _UNLIMITED:
            value = None
        elif is_size and isinstance(value, str):
            value = parse_size(value)
        return replace(limits, **{field: value})
    except ValueError as error:
        problem = f'{error}; write {form}, or "{_UNLIMITED}"'
        raise source.error(table, key, problem) from None


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
