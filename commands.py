"""What each subcommand of the command line does, how it shows jobs, where it keeps the token.

Each command is given a `Client` and the arguments that `arguments.py` has read; it prints
what was asked for, and raises ClientError or OSError. What only some of them need they
import themselves: nobody should wait for it who calls another.

Thread safety: all of it is for the one thread of a program.
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

from arguments import LIMIT_FIELDS
from client import ClientError
from texts import printable
from units import format_size

TYPE_CHECKING = False  # as typing has it, whose import takes as long as Python's start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Any

    from google.protobuf.message import Message

    import workerservice_pb2 as worker_pb
    from client import Client

__all__ = ["COMMANDS", "find_token"]

# --- showing jobs -----------------------------------------------------------------------


def _to_dict(message: Message) -> dict[str, Any]:
    """A message's fields under their proto names: enums by name, absent ones None."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            result[field.name] = None
        elif field.message_type and field.message_type.full_name == "google.protobuf.Timestamp":
            result[field.name] = value.ToJsonString()
        elif field.message_type:
            result[field.name] = _to_dict(value)
        elif field.enum_type:
            known = field.enum_type.values_by_number.get(value)  # a newer server has more
            result[field.name] = None if value == 0 else known.name if known else str(value)
        else:
            result[field.name] = list(value) if field.is_repeated else value
    return result


def _describe(job: worker_pb.Job) -> str:
    """What `status` prints."""
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


def _state(fields: dict[str, Any]) -> str:
    status = str(fields["status"])
    if fields["end_reason"] is None:
        return status
    reason = {
        "EXITED": f"exited with code {fields['exit_code']}",
        "SIGNALLED": f"killed by {_signal_name(fields['signal'])}",
    }.get(fields["end_reason"], fields["end_reason"].lower().replace("_", " "))
    return f"{status} ({reason})"


def _signal_name(number: int | None) -> str:
    try:
        return signal.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


def _moment(text: str | None) -> str:
    return text[:19].replace("T", " ") + " UTC" if text else "-"


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
        # The rest of a line that wraps would look like another row.
        print(line if columns is None else _cut(line, columns))


def _shown(text: str) -> str:
    """Return what stdout makes of it: an escape of what its encoding does not have."""
    encoding = sys.stdout.encoding
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def _width(text: str) -> int:
    """How many cells of a terminal it takes at most."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(character: str) -> int:
    import unicodedata

    if character == "\N{VARIATION SELECTOR-16}":
        return 1  # there are terminals where it makes the character before it wide
    if unicodedata.category(character) in {"Mn", "Me"}:  # drawn onto the one before
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def _cut(text: str, width: int) -> str:
    """Return as much of the beginning as `width` cells have room for."""
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
    """One file a server, so that no server is ever sent another's token. Raises OSError."""
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
    # mkstemp makes it 0600; the name appears with all of the token behind it.
    fd, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(fd, "w") as file:
        file.write(token)
    os.replace(temporary, path)


def _forget_token(server: str, token: str) -> None:
    """Delete the kept token if it is this one."""
    # What cannot be read is not kept; what cannot be deleted is worthless.
    with contextlib.suppress(OSError):
        if _read_token(server) == token:
            _token_path(server).unlink()


def _read_token(server: str) -> str:
    # What somebody else put there must not stop us before we can say that it is no token.
    return _token_path(server).read_text(encoding="ascii", errors="replace")


def find_token(arguments: argparse.Namespace) -> str:
    """Return the token that is meant: given, in the environment, or kept. Raises ClientError."""
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
            password = sys.stdin.readline().rstrip("\n")
        password.encode()
    except EOFError:
        raise ClientError("no password was given") from None
    except UnicodeError:  # which has the password in it
        raise ClientError("the password is not valid UTF-8") from None
    return password


def _logout(client: Client, arguments: argparse.Namespace) -> None:
    token = client.token
    try:
        client.logout()
    except ClientError as error:
        if error.code != "UNAUTHENTICATED":
            raise
        # Not a success: with another certificate it may still be good.
        _forget_token(arguments.server, token)
        raise ClientError(
            "the server does not accept this token (any more), or not with this client "
            "certificate; so there was nothing to log out of",
            error.code,
        ) from error
    _forget_token(arguments.server, token)


def _start(client: Client, arguments: argparse.Namespace) -> None:
    limits = {name: getattr(arguments, name) for name in LIMIT_FIELDS}
    print(printable(client.start(arguments.command, arguments.args, **limits)))


def _stop(client: Client, arguments: argparse.Namespace) -> None:
    print(_state(_to_dict(client.stop(arguments.job))))


def _status(client: Client, arguments: argparse.Namespace) -> None:
    job = client.status(arguments.job)
    if arguments.json:
        _print_json(_to_dict(job))
    else:
        print(_describe(job))


def _stream(client: Client, arguments: argparse.Namespace) -> None:
    offset = arguments.offset
    try:
        for data in client.stream(arguments.job, offset):
            left = memoryview(data)
            while left:  # with PYTHONUNBUFFERED a write may be a partial one
                left = left[sys.stdout.buffer.write(left) :]
            sys.stdout.buffer.flush()
            offset += len(data)
    except ClientError as error:
        if error.code == "UNAVAILABLE" and offset > arguments.offset:
            message = f"{error}; to go on where this broke off: --offset {offset}"
            raise ClientError(message, error.code) from error
        raise


def _remove(client: Client, arguments: argparse.Namespace) -> None:
    client.remove(arguments.job)


def _list(client: Client, arguments: argparse.Namespace) -> None:
    jobs = client.list()
    if arguments.json:
        _print_json([_to_dict(job) for job in jobs])
    else:
        _print_table(jobs)


COMMANDS: dict[str, Callable[[Client, argparse.Namespace], None]] = {
    "login": _login,
    "logout": _logout,
    "start": _start,
    "stop": _stop,
    "status": _status,
    "stream": _stream,
    "remove": _remove,
    "list": _list,
}
