"""Tests of `start --stdin` and `run -i`, with the client as a program: its stdin reaches the job.

docs/input.md has the recipes; a test runs each of them as it stands there.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testkit import GUARD_S, make_fifo

if TYPE_CHECKING:
    from collections.abc import Callable

    from client import Client
    from testkit import ClientProgram

    Connect = Callable[..., Client]
    from testproxy import Proxy

_HERE = Path(__file__).resolve().parent
_NOT_SENT = "client: stdin is not sent to the job; use run -i to send it\n"


@pytest.fixture
def client(connect: Callable[..., Client]) -> Client:
    return connect()


def test_run_sends_stdin_byte_by_byte_and_its_end(cli: ClientProgram) -> None:
    data = bytes(range(256)) * 5000
    assert cli.run("run", "-i", "--", "cat", stdin=data) == (0, data, "")
    assert cli.run("run", "-i", "--", "wc", "-c", stdin=b"") == (0, b"0\n", "")


def test_run_exits_as_the_job_does_although_stdin_goes_on(cli: ClientProgram) -> None:
    """A job that has read enough ends, as in a pipeline."""
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"one\ntwo\n")
        with cli.start("run", "-i", "--", "sh", "-c", "head -n 1; exit 7", stdin=read_end) as run:
            assert run.communicate(timeout=GUARD_S) == (b"one\n", b"")
        assert run.returncode == 7
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("source", ["pipe", "file"])
def test_run_without_i_says_once_that_stdin_is_not_sent(
    cli: ClientProgram, tmp_path: Path, source: str
) -> None:
    if source == "pipe":
        assert cli.run("run", "--", "cat", stdin=b"x") == (0, b"", _NOT_SENT)
        return
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with path.open("rb") as file, cli.start("run", "--", "cat", stdin=file.fileno()) as run:
        assert run.communicate(timeout=GUARD_S) == (b"", _NOT_SENT.encode())


def test_run_without_i_says_nothing_if_there_is_nothing_to_send(
    cli: ClientProgram, tmp_path: Path
) -> None:
    """As with /dev/null, an empty file or a terminal."""
    empty = tmp_path / "file"
    empty.touch()
    ours, terminal = pty.openpty()
    for fd in (os.open(os.devnull, os.O_RDONLY), os.open(empty, os.O_RDONLY), terminal):
        with cli.start("run", "--", "cat", stdin=fd) as run:
            assert run.communicate(timeout=GUARD_S) == (b"", b"")
        os.close(fd)
    os.close(ours)


def test_terminal_sends_line_by_line(cli: ClientProgram) -> None:
    """The job answers a line before the next one is typed. Ctrl-D ends the input."""
    ours, terminal = pty.openpty()
    with cli.start("run", "-i", "--", "cat", stdin=terminal) as run:
        assert run.stdout is not None
        for line in (b"one\n", b"two\n"):
            os.write(ours, line)
            assert run.stdout.readline() == line
        os.write(ours, b"\x04")
        assert run.communicate(timeout=GUARD_S) == (b"", b"")
    assert run.returncode == 0
    os.close(ours)
    os.close(terminal)


def test_ctrl_c_reaches_the_job_while_stdin_waits(cli: ClientProgram) -> None:
    script = "trap 'echo caught; exit 3' INT; echo ready; read -r line; echo never"
    read_end, write_end = os.pipe()
    with cli.start("run", "-i", "--", "sh", "-c", script, stdin=read_end) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=GUARD_S) == (b"caught\n", b"")
    assert run.returncode == 3
    os.close(read_end)
    os.close(write_end)


def test_run_continues_input_and_output_after_lost_connections(
    cli: ClientProgram, proxy: Proxy
) -> None:
    """Each byte once in both directions. Losses that are over soon are not told."""
    data = os.urandom(6_000_000)
    cli.environment["JOBWORKER_SERVER"] = proxy.address
    with (
        cli.start("run", "-i", "--", "cat", stdin=subprocess.PIPE) as run,
        ThreadPoolExecutor(1) as pool,
    ):
        communicating = pool.submit(run.communicate, data, GUARD_S)
        for _ in range(3):
            proxy.await_passed(1_000_000)
            proxy.cut()
        stdout, stderr = communicating.result()
    assert (run.returncode, stdout == data, stderr) == (0, True, b"")


def test_stdin_that_does_not_block_is_sent(cli: ClientProgram) -> None:
    """Node.js makes the pipes of its children so."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with cli.start("run", "-i", "--", "cat", stdin=read_end) as run:
        assert run.stdout is not None
        os.write(write_end, b"one\n")
        assert run.stdout.readline() == b"one\n"
        os.close(write_end)
        assert run.communicate(timeout=GUARD_S) == (b"", b"")
    os.close(read_end)


def test_start_prints_the_id_sends_stdin_and_ends_before_the_job(
    cli: ClientProgram, client: Client, public: Path
) -> None:
    fifo = make_fifo(public / "fifo")
    command = ["sh", "-c", f"cat; read -r go <{fifo}"]
    status, stdout, stderr = cli.run("start", "--stdin", "--", *command, stdin=b"hello")
    assert (status, stderr) == (0, "")
    job_id = stdout.decode().strip()
    assert "\ninput       5 bytes, ended\n" in cli.read("status", "-j", job_id)
    fifo.write_bytes(b"\n")
    assert b"".join(client.stream(job_id)) == b"hello"


def test_detached_run_sends_stdin_too(cli: ClientProgram, client: Client) -> None:
    status, stdout, _ = cli.run("run", "-d", "-i", "--", "cat", stdin=b"hello")
    assert status == 0
    assert b"".join(client.stream(stdout.decode().strip())) == b"hello"


def test_start_fails_if_the_job_does_not_take_all(cli: ClientProgram) -> None:
    status, stdout, stderr = cli.run(
        "start", "--stdin", "--", "head", "-c", "1", stdin=bytes(1_000_000)
    )
    assert status == 1
    assert re.fullmatch(rb"[0-9a-f-]{36}\n", stdout)
    assert "takes no input: it has " in stderr


def test_start_ends_by_ctrl_c_and_leaves_the_input_open(cli: ClientProgram, client: Client) -> None:
    read_end, write_end = os.pipe()
    with cli.start("start", "--stdin", "--", "cat", stdin=read_end) as start:
        assert start.stdout is not None
        job_id = start.stdout.readline().decode().strip()
        os.write(write_end, b"one\n")
        chunks = client.stream(job_id)
        assert next(chunks) == b"one\n"
        start.send_signal(signal.SIGINT)
        start.communicate(timeout=GUARD_S)
    assert start.returncode == 130
    os.close(read_end)
    os.close(write_end)
    client.write_input(job_id, b"two\n", offset=4)
    assert b"".join(chunks) == b"two\n"


# --- the recipes ------------------------------------------------------------------------

_RECIPES = re.findall(
    r"^    \$ (.*\n(?:    > .*\n)*)((?:    [^$\n].*\n)*)",
    (_HERE / "docs" / "input.md").read_text(),
    re.MULTILINE,
)


def test_every_recipe_works_as_documented(cli: ClientProgram, tmp_path: Path, public: Path) -> None:
    """In the order of the document: each command, in bash, prints what stands below it."""
    public.chmod(0o777)
    launcher = tmp_path / "client"
    program = shlex.join([sys.executable, str(_HERE / "client.py")])
    launcher.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    launcher.chmod(0o755)
    assert len(_RECIPES) > 5
    for command, expected in _RECIPES:
        script = command.replace("    > ", "").replace("./client", shlex.quote(str(launcher)))
        script = script.replace("/srv/data", str(public))
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=cli.environment,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
        )
        assert result.returncode == 0, (script, result.stderr)
        assert result.stdout == re.sub(r"^    ", "", expected, flags=re.MULTILINE), script


# --- send -----------------------------------------------------------------------------------


def test_send_continues_an_input_that_broke_off(cli: ClientProgram, connect: Connect) -> None:
    """With --again stdin is the whole input, and what the job has got is left out."""
    client = connect()
    job_id = client.start("cat", stdin=True)
    client.write_input(job_id, b"one\n", end=False)
    assert cli.run("send", job_id, "--again", stdin=b"one\ntwo\n") == (0, b"", "")
    assert b"".join(client.stream(job_id)) == b"one\ntwo\n"


def test_send_adds_to_an_input_and_ends_it(cli: ClientProgram, connect: Connect) -> None:
    """-k leaves it open, also at the start; an empty stdin ends it. A job is named in any way."""
    client = connect()
    status, stdout, _ = cli.run("start", "-i", "-k", "--", "cat", stdin=b"zero\n")
    assert status == 0
    job_id = stdout.decode().strip()
    for data in (b"one\n", b"two\n"):
        assert cli.run("send", "-k", "-j", job_id[:12], stdin=data) == (0, b"", "")
    stdin = client.status(job_id).stdin
    assert (stdin.bytes, stdin.ended) == (13, False)
    assert cli.run("send", job_id, stdin=b"") == (0, b"", "")
    assert b"".join(client.stream(job_id)) == b"zero\none\ntwo\n"
    assert cli.fail("send", job_id).startswith("client: ")


def test_send_of_less_than_the_job_has_got_is_refused(cli: ClientProgram, connect: Connect) -> None:
    """Stdin cannot be the input from its beginning. The input stays open."""
    client = connect()
    job_id = client.start("cat", stdin=True)
    client.write_input(job_id, b"one\n", end=False)
    status, _, stderr = cli.run("send", job_id, "--again", stdin=b"o")
    assert (status, "stdin has 1 bytes, but the job has got 4" in stderr) == (1, True)
    assert not client.status(job_id).stdin.ended
    client.stop(job_id)
