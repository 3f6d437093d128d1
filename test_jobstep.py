"""Tests of what runs on a node, without Slurm: the program itself, with pipes in place of srun."""

from __future__ import annotations

import ast
import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from messages import wait_ready
from testkit import GUARD_S, make_fifo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Begin = Callable[..., "_Step"]

_TEXT = (Path(__file__).resolve().parent / "jobstep.py").read_text()


class _Step:
    """A step. `events`: what it has reported; `output`: what it has written, after `wait`."""

    def __init__(self, tmp: Path, argv: list[str], **order: Any) -> None:
        work = {
            "argv": argv,
            "env": {"PATH": os.defpath, "TMPDIR": f"{tmp}/job"},
            "home": str(tmp),
            "directory": None,
            "tmp": f"{tmp}/job",
            "stdin": False,
            "linger": 10,
            "require": {},
        } | order
        text = json.dumps(work)
        parts = {f"JW_{n}": text[n * 50_000 :][:50_000] for n in range(len(text) // 50_000 + 1)}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TEXT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # `communicate` would not see what `readline` has read ahead
            env={**parts, "SLURMD_NODENAME": "node1", "SLURM_JOB_ID": "7"},
        )
        self.events: list[dict[str, Any]] = []

    def event(self) -> dict[str, Any]:
        """Return the next event. An empty line precedes it."""
        assert self.process.stderr
        line = self.process.stderr.readline().strip() or self.process.stderr.readline()
        self.events.append(json.loads(line))
        return self.events[-1]

    def send(self, kind: bytes, body: bytes = b"") -> None:
        assert self.process.stdin
        self.process.stdin.write(kind + len(body).to_bytes(4, "big") + body)
        self.process.stdin.flush()

    def wait(self) -> tuple[bytes, dict[str, Any]]:
        """Return the output and the last event."""
        output, rest = self.process.communicate(timeout=GUARD_S)
        self.events += [json.loads(line) for line in rest.splitlines() if line]
        return output, self.events[-1]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Start a step with a command; whatever the test leaves is killed."""
    steps = []

    def start(*argv: str, **order: Any) -> _Step:
        steps.append(_Step(tmp_path, list(argv), **order))
        return steps[-1]

    yield start
    for step in steps:
        step.process.kill()
        step.process.wait()
        for stream in (step.process.stdin, step.process.stdout, step.process.stderr):
            if stream:
                stream.close()


def test_command_runs_and_its_end_is_told(begin: Begin) -> None:
    """With the exit code, the count of bytes and what was used."""
    step = begin("sh", "-c", "echo out; echo err >&2; exit 5")
    started = step.event()
    output, end = step.wait()
    assert (started["event"], started["node"], started["id"]) == ("started", "node1", "7")
    assert output == b"out\nerr\n"
    assert (end["event"], end["exit_code"], end["signal"], end["bytes"]) == ("end", 5, None, 8)
    assert end["usage"]["memory_peak_bytes"] > 0
    assert [end[name] for name in ("is_killed", "is_terminated", "is_cancelled", "killed")] == [
        *(False, False, False, 0)
    ]


def test_command_has_a_pipe_a_session_and_no_more_rights(begin: Begin) -> None:
    """And /dev/null as stdin, umask 077, no core dumps, no signal ignored or blocked."""
    code = (
        "import os, resource, signal, stat\n"
        "print(stat.S_ISFIFO(os.fstat(1).st_mode), os.path.sameopenfile(1, 2))\n"
        "print(os.getsid(0) == os.getpid(), oct(os.umask(0)), os.readlink('/proc/self/fd/0'))\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), os.getcwd() == os.environ['H'])\n"
        "text = open('/proc/self/status').read()\n"
        "print([l for l in text.splitlines() if l.startswith(('NoNewPrivs', 'SigBlk'))])\n"
        "print(signal.getsignal(signal.SIGHUP) is signal.SIG_DFL, len(os.listdir('/proc/self/fd')))"
    )
    home = os.path.realpath("/")
    step = begin(sys.executable, "-c", code, env={"H": home}, home=home)
    output, _ = step.wait()
    assert output.decode().splitlines() == [
        "True True",
        "True 0o77 /dev/null",
        "(0, 0) True",
        "['SigBlk:\\t0000000000000000', 'NoNewPrivs:\\t1']",
        "True 4",  # 0, 1, 2, and the directory that is listed
    ]


@pytest.mark.parametrize(
    ("argv", "order", "stage", "name"),
    [
        (["no-such-command"], {}, "exec", "ENOENT"),
        (["/etc/passwd"], {}, "exec", "EACCES"),
        (["true"], {"directory": "/no/such/directory"}, "enter", "ENOENT"),
    ],
)
def test_what_keeps_a_command_from_running_is_told(
    begin: Begin, argv: list[str], order: dict[str, Any], stage: str, name: str
) -> None:
    """With the errno, and nothing else."""
    step = begin(*argv, **order)
    output, event = step.wait()
    assert (output, step.events) == (b"", [event])
    assert (event["event"], event["stage"]) == ("failed", stage)
    assert errno.errorcode[event["errno"]] == name


def test_argv_of_100000_bytes_arrives(begin: Begin) -> None:
    """In more than one variable, bytes that are no text included."""
    long = "x" * 70_000
    step = begin("printf", "%s", long, "\udcff", "y" * 30_000)
    output, end = step.wait()
    assert output == long.encode() + b"\xff" + b"y" * 30_000
    assert end["bytes"] == 100_001


def test_megabytes_of_any_bytes_are_exact(begin: Begin, tmp_path: Path) -> None:
    """Although stdout takes less at a time than the command writes."""
    data = os.urandom(5_000_000)
    (tmp_path / "data").write_bytes(data)
    output, end = begin("cat", str(tmp_path / "data")).wait()
    assert output == data
    assert end["bytes"] == len(data)


_ESCAPE = (
    "setsid sh -c 'setsid sh -c \"echo \\$\\$; exec sleep 1000\" & echo $$; exec sleep 1000' & "
)


def _lines(step: _Step, count: int) -> list[int]:
    assert step.process.stdout
    return [int(step.process.stdout.readline()) for _ in range(count)]


def _is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def test_kill_reaches_what_left_the_session_and_lost_its_parents(begin: Begin) -> None:
    """All of it is gone when the end is told."""
    step = begin("sh", "-c", _ESCAPE + "sleep 1000")
    pids = _lines(step, 2)
    step.process.send_signal(signal.SIGUSR1)
    _, end = step.wait()
    assert (end["signal"], end["is_killed"]) == (signal.SIGKILL, True)
    assert all(map(_is_gone, pids))


def test_kill_comes_through_although_nobody_reads_the_output(begin: Begin) -> None:
    """While the step writes, and cannot go on."""
    step = begin("sh", "-c", "echo $$; exec yes")
    assert step.process.stdout
    beginning = os.read(step.process.stdout.fileno(), 100)
    pidfd = os.pidfd_open(int(beginning.split()[0]))
    try:
        step.process.send_signal(signal.SIGUSR1)
        assert wait_ready(pidfd, select.POLLIN, GUARD_S)
    finally:
        os.close(pidfd)
    output, end = step.wait()
    assert (end["signal"], end["is_killed"]) == (signal.SIGKILL, True)
    assert end["bytes"] == len(beginning) + len(output)


def test_what_outlives_the_command_is_killed_and_counted(begin: Begin) -> None:
    """After the linger, and without a signal to the command itself."""
    step = begin("sh", "-c", "setsid sleep 1000 & sleep 1000 & exit 3", linger=0)
    _, end = step.wait()
    assert (end["exit_code"], end["is_killed"], end["killed"]) == (3, False, 2)


def test_processes_that_hold_the_output_may_linger(begin: Begin, tmp_path: Path) -> None:
    """Until they have written what they had to write."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    step = begin("sh", "-c", f"(read line; echo late) <{fifo} & exit 0")
    fifo.write_text("go\n")
    output, end = step.wait()
    assert (output, end["killed"], end["exit_code"]) == (b"late\n", 0, 0)


def test_terminated_job_ends_as_it_likes(begin: Begin) -> None:
    """SIGTERM reaches each process, also that of Slurm; the end says who has sent it."""
    for by_slurm in False, True:
        step = begin(
            "sh", "-c", "trap 'echo bye; exit 4' TERM; echo; while read x; do :; done", stdin=True
        )
        assert step.process.stdout
        step.process.stdout.readline()
        if by_slurm:
            step.process.terminate()
        else:
            step.send(b"T")
        output, end = step.wait()
        assert (output, end["exit_code"]) == (b"bye\n", 4)
        assert (end["is_terminated"], end["is_cancelled"]) == (not by_slurm, by_slurm)


@pytest.mark.parametrize("everything", [0, 1])
def test_signal_reaches_the_command(begin: Begin, everything: int) -> None:
    """Any signal; the end is then the command's own."""
    step = begin("sh", "-c", "echo; exec sleep 1000")
    assert step.process.stdout
    step.process.stdout.readline()
    step.send(b"S", bytes([signal.SIGHUP, everything]))
    _, end = step.wait()
    assert (end["signal"], end["is_killed"], end["is_terminated"]) == (signal.SIGHUP, False, False)


def test_input_is_passed_on_and_acknowledged(begin: Begin) -> None:
    """To its end."""
    step = begin("cat", stdin=True)
    data = os.urandom(3000)
    step.send(b"I", data)
    step.send(b"I", b"more")
    step.send(b"E")
    output, end = step.wait()
    assert output == data + b"more"
    assert [each["bytes"] for each in step.events if each["event"] == "ack"][-1] == 3004
    assert end["exit_code"] == 0


def test_closed_input_is_told(begin: Begin, tmp_path: Path) -> None:
    """As soon as the command has closed its stdin."""
    fifo = make_fifo(tmp_path / "fifo")
    step = begin("sh", "-c", f"exec <&-; read -r go <{fifo}", stdin=True)
    assert step.event()["event"] == "started"
    assert step.event()["event"] == "closed"
    fifo.write_bytes(b"\n")
    assert step.wait()[1]["exit_code"] == 0


def test_limit_that_is_not_enforced_keeps_the_command_from_running(begin: Begin) -> None:
    """If it is required; the others are not named."""
    step = begin("touch", "ran", require={"io_write_bps": 1})
    output, event = step.wait()
    assert (output, event) == (b"", {"event": "refused", "missing": ["io_write_bps"]})


def test_tmpdir_is_made_for_the_command_and_removed(begin: Begin, tmp_path: Path) -> None:
    """With all that is in it, and for its user alone. Slurm's number of the job ends its name."""
    step = begin("sh", "-c", 'mkdir -p "$TMPDIR/a/b"; touch "$TMPDIR/a/c"; stat -c %a:%n "$TMPDIR"')
    output, _ = step.wait()
    assert output.decode() == f"700:{tmp_path}/job.7\n"
    assert not list(tmp_path.iterdir())


def test_output_of_a_terminal_is_exact(tmp_path: Path) -> None:
    """srun gives the step a terminal as stdout, which would change line ends."""
    master, slave = os.openpty()
    data = bytes(range(256)) * 100
    (tmp_path / "data").write_bytes(data)
    found = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(master, 65536):
                found.extend(chunk)
        except OSError:
            pass  # EIO: nobody has the other end

    reader = threading.Thread(target=read)
    reader.start()
    order: dict[str, Any] = {
        "argv": ["cat", str(tmp_path / "data")],
        "env": {"PATH": os.environ["PATH"]},
    }
    order |= {"home": "/", "directory": None, "tmp": str(tmp_path / "t"), "stdin": False}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TEXT],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=subprocess.PIPE,
        env={"JW_0": json.dumps(order | {"linger": 0, "require": {}})},
        check=False,
    )
    os.close(slave)
    reader.join(GUARD_S)
    os.close(master)
    assert json.loads(done.stderr.splitlines()[-1])["bytes"] == len(data)
    assert bytes(found) == data


def test_an_old_python_can_run_it() -> None:
    """3.9 or newer: nothing of the text is newer than that."""
    ast.parse(_TEXT, feature_version=(3, 9))
