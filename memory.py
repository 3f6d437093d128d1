"""How much memory this process can still take before the kernel kills something for it.

    if memory.left_bytes() < needed:
        ...

The answer is the least of what each cgroup above this process has left, and of what the host has
left. Memory of files that the kernel can drop counts as left. The answer is a snapshot: others take
memory, too.

Thread safety: there is no state.

Sources: proc(5) on mountinfo, cgroup and meminfo; the kernel's admin-guide on cgroup-v2
(memory.max, memory.current, memory.stat) and cgroup-v1 (memory.limit_in_bytes and so on).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["left_bytes"]

_KIB = 1024
# By the kind of mount: the files of a cgroup that have its limit and what it uses, and the lines of
# memory.stat with the memory of files.
_FILES = {
    "cgroup2": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "cgroup": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def left_bytes() -> int:
    """Return the number of bytes; may be negative. Raises OSError if /proc cannot be read."""
    meminfo = _numbers(Path("/proc/meminfo").read_text().replace(":", ""))
    return min([meminfo["MemAvailable"] * _KIB, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    for kind, directory, top in _groups():
        limit_file, used_file, dropped = _FILES[kind]
        for path in (directory, *directory.parents):
            # The root has no limit. Without a limit the text is "max".
            with contextlib.suppress(OSError, ValueError):
                limit = int((path / limit_file).read_text())
                used = int((path / used_file).read_text())
                stat = _numbers((path / "memory.stat").read_text())
                yield limit - used + sum(stat.get(name, 0) for name in dropped)
            if path == top:
                break


def _groups() -> Iterator[tuple[str, Path, Path]]:
    """Yield the kind of each mounted hierarchy for memory, our cgroup in it, and its top."""
    ours = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            ours["cgroup2"] = path
        elif "memory" in controllers.split(","):
            ours["cgroup"] = path
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, top = before.split()[3:5]
        kind, _, options = after.split()[:3]
        ours_here = ours.get(kind)
        if ours_here is None or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        yield kind, Path(top) / ours_here.removeprefix(root).lstrip("/"), Path(top)


def _numbers(text: str) -> dict[str, int]:
    """Return the lines that are a name and a number."""
    lines = (line.split() for line in text.splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}
