"""The options of the command line, and how the command line shows other people's text.

    arguments = parse(["start", "--memory", "1G", "--", "ls", "-l"])
    arguments.subcommand, arguments.command, arguments.args  # "start", "ls", ["-l"]

`commands.py` does what the subcommand asks for. `client.py` is the program.

Thread safety: only the main thread of the program uses this module.

Sources: proc(5), `/proc/PID/cmdline` and field 48 of `/proc/PID/stat`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys

from connection import DEFAULT_CERTS, DEFAULT_SERVER
from helptexts import EPILOG, EXAMPLES, SUBCOMMANDS, USAGES
from profiles import apply_profile
from selecting import add_labels, add_options, check_jobs, seconds, take_jobs
from units import parse_size
from version import VERSION
from wrongusage import describe_first_word, describe_unknown, describe_wrong_value

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, NoReturn

__all__ = [
    "EXIT_UNKNOWN",
    "LIMIT_FIELDS",
    "LIMIT_OPTIONS",
    "TIME_FIELDS",
    "Parser",
    "hide_secrets",
    "make_parsers",
    "parse",
    "parse_connection",
    "printable",
    "warn",
]

_EXIT_USAGE = 2
EXIT_UNKNOWN = 125
"""The exit status of `run` and `wait` if no exit code or signal of the job is known."""

_LOCAL = {"completion", "import"}  # need no server


def printable(text: str) -> str:
    """Return text from somebody else so that it cannot control our terminal.

    Control characters, line ends, direction marks and lone surrogates become escapes like
    `\\x1b`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(text: str) -> None:
    """Write a line to stderr; `text` may be somebody else's."""
    print(f"client: {printable(text)}", file=sys.stderr)


# --- reading the command line -------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words after the program's name; exits after --help and for wrong usage.

    `args` of a `start` are the job's own words, whatever they look like. `secrets` are the
    passwords and tokens in `argv`; `own_words` is how many of the words are the client's.
    """
    main_parser, subparsers = make_parsers()
    name = argv[0] if argv else ""
    if name not in subparsers:
        added = [action for each in subparsers.values() for action in each.added]
        options = {option for action in added for option in action.option_strings}
        error = describe_first_word(name, list(subparsers), options)
        if error:
            main_parser.error(error)
        main_parser.parse_args(argv[:1])  # only the first word: one of the others may be a secret
    parser = subparsers[name]
    arguments, unknown = parser.parse_known_args(argv[1:])
    arguments.subcommand = name
    unknown = take_jobs(arguments, unknown)
    if unknown:
        known = [option for action in parser.added for option in action.option_strings]
        parser.error(describe_unknown(unknown, known))
    error = describe_wrong_value(parser.added, arguments)
    if error:
        parser.error(error)
    arguments.own_words = len(argv)
    if name in {"start", "run"}:
        _split_start(parser, arguments)
    if name in _LOCAL:
        arguments.secrets = []
        return arguments
    apply_profile(arguments)
    if name == "login" and arguments.user is None:
        parser.error("the user is missing; give -u USER, or a profile with a user")
    check_jobs(parser, arguments)
    return arguments


def parse_connection(words: Sequence[str]) -> argparse.Namespace:
    """Return which server, certificates and token an unfinished command line names."""
    parser = Parser(prog="client", add_help=False, allow_abbrev=False)
    _add_connection(parser, with_token=True)
    return parser.parse_known_args(words)[0]


def _split_start(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Find the job's command and its arguments in either form of `start` and `run`."""
    words = arguments.words
    if arguments.args is not None:
        # argparse ends -args at `--`, and leaves that and the following words to `words`.
        arguments.args = words = arguments.args + words
    elif words:
        command = words[1:] if words[0] == "--" else words
        if arguments.command is not None and command:
            parser.error(
                f"two commands: {arguments.command!r} and {command[0]!r}; arguments follow -args"
            )
        if command:
            arguments.command, arguments.args = command[0], command[1:]
    if arguments.command is None:
        parser.error("the command is missing; give -c COMMAND, or -- COMMAND ARGUMENTS")
    if arguments.keep_open and not arguments.stdin:
        parser.error("--keep-open needs --stdin")
    arguments.args = arguments.args or []
    arguments.own_words -= len(words)


class Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line, as the client reports every error.

    Attribute: `added`, the options and other arguments that were added.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.added: list[argparse.Action] = []
        super().__init__(*args, **options)

    def add_argument(self, *args: Any, **options: Any) -> argparse.Action:
        """Add an argument as argparse does, and note it."""
        action = super().add_argument(*args, **options)
        self.added.append(action)
        return action

    def error(self, message: str) -> NoReturn:
        status = EXIT_UNKNOWN if self.prog.endswith((" run", " wait")) else _EXIT_USAGE
        if message.endswith("expected one argument"):  # in argparse's words
            message += "; if it begins with a dash, write --name=-x"
        self.exit(status, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


class _Secret(argparse.Action):
    """Stores a password or token, and collects all of them in `secrets`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 -- argparse calls it so
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.secrets = [*namespace.secrets, values]


def make_parsers() -> tuple[Parser, Mapping[str, Parser]]:
    """Return the parser of the whole command line, and those of the subcommands by name."""
    parser = Parser(
        prog="client",
        description="Run commands on a job-worker server, watch their output, stop them.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"job-worker {VERSION}")
    commands = parser.add_subparsers(
        dest="subcommand", metavar="SUBCOMMAND", required=True, parser_class=Parser, prog="client"
    )
    subparsers = {
        name: commands.add_parser(
            name,
            help=text,
            description=f"{text}.",
            usage=USAGES[name],
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for name, text in SUBCOMMANDS.items()
    }
    _add_completion(subparsers["completion"])
    _add_import(subparsers["import"])
    for name, subparser in subparsers.items():
        if name in _LOCAL:
            continue
        _add_connection(subparser, with_token=name != "login")
    add_options(subparsers)
    subparsers["whoami"].add_argument("--json", action="store_true", help="print JSON")
    _add_login(subparsers["login"])
    _add_start(subparsers["start"])
    _add_start(subparsers["run"])
    subparsers["run"].add_argument(
        "-d",
        "--detach",
        action="store_true",
        help="print the job's ID and do not wait for its end",
    )
    _add_signal(subparsers["signal"])
    _add_grace(subparsers["stop"])
    _add_stream(subparsers["stream"])
    _add_send(subparsers["send"])
    return parser, subparsers


def _add_stream(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--offset",
        type=_offset,
        default=0,
        metavar="N",
        help="begin with byte N, counted from 0 (default: 0)",
    )
    parser.add_argument(
        "--tail", type=_count, metavar="N", help="begin with the last N lines of the output so far"
    )
    parser.add_argument(
        "--since",
        type=seconds,
        metavar="TIME",
        help="begin with what the job wrote this long ago, like 10m",
    )
    parser.add_argument(
        "--no-follow", action="store_true", help="end with the output so far; default: with the job"
    )
    parser.add_argument(
        "--timestamps",
        action="store_true",
        help="begin each line with the time at which the job wrote it, exact to 100 ms",
    )
    parser.add_argument(
        "--no-retry",
        action="store_true",
        help="end when the connection is lost, as --retry-for 0; default: connect again and "
        "continue at that byte",
    )


def _add_send(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--again",
        action="store_true",
        help="stdin is the whole input from its beginning: leave out what the job has got "
        "(default: all of stdin comes after that)",
    )
    parser.add_argument(
        "-k",
        "--keep-open",
        action="store_true",
        help="leave the job's input open for another send (default: end it)",
    )


def _add_connection(parser: Parser, *, with_token: bool) -> None:
    group = parser.add_argument_group("connection")

    def add(*names: str, **options: Any) -> None:
        parser.added.append(group.add_argument(*names, **options))

    add(
        "--server",
        metavar="HOST:PORT",
        help=f"the server (default: JOBWORKER_SERVER, that of the profile, or {DEFAULT_SERVER})",
    )
    add(
        "--profile",
        metavar="NAME",
        help="a table of ~/.config/job-worker/config.toml with server, certs, cert, key, ca and "
        "user (default: JOBWORKER_PROFILE, or the table [default])",
    )
    add(
        "--certs",
        metavar="DIR",
        help="the directory of client.pem, client-key.pem and server-ca.pem (default: "
        f"JOBWORKER_CERTS, that of the profile, or {DEFAULT_CERTS})".replace("%", "%%"),
    )
    add(
        "--retry-for",
        type=seconds,
        metavar="TIME",
        help="how long to try again when the server cannot be reached, like 10m; 0: not at all "
        "(default: 5m if output, input or waiting breaks off, else 30s; list, login and logout "
        "do not try again if the server has not answered yet)",
    )
    add("--cert", metavar="FILE", help="another client certificate")
    add("--key", metavar="FILE", help="another client key")
    add("--ca", metavar="FILE", help="another server CA")
    if with_token:
        add(
            "-t",
            "--token",
            action=_Secret,
            help="the token (default: JOBWORKER_TOKEN, or the kept one); other users of this "
            "machine can see -t until the client has overwritten it, but not JOBWORKER_TOKEN",
        )
    parser.set_defaults(secrets=[])


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", choices=["bash", "zsh", "fish"], metavar="SHELL", help="bash, zsh or fish"
    )
    parser.add_argument(
        "--candidates",
        action="store_true",
        help="what the script calls: print what fits after the words that stdin has, one in a line",
    )


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="FILE", help="the bundle; - for stdin")
    parser.add_argument(
        "--as", metavar="NAME", dest="name", help="the name of the profile (default: default)"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="give the profile of an earlier import the files of this bundle",
    )


def _add_login(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-u", "--user", metavar="USER", help="the user's name (default: that of the profile)"
    )
    parser.add_argument(
        "-p",
        "--password",
        action=_Secret,
        help="the password; - reads it from stdin; without -p the client asks for it. Other users "
        "of this machine can see -p until the client has overwritten it. A password that begins "
        "with a dash is written -p=PASSWORD",
    )


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--command", metavar="COMMAND", help="the command; no shell reads it")
    parser.add_argument(
        "--request-id",
        metavar="UUID",
        help="names this start: another start with the same UUID prints the ID of the same job, "
        "and starts none (default: a new UUID)",
    )
    parser.add_argument(
        "-i",
        "--stdin",
        action="store_true",
        help="send stdin to the job, to its end (default: the job's stdin is /dev/null)",
    )
    parser.add_argument(
        "-k",
        "--keep-open",
        action="store_true",
        help="with -i: leave the job's input open for `client send` (default: end it)",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="a name that the job can be found by: letters, digits and _ . -, but nothing that "
        "could be the beginning of an ID",
    )
    add_labels(parser, "a label that the job can be found by; may be repeated")
    _add_surroundings(parser)
    _add_keep_tmp(parser)
    for option, (name, convert, metavar, text) in LIMIT_OPTIONS.items():
        parser.add_argument(option, dest=name, type=convert, metavar=metavar, help=text)
    for option, text in _TIME_OPTIONS.items():
        parser.add_argument(option, type=seconds, metavar="TIME", help=text)
    parser.add_argument(
        "-args",
        "--args",
        dest="args",
        metavar="A",
        nargs=argparse.REMAINDER,
        help="all following words are the command's arguments, options included",
    )
    parser.add_argument(
        "words",
        metavar="COMMAND",
        nargs=argparse.REMAINDER,
        help="the command and its arguments, in place of -c and -args",
    )


def _add_surroundings(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the job finds when it begins."""
    parser.add_argument(
        "--cwd",
        metavar="DIR",
        help="the directory on the server in which the job begins; a relative path begins at your "
        "home there (default: that home)",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable of the job; without =VALUE it gets the value that it has "
        "here, which no other user of this machine can see; may be repeated",
    )
    parser.add_argument(
        "--env-file",
        dest="env_files",
        action="append",
        default=[],
        metavar="FILE",
        help="a file with NAME=VALUE or NAME in each line; VALUE is taken as it is, quotes "
        "included; blank lines and lines that begin with # are skipped; --env replaces what a file "
        "says",
    )


def _add_keep_tmp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-tmp",
        action="store_true",
        help="keep the job's TMPDIR until the job is removed; status names it, and other jobs of "
        "yours can read it (default: it is removed when the job ends)",
    )
    parser.add_argument(
        "--no-queue",
        action="store_true",
        help="on a cluster: fail if no node is free for 10 s (default: the job waits, QUEUED)",
    )


def _add_grace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grace",
        type=seconds,
        default=0,
        metavar="TIME",
        help="send SIGTERM first, and kill what is left after this time, like 10s (default: 0)",
    )


def _add_signal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-s",
        "--signal",
        default="TERM",
        metavar="SIGNAL",
        help="its name, like HUP or SIGHUP, or its number (default: %(default)s)",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="send it to every process of the job; default: to the one that executes the command",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not _is_number(text) or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _cores(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of CPU cores") from None


def _offset(text: str) -> int:
    if not _is_number(text) or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, 0 or more")
    return int(text)


def _is_number(text: str) -> bool:
    # int() also takes other digits, and raises for more than 4300 of them.
    return re.fullmatch(r"[0-9]{1,20}", text) is not None


# Each option: the field of Limits that it sets, its reader, its metavar and its help.
LIMIT_OPTIONS: dict[str, tuple[str, Callable[[str], float], str, str]] = {
    "--cpus": ("cpu_cores", _cores, "N", "CPU cores, 0.5 for half of one"),
    "--memory": ("memory_bytes", _size, "SIZE", "memory, like 256M"),
    "--io-read": ("io_read_bps", _size, "SIZE", "bytes per second read from each disk"),
    "--io-write": (
        "io_write_bps",
        _size,
        "SIZE",
        "bytes per second written to each disk; not to stdout",
    ),
    "--io-read-ops": ("io_read_iops", _count, "N", "reads per second from each disk"),
    "--io-write-ops": ("io_write_iops", _count, "N", "writes per second to each disk"),
    "--pids": ("pids", _count, "N", "processes and threads"),
}
LIMIT_FIELDS = [field for field, *_ in LIMIT_OPTIONS.values()]

_TIME_OPTIONS = {
    "--timeout": "stop the job after this time, like 30m; 0: never (default: the server's)",
    "--grace": "how long a job that has timed out may go on after SIGTERM, like 10s; then it is "
    "killed (default: the server's)",
    "--linger": "how long other processes that hold the job's output may go on after the command "
    "has ended, like 2s; then they are killed (default: the server's)",
}
TIME_FIELDS = [option.removeprefix("--") for option in _TIME_OPTIONS]


# --- hiding secrets -----------------------------------------------------------------------


def hide_secrets(argv: Sequence[str], secrets: Sequence[str]) -> None:
    """Overwrite `secrets` at the end of any of `argv`, where other users see our arguments.

    `argv`: consecutive arguments of this process, from the first that `main` got. Does
    nothing if the process has other arguments, or if the system refuses.
    """
    if not any(secrets):
        return
    with contextlib.suppress(OSError):
        with open("/proc/self/stat", "rb") as file:
            stat = file.read()
        address = int(stat.rpartition(b")")[2].split()[48 - 3])  # after field 2, the name
        with open("/proc/self/cmdline", "rb") as file:
            shown = file.read()
        ours = b"".join(os.fsencode(word) + b"\0" for word in argv)
        begin = shown.find(b"\0" + ours) + 1
        if not begin:
            return
        hidden = _mask(ours, [os.fsencode(secret) for secret in secrets if secret])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(address + begin)
            memory.write(hidden)


def _mask(words: bytes, secrets: Sequence[bytes]) -> bytes:
    """Replace the secrets at the ends of the NUL-terminated words by as many asterisks."""
    for secret in secrets:
        words = words.replace(secret + b"\0", b"*" * len(secret) + b"\0")
    return words
