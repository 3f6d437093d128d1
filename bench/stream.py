"""Measures streams of output, and streams and jobs that are silent; see `python -m bench`.

python -m bench.stream --follow ADDRESS COUNT JOB    # follow a job with COUNT streams
python -m bench.stream --follow ADDRESS COUNT        # follow the floor's lines with COUNT streams
python -m bench.stream --read ADDRESS COUNT          # read COUNT of the floor's streams for ever
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import harness  # noqa: F401  isort: skip -- before grpc

import grpc

import workerservice_pb2 as worker_pb
import workerservice_pb2_grpc
from bench.floor import Floor
from bench.harness import (
    CERTS,
    MIB,
    Service,
    cpu_s,
    fail,
    in_turn,
    memory_bytes,
    ms,
    percentile,
    print_heading,
    report,
    report_ratio,
    sampled,
    seconds,
    start_program,
    times,
)
from client import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


__all__ = [
    "JobRun",
    "bench_delay",
    "bench_followers",
    "bench_job_rate",
    "bench_merging",
    "bench_silence",
    "bench_stream",
    "report_job_runs",
    "stalling",
    "through_cat",
    "timed",
]

_STREAM_BYTES = 128 * MIB
_STREAM_TURNS = 3
_LINES_BYTES = 32 * MIB
_ZEROS_BYTES = 128 * MIB
_ENDLESS_BYTES = 1 << 40
_BESIDE = "into cat, beside 10 bare streams"
_FOLLOWERS = (1, 10, 100, 1000)
_SHARED_BYTES = 256 * MIB  # of all followers together
_SHARED_ROUNDS = 3
_FEW = 10
_JOB_ROUNDS = 4
# Number of followers: number of lines in a round, and the pause before each line. The pause is so
# long that all followers get a line before the job writes the next one.
_DELAYS = {1: (50, 0.02), 100: (10, 0.1), 1000: (4, 1.0)}
_DELAY_ROUNDS = 4
_STALLED_S = 0.5  # then the server can send no more to followers that do not read
_TINY_WRITES_S = 3
_SILENCE_S = 30.0
_SILENT = 1000

# The environment of a job. Programs of the floor get it too, because it changes what they do: with
# PYTHONUNBUFFERED each line is a write of its own.
_JOB_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONUNBUFFERED": "1",
}

# Writes lines about as fast as a compiler or a test run.
_MAKE_LINES = """
import sys
for number in range(int(sys.argv[1]) // 64):
    sys.stdout.write(f"{number:063d}\\n")
"""
_MAKE_STAMPS = """
import sys, time
for _ in range(int(sys.argv[1])):
    time.sleep(float(sys.argv[2]))
    sys.stdout.write(f"{time.monotonic_ns()}\\n")
    sys.stdout.flush()
"""
# Makes 10,000 writes per second for so many seconds, ten in each millisecond.
_MAKE_TINY_WRITES = """
import os, sys, time
start = time.monotonic()
for number in range(1, int(sys.argv[1]) * 10_000 + 1):
    os.write(1, b"%09d\\n" % number)
    if number % 10 == 0:
        time.sleep(max(0, start + number / 10_000 - time.monotonic()))
"""


def _python(program: str, *arguments: object) -> list[str]:
    # Not this program's own Python, because the user of the jobs may have no access to it.
    return ["/usr/bin/python3", "-c", program, *map(str, arguments)]


# --- one follower -------------------------------------------------------------------------


def bench_stream(service: Service, floor: Floor) -> None:
    """Measure the stream of a finished job, and of a job that writes while the client reads."""
    client = service.client
    argv = ["head", "-c", str(_STREAM_BYTES), "/dev/zero"]
    lines = _python(_MAKE_LINES, _STREAM_BYTES // 4)
    kept = client.start(argv[0], argv[1:])
    size = _STREAM_BYTES

    def follow(job_id: str, size: int = size) -> None:
        if sum(map(len, client.stream(job_id))) != size:
            fail("the stream is not complete")

    def run(argv: Sequence[str], size: int) -> None:
        job_id = client.start(argv[0], argv[1:])
        follow(job_id, size)
        # This frees the memory of the output, as the end of `through_cat` frees its file. A
        # virtual machine may have to ask its host for each page that it never used before; then
        # it writes at a fifth of its speed.
        client.remove(job_id)

    def times_s(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
        found = sampled(
            {name: functools.partial(times, call, 1) for name, call in calls.items()}, turns=turns
        )
        return {name: list(map(statistics.fmean, rounds)) for name, rounds in found.items()}

    # Three turns, because chance decides at the begin of a stream which threads share a processor,
    # and they share it until the stream ends.
    found = times_s(
        {
            "kept": lambda: follow(kept),
            "floor": lambda: floor.read_stream(size),
            "file": lambda: floor.read_file(str(service.state / "output" / f"{kept}.out")),
        },
        _STREAM_TURNS,
    ) | times_s(
        {
            "job": lambda: run(argv, size),
            "cat": lambda: through_cat(argv),
            "lines": lambda: run(lines, size // 4),
            "lines cat": lambda: through_cat(lines),
        },
        1,
    )
    print_heading(f"One follower of {size // MIB} MiB: rate / rate of the floor")
    for what, ours, theirs, bytes_, aim in (
        ("kept output / bare gRPC stream", "kept", "floor", size, ">= 0.9"),
        ("kept output / one that reads its file", "kept", "file", size, ""),
        ("job to client / job | cat >file", "job", "cat", size, ">= 0.8"),
        ("the same of a job that makes lines", "lines", "lines cat", size // 4, ">= 0.8"),
        ("(bare gRPC stream / job | cat >file)", "floor", "cat", size, ""),
    ):
        _report_rates(what, found[ours], found[theirs], bytes_, aim)


def _report_rates(
    what: str, ours_s: list[float], theirs_s: list[float], size: int, aim: str
) -> None:
    ours, theirs = ([size / s / 1e6 for s in taken] for taken in (ours_s, theirs_s))
    detail = f"{statistics.median(ours):.0f} / {statistics.median(theirs):.0f} MB/s"
    report_ratio(what, ours, theirs, detail, aim)


def through_cat(argv: Sequence[str]) -> None:
    """Run `argv` with its output through a plain pipe into `cat >file`."""
    with (
        tempfile.TemporaryFile() as file,
        subprocess.Popen(argv, env=_JOB_ENVIRONMENT, stdout=subprocess.PIPE) as job,
    ):
        subprocess.run(["cat"], stdin=job.stdout, stdout=file, check=True)
    if job.returncode:
        fail(f"{argv[0]} failed")


# --- many followers -----------------------------------------------------------------------


class _Followed(NamedTuple):
    """What all followers received together.

    `delays_s`: the delay of each line; a line is the time at which the line was written.
    `progress`: for each follower a list with an item for each message, the time in seconds since
    the epoch and the number of bytes received so far; empty lists if there are many followers.
    """

    digests: list[str]
    messages: int
    delays_s: list[float]
    progress: list[list[tuple[float, int]]]


@contextlib.contextmanager
def _waiting_job(
    service: Service, argv: Sequence[str], first_bytes: int = 0
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Start a job that writes a line end and `first_bytes` bytes, and then waits.

    Yields the job's ID and a function. The function makes the job execute `argv`. At the end of
    the context the job must have ended and is removed.
    """
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)  # noqa: S103 -- the job runs as another user
        fifo = Path(name, "go")
        os.mkfifo(fifo)
        os.chmod(fifo, 0o666)  # noqa: S103 -- the job runs as another user
        script = f'echo; head -c {first_bytes} /dev/zero; read _ <"$0"; exec "$@"'
        job_id = service.client.start("sh", ["-c", script, str(fifo), *argv])

        def go() -> None:
            fifo.write_text("\n")

        yield job_id, go
        service.client.remove(job_id)


@contextlib.contextmanager
def _following(service: Service, job_id: str, count: int) -> Iterator[Callable[[], _Followed]]:
    """Follow the job from another program, with `count` streams.

    When the context begins, all streams are subscribed. Yields a function that waits for the end
    of all streams and returns what they received.
    """
    with _followers(service.client, service.address, count, job_id) as result:
        yield result


@contextlib.contextmanager
def _followers(client: Client, address: str, *what: object) -> Iterator[Callable[[], _Followed]]:
    with start_program(client, "-m", __name__, "--follow", address, *what) as program:

        def result() -> _Followed:
            line = program.stdout.readline() if program.stdout else ""
            if not line:
                fail("the followers failed")
            return _Followed(**json.loads(line))

        yield result


def _follow(address: str, count: int, job_id: str = "") -> None:
    with contextlib.ExitStack() as stack:
        if job_id:
            token = os.environ["JOBWORKER_TOKEN"]
            client = stack.enter_context(Client(address, certs=CERTS, token=token))
            _follow_each(lambda: client.stream(job_id), count)
        else:
            floor = stack.enter_context(contextlib.closing(Floor(0, address)))
            _follow_each(floor.lines, count)


def _follow_each(open_stream: Callable[[], Iterator[bytes]], count: int) -> None:
    ready = threading.Semaphore(0)
    seen = _Followed([], 0, [], [])

    def follow() -> tuple[str, int]:
        stream = open_stream()
        first = next(stream)
        digest = hashlib.blake2b(first)
        size, messages, progress = len(first), 0, []
        ready.release()
        for chunk in stream:
            now = time.monotonic_ns()
            digest.update(chunk)
            messages += 1
            size += len(chunk)
            if len(chunk) < 64 and chunk.strip().isdigit():  # noqa: PLR2004 -- a time
                seen.delays_s.append((now - int(chunk)) / 1e9)
            if count <= _FEW:
                progress.append((time.time(), size))
        seen.progress.append(progress)
        return digest.hexdigest(), messages

    with ThreadPoolExecutor(count) as pool:
        followers = [pool.submit(follow) for _ in range(count)]
        for _ in followers:
            ready.acquire()
        print("ready", flush=True)
        results = [follower.result() for follower in followers]
    digests, messages = [each[0] for each in results], sum(each[1] for each in results)
    seen = seen._replace(digests=digests, messages=messages)
    print(json.dumps(seen._asdict()), flush=True)


@contextlib.contextmanager
def stalling(service: Service, job_id: str, count: int) -> Iterator[None]:
    """Keep `count` streams of the job open and read only the first message of each.

    A stream stalls once the job has written more than the stream's window holds. By default gRPC
    widens windows to many megabytes and receives all output of a short job, even if the program
    reads nothing. Here the option `bdp_probe` keeps the windows at 64 KiB.
    """
    names = ("server-ca.pem", "client-key.pem", "client.pem")
    credentials = grpc.ssl_channel_credentials(*((CERTS / name).read_bytes() for name in names))
    options = (("grpc.http2.bdp_probe", 0),)
    request = worker_pb.StreamOutputRequest(job_id=job_id)
    token = (("authorization", f"Bearer {service.client.token}"),)
    with grpc.secure_channel(service.address, credentials, options) as channel:
        stub: Any = workerservice_pb2_grpc.WorkerServiceStub(channel)
        streams = [stub.StreamOutput(request, metadata=token) for _ in range(count)]
        for stream in streams:
            next(stream)
        threading.Event().wait(_STALLED_S)
        yield
        for stream in streams:
            stream.cancel()


def bench_followers(service: Service) -> None:
    """Measure the rate of all followers of one running job together; each gets every byte."""
    rates = {}
    for count in _FOLLOWERS:
        size = _SHARED_BYTES // max(count, 4)
        expected = hashlib.blake2b(b"\n" + bytes(size)).hexdigest()
        found = []
        for _ in range(_SHARED_ROUNDS):
            argv = ["head", "-c", str(size), "/dev/zero"]
            with (
                _waiting_job(service, argv) as (job_id, go),
                _following(service, job_id, count) as result,
            ):
                begin = time.perf_counter()
                go()
                followed = result()
                found.append(size * count / (time.perf_counter() - begin) / 1e6)
            if followed.digests != [expected] * count:
                fail("a follower did not get every byte")
        rates[count] = found
    print_heading("Followers of one live job, all byte-exact: rate of all together")
    highest = max(statistics.median(found) for found in rates.values())
    for count, found in rates.items():
        rate = statistics.median(found)
        bar = "#" * round(23 * rate / highest)
        spread = f"{min(found):.0f} to {max(found):.0f}"
        report(f"{count:,} followers", f"{rate:.0f} MB/s", spread, bar)


class JobRun(NamedTuple):
    """What was measured of one job. The times are in seconds since the job began.

    `took_s`: when the job ended. `slowest`: the share of the output that the slowest follower had
    then. `last_s`: when the last follower had all output.
    """

    took_s: float
    slowest: float = 0.0
    last_s: float = 0.0


def _run_job(
    service: Service, argv: Sequence[str], size: int, count: int, *, stalled: bool = False
) -> JobRun:
    """Run a job that writes `size` bytes. Its followers all read, or with `stalled` all do not.

    After its output the job writes the times at which it began and ended.
    """
    timed = 's=$(date +%s%N); "$0" "$@"; e=$(date +%s%N); printf "%020d%020d" $s $e'
    first = 1 + MIB * stalled
    with _waiting_job(service, ["sh", "-c", timed, *argv], first - 1) as (job_id, go):
        progress: list[list[tuple[float, int]]] = []
        if stalled:
            with stalling(service, job_id, count):
                go()
                stamps = b"".join(service.client.stream(job_id, offset=first + size))
        else:
            with _following(service, job_id, count) as result:
                go()
                progress = result().progress
            stamps = b"".join(service.client.stream(job_id, offset=first + size))
    begin, end = int(stamps[:20]) / 1e9, int(stamps[20:]) / 1e9
    if not progress:
        return JobRun(end - begin)
    had = [max((n for t, n in each if t <= end), default=0) for each in progress]
    return JobRun(end - begin, min(had) / size, max(each[-1][0] for each in progress) - begin)


def _beside_streams(client: Client, address: str, call: Callable[[], object]) -> JobRun:
    """Do what `timed` does, while a program reads ten streams of the floor."""
    with start_program(client, "-m", __name__, "--read", address, 10) as program:
        try:
            return timed(call)
        finally:
            program.kill()


def _read(address: str, count: int) -> None:
    with contextlib.closing(Floor(0, address)) as floor, ThreadPoolExecutor(count) as pool:
        list(pool.map(floor.read_stream, [MIB] * count))
        endless = [pool.submit(floor.read_stream, _ENDLESS_BYTES) for _ in range(count)]
        print("ready", flush=True)
        for each in endless:
            each.result()


def timed(call: Callable[[], object]) -> JobRun:
    """Return how long the call takes, as a run without followers."""
    return JobRun(seconds(call))


def bench_job_rate(service: Service, floor: Floor) -> None:
    """Measure the rate at which a job writes, with one follower, with ten and with 100 stalled.

    Streams take processors from a job whoever sends them. So the rate into the plain pipe is also
    measured while a bare gRPC server sends ten streams.
    """
    print_heading("A job's own rate / its rate into a plain pipe to cat >file")
    for what, argv, size in (
        ("lines", _python(_MAKE_LINES, _LINES_BYTES), _LINES_BYTES),
        ("as fast as it can", ["head", "-c", str(_ZEROS_BYTES), "/dev/zero"], _ZEROS_BYTES),
    ):
        run = functools.partial(_run_job, service, argv, size)
        cat = functools.partial(through_cat, argv)
        measures: dict[str, Callable[[], JobRun]] = {
            "1 follower": functools.partial(run, 1),
            "10 followers": functools.partial(run, 10),
            "100 that do not read": functools.partial(run, 100, stalled=True),
            _BESIDE: functools.partial(_beside_streams, service.client, floor.address, cat),
            "floor": functools.partial(timed, cat),
        }
        report_job_runs(what, in_turn(measures, _JOB_ROUNDS), size)


def report_job_runs(what: str, found: dict[str, list[JobRun]], size: int) -> None:
    """Report the runs of a job of `size` bytes: rates against those of "floor"; ten followers."""
    floor_s = [each.took_s for each in found.pop("floor")]
    for who, runs in found.items():
        aim = {"10 followers": ">= 0.5", _BESIDE: ""}.get(who, ">= 0.9")
        _report_rates(f"{what}, {who}", [each.took_s for each in runs], floor_s, size, aim)
    ten = found["10 followers"]
    for when, values, unit in (
        ("the slowest's share when the job ends", [each.slowest for each in ten], ""),
        ("the last has all after", [each.last_s for each in ten], " s"),
        ("the job has ended after", [each.took_s for each in ten], " s"),
    ):
        value = f"{statistics.median(values):.2f}{unit}"
        report(f"  of 10, {when}", value, f"{min(values):.2f} to {max(values):.2f}")


def bench_delay(service: Service, floor: Floor) -> None:
    """Measure the delay of a line, from the write of a quiet job to each follower.

    The floor is a bare gRPC server that makes the lines itself and sends each on as many streams.
    """

    def of_job(count: int, lines: int, pause_s: float) -> list[float]:
        argv = _python(_MAKE_STAMPS, lines, pause_s)
        with (
            _waiting_job(service, argv) as (job_id, go),
            _following(service, job_id, count) as result,
        ):
            go()
            return result().delays_s

    def of_floor(count: int, lines: int, pause_s: float) -> list[float]:
        with _followers(service.client, floor.address, count) as result:
            floor.tell(lines, pause_s)
            return result().delays_s

    print_heading("Delay of a line from the job's write to the follower / the same of bare gRPC")
    for count, (lines, pause_s) in _DELAYS.items():
        found = in_turn(
            {
                "job": functools.partial(of_job, count, lines, pause_s),
                "floor": functools.partial(of_floor, count, lines, pause_s),
            },
            _DELAY_ROUNDS,
        )
        # If a line arrives in one message with the line before, its delay is not known.
        expected = count * lines * _DELAY_ROUNDS
        alone = {name: sum(map(len, rounds)) for name, rounds in found.items()}
        for percent, aim in (50, ""), (99, "<= 1.5"):
            job, bare = (
                [percentile(delays, percent) for delays in found[name]] for name in ("job", "floor")
            )
            detail = f"{ms(job, 1)} / {ms(bare, 1)}"
            report_ratio(f"{count:,} followers, p{percent}", job, bare, detail, aim)
        if alone != {"job": expected, "floor": expected}:
            report("  of these lines came alone", f"{alone['job'] / expected:.0%}")


def bench_merging(service: Service, _floor: Floor) -> None:
    """Measure how many messages a follower gets for 10,000 writes per second of 10 bytes each."""
    argv = _python(_MAKE_TINY_WRITES, _TINY_WRITES_S)
    with _waiting_job(service, argv) as (job_id, go), _following(service, job_id, 1) as result:
        before = cpu_s(service.pid)
        go()
        messages = result().messages
        used = cpu_s(service.pid) - before
    report(
        "10,000 tiny writes per second",
        f"{messages / _TINY_WRITES_S:.0f} /s",
        "messages to the follower",
        f"server CPU {used / _TINY_WRITES_S:.0%}",
    )


# --- silence ------------------------------------------------------------------------------


class _Held(NamedTuple):
    server: int  # bytes
    fork_server: int
    threads: int
    descriptors: int

    @classmethod
    def by(cls, service: Service) -> _Held:
        server, fork_server = map(memory_bytes, service.processes)
        return cls(server, fork_server, service.threads, len(os.listdir(f"/proc/{service.pid}/fd")))


def bench_silence(service: Service, floor: Floor) -> None:
    """Measure the CPU and the memory that sleeping jobs and silent followers take.

    The floor is a bare gRPC server with one silent connection.
    """
    client = service.client
    first = client.start("sh", ["-c", "echo; exec sleep 1000000"])
    next(client.stream(first))
    held = [_Held.by(service)]
    for _ in range(_SILENT):
        client.start("sleep", ["1000000"])
    held.append(_Held.by(service))
    followers = [client.stream(first) for _ in range(_SILENT)]
    for follower in followers:
        next(follower)  # returns once this follower is subscribed
    held.append(_Held.by(service))
    floor.unary()

    def used_s() -> tuple[float, float]:
        return sum(map(cpu_s, service.processes)), cpu_s(floor.pid)

    before = used_s()
    threading.Event().wait(_SILENCE_S)
    ours, bare = (b - a for a, b in zip(before, used_s(), strict=True))
    print_heading(f"{_SILENT:,} silent followers and {_SILENT:,} sleeping jobs")
    report(
        f"CPU of server and fork server over {_SILENCE_S:.0f} s",
        f"{ours / _SILENCE_S:.2%}",
        "",
        f"{ours:.2f} s",
        "<= 0.5 %",
    )
    report("(a bare gRPC server, meanwhile)", f"{bare / _SILENCE_S:.2%}", "", f"{bare:.2f} s")
    for what, old, new, aim in (
        ("a job", held[0], held[1], ""),
        ("a follower", held[1], held[2], "<= 64 KiB"),
    ):
        each = [(b - a) / _SILENT for a, b in zip(old, new, strict=True)]
        kib = [size / 1024 for size in each[:2]]
        report(
            f"{what} costs",
            f"{sum(kib):.1f} KiB",
            f"{kib[0]:.1f} server, {kib[1]:.1f} fork server",
            f"{each[2]:.2f} threads, {each[3]:.2f} fds",
            aim,
        )
    for follower in followers:
        follower.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--follow", nargs="+", metavar=("ADDRESS", "COUNT"))
    group.add_argument("--read", nargs=2, metavar=("ADDRESS", "COUNT"))
    arguments = parser.parse_args()
    address, count, *job_id = arguments.follow or arguments.read
    if arguments.read:
        _read(address, int(count))
    else:
        _follow(address, int(count), *job_id)
