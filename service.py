"""The gRPC services over `worker.py`: the gate every call goes through, and the servicers.

What a job is stands in `worker.py`, who may do what in `auth.py`, how much of it in
`quotas.py`, the messages in the .proto files. Here calls are admitted, requests become
calls of those, their results become messages, their errors status codes (one table),
and every call a line in the audit log.

Threads: gRPC's `_serve` thread runs interceptors and the callbacks of ended calls,
so nothing may block there. A servicer's method runs in a thread of the pool, a
stream for as long as it lasts.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

import auth
import authservice_pb2 as auth_pb
import authservice_pb2_grpc
import worker
import workerservice_pb2 as worker_pb
import workerservice_pb2_grpc
from audit import AuditError, AuditLog
from config import Config, LimitError
from quotas import QuotaError, Quotas
from worker import EndReason, Job, Status, UsageSource, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

__all__ = ["Gate", "add_services"]

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 64  # of what should be a name or an ID, and may be anything

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


# The first line that matches says how an error is told to the client: the code, and
# the message if not the error's own. Anything else is INTERNAL.
_ERRORS: tuple[tuple[type[Exception], grpc.StatusCode, str | None], ...] = (
    (_BadRequestError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (worker.CommandError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (LimitError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (auth.AuthenticationError, grpc.StatusCode.UNAUTHENTICATED, None),
    (_PermissionError, grpc.StatusCode.PERMISSION_DENIED, None),
    (worker.UnknownJobError, grpc.StatusCode.NOT_FOUND, "no such job"),
    (worker.OffsetError, grpc.StatusCode.OUT_OF_RANGE, None),
    (worker.OutputIncompleteError, grpc.StatusCode.DATA_LOSS, None),
    (QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (auth.TooManyLoginsError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (worker.ResourceError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (auth.LoginsClosedError, grpc.StatusCode.UNAVAILABLE, None),
    (worker.StopTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, None),
    (worker.WorkerClosedError, grpc.StatusCode.UNAVAILABLE, "the server is shutting down"),
    (worker.SpawnerDiedError, grpc.StatusCode.UNAVAILABLE, None),
    (worker.CgroupError, grpc.StatusCode.FAILED_PRECONDITION, None),
    (auth.RevocationError, grpc.StatusCode.UNAVAILABLE, None),
    (AuditError, grpc.StatusCode.UNAVAILABLE, "the audit log cannot be written; tell the operator"),
)
# Those of the above that the operator must hear of. (The audit log tells of itself.)
_OPERATOR_ERRORS = (
    worker.CgroupError,
    worker.SpawnerDiedError,
    worker.ResourceError,
    auth.RevocationError,
)


# --- the gate ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Call:
    """One call: what a servicer gets beside the request, and what the audit log is told."""

    method: str
    context: grpc.ServicerContext
    certificate: bytes = b""  # the client's, DER
    identity: auth.Identity | None = None  # None only where no token is needed
    user: str | None = None  # who the caller is, or says to be
    job_id: str | None = None
    argv: list[str] | None = None  # of a start
    reason: str | None = None  # what the caller is not told
    recorded: bool = False
    undo: Callable[[], object] | None = None  # if it cannot be recorded

    @property
    def caller(self) -> auth.Identity:
        if self.identity is None:
            raise auth.TokenError
        return self.identity

    @property
    def address(self) -> str:
        """Where it comes from, without the port."""
        _, _, address = unquote(str(self.context.peer())).partition(":")
        return address.rpartition(":")[0].strip("[]")


class Gate(grpc.ServerInterceptor):
    """Admits calls, records and translates what becomes of them, for every RPC alike.

    The interceptor itself runs on the `_serve` thread, for which any work is too much;
    so it only wraps the handler, and the wrapper does the rest in the handler's thread.
    """

    def __init__(self, authenticator: auth.Authenticator, audit: AuditLog) -> None:
        self._authenticator = authenticator
        self._audit = audit

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
            call = _Call(method, context)
            try:
                self._admit(call)
                answer = handler.unary_unary(_parse(handler, data), call)
                self._record(call)
            except Exception as error:  # noqa: BLE001 -- the one place that translates them
                self._refuse(call, error)
            return answer

        def stream(data: bytes, context: grpc.ServicerContext) -> Iterator[Any]:
            call = _Call(method, context)
            try:
                self._admit(call)
                answers = handler.unary_stream(_parse(handler, data), call)
                self._record(call)
                yield from answers
            except Exception as error:  # noqa: BLE001 -- the same
                self._refuse(call, error)

        # No deserializer: who may not call learns nothing about the request's form.
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                stream, response_serializer=handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            unary, response_serializer=handler.response_serializer
        )

    def _admit(self, call: _Call) -> None:
        """Raise unless TLS, the token and the role allow this call."""
        connection: Any = call.context.auth_context()  # str to list of bytes
        if connection.get("ssl_tls_version") != [b"TLSv1.3"]:
            raise auth.AuthenticationError("the connection must be TLS 1.3")
        call.certificate = ssl.PEM_cert_to_DER_cert(connection["x509_pem_cert"][0].decode())
        if auth.PERMISSIONS.get(call.method, frozenset()) is None:
            return
        identity = self._authenticator.authenticate(_bearer_token(call.context), call.certificate)
        call.identity = identity
        call.user = identity.name
        if not auth.may_call(call.method, identity.role):
            raise _PermissionError(f"the role {identity.role.value} may not call {call.method}")

    def _record(self, call: _Call, outcome: str = "OK", reason: str | None = None) -> None:
        """Write the one line of this call. Raises `AuditError` if it must be and cannot."""
        if call.recorded:
            return
        call.recorded = True
        self._audit.record(
            peer=str(call.context.peer()),
            certificate=hashlib.sha256(call.certificate).hexdigest() if call.certificate else None,
            user=call.user,
            role=call.identity.role.value if call.identity else None,
            rpc=call.method,
            job=call.job_id,
            argv=call.argv,
            outcome=outcome,
            reason=call.reason or reason,
        )

    def _refuse(self, call: _Call, error: Exception) -> NoReturn:
        """End the call with the status that `_ERRORS` has for `error`."""
        code, message = _status(call.method, error)
        try:
            self._record(call, code.name, message)
        except AuditError as audit_error:
            code, message = _status(call.method, audit_error)
        if isinstance(error, AuditError) and call.undo is not None:
            call.undo()
        retry_after_s = getattr(error, "retry_after_s", None)
        if retry_after_s is not None:
            call.context.set_trailing_metadata((("retry-after", str(retry_after_s)),))
        call.context.abort(code, message)
        raise AssertionError("abort has raised")


def _bearer_token(context: grpc.ServicerContext) -> str:
    values = [value for key, value in context.invocation_metadata() if key == "authorization"]
    if len(values) == 1 and isinstance(values[0], str):
        scheme, _, token = values[0].partition(" ")
        if scheme.lower() == "bearer":
            return token
    raise auth.TokenError


def _parse(handler: Any, data: bytes) -> Any:
    try:
        return handler.request_deserializer(data)
    except DecodeError as error:
        raise _BadRequestError("the request is not a message of the right type") from error


def _status(method: str, error: Exception) -> tuple[grpc.StatusCode, str]:
    """Look up in `_ERRORS` how the client is told, and tell the operator what concerns them."""
    if isinstance(error, _OPERATOR_ERRORS):
        logger.error("%s: %s", method, error)
    for kind, code, message in _ERRORS:
        if isinstance(error, kind):
            return code, message or str(error)
    logger.error("%s: internal error", method, exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"


# --- the services -----------------------------------------------------------------------


class _AuthServicer:
    def __init__(self, authenticator: auth.Authenticator) -> None:
        self._authenticator = authenticator

    def Login(self, request: auth_pb.LoginRequest, call: _Call) -> auth_pb.LoginResponse:  # noqa: N802
        call.user = request.username[:_SHOWN_CHARACTERS]
        token, expires_at = self._authenticator.login(
            request.username, request.password, call.certificate, call.address
        )
        call.identity = self._authenticator.authenticate(token, call.certificate)
        return auth_pb.LoginResponse(access_token=token, expires_at=_timestamp(expires_at))

    def Logout(  # noqa: N802
        self,
        request: auth_pb.LogoutRequest,  # noqa: ARG002 -- has no fields
        call: _Call,
    ) -> auth_pb.LogoutResponse:
        self._authenticator.logout(call.caller)
        return auth_pb.LogoutResponse()


class _WorkerServicer:
    def __init__(
        self,
        jobs: Worker,
        authenticator: auth.Authenticator,
        config: Config,
        uid_of: Callable[[str], int | None],
    ) -> None:
        self._worker = jobs
        self._authenticator = authenticator
        self._config = config
        self._uid_of = uid_of
        self._quotas = Quotas(config.per_user, config.in_all, config.job_output_bytes)

    def StartJob(  # noqa: N802
        self, request: worker_pb.StartJobRequest, call: _Call
    ) -> worker_pb.StartJobResponse:
        user = call.caller.name
        call.argv = [request.command, *request.args]
        self._check_argv(call.argv)
        asked = {field.name: value for field, value in request.limits.ListFields()}
        limits = self._config.limits(asked)
        self._quotas.check_output(user)
        release = self._quotas.start(user)
        try:
            job_id = self._worker.start(
                request.command,
                list(request.args),
                owner=user,
                limits=limits,
                uid=self._uid_of(user),
                budget=self._quotas.output(user),
                on_end=release,
            )
        except BaseException:
            release()
            raise
        call.job_id = job_id
        call.undo = lambda: self._worker.stop(job_id)
        return worker_pb.StartJobResponse(job_id=job_id)

    def _check_argv(self, argv: list[str]) -> None:
        """Raise unless number and length of the arguments are below the ceilings."""
        most, longest = self._config.requests.args, self._config.requests.arg_length
        if len(argv) - 1 > most:
            raise _BadRequestError(
                f"{len(argv) - 1} arguments; this server's ceiling is {most} (requests.args)"
            )
        length = max(len(argument.encode(errors="surrogatepass")) for argument in argv)
        if length > longest:
            raise _BadRequestError(
                f"an argument of {length} bytes; this server's ceiling is {longest} "
                "(requests.arg_length)"
            )

    def StopJob(  # noqa: N802
        self, request: worker_pb.StopJobRequest, call: _Call
    ) -> worker_pb.StopJobResponse:
        job_id, owner = self._reach(request.job_id, call)
        is_owner = owner == call.caller.name
        reason = EndReason.STOPPED_BY_OWNER if is_owner else EndReason.STOPPED_BY_ADMIN
        return worker_pb.StopJobResponse(job=_job(self._worker.stop(job_id, reason=reason)))

    def GetJobStatus(  # noqa: N802
        self, request: worker_pb.GetJobStatusRequest, call: _Call
    ) -> worker_pb.GetJobStatusResponse:
        job_id, _ = self._reach(request.job_id, call)
        return worker_pb.GetJobStatusResponse(job=_job(self._worker.status(job_id)))

    def StreamOutput(  # noqa: N802
        self, request: worker_pb.StreamOutputRequest, call: _Call
    ) -> Iterator[worker_pb.StreamOutputResponse]:
        """Return the generator only if the stream is admitted."""
        job_id, _ = self._reach(request.job_id, call)
        release = self._quotas.stream(call.caller.name)
        try:
            chunks = self._worker.stream(job_id, subscriber=call.caller.name, offset=request.offset)
        except BaseException:
            release()
            raise
        return self._stream(request.offset, chunks, release, call)

    def _stream(
        self, offset: int, chunks: worker.Subscription, release: Callable[[], None], call: _Call
    ) -> Iterator[worker_pb.StreamOutputResponse]:
        forget = None
        try:
            with chunks:
                # A generator that waits is not told that its client is gone; this wakes it.
                if not call.context.add_callback(chunks.close):
                    return
                forget = self._authenticator.watch(call.caller, chunks.close)
                for chunk in chunks:
                    if call.caller.has_expired():
                        break  # which is all that the watch does not tell
                    yield worker_pb.StreamOutputResponse(data=chunk, offset=offset)
                    offset += len(chunk)
            if not self._authenticator.is_valid(call.caller):
                raise auth.TokenError
        finally:
            if forget is not None:
                forget()
            release()

    def ListJobs(  # noqa: N802
        self,
        request: worker_pb.ListJobsRequest,  # noqa: ARG002 -- has no fields yet
        call: _Call,
    ) -> worker_pb.ListJobsResponse:
        owner = None if call.caller.role is auth.Role.ADMIN else call.caller.name
        return worker_pb.ListJobsResponse(
            jobs=[_job(job) for job in self._worker.list(owner=owner)]
        )

    def _reach(self, text: str, call: _Call) -> tuple[str, str]:
        """Return the job's ID and its owner, if there is one and the caller reaches it.

        If not, the same error after the same work: its owner is all that is looked at.
        """
        job_id = call.job_id = _job_id(text)
        owner = self._worker.owner(job_id)
        if not call.caller.reaches(owner):
            call.reason = "the job is not theirs"
            raise worker.UnknownJobError(job_id)
        return job_id, owner


def _job_id(text: str) -> str:
    """Return the job ID in its one spelling."""
    try:
        job_id = str(uuid.UUID(text))
        if job_id == text.lower():
            return job_id
    except ValueError:
        pass
    raise _BadRequestError(
        f"not a job ID: {text[:_SHOWN_CHARACTERS]!r}; it looks like "
        "0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98"
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
        output_lost_bytes=job.output_lost_bytes,
        subscribers=job.subscribers,
        limits=worker_pb.Limits(**asdict(job.limits)),
        usage=usage,
    )


def _timestamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def add_services(
    server: grpc.Server,
    jobs: Worker,
    authenticator: auth.Authenticator,
    *,
    config: Config,
    uid_of: Callable[[str], int | None],
) -> None:
    """Serve both services on `server`, which must have a `Gate` for the same authenticator.

    `uid_of`: the uid that the jobs of a user run as; None if that is the server's.
    """
    authservice_pb2_grpc.add_AuthServiceServicer_to_server(_AuthServicer(authenticator), server)
    workerservice_pb2_grpc.add_WorkerServiceServicer_to_server(
        _WorkerServicer(jobs, authenticator, config, uid_of), server
    )
