"""Measures what streams and overload cost, against floors, in one run; see `bench.py`.

python bench_stream.py [PART ...]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench  # isort: skip -- before grpc
from bench import (
    _CERTS,
    _HERE,
    _MIB,
    _UNHINDERED,
    _children,
    _cpu_s,
    _Floor,
    _report,
    _running,
    _times,
)
from client import Client, ClientError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_ROUNDS = 7
_JOB_BYTES = 256 * _MIB
_LINES_BYTES = 64 * _MIB
_FOLLOWERS = (1, 10, 100, 1000)
_SHARED_BYTES = 1024 * _MIB  # of all followers together
_DELAY_LINES = 30
_DELAY_MESSAGES_PER_S = 1000  # to all followers together; far more cannot be sent here
_TINY_WRITES_S = 3
_SILENCE_S = 30.0
_SILENT = 1000
_LINE_BYTES = 4096  # no chunk of lines of stamps is longer

# A job of a realistic rate: makes lines, as a compiler or a test run does, and no faster.
_MAKE_LINES = """
import sys
for number in range(int(sys.argv[1]) // 64):
    sys.stdout.write(f"{number:062d}.\\n")
"""
_MAKE_STAMPS = """
import sys, time
for _ in range(int(sys.argv[1])):
    time.sleep(float(sys.argv[2]))
    sys.stdout.buffer.write(b"%d\\n" % time.monotonic_ns())
    sys.stdout.buffer.flush()
"""
# 10,000 writes per second for so many seconds, in bursts of a millisecond.
_MAKE_TINY_WRITES = """
import os, sys, time
start = time.monotonic()
for number in range(1, int(sys.argv[1]) * 10_000 + 1):
    os.write(1, b"%09d\\n" % number)
    if number % 10 == 0:
        time.sleep(max(0, start + number / 10_000 - time.monotonic()))
"""


def _python(program: str, *arguments: object) -> list[str]:
    # Not the one of this program, which the user that jobs run as may not get at.
    return ["/usr/bin/python3", "-c", program, *map(str, arguments)]


# --- one follower -------------------------------------------------------------------------


def _bench_end_to_end(client: Client, floor: _Floor) -> None:
    """From a job's write to the client's read, against the same bytes through cat to a file."""
    jobs = {
        "as fast as it can": (["head", "-c", str(_JOB_BYTES), "/dev/zero"], _JOB_BYTES),
        "making lines": (_python(_MAKE_LINES, _LINES_BYTES), _LINES_BYTES),
    }
    for what, (argv, size) in jobs.items():
        job = argv

        def follow(job: Sequence[str] = job, size: int = size) -> None:
            _check(sum(map(len, client.stream(client.start(job[0], job[1:])))) == size)

        rounds = _in_turn(follow, lambda job=job: _through_cat(job))  # type: ignore[misc]
        ours, theirs = map(statistics.median, zip(*rounds, strict=True))
        _report(
            f"job {what} to client, against cat > file",
            [their / our for our, their in rounds],
            f"{size / ours / 1e6:.0f} MB/s / {size / theirs / 1e6:.0f} MB/s",
        )
    argv = jobs["as fast as it can"][0]
    rounds = _in_turn(floor.read_stream, lambda: _through_cat(argv))
    _report(
        "(a bare gRPC stream, against the same cat > file)",
        [their / our for our, their in rounds],
        "the most there can be of the first",
    )


def _through_cat(argv: Sequence[str]) -> None:
    with tempfile.NamedTemporaryFile() as file:
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as job:
            subprocess.run(["cat"], stdin=job.stdout, stdout=file, check=True)
        _check(job.returncode == 0)


def _in_turn(*calls: Callable[[], object]) -> list[list[float]]:
    """Let the calls take turns; return how many seconds each took in each round."""
    rounds = [[_times(call, 1)[0] for call in calls] for _ in range(_ROUNDS + 1)]
    return rounds[1:]  # the first warms up


def _check(right: bool) -> None:
    if not right:
        sys.exit("bench: the stream is not complete")


# --- many followers -----------------------------------------------------------------------


@contextlib.contextmanager
def _following(client: Client, address: str, job_id: str, count: int) -> Iterator[Any]:
    """Have a process of its own follow the job `count` times; yield what waits for its report.

    It is ready when all of them are subscribed.
    """
    token = {"JOBWORKER_TOKEN": client.token}
    with subprocess.Popen(
        [sys.executable, __file__, "--follow", address, job_id, str(count)],
        env=os.environ | token,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        output = process.stdout
        _check(output is not None and output.readline() == "ready\n")
        yield lambda: output.readline().split() if output else []


def _follow(address: str, job_id: str, count: int) -> None:
    """Read the job's output `count` times at once; report what was read and how late."""
    ready = threading.Semaphore(0)
    digests: list[str] = []
    delays: list[int] = []
    messages = 0

    def follow() -> None:
        nonlocal messages
        stream = client.stream(job_id)
        digest = hashlib.blake2b(next(stream))
        ready.release()
        for chunk in stream:
            now = time.monotonic_ns()
            digest.update(chunk)
            messages += 1
            if len(chunk) < _LINE_BYTES and chunk.endswith(b"\n"):
                stamp = chunk.split()[-1]
                if stamp.isdigit():
                    delays.append(now - int(stamp))
        digests.append(digest.hexdigest())

    with Client(address, certs=_CERTS, token=os.environ["JOBWORKER_TOKEN"]) as client:
        threads = [threading.Thread(target=follow) for _ in range(count)]
        for thread in threads:
            thread.start()
        for _ in threads:
            ready.acquire()
        print("ready", flush=True)
        for thread in threads:
            thread.join()
    delays.sort()
    p50, p99 = (delays[len(delays) * p // 100] if delays else 0 for p in (50, 99))
    print(len(set(digests)), len(digests), digests[0], messages, p50, p99, flush=True)


@contextlib.contextmanager
def _gate() -> Iterator[Path]:
    """A file that jobs, which are another user, wait for; it does not exist yet."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory, "go")


def _start_at(client: Client, go: Path, argv: Sequence[str]) -> str:
    """Start a job that says something, waits for the file and then executes `argv`."""
    script = 'echo; until [ -e "$0" ]; do sleep 0.05; done; exec "$@"'
    return client.start("sh", ["-c", script, str(go), *argv])


def _bench_followers(client: Client, address: str) -> None:
    """Many followers of one live job: byte-exact, and how fast together."""
    for count in _FOLLOWERS:
        size = _SHARED_BYTES // max(count, 4)
        expected = hashlib.blake2b(b"\n" + bytes(size)).hexdigest()
        rates = []
        for _ in range(3):
            with _gate() as go:
                job_id = _start_at(client, go, ["head", "-c", str(size), "/dev/zero"])
                with _following(client, address, job_id, count) as report:
                    start = time.perf_counter()
                    go.touch()
                    kinds, ended, digest, *_ = report()
                    seconds = time.perf_counter() - start
            _check((kinds, ended, digest) == ("1", str(count), expected))
            rates.append(size * count / seconds / 1e6)
        print(
            f"{count:5} followers, all byte-exact{statistics.median(rates):10.0f} MB/s together",
            flush=True,
        )


def _bench_job_rate(client: Client, address: str) -> None:
    """How fast a job writes while it is followed, against a plain pipe to cat > file."""
    jobs = {
        "as fast as it can": (["head", "-c", str(_JOB_BYTES), "/dev/zero"], _JOB_BYTES),
        "making lines": (_python(_MAKE_LINES, _LINES_BYTES), _LINES_BYTES),
    }
    for what, (argv, size) in jobs.items():
        for count in (0, 1, 10, 100):
            rounds = [
                (_job_s(client, address, argv, count), _times(partial(_through_cat, argv), 1)[0])
                for _ in range(5 + 1)
            ][1:]  # the first warms up
            ours, theirs = map(statistics.median, zip(*rounds, strict=True))
            _report(
                f"rate of a job {what}, {count} followers",
                [their / our for our, their in rounds],
                f"{size / ours / 1e6:.0f} MB/s / {size / theirs / 1e6:.0f} MB/s",
            )


def _job_s(client: Client, address: str, argv: Sequence[str], count: int) -> float:
    """How long the job's command takes, while `count` followers read."""
    with _gate() as go, contextlib.ExitStack() as stack:
        script = (
            'echo; until [ -e "$0" ]; do sleep 0.02; done; '
            's=$(date +%s%N); "$@"; e=$(date +%s%N); printf "%020d" $((e-s))'
        )
        job_id = client.start("sh", ["-c", script, str(go), *argv])
        report = None
        if count:
            report = stack.enter_context(_following(client, address, job_id, count))
        go.touch()
        # Past its output, so that nothing is read until it has ended.
        with contextlib.suppress(ClientError):
            list(client.stream(job_id, offset=1 << 40))
        size = client.status(job_id).output_bytes
        tail = b"".join(client.stream(job_id, offset=size - 20))
        if report:
            report()
    return int(tail) / 1e9


def _bench_delay(client: Client, address: str) -> None:
    """From a job's write of a line to the followers' having it."""
    for count in (1, 100, 1000):
        pause_s = max(0.1, count / _DELAY_MESSAGES_PER_S)
        argv = _python(_MAKE_STAMPS, _DELAY_LINES, pause_s)
        with _gate() as go:
            job_id = _start_at(client, go, argv)
            with _following(client, address, job_id, count) as report:
                go.touch()
                kinds, _, _, _, p50, p99 = report()
            _check(kinds == "1")
        print(
            f"delay of a line with {count:4} followers: p50 {int(p50) / 1e6:8.2f} ms,"
            f" p99 {int(p99) / 1e6:8.2f} ms",
            flush=True,
        )


def _bench_merging(client: Client, address: str, pid: int) -> None:
    """What 10,000 writes per second cost."""
    argv = _python(_MAKE_TINY_WRITES, _TINY_WRITES_S)
    with _gate() as go:
        job_id = _start_at(client, go, argv)
        with _following(client, address, job_id, 1) as report:
            before = _cpu_s(pid)
            go.touch()
            _, _, _, messages, _, _ = report()
            used = _cpu_s(pid) - before
    print(
        f"10,000 tiny writes per second: {int(messages) / _TINY_WRITES_S:.0f} messages per second, "
        f"server CPU {used / _TINY_WRITES_S * 100:.0f} %"
    )


def _bench_silence(client: Client, pid: int) -> None:
    """What 1,000 sleeping jobs and 1,000 silent followers cost."""

    def cost() -> tuple[int, int, int]:
        processes = [pid, *_children(pid)]
        return (
            sum(_pss_bytes(p) for p in processes[:2]),
            len(os.listdir(f"/proc/{pid}/task")),
            len(os.listdir(f"/proc/{pid}/fd")),
        )

    first = client.start("sh", ["-c", "echo; exec sleep 1000"])
    next(client.stream(first))
    spawner = _children(pid)[0]
    processes = [pid, spawner]
    a = cost()
    jobs = [client.start("sleep", ["1000"]) for _ in range(_SILENT)]
    b = cost()
    followers = [client.stream(first) for _ in range(_SILENT)]
    for follower in followers:
        next(follower)
    c = cost()
    before = sum(map(_cpu_s, processes))
    time.sleep(_SILENCE_S)
    used = sum(map(_cpu_s, processes)) - before
    share = used / _SILENCE_S * 100
    print(f"CPU of {_SILENT} silent followers and as many sleeping jobs: {share:.2f} %")
    for what, x, y in (("job", a, b), ("follower", b, c)):
        memory, threads, fds = ((q - p) / _SILENT for p, q in zip(x, y, strict=True))
        print(f"each {what}: {memory / 1024:.1f} KiB, {threads:.2f} threads, {fds:.2f} descriptors")
    for follower in followers:
        follower.close()
    for job in jobs:
        client.stop(job)
    client.stop(first)


# --- overload -----------------------------------------------------------------------------

_LOADERS = 4  # processes
_LOADER_THREADS = 4
_LOAD_S = 3.0


def _bench_overload(client: Client, address: str) -> None:
    """Calls at twice the rate that can be served, and at half of it before and after."""
    for what, job_id in (("Status", client.start("true")), ("Start", "-")):
        load = partial(_load, client, address, job_id)
        load(rate=0)  # warms up
        served = load(rate=0)["OK"]
        rate = len(served) / _LOAD_S
        clients = _LOADERS * _LOADER_THREADS
        print(f"{what}: {rate:.0f}/s, by {clients} clients that wait for their answers")
        for name, share in (("half", 0.5), ("twice", 2), ("half again", 0.5)):
            outcomes = load(rate=rate * share)
            counts = {code: len(times) for code, times in outcomes.items()}
            print(
                f"  at {name} of that: {counts}; "
                f"served {_percentiles(outcomes['OK'])}; "
                f"refused {_percentiles(outcomes.get('RESOURCE_EXHAUSTED', []))}",
                flush=True,
            )


def _percentiles(times: Sequence[float]) -> str:
    return f"p50 {_ms(times, 50)} p99 {_ms(times, 99)}"


def _ms(times: Sequence[float], percent: int) -> str:
    return f"{sorted(times)[len(times) * percent // 100] * 1e3:.1f} ms" if times else "-"


def _load(client: Client, address: str, job_id: str, *, rate: float) -> dict[str, list[float]]:
    """Have processes make calls, `rate` per second together, or as many as they get answered.

    Returns how long each took, by status.
    """
    command = [sys.executable, __file__, "--load", address, job_id, str(rate / _LOADERS)]
    environment = os.environ | {"JOBWORKER_TOKEN": client.token}
    loaders = [
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(_LOADERS)
    ]
    times: dict[str, list[float]] = {"OK": []}
    for loader in loaders:
        _check(loader.stdout is not None and loader.stdout.readline() == "ready\n")
    for loader in loaders:
        print(file=loader.stdin, flush=True)
    for loader in loaders:
        with loader:
            for line in loader.stdout or ():
                code, seconds = line.split()
                times.setdefault(code, []).append(float(seconds))
    return times


def _make_load(address: str, job_id: str, rate: float) -> None:
    """Call when told to; print the status of each call and how long it took."""
    times: list[tuple[str, float]] = []
    with Client(address, certs=_CERTS, token=os.environ["JOBWORKER_TOKEN"]) as client:
        if job_id == "-":
            method = client._worker.StartJob
            request: Any = client._worker_pb.StartJobRequest(command="/bin/true")
        else:
            method = client._worker.GetJobStatus
            request = client._worker_pb.GetJobStatusRequest(job_id=job_id)
        client.list()  # connects
        call = partial(method.future, request, metadata=client._metadata(), timeout=30)
        print("ready", flush=True)
        sys.stdin.readline()
        if rate:
            _call_at(call, rate, times)
        else:
            threads = [
                threading.Thread(target=_call_in_turn, args=(call, times))
                for _ in range(_LOADER_THREADS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    for code, seconds in times:
        print(code, seconds)


def _call_at(call: Callable[[], Any], rate: float, times: list[tuple[str, float]]) -> None:
    """Call `rate` times per second, whether there are answers or not; wait for all of them."""
    ended = threading.Semaphore(0)

    def note(answer: Any, since: float) -> None:
        times.append((answer.code().name, time.monotonic() - since))
        ended.release()

    start = time.monotonic()
    answers = []  # one that nobody holds is cancelled
    for number in range(int(rate * _LOAD_S)):
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        since = time.monotonic()
        answers.append(call())
        answers[-1].add_done_callback(partial(note, since=since))
    for _ in answers:
        ended.acquire()


def _call_in_turn(call: Callable[[], Any], times: list[tuple[str, float]]) -> None:
    end = time.monotonic() + _LOAD_S
    while (since := time.monotonic()) < end:
        code = call().code().name  # blocks
        times.append((code, time.monotonic() - since))


def _pss_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("\nPss:")[2].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--follow", nargs=3, metavar=("ADDRESS", "JOB", "COUNT"))
    parser.add_argument("--load", nargs=3, metavar=("ADDRESS", "JOB", "RATE"))
    parser.add_argument("--server", default=str(_HERE / "server.py"))
    parser.add_argument("parts", nargs="*")
    arguments = parser.parse_args()
    if arguments.load:
        address, job_id, rate = arguments.load
        _make_load(address, job_id, float(rate))
        return
    if arguments.follow:
        address, job_id, count = arguments.follow
        _follow(address, job_id, int(count))
        return
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory())
        config = Path(state, "config.toml")
        more = '[per_user]\nrunning_jobs = "unlimited"\nstreams = "unlimited"'
        config.write_text(_UNHINDERED.replace("[per_user]", more))
        options = ("--listen", "127.0.0.1:0", "--limits", "off", "--state-dir", state)
        pid, address = stack.enter_context(
            _running(arguments.server, *options, "--config", str(config))
        )
        _, floor_address = stack.enter_context(_running(bench.__file__, "--floor"))
        client = stack.enter_context(Client(address, certs=_CERTS))
        client.login("admin", "admin")
        floor = stack.enter_context(contextlib.closing(_Floor(floor_address)))
        parts: dict[str, Callable[[], None]] = {
            "stream": lambda: bench._bench_stream(client, floor),
            "end": lambda: _bench_end_to_end(client, floor),
            "rate": lambda: _bench_job_rate(client, address),
            "followers": lambda: _bench_followers(client, address),
            "delay": lambda: _bench_delay(client, address),
            "merge": lambda: _bench_merging(client, address, pid),
            "overload": lambda: _bench_overload(client, address),
            "silence": lambda: _bench_silence(client, pid),
        }
        for name, part in parts.items():
            if not arguments.parts or name in arguments.parts:
                part()


if __name__ == "__main__":
    main()
