"""The table of jobs in the store: a row for each job that runs or is kept.

    table = JobTable(store)
    table.begin(job_id, work, limits=limits, started_at=now)      # before the command executes
    table.end(final, output_state)                                # before anybody knows of the end
    row = table.get(job_id)
    for row in table.page(JobFilter(owner="alice")): ...
    table.delete(job_id)

A row has all that `Job` has, and what a later process needs to go on with a job that runs
(`Row.going_on`). `running` returns the rows of jobs that have not ended: at the start of a process,
those that ran when the former one ended.

The start of a job is refused if its row cannot be written. An end and a removal must not fail: if
the store cannot be written, they stay in memory, a line is logged, and each later write tries
again. Until then every method answers as if they had been written. If the process ends before, the
next one takes such a job for one that ran, or for one that was not removed. With a restart window
the fork server keeps the end (`is_written`), and the next process records it.

Thread safety: any thread may call anything.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import threading
import time
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from errors import StoreError
from finding import EVERY_JOB
from jobstate import STOPS, EndReason, Job, Status, UsageSource
from limits import Limits, Usage
from outputerrors import Gap
from outputstate import OutputState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from finding import JobFilter
    from jobstate import Work
    from store import Store

__all__ = ["GoingOn", "JobTable", "Row"]

logger = logging.getLogger(__name__)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_COLUMNS = (
    "position, job_id, owner, name, labels, status, started_us, ended_us, end_number, "
    "output_bytes, argv_bytes, start, finish"
)
_START = _COLUMNS.split(", ").index("start")
_SELECT = f"SELECT {_COLUMNS} FROM jobs"  # noqa: S608 -- our own names
# The job with this ID or, if there is none, the one with the next ID; after the last one, the last.
# To read this row takes the same time whether there is a job with this ID or not.
_NEAREST = (
    "position = (SELECT position FROM jobs "
    "WHERE job_id >= min(:job_id, (SELECT max(job_id) FROM jobs)) ORDER BY job_id LIMIT 1)"
)
_NOT_GONE = "job_id NOT IN (SELECT value FROM json_each(:gone))"
_LIMITS = [field.name for field in fields(Limits)]
_USAGE = [field.name for field in fields(Usage)]

_FIND = {
    # The range of IDs that begin with a text: "g" comes after every digit of an ID.
    "job_ids": "position IN (SELECT found.position FROM json_each(:job_ids) AS part JOIN jobs "
    "AS found ON found.job_id >= part.value AND found.job_id < part.value || 'g')",
    "labels": "NOT EXISTS (SELECT 1 FROM json_each(:labels) AS wanted WHERE NOT EXISTS (SELECT 1 "
    "FROM json_each(jobs.labels) AS it WHERE it.key = wanted.key AND it.value = wanted.value))",
    "owner": "owner = :owner",
    "name": "name = :name",
    "since": "started_us >= :since",
    "statuses": "status IN (SELECT value FROM json_each(:statuses))",
}


class GoingOn(NamedTuple):
    """What a process needs beside `Job` to go on with a job that runs."""

    uid: int | None
    grace: float
    linger: float
    has_cgroup: bool
    has_input: bool
    started_s: float | None = None  # by `time.monotonic`; None in a row of an earlier version


class Row(NamedTuple):
    """A job as the table has it."""

    position: int
    """In the order of all starts."""
    job: Job
    """Without subscribers. Of a job that runs: without output and usage."""
    number: int | None
    """In the order of all ends; None for a job that runs."""
    argv_bytes: int
    """The memory that Python needs for its argv, name and labels."""
    output: OutputState
    """Without the times: `JobTable.times`."""
    going_on: GoingOn


class JobTable:
    """The table `jobs` of a store, which the creator of this object closes. Raises `StoreError`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # Guards all below. Held while the store is written. No lock but the store's is taken then.
        self._lock = threading.Lock()
        self._last_position: int
        self._last_number: int
        ((self._last_position, self._last_number),) = store.query(
            "SELECT coalesce(max(position), 0), coalesce(max(end_number), 0) FROM jobs"
        )
        # What could not be written, by job: the values of its end, or None for its removal. It is
        # replaced as a whole. A reader takes it without the lock, before it queries the store: what
        # is written in between is then found in both, and not in neither.
        self._unwritten: dict[str, dict[str, Any] | None] = {}

    @property
    def is_kept(self) -> bool:
        """Whether the jobs survive this process."""
        return self._store.is_kept

    @property
    def store_id(self) -> str:
        """The instance ID of the store."""
        return self._store.instance_id

    @property
    def last_position(self) -> int:
        """The position of the latest start."""
        return self._last_position

    @property
    def last_number(self) -> int:
        """The number of the latest end."""
        return self._last_number

    # --- writing ----------------------------------------------------------------------------

    def begin(  # noqa: PLR0913 -- what a start knows
        self,
        job_id: str,
        work: Work,
        *,
        limits: Limits,
        started_at: datetime,
        kept_tmp: str = "",
        has_cgroup: bool = False,
    ) -> int:
        """Record a job that is about to execute; return its position. Raises `StoreError`."""
        names = (work.name, *work.labels, *work.labels.values()) if work.name or work.labels else ()
        args = tuple(work.argv[1:])
        times = work.ending
        start = {
            "argv": work.argv,
            "directory": work.directory,
            "tmp": kept_tmp,
            "limits": _values(limits, _LIMITS),
            "timeout": times.timeout,
            "going_on": (work.uid, times.grace, times.linger, has_cgroup, work.stdin),
            "started_s": time.monotonic(),
        }
        values = {
            "job_id": job_id,
            "owner": work.owner,
            "name": work.name,
            "labels": json.dumps(dict(work.labels)) if work.labels else "{}",
            "status": Status.RUNNING.value,
            "started_us": _microseconds(started_at),
            "argv_bytes": sum(map(sys.getsizeof, (work.argv[0], args, *args, *names))),
            "request_id": work.request_id or None,
            "digest": work.digest or None,
            "start": json.dumps(start),
        }
        with self._lock:
            self._catch_up_locked()
            # The time and not a number, so that a user to whom it is shown does not learn how many
            # jobs the others have started.
            self._last_position = max(self._last_position + 1, time.time_ns())
            position = self._last_position
            self._store.execute(_INSERT, values | {"position": position})
            return position

    def end(self, job: Job, output: OutputState) -> None:
        """Record the end of a job. Never raises."""
        usage = job.usage
        finish: dict[str, Any] = {
            "reason": (job.end_reason or EndReason.LOST).value,
            "stop_reason": job.stop_reason,
            "exit": (job.exit_code, job.signal, job.may_have_escaped, job.killed_after_exit),
            "usage": _values(usage, _USAGE) if usage else None,
            "source": job.usage_source.value if job.usage_source else None,
            "input": (job.input_bytes, job.input_ended),
            "gap": output.gap,
            "failure": output.failure,
            "taken": output.taken,
            "filed": output.filed,
        }
        if job.node or job.reason:
            limits = _values(job.limits, _LIMITS)
            finish["cluster"] = job.node, job.reason, _microseconds(job.started_at), limits
        values = {
            "job_id": job.job_id,
            "status": job.status.value,
            "ended_us": _microseconds(job.ended_at or _EPOCH),
            "output_bytes": output.size,
            "finish": json.dumps(finish),
            "times": output.times,
        }
        with self._lock:
            self._last_number += 1
            values["end_number"] = self._last_number
            try:
                self._catch_up_locked()
                self._store.execute(_END, values)
            except StoreError as error:
                self._keep_locked(job.job_id, values, error)

    def end_lost(self, left_by: Callable[[str], OutputState]) -> None:
        """Record that the jobs which ran when a former process ended are LOST.

        `left_by`: returns what is there of the output of a job.
        """
        for row in self.running():
            self._give_up(row, EndReason.LOST, left_by(row.job.job_id))

    def give_up(self, job_id: str, reason: EndReason) -> None:
        """Record, if there is a row of a job, that it has ended without output.

        Raises `StoreError`.
        """
        row = self.get(job_id)
        if row is not None:
            self._give_up(row, reason, OutputState(0))

    def _give_up(self, row: Row, reason: EndReason, output: OutputState) -> None:
        final = replace(
            row.job,
            status=Status.STOPPED if reason in STOPS else Status.FINISHED,
            end_reason=reason,
            ended_at=max(datetime.now(UTC), row.job.started_at),  # the clock may have been set back
            output_bytes=output.size,
            may_have_escaped=not row.going_on.has_cgroup,
        )
        self.end(final, output)

    def delete(self, job_id: str) -> None:
        """Forget a job, if there is one. Never raises."""
        with self._lock:
            try:
                self._catch_up_locked()
                self._store.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))
            except StoreError as error:
                self._keep_locked(job_id, None, error)

    def catch_up(self) -> None:
        """Write what could not be written before, if anything. Never raises."""
        with self._lock:
            self._try_locked()

    def _keep_locked(self, job_id: str, end: dict[str, Any] | None, error: StoreError) -> None:
        self._unwritten = self._unwritten | {job_id: end}
        logger.critical(
            "the %s of job %s is NOT IN THE STORE: %s. A restart would not know of it; the next "
            "write tries again",
            *("removal" if end is None else "end", job_id, error),
        )

    def _try_locked(self) -> None:
        try:
            self._catch_up_locked()
        except StoreError as error:
            logger.error("%d ends of jobs are not in the store: %s", len(self._unwritten), error)

    def _catch_up_locked(self) -> None:
        """Write what could not be written before. Raises `StoreError`."""
        if not self._unwritten:
            return
        ends = [values for values in self._unwritten.values() if values is not None]
        gone = [(job_id,) for job_id, values in self._unwritten.items() if values is None]
        self._store.write([("DELETE FROM jobs WHERE job_id = ?", gone), (_END, ends)])
        self._unwritten = {}

    # --- reading ----------------------------------------------------------------------------

    def is_written(self, job_id: str) -> bool:
        """Whether nothing of this job waits for a store that can be written."""
        return job_id not in self._unwritten

    def has(self, job_id: str) -> bool:
        """Whether there is a row of this job. Raises `StoreError`."""
        return bool(self._store.query("SELECT 1 FROM jobs WHERE job_id = ?", (job_id,)))

    def keeps_tmp(self, job_id: str) -> bool:
        """Whether this job has ended, and its TMPDIR is kept with it. Raises `StoreError`."""
        row = self.get(job_id)
        return row is not None and row.number is not None and bool(row.job.tmp_directory)

    def owner(self, job_id: str) -> str | None:
        """Return whose job it is; None if there is no row of it. Raises `StoreError`.

        Takes the same time whether there is a row or not.
        """
        is_removed = self._unwritten.get(job_id, {}) is None
        sql = f"SELECT job_id, owner FROM jobs WHERE {_NEAREST}"  # noqa: S608 -- our own names
        rows = self._store.query(sql, {"job_id": job_id})
        is_there = bool(rows) and rows[0][0] == job_id and not is_removed
        return rows[0][1] if is_there else None

    def get(self, job_id: str, owner: str | None = None) -> Row | None:
        """Return the row of a job; None if there is none. Raises `StoreError`.

        `owner`: only a row of this owner. Then a row of somebody else takes the same time as none.
        """
        where = "job_id = :job_id"
        if owner is not None:
            where += f" AND owner = :owner AND {_NEAREST}"
        return self._first(where, {"job_id": job_id, "owner": owner})

    def page(
        self,
        matching: JobFilter = EVERY_JOB,
        *,
        after: int = 0,
        up_to: int | None = None,
        newest_first: bool = False,
        most: int = 100,
    ) -> list[Row]:
        """Return up to `most` rows that a filter picks, in the order of the starts.

        Those whose position is above `after`, and not above `up_to`. `newest_first`: in the
        opposite order, those below `after`; 0 means all. The status may have changed since.
        """
        unwritten = self._unwritten
        wanted: dict[str, Any] = {"most": most, "after": after, "up_to": up_to}
        wanted["owner"], wanted["name"] = matching.owner, matching.name
        wanted["since"] = None if matching.since is None else _microseconds(matching.since)
        wanted["labels"] = json.dumps(dict(matching.labels)) if matching.labels else None
        wanted["job_ids"] = json.dumps(sorted(matching.job_ids)) if matching.job_ids else None
        statuses = [status.value for status in matching.statuses]
        if Status.QUEUED in matching.statuses:
            statuses.append(Status.RUNNING.value)  # the row of a job that waits has this one
        wanted["statuses"] = json.dumps(statuses) if statuses and not unwritten else None
        conditions = [sql for name, sql in _FIND.items() if wanted[name] is not None]
        if newest_first:
            conditions += ["position < :after"] if after else []
        else:
            conditions.append("position > :after")
        conditions += ["position <= :up_to"] if up_to is not None else []
        order = "DESC" if newest_first else "ASC"
        where = " AND ".join(conditions) or "TRUE"
        where += f" ORDER BY position {order} LIMIT :most"
        names = {name: value for name, value in wanted.items() if value is not None}
        return self._rows(where, names, unwritten)

    def running(self) -> list[Row]:
        """Return the rows of all jobs that have not ended."""
        rows = self._rows("end_number IS NULL ORDER BY position", {}, self._unwritten)
        return [row for row in rows if row.number is None]

    def oldest(self, owner: str | None = None) -> Row | None:
        """Return the job that ended first, of all or of an owner's."""
        if owner is None:
            return self._first("end_number IS NOT NULL ORDER BY end_number LIMIT 1")
        of_owner = "owner = :owner AND end_number IS NOT NULL ORDER BY end_number LIMIT 1"
        return self._first(of_owner, {"owner": owner})

    def with_output(self, owner: str, but: Sequence[str]) -> Row | None:
        """Return the owner's job that ended first of those with output; none of the IDs `but`."""
        return self._first(
            "owner = :owner AND end_number IS NOT NULL AND output_bytes > 0 AND job_id NOT IN "
            "(SELECT value FROM json_each(:but)) ORDER BY end_number LIMIT 1",
            {"owner": owner, "but": json.dumps(list(but))},
        )

    def amounts(self) -> list[tuple[str, int, int, int, int]]:
        """Return of each owner: how many finished jobs, their output, argv, and what they take."""
        return self._store.query(
            "SELECT owner, count(*), sum(output_bytes), sum(argv_bytes), "
            "sum(json_extract(finish, '$.taken')) FROM jobs WHERE end_number IS NOT NULL "
            "GROUP BY owner"
        )

    def times(self, job_id: str) -> bytes | None:
        """Return the times of the output of a job that has ended; None if there is no such job."""
        unwritten = self._unwritten.get(job_id, {})
        rows = self._store.query("SELECT times FROM jobs WHERE job_id = ?", (job_id,))
        if unwritten is None or not rows:
            return None
        times: bytes = unwritten.get("times") or rows[0][0] or b""
        return times

    def of_request(self, owner: str, request_id: str) -> tuple[str, bytes] | None:
        """Return the job that was started with this request ID, and the digest of the request."""
        gone = [job_id for job_id, end in self._unwritten.items() if end is None]
        rows = self._store.query(
            "SELECT job_id, digest FROM jobs WHERE owner = ? AND request_id = ?",
            (owner, request_id),
        )
        return next(((job_id, digest) for job_id, digest in rows if job_id not in gone), None)

    def _first(self, where: str, values: dict[str, Any] | None = None) -> Row | None:
        return next(iter(self._rows(where, values or {}, self._unwritten)), None)

    def _rows(
        self, where: str, values: dict[str, Any], unwritten: dict[str, dict[str, Any] | None]
    ) -> list[Row]:
        """Return the rows that are found, as if `unwritten` had been written.

        A removed row is left out by the query and not afterwards, so that it takes the place of no
        other one in a LIMIT.
        """
        gone = [job_id for job_id, end in unwritten.items() if end is None]
        if gone:
            where = f"{_NOT_GONE} AND {where}"
            values = values | {"gone": json.dumps(gone)}
        rows = []
        for columns in self._store.query(f"{_SELECT} WHERE {where}", values):
            if end := unwritten.get(columns[1]):
                fixed = dict(zip(_COLUMNS.split(", "), columns, strict=True)) | end
                rows.append(_row(tuple(fixed[name] for name in _COLUMNS.split(", "))))
            else:
                rows.append(_row(columns))
        return rows


_INSERT = (
    "INSERT INTO jobs (position, job_id, owner, name, labels, status, started_us, argv_bytes, "
    "request_id, digest, start) VALUES (:position, :job_id, :owner, :name, :labels, :status, "
    ":started_us, :argv_bytes, :request_id, :digest, :start)"
)
_END = (
    "UPDATE jobs SET status = :status, ended_us = :ended_us, end_number = :end_number, "
    "output_bytes = :output_bytes, finish = :finish, times = :times WHERE job_id = :job_id"
)


def _values(figures: object, names: Sequence[str]) -> list[Any]:
    return [getattr(figures, name) for name in names]


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def _time(microseconds: int) -> datetime:
    return _EPOCH + microseconds * _MICROSECOND


def _row(columns: tuple[Any, ...]) -> Row:
    """Raises `StoreError` for a row that this program has not written."""
    try:
        decode = _known if len(columns[_START]) < _SHORT else _decode
        return decode(*columns)
    except (ValueError, LookupError, TypeError) as error:
        raise StoreError(
            f"the store has a damaged row of job {columns[1]!r}: {error}; restore the store from a "
            "backup, or remove the job"
        ) from error


def _decode(  # noqa: PLR0913, PLR0917 -- the columns of the table
    position: int,
    job_id: str,
    owner: str,
    name: str,
    labels: str,
    status: str,
    started_us: int,
    ended_us: int | None,
    number: int | None,
    output_bytes: int,
    argv_bytes: int,
    start_json: str,
    finish_json: str | None,
) -> Row:
    start = json.loads(start_json)
    going_on = GoingOn(*start["going_on"])._replace(started_s=start.get("started_s"))
    command, *args = start["argv"]
    known: dict[str, Any] = {
        "job_id": job_id,
        "owner": owner,
        "command": command,
        "args": tuple(args),
        "status": Status(status),
        "started_at": _time(started_us),
        "output_bytes": output_bytes,
        "limits": _limits(*start["limits"]),
        "working_directory": start["directory"],
        "tmp_directory": start["tmp"],
        "name": name,
        "labels": json.loads(labels) if labels != "{}" else {},
        "input_bytes": 0 if going_on.has_input else None,
        "timeout": start["timeout"],
    }
    output = OutputState(output_bytes)
    if finish_json is not None and ended_us is not None:
        finish = json.loads(finish_json)
        output = _output_state(output_bytes, finish)
        known |= _end_of(finish, output) | {"ended_at": _time(ended_us)}
    job = Job(**(_NOT_ENDED | known))
    return Row(position, job, number, argv_bytes, output, going_on)


# Clients ask again and again for the same jobs. Only short rows, so that it takes at most 1 MiB.
_known = functools.lru_cache(maxsize=128)(_decode)
_SHORT = 2048

_NOT_ENDED: dict[str, Any] = {
    "end_reason": None,
    "stop_reason": "",
    "exit_code": None,
    "signal": None,
    "ended_at": None,
    "output_lost_bytes": 0,
    "subscribers": (),
    "usage": None,
    "usage_source": None,
}

# Most jobs have the same limits. Making them anew is half of the work of reading a row.
_limits = functools.lru_cache(maxsize=256)(Limits)


def _output_state(size: int, finish: dict[str, Any]) -> OutputState:
    gap = Gap(*finish["gap"]) if finish["gap"] else None
    failure = (finish["failure"][0], finish["failure"][1]) if finish["failure"] else None
    return OutputState(size, gap, failure, finish["taken"], filed=finish["filed"])


def _end_of(finish: dict[str, Any], output: OutputState) -> dict[str, Any]:
    """Return the fields of `Job` that tell of the end."""
    exit_code, signal, may_have_escaped, killed_after_exit = finish["exit"]
    input_bytes, input_ended = finish["input"]
    cluster: dict[str, Any] = {}
    if "cluster" in finish:
        node, reason, started_us, limits = finish["cluster"]
        cluster = {"node": node, "reason": reason, "limits": _limits(*limits)}
        cluster["started_at"] = _time(started_us)
    return cluster | {
        "end_reason": EndReason(finish["reason"]),
        "stop_reason": finish["stop_reason"],
        "exit_code": exit_code,
        "signal": signal,
        "output_lost_bytes": output.gap.length if output.gap else 0,
        "output_gap": output.gap,
        "usage": Usage(*finish["usage"]) if finish["usage"] else None,
        "usage_source": UsageSource(finish["source"]) if finish["source"] else None,
        "may_have_escaped": may_have_escaped,
        "killed_after_exit": killed_after_exit,
        "input_bytes": input_bytes,
        "input_ended": input_ended,
    }
