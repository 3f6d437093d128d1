"""Tests of gRPC's own services: health and reflection, over real TLS, with gRPC's own clients."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import (
    proto_reflection_descriptor_database,
    reflection_pb2,
    reflection_pb2_grpc,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calls import _STREAMS_OF_STRANGERS
from testkit import FOREVER, GUARD_S, clean_environment, find_program, follow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from client import Client
    from testkit import ServerProgram

    StartServer = Callable[..., ServerProgram]

_HERE = Path(__file__).resolve().parent
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_OURS = ["", "jobworker.v1.AuthService", "jobworker.v1.WorkerService"]


@contextlib.contextmanager
def _channel(address: str, certs: Path, name: str = "client") -> Iterator[grpc.Channel]:
    """Connect with a client certificate; "" for none."""
    credentials = grpc.ssl_channel_credentials(
        (certs / "server-ca.pem").read_bytes(),
        (certs / f"{name}-key.pem").read_bytes() if name else None,
        (certs / f"{name}.pem").read_bytes() if name else None,
    )
    with grpc.secure_channel(address, credentials) as channel:
        yield channel


@pytest.fixture
def channel(program: ServerProgram, certs: Path) -> Iterator[grpc.Channel]:
    """A connection with a certificate and without a token to the shared server."""
    with _channel(program.address, certs) as made:
        yield made


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def _code(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        list(call(*arguments, timeout=GUARD_S))
    error: Any = caught.value
    return str(error.code().name)


# --- health -----------------------------------------------------------------------------


@pytest.mark.parametrize("service", _OURS)
def test_server_that_runs_is_healthy(stub: Any, service: str) -> None:
    """As a whole, and each of its services; a certificate is enough."""
    request = health_pb2.HealthCheckRequest(service=service)
    assert stub.Check(request, timeout=GUARD_S).status == _SERVING
    watch = stub.Watch(request, timeout=GUARD_S)
    assert next(watch).status == _SERVING
    watch.cancel()


def test_list_has_the_server_and_its_services(stub: Any) -> None:
    answer = stub.List(health_pb2.HealthListRequest(), timeout=GUARD_S)
    assert {name: each.status for name, each in answer.statuses.items()} == dict.fromkeys(
        _OURS, _SERVING
    )


def test_service_that_is_not_there_is_not_found(stub: Any) -> None:
    """Neither by Check nor by Watch, which would otherwise keep each name."""
    request = health_pb2.HealthCheckRequest(service="x" * 100)
    assert _code(lambda *a, **k: [stub.Check(*a, **k)], request) == "NOT_FOUND"
    assert _code(stub.Watch, request) == "NOT_FOUND"


def test_only_a_check_that_fails_has_a_line_in_the_audit_log(
    start_server: StartServer, certs: Path, tmp_path: Path
) -> None:
    """A load balancer asks every few seconds."""
    log = tmp_path / "audit.log"
    program = start_server("--audit-log", str(log))
    with _channel(program.address, certs) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for service in _OURS:
            request = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(request, timeout=GUARD_S).status == _SERVING
        request = health_pb2.HealthCheckRequest(service="other")
        assert _code(lambda *a, **k: [stub.Check(*a, **k)], request) == "NOT_FOUND"
    assert program.end() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    calls = [(line["rpc"], line["outcome"]) for line in lines if "rpc" in line]
    assert calls == [("/grpc.health.v1.Health/Check", "NOT_FOUND")]


def test_without_a_certificate_there_is_no_health(program: ServerProgram, certs: Path) -> None:
    with _channel(program.address, certs, "") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert _code(lambda *a, **k: [stub.Check(*a, **k)], request) == "UNAVAILABLE"


def test_server_that_ends_says_so_to_whoever_watches(
    start_server: StartServer, certs: Path, connect: Callable[..., Client]
) -> None:
    """NOT_SERVING comes while the jobs still have their grace; then the call ends."""
    program = start_server()
    client = connect("user", program.address)
    follow(client, client.start("sh", ["-c", "trap '' TERM; echo ready; sleep 1000 & wait; wait"]))
    statuses: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def watch() -> None:
        with _channel(program.address, certs) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            with contextlib.suppress(grpc.RpcError):
                for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=GUARD_S):
                    statuses.put(answer.status)
        statuses.put("over")

    thread = threading.Thread(target=watch)
    thread.start()
    assert statuses.get(timeout=GUARD_S) == _SERVING
    assert program.end() == 0
    thread.join()
    assert [statuses.get(timeout=GUARD_S) for _ in range(2)] == [_NOT_SERVING, "over"]


def test_watches_of_strangers_are_bounded_and_keep_nobody_out(
    stub: Any, connect: Callable[..., Client]
) -> None:
    """One more is refused, and calls with a token go on."""
    request = health_pb2.HealthCheckRequest()
    with contextlib.ExitStack() as watches:
        for _ in range(_STREAMS_OF_STRANGERS):
            watch = stub.Watch(request, timeout=GUARD_S)
            watches.callback(watch.cancel)
            assert next(watch).status == _SERVING
        assert _code(stub.Watch, request) == "RESOURCE_EXHAUSTED"
        assert stub.Check(request, timeout=GUARD_S).status == _SERVING
        client = connect("user")
        job_id = client.start(*FOREVER)
        follow(client, job_id).close()
        client.stop(job_id)


# --- reflection -------------------------------------------------------------------------


def test_reflection_shows_the_services_and_their_messages(channel: grpc.Channel) -> None:
    """To gRPC's own database of descriptors."""
    database = proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(channel)
    assert sorted(database.get_services()) == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        *_OURS[1:],
    ]
    file = database.FindFileContainingSymbol("jobworker.v1.WorkerService")
    assert file.name == "workerservice.proto"


def test_grpcurl_needs_no_protos(program: ServerProgram, certs: Path) -> None:
    """It learns from the server how to log in."""
    grpcurl = find_program("grpcurl", _HERE / ".venv/bin/grpcurl")
    run = subprocess.run(
        [
            *(grpcurl, "-cacert", certs / "server-ca.pem", "-cert", certs / "client.pem"),
            *("-key", certs / "client-key.pem", "-d", '{"username":"user","password":"user"}'),
            *(program.address, "jobworker.v1.AuthService/Login"),
        ],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert run.stderr == ""
    # Python's reflection leaves out json_name, so grpcurl shows the names of the proto.
    assert json.loads(run.stdout)["access_token"]


_REQUESTS = st.one_of(
    st.builds(reflection_pb2.ServerReflectionRequest, file_by_filename=st.text()),
    st.builds(reflection_pb2.ServerReflectionRequest, file_containing_symbol=st.text()),
    st.builds(reflection_pb2.ServerReflectionRequest, all_extension_numbers_of_type=st.text()),
    st.builds(reflection_pb2.ServerReflectionRequest, list_services=st.text()),
    st.builds(
        reflection_pb2.ServerReflectionRequest,
        file_containing_extension=st.builds(
            reflection_pb2.ExtensionRequest,
            containing_type=st.sampled_from(["", "google.protobuf.MessageOptions", "x"]),
            extension_number=st.integers(-(2**31), 2**31 - 1),
        ),
    ),
    st.just(reflection_pb2.ServerReflectionRequest()),
)


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(requests=st.lists(_REQUESTS, min_size=1, max_size=5))
def test_reflection_answers_any_request(
    channel: grpc.Channel, program: ServerProgram, requests: list[Any]
) -> None:
    """One answer each, and nothing in the server's log."""
    before = program.log.read_text()
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = list(stub.ServerReflectionInfo(iter(requests), timeout=GUARD_S))
    assert [answer.original_request for answer in answers] == requests
    assert program.log.read_text() == before


# --- on and off -------------------------------------------------------------------------


def test_both_can_be_switched_off(start_server: StartServer, certs: Path) -> None:
    """Then the server has no such methods, and does not show that it could have them."""
    program = start_server("--health", "off", "--reflection", "off")
    with _channel(program.address, certs) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        assert _code(health.Watch, health_pb2.HealthCheckRequest()) == "UNIMPLEMENTED"
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        assert _code(reflection.ServerReflectionInfo, requests) == "UNIMPLEMENTED"


@pytest.mark.parametrize("name", ["health", "reflection"])
def test_package_that_is_missing_is_named_where_it_is_asked_for(
    name: str, certs: Path, tmp_path: Path
) -> None:
    """With "on" the server does not start; with "auto" it works without."""
    package = {"health": "grpcio-health-checking", "reflection": "grpcio-reflection"}[name]
    # A program that starts the server like ./server, in an environment without the package.
    code = f"import sys; sys.modules['grpc_{name}'] = None; import server; sys.exit(server.main())"

    def start(wish: str) -> subprocess.Popen[str]:
        options = [
            *("--listen", "127.0.0.1:0", "--limits", "off", "--certs", str(certs)),
            *("--state-dir", str(tmp_path / wish), f"--{name}", wish),
        ]
        return subprocess.Popen(
            [_HERE / ".venv/bin/python", "-c", code, *options],
            cwd=_HERE,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start("on") as process:
        stdout, stderr = process.communicate(timeout=GUARD_S)
        assert (process.returncode, stdout) == (1, "")
        assert f"server: --{name} on: the package {package} is missing; run `make extras`" in stderr
    with start("auto") as process:
        assert process.stdout
        assert process.stdout.readline().startswith("listening on ")
        process.terminate()
        process.communicate(timeout=GUARD_S)
        assert process.returncode == 0
