"""Decides whether a call is one too many, and gives the others a thread, fairly.

`Calls` is the executor of a gRPC server. A call waits in the queue of its caller, and callers
take turns: one call of this caller, one call of the next. A few threads, the workers, run the
calls. More threads would not be faster, because they share one interpreter.

    with Calls(streams=2000, streams_of_one=1000) as calls:
        server = grpc.server(calls, interceptors=[gate])

    call = calls.arrive("alice", is_stream=False)   # in `intercept_service` of the gate

gRPC's accepting thread calls `arrive` and then, for the same call, `submit`. The behaviour that
the gate gives to gRPC runs later, in a worker, and tells the call's `Ticket` how far it is.

- A call that takes longer than `_LONG_S` keeps its thread, but the thread is no longer a worker:
  another thread takes its place. The reason does not matter: the request has not arrived, the
  kernel holds up a start, a password is hashed. The same happens at once when a stream begins.
  Such a thread ends with its call.
- A call that is one too many is refused in the accepting thread, at once: `Ticket.refusal` says
  why. `_why_refused_locked` decides; all numbers are in the table below.
- A call, and the bytes of its answer, count until gRPC reports that the call is over. A client
  that does not read its answers therefore uses up its own share only.

Thread safety: everything may be called from any thread, but only the accepting thread calls
`arrive` and `submit`. One lock guards all counts and queues; it is held for microseconds, and no
other lock is taken under it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import Counter, deque
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc

__all__ = ["STRANGERS", "STRANGERS_LOGIN", "Calls", "OverloadError", "Ticket"]

logger = logging.getLogger(__name__)

# --- the numbers ------------------------------------------------------------------------

# Threads that run calls. See docs/benchmarks.md for the figures of other numbers.
_WORKERS = 2
# A worker that is busy with one call for this long is replaced. Most calls take a millisecond.
_LONG_S = 0.01
# Threads that run unary calls of one caller at the same time. They are more than the workers
# only when calls take long; the caller's other calls wait meanwhile.
_THREADS_OF_ONE = 64
# Unary calls of one caller that are under way or wait. A burst of 1,000 calls is served.
_CALLS_OF_ONE = 1024
# A queue this long whose first call has waited this long is an overload and not a burst. It
# does not get longer, so that those who are served are served within a second.
_STANDING_CALLS = 256
_STANDING_S = 0.4
# Unary calls of all callers together. A caller with less than _CALLS_ALWAYS is not refused for
# what others have under way.
_CALLS_IN_ALL = 4096
_CALLS_ALWAYS = 64
# Bytes of answers of one caller that the clients have not taken yet. The answer that exceeds
# the bound is still sent. Most answers have less than 1 KiB; a list has megabytes.
_UNREAD_OF_ONE = 8 * 1024 * 1024
# The same of all callers together. A caller without unread answers is not refused for it.
_UNREAD_IN_ALL = 64 * 1024 * 1024
# Streams beyond the ceilings of the settings: they are let in to be told whose ceiling it is.
_STREAMS_SPARE_OF_ONE = 16
_STREAMS_SPARE = 32
# Logins of one client certificate that run at the same time. All logins share one queue.
_LOGINS_OF_ONE = 8
# A call whose request has not arrived after one to two times this long is cancelled. A request
# normally comes in one packet with its call.
_ARRIVAL_S = 3.0

_RETRY_AFTER_S = 1  # within this time the longest queue has been served

STRANGERS: Final = ("strangers",)
"""The caller of all calls without a token of this server. They share one queue."""
STRANGERS_LOGIN: Final = ("strangers", "login")
"""The same for logins, so that calls without a token do not hold up logins."""


class OverloadError(Exception):
    """The call is one too many. Attribute: `retry_after_s`, in seconds."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the server is overloaded: {why}; try again in {_RETRY_AFTER_S} s")
        self.retry_after_s = _RETRY_AFTER_S


class _Caller:
    """The calls of one caller. Guarded by the lock of `Calls`."""

    __slots__ = ("calls", "key", "queue", "running", "streams", "unread", "waits")

    def __init__(self, key: object) -> None:
        self.key = key
        self.queue: deque[Ticket] = deque()
        self.waits = False  # whether it is in `Calls._turns`
        self.running = 0  # calls that have a thread; streams only until they begin
        self.calls = 0  # unary calls that are not over
        self.streams = 0  # streams that are not over
        self.unread = 0  # bytes of answers of calls that are not over


class Ticket:
    """One call, from its arrival until gRPC reports that it is over.

    Attribute: `refusal`, the error if the call is one too many, else None.
    """

    __slots__ = (
        *("_calls", "caller", "counts", "is_stream", "key", "refusal", "run", "runs", "since"),
        "unread",
    )

    def __init__(self, calls: Calls, key: object, *, is_stream: bool) -> None:
        self._calls = calls
        self.key = key
        self.is_stream = is_stream
        self.refusal: OverloadError | None = None
        self.since = calls.clock()
        self.run: Callable[[], object] | None = None  # until it runs
        # Guarded by the lock of `Calls`.
        self.caller = _Caller(key)
        self.counts = False  # from `submit` until the call is over
        self.runs = False  # whether it is counted in `_Caller.running`
        self.unread = 0

    def begin(self, context: grpc.ServicerContext) -> bool:
        """Have the call counted until it is over; return False if it is over already."""
        if context.add_callback(self.over):
            return True
        self.over()
        return False

    def check_unread(self) -> None:
        """Raise `OverloadError` if the caller has too many bytes of answers not read yet."""
        self._calls.check_unread(self)

    def hold(self, size: int) -> None:
        """Count so many bytes of an answer until the call is over."""
        self._calls.hold(self, size)

    def leave(self) -> None:
        """Make the thread of this stream one that ends with the stream.

        Raises `OverloadError` if no thread can be started to take its place.
        """
        self._calls.leave(self)

    @contextlib.contextmanager
    def receiving(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Wait for the request within this context. `cancel` is called if it takes too long."""
        receiving = self._calls.receiving
        receiving[self] = cancel
        try:
            if not self._calls.looks_for_overdue:
                self._calls.look_for_overdue()
            yield
        finally:
            del receiving[self]

    def over(self) -> None:
        """Count the call no longer; idempotent."""
        self._calls.over(self)


class Calls(Executor):
    """The queues and threads of a server's calls: its executor, and a context manager.

    `streams`: how many streams may be open; `streams_of_one`: how many of one caller.
    `clock`: tells seconds and never goes back. Attributes: `accepting`, gRPC's accepting thread,
    None before the first call; `of_one_connection`, how many calls gRPC should let one
    connection have.
    """

    def __init__(
        self,
        *,
        streams: int,
        streams_of_one: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._streams_in_all = streams + _STREAMS_SPARE
        self._streams_of_one = min(streams, streams_of_one) + _STREAMS_SPARE_OF_ONE
        # One connection may have all that its caller may have. gRPC's clients wait for more.
        self.of_one_connection = self._streams_of_one + _CALLS_OF_ONE
        self.accepting: threading.Thread | None = None
        self._arriving: Ticket | None = None  # the accepting thread alone uses it
        # The calls that wait for their request, and how to cancel each. Not guarded: single
        # operations on a dictionary are atomic.
        self.receiving: dict[Ticket, Callable[[], object]] = {}
        # Guards all below, and the attributes of every `_Caller`. Held for microseconds.
        self._lock = threading.Lock()
        # Notified when a call is queued while a worker is idle, and when this is closed.
        self._queued = threading.Condition(self._lock)
        # Notified when a call has to wait while nobody looks for late workers, and when closed.
        self._late = threading.Condition(self._lock)
        # Notified when a call begins to wait for its request while nobody looks after these
        # calls, and when this is closed.
        self._overdue = threading.Condition(self._lock)
        # Notified when a thread of ours ends.
        self._ended = threading.Condition(self._lock)
        self._callers: dict[object, _Caller] = {}  # those with calls that are not over
        self._turns: deque[_Caller] = deque()  # callers whose next call can run, each once
        self._calls = 0  # unary calls that are not over
        self._streams = 0  # streams that are not over
        self._unread = 0  # bytes of answers of calls that are not over
        self._logins: Counter[bytes] = Counter()  # that run, by certificate
        self._running: dict[threading.Thread, Ticket] = {}  # what the workers do
        self._workers = 0
        self._idle = 0  # of the workers
        self._looks_for_late = False
        self.looks_for_overdue = False
        self._closed = False
        self._threads: set[threading.Thread] = set()
        for target, name in ((self._replace_late, "late-calls"), (self._cancel_overdue, "overdue")):
            self._start_thread(target, name)
        for _ in range(_WORKERS):
            self._start_worker()

    # --- in the accepting thread ---

    def arrive(self, key: object, *, is_stream: bool) -> Ticket:
        """Return the ticket of a call of this caller. gRPC submits the call next."""
        self.accepting = threading.current_thread()
        self._arriving = ticket = Ticket(self, key, is_stream=is_stream)
        with self._lock:
            ticket.caller = self._callers.get(key, ticket.caller)
            why = self._why_refused_locked(ticket.caller, ticket)
        if why is not None:
            ticket.refusal = OverloadError(why)
        return ticket

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue the call that has arrived, or run it here if it is one too many.

        Never raises, because an exception would end gRPC's accepting thread. The future is
        always done, because only `Ticket.over` tells when a call is over.
        """
        ticket, self._arriving = self._arriving, None
        try:
            if ticket is None:
                raise RuntimeError("submit without arrive")  # noqa: TRY301 -- logged below
            if ticket.refusal is not None:
                fn(*args, **kwargs)
            else:
                ticket.run = functools.partial(fn, *args, **kwargs)
                with self._lock:
                    self._admit_locked(ticket)
        except Exception:
            logger.exception("a call could not be queued and stays without an answer")
        return _DONE

    def _admit_locked(self, ticket: Ticket) -> None:
        # The caller may have been forgotten since `arrive`.
        caller = ticket.caller = self._callers.setdefault(ticket.key, ticket.caller)
        ticket.counts = True
        if ticket.is_stream:
            caller.streams += 1
            self._streams += 1
        else:
            caller.calls += 1
            self._calls += 1
        caller.queue.append(ticket)
        self._queue_locked(caller)
        if self._idle:
            self._queued.notify()
        self._look_for_late_locked()

    def _why_refused_locked(self, caller: _Caller, ticket: Ticket) -> str | None:
        """Return why the call is one too many; None if it is not."""
        if self._closed:
            return "it is shutting down"
        if ticket.is_stream:
            if caller.streams >= self._streams_of_one:
                return f"{caller.streams} of your streams are open"
            if self._streams >= self._streams_in_all:
                return f"{self._streams} streams are open"
            return None
        if caller.calls >= _CALLS_OF_ONE:
            return f"{caller.calls} of your calls are under way"
        if len(caller.queue) >= _STANDING_CALLS:
            waits_s = self.clock() - caller.queue[0].since
            if waits_s > _STANDING_S:
                return f"{len(caller.queue)} of your calls wait, one for {waits_s:.1f} s"
        if self._calls >= _CALLS_IN_ALL and caller.calls >= _CALLS_ALWAYS:
            return f"{self._calls} calls are under way, {caller.calls} of them yours"
        return None

    # --- what tickets tell ---

    def check_unread(self, ticket: Ticket) -> None:
        """See `Ticket.check_unread`."""
        with self._lock:
            mine = ticket.caller.unread
            if mine > _UNREAD_OF_ONE or (mine and self._unread > _UNREAD_IN_ALL):
                raise OverloadError(f"{mine} bytes of answers to you have not been read")

    def hold(self, ticket: Ticket, size: int) -> None:
        """See `Ticket.hold`."""
        with self._lock:
            if ticket.counts:
                ticket.unread += size
                ticket.caller.unread += size
                self._unread += size

    @contextlib.contextmanager
    def login(self, certificate: bytes) -> Iterator[None]:
        """Count a login of this certificate within this context. Raises `OverloadError`."""
        with self._lock:
            if self._logins[certificate] >= _LOGINS_OF_ONE:
                raise OverloadError(f"{_LOGINS_OF_ONE} logins with your certificate are under way")
            self._logins[certificate] += 1
        try:
            yield
        finally:
            with self._lock:
                self._logins[certificate] -= 1
                if not self._logins[certificate]:
                    del self._logins[certificate]

    def look_for_overdue(self) -> None:
        """Have calls whose request does not arrive cancelled from now on."""
        with self._lock:
            self.looks_for_overdue = True
            self._overdue.notify()

    def leave(self, ticket: Ticket) -> None:
        """See `Ticket.leave`."""
        thread = threading.current_thread()
        with self._lock:
            if self._running.pop(thread, None) is None:
                self._stop_running_locked(ticket)
                return  # it has been replaced already
            self._workers -= 1
        try:
            self._start_worker()
        except RuntimeError as error:
            with self._lock:
                self._workers += 1
                self._running[thread] = ticket
            raise OverloadError("no more threads can be started") from error
        with self._lock:
            self._stop_running_locked(ticket)

    def over(self, ticket: Ticket) -> None:
        """See `Ticket.over`."""
        with self._lock:
            if not ticket.counts:
                return
            ticket.counts = False
            caller = ticket.caller
            if ticket.is_stream:
                caller.streams -= 1
                self._streams -= 1
            else:
                caller.calls -= 1
                self._calls -= 1
            caller.unread -= ticket.unread
            self._unread -= ticket.unread
            self._forget_locked(caller)

    def _forget_locked(self, caller: _Caller) -> None:
        if not (caller.calls or caller.streams or caller.running):
            self._callers.pop(caller.key, None)

    # --- workers ---

    def _queue_locked(self, caller: _Caller) -> None:
        """Let the caller have a turn if its next call can run."""
        if caller.queue and not caller.waits and caller.running < _THREADS_OF_ONE:
            caller.waits = True
            self._turns.append(caller)

    def _start_thread(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._end_locked(thread)
            raise

    def _start_worker(self) -> None:
        """Start a worker. Raises RuntimeError if the system allows no more threads."""
        with self._lock:
            self._workers += 1
        try:
            self._start_thread(self._work, "call")
        except RuntimeError:
            with self._lock:
                self._workers -= 1
            raise

    def _work(self) -> None:
        """Run calls, as long as this thread is a worker."""
        thread = threading.current_thread()
        ticket = self._next(thread, None)
        while ticket is not None:
            run, ticket.run = ticket.run, None
            if run is not None:
                try:
                    run()
                except Exception:
                    logger.exception("a call has failed outside of its behaviour")
                del run
            ticket = self._next(thread, ticket)

    def _next(self, thread: threading.Thread, done: Ticket | None) -> Ticket | None:
        """Wait for the next call; return None if this thread is to end."""
        with self._lock:
            if done is not None:
                self._stop_running_locked(done)
                if self._running.pop(thread, None) is None:  # another one has taken its place
                    if self._workers >= _WORKERS:
                        self._end_locked(thread)
                        return None
                    self._workers += 1
            while not self._turns:
                if self._closed:
                    self._end_locked(thread)
                    return None
                self._idle += 1
                self._queued.wait()
                self._idle -= 1
            caller = self._turns.popleft()
            caller.waits = False
            caller.running += 1
            ticket = caller.queue.popleft()
            ticket.runs = True
            self._queue_locked(caller)
            self._running[thread] = ticket
            self._look_for_late_locked()
            return ticket

    def _look_for_late_locked(self) -> None:
        if self._turns and not self._idle and not self._looks_for_late:
            self._looks_for_late = True
            self._late.notify()

    def _stop_running_locked(self, ticket: Ticket) -> None:
        if ticket.runs:
            ticket.runs = False
            ticket.caller.running -= 1
            self._queue_locked(ticket.caller)
            self._forget_locked(ticket.caller)

    def _replace_late(self) -> None:
        """Replace workers that are busy with one call for long, while others wait for a turn."""
        while True:
            with self._lock:
                self._looks_for_late = bool(self._turns) and not self._idle
                self._late.wait_for(lambda: self._closed or self._looks_for_late)
                before = dict(self._running)
                if self._late.wait_for(lambda: self._closed, _LONG_S):
                    self._end_locked(threading.current_thread())
                    return
                for thread, ticket in before.items():
                    if self._turns and self._running.get(thread) is ticket:
                        del self._running[thread]
                        self._workers -= 1
                missing = _WORKERS - self._workers
            for _ in range(missing):
                try:
                    self._start_worker()
                except RuntimeError:
                    logger.error("no more threads can be started; calls wait for one")
                    break

    def _cancel_overdue(self) -> None:
        """Cancel the calls whose request does not arrive."""
        before: set[Ticket] = set()
        while True:
            with self._lock:
                # One look is for all calls since the last one, so that most calls wake nobody.
                self.looks_for_overdue = False
                self._overdue.wait_for(
                    lambda: self._closed or self.looks_for_overdue or self.receiving
                )
                self.looks_for_overdue = True
                if self._overdue.wait_for(lambda: self._closed, _ARRIVAL_S):
                    self._end_locked(threading.current_thread())
                    return
            receiving = dict(self.receiving)
            for ticket in before & receiving.keys():
                receiving[ticket]()
            before = set(receiving)

    # --- the end ---

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Refuse new calls; wait until the others, which are served, are over."""
        with self._lock:
            self._closed = True
            self._queued.notify_all()
            self._late.notify_all()
            self._overdue.notify_all()
            if wait:
                self._ended.wait_for(lambda: not self._threads)

    def _end_locked(self, thread: threading.Thread) -> None:
        self._threads.discard(thread)
        self._ended.notify_all()


_DONE: Future[None] = Future()
_DONE.set_result(None)
