"""Tests of the metrics: the text format, what is counted, and who may read it."""

from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import settings
import unixsockets
from client import Client, ClientError
from localserver import _MAX_WAITING
from metrics import Counter, Histogram, Metrics, http_server, listen
from quotas import QuotaError
from testkit import (
    ABSENT,
    FOREVER,
    GUARD_S,
    call_rpc,
    follow,
    run_job,
    run_server,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from metrics import Listener
    from testkit import ServerProgram

    StartServer = Callable[..., ServerProgram]

_HERE = Path(__file__).resolve().parent


def _get(address: str, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    """Fetch a page by HTTP; return its status and its text."""
    host, _, port = address.removeprefix("http://").partition("/")[0].rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=GUARD_S)
    connection.request(method, path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.getheader("Content-Type", "").startswith("text/plain; version=0.0.4")
    return response.status, text


def _samples(text: str) -> dict[str, float]:
    """Return the value of each series; fails for text that Prometheus would refuse."""
    found: dict[str, float] = {}
    typed: set[str] = set()
    helped: set[str] = set()
    for line in text.splitlines():
        if match := re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) (.+)", line):
            seen = helped if match[1] == "HELP" else typed
            assert match[2] not in seen, f"{match[2]} comes twice"
            seen.add(match[2])
            continue
        match = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? (\S+)', line)
        assert match, line
        base = re.sub("_(bucket|sum|count)$", "", match[1])
        assert {match[1], base} & typed
        series = match[1] + (match[2] or "")
        assert series not in found, f"{series} comes twice"
        found[series] = float(match[4])
    assert typed == helped
    return found


class _Measured:
    """A server with metrics. Attributes: `program`, `page` (its address)."""

    def __init__(self, start_server: StartServer, *options: str) -> None:
        self.program = start_server("--metrics", "127.0.0.1:0", *options)
        (self.page,) = re.findall("the metrics are at (http://.+)", self.program.log.read_text())

    def samples(self) -> dict[str, float]:
        status, text = _get(self.page)
        assert status == 200
        return {name.removeprefix("jobworker_"): n for name, n in _samples(text).items()}


@pytest.fixture
def measured(start_server: StartServer) -> _Measured:
    return _Measured(start_server)


# --- the text format --------------------------------------------------------------------


def test_text_of_a_counter() -> None:
    """Each combination of labels has a line, in order; special characters are escaped."""
    counter = Counter("calls", "What.", "rpc", "code")
    counter.add("B", "OK")
    counter.add("A", 'x"\\\n', amount=41)
    counter.add("B", "OK")
    assert "".join(counter.lines()) == (
        "# HELP jobworker_calls_total What.\n"
        "# TYPE jobworker_calls_total counter\n"
        'jobworker_calls_total{rpc="A",code="x\\"\\\\\\n"} 41\n'
        'jobworker_calls_total{rpc="B",code="OK"} 2\n'
    )
    assert list(Counter("starts", "What.").lines())[-1] == "jobworker_starts_total 0\n"


def test_text_of_a_histogram() -> None:
    """A bucket counts all that took its bound or less; the last one counts all."""
    histogram = Histogram("queue", "What.")
    for seconds in (0.0, 0.0001, 0.003, 100.0):
        histogram.observe(seconds)
    samples = _samples("".join(histogram.lines()))
    assert samples['jobworker_queue_seconds_bucket{le="0.0001"}'] == 2
    assert samples['jobworker_queue_seconds_bucket{le="0.0025"}'] == 2
    assert samples['jobworker_queue_seconds_bucket{le="0.005"}'] == 3
    assert samples['jobworker_queue_seconds_bucket{le="10.0"}'] == 3
    assert samples['jobworker_queue_seconds_bucket{le="+Inf"}'] == 4
    assert samples["jobworker_queue_seconds_count"] == 4
    assert samples["jobworker_queue_seconds_sum"] == pytest.approx(100.0031)


def test_no_count_is_lost_between_threads() -> None:
    counter, histogram = Counter("x", "What."), Histogram("y", "What.")

    def count() -> None:
        for _ in range(20_000):
            counter.add()
            histogram.observe(0)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(counter.lines())[-1] == "jobworker_x_total 80000\n"
    assert list(histogram.lines())[-1] == "jobworker_y_seconds_count 80000\n"


# --- what is counted --------------------------------------------------------------------


def test_jobs_and_their_ends_and_bytes(measured: _Measured, connect: Callable[..., Client]) -> None:
    """By status and reason; the bytes of a stream are those of the output."""
    client = connect("user", measured.program.address)
    run_job(client, "echo", ["hello"])
    with pytest.raises(ClientError):
        client.start("/absent")
    job_id = client.start(*FOREVER)
    stream = follow(client, job_id)
    now = measured.samples()
    assert (now['jobs{status="running"}'], now['jobs{status="finished"}']) == (1, 1)
    assert (now["starts_total"], now["start_seconds_count"]) == (2, 2)
    assert now["start_seconds_sum"] > 0
    assert (now["streams"], now["output_sent_bytes_total"]) == (1, len("hello\nready\n"))
    assert now['refusals_total{reason="command_not_found"}'] == 1
    assert now['calls_total{rpc="StartJob",code="OK"}'] == 2
    assert now['calls_total{rpc="StartJob",code="INVALID_ARGUMENT"}'] == 1
    assert now["queue_seconds_count"] >= 5
    assert now["received_bytes_total"] > 0
    stream.close()
    client.stop(job_id)
    after = measured.samples()
    assert after['jobs_ended_total{reason="exited"}'] == 1
    assert after['jobs_ended_total{reason="stopped"}'] == 1
    assert (after['jobs{status="running"}'], after['jobs{status="finished"}']) == (0, 2)


def test_repeated_start_counts_once(measured: _Measured, connect: Callable[..., Client]) -> None:
    """The second one starts nothing."""
    client = connect("user", measured.program.address)
    for _ in range(2):
        assert call_rpc(client, "StartJob", command="true", request_id=ABSENT)[0] == "OK"
    assert measured.samples()["starts_total"] == 1


def test_failed_login_counts(measured: _Measured, certs: Path) -> None:
    """A login that succeeds, and a call without a token, do not."""
    with Client(measured.program.address, certs=certs) as client:
        client.login("user", "user")
        with pytest.raises(ClientError):
            client.login("user", "wrong")
    with Client(measured.program.address, certs=certs) as client, pytest.raises(ClientError):
        client.list()
    now = measured.samples()
    assert now["failed_logins_total"] == 1
    assert now['calls_total{rpc="Login",code="OK"}'] == 1
    assert now['refusals_total{reason="token"}'] == 1


def test_method_that_a_client_invents_makes_no_series(
    measured: _Measured, connect: Callable[..., Client]
) -> None:
    """So no client can make the server keep more of them."""
    client = connect("user", measured.program.address)
    for name in "Invented", "Another":
        rpc: Any = client._channel.unary_unary(f"/jobworker.v1.WorkerService/{name}")
        with pytest.raises(Exception, match="UNIMPLEMENTED"):
            rpc(b"", metadata=client._link.metadata(), timeout=GUARD_S)
    assert measured.samples()['calls_total{rpc="unknown",code="UNIMPLEMENTED"}'] == 2


def test_ceilings_disk_certificates_and_the_process(measured: _Measured) -> None:
    now = measured.samples()
    assert (now["jobs_ceiling"], now["streams_ceiling"]) == (2000, 2000)
    (size,) = [value for name, value in now.items() if name.startswith("disk_size_bytes{")]
    (free,) = [value for name, value in now.items() if name.startswith("disk_free_bytes{")]
    assert 0 < free < size
    for file in "server.pem", "client-ca.pem":
        assert now[f'certificate_expiry_timestamp_seconds{{file="{file}"}}'] > 1.7e9
    assert now["problems"] == 0
    assert now["process_resident_memory_bytes"] > 1 << 20


def test_refusal_is_named_by_the_ceiling_that_it_names() -> None:
    """Otherwise by the kind of the error; what is internal stays so."""
    metrics = Metrics()
    metrics.refused("StartJob", "RESOURCE_EXHAUSTED", QuotaError("... (per_user.running_jobs)"))
    metrics.refused("StartJob", "UNAVAILABLE", settings.LimitError("memory is above"))
    metrics.refused("StartJob", "INTERNAL", KeyError("(per_user.secret)"))
    lines = list(metrics.refusals.lines())[2:]
    assert [re.findall('"(.+)"', line)[0] for line in lines] == [
        *("internal", "limit", "per_user.running_jobs")
    ]


# --- who may read it --------------------------------------------------------------------


def test_server_without_the_option_serves_no_metrics(start_server: StartServer) -> None:
    program = start_server()
    tasks = Path(f"/proc/{program.process.pid}/task").iterdir()
    assert "metrics" not in [(task / "comm").read_text().strip() for task in tasks]
    assert "the metrics are at" not in program.log.read_text()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:1"])
def test_address_that_others_can_reach_is_refused(
    address: str, certs: Path, tmp_path: Path
) -> None:
    """The server does not start, and says what to name instead."""
    error = _refused(certs, tmp_path, address)
    assert re.search(r"reached from elsewhere.*127\.0\.0\.1:9464, or unix:PATH", error), error


def test_address_that_is_taken_is_named(certs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"--metrics {address}: Address already in use; name a free" in _refused(
            certs, tmp_path, address
        )
    (tmp_path / "file").touch()
    assert "is not a socket" in _refused(certs, tmp_path, f"unix:{tmp_path}/file")
    assert "is not HOST:PORT" in _refused(certs, tmp_path, "nonsense")


def _refused(certs: Path, tmp_path: Path, address: str) -> str:
    """Start a server that must not start; return its only line on stderr."""
    run = run_server(
        *("--listen", "127.0.0.1:0", "--limits", "off", "--metrics", address),
        *("--certs", certs, "--state-dir", tmp_path / "state"),
    )
    assert (run.returncode, run.stdout) == (1, "")
    return run.stderr.splitlines()[-1]


def test_unix_socket_is_for_its_owner_and_group(start_server: StartServer, public: Path) -> None:
    """And gone with the server, if its directory is the server's."""
    path = public / "metrics.sock"
    program = start_server("--metrics", f"unix:{path}")
    assert path.stat().st_mode & 0o777 == 0o660
    with unixsockets.connect(path) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, text = sock.makefile("rb").read().decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert "jobworker_uptime_seconds" in _samples(text)
    assert program.end() == 0


# --- HTTP -------------------------------------------------------------------------------


@pytest.fixture
def page() -> Iterator[Listener]:
    """A server of the text "a 1"."""
    listener = listen("127.0.0.1:0")
    server = http_server(listener, lambda: "a 1\n")
    server.start()
    yield listener
    server.close()


def test_only_get_of_one_page_is_served(page: Listener) -> None:
    assert _get(page.address) == (200, "a 1\n")
    assert _get(page.address, "/metrics?x=y") == (200, "a 1\n")
    assert _get(page.address, "/") == (404, "the metrics are at /metrics\n")
    assert _get(page.address, "/metrics", "POST")[0] == 405


@pytest.mark.parametrize(
    "request_bytes", [b"", b"\x16\x03\x01", b"GET", b"\r\n\r\n", b"x" * 99_999]
)
def test_nonsense_does_no_harm(page: Listener, request_bytes: bytes) -> None:
    """Whoever sends it gets an error, or nothing, and the next one is served."""
    address = page.socket.getsockname()
    with socket.create_connection(address, timeout=GUARD_S) as sock:
        answer = b""
        with contextlib.suppress(OSError):  # it sent more than the server reads
            sock.sendall(request_bytes)
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(100)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert _get(page.address) == (200, "a 1\n")


@pytest.mark.parametrize("sent", [b"", b"GET /met"])
def test_silent_connections_hold_up_nobody(
    page: Listener, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Jobs can connect to a loopback address, too. Of too many, the oldest are closed."""
    monkeypatch.setattr("localserver._REQUEST_S", 1e6)
    with contextlib.ExitStack() as connections:
        silent = []
        for _ in range(3 * _MAX_WAITING):
            sock = socket.create_connection(page.socket.getsockname(), timeout=GUARD_S)
            silent.append(connections.enter_context(sock))
            sock.sendall(sent)
            if len(silent) % 50 == 0:
                assert _get(page.address) == (200, "a 1\n")
        with contextlib.suppress(ConnectionResetError):  # it was closed with bytes unread
            assert silent[0].recv(1) == b""
        if sent:
            silent[-1].sendall(b"rics HTTP/1.1\r\n\r\n")
            assert silent[-1].recv(15) == b"HTTP/1.1 200 OK"


def test_silent_connection_is_closed(page: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some seconds."""
    monkeypatch.setattr("localserver._REQUEST_S", 0.01)
    with socket.create_connection(page.socket.getsockname(), timeout=GUARD_S) as sock:
        assert sock.recv(1) == b""


def test_text_is_one_that_prometheus_accepts(measured: _Measured) -> None:
    """Its own tool checks form and names."""
    promtool = shutil.which("promtool") or pytest.skip("needs promtool, of Debian's prometheus")
    _, text = _get(measured.page)
    run = subprocess.run(
        [promtool, "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "path", ["docs/monitoring.md", "deploy/grafana-dashboard.json", "deploy/prometheus-alerts.yml"]
)
def test_files_name_metrics_that_exist(measured: _Measured, path: str) -> None:
    """And the document names all of them."""
    shown = re.findall(r"^# TYPE (\S+)", _get(measured.page)[1], re.MULTILINE)
    named = set(re.findall(r"\b(?:jobworker|process)_[a-z_]+\b", (_HERE / path).read_text()))
    assert {re.sub("_bucket$", "", name) for name in named} - set(shown) == set()
    if path.endswith(".md"):
        assert set(shown) - named == set()
