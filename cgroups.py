"""Control groups (cgroup v2) for jobs: discovery, limits, kill, removal.

A `Subtree` is this process's own piece of the cgroup tree:

    BASE/                      our own cgroup when we start, or the root given
      job-worker-<random>/     locked (flock) while its owner lives
        main/                  the main process and its fork server
        jobs/
          <job>/               one job, with its limits

Only leaves hold processes, because the kernel does not let a cgroup that hands
controllers to its children have processes of its own. v1 is not supported.

    subtree = Subtree.open("require")
    cgroup = subtree.create("some-job", Limits(cpu_cores=0.5))
    ...                        # start a process in it: clone3, or write 0 to its cgroup.procs
    cgroup.kill()
    cgroup.wait_empty()
    cgroup.remove()
    subtree.close()

Every failure is a `CgroupError` that names the path, the value and the remedy.

Thread safety: a `Subtree` may be used from any thread once `open` has returned; a
`Cgroup` has no state of its own besides its path. `open` and `close` move the
calling process, so they must not run at the same time as another's.

Source of all kernel facts, unless another is named: the kernel's
Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import select
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cgroupfs import (
    DELEGATE,
    DISMANTLER,
    RETRY_MS,
    CgroupError,
    Events,
    dissolve,
    failure,
    kill_and_remove,
    kill_tree,
    read,
    read_if_there,
    read_text,
    remove_tree,
    wait_event,
    write,
)
from limits import NO_LIMITS, Enforcement, Limits, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Cgroup",
    "CgroupError",
    "Subtree",
    "kill_tree",
]

logger = logging.getLogger(__name__)


_CPU_PERIOD_US = 100_000
_PREFIX = "job-worker-"
_DEATH_S = 5.0  # how long killed processes of a dead or closing owner may take to be gone


_UNIFIED = (
    "this host mounts cgroup v1 or a hybrid of both; boot it with "
    "systemd.unified_cgroup_hierarchy=1 (cgroup_no_v1=all without systemd)"
)
_READ_ONLY = (
    "the cgroup filesystem is mounted read-only, as in most containers; start the container "
    "with a writable one of its own (--privileged --cgroupns=private)"
)


# The controllers needed, and the fields of `Limits` that each enforces.
_CONTROLLERS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu_cores",),
    "memory": ("memory_bytes", "swap_bytes"),
    "io": ("io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops"),
    "pids": ("pids",),
}


class Subtree:
    """The cgroups of one owner process. Make one with `open`; end it with `close`.

    Attributes: `path`, `jobs` (the directory that holds the jobs' cgroups),
    `controllers` (those the jobs have), `shortcomings` (why `auto` goes without the
    others, or without a limit: the first error for each controller).
    """

    def __init__(self, path: Path, lock_fd: int, enforcement: Enforcement) -> None:
        self.path = path
        self.jobs = path / "jobs"
        self.controllers: frozenset[str] = frozenset()
        self._enforcement = enforcement
        # Held as long as we live: a subtree whose lock can be taken has a dead owner.
        self._lock_fd = lock_fd
        self._moved_from: Path | None = None
        # Others of this process that were opened while it was in our leaf, and whose
        # spawners are there. We can leave it when they have closed.
        self._home: Subtree | None = None
        self._guests = 0
        self._closing = False
        self._delegated = False
        self._enabled_in_base: list[str] = []
        self.shortcomings: dict[str, CgroupError] = {}

    @classmethod
    def open(
        cls,
        enforcement: Enforcement,
        *,
        root: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
    ) -> Subtree | None:
        """Make this process's subtree below `root` (default: the cgroup it is in).

        When it is in `root` itself it moves into a leaf of its own. Left-overs of
        dead owners below `root` are removed. A cgroup with `limits` (default
        `Limits()`) is made and removed again, to find now what would fail later.

        require: raises `CgroupError` for anything missing. auto: logs one warning
        instead and goes without; None when there is no usable hierarchy at all.
        off: None.
        """
        if enforcement not in get_args(Enforcement):
            raise ValueError(
                f"enforcement must be one of {', '.join(get_args(Enforcement))}, "
                f"not {enforcement!r}"
            )
        if enforcement == "off":
            return None
        try:
            base = _find_base(root)
            _sweep(base)
            subtree = cls(*_make_locked(base), enforcement)
            try:
                subtree._set_up(base, limits or Limits())
            except BaseException:
                subtree.close()
                raise
        except CgroupError as error:
            if enforcement == "require":
                raise
            logger.warning("jobs run without cgroups and without limits: %s", error)
            return None
        return subtree

    def _set_up(self, base: Path, limits: Limits) -> None:
        self._home = next((s for s in _open_subtrees if s._moved_from is not None), None)
        if self._home is not None:
            self._home._guests += 1
        _open_subtrees.append(self)
        _mkdir(self.path / "main")
        _mkdir(self.jobs)
        if base == _own_cgroup(_cgroup2_mounts()):
            write(self.path / "main/cgroup.procs", "0", remedy=DELEGATE)
            self._moved_from = base
        available = read(base / "cgroup.controllers").split()
        deadline = time.monotonic() + _DEATH_S
        for controller in _CONTROLLERS:
            try:
                self._enable_or_wait(base, controller, available, deadline)
                self.controllers |= {controller}
            except CgroupError as error:
                self._give_up_or_note(controller, error)
        probe = self.create("probe", limits)
        probe.remove()
        if self.shortcomings:
            errors = self.shortcomings.values()
            texts = [*(error.problem for error in errors), *(error.remedy for error in errors)]
            logger.warning(
                "not every limit can be enforced (in force: %s): %s",
                _describe(probe.limits) or "none",
                "; ".join(dict.fromkeys(texts)),  # each once
            )

    def _enable_or_wait(
        self, base: Path, controller: str, available: list[str], deadline: float
    ) -> None:
        """Enable, and if what is left of a dead owner is in the way, wait for its end."""
        while True:
            try:
                return self._enable(base, controller, available)
            except CgroupError as error:
                # A process is in `base`. It is, but `base` has let pass +cpu and become a
                # threaded domain. What `base` handed down has just been taken back.
                reasons = (errno.EBUSY, errno.EOPNOTSUPP, errno.ENOENT)
                if error.errno not in reasons or not _await_dismantlers(base, deadline):
                    raise

    def _enable(self, base: Path, controller: str, available: list[str]) -> None:
        """Hand `controller` down from `base` to the jobs."""
        if controller not in available:
            raise CgroupError(
                f"{base} does not have the {controller} controller",
                path=base / "cgroup.controllers",
                remedy=_UNIFIED if _v1_controllers() else DELEGATE,
            )
        if controller not in read(base / "cgroup.subtree_control").split():
            write(
                base / "cgroup.subtree_control",
                f"+{controller}",
                remedy=f"{DELEGATE}; no process but this one may be in {base}",
            )
            self._enabled_in_base.append(controller)
        for directory in (self.path, self.jobs):
            write(directory / "cgroup.subtree_control", f"+{controller}", remedy=DELEGATE)

    def create(self, name: str, limits: Limits) -> Cgroup:
        """Make the cgroup of one job and write every limit before returning it.

        Raises `CgroupError`, and leaves nothing behind, when it cannot be made or,
        under `require`, when a limit cannot be written. Under `auto` such a limit is
        None in the result's `limits`.
        """
        path = self.jobs / name
        _mkdir(path)
        cgroup = Cgroup(path, NO_LIMITS)
        try:
            return self.limit(cgroup, limits)
        except BaseException:
            cgroup.remove()
            raise

    def limit(self, cgroup: Cgroup, limits: Limits) -> Cgroup:
        """Write every limit of a cgroup that has none, and return it with those in force.

        Raises as `create`; then some may have been written.
        """
        unlimited: list[str] = []
        for controller, names in _CONTROLLERS.items():
            if all(getattr(limits, name) is None for name in names):
                continue
            if controller in self.controllers:
                try:
                    _WRITERS[controller](cgroup.path, limits)
                    continue
                except CgroupError as error:
                    self._give_up_or_note(controller, error)
            unlimited += names
        return Cgroup(cgroup.path, replace(limits, **dict.fromkeys(unlimited)))

    def _give_up_or_note(self, controller: str, error: CgroupError) -> None:
        if self._enforcement == "require":
            raise error
        self.shortcomings.setdefault(controller, error)

    def close(self) -> None:
        """Kill what is left of the jobs, leave the subtree and remove it; idempotent.

        The spawner must have ended. Blocks until the killed processes are gone. Logs
        a warning, and leaves the directory for the next start to sweep, when
        something else keeps it in use. While other subtrees of this process are open,
        the leaf that it is in is left to the last of them to remove.
        """
        if self._closing:
            return
        self._closing = True
        if not self._delegated:
            self._attempt(self._remove_jobs)
        if not self._guests:
            self._leave()

    @property
    def dismantling(self) -> tuple[str, str | None, list[str]]:
        """The arguments of `dismantle` for this subtree."""
        base = str(self._moved_from) if self._moved_from else None
        return str(self.path), base, self._enabled_in_base

    def delegate(self, uid: int) -> None:
        """Let the user `uid` make, limit, kill and remove the cgroups of jobs, and no others.

        For an owner that is going to be that user. `close` then leaves it to somebody
        else to `dismantle` the rest. Raises `CgroupError`.
        """
        if not (self.jobs / "cgroup.kill").exists():
            raise CgroupError(
                "this kernel cannot kill a cgroup, and this process would have no right to kill "
                "the processes in it",
                path=self.jobs / "cgroup.kill",
                remedy="use Linux 5.14 or newer, or start this program as an ordinary user",
            )
        try:
            # A cgroup belongs to whoever makes it, so the directory to make it in is enough.
            os.chown(self.jobs, uid, uid)
        except OSError as error:
            raise failure(error, "change the owner of", self.jobs, remedy=DELEGATE) from error
        self._delegated = True

    def _leave(self) -> None:
        if not self._delegated:
            self._attempt(lambda: dissolve(*self.dismantling))
        os.close(self._lock_fd)
        if self in _open_subtrees:
            _open_subtrees.remove(self)
        if self._home is not None:
            self._home._guests -= 1
            if self._home._closing and not self._home._guests:
                self._home._leave()

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except CgroupError as error:
            logger.warning("the cgroup %s could not be removed: %s", self.path, error)

    def _remove_jobs(self) -> None:
        kill_and_remove(self.jobs)


# Those of this process that are open, or that wait for their guests.
_open_subtrees: list[Subtree] = []


class Cgroup:
    """One job's cgroup. Attributes: `path`, `limits` (those in force; None where not)."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.limits = limits

    def kill(self) -> None:
        """SIGKILL every process in the cgroup and below; nothing when it is gone."""
        kill_tree(self.path)

    def wait_empty(self, timeout: float | None = None) -> None:
        """Block until no living process is in the cgroup or below.

        The kernel wakes us. Raises TimeoutError after `timeout` seconds.
        """
        if not wait_event(self.path, "populated", "0", timeout):
            raise TimeoutError(f"processes in {self.path} are still alive after {timeout} s")

    def usage(self) -> Usage:
        """Read what the job has used so far. All None when the cgroup is gone."""
        path = str(self.path)
        cpu = _read_pairs(f"{path}/cpu.stat")
        io = _read_io(f"{path}/io.stat")
        throttled_us = cpu.get("throttled_usec")
        return Usage(
            cpu_user_s=cpu["user_usec"] / 1e6 if cpu else None,
            cpu_system_s=cpu["system_usec"] / 1e6 if cpu else None,
            cpu_throttled_s=None if throttled_us is None else throttled_us / 1e6,
            memory_bytes=_read_number(f"{path}/memory.current"),
            memory_peak_bytes=_read_number(f"{path}/memory.peak"),
            io_read_bytes=io.get("rbytes"),
            io_written_bytes=io.get("wbytes"),
            io_reads=io.get("rios"),
            io_writes=io.get("wios"),
            pids=_read_number(f"{path}/pids.current"),
            pids_peak=_read_number(f"{path}/pids.peak"),
            oom_kills=_read_pairs(f"{path}/memory.events").get("oom_kill"),
        )

    def remove(self) -> None:
        """Remove the cgroup and what the job made below it. It must be empty of processes."""
        remove_tree(self.path)

    def remove_if_unused(self) -> bool:
        """Remove the cgroup if neither a process nor a cgroup is in it; return whether it was.

        Works even when this process has no descriptor left.
        """
        try:
            self.path.rmdir()
        except OSError:
            return False
        return True


# --- discovery -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Mount:
    root: str  # the cgroup that is mounted, as seen from our cgroup namespace
    point: Path
    type: str


def _mounts() -> list[_Mount]:
    """Read /proc/self/mountinfo; proc(5) has its format."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        root, point = (
            re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)
            for field in before.split(" ")[3:5]
        )
        mounts.append(_Mount(root, Path(point), after.split(" ")[0]))
    return mounts


def _cgroup2_mounts() -> list[_Mount]:
    return [mount for mount in _mounts() if mount.type == "cgroup2"]


def _v1_controllers() -> bool:
    return any(mount.type == "cgroup" for mount in _mounts())


def _own_cgroup(mounts: list[_Mount]) -> Path | None:
    """The directory of the v2 cgroup we are in (the `0::` line), if it is mounted."""
    for line in Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines():
        if line.startswith("0::"):
            own = line[3:].removesuffix(" (deleted)")
            for mount in mounts:
                if mount.root.startswith("/.."):
                    continue  # made outside of our cgroup namespace; who knows where we are in it
                relative = os.path.relpath(own, mount.root)
                if not relative.startswith(".."):
                    return Path(os.path.normpath(mount.point / relative))
    return None


def _find_base(root: str | os.PathLike[str] | None) -> Path:
    """Return the cgroup to work below, having made sure that it is one."""
    mounts = _cgroup2_mounts()
    if root is None:
        own = _own_cgroup(mounts)
        if own is None:
            raise CgroupError(
                "no cgroup v2 hierarchy that holds this process is mounted",
                remedy=_UNIFIED
                if _v1_controllers()
                else "mount one: mount -t cgroup2 none /sys/fs/cgroup",
            )
        if own.name == "main" and own.parent.name.startswith(_PREFIX):
            # Another subtree of this process, or of its parent: stay where we are and
            # work beside it, for its leaf must not hand controllers down.
            return own.parent.parent
        return own
    path = Path(os.path.realpath(root))
    # The innermost mount decides: on a hybrid host /sys/fs/cgroup is a tmpfs, where
    # mkdir works and a limit would be written to an ordinary file.
    covering = [m for m in _mounts() if path.is_relative_to(m.point)]
    innermost = max(covering, key=lambda m: len(m.point.parts), default=None)
    if innermost is None or innermost.type != "cgroup2" or not path.is_dir():
        raise CgroupError(
            f"{os.fspath(root)} is not a cgroup v2 directory",
            path=path,
            remedy="name a directory below "
            + (" or ".join(str(m.point) for m in mounts) or "a cgroup2 mount"),
        )
    return path


def _make_locked(base: Path) -> tuple[Path, int]:
    """Make a new subtree directory in `base` and lock it."""
    while True:
        path = base / f"{_PREFIX}{os.urandom(4).hex()}"
        _mkdir(path)
        # Another process's sweep may take it for a left-over before we have locked it.
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.stat(path)
            except (BlockingIOError, FileNotFoundError):
                os.close(fd)
            else:
                return path, fd


def _sweep(base: Path) -> None:
    """Remove the subtrees in `base` whose owner is dead: those whose lock is free."""
    for path in base.glob(f"{_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile, or not ours to touch
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kill_and_remove(path / "jobs")
            # The fork server of the dead main process may not have ended yet.
            wait_event(path, "populated", "0", _DEATH_S)
            remove_tree(path)
            logger.info("removed the left-over cgroup %s of a dead process", path)
        except BlockingIOError:
            pass  # its owner lives
        except CgroupError as error:
            logger.warning("a left-over cgroup could not be removed: %s", error)
        finally:
            os.close(fd)


def _await_dismantlers(base: Path, deadline: float) -> bool:
    """Block until somebody who dismantles the subtree of a dead owner has left `base`.

    They move there to remove the cgroup that they were in, and end. False, at once, if
    anybody else is in `base`, and after `deadline`: then trying again is of no use.
    """
    _sweep(base)  # waits for those who are not there yet
    with contextlib.ExitStack() as opened:
        ends = select.poll()
        pids = read(base / "cgroup.procs").split()
        for pid in pids:
            try:
                pidfd = os.pidfd_open(int(pid))
                opened.callback(os.close, pidfd)
                name = Path(f"/proc/{pid}/comm").read_bytes()
            except (ProcessLookupError, FileNotFoundError):
                return time.monotonic() < deadline  # it has just ended
            except OSError:  # of another PID namespace, say
                return False
            if name != DISMANTLER + b"\n":
                return False
            ends.register(pidfd, select.POLLIN)
        if pids:
            return bool(ends.poll(max(0.0, deadline - time.monotonic()) * 1000))
    # They were gone before we looked. As in `remove_tree`, the kernel can be late to notice.
    with Events(base) as events:
        events.read()
        events.wait_change(RETRY_MS)
    return time.monotonic() < deadline


def _physical_disks() -> list[str]:
    """The MAJ:MIN of every physical disk.

    io.max takes whole disks only, which is what /sys/block lists. Below
    /sys/devices/virtual/block are loop, ram, device-mapper and md devices, whose I/O
    reaches a physical disk in the end; an empty drive has size 0.
    """
    disks = []
    # Quickly, because it is done for each job: a disk may have been plugged in.
    for name in os.listdir("/sys/block"):
        entry = f"/sys/block/{name}"
        with contextlib.suppress(OSError):  # unplugged meanwhile
            virtual = "/devices/virtual/block/" in os.readlink(entry)
            if not virtual and int(read_text(f"{entry}/size")) > 0:
                disks.append(read_text(f"{entry}/dev").strip())
    return sorted(disks)


# --- the files of a cgroup ----------------------------------------------------------


def _write_cpu(path: Path, limits: Limits) -> None:
    if limits.cpu_cores is not None:
        quota_us = round(limits.cpu_cores * _CPU_PERIOD_US)
        write(path / "cpu.max", f"{quota_us} {_CPU_PERIOD_US}")


def _write_memory(path: Path, limits: Limits) -> None:
    if limits.memory_bytes is not None:
        write(path / "memory.max", str(limits.memory_bytes))
        # Without it the kernel kills one process of the job and the rest limps on.
        write(path / "memory.oom.group", "1")
    if limits.swap_bytes is not None and (
        (path / "memory.swap.max").exists() or len(read("/proc/swaps").splitlines()) > 1
    ):
        # The file is missing where swap is not accounted; that matters only if there is swap.
        write(path / "memory.swap.max", str(limits.swap_bytes))


def _write_io(path: Path, limits: Limits) -> None:
    rates = [
        ("rbps", limits.io_read_bps),
        ("wbps", limits.io_write_bps),
        ("riops", limits.io_read_iops),
        ("wiops", limits.io_write_iops),
    ]
    value = " ".join(f"{key}={rate}" for key, rate in rates if rate is not None)
    disks = _physical_disks()
    if not disks:
        raise CgroupError(
            "this host has no physical disk in /sys/block whose I/O could be limited",
            path="/sys/block",
            remedy="attach a disk, or set no I/O limit",
        )
    for disk in disks:
        write(path / "io.max", f"{disk} {value}")


def _write_pids(path: Path, limits: Limits) -> None:
    write(path / "pids.max", str(limits.pids))


_WRITERS = {"cpu": _write_cpu, "memory": _write_memory, "io": _write_io, "pids": _write_pids}


def _read_number(path: str) -> int | None:
    text = read_if_there(path)
    return int(text) if text else None


def _read_pairs(path: str) -> dict[str, int]:
    """Read a flat keyed file: a key and a number a line."""
    pairs = (line.split() for line in read_if_there(path).splitlines())
    return {key: int(value) for key, value in pairs}


def _read_io(path: str) -> dict[str, int]:
    """Add up io.stat over the disks. A disk that was not used has no line there."""
    text = read_if_there(path)
    if not text and not os.path.exists(path):
        return {}
    total = dict.fromkeys(("rbytes", "wbytes", "rios", "wios"), 0)
    for line in text.splitlines():
        for pair in line.split()[1:]:
            key, _, value = pair.partition("=")
            if key in total:
                total[key] += int(value)
    return total


def _mkdir(path: Path) -> None:
    try:
        path.mkdir()
        # Whatever the umask: a process that becomes another user has to walk through it, and
        # programs in jobs look up their own limits.
        path.chmod(0o755)
    except OSError as error:
        remedy = _READ_ONLY if error.errno == errno.EROFS else DELEGATE
        raise failure(error, "make", path, remedy=remedy) from error


def _describe(limits: Limits) -> str:
    return ", ".join(
        f"{field.name}={getattr(limits, field.name)}"
        for field in fields(limits)
        if getattr(limits, field.name) is not None
    )
