"""Tests of completion in bash, zsh and fish. `.ci/run` installs these shells."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import subprocess
import uuid
from typing import TYPE_CHECKING

import pytest

import cli as cli_module
import completion
from testkit import FOREVER, GUARD_S, find_program, run_job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from client import Client
    from testkit import ClientProgram

    Complete = Callable[[str], str]

# What is typed instead of the program shows the words that it would get.
_SHOW = 'client() { echo "<$*>"; }'
_PROMPT = b"ready> "


class _Terminal:
    """An interactive shell in a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        ours, theirs = pty.openpty()
        self._keyboard = open(ours, "r+b", buffering=0)  # noqa: SIM115 -- closed in `close`
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self._shown = b""

    def type(self, keys: bytes) -> None:
        self._keyboard.write(keys)

    def read_until(self, pattern: bytes) -> bytes:
        """Wait for what matches; return its first group, or all. What comes before it is lost."""
        while not (match := re.search(pattern, self._shown)):
            assert select.select([self._keyboard], [], [], GUARD_S)[0], self._shown
            self._shown += self._keyboard.read(1000) or b""
        self._shown = self._shown[match.end() :]
        return match[match.lastindex or 0]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._keyboard.close()


@pytest.fixture
def terminals(
    cli: ClientProgram, tmp_path: Path
) -> Iterator[Callable[[list[str], str], _Terminal]]:
    """Start a shell and give it a line to execute; return it with its next prompt shown."""
    started = []

    def start(command: list[str], line: str) -> _Terminal:
        changes = {"PS1": _PROMPT.decode(), "TERM": "dumb", "HOME": str(tmp_path)}
        started.append(terminal := _Terminal(command, cli.environment | changes))
        terminal.read_until(_PROMPT)
        terminal.type(f"{line}; {_SHOW}; echo d''one\n".encode())
        terminal.read_until(b"done\r\n")
        terminal.read_until(_PROMPT)
        return terminal

    yield start
    for terminal in started:
        terminal.close()


def _in_terminal(terminal: _Terminal) -> Complete:
    def complete(line: str) -> str:
        terminal.type(f"{line}\t\n".encode())
        return terminal.read_until(rb"<([^<>]*)>\r\n").decode()

    return complete


def _script(cli: ClientProgram, shell: str, tmp_path: Path) -> Path:
    path = tmp_path / f"script.{shell}"
    path.write_text(cli.read("completion", shell))
    return path


@pytest.fixture(params=["bash", "zsh", "fish"])
def complete(
    request: pytest.FixtureRequest,
    cli: ClientProgram,
    tmp_path: Path,
    terminals: Callable[[list[str], str], _Terminal],
) -> Complete:
    """Type a line and the Tab key in a shell; return the words after `client`."""
    shell: str = request.param
    program, script = find_program(shell), _script(cli, shell, tmp_path)
    if shell == "bash":
        return _in_terminal(terminals([program, "--norc", "--noprofile", "-i"], f". {script}"))
    if shell == "zsh":
        line = f"autoload -Uz compinit; compinit -u -d {tmp_path}/dump; . {script}"
        return _in_terminal(terminals([program, "-f", "-i"], line))

    def complete(line: str) -> str:
        # Fish shows all that fits, as its Tab key does.
        found = subprocess.run(
            [program, "--no-config", "-c", f"source {script}; complete -C '{line}'"],
            env=cli.environment | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=True,
        ).stdout
        (word,) = (each.partition("\t")[0] for each in found.splitlines())
        return " ".join([*line.split()[1:-1], word])

    return complete


def test_subcommand_is_completed(complete: Complete) -> None:
    """By its beginning."""
    assert complete("client who") == "whoami"


def test_option_is_completed(complete: Complete) -> None:
    """Of the subcommand that was typed."""
    assert complete("client start --io-read-o") == "start --io-read-ops"


def test_job_is_completed(complete: Complete, connect: Callable[..., Client]) -> None:
    """The server is asked for the jobs of the user."""
    client = connect()
    job_id = client.start(*FOREVER)
    assert complete(f"client stop -j {job_id[:13]}") == f"stop -j {job_id}"
    client.stop(job_id)


def test_name_of_a_file_is_completed_where_nothing_else_fits(
    complete: Complete, tmp_path: Path
) -> None:
    """Such as the value of `--cert`."""
    (tmp_path / "mine.pem").touch()
    assert complete(f"client list --cert {tmp_path}/min") == f"list --cert {tmp_path}/mine.pem"


# --- what fits ----------------------------------------------------------------------------


@pytest.fixture
def candidates(cli: ClientProgram) -> Callable[..., list[str]]:
    """What a script gets for these words, of which the last is being typed."""

    def ask(*words: str) -> list[str]:
        stdin = "".join(f"{word}\n" for word in words).encode()
        lines = cli.read("completion", "bash", "--candidates", stdin=stdin).splitlines()
        return [line.partition("\t")[0] for line in lines]

    return ask


def test_every_subcommand_and_option_is_a_candidate() -> None:
    """An option in its long form."""
    _, parsers = cli_module.make_parsers()
    found = [word for word, _ in completion._candidates([], "")]
    assert found == [*parsers, "--help", "--version"]
    for name, parser in parsers.items():
        options = [each.option_strings[-1] for each in parser._actions if each.option_strings]
        assert [word for word, _ in completion._candidates([name], "-")] == options


def test_jobs_are_those_that_the_subcommand_can_be_about(
    candidates: Callable[..., list[str]], connect: Callable[..., Client]
) -> None:
    """Only a running job can be stopped, and only a finished one removed."""
    client = connect()
    ended, running = run_job(client), client.start(*FOREVER)
    both = {ended, running}
    assert both & set(candidates("stop", "-j", "")) == {running}
    assert both & set(candidates("remove", "-j", "")) == {ended}
    assert both & set(candidates("status", "-j", ended, "")) == both
    assert candidates("status", "-j", "")[0] == running
    client.stop(running)


def test_job_is_a_candidate_by_its_name_too(
    candidates: Callable[..., list[str]], connect: Callable[..., Client]
) -> None:
    """As everywhere, the name stands for the job."""
    client = connect()
    name = f"night-{uuid.uuid4()}"
    job_id = client.start(*FOREVER, name=name)
    assert candidates("stop", name[:20]) == [name]
    assert candidates("stop", job_id[:20]) == [job_id]
    client.stop(job_id)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["signal", "-s", "HU"], ["HUP"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["list", "--profile", ""], ["home", "work"]),
        (["start", "ls", "--me"], []),
        (["start", "--", "--me"], []),
        (["start", "--memory", "1G", "--pid"], ["--pids"]),
        (["nonsense", ""], []),
        (["list", "--profile", "nonsense", "-j", ""], []),
    ],
)
def test_values_of_options_are_candidates(
    candidates: Callable[..., list[str]], tmp_path: Path, words: list[str], expected: list[str]
) -> None:
    """The job's own words are not the client's. A profile that no shell would quote is left out."""
    path = tmp_path / "config" / "job-worker" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text("[work]\n[home]\n['$(reboot)']\n")
    assert candidates(*words) == expected


def test_no_candidates_when_the_server_does_not_answer(cli: ClientProgram) -> None:
    """The client gives up after a while, so that the shell does not hang."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cli.environment["JOBWORKER_SERVER"] = f"127.0.0.1:{listener.getsockname()[1]}"
        status, stdout, stderr = cli.run(
            "completion", "bash", "--candidates", stdin=b"stop\n-j\n\n"
        )
    assert (status, stdout, stderr) == (-signal.SIGALRM, b"", "")


def test_no_candidates_without_a_login(stranger: ClientProgram) -> None:
    """Nor an error, which would stand in the middle of the line."""
    assert stranger.read("completion", "zsh", "--candidates", stdin=b"stop\n-j\n\n") == ""
