"""The long benchmark, a quarter of an hour: a soak, and more jobs and output than the short one.

    python -m bench.long [--jobs N] [--only-soak]      # `make bench-long`

The exit status is 1 if something piled up during the soak, or if something failed.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import time

from bench.harness import UNHINDERED, serving
from bench.load import bench_memory, bench_sustained, fill
from bench.soak import SOAK_CONFIG, soak
from bench.start import bench_growth

_JOBS = 50_000
_KEPT_JOBS = 10_000
_PAST_JOBS = 100_000
_OUTPUT_GIB = 10


def _bench_much() -> None:
    # With the default ceiling, 10 GiB of output would push out some of the 10,000 finished jobs.
    with serving(f'{UNHINDERED}output = "unlimited"\n') as old, serving() as fresh:
        bench_sustained(old, _KEPT_JOBS)
        bench_memory(old, _OUTPUT_GIB)
        more = _PAST_JOBS - len(old.client.list())
        print(f"  ({more:,} jobs more)", flush=True)
        fill(old, more, clients=16)
        bench_growth(fresh, old)


def main() -> None:
    """Run the soak and, without --only-soak, the other measurements before it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--jobs", type=int, default=_JOBS, help="of the soak (default: %(default)s)"
    )
    parser.add_argument("--only-soak", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # warnings about limits that this host cannot enforce
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )
    if not arguments.only_soak:
        _bench_much()
    with serving(SOAK_CONFIG) as service:
        nothing_piled_up = soak(service, arguments.jobs)
    sys.exit(0 if nothing_piled_up else 1)


if __name__ == "__main__":
    main()
