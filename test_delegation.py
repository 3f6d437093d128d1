"""Tests of a server in the cgroup trees that it may find, on a real kernel: a delegated subtree, a
missing controller, a read-only hierarchy, other servers; and of `server check` in each of them.

A delegated subtree is a cgroup whose directory and two files belong to the user, as `systemd-run
--scope -p Delegate=yes` makes it. systemd itself cannot run in the test kernel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testkit import GUARD_S, NOBODY, clean_environment, own_cgroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from testkit import ServerProgram

pytestmark = pytest.mark.kernel

_HERE = Path(__file__).parent
_ITEMS = ["cgroup v2", "kill", "cpu", "memory", "io", "pids"]
_IN = ("sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"')
# CAP_DAC_READ_SEARCH lets an ordinary user run a Python that is, for example, in root's home. In a
# cgroup it changes nothing, because only the right to write matters there.
_AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
_READ_ONLY = (
    *("unshare", "--mount", "sh", "-c"),
    'mount -o remount,ro,bind "$0" && exec "$@"',
)


def _output_of(*command: str | Path) -> tuple[int, str]:
    """Run a program to its end; return its exit status, and its stdout and stderr together.

    The random part of the names of subtrees is replaced by stars.
    """
    done = subprocess.run(
        command,
        cwd=_HERE,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    return done.returncode, re.sub(r"job-worker-[0-9a-f]{8}", "job-worker-***", done.stdout)


def _check(*options: str | Path, before: tuple[str | Path, ...] = ()) -> tuple[int, list[str]]:
    """Run `server check`; return its exit status and the lines that it printed."""
    status, text = _output_of(*before, sys.executable, _HERE / "server.py", "check", *options)
    return status, text.splitlines()


def _require(
    certs: Path, state: Path, *options: str | Path, before: tuple[str | Path, ...] = ()
) -> tuple[int, list[str]]:
    """Run a server with --limits require that cannot start; return its exit status and lines."""
    common = ("--listen", "127.0.0.1:0", "--certs", certs, "--state-dir", state)
    program = (sys.executable, _HERE / "server.py", "--limits", "require", *common)
    status, text = _output_of(*before, *program, *options)
    return status, text.splitlines()


def _state(top: Path, *, but: Path) -> dict[Path, tuple[str, ...]]:
    """Read some files of every cgroup of the hierarchy that is not in `but`."""
    found = {}
    for directory, names, _ in os.walk(top):
        path = Path(directory)
        names[:] = [name for name in names if path / name != but]
        files = ("cgroup.subtree_control", "cgroup.procs", "cpu.max", "memory.max", "pids.max")
        found[path] = tuple((path / f).read_text() for f in files if (path / f).exists())
    return found


@pytest.fixture
def delegated(base: Path) -> Path:
    """A cgroup that belongs to an ordinary user."""
    for path in (base, base / "cgroup.procs", base / "cgroup.subtree_control"):
        os.chown(path, NOBODY, NOBODY)
    return base


@pytest.fixture
def without_io(base: Path) -> Iterator[Path]:
    """A cgroup that has every controller except io."""
    (base / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    path = base / "without-io"
    path.mkdir()
    yield path
    path.rmdir()


# --- server check -----------------------------------------------------------------------------


def test_check_proves_everything_where_everything_works(base: Path) -> None:
    """If nothing is missing, every finding is ok and the exit status is 0."""
    status, lines = _check("--cgroup-root", base)
    assert [line.partition(":")[0] for line in lines] == [f"ok      {item}" for item in _ITEMS]
    assert status == 0


def test_missing_controller_is_reported_by_check_and_by_require(
    without_io: Path, certs: Path, tmp_path: Path
) -> None:
    """The failed finding names controller and remedy; a server with require prints the same."""
    status, lines = _check("--cgroup-root", without_io)
    (failed,) = [line for line in lines if not line.startswith("ok ")]
    assert failed.startswith(f"FAILED  io: {without_io} does not have the io controller; ")
    assert "Delegate=yes" in failed
    assert (status, len(lines)) == (1, len(_ITEMS))
    status, lines = _require(certs, tmp_path / "state", "--cgroup-root", without_io)
    assert failed in lines
    assert not any("Traceback" in line for line in lines)
    assert status == 1


def test_check_names_the_drop_in_that_gives_a_user_manager_the_io_controller(base: Path) -> None:
    """As in `systemd-run --user --scope` on a stock Debian. docs/deploy.md has the same drop-in."""
    (base / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    manager = base / "user@1000.service"
    scope = manager / "x.scope"
    scope.mkdir(parents=True)
    (manager / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    status, lines = _check("--cgroup-root", scope)
    scope.rmdir()
    manager.rmdir()
    (failed,) = [line for line in lines if not line.startswith("ok ")]
    assert status == 1
    assert "does not have the io controller; the manager of this user does not get it" in failed
    guide = " ".join((_HERE / "docs/deploy.md").read_text().replace("\\\n", " ").split())
    for command in failed.partition("as root: ")[2].partition(", and log in anew")[0].split(" && "):
        assert command in guide


def test_read_only_hierarchy_is_reported_by_check_and_by_require(
    base: Path, certs: Path, tmp_path: Path
) -> None:
    """In a read-only hierarchy, as in most containers, the message says so and has the remedy."""
    before = (*_READ_ONLY, base.parent)
    status, lines = _check("--cgroup-root", base, before=before)
    (failed,) = lines
    assert failed.startswith("FAILED  cgroup v2: cannot make ")
    assert "Read-only file system; the cgroup filesystem is mounted read-only" in failed
    assert "writable one of its own" in failed
    assert status == 1
    status, lines = _require(certs, tmp_path / "state", "--cgroup-root", base, before=before)
    assert failed in lines
    assert status == 1


def test_host_without_a_disk_is_reported_by_check(base: Path) -> None:
    """Without a disk only the finding about io fails."""
    before = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/block && exec "$@"', "sh")
    status, lines = _check("--cgroup-root", base, before=before)
    (failed,) = [line for line in lines if not line.startswith("ok ")]
    assert failed.startswith("FAILED  io: this host has no physical disk")
    assert status == 1


def test_check_without_delegation_says_how_to_get_it(base: Path) -> None:
    """An ordinary user in a cgroup of root's is told how to get a delegated one."""
    status, lines = _check(before=(*_IN, base, *_AS_NOBODY))
    (failed,) = lines
    assert failed.startswith(f"FAILED  cgroup v2: cannot make {base}/job-worker-")
    assert "Permission denied; " in failed
    assert "systemd-run --scope -p Delegate=yes" in failed
    assert status == 1


# --- an ordinary user -------------------------------------------------------------------------

_WORKER = """
import os, sys
from limits import Limits
from worker import Worker
assert os.geteuid() != 0
limits = Limits(cpu_cores=0.5, memory_bytes=30 << 20, pids=20)
with Worker(enforcement="require", limits=limits) as worker:
    greedy = worker.wait(worker.start("tail", ["/dev/zero"]), 60)
    print(greedy.end_reason.name, greedy.limits == limits)
    job = worker.start("sh", ["-c", "setsid sleep infinity & echo up; exec sleep infinity"])
    next(output := worker.stream(job))
    print((worker.subtree.jobs / job / "cgroup.procs").read_text().count("\\n"))
    stopped = worker.stop(job)
    print(stopped.status.name, stopped.usage.pids_peak, (worker.subtree.jobs / job).exists())
    output.close()
    worker.start("sh", ["-c", "setsid sleep infinity & exec sleep infinity"])
"""


def test_ordinary_user_runs_limited_jobs_in_a_delegated_cgroup(delegated: Path) -> None:
    """Limits have effect, stops reach every process, and nothing outside the cgroup changes."""
    before = _state(delegated.parent, but=delegated)
    status, text = _output_of(*_IN, delegated, *_AS_NOBODY, sys.executable, "-c", _WORKER)
    assert text.split("\n") == ["OUT_OF_MEMORY True", "2", "STOPPED 2 False", ""]
    assert status == 0
    assert [each for each in delegated.iterdir() if each.is_dir()] == []
    assert (delegated / "cgroup.procs").read_text() == ""
    assert _state(delegated.parent, but=delegated) == before


def test_check_as_an_ordinary_user_in_a_delegated_cgroup(delegated: Path) -> None:
    """For an ordinary user in a delegated cgroup every finding is ok."""
    status, lines = _check(before=(*_IN, delegated, *_AS_NOBODY))
    assert [line.partition(":")[0] for line in lines] == [f"ok      {item}" for item in _ITEMS]
    assert status == 0


# --- neighbours -------------------------------------------------------------------------------


def test_nothing_outside_the_root_is_touched(
    base: Path, start_server: Callable[..., ServerProgram]
) -> None:
    """A server changes no cgroup outside its root, and moves no process there."""
    before = _state(base.parent, but=base)
    server = start_server("--limits", "require", "--cgroup-root", str(base))
    during = _state(base.parent, but=base)
    assert server.end() == 0
    # Our own cgroup also has the server and its fork server, so its cgroup.procs may differ.
    own = base.parent / own_cgroup()
    assert before.pop(own)[0] == during.pop(own)[0]
    assert during == before


def test_stranger_is_not_moved(base: Path, certs: Path, tmp_path: Path) -> None:
    """If another process is in its cgroup, the server says so and does not start or move it."""
    command = (*_IN, base, "sh", "-c", "echo up; exec sleep infinity")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout
        assert stranger.stdout.readline() == b"up\n"
        status, lines = _require(certs, tmp_path / "state", before=(*_IN, base))
        assert (base / "cgroup.procs").read_text() == f"{stranger.pid}\n"
        stranger.kill()
    assert status == 1
    assert f"no process but this one may be in {base}" in "\n".join(lines)


def test_two_servers_do_not_disturb_each_other(
    base: Path, certs: Path, start_server: Callable[..., ServerProgram]
) -> None:
    """One server is killed, the next removes its cgroups; the other server's job is unaffected."""
    import workerservice_pb2 as worker_pb
    from client import Client

    options = ("--limits", "require", "--cgroup-root", str(base))
    steady, doomed = start_server(*options), start_server(*options)
    with (
        Client(steady.address, certs=certs) as client,
        Client(doomed.address, certs=certs) as other,
    ):
        client.login("user", "user")
        other.login("user", "user")
        job = client.start("sleep", ["infinity"], pids=3)
        orphan = other.start("sh", ["-c", "setsid sleep infinity & exec sleep infinity"])
        (path,) = base.glob(f"job-worker-*/jobs/{job}")
        (left,) = base.glob(f"job-worker-*/jobs/{orphan}")
        doomed.process.kill()
        doomed.process.wait()
        successor = start_server(*options)
        assert not left.parent.parent.exists()
        assert (path / "pids.max").read_text() == "3\n"
        assert client.status(job).status == worker_pb.JOB_STATUS_RUNNING
        assert successor.end() == 0
        assert client.status(job).status == worker_pb.JOB_STATUS_RUNNING
        assert client.stop(job).status == worker_pb.JOB_STATUS_STOPPED
    assert steady.end() == 0
    assert not [each for each in base.iterdir() if each.is_dir()]
