"""Tests of request IDs: a repeated start makes no second job, a start without an ID leaves none."""

from __future__ import annotations

import functools
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import workerservice_pb2 as worker_pb
from calls import Calls, Ticket
from client import ClientError
from starts import OtherStartError, Starts
from testkit import FOREVER, GUARD_S, call_rpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from client import Client
    from server import Server

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]


def _request_id() -> str:
    return str(uuid.uuid4())


class _Jobs:
    """Makes numbered jobs. Attribute: `kept`, by user and request."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], tuple[str, bytes]] = {}
        self._made = 0

    def start(self, request_id: str) -> str:
        self._made += 1
        self.kept["u", request_id] = str(self._made), b""
        return str(self._made)

    def find(self, user: str, request_id: str) -> tuple[str, bytes] | None:
        return self.kept.get((user, request_id))


def test_starts_that_are_over_take_no_memory() -> None:
    """Those of jobs that are kept are known, because their jobs are."""
    jobs = _Jobs()
    starts = Starts(jobs.find)
    first = starts.once("u", "kept", b"", functools.partial(jobs.start, "kept"))
    assert first == ("1", True)
    assert starts.once("u", "kept", b"", functools.partial(jobs.start, "kept")) == ("1", False)
    with pytest.raises(OtherStartError):
        starts.once("u", "kept", b"other", functools.partial(jobs.start, "kept"))
    jobs.kept.clear()
    assert starts.once("u", "kept", b"", functools.partial(jobs.start, "kept")) == ("2", True)
    assert starts._starts == {}


def test_start_that_is_repeated_while_it_runs_waits_for_it() -> None:
    """All get the same job, or the same error. After an error the next one starts anew."""
    jobs = _Jobs()
    starts = Starts(jobs.find)
    began, go_on = threading.Semaphore(0), threading.Event()

    def start() -> str:
        began.release()
        assert go_on.wait(GUARD_S)
        return jobs.start("1")

    def fail() -> str:
        raise OSError("no")

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(starts.once, "u", "1", b"", start) for _ in range(8)]
        assert began.acquire(timeout=GUARD_S)
        go_on.set()
        assert sorted(call.result(GUARD_S) for call in calls) == [("1", False)] * 7 + [("1", True)]
        with pytest.raises(OSError, match="no"):
            starts.once("u", "2", b"", fail)
        second = functools.partial(jobs.start, "2")
        assert starts.once("u", "2", b"", second) == ("2", True)
    with pytest.raises(OtherStartError, match="start of job 2, which has another command"):
        starts.once("u", "2", b"other", second)
    assert not began.acquire(blocking=False) or not began.acquire(blocking=False)


def test_repeated_start_makes_no_second_job(serve: Serve, connect: Connect) -> None:
    """Also if sixteen come at once, with the UUID in upper case, and after the job's end."""
    client = connect(address=serve().address)
    request_id = _request_id()

    def start(number: int) -> str:
        text = request_id if number % 2 else request_id.upper()
        return client.start("sh", ["-c", "exit 0"], request_id=text, pids=9)

    with ThreadPoolExecutor(16) as pool:
        (job_id,) = set(pool.map(start, range(16)))
    list(client.stream(job_id))
    assert start(1) == job_id
    assert [job.job_id for job in client.list()] == [job_id]
    client.remove(job_id)
    assert start(1) != job_id  # the ID is free when the job is not kept any more
    assert client.start("true") != client.start("true")


@pytest.mark.parametrize(
    "other",
    [
        {"command": "sh", "args": ["-c", "exit 1"]},
        {"command": "sh", "args": ["-c", "exit 0", ""]},
        {"command": "true"},
        {"command": "sh", "args": ["-c", "exit 0"], "limits": worker_pb.Limits(pids=9)},
    ],
    ids=str,
)
def test_request_id_of_another_start_already_exists(
    connect: Connect, other: dict[str, Any]
) -> None:
    """The error names the job. Another user may have the same UUID."""
    request_id = _request_id()
    job_id = connect().start("sh", ["-c", "exit 0"], request_id=request_id)
    code, details = call_rpc(connect(), "StartJob", request_id=request_id, **other)
    assert code == "ALREADY_EXISTS"
    assert details.startswith(f"this request ID belongs to the start of job {job_id}, which has")
    assert connect("admin").start("true", request_id=request_id) != job_id


@pytest.mark.parametrize("text", ["1", " ", "x" * 36, "{0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98}"])
def test_request_id_that_is_no_uuid_is_an_invalid_argument(connect: Connect, text: str) -> None:
    """Short IDs would collide by chance."""
    code, details = call_rpc(connect(), "StartJob", command="true", request_id=text)
    assert code == "INVALID_ARGUMENT"
    assert details.startswith(f"not a request ID: {text!r}")


def test_start_that_fails_may_be_repeated(connect: Connect) -> None:
    """The request ID of a refused start belongs to nothing."""
    request_id = _request_id()
    with pytest.raises(ClientError, match="command not found"):
        connect().start("no-such-command", request_id=request_id)
    assert connect().start("true", request_id=request_id)


def test_start_without_time_for_its_answer_starts_nothing(serve: Serve, connect: Connect) -> None:
    """The deadline would pass while the answer is under way, too late to undo the start."""
    client = connect(address=serve().address)
    request = worker_pb.StartJobRequest(command=FOREVER[0], args=FOREVER[1])
    for _ in range(40):
        with pytest.raises(grpc.RpcError) as caught:
            client._worker.StartJob(request, metadata=client._link.metadata(), timeout=0.003)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert list(client.list()) == []


@pytest.mark.parametrize("request_id", ["", _request_id()], ids=["without", "with a request ID"])
@pytest.mark.parametrize("end", ["cancel", "deadline", "close"])
def test_start_whose_caller_goes_leaves_a_job_only_with_a_request_id(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch, request_id: str, end: str
) -> None:
    """The call ends while the server starts the job."""
    server = serve()
    observer, caller = connect(address=server.address), connect(address=server.address)
    jobs = server._worker
    began, gone, removed = threading.Event(), threading.Event(), threading.Event()
    start, remove, over = jobs.start, jobs.remove, Calls.over

    def start_late(*arguments: Any, **options: Any) -> str:
        began.set()
        assert gone.wait(GUARD_S)
        return start(*arguments, **options)

    def notice_end(calls: Calls, ticket: Ticket) -> None:
        over(calls, ticket)
        if began.is_set():
            gone.set()

    def notice_removal(job_id: str) -> None:
        remove(job_id)
        removed.set()

    monkeypatch.setattr(jobs, "start", start_late)
    monkeypatch.setattr(jobs, "remove", notice_removal)
    monkeypatch.setattr(Calls, "over", notice_end)
    request = worker_pb.StartJobRequest(command=FOREVER[0], args=FOREVER[1], request_id=request_id)
    call = caller._worker.StartJob.future(
        request, metadata=caller._link.metadata(), timeout=1 if end == "deadline" else GUARD_S
    )
    assert began.wait(GUARD_S)
    if end == "cancel":
        call.cancel()
    elif end == "close":
        caller.close()
    if request_id:
        job_id = observer.start(*FOREVER, request_id=request_id)
        assert [job.job_id for job in observer.list()] == [job_id]
        observer.stop(job_id)
    else:
        assert removed.wait(GUARD_S)
        assert list(observer.list()) == []
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        call.result()
