"""Tests of `quotas.py`, with real threads and a clock that the test sets."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from broadcaster import OutputIncompleteError, OutputLog
from quotas import QuotaError, Quotas
from settings import IN_ALL, JOB_OUTPUT_BYTES, PER_USER, Quota
from testkit import GUARD_S, Clock
from worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from budget import Budget

    Release = Callable[[], None]

_NONE = Quota()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(128) as pool:
        yield pool


def _together(pool: ThreadPoolExecutor, *calls: Callable[[], Any]) -> list[Any]:
    """Run all calls at the same time; return their results."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait(GUARD_S)
        return call()

    return [future.result(GUARD_S) for future in [pool.submit(run, call) for call in calls]]


def _refusal(call: Callable[[str], object], user: str) -> tuple[str, int | None]:
    with pytest.raises(QuotaError) as caught:
        call(user)
    return str(caught.value), caught.value.retry_after_s


def _admit_all(call: Callable[[str], Release], user: str, at_most: int) -> list[Release]:
    """Call until a call is refused, at most so often; return the results of the others."""
    admitted: list[Release] = []
    try:
        while len(admitted) < at_most:
            admitted.append(call(user))
    except QuotaError:
        pass
    return admitted


_JOBS_OF_ALICE = (
    "user alice has 3 running jobs, the ceiling of this server (per_user.running_jobs); "
    "stop one first"
)
_JOBS_OF_ALL = (
    "all users together have 3 running jobs, the ceiling of this server "
    "(in_all.running_jobs); try again later"
)
_STREAMS_OF_ALICE = (
    "user alice has 3 open streams, the ceiling of this server (per_user.streams); close one first"
)
_STREAMS_OF_ALL = "all 3 output streams are in use (in_all.streams); try again later"


# --- running jobs and streams -----------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "per_user", "in_all", "message"),
    [
        ("start", Quota(running_jobs=3), _NONE, _JOBS_OF_ALICE),
        ("start", _NONE, Quota(running_jobs=3), _JOBS_OF_ALL),
        ("start", Quota(running_jobs=3), Quota(running_jobs=3), _JOBS_OF_ALICE),
        ("stream", Quota(streams=3), _NONE, _STREAMS_OF_ALICE),
        ("stream", _NONE, Quota(streams=3), _STREAMS_OF_ALL),
        ("stream", Quota(streams=3), Quota(streams=3), _STREAMS_OF_ALICE),
    ],
)
def test_one_past_the_ceiling_is_refused_until_one_has_ended(
    what: str, per_user: Quota, in_all: Quota, message: str
) -> None:
    """Up to the ceiling calls are admitted; after that one more for each that has ended."""
    quotas = Quotas(per_user, in_all, None)
    call = getattr(quotas, what)
    first, _, _ = [call("alice") for _ in range(3)]
    assert _refusal(call, "alice") == (message, None)
    first()
    again = call("alice")
    assert _refusal(call, "alice") == (message, None)
    again()
    call("alice")


def test_arguments_of_running_jobs_have_a_ceiling(clock: Clock) -> None:
    """A job's arguments count until its end. A refused start takes nothing of the rate."""
    both = Quota(argv_bytes=3072), Quota(argv_bytes=4096, starts_per_second=1, start_burst=3)
    quotas = Quotas(*both, None, clock=clock)
    ended = quotas.start("alice", argv_bytes=2000)
    quotas.start("alice", argv_bytes=1000)
    for _ in range(10):
        assert _refusal(lambda user: quotas.start(user, argv_bytes=1096), "alice") == (
            (
                "with this job, the commands and arguments of the running jobs of user alice would "
                "take 4 KiB of memory; the ceiling is 3 KiB (per_user.running_argv); pass long "
                "data in a file"
            ),
            None,
        )
    message, _ = _refusal(lambda user: quotas.start(user, argv_bytes=1097), "bob")
    assert "of all users together" in message
    assert "in_all.running_argv" in message
    ended()
    quotas.start("alice", argv_bytes=2000)


@pytest.mark.parametrize("what", ["start", "stream"])
def test_without_ceilings_nothing_is_refused(what: str) -> None:
    """A ceiling of None is never reached."""
    quotas = Quotas(_NONE, _NONE, None)
    assert len(_admit_all(getattr(quotas, what), "alice", 5000)) == 5000


def test_jobs_and_streams_are_counted_separately() -> None:
    """A job does not count as a stream, nor a stream as a job."""
    quotas = Quotas(Quota(running_jobs=1, streams=1), _NONE, None)
    quotas.start("alice")
    quotas.stream("alice")
    assert "running jobs" in _refusal(quotas.start, "alice")[0]
    assert "open streams" in _refusal(quotas.stream, "alice")[0]


@pytest.mark.parametrize(("what", "field"), [("start", "running_jobs"), ("stream", "streams")])
def test_release_counts_once_however_often_it_is_called(
    pool: ThreadPoolExecutor, what: str, field: str
) -> None:
    """Many threads call one release; it takes back its own count and no other."""
    quotas = Quotas(Quota(**{field: 2}), _NONE, None)
    call = getattr(quotas, what)
    release, _ = call("alice"), call("alice")
    _together(pool, *[release] * 16)
    call("alice")
    release()
    _refusal(call, "alice")


@pytest.mark.parametrize(("what", "field"), [("start", "running_jobs"), ("stream", "streams")])
def test_refused_call_is_not_counted(what: str, field: str) -> None:
    """A refused call counts neither for the user nor for all users together."""
    quotas = Quotas(Quota(**{field: 2}), Quota(**{field: 3}), None)
    call = getattr(quotas, what)
    alices = [call("alice"), call("alice")]
    for _ in range(10):
        _refusal(call, "alice")
    bobs = call("bob")
    for _ in range(10):
        _refusal(call, "bob")  # by the ceiling of all users
    alices[0]()
    call("bob")  # bob's second: the refused calls were not counted
    bobs()
    call("alice")


@pytest.mark.parametrize(("what", "field"), [("start", "running_jobs"), ("stream", "streams")])
def test_threads_together_get_exactly_the_ceiling(
    pool: ThreadPoolExecutor, what: str, field: str
) -> None:
    """Many threads try at once; as many as the ceiling get in, and again after all have ended."""
    quotas = Quotas(Quota(**{field: 50}), Quota(**{field: 120}), None)
    call = getattr(quotas, what)
    for _ in range(3):
        admitted = _together(
            pool, *(lambda i=i: (i % 4, _admit_all(call, f"user{i % 4}", 1000)) for i in range(16))
        )
        per_user = [sum(len(got) for j, got in admitted if j == i) for i in range(4)]
        assert sum(per_user) == 120
        assert max(per_user) <= 50
        releases = [release for _, got in admitted for release in got]
        _together(pool, *releases)


@pytest.mark.parametrize(("what", "field"), [("start", "running_jobs"), ("stream", "streams")])
def test_never_more_than_the_ceiling_while_threads_come_and_go(
    pool: ThreadPoolExecutor, what: str, field: str
) -> None:
    """Semaphores as large as the ceilings never run out while threads come and go."""
    quotas = Quotas(Quota(**{field: 3}), Quota(**{field: 5}), None)
    call = getattr(quotas, what)
    of_user = {name: threading.Semaphore(count) for name, count in (("alice", 3), ("bob", 3))}
    of_all = threading.Semaphore(5)

    def churn(user: str) -> int:
        admitted = 0
        for _ in range(1000):
            try:
                release = call(user)
            except QuotaError:
                continue
            admitted += 1
            assert of_user[user].acquire(blocking=False)
            assert of_all.acquire(blocking=False)
            of_all.release()
            of_user[user].release()
            release()
        return admitted

    users = ["alice", "bob"] * 6
    assert sum(_together(pool, *(lambda user=user: churn(user) for user in users))) > 0
    assert len(_admit_all(call, "alice", 100)) == 3
    assert len(_admit_all(call, "bob", 100)) == 2


def test_release_during_a_start_does_not_deadlock(clock: Clock) -> None:
    """The same thread releases, as when the garbage collector closes an abandoned stream."""
    releases: list[Release] = []

    def collecting_clock() -> float:
        for release in releases:
            release()
        return clock()

    quotas = Quotas(Quota(running_jobs=2), _NONE, None, clock=collecting_clock)
    first = quotas.start("alice")
    releases.append(first)
    releases.append(quotas.start("alice"))  # ends the first
    quotas.start("alice")  # ends the second
    quotas.start("alice")
    _refusal(quotas.start, "alice")


# --- the rate of starts -----------------------------------------------------------------


def test_burst_then_one_start_for_each_share_of_a_second(clock: Clock) -> None:
    """A burst is admitted, then the rate; a refusal says when to try again."""
    quotas = Quotas(Quota(starts_per_second=4, start_burst=10), _NONE, None, clock=clock)
    refusal = (
        (
            "more than 4 starts per second of user alice (per_user.starts_per_second); "
            "try again in 1 s"
        ),
        1,
    )
    assert len(_admit_all(quotas.start, "alice", 100)) == 10
    assert _refusal(quotas.start, "alice") == refusal
    clock.now += 0.125
    assert _refusal(quotas.start, "alice") == refusal
    clock.now += 0.125
    quotas.start("alice")
    assert _refusal(quotas.start, "alice") == refusal
    clock.now += 1
    assert len(_admit_all(quotas.start, "alice", 100)) == 4


def test_pause_gives_the_burst_again_and_no_more(clock: Clock) -> None:
    """After a pause of any length the burst is admitted again, and no more than the burst."""
    quotas = Quotas(Quota(starts_per_second=4, start_burst=10), _NONE, None, clock=clock)
    for pause_s in (0, 2.5, 1e6):
        clock.now += pause_s
        assert len(_admit_all(quotas.start, "alice", 100)) == 10


def test_rate_counts_starts_and_not_running_jobs(clock: Clock) -> None:
    """A job that has ended still counts as a start."""
    quotas = Quotas(Quota(starts_per_second=1, start_burst=2), _NONE, None, clock=clock)
    quotas.start("alice")()
    quotas.start("alice")()
    assert _refusal(quotas.start, "alice")[1] == 1


@pytest.mark.parametrize(
    ("per_second", "passed_s", "wait_s"),
    [(0.5, 0, 2), (0.5, 0.5, 2), (0.5, 1, 1), (0.5, 1.5, 1), (0.25, 0, 4), (100, 0, 1)],
)
def test_refusal_tells_when_a_start_will_be_possible(
    clock: Clock, per_second: float, passed_s: float, wait_s: int
) -> None:
    """A refusal has the wait in whole seconds, rounded up; after the wait a start is admitted."""
    quotas = Quotas(Quota(starts_per_second=per_second, start_burst=1), _NONE, None, clock=clock)
    quotas.start("alice")
    clock.now += passed_s
    message, retry_after_s = _refusal(quotas.start, "alice")
    assert retry_after_s == wait_s
    assert message == (
        f"more than {per_second:g} starts per second of user alice "
        f"(per_user.starts_per_second); try again in {wait_s} s"
    )
    clock.now += wait_s
    quotas.start("alice")


def test_refused_starts_do_not_delay_the_next(clock: Clock) -> None:
    """Refused starts cost a user no time, and take nothing from the rate of all users."""
    quotas = Quotas(
        Quota(starts_per_second=1, start_burst=1),
        Quota(starts_per_second=1, start_burst=3),
        None,
        clock=clock,
    )
    quotas.start("alice")
    for _ in range(8):
        clock.now += 0.0625
        _refusal(quotas.start, "alice")
    clock.now += 0.5
    quotas.start("alice")
    quotas.start("bob")
    quotas.start("carol")


def test_refusal_says_that_the_rate_of_all_users_is_reached(clock: Clock) -> None:
    """A user below their own rate is told of the rate of all users; their own rate is untouched."""
    quotas = Quotas(
        Quota(starts_per_second=1, start_burst=1),
        Quota(starts_per_second=0.5, start_burst=2),
        None,
        clock=clock,
    )
    quotas.start("alice")
    quotas.start("bob")
    assert _refusal(quotas.start, "carol") == (
        (
            "more than 0.5 starts per second of all users together "
            "(in_all.starts_per_second); try again in 2 s"
        ),
        2,
    )
    clock.now += 2
    quotas.start("carol")


@pytest.mark.parametrize(
    "quota", [Quota(starts_per_second=1), Quota(start_burst=1)], ids=["rate", "burst"]
)
def test_rate_without_burst_and_burst_without_rate_are_no_ceiling(
    clock: Clock, quota: Quota
) -> None:
    """A rate alone, or a burst alone, limits nothing."""
    quotas = Quotas(quota, quota, None, clock=clock)
    assert len(_admit_all(quotas.start, "alice", 1000)) == 1000


def test_ceiling_of_jobs_and_rate_of_starts_are_independent(clock: Clock) -> None:
    """A start that one of them refuses is not counted by the other."""
    quotas = Quotas(
        Quota(running_jobs=2, starts_per_second=1, start_burst=3), _NONE, None, clock=clock
    )
    first, second = quotas.start("alice"), quotas.start("alice")
    for _ in range(10):
        assert "running jobs" in _refusal(quotas.start, "alice")[0]
    first()
    third = quotas.start("alice")  # the burst had one left
    second()
    third()
    for _ in range(10):
        assert "per second" in _refusal(quotas.start, "alice")[0]
    clock.now += 2
    assert len(_admit_all(quotas.start, "alice", 100)) == 2


def test_threads_together_start_exactly_the_burst(pool: ThreadPoolExecutor, clock: Clock) -> None:
    """While the clock stands still, threads start exactly the bursts of their user and of all."""
    quotas = Quotas(
        Quota(starts_per_second=1, start_burst=40),
        Quota(starts_per_second=1, start_burst=100),
        None,
        clock=clock,
    )
    admitted = _together(
        pool,
        *(lambda i=i: len(_admit_all(quotas.start, f"user{i % 4}", 1000)) for i in range(16)),
    )
    assert sum(admitted) == 100
    assert max(sum(admitted[i::4]) for i in range(4)) <= 40


# --- kept output ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "user", "everybody", "ceiling"),
    [
        (1024, None, None, "this job's ceiling of 1 KiB (per_job.kept_output)"),
        (None, 1024, None, "user alice's ceiling of 1 KiB (per_user.kept_output)"),
        (None, None, 1024, "the ceiling of 1 KiB for all users together (in_all.kept_output)"),
        (1024, 4096, 8192, "this job's ceiling of 1 KiB (per_job.kept_output)"),
        (4096, 1024, 8192, "user alice's ceiling of 1 KiB (per_user.kept_output)"),
        (8192, 4096, 1024, "the ceiling of 1 KiB for all users together (in_all.kept_output)"),
    ],
)
def test_error_for_output_above_a_ceiling_names_the_ceiling(
    tmp_path: Path, job: int | None, user: int | None, everybody: int | None, ceiling: str
) -> None:
    """The lowest ceiling, of the job, its owner or all users, bounds what is kept and is named."""
    quotas = Quotas(Quota(output_bytes=user), Quota(output_bytes=everybody), job)
    log = OutputLog(tmp_path / "job.out", budget=quotas.output("alice"))
    log.append(bytes(2000))
    log.complete()
    assert log.size == 1024
    with log.subscribe(offset=1024) as late, pytest.raises(OutputIncompleteError) as caught:
        list(late)
    assert str(caught.value) == f"464 bytes of output were not kept: {ceiling} is reached"
    log.remove()


def test_without_a_ceiling_all_output_is_kept(tmp_path: Path) -> None:
    """Without a ceiling all output is kept, and no start is refused for it."""
    quotas = Quotas(_NONE, _NONE, None)
    log = OutputLog(tmp_path / "job.out", budget=quotas.output("alice"))
    log.append(bytes(100_000))
    assert (log.size, log.lost_bytes) == (100_000, 0)
    quotas.check_output("alice")
    log.remove()


def test_jobs_share_what_their_owner_may_keep(tmp_path: Path) -> None:
    """A user's jobs share the user's ceiling; removing one makes room for another."""
    quotas = Quotas(Quota(output_bytes=100), _NONE, 70)
    logs = [OutputLog(tmp_path / f"{i}.out", budget=quotas.output("alice")) for i in range(3)]
    for log in logs:
        log.append(bytes(80))
    assert [log.size for log in logs] == [70, 30, 0]
    logs[0].remove()
    more = OutputLog(tmp_path / "more.out", budget=quotas.output("alice"))
    more.append(bytes(80))
    assert more.size == 70
    for log in (*logs, more):
        log.remove()


def test_check_refuses_a_user_without_a_byte_left() -> None:
    """The check names the ceiling when no byte is left, and passes when one is free again."""
    quotas = Quotas(Quota(output_bytes=1024), _NONE, None)
    quotas.check_output("alice")
    budget = quotas.output("alice")
    budget.take(1023)
    quotas.check_output("alice")
    budget.take(1)
    message = (
        "no more output can be kept: user alice's ceiling of 1 KiB (per_user.kept_output) is "
        "reached; "
        "stop or remove jobs that are no longer needed, or end their streams"
    )
    assert _refusal(quotas.check_output, "alice") == (message, None)
    quotas.check_output("bob")
    budget.give_back(1)
    quotas.check_output("alice")


def test_check_refuses_everybody_when_all_is_used_up() -> None:
    """If the ceiling of all users is used up, a user who keeps nothing is refused too."""
    quotas = Quotas(_NONE, Quota(output_bytes=2048), None)
    alices = quotas.output("alice")
    alices.take(2048)
    for user in ("alice", "bob"):
        message, _ = _refusal(quotas.check_output, user)
        assert (
            "the ceiling of 2 KiB for all users together (in_all.kept_output) is reached" in message
        )
    alices.give_back(1)
    quotas.check_output("bob")


def test_check_does_not_refuse_for_another_jobs_own_ceiling() -> None:
    """A job at its own ceiling does not keep its owner from starting another."""
    quotas = Quotas(Quota(output_bytes=100), _NONE, 10)
    assert quotas.output("alice").take(20)[0] == 10
    quotas.check_output("alice")
    assert quotas.output("alice").take(20)[0] == 10


def test_budgets_of_all_jobs_agree_when_threads_write_at_once(pool: ThreadPoolExecutor) -> None:
    """Threads take exactly the ceilings, never a byte more, and all of it can be given back."""
    quotas = Quotas(Quota(output_bytes=4000), Quota(output_bytes=10_000), 2000)

    def take_all(user: str) -> int:
        budget, taken = quotas.output(user), 0
        while size := budget.take(3)[0]:
            taken += size
        return taken

    def give_back(user: str, size: int) -> None:
        parent = quotas._users[user].output
        parent.give_back(size)

    users = [f"user{i % 4}" for i in range(16)]
    taken = _together(pool, *(lambda user=user: take_all(user) for user in users))
    assert sum(taken) == 10_000
    assert max(taken) <= 2000
    per_user = {user: sum(taken[i::4]) for i, user in enumerate(users[:4])}
    assert max(per_user.values()) <= 4000
    _together(pool, *(lambda item=item: give_back(*item) for item in per_user.items()))
    assert quotas._all.output.used == 0


# --- room for output ------------------------------------------------------------------------


class _Kept:
    """Finished jobs of several users, and the quotas that count their output."""

    def __init__(
        self, worker: Worker, user: int | None, everybody: int | None, job: int | None = None
    ) -> None:
        self._worker = worker
        self.quotas = Quotas(
            Quota(output_bytes=user),
            Quota(output_bytes=everybody),
            job,
            make_room=worker.make_room,
        )

    def add(self, user: str, *sizes: int) -> None:
        for size in sizes:
            budget = self.quotas.output(user)
            job_id = self._worker.start(
                "head", ["-c", str(size), "/dev/zero"], owner=user, budget=budget
            )
            assert self._worker.wait(job_id, GUARD_S).output_bytes == size

    def take(self, user: str, budget: Budget, size: int) -> tuple[int, str]:
        """Take bytes like a running job; return how many, and the ceiling's name if too few."""
        taken, refuser = self._worker._registry.take(user, budget, size)
        return taken, refuser.what if refuser else ""

    def sizes(self, user: str) -> list[int]:
        return [job.output_bytes for job in self._worker.list(owner=user)]


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(enforcement="off") as worker:
        yield worker


def test_finished_jobs_give_way_to_output_of_running_jobs(worker: Worker) -> None:
    """The same user's finished jobs are removed, oldest first, as many as needed; no others."""
    kept = _Kept(worker, 100, None)
    kept.add("alice", 10, 20, 30, 40)
    kept.add("bob", 50)
    budget = kept.quotas.output("alice")
    assert kept.take("alice", budget, 15) == (15, "")
    assert kept.sizes("alice") == [30, 40]
    assert kept.take("alice", budget, 15) == (15, "")
    assert kept.sizes("alice") == [30, 40]
    ceiling = "user alice's ceiling of 100 bytes (per_user.kept_output)"
    assert kept.take("alice", budget, 500) == (70, ceiling)
    assert kept.sizes("alice") == []
    assert kept.sizes("bob") == [50]


def test_running_job_writes_on_while_finished_jobs_give_way(worker: Worker) -> None:
    """All output of a job is kept although the user's ceiling was reached when it started."""
    kept = _Kept(worker, 1_000_000, None)
    kept.add("alice", 400_000, 600_000)
    kept.add("alice", 900_000)
    assert kept.sizes("alice") == [900_000]


def test_start_is_not_refused_for_output_of_finished_jobs(worker: Worker) -> None:
    """One finished job is removed for the first check; the second check finds room."""
    kept = _Kept(worker, 100, None)
    kept.add("alice", 60, 40)
    kept.quotas.check_output("alice")
    assert kept.sizes("alice") == [40]
    kept.quotas.check_output("alice")
    assert kept.sizes("alice") == [40]


def test_a_jobs_own_ceiling_removes_nothing(worker: Worker) -> None:
    """At a job's own ceiling no finished job is removed, because that would not help."""
    kept = _Kept(worker, 100, 100, 50)
    kept.add("alice", 40)
    assert kept.take("alice", kept.quotas.output("alice"), 60)[0] == 50
    assert kept.sizes("alice") == [40]


def test_user_with_most_gives_way_at_the_ceiling_of_all(worker: Worker) -> None:
    """Jobs of the user with most give way, oldest first; in the end those of the writer."""
    kept = _Kept(worker, None, 100)
    kept.add("alice", 30, 30)
    kept.add("bob", 20, 10)
    kept.add("carol", 10)
    budget = kept.quotas.output("carol")
    assert kept.take("carol", budget, 30) == (30, "")  # carol: 40
    assert (kept.sizes("alice"), kept.sizes("bob")) == ([30], [20, 10])
    assert kept.take("carol", budget, 1) == (1, "")  # alice and bob have less than carol now
    assert kept.sizes("carol") == []
    assert (kept.sizes("alice"), kept.sizes("bob")) == ([30], [20, 10])
    assert kept.take("carol", budget, 1000)[0] == 9


def test_nobody_makes_room_for_a_user_who_has_more(worker: Worker) -> None:
    """A user who fills the ceiling of all users takes nothing from a user who has less."""
    kept = _Kept(worker, None, 100)
    kept.add("bob", 20)
    taken, ceiling = kept.take("alice", kept.quotas.output("alice"), 1000)
    assert taken == 80
    assert "for all users together" in ceiling
    assert kept.sizes("bob") == [20]
    kept.quotas.check_output("carol")  # who has nothing
    assert kept.sizes("bob") == []


# --- fairness ---------------------------------------------------------------------------


def test_user_at_every_ceiling_takes_nothing_from_the_others(clock: Clock) -> None:
    """With the server's ceilings a second user still gets all that one user may have."""
    quotas = Quotas(PER_USER, IN_ALL, JOB_OUTPUT_BYTES, clock=clock)
    for user in ("mallory", "alice"):
        quotas.check_output(user)
        assert len(_admit_all(quotas.start, user, 9999)) == PER_USER.running_jobs
        assert len(_admit_all(quotas.stream, user, 9999)) == PER_USER.streams
        assert PER_USER.output_bytes is not None
        for _ in range(PER_USER.output_bytes // JOB_OUTPUT_BYTES):
            assert quotas.output(user).take(2 * JOB_OUTPUT_BYTES)[0] == JOB_OUTPUT_BYTES
        for refused in (quotas.start, quotas.stream, quotas.check_output):
            assert f"user {user}" in _refusal(refused, user)[0]


def test_user_who_starts_too_fast_does_not_slow_the_others(clock: Clock) -> None:
    """Refused starts of one user take nothing from the rate of all users."""
    quotas = Quotas(
        Quota(starts_per_second=2, start_burst=2),
        Quota(starts_per_second=4, start_burst=4),
        None,
        clock=clock,
    )
    for _ in range(50):
        assert len(_admit_all(quotas.start, "mallory", 2)) == 2
        for _ in range(20):
            _refusal(quotas.start, "mallory")
        assert len(_admit_all(quotas.start, "alice", 9)) == 2
        clock.now += 1


def test_memory_for_a_user_does_not_grow() -> None:
    """A thousand jobs and streams of one user leave one account."""
    quotas = Quotas(_NONE, _NONE, None)
    for _ in range(1000):
        quotas.start("alice")()
        quotas.stream("alice")()
        quotas.output("alice")
        quotas.check_output("alice")
    assert list(quotas._users) == ["alice"]
