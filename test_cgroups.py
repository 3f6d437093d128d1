"""Tests of `cgroups.py`. Those that need controllers are marked `kernel`; the others run anywhere.

A process that a test puts in a cgroup has a pipe as its stdout, and all its descendants inherit
it. End-of-file on the pipe proves that all of them are dead.
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
# Starts what could escape a kill: another session, a double fork, a stopped process.
_ESCAPE = """
    setsid sleep infinity &
    (setsid sh -c 'sleep infinity & exec sleep infinity' &)
    sh -c 'kill -STOP $$' &
    echo up; exec sleep infinity"""


def _all_dead(process: subprocess.Popen[bytes]) -> bool:
    """Block until no process holds the stdout any more; return whether nothing more was written."""
    assert process.stdout
    return process.stdout.read() == b""


def _in(path: Path, function: Callable[[], str], *, as_nobody: bool = False) -> str:
    """Fork a process, put it in a cgroup, call `function` in it; return the result."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()  # no exec: an ordinary user may be unable to read this Python
    if pid == 0:
        try:
            (path / "cgroup.procs").write_text("0")
            if as_nobody:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            answer = function()
        except BaseException:  # noqa: BLE001 -- the child must not return into pytest
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


# --- tests for any host ----------------------------------------------------------------------


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
    """A limit out of range or of a wrong type raises ValueError with the limit's name and value."""
    ((name, value),) = senseless.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*not {value!r}"):
        Limits(**senseless)


def test_smallest_limits_are_accepted() -> None:
    """The smallest value of each limit is accepted, and None for every limit too."""
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
    """What is parsed from mountinfo agrees with the simpler file /proc/self/mounts."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    assert [(str(mount.point), mount.type) for mount in cgroups._mounts()] == [
        (point.encode().decode("unicode_escape"), kind) for _, point, kind, *_ in lines
    ]


def test_physical_disks_are_whole_disks_of_hardware() -> None:
    """Each listed disk is not a partition, and a hardware device is behind it."""
    for disk in cgroups._physical_disks():
        assert not Path("/sys/dev/block", disk, "partition").exists()
        assert Path("/sys/dev/block", disk, "device").exists()


@pytest.mark.parametrize("kind", ["tmpfs or disk", "proc", "missing", "file"])
def test_root_that_is_no_cgroup_is_refused(kind: str, tmp_path: Path) -> None:
    """A root of another filesystem raises an error with its path; nothing is created in it."""
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
    """A v1 hierarchy is refused as the root; the tmpfs above it, where mkdir works, too."""
    v1 = next(each.point for each in cgroups._mounts() if each.type == "cgroup")
    for root in (v1, v1.parent):
        before = os.listdir(root)
        with pytest.raises(CgroupError, match="is not a cgroup v2 directory"):
            Subtree.open("require", root=root)
        assert os.listdir(root) == before


def test_auto_without_a_hierarchy_warns_once_and_goes_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With an unusable root, auto returns None and logs one warning with the remedy."""
    assert Subtree.open("auto", root=tmp_path) is None
    (warning,) = _warnings(caplog)
    assert warning.startswith("jobs run without cgroups and without limits: ")
    assert str(tmp_path) in warning
    assert "name a directory below" in warning


def test_off_uses_no_cgroups(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Off returns None, does not look at the root, and logs nothing."""
    assert Subtree.open("off", root=tmp_path / "missing") is None
    assert not _warnings(caplog)


def test_unknown_enforcement_is_refused() -> None:
    """An unknown enforcement raises ValueError; it is not treated as auto or off."""
    with pytest.raises(ValueError, match="must be one of require, auto, off, not 'strict'"):
        Subtree.open("strict")  # type: ignore[arg-type]


def test_failed_write_names_path_value_and_remedy(tmp_path: Path) -> None:
    """The error of a failed write has path, value and remedy; the missing file is not created."""
    path = tmp_path / "cpu.max"
    with pytest.raises(CgroupError) as caught:
        cgroupfs.write(path, "1000 100000", remedy="do this")
    error = caught.value
    assert (error.path, error.value, error.remedy) == (str(path), "1000 100000", "do this")
    assert error.errno == errno.ENOENT
    assert str(error) == f"cannot write '1000 100000' to {path}: No such file or directory; do this"
    assert not path.exists()


def test_write_the_kernel_refuses_is_an_error() -> None:
    """A write whose open(2) succeeds and whose write(2) fails raises an error."""
    with pytest.raises(CgroupError, match="No space left on device") as caught:
        cgroupfs.write(Path("/dev/full"), "1")
    assert caught.value.errno == errno.ENOSPC


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.kernel
def test_every_limit_is_written(subtree: Subtree) -> None:
    """When `create` returns, each limit is in its file and in the cgroup's `limits`."""
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
def test_limit_of_none_is_not_written(subtree: Subtree) -> None:
    """A limit of None leaves the kernel's default, which is no limit."""
    path = subtree.create("job", NO_LIMITS).path
    for name in ("cpu.max", "memory.max", "pids.max"):
        assert (path / name).read_text().split()[0] == "max"
    assert (path / "io.max").read_text() == ""


@pytest.mark.kernel
def test_refused_limit_is_an_error_and_leaves_no_cgroup(subtree: Subtree) -> None:
    """If the kernel refuses a value, the error names value and file; the cgroup is removed."""
    with pytest.raises(CgroupError, match=f"cannot write '{2**40}' to .*/job/pids.max: ") as caught:
        subtree.create("job", Limits(pids=2**40))
    assert caught.value.errno == errno.EINVAL
    assert caught.value.remedy
    assert not (subtree.jobs / "job").exists()


@pytest.mark.kernel
def test_refused_default_limit_fails_open(base: Path) -> None:
    """`open` tries the limits that it is given, and raises if one cannot be written."""
    with pytest.raises(CgroupError, match=r"pids\.max"):
        Subtree.open("require", root=base, limits=Limits(pids=2**40))


@pytest.mark.kernel
def test_auto_goes_without_a_refused_limit(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under auto the other limits are in force, and one warning names the refused one."""
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
    """A cgroup that has every controller except pids."""
    (base / "cgroup.subtree_control").write_text("+cpu +io +memory")
    path = base / "without-pids"
    path.mkdir()
    yield path
    path.rmdir()


@pytest.mark.kernel
def test_missing_controller_is_named(without_pids: Path) -> None:
    """If the root lacks a controller, the error has its name and a remedy."""
    with pytest.raises(
        CgroupError, match=f"{without_pids} does not have the pids controller; .*Delegate"
    ):
        Subtree.open("require", root=without_pids)


@pytest.mark.kernel
def test_auto_goes_without_a_missing_controller(
    without_pids: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under auto the limits of the other controllers are in force; a warning names this one."""
    subtree = Subtree.open("auto", root=without_pids)
    assert subtree
    with contextlib.closing(subtree):
        assert subtree.controllers == {"cpu", "io", "memory"}
        assert subtree.create("job", Limits()).limits == Limits(pids=None)
    (warning,) = _warnings(caplog)
    assert f"{without_pids} does not have the pids controller" in warning


# --- the subtree ------------------------------------------------------------------------------


@pytest.mark.kernel
def test_process_moves_to_a_leaf_and_back(inside: Path) -> None:
    """A process in the root moves to `main`; close moves it back and disables the controllers."""
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
def test_process_outside_of_the_root_is_not_moved(base: Path) -> None:
    """If the root is another cgroup, the calling process stays in its own."""
    before = own_cgroup()
    with contextlib.closing(_open(base)):
        assert own_cgroup() == before


@pytest.mark.kernel
@pytest.mark.parametrize("first_to_close", [0, 1])
def test_one_process_may_have_two_subtrees(inside: Path, first_to_close: int) -> None:
    """The second is made beside the first and moves nothing; either may be closed first."""
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
    """If a process in the root prevents enabling controllers, `open` moves back and raises."""
    stranger = run_in(inside, _SLEEP)
    with pytest.raises(CgroupError, match=rf"no process but this one may be in {inside}"):
        Subtree.open("require")
    assert own_cgroup() == inside.name
    stranger.kill()


@pytest.mark.kernel
def test_close_kills_what_still_runs(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """`close` kills the processes of jobs and removes their cgroups."""
    processes = [run_in(subtree.create(name, Limits()).path, _ESCAPE) for name in ("a", "b")]
    subtree.close()
    assert not subtree.path.exists()
    assert all(map(_all_dead, processes))


_MAIN_PROCESS = """
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
def _main_process(base: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run another main process with a subtree and one job; yield it and the job's cgroup."""
    with subprocess.Popen(
        [sys.executable, "-c", _MAIN_PROCESS, base], cwd=_HERE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        nested = Path(os.fsdecode(process.stdout.readline().rstrip(b"\n")))
        try:
            yield process, nested.parent
        finally:
            process.kill()


@pytest.mark.kernel
def test_subtree_of_a_dead_main_process_is_removed(base: Path) -> None:
    """The next `open` kills the jobs of a SIGKILLed main process and removes its cgroups."""
    with _main_process(base) as (process, job):
        process.kill()
        process.wait()
        assert "populated 1" in (job / "cgroup.events").read_text()
        with contextlib.closing(_open(base)) as subtree:
            assert [each for each in base.iterdir() if each.is_dir()] == [subtree.path]
        assert _all_dead(process)


@pytest.mark.kernel
def test_subtree_of_a_live_main_process_is_left_alone(base: Path) -> None:
    """Opening and closing one subtree does not affect another process's subtree beside it."""
    with _main_process(base) as (process, job):
        with contextlib.closing(_open(base)) as subtree:
            assert subtree.create("job", Limits()).limits == Limits()
        assert "populated 1" in (job / "cgroup.events").read_text()
        process.kill()
        process.wait()
        _open(base).close()


_DISMANTLER = """
import os, sys
from pathlib import Path
from cgroupfs import dismantle
from cgroups import Subtree
base, moment = sys.argv[1:]
Path(base, "cgroup.procs").write_text("0")
subtree = Subtree.open("require", root=base)
os.close(subtree._lock_fd)  # unlocked, as if the main process were dead

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
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_open_waits_for_the_fork_server_of_a_dead_main_process(
    base: Path, monkeypatch: pytest.MonkeyPatch, moment: str, where: str
) -> None:
    """`open` waits for a dismantler in the root: before it removes `main`, and before its end."""
    with subprocess.Popen(
        [sys.executable, "-c", _DISMANTLER, base, moment],
        cwd=_HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as dismantler:
        assert dismantler.stdin
        assert dismantler.stdout
        awaited: set[int] = set()
        stdin, pidfd_open = dismantler.stdin, os.pidfd_open

        def let_go(pid: int) -> int:
            awaited.add(pid)
            pidfd = pidfd_open(pid)
            stdin.close()
            return pidfd

        monkeypatch.setattr(os, "pidfd_open", let_go)
        try:
            assert dismantler.stdout.readline() == b"in the way\n"
            assert (base / "cgroup.procs").read_text() == f"{dismantler.pid}\n"
            with (
                joined(base) if where == "inside" else contextlib.nullcontext(),
                contextlib.closing(_open(base)) as subtree,
            ):
                assert subtree.create("job", Limits()).limits == Limits()
            assert awaited == {dismantler.pid}
        finally:
            dismantler.kill()


@pytest.mark.kernel
def test_cgroup_outside_of_the_namespace_is_not_taken_for_ours(base: Path) -> None:
    """In a cgroup namespace with a mount from outside, the own cgroup is unknown: an error."""

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
    """EACCES at the first mkdir becomes an error that says how to get a delegated cgroup."""
    code, message = json.loads(_in(base, _open_and_describe, as_nobody=True))
    assert code == errno.EACCES
    assert f"cannot make {base}/job-worker-" in message
    assert "systemd-run --scope -p Delegate=yes" in message


@pytest.mark.kernel
def test_ordinary_user_with_delegation_has_every_limit(base: Path) -> None:
    """In a delegated cgroup an ordinary user can enforce every limit."""
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


_both_ways_to_kill = pytest.mark.parametrize("kill", [_kill, _kill_as_before_5_14])


@pytest.mark.kernel
@_both_ways_to_kill
def test_kill_reaches_every_process(
    subtree: Subtree,
    run_in: Callable[[Path, str], subprocess.Popen[bytes]],
    kill: Callable[[Cgroup], None],
) -> None:
    """Kill also reaches a process in another session, a double fork and a stopped process."""
    cgroup = subtree.create("job", Limits())
    process = run_in(cgroup.path, _ESCAPE)
    kill(cgroup)
    cgroup.wait_empty(GUARD_S)
    assert _all_dead(process)
    cgroup.remove()
    assert not cgroup.path.exists()


@pytest.mark.kernel
@_both_ways_to_kill
def test_kill_beats_a_process_that_keeps_forking(
    subtree: Subtree,
    run_in: Callable[[Path, str], subprocess.Popen[bytes]],
    kill: Callable[[Cgroup], None],
) -> None:
    """Kill ends processes that fork and exit all the time, so that their numbers change."""
    cgroup = subtree.create("job", Limits())
    process = run_in(cgroup.path, f"exec '{sys.executable}' -S -c '{_HOP}'")
    kill(cgroup)
    cgroup.wait_empty(GUARD_S)
    assert _all_dead(process)


@pytest.mark.kernel
@_both_ways_to_kill
def test_kill_reaches_threaded_and_frozen_cgroups(
    subtree: Subtree,
    run_in: Callable[[Path, str], subprocess.Popen[bytes]],
    kill: Callable[[Cgroup], None],
) -> None:
    """A threaded cgroup does not list its processes; what is frozen must die, too."""
    cgroup = subtree.create("job", Limits())
    process = run_in(cgroup.path, _SLEEP)
    below = cgroup.path / "below"
    below.mkdir()
    for name, value in (("type", "threaded"), ("threads", str(process.pid)), ("freeze", "1")):
        (below / f"cgroup.{name}").write_text(value)
    kill(cgroup)
    assert process.wait(GUARD_S) == -signal.SIGKILL
    cgroup.wait_empty(GUARD_S)


@pytest.mark.kernel
def test_kill_without_cgroup_kill_spares_the_killer(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """A process of another PID namespace is listed as 0; kill(0) would kill the killer's group."""
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
    """While a process lives, a wait with a bound times out; its end wakes a wait without one."""
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
    """Kill, wait and remove do nothing if the cgroup has been removed."""
    cgroup = subtree.create("job", Limits())
    cgroup.remove()
    cgroup.kill()
    cgroup.wait_empty(GUARD_S)
    cgroup.remove()


@pytest.mark.kernel
def test_cgroups_made_by_the_job_are_removed(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """Cgroups that a job made below its own are killed and removed with it."""
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
def test_process_that_the_kernel_does_not_let_go_prevents_no_takeover(
    subtree: Subtree,
    run_in: Callable[[Path, str], subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its cgroup stays, and a warning says so. Here nobody kills it."""
    held, free, kept = (subtree.create(name, Limits()).path for name in ("held", "free", "kept"))
    run_in(held, _SLEEP)
    with monkeypatch.context() as patch:
        patch.setattr("cgroups.kill_tree", lambda _: True)
        patch.setattr("cgroups._DEATH_S", 0.1)
        subtree.sweep({"kept"})
    assert [path.exists() for path in (held, free, kept)] == [True, False, True]
    assert f"does not let go of processes in {held}" in caplog.text


@pytest.mark.kernel
def test_removal_of_a_cgroup_waits_for_no_other(subtree: Subtree) -> None:
    """A job that has looked for millions of names in its cgroup makes its removal take seconds.

    The kernel locks the parent meanwhile. A thread removes the cgroup of another job later.
    """
    begun, ended = threading.Event(), threading.Event()

    def take_long() -> None:
        begun.set()
        ended.wait(GUARD_S)

    cgroup = subtree.create("job", Limits())
    slow = threading.Thread(target=subtree._removals.make, args=(take_long,))
    slow.start()
    assert begun.wait(GUARD_S)
    cgroup.remove()
    assert cgroup.path.exists()
    later = [each for each in threading.enumerate() if each.name == "removal"]
    ended.set()
    for thread in (slow, *later):
        thread.join(GUARD_S)
    assert not cgroup.path.exists()


@pytest.mark.kernel
def test_cgroup_in_use_cannot_be_removed(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """Removing a cgroup that contains a process raises an error that names cgroup.procs."""
    cgroup = subtree.create("job", Limits())
    run_in(cgroup.path, _SLEEP)
    with pytest.raises(CgroupError, match=r"cannot remove .*/job: .*busy; .*cgroup\.procs"):
        cgroup.remove()


@pytest.mark.kernel
def test_oom_kills_counts_only_kills_for_memory(
    subtree: Subtree, run_in: Callable[[Path, str], subprocess.Popen[bytes]]
) -> None:
    """A SIGKILL from another process is not counted; a kill for the memory limit is."""
    cgroup = subtree.create("job", Limits(memory_bytes=20 * _MIB))
    run_in(cgroup.path, _SLEEP).kill()
    assert cgroup.usage().oom_kills == 0
    greedy = run_in(cgroup.path, "echo up; exec tail /dev/zero")
    assert greedy.wait() == -signal.SIGKILL
    assert cgroup.usage().oom_kills


@pytest.mark.kernel
def test_process_without_rights_can_join_by_the_open_descriptor(subtree: Subtree) -> None:
    """The kernel checks who opened cgroup.procs, so a child that gave up its rights can join."""
    cgroup = subtree.create("job", Limits())
    procs_fd = os.open(cgroup.path / "cgroup.procs", os.O_WRONLY)

    def join() -> str:
        os.write(procs_fd, b"0")
        return own_cgroup()

    place = _in(subtree.path / "main", join, as_nobody=True)
    os.close(procs_fd)
    assert place.endswith(f"/{subtree.path.name}/jobs/job")
