"""Tests of the services and of the server program, over real sockets and mutual TLS.

Most use one server program that they share; a server in this process is for those
that must look inside or stage a fault.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

import auth
import authservice_pb2 as auth_pb
import service
import worker
import workerservice_pb2 as worker_pb
from client import Client, ClientError
from config import Config
from conftest import GUARD_S
from server import Server, Settings, SettingsError
from worker import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from google.protobuf.descriptor import MethodDescriptor

    from conftest import ServerProgram

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]
    StartServer = Callable[..., ServerProgram]

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
_ABSENT = "0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98"
_FOREVER = ("sh", ["-c", "echo ready; exec sleep infinity"])


def _call(
    client: Client,
    name: str,
    *,
    data: bytes | None = None,
    metadata: Sequence[tuple[str, str]] | None = None,
    **fields: Any,
) -> tuple[str, str]:
    """Call any RPC to its end; return its status code and message."""
    method = _METHODS[name]
    if data is None:
        data = GetMessageClass(method.input_type)(**fields).SerializeToString()
    # On the wire a single answer is a stream of one.
    rpc: Any = client._channel.unary_stream(
        f"/{method.containing_service.full_name}/{name}",
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    call = rpc(data, metadata=client._metadata() if metadata is None else metadata, timeout=GUARD_S)
    with contextlib.suppress(grpc.RpcError):
        list(call)
    return call.code().name, call.details()


def _fields(name: str, job_id: str) -> dict[str, Any]:
    """The fields of a request of the RPC that succeeds."""
    if name == "StartJob":
        return {"command": "true"}
    return {"job_id": job_id} if name in _WITH_JOB else {}


def _finish(
    client: Client, command: str = "true", args: Sequence[str] = (), **limits: float | None
) -> str:
    """Run a job to its end; return its ID."""
    job_id = client.start(command, args, **limits)
    list(client.stream(job_id))
    return job_id


# --- who may call what ------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(program: ServerProgram, certs: Path, tokens: dict[str, str]) -> str:
    """A finished job of `user`."""
    with Client(program.address, certs=certs, token=tokens["user"]) as client:
        return _finish(client)


@pytest.fixture(scope="module")
def foreign(program: ServerProgram, certs: Path, tokens: dict[str, str]) -> str:
    """A finished job of `admin`."""
    with Client(program.address, certs=certs, token=tokens["admin"]) as client:
        return _finish(client)


@pytest.mark.parametrize("name", _WITH_TOKEN)
@pytest.mark.parametrize("user", ["user", "admin"])
def test_both_roles_may_call_every_rpc(connect: Connect, own: str, name: str, user: str) -> None:
    """With a token every RPC of the service works, on one's own job and for an admin."""
    assert _call(connect(user), name, **_fields(name, own)) == ("OK", "")


@pytest.mark.parametrize("name", _WITH_TOKEN)
@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer garbage")],
        [("authorization", "Basic dXNlcjp1c2Vy")],
        [("authorization", "TOKEN")],
        [("authorization", "Bearer TOKEN"), ("authorization", "Bearer TOKEN")],
        [("authorization", "Bearer TOKENx")],
        [("token", "TOKEN")],
    ],
    ids=lambda metadata: " ".join(value for pair in metadata for value in pair) or "nothing",
)
def test_call_without_a_good_token_is_unauthenticated(
    connect: Connect, own: str, tokens: dict[str, str], name: str, metadata: list[tuple[str, str]]
) -> None:
    """Streams included, and before anything else is looked at."""
    sent = [(key, value.replace("TOKEN", tokens["user"])) for key, value in metadata]
    assert _call(connect(), name, metadata=sent, **_fields(name, own))[0] == "UNAUTHENTICATED"
    assert _call(connect(), name, metadata=sent, data=b"\xff")[0] == "UNAUTHENTICATED"


@pytest.mark.parametrize("name", _WITH_TOKEN)
def test_token_over_another_certificate_is_unauthenticated(
    connect: Connect, certs: Path, own: str, name: str
) -> None:
    """A stolen token is worth nothing, even with a certificate of the same CA."""
    thief = connect("user", cert=certs / "other.pem", key=certs / "other-key.pem")
    code, details = _call(thief, name, **_fields(name, own))
    assert (code, details) == (
        "UNAUTHENTICATED",
        "the token is not valid (any more) here; log in again",
    )


@pytest.mark.parametrize("name", _WITH_JOB)
def test_foreign_and_absent_job_cannot_be_told_apart(
    connect: Connect, foreign: str, name: str
) -> None:
    """A user learns nothing of others' jobs: same code, same message. An admin reaches them."""
    answers = {
        (code, details.replace(job_id, "ID"))
        for job_id in (foreign, _ABSENT)
        for code, details in [_call(connect("user"), name, job_id=job_id)]
    }
    assert answers == {("NOT_FOUND", "no job ID")}
    assert _call(connect("admin"), name, job_id=foreign) == ("OK", "")
    assert _call(connect("admin"), name, job_id=_ABSENT) == ("NOT_FOUND", f"no job {_ABSENT}")


def test_list_shows_a_user_their_own_and_an_admin_all(
    connect: Connect, own: str, foreign: str
) -> None:
    """In the order of their start."""
    mine = [(job.job_id, job.owner) for job in connect("user").list()]
    everybody = [job.job_id for job in connect("admin").list()]
    assert (own, "user") in mine
    assert {owner for _, owner in mine} == {"user"}
    assert foreign in everybody
    assert [job_id for job_id in everybody if (job_id, "user") in mine] == [i for i, _ in mine]


@pytest.mark.parametrize("name", _METHODS)
def test_rpc_that_is_not_in_the_permission_table_is_denied(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An RPC that somebody forgets to give permissions is open to nobody, admins included."""
    path = f"/{_METHODS[name].containing_service.full_name}/{name}"
    monkeypatch.setattr(
        auth, "PERMISSIONS", {p: roles for p, roles in auth.PERMISSIONS.items() if p != path}
    )
    client = connect("admin", serve().address)
    assert _call(client, name, **_fields(name, _ABSENT))[0] == "PERMISSION_DENIED"
    assert _call(client, name, metadata=[])[0] == "UNAUTHENTICATED"


# --- login ------------------------------------------------------------------------------


def test_login_answers_a_bound_token_and_its_expiry(connect: Connect, certs: Path) -> None:
    """The token works for 30 days with the certificate of the login, whichever that was."""
    client = connect("", cert=certs / "other.pem", key=certs / "other-key.pem")
    _, expires_at = client.login("user", "user")
    assert timedelta(days=29) < expires_at - datetime.now(UTC) <= timedelta(days=30)
    assert {job.owner for job in client.list()} <= {"user"}


def test_wrong_logins_are_unauthenticated_alike(connect: Connect) -> None:
    """An unknown user and a wrong password get the same answer."""
    client = connect("")
    logins = [("user", "hunter2"), ("nobody", "user")]
    assert {_call(client, "Login", username=u, password=p) for u, p in logins} == {
        ("UNAUTHENTICATED", "wrong user name or password")
    }


def test_too_many_logins_at_once_are_refused_at_once(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RESOURCE_EXHAUSTED, not a queue; other calls go on meanwhile."""
    server, go_on = serve(), threading.Event()
    under_way = threading.Semaphore(0)

    def blocked(password: str, password_hash: str) -> bool:  # noqa: ARG001
        under_way.release()
        return go_on.wait(GUARD_S)

    monkeypatch.setattr(auth, "_HASHES_AT_ONCE", 8)
    monkeypatch.setattr(auth, "_password_matches", blocked)
    server = serve()
    client = connect("user", server.address)
    with ThreadPoolExecutor(8) as pool:
        logins = [pool.submit(_call, client, "Login", username="user") for _ in range(8)]
        for _ in logins:
            assert under_way.acquire(timeout=GUARD_S)
        code, details = _call(client, "Login", username="user")
        assert (code, "too many logins" in details) == ("RESOURCE_EXHAUSTED", True)
        assert client.list() == []
        go_on.set()
        assert {login.result(GUARD_S)[0] for login in logins} == {"OK"}


# --- mutual TLS -------------------------------------------------------------------------

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS_TYPE = 4


def _make_certificate(
    directory: Path, name: str, *, ca: Path | None, extension: str, days: int = 1
) -> Path:
    """Make NAME.pem and NAME-key.pem, signed by the CA (a path without `.pem`) or by itself."""
    key, request, path = (directory / f"{name}{end}" for end in ("-key.pem", ".csr", ".pem"))
    extensions = directory / f"{name}.ext"
    extensions.write_text(f"{extension}\n")
    sign = ["x509", "-req", "-in", request, "-out", path, "-extfile", extensions]
    signer = ["-CA", f"{ca}.pem", "-CAkey", f"{ca}-key.pem"] if ca else ["-key", key]
    new = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for command in (
        [*new, "-subj", f"/CN={name}", "-keyout", key, "-out", request],
        [*sign, *signer, "-set_serial", "7", "-days", str(days)],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def wrong_certs(
    certs: Path, foreign_certs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Client certificates that are wrong, by what is wrong with them."""
    directory = tmp_path_factory.mktemp("wrong-certs")
    client, ca = "extendedKeyUsage=clientAuth", certs / "client-ca"
    return {
        "of another CA": foreign_certs / "client.pem",
        "of the server's CA": _make_certificate(
            directory, "wrong-ca", ca=certs / "server-ca", extension=client
        ),
        "signed by itself": _make_certificate(directory, "self", ca=None, extension=client),
        "the server's": certs / "server.pem",
        "for servers": _make_certificate(
            directory, "server-usage", ca=ca, extension="extendedKeyUsage=serverAuth"
        ),
        "expired": _make_certificate(directory, "expired", ca=ca, extension=client, days=-1),
    }


def _converse(address: str, context: ssl.SSLContext | None, greeting: bytes) -> bytes:
    """Send a greeting; return what a server that hangs up answers, or its first frame."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_connection((host, int(port)), GUARD_S))
        try:
            if context is not None:
                sock = stack.enter_context(context.wrap_socket(sock, server_hostname=host))
                assert isinstance(sock, ssl.SSLSocket)
                assert sock.version() == "TLSv1.3"
            sock.sendall(greeting)
            return sock.recv(9)
        except (ssl.SSLError, ConnectionError):
            return b""


def _is_admitted(answer: bytes) -> bool:
    """Whether it is an HTTP/2 frame of settings: the server begins with it, but in TLS only."""
    return answer[3:4] == bytes([_SETTINGS_TYPE])


def _tls(certs: Path, certificate: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certs / "server-ca.pem")
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        key = certificate.with_name(f"{certificate.stem}-key.pem")
        context.load_cert_chain(certificate, key)
    return context


@pytest.mark.parametrize("name", ["client", "other"])
def test_client_certificate_of_the_client_ca_gets_through_over_tls_1_3(
    program: ServerProgram, certs: Path, name: str
) -> None:
    """The negative cases below are refused for what is wrong with them and nothing else."""
    assert _is_admitted(_converse(program.address, _tls(certs, certs / f"{name}.pem"), _PREFACE))


@pytest.mark.parametrize(
    "wrong",
    [
        "of another CA",
        "of the server's CA",
        "signed by itself",
        "the server's",
        "for servers",
        "expired",
    ],
)
def test_wrong_client_certificate_does_not_get_through(
    program: ServerProgram, certs: Path, wrong_certs: dict[str, Path], connect: Connect, wrong: str
) -> None:
    """The connection ends before anything is said on it, and the server goes on."""
    context = _tls(certs, wrong_certs[wrong])
    assert not _is_admitted(_converse(program.address, context, _PREFACE))
    connect().list()


def test_no_client_certificate_does_not_get_through(
    program: ServerProgram, certs: Path, connect: Connect
) -> None:
    """There is no one-sided mode."""
    assert not _is_admitted(_converse(program.address, _tls(certs, None), _PREFACE))
    connect().list()


@pytest.mark.parametrize("in_process", [False, True])
def test_tls_1_2_does_not_get_through(
    program: ServerProgram, serve: Serve, certs: Path, connect: Connect, in_process: bool
) -> None:
    """With the right certificate and every suite that OpenSSL has, it finds none in common."""
    address = serve().address if in_process else program.address
    context = _tls(certs, certs / "client.pem")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), GUARD_S) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(sock, server_hostname=host).close()
    connect("user", address).list()


@pytest.mark.parametrize(
    "greeting",
    [_PREFACE, b"GET / HTTP/1.1\r\n\r\n", bytes(1000), os.urandom(5000), b"\x16\x03\x01"],
)
def test_what_is_not_tls_does_not_get_through(
    program: ServerProgram, connect: Connect, greeting: bytes
) -> None:
    """Plaintext and garbage get no frame, and disturb nobody; nor does who says no more."""
    host, _, port = program.address.rpartition(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(greeting)
        connect().list()
        silent.shutdown(socket.SHUT_WR)
        silent.settimeout(GUARD_S)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = silent.recv(9)
    assert not _is_admitted(answer)
    connect().list()


def test_idle_connections_hold_up_nobody(program: ServerProgram, connect: Connect) -> None:
    """Connections that never begin a handshake cost the others nothing."""
    host, _, port = program.address.rpartition(":")
    with contextlib.ExitStack() as idle:
        for _ in range(50):
            idle.enter_context(socket.create_connection((host, int(port))))
        connect().list()


@pytest.mark.parametrize("wrong", ["of another CA", "for another host", "for clients", "expired"])
def test_client_refuses_a_server_with_a_wrong_certificate(  # noqa: PLR0913
    serve: Serve,
    certs: Path,
    foreign_certs: Path,
    connect: Connect,
    tmp_path: Path,
    wrong: str,
) -> None:
    """No token is sent to it, and one line says why."""
    shutil.copy(certs / "client-ca.pem", tmp_path)
    usage, names = "extendedKeyUsage=serverAuth", "subjectAltName=DNS:localhost,IP:127.0.0.1"
    ca, days = certs / "server-ca", 1
    if wrong == "of another CA":
        ca = foreign_certs / "server-ca"
    elif wrong == "for another host":
        names = "subjectAltName=DNS:elsewhere.test,IP:127.0.0.2"
    elif wrong == "for clients":
        usage = "extendedKeyUsage=clientAuth"
    else:
        days = -1
    _make_certificate(tmp_path, "server", ca=ca, extension=f"{usage}\n{names}", days=days)
    client = connect("user", serve(certs=tmp_path).address)
    with pytest.raises(ClientError, match="was not signed by your server CA, is not for") as caught:
        client.list()
    assert caught.value.code == "UNAVAILABLE"
    assert "\n" not in str(caught.value)


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "args", "problem"),
    [
        ("", [], "the command is empty"),
        ("no-such-command", [], "command not found"),
        ("/no/such/file", [], "no such file"),
        ("/etc/passwd", [], "permission denied"),
        ("/usr", [], "it is a directory"),
        ("tr\0ue", [], "NUL character"),
        ("true", ["\0"], "NUL character"),
        ("true", ["x" * 130 * 1024], "the limit is 131072"),
        ("true", ["x" * 1024] * 5 * 1024, "the limit is 131072"),
        ("x" * 130 * 1024, [], "the limit is 131072"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_command_that_cannot_be_executed_is_an_invalid_argument(
    connect: Connect, command: str, args: list[str], problem: str
) -> None:
    """The message names the command and the problem, however large the request; no job is left."""
    before = connect().list()
    code, details = _call(connect(), "StartJob", command=command, args=args)
    assert code == "INVALID_ARGUMENT"
    assert details.startswith(f"cannot execute {command[:20]!r}"[:-1])
    assert problem in details
    assert len(details) < 1000
    assert connect().list() == before


@pytest.mark.parametrize("name", _WITH_JOB)
@pytest.mark.parametrize(
    "job_id",
    [
        *("", " ", "x", f" {_ABSENT}", f"{_ABSENT} ", f"{_ABSENT}\n", f"{_ABSENT}0"),
        *(f"{{{_ABSENT}}}", f"urn:uuid:{_ABSENT}", _ABSENT.replace("-", ""), "a" * 100_000),
        *("ü" * 36, _ABSENT.replace("0", "\u0660"), "../../etc/passwd", "\0", "\x1b[31m"),
    ],
    ids=lambda text: ascii(text)[:44],
)
def test_text_that_is_no_job_id_is_an_invalid_argument(
    connect: Connect, name: str, job_id: str
) -> None:
    """It is told from an ID that no job has; the message stays short and on one line."""
    code, details = _call(connect(), name, job_id=job_id)
    assert code == "INVALID_ARGUMENT"
    assert details.startswith("not a job ID: ")
    assert len(details) < 1000
    assert details.isprintable()


@pytest.mark.parametrize("name", _WITH_JOB)
def test_job_id_may_be_in_upper_case(connect: Connect, own: str, name: str) -> None:
    """As some tools print UUIDs."""
    assert _call(connect(), name, job_id=own.upper()) == ("OK", "")


@pytest.mark.parametrize("name", [name for name in _METHODS if name != "ListJobs"])
@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xc3\x28"])
def test_malformed_request_is_an_invalid_argument(connect: Connect, name: str, data: bytes) -> None:
    """Bytes that are no message, and text that is not UTF-8."""
    assert _call(connect(), name, data=data) == (
        "INVALID_ARGUMENT",
        "the request is not a message of the right type",
    )


@pytest.mark.parametrize("offset", [5, 2**63, 2**64 - 1])
def test_offset_past_the_end_is_out_of_range(connect: Connect, offset: int) -> None:
    """On a finished job at once, on a running one when it ends; the end itself is in range."""
    client = connect()
    job_id = _finish(client, "printf", ["four"])
    code, details = _call(client, "StreamOutput", job_id=job_id, offset=offset)
    assert (code, f"offset {offset} " in details) == ("OUT_OF_RANGE", True)
    assert list(client.stream(job_id, 4)) == []
    job_id = client.start("sh", ["-c", "printf four; exec sleep infinity"])
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(_call, client, "StreamOutput", job_id=job_id, offset=offset)
        assert next(client.stream(job_id)) == b"four"
        client.stop(job_id)
        assert ahead.result(GUARD_S)[0] == "OUT_OF_RANGE"


def test_unknown_method_is_unimplemented(connect: Connect) -> None:
    """With a token or without, and it does nothing else."""
    rpc: Any = connect()._channel.unary_unary("/jobworker.v1.WorkerService/Nothing")
    with pytest.raises(grpc.RpcError) as caught:
        rpc(b"", timeout=GUARD_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["GetJobStatus", "StreamOutput"])
@pytest.mark.parametrize(
    ("error", "code", "in_log"),
    [
        (worker.ResourceError("no room"), "RESOURCE_EXHAUSTED", True),
        (worker.StopTimeoutError(_ABSENT, 10), "DEADLINE_EXCEEDED", False),
        (worker.WorkerClosedError(), "UNAVAILABLE", False),
        (worker.SpawnerDiedError(), "UNAVAILABLE", True),
        (worker.OutputIncompleteError(OSError(28, "No space"), 7), "DATA_LOSS", False),
        (
            worker.CgroupError("cannot write 1 to /c/pids.max", path="/c", remedy="delegate it"),
            "FAILED_PRECONDITION",
            True,
        ),
        (RuntimeError("inside"), "INTERNAL", True),
        (OSError(2, "inside", "/inside"), "INTERNAL", True),
        (KeyError("inside"), "INTERNAL", True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_error_of_the_worker_becomes_its_status(  # noqa: PLR0913
    serve: Serve,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    error: Exception,
    code: str,
    in_log: bool,
) -> None:
    """One table for unary calls and streams; what is not meant for callers is in the log only."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(worker.Worker, "status", fail)
    answer = _call(connect("user", serve().address), name, job_id=_ABSENT)
    assert answer[0] == code
    assert "inside" not in answer[1]
    assert len(answer[1]) > 5
    if isinstance(error, worker.CgroupError):
        assert answer[1] == "cannot write 1 to /c/pids.max; delegate it"
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert bool(errors) == in_log
    if code == "INTERNAL":
        assert answer[1] == "internal error; the server's log has the details"
        assert errors[0].exc_info
        assert errors[0].exc_info[1] is error


def test_job_of_a_dead_spawner_is_lost_and_no_other_can_start(
    serve: Serve, connect: Connect
) -> None:
    """The end is told as it is, and the server says what to do."""
    server = serve()
    client = connect("user", server.address)
    job_id = client.start(*_FOREVER)
    os.kill(server._worker._spawner.pid, signal.SIGKILL)
    list(client.stream(job_id))
    job = client.status(job_id)
    assert (job.status, job.end_reason) == (worker_pb.FINISHED, worker_pb.LOST)
    code, details = _call(client, "StartJob", command="true")
    assert (code, "restart the server" in details) == ("UNAVAILABLE", True)


# --- jobs -------------------------------------------------------------------------------


def test_status_tells_every_field_of_a_running_and_of_a_finished_job(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """Absent fields are absent: no exit code, signal or end before there is one, no limit."""
    client = connect("user", serve().address)
    os.mkfifo(tmp_path / "go")
    args = ["-c", 'printf "\\200\\n"; read x <"$0"; exit 7', str(tmp_path / "go")]
    before = datetime.now(UTC)
    job_id = client.start("sh", args)
    assert uuid.UUID(job_id).version == 4
    assert str(uuid.UUID(job_id)) == job_id
    chunks = client.stream(job_id)
    next(chunks)
    running = client.status(job_id)
    started = running.started_at.ToDatetime(UTC)
    assert before <= started <= datetime.now(UTC)
    expected = worker_pb.Job(
        job_id=job_id,
        owner="user",
        command="sh",
        args=args,
        status=worker_pb.RUNNING,
        started_at=running.started_at,
        output_bytes=2,
        subscribers=["user"],
        limits=worker_pb.Limits(),
    )
    assert running == expected
    (tmp_path / "go").write_text("on\n")
    assert list(chunks) == []
    finished = client.status(job_id)
    assert started <= finished.ended_at.ToDatetime(UTC) <= datetime.now(UTC)
    expected.MergeFrom(
        worker_pb.Job(
            status=worker_pb.FINISHED,
            end_reason=worker_pb.EXITED,
            exit_code=7,
            ended_at=finished.ended_at,
            usage=worker_pb.Usage(
                source=worker_pb.RUSAGE,
                cpu_user_s=finished.usage.cpu_user_s,
                cpu_system_s=finished.usage.cpu_system_s,
                memory_peak_bytes=finished.usage.memory_peak_bytes,
            ),
        )
    )
    del expected.subscribers[:]
    finished_subscribers = list(finished.subscribers)
    del finished.subscribers[:]
    assert finished == expected
    assert finished_subscribers == []
    assert list(client.list()) == [finished]


def test_exit_code_0_is_present_and_a_signal_is_told(connect: Connect) -> None:
    """Zero is not the same as absent, and a job that kills itself was not stopped."""
    client = connect()
    job = client.status(_finish(client))
    assert (job.HasField("exit_code"), job.exit_code, job.HasField("signal")) == (True, 0, False)
    job = client.status(_finish(client, "sh", ["-c", "kill -KILL $$"]))
    assert (job.status, job.end_reason) == (worker_pb.FINISHED, worker_pb.SIGNALLED)
    assert (job.HasField("exit_code"), job.signal) == (False, signal.SIGKILL)


@pytest.mark.parametrize(
    ("stopper", "reason"),
    [("user", worker_pb.STOPPED_BY_OWNER), ("admin", worker_pb.STOPPED_BY_ADMIN)],
)
def test_stop_tells_who_stopped_and_is_idempotent(
    connect: Connect, stopper: str, reason: worker_pb.EndReason
) -> None:
    """The job is returned as it then is; who stops it again changes nothing."""
    job_id = connect("user").start(*_FOREVER)
    stopped = connect(stopper).stop(job_id)
    assert (stopped.status, stopped.end_reason) == (worker_pb.STOPPED, reason)
    assert (stopped.signal, stopped.HasField("exit_code")) == (signal.SIGKILL, False)
    assert stopped.HasField("ended_at")
    assert connect("user").stop(job_id) == connect("admin").stop(job_id) == stopped
    assert connect("user").status(job_id) == stopped


def test_admin_stopping_their_own_job_is_its_owner(connect: Connect) -> None:
    """The reason tells the relation to the job, not the role."""
    admin = connect("admin")
    assert admin.stop(admin.start(*_FOREVER)).end_reason == worker_pb.STOPPED_BY_OWNER


def test_stop_of_a_finished_job_keeps_its_end(connect: Connect) -> None:
    """A job that ended by itself was not stopped, by nobody."""
    client = connect()
    job_id = _finish(client, "sh", ["-c", "exit 3"])
    finished = client.status(job_id)
    assert (finished.status, finished.exit_code) == (worker_pb.FINISHED, 3)
    assert client.stop(job_id) == connect("admin").stop(job_id) == finished


def test_stop_from_many_clients_right_after_the_start_succeeds_for_all(connect: Connect) -> None:
    """They get one and the same end."""
    client = connect()
    job_id = client.start("sleep", ["infinity"])
    with ThreadPoolExecutor(20) as pool:
        ends = list(pool.map(lambda _: client.stop(job_id).SerializeToString(), range(20)))
    assert len(set(ends)) == 1


# --- limits -----------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Limits]:
    """The limits of each job that a server in this process hands to its worker."""
    given: list[Limits] = []
    start = worker.Worker.start

    def spy(jobs: worker.Worker, *args: Any, limits: Limits, **options: Any) -> str:
        given.append(limits)
        return start(jobs, *args, limits=limits, **options)

    monkeypatch.setattr(worker.Worker, "start", spy)
    return given


_LIMITS = {
    "cpu_cores": 0.25,
    "memory_bytes": 300 << 20,
    "swap_bytes": 0,
    "io_read_bps": 1234567,
    "io_write_bps": 7654321,
    "io_read_iops": 21,
    "io_write_iops": 22,
    "pids": 33,
}


def test_limits_asked_for_reach_the_job_and_others_are_the_default(
    serve: Serve, connect: Connect, given: list[Limits]
) -> None:
    """Each field by itself, all together, and none."""
    assert set(_LIMITS) == {field.name for field in worker_pb.Limits.DESCRIPTOR.fields}
    client = connect("user", serve().address)
    requests: list[dict[str, Any]] = [{}, _LIMITS, *({k: v} for k, v in _LIMITS.items())]
    for limits in requests:
        _finish(client, **limits)
    default = Config().limits({})
    assert given == [replace(default, **limits) for limits in requests]


def test_configuration_sets_default_and_ceiling(
    serve: Serve, connect: Connect, given: list[Limits], tmp_path: Path
) -> None:
    """What a job does not ask for is the default of the file; it may ask up to the ceiling."""
    path = tmp_path / "limits.toml"
    path.write_text("[defaults]\npids = 10\nmemory = '100M'\n[ceilings]\npids = 20\n")
    client = connect("user", serve(config=path).address)
    for pids in (None, 1, 20):
        _finish(client, pids=pids)
    assert [(limits.pids, limits.memory_bytes) for limits in given] == [
        (10, 100 << 20),
        (1, 100 << 20),
        (20, 100 << 20),
    ]
    assert _call(client, "StartJob", command="true", limits=worker_pb.Limits(pids=21)) == (
        "INVALID_ARGUMENT",
        "pids 21 is above this server's ceiling of 20",
    )


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"memory_bytes": (8 << 30) + 1}, f"{(8 << 30) + 1} .* {8 << 30}"),
        ({"memory_bytes": 2**64 - 1}, f"{2**64 - 1} .* {8 << 30}"),
        ({"cpu_cores": 8.5}, r"8\.5 .* 8\.0"),
        ({"cpu_cores": float("inf")}, r"inf .* 8\.0"),
        ({"cpu_cores": float("nan")}, r"0\.01, not nan"),
        ({"cpu_cores": -1}, r"0\.01, not -1"),
        ({"swap_bytes": 1}, "1 .* 0"),
        ({"pids": 0}, "at least 1, not 0"),
        ({"pids": 1, "io_read_iops": 0}, "at least 1, not 0"),
    ],
    ids=str,
)
def test_limit_that_is_too_high_or_senseless_is_an_invalid_argument(
    serve: Serve, connect: Connect, limits: dict[str, Any], text: str
) -> None:
    """It names the field and both numbers, and no job is made."""
    client = connect("user", serve().address)
    code, told = _call(client, "StartJob", command="true", limits=worker_pb.Limits(**limits))
    assert code == "INVALID_ARGUMENT"
    assert re.match(f"{list(limits)[-1]} .*{text}", told)
    assert list(client.list()) == []


def test_list_tells_the_usage_of_ended_jobs(connect: Connect) -> None:
    """Of those that run `GetJobStatus` tells it."""
    client = connect()
    ended, running = _finish(client), client.start(*_FOREVER)
    jobs = {job.job_id: job for job in client.list()}
    assert jobs[ended].usage == client.status(ended).usage
    assert jobs[ended].HasField("usage")
    assert not jobs[running].HasField("usage")
    client.stop(running)


# --- streams ----------------------------------------------------------------------------


def _collect(client: Client, job_id: str, offset: int = 0) -> bytes:
    """Read a stream to its end, and check that its chunks fit together."""
    request = worker_pb.StreamOutputRequest(job_id=job_id, offset=offset)
    data = bytearray()
    for response in client._worker.StreamOutput(request, metadata=client._metadata()):
        assert response.offset == offset + len(data)
        assert 0 < len(response.data) <= 256 * 1024
        data += response.data
    return bytes(data)


def test_every_stream_gets_the_same_bytes_whenever_and_wherever_it_begins(
    connect: Connect, tmp_path: Path
) -> None:
    """Ten at once from the start, from offsets, and one after the end: binary and contiguous."""
    client, size = connect(), 3_000_000
    os.mkfifo(tmp_path / "go")
    script = (
        'cd "$0"; head -c "$1" /dev/urandom >copy; '
        "head -c 100000 copy; read x <go; tail -c +100001 copy"
    )
    job_id = client.start("sh", ["-c", script, str(tmp_path), str(size)])
    offsets = [0, 0, 0, 0, 0, 1, 99_999, 100_000, 100_001, size]
    with ThreadPoolExecutor(len(offsets)) as pool:
        streams = [pool.submit(_collect, client, job_id, offset) for offset in offsets]
        (tmp_path / "go").write_text("on\n")
        data = [stream.result(GUARD_S) for stream in streams]
    copy = (tmp_path / "copy").read_bytes()
    assert len(copy) == size
    assert all(d == copy[offset:] for d, offset in zip(data, offsets, strict=True))
    assert _collect(client, job_id) == copy
    assert _collect(client, job_id, size - 1) == copy[-1:]
    assert client.status(job_id).output_bytes == size


def test_output_is_delivered_while_the_job_is_blocked_in_a_line(
    connect: Connect, tmp_path: Path
) -> None:
    """Bytes come when they are written: not when a line or a buffer is full, or the job ends."""
    client = connect()
    os.mkfifo(tmp_path / "go")
    job_id = client.start(
        "sh", ["-c", 'printf half; read x <"$0"; echo done', str(tmp_path / "go")]
    )
    chunks = client.stream(job_id)
    assert next(chunks) == b"half"
    (tmp_path / "go").write_text("on\n")
    assert b"".join(chunks) == b"done\n"


def test_stream_ends_on_stop_when_the_status_is_already_terminal(connect: Connect) -> None:
    """Whoever has seen the end of the stream never sees the job still running."""
    client = connect()
    job_id = client.start(*_FOREVER)
    with ThreadPoolExecutor(1) as pool:
        chunks = client.stream(job_id)
        assert next(chunks) == b"ready\n"
        stop = pool.submit(client.stop, job_id)
        assert list(chunks) == []
        assert client.status(job_id).status == worker_pb.STOPPED
        stop.result(GUARD_S)


def test_grandchild_that_holds_the_output_does_not_keep_the_stream_open(connect: Connect) -> None:
    """When the command has exited the rest is killed and the stream ends."""
    client = connect()
    job_id = client.start("sh", ["-c", "sleep infinity & echo bye"])
    assert b"".join(client.stream(job_id)) == b"bye\n"
    assert client.status(job_id).exit_code == 0


class _Slots:
    """Makes the semaphore of the stream slots, and waits for one to come back."""

    def __init__(self) -> None:
        self._freed = threading.Semaphore(0)

    def make(self, value: int) -> threading.BoundedSemaphore:
        freed = self._freed

        class _Semaphore(threading.BoundedSemaphore):
            def release(self, n: int = 1) -> None:
                assert threading.current_thread().name.startswith("rpc")
                super().release(n)
                freed.release()

        return _Semaphore(value)

    def await_freed(self) -> None:
        assert self._freed.acquire(timeout=GUARD_S)


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> _Slots:
    slots = _Slots()
    monkeypatch.setattr(service, "threading", SimpleNamespace(BoundedSemaphore=slots.make))
    return slots


def _follow(client: Client, job_id: str) -> Iterator[bytes]:
    """Open a stream of a silent job; it holds a slot when this returns."""
    chunks = client.stream(job_id)
    assert next(chunks) == b"ready\n"
    return chunks


def test_silent_followers_in_every_slot_hold_up_nothing_but_streams(
    serve: Serve, connect: Connect, slots: _Slots
) -> None:
    """Everything else answers, one more stream is refused; a client that goes frees its slot."""
    address = serve(max_streams=3).address
    client = connect("user", address)
    job_id = client.start(*_FOREVER)
    followers = [_follow(client, job_id) for _ in range(3)]
    assert client.status(job_id).status == worker_pb.RUNNING
    assert connect("", address).login("user", "user")
    assert client.stop(client.start(*_FOREVER)).status == worker_pb.STOPPED
    assert len(client.list()) == 2
    assert _call(client, "StreamOutput", job_id=job_id) == (
        "RESOURCE_EXHAUSTED",
        "all 3 output streams are in use; try again later",
    )
    # The job says nothing all the while; its output must not be needed to notice.
    followers[1].close()  # type: ignore[attr-defined]
    slots.await_freed()
    followers[1] = _follow(client, job_id)
    client.stop(job_id)
    assert [list(follower) for follower in followers] == [[], [], []]


def test_killed_client_gives_its_slot_and_its_thread_back(
    serve: Serve, connect: Connect, certs: Path, tokens: dict[str, str], slots: _Slots
) -> None:
    """A process that dies in the middle of a silent stream is noticed without output."""
    address = serve(max_streams=1).address
    client = connect("user", address)
    job_id = client.start(*_FOREVER)
    argv = [
        "stream",
        "--server",
        address,
        "--certs",
        str(certs),
        "-t",
        tokens["user"],
        "-j",
        job_id,
    ]
    with subprocess.Popen(
        [sys.executable, str(_HERE / "client.py"), *argv], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    slots.await_freed()
    _follow(client, job_id)


def test_failed_streams_use_up_no_slots(serve: Serve, connect: Connect, slots: _Slots) -> None:
    """Refused and ended streams give back what they took."""
    client = connect("user", serve(max_streams=1).address)
    job_id = _finish(client)
    slots.await_freed()
    for offset in (1, 0) * 3:
        code, _ = _call(client, "StreamOutput", job_id=job_id, offset=offset)
        assert code == ("OUT_OF_RANGE" if offset else "OK")
        slots.await_freed()


def test_subscribers_are_shown_while_they_stream_and_not_after(
    serve: Serve, connect: Connect
) -> None:
    """Each name once, while any stream of theirs is open."""
    server = serve()
    user, admin = connect("user", server.address), connect("admin", server.address)
    job_id = user.start(*_FOREVER)
    assert list(user.status(job_id).subscribers) == []
    streams = [_follow(user, job_id), _follow(user, job_id), _follow(admin, job_id)]
    assert list(user.status(job_id).subscribers) == ["admin", "user"]
    output = server._worker._job(job_id).output
    for number, expected in ((2, ["user"]), (1, ["user"]), (0, [])):
        streams[number].close()  # type: ignore[attr-defined]
        with output._changed:
            assert output._changed.wait_for(
                lambda n=number: len(output._subscriptions) == n,  # type: ignore[misc]
                GUARD_S,
            )
        assert list(user.status(job_id).subscribers) == expected


def test_stalled_reader_holds_up_neither_the_job_nor_others(connect: Connect) -> None:
    """A client that never reads on costs nobody anything."""
    client, size = connect(), 20_000_000
    job_id = client.start("head", ["-c", str(size), "/dev/zero"])
    stalled = client.stream(job_id)
    next(stalled)
    assert len(_collect(connect(), job_id)) == size
    assert client.status(job_id).status == worker_pb.FINISHED


def test_server_gives_back_every_descriptor_and_thread(serve: Serve, connect: Connect) -> None:
    """After jobs, failed starts, streams and refusals it has what it had before."""
    server = serve()
    client = connect("user", server.address)
    _finish(client)

    def used() -> tuple[int, set[str]]:
        jobs = {thread.name for thread in threading.enumerate() if thread.name.startswith("job-")}
        return len(os.listdir("/proc/self/fd")), jobs

    before = used()
    for _ in range(5):
        _finish(client, "echo", ["hello"])
        _call(client, "StartJob", command="no-such-command")
        _call(client, "StreamOutput", job_id=_ABSENT)
        client.stop(client.start(*_FOREVER))
    for thread in threading.enumerate():
        if thread.name.startswith("job-"):
            thread.join(GUARD_S)
    assert used() == before


# --- the program: starting --------------------------------------------------------------


def _run_server(*options: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `server.py`, which is to end by itself."""
    return subprocess.run(
        [sys.executable, _HERE / "server.py", *options],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )


def _assert_one_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """It failed with one line on stderr, which says all `parts`."""
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"server: [^\n]+\n", result.stderr), result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    "listen",
    [
        *("", ":", "localhost", "localhost:", ":50051", "127.0.0.1:x", "127.0.0.1:-1"),
        *("127.0.0.1:65536", "::1:50051", "[::1]", "[127.0.0.1]:0", "[]:0", "127.0.0.1:1:2"),
    ],
)
def test_listen_must_be_host_and_port(certs: Path, tmp_path: Path, listen: str) -> None:
    """What is not HOST:PORT is refused with an example, before anything is made."""
    with pytest.raises(SettingsError, match=re.escape(f"--listen {listen!r} is not HOST:PORT")):
        Server(Settings(listen=listen, certs=certs, state_dir=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("listen", ["localhost:0", "127.0.0.2:0", "[::1]:0"])
def test_any_loopback_address_can_be_listened_on(
    serve: Serve, connect: Connect, listen: str
) -> None:
    """By name and by number, and the address told can be connected to."""
    if listen.startswith("[") and not _has_ipv6():
        pytest.skip("this host has no IPv6")
    server = serve(listen=listen)
    assert re.fullmatch(re.escape(listen[:-1]) + r"[1-9]\d*", server.address)
    if listen != "127.0.0.2:0":  # not in the certificate
        assert connect("user", server.address).list() == []


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


_EXPOSED = ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "build.example:0"]


def _resolve_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let build.example be two addresses, one of them loopback."""
    resolve = socket.getaddrinfo

    def fake(host: str, port: Any) -> Any:
        if host != "build.example":
            return resolve(host, port)
        return [info for number in ("127.0.0.1", "192.0.2.1") for info in resolve(number, port)]

    monkeypatch.setattr(socket, "getaddrinfo", fake)


@pytest.mark.parametrize("listen", _EXPOSED)
def test_users_with_public_passwords_are_not_exposed(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listen: str
) -> None:
    """Beyond loopback the seeded users are refused, with the remedy."""
    _resolve_example(monkeypatch)
    with pytest.raises(SettingsError, match=r"admin and user are public.*--users FILE"):
        Server(Settings(listen=listen, certs=certs, state_dir=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


def _users_file(path: Path, *entries: tuple[str, str, str]) -> Path:
    """A users file of names, roles and passwords, hashed at the least cost."""
    lines = []
    for name, role, password in entries:
        digest = auth._base64(auth._scrypt(password, bytes(16), 1, 8, 1))
        lines.append(f"{name}:{role}:scrypt$1$8$1${auth._base64(bytes(16))}${digest}\n")
    path.write_text("".join(lines))
    return path


def test_users_file_that_repeats_a_public_password_is_not_exposed(
    certs: Path, tmp_path: Path
) -> None:
    """A salt of one's own makes `admin` no better a password for admin."""
    users = _users_file(tmp_path / "users", ("admin", "admin", "admin"), ("bob", "user", "bob"))
    settings = Settings(listen="0.0.0.0:0", certs=certs, users=users, state_dir=tmp_path / "state")
    with pytest.raises(SettingsError, match="the passwords of admin are public"):
        Server(settings)


def test_users_of_their_own_may_be_exposed(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """With other passwords the server listens anywhere, and only they can log in."""
    users = _users_file(tmp_path / "users", ("admin", "user", "changed"))
    server = serve(listen="0.0.0.0:0", users=users)
    client = connect("", server.address.replace("0.0.0.0", "127.0.0.1"))
    for name in ("admin", "user"):
        assert _call(client, "Login", username=name, password=name)[0] == "UNAUTHENTICATED"
    client.login("admin", "changed")
    assert client.list() == []


def test_token_of_a_user_who_is_no_more_in_the_file_is_unauthenticated(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """Whoever is taken out of the users file is out with the next start."""
    users = _users_file(tmp_path / "users", ("user", "user", "changed"))
    address = serve(users=users).address
    assert _call(connect("user", address), "ListJobs")[0] == "OK"
    assert _call(connect("admin", address), "ListJobs")[0] == "UNAUTHENTICATED"


def test_missing_certificates_name_the_command_that_makes_them(tmp_path: Path) -> None:
    """One line with the missing files."""
    result = _run_server("--certs", tmp_path, "--state-dir", tmp_path / "state")
    _assert_one_line(result, "make certs", str(tmp_path / "server-key.pem"), "client-ca.pem")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("server.pem", "not PEM"),
        ("server.pem", "of another"),
        ("server-key.pem", "not PEM"),
        ("server-key.pem", "of another"),
        ("client-ca.pem", "not PEM"),
    ],
)
def test_unusable_certificates_are_refused_at_the_start(
    certs: Path, foreign_certs: Path, tmp_path: Path, name: str, damage: str
) -> None:
    """Not when the first client fails to connect."""
    directory = shutil.copytree(certs, tmp_path / "certs")
    good = (foreign_certs / name).read_bytes()
    (directory / name).write_bytes(good if damage == "of another" else b"garbage")
    with pytest.raises(SettingsError, match=r"are not usable: .*generate\.sh"):
        Server(Settings(listen="127.0.0.1:0", certs=directory, state_dir=tmp_path / "state"))


def test_port_in_use_is_an_error(program: ServerProgram, certs: Path, tmp_path: Path) -> None:
    """A second server does not silently share the port, and leaves no process behind."""
    result = _run_server(
        *("--listen", program.address, "--certs", certs, "--state-dir", tmp_path / "state"),
        *("--limits", "off"),
    )
    _assert_one_line(result, f"cannot listen on {program.address}: Address already in use")


def test_state_directory_in_use_is_an_error(
    start_server: StartServer, make_state: Callable[[], Path], certs: Path
) -> None:
    """Two servers would delete each other's output."""
    state = make_state()
    start_server(state=state)
    result = _run_server(
        *("--listen", "127.0.0.1:0", "--certs", certs, "--state-dir", state, "--limits", "off")
    )
    _assert_one_line(result, "another worker keeps its output here", str(state))


def test_state_directory_is_private(serve: Serve, tmp_path: Path) -> None:
    """So are the key and the directory of the output in it."""
    serve(state_dir=tmp_path / "a" / "state")
    modes = {
        str(path.relative_to(tmp_path / "a")): path.stat().st_mode & 0o777
        for path in (tmp_path / "a").rglob("*")
    }
    assert modes == {"state": 0o700, "state/token.key": 0o600, "state/output": 0o700}


def test_server_that_must_enforce_limits_and_cannot_says_how_it_could(
    certs: Path, tmp_path: Path
) -> None:
    """With --limits require, the default, it exits with the remedy and runs nothing."""
    options = ["--listen", "127.0.0.1:0", "--certs", str(certs), "--state-dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, _HERE / "server.py", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        if process.stdout.readline():
            process.terminate()
            process.communicate(timeout=GUARD_S)
            pytest.skip("this host can enforce the limits")
        _, stderr = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1
    log, _, told = stderr.partition("server: ")  # it may have swept what others left
    assert all(" INFO " in line for line in log.splitlines())
    first, *failures, last = told.splitlines()
    assert first == "not every limit can be enforced here:"
    assert last == "or accept weaker limits with --limits auto"
    findings = _run_server("check").stdout.splitlines()
    assert failures == [line for line in findings if line.startswith("FAILED ")] != []
    assert list(tmp_path.glob("output/*")) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[defaults]\npids = 0\n", ["line 2: defaults.pids", "at least 1, not 0"]),
        ("[limits]\n", ["line 1: limits", "[defaults] and [ceilings]"]),
        ("[defaults\n", ["not TOML", "line 1"]),
        (None, ["No such file"]),
    ],
)
def test_bad_configuration_is_told_at_the_start(
    certs: Path, tmp_path: Path, text: str | None, parts: list[str]
) -> None:
    """With the file and the line; nothing is served."""
    path = tmp_path / "limits.toml"
    if text is not None:
        path.write_text(text)
    options: list[str | Path] = ["--listen", "127.0.0.1:0", "--limits", "off"]
    options += ["--state-dir", tmp_path / "state"]
    result = _run_server(*options, "--certs", certs, "--config", path)
    _assert_one_line(result, str(path), *parts)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "options",
    [["--max-streams", "0"], ["--max-streams", "x"], ["--limits", "some"], ["--lis", "x"]],
)
def test_wrong_usage_of_the_server_exits_with_2(options: list[str]) -> None:
    """Options are not guessed at."""
    result = _run_server(*options)
    assert (result.returncode, result.stdout) == (2, "")


# --- the program: users -----------------------------------------------------------------


def test_user_command_makes_an_entry_that_can_log_in(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """Its output is a line of the users file, and does not show the password."""
    result = _run_server("user", "carol", "--role", "admin", stdin="hunter2\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"carol:admin:scrypt\$17\$8\$1\$[\w-]+\$[\w-]+\n", result.stdout)
    users = tmp_path / "users"
    users.write_text(result.stdout)
    client = connect("", serve(users=users).address)
    client.login("carol", "hunter2")
    assert client.list() == []


@pytest.mark.parametrize(
    ("arguments", "stdin", "problem"),
    [
        (["a:b"], "x\n", "bad user name"),
        (["bob"], "\n", "must not be empty"),
        (["bob"], "", "empty"),
    ],
)
def test_user_command_refuses_what_the_file_could_not_hold(
    arguments: list[str], stdin: str, problem: str
) -> None:
    """One line, no entry."""
    _assert_one_line(_run_server("user", *arguments, stdin=stdin), problem)


@pytest.mark.parametrize("second", ["hunter2", "hunter3"])
def test_user_command_asks_twice_at_a_terminal_without_echo(second: str) -> None:
    """Two different answers make no entry; neither answer is shown."""
    ours, terminal = pty.openpty()
    with (
        open(ours, "r+b", buffering=0) as keyboard,
        subprocess.Popen(
            [sys.executable, _HERE / "server.py", "user", "bob"],
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=terminal,
            start_new_session=True,
        ) as process,
    ):
        os.close(terminal)
        shown = _read_until(keyboard.fileno(), b"Password for bob: ")
        keyboard.write(b"hunter2\n")
        shown += _read_until(keyboard.fileno(), b"Once more: ")
        keyboard.write(second.encode() + b"\n")
        stdout, _ = process.communicate(timeout=GUARD_S)
        with contextlib.suppress(OSError):  # EIO: the other side is gone
            shown += keyboard.read(1000) or b""
    assert b"hunter" not in shown + stdout
    if second == "hunter2":
        assert process.returncode == 0
        assert stdout.startswith(b"bob:user:scrypt$")
    else:
        assert (process.returncode, stdout) == (1, b"")
        assert b"server: the two passwords differ" in shown


def _read_until(fd: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        assert select.select([fd], [], [], GUARD_S)[0], data
        data += os.read(fd, 1)
    return data


# --- the program: ending ----------------------------------------------------------------


class _Witness:
    """A FIFO that every process of a job holds open: end-of-file means that none lives."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # A child in its group, one in a session of its own, one that nobody waits for.
        script = (
            'exec 3>"$0"; sleep infinity & setsid sleep infinity & '
            "(setsid sh -c 'sleep infinity; :' &) ; echo ready; exec sleep infinity"
        )
        self.command = ("sh", ["-c", script, str(path)])

    def assert_all_gone(self) -> None:
        assert select.select([self._fd], [], [], GUARD_S)[0]
        assert os.read(self._fd, 1) == b""

    def assert_alive(self) -> None:
        assert not select.select([self._fd], [], [], 0)[0]

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[_Witness]:
    with contextlib.closing(_Witness(tmp_path / "witness")) as witness:
        yield witness


def test_server_says_one_line_on_stdout_and_the_rest_on_stderr(start_server: StartServer) -> None:
    """The line is `listening on HOST:PORT`, with the port that was taken."""
    program = start_server()  # which checks the first line
    assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", program.address)
    assert program.end() == 0  # which checks that there is no second
    assert program.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_server_jobs_and_streams(
    start_server: StartServer, connect: Connect, witness: _Witness, number: signal.Signals
) -> None:
    """Exit status 0, which the watchdog denies after 4.5 s; no process of a job is left."""
    program = start_server()
    client = connect("user", program.address)
    job_id = client.start(*witness.command)
    followers = [_follow(client, job_id) for _ in range(5)]
    witness.assert_alive()
    with ThreadPoolExecutor(len(followers)) as pool:
        rests = [pool.submit(list, follower) for follower in followers]
        assert program.end(number) == 0, program.log.read_text()
        assert all(rest.result(GUARD_S) == [] for rest in rests)
    witness.assert_all_gone()
    assert f"{number.name}: shutting down" in program.log.read_text()
    with pytest.raises(ClientError) as caught:
        client.status(job_id)
    assert caught.value.code == "UNAVAILABLE"


def test_server_ends_though_a_client_does_not_read(
    start_server: StartServer, connect: Connect
) -> None:
    """A stream that is stuck for want of a reader does not keep the server."""
    program = start_server()
    client = connect("user", program.address)
    stalled = client.stream(client.start("cat", ["/dev/zero"]))
    next(stalled)
    assert program.end() == 0, program.log.read_text()


def test_logins_that_wait_for_their_turn_are_given_up_at_the_end(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's end waits for the two hashes that are being made, not for a queue of them."""
    entered, go_on, hashed = threading.Semaphore(0), threading.Event(), threading.Semaphore(0)
    login = auth.Authenticator.login

    def enter(*arguments: Any) -> Any:
        entered.release()
        return login(*arguments)

    def blocked(password: str, password_hash: str) -> bool:  # noqa: ARG001
        hashed.release()
        return go_on.wait(GUARD_S)

    monkeypatch.setattr(auth.Authenticator, "login", enter)
    monkeypatch.setattr(auth, "_password_matches", blocked)
    server = serve()
    client = connect("", server.address)
    with ThreadPoolExecutor(9) as pool:
        logins = [pool.submit(_call, client, "Login", username="user") for _ in range(8)]
        for _ in range(8):
            assert entered.acquire(timeout=GUARD_S)
        for _ in range(2):
            assert hashed.acquire(timeout=GUARD_S)
        stop = pool.submit(server.stop)
        # Broken off when the grace of the calls is over: by then every one is known to be.
        assert "OK" not in {login.result(GUARD_S)[0] for login in logins}
        go_on.set()
        stop.result(GUARD_S)
    assert not hashed.acquire(blocking=False)


def test_killed_server_leaves_no_process_of_a_job(
    start_server: StartServer, connect: Connect, witness: _Witness
) -> None:
    """SIGKILL gives it no chance to clean up; the spawner does."""
    program = start_server()
    client = connect("user", program.address)
    _follow(client, client.start(*witness.command))
    witness.assert_alive()
    assert program.end(signal.SIGKILL) == -signal.SIGKILL
    witness.assert_all_gone()


def test_token_survives_a_restart_and_jobs_do_not(
    start_server: StartServer, connect: Connect, make_state: Callable[[], Path]
) -> None:
    """The key is kept, the output is deleted."""
    state = make_state()
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        program = start_server(state=state)
        client = connect("user", program.address)
        assert client.list() == []
        job_id = _finish(client, "echo")
        assert [path.stem for path in (state / "output").iterdir()] == [job_id]
        program.end(number)
    assert list((state / "output").iterdir()) == []


# --- secrets ----------------------------------------------------------------------------


def test_job_has_nothing_of_the_servers_environment(connect: Connect) -> None:
    """It has five variables, and no descriptor but the standard three."""
    client = connect()
    job_id = client.start("sh", ["-c", "env; ls /proc/$$/fd"])
    lines = b"".join(client.stream(job_id)).decode().splitlines()
    names = {line.partition("=")[0] for line in lines if "=" in line}
    # PWD and the like are the shell's own.
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == {"PATH", "HOME", "LANG", "USER", "JOB_ID"}
    assert f"JOB_ID={job_id}" in lines
    assert [line for line in lines if line.isdecimal()] == ["0", "1", "2"]


def test_log_tells_logins_and_jobs_but_neither_passwords_nor_tokens(
    program: ServerProgram, connect: Connect, tokens: dict[str, str]
) -> None:
    """Nor arguments, which are where others keep their passwords."""
    client = connect()
    _call(client, "Login", username="mallory\nforged", password="hunter2")
    job_id = _finish(client, "echo", ["hunter3"])
    log = program.log.read_text()
    assert "login: user 'user' from ipv4:127.0.0.1:" in log
    assert "login failed: user 'mallory\\nforged' from ipv4:127.0.0.1:" in log
    assert f"job {job_id}: started by user: 'echo'" in log
    for secret in ("hunter2", "hunter3", "do not tell", *tokens.values()):
        assert secret not in log
