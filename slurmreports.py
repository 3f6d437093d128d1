"""What the step of a job and Slurm say on srun's stderr, and what may be believed of it.

    lines = Lines()
    for line in lines.add(data):      # some bytes of the reports
        ...
    event = event_of(line)            # an event of `jobstep.py`; None if the line is Slurm's
    end = checked_end(event)
    number = queued_number(line)      # of a job that waits
    reason = end_reason(words, state)

The job can write to the step's stderr, too, and forge what Slurm and the step say. So only a part
of what may be Slurm's words is kept, and a report that the step could not have made is treated like
Slurm's words. Any other forged report concerns only the job that has forged it.

Thread safety: the functions have no state; one thread uses a `Lines`.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from jobstate import EndReason
from limits import Limits, Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "MAX_WORD_CHARACTERS",
    "Lines",
    "checked_end",
    "checked_limits",
    "end_reason",
    "event_of",
    "is_count",
    "is_errno",
    "is_news",
    "is_word",
    "queued_number",
]

_MAX_LINE_BYTES = 64 * 1024  # a line that is longer, and not at its end yet, is dropped
MAX_WORD_CHARACTERS = 1000
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


class Lines:
    """Cuts what comes in pieces into lines."""

    def __init__(self) -> None:
        self._rest = b""  # a line whose end has not come yet

    def add(self, data: bytes) -> list[bytes]:
        """Return the lines that end in `data`; for b"", the end of all, what is left."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            self._rest = b""
        if not data and self._rest:
            lines.append(self._rest)
        return lines


def event_of(text: str) -> dict[str, Any] | None:
    """Return the event that a line reports; None if the line is something else."""
    event: Any = None
    if text.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(text)
    return event if isinstance(event, dict) and "event" in event else None


def queued_number(text: str) -> str:
    """Return Slurm's number of the job that waits, if the line says so; otherwise ""."""
    found = _QUEUED.search(text)
    return found[1] if found else ""


def is_news(text: str) -> bool:
    """Whether a line says something that srun does not say of every job."""
    return not _NO_NEWS.search(text)


def end_reason(words: Sequence[str], state: str) -> EndReason | None:
    """Return why a job ended: by Slurm's words, or else by its word for the job's state."""
    said = "\n".join(words)
    for text, reason in _WORDS:
        if text in said:
            return reason
    return _STATES.get(state)


def is_count(value: object, most: int = _MAX_COUNT) -> bool:
    """Whether it is a whole number from 0 to `most`."""
    return type(value) is int and 0 <= value <= most


def is_errno(value: object) -> bool:
    """Whether it can be an errno."""
    return is_count(value, _MAX_ERRNO)


def is_word(value: object) -> bool:
    """Whether it can be the name of a node, or the number of a job."""
    return isinstance(value, str) and value.isprintable() and len(value) <= MAX_WORD_CHARACTERS


def checked_limits(event: dict[str, Any]) -> Limits:
    """Return the limits that a start reports.

    Raises ValueError, TypeError, LookupError or AttributeError for a report that makes no sense.
    """
    names = {field.name for field in fields(Limits)}
    found = {name: value for name, value in event["limits"].items() if name in names}
    return Limits(**(dict.fromkeys(names) | found))


def checked_end(event: dict[str, Any]) -> dict[str, Any]:
    """Return the report of an end, with a `Usage`. Raises as `checked_limits` does."""
    code, number = event["exit_code"], event["signal"]
    is_exit = number is None and is_count(code, _MAX_EXIT_CODE)
    is_signal = code is None and number and is_count(number, signal.NSIG - 1)
    if not (is_exit or is_signal):
        raise ValueError("neither an exit code nor a signal")
    if not (is_count(event["bytes"]) and is_count(event["killed"], _MAX_KILLED)):
        raise ValueError("not a number of bytes, or of processes")
    flags = {name: bool(event[name]) for name in ("is_killed", "is_terminated", "is_cancelled")}
    used = {}
    for field in fields(Usage):
        value = event["usage"].get(field.name)
        is_time = field.name.endswith("_s") and type(value) is float
        if is_count(value) or (is_time and 0 <= value <= _MAX_COUNT):  # false for not-a-number
            used[field.name] = value
    return event | flags | {"usage": Usage(**used)}
