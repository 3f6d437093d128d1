"""One job: what is known of it (`Job`), and the thread that sees it through (`RunningJob`).

Thread safety: every method of `RunningJob` may be called from any thread, except those that
the job's own thread runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import sys
import termios
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from cgroups import CgroupError
from errors import ResourceError
from limits import NO_LIMITS, Limits, Usage
from spawner import Exit, SpawnerDiedError, read_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from broadcaster import Budget, OutputLog
    from cgroups import Cgroup
    from spawner import Spawner

__all__ = [
    "Buffers",
    "Descriptors",
    "EndReason",
    "Job",
    "JobThread",
    "RunningJob",
    "Status",
    "UsageSource",
    "Work",
    "kill_processes",
]

logger = logging.getLogger(__name__)

_LARGE_PIPE_BYTES = 1024 * 1024  # as much as an unprivileged process may ask for (pipe(7))
_BUFFER_BYTES, _BUFFERS = _LARGE_PIPE_BYTES, 4  # what is in a pipe is taken at once
# For how long a job is left alone each time that its output has been taken: see _rest_ms.
_TINY_BYTES = 4096
_TINY_REST_MS, _REST_MS = 4, 1
_HURRY_S, _HURRIES_S = 0.002, 0.02  # how long followers rest: for each of them, and at most
_HEAD_START_S = 0.002  # of a job, before the next one's place is prepared


class Status(Enum):
    """RUNNING becomes one of the others, once, when the output is complete."""

    RUNNING = "running"
    STOPPED = "stopped"  # our stop is what ended it
    FINISHED = "finished"  # it ended by itself, or somebody else ended it


class EndReason(Enum):
    """Why a job is no longer running."""

    EXITED = "exited"
    SIGNALLED = "signalled"  # by a signal that was not our stop
    STOPPED_BY_OWNER = "stopped by its owner"
    STOPPED_BY_ADMIN = "stopped by an admin"
    OUT_OF_MEMORY = "out of memory"
    SERVER_SHUTDOWN = "server shut down"
    LOST = "lost"  # the spawner died: nobody knows how the leader ended


class UsageSource(Enum):
    """Where a job's usage comes from."""

    CGROUP = "cgroup"  # all of the job's processes
    RUSAGE = "rusage"  # its leader and the children that this waited for, once it has ended


@dataclass(frozen=True, slots=True)
class Job:
    """What is known of a job at one moment."""

    job_id: str
    owner: str
    command: str
    args: tuple[str, ...]
    status: Status
    end_reason: EndReason | None  # None while it runs
    exit_code: int | None  # None unless the leader exited
    signal: int | None  # None unless a signal killed the leader
    started_at: datetime  # aware, UTC
    ended_at: datetime | None  # when the leader's end was noticed
    output_bytes: int  # stored so far
    output_lost_bytes: int  # written after those, and not stored
    subscribers: tuple[str, ...]  # the names of those reading now, each once
    limits: Limits  # those in force; None where not
    usage: Usage | None  # None where nothing is known (yet)
    usage_source: UsageSource | None  # None when `usage` is


class JobThread(threading.Thread):
    """The thread of a job, which waits for it: beside the exec it took 0.2 ms to start one.

    Raises `ResourceError` if there is no room for it.
    """

    def __init__(self) -> None:
        # A daemon, lest a program that forgets to close its worker hang at its end.
        super().__init__(name="next-job", daemon=True)
        self._job: SimpleQueue[RunningJob | None] = SimpleQueue()
        try:
            self.start()
        except RuntimeError as error:
            raise ResourceError(f"no room for another thread: {error}") from error

    def run(self) -> None:
        job = self._job.get()
        if job is not None:
            job.run()

    def give(self, job: RunningJob) -> None:
        """See the job through. Does not block."""
        self.name = f"job-{job.job_id[:8]}"
        self._job.put(job)

    def discard(self) -> None:
        """End, for there is no job. Blocks until it has."""
        self._job.put(None)
        self.join()


class Work(NamedTuple):
    """What a job is to be; the arguments of `start`, checked."""

    argv: list[str]
    owner: str
    uid: int | None
    limits: Limits
    budget: Budget | None
    on_end: Callable[[], None] | None


class Buffers:
    """What output is in on its way from a job's pipe to its file.

    A few for all jobs: one for each would be a gigabyte, and most jobs are silent.
    """

    def __init__(self) -> None:
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(_BUFFER_BYTES)))

    @contextlib.contextmanager
    def lent(self) -> Iterator[memoryview]:
        """Lend one within this context. Blocks until another job's output is in its file."""
        buffer = self._free.get()
        try:
            yield buffer
        finally:
            self._free.put(buffer)


class Descriptors(NamedTuple):
    """A job's descriptors, owned by its thread, which closes them when the job has ended."""

    output: int  # read end of the pipe that is the job's stdout and stderr
    exit: int  # read end of the pipe on which the spawner tells the end
    leader: int  # pidfd


class RunningJob:
    """A job and the thread that sees it through."""

    def __init__(  # noqa: PLR0913 -- what _launch has prepared
        self,
        job_id: str,
        work: Work,
        output: OutputLog,
        cgroup: Cgroup | None,
        spawner: Spawner,
        pid: int,
        fds: Descriptors,
        *,
        finish: Callable[[RunningJob, Job], None],
        trim: Callable[[], None],
        thread: JobThread,
        buffers: Buffers,
        started_at: datetime,
        prepare_place: Callable[[], None],
    ) -> None:
        self.job_id = job_id
        self.owner = work.owner
        self.output = output
        self.thread = thread
        self._argv = tuple(work.argv)
        self._on_end = work.on_end
        self._cgroup = cgroup
        self._limits = cgroup.limits if cgroup else NO_LIMITS
        self._spawner = spawner
        self._pid = pid
        self._fds = fds  # closed, and not to be used, once the job has ended
        self._finish = finish
        self._trim = trim
        self._buffers = buffers
        self._prepare_place = prepare_place
        self._started_at = started_at
        # Guards all below. Notified when the job has ended. Never held during I/O.
        self._ended = threading.Condition()
        self._stop_reason: EndReason | None = None  # set by the stop that found it alive
        self._status = Status.RUNNING
        self._end_reason: EndReason | None = None
        self._exit = Exit()
        self._ended_at: datetime | None = None
        self._usage: Usage | None = None  # the final one

    def snapshot(self, *, live_usage: bool = True) -> Job:
        # Read before the lock is taken, and of no account if there is a final one by then.
        live = self._cgroup.usage() if live_usage and self._cgroup and not self.ended() else None
        with self._ended:
            usage = self._usage or live
            source = UsageSource.CGROUP if self._cgroup else UsageSource.RUSAGE
            return Job(
                job_id=self.job_id,
                owner=self.owner,
                command=self._argv[0],
                args=self._argv[1:],
                status=self._status,
                end_reason=self._end_reason,
                exit_code=self._exit.exit_code,
                signal=self._exit.signal,
                started_at=self._started_at,
                ended_at=self._ended_at,
                output_bytes=self.output.size,
                output_lost_bytes=self.output.lost_bytes,
                subscribers=self.output.subscribers,
                limits=self._limits,
                usage=usage,
                usage_source=source if usage else None,
            )

    def ended(self) -> bool:
        with self._ended:
            return self._status is not Status.RUNNING

    def wait(self, timeout: float | None) -> bool:
        """Block until the job has ended; False after `timeout` seconds."""
        with self._ended:
            return self._ended.wait_for(lambda: self._status is not Status.RUNNING, timeout)

    def kill(self, reason: EndReason) -> None:
        """SIGKILL every process of the job. Does not wait."""
        with self._ended:
            if self._status is not Status.RUNNING:
                return
            # A leader that has ended already was not ended by us, whatever happens to
            # the rest of the job.
            if self._stop_reason is None and not _is_readable(self._fds.leader):
                self._stop_reason = reason
        self._kill_processes()

    def _kill_processes(self) -> None:
        kill_processes(self.job_id, self._cgroup, self._spawner)

    # --- what the job's thread runs --------------------------------------------------

    def run(self) -> None:
        """See the job through to its end."""
        leader_exit = None
        try:
            leader_exit = self._await_leader()
            ended_at = datetime.now(UTC)
            self._finish_processes(lost=leader_exit is None)
            usage = self._final_usage(leader_exit)
            with self._ended:
                self._usage = usage  # from now on nobody reads the cgroup, which goes
            # All that the job wrote, for none of it lives now. Not until end-of-file: a process
            # that is not of the job, or that escaped where there are no cgroups, may hold the
            # other end for ever.
            self._move_rest()
            if self._cgroup is not None:
                self._remove_cgroup(self._cgroup)
            self._end(leader_exit, ended_at)
        except Exception:
            # Not supposed to happen; but nobody may wait for this job for ever.
            logger.exception("job %s: lost", self.job_id)
            with contextlib.suppress(Exception):
                self._kill_processes()
            self._end(None, datetime.now(UTC))
        self._trim()

    def _await_leader(self) -> Exit | None:
        """Move output until the leader has ended. None when the spawner died."""
        output, leader = self._fds.output, self._fds.exit
        pipe_bytes = fcntl.fcntl(output, fcntl.F_GETPIPE_SZ)
        end = select.poll()
        end.register(leader, select.POLLIN)
        poll = select.poll()
        poll.register(leader, select.POLLIN)
        poll.register(output, select.POLLIN)
        # Not at once: whoever has started this job is being told, and it begins.
        prepare_at: float | None = time.monotonic() + _HEAD_START_S
        taken_at, taken = time.monotonic(), 0
        hurries_until: float | None = None
        while True:
            due = [at for at in (prepare_at, hurries_until) if at is not None]
            left_s = max(0.0, min(due) - time.monotonic()) if due else None
            events = dict(poll.poll(left_s and left_s * 1000))
            now = time.monotonic()
            readable = events.get(output, 0) & select.POLLIN
            size = self._move_output() if readable else 0
            if prepare_at is not None and (leader in events or now >= prepare_at):
                prepare_at = None
                self._prepare_place()
            rest_ms = _rest_ms(size, taken, now - taken_at, pipe_bytes)
            if readable and not rest_ms:
                # It waits for us, and so for what its followers take of the machine. The more
                # they are the longer they rest, and the fewer times are they woken for it.
                hurries_until = now + min(_HURRY_S * self.output.subscriptions, _HURRIES_S)
            elif hurries_until is not None and now >= hurries_until:
                hurries_until = None
            self.output.hurry(on=hurries_until is not None and leader not in events)
            if leader in events:
                return read_exit(leader)
            if readable:
                if rest_ms:
                    end.poll(rest_ms)
                elif pipe_bytes < _LARGE_PIPE_BYTES:
                    # Now, and not at the start: all pipes of a user have only so much memory
                    # in all, and who goes beyond it gets pipes of 8 KiB (pipe(7)).
                    with contextlib.suppress(OSError):  # beyond it
                        pipe_bytes = fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, _LARGE_PIPE_BYTES)
                taken_at, taken = now, size
            elif output in events:
                poll.unregister(output)  # the job closed its output, and runs on

    def _move_output(self, most: int | None = None) -> int:
        """Store what is in the job's pipe, a buffer of it or `most`; return how many bytes.

        That is 0 if there are none: now, or any more.
        """
        with self._buffers.lent() as buffer, contextlib.suppress(BlockingIOError):
            size = os.readv(self._fds.output, [buffer[:most]])
            if size:
                self.output.append(buffer[:size])
            return size
        return 0

    def _move_rest(self) -> None:
        """Store what is in the job's pipe now, of which nobody writes more."""
        answer = fcntl.ioctl(self._fds.output, termios.FIONREAD, bytes(4))
        left = int.from_bytes(answer, sys.byteorder)
        while left and (size := self._move_output(left)):
            left -= size

    def _finish_processes(self, *, lost: bool) -> None:
        """Kill what the leader left behind and block until it is gone."""
        if self._cgroup is not None:
            self._cgroup.kill()
            self._cgroup.wait_empty()
        elif lost:
            # No parent is left to do it. The number is the leader's while that lives.
            if not _is_readable(self._fds.leader):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._pid, signal.SIGKILL)
            _is_readable(self._fds.leader, timeout=None)
        if not lost:
            read_exit(self._fds.exit)  # end-of-file: the process group is gone

    def _final_usage(self, leader_exit: Exit | None) -> Usage | None:
        if self._cgroup is not None:
            return replace(self._cgroup.usage(), memory_bytes=None, pids=None)
        if leader_exit is not None:
            return Usage(
                cpu_user_s=leader_exit.cpu_user_s,
                cpu_system_s=leader_exit.cpu_system_s,
                memory_peak_bytes=leader_exit.max_rss_bytes,
            )
        return None

    def _remove_cgroup(self, cgroup: Cgroup) -> None:
        try:
            cgroup.remove()
        except CgroupError as error:
            logger.error("job %s: its cgroup stays until the next start: %s", self.job_id, error)

    def _end(self, leader_exit: Exit | None, ended_at: datetime) -> None:
        """Make the one transition, out of RUNNING."""
        killed = leader_exit is not None and leader_exit.signal == signal.SIGKILL
        # Before anybody is told: who then starts the next job must find room for it.
        if self._on_end is not None:
            self._on_end()
            self._on_end = None
        with self._ended:
            if self._status is not Status.RUNNING:
                raise RuntimeError(f"job {self.job_id} has ended already")
            # The kernel's word, and not an exit code of 137, which anything can have.
            out_of_memory = self._usage is not None and bool(self._usage.oom_kills)
            if leader_exit is None:
                status, reason = Status.FINISHED, EndReason.LOST
            elif killed and self._stop_reason is not None:
                status, reason = Status.STOPPED, self._stop_reason
            elif killed and out_of_memory:
                status, reason = Status.FINISHED, EndReason.OUT_OF_MEMORY
            elif leader_exit.signal is not None:
                status, reason = Status.FINISHED, EndReason.SIGNALLED
            else:
                status, reason = Status.FINISHED, EndReason.EXITED
            self._status, self._end_reason = status, reason
            self._exit = leader_exit or Exit()
            self._ended_at = ended_at
            for fd in self._fds:
                os.close(fd)
            # In here, so that nobody sees the one without the other: a job that has
            # ended has all its output, and where the output ends the job has ended. Who
            # learns of either can remove it.
            self._finish(self, self.snapshot(live_usage=False))
            self.output.complete()
            self._ended.notify_all()


def _rest_ms(size: int, before: int, time_s: float, pipe_bytes: int) -> int:
    """For how long to leave a job alone that wrote `size` in the last `time_s`.

    So that what it writes meanwhile is taken, stored and sent as one: the fewer messages, the
    more is left of the machine for the job. But not if its pipe might be full by then, for it
    would have to wait. `before`: what was taken when that time began, so that the job may have
    spent most of it waiting for room.
    """
    rest_ms = _TINY_REST_MS if size < _TINY_BYTES else _REST_MS
    expected = size * rest_ms / 1000 / max(time_s, 1e-6)
    return rest_ms if max(before, size, expected) <= pipe_bytes / 2 else 0


def kill_processes(job_id: str, cgroup: Cgroup | None, spawner: Spawner) -> None:
    """SIGKILL every process of a job, or of what is to be one. Raises `CgroupError`."""
    if cgroup is not None:
        cgroup.kill()
    else:
        with contextlib.suppress(SpawnerDiedError):  # whoever waits for the end sees to that
            spawner.kill(job_id)


def _is_readable(pidfd: int, timeout: float | None = 0) -> bool:
    """Whether the process has ended; block for that up to `timeout` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))
