"""Tests of the audit log's lines about calls: how long they are, and which calls share one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit import AUDIT_FLAGS, AuditError, AuditLog
from records import Records
from testkit import FOREVER, GUARD_S, Clock, run_job, small_file_system

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from client import Client
    from server import Server

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]


def _open(path: Path, *, required: bool = False) -> AuditLog:
    return AuditLog(lambda: os.open(path, AUDIT_FLAGS, 0o600), required=required)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


@pytest.fixture
def records(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    """Shared lines are not written before the close."""
    monkeypatch.setattr("records._TOGETHER_S", GUARD_S)
    with _open(path) as audit, Records(audit, clock=clock) as records:
        yield records


def _fields(number: int = 0, **more: Any) -> dict[str, Any]:
    return {"rpc": "GetJobStatus", "job": str(number), "outcome": "OK", **more}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_calls_within_the_allowance_have_a_line_each(records: Records, path: Path) -> None:
    """In the order of the calls."""
    for number in range(100):
        records.write("alice", _fields(number))
    assert [line["job"] for line in _lines(path)] == [str(number) for number in range(100)]


def test_calls_beyond_the_allowance_share_a_line(records: Records, path: Path) -> None:
    """The file grows by one line in each second, however many calls there are."""
    allowance = 4 * 1024 * 1024
    long = "x" * 1000
    for number in range(50_000):
        records.write("alice", _fields(number, reason=long))
    assert allowance <= path.stat().st_size <= allowance + 2048
    alone = len(_lines(path))
    records.close()
    assert path.stat().st_size <= allowance + 4096
    *_, shared = _lines(path)
    assert (shared["rpc"], shared["outcome"]) == ("GetJobStatus", "OK")
    assert shared["calls"] + alone == 50_000


def test_allowance_of_one_caller_is_nobody_elses(records: Records, path: Path) -> None:
    """And it comes back with time."""
    _use_up(records, "alice")
    size = path.stat().st_size
    records.write("alice", _fields(1))
    assert path.stat().st_size == size
    records.write("bob", _fields(2))
    assert _lines(path)[-1]["job"] == "2"


def _use_up(records: Records, caller: str) -> None:
    records._allowance_locked(caller).left = 0


def test_allowance_comes_back_with_time(records: Records, path: Path, clock: Clock) -> None:
    """16 KiB in each second."""
    _use_up(records, "alice")
    records.write("alice", _fields(1))
    assert _lines(path) == []
    clock.now += 1
    for number in range(1000):
        records.write("alice", _fields(number))
    assert 16 * 1024 <= path.stat().st_size <= 17 * 1024


def test_call_that_changes_something_has_its_own_line_without_arguments(
    records: Records, path: Path
) -> None:
    """The digest tells what the arguments were."""
    _use_up(records, "alice")
    argv = ["echo", "x" * 100]
    for _ in range(3):
        records.write("alice", _fields(argv=argv), alone=True)
    digest = hashlib.sha256(b"".join(each.encode() + b"\0" for each in argv)).hexdigest()
    for line in _lines(path):
        assert (line["argv"], line["argv_sha256"]) == (["... and 106 bytes more"], digest)
    assert len(_lines(path)) == 3


def test_each_rpc_and_outcome_has_a_shared_line(records: Records, path: Path) -> None:
    """For each caller, with the fields of the first call."""
    for caller in ("alice", "bob"):
        _use_up(records, caller)
        for rpc in ("GetJobStatus", "ListJobs"):
            for outcome in ("OK", "NOT_FOUND"):
                for number in range(3):
                    records.write(caller, _fields(number, user=caller, rpc=rpc, outcome=outcome))
    records.close()
    assert sorted((each["user"], each["rpc"], each["outcome"]) for each in _lines(path)) == [
        (caller, rpc, outcome)
        for caller in ("alice", "bob")
        for rpc in ("GetJobStatus", "ListJobs")
        for outcome in ("NOT_FOUND", "OK")
    ]
    assert {(each["job"], each["calls"]) for each in _lines(path)} == {("0", 3)}


def test_shared_line_is_written_without_a_close(path: Path, clock: Clock) -> None:
    """About a second after the first of its calls."""
    written = threading.Event()

    class Log(AuditLog):
        def record(self, **fields: Any) -> int:
            try:
                return super().record(**fields)
            finally:
                written.set()

    with Log(lambda: os.open(path, AUDIT_FLAGS, 0o600)) as audit, Records(audit, clock=clock) as r:
        _use_up(r, "alice")
        r.write("alice", _fields())
        assert written.wait(GUARD_S)
        assert [line["calls"] for line in _lines(path)] == [1]


def test_calls_share_no_line_while_the_log_cannot_be_written(clock: Clock) -> None:
    """If a record is required, each of them is refused: the shared line might not be written."""
    with (
        small_file_system("64k") as disk,
        _open(disk / "log", required=True) as audit,
        Records(audit, clock=clock) as records,
    ):
        _use_up(records, "alice")
        with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b" ")
        for number in range(200):  # the last page of the log has room for some
            with contextlib.suppress(AuditError):
                records.write("alice", _fields(number), alone=True)
        with pytest.raises(AuditError):
            records.write("alice", _fields())


@given(
    argv=st.lists(st.text(max_size=3000), max_size=5),
    text=st.text(max_size=5000),
)
def test_no_line_is_long(tmp_path_factory: Any, argv: list[str], text: str) -> None:
    """Whatever a client sends. Each shown argument is a beginning of one."""
    path = tmp_path_factory.mktemp("log") / "audit.log"
    with _open(path) as audit, Records(audit) as records:
        records.write("alice", _fields(argv=argv, reason=text))
    (line,) = _lines(path)
    assert path.stat().st_size < 4096 + 1024 + 512
    assert text.startswith(line["reason"])
    if "argv_sha256" in line:
        *shown, _ = line["argv"]
        assert all(each.startswith(part) for each, part in zip(argv, shown, strict=False))
    else:
        assert line["argv"] == argv


def _allow(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Give each caller so many bytes; shared lines are written when the server stops."""
    monkeypatch.setattr("records._ALLOWANCE_BYTES", size)
    monkeypatch.setattr("records._ALLOWANCE_BPS", 0)
    monkeypatch.setattr("records._TOGETHER_S", GUARD_S)


def test_flood_of_one_user_writes_little_and_starts_are_all_on_record(
    serve: Serve, connect: Connect, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the API: calls that only read share lines, jobs that were started and stopped do not."""
    _allow(monkeypatch, 10_000)
    server = serve(audit_log=path)
    client = connect("user", server.address)
    job_id = run_job(client, "echo", ["x" * 5000])
    for _ in range(300):
        client.status(job_id)
        client.stop(job_id)
    started = [client.start(*FOREVER) for _ in range(3)]
    for each in started:
        client.stop(each)
        client.remove(each)
    assert path.stat().st_size < 10_000 + 12 * 1024
    lines = _lines(path)
    for rpc in ("StartJob", "StopJob", "RemoveJob"):
        jobs = [line["job"] for line in lines if line["rpc"].endswith(rpc)]
        assert [job for job in jobs if job != job_id] == started


@pytest.mark.parametrize("calls_of_one", [1024, 0])
def test_calls_share_a_line_whatever_names_the_client_gives_them(
    serve: Serve,
    connect: Connect,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls_of_one: int,
) -> None:
    """Over the API: methods that do not exist, served and refused for overload; and refreshes."""
    _allow(monkeypatch, 1000)
    server = serve(audit_log=path)
    client = connect("user", server.address)
    monkeypatch.setattr("calls._CALLS_OF_ONE", calls_of_one)
    methods = [f"/none/{number}" for number in range(50)]
    for method in methods + ["/jobworker.v1.AuthService/Refresh"] * 50:
        rpc: Any = client._channel.unary_unary(method)
        with contextlib.suppress(grpc.RpcError):
            rpc(b"", metadata=client._link.metadata())
    server.stop()
    lines = [line for line in _lines(path) if not line["rpc"].endswith("Login")]
    assert sum(line.get("calls", 1) for line in lines) == 100
    assert len(lines) < 20
