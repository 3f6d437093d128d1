"""Measures followers that are threads of the worker's own program; see `python -m bench`.

There is no gRPC, no TLS and no other process. The figures therefore show the library alone, while
a job writes and many subscribers read.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from bench.harness import MIB, fail, in_turn, print_heading, report, report_ratio, seconds
from worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["bench_library"]

_ROUNDS = 5
_LINES_BYTES = 32 * MIB
_ZEROS_BYTES = 64 * MIB
_MAKE_LINES = f"""
import sys
for number in range({_LINES_BYTES} // 64):
    sys.stdout.write(f"{{number:063d}}\\n")
"""
_JOBS = {
    "lines": ([sys.executable, "-c", _MAKE_LINES], _LINES_BYTES),
    "as fast as it can": (["head", "-c", str(_ZEROS_BYTES), "/dev/zero"], _ZEROS_BYTES),
}
# Runs the command, then writes when it began and ended, in nanoseconds since the epoch.
_TIMED = 's=$(date +%s%N); "$0" "$@"; e=$(date +%s%N); printf "%020d%020d" $s $e'


class _Run(NamedTuple):
    """What was measured of one job. The times are in seconds since the command began.

    `took_s`: when the command ended. `slowest`: the share of the output that the slowest follower
    had then. `last_s`: when the last follower had all output.
    """

    took_s: float
    slowest: float
    last_s: float


def _follow(worker: Worker, job_id: str) -> list[tuple[float, int]]:
    """Read all output; return for each chunk the time and the number of bytes read so far."""
    progress, size = [], 0
    with worker.stream(job_id) as chunks:
        for chunk in chunks:
            size += len(chunk)
            progress.append((time.time(), size))
    return progress


def _run(worker: Worker, argv: Sequence[str], size: int, count: int) -> _Run:
    job_id = worker.start("sh", ["-c", _TIMED, *argv])
    with ThreadPoolExecutor(count) as pool:
        each = list(pool.map(functools.partial(_follow, worker), [job_id] * count))
    with worker.stream(job_id, offset=size) as chunks:
        stamps = b"".join(chunks)
    worker.remove(job_id)
    if {progress[-1][1] for progress in each} != {size + len(stamps)}:
        fail("a follower did not get every byte")
    begin, end = int(stamps[:20]) / 1e9, int(stamps[20:]) / 1e9
    had = [max((n for at, n in progress if at <= end), default=0) for progress in each]
    last_s = max(progress[-1][0] for progress in each) - begin
    return _Run(end - begin, min(had) / size, last_s)


def _through_cat(argv: Sequence[str]) -> None:
    with (
        tempfile.TemporaryFile() as file,
        subprocess.Popen(argv, stdout=subprocess.PIPE) as job,
    ):
        subprocess.run(["cat"], stdin=job.stdout, stdout=file, check=True)


def _timed(argv: Sequence[str]) -> _Run:
    return _Run(seconds(functools.partial(_through_cat, argv)), 0.0, 0.0)


def bench_library() -> None:
    """Measure how fast a job writes and how far its followers are, with one and ten followers."""
    print_heading("Followers in the worker's program: the job's rate / into job | cat >file")
    with contextlib.closing(Worker(enforcement="off")) as worker:
        for what, (argv, size) in _JOBS.items():
            measures: dict[str, Callable[[], _Run]] = {
                "1 follower": functools.partial(_run, worker, argv, size, 1),
                "10 followers": functools.partial(_run, worker, argv, size, 10),
                "floor": functools.partial(_timed, argv),
            }
            found = in_turn(measures, _ROUNDS)
            floor = [size / run.took_s / 1e6 for run in found.pop("floor")]
            for who, runs in found.items():
                rate = [size / run.took_s / 1e6 for run in runs]
                detail = f"{statistics.median(rate):.0f} / {statistics.median(floor):.0f} MB/s"
                aim = ">= 0.5" if who == "10 followers" else ">= 0.9"
                report_ratio(f"{what}, {who}", rate, floor, detail, aim)
            ten = found["10 followers"]
            for name, values, unit in (
                ("the slowest's share when the job ends", [run.slowest for run in ten], ""),
                ("the last has all after", [run.last_s for run in ten], " s"),
                ("the job has ended after", [run.took_s for run in ten], " s"),
            ):
                value = f"{statistics.median(values):.2f}{unit}"
                report(f"  of 10, {name}", value, f"{min(values):.2f} to {max(values):.2f}")
