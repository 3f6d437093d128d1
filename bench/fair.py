"""Measures how much a user at every ceiling slows another user down; see `python -m bench`.

python -m bench.fair --greedy ADDRESS    # act as the user at every ceiling
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from bench.floor import ByHand
from bench.harness import (
    CERTS,
    Service,
    percentile,
    print_heading,
    report_ratio,
    sampled,
    start_program,
    times,
)
from client import Client, ClientError
from settings import PER_USER

if TYPE_CHECKING:
    import subprocess

    from bench.floor import Floor

__all__ = ["GREEDY_CONFIG", "bench_fairness"]

_STATUSES = 125  # in a turn
_TURNS = 4
_ROUNDS = 5
_HAND_STARTS = 4  # by hand, during a turn of bare calls
_SHOWN = (50, 99)
# With this low ceiling the user is also at the ceiling of kept output, and each start has to make
# room. All other settings keep their defaults.
GREEDY_CONFIG = """
[per_user]
kept_output = "1M"
"""
_OUTPUT = ("head", "-c", "16384", "/dev/zero")


def bench_fairness(service: Service, floor: Floor) -> None:
    """Measure Status calls of the admin, alone and beside another user.

    The other user first only has jobs and streams, and then also starts jobs. The floor: bare
    calls, alone and beside as many starts by hand. It shows what the starts leave of the machine.
    """
    bare_alone, bare_loaded = _floor(floor)
    client = service.client
    job_id = client.start("sleep", ["1000000"])

    def statuses() -> list[float]:
        return times(lambda: client.status(job_id), _STATUSES)

    alone = sampled({"alone": statuses}, _ROUNDS, _TURNS)["alone"]
    greedy = start_program(client, "-m", __name__, "--greedy", service.address)
    with greedy:

        def beside(what: str) -> list[float]:
            _tell(greedy, what)
            return statuses()

        found = sampled(
            {what: functools.partial(beside, what) for what in ("rest", "start")}, _ROUNDS, _TURNS
        )
        greedy.communicate()
    resting, loaded = found.values()
    jobs, streams, starts = PER_USER.running_jobs, PER_USER.streams, PER_USER.starts_per_second
    print_heading(
        f"Status beside a user at every ceiling ({jobs:,} jobs, {streams:,} streams, "
        f"{starts} starts/s, kept output): time / time"
    )
    for what, ours, theirs, aim in (
        ("jobs and streams / alone", resting, alone, ""),
        ("jobs, streams and starts / jobs and streams", loaded, resting, ""),
        ("all / alone", loaded, alone, "<= 2"),
        ("(a bare call beside starts by hand / alone)", bare_loaded, bare_alone, ""),
    ):
        for percent in _SHOWN:
            a, b = ([percentile(each, percent) for each in rounds] for rounds in (ours, theirs))
            detail = f"{percentile(a, 50) * 1e3:.2f} ms / {percentile(b, 50) * 1e3:.2f} ms"
            report_ratio(f"{what}, p{percent}", a, b, detail, aim)


def _floor(floor: Floor) -> tuple[list[list[float]], list[list[float]]]:
    """Return the seconds of bare calls, alone and beside starts by hand."""

    def calls() -> list[float]:
        return times(floor.unary, _STATUSES)

    with (
        contextlib.closing(ByHand("clone3", None, None)) as hand,
        ThreadPoolExecutor(1) as starter,
    ):
        pause_s = 1 / (PER_USER.starts_per_second or 1)

        def beside_starts() -> list[float]:
            starts = starter.submit(hand.start, _HAND_STARTS, gap_s=pause_s)
            taken = calls()
            starts.result()
            return taken

        found = sampled({"alone": calls, "beside": beside_starts}, _ROUNDS, _TURNS)
    return found["alone"], found["beside"]


def _tell(program: subprocess.Popen[str], what: str) -> None:
    """Tell the greedy program to "start" or to "rest"; return when it has confirmed."""
    if program.stdin is None or program.stdout is None:
        raise AssertionError("both are pipes")
    program.stdin.write(f"{what}\n")
    program.stdin.flush()
    program.stdout.readline()


def _be_greedy(address: str) -> None:
    """Keep as many jobs and streams as a user may have, and start jobs when told to.

    Ends at the end of stdin.
    """
    starting, done = threading.Event(), threading.Event()
    with Client(address, certs=CERTS) as client:
        client.login("user", "user")
        # One job fewer than the ceiling, because the short jobs below need room.
        sleepers = (PER_USER.running_jobs or 0) - 1
        script = "echo; exec sleep 1000000"
        jobs = [_start_in_turn(client, "sh", "-c", script) for _ in range(sleepers)]
        streams = [client.stream(jobs[0]) for _ in range(PER_USER.streams or 0)]
        for stream in streams:
            next(stream)  # the stream is open now; the job writes nothing more

        def start() -> None:
            pause_s = 1 / (PER_USER.starts_per_second or 1)
            while not done.is_set():
                if not starting.wait(0.1):
                    continue
                due = time.monotonic() + pause_s
                _start_in_turn(client, *_OUTPUT)
                done.wait(max(0, due - time.monotonic()))

        starter = threading.Thread(target=start)
        starter.start()
        print("ready", flush=True)
        with contextlib.suppress(EOFError):
            while True:
                if input() == "start":
                    starting.set()
                else:
                    starting.clear()
                print("so be it", flush=True)
        starting.set()
        done.set()
        starter.join()


def _start_in_turn(client: Client, *argv: str) -> str:
    """Start a job; wait first if the user's rate of starts requires it."""
    while True:
        try:
            return client.start(argv[0], argv[1:])
        except ClientError as error:
            if error.code != "RESOURCE_EXHAUSTED":
                raise
            threading.Event().wait(error.retry_after_s or 0.02)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--greedy", required=True, metavar="ADDRESS")
    _be_greedy(parser.parse_args().greedy)
