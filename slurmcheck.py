"""Whether jobs run on the cluster, and which limits it enforces: what `server check` prints.

    print(*check(config.slurm, config.limits({})), sep="\n")

A probe job runs on the cluster, as the user who calls this, with every limit. The step on the node
reads the limits of the job's cgroups.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING

from errors import in_words
from hostcheck import Finding
from slurmworker import SlurmWorker
from worker import Limits, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slurm import SlurmSettings

__all__ = ["check"]

_PROBE_S = 60.0
_REMEDIES = {
    "cpu_cores": "ConstrainCores=yes in cgroup.conf; fractions are rounded up",
    "memory_bytes": "ConstrainRAMSpace=yes in cgroup.conf",
    "swap_bytes": "ConstrainSwapSpace=yes in cgroup.conf, with cgroup v2",
}
_BY_PROLOG = "deploy/slurm-prolog sets it with cgroup v2; or remove it from [defaults]"


def check(settings: SlurmSettings, limits: Limits) -> Iterator[Finding]:
    """Yield what was tried. A finding that does not work says what to do."""
    probe = "a job on the cluster"
    try:
        with SlurmWorker(settings, f"check-{os.getpid()}", limits=limits) as worker:
            job = worker.wait(worker.start("true", no_queue=True), _PROBE_S)
    except (WorkerError, TimeoutError) as error:
        yield Finding(probe, works=False, detail=in_words(error))
        return
    works = job.exit_code == 0
    yield Finding(probe, works, f"{'ran' if works else 'failed'} on {job.node or 'no node'}")
    for field in fields(Limits):
        if getattr(limits, field.name) is None:
            continue
        works = getattr(job.limits, field.name) is not None
        remedy = "" if works else _REMEDIES.get(field.name, _BY_PROLOG)
        yield Finding(field.name, works, "enforced" if works else "not enforced", remedy)
