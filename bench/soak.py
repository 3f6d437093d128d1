"""A soak: clients start, follow, stop and remove very many jobs; some clients are killed.

Afterwards nothing may have piled up. The server must have as many descriptors, threads, cgroups,
files and processes, and as much memory, as after the first thousand jobs. See `bench/long.py`.

    python -m bench.soak --clients ADDRESS NUMBER    # act as clients that see each job to its end
    python -m bench.soak --vanish ADDRESS            # act as a client that is killed
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness import (
    CERTS,
    MIB,
    Service,
    children,
    fail,
    memory_bytes,
    print_heading,
    report,
    settle,
    start_program,
)
from client import Client, ClientError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

__all__ = ["SOAK_CONFIG", "Load", "soak"]

_BATCH = 1000  # jobs
_PROGRAMS = 3
_THREADS = 4  # in each program; each acts as a client
_VANISHING = 5  # clients that are killed in a batch, one after the other
_VANISHING_JOBS = 20  # jobs of a client that is killed; it has as many streams
_KEPT = 500  # finished jobs
_OUTPUT_BYTES = 300_000
# With so few jobs kept, the retention rule has removed jobs before the first look.
SOAK_CONFIG = f"""
[per_user]
starts_per_second = "unlimited"
[in_all]
starts_per_second = "unlimited"
[retention]
jobs = {_KEPT}
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What the server and its fork server use. Memory is in MiB."""

    descriptors: float
    fork_server_descriptors: float
    threads: float
    memory: float
    fork_server_memory: float
    cgroups: float
    files: float
    processes: float

    def excess_over(self, first: Load) -> dict[str, float]:
        """Return by how much each figure has grown since `first`, if by more than `_SLACK`."""
        more = {f.name: getattr(self, f.name) - getattr(first, f.name) for f in fields(Load)}
        return {name: each for name, each in more.items() if each > getattr(_SLACK, name)}


_COLUMNS = (
    *("descriptors", "of fork server", "threads", "memory, MiB", "of fork server"),
    *("cgroups", "files", "processes"),
)
# How much more there may be at the end than after the first thousand jobs. The number of threads
# and connections at a given moment varies by chance, and a heap has holes. If each job left
# something behind, the figure would grow by fifty thousand.
_SLACK = Load(
    descriptors=20,
    fork_server_descriptors=2,
    threads=20,
    memory=10,
    fork_server_memory=2,
    cgroups=0,
    files=0,
    processes=0,
)


def _look(service: Service) -> Load:
    pid, fork_server = service.processes
    return Load(
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        fork_server_descriptors=len(os.listdir(f"/proc/{fork_server}/fd")),
        threads=service.threads,
        memory=memory_bytes(pid) / MIB,
        fork_server_memory=memory_bytes(fork_server) / MIB,
        cgroups=_count_cgroups(pid),
        files=len(os.listdir(service.state / "output")),
        processes=_count_descendants(pid),
    )


def _count_cgroups(pid: int) -> int:
    """Return the number of cgroups in the server's subtree; 0 if the server has none."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
    mounts = map(str.split, Path("/proc/self/mounts").read_text().splitlines())
    top = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    if top is None or "job-worker-" not in own:
        return 0
    return sum(1 for _ in (top / own).parent.rglob("*/"))


def _count_descendants(pid: int) -> int:
    return sum(1 + _count_descendants(child) for child in children(pid))


def soak(service: Service, jobs: int) -> bool:
    """Run `jobs` jobs; return whether nothing has piled up."""
    print_heading(f"A soak of {jobs:,} jobs, of which {_KEPT} are kept when they have ended")
    names = [field.name for field in fields(Load)]
    print("  " + "".join(f"{word:>13}" for word in ("jobs", *_COLUMNS)), flush=True)
    programs = [
        start_program(service.client, "-m", __name__, "--clients", service.address, number)
        for number in range(_PROGRAMS)
    ]
    begin = time.monotonic()
    first = last = None
    batches = max(2, jobs // _BATCH)
    for batch in range(1, batches + 1):
        _run_batch(service, programs)
        last = _look(service)
        first = first or last
        if batch in {1, 2, batches} or batch % (batches // 10 or 1) == 0:
            figures = [f"{getattr(last, name):.1f}".removesuffix(".0") for name in names]
            line = "".join(f"{word:>13}" for word in (f"{batch * _BATCH:,}", *figures))
            print(f"  {line}", flush=True)
    for program in programs:
        program.communicate()
    if first is None or last is None:
        raise AssertionError("there are at least two batches")
    took = time.monotonic() - begin
    excess = last.excess_over(first)
    each = (last.memory - first.memory) * MIB / ((batches - 1) * _BATCH)
    report(
        "piled up",
        ", ".join(f"{name} +{more:g}" for name, more in excess.items()) or "nothing",
        f"memory {each:+.0f} B a job",
        f"{batches * _BATCH / took:.0f} jobs/s, {took:.0f} s",
        "nothing",
    )
    return not excess


def _run_batch(service: Service, programs: list[subprocess.Popen[str]]) -> None:
    vanishing = _VANISHING * _VANISHING_JOBS
    for program in programs:
        if program.stdin:
            program.stdin.write(f"{(_BATCH - vanishing) // len(programs)}\n")
            program.stdin.flush()
    for _ in range(_VANISHING):
        _let_vanish(service)
    for program in programs:
        if program.stdout is None or program.stdout.readline() != "done\n":
            fail("a client of the soak failed")
    settle(service.client)


def _let_vanish(service: Service) -> None:
    """Kill a client that has many jobs and streams, and then stop half of its jobs."""
    program = start_program(service.client, "-m", __name__, "--vanish", service.address)
    with program:
        job_ids = program.stdout.readline().split() if program.stdout else []
        program.kill()
    if len(job_ids) != _VANISHING_JOBS:
        fail("the client that is to vanish failed")
    for job_id in job_ids[::2]:
        service.client.stop(job_id)
    # The other jobs end by themselves; `settle` waits for them.


# --- the clients ------------------------------------------------------------------------


def _vanish(address: str) -> None:
    with Client(address, certs=CERTS, token=os.environ["JOBWORKER_TOKEN"]) as client:
        scripts = ("echo; exec sleep 1000000", "echo; sleep 1; echo")
        job_ids = [
            client.start("sh", ["-c", script])
            for _, script in zip(range(_VANISHING_JOBS), itertools.cycle(scripts))
        ]
        streams = [client.stream(job_id) for job_id in job_ids]
        for stream in streams:
            next(stream)
        print("ready", flush=True)
        print(*job_ids, flush=True)
        threading.Event().wait()


def _follow_to_end(client: Client) -> None:
    job_id = client.start("head", ["-c", str(_OUTPUT_BYTES), "/dev/zero"])
    _check(sum(map(len, client.stream(job_id))) == _OUTPUT_BYTES)
    _check(client.status(job_id).exit_code == 0)


def _run_shortly(client: Client) -> None:
    _check(list(client.stream(client.start("true"))) == [])


def _stop(client: Client) -> None:
    client.stop(client.start("sleep", ["1000000"]))


def _stop_tree(client: Client) -> None:
    """Stop a job whose processes have left their group, after the reader has closed its stream."""
    script = "setsid sleep 1000000 & sleep 1000000 & echo; wait"
    job_id = client.start("sh", ["-c", script])
    stream = client.stream(job_id)
    _check(next(stream) == b"\n")
    stream.close()
    client.stop(job_id)


def _stop_while_followed(client: Client) -> None:
    job_id = client.start("sh", ["-c", "echo; exec sleep 1000000"])
    stream = client.stream(job_id)
    _check(next(stream) == b"\n")
    client.stop(job_id)
    _check(list(stream) == [])


def _fail_and_remove(client: Client) -> None:
    job_id = client.start("sh", ["-c", "echo; exit 3"])
    _check(b"".join(client.stream(job_id)) == b"\n")
    _check(client.status(job_id).exit_code == 3)  # noqa: PLR2004 -- the number in the script
    client.remove(job_id)


def _fail_to_start(client: Client) -> None:
    """Start a program that does not exist. This makes no job, so one more job is run."""
    try:
        client.start("/nonexistent")
    except ClientError as error:
        _check(error.code == "INVALID_ARGUMENT")
    else:
        _check(False)
    _run_shortly(client)


_STORIES: tuple[Callable[[Client], None], ...] = (
    _run_shortly,
    _follow_to_end,
    _stop,
    _run_shortly,
    _stop_tree,
    _fail_and_remove,
    _stop_while_followed,
    _fail_to_start,
)


def _check(right: bool) -> None:
    if not right:
        raise AssertionError("a job did not go as it should")


def _be_clients(address: str, number: int) -> None:
    """Read numbers of jobs from stdin; run so many jobs to their ends, several at a time."""
    stories = itertools.cycle(_STORIES[number:] + _STORIES[:number])
    failures: list[BaseException] = []

    def run(own: list[Callable[[Client], None]]) -> None:
        try:
            for story in own:
                story(client)
        except BaseException as error:  # noqa: BLE001 -- raised again below
            failures.append(error)

    with Client(address, certs=CERTS, token=os.environ["JOBWORKER_TOKEN"]) as client:
        client.list()  # opens the connection
        print("ready", flush=True)
        for line in sys.stdin:
            work = list(itertools.islice(stories, int(line)))
            threads = [
                threading.Thread(target=run, args=(work[i::_THREADS],)) for i in range(_THREADS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if failures:
                raise failures[0]
            print("done", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", nargs=2, metavar=("ADDRESS", "NUMBER"))
    parser.add_argument("--vanish", metavar="ADDRESS")
    arguments = parser.parse_args()
    if arguments.vanish:
        _vanish(arguments.vanish)
    else:
        _be_clients(arguments.clients[0], int(arguments.clients[1]))
