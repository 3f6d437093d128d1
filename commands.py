"""The subcommands of the command line: what each does, prints and keeps.

A subcommand gets a `Client` and the arguments that `cli.py` has parsed. It prints its
result, and raises ClientError or OSError. A module that only one subcommand needs is
imported inside it, so the others start without that delay.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
from pathlib import Path
from urllib.parse import quote

from cli import EXIT_UNKNOWN, LIMIT_FIELDS, printable
from connection import ClientError
from units import format_size

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Self

    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

    import workerservice_pb2 as worker_pb
    from connection import Client, JobEnd, OutputStream

__all__ = ["COMMANDS", "find_token"]

_EXIT_SIGNAL = 128  # plus the signal, like a shell
_MOST_EXIT_STATUS = 255
_CTRL_C_STOPS = 2  # the first Ctrl-C is passed on, the second stops the job

# With these errors a stream breaks off in the middle, and can be continued later.
_MAY_CONTINUE = {"UNAVAILABLE", "UNAUTHENTICATED", "CANCELLED", "INTERNAL", "UNKNOWN"}

# --- showing jobs -----------------------------------------------------------------------


def _to_dict(message: Message) -> dict[str, Any]:
    """Return a message's fields by their proto names; enums are names, absent fields None."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            result[field.name] = None
        elif field.message_type and field.message_type.full_name == "google.protobuf.Timestamp":
            result[field.name] = _time(value)
        elif field.message_type:
            result[field.name] = _to_dict(value)
        elif field.enum_type:
            known = field.enum_type.values_by_number.get(value)  # None if the server is newer
            result[field.name] = None if value == 0 else known.name if known else str(value)
        else:
            result[field.name] = list(value) if field.is_repeated else value
    return result


def _describe(job: worker_pb.Job) -> str:
    """Return what `status` prints of a job."""
    fields = _to_dict(job)
    lines = {
        "job": job.job_id,
        "owner": job.owner,
        "command": _command_line(job),
        "status": _state(fields),
        "started": _moment(fields["started_at"]),
        "ended": _moment(fields["ended_at"]),
        "output": _output(job),
        "subscribers": ", ".join(job.subscribers) or "-",
        "limits": _limits(fields["limits"]),
        "used": _usage(fields["usage"]),
    }
    return "\n".join(f"{name:<12}{printable(value)}" for name, value in lines.items())


def _output(job: worker_pb.Job) -> str:
    lost = f" ({job.output_lost_bytes} more were not kept)" if job.output_lost_bytes else ""
    return f"{job.output_bytes} bytes{lost}"


def _state(job: dict[str, Any]) -> str:
    """Return how a job ended, or that it runs. `job`: the fields of `Job`."""
    status = str(job["status"])
    if job["end_reason"] is None:
        return status
    reason = {
        "EXITED": f"exited with code {job['exit_code']}",
        "SIGNALLED": f"killed by {_signal_name(job['signal'])}",
    }.get(job["end_reason"], job["end_reason"].lower().replace("_", " "))
    left = "; a process of it may still run: the server has no cgroups"
    return f"{status} ({reason}{left if job.get('may_have_escaped') else ''})"


def _signal_name(number: int | None) -> str:
    try:
        return signal.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


def _time(value: Timestamp) -> str:
    """Return the time in the form of RFC 3339, or a server's number that is no date as such."""
    try:
        return value.ToJsonString()
    except ValueError:
        return f"{value.seconds} s {value.nanos} ns"


def _moment(text: str | None) -> str:
    """Return the time for people, without its fraction of a second."""
    if text is None:
        return "-"
    return text[:19].replace("T", " ") + " UTC" if "T" in text else text


def _limits(limits: dict[str, Any] | None) -> str:
    texts: dict[str, Callable[[Any], str]] = {
        "cpu_cores": lambda n: f"{n:g} CPU cores",
        "memory_bytes": lambda n: f"{format_size(n)} memory",
        "swap_bytes": lambda n: f"{format_size(n)} swap",
        "io_read_bps": lambda n: f"{format_size(n)}/s read",
        "io_write_bps": lambda n: f"{format_size(n)}/s written",
        "io_read_iops": lambda n: f"{n} reads/s",
        "io_write_iops": lambda n: f"{n} writes/s",
        "pids": lambda n: f"{n} processes",
    }
    return (limits and _join(texts, limits)) or "none in force"


def _usage(usage: dict[str, Any] | None) -> str:
    if usage is None:
        return "-"
    texts: dict[str, Callable[[Any], str]] = {
        "cpu_user_s": lambda n: f"{n:.3g} s CPU user",
        "cpu_system_s": lambda n: f"{n:.3g} s system",
        "cpu_throttled_s": lambda n: f"throttled {n:.3g} s",
        "memory_bytes": lambda n: f"{format_size(n)} memory",
        "memory_peak_bytes": lambda n: f"{format_size(n)} memory at most",
        "io_read_bytes": lambda n: f"{format_size(n)} read in {usage['io_reads']} operations",
        "io_written_bytes": lambda n: f"{format_size(n)} written in {usage['io_writes']}",
        "pids": lambda n: f"{n} processes",
        "pids_peak": lambda n: f"{n} processes at most",
        "oom_kills": lambda n: f"{n} OOM kills",
    }
    if usage["refused_forks"]:  # 0 tells nothing
        texts["refused_forks"] = lambda n: f"{n} times no room for another process"
    note = " (leader and awaited children only)" if usage["source"] == "RUSAGE" else ""
    return _join(texts, usage) + note


def _join(texts: dict[str, Callable[[Any], str]], fields: dict[str, Any]) -> str:
    return ", ".join(text(fields[name]) for name, text in texts.items() if fields[name] is not None)


def _command_line(job: worker_pb.Job) -> str:
    return shlex.join([job.command, *job.args])


def _print_table(jobs: Sequence[worker_pb.Job]) -> None:
    import shutil

    rows: list[tuple[str, ...]] = [("JOB ID", "OWNER", "STARTED", "STATUS", "COMMAND")]
    for job in jobs:
        fields = _to_dict(job)
        started, state = _moment(fields["started_at"]), _state(fields)
        cells = (job.job_id, job.owner, started, state, _command_line(job))
        rows.append(tuple(map(_shown, cells)))
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    columns = shutil.get_terminal_size((100_000, 24)).columns if sys.stdout.isatty() else None
    for row in rows:
        padded = [
            cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=False)
        ]
        line = "  ".join([*padded, row[-1]])
        # A line that wraps would look like two rows.
        print(line if columns is None else _cut(line, columns))


def _shown(text: str) -> str:
    """Return the text with an escape for each character that stdout cannot encode."""
    encoding = sys.stdout.encoding
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def _width(text: str) -> int:
    """Return how many cells of a terminal the text takes at most."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(character: str) -> int:
    import unicodedata

    if character == "\N{VARIATION SELECTOR-16}":
        return 1  # some terminals make the preceding character wide
    if unicodedata.category(character) in {"Mn", "Me"}:  # drawn onto the preceding character
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def _cut(text: str, width: int) -> str:
    """Return the longest beginning of the text that fits into `width` cells."""
    for end, character in enumerate(text):
        width -= _cells(character)
        if width < 0:
            return text[:end]
    return text


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2))


# --- the kept token ---------------------------------------------------------------------


def _token_path(server: str) -> Path:
    """Return the server's own token file: no server receives another's token. Raises OSError."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        message = "no home directory; set XDG_STATE_HOME"
        raise FileNotFoundError(errno.ENOENT, message, "~") from None
    return Path(state) / "job-worker" / f"token-{quote(server, safe=':[]')}"


def _keep_token(server: str, token: str) -> None:
    import tempfile

    path = _token_path(server)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp creates the file with mode 0600. The rename makes the whole token appear at once.
    fd, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(fd, "w") as file:
        file.write(token)
    os.replace(temporary, path)


def _forget_token(server: str, token: str) -> None:
    """Delete the kept token if it is `token`."""
    # An unreadable file keeps no token, and a token that stays is invalid by now.
    with contextlib.suppress(OSError):
        if _read_token(server) == token:
            _token_path(server).unlink()


def _read_token(server: str) -> str:
    # With strange bytes in the file, `Client` still reports that this is not a token.
    return _token_path(server).read_text(encoding="ascii", errors="replace")


def find_token(arguments: argparse.Namespace) -> str:
    """Return the token given, or that of JOBWORKER_TOKEN, or the kept one. Raises ClientError."""
    token: str = arguments.token or os.environ.get("JOBWORKER_TOKEN", "")
    if not token:
        try:
            token = _read_token(arguments.server)
        except OSError:
            raise ClientError(
                f"not logged in to {arguments.server}; run: client login -u USER"
            ) from None
    return token


# --- commands ---------------------------------------------------------------------------


def _login(client: Client, arguments: argparse.Namespace) -> None:
    token, _ = client.login(arguments.user, _password(arguments))
    print(token)
    try:
        _keep_token(arguments.server, token)
    except OSError as error:
        print(
            printable(
                f"client: the token was not kept ({error.filename}: {error.strerror}); use -t"
            ),
            file=sys.stderr,
        )


def _password(arguments: argparse.Namespace) -> str:
    import getpass

    password: str | None = arguments.password
    try:
        if password is None and sys.stdin.isatty():
            password = getpass.getpass(f"Password for {printable(arguments.user)}: ")
        elif password is None or password == "-":  # noqa: S105 -- not a password
            password = sys.stdin.readline().rstrip("\r\n")
        password.encode()
    except EOFError:
        raise ClientError("no password was given") from None
    except UnicodeError:  # its text contains the password
        raise ClientError("the password is not valid UTF-8") from None
    return password


def _logout(client: Client, arguments: argparse.Namespace) -> None:
    token = client.token
    try:
        client.logout()
    except ClientError as error:
        if error.code != "UNAUTHENTICATED":
            raise
        # Not a success: the token may still be valid with another certificate.
        _forget_token(arguments.server, token)
        raise ClientError(
            "there was nothing to log out of: the server does not accept this token, or not "
            "with this client certificate",
            error.code,
        ) from error
    _forget_token(arguments.server, token)


def _start(client: Client, arguments: argparse.Namespace) -> None:
    print(printable(_start_job(client, arguments)))


def _start_job(client: Client, arguments: argparse.Namespace) -> str:
    """Start the job that the arguments of `start` or `run` describe; return its ID."""
    import uuid

    limits = {name: getattr(arguments, name) for name in LIMIT_FIELDS}
    request_id = arguments.request_id or str(uuid.uuid4())
    try:
        return client.start(arguments.command, arguments.args, request_id=request_id, **limits)
    except ClientError as error:
        if not error.is_open:
            raise
        raise ClientError(
            f"{error}; there may be a job: to get its ID, repeat this start with --request-id "
            f"{request_id}",
            error.code,
        ) from error


def _run(client: Client, arguments: argparse.Namespace) -> int:
    """Start a job, write its output to stdout, and return the exit status that tells its end."""
    if arguments.detach:
        _start(client, arguments)
        return 0
    with _Interrupts() as interrupts:
        job_id = _start_job(client, arguments)
        interrupts.pass_on(client, job_id)
        chunks = client.stream(job_id)
        try:
            for _ in _write_all(chunks):
                pass
        except ClientError as error:
            if chunks.end is None:
                raise ClientError(
                    f"{error}; how the job ends is unknown; see: client status -j {job_id}",
                    error.code,
                ) from error
            _warn(f"{error}")
        except (KeyboardInterrupt, BrokenPipeError):
            _warn(f"the job goes on; see: client status -j {job_id}")
            raise
        finally:
            chunks.close()
    if chunks.end is None:
        raise ClientError(f"how the job ended is unknown; see: client status -j {job_id}")
    if chunks.end.end_reason != "EXITED":
        _warn(f"the job did not end by itself: {_state(vars(chunks.end))}")
    return _exit_status(chunks.end)


def _exit_status(end: JobEnd) -> int:
    """Return the exit status that tells how a job ended, as a shell does."""
    if end.signal is not None:
        return min(_EXIT_SIGNAL + end.signal, _MOST_EXIT_STATUS)
    if end.exit_code is None or end.exit_code > _MOST_EXIT_STATUS:
        return EXIT_UNKNOWN
    return end.exit_code


class _Interrupts:
    """Passes Ctrl-C on to a job: SIGINT, the second time a stop; the third time it ends `run`.

    A context manager, which the main thread uses. In it Ctrl-C raises KeyboardInterrupt only the
    third time. What comes before `pass_on` is passed on then.

    The handler runs at any point of the main thread, perhaps in the middle of a call of gRPC.
    Therefore a thread of its own makes the calls. It is a daemon, because a call to a server
    that does not answer lasts 30 s.
    """

    def __init__(self) -> None:
        from queue import SimpleQueue

        self._count = 0
        self._queue: SimpleQueue[int] = SimpleQueue()  # its `put` may be called in a handler
        self._before: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before != signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        self._queue.put(0)

    def pass_on(self, client: Client, job_id: str) -> None:
        """Pass on what has come and what will come, until the context ends."""
        import threading

        threading.Thread(
            target=self._serve, args=(client, job_id), name="interrupts", daemon=True
        ).start()

    def _note(self, _signum: int, _frame: object) -> None:
        self._count += 1
        if self._count > _CTRL_C_STOPS:
            raise KeyboardInterrupt
        if self._count == _CTRL_C_STOPS:
            # Not with print, which the handler may have interrupted.
            os.write(sys.stderr.fileno(), b"client: stopping the job; Ctrl-C again leaves it\n")
        self._queue.put(self._count)

    def _serve(self, client: Client, job_id: str) -> None:
        while count := self._queue.get():
            try:
                if count < _CTRL_C_STOPS:
                    client.signal(job_id, "INT")
                else:
                    client.stop(job_id)
            except ClientError as error:
                if error.code != "FAILED_PRECONDITION":  # the job has ended meanwhile
                    _warn(str(error))


def _warn(text: str) -> None:
    print(f"client: {printable(text)}", file=sys.stderr)


def _stop(client: Client, arguments: argparse.Namespace) -> None:
    def stop(job_id: str) -> None:
        state = _state(_to_dict(client.stop(job_id)))
        print(state if len(arguments.job) == 1 else f"{printable(job_id)} {state}")

    _for_each(arguments.job, stop)


def _signal(client: Client, arguments: argparse.Namespace) -> None:
    _for_each(
        arguments.job,
        lambda job_id: client.signal(job_id, arguments.signal, everything=arguments.all),
    )


def _status(client: Client, arguments: argparse.Namespace) -> None:
    jobs: list[worker_pb.Job] = []
    try:
        _for_each(arguments.job, lambda job_id: jobs.append(client.status(job_id)))
    finally:
        if arguments.json and len(arguments.job) > 1:
            _print_json([_to_dict(job) for job in jobs])
        elif arguments.json and jobs:
            _print_json(_to_dict(jobs[0]))
        elif jobs:
            print("\n\n".join(map(_describe, jobs)))


def _for_each(job_ids: Sequence[str], do: Callable[[str], object]) -> None:
    """Call `do` for every job, also after an error; then raise one ClientError for all errors."""
    errors: dict[str, ClientError] = {}
    for job_id in job_ids:
        try:
            do(job_id)
        except ClientError as error:
            if len(job_ids) == 1:
                raise
            errors[job_id] = error
    if errors:
        text = "; ".join(f"job {job_id}: {error}" for job_id, error in errors.items())
        raise ClientError(text, next(iter(errors.values())).code)


def _stream(client: Client, arguments: argparse.Namespace) -> None:
    offset = arguments.offset
    (job_id,) = arguments.job
    chunks = client.stream(job_id, offset)
    try:
        for size in _write_all(chunks):
            offset += size
    except ClientError as error:
        if error.code in _MAY_CONTINUE and offset > arguments.offset:
            message = f"{error}; to continue from here, use --offset {offset}"
            raise ClientError(message, error.code) from error
        raise
    finally:
        chunks.close()
    if chunks.end is None:
        raise ClientError("the server did not say how the job ended; the output may be incomplete")
    if chunks.end.end_reason != "EXITED":
        state = _state(vars(chunks.end))
        raise ClientError(f"the job did not end by itself: {state}; the output may be incomplete")


def _write_all(chunks: OutputStream) -> Iterator[int]:
    """Write the output to stdout; after each chunk yield its size."""
    for data in chunks:
        left = memoryview(data)
        while left:  # with PYTHONUNBUFFERED a write may be partial
            left = left[sys.stdout.buffer.write(left) :]
        sys.stdout.buffer.flush()
        yield len(data)


def _remove(client: Client, arguments: argparse.Namespace) -> None:
    _for_each(arguments.job, client.remove)


def _list(client: Client, arguments: argparse.Namespace) -> None:
    jobs = client.list()
    if arguments.json:
        _print_json([_to_dict(job) for job in jobs])
    else:
        _print_table(jobs)


# Each returns the exit status; None is 0.
COMMANDS: dict[str, Callable[[Client, argparse.Namespace], int | None]] = {
    "login": _login,
    "logout": _logout,
    "start": _start,
    "run": _run,
    "stop": _stop,
    "signal": _signal,
    "status": _status,
    "stream": _stream,
    "remove": _remove,
    "list": _list,
}
