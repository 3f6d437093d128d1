"""Measures the server against the floor under it, in one run. `make bench`.

Machines are noisy and differ, so the figures to quote are ratios: what is measured
and its floor take turns, and a ratio is the median over the rounds, with the lowest
and the highest beside it. The floors: a gRPC server with the same TLS, options and
message size that does nothing, and a bare `subprocess.Popen`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import server  # isort: skip -- before grpc: it says which TLS that may speak

import grpc

import workerservice_pb2 as worker_pb
from client import Client, ClientError
from config import PER_USER
from tls import Certificates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_HERE = Path(__file__).resolve().parent
_CERTS = _HERE / "certs"
_MIB = 1024 * 1024
_MESSAGE_BYTES = 256 * 1024
_ROUNDS = 7
_STARTS = 100  # in a round
_STREAM_BYTES = 256 * _MIB  # in a round
_BIG_OUTPUT_BYTES = 1024 * _MIB
_FOLLOWERS = 100
_SILENCE_S = 10.0
_STATUSES = 500  # in a round
_PROGRAM_RUNS = 3  # of each in a round

# The benchmark is about speed, and would meet the ceilings of rate and output.
_UNHINDERED = """
[per_user]
starts_per_second = "unlimited"
kept_output = "unlimited"
[in_all]
starts_per_second = "unlimited"
kept_output = "unlimited"
[per_job]
kept_output = "unlimited"
"""


# --- the floor --------------------------------------------------------------------------


def _serve_floor() -> None:
    """A gRPC server with our TLS that answers with nothing, with messages, or with bytes."""
    zeros = bytes(_MESSAGE_BYTES)
    message = worker_pb.StreamOutputResponse(data=zeros)

    def stream(request: bytes, _: grpc.ServicerContext) -> Iterator[Any]:
        yield from itertools.repeat(message, int(request) // _MESSAGE_BYTES)

    def stream_bytes(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        yield from itertools.repeat(zeros, int(request) // _MESSAGE_BYTES)

    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(lambda _request, _context: b""),
        "Stream": grpc.unary_stream_rpc_method_handler(
            stream, response_serializer=worker_pb.StreamOutputResponse.SerializeToString
        ),
        "StreamBytes": grpc.unary_stream_rpc_method_handler(stream_bytes),
    }
    floor = grpc.server(ThreadPoolExecutor(4), options=server.GRPC_OPTIONS)
    floor.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Floor", handlers),))
    port = floor.add_secure_port("127.0.0.1:0", Certificates(Path.read_bytes, _CERTS).credentials())
    floor.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    sys.stdin.read()  # until the benchmark ends


@contextlib.contextmanager
def _running(*command: str) -> Iterator[tuple[int, str]]:
    """Run a server that says where it listens; yield its pid and address."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("listening on "):
            sys.exit(f"bench: {' '.join(command)} did not start; run it to see why")
        try:
            yield process.pid, line.removeprefix("listening on ").strip()
        finally:
            process.terminate()


class _Floor:
    """The floor's client."""

    def __init__(self, address: str) -> None:
        names = ("server-ca.pem", "client-key.pem", "client.pem")
        credentials = grpc.ssl_channel_credentials(*((_CERTS / n).read_bytes() for n in names))
        self._channel = grpc.secure_channel(address, credentials)
        self.unary: Any = self._channel.unary_unary("/Floor/Unary")
        self._stream: Any = self._channel.unary_stream(
            "/Floor/Stream", response_deserializer=worker_pb.StreamOutputResponse.FromString
        )
        self._stream_bytes: Any = self._channel.unary_stream("/Floor/StreamBytes")
        self._request = str(_STREAM_BYTES).encode()

    def read_stream(self) -> int:
        return sum(len(message.data) for message in self._stream(self._request))

    def read_stream_bytes(self) -> int:
        return sum(len(data) for data in self._stream_bytes(self._request))

    def close(self) -> None:
        self._channel.close()


# --- measuring --------------------------------------------------------------------------


def _times(call: Callable[[], object], count: int) -> list[float]:
    """How long each of `count` calls took, in seconds, lowest first."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)


def _report(what: str, ratios: Sequence[float], detail: str) -> None:
    print(
        f"{what:<52}{statistics.median(ratios):7.2f} x"
        f"   ({min(ratios):.2f} to {max(ratios):.2f})   {detail}",
        flush=True,
    )


def _bench_start(client: Client, floor: _Floor) -> None:
    def popen() -> None:
        processes.append(subprocess.Popen(["/bin/true"], stdin=subprocess.DEVNULL))

    processes: list[subprocess.Popen[bytes]] = []
    calls: dict[str, Callable[[], object]] = {
        "start": lambda: client.start("/bin/true"),
        "unary": lambda: floor.unary(b""),
        "popen": popen,
    }
    p50: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(_ROUNDS + 1):
        for name, call in calls.items():
            times = _times(call, _STARTS)
            if number:  # the first round warms up
                p50[name].append(times[len(times) // 2])
        for process in processes:
            process.wait()
        processes.clear()
    median = {name: statistics.median(times) * 1e3 for name, times in p50.items()}
    for name, what in (("unary", "a bare unary call"), ("popen", "a bare Popen")):
        _report(
            f"StartJob against {what}, p50",
            [ours / theirs for ours, theirs in zip(p50["start"], p50[name], strict=True)],
            f"{median['start']:.2f} ms / {median[name]:.2f} ms",
        )


def _bench_stream(client: Client, floor: _Floor) -> None:
    job_id = client.start("head", ["-c", str(_STREAM_BYTES), "/dev/zero"])

    def follow() -> None:
        if sum(len(data) for data in client.stream(job_id)) != _STREAM_BYTES:
            sys.exit("bench: the stream is not complete")

    calls = (follow, floor.read_stream, floor.read_stream_bytes)
    times: tuple[list[float], ...] = ([], [], [])
    for number in range(_ROUNDS + 1):
        for call, taken in zip(calls, times, strict=True):
            seconds = _times(call, 1)
            if number:  # the first round warms up
                taken.extend(seconds)
    rates = [_STREAM_BYTES / statistics.median(taken) / 1e6 for taken in times]
    floors = ("a gRPC stream of such messages", "one of bare bytes, no protobuf")
    for what, taken, rate in zip(floors, times[1:], rates[1:], strict=True):
        _report(
            f"one follower against {what}",
            [their / our for our, their in zip(times[0], taken, strict=True)],
            f"{rates[0]:.0f} MB/s / {rate:.0f} MB/s",
        )


def _bench_memory(client: Client, pid: int) -> None:
    """The peak while a job writes 1 GiB, one follower reads it and one has stalled."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the peak so far, proc(5)
    before = _memory_bytes(pid, "VmRSS")
    job_id = client.start("head", ["-c", str(_BIG_OUTPUT_BYTES), "/dev/zero"])
    stalled = client.stream(job_id)
    next(stalled)
    if sum(len(data) for data in client.stream(job_id)) != _BIG_OUTPUT_BYTES:
        sys.exit("bench: the stream is not complete")
    grown = _memory_bytes(pid, "VmHWM") - before
    stalled.close()
    print(
        f"{'server growth, 1 GiB of output, one stalled':<52}{grown / _MIB:7.1f} MiB   (at most 16)"
    )


def _bench_silence(client: Client, pid: int) -> None:
    """CPU time of the server and its spawner while nobody has anything to say."""
    job_id = client.start("sh", ["-c", "echo; exec sleep 1000"])
    followers = [client.stream(job_id) for _ in range(_FOLLOWERS)]
    for follower in followers:
        next(follower)  # so that every one of them is subscribed
    processes = [pid, *_children(pid)]
    before = sum(map(_cpu_s, processes))
    threading.Event().wait(_SILENCE_S)
    used = sum(map(_cpu_s, processes)) - before
    client.stop(job_id)
    share = used / _SILENCE_S * 100
    print(f"{'CPU of 100 silent followers, 10 s':<52}{share:7.2f} %     ({used:.2f} s)")


def _bench_fairness(client: Client, address: str) -> None:
    """How much slower one user's Status is while another is at their ceilings."""
    job_id = client.start("sleep", ["1000"])

    def status_s() -> list[float]:
        return _times(lambda: client.status(job_id), _STATUSES)

    status_s()
    before = status_s()
    with _running(__file__, "--greedy", address):
        loaded = status_s()
    after = status_s()
    for what, index in (("p50", _STATUSES // 2), ("p99", _STATUSES * 99 // 100)):
        idle_ms = statistics.mean((before[index], after[index])) * 1e3
        loaded_ms = loaded[index] * 1e3
        print(
            f"{f'Status beside a user at every ceiling, {what}':<52}{loaded_ms / idle_ms:7.2f} x"
            f"   {loaded_ms:.2f} ms / {idle_ms:.2f} ms (at most 2)"
        )


def _be_greedy(address: str) -> None:
    """Have as many jobs, streams and starts as a user may, until stdin is closed."""
    done = threading.Event()
    with Client(address, certs=_CERTS) as client:
        client.login("user", "user")
        # One less than may run, so that there is room for those that come and go.
        sleepers = (PER_USER.running_jobs or 0) - 1
        jobs = [_start_in_turn(client, "sleep", "1000") for _ in range(sleepers)]
        streams = [client.stream(jobs[0]) for _ in range(PER_USER.streams or 0)]
        readers = [threading.Thread(target=_read_on, args=(s,), daemon=True) for s in streams]
        for reader in readers:
            reader.start()

        def start() -> None:
            while not done.is_set():
                _start_in_turn(client, "true")

        starter = threading.Thread(target=start)
        starter.start()
        print(f"listening on {address}", flush=True)
        sys.stdin.read()
        done.set()
        starter.join()


def _start_in_turn(client: Client, *argv: str) -> str:
    """Start a job as soon as the server's rate of starts allows it."""
    while True:
        try:
            return client.start(argv[0], argv[1:])
        except ClientError as error:
            if error.code != "RESOURCE_EXHAUSTED":
                raise
            threading.Event().wait(error.retry_after_s or 0.02)


def _read_on(stream: Iterator[bytes]) -> None:
    with contextlib.suppress(ClientError):
        for _ in stream:
            pass


def _memory_bytes(pid: int, field: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    return [
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if (path / "stat").read_text().rpartition(")")[2].split()[1] == str(pid)
    ]


# --- the command line -------------------------------------------------------------------

# What somebody would write who wants to know the same and nothing else.
_BARE_CALL = """
import os
import sys
import grpc
import workerservice_pb2
import workerservice_pb2_grpc

address, job_id, *paths = sys.argv[1:]
token = os.environ["JOBWORKER_TOKEN"]
credentials = grpc.ssl_channel_credentials(*(open(path, "rb").read() for path in paths))
with grpc.secure_channel(address, credentials) as channel:
    stub = workerservice_pb2_grpc.WorkerServiceStub(channel)
    request = workerservice_pb2.GetJobStatusRequest(job_id=job_id)
    print(stub.GetJobStatus(request, metadata=(("authorization", f"Bearer {token}"),)).job)
"""


def _bench_command_line(client: Client, address: str) -> None:
    """Whole processes, from fork to exit: the client against Python and a script that calls."""
    job_id = client.start("true")
    launcher = str(_HERE / "client")
    options = ("--server", address, "--certs", str(_CERTS))
    files = [str(_CERTS / name) for name in ("server-ca.pem", "client-key.pem", "client.pem")]
    pairs = {
        "client --help against python -c pass": (
            [launcher, "--help"],
            [sys.executable, "-c", "pass"],
        ),
        "client status against a bare script that calls": (
            [launcher, "status", *options, "-j", job_id],
            [sys.executable, "-c", _BARE_CALL, address, job_id, *files],
        ),
    }
    for what, commands in pairs.items():
        _alternate(*commands, token=client.token)  # warms up
        rounds = [_alternate(*commands, token=client.token) for _ in range(_ROUNDS)]
        ours, theirs = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
        _report(what, [a / b for a, b in rounds], f"{ours:.1f} ms / {theirs:.1f} ms")


def _alternate(ours: Sequence[str], theirs: Sequence[str], *, token: str) -> tuple[float, float]:
    """Run two programs in turn; return the median of the seconds that each took."""
    environment = os.environ | {"JOBWORKER_TOKEN": token}

    def run(command: Sequence[str]) -> None:
        subprocess.run(
            command,
            cwd=_HERE,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_PROGRAM_RUNS):
        times[0].extend(_times(lambda: run(ours), 1))
        times[1].extend(_times(lambda: run(theirs), 1))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--floor", action="store_true", help="be the floor's server")
    parser.add_argument("--greedy", metavar="ADDRESS", help="be a user at their ceilings there")
    arguments = parser.parse_args()
    if arguments.floor:
        _serve_floor()
        return
    if arguments.greedy:
        _be_greedy(arguments.greedy)
        return
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory())
        config = Path(state, "config.toml")
        config.write_text(_UNHINDERED)
        options = ("--listen", "127.0.0.1:0", "--limits", "auto", "--state-dir", state)
        pid, address = stack.enter_context(
            _running(str(_HERE / "server.py"), *options, "--config", str(config))
        )
        _, floor_address = stack.enter_context(_running(__file__, "--floor"))
        client = stack.enter_context(Client(address, certs=_CERTS))
        client.login("admin", "admin")
        floor = stack.enter_context(contextlib.closing(_Floor(floor_address)))
        print(f"median of {_ROUNDS} rounds (lowest to highest)   measured / floor\n")
        _bench_start(client, floor)
        _bench_stream(client, floor)
        _bench_command_line(client, address)
        _bench_memory(client, pid)
        _bench_silence(client, pid)
    with tempfile.TemporaryDirectory() as state:
        options = ("--listen", "127.0.0.1:0", "--limits", "auto", "--state-dir", state)
        with (
            _running(str(_HERE / "server.py"), *options) as (_, address),
            Client(address, certs=_CERTS) as client,
        ):
            client.login("admin", "admin")
            _bench_fairness(client, address)


if __name__ == "__main__":
    main()
