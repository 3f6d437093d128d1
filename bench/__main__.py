"""Measures the service, and the floors under it, in one run. `make bench`.

    python -m bench [PART ...]

A floor is the least that the same work costs without the service. The table has a line for each
measurement: the name (what is measured / its floor); the figure; for a ratio the lowest round,
the highest round and the noise; both sides of the ratio in their units; the aim. The exit status
does not say whether the aims are met. It is 0 if every measurement could be made. `harness.py`
explains how a ratio is made and when it is too noisy to be printed. The soak is in `bench/long.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import time
from typing import TYPE_CHECKING

from bench.call import bench_call
from bench.cli import bench_command_line
from bench.cluster import bench_cluster
from bench.fair import GREEDY_CONFIG, bench_fairness
from bench.floor import Floor
from bench.harness import NOISE_MAX, ROUNDS, UNHINDERED, Service, running, serving
from bench.library import bench_append, bench_library
from bench.load import bench_memory, bench_sustained
from bench.overload import bench_overload
from bench.start import bench_growth, bench_start
from bench.stream import (
    bench_delay,
    bench_followers,
    bench_job_rate,
    bench_merging,
    bench_silence,
    bench_stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_KEPT_JOBS = 5_000
_OUTPUT_GIB = 1


def _with_floor(*parts: Callable[[Service, Floor], None], config: str = UNHINDERED) -> None:
    with (
        serving(config) as service,
        running("-m", "bench.floor") as (pid, address),
        contextlib.closing(Floor(pid, address)) as floor,
    ):
        for part in parts:
            part(service, floor)


def _with_service(*parts: Callable[[Service], None]) -> None:
    with serving() as service:
        for part in parts:
            part(service)


def _bench_much() -> None:
    """Measure a server with many finished jobs and much output."""
    with serving() as old, serving() as fresh:
        bench_sustained(old, _KEPT_JOBS)
        bench_memory(old, _OUTPUT_GIB)
        bench_growth(fresh, old)


def _bench_followers() -> None:
    _with_floor(bench_job_rate)
    _with_service(bench_followers)


def _bench_fairness() -> None:
    _with_floor(bench_fairness, config=GREEDY_CONFIG)


_PARTS: dict[str, Callable[[], None]] = {
    "call": lambda: _with_floor(bench_call),
    "start": lambda: _with_floor(bench_start),
    "much": _bench_much,
    "stream": lambda: _with_floor(bench_stream),
    "followers": _bench_followers,
    "library": bench_library,
    "append": bench_append,
    "delay": lambda: _with_floor(bench_delay, bench_merging),
    "silence": lambda: _with_floor(bench_silence),
    "overload": lambda: _with_service(bench_overload),
    "fairness": _bench_fairness,
    "cli": lambda: _with_service(bench_command_line),
    "cluster": bench_cluster,
}
_ONLY_IF_NAMED = {"cluster"}  # it needs Slurm


def main() -> None:
    """Run the parts named on the command line, or all parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {', '.join(_PARTS)}; by default all but cluster",
    )
    parts = parser.parse_args().parts or [part for part in _PARTS if part not in _ONLY_IF_NAMED]
    if unknown := set(parts) - set(_PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    logging.disable(logging.WARNING)  # warnings about limits that this host cannot enforce
    begin = time.monotonic()
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}\n"
        f"Ratios: median of {ROUNDS} alternating rounds, lowest to highest, noise (the distance "
        f"between\nthe rounds' quartiles, in % of the median; above {NOISE_MAX:.0%} there is no "
        "figure)",
        flush=True,
    )
    for part in parts:
        _PARTS[part]()
    print(f"\n{time.monotonic() - begin:.0f} s in all, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
