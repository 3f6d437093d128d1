"""The gate, which every call passes: it admits the call, translates its errors and records it.

For each call the gate checks the connection, the token and the role, receives the request, turns
an error into a status code (`_ERRORS` is the only table) and writes a line in the audit log.
`auth.py` identifies the caller and knows their permissions. `calls.py` decides whether the call
is one too many and when the call runs. `service.py` does the work of an admitted call.

Threads: gRPC's accepting thread runs the interceptor, refuses calls that are one too many, and
runs the callbacks of ended calls. None of this may block. Everything else runs in the call's own
thread. This thread also waits for the request, for a bounded time (`Ticket.receive`), because
a client may never send one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import ssl
import time
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn, Self
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

import auth
import worker
from audit import AuditError, AuditLog
from calls import STRANGERS, STRANGERS_LOGIN, Calls, Kind, OverloadError, Ticket
from metrics import Metrics
from quotas import QuotaError
from records import Records
from settings import LimitError
from starts import OtherStartError
from tls import expiry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "SHOWN_CHARACTERS",
    "BadRequestError",
    "Call",
    "Gate",
    "NotAllowedError",
    "UnknownServiceError",
]

logger = logging.getLogger(__name__)

_LOGIN = "/jobworker.v1.AuthService/Login"
# These calls wait for the kernel, for the disk or for the hash of a password.
_SLOW = {
    _LOGIN,
    "/jobworker.v1.AuthService/Refresh",
    "/jobworker.v1.AuthService/Logout",
    "/jobworker.v1.WorkerService/StartJob",
    "/jobworker.v1.WorkerService/StopJob",
    "/jobworker.v1.WorkerService/SignalJob",
    "/jobworker.v1.WorkerService/RemoveJob",
}

# These calls make room on a full disk, or end what a token may do. So a full disk does not prevent
# them, even if the settings require a record of each call.
_EVEN_IF_NOT_RECORDED = {
    "/jobworker.v1.AuthService/Logout",
    "/jobworker.v1.WorkerService/StopJob",
    "/jobworker.v1.WorkerService/RemoveJob",
}

# The initial metadata of a stream that the server has accepted. A client that has received it may
# open the stream again when the connection breaks.
_ACCEPTED = (("accepted", "1"),)

_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.name

_ANSWER_S = 0.02  # an answer may need this long to reach its caller

SHOWN_CHARACTERS = 64
"""A client may send any text as a name or an ID; messages show this much of the text."""


class BadRequestError(Exception):
    """The request has a value that is not valid."""


class UnknownServiceError(Exception):
    """A health check names a service that this server does not have."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no service {name!r}; ask for one of this server's, or for none")


class NotAllowedError(Exception):
    """The caller's role does not allow the call."""


class _NoCallerError(Exception):
    """Nobody will receive the answer: the call has ended, or is about to."""


class _CallerGoneError(_NoCallerError):
    def __init__(self) -> None:
        super().__init__("the caller has gone, so the job was not started, or is removed")


class _TooLateError(_NoCallerError):
    def __init__(self) -> None:
        super().__init__(
            "the call's deadline leaves no time for an answer, so the job was not started, or is "
            "removed; allow more time"
        )


class _UnknownMethodError(Exception):
    """The server has no RPC of this name."""

    def __init__(self) -> None:
        super().__init__("this server has no such method")


class _RequestSizeError(Exception):
    """The request has more bytes than the settings allow."""


class _NoRequestError(Exception):
    """The call ended before its request had arrived. The client cannot receive an answer."""

    def __init__(self) -> None:
        super().__init__("the client has gone, was too slow, or sent too large a request")


_STORE_FAILS = "the server cannot record jobs now; tell the operator, whose log says why"

# The first line that matches an error gives the status code and the message. With None, the error's
# own message is sent. An error that matches no line is INTERNAL.
_ERRORS: tuple[tuple[type[Exception], grpc.StatusCode, str | None], ...] = (
    (BadRequestError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (worker.CommandError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (LimitError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (auth.AuthenticationError, grpc.StatusCode.UNAUTHENTICATED, None),
    (NotAllowedError, grpc.StatusCode.PERMISSION_DENIED, None),
    (_UnknownMethodError, grpc.StatusCode.UNIMPLEMENTED, None),
    (_RequestSizeError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (_NoRequestError, grpc.StatusCode.CANCELLED, None),
    (grpc.RpcError, grpc.StatusCode.CANCELLED, "the client has gone"),  # the call has ended
    (_CallerGoneError, grpc.StatusCode.CANCELLED, None),
    (_TooLateError, grpc.StatusCode.DEADLINE_EXCEEDED, None),
    (OtherStartError, grpc.StatusCode.ALREADY_EXISTS, None),
    (UnknownServiceError, grpc.StatusCode.NOT_FOUND, None),
    (worker.UnknownJobError, grpc.StatusCode.NOT_FOUND, "no such job"),
    (worker.JobRunningError, grpc.StatusCode.FAILED_PRECONDITION, None),
    (worker.SignalError, grpc.StatusCode.FAILED_PRECONDITION, None),
    (worker.InputError, grpc.StatusCode.FAILED_PRECONDITION, None),
    (worker.InputOffsetError, grpc.StatusCode.OUT_OF_RANGE, None),
    (worker.InputTakenError, grpc.StatusCode.ABORTED, None),
    (worker.OffsetError, grpc.StatusCode.OUT_OF_RANGE, None),
    (worker.OutputIncompleteError, grpc.StatusCode.DATA_LOSS, None),
    (OverloadError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (auth.TooManyLoginsError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (worker.ResourceError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (worker.StoreError, grpc.StatusCode.RESOURCE_EXHAUSTED, _STORE_FAILS),
    (auth.LoginMemoryError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    (auth.LoginsClosedError, grpc.StatusCode.UNAVAILABLE, None),
    (worker.StartTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, None),
    (worker.StopTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, None),
    (worker.WatchBehindError, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
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
# These errors are also logged, because the operator has to act. `audit.py` logs `AuditError`.
_OPERATOR_ERRORS = (
    worker.CgroupError,
    worker.SpawnerDiedError,
    worker.ResourceError,
    worker.StoreError,
    auth.LoginMemoryError,
    auth.RevocationError,
)


@dataclass(slots=True)
class Call:
    """One call: what a servicer receives beside the request, and what the audit log records."""

    method: str
    context: grpc.ServicerContext
    records: Records
    ticket: Ticket
    certificate: bytes = b""  # the client's certificate, DER; empty if not yet known
    identity: auth.Identity | None = None  # None until the token is checked, and without a token
    user: str | None = None  # the caller's name; during a login, the name in the request
    job_id: str | None = None
    argv: list[str] | None = None  # StartJob only
    reason: str | None = None  # goes to the audit log instead of the message to the client
    recorded: bool = False
    undo: Callable[[], object] | None = None  # called if the audit log cannot be written
    undo_if_gone: bool = False  # `undo` is also called if nobody will receive the answer
    begun_s: float = 0.0  # when the call's thread began, by `time.monotonic`

    @property
    def caller(self) -> auth.Identity:
        if self.identity is None:
            raise auth.TokenError
        return self.identity

    @property
    def address(self) -> str:
        """The client's IP address, without the port."""
        _, _, address = unquote(str(self.context.peer())).partition(":")
        return address.rpartition(":")[0].strip("[]")

    def check_caller(self) -> None:
        """Raise an error of the gate if nobody will receive the answer to this call.

        An answer that is sent at the last moment arrives too late, and the server would not know.
        """
        if not self.context.is_active():
            raise _CallerGoneError
        left_s = self.context.time_remaining()
        if left_s is not None and left_s < _ANSWER_S:
            raise _TooLateError

    @property
    def fingerprint(self) -> str | None:
        return _fingerprint(self.certificate) if self.certificate else None

    def record(
        self, outcome: str = "OK", reason: str | None = None, *, alone: bool = False
    ) -> None:
        """Write the call's line in the audit log. `alone`: see `Records.write`.

        Before a servicer does something that cannot be undone, the servicer calls this. For all
        other calls the gate calls this once the outcome is known. A call that fails after its line
        was written gets a second line. Raises `AuditError` if the settings require a record and
        the line cannot be written, except for the calls of `_EVEN_IF_NOT_RECORDED`.
        """
        self.recorded = True
        fields = self.fields(outcome, reason)
        caller = self.identity.name if self.identity else self.certificate
        try:
            self.records.write(caller, fields, rpc=_rpc(self.method), alone=alone)
        except AuditError:
            if self.method not in _EVEN_IF_NOT_RECORDED:
                raise
            logger.critical("NOT IN THE AUDIT LOG, but allowed: %s", json.dumps(fields))

    def fields(self, outcome: str, reason: str | None) -> dict[str, Any]:
        """Return what the audit log records."""
        return {
            "peer": str(self.context.peer()),
            "certificate": self.fingerprint,
            "user": self.user,
            "role": self.identity.role.value if self.identity else None,
            "rpc": self.method,
            "job": self.job_id,
            "argv": self.argv,
            "outcome": outcome,
            "reason": self.reason or reason,
        }


class _Handler(grpc.RpcMethodHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """How gRPC is to handle one call: `unary` returns the answer, `stream` yields the answers.

    gRPC's functions that make a handler take 3 µs more, which the accepting thread cannot spare.
    """

    request_streaming = True
    request_deserializer = response_serializer = None
    unary_unary = unary_stream = None

    def __init__(
        self,
        unary: Callable[..., bytes] | None = None,
        stream: Callable[..., Iterator[bytes]] | None = None,
    ) -> None:
        self.response_streaming = stream is not None
        self.stream_unary = unary
        self.stream_stream = stream


class Gate(grpc.ServerInterceptor):
    """Admits calls, translates their errors and records them, in the same way for every RPC.

    A context manager: leaving the context ends the gate's thread. `calls`: the server's executor.
    `request_bytes`: a larger request is refused. gRPC's own ceiling should be higher, because
    gRPC's refusal does not name the setting. `metrics`: where calls are counted.
    """

    def __init__(
        self,
        authenticator: auth.Authenticator,
        audit: AuditLog,
        calls: Calls,
        *,
        request_bytes: int,
        metrics: Metrics | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._records = Records(audit)
        self._calls = calls
        self._request_bytes = request_bytes
        self._metrics = metrics or Metrics()

    def close(self) -> None:
        """End the gate's thread. The server must have stopped: no call may come afterwards."""
        self._records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = continuation(handler_call_details)  # None: the server has no such method
        method = handler_call_details.method[:SHOWN_CHARACTERS]
        is_stream = handler is not None and handler.response_streaming
        has_stream = is_stream or (handler is not None and handler.request_streaming)
        kind = Kind.STREAM if has_stream else Kind.SLOW if method in _SLOW else Kind.QUICK
        token = _bearer_token(handler_call_details.invocation_metadata)
        ticket = self._calls.arrive(self._caller(token, method), kind)
        # The gate tells gRPC that every call has a stream of requests. gRPC then runs the behaviour
        # before the request has arrived, and a call can be refused without its request. The gate
        # gives gRPC no deserializer: gRPC would reject a malformed request before the permissions
        # are checked, and a client without permission would learn the form of the request.
        if ticket.refusal is not None:
            return _Handler(unary=functools.partial(self._refuse_at_once, method, ticket))
        if is_stream:
            return _Handler(stream=functools.partial(self._stream, method, handler, ticket, token))
        return _Handler(unary=functools.partial(self._unary, method, handler, ticket, token))

    def _unary(  # noqa: PLR0913 -- what the interceptor knows, and what gRPC passes
        self,
        method: str,
        handler: Any,
        ticket: Ticket,
        token: str,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> bytes:
        """Handle a unary call in the call's thread; return the serialized answer."""
        call = Call(method, context, self._records, ticket)
        try:
            self._admit(call, handler, token)
            with self._working(call):
                request = self._receive(handler, requests, call)
                answer = (handler.unary_unary or handler.stream_unary)(request, call)
                data: bytes = handler.response_serializer(answer)
                ticket.hold(len(data) - ticket.unread)  # `lists.py` has counted its answer already
                if not call.recorded:
                    call.record(alone=call.undo is not None or call.method == _LOGIN)
                if call.undo_if_gone:
                    call.check_caller()
                self._served(call)
        except Exception as error:  # noqa: BLE001 -- every error becomes a status
            self._refuse(call, error)
        return data

    def _stream(  # noqa: PLR0913 -- what the interceptor knows, and what gRPC passes
        self,
        method: str,
        handler: Any,
        ticket: Ticket,
        token: str,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> Iterator[bytes]:
        """Handle a stream in the call's thread; yield the serialized messages."""
        call = Call(method, context, self._records, ticket)
        try:
            self._admit(call, handler, token)
            request = self._receive(handler, requests, call)
            messages = (handler.unary_stream or handler.stream_stream)(request, call)
            with contextlib.closing(messages):
                ticket.leave()
                # Tells the client, before the first output, that the stream is accepted.
                context.send_initial_metadata(_ACCEPTED)
                # The messages are serialized already. If gRPC serialized them, gRPC would keep both
                # the message and its bytes until the client reads.
                yield from messages
            self._served(call)
        except GeneratorExit:  # the client has gone
            self._metrics.calls.add(_rpc(method), grpc.StatusCode.CANCELLED.name)
            raise
        except Exception as error:  # noqa: BLE001 -- every error becomes a status
            self._refuse(call, error)

    def _served(self, call: Call) -> None:
        """Count a call that has succeeded."""
        self._metrics.calls.add(_rpc(call.method), "OK")
        if call.undo is not None:  # it has started a job
            self._metrics.starts.add()
            self._metrics.start_s.observe(time.monotonic() - call.begun_s)

    def _caller(self, token: str, method: str) -> object:
        """Return the key of the queue that the call joins.

        This checks only the token's signature, because the accepting thread may not be held up.
        `_admit` checks the whole token later.
        """
        name = self._authenticator.signed_for(token)
        return name or (STRANGERS_LOGIN if method == _LOGIN else STRANGERS)

    def _working(self, call: Call) -> contextlib.AbstractContextManager[None]:
        """Return the context for the call's work; for a login, `Calls.login`.

        Raises `OverloadError` if the caller has too many unread answers.
        """
        call.ticket.check_unread()
        if call.method == _LOGIN:
            return self._calls.login(call.certificate)
        return contextlib.nullcontext()

    def _refuse_at_once(
        self,
        method: str,
        ticket: Ticket,
        _requests: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> NoReturn:
        """Refuse a call that is one too many. Runs in gRPC's accepting thread.

        In an overload this thread has no time to spare. So calls that are refused share a line in
        the audit log, and the line has the address and the certificate of the first one only.
        """
        error = ticket.refusal or AssertionError("the call is not refused")
        fields = functools.partial(self._refused, method, ticket, context)
        self._records.share(ticket.key, (_rpc(method), _EXHAUSTED), fields)
        self._metrics.refused(_rpc(method), _EXHAUSTED, error)
        _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, error)

    def _refused(
        self, method: str, ticket: Ticket, context: grpc.ServicerContext
    ) -> dict[str, Any]:
        """Return what the audit log records of a call that was one too many."""
        call = Call(method, context, self._records, ticket)
        with contextlib.suppress(auth.AuthenticationError):
            call.certificate, _ = _certificate(context)
        return call.fields(_EXHAUSTED, str(ticket.refusal))

    def _admit(self, call: Call, handler: Any, token: str) -> None:
        """Begin; raise unless the method exists and TLS, the token and the role allow the call."""
        call.ticket.begin(call.context)
        call.begun_s = time.monotonic()
        self._metrics.queue_s.observe(call.begun_s - call.ticket.arrived_s)
        call.certificate, expires_at = _certificate(call.context)
        if time.time() > expires_at:  # TLS does not look at it again after the handshake
            raise auth.AuthenticationError("your client certificate has expired; get a new one")
        if handler is None:
            raise _UnknownMethodError
        if auth.PERMISSIONS.get(call.method, frozenset()) is None:
            return
        identity = self._authenticator.authenticate(token, call.certificate)
        call.identity = identity
        call.user = identity.name
        if not auth.may_call(call.method, identity.role):
            raise NotAllowedError(f"the role {identity.role.value} may not call {call.method}")

    def _receive(self, handler: Any, requests: Iterator[bytes], call: Call) -> Any:
        """Wait for the request; return the parsed message, or an iterator if there may be more."""
        try:
            data = call.ticket.receive(requests, call.context.cancel)
        except grpc.RpcError as error:  # gRPC raises this if the call has ended
            raise _NoRequestError from error
        if data is None:
            raise BadRequestError("there is no request in this call, or a far too large one")
        request = self._parse(handler, data)
        if handler.request_streaming:
            return chain([request], self._receive_rest(handler, requests))
        return request

    def _receive_rest(self, handler: Any, requests: Iterator[bytes]) -> Iterator[Any]:
        """Yield the messages after the first one, until the client ends them or has gone."""
        with contextlib.suppress(grpc.RpcError):  # gRPC raises this if the call has ended
            yield from map(functools.partial(self._parse, handler), requests)

    def _parse(self, handler: Any, data: bytes) -> Any:
        self._metrics.request_bytes.add(amount=len(data))
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
        """Record the error, and end the call with the status that `_ERRORS` has for the error."""
        code, message = _status(call.method, error)
        if not isinstance(error, AuditError):
            try:
                call.record(code.name, message)
            except AuditError as audit_error:
                code, message = _status(call.method, audit_error)
        if call.undo is not None and isinstance(error, (AuditError, _NoCallerError)):
            try:
                call.undo()
            except (worker.WorkerError, OSError) as undo_error:
                logger.error("%s: not undone after %r: %s", call.method, error, undo_error)
        self._metrics.refused(_rpc(call.method), code.name, error)
        _abort(call.context, code, error, message)


def _abort(
    context: grpc.ServicerContext, code: grpc.StatusCode, error: Exception, message: str = ""
) -> NoReturn:
    """End the call. The trailing metadata has the error's `retry_after_s`, if there is one."""
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


def _rpc(method: str) -> str:
    """Return the name of an RPC for what is kept by name; it is none that a client chooses."""
    return method.rpartition("/")[2] if method in auth.PERMISSIONS else "unknown"


def _certificate(context: grpc.ServicerContext) -> tuple[bytes, float]:
    """Return the client's certificate, DER, and its expiry. Raises unless this is TLS 1.3."""
    connection: Any = context.auth_context()  # dict[str, list[bytes]]
    if connection.get("ssl_tls_version") != [b"TLSv1.3"]:
        raise auth.AuthenticationError("the connection must be TLS 1.3")
    return _der(connection["x509_pem_cert"][0])


# Cached, because all calls of a connection have the same certificate. Even a large certificate has
# only 16 KiB.
@functools.lru_cache(maxsize=256)
def _der(pem: bytes) -> tuple[bytes, float]:
    der = ssl.PEM_cert_to_DER_cert(pem.decode())
    try:
        return der, expiry(der)
    except (ValueError, IndexError):
        raise auth.AuthenticationError(
            "the dates of your client certificate cannot be read; get a new one"
        ) from None


@functools.lru_cache(maxsize=256)
def _fingerprint(certificate: bytes) -> str:
    return hashlib.sha256(certificate).hexdigest()


def _bearer_token(metadata: Any) -> str:
    """Return the token of a call; "" if there is none, or more than one."""
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) == 1 and isinstance(values[0], str):
        scheme, _, token = values[0].partition(" ")
        if scheme.lower() == "bearer":
            return token
    return ""


def _status(method: str, error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return the status and message that `_ERRORS` has for the error. Logs some errors.

    The log gets the errors in `_OPERATOR_ERRORS` and those that are not in the table.
    """
    if isinstance(error, _OPERATOR_ERRORS):
        logger.error("%s: %s", method, error)
    for kind, code, message in _ERRORS:
        if isinstance(error, kind):
            return code, message or str(error)
    logger.error("%s: internal error", method, exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"
