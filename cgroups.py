"""Control groups (cgroup v2) for jobs: discovery, limits, kill, removal.

A `Subtree` is the part of the cgroup tree that belongs to one main process:

    BASE/                      the cgroup that the main process starts in, or the given root
      job-worker-<random>/     locked (flock) while the main process lives
        main/                  the main process and its fork server
        jobs/
          <job>/               one job, with its limits

Only leaves contain processes: the kernel does not allow processes in a cgroup that enables
controllers for its children. cgroup v1 is not supported.

    subtree = Subtree.open("require")
    cgroup = subtree.create("some-job", Limits(cpu_cores=0.5))
    ...                        # start a process in it: clone3, or write 0 to its cgroup.procs
    cgroup.kill()
    cgroup.wait_empty()
    cgroup.remove()
    subtree.close()

Every failure is a `CgroupError` that names the path, the value and the remedy.

Thread safety: a `Subtree` may be used from any thread once `open` has returned. A `Cgroup` only
has a path and limits, which never change. `open` and `close` move the calling process to another
cgroup, so only one of them may run at a time in a process.

Source of the kernel facts, unless another is named: Documentation/admin-guide/cgroup-v2.rst in
the kernel's source.
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
from typing import TYPE_CHECKING, Any, get_args

from cgroupfs import (
    DELEGATE,
    DISMANTLER,
    RETRY_MS,
    CgroupError,
    Events,
    count_living,
    dissolve,
    failure,
    kill_and_remove,
    kill_tree,
    read,
    read_if_there,
    read_text,
    remove_tree,
    signal_tree,
    terminate_tree,
    wait_event,
    write,
)
from limits import NO_LIMITS, Bounds, Enforcement, Limits, Usage
from removals import Removals

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

__all__ = [
    "Cgroup",
    "CgroupError",
    "Subtree",
    "bases",
]

logger = logging.getLogger(__name__)


_CPU_PERIOD_US = 100_000
_PREFIX = "job-worker-"
_DEATH_S = 5.0  # how long killed processes may take to be gone


_UNIFIED = (
    "this host mounts cgroup v1 or a hybrid of both; boot it with "
    "systemd.unified_cgroup_hierarchy=1 (cgroup_no_v1=all without systemd)"
)
_USER_MANAGER = (
    "the manager of this user does not get it from systemd; as root: mkdir -p "
    "/etc/systemd/system/user@.service.d && printf '[Service]\\nDelegate=cpu cpuset io memory "
    "pids\\n' >/etc/systemd/system/user@.service.d/delegate.conf && systemctl daemon-reload, and "
    "log in anew"
)
_READ_ONLY = (
    "the cgroup filesystem is mounted read-only, as in most containers; start the container "
    "with a writable one of its own (--privileged --cgroupns=private)"
)


# Each controller with the fields of `Limits` that it enforces.
_CONTROLLERS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu_cores",),
    "memory": ("memory_bytes", "swap_bytes"),
    "io": ("io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops"),
    "pids": ("pids",),
}


class Subtree:
    """The cgroups of one main process. Make one with `open`; end it with `close`.

    Attributes: `path`; `jobs`, the directory that contains the jobs' cgroups; `controllers`, those
    that the jobs have; `shortcomings`, which has the first error of each controller that is
    missing or has refused a limit (only under `auto`).
    """

    def __init__(self, path: Path, lock_fd: int, enforcement: Enforcement) -> None:
        self.path = path
        self.jobs = path / "jobs"
        self._removals = Removals()
        self.controllers: frozenset[str] = frozenset()
        self._enforcement = enforcement
        # Locked while this process lives. If the lock can be taken, the main process is dead.
        self._lock_fd = lock_fd
        self._moved_from: Path | None = None
        # A process with several subtrees lives in the leaf of the first, its home. The other
        # subtrees are guests: their fork servers are in that leaf too. So the home can be
        # dissolved only after all guests have closed.
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
        bounds: Bounds | None = None,
    ) -> Subtree | None:
        """Make a subtree for this process below `root` (default: the cgroup that it is in).

        If this process is in `root` itself, it moves into a leaf of its own. Subtrees of dead
        main processes below `root` are removed. A cgroup with `limits` (default: `Limits()`) is
        made and removed as a trial, so that an error shows now and not at the first job. `bounds`
        (default: `Bounds()`) holds for all jobs together.

        `enforcement`: "require" raises `CgroupError` if anything is missing. "auto" logs one
        warning and continues without what is missing; it returns None if no cgroup can be made
        at all. "off" returns None. Raises ValueError for any other word.
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
                subtree._set_up(base, limits or Limits(), bounds or Bounds())
            except BaseException:
                subtree.close()
                raise
        except CgroupError as error:
            if enforcement == "require":
                raise
            logger.warning("jobs run without cgroups and without limits: %s", error)
            return None
        return subtree

    def _set_up(self, base: Path, limits: Limits, bounds: Bounds) -> None:
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
        self._bound(base, bounds)
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

    @classmethod
    def adopt(
        cls,
        dismantling: Sequence[Any],
        lock_fd: int,
        enforcement: Enforcement,
        *,
        bounds: Bounds | None = None,
    ) -> Subtree:
        """Take over the subtree of a main process that has gone, with the jobs in it.

        `dismantling`: that of the other process's `Subtree`. `lock_fd`: of its directory, locked; a
        fork server has kept it. Raises `CgroupError`.
        """
        path, moved_from, enabled = Path(dismantling[0]), dismantling[1], list(dismantling[2])
        subtree = cls(path, lock_fd, enforcement)
        try:
            if path.parent == _own_cgroup(_cgroup2_mounts()):
                write(path / "main/cgroup.procs", "0", remedy=DELEGATE)
            subtree._moved_from = Path(moved_from) if moved_from else None
            subtree._enabled_in_base = enabled
            available = read(subtree.jobs / "cgroup.subtree_control").split()
            subtree.controllers = frozenset(available) & _CONTROLLERS.keys()
            subtree._bound(path.parent, bounds or Bounds())
        except BaseException:
            os.close(lock_fd)
            raise
        _open_subtrees.append(subtree)
        return subtree

    def find(self, name: str, limits: Limits) -> Cgroup:
        """Return the cgroup of a job that runs, with the limits in force."""
        return Cgroup(self.jobs / name, limits, self.controllers, self._removals)

    def sweep(self, kept: Collection[str]) -> None:
        """Kill and remove the cgroups of all jobs but those `kept`. Raises `CgroupError`.

        A cgroup stays if the kernel does not let go of a process in it within 5 s: it may be held
        up by a disk that does not answer.
        """
        others = [each for each in self.jobs.iterdir() if each.is_dir() and each.name not in kept]
        for each in others:
            kill_tree(each)
        deadline = time.monotonic() + _DEATH_S
        for each in others:
            if wait_event(each, "populated", "0", max(0.0, deadline - time.monotonic())):
                remove_tree(each)
            else:
                logger.warning("the kernel does not let go of processes in %s, which stays", each)

    def leave(self) -> None:
        """Leave the subtree with its jobs to another process: `adopt`."""
        self._closing = True
        self._removals.close()
        _open_subtrees.remove(self)
        os.close(self._lock_fd)

    @property
    def lock_fd(self) -> int:
        """The directory, locked, for a fork server that keeps it for another process."""
        return self._lock_fd

    def _bound(self, base: Path, bounds: Bounds) -> None:
        """Write what all jobs together may have. Raises `CgroupError`."""
        write(self.jobs / "cgroup.max.depth", str(bounds.cgroup_depth))
        write(self.jobs / "cgroup.max.descendants", str(bounds.cgroups))
        values = {
            "memory": bounds.memory_bytes or _memory_there_is(base) * 4 // 5,
            "pids": bounds.pids or _pids_there_are() // 2,
        }
        for controller in self.controllers & values.keys():
            try:
                write(self.jobs / f"{controller}.max", str(values[controller]))
            except CgroupError as error:
                self._give_up_or_note(controller, error)

    def _enable_or_wait(
        self, base: Path, controller: str, available: list[str], deadline: float
    ) -> None:
        """Enable `controller`.

        If the fork server of a dead main process prevents that, wait for its end and try again.
        Raises `CgroupError`.
        """
        while True:
            try:
                return self._enable(base, controller, available)
            except CgroupError as error:
                # EBUSY: a process is in `base`. EOPNOTSUPP: the same, after `base` accepted +cpu
                # and became a threaded domain. ENOENT: the fork server of a dead main process has
                # just disabled the controller in `base` again.
                reasons = (errno.EBUSY, errno.EOPNOTSUPP, errno.ENOENT)
                if error.errno not in reasons or not _await_dismantlers(base, deadline):
                    raise

    def _enable(self, base: Path, controller: str, available: list[str]) -> None:
        """Enable `controller` on the whole way from `base` to the jobs. Raises `CgroupError`."""
        if controller not in available:
            raise CgroupError(
                f"{base} does not have the {controller} controller",
                path=base / "cgroup.controllers",
                remedy=_remedy_without_controller(base),
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
        """Make the cgroup of one job and write all its limits.

        Raises `CgroupError` if the cgroup cannot be made. If a limit cannot be written, "require"
        raises `CgroupError`, and "auto" returns a cgroup whose `limits` has None there. Nothing is
        left after an error.
        """
        path = self.jobs / name
        _mkdir(path)
        cgroup = Cgroup(path, NO_LIMITS, self.controllers, self._removals)
        try:
            return self.limit(cgroup, limits)
        except BaseException:
            cgroup.remove()
            raise

    def limit(self, cgroup: Cgroup, limits: Limits) -> Cgroup:
        """Write all limits to a cgroup that has none; return it with the limits in force.

        Raises as `create` does. After an error some of the limits may have been written.
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
        in_force = replace(limits, **dict.fromkeys(unlimited))
        return Cgroup(cgroup.path, in_force, self.controllers, self._removals)

    def _give_up_or_note(self, controller: str, error: CgroupError) -> None:
        if self._enforcement == "require":
            raise error
        self.shortcomings.setdefault(controller, error)

    def close(self) -> None:
        """Kill the remaining jobs, move this process out of the subtree, remove it; idempotent.

        The fork server must have ended. Blocks until the killed processes are gone, for up to
        5 s. If the subtree cannot be removed, logs a warning; the next `open` removes it. If
        other subtrees of this process are open, the last of them to close removes the leaf that
        this process is in. After `delegate` nothing is removed here, because `dismantle` does it.
        """
        if self._closing:
            return
        self._closing = True
        self._removals.close()
        if not self._delegated:
            self._attempt(lambda: kill_and_remove(self.jobs))
        if not self._guests:
            self._dissolve()

    @property
    def dismantling(self) -> tuple[str, str | None, list[str]]:
        """The arguments of `dismantle` for this subtree."""
        base = str(self._moved_from) if self._moved_from else None
        return str(self.path), base, self._enabled_in_base

    def delegate(self, uid: int) -> None:
        """Let the user `uid` make, limit, kill and remove the cgroups of jobs, and no others.

        For a main process that is about to become that user. Afterwards `close` removes nothing:
        a process that still has the rights must call `dismantle`. Raises `CgroupError`.
        """
        if not (self.jobs / "cgroup.kill").exists():
            raise CgroupError(
                "this kernel cannot kill a cgroup, and this process would have no right to kill "
                "the processes in it",
                path=self.jobs / "cgroup.kill",
                remedy="use Linux 5.14 or newer, or start this program as an ordinary user",
            )
        try:
            # A new cgroup belongs to the user who makes it. So the parent directory is enough.
            os.chown(self.jobs, uid, uid)
        except OSError as error:
            raise failure(error, "change the owner of", self.jobs, remedy=DELEGATE) from error
        self._delegated = True

    def _dissolve(self) -> None:
        if not self._delegated:
            self._attempt(lambda: dissolve(*self.dismantling))
        os.close(self._lock_fd)
        if self in _open_subtrees:
            _open_subtrees.remove(self)
        if self._home is not None:
            self._home._guests -= 1
            if self._home._closing and not self._home._guests:
                self._home._dissolve()

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except CgroupError as error:
            logger.warning("the cgroup %s could not be removed: %s", self.path, error)


# The subtrees of this process that are open, or closed but waiting for their guests to close.
_open_subtrees: list[Subtree] = []


class Cgroup:
    """One job's cgroup. Attributes: `path`; `limits`, those in force, None for all others.

    `controllers`: those that the cgroup has. `usage` looks for the files of no other controller.
    """

    def __init__(
        self, path: Path, limits: Limits, controllers: Collection[str], removals: Removals
    ) -> None:
        self.path = path
        self.limits = limits
        self._controllers = controllers
        self._removals = removals

    def kill(self) -> bool:
        """SIGKILL every process in the cgroup and below it: `kill_tree`."""
        return kill_tree(self.path)

    def signal(self, number: int) -> None:
        """Send a signal to every process in the cgroup and below it: `signal_tree`."""
        signal_tree(self.path, number)

    def terminate(self) -> None:
        """Send SIGTERM to every process in the cgroup and below it: `terminate_tree`."""
        terminate_tree(self.path)

    def events(self) -> Events:
        """Open its cgroup.events. Raises FileNotFoundError if the cgroup is gone."""
        return Events(self.path)

    def kill_rest(self, kill: Callable[[], object]) -> int:
        """Have `kill` kill every process in the cgroup, and block until all are gone.

        Returns how many processes were killed: 0 for those that were about to end. Raises
        `CgroupError`.
        """
        with contextlib.suppress(FileNotFoundError), self.events() as events:
            if events.is_populated():
                killed = count_living(self.path)
                kill()
                while events.is_populated():
                    events.wait_change(None)
                return killed
        return 0

    def wait_empty(self, timeout: float | None = None) -> None:
        """Block until no living process is in the cgroup or below it, or the cgroup is gone.

        Raises TimeoutError after `timeout` seconds; None means no bound.
        """
        if not wait_event(self.path, "populated", "0", timeout):
            raise TimeoutError(f"processes in {self.path} are still alive after {timeout} s")

    def usage(self) -> Usage:
        """Read what the job has used so far; None for each figure whose file is missing."""
        path = str(self.path)
        cpu = _read_pairs(f"{path}/cpu.stat")  # without the controller it has less
        throttled_us = cpu.get("throttled_usec")
        figures: dict[str, int | None] = {}
        if "memory" in self._controllers:
            events = _read_pairs(f"{path}/memory.events")
            figures |= {
                "memory_bytes": _read_number(f"{path}/memory.current"),
                "memory_peak_bytes": _read_number(f"{path}/memory.peak"),
                "oom_kills": _oom_kills(events),
                "memory_limit_hits": events.get("oom"),
            }
        if "io" in self._controllers:
            figures |= _read_io(f"{path}/io.stat")
        if "pids" in self._controllers:
            figures |= {
                "pids": _read_number(f"{path}/pids.current"),
                "pids_peak": _read_number(f"{path}/pids.peak"),
                "refused_forks": _read_pairs(f"{path}/pids.events").get("max"),
            }
        return Usage(
            cpu_user_s=cpu["user_usec"] / 1e6 if cpu else None,
            cpu_system_s=cpu["system_usec"] / 1e6 if cpu else None,
            cpu_throttled_s=None if throttled_us is None else throttled_us / 1e6,
            **figures,
        )

    def remove(self) -> None:
        """Remove the cgroup and those that the job made below it. No process may be in them.

        While the removal of another one takes long, a thread does it later. Raises `CgroupError`.
        """
        if self._removals.make(self._remove) is None:
            self._removals.make_later(self._remove)

    def _remove(self) -> bool:
        if not self.remove_if_unused():
            remove_tree(self.path)
        return True

    def remove_if_unused(self) -> bool:
        """Remove the cgroup if it contains neither a process nor a cgroup; return whether it did.

        Opens no file, so it works even if this process has no descriptor left.
        """
        try:
            os.rmdir(self.path)
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
    """Return the directory of this process's v2 cgroup (the `0::` line); None if not mounted."""
    for line in Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines():
        if line.startswith("0::"):
            own = line[3:].removesuffix(" (deleted)")
            for mount in mounts:
                if mount.root.startswith("/.."):
                    continue  # mounted outside this cgroup namespace: our path in it is unknown
                relative = os.path.relpath(own, mount.root)
                if not relative.startswith(".."):
                    return Path(os.path.normpath(mount.point / relative))
    return None


def _remedy_without_controller(base: Path) -> str:
    """What to do if the cgroup has not got a controller from those above it."""
    if _v1_controllers():
        return _UNIFIED
    # Below here systemd's manager of one user makes the cgroups. Debian gives it no io.
    return _USER_MANAGER if re.search(r"/user@\d+\.service/", f"{base}/") else DELEGATE


def bases(enforcement: Enforcement, root: str | os.PathLike[str] | None) -> list[str | None]:
    """Return where `Subtree.open` would make a subtree; None stands for nowhere.

    Raises `CgroupError`.
    """
    if enforcement == "off":
        return [None]
    try:
        return [str(_find_base(root)), *([None] if enforcement == "auto" else [])]
    except CgroupError:
        if enforcement == "require":
            raise
        return [None]


def _find_base(root: str | os.PathLike[str] | None) -> Path:
    """Return the cgroup in which the subtree is made. Raises `CgroupError` if it is none."""
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
            # This process is in the leaf of another subtree, its own or its parent's. A leaf may
            # not enable controllers, so the new subtree is made beside the other one.
            return own.parent.parent
        return own
    path = Path(os.path.realpath(root))
    # Look at the innermost mount: on a hybrid host /sys/fs/cgroup is a tmpfs. There mkdir would
    # work, but the limits would be ordinary files without effect.
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
    """Make a directory for a subtree in `base` and lock it; return it and the locked descriptor."""
    while True:
        path = base / f"{_PREFIX}{os.urandom(4).hex()}"
        _mkdir(path)
        # Before it is locked, another process's `_sweep` may remove it. Then make another.
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
    """Remove the subtrees in `base` whose lock is free, because their main process is dead."""
    for path in base.glob(f"{_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # removed meanwhile, or it belongs to another user
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kill_and_remove(path / "jobs")
            # The fork server of the dead main process may not have ended yet.
            wait_event(path, "populated", "0", _DEATH_S)
            remove_tree(path)
            logger.info("removed the left-over cgroup %s of a dead process", path)
        except BlockingIOError:
            pass  # its main process lives
        except CgroupError as error:
            logger.warning("a left-over cgroup could not be removed: %s", error)
        finally:
            os.close(fd)


def _await_dismantlers(base: Path, deadline: float) -> bool:
    """Wait for a fork server in `base` that dismantles a dead main process's subtree.

    Such a fork server moves to `base`, because it removes the cgroup that it was in, and then
    ends. Returns True when one has ended, or none is there any more: try again then. Returns
    False at once if any other process is in `base`, and after `deadline`.
    """
    _sweep(base)  # waits for fork servers that have not moved to `base` yet
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
            except OSError:  # for example a process of another PID namespace
                return False
            if name != DISMANTLER + b"\n":
                return False
            ends.register(pidfd, select.POLLIN)
        if pids:
            return bool(ends.poll(max(0.0, deadline - time.monotonic()) * 1000))
    # `base` is empty already. The kernel may call it busy for a moment longer, as in `_remove`.
    with Events(base) as events:
        events.read()
        events.wait_change(RETRY_MS)
    return time.monotonic() < deadline


def _physical_disks() -> list[str]:
    """Return the MAJ:MIN of every physical disk.

    io.max accepts only whole disks, and /sys/block lists only those. Devices below
    /sys/devices/virtual/block (loop, ram, device-mapper, md) are left out, because their I/O
    reaches a physical disk in the end. An empty drive has size 0 and is left out too.
    """
    disks = []
    # Runs for each job, because a disk may have been plugged in. So it avoids slow `Path`.
    for name in os.listdir("/sys/block"):
        entry = f"/sys/block/{name}"
        with contextlib.suppress(OSError):  # unplugged meanwhile
            virtual = "/devices/virtual/block/" in os.readlink(entry)
            if not virtual and int(read_text(f"{entry}/size")) > 0:
                disks.append(read_text(f"{entry}/dev").strip())
    return sorted(disks)


def _memory_there_is(base: Path) -> int:
    """Return the bytes that this host has, or that the cgroup `base` may use if these are fewer."""
    (total,) = [line for line in read("/proc/meminfo").splitlines() if line.startswith("MemTotal:")]
    found = [int(total.split()[1]) * 1024]
    for directory in (base, *base.parents):
        text = read_if_there(directory / "memory.max").strip()
        if text.isdecimal():
            found.append(int(text))
    return min(found)


def _pids_there_are() -> int:
    """Return how many processes and threads the kernel can have."""
    return min(int(read(f"/proc/sys/kernel/{name}")) for name in ("pid_max", "threads-max"))


# --- the files of a cgroup ----------------------------------------------------------


def _write_cpu(path: Path, limits: Limits) -> None:
    if limits.cpu_cores is not None:
        quota_us = round(limits.cpu_cores * _CPU_PERIOD_US)
        write(path / "cpu.max", f"{quota_us} {_CPU_PERIOD_US}")


def _write_memory(path: Path, limits: Limits) -> None:
    if limits.memory_bytes is not None:
        write(path / "memory.max", str(limits.memory_bytes))
        # Otherwise the kernel kills only one process of the job, and the others go on.
        write(path / "memory.oom.group", "1")
    if limits.swap_bytes is not None and (
        (path / "memory.swap.max").exists() or len(read("/proc/swaps").splitlines()) > 1
    ):
        # A kernel that does not account swap lacks this file. Without swap nothing is needed.
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


def _oom_kills(events: dict[str, int]) -> int | None:
    """Return how many processes the OOM killer killed, by memory.events.

    If it kills a whole group, `oom_kill` has the process that it chose first twice.
    """
    kills = events.get("oom_kill")
    # Before Linux 5.17 there is no oom_group_kill; a job is killed as a group, and once.
    groups = events.get("oom_group_kill", 1)
    return max(kills - groups, 1) if kills else kills


def _read_number(path: str) -> int | None:
    text = read_if_there(path)
    return int(text) if text else None


def _read_pairs(path: str) -> dict[str, int]:
    """Read a file whose lines are a key and a number; empty if it is missing."""
    pairs = map(str.split, read_if_there(path).splitlines())
    return {key: int(value) for key, value in pairs}


# What io.stat calls the fields of `Usage`.
_IO_FIGURES = {
    "rbytes": "io_read_bytes",
    "wbytes": "io_written_bytes",
    "rios": "io_reads",
    "wios": "io_writes",
}


def _read_io(path: str) -> dict[str, int]:
    """Add up io.stat over all disks; empty if it is missing. Unused disks have no line there."""
    text = read_if_there(path)
    if not text and not os.path.exists(path):
        return {}
    total = dict.fromkeys(_IO_FIGURES.values(), 0)
    for line in text.splitlines():
        for pair in line.split()[1:]:
            key, _, value = pair.partition("=")
            if key in _IO_FIGURES:
                total[_IO_FIGURES[key]] += int(value)
    return total


def _mkdir(path: Path) -> None:
    try:
        path.mkdir()
        # Independent of the umask: a process that becomes another user must be able to enter the
        # directory, and programs in jobs read their own limits.
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
