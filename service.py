"""The gRPC services over `worker.py`: the gate every call goes through, and the servicers.

What a job is stands in `worker.py`, who may do what in `auth.py`, the messages in
the .proto files. Here calls are admitted, requests become calls of those two, their
results become messages, and their errors status codes (one table).

Threads: gRPC's `_serve` thread runs interceptors and the callbacks of ended calls,
so nothing may block there. A servicer's method runs in a thread of the pool, a
stream for as long as it lasts.
"""

from __future__ import annotations

import logging
import ssl
import threading
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

import auth
import authservice_pb2 as auth_pb
import authservice_pb2_grpc
import worker
import workerservice_pb2 as worker_pb
import workerservice_pb2_grpc
from config import Config, LimitError
from worker import EndReason, Job, Status, UsageSource, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

__all__ = ["Gate", "add_services"]

logger = logging.getLogger(__name__)

_STATUSES = {
    Status.RUNNING: worker_pb.RUNNING,
    Status.STOPPED: worker_pb.STOPPED,
    Status.FINISHED: worker_pb.FINISHED,
}
_END_REASONS = {
    None: worker_pb.END_REASON_UNSPECIFIED,
    EndReason.EXITED: worker_pb.EXITED,
    EndReason.SIGNALLED: worker_pb.SIGNALLED,
    EndReason.STOPPED_BY_OWNER: worker_pb.STOPPED_BY_OWNER,
    EndReason.STOPPED_BY_ADMIN: worker_pb.STOPPED_BY_ADMIN,
    EndReason.OUT_OF_MEMORY: worker_pb.OUT_OF_MEMORY,
    EndReason.SERVER_SHUTDOWN: worker_pb.SERVER_SHUTDOWN,
    EndReason.LOST: worker_pb.LOST,
}


_USAGE_SOURCES = {
    UsageSource.CGROUP: worker_pb.CGROUP,
    UsageSource.RUSAGE: worker_pb.RUSAGE,
}


class _BadRequestError(Exception):
    """The request makes no sense."""


class _PermissionError(Exception):
    """The caller's role does not allow the call."""


class _StreamsFullError(Exception):
    """No slot is free for another stream."""


# The first line that matches says how an error is told to the client: the code, and
# the message if not the error's own. Anything else is INTERNAL.
_ERRORS: tuple[tuple[type[Exception], grpc.StatusCode, str | None], ...] = (
    (_BadRequestError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (worker.CommandError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (LimitError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (auth.AuthenticationError, grpc.StatusCode.UNAUTHENTICATED, None),
    (_PermissionError, grpc.StatusCode.PERMISSION_DENIED, None),
    (worker.UnknownJobError, grpc.StatusCode.NOT_FOUND, None),
    (worker.OffsetError, grpc.StatusCode.OUT_OF_RANGE, None),
    (worker.OutputIncompleteError, grpc.StatusCode.DATA_LOSS, None),
    (_StreamsFullError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (auth.TooManyLoginsError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (worker.ResourceError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (auth.LoginsClosedError, grpc.StatusCode.UNAVAILABLE, None),
    (worker.StopTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, None),
    (worker.WorkerClosedError, grpc.StatusCode.UNAVAILABLE, "the server is shutting down"),
    (worker.SpawnerDiedError, grpc.StatusCode.UNAVAILABLE, None),
    (worker.CgroupError, grpc.StatusCode.FAILED_PRECONDITION, None),
)
# Those of the above that the operator must hear of.
_OPERATOR_ERRORS = (worker.CgroupError, worker.SpawnerDiedError, worker.ResourceError)


# --- the gate ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Call:
    """What a servicer gets beside the request."""

    context: grpc.ServicerContext
    certificate: bytes  # the client's, DER
    identity: auth.Identity | None  # None only where no token is needed

    @property
    def caller(self) -> auth.Identity:
        if self.identity is None:
            raise auth.AuthenticationError("no token")
        return self.identity


class Gate(grpc.ServerInterceptor):
    """Admits calls and translates errors, for every RPC alike.

    The interceptor itself runs on the `_serve` thread, for which any work is too much;
    so it only wraps the handler, and the wrapper does the rest in the handler's thread.
    """

    def __init__(self, authenticator: auth.Authenticator) -> None:
        self._authenticator = authenticator

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = handler_call_details.method

        def unary(data: bytes, context: grpc.ServicerContext) -> Any:
            try:
                call = self._admit(method, context)
                return handler.unary_unary(_parse(handler, data), call)
            except Exception as error:  # noqa: BLE001 -- the one place that translates them
                _abort(method, context, error)

        def stream(data: bytes, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                call = self._admit(method, context)
                yield from handler.unary_stream(_parse(handler, data), call)
            except Exception as error:  # noqa: BLE001 -- the same
                _abort(method, context, error)

        # No deserializer: who may not call learns nothing about the request's form.
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                stream, response_serializer=handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            unary, response_serializer=handler.response_serializer
        )

    def _admit(self, method: str, context: grpc.ServicerContext) -> _Call:
        """Raise unless TLS, the token and the role allow this call."""
        connection: Any = context.auth_context()  # str to list of bytes
        if connection.get("ssl_tls_version") != [b"TLSv1.3"]:
            raise auth.AuthenticationError("the connection must be TLS 1.3")
        certificate = ssl.PEM_cert_to_DER_cert(connection["x509_pem_cert"][0].decode())
        if auth.PERMISSIONS.get(method, frozenset()) is None:
            return _Call(context, certificate, None)
        identity = self._authenticator.authenticate(_bearer_token(context), certificate)
        if not auth.may_call(method, identity.role):
            raise _PermissionError(f"the role {identity.role.value} may not call {method}")
        return _Call(context, certificate, identity)


def _bearer_token(context: grpc.ServicerContext) -> str:
    values = [value for key, value in context.invocation_metadata() if key == "authorization"]
    if len(values) == 1 and isinstance(values[0], str):
        scheme, _, token = values[0].partition(" ")
        if scheme.lower() == "bearer":
            return token
    raise auth.AuthenticationError(
        "no token: log in, and send it as the metadata `authorization: Bearer TOKEN`"
    )


def _parse(handler: Any, data: bytes) -> Any:
    try:
        return handler.request_deserializer(data)
    except DecodeError as error:
        raise _BadRequestError("the request is not a message of the right type") from error


def _abort(method: str, context: grpc.ServicerContext, error: Exception) -> NoReturn:
    """End the call with the status that `_ERRORS` has for `error`."""
    if isinstance(error, _OPERATOR_ERRORS):
        logger.error("%s: %s", method, error)
    for kind, code, message in _ERRORS:
        if isinstance(error, kind):
            context.abort(code, message or str(error))
    logger.error("%s: internal error", method, exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")
    raise AssertionError("abort has raised")


# --- the services -----------------------------------------------------------------------


class _AuthServicer:
    def __init__(self, authenticator: auth.Authenticator) -> None:
        self._authenticator = authenticator

    def Login(self, request: auth_pb.LoginRequest, call: _Call) -> auth_pb.LoginResponse:  # noqa: N802
        try:
            token, expires_at = self._authenticator.login(
                request.username, request.password, call.certificate
            )
        except auth.AuthenticationError:
            logger.warning("login failed: user %r from %s", request.username[:64], _peer(call))
            raise
        logger.info("login: user %r from %s", request.username, _peer(call))
        return auth_pb.LoginResponse(access_token=token, expires_at=_timestamp(expires_at))


class _WorkerServicer:
    def __init__(self, jobs: Worker, config: Config, max_streams: int) -> None:
        self._worker = jobs
        self._config = config
        self._max_streams = max_streams
        self._stream_slots = threading.BoundedSemaphore(max_streams)

    def StartJob(  # noqa: N802
        self, request: worker_pb.StartJobRequest, call: _Call
    ) -> worker_pb.StartJobResponse:
        asked = {field.name: value for field, value in request.limits.ListFields()}
        job_id = self._worker.start(
            request.command,
            list(request.args),
            owner=call.caller.name,
            limits=self._config.limits(asked),
        )
        logger.info("job %s: started by %s: %r", job_id, call.caller.name, request.command)
        return worker_pb.StartJobResponse(job_id=job_id)

    def StopJob(  # noqa: N802
        self, request: worker_pb.StopJobRequest, call: _Call
    ) -> worker_pb.StopJobResponse:
        job = self._reach(request.job_id, call.caller)
        is_owner = job.owner == call.caller.name
        reason = EndReason.STOPPED_BY_OWNER if is_owner else EndReason.STOPPED_BY_ADMIN
        logger.info("job %s: stop by %s", job.job_id, call.caller.name)
        return worker_pb.StopJobResponse(job=_job(self._worker.stop(job.job_id, reason=reason)))

    def GetJobStatus(  # noqa: N802
        self, request: worker_pb.GetJobStatusRequest, call: _Call
    ) -> worker_pb.GetJobStatusResponse:
        return worker_pb.GetJobStatusResponse(job=_job(self._reach(request.job_id, call.caller)))

    def StreamOutput(  # noqa: N802
        self, request: worker_pb.StreamOutputRequest, call: _Call
    ) -> Iterator[worker_pb.StreamOutputResponse]:
        job = self._reach(request.job_id, call.caller)
        if not self._stream_slots.acquire(blocking=False):
            raise _StreamsFullError(
                f"all {self._max_streams} output streams are in use; try again later"
            )
        try:
            with self._worker.stream(
                job.job_id, subscriber=call.caller.name, offset=request.offset
            ) as chunks:
                # A generator that waits is not told that its client is gone; this wakes it.
                if not call.context.add_callback(chunks.close):
                    return
                offset = request.offset
                for chunk in chunks:
                    yield worker_pb.StreamOutputResponse(data=chunk, offset=offset)
                    offset += len(chunk)
        finally:
            self._stream_slots.release()

    def ListJobs(  # noqa: N802
        self,
        request: worker_pb.ListJobsRequest,  # noqa: ARG002 -- has no fields yet
        call: _Call,
    ) -> worker_pb.ListJobsResponse:
        jobs = [job for job in self._worker.list() if call.caller.reaches(job.owner)]
        return worker_pb.ListJobsResponse(jobs=[_job(job) for job in jobs])

    def _reach(self, text: str, caller: auth.Identity) -> Job:
        """Return the job, if there is one and the caller reaches it: the same error if not."""
        job_id = _job_id(text)
        job = self._worker.status(job_id)
        if not caller.reaches(job.owner):
            raise worker.UnknownJobError(job_id)
        return job


def _job_id(text: str) -> str:
    """Return the job ID in its one spelling."""
    try:
        job_id = str(uuid.UUID(text))
        if job_id == text.lower():
            return job_id
    except ValueError:
        pass
    raise _BadRequestError(
        f"not a job ID: {text[:64]!r}; it looks like 0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98"
    )


def _job(job: Job) -> worker_pb.Job:
    # The messages Limits and Usage have the fields of the classes of the same names.
    usage = None
    if job.usage is not None and job.usage_source is not None:
        usage = worker_pb.Usage(source=_USAGE_SOURCES[job.usage_source], **asdict(job.usage))
    return worker_pb.Job(
        job_id=job.job_id,
        owner=job.owner,
        command=job.command,
        args=job.args,
        status=_STATUSES[job.status],
        end_reason=_END_REASONS[job.end_reason],
        exit_code=job.exit_code,
        signal=job.signal,
        started_at=_timestamp(job.started_at),
        ended_at=_timestamp(job.ended_at) if job.ended_at else None,
        output_bytes=job.output_bytes,
        subscribers=job.subscribers,
        limits=worker_pb.Limits(**asdict(job.limits)),
        usage=usage,
    )


def _timestamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def _peer(call: _Call) -> str:
    return str(call.context.peer())


def add_services(
    server: grpc.Server,
    jobs: Worker,
    authenticator: auth.Authenticator,
    *,
    config: Config,
    max_streams: int,
) -> None:
    """Serve both services on `server`, which must have a `Gate` for the same authenticator."""
    authservice_pb2_grpc.add_AuthServiceServicer_to_server(_AuthServicer(authenticator), server)
    workerservice_pb2_grpc.add_WorkerServiceServicer_to_server(
        _WorkerServicer(jobs, config, max_streams), server
    )
