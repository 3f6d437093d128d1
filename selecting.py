"""The options of the command line that say which jobs are meant.

    _add_jobs(parser, several=True)
    _add_conditions(parser)
    client.list(**conditions_of(arguments))

A job is named by its ID, the beginning of its ID, or its name, with -j or without.

Thread safety: there is no state.
"""

from __future__ import annotations

import argparse

from units import parse_duration

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from connection import Client

__all__ = [
    "add_labels",
    "add_options",
    "check_jobs",
    "conditions_of",
    "labels_of",
    "seconds",
    "selected",
    "take_jobs",
]

_STATUSES = ("QUEUED", "RUNNING", "STOPPED", "FINISHED")
_STATUS_WORDS = "queued, running, stopped or finished"
_WITH_JOBS = {"stop", "signal", "status", "stream", "send", "remove", "wait"}
_ONE_JOB = {"stream", "send"}
_EVERY = {"stop": "all", "remove": "finished"}  # the option that stands for many jobs
_MAX_DIGITS = 9


def add_options(subparsers: Mapping[str, argparse.ArgumentParser]) -> None:
    """Add what names or picks jobs to the subcommands that need it."""
    for name in _WITH_JOBS:
        _add_jobs(subparsers[name], several=name not in _ONE_JOB)
    for name, text in (
        ("stop", "stop all running jobs that you may see"),
        ("remove", "remove all jobs that you may see and that do not run any more"),
    ):
        subparsers[name].add_argument(
            f"--{_EVERY[name]}",
            action="store_true",
            help=f"{text}, or of them those that --owner, --name, --label and --since pick",
        )
        _add_conditions(subparsers[name])
    subparsers["status"].add_argument(
        "--json", action="store_true", help="print JSON with the fields of the .proto"
    )
    _add_list(subparsers["list"])
    _add_wait(subparsers["wait"])


def take_jobs(arguments: argparse.Namespace, unknown: list[str]) -> list[str]:
    """Take the jobs from the words that argparse does not know; return the other words.

    argparse does not take jobs that stand before an option together with some after it.
    """
    if arguments.subcommand not in _WITH_JOBS:
        return unknown
    arguments.job += [word for word in unknown if not word.startswith("-")]
    return [word for word in unknown if word.startswith("-")]


def check_jobs(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error unless the arguments name the jobs that the subcommand needs."""
    name = arguments.subcommand
    if name == "list" and arguments.quiet and arguments.json:
        parser.error("give --quiet or --json, but not both")
    if name not in _WITH_JOBS:
        return
    # A word after `--` may be an option in the wrong place, and its value a secret.
    if any(job.startswith("-") for job in arguments.job):
        parser.error("no job begins with a dash; options come before --")
    every = _EVERY.get(name)
    if every is not None and getattr(arguments, every):
        if arguments.job:
            parser.error(f"give jobs, or --{every}, but not both")
        return
    if not arguments.job:
        more = f", or --{every}" if every else ""
        parser.error(f"which job? Give its ID, the beginning of its ID, or its name{more}")
    if every is not None and (
        arguments.owner or arguments.name or arguments.labels or arguments.since is not None
    ):
        parser.error(f"--owner, --name, --label and --since need --{every}")
    if name in _ONE_JOB and len(arguments.job) > 1:
        parser.error(f"{name} takes one job")


def _add_jobs(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Add what names one or several jobs; all are in `arguments.job`, in their order."""
    text = "an ID, the beginning of one, or a name; " + (
        "several may be given" if several else "one job"
    )
    parser.add_argument("job", metavar="JOB", nargs="*", action="extend", help=text)
    parser.add_argument(
        "-j",
        "--job",
        metavar="JOB",
        nargs="+" if several else 1,
        action="extend",
        default=[],
        help="the same",
    )


def _add_conditions(parser: argparse.ArgumentParser) -> None:
    """Add the options that pick jobs by what they are."""
    parser.add_argument(
        "--owner", metavar="USER", help="jobs of this user; only admins see others'"
    )
    parser.add_argument("--name", metavar="NAME", help="jobs with this name")
    add_labels(parser, "jobs with this label; if repeated, with all of them")
    parser.add_argument(
        "--since",
        type=seconds,
        metavar="TIME",
        help="jobs that were started within this time, like 30m, 12h or 7d",
    )


def add_labels(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --label, which may be repeated."""
    parser.add_argument(
        "--label",
        dest="labels",
        action="append",
        default=[],
        type=_label,
        metavar="KEY=VALUE",
        help=text,
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    """Add --status, which may be repeated."""
    parser.add_argument(
        "--status",
        dest="statuses",
        action="append",
        default=[],
        type=_status,
        choices=_STATUSES,
        metavar="STATUS",
        help=f"jobs with this status: {_STATUS_WORDS}; if repeated, any of them",
    )


def labels_of(arguments: argparse.Namespace) -> Mapping[str, str]:
    """Return the labels that the arguments give."""
    return dict(arguments.labels)


def conditions_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Client.list` and `Client.watch`."""
    from datetime import UTC, datetime, timedelta

    since = None
    if arguments.since is not None:
        now = datetime.now(UTC)
        since = now - timedelta(seconds=min(arguments.since, now.timestamp()))
    return {
        "owner": arguments.owner or "",
        "name": arguments.name or "",
        "labels": labels_of(arguments),
        "since": since,
    }


def selected(client: Client, arguments: argparse.Namespace, statuses: list[str]) -> list[str]:
    """Return the IDs of all jobs that have one of these statuses and meet the conditions."""
    jobs = client.list(statuses=statuses, **conditions_of(arguments))
    return [job.job_id for job in jobs]


def _add_list(parser: argparse.ArgumentParser) -> None:
    _add_status(parser)
    _add_conditions(parser)
    parser.add_argument("--limit", type=_count, metavar="N", help="at most N jobs, the newest")
    parser.add_argument("-q", "--quiet", action="store_true", help="print whole IDs only")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON with the fields of the .proto, one object in each line",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show what happens until Ctrl-C: on a terminal as a table, with the usage of running "
        "jobs, else as a line for each job and each change",
    )


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--any",
        action="store_true",
        help="return when one of the jobs has ended, with its exit code",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="TIME",
        help="exit with 124 if the jobs have not ended after this time, like 30s or 10m",
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _status(text: str) -> str:
    if text.upper() not in _STATUSES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a status; write {_STATUS_WORDS}")
    return text.upper()


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def seconds(text: str) -> float:
    """Return a time that an option gives, in seconds; for argparse."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
