"""The RPCs about many jobs: ListJobs and WatchJobs.

    lists = Lists(worker, authenticator, quotas, untaken)
    answer = lists.page(request, call)
    for message in lists.watch(request, call):  # serialized
        ...

Threads: each method runs in its call's thread. A watch has its thread until it ends.
"""

from __future__ import annotations

import contextlib
import re
import threading
from datetime import UTC
from typing import TYPE_CHECKING

import auth
import workerservice_pb2 as worker_pb
from gate import SHOWN_CHARACTERS, BadRequestError, NotAllowedError
from jobmessages import STATUSES, job_message
from worker import JobEventKind, JobFilter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from auth import Authenticator, Identity
    from gate import Call
    from jobrunner import JobRunner
    from quotas import Quotas
    from untaken import Untaken
    from worker import Job, Watch

__all__ = ["Lists"]

# The largest page of a list. One job may exceed the bytes. gRPC's clients receive 4 MiB by default.
_PAGE_JOBS = 100
_PAGE_BYTES = 1024 * 1024
_MOST_JOB_IDS = 1000
_ID_LENGTH = 36

_STATUSES = {number: status for status, number in STATUSES.items()}
_KINDS = {
    JobEventKind.EXISTS: worker_pb.JOB_EVENT_KIND_EXISTS,
    JobEventKind.STARTED: worker_pb.JOB_EVENT_KIND_STARTED,
    JobEventKind.ENDED: worker_pb.JOB_EVENT_KIND_ENDED,
    JobEventKind.REMOVED: worker_pb.JOB_EVENT_KIND_REMOVED,
}


class Lists:
    """Answers the calls about many jobs. A user sees their own jobs, an admin all."""

    def __init__(
        self, jobs: JobRunner, authenticator: Authenticator, quotas: Quotas, untaken: Untaken
    ) -> None:
        self._worker = jobs
        self._authenticator = authenticator
        self._quotas = quotas
        self._untaken = untaken
        # Held while a call makes a page and counts the bytes of the page. Otherwise many calls of
        # one caller could find at the same time that few bytes are unread, and each make a page.
        self._listing = threading.Lock()

    def page(self, request: worker_pb.ListJobsRequest, call: Call) -> worker_pb.ListJobsResponse:
        """Return a page of the list."""
        most = request.page_size
        if most < 0:
            raise BadRequestError(f"page_size {most} is negative; 0 means {_PAGE_JOBS}")
        after = _position(request.page_token)
        found = self._worker.list_after(
            after,
            matching=_job_filter(request.filter, call.caller),
            live_usage=request.live_usage,
            newest_first=request.newest_first,
        )
        with self._listing:
            call.ticket.check_unread()
            answer = self._page(found, after, min(most or _PAGE_JOBS, _PAGE_JOBS))
            call.ticket.hold(answer.ByteSize())
        return answer

    def _page(
        self, found: Iterator[tuple[int, Job]], after: int, most: int
    ) -> worker_pb.ListJobsResponse:
        """Return up to `most` of the jobs found: one job, or at most _PAGE_BYTES of jobs."""
        answer = worker_pb.ListJobsResponse()
        size = 0
        for position, job in found:
            message = job_message(job)
            size += message.ByteSize()
            if answer.jobs and (len(answer.jobs) == most or size > _PAGE_BYTES):
                answer.next_page_token = f"{after:x}"
                break
            answer.jobs.append(message)
            after = position
        return answer

    def watch(self, request: worker_pb.WatchJobsRequest, call: Call) -> Iterator[bytes]:
        """Begin a watch and record the call; return a generator of serialized messages."""
        matching = _job_filter(request.filter, call.caller)
        with contextlib.ExitStack() as at_end:
            at_end.callback(self._quotas.stream(call.caller.name))
            watch = at_end.enter_context(self._worker.watch(matching))
            call.record()
            missing = self._missing(request.filter.job_ids, call.caller)
            return self._events(watch, missing, at_end.pop_all(), call)

    def _missing(self, job_ids: Sequence[str], caller: Identity) -> list[str]:
        """Return the IDs of no job that the caller may see; shortened IDs are left out."""
        return [
            job_id
            for job_id in job_ids
            if len(job_id) == _ID_LENGTH and not caller.reaches(self._worker.owner(job_id.lower()))
        ]

    def _events(
        self, watch: Watch, missing: list[str], at_end: contextlib.ExitStack, call: Call
    ) -> Iterator[bytes]:
        with at_end:
            # If the client disconnects, gRPC does not wake a generator that waits for an event.
            # This callback does.
            if not call.context.add_callback(watch.close):
                return
            at_end.callback(self._authenticator.watch(call.caller, watch.close))
            for job_id in missing:
                job = worker_pb.Job(job_id=job_id)
                yield _serialized(JobEventKind.REMOVED, job)
            for event in watch:
                if self._authenticator.has_expired(call.caller):
                    break  # if a token ends for another reason, the authenticator closes the watch
                # `yield` blocks while the client does not read. Meanwhile this generator should
                # keep neither the event nor the message in memory.
                message = [_serialized(event.kind, job_message(event.job))]
                del event
                with self._untaken.held(len(message[0])):
                    yield message.pop()
            if not self._authenticator.is_valid(call.caller):
                raise auth.TokenError


def _serialized(kind: JobEventKind, job: worker_pb.Job) -> bytes:
    return worker_pb.JobEvent(kind=_KINDS[kind], job=job).SerializeToString()


def _job_filter(asked: worker_pb.JobFilter, caller: Identity) -> JobFilter:
    """Return the filter that a caller asks for, narrowed to the jobs that the caller may see."""
    owner = asked.owner or None
    if caller.role is not auth.Role.ADMIN:
        if owner not in (None, caller.name):
            raise NotAllowedError("only an admin may ask for the jobs of another owner")
        owner = caller.name
    unknown = [number for number in asked.statuses if number not in _STATUSES]
    if unknown:
        raise BadRequestError(f"{unknown[0]} is not the number of a status that a job can have")
    if len(asked.job_ids) > _MOST_JOB_IDS:
        raise BadRequestError(f"{len(asked.job_ids)} job IDs; a filter takes {_MOST_JOB_IDS}")
    try:
        return JobFilter(
            statuses=[_STATUSES[number] for number in asked.statuses],
            owner=owner,
            name=asked.name or None,
            labels=dict(asked.labels),
            since=asked.since.ToDatetime(UTC) if asked.HasField("since") else None,
            job_ids=[job_id.lower() for job_id in asked.job_ids],
        )
    except (ValueError, OverflowError) as error:
        raise BadRequestError(f"this filter makes no sense: {error}") from None


def _position(token: str) -> int:
    """Return the position after which the page of this token begins. Raises `BadRequestError`."""
    if not token:
        return 0
    if re.fullmatch(r"[0-7]?[0-9a-f]{1,15}", token, re.ASCII):
        return int(token, 16)
    raise BadRequestError(
        f"not a page token: {token[:SHOWN_CHARACTERS]!r}; send the next_page_token of the page "
        "before, or none for the first page"
    )
