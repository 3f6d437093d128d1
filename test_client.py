"""Tests of the client: the command line, mostly as a program, and the class."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
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
import struct
import subprocess
import sys
import termios
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import authservice_pb2 as auth_pb
import cli as cli_module
import commands
import connection
import display
import workerservice_pb2 as worker_pb
from client import Client, ClientError, main
from credentials import token_path
from link import Link
from testkit import ABSENT, FOREVER, GUARD_S, clean_environment, http2_frame, make_fifo
from testkit import ClientProgram as _Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from google.protobuf.message import Message

    from server import Server
    from testkit import ServerProgram

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]
    Pretend = Callable[..., str]

_HERE = Path(__file__).resolve().parent
_SUBCOMMANDS = [
    *("list", "login", "logout", "remove", "run", "send", "signal", "start"),
    *("status", "stop", "stream"),
    *("wait", "whoami"),
]
_WITHOUT_A_SERVER = ["completion", "import"]
_SILENT = ("sh", "-c", "echo ready; exec sleep infinity")


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


class _Pretended(grpc.GenericRpcHandler):
    """Answers each method with all messages of a function, even if the method returns only one."""

    def __init__(self, methods: dict[str, Callable[[Any], Iterable[Message]]]) -> None:
        self._methods = methods

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = self._methods[handler_call_details.method.rpartition("/")[2]]
        return grpc.unary_stream_rpc_method_handler(
            lambda _, context: iter(method(context)),
            response_serializer=lambda message: message.SerializeToString(),
        )


@pytest.fixture
def pretend(certs: Path) -> Iterator[Pretend]:
    """Run a server whose answers a test chooses; return its address."""
    key, cert, ca = (
        (certs / name).read_bytes() for name in ("server-key.pem", "server.pem", "client-ca.pem")
    )
    with contextlib.ExitStack() as servers:

        def pretend(**methods: Callable[[Any], Iterable[Message]]) -> str:
            server = grpc.server(ThreadPoolExecutor(2), handlers=[_Pretended(methods)])
            credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
            port = server.add_secure_port("127.0.0.1:0", credentials)
            server.start()
            servers.callback(lambda: server.stop(None).wait())
            return f"127.0.0.1:{port}"

        yield pretend


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background job ignores SIGINT; programs of the test do not inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- login ------------------------------------------------------------------------------


def test_login_prints_the_token_and_keeps_it_privately(
    stranger: _Program, program: ServerProgram, tmp_path: Path
) -> None:
    """Other subcommands then need no token. The file has mode 0600 and the server's name."""
    token = stranger.read("login", "-u", "user", "-p", "user")
    assert token.count(".") == 2
    kept = tmp_path / "xdg" / "job-worker" / f"token-{program.address}"
    assert kept.read_text() == token.rstrip("\n")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert list(kept.parent.iterdir()) == [kept]
    assert stranger.read("start", "true")


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        ([], b"user\nmore\n"),
        (["-p", "-"], b"user"),
        ([], b"user\r\n"),
        ([], b"\xef\xbb\xbfuser\r\n"),
    ],
)
def test_login_takes_the_password_from_stdin(
    stranger: _Program, arguments: list[str], stdin: bytes
) -> None:
    """Without a terminal, or with `-p -`, it reads a line and drops a BOM, and its LF or CR LF."""
    assert stranger.read("login", "-u", "user", *arguments, stdin=stdin).count(".") == 2


_NO_PASSWORD = (
    b"client: no password was given; type it when the client asks, give -p PASSWORD, or send it as "
    b"a line to stdin"
)


@pytest.mark.parametrize(
    ("typed", "status", "tokens", "said"),
    [(b"user\n", 0, 1, b""), (b"\x04", 1, 0, _NO_PASSWORD), (b"\n", 1, 0, _NO_PASSWORD)],
    ids=["password", "ctrl-d", "empty"],
)
def test_login_at_a_terminal_asks_without_echo(
    stranger: _Program, typed: bytes, status: int, tokens: int, said: bytes
) -> None:
    """The terminal shows the question, stdout only the token, and nothing shows the password."""
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
        keyboard.write(typed)
        stdout, _ = process.communicate(timeout=GUARD_S)
        with contextlib.suppress(OSError):  # EIO: the other side is gone
            while more := keyboard.read(1000):
                shown += more
    assert (process.returncode, stdout.count(b".")) == (status, 2 * tokens)
    assert shown.split() == [b"Password", b"for", b"user:", *said.split()]


def test_failed_login_keeps_nothing(stranger: _Program, tmp_path: Path) -> None:
    """It prints one line and makes no file."""
    assert stranger.fail("login", "-u", "user", "-p", "hunter2") == (
        "client: wrong user name or password; type them again, or ask the server's operator for a "
        "new password\n"
    )
    assert not (tmp_path / "xdg").exists()


def test_login_that_cannot_keep_the_token_still_prints_it(
    stranger: _Program, tmp_path: Path
) -> None:
    """It prints the token, and one line that says that the token was not kept."""
    (tmp_path / "file").touch()
    stranger.environment["XDG_STATE_HOME"] = str(tmp_path / "file")
    status, stdout, stderr = stranger.run("login", "-u", "user", "-p", "user")
    assert (status, stdout.count(b".")) == (0, 2)
    assert re.fullmatch(r"client: the token was not kept [^\n]+; use -t\n", stderr)


def test_token_is_taken_from_the_option_then_the_environment_then_the_file(
    stranger: _Program, tokens: dict[str, str], program: ServerProgram, tmp_path: Path
) -> None:
    """The first source that has a token counts."""

    def owner(*arguments: str) -> str:
        job_id = stranger.read("start", *arguments, "-c", "true").strip()
        return str(json.loads(stranger.read("status", *arguments, "-j", job_id, "--json"))["owner"])

    kept = tmp_path / "xdg" / "job-worker" / f"token-{program.address}"
    kept.parent.mkdir(parents=True)
    kept.write_text(tokens["user"])
    assert owner() == "user"
    stranger.environment["JOBWORKER_TOKEN"] = tokens["admin"]
    assert owner() == "admin"
    stranger.environment["JOBWORKER_TOKEN"] = tokens["admin"] + "\r"  # $(cat FILE) of Windows
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
        f"client: not logged in to {other}; run: client login --server {other} -u USER\n"
    )
    assert stranger.read("list")


@pytest.mark.parametrize("server", ["../../escape:1", "a/b:1", "[::1]:50051", "host:1"])
def test_kept_token_is_a_file_in_the_state_directory_whatever_the_server_is_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str
) -> None:
    """No server name leads to a file outside of it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    arguments = argparse.Namespace(server=server, profile="../../p")
    assert token_path(arguments).parent == tmp_path / "job-worker"


def test_login_that_yields_no_token_is_told(
    stranger: _Program, pretend: Pretend, tmp_path: Path
) -> None:
    """Text that could control the terminal, or could never be sent, is neither printed nor kept."""
    address = pretend(Login=lambda _: [auth_pb.LoginResponse(access_token="a\x1b[31m")])
    assert stranger.fail("login", "-u", "user", "-p", "x", "--server", address) == (
        f"client: {address} answered the login with something that is not a token, or does not "
        "expire on a date; is it a job-worker server?\n"
    )
    assert not (tmp_path / "xdg").exists()


_ABSURD_TIMES = [(1 << 62, 0), (-(1 << 62), 0), (0, -1), (0, (1 << 31) - 1), (253402300800, 0)]


@pytest.mark.parametrize(("seconds", "nanos"), _ABSURD_TIMES)
def test_absurd_time_from_a_server_is_shown_or_told(
    cli: _Program, pretend: Pretend, seconds: int, nanos: int
) -> None:
    """There is no traceback. A time that is no date is shown as the number that it is."""
    job = worker_pb.Job(job_id=ABSENT, status=worker_pb.JOB_STATUS_RUNNING)
    for time in (job.started_at, job.ended_at):
        time.seconds, time.nanos = seconds, nanos
    login = auth_pb.LoginResponse(access_token="a.b.c")
    login.expires_at.CopyFrom(job.started_at)
    server = pretend(
        GetJobStatus=lambda _: [worker_pb.GetJobStatusResponse(job=job)],
        ListJobs=lambda _: [worker_pb.ListJobsResponse(jobs=[job])],
        Login=lambda _: [login],
    )
    shown = f"{seconds} s {nanos} ns"
    for arguments in (["status", "-j", ABSENT], ["status", "--json", "-j", ABSENT]):
        assert shown in cli.read(*arguments, "--server", server)
    assert ABSENT[:8] in cli.read("list", "--server", server)  # which has only the age of a job
    line = cli.fail("login", "-u", "user", "-p", "x", "--server", server)
    assert "does not expire on a date" in line


@pytest.mark.parametrize("arguments", [["-p", os.fsdecode(b"hunter\xff")], []])
def test_password_that_is_not_utf_8_is_told_without_it(
    stranger: _Program, arguments: list[str]
) -> None:
    """It may come from the command line or from stdin. The error does not repeat it."""
    status, stdout, stderr = stranger.run("login", "-u", "user", *arguments, stdin=b"hunter\xff")
    assert (status, stdout) == (1, b"")
    assert stderr == (
        "client: the password is not valid UTF-8; check the encoding of the terminal or file\n"
    )


def test_password_may_begin_with_a_dash(pretend: Pretend, certs: Path) -> None:
    """It stands in the same word as the option; a negative number may be a word of its own."""
    sent = []

    def login(context: grpc.ServicerContext) -> Iterable[Message]:
        sent.append(dict(context.invocation_metadata()))
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

    address = pretend(Login=login)
    for arguments in (["-p=-hunter2"], ["-p-hunter2"], ["--password=-hunter2"], ["-p", "-2"]):
        parsed = cli_module.parse(["login", "-u", "user", *arguments])
        assert parsed.password == arguments[-1].removeprefix("-p").removeprefix(
            "--password"
        ).removeprefix("=")
        options = ["--server", address, "--certs", str(certs)]
        assert main(["login", "-u", "user", *options, *arguments]) == 1
    assert len(sent) == 4


def test_no_home_directory_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: ServerProgram,
    certs: Path,
) -> None:
    """A login succeeds and says that the token was not kept. The next command is not logged in."""
    for name in ("HOME", "XDG_STATE_HOME", "JOBWORKER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # whom /etc/passwd does not know
    options = ["--server", program.address, "--certs", str(certs)]
    assert main(["login", *options, "-u", "user", "-p", "user"]) == 0
    assert capsys.readouterr().err == (
        "client: the token was not kept (~: no home directory; set XDG_STATE_HOME); use -t\n"
    )
    assert main(["list", *options]) == 1
    assert "not logged in" in capsys.readouterr().err


# --- logout -----------------------------------------------------------------------------


@pytest.fixture
def kept(program: ServerProgram, tmp_path: Path) -> Path:
    """The file of the kept token."""
    return tmp_path / "xdg" / "job-worker" / f"token-{program.address}"


def test_logout_makes_the_token_worthless_and_forgets_it(stranger: _Program, kept: Path) -> None:
    """It prints nothing. A copy of the token is refused. The next command says to log in."""
    token = stranger.read("login", "-u", "user", "-p", "user").strip()
    assert stranger.read("list", "-t", token)
    assert stranger.read("logout") == ""
    assert not kept.exists()
    assert "client login" in stranger.fail("list", "-t", token)
    assert "not logged in" in stranger.fail("logout")


def test_logout_of_another_token_keeps_the_kept_one(stranger: _Program, kept: Path) -> None:
    """Only the given token becomes invalid. The kept file goes only if it holds that token."""
    other = stranger.read("login", "-u", "admin", "-p", "admin").strip()
    token = stranger.read("login", "-u", "user", "-p", "user").strip()
    assert stranger.read("logout", "-t", other) == ""
    assert kept.read_text() == token
    assert stranger.read("list")
    assert stranger.read("logout", "--token", token) == ""
    assert not kept.exists()


def test_logout_with_a_token_that_is_refused_is_told_and_forgets_it(
    stranger: _Program, kept: Path
) -> None:
    """It is an error, because the token may be valid with another certificate."""
    kept.parent.mkdir(parents=True)
    kept.write_text("a.b.c")
    assert "nothing to log out of" in stranger.fail("logout", "-t", "d.e.f")
    assert kept.read_text() == "a.b.c"
    assert "nothing to log out of" in stranger.fail("logout")
    assert not kept.exists()


def test_logout_that_does_not_reach_the_server_keeps_the_token(
    stranger: _Program, kept: Path
) -> None:
    """It can be tried again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    file = kept.with_name(f"token-{address}")
    file.parent.mkdir(parents=True)
    file.write_text("a.b.c")
    assert "no server listens" in stranger.fail("logout", "--server", address)
    assert file.read_text() == "a.b.c"


# --- what others on this machine see ----------------------------------------------------

_SECRET = "hunter2-e42"


def _arguments_of(process: subprocess.Popen[bytes]) -> list[str]:
    """Return the arguments of `client.py`, as every user of this machine can see them."""
    words = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode().split("\0")
    return words[2:-1]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["login", "-u", "u", "-p", _SECRET], ["login", "-u", "u", "-p", "*" * 11]),
        (["login", f"-p{_SECRET}", "-u", "u"], ["login", "-p***********", "-u", "u"]),
        (["login", f"-p={_SECRET}", "-u", "u"], ["login", "-p=***********", "-u", "u"]),
        (["login", "-uu", "--password", _SECRET], ["login", "-uu", "--password", "*" * 11]),
        (["login", "-uu", f"--password={_SECRET}"], ["login", "-uu", "--password=***********"]),
        (["login", "-u", "u", "-p", "pä\n"], ["login", "-u", "u", "-p", "****"]),
        (
            ["login", "-u", "u", "-p", "", "-p", "x", "-p", _SECRET],
            ["login", "-u", "u", "-p", "", "-p", "*", "-p", "*" * 11],
        ),
        (["list", "-t", _SECRET, "--json"], ["list", "-t", "*" * 11, "--json"]),
        (["list", f"-t{_SECRET}"], ["list", "-t***********"]),
        (["list", f"--token={_SECRET}"], ["list", "--token=***********"]),
        (["stop", "-j", "x", "--token", _SECRET], ["stop", "-j", "x", "--token", "*" * 11]),
        (
            ["start", "-t", _SECRET, "-c", "x", "-args", "-t", _SECRET, f"-t{_SECRET}", "-p"],
            ["start", "-t", "*" * 11, "-c", "x", "-args", "-t", _SECRET, f"-t{_SECRET}", "-p"],
        ),
        (
            ["start", f"-t{_SECRET}", "--", "login", "-p", _SECRET, f"--token={_SECRET}"],
            ["start", "-t***********", "--", "login", "-p", _SECRET, f"--token={_SECRET}"],
        ),
        (
            ["start", "--token", _SECRET, "echo", "-t", _SECRET],
            ["start", "--token", "*" * 11, "echo", "-t", _SECRET],
        ),
    ],
    ids=str,
)
def test_password_and_token_are_not_in_the_process_list(
    stranger: _Program, arguments: list[str], shown: list[str]
) -> None:
    """The client overwrites them before it connects. A job's own words stay visible."""
    del stranger.environment["JOBWORKER_SERVER"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stranger.environment["JOBWORKER_SERVER"] = f"127.0.0.1:{listener.getsockname()[1]}"
        with stranger.start(*arguments) as process:
            listener.settimeout(GUARD_S)
            connection, _ = listener.accept()
            with connection:  # which is never answered
                assert _arguments_of(process) == shown
                process.kill()


def test_token_is_not_in_the_process_list_while_a_stream_waits(
    stranger: _Program, connect: Connect, tokens: dict[str, str]
) -> None:
    """The stream works, so the client sent the token that it overwrote."""
    job_id = connect().start(_SILENT[0], _SILENT[1:])
    with stranger.start("stream", "-t", tokens["user"], "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        assert _arguments_of(process) == ["stream", "-t", "*" * len(tokens["user"]), "-j", job_id]
        connect().stop(job_id)
        stdout, stderr = process.communicate(timeout=GUARD_S)
    assert (stdout, b"STOPPED (stopped by owner)" in stderr) == (b"", True)


def test_only_the_own_process_loses_its_arguments(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A program that calls `main` with words of its own keeps its arguments."""
    script = (
        "import sys, client, cli\n"
        "client.main(['list', '-t', sys.argv[1], '--certs', '/nowhere'])\n"
        "cli.hide_secrets(['list', '-t', sys.argv[1]], [sys.argv[1]])\n"
        "print(open('/proc/self/cmdline').read().split('\\0')[-2])"
    )
    command = [sys.executable, "-c", script, _SECRET]
    environment = clean_environment() | {"XDG_STATE_HOME": str(tmp_path)}
    subprocess.run(command, cwd=_HERE, env=environment, check=True)
    assert capfd.readouterr().out == f"{_SECRET}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["login", "-t", _SECRET, "-u", "u"],
        ["list", "-p", _SECRET],
        ["list", f"-p{_SECRET}"],
        ["list", f"--password={_SECRET}"],
        ["-t", _SECRET, "list"],
        [f"--token={_SECRET}", "list"],
        ["list", "-t", _SECRET, "extra"],
        ["start", "-p", _SECRET],
        ["stop", "--", "-t", _SECRET],
    ],
    ids=" ".join,
)
def test_wrong_usage_does_not_repeat_a_secret(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """The line may end up in a log. The secret may stand where it does not belong."""
    with pytest.raises(SystemExit):
        main(arguments)
    assert _SECRET not in capsys.readouterr().err


def test_word_that_only_looks_like_a_secret_stays_the_value_it_is() -> None:
    """`start` has no -p. The command here begins like that option and has a space."""
    arguments = cli_module.parse(["start", "-t", "x", "-c", "-p x", "-args", "-t", "y"])
    assert (arguments.command, arguments.token, arguments.args) == ("-p x", "x", ["-t", "y"])


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
    """In each form, words with dashes belong to the job. The output is only the ID."""
    printed = run("start", *arguments)
    assert re.fullmatch(r"[0-9a-f-]{36}\n", printed)
    job = connect().stop(printed.strip())
    assert [job.command, *job.args] == argv


def test_start_takes_its_options_before_the_command(
    stranger: _Program, tokens: dict[str, str], connect: Connect
) -> None:
    """An option with a value may precede a command without `--`."""
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
    """They are sent in bytes, cores and numbers. An option after the command belongs to the job."""
    sent: list[Any] = []

    def call(_: Link, __: object, request: Any, **___: object) -> Any:
        if isinstance(request, worker_pb.GetJobStatusRequest):  # all limits are in force
            return worker_pb.GetJobStatusResponse(job=worker_pb.Job(limits=sent[0].limits))
        sent.append(request)
        return worker_pb.StartJobResponse(job_id=ABSENT)

    monkeypatch.setattr(Link, "call", call)
    assert main(["start", "--certs", str(certs), "-t", tokens["user"], *options, *words]) == 0
    assert capsys.readouterr().out == f"{ABSENT}\n"
    request = sent[0]
    assert [request.command, *request.args] == ["echo", "--pids", "7"]
    assert {field.name: value for field, value in request.limits.ListFields()} == limits


class _Cable:
    """Forwards connections to a server until they are cut. Attribute: `address`."""

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._flows = threading.Event()
        self._flows.set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                theirs = socket.create_connection(self._server)
                self._ends += (ours, theirs)
                for pair in ((ours, theirs), (theirs, ours)):
                    thread = threading.Thread(target=self._forward, args=pair)
                    self._threads.append(thread)
                    thread.start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def hold(self) -> None:
        """Forward nothing more, as if packets were dropped."""
        self._flows.clear()

    def cut(self) -> None:
        """End all connections; new ones are forwarded again."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(GUARD_S)
        self._flows.set()
        self.cut()
        for thread in self._threads:
            thread.join(GUARD_S)
        for end in (self._listener, *self._ends):
            end.close()


def test_start_whose_connection_breaks_is_repeated_and_starts_one_job(
    cli: _Program, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has started the job, but its answer does not arrive."""
    server = serve()
    start = server._worker.start
    with contextlib.closing(_Cable(server.address)) as cable:

        def start_and_cut(*arguments: Any, **options: Any) -> str:
            job_id = start(*arguments, **options)
            cable.cut()
            return job_id

        monkeypatch.setattr(server._worker, "start", start_and_cut)
        printed = cli.read("start", "--server", cable.address, "--", "true")
    assert [job.job_id for job in connect(address=server.address).list()] == [printed.strip()]


def test_peer_that_is_silent_is_noticed_and_told(
    program: ServerProgram, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream notices it within 30 s. With all times a tenth of that, in this test."""
    times = {name: value for name, value in connection._OPTIONS if name.endswith("_ms")}
    timeout_ms = max(times["grpc.keepalive_timeout_ms"], times["grpc.http2.ping_timeout_ms"])
    assert times["grpc.keepalive_time_ms"] + timeout_ms < 30_000
    tenth = [(name, value // (10 if name in times else 1)) for name, value in connection._OPTIONS]
    monkeypatch.setattr(connection, "_OPTIONS", tenth)
    with contextlib.closing(_Cable(program.address)) as cable:
        client = connect(address=cable.address)
        job_id = client.start(_SILENT[0], _SILENT[1:])
        stream = client.stream(job_id)
        assert next(stream) == b"ready\n"
        cable.hold()
        with pytest.raises(ClientError) as caught:
            next(stream)
        assert caught.value.code == "UNAVAILABLE"
        assert str(caught.value) == (
            f"{cable.address} does not answer any more: the network is interrupted, or the server "
            "hangs; try again later"
        )
        client.close()
    connect().stop(job_id)


def test_client_connects_soon_after_its_server_is_back(certs: Path) -> None:
    """gRPC waits between attempts, by default longer and longer: ten attempts take two minutes."""
    attempts = threading.Semaphore(0)
    with (
        _listener(lambda _: attempts.release()) as address,
        Client(address, certs=certs, token="x") as client,
    ):
        rpc = client._worker.ListJobs.future(
            worker_pb.ListJobsRequest(), wait_for_ready=True, timeout=2 * GUARD_S
        )
        for _ in range(10):
            assert attempts.acquire(timeout=GUARD_S / 6)
        rpc.cancel()


@pytest.mark.parametrize(
    ("code", "raw", "told"),
    [
        ("UNAVAILABLE", "recvmsg:Connection timed out (110)", "{} does not answer any more"),
        ("UNAVAILABLE", "Stream removed (ping timeout)", "{} does not answer any more"),
        ("UNAVAILABLE", "sendmsg: No route to host (113)", "{} does not answer any more"),
        ("UNAVAILABLE", "Cancelling all calls", "{} is shutting down"),
        ("CANCELLED", "Cancelling all calls", "{} is shutting down"),
        (
            "CANCELLED",
            "CANCELLED",
            "{} ended the call without an answer, perhaps to shut down; try it again",
        ),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer (104)", "{} closed the connection"),
        ("UNAVAILABLE", "Stream removed (something new)", "{} closed the connection"),
        ("UNAVAILABLE", "the server is shutting down", "the server is shutting down"),
        (
            "DEADLINE_EXCEEDED",
            "Stream removed (Deadline Exceeded)",
            "{} did not answer within 30 s; try it again",
        ),
        (
            "INTERNAL",
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))",
            "what listens on {} does not answer as a job-worker server does; see --server",
        ),
    ],
)
def test_grpcs_own_words_are_not_shown(
    cli: _Program, pretend: Pretend, code: str, raw: str, told: str
) -> None:
    """In their place stands what it means. The words of the server stay as they are."""

    def end(context: grpc.ServicerContext) -> Iterator[Message]:
        context.abort(getattr(grpc.StatusCode, code), raw)

    address = pretend(ListJobs=end)
    assert cli.fail("list", "--server", address).startswith(f"client: {told.format(address)}")


def test_stream_that_does_not_end_in_time_at_shutdown_says_so(
    connect: Connect, start_server: Callable[..., ServerProgram]
) -> None:
    """The client has not read all of the output, so the server cannot send its own words."""
    program = start_server()
    client = connect("user", program.address)
    job_id = client.start("head", ["-c", "100M", "/dev/zero"])
    assert sum(map(len, client.stream(job_id))) == 100 << 20
    stream = client.stream(job_id)
    next(stream)
    assert program.end() == 0
    with pytest.raises(ClientError) as caught:
        list(stream)
    assert (caught.value.code, str(caught.value)) == (
        "UNAVAILABLE",
        f"{program.address} is shutting down",
    )


def test_start_without_an_answer_tells_how_to_repeat_it(cli: _Program, pretend: Pretend) -> None:
    """It was repeated. The line has the UUID with which the start can be repeated again."""
    calls: list[None] = []

    def lose(context: grpc.ServicerContext) -> Iterator[Message]:
        calls.append(None)
        context.abort(grpc.StatusCode.UNAVAILABLE, "recvmsg:Connection timed out (110)")

    line = cli.fail("start", "--retry-for", "1", "--server", pretend(StartJob=lose), "true")
    assert re.search(
        "there may be a job: .* repeat this start with --request-id [0-9a-f-]{36}$", line
    )
    assert len(calls) > 1


def test_start_that_reaches_no_server_is_not_repeated(cli: _Program, foreign_certs: Path) -> None:
    """Certainly there is no job, so the line does not speak of one."""
    pair = (foreign_certs / "client.pem", foreign_certs / "client-key.pem")
    options = ("--cert", str(pair[0]), "--key", str(pair[1]))
    assert "there may be a job" not in cli.fail("start", *options, "--", "true")
    assert "there may be a job" not in cli.fail(
        "start", "--server", "127.0.0.1:1", "--retry-for", "1", "--", "true"
    )


def test_start_with_a_request_id_prints_the_same_job(run: Callable[..., str]) -> None:
    """As often as it is repeated."""
    arguments = ("start", "--request-id", str(uuid.uuid4()), "--", "true")
    assert run(*arguments) == run(*arguments)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--memory", "9G"], ["--memory", "9 GiB", "8 GiB"]),
        (["--cpus", "64"], ["--cpus", "64", "8"]),
        (["--cpus", "nan"], ["--cpus", "nan", "0.01"]),
        (["--cpus", "-1"], ["--cpus", "-1", "0.01"]),
        (["--pids", "0"], ["--pids", "0", "at least 1"]),
    ],
)
def test_limit_that_the_server_refuses_is_told(
    cli: _Program, tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    """The line names the requested and the allowed value. The command does not run."""
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
        ["start", "-t", "-args", "x"],
        ["list", "-t", "--json"],
        ["stop", "-t", "-j", "x"],
        ["stop", "--job=--"],
        ["start", "--cpus=--", "x"],
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
    """The line says what is wrong, and which help to read."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert re.fullmatch(r"client[^\n]*: [^\n]+; see client[^\n]* --help\n", captured.err)


# --- stop, status, list -----------------------------------------------------------------


def test_stop_kills_the_job_and_says_how_it_ended(run: Callable[..., str]) -> None:
    """A second stop says the same. A job that had ended by itself keeps its end."""
    job_id = run("start", *_SILENT).strip()
    assert run("stop", "-j", job_id) == "STOPPED (stopped by owner)\n"
    assert run("stop", "-j", job_id) == "STOPPED (stopped by owner)\n"
    job_id = run("start", "sh", "-c", "exit 3").strip()
    run("stream", "-j", job_id)
    assert run("stop", "-j", job_id) == "FINISHED (exited with code 3)\n"


def test_times_of_start_and_stop_reach_the_server(
    run: Callable[..., str], connect: Connect
) -> None:
    """`status` shows the timeout, how the job ended, and how many processes were killed."""
    job_id = run("start", "--timeout", "1.5h", "--", *_SILENT).strip()
    assert re.search(r"^timeout +5400 s$", run("status", "-j", job_id), re.MULTILINE)
    run("stop", "-j", job_id, "--grace", "1m")
    assert json.loads(run("status", "--json", "-j", job_id))["signal"] == signal.SIGTERM
    job_id = run("start", "--timeout", "0.2s", "--grace", "10s", "sleep", "1000").strip()
    assert list(connect().stream(job_id)) == []
    assert "STOPPED (timed out)" in run("status", "-j", job_id)
    words = ("--linger", "0.2s", "sh", "-c", "sleep 1000 & sleep 1000 & exit 3")
    job_id = run("start", *words).strip()
    run("stream", "-j", job_id)
    expected = "FINISHED (exited with code 3; 2 of its processes went on and were killed)"
    assert expected in run("status", "-j", job_id)


@pytest.mark.parametrize("form", ["-j {} -j {} -j {}", "-j {} {} {}"])
def test_stop_status_and_remove_take_several_jobs(
    cli: _Program, connect: Connect, form: str
) -> None:
    """An unknown job is an error; the command still applies to the others."""
    jobs = [connect().start(*_SILENT[:1], _SILENT[1:]) for _ in range(2)]
    words = form.format(jobs[0], ABSENT, jobs[1]).split()
    status, stdout, stderr = cli.run("stop", *words)
    assert (status, stdout.decode().splitlines()) == (
        1,
        [f"{job_id} STOPPED (stopped by owner)" for job_id in jobs],
    )
    assert re.fullmatch(rf"client: job {ABSENT}: [^\n]+\n", stderr)
    status, stdout, stderr = cli.run("status", "--json", *words)
    assert (status, [job["job_id"] for job in json.loads(stdout)]) == (1, jobs)
    assert stderr.startswith(f"client: job {ABSENT}: ")
    assert cli.read("status", "-j", *jobs).count("\njob ") == 1  # after an empty line
    assert cli.run("remove", *words)[0] == 1
    assert not {job.job_id for job in connect().list()} & set(jobs)


def test_job_that_is_named_twice_counts_once(cli: _Program, connect: Connect) -> None:
    """Its second removal would fail."""
    job_id = connect().start(*_SILENT[:1], _SILENT[1:])
    assert cli.read("stop", job_id, job_id).count("STOPPED") == 1
    assert cli.run("remove", "-j", job_id, "-j", job_id) == (0, b"", "")


def test_stream_of_two_jobs_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Their outputs could not be told apart."""
    with pytest.raises(SystemExit):
        main(["stream", "-j", "x", "-j", "y"])
    assert capsys.readouterr().err == (
        "client stream: stream takes one job; see client stream --help\n"
    )


def test_json_status_has_every_field_of_a_running_job(
    run: Callable[..., str], connect: Connect
) -> None:
    """Fields have their proto names and order, enums are names, absent fields are null."""
    job_id = run("start", *_SILENT).strip()
    chunks = connect().stream(job_id)
    next(chunks)
    fields = json.loads(run("status", "-j", job_id, "--json"))
    assert list(fields) == [field.name for field in worker_pb.Job.DESCRIPTOR.fields]
    assert list(fields.pop("limits")) == [f.name for f in worker_pb.Limits.DESCRIPTOR.fields]
    fields.pop("usage")  # null where nothing accounts it while the job runs
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", fields.pop("started_at"))
    assert fields.pop("working_directory").startswith("/")  # the home, if there is one
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
        "output_lost_bytes": 0,
        "output_gap": None,
        "may_have_escaped": False,
        "name": "",
        "labels": {},
        "killed_after_exit": 0,
        "timeout": None,
        "stdin": None,
        "tmp_directory": "",
        "node": "",
        "reason": "",
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
    """Zero and empty are not absent: exit code 0, size 0, no arguments, no swap."""
    job = worker_pb.Job(exit_code=0, limits=worker_pb.Limits(swap_bytes=0, cpu_cores=0.5))
    fields = display.to_dict(job)
    assert (fields["exit_code"], fields["signal"]) == (0, None)
    assert (fields["output_bytes"], fields["args"], fields["started_at"]) == (0, [], None)
    assert fields["limits"] == dict.fromkeys(fields["limits"]) | {"swap_bytes": 0, "cpu_cores": 0.5}


def test_json_list_holds_what_status_shows(run: Callable[..., str]) -> None:
    """Each line has one of the user's own jobs, in the order of their starts."""
    ids = [run("start", "true").strip() for _ in range(2)]
    for job_id in ids:
        run("stream", "-j", job_id)
    jobs = [json.loads(line) for line in run("list", "--json").splitlines()]
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
    run: Callable[..., str], connect: Connect, script: str, end: str
) -> None:
    """It prints a line for each property."""
    job_id = run("start", "sh", "-c", f"printf four; {script}").strip()
    list(connect().stream(job_id))
    shown = dict(line.split(maxsplit=1) for line in run("status", "-j", job_id).splitlines())
    assert list(shown) == [
        *("job", "owner", "command", "directory", "status", "started", "ended"),
        *("output", "subscribers", "limits", "timeout", "used"),
    ]
    assert (shown["job"], shown["owner"], shown["status"]) == (job_id, "user", end)
    assert shown["command"] == f"sh -c 'printf four; {script}'"
    assert (shown["output"], shown["subscribers"]) == ("4 bytes", "-")
    assert all(re.fullmatch(r"[-\d]+ [:\d]+ UTC", shown[name]) for name in ("started", "ended"))


def _shown(job: worker_pb.Job, name: str) -> str:
    """Return what `status` shows in the line `name`."""
    lines = dict(line.split(maxsplit=1) for line in display.describe(job).splitlines()[6:])
    return lines[name]


def test_limits_are_shown_in_units() -> None:
    """Limits that are not in force are not shown."""
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
    """The same while the job runs and afterwards. Values that are unknown are not shown."""
    usage = worker_pb.Usage(
        source=worker_pb.USAGE_SOURCE_CGROUP,
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
        source=worker_pb.USAGE_SOURCE_RUSAGE,
        cpu_user_s=0.5,
        cpu_system_s=0.25,
        memory_peak_bytes=20 << 20,
    )
    assert _shown(worker_pb.Job(usage=usage), "used") == (
        "0.5 s CPU user, 0.25 s system, 20 MiB memory at most (leader and awaited children only)"
    )
    assert _shown(worker_pb.Job(), "used") == "-"


def test_json_shows_usage_exactly() -> None:
    """Numbers are not rounded, the source is a name, unknown values are null."""
    usage = worker_pb.Usage(
        source=worker_pb.USAGE_SOURCE_RUSAGE,
        cpu_user_s=1.234567,
        memory_peak_bytes=(1 << 53) + 1,
        oom_kills=0,
    )
    shown = json.loads(json.dumps(display.to_dict(worker_pb.Job(usage=usage))))["usage"]
    told = {"source": "RUSAGE", "cpu_user_s": 1.234567, "memory_peak_bytes": (1 << 53) + 1}
    assert shown == dict.fromkeys(shown) | told | {"oom_kills": 0}
    assert display.to_dict(worker_pb.Job())["usage"] is None


def test_json_and_status_show_output_that_was_not_kept() -> None:
    """Both show the kept size, and the size and place of the gap."""
    job = worker_pb.Job(output_bytes=1 << 30, output_lost_bytes=52)
    assert _shown(job, "output") == "1073741824 bytes (52 more were not kept)"
    job.output_gap.offset, job.output_gap.length = 10, 52
    assert _shown(job, "output") == "1073741824 bytes (52 more, from byte 10 on, were not kept)"
    assert display.to_dict(job)["output_lost_bytes"] == 52
    assert display.to_dict(job)["output_gap"] == {"offset": 10, "length": 52}
    assert _shown(worker_pb.Job(output_bytes=1), "output") == "1 bytes"


def test_status_and_reason_of_a_newer_server_are_shown_by_number() -> None:
    """This client's .proto does not have them."""
    job = worker_pb.Job()
    job.MergeFromString(bytes([5 << 3, 99, 6 << 3, 98]))
    fields = display.to_dict(job)
    assert (fields["status"], fields["end_reason"]) == ("99", "98")
    assert display.state_of(fields) == "99 (98)"


# C0, DEL, C1, line ends of all kinds, what turns the direction of text around, what is not seen.
_NASTY = (
    "\x00\x07\x08\t\r\n\x0b\x1b[31mred\x1b]0;title\x07\x7f\x80\x85\x9b2Jü"
    "\u2028\u2029\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
    "\u200b\u200c\u200d\u2060\u00ad"
)


def _is_harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_others_words_do_not_steer_the_terminal(cli: _Program) -> None:
    """List, status and errors show escape sequences and line ends of a command as text."""
    nasty = _NASTY.replace("\0", "")
    job_id = cli.read("start", "true", nasty).strip()
    for shown in (cli.read("list"), cli.read("status", "-j", job_id), cli.fail("start", nasty)):
        assert "red" in shown
        assert "ü" in shown
        assert _is_harmless(shown), ascii(shown)


def test_lone_surrogate_is_shown_as_an_escape(cli: _Program) -> None:
    """An argument that is not UTF-8 has them; a server's message cannot."""
    assert cli_module.printable("\ud800\udcff") == r"\ud800\udcff"
    assert r"\udcff" in cli.fail("start", "true", os.fsdecode(b"\xff"))


def _fail_nastily(context: grpc.ServicerContext) -> Iterable[Message]:
    context.abort(grpc.StatusCode.NOT_FOUND, f"no job {_NASTY}")


def test_servers_words_do_not_steer_the_terminal(cli: _Program, pretend: Pretend) -> None:
    """Names, IDs and errors stay on their lines. JSON is ASCII, and holds the sent text."""
    job = worker_pb.Job(
        job_id=_NASTY, owner=_NASTY, command=_NASTY, args=[_NASTY], subscribers=[_NASTY, _NASTY]
    )
    cli.environment["JOBWORKER_SERVER"] = pretend(
        StartJob=lambda _: [worker_pb.StartJobResponse(job_id=_NASTY)],
        GetJobStatus=lambda _: [worker_pb.GetJobStatusResponse(job=job)],
        ListJobs=lambda _: [worker_pb.ListJobsResponse(jobs=[job])],
        StopJob=_fail_nastily,
        StreamOutput=_fail_nastily,
        Login=_fail_nastily,
        Logout=_fail_nastily,
    )
    lines = {
        cli.read("start", "true"): 1,
        cli.read("status", "-j", "x"): 11,
        cli.read("list"): 2,
        cli.fail("stop", "-j", "x"): 1,
        cli.fail("stream", "-j", "x"): 1,
        cli.fail("login", "-u", "x", "-p", "x"): 1,
        cli.fail("logout"): 1,
    }
    for shown, count in lines.items():
        assert "red" in shown
        assert _is_harmless(shown), ascii(shown)
        assert shown.count("\n") == count
    for arguments in (["status", "-j", "x", "--json"], ["list", "--json"]):
        printed = cli.read(*arguments)
        assert printed.isascii()
        assert _is_harmless(printed)
        told = json.loads(printed)
        assert (told["owner"], told["subscribers"]) == (_NASTY, [_NASTY, _NASTY])


@pytest.mark.parametrize("subcommand", ["list", "status"])
def test_character_that_stdout_cannot_show_becomes_an_escape(
    cli: _Program, connect: Connect, subcommand: str
) -> None:
    """For example in a locale with ASCII only."""
    job_id = connect().start("true", ["Jürg", "\U0001f642"])
    cli.environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = cli.read(subcommand, *(["-j", job_id] if subcommand == "status" else []))
    assert r"true 'J\xfcrg' '\U0001f642'" in shown


def test_list_is_a_table_with_a_line_for_each_job(run: Callable[..., str]) -> None:
    """It has a heading and aligned columns."""
    job_id = run("start", "echo", "a b").strip()
    run("stream", "-j", job_id)
    heading, *rows = run("list").splitlines()
    assert heading.split() == [
        *("ID", "NAME", "OWNER", "STATUS", "EXIT", "AGE", "CPU", "MEMORY", "OUTPUT", "COMMAND")
    ]
    row = next(row for row in rows if row.startswith(job_id[:8]))
    assert row[heading.index("OWNER") :].startswith("user ")
    assert row[heading.index("STATUS") :].startswith("FINISHED  0 ")
    assert row[heading.index("COMMAND") :] == "echo 'a b'"


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("abc", 3),
        ("", 0),
        ("Jürg", 4),
        ("e\u0301", 1),
        ("漢字", 4),
        ("\uff21", 2),
        ("\U0001f642", 2),
    ],
)
def test_width_of_text_is_in_cells_of_a_terminal(text: str, cells: int) -> None:
    """A wide character has two, a combining character none."""
    assert display.width(text) == cells


def test_list_at_a_terminal_has_a_line_for_each_job_whatever_it_is_called(
    cli: _Program, pretend: Pretend
) -> None:
    """Alignment and cutting count a wide character as two cells."""
    names = ["x" * 100, "漢" * 100, "x" + "漢" * 100, "\U0001f642" * 100, "e\u0301" * 100]
    jobs = [
        worker_pb.Job(job_id="1", owner="漢字" if i % 2 else "abcd", command="ls", args=[name])
        for i, name in enumerate(names)
    ]
    cli.environment["JOBWORKER_SERVER"] = pretend(
        ListJobs=lambda _: [worker_pb.ListJobsResponse(jobs=jobs)]
    )
    cli.environment.pop("COLUMNS", None)
    cli.environment["NO_COLOR"] = "1"
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(ours, "rb", buffering=0) as screen:
        with cli.start("list", stdout=terminal) as process:
            os.close(terminal)
            shown = b""
            with contextlib.suppress(OSError):  # EIO: the other side is gone
                while more := screen.read(1000):
                    shown += more
        assert process.returncode == 0
    heading, *rows = shown.decode().splitlines()
    assert len(rows) == len(names)
    before = {display.width(row[: row.index("ls ")]) for row in rows}
    assert before == {heading.index("COMMAND")}
    widths = [display.width(row) for row in rows]
    assert sorted(set(widths)) == [79, 80]


# --- stream -----------------------------------------------------------------------------


def test_stream_writes_the_bytes_as_they_are(cli: _Program, connect: Connect) -> None:
    """No byte is changed, added or lost, also from an offset and past the end."""
    output = Path("/bin/sh").read_bytes() * 10
    job_id = connect().start("cat", ["/bin/sh"] * 10)
    assert cli.run("stream", "-j", job_id) == (0, output, "")
    rest = cli.run("stream", "-j", job_id, "--offset", str(len(output) - 1000))
    assert rest == (0, output[-1000:], "")
    beyond = str(len(output) + 1)
    line = cli.fail("stream", "-j", job_id, "--offset", beyond)
    assert f"offset {beyond} is past the end" in line


def test_stream_writes_what_comes_when_it_comes(cli: _Program, connect: Connect) -> None:
    """Half a line arrives while the job waits."""
    job_id = connect().start("sh", ["-c", "printf half; exec sleep infinity"])
    with cli.start("stream", "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.read(4) == b"half"
        connect().stop(job_id)
        assert process.communicate(timeout=GUARD_S)[0] == b""


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("echo ready; read _ <FIFO; exit 3", None),
        ("echo ready; read _ <FIFO; kill -SEGV $$", "FINISHED (killed by SIGSEGV)"),
        ("echo ready; exec sleep infinity", "STOPPED (stopped by admin)"),
    ],
)
def test_stream_exits_with_1_if_the_job_did_not_exit_by_itself(
    cli: _Program, connect: Connect, public: Path, script: str, end: str | None
) -> None:
    """The line says how the job ended. A job with an exit code of its own has exited by itself."""
    fifo = make_fifo(public / "fifo")
    job_id = connect().start("sh", ["-c", script.replace("FIFO", str(fifo))])
    with cli.start("stream", "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        if "FIFO" in script:
            fifo.write_text("go on\n")
        else:
            connect("admin").stop(job_id)
        _, stderr = process.communicate(timeout=GUARD_S)
    line = f"client: the job did not exit by itself: {end}; the output may be incomplete\n"
    assert (process.returncode, stderr.decode()) == ((1, line) if end else (0, ""))


def test_stream_exits_with_1_when_the_server_shuts_down(
    cli: _Program, connect: Connect, start_server: Callable[..., ServerProgram]
) -> None:
    """The line says it in words of our own, and where to continue."""
    program = start_server()
    job_id = connect("user", program.address).start(_SILENT[0], _SILENT[1:])
    with cli.start("stream", "--server", program.address, "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        program.end()
        _, stderr = process.communicate(timeout=GUARD_S)
    assert (process.returncode, stderr.decode()) == (
        1,
        "client: the server is shutting down; to continue from here, use --offset 6\n",
    )


def test_stream_exits_with_1_if_the_server_does_not_say_how_the_job_ended(
    cli: _Program, pretend: Pretend
) -> None:
    """A stream that ends with OK only is not taken for a whole output."""
    address = pretend(StreamOutput=lambda _: [worker_pb.StreamOutputResponse(data=b"half")])
    assert cli.run("stream", "-j", ABSENT, "--server", address) == (
        1,
        b"half",
        "client: the server did not say how the job ended; the output may be incomplete\n",
    )


def test_stream_whose_token_ends_tells_where_to_go_on(cli: _Program, connect: Connect) -> None:
    """As with any other stream that breaks off."""
    with connect("") as login:
        token, _ = login.login("user", "user")
        job_id = connect().start(_SILENT[0], _SILENT[1:])
        with cli.start("stream", "-t", token, "-j", job_id) as process:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            login.logout()
            _, stderr = process.communicate(timeout=GUARD_S)
    connect().stop(job_id)
    assert process.returncode == 1
    assert re.fullmatch(
        rb"client: your login is no longer valid: it has expired, was ended by a logout, or your "
        rb"password or role has changed; [^\n]+ --offset 6; run: client login -u USER\n",
        stderr,
    )


def test_stream_into_a_pipe_that_closes_ends_quietly(cli: _Program, connect: Connect) -> None:
    """Like with `| head -c 5`, there is no traceback, and stderr is empty."""
    job_id = connect().start("yes")
    with cli.start("stream", "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.read(5) == b"y\ny\ny"
        process.stdout.close()
        assert process.wait(GUARD_S) == 128 + signal.SIGPIPE
        assert process.stderr
        assert process.stderr.read() == b""
    connect().stop(job_id)


def test_stream_that_ends_with_data_loss_writes_all_there_is_first(
    cli: _Program, pretend: Pretend
) -> None:
    """It writes all bytes. Then one line says how much is missing, and the exit status is 1."""
    kept = bytes(range(256)) * 1000

    def stream(context: grpc.ServicerContext) -> Iterator[Message]:
        for offset in range(0, len(kept), 64_000):
            yield worker_pb.StreamOutputResponse(data=kept[offset : offset + 64_000], offset=offset)
        context.abort(grpc.StatusCode.DATA_LOSS, "52 bytes of output were not kept")

    address = pretend(StreamOutput=stream)
    assert cli.run("stream", "-j", ABSENT, "--server", address) == (
        1,
        kept,
        "client: 52 bytes of output were not kept\n",
    )


def test_stream_tells_at_its_place_how_much_output_is_missing(
    cli: _Program, serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """The line is on stderr. stdout has the head and the tail. `stream` ends with 1."""
    config = tmp_path / "config.toml"
    config.write_text('[per_job]\nkept_output = "100"\n')
    address = serve(config=config).address
    cli.environment["JOBWORKER_SERVER"] = address
    script = "seq 1000; exit 7"
    job_id = cli.read("start", "--", "sh", "-c", script).strip()
    with contextlib.suppress(ClientError):
        list(connect(address=address).stream(job_id))  # until the job has ended
    whole = "".join(f"{i}\n" for i in range(1, 1001)).encode()
    missing = len(whole) - 100
    with cli.start("stream", "-j", job_id, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        both = process.stdout.read()
    line = f"client: ... {missing} bytes, from byte 50 on, were not kept ...\n".encode()
    error = f"client: {missing} bytes of output were not kept: this job's ceiling of 100 bytes"
    head, _, tail = both.partition(line)
    assert (head, tail[:50]) == (whole[:50], whole[-50:])
    assert tail[50:].startswith(error.encode())
    assert process.returncode == 1
    assert cli.run("stream", "-j", job_id, "--offset", str(50 + missing)) == (0, whole[-50:], "")


@pytest.mark.parametrize("subcommand", ["list", "stream", "help"])
def test_output_that_cannot_be_written_is_told(
    cli: _Program, connect: Connect, subcommand: str
) -> None:
    """On a full disk there is one line, and the exit status is 1."""
    job_id = connect().start("echo", ["x"])
    arguments = {"list": ["list"], "stream": ["stream", "-j", job_id], "help": ["--help"]}
    cli.environment.pop("PYTHONUNBUFFERED", None)  # argparse hides errors that come at once
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [sys.executable, str(_HERE / "client.py"), *arguments[subcommand]],
            env=cli.environment,
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (result.returncode, result.stderr) == (
        1,
        "client: cannot write to stdout: No space left on device\n",
    )


@pytest.mark.parametrize("words", [["start"], ["run"]])
def test_job_whose_client_cannot_write_is_named(
    cli: _Program, connect: Connect, words: list[str]
) -> None:
    """On stderr, because the job goes on."""
    with (
        open("/dev/full", "wb") as full,
        cli.start(*words, "echo", "x", stdout=full.fileno()) as process,
    ):
        _, stderr = process.communicate(timeout=GUARD_S)
    [job_id] = re.findall(rb"client: the job .* ([0-9a-f-]{36})\n", stderr)
    assert b"client: cannot write to stdout: No space left on device\n" in stderr
    assert connect().status(job_id.decode()).command == "echo"


def test_login_that_cannot_write_has_kept_the_token(stranger: _Program) -> None:
    """The next commands use the kept one, whatever happens to the printed one."""
    with open("/dev/full", "wb") as full:
        words = ("login", "-u", "user", "-p", "user")
        with stranger.start(*words, stdout=full.fileno()) as process:
            assert process.wait(GUARD_S) == 1
    assert "\nuser        user\n" in "\n" + stranger.read("whoami")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_stream_that_fits_only_in_part_is_told(
    cli: _Program, connect: Connect, tmp_path: Path, unbuffered: str
) -> None:
    """The first part is written. A partial write is not taken for a whole one."""
    job_id = connect().start("head", ["-c", "5000", "/dev/zero"])
    cli.environment["PYTHONUNBUFFERED"] = unbuffered
    script = 'ulimit -f 1; exec "$0" "$1" stream -j "$2" >"$3"'
    result = subprocess.run(
        ["sh", "-c", script, sys.executable, str(_HERE / "client.py"), job_id, tmp_path / "file"],
        env=cli.environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert 0 < (tmp_path / "file").stat().st_size < 5000
    assert (result.returncode, result.stderr) == (
        1,
        "client: cannot write to stdout: File too large\n",
    )


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--ca", "/dev/zero"],
        ["start", "--env-file", "/dev/zero", "true"],
        ["list"],  # its token, see below
        ["completion", "bash", "--candidates"],
        ["login", "-u", "user"],
    ],
)
def test_file_without_an_end_is_refused(
    stranger: _Program, tmp_path: Path, words: list[str]
) -> None:
    """Its name was mistyped, perhaps. The client would read until the machine has no memory."""
    state = tmp_path / "state" / "job-worker"
    state.mkdir(parents=True)
    stranger.environment["XDG_STATE_HOME"] = str(state.parent)
    server = stranger.environment["JOBWORKER_SERVER"]
    (state / f"token-{server}").symlink_to("/dev/zero")
    with open("/dev/zero", "rb") as zero, stranger.start(*words, stdin=zero.fileno()) as process:
        _, stderr = process.communicate(timeout=GUARD_S)
    if words[0] != "completion":
        assert process.returncode == 1
        assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize("redirection", ["<&-", ">&-"])
def test_closed_standard_stream_is_told(stranger: _Program, redirection: str) -> None:
    """The line says what to do."""
    script = f'"$0" "$1" login -u user -p user {redirection}'
    result = subprocess.run(
        ["sh", "-c", script, sys.executable, str(_HERE / "client.py")],
        env=stranger.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (
        1,
        "",
        "client: stdin and stdout must be open; use </dev/null or >/dev/null\n",
    )


@pytest.mark.parametrize("subcommand", ["list", "status"])
def test_other_output_into_a_closed_pipe_ends_quietly(
    cli: _Program, connect: Connect, subcommand: str
) -> None:
    """Also if a short output is lost as a whole."""
    job_id = connect().start("true")
    with cli.start(subcommand, *(["-j", job_id] if subcommand == "status" else [])) as process:
        assert process.stdout
        process.stdout.close()
        assert process.wait(GUARD_S) == 128 + signal.SIGPIPE
        assert process.stderr
        assert process.stderr.read() == b""


# --- run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "stdout", "stderr"),
    [
        (["echo", "-n", "hello"], 0, b"hello", b""),
        (["--", "sh", "-c", "echo out; echo err >&2; exit 7"], 7, b"out\nerr\n", b""),
        (["-c", "sh", "-args", "-c", "exit 255"], 255, b"", b""),
        (["sh", "-c", "kill -SEGV $$"], 139, b"", b"client: the job did not exit by itself.*SEGV"),
        (["sh", "-c", "kill -KILL $$"], 137, b"", b"client: the job did not exit by itself.*KILL"),
        (["no-such-command"], 125, b"", b"client: cannot execute 'no-such-command': "),
        (["--pids", "1T", "true"], 125, b"", b"client run: "),
        (["--no-such-option", "true"], 125, b"", b"client run: unknown option"),
        (["-t", "no-token", "true"], 125, b"", b"client: your login is no longer valid: "),
        (["--server=127.0.0.1:1", "--retry-for=0", "true"], 125, b"", b"client: no server listens"),
        (["true", "\udcff"], 125, b"", b"client: an argument is not valid UTF-8"),
    ],
)
def test_run_exits_as_its_job(
    cli: _Program, words: list[str], status: int, stdout: bytes, stderr: bytes
) -> None:
    """128 + N after signal N; 125 with the reason in one line if the job could not be started."""
    with cli.start("run", *words) as process:
        out, err = process.communicate(timeout=GUARD_S)
    assert (process.returncode, out) == (status, stdout), err
    assert re.match(stderr, err)
    assert err.count(b"\n") == bool(stderr)


def test_stops_with_a_grace_do_not_wait_for_each_other(
    run: Callable[..., str], connect: Connect, public: Path
) -> None:
    """The first job ends by itself only after the second one has got its SIGTERM, too."""
    fifo, client = make_fifo(public / "terminated"), connect()
    scripts = (f"trap 'read _ <{fifo}; exit 0' TERM", f"trap 'echo x >{fifo}; exit 0' TERM")
    ids = [
        client.start("sh", ["-c", f"{script}; echo ready; while :; do sleep 0.1; done"])
        for script in scripts
    ]
    for job_id in ids:
        assert next(client.stream(job_id)) == b"ready\n"
    lines = run("stop", *ids, "--grace", "60s").splitlines()
    assert {line.split()[0] for line in lines} == set(ids)
    assert [client.status(job_id).exit_code for job_id in ids] == [0, 0]


def test_stops_that_end_at_the_same_time_have_a_line_each(cli: _Program, connect: Connect) -> None:
    """Threads write these lines."""
    client = connect()
    for _ in range(3):
        ids = [client.start("sleep", ["infinity"]) for _ in range(16)]
        lines = cli.read("stop", *ids, "--grace", "60s").splitlines()
        assert sorted(lines) == sorted(f"{job_id} STOPPED (stopped by owner)" for job_id in ids)


def test_run_detached_prints_the_id_of_a_running_job(cli: _Program, connect: Connect) -> None:
    """It returns at once."""
    job_id = cli.read("run", "-d", "--", *_SILENT).rstrip("\n")
    assert connect().status(job_id).status == worker_pb.JOB_STATUS_RUNNING
    connect().stop(job_id)


def test_run_of_a_stopped_job_tells_who_stopped_it(cli: _Program, connect: Connect) -> None:
    """The exit status is that of SIGKILL."""
    with cli.start("run", *_SILENT) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        (job,) = (
            job for job in connect("admin").list() if job.status == worker_pb.JOB_STATUS_RUNNING
        )
        connect("admin").stop(job.job_id)
        _, stderr = process.communicate(timeout=GUARD_S)
    assert (process.returncode, stderr.count(b"\n")) == (137, 1)
    assert b"stopped by admin" in stderr


def test_run_whose_server_was_killed_exits_with_125(
    cli: _Program, start_server: Callable[..., ServerProgram], make_state: Callable[[], Path]
) -> None:
    """The server that is started again knows the job, and that its end is unknown."""
    state = make_state()
    program = start_server(state=state)
    with cli.start("run", "--server", program.address, *_SILENT) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        program.end(signal.SIGKILL)
        start_server("--listen", program.address, state=state)
        _, stderr = process.communicate(timeout=GUARD_S)
    assert process.returncode == 125
    assert stderr.splitlines()[-1].startswith(
        b"client: the job did not exit by itself: FINISHED (lost)"
    )


_COUNTS_CTRL_C = [
    "sh",
    "-c",
    "trap 'echo got' INT; echo ready; while :; do sleep 1000 & wait; done",
]


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_reaches_the_job_and_a_second_one_stops_it(cli: _Program, connect: Connect) -> None:
    """The first is SIGINT, which the job survives here; the second is SIGKILL."""
    with cli.start("run", *_COUNTS_CTRL_C) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"got\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=GUARD_S)
    assert process.returncode == 137
    assert stderr.startswith(b"client: stopping the job; Ctrl-C again leaves it\n")
    assert b"stopped by owner" in stderr
    assert not [job for job in connect().list() if job.status == worker_pb.JOB_STATUS_RUNNING]


@pytest.mark.usefixtures("interruptible")
def test_job_that_ctrl_c_ends_gives_its_exit_code(cli: _Program) -> None:
    """The job decides what SIGINT means."""
    script = "trap 'exit 5' INT; echo ready; while :; do sleep 1000 & wait; done"
    with cli.start("run", "sh", "-c", script) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=GUARD_S) == (b"", b"")
    assert process.returncode == 5


@pytest.mark.usefixtures("interruptible")
def test_third_ctrl_c_leaves_although_the_server_does_not_answer(
    cli: _Program, start_server: Callable[..., ServerProgram]
) -> None:
    """The exit status is 130. One line says that the job may go on, and nothing follows it."""
    program = start_server()
    with cli.start("run", "--server", program.address, *_COUNTS_CTRL_C) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"got\n"
        program.process.send_signal(signal.SIGSTOP)
        try:
            process.send_signal(signal.SIGINT)
            assert b"Ctrl-C again leaves it" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(GUARD_S) == 130
        finally:
            program.process.send_signal(signal.SIGCONT)
        assert re.fullmatch(
            rb"client: the job may go on; see: client status -j [0-9a-f-]{36}\n",
            process.stderr.read(),
        )


@pytest.mark.usefixtures("interruptible")
def test_start_that_ctrl_c_interrupts_says_how_to_get_its_job(
    cli: _Program, pretend: Pretend
) -> None:
    """The server may have started the job, and nobody knows its ID."""
    begun, go_on = threading.Event(), threading.Event()

    def start(_: Any) -> list[Message]:
        begun.set()
        assert go_on.wait(GUARD_S)
        return []

    with cli.start("start", "--server", pretend(StartJob=start), "true") as process:
        assert begun.wait(GUARD_S)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=GUARD_S)
        go_on.set()
    assert (process.returncode, stdout) == (130, b"")
    assert re.fullmatch(
        rb"client: there may be a job: to get its ID, repeat this start with --request-id "
        rb"[0-9a-f-]{36}\n",
        stderr,
    )


@pytest.mark.parametrize(
    ("words", "status"), [(["list"], 0), (["run", "sh", "-c", "exit 7"], 7), (["status", "x"], 1)]
)
def test_ctrl_c_at_the_end_changes_nothing(cli: _Program, words: list[str], status: int) -> None:
    """Once the result is there. Python's own end takes a while, and would show a traceback."""
    script = (
        "import atexit, os, signal, sys, client\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "sys.exit(client.main())"
    )
    command = [sys.executable, "-c", script, *words]
    result = subprocess.run(
        command, cwd=_HERE, env=cli.environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == status
    assert result.stderr.count("\n") == (status == 1)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_stream_quietly(cli: _Program, connect: Connect) -> None:
    """The exit status is 130, and the job continues."""
    job_id = connect().start(_SILENT[0], _SILENT[1:])
    with cli.start("stream", "-j", job_id) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=GUARD_S) == (b"", b"")
    assert process.returncode == 130
    assert connect().status(job_id).status == worker_pb.JOB_STATUS_RUNNING
    connect().stop(job_id)


# --- errors -----------------------------------------------------------------------------


@contextlib.contextmanager
def _listener(serve_one: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that is no job-worker; yields its address."""
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


_HEADERS, _SETTINGS, _END_STREAM, _END_HEADERS = 1, 4, 1, 4


def _http2_headers(*pairs: tuple[bytes, bytes], end: bool) -> bytes:
    """Return the frame of an answer's headers, which HPACK encodes as literals."""
    block = b"".join(b"\0" + b"".join(bytes([len(text)]) + text for text in pair) for pair in pairs)
    return http2_frame(_HEADERS, _END_HEADERS | (_END_STREAM if end else 0), 1, block)


_GRPC = ((b":status", b"200"), (b"content-type", b"application/grpc"))


@pytest.mark.parametrize(
    ("answer", "how"),
    [
        (_http2_headers(*_GRPC, (b"grpc-status", b"0"), end=True), ""),
        (_http2_headers(*_GRPC, end=True), ""),
        (
            _http2_headers((b":status", b"404"), (b"content-type", b"text/html"), end=True),
            ": it answers like a web server, with status 404",
        ),
        (
            _http2_headers(*_GRPC, end=False)
            + http2_frame(0, 0, 1, b"\0\0\0\0\1\xff")
            + _http2_headers((b"grpc-status", b"0"), end=True),
            "",
        ),
    ],
    ids=["no message", "no status", "web page", "no protobuf"],
)
def test_answer_of_another_kind_of_server_is_told(
    cli: _Program, certs: Path, answer: bytes, how: str
) -> None:
    """What speaks HTTP/2 may be a proxy, or a server of something else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server.pem", certs / "server-key.pem")
    context.set_alpn_protocols(["h2"])

    def serve_one(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.sendall(http2_frame(_SETTINGS))
            received = b""
            while b"jobworker.v1" not in received:
                received += tls.recv(1 << 16)
            tls.sendall(answer)
            while tls.recv(1 << 16):
                pass

    with _listener(serve_one) as address:
        assert cli.fail("status", ABSENT, "--server", address).startswith(
            f"client: what listens on {address} does not answer as a job-worker server does{how}; "
            "see --server"
        )


def test_no_server_is_told(cli: _Program) -> None:
    """The line has the address, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert cli.fail("list", "--server", address) == (
        f"client: no server listens on {address}; start the server, or see --server\n"
    )


def test_server_that_does_not_speak_tls_is_told(cli: _Program) -> None:
    """For example a web server."""
    with _listener(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address:
        assert f"what listens on {address} does not speak TLS" in cli.fail(
            "list", "--server", address
        )


def test_server_that_only_closes_is_told(cli: _Program) -> None:
    """It closes the connection without an answer."""
    with _listener(lambda _: None) as address:
        assert address in cli.fail("list", "--server", address)


def test_server_of_tls_1_2_is_refused(cli: _Program, certs: Path) -> None:
    """Even if its certificate is right."""
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
    """The line does not say that the server is down."""
    server = "no..such..host:50051"  # which no resolver has to be asked about
    assert cli.fail("list", "--server", server) == (
        f"client: the host name in {server} cannot be resolved; see --server\n"
    )


def test_server_of_another_ca_is_told(cli: _Program, foreign_certs: Path) -> None:
    """The line names possible mistakes and the options."""
    line = cli.fail("list", "--ca", str(foreign_certs / "server-ca.pem"))
    assert "was not signed by your server CA" in line
    assert "--ca" in line


@pytest.mark.parametrize("words", [["list"], ["status", "-j", ABSENT], ["stream", "-j", ABSENT]])
def test_refused_client_certificate_is_told(
    cli: _Program, foreign_certs: Path, words: list[str]
) -> None:
    """Under TLS 1.3 the server just closes the connection. The line explains that.

    No command waits for such a server, however long it may wait for one that is away.
    """
    files = ("--cert", foreign_certs / "client.pem", "--key", foreign_certs / "client-key.pem")
    status, _, stderr = cli.run(*words, *map(str, files), "--retry-for", "1h")
    assert status == 1
    assert "does not accept your client certificate" in stderr


def test_not_logged_in_is_told(stranger: _Program, program: ServerProgram) -> None:
    """The line has the command to log in."""
    for arguments in (["list"], ["start", "true"], ["stop", "-j", ABSENT]):
        assert stranger.fail(*arguments) == (
            f"client: not logged in to {program.address}; run: client login -u USER\n"
        )


@pytest.mark.parametrize("name", ["client.pem", "client-key.pem", "server-ca.pem"])
def test_missing_certificate_is_told(cli: _Program, certs: Path, tmp_path: Path, name: str) -> None:
    """The line has the path, and says whom to ask: a new CA would help nobody."""
    directory = shutil.copytree(certs, tmp_path / "certs")
    (directory / name).unlink()
    line = cli.fail("list", "--certs", str(directory))
    assert f"the certificate or key {directory / name} is missing; ask the server's oper" in line
    assert "make certs" not in line


_EMPTY, _GARBAGE = (lambda _: b""), (lambda _: b"garbage")
_BOM = b"\xef\xbb\xbf"


def _der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


def _lock(key: bytes) -> bytes:
    command = ["openssl", "pkey", "-aes128", "-passout", "pass:secret"]
    return subprocess.run(command, input=key, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("client.pem", _EMPTY, "client.pem is not a certificate in PEM"),
        ("client.pem", _GARBAGE, "client.pem is not a certificate in PEM"),
        ("client.pem", _der, "client.pem is not a certificate in PEM"),
        ("client.pem", _BOM.__add__, "client.pem begins with a byte order mark"),
        ("client.pem", "server.pem", "client-key.pem is not the key of "),
        ("client.pem", "client-key.pem", "client.pem is not a certificate in PEM"),
        ("client-key.pem", _EMPTY, "client-key.pem is not a private key in PEM;"),
        ("client-key.pem", _GARBAGE, "client-key.pem is not a private key in PEM;"),
        (
            "client-key.pem",
            _lock,
            "client-key.pem is not a private key in PEM, or needs a password",
        ),
        ("client-key.pem", _BOM.__add__, "client-key.pem begins with a byte order mark"),
        ("client-key.pem", "server-key.pem", "client-key.pem is not the key of "),
        ("client-key.pem", "client.pem", "client-key.pem is not a private key in PEM;"),
        ("server-ca.pem", _EMPTY, "server-ca.pem is not a certificate in PEM"),
        ("server-ca.pem", _GARBAGE, "server-ca.pem is not a certificate in PEM"),
        ("server-ca.pem", "server.pem", "server-ca.pem holds no certificate of a CA"),
    ],
)
def test_unusable_certificate_or_key_is_told_before_grpc_sees_it(  # noqa: PLR0913
    cli: _Program,
    certs: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes] | str,
    problem: str,
) -> None:
    """gRPC would abort the process at an empty file, and call the others a failed connection."""
    directory = shutil.copytree(certs, tmp_path / "certs")
    before = (directory / name).read_bytes()
    after = (certs / change).read_bytes() if isinstance(change, str) else change(before)
    (directory / name).write_bytes(after)
    line = cli.fail("list", "--certs", str(directory), "--server", "127.0.0.1:1")
    assert f"client: {directory}/{problem}" in line
    assert (
        "; ask the server's operator for a valid one (certs/generate.sh NAME on the server" in line
    )


@pytest.mark.parametrize("option", ["--cert", "--key", "--ca"])
def test_certificate_that_cannot_be_read_is_told(
    cli: _Program, tmp_path: Path, option: str
) -> None:
    """The line has the file and the reason."""
    assert f"cannot read {tmp_path}: Is a directory" in cli.fail("list", option, str(tmp_path))


def test_client_certificate_and_key_may_come_from_pipes(cli: _Program, certs: Path) -> None:
    """A pipe can be read only once."""
    script = (
        'exec "$0" "$1" list --json --key <(cat "$2/client-key.pem") --cert <(cat "$2/client.pem")'
    )
    command = ["bash", "-c", script, sys.executable, str(_HERE / "client.py"), str(certs)]
    subprocess.run(command, env=cli.environment, stdout=subprocess.PIPE, check=True)


_BAD_TOKENS = ["garbage", "a.b.c", "tökén", "a\nb", "\x1b", "\x7f", "Bearer x", " ", "\udcff"]
_BAD_TOKENS += ["x" * length for length in (5_000, 7_500, 7_501, 12_000, 17_000, 130_000)]


@pytest.mark.parametrize("token", _BAD_TOKENS, ids=lambda token: ascii(token)[:20])
def test_bad_token_is_told(cli: _Program, token: str) -> None:
    """The line says what to do, also for a token that gRPC refuses to send."""
    line = cli.fail("list", "-t", token)
    assert "log in again" in line or "run: client login" in line
    assert token.strip() == "" or token not in line


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\n", b"\0", b"x" * 2_000_000])
def test_kept_file_that_holds_no_token_is_told(
    stranger: _Program, kept: Path, content: bytes
) -> None:
    """The file may hold anything. A login replaces it."""
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    assert "this is not a token; log in again" in stranger.fail("list")
    stranger.read("login", "-u", "user", "-p", "user")
    assert stranger.read("list")


@pytest.mark.parametrize(
    "server", ["localhost", "::1", "[::1]", "localhost:https", ":50051", " localhost:50051"]
)
def test_server_without_a_port_is_told(stranger: _Program, server: str) -> None:
    """gRPC would take port 443."""
    assert stranger.fail("list", "--server", server) == (
        f"client: the server {server!r} is not HOST:PORT, like 127.0.0.1:50051 or [::1]:50051; "
        "see --server and JOBWORKER_SERVER\n"
    )


def test_client_raises_its_own_error_for_what_is_not_a_token(connect: Connect) -> None:
    """It raises before it calls."""
    for token in ("x" * 8_000, "a\nb", "tökén"):
        client = connect("", token=token)
        for call in (client.list, client.logout, lambda c=client: next(c.stream(ABSENT))):
            with pytest.raises(ClientError, match="this is not a token") as caught:
                call()
            assert caught.value.code == ""


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("0", 0), ("7", 7), ("86400", 86400), (None, None), ("", None)),
        *(("soon", None), ("-1", None), ("1.5", None), ("9" * 5000, None)),
    ],
    ids=lambda value: str(value)[:9],
)
def test_client_error_tells_when_to_try_again(
    pretend: Pretend, certs: Path, value: str | None, seconds: int | None
) -> None:
    """`retry_after_s` is None if the server sends no whole number of seconds."""

    def refuse(context: grpc.ServicerContext) -> Iterable[Message]:
        if value is not None:
            context.set_trailing_metadata((("retry-after", value),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many failed logins; wait 7 s")

    with Client(pretend(Login=refuse), certs=certs) as client:
        with pytest.raises(ClientError, match=r"^too many failed logins; wait 7 s$") as caught:
            client.login("user", "user")
        assert (caught.value.code, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED", seconds)


def test_when_to_try_again_is_in_the_servers_words(stranger: _Program, pretend: Pretend) -> None:
    """The command line adds nothing to the server's text."""

    def refuse(context: grpc.ServicerContext) -> Iterable[Message]:
        context.set_trailing_metadata((("retry-after", "7"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many failed logins; wait 7 s")

    assert stranger.fail("login", "-u", "u", "-p", "x", "--server", pretend(Login=refuse)) == (
        "client: too many failed logins; wait 7 s\n"
    )


@pytest.mark.parametrize("subcommand", ["remove", "status", "stop", "stream"])
def test_unknown_job_is_told(cli: _Program, subcommand: str) -> None:
    """The ID of no job, and a text that is not an ID."""
    assert cli.fail(subcommand, "-j", ABSENT).startswith("client: no such job; to see your jobs")
    assert cli.fail(subcommand, "-j", "x").startswith("client: no such job: x; a job is named by")


@pytest.mark.parametrize(
    ("command", "problem"),
    [("no-such-command", "command not found"), ("/usr", "it is a directory"), ("", "is empty")],
)
def test_command_that_cannot_be_executed_is_told(cli: _Program, command: str, problem: str) -> None:
    """The line has the name and the problem."""
    line = cli.fail("start", "-c", command)
    assert f"cannot execute {command!r}" in line
    assert problem in line


def test_argument_that_is_not_utf_8_is_told(cli: _Program) -> None:
    """The protocol cannot carry it."""
    line = cli.fail("start", "echo", os.fsdecode(b"\xff"))
    assert line.startswith(
        r"client: an argument is not valid UTF-8: '\udcff'; to send other bytes,"
    )


# --- help -------------------------------------------------------------------------------


def _parsers() -> dict[str, Any]:
    return dict(cli_module.make_parsers()[1])


@pytest.mark.parametrize("subcommand", _SUBCOMMANDS)
def test_help_of_every_subcommand_names_all_its_options(
    capsys: pytest.CaptureFixture[str], subcommand: str
) -> None:
    """Each option has an explanation."""
    with pytest.raises(SystemExit) as caught:
        main([subcommand, "--help"])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.err) == (0, "")
    for action in _parsers()[subcommand]._actions:
        assert action.help
        for option in action.option_strings:
            assert re.search(rf"(?<![\w-]){option}\b", captured.out), option


def test_help_names_every_subcommand_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """It names all of them."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert sorted(commands.COMMANDS) == _SUBCOMMANDS
    assert sorted(_parsers()) == sorted([*_SUBCOMMANDS, *_WITHOUT_A_SERVER])
    for word in (*_SUBCOMMANDS, "JOBWORKER_SERVER", "JOBWORKER_CERTS", "JOBWORKER_TOKEN"):
        assert word in shown


def _imported(environment: dict[str, str], *command: str | Path) -> set[str]:
    """Return the names of the modules that a Python program imports after Python's own start."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment | {"PYTHONPROFILEIMPORTTIME": "1"},
        text=True,
    ) as process:
        _, stderr = process.communicate(timeout=GUARD_S)
    lines = [line.rpartition("|")[2].strip() for line in stderr.splitlines() if "|" in line]
    return set(lines[lines.index("site") + 1 :])


@pytest.fixture
def launcher() -> Path:
    """The file `client`; skips the test if there is no `.venv`."""
    if not (_HERE / ".venv" / "bin" / "python").exists():
        pytest.skip("the launcher needs .venv; make it with `make setup`")
    return _HERE / "client"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["nonsense"], ["--bogus"], ["start"], ["list", "extra"], ["list"]]
    + [[subcommand, "--help"] for subcommand in _SUBCOMMANDS],
    ids=" ".join,
)
def test_what_calls_nothing_imports_nothing_to_call_with(
    stranger: _Program, tmp_path: Path, launcher: Path, arguments: list[str]
) -> None:
    """Help and mistakes, missing certificates and tokens are reported without importing grpc."""
    stranger.environment["JOBWORKER_CERTS"] = str(tmp_path)
    modules = _imported(stranger.environment, launcher, *arguments)
    assert "argparse" in modules
    roots = {module.partition(".")[0] for module in modules}
    assert not roots & {"grpc", "google", "workerservice_pb2", "authservice_pb2", "asyncio"}
    slow = {"typing", "json", "tempfile", "getpass", "datetime", "dataclasses"}
    if sys.version_info >= (3, 14):
        slow.remove("dataclasses")  # argparse itself imports it, for the colors of its help
    assert not roots & slow


def test_garbage_collector_works_while_a_command_runs(cli: _Program) -> None:
    """It ignores imported objects only, because a stream may run for days."""
    script = (
        "import atexit, gc, sys, client\n"
        "atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 10_000))\n"
        "sys.exit(client.main())"
    )
    command = [sys.executable, "-c", script, "list", "--json"]
    printed = subprocess.run(
        command, cwd=_HERE, env=cli.environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.endswith("\nTrue True\n")


def test_garbage_collector_of_another_program_is_left_alone(run: Callable[..., str]) -> None:
    """`main(argv)` does not change it."""
    before = gc.get_freeze_count()
    run("list")
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, before)


@pytest.mark.parametrize("call", ["absolute", "relative", "bare", "path", "link", "chain"])
def test_launcher_works_from_wherever_it_is_called(
    tmp_path: Path, launcher: Path, call: str
) -> None:
    """By its path, its name, PATH and links. It imports nothing from the current directory."""
    home = tmp_path / "a place"
    home.mkdir()
    for path in (*_HERE.glob("*.py"), _HERE / ".venv"):
        (home / path.name).symlink_to(path)
    shutil.copy(launcher, home / "client")
    here = tmp_path / "here"
    here.mkdir()
    for name in ("client.py", "__future__.py"):
        (here / name).write_text("raise SystemExit('not this one')")
    (here / "link").symlink_to("../a place/client")
    (here / "chain").symlink_to("link")
    calls: dict[str, tuple[list[str | Path], Path]] = {
        "absolute": ([home / "client"], here),
        "relative": (["../a place/client"], here),
        "bare": (["sh", "client"], home),
        "path": (["client"], here),
        "link": (["./link"], here),
        "chain": ([here / "chain"], Path("/")),
    }
    command, cwd = calls[call]
    result = subprocess.run(
        [*command, "--help"],
        cwd=cwd,
        env=clean_environment() | {"PATH": f"{home}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout[:13], result.stderr) == (0, "usage: client", "")


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_during_the_import_shows_no_traceback(tmp_path: Path, launcher: Path) -> None:
    (tmp_path / ".venv").symlink_to(_HERE / ".venv")
    shutil.copy(launcher, tmp_path / "client")
    (tmp_path / "client.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    result = subprocess.run([tmp_path / "client"], capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (130, b"")


def test_launcher_hands_on_every_word_and_hides_secrets(stranger: _Program, launcher: Path) -> None:
    """Also empty words; like `client.py` it hides secrets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stranger.environment["JOBWORKER_SERVER"] = f"127.0.0.1:{listener.getsockname()[1]}"
        arguments = ["start", "-t", _SECRET, "--", "a b", "", "-h", "*"]
        with subprocess.Popen([launcher, *arguments], env=stranger.environment) as process:
            listener.settimeout(GUARD_S)
            connection, _ = listener.accept()
            with connection:  # which is never answered
                shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode().split("\0")
                assert shown[-len(arguments) - 1 : -1] == [
                    *("start", "-t", "*" * len(_SECRET), "--", "a b", "", "-h", "*")
                ]
                process.kill()


@pytest.mark.parametrize("launcher", ["client", "server"])
def test_launcher_without_its_environment_says_what_to_run(tmp_path: Path, launcher: str) -> None:
    """In a new clone, called from anywhere and through a link."""
    shutil.copy(_HERE / launcher, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / launcher)
    result = subprocess.run(
        [tmp_path / "link", "--help"], capture_output=True, text=True, cwd="/", check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"{launcher}: run 'make -C {tmp_path} setup' first\n"


# --- the class --------------------------------------------------------------------------


def test_client_does_it_all_for_another_program(connect: Connect) -> None:
    """Its methods log in, start, stream, show, stop and list."""
    client = connect("")
    token, _ = client.login("user", "user")
    assert client.token == token
    job_id = client.start("echo", ["a", "b"])
    assert b"".join(client.stream(job_id)) == b"a b\n"
    assert b"".join(client.stream(job_id, offset=2)) == b"b\n"
    assert client.status(job_id).exit_code == 0
    assert client.stop(job_id).status == worker_pb.JOB_STATUS_FINISHED
    assert job_id in [job.job_id for job in client.list()]


def test_client_that_logged_out_has_no_token(connect: Connect) -> None:
    """Its next call fails; so does that of another client with the same token."""
    client = connect("")
    token, _ = client.login("user", "user")
    other = connect("", token=token)
    assert other.list() is not None
    client.logout()
    assert client.token == ""
    for each in (client, other):
        with pytest.raises(ClientError) as caught:
            each.list()
        assert caught.value.code == "UNAUTHENTICATED"


def test_client_error_tells_the_code(connect: Connect) -> None:
    """`code` is the name of the gRPC status, and empty if there was no call."""
    client = connect()
    calls: dict[str, Callable[[], object]] = {
        "NOT_FOUND": lambda: client.status(ABSENT),
        "INVALID_ARGUMENT": lambda: client.stop("x"),
        "UNAUTHENTICATED": lambda: connect("").list(),
        "UNAVAILABLE": lambda: connect("user", "no..such..host:1").list(),
        "": lambda: connect("user", certs="/nowhere"),
    }
    for code, call in calls.items():
        with pytest.raises(ClientError) as caught:
            call()
        assert caught.value.code == code


def test_fork_that_closes_the_client_ends_nothing(cli: _Program, certs: Path) -> None:
    """gRPC's `close` would wait for ever for a thread that the fork does not have."""
    script = """if True:
        import os, sys
        from client import Client

        with Client(sys.argv[1], certs=sys.argv[2], token=os.environ["JOBWORKER_TOKEN"]) as client:
            job_id = client.start("sh", ["-c", "echo x; exec sleep 1000000"])
            output = client.stream(job_id)
            print(next(output), flush=True)
            if os.fork():
                print(os.wait()[1], client.stop(job_id).job_id == job_id, flush=True)
    """
    words = (cli.environment["JOBWORKER_SERVER"], str(certs))
    with subprocess.Popen(
        [sys.executable, "-c", script, *words],
        cwd=_HERE,
        env=cli.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # gRPC tells that it did not prepare for the fork
        start_new_session=True,
    ) as process:
        try:
            stdout, _ = process.communicate(timeout=GUARD_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert stdout == b"b'x\\n'\n0 True\n"


def test_one_text_is_no_list_of_arguments(connect: Connect) -> None:
    """protobuf would take each of its characters for an argument."""
    with pytest.raises(TypeError, match="args must be a sequence of strings"):
        connect().start("echo", "text")


@pytest.mark.parametrize("name", ["stream", "watch"])
def test_client_that_is_closed_meanwhile_says_so(connect: Connect, name: str) -> None:
    """And not that the server closed the connection."""
    client = connect()
    job_id = client.start(*FOREVER)
    events: Iterator[Any] = client.stream(job_id) if name == "stream" else client.watch()
    next(events)
    closing = threading.Timer(0.1, client.close)
    closing.start()
    with pytest.raises(ClientError, match="this client was closed"):
        list(events)
    closing.join()
    connect().stop(job_id)


@pytest.mark.parametrize("suites", ["", "ECDHE-ECDSA-AES256-GCM-SHA384"])
def test_client_leaves_alone_how_a_program_set_tls(cli: _Program, suites: str) -> None:
    """Only if a program has not set which suites its channels may use, `Client` does."""
    script = (
        "import os; from client import Client\n"
        "with Client(os.environ['JOBWORKER_SERVER'], certs=os.environ['JOBWORKER_CERTS'],\n"
        "            token=os.environ['JOBWORKER_TOKEN']) as client: client.list()\n"
        "print(os.environ['GRPC_SSL_CIPHER_SUITES'])"
    )
    set_by_us = {"GRPC_SSL_CIPHER_SUITES": suites} if suites else {}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=_HERE,
        env=cli.environment | set_by_us,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert (result.stdout, result.stderr) == (f"{suites or 'ECDHE-PSK-AES256-CBC-SHA'}\n", "")


def test_client_may_be_used_from_several_threads(connect: Connect) -> None:
    """Each thread gets the answers to its own calls."""
    client = connect()

    def echo(number: int) -> bool:
        job_id = client.start("echo", [str(number)])
        return b"".join(client.stream(job_id)) == f"{number}\n".encode()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(echo, range(24)))


def test_close_ends_open_streams_and_may_be_repeated(connect: Connect) -> None:
    """A thread that waits for output gets an error."""
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


# --- limits that are not in force -------------------------------------------------------


def test_limit_that_is_not_in_force_is_told_at_the_start(cli: _Program) -> None:
    """With --limits auto, as here; only of a limit that was asked for."""
    status, stdout, stderr = cli.run("start", "--memory", "100M", "--pids", "50", "--", "true")
    assert status == 0
    limits = json.loads(cli.read("status", "--json", stdout.decode().strip()))["limits"] or {}
    options = {"--memory": "memory_bytes", "--pids": "pids"}
    missing = [option for option, field in options.items() if limits.get(field) is None]
    if missing:
        assert "not in force, because the server's host cannot enforce it: " in stderr
        assert f": {', '.join(missing)}; " in stderr
    else:
        assert stderr == ""
    assert cli.run("start", "--", "true")[2] == ""


def test_help_says_that_io_limits_are_of_disks(cli: _Program) -> None:
    """Output on stdout goes through a pipe, whose rate nothing limits."""
    assert "written to each disk; not to stdout" in " ".join(cli.read("start", "--help").split())
