"""The gRPC services over `worker.py`: the gate every call goes through, and the servicers.

What a job is stands in `worker.py`, who may do what in `auth.py`, how much of it in
`quotas.py`, the messages in the .proto files. Here calls are admitted, requests become
calls of those, their results become messages, their errors status codes (one table),
and every call a line in the audit log.

Threads: gRPC's `_serve` thread runs interceptors and the callbacks of ended calls,
so nothing may block there. A servicer's method runs in a thread of the pool, a
stream for as long as it lasts. A thread also waits for the request of its call, which a
client may never send: `_Arrivals` bounds that.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import ssl
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self
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
from quotas import Calls, QuotaError, Quotas
from worker import EndReason, Job, Limits, Status, Usage, UsageSource, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

__all__ = ["Gate", "add_services"]

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 64  # of what should be a name or an ID, and may be anything
_REFUSED_ARGV_BYTES = 4096  # of a refused start, in the audit log

# A call that has not sent its request after twice that is cancelled. It normally comes in
# one packet with the call.
_ARRIVAL_S = 3.0
_OVERDUE_CALLS = 32  # of one caller at a time; more are no accident
_BLOCKED_S = 60

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


class _UnknownMethodError(Exception):
    """There is no such RPC."""

    def __init__(self) -> None:
        super().__init__("this server has no such method")


class _RequestSizeError(Exception):
    """The request is larger than it may be."""


class _NoRequestError(Exception):
    """The call is over before its request was there. Nobody is left to be told."""

    def __init__(self) -> None:
        super().__init__("the client went, was too slow, or sent more than is read")


# The first line that matches says how an error is told to the client: the code, and
# the message if not the error's own. Anything else is INTERNAL.
_ERRORS: tuple[tuple[type[Exception], grpc.StatusCode, str | None], ...] = (
    (_BadRequestError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (worker.CommandError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (LimitError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (auth.AuthenticationError, grpc.StatusCode.UNAUTHENTICATED, None),
    (_PermissionError, grpc.StatusCode.PERMISSION_DENIED, None),
    (_UnknownMethodError, grpc.StatusCode.UNIMPLEMENTED, None),
    (_RequestSizeError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (_NoRequestError, grpc.StatusCode.CANCELLED, None),
    (worker.UnknownJobError, grpc.StatusCode.NOT_FOUND, "no such job"),
    (worker.JobRunningError, grpc.StatusCode.FAILED_PRECONDITION, None),
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
    audit: AuditLog
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
    def caller_key(self) -> str | bytes:
        """Whose call it is, where calls are counted: before a login, the certificate's."""
        return self.identity.name if self.identity else self.certificate

    @property
    def address(self) -> str:
        """Where it comes from, without the port."""
        _, _, address = unquote(str(self.context.peer())).partition(":")
        return address.rpartition(":")[0].strip("[]")

    @property
    def fingerprint(self) -> str | None:
        return hashlib.sha256(self.certificate).hexdigest() if self.certificate else None

    def record(self, outcome: str = "OK", reason: str | None = None) -> None:
        """Write a line about this call. Raises `AuditError` if it must be and cannot.

        A servicer does it before what cannot be undone, else the gate when the outcome is
        known. What fails after its line has another one.
        """
        self.recorded = True
        self.audit.record(
            peer=str(self.context.peer()),
            certificate=self.fingerprint,
            user=self.user,
            role=self.identity.role.value if self.identity else None,
            rpc=self.method,
            job=self.job_id,
            argv=self.argv,
            outcome=outcome,
            reason=self.reason or reason,
        )


class Gate(grpc.ServerInterceptor):
    """Admits calls, records and translates what becomes of them, for every RPC alike.

    The interceptor itself runs on the `_serve` thread, for which any work is too much;
    so it only wraps the handler, and the wrapper does the rest in the handler's thread.

    A context manager, for it has a thread of its own. `calls`, `streams`: how many of these
    one caller may have under way. `request_bytes`: the largest request that is not refused.
    gRPC should let pass some more, for it refuses without saying which setting is in the way.
    """

    def __init__(
        self,
        authenticator: auth.Authenticator,
        audit: AuditLog,
        *,
        calls: Calls,
        streams: Calls,
        request_bytes: int,
    ) -> None:
        self._authenticator = authenticator
        self._audit = audit
        self._calls = calls
        self._streams = streams
        self._request_bytes = request_bytes
        self._arrivals = _Arrivals()

    def close(self) -> None:
        """End the gate's thread, when no more calls come."""
        self._arrivals.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = continuation(handler_call_details)  # None: there is none
        method = handler_call_details.method[:_SHOWN_CHARACTERS]

        def unary(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            call = _Call(method, context, self._audit)
            try:
                self._admit(call, handler)
                with self._calls.under_way(call.caller_key):
                    answer = handler.unary_unary(self._receive(handler, requests, call), call)
                    if not call.recorded:
                        call.record()
            except Exception as error:  # noqa: BLE001 -- the one place that translates them
                self._refuse(call, error)
            return answer

        def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            call = _Call(method, context, self._audit)
            try:
                self._admit(call, handler)
                with self._streams.under_way(call.caller_key):
                    yield from handler.unary_stream(self._receive(handler, requests, call), call)
            except Exception as error:  # noqa: BLE001 -- the same
                self._refuse(call, error)

        # As if for a stream of requests, of which one is read, when the call is admitted: a
        # call that is not does not keep a thread until its request has come. And no
        # deserializer: who may not call learns nothing about the request's form.
        if handler is None:
            return grpc.stream_unary_rpc_method_handler(unary)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                stream, response_serializer=handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(
            unary, response_serializer=handler.response_serializer
        )

    def _admit(self, call: _Call, handler: Any) -> None:
        """Raise unless TLS, the token and the role allow this call, and there is a handler."""
        connection: Any = call.context.auth_context()  # str to list of bytes
        if connection.get("ssl_tls_version") != [b"TLSv1.3"]:
            raise auth.AuthenticationError("the connection must be TLS 1.3")
        call.certificate = ssl.PEM_cert_to_DER_cert(connection["x509_pem_cert"][0].decode())
        if handler is None:
            raise _UnknownMethodError
        if auth.PERMISSIONS.get(call.method, frozenset()) is None:
            return
        identity = self._authenticator.authenticate(_bearer_token(call.context), call.certificate)
        call.identity = identity
        call.user = identity.name
        if not auth.may_call(call.method, identity.role):
            raise _PermissionError(f"the role {identity.role.value} may not call {call.method}")

    def _receive(self, handler: Any, requests: Iterator[bytes], call: _Call) -> Any:
        """Wait for the request and return it as a message."""
        try:
            with self._arrivals.expected(call.caller_key, call.context.cancel):
                data = next(requests, None)
        except grpc.RpcError as error:  # what gRPC raises for a call that is over
            raise _NoRequestError from error
        if data is None:
            raise _BadRequestError("there is no request in this call, or a far too large one")
        if len(data) > self._request_bytes:
            raise _RequestSizeError(
                f"a request of {len(data)} bytes; this server's ceiling is "
                f"{self._request_bytes} (requests.size)"
            )
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            raise _BadRequestError("the request is not a message of the right type") from error

    def _refuse(self, call: _Call, error: Exception) -> NoReturn:
        """End the call with the status that `_ERRORS` has for `error`."""
        code, message = _status(call.method, error)
        if not isinstance(error, AuditError):
            try:
                call.record(code.name, message)
            except AuditError as audit_error:
                code, message = _status(call.method, audit_error)
        elif call.undo is not None:
            try:
                call.undo()
            except worker.WorkerError as undo_error:
                logger.error("%s: not on record, and not undone: %s", call.method, undo_error)
        retry_after_s = getattr(error, "retry_after_s", None)
        if retry_after_s is not None:
            call.context.set_trailing_metadata((("retry-after", str(retry_after_s)),))
        call.context.abort(code, message)
        raise AssertionError("abort has raised")


class _Waiting(NamedTuple):
    caller: str | bytes
    cancel: Callable[[], object]


class _Arrivals:
    """The calls whose request is not there yet, each of which keeps a thread waiting.

    A client can make any number of calls and send no request, so those that wait for too
    long are cancelled, by a thread of our own: gRPC's may all be waiting. Whoever makes
    many such calls is not waited for again for a while.
    """

    def __init__(self) -> None:
        # Guards all below. Notified when a call begins to wait while the thread has nothing to
        # look after, and when this is closed. Held for microseconds.
        self._changed = threading.Condition()
        self._waiting: dict[object, _Waiting] = {}  # the keys only tell them apart
        self._blocked: dict[str | bytes, float] = {}  # callers, and until when
        self._idle = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="arrivals", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def expected(self, caller: str | bytes, cancel: Callable[[], object]) -> Iterator[None]:
        """Wait for a request within this context; `cancel` makes that fail, and must not block.

        Raises `QuotaError` if this caller is not waited for now.
        """
        key = object()
        with self._changed:
            left_s = math.ceil(self._blocked.get(caller, 0) - time.monotonic())
            if left_s > 0:
                raise QuotaError(
                    f"too many of your calls did not send their request; try again in {left_s} s",
                    left_s,
                )
            self._waiting[key] = _Waiting(caller, cancel)
            if self._idle:
                self._idle = False
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                del self._waiting[key]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        before: set[object] = set()
        while True:
            with self._changed:
                # One look for all that came since the last, and none when nothing came: most
                # requests are there at once, and should not have to wake anybody.
                self._idle = not self._waiting
                self._changed.wait_for(lambda: self._closed or not self._idle)
                if self._changed.wait_for(lambda: self._closed, _ARRIVAL_S):
                    return
            before = self._cancel_overdue(before)

    def _cancel_overdue(self, before: set[object]) -> set[object]:
        """Cancel what was waiting at the last look already; return what is waiting now."""
        now = time.monotonic()
        with self._changed:
            waiting = dict(self._waiting)
            overdue = before & waiting.keys()
            counts = Counter(waiting[key].caller for key in overdue)
            blocked = [caller for caller, count in counts.items() if count > _OVERDUE_CALLS]
            self._blocked = {who: end for who, end in self._blocked.items() if end > now}
            self._blocked |= dict.fromkeys(blocked, now + _BLOCKED_S)
        for key, each in waiting.items():
            if key in overdue or each.caller in blocked:
                each.cancel()
        return set(waiting)


def _bearer_token(context: grpc.ServicerContext) -> str:
    values = [value for key, value in context.invocation_metadata() if key == "authorization"]
    if len(values) == 1 and isinstance(values[0], str):
        scheme, _, token = values[0].partition(" ")
        if scheme.lower() == "bearer":
            return token
    raise auth.TokenError


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
        call.record()
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
        self._quotas = Quotas(
            config.per_user, config.in_all, config.job_output_bytes, make_room=jobs.make_room
        )

    def StartJob(  # noqa: N802
        self, request: worker_pb.StartJobRequest, call: _Call
    ) -> worker_pb.StartJobResponse:
        user = call.caller.name
        argv = [request.command, *request.args]
        call.argv = _beginning(argv)  # no ceiling holds for refusals: they may not fill the disk
        self._check_argv(argv)
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
        call.job_id, call.argv = job_id, argv
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
        call.record()
        return worker_pb.StopJobResponse(job=_job(self._worker.stop(job_id, reason=reason)))

    def RemoveJob(  # noqa: N802
        self, request: worker_pb.RemoveJobRequest, call: _Call
    ) -> worker_pb.RemoveJobResponse:
        job_id, _ = self._reach(request.job_id, call)
        if self._worker.status(job_id).status is Status.RUNNING:
            raise worker.JobRunningError(job_id)  # before it is on record as removed
        call.record()
        self._worker.remove(job_id)
        return worker_pb.RemoveJobResponse()

    def GetJobStatus(  # noqa: N802
        self, request: worker_pb.GetJobStatusRequest, call: _Call
    ) -> worker_pb.GetJobStatusResponse:
        job_id, _ = self._reach(request.job_id, call)
        return worker_pb.GetJobStatusResponse(job=_job(self._worker.status(job_id)))

    def StreamOutput(  # noqa: N802
        self, request: worker_pb.StreamOutputRequest, call: _Call
    ) -> Iterator[worker_pb.StreamOutputResponse]:
        """Return the generator only if the stream is admitted, and that is recorded."""
        job_id, _ = self._reach(request.job_id, call)
        with contextlib.ExitStack() as ending:
            ending.callback(self._quotas.stream(call.caller.name))
            chunks = ending.enter_context(
                self._worker.stream(job_id, subscriber=call.caller.name, offset=request.offset)
            )
            call.record()
            return self._stream(request.offset, chunks, ending.pop_all(), call)

    def _stream(
        self,
        offset: int,
        chunks: worker.Subscription,
        ending: contextlib.ExitStack,
        call: _Call,
    ) -> Iterator[worker_pb.StreamOutputResponse]:
        with ending:
            # A generator that waits is not told that its client is gone; this wakes it.
            if not call.context.add_callback(chunks.close):
                return
            ending.callback(self._authenticator.watch(call.caller, chunks.close))
            for chunk in chunks:
                if call.caller.has_expired():
                    break  # which is all that the watch does not tell
                yield worker_pb.StreamOutputResponse(data=chunk, offset=offset)
                offset += len(chunk)
            if not self._authenticator.is_valid(call.caller):
                raise auth.TokenError

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


def _beginning(argv: list[str]) -> list[str]:
    """Return argv, or its first bytes and, as one more argument, how much there was besides."""
    encoded = [argument.encode(errors="surrogatepass") + b"\0" for argument in argv]
    left = _REFUSED_ARGV_BYTES
    for number, argument in enumerate(encoded):
        if len(argument) > left:
            more = sum(map(len, encoded[number:])) - left
            cut = argument[:left].decode(errors="ignore")
            return [*argv[:number], cut, f"... and {more} bytes more"]
        left -= len(argument)
    return argv


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
        usage = worker_pb.Usage(source=_USAGE_SOURCES[job.usage_source], **_fields(job.usage))
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
        limits=worker_pb.Limits(**_fields(job.limits)),
        usage=usage,
    )


def _fields(value: Limits | Usage) -> dict[str, Any]:
    # A list may have ten thousand jobs, and with dataclasses.asdict it took twice as long.
    return {name: getattr(value, name) for name in value.__slots__}


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
