"""Who may do what, attacked from outside: the server program over real mutual TLS.

The matrix and the tables are run over every RPC that the protocol describes, so a new one
is in them by itself. The tests have the server's token key, and so can sign any token.
What `auth.py` does with tokens one by one is in test_auth.py.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import random
import re
import signal
import socket
import ssl
import statistics
import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import jwt
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

import authservice_pb2 as auth_pb
import workerservice_pb2 as worker_pb
from client import Client, ClientError
from conftest import GUARD_S, ServerProgram
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

# Every user here has the password of the seeded one.
_PASSWORD, _HASH = next((user.name, user.password_hash) for user in SEEDED_USERS[1:])
_USERS = {"root": "admin", "alice": "user", "bob": "user", "leaver": "user"}

# What a request needs besides `job_id` in order to succeed.
_REQUESTS: dict[str, dict[str, Any]] = {
    "Login": {"username": "alice", "password": _PASSWORD},
    "StartJob": {"command": "true"},
}


# --- calls ------------------------------------------------------------------------------


class _Answer(NamedTuple):
    """All that a caller sees of an answer."""

    code: str
    details: str
    initial: tuple[tuple[str, str | bytes], ...] = ()
    messages: tuple[bytes, ...] = ()
    trailing: tuple[tuple[str, str | bytes], ...] = ()


_NO_TOKEN = _Answer(
    "UNAUTHENTICATED",
    "no valid token; log in (again), and send it as the metadata "
    "`authorization: Bearer TOKEN`, with the client certificate of the login",
)
_NO_JOB = _Answer("NOT_FOUND", "no such job")


def _path(name: str) -> str:
    return f"/{_METHODS[name].containing_service.full_name}/{name}"


def _request(name: str, job_id: str = "", **fields: Any) -> bytes:
    """A request that succeeds, if the caller reaches the job."""
    fields = _REQUESTS.get(name, {}) | ({"job_id": job_id} if name in _WITH_JOB else {}) | fields
    return GetMessageClass(_METHODS[name].input_type)(**fields).SerializeToString()


def _begin(channel: grpc.Channel, name: str, data: bytes, metadata: Metadata) -> Any:
    # On the wire a single answer is a stream of one.
    return channel.unary_stream(_path(name))(data, metadata=tuple(metadata), timeout=GUARD_S)


def _call(channel: grpc.Channel, name: str, data: bytes, metadata: Metadata) -> _Answer:
    """Call any RPC to its end."""
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
    """Call any RPC up to its first message: "OK" if there is one, or it ends well without."""
    call = _begin(channel, name, data, metadata)
    try:
        next(call)
    except StopIteration:
        return str(call.code().name)
    except grpc.RpcError:
        return f"{call.code().name}: {call.details()}"
    call.cancel()
    return "OK"


def _bearer(token: str) -> Metadata:
    return [("authorization", f"Bearer {token}")] if token else []


# --- a server whose key we have ---------------------------------------------------------


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class _Mint:
    """Signs what it is told, beginning with what a login wrote. Attributes: `key`, `claims`."""

    header: bytes = b'{"alg":"HS256","typ":"JWT"}'

    def __init__(self, token: str, key: bytes) -> None:
        header, payload, signature = token.split(".")
        self.key = key
        self.claims: dict[str, Any] = json.loads(_unbase64(payload))
        assert _unbase64(header) == self.header
        assert self.assemble(_unbase64(payload)) == f"{header}.{payload}.{signature}"

    def token(self, **changes: Any) -> str:
        """The token with other claims, and an ID of its own; ... leaves a claim out."""
        return self.assemble(self.payload(**changes))

    def payload(self, **changes: Any) -> bytes:
        claims = self.claims | {"jti": str(uuid.uuid4())} | changes
        claims = {name: value for name, value in claims.items() if value is not ...}
        return json.dumps(claims, separators=(",", ":")).encode()

    def headed(self, *, key: bytes | None = None, digest: str = "sha256", **changes: Any) -> str:
        """The token with another header."""
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
    """A server with users of its own, and what a test needs to attack it."""

    def __init__(self, program: ServerProgram, certs: Path, state: Path, users: Path) -> None:
        self.program, self.certs, self.state, self.users = program, certs, state, users
        self.channel = Client(program.address, certs=certs)._channel
        self.mints: dict[str, _Mint] = {}

    def login(self, name: str) -> str:
        with self.client() as client:
            token, _ = client.login(name, _PASSWORD)
        self.mints[name] = _Mint(token, (self.state / "token.key").read_bytes())
        return token

    def client(self, name: str = "", **options: Any) -> Client:
        """A connection with a token of its own; "" for none."""
        token = self.token(name)
        return Client(self.program.address, token=token, **{"certs": self.certs} | options)

    def token(self, name: str) -> str:
        return self.mints[name].token() if name else ""

    def call(self, user: str, name: str, data: bytes, more: Metadata = ()) -> _Answer:
        return _call(self.channel, name, data, [*_bearer(self.token(user)), *more])

    def run(self, user: str, *, forever: bool) -> str:
        """Start a job as the user, and wait for what it says, and for its end."""
        with self.client(user) as client:
            job_id = client.start("sh", ["-c", f"echo ready; {'sleep infinity' * forever}"])
            output = client.stream(job_id)
            assert next(output) == b"ready\n"
            if not forever:
                assert list(output) == []
        return job_id

    def reload(self, witness: str) -> None:
        """Have the users file taken up; block until a stream of `witness` ends of it."""
        with self.client(witness) as client:
            output = client.stream(client.start("sh", ["-c", "echo ready; exec sleep infinity"]))
            next(output)
            self.program.process.send_signal(signal.SIGHUP)
            with pytest.raises(ClientError) as caught:
                list(output)
        assert (caught.value.code, str(caught.value)) == _NO_TOKEN[:2]

    def record(self) -> dict[str, Any]:
        """The last line of the audit log."""
        line = (self.state / "audit.log").read_text().splitlines()[-1]
        fields: dict[str, Any] = json.loads(line)
        return fields


@pytest.fixture(scope="module")
def house(
    certs: Path, make_state: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_House]:
    """A server with the users of `_USERS`, of whom `leaver` was removed after a login."""
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
    """Jobs that are not alice's, by what they are."""
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
    """What README.md says; None: it is admitted."""
    if name == "Login":
        return None
    if role in {"nobody", "removed user"}:
        return _NO_TOKEN
    if job == "absent" or (job.startswith("foreign") and role != "admin"):
        return _NO_JOB
    return None


def test_matrix_sees_every_job_that_a_request_can_name() -> None:
    """A request names a job in `job_id`, once; if not, the tests below would not try it."""
    for name, method in _METHODS.items():
        naming = [field.name for field in method.input_type.fields if "job" in field.name]
        assert naming in ([], ["job_id"]), name
        assert not method.client_streaming, name
    assert {"StopJob", "GetJobStatus", "StreamOutput"} <= set(_WITH_JOB)


@pytest.mark.parametrize(("role", "name", "job"), _MATRIX)
def test_matrix(house: _House, foreign: dict[str, str], role: str, name: str, job: str) -> None:
    """Role by RPC by job: admitted or refused, and a refused call does nothing to the job."""
    caller, forever = _ROLES[role], "running" in job
    job_id = str(uuid.uuid4())
    if job.startswith("own"):
        # Who cannot start one has some all the same, from before.
        owned = foreign[f"{'running' if forever else 'finished'}, of leaver"]
        job_id = house.run(caller, forever=forever) if role in {"admin", "user"} else owned
    elif job.startswith("foreign"):
        job_id = house.run("bob", forever=forever)
    expected, data = _expected(role, name, job), _request(name, job_id)
    if expected is None:
        assert _admitted(house.channel, name, data, _bearer(house.token(caller))) == "OK"
        return
    assert house.call(caller, name, data) == expected
    if job not in {"absent", "no"}:
        with house.client("root") as admin:
            assert admin.status(job_id).status == (
                worker_pb.RUNNING if forever else worker_pb.FINISHED
            )
            assert not admin.status(job_id).subscribers


def test_list_shows_nothing_of_others(house: _House, foreign: dict[str, str]) -> None:
    """A user sees their own jobs, an admin those of everybody, the removed included."""
    own = house.run("alice", forever=False)
    with house.client("alice") as alice, house.client("root") as root:
        assert own in {job.job_id for job in alice.list()}
        assert {job.owner for job in alice.list()} == {"alice"}
        assert {own, *foreign.values()} <= {job.job_id for job in root.list()}


@pytest.mark.parametrize("user", ["user", "admin"])
def test_rpc_that_nobody_put_in_the_permission_table_is_denied(
    start_server: Callable[..., ServerProgram],
    certs: Path,
    tokens: dict[str, str],
    tmp_path: Path,
    user: str,
) -> None:
    """A server that lacks the table denies every RPC to everybody, whatever is in the request."""
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

# How to write a job's ID.
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
    """Whole answers are compared, with what was sent masked where it comes back."""
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


# Extreme values of a field, by its type. A field of another type fails the test that asks.
_EXTREMES: dict[int, list[Any]] = {
    FieldDescriptor.TYPE_UINT64: [0, 1, 6, 7, 2**63 - 1, 2**63, 2**64 - 1],
    FieldDescriptor.TYPE_INT64: [-(2**63), -1, 1, 2**63 - 1],
    FieldDescriptor.TYPE_BOOL: [True],
    FieldDescriptor.TYPE_STRING: ["", "x", "\0", "ä" * 1000],
}


def _bodies(name: str, job_id: str) -> Iterator[tuple[bytes, str]]:
    """Requests that name the job, with all else that can be in one, and the code expected."""
    plain = _request(name, job_id)
    for field in _METHODS[name].input_type.fields:
        if field.name != "job_id":
            for value in _EXTREMES[field.type]:
                yield _request(name, job_id, **{field.name: value}), "NOT_FOUND"
                # The same, before the ID
                yield _request(name, "", **{field.name: value}) + plain, "NOT_FOUND"
    for number in range(2, 40):  # fields of another type, or that there are not
        yield plain + _text_field(number, b"root"), "NOT_FOUND"
    yield _request(name, str(uuid.uuid4())) + plain, "NOT_FOUND"  # the last ID counts
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
    """No offset and no other field is looked at before it is known whose job it is."""
    ids = [*foreign.values(), str(uuid.uuid4()), str(uuid.uuid4())]
    for requests in zip(*(_bodies(name, job_id) for job_id in ids), strict=True):
        answers = {(house.call("alice", name, data), code) for data, code in requests}
        ((answer, code),) = answers
        assert answer.code == code
        if code == "NOT_FOUND":
            assert answer == _NO_JOB


def test_offset_is_looked_at_for_ones_own_job(house: _House) -> None:
    """So the offsets above would have made a difference."""
    job_id = house.run("alice", forever=False)
    answer = house.call("alice", "StreamOutput", _request("StreamOutput", job_id, offset=7))
    assert answer.code == "OUT_OF_RANGE"


def test_ceiling_of_streams_is_looked_at_after_the_owner(
    start_server: Callable[..., ServerProgram], certs: Path, tokens: dict[str, str]
) -> None:
    """Who has all streams there may be still learns nothing about the jobs of others."""
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
