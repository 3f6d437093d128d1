"""Attacks on authorization from outside: a server program over real mutual TLS.

The tests run over every RPC in the protocol's descriptors, and therefore include a new RPC without
a change here. The tests have the server's token key and can sign any token. test_auth.py has the
unit tests of `auth.py`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import math
import os
import random
import re
import signal
import socket
import ssl
import statistics
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message_factory import GetMessageClass

import authservice_pb2 as auth_pb
import workerservice_pb2 as worker_pb
from client import Client, ClientError
from testkit import GUARD_S, HTTP2_PREFACE, ServerProgram, http2_frame
from users import SEEDED_USERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from google.protobuf.descriptor import MethodDescriptor

    Metadata = Sequence[tuple[str, str | bytes]]

_HERE = Path(__file__).resolve().parent
_METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for file in (auth_pb.DESCRIPTOR, worker_pb.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}
_WITH_TOKEN = [name for name in _METHODS if name != "Login"]
_WITH_JOB = [
    name for name, method in _METHODS.items() if "job_id" in method.input_type.fields_by_name
]
_LIFETIME_S = 30 * 24 * 3600

# All users of these tests have the password of the seeded user.
_PASSWORD, _HASH = next((user.name, user.password_hash) for user in SEEDED_USERS[1:])
# `carol` makes so many calls that hers share lines of the audit log, which are written later.
_USERS = {"root": "admin", "alice": "user", "bob": "user", "carol": "user", "leaver": "user"}

# The fields besides `job_id` that a request needs in order to succeed.
_REQUESTS: dict[str, dict[str, Any]] = {
    "Login": {"username": "alice", "password": _PASSWORD},
    "StartJob": {"command": "true"},
    "SignalJob": {"signal": "CONT"},
}


# --- calls ------------------------------------------------------------------------------


class _Answer(NamedTuple):
    """All parts of an answer that a caller sees."""

    code: str
    details: str
    initial: tuple[tuple[str, str | bytes], ...] = ()
    messages: tuple[bytes, ...] = ()
    trailing: tuple[tuple[str, str | bytes], ...] = ()


_NO_TOKEN = _Answer(
    "UNAUTHENTICATED",
    "no valid token in the metadata `authorization: Bearer TOKEN`: it has expired, was revoked, or "
    "belongs to another client certificate; log in again",
)
_NO_JOB = _Answer("NOT_FOUND", "no such job")


def _path(name: str) -> str:
    return f"/{_METHODS[name].containing_service.full_name}/{name}"


def _request(name: str, job_id: str = "", **fields: Any) -> bytes:
    """Return a request that succeeds if the caller may reach the job."""
    fields = _REQUESTS.get(name, {}) | ({"job_id": job_id} if name in _WITH_JOB else {}) | fields
    return GetMessageClass(_METHODS[name].input_type)(**fields).SerializeToString()


def _begin(channel: grpc.Channel, name: str, data: bytes, metadata: Metadata) -> Any:
    # On the wire a unary answer looks like a stream of one message.
    rpc: Any = channel.unary_stream(_path(name))
    return rpc(data, metadata=tuple(metadata), timeout=GUARD_S)


def _call(channel: grpc.Channel, name: str, data: bytes, metadata: Metadata) -> _Answer:
    """Call an RPC and read to the end of the call; return the answer."""
    call = _begin(channel, name, data, metadata)
    messages = []
    with contextlib.suppress(grpc.RpcError):
        messages.extend(call)
    initial, trailing = (
        tuple((item.key, item.value) for item in items or ())
        for items in (call.initial_metadata(), call.trailing_metadata())
    )
    return _Answer(call.code().name, call.details(), initial, tuple(messages), trailing)


def _admitted(channel: grpc.Channel, name: str, data: bytes, metadata: Metadata) -> str:
    """Call an RPC up to its first message; return "OK" if the call is admitted, else the error."""
    call = _begin(channel, name, data, metadata)
    try:
        next(call)
    except StopIteration:
        return str(call.code().name)
    except grpc.RpcError:
        return f"{call.code().name}: {call.details()}"
    call.cancel()
    return "OK"


def _follow(channel: grpc.Channel, token: str, job_id: str) -> Any:
    """Open a stream and wait for its first message."""
    call = _begin(channel, "StreamOutput", _request("StreamOutput", job_id), _bearer(token))
    next(call)
    return call


def _end(call: Any) -> tuple[str, str]:
    """Read a stream to its end; return the status code and message."""
    with contextlib.suppress(grpc.RpcError):
        list(call)
    return call.code().name, call.details()


def _bearer(token: str) -> Metadata:
    return [("authorization", f"Bearer {token}")] if token else []


# --- a server whose key we have ---------------------------------------------------------


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class _Mint:
    """Makes and signs variants of the token of a login. Attributes: `key`, `claims`."""

    header: bytes = b'{"alg":"HS256","typ":"JWT"}'

    def __init__(self, token: str, key: bytes) -> None:
        header, payload, signature = token.split(".")
        self.key = key
        self.claims: dict[str, Any] = json.loads(_unbase64(payload))
        assert _unbase64(header) == self.header
        assert self.assemble(_unbase64(payload)) == f"{header}.{payload}.{signature}"

    def token(self, **changes: Any) -> str:
        """Return a token of a new session with changed claims; `...` leaves a claim out."""
        return self.assemble(self.payload(**changes))

    def payload(self, **changes: Any) -> bytes:
        token_id = str(uuid.uuid4())
        claims = self.claims | {"jti": token_id, "sid": token_id} | changes
        claims = {name: value for name, value in claims.items() if value is not ...}
        return json.dumps(claims, separators=(",", ":")).encode()

    def headed(self, *, key: bytes | None = None, digest: str = "sha256", **changes: Any) -> str:
        """Return a token with a changed header; `...` leaves a header field out."""
        header = {"alg": "HS256", "typ": "JWT"} | changes
        header = {name: value for name, value in header.items() if value is not ...}
        return self.assemble(
            self.payload(), json.dumps(header, separators=(",", ":")).encode(), key, digest
        )

    def assemble(
        self,
        payload: bytes,
        header: bytes = header,
        key: bytes | None = None,
        digest: str = "sha256",
    ) -> str:
        signed = f"{_base64(header)}.{_base64(payload)}"
        mac = hmac.digest(self.key if key is None else key, signed.encode(), digest)
        return f"{signed}.{_base64(mac)}"


def _write_users(path: Path, **roles: str) -> None:
    path.write_text("".join(f"{name}:{role}:{_HASH}\n" for name, role in roles.items()))


class _House:
    """A server with users of its own, and the means to attack the server."""

    def __init__(self, program: ServerProgram, certs: Path, state: Path, users: Path) -> None:
        self.program, self.certs, self.state, self.users = program, certs, state, users
        self.channel = Client(program.address, certs=certs)._channel
        self.mints: dict[str, _Mint] = {}

    def login(self, name: str) -> str:
        with self.client() as client:
            token, _ = client.login(name, _PASSWORD)
        self.mints[name] = _Mint(token, (self.state / "token.key").read_bytes())
        return token

    def client(self, name: str = "", *, certificate: str = "client") -> Client:
        """Return a client with a new token of the user; without a token if `name` is ""."""
        return Client(
            self.program.address,
            certs=self.certs,
            cert=self.certs / f"{certificate}.pem",
            key=self.certs / f"{certificate}-key.pem",
            token=self.token(name),
        )

    def token(self, name: str) -> str:
        return self.mints[name].token() if name else ""

    def call(self, user: str, name: str, data: bytes, more: Metadata = ()) -> _Answer:
        return _call(self.channel, name, data, [*_bearer(self.token(user)), *more])

    def run(self, user: str, *, forever: bool) -> str:
        """Start a job as the user; wait for its output and, unless `forever`, for its end."""
        with self.client(user) as client:
            job_id = client.start("sh", ["-c", f"echo ready; {'sleep infinity' * forever}"])
            output = client.stream(job_id)
            assert next(output) == b"ready\n"
            if not forever:
                assert list(output) == []
        return job_id

    def reload(self, witness: str) -> None:
        """Make the server read the users file; block until this ends a stream of `witness`."""
        job_id = self.run(witness, forever=True)
        stream = _follow(self.channel, self.token(witness), job_id)
        self.program.process.send_signal(signal.SIGHUP)
        assert _end(stream) == _NO_TOKEN[:2]

    def record(self) -> dict[str, Any]:
        """Return the last line of the audit log."""
        line = (self.state / "audit.log").read_text().splitlines()[-1]
        fields: dict[str, Any] = json.loads(line)
        return fields


@pytest.fixture(scope="module")
def house(
    certs: Path, make_state: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_House]:
    """A server with the users of `_USERS`. All have logged in."""
    directory, state = tmp_path_factory.mktemp("house"), make_state()
    users = directory / "users"
    _write_users(users, **_USERS)
    program = ServerProgram(
        directory / "server.log",
        *("--listen", "127.0.0.1:0", "--limits", "auto", "--certs", str(certs)),
        *("--state-dir", str(state), "--users", str(users)),
    )
    house = _House(program, certs, state, users)
    for name in _USERS:
        house.login(name)
    yield house
    house.channel.close()
    if program.end() != 0:
        pytest.fail(f"the server did not end well: {program.log.read_text()}")


@pytest.fixture(scope="module")
def foreign(house: _House) -> dict[str, str]:
    """The IDs of jobs of other users than alice. Afterwards `leaver` is no longer a user."""
    jobs = {
        f"{state}, of {owner}": house.run(owner, forever=state == "running")
        for owner in ("bob", "root", "leaver")
        for state in ("running", "finished")
    }
    _write_users(house.users, **{name: _USERS[name] for name in _USERS if name != "leaver"})
    house.reload("leaver")
    return jobs


# --- the matrix -------------------------------------------------------------------------

_ROLES = {"admin": "root", "user": "alice", "nobody": "", "removed user": "leaver"}
_JOBS = [f"{whose} {state}" for whose in ("own", "foreign") for state in ("running", "finished")]
_MATRIX = [
    (role, name, job)
    for name in _METHODS
    for role in _ROLES
    for job in ([*_JOBS, "absent"] if name in _WITH_JOB else ["no"])
]


def _expected(role: str, name: str, job: str) -> _Answer | None:
    """Return the refusal that README.md documents; None if the call is admitted."""
    if name == "Login":
        return None
    if role in {"nobody", "removed user"}:
        return _NO_TOKEN
    if job == "absent" or (job.startswith("foreign") and role != "admin"):
        return _NO_JOB
    return None


def test_matrix_sees_every_job_that_a_request_can_name() -> None:
    """A request names a job only in `job_id`. The tests below would miss any other field."""
    for name, method in _METHODS.items():
        naming = [field.name for field in method.input_type.fields if "job" in field.name]
        assert naming in ([], ["job_id"]), name
        assert not method.client_streaming or name == "WriteInput"
    assert {"StopJob", "GetJobStatus", "StreamOutput"} <= set(_WITH_JOB)


@pytest.mark.parametrize(("role", "name", "job"), _MATRIX)
def test_matrix(house: _House, foreign: dict[str, str], role: str, name: str, job: str) -> None:
    """Each role calls each RPC for each kind of job. A refused call does not change the job."""
    caller, forever = _ROLES[role], "running" in job
    job_id = str(uuid.uuid4())
    if job.startswith("own"):
        # A caller who cannot start a job uses a job that `leaver` started before the removal.
        owned = foreign[f"{'running' if forever else 'finished'}, of leaver"]
        job_id = house.run(caller, forever=forever) if role in {"admin", "user"} else owned
    elif job.startswith("foreign"):
        job_id = house.run("bob", forever=forever)
    elif name == "WatchJobs" and role in {"admin", "user"}:
        house.run(caller, forever=False)  # without any job there is no first message
    expected, data = _expected(role, name, job), _request(name, job_id)
    if expected is None:
        # The caller is admitted, but a running job cannot be removed, one that has ended gets no
        # signal, and none of these jobs takes input.
        early_or_late = {
            ("RemoveJob", True): f"job {job_id} is still running; stop it first",
            ("SignalJob", False): f"no signal was sent to job {job_id}: it has ended",
            ("WriteInput", False): f"job {job_id} takes no input: it has ended",
            ("WriteInput", True): f"job {job_id} takes no input: it was started without an input",
        }
        problem = early_or_late.get((name, forever))
        assert _admitted(house.channel, name, data, _bearer(house.token(caller))) == (
            f"FAILED_PRECONDITION: {problem}" if problem else "OK"
        )
        return
    assert house.call(caller, name, data) == expected
    if job not in {"absent", "no"}:
        with house.client("root") as admin:
            assert admin.status(job_id).status == (
                worker_pb.JOB_STATUS_RUNNING if forever else worker_pb.JOB_STATUS_FINISHED
            )
            assert not admin.status(job_id).subscribers


def test_list_shows_nothing_of_others(house: _House, foreign: dict[str, str]) -> None:
    """A user sees their own jobs. An admin sees all jobs, also those of removed users.

    Both lists are in the order of the starts.
    """
    own, later = house.run("alice", forever=False), house.run("alice", forever=False)
    with house.client("alice") as alice, house.client("root") as root:
        assert own in {job.job_id for job in alice.list()}
        assert {job.owner for job in alice.list()} == {"alice"}
        assert {own, *foreign.values()} <= {job.job_id for job in root.list()}
        for client in (alice, root):
            listed = [job.job_id for job in client.list()]
            assert listed.index(own) < listed.index(later)


@pytest.mark.parametrize("user", ["user", "admin"])
def test_rpc_that_nobody_put_in_the_permission_table_is_denied(
    start_server: Callable[..., ServerProgram],
    certs: Path,
    tokens: dict[str, str],
    tmp_path: Path,
    user: str,
) -> None:
    """A server with an empty table denies every RPC to every user, for any request."""
    tmp_path.joinpath("sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(_HERE)!r})\nimport auth\nauth.PERMISSIONS.clear()\n"
    )
    address = start_server(env={"PYTHONPATH": str(tmp_path)}).address
    with Client(address, certs=certs) as client:
        for name in _METHODS:
            denied = _Answer("PERMISSION_DENIED", f"the role {user} may not call {_path(name)}")
            for data in (_request(name, str(uuid.uuid4())), _request(name, "x"), b"\xff"):
                bearer = _bearer(tokens[user])
                assert _call(client._channel, name, data, bearer) == denied
                assert _call(client._channel, name, data, []) == _NO_TOKEN


# --- foreign and absent jobs ------------------------------------------------------------

# Ways to write a job's ID.
_SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in upper case": str.upper,
    "in mixed case": lambda job_id: job_id[:18].upper() + job_id[18:],
    "space before": lambda job_id: f" {job_id}",
    "newline after": lambda job_id: f"{job_id}\n",
    "NUL after": lambda job_id: f"{job_id}\0",
    "in braces": lambda job_id: f"{{{job_id}}}",
    "as an URN": lambda job_id: f"urn:uuid:{job_id}",
    "without dashes": lambda job_id: job_id.replace("-", ""),
    "cut off": lambda job_id: job_id[:-1],
    "twice": lambda job_id: job_id * 2,
    "very long": lambda job_id: job_id + "0" * 100_000,
    "full-width": lambda job_id: "".join(
        chr(ord(c) + 0xFEE0) if c.isdecimal() else c for c in job_id
    ),
}
_WELL_SPELT = ["as it is", "in upper case", "in mixed case"]


@pytest.mark.parametrize("name", _WITH_JOB)
@pytest.mark.parametrize("spelling", _SPELLINGS)
def test_foreign_and_absent_are_the_same_however_the_id_is_spelt(
    house: _House, foreign: dict[str, str], name: str, spelling: str
) -> None:
    """The whole answers are equal. If an answer repeats the ID, the test masks the ID."""
    answers = set()
    for job_id in [*foreign.values(), *(str(uuid.uuid4()) for _ in range(3))]:
        text = _SPELLINGS[spelling](job_id)
        answer = house.call("alice", name, _request(name, text))
        answers.add(answer._replace(details=answer.details.replace(repr(text[:64]), "TEXT")))
    if spelling in _WELL_SPELT:
        assert answers == {_NO_JOB}
    else:
        (answer,) = answers
        assert (answer.code, answer[2:]) == ("INVALID_ARGUMENT", ((), (), ()))
        assert answer.details.startswith("not a job ID: TEXT; ")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _text_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


# Extreme values by a field's type. If an RPC gets a field of another type, the test below fails.
_EXTREMES: dict[int, list[Any]] = {
    FieldDescriptor.TYPE_UINT64: [0, 1, 6, 7, 2**63 - 1, 2**63, 2**64 - 1],
    FieldDescriptor.TYPE_INT64: [-(2**63), -1, 1, 2**63 - 1],
    FieldDescriptor.TYPE_BOOL: [True],
    FieldDescriptor.TYPE_STRING: ["", "x", "\0", "ä" * 1000],
    FieldDescriptor.TYPE_BYTES: [b"", b"x", bytes(100_000)],
}
# The same by the name of a message.
_EXTREME_MESSAGES: dict[str, list[Any]] = {
    "google.protobuf.Duration": [
        Duration(seconds=seconds, nanos=nanos)
        for seconds in (-(2**63), -1, 0, 1, 2**63 - 1)
        for nanos in (-(2**31), 0, 2**31 - 1)
    ],
}


def _bodies(name: str, job_id: str) -> Iterator[tuple[bytes, str]]:
    """Yield requests that name the job and have further content, each with the expected code."""
    plain = _request(name, job_id)
    fields = _METHODS[name].input_type.fields
    messages = {field.number for field in fields if field.message_type}
    for field in fields:
        if field.name != "job_id":
            message = field.message_type
            for value in _EXTREME_MESSAGES[message.full_name] if message else _EXTREMES[field.type]:
                yield _request(name, job_id, **{field.name: value}), "NOT_FOUND"
                # The field before the ID
                yield _request(name, "", **{field.name: value}) + plain, "NOT_FOUND"
    for number in range(2, 40):  # fields of a wrong type, and unknown fields
        code = "INVALID_ARGUMENT" if number in messages else "NOT_FOUND"
        yield plain + _text_field(number, b"root"), code
    yield _request(name, str(uuid.uuid4())) + plain, "NOT_FOUND"  # of two IDs the last counts
    yield _request(name, "x") + plain, "NOT_FOUND"
    yield plain + b"\x78\x01" * 10_000, "NOT_FOUND"
    # Not messages of the right type
    yield plain + b"\xff", "INVALID_ARGUMENT"
    yield plain + _text_field(1, b"\xc3\x28"), "INVALID_ARGUMENT"
    yield plain[:-1], "INVALID_ARGUMENT"


@pytest.mark.parametrize("name", _WITH_JOB)
def test_foreign_and_absent_are_the_same_whatever_else_is_asked(
    house: _House, foreign: dict[str, str], name: str
) -> None:
    """The server checks the job's owner before it looks at any other field."""
    ids = [*foreign.values(), str(uuid.uuid4()), str(uuid.uuid4())]
    for requests in zip(*(_bodies(name, job_id) for job_id in ids), strict=True):
        answers = {(house.call("alice", name, data), code) for data, code in requests}
        ((answer, code),) = answers
        assert answer.code == code
        if code == "NOT_FOUND":
            assert answer == _NO_JOB


def test_offset_is_looked_at_for_ones_own_job(house: _House) -> None:
    """The test above relies on this: its offsets give an error once the caller may see the job."""
    job_id = house.run("alice", forever=False)
    answer = house.call("alice", "StreamOutput", _request("StreamOutput", job_id, offset=7))
    assert answer.code == "OUT_OF_RANGE"


def test_ceiling_of_streams_is_looked_at_after_the_owner(
    start_server: Callable[..., ServerProgram], certs: Path, tokens: dict[str, str]
) -> None:
    """Even when a user has reached the ceiling, foreign and absent jobs get the same answer."""
    address = start_server("--max-streams", "1").address
    with (
        Client(address, certs=certs, token=tokens["user"]) as user,
        Client(address, certs=certs, token=tokens["admin"]) as admin,
    ):
        command = ("sh", ["-c", "echo ready; exec sleep infinity"])
        theirs, own = admin.start(*command), user.start(*command)

        def stream(job_id: str) -> _Answer:
            data = _request("StreamOutput", job_id)
            return _call(user._channel, "StreamOutput", data, _bearer(user.token))

        output = user.stream(own)
        next(output)
        assert stream(own).code == "RESOURCE_EXHAUSTED"
        assert {stream(job_id) for job_id in (theirs, str(uuid.uuid4()))} == {_NO_JOB}
        output.close()


# --- the same, on the wire --------------------------------------------------------------

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7
_END_STREAM, _END_HEADERS = 1, 4


def _hpack(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Encode headers for HPACK (RFC 7541), as literals without indexing and Huffman coding."""

    def text(data: bytes) -> bytes:
        if len(data) < 0x7F:
            return bytes([len(data)]) + data
        return b"\x7f" + _varint(len(data) - 0x7F) + data

    return b"".join(b"\0" + text(name) + text(value) for name, value in headers)


def _read(sock: ssl.SSLSocket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise ConnectionError
        data += chunk
    return data


def _wire(
    house: _House, name: str, request: bytes, headers: Sequence[tuple[bytes, bytes]]
) -> bytes:
    """Make a call on a new connection, without gRPC; return the frames of the answer.

    The last frame is the one with which the server ends the stream or breaks off the connection.
    """
    host, _, port = house.program.address.rpartition(":")
    context = ssl.create_default_context(cafile=house.certs / "server-ca.pem")
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(house.certs / "client.pem", house.certs / "client-key.pem")
    block = _hpack(
        [
            *((b":method", b"POST"), (b":scheme", b"https"), (b":path", _path(name).encode())),
            *((b":authority", b"localhost"), (b"te", b"trailers")),
            (b"content-type", b"application/grpc"),
            *headers,
        ]
    )
    message = b"\0" + len(request).to_bytes(4, "big") + request
    answer = b""
    with (
        socket.create_connection((host, int(port)), GUARD_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as sock,
        contextlib.suppress(ConnectionError),
    ):
        sock.sendall(
            HTTP2_PREFACE
            + http2_frame(_SETTINGS, 0, 0)
            + http2_frame(_HEADERS, _END_HEADERS, 1, block)
            + http2_frame(_DATA, _END_STREAM, 1, message)
        )
        while True:
            head = _read(sock, 9)
            payload = _read(sock, int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if stream == 1:
                answer += head + payload
            if kind == _GOAWAY or (
                stream == 1
                and (kind == _RST_STREAM or (kind in {_DATA, _HEADERS} and flags & _END_STREAM))
            ):
                break
    return answer


def _wire_token(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + token.encode())]


@pytest.mark.parametrize("name", _WITH_JOB)
def test_foreign_and_absent_are_the_same_bytes_in_the_same_frames(
    house: _House, foreign: dict[str, str], name: str
) -> None:
    """The raw bytes are compared, because gRPC's client does not show everything."""
    token = house.token("alice")
    answers = {
        _wire(house, name, _request(name, job_id), _wire_token(token))
        for job_id in [*foreign.values(), str(uuid.uuid4())]
    }
    (answer,) = answers
    assert b"no such job" in answer


# --- their times ------------------------------------------------------------------------

_TRIES = 1000
_Z_MAX = 5.0  # gives one false alarm in 1.7 million runs


def _z(differences: Sequence[float]) -> float:
    """Apply the sign test: return the excess of positive differences, in standard deviations."""
    signs = [difference > 0 for difference in differences if difference]
    return (2 * sum(signs) - len(signs)) / math.sqrt(len(signs))


@pytest.mark.alone
@pytest.mark.parametrize("name", _WITH_JOB)
@pytest.mark.parametrize("state", ["running", "finished"])
def test_foreign_and_absent_take_the_same_time(
    house: _House,
    foreign: dict[str, str],
    name: str,
    state: str,
    record_property: Callable[[str, object], None],
) -> None:
    """In 1,000 pairs of calls, each kind is the slower one about equally often.

    The order within a pair is random. If there is no real difference, both signs are therefore
    equally likely in every pair, even on a busy machine. A busy machine makes the test less
    sensitive, but does not make it fail.
    """
    rpc: Any = house.channel.unary_unary(_path(name))
    metadata = tuple(_bearer(house.token("carol")))
    requests = [_request(name, job) for job in (foreign[f"{state}, of bob"], str(uuid.uuid4()))]

    def time_of(request: bytes) -> float:
        start = time.perf_counter()
        with contextlib.suppress(grpc.RpcError):
            rpc(request, metadata=metadata, timeout=GUARD_S)
        return time.perf_counter() - start

    def times() -> tuple[float, float]:
        order = random.sample((0, 1), 2)
        taken = {which: time_of(requests[which]) for which in order}
        return taken[0], taken[1]

    for _ in range(_TRIES // 10):
        times()
    pairs = [times() for _ in range(_TRIES)]
    differences = [theirs - absent for theirs, absent in pairs]
    typical = statistics.median(absent for _, absent in pairs)
    z, difference = _z(differences), statistics.median(differences)
    record_property("z", z)
    told = f"z {z:.1f}, median difference {difference * 1e6:.1f} us of {typical * 1e6:.0f} us"
    assert abs(z) < _Z_MAX, told
    # Shows that the test is sensitive enough: it detects a difference of a quarter of a call.
    assert _z([each + typical / 4 for each in differences]) > _Z_MAX, told


# --- forged tokens ----------------------------------------------------------------------


def _issued(seconds_ago: int) -> dict[str, int]:
    issued = int(time.time()) - seconds_ago
    return {"iat": issued, "exp": issued + _LIFETIME_S}


def _number(mint: _Mint, claim: str, literal: str) -> str:
    """Return a token with the text `literal` as a claim's value; the text may be invalid JSON."""
    payload = mint.payload(**{claim: "LITERAL"})
    return mint.assemble(payload.replace(b'"LITERAL"', literal.encode()))


def _with_rsa(mint: _Mint) -> str:
    """Return a token with a correct RS256 signature by a key of the forger."""
    header = _base64(b'{"alg":"RS256","typ":"JWT"}')
    signed = f"{header}.{_base64(mint.payload())}"
    with tempfile.NamedTemporaryFile() as key:
        command = ["openssl", "genrsa", "-out", key.name, "2048"]
        subprocess.run(command, check=True, capture_output=True)
        command = ["openssl", "dgst", "-sha256", "-sign", key.name]
        signature = subprocess.run(
            command, input=signed.encode(), check=True, capture_output=True
        ).stdout
    return f"{signed}.{_base64(signature)}"


def _with_detached_payload(mint: _Mint) -> str:
    """Return a token as in RFC 7797: the raw payload is signed and is not part of the token."""
    header = _base64(b'{"alg":"HS256","b64":false,"crit":["b64"]}')
    mac = hmac.digest(mint.key, f"{header}.".encode() + mint.payload(), "sha256")
    return f"{header}..{_base64(mac)}"


_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def _respelt(token: str, step: int) -> str:
    """Change the last character by `step`. The decoded signature stays the same.

    Base64 does not use the last two bits of that character.
    """
    return token[:-1] + _ALPHABET[_ALPHABET.index(token[-1]) + step]


def _changed(mint: _Mint, part: int) -> str:
    """Return a token with one flipped bit in the first byte of a part."""
    parts = mint.token().split(".")
    data = bytearray(_unbase64(parts[part]))
    data[0] ^= 1
    parts[part] = _base64(bytes(data))
    return ".".join(parts)


_FORGERIES: dict[str, Callable[[_Mint], str]] = {
    # The algorithm
    **{
        f"alg {alg!r}": lambda mint, alg=alg: mint.headed(alg=alg)  # type: ignore[misc]
        for alg in (
            *("none", "None", "NONE", "nOnE", "", "hs256", "HS256 ", "RS256", "ES256", "PS256"),
            *(None, ["HS256"], {"HS256": 1}, 256),
        )
    },
    **{
        f"alg {alg}, unsigned": lambda mint, alg=alg: (  # type: ignore[misc]
            mint.headed(alg=alg).rpartition(".")[0] + "."
        )
        for alg in ("none", "None", "NONE", "HS256")
    },
    "alg missing": lambda mint: mint.headed(alg=...),
    "HS384": lambda mint: mint.headed(alg="HS384", digest="sha384"),
    "HS512": lambda mint: mint.headed(alg="HS512", digest="sha512"),
    "HS512 signature, HS256 header": lambda mint: mint.headed(digest="sha512"),
    "RS256": _with_rsa,
    # The key
    "zero key": lambda mint: mint.headed(key=bytes(32)),
    "empty key": lambda mint: mint.headed(key=b""),
    "the key twice": lambda mint: mint.headed(key=mint.key * 2),
    "the key without its end": lambda mint: mint.headed(key=mint.key[:-1]),
    "the key in hexadecimal": lambda mint: mint.headed(key=mint.key.hex().encode()),
    # The header
    "crit": lambda mint: mint.headed(crit=["exp"]),
    "crit empty": lambda mint: mint.headed(crit=[]),
    "b64 false": lambda mint: mint.headed(b64=False),
    "b64 false, critical": lambda mint: mint.headed(b64=False, crit=["b64"]),
    "b64 false, detached": _with_detached_payload,
    "kid": lambda mint: mint.headed(kid="../../../dev/null"),
    "jku": lambda mint: mint.headed(jku="https://localhost/keys"),
    "jwk": lambda mint: mint.headed(jwk={"kty": "oct", "k": _base64(mint.key)}),
    "another typ": lambda mint: mint.headed(typ="at+jwt"),
    "typ missing": lambda mint: mint.headed(typ=...),
    "header with a name twice": lambda mint: mint.assemble(
        mint.payload(), b'{"alg":"none","alg":"HS256","typ":"JWT"}'
    ),
    "header not an object": lambda mint: mint.assemble(mint.payload(), b'["HS256"]'),
    "header nested deeply": lambda mint: mint.assemble(b"{}", b"[" * 1000),
    # The signature
    "last bits changed": lambda mint: _respelt(mint.token(), 1),
    "last bits changed otherwise": lambda mint: _respelt(mint.token(), 3),
    "header changed": lambda mint: _changed(mint, 0),
    "payload changed": lambda mint: _changed(mint, 1),
    "signature changed": lambda mint: _changed(mint, 2),
    "signature cut": lambda mint: mint.token()[:-1],
    "signature of another token": lambda mint: (
        mint.token().rpartition(".")[0] + "." + mint.token().rpartition(".")[2]
    ),
    "padded": lambda mint: f"{mint.token()}=",
    # The claims
    "another issuer": lambda mint: mint.token(iss="someone"),
    "issuer a list": lambda mint: mint.assemble(mint.payload(iss=["job-worker"])),
    "another audience": lambda mint: mint.token(aud="jobworker.v2"),
    "audience a list": lambda mint: mint.token(aud=["jobworker.v1"]),
    "audience a longer list": lambda mint: mint.token(aud=["jobworker.v1", "x"]),
    "expired": lambda mint: mint.token(**_issued(_LIFETIME_S + 3600)),
    "expired in this second": lambda mint: mint.token(**_issued(_LIFETIME_S)),
    "valid for a second longer": lambda mint: mint.token(exp=mint.claims["exp"] + 1),
    "session for a second longer": lambda mint: mint.token(
        session_exp=mint.claims["session_exp"] + 1
    ),
    **{
        f"{claim} {literal[:9]}": lambda mint, claim=claim, literal=literal: _number(  # type: ignore[misc]
            mint, claim, literal
        )
        for claim in ("exp", "iat", "nbf")
        for literal in (
            *("null", "true", "false", "0", "-1", '"later"', '"9999999999"', "9999999999.0"),
            *("1e10", "1e400", "NaN", "Infinity", "9" * 400, "-" + "9" * 400, "[9999999999]"),
            *("{}", "9999999999", "0x7fffffff"),
        )
    },
    "iat and exp fractions": lambda mint: mint.token(
        iat=float(mint.claims["iat"]), exp=float(mint.claims["exp"])
    ),
    **{
        f"sub {sub!r}": lambda mint, sub=sub: mint.assemble(mint.payload(sub=sub))  # type: ignore[misc]
        for sub in (
            *("mallory", "Alice", "ALICE", "alice ", "", "root", "bob", "leaver", "\ud800"),
            *(7, None, True, ["alice"], {"alice": 1}),
        )
    },
    **{
        f"role {role!r}": lambda mint, role=role: mint.token(role=role)  # type: ignore[misc]
        for role in ("admin", "USER", "User", "", "user ", None, True, ["user"], ["user", "admin"])
    },
    **{
        f"jti {jti!r}": lambda mint, jti=jti: mint.assemble(mint.payload(jti=jti))  # type: ignore[misc]
        for jti in (
            *("", "x", 1, None, ["x"], {"x": 1}, "0E4FD4A6-4b0c-4c4e-9f6e-2f1d3c5b7a98"),
            *("0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98\n", "x" * 1000),
        )
    },
    "cnf empty": lambda mint: mint.token(cnf={}),
    "cnf of another certificate": lambda mint: mint.token(
        cnf={"x5t#S256": _base64(hashlib.sha256(b"").digest())}
    ),
    "cnf of two kinds": lambda mint: mint.token(cnf=mint.claims["cnf"] | {"jkt": "x"}),
    "one more claim": lambda mint: mint.token(admin=True),
    "not before, long ago": lambda mint: mint.token(nbf=1),
    "payload with a name twice": lambda mint: mint.assemble(
        mint.payload().replace(b'"sub":"alice"', b'"sub":"root","sub":"alice"')
    ),
    "payload with a name twice, the other way": lambda mint: mint.assemble(
        mint.payload().replace(b'"sub":"alice"', b'"sub":"alice","sub":"root"')
    ),
    "run a fraction": lambda mint: mint.token(run=float(mint.claims["run"])),
    "run a text": lambda mint: mint.token(run=str(mint.claims["run"])),
    "payload with spaces": lambda mint: mint.assemble(mint.payload().replace(b",", b", ")),
    "payload not an object": lambda mint: mint.assemble(b"[]"),
    "payload not JSON": lambda mint: mint.assemble(b"x"),
    "payload not UTF-8": lambda mint: mint.assemble(b'{"\xff":1}'),
    "payload nested deeply": lambda mint: mint.assemble(b"[" * 1000),
    **{
        f"{claim} missing": lambda mint, claim=claim: mint.token(**{claim: ...})  # type: ignore[misc]
        for claim in (
            *("iss", "aud", "sub", "role", "entry", "iat", "exp", "run", "jti", "cnf"),
            *("sid", "auth_time", "session_exp", "session_run"),
        )
    },
    # Not tokens
    "nothing": lambda _: "",
    "spaces": lambda _: "    ",
    "not a JWT": lambda _: "garbage",
    "dots": lambda _: "..",
    "no payload and signature": lambda mint: mint.token().partition(".")[0],
    "four parts": lambda mint: f"{mint.token()}.",
    "five parts": lambda mint: f"{mint.token()}.AA.AA",
    "space before": lambda mint: f" {mint.token()}",
    "space within": lambda mint: mint.token().replace(".", ". ", 1),
    "rubbish after": lambda mint: f"{mint.token()} x",
    "two in one": lambda mint: f"{mint.token()}, Bearer {mint.token()}",
    "in quotes": lambda mint: f'"{mint.token()}"',
    "2048 characters": lambda _: "a" * 2048,
    "8 KiB, signed": lambda mint: mint.token(more="x" * 8192),
    "nearly 16 KiB, signed": lambda mint: mint.token(more="x" * 10_000),
    "nearly 16 KiB": lambda _: "a" * 15_000,
}


@pytest.fixture
def mint(house: _House, foreign: dict[str, str]) -> _Mint:
    """The mint for tokens of alice. The user `leaver` has already been removed."""
    del foreign
    return house.mints["alice"]


def _refused(house: _House, metadata: Metadata) -> None:
    """Fail unless every RPC answers as without a token, to valid and malformed requests."""
    own = house.run("alice", forever=False)
    for name in _WITH_TOKEN:
        for data in (_request(name, own), b"\xff"):
            answer = _call(house.channel, name, data, metadata)
            assert answer == _NO_TOKEN, name


def test_forgeries_begin_with_what_is_accepted(house: _House, mint: _Mint) -> None:
    """Unchanged tokens from the mint are valid. Each forgery below thus fails for its change."""
    for token in (
        mint.token(),
        mint.headed(),
        _number(mint, "iat", str(mint.claims["iat"])),
        mint.token(**_issued(_LIFETIME_S - 3600)),
    ):
        assert _call(house.channel, "ListJobs", b"", _bearer(token)).code == "OK"
        assert _unbase64(_respelt(token, 1)[-43:]) == _unbase64(token[-43:])


@pytest.mark.parametrize("forgery", _FORGERIES)
def test_forged_token_is_refused_in_the_same_words(
    house: _House, mint: _Mint, forgery: str
) -> None:
    """Every RPC refuses the token. The audit log does not name the user of a forged token."""
    metadata = [("authorization", f"Bearer {_FORGERIES[forgery](mint)}")]
    _refused(house, metadata)
    record = house.record()
    told = ("user", "role", "job", "argv", "outcome", "reason")
    assert [record[key] for key in told] == [None, None, None, None, *_NO_TOKEN[:2]]


# Metadata made of a valid token T and an invalid one, X.
_METADATA: dict[str, list[tuple[str, str | bytes]]] = {
    "nothing": [],
    "empty": [("authorization", "")],
    "only the scheme": [("authorization", "Bearer")],
    "only the scheme and a space": [("authorization", "Bearer ")],
    "no scheme": [("authorization", "T")],
    "no space": [("authorization", "BearerT")],
    "two spaces": [("authorization", "Bearer  T")],
    "space before": [("authorization", " Bearer T")],
    "colon": [("authorization", "Bearer: T")],
    "equals sign": [("authorization", "Bearer token=T")],
    "scheme twice": [("authorization", "Bearer Bearer T")],
    "Basic": [("authorization", "Basic T")],
    "Basic of name and password": [("authorization", "Basic YWxpY2U6dXNlcg==")],
    "Token": [("authorization", "Token T")],
    "DPoP": [("authorization", "DPoP T")],
    "twice the same": [("authorization", "Bearer T"), ("authorization", "Bearer T")],
    "valid and invalid": [("authorization", "Bearer T"), ("authorization", "Bearer X")],
    "invalid and valid": [("authorization", "Bearer X"), ("authorization", "Bearer T")],
    "valid and empty": [("authorization", "Bearer T"), ("authorization", "")],
    "thrice": [("authorization", "Bearer T")] * 3,
    "binary": [("authorization-bin", b"Bearer T")],
    "binary, not text": [("authorization-bin", bytes(range(256)))],
    "proxy": [("proxy-authorization", "Bearer T")],
    "another name": [("x-authorization", "Bearer T"), ("token", "T"), ("access_token", "T")],
    "cookie": [("cookie", "authorization=Bearer T; token=T")],
    "forwarded": [("grpcgateway-authorization", "Bearer T"), ("x-forwarded-access-token", "T")],
}


@pytest.mark.parametrize("form", _METADATA)
def test_token_in_another_form_is_refused_in_the_same_words(
    house: _House, mint: _Mint, form: str
) -> None:
    """A valid token counts only as the single `authorization: Bearer TOKEN`."""

    def put(value: str | bytes) -> str | bytes:
        if isinstance(value, bytes):
            return value.replace(b" T", b" " + mint.token().encode())
        return re.sub(r"\b[TX]\b|(?<=Bearer)T", lambda found: tokens[found[0]], value)

    tokens = {"T": mint.token(), "X": mint.headed(key=bytes(32))}
    _refused(house, [(key, put(value)) for key, value in _METADATA[form]])


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_case_of_the_scheme_does_not_matter(house: _House, mint: _Mint, scheme: str) -> None:
    """The scheme's name is case-insensitive (RFC 9110, 11.1)."""
    metadata: Metadata = [
        ("authorization", f"{scheme} {mint.token()}"),
        ("authorization-bin", b"x"),
    ]
    assert _call(house.channel, "ListJobs", b"", metadata).code == "OK"


# Headers that gRPC's client refuses to send.
_RAW: dict[str, Callable[[bytes], list[tuple[bytes, bytes]]]] = {
    "tab": lambda token: [(b"authorization", b"Bearer\t" + token)],
    "tab after": lambda token: [(b"authorization", b"Bearer " + token + b"\t")],
    "newline after": lambda token: [(b"authorization", b"Bearer " + token + b"\n")],
    "newline within": lambda token: [(b"authorization", b"Bearer " + token + b"\nx-user: root")],
    "return and newline": lambda token: [(b"authorization", b"Bearer\r\n " + token)],
    "NUL after": lambda token: [(b"authorization", b"Bearer " + token + b"\0")],
    "not ASCII": lambda token: [(b"authorization", b"Bearer " + token + "é".encode())],
    "not UTF-8": lambda token: [(b"authorization", b"Bearer " + token + b"\xff")],
    "another dot": lambda token: [(b"authorization", b"Bearer " + token.replace(b".", b"\xb7"))],
    "twice": lambda token: [(b"authorization", b"Bearer " + token)] * 2,
}
# Names of headers with which the call does not reach the gate as one with a token.
_RAW_NAMES: dict[str, bytes] = {
    "in upper case": b"Authorization",
    "with a space": b"authorization ",
    "with a NUL": b"authorization\0",
    "with a newline": b"x\nauthorization",
    "empty": b"",
}


@pytest.mark.parametrize("name", ["ListJobs", "StreamOutput"])
@pytest.mark.parametrize("form", [*_RAW, *_RAW_NAMES])
def test_what_no_client_would_send_is_no_token_either(
    house: _House, mint: _Mint, name: str, form: str
) -> None:
    """A call with such a header is not served.

    If gRPC accepts the header, the answer has the same bytes as the answer without a token.
    """
    request = _request(name, house.run("alice", forever=False))
    token = mint.token().encode()
    ok = b"grpc-status\x010"
    assert ok in _wire(house, name, request, _wire_token(mint.token()))
    if form in _RAW:
        nothing = _wire(house, name, request, [])
        assert _NO_TOKEN.details.encode() in nothing
        assert _wire(house, name, request, _RAW[form](token)) == nothing
    else:
        answer = _wire(house, name, request, [(_RAW_NAMES[form], b"Bearer " + token)])
        assert ok not in answer
        assert b"ready" not in answer
    assert house.call("alice", "ListJobs", b"").code == "OK"


# --- tokens that end --------------------------------------------------------------------


def _assert_ended(house: _House, token: str, certificate: str = "client") -> None:
    """Fail unless every RPC refuses the token with the same answer as any invalid token."""
    with house.client(certificate=certificate) as client:
        for name in _WITH_TOKEN:
            data = _request(name, str(uuid.uuid4()))
            assert _call(client._channel, name, data, _bearer(token)) == _NO_TOKEN, name


def _is_accepted(house: _House, token: str) -> bool:
    return _call(house.channel, "ListJobs", b"", _bearer(token)).code == "OK"


@pytest.fixture
def build(
    start_server: Callable[..., ServerProgram], certs: Path, tmp_path: Path
) -> Iterator[Callable[[Path], _House]]:
    """A function that starts a server on a state directory. The users: root (admin), alice."""
    users = tmp_path / "users"
    _write_users(users, root="admin", alice="user")
    with contextlib.ExitStack() as channels:

        def start(state: Path) -> _House:
            program = start_server("--users", str(users), state=state)
            house = _House(program, certs, state, users)
            channels.enter_context(contextlib.closing(house.channel))
            return house

        yield start


def test_stolen_token_is_useless_with_another_certificate(house: _House, mint: _Mint) -> None:
    """The thief's certificate is from the same CA. A login with that certificate still works."""
    _assert_ended(house, mint.token(), "other")
    assert _is_accepted(house, mint.token())
    with house.client(certificate="other") as client:
        token, _ = client.login("bob", _PASSWORD)
        assert client.list() is not None
    assert not _is_accepted(house, token)
    _assert_ended(house, token)


@pytest.mark.parametrize("user", ["alice", "root"])
def test_token_ends_with_its_time(house: _House, mint: _Mint, user: str) -> None:
    """A token is valid an hour before its end and invalid from its end. Its streams end too."""
    del mint
    of_user = house.mints[user]
    assert _is_accepted(house, of_user.token(**_issued(_LIFETIME_S - 3600)))
    _assert_ended(house, of_user.token(**_issued(_LIFETIME_S)))
    token = of_user.token(**_issued(_LIFETIME_S - 3))
    with Client(house.program.address, certs=house.certs, token=token) as client:
        job_id = client.start("sh", ["-c", "while echo x; do sleep 0.1; done"])
    assert _end(_follow(house.channel, token, job_id)) == _NO_TOKEN[:2]
    _assert_ended(house, token)


# The user whose token ends, and the users file that ends the token.
_OTHER_HASH = SEEDED_USERS[0].password_hash
_CHANGES: dict[str, tuple[str, str]] = {
    "removed": ("alice", f"root:admin:{_HASH}\n"),
    "promoted": ("alice", f"root:admin:{_HASH}\nalice:admin:{_HASH}\n"),
    "demoted": ("root", f"root:user:{_HASH}\nalice:user:{_HASH}\n"),
    "password changed": ("alice", f"root:admin:{_HASH}\nalice:user:{_OTHER_HASH}\n"),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_token_ends_with_a_change_of_its_user(
    build: Callable[[Path], _House], make_state: Callable[[], Path], change: str
) -> None:
    """SIGHUP ends the token, and the token stays invalid after a restart.

    Other users' tokens stay valid, and the user's job goes on.
    """
    state = make_state()
    house = build(state)
    user, text = _CHANGES[change]
    (other,) = {"root", "alice"} - {user}
    tokens = {name: house.login(name) for name in (user, other)}
    job_id = house.run(user, forever=True)
    house.users.write_text(text)
    house.reload(user)
    _assert_ended(house, tokens[user])
    assert _is_accepted(house, tokens[other])
    if other == "root":
        with house.client("root") as root:
            assert root.status(job_id).status == worker_pb.JOB_STATUS_RUNNING
    assert house.program.end() == 0
    house = build(state)
    _assert_ended(house, tokens[user])
    assert _is_accepted(house, tokens[other])


def test_token_does_not_come_back_with_the_name(
    build: Callable[[Path], _House], make_state: Callable[[], Path]
) -> None:
    """If a new user gets the name of a removed user, the old user's tokens stay invalid."""
    house = build(make_state())
    token = house.login("alice")
    house.login("root")
    _write_users(house.users, root="admin")
    house.reload("alice")
    _assert_ended(house, token)
    house.users.write_text(f"root:user:{_HASH}\nalice:user:{_OTHER_HASH}\n")
    house.reload("root")  # root's role has changed, and a stream of root ends
    _assert_ended(house, token)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_token_ends_with_its_logout_for_good(
    build: Callable[[Path], _House], make_state: Callable[[], Path], number: signal.Signals
) -> None:
    """The token's silent streams end too. The user's other token, its stream and the job go on.

    The token stays invalid after a restart, also if the server was killed.
    """
    state = make_state()
    house = build(state)
    token = house.login("alice")
    other = house.token("alice")
    job_id = house.run("alice", forever=True)
    stream, still = (_follow(house.channel, each, job_id) for each in (token, other))
    assert _call(house.channel, "Logout", b"", _bearer(token)).code == "OK"
    assert _end(stream) == _NO_TOKEN[:2]
    _assert_ended(house, token)
    assert _is_accepted(house, other)
    stopped = _call(house.channel, "StopJob", _request("StopJob", job_id), _bearer(other))
    assert stopped.code == "OK"
    assert _end(still) == ("OK", "")
    house.program.end(number)
    house = build(state)
    _assert_ended(house, token)
    assert _is_accepted(house, other)


# --- who the caller is ------------------------------------------------------------------

# Metadata that proxies send and that some frameworks trust.
_CLAIMED: Metadata = [
    *((f"x-{name}", "root") for name in ("user", "user-id", "remote-user", "forwarded-user")),
    *((f"x-{name}", "admin") for name in ("role", "roles", "forwarded-role", "is-admin")),
    ("x-forwarded-client-cert", "Hash=00;Subject=CN=root;URI=spiffe://job-worker/root"),
    ("x-client-cert", "CN=root"),
    ("x-ssl-client-verify", "SUCCESS"),
    ("x-forwarded-for", "192.0.2.99"),
    ("x-real-ip", "192.0.2.99"),
    ("forwarded", "for=192.0.2.99;host=localhost"),
    ("x-endpoint-api-userinfo", "eyJzdWIiOiJyb290In0"),
    ("x-original-method", "/jobworker.v1.AuthService/Login"),
    ("x-http-method-override", "GET"),
    ("user", "root"),
    ("username", "root"),
    ("owner", "root"),
    ("role", "admin"),
    ("sub", "root"),
    ("cookie", "user=root; role=admin"),
    ("from", "root@localhost"),
    ("grpc-previous-rpc-attempts", "1"),
    ("x-user-bin", b"root"),
]


def test_metadata_says_nothing_about_who_the_caller_is(
    house: _House, foreign: dict[str, str]
) -> None:
    """All this metadata at once changes neither an answer nor a line of the audit log."""
    own = house.run("alice", forever=False)
    for name in _WITH_JOB:
        for user in ("alice", "", "leaver"):
            for job_id in (own, foreign["running, of root"], str(uuid.uuid4())):
                data = [_request(name, job_id)] * 2
                if (name, user, job_id) == ("RemoveJob", "alice", own):
                    data = [_request(name, house.run(user, forever=False)) for _ in range(2)]
                plain = house.call(user, name, data[0])
                assert house.call(user, name, data[1], _CLAIMED) == plain
    records = []
    for more in ([], _CLAIMED):
        listed = house.call("alice", "ListJobs", b"", more)
        jobs = worker_pb.ListJobsResponse.FromString(listed.messages[0]).jobs
        assert {job.owner for job in jobs} == {"alice"}
        records.append(house.record())
        assert (records[-1].pop("user"), records[-1].pop("role")) == ("alice", "user")
        del records[-1]["time"]
    assert records[0] == records[1]


@pytest.mark.parametrize("claimed", ["root", "bob"])
def test_user_agent_and_authority_say_nothing_about_who_the_caller_is(
    house: _House, foreign: dict[str, str], claimed: str
) -> None:
    """The server also ignores `user-agent` and `host`, which this test sends on the wire."""
    agents = [[], [(b"user-agent", f"{claimed}/1.0 (role=admin)".encode())]]
    more = [(b"x-user", claimed.encode()), (b"host", claimed.encode())]
    answers = {
        _wire(
            house,
            "GetJobStatus",
            _request("GetJobStatus", foreign[f"finished, of {claimed}"]),
            [*_wire_token(house.token("alice")), *agent, *extra],
        )
        for agent in agents
        for extra in ([], more)
    }
    (answer,) = answers
    assert _NO_JOB.details.encode() in answer


@pytest.mark.parametrize("user", ["alice", "root"])
def test_owner_of_a_job_is_the_tokens_subject_whatever_is_asked(house: _House, user: str) -> None:
    """No field, known or unknown, and no metadata changes the owner or the job's USER."""
    # test_starts.py tries `request_id`. What a job's own variables say of USER is the job's affair.
    # `name` and `labels` name the job.
    known = {"command", "args", "limits", "request_id", "environment", "working_directory"}
    known |= {"name", "labels", "timeout", "grace", "linger", "stdin", "keep_tmp", "no_queue"}
    fields = worker_pb.StartJobRequest.DESCRIPTOR.fields_by_number
    for field in fields.values():
        assert field.name in known, "may it name an owner? try it here"
    plain = _request("StartJob", command="sh", args=["-c", "echo $USER"])
    unknown = b"".join(_text_field(n, b"bob") for n in range(5, 100) if n not in fields)
    for data in (plain, plain + unknown, unknown + plain):
        for more in ([], _CLAIMED, [("owner", "bob"), ("x-owner", "bob"), ("x-user", "bob")]):
            answer = house.call(user, "StartJob", data, more)
            job_id = worker_pb.StartJobResponse.FromString(answer.messages[0]).job_id
            record = house.record()
            assert (record["user"], record["job"]) == (user, job_id)
            with house.client(user) as client:
                output = b"".join(client.stream(job_id))
                assert client.status(job_id).owner == user
            if os.geteuid() == 0:  # otherwise all jobs run as the server's own user
                assert output == f"{user}\n".encode()
            data_of_status = _request("GetJobStatus", job_id)
            assert house.call("bob", "GetJobStatus", data_of_status) == _NO_JOB


def test_certificate_says_nothing_about_the_role(house: _House) -> None:
    """The permissions depend on the user who logs in, not on the certificate of the login."""
    job_id = house.run("alice", forever=False)
    with house.client(certificate="other") as client:
        client.login("alice", _PASSWORD)
        assert client.status(job_id).owner == "alice"
        client.login("bob", _PASSWORD)
        with pytest.raises(ClientError) as caught:
            client.status(job_id)
    assert (caught.value.code, str(caught.value)) == _NO_JOB[:2]


# --- what is left behind ----------------------------------------------------------------


def test_no_log_has_a_token_or_password(house: _House, mint: _Mint) -> None:
    """The logs have no part of any token: valid, forged, expired, revoked or misplaced."""
    good, forged, out = mint.token(), mint.headed(key=bytes(32)), mint.token()
    ended = mint.token(**_issued(_LIFETIME_S))
    assert house.call("alice", "ListJobs", b"", _bearer(good)) == _NO_TOKEN  # two tokens
    assert _is_accepted(house, good)
    assert not _is_accepted(house, forged)
    assert not _is_accepted(house, ended)
    assert _call(house.channel, "Logout", b"", _bearer(out)).code == "OK"
    assert not _is_accepted(house, out)
    with house.client(certificate="other") as client:
        assert _call(client._channel, "ListJobs", b"", _bearer(good)) == _NO_TOKEN
    secret = f"hunter2-{uuid.uuid4()}"
    login = _request("Login", username="alice", password=secret)
    assert _call(house.channel, "Login", login, _bearer(good)).code == "UNAUTHENTICATED"
    assert house.record()["outcome"] == "UNAUTHENTICATED"
    for form in _RAW.values():  # gRPC logs something about headers that are not UTF-8
        _wire(house, "ListJobs", b"", form(good.encode()))
    assert "Traceback" not in house.program.log.read_text()
    logs = house.program.log.read_text() + (house.state / "audit.log").read_text()
    parts = [part for token in (good, forged, ended, out) for part in token.split(".")]
    for text in [secret, _HASH, mint.claims["entry"], mint.key.hex(), *parts]:
        assert text not in logs
