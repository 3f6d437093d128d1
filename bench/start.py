"""Measures StartJob. Floors: a bare gRPC call and a start by hand; see `python -m bench`."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any
from unittest import mock

import privileges
import spawner
import worker
from bench.floor import HAND_STEPS, ByHand, Floor
from bench.harness import (
    MIB,
    Service,
    in_turn,
    memory_bytes,
    ms,
    percentile,
    print_heading,
    report,
    report_ratio,
    sampled,
    serving,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from client import Client

__all__ = ["bench_growth", "bench_start"]

_STARTS = 10  # in a turn; a round has ten turns
_APART = 2  # starts in a turn that has a pause before each start
_APART_S = 0.02
_MANY = 150  # starts without a pause, in a round
_CLIENTS = 16
_HEAP_BYTES = 500 * MIB
_RUNNING = 1000
_SAY = ("/bin/echo", "x")

_STEPS: tuple[tuple[str, object, str], ...] = (
    ("from the command to the exec", spawner.Process, "execute"),
    ("argv in a memfd", os, "memfd_create"),
)


def bench_start(service: Service, floor: Floor) -> None:
    """Measure StartJob at three paces, the time to the first byte of output, and their parts.

    The paces: back to back; waiting for each job's end between two starts; 20 ms apart.

    The floors: (a) is a bare unary call, (b) is a start by hand, (c) is a bare stream of one
    message. For the first byte of output, (b) also reads a byte from a pipe.
    """
    uid = 71_001 if privileges.can_change_user() and privileges.can_kill_any() else None
    uids = None if uid is None else range(uid, uid + 1)
    steps: dict[str, list[float]] = {}  # seconds, of each start
    with contextlib.ExitStack() as stack:
        jobs = stack.enter_context(worker.Worker(uids=uids))
        directory = jobs.subtree.jobs if jobs.subtree else None
        hand, popen = (
            stack.enter_context(closing(ByHand(way, directory, uid))) for way in ("clone3", "popen")
        )
        measures: dict[str, Callable[[], list[float]]] = {
            "StartJob": lambda: _start_jobs(service.client, _STARTS),
            "(a)": lambda: times(floor.unary, _STARTS),
            "(b)": lambda: _sums(hand.start(_STARTS)),
            "first": lambda: _first_bytes(service.client, _STARTS),
            "(b) first": lambda: _sums(hand.start(_STARTS, _SAY, first_byte=True)),
            "(c)": lambda: times(lambda: floor.read_stream(2), _STARTS),
            "StartJob apart": lambda: _start_jobs(service.client, _APART, _APART_S),
            "(a) apart": lambda: _apart(floor.unary, _APART),
            "popen": lambda: _sums(popen.start(_STARTS)),
            "apart": lambda: _sums(hand.start(_APART, gap_s=_APART_S)),
            "popen apart": lambda: _sums(popen.start(_APART, gap_s=_APART_S)),
            "worker": lambda: _start_in_worker(jobs, uid, steps),
        }
        _report_rates(_back_to_back(service, floor, hand))
        found = sampled(measures)
        hand_steps = list(zip(*hand.start(100), strict=True))
    print_heading("Start over mTLS, waiting for each job's end or 20 ms apart: time / floor")
    floors = {
        "StartJob": _added(found["(a)"], found["(b)"]),
        "StartJob apart": _added(found["(a) apart"], found["apart"]),
        "first": _added(found["(a)"], found["(b) first"], found["(c)"]),
    }
    names = {
        "StartJob": "StartJob / (a) unary call + (b) by hand",
        "StartJob apart": "StartJob, 20 ms apart / (a) + (b) 20 ms apart",
        "first": "start to first byte / (a) + (b) + (c) stream",
    }
    for key, name in names.items():
        for percent in (50, 99):
            ours, theirs = (
                [percentile(each, percent) for each in rounds]
                for rounds in (found[key], floors[key])
            )
            _report_times(f"{name}, p{percent}", ours, theirs, "<= 1.3")
    for key, aim in (("StartJob", "<= 2.2"), ("first", "<= 7.3")):
        ours, theirs = ([percentile(each, 50) for each in found[k]] for k in (key, "(a)"))
        _report_times(f"{names[key].partition(' /')[0]} / (a), p50", ours, theirs, aim)
    print_heading("Where a start's time goes, p50")
    for key, what in (
        ("(a)", "(a) a bare unary call"),
        ("(b)", "(b) by hand"),
        ("popen", "by hand, Popen with preexec_fn"),
        ("apart", "by hand, 20 ms apart"),
        ("popen apart", "by hand, Popen, 20 ms apart"),
        ("worker", "Worker.start, without server and TLS"),
    ):
        report(what, ms([percentile(each, 50) for each in found[key]]))
    for what, of in steps.items():
        report(f"  of which {what}", ms(of))
    for what, step in zip(HAND_STEPS, hand_steps, strict=True):
        report(f"  of which by hand: {what}", ms(step))


def _report_times(what: str, ours: list[float], theirs: list[float], aim: str) -> None:
    report_ratio(what, ours, theirs, f"{ms(ours)} / {ms(theirs)}", aim)


def _sums(steps: list[list[float]]) -> list[float]:
    return [sum(each) for each in steps]


def _added(*floors: list[list[float]]) -> list[list[float]]:
    """Add the floors: the first call of a round to the first of the others, and so on."""
    return [
        [sum(each) for each in zip(*rounds, strict=True)] for rounds in zip(*floors, strict=True)
    ]


def _back_to_back(service: Service, floor: Floor, hand: ByHand) -> dict[str, list[float]]:
    """Measure the seconds of a start without a pause, with one client and with sixteen."""
    measures: dict[str, Callable[[], float]] = {}
    for clients in (1, _CLIENTS):
        measures[f"StartJob {clients}"] = functools.partial(_start_many, service.client, clients)
        measures[f"(a) {clients}"] = functools.partial(_call_many, floor.unary, clients)
        measures[f"(b) {clients}"] = functools.partial(_by_hand, hand, clients)
    return in_turn(measures)


def _by_hand(hand: ByHand, at_once: int) -> float:
    return hand.start_many(_MANY, at_once) / _MANY


def _call_many(call: Callable[[], object], clients: int) -> float:
    """Make `_MANY` calls from `clients` threads; return the whole time per call, in seconds."""
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda _: None, range(clients)))  # starts the threads
        begin = time.perf_counter()
        for each in [pool.submit(call) for _ in range(_MANY)]:
            each.result()
        return (time.perf_counter() - begin) / _MANY


def _start_many(client: Client, clients: int) -> float:
    """Like `_call_many` with StartJob; returns when all these jobs have ended."""
    job_ids = []
    took = _call_many(lambda: job_ids.append(client.start("/bin/true")), clients)
    for job_id in job_ids:
        for _data in client.stream(job_id):
            pass
    return took


def _report_rates(found: Mapping[str, list[float]]) -> None:
    print_heading("Starts over mTLS, back to back: time / floor")
    for clients, who in ((1, "one client"), (_CLIENTS, "sixteen clients")):
        ours = found[f"StartJob {clients}"]
        floors = zip(found[f"(a) {clients}"], found[f"(b) {clients}"], strict=True)
        theirs = [sum(each) for each in floors]
        _report_times(f"StartJob, {who} / (a) + (b) back to back", ours, theirs, "")
        rates = sorted(1 / seconds for seconds in ours)
        report(
            f"StartJob, {who}",
            f"{statistics.median(rates):.0f} /s",
            f"{rates[0]:.0f} to {rates[-1]:.0f}",
            aim=">= 400 /s" if clients == 1 else "",
        )


def _apart(call: Callable[[], object], count: int) -> list[float]:
    taken = []
    for _ in range(count):
        time.sleep(_APART_S)
        taken += times(call, 1)
    return taken


def _start_jobs(client: Client, count: int, gap_s: float = 0.0) -> list[float]:
    """Start `count` jobs; return the seconds of each start. `gap_s`: the pause before each.

    Each job ends before the next one starts, as by hand; the wait for the end is not measured.
    """
    taken = []
    for _ in range(count):
        time.sleep(gap_s)
        begin = time.perf_counter()
        job_id = client.start("/bin/true")
        taken.append(time.perf_counter() - begin)
        for _data in client.stream(job_id):
            pass
    return taken


def _first_bytes(client: Client, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        chunks = client.stream(client.start(_SAY[0], _SAY[1:]))
        next(chunks)
        taken.append(time.perf_counter() - begin)
        for _data in chunks:
            pass
    return taken


def _start_in_worker(
    jobs: worker.Worker, uid: int | None, steps: dict[str, list[float]]
) -> list[float]:
    taken = []
    for _ in range(_STARTS):
        with _timed(steps):
            begin = time.perf_counter()
            job_id = jobs.start("/bin/true", uid=uid)
            taken.append(time.perf_counter() - begin)
        jobs.wait(job_id)
    return taken


@contextlib.contextmanager
def _timed(steps: dict[str, list[float]]) -> Iterator[None]:
    """Time the steps of `Worker.start` within this context; add the seconds to `steps`."""
    with contextlib.ExitStack() as undo:
        for what, owner, name in _STEPS:
            undo.enter_context(
                mock.patch.object(owner, name, _timer(getattr(owner, name), what, steps))
            )
        yield


def _timer(function: Any, what: str, steps: dict[str, list[float]]) -> Any:
    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            steps.setdefault(what, []).append(time.perf_counter() - begin)

    return timed


def bench_growth(fresh: Service, old: Service) -> None:
    """Measure StartJob with much memory in use, with many running jobs, with many finished ones."""
    with serving(heap_bytes=_HEAP_BYTES) as heavy, serving() as busy:
        before = [memory_bytes(pid) for pid in busy.processes]
        threads = busy.threads
        for _ in range(_RUNNING):
            busy.client.start("sleep", ["1000"])
        after = [memory_bytes(pid) for pid in busy.processes]
        each_bytes = [(b - a) / _RUNNING for a, b in zip(before, after, strict=True)]
        each_threads = (busy.threads - threads) / _RUNNING
        count = len(old.client.list())
        heap = memory_bytes(heavy.pid) / MIB
        services = {
            "": fresh,
            f"server's memory is {heap:.0f} MiB": heavy,
            f"{_RUNNING:,} jobs running": busy,
            f"{count:,} jobs in the past": old,
        }
        found = sampled(
            {name: functools.partial(_start_jobs, s.client, 5) for name, s in services.items()}
        )
    p50 = {name: [percentile(each, 50) for each in rounds] for name, rounds in found.items()}
    print_heading("A start does not depend on what there is: time / time on a fresh server, p50")
    plain = p50.pop("")
    for name, values in p50.items():
        _report_times(f"StartJob, {name}", values, plain, "0.8 to 1.2")
    report(
        "one running job costs",
        f"{sum(each_bytes) / 1024:.1f} KiB",
        f"{each_bytes[0] / 1024:.1f} server, {each_bytes[1] / 1024:.1f} fork server",
        f"{each_threads:.2f} threads",
    )
