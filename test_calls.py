"""Tests of `calls`: who is refused, whose turn it is, and which thread ends when."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import grpc
import pytest

import calls as calls_module
import workerservice_pb2 as worker_pb
from calls import STRANGERS_LOGIN, Calls, Kind, OverloadError, Ticket
from client import Client
from testkit import FOREVER, GUARD_S, run_job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from server import Server
    from testkit import ServerProgram

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]
    Run = Callable[[Ticket], object]


class _Server:
    """Does what gRPC does: brings calls from one thread, and tells when each is over."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.go_on = threading.Event()

    def call(
        self,
        key: object,
        run: Run = lambda _: None,
        kind: Kind = Kind.QUICK,
        *,
        is_stream: bool = False,
    ) -> Ticket:
        """Bring a call, which runs `run`; return its ticket."""
        ticket = self.calls.arrive(key, Kind.STREAM if is_stream else kind)
        assert self.calls.submit(run, ticket).done()
        return ticket

    def hold(self, key: str, count: int) -> list[Ticket]:
        """Bring that many calls, which run until `go_on`, and wait until all have threads."""
        entered = threading.Semaphore(0)

        def wait(_: Ticket) -> None:
            entered.release()
            assert self.go_on.wait(GUARD_S)

        tickets = [self.call(key, wait) for _ in range(count)]
        for _ in range(count):
            assert entered.acquire(timeout=GUARD_S)
        return tickets


@pytest.fixture
def server() -> Iterator[_Server]:
    with Calls(streams=5, streams_of_one=3) as calls:
        server = _Server(calls)
        yield server
        server.go_on.set()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that a test reaches with few calls."""
    monkeypatch.setattr(calls_module, "_CALLS_OF_ONE", 5)
    monkeypatch.setattr(calls_module, "_CALLS_IN_ALL", 8)
    monkeypatch.setattr(calls_module, "_CALLS_ALWAYS", 2)
    monkeypatch.setattr(calls_module, "_UNREAD_OF_ONE", 100)
    monkeypatch.setattr(calls_module, "_UNREAD_IN_ALL", 150)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is late, whatever else the machine does."""
    monkeypatch.setattr(calls_module, "_LONG_S", GUARD_S)


def _why(ticket: Ticket) -> str:
    return str(ticket.refusal or "")


@pytest.mark.usefixtures("patient")
def test_callers_take_turns(server: _Server) -> None:
    """The one call of a caller comes next, however many another one has made before."""
    order: list[str] = []
    lock, done = threading.Lock(), threading.Semaphore(0)

    def note(ticket: Ticket) -> None:
        with lock:
            order.append(str(ticket.key))
        done.release()

    server.hold("mallory", calls_module._QUICK_CLERKS)
    for _ in range(100):
        server.call("mallory", note)
    for _ in range(2):
        server.call("alice", note)
    server.call("bob", note)
    server.go_on.set()
    for _ in range(103):
        assert done.acquire(timeout=GUARD_S)
    # Two clerks may note two calls in either order.
    assert (
        max(i for i, key in enumerate(order) if key != "mallory") <= 4 + calls_module._QUICK_CLERKS
    )


@pytest.mark.usefixtures("small")
def test_caller_with_too_many_calls_is_refused_in_the_thread_that_brings_them(
    server: _Server,
) -> None:
    """The refused call runs at once, so that it is answered; other callers are served."""
    tickets = [server.call("mallory") for _ in range(5)]
    ran_in: list[threading.Thread] = []
    refused = server.call("mallory", lambda _: ran_in.append(threading.current_thread()))
    assert "overloaded: 5 of your calls are under way; try again in 1 s" in _why(refused)
    assert ran_in == [threading.current_thread()]
    assert server.call("alice").refusal is None
    tickets[0].over()
    assert server.call("mallory").refusal is None
    assert server.call("mallory").refusal is not None


@pytest.mark.usefixtures("small")
def test_refusal_of_a_call_without_a_token_does_not_call_the_others_the_callers(
    server: _Server,
) -> None:
    """They are those of everybody who has no token yet."""
    for _ in range(5):
        assert server.call(STRANGERS_LOGIN).refusal is None
    assert "5 calls with no valid token are under way" in _why(server.call(STRANGERS_LOGIN))


@pytest.mark.usefixtures("small")
def test_caller_with_few_calls_is_served_when_all_together_have_too_many(server: _Server) -> None:
    """The bound of all callers together holds for those who have many."""
    for key in ("mallory", "malloy"):
        for _ in range(4):
            assert server.call(key).refusal is None
    assert "8 calls are under way, 4 of them yours" in _why(server.call("mallory"))
    assert server.call("alice").refusal is None
    assert server.call("alice").refusal is None
    assert "10 calls are under way, 2 of them yours" in _why(server.call("alice"))


@pytest.mark.usefixtures("small")
def test_call_counts_until_grpc_says_that_it_is_over(server: _Server) -> None:
    """It counts although its behaviour has returned; and its end counts only once."""
    for _ in range(3):
        over: list[Ticket] = []
        done = threading.Semaphore(0)

        def run(_: Ticket, done: threading.Semaphore = done) -> None:
            done.release()

        over += [server.call("mallory", run) for _ in range(5)]
        for _ in range(5):
            assert done.acquire(timeout=GUARD_S)
        assert server.call("mallory").refusal is not None
        for ticket in over + over:
            ticket.over()
    assert server.calls._calls == 0


@pytest.mark.usefixtures("small")
def test_answers_that_are_not_read_count_and_a_caller_without_any_is_served(
    server: _Server,
) -> None:
    """In bytes, of one caller and of all together, until their calls are over."""
    mallory, malloy, alice = (server.call(key) for key in ("mallory", "malloy", "alice"))
    mallory.check_unread()
    mallory.hold(101)
    with pytest.raises(OverloadError, match="101 bytes of answers to you have not been read"):
        mallory.check_unread()
    malloy.hold(50)
    with pytest.raises(OverloadError, match="50 bytes"):
        malloy.check_unread()
    alice.check_unread()
    mallory.over()
    malloy.check_unread()
    malloy.over()
    assert server.calls._unread == 0


def test_accepting_thread_and_clerks_share_a_processor_while_many_calls_are_under_way(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow calls and streams do not, because they start jobs and go on for long."""
    monkeypatch.setattr(calls_module, "_MANY_CALLS", 4)
    everywhere = os.sched_getaffinity(0)
    found: queue.SimpleQueue[set[int]] = queue.SimpleQueue()

    def look(_: Ticket) -> None:
        found.put(os.sched_getaffinity(0))

    def look_as_stream(ticket: Ticket) -> None:
        ticket.leave()
        look(ticket)

    def processors(
        kind: Kind = Kind.QUICK, run: Callable[[Ticket], object] = look
    ) -> tuple[set[int], set[int]]:
        """Return those of the accepting thread and of the thread that runs a call."""
        ticket = server.call("alice", run, kind)
        its = found.get(timeout=GUARD_S)
        ticket.over()
        return os.sched_getaffinity(0), its

    with ThreadPoolExecutor(1) as accepting:  # what it inherits ends with it

        def do(act: Callable[..., Any], *args: object) -> Any:
            return accepting.submit(act, *args).result()

        assert do(processors) == (everywhere, everywhere)
        tickets = do(server.hold, "mallory", 4)
        one, same = do(processors)
        assert one == same
        assert len(one) == 1
        assert do(processors, Kind.SLOW) == (one, everywhere)
        assert do(processors, Kind.STREAM, look_as_stream) == (one, everywhere)
        assert do(processors) == (one, one)
        server.go_on.set()
        for ticket in tickets:
            ticket.over()
        assert do(processors) == (everywhere, everywhere)


def test_caller_that_has_no_calls_is_forgotten(server: _Server) -> None:
    """Streams and unary calls of many users leave nothing in memory."""
    done = threading.Semaphore(0)
    tickets = [
        server.call(f"user{number}", lambda _: done.release(), is_stream=number % 2 == 0)
        for number in range(9)
    ]
    for ticket in tickets:
        if ticket.refusal is None:
            assert done.acquire(timeout=GUARD_S)
        ticket.over()
    while server.calls._callers:  # until the last clerk has noted the end of its call
        pass


def test_call_that_takes_long_holds_up_nobody(server: _Server) -> None:
    """Others run beside any number of such calls, the caller's own too."""
    server.hold("mallory", 20)
    done = threading.Event()
    server.call("mallory", lambda _: done.set())
    assert done.wait(GUARD_S)
    done.clear()
    server.call("alice", lambda _: done.set())
    assert done.wait(GUARD_S)


def test_caller_has_no_more_threads_than_its_share(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other calls wait; those of other callers do not."""
    monkeypatch.setattr(calls_module, "_THREADS_OF_ONE", 3)
    server.hold("mallory", 3)
    waiting, done = threading.Event(), threading.Event()
    server.call("mallory", lambda _: waiting.set())
    for _ in range(10):
        server.call("alice", lambda _: done.set())
        assert done.wait(GUARD_S)
        done.clear()
    assert not waiting.is_set()
    server.go_on.set()
    assert waiting.wait(GUARD_S)


def test_threads_of_calls_that_took_long_end(server: _Server) -> None:
    """The server has as many threads as before."""
    before = set(server.calls._threads)
    server.hold("mallory", 20)
    more = set(server.calls._threads) - before
    assert len(more) >= 20 - calls_module._QUICK_CLERKS
    server.go_on.set()
    for thread in (before | more) - set(server.calls._threads):
        thread.join(GUARD_S)
    while len(server.calls._threads) > len(before):  # until the last one has noted its end
        pass


def test_stream_has_a_thread_that_ends_with_it(server: _Server) -> None:
    """Other calls are served beside streams; after many streams there are no more threads."""
    before = len(server.calls._threads)
    for _ in range(50):
        left, end = threading.Semaphore(0), threading.Event()

        def stream(
            ticket: Ticket,
            left: threading.Semaphore = left,
            end: threading.Event = end,
        ) -> None:
            ticket.leave()
            left.release()
            assert end.wait(GUARD_S)

        streams = [server.call("alice", stream, is_stream=True) for _ in range(3)]
        for _ in range(3):
            assert left.acquire(timeout=GUARD_S)
        done = threading.Event()
        server.call("alice", lambda _, done=done: done.set()).over()  # type: ignore[misc]
        assert done.wait(GUARD_S)
        end.set()
        for each in streams:
            each.over()
    while len(server.calls._threads) > before:
        pass


@pytest.mark.usefixtures("patient")
def test_lane_lacks_no_clerk_while_a_stream_begins(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the thread that replaces late clerks could start one too many, which would stay."""
    counts: list[object] = []

    class Lane(calls_module._Lane):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "clerks":
                counts.append(value)
            super().__setattr__(name, value)

    monkeypatch.setattr(server.calls._quick, "__class__", Lane)
    begun = threading.Event()

    def stream(ticket: Ticket) -> None:
        ticket.leave()
        begun.set()

    server.call("alice", stream, is_stream=True).over()
    assert begun.wait(GUARD_S)
    assert set(counts) <= {calls_module._QUICK_CLERKS}


def test_streams_are_refused_beyond_the_ceilings_and_some_more(server: _Server) -> None:
    """Of one caller, and of all together; unary calls are not streams."""
    more_of_one, more = calls_module._MORE_STREAMS_OF_ONE, calls_module._MORE_STREAMS
    for _ in range(3 + more_of_one):
        assert server.call("mallory", is_stream=True).refusal is None
    assert "of your streams are open" in _why(server.call("mallory", is_stream=True))
    assert server.call("mallory").refusal is None
    for _ in range(5 + more - 3 - more_of_one):
        assert server.call("malloy", is_stream=True).refusal is None
    assert f"{5 + more} streams are open" in _why(server.call("alice", is_stream=True))
    assert server.call("alice").refusal is None


@contextlib.contextmanager
def _no_more_threads() -> Iterator[None]:
    """The system allows no more threads: it has no room for their stacks."""
    before = threading.stack_size(1 << 46)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threading.Thread(target=print).start()
        yield
    finally:
        threading.stack_size(before)


@contextlib.contextmanager
def _no_memory_for_threads() -> Iterator[None]:
    """There is no memory for what Python keeps of a thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", mock.Mock(side_effect=MemoryError))
        yield


@pytest.mark.parametrize("no_more_threads", [_no_more_threads, _no_memory_for_threads])
def test_stream_whose_thread_cannot_be_started_is_refused_alone(
    server: _Server, no_more_threads: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    """The stream's thread remains a clerk and serves the next calls, however often this happens."""
    outcomes: queue.SimpleQueue[str] = queue.SimpleQueue()

    def stream(ticket: Ticket) -> None:
        try:
            ticket.leave()
        except OverloadError as error:
            outcomes.put(str(error))

    with no_more_threads():
        for _ in range(20):
            server.call("alice", stream, is_stream=True).over()
            assert "no more threads can be started" in outcomes.get(timeout=GUARD_S)
            server.call("alice", lambda _: outcomes.put("served")).over()
            assert outcomes.get(timeout=GUARD_S) == "served"


def test_calls_wait_while_no_thread_can_be_started_and_are_served_then(
    server: _Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All clerks are held. When the system allows threads again, the next call runs.

    The log says once that there are none, however often a thread is tried.
    """
    tried, done = threading.Semaphore(0), threading.Event()
    start = server.calls._start_clerk

    def try_it(lane: Any) -> None:
        tried.release()
        start(lane)

    monkeypatch.setattr(server.calls, "_start_clerk", try_it)
    with _no_more_threads():
        server.hold("mallory", calls_module._QUICK_CLERKS)
        server.call("alice", lambda _: done.set())
        for _ in range(5):
            assert tried.acquire(timeout=GUARD_S)
        assert not done.is_set()
    assert done.wait(GUARD_S)
    assert caplog.text.count("no more threads can be started") == 1


def test_submit_never_raises(server: _Server, caplog: pytest.LogCaptureFixture) -> None:
    """An exception there would end the thread that accepts calls."""

    def fail(_: Ticket) -> None:
        raise ZeroDivisionError

    assert server.calls.submit(print).done()  # nothing has arrived
    assert "stays without an answer" in caplog.text
    server.call("alice", fail).over()
    server.calls.shutdown(wait=False)
    assert server.call("alice", fail).refusal is not None
    assert caplog.text.count("ZeroDivisionError") == 2


def test_call_that_fails_outside_of_its_behaviour_ends_no_clerk(server: _Server) -> None:
    """The same clerks serve the next calls."""

    def fail(_: Ticket) -> None:
        raise ZeroDivisionError

    before = set(server.calls._threads)
    for _ in range(20):
        server.call("alice", fail).over()
    done = threading.Event()
    server.call("alice", lambda _: done.set())
    assert done.wait(GUARD_S)
    assert set(server.calls._threads) == before


def test_shutdown_serves_the_calls_that_wait_and_refuses_new_ones() -> None:
    """And ends every thread."""
    calls = Calls(streams=1, streams_of_one=1)
    server, served = _Server(calls), threading.Semaphore(0)
    threads = set(calls._threads)
    for _ in range(50):
        server.call("alice", lambda _: served.release())
    calls.shutdown()
    for _ in range(50):
        assert served.acquire(blocking=False)
    for thread in threads:
        thread.join(GUARD_S)
        assert not thread.is_alive()
    assert "shutting down" in _why(server.call("alice"))


def test_calls_whose_request_does_not_arrive_are_cancelled(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them, also those that begin when all former ones have been cancelled."""
    monkeypatch.setattr(calls_module, "_ARRIVAL_S", 0.01)
    for _ in range(20):
        cancelled = [threading.Event() for _ in range(5)]

        def request(cancelled: threading.Event) -> Iterator[bytes]:
            assert cancelled.wait(GUARD_S)
            yield b""

        def run(ticket: Ticket, cancelled: threading.Event) -> None:
            assert ticket.receive(request(cancelled), cancelled.set) == b""

        for each in cancelled:
            ticket = server.calls.arrive("alice", Kind.QUICK)
            server.calls.submit(run, ticket, each)
        for each in cancelled:
            assert each.wait(GUARD_S)
    while server.calls.receiving:
        pass


def test_logins_of_one_certificate_do_not_take_the_threads_of_others(server: _Server) -> None:
    """Each certificate has a share of its own, and one without logins is not remembered."""
    with pytest.raises(OverloadError, match="logins with your certificate"):
        _log_in(server.calls, b"mallory", calls_module._LOGINS_OF_ONE + 1)
    _log_in(server.calls, b"mallory", calls_module._LOGINS_OF_ONE)
    assert not server.calls._logins


def _log_in(calls: Calls, certificate: bytes, count: int) -> Any:
    """Have that many logins run within each other."""
    if count:
        with calls.login(certificate), calls.login(b"alice"):
            _log_in(calls, certificate, count - 1)


# --- over gRPC: bursts, floods, and clients that do not read ------------------------------


def _status_rpc(client: Client) -> Any:
    return client._channel.unary_unary(
        "/jobworker.v1.WorkerService/GetJobStatus",
        request_serializer=worker_pb.GetJobStatusRequest.SerializeToString,
    )


@pytest.mark.parametrize("count", [300, 1000])
def test_idle_server_serves_a_burst_completely(connect: Connect, count: int) -> None:
    """Of one client, over one connection, all at once."""
    client = connect()
    request = worker_pb.GetJobStatusRequest(job_id=run_job(client))
    rpc, metadata = _status_rpc(client), client._link.metadata()
    answers = [rpc.future(request, metadata=metadata, timeout=GUARD_S) for _ in range(count)]
    assert {answer.code().name for answer in answers} == {"OK"}


class _Flood:
    """One user's calls, each of which follows the answer to the last, until the context ends."""

    def __init__(self, clients: list[Client], at_once: int) -> None:
        self._request = worker_pb.GetJobStatusRequest(job_id=run_job(clients[0]))
        self._clients = clients
        self._at_once = at_once
        self._stopped = threading.Event()
        self._running = threading.Semaphore(0)
        self.served = threading.Semaphore(0)

    def _call(self, rpc: Any, metadata: Any) -> None:
        answer = rpc.future(self._request, metadata=metadata, timeout=GUARD_S)
        answer.add_done_callback(lambda answer: self._answered(answer, rpc, metadata))

    def _answered(self, answer: Any, rpc: Any, metadata: Any) -> None:
        if answer.code().name == "OK":
            self.served.release()
        if self._stopped.is_set():
            self._running.release()
        else:
            self._call(rpc, metadata)

    def __enter__(self) -> Self:
        for client in self._clients:
            for _each in range(self._at_once):
                self._call(_status_rpc(client), client._link.metadata())
        assert self.served.acquire(timeout=GUARD_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for _each in range(len(self._clients) * self._at_once):
            assert self._running.acquire(timeout=GUARD_S)


@pytest.mark.parametrize(("connections", "at_once"), [(2, 100), (20, 20), (2, 700)])
def test_flood_of_one_user_costs_another_no_call(
    connect: Connect, connections: int, at_once: int
) -> None:
    """Over any number of connections, also with more calls than one user may have."""
    admin = connect("admin")
    jobs = [admin.start("sleep", ["infinity"]) for _ in range(50)]
    with _Flood([connect() for _ in range(connections)], at_once) as flood:
        for job_id in jobs:
            assert admin.status(job_id).status == worker_pb.JOB_STATUS_RUNNING
            assert admin.stop(job_id).status == worker_pb.JOB_STATUS_STOPPED
            assert flood.served.acquire(timeout=GUARD_S)


def test_stream_that_is_cancelled_while_it_begins_is_no_internal_error(
    serve: Serve,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its client has gone, which is nothing for the server's log."""
    begins, gone, over = threading.Event(), threading.Event(), Calls.over

    def leave(*_: Any) -> None:
        begins.set()
        assert gone.wait(GUARD_S)

    def note_end(calls: Calls, ticket: Ticket) -> None:
        over(calls, ticket)
        if ticket.is_stream:
            gone.set()

    server = serve()
    client = connect("user", server.address)
    job_id = client.start(*FOREVER)
    monkeypatch.setattr(Calls, "leave", leave)
    monkeypatch.setattr(Calls, "over", note_end)
    stream = client.stream(job_id)
    assert begins.wait(GUARD_S)
    stream.close()
    server.stop()
    assert gone.is_set()
    assert "internal error" not in caplog.text


def test_no_call_is_cancelled_while_very_many_wait_for_grpcs_accepting_thread(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ten connections. If gRPC cancelled some, it could be those of another user."""
    server = serve()
    clients = [connect("user", server.address) for _ in range(10)]
    request = worker_pb.GetJobStatusRequest(job_id=run_job(clients[0]))
    go_on, arrive = threading.Event(), Calls.arrive

    def wait(*args: Any) -> Ticket:
        assert go_on.wait(GUARD_S)
        return arrive(*args)

    monkeypatch.setattr(Calls, "arrive", wait)
    answers = [
        _status_rpc(client).future(request, metadata=client._link.metadata(), timeout=GUARD_S)
        for client in clients
        for _ in range(1000)
    ]
    go_on.set()
    assert {answer.code().name for answer in answers} <= {"OK", "RESOURCE_EXHAUSTED"}


def test_refusal_tells_people_and_grpcs_own_retries_when_to_try_again(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`retry-after` is in seconds, and `grpc-retry-pushback-ms` is what gRPC's clients obey."""
    monkeypatch.setattr(calls_module, "_CALLS_OF_ONE", 0)
    client = connect("user", serve().address)
    with pytest.raises(grpc.RpcError) as caught:
        _status_rpc(client)(worker_pb.GetJobStatusRequest(), metadata=client._link.metadata())
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(error.trailing_metadata())
    assert (trailing["retry-after"], trailing["grpc-retry-pushback-ms"]) == ("1", "1000")


def test_client_of_grpc_obeys_the_refusal(
    serve: Serve, connect: Connect, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own settings it would pause for very long; it tries again when the server says."""

    class FirstError(OverloadError):
        def __init__(self, why: str) -> None:
            super().__init__(why)
            monkeypatch.undo()

    address = serve().address
    client = connect("user", address)
    request = worker_pb.GetJobStatusRequest(job_id=run_job(client))
    pause = {"initialBackoff": f"{10 * GUARD_S}s", "maxBackoff": f"{10 * GUARD_S}s"}
    retries = {"retryableStatusCodes": ["RESOURCE_EXHAUSTED"], "maxAttempts": 2}
    retries |= pause | {"backoffMultiplier": 1}
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": retries}]})
    names = ("server-ca.pem", "client-key.pem", "client.pem")
    credentials = grpc.ssl_channel_credentials(*((certs / name).read_bytes() for name in names))
    monkeypatch.setattr(calls_module, "_CALLS_OF_ONE", 0)
    monkeypatch.setattr(calls_module, "OverloadError", FirstError)
    with grpc.secure_channel(address, credentials, [("grpc.service_config", config)]) as channel:
        rpc: Any = channel.unary_unary(
            "/jobworker.v1.WorkerService/GetJobStatus",
            request_serializer=worker_pb.GetJobStatusRequest.SerializeToString,
        )
        assert rpc(request, metadata=client._link.metadata(), timeout=GUARD_S)


def test_streams_that_have_ended_leave_no_threads_and_no_memory(
    start_server: Callable[..., ServerProgram], certs: Path
) -> None:
    """After 1,000 streams, 500 at once, there are as many threads and hardly more memory."""
    program = start_server()
    with Client(program.address, certs=certs) as client:
        client.login("user", "user")
        job_id = client.start(*FOREVER)

        def open_streams(count: int) -> None:
            streams = [client.stream(job_id) for _ in range(count)]
            for stream in streams:
                assert next(stream) == b"ready\n"
            for stream in streams:
                stream.close()

        def state() -> tuple[int, int]:
            while client.status(job_id).subscribers:
                pass
            status = Path(f"/proc/{program.process.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            return int(fields["Threads"]), int(fields["VmRSS"].split()[0])

        open_streams(100)
        threads, memory = state()
        for _ in range(2):
            open_streams(500)
        while state()[0] > threads:  # until the last thread has ended
            pass
        assert state()[1] <= memory * 1.2
