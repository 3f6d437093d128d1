"""Tests of the client's side of output: parts of it, times, and connections that break off."""

from __future__ import annotations

import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

import following
import workerservice_pb2 as worker_pb
from client import Client, ClientError
from testkit import GUARD_S, make_fifo
from testproxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from testkit import ClientProgram, ServerProgram

    Connect = Callable[..., Client]


@pytest.fixture
def connect_options() -> dict[str, Any]:
    """The clients go on after a lost connection, as they do by default."""
    return {}


def _finished(client: Client, script: str) -> str:
    """Run a shell script to its end; return the job's ID."""
    job_id = client.start("sh", ["-c", script])
    list(client.stream(job_id))
    return job_id


# --- parts of the output ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tail", "2"], b"4\n5\n"),
        (["--tail", "0"], b""),
        (["--tail", "99"], b"1\n2\n3\n4\n5\n"),
        (["--tail", "2", "--offset", "8"], b"5\n"),
        (["--tail", "2", "--offset", "2"], b"4\n5\n"),
        (["--since", "1h"], b"1\n2\n3\n4\n5\n"),
        (["--since", "1h", "--tail", "1"], b"5\n"),
        (["--since", "0"], b""),
        (["--no-follow"], b"1\n2\n3\n4\n5\n"),
        (["--no-retry"], b"1\n2\n3\n4\n5\n"),
    ],
)
def test_stream_shows_the_part_that_is_asked_for(
    cli: ClientProgram, connect: Connect, options: list[str], expected: bytes
) -> None:
    """Of a finished job: the last lines, what is recent, or what begins at a byte."""
    job_id = _finished(connect(), "seq 5")
    assert cli.run("stream", "-j", job_id, *options) == (0, expected, "")


def test_stream_without_following_ends_while_the_job_runs(
    cli: ClientProgram, connect: Connect, public: Path
) -> None:
    """With exit status 0, because nothing that was asked for is missing."""
    fifo, client = make_fifo(public / "go"), connect()
    job_id = client.start("sh", ["-c", f"seq 3; read _ <{fifo}; echo 4"])
    chunks = client.stream(job_id)
    received = b""
    while received != b"1\n2\n3\n":
        received += next(chunks)
    assert cli.run("stream", "-j", job_id, "--no-follow") == (0, b"1\n2\n3\n", "")
    brief = client.stream(job_id, follow=False)
    assert b"".join(brief) == b"1\n2\n3\n"
    assert brief.end is not None
    assert (brief.end.status, brief.end.end_reason) == ("RUNNING", "UNSPECIFIED")
    last = client.stream(job_id, tail_lines=1)
    assert next(last) == b"3\n"
    fifo.write_text("go\n")
    assert b"".join(chunks) == b"".join(last) == b"4\n"


def test_stream_without_following_tells_no_end_that_it_has_not_reached(
    connect: Connect, public: Path
) -> None:
    """The job ends while the output so far is being read, and has written more by then."""
    fifo, client, size = make_fifo(public / "go"), connect(), 32 * 1024 * 1024
    script = f"head -c {size} /dev/zero; read _ <{fifo}; echo more"
    job_id = client.start("sh", ["-c", script])
    assert len(next(client.stream(job_id, size - 1))) == 1
    brief = client.stream(job_id, follow=False)
    received = len(next(brief))  # gRPC holds the rest back
    fifo.write_text("go\n")
    assert b"".join(client.stream(job_id, size)) == b"more\n"
    received += sum(map(len, brief))
    assert received == size
    assert brief.end is not None
    assert brief.end.status == "RUNNING"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--tail", "-1"], "'-1' is not a whole number, 0 or more"),
        (["--tail", "x"], "'x' is not a whole number"),
        (["--since", "yesterday"], "'yesterday' is not"),
    ],
)
def test_wrong_part_is_a_usage_error(cli: ClientProgram, options: list[str], error: str) -> None:
    """With exit status 2 and one line that names the value."""
    status, _, stderr = cli.run("stream", "-j", "x", *options)
    assert status == 2
    assert error in stderr


# --- times ----------------------------------------------------------------------------------


def test_timestamps_tell_when_each_line_was_written(cli: ClientProgram, connect: Connect) -> None:
    """Also of lines that came in pieces, and long after they were written."""
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    job_id = _finished(connect(), "printf 'a\\nb'; sleep 0.3; printf 'c\\n\\nd'")
    after = datetime.now(UTC)
    status, stdout, stderr = cli.run("stream", "-j", job_id, "--timestamps")
    assert (status, stderr) == (0, "")
    lines = stdout.decode().split("\n")
    stamps = [datetime.fromisoformat(line.partition(" ")[0]) for line in lines]
    assert [line.partition(" ")[2] for line in lines] == ["a", "bc", "", "d"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", line) for line in lines)
    assert before <= stamps[0] == stamps[1] < stamps[2] == stamps[3] <= after
    assert stamps[2] - stamps[1] >= timedelta(seconds=0.2)


def test_client_tells_times_only_if_they_are_asked_for(connect: Connect) -> None:
    """A message without a time is as short as before."""
    client = connect()
    job_id = _finished(client, "echo x")
    chunks = client.stream(job_id)
    assert (next(chunks), chunks.written_at, chunks.offset) == (b"x\n", None, 2)
    chunks = client.stream(job_id, timestamps=True)
    next(chunks)
    assert chunks.written_at is not None
    assert abs(datetime.now(UTC) - chunks.written_at) < timedelta(minutes=5)


def test_time_that_is_no_date_is_no_time() -> None:
    """A server may send any number."""
    message = worker_pb.StreamOutputResponse(data=b"x")
    message.written_at.seconds = 1 << 62
    assert following._moment(message) is None


# --- lost connections -----------------------------------------------------------------------


def test_stream_continues_at_the_right_byte_after_lost_connections(
    connect: Connect, proxy: Proxy
) -> None:
    """Exactly once each byte, at whatever byte the connection broke off; each loss is told."""
    size = 60_000_000
    job_id = connect().start("head", ["-c", str(size), "/dev/urandom"])
    lost: list[tuple[str, int | None]] = []
    client = connect(address=proxy.address)
    chunks = client.stream(job_id, on_lost=lambda error, at: lost.append((error.code, at)))
    received, cuts = bytearray(), 0
    for data in chunks:
        assert chunks.offset == len(received) + len(data)
        received += data
        if len(received) > (cuts + 1) * 15_000_000 and cuts < 3:
            cuts += 1
            proxy.cut()
    assert bytes(received) == b"".join(connect().stream(job_id))
    assert len(received) == size
    assert 1 <= len(lost) <= 3  # gRPC still had the rest, if it is fewer
    assert {code for code, _ in lost} == {"UNAVAILABLE"}
    assert chunks.end is not None
    assert chunks.end.exit_code == 0


def test_silent_stream_continues_and_says_so(
    cli: ClientProgram, connect: Connect, proxy: Proxy, public: Path
) -> None:
    """There was no byte yet: the server's headers tell that it had accepted the stream."""
    fifo, client = make_fifo(public / "go"), connect()
    job_id = client.start("sh", ["-c", f"read _ <{fifo}; echo done"])
    with cli.start("stream", "-j", job_id, "--server", proxy.address) as process:
        assert process.stdout
        assert process.stderr
        while not client.status(job_id).subscribers:
            list(client.stream(job_id, follow=False))
        proxy.cut()
        line = process.stderr.readline().decode()
        assert line.startswith(f"client: {proxy.address} closed the connection: ")
        assert line.endswith("; trying to continue at byte 0\n")
        fifo.write_text("go\n")
        assert process.stdout.read() == b"done\n"
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("subcommand", ["stream", "run"])
def test_command_line_continues_behind_what_it_has_written(
    cli: ClientProgram, connect: Connect, proxy: Proxy, public: Path, subcommand: str
) -> None:
    """`run` does it too, exits as the job does, and tells no loss that is over within 30 s."""
    fifo, client = make_fifo(public / "go"), connect()
    script = f"echo one; read _ <{fifo}; echo two; exit 3"
    arguments = ["run", "--", "sh", "-c", script]
    if subcommand == "stream":
        arguments = ["stream", "-j", client.start("sh", ["-c", script])]
    arguments[1:1] = ["--server", proxy.address]
    with cli.start(*arguments) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"one\n"
        proxy.cut()
        if subcommand == "stream":
            assert process.stderr.readline().endswith(b"; trying to continue at byte 4\n")
        fifo.write_text("go\n")
        assert process.stdout.read() == b"two\n"
        assert process.stderr.read() == b""
    assert process.returncode == (0 if subcommand == "stream" else 3)


def test_without_retry_a_lost_connection_is_an_error(
    cli: ClientProgram, connect: Connect, proxy: Proxy
) -> None:
    """The line says with which offset to continue."""
    client = connect()
    job_id = client.start("sh", ["-c", "echo one; exec sleep infinity"])
    arguments = ("stream", "-j", job_id, "--server", proxy.address, "--no-retry")
    with cli.start(*arguments) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"one\n"
        proxy.cut()
        lines = process.stderr.read().decode()
    assert process.returncode == 1
    assert re.fullmatch(r"client: [^\n]+; to continue from here, use --offset 4\n", lines)
    client.stop(job_id)


def test_job_that_a_killed_server_has_lost_is_told(
    cli: ClientProgram,
    connect: Connect,
    start_server: Callable[..., ServerProgram],
    make_state: Callable[[], Path],
) -> None:
    """The client tries until the server is back, and does not try for ever."""
    state = make_state()
    program = start_server(state=state)
    job_id = connect(address=program.address).start("sh", ["-c", "echo one; exec sleep infinity"])
    with cli.start("stream", "-j", job_id, "--server", program.address) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"one\n"
        program.end(signal.SIGKILL)
        assert process.stderr.readline().endswith(b"; trying to continue at byte 4\n")
        start_server("--listen", program.address, state=state)
        last = process.stderr.read().decode()
    assert process.returncode == 1
    assert last == (
        "client: the job did not exit by itself: FINISHED (lost); the output may be incomplete\n"
    )


def test_shutdown_of_the_server_is_the_end_of_the_job_and_no_lost_connection(
    cli: ClientProgram, connect: Connect, start_server: Callable[..., ServerProgram]
) -> None:
    """The server tells how the job ended, so nothing is tried again."""
    program = start_server()
    job_id = connect(address=program.address).start("sh", ["-c", "echo one; exec sleep infinity"])
    with cli.start("stream", "-j", job_id, "--server", program.address) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"one\n"
        program.end()
        assert "trying to continue" not in process.stderr.read().decode()
    assert process.returncode == 1


def test_server_that_never_answered_is_not_tried_for_minutes(cli: ClientProgram) -> None:
    """Nobody waits five minutes for a mistyped address or a wrong certificate."""
    job_id = "0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98"
    status, _, stderr = cli.run(
        "stream", "-j", job_id, "--server", "127.0.0.1:1", "--retry-for", "1s"
    )
    assert status == 1
    assert stderr.startswith("client: no server listens on 127.0.0.1:1")


def test_gap_before_a_lost_connection_is_remembered(
    connect: Connect, start_server: Callable[..., ServerProgram], tmp_path: Path, public: Path
) -> None:
    """The continued stream begins behind the gap, but the output is not whole."""
    config = tmp_path / "config.toml"
    config.write_text('[per_job]\nkept_output = "100"\n')
    program = start_server("--config", str(config))
    fifo, whole = make_fifo(public / "go"), connect(address=program.address)
    job_id = whole.start("sh", ["-c", f"seq 1000; read _ <{fifo}; echo end"])
    proxy = Proxy(program.address)
    try:
        while (job := whole.status(job_id)).output_bytes + job.output_lost_bytes < 3893:
            list(whole.stream(job_id, follow=False, offset=4000))
        chunks = connect(address=proxy.address).stream(job_id, on_lost=lambda *_: None)
        received = next(chunks) + next(chunks)
        assert chunks.gap == (50, 3793)
        with ThreadPoolExecutor(1) as pool:
            more = pool.submit(next, chunks)
            proxy.cut()
            fifo.write_text("go\n")
            assert more.result(GUARD_S) == b"end\n"
        with pytest.raises(ClientError, match="3793 bytes of output were not kept") as caught:
            next(chunks)
        assert caught.value.code == "DATA_LOSS"
        assert len(received) == 100
    finally:
        proxy.close()


def test_close_ends_the_attempts(connect: Connect, proxy: Proxy) -> None:
    """A thread that waits before its next attempt gets an error at once."""
    client = connect()
    job_id = client.start("sh", ["-c", "echo one; exec sleep infinity"])
    lost = threading.Event()
    chunks = connect(address=proxy.address).stream(job_id, on_lost=lambda *_: lost.set())
    assert next(chunks) == b"one\n"
    with ThreadPoolExecutor(1) as pool:
        more = pool.submit(next, chunks)
        proxy.close()
        assert lost.wait(GUARD_S)
        chunks.close()
        with pytest.raises(ClientError):
            more.result(GUARD_S)
    client.stop(job_id)


def test_reader_of_stdout_that_leaves_ends_the_stream(cli: ClientProgram, connect: Connect) -> None:
    """As `head` does; it is no lost connection."""
    job_id = _finished(connect(), "seq 1000000")
    with cli.start("stream", "-j", job_id, "--timestamps") as process:
        assert process.stdout
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(GUARD_S) == 141
