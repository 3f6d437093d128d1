"""Admission control: how many calls may be under way, so that overload is refused, not suffered.

Each kind of call has threads of its own (`callpool.py`). A call beyond them is refused at
once, before anything is known of it but its method.

    streams = CallPool("streams", threads=1000)
    others = CallPool("other calls", threads=128, turns=1, places=64)
    with streams, others, Admission({"/package.Service/Follow": streams}, others) as admission:
        server = grpc.server(others, interceptors=[admission, ...])

It comes before all other interceptors, and knows nothing of users: who may have how much
of what is for `quotas.py` to say, once a caller is known. `Arrivals` is for then, too: it
bounds how long a call waits for its request.

Threads: `intercept_service` runs on gRPC's `_serve` thread, which alone submits to the
pools; so nobody comes between its look and the taking. That thread also refuses, but for those
whose turn came too late: the less a refusal costs, the more is left to serve the others, and
handing it over would cost more.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import grpc

from quotas import QuotaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from callpool import CallPool

__all__ = ["Admission", "Arrivals"]

_RETRY_AFTER_S = 1

# A call that has not sent its request after twice that is cancelled. It normally comes in
# one packet with the call.
_ARRIVAL_S = 3.0
_OVERDUE_CALLS = 32  # of one caller at a time; more are no accident
_BLOCKED_S = 60


class _OnTheSpot(ThreadPoolExecutor):
    """Runs what does not wait in the thread that submits it. gRPC takes no other executor."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Admission(grpc.ServerInterceptor):
    """Gives every call to the pool of its kind, or refuses it if that is full.

    `pools`: by method ("/package.Service/Method"); `others`: for all other methods. They are
    the caller's to shut down. `on_refusal`: is told the method, the context and the message of
    a refusal, by any thread, and must not block.
    """

    def __init__(
        self,
        pools: Mapping[str, CallPool],
        others: CallPool,
        on_refusal: Callable[[str, grpc.ServicerContext, str], object] = lambda *_: None,
    ) -> None:
        self._pools = pools
        self._others = others
        self._on_refusal = on_refusal
        self._on_the_spot = _OnTheSpot()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        pool = self._pools.get(handler_call_details.method, self._others)
        reason = pool.why_full()
        if reason is not None:
            return self._refusal(handler_call_details.method, reason)
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        behavior: Any
        if handler.response_streaming:
            make = grpc.unary_stream_rpc_method_handler
            if handler.request_streaming:
                make = grpc.stream_stream_rpc_method_handler
            # A stream has no turn, which it might never give up.
            behavior = functools.partial(handler.stream_stream or handler.unary_stream)
        else:
            make = grpc.unary_unary_rpc_method_handler
            if handler.request_streaming:
                make = grpc.stream_unary_rpc_method_handler
            refuse = functools.partial(self._refuse, handler_call_details.method)
            behavior = pool.in_turn(handler.stream_unary or handler.unary_unary, refuse)
        # gRPC looks for this attribute; it is undocumented, so a test looks at the threads.
        behavior.experimental_thread_pool = pool
        return make(behavior, handler.request_deserializer, handler.response_serializer)

    def _refusal(self, method: str, reason: str) -> Any:
        def refuse(_requests: Iterator[bytes], context: grpc.ServicerContext) -> None:
            self._refuse(method, context, reason)

        # As in intercept_service; functions may have attributes, but mypy knows of none.
        refuse.experimental_thread_pool = self._on_the_spot  # type: ignore[attr-defined]
        # As if for a stream of requests, so that nobody waits for one.
        return grpc.stream_unary_rpc_method_handler(refuse)

    def _refuse(self, method: str, context: grpc.ServicerContext, reason: str) -> NoReturn:
        message = f"the server is overloaded: {reason}; try again in {_RETRY_AFTER_S} s"
        self._on_refusal(method, context, message)
        context.set_trailing_metadata((("retry-after", str(_RETRY_AFTER_S)),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)


class _Waiting(NamedTuple):
    caller: str | bytes
    cancel: Callable[[], object]


class Arrivals:
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
        """End the thread; what still waits is not cancelled any more."""
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
