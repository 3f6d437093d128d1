"""How the server is: what `server status` shows, as JSON and in words.

    status = describe(jobs=worker.counts(), uses=quotas.uses(), users=5, ...)
    print(*in_words(status), sep="\n")

`nearly_full` names what has reached four fifths of its ceiling, `expires_soon` the certificates
that expire within 30 days, `problems` what does not work at the moment.

Thread safety: any thread may call anything, but nothing after `Disks.close`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from units import format_duration, format_size
from version import VERSION
from worker import EndReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from quotas import Use
    from worker import Counts

__all__ = ["Disk", "Disks", "describe", "in_words"]

_NEARLY = 0.8


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk that `path` is on. `free_bytes`: what this process may still write."""

    path: str
    size_bytes: int
    free_bytes: int


class Disks:
    """The disks that some directories are on, each disk once. A context manager.

    It keeps the directories open, because the process may lose the right to walk their paths.
    Raises OSError.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        self._fds: dict[int, tuple[str, int]] = {}  # by device
        for path in directories:
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            if self._fds.setdefault(os.fstat(fd).st_dev, (str(path), fd))[1] != fd:
                os.close(fd)

    def look(self) -> list[Disk]:
        """Return how full they are now."""
        found = []
        for path, fd in self._fds.values():
            disk = os.fstatvfs(fd)
            size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
            found.append(Disk(path, size, free))
        return found

    def close(self) -> None:
        """Close the directories; idempotent."""
        while self._fds:
            os.close(self._fds.popitem()[1][1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe(  # noqa: PLR0913 -- what a server consists of
    *,
    address: str,
    started_s: float,
    jobs: Counts,
    uses: Sequence[Use],
    users: int,
    store_bytes: int,
    disks: Sequence[Disk],
    expiries: Mapping[str, int],
    warnings: Sequence[str],
    problems: Sequence[str],
) -> dict[str, Any]:
    """Return the status as a JSON object.

    `started_s`: when the server was started, by `time.time`.
    `expiries`: when each certificate expires, in seconds since 1970.
    `uses`: those of all users together first, then those of each user.
    """
    in_all = {use.name: use for use in uses if use.user is None}
    running, streams = in_all["running_jobs"], in_all["streams"]
    return {
        "version": VERSION,
        "pid": os.getpid(),
        "address": address,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started_s)),
        "uptime_s": max(0, int(time.time() - started_s)),
        "jobs": {
            "running": jobs.running,
            "ceiling": running.ceiling,
            "finished": jobs.finished,
            "ended": {reason.value: jobs.ended.get(reason, 0) for reason in EndReason},
        },
        "streams": {"open": streams.used, "ceiling": streams.ceiling},
        "users": users,
        "output_bytes": in_all["kept_output"].used,
        "store_bytes": store_bytes,
        "disks": [
            {"path": disk.path, "size_bytes": disk.size_bytes, "free_bytes": disk.free_bytes}
            for disk in disks
        ],
        "nearly_full": [*_full_uses(uses), *_full_disks(disks)],
        "certificates": dict(expiries),
        "expires_soon": list(warnings),
        "problems": list(problems),
    }


def _full_uses(uses: Sequence[Use]) -> Iterator[str]:
    for use in uses:
        if use.ceiling is not None and use.used and use.used >= _NEARLY * use.ceiling:
            whose = "all users" if use.user is None else f"user {use.user}"
            table = "in_all" if use.user is None else "per_user"
            used, ceiling = map(use.in_words, (use.used, use.ceiling))
            yield f"{used} of {ceiling} ({table}.{use.name}) are taken by {whose}"


def _full_disks(disks: Sequence[Disk]) -> Iterator[str]:
    for disk in disks:
        if disk.free_bytes < (1 - _NEARLY) * disk.size_bytes:
            free, size = map(format_size, (disk.free_bytes, disk.size_bytes))
            yield f"the disk of {disk.path}: {free} of {size} are free"


def in_words(status: Mapping[str, Any]) -> list[str]:
    """Return the lines that `server status` prints."""
    jobs, streams = status["jobs"], status["streams"]
    kept = f"{jobs['finished']} finished are kept, {format_size(status['output_bytes'])} of output"
    age = format_duration(status["uptime_s"])
    lines = [
        f"job-worker {status['version']}, process {status['pid']}, up for {age}",
        f"address  {status['address']}",
        f"jobs     {jobs['running']} running{_at_most(jobs)}; {kept}",
        f"streams  {streams['open']} open{_at_most(streams)}",
        f"users    {status['users']}",
    ]
    for disk in status["disks"]:
        free, size = map(format_size, (disk["free_bytes"], disk["size_bytes"]))
        lines.append(f"disk     {disk['path']}: {free} of {size} free")
    for key, title in (
        ("problems", "does not work"),
        ("nearly_full", "nearly full"),
        ("expires_soon", "expires soon"),
    ):
        lines += [f"{title}: {each}" for each in status[key]] or [f"{title}: nothing"]
    return lines


def _at_most(counted: Mapping[str, Any]) -> str:
    return "" if counted["ceiling"] is None else f" of at most {counted['ceiling']}"
