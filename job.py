"""One job that runs: its thread and output, its signals, stop and timeout, and why it ended.

Each running job has a thread of its own. The thread moves the output from the job's pipe to
its output log until the leader has ended. If the leader ended by itself, the thread lets other
processes go on that hold the output (`ending.py`). Then it kills what the leader left behind,
moves the rest of the output and makes the one transition out of RUNNING. Nothing else ends a job.
`jobstate.py` has what is known of a job.

    job = RunningJob(work, spare.body, cgroup, ...)
    spare.body.thread.give(job.job_id, job.run)
    job.kill(EndReason.STOPPED)
    job.wait(10)
    job.snapshot()

Thread safety: every public method may be called from any thread, `run` only by the job's own.
Lock order: a job's lock, then the registry's, then an output log's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from buffers import LARGE_PIPE_BYTES, Pace
from cgroups import CgroupError
from ending import await_others
from errors import InputError, SignalError, WorkerClosedError
from jobstate import STOPS, EndReason, Job, Status, UsageSource
from keeping import LeftError
from limits import NO_LIMITS, Usage
from outputerrors import NoSpliceError
from sources import bytes_in
from spawner import Exit, SpawnerDiedError, read_exit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from buffers import Buffers
    from cgroups import Cgroup
    from jobinput import InputWriter, JobInput
    from jobstate import Work
    from jobtable import Row
    from keeping import Keeper
    from spares import Body
    from spawner import Spawner

__all__ = ["RunningJob"]

logger = logging.getLogger(__name__)

_DAY_S = 24 * 3600
_NOTED_CHARACTERS = 256  # of the reason of a stop, in the note for a successor


class Registrar(Protocol):
    """Who is told of a job's end: the registry. Called by the job's thread."""

    def record(self, job: RunningJob, final: Job) -> Row | None:
        """Write the end to the store, before anybody can learn of it. May block.

        Returns the row; None if it cannot be read.
        """

    def is_recorded(self, job: RunningJob) -> bool:
        """Whether the end is in the store: its disk may be full."""

    def finish(self, job: RunningJob, final: Job, row: Row | None) -> None:
        """Keep `row` from now on: the moment of the transition, under the job's lock."""

    def discard(self, job: RunningJob) -> None:
        """Forget the job instead, whose command never began."""

    def trim(self) -> None:
        """Do what may take long after an end: the last thing that the thread does."""


class RunningJob:
    """A job whose command is executing.

    Attributes: `job_id`, `owner`, `name`, `labels`, `started_at`, `output`, `thread`; `position` in
    the order of all starts, which the registry sets.

    `cgroup`: the spare's, with the job's limits. `pid`, `pidfd`: of the leader. `started_at`,
    `started_s`: the same moment, by the clock and by `time.monotonic`. `kept_tmp`: the path of the
    TMPDIR if it is kept, or "". `keeper`: keeps the job for another process. `notes`: of a stop
    that a former process has begun.
    """

    def __init__(  # noqa: PLR0913 -- what a start has prepared
        self,
        work: Work,
        body: Body,
        cgroup: Cgroup | None,
        *,
        spawner: Spawner,
        pid: int,
        pidfd: int,
        started_at: datetime,
        started_s: float,
        buffers: Buffers,
        kept_tmp: str,
        registry: Registrar,
        job_input: JobInput | None = None,
        keeper: Keeper | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.job_id = body.job_id
        self.owner, self.name, self.labels = work.owner, work.name, work.labels
        self.started_at = started_at
        self.output = body.output
        self.thread = body.thread
        self.position = 0
        self._input = job_input  # None: its stdin is /dev/null
        self._argv = tuple(work.argv)
        self._uid, self._on_end = work.uid, work.on_end
        self._directory = work.directory
        self._kept_tmp = kept_tmp
        self._ending = work.ending
        self._cgroup = cgroup
        self._limits = cgroup.limits if cgroup else NO_LIMITS
        self._spawner = spawner
        self._pid = pid
        # Only the job's thread uses the first two, and closes all three when the job has ended:
        # the last one under the lock, because `kill` uses it.
        self._output_fd = body.output_fd
        self._exit_fd = body.exit_fd
        self._pidfd = pidfd
        self._started_s = started_s
        self._buffers = buffers
        self._registry = registry
        self._keeper = keeper
        self._splices = keeper is not None  # until it turns out that the kernel cannot
        # Guards all below. Notified when the job has ended or is left. Never held during I/O.
        self._ended = threading.Condition()
        # Set by the first `kill` that found the leader alive.
        self._kill_reason: EndReason | None = None
        self._stop_reason = ""
        self._grace_until_s: float | None = None  # set by the first `terminate`, likewise
        self._status = Status.RUNNING
        self._end_reason: EndReason | None = None
        self._exit = Exit()
        self._ended_at: datetime | None = None
        self._usage: Usage | None = None  # the final one
        self._killed_after_exit = 0
        self._is_left = False
        self._was_being_stopped = bool(notes)
        if notes:
            self._continue_stop(**notes)

    def _continue_stop(
        self, kill_reason: str, stop_reason: str, grace_until_s: float | None
    ) -> None:
        """Take over a stop that a former main process has begun; see `_note_stop`."""
        self._kill_reason, self._stop_reason = EndReason(kill_reason), stop_reason
        self._grace_until_s = grace_until_s

    def snapshot(self, *, live_usage: bool = True) -> Job:
        """Return what is known now; `live_usage`: read the usage of a job that still runs."""
        # Read outside the lock because it does I/O. Ignored if the final usage was recorded
        # meanwhile.
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
                stop_reason=self._stop_reason if self._end_reason is EndReason.STOPPED else "",
                exit_code=self._exit.exit_code,
                signal=self._exit.signal,
                started_at=self.started_at,
                ended_at=self._ended_at,
                output_bytes=self.output.size,
                output_lost_bytes=self.output.lost_bytes,
                output_gap=self.output.gap,
                subscribers=self.output.subscribers,
                limits=self._limits,
                usage=usage,
                usage_source=source if usage else None,
                may_have_escaped=self._exit.may_have_escaped,
                working_directory=self._directory,
                tmp_directory=self._kept_tmp,
                name=self.name,
                labels=self.labels,
                input_bytes=self._input.size if self._input else None,
                input_ended=self._input is not None and self._input.is_over,
                killed_after_exit=self._killed_after_exit,
                timeout=self._ending.timeout,
            )

    def ended(self) -> bool:
        """Whether the job is over: neither QUEUED nor RUNNING."""
        with self._ended:
            return self._status.is_over

    def wait(self, timeout: float | None) -> bool:
        """Block until the job has ended; False after `timeout` seconds.

        Raises `WorkerClosedError` if the job is left to another process.
        """
        with self._ended:
            self._ended.wait_for(lambda: self._status.is_over or self._is_left, timeout)
            if self._is_left:
                raise WorkerClosedError
            return self._status.is_over

    def kill(self, reason: EndReason, stop_reason: str = "") -> None:
        """SIGKILL every process of the job. Does not wait."""
        with self._ended:
            if self._status.is_over or self._is_left:
                return
            # If the leader has ended before, the job ended by itself, even if this kill ends
            # other processes of the job.
            if self._kill_reason is None and not _is_readable(self._pidfd):
                self._kill_reason, self._stop_reason = reason, stop_reason
        self._note_stop()
        self._kill_processes()

    def terminate(self, reason: EndReason, stop_reason: str, grace_s: float) -> bool:
        """SIGTERM every process of the job, which may go on for `grace_s`. Does not wait.

        Whoever calls this must call `kill` after the grace. Returns False if no signal was sent.
        """
        with self._ended:
            if self._status.is_over or self._is_left:
                return False
            if self._kill_reason is None and not _is_readable(self._pidfd):
                self._kill_reason, self._stop_reason = reason, stop_reason
                self._grace_until_s = time.monotonic() + grace_s
        self._note_stop()
        with contextlib.suppress(OSError, SpawnerDiedError):  # `kill` is what is left to do
            if self._cgroup is not None:
                with contextlib.suppress(PermissionError):
                    self._cgroup.terminate()
                    return True
            self._spawner.terminate(self.job_id, uid=self._uid)
            return True
        return False

    def signal(self, number: int, *, everything: bool) -> None:
        """Send a signal to the leader, or to every process. Raises as `Worker.signal` does."""
        try:
            with self._ended:
                if self._is_left:
                    raise WorkerClosedError
                if self._status.is_over:
                    raise SignalError(self.job_id, "it has ended")
                if not everything and _is_readable(self._pidfd):
                    raise SignalError(self.job_id, "its command has ended")
                if not everything:
                    # EPERM: the leader runs as another user. The fork server has the right.
                    with contextlib.suppress(PermissionError):
                        signal.pidfd_send_signal(self._pidfd, number)
                        return
            if everything and self._cgroup is not None:
                with contextlib.suppress(PermissionError):
                    self._cgroup.signal(number)
                    return
            self._spawner.signal(self.job_id, number, uid=self._uid, everything=everything)
        except ProcessLookupError:  # perhaps since we have looked
            raise SignalError(self.job_id, "it has ended") from None
        except PermissionError as error:
            raise SignalError(self.job_id, "the kernel does not permit it") from error

    def open_input(self, offset: int | None) -> InputWriter:
        """Return a writer to the job's stdin. Raises as `Worker.open_input` does."""
        if self._input is None:
            raise InputError(self.job_id, "it was started without an input")
        return self._input.open(offset)

    def _note_stop(self) -> None:
        """Have a successor know of a stop before it begins."""
        if self._keeper is None:
            return
        with self._ended:
            if self._kill_reason is None:
                return
            notes = {
                "kill_reason": self._kill_reason.value,
                # A note is one message, and a character can have 12 bytes there.
                "stop_reason": self._stop_reason[:_NOTED_CHARACTERS],
                "grace_until_s": self._grace_until_s,
            }
        self._spawner.note(self.job_id, notes)

    def _kill_processes(self) -> None:
        if self._cgroup is not None:
            # Without the right to do it, the fork server does: as the job's user.
            if not self._cgroup.kill():
                with contextlib.suppress(OSError, SpawnerDiedError):
                    self._spawner.signal(
                        self.job_id, signal.SIGKILL, uid=self._uid, everything=True
                    )
        else:
            with contextlib.suppress(SpawnerDiedError):  # this job's thread notices it, too
                self._spawner.kill(self.job_id)

    # --- what the job's thread runs --------------------------------------------------

    def run(self) -> None:
        """Look after the job until it has ended."""
        leader_exit = None
        try:
            leader_exit = self._await_leader()
            ended_at = self._time_of(leader_exit)
            self._await_others(leader_exit)
            leader_exit = self._finish_processes(leader_exit)
            usage = self._final_usage(leader_exit)
            with self._ended:
                self._usage = usage  # from now on nobody reads the cgroup, which is removed below
            # All that the job wrote is in the pipe, because no process of the job lives. Not
            # until end-of-file: a process outside the job, or one that escaped where there are
            # no cgroups, may keep the other end open for ever.
            self._move_rest()
            if self._cgroup is not None:
                self._remove_cgroup(self._cgroup)
            self._end(leader_exit, ended_at)
        except LeftError:
            self._leave()
            return
        except Exception:
            # Not expected. But those who wait for this job must not wait for ever. The job is not
            # lost if its leader's end is known.
            logger.exception("job %s: could not be ended as it should", self.job_id)
            with contextlib.suppress(Exception):
                self._kill_processes()
            self._end(leader_exit, self._time_of(None))
        if self._keeper is not None and self._registry.is_recorded(self):
            self._spawner.forget(self.job_id)
        self._registry.trim()

    def _time_of(self, leader_exit: Exit | None) -> datetime:
        """Return the time of an end, or the present one if the end does not say.

        That is the time of the start and a duration, so no step of the clock counts.
        """
        end_s = (leader_exit and leader_exit.ended_s) or time.monotonic()
        # `_started_s` of a job that a former process has left may be by the clock, and too late.
        return self.started_at + timedelta(seconds=max(0.0, end_s - self._started_s))

    def _await_leader(self) -> Exit | None:
        """Move output until the leader has ended. None if the fork server died."""
        output, leader = self._output_fd, self._exit_fd
        pace = Pace(output)
        end = select.poll()
        end.register(leader, select.POLLIN)
        either = select.poll()
        either.register(leader, select.POLLIN)
        either.register(output, select.POLLIN)
        leave = self._keeper.leave_fd if self._keeper else leader
        either.register(leave, select.POLLIN)
        alarm_s = self._first_alarm()
        while True:
            events = dict(either.poll(None if alarm_s is None else _milliseconds_to(alarm_s)))
            now = time.monotonic()
            if leave in events and leave != leader:
                raise LeftError
            if alarm_s is not None and now >= alarm_s:
                alarm_s = self._time_out()
            is_readable = events.get(output, 0) & select.POLLIN
            size = self._move_output() if is_readable else 0
            if leader in events:
                return read_exit(leader)
            if is_readable:
                if pause_ms := pace.after(size, now):
                    end.poll(pause_ms)
            elif output in events:
                either.unregister(output)  # the job closed its output, and runs on

    def _first_alarm(self) -> float | None:
        """Return when `_time_out` is to be called, by `time.monotonic`; None for never."""
        if self._was_being_stopped:  # by a caller that is gone
            return self._grace_until_s or time.monotonic()
        timeout = self._ending.timeout
        return None if timeout is None else self._started_s + timeout

    def _time_out(self) -> float | None:
        """Stop the job, which has run for too long, unless somebody else stops it.

        Returns when this is to be called again, by `time.monotonic`; None for never.
        """
        with self._ended:
            is_first = self._kill_reason is None
            is_mine = is_first or self._was_being_stopped
            is_mine = is_mine or self._kill_reason is EndReason.TIMED_OUT
        grace = self._ending.grace
        if is_first and grace and self.terminate(EndReason.TIMED_OUT, "", grace):
            return time.monotonic() + grace
        if is_mine:
            self.kill(EndReason.TIMED_OUT)
        return None

    def _await_others(self, leader_exit: Exit | None) -> None:
        """Let other processes of the job go on for a while after the leader's end."""
        with self._ended:
            is_stopped, until_s = self._kill_reason is not None, self._grace_until_s
        if leader_exit is None or (self._cgroup is None and leader_exit.is_final):
            return  # the fork server has died, or has found no others
        if not is_stopped:
            if not self._ending.linger:
                return
            until_s = (leader_exit.ended_s or time.monotonic()) + self._ending.linger
        if until_s is not None:
            await_others(
                self._output_fd,
                self._exit_fd,
                self._cgroup,
                until_s,
                move=self._move_output,
                holders_only=not is_stopped,
                leave_fd=self._keeper.leave_fd if self._keeper else None,
            )
        if self._keeper is not None and self._keeper.is_left:
            raise LeftError

    def _move_output(self, most: int | None = None) -> int:
        """Store what is in the job's pipe, at most a buffer of it or `most` bytes.

        Returns how many bytes were stored; 0 if the pipe is empty or at its end.
        """
        if self._splices:
            try:
                return self.output.move(self._output_fd, most or LARGE_PIPE_BYTES)
            except NoSpliceError as error:
                self._splices = False
                logger.warning(
                    "job %s: the kernel does not splice its output (%s): if this process is "
                    "killed, up to 1 MiB of output is lost",
                    *(self.job_id, error.__cause__),
                )
        with self._buffers.lent() as buffer, contextlib.suppress(BlockingIOError):
            size = os.readv(self._output_fd, [buffer[:most]])
            if size:
                self.output.append(buffer[:size])
            return size
        return 0

    def _move_rest(self) -> None:
        """Store what is in the job's pipe now; no process of the job can write more."""
        left = bytes_in(self._output_fd)
        while left and (size := self._move_output(left)):
            left -= size

    def _finish_processes(self, leader_exit: Exit | None) -> Exit | None:
        """Kill what the leader left behind, block until it is gone; return the leader's end."""
        killed = 0
        if self._cgroup is not None:
            killed = self._cgroup.kill_rest(self._kill_processes)
        elif leader_exit is None:
            # The fork server, which would do it, is dead. The number of the process group
            # cannot be a stranger's as long as the leader lives.
            if not _is_readable(self._pidfd):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._pid, signal.SIGKILL)
            _is_readable(self._pidfd, timeout=None)
        elif not leader_exit.is_final:
            with contextlib.suppress(SpawnerDiedError):
                self._spawner.kill(self.job_id)
        if leader_exit is None:
            return None
        while (more := read_exit(self._exit_fd)) is not None:  # then the process group is gone
            leader_exit = more
        if not leader_exit.is_final:  # the fork server has died
            leader_exit = leader_exit._replace(may_have_escaped=True)
        with self._ended:
            if self._kill_reason is None:
                self._killed_after_exit = killed + leader_exit.killed
        return leader_exit

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
            logger.error("job %s: its cgroup stays until the next worker: %s", self.job_id, error)

    def _end(self, leader_exit: Exit | None, ended_at: datetime) -> None:
        """Make the one transition, out of RUNNING."""
        # Before the end is known to anybody: whoever learns of it may start the next job, and
        # must then not meet a ceiling that this job still fills.
        if self._on_end is not None:
            self._on_end()
            self._on_end = None
        self._close_output()
        if self._input is not None:
            self._input.finish()
        # The former main process may have died in the middle of the start.
        was_job = leader_exit is None or leader_exit.was_executed
        final = self._final(leader_exit, ended_at)
        row = self._registry.record(self, final) if was_job else None
        with self._ended:
            self._end_reason, self._status = final.end_reason, final.status
            self._exit = leader_exit or Exit(may_have_escaped=self._cgroup is None)
            self._ended_at = ended_at
            os.close(self._exit_fd)
            os.close(self._pidfd)
            # Under the lock, so that nobody sees one without the other: a job that has ended
            # has all its output, and where the output ends the job has ended.
            try:
                if was_job:
                    self._registry.finish(self, final, row)
                else:
                    self._registry.discard(self)
            finally:  # whatever fails, nobody waits for ever
                self.output.complete()
                self._ended.notify_all()

    def _final(self, leader_exit: Exit | None, ended_at: datetime) -> Job:
        """Return the final state. It does not change any more, because the leader has ended."""
        with self._ended:
            if self._status.is_over:
                raise RuntimeError(f"job {self.job_id} has ended already")
            reason = self._find_end_reason_locked(leader_exit)
            stop_reason = self._stop_reason if reason is EndReason.STOPPED else ""
        ended = leader_exit or Exit(may_have_escaped=self._cgroup is None)
        return replace(
            self.snapshot(live_usage=False),
            status=Status.STOPPED if reason in STOPS else Status.FINISHED,
            end_reason=reason,
            stop_reason=stop_reason,
            exit_code=ended.exit_code,
            signal=ended.signal,
            may_have_escaped=ended.may_have_escaped,
            ended_at=ended_at,
            subscribers=(),
        )

    def _leave(self) -> None:
        """Leave the job to another process."""
        self._close_output()
        self.output.leave()
        if self._input is not None:
            self._input.leave()
        with self._ended:
            self._is_left = True
            os.close(self._exit_fd)
            os.close(self._pidfd)
            self._ended.notify_all()

    def _close_output(self) -> None:
        """Close the pipe, once. Not under the lock: another process may keep the pipe's lock."""
        fd, self._output_fd = self._output_fd, -1
        if fd >= 0:
            os.close(fd)

    def _find_end_reason_locked(self, leader_exit: Exit | None) -> EndReason:
        if leader_exit is None:
            return EndReason.LOST
        if leader_exit.was_killed:
            return EndReason.CLOSED
        if self._grace_until_s is not None and self._kill_reason is not None:
            return self._kill_reason  # even if the leader handled SIGTERM and exited by itself
        if leader_exit.signal is None:
            return EndReason.EXITED
        if leader_exit.signal == signal.SIGKILL:
            if self._kill_reason is not None:
                return self._kill_reason
            # The kernel's own count. An exit code of 137 proves nothing.
            if self._usage is not None and self._usage.oom_kills:
                own = self._usage.memory_limit_hits
                return EndReason.OUT_OF_MEMORY if own else EndReason.HOST_OUT_OF_MEMORY
        return EndReason.SIGNALLED


def _milliseconds_to(moment_s: float) -> float:
    """Return the time until then, at most a day: the timeout of poll(2) is an int."""
    return min(max(0.0, moment_s - time.monotonic()), _DAY_S) * 1000


def _is_readable(pidfd: int, timeout: float | None = 0) -> bool:
    """Whether the process has ended; block for that up to `timeout` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))
