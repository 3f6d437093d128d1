"""Tests of admission control: real threads, and a real gRPC server with its clients."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from admission import Admission
from callpool import CallPool
from testkit import GUARD_S

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Pool(CallPool):
    """Tells when a call is over."""

    def __init__(self, what: str, threads: int) -> None:
        super().__init__(what, threads=threads)
        self.over = threading.Semaphore(0)

    def _count_locked(self, calls: int, places: int) -> None:
        super()._count_locked(calls, places)
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
    ):
        admission = Admission(
            {"/S/Call": held_pool, "/S/Stream": held_pool},
            others,
            lambda method, _, message: service.refused.append((method, message)),
        )
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


def test_call_whose_turn_comes_too_late_is_refused_in_the_same_way(
    channel: Any, service: _Service, held_pool: _Pool
) -> None:
    """It reaches no handler, and leaves its room to the next."""
    held_pool._overloaded_until, held_pool._stale_s = math.inf, 0.0
    for _ in range(10):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/S/Call")(b"", timeout=GUARD_S)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == (
            "the server is overloaded: held calls wait too long to be handled; try again in 1 s"
        )
        assert dict(error.trailing_metadata())["retry-after"] == "1"
        assert held_pool.over.acquire(timeout=GUARD_S)
    assert service.refused == [("/S/Call", error.details())] * 10
    held_pool._overloaded_until = -math.inf
    service.go_on.set()
    assert channel.unary_unary("/S/Call")(b"", timeout=GUARD_S) == b"done"


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
