"""The floors of the benchmark: a gRPC server that does nothing, and starts by hand.

The server has the TLS settings, the options and the message size of job-worker's server. A start
by hand is the cheapest safe start of a process. It needs no server and no messages: a small program
with one thread forks. The started process is like a job's: it has its own cgroup, runs as another
user and has the limits of a job.

    python -m bench.floor       # the server
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from bench import harness  # isort: skip -- before grpc

import grpc

import server
import workerservice_pb2 as worker_pb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["HAND_STEPS", "ByHand", "Floor"]

_MESSAGE_BYTES = 256 * 1024
_MAX_STREAMS = 1100

_BY_HAND = """
import json, os, socket, sys, time
here, jobs, way, uid = sys.argv[1:]
sys.path.insert(0, here)
import inherited, leader

def fork(name, argv):
    uid_, cgroup = json.loads(uid), None
    argv = [word.encode() for word in argv]
    output, out = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    times = [time.perf_counter()]
    if jobs:
        os.mkdir(f"{jobs}/{name}")
    times.append(time.perf_counter())
    if jobs:
        cgroup = os.open(f"{jobs}/{name}", os.O_RDONLY | os.O_DIRECTORY)
    times.append(time.perf_counter())
    program = leader.Program(argv, {}, [argv[0]], uid_)

    def child(procs):
        try:
            leader.detach(out, [theirs.fileno(), *([] if procs is None else [procs])])
            if procs is not None:
                os.write(procs, b"0")
            leader.execute(program)
        finally:
            os._exit(127)

    pid, pidfd = (leader.clone if way == "clone3" else leader.popen)(cgroup, child)
    times.append(time.perf_counter())
    theirs.close()
    return name, pid, ours, [output, out, pidfd, *([cgroup] if jobs else [])], times

def await_exec(name, pid, ours, fds, times):
    assert ours.recv(1) == b""  # closed by the exec
    times.append(time.perf_counter())

def has_ended(pid, options):
    found, status = os.waitpid(pid, options)
    assert status == 0
    return found == pid

def clean_up(name, pid, ours, fds, times):
    ours.close()
    for fd in fds:
        os.close(fd)
    if jobs:
        os.rmdir(f"{jobs}/{name}")

def start(name, argv, read):
    process = _, pid, _, (output, *_), times = fork(name, argv)
    await_exec(*process)
    if read:
        assert os.read(output, 1)
        times.append(time.perf_counter())
    assert has_ended(pid, 0)
    clean_up(*process)
    return [end - begin for begin, end in zip(times, times[1:])]

def start_many(count, at_once, argv):
    begin = time.perf_counter()
    executing, running = [], []
    for i in range(count):
        executing.append(fork(f"by-hand-{os.getpid()}-{i}", argv))
        if len(executing) == at_once or i == count - 1:
            for process in executing:
                await_exec(*process)
            running += executing
            executing = []
        for process in running[:]:
            if has_ended(process[1], os.WNOHANG):
                clean_up(*process)
                running.remove(process)
    took = time.perf_counter() - begin
    for process in running:
        assert has_ended(process[1], 0)
        clean_up(*process)
    return took

os.chdir("/")
inherited.set_signals()
for line in sys.stdin:
    count, gap, argv, read, at_once = json.loads(line)
    answer = []
    if at_once:
        answer = start_many(count, at_once, argv)
    else:
        for i in range(count):
            time.sleep(gap)
            answer.append(start(f"by-hand-{os.getpid()}-{i}", argv, read))
    print(json.dumps(answer), flush=True)
"""
HAND_STEPS = ("make the cgroup", "open it", "fork", "child, to its exec")


class ByHand:
    """The program that starts processes by hand.

    `way`: "clone3", or "popen" for `subprocess.Popen` with a `preexec_fn`. `jobs`: the cgroup in
    which each process gets a cgroup; None for no cgroups. `uid`: the user of the processes; None
    for the user of this program.
    """

    def __init__(self, way: str, jobs: Path | None, uid: int | None) -> None:
        arguments = (str(harness.HERE), str(jobs or ""), way, json.dumps(uid))
        self._process = subprocess.Popen(
            [sys.executable, "-E", "-s", "-S", "-c", _BY_HAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        count: int,
        argv: Sequence[str] = ("/bin/true",),
        *,
        gap_s: float = 0.0,
        first_byte: bool = False,
    ) -> list[list[float]]:
        """Start `count` processes one after the other; return for each the seconds of its steps.

        Each process ends before the next one starts; the wait for the end is not measured. `gap_s`:
        the pause before each start. With `first_byte` there is one more step, the wait for the
        first byte of output.
        """
        steps: list[list[float]] = self._ask(count, gap_s, argv, first_byte, 0)
        return steps

    def start_many(self, count: int, at_once: int) -> float:
        """Start `count` processes without waiting for their ends; return the seconds in all.

        After every `at_once` forks the program waits until these processes have executed.
        """
        took: float = self._ask(count, 0, ("/bin/true",), False, at_once)
        return took

    def _ask(self, *request: object) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("both are pipes")
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the program."""
        self._process.communicate()


class Floor:
    """A client of the floor's server. The server is the process `pid` and listens on `address`."""

    def __init__(self, pid: int, address: str) -> None:
        self.pid = pid
        self.address = address
        names = ("server-ca.pem", "client-key.pem", "client.pem")
        contents = ((harness.CERTS / name).read_bytes() for name in names)
        self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*contents))
        self._unary: Any = self._channel.unary_unary("/Floor/Unary")
        self._stream: Any = self._channel.unary_stream(
            "/Floor/Stream", response_deserializer=worker_pb.StreamOutputResponse.FromString
        )
        self._tell: Any = self._channel.unary_unary("/Floor/Tell")
        self._lines: Any = self._channel.unary_stream(
            "/Floor/Lines", response_deserializer=worker_pb.StreamOutputResponse.FromString
        )
        self._stream_file: Any = self._channel.unary_stream(
            "/Floor/StreamFile", response_deserializer=worker_pb.StreamOutputResponse.FromString
        )

    def unary(self) -> None:
        """Make a call. The request and the answer are empty."""
        self._unary(b"")

    def read_stream(self, size: int) -> int:
        """Read a stream of `size` bytes in messages of 256 KiB; return how many bytes came."""
        return sum(len(message.data) for message in self._stream(str(size).encode()))

    def read_file(self, path: str) -> int:
        """Read a stream of the content of a file on the server; return how many bytes came."""
        return sum(len(message.data) for message in self._stream_file(path.encode()))

    def tell(self, lines: int, pause_s: float) -> None:
        """Make the server send lines to all streams of `lines`, then end these streams.

        `pause_s`: the pause before each line.
        """
        self._tell(json.dumps([lines, pause_s]).encode())

    def lines(self) -> Iterator[bytes]:
        """Follow the server's lines. The first is empty; each other line is the time of sending."""
        return (message.data for message in self._lines(b""))

    def close(self) -> None:
        """Disconnect."""
        self._channel.close()


class _Lines:
    """Sends lines to many streams. The thread of each stream waits on a queue of its own."""

    def __init__(self) -> None:
        # Guards _queues. Never held while a stream waits.
        self._lock = threading.Lock()
        self._queues: list[SimpleQueue[bytes]] = []

    def stream(self, _request: bytes, _context: grpc.ServicerContext) -> Iterator[Any]:
        queue: SimpleQueue[bytes] = SimpleQueue()
        with self._lock:
            self._queues.append(queue)
        line = b"\n"
        while line:
            yield worker_pb.StreamOutputResponse(data=line)
            line = queue.get()

    def tell(self, request: bytes, _context: grpc.ServicerContext) -> bytes:
        lines, pause_s = json.loads(request)
        with self._lock:
            queues, self._queues = self._queues, []
        for _ in range(lines):
            time.sleep(pause_s)
            line = b"%d\n" % time.monotonic_ns()
            for queue in queues:
                queue.put(line)
        for queue in queues:
            queue.put(b"")
        return b""


def _serve() -> None:
    lines = _Lines()
    message = worker_pb.StreamOutputResponse(data=bytes(_MESSAGE_BYTES))
    serialize = worker_pb.StreamOutputResponse.SerializeToString

    def stream(request: bytes, _: grpc.ServicerContext) -> Iterator[Any]:
        count, rest = divmod(int(request), _MESSAGE_BYTES)
        yield from itertools.repeat(message, count)
        if rest:
            yield worker_pb.StreamOutputResponse(data=bytes(rest))

    def stream_file(request: bytes, _: grpc.ServicerContext) -> Iterator[Any]:
        with open(request, "rb", buffering=0) as file:
            while data := file.read(_MESSAGE_BYTES):
                yield worker_pb.StreamOutputResponse(data=data)

    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(lambda _request, _context: b""),
        "Tell": grpc.unary_unary_rpc_method_handler(lines.tell),
        "Lines": grpc.unary_stream_rpc_method_handler(lines.stream, response_serializer=serialize),
        "Stream": grpc.unary_stream_rpc_method_handler(stream, response_serializer=serialize),
        "StreamFile": grpc.unary_stream_rpc_method_handler(
            stream_file, response_serializer=serialize
        ),
    }
    floor = grpc.server(ThreadPoolExecutor(_MAX_STREAMS), options=server.GRPC_OPTIONS)
    floor.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Floor", handlers),))
    harness.run_floor(floor)


if __name__ == "__main__":
    _serve()
