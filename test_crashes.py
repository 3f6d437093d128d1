"""Tests of servers that end at bad moments, by SIGKILL or SIGTERM, while their jobs go on.

`test_restart.py` has the tests of workers.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from client import Client
from daemon import BROKEN_STATUS
from testkit import GUARD_S, ServerProgram, children_of, fork_server_of, run_server

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
_WINDOW = ("--restart-window", "5m")


class _Place:
    """A state directory, and the servers that use it one after the other."""

    def __init__(self, directory: Path, certs: Path) -> None:
        self.directory = directory
        self.certs = certs
        self.program: ServerProgram | None = None
        self.port = "0"
        self._logs = 0

    def start(self, *options: str) -> ServerProgram:
        self._logs += 1
        self.program = ServerProgram(
            self.directory / f"log{self._logs}",
            *("--listen", f"127.0.0.1:{self.port}", "--limits", "auto", "--uids", "76000-76999"),
            *("--certs", str(self.certs), "--state-dir", str(self.directory / "state"), *options),
        )
        self.port = self.program.address.rpartition(":")[2]
        return self.program

    def client(self) -> Client:
        client = Client(f"127.0.0.1:{self.port}", certs=self.certs)
        client.login("user", "user")
        return client

    def end(self) -> None:
        """End the server and all jobs."""
        if self.program is None:
            return
        fork_server = None
        with contextlib.suppress(Exception):
            fork_server = fork_server_of(self.program.process.pid)
        self.program.end(signal.SIGINT)
        if fork_server is not None:
            with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(fork_server)) as fd:
                assert select.select([fd], [], [], GUARD_S)[0]


@pytest.fixture
def place(public: Path, certs: Path) -> Iterator[_Place]:
    made = _Place(public, certs)
    yield made
    if made.program is not None and made.program.process.poll() is None:
        made.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_job_outlives_its_server(place: _Place, number: signal.Signals) -> None:
    """Status, output and end are the same as if nothing had happened."""
    program = place.start(*_WINDOW)
    fork_server = fork_server_of(program.process.pid)
    script = "echo one; sleep 1; echo two; exit 3"
    with place.client() as client:
        job_id = client.start("sh", ["-c", script])
        assert next(client.stream(job_id)) == b"one\n"
    assert program.end(number) == (0 if number == signal.SIGTERM else -number)
    place.start(*_WINDOW)
    assert Path(f"/proc/{fork_server}").exists()
    with place.client() as client:
        assert b"".join(client.stream(job_id)) == b"one\ntwo\n"
        assert client.status(job_id).exit_code == 3
        assert client.start("true")


@pytest.mark.parametrize("ends", ["SIGINT", "stop --jobs", "no window"])
def test_jobs_end_with_their_server_if_that_is_wanted(place: _Place, ends: str) -> None:
    """Ctrl-C, a command, and a server without a restart window."""
    program = place.start(*(() if ends == "no window" else _WINDOW))
    fork_server = fork_server_of(program.process.pid)
    with place.client() as client:
        job_id = client.start("sleep", ["infinity"])
    with open(os.pidfd_open(fork_server)) as pidfd:
        if ends == "stop --jobs":
            assert _run_server(place, "stop", "--jobs") == "the server and its jobs have ended\n"
            program.process.communicate(timeout=GUARD_S)
            assert program.process.returncode == 0
        else:
            program.end(signal.SIGINT if ends == "SIGINT" else signal.SIGTERM)
        assert select.select([pidfd], [], [], GUARD_S)[0]
    place.start(*_WINDOW)
    with place.client() as client:
        assert client.status(job_id).end_reason != 0


def _run_server(place: _Place, *command: str, status: int = 0) -> str:
    result = run_server("--state-dir", place.directory / "state", *command)
    assert result.returncode == status, result.stderr
    return result.stderr if status else result.stdout


def test_jobs_that_wait_for_a_server_can_be_ended_without_one(place: _Place) -> None:
    """Commands say how many wait, until when. The next server knows that a shutdown ended them."""
    program = place.start(*_WINDOW)
    with place.client() as client:
        job_id = client.start("sleep", ["infinity"])
    waiting = r"1 job goes on without it until \d\d:\d\d:\d\d UTC"
    assert re.fullmatch(f"the server has ended; {waiting}\n", _run_server(place, "stop"))
    program.process.communicate(timeout=GUARD_S)
    assert re.search(
        f"no server runs .*, and {waiting}; start", _run_server(place, "status", status=1)
    )
    assert "have ended" in _run_server(place, "stop", "--jobs")
    place.start(*_WINDOW)
    with place.client() as client:
        job = client.status(job_id)
        assert "SERVER_SHUTDOWN" in str(job)


def test_server_with_other_uids_is_refused_and_the_jobs_go_on(place: _Place) -> None:
    """The message says what to do."""
    if os.geteuid():
        pytest.skip("needs root")
    program = place.start(*_WINDOW)
    with place.client() as client:
        job_id = client.start("sleep", ["infinity"])
    program.end(signal.SIGTERM)
    directory = place.directory / "state"
    with pytest.raises(pytest.fail.Exception) as caught:
        place.start(*_WINDOW, "--uids", "76000-77999")
    assert "Traceback" not in str(caught.value)
    assert (
        "server: jobs of the former main process go on, and cannot be taken over: --uids: jobs "
        "run as the users 76001-76999, and not 76001-77999; start with the former settings, or end "
        f"these jobs, with: server --state-dir {directory} stop --jobs"
    ) in str(caught.value)
    place.start(*_WINDOW)
    with place.client() as client:
        assert client.status(job_id).exit_code in (0, None)
        assert not client.status(job_id).HasField("ended_at")


@pytest.mark.parametrize("option", ["--listen", "--metrics", "token.key"])
def test_server_that_cannot_start_leaves_the_jobs_to_the_next(place: _Place, option: str) -> None:
    """Although it had taken them over when it found that out; even if it has no window itself."""
    program = place.start(*_WINDOW)
    with place.client() as client:
        job_id = client.start("sleep", ["infinity"])
    program.end(signal.SIGTERM)
    key = place.directory / "state/token.key"
    right = key.read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options: tuple[str, ...] = (option, f"127.0.0.1:{taken.getsockname()[1]}")
        if option == "token.key":
            key.write_bytes(b"short")
            options = ()
        with pytest.raises(pytest.fail.Exception, match=option):
            place.start(*(_WINDOW if option == "--listen" else ()), *options)
    key.write_bytes(right)
    place.start(*_WINDOW)
    with place.client() as client:
        assert not client.status(job_id).HasField("ended_at")
        assert client.stop(job_id).HasField("ended_at")


def test_server_that_took_over_ends_when_its_fork_server_dies(place: _Place) -> None:
    """Although that is not its child."""
    program = place.start(*_WINDOW)
    with place.client() as client:
        client.start("sleep", ["infinity"])
    fork_server = fork_server_of(program.process.pid)
    program.end(signal.SIGKILL)
    program = place.start(*_WINDOW)
    leaders = children_of(fork_server)
    os.kill(fork_server, signal.SIGKILL)
    program.process.communicate(timeout=GUARD_S)
    assert program.process.returncode == BROKEN_STATUS
    for pid in leaders:  # without cgroups they are still there
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
