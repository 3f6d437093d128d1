"""The threads of one kind of call, of which few at a time have their turn to compute.

More threads are not faster in one interpreter: each time one of them waits, for a lock or the
network, others wake up and contend for the interpreter with gRPC's `_serve` thread, which
accepts and refuses calls. So calls that have no turn yet wait in a queue and have no thread,
and whoever has a turn keeps it while waiting for their request, which normally is there
already. Only when it is not there after some milliseconds does the turn go to another call.

    acceptor = Acceptor()
    with CallPool("calls", threads=128, turns=1, places=64, acceptor=acceptor) as pool:
        ...
        acceptor.attach(server)

    with waiting():  # in a call
        job_id = worker.start("/mnt/command")

A burst is served; but when calls have waited for their turn for a while without a break,
`why_full` says that no more than so many may; and hardly any when the `_serve` thread has had
many calls for a while and no break, for then more wait in gRPC's core, where nobody sees them.
Refusing lets that thread catch up, because then nobody contends with it. An overload that lasts
is met without that patience, and fewer may wait, so that those who are served are served soon,
until a second has gone by in which there was room. Those who were let wait, because it looked
like a burst, are refused when their turn comes, if that is late.

Thread safety: everything may be called from any thread; but `why_full` holds for the next call
only if one thread alone submits them, as gRPC's does.

Source: Nichols and Jacobson, Controlling Queue Delay, ACM Queue 10 (5), 2012 (what is
wrong with a queue is not that it is long but that it stays); Maurer, Fail at Scale, ACM Queue
13 (8), 2015 (in an overload calls may wait for less long).
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc

__all__ = ["Acceptor", "CallPool", "waiting"]

# For so long the `_serve` thread may have had no break, which it does not have either when it
# waits for a processor; and for so long while there is overload.
_BEHIND_S, _BEHIND_IN_OVERLOAD_S = 0.25, 0.003
_BEHIND_CALLS, _BEHIND_CALLS_PER_S = 32, 1000  # fewer than both are no overload of calls
_WINDOW_S = 1.0  # in which they are counted
# Behind or not, so often a call is served, if no other is. Else nobody would be for as long as
# those who are refused ask again at once.
_TRICKLE_S = 0.005
_RELIEF_S = 1.0  # after so long without a refusal, the next burst is served again

_own = threading.local()  # `pool`: whose thread this is


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Keep nobody from their turn within this context, which computes little but may take long.

    For the code of a call, and not within itself; elsewhere nothing comes of it. Blocks at the
    end until it is the call's turn again, if it lost it.
    """
    pool: CallPool | None = getattr(_own, "pool", None)
    if pool is None:
        yield
        return
    wait = pool._begin_wait(_Wait())  # noqa: SLF001 -- the same module
    try:
        yield
    finally:
        pool._end_wait(wait)  # noqa: SLF001


class Acceptor:
    """Tells for how long a server's `_serve` thread has had more calls than it can look at."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # All of the `_serve` thread, which alone writes it.
        self._busy_since: float | None = None
        self._calls = 0  # since then

    def attach(self, server: grpc.Server) -> None:
        """Look at what this server's thread does. Before the server starts."""
        # gRPC does not show it in any other way, and calls that wait in its core not at all.
        # A test notices if there is no such queue any more.
        state: Any = server._state  # type: ignore[attr-defined] # noqa: SLF001
        queue = _EventQueue()
        queue.acceptor = self
        state.server.register_completion_queue(queue)
        state.completion_queue = queue

    def behind_s(self) -> float:
        """Return for how long it has had many calls and no break; 0 if it is not so."""
        since = self._busy_since
        if since is None:
            return 0.0
        busy_s = self._clock() - since
        # With few it has to do with streams, or waits for a processor.
        return busy_s if self._calls >= max(_BEHIND_CALLS, busy_s * _BEHIND_CALLS_PER_S) else 0.0

    def waits(self) -> None:
        """The thread has no work."""
        self._busy_since = None

    def takes(self, *, is_call: bool) -> None:
        """The thread takes some of its work."""
        now = self._clock()
        if self._busy_since is None or now - self._busy_since > _WINDOW_S:
            self._busy_since = now
            self._calls = 0
        self._calls += is_call


class _EventQueue(cygrpc.CompletionQueue):  # type: ignore[misc]
    """Where gRPC's `_serve` thread takes its work from."""

    acceptor: Acceptor

    def poll(self, deadline: float | None = None) -> Any:
        event = super().poll(0)
        if event.completion_type == cygrpc.CompletionType.queue_timeout:
            self.acceptor.waits()
            event = super().poll(deadline)
        # A function says what is to be done of a call that is under way, a word that it is new.
        self.acceptor.takes(is_call=isinstance(event.tag, str))
        return event


class _Wait:
    """A call that waits and may lose its turn; `for_request`: it is its client who is late."""

    __slots__ = ("for_request",)

    def __init__(self, *, for_request: bool = False) -> None:
        self.for_request = for_request


class CallPool(ThreadPoolExecutor):
    """The threads of one kind of call. A context manager, as every executor.

    `what`: the calls, in the plural, for messages. `threads`: at most, and so calls; made
    when they are needed. `turns`: how many calls may compute at a time; None for all. `places`:
    for calls that have their turn or wait for it, when others have waited for `burst_s`
    without a break; `few_places`: as long as there is overload. `acceptor`: which must not be
    behind. `stale_s`: who has waited longer for their turn is refused then, if there is overload.
    `wait_s`: who waits for something else has no turn after once to twice that. `clock`: tells
    seconds and never goes back. Attribute: `what`.
    """

    def __init__(  # noqa: PLR0913 -- settings, each by its name
        self,
        what: str,
        *,
        threads: int,
        turns: int | None = None,
        places: int | None = None,
        few_places: int | None = None,
        burst_s: float = 0.1,
        stale_s: float = math.inf,
        wait_s: float = 0.01,
        acceptor: Acceptor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            threads,
            thread_name_prefix=f"rpc-{what}",
            initializer=functools.partial(setattr, _own, "pool", self),
        )
        self.what = what
        self._call_ceiling = threads
        self._turn_count = threads if turns is None else turns
        self._places = threads if places is None else places
        self._few_places = self._places if few_places is None else few_places
        self._burst_s = burst_s
        self._stale_s = stale_s
        self._wait_s = wait_s
        self._acceptor = Acceptor() if acceptor is None else acceptor
        self._clock = clock
        # Guards all below. Notified when a call begins to queue while the watcher has nothing
        # to look after, and when the pool is shut down. Held for microseconds.
        self._changed = threading.Condition(threading.Lock())
        self._calls = 0  # under way
        self._places_taken = 0  # by those of them that do not wait for their client
        self._waiting_since: float | None = None  # since when some always waited for their turn
        self._overloaded_until = -math.inf
        self._admitted_at = -math.inf  # the last call
        self._free_turns = self._turn_count
        self._queue: deque[Callable[[], None]] = deque()
        # The calls that wait and have a turn, and how many wait for their request and have none.
        self._awaiting: set[_Wait] = set()
        self._late = 0
        # Those who wait no longer, and need a turn again.
        self._returning: deque[threading.Lock] = deque()
        self._watching = False
        self._closed = False
        self._watcher = None
        if self._turn_count < threads:
            self._watcher = threading.Thread(target=self._watch, name=f"late-{what}", daemon=True)
            self._watcher.start()

    def why_full(self) -> str | None:
        """Return why the next call is one too many; None if it is not."""
        with self._changed:
            if self._calls >= self._call_ceiling:
                return f"{self._calls} {self.what} are under way"
            now = self._clock()
            patience_s, places, behind_s = self._burst_s, self._places, _BEHIND_S
            if now < self._overloaded_until:
                patience_s, places, behind_s = 0.0, self._few_places, _BEHIND_IN_OVERLOAD_S
            since = self._waiting_since
            reason = None
            if self._places_taken >= places and since is not None and now - since >= patience_s:
                reason = f"{self._places_taken} {self.what} wait to be handled"
            elif self._acceptor.behind_s() >= behind_s and (
                self._places_taken or now - self._admitted_at < _TRICKLE_S
            ):
                reason = f"{self.what} arrive faster than they can be looked at"
            if reason:
                self._overloaded_until = now + _RELIEF_S
            else:
                self._admitted_at = now
            return reason

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call in its turn; it counts from now until it is over, whatever becomes of it."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 -- it is the future's to tell
                self._end()
                future.set_exception(error)
            else:
                self._end()
                future.set_result(result)

        with self._changed:
            if self._closed:
                raise RuntimeError(f"the pool of {self.what} has been shut down")
            if self._free_turns:
                super().submit(self._run, run)
                self._free_turns -= 1
            else:
                self._queue.append(run)
                if not self._watching:
                    self._watching = True
                    self._changed.notify()
            self._count_locked(1, 1)
        return future

    def in_turn(
        self, behavior: Callable[[Any, Any], Any], refuse: Callable[[Any, str], Any]
    ) -> Callable[[Any, Any], Any]:
        """Make of a unary call's behavior what is to be submitted now, as it has its turn.

        If it takes an iterator of requests, it keeps nobody from their turn by waiting for one.
        `refuse`: called instead, with the context and the reason, if the turn comes too late.
        """
        since = self._clock()

        def behave(request: Any, context: Any) -> Any:
            reason = self._why_stale(since)
            if reason is not None:
                return refuse(context, reason)
            if hasattr(request, "__next__"):
                request = self._awaited(request)
            return behavior(request, context)

        return behave

    def _why_stale(self, since: float) -> str | None:
        """Return why a call that was admitted at `since` is one too many after all, or None.

        Until there was overload it might have been one of a burst.
        """
        with self._changed:
            now = self._clock()
            if now >= self._overloaded_until or now - since <= self._stale_s:
                return None
            return f"{self.what} wait too long to be handled"

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of every executor; the calls that wait for their turn have it first."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        super().shutdown(wait, cancel_futures=cancel_futures)
        if self._watcher is not None:
            self._watcher.join()

    def _run(self, run: Callable[[], None] | None) -> None:
        """Keep a turn for as long as there are calls that wait for one."""
        while run is not None:
            run()
            with self._changed:
                # Who was there before has the turn first.
                run = self._queue.popleft() if self._queue and not self._returning else None
                if run is None:
                    self._pass_turn_locked()

    def _end(self) -> None:
        with self._changed:
            self._count_locked(-1, -1)

    def _pass_turn_locked(self) -> None:
        """Give a turn to whoever is the next, in a thread of theirs."""
        if self._returning:
            self._returning.popleft().release()
            return
        if self._queue:
            # When the pool has been shut down, whoever gave up their turn goes on with it.
            with contextlib.suppress(RuntimeError):
                super().submit(self._run, self._queue[0])
                self._queue.popleft()
                return
        self._free_turns += 1

    def _awaited(self, requests: Iterator[Any]) -> Iterator[Any]:
        while True:
            wait = self._begin_wait(_Wait(for_request=True))
            try:
                request = next(requests, None)
            finally:
                self._end_wait(wait)
            if request is None:
                return
            yield request

    def _begin_wait(self, wait: _Wait) -> _Wait:
        with self._changed:
            self._awaiting.add(wait)
            if wait.for_request and self._late:
                self._lose_turn_locked(wait)  # somebody is slow: maybe it is the same
        return wait

    def _lose_turn_locked(self, wait: _Wait) -> None:
        self._awaiting.remove(wait)
        self._late += wait.for_request
        self._count_locked(0, -1)
        self._pass_turn_locked()

    def _end_wait(self, wait: _Wait) -> None:
        """Go on with the turn, or wait for another one."""
        with self._changed:
            if wait in self._awaiting:
                self._awaiting.remove(wait)
                return
            self._late -= wait.for_request
            self._count_locked(0, 1)
            if self._free_turns:
                self._free_turns -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._returning.append(turn)
        turn.acquire()

    def _watch(self) -> None:
        """Take their turn from those who wait for too long, while others want it."""
        while True:
            with self._changed:
                self._watching = bool(self._queue)
                self._changed.wait_for(lambda: self._watching or self._closed)
                before = set(self._awaiting)
                if self._changed.wait_for(lambda: self._closed, self._wait_s):
                    return
                for wait in before & self._awaiting:
                    self._lose_turn_locked(wait)

    def _count_locked(self, calls: int, places: int) -> None:
        self._calls += calls
        self._places_taken += places
        if self._places_taken <= self._turn_count:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = self._clock()
