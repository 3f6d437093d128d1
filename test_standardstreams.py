"""What the programs do when their caller has closed a standard stream, or nobody takes stderr."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testkit import GUARD_S, ClientProgram, ServerProgram, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable

_HERE = Path(__file__).parent
_KILLED = ("run", "--", "sh", "-c", "echo out; kill -9 $$")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    ("words", "stdout", "status"),
    [
        (_KILLED, b"out\n", 128 + signal.SIGKILL),
        (("run", "--", "no-such-command"), b"", 125),
        (("wait", "no-such-job"), b"", 125),
        (("status", "no-such-job"), b"", 1),
        (("start", "--no-such-option"), b"", 2),
    ],
)
def test_nobody_who_takes_stderr_changes_no_output_and_no_exit_status(
    cli: ClientProgram, redirection: str, words: tuple[str, ...], stdout: bytes, status: int
) -> None:
    """A full disk, and a stream that is closed: then errors are not written to stdout instead."""
    script = f'exec "$@" {redirection}'
    program = [sys.executable, str(_HERE / "client.py"), *words]
    result = subprocess.run(
        ["sh", "-c", script, "sh", *program],
        env=cli.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    assert (result.returncode, result.stdout) == (status, stdout)


def test_server_whose_standard_streams_are_closed_opens_none_of_its_files_there(
    tmp_path: Path, certs: Path, make_state: Callable[[], Path]
) -> None:
    """What is written to stderr would get into such a file."""
    program = ServerProgram(
        tmp_path / "log",
        *("--listen", "127.0.0.1:0", "--limits", "off", "--certs", str(certs)),
        *("--state-dir", str(make_state())),
        before=("sh", "-c", 'exec "$@" <&- 2>&-', "sh"),
    )
    with program.process:
        places = [os.readlink(f"/proc/{program.process.pid}/fd/{fd}") for fd in (0, 2)]
        assert program.end() == 0
    assert places == [os.devnull, os.devnull]


@pytest.mark.parametrize(
    ("redirection", "status", "error"),
    [
        (">/dev/full", 1, "server: cannot write to stdout: No space left on device\n"),
        ("<&- >&-", 0, ""),
    ],
)
def test_output_of_a_subcommand_that_nobody_takes(
    redirection: str, status: int, error: str
) -> None:
    """A full disk is told in one line; a closed stdout is none that anybody wants."""
    words = [sys.executable, str(_HERE / "server.py"), "config"]
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *words],
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert (result.returncode, result.stderr) == (status, error)
