"""What the parts of the benchmark share: rounds, ratios, the table, the measured programs.

Machines differ and are noisy. The figures to quote are therefore ratios. In each round a measure
and its floor take turns, and each round gives one ratio. The table shows the median, the lowest
and the highest ratio of the rounds. The noise is the distance between the quartiles of these
ratios, as a share of their median. If the noise is above `NOISE_MAX`, the median is not printed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import server  # noqa: F401 -- before grpc: this module sets the TLS versions that grpc may use
from client import Client
from tls import Certificates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import grpc

__all__ = [
    "CERTS",
    "HERE",
    "MIB",
    "NOISE_MAX",
    "ROUNDS",
    "UNHINDERED",
    "Ratio",
    "Service",
    "children",
    "cpu_s",
    "fail",
    "in_turn",
    "memory_bytes",
    "ms",
    "percentile",
    "print_heading",
    "report",
    "report_ratio",
    "run_floor",
    "running",
    "sampled",
    "seconds",
    "serving",
    "settle",
    "start_program",
    "times",
]

HERE = Path(__file__).resolve().parent.parent
CERTS = HERE / "certs"
MIB = 1024 * 1024
ROUNDS = 7
# With at most this noise, the median of seven rounds is right to about a tenth.
NOISE_MAX = 0.3
_SETTLED_S = 1.0

# Without this configuration the benchmark would reach the ceilings of rate and output. Callers may
# append settings to the last table.
UNHINDERED = """
[per_user]
running_jobs = "unlimited"
starts_per_second = "unlimited"
kept_output = "unlimited"
[in_all]
running_jobs = "unlimited"
starts_per_second = "unlimited"
kept_output = "unlimited"
[per_job]
kept_output = "unlimited"
[retention]
jobs = "unlimited"
"""

# Runs the server with so many additional objects in memory.
_WITH_HEAP = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import server
ballast = [[str(number)] * 20 for number in range(int(sys.argv[1]))]
sys.exit(server.main(sys.argv[2:]))
"""
_OBJECT_BYTES = 270
# Two servers that run at the same time may not have the same uids.
_UIDS = 10_000
_first_uids = itertools.count(100_000, _UIDS)

_T = TypeVar("_T")


def fail(what: str) -> NoReturn:
    """End the benchmark, because something is broken and not only slow."""
    sys.exit(f"bench: {what}")


# --- measuring --------------------------------------------------------------------------


def times(call: Callable[[], object], count: int) -> list[float]:
    """Make `count` calls; return the seconds that each call took, in order."""
    return [seconds(call) for _ in range(count)]


def seconds(call: Callable[[], object]) -> float:
    """Make the call; return the seconds that the call took."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest of `values` that at least `percent` % of `values` do not exceed."""
    if not values:
        raise ValueError("no values")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


def in_turn(measures: Mapping[str, Callable[[], _T]], rounds: int = ROUNDS) -> dict[str, list[_T]]:
    """Let the measures take turns; return the results of each measure, one for each round.

    A first round, without results, warms up. Every other round has the reverse order, so that no
    measure always follows the same one.
    """
    found: dict[str, list[_T]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name in list(measures)[:: -1 if number % 2 else 1]:
            result = measures[name]()
            if number:
                found[name].append(result)
    return found


def sampled(
    measures: Mapping[str, Callable[[], list[float]]], rounds: int = ROUNDS, turns: int = 10
) -> dict[str, list[list[float]]]:
    """Let measures that take a few samples each take turns; return the samples of each round.

    A round has so many `turns` of each measure. If something slows the machine for a second, it
    therefore slows all measures alike.
    """
    found = in_turn(measures, (rounds + 1) * turns)
    return {
        name: [
            [sample for each in samples[begin : begin + turns] for sample in each]
            for begin in range(turns, len(samples), turns)  # the first round warms up, too
        ]
        for name, samples in found.items()
    }


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of a measure to its floor, over all rounds. The module explains `noise`."""

    median: float
    lowest: float
    highest: float
    noise: float

    @classmethod
    def of(cls, measured: Sequence[float], floor: Sequence[float]) -> Ratio:
        """Divide round by round. Raises ValueError if there are fewer than two rounds."""
        ratios = [ours / theirs for ours, theirs in zip(measured, floor, strict=True)]
        if len(ratios) < 2:  # noqa: PLR2004 -- one round has no noise
            raise ValueError("a ratio needs rounds")
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, min(ratios), max(ratios), (upper - lower) / median)

    @property
    def is_too_noisy(self) -> bool:
        """Whether the rounds differ too much for the median to mean anything."""
        return self.noise > NOISE_MAX

    @property
    def value(self) -> str:
        """The median, as the table shows it."""
        return "too noisy" if self.is_too_noisy else f"{self.median:.2f} x"

    @property
    def spread(self) -> str:
        """The lowest and highest ratio and the noise, as the table shows them."""
        return f"{self.lowest:.2f} to {self.highest:.2f}, {self.noise * 100:.0f} %"


def ms(values: Sequence[float], digits: int = 2) -> str:
    """Return the median of `values`, which are in seconds, as a text in milliseconds."""
    return f"{statistics.median(values) * 1e3:.{digits}f} ms"


# --- the table --------------------------------------------------------------------------


def print_heading(title: str) -> None:
    """Print the heading of a part of the table."""
    print(f"\n{title}", flush=True)


def report(what: str, value: str, spread: str = "", detail: str = "", aim: str = "") -> None:
    """Print a line of the table."""
    aim = f"aim {aim}" if aim else ""
    print(f"  {what:<50}{value:>11}  {spread:<21}  {detail:<23}{aim}".rstrip(), flush=True)


def report_ratio(
    what: str, measured: Sequence[float], floor: Sequence[float], detail: str = "", aim: str = ""
) -> None:
    """Print a line with the ratio of a measure to its floor. Both have one value for each round."""
    ratio = Ratio.of(measured, floor)
    report(what, ratio.value, ratio.spread, detail, aim)


# --- the programs -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Service:
    """A running job-worker server. `client`: logged in as admin. `state`: the state directory."""

    pid: int
    address: str
    state: Path
    client: Client

    @property
    def processes(self) -> tuple[int, int]:
        """The pids of the server and of its fork server."""
        (fork_server,) = [
            pid
            for pid in children(self.pid)
            if b"forkserver.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return self.pid, fork_server

    @property
    def threads(self) -> int:
        """The number of the server's threads."""
        return len(os.listdir(f"/proc/{self.pid}/task"))


@contextlib.contextmanager
def running(*command: str) -> Iterator[tuple[int, str]]:
    """Run a Python program that prints its address; yield the program's pid and address."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("listening on "):
            fail(f"{' '.join(command)} did not start; run it to see why")
        try:
            yield process.pid, line.removeprefix("listening on ").strip()
        finally:
            process.terminate()


def run_floor(floor: grpc.Server) -> None:
    """Serve until the benchmark ends, for `running`; with job-worker's own certificates."""
    credentials = Certificates(Path.read_bytes, CERTS).credentials()
    port = floor.add_secure_port("127.0.0.1:0", credentials)
    floor.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def serving(config: str = UNHINDERED, *, heap_bytes: int = 0) -> Iterator[Service]:
    """Run a server with this configuration; it has `heap_bytes` more memory in use."""
    with tempfile.TemporaryDirectory() as name:
        state = Path(name)
        (state / "config.toml").write_text(config)
        first = next(_first_uids)
        uids = ("--uids", f"{first}-{first + _UIDS - 1}")
        options = ("--listen", "127.0.0.1:0", "--limits", "auto", "--state-dir", name, *uids)
        program = [str(HERE / "server.py")]
        if heap_bytes:
            program = ["-c", _WITH_HEAP, str(heap_bytes // _OBJECT_BYTES)]
        with (
            running(*program, *options, "--config", str(state / "config.toml")) as (pid, address),
            Client(address, certs=CERTS) as client,
        ):
            client.login("admin", "admin")
            yield Service(pid, address, state, client)


def start_program(client: Client, *command: object) -> subprocess.Popen[str]:
    """Run a Python program that makes calls with the client's token; wait until it prints "ready".

    The stdin and stdout of the program are pipes.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=HERE,
        env=os.environ | {"JOBWORKER_TOKEN": client.token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.stdout is None or process.stdout.readline() != "ready\n":
        process.kill()
        fail(f"{' '.join(map(str, command))} did not get ready")
    return process


def settle(client: Client) -> None:
    """Wait until all jobs of the client's user have ended, and a second more for the clean-up."""
    from workerservice_pb2 import JOB_STATUS_RUNNING

    for job in client.list():
        if job.status == JOB_STATUS_RUNNING:
            for _ in client.stream(job.job_id):
                pass
    threading.Event().wait(_SETTLED_S)


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    """Return a field of /proc/PID/status (proc(5)), such as VmRSS or VmHWM, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def cpu_s(pid: int) -> float:
    """Return the CPU time that the process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Return the pids of the processes whose parent is `pid`."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path("/proc", name, "stat").read_bytes()
            if int(stat.rpartition(b")")[2].split()[1]) == pid:
                found.append(int(name))
    return found
