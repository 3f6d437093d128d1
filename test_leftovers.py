"""Tests of what the jobs of a user leave behind: real jobs of two users, and the real objects."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import leftovers
from leftovers import DIRECTORIES, Leftovers
from privileges import can_change_user, can_kill_any
from testkit import GUARD_S, await_output, public_python
from worker import Worker

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

# Of this process alone: another one that runs these tests removes what is left of its users.
_ALICE = 1_200_000 + os.getpid() % 10_000 * 10
_BOB = _ALICE + 1

# 0o1600 is IPC_CREAT and a mode. Without a mounted file system nobody could find a queue of POSIX.
_LEAVE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
name = os.environ["JOB_ID"]
for number in libc.shmget(0, 1 << 20, 0o1600), libc.semget(0, 3, 0o1600), libc.msgget(0, 0o1600):
    assert number >= 0, os.strerror(ctypes.get_errno())
queue = libc.mq_open(b"/" + name.encode(), os.O_RDWR | os.O_CREAT, 0o600, None)
error = ctypes.get_errno()
assert queue >= 0 if os.path.ismount("/dev/mqueue") else error in (24, 38), os.strerror(error)
for directory in filter(os.path.isdir, ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")):
    with open(f"{directory}/{name}", "wb") as file:
        file.write(b"x" * 100_000)
    os.symlink("/etc/passwd", f"{directory}/{name}-link")
    os.mkdir(f"{directory}/{name}-closed")
    open(f"{directory}/{name}-closed/file", "wb").close()
    os.chmod(f"{directory}/{name}-closed", 0)
"""
_LEAVE_AND_STAY = f"{_LEAVE}\nprint('made', flush=True)\nimport signal; signal.pause()"
_OBJECTS = 3 + 3 * 3  # so many objects it leaves at least
# Deeper than Python can recurse, and longer than a path can be.
_LEAVE_A_DEEP_TREE = """
import os
os.chdir("/tmp")
name = os.environ["JOB_ID"]
for _ in range(1500):
    os.mkdir(name)
    os.chdir(name)
    open("file", "wb").close()
"""
_LEAVE_MANY = """
import os
many = f"/tmp/{os.environ['JOB_ID']}"
os.mkdir(many)
for number in range(20_000):
    open(f"{many}/{number}", "wb").close()
"""


@pytest.fixture
def worker(way_to_fork: str) -> Iterator[Worker]:
    """A worker whose jobs run as users of their own; in the end nothing of theirs may be left."""
    del way_to_fork
    if not (can_change_user() and can_kill_any()):
        pytest.skip("needs root")
    with Worker(enforcement="off", uids=range(_ALICE, _BOB + 1)) as worker:
        yield worker
    assert _left_of(_ALICE) == _left_of(_BOB) == []


def _left_of(uid: int) -> list[str]:
    """Return what belongs to a user outside of any process."""
    left = []
    for kind in ("shm", "sem", "msg"):
        lines = [each.split() for each in Path("/proc/sysvipc", kind).read_text().splitlines()]
        column = lines[0].index("uid")
        left += [f"{kind} {each[1]}" for each in lines[1:] if each[column] == str(uid)]
    for directory in filter(os.path.isdir, DIRECTORIES):
        with os.scandir(directory) as entries:
            for each in entries:
                with contextlib.suppress(FileNotFoundError):  # another program's, removed meanwhile
                    if each.stat(follow_symlinks=False).st_uid == uid:
                        left.append(each.path)
    return left


def _start(worker: Worker, program: str, uid: int = _ALICE) -> str:
    return worker.start(public_python(), ["-I", "-S", "-c", program], uid=uid)


def _run(worker: Worker, program: str, uid: int = _ALICE) -> None:
    job = worker.wait(_start(worker, program, uid), GUARD_S)
    with worker.stream(job.job_id) as chunks:
        assert job.exit_code == 0, b"".join(chunks).decode()


def test_nothing_is_left_when_the_last_job_of_a_user_has_ended(worker: Worker) -> None:
    """Whoever learns of the end finds no object and no file of the user, and all of the others."""
    other = _start(worker, _LEAVE_AND_STAY, _BOB)
    await_output(worker, other, b"made")
    kept = _left_of(_BOB)
    _run(worker, _LEAVE)
    assert _left_of(_ALICE) == []
    assert _left_of(_BOB) == kept
    assert len(kept) >= _OBJECTS
    worker.stop(other)
    assert _left_of(_BOB) == []


def test_everything_stays_while_another_job_of_the_user_runs(worker: Worker) -> None:
    """Jobs of one user may work together."""
    running = worker.start("sleep", ["infinity"], uid=_ALICE)
    _run(worker, _LEAVE)
    assert len(_left_of(_ALICE)) >= _OBJECTS
    worker.stop(running)
    assert _left_of(_ALICE) == []


@pytest.mark.parametrize("program", [_LEAVE_A_DEEP_TREE, _LEAVE_MANY])
def test_large_trees_are_removed(
    worker: Worker, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the depth of a tree nor the number of files keeps any of it."""
    monkeypatch.setattr(leftovers, "_CLEARING_S", GUARD_S)  # the end of the job waits for all of it
    _run(worker, program)
    assert _left_of(_ALICE) == []


def test_failed_start_counts_as_no_job(worker: Worker) -> None:
    """After a start that fails, the user's last job still is the last one."""
    with pytest.raises(ValueError, match="no such file"):
        worker.start("/no/such", uid=_ALICE)
    _run(worker, _LEAVE)
    assert _left_of(_ALICE) == []


def test_job_that_starts_ends_the_removal(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job has made stays, although the removal after the job before was not over."""
    removals = []
    clear = worker._spawner.clear

    def watched(uid: int) -> tuple[socket.socket, int]:
        removals.append(clear(uid))
        return removals[-1]

    monkeypatch.setattr(worker._parts.leftovers, "_clear", watched)
    monkeypatch.setattr(leftovers, "_CLEARING_S", 0.0)  # the end of the job waits for no removal
    _run(worker, _LEAVE_MANY)
    monkeypatch.setattr(leftovers, "_CLEARING_S", GUARD_S)
    job = _start(worker, _LEAVE_AND_STAY)
    await_output(worker, job, b"made")
    ((sock, _),) = removals
    assert sock.fileno() < 0  # the start has ended the removal, or waited for its end
    assert len(_left_of(_ALICE)) >= _OBJECTS
    worker.stop(job)


@pytest.mark.parametrize(
    "uid",
    [0, 1000, _ALICE - 1, _BOB + 1, float(_ALICE), str(_ALICE), None],
    ids=["root", "an account", "below", "above", "a float", "a text", "none"],
)
def test_fork_server_clears_up_only_for_users_of_the_range(worker: Worker, uid: Any) -> None:
    """A main process that was taken over removes nobody else's files."""
    with pytest.raises(PermissionError):
        worker._spawner.clear(uid)


def test_a_directory_is_looked_at_again_only_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look costs as much as there are files. A new file of the user is found all the same."""
    directory = str(tmp_path)
    monkeypatch.setattr(leftovers, "DIRECTORIES", (directory,))
    looked, cleared = [], []
    look = leftovers._uids_in

    def uids_in(path: str) -> frozenset[int] | None:
        looked.append(path)
        return look(path)

    monkeypatch.setattr(leftovers, "_uids_in", uids_in)
    monkeypatch.setattr(leftovers, "_SYSTEM_V", {})  # this user may have objects of other programs

    def clear(uid: int) -> tuple[socket.socket, int]:
        cleared.append(uid)
        raise OSError(errno.EAGAIN, "no process")

    ended = Leftovers(clear)

    def job_ends(uid: int) -> tuple[int, int]:
        ended.begin(uid)
        ended.end(uid)
        return len(looked), len(cleared)

    me = os.getuid()
    assert job_ends(me) == (1, 0)  # the directory is new, so it may change within the same tick
    assert job_ends(me) == (2, 0)
    os.utime(directory, (0, 0))
    assert [job_ends(me) for _ in range(3)] == [(3, 0)] * 3
    (tmp_path / "file").touch()
    assert job_ends(me) == (4, 1)
    os.utime(directory, (1, 1))
    assert job_ends(me) == (5, 2)
    assert job_ends(me) == (5, 3)
    assert job_ends(me + 1) == (5, 3)
    (tmp_path / "file").unlink()
    assert job_ends(me) == (6, 3)
