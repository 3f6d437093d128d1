"""The commands of the program `server` beside serving, and its command line.

    arguments = parse_arguments(["--config", "server.toml", "check"])
    settings, sources = settings_in_force(arguments)
    status = arguments.run(CommandLine(settings, sources, arguments))

A new command is a function that adds its arguments to a parser, a function that runs it, and a line
in `_COMMANDS`.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import adminsocket
import hostcheck
import serverstatus
import slurmcheck
from configreport import report
from invite import Invitation, invite
from messages import wait_ready
from serverfiles import check_files, config_in_force
from serveroptions import OPTIONS, add_options, option_string
from settings import Settings, SettingsError
from store import back_up
from successor import end_jobs, find_waiting
from useradmin import UsersFile, add_user, new_entry, new_password
from users import Role
from version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["CommandLine", "parse_arguments"]

_ROLES = [role.value for role in Role]
_USER_COMMANDS = {"add", "passwd", "role", "remove", "list"}


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What a command gets: the settings, where each comes from, and the command's arguments."""

    settings: Settings
    sources: Mapping[str, str]
    arguments: argparse.Namespace


@dataclass(frozen=True, slots=True)
class _Command:
    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[CommandLine], int]
    """Does what the command is for, and returns the exit status."""


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line, as every error is reported."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the server's command line; exits for `--help` and wrong usage.

    `run` of the result runs the command; it is None if the server is to serve.
    """
    parser = _Parser(
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
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_describe_unknown(unknown, arguments.command))
    if isinstance(getattr(arguments, "check_config", None), Path):
        arguments.config = arguments.check_config
    return arguments


def _describe_unknown(words: Sequence[str], command: str | None) -> str:
    option = words[0].partition("=")[0]
    if command is not None and option in {option_string(key) for key in [*OPTIONS, "config"]}:
        return (
            f"options of the server stand before the command, like: server {option} ... {command}"
        )
    return f"unrecognized arguments: {' '.join(words)}"


# --- user -------------------------------------------------------------------------------------


def _add_user_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "server [OPTIONS] user add NAME | passwd NAME | role NAME ROLE | remove NAME | list | NAME"
    )
    # In the usage; the metavar is for the error that all of them are missing.
    parser.add_argument("words", nargs="+", metavar="add NAME", help=argparse.SUPPRESS)
    parser.add_argument(
        "--make-account",
        action="store_true",
        help="with `add`: make an account of this host for the user, with a uid of --uids and a "
        "home in the state directory, or with --accounts host as useradd chooses; an account of "
        "that name that exists is used",
    )
    parser.add_argument(
        "--role", choices=_ROLES, default="user", help="with `add` or NAME (default: user)"
    )


def _run_user(line: CommandLine) -> int:
    settings, arguments = line.settings, line.arguments
    match arguments.words:
        case ["list"]:
            users = UsersFile.of(settings)
            users.path.stat()  # a path with a mistake in it is not a file without users
            for user in users.users():
                print(user.name, user.role.value, user.account or "-", sep="\t")
            return 0
        case ["add", name]:
            add_user(settings, name, arguments.role, make_account=arguments.make_account)
            done = f"added {name} to {settings.users}"
        case ["passwd", name]:
            new_password(settings, name)
            done = f"{name} has a new password, and the tokens of the old one are worthless"
        case ["role", name, ("admin" | "user") as role]:
            UsersFile.of(settings).change(name, lambda user: replace(user, role=Role(role)))
            done = f"{name} has the role {role}"
        case ["remove", name]:
            UsersFile.of(settings).remove(name)
            done = f"removed {name} from {settings.users}"
        case [name] if name not in _USER_COMMANDS:
            print(new_entry(name, arguments.role))
            return 0
        case words:
            raise SettingsError(
                f"cannot understand `user {' '.join(words)}`; write `user add NAME`, "
                "`passwd NAME`, `role NAME admin`, `role NAME user`, `remove NAME`, `list`, or "
                "`user NAME` to print a line for the file"
            )
    print(done)
    return _tell_server(settings)


def _tell_server(settings: Settings) -> int:
    """Have the running server read its files again; return the exit status.

    1 if the server has refused something. If it cannot be asked, stderr says why.
    """
    try:
        problems = adminsocket.ask(settings.state_dir, "reload")["problems"]
    except adminsocket.AdminError as error:
        print(f"server: no running server has been told: {error}", file=sys.stderr)
        return 0
    for problem in problems:
        print(f"server: the running server: {problem}", file=sys.stderr)
    return 1 if problems else 0


# --- invite -----------------------------------------------------------------------------------


def _add_invite_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the user")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        required=True,
        help="where the user reaches the server: a name of the server's certificate",
    )
    parser.add_argument(
        "--ca",
        metavar="DIR",
        type=Path,
        help="the directory of client-ca.pem, client-ca-key.pem and server-ca.pem (default: that "
        "of --certs)",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="the bundle (default: NAME.tar)"
    )
    parser.add_argument("--role", choices=_ROLES, default="user", help="of a new user")
    parser.add_argument(
        "--make-account", action="store_true", help="for a new user, as for `user add`"
    )


def _run_invite(line: CommandLine) -> int:
    arguments = line.arguments
    output = arguments.output or Path(f"{arguments.name}.tar")
    invitation = Invitation(
        address=arguments.address,
        ca=arguments.ca or line.settings.certs,
        output=output,
        role=arguments.role,
        make_account=arguments.make_account,
    )
    password = invite(line.settings, arguments.name, invitation)
    print(f"made {output}; give it to {arguments.name}, and to nobody else: it has a key")
    print(f"{arguments.name} then runs: client import {output.name}")
    if line.settings.users is None:
        print(
            "no users file was named, so no user was made; if the server has no such user, run "
            f"there: server --users FILE user add {arguments.name}"
        )
    if not password:
        return 0
    print(f"the password, which is not in the bundle: {password}")
    return _tell_server(line.settings)


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


def _run_check(line: CommandLine) -> int:
    settings = line.settings
    if line.arguments.check_config is None:
        config = config_in_force(settings)
        if config.slurm is not None:
            findings = tuple(slurmcheck.check(config.slurm, config.limits({})))
        else:
            findings = hostcheck.check(line.arguments.check_root or settings.cgroup_root)
        print(*findings, sep="\n")
        return 0 if all(finding.works for finding in findings) else 1
    users = check_files(settings)
    print(f"the configuration, {len(users)} users and the certificates are in order")
    return 0


# --- config -----------------------------------------------------------------------------------


def _add_nothing(_: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def _run_config(line: CommandLine) -> int:
    print(report(line.settings, line.sources, config_in_force(line.settings)))
    return 0


# --- status, reload ---------------------------------------------------------------------------


def _add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")


def _run_status(line: CommandLine) -> int:
    state_dir = line.settings.state_dir
    try:
        status = adminsocket.ask(state_dir, "status")
    except adminsocket.NoServerError as error:
        if waiting := find_waiting(state_dir):
            raise adminsocket.NoServerError(
                f"no server runs with the state directory {state_dir}, and {waiting}; start the "
                f"server, or end them: server --state-dir {state_dir} stop --jobs"
            ) from error
        raise
    if line.arguments.json:
        print(json.dumps(status, indent=2))
    else:
        print(*serverstatus.in_words(status), sep="\n")
    return 0


def _run_reload(line: CommandLine) -> int:
    problems = adminsocket.ask(line.settings.state_dir, "reload")["problems"]
    if problems:
        raise adminsocket.AdminError("\n".join(problems))
    print("certificates and users were read again, the audit log was reopened")
    return 0


# --- backup -----------------------------------------------------------------------------------


def _add_backup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="is replaced if it exists")


def _run_backup(line: CommandLine) -> int:
    back_up(line.settings.state_dir / "store", line.arguments.file)
    print(f"{line.arguments.file} has the store; deploy/backup.sh saves all that a server needs")
    return 0


# --- stop -------------------------------------------------------------------------------------


def _add_stop_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", action="store_true", help="end the jobs, too")


def _run_stop(line: CommandLine) -> int:
    state_dir, ends_jobs = line.settings.state_dir, line.arguments.jobs
    try:
        pid = adminsocket.ask(state_dir, "stop", jobs=ends_jobs)["pid"]
    except adminsocket.NoServerError:
        if not ends_jobs or not end_jobs(state_dir):
            raise
        print("no server was running; the jobs that waited for one have ended")
        return 0
    with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid)) as process:
        wait_ready(process.fileno(), select.POLLIN)
    if ends_jobs:
        print("the server and its jobs have ended")
    else:
        waiting = find_waiting(state_dir)
        print("the server has ended", *([waiting] if waiting else []), sep="; ")
    return 0


_COMMANDS: Final = {
    "stop": _Command(
        "end the running server; with --jobs also jobs that would wait for the next one",
        "Do what SIGTERM does, and wait for the end of the server. With a --restart-window its\n"
        "jobs go on and wait for the next server; --jobs ends them, also if no server runs.\n"
        "Only root and the user that started the server may. Example:\n\n"
        "    server --state-dir /var/lib/job-worker stop --jobs",
        _add_stop_arguments,
        _run_stop,
    ),
    "config": _Command(
        "print every setting in force, and where its value comes from",
        "Print the settings that a server with the same options would have, each with the\n"
        "place of its value: default, option, or line of the file. The output is a\n"
        "configuration file.\n"
        "\n"
        "  server --config /etc/job-worker/server.toml config",
        _add_nothing,
        _run_config,
    ),
    "status": _Command(
        "show how the running server is: jobs, streams, what is nearly full or expires soon",
        "Ask the server that runs with this --state-dir how it is. Only root and the user that\n"
        "started the server may. Examples:\n\n"
        "    server --state-dir /var/lib/job-worker status\n"
        "    server --state-dir /var/lib/job-worker status --json",
        _add_status_arguments,
        _run_status,
    ),
    "reload": _Command(
        "have the running server read certificates and users again; says what was refused",
        "Do what SIGHUP does, wait until it is done, and say what was refused. That stays as it\n"
        "was, and the exit status is 1. Only root and the user that started the server may.\n"
        "Example: server --state-dir /var/lib/job-worker reload",
        _add_nothing,
        _run_reload,
    ),
    "backup": _Command(
        "copy the store (jobs, uids, revoked tokens) to a file, also while the server runs",
        "Write the store of --state-dir to FILE, as it is at one moment. The output of jobs, the\n"
        "token key and the users are files of their own. To restore it, stop the server and put\n"
        "FILE in the place of STATE/store/store.db: docs/security.md, Backup.\n"
        "\n"
        "  server --state-dir /var/lib/job-worker backup /var/backups/job-worker.db",
        _add_backup_arguments,
        _run_backup,
    ),
    "invite": _Command(
        "make a user, a client certificate, and a bundle of all that the user needs",
        "Make a tar file for `client import`: a new client certificate, its key, the CA of the\n"
        "server and the server's address. A user who is not in the users file yet is added to\n"
        "it with a new password, which is printed. If neither --users nor --config names a users\n"
        "file, only the tar file is made, as on another machine that has the keys of the CAs.\n"
        "\n"
        "  server --config FILE invite alice --address jobs.example.org:50051\n"
        "  server --certs certs invite alice --address jobs.example.org:50051",
        _add_invite_arguments,
        _run_invite,
    ),
    "user": _Command(
        "add, change, list or remove users",
        "Edit the file that --users or the configuration names, and have the running\n"
        "server of --state-dir read it. A password is asked for on the terminal, or is the\n"
        "first line of stdin.\n"
        "\n"
        "  server --config FILE user add alice --role admin\n"
        "  server --config FILE user passwd alice       give a new password\n"
        "  server --config FILE user role alice user\n"
        "  server --config FILE user remove alice       end also the user's tokens\n"
        "  server --config FILE user list               name, role and account\n"
        "  server user alice                            print a line for a users file",
        _add_user_arguments,
        _run_user,
    ),
    "check": _Command(
        "show which limits this host can enforce, and what to do about the others",
        "Run test jobs to find out which limits this host can enforce for this user. The\n"
        "exit status is 0 if it can enforce all; then --limits require works.\n"
        "\n"
        "  server check\n"
        "  server check --config /etc/job-worker/server.toml    read the files, run no jobs",
        _add_check_arguments,
        _run_check,
    ),
}
