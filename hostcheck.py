"""Finds out, by running real jobs, which limits this host can enforce for this user.

    for finding in check():
        print(finding)

A finding says what was tried, whether it works, and if not, what to do. `server check`
prints the findings. The server prints those that failed when it cannot start with
`--limits require`.

Thread safety: one thread at a time may call `check`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cgroups import CgroupError, Subtree
from errors import in_words
from limits import NO_LIMITS, Limits
from worker import EndReason, Job, Status, Worker, WorkerError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

__all__ = ["Finding", "check"]

_MIB = 1024 * 1024
_PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one test. `remedy` is "" if `works`."""

    what: str
    works: bool
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        state = "ok" if self.works else "FAILED"
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{state:<8}{self.what}: {self.detail}{remedy}"


def check(cgroup_root: str | os.PathLike[str] | None = None) -> tuple[Finding, ...]:
    """Test everything that `--limits require` needs, in the order of need.

    Takes a few seconds, and moves the calling process into another cgroup, like `Worker`. If
    all findings work, a server with `--limits require` starts here; otherwise it does not.
    """
    log = logging.getLogger("cgroups")
    log.addFilter(_hold_back)
    try:
        with Worker(enforcement="auto", cgroup_root=cgroup_root) as worker:
            if worker.subtree is None:
                return (_no_hierarchy(cgroup_root),)
            return tuple(_findings(worker, worker.subtree))
    finally:
        log.removeFilter(_hold_back)


def _hold_back(_: logging.LogRecord) -> bool:
    """Drop the warnings of `auto`: the findings say the same."""
    return False


def _no_hierarchy(cgroup_root: str | os.PathLike[str] | None) -> Finding:
    try:
        subtree = Subtree.open("require", root=cgroup_root)
    except CgroupError as error:
        return _failure("cgroup v2", error)
    if subtree is not None:
        subtree.close()
    return Finding(
        "cgroup v2", works=False, detail="it was missing for a moment", remedy="try again"
    )


def _failure(what: str, error: CgroupError) -> Finding:
    return Finding(what, works=False, detail=error.problem, remedy=error.remedy)


def _findings(worker: Worker, subtree: Subtree) -> Iterator[Finding]:
    yield Finding("cgroup v2", works=True, detail=f"cgroups can be made in {subtree.path.parent}")
    for what, (claim, test) in _TESTS.items():
        shortcoming = subtree.shortcomings.get(what)
        yield _failure(what, shortcoming) if shortcoming else _prove(what, claim, test, worker)


def _prove(what: str, claim: str, test: Callable[[Worker], str], worker: Worker) -> Finding:
    try:
        seen = test(worker)
    except (WorkerError, OSError) as error:
        seen = in_words(error)
    if not seen:
        return Finding(what, works=True, detail=claim)
    return Finding(
        what,
        works=False,
        detail=f"the test failed ({claim}): {seen}",
        remedy="the kernel accepts the limit without enforcing it; see its log (dmesg)",
    )


# --- the tests: each runs a job, and returns "" or the observed failure -------------------


def _run(worker: Worker, program: str, limits: Limits) -> Job:
    """Run a Python program with the Python that runs this process."""
    job_id = worker.start(sys.executable, ["-I", "-S", "-c", program], limits=limits)
    with contextlib.suppress(TimeoutError):
        return worker.wait(job_id, _PROBE_TIMEOUT_S)
    return worker.stop(job_id)


def _test_kill(worker: Worker) -> str:
    program = "import os, signal; os.fork() or os.setsid(); print(flush=True); signal.pause()"
    job_id = worker.start(sys.executable, ["-I", "-S", "-c", program], limits=NO_LIMITS)
    with worker.stream(job_id) as chunks:
        next(chunks)
    job = worker.stop(job_id)
    gone = worker.subtree is None or not (worker.subtree.jobs / job_id).exists()
    return "" if gone and job.status is Status.STOPPED else str(job)


def _test_cpu(worker: Worker) -> str:
    program = "import time\nwhile time.process_time() < 0.1: pass"
    job = _run(worker, program, Limits(cpu_cores=0.1))
    return "" if job.usage and job.usage.cpu_throttled_s else str(job)


def _test_memory(worker: Worker) -> str:
    job = _run(worker, f"b'x' * {256 * _MIB}", Limits(memory_bytes=64 * _MIB))
    return "" if job.end_reason is EndReason.OUT_OF_MEMORY else str(job)


def _test_io(worker: Worker) -> str:
    job_id = worker.start("sleep", ["1000"], limits=Limits())
    in_force = (worker.subtree.jobs / job_id / "io.max").read_text() if worker.subtree else ""
    worker.stop(job_id)
    return "" if f"rbps={Limits().io_read_bps}" in in_force else f"io.max is {in_force!r}"


def _test_pids(worker: Worker) -> str:
    program = (
        "import os, signal, sys\n"
        "try:\n"
        "    for _ in range(4): os.fork() or signal.pause()\n"
        "except OSError: sys.exit(3)"
    )
    job = _run(worker, program, Limits(pids=4))
    return "" if job.exit_code == 3 else str(job)  # noqa: PLR2004 -- as above


# Each test with the statement that it proves. The names, except the first, are controllers.
_TESTS: dict[str, tuple[str, Callable[[Worker], str]]] = {
    "kill": ("a stop kills also a child that has left the job's session", _test_kill),
    "cpu": ("a job with a limit of a tenth of a core is slowed down", _test_cpu),
    "memory": ("a job that exceeds its memory limit is killed", _test_memory),
    "io": ("a job has its limits on every physical disk", _test_io),
    "pids": ("a job with a limit of 4 processes gets no fifth", _test_pids),
}
