"""Tests of the gate and of the services: every RPC and its errors, over real mutual TLS.

Most tests share one server program. A test that looks inside the server or causes a fault uses a
server in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

import auth
import connection as client_module
import gate
import service
import tls
import untaken
import worker
import workerservice_pb2 as worker_pb
from audit import AUDIT_FLAGS, AuditLog
from calls import Calls
from client import Client, ClientError
from gate import Gate
from quotas import QuotaError, Quotas
from service import add_services
from settings import Config
from testkit import (
    ABSENT,
    FOREVER,
    GUARD_S,
    Hashing,
    call_rpc,
    follow,
    kill_fork_server,
    make_fifo,
    rpc_methods,
    run_job,
    settle_spares,
)
from untaken import Untaken
from users import SEEDED_USERS
from worker import Account, Job, Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from server import Server

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]

_HERE = Path(__file__).resolve().parent
_METHODS = rpc_methods()
_WITH_TOKEN = [name for name in _METHODS if name != "Login"]
_WITH_JOB = [
    name for name, method in _METHODS.items() if "job_id" in method.input_type.fields_by_name
]
_NO_TOKEN = (
    "UNAUTHENTICATED",
    (
        "no valid token in the metadata `authorization: Bearer TOKEN`: it has expired, was "
        "revoked, or belongs to another client certificate; log in again"
    ),
)
_NO_RECORD = ("UNAVAILABLE", "the audit log cannot be written; tell the operator")


def _worker_of(server: Server) -> Worker:
    assert server._worker
    return server._worker


def _fields(name: str, job_id: str) -> dict[str, Any]:
    """Return the fields of a request with which the RPC succeeds."""
    if name == "StartJob":
        return {"command": "true"}
    return {"job_id": job_id} if name in _WITH_JOB else {}


# --- who may call what ------------------------------------------------------------------


@pytest.fixture
def own(connect: Connect) -> str:
    """The ID of a finished job of `user`."""
    return run_job(connect("user"))


@pytest.mark.parametrize("name", _METHODS)
def test_gate_admits_nothing_that_did_not_come_over_tls_1_3(
    certs: Path, tmp_path: Path, tokens: dict[str, str], name: str
) -> None:
    """If a server had a port without TLS, the gate would refuse every call there, also a login."""
    audit_log = tmp_path / "audit.log"
    authenticator = auth.Authenticator(users=SEEDED_USERS, key=bytes(32))
    with (
        AuditLog(lambda: os.open(audit_log, AUDIT_FLAGS, 0o600)) as audit,
        Worker(enforcement="off") as jobs,
        Calls(streams=9, streams_of_one=9) as calls,
        Gate(authenticator, audit, calls, request_bytes=1024) as gate,
    ):
        executor: Any = calls
        server = grpc.server(executor, interceptors=[gate])
        add_services(
            server,
            jobs,
            authenticator,
            config=Config(),
            account_of=lambda user: (None, Account(user)),
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with (
            Client(f"127.0.0.1:{port}", certs=certs, token=tokens["user"]) as client,
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            client._channel = channel
            assert call_rpc(client, name, **_fields(name, ABSENT)) == (
                "UNAUTHENTICATED",
                "the connection must be TLS 1.3",
            )
        server.stop(None).wait()


# --- login ------------------------------------------------------------------------------


def test_login_answers_a_bound_token_and_its_expiry(connect: Connect, certs: Path) -> None:
    """The token lasts 30 days and works with the certificate of the login, here `other`."""
    client = connect("", cert=certs / "other.pem", key=certs / "other-key.pem")
    _, expires_at = client.login("user", "user")
    assert timedelta(days=29) < expires_at - datetime.now(UTC) <= timedelta(days=30)
    assert {job.owner for job in client.list()} <= {"user"}


@pytest.mark.parametrize("name", ["Login", "GetJobStatus", "StreamOutput", "Refresh"])
def test_certificate_that_expires_ends_with_its_open_connections(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """TLS looks at it in the first handshake only, and not when a client resumes a session."""
    client = connect("user", serve().address)
    assert call_rpc(client, "ListJobs") == ("OK", "")
    a_year_later = time.time() + timedelta(days=400).total_seconds()
    monkeypatch.setattr(time, "time", lambda: a_year_later)
    fields = {"username": "user", "password": "user"} if name == "Login" else _fields(name, ABSENT)
    assert call_rpc(client, name, **fields) == (
        "UNAUTHENTICATED",
        "your client certificate has expired; get a new one",
    )


@pytest.mark.parametrize("name", ["Login", "GetJobStatus"])
def test_certificate_whose_dates_cannot_be_read_is_refused(
    serve: Serve, connect: Connect, certs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """TLS reads them first, and lets no such certificate in."""
    client = connect("user", serve().address)
    der = ssl.PEM_cert_to_DER_cert((certs / "client.pem").read_text())
    end = f"{datetime.fromtimestamp(tls.expiry(der), UTC):%y%m%d%H%M%S}Z".encode()
    monkeypatch.setattr(gate, "expiry", lambda der: tls.expiry(der.replace(end, b"490230000000Z")))
    gate._der.cache_clear()
    fields = {"username": "user", "password": "user"} if name == "Login" else _fields(name, ABSENT)
    assert call_rpc(client, name, **fields) == (
        "UNAUTHENTICATED",
        "the dates of your client certificate cannot be read; get a new one",
    )


def test_wrong_logins_are_unauthenticated_alike(serve: Serve, connect: Connect) -> None:
    """An unknown user and a wrong password get the same answer."""
    client = connect("", serve().address)
    logins = [("user", "hunter2"), ("nobody", "user")]
    assert {call_rpc(client, "Login", username=u, password=p) for u, p in logins} == {
        ("UNAUTHENTICATED", "wrong user name or password")
    }


def _log_in(client: Client) -> tuple[str, str]:
    return call_rpc(client, "Login", username="user", password="user")


def test_second_login_of_a_peer_at_once_is_refused_at_once(
    serve: Serve, connect: Connect, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says when to try again; the login does not queue.

    Other calls of this peer and logins of other peers are served meanwhile.
    """
    monkeypatch.setattr(auth, "_HASHES_AT_ONCE", 2)  # the test counts the logins that have begun
    hashing = Hashing(monkeypatch)
    address = serve().address
    client = connect("user", address)
    other = connect("", address, cert=certs / "other.pem", key=certs / "other-key.pem")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(_log_in, client)
        hashing.await_begun(1)
        with pytest.raises(ClientError, match="another login from here is under way") as caught:
            client.login("admin", "admin")
        assert (caught.value.code, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED", 1)
        assert client.list() == []
        second = pool.submit(_log_in, other)
        hashing.await_begun(1)
        hashing.go_on.set()
        assert {login.result(GUARD_S) for login in (first, second)} == {("OK", "")}


def test_too_many_logins_at_once_are_refused_at_once(
    serve: Serve, connect: Connect, tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While eight peers log in, the ninth is refused. Other calls are served meanwhile."""
    names = [f"peer-{number}" for number in range(9)]
    for file in ("client-ca.pem", "client-ca-key.pem"):
        shutil.copy(certs / file, tmp_path)
    generate = [str(_HERE / "certs" / "generate.sh"), "--dir", str(tmp_path), *names]
    subprocess.run(generate, check=True, stdout=subprocess.DEVNULL)
    # All eight logins hash at the same time: the test can count the logins that have begun.
    monkeypatch.setattr(auth, "_HASHES_AT_ONCE", 8)
    hashing = Hashing(monkeypatch)
    address = serve().address
    *peers, ninth = (
        connect("", address, cert=tmp_path / f"{name}.pem", key=tmp_path / f"{name}-key.pem")
        for name in names
    )
    with ThreadPoolExecutor(8) as pool:
        logins = [pool.submit(_log_in, peer) for peer in peers]
        hashing.await_begun(8)
        code, details = _log_in(ninth)
        assert (code, "too many logins" in details) == ("RESOURCE_EXHAUSTED", True)
        assert connect("user", address).list() == []
        hashing.go_on.set()
        assert {login.result(GUARD_S) for login in logins} == {("OK", "")}
    assert _log_in(ninth) == ("OK", "")


def test_logins_that_wait_for_their_turn_are_given_up_at_the_end(
    serve: Serve, connect: Connect, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Server.stop` waits for the hash that has begun. The other login does not begin its own."""
    entered, login = threading.Semaphore(0), auth.Authenticator.login

    def enter(*arguments: Any) -> Any:
        entered.release()
        return login(*arguments)

    monkeypatch.setattr(auth, "_HASHES_AT_ONCE", 1)
    monkeypatch.setattr(auth.Authenticator, "login", enter)
    hashing = Hashing(monkeypatch)
    server = serve()
    clients = [
        connect("", server.address, cert=certs / f"{name}.pem", key=certs / f"{name}-key.pem")
        for name in ("client", "other")
    ]
    with ThreadPoolExecutor(3) as pool:
        logins = [pool.submit(_log_in, client) for client in clients]
        for _ in clients:
            assert entered.acquire(timeout=GUARD_S)
        hashing.await_begun(1)
        stop = pool.submit(server.stop)
        # When the grace of the calls is over, the server breaks off both logins.
        assert "OK" not in {login.result(GUARD_S)[0] for login in logins}
        hashing.go_on.set()
        stop.result(GUARD_S)
    assert not hashing.begun.acquire(blocking=False)


# --- logout -----------------------------------------------------------------------------


def test_logout_that_cannot_be_recorded_is_told_and_the_token_stays(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """If the revocation is not on disk, the token would be valid again after a restart.

    The call therefore fails, and the token stays valid.
    """
    server = serve()
    client = connect("user", server.address)
    server._authenticator._revocations.close()
    code, details = call_rpc(client, "Logout")
    assert (code, "the token is still valid" in details) == ("UNAVAILABLE", True)
    assert [record.levelname for record in caplog.records if record.name == "gate"] == ["ERROR"]
    assert client.list() == []


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
    ],
    ids=lambda value: str(value)[:24],
)
def test_command_that_cannot_be_executed_is_an_invalid_argument(
    connect: Connect, command: str, args: list[str], problem: str
) -> None:
    """The message names the command and the problem. The worker keeps no job."""
    before = connect().list()
    code, details = call_rpc(connect(), "StartJob", command=command, args=args)
    assert code == "INVALID_ARGUMENT"
    assert details.startswith(f"cannot execute {command!r}: ")
    assert problem in details
    assert connect().list() == before


_LARGE = [
    ("true", ["x" * 130 * 1024], "an argument of 133120 bytes; this server's ceiling is 65536"),
    ("true", ["x"] * 5000, "5000 arguments; this server's ceiling is 4096"),
    ("x" * 130 * 1024, [], "an argument of 133120 bytes; this server's ceiling is 65536"),
]


@pytest.mark.parametrize(("command", "args", "problem"), _LARGE, ids=["one", "many", "command"])
def test_command_above_a_ceiling_is_an_invalid_argument(
    serve: Serve, connect: Connect, command: str, args: list[str], problem: str
) -> None:
    """The message names the ceiling and does not repeat the command. The worker keeps no job."""
    client = connect("user", serve().address)
    code, details = call_rpc(client, "StartJob", command=command, args=args)
    assert (code, problem in details, len(details) < 1000) == ("INVALID_ARGUMENT", True, True)
    assert client.list() == []


_MANY_BYTES = 1023 * 1024  # a request has no more than 1 MiB


@pytest.mark.parametrize(
    ("argv", "recorded"),
    [
        (["true", "\0" * _MANY_BYTES], ["true", "\0" * 680, "... and 1046873 bytes more"]),
        (["\N{SNOWMAN}" * 9000], ["\N{SNOWMAN}" * 682, "... and 24955 bytes more"]),
        (["true", *[""] * 200_000], ["true", *[""] * 1022, "... and 198978 bytes more"]),
        (
            ["true", "x" * 60_000, "\x1b" * 60_000],
            ["true", "x" * 4084, "... and 115918 bytes more"],
        ),
        (["true", "x" * 4084], ["true", "x" * 4084]),
        (["true", "x" * 4085], ["true", "x" * 4084, "... and 2 bytes more"]),
        (["true", "x" * 4084, ""], ["true", "x" * 4084, "... and 1 bytes more"]),
    ],
    ids=["one", "command", "many", "executed", "just-all", "a-byte-more", "an-argument-more"],
)
def test_of_a_long_argv_the_audit_log_has_the_beginning_and_a_digest(
    serve: Serve, connect: Connect, tmp_path: Path, argv: list[str], recorded: list[str]
) -> None:
    """The log also says how many bytes are missing; sha256sum of what was executed confirms it."""
    client = connect("user", serve(audit_log=tmp_path / "audit.log").address)
    command, *args = argv
    call_rpc(client, "StartJob", command=command, args=args)
    (line,) = (tmp_path / "audit.log").read_text().splitlines()
    record = json.loads(line)
    assert record["argv"] == recorded
    digest = hashlib.sha256("".join(f"{each}\0" for each in argv).encode()).hexdigest()
    assert record.get("argv_sha256") == (None if recorded == argv else digest)
    assert len(line) < 4096 + 2 * 1024


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("true", ["x" * 130 * 1024]),
        ("true", ["x" * 1024] * 5 * 1024),
        ("x" * 130 * 1024, []),
    ],
    ids=["one", "many", "command"],
)
def test_command_that_no_ceiling_keeps_out_may_be_too_long_for_the_kernel(
    serve: Serve, connect: Connect, tmp_path: Path, command: str, args: list[str]
) -> None:
    """The kernel's refusal is an invalid argument too, with a short message and no job."""
    path = tmp_path / "limits.toml"
    path.write_text("[requests]\nsize = '8M'\nargs = 10000\narg_length = '1M'\n")
    client = connect("user", serve(config=path).address)
    code, details = call_rpc(client, "StartJob", command=command, args=args)
    assert code == "INVALID_ARGUMENT"
    assert details.startswith(f"cannot execute {command[:20]!r}"[:-1])
    assert "the limit is 131072" in details
    assert len(details) < 1000
    assert client.list() == []


@pytest.mark.parametrize("name", _WITH_JOB)
@pytest.mark.parametrize(
    "job_id",
    [
        *("", " ", "x", f" {ABSENT}", f"{ABSENT} ", f"{ABSENT}\n", f"{ABSENT}0"),
        *(f"{{{ABSENT}}}", f"urn:uuid:{ABSENT}", ABSENT.replace("-", ""), "a" * 100_000),
        *("ü" * 36, ABSENT.replace("0", "\u0660"), "../../etc/passwd", "\0", "\x1b[31m"),
    ],
    ids=lambda text: ascii(text)[:44],
)
def test_text_that_is_no_job_id_is_an_invalid_argument(
    connect: Connect, name: str, job_id: str
) -> None:
    """The error is not that of an unknown job. The message is short and on one line."""
    code, details = call_rpc(connect(), name, job_id=job_id)
    assert code == "INVALID_ARGUMENT"
    assert details.startswith("not a job ID: ")
    assert len(details) < 1000
    assert details.isprintable()


@pytest.mark.parametrize("name", _WITH_JOB)
def test_job_id_may_be_in_upper_case(connect: Connect, own: str, name: str) -> None:
    """Some tools print UUIDs in upper case."""
    code, details = call_rpc(connect(), name, job_id=own.upper())
    if name == "SignalJob":  # of this job ID, the signal is what is wrong
        assert details.startswith("no such signal")
    elif name == "WriteInput":  # the job is found, and takes no input
        assert code == "FAILED_PRECONDITION"
    else:
        assert (code, details) == ("OK", "")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (name, data)
        for name, method in _METHODS.items()
        for data in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xc3\x28")
        # A message whose first field is no text skips the bad text like an unknown field.
        if name not in {"Logout", "Refresh", "ListJobs"} or data[-1:] != b"\x28"
    ],
)
def test_malformed_request_is_an_invalid_argument(connect: Connect, name: str, data: bytes) -> None:
    """The requests: bytes that are not a message, and a text that is not UTF-8."""
    assert call_rpc(connect(), name, data=data) == (
        "INVALID_ARGUMENT",
        "the request is not a message of the right type",
    )


@pytest.mark.parametrize("offset", [5, 2**63, 2**64 - 1])
def test_offset_past_the_end_is_out_of_range(connect: Connect, offset: int) -> None:
    """The error comes at once for a finished job, and at the end of a running one.

    An offset at the end of the output is in range.
    """
    client = connect()
    job_id = run_job(client, "printf", ["four"])
    code, details = call_rpc(client, "StreamOutput", job_id=job_id, offset=offset)
    assert (code, f"offset {offset} " in details) == ("OUT_OF_RANGE", True)
    assert list(client.stream(job_id, 4)) == []
    job_id = client.start("sh", ["-c", "printf four; exec sleep infinity"])
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(call_rpc, client, "StreamOutput", job_id=job_id, offset=offset)
        assert next(client.stream(job_id)) == b"four"
        client.stop(job_id)
        assert ahead.result(GUARD_S)[0] == "OUT_OF_RANGE"


def test_unknown_method_is_unimplemented(connect: Connect) -> None:
    """A call without a token gets UNIMPLEMENTED too."""
    rpc: Any = connect()._channel.unary_unary("/jobworker.v1.WorkerService/Nothing")
    with pytest.raises(grpc.RpcError) as caught:
        rpc(b"", timeout=GUARD_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["GetJobStatus", "StreamOutput"])
@pytest.mark.parametrize(
    ("error", "code", "in_log"),
    [
        (worker.ResourceError("no room"), "RESOURCE_EXHAUSTED", True),
        (QuotaError("no more of it"), "RESOURCE_EXHAUSTED", False),
        (worker.StopTimeoutError(ABSENT, 10), "DEADLINE_EXCEEDED", False),
        (worker.StartTimeoutError("true", 10), "DEADLINE_EXCEEDED", False),
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
    """Unary calls and streams share one table. Only the log has details of internal errors."""

    def fail(*_: object, **__: object) -> None:
        raise error

    client = connect("user", serve().address)
    job_id = run_job(client)
    monkeypatch.setattr(Worker, {"GetJobStatus": "status", "StreamOutput": "stream"}[name], fail)
    answer = call_rpc(client, name, job_id=job_id)
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


def test_calls_that_are_refused_for_overload_are_on_record(
    serve: Serve, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line has the number of refusals of one method, and the client's certificate."""
    monkeypatch.setattr("records._TOGETHER_S", GUARD_S)  # the server records them when it stops
    entered, go_on, status = threading.Event(), threading.Event(), Worker.status

    def slow(self: Worker, job_id: str, *, owner: str | None = None) -> Job:
        entered.set()
        assert go_on.wait(GUARD_S)
        return status(self, job_id, owner=owner)

    server = serve(audit_log=tmp_path / "audit.log")
    client = connect("user", server.address)
    job_id = run_job(client)
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(Worker, "status", slow)
        held = pool.submit(client.status, job_id)
        assert entered.wait(GUARD_S)
        monkeypatch.setattr("calls._CALLS_OF_ONE", 1)
        methods = ["GetJobStatus"] * 3 + ["RemoveJob"]
        answers = [call_rpc(client, method, job_id=job_id) for method in methods]
        go_on.set()
        assert held.result(GUARD_S).job_id == job_id
    server.stop()
    lines = (tmp_path / "audit.log").read_text().splitlines()
    served, *refused = sorted(map(json.loads, lines[-3:]), key=lambda record: record["outcome"])
    assert served["rpc"] == "/jobworker.v1.WorkerService/GetJobStatus"
    assert [(each["rpc"].rpartition("/")[2], each["calls"]) for each in refused] == [
        ("GetJobStatus", 3),
        ("RemoveJob", 1),
    ]
    for record in refused:
        assert (record["outcome"], record["reason"]) == answers[0]
        assert "overloaded" in record["reason"]
        assert record["certificate"] == served["certificate"]
        assert record["peer"] == served["peer"]


def test_job_of_a_dead_fork_server_is_lost_and_no_other_can_start(
    serve: Serve, connect: Connect
) -> None:
    """The job's end reason is LOST. The error of the next start says to restart the server."""
    server = serve()
    client = connect("user", server.address)
    job_id = client.start(*FOREVER)
    kill_fork_server(_worker_of(server))
    list(client.stream(job_id))
    job = client.status(job_id)
    assert (job.status, job.end_reason) == (
        worker_pb.JOB_STATUS_FINISHED,
        worker_pb.END_REASON_LOST,
    )
    code, details = call_rpc(client, "StartJob", command="true")
    assert (code, "restart the server" in details) == ("UNAVAILABLE", True)


# --- jobs -------------------------------------------------------------------------------


def test_status_tells_every_field_of_a_running_and_of_a_finished_job(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """Fields without a value are absent: exit code, signal and end of a running job, and limits."""
    client = connect("user", serve().address)
    make_fifo(tmp_path / "go")
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
        status=worker_pb.JOB_STATUS_RUNNING,
        started_at=running.started_at,
        output_bytes=2,
        subscribers=["user"],
        limits=worker_pb.Limits(),
        working_directory=running.working_directory,
    )
    assert running == expected
    assert os.path.isabs(running.working_directory)
    (tmp_path / "go").write_text("on\n")
    assert list(chunks) == []
    finished = client.status(job_id)
    assert started <= finished.ended_at.ToDatetime(UTC) <= datetime.now(UTC)
    expected.MergeFrom(
        worker_pb.Job(
            status=worker_pb.JOB_STATUS_FINISHED,
            end_reason=worker_pb.END_REASON_EXITED,
            exit_code=7,
            ended_at=finished.ended_at,
            usage=worker_pb.Usage(
                source=worker_pb.USAGE_SOURCE_RUSAGE,
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
    """The exit code 0 is not absent. A job that kills itself is SIGNALLED, not stopped."""
    client = connect()
    job = client.status(run_job(client))
    assert (job.HasField("exit_code"), job.exit_code, job.HasField("signal")) == (True, 0, False)
    job = client.status(run_job(client, "sh", ["-c", "kill -KILL $$"]))
    assert (job.status, job.end_reason) == (
        worker_pb.JOB_STATUS_FINISHED,
        worker_pb.END_REASON_SIGNALLED,
    )
    assert (job.HasField("exit_code"), job.signal) == (False, signal.SIGKILL)


@pytest.mark.parametrize(
    ("stopper", "reason"),
    [
        ("user", worker_pb.END_REASON_STOPPED_BY_OWNER),
        ("admin", worker_pb.END_REASON_STOPPED_BY_ADMIN),
    ],
)
def test_stop_tells_who_stopped_and_is_idempotent(
    connect: Connect, stopper: str, reason: worker_pb.EndReason
) -> None:
    """StopJob returns the stopped job. A second stop, by anybody, changes nothing."""
    job_id = connect("user").start(*FOREVER)
    stopped = connect(stopper).stop(job_id)
    assert (stopped.status, stopped.end_reason) == (worker_pb.JOB_STATUS_STOPPED, reason)
    assert (stopped.signal, stopped.HasField("exit_code")) == (signal.SIGKILL, False)
    assert stopped.HasField("ended_at")
    assert connect("user").stop(job_id) == connect("admin").stop(job_id) == stopped
    assert connect("user").status(job_id) == stopped


def test_admin_stopping_their_own_job_is_its_owner(connect: Connect) -> None:
    """The reason depends on whether the caller owns the job, not on the caller's role."""
    admin = connect("admin")
    assert admin.stop(admin.start(*FOREVER)).end_reason == worker_pb.END_REASON_STOPPED_BY_OWNER


def _polite(client: Client, timeout: float | None = None) -> str:
    """Start a job that says bye at SIGTERM and exits with 3; return its ID."""
    # Waits without a child, because a child that is being forked would miss the signal; and never
    # for long, because bash may take a signal right before it begins to wait.
    idle = "exec 3<> <(:); echo ready; while :; do read -t 1 -u 3 x; done"
    script = f"trap 'echo bye; exit 3' TERM; {idle}"
    job_id = client.start("bash", ["-c", script], timeout=timeout, grace=GUARD_S)
    follow(client, job_id).close()
    return job_id


def test_stop_with_a_grace_lets_the_job_end(connect: Connect) -> None:
    """The job is STOPPED by its owner, with its own exit code and its last output."""
    client = connect()
    stopped = client.stop(_polite(client), grace=GUARD_S)
    assert stopped.status == worker_pb.JOB_STATUS_STOPPED
    assert stopped.end_reason == worker_pb.END_REASON_STOPPED_BY_OWNER
    assert stopped.exit_code == 3
    assert b"".join(client.stream(stopped.job_id)) == b"ready\nbye\n"


def test_stops_that_wait_for_a_grace_hold_up_no_other_call(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a start nor the stop without grace, although a caller has so few threads."""
    monkeypatch.setattr("calls._THREADS_OF_ONE", 2)
    client = connect(address=serve().address)
    script = "trap 'echo told' TERM; exec 3<> <(:); echo ready; while :; do read -t 1 -u 3 x; done"
    stops = []
    for _ in range(2):
        job_id = client.start("bash", ["-c", script])
        chunks = follow(client, job_id)
        request = worker_pb.StopJobRequest(job_id=job_id, grace=Duration(seconds=600))
        stop = client._worker.StopJob.future(request, metadata=client._link.metadata())
        stops.append((job_id, stop))
        assert next(chunks) == b"told\n"
        chunks.close()
    client.start("true")
    for job_id, stop in stops:
        assert client.stop(job_id).status == worker_pb.JOB_STATUS_STOPPED
        assert stop.result(GUARD_S).job.job_id == job_id


def test_timeout_stops_a_job_with_its_grace(connect: Connect) -> None:
    """The status tells the timeout. A stream says how the job ended."""
    client = connect()
    job_id = _polite(client, 1.5)
    assert client.status(job_id).timeout.ToTimedelta().total_seconds() == 1.5
    chunks = client.stream(job_id)
    assert b"".join(chunks) == b"ready\nbye\n"
    assert (end := chunks.end) is not None
    assert (end.status, end.end_reason, end.exit_code) == ("STOPPED", "TIMED_OUT", 3)


def test_what_outlives_the_command_may_linger_and_is_counted(connect: Connect) -> None:
    """The count is of processes that were killed because they held the output for longer."""
    client = connect()
    script = "exec > >(sleep 0.2; cat); echo RESULT; exit 3"
    job_id = run_job(client, "bash", ["-c", script], linger=GUARD_S)
    assert b"".join(client.stream(job_id)) == b"RESULT\n"
    assert client.status(job_id).killed_after_exit == 0
    job_id = run_job(client, "sh", ["-c", "sleep infinity & exit 3"], linger=0.2)
    ended = client.status(job_id)
    assert (ended.exit_code, ended.killed_after_exit) == (3, 1)


@pytest.mark.parametrize(
    ("name", "seconds", "nanos"),
    [
        (name, seconds, nanos)
        for name in ("timeout", "grace", "linger", "stop")
        for seconds, nanos in (
            *((-1, 0), (0, -1), (1, 1_000_000_000), (315_576_000_001, 0), (2**63 - 1, 0)),
            *([(601, 0)] if name != "timeout" else []),  # a timeout may be long
        )
    ],
)
def test_times_that_make_no_sense_are_refused(
    connect: Connect, name: str, seconds: int, nanos: int
) -> None:
    """The error names the field and its range, and nothing is started or stopped.

    Beyond 10,000 years there is no `Duration`: an admin could not list the jobs any more.
    """
    duration, client = Duration(seconds=seconds, nanos=nanos), connect()
    job_id = client.start(*FOREVER)
    fields: dict[str, Any] = {"command": "true", name: duration}
    if name == "stop":
        name, fields = "grace", {"job_id": job_id, "grace": duration}
    before = [job.job_id for job in client.list()]
    code, details = call_rpc(client, "StopJob" if "job_id" in fields else "StartJob", **fields)
    assert code == "INVALID_ARGUMENT"
    assert re.match(f"{name}.* must be 0", details)
    assert [job.job_id for job in client.list()] == before
    assert client.status(job_id).status == worker_pb.JOB_STATUS_RUNNING


@pytest.mark.parametrize("text", ["KILL", "SIGKILL", "sigkill", "9", signal.SIGKILL])
def test_signal_has_a_name_or_a_number(connect: Connect, text: str | int) -> None:
    """The job is then SIGNALLED, and gets no other signal."""
    client = connect()
    job_id = client.start(*FOREVER)
    chunks = follow(client, job_id)
    client.signal(job_id, text)
    assert list(chunks) == []
    assert (end := chunks.end) is not None
    assert (end.end_reason, end.signal) == ("SIGNALLED", signal.SIGKILL)
    with pytest.raises(ClientError, match="it has ended") as caught:
        client.signal(job_id, text)
    assert caught.value.code == "FAILED_PRECONDITION"


@pytest.mark.parametrize("text", ["", "0", "-9", "65", "009", "\u0669", "NOSUCH"])
def test_what_is_no_signal_is_refused(connect: Connect, text: str) -> None:
    """The error names what a signal looks like. The job gets nothing."""
    client = connect()
    job_id = client.start(*FOREVER)
    with pytest.raises(ClientError, match=r"no such signal: .* like TERM or SIGTERM") as caught:
        client.signal(job_id, text, everything=True)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert client.status(job_id).status == worker_pb.JOB_STATUS_RUNNING


def test_stop_of_a_finished_job_keeps_its_end(connect: Connect) -> None:
    """If a job has ended by itself, StopJob returns that end and does not change it."""
    client = connect()
    job_id = run_job(client, "sh", ["-c", "exit 3"])
    finished = client.status(job_id)
    assert (finished.status, finished.exit_code) == (worker_pb.JOB_STATUS_FINISHED, 3)
    assert client.stop(job_id) == connect("admin").stop(job_id) == finished


def test_stop_from_many_clients_right_after_the_start_succeeds_for_all(connect: Connect) -> None:
    """All clients get the same end."""
    client = connect()
    job_id = client.start("sleep", ["infinity"])
    with ThreadPoolExecutor(20) as pool:
        ends = list(pool.map(lambda _: client.stop(job_id).SerializeToString(), range(20)))
    assert len(set(ends)) == 1


# --- limits -----------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Limits]:
    """The limits of each job that a server in this process starts, in order."""
    given: list[Limits] = []
    start = Worker.start

    def spy(jobs: Worker, *args: Any, limits: Limits, **options: Any) -> str:
        given.append(limits)
        return start(jobs, *args, limits=limits, **options)

    monkeypatch.setattr(Worker, "start", spy)
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
    """Jobs ask for each field alone, for all fields together, and for none."""
    assert set(_LIMITS) == {field.name for field in worker_pb.Limits.DESCRIPTOR.fields}
    client = connect("user", serve().address)
    requests: list[dict[str, Any]] = [{}, _LIMITS, *({k: v} for k, v in _LIMITS.items())]
    for limits in requests:
        run_job(client, **limits)
    default = Config().limits({})
    assert given == [replace(default, **limits) for limits in requests]


def test_configuration_sets_default_and_ceiling(
    serve: Serve, connect: Connect, given: list[Limits], tmp_path: Path
) -> None:
    """A limit that a job does not ask for is the default. A job may ask up to the ceiling."""
    path = tmp_path / "limits.toml"
    path.write_text("[defaults]\npids = 10\nmemory = '100M'\n[ceilings]\npids = 20\n")
    client = connect("user", serve(config=path).address)
    for pids in (None, 1, 20):
        run_job(client, pids=pids)
    assert [(limits.pids, limits.memory_bytes) for limits in given] == [
        (10, 100 << 20),
        (1, 100 << 20),
        (20, 100 << 20),
    ]
    assert call_rpc(client, "StartJob", command="true", limits=worker_pb.Limits(pids=21)) == (
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
    """The message names the field and both numbers. The worker keeps no job."""
    client = connect("user", serve().address)
    code, told = call_rpc(client, "StartJob", command="true", limits=worker_pb.Limits(**limits))
    assert code == "INVALID_ARGUMENT"
    assert re.match(f"{list(limits)[-1]} .*{text}", told)
    assert list(client.list()) == []


def _page(client: Client, **fields: Any) -> worker_pb.ListJobsResponse:
    page: worker_pb.ListJobsResponse = client._worker.ListJobs(
        worker_pb.ListJobsRequest(**fields), metadata=client._link.metadata(), timeout=GUARD_S
    )
    return page


def _pages(client: Client, **fields: Any) -> Iterator[worker_pb.ListJobsResponse]:
    """Read a list to its end."""
    page = _page(client, **fields)
    yield page
    while page.next_page_token:
        page = _page(client, page_token=page.next_page_token, **fields)
        yield page


def test_every_client_can_receive_a_page_of_a_list(serve: Serve, connect: Connect) -> None:
    """40 jobs with 120 kB of arguments each are more than other languages' clients receive."""
    client = connect(address=serve().address)
    job_ids = [client.start("true", ["x" * 60_000] * 2) for _ in range(40)]
    pages = list(_pages(client))
    assert max(page.ByteSize() for page in pages) < (1 << 20) + 1000
    assert len(pages) <= 6
    assert [job.job_id for page in pages for job in page.jobs] == job_ids
    assert [job.job_id for job in client.list()] == job_ids


def test_page_of_a_list_has_at_most_100_jobs_and_as_many_as_asked_for(
    serve: Serve, connect: Connect
) -> None:
    """Also if there are others' jobs between. The last page has no token."""
    server = serve()
    jobs = _worker_of(server)
    job_ids = []
    for _ in range(15):
        job_ids += [jobs.start("true", owner="user") for _ in range(7)]
        jobs.start("true", owner="other")
    client = connect(address=server.address)
    for asked, given in {0: [100, 5], 1000: [100, 5], 99: [99, 6], 105: [100, 5]}.items():
        pages = list(_pages(client, page_size=asked))
        assert [len(page.jobs) for page in pages] == given
        assert [job.job_id for page in pages for job in page.jobs] == job_ids
    admins = list(_pages(connect("admin", server.address)))
    assert [len(page.jobs) for page in admins] == [100, 20]


def test_list_that_changes_while_it_is_read_has_every_job_that_stays(
    serve: Serve, connect: Connect
) -> None:
    """The job before which the next page begins is removed, others are, and one is started."""
    client = connect(address=serve().address)
    job_ids = [run_job(client) for _ in range(9)]
    pages = _pages(client, page_size=3)
    listed = [job.job_id for job in next(pages).jobs]
    for gone in (job_ids[0], job_ids[2], job_ids[3]):
        client.remove(gone)
    job_ids.append(run_job(client))
    listed += [job.job_id for page in pages for job in page.jobs]
    assert listed == job_ids[:3] + job_ids[4:]


def test_page_token_shows_no_more_than_the_callers_own_jobs(serve: Serve, connect: Connect) -> None:
    """Any token is valid for anybody, and the list has still only the caller's jobs."""
    address = serve().address
    admin, user = connect("admin", address), connect("user", address)
    first = run_job(admin)
    own = run_job(user)
    run_job(admin)
    token = _page(admin, page_size=1).next_page_token
    assert [job.job_id for job in _page(user, page_token=token).jobs] == [own]
    assert first not in {job.job_id for job in user.list()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"page_size": -1}, "page_size -1 is negative; 0 means 100"),
        ({"page_token": "x"}, "not a page token: 'x'; send the next_page_token of the page before"),
        ({"page_token": "-1"}, "not a page token"),
        ({"page_token": "\u0661"}, "not a page token"),
        ({"page_token": "f" * 10_000}, "not a page token"),
        ({"page_token": "8000000000000000"}, "not a page token"),  # no number of SQLite's
    ],
    ids=lambda value: str(value)[:30],
)
def test_page_that_cannot_be_is_an_invalid_argument(
    connect: Connect, fields: dict[str, Any], message: str
) -> None:
    """The message shows little of a long text."""
    code, details = call_rpc(connect(), "ListJobs", **fields)
    assert (code, details.startswith(message), len(details) < 200) == (
        "INVALID_ARGUMENT",
        True,
        True,
    )


def test_arguments_of_running_jobs_of_a_user_are_bounded(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """At the ceiling a start is refused, until a job ends."""
    config = tmp_path / "config.toml"
    config.write_text('[per_user]\nrunning_argv = "150K"\n')
    address = serve(config=config).address
    client = connect(address=address)
    long = ("sh", ["-c", "exec sleep infinity", "x" * 60_000])
    job_ids = [client.start(*long), client.start(*long)]
    with pytest.raises(ClientError, match=r"per_user\.running_argv") as caught:
        client.start(*long)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    connect("admin", address).start(*long)
    client.stop(job_ids[0])
    client.start(*long)


def test_list_tells_the_usage_of_ended_jobs(connect: Connect) -> None:
    """The list has no usage of running jobs; `GetJobStatus` has it."""
    client = connect()
    ended, running = run_job(client), client.start(*FOREVER)
    jobs = {job.job_id: job for job in client.list()}
    assert jobs[ended].usage == client.status(ended).usage
    assert jobs[ended].HasField("usage")
    assert not jobs[running].HasField("usage")
    client.stop(running)


# --- streams ----------------------------------------------------------------------------


def _collect(client: Client, job_id: str, offset: int = 0) -> bytes:
    """Read a stream to its end; check that its messages are contiguous."""
    request = worker_pb.StreamOutputRequest(job_id=job_id, offset=offset)
    data = bytearray()
    for response in client._worker.StreamOutput(request, metadata=client._link.metadata()):
        assert response.offset == offset + len(data)
        assert 0 < len(response.data) <= 256 * 1024
        data += response.data
    return bytes(data)


def test_every_stream_gets_the_same_bytes_whenever_and_wherever_it_begins(
    connect: Connect, public: Path
) -> None:
    """Ten streams follow the running job from several offsets; two read the finished job."""
    client, size = connect(), 3_000_000
    go = make_fifo(public / "go")
    directory = public / "written to"
    directory.mkdir()
    directory.chmod(0o777)
    script = (
        'cd "$0"; head -c "$1" /dev/urandom >copy; '
        "head -c 100000 copy; read x <../go; tail -c +100001 copy"
    )
    job_id = client.start("sh", ["-c", script, str(directory), str(size)])
    offsets = [0, 0, 0, 0, 0, 1, 99_999, 100_000, 100_001, size]
    with ThreadPoolExecutor(len(offsets)) as pool:
        streams = [pool.submit(_collect, client, job_id, offset) for offset in offsets]
        go.write_text("on\n")
        data = [stream.result(GUARD_S) for stream in streams]
    copy = (directory / "copy").read_bytes()
    assert len(copy) == size
    assert all(d == copy[offset:] for d, offset in zip(data, offsets, strict=True))
    assert _collect(client, job_id) == copy
    assert _collect(client, job_id, size - 1) == copy[-1:]
    assert client.status(job_id).output_bytes == size


@pytest.mark.parametrize("offset", [0, 1, 127, 128, 2**40, 2**64 - 1])
@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 256 * 1024])
def test_message_of_a_stream_is_what_protobuf_would_send(size: int, offset: int) -> None:
    """The bytes are equal, so no client in any language sees a difference."""
    data = os.urandom(size)
    message = worker_pb.StreamOutputResponse(data=data, offset=offset)
    assert service._serialized(data, offset, None) == message.SerializeToString()
    moment = datetime(2026, 11, 28, 10, 20, 30, 123_456, UTC)
    message.written_at.FromDatetime(moment)
    assert service._serialized(data, offset, moment) == message.SerializeToString()


def test_output_is_delivered_while_the_job_is_blocked_in_a_line(
    connect: Connect, public: Path
) -> None:
    """Bytes arrive as soon as the job writes them, although the line is not complete."""
    client, go = connect(), make_fifo(public / "go")
    job_id = client.start("sh", ["-c", 'printf half; read x <"$0"; echo done', str(go)])
    chunks = client.stream(job_id)
    assert next(chunks) == b"half"
    go.write_text("on\n")
    assert b"".join(chunks) == b"done\n"


def test_stream_ends_on_stop_when_the_status_is_already_terminal(connect: Connect) -> None:
    """After the end of a stream, the job's status is never RUNNING."""
    client = connect()
    job_id = client.start(*FOREVER)
    with ThreadPoolExecutor(1) as pool:
        chunks = client.stream(job_id)
        assert next(chunks) == b"ready\n"
        stop = pool.submit(client.stop, job_id)
        assert list(chunks) == []
        assert client.status(job_id).status == worker_pb.JOB_STATUS_STOPPED
        stop.result(GUARD_S)


def _read(client: Client, job_id: str, offset: int = 0) -> tuple[str, dict[str, str]]:
    """Read a stream to its end; return its status code and its trailing metadata."""
    request = worker_pb.StreamOutputRequest(job_id=job_id, offset=offset)
    call = client._worker.StreamOutput(request, metadata=client._link.metadata(), timeout=GUARD_S)
    with contextlib.suppress(grpc.RpcError):
        list(call)
    metadata = {item.key: item.value for item in call.trailing_metadata()}
    return call.code().name, metadata


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("printf 12345", {"job-end-reason": "EXITED", "job-exit-code": "0"}),
        ("printf 12345; exit 255", {"job-end-reason": "EXITED", "job-exit-code": "255"}),
        ("printf 12345; kill -SEGV $$", {"job-end-reason": "SIGNALLED", "job-signal": "11"}),
    ],
)
def test_stream_tells_how_its_job_ended(connect: Connect, script: str, end: dict[str, str]) -> None:
    """Status, reason, and exit code or signal are in the trailing metadata, at any time."""
    job_id = connect().start("sh", ["-c", script])
    expected = {"job-status": "FINISHED", "next-offset": "5"} | end
    assert _read(connect(), job_id) == ("OK", expected)
    assert _read(connect(), job_id, offset=5) == ("OK", expected)


@pytest.mark.parametrize(
    ("name", "reason"), [("user", "STOPPED_BY_OWNER"), ("admin", "STOPPED_BY_ADMIN")]
)
def test_stream_of_a_stopped_job_says_who_stopped_it(
    connect: Connect, name: str, reason: str
) -> None:
    """Also a stream that was waiting for output, and also once the job is removed."""
    job_id = connect().start(*FOREVER)
    stream = follow(connect(), job_id)
    connect(name).stop(job_id)
    connect(name).remove(job_id)
    assert list(stream) == []
    assert vars(stream.end) == {
        "status": "STOPPED",
        "end_reason": reason,
        "exit_code": None,
        "signal": 9,
    }


def test_stream_that_ends_with_an_error_of_its_job_tells_the_end_too(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """Output that was not kept, and an offset that the output does not reach."""
    config = tmp_path / "config.toml"
    config.write_text('[per_job]\nkept_output = "4"\n')
    client = connect(address=serve(config=config).address)
    end = {"job-status": "FINISHED", "job-end-reason": "EXITED", "job-exit-code": "0"}
    job_id = client.start("echo", ["12345"])
    assert _read(client, job_id) == ("DATA_LOSS", end | {"next-offset": "6"})
    fifo = make_fifo(tmp_path / "fifo")
    job_id = client.start("sh", ["-c", f"read _ <{fifo}; exec printf 12"])
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(_read, client, job_id, 9)
        fifo.write_text("go on\n")
        assert reading.result(GUARD_S) == ("OUT_OF_RANGE", end | {"next-offset": "9"})
    # Now the server refuses the stream at once.
    assert _read(client, job_id, 9) == ("OUT_OF_RANGE", end | {"next-offset": "9"})


def test_stream_has_a_message_in_the_place_of_what_was_not_kept(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """The status tells the same gap. A stream from behind the gap ends without an error."""
    config = tmp_path / "config.toml"
    config.write_text('[per_job]\nkept_output = "4"\n')
    client = connect(address=serve(config=config).address)
    job_id = client.start("printf", ["123456789"])
    with contextlib.suppress(ClientError):
        list(client.stream(job_id))  # until the job has ended
    job = client.status(job_id)
    gap = worker_pb.OutputGap(offset=2, length=5)
    assert (job.output_gap, job.output_bytes, job.output_lost_bytes) == (gap, 4, 5)

    def read(offset: int) -> tuple[list[worker_pb.StreamOutputResponse], str]:
        request = worker_pb.StreamOutputRequest(job_id=job_id, offset=offset)
        metadata = client._link.metadata()
        call = client._worker.StreamOutput(request, metadata=metadata, timeout=GUARD_S)
        messages = []
        with contextlib.suppress(grpc.RpcError):
            messages.extend(call)
        return messages, call.code().name

    head = worker_pb.StreamOutputResponse(data=b"12", offset=0)
    missing = worker_pb.StreamOutputResponse(offset=2, gap=gap)
    tail = worker_pb.StreamOutputResponse(data=b"89", offset=7)
    assert read(0) == ([head, missing, tail], "DATA_LOSS")
    assert read(7) == ([tail], "OK")
    missing.offset = missing.gap.offset = 6
    missing.gap.length = 1
    assert read(6) == ([missing, tail], "DATA_LOSS")


def test_stream_ends_with_unavailable_at_shutdown(serve: Serve, connect: Connect) -> None:
    """It tells that the shutdown ended the job, and the offset to continue from."""
    server = serve()
    client = connect(address=server.address)
    job_id = client.start(*FOREVER)
    request = worker_pb.StreamOutputRequest(job_id=job_id)
    call = client._worker.StreamOutput(request, metadata=client._link.metadata(), timeout=GUARD_S)
    assert next(call).data == b"ready\n"
    server.stop()
    with pytest.raises(grpc.RpcError):
        next(call)
    metadata = {item.key: item.value for item in call.trailing_metadata()}
    assert (call.code().name, call.details()) == ("UNAVAILABLE", "the server is shutting down")
    assert metadata == {
        "job-status": "STOPPED",
        "job-end-reason": "SERVER_SHUTDOWN",
        "job-signal": "15",
        "next-offset": "6",
    }


def test_stream_of_a_lost_job_says_so(serve: Serve, connect: Connect) -> None:
    """Nobody knows the exit code."""
    server = serve()
    client = connect(address=server.address)
    stream = follow(client, client.start(*FOREVER))
    kill_fork_server(_worker_of(server))
    assert list(stream) == []
    assert stream.end
    assert (stream.end.end_reason, stream.end.exit_code, stream.end.signal) == ("LOST", None, None)


def test_grandchild_that_holds_the_output_does_not_keep_the_stream_open(connect: Connect) -> None:
    """When the command exits, the worker kills the grandchild and the stream ends."""
    client = connect()
    job_id = client.start("sh", ["-c", "sleep infinity & echo bye"])
    assert b"".join(client.stream(job_id)) == b"bye\n"
    assert client.status(job_id).exit_code == 0


class _Slots:
    """Counts the streams that have given their slot back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        freed = self._freed = threading.Semaphore(0)
        take = Quotas.stream

        def stream(quotas: Quotas, user: str) -> Callable[[], None]:
            release = take(quotas, user)

            def free() -> None:
                assert threading.current_thread().name.startswith("call")
                release()
                freed.release()

            return free

        monkeypatch.setattr(Quotas, "stream", stream)

    def await_freed(self) -> None:
        assert self._freed.acquire(timeout=GUARD_S)


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> _Slots:
    return _Slots(monkeypatch)


def test_silent_followers_in_every_slot_hold_up_nothing_but_streams(
    serve: Serve, connect: Connect, slots: _Slots
) -> None:
    """All other calls are served, and one more stream is refused.

    When a client closes its stream, the slot is free again.
    """
    address = serve(max_streams=3).address
    client = connect("user", address)
    job_id = client.start(*FOREVER)
    followers = [follow(client, job_id) for _ in range(3)]
    assert client.status(job_id).status == worker_pb.JOB_STATUS_RUNNING
    assert connect("", address).login("user", "user")
    assert client.stop(client.start(*FOREVER)).status == worker_pb.JOB_STATUS_STOPPED
    assert len(client.list()) == 2
    assert call_rpc(client, "StreamOutput", job_id=job_id) == (
        "RESOURCE_EXHAUSTED",
        "all 3 output streams are in use (in_all.streams); try again later",
    )
    # The job writes nothing: the server must notice the closed stream without output.
    followers[1].close()
    slots.await_freed()
    followers[1] = follow(client, job_id)
    client.stop(job_id)
    assert [list(follower) for follower in followers] == [[], [], []]


def test_starts_that_the_kernel_holds_up_hold_up_nobody_elses(
    serve: Serve, connect: Connect, leased: tuple[Path, Callable[[], object]]
) -> None:
    """While twenty starts of one user wait for a file, another user's starts are served."""
    path, release = leased
    address = serve().address
    client, other = connect("user", address), connect("admin", address)
    with ThreadPoolExecutor(20) as pool:
        starts = [pool.submit(client.start, str(path)) for _ in range(20)]
        try:
            for _ in range(5):
                assert other.status(run_job(other)).exit_code == 0
            assert not any(start.done() for start in starts)
        finally:
            release()
        for start in starts:
            assert client.stop(start.result(GUARD_S)).status == worker_pb.JOB_STATUS_STOPPED


def test_file_that_takes_long_to_go_holds_up_no_other_call(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal of a gigabyte of output takes a tenth of a second, or longer on a slow disk."""
    address = serve().address
    client, other = connect("user", address), connect("admin", address)
    job_id, others = run_job(client), run_job(other)
    begun, go_on, real_unlink = threading.Event(), threading.Event(), os.unlink

    def unlink(*args: Any, **options: Any) -> None:
        begun.set()
        assert go_on.wait(GUARD_S)
        real_unlink(*args, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    with ThreadPoolExecutor(1) as pool:
        removal = pool.submit(client.remove, job_id)
        try:
            assert begun.wait(GUARD_S)
            for _ in range(5):
                assert other.status(others).exit_code == 0
            assert not removal.done()
        finally:
            go_on.set()
        removal.result(GUARD_S)


def test_killed_client_gives_its_slot_and_its_thread_back(
    serve: Serve, connect: Connect, certs: Path, tokens: dict[str, str], slots: _Slots
) -> None:
    """If the client is killed during a silent stream, the server notices without output."""
    address = serve(max_streams=1).address
    client = connect("user", address)
    job_id = client.start(*FOREVER)
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
    follow(client, job_id)


def test_failed_streams_use_up_no_slots(serve: Serve, connect: Connect, slots: _Slots) -> None:
    """Refused streams and ended streams give their slots back."""
    client = connect("user", serve(max_streams=1).address)
    job_id = run_job(client)
    slots.await_freed()
    for offset in (1, 0) * 3:
        code, _ = call_rpc(client, "StreamOutput", job_id=job_id, offset=offset)
        assert code == ("OUT_OF_RANGE" if offset else "OK")
        slots.await_freed()


def test_stream_that_could_not_be_recorded_uses_up_no_slot(
    serve: Serve, connect: Connect, slots: _Slots
) -> None:
    """With a required audit log the stream is refused. The slot and the subscription are freed."""
    server = serve(max_streams=1, audit_required=True)
    client = connect("user", server.address)
    job_id = client.start(*FOREVER)
    server._audit.close()
    for _ in range(2):
        assert call_rpc(client, "StreamOutput", job_id=job_id) == _NO_RECORD
        slots.await_freed()
    assert _worker_of(server).status(job_id).subscribers == ()


def test_subscribers_are_shown_while_they_stream_and_not_after(
    serve: Serve, connect: Connect, slots: _Slots
) -> None:
    """A job has the name of each subscriber once, as long as one of their streams is open."""
    server = serve()
    user, admin = connect("user", server.address), connect("admin", server.address)
    job_id = user.start(*FOREVER)
    assert list(user.status(job_id).subscribers) == []
    streams = [follow(user, job_id), follow(user, job_id), follow(admin, job_id)]
    assert list(user.status(job_id).subscribers) == ["admin", "user"]
    for number, expected in ((2, ["user"]), (1, ["user"]), (0, [])):
        streams[number].close()
        slots.await_freed()
        assert list(user.status(job_id).subscribers) == expected


def test_stalled_reader_holds_up_neither_the_job_nor_others(connect: Connect) -> None:
    """One client stops reading. The job still ends, and another client gets all output."""
    client, size = connect(), 20_000_000
    job_id = client.start("head", ["-c", str(size), "/dev/zero"])
    stalled = client.stream(job_id)
    next(stalled)
    assert len(_collect(connect(), job_id)) == size
    assert client.status(job_id).status == worker_pb.JOB_STATUS_FINISHED


class _Messages:
    """Counts messages. `given`: passed to gRPC so far; `untaken`: not yet taken by a client."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changed = threading.Condition()
        self.given = self.untaken = 0
        hold = Untaken.held

        @contextlib.contextmanager
        def held(counter: Untaken, size: int) -> Iterator[None]:
            try:
                with hold(counter, size):
                    self._count(given=1, untaken=1)
                    yield
            finally:
                self._count(untaken=-1)

        monkeypatch.setattr(Untaken, "held", held)

    def _count(self, given: int = 0, untaken: int = 0) -> None:
        with self._changed:
            self.given += given
            self.untaken += untaken
            self._changed.notify_all()

    def await_that(self, predicate: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(predicate, GUARD_S)


def test_messages_are_smaller_the_more_of_them_are_not_taken(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While followers do not read, messages to others are smaller, but no byte is lost.

    After these followers have gone, messages are large again.
    """
    monkeypatch.setattr(untaken, "_UNTAKEN_BYTES", 4 * 256 * 1024)
    monkeypatch.setattr(untaken, "_UNTAKEN_SHARE", 4)
    # Without this option the client's gRPC receives many megabytes before anybody reads them.
    windows = (*client_module._OPTIONS, ("grpc.http2.bdp_probe", 0))
    monkeypatch.setattr(client_module, "_OPTIONS", windows)
    client, size = connect("user", serve().address), 2_000_000
    job_id = client.start("head", ["-c", str(size), "/dev/zero"])
    assert len(_collect(client, job_id)) == size
    messages = _Messages(monkeypatch)
    stalled, first = [], []
    for number in range(1, 5):
        stalled.append(client.stream(job_id))
        first.append(len(next(stalled[-1])))
        # gRPC may take a third message at once: it keeps up to 64 KiB that it cannot send yet.
        messages.await_that(lambda: messages.given >= 2 * number)  # noqa: B023 -- called at once
    assert [size // 1024 for size in first] == [256, 192, 144, 108]
    assert len(_collect(client, job_id)) == size
    for stream in stalled:
        stream.close()
    messages.await_that(lambda: messages.untaken == 0)
    assert len(next(client.stream(job_id))) == 256 * 1024


def test_server_gives_back_every_descriptor_and_thread(serve: Serve, connect: Connect) -> None:
    """After jobs, failed starts, streams and refusals, the process has no more than before."""
    server = serve()
    client = connect("user", server.address)
    run_job(client)

    def used() -> int:
        for thread in threading.enumerate():
            if thread.name.startswith("job-"):
                thread.join(GUARD_S)
        assert server._worker
        settle_spares(server._worker)  # a spare has descriptors, too
        return len(os.listdir("/proc/self/fd"))

    before = used()
    for _ in range(5):
        run_job(client, "echo", ["hello"])
        call_rpc(client, "StartJob", command="no-such-command")
        call_rpc(client, "StreamOutput", job_id=ABSENT)
        client.stop(client.start(*FOREVER))
    assert used() == before
