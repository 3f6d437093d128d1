"""The commands of the program `server` beside serving, and its command line.

    arguments = parse_arguments(["--config", "server.toml", "check"])
    settings, sources = settings_in_force(arguments)
    status = arguments.run(Call(settings, sources, arguments))

A new command is a function that adds its arguments to a parser, a function that runs it, and a line
in `_COMMANDS`.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import hostcheck
from configreport import report
from serverfiles import check_files, config_in_force
from serveroptions import add_options
from settings import Settings, SettingsError
from useradmin import add_user, ask
from users import Role
from version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Call", "parse_arguments"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a command: the settings, where each comes from, and the command's arguments."""

    settings: Settings
    sources: Mapping[str, str]
    arguments: argparse.Namespace


@dataclass(frozen=True, slots=True)
class _Command:
    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Call], int]
    """Does what the command is for, and returns the exit status."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the server's command line; exits for `--help` and wrong usage.

    `run` of the result runs the command; it is None if the server is to serve.
    """
    parser = argparse.ArgumentParser(
        prog="server",
        description="Run commands for clients that log in over mutual TLS.",
        epilog="SIGTERM or Ctrl-C stops the server and every job. SIGHUP makes it read the "
        "certificates and the users again, and reopen the audit log.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=None)
    parser.add_argument("--version", action="version", version=f"job-worker {VERSION}")
    add_options(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="other commands")
    for name, command in _COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    if isinstance(getattr(arguments, "check_config", None), Path):
        arguments.config = arguments.check_config
    return arguments


# --- user -------------------------------------------------------------------------------------


def _add_user_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="[add] NAME")
    parser.add_argument("added", metavar="", nargs="?")
    parser.add_argument(
        "--make-account",
        action="store_true",
        help="with `add`: make an account of this host for the user, with a uid of --uids and a "
        "home in the state directory, or with --accounts host as useradd chooses; an account of "
        "that name that exists is used",
    )
    parser.add_argument("--role", choices=[role.value for role in Role], default="user")


def _run_user(call: Call) -> int:
    settings, arguments = call.settings, call.arguments
    if arguments.added is None:
        print(ask(arguments.name, arguments.role))
        return 0
    if arguments.name != "add":
        raise SettingsError(f"write `user add {arguments.added}`, or `user {arguments.added}`")
    add_user(settings, arguments.added, arguments.role, make_account=arguments.make_account)
    print(f"added {arguments.added} to {settings.users}; a server that runs reads it at SIGHUP")
    return 0


# --- check ------------------------------------------------------------------------------------


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cgroup-root", metavar="PATH", type=Path, help="as for the server", dest="check_root"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        nargs="?",
        type=Path,
        const=True,
        dest="check_config",
        help="run no jobs; read the files that the server reads (--config, --users, --certs, "
        "which precede `check`), and say what is wrong with them; FILE stands for --config",
    )


def _run_check(call: Call) -> int:
    settings = call.settings
    if call.arguments.check_config is None:
        config_in_force(settings)
        findings = hostcheck.check(call.arguments.check_root or settings.cgroup_root)
        print(*findings, sep="\n")
        return 0 if all(finding.works for finding in findings) else 1
    users = check_files(settings)
    print(f"the configuration, {len(users)} users and the certificates are in order")
    return 0


# --- config -----------------------------------------------------------------------------------


def _add_nothing(_: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def _run_config(call: Call) -> int:
    print(report(call.settings, call.sources, config_in_force(call.settings)))
    return 0


_COMMANDS: Final = {
    "config": _Command(
        "print every setting in force, and where its value comes from",
        "Print the settings that a server with the same options would have, each with the place\n"
        "of its value: default, option, or line of the file. The output is a configuration file.\n"
        "Example: server --config /etc/job-worker/server.toml config",
        _add_nothing,
        _run_config,
    ),
    "user": _Command(
        "print an entry for the users file, or add one to it",
        "Ask for a password and print an entry for the file that --users names; with `add` before\n"
        "the name, add it to this file. Example: server --users FILE user add alice",
        _add_user_arguments,
        _run_user,
    ),
    "check": _Command(
        "show which limits this host can enforce, and what to do about the others",
        "Run test jobs to find out which limits this host can enforce for this user. The exit\n"
        "status is 0 if it can enforce all; then --limits require works.",
        _add_check_arguments,
        _run_check,
    ),
}
