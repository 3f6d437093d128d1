"""Tests that the errors of the command line say what to do next."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import hints
from client import ClientError
from testkit import ABSENT, FOREVER, run_job, run_server

if TYPE_CHECKING:
    from collections.abc import Callable

    from client import Client
    from testkit import ClientProgram

    Connect = Callable[..., Client]

_HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpus", "100"], "--cpus 100 is above this server's ceiling of 8; ask for less"),
        (
            ["--memory", "1T"],
            "--memory 1 TiB is above this server's ceiling of 8 GiB; ask for less",
        ),
        (["--pids", "9999"], "--pids 9999 is above this server's ceiling of 4096; ask for less"),
        (["--cpus", "0"], "--cpus must be at least 0.01, not 0.0"),
        (["--linger", "1h"], "--linger must be 0 to 600 seconds, not 3600.0"),
    ],
)
def test_limit_that_is_refused_is_named_by_its_option(
    cli: ClientProgram, arguments: list[str], message: str
) -> None:
    """With sizes as people write them, and not by the field of the protocol."""
    assert cli.fail("start", *arguments, "--", "true") == f"client: {message}\n"


def test_wrong_password_tells_whom_to_ask(stranger: ClientProgram) -> None:
    """And names neither the user nor the password."""
    assert stranger.fail("login", "-u", "user", "-p", "wrong") == (
        "client: wrong user name or password; type them again, or ask the server's operator for a "
        "new password\n"
    )


def test_unknown_job_tells_how_to_see_the_jobs(cli: ClientProgram) -> None:
    """For one job and for several."""
    hint = "; to see your jobs run: client list\n"
    assert cli.fail("status", "-j", ABSENT) == f"client: no such job{hint}"
    assert cli.fail("stop", "-j", ABSENT, ABSENT[::-1].replace("-", "0")).endswith(hint)


def test_error_has_the_id_of_a_job_only_once(cli: ClientProgram, connect: Connect) -> None:
    """Also when several jobs were named."""
    client = connect()
    running, ended = client.start(*FOREVER), run_job(client)
    line = cli.fail("remove", "-j", running, ended)
    assert line == f"client: job {running} is still running; stop it first\n"
    client.stop(running)


def test_signal_to_a_job_that_has_ended_tells_how_to_see_its_end(
    cli: ClientProgram, connect: Connect
) -> None:
    """The signal was not sent."""
    line = cli.fail("signal", "-j", run_job(connect()))
    assert re.search(r"has ended; to see how it ended run: client status\n$", line)


@pytest.mark.parametrize(
    ("code", "text", "hint"),
    [
        ("RESOURCE_EXHAUSTED", "no room for another process: x", "stop a job, or try again later"),
        ("UNAVAILABLE", "the server is shutting down", "try again when it runs again"),
        (
            "PERMISSION_DENIED",
            "the role user may not call X",
            "ask an admin of the server to do it",
        ),
    ],
)
def test_words_of_the_server_that_say_nothing_to_do_are_completed(
    connect: Connect, code: str, text: str, hint: str
) -> None:
    """Each kind of error has its own hint."""
    arguments = argparse.Namespace(subcommand="start")
    assert hints.explain(ClientError(text, code), connect(), arguments) == f"{text}; {hint}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the subcommand is missing; begin with: client login -u USER"),
        (["lst"], "there is no subcommand 'lst'; did you mean list?"),
        (["xyz"], "there is no subcommand 'xyz'"),
        (["logs", "x"], "there is no subcommand 'logs'; did you mean stream?"),
        (["-V"], "unknown option -V"),
        (
            ["--server", "h:1", "list"],
            "options stand after the subcommand, like: client list --server HOST:PORT",
        ),
        (
            ["--memory=64M", "run", "true"],
            "options stand after the subcommand, like: client list --server HOST:PORT",
        ),
    ],
)
def test_wrong_first_word_is_explained(
    stranger: ClientProgram, arguments: list[str], message: str
) -> None:
    """In one line, with exit status 2."""
    assert stranger.run(*arguments) == (2, b"", f"client: {message}; see client --help\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "stop --all --name=",
            "the value of --name is empty; is it a shell variable that is not set?",
        ),
        ("list --token=", "the value of --token is empty; is it a shell variable that is not set?"),
        ("start --env=-- true", "-- cannot be the value of --env"),
        ("start -c true -- false", "two commands: 'true' and 'false'; arguments follow -args"),
        ("start -k true", "--keep-open needs --stdin"),
        ("list -q --json", "give --quiet or --json, but not both"),
        ("list --bogus", "unknown option --bogus"),
        (
            "stop --all --label=a=b --label=a=c",
            "--label gives one key two values; a job has one value for a key",
        ),
        (
            "list --status done",
            "argument --status: 'done' is not a status; write queued, running, stopped or finished",
        ),
        ("completion", "the following arguments are required: SHELL"),
        (
            "list --server -dash",
            "argument --server: expected one argument; if it begins with a dash, write --name=-x",
        ),
    ],
)
def test_wrong_usage_is_explained(stranger: ClientProgram, words: str, message: str) -> None:
    """An empty value does not count as none: it would mean all jobs, or the kept token."""
    name = words.partition(" ")[0]
    assert stranger.run(*words.split()) == (
        *(2, b""),
        f"client {name}: {message}; see client {name} --help\n",
    )


def test_unknown_option_is_told_with_the_nearest_one(stranger: ClientProgram) -> None:
    """Its value, which may be a secret, is not repeated."""
    assert stranger.run("list", "--sever=hunter2") == (
        *(2, b""),
        "client list: unknown option --sever; did you mean --server?; see client list --help\n",
    )


@pytest.mark.parametrize("option", ["--users", "--config"])
def test_server_names_the_option_of_a_file_that_it_cannot_open(option: str, tmp_path: Path) -> None:
    """With the path and the reason, and without the number of the error."""
    path = tmp_path / "missing"
    state = ("--state-dir", tmp_path / "state")
    result = run_server("--limits", "off", *state, option, path)
    assert (result.returncode, result.stdout) == (1, "")
    # As an ordinary user, the warning about isolation comes before it.
    assert result.stderr.endswith(
        f"server: {option} {path}: No such file or directory; check the path, and whether the "
        "server's user may use it\n"
    )
