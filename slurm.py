"""Slurm as jobs need it: the operator's settings, srun's command line, the queue, leftovers.

    cluster = Cluster(SlurmSettings(conf="/etc/slurm/slurm.conf"), "3f2a", "require")
    argv = cluster.srun(work, job_id, variables=1)
    cluster.reason("17")           # "Resources": why Slurm's job 17 waits

Every job of a worker has the name jw-INSTANCE in Slurm. Its comment begins with its own ID. So the
worker finds what a former run of it has left behind. Any user of the cluster can give a job such a
name, and a comment with newlines, which squeue prints as they are. So a line of squeue is only a
claim: `confirms` asks again for the job alone. The comment also has the limits that Slurm does not
set and `deploy/slurm-prolog` sets on the node.

This module is part of the library, and calls Slurm's programs only. `jobstep.py` is what srun
executes on the node.

Thread safety: every method may be called from any thread.

Sources: srun(1), squeue(1), scancel(1), and Slurm 22.05 and 24.11 as they were seen to behave.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from environment import PATH
from errors import ResourceError, in_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jobstate import Work
    from limits import Enforcement, Limits

__all__ = ["Cluster", "QueuedJob", "SlurmSettings", "step_order"]

_QUEUE_WAIT_S = 10  # how long a start without queue waits for a free node
_STEP = Path(__file__).resolve().parent / "jobstep.py"
_PART_CHARACTERS = 100_000  # of a variable; execve(2) takes 128 KiB
_ANSWER_S = 10.0  # how long one of Slurm's programs may take
_REASONS_S = 1.0  # how long the reasons of the queue stay true enough
_MIB = 1024 * 1024
_NUMBER = re.compile("[0-9]+")
_JOB_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(?= |$)")


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """How the operator's cluster is used. Raises ValueError for options that cannot be."""

    conf: str = ""
    """The path of slurm.conf; "": Slurm's own default."""
    options: tuple[str, ...] = ()
    """More options of srun, like --partition=main and --account=physics."""
    python: str = "/usr/bin/python3"
    """A Python of the nodes, 3.9 or newer."""

    def __post_init__(self) -> None:
        for option in self.options:
            if not option.startswith("--") or "\0" in option:
                raise ValueError(f"{option!r} is not an option like --partition=main")
        if not self.python.startswith("/"):
            raise ValueError(f"{self.python!r} is not the path of a Python, like /usr/bin/python3")


class QueuedJob(NamedTuple):
    """A job as squeue shows it."""

    number: str  # Slurm's
    job_id: str  # ours: the first word of its comment
    uid: int


class Cluster:
    """The cluster of one worker. `instance`: the same whenever this worker is made again."""

    def __init__(self, settings: SlurmSettings, instance: str, enforcement: Enforcement) -> None:
        self.settings = settings
        self.name = f"jw-{instance}"
        self.enforcement = enforcement
        self.environment = {"PATH": PATH, "LC_ALL": "C.UTF-8"}
        if settings.conf:
            self.environment["SLURM_CONF"] = settings.conf
        self._source = _STEP.read_text(encoding="utf-8")
        # Replaced as a whole: when it was read, by time.monotonic, and the reasons.
        self._reasons: tuple[float, Mapping[str, str]] = (-math.inf, {})

    def srun(self, work: Work, job_id: str, *, variables: int) -> list[str]:
        """Return the command that runs the job. `variables`: how many parts its order has."""
        limits = work.limits
        exported = ",".join(f"JW_{number}" for number in range(variables))
        options = [
            *("--unbuffered", "--ntasks=1", "--nodes=1", "--chdir=/", "--mpi=none"),
            *("--cpu-bind=none", f"--job-name={self.name}"),
            f"--comment={' '.join([job_id, *_for_prolog(limits)])}",
            f"--export={exported}",
            # Slurm gives whole cores, so a fraction is rounded up.
            f"--cpus-per-task={math.ceil(limits.cpu_cores or 1)}",
        ]
        if limits.memory_bytes is not None:
            options.append(f"--mem={math.ceil(limits.memory_bytes / _MIB)}")
        if work.no_queue:
            options.append(f"--immediate={_QUEUE_WAIT_S}")
        if work.ending.timeout is not None:
            # The worker ends the job before. This is for a job whose worker is gone.
            minutes = math.ceil((work.ending.timeout + work.ending.grace) / 60) + 1
            options.append(f"--time={minutes}")
        step = [self.settings.python, "-I", "-S", "-c", self._source]
        return ["srun", *options, *self.settings.options, *step]

    def reason(self, number: str) -> str:
        """Return why the job of that number waits; "" if it does not, or nobody knows."""
        read_s, reasons = self._reasons
        if time.monotonic() - read_s > _REASONS_S:
            lines = self._ask("squeue", "--noheader", "--states=PENDING", "--format=%i|%r")
            reasons = dict(line.split("|", 1) for line in lines if "|" in line)
            self._reasons = time.monotonic(), reasons
        return reasons.get(number, "")

    def state(self, number: str) -> str:
        """Return Slurm's word for the state of a job, like NODE_FAIL; "" if it does not say."""
        if not number.isdigit():
            return ""
        command = ["scontrol", "--oneliner", "show", "job", number]
        found = re.search(r"\bJobState=(\w+)", self._run(command))
        return found[1] if found else ""

    def jobs(self) -> list[QueuedJob]:
        """Return what may be the jobs of this worker that Slurm knows, running or waiting."""
        lines = self._ask("squeue", "--noheader", "--format=%i|%U|%k")
        parts = [line.split("|", 2) for line in lines if line.count("|") >= 2]  # noqa: PLR2004
        return [
            QueuedJob(number, found[0], int(uid))
            for number, uid, comment in parts
            if _NUMBER.fullmatch(number)
            and _NUMBER.fullmatch(uid)
            and (found := _JOB_ID.match(comment))
        ]

    def confirms(self, job: QueuedJob) -> bool:
        """Ask Slurm for this job alone: has it our name, this user, and this ID as comment?"""
        lines = self._ask("squeue", "--noheader", f"--jobs={job.number}", "--format=%U|%k")
        return len(lines) == 1 and lines[0].split(" ")[0] == f"{job.uid}|{job.job_id}"

    def cancel_command(self, numbers: Sequence[str]) -> list[str]:
        """Return a command that ends jobs of this worker, waiting and running."""
        # `scancel --signal=KILL` of a job is no SIGKILL; of a step it is.
        script = 'for n; do scancel "$0" --signal=KILL "$n.0"; scancel "$0" "$n"; done'
        return ["/bin/sh", "-c", script, f"--name={self.name}", *numbers]

    def _ask(self, program: str, *options: str) -> list[str]:
        return self._run([program, f"--name={self.name}", *options]).splitlines()

    def _run(self, command: Sequence[str]) -> str:
        """Return the stdout of one of Slurm's programs; "" if it fails."""
        try:
            done = subprocess.run(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_ANSWER_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout if done.returncode == 0 else ""

    def cancel(self, numbers: Sequence[str]) -> None:
        """End jobs of our own user, or any if we are root. Returns when Slurm was told."""
        self._run(self.cancel_command(numbers))

    def check(self) -> None:
        """Raise `ResourceError` if srun is not there."""
        try:
            subprocess.run(
                ["srun", "--version"],
                env=self.environment,
                capture_output=True,
                timeout=_ANSWER_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ResourceError(
                f"srun cannot be executed: {in_words(error)}; install Slurm's client programs, or "
                "remove the table [slurm] from the configuration"
            ) from error

    def required(self, limits: Limits) -> dict[str, float]:
        """Return the limits that a node must enforce, or else the job must not run there."""
        if self.enforcement != "require":
            return {}
        asked = {field.name: getattr(limits, field.name) for field in fields(limits)}
        return {
            name: math.ceil(value) if name == "cpu_cores" else value
            for name, value in asked.items()
            if value is not None
        }


def _for_prolog(limits: Limits) -> list[str]:
    """Return the limits that `deploy/slurm-prolog` sets, in the words of io.max.

    Slurm itself sets `cpu_cores`, `memory_bytes` and, with cgroup v2, `swap_bytes`.
    """
    values = {
        "pids": limits.pids,
        "rbps": limits.io_read_bps,
        "wbps": limits.io_write_bps,
        "riops": limits.io_read_iops,
        "wiops": limits.io_write_iops,
    }
    return [f"{name}={value}" for name, value in values.items() if value is not None]


def step_order(work: Work, env: Mapping[str, str], **more: object) -> dict[str, str]:
    """Return the variables that tell `jobstep.py` what to execute."""
    order = {"argv": work.argv, "env": dict(env), "stdin": work.stdin, "linger": work.ending.linger}
    text = json.dumps(order | more)
    starts = range(0, len(text), _PART_CHARACTERS)
    return {
        f"JW_{number}": text[start : start + _PART_CHARACTERS]
        for number, start in enumerate(starts)
    }
