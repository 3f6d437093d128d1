"""The subcommand `list`: a table of jobs, their IDs or JSON, once or with every change.

The table fits the terminal: a name, owner, node or command that takes too much room is cut. If jobs
have run on a cluster, there is a column for the node. With --watch the table is drawn again in
place. If stdout is no terminal, nothing is cut.

Threads: the main thread draws. With --watch on a terminal a thread waits for events and passes
them on; it ends when the main thread closes the call.
"""

from __future__ import annotations

import os
import sys
import time

from connection import ClientError
from display import command_line, cut, print_json_line, shown, state_of, to_dict, width
from selecting import conditions_of

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from queue import SimpleQueue
    from typing import Any

    import workerservice_pb2 as worker_pb
    from connection import Client
    from jobevents import JobEvents

__all__ = ["list_jobs"]

_HEADER = (
    *("ID", "NAME", "OWNER", "NODE", "STATUS"),
    *("EXIT", "AGE", "CPU", "MEMORY", "OUTPUT", "COMMAND"),
)
_CUT = _HEADER.index("NAME"), _HEADER.index("OWNER"), _HEADER.index("NODE")
_NODE, _AGE, _COMMAND = _HEADER.index("NODE"), _HEADER.index("AGE"), _HEADER.index("COMMAND")
_SHORT_ID = 8
_LEAST_NAME = 8  # cells that a name, an owner or a node keeps in a narrow terminal
_LEAST_COMMAND = 20  # cells of the command for which the others are cut
_ONE_DIGIT = 10  # smaller numbers are shown with a digit after the point
_ROUND = 1000  # larger sizes are shown in the next unit
_REFRESH_S = 2.0  # how often --watch asks for the usage of running jobs
_COLOURS = {"QUEUED": "\x1b[36m", "RUNNING": "\x1b[32m", "STOPPED": "\x1b[33m"}
_FAILED, _BOLD, _PLAIN = "\x1b[31m", "\x1b[1m", "\x1b[0m"
_OPEN_SCREEN, _CLOSE_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
_EXITS = {
    "OUT_OF_MEMORY": "OOM",
    "HOST_OUT_OF_MEMORY": "OOM",
    "TIMED_OUT": "timeout",
    "SERVER_SHUTDOWN": "shutdown",
    "LOST": "lost",
    "NODE_FAILED": "node failed",
    "CANCELLED": "cancelled",
}


def list_jobs(client: Client, arguments: argparse.Namespace) -> None:
    """Print the jobs that the arguments pick, newest last; with --watch go on until Ctrl-C."""
    conditions = conditions_of(arguments) | {"statuses": arguments.statuses}
    if arguments.watch and sys.stdout.isatty() and not (arguments.json or arguments.quiet):
        _Screen(client, arguments, conditions).run()
    elif arguments.watch:
        _print_events(client, arguments, conditions)
    else:
        is_table = not (arguments.json or arguments.quiet)
        jobs = client.list(limit=arguments.limit, live_usage=not arguments.quiet, **conditions)
        for job in jobs:
            if arguments.quiet:
                print(shown(job.job_id))
            elif arguments.json:
                print_json_line(to_dict(job))
        if is_table:
            print("\n".join(_table(jobs, _columns())))


def _print_events(
    client: Client, arguments: argparse.Namespace, conditions: dict[str, Any]
) -> None:
    """Print a line for each job that is there and for each change, until Ctrl-C."""
    events = client.watch(**conditions)
    try:
        for event in events:
            kind = str(to_dict(event)["kind"])
            if arguments.json:
                print_json_line(to_dict(event))
            elif arguments.quiet:
                print(shown(event.job.job_id))
            else:
                job = event.job
                cells = (job.job_id, f"{kind.lower():<7}", job.owner, state_of(to_dict(job)))
                print(shown("  ".join([*cells, job.name or "-", command_line(job)])))
            sys.stdout.flush()
    finally:
        events.close()


# --- the table --------------------------------------------------------------------------


def _columns() -> int | None:
    """Return how wide the terminal is; None if stdout is none."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _has_colour() -> bool:
    # Source: no-color.org.
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def _table(
    jobs: Sequence[worker_pb.Job],
    columns: int | None,
    shares: dict[str, float] | None = None,
) -> list[str]:
    """Return the lines of the table. `shares`: show these parts of a CPU instead of CPU time."""
    length = _length_of_ids(jobs)
    rows = [_HEADER, *(_row(to_dict(job), job, length, shares) for job in jobs)]
    widths = [max(width(row[i]) for row in rows) for i in range(_COMMAND)]
    if not any(job.node for job in jobs):
        widths[_NODE] = 0  # without a cluster, or before a job has run on it
    if columns is not None:
        for i in _CUT:
            missing = sum(widths) + 2 * len(widths) + _LEAST_COMMAND - columns
            if missing > 0:
                least = min(widths[i], _LEAST_NAME)
                widths[i] = max(least, widths[i] - missing)
    lines = [_line(row, widths) for row in rows]
    if columns is not None:
        lines = [cut(line, columns) for line in lines]
    if not _has_colour():
        return lines
    colours = [_BOLD, *map(_colour, jobs)]
    return [
        f"{colour}{line}{_PLAIN}" if colour else line
        for colour, line in zip(colours, lines, strict=True)
    ]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = []
    for i, room in enumerate(widths):
        if not room:
            continue
        cell = cut(row[i], room)
        padding = " " * (room - width(cell))
        cells.append(padding + cell if i >= _AGE else cell + padding)
    return "  ".join([*cells, row[_COMMAND]])


def _length_of_ids(jobs: Sequence[worker_pb.Job]) -> int:
    """Return how many characters of the IDs tell these jobs apart."""
    ids = {job.job_id for job in jobs}
    length = _SHORT_ID
    while len({job_id[:length] for job_id in ids}) < len(ids):
        length += 1
    return length


def _row(
    fields: dict[str, Any], job: worker_pb.Job, length: int, shares: dict[str, float] | None
) -> tuple[str, ...]:
    usage = fields["usage"] or {}
    cpu_s = (usage.get("cpu_user_s") or 0) + (usage.get("cpu_system_s") or 0)
    cpu = _duration(cpu_s) if usage.get("cpu_user_s") is not None else "-"
    if shares is not None and job.job_id in shares:
        cpu = f"{shares[job.job_id]:.0%}"
    memory = usage.get("memory_bytes")
    memory = usage.get("memory_peak_bytes") if memory is None else memory
    cells = (
        job.job_id[:length],
        job.name,
        job.owner,
        job.node or "-",
        str(fields["status"] or "-"),
        _exit(fields),
        _duration(int(time.time()) - job.started_at.seconds),
        cpu,
        "-" if memory is None else _size(memory),
        _size(job.output_bytes),
        command_line(job),
    )
    return tuple(map(shown, cells))


def _exit(fields: dict[str, Any]) -> str:
    """Return in a word how the job ended."""
    reason = fields["end_reason"]
    if reason is None:
        return "-"
    if reason in _EXITS:
        return _EXITS[reason]
    if fields["signal"] is not None:
        import signal

        try:
            return signal.Signals(fields["signal"]).name
        except ValueError:
            return f"signal {fields['signal']}"
    return str(fields["exit_code"]) if fields["exit_code"] is not None else str(reason).lower()


def _colour(job: worker_pb.Job) -> str:
    fields = to_dict(job)
    if fields["status"] == "FINISHED":
        return "" if fields["exit_code"] == 0 else _FAILED
    return _COLOURS.get(str(fields["status"]), "")


def _duration(seconds: float) -> str:
    """Return a duration in a few characters."""
    seconds = max(0.0, seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    digits = 0 if seconds >= _ONE_DIGIT or seconds == int(seconds) else 1
    return f"{seconds:.{digits}f}s"


def _size(number: float) -> str:
    """Return a size in up to five characters."""
    unit = ""
    for larger in "KMGT":
        if number < _ROUND:
            break
        number, unit = number / 1024, larger
    return f"{number:.1f}{unit}" if unit and number < _ONE_DIGIT else f"{number:.0f}{unit}"


# --- the table that is drawn again ------------------------------------------------------


class _Screen:
    """The table on a terminal, drawn again when something has happened, and every two seconds."""

    def __init__(
        self, client: Client, arguments: argparse.Namespace, conditions: dict[str, Any]
    ) -> None:
        self._client = client
        self._limit: int | None = arguments.limit
        self._server: str = arguments.server
        self._conditions = conditions
        self._jobs: dict[str, worker_pb.Job] = {}  # in the order of their starts
        self._shares: dict[str, float] = {}  # the part of a CPU that a job has used
        self._cpu_s: dict[str, tuple[float, float]] = {}  # when it was read, and CPU time

    def run(self) -> None:
        """Draw until Ctrl-C (KeyboardInterrupt). Raises `ClientError`."""
        import threading
        from queue import Empty, SimpleQueue

        queue: SimpleQueue[worker_pb.JobEvent | ClientError] = SimpleQueue()
        events = self._client.watch(**self._conditions)
        reader = threading.Thread(target=_pass_on, args=(events, queue), name="watch", daemon=True)
        reader.start()
        sys.stdout.write(_OPEN_SCREEN)
        try:
            refresh_s = time.monotonic()
            while True:
                if time.monotonic() >= refresh_s:
                    self._read_usage()
                    refresh_s = time.monotonic() + _REFRESH_S
                self._draw()
                try:
                    self._apply(queue.get(timeout=max(0.0, refresh_s - time.monotonic())))
                    while True:
                        self._apply(queue.get_nowait())
                except Empty:
                    pass
        finally:
            sys.stdout.write(_CLOSE_SCREEN)
            sys.stdout.flush()
            events.close()
            reader.join()

    def _apply(self, event: worker_pb.JobEvent | ClientError) -> None:
        if isinstance(event, ClientError):
            raise event
        fields = to_dict(event)
        job = event.job
        statuses = self._conditions["statuses"]
        if fields["kind"] == "REMOVED" or (statuses and fields["job"]["status"] not in statuses):
            self._jobs.pop(job.job_id, None)
        else:
            self._jobs[job.job_id] = job
        self._shares.pop(job.job_id, None)

    def _read_usage(self) -> None:
        """Read the usage of the running jobs that are shown."""
        if self._conditions["statuses"] and "RUNNING" not in self._conditions["statuses"]:
            return
        running = self._conditions | {"statuses": ["RUNNING"]}
        now = time.monotonic()
        before, self._cpu_s = self._cpu_s, {}
        try:
            jobs = self._client.list(limit=self._limit, live_usage=True, **running)
        except ClientError as error:
            if not error.may_pass:
                raise
            return  # the watch tries for longer
        for job in jobs:
            if job.job_id not in self._jobs:
                continue  # its event will come
            self._jobs[job.job_id] = job
            if job.usage.HasField("cpu_user_s"):
                cpu_s = job.usage.cpu_user_s + job.usage.cpu_system_s
                self._cpu_s[job.job_id] = now, cpu_s
                if job.job_id in before:
                    then, used_s = before[job.job_id]
                    self._shares[job.job_id] = max(0.0, cpu_s - used_s) / (now - then)

    def _draw(self) -> None:
        import shutil

        size = shutil.get_terminal_size()
        jobs = list(self._jobs.values())
        jobs = jobs[-self._limit :] if self._limit else jobs
        running = sum(_is_running(job) for job in jobs)
        title = (
            f"{self._server}  {running} running, {len(jobs) - running} ended  "
            f"{time.strftime('%H:%M:%S')}  Ctrl-C ends this"
        )
        lines = [cut(shown(title), size.columns)]
        lines += _table(_most_important(jobs, size.lines - 2), size.columns, self._shares)
        text = f"{_CLEAR_LINE}\n".join(lines[: size.lines])
        sys.stdout.write(f"{_HOME}{text}{_CLEAR_LINE}{_CLEAR_REST}")
        sys.stdout.flush()


def _pass_on(events: JobEvents, queue: SimpleQueue[worker_pb.JobEvent | ClientError]) -> None:
    try:
        for event in events:
            queue.put(event)
    except ClientError as error:
        queue.put(error)


def _is_running(job: worker_pb.Job) -> bool:
    return bool(to_dict(job)["status"] in {"QUEUED", "RUNNING"})


def _most_important(jobs: Sequence[worker_pb.Job], room: int) -> list[worker_pb.Job]:
    """Return up to `room` jobs: the newest of those that run, then the newest of the others."""
    if len(jobs) <= room:
        return list(jobs)
    important = sorted(jobs, key=_is_running)  # stable: the last ones are the newest that run
    chosen = {job.job_id for job in important[len(jobs) - max(0, room) :]}
    return [job for job in jobs if job.job_id in chosen]
