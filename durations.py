"""Times in requests: fields of the type google.protobuf.Duration.

    grace = seconds(request, "grace")  # 2.5, or None if the field is absent

Thread safety: there is no state.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from google.protobuf.duration_pb2 import Duration

from gate import BadRequestError
from worker import Ending

if TYPE_CHECKING:
    import workerservice_pb2 as worker_pb

__all__ = ["duration", "ending_of", "seconds", "stop_grace", "time_before"]

_NANOS = 1_000_000_000
# The longest Duration there is: ten thousand years (duration.proto). A longer one can be sent, but
# not be shown. One such job would make every list fail that contains the job.
_MAX_S = 315_576_000_000


def seconds(request: Any, name: str) -> float | None:
    """Return a field in seconds; None if it is absent.

    Raises `BadRequestError` for what is no `Duration`, or negative.
    """
    if not request.HasField(name):
        return None
    value: Duration = getattr(request, name)
    if not 0 <= value.seconds <= _MAX_S or not 0 <= value.nanos < _NANOS:
        raise BadRequestError(
            f"{name}: {value.seconds} seconds and {value.nanos} nanos; it must be 0 to "
            f"{_MAX_S} seconds, with nanos from 0 to 999999999"
        )
    return value.seconds + value.nanos / _NANOS


def time_before(request: Any, name: str) -> datetime | None:
    """Return the time as long ago as a field says; None if it is absent, or before 1970.

    Raises `BadRequestError`.
    """
    ago_s = seconds(request, name)
    now = datetime.now(UTC)
    return None if ago_s is None or ago_s > now.timestamp() else now - timedelta(seconds=ago_s)


def duration(value: float) -> Duration:
    """Return the message for so many seconds."""
    whole = int(value)
    return Duration(seconds=whole, nanos=int((value - whole) * _NANOS))


def stop_grace(request: worker_pb.StopJobRequest) -> float:
    """Return the grace of a stop in seconds; 0 for none. Raises `BadRequestError`."""
    grace = seconds(request, "grace") or 0
    _check(Ending(), grace=grace)
    return grace


def ending_of(request: worker_pb.StartJobRequest, default: Ending) -> Ending:
    """Return the times of a job: those of the request, the others of `default`.

    Raises `BadRequestError`.
    """
    names = ("timeout", "grace", "linger")
    asked = {name: seconds(request, name) for name in names if request.HasField(name)}
    if not asked:
        return default
    if asked.get("timeout") == 0:
        asked["timeout"] = None
    return _check(default, **asked)


def _check(default: Ending, **values: Any) -> Ending:
    try:
        return replace(default, **values)
    except ValueError as error:
        raise BadRequestError(str(error)) from None
