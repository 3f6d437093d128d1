"""A bare gRPC server that refuses what is too much; the floor of `bench/overload.py`.

    python -m bench.bounded SECONDS       # the server

An interceptor reads the token, as every server must that knows whose call it is. A call beyond
`_CALLS` is refused in gRPC's accepting thread. One worker answers the others, each after
SECONDS of computing (CPU time). There are no turns, no permissions and no audit log.
"""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from bench import harness  # isort: skip -- before grpc

import grpc

from server import GRPC_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SERVICE, _METHOD = "jobworker.v1.WorkerService", "GetJobStatus"
# Those of `calls.py` and `gathering.py`.
_CALLS, _CALLS_IN_CORE, _SWITCH_S = 1024, 32768, 0.0005
_ANSWER = bytes(300)
_RETRY = (("retry-after", "1"), ("grpc-retry-pushback-ms", "1000"))


class _Bounded(Executor, grpc.ServerInterceptor):
    """Counts, refuses and runs the calls."""

    def __init__(self, work_s: float) -> None:
        self._work_s = work_s
        # Guards `_open`. Held for microseconds.
        self._lock = threading.Lock()
        self._open = 0  # calls that are not over
        self._refuses = False  # the call that has arrived; the accepting thread alone uses it
        self._queue: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._done: Future[None] = Future()
        self._done.set_result(None)
        self.serve: Any = grpc.stream_unary_rpc_method_handler(self._serve)
        self._refuse: Any = grpc.stream_unary_rpc_method_handler(_refuse)
        threading.Thread(target=self._work, name="worker", daemon=True).start()

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        continuation(handler_call_details)
        dict(handler_call_details.invocation_metadata)["authorization"].partition(" ")
        with self._lock:
            self._refuses = self._open >= _CALLS
            self._open += not self._refuses
        return self._refuse if self._refuses else self.serve

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._refuses:
            fn(*args, **kwargs)
        else:
            self._queue.put(lambda: fn(*args, **kwargs))
        return self._done

    def _work(self) -> None:
        while True:
            self._queue.get()()

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        context.add_callback(self._over)
        next(requests, None)
        # Of this thread's own time: while another thread has the interpreter, nothing is computed.
        end = time.thread_time() + self._work_s
        while time.thread_time() < end:
            pass
        return _ANSWER

    def _over(self) -> None:
        with self._lock:
            self._open -= 1


def _refuse(_requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    context.set_trailing_metadata(_RETRY)
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls")
    raise AssertionError("abort has raised")


def _main() -> None:
    sys.setswitchinterval(_SWITCH_S)
    calls: Any = _Bounded(float(sys.argv[1]))  # gRPC takes any executor
    pending = "grpc.server.max_pending_requests"
    options = (
        *GRPC_OPTIONS,
        *((name, _CALLS_IN_CORE) for name in (pending, f"{pending}_hard_limit")),
    )
    server = grpc.server(calls, interceptors=[calls], options=options)
    server.add_registered_method_handlers(_SERVICE, {_METHOD: calls.serve})
    harness.run_floor(server)


if __name__ == "__main__":
    _main()
