"""Tests of ListJobs with filters and of WatchJobs, with a real server."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

import workerservice_pb2 as worker_pb
from client import ClientError
from testkit import ABSENT, GUARD_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from client import Client
    from jobevents import JobEvents
    from server import Server

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]

_SLEEP = ("sleep", ["1000000"])


@pytest.fixture
def server(serve: Serve) -> Server:
    """A server of the test's own."""
    return serve()


@pytest.fixture
def user(server: Server, connect: Connect) -> Client:
    return connect("user", server.address)


@pytest.fixture
def admin(server: Server, connect: Connect) -> Client:
    return connect("admin", server.address)


@pytest.fixture
def watching() -> Iterator[Callable[..., JobEvents]]:
    """Begin to watch as a client; the watch ends with the test."""
    with contextlib.ExitStack() as ending:

        def watch(client: Client, **conditions: Any) -> JobEvents:
            return ending.enter_context(contextlib.closing(client.watch(**conditions)))

        yield watch


def _finish(client: Client, *argv: str, **options: Any) -> str:
    command, *args = argv or ("true",)
    job_id = client.start(command, args, **options)
    list(client.stream(job_id))
    return job_id


def _next(events: JobEvents, count: int = 1) -> list[tuple[str, str, str]]:
    """Return kind, job ID and status of the next events."""
    return [
        (
            worker_pb.JobEventKind.Name(event.kind).removeprefix("JOB_EVENT_KIND_"),
            event.job.job_id,
            worker_pb.JobStatus.Name(event.job.status).removeprefix("JOB_STATUS_"),
        )
        for event in (next(events) for _ in range(count))
    ]


# --- names, labels, filters -----------------------------------------------------------------


def test_job_shows_its_name_and_labels(user: Client) -> None:
    """As they were given to StartJob."""
    job_id = _finish(user, name="web", labels={"team": "data", "empty": ""})
    job = user.status(job_id)
    assert (job.name, dict(job.labels)) == ("web", {"team": "data", "empty": ""})


@pytest.mark.parametrize(
    "names", [{"name": "cafe"}, {"name": "a b"}, {"labels": {"a b": ""}}, {"labels": {"a": "\n"}}]
)
def test_wrong_name_or_label_starts_nothing(user: Client, names: dict[str, Any]) -> None:
    """INVALID_ARGUMENT says what is wrong."""
    with pytest.raises(ClientError, match=r"label|cannot be the (name|key)") as caught:
        user.start("true", **names)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert user.list() == []


def test_repeated_start_must_have_the_same_name_and_labels(user: Client) -> None:
    """Otherwise it is the start of something else."""
    request_id = ABSENT
    first = user.start("true", request_id=request_id, name="web", labels={"a": "b", "c": "d"})
    again = user.start("true", request_id=request_id, name="web", labels={"c": "d", "a": "b"})
    assert again == first
    with pytest.raises(ClientError) as caught:
        user.start("true", request_id=request_id, name="other")
    assert caught.value.code == "ALREADY_EXISTS"


def test_list_has_the_jobs_that_meet_every_condition(user: Client, admin: Client) -> None:
    """Each condition alone, and two together."""
    old = _finish(user, name="web", labels={"team": "data"})
    foreign = _finish(admin, name="web")
    running = user.start(*_SLEEP, name="db", labels={"team": "data", "run": "7"})
    since = user.status(running).started_at.ToDatetime(UTC)

    def found(client: Client, **conditions: Any) -> list[str]:
        return [job.job_id for job in client.list(**conditions)]

    assert found(admin) == [old, foreign, running]
    assert found(user) == [old, running]
    assert found(admin, statuses=["RUNNING"]) == [running]
    assert found(admin, statuses=["RUNNING", "FINISHED"]) == [old, foreign, running]
    assert found(admin, owner="admin") == [foreign]
    assert found(user, owner="user") == [old, running]
    assert found(admin, name="web") == [old, foreign]
    assert found(admin, labels={"team": "data"}) == [old, running]
    assert found(admin, labels={"team": "data", "run": "7"}) == [running]
    assert found(admin, since=since) == [running]
    assert found(admin, since=since + timedelta(seconds=1)) == []
    assert found(admin, job_ids=[old[:13], running.upper()]) == [old, running]
    assert found(user, job_ids=[foreign]) == []
    assert found(admin, name="web", statuses=["STOPPED"]) == []


def test_list_of_the_newest_jobs_comes_in_pages_too(user: Client) -> None:
    """`newest_first` begins with the last start; the pages have each job once."""
    ids = [_finish(user, name="n" if i % 2 else "") for i in range(6)]
    request = worker_pb.ListJobsRequest(newest_first=True, page_size=4)
    pages: list[list[str]] = []
    while True:
        page = user._link.call(user._worker.ListJobs, request)
        pages.append([job.job_id for job in page.jobs])
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert pages == [ids[:1:-1], ids[1::-1]]
    assert [job.job_id for job in user.list(limit=2)] == ids[-2:]
    assert [job.job_id for job in user.list(limit=2, name="n")] == [ids[3], ids[5]]
    assert [job.job_id for job in user.list(limit=100)] == ids


def test_list_has_the_usage_of_running_jobs_if_asked(
    start_server: Callable[..., Any], connect: Connect
) -> None:
    """It is the same that a status has. Where there are no cgroups, there is none."""
    client = connect("user", start_server().address)
    job_id = client.start(*_SLEEP)
    (plain,) = client.list()
    assert not plain.HasField("usage")
    (job,) = client.list(live_usage=True)
    assert job.HasField("usage") == client.status(job_id).HasField("usage")


@pytest.mark.parametrize("name", ["ListJobs", "WatchJobs"])
def test_user_may_not_ask_for_the_jobs_of_another_owner(user: Client, name: str) -> None:
    """Whether that owner exists or not, with or without jobs."""
    for owner in ("admin", "nobody"):
        with pytest.raises(ClientError) as caught:
            user.list(owner=owner) if name == "ListJobs" else next(user.watch(owner=owner))
        assert caught.value.code == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    "matching",
    [
        worker_pb.JobFilter.FromString(b"\x0a\x01\0"),
        worker_pb.JobFilter.FromString(b"\x0a\x01\x11"),
        worker_pb.JobFilter(job_ids=["x"]),
        worker_pb.JobFilter(job_ids=[""]),
        worker_pb.JobFilter(job_ids=["a"] * 1001),
    ],
)
def test_filter_that_makes_no_sense_is_refused(user: Client, matching: worker_pb.JobFilter) -> None:
    """By ListJobs and WatchJobs, with INVALID_ARGUMENT."""
    calls: tuple[Callable[[], object], ...] = (
        lambda: user._worker.ListJobs(
            worker_pb.ListJobsRequest(filter=matching), metadata=user._link.metadata()
        ),
        lambda: next(
            user._worker.WatchJobs(
                worker_pb.WatchJobsRequest(filter=matching), metadata=user._link.metadata()
            )
        ),
    )
    for call in calls:
        with pytest.raises(user._link.rpc_error) as caught:
            call()
        error: Any = caught.value
        assert error.code().name == "INVALID_ARGUMENT"


# --- which job a text means -----------------------------------------------------------------


def test_text_means_the_job_of_an_id_a_beginning_or_a_name(user: Client) -> None:
    """In this order: a text that can be four characters of an ID is one."""
    job_id = _finish(user, name="web")
    other = _finish(user, name="db")
    assert user.find(job_id) == job_id
    assert user.find(job_id[:8]) == job_id
    assert user.find(job_id[:20].upper()) == job_id
    assert user.find("web") == job_id
    assert user.find("db") == other
    for unknown in ("nope", ABSENT[:9], "", "a b", "we", "\0"):
        with pytest.raises(ClientError, match="no such job") as caught:
            user.find(unknown)
        assert caught.value.code == "NOT_FOUND"


def test_short_beginning_of_an_id_is_a_name_first(user: Client) -> None:
    """A name of up to three characters may look like an ID."""
    first = _finish(user)
    assert user.find(first[:3]) == first
    second = _finish(user, name=first[:3])
    assert user.find(first[:3]) == second
    assert user.find(first[:4]) == first


def test_name_of_several_jobs_means_the_one_that_runs(user: Client) -> None:
    """If none or several run, the error lists them."""
    old = [_finish(user, name="web") for _ in range(2)]
    with pytest.raises(ClientError, match="can be several jobs") as caught:
        user.find("web")
    assert all(job_id in str(caught.value) for job_id in old)
    running = user.start(*_SLEEP, name="web")
    assert user.find("web") == running
    user.start(*_SLEEP, name="web")
    with pytest.raises(ClientError, match="can be several jobs"):
        user.find("web")


def test_text_never_means_a_job_of_somebody_else(user: Client, admin: Client) -> None:
    """Nor makes it ambiguous, so nobody learns whether there is one."""
    foreign = _finish(admin, name="web")
    for text in (foreign[:8], "web"):
        with pytest.raises(ClientError, match="no such job"):
            user.find(text)
    mine = _finish(user, name="web")
    assert user.find("web") == mine
    with pytest.raises(ClientError, match="can be several jobs"):
        admin.find("web")


# --- WatchJobs ----------------------------------------------------------------------------------


def test_watch_sends_the_jobs_that_are_there_and_then_every_change(
    user: Client, watching: Callable[..., JobEvents]
) -> None:
    """Each with the job as it was then."""
    old, running = _finish(user), user.start(*_SLEEP)
    events = watching(user)
    assert _next(events, 2) == [("EXISTS", old, "FINISHED"), ("EXISTS", running, "RUNNING")]
    new = user.start("sh", ["-c", "exit 3"], name="web")
    assert _next(events, 1) == [("STARTED", new, "RUNNING")]
    event = next(events)
    assert (event.kind, event.job.exit_code) == (worker_pb.JOB_EVENT_KIND_ENDED, 3)
    assert (event.job.name, event.job.owner) == ("web", "user")
    user.stop(running)
    user.remove(new)
    assert _next(events, 2) == [("ENDED", running, "STOPPED"), ("REMOVED", new, "FINISHED")]


def test_watch_of_a_user_tells_nothing_of_others_and_that_of_an_admin_all(
    user: Client, admin: Client, watching: Callable[..., JobEvents]
) -> None:
    """Also not by an event that comes without its job."""
    foreign = _finish(admin)
    mine, all_of_them = watching(user), watching(admin)
    assert _next(all_of_them) == [("EXISTS", foreign, "FINISHED")]
    admin.remove(foreign)
    other, own = _finish(admin), _finish(user)
    assert _next(mine, 2) == [("STARTED", own, "RUNNING"), ("ENDED", own, "FINISHED")]
    assert {job_id for _, job_id, _ in _next(all_of_them, 5)} == {foreign, other, own}


def test_watch_with_a_filter_sends_what_it_picks(
    user: Client, watching: Callable[..., JobEvents]
) -> None:
    """By label and by status: the end of a running job is told, too."""
    running = user.start(*_SLEEP, labels={"team": "data"})
    _finish(user, labels={"team": "data"})
    user.start(*_SLEEP)
    events = watching(user, labels={"team": "data"}, statuses=["RUNNING"])
    assert _next(events) == [("EXISTS", running, "RUNNING")]
    user.stop(running)
    assert _next(events) == [("ENDED", running, "STOPPED")]


def test_watch_tells_which_ids_are_those_of_no_job_of_the_caller(
    user: Client, admin: Client, watching: Callable[..., JobEvents]
) -> None:
    """A foreign job looks like one that does not exist."""
    foreign, own = _finish(admin), _finish(user)
    events = watching(user, job_ids=[ABSENT, foreign, own])
    assert _next(events, 3) == [
        ("REMOVED", ABSENT, "UNSPECIFIED"),
        ("REMOVED", foreign, "UNSPECIFIED"),
        ("EXISTS", own, "FINISHED"),
    ]


def test_logout_ends_a_watch(server: Server, connect: Connect) -> None:
    """Although nothing happens to any job."""
    with connect("", server.address) as client:
        client.login("user", "user")
        job_id = _finish(client)
        events = client.watch()
        assert _next(events) == [("EXISTS", job_id, "FINISHED")]
        connect("", server.address, token=client.token).logout()
        with pytest.raises(ClientError) as caught:
            next(events)
    assert caught.value.code == "UNAUTHENTICATED"


def test_shutdown_ends_a_watch_after_the_ends_of_the_jobs(
    start_server: Callable[..., Any], connect: Connect, watching: Callable[..., JobEvents]
) -> None:
    """The watcher learns how the jobs ended."""
    program = start_server()
    client = connect("user", program.address)
    job_id = client.start(*_SLEEP)
    events = watching(client)
    assert _next(events) == [("EXISTS", job_id, "RUNNING")]
    ended: list[list[tuple[str, str, str]]] = []
    reader = threading.Thread(target=lambda: ended.append(_next(events)))
    reader.start()
    program.end()
    reader.join(GUARD_S)
    assert ended == [[("ENDED", job_id, "STOPPED")]]
    with pytest.raises(ClientError) as caught:
        next(events)
    assert caught.value.code == "UNAVAILABLE"


def test_watches_count_as_streams_until_they_end(serve: Serve, connect: Connect) -> None:
    """At the ceiling one more is refused; a client that goes away makes room."""
    client = connect("user", serve(max_streams=1).address)
    job_id = _finish(client)
    first = client.watch()
    next(first)
    with pytest.raises(ClientError) as caught:
        next(client.watch())
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    first.close()
    with contextlib.closing(connect("user", client._server)) as other:
        deadline = datetime.now(UTC) + timedelta(seconds=GUARD_S)
        while datetime.now(UTC) < deadline:  # the server learns later that the client has gone
            with contextlib.suppress(ClientError):
                assert _next(other.watch()) == [("EXISTS", job_id, "FINISHED")]
                return
    pytest.fail("the watch of the client that has gone still counts")


def test_reader_that_does_not_read_delays_nobody(
    user: Client, watching: Callable[..., JobEvents]
) -> None:
    """Jobs start, end and are removed while the watch waits for its client to read."""
    events = watching(user)
    padding = ["x" * 60_000]
    ids = [_finish(user, "true", *padding) for _ in range(150)]  # 9 MB, more than gRPC takes
    for job_id in ids[:-1]:
        user.remove(job_id)
    seen: dict[str, list[str]] = {}
    while "ENDED" not in seen.get(ids[-1], []):
        for kind, job_id, _ in _next(events):
            seen.setdefault(job_id, []).append(kind)
    assert set(seen) == set(ids)
    assert all(
        kinds in (["STARTED", "ENDED"], ["STARTED", "ENDED", "REMOVED"]) for kinds in seen.values()
    )
