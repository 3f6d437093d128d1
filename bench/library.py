"""Measures followers that are threads of the worker's own program; see `python -m bench`.

There is no gRPC, no TLS and no other process. The figures therefore show the library alone, while
a job writes and many subscribers read. `bench_append` measures the output log alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from bench.harness import MIB, fail, in_turn, print_heading, report_ratio
from bench.stream import JobRun, report_job_runs, through_cat, timed
from outputdirectory import OutputDirectory
from outputtimes import TimeIndex
from worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["bench_append", "bench_library"]

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


def _follow(worker: Worker, job_id: str) -> list[tuple[float, int]]:
    """Read all output; return for each chunk the time and the number of bytes read so far."""
    progress, size = [], 0
    with worker.stream(job_id) as chunks:
        for chunk in chunks:
            size += len(chunk)
            progress.append((time.time(), size))
    return progress


def _run(worker: Worker, argv: Sequence[str], size: int, count: int) -> JobRun:
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
    return JobRun(end - begin, min(had) / size, last_s)


def bench_library() -> None:
    """Measure how fast a job writes and how far its followers are, with one and ten followers."""
    print_heading("Followers in the worker's program: the job's rate / into job | cat >file")
    with contextlib.closing(Worker(enforcement="off")) as worker:
        for what, (argv, size) in _JOBS.items():
            measures: dict[str, Callable[[], JobRun]] = {
                "1 follower": functools.partial(_run, worker, argv, size, 1),
                "10 followers": functools.partial(_run, worker, argv, size, 10),
                "floor": functools.partial(timed, functools.partial(through_cat, argv)),
            }
            report_job_runs(what, in_turn(measures, _ROUNDS), size)


def _append(output: OutputDirectory, names: Iterator[int], piece: bytes, count: int) -> float:
    """Append the piece `count` times to a new log; return how many seconds that took."""
    log = output.make_log(f"log-{next(names)}")
    try:
        begin = time.perf_counter()
        for _ in range(count):
            log.append(piece)
        return time.perf_counter() - begin
    finally:
        log.remove()


def _note(directory: str, piece: bytes, count: int) -> float:
    """Note the times of as many pieces; return how many seconds that took."""
    index = TimeIndex(f"{directory}/times")
    try:
        begin = time.perf_counter()
        for offset in range(0, count * len(piece), len(piece)):
            index.note(offset)
        return time.perf_counter() - begin
    finally:
        index.remove()


def bench_append() -> None:
    """Measure what the index of times takes of the time of an append."""
    print_heading("Appending to the output log: time without the index of times / with it")
    names = itertools.count()
    with (
        tempfile.TemporaryDirectory() as directory,
        OutputDirectory(f"{directory}/output", reserve_bytes=MIB) as output,
    ):
        for size, count in ((100, 20_000), (4096, 20_000), (65_536, 1_000)):
            piece = bytes(size)
            found = in_turn(
                {
                    "append": functools.partial(_append, output, names, piece, count),
                    "note": functools.partial(_note, directory, piece, count),
                },
                _ROUNDS,
            )
            pairs = list(zip(found["append"], found["note"], strict=True))
            without = [append - note for append, note in pairs]
            report_ratio(
                f"pieces of {size:,} bytes",
                without,
                found["append"],
                f"{1e6 * min(found['append']) / count:.2f} us each",
                ">= 0.95",
            )
