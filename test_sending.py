"""Tests of the client's side of input: `Client.write_input`, over connections that break off.

Between client and server stands a proxy that the test can cut.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from client import Client, ClientError
from sending import _MESSAGE_BYTES, _WINDOW_BYTES, Sending
from testkit import GUARD_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from testproxy import Proxy


@pytest.fixture
def connect_options() -> dict[str, Any]:
    """The clients go on after a lost connection, as they do by default."""
    return {}


@pytest.fixture
def client(connect: Callable[..., Client]) -> Client:
    return connect()


def test_input_from_bytes_and_from_any_iterable(client: Client) -> None:
    data = os.urandom(3 * _MESSAGE_BYTES + 1)
    parts: list[bytes | bytearray] = [data[:10], b"", bytearray(data[10:])]
    for source in (data, bytearray(data), memoryview(data), iter(parts), b"", [b""]):
        job_id = client.start("cat", stdin=True)
        client.write_input(job_id, source)
        expected = data if not isinstance(source, list) and source != b"" else b""
        assert b"".join(client.stream(job_id)) == expected


def test_input_longer_than_what_is_kept_arrives_whole(client: Client) -> None:
    """The client keeps 4 MiB and gets them acknowledged by an answer."""
    data = os.urandom(3 * _WINDOW_BYTES + 12_345)
    job_id = client.start("cat", stdin=True)
    writing = threading.Thread(target=client.write_input, args=(job_id, data))
    writing.start()
    assert b"".join(client.stream(job_id)) == data
    writing.join()


def test_input_continues_after_lost_connections(
    connect: Callable[..., Client], proxy: Proxy, client: Client
) -> None:
    """Exactly once each byte, at whatever byte the connection broke off."""
    data = os.urandom(2 * _WINDOW_BYTES)
    job_id = client.start("cat", stdin=True)
    sender = connect(address=proxy.address)
    writing = threading.Thread(target=sender.write_input, args=(job_id, data))
    writing.start()
    for _ in range(4):
        proxy.await_passed(1_000_000)
        proxy.cut()
    assert b"".join(client.stream(job_id)) == data
    writing.join()
    assert client.status(job_id).stdin.bytes == len(data)


def test_lost_connection_is_no_end_of_the_input(
    connect: Callable[..., Client], proxy: Proxy, client: Client
) -> None:
    """Also while there is nothing to send: what comes later continues."""
    more = threading.Event()

    def data() -> Iterator[bytes]:
        yield b"one "
        assert more.wait(GUARD_S)
        yield b"two"

    job_id = client.start("cat", stdin=True)
    chunks = client.stream(job_id)
    sender = connect(address=proxy.address)
    writing = threading.Thread(target=sender.write_input, args=(job_id, data()))
    writing.start()
    assert next(chunks) == b"one "
    proxy.cut()
    more.set()
    assert next(chunks) == b"two"
    writing.join()
    assert list(chunks) == []
    assert client.status(job_id).exit_code == 0


def test_end_of_the_job_ends_the_sending(client: Client) -> None:
    """At once, although the source has nothing to send."""
    never = threading.Event()

    def data() -> Iterator[bytes]:
        yield b"one\n"
        never.wait(GUARD_S)

    job_id = client.start("head", ["-n", "1"], stdin=True)
    with pytest.raises(ClientError, match="takes no input: it has ") as raised:
        client.write_input(job_id, data())
    assert raised.value.code == "FAILED_PRECONDITION"
    assert b"".join(client.stream(job_id)) == b"one\n"
    never.set()


def test_job_that_ends_with_its_last_byte_has_got_all(client: Client) -> None:
    """It may end before the message that ends its input arrives. A further byte would be lost."""
    for _ in range(20):
        job_id = client.start("head", ["-c", "2"], stdin=True)
        client.write_input(job_id, b"ab")
    assert not b"".join(client.stream(job_id, 2))  # until it has ended
    for data in (b"", b"c"):
        with pytest.raises(ClientError, match="takes no input"):
            client.write_input(job_id, data, 2)


def test_error_of_the_source_leaves_the_input_open(client: Client) -> None:
    """All that came before the error is sent, and somebody else may continue."""

    def data() -> Iterator[bytes]:
        yield b"one "
        raise OSError("the source is broken")

    job_id = client.start("cat", stdin=True)
    with pytest.raises(OSError, match="the source is broken"):
        client.write_input(job_id, data())
    stdin = client.status(job_id).stdin
    assert (stdin.bytes, stdin.ended) == (4, False)
    client.write_input(job_id, b"two", offset=4)
    assert b"".join(client.stream(job_id)) == b"one two"


@pytest.mark.parametrize("data", ["text", [1, 2], None])
def test_input_that_is_no_bytes_is_told(client: Client, data: Any) -> None:
    """The input stays open."""
    job_id = client.start("cat", stdin=True)
    with pytest.raises(TypeError):
        client.write_input(job_id, data)
    client.write_input(job_id, b"y")
    assert b"".join(client.stream(job_id)) == b"y"


@pytest.mark.parametrize("offset", [-1, 1 << 64, 0.5])
def test_offset_that_cannot_be_one_is_told(client: Client, offset: int) -> None:
    """Before gRPC, whose error would not say what is wrong. The input stays open."""
    job_id = client.start("cat", stdin=True)
    with pytest.raises(ValueError, match="offset is"):
        client.write_input(job_id, b"x", offset)
    client.write_input(job_id, b"y")
    assert b"".join(client.stream(job_id)) == b"y"


def test_wrong_offset_is_an_error(client: Client) -> None:
    job_id = client.start("cat", stdin=True)
    with pytest.raises(ClientError, match="continue at 0") as raised:
        client.write_input(job_id, b"x", offset=1)
    assert raised.value.code == "OUT_OF_RANGE"
    client.stop(job_id)


def test_more_than_was_sent_cannot_be_acknowledged() -> None:
    """Then somebody else has written to the job, too."""
    sending = Sending(b"12345")
    messages = sending.messages(dict, "a job")
    assert [len(each.get("data", b"")) for each in messages] == [0, 5]
    assert sending.acknowledge(3, ended=False) == 3
    for size in (2, 6):
        with pytest.raises(ValueError, match=f"somebody else .* has got {size} bytes"):
            sending.acknowledge(size, ended=False)
    assert list(sending.messages(dict, "a job")) == [
        {"job_id": "a job", "offset": 3},
        {"data": b"45", "end": True},
    ]
    sending.acknowledge(5, ended=True)
    assert sending.is_done


@pytest.mark.parametrize("size", [0, 1, _MESSAGE_BYTES, _MESSAGE_BYTES + 1])
def test_last_message_of_bytes_says_that_it_is_the_last(size: int) -> None:
    """So they are known to be all as soon as they are sent, however the call then ends."""
    sending = Sending(bytes(size), 7)
    sent = 0
    for each in sending.messages(dict, "a job"):
        sent += len(each.get("data", b""))
        if each.get("end"):
            break
        assert sent < max(size, 1)
    sending.acknowledge(7 + size, ended=True)
    assert sending.is_done


def test_call_sends_no_more_than_is_kept(tmp_path: Path) -> None:
    """The next one goes on where the server has acknowledged."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 * _WINDOW_BYTES))
    with source.open("rb") as file:
        sending = Sending(iter(lambda: file.read(100_000), b""))
        sent = sum(len(each.get("data", b"")) for each in sending.messages(dict, "a job"))
        assert _WINDOW_BYTES <= sent < _WINDOW_BYTES + 100_000
        sending.acknowledge(sent, ended=False)
        more = list(sending.messages(dict, "a job"))
    assert sent + sum(len(each.get("data", b"")) for each in more) == 2 * _WINDOW_BYTES
    assert more[-1]["end"]
