"""The server's figures in Prometheus' text format: counters, and what `server status` knows.

    metrics = Metrics()
    metrics.calls.add("StartJob", "OK")
    metrics.queue_s.observe(0.0002)
    print("".join(text_of(metrics, server.status())))

    listener = listen("127.0.0.1:9464")          # or "unix:/run/job-worker/metrics.sock"
    server = http_server(listener, lambda: text_of(metrics, status()))
    server.start()

The package prometheus_client is not needed for this: it is larger than the few lines below. No
label has a name that a client chooses, or the name of a user, so the number of series is bounded.

Thread safety: any thread may call anything.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

from __future__ import annotations

import functools
import re
import resource
import socket
import threading
import time
from bisect import bisect_left
from collections import Counter as Counts
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localserver import LocalServer, bind_unix
from units import join_address, parse_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Counter", "Histogram", "Listener", "Metrics", "http_server", "listen", "text_of"]

_PREFIX = "jobworker_"
_UNIX = "unix:"
_UNIX_MODE = 0o660  # for the group of the file, which a directory with the bit setgid determines
_BACKLOG = 16
# In seconds. A call waits for some 0.1 ms, a start takes some ms.
_BOUNDS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """Counts by the values of its labels. `what`: the text for people."""

    def __init__(self, name: str, what: str, *labels: str) -> None:
        self._name = f"{_PREFIX}{name}_total"
        self._what = what
        self._labels = labels
        # Guards the counts. Reentrant: while a thread holds it, the garbage collector may end an
        # abandoned stream in this thread, and that is counted, too.
        self._lock = threading.RLock()
        self._counts: Counts[tuple[str, ...]] = Counts() if labels else Counts({(): 0})

    def add(self, *values: str, amount: int = 1) -> None:
        """Count `amount` more for these values of the labels."""
        with self._lock:
            self._counts[values] += amount

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        with self._lock:
            counts = sorted(self._counts.items())
        yield from _head(self._name, "counter", self._what)
        for values, count in counts:
            yield _line(self._name, dict(zip(self._labels, values, strict=True)), count)


class Histogram:
    """Counts times in seconds, in ranges from 0.1 ms to 10 s."""

    def __init__(self, name: str, what: str) -> None:
        self._name = f"{_PREFIX}{name}_seconds"
        self._what = what
        # Guards the two below. Reentrant, like that of `Counter`.
        self._lock = threading.RLock()
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one time."""
        place = bisect_left(_BOUNDS_S, seconds)
        with self._lock:
            self._counts[place] += 1
            self._sum_s += seconds

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        with self._lock:
            counts, sum_s = list(self._counts), self._sum_s
        yield from _head(self._name, "histogram", self._what)
        so_far = 0
        for bound, count in zip((*_BOUNDS_S, "+Inf"), counts, strict=True):
            so_far += count
            yield _line(f"{self._name}_bucket", {"le": str(bound)}, so_far)
        yield _line(f"{self._name}_sum", {}, sum_s)
        yield _line(f"{self._name}_count", {}, so_far)


class Metrics:
    """What the server counts while it works. Each attribute is a counter or a histogram."""

    def __init__(self) -> None:
        self.calls = Counter("calls", "Calls that are over, by RPC and gRPC status.", "rpc", "code")
        self.refusals = Counter("refusals", "Calls that were refused or failed.", "reason")
        self.starts = Counter("starts", "Jobs started.")
        self.failed_logins = Counter("failed_logins", "Logins with a wrong name or password.")
        self.output_bytes = Counter("output_sent_bytes", "Bytes of jobs' output sent to clients.")
        self.request_bytes = Counter("received_bytes", "Bytes of requests, input of jobs included.")
        self.queue_s = Histogram("queue", "Time from a call's arrival until it has a thread.")
        self.start_s = Histogram("start", "Time in which a job is started, without the queue.")

    def refused(self, rpc: str, code: str, error: Exception) -> None:
        """Count a call that ended with this error."""
        self.calls.add(rpc, code)
        self.refusals.add(_reason(code, error))
        if (rpc, code) == ("Login", "UNAUTHENTICATED"):
            self.failed_logins.add()

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        for each in vars(self).values():
            yield from each.lines()


def _reason(code: str, error: Exception) -> str:
    """Return a word for the error: the ceiling that it names, or the kind of the error."""
    if code == "INTERNAL":
        return "internal"
    if key := _CEILING.search(str(error)):
        return key[1]
    return _word(type(error).__name__)


_CEILING = re.compile(r"\(((?:per_user|in_all|per_job|requests)\.\w+)\)")


@functools.cache  # there are few kinds of errors
def _word(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name.strip("_").removesuffix("Error")).lower()


# --- the text ---------------------------------------------------------------------------


def text_of(metrics: Metrics, status: Mapping[str, Any]) -> str:
    """Return the whole text: the counters, and what `Server.status` returns."""
    return "".join((*metrics.lines(), *_status_lines(status), *_process_lines()))


def _status_lines(status: Mapping[str, Any]) -> Iterator[str]:
    jobs, streams = status["jobs"], status["streams"]
    yield from _gauge("info", "The version.", ({"version": status["version"]}, 1))
    yield from _gauge("uptime_seconds", "Time since the start.", ({}, status["uptime_s"]))
    yield from _gauge(
        "jobs",
        "Jobs that run, and finished ones that are kept.",
        *(({"status": each}, jobs[each]) for each in ("running", "finished")),
    )
    name = f"{_PREFIX}jobs_ended_total"
    yield from _head(name, "counter", "Jobs that have ended, by the reason.")
    for reason, count in jobs["ended"].items():
        yield _line(name, {"reason": reason}, count)
    yield from _gauge("streams", "Streams that are open.", ({}, streams["open"]))
    for what, ceiling in ("jobs", jobs["ceiling"]), ("streams", streams["ceiling"]):
        if ceiling is not None:
            yield from _gauge(f"{what}_ceiling", f"The most {what} at once.", ({}, ceiling))
    yield from _gauge("users", "Users who may log in.", ({}, status["users"]))
    yield from _gauge("kept_output_bytes", "Output that is kept.", ({}, status["output_bytes"]))
    yield from _gauge(
        "certificate_expiry_timestamp_seconds",
        "When a certificate expires, in seconds since 1970.",
        *(({"file": file}, at) for file, at in status["certificates"].items()),
    )
    for key, what in ("size_bytes", "Size of a disk."), ("free_bytes", "Room left on a disk."):
        samples = (({"path": disk["path"]}, disk[key]) for disk in status["disks"])
        yield from _gauge(f"disk_{key}", what, *samples)
    yield from _gauge("store_bytes", "Size of the store.", ({}, status["store_bytes"]))
    yield from _gauge("problems", "How much does not work now.", ({}, len(status["problems"])))


def _process_lines() -> Iterator[str]:
    """Yield what Prometheus' own clients tell of every process."""
    yield from _head("process_cpu_seconds_total", "counter", "CPU time of the server.")
    yield _line("process_cpu_seconds_total", {}, time.process_time())
    with suppress(OSError, IndexError):
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
        yield from _head("process_resident_memory_bytes", "gauge", "Memory of the server.")
        yield _line("process_resident_memory_bytes", {}, pages * resource.getpagesize())
    yield from _head("process_threads", "gauge", "Threads of the server that run Python.")
    yield _line("process_threads", {}, threading.active_count())


def _gauge(name: str, what: str, *samples: tuple[Mapping[str, str], float]) -> Iterator[str]:
    yield from _head(_PREFIX + name, "gauge", what)
    for labels, value in samples:
        yield _line(_PREFIX + name, labels, value)


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}\n"
    yield f"# TYPE {name} {kind}\n"


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    escaped = {
        label: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for label, text in labels.items()
    }
    inside = ",".join(f'{label}="{text}"' for label, text in escaped.items())
    return f"{name}{{{inside}}} {value}\n" if inside else f"{name} {value}\n"


# --- the socket -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket. `address`: where to find it; `path`: its file, if it has one."""

    socket: socket.socket
    address: str
    path: Path | None = None


def listen(where: str) -> Listener:
    """Listen on HOST:PORT, a loopback address, or on unix:PATH.

    Raises ValueError for an address that others than this host could reach; OSError.
    """
    if where.startswith(_UNIX):
        path = Path(where.removeprefix(_UNIX)).absolute()
        return Listener(bind_unix(path, _UNIX_MODE), f"{_UNIX}{path}", path)
    host, port = parse_address(where)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    if not all(ip_address(str(each[4][0]).partition("%")[0]).is_loopback for each in found):
        raise ValueError(
            f"{where} can be reached from elsewhere, and metrics have no TLS and no password"
        )
    sock = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    bound = join_address(host, sock.getsockname()[1])
    return Listener(sock, f"http://{bound}/metrics")


def http_server(listener: Listener, text: Callable[[], str]) -> LocalServer:
    """Return a server that answers GET /metrics with `text`."""

    def answer(request: bytes) -> bytes:
        method, _, rest = request.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method != b"GET":
            return _response("405 Method Not Allowed", "only GET is served\n")
        if path != b"/metrics":
            return _response("404 Not Found", "the metrics are at /metrics\n")
        return _response("200 OK", text())

    return LocalServer("metrics", listener.socket, answer, end=b"\r\n\r\n", path=listener.path)


def _response(status: str, text: str) -> bytes:
    body = text.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {_TEXT}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body
