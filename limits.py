"""What one job may use (`Limits`) and has used (`Usage`); what all may have (`Bounds`).

Values only. `cgroups.py` has the kernel enforce the limits and reads the usage.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Literal

__all__ = ["NO_LIMITS", "Bounds", "Enforcement", "Limits", "Usage"]

_MIB = 1024 * 1024
_MAX_LIMIT = (1 << 63) - 1  # what the kernel can store
_MINIMA = {"cpu_cores": 0.01, "swap_bytes": 0}  # all others: 1. The kernel refuses less CPU.

Enforcement = Literal["require", "auto", "off"]
"""What to do if a limit cannot be enforced. require: refuse to run jobs. auto: log a warning and
enforce the others. off: use no cgroups at all."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one job may use. None means no limit. Raises ValueError for a value out of range."""

    cpu_cores: float | None = 1.0
    """CPU seconds per second, all processes together; at least 0.01. cpu.max"""
    memory_bytes: int | None = 512 * _MIB
    """Memory with page cache. A job that needs more is killed as a whole. memory.max"""
    swap_bytes: int | None = 0
    """Bytes of swap, in addition to the memory. memory.swap.max"""
    io_read_bps: int | None = 50 * _MIB
    """Bytes per second read from each physical disk. io.max rbps"""
    io_write_bps: int | None = 50 * _MIB
    """Bytes per second written to each physical disk. io.max wbps"""
    pids: int | None = 512
    """Processes and threads. pids.max"""
    io_read_iops: int | None = None
    """Read operations per second on each physical disk. io.max riops"""
    io_write_iops: int | None = None
    """Write operations per second on each physical disk. io.max wiops"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            number = int | float if field.name == "cpu_cores" else int
            if not isinstance(value, number) or isinstance(value, bool):
                raise ValueError(f"{field.name} must be a number or None, not {value!r}")  # noqa: TRY004 -- one error for all senseless limits
            minimum = _MINIMA.get(field.name, 1)
            if not value >= minimum:  # true for not-a-number too
                raise ValueError(f"{field.name} must be at least {minimum}, not {value!r}")
            if value > _MAX_LIMIT:
                raise ValueError(f"{field.name} must be at most {_MAX_LIMIT}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What all jobs together may have."""

    memory_bytes: int | None = None
    """memory.max; also of what outlives a job: shared memory, files of a tmpfs, the page cache.
    None: four fifths of the memory there is."""
    pids: int | None = None
    """Processes and threads, pids.max. None: half of what the kernel can have."""
    cgroups: int = 10_000
    """cgroup.max.descendants; each running job has one, and the next job has one."""
    cgroup_depth: int = 8
    """How deep cgroups may be nested. That of a job counts as 1. cgroup.max.depth"""


NO_LIMITS: Final = Limits(*[None] * len(fields(Limits)))


@dataclass(frozen=True, slots=True)
class Usage:
    """What one job has used so far. None for each figure that the host does not count."""

    cpu_user_s: float | None = None
    cpu_system_s: float | None = None
    cpu_throttled_s: float | None = None
    """How long the CPU limit held processes back, added up over the CPUs."""
    memory_bytes: int | None = None
    """In use now; None when the job has ended."""
    memory_peak_bytes: int | None = None
    """The most that was in use at one time. memory.peak, since Linux 5.19"""
    io_read_bytes: int | None = None
    """Read from disks, not from the page cache. This and the next three: all disks together."""
    io_written_bytes: int | None = None
    io_reads: int | None = None
    io_writes: int | None = None
    pids: int | None = None
    """Processes and threads now; None when the job has ended."""
    pids_peak: int | None = None
    """The most that existed at one time. pids.peak, since Linux 6.1"""
    oom_kills: int | None = None
    """How many processes the kernel killed because memory was lacking: below the memory limit of
    the job, the bound of all jobs, or in the host."""
    memory_limit_hits: int | None = None
    """How often a process needed memory when the job was at its own limit and could free none."""
    refused_forks: int | None = None
    """How often the limit of processes refused another process or thread."""
