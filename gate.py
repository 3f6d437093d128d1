"""The gate that every call passes: it admits calls, and translates and records how they end.

The gate checks the connection, the token and the role of a call, receives its request, turns its
errors into status codes (`_ERRORS` is the only table) and writes its line in the audit log.
`auth.py` says who a caller is and what they may do, `calls.py` whether the call is one too many
and when it runs, `service.py` what an admitted call does.

Threads: gRPC's accepting thread runs the interceptor, the refusal of a call that is one too many,
and the callbacks of ended calls. Nothing may block there. Everything else runs in the call's own
thread, which also waits for the request. A client may never send it; `Ticket.receiving` bounds
that wait.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Self
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

import auth
import worker
from audit import AuditError, AuditLog
from calls import STRANGERS, STRANGERS_LOGIN, Calls, Kind, OverloadError, Ticket
from quotas import QuotaError
from settings import LimitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["SHOWN_CHARACTERS", "BadRequestError", "Call", "Gate"]

logger = logging.getLogger(__name__)

_TOGETHER_S = 1.0  # refusals for overload are recorded

# The calls that wait for the kernel, the disk or the hash of a password.
_SLOW = {
    "/jobworker.v1.AuthService/Login",
    "/jobworker.v1.AuthService/Logout",
    "/jobworker.v1.WorkerService/StartJob",
    "/jobworker.v1.WorkerService/StopJob",
    "/jobworker.v1.WorkerService/RemoveJob",
}

SHOWN_CHARACTERS = 64
"""Of what should be a name or an ID, and may be anything."""


class BadRequestError(Exception):
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
    """The call ended before its request had arrived. The client cannot receive an answer."""

    def __init__(self) -> None:
        super().__init__("the client has gone, was too slow, or sent too large a request")


# The first line that matches an error gives the status code and the message; None stands for the
# error's own message. An error that matches no line is INTERNAL.
_ERRORS: tuple[tuple[type[Exception], grpc.StatusCode, str | None], ...] = (
    (BadRequestError, grpc.StatusCode.INVALID_ARGUMENT, None),
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
    (OverloadError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (auth.TooManyLoginsError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (worker.ResourceError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (auth.LoginsClosedError, grpc.StatusCode.UNAVAILABLE, None),
    (worker.StartTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, None),
    (worker.StopTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, None),
    (worker.WorkerClosedError, grpc.StatusCode.UNAVAILABLE, "the server is shutting down"),
    (
        worker.SpawnerDiedError,
        grpc.StatusCode.UNAVAILABLE,
        "the process that starts jobs has died; restart the server to start jobs again",
    ),
    (worker.CgroupError, grpc.StatusCode.FAILED_PRECONDITION, None),
    (auth.RevocationError, grpc.StatusCode.UNAVAILABLE, None),
    (AuditError, grpc.StatusCode.UNAVAILABLE, "the audit log cannot be written; tell the operator"),
)
# The errors above that the operator has to know of, so they are logged. (`audit.py` logs its own.)
_OPERATOR_ERRORS = (
    worker.CgroupError,
    worker.SpawnerDiedError,
    worker.ResourceError,
    auth.RevocationError,
)


@dataclass(slots=True)
class Call:
    """One call: what a servicer gets beside the request, and what the audit log records of it."""

    method: str
    context: grpc.ServicerContext
    audit: AuditLog
    ticket: Ticket
    certificate: bytes = b""  # the client's, DER
    identity: auth.Identity | None = None  # None only where no token is needed
    user: str | None = None  # the caller's name; before a login the name in the request
    job_id: str | None = None
    argv: list[str] | None = None  # of a start
    reason: str | None = None  # for the audit log alone
    recorded: bool = False
    undo: Callable[[], object] | None = None  # to be called if the call cannot be recorded

    @property
    def caller(self) -> auth.Identity:
        if self.identity is None:
            raise auth.TokenError
        return self.identity

    @property
    def address(self) -> str:
        """The client's address, without the port."""
        _, _, address = unquote(str(self.context.peer())).partition(":")
        return address.rpartition(":")[0].strip("[]")

    @property
    def fingerprint(self) -> str | None:
        return _fingerprint(self.certificate) if self.certificate else None

    def record(self, outcome: str = "OK", reason: str | None = None, **more: str | int) -> None:
        """Write the call's line in the audit log.

        A servicer calls this before it does what cannot be undone. For other calls the gate does,
        when the outcome is known. A call that fails after its line gets a second line. Raises
        `AuditError` if a record is required and cannot be written.
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
            **more,
        )


class _Overload:
    """Records the calls that are refused for overload: one line a second for all that are alike.

    In an overload there is no time for a line each.
    """

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        # Guards all below. Notified when there is something to record, and when it is closed.
        self._changed = threading.Condition()
        # By caller and method: the first call, and how many there were.
        self._refused: dict[tuple[object, str], tuple[Call, int]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="overload", daemon=True)
        self._thread.start()

    def add(self, method: str, ticket: Ticket, context: grpc.ServicerContext) -> None:
        """Count a call that is refused. Neither raises nor blocks."""
        key = (ticket.key, method)
        with self._changed:
            first, count = self._refused.get(key, (None, 0))
            if first is None:
                first = Call(method, context, self._audit, ticket)
                with contextlib.suppress(auth.AuthenticationError):
                    first.certificate = _certificate(context)
                self._changed.notify()
            self._refused[key] = (first, count + 1)

    def close(self) -> None:
        """Record what is left, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        closed = False
        while not closed:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._refused)
                closed = self._changed.wait_for(lambda: self._closed, _TOGETHER_S)
                refused, self._refused = self._refused, {}
            for call, count in refused.values():
                with contextlib.suppress(AuditError):  # the calls have been refused already
                    reason = str(call.ticket.refusal)
                    call.record(grpc.StatusCode.RESOURCE_EXHAUSTED.name, reason, calls=count)


class Gate(grpc.ServerInterceptor):
    """Admits calls, and translates and records how they end, in the same way for every RPC.

    A context manager, because it has a thread. `calls`: the server's executor. `request_bytes`:
    the largest request that is not refused. gRPC's own ceiling should be higher, because gRPC's
    refusal does not name the setting.
    """

    def __init__(
        self,
        authenticator: auth.Authenticator,
        audit: AuditLog,
        calls: Calls,
        *,
        request_bytes: int,
    ) -> None:
        self._authenticator = authenticator
        self._audit = audit
        self._calls = calls
        self._request_bytes = request_bytes
        self._overload = _Overload(audit)

    def close(self) -> None:
        """End the gate's thread. No call may come after that."""
        self._overload.close()

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
        method = handler_call_details.method[:SHOWN_CHARACTERS]
        is_stream = handler is not None and handler.response_streaming
        kind = Kind.STREAM if is_stream else Kind.SLOW if method in _SLOW else Kind.QUICK
        ticket = self._calls.arrive(self._caller(handler_call_details), kind)
        # For gRPC every call has a stream of requests. So the behaviour begins before the request
        # is there, and a call that is not admitted does not wait for its request. gRPC is given no
        # deserializer, because whoever may not call learns nothing about the request's form.
        if ticket.refusal is not None:
            behaviour = functools.partial(self._refuse_at_once, method, ticket)
            return grpc.stream_unary_rpc_method_handler(behaviour)
        if is_stream:
            return grpc.stream_stream_rpc_method_handler(
                functools.partial(self._stream, method, handler, ticket)
            )
        return grpc.stream_unary_rpc_method_handler(
            functools.partial(self._unary, method, handler, ticket)
        )

    def _unary(
        self,
        method: str,
        handler: Any,
        ticket: Ticket,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> bytes:
        """Handle a unary call in its thread; return the serialized answer."""
        call = Call(method, context, self._audit, ticket)
        try:
            ticket.begin(context)
            self._admit(call, handler)
            with self._share(call):
                answer = handler.unary_unary(self._receive(handler, requests, call), call)
                data: bytes = handler.response_serializer(answer)
                ticket.hold(len(data) - ticket.unread)
                if not call.recorded:
                    call.record()
        except Exception as error:  # noqa: BLE001 -- the one place that translates them
            self._refuse(call, error)
        return data

    def _stream(
        self,
        method: str,
        handler: Any,
        ticket: Ticket,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> Iterator[bytes]:
        """Handle a stream in its thread; yield its serialized messages."""
        call = Call(method, context, self._audit, ticket)
        try:
            ticket.begin(context)
            self._admit(call, handler)
            messages = handler.unary_stream(self._receive(handler, requests, call), call)
            with contextlib.closing(messages):
                ticket.leave()
                # A client that waits for the first output knows now that the stream is accepted.
                context.send_initial_metadata(())
                # Serialized here, because gRPC would also keep the message until the client reads.
                yield from messages
        except Exception as error:  # noqa: BLE001 -- the same
            self._refuse(call, error)

    def _caller(self, details: grpc.HandlerCallDetails) -> object:
        """Return whose queue the call joins. Only `_admit` checks the whole token."""
        with contextlib.suppress(auth.TokenError):
            name = self._authenticator.signed_for(_bearer_token(details.invocation_metadata))
            if name is not None:
                return name
        if auth.PERMISSIONS.get(details.method, frozenset()) is None:
            return STRANGERS_LOGIN
        return STRANGERS

    def _share(self, call: Call) -> contextlib.AbstractContextManager[None]:
        """Return a context for what the call does, in which its caller's share is checked."""
        call.ticket.check_unread()
        if call.identity is None:
            return self._calls.login(call.certificate)
        return _UNBOUNDED

    def _refuse_at_once(
        self,
        method: str,
        ticket: Ticket,
        _requests: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> NoReturn:
        """Be the behaviour of a call that is one too many, in gRPC's accepting thread."""
        error = ticket.refusal or AssertionError("the call is not refused")
        self._overload.add(method, ticket, context)
        _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, error)

    def _admit(self, call: Call, handler: Any) -> None:
        """Raise unless TLS, the token and the role allow this call, and there is a handler."""
        call.certificate = _certificate(call.context)
        if handler is None:
            raise _UnknownMethodError
        if auth.PERMISSIONS.get(call.method, frozenset()) is None:
            return
        identity = self._authenticator.authenticate(
            _bearer_token(call.context.invocation_metadata()), call.certificate
        )
        call.identity = identity
        call.user = identity.name
        if not auth.may_call(call.method, identity.role):
            raise _PermissionError(f"the role {identity.role.value} may not call {call.method}")

    def _receive(self, handler: Any, requests: Iterator[bytes], call: Call) -> Any:
        """Wait for the request and return it as a message."""
        try:
            with call.ticket.receiving(call.context.cancel):
                data = next(requests, None)
        except grpc.RpcError as error:  # what gRPC raises for a call that is over
            raise _NoRequestError from error
        if data is None:
            raise BadRequestError("there is no request in this call, or a far too large one")
        if len(data) > self._request_bytes:
            raise _RequestSizeError(
                f"a request of {len(data)} bytes; this server's ceiling is "
                f"{self._request_bytes} (requests.size)"
            )
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            raise BadRequestError("the request is not a message of the right type") from error

    def _refuse(self, call: Call, error: Exception) -> NoReturn:
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
        _abort(call.context, code, error, message)


_UNBOUNDED = contextlib.nullcontext()


def _abort(
    context: grpc.ServicerContext, code: grpc.StatusCode, error: Exception, message: str = ""
) -> NoReturn:
    """End the call. If the error knows when to try again, the trailing metadata says so."""
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        context.set_trailing_metadata(
            (
                ("retry-after", str(retry_after_s)),
                ("grpc-retry-pushback-ms", str(retry_after_s * 1000)),
            )
        )
    context.abort(code, message or str(error))
    raise AssertionError("abort has raised")


def _certificate(context: grpc.ServicerContext) -> bytes:
    """Return the client's certificate, DER. Raises unless the connection is TLS 1.3."""
    connection: Any = context.auth_context()  # str to list of bytes
    if connection.get("ssl_tls_version") != [b"TLSv1.3"]:
        raise auth.AuthenticationError("the connection must be TLS 1.3")
    return _der(connection["x509_pem_cert"][0])


# A client sends the same certificate with every call. A certificate of 16 KiB is a large one.
@functools.lru_cache(maxsize=256)
def _der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


@functools.lru_cache(maxsize=256)
def _fingerprint(certificate: bytes) -> str:
    return hashlib.sha256(certificate).hexdigest()


def _bearer_token(metadata: Any) -> str:
    values = [value for key, value in metadata if key == "authorization"]
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
