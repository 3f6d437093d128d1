"""Tests of input: the RPC WriteInput, and what of it a job and its callers see.

The library's part of it is tested in test_jobinput.py, the client's in test_sending.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import records
import workerservice_pb2 as worker_pb
from testkit import GUARD_S, follow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from client import Client
    from server import Server

_PIPE_BYTES = 64 * 1024  # pipe(7)


class _Call:
    """A call of WriteInput, which sends what `send` gets."""

    def __init__(self, client: Client, job_id: str, offset: int = 0, **first: Any) -> None:
        self._messages: SimpleQueue[worker_pb.WriteInputRequest | None] = SimpleQueue()
        self.send(job_id=job_id, offset=offset, **first)
        self._call = client._worker.WriteInput.future(
            iter(self._messages.get, None), metadata=client._link.metadata(), timeout=GUARD_S
        )

    def send(self, **fields: Any) -> None:
        self._messages.put(worker_pb.WriteInputRequest(**fields))

    def half_close(self) -> None:
        """Send no more messages, without an end of the input."""
        self._messages.put(None)

    def cancel(self) -> None:
        self._call.cancel()
        self.half_close()

    def answer(self) -> tuple[int, bool]:
        """Block for the answer: the bytes that the job has got, and whether the input has ended."""
        response = self._call.result(GUARD_S)
        self.half_close()
        return response.stdin.bytes, response.stdin.ended

    def error(self) -> tuple[str, str]:
        """Block for the error: its status and message."""
        error = self._call.exception(GUARD_S)
        self.half_close()
        assert isinstance(error, grpc.RpcError)
        return self._call.code().name, self._call.details()


@pytest.fixture
def client(connect: Callable[..., Client]) -> Client:
    return connect()


@pytest.fixture
def running(client: Client) -> Iterator[Callable[..., str]]:
    """Starts jobs with an input, and stops them after the test."""
    started = []

    def start(*argv: str) -> str:
        started.append(client.start(argv[0], argv[1:], stdin=True))
        return started[-1]

    yield start
    for job_id in started:
        client.stop(job_id)


def _read(client: Client, job_id: str) -> bytes:
    return b"".join(client.stream(job_id))


def test_every_byte_and_the_end_reach_the_job(client: Client, running: Callable[..., str]) -> None:
    """Any byte, in messages of any size, empty ones too."""
    job_id = running("cat")
    data = bytes(range(256)) * 1000
    call = _Call(client, job_id)
    sent = 0
    for size in (0, 1, 4095, 65_537, 0, len(data)):
        call.send(data=data[sent : sent + size])
        sent += size
    call.send(end=True)
    assert call.answer() == (len(data), True)
    assert _read(client, job_id) == data


def test_bytes_reach_a_job_while_the_call_goes_on(
    client: Client, running: Callable[..., str]
) -> None:
    job_id = running("cat")
    call = _Call(client, job_id, data=b"one\n")
    chunks = client.stream(job_id)
    assert next(chunks) == b"one\n"
    call.send(data=b"two\n")
    assert next(chunks) == b"two\n"
    call.send(job_id=job_id, data=b"three\n", end=True)  # naming the job again is no error
    assert b"".join(chunks) == b"three\n"
    assert call.answer() == (14, True)


def test_call_that_ends_or_breaks_off_leaves_the_input_open(
    client: Client, running: Callable[..., str]
) -> None:
    """`Job.stdin` says at which byte the next call continues."""
    job_id = running("cat")
    call = _Call(client, job_id, data=b"one ")
    call.half_close()
    assert call.answer() == (4, False)
    call = _Call(client, job_id, 4, data=b"two ")
    chunks = client.stream(job_id)
    output = next(chunks)
    while output != b"one two ":
        output += next(chunks)
    call.cancel()
    stdin = client.status(job_id).stdin
    assert (stdin.bytes, stdin.ended) == (8, False)
    assert _Call(client, job_id, 8, data=b"three", end=True).answer() == (13, True)
    assert b"".join(chunks) == b"three"
    stdin = client.status(job_id).stdin
    assert (stdin.bytes, stdin.ended) == (13, True)


def test_job_that_does_not_read_holds_back_the_caller(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    """The pipe takes 64 KiB, and the server some 256 KiB more, of the 64 MB that are sent."""
    server = serve()
    client = connect(address=server.address)
    taken = 0

    def messages() -> Iterator[worker_pb.WriteInputRequest]:
        nonlocal taken
        yield worker_pb.WriteInputRequest(job_id=job_id)
        for _ in range(1000):
            taken += _PIPE_BYTES
            yield worker_pb.WriteInputRequest(data=bytes(_PIPE_BYTES))

    job_id = client.start("sleep", ["infinity"], stdin=True)
    job: Any = server._worker._job(job_id)
    job_input = job._input
    call = client._worker.WriteInput.future(messages(), metadata=client._link.metadata())
    with job_input._changed:
        assert job_input._changed.wait_for(lambda: job_input.size == _PIPE_BYTES, GUARD_S)
    for _ in range(100):  # meanwhile a server that reads on would have read all
        client.status(job_id)
    client.stop(job_id)
    assert call.exception(GUARD_S).code() is grpc.StatusCode.FAILED_PRECONDITION
    stdin = client.status(job_id).stdin
    assert (stdin.bytes, stdin.ended) == (_PIPE_BYTES, True)
    assert taken < 2 * 1024 * 1024


@pytest.mark.parametrize("end", ["stop", "exit", "close"])
@pytest.mark.parametrize("state", ["waits for a message", "waits for the job"])
def test_end_of_the_job_or_of_its_stdin_ends_the_call(
    client: Client, running: Callable[..., str], end: str, state: str
) -> None:
    script = {"stop": "", "exit": "read -r line; exit;", "close": "read -r line; exec <&-;"}[end]
    job_id = running("sh", "-c", f"echo ready; {script} exec sleep infinity")
    chunks = follow(client, job_id)
    call = _Call(client, job_id)
    if state == "waits for the job":
        call.send(data=(b"" if end == "stop" else b"\n") + bytes(2 * _PIPE_BYTES))
    if end == "stop":
        client.stop(job_id)
    elif state == "waits for a message":
        call.send(data=b"\n")
    code, message = call.error()
    assert code == "FAILED_PRECONDITION"
    assert "takes no input: it has " in message
    chunks.close()


def test_what_was_sent_is_written_in_the_order_of_the_offsets(
    client: Client, running: Callable[..., str]
) -> None:
    """A call that continues at another byte than the next one is refused, and writes nothing."""
    job_id = running("cat")
    call = _Call(client, job_id, data=b"12345")
    call.half_close()
    assert call.answer() == (5, False)
    for offset in (4, 6, 1 << 63):
        code, message = _Call(client, job_id, offset, data=b"x").error()
        assert code == "OUT_OF_RANGE"
        assert message.endswith("continue at 5")
    assert _Call(client, job_id, 5, end=True).answer() == (5, True)
    assert _read(client, job_id) == b"12345"


def test_newer_call_takes_over(client: Client, running: Callable[..., str]) -> None:
    """The former call may be one whose connection is lost."""
    job_id = running("cat")
    before = _Call(client, job_id, data=b"one ")
    chunks = client.stream(job_id)
    assert next(chunks) == b"one "
    now = _Call(client, job_id, 4, data=b"two")
    assert before.error() == ("ABORTED", f"another call writes the input of job {job_id} now")
    now.send(end=True)
    assert now.answer() == (7, True)
    assert b"".join(chunks) == b"two"


def test_input_is_refused_without_stdin_after_its_end_and_after_the_job(
    client: Client, running: Callable[..., str]
) -> None:
    without = client.start("sleep", ["infinity"])
    assert not client.status(without).HasField("stdin")
    code, message = _Call(client, without, data=b"x").error()
    assert (code, "was started without an input" in message) == ("FAILED_PRECONDITION", True)
    client.stop(without)
    ended = running("sh", "-c", "cat; exec sleep infinity")
    _Call(client, ended, end=True).answer()
    code, message = _Call(client, ended, data=b"x").error()
    assert (code, "its input was ended" in message) == ("FAILED_PRECONDITION", True)
    client.stop(ended)
    code, message = _Call(client, ended, data=b"x").error()
    assert (code, "it has ended" in message) == ("FAILED_PRECONDITION", True)


def test_call_writes_to_one_job(client: Client, running: Callable[..., str]) -> None:
    one, other = running("cat"), running("cat")
    call = _Call(client, one)
    call.send(job_id=other, data=b"x")
    assert call.error()[0] == "INVALID_ARGUMENT"
    assert [client.status(job_id).stdin.bytes for job_id in (one, other)] == [0, 0]


def test_message_has_a_bounded_size(client: Client, running: Callable[..., str]) -> None:
    """Because it stays in memory for as long as the job does not read."""
    job_id = running("cat")
    call = _Call(client, job_id, data=b"x" * 262_144)
    call.send(data=b"x" * 262_145)
    code, message = call.error()
    assert (code, "the ceiling is 262144" in message) == ("INVALID_ARGUMENT", True)
    assert client.status(job_id).stdin.bytes == 262_144


def test_logout_ends_the_call(
    connect: Callable[..., Client], client: Client, running: Callable[..., str]
) -> None:
    job_id = running("cat")
    other = connect(token="")
    other.login("user", "user")
    call = _Call(other, job_id, data=b"x")
    assert next(client.stream(job_id)) == b"x"
    other.logout()
    assert call.error()[0] == "UNAUTHENTICATED"


def test_repeated_start_must_ask_for_the_same_stdin(client: Client) -> None:
    """A request ID belongs to a start with an input, or to one without."""
    request_id = "0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98"
    job_id = client.start("true", request_id=request_id)
    assert client.start("true", request_id=request_id) == job_id
    with pytest.raises(Exception, match="belongs to the start of job"):
        client.start("true", request_id=request_id, stdin=True)


def test_large_input_arrives_whole(client: Client, running: Callable[..., str]) -> None:
    data = os.urandom(8 << 20)
    job_id = running("sha256sum")
    call = _Call(client, job_id)
    for begin in range(0, len(data), 1 << 18):
        call.send(data=data[begin : begin + (1 << 18)])
    call.send(end=True)
    assert call.answer() == (len(data), True)
    assert _read(client, job_id).split()[0].decode() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("state", ["waits for a message", "waits for the job"])
def test_shutdown_ends_the_call(
    serve: Callable[..., Server], connect: Callable[..., Client], state: str
) -> None:
    server = serve()
    client = connect(address=server.address)
    job_id = client.start("sh", ["-c", "echo ready; exec sleep infinity"], stdin=True)
    chunks = follow(client, job_id)
    call = _Call(client, job_id, data=b"x" if state == "waits for a message" else bytes(200_000))
    job: Any = server._worker._job(job_id)
    with job._input._changed:
        assert job._input._changed.wait_for(lambda: job._input.size, GUARD_S)
    server.stop()
    assert call.error()[0] in {"FAILED_PRECONDITION", "UNAVAILABLE"}
    chunks.close()


@pytest.mark.parametrize("end", ["answer", "error", "cancel"])
def test_ended_call_leaves_no_thread_and_no_stream(
    serve: Callable[..., Server], connect: Callable[..., Client], end: str
) -> None:
    """The thread that reads the messages ends with the call, however the call ends."""
    server = serve(max_streams=2)
    client = connect(address=server.address)
    job_id = client.start("sh", ["-c", "echo ready; exec sleep infinity"], stdin=True)
    job: Any = server._worker._job(job_id)
    job_input, changed = job._input, job._input._changed
    for offset in range(4):  # more calls than there may be streams
        call = _Call(client, job_id, offset, data=b"x")
        if end == "answer":
            call.half_close()
            assert call.answer() == (offset + 1, False)
        elif end == "error":
            call.send(job_id=str(uuid.uuid4()))
            assert call.error()[0] == "INVALID_ARGUMENT"
        else:
            with changed:
                assert changed.wait_for(lambda: job_input.size > offset, GUARD_S)  # noqa: B023
            call.cancel()
            with changed:
                assert changed.wait_for(lambda: not job_input._users, GUARD_S)
        for thread in threading.enumerate():
            if thread.name == "input-messages":
                thread.join(GUARD_S)
                assert not thread.is_alive()
    client.stop(job_id)


def test_calls_beyond_the_allowance_share_a_line_of_the_audit_log(
    serve: Callable[..., Server],
    connect: Callable[..., Client],
    make_state: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user can make any number of calls without input, and could fill the disk with lines."""
    state = make_state()
    client = connect(address=serve(state_dir=state).address)
    job_id = client.start("sleep", ["infinity"], stdin=True)
    monkeypatch.setattr(records, "_ALLOWANCE_BYTES", 0)
    for _ in range(5):
        call = _Call(client, job_id)
        call.half_close()
        assert call.answer() == (0, False)
    client.stop(job_id)
    lines = map(json.loads, (state / "audit.log").read_text().splitlines())
    assert [line for line in lines if "WriteInput" in line["rpc"] and "calls" not in line] == []


def test_audit_log_has_a_line_for_each_call_and_not_the_input(
    serve: Callable[..., Server], connect: Callable[..., Client], make_state: Callable[[], Path]
) -> None:
    state = make_state()
    client = connect(address=serve(state_dir=state).address)
    job_id = client.start("cat", stdin=True)
    client.write_input(job_id, b"secret")
    list(client.stream(job_id))
    text = (state / "audit.log").read_text()
    (line,) = [each for each in map(json.loads, text.splitlines()) if "WriteInput" in each["rpc"]]
    assert (line["job"], line["user"], line["outcome"]) == (job_id, "user", "OK")
    assert "secret" not in text
