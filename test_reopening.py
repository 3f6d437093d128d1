"""Tests of clients whose server is away for a while: they wait, go on, and do nothing twice."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import workerservice_pb2 as worker_pb
from client import ClientError
from retrying import Patience
from serveroptions import OPTIONS
from testkit import ABSENT, GUARD_S
from testproxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from client import Client
    from testkit import ClientProgram, ServerProgram

    Connect = Callable[..., Client]

_EXISTS, _STARTED = worker_pb.JOB_EVENT_KIND_EXISTS, worker_pb.JOB_EVENT_KIND_STARTED
_ENDED, _REMOVED = worker_pb.JOB_EVENT_KIND_ENDED, worker_pb.JOB_EVENT_KIND_REMOVED

_RUN_AND_END = [worker_pb.JOB_STATUS_RUNNING, worker_pb.JOB_STATUS_FINISHED]


@pytest.fixture
def connect_options() -> dict[str, Any]:
    """The clients go on after a lost connection, as they do by default."""
    return {}


class _Line:
    """A line to the server of `program`, which can be down. Attribute: `address`."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._proxy = Proxy(target)
        self.address = self._proxy.address

    def take_down(self) -> None:
        """Break off all connections, and refuse new ones."""
        self._proxy.close()

    def put_up(self) -> None:
        self._proxy = Proxy(self._target, int(self.address.rpartition(":")[2]))

    def cut(self) -> None:
        self._proxy.cut()

    def close(self) -> None:
        self._proxy.close()


@pytest.fixture
def line(program: ServerProgram) -> Iterator[_Line]:
    """Between clients and the server that all tests share."""
    line = _Line(program.address)
    yield line
    line.close()


# --- pauses ---------------------------------------------------------------------------------


def test_patience_ends_after_its_time() -> None:
    """With the error of the last attempt, which is told once."""
    told: list[ClientError] = []
    patience = Patience(threading.Event(), told.append)
    error = ClientError("away")
    patience.wait(error, for_s=0.2)
    patience.wait(error, for_s=0.2)
    with pytest.raises(ClientError) as caught:
        patience.wait(error, for_s=0.2)
    assert (caught.value, told) == (error, [error])
    patience.succeeded()
    assert not patience.has_failed
    patience.wait(error, for_s=0.2)
    assert told == [error, error]


def test_patience_ends_when_its_user_closes() -> None:
    """At once, in the middle of a pause."""
    closed, begun = threading.Event(), threading.Event()
    patience = Patience(closed, lambda _: begun.set())
    error = ClientError("away", retry_after_s=1000)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(patience.wait, error, for_s=1000)
        assert begun.wait(GUARD_S)
        closed.set()
        with pytest.raises(ClientError, match="away"):
            waiting.result(GUARD_S)


# --- calls with one answer --------------------------------------------------------------------


def test_calls_wait_for_a_server_that_was_reached_before(connect: Connect, line: _Line) -> None:
    """Each of them, and what they do is done once."""
    client, other = connect(address=line.address), connect()
    job_id = client.start("sleep", ["infinity"])
    begun, request_id = threading.Event(), str(uuid.uuid4())
    calls: list[Callable[[], object]] = [
        lambda: client.status(job_id).job_id,
        lambda: client.list(job_ids=[job_id])[0].job_id,
        lambda: client.stop(job_id).job_id,
        lambda: client.start("true", request_id=request_id),
    ]
    answers: list[object] = []
    for call in calls:
        line.take_down()

        def begin(call: Callable[[], object] = call) -> object:
            begun.set()
            return call()

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(begin)
            assert begun.wait(GUARD_S)
            line.put_up()
            answers.append(answer.result(GUARD_S))
        begun.clear()
    assert answers[:3] == [job_id] * 3
    assert other.start("true", request_id=request_id) == answers[3]


def test_client_that_has_reached_no_server_fails_at_once(connect: Connect, line: _Line) -> None:
    """And so does one with `retry_for` 0. With `connect_for` it waits."""
    client = connect(address=line.address, retry_for=0)
    client.list()
    line.take_down()
    for impatient in (client, connect(address=line.address)):
        with pytest.raises(ClientError, match=r"no server listens|closed the connection"):
            impatient.list()
    begun = threading.Event()
    waits = connect(address=line.address, connect_for=GUARD_S, on_wait=lambda _: begun.set())
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(waits.list)
        assert begun.wait(GUARD_S)
        line.put_up()
        answer.result(GUARD_S)


def test_close_ends_the_waiting(connect: Connect, line: _Line) -> None:
    """A call that waits for the server raises its error."""
    told = threading.Event()
    client = connect(address=line.address, retry_for=GUARD_S, on_wait=lambda _: told.set())
    client.list()
    line.take_down()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.list)
        assert told.wait(GUARD_S)
        client.close()
        with pytest.raises(ClientError):
            answer.result(GUARD_S)
    line.put_up()


def test_call_of_a_closed_client_is_an_error_of_the_client(connect: Connect) -> None:
    """Another thread may close it at any moment. gRPC has a ValueError for that."""
    client = connect()
    client.list(limit=1)
    client.close()
    calls: list[Callable[[], object]] = [
        client.list,
        client.watch,
        lambda: client.stream(ABSENT),
        lambda: client.write_input(ABSENT, b"x"),
        client.refresh,
    ]
    for call in calls:
        with pytest.raises(ClientError, match="this client was closed") as caught:
            call()
        assert caught.value.code == "CANCELLED"


def test_command_waits_for_a_server_that_begins_later(cli: ClientProgram, line: _Line) -> None:
    """`run` of a script succeeds without a word; `list` of a person fails at once."""
    line.take_down()
    cli.environment["JOBWORKER_SERVER"] = line.address
    assert "no server listens" in cli.fail("list")
    with cli.start("run", "sh", "-c", "echo out; exit 7") as process:
        line.put_up()
        stdout, stderr = process.communicate(timeout=GUARD_S)
    assert (process.returncode, stdout, stderr) == (7, b"out\n", b"")


# --- watches ----------------------------------------------------------------------------------


def test_watch_tells_what_happened_while_the_server_was_away(connect: Connect, line: _Line) -> None:
    """Each end, removal and start once; what did not change is not told again."""
    other = connect()
    labels = {"test": "watch-away"}
    stays, ends, goes = (other.start("sleep", ["infinity"], labels=labels) for _ in range(3))
    other.stop(goes)
    events = connect(address=line.address).watch(labels=labels)
    first = {(event.kind, event.job.job_id) for event in itertools.islice(events, 3)}
    assert first == {(_EXISTS, stays), (_EXISTS, ends), (_EXISTS, goes)}
    line.take_down()
    other.stop(ends)
    other.remove(goes)
    new = other.start("sleep", ["infinity"], labels=labels)
    with ThreadPoolExecutor(1) as pool:
        more = pool.submit(lambda: [next(events) for _ in range(3)])
        line.put_up()
        told = {(event.kind, event.job.job_id) for event in more.result(GUARD_S)}
    assert told == {(_ENDED, ends), (_REMOVED, goes), (_EXISTS, new)}
    other.stop(stays)
    event = next(events)
    assert (event.kind, event.job.job_id) == (_ENDED, stays)
    last = other.start("true", labels=labels)
    assert [(event.kind, event.job.job_id) for event in (next(events), next(events))] == [
        (_STARTED, last),
        (_ENDED, last),
    ]
    events.close()
    other.stop(new)


def test_watch_that_is_cut_again_and_again_tells_everything_once(
    connect: Connect, line: _Line
) -> None:
    """Whether an event came before the cut, after it, or was found by the comparison."""
    client, other, labels = connect(address=line.address), connect(), {"test": "watch-cut"}
    client.list(limit=1)
    events = client.watch(labels=labels)
    for _ in range(10):
        job_id = other.start("true", labels=labels)
        line.cut()
        told: list[int] = []  # the statuses
        while worker_pb.JOB_STATUS_FINISHED not in told:
            event = next(events)
            assert event.job.job_id == job_id
            told.append(event.job.status)
        assert told in (_RUN_AND_END, _RUN_AND_END[1:])
    events.close()


def test_watch_with_a_time_ends_while_the_server_is_away(connect: Connect, line: _Line) -> None:
    """With DEADLINE_EXCEEDED, which `wait --timeout` expects."""
    job_id = connect().start("sleep", ["infinity"])
    events = connect(address=line.address).watch(job_ids=[job_id], timeout_s=1)
    next(events)
    line.take_down()
    with pytest.raises(ClientError) as caught:
        next(events)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    line.put_up()
    connect().stop(job_id)


def test_wait_goes_on_after_a_lost_connection(
    cli: ClientProgram, connect: Connect, line: _Line
) -> None:
    """It exits as the job that ended meanwhile, and says nothing of the loss."""
    client = connect()
    done = client.start("true")
    job_id = client.start("sleep", ["infinity"])
    with cli.start("wait", "--server", line.address, done, job_id) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(done.encode())
        line.take_down()
        client.stop(job_id)
        line.put_up()
        stdout, stderr = process.communicate(timeout=GUARD_S)
    assert (process.returncode, stderr) == (128 + 9, b"")
    assert stdout.startswith(job_id.encode())


def test_wait_for_a_job_that_is_removed_while_the_server_is_away_is_over(
    cli: ClientProgram, connect: Connect, line: _Line
) -> None:
    """How it ended is unknown then: 125."""
    other = connect()
    ended, gone = other.start("true"), other.start("sleep", ["infinity"])
    with cli.start("wait", "--server", line.address, ended, gone) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(ended.encode())
        line.take_down()
        other.stop(gone)
        other.remove(gone)
        line.put_up()
        stdout, stderr = process.communicate(timeout=GUARD_S)
    assert (process.returncode, stdout) == (125, b"")
    assert stderr == f"client: no such job: {gone}\n".encode()


@pytest.mark.parametrize("is_known", [True, False])
def test_watch_tells_once_that_a_job_was_removed_while_the_server_was_away(
    connect: Connect, line: _Line, is_known: bool
) -> None:
    """Also if nothing was told of the job before; and not again after the next loss."""
    client, other = connect(address=line.address), connect()
    client.list(limit=1)
    gone, stays = (other.start("sleep", ["infinity"]) for _ in range(2))
    if not is_known:
        line.take_down()
    events = client.watch(job_ids=[gone, stays])
    told = [next(events).job.job_id for _ in range(2 if is_known else 0)]
    if is_known:
        line.take_down()
    other.stop(gone)
    other.remove(gone)
    with ThreadPoolExecutor(1) as pool:
        more = pool.submit(lambda: [next(events) for _ in range(1 if is_known else 2)])
        line.put_up()
        found = more.result(GUARD_S)
    assert (_REMOVED, gone) in [(event.kind, event.job.job_id) for event in found]
    assert sorted([*told, *(event.job.job_id for event in found)]) == sorted(
        [gone, stays, gone] if is_known else [gone, stays]
    )
    line.cut()
    other.stop(stays)
    event = next(events)
    assert (event.kind, event.job.job_id) == (_ENDED, stays)
    events.close()


def test_list_with_watch_goes_on_after_a_lost_connection(
    cli: ClientProgram, connect: Connect, line: _Line
) -> None:
    """Each job and each end has one line."""
    client, label = connect(), ("--label", "test=list-watch")
    first = client.start("sleep", ["infinity"], labels={"test": "list-watch"})
    with cli.start("list", "--watch", "--server", line.address, *label) as process:
        assert process.stdout
        assert process.stdout.readline().split()[:2] == [first.encode(), b"exists"]
        line.take_down()
        client.stop(first)
        second = client.start("sleep", ["infinity"], labels={"test": "list-watch"})
        line.put_up()
        lines = sorted(process.stdout.readline().split()[:2] for _ in range(2))
        assert lines == sorted([[first.encode(), b"ended"], [second.encode(), b"exists"]])
        process.terminate()
    client.stop(second)


def test_input_goes_on_after_the_server_was_away(connect: Connect, line: _Line) -> None:
    """At the byte that the job has got."""
    client = connect(address=line.address, on_wait=lambda _: line.put_up())
    other = connect()
    job_id = client.start("cat", stdin=True)
    chunks = other.stream(job_id)

    def parts() -> Iterator[bytes]:
        yield b"one\n"
        assert next(chunks) == b"one\n"
        line.take_down()
        yield b"two\n"
        yield b"three\n"

    client.write_input(job_id, parts())
    assert b"".join(chunks) == b"two\nthree\n"


# --- a server that restarts -------------------------------------------------------------------

_RUNS = int(os.environ.get("JOBWORKER_RUNS", "15"))  # 50 take too long on a busy machine
_RESTART_EVERY_S = 2.0


@pytest.mark.alone  # the server must be back before a client gives up
@pytest.mark.skipif(
    "restart_window" not in OPTIONS, reason="without a restart window a restart ends the jobs"
)
def test_script_does_not_notice_that_the_server_restarts(
    cli: ClientProgram,
    start_server: Callable[..., ServerProgram],
    make_state: Callable[[], Path],
    public: Path,
) -> None:
    """`run` in a loop: the exact output, the exact exit status, and nothing on stderr."""
    # Where jobs' users can pass, so that the TMPDIRs of all these servers are in one directory.
    state, done = shutil.copytree(make_state(), public / "state"), threading.Event()
    first = start_server("--restart-window", "60s", state=state)
    cli.environment["JOBWORKER_SERVER"] = first.address

    def restart() -> int:
        server, restarts = first, 0
        while not done.wait(_RESTART_EVERY_S):
            server.end()
            options = ("--listen", first.address, "--restart-window", "60s")
            server = start_server(*options, state=state)
            restarts += 1
        return restarts

    with ThreadPoolExecutor(1) as pool:
        restarts = pool.submit(restart)
        try:
            for number in range(_RUNS):
                script = f"echo begin {number}; sleep 0.3; echo end {number}; exit {number}"
                expected = f"begin {number}\nend {number}\n".encode()
                assert cli.run("run", "sh", "-c", script) == (number, expected, "")
        finally:
            done.set()
        assert restarts.result(GUARD_S) > 1
