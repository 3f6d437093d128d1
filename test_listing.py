"""Tests of `client list`, `stop --all` and `remove --finished`, with a real server and terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import termios
from typing import TYPE_CHECKING

import pytest

import listing
import workerservice_pb2 as worker_pb
from testkit import GUARD_S

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from client import Client
    from server import Server
    from testkit import ClientProgram

    Connect = Callable[..., Client]

_SLEEP = ("sleep", ["1000000"])


@pytest.fixture
def server(serve: Callable[..., Server], cli: ClientProgram) -> Server:
    """A server of the test's own, which is the one that `cli` talks to."""
    server = serve()
    cli.environment["JOBWORKER_SERVER"] = server.address
    return server


@pytest.fixture
def client(server: Server, connect: Connect) -> Client:
    return connect("user", server.address)


def _finish(client: Client, *argv: str, name: str = "") -> str:
    command, *args = argv or ("true",)
    job_id = client.start(command, args, name=name)
    list(client.stream(job_id))
    return job_id


class _Terminal:
    """A terminal with a program in it. Attribute: `text`, all that was written to it."""

    def __init__(self, cli: ClientProgram, columns: int, lines: int, *words: str) -> None:
        cli.environment.pop("COLUMNS", None)
        cli.environment.pop("LINES", None)
        cli.environment["TERM"] = "xterm"
        self._ours, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
        self.process: subprocess.Popen[bytes] = cli.start(*words, stdout=terminal)
        os.close(terminal)
        self.text = ""

    def await_text(self, pattern: str) -> None:
        """Read until what was written matches."""
        while not re.search(pattern, self.text, re.DOTALL):
            assert select.select([self._ours], [], [], GUARD_S)[0], self.text
            self.text += os.read(self._ours, 65536).decode()

    def read(self) -> str:
        """Read until the program has ended."""
        with contextlib.suppress(OSError):  # EIO: the other side is gone
            while more := os.read(self._ours, 65536):
                self.text += more.decode()
        self.process.communicate(timeout=GUARD_S)
        return self.text

    def close(self) -> None:
        os.close(self._ours)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def terminal(cli: ClientProgram) -> Iterator[Callable[..., _Terminal]]:
    """Run a subcommand in a terminal of so many columns and lines."""
    with contextlib.ExitStack() as ending:

        def run(columns: int, lines: int, *words: str) -> _Terminal:
            result = _Terminal(cli, columns, lines, *words)
            ending.callback(result.close)
            return result

        yield run


# --- the table ------------------------------------------------------------------------------


def test_list_shows_how_each_job_ended(client: Client, cli: ClientProgram) -> None:
    """EXIT is the exit code, the signal, or nothing while the job runs. The newest is last."""
    _finish(client, name="good")
    _finish(client, "sh", "-c", "echo hello; exit 3")
    _finish(client, "sh", "-c", "kill -TERM $$")
    client.stop(client.start(*_SLEEP))
    running = client.start(*_SLEEP, name="web")
    heading, *rows = cli.read("list").splitlines()
    columns = [heading.index(name) for name in ("NAME", "STATUS", "EXIT", "COMMAND")]
    cells = [[row[column:].split(" ")[0] for column in columns] for row in rows]
    assert [row[1:3] for row in cells] == [
        ["FINISHED", "0"],
        ["FINISHED", "3"],
        ["FINISHED", "SIGTERM"],
        ["STOPPED", "SIGKILL"],
        ["RUNNING", "-"],
    ]
    assert [row[0] for row in cells] == ["good", "", "", "", "web"]
    assert rows[-1].startswith(running[:8])
    assert rows[1].endswith("  6  sh -c 'echo hello; exit 3'")


def test_list_takes_all_conditions(client: Client, cli: ClientProgram) -> None:
    """Each option picks jobs; -q prints whole IDs, one in a line."""
    old = client.start("true", name="web", labels={"team": "data"})
    list(client.stream(old))
    new = client.start(*_SLEEP, labels={"team": "data", "run": "7"})

    def found(*words: str) -> list[str]:
        return cli.read("list", "-q", *words).splitlines()

    assert found() == [old, new]
    assert found("--status", "running") == [new]
    assert found("--status", "RUNNING", "--status", "finished") == [old, new]
    assert found("--name", "web") == [old]
    assert found("--label", "team=data") == [old, new]
    assert found("--label", "team=data", "--label", "run=7") == [new]
    assert found("--since", "1h") == [old, new]
    assert found("--since", "0") == []
    assert found("--since", "9999999w") == [old, new]
    assert found("--limit", "1") == [new]
    assert found("--owner", "user", "--limit", "5") == [old, new]
    assert "only an admin" in cli.fail("list", "--owner", "admin")


@pytest.mark.parametrize(
    "words", [["--status", "gone"], ["--label", "x"], ["--limit", "0"], ["--since", "soon"], ["x"]]
)
def test_wrong_usage_of_list_is_told(cli: ClientProgram, words: list[str]) -> None:
    """With 2, in one line."""
    status, stdout, stderr = cli.run("list", *words)
    assert (status, stdout, stderr.count("\n")) == (2, b"", 1)


def test_json_has_one_object_in_each_line(client: Client, cli: ClientProgram) -> None:
    """With all fields of `Job`."""
    ids = [_finish(client) for _ in range(2)]
    jobs = [json.loads(line) for line in cli.read("list", "--json").splitlines()]
    assert [job["job_id"] for job in jobs] == ids
    assert all(set(job) == set(worker_pb.Job.DESCRIPTOR.fields_by_name) for job in jobs)


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(
    client: Client, terminal: Callable[..., _Terminal], cli: ClientProgram, columns: int
) -> None:
    """A long name gives way to the command, as far as there is room."""
    cli.environment["NO_COLOR"] = "1"
    _finish(client, "true", "x" * 200, name="n" * 64)
    heading, row = terminal(columns, 24, "list").read().splitlines()
    assert len(row) == columns
    assert len(heading) <= columns
    assert "n" * 9 not in row or columns == 120
    assert ("true" in row) == (columns >= 80)


def test_colours_are_only_for_terminals_that_want_them(
    client: Client, terminal: Callable[..., _Terminal], cli: ClientProgram
) -> None:
    """A job that failed is red. With NO_COLOR, TERM=dumb, or in a pipe there is no escape."""
    _finish(client, "false")
    assert "\x1b[31m" in terminal(80, 24, "list").read()
    cli.environment["NO_COLOR"] = "1"
    assert "\x1b" not in terminal(80, 24, "list").read()
    del cli.environment["NO_COLOR"]
    assert "\x1b" not in cli.read("list")


def test_node_is_shown_if_there_is_a_cluster() -> None:
    """In a column of its own, which a table without nodes does not have."""
    queued = worker_pb.Job(job_id="12345678", owner="user", command="true")
    ran = worker_pb.Job(job_id="87654321", owner="user", command="true", node="node1")
    heading, *rows = listing._table([queued, ran], None)
    column = heading.index("NODE")
    assert [row[column:].split()[0] for row in rows] == ["-", "node1"]
    heading, _ = listing._table([queued], None)
    assert heading.split()[:4] == ["ID", "NAME", "OWNER", "STATUS"]
    assert "OWNER  STATUS" in heading


def test_ids_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    """Eight characters, or more."""
    ids = ["12345678-a", "12345678-b", "87654321-a"]
    lines = listing._table([worker_pb.Job(job_id=job_id) for job_id in ids], None)
    assert [line.split()[0] for line in lines[1:]] == ids
    lines = listing._table([worker_pb.Job(job_id=job_id) for job_id in ids[1:]], None)
    assert [line.split()[0] for line in lines[1:]] == ["12345678", "87654321"]


# --- --watch --------------------------------------------------------------------------------


def test_watch_on_a_terminal_redraws_the_table_until_ctrl_c(
    client: Client, terminal: Callable[..., _Terminal]
) -> None:
    """A start, an end and a removal are shown at once; the terminal is left as it was."""
    first = _finish(client, name="first")
    screen = terminal(100, 24, "list", "--watch")
    screen.await_text(f"{first[:8]}.*FINISHED")
    second = client.start(*_SLEEP)
    screen.await_text(f"1 running, 1 ended.*{second[:8]}[^\n]*RUNNING")
    client.stop(second)
    screen.await_text(f"0 running, 2 ended.*{second[:8]}[^\n]*STOPPED")
    client.remove(first)
    screen.await_text("0 running, 1 ended")
    screen.process.send_signal(signal.SIGINT)
    assert screen.read().endswith("\x1b[?25h\x1b[?1049l")
    assert screen.process.returncode == 130


def test_watch_of_more_jobs_than_lines_shows_those_that_run_and_the_newest() -> None:
    """In the order of their starts."""
    running, finished = worker_pb.JOB_STATUS_RUNNING, worker_pb.JOB_STATUS_FINISHED
    jobs = [
        worker_pb.Job(job_id=str(i), status=running if i in {0, 4} else finished) for i in range(9)
    ]
    shown = [job.job_id for job in listing._most_important(jobs, 4)]
    assert shown == ["0", "4", "7", "8"]
    assert [job.job_id for job in listing._most_important(jobs, 1)] == ["4"]
    assert listing._most_important(jobs, 9) == jobs


def test_watch_in_a_pipe_prints_a_line_for_each_change(client: Client, cli: ClientProgram) -> None:
    """Without any escape."""
    first = _finish(client, name="first")
    with cli.start("list", "--watch") as process:
        assert process.stdout
        lines = [process.stdout.readline().decode()]
        second = client.start("sh", ["-c", "exit 3"])
        lines += [process.stdout.readline().decode() for _ in range(2)]
        client.remove(second)
        lines.append(process.stdout.readline().decode())
        process.kill()
    assert lines == [
        f"{first}  exists   user  FINISHED (exited with code 0)  first  true\n",
        f"{second}  started  user  RUNNING  -  sh -c 'exit 3'\n",
        f"{second}  ended    user  FINISHED (exited with code 3)  -  sh -c 'exit 3'\n",
        f"{second}  removed  user  FINISHED (exited with code 3)  -  sh -c 'exit 3'\n",
    ]


def test_watch_as_json_prints_events(client: Client, cli: ClientProgram) -> None:
    """Of the jobs that the conditions pick."""
    _finish(client)
    job_id = _finish(client, name="web")
    with cli.start("list", "--watch", "--json", "--name", "web") as process:
        assert process.stdout
        event = json.loads(process.stdout.readline())
        process.kill()
    assert (event["kind"], event["job"]["job_id"]) == ("EXISTS", job_id)


# --- many jobs at once ----------------------------------------------------------------------


def test_stop_all_stops_the_running_jobs_that_the_conditions_pick(
    client: Client, cli: ClientProgram, connect: Connect, server: Server
) -> None:
    """Those of the user; without conditions all of them. Each end is printed."""
    foreign = connect("admin", server.address).start(*_SLEEP)
    done = _finish(client, name="web")
    web, other = client.start(*_SLEEP, name="web"), client.start(*_SLEEP)
    assert cli.read("stop", "--all", "--name", "web") == f"{web} STOPPED (stopped by owner)\n"
    assert cli.read("stop", "--all") == f"{other} STOPPED (stopped by owner)\n"
    assert cli.read("stop", "--all") == ""
    admin = connect("admin", server.address)
    assert admin.status(foreign).status == worker_pb.JOB_STATUS_RUNNING
    assert admin.status(done).status == worker_pb.JOB_STATUS_FINISHED
    admin.stop(foreign)


def test_remove_finished_removes_what_does_not_run(client: Client, cli: ClientProgram) -> None:
    """Or those of it that the conditions pick."""
    web, other = _finish(client, name="web"), _finish(client)
    running = client.start(*_SLEEP)
    assert cli.read("remove", "--finished", "--name", "web") == ""
    assert [job.job_id for job in client.list()] == [other, running]
    assert web not in cli.read("list", "-q")
    assert cli.read("remove", "--finished") == ""
    assert [job.job_id for job in client.list()] == [running]
    client.stop(running)


@pytest.mark.parametrize(
    "words",
    [
        ["stop"],
        ["stop", "--all", "web"],
        ["stop", "--name", "web", "x"],
        ["remove"],
        ["remove", "--finished", "-j", "web"],
        ["remove", "web", "--since", "1h"],
        ["status"],
        ["stream", "a", "b"],
        ["stop", "--", "-t", "x"],
    ],
)
def test_subcommand_that_does_not_know_which_job_is_wrong_usage(
    cli: ClientProgram, words: list[str]
) -> None:
    """It does nothing."""
    status, stdout, stderr = cli.run(*words)
    assert (status, stdout, stderr.count("\n")) == (2, b"", 1)


@pytest.mark.parametrize(
    "form",
    [
        ("-t", "TOKEN", "-j", "ID"),
        ("-j", "ID", "-t", "TOKEN"),
        ("ID",),
        ("-t", "TOKEN", "ID"),
        ("ID", "-t", "TOKEN"),
        ("web",),
        ("-j", "web"),
        ("--job=web",),
        ("BEGINNING",),
    ],
)
def test_job_is_named_in_every_form(
    client: Client, cli: ClientProgram, tokens: dict[str, str], form: tuple[str, ...]
) -> None:
    """With -j or without, before or after other options; by ID, its beginning or name."""
    job_id = client.start("sh", ["-c", "echo hello; exec sleep 1000000"], name="web")
    texts = {"ID": job_id, "BEGINNING": job_id[:8], "TOKEN": tokens["user"]}
    words = [texts.get(word, word) for word in form]
    assert json.loads(cli.read("status", *words, "--json"))["job_id"] == job_id
    assert cli.read("stop", *words) == "STOPPED (stopped by owner)\n"
    status, stdout, _ = cli.run("stream", *words)
    assert (status, stdout) == (1, b"hello\n")
    cli.read("remove", *words)


def test_several_jobs_may_stand_before_and_after_options(
    client: Client, cli: ClientProgram
) -> None:
    """And with -j."""
    ids = [client.start(*_SLEEP) for _ in range(4)]
    cli.read("stop", ids[0], "--certs", cli.environment["JOBWORKER_CERTS"], ids[1], "-j", *ids[2:])
    assert all(job.status == worker_pb.JOB_STATUS_STOPPED for job in client.list())
