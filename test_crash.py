"""A program that starts, ends and removes jobs is killed at random moments, again and again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

from jobstate import EndReason, Status
from jobtable import JobTable
from store import Store
from worker import UnknownJobError, Worker

_HERE = Path(__file__).resolve().parent
_KILLS = int(os.environ.get("JOBWORKER_CRASHES", "10"))

# Each line of its output says what has happened. What it is about to do comes before.
_PROGRAM = """
import os, sys, threading
from store import Store
from worker import Worker

directory, number, *again = sys.argv[1:]

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def run(worker, request_id):
    # The mark says that the command has run, and for which request.
    script = f"echo {request_id} >>{directory}/marks; echo {request_id}; exit 7"
    say("request", request_id)
    known = worker.started_by("alice", request_id)
    job_id = known[0] if known else worker.start(
        "sh", ["-c", script], owner="alice", request_id=request_id, labels={"of": request_id}
    )
    say("started", request_id, job_id)
    return job_id

def loop(worker, name):
    for i in range(10_000):
        request_id = f"{number}.{name}.{i}"
        job_id = run(worker, request_id)
        job = worker.wait(job_id)
        say("ended", request_id, job_id, job.exit_code)
        if i % 3 == 0:
            say("removing", request_id, job_id)
            worker.remove(job_id)
            say("removed", request_id, job_id)

with Store(f"{directory}/store") as store:
    with Worker(enforcement="off", store=store, output_dir=f"{directory}/output") as worker:
        for request_id in again:
            worker.wait(run(worker, request_id))
        for name in "ab":
            threading.Thread(target=loop, args=(worker, name), daemon=True).start()
        say("up")
        threading.Event().wait()
"""


class _Told:
    """What the killed programs have said, by job."""

    def __init__(self) -> None:
        self.started: dict[str, str] = {}  # the request of each job
        self.ended: set[str] = set()
        self.removing: set[str] = set()
        self.removed: set[str] = set()
        self.unanswered: set[str] = set()  # requests

    def note(self, line: str) -> None:
        match line.split():
            case ["request", request_id]:
                self.unanswered.add(request_id)
            case ["started", request_id, job_id]:
                self.unanswered.discard(request_id)
                self.started[job_id] = request_id
            case ["ended", _, job_id, code]:
                # A job of a former program may be LOST.
                self.ended |= {job_id} if code == "7" else set()
            case ["removing", _, job_id]:
                self.removing.add(job_id)
            case ["removed", _, job_id]:
                self.removed.add(job_id)


def _kill_at_random(directory: Path, number: int, told: _Told, dice: random.Random) -> None:
    """Run the program and kill it after a random number of lines."""
    again = sorted(told.unanswered)
    command = [sys.executable, "-S", "-c", _PROGRAM, str(directory), str(number), *again]
    with subprocess.Popen(command, cwd=_HERE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = dice.randrange(1, 60)
        for line in process.stdout:
            told.note(line)
            lines -= 1
            if lines == 0:
                process.kill()
    assert process.returncode == -9


def test_no_job_is_lost_or_run_twice_by_a_kill(tmp_path: Path) -> None:
    """Whatever was confirmed is there after a kill: starts, ends, output, removals."""
    seed = random.randrange(1 << 32)
    dice, told = random.Random(seed), _Told()
    for number in range(_KILLS):
        _kill_at_random(tmp_path, number, told, dice)
        with Store(tmp_path / "store") as store:
            rows = {row.job.job_id: row.job for row in JobTable(store).page(most=1_000_000)}
        assert told.started.keys() - told.removing <= rows.keys(), seed
        assert not told.removed & rows.keys(), seed
        for job_id in told.ended & rows.keys():
            assert (rows[job_id].end_reason, rows[job_id].exit_code) == (EndReason.EXITED, 7), seed
    with (
        Store(tmp_path / "store") as store,
        Worker(enforcement="off", store=store, output_dir=tmp_path / "output") as worker,
    ):
        for job in worker.list():
            assert job.status is Status.FINISHED
            assert job.end_reason in (EndReason.EXITED, EndReason.LOST)
            if job.end_reason is EndReason.EXITED:
                assert b"".join(worker.stream(job.job_id)) == f"{job.labels['of']}\n".encode()
        for job_id in told.removed:
            try:
                worker.status(job_id)
            except UnknownJobError:
                continue
            raise AssertionError(f"{job_id} is back, {seed}")
        kept = {f"{job.job_id}.out" for job in worker.list()}
    assert {path.name for path in (tmp_path / "output").iterdir()} == kept
    marks = Counter((tmp_path / "marks").read_text().split())
    assert marks.most_common(1)[0][1] == 1, f"run twice, seed {seed}"
    confirmed = {told.started[job_id] for job_id in told.ended & told.started.keys()}
    assert confirmed <= marks.keys()
