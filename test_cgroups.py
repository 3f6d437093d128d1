"""Tests of the cgroups module: on any host what needs no controllers, the rest marked `kernel`.

A process in a cgroup holds the pipe that is its stdout; end-of-file on that proves that
it and all it started are dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cgroupfs
import cgroups
from cgroups import Cgroup, CgroupError, Subtree
from limits import NO_LIMITS, Limits
from testkit import GUARD_S, NOBODY, joined, own_cgroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HERE = Path(__file__).parent
_CLONE_NEWCGROUP = 0x02000000  # linux/sched.h
_CONTROLLERS = ["cpu", "io", "memory", "pids"]
_MIB = 1024 * 1024


def _open(root: Path, **options: Any) -> Subtree:
    subtree = Subtree.open("require", root=root, **options)
    assert subtree
    return subtree


@pytest.fixture
def subtree(base: Path) -> Iterator[Subtree]:
    with contextlib.closing(_open(base)) as subtree:
        yield subtree


@pytest.fixture
def run_in() -> Iterator[Callable[[Path, str], subprocess.Popen[bytes]]]:
    """Run a shell script in a cgroup; return when it has printed a line."""
    with contextlib.ExitStack() as processes:

        def run(path: Path, script: str) -> subprocess.Popen[bytes]:
            process = processes.enter_context(
                subprocess.Popen(
                    ["sh", "-c", f'echo 0 >"$0/cgroup.procs" || exit; {script}', path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                )
            )
            processes.callback(process.kill)
            assert process.stdout
            assert process.stdout.readline()
            return process

        yield run


_SLEEP = "echo up; exec sleep infinity"
# Ends when all of it is up: a session of its own, a double fork, a stopped process.
_ESCAPE = """
    setsid sleep infinity &
    (setsid sh -c 'sleep infinity & exec sleep infinity' &)
    sh -c 'kill -STOP $$' &
    echo up; exec sleep infinity"""


def _all_dead(process: subprocess.Popen[bytes]) -> bool:
    """Block until nobody holds the process's stdout any more."""
    assert process.stdout
    return process.stdout.read() == b""


def _in(path: Path, function: Callable[[], str], *, as_nobody: bool = False) -> str:
    """Call `function` in a process of its own in a cgroup; return its answer."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()  # not exec: an ordinary user need not be able to read our Python
    if pid == 0:
        try:
            (path / "cgroup.procs").write_text("0")
            if as_nobody:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            answer = function()
        except BaseException:  # noqa: BLE001 -- nothing may get back into pytest
            answer = traceback.format_exc()
        os.write(write_fd, answer.encode())
        os._exit(0)
    os.close(write_fd)
    with open(read_fd) as answer_pipe:
        answer = answer_pipe.read()
    os.waitpid(pid, 0)
    return answer


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


# --- what any host can tell -----------------------------------------------------------------


@pytest.mark.parametrize(
    "senseless",
    [
        {"cpu_cores": 0},
        {"cpu_cores": 0.009},
        {"cpu_cores": -1},
        {"cpu_cores": float("nan")},
        {"cpu_cores": float("inf")},
        {"cpu_cores": "1"},
        {"cpu_cores": True},
        {"memory_bytes": 0},
        {"memory_bytes": 1.5},
        {"memory_bytes": "512M"},
        {"swap_bytes": -1},
        {"io_read_bps": 0},
        {"io_write_bps": -5},
        {"pids": 0},
        {"pids": True},
    ],
    ids=str,
)
def test_senseless_limit_is_refused(senseless: dict[str, Any]) -> None:
    """A limit out of range or of another type is a ValueError that names it and the value."""
    ((name, value),) = senseless.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*not {value!r}"):
        Limits(**senseless)


def test_smallest_limits_are_accepted() -> None:
    """The least of each limit makes sense, and so does none at all."""
    assert Limits(0.01, 1, 0, 1, 1, 1, 1, 1).cpu_cores == 0.01
    assert NO_LIMITS.pids is None


def test_default_limits_are_those_documented() -> None:
    """1 core, 512 MiB without swap, 50 MiB/s each way, 512 processes."""
    assert Limits() == Limits(
        cpu_cores=1.0,
        memory_bytes=512 * _MIB,
        swap_bytes=0,
        io_read_bps=50 * _MIB,
        io_write_bps=50 * _MIB,
        io_read_iops=None,
        io_write_iops=None,
        pids=512,
    )


def test_mounts_are_those_the_kernel_lists() -> None:
    """mountinfo gives the same places and types as the simpler /proc/self/mounts."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    assert [(str(mount.point), mount.type) for mount in cgroups._mounts()] == [
        (point.encode().decode("unicode_escape"), kind) for _, point, kind, *_ in lines
    ]


def test_physical_disks_are_whole_disks_of_hardware() -> None:
    """Every disk to be limited is a whole one and has a device behind it."""
    for disk in cgroups._physical_disks():
        assert not Path("/sys/dev/block", disk, "partition").exists()
        assert Path("/sys/dev/block", disk, "device").exists()


@pytest.mark.parametrize("kind", ["tmpfs or disk", "proc", "missing", "file"])
def test_root_that_is_no_cgroup_is_refused(kind: str, tmp_path: Path) -> None:
    """A directory of another filesystem is an error that names it, and stays as it was."""
    (tmp_path / "file").touch()
    root = {
        "tmpfs or disk": tmp_path,
        "proc": Path("/proc/self"),
        "missing": tmp_path / "missing",
        "file": tmp_path / "file",
    }[kind]
    with pytest.raises(CgroupError, match="is not a cgroup v2 directory; name a") as caught:
        Subtree.open("require", root=root)
    assert str(root) in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(
    not any(each.type == "cgroup" for each in cgroups._mounts()), reason="needs a cgroup v1 mount"
)
def test_v1_hierarchy_is_refused() -> None:
    """A v1 hierarchy and the tmpfs above it, where mkdir works, are not taken for v2."""
    v1 = next(each.point for each in cgroups._mounts() if each.type == "cgroup")
    for root in (v1, v1.parent):
        before = os.listdir(root)
        with pytest.raises(CgroupError, match="is not a cgroup v2 directory"):
            Subtree.open("require", root=root)
        assert os.listdir(root) == before


def test_auto_without_a_hierarchy_warns_once_and_goes_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where there is nothing to work with, auto gives None and one warning with the remedy."""
    assert Subtree.open("auto", root=tmp_path) is None
    (warning,) = _warnings(caplog)
    assert warning.startswith("jobs run without cgroups and without limits: ")
    assert str(tmp_path) in warning
    assert "name a directory below" in warning


def test_off_uses_no_cgroups(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Off is None, without a look at the root and without a warning."""
    assert Subtree.open("off", root=tmp_path / "missing") is None
    assert not _warnings(caplog)


def test_unknown_enforcement_is_refused() -> None:
    """A misspelt enforcement is not taken for the lax one."""
    with pytest.raises(ValueError, match="must be one of require, auto, off, not 'strict'"):
        Subtree.open("strict")  # type: ignore[arg-type]


def test_failed_write_tells_path_value_and_remedy(tmp_path: Path) -> None:
    """A value that cannot be written is an error that has it all; no file is made."""
    path = tmp_path / "cpu.max"
    with pytest.raises(CgroupError) as caught:
        cgroupfs.write(path, "1000 100000", remedy="do this")
    error = caught.value
    assert (error.path, error.value, error.remedy) == (str(path), "1000 100000", "do this")
    assert error.errno == errno.ENOENT
    assert str(error) == f"cannot write '1000 100000' to {path}: No such file or directory; do this"
    assert not path.exists()


def test_write_the_kernel_refuses_is_an_error() -> None:
    """What write(2) says counts, not only open(2)."""
    with pytest.raises(CgroupError, match="No space left on device") as caught:
        cgroupfs.write(Path("/dev/full"), "1")
    assert caught.value.errno == errno.ENOSPC


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.kernel
def test_every_limit_is_written(subtree: Subtree) -> None:
    """Each limit is in its file as soon as the cgroup is there, and is told to be in force."""
    limits = Limits(
        cpu_cores=0.5,
        memory_bytes=64 * _MIB,
        swap_bytes=8 * _MIB,
        io_read_bps=_MIB,
        io_write_bps=2 * _MIB,
        io_read_iops=30,
        io_write_iops=40,
        pids=7,
    )
    cgroup = subtree.create("job", limits)
    assert cgroup.limits == limits

    def read(name: str) -> str:
        return (cgroup.path / name).read_text().strip()

    assert read("cpu.max") == "50000 100000"
    assert read("memory.max") == str(64 * _MIB)
    assert read("memory.oom.group") == "1"
    if (cgroup.path / "memory.swap.max").exists():
        assert read("memory.swap.max") == str(8 * _MIB)
    assert read("pids.max") == "7"
    disks = [each for each in Path("/sys/block").iterdir() if (each / "device").exists()]
    assert disks
    assert sorted(read("io.max").splitlines()) == sorted(
        f"{(disk / 'dev').read_text().strip()} rbps={_MIB} wbps={2 * _MIB} riops=30 wiops=40"
        for disk in disks
        if (disk / "size").read_text() != "0\n"
    )


@pytest.mark.kernel
def test_no_limit_is_written_where_none_is_wanted(subtree: Subtree) -> None:
    """None leaves the kernel's own value, which is no limit."""
    path = subtree.create("job", NO_LIMITS).path
    for name in ("cpu.max", "memory.max", "pids.max"):
        assert (path / name).read_text().split()[0] == "max"
    assert (path / "io.max").read_text() == ""


@pytest.mark.kernel
def test_refused_limit_is_an_error_and_leaves_no_cgroup(subtree: Subtree) -> None:
    """A value that the kernel does not take is told with its file, and nothing stays behind."""
    with pytest.raises(CgroupError, match=f"cannot write '{2**40}' to .*/job/pids.max: ") as caught:
        subtree.create("job", Limits(pids=2**40))
    assert caught.value.errno == errno.EINVAL
    assert caught.value.remedy
    assert not (subtree.jobs / "job").exists()


@pytest.mark.kernel
def test_refused_limit_fails_the_start_up_already(base: Path) -> None:
    """The limits given to `open` are tried out at once; nothing stays behind."""
    with pytest.raises(CgroupError, match=r"pids\.max"):
        Subtree.open("require", root=base, limits=Limits(pids=2**40))


@pytest.mark.kernel
def test_auto_goes_without_a_refused_limit(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under auto the other limits are in force, and one warning tells of the one that is not."""
    limits = Limits(pids=2**40)
    subtree = Subtree.open("auto", root=base, limits=limits)
    assert subtree
    with contextlib.closing(subtree):
        for name in ("a", "b"):
            assert subtree.create(name, limits).limits == Limits(pids=None)
        (warning,) = _warnings(caplog)
    assert "pids.max" in warning


@pytest.fixture
def without_pids(base: Path) -> Iterator[Path]:
    """A cgroup that is handed every controller but pids."""
    (base / "cgroup.subtree_control").write_text("+cpu +io +memory")
    path = base / "without-pids"
    path.mkdir()
    yield path
    path.rmdir()


@pytest.mark.kernel
def test_missing_controller_is_named(without_pids: Path) -> None:
    """A controller that the root does not have is an error with its name and a remedy."""
    with pytest.raises(
        CgroupError, match=f"{without_pids} does not have the pids controller; .*Delegate"
    ):
        Subtree.open("require", root=without_pids)


@pytest.mark.kernel
def test_auto_goes_without_a_missing_controller(
    without_pids: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under auto the limits of the controllers that are there are in force."""
    subtree = Subtree.open("auto", root=without_pids)
    assert subtree
    with contextlib.closing(subtree):
        assert subtree.controllers == {"cpu", "io", "memory"}
        assert subtree.create("job", Limits()).limits == Limits(pids=None)
    (warning,) = _warnings(caplog)
    assert f"{without_pids} does not have the pids controller" in warning


# --- the subtree ------------------------------------------------------------------------------


@pytest.mark.kernel
def test_owner_moves_to_a_leaf_and_back(inside: Path) -> None:
    """In its own cgroup the owner moves into `server`; close undoes that and the controllers."""
    subtree = Subtree.open("require")
    assert subtree
    assert own_cgroup() == f"{inside.name}/{subtree.path.name}/main"
    assert subtree.path.parent == inside
    assert (inside / "cgroup.subtree_control").read_text().split() == _CONTROLLERS
    subtree.close()
    assert own_cgroup() == inside.name
    assert (inside / "cgroup.subtree_control").read_text() == ""
    assert not subtree.path.exists()
    subtree.close()


@pytest.mark.kernel
def test_owner_stays_out_of_a_root_it_is_not_in(base: Path) -> None:
    """With the root elsewhere the owner's own cgroup does not change."""
    before = own_cgroup()
    with contextlib.closing(_open(base)):
        assert own_cgroup() == before


@pytest.mark.kernel
@pytest.mark.parametrize("first_to_close", [0, 1])
def test_one_process_may_have_two_subtrees(inside: Path, first_to_close: int) -> None:
    """The second is made beside the first, without a move; either may be closed first."""
    subtrees = [_open(inside)]
    leaf = f"{inside.name}/{subtrees[0].path.name}/main"
    second = Subtree.open("require")
    assert second
    assert second.path.parent == inside
    assert own_cgroup() == leaf
    subtrees.append(second)
    subtrees.pop(first_to_close).close()
    assert subtrees[0].create("job", Limits()).limits == Limits()
    subtrees[0].close()
    assert own_cgroup() == inside.name
    assert not [each for each in inside.iterdir() if each.is_dir()]


@pytest.mark.kernel
def test_stranger_in_the_root_is_an_error_with_its_remedy(
    inside: Path, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """Where another process keeps controllers from being handed down we move back and say so."""
    stranger = run_in(inside, _SLEEP)
    with pytest.raises(CgroupError, match=rf"no process but this one may be in {inside}"):
        Subtree.open("require")
    assert own_cgroup() == inside.name
    stranger.kill()


@pytest.mark.kernel
def test_close_kills_what_still_runs(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """After close there is neither a process nor a cgroup of a job."""
    processes = [run_in(subtree.create(name, Limits()).path, _ESCAPE) for name in ("a", "b")]
    subtree.close()
    assert not subtree.path.exists()
    assert all(map(_all_dead, processes))


_OWNER = """
import subprocess, sys
from cgroups import Subtree
from limits import Limits
subtree = Subtree.open("require", root=sys.argv[1])
cgroup = subtree.create("job", Limits())
(cgroup.path / "nested").mkdir()
script = 'echo 0 >"$0/cgroup.procs"; echo "$0"; exec sleep infinity'
job = subprocess.Popen(["setsid", "sh", "-c", script, cgroup.path / "nested"])
job.wait()
"""


@contextlib.contextmanager
def _owner(base: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Another process with a subtree and one job in it; the path is the job's cgroup."""
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER, base], cwd=_HERE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout
        nested = Path(os.fsdecode(owner.stdout.readline().rstrip(b"\n")))
        try:
            yield owner, nested.parent
        finally:
            owner.kill()


@pytest.mark.kernel
def test_subtree_of_a_dead_owner_is_swept(base: Path) -> None:
    """The next to open kills what a SIGKILLed owner left running and removes its cgroups."""
    with _owner(base) as (owner, job):
        owner.kill()
        owner.wait()
        assert "populated 1" in (job / "cgroup.events").read_text()
        with contextlib.closing(_open(base)) as subtree:
            assert [each for each in base.iterdir() if each.is_dir()] == [subtree.path]
        assert _all_dead(owner)


@pytest.mark.kernel
def test_subtree_of_a_live_owner_is_left_alone(base: Path) -> None:
    """Two owners work side by side; opening and closing one does nothing to the other."""
    with _owner(base) as (owner, job):
        with contextlib.closing(_open(base)) as subtree:
            assert subtree.create("job", Limits()).limits == Limits()
        assert "populated 1" in (job / "cgroup.events").read_text()
        owner.kill()
        owner.wait()
        _open(base).close()


_DISMANTLER = """
import os, sys
from pathlib import Path
from cgroupfs import dismantle
from cgroups import Subtree
base, moment = sys.argv[1:]
Path(base, "cgroup.procs").write_text("0")
subtree = Subtree.open("require", root=base)
os.close(subtree._lock_fd)  # for the owner is to be somebody else, who is dead

def pause(at):
    if at == moment:
        print("in the way", flush=True)
        sys.stdin.read()

sys.addaudithook(lambda name, args: name == "os.rmdir" and pause(Path(args[0]).name))
dismantle(*subtree.dismantling)
pause("removed")
"""


@pytest.mark.kernel
@pytest.mark.parametrize("moment", ["main", "removed"])
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_successor_waits_for_the_helper_of_a_dead_owner(
    base: Path, monkeypatch: pytest.MonkeyPatch, moment: str, place: str
) -> None:
    """Which is in the root, where it removes the old cgroups, or has, and is about to end."""
    with subprocess.Popen(
        [sys.executable, "-c", _DISMANTLER, base, moment],
        cwd=_HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as helper:
        assert helper.stdin
        assert helper.stdout
        awaited: set[int] = set()
        stdin, pidfd_open = helper.stdin, os.pidfd_open

        def let_go(pid: int) -> int:
            awaited.add(pid)
            pidfd = pidfd_open(pid)
            stdin.close()
            return pidfd

        monkeypatch.setattr(os, "pidfd_open", let_go)
        try:
            assert helper.stdout.readline() == b"in the way\n"
            assert (base / "cgroup.procs").read_text() == f"{helper.pid}\n"
            with (
                joined(base) if place == "inside" else contextlib.nullcontext(),
                contextlib.closing(_open(base)) as subtree,
            ):
                assert subtree.create("job", Limits()).limits == Limits()
            assert awaited == {helper.pid}
        finally:
            helper.kill()


@pytest.mark.kernel
def test_cgroup_outside_of_the_namespace_is_not_taken_for_ours(base: Path) -> None:
    """In a cgroup namespace under an older mount our own cgroup cannot be told: an error."""

    def open_in_namespace() -> str:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWCGROUP) != 0:
            return os.strerror(ctypes.get_errno())
        with pytest.raises(CgroupError, match="no cgroup v2 hierarchy that holds this process"):
            Subtree.open("require")
        return "refused"

    assert _in(base, open_in_namespace) == "refused"


# --- rights -----------------------------------------------------------------------------------


def _open_and_describe() -> str:
    try:
        subtree = Subtree.open("require")
    except CgroupError as error:
        return json.dumps([error.errno, str(error)])
    assert subtree
    limits = subtree.create("job", Limits()).limits
    place = own_cgroup()
    subtree.close()
    return json.dumps([str(limits), place, own_cgroup()])


@pytest.mark.kernel
def test_ordinary_user_without_delegation_is_told_the_remedy(base: Path) -> None:
    """Who may not make cgroups is told how to get one."""
    code, message = json.loads(_in(base, _open_and_describe, as_nobody=True))
    assert code == errno.EACCES
    assert f"cannot make {base}/job-worker-" in message
    assert "systemd-run --scope -p Delegate=yes" in message


@pytest.mark.kernel
def test_ordinary_user_with_delegation_has_every_limit(base: Path) -> None:
    """In a cgroup handed to them an ordinary user can enforce every limit."""
    for path in (base, base / "cgroup.procs", base / "cgroup.subtree_control"):
        os.chown(path, NOBODY, NOBODY)
    limits, place, afterwards = json.loads(_in(base, _open_and_describe, as_nobody=True))
    assert limits == str(Limits())
    assert place.startswith(f"{base.name}/job-worker-")
    assert afterwards == base.name


# --- killing and removing ---------------------------------------------------------------------


_HOP = """
import os
os.write(1, b"up\\n")
for _ in range(4): os.fork()
while True:
    if os.fork(): os._exit(0)
"""


def _kill(cgroup: Cgroup) -> None:
    cgroup.kill()


def _kill_as_before_5_14(cgroup: Cgroup) -> None:
    cgroupfs.freeze_and_kill(cgroup.path)


@pytest.mark.kernel
@pytest.mark.parametrize("kill", [_kill, _kill_as_before_5_14])
def test_kill_reaches_every_process(
    subtree: Subtree,
    run_in: Callable[[Path, str], subprocess.Popen[bytes]],
    kill: Callable[[Cgroup], None],
) -> None:
    """Nothing escapes: no session of its own, no double fork, no stopped process."""
    cgroup = subtree.create("job", Limits())
    process = run_in(cgroup.path, _ESCAPE)
    kill(cgroup)
    cgroup.wait_empty(GUARD_S)
    assert _all_dead(process)
    cgroup.remove()
    assert not cgroup.path.exists()


@pytest.mark.kernel
@pytest.mark.parametrize("kill", [_kill, _kill_as_before_5_14])
def test_kill_beats_a_process_that_keeps_forking(
    subtree: Subtree,
    run_in: Callable[[Path, str], subprocess.Popen[bytes]],
    kill: Callable[[Cgroup], None],
) -> None:
    """Processes that fork and exit all the time, under ever new numbers, are gone at once."""
    cgroup = subtree.create("job", Limits())
    process = run_in(cgroup.path, f"exec '{sys.executable}' -S -c '{_HOP}'")
    kill(cgroup)
    cgroup.wait_empty(GUARD_S)
    assert _all_dead(process)


@pytest.mark.kernel
def test_kill_without_cgroup_kill_spares_the_killer(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """A process of another PID namespace is listed as 0, which to kill(2) means one's own group."""
    cgroup = subtree.create("job", Limits())
    stranger = run_in(cgroup.path, _SLEEP)
    program = "import cgroupfs, sys; cgroupfs.freeze_and_kill(sys.argv[1])"
    script = '"$@" && echo alive; exit'  # not exec: the first process cannot be killed from inside
    output = subprocess.check_output(
        [
            *("unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script, "sh"),
            *("setsid", "--wait", sys.executable, "-c", program, cgroup.path),
        ],
        cwd=_HERE,
    )
    assert output == b"alive\n"
    assert stranger.poll() is None


@pytest.mark.kernel
def test_wait_empty_blocks_while_a_process_lives(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """As long as something lives waiting times out, and the end of it wakes who waits."""
    cgroup = subtree.create("job", Limits())
    process = run_in(cgroup.path, _SLEEP)
    with pytest.raises(TimeoutError, match=r"still alive after 0\.1 s"):
        cgroup.wait_empty(0.1)
    waiter = threading.Thread(target=cgroup.wait_empty)
    waiter.start()
    process.kill()
    waiter.join(GUARD_S)
    assert not waiter.is_alive()


@pytest.mark.kernel
def test_kill_and_wait_of_a_removed_cgroup_do_nothing(subtree: Subtree) -> None:
    """What is gone is dead and empty and removed."""
    cgroup = subtree.create("job", Limits())
    cgroup.remove()
    cgroup.kill()
    cgroup.wait_empty(GUARD_S)
    cgroup.remove()


@pytest.mark.kernel
def test_cgroups_made_by_the_job_are_removed(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """What a job makes below its cgroup, with processes in it, goes with the job."""
    cgroup = subtree.create("job", Limits())
    nested = cgroup.path / "a" / "b"
    nested.mkdir(parents=True)
    process = run_in(nested, _ESCAPE)
    with pytest.raises(TimeoutError):
        cgroup.wait_empty(0)
    cgroup.kill()
    cgroup.wait_empty(GUARD_S)
    cgroup.remove()
    assert not cgroup.path.exists()
    assert _all_dead(process)


@pytest.mark.kernel
def test_cgroup_in_use_cannot_be_removed(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """Removing a cgroup with a process in it is an error that tells where to look."""
    cgroup = subtree.create("job", Limits())
    run_in(cgroup.path, _SLEEP)
    with pytest.raises(CgroupError, match=r"cannot remove .*/job: .*busy; .*cgroup\.procs"):
        cgroup.remove()


@pytest.mark.kernel
def test_oom_kills_counts_only_kills_for_memory(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """A SIGKILL is not counted, a process over the memory limit is."""
    cgroup = subtree.create("job", Limits(memory_bytes=20 * _MIB))
    run_in(cgroup.path, _SLEEP).kill()
    assert cgroup.usage().oom_kills == 0
    greedy = run_in(cgroup.path, "echo up; exec tail /dev/zero")
    assert greedy.wait() == -signal.SIGKILL
    assert cgroup.usage().oom_kills


@pytest.mark.kernel
def test_process_without_rights_can_join_by_the_open_descriptor(subtree: Subtree) -> None:
    """Who opened cgroup.procs counts, so a child that has dropped its rights can join."""
    cgroup = subtree.create("job", Limits())
    procs_fd = os.open(cgroup.path / "cgroup.procs", os.O_WRONLY)

    def join() -> str:
        os.write(procs_fd, b"0")
        return own_cgroup()

    place = _in(subtree.path / "main", join, as_nobody=True)
    os.close(procs_fd)
    assert place.endswith(f"/{subtree.path.name}/jobs/job")
