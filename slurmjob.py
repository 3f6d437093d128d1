"""A job that srun runs on a node of a cluster (`SlurmJob`).

Its leader, seen from here, is srun; `jobstep.py` runs on the node and starts the command. Each job
has a thread of its own, like a job of this machine. The thread moves the output, reads what the
step reports, and passes on the input. The job has ended when srun is gone and as many bytes of
output are here as the step has written. If there are fewer, it is LOST: the exit code of srun is
never trusted.

    job = SlurmJob(work, spare.body, channel=channel, cluster=cluster, ...)
    spare.body.thread.give(job.job_id, job.run)
    job.await_begin()              # until the command runs, waits in the queue, or cannot run

Thread safety: see `RunningJob`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from buffers import Pace
from errors import (
    DirectoryError,
    ResourceError,
    SignalError,
    WorkerClosedError,
    exec_error,
    in_words,
)
from job import RunningJob
from jobstate import EndReason, Job, Status, UsageSource
from keeping import LeftError
from slurmreports import (
    MAX_WORD_CHARACTERS,
    Lines,
    checked_end,
    checked_limits,
    end_reason,
    event_of,
    is_errno,
    is_news,
    is_word,
    queued_number,
)
from spawner import Exit, SpawnerDiedError, read_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jobstate import Work
    from slurm import Cluster
    from slurmchannel import Channel
    from slurminput import StepInput
    from spares import Body

__all__ = ["SlurmJob"]

logger = logging.getLogger(__name__)

_DAY_S = 24 * 3600
_BEGIN_S = 10.0  # how long a start waits for word from the cluster
_TERM_AFTER_S = 2.0  # from SIGUSR1, which the step obeys, to SIGTERM, which srun obeys
_KILL_AFTER_S = 5.0  # from there to SIGKILL
_SRUN_S = 1.0  # how long srun's end is awaited when the step has told that of the job
_LAST_WORDS = 20
_MAX_LOGGED_LINES = 100


class SlurmJob(RunningJob):
    """A job on a cluster, waiting, running or just ended.

    `publish`: is called by the job's thread when the command runs, or waits in the queue; from
    then on others may know the job. `changed`: when it then begins to run. `step_input`: passes its
    input on, if it has one. `is_resumed`: a former main process has started it, and others know it.
    `notes`: also that process's note of when a job that waited began to run. The other arguments
    are those of a `RunningJob`, whose `pid` and `pidfd` are those of srun here.
    """

    def __init__(  # noqa: PLR0913 -- what a start has prepared
        self,
        work: Work,
        body: Body,
        *,
        channel: Channel,
        step_input: StepInput | None,
        cluster: Cluster,
        search_path: str,
        publish: Callable[[SlurmJob], None],
        changed: Callable[[SlurmJob], None],
        is_resumed: bool = False,
        notes: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        noted = dict(notes or {})
        # When the job began to run after it had waited, by the clock and by time.monotonic; None if
        # it did not wait, or if that was not noted.
        self._noted_begin: list[float] | None = noted.pop("begin", None)
        super().__init__(work, body, None, notes=noted, **more)
        self._no_queue = work.no_queue
        self._channel = channel
        self._step_input = step_input
        self._is_resumed = is_resumed
        self._cluster = cluster
        self._search_path = search_path
        self._publish = publish
        self._changed = changed
        # Guarded by the lock of the base class from the thread's start on; -1: closed.
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Only the job's thread uses these.
        self._leave_fd = self._keeper.leave_fd if self._keeper else -1
        self._is_replaying = False  # reports that a former main process has read
        self._lines = Lines()  # of the reports
        self._words: list[str] = []  # what Slurm said
        self._logged_lines = 0  # how many of these were logged
        self._end_event: dict[str, Any] | None = None
        self._told_at: datetime | None = None  # when the step told the end
        self._has_waited = False  # in the queue
        self._has_failed = False  # the step has told that it cannot execute the command
        self._last_state = ""  # the controller's word
        self._has_output = self._has_reports = True  # there may be more
        self._pace = Pace(self._output_fd)
        # By time.monotonic.
        self._alarm_s: float | None = None  # when the next thing is tried to end the job
        self._gone_by_s: float | None = None  # when srun must be gone
        self._over_by_s: float | None = None  # how long to wait for srun after the job's own end
        self._times_out_s: float | None = None  # when the job has run for too long
        self._begin_by_s = math.inf  # when the cluster must have answered
        # Guarded by the lock of the base class.
        self._status = Status.QUEUED
        self._is_begun = is_resumed  # whether others may know the job
        self._is_told = is_resumed  # whether `publish` has returned, so that `await_begin` can
        self._failure: BaseException | None = None  # why it cannot run, before anybody knows it
        self._number = self._node = self._reason = ""  # Slurm's
        self._kill_step = 0  # of `_escalate`
        if is_resumed:
            self._replay()
            if self._was_being_stopped:
                self._times_out_s = self._first_alarm()

    def await_begin(self) -> None:
        """Block until the command runs or waits in the queue.

        Raises what keeps the job from running; its thread has ended or is about to, and has
        released nothing.
        """
        with self._ended:
            self._ended.wait_for(lambda: self._is_told or self._failure)
            if self._failure is not None:
                raise self._failure

    def snapshot(self, *, live_usage: bool = True) -> Job:
        """Return what is known now; `live_usage`: also ask the cluster why the job waits."""
        with self._ended:
            number = self._number if self._status is Status.QUEUED else ""
        reason = self._cluster.reason(number) if live_usage and number else ""
        with self._ended:
            job = super().snapshot(live_usage=False)
            if reason and self._status is Status.QUEUED:
                self._reason = reason
            source = UsageSource.CGROUP if job.usage else None
            return replace(job, node=self._node, reason=self._reason, usage_source=source)

    # --- ending it ------------------------------------------------------------------------

    def kill(self, reason: EndReason, stop_reason: str = "") -> None:
        """End every process of the job. Does not wait."""
        with self._ended:
            if self._status.is_over or self._is_left:
                return
            if self._kill_reason is None and self._end_event is None:
                self._kill_reason, self._stop_reason = reason, stop_reason
        self._note_stop()
        self._escalate(is_first=True)

    def _escalate(self, *, is_first: bool = False) -> None:
        """Do the next thing that can end the job, and set the alarm for the one after."""
        with self._ended:
            if is_first and self._kill_step:
                return
            if self._status is Status.QUEUED and self._kill_step == 0:
                self._kill_step = 1  # srun has no step that could obey SIGUSR1
            step = self._kill_step
            self._kill_step += 1
            pause_s = (_TERM_AFTER_S, _KILL_AFTER_S, None)[min(step, 2)]
            self._alarm_s = None if pause_s is None else time.monotonic() + pause_s
        with contextlib.suppress(OSError, SpawnerDiedError):
            if step < 2:  # noqa: PLR2004
                number = (signal.SIGUSR1, signal.SIGTERM)[step]
                self._spawner.signal(self.job_id, number, uid=self._uid, everything=False)
            else:
                # The job may live on, and the next sweep ends it.
                self._spawner.kill(self.job_id)
        with self._ended:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def terminate(self, reason: EndReason, stop_reason: str, grace_s: float) -> bool:
        """SIGTERM every process of the job. Returns False if it has none, or has ended."""
        with self._ended:
            if self._status is not Status.RUNNING or self._end_event is not None or self._is_left:
                return False
            if self._kill_reason is None:
                self._kill_reason, self._stop_reason = reason, stop_reason
                self._grace_until_s = time.monotonic() + grace_s
        self._note_stop()
        return self._channel.send(b"T")

    def signal(self, number: int, *, everything: bool) -> None:
        """Send a signal to the leader, or to every process. Raises as `Worker.signal` does."""
        with self._ended:
            if self._is_left:
                raise WorkerClosedError
            if self._status is Status.QUEUED:
                raise SignalError(self.job_id, "it waits in the queue of the cluster")
            if self._status.is_over or self._end_event is not None:
                raise SignalError(self.job_id, "it has ended")
        if not self._channel.send(b"S", bytes([number, everything])):
            raise SignalError(self.job_id, "its node does not answer")

    # --- what the job's thread runs --------------------------------------------------------

    def run(self) -> None:
        """Look after the job until it has ended, or cannot run."""
        leader_exit = None
        try:
            leader_exit = self._attend()
            self._move_rest()
            if not self._is_begun and self._note_failure(leader_exit):
                return
            ended_at = self._end_time(leader_exit)
            self._note_end()
            self._end(self._true_exit(leader_exit), ended_at)
        except LeftError:
            self._leave()
            self.close_channel()
            return
        except Exception as error:
            logger.exception("job %s: could not be ended as it should", self.job_id)
            with contextlib.suppress(Exception):
                self._spawner.kill(self.job_id)
            with self._ended:
                if not self._is_begun:
                    self._failure = ResourceError(
                        f"the job could not be started: {in_words(error)}"
                    )
                    self._ended.notify_all()
                    return
            self._end(None, self._time_of(None))
        self.close_channel()
        if self._keeper is not None and self._registry.is_recorded(self):
            self._spawner.forget(self.job_id)
        self._registry.trim()

    def close_channel(self) -> None:
        """Close what only a `SlurmJob` has. Call it once, when the job has ended or cannot run."""
        self._channel.close()
        if self._step_input is not None:
            self._step_input.close()
        with self._ended:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
            self._wake_fd = -1

    def _attend(self) -> Exit | None:
        """Serve the job until srun has gone, or has nothing more to say.

        Returns None if the fork server died.
        """
        self._begin_by_s = self._started_s + _BEGIN_S * (2 if self._no_queue else 1)
        end: Exit | None = None
        is_gone = False
        while not is_gone:
            ready = self._await_something()
            self._serve(ready)
            if self._exit_fd in ready:
                end = read_exit(self._exit_fd)
                is_gone = end is None or end.is_final
                self._gone_by_s = time.monotonic() + _KILL_AFTER_S  # for srun's second process
            elif self._over_by_s is not None and time.monotonic() >= self._over_by_s:
                self._over_by_s = None
                if self._has_all_output():
                    return Exit()  # srun waits for the controller, and has nothing more to say
        if end is None:
            self._outlive_fork_server()
        while self._has_reports and self._read_reports():
            pass
        return end

    def _serve(self, ready: dict[int, int]) -> None:
        """Do what descriptors and alarms ask for. Raises `LeftError`."""
        if self._leave_fd in ready:
            self._leave_or_end()
        now = time.monotonic()
        self._ring_alarms(now)
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if self._output_fd in ready:
            if size := self._move_output():
                self._pace.after(size, now)
            else:
                self._has_output = not ready[self._output_fd] & select.POLLHUP
        if self._channel.report_fd in ready:
            self._has_reports = self._read_reports()
        if self._step_input is not None and self._step_input.fd in ready:
            self._step_input.pass_on()

    def _await_something(self) -> dict[int, int]:
        """Block until a descriptor is ready or an alarm is due; return what poll(2) returns."""
        now = time.monotonic()
        is_resting = self._has_output and now < self._pace.rests_until_s
        fds = [self._exit_fd, self._wake_fd, self._leave_fd]
        if self._has_output and not is_resting:
            fds.append(self._output_fd)
        if self._has_reports:
            fds.append(self._channel.report_fd)
        if self._step_input is not None and self._status is Status.RUNNING:
            fds.append(self._step_input.fd)
        poll = select.poll()
        for fd in fds:
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        alarms = [self._alarm_s, self._gone_by_s, self._over_by_s, self._times_out_s]
        alarms.append(None if self._is_begun else self._begin_by_s)
        alarms.append(self._pace.rests_until_s if is_resting else None)
        due_s = min((each for each in alarms if each is not None), default=math.inf)
        left_s = min(max(0.0, due_s - now), _DAY_S)  # poll(2) takes an int
        return dict(poll.poll(left_s * 1000))

    def _leave_or_end(self) -> None:
        """Raise `LeftError`; but end a job that nobody knows yet, so that its start fails."""
        if self._is_begun:
            raise LeftError
        self._leave_fd = -1
        self.kill(EndReason.CLOSED)

    def _has_all_output(self) -> bool:
        """Whether as many bytes of output are here as the step says that it has written."""
        event = self._end_event
        return event is not None and self.output.size + self.output.lost_bytes >= event["bytes"]

    def _ring_alarms(self, now: float) -> None:
        if self._times_out_s is not None and now >= self._times_out_s:
            self._times_out_s = self._time_out()
        if not self._is_begun and now >= self._begin_by_s:
            self._begin_late()
            self._begin_by_s = math.inf
        if self._alarm_s is not None and now >= self._alarm_s:
            self._escalate()
        if self._gone_by_s is not None and now >= self._gone_by_s:
            self._gone_by_s = None
            self._spawner.kill(self.job_id)

    def _outlive_fork_server(self) -> None:
        """End srun, which the fork server has left behind: its job must not go on."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll(_KILL_AFTER_S * 1000)

    def _read_reports(self) -> bool:
        """Read what the step and Slurm say. False at the end, or if there is nothing now."""
        try:
            data = self._channel.read()
        except BlockingIOError:
            return False
        for line in self._lines.add(data):
            self._take(line)
        return bool(data)

    def _replay(self) -> None:
        """Take in again what a former main process has read."""
        self._is_replaying = True
        for number, part in enumerate(self._channel.former_reports()):
            if number:  # bytes may be missing before it
                part = part.partition(b"\n")[2]  # noqa: PLW2901
                self._lines = Lines()
            for line in self._lines.add(part):
                self._take(line)
        self._is_replaying = False

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        event = event_of(text)
        if event is not None:
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
                self._take_event(event)
                return
        if text.strip():
            if number := queued_number(text):
                with self._ended:
                    self._number = number
                    self._reason = "queued"
                if not self._no_queue:
                    self._has_waited = True
                    self._begin_if_new(is_running=False)
            elif is_news(text):
                text = text[:MAX_WORD_CHARACTERS]
                self._logged_lines += 1
                if self._logged_lines <= _MAX_LOGGED_LINES and not self._is_replaying:
                    logger.info("job %s: Slurm says: %s", self.job_id, text)
                self._words = [*self._words[1 - _LAST_WORDS :], text.removeprefix("srun: ")]

    def _take_event(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "started":
                enforced, number, node = checked_limits(event), event["id"], event["node"]
                if not (is_word(number) and is_word(node)):
                    raise ValueError("not the number of a job and the name of a node")
                with self._ended:
                    self._number, self._node = number, node
                    self._reason = ""
                    self._limits = enforced
                self._begin_if_new(is_running=True)
            case "ack":
                if self._step_input is not None and not self._is_replaying:
                    self._step_input.acknowledge(event)
            case "closed":
                self._lose_input()
            case "refused":
                missing = ", ".join(event["missing"])[:MAX_WORD_CHARACTERS]
                self._fail(
                    ResourceError(
                        f"the node does not enforce {missing}; the operator "
                        "can have Slurm and its Prolog enforce them, or accept weaker limits with "
                        "--limits auto"
                    )
                )
            case "failed":
                if not is_errno(event["errno"]):
                    raise ValueError("not an errno")
                self._fail(self._exec_failure(event["stage"], event["errno"]))
            case "end":
                event = checked_end(event)
                with self._ended:
                    self._end_event = event
                self._told_at = self._time_of(None)
                self._over_by_s = time.monotonic() + _SRUN_S

    def _exec_failure(self, stage: str, number: int) -> Exception:
        error = OSError(number, os.strerror(number))
        command = self._argv[0]
        if stage == "enter":
            return DirectoryError(command, self._directory, error.strerror or str(error))
        return exec_error(command, error, self._search_path, self._directory)

    def _fail(self, error: Exception) -> None:
        """Note why the job cannot run."""
        self._has_failed = True
        with self._ended:
            if not self._is_begun:
                self._failure = error
            self._reason = str(error)

    def _begin_if_new(self, *, is_running: bool) -> None:
        """Let others know the job, if they do not; and that it runs, if it does."""
        with self._ended:
            if self._failure is not None:
                return
            is_new, self._is_begun = not self._is_begun, True
            has_changed = is_running and self._status is Status.QUEUED
            if has_changed:
                self._status = Status.RUNNING
                if self._has_waited:
                    self.started_at, self._started_s = self._begin_time()
                if self._ending.timeout is not None:
                    self._times_out_s = self._started_s + self._ending.timeout
        if has_changed and self._has_waited:
            begin = [self.started_at.timestamp(), self._started_s]
            self._spawner.note(self.job_id, {"begin": begin})
        if is_new:
            self._publish(self)
        elif has_changed and not self._is_replaying:
            self._changed(self)
        with self._ended:
            self._is_told = True
            self._ended.notify_all()

    def _begin_time(self) -> tuple[datetime, float]:
        """Return when the job begins to run, or has begun: by the clock and time.monotonic."""
        if self._noted_begin is None:
            return datetime.now(UTC), time.monotonic()
        at, begin_s = self._noted_begin
        return datetime.fromtimestamp(at, UTC), begin_s

    def _begin_late(self) -> None:
        """Go on without word from the cluster: the job counts as queued, or is given up."""
        if self._no_queue:
            self._fail(ResourceError(f"the cluster has not answered for {2 * _BEGIN_S:g} s"))
            self._escalate(is_first=True)
            return
        self._has_waited = True
        with self._ended:
            self._reason = "the cluster has not answered yet"
        self._begin_if_new(is_running=False)

    def _note_failure(self, leader_exit: Exit | None) -> bool:
        """Tell `await_begin` why the job cannot run; False if others know the job by now."""
        with self._ended:
            if self._is_begun:
                return False
            if leader_exit is None:
                self._failure = SpawnerDiedError()
            elif self._kill_reason is not None:
                self._failure = WorkerClosedError()
            elif self._failure is None:
                words = "; ".join(self._words) or "srun ended and said nothing"
                self._failure = ResourceError(f"the cluster did not take the job: {words}")
            self._ended.notify_all()
            return True

    def _lose_input(self) -> None:
        """Let nobody write any more: the command has closed its stdin."""
        if self._step_input is not None:
            self._step_input.close()
        if self._input is not None:
            self._input.lose_reader()

    # --- the end ---------------------------------------------------------------------------

    def _note_end(self) -> None:
        """Keep what the step reported with the end."""
        event = self._end_event
        if event is None or event["is_cancelled"]:
            self._last_state = self._cluster.state(self._number)
        if event is None:
            return
        with self._ended:
            self._usage = event["usage"]
            self._killed_after_exit = event["killed"]

    def _end_time(self, leader_exit: Exit | None) -> datetime:
        """Return when the job ended: when the step told it, or earlier, when srun was gone.

        A former main process may have read what the step told.
        """
        told_at = self._told_at or self._time_of(None)
        has_time = leader_exit is not None and leader_exit.ended_s
        return min(told_at, self._time_of(leader_exit)) if has_time else told_at

    def _true_exit(self, leader_exit: Exit | None) -> Exit | None:
        """Return how the command ended, by the step's word and not srun's; None: nobody knows."""
        if leader_exit is None and self._end_event is None:
            return None
        event = self._end_event or {"exit_code": None, "signal": None}
        # A start that failed after its main process had died: nobody was told of such a job.
        never_was = self._is_resumed and self._status is Status.QUEUED and not self._has_waited
        return Exit(
            event["exit_code"],
            event["signal"],
            was_executed=not (never_was and (self._has_failed or self._words)),
            was_killed=leader_exit is not None and leader_exit.was_killed,
        )

    def _find_end_reason_locked(self, leader_exit: Exit | None) -> EndReason:
        event = self._end_event
        if leader_exit is not None and leader_exit.was_killed:
            return EndReason.CLOSED
        if event is None:
            return self._unreported_end_locked(leader_exit)
        if not self._has_all_output():
            self._reason = f"only a part of {event['bytes']} bytes of output has arrived"
            return EndReason.LOST
        if self._kill_reason is not None and (event["is_killed"] or event["is_terminated"]):
            return self._kill_reason
        if event["is_cancelled"] and (by_slurm := self._slurms_word()) is not None:
            return by_slurm
        if event["signal"] is None:
            return EndReason.EXITED
        if event["signal"] == signal.SIGKILL and self._usage and self._usage.oom_kills:
            return EndReason.OUT_OF_MEMORY
        return EndReason.SIGNALLED

    def _unreported_end_locked(self, leader_exit: Exit | None) -> EndReason:
        if leader_exit is None:
            self._reason = "the fork server died"
            return EndReason.LOST
        if self._kill_reason is not None:
            return self._kill_reason
        by_slurm = self._slurms_word()
        if by_slurm is not None:
            return by_slurm
        self._reason = (
            self._reason or "srun has ended, and its step has not told the end of the job"
        )
        return EndReason.LOST

    def _slurms_word(self) -> EndReason | None:
        if self._words:
            self._reason = "; ".join(self._words)
        return end_reason(self._words, self._last_state)
