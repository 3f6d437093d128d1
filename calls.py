"""Decides whether a call is one too many, and gives the others a thread, fairly.

`Calls` is the executor of a gRPC server. A call waits in the queue of its caller, and callers
take turns: one call of this caller, one call of the next. A few threads, the clerks, run the
calls. More threads would not be faster, because they share one interpreter.

    with Calls(streams=2000, streams_of_one=1000) as calls:
        server = grpc.server(calls, interceptors=[gate])

    ticket = calls.arrive("alice", Kind.QUICK)  # in `intercept_service` of the gate

gRPC's accepting thread calls `arrive` and then, for the same call, `submit`. The handler of
the gate runs later, in a clerk, and reports its progress to the call's `Ticket`.

- If calls wait while a clerk is busy with one call for longer than `_LONG_S`, another thread
  becomes the clerk in its place. Why the call takes long does not matter: the request has not
  arrived, the kernel holds up a start, a password is hashed. The busy thread keeps its call, and
  ends with it unless a clerk is missing then. The same happens when a call says that it takes long,
  as each stream does (`Ticket.leave`).
- A call that is one too many is refused in the accepting thread, at once: `Ticket.refusal` says
  why. `_why_refused_locked` decides; all numbers are below the imports.
- A call, and the bytes of its answer, count until gRPC reports that the call is over. A client
  that does not read its answers therefore uses up its own share only.

Thread safety: everything may be called from any thread, but only the accepting thread calls
`arrive` and `submit`. One lock guards all counts and queues; it is held for microseconds, and no
other lock is taken under it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
import time
from collections import Counter, deque
from concurrent.futures import Executor, Future
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from gathering import Gathering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc

__all__ = ["STRANGERS", "STRANGERS_LOGIN", "Calls", "Kind", "OverloadError", "Ticket"]

logger = logging.getLogger(__name__)

# --- the numbers ------------------------------------------------------------------------

# Clerks of each kind of call. Quick calls compute only, and several at the same time take the
# interpreter from gRPC's accepting thread: with two clerks it fell behind at 4,000 calls per
# second, and gRPC cancelled a tenth of them. Slow calls wait for the kernel, for the disk or
# for the hash of a password.
_QUICK_CLERKS = 1
_SLOW_CLERKS = 2
# A clerk that is busy with one call for this long is replaced if other calls wait. Most calls take
# a millisecond.
_LONG_S = 0.01
# Threads that run calls of one caller in one lane at the same time. There are more of them than
# clerks only when calls take long. Beyond this number the caller's calls wait. Calls that have left
# (`Ticket.leave`) do not count.
_THREADS_OF_ONE = 64
# Unary calls of one caller that are under way or wait. A burst of 1,000 calls is served.
_CALLS_OF_ONE = 1024
# Unary calls of all callers together. A caller with less than _CALLS_ALWAYS is not refused for
# what others have under way.
_CALLS_IN_ALL = 4096
_CALLS_ALWAYS = 64
# With so many unary calls, until half are left, the accepting thread and quick clerks are gathered.
_MANY_CALLS = 256
# Calls in gRPC's queue for its accepting thread, some 16 KiB of memory each. If the queue is full,
# gRPC cancels the next call, whoever makes it.
_CALLS_IN_CORE = 32768
# Bytes of answers of one caller that the clients have not taken yet. The answer that exceeds
# the bound is still sent. Most answers have less than 1 KiB; a page of a list has up to 1 MiB.
_UNREAD_OF_ONE = 8 * 1024 * 1024
# The same of all callers together. A caller without unread answers is not refused for it.
_UNREAD_IN_ALL = 64 * 1024 * 1024
# Streams beyond the ceilings of the settings. `quotas.py` refuses them, because only it can say
# whose ceiling is reached.
_MORE_STREAMS_OF_ONE = 16
_MORE_STREAMS = 32
# Streams of all callers without a token together: health and reflection.
_STREAMS_OF_STRANGERS = 32
# Logins of one client certificate that run at the same time. All logins share one queue.
_LOGINS_OF_ONE = 8
# A thread looks this often for calls whose request has not arrived, and cancels those that it sees
# for the second time. A request normally comes in one packet with its call.
_ARRIVAL_S = 3.0

# If fewer threads than these end, the memory that they free is not worth a malloc_trim(3).
_MANY_THREADS = 16

_RETRY_AFTER_S = 1  # within this time the longest queue has been served
_NO_THREAD = RuntimeError, MemoryError  # what `Thread.start` raises if no thread can be started

STRANGERS: Final = ("strangers",)
"""The caller of all calls without a token of this server. They share one queue."""
STRANGERS_LOGIN: Final = ("strangers", "login")
"""The same for logins, so that calls without a token do not hold up logins."""


class OverloadError(Exception):
    """The call is one too many. Attribute: `retry_after_s`, in seconds."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the server is overloaded: {why}; try again in {_RETRY_AFTER_S} s")
        self.retry_after_s = _RETRY_AFTER_S


class Kind(Enum):
    """What a call takes."""

    QUICK = "quick"  # the interpreter, for a millisecond
    SLOW = "slow"  # time to wait: for the kernel, the disk or the hash of a password
    STREAM = "stream"  # a thread of its own, once it has begun


class _Lane:
    """The clerks for quick or for slow calls. Guarded by the lock of `Calls`."""

    def __init__(self, name: str, lock: threading.Lock, wanted: int) -> None:
        self.name = name
        # Notified when a call is queued while a clerk is idle, and when `Calls` is shut down.
        self.queued = threading.Condition(lock)
        self.turns: deque[_Queue] = deque()  # the queues whose next call can run, each once
        self.wanted = wanted  # how many clerks there should be
        self.clerks = 0
        self.idle = 0  # how many of the clerks wait for a call
        self.running: dict[threading.Thread, Ticket] = {}  # the call of each other clerk


class _Queue:
    """The calls of one caller that wait in one lane. Guarded by the lock of `Calls`."""

    __slots__ = ("has_turn", "lane", "running", "tickets")

    def __init__(self, lane: _Lane) -> None:
        self.lane = lane
        self.tickets: deque[Ticket] = deque()
        self.has_turn = False  # whether it is in `_Lane.turns`
        self.running = 0  # calls that have a thread and have not left (`Ticket.leave`)


class _Caller:
    """The calls of one caller. Guarded by the lock of `Calls`."""

    __slots__ = ("calls", "key", "quick", "slow", "streams", "unread")

    def __init__(self, key: object, quick: _Lane, slow: _Lane) -> None:
        self.key = key
        self.quick = _Queue(quick)
        self.slow = _Queue(slow)
        self.calls = 0  # unary calls that are not over
        self.streams = 0  # streams that are not over
        self.unread = 0  # bytes of answers of calls that are not over


class Ticket:
    """One call, from its arrival until gRPC reports that it is over.

    Attributes: `refusal`, the error if the call is one too many, else None; `key`, the caller's;
    `arrived_s`, when the call arrived, by `time.monotonic`; `unread`, the bytes that `hold` counts.
    """

    __slots__ = (
        "_calls",
        "arrived_s",
        "caller",
        "counts",
        "is_stream",
        "key",
        "queue",
        "refusal",
        "run",
        "runs",
        "unread",
    )

    def __init__(self, calls: Calls, caller: _Caller, kind: Kind) -> None:
        self._calls = calls
        self.arrived_s = time.monotonic()
        self.key = caller.key
        self.is_stream = kind is Kind.STREAM
        self.refusal: OverloadError | None = None
        self.run: Callable[[], object] | None = None  # until it runs
        # Guarded by the lock of `Calls`.
        self.caller = caller
        self.queue = caller.slow if kind is Kind.SLOW else caller.quick
        self.counts = False  # from `submit` until the call is over
        self.runs = False  # whether it is counted in `_Queue.running`
        self.unread = 0

    def begin(self, context: grpc.ServicerContext) -> None:
        """Have the call counted until gRPC reports that it is over."""
        if not context.add_callback(self.over):  # it is over already
            self.over()

    def check_unread(self) -> None:
        """Raise `OverloadError` if the caller has too many bytes of answers not read yet."""
        self._calls.check_unread(self)

    def hold(self, size: int) -> None:
        """Count so many bytes of an answer until the call is over."""
        self._calls.hold(self, size)

    def leave(self) -> None:
        """Let another thread take this thread's place as a clerk: this call may take very long.

        Raises `OverloadError` if no thread can be started to take its place.
        """
        self._calls.leave(self)

    def receive(self, requests: Iterator[bytes], cancel: Callable[[], object]) -> bytes | None:
        """Wait for the first request; None if none comes. `cancel` is called if that takes long."""
        receiving = self._calls.receiving
        receiving[self] = cancel
        try:
            if not self._calls.looks_for_overdue:
                self._calls.look_for_overdue()
            return next(requests, None)
        finally:
            del receiving[self]

    def over(self) -> None:
        """Stop counting the call; idempotent."""
        self._calls.over(self)


class Calls(Executor):
    """The queues and threads of a server's calls: its executor, and a context manager.

    `streams`: how many streams may be open; `streams_of_one`: how many of one caller.
    Attributes, for gRPC's options:
    `of_one_connection`, how many calls one connection may have; `of_core`, how many calls may
    wait for the accepting thread.
    """

    def __init__(self, *, streams: int, streams_of_one: int) -> None:
        self._streams_in_all = streams + _MORE_STREAMS
        self._streams_of_one = min(streams, streams_of_one) + _MORE_STREAMS_OF_ONE
        # One connection may have all that its caller may have. gRPC's clients wait for more.
        self.of_one_connection = self._streams_of_one + _CALLS_OF_ONE
        self.of_core = _CALLS_IN_CORE
        self._gathering = Gathering()
        self._arriving: Ticket | None = None  # the accepting thread alone uses it
        # The calls that wait for their request, and how to cancel each. Not guarded by the lock,
        # because single operations on a dictionary are atomic.
        self.receiving: dict[Ticket, Callable[[], object]] = {}
        # Guards all below, and the attributes of every `_Caller`. Held for microseconds.
        self._lock = threading.Lock()
        self._quick = _Lane("quick", self._lock, _QUICK_CLERKS)
        self._slow = _Lane("slow", self._lock, _SLOW_CLERKS)
        # Notified when a call has to wait while nobody looks for late clerks, and by `shutdown`.
        self._late = threading.Condition(self._lock)
        # Notified when a call begins to wait for its request while nobody looks, and by `shutdown`.
        self._overdue = threading.Condition(self._lock)
        # Notified when a thread of ours ends.
        self._ended = threading.Condition(self._lock)
        self._callers: dict[object, _Caller] = {}  # those with calls that are not over
        self._calls = 0  # unary calls that are not over
        self._streams = 0  # streams that are not over
        self._unread = 0  # bytes of answers of calls that are not over
        self._logins: Counter[bytes] = Counter()  # that run, by certificate
        self._looks_for_late = False
        self.looks_for_overdue = False
        self._closed = False
        self._threads: set[threading.Thread] = set()
        self._most_threads = 0  # since memory was given back
        for target, name in ((self._replace_late, "late-calls"), (self._cancel_overdue, "overdue")):
            self._start_thread(target, name)
        for lane in (self._quick, self._slow):
            for _ in range(lane.wanted):
                self._start_clerk(lane)

    # --- in the accepting thread ---

    def arrive(self, key: object, kind: Kind) -> Ticket:
        """Return the ticket of a call of this caller. gRPC submits the call next."""
        self._gathering.follow()
        with self._lock:
            caller = self._callers.get(key) or _Caller(key, self._quick, self._slow)
            ticket = Ticket(self, caller, kind)
            why = self._why_refused_locked(caller, ticket)
        self._arriving = ticket
        if why is not None:
            ticket.refusal = OverloadError(why)
        return ticket

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue the call that has arrived, or run it here if it is one too many.

        Never raises, because an exception would end gRPC's accepting thread. The future is done at
        once and tells nothing: `Ticket.over` is called when the call is over.
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
        # Since `arrive` the caller's last call may have ended, and with it the entry of the caller.
        caller = self._callers.setdefault(ticket.key, ticket.caller)
        ticket.counts = True
        if ticket.is_stream:
            caller.streams += 1
            self._streams += 1
        else:
            caller.calls += 1
            self._calls += 1
            if self._calls == _MANY_CALLS:
                self._gathering.begin()
        ticket.queue.tickets.append(ticket)
        self._take_turn_locked(ticket.queue)

    def _take_turn_locked(self, queue: _Queue) -> None:
        """Put the queue in line for a turn, if its next call can run, and wake a thread for it."""
        lane = queue.lane
        if queue.tickets and not queue.has_turn and queue.running < _THREADS_OF_ONE:
            queue.has_turn = True
            lane.turns.append(queue)
            if lane.idle:
                lane.queued.notify()
            elif not self._looks_for_late:
                self._looks_for_late = True
                self._late.notify()

    def _why_refused_locked(self, caller: _Caller, ticket: Ticket) -> str | None:
        """Return why the call is one too many; None if it is not."""
        if self._closed:
            return "it is shutting down"
        if ticket.is_stream:
            if caller.key == STRANGERS and caller.streams >= _STREAMS_OF_STRANGERS:
                return f"{caller.streams} streams of callers without a token are open"
            if caller.streams >= self._streams_of_one:
                return f"{caller.streams} of your streams are open"
            if self._streams >= self._streams_in_all:
                return f"{self._streams} streams are open"
            return None
        if caller.calls >= _CALLS_OF_ONE:
            whose = "of your calls" if isinstance(caller.key, str) else "calls with no valid token"
            return f"{caller.calls} {whose} are under way"
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
        """Wake the thread that cancels the calls whose request does not arrive."""
        with self._lock:
            self.looks_for_overdue = True
            self._overdue.notify()

    def leave(self, ticket: Ticket) -> None:
        """See `Ticket.leave`."""
        self._gathering.leave()
        thread, lane = threading.current_thread(), ticket.queue.lane
        with self._lock:
            if lane.running.pop(thread, None) is None:
                self._stop_running_locked(ticket)
                return  # another clerk has taken the place of this thread already
        try:
            self._start_thread(functools.partial(self._work, lane), f"call-{lane.name}")
        except _NO_THREAD as error:
            with self._lock:
                lane.running[thread] = ticket
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
                if self._calls == _MANY_CALLS // 2:
                    self._gathering.end()
            caller.unread -= ticket.unread
            self._unread -= ticket.unread
            self._forget_locked(caller)

    def _forget_locked(self, caller: _Caller) -> None:
        running = caller.quick.running + caller.slow.running
        if not (caller.calls or caller.streams or running):
            self._callers.pop(caller.key, None)

    # --- clerks ---

    def _start_thread(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
            self._most_threads = max(self._most_threads, len(self._threads))
        try:
            thread.start()
        except _NO_THREAD:
            with self._lock:
                self._end_locked(thread)
            raise

    def _start_clerk(self, lane: _Lane) -> None:
        """Start a clerk. Raises an error of `_NO_THREAD`."""
        with self._lock:
            lane.clerks += 1
        try:
            self._start_thread(functools.partial(self._work, lane), f"call-{lane.name}")
        except _NO_THREAD:
            with self._lock:
                lane.clerks -= 1
            raise

    def _work(self, lane: _Lane) -> None:
        """Run calls, as long as this thread is a clerk."""
        ticket = self._next(lane, None)
        while ticket is not None:
            run, ticket.run = ticket.run, None
            if run is not None:
                if lane is self._quick:
                    self._gathering.follow()
                try:
                    run()
                except Exception:
                    logger.exception("a call has failed outside of its behaviour")
                del run
            ticket = self._next(lane, ticket)
        if self._have_halved():
            _give_memory_back()

    def _have_halved(self) -> bool:
        """Whether half of the threads, if they were many, have ended since this was last true."""
        with self._lock:
            most, now = self._most_threads, len(self._threads)
            if most < _MANY_THREADS or now > most / 2:
                return False
            self._most_threads = now
            return True

    def _next(self, lane: _Lane, done: Ticket | None) -> Ticket | None:
        """Wait for the next call; return None if this thread is to end."""
        thread = threading.current_thread()
        with self._lock:
            if done is not None:
                self._stop_running_locked(done)
                if lane.running.pop(thread, None) is None:  # another clerk is in its place
                    if lane.clerks >= lane.wanted:
                        self._end_locked(thread)
                        return None
                    lane.clerks += 1
            while not lane.turns:
                if self._closed:
                    self._end_locked(thread)
                    return None
                lane.idle += 1
                lane.queued.wait()
                lane.idle -= 1
            queue = lane.turns.popleft()
            ticket = queue.tickets.popleft()
            ticket.runs = True
            queue.running += 1
            queue.has_turn = False
            lane.running[thread] = ticket
            self._take_turn_locked(queue)
            return ticket

    def _stop_running_locked(self, ticket: Ticket) -> None:
        if ticket.runs:
            ticket.runs = False
            ticket.queue.running -= 1
            self._take_turn_locked(ticket.queue)
            self._forget_locked(ticket.caller)

    def _replace_late(self) -> None:
        """Replace clerks that are busy with one call for long, while others wait for a turn."""
        lanes = (self._quick, self._slow)
        is_short = False  # of threads
        while True:
            with self._lock:
                self._looks_for_late = any(lane.turns for lane in lanes)
                self._late.wait_for(lambda: self._closed or self._looks_for_late)
                before = [dict(lane.running) for lane in lanes]
                if self._late.wait_for(lambda: self._closed, _LONG_S):
                    self._end_locked(threading.current_thread())
                    return
                for lane, running in zip(lanes, before, strict=True):
                    for thread, ticket in running.items():
                        if lane.turns and lane.running.get(thread) is ticket:
                            del lane.running[thread]
                            lane.clerks -= 1
                missing = [lane for lane in lanes for _ in range(lane.wanted - lane.clerks)]
            try:
                for lane in missing:
                    self._start_clerk(lane)
                is_short = False
            except _NO_THREAD:
                if not is_short:  # once, however many passes find no room
                    logger.error("no more threads can be started; calls wait for one")
                is_short = True

    def _cancel_overdue(self) -> None:
        """Cancel the calls whose request does not arrive."""
        before: set[Ticket] = set()
        while True:
            with self._lock:
                # One pass covers all calls since the last pass, so most calls wake nobody.
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
        """Refuse new calls; wait until all calls that were admitted have been served."""
        with self._lock:
            self._closed = True
            self._quick.queued.notify_all()
            self._slow.queued.notify_all()
            self._late.notify_all()
            self._overdue.notify_all()
            if wait:
                self._ended.wait_for(lambda: not self._threads)

    def _end_locked(self, thread: threading.Thread) -> None:
        self._threads.discard(thread)
        self._ended.notify_all()


def _give_memory_back() -> None:
    """Make malloc return its free memory to the kernel, which takes milliseconds.

    By itself malloc keeps 20 MiB after 1,000 streams were open.
    """
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


_DONE: Future[None] = Future()
_DONE.set_result(None)
