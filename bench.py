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
import json
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
from unittest import mock

import server  # isort: skip -- before grpc: it says which TLS that may speak

import grpc

import cgroups
import spawner
import worker
import workerservice_pb2 as worker_pb
from client import Client, ClientError
from config import PER_USER
from tls import Certificates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

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


# --- where a start's time goes ------------------------------------------------------------

# The cheapest safe start of a process by hand: no server, no messages, a small program with
# one thread, but the same process: in a cgroup of its own, as another user, with the limits
# of a job. It does as many as it is told, by clone3 or with Popen, and says what took how long.
_BY_HAND = """
import json, os, socket, sys, time
here, jobs, way, uid = sys.argv[1:]
sys.path.insert(0, here)
import spawner

def start(name):
    uid_, cgroup = json.loads(uid), None
    out = os.open(os.devnull, os.O_WRONLY)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    times = [time.perf_counter()]
    if jobs:
        os.mkdir(f"{jobs}/{name}")
    times.append(time.perf_counter())
    if jobs:
        cgroup = os.open(f"{jobs}/{name}", os.O_RDONLY | os.O_DIRECTORY)
    times.append(time.perf_counter())
    work = spawner._Start(uid_, [b"/bin/true"], {}, [b"/bin/true"], cgroup, out, theirs)
    pid, pidfd = getattr(spawner, way)(work)
    times.append(time.perf_counter())
    theirs.close()
    assert ours.recv(1) == b""  # closed by the exec
    times.append(time.perf_counter())
    assert os.waitpid(pid, 0)[1] == 0
    ours.close()
    for fd in (out, pidfd, *([cgroup] if jobs else [])):
        os.close(fd)
    if jobs:
        os.rmdir(f"{jobs}/{name}")
    return [end - begin for begin, end in zip(times, times[1:])]

os.chdir("/")
spawner._set_signals()
for line in sys.stdin:
    count, gap = json.loads(line)
    steps = []
    for i in range(count):
        time.sleep(gap)
        steps.append(start(f"by-hand-{os.getpid()}-{i}"))
    print(json.dumps(steps), flush=True)
"""
_HAND_STEPS = ("make the cgroup", "open it", "fork", "child, to its exec")
_WORKER_STEPS: tuple[tuple[str, object, str], ...] = (
    ("output file", worker._OutputDir, "make_log"),  # noqa: SLF001 -- what is to be measured
    ("two pipes", worker, "_pipe"),
    ("cgroup and limits", cgroups.Subtree, "create"),
    ("helper, from the request to the exec", spawner.Spawner, "spawn"),
    ("argv in a memfd", os, "memfd_create"),
    ("thread", threading.Thread, "start"),
)
_APART_S = 0.02


class _ByHand:
    """The program that starts processes by hand, in one of the ways."""

    def __init__(self, way: str, jobs: Path | None, uid: int | None) -> None:
        arguments = (str(_HERE), str(jobs or ""), way, json.dumps(uid))
        self._process = subprocess.Popen(
            [sys.executable, "-E", "-s", "-S", "-c", _BY_HAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, count: int, gap_s: float = 0.0) -> list[list[float]]:
        """Start that many; return, of each, the seconds of each step."""
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("both are pipes")
        print(json.dumps([count, gap_s]), file=self._process.stdin, flush=True)
        times: list[list[float]] = json.loads(self._process.stdout.readline())
        return times

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def _timed(steps: dict[str, list[float]]) -> Iterator[None]:
    """Have the steps of `Worker.start` timed, in seconds, each call of each."""
    with contextlib.ExitStack() as undo:
        for what, owner, name in _WORKER_STEPS:
            undo.enter_context(
                mock.patch.object(owner, name, _timer(getattr(owner, name), what, steps))
            )
        yield


def _timer(function: Any, what: str, steps: dict[str, list[float]]) -> Any:
    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            steps.setdefault(what, []).append(time.perf_counter() - begin)

    return timed


def _p50(times: Iterable[float]) -> float:
    return float(statistics.median(times)) * 1e3


def _bench_start_steps(client: Client, floor: _Floor) -> None:
    """StartJob against (a) a bare unary call plus (b) a start by hand; and what it consists of."""
    uid = 71_001 if spawner.can_change_user() and spawner.can_kill_any() else None
    uids = None if uid is None else range(uid, uid + 1)
    p50: dict[str, list[float]] = {}  # of each round, in ms
    steps: dict[str, list[float]] = {}  # seconds, of each start
    with contextlib.ExitStack() as stack:
        jobs = stack.enter_context(worker.Worker(uids=uids))
        directory = jobs.subtree.jobs if jobs.subtree else None
        hand, popen = (
            stack.enter_context(contextlib.closing(_ByHand(way, directory, uid)))
            for way in ("_execute", "_popen")
        )
        measures: dict[str, Callable[[], Iterable[float]]] = {
            "StartJob": lambda: _start_jobs(client),
            "(a) a bare unary call": lambda: _times(lambda: floor.unary(b""), _STARTS),
            "(b) by hand": lambda: map(sum, hand.start(_STARTS)),
            "by hand, Popen with preexec_fn": lambda: map(sum, popen.start(_STARTS)),
            "by hand, 20 ms apart": lambda: map(sum, hand.start(_STARTS // 4, _APART_S)),
            "by hand, Popen, 20 ms apart": lambda: map(sum, popen.start(_STARTS // 4, _APART_S)),
            "Worker.start": lambda: _start_in_worker(jobs, uid, steps),
        }
        for number in range(_ROUNDS + 1):
            for name, measure in measures.items():
                times = list(measure())
                if number:  # the first round warms up
                    p50.setdefault(name, []).append(_p50(times))
        hand_steps = list(zip(*hand.start(_STARTS), strict=True))
    ours, a, b = list(p50.values())[:3]
    _report(
        "StartJob against (a) + (b), p50",
        [start / (unary + by_hand) for start, unary, by_hand in zip(ours, a, b, strict=True)],
        "",
    )
    for name, values in p50.items():
        _print_ms(name, statistics.median(values))
    print("  of Worker.start:")
    for what, times in steps.items():
        _print_ms(what, _p50(times) * len(times) / len(steps["thread"]))
    print("  of the start by hand:")
    for what, step in zip(_HAND_STEPS, hand_steps, strict=True):
        _print_ms(what, _p50(step))


def _start_jobs(client: Client) -> Iterator[float]:
    """Of each the end is awaited, as it is by hand, and not measured."""
    for _ in range(_STARTS):
        begin = time.perf_counter()
        job_id = client.start("/bin/true")
        yield time.perf_counter() - begin
        for _data in client.stream(job_id):
            pass


def _start_in_worker(
    jobs: worker.Worker, uid: int | None, steps: dict[str, list[float]]
) -> Iterator[float]:
    for _ in range(_STARTS):
        with _timed(steps):
            begin = time.perf_counter()
            job_id = jobs.start("/bin/true", uid=uid)
            yield time.perf_counter() - begin
        jobs.wait(job_id)


def _print_ms(what: str, ms: float) -> None:
    print(f"    {what:<48}{ms:7.2f} ms")


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
        _bench_start_steps(client, floor)
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
