"""Tests of admission control: real threads, and a real gRPC server with its clients."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from admission import _BURST_S, Admission, CallPool
from conftest import GUARD_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class _Held:
    """Calls that are under way until `end`."""

    def __init__(self, pool: CallPool) -> None:
        self._pool = pool
        self._go_on = threading.Event()
        self._calls: list[Future[Any]] = []

    def begin(self, count: int) -> None:
        behavior = self._pool.in_turn(lambda _request, _context: self._go_on.wait(GUARD_S))
        self._calls += [self._pool.submit(behavior, b"", None) for _ in range(count)]

    def end(self) -> None:
        self._go_on.set()
        for call in self._calls:
            assert call.result(GUARD_S)


@contextlib.contextmanager
def _held(pool: CallPool) -> Iterator[_Held]:
    held = _Held(pool)
    try:
        yield held
    finally:
        held.end()


# --- a pool ---------------------------------------------------------------------------------


def test_pool_has_as_many_calls_as_threads_and_has_room_again_when_they_are_over() -> None:
    """Each call has a thread, so that none waits for one; the next is one too many."""
    with CallPool("streams", threads=3) as pool:
        for _ in range(3):
            with _held(pool) as held:
                held.begin(2)
                assert pool.why_full() is None
                held.begin(1)
                assert pool.why_full() == "3 streams are under way"
            assert pool.why_full() is None


def test_burst_is_served_and_a_queue_that_stands_is_not_made_longer() -> None:
    """Many may wait for a moment; once some have waited all the time, only so many."""
    clock = _Clock()
    with (
        CallPool("calls", threads=100, turns=2, places=5, clock=clock) as pool,
        _held(pool) as held,
    ):
        held.begin(20)
        clock.now += _BURST_S / 2
        assert pool.why_full() is None
        clock.now += _BURST_S / 2
        assert pool.why_full() == "20 calls wait to be handled"


def test_few_that_wait_for_long_are_no_reason_to_refuse() -> None:
    """Below the places nobody is refused, however long the queue stands."""
    clock = _Clock()
    with (
        CallPool("calls", threads=100, turns=2, places=5, clock=clock) as pool,
        _held(pool) as held,
    ):
        held.begin(4)
        clock.now += 1000
        assert pool.why_full() is None


def test_pool_that_nobody_waits_for_is_ready_for_the_next_burst() -> None:
    """What counts is a queue without a break, not one that was there once."""
    clock = _Clock()
    with CallPool("calls", threads=100, turns=2, places=5, clock=clock) as pool:
        with _held(pool) as held:
            held.begin(20)
        clock.now += 1000
        with _held(pool) as held:
            held.begin(20)
            assert pool.why_full() is None


def test_no_more_calls_compute_at_a_time_than_have_their_turn() -> None:
    """Of many, as many as there are turns run at once: all of those, and never one more."""
    together = threading.Barrier(3)
    lock = threading.Lock()
    running, most = 0, 0

    def behavior(_request: object, _context: object) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(GUARD_S)
        with lock:
            running -= 1
        together.wait(GUARD_S)

    with CallPool("calls", threads=30, turns=3) as pool:
        calls = [pool.submit(pool.in_turn(behavior), b"", None) for _ in range(30)]
        for call in calls:
            call.result(GUARD_S)
    assert most == 3


def test_call_that_waits_for_its_request_keeps_nobody_from_their_turn() -> None:
    """A client that sends nothing has no turn and no place, only its thread."""
    clock = _Clock()
    arrived = threading.Event()

    def requests() -> Iterator[bytes]:
        assert arrived.wait(GUARD_S)
        yield b"late"

    with CallPool("calls", threads=4, turns=1, places=2, clock=clock) as pool:
        behavior = pool.in_turn(lambda requests, _context: next(requests, None))
        try:
            late = [pool.submit(behavior, requests(), None) for _ in range(3)]
            assert pool.submit(behavior, iter([b"here"]), None).result(GUARD_S) == b"here"
            clock.now += 1000
            assert pool.why_full() is None
        finally:
            arrived.set()
        assert [call.result(GUARD_S) for call in late] == [b"late"] * 3


def test_call_that_fails_gives_its_turn_and_its_place_back() -> None:
    """Whatever becomes of a call, it is over then."""

    def fail(_request: object, _context: object) -> None:
        raise ZeroDivisionError

    with CallPool("calls", threads=1, turns=1) as pool:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                pool.submit(pool.in_turn(fail), b"", None).result(GUARD_S)
            assert pool.why_full() is None


def test_pool_that_is_shut_down_counts_nothing() -> None:
    """A call that cannot be submitted is not under way."""
    with CallPool("calls", threads=1) as pool:
        pass
    for _ in range(2):
        with pytest.raises(RuntimeError):
            pool.submit(print)
    assert pool.why_full() is None


# --- a server -------------------------------------------------------------------------------


class _Pool(CallPool):
    """Tells when a call is over."""

    def __init__(self, what: str, threads: int) -> None:
        super().__init__(what, threads=threads)
        self.over = threading.Semaphore(0)

    def _count(self, calls: int, places: int) -> None:
        super()._count(calls, places)
        if calls < 0:
            self.over.release()


class _Service:
    """`Call` and `Stream` hold a thread until `go_on`; `Other` does not."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.threads: set[str] = set()
        self.refused: list[tuple[str, str]] = []  # as the server is told
        self.handlers = grpc.method_handlers_generic_handler(
            "S",
            {
                "Call": grpc.unary_unary_rpc_method_handler(self._call),
                "Stream": grpc.unary_stream_rpc_method_handler(self._stream),
                "Other": grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"other"),
            },
        )

    def _call(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        self.threads.add(threading.current_thread().name.rpartition("_")[0])
        self.entered.release()
        assert self.go_on.wait(GUARD_S)
        return b"done"

    def _stream(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield self._call(request, context)

    def await_entered(self, count: int) -> None:
        for _ in range(count):
            assert self.entered.acquire(timeout=GUARD_S)


@pytest.fixture
def service() -> _Service:
    return _Service()


@pytest.fixture
def held_pool() -> _Pool:
    return _Pool("held calls", 2)


@pytest.fixture
def channel(service: _Service, held_pool: _Pool) -> Iterator[Any]:
    with (
        CallPool("others", threads=2) as others,
        held_pool,
        Admission(
            {"/S/Call": held_pool, "/S/Stream": held_pool},
            others,
            lambda method, _, message: service.refused.append((method, message)),
        ) as admission,
    ):
        server = grpc.server(others, interceptors=[admission])
        server.add_generic_rpc_handlers((service.handlers,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield channel
        finally:
            service.go_on.set()
            server.stop(None).wait()


def _method(channel: Any, name: str) -> Any:
    if name == "Stream":
        return channel.unary_stream(f"/S/{name}")
    return channel.unary_unary(f"/S/{name}")


@pytest.mark.parametrize("kind", ["Call", "Stream"])
def test_call_too_many_is_refused_at_once_and_says_when_to_try_again(
    channel: Any, service: _Service, kind: str
) -> None:
    """It reaches no handler; those under way and calls of other kinds go on; then there is room."""
    call = channel.unary_unary("/S/Call")
    held = [call.future(b"") for _ in range(2)]
    service.await_entered(2)
    for _ in range(10):
        with pytest.raises(grpc.RpcError) as caught:
            list(_method(channel, kind)(b"", timeout=GUARD_S))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == (
            "the server is overloaded: 2 held calls are under way; try again in 1 s"
        )
        assert dict(error.trailing_metadata())["retry-after"] == "1"
        assert channel.unary_unary("/S/Other")(b"", timeout=GUARD_S) == b"other"
    assert not service.entered.acquire(blocking=False)
    assert service.refused == [(f"/S/{kind}", error.details())] * 10
    service.go_on.set()
    assert [each.result(GUARD_S) for each in held] == [b"done"] * 2


def test_each_kind_of_call_runs_in_its_own_threads(channel: Any, service: _Service) -> None:
    """Unary or stream, what is given to a pool runs in it."""
    service.go_on.set()
    assert channel.unary_unary("/S/Call")(b"", timeout=GUARD_S) == b"done"
    assert list(channel.unary_stream("/S/Stream")(b"", timeout=GUARD_S)) == [b"done"]
    assert service.threads == {"rpc-held calls"}


def test_unknown_method_is_still_unknown(channel: Any) -> None:
    """Admission does not answer for what is not there."""
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/S/Nothing")(b"", timeout=GUARD_S)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_client_that_goes_before_it_has_sent_its_request_leaves_room(
    channel: Any, service: _Service, held_pool: _Pool
) -> None:
    """Such a call never gets to its handler, and is over all the same."""
    gone = threading.Event()

    def no_request() -> Iterator[bytes]:
        gone.wait(GUARD_S)
        yield from ()

    open_call = channel.stream_unary("/S/Call")
    service.go_on.set()
    try:
        for _ in range(5):
            calls = [open_call.future(no_request()) for _ in range(2)]
            while held_pool.why_full() is None:  # until the server has them both
                pass
            for each in calls:
                each.cancel()
            for _ in range(2):
                assert held_pool.over.acquire(timeout=GUARD_S)
            assert held_pool.why_full() is None
    finally:
        gone.set()
    assert channel.unary_unary("/S/Call")(b"", timeout=GUARD_S) == b"done"


def test_flood_is_answered_with_room_or_a_refusal_and_leaves_no_trace(
    channel: Any, service: _Service, held_pool: _Pool
) -> None:
    """Of many calls at once each is served or refused, and all the room is there again."""
    service.go_on.set()
    call = channel.unary_unary("/S/Call")

    def outcome(_: int) -> str:
        try:
            call(b"", timeout=GUARD_S)
        except grpc.RpcError as error:
            caught: Any = error
            return str(caught.code().name)
        return "OK"

    with ThreadPoolExecutor(32) as clients:
        outcomes = list(clients.map(outcome, range(400)))
    assert set(outcomes) <= {"OK", "RESOURCE_EXHAUSTED"}
    for _ in range(outcomes.count("OK")):
        assert held_pool.over.acquire(timeout=GUARD_S)
    assert held_pool.why_full() is None
