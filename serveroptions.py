"""The options of the server: each is declared once, and can stand in two places.

    arguments = parser.parse_args(["--config", "server.toml", "--listen", "127.0.0.1:0"])
    settings, sources = settings_in_force(arguments)

An option is a flag of the command line (`--state-dir DIR`), and a key of the table [server] in the
file that `--config` names (`state_dir = "DIR"`). The command line counts more than the file. A
relative path of the file begins in the directory of the file. A new option is an entry in `OPTIONS`
and a field of `Settings`.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import serverlog
from audit import JOURNAL, STDOUT
from settings import (
    LIFETIME,
    RESTART_WINDOW,
    SERVER,
    STREAMS_IN_ALL,
    TIME,
    ConfigFile,
    Key,
    Settings,
)
from trustedfiles import check
from units import format_duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "COMMAND_LINE",
    "DEFAULT",
    "OPTIONS",
    "PROGRAM_DEFAULTS",
    "Option",
    "add_options",
    "option_string",
    "settings_in_force",
]

COMMAND_LINE: Final = "command line"
DEFAULT: Final = "default"
# The program isolates jobs where it can; whoever uses the class `Server` decides that.
PROGRAM_DEFAULTS: Final = Settings(isolation="auto")


@dataclass(frozen=True, slots=True)
class Option:
    """An option: the field of `Settings` that it sets, and the values that it accepts."""

    field: str
    help: str
    metavar: str | None = None
    kind: type[str | Path | bool] | Key = str
    """What a value is. A `Key` converts and checks numbers, sizes and times."""
    choices: Sequence[str] = ()
    words: Sequence[str] = ()
    """What stands for itself and is no path, though the kind is Path."""
    flag_value: Any = True
    """What an option of the kind bool, which has no value on the command line, sets its field to"""

    def value(self, written: Any, directory: Path | None = None) -> Any:
        """Convert a word of the command line, or a value of a file in `directory`.

        Raises ValueError.
        """
        if isinstance(self.kind, Key):
            is_number = isinstance(written, str) and written.isdecimal()
            try:
                return self.kind.value(int(written) if is_number else written)
            except ValueError as error:
                raise ValueError(f"{error}; write {self.kind.right_form}") from None
        if self.kind is bool:
            if not isinstance(written, bool):
                raise ValueError(f"cannot be {written!r}; write true or false")
            return self.flag_value if written else getattr(PROGRAM_DEFAULTS, self.field)
        if not isinstance(written, str):
            raise ValueError(f"cannot be {written!r}; write text in quotes")  # noqa: TRY004
        if not written:
            raise ValueError("must not be empty")
        if self.choices and written not in self.choices:
            raise ValueError(f"cannot be {written!r}; write one of {', '.join(self.choices)}")
        if self.kind is Path and written in self.words:
            return Path(written)
        if self.kind is Path:
            return directory / written if directory else Path(written)
        return written

    def of_command_line(self, word: str) -> Any:
        """Convert a word of the command line. Raises `argparse.ArgumentTypeError`."""
        try:
            return self.value(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


# By the key in the file. The flag has dashes in place of underscores.
OPTIONS: Final[Mapping[str, Option]] = {
    "listen": Option("listen", "the address to listen on; port 0 takes a free one", "HOST:PORT"),
    "certs": Option(
        "certs",
        "the directory of server.pem, server-key.pem and client-ca.pem",
        "DIR",
        Path,
    ),
    "users": Option(
        "users",
        "the users, one in a line, in place of the two seeded users; `server user add` adds one",
        "FILE",
        Path,
    ),
    "state_dir": Option(
        "state_dir",
        "the directory of this server alone: token key, store, output of jobs, audit log",
        "DIR",
        Path,
    ),
    "limits": Option(
        "enforcement",
        "if this host cannot enforce every limit of a job: require does not start the server, "
        "auto enforces the others and warns; off enforces none",
        choices=("require", "auto", "off"),
    ),
    "cgroup_root": Option(
        "cgroup_root",
        "the cgroup v2 directory to work below (default: the server's own cgroup)",
        "PATH",
        Path,
    ),
    "max_streams": Option(
        "max_streams",
        "the most output streams open at once, in place of the configuration's",
        "N",
        STREAMS_IN_ALL,
    ),
    "uids": Option(
        "uids",
        "a server started as root becomes the first of these users, and runs the jobs of each of "
        "its own users as one of the others",
        "FIRST-LAST",
    ),
    "accounts": Option(
        "accounts",
        "what the jobs of a server that was started as root run as: a uid of --uids, with a home "
        "in the state directory; or the host's account of the user's name, or of the name that "
        "the users file has after a third colon",
        choices=("range", "host"),
    ),
    "require_isolation": Option(
        "isolation",
        "refuse to start if jobs would have to run as the server's own user",
        kind=bool,
        flag_value="require",
    ),
    "audit_log": Option(
        "audit_log",
        "where a line of JSON about every call goes: FILE, stdout, or journal, if systemd has "
        "connected the server to it (default: audit.log in the state directory)",
        "FILE|stdout|journal",
        Path,
        words=(STDOUT, JOURNAL),
    ),
    "audit_required": Option("audit_required", "refuse calls that cannot be recorded", kind=bool),
    "token_lifetime": Option(
        "token_lifetime",
        "how long a token is valid, like 15m; the client refreshes it",
        "TIME",
        LIFETIME,
    ),
    "session_lifetime": Option(
        "session_lifetime",
        "how long after a login its token can be refreshed, like 12h; no token lasts longer",
        "TIME",
        LIFETIME,
    ),
    "restart_window": Option(
        "restart_window",
        "how long jobs go on when the server has ended, and wait for the next one, like 5m; 0 ends "
        "them with the server",
        "TIME",
        RESTART_WINDOW,
    ),
    "metrics": Option(
        "metrics",
        "serve metrics for Prometheus there: HOST:PORT, a loopback address, or unix:PATH "
        "(default: nowhere)",
        "ADDRESS",
    ),
    "health": Option(
        "health",
        "serve grpc.health.v1 to everybody with a client certificate; auto: if its package is "
        "installed",
        choices=("auto", "on", "off"),
    ),
    "reflection": Option(
        "reflection",
        "serve gRPC's reflection to everybody with a client certificate; auto: if its package is "
        "installed",
        choices=("auto", "on", "off"),
    ),
    "log_format": Option(
        "log_format",
        "what a line of the server's own log on stderr is",
        choices=serverlog.FORMATS,
    ),
    "log_level": Option(
        "log_level", "the least important lines that the log has", choices=serverlog.LEVELS
    ),
}


def option_string(key: str) -> str:
    """Return the option of the command line that a key of the table [server] stands for."""
    return f"--{key.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options, and `--config`. What is not given is not in the parsed arguments."""
    for key, option in OPTIONS.items():
        default = getattr(PROGRAM_DEFAULTS, option.field)
        shown = default is not None and option.kind is not bool
        keywords: dict[str, Any] = {
            "help": option.help + (f" (default: {_shown(option, default)})" if shown else ""),
            "default": argparse.SUPPRESS,
        }
        if option.kind is bool:
            keywords["action"] = "store_true"
        else:
            keywords["metavar"] = option.metavar
            keywords["type"] = option.of_command_line
            keywords["choices"] = option.choices or None
        parser.add_argument(option_string(key), **keywords)
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="a TOML file with the jobs' limits, the users' quotas and the retention; its table "
        "[server] has the other options of this list, like state_dir for --state-dir",
    )


def _shown(option: Option, default: object) -> object:
    """Return the default as people write it."""
    is_time = isinstance(option.kind, Key) and option.kind.form == TIME
    return format_duration(float(str(default))) if is_time else default


def settings_in_force(arguments: argparse.Namespace) -> tuple[Settings, dict[str, str]]:
    """Return the settings of the file and the command line, and where each option comes from.

    The sources have the keys of `OPTIONS`; a source is `DEFAULT`, `COMMAND_LINE`, or the file with
    the line. Raises OSError, `ConfigError`, `UntrustedFileError`.
    """
    values: dict[str, Any] = {"config": arguments.config}
    sources = dict.fromkeys(OPTIONS, DEFAULT)
    if arguments.config is not None:
        check(arguments.config)
        for key, (value, where) in _of_file(arguments.config).items():
            values[OPTIONS[key].field] = value
            sources[key] = where
    for key, option in OPTIONS.items():
        if hasattr(arguments, key):
            word = getattr(arguments, key)
            values[option.field] = option.value(word) if option.kind is bool else word
            sources[key] = COMMAND_LINE
    return replace(PROGRAM_DEFAULTS, **values), sources


def _of_file(path: Path) -> dict[str, tuple[Any, str]]:
    """Return the value and the place of each key of [server]."""
    file = ConfigFile.read(path)
    table = file.tables.get(SERVER, {})
    if not isinstance(table, dict):
        raise file.error(SERVER, "", "not a table; write [server], and below it a line per option")
    found = {}
    for key, written in table.items():
        if key not in OPTIONS:
            problem = f"unknown; the keys are {', '.join(OPTIONS)}"
            raise file.error(SERVER, key, problem)
        try:
            value = OPTIONS[key].value(written, path.absolute().parent)
        except ValueError as error:
            raise file.error(SERVER, key, str(error)) from None
        found[key] = value, file.where(SERVER, key)
    return found
