"""A job that srun runs on a node of a cluster (`SlurmJob`).

Its leader, seen from here, is srun; `jobstep.py` runs on the node and starts the command. Each job
has a thread of its own, like a job of this machine. The thread moves the output, reads what the
step reports, and passes on the input. The job has ended when srun is gone and as many bytes of
output are here as the step has written. If there are fewer, it is LOST: the exit code of srun is
never trusted.

    job = SlurmJob(work, spare, channel, cluster, ...)
    spare.thread.give(job.job_id, job.run)
    job.await_begin()              # until the command runs, waits in the queue, or cannot run

Thread safety: as of `RunningJob`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import select
import signal
import time
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

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
from limits import Limits, Usage
from spawner import Exit, SpawnerDiedError, read_exit

if TYPE_CHECKING:
    from collections.abc import Callable

    from jobinput import JobInput
    from jobstate import Work
    from slurm import Cluster
    from slurmchannel import Channel
    from spares import Spare

__all__ = ["SlurmJob"]

logger = logging.getLogger(__name__)

_DAY_S = 24 * 3600
_BEGIN_S = 10.0  # how long a start waits for word from the cluster
_REPORT_BYTES = 65536
_FRAME_BYTES = 4000  # a pipe takes a frame as a whole: below PIPE_BUF
_CREDIT_BYTES = 32 * 1024  # of input that may be on its way to the command
_TERM_AFTER_S = 2.0  # from SIGUSR1, which the step obeys, to SIGTERM, which srun obeys
_KILL_AFTER_S = 5.0  # from there to SIGKILL
_LAST_WORDS = 20
# The job can write to the step's stderr, too, and forge what Slurm and the step say. So what is
# taken for Slurm's words is limited, and a report that the step could not have made is such words.
# Any other forged report tells only of the job that it comes from.
_MAX_LINE_BYTES = 64 * 1024  # without its end: then it is dropped
_MAX_WORD_CHARACTERS = 1000
_MAX_LOGGED_LINES = 100
_MAX_ERRNO = 4095  # MAX_ERRNO of the kernel
_MAX_EXIT_CODE = 255
_MAX_KILLED = (1 << 31) - 1
_MAX_COUNT = (1 << 63) - 1  # what the store and the protocol can hold
_QUEUED = re.compile(r"srun: job (\d+) queued and waiting for resources")
_NO_NEWS = re.compile(
    r"queued and waiting|has been allocated resources|Force Terminated|has been revoked|"
    r"forcing job termination|Job step aborted|^srun: Terminating|launch/slurm|"
    r"task 0: (Killed|Exited|Terminated|User defined)|StepId=\d+\.0\) task"
)
# What Slurm says of the end of a job that its step did not report. The first that is found counts.
_WORDS = (
    ("DUE TO TIME LIMIT", EndReason.TIMED_OUT),
    ("DUE TO NODE FAILURE", EndReason.NODE_FAILED),
    ("Node failure", EndReason.NODE_FAILED),
    ("oom-kill", EndReason.OUT_OF_MEMORY),
    ("DUE TO PREEMPTION", EndReason.CANCELLED),
    ("CANCELLED AT", EndReason.CANCELLED),
)
_STATES = {
    "TIMEOUT": EndReason.TIMED_OUT,
    "DEADLINE": EndReason.TIMED_OUT,
    "NODE_FAIL": EndReason.NODE_FAILED,
    "BOOT_FAIL": EndReason.NODE_FAILED,
    "CANCELLED": EndReason.CANCELLED,
    "PREEMPTED": EndReason.CANCELLED,
    "OUT_OF_MEMORY": EndReason.OUT_OF_MEMORY,
}


class SlurmJob(RunningJob):
    """A job on a cluster, waiting, running or just ended.

    `publish`: is called by the job's thread when the command runs, or waits in the queue; from
    then on others may know the job. `changed`: when it then begins to run. The other arguments are
    those of a `RunningJob`, whose `pid` and `pidfd` are those of srun here.
    """

    def __init__(  # noqa: PLR0913 -- what a start has prepared
        self,
        work: Work,
        spare: Spare,
        *,
        channel: Channel,
        cluster: Cluster,
        search_path: str,
        publish: Callable[[SlurmJob], None],
        changed: Callable[[SlurmJob], None],
        **more: Any,
    ) -> None:
        super().__init__(work, spare.body, None, **more)
        self._no_queue = work.no_queue
        self._channel = channel
        self._cluster = cluster
        self._search_path = search_path
        self._publish = publish
        self._changed = changed
        # Guarded by the lock of the base class from the thread's start on; -1: closed.
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._input_fd = -1  # the read end of the job's input
        job_input: JobInput | None = self._input
        if job_input is not None:
            self._input_fd = os.dup(job_input.read_fd)
            os.set_blocking(self._input_fd, False)
            job_input.begin()
        # Only the job's thread uses these.
        self._text = b""  # an incomplete line of a report
        self._words: list[str] = []  # what Slurm said
        self._logged_lines = 0  # of it
        self._end_event: dict[str, Any] | None = None
        self._ended_s: datetime | None = None  # when the step told the end
        self._sent = self._acknowledged = 0  # bytes of input
        self._last_state: EndReason | None = None  # by the word of the controller
        self._has_output = self._has_reports = True  # there may be more
        # By time.monotonic: when the next thing is tried to end the job; when srun must be gone;
        # when the job has run for too long; when the cluster must have answered.
        self._alarm_s: float | None = None
        self._gone_by_s: float | None = None
        self._times_out_s: float | None = None
        self._begin_by_s = math.inf
        # Guarded by the lock of the base class, as are its own.
        self._status = Status.QUEUED
        self._is_begun = self._is_told = False  # others may know the job; its starter knows
        self._failure: BaseException | None = None  # why it cannot run, before anybody knows it
        self._number = ""  # Slurm's
        self._node = ""
        self._reason = ""
        self._kill_step = 0  # of `_escalate`

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
            if self._status.is_over:
                return
            if self._kill_reason is None and self._end_event is None:
                self._kill_reason, self._stop_reason = reason, stop_reason
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
            if self._status is not Status.RUNNING or self._end_event is not None:
                return False
            if self._kill_reason is None:
                self._kill_reason, self._stop_reason = reason, stop_reason
                self._grace_until_s = time.monotonic() + grace_s
        return self._channel.send(b"T")

    def signal(self, number: int, *, everything: bool) -> None:
        """Send a signal to the leader, or to every process. Raises as `Worker.signal` does."""
        with self._ended:
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
            if not self._is_begun and self._note_failure():
                return
            ended_at = self._ended_s or self._time_of(None)
            self._note_end()
            self._end(None if leader_exit is None else self._true_exit(), ended_at)
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
        self._registry.trim()

    def close_channel(self) -> None:
        """Close what a `RunningJob` has not; once, when the job has ended or cannot run."""
        self._channel.close()
        self._close_input()
        with self._ended:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
            self._wake_fd = -1

    def _attend(self) -> Exit | None:
        """Serve the job until srun has gone. Returns None if the fork server died."""
        self._begin_by_s = self._started_s + _BEGIN_S * (2 if self._no_queue else 1)
        end: Exit | None = None
        is_gone = False
        while not is_gone:
            ready = self._await_something()
            self._ring_alarms(time.monotonic())
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if self._output_fd in ready:
                is_over = not self._move_output() and ready[self._output_fd] & select.POLLHUP
                self._has_output = not is_over
            if self._channel.report_fd in ready:
                self._has_reports = self._read_reports()
            if self._input_fd in ready:
                self._pass_input()
            if self._exit_fd in ready:
                end = read_exit(self._exit_fd)
                is_gone = end is None or end.is_final
                self._gone_by_s = time.monotonic() + _KILL_AFTER_S  # for srun's second process
        if end is None:
            self._outlive_fork_server()
        while self._has_reports and self._read_reports():
            pass
        return end

    def _await_something(self) -> dict[int, int]:
        """Block until a descriptor is ready or an alarm is due; return what poll(2) returns."""
        poll = select.poll()
        fds = [self._exit_fd, self._wake_fd]
        if self._has_output:
            fds.append(self._output_fd)
        if self._has_reports:
            fds.append(self._channel.report_fd)
        if self._input_fd >= 0 and self._room > 0 and self._status is Status.RUNNING:
            fds.append(self._input_fd)
        for fd in fds:
            poll.register(fd, select.POLLIN)
        alarms = [self._alarm_s, self._gone_by_s, self._times_out_s]
        if not self._is_begun:
            alarms.append(self._begin_by_s)
        due_s = min((each for each in alarms if each is not None), default=math.inf)
        left_s = min(max(0.0, due_s - time.monotonic()), _DAY_S)  # poll(2) has an int
        return dict(poll.poll(left_s * 1000))

    @property
    def _room(self) -> int:
        """How many more bytes of input may be on their way."""
        return self._acknowledged + _CREDIT_BYTES - self._sent

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
            data = os.read(self._channel.report_fd, _REPORT_BYTES)
        except BlockingIOError:
            return False
        *lines, self._text = (self._text + data).split(b"\n")
        if not data and self._text:
            lines.append(self._text)
        if len(self._text) > _MAX_LINE_BYTES:
            self._text = b""
        for line in lines:
            self._take(line)
        return bool(data)

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        event: Any = None
        if text.startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(text)
        if isinstance(event, dict) and "event" in event:
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
                self._take_event(event)
                return
        if text.strip():
            if found := _QUEUED.search(text):
                with self._ended:
                    self._number = found[1]
                    self._reason = "queued"
                if not self._no_queue:
                    self._begin_if_new(is_running=False)
            elif not _NO_NEWS.search(text):
                text = text[:_MAX_WORD_CHARACTERS]
                self._logged_lines += 1
                if self._logged_lines <= _MAX_LOGGED_LINES:
                    logger.info("job %s: Slurm says: %s", self.job_id, text)
                self._words = [*self._words[1 - _LAST_WORDS :], text.removeprefix("srun: ")]

    def _take_event(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "started":
                names = {field.name for field in fields(Limits)}
                limits = dict.fromkeys(names) | {
                    name: value for name, value in event["limits"].items() if name in names
                }
                enforced, number, node = Limits(**limits), event["id"], event["node"]
                if not (_is_word(number) and _is_word(node)):
                    raise ValueError("not the number of a job and the name of a node")
                with self._ended:
                    self._number, self._node = number, node
                    self._reason = ""
                    self._limits = enforced
                self._begin_if_new(is_running=True)
            case "ack":
                if _is_count(event["bytes"], self._sent):
                    self._acknowledged = event["bytes"]
            case "closed":
                self._close_input()
            case "refused":
                missing = ", ".join(event["missing"])[:_MAX_WORD_CHARACTERS]
                self._fail(
                    ResourceError(
                        f"the node does not enforce {missing}; the operator "
                        "can have Slurm and its Prolog enforce them, or accept weaker limits with "
                        "--limits auto"
                    )
                )
            case "failed":
                if not _is_count(event["errno"], _MAX_ERRNO):
                    raise ValueError("not an errno")
                self._fail(self._exec_failure(event["stage"], event["errno"]))
            case "end":
                event = _checked_end(event)
                with self._ended:
                    self._end_event = event
                self._ended_s = self._time_of(None)

    def _exec_failure(self, stage: str, number: int) -> Exception:
        error = OSError(number, os.strerror(number))
        command = self._argv[0]
        if stage == "enter":
            return DirectoryError(command, self._directory, error.strerror or str(error))
        return exec_error(command, error, self._search_path, self._directory)

    def _fail(self, error: Exception) -> None:
        """Note why the job cannot run."""
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
                self.started_at, self._started_s = datetime.now(UTC), time.monotonic()
                if self._ending.timeout is not None:
                    self._times_out_s = self._started_s + self._ending.timeout
        if is_new:
            self._publish(self)
        elif has_changed:
            self._changed(self)
        with self._ended:
            self._is_told = True
            self._ended.notify_all()

    def _begin_late(self) -> None:
        """Go on without word from the cluster: the job counts as queued, or is given up."""
        if self._no_queue:
            self._fail(ResourceError(f"the cluster has not answered for {2 * _BEGIN_S:g} s"))
            self._escalate(is_first=True)
            return
        with self._ended:
            self._reason = "the cluster has not answered yet"
        self._begin_if_new(is_running=False)

    def _note_failure(self) -> bool:
        """Tell `await_begin` why the job cannot run; False if others know the job by now."""
        with self._ended:
            if self._is_begun:
                return False
            if self._kill_reason is not None:
                self._failure = WorkerClosedError()
            elif self._failure is None:
                words = "; ".join(self._words) or "srun ended and said nothing"
                self._failure = ResourceError(f"the cluster did not take the job: {words}")
            self._ended.notify_all()
            return True

    def _pass_input(self) -> None:
        try:
            data = os.read(self._input_fd, min(self._room, _FRAME_BYTES))
        except BlockingIOError:
            return
        if data:
            self._channel.send(b"I", data)
            self._sent += len(data)
        else:
            self._channel.send(b"E")
            self._close_input()

    def _close_input(self) -> None:
        if self._input_fd >= 0:
            os.close(self._input_fd)
            self._input_fd = -1

    # --- the end ---------------------------------------------------------------------------

    def _note_end(self) -> None:
        """Keep what the step reported with the end."""
        event = self._end_event
        if event is None or event["is_cancelled"]:
            self._last_state = _STATES.get(self._cluster.state(self._number))
        if event is None:
            return
        with self._ended:
            self._usage = event["usage"]
            self._killed_after_exit = event["killed"]

    def _true_exit(self) -> Exit:
        """Return how the command ended, by the word of the step; srun's is not trusted."""
        event = self._end_event
        return Exit() if event is None else Exit(event["exit_code"], event["signal"])

    def _find_end_reason_locked(self, leader_exit: Exit | None) -> EndReason:
        event = self._end_event
        if event is None:
            return self._unreported_end_locked(leader_exit)
        if self.output.size + self.output.lost_bytes < event["bytes"]:
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
        if self._kill_reason is not None:
            return self._kill_reason
        if leader_exit is None:
            self._reason = "the fork server died"
            return EndReason.LOST
        by_slurm = self._slurms_word()
        if by_slurm is not None:
            return by_slurm
        self._reason = (
            self._reason or "srun has ended, and its step has not told the end of the job"
        )
        return EndReason.LOST

    def _slurms_word(self) -> EndReason | None:
        said = "\n".join(self._words)
        if said:
            self._reason = "; ".join(self._words)
        for words, reason in _WORDS:
            if words in said:
                return reason
        return self._last_state


def _is_count(value: object, most: int = _MAX_COUNT) -> bool:
    """Whether it is a whole number from 0 to `most`."""
    return type(value) is int and 0 <= value <= most


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _MAX_WORD_CHARACTERS


def _checked_end(event: dict[str, Any]) -> dict[str, Any]:
    """Return the report of an end, with a `Usage`. Raises as a report does that makes no sense."""
    code, number = event["exit_code"], event["signal"]
    is_exit = number is None and _is_count(code, _MAX_EXIT_CODE)
    is_signal = code is None and number and _is_count(number, signal.NSIG - 1)
    if not (is_exit or is_signal):
        raise ValueError("neither an exit code nor a signal")
    if not (_is_count(event["bytes"]) and _is_count(event["killed"], _MAX_KILLED)):
        raise ValueError("not a number of bytes, or of processes")
    flags = {name: bool(event[name]) for name in ("is_killed", "is_terminated", "is_cancelled")}
    used = {}
    for field in fields(Usage):
        value = event["usage"].get(field.name)
        is_time = field.name.endswith("_s") and type(value) is float
        if _is_count(value) or (is_time and 0 <= value <= _MAX_COUNT):  # false for not-a-number
            used[field.name] = value
    return event | flags | {"usage": Usage(**used)}
