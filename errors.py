"""The errors that a `Worker` raises, except ValueError and TypeError for wrong arguments.

`worker.py` exports all of them. Each error is a `WorkerError` and carries what it is about.
"""

from __future__ import annotations

__all__ = [
    "CommandError",
    "CommandNotExecutableError",
    "CommandNotFoundError",
    "JobRunningError",
    "ResourceError",
    "StartTimeoutError",
    "StopTimeoutError",
    "UnknownJobError",
    "WorkerClosedError",
    "WorkerError",
    "shorten",
]


class WorkerError(Exception):
    """The base of the errors raised here, except ValueError and TypeError for wrong arguments."""


class UnknownJobError(WorkerError, LookupError):
    """There is no job of that ID. Attribute: `job_id`."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id}")
        self.job_id = job_id


class JobRunningError(WorkerError):
    """The job has not ended, so it cannot be removed. Attribute: `job_id`."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} is still running; stop it first")
        self.job_id = job_id


class CommandError(WorkerError, ValueError):
    """The command cannot be executed. Attribute: `command`."""

    def __init__(self, command: str, problem: str) -> None:
        super().__init__(f"cannot execute {shorten(command)!r}: {problem}")
        self.command = command


class CommandNotFoundError(CommandError):
    """There is no such command, or its interpreter is missing."""


class CommandNotExecutableError(CommandError):
    """The command exists but is not an executable program."""


class ResourceError(WorkerError):
    """The host has run out of something a new job needs: processes, descriptors, disk, memory."""


class StartTimeoutError(WorkerError, TimeoutError):
    """The command was not executing after a while, and was killed. Attribute: `command`."""

    def __init__(self, command: str, timeout: float) -> None:
        super().__init__(
            f"{shorten(command)!r} was not executing after {timeout:g} s, and was killed: the "
            "kernel waits for its file (on a network disk that does not answer, or leased by a "
            "process), or its limits are too low; try again later, or with other limits"
        )
        self.command = command


class StopTimeoutError(WorkerError, TimeoutError):
    """The job's processes were killed but are not gone yet; the job is still RUNNING."""

    def __init__(self, job_id: str, timeout: float) -> None:
        super().__init__(
            f"job {job_id} was killed, but after {timeout:g} s its processes are not all gone "
            "(the kernel waits for a device); stop it again later"
        )


class WorkerClosedError(WorkerError):
    """The worker is closing or closed."""

    def __init__(self) -> None:
        super().__init__("the worker is shutting down")


def shorten(text: str, length: int = 200) -> str:
    """Return the text, or its first characters if it is longer than `length`."""
    return text if len(text) <= length else f"{text[:length]}..."
