"""What all calls of a client have in common: the token, the errors, and a server that is away.

    answer = link.call(stub.SomeCall, request)

A call that did not reach the server is made again for a while. A call that broke off is made again,
too, if serving it twice does the same as serving it once. `reopening.py` says how streams go on.

Thread safety: any thread may call anything.
"""

from __future__ import annotations

from clienterrors import CALL_TIMEOUT_S, ClientError, explain, strange_answer
from retrying import CALL_S, STREAM_S, Patience

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from typing import Any

    import grpc
    from google.protobuf.message import Message

    from tokenrenewal import Renewal

__all__ = ["Link", "is_token", "token_metadata"]

# A token has some 750 characters. gRPC starts to refuse calls with more than 8 KiB of metadata.
_MAX_TOKEN_CHARS = 7_500
_TELL_AFTER_S = 2.0
_WAS_CLOSED = "this client was closed"
_LONGEST_S = 1e9  # gRPC takes a deadline in 300 years for one that is over
# A server that was never reached and closes so many connections rejects the certificate.
_CLOSED_CONNECTIONS = 4


class Link:
    """A connection's way to make calls.

    `rpc_error`: gRPC's class of errors. `closed`: an event that ends the waiting for a server.
    `retry_for`, `connect_for`, `on_wait`: see `Client`.

    Attributes: `rpc_error`, `closed`, `renewal`; `is_reached`, whether the server has ever
    answered.
    """

    def __init__(  # noqa: PLR0913 -- the parts of a client
        self,
        server: str,
        rpc_error: type[Exception],
        renewal: Renewal,
        closed: threading.Event,
        *,
        retry_for: float | None,
        connect_for: float,
        on_wait: Callable[[ClientError], object] | None,
    ) -> None:
        self.rpc_error: Any = rpc_error
        self.renewal = renewal
        self.closed = closed
        self._server = server
        self.is_reached = False
        self._retry_for = retry_for
        self._connect_for = connect_for
        self._on_wait = on_wait

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return a fresh token as a call sends it."""
        return token_metadata(self.renewal.current())

    def patience(
        self,
        closed: threading.Event,
        tell: Callable[[ClientError], object] | None = None,
        tell_after_s: float = 0.0,
    ) -> Patience:
        """Return the pauses of one call or stream. Without `tell`, `on_wait` hears of an outage."""
        if tell is None:
            tell, tell_after_s = self._on_wait, _TELL_AFTER_S
        return Patience(closed, tell, tell_after_s)

    @property
    def stream_s(self) -> float:
        """For how long a stream that broke off is tried again."""
        return STREAM_S if self._retry_for is None else self._retry_for

    def retry_s(self, error: ClientError, patience: Patience, *, is_stream: bool = False) -> float:
        """Return for how long a call is to be made again after such errors; 0 if not at all."""
        if not error.may_pass:
            return 0.0
        if self.is_reached and is_stream:
            return self.stream_s
        if self.is_reached:
            return CALL_S if self._retry_for is None else self._retry_for
        is_rejected = error.was_closed and patience.closed_connections >= _CLOSED_CONNECTIONS - 1
        return 0.0 if is_rejected else self._connect_for

    def explain(self, error: grpc.RpcError) -> ClientError:
        """Translate gRPC's error for the user."""
        if self.closed.is_set() and error.code().name == "CANCELLED":
            return ClientError(_WAS_CLOSED, "CANCELLED")
        return explain(self._server, error)

    def begin(
        self, method: Any, request: Any, *, timeout: float | None = None, **options: Any
    ) -> Any:
        """Make a call; return what gRPC returns.

        Raises `ClientError` if the client is closed, or if the answer has no message.
        """
        if timeout is not None:
            timeout = min(timeout, _LONGEST_S)
        try:
            answer = method(request, timeout=timeout, **options)
        except ValueError as error:  # of gRPC
            if not self.closed.is_set():
                raise
            raise ClientError(_WAS_CLOSED, "CANCELLED") from error
        if answer is None:
            raise strange_answer(self._server)
        return answer

    def call(  # noqa: PLR0913 -- most are optional
        self,
        method: Any,
        request: Message,
        *,
        with_token: bool = True,
        more_s: float = 0.0,
        is_repeatable: bool = True,
        done_code: str = "",
    ) -> Any:
        """Make a call with one answer; return the answer. Raises `ClientError`.

        `more_s`: the server may take that much longer. `is_repeatable`: the call may be made again
        although the server may have served it. `done_code`: the status that a repeated call gets if
        the server has served the first one; None is returned then, because the answer is lost.
        """
        patience = self.patience(self.closed)
        was_open = False  # whether the server may have served an earlier attempt
        while True:
            metadata = self.metadata() if with_token else ()
            try:
                answer = self.begin(
                    method, request, timeout=CALL_TIMEOUT_S + more_s, metadata=metadata
                )
            except self.rpc_error as rpc_error:
                error = self.explain(rpc_error)
                if was_open and error.code == done_code:
                    return None
                retry_s = self.retry_s(error, patience)
                if not retry_s or (error.is_open and not is_repeatable):
                    raise error from rpc_error
                patience.wait(error, for_s=retry_s)
                was_open = was_open or error.is_open
            else:
                self.is_reached = True
                return answer


def token_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """Return the token as a call sends it. Raises `ClientError` if it is none."""
    if not is_token(token):  # gRPC would refuse it with an obscure message
        raise ClientError("this is not a token; log in again, or check -t and JOBWORKER_TOKEN")
    return (("authorization", f"Bearer {token}"),)


def is_token(text: str) -> bool:
    """Whether the text can be sent as a token."""
    return len(text) <= _MAX_TOKEN_CHARS and text.isascii() and text.isprintable()
