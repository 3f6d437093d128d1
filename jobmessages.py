"""What the API says of a job: messages of `workerservice.proto`, made from values of the library.

    worker_pb.GetJobStatusResponse(job=job_message(worker.status(job_id)))

Times, limits and usage are given to protobuf as dictionaries of their fields, because it would copy
a message.

Thread safety: there is no state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import workerservice_pb2 as worker_pb
from durations import duration
from worker import EndReason, Gap, Job, Limits, Status, Usage, UsageSource

if TYPE_CHECKING:
    from datetime import datetime

__all__ = [
    "BY_ADMIN",
    "BY_OWNER",
    "STATUSES",
    "end_metadata",
    "gap_message",
    "input_message",
    "job_message",
    "timestamp",
]

STATUSES = {
    Status.QUEUED: worker_pb.JOB_STATUS_QUEUED,
    Status.RUNNING: worker_pb.JOB_STATUS_RUNNING,
    Status.STOPPED: worker_pb.JOB_STATUS_STOPPED,
    Status.FINISHED: worker_pb.JOB_STATUS_FINISHED,
}
_END_REASONS = {
    None: worker_pb.END_REASON_UNSPECIFIED,
    EndReason.EXITED: worker_pb.END_REASON_EXITED,
    EndReason.SIGNALLED: worker_pb.END_REASON_SIGNALLED,
    EndReason.OUT_OF_MEMORY: worker_pb.END_REASON_OUT_OF_MEMORY,
    EndReason.HOST_OUT_OF_MEMORY: worker_pb.END_REASON_HOST_OUT_OF_MEMORY,
    EndReason.CLOSED: worker_pb.END_REASON_SERVER_SHUTDOWN,
    EndReason.TIMED_OUT: worker_pb.END_REASON_TIMED_OUT,
    EndReason.LOST: worker_pb.END_REASON_LOST,
    EndReason.NODE_FAILED: worker_pb.END_REASON_NODE_FAILED,
    EndReason.CANCELLED: worker_pb.END_REASON_CANCELLED,
}
# The service passes these reasons to `Worker.stop` and finds them again in `Job.stop_reason`.
BY_OWNER = "owner"
BY_ADMIN = "admin"
_STOP_REASONS = {
    BY_OWNER: worker_pb.END_REASON_STOPPED_BY_OWNER,
    BY_ADMIN: worker_pb.END_REASON_STOPPED_BY_ADMIN,
}

_USAGE_SOURCES = {
    UsageSource.CGROUP: worker_pb.USAGE_SOURCE_CGROUP,
    UsageSource.RUSAGE: worker_pb.USAGE_SOURCE_RUSAGE,
}


def job_message(job: Job) -> worker_pb.Job:
    """Return the message of a job."""
    # The messages Limits and Usage have the same fields as the classes of these names.
    usage = None
    if job.usage is not None and job.usage_source is not None:
        usage = {"source": _USAGE_SOURCES[job.usage_source], **_fields(job.usage)}
    return worker_pb.Job(
        job_id=job.job_id,
        owner=job.owner,
        command=job.command,
        args=job.args,
        status=STATUSES[job.status],
        end_reason=_end_reason(job),
        exit_code=job.exit_code,
        signal=job.signal,
        started_at=timestamp(job.started_at),
        ended_at=timestamp(job.ended_at) if job.ended_at else None,
        output_bytes=job.output_bytes,
        output_lost_bytes=job.output_lost_bytes,
        output_gap=gap_message(job.output_gap),
        may_have_escaped=job.may_have_escaped,
        killed_after_exit=job.killed_after_exit,
        timeout=None if job.timeout is None else duration(job.timeout),
        working_directory=job.working_directory,
        name=job.name,
        labels=job.labels or None,
        tmp_directory=job.tmp_directory,
        node=job.node,
        reason=job.reason,
        subscribers=job.subscribers,
        limits=_fields(job.limits),
        usage=usage,
        stdin=input_message(job),
    )


def gap_message(gap: Gap | None) -> worker_pb.OutputGap | None:
    """Return the message of a gap in a job's output; None if there is none."""
    return gap and worker_pb.OutputGap(offset=gap.offset, length=gap.length)


def input_message(job: Job) -> worker_pb.Input | None:
    """Return the message of a job's input; None if the job was started without."""
    if job.input_bytes is None:
        return None
    return worker_pb.Input(bytes=job.input_bytes, ended=job.input_ended)


def _end_reason(job: Job) -> worker_pb.EndReason:
    if job.end_reason is EndReason.STOPPED:
        return _STOP_REASONS[job.stop_reason]
    return _END_REASONS[job.end_reason]


def end_metadata(job: Job, offset: int) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata of a stream that ends with its job before byte `offset`."""
    named = {
        "job-status": job.status.name,
        "job-end-reason": worker_pb.EndReason.Name(_end_reason(job)).removeprefix("END_REASON_"),
        "job-exit-code": job.exit_code,
        "job-signal": job.signal,
        "next-offset": offset,
    }
    return tuple((name, str(value)) for name, value in named.items() if value is not None)


def _fields(value: Limits | Usage) -> dict[str, Any]:
    # A list may have ten thousand jobs, and dataclasses.asdict would take twice as long.
    names = value.__slots__
    return {name: each for name in names if (each := getattr(value, name)) is not None}


def timestamp(moment: datetime) -> dict[str, int]:
    """Return the fields of a `Timestamp`."""
    # protobuf would take twice as long for the time itself.
    return {"seconds": int(moment.timestamp()), "nanos": moment.microsecond * 1000}
