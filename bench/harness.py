"""What the parts of the benchmark share: rounds, ratios, the table, the programs measured.

Machines are noisy and differ, so the figures to quote are ratios: what is measured and its
floor take turns, and a ratio is the median over the rounds, with the lowest and the highest
beside it. The noise of a ratio is how far its rounds disagree: the distance between their
quartiles, as a share of their median. A ratio noisier than `NOISE_MAX` is not printed.
"""

from __future__ import annotations

import contextlib
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

import server  # noqa: F401 -- before grpc: it says which TLS that may speak
from client import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

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
# The median of seven rounds is then right to about a tenth.
NOISE_MAX = 0.3
_SETTLED_S = 1.0

# The benchmark is about speed, and would meet the ceilings of rate and output. What it ends
# with can be added to.
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

# The server with that many small objects more, of some 270 bytes each.
_WITH_HEAP = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import server
ballast = [[str(number)] * 20 for number in range(int(sys.argv[1]))]
sys.exit(server.main(sys.argv[2:]))
"""
_OBJECT_BYTES = 270

_T = TypeVar("_T")


def fail(what: str) -> NoReturn:
    """End the benchmark: something is broken, and not just slow."""
    sys.exit(f"bench: {what}")


# --- measuring --------------------------------------------------------------------------


def times(call: Callable[[], object], count: int) -> list[float]:
    """How long each of `count` calls took, in seconds, in their order."""
    return [seconds(call) for _ in range(count)]


def seconds(call: Callable[[], object]) -> float:
    """How long the call took."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` of them do not exceed."""
    if not values:
        raise ValueError("no values")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


def in_turn(measures: Mapping[str, Callable[[], _T]], rounds: int = ROUNDS) -> dict[str, list[_T]]:
    """Let the measures take turns; return what each found in each round.

    One round before that warms up. Every other round goes backwards, so that none always
    comes after the same.
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
    """The same for measures of a few samples each, where a round is that many turns.

    So what slows the machine for a second slows all of them. Returns the samples by round.
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
    """What the rounds say about a ratio. `noise`: see the module."""

    median: float
    lowest: float
    highest: float
    noise: float

    @classmethod
    def of(cls, measured: Sequence[float], floor: Sequence[float]) -> Ratio:
        """Divide round by round. Raises ValueError for less than two rounds."""
        ratios = [ours / theirs for ours, theirs in zip(measured, floor, strict=True)]
        if len(ratios) < 2:  # noqa: PLR2004 -- one tells nothing of noise
            raise ValueError("a ratio needs rounds")
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, min(ratios), max(ratios), (upper - lower) / median)

    @property
    def is_too_noisy(self) -> bool:
        """Whether the median says nothing."""
        return self.noise > NOISE_MAX

    @property
    def value(self) -> str:
        """For the table."""
        return "too noisy" if self.is_too_noisy else f"{self.median:.2f} x"

    @property
    def spread(self) -> str:
        """For the table."""
        return f"{self.lowest:.2f} to {self.highest:.2f}, {self.noise * 100:.0f} %"


def ms(values: Sequence[float], digits: int = 2) -> str:
    """The median of seconds, written in milliseconds."""
    return f"{statistics.median(values) * 1e3:.{digits}f} ms"


# --- the table --------------------------------------------------------------------------


def print_heading(title: str) -> None:
    """Begin a part."""
    print(f"\n{title}", flush=True)


def report(what: str, value: str, spread: str = "", detail: str = "", aim: str = "") -> None:
    """Print a line of the table."""
    aim = f"aim {aim}" if aim else ""
    print(f"  {what:<50}{value:>11}  {spread:<21}  {detail:<23}{aim}".rstrip(), flush=True)


def report_ratio(
    what: str, measured: Sequence[float], floor: Sequence[float], detail: str = "", aim: str = ""
) -> None:
    """Print the ratio of what was measured in each round to what its floor was."""
    ratio = Ratio.of(measured, floor)
    report(what, ratio.value, ratio.spread, detail, aim)


# --- the programs -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Service:
    """A server of ours. `client` is logged in as the admin; `state`: its state directory."""

    pid: int
    address: str
    state: Path
    client: Client

    @property
    def processes(self) -> tuple[int, int]:
        """The server and its fork server."""
        (fork_server,) = [
            pid
            for pid in children(self.pid)
            if b"forkserver.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return self.pid, fork_server

    @property
    def threads(self) -> int:
        """How many the server has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))


@contextlib.contextmanager
def running(*command: str) -> Iterator[tuple[int, str]]:
    """Run a Python program that says where it listens; yield its pid and address."""
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


@contextlib.contextmanager
def serving(config: str = UNHINDERED, *, heap_bytes: int = 0) -> Iterator[Service]:
    """Run a server with that configuration, and that much more memory in use."""
    with tempfile.TemporaryDirectory() as name:
        state = Path(name)
        (state / "config.toml").write_text(config)
        options = ("--listen", "127.0.0.1:0", "--limits", "auto", "--state-dir", name)
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
    """Run a Python program that makes calls with the client's token; wait until it is ready.

    It prints "ready" then. Its stdin and stdout are pipes.
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
    """Wait until no job of the user's runs any more, and what ends with them has ended."""
    from workerservice_pb2 import RUNNING

    for job in client.list():
        if job.status == RUNNING:
            for _ in client.stream(job.job_id):
                pass
    threading.Event().wait(_SETTLED_S)


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    """What proc(5) has in /proc/PID/status, as VmRSS or VmHWM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def cpu_s(pid: int) -> float:
    """The CPU time the process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path("/proc", name, "stat").read_bytes()
            if int(stat.rpartition(b")")[2].split()[1]) == pid:
                found.append(int(name))
    return found
