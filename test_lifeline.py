"""Tests of lifelines: they end with the process, also if the process itself cannot end."""

from __future__ import annotations

import errno
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lifeline import Lifeline
from messages import wait_ready
from spawner import Spawner
from testkit import GUARD_S, descriptors_of, refuse_call

_HERE = Path(__file__).parent
_UNSHARE = {"x86_64": 272, "aarch64": 97}[platform.machine()]  # the number of the system call

# A child keeps the lock of a pipe in splice(2), so that a thread of ours hangs in a read of it.
_HANGS = """
import os, socket, sys, threading
from spawner import Restart, Spawner
from successor import take_over
from pathlib import Path

def hang():
    read_fd, write_fd = os.pipe()
    idle, _ = socket.socketpair()
    if os.fork() == 0:
        os.splice(idle.fileno(), write_fd, 1)
        os._exit(0)
    os.set_blocking(read_fd, False)
    def read():
        while True:
            try:
                os.read(read_fd, 1)
            except BlockingIOError:
                pass
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    stat = f"/proc/self/task/{thread.native_id}/stat"
    while open(stat, "rb").read().rpartition(b")")[2].split()[0] != b"D":
        os.sched_yield()

def start(spawner, job):
    output_fd, stdout_fd = os.pipe()
    exit_fd, their_exit_fd = os.pipe()
    fds = {"output_fd": output_fd} if spawner.keeps_jobs else {}
    process = spawner.fork(job, stdout_fd=int(sys.argv[2]), exit_fd=their_exit_fd, **fds)
    process.execute(["sh", "-c", "echo up; exec sleep infinity"], {"PATH": os.defpath})
"""

_ONE = """
spawner = Spawner()
"""

_NEXT = """
former = Spawner(restart=Restart(Path(sys.argv[1]), 0.1, None))
start(former, "kept")
former.leave()
duties = {"uids": None, "homes": None, "tmp": None, "host_accounts": False}
heritage = take_over(sys.argv[1], duties, bases=[None], window_s=0.1)
spawner = Spawner(heritage=heritage)
"""

_END = """
start(spawner, "a")
os.close(int(sys.argv[2]))
spawner.hold_lifeline()
hang()
os.write(1, b"hangs")
threading.Event().wait()
"""


# In the tests' kernel, which is older than PIDFD_THREAD (Linux 6.9).
@pytest.mark.kernel
@pytest.mark.parametrize("program", [_ONE, _NEXT], ids=["started", "taken over"])
def test_fork_server_ends_the_jobs_of_a_process_that_cannot_die(
    program: str, tmp_path: Path
) -> None:
    """SIGKILL does not end the main process, because a thread of it hangs in the kernel."""
    jobs_fd, stdout_fd = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", _HANGS + program + _END, str(tmp_path), str(stdout_fd)],
        cwd=_HERE,
        pass_fds=[stdout_fd],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as main:
        try:
            os.close(stdout_fd)
            assert main.stdout is not None
            assert main.stdout.read(5) == b"hangs"
            main.kill()
            with open(jobs_fd, "rb") as jobs:
                assert set(jobs.read().split()) == {b"up"}  # to the end: no job has it any more
            assert main.poll() is None
        finally:
            os.killpg(main.pid, signal.SIGKILL)  # also what makes it hang


def test_closed_lifeline_ends_for_those_who_have_it_and_leaves_nothing() -> None:
    """`close` may be repeated. The thread has ended then."""
    before = descriptors_of(), threading.active_count()
    lifeline = Lifeline()
    theirs = os.dup(lifeline.fileno())
    assert not wait_ready(theirs, select.POLLIN, 0)
    lifeline.close()
    lifeline.close()
    assert os.read(theirs, 1) == b""
    os.close(theirs)
    assert (descriptors_of(), threading.active_count()) == before


def test_lifeline_holds_nothing_else_open() -> None:
    """A file that was open when the lifeline was made can be closed."""
    ours, theirs = socket.socketpair()
    lifeline = Lifeline()
    theirs.close()
    assert ours.recv(1) == b""
    ours.close()
    lifeline.close()


_FORKS = """
import os, signal, socket
from lifeline import Lifeline
lifeline = Lifeline()
socket.send_fds(socket.socket(fileno=0), [b"x"], [lifeline.fileno()])
if os.fork():
    os.kill(os.getpid(), 9)
signal.pause()
"""


def test_child_does_not_keep_a_lifeline_of_its_parent() -> None:
    """A fork has all descriptors of its parent, and the other end is not one of these."""
    ours, theirs = socket.socketpair()
    with (
        ours,
        subprocess.Popen(
            [sys.executable, "-c", _FORKS],
            cwd=_HERE,
            stdin=theirs.fileno(),
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as main,
    ):
        theirs.close()
        _, (fd,), *_ = socket.recv_fds(ours, 1, 1)
        assert os.read(fd, 1) == b""
        os.close(fd)
        assert main.wait(GUARD_S) == -signal.SIGKILL
        os.killpg(main.pid, signal.SIGKILL)  # raises if the child has ended


def test_lifeline_is_refused_where_unshare_is() -> None:
    """Containers often refuse unshare(2). Nothing is left then; a spawner goes on without."""

    def make() -> None:
        refuse_call(_UNSHARE, errno.EPERM)
        before = descriptors_of(), threading.active_count()
        with pytest.raises(PermissionError, match="unshare"):
            Lifeline()
        assert (descriptors_of(), threading.active_count()) == before
        with Spawner() as spawner:
            spawner.hold_lifeline()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(make).result()
