"""Tests of the threads of calls: turns, queues, bursts, and what gRPC's own thread is doing."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from callpool import (
    _BEHIND_CALLS,
    _BEHIND_CALLS_PER_S,
    _BEHIND_IN_OVERLOAD_S,
    _BEHIND_S,
    _RELIEF_S,
    _TRICKLE_S,
    _WINDOW_S,
    Acceptor,
    CallPool,
    waiting,
)
from testkit import GUARD_S, Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

_BURST_S = 0.1


class _Busy(Acceptor):
    """As if it had been behind for so many `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def behind_s(self) -> float:
        return self.seconds


def _in_turn(pool: CallPool, behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return pool.in_turn(behavior, lambda _context, reason: reason)


class _Held:
    """Calls that are under way until `end`."""

    def __init__(self, pool: CallPool) -> None:
        self._pool = pool
        self._go_on = threading.Event()
        self._calls: list[Future[Any]] = []

    def begin(self, count: int) -> None:
        behavior = _in_turn(self._pool, lambda _request, _context: self._go_on.wait(GUARD_S))
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
    clock = Clock()
    with (
        CallPool("calls", threads=100, turns=2, places=5, clock=clock) as pool,
        _held(pool) as held,
    ):
        held.begin(20)
        clock.now += _BURST_S / 2
        assert pool.why_full() is None
        clock.now += _BURST_S
        assert pool.why_full() == "20 calls wait to be handled"


def test_few_that_wait_for_long_are_no_reason_to_refuse() -> None:
    """Below the places nobody is refused, however long the queue stands."""
    clock = Clock()
    with (
        CallPool("calls", threads=100, turns=2, places=5, clock=clock) as pool,
        _held(pool) as held,
    ):
        held.begin(4)
        clock.now += 1000
        assert pool.why_full() is None


def test_pool_that_nobody_waits_for_is_ready_for_the_next_burst() -> None:
    """What counts is a queue without a break, not one that was there once."""
    clock = Clock()
    with CallPool("calls", threads=100, turns=2, places=5, clock=clock) as pool:
        with _held(pool) as held:
            held.begin(20)
        clock.now += 1000
        with _held(pool) as held:
            held.begin(20)
            assert pool.why_full() is None


def test_overload_that_lasts_is_not_met_with_the_patience_of_a_burst() -> None:
    """Who has been refused a moment ago sees no queue grow again, and only a shorter one."""
    clock = Clock()
    with CallPool("calls", threads=100, turns=1, places=8, few_places=3, clock=clock) as pool:
        with _held(pool) as held:
            held.begin(7)
            clock.now += 1000
            assert pool.why_full() is None
            held.begin(1)
            assert pool.why_full() == "8 calls wait to be handled"
        with _held(pool) as held:
            clock.now += _RELIEF_S / 2
            held.begin(2)
            assert pool.why_full() is None
            held.begin(1)
            assert pool.why_full() == "3 calls wait to be handled"
        clock.now += _RELIEF_S
        with _held(pool) as held:
            held.begin(20)
            assert pool.why_full() is None


@pytest.mark.parametrize(
    ("behind_s", "is_full"),
    [(0.0, False), (_BEHIND_S - 0.01, False), (_BEHIND_S, True)],
)
def test_calls_that_grpc_has_not_even_looked_at_are_a_queue_too(
    behind_s: float, is_full: bool
) -> None:
    """Only one waits in the pool; but the thread that accepts calls has long had no break."""
    with (
        CallPool("calls", threads=100, turns=1, acceptor=_Busy(behind_s)) as pool,
        _held(pool) as held,
    ):
        held.begin(1)
        expected = "calls arrive faster than they can be looked at" if is_full else None
        assert pool.why_full() == expected


def test_acceptor_that_is_behind_must_catch_up_when_there_is_overload() -> None:
    """Once calls are refused, milliseconds without a break are too many."""
    clock, acceptor = Clock(), _Busy(_BEHIND_S)
    with (
        CallPool("calls", threads=100, turns=1, acceptor=acceptor, clock=clock) as pool,
        _held(pool) as held,
    ):
        held.begin(1)
        assert pool.why_full() is not None
        acceptor.seconds = _BEHIND_IN_OVERLOAD_S
        assert pool.why_full() is not None
        acceptor.seconds = _BEHIND_IN_OVERLOAD_S / 2
        assert pool.why_full() is None
        acceptor.seconds = _BEHIND_IN_OVERLOAD_S
        clock.now += _RELIEF_S
        assert pool.why_full() is None


def test_some_are_served_however_far_the_acceptor_is_behind() -> None:
    """One every few milliseconds, if no other is: else those who ask again at once stop all."""
    clock = Clock()
    with CallPool("calls", threads=100, turns=1, acceptor=_Busy(1000), clock=clock) as pool:
        for _ in range(3):
            assert pool.why_full() is None
            clock.now += _TRICKLE_S / 2
            assert pool.why_full() is not None
            clock.now += _TRICKLE_S
            with _held(pool) as held:
                held.begin(1)
                assert pool.why_full() is not None


def test_call_whose_turn_comes_late_in_an_overload_is_refused_after_all() -> None:
    """Whoever was let wait as one of a burst, which it was not; not who came a moment ago."""
    clock = Clock()
    with CallPool("calls", threads=100, turns=1, places=2, stale_s=0.01, clock=clock) as pool:

        def answers(count: int) -> list[Future[Any]]:
            behavior = [_in_turn(pool, lambda *_: "served") for _ in range(count)]
            return [pool.submit(each, b"", None) for each in behavior]

        with _held(pool) as held:
            held.begin(1)
            stale = answers(3)
            clock.now += _BURST_S
            assert pool.why_full() == "4 calls wait to be handled"
            fresh = answers(1)
        reason = "calls wait too long to be handled"
        assert [each.result(GUARD_S) for each in stale + fresh] == [reason] * 3 + ["served"]
        with _held(pool) as held:
            held.begin(1)
            late = answers(2)
            clock.now += _RELIEF_S
        assert [each.result(GUARD_S) for each in late] == ["served"] * 2


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
        calls = [pool.submit(_in_turn(pool, behavior), b"", None) for _ in range(30)]
        for call in calls:
            call.result(GUARD_S)
    assert most == 3


def test_call_that_waits_for_its_request_keeps_nobody_from_their_turn() -> None:
    """A client that sends nothing has no turn and no place, only its thread."""
    clock = Clock()
    arrived = threading.Event()

    def requests() -> Iterator[bytes]:
        assert arrived.wait(GUARD_S)
        yield b"late"

    with CallPool("calls", threads=4, turns=1, places=2, clock=clock) as pool:
        behavior = _in_turn(pool, lambda requests, _context: next(requests, None))
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
                pool.submit(_in_turn(pool, fail), b"", None).result(GUARD_S)
            assert pool.why_full() is None


def test_pool_that_is_shut_down_counts_nothing() -> None:
    """A call that cannot be submitted is not under way."""
    with CallPool("calls", threads=1) as pool:
        pass
    for _ in range(2):
        with pytest.raises(RuntimeError):
            pool.submit(print)
    assert pool.why_full() is None


def test_call_whose_request_is_there_at_once_keeps_its_turn() -> None:
    """The next call comes after it, in the same thread: nobody was woken to do it meanwhile."""
    threads = []

    def behavior(requests: Iterator[bytes], _context: object) -> None:
        next(requests)
        threads.append(threading.get_ident())

    with CallPool("calls", threads=20, turns=1) as pool:
        with _held(pool) as held:
            held.begin(1)
            calls = [pool.submit(_in_turn(pool, behavior), iter([b""]), None) for _ in range(15)]
        for call in calls:
            call.result(GUARD_S)
    assert len(threads) == 15
    assert len(set(threads)) == 1


def test_request_that_comes_late_gets_a_turn_before_those_who_came_later() -> None:
    """And computes beside nobody, like everybody else."""
    order: list[str] = []
    arrived, entered, go_on = threading.Event(), threading.Event(), threading.Event()

    def requests() -> Iterator[str]:
        assert arrived.wait(GUARD_S)
        yield "late"

    def behavior(request: str | Iterator[str], _context: object) -> None:
        name = request if isinstance(request, str) else next(request)
        if name == "next":
            entered.set()
            assert go_on.wait(GUARD_S)
        order.append(name)

    with CallPool("calls", threads=20, turns=1) as pool:
        in_turn = _in_turn(pool, behavior)
        calls = [pool.submit(in_turn, requests(), None)]
        calls += [pool.submit(in_turn, name, None) for name in ("next", "last")]
        assert entered.wait(GUARD_S)  # the late one has lost its turn
        arrived.set()
        while not pool._returning:
            pass
        go_on.set()
        for call in calls:
            call.result(GUARD_S)
    assert order == ["next", "late", "last"]


def test_call_that_waits_for_something_else_keeps_nobody_from_their_turn() -> None:
    """It has a turn again before it goes on, with nobody beside it."""
    begun, over = threading.Event(), threading.Event()
    running: list[str] = []

    def slow(_request: object, _context: object) -> list[str]:
        with waiting():
            begun.set()
            assert over.wait(GUARD_S)
        running.append("slow")
        return list(running)

    def quick(_request: object, _context: object) -> None:
        running.append("quick")
        over.set()
        running.remove("quick")

    clock = Clock()
    with CallPool("calls", threads=20, turns=1, places=2, clock=clock) as pool:
        call = pool.submit(_in_turn(pool, slow), b"", None)
        assert begun.wait(GUARD_S)
        for _ in range(3):
            pool.submit(_in_turn(pool, quick), b"", None).result(GUARD_S)
        assert call.result(GUARD_S) == ["slow"]
        with _held(pool) as held:  # the turn and the places are there again, once
            held.begin(1)
            clock.now += 1000
            assert pool.why_full() is None
            held.begin(1)
            clock.now += 1000
            assert pool.why_full() == "2 calls wait to be handled"


def test_wait_in_no_pool_is_like_any_other() -> None:
    """So the code of a call can run elsewhere, too."""
    with waiting():
        pass


def test_pool_shuts_down_while_a_request_is_late_and_others_wait() -> None:
    """Every call is over then, and each had its turn."""
    arrived = threading.Event()

    def requests() -> Iterator[bytes]:
        assert arrived.wait(GUARD_S)
        yield b""

    pool = CallPool("calls", threads=20, turns=1)
    in_turn = _in_turn(pool, lambda requests, _context: next(requests))
    calls = [pool.submit(in_turn, each, None) for each in (requests(), iter([b""]))]
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError):
        pool.submit(print)
    arrived.set()
    pool.shutdown()
    assert [call.result(GUARD_S) for call in calls] == [b""] * 2
    assert pool.why_full() is None


@pytest.mark.parametrize(
    ("calls", "others", "seconds", "behind_s"),
    [
        (_BEHIND_CALLS, 0, 0.02, 0.02),
        (_BEHIND_CALLS - 1, 1000, 0.02, 0.0),  # streams, and a few calls
        (_BEHIND_CALLS_PER_S // 2, 0, 0.5, 0.5),
        (_BEHIND_CALLS_PER_S // 2 - 1, 1000, 0.5, 0.0),
        (0, 1000, 0.5, 0.0),
    ],
)
def test_only_many_calls_without_a_break_are_too_many(
    calls: int, others: int, seconds: float, behind_s: float
) -> None:
    """However long gRPC's thread has been busy with what belongs to streams."""
    clock = Clock()
    acceptor = Acceptor(clock)
    for is_call in [False] * others + [True] * calls:
        acceptor.takes(is_call=is_call)
    clock.now += seconds
    assert acceptor.behind_s() == pytest.approx(behind_s)
    acceptor.waits()
    assert acceptor.behind_s() == 0.0


def test_calls_of_long_ago_do_not_count() -> None:
    """A thread that streams keep busy for minutes takes thousands of calls meanwhile."""
    clock = Clock()
    acceptor = Acceptor(clock)
    for _ in range(1000):
        acceptor.takes(is_call=True)
    clock.now += _WINDOW_S + 0.01
    acceptor.takes(is_call=True)
    clock.now += 0.1
    assert acceptor.behind_s() == 0.0


def test_acceptor_looks_at_grpcs_own_thread() -> None:
    """It has a call as long as an interceptor keeps it, and a break when there is nothing to do."""
    entered, go_on, idle = threading.Event(), threading.Event(), threading.Event()
    clock = Clock()

    class Watched(Acceptor):
        calls = 0

        def waits(self) -> None:
            super().waits()
            idle.set()

        def takes(self, *, is_call: bool) -> None:
            for _ in range(_BEHIND_CALLS):
                super().takes(is_call=is_call)
            Watched.calls += is_call

    class Slow(grpc.ServerInterceptor):
        def intercept_service(self, *_: object) -> None:
            idle.clear()
            entered.set()
            assert go_on.wait(GUARD_S)

    acceptor = Watched(clock)
    with CallPool("calls", threads=1) as pool:
        server = grpc.server(pool, interceptors=[Slow()])
        acceptor.attach(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                method: Any = channel.unary_unary("/S/M")
                call = method.future(b"")
                assert entered.wait(GUARD_S)
                clock.now += 0.01
                assert acceptor.behind_s() == pytest.approx(0.01)
                go_on.set()
                assert call.code() is grpc.StatusCode.UNIMPLEMENTED
                assert idle.wait(GUARD_S)
                assert acceptor.behind_s() == 0.0
                assert Watched.calls == 1  # its other events are none
        finally:
            go_on.set()
            server.stop(None).wait()
