"""The errors that a `Worker` raises, except ValueError and TypeError for wrong arguments.

`worker.py` exports all of them. Each error is a `WorkerError` and carries what it is about.
"""

from __future__ import annotations

import errno
import os
import re
import stat

__all__ = [
    "CommandError",
    "CommandNotExecutableError",
    "CommandNotFoundError",
    "DirectoryError",
    "InputError",
    "InputOffsetError",
    "InputTakenError",
    "JobRunningError",
    "ResourceError",
    "SignalError",
    "StartTimeoutError",
    "StopTimeoutError",
    "StoreError",
    "TakeoverError",
    "UnknownJobError",
    "WatchBehindError",
    "WorkerClosedError",
    "WorkerError",
    "exec_error",
    "in_words",
    "look_at",
    "shorten",
]


# What only a shell understands: its characters, and the words that are no programs.
_FOR_A_SHELL = re.compile(r"""[\s|&;<>()$*?`"'{}]|\A~|\A\w+=""")
_SHELL_WORDS = re.compile(
    r"[.:]|\[\[|alias|bg|break|case|cd|command|continue|declare|eval|exec|exit|export|fg|for|function|if"
    r"|jobs|let|local|read|readonly|return|select|set|shift|shopt|source|time|trap|type|typeset"
    r"|ulimit|umask|unalias|unset|until|wait|while"
)
_BOM = b"\xef\xbb\xbf"


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


class DirectoryError(CommandError):
    """The job's user cannot enter the directory that was asked for. Attribute: `directory`."""

    def __init__(self, command: str, directory: str, problem: str) -> None:
        super().__init__(
            command,
            f"the working directory {shorten(directory)!r} cannot be entered: {problem}; name one "
            "that exists where the job runs and that the job's user may enter",
        )
        self.directory = directory


class ResourceError(WorkerError):
    """The host has run out of something a new job needs: processes, descriptors, disk, memory.

    Attribute: `retry_after_s`, in seconds; None if waiting may not help.
    """

    def __init__(self, problem: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(problem)
        self.retry_after_s = retry_after_s


class SignalError(WorkerError):
    """A signal could not be sent to a job. Attribute: `job_id`."""

    def __init__(self, job_id: str, problem: str) -> None:
        super().__init__(f"no signal was sent to job {job_id}: {problem}")
        self.job_id = job_id


class InputError(WorkerError):
    """The job gets no input, or no more of it. Attribute: `job_id`."""

    def __init__(self, job_id: str, problem: str) -> None:
        super().__init__(f"job {job_id} takes no input: {problem}")
        self.job_id = job_id


class InputOffsetError(WorkerError, ValueError):
    """A writer wants to continue a job's input at another byte than the next one.

    Attributes: `job_id`, `offset`; `size`, how many bytes the job has got.
    """

    def __init__(self, job_id: str, offset: int, size: int) -> None:
        super().__init__(
            f"the input of job {job_id} cannot continue at byte {offset}: the job has got {size} "
            f"bytes; continue at {size}"
        )
        self.job_id = job_id
        self.offset = offset
        self.size = size


class InputTakenError(WorkerError):
    """Another writer has taken over the job's input. Attribute: `job_id`."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"another call writes the input of job {job_id} now")
        self.job_id = job_id


class StartTimeoutError(WorkerError, TimeoutError):
    """The command was not executing after a while, and was killed.

    Attributes: `command`; `lives`, whether the kernel has not let go of the process yet.
    """

    def __init__(self, command: str, timeout: float) -> None:
        super().__init__(
            f"{shorten(command)!r} was not executing after {timeout:g} s, and was killed: the "
            "kernel waits for its file (on a network disk that does not answer, or leased by a "
            "process), or its limits are too low; try again later, or with other limits"
        )
        self.command = command
        self.lives = False


class StopTimeoutError(WorkerError, TimeoutError):
    """The job's processes were killed but are not gone yet; the job is still RUNNING."""

    def __init__(self, job_id: str, timeout: float) -> None:
        super().__init__(
            f"job {job_id} was killed, but after {timeout:g} s its processes are not all gone "
            "(the kernel waits for a device, or another job has their output or traces them); stop "
            "that one, or this one again later"
        )


class StoreError(WorkerError, OSError):
    """The store of jobs cannot be read or written; the message has the remedy. Has an `errno`."""

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(code, message)

    def __str__(self) -> str:
        # Without errno's number, which means nothing to the person who has to act.
        return str(self.strerror)


class TakeoverError(WorkerError):
    """The jobs of a former main process go on, and this process cannot take them over."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"jobs of the former main process go on, and cannot be taken over: {problem}; start "
            "with the former settings, or end these jobs"
        )


class WatchBehindError(WorkerError):
    """The reader of a watch was too slow, and events were dropped.

    Attribute: `retry_after_s`, when to begin a new watch.
    """

    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("this watch was read too slowly and has missed changes; watch anew")


class WorkerClosedError(WorkerError):
    """The worker is closing or closed."""

    def __init__(self) -> None:
        super().__init__("the worker is shutting down")


def shorten(text: str, length: int = 200) -> str:
    """Return the text, or its first characters if it is longer than `length`."""
    return text if len(text) <= length else f"{text[:length]}..."


def in_words(error: BaseException) -> str:
    """Return the message of an error; that of the system as `PATH: reason`, without its number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    return f"{path}: {error.strerror}" if path else error.strerror


def exec_error(command: str, error: OSError, search_path: str, directory: str) -> WorkerError:
    """Say what it means that the exec of `command` failed with `error`.

    `search_path`: where a command without a slash is looked up. `directory`: that of the job.
    The error's `found` is what the job's user has seen with `look_at`; without one this looks.
    """
    if error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EDQUOT):
        return ResourceError(f"no room for another process: {error.strerror}", retry_after_s=1)
    path = os.path.join(directory, command)
    found = getattr(error, "found", None)
    if found is None:
        found = look_at(path)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return CommandNotFoundError(
            command, _what_is_missing(command, path, search_path, directory, found)
        )
    if "/" in command and found == "directory":
        return CommandNotExecutableError(command, "it is a directory")
    if error.errno in (errno.EACCES, errno.EPERM):
        return CommandNotExecutableError(command, "permission denied; is it executable?")
    if error.errno == errno.ENOEXEC and found == "bom":
        return CommandNotExecutableError(
            command,
            "it begins with a byte order mark (BOM), and so not with #!; remove the mark: "
            "sed -i '1s/^...//' FILE",
        )
    if error.errno == errno.ENOEXEC:
        return CommandNotExecutableError(
            command, "not a program; a script must begin with #! and its interpreter"
        )
    return CommandError(command, error.strerror or str(error))


def _what_is_missing(command: str, path: str, search_path: str, directory: str, found: str) -> str:
    if "/" in command and found == "crlf":
        return (
            "its first line ends with CR LF, as on Windows, and so names an interpreter that "
            "does not exist; remove the CR: sed -i 's/\\r$//' FILE"
        )
    if "/" in command and found:
        return "the interpreter its first line names is missing"
    problem = "no such file" if "/" in command else f"command not found in {search_path}"
    if _SHELL_WORDS.fullmatch(command):
        return f"{problem}; it is a word of the shell, and no shell reads it: start sh -c 'LINE'"
    if _FOR_A_SHELL.search(command):
        return (
            f"{problem}; no shell reads it: give each argument by itself, or start "
            f"sh -c {shorten(repr(command), 100)}"
        )
    if "/" in command and not command.startswith("/"):
        return (
            f"{problem}; the job's directory is {directory}, so this is "
            f"{shorten(os.path.normpath(path), 200)}"
        )
    if found and found != "directory":
        return (
            f"{problem}; for the file in the job's directory write {shorten('./' + command, 100)}"
        )
    return problem


def look_at(path: str | bytes) -> str:
    """Return what is in the place of a command that could not be executed, for `exec_error`.

    "directory"; "crlf", a file whose first line ends with CR LF; "bom", one that begins with a
    byte order mark; "file", anything else; "" if this user sees nothing there.
    """
    try:
        if os.path.isdir(path):
            return "directory"
        os.stat(path)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError:
        return "file" if os.path.exists(path) else ""
    try:
        # execve(2) reads 255 bytes. Other kinds of files can be read only by waiting.
        first = os.read(fd, 256).partition(b"\n")[0] if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    except OSError:
        first = b""
    finally:
        os.close(fd)
    return "crlf" if first.endswith(b"\r") else "bom" if first.startswith(_BOM) else "file"
