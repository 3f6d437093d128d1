"""Measures what a start costs, against a bare call and a start by hand; see `python -m bench`."""

from __future__ import annotations

import contextlib
import functools
import os
import time
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
    from collections.abc import Callable, Iterator

    from client import Client

__all__ = ["bench_growth", "bench_start"]

_STARTS = 10  # in a turn, of which a round has ten
_APART = 1  # the same, with a pause before each
_APART_S = 0.02
_HEAP_BYTES = 500 * MIB
_RUNNING = 1000
_SAY = ("/bin/echo", "x")

_STEPS: tuple[tuple[str, object, str], ...] = (
    ("from the command to the exec", spawner.Process, "execute"),
    ("argv in a memfd", os, "memfd_create"),
)


def bench_start(service: Service, floor: Floor) -> None:
    """StartJob, and the start to the first byte of output; and what they consist of.

    Floor (a) is a bare unary call, (b) the start by hand. For the first byte (b) reads it from
    a pipe, and (c) is a bare stream of one message.
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
            "popen": lambda: _sums(popen.start(_STARTS)),
            "apart": lambda: _sums(hand.start(_APART, gap_s=_APART_S)),
            "popen apart": lambda: _sums(popen.start(_APART, gap_s=_APART_S)),
            "worker": lambda: _start_in_worker(jobs, uid, steps),
        }
        found = sampled(measures)
        hand_steps = list(zip(*hand.start(100), strict=True))
    where = "" if directory is None else ", in a cgroup"
    who = "" if uid is None else ", as another user"
    print_heading(f"Start over mTLS{where}{who}: time / floor")
    floors = {
        "StartJob": _added(found["(a)"], found["(b)"]),
        "first": _added(found["(a)"], found["(b) first"], found["(c)"]),
    }
    names = {
        "StartJob": "StartJob / (a) unary call + (b) by hand",
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
    """Add the floors, call by call, in each round."""
    return [
        [sum(each) for each in zip(*rounds, strict=True)] for rounds in zip(*floors, strict=True)
    ]


def _start_jobs(client: Client, count: int) -> list[float]:
    """Of each the end is awaited, as it is by hand, and not measured."""
    taken = []
    for _ in range(count):
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
    """Have the steps of `Worker.start` timed, in seconds, each call of each."""
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
    """StartJob with much in memory, with many jobs running, with many in the past."""
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
