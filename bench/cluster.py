"""Jobs on a Slurm cluster on this machine, and bare srun: start, first byte, output.

Needs root and Slurm's packages, like `testcluster.py`. Not among the parts that run by default.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness import in_turn, ms, print_heading, report_ratio, sampled, seconds, times
from limits import Limits
from slurm import SlurmSettings
from slurmworker import SlurmWorker
from testcluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Mapping

_OUTPUT_BYTES = 50_000_000
_SRUN = ("srun", "--unbuffered", "--ntasks=1", "--mem=64", "--mpi=none", "--cpu-bind=none")


def bench_cluster() -> None:
    """Measure a worker of a cluster, with srun as the floor."""
    print_heading("Jobs on a Slurm cluster, and bare srun")
    with (
        tempfile.TemporaryDirectory() as name,
        Cluster(Path(name)) as cluster,
        SlurmWorker(
            SlurmSettings(conf=str(cluster.conf)), "bench", limits=Limits(memory_bytes=64 << 20)
        ) as worker,
    ):
        data = Path(name) / "data"
        data.write_bytes(os.urandom(_OUTPUT_BYTES))
        environment = os.environ | cluster.environment
        _first_byte(worker, environment)
        _output(worker, environment, str(data))


def _first_byte(worker: SlurmWorker, environment: Mapping[str, str]) -> None:
    def start() -> None:
        worker.start("echo", ["x"])

    def ours() -> None:
        job_id = worker.start("echo", ["x"])
        with worker.stream(job_id) as chunks:
            next(chunks)

    def bare() -> None:
        with subprocess.Popen(
            [*_SRUN, "echo", "x"], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout  # noqa: S101
            process.stdout.read(1)

    measures = {"start": start, "first byte": ours, "bare": bare}
    found = sampled({name: partial(times, each, 1) for name, each in measures.items()}, turns=5)
    medians = {name: [sorted(each)[len(each) // 2] for each in found[name]] for name in found}
    for name in ("start", "first byte"):  # bare srun shows its start by its first byte
        detail = f"{ms(medians[name], 0)} / {ms(medians['bare'], 0)}"
        what = f"{name} of a job / first byte of srun -u"
        report_ratio(what, medians[name], medians["bare"], detail, "1.5")


def _output(worker: SlurmWorker, environment: Mapping[str, str], data: str) -> None:
    def ours() -> None:
        with worker.stream(worker.start("cat", [data])) as chunks:
            for _ in chunks:
                pass

    def bare() -> None:
        subprocess.run([*_SRUN, "cat", data], stdout=subprocess.PIPE, env=environment, check=True)

    found = in_turn(
        {
            "ours": lambda: _OUTPUT_BYTES / seconds(ours) / 1e6,
            "bare": lambda: _OUTPUT_BYTES / seconds(bare) / 1e6,
        },
        rounds=3,
    )
    detail = f"{max(found['ours']):.0f} / {max(found['bare']):.0f} MB/s"
    report_ratio("output of a job / srun -u", found["ours"], found["bare"], detail, "0.9")
