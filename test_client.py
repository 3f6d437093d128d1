"""Tests of the client: the command line, mostly as a program, and the class."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import client as client_module
import workerservice_pb2 as worker_pb
from client import Client, ClientError, main
from conftest import GUARD_S, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import ServerProgram
    from server import Server

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]

_HERE = Path(__file__).resolve().parent
_ABSENT = "0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98"
_SUBCOMMANDS = ["list", "login", "start", "status", "stop", "stream"]
_SILENT = ("sh", "-c", "echo ready; exec sleep infinity")


class _Program:
    """`client.py` as a program. Attribute: `environment`, to be changed at will."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def start(
        self,
        *arguments: str,
        stdin: int = subprocess.DEVNULL,
        stderr: int = subprocess.PIPE,
        start_new_session: bool = False,
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(_HERE / "client.py"), *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=self.environment,
            start_new_session=start_new_session,
        )

    def run(self, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
        """Return exit status, stdout and stderr."""
        with self.start(*arguments, stdin=subprocess.PIPE) as process:
            stdout, stderr = process.communicate(stdin, timeout=GUARD_S)
        return process.returncode, stdout, stderr.decode()

    def read(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run what is to succeed and say nothing on stderr; return stdout."""
        status, stdout, stderr = self.run(*arguments, stdin=stdin)
        assert (status, stderr) == (0, "")
        return stdout.decode()

    def fail(self, *arguments: str) -> str:
        """Run what is to fail with 1, no output and one line; return the line."""
        status, stdout, stderr = self.run(*arguments)
        assert (status, stdout) == (1, b""), stderr
        assert re.fullmatch(r"client: [^\n]+\n", stderr), stderr
        return stderr


@pytest.fixture
def stranger(program: ServerProgram, certs: Path, tmp_path: Path) -> _Program:
    """A client that is not logged in."""
    return _Program(
        clean_environment()
        | {"JOBWORKER_SERVER": program.address, "JOBWORKER_CERTS": str(certs)}
        | {"XDG_STATE_HOME": str(tmp_path / "xdg")}
    )


@pytest.fixture
def cli(stranger: _Program, tokens: dict[str, str]) -> _Program:
    """A client with the token of `user` in its environment."""
    stranger.environment["JOBWORKER_TOKEN"] = tokens["user"]
    return stranger


@pytest.fixture
def run(
    program: ServerProgram,
    certs: Path,
    tokens: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> Callable[..., str]:
    """Run a subcommand as `user` in this process, which is faster; return its output."""
    monkeypatch.setenv("JOBWORKER_TOKEN", tokens["user"])

    def run(subcommand: str, *arguments: str) -> str:
        options = ["--server", program.address, "--certs", str(certs)]
        status = main([subcommand, *options, *arguments])
        captured = capsysbinary.readouterr()
        assert (status, captured.err) == (0, b"")
        return captured.out.decode()

    return run


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Programs started inherit no ignored SIGINT, as they would from a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- login ------------------------------------------------------------------------------


def test_login_prints_the_token_and_keeps_it_privately(
    stranger: _Program, program: ServerProgram, tmp_path: Path
) -> None:
    """After it the other subcommands need no token; the file is 0600, named after the server."""
    token = stranger.read("login", "-u", "user", "-p", "user")
    assert token.count(".") == 2
    kept = tmp_path / "xdg" / "job-worker" / f"token-{program.address}"
    assert kept.read_text() == token.rstrip("\n")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert list(kept.parent.iterdir()) == [kept]
    assert stranger.read("start", "true")


@pytest.mark.parametrize(
    ("arguments", "stdin"), [([], b"user\nmore\n"), (["-p", "-"], b"user"), ([], b"user\n")]
)
def test_login_takes_the_password_from_stdin(
    stranger: _Program, arguments: list[str], stdin: bytes
) -> None:
    """Its first line, when it is not a terminal or `-p -` says so; nothing is asked."""
    assert stranger.read("login", "-u", "user", *arguments, stdin=stdin).count(".") == 2


def test_login_at_a_terminal_asks_without_echo(stranger: _Program) -> None:
    """The question goes to the terminal, the token alone to stdout, the password nowhere."""
    ours, terminal = pty.openpty()
    with (
        open(ours, "r+b", buffering=0) as keyboard,
        stranger.start(
            *("login", "-u", "user"), stdin=terminal, stderr=terminal, start_new_session=True
        ) as process,
    ):
        os.close(terminal)
        shown = b""
        while not shown.endswith(b"Password for user: "):
            assert select.select([keyboard], [], [], GUARD_S)[0], shown
            shown += keyboard.read(1) or b""
        keyboard.write(b"user\n")
        stdout, _ = process.communicate(timeout=GUARD_S)
        with contextlib.suppress(OSError):  # EIO: the other side is gone
            while more := keyboard.read(1000):
                shown += more
    assert (process.returncode, stdout.count(b".")) == (0, 2)
    assert shown.split() == [b"Password", b"for", b"user:"]


def test_failed_login_keeps_nothing(stranger: _Program, tmp_path: Path) -> None:
    """One line, and no file."""
    assert stranger.fail("login", "-u", "user", "-p", "hunter2") == (
        "client: wrong user name or password\n"
    )
    assert not (tmp_path / "xdg").exists()


def test_login_that_cannot_keep_the_token_still_prints_it(
    stranger: _Program, tmp_path: Path
) -> None:
    """The token is what was asked for; one line says that it was not kept."""
    (tmp_path / "file").touch()
    stranger.environment["XDG_STATE_HOME"] = str(tmp_path / "file")
    status, stdout, stderr = stranger.run("login", "-u", "user", "-p", "user")
    assert (status, stdout.count(b".")) == (0, 2)
    assert re.fullmatch(r"client: the token was not kept [^\n]+; use -t\n", stderr)


def test_token_is_taken_from_the_option_then_the_environment_then_the_file(
    stranger: _Program, tokens: dict[str, str], program: ServerProgram, tmp_path: Path
) -> None:
    """In this order, whatever the later ones are."""

    def owner(*arguments: str) -> str:
        job_id = stranger.read("start", *arguments, "-c", "true").strip()
        return str(json.loads(stranger.read("status", *arguments, "-j", job_id, "--json"))["owner"])

    kept = tmp_path / "xdg" / "job-worker" / f"token-{program.address}"
    kept.parent.mkdir(parents=True)
    kept.write_text(tokens["user"])
    assert owner() == "user"
    stranger.environment["JOBWORKER_TOKEN"] = tokens["admin"]
    assert owner() == "admin"
    assert owner("-t", tokens["user"]) == "user"
    kept.unlink()
    assert owner("--token", tokens["user"]) == "user"


def test_token_of_one_server_is_not_sent_to_another(
    stranger: _Program, serve: Serve, tokens: dict[str, str], tmp_path: Path, program: ServerProgram
) -> None:
    """Each server has a file of its own."""
    directory = tmp_path / "xdg" / "job-worker"
    directory.mkdir(parents=True)
    (directory / f"token-{program.address}").write_text(tokens["user"])
    other = serve().address
    assert stranger.fail("list", "--server", other) == (
        f"client: not logged in to {other}; run: client login -u USER\n"
    )
    assert stranger.read("list")


@pytest.mark.parametrize("server", ["../../escape:1", "a/b:1", "[::1]:50051", "host:1"])
def test_kept_token_is_a_file_in_the_state_directory_whatever_the_server_is_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str
) -> None:
    """No name of a server leads out of it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert client_module._token_path(server).parent == tmp_path / "job-worker"


# --- start ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "argv"),
    [
        (["-c", "echo"], ["echo"]),
        (["-c", "echo", "-args"], ["echo"]),
        (["-c", "echo", "-args", "a", "b c", ""], ["echo", "a", "b c", ""]),
        (["-c", "echo", "-args", "-n", "--x", "-t", "x"], ["echo", "-n", "--x", "-t", "x"]),
        (["-c", "echo", "-args", "--", "-args", "-c"], ["echo", "--", "-args", "-c"]),
        (["-c", "echo", "-args", "-h", "--help"], ["echo", "-h", "--help"]),
        (["--command=echo", "--args", "a"], ["echo", "a"]),
        (["--", "echo"], ["echo"]),
        (["--", "echo", "-t", "--", "-args", "x"], ["echo", "-t", "--", "-args", "x"]),
        (["--", "echo", "--help"], ["echo", "--help"]),
        (["echo", "-c", "x", "--json"], ["echo", "-c", "x", "--json"]),
        (["tail", "-f", "/dev/null"], ["tail", "-f", "/dev/null"]),
        (["sh", "-c", "echo $0; :", "*"], ["sh", "-c", "echo $0; :", "*"]),
    ],
    ids=" ".join,
)
def test_start_executes_exactly_the_words_given(
    run: Callable[..., str], connect: Connect, arguments: list[str], argv: list[str]
) -> None:
    """In each of the three forms; the job's dashes are the job's. It prints the ID alone."""
    printed = run("start", *arguments)
    assert re.fullmatch(r"[0-9a-f-]{36}\n", printed)
    job = connect().stop(printed.strip())
    assert [job.command, *job.args] == argv


def test_start_takes_its_options_before_the_command(
    stranger: _Program, tokens: dict[str, str], connect: Connect
) -> None:
    """Also those with values, in front of a bare command."""
    printed = stranger.read("start", "-t", tokens["user"], "tail", "-f", "/dev/null")
    assert list(connect().stop(printed.strip()).args) == ["-f", "/dev/null"]


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ([], {}),
        (["--cpus", "0.5"], {"cpu_cores": 0.5}),
        (["--cpus=2"], {"cpu_cores": 2.0}),
        (["--memory", "256M"], {"memory_bytes": 256 << 20}),
        (["--memory", "123456789"], {"memory_bytes": 123456789}),
        (["--io-read", "10M"], {"io_read_bps": 10 << 20}),
        (["--io-write", "1.5 KiB"], {"io_write_bps": 1536}),
        (["--io-read-ops", "100"], {"io_read_iops": 100}),
        (["--io-write-ops", "200"], {"io_write_iops": 200}),
        (["--pids", "64"], {"pids": 64}),
        (
            ["--cpus", "1", "--memory=1G", "--io-read", "1K", "--io-write", "2K", "--pids", "5"],
            {"cpu_cores": 1.0, "memory_bytes": 1 << 30, "pids": 5}
            | {"io_read_bps": 1024, "io_write_bps": 2048},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("words", [["-c", "echo", "-args", "--pids", "7"], ["echo", "--pids", "7"]])
def test_start_asks_for_the_limits_given_and_no_others(  # noqa: PLR0913
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokens: dict[str, str],
    certs: Path,
    options: list[str],
    limits: dict[str, float],
    words: list[str],
) -> None:
    """In their units; an option behind the command is the job's."""
    sent: list[Any] = []

    def call(_: Client, __: object, request: Any, **___: object) -> worker_pb.StartJobResponse:
        sent.append(request)
        return worker_pb.StartJobResponse(job_id=_ABSENT)

    monkeypatch.setattr(Client, "_call", call)
    assert main(["start", "--certs", str(certs), "-t", tokens["user"], *options, *words]) == 0
    assert capsys.readouterr().out == f"{_ABSENT}\n"
    (request,) = sent
    assert [request.command, *request.args] == ["echo", "--pids", "7"]
    assert {field.name: value for field, value in request.limits.ListFields()} == limits


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--memory", "9G"], ["memory_bytes", str(9 << 30), str(8 << 30)]),
        (["--cpus", "64"], ["cpu_cores", "64", "8"]),
        (["--cpus", "nan"], ["cpu_cores", "nan", "0.01"]),
        (["--cpus", "-1"], ["cpu_cores", "-1", "0.01"]),
        (["--pids", "0"], ["pids", "0", "at least 1"]),
    ],
)
def test_limit_that_the_server_refuses_is_told(
    cli: _Program, tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    """Its one line names what was asked for and what is allowed; the command has not run."""
    told = cli.fail("start", *options, "touch", str(tmp_path / "marker"))
    assert [part for part in parts if part not in told] == []
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["start"],
        ["start", "--"],
        ["start", "-c"],
        ["start", "-args", "x"],
        ["start", "-c", "x", "--", "y"],
        ["start", "-c", "x", "y"],
        ["start", "--bogus", "x"],
        ["start", "--comm", "x"],
        ["start", "--cpu", "1", "x"],
        ["start", "--cpus", "half", "x"],
        ["start", "--cpus", "x"],
        ["start", "--memory", "1X", "x"],
        ["start", "--memory", "-1", "x"],
        ["start", "--io-read", "1M/s", "x"],
        ["start", "--io-write", "", "x"],
        ["start", "--io-read-ops", "1K", "x"],
        ["start", "--io-write-ops", "-1", "x"],
        ["start", "--pids", "1.5", "x"],
        ["start", "--pids", str(2**63), "x"],
        ["login"],
        ["login", "-u"],
        ["stop"],
        ["status", "--json"],
        ["status", "-j"],
        ["stream"],
        ["stream", "-j", "x", "--offset", "-1"],
        ["stream", "-j", "x", "--offset", "x"],
        ["stream", "-j", "x", "--offset", str(2**64)],
        ["list", "extra"],
        ["list", "--js"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """The line says what is wrong and where to read on."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert re.fullmatch(r"client[^\n]*: [^\n]+; see client[^\n]* --help\n", captured.err)


# --- stop, status, list -----------------------------------------------------------------


def test_stop_kills_the_job_and_says_how_it_ended(run: Callable[..., str]) -> None:
    """Again and again the same; a job that ended by itself is left as it is."""
    job_id = run("start", *_SILENT).strip()
    assert run("stop", "-j", job_id) == "STOPPED (stopped by owner)\n"
    assert run("stop", "-j", job_id) == "STOPPED (stopped by owner)\n"
    job_id = run("start", "sh", "-c", "exit 3").strip()
    run("stream", "-j", job_id)
    assert run("stop", "-j", job_id) == "FINISHED (exited with code 3)\n"


def test_json_status_has_every_field_of_a_running_job(
    run: Callable[..., str], connect: Connect
) -> None:
    """Proto names in their order, enums by name, and null for what is absent."""
    job_id = run("start", *_SILENT).strip()
    chunks = connect().stream(job_id)
    next(chunks)
    fields = json.loads(run("status", "-j", job_id, "--json"))
    assert list(fields) == [field.name for field in worker_pb.Job.DESCRIPTOR.fields]
    assert list(fields.pop("limits")) == [f.name for f in worker_pb.Limits.DESCRIPTOR.fields]
    fields.pop("usage")  # null where nothing accounts it while the job runs
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", fields.pop("started_at"))
    assert fields == {
        "job_id": job_id,
        "owner": "user",
        "command": "sh",
        "args": ["-c", "echo ready; exec sleep infinity"],
        "status": "RUNNING",
        "end_reason": None,
        "exit_code": None,
        "signal": None,
        "ended_at": None,
        "output_bytes": 6,
        "subscribers": ["user"],
    }
    run("stop", "-j", job_id)
    fields = json.loads(run("status", "-j", job_id, "--json"))
    assert (fields["status"], fields["end_reason"]) == ("STOPPED", "STOPPED_BY_OWNER")
    assert (fields["exit_code"], fields["signal"]) == (None, 9)
    assert fields["ended_at"] > fields["started_at"]
    usage = fields["usage"]
    assert list(usage) == [field.name for field in worker_pb.Usage.DESCRIPTOR.fields]
    assert usage["source"] in {"CGROUP", "RUSAGE"}
    assert isinstance(usage["cpu_user_s"], float)
    assert (usage["memory_bytes"], usage["pids"]) == (None, None)


def test_json_shows_zero_and_empty_as_such_and_limits_by_value() -> None:
    """Zero is not absent: an exit code, a size, no arguments, no swap."""
    job = worker_pb.Job(exit_code=0, limits=worker_pb.Limits(swap_bytes=0, cpu_cores=0.5))
    fields = client_module._to_dict(job)
    assert (fields["exit_code"], fields["signal"]) == (0, None)
    assert (fields["output_bytes"], fields["args"], fields["started_at"]) == (0, [], None)
    assert fields["limits"] == dict.fromkeys(fields["limits"]) | {"swap_bytes": 0, "cpu_cores": 0.5}


def test_json_list_holds_what_status_shows(run: Callable[..., str]) -> None:
    """One array, of one's own jobs, in the order of their start."""
    ids = [run("start", "true").strip() for _ in range(2)]
    for job_id in ids:
        run("stream", "-j", job_id)
    jobs = json.loads(run("list", "--json"))
    assert [job["job_id"] for job in jobs][-2:] == ids
    assert jobs[-1] == json.loads(run("status", "-j", ids[1], "--json"))


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("exit 7", "FINISHED (exited with code 7)"),
        ("kill -TERM $$", "FINISHED (killed by SIGTERM)"),
        ("kill -40 $$", "FINISHED (killed by signal 40)"),
    ],
)
def test_status_tells_a_human_how_the_job_ended(
    run: Callable[..., str], script: str, end: str
) -> None:
    """A line for each thing worth knowing."""
    job_id = run("start", "sh", "-c", f"printf four; {script}").strip()
    run("stream", "-j", job_id)
    shown = dict(line.split(maxsplit=1) for line in run("status", "-j", job_id).splitlines())
    assert list(shown) == [
        *("job", "owner", "command", "status", "started", "ended"),
        *("output", "subscribers", "limits", "used"),
    ]
    assert (shown["job"], shown["owner"], shown["status"]) == (job_id, "user", end)
    assert shown["command"] == f"sh -c 'printf four; {script}'"
    assert (shown["output"], shown["subscribers"]) == ("4 bytes", "-")
    assert all(re.fullmatch(r"[-\d]+ [:\d]+ UTC", shown[name]) for name in ("started", "ended"))


def _shown(job: worker_pb.Job, name: str) -> str:
    """What `status` shows on the line `name`."""
    lines = dict(line.split(maxsplit=1) for line in client_module._describe(job).splitlines()[6:])
    return lines[name]


def test_limits_are_shown_in_units() -> None:
    """As a human says them; what is not in force is not shown."""
    limits = worker_pb.Limits(
        cpu_cores=1.5, memory_bytes=512 << 20, swap_bytes=0, io_read_bps=50 << 20, pids=512
    )
    assert _shown(worker_pb.Job(limits=limits), "limits") == (
        "1.5 CPU cores, 512 MiB memory, 0 bytes swap, 50 MiB/s read, 512 processes"
    )
    limits = worker_pb.Limits(io_write_bps=3 << 19, io_read_iops=100, io_write_iops=9)
    assert _shown(worker_pb.Job(limits=limits), "limits") == (
        "1.5 MiB/s written, 100 reads/s, 9 writes/s"
    )
    assert _shown(worker_pb.Job(), "limits") == "none in force"


def test_usage_is_shown_in_units() -> None:
    """While the job runs and afterwards; what is not accounted is not shown."""
    usage = worker_pb.Usage(
        source=worker_pb.CGROUP,
        cpu_user_s=1.23456,
        cpu_system_s=0.0,
        cpu_throttled_s=12,
        memory_bytes=0,
        memory_peak_bytes=3 << 19,
        io_read_bytes=5 << 20,
        io_written_bytes=0,
        io_reads=7,
        io_writes=0,
        pids=3,
        pids_peak=8,
        oom_kills=0,
    )
    assert _shown(worker_pb.Job(usage=usage), "used") == (
        "1.23 s CPU user, 0 s system, throttled 12 s, 0 bytes memory, 1.5 MiB memory at most, "
        "5 MiB read in 7 operations, 0 bytes written in 0, "
        "3 processes, 8 processes at most, 0 OOM kills"
    )
    for name in ("cpu_throttled_s", "memory_bytes", "io_read_bytes", "io_written_bytes", "pids"):
        usage.ClearField(name)
    assert _shown(worker_pb.Job(usage=usage), "used") == (
        "1.23 s CPU user, 0 s system, 1.5 MiB memory at most, 8 processes at most, 0 OOM kills"
    )
    usage = worker_pb.Usage(
        source=worker_pb.RUSAGE, cpu_user_s=0.5, cpu_system_s=0.25, memory_peak_bytes=20 << 20
    )
    assert _shown(worker_pb.Job(usage=usage), "used") == (
        "0.5 s CPU user, 0.25 s system, 20 MiB memory at most (leader and awaited children only)"
    )
    assert _shown(worker_pb.Job(), "used") == "-"


def test_json_shows_usage_exactly() -> None:
    """Numbers as they are, the source by its name, null for what is not accounted."""
    usage = worker_pb.Usage(
        source=worker_pb.RUSAGE, cpu_user_s=1.234567, memory_peak_bytes=(1 << 53) + 1, oom_kills=0
    )
    shown = json.loads(json.dumps(client_module._to_dict(worker_pb.Job(usage=usage))))["usage"]
    told = {"source": "RUSAGE", "cpu_user_s": 1.234567, "memory_peak_bytes": (1 << 53) + 1}
    assert shown == dict.fromkeys(shown) | told | {"oom_kills": 0}
    assert client_module._to_dict(worker_pb.Job())["usage"] is None


def test_others_words_do_not_steer_the_terminal(cli: _Program) -> None:
    """Escape sequences and line ends in a command are shown, in list, status and errors."""
    nasty = "\x1b[31mred\x07\r\n\x9b2Jü\u202e"
    job_id = cli.read("start", "true", nasty).strip()
    for shown in (cli.read("list"), cli.read("status", "-j", job_id), cli.fail("start", nasty)):
        assert "red" in shown
        assert "ü" in shown
        assert all(c.isprintable() or c == "\n" for c in shown), ascii(shown)


def test_list_is_a_table_with_a_line_for_each_job(run: Callable[..., str]) -> None:
    """A heading, and columns that line up."""
    job_id = run("start", "echo", "a b").strip()
    run("stream", "-j", job_id)
    heading, *rows = run("list").splitlines()
    assert heading.split("  ")[0].strip() == "JOB ID"
    row = next(row for row in rows if row.startswith(job_id))
    assert row[heading.index("OWNER") :].startswith("user ")
    assert row[heading.index("STATUS") :].startswith("FINISHED (exited with code 0) ")
    assert row[heading.index("COMMAND") :] == "echo 'a b'"


# --- stream -----------------------------------------------------------------------------


def test_stream_writes_the_bytes_as_they_are(
    cli: _Program, connect: Connect, tmp_path: Path
) -> None:
    """Not a byte is changed, added or left out; also from an offset, and past the end."""
    script = 'head -c 1000000 /dev/urandom >"$0"; cat "$0"'
    job_id = connect().start("sh", ["-c", script, str(tmp_path / "copy")])
    assert cli.run("stream", "-j", job_id) == (0, (tmp_path / "copy").read_bytes(), "")
    rest = cli.run("stream", "-j", job_id, "--offset", "999000")
    assert rest == (0, (tmp_path / "copy").read_bytes()[999_000:], "")
    assert "offset 1000001 is past the end" in cli.fail(
        "stream", "-j", job_id, "--offset", "1000001"
    )


def test_stream_writes_what_comes_when_it_comes(
    cli: _Program, connect: Connect, tmp_path: Path
) -> None:
    """Half a line of a job that is blocked reaches whoever reads our stdout."""
    os.mkfifo(tmp_path / "go")
    job_id = connect().start("sh", ["-c", 'printf half; read x <"$0"', str(tmp_path / "go")])
    with cli.start("stream", "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.read(4) == b"half"
        (tmp_path / "go").write_text("on\n")
        assert process.communicate(timeout=GUARD_S) == (b"", b"")
    assert process.returncode == 0


def test_stream_into_a_pipe_that_closes_ends_quietly(cli: _Program, connect: Connect) -> None:
    """As in `| head -c 5`: no traceback, nothing on stderr."""
    job_id = connect().start("yes")
    with cli.start("stream", "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.read(5) == b"y\ny\ny"
        process.stdout.close()
        assert process.wait(GUARD_S) == 128 + signal.SIGPIPE
        assert process.stderr
        assert process.stderr.read() == b""
    connect().stop(job_id)


@pytest.mark.parametrize("subcommand", ["list", "status"])
def test_other_output_into_a_closed_pipe_ends_quietly(
    cli: _Program, connect: Connect, subcommand: str
) -> None:
    """Also when what is lost is all of a short output."""
    job_id = connect().start("true")
    with cli.start(subcommand, *(["-j", job_id] if subcommand == "status" else [])) as process:
        assert process.stdout
        process.stdout.close()
        assert process.wait(GUARD_S) == 128 + signal.SIGPIPE
        assert process.stderr
        assert process.stderr.read() == b""


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_stream_quietly(cli: _Program, connect: Connect) -> None:
    """Exit status 130; the job runs on."""
    job_id = connect().start(_SILENT[0], _SILENT[1:])
    with cli.start("stream", "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=GUARD_S) == (b"", b"")
    assert process.returncode == 130
    assert connect().status(job_id).status == worker_pb.RUNNING
    connect().stop(job_id)


def test_broken_stream_tells_where_to_go_on(
    cli: _Program, connect: Connect, start_server: Callable[..., ServerProgram]
) -> None:
    """When the server dies, one line names the offset."""
    program = start_server()
    job_id = connect("user", program.address).start(_SILENT[0], _SILENT[1:])
    with cli.start("stream", "--server", program.address, "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        program.end(signal.SIGKILL)
        _, stderr = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1
    assert re.fullmatch(rb"client: [^\n]+ --offset 6\n", stderr)


# --- errors -----------------------------------------------------------------------------


@contextlib.contextmanager
def _listener(serve_one: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something else than our server; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        serve_one(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(GUARD_S)


def test_no_server_is_told(cli: _Program) -> None:
    """With its address, and the question that leads on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert cli.fail("list", "--server", address) == (
        f"client: no server listens on {address}; is it running, and is it there?\n"
    )


def test_server_that_does_not_speak_tls_is_told(cli: _Program) -> None:
    """A web server, say."""
    with _listener(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address:
        assert f"what listens on {address} does not speak TLS" in cli.fail(
            "list", "--server", address
        )


def test_server_that_only_closes_is_told(cli: _Program) -> None:
    """It hangs up before a word."""
    with _listener(lambda _: None) as address:
        assert address in cli.fail("list", "--server", address)


def test_server_of_tls_1_2_is_refused(cli: _Program, certs: Path) -> None:
    """Even when its certificate is the right one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server.pem", certs / "server-key.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    handshakes = []

    def serve_one(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as tls:
            handshakes.append(tls.version())

    with _listener(serve_one) as address:
        cli.fail("list", "--server", address)
    assert handshakes == []


def test_unknown_host_is_told(cli: _Program) -> None:
    """Not as a server that is down."""
    server = "no..such..host:50051"  # which no resolver has to be asked about
    assert cli.fail("list", "--server", server) == (
        f"client: the host name in {server} cannot be resolved\n"
    )


def test_server_of_another_ca_is_told(cli: _Program, foreign_certs: Path) -> None:
    """What may be wrong, and which options it is about."""
    line = cli.fail("list", "--ca", str(foreign_certs / "server-ca.pem"))
    assert "was not signed by your server CA" in line
    assert "--ca" in line


def test_refused_client_certificate_is_told(cli: _Program, foreign_certs: Path) -> None:
    """Under TLS 1.3 the server only closes; the line says what that can mean."""
    directory = foreign_certs
    line = cli.fail(
        *(
            "list",
            "--cert",
            str(directory / "client.pem"),
            "--key",
            str(directory / "client-key.pem"),
        )
    )
    assert "does not accept your client certificate" in line


def test_not_logged_in_is_told(stranger: _Program, program: ServerProgram) -> None:
    """With the command that logs in."""
    for arguments in (["list"], ["start", "true"], ["stop", "-j", _ABSENT]):
        assert stranger.fail(*arguments) == (
            f"client: not logged in to {program.address}; run: client login -u USER\n"
        )


@pytest.mark.parametrize("name", ["client.pem", "client-key.pem", "server-ca.pem"])
def test_missing_certificate_is_told(cli: _Program, certs: Path, tmp_path: Path, name: str) -> None:
    """With its path and the command that makes it."""
    directory = shutil.copytree(certs, tmp_path / "certs")
    (directory / name).unlink()
    line = cli.fail("list", "--certs", str(directory))
    assert f"no certificate or key {directory / name}; make them with `make certs`" in line


@pytest.mark.parametrize("option", ["--cert", "--key", "--ca"])
def test_unusable_certificate_is_an_error_of_one_line(
    cli: _Program, tmp_path: Path, option: str
) -> None:
    """A file that is no certificate, and one that is a directory."""
    (tmp_path / "garbage").write_text("garbage")
    cli.fail("list", option, str(tmp_path / "garbage"))
    assert f"cannot read {tmp_path}: Is a directory" in cli.fail("list", option, str(tmp_path))


@pytest.mark.parametrize("token", ["garbage", "a.b.c", "tökén", "a\nb", "Bearer x", "x" * 5000])
def test_bad_token_is_told(cli: _Program, token: str) -> None:
    """With what to do about it."""
    assert "log in again" in cli.fail("list", "-t", token)


@pytest.mark.parametrize("subcommand", ["status", "stop", "stream"])
def test_unknown_job_is_told(cli: _Program, subcommand: str) -> None:
    """An ID that no job has, and a text that is no ID."""
    assert cli.fail(subcommand, "-j", _ABSENT) == f"client: no job {_ABSENT}\n"
    assert cli.fail(subcommand, "-j", "x").startswith("client: not a job ID: 'x'; it looks like")


@pytest.mark.parametrize(
    ("command", "problem"),
    [("no-such-command", "command not found"), ("/usr", "it is a directory"), ("", "is empty")],
)
def test_command_that_cannot_be_executed_is_told(cli: _Program, command: str, problem: str) -> None:
    """By name and problem."""
    line = cli.fail("start", "-c", command)
    assert f"cannot execute {command!r}" in line
    assert problem in line


def test_argument_that_is_not_utf_8_is_told(cli: _Program) -> None:
    """The protocol cannot carry it."""
    line = cli.fail("start", "echo", os.fsdecode(b"\xff"))
    assert "not valid UTF-8" in line


# --- help -------------------------------------------------------------------------------


def _parsers() -> dict[str, Any]:
    parser, _ = client_module._parsers()
    return dict(next(a for a in parser._actions if a.dest == "subcommand").choices or {})


@pytest.mark.parametrize("subcommand", _SUBCOMMANDS)
def test_help_of_every_subcommand_names_all_its_options(
    capsys: pytest.CaptureFixture[str], subcommand: str
) -> None:
    """And explains them."""
    with pytest.raises(SystemExit) as caught:
        main([subcommand, "--help"])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.err) == (0, "")
    for action in _parsers()[subcommand]._actions:
        assert action.help
        for option in action.option_strings:
            assert re.search(rf"(?<![\w-]){option}\b", captured.out), option


def test_help_names_every_subcommand_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """The six of the issue and no others."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert sorted(_parsers()) == _SUBCOMMANDS
    for word in (*_SUBCOMMANDS, "JOBWORKER_SERVER", "JOBWORKER_CERTS", "JOBWORKER_TOKEN"):
        assert word in shown


@pytest.mark.parametrize("arguments", [["--help"], ["start", "--help"], ["start"], ["list"]])
def test_what_calls_nothing_does_not_import_grpc(
    stranger: _Program, tmp_path: Path, arguments: list[str]
) -> None:
    """Help and mistakes answer at once, also where grpc is not installed."""
    stranger.environment["JOBWORKER_CERTS"] = str(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", _HERE / "client.py", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=stranger.environment,
        text=True,
    ) as process:
        _, stderr = process.communicate(timeout=GUARD_S)
    modules = {line.rpartition("|")[2].strip() for line in stderr.splitlines()}
    assert "argparse" in modules
    assert not {"grpc", "google.protobuf", "workerservice_pb2"} & modules


@pytest.mark.parametrize("launcher", ["client", "server"])
def test_launcher_without_its_environment_says_what_to_run(tmp_path: Path, launcher: str) -> None:
    """In a clone that is not set up yet; from wherever and through a link it is called."""
    shutil.copy(_HERE / launcher, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / launcher)
    result = subprocess.run(
        [tmp_path / "link", "--help"], capture_output=True, text=True, cwd="/", check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"{launcher}: run 'make -C {tmp_path} setup' first\n"


# --- the class --------------------------------------------------------------------------


def test_client_does_it_all_for_another_program(connect: Connect) -> None:
    """Log in, start, stream, status, stop and list, with plain values and the messages."""
    client = connect("")
    token, _ = client.login("user", "user")
    assert client.token == token
    job_id = client.start("echo", ["a", "b"])
    assert b"".join(client.stream(job_id)) == b"a b\n"
    assert b"".join(client.stream(job_id, offset=2)) == b"b\n"
    assert client.status(job_id).exit_code == 0
    assert client.stop(job_id).status == worker_pb.FINISHED
    assert job_id in [job.job_id for job in client.list()]


def test_client_error_tells_the_code(connect: Connect) -> None:
    """By the name of the gRPC status; without a call it is empty."""
    client = connect()
    calls: dict[str, Callable[[], object]] = {
        "NOT_FOUND": lambda: client.status(_ABSENT),
        "INVALID_ARGUMENT": lambda: client.stop("x"),
        "UNAUTHENTICATED": lambda: connect("").list(),
        "UNAVAILABLE": lambda: connect("user", "no..such..host:1").list(),
        "": lambda: connect("user", certs="/nowhere"),
    }
    for code, call in calls.items():
        with pytest.raises(ClientError) as caught:
            call()
        assert caught.value.code == code


def test_client_may_be_used_from_several_threads(connect: Connect) -> None:
    """Each gets the answers to its own calls."""
    client = connect()

    def echo(number: int) -> bool:
        job_id = client.start("echo", [str(number)])
        return b"".join(client.stream(job_id)) == f"{number}\n".encode()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(echo, range(24)))


def test_close_ends_open_streams_and_may_be_repeated(connect: Connect) -> None:
    """A thread that waits for output is woken by an error."""
    owner, client = connect(), connect()
    job_id = owner.start(_SILENT[0], _SILENT[1:])
    chunks = client.stream(job_id)
    assert next(chunks) == b"ready\n"
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, chunks)
        client.close()
        client.close()
        with pytest.raises(ClientError) as caught:
            rest.result(GUARD_S)
    assert caught.value.code == "CANCELLED"
    owner.stop(job_id)
