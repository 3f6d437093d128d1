"""Tests of `client wait`, with a real server and real jobs."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from testkit import ABSENT, GUARD_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from client import Client
    from server import Server
    from testkit import ClientProgram, ServerProgram

    Connect = Callable[..., Client]

_SLEEP = ("sleep", ["1000000"])


@pytest.fixture
def client(serve: Callable[..., Server], connect: Connect, cli: ClientProgram) -> Client:
    """A client of a server of the test's own, which is the one that `cli` talks to."""
    address = serve().address
    cli.environment["JOBWORKER_SERVER"] = address
    return connect("user", address)


@pytest.mark.parametrize(
    ("script", "status", "end"),
    [
        ("exit 0", 0, "FINISHED (exited with code 0)"),
        ("exit 3", 3, "FINISHED (exited with code 3)"),
        ("kill -TERM $$", 128 + 15, "FINISHED (killed by SIGTERM)"),
    ],
)
def test_wait_exits_as_the_job_did(
    client: Client, cli: ClientProgram, script: str, status: int, end: str
) -> None:
    """Whether it has ended before or not, and prints its end."""
    job_id = client.start("sh", ["-c", script])
    for _ in range(2):
        assert cli.run("wait", job_id) == (status, f"{job_id} {end}\n".encode(), "")


def test_wait_may_take_longer_than_grpc_can_count(client: Client, cli: ClientProgram) -> None:
    """For gRPC a deadline in 300 years is over."""
    job_id = client.start("sh", ["-c", "read x; exit 3"], stdin=True)
    with cli.start("wait", job_id, "--timeout", "99999999d") as process:
        client.write_input(job_id, b"go on\n")
        assert process.wait(GUARD_S) == 3


def test_wait_returns_when_all_have_ended_and_exits_as_the_last_one_named(
    client: Client, cli: ClientProgram
) -> None:
    """Not as the one that ended last. Jobs are named in any way, with -j and without."""
    first = client.start(*_SLEEP, name="first")
    second = client.start("sh", ["-c", "exit 7"])
    with cli.start("wait", "first", "-j", second[:12]) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(second.encode())
        assert process.poll() is None
        client.stop(first)
        stdout, stderr = process.communicate(timeout=GUARD_S)
    assert (process.returncode, stderr) == (7, b"")
    assert stdout == f"{first} STOPPED (stopped by owner)\n".encode()
    assert cli.run("wait", second, "first")[0] == 128 + signal.SIGKILL


def test_wait_for_any_returns_when_one_has_ended(client: Client, cli: ClientProgram) -> None:
    """With the exit code of that one, whichever was named last."""
    ended = client.start("sh", ["-c", "exit 4"])
    running = client.start(*_SLEEP)
    assert cli.run("wait", "--any", ended, running)[:2] == (
        4,
        f"{ended} FINISHED (exited with code 4)\n".encode(),
    )
    client.stop(running)


def test_wait_gives_up_after_its_timeout(client: Client, cli: ClientProgram) -> None:
    """It exits with 124 as timeout(1) does, and names the jobs that run."""
    ended, running = client.start("true"), client.start(*_SLEEP)
    list(client.stream(ended))
    status, stdout, stderr = cli.run("wait", "--timeout", "500ms", running, ended)
    assert status == 125  # not a duration
    status, stdout, stderr = cli.run("wait", "--timeout", "1", running, ended)
    assert (status, stdout.count(b"\n")) == (124, 1)
    assert stderr == f"client: not ended within the time: {running}\n"
    client.stop(running)


def test_wait_for_a_job_that_is_removed_meanwhile_is_over(
    client: Client, cli: ClientProgram
) -> None:
    """Its end was told before."""
    job_id = client.start(*_SLEEP, name="web")
    other = client.start(*_SLEEP)
    with cli.start("wait", other, "web") as process:
        assert process.stdout
        client.stop(job_id)
        assert process.stdout.readline() == f"{job_id} STOPPED (stopped by owner)\n".encode()
        client.remove(job_id)
        client.stop(other)
        process.communicate(timeout=GUARD_S)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("job", "problem"),
    [(ABSENT, f"no such job: {ABSENT}"), ("nope", "no such job: nope; a job is named by")],
)
def test_wait_for_no_job_exits_with_125(
    client: Client, cli: ClientProgram, job: str, problem: str
) -> None:
    """And says so in one line. The ends of the other jobs are printed."""
    ended = client.start("true")
    status, stdout, stderr = cli.run("wait", ended, job)
    assert (status, stderr.count("\n")) == (125, 1)
    assert stderr.startswith(f"client: {problem}")
    assert stdout == (f"{ended} FINISHED (exited with code 0)\n".encode() if job == ABSENT else b"")


@pytest.mark.parametrize("words", [[], ["--timeout", "x", "web"], ["-t"], ["--", "-x"]])
def test_wrong_usage_of_wait_exits_with_125(cli: ClientProgram, words: list[str]) -> None:
    """Any other status could be that of the job."""
    status, stdout, stderr = cli.run("wait", *words)
    assert (status, stdout, stderr.count("\n")) == (125, b"", 1)


def test_wait_that_loses_its_server_exits_with_125(
    start_server: Callable[..., ServerProgram], connect: Connect, cli: ClientProgram
) -> None:
    """The end of the job is unknown."""
    program = start_server()
    job_id = connect("user", program.address).start(*_SLEEP)
    done = connect("user", program.address).start("true")
    with cli.start(
        "wait", "--server", program.address, "--retry-for", "0", done, job_id
    ) as process:
        assert process.stdout
        process.stdout.readline()
        program.end(signal.SIGKILL)
        _, stderr = process.communicate(timeout=GUARD_S)
    assert (process.returncode, stderr.count(b"\n")) == (125, 1)
