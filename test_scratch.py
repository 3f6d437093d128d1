"""Tests of the places that jobs have on disk: a TMPDIR for each job, a home for each user."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import tracemalloc
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from environment import Account
from leftovers import clear_directory
from privileges import can_change_user, can_kill_any
from scratch import Scratch, make_homes
from spawner import Spawner
from store import Store
from testkit import GUARD_S, await_output, public_python, settle_spares
from worker import EndReason, JobRunningError, Retention, Status, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from client import Client
    from testkit import ServerProgram

_HERE = Path(__file__).resolve().parent
_UIDS = range(71_001, 71_010)
_ALICE, _BOB = _UIDS[:2]

# Fills TMPDIR with what is hard to remove, and with links to $1, which must stay as it is.
_FILL = """
cd "$TMPDIR" || exit 1
ln -s "$1" link; ln "$1/kept" hard 2>/dev/null; mkdir locked; echo x >locked/file
ln -s "$1" locked/link; mkfifo fifo; touch -- '-rf' 'a b' '*'; mkdir .hidden; chmod 0 locked .
"""
_DEEP = """
import os
os.chdir(os.environ["TMPDIR"])
for _ in range(300):
    os.mkdir("d" * 200)
    os.chdir("d" * 200)
"""


def _is_root() -> bool:
    return os.geteuid() == 0 and can_change_user() and can_kill_any()


@pytest.fixture(params=["our user", "users of their own"])
def uid(request: pytest.FixtureRequest) -> int | None:
    """The user of the jobs: None for ours."""
    if request.param == "our user":
        return None
    if not _is_root():
        pytest.skip("needs root")
    return _ALICE


@pytest.fixture
def worker(uid: int | None, public: Path) -> Iterator[Worker]:
    """A worker whose TMPDIRs and homes are below `public`."""
    uids = None if uid is None else _UIDS
    places: dict[str, Any] = {"homes": public / "homes", "tmp_dir": public / "tmp"}
    with Worker(enforcement="off", uids=uids, **places) as worker:
        worker._parts.spares.fill()
        yield worker


@pytest.fixture
def isolated(public: Path) -> Iterator[Worker]:
    """A worker that gives jobs uids of their own."""
    if not _is_root():
        pytest.skip("needs root")
    places: dict[str, Any] = {"homes": public / "homes", "tmp_dir": public / "tmp"}
    with Worker(enforcement="off", uids=_UIDS, **places) as worker:
        worker._parts.spares.fill()
        yield worker


def _output(worker: Worker, job_id: str) -> str:
    with worker.stream(job_id) as chunks:
        text = b"".join(chunks).decode()
    worker.wait(job_id, GUARD_S)
    return text


def _left(worker: Worker, directory: Path) -> list[str]:
    """Return what is in the directory, except the TMPDIR of the next job."""
    settle_spares(worker)
    spare = worker._parts.spares._ready
    return sorted(name for name in os.listdir(directory) if not spare or name != spare.job_id)


# --- TMPDIR -----------------------------------------------------------------------------------


def test_job_has_a_directory_of_its_own_which_goes_with_it(
    worker: Worker, uid: int | None, public: Path
) -> None:
    """It is private and belongs to the job's user. A second job has another one."""
    script = 'echo "$TMPDIR"; stat -c "%a %u %g" "$TMPDIR"; echo x >"$TMPDIR/file"'
    owner = os.geteuid() if uid is None else uid
    group = os.getegid() if uid is None else uid
    for _ in range(2):
        job_id = worker.start("sh", ["-c", script], uid=uid)
        told = _output(worker, job_id).splitlines()
        assert told == [str(public / "tmp" / job_id), f"700 {owner} {group}"]
        assert worker.status(job_id).tmp_directory == ""
        assert _left(worker, public / "tmp") == []


def test_whatever_a_job_leaves_there_is_removed_and_nothing_else(
    worker: Worker, uid: int | None, public: Path
) -> None:
    """Links are not followed, and what the job has made inaccessible goes, too."""
    outside = public / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    for path in (outside, outside / "kept"):
        path.chmod(0o777)
    worker.wait(worker.start("sh", ["-c", _FILL, "sh", str(outside)], uid=uid), GUARD_S)
    assert _left(worker, public / "tmp") == []
    assert (outside / "kept").read_text() == "kept"
    assert stat.S_IMODE(outside.stat().st_mode) == 0o777


def test_tree_that_is_deeper_than_a_path_may_be_is_removed(
    worker: Worker, uid: int | None, public: Path
) -> None:
    """A path has at most 4096 bytes."""
    job = worker.wait(worker.start("/usr/bin/python3", ["-c", _DEEP], uid=uid), GUARD_S)
    if job.exit_code != 0:
        pytest.skip("needs /usr/bin/python3")
    assert _left(worker, public / "tmp") == []


def test_removal_keeps_no_list_of_what_is_there(tmp_path: Path) -> None:
    """No cgroup bounds its memory, and a directory may have millions of entries."""
    for number in range(20_000):
        (tmp_path / f"{'d' * 100}{number}").symlink_to("x")
    tracemalloc.start()
    try:
        clear_directory(str(tmp_path), None, lambda: True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert os.listdir(tmp_path) == []
    assert peak < 1_000_000  # a list of the paths takes 4 MB


def test_user_cannot_hold_up_a_removal(isolated: Worker, public: Path) -> None:
    """The process that removes has the user's rights, but no process of the user can signal it.

    Another job of the user could otherwise stop each such process with SIGSTOP. None would ever
    end, and each would take descriptors of the main process.
    """
    stops = """if True:
        import contextlib, os, signal
        def others():
            with open("/proc/{0}/task/{0}/children".format(os.getppid())) as file:
                return set(map(int, file.read().split()))
        before = others()
        print("begun", flush=True)
        while True:
            for pid in others() - before:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGSTOP)
        """
    fills = 'mkdir "$TMPDIR/d"; cd "$TMPDIR/d"; seq 500 | xargs touch; echo up; read x'
    victim = isolated.start("sh", ["-c", fills], uid=_ALICE, stdin=True)
    await_output(isolated, victim, b"up\n")
    attacker = isolated.start(public_python(), ["-I", "-S", "-c", stops], uid=_ALICE)
    await_output(isolated, attacker, b"begun\n")
    isolated.write_input(victim, b"\n")
    isolated.wait(victim, GUARD_S)
    assert victim not in _left(isolated, public / "tmp")
    assert isolated.status(attacker).status is Status.RUNNING


def test_end_of_the_worker_waits_for_no_removal(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else a job that ignores SIGTERM, and has many files, would use up the server's time.

    Here a removal takes for ever: its process is our own.
    """
    monkeypatch.setattr("scratch._REMOVAL_S", 10 * GUARD_S)
    monkeypatch.setattr("leftovers._CLEARING_S", 0)
    with Worker(enforcement="off", tmp_dir=public / "tmp") as worker:
        worker._scratch._clear = lambda *_: (socket.socket(), os.pidfd_open(os.getpid()))
        script = 'trap "" TERM; echo x >"$TMPDIR/file"; echo ready; exec sleep infinity'
        job_id = worker.start("sh", ["-c", script])
        await_output(worker, job_id, b"ready")
        worker.close(grace=0.1)
        assert worker.status(job_id).end_reason is EndReason.CLOSED


@pytest.mark.parametrize("how", ["empty", "leave"])
def test_thread_of_a_removal_ends_with_its_owner(
    public: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Here the process that empties a TMPDIR does nothing until nobody wants it any more."""
    monkeypatch.setattr("scratch._REMOVAL_S", 0.1)
    monkeypatch.setattr("scratch._EMPTY_S", 0.1)
    monkeypatch.setattr("scratch._JOIN_S", GUARD_S)
    processes = []

    def clear(*_: object) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair()
        with theirs:
            processes.append(subprocess.Popen(["cat"], stdin=theirs.fileno()))
        return ours, os.pidfd_open(processes[-1].pid)

    scratch, job_id = Scratch(public / "tmp", uids=None), str(uuid.uuid4())
    scratch.sweep(clear)
    scratch.make(job_id)
    Path(scratch.path_of(job_id), "file").touch()
    scratch.remove(job_id)
    (thread,) = (each for each in threading.enumerate() if each.name == f"tmp-{job_id[:8]}")
    getattr(scratch, how)()
    assert not thread.is_alive()
    for process in processes:
        process.wait(GUARD_S)
    if how == "empty":
        scratch.close()


def test_end_of_a_job_waits_for_no_other_removal(public: Path) -> None:
    """A job that has looked for millions of names in its TMPDIR makes its removal take seconds.

    The kernel locks the parent meanwhile. The end of another job leaves its TMPDIR to a thread.
    """
    begun, ended = threading.Event(), threading.Event()

    def take_long() -> None:
        begun.set()
        ended.wait(GUARD_S)

    with Worker(enforcement="off", tmp_dir=public / "tmp") as worker:
        slow = threading.Thread(target=worker._scratch._removals.make, args=(take_long,))
        slow.start()
        assert begun.wait(GUARD_S)
        scripts = "true", 'echo x >"$TMPDIR/file"'
        jobs = [worker.start("sh", ["-c", script]) for script in scripts]
        for job_id in jobs:
            worker.wait(job_id, GUARD_S)
        assert _left(worker, public / "tmp") == sorted(jobs)
        names = [f"tmp-{job_id[:8]}" for job_id in jobs]
        removals = [each for each in threading.enumerate() if each.name in names]
        assert len(removals) == len(jobs)
        ended.set()
        for thread in (slow, *removals):
            thread.join(GUARD_S)
        assert _left(worker, public / "tmp") == []


def test_directory_that_is_kept_goes_with_the_job(
    worker: Worker, uid: int | None, public: Path
) -> None:
    """Another job of the same user reads what the first one has left; then it is removed."""
    first = worker.start("sh", ["-c", 'echo result >"$TMPDIR/out"'], uid=uid, keep_tmp=True)
    directory = worker.wait(first, GUARD_S).tmp_directory
    assert directory == str(public / "tmp" / first)
    assert _output(worker, worker.start("cat", [f"{directory}/out"], uid=uid)) == "result\n"
    worker.remove(first)
    assert _left(worker, public / "tmp") == []


def test_kept_directory_survives_the_worker_with_its_job(public: Path) -> None:
    """With a store. What a job has not kept, or a removed job had, the next worker removes."""
    places: dict[str, Any] = {"output_dir": public / "output", "tmp_dir": public / "tmp"}
    with Store(public / "store") as store:
        with Worker(enforcement="off", store=store, **places) as worker:
            kept, running = (
                worker.start("sh", ["-c", script], keep_tmp=True)
                for script in ('echo result >"$TMPDIR/out"', "exec sleep infinity")
            )
            path = Path(worker.wait(kept, GUARD_S).tmp_directory)
        (public / "tmp" / str(uuid.uuid4())).mkdir()
        with Worker(enforcement="off", store=store, **places) as worker:
            assert Path(worker.status(kept).tmp_directory, "out").read_text() == "result\n"
            others = {entry.name for entry in (public / "tmp").iterdir()} - {kept, running}
            assert len(others) <= 1  # the spare's
            worker.remove(kept)
            assert not path.exists()


def test_directory_of_a_running_job_stays(worker: Worker, uid: int | None, public: Path) -> None:
    """Also if the job is asked to be removed."""
    job_id = worker.start("sh", ["-c", "echo ready; exec sleep infinity"], uid=uid, keep_tmp=True)
    await_output(worker, job_id, b"ready")
    with pytest.raises(JobRunningError):
        worker.remove(job_id)
    assert (public / "tmp" / job_id).is_dir()
    worker.stop(job_id)


def test_rule_that_removes_jobs_removes_kept_directories(public: Path) -> None:
    """Here the rule keeps one finished job."""
    rule = Retention(jobs=1)
    with Worker(enforcement="off", tmp_dir=public / "tmp", retention=rule) as worker:
        jobs = [worker.start("sh", ["-c", 'echo >"$TMPDIR/x"'], keep_tmp=True) for _ in range(1)]
        worker.wait(jobs[0], GUARD_S)
        second = worker.start("sh", ["-c", 'echo >"$TMPDIR/x"'], keep_tmp=True)
        worker.wait(second, GUARD_S)
        worker.list()
    assert jobs[0] not in os.listdir(public / "tmp")


def test_start_that_fails_leaves_no_directory(
    worker: Worker, uid: int | None, public: Path
) -> None:
    """Neither a missing command nor a bad directory."""
    options: dict[str, Any]
    for options in ({"cwd": "/no/such"}, {"env": {"PATH": "/no/such"}}):
        with pytest.raises(ValueError, match="/no/such"):
            worker.start("true", uid=uid, **options)
    assert _left(worker, public / "tmp") == []


_ABANDON = """
import os, signal, sys
from worker import Worker
uid = int(sys.argv[2]) if sys.argv[2:] else None
uids = None if uid is None else range(71_001, 71_010)
worker = Worker(enforcement="off", tmp_dir=sys.argv[1], uids=uids)
script = 'cd "$TMPDIR"; mkdir -p a/b; echo x >a/b/c; chmod 0 a; echo ready; sleep 99'
job_id = worker.start("sh", ["-c", script], uid=uid)
with worker.stream(job_id) as chunks:
    next(iter(chunks))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_directories_of_a_worker_that_was_killed_are_removed_by_the_next(
    uid: int | None, public: Path
) -> None:
    """What has another name than a job is not theirs, and stays."""
    tmp = public / "tmp"
    command = [sys.executable, "-c", _ABANDON, str(tmp), *([] if uid is None else [str(uid)])]
    killed = subprocess.run(command, cwd=_HERE, check=False, timeout=GUARD_S)
    assert killed.returncode == -signal.SIGKILL
    left = set(os.listdir(tmp))
    assert any((tmp / name).is_dir() for name in left)
    (tmp / "mine").mkdir()
    with Worker(enforcement="off", tmp_dir=tmp, uids=None if uid is None else _UIDS):
        now = set(os.listdir(tmp))  # it may have made one for its next job
        assert not left & now
        assert "mine" in now


def test_directory_belongs_to_one_worker(public: Path) -> None:
    """A second one would remove the directories of the first one's jobs."""
    with Worker(enforcement="off", tmp_dir=public / "tmp"), pytest.raises(BlockingIOError):
        Worker(enforcement="off", tmp_dir=public / "tmp")


def test_users_cannot_look_into_each_others_directories(isolated: Worker, public: Path) -> None:
    """Nor find out their names, nor put something beside them."""
    script = 'echo secret >"$TMPDIR/file"; echo ready; exec sleep infinity'
    job_id = isolated.start("sh", ["-c", script], uid=_ALICE)
    await_output(isolated, job_id, b"ready")
    attack = 'cat "$1/$2/file"; ls "$1/$2" "$1"; mkdir "$1/new"; rmdir "$1/$2"; mv "$1/$2" /tmp/'
    other = isolated.start("sh", ["-c", attack, "sh", str(public / "tmp"), job_id], uid=_BOB)
    told = _output(isolated, other).splitlines()
    assert len(told) == 6
    assert all("ermission denied" in line for line in told), told
    isolated.stop(job_id)


def test_leader_gives_nothing_away_that_is_not_the_jobs_directory(public: Path) -> None:
    """Somebody who has taken over the main process puts a link in the place of a TMPDIR."""
    if not _is_root():
        pytest.skip("needs root")
    victim, job = public / "victim", str(uuid.uuid4())
    victim.mkdir(0o700)
    tmp = public / "tmp"
    tmp.mkdir()
    (tmp / job).symlink_to(victim)
    read_end, exit_fd = os.pipe()
    with Spawner(uids=_UIDS, tmp=tmp) as spawner, open(os.devnull, "w") as null:
        process = spawner.fork(job, stdout_fd=null.fileno(), exit_fd=exit_fd)
        with pytest.raises(NotADirectoryError):
            process.execute(["/bin/true"], {}, uid=_ALICE, timeout_s=GUARD_S)
        for name in ("..", "/etc", "", "."):
            with pytest.raises(PermissionError):
                spawner.clear(_ALICE, name)
        with pytest.raises(PermissionError):
            spawner.clear(None, job)
    os.close(read_end)
    os.close(exit_fd)
    assert victim.stat().st_uid == os.geteuid()


# --- homes --------------------------------------------------------------------------------------


def test_user_has_a_home_which_stays(isolated: Worker, public: Path) -> None:
    """The first job finds it, empty, private and the user's own; the next finds what it left."""
    account = Account("alice", str(public / "homes" / "alice"))
    script = 'pwd; stat -c "%a %u %g" .; ls -A; echo x >file; echo "$HOME"'
    told = []
    for _ in range(2):
        job_id = isolated.start("sh", ["-c", script], uid=_ALICE, account=account)
        told.append(_output(isolated, job_id).splitlines())
    home = account.home
    assert told[0] == [home, f"700 {_ALICE} {_ALICE}", home]
    assert told[1] == [home, f"700 {_ALICE} {_ALICE}", "file", home]
    assert os.listdir(public / "homes") == ["alice"]


@pytest.mark.parametrize("planted", [[], ["planted"]])
def test_home_is_never_a_directory_of_another_user(
    isolated: Worker, public: Path, planted: list[str]
) -> None:
    """A leader of bob was killed in the middle of making a home, for too little memory, say.

    Its directory is bob's. A leader of alice that has the same number does not make it alice's.
    """
    settle_spares(isolated)
    isolated._spawner.kill("none")  # answered when the spare's process is forked
    spawner = isolated._spawner.pid
    (leader,) = Path(f"/proc/{spawner}/task/{spawner}/children").read_text().split()
    new = public / "homes" / f".new-{leader}"
    new.mkdir()
    os.chown(new, _BOB, _BOB)
    for name in planted:
        (new / name).touch()
    account = Account("alice", str(public / "homes" / "alice"))
    fd = os.open(new, os.O_RDONLY)  # as bob may have it, so that nothing else gets its inode
    try:
        isolated.wait(isolated.start("true", uid=_ALICE, account=account), GUARD_S)
        homes = [each.stat().st_ino for each in (public / "homes").glob("alice")]
        assert homes != [os.fstat(fd).st_ino]
        assert len(homes) == 1 - len(planted)  # a later job, with another number, makes the home
    finally:
        os.close(fd)


def test_home_is_closed_to_other_users(isolated: Worker, public: Path) -> None:
    """Bob begins in / if he claims alice's home, and cannot make a home for somebody else."""
    account = Account("alice", str(public / "homes" / "alice"))
    isolated.wait(isolated.start("true", uid=_ALICE, account=account), GUARD_S)
    attack = 'pwd; ls "$HOME"; ls "$HOME/.."; mkdir "$HOME/../carol"; mv "$HOME" /tmp/'
    told = _output(isolated, isolated.start("sh", ["-c", attack], uid=_BOB, account=account))
    lines = told.splitlines()
    assert lines[0] == "/"
    assert len(lines) == 5
    assert all("ermission denied" in line for line in lines[1:]), told


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../out"])
def test_home_is_made_in_its_directory_only(isolated: Worker, public: Path, name: str) -> None:
    """Whatever the main process asks for."""
    before = public.stat()
    account = Account("alice", f"{public / 'homes'}/{name}")
    job = isolated.wait(isolated.start("true", uid=_ALICE, account=account), GUARD_S)
    assert job.exit_code == 0
    assert (public.stat().st_uid, public.stat().st_mode) == (before.st_uid, before.st_mode)
    assert (public / "homes").stat().st_uid == os.geteuid()
    assert os.listdir(public / "homes") == []
    assert sorted(os.listdir(public)) == ["homes", "tmp"]


def test_what_has_the_name_of_a_home_is_left_alone(isolated: Worker, public: Path) -> None:
    """A link, say. It is not given to the user."""
    victim = public / "victim"
    victim.mkdir(0o700)
    (public / "homes" / "alice").symlink_to(victim)
    account = Account("alice", str(public / "homes" / "alice"))
    assert _output(isolated, isolated.start("pwd", uid=_ALICE, account=account)) == "/\n"
    assert victim.stat().st_uid == os.geteuid()


def test_directory_of_the_homes_is_open_to_pass_and_ours(public: Path) -> None:
    """Whatever the umask and its mode were before. Not if it belongs to somebody else."""
    homes = public / "homes"
    homes.mkdir(0o777)
    assert make_homes(homes) == homes
    assert stat.S_IMODE(homes.stat().st_mode) == 0o711
    assert make_homes(None) is None
    if os.geteuid() == 0:
        os.chown(homes, _ALICE, _ALICE)
        with pytest.raises(PermissionError, match="chown 0 "):
            make_homes(homes)


# --- the server ---------------------------------------------------------------------------------


def test_server_gives_each_user_a_home_in_its_state_directory(
    start_server: Callable[..., ServerProgram],
    connect: Callable[..., Client],
    public: Path,
    tokens: dict[str, str],  # noqa: ARG001 -- all servers have one token key
    make_state: Callable[[], Path],
) -> None:
    """It outlives the server; the TMPDIRs do not. Each user sees only their own."""
    if not _is_root():
        pytest.skip("needs root")
    state = public / "state"
    state.mkdir(0o700)
    (state / "token.key").touch(0o600)
    (state / "token.key").write_bytes((make_state() / "token.key").read_bytes())
    for turn in range(2):
        server = start_server(state=state)
        for name in ("user", "admin"):
            client = connect(name, server.address)
            script = 'pwd; cat note; echo $USER >note; ls -A ..; echo x >"$TMPDIR/x"'
            told = b"".join(client.stream(client.start("sh", ["-c", script]))).decode()
            lines = told.splitlines()
            assert lines[0] == str(state / "homes" / name)
            assert turn == 0 or lines[1] == name
            assert "ermission denied" in lines[-1]
        assert server.end() == 0
        assert os.listdir(state / "tmp") == []
    assert sorted(os.listdir(state / "homes")) == ["admin", "user"]
    assert stat.S_IMODE(state.stat().st_mode) == 0o711


def test_state_directory_that_jobs_cannot_reach_gives_no_homes(
    start_server: Callable[..., ServerProgram], connect: Callable[..., Client], tmp_path: Path
) -> None:
    """The server says which directory is closed, and works. pytest's directories are closed."""
    if not _is_root():
        pytest.skip("needs root")
    assert tmp_path.parents[1].stat().st_mode & 0o077 == 0
    server = start_server()
    client = connect(address=server.address)
    told = b"".join(client.stream(client.start("sh", ["-c", 'pwd; echo x >"$TMPDIR/x"'])))
    assert told == b"/\n"
    assert "is closed to the users of jobs, so jobs have no homes; run: chmod o+x" in (
        server.log.read_text()
    )
