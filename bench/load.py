"""Measures a server under many starts, and its memory under much output; see `python -m bench`.

python -m bench.load --start ADDRESS COUNT THREADS    # act as clients that start jobs
"""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
from pathlib import Path

from bench.harness import (
    CERTS,
    MIB,
    Service,
    fail,
    in_turn,
    memory_bytes,
    ms,
    percentile,
    print_heading,
    report,
    report_ratio,
    seconds,
    settle,
    start_program,
    times,
)
from bench.stream import stalling
from client import Client

__all__ = ["bench_memory", "bench_sustained", "fill"]

_CLIENTS = {1: 1, 16: 4}  # number of clients: number of processes that these clients share
_WARM_UP = 500
_STATUS_PAUSE_S = 0.005
_STALLED = 100
_PAGE_JOBS = 100  # jobs in a page of a list
_JOB_OUTPUT_BYTES = 1024 * MIB
_MEMORY_AIM = "<= 150"


def bench_sustained(service: Service, jobs: int) -> None:
    """Measure starts per second, Status meanwhile, and the memory that a finished job takes."""
    client = service.client
    job_id = client.start("true")
    fill(service, _WARM_UP, clients=16)
    settled = [memory_bytes(pid) for pid in service.processes]
    alone = _StatusTimes(client, job_id)
    with alone:
        threading.Event().wait(2)
    print_heading("Starts one after the other (/bin/true), and Status every 5 ms meanwhile")
    left = jobs - _WARM_UP
    for clients, count in ((1, left // 10), (16, left - left // 10)):
        status = _StatusTimes(client, job_id)
        with status:
            rate = fill(service, count, clients=clients, settled=False)
        p50, p99 = (
            f"{percentile(status.seconds, p) * 1e3:.1f} ({percentile(alone.seconds, p) * 1e3:.1f})"
            for p in (50, 99)
        )
        report(
            f"{clients} client{'s' * (clients > 1)}",
            f"{rate:.0f} /s",
            f"{count:,} jobs",
            f"Status (alone), ms: p50 {p50}, p99 {p99}",
        )
    settle(client)
    grown = [
        memory_bytes(pid) - before for pid, before in zip(service.processes, settled, strict=True)
    ]
    server, fork_server = (max(0, each) / left for each in grown)
    report(
        "one finished job costs",
        f"{server + fork_server:.0f} B",
        f"{server:.0f} server, {fork_server:.0f} fork server",
    )
    _bench_list(client, job_id)


def _bench_list(client: Client, job_id: str) -> None:
    """Measure a list of all jobs. Its floor: as many Status calls as the list has pages."""
    count = len(client.list())
    pages = -(-count // _PAGE_JOBS)
    found = in_turn(
        {
            "list": lambda: seconds(client.list),
            "status": lambda: sum(times(lambda: client.status(job_id), pages)),
        }
    )
    report_ratio(
        f"a list of {count:,} finished jobs / {pages} x Status",
        found["list"],
        found["status"],
        f"{ms(found['list'], 0)} / {ms(found['status'], 0)}",
    )


class _StatusTimes:
    """Measures Status calls while the context lasts. `seconds`: the time of each call."""

    def __init__(self, client: Client, job_id: str) -> None:
        self.seconds: list[float] = []
        self._client = client
        self._job_id = job_id
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._done.wait(_STATUS_PAUSE_S):
            self.seconds.append(seconds(lambda: self._client.status(self._job_id)))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def fill(service: Service, count: int, *, clients: int, settled: bool = True) -> float:
    """Start `count` jobs with so many clients; return the starts per second.

    With `settled`, returns only after all jobs have ended.
    """
    programs = _CLIENTS[clients]
    shares = [count // programs + (i < count % programs) for i in range(programs)]
    starters = [
        start_program(
            service.client, "-m", __name__, "--start", service.address, share, clients // programs
        )
        for share in shares
    ]
    begin = time.perf_counter()
    for starter in starters:
        if starter.stdin:
            starter.stdin.write("go\n")
            starter.stdin.flush()
    answers = [starter.stdout.readline() if starter.stdout else "" for starter in starters]
    took = time.perf_counter() - begin
    for starter in starters:
        starter.communicate()
    if answers != ["done\n"] * programs:
        fail("not all jobs could be started")
    if settled:
        settle(service.client)
    return count / took


def _start_jobs(address: str, count: int, threads: int) -> None:
    counted = threading.Semaphore(count)

    def start() -> None:
        while counted.acquire(blocking=False):
            client.start("/bin/true")

    with Client(address, certs=CERTS, token=os.environ["JOBWORKER_TOKEN"]) as client:
        client.list()  # opens the connection
        print("ready", flush=True)
        starters = [threading.Thread(target=start) for _ in range(threads)]
        input()
        for starter in starters:
            starter.start()
        for starter in starters:
            starter.join()
    print("done", flush=True)


def bench_memory(service: Service, gibibytes: int) -> None:
    """Measure the peak of memory. Jobs write 1 GiB each; one follower reads all, and 100 stall."""
    peaks = {pid: _forget_peak(pid) for pid in service.processes}
    with contextlib.ExitStack() as stack:
        for number in range(gibibytes):
            job_id = service.client.start("head", ["-c", str(_JOB_OUTPUT_BYTES), "/dev/zero"])
            if not number:
                stack.enter_context(stalling(service, job_id, _STALLED))
            if sum(map(len, service.client.stream(job_id))) != _JOB_OUTPUT_BYTES:
                fail("the stream is not complete")
        server, fork_server = (memory_bytes(pid, "VmHWM") / MIB for pid in service.processes)
    count = len(service.client.list())
    print_heading(
        f"Memory through {gibibytes} GiB of output, {count:,} jobs finished, "
        f"{_STALLED} stalled followers"
    )
    before = sum(peaks.values()) / MIB
    report(
        "server and fork server, peak",
        f"{server + fork_server:.0f} MiB",
        f"{server:.0f} server, {fork_server:.0f} fork server",
        f"{before:.0f} MiB before",
        _MEMORY_AIM,
    )


def _forget_peak(pid: int) -> int:
    """Reset the peak of the process (proc(5)); return the memory in use, in bytes."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return memory_bytes(pid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", nargs=3, required=True, metavar=("ADDRESS", "COUNT", "THREADS"))
    address, count, threads = parser.parse_args().start
    _start_jobs(address, int(count), int(threads))
