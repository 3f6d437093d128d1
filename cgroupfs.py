"""The files and directories of cgroup v2: read, write, wait, kill, remove.

`cgroups.py` builds on this module. The fork server imports this module but not `cgroups.py`, to
kill and signal jobs, and to `dismantle` a subtree that the main process cannot remove itself. So
nothing large is imported here.

    write(f"{path}/pids.max", "100")
    kill_tree(path)
    wait_event(path, "populated", "0", timeout=5)
    remove_tree(path)

Every failure is a `CgroupError` that names the path, the value and the remedy.

Thread safety: this module has no state; any thread may call its functions. An `Events` belongs to
one thread.

Source of the kernel facts: Documentation/admin-guide/cgroup-v2.rst in the kernel's source.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Self

from descriptors import with_reserve
from privileges import set_process_name
from processes import look

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "DELEGATE",
    "DISMANTLER",
    "RETRY_MS",
    "CgroupError",
    "Events",
    "count_living",
    "count_processes",
    "dismantle",
    "dissolve",
    "failure",
    "freeze_and_kill",
    "has_survivors",
    "kill_and_remove",
    "kill_tree",
    "read",
    "read_if_there",
    "read_text",
    "remove_tree",
    "signal_tree",
    "terminate_tree",
    "wait_event",
    "write",
]

RETRY_MS = 10
"""How long to wait for an event that the kernel may not send, before trying again."""
DISMANTLER = b"job-worker-end"
"""The name, in /proc/PID/comm, of a process that runs `dismantle`."""
DELEGATE = (
    "run the program as root, or in a delegated cgroup of its own: "
    "systemd-run --scope -p Delegate=yes ... (--user for an ordinary user)"
)
"""The remedy when this process lacks the right to change a cgroup."""

_CHECK_VALUE = "check the limit's value and the kernel's log"
_REMOVE_RETRY_S = 2.0  # how long rmdir may fail with EBUSY although the cgroup is empty
_FREEZE_ROUNDS = 8
_FREEZE_S = 0.5  # how long to wait for a cgroup to freeze before killing what is in it
_READ_BYTES = 64 * 1024
_SIGNAL_ROUNDS = 4  # how often to look for processes that were forked during the round before
_SIGNAL_BATCH = 64  # how many pidfds to open at the same time
_DEATH_S = 5.0  # how long killed processes may take to be gone
_GONE = (errno.ENOENT, errno.ENODEV)  # no such file; its cgroup was removed while the file was open

Path = str | os.PathLike[str]


class CgroupError(OSError):
    """An operation on a cgroup failed.

    Attributes: `problem`, what failed; `path` and `value`, what was to be written where ("" if
    nothing was); `remedy`, what the operator can do; and OSError's `errno` (0 if there is none).
    """

    def __init__(
        self, problem: str, *, path: Path = "", value: str = "", remedy: str, code: int = 0
    ) -> None:
        super().__init__(code, problem)
        self.problem = problem
        self.path = str(path)
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


def failure(
    error: OSError, action: str, path: Path, *, value: str = "", remedy: str
) -> CgroupError:
    """Return the `CgroupError` for an OSError that the kernel gave when it refused `action`."""
    return CgroupError(
        f"cannot {action} {os.fspath(path)}: {error.strerror}",
        path=path,
        value=value,
        remedy=remedy,
        code=error.errno or 0,
    )


def write(path: Path, value: str, *, remedy: str = _CHECK_VALUE) -> None:
    """Write `value` to an existing file; never creates one. Raises `CgroupError`."""
    try:
        fd = _open(path, os.O_WRONLY)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise failure(error, f"write {value!r} to", path, value=value, remedy=remedy) from error


def read(path: Path) -> str:
    """Return the content of a file. Raises `CgroupError`."""
    try:
        return read_text(path)
    except OSError as error:
        raise failure(error, "read", path, remedy=DELEGATE) from error


def read_if_there(path: Path) -> str:
    """Return the content of a file; "" if the kernel has no such file or the cgroup is gone.

    Raises `CgroupError`.
    """
    try:
        return read_text(path)
    except OSError as error:
        if error.errno in _GONE:
            return ""
        raise failure(error, "read", path, remedy=DELEGATE) from error


def read_text(path: Path) -> str:
    """Return the content of a file, in a third of the time of Path.read_text. Raises OSError."""
    fd = _open(path, os.O_RDONLY)
    try:
        text = b""
        while data := os.read(fd, _READ_BYTES):
            text += data
        return text.decode()
    finally:
        os.close(fd)


def wait_event(path: Path, key: str, value: str, timeout: float | None) -> bool:
    """Block until cgroup.events of `path` has the line `key value`, or the cgroup is gone.

    Returns False if neither happens within `timeout` seconds; None means no bound.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with contextlib.suppress(FileNotFoundError), Events(path) as events:
        while events.read().get(key, value) != value:
            left_ms = None if deadline is None else (deadline - time.monotonic()) * 1000
            if left_ms is not None and left_ms <= 0:
                return False
            events.wait_change(left_ms)
    return True


class Events:
    """An open cgroup.events file. Opening raises FileNotFoundError if the cgroup is gone."""

    def __init__(self, path: Path) -> None:
        self._fd = _open(os.path.join(path, "cgroup.events"), os.O_RDONLY)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLPRI)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        """Return the descriptor, which poll(2) reports with POLLPRI after a change."""
        return self._fd

    def is_populated(self) -> bool:
        """Whether a living process is in the cgroup or below it; False if the cgroup is gone."""
        try:
            return self.read().get("populated") == "1"
        except FileNotFoundError:
            return False

    def read(self) -> dict[str, str]:
        """Return the current content. Raises FileNotFoundError if the cgroup is gone."""
        try:
            text = os.pread(self._fd, 4096, 0).decode()
        except OSError as error:
            if error.errno == errno.ENODEV:  # the cgroup was removed meanwhile
                raise FileNotFoundError(error.errno, error.strerror) from error
            raise
        return dict(line.split() for line in text.splitlines())

    def wait_change(self, timeout_ms: float | None) -> None:
        """Block until the file has changed since `read`, at most `timeout_ms`; None: no bound."""
        self._poll.poll(timeout_ms)


def kill_tree(path: Path) -> bool:
    """SIGKILL every process in the cgroup and below it, also those that are being forked.

    Does not wait for their end. Does nothing if the cgroup is gone. Returns False if some processes
    may survive because this process lacks the right to kill them. These processes are frozen then;
    a process that has the right kills them with `signal_tree`. Raises `CgroupError`.
    """
    may_survive = False
    with contextlib.suppress(CgroupError):  # cgroup.kill does not need what cannot be read here
        may_survive = has_survivors(path)
    try:
        write(os.path.join(path, "cgroup.kill"), "1", remedy=DELEGATE)
        if not may_survive:
            return True
    except CgroupError as error:
        if error.errno not in _GONE:
            raise
        # ENOENT has two causes: the kernel is older than 5.14 and has no cgroup.kill, or another
        # thread has removed the cgroup, because all its processes are dead.
    try:
        freeze_and_kill(path)
    except CgroupError as problem:
        if problem.errno not in _GONE or os.path.exists(path):
            raise
    except PermissionError:
        if not may_survive:
            raise
        return False
    return True


def has_survivors(path: Path | str) -> bool:
    """Whether there is a process that cgroup.kill would miss: only its first thread has ended.

    cgroup.kill sends SIGKILL to the first thread of each process, not to the process, and a thread
    that has ended takes no signal (seen with Linux 6.1 and 6.18). Such a process is in cgroup.procs
    although its first thread is not in cgroup.threads. Raises `CgroupError`.
    """
    processes = _processes(path)
    return bool(processes) and not processes <= _numbers(path, "cgroup.threads")


def freeze_and_kill(path: Path) -> None:
    """Do what `kill_tree` does, without cgroup.kill: freeze, so that nothing forks, then kill."""
    for _ in range(_FREEZE_ROUNDS):
        if not os.path.exists(path):
            return
        write(os.path.join(path, "cgroup.freeze"), "1", remedy=DELEGATE)
        frozen = wait_event(path, "frozen", "1", _FREEZE_S)
        for pid in _processes(path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        write(os.path.join(path, "cgroup.freeze"), "0", remedy=DELEGATE)
        if frozen:
            return


def signal_tree(
    path: Path, number: int, send: Callable[[int, int], object] = signal.pidfd_send_signal
) -> None:
    """Send a signal, once, to every process in the cgroup and below it.

    Processes that are forked meanwhile get it too, unless forks go on without end. `send` is given
    a pidfd and the signal. Raises `CgroupError`; ProcessLookupError if no process is there, as in a
    cgroup that is gone; and what else `send` raises.
    """
    signalled: set[int] = set()
    reached = 0
    for _ in range(_SIGNAL_ROUNDS):
        found = _processes(path) - signalled
        if not found:
            break
        signalled |= found
        reached += _signal(path, (number,), found, send)
    if not reached:
        raise ProcessLookupError(errno.ESRCH, f"no process is in {path}")


def terminate_tree(
    path: Path, send: Callable[[int, int], object] = signal.pidfd_send_signal
) -> None:
    """Send SIGTERM, and then SIGCONT, to every process in the cgroup and below it.

    SIGCONT, because a process that SIGSTOP holds could not end. Processes that are forked meanwhile
    get neither signal, because a handler of SIGTERM may fork them to clean up. Does nothing if no
    process is there. `send`, and what is raised: see `signal_tree`.
    """
    _signal(path, (signal.SIGTERM, signal.SIGCONT), _processes(path), send)


def _signal(
    path: Path, numbers: Sequence[int], pids: set[int], send: Callable[[int, int], object]
) -> int:
    """Send signals to those of the processes that are still in the cgroup or below it.

    Returns how many these were.
    """
    ordered, reached = sorted(pids), 0
    for begin in range(0, len(ordered), _SIGNAL_BATCH):
        with contextlib.ExitStack() as opened:
            pidfds = {}
            for pid in ordered[begin : begin + _SIGNAL_BATCH]:
                with contextlib.suppress(ProcessLookupError):
                    pidfds[pid] = os.pidfd_open(pid)
                    opened.callback(os.close, pidfds[pid])
            # A process may have ended, and a stranger have its pid, before its pidfd was opened.
            # So we look again: if the pid is still in the cgroup, then the pidfd is that of a
            # process of the cgroup, or of a stranger that has ended.
            for pid in _processes(path) & pidfds.keys():
                with contextlib.suppress(ProcessLookupError):
                    for number in numbers:
                        send(pidfds[pid], number)
                    reached += 1
    return reached


def count_processes(path: Path) -> int:
    """Return how many processes are in the cgroup and below it; 0 if it is gone."""
    return len(_processes(path))


def _processes(path: Path) -> set[int]:
    """Return the processes in the cgroup and below it. Raises `CgroupError`."""
    return _numbers(path, "cgroup.procs")


def _numbers(path: Path, name: str) -> set[int]:
    """Return the numbers in the files of this name in the cgroup and below it."""
    pids = set()
    for directory in _directories(path):
        try:
            pids |= set(map(int, read_if_there(f"{directory}/{name}").split()))
        except CgroupError as error:
            # A threaded cgroup, whose processes are listed in one above it.
            if error.errno != errno.EOPNOTSUPP:
                raise
    # A process of another PID namespace is listed as 0. os.kill(0, ...) would kill our own group.
    return pids - {0}


def count_living(path: Path) -> int:
    """Count the processes in the cgroup and below it that are not about to end.

    Raises `CgroupError`.
    """
    found = (look(pid) for pid in _processes(path))
    return sum(each is not None and not each.is_ending for each in found)


def remove_tree(path: Path) -> None:
    """Remove the cgroup and those below it. Does nothing if it is gone. Raises `CgroupError`."""
    for directory in reversed(_directories(path)):
        _remove(directory)


def _directories(path: Path) -> list[str]:
    """List the cgroup and those below it, parents before children.

    Not recursive, because a job may nest cgroups deeper than Python can recurse.
    """
    found = [os.fspath(path)]
    for directory in found:
        with (
            contextlib.suppress(OSError),
            with_reserve(functools.partial(os.scandir, directory)) as entries,
        ):
            found += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return found


def _open(path: Path, flags: int) -> int:
    """Open a file, with the reserve if need be: a shortage of descriptors ends no job as lost."""
    return with_reserve(lambda: os.open(path, flags | os.O_CLOEXEC))


def _remove(path: str) -> None:
    deadline = time.monotonic() + _REMOVE_RETRY_S
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                remedy = "see which processes its cgroup.procs lists"
                raise failure(error, "remove", path, remedy=remedy) from error
            # rmdir may fail with EBUSY for a moment after the last process has gone.
            with contextlib.suppress(FileNotFoundError), Events(path) as events:
                events.read()
                events.wait_change(RETRY_MS)
        else:
            return


def kill_and_remove(path: Path) -> None:
    """Kill every process in the cgroup and below it, wait for their end, remove the cgroups.

    Waits for up to 5 s. Raises `CgroupError`.
    """
    kill_tree(path)
    wait_event(path, "populated", "0", _DEATH_S)
    remove_tree(path)


def dismantle(path: str, base: str | None, controllers: Sequence[str]) -> None:
    """Do in another process what `Subtree.close` would do for the subtree at `path`.

    First renames the calling process to `DISMANTLER`, so that the next main process knows that it
    has to wait for this one. Then kills and removes the jobs, and `dissolve`s the subtree. Errors
    are ignored: the next `Subtree.open` removes what is left. The calling process should have one
    thread, and should end afterwards.
    """
    set_process_name(DISMANTLER)
    with contextlib.suppress(CgroupError):
        kill_and_remove(f"{path}/jobs")
    with contextlib.suppress(CgroupError):
        dissolve(path, base, controllers)


def dissolve(path: str, base: str | None, controllers: Sequence[str]) -> None:
    """Move the processes out of a subtree that has no jobs, and remove it.

    `base`: the cgroup that the processes move back to; None if they did not come from there.
    `controllers`: those that were enabled in `base` for this subtree. Raises `CgroupError`.
    """
    if base is not None:
        # First disable the controllers: as long as any is enabled in `base`, no process may enter
        # it (unless it is the root).
        for controller in controllers:
            with contextlib.suppress(CgroupError):  # another subtree uses it
                for directory in (path, base):
                    write(f"{directory}/cgroup.subtree_control", f"-{controller}")
        for pid in read(f"{path}/main/cgroup.procs").split():
            try:
                write(f"{base}/cgroup.procs", pid, remedy=DELEGATE)
            except CgroupError as error:
                if error.errno != errno.ESRCH:  # the process has just ended
                    raise
    remove_tree(path)
