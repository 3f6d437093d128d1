"""How the command line shows jobs: in full, in a table, and as JSON.

A server is not trusted: text from it is shown without its control characters.

Thread safety: the functions keep nothing; any thread may call them.
"""

from __future__ import annotations

import shlex
import signal
import sys

from cli import printable
from units import format_size

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

    import workerservice_pb2 as worker_pb

__all__ = [
    "command_line",
    "cut",
    "describe",
    "print_json",
    "print_json_line",
    "shown",
    "state_of",
    "to_dict",
    "width",
]


def to_dict(message: Message) -> dict[str, Any]:
    """Return a message's fields by their proto names.

    An enum is its value's name without the prefix, like "RUNNING". Absent fields are None.
    """
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            result[field.name] = None
        elif field.message_type and field.message_type.GetOptions().map_entry:
            result[field.name] = dict(value)
        elif field.message_type and field.message_type.full_name == "google.protobuf.Timestamp":
            result[field.name] = _time(value)
        elif field.message_type and field.message_type.full_name == "google.protobuf.Duration":
            result[field.name] = value.seconds + value.nanos / 1e9
        elif field.message_type:
            result[field.name] = to_dict(value)
        elif field.enum_type:
            known = field.enum_type.values_by_number.get(value)  # None if the server is newer
            prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
            name = known.name.removeprefix(prefix) if known else str(value)
            result[field.name] = None if value == 0 else name
        else:
            result[field.name] = list(value) if field.is_repeated else value
    return result


def describe(job: worker_pb.Job) -> str:
    """Return what `status` prints of a job."""
    fields = to_dict(job)
    lines = {
        "job": job.job_id,
        **({"name": job.name} if job.name else {}),
        **({"labels": _labels(job)} if job.labels else {}),
        "owner": job.owner,
        "command": command_line(job),
        **({"directory": job.working_directory} if job.working_directory else {}),
        **({"tmp": job.tmp_directory} if job.tmp_directory else {}),
        "status": state_of(fields),
        **({"node": job.node} if job.node else {}),
        **({"reason": job.reason} if job.reason else {}),
        "started": _moment(fields["started_at"]),
        "ended": _moment(fields["ended_at"]),
        **({"input": _input(job.stdin)} if job.HasField("stdin") else {}),
        "output": _output(job),
        "subscribers": ", ".join(job.subscribers) or "-",
        "limits": _limits(fields["limits"]),
        "timeout": "none" if fields["timeout"] is None else f"{fields['timeout']:g} s",
        "used": _usage(fields["usage"]),
    }
    return "\n".join(f"{name:<12}{printable(value)}" for name, value in lines.items())


def _input(stdin: worker_pb.Input) -> str:
    return f"{stdin.bytes} bytes{', ended' if stdin.ended else ''}"


def _output(job: worker_pb.Job) -> str:
    lost = ""
    if job.output_lost_bytes:
        place = f", from byte {job.output_gap.offset} on," if job.HasField("output_gap") else ""
        lost = f" ({job.output_lost_bytes} more{place} were not kept)"
    return f"{job.output_bytes} bytes{lost}"


def state_of(job: dict[str, Any]) -> str:
    """Return how a job ended, or that it runs. `job`: the fields of `Job`."""
    status = str(job["status"])
    if job["end_reason"] is None:
        return status
    reason = {
        "EXITED": f"exited with code {job['exit_code']}",
        "SIGNALLED": f"killed by {_signal_name(job['signal'])}",
    }.get(job["end_reason"], job["end_reason"].lower().replace("_", " "))
    if count := job.get("killed_after_exit"):
        reason += f"; {count} of its processes went on and {'was' if count == 1 else 'were'} killed"
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


def _labels(job: worker_pb.Job) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(job.labels.items()))


def command_line(job: worker_pb.Job) -> str:
    """Return the command and its arguments, quoted for a shell."""
    return shlex.join([job.command, *job.args])


def shown(text: str) -> str:
    """Return the text with an escape for each character that stdout cannot encode."""
    encoding = sys.stdout.encoding
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def width(text: str) -> int:
    """Return how many cells of a terminal the text takes at most."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(character: str) -> int:
    import unicodedata

    if character == "\N{VARIATION SELECTOR-16}":
        return 1  # some terminals make the preceding character wide
    if unicodedata.category(character) in {"Mn", "Me"}:  # drawn onto the preceding character
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def cut(text: str, width: int) -> str:
    """Return the longest beginning of the text that fits into `width` cells."""
    for end, character in enumerate(text):
        width -= _cells(character)
        if width < 0:
            return text[:end]
    return text


def print_json_line(value: Any) -> None:
    """Print the value as JSON in one line."""
    import json

    print(json.dumps(value))


def print_json(value: Any) -> None:
    """Print the value as indented JSON."""
    import json

    print(json.dumps(value, indent=2))
