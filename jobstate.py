"""What is known of a job (`Job`), and what a job is to be (`Work`).

    if job.status is Status.RUNNING:
        ...

Thread safety: these values never change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from broadcaster import Gap
    from budget import Budget
    from ending import Ending
    from limits import Limits, Usage

__all__ = ["STOPS", "EndReason", "Job", "Status", "UsageSource", "Work"]


class Status(Enum):
    """RUNNING becomes STOPPED or FINISHED, once, when the output is complete."""

    QUEUED = "queued"  # on a cluster: it waits for a node; becomes any of the others
    RUNNING = "running"
    STOPPED = "stopped"  # `Worker.stop`, `Worker.close` or the job's timeout ended it
    FINISHED = "finished"  # it ended in any other way

    @property
    def is_over(self) -> bool:
        """Whether it never changes again."""
        return self is Status.STOPPED or self is Status.FINISHED


class EndReason(Enum):
    """Why a job is no longer running."""

    EXITED = "exited"
    SIGNALLED = "signalled"  # by a signal that neither `stop` nor `close` sent
    STOPPED = "stopped"  # by `Worker.stop`; `Job.stop_reason` says what its caller gave as reason
    OUT_OF_MEMORY = "out of memory"  # by the kernel: it reached its own memory limit
    # By the kernel, which needed memory: all jobs together reached their bound, or the host its.
    HOST_OUT_OF_MEMORY = "host out of memory"
    CLOSED = "closed"  # by `Worker.close`
    TIMED_OUT = "timed out"  # it ran for longer than the timeout that it was started with
    LOST = "lost"  # the fork server died, so nobody knows how the leader ended
    NODE_FAILED = "node failed"  # on a cluster
    CANCELLED = "cancelled"  # by the administrator of the cluster


STOPS = EndReason.STOPPED, EndReason.CLOSED, EndReason.TIMED_OUT


class UsageSource(Enum):
    """Where a job's usage comes from."""

    CGROUP = "cgroup"  # all of the job's processes
    RUSAGE = "rusage"  # the leader and the children it waited for; known when the leader has ended


@dataclass(frozen=True, slots=True)
class Job:
    """What is known of a job at one moment."""

    job_id: str
    owner: str
    command: str
    args: tuple[str, ...]
    status: Status
    end_reason: EndReason | None  # None while it runs
    stop_reason: str  # as given to `Worker.stop`; "" unless that ended the job
    exit_code: int | None  # None unless the leader exited
    signal: int | None  # None unless a signal killed the leader
    started_at: datetime  # aware, UTC
    ended_at: datetime | None  # when the leader's end was noticed
    output_bytes: int  # that can be read
    output_lost_bytes: int  # written, and not kept: those of `output_gap`
    subscribers: tuple[str, ...]  # the names of those reading now, each once
    limits: Limits  # those in force; None where not
    usage: Usage | None  # None where nothing is known (yet)
    usage_source: UsageSource | None  # None when `usage` is
    # The job has ended, but a process of it may live: there was no cgroup, and it left the session.
    may_have_escaped: bool = False
    working_directory: str = "/"  # the one asked for, or else the home; absolute
    tmp_directory: str = ""  # the job's TMPDIR if it is kept as long as the job
    name: str = ""  # as given to `Worker.start`, as are the labels
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    input_bytes: int | None = None  # that its stdin has taken; None if its stdin is /dev/null
    input_ended: bool = False  # whether it gets no more of them
    output_gap: Gap | None = None  # where output is not kept; None if all is
    # How many processes were killed because they went on after the leader had ended by itself.
    killed_after_exit: int = 0
    timeout: float | None = None  # in seconds, as given to `Worker.start`
    node: str = ""  # of the cluster on which it runs or ran
    reason: str = ""  # the cluster's words: why the job is QUEUED, or what ended it


class Work(NamedTuple):
    """What a job is to be: the arguments of `Worker.start`, checked."""

    argv: list[str]
    owner: str
    uid: int | None
    limits: Limits
    budget: Budget | None
    on_end: Callable[[], None] | None
    directory: str
    name: str
    labels: Mapping[str, str]
    ending: Ending
    stdin: bool = False
    keep_tmp: bool = False
    request_id: str = ""
    digest: bytes = b""
    no_queue: bool = False
