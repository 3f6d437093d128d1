"""Measures how the server behaves under more calls than it can serve; see `python -m bench`.

    python -m bench.overload ADDRESS REQUEST RATE SECONDS CONNECTIONS AT_ONCE    # be the clients

The clients have their own small HTTP/2, enough to make calls that are all alike. A gRPC client
needs as much CPU as the server. At twice the rate that the server can serve, the benchmark would
measure its own clients. These clients need a third of a core.

Sources: RFC 9113 (HTTP/2), RFC 7541 (its headers), gRPC's PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import ssl
import struct
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import workerservice_pb2 as worker_pb
from bench.harness import (
    CERTS,
    Service,
    fail,
    percentile,
    print_heading,
    report,
    running,
    start_program,
)
from client import Client, ClientError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

__all__ = ["bench_overload"]

_METHOD = "/jobworker.v1.WorkerService/GetJobStatus"
_LOAD_S = 2.0
_OVERLOAD_S = 10.0
_BURST, _BURST_S = 1000, 0.001
_FLOODS = (2, 1000), (20, 50)  # connections, and calls open on each
_FLOODED_CALLS = 50
_PATIENCE_S = 30.0
_LATE_S = 0.1
_CONNECTIONS = 4
# To find the capacity, this many calls are always open: an answer is followed by the next call.
_AT_ONCE = 3
_CALLS_BETWEEN_LOOKS = 32
_TRIALS = 3  # to find a bare server of the same capacity

# Values of the header `grpc-status`.
_OK, _RESOURCE_EXHAUSTED = "0", "8"

_HEADER_BYTES = 9
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_MAX_WINDOW, _FIRST_WINDOW = 2**31 - 1, 65_535
_TABLE_SIZE, _PUSHES, _STREAM_WINDOW = 1, 2, 4  # settings
_WITH_INDEXING, _INDEXED, _FIRST_INDEX = 0x40, 0x80, 62
_ONE_BYTE = 0x7F  # a length below this number is encoded in one byte


class _Answer(NamedTuple):
    """The outcome of a call. In seconds: `since`, from the begin of the load; `took`, its time."""

    status: str
    since: float
    took: float


def bench_overload(service: Service) -> None:
    """Status at twice the rate that can be served, and at less; a burst; another user's flood."""
    request = worker_pb.GetJobStatusRequest(job_id=service.client.start("true")).SerializeToString()

    def load(rate: float, seconds: float = _LOAD_S) -> list[_Answer]:
        return _run_load(service, request, rate, seconds)

    capacity = _capacity(service, request)
    print_heading(f"Overload: Status, of which {capacity:.0f} per second can be served")
    # Each load runs once. One run gives no noise, so figures are printed instead of ratios.
    _report_burst(load(_BURST / _BURST_S, _BURST_S))
    _report_load("half of that", load(capacity / 2))
    _report_load("three quarters", load(capacity * 0.75))
    _report_overload(load(capacity * 2, _OVERLOAD_S), capacity)
    time.sleep(1)  # the aim is that all is as before one second later
    _report_load("half again, one second later", load(capacity / 2))
    for connections, at_once in _FLOODS:
        _bench_flood(service, connections, at_once)
    _bench_bare(service, request, capacity)


def _capacity(service: Service, request: bytes) -> float:
    """Return how many calls per second can be served."""
    _run_load(service, request, 0, _LOAD_S)  # warms up
    return len(_took(_run_load(service, request, 0, _LOAD_S), _OK)) / _LOAD_S


@contextlib.contextmanager
def _bare(service: Service, work_s: float) -> Iterator[Service]:
    """Run a bare gRPC server, which computes for `work_s` in each call."""
    with running("-m", "bench.bounded", str(work_s)) as (pid, address):
        yield replace(service, pid=pid, address=address)


def _bench_bare(service: Service, request: bytes, wanted: float) -> None:
    """Put the same load on a bare gRPC server that refuses what is too much.

    It computes for so long in each call that it can serve about as many calls as the service:
    `wanted` per second. The share that is served at twice the capacity depends on that number.
    """
    work_s = 0.0
    for _ in range(_TRIALS):
        with _bare(service, work_s) as bare:
            work_s = max(0.0, work_s + 1 / wanted - 1 / _capacity(bare, request))
    with _bare(service, work_s) as bare:
        capacity = _capacity(bare, request)
        print_heading(f"Overload: a bare gRPC server that can serve {capacity:.0f} per second")
        _report_overload(_run_load(bare, request, capacity * 2, _OVERLOAD_S), capacity)
        connections, at_once = _FLOODS[0]
        program = _start_flood(bare, service.client, request, connections, at_once)
        refused = _took(_answers(program), _RESOURCE_EXHAUSTED)
        report(
            f"in a flood of {connections} x {at_once:,} calls: p99 if refused",
            f"{percentile(refused, 99) * 1e3:.0f} ms",
            f"p50 {percentile(refused, 50) * 1e3:.0f} ms",
            f"{len(refused)} calls",
        )


def _report_burst(answers: list[_Answer]) -> None:
    served = _took(answers, _OK)
    report(
        f"{_BURST:,} calls at once: served",
        f"{len(served)}",
        f"the last after {max(served, default=0.0):.2f} s",
        "",
        f"{_BURST}",
    )


def _report_load(what: str, answers: list[_Answer]) -> None:
    served = _took(answers, _OK)
    report(
        f"at {what}: p99",
        f"{percentile(served, 99) * 1e3:.1f} ms",
        f"p50 {percentile(served, 50) * 1e3:.1f} ms",
        f"{len(answers) - len(served)} of {len(answers)} not served",
        "0 not served",
    )


def _report_overload(answers: list[_Answer], capacity: float) -> None:
    served, refused = _took(answers, _OK), _took(answers, _RESOURCE_EXHAUSTED)
    share = len(served) / (capacity * _OVERLOAD_S)
    report(
        f"at twice that for {_OVERLOAD_S:.0f} s: served, of what can be",
        f"{share:.0%}",
        f"{len(served)} calls",
        "",
        ">= 80 %",
    )
    for what, taken, aim in (("served", served, "<= 1000 ms"), ("refused", refused, "")):
        if taken:
            report(
                f"  p99 if {what}",
                f"{percentile(taken, 99) * 1e3:.0f} ms",
                f"p50 {percentile(taken, 50) * 1e3:.0f} ms",
                f"{len(taken)} calls",
                aim,
            )
    report("  neither", str(len(answers) - len(served) - len(refused)), "", "", "0")


def _bench_flood(service: Service, connections: int, at_once: int) -> None:
    """Status and Stop of the admin while a user always has so many calls open."""
    mine = [service.client.start("sleep", ["1000000"]) for _ in range(_FLOODED_CALLS)]
    with Client(service.address, certs=CERTS) as user:
        user.login("user", "user")
        request = worker_pb.GetJobStatusRequest(job_id=user.start("true")).SerializeToString()
        program = _start_flood(service, user, request, connections, at_once)
    time.sleep(1)  # until the flood has risen
    taken, failed = [], 0
    for job_id in mine:
        for call in (service.client.status, service.client.stop):
            begin = time.perf_counter()
            try:
                call(job_id)
            except ClientError:
                failed += 1
            taken.append(time.perf_counter() - begin)
    program.communicate()
    report(
        f"beside a flood of {connections} x {at_once:,} calls: p99",
        f"{percentile(taken, 99) * 1e3:.0f} ms",
        f"p50 {percentile(taken, 50) * 1e3:.0f} ms",
        f"{failed} of {len(taken)} Status and Stop failed",
        "<= 250 ms, 0",
    )


def _start_flood(
    service: Service, client: Client, request: bytes, connections: int, at_once: int
) -> subprocess.Popen[str]:
    """Start clients of this client's user that always have so many calls open."""
    total = connections * at_once
    arguments = (service.address, request.hex(), 0, _OVERLOAD_S, connections, total)
    program = start_program(client, "-m", __name__, *arguments)
    if program.stdin is None:
        raise AssertionError("it is a pipe")
    program.stdin.write("\n")
    program.stdin.flush()
    return program


def _took(answers: list[_Answer], status: str) -> list[float]:
    return [each.took for each in answers if each.status == status]


def _run_load(service: Service, request: bytes, rate: float, seconds: float) -> list[_Answer]:
    """Run the clients. They make `rate` calls per second; 0 means as many as the server answers."""
    arguments = (service.address, request.hex(), rate, seconds, _CONNECTIONS, _AT_ONCE)
    program = start_program(service.client, "-m", __name__, *arguments)
    return _answers(program, "\n")


def _answers(program: subprocess.Popen[str], send: str | None = None) -> list[_Answer]:
    """Wait until the clients have ended; return what they have received."""
    output, _ = program.communicate(send)
    if program.returncode:
        fail("the clients of the overload failed")
    fields = (line.split() for line in output.splitlines())
    return [_Answer(status, float(since), float(took)) for status, since, took in fields]


# --- the clients --------------------------------------------------------------------------


class _Connection:
    """An HTTP/2 connection for calls that are all alike."""

    def __init__(self, address: str, request: bytes, token: str) -> None:
        host, _, port = address.rpartition(":")
        context = ssl.create_default_context(cafile=str(CERTS / "server-ca.pem"))
        context.load_cert_chain(CERTS / "client.pem", CERTS / "client-key.pem")
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection((host, int(port)))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = context.wrap_socket(plain, server_hostname=host)
        self._socket.setblocking(False)
        headers = {
            ":method": "POST",
            ":scheme": "https",
            ":path": _METHOD,
            ":authority": address,
            "te": "trailers",
            "content-type": "application/grpc",
            "authorization": f"Bearer {token}",
        }
        # The server adds the headers of the first call to its table. The last header added has the
        # lowest index. Later calls send only the indices.
        self._headers = b"".join(itertools.starmap(_header, headers.items()))
        self._same_headers = bytes(_INDEXED + _FIRST_INDEX + i for i in range(len(headers)))[::-1]
        self._data = b"\0" + len(request).to_bytes(4, "big") + request
        self._next_stream = 1
        self._unsent = bytearray()
        self._received = b""
        self._begun: dict[int, float] = {}  # stream number: when its call began
        # The windows are so large that they never close. Without a table for answers, the server
        # spells out each status.
        settings = {_TABLE_SIZE: 0, _PUSHES: 0, _STREAM_WINDOW: _MAX_WINDOW}
        self._send(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, b"".join(struct.pack(">HI", *each) for each in settings.items()))
            + _frame(_WINDOW_UPDATE, struct.pack(">I", _MAX_WINDOW - _FIRST_WINDOW))
        )

    def fileno(self) -> int:
        """Return the socket's descriptor, for `select`."""
        return self._socket.fileno()

    @property
    def open_calls(self) -> int:
        """The number of calls without an answer."""
        return len(self._begun)

    def call(self) -> None:
        """Send a call; do not wait for the answer."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._begun[stream] = time.monotonic()
        self._send(
            _frame(_HEADERS, self._headers, _END_HEADERS, stream)
            + _frame(_DATA, self._data, _END_STREAM, stream)
        )
        self._headers = self._same_headers

    def answers(self) -> list[_Answer]:
        """Return the answers that have arrived since the last call. Does not block."""
        data = self._received
        with contextlib.suppress(ssl.SSLWantReadError):
            while more := self._socket.recv(1 << 18):
                data += more
            fail("the server has closed a connection")
        now = time.monotonic()
        answers = []
        begin = 0
        while len(data) - begin >= _HEADER_BYTES:
            end = begin + _HEADER_BYTES + int.from_bytes(data[begin : begin + 3], "big")
            if end > len(data):
                break
            kind, flags = data[begin + 3 : begin + 5]
            stream = int.from_bytes(data[begin + 5 : begin + _HEADER_BYTES], "big")
            status = self._handle(kind, flags, data[begin + _HEADER_BYTES : end])
            begin = end
            if status and (since := self._begun.pop(stream, None)):
                answers.append(_Answer(status, since, now - since))
        self._received = data[begin:]
        return answers

    def _handle(self, kind: int, flags: int, payload: bytes) -> str:
        """Handle a frame; return the status of a call if the frame has one, else ""."""
        if kind == _HEADERS and flags & _END_STREAM:
            value = payload.partition(b"grpc-status")[2]
            return value[1 : 1 + value[0]].decode()
        if kind == _RESET:
            return f"reset-{int.from_bytes(payload, 'big')}"
        if kind == _GOAWAY:
            fail(f"the server ends a connection: {payload!r}")
        if not flags & _ACK and kind in {_PING, _SETTINGS}:
            self._send(_frame(kind, payload if kind == _PING else b"", _ACK))
        return ""

    def _send(self, data: bytes) -> None:
        self._unsent += data
        with contextlib.suppress(ssl.SSLWantWriteError):
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]


def _frame(kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> bytes:
    length = len(payload).to_bytes(3, "big")
    return length + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _header(name: str, value: str) -> bytes:
    return bytes([_WITH_INDEXING]) + _string(name) + _string(value)


def _string(text: str) -> bytes:
    length = len(text)
    if length < _ONE_BYTE:
        return bytes([length]) + text.encode()
    encoded = bytes([_ONE_BYTE])
    length -= _ONE_BYTE
    while length > _ONE_BYTE:
        encoded += bytes([_INDEXED | length & _ONE_BYTE])
        length >>= 7
    return encoded + bytes([length]) + text.encode()


def _make_load(  # noqa: PLR0913 -- the program's arguments
    address: str, request: bytes, rate: float, seconds: float, count: int, at_once: int
) -> None:
    connections = _connect(address, request, count)
    print("ready", flush=True)
    sys.stdin.readline()
    taken: list[_Answer] = []
    turn = itertools.cycle(connections)
    begin = time.monotonic()
    made, late_s = 0, 0.0
    while (now := time.monotonic() - begin) < seconds or (
        len(taken) < made and now < seconds + _PATIENCE_S
    ):
        wait_s, due = _PATIENCE_S, made
        if rate:
            due = int(min(now, seconds) * rate)
            late_s = max(late_s, now - made / rate if due > made else 0)
        elif now < seconds:
            due = len(taken) + at_once
        for _ in range(min(due - made, _CALLS_BETWEEN_LOOKS)):
            next(turn).call()
            made += 1
        if now < seconds:
            next_s = (made + 1) / rate if rate else seconds
            wait_s = max(0.0, begin + next_s - time.monotonic())
        for each in select.select(connections, [], [], wait_s)[0]:
            taken += each.answers()
    if late_s > _LATE_S:
        print(f"bench: the load came {late_s:.1f} s late", file=sys.stderr)
    for answer in taken:
        print(answer.status, answer.since - begin, answer.took)
    for _ in range(sum(each.open_calls for each in connections)):
        print("unanswered", 0, seconds)


def _connect(address: str, request: bytes, count: int) -> list[_Connection]:
    """Return connections over each of which a call has been served."""
    token = os.environ["JOBWORKER_TOKEN"]
    connections = [_Connection(address, request, token) for _ in range(count)]
    for each in connections:
        each.call()
        while not (answers := each.answers()):
            select.select([each], [], [], _PATIENCE_S)
        if answers[0].status != _OK:
            fail(f"a call is answered with {answers[0].status}")
    return connections


if __name__ == "__main__":
    address, request, rate, seconds, count, at_once = sys.argv[1:]
    load = float(rate), float(seconds), int(count), int(at_once)
    _make_load(address, bytes.fromhex(request), *load)
