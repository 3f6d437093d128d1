"""Property-based tests: the server answers any input as documented, and continues to serve.

All tests attack one server program. After each test the server must have no more descriptors and
processes than before, must not have logged anything, and must still serve calls.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import ssl
import struct
import time
import uuid
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import authservice_pb2 as auth_pb
import workerservice_pb2 as worker_pb
from auth import Authenticator, Session
from calls import (
    _CALLS_OF_ONE,
    _LOGINS_OF_ONE,
    _MORE_STREAMS,
    _MORE_STREAMS_OF_ONE,
    _THREADS_OF_ONE,
)
from client import Client
from settings import Requests
from testkit import (
    GUARD_S,
    HTTP2_PREFACE,
    ServerProgram,
    children_of,
    descriptors_of,
    fork_server_of,
    http2_frame,
)
from users import SEEDED_USERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

_SETTINGS = settings(
    deadline=None,
    max_examples=300,
    # The fixtures check the server once, before and after all examples together.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_SLOWER = settings(_SETTINGS, max_examples=100)

_METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for file in (auth_pb.DESCRIPTOR, worker_pb.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}
_README = (Path(__file__).parent / "README.md").read_text()
_OWN_ERRORS: dict[str, set[str]] = {
    name: set(re.findall(r"\w+", errors))
    for name, errors in re.findall(
        r"^\| `\w+\.(\w+)` \|.*\| ([A-Z_, ]*) ?\|$", _README, re.MULTILINE
    )
}
_MALFORMED = "the request is not a message of the right type"
_LONGEST_MESSAGE = 3000  # characters: up to 200 of the client's, escaped, and the server's words
_REQUEST_BYTES = Requests().size

_STREAMS = 20
_STREAMS_OF_ONE = _STREAMS + _MORE_STREAMS_OF_ONE  # streams of one caller at the same time
# There are four callers: the two users, all calls without a token, and all logins.
_MOST_THREADS = _STREAMS + _MORE_STREAMS + 4 * _THREADS_OF_ONE
_RPCS_TO_WAIT = 3000  # this many calls give gRPC time to close descriptors
_CONFIG = """
[per_user]
running_jobs = "unlimited"
starts_per_second = "unlimited"
[in_all]
running_jobs = "unlimited"
starts_per_second = "unlimited"
"""


# --- the server ---------------------------------------------------------------------------


class _Server:
    """The server program. Attributes: `certs`, `address`, `pid`, and `admin`, a client."""

    def __init__(self, program: ServerProgram, certs: Path, key: bytes) -> None:
        self._program = program
        self.certs = certs
        self.address = program.address
        self.pid = program.process.pid
        self._fork_server = fork_server_of(self.pid)
        self._users = {user.name: user for user in SEEDED_USERS}
        self._authenticator = Authenticator(users=SEEDED_USERS, key=key)
        self.admin = Client(self.address, certs=certs, token=self.token("admin"))

    def token(self, user: str) -> str:
        """Return a valid token. Does not log in, because a login takes long."""
        certificate = ssl.PEM_cert_to_DER_cert((self.certs / "client.pem").read_text())
        token_id, now, life_s = str(uuid.uuid4()), int(time.time()), 24 * 3600
        session = Session(token_id, now, now + life_s, life_s)
        times = now, 0, now + life_s
        return self._authenticator._token(self._users[user], session, token_id, times, certificate)

    def used(self) -> dict[str, int]:
        return {
            "descriptors": len(descriptors_of(self.pid)),
            "children": len(children_of(self.pid)),
            "descriptors of the fork server": len(descriptors_of(self._fork_server)),
            "children of the fork server": len(children_of(self._fork_server)),
        }

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def memory(self, field: str) -> int:
        """Return `field`, VmRSS or VmHWM, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        (kib,) = re.findall(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
        return int(kib) * 1024

    def forget_peak(self) -> None:
        """Reset VmHWM to VmRSS."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def log(self) -> str:
        return self._program.log.read_text(errors="surrogateescape")

    def await_spare(self) -> None:
        """Wait until the process for the next job is there; it is made after a job has started."""
        for _ in range(_RPCS_TO_WAIT):
            if children_of(self._fork_server):
                return
            self.admin.list()
        pytest.fail("the fork server has prepared no process")

    def await_used(self, before: dict[str, int]) -> None:
        """Wait until no more is in use than before; gRPC does not report what it closes."""
        for job in self.admin.list():
            for _ in self.admin.stream(job.job_id):
                pass
        for _ in range(_RPCS_TO_WAIT):
            if len(descriptors_of(self.pid)) <= before["descriptors"]:
                break
            self.admin.list()
        now = self.used()
        assert all(now[what] <= before[what] for what in now), (before, now)


@pytest.fixture(scope="module")
def program(
    certs: Path, make_state: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_Server]:
    """The server program that all tests share. It has run a job."""
    directory, state = tmp_path_factory.mktemp("fuzz"), make_state()
    config = directory / "config.toml"
    config.write_text(_CONFIG)
    program = ServerProgram(
        directory / "server.log",
        *("--listen", "127.0.0.1:0", "--limits", "auto", "--certs", str(certs)),
        *("--state-dir", str(state), "--config", str(config), "--max-streams", str(_STREAMS)),
    )
    server = _Server(program, certs, (state / "token.key").read_bytes())
    with server.admin as admin:
        list(admin.stream(admin.start("true")))
        yield server
    if program.end() != 0:
        pytest.fail(f"the server did not end well: {server.log()}")


@pytest.fixture
def server(program: _Server) -> Iterator[_Server]:
    """The shared server. After the test it must have no more in use, and no new log line."""
    program.await_spare()
    before, threads, log = program.used(), program.threads(), program.log()
    yield program
    program.await_used(before)
    # Calls without a request may still have threads; gRPC itself has about ten threads.
    assert program.threads() <= max(threads, _MOST_THREADS + 20)
    # The server has logged no fault, and nothing that clients sent.
    assert program.log() == log


@pytest.fixture
def channel(server: _Server) -> Iterator[grpc.Channel]:
    """A connection over which a test sends and receives messages as bytes."""
    with Client(server.address, certs=server.certs) as client:
        yield client._channel


def _call(
    channel: grpc.Channel,
    name: str,
    data: bytes,
    token: str | None,
    compression: grpc.Compression | None = None,
) -> tuple[str, str]:
    """Call an RPC and read to the end of the call; return the status code and message."""
    # On the wire a unary answer looks like a stream of one message.
    rpc: Any = channel.unary_stream(f"/{_METHODS[name].containing_service.full_name}/{name}")
    metadata = [("authorization", f"Bearer {token}")] if token else []
    call = rpc(data, metadata=metadata, timeout=GUARD_S, compression=compression)
    if name == "WatchJobs":  # it has no end; the server tells first whether it is accepted
        call.initial_metadata()
        call.cancel()
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
    details = call.details()
    assert details.isprintable(), ascii(details)
    assert len(details) <= _LONGEST_MESSAGE
    return call.code().name, details


# --- every field of every request -----------------------------------------------------------
#
# The tests make requests as bytes, because protobuf's classes cannot make a malformed message.


def _varint(number: int) -> bytes:
    groups = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _block(number: int, data: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(data)) + data


# Placeholders for job IDs, which are known only when the server runs. They are as long as an ID.
_FINISHED = b"00000000-0000-4000-8000-00000finished"[:36]
_FOREIGN = b"00000000-0000-4000-8000-000000foreign"[:36]

_WORDS = st.one_of(
    st.text(max_size=20).map(str.encode),
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Mn"]), max_size=5).map(
        lambda text: text.encode(errors="surrogatepass")
    ),
    st.binary(max_size=20),
    st.integers(0, 1 << 17).map(b"x".__mul__),
    st.integers(0, 1 << 15).map("\U000e0001".encode().__mul__),
    # Harmless commands, and texts that are no command.
    st.sampled_from([b"true", b"/bin/echo", b"", b"/", b"/etc/passwd", b"no/such", b"tr\0ue"]),
    st.sampled_from([_FINISHED, _FOREIGN, _FINISHED.upper(), str(uuid.UUID(int=0)).encode()]),
    st.sampled_from([b"admin", b"user", b"\x1b[31m", b"a\nb", b"%s{}", b"\xed\xa0\x80", b"\xff"]),
)
_NUMBERS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 10),
    st.sampled_from([(1 << bits) + step for bits in (7, 31, 32, 53, 63, 64) for step in (-1, 0)]),
    st.just((1 << 77) - 1),  # more bytes than a varint may have
)
_NOISE = st.one_of(
    # A field whose number or wire type may be wrong, and bytes after it.
    st.tuples(
        st.one_of(st.integers(0, 20), st.integers(0, 1 << 32)), st.integers(0, 7), st.binary()
    ).map(lambda parts: _tag(*parts[:2]) + parts[2]),
    st.tuples(st.integers(1, 20), st.binary()).map(lambda parts: _block(*parts)),
    # A length that does not match the bytes after it.
    st.tuples(st.integers(1, 9), _NUMBERS).map(
        lambda parts: _tag(parts[0], 2) + _varint(parts[1]) + b"x"
    ),
    # Nested groups, closed or not.
    st.tuples(st.integers(1, 20), st.integers(1, 500), st.booleans()).map(
        lambda parts: _tag(parts[0], 3) * parts[1] + _tag(parts[0], 4) * parts[1] * parts[2]
    ),
    st.binary(max_size=100),
)


def _field(field: FieldDescriptor) -> st.SearchStrategy[bytes]:
    """Generate a field with a value of its type, once or many times."""
    number = field.number
    values: dict[int, st.SearchStrategy[bytes]] = {
        field.TYPE_STRING: _WORDS.map(partial(_block, number)),
        field.TYPE_BYTES: st.binary(max_size=100).map(partial(_block, number)),
        field.TYPE_INT32: _NUMBERS.map(lambda value: _tag(number, 0) + _varint(value)),
        field.TYPE_ENUM: st.integers(0, 5).map(lambda value: _tag(number, 0) + _varint(value)),
        field.TYPE_BOOL: st.booleans().map(lambda value: _tag(number, 0) + _varint(value)),
        field.TYPE_INT64: _NUMBERS.map(lambda value: _tag(number, 0) + _varint(value)),
        field.TYPE_UINT64: _NUMBERS.map(lambda value: _tag(number, 0) + _varint(value)),
        field.TYPE_DOUBLE: st.floats().map(
            lambda value: _tag(number, 1) + struct.pack("<d", value)
        ),
    }
    value = (
        _message(field.message_type).map(partial(_block, number))
        if field.type == field.TYPE_MESSAGE
        else values[field.type]
    )
    times = st.sampled_from([1, 1, 1, 2, 100, 5000] if field.is_repeated else [1, 1, 2])
    return st.tuples(value, times).map(lambda parts: _repeat(*parts))


def _repeat(value: bytes, times: int) -> bytes:
    """Return the bytes so many times, or as often as fits into twice what a request may have."""
    return value * max(1, min(times, 2 * _REQUEST_BYTES // max(1, len(value))))


@cache
def _message(descriptor: Descriptor) -> st.SearchStrategy[bytes]:
    """Generate the bytes of a correct or nearly correct message."""
    fields = [_field(field) for field in descriptor.fields]
    right = st.lists(st.one_of(*fields), max_size=5) if fields else st.just(list[bytes]())
    noise = st.one_of(st.just(b""), st.just(b""), _NOISE)
    return st.tuples(right, noise).map(lambda parts: b"".join(parts[0]) + parts[1])


def _requests(name: str) -> st.SearchStrategy[bytes]:
    # The first field makes the request valid, unless a later field replaces the value.
    good = {"StartJob": b"true", "Login": b"user"}.get(name, _FINISHED)
    head = st.sampled_from([b"", _block(1, good)]) if "Jobs" not in name else st.just(b"")
    return st.tuples(head, _message(_METHODS[name].input_type)).map(b"".join)


def _is_message(name: str, data: bytes) -> bool:
    try:
        GetMessageClass(_METHODS[name].input_type).FromString(data)
    except DecodeError:
        return False
    return True


@pytest.fixture(scope="module")
def names(program: _Server) -> dict[bytes, bytes]:
    """The job IDs by their placeholders."""
    ids = []
    for user in ("user", "admin"):
        with Client(program.address, certs=program.certs, token=program.token(user)) as client:
            ids.append(client.start("echo", ["hello"]).encode())
            list(client.stream(ids[-1].decode()))
    return {_FINISHED: ids[0], _FOREIGN: ids[1], _FINISHED.upper(): ids[0].upper()}


@pytest.mark.parametrize("name", _METHODS)
def test_any_request_is_answered_as_documented(
    server: _Server, channel: grpc.Channel, names: dict[bytes, bytes], name: str
) -> None:
    """The code is one that README lists for the RPC. The message is a single printable line."""
    # The admin starts the jobs: `user` then has a short list to read.
    user = "admin" if name == "StartJob" else "user"
    token = server.token(user)

    # A filter has many repeated fields, so a request with one is large.
    @(_SLOWER if "Jobs" in name else _SETTINGS)
    @given(data=_requests(name))
    def check(data: bytes) -> None:
        for placeholder, job_id in names.items():
            data = data.replace(placeholder, job_id)
        # Each logout needs a token of its own, because a successful logout revokes the token.
        mine = server.token(user) if name == "Logout" else token
        code, details = _call(channel, name, data, None if name == "Login" else mine)
        if name == "WatchJobs" and code == "CANCELLED":  # by us, before a refusal had come
            return
        if len(data) > _REQUEST_BYTES:
            assert code == "RESOURCE_EXHAUSTED"
        elif _is_message(name, data):
            assert code in {"OK", *_OWN_ERRORS[name]}, details
        else:
            assert (code, details) == ("INVALID_ARGUMENT", _MALFORMED)

    check()


@pytest.mark.parametrize("name", ["ListJobs", "StreamOutput"])
@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_request_over_the_ceiling_is_refused_and_takes_no_memory(
    server: _Server, channel: grpc.Channel, name: str, compression: grpc.Compression | None
) -> None:
    """The size after decompression counts. The server does not decompress beyond the ceiling."""
    token = server.token("user")
    below = _block(99, bytes(_REQUEST_BYTES - 10))
    above = _block(99, bytes(16 * _REQUEST_BYTES))
    code, _ = _call(channel, name, below, token, compression)
    assert code == ("OK" if name == "ListJobs" else "INVALID_ARGUMENT")
    server.forget_peak()
    before = server.memory("VmRSS")
    assert _call(channel, name, above, token, compression)[0] == "RESOURCE_EXHAUSTED"
    assert server.memory("VmHWM") - before < len(above) / 2


# --- bytes on the port ------------------------------------------------------------------------

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS_FRAME = range(5)
_PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = range(5, 10)
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_FRAME_HEADER_BYTES = 9
_RESET_ON_CLOSE = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)


def _prefixed(number: int, bits: int, first: int = 0) -> bytes:
    """Encode an integer for HPACK (RFC 7541, 5.1)."""
    most = (1 << bits) - 1
    return (
        bytes([first | number]) if number < most else bytes([first | most]) + _varint(number - most)
    )


def _headers(*pairs: tuple[bytes, bytes]) -> bytes:
    """Encode headers for HPACK, as literals without a table."""
    return b"".join(
        b"\0" + b"".join(_prefixed(len(text), 7) + text for text in pair) for pair in pairs
    )


def _request_headers(name: str, *more: tuple[bytes, bytes], token: str = "") -> bytes:
    path = f"/{_METHODS[name].containing_service.full_name}/{name}".encode()
    authorization = [(b"authorization", f"Bearer {token}".encode())] if token else []
    return _headers(
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *authorization,
        *more,
    )


_HELLO = HTTP2_PREFACE + http2_frame(_SETTINGS_FRAME)
_LIST = _request_headers("ListJobs")
_EMPTY_REQUEST = bytes(5)


def _calls(count: int, headers: bytes, behind: Callable[[int], bytes] = lambda _: b"") -> bytes:
    """Return frames that begin `count` calls without a request; `behind` adds frames to each."""
    return b"".join(
        http2_frame(_HEADERS, _END_HEADERS, stream, headers) + behind(stream)
        for stream in range(1, 2 * count, 2)
    )


def _tcp(server: _Server) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), GUARD_S)


def _tls(server: _Server, *, certificate: bool = True) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(server.certs / "client.pem", server.certs / "client-key.pem")
    return context.wrap_socket(_tcp(server))


def _send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the server may have hung up
        sock.sendall(data)


def _await_end(sock: socket.socket) -> None:
    """Close the sending side; wait until the server closes the connection."""
    with contextlib.suppress(OSError):  # the server may have closed it first
        sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionError):
        while socket.socket.recv(sock, 1 << 16):
            pass


def _read_status(sock: ssl.SSLSocket) -> int | None:
    """Return the status of the connection's only call; None if the call ended without a status."""
    received = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while data := sock.recv(1 << 16):
            received += data
            if found := re.search(rb"grpc-status[\x01\x02](\d+)", received):
                return int(found[1])
            if any(
                kind in {_RST_STREAM, _GOAWAY} or (kind == _HEADERS and flags & _END_STREAM)
                for kind, flags, _ in _frames(received)
            ):
                break
    return None


def _frames(received: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the kind, flags and payload of each complete frame."""
    while len(received) >= _FRAME_HEADER_BYTES:
        end = _FRAME_HEADER_BYTES + int.from_bytes(received[:3], "big")
        yield received[3], received[4], received[_FRAME_HEADER_BYTES:end]
        received = received[end:]


_ATTACKS = {
    "no preface": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "half a preface": HTTP2_PREFACE[:10],
    "nothing": b"",
    "frame over the ceiling": _HELLO + http2_frame(_DATA, 0, 0, bytes(1 << 17), length=0xFFFFFF),
    "headers over the ceiling": _HELLO + http2_frame(_HEADERS, 4, 1, bytes(1 << 17)),
    "unknown frames": _HELLO + b"".join(http2_frame(kind, 255, 1, b"?") for kind in range(10, 256)),
    "data of no stream": _HELLO + http2_frame(_DATA, 0, 1, b"x") * 1000,
    "continuation flood": _HELLO
    + http2_frame(_HEADERS, 0, 1, _LIST)
    + http2_frame(_CONTINUATION, 0, 1, _headers((b"x-a", b"y" * 1000))) * 3000,
    "empty continuation flood": _HELLO
    + http2_frame(_HEADERS, 0, 1, _LIST)
    + http2_frame(_CONTINUATION, 0, 1) * 20_000,
    "continuation of nothing": _HELLO + http2_frame(_CONTINUATION, 4, 1, _LIST),
    "settings flood": HTTP2_PREFACE
    + http2_frame(_SETTINGS_FRAME, 0, 0, struct.pack(">HI", 3, 9)) * 10_000,
    "settings of a wrong length": HTTP2_PREFACE + http2_frame(_SETTINGS_FRAME, 0, 0, b"x"),
    "settings out of range": HTTP2_PREFACE
    + http2_frame(_SETTINGS_FRAME, 0, 0, struct.pack(">HIHI", 4, 0xFFFFFFFF, 5, 1)),
    "ping flood": _HELLO + http2_frame(_PING, 0, 0, bytes(8)) * 10_000,
    "ping of a wrong length": _HELLO + http2_frame(_PING, 0, 0, b"x"),
    "answers to no ping": _HELLO + http2_frame(_PING, _ACK, 0, bytes(8)) * 1000,
    "calls without a request": _HELLO + _calls(1000, _LIST),
    "calls that end without a request": _HELLO
    + _calls(1000, _LIST, lambda stream: http2_frame(_DATA, _END_STREAM, stream)),
    "half a request": _HELLO
    + _calls(1, _LIST, lambda _: http2_frame(_DATA, 0, 1, b"\0\0\0\0\xffx")),
    "two requests": _HELLO
    + _calls(1, _LIST, lambda _: http2_frame(_DATA, _END_STREAM, 1, 2 * _EMPTY_REQUEST)),
    "request that is not what it says": _HELLO
    + _calls(1, _LIST, lambda _: http2_frame(_DATA, _END_STREAM, 1, b"\xff" * 100)),
    "compressed by nothing": _HELLO
    + _calls(1, _LIST, lambda _: http2_frame(_DATA, _END_STREAM, 1, b"\1\0\0\0\1x")),
    "header table bomb": _HELLO
    + http2_frame(_HEADERS, 0, 1, b"\x40" + _headers((b"x-a", b"A" * 4000))[1:])
    + http2_frame(_CONTINUATION, 0, 1, b"\xbe" * 16_000) * 60,
    "header table index that is none": _HELLO + http2_frame(_HEADERS, 4, 1, b"\xfe"),
    "header table of any size": _HELLO + http2_frame(_HEADERS, 4, 1, b"\x3f\xff\xff\xff\xff\x7f"),
    "integer without an end": _HELLO + http2_frame(_HEADERS, 4, 1, b"\xff" * 2000),
    "many headers": _HELLO
    + http2_frame(_HEADERS, 0, 1, _LIST)
    + b"".join(
        http2_frame(
            _CONTINUATION, 0, 1, b"".join(_headers((b"k%d" % i, b"v")) for i in range(n, n + 99))
        )
        for n in range(0, 20_000, 99)
    )
    + http2_frame(_CONTINUATION, _END_HEADERS, 1),
    "window overflow": _HELLO
    + http2_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", (1 << 31) - 1)) * 9,
    "window update of nothing": _HELLO + http2_frame(_WINDOW_UPDATE, 0, 0, bytes(4)) * 1000,
    "priority flood": _HELLO
    + b"".join(http2_frame(_PRIORITY, 0, n, struct.pack(">IB", 0, 1)) for n in range(1, 20_000, 2)),
    "farewell, and more": _HELLO + http2_frame(_GOAWAY, 0, 0, bytes(8)) + _calls(10, _LIST),
    "push": _HELLO + http2_frame(_PUSH_PROMISE, 4, 1, bytes(4) + _LIST),
    "stream of the server's": _HELLO + http2_frame(_HEADERS, 5, 2, _LIST),
    "padding that is too long": _HELLO + http2_frame(_HEADERS, 0xC, 1, b"\xff" + _LIST),
}


@pytest.mark.parametrize("attack", _ATTACKS)
def test_attack_over_http_2_disturbs_nobody(server: _Server, attack: str) -> None:
    """The attacker has a certificate. Another client is served, and the connection ends."""
    with _tls(server) as sock:
        _send(sock, _ATTACKS[attack])
        server.admin.list()
        _await_end(sock)


_FRAMES = st.lists(
    st.builds(
        http2_frame,
        st.one_of(st.integers(0, 10), st.integers(0, 255)),
        st.integers(0, 255),
        st.one_of(st.integers(0, 5), st.integers(0, (1 << 32) - 1)),
        st.one_of(st.binary(max_size=100), st.just(_LIST), st.just(_EMPTY_REQUEST)),
        st.one_of(st.none(), st.none(), st.integers(0, 200)),
    ),
    max_size=20,
).map(b"".join)


def test_any_frames_disturb_nobody(server: _Server) -> None:
    """The server closes each connection after the client has closed its sending side."""

    @_SETTINGS
    @given(hello=st.sampled_from([_HELLO, _HELLO, HTTP2_PREFACE, b""]), frames=_FRAMES)
    def check(hello: bytes, frames: bytes) -> None:
        with _tls(server) as sock:
            _send(sock, hello + frames)
            _await_end(sock)

    check()


def test_any_bytes_that_are_no_tls_disturb_nobody(server: _Server) -> None:
    """The bytes: plain text, garbage in TLS records, cut or damaged handshakes."""
    outgoing = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="x" * 20)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    greeting = outgoing.read()
    forging = greeting.replace(b"x" * 20, b"\n\x1b[31m2026 INFO fine")

    @_SETTINGS
    @given(
        data=st.one_of(
            st.binary(),
            st.sampled_from([_HELLO, b"GET / HTTP/1.1\r\n\r\n"]),
            st.builds(
                lambda kind, version, length, data: (
                    struct.pack(">BHH", kind, version, length) + data
                ),
                st.integers(18, 25),
                st.sampled_from([0x300, 0x301, 0x303, 0x304, 0xFFFF]),
                st.integers(0, 0xFFFF),
                st.binary(max_size=1000),
            ),
            st.integers(0, len(greeting)).map(lambda count: greeting[:count]),
            st.tuples(st.integers(0, len(greeting) - 1), st.binary(min_size=1, max_size=9)).map(
                lambda part: greeting[: part[0]] + part[1] + greeting[part[0] + len(part[1]) :]
            ),
            st.binary(max_size=1000).map(greeting.__add__),
        )
    )
    @example(data=forging)
    def check(data: bytes) -> None:
        with _tcp(server) as sock:
            _send(sock, data)
            _await_end(sock)

    check()


def test_any_bytes_without_a_certificate_disturb_nobody(server: _Server) -> None:
    """Without a client certificate the connection does not get beyond the handshake."""

    @_SLOWER
    @given(data=st.one_of(st.binary(), _FRAMES.map(_HELLO.__add__)))
    def check(data: bytes) -> None:
        with contextlib.suppress(ssl.SSLError), _tls(server, certificate=False) as sock:
            _send(sock, data)
            _await_end(sock)

    check()


@pytest.mark.parametrize("farewell", ["reset", "close"])
def test_hundreds_of_connections_dropped_midway_leave_nothing(
    server: _Server, farewell: str
) -> None:
    """Clients drop connections before, during and after the handshake, and during a call."""
    call = _HELLO + _calls(1, _request_headers("StreamOutput", token=server.token("user")))
    with contextlib.ExitStack() as connections:
        for n, stage in zip(range(300), itertools.cycle(range(5)), strict=False):
            sock: socket.socket = _tcp(server) if stage < 2 else _tls(server, certificate=stage > 2)
            connections.enter_context(sock)
            if stage == 1:
                sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            elif stage > 3:
                _send(sock, call)
            if farewell == "reset":
                sock.setsockopt(*_RESET_ON_CLOSE)
            if n % 50 == 0:
                server.admin.list()
        server.admin.list()


def _ended(received: Iterable[bytes]) -> int:
    """Return how many calls the server has ended."""
    return sum(
        kind == _HEADERS and bool(flags & _END_STREAM)
        for data in received
        for kind, flags, _ in _frames(data)
    )


@pytest.mark.parametrize("name", _METHODS)
def test_calls_without_a_request_hold_up_nobody(server: _Server, name: str) -> None:
    """One caller has as many such calls as the server admits. Another caller's RPCs are served."""
    token = "" if name == "Login" else server.token("user")
    share = _STREAMS_OF_ONE if name == "StreamOutput" else _CALLS_OF_ONE
    if name == "Login":
        share = _LOGINS_OF_ONE
    too_many = 8
    with _tls(server) as sock:
        sock.sendall(_HELLO + _calls(share + too_many, _request_headers(name, token=token)))
        ended = 0
        while ended < too_many:
            ended += _ended([sock.recv(1 << 16)])
        job_id = server.admin.start("sleep", ["infinity"])
        assert server.admin.status(job_id).status == worker_pb.JOB_STATUS_RUNNING
        assert server.admin.stop(job_id).status == worker_pb.JOB_STATUS_STOPPED
        assert list(server.admin.stream(job_id)) == []
        assert job_id in {job.job_id for job in server.admin.list()}
        server.admin.remove(job_id)
        _await_end(sock)


@pytest.mark.parametrize("whole", [False, True])
def test_calls_opened_and_reset_by_the_thousand_lose_nobodys(
    server: _Server, *, whole: bool
) -> None:
    """Calls are reset with or without their request. All calls of another client succeed."""

    def behind(stream: int) -> bytes:
        request = http2_frame(_DATA, _END_STREAM, stream, _EMPTY_REQUEST) if whole else b""
        return request + http2_frame(_RST_STREAM, 0, stream, bytes(4))

    for _ in range(5):
        with _tls(server) as sock:
            _send(sock, _HELLO + _calls(3000, _LIST, behind))
            for _ in range(100):
                server.admin.list()
            _await_end(sock)


def _acknowledged(server: _Server) -> ssl.SSLSocket:
    """Connect, and acknowledge the server's settings: until then gRPC enforces no limit of them."""
    sock = _tls(server)
    ping = http2_frame(_PING, 0, 0, bytes(8))
    sock.sendall(_HELLO + http2_frame(_SETTINGS_FRAME, _ACK) + ping)
    received = b""
    while (_PING, _ACK, bytes(8)) not in _frames(received):
        received += sock.recv(1 << 16)
    return sock


@pytest.mark.parametrize("reference", [b"\x90", b"\xbe"], ids=["static table", "own header"])
def test_header_references_of_one_byte_take_no_memory(server: _Server, reference: bytes) -> None:
    """Four connections send 80 calls with 29,000 references to a header each: 340 MB if kept."""
    own = b"\x40" + _headers((b"x-a", b"y" * 100))[1:]  # goes into the connection's table
    first, rest = _LIST + own + reference * 15_000, reference * 14_000
    attack = b"".join(
        http2_frame(_HEADERS, 0, stream, first)
        + http2_frame(_CONTINUATION, _END_HEADERS, stream, rest)
        for stream in range(1, 40, 2)
    )
    server.forget_peak()
    before = server.memory("VmHWM")
    with contextlib.ExitStack() as connections:
        for _ in range(4):
            sock = connections.enter_context(_acknowledged(server))
            _send(sock, attack)
            _await_end(sock)
        server.admin.list()
    assert server.memory("VmHWM") - before < 96 * 1024 * 1024


# --- metadata ---------------------------------------------------------------------------------

_KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=20)
_LEGAL = st.tuples(
    _KEYS.map(lambda key: f"x-{key}".removesuffix("-bin").encode()),
    st.one_of(st.binary(max_size=50), st.integers(0, 5000).map(b"\xff".__mul__)),
)


def _headers_frames(headers: bytes) -> bytes:
    """Return the frames of one call with an empty request."""
    first, *rest = (headers[n : n + 16_384] for n in range(0, len(headers), 16_384))
    parts = [
        http2_frame(_HEADERS, 0, 1, first),
        *(http2_frame(_CONTINUATION, 0, 1, part) for part in rest),
    ]
    return b"".join(
        [
            _HELLO,
            *parts,
            http2_frame(_CONTINUATION, _END_HEADERS, 1),
            http2_frame(_DATA, _END_STREAM, 1, _EMPTY_REQUEST),
        ]
    )


def test_any_metadata_of_legal_keys_is_ignored(server: _Server) -> None:
    """Values may be binary, may have control characters, and may be many or long."""
    token = server.token("user")

    @_SLOWER
    @given(pairs=st.lists(_LEGAL, max_size=20), times=st.sampled_from([1, 1, 1, 50]))
    @example(pairs=[(b"x-a", b"\xff\xfe")], times=1)
    def check(pairs: list[tuple[bytes, bytes]], times: int) -> None:
        pairs = pairs * times if sum(len(value) for _, value in pairs) * times < 200_000 else pairs
        with _tls(server) as sock:
            _send(sock, _headers_frames(_request_headers("ListJobs", *pairs, token=token)))
            assert _read_status(sock) == 0

    check()


def test_any_other_metadata_disturbs_nobody(server: _Server) -> None:
    """The keys are illegal, or have a meaning in gRPC or HTTP/2."""
    token = server.token("user")
    keys = st.one_of(
        st.binary(max_size=20),
        st.sampled_from([b"grpc-timeout", b"grpc-encoding", b"te", b"content-type", b"host"]),
        st.sampled_from([b"x-bin", b"grpc-tags-bin", b"grpc-trace-bin", b":path", b":method"]),
        st.sampled_from([b"Authorization", b"cookie", b"user-agent", b"grpc-message", b""]),
    )

    @_SETTINGS
    @given(pairs=st.lists(st.tuples(keys, st.binary(max_size=50)), max_size=5))
    @example(pairs=[(b"x-\xff", b"")])
    @example(pairs=[(b":path", b"/\xff\xfe")])
    def check(pairs: list[tuple[bytes, bytes]]) -> None:
        with _tls(server) as sock:
            _send(sock, _headers_frames(_request_headers("ListJobs", *pairs, token=token)))
            _await_end(sock)  # not a status: gRPC itself may hold that back for up to a second

    check()


def test_any_authorization_is_unauthenticated(server: _Server) -> None:
    """The values: any bytes with and without the scheme, damaged tokens, a valid token twice."""
    token = server.token("user").encode()

    @_SETTINGS
    @given(
        values=st.one_of(
            st.lists(st.binary(max_size=100).map(b"Bearer ".__add__), min_size=1, max_size=3),
            st.lists(st.binary(max_size=100), max_size=3),
            st.integers(1, 100_000).map(lambda size: [b"Bearer " + b"x" * size]),
            st.tuples(st.integers(0, len(token) - 1), st.binary(min_size=1, max_size=3))
            .map(lambda part: token[: part[0]] + part[1] + token[part[0] + len(part[1]) :])
            .filter(token.__ne__)
            .map(lambda forged: [b"Bearer " + forged]),
        )
    )
    @example(values=[b"Bearer " + token] * 2)
    @example(values=[b"Bearer \xff"])
    def check(values: list[bytes]) -> None:
        pairs = [(b"authorization", value) for value in values]
        with _tls(server) as sock:
            _send(sock, _headers_frames(_request_headers("ListJobs", *pairs)))
            assert _read_status(sock) == grpc.StatusCode.UNAUTHENTICATED.value[0]

    check()


# --- what a client is told ---------------------------------------------------------------------


def test_metadata_above_16_kib_gets_an_error_that_names_the_limit(
    server: _Server, channel: grpc.Channel
) -> None:
    """The client learns that its metadata is too large."""
    rpc: Any = channel.unary_unary(f"/{_METHODS['ListJobs'].containing_service.full_name}/ListJobs")
    metadata = [("authorization", f"Bearer {server.token('user')}"), ("x-a", "a" * 16_500)]
    with pytest.raises(grpc.RpcError) as caught:
        rpc(b"", metadata=metadata, timeout=GUARD_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "metadata size" in str(caught.value.details())


def test_stream_of_a_silent_job_begins_with_its_headers(
    server: _Server, channel: grpc.Channel
) -> None:
    """The headers tell the client that the stream was accepted. The job has written nothing."""
    job_id = server.admin.start("sleep", ["infinity"])
    path = f"/{_METHODS['StreamOutput'].containing_service.full_name}/StreamOutput"
    rpc: Any = channel.unary_stream(path)
    metadata = [("authorization", f"Bearer {server.admin.token}")]
    call = rpc(_block(1, job_id.encode()), metadata=metadata, timeout=GUARD_S)
    call.initial_metadata()  # returns when the headers arrive, or when the call ends
    assert call.is_active()
    server.admin.stop(job_id)
    assert list(call) == []
