"""The options and arguments of the command line.

`parse` reads them with argparse, but for the job's own words and for secrets, which it
takes out before. Secrets it also overwrites in what others see of this process.

Thread safety: all of it is for the one thread of a program.

Sources: proc(5), `/proc/PID/cmdline` and field 48 of `/proc/PID/stat`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re

from client import DEFAULT_CERTS, DEFAULT_SERVER
from texts import HELP, SUBCOMMANDS, printable
from units import parse_size

TYPE_CHECKING = False  # as typing has it, whose import takes as long as Python's start
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

__all__ = ["LIMIT_FIELDS", "make_parser", "parse"]

_EXIT_USAGE = 2

_START_USAGE = """\
client start [OPTIONS] -c COMMAND [-args A1 A2 ...]
       client start [OPTIONS] [--] COMMAND [A1 A2 ...]"""


class _Parser(argparse.ArgumentParser):
    """One line on stderr for wrong usage, as for every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(_EXIT_USAGE, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


class _MainParser(_Parser):
    """Its help is what `client --help` prints without any parser."""

    def format_help(self) -> str:
        return HELP


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all there is, which knows the subcommands' own."""
    parser = _MainParser(prog="client", allow_abbrev=False)
    commands = parser.add_subparsers(
        dest="subcommand", metavar="SUBCOMMAND", required=True, parser_class=_Parser, prog="client"
    )
    for name in SUBCOMMANDS:
        _add_options(commands.add_parser(name, **_settings(name)), name)
    return parser


def _make_subparser(name: str) -> argparse.ArgumentParser:
    """Return a subcommand's own parser: to make those of all takes several times as long."""
    parser = _Parser(prog=f"client {name}", **_settings(name))
    parser.set_defaults(subcommand=name)
    _add_options(parser, name)
    return parser


def _settings(name: str) -> dict[str, Any]:
    return {
        "description": f"{SUBCOMMANDS[name]}.",
        "usage": _START_USAGE if name == "start" else None,
        "allow_abbrev": False,
    }


def _add_options(parser: argparse.ArgumentParser, name: str) -> None:
    for option, settings in _CONNECTION.items():
        parser.add_argument(option, **settings)
    if name == "login":
        _add_login(parser)
    else:
        parser.add_argument(
            "-t",
            "--token",
            help="the token (default: the one that was kept); others on this machine can see "
            "it for the moment until the client has overwritten it, JOBWORKER_TOKEN not",
        )
    if name == "start":
        _add_start(parser)
    if name in {"stop", "status", "stream", "remove"}:
        parser.add_argument("-j", "--job", required=True, metavar="JOB_ID", help="the job's ID")
    if name in {"status", "list"}:
        parser.add_argument(
            "--json", action="store_true", help="print JSON, fields as in the .proto"
        )
    if name == "stream":
        parser.add_argument(
            "--offset",
            type=_offset,
            default=0,
            metavar="N",
            help="begin with byte N, counted from 0 (default: 0)",
        )


def _add_login(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-u", "--user", required=True, metavar="USER", help="the user's name")
    parser.add_argument(
        "-p",
        "--password",
        help="the password, which others on this machine can see for the moment until the client "
        "has overwritten it; - reads it from stdin; without -p it is asked for",
    )


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", "--command", metavar="COMMAND", help="the command, not a shell's line"
    )
    for option, (name, convert, metavar, text) in _LIMIT_OPTIONS.items():
        parser.add_argument(option, dest=name, type=convert, metavar=metavar, help=text)
    parser.add_argument(
        "-args",
        dest="args",
        metavar="A",
        nargs="*",
        default=[],
        help="everything after it is the command's, dashes included",
    )


_CONNECTION: dict[str, dict[str, Any]] = {
    "--server": {
        "metavar": "HOST:PORT",
        "default": os.environ.get("JOBWORKER_SERVER") or DEFAULT_SERVER,
        "help": "the server (default: %(default)s)",
    },
    "--certs": {
        "metavar": "DIR",
        "default": os.environ.get("JOBWORKER_CERTS") or DEFAULT_CERTS,
        "help": "where client.pem, client-key.pem and server-ca.pem are (default: %(default)s)",
    },
    "--cert": {"metavar": "FILE", "help": "another client certificate"},
    "--key": {"metavar": "FILE", "help": "another client key"},
    "--ca": {"metavar": "FILE", "help": "another server CA"},
}


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not _is_number(text) or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _cores(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of CPU cores") from None


# Each option, the field of Limits it sets, how it is read, and its help.
_LIMIT_OPTIONS: dict[str, tuple[str, Callable[[str], float], str, str]] = {
    "--cpus": ("cpu_cores", _cores, "N", "CPU cores, 0.5 for half of one"),
    "--memory": ("memory_bytes", _size, "SIZE", "memory, like 256M"),
    "--io-read": ("io_read_bps", _size, "SIZE", "bytes per second read from each disk"),
    "--io-write": ("io_write_bps", _size, "SIZE", "bytes per second written to each disk"),
    "--io-read-ops": ("io_read_iops", _count, "N", "reads per second from each disk"),
    "--io-write-ops": ("io_write_iops", _count, "N", "writes per second to each disk"),
    "--pids": ("pids", _count, "N", "processes and threads"),
}
LIMIT_FIELDS = [field for field, *_ in _LIMIT_OPTIONS.values()]


def _offset(text: str) -> int:
    if not _is_number(text) or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes")
    return int(text)


def _is_number(text: str) -> bool:
    # int() takes other digits than these too, and raises for more than 4300 of them.
    return re.fullmatch(r"[0-9]{1,20}", text) is not None


def parse(argv: Sequence[str], *, hide: bool = False) -> argparse.Namespace:
    """Parse the command line; the job's own words and secrets never reach argparse.

    `hide`: overwrite the secrets in what others see of this process. Exits after --help,
    and when the usage is wrong.
    """
    name = argv[0] if argv else ""
    parser = _make_subparser(name) if name in SUBCOMMANDS else make_parser()
    is_start = name == "start"
    ours, command, rest = _split_start(argv, parser) if is_start else (argv, None, ())
    secrets = _find_secrets(ours)
    if hide and secrets:
        _hide(argv, secrets)
    masked = list(ours)
    for index, begin in secrets:
        masked[index] = masked[index][:begin] + "***"
    arguments = parser.parse_args(masked[1:] if name in SUBCOMMANDS else masked)
    for option, value in vars(arguments).items():
        if value == [] and option != "args":  # what Python 3.11 makes of --job=--
            parser.error(f"-- cannot be the value of an option ({option})")
    if secrets:  # all of one kind, as no subcommand takes both; the last one counts
        index, begin = secrets[-1]
        setattr(arguments, "password" if name == "login" else "token", ours[index][begin:])
    if not is_start:
        return arguments
    if command is not None:
        if arguments.command is not None:
            parser.error(f"two commands: {arguments.command!r} and {command!r}")
        arguments.command = command
    if arguments.command is None:
        parser.error("which command? Give -c COMMAND, or -- COMMAND ARGUMENTS")
    arguments.args = rest
    return arguments


_SECRET_OPTIONS = {"-p", "--password", "-t", "--token"}
_OPTION_AND_SECRET = re.compile(r"(-[pt]=|-[pt](?=.)|--(?:password|token)=).*", re.DOTALL)
# What is rather the next option, when the value was forgotten.
_LOOKS_LIKE_AN_OPTION = re.compile(r"-[A-Za-z]|-args|--[\w-]*")


def _find_secrets(words: Sequence[str]) -> list[tuple[int, int]]:
    """Find passwords and tokens: the index of the word, and where in it the secret begins."""
    found = []
    previous = ""
    subcommands_own = ("-p", "--p") if words and words[0] == "login" else ("-t", "--t")
    for index, word in enumerate(words):
        if previous in _SECRET_OPTIONS and not _LOOKS_LIKE_AN_OPTION.fullmatch(word):
            found.append((index, 0))
        elif (match := _OPTION_AND_SECRET.fullmatch(word)) and (
            # With a space in it, an option that there is not is an ordinary word to argparse.
            word.startswith(subcommands_own) or " " not in word
        ):
            found.append((index, match.end(1)))
        previous = word
    return found


def _hide(argv: Sequence[str], secrets: Sequence[tuple[int, int]]) -> None:
    """Overwrite secrets in this process's own arguments, which everybody can read.

    `argv` are the last arguments of this process; `secrets` is of `_find_secrets`. Where
    the system does not let us, nothing happens.
    """
    with contextlib.suppress(OSError):
        with open("/proc/self/stat", "rb") as file:
            stat = file.read()
        address = int(stat.rpartition(b")")[2].split()[48 - 3])  # after field 2, the name
        with open("/proc/self/cmdline", "rb") as file:
            words = file.read().split(b"\0")[:-1]
        first = len(words) - len(argv)
        if words[first:] != [os.fsencode(word) for word in argv]:
            return
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            for index, offset in secrets:
                before = sum(len(word) + 1 for word in words[: first + index])
                length = len(words[first + index]) - offset
                memory.seek(address + before + offset)
                memory.write(b"*" * length)


def _split_start(
    argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[Sequence[str], str | None, Sequence[str]]:
    """Split the words of `start` into ours, the job's command, and its arguments."""
    with_value = {
        word
        for option in parser._actions  # noqa: SLF001 -- argparse tells its options nowhere else
        if option.nargs is None  # neither a flag nor -args
        for word in option.option_strings
    }
    index = 1
    while index < len(argv):
        word = argv[index]
        if word in {"-args", "--args"}:
            return argv[:index], None, argv[index + 1 :]
        if word == "--" or not word.startswith("-"):
            command = argv[index + (word == "--") :]
            return argv[:index], *((command[0], command[1:]) if command else (None, []))
        index += 2 if word in with_value else 1
    return argv, None, []
