"""What `server config` prints: every setting in force, and where its value comes from.

    print(report(settings, sources, config_in_force(settings)))

The text is a configuration file: a server that gets it with `--config` has the same settings. What
has no value is a comment.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serveroptions import COMMAND_LINE, DEFAULT, OPTIONS, PROGRAM_DEFAULTS
from settings import ENVIRONMENT, SERVER, SIZE, SLURM, TABLES, TIME, UNLIMITED, ConfigFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from settings import Config, Key, Settings

__all__ = ["report"]

_SIZES = (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10))
_TIMES = (("d", 24 * 3600), ("h", 3600), ("m", 60), ("s", 1))
_COLUMN = 40  # where the places begin


def report(settings: Settings, sources: Mapping[str, str], config: Config) -> str:
    """Return a line for each setting, by table. `sources`: of the options, as in serveroptions.py.

    Raises OSError, `ConfigError`.
    """
    file = ConfigFile.read(settings.config) if settings.config else None
    lines = [*_options(settings, sources)]
    for table, keys in TABLES.items():
        values = getattr(config, table, config)
        lines += ["", f"[{table}]"]
        for key, kind in keys.items():
            where = _place(file, table, key)
            if (table, key) == ("in_all", "streams") and settings.max_streams is not None:
                where = "max_streams, above"
            lines.append(_line(key, _written(getattr(values, kind.field), kind), where))
    lines += ["", f"[{ENVIRONMENT}]"]
    lines += [
        _line(json.dumps(name), _text(value), _place(file, ENVIRONMENT, name))
        for name, value in config.environment.items()
    ]
    if config.slurm is not None:
        lines += ["", f"[{SLURM}]"]
        lines += [
            _line(
                field.name,
                _text(getattr(config.slurm, field.name)),
                _place(file, SLURM, field.name),
            )
            for field in fields(config.slurm)
        ]
    return "\n".join(lines)


def _options(settings: Settings, sources: Mapping[str, str]) -> Iterator[str]:
    yield f"[{SERVER}]"
    for key, option in OPTIONS.items():
        value = getattr(settings, option.field)
        if option.kind is bool:
            value = value != getattr(PROGRAM_DEFAULTS, option.field)
        if isinstance(value, Path):
            value = str(value if str(value) in option.words else value.absolute())
        where = sources[key]
        if where == COMMAND_LINE:
            where = f"--{key.replace('_', '-')}"
        written = None if value is None else _text(value)
        if not isinstance(option.kind, type):
            written = None if value is None else _written(value, option.kind)
        yield _line(key, written, where)


def _place(file: ConfigFile | None, table: str, key: str) -> str:
    if file is None or key not in file.tables.get(table, {}):
        return DEFAULT
    return file.where(table, key)


def _line(key: str, written: str | None, where: str) -> str:
    beginning = f"# {key} is not set" if written is None else f"{key} = {written}"
    return f"{beginning:<{_COLUMN}} # {where}"


def _text(value: Any) -> str:
    """Write text, a number or a truth value for TOML."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _written(value: Any, kind: Key) -> str | None:
    """Write a number in the form of its key; None if it is not set."""
    if value is None:
        return _text(UNLIMITED) if kind.may_be_unlimited else None
    if kind.form == TIME and not value:
        return '"0s"'
    units = {SIZE: _SIZES, TIME: _TIMES}.get(kind.form, ())
    for unit, factor in units:
        if value and value % factor == 0:
            return f'"{int(value // factor)}{unit}"'
    return _text(value)
