"""Tests of login throttling. The clock is set by hand, so no test depends on speed."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

import pytest

from store import Store
from testkit import GUARD_S, Clock
from throttle import _BY_USER, LoginThrottle, TooManyLoginsError, _Failed, _key

if TYPE_CHECKING:
    from pathlib import Path

_FORGET_AFTER_S = 900
_MAX_ENTRIES = 10_000


@pytest.fixture
def throttle(clock: Clock) -> LoginThrottle:
    return LoginThrottle(clock=clock)


def _log_in(throttle: LoginThrottle, user: str, peer: str, *, succeeded: bool) -> None:
    with throttle.attempt(user, peer) as attempt:
        attempt.succeeded = succeeded


def _fail(throttle: LoginThrottle, user: str, peer: str, times: int = 1) -> None:
    for _ in range(times):
        _log_in(throttle, user, peer, succeeded=False)


def _refusal(throttle: LoginThrottle, user: str, peer: str) -> TooManyLoginsError | None:
    """Return the reason why an attempt would be refused now, or None. Counts nothing."""
    try:
        with throttle.attempt(user, peer):
            return None
    except TooManyLoginsError as error:
        return error


def _wait_s(throttle: LoginThrottle, user: str, peer: str) -> int:
    """Return the seconds that an attempt would have to wait now. Counts nothing."""
    refusal = _refusal(throttle, user, peer)
    return refusal.retry_after_s if refusal else 0


def _fail_and_wait(throttle: LoginThrottle, clock: Clock, user: str, peer: str) -> int:
    """Fail, then wait as long as required; return the wait in seconds."""
    _fail(throttle, user, peer)
    wait_s = _wait_s(throttle, user, peer)
    clock.now += wait_s
    return wait_s


# --- one user from one peer -------------------------------------------------------------


def test_failures_of_a_pair_wait_longer_every_time_up_to_a_minute(
    throttle: LoginThrottle, clock: Clock
) -> None:
    """Three attempts are free; the waits before the next ones double up to 60 s."""
    waits = [_fail_and_wait(throttle, clock, "alice", "p") for _ in range(10)]
    assert waits == [0, 0, 2, 4, 8, 16, 32, 60, 60, 60]


def test_attempt_is_checked_when_the_wait_is_over_and_not_before(
    throttle: LoginThrottle, clock: Clock
) -> None:
    """The retry time is the rest of the wait, rounded up, so an attempt after it is checked."""
    _fail(throttle, "alice", "p", 3)
    left = []
    for elapsed in (0, 0.25, 0.75, 0.999):  # after the one before it
        clock.now += elapsed
        left.append(_wait_s(throttle, "alice", "p"))
    assert left == [2, 2, 1, 1]
    clock.now = 12345 + 2
    assert _wait_s(throttle, "alice", "p") == 0


def test_refused_attempt_is_not_checked_and_extends_nothing(
    throttle: LoginThrottle, clock: Clock
) -> None:
    """Attempts during the wait do not change its end."""
    _fail(throttle, "alice", "p", 3)
    for _ in range(50):
        with pytest.raises(TooManyLoginsError), throttle.attempt("alice", "p"):
            pytest.fail("the password would be checked")
    clock.now += 2
    _fail(throttle, "alice", "p")
    assert _wait_s(throttle, "alice", "p") == 4


def test_wait_counts_from_the_last_failure(throttle: LoginThrottle, clock: Clock) -> None:
    """The wait begins with the last failure, not with the first."""
    _fail(throttle, "alice", "p", 2)
    clock.now += 100
    _fail(throttle, "alice", "p")
    clock.now += 1.5
    assert _wait_s(throttle, "alice", "p") == 1


def test_failure_counts_from_when_it_is_found_out(throttle: LoginThrottle, clock: Clock) -> None:
    """A failure counts from the end of the check, not from its begin."""
    _fail(throttle, "alice", "p", 2)
    with throttle.attempt("alice", "p") as attempt:
        clock.now += 30
        attempt.succeeded = False
    assert _wait_s(throttle, "alice", "p") == 2


def test_pair_is_held_back_for_itself_only(throttle: LoginThrottle) -> None:
    """Another peer, another user, and other names with the same joined text are free."""
    _fail(throttle, "ab", "c", 3)
    assert _wait_s(throttle, "ab", "c") == 2
    for user, peer in (("ab", "other"), ("other", "c"), ("a", "bc"), ("abc", ""), ("c", "ab")):
        assert _wait_s(throttle, user, peer) == 0


def test_success_clears_the_pair(throttle: LoginThrottle, clock: Clock) -> None:
    """Three attempts are free again."""
    for _ in range(5):
        _fail_and_wait(throttle, clock, "alice", "p")
    _log_in(throttle, "alice", "p", succeeded=True)
    waits = [_fail_and_wait(throttle, clock, "alice", "p") for _ in range(4)]
    assert waits == [0, 0, 2, 4]


# --- one peer, any user -----------------------------------------------------------------


def test_failures_of_a_peer_with_many_users_wait_up_to_five_minutes(
    throttle: LoginThrottle, clock: Clock
) -> None:
    """Ten attempts are free. The wait applies to every user."""
    waits = []
    for number in range(20):
        _fail(throttle, f"user{number}", "p")
        waits.append(_wait_s(throttle, "a new one", "p"))
        assert _wait_s(throttle, "a new one", "other") == 0
        clock.now += waits[-1]
    assert waits == [0] * 9 + [2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]


def test_longer_one_of_two_waits_is_what_holds(throttle: LoginThrottle, clock: Clock) -> None:
    """Of the waits of the pair and of the peer; the message names the longer one."""
    for number in range(12):
        _fail_and_wait(throttle, clock, f"user{number}", "p")
    refusals = []
    for _ in range(3):
        _fail(throttle, "alice", "p")
        refusals.append(str(_refusal(throttle, "alice", "p")))
        clock.now += _wait_s(throttle, "alice", "p")
    for _ in range(5):  # of ten that are free to the peer
        _fail_and_wait(throttle, clock, "bob", "q")
    _fail(throttle, "bob", "q")
    refusals.append(str(_refusal(throttle, "bob", "q")))
    assert refusals == [
        "too many failed logins from here; try again in 16 s",
        "too many failed logins from here; try again in 32 s",
        "too many failed logins from here; try again in 64 s",
        "too many failed logins for this user from here; try again in 16 s",
    ]


def test_valid_account_does_not_wash_away_a_peers_failures(
    throttle: LoginThrottle, clock: Clock
) -> None:
    """Successes do not help a peer that tries a password with many names."""
    waits = []
    for number in range(13):
        _fail(throttle, f"user{number}", "p")
        waits.append(_wait_s(throttle, "mallory", "p"))
        clock.now += waits[-1]
        _log_in(throttle, "mallory", "p", succeeded=True)
    assert waits == [0] * 9 + [2, 4, 8, 16]


def test_success_takes_the_users_own_slips_off_the_peers_count(throttle: LoginThrottle) -> None:
    """A user who mistypes twice each time never waits; nor do others at that peer."""
    _fail(throttle, "other", "p", 2)
    for _ in range(50):
        _fail(throttle, "alice", "p", 2)
        _log_in(throttle, "alice", "p", succeeded=True)
    for number in range(7):
        _fail(throttle, f"user{number}", "p")
    assert _wait_s(throttle, "new", "p") == 0  # 2 of the other one, and 7
    _fail(throttle, "new", "p")
    assert _wait_s(throttle, "new", "p") == 2


def test_success_takes_the_peers_own_slips_off_the_users_count(throttle: LoginThrottle) -> None:
    """Typing errors before a success do not count as guessing from many peers."""
    for number in range(30):
        _fail(throttle, "alice", f"p{number}", 2)
        _log_in(throttle, "alice", f"p{number}", succeeded=True)
    _fail(throttle, "alice", "p")
    assert _wait_s(throttle, "alice", "p") == 0


# --- one user, many peers ---------------------------------------------------------------


def test_many_peers_guessing_wait_even_in_their_free_attempts(throttle: LoginThrottle) -> None:
    """After 20 failures of a user, each peer with a failure waits 2, 4, 8 ... 60 s."""
    waits = []
    for number in range(27):
        _fail(throttle, "alice", f"p{number}")
        waits.append(_wait_s(throttle, "alice", f"p{number}"))
        assert _wait_s(throttle, "alice", "p0") == waits[-1]  # for the early ones too
    assert waits == [0] * 19 + [2, 4, 8, 16, 32, 60, 60, 60]


def test_wait_after_very_many_failures_is_found_at_once() -> None:
    """The wait after a very large count is computed without huge numbers."""
    assert _BY_USER.wait_s(10**12) == 60


def test_others_failures_never_hold_back_a_peer_without_any(throttle: LoginThrottle) -> None:
    """Guesses from elsewhere never delay a peer that has not failed."""
    for number in range(500):
        _fail(throttle, "alice", f"p{number}")
        assert _wait_s(throttle, "alice", "alice's") == 0
    # Nor if there was a failure for another user there.
    _fail(throttle, "bob", "alice's")
    assert _wait_s(throttle, "alice", "alice's") == 0
    _fail(throttle, "alice", "alice's")
    assert _wait_s(throttle, "alice", "alice's") == 60


def test_others_failures_do_not_prolong_a_peers_wait(throttle: LoginThrottle, clock: Clock) -> None:
    """A typing error during an attack costs one minute, although the attack continues."""
    for number in range(30):
        _fail(throttle, "alice", f"p{number}")
    _fail(throttle, "alice", "alice's")
    for second in range(60):
        assert _wait_s(throttle, "alice", "alice's") == 60 - second
        _fail(throttle, "alice", f"q{second}")
        clock.now += 1
    _log_in(throttle, "alice", "alice's", succeeded=True)
    assert _wait_s(throttle, "alice", "alice's") == 0


def test_success_from_one_peer_does_not_free_the_others(throttle: LoginThrottle) -> None:
    """The true user logs in while others guess. The others wait as before."""
    for number in range(25):
        _fail(throttle, "alice", f"p{number}")
    _log_in(throttle, "alice", "alice's", succeeded=True)
    assert _wait_s(throttle, "alice", "p24") == 60


# --- names ------------------------------------------------------------------------------

_NAMES = ["", "alice", "no such user", "a\0b", "\ud800", "\N{SNOWMAN}", "x" * 1_000_000, "%s{}\n"]


@pytest.mark.parametrize("user", _NAMES, ids=lambda name: ascii(name)[:15])
def test_refusal_has_the_same_words_for_every_name(throttle: LoginThrottle, user: str) -> None:
    """The words do not reveal whether the user exists, and do not repeat the name."""
    _fail(throttle, user, "p", 3)
    text = "too many failed logins for this user from here; try again in 2 s"
    assert str(_refusal(throttle, user, "p")) == text
    assert _wait_s(throttle, user, "p") == 2


@pytest.mark.parametrize("peer", _NAMES, ids=lambda name: ascii(name)[:15])
def test_refusal_of_a_peer_has_the_same_words_for_every_name(
    throttle: LoginThrottle, peer: str
) -> None:
    """The same for a peer that failed too often."""
    for number in range(10):
        _fail(throttle, f"user{number}", peer)
    text = "too many failed logins from here; try again in 2 s"
    assert str(_refusal(throttle, "alice", peer)) == text


# --- attempts under way -----------------------------------------------------------------


def test_one_attempt_of_a_peer_at_a_time(throttle: LoginThrottle) -> None:
    """A second attempt, for any user, is refused at once until the first has ended."""
    with throttle.attempt("alice", "p"):
        for user in ("alice", "bob"):
            text = "another login from here is under way; try again in 1 s"
            assert str(_refusal(throttle, user, "p")) == text
            assert _wait_s(throttle, user, "p") == 1
        assert _wait_s(throttle, "alice", "q") == 0
    assert _wait_s(throttle, "alice", "p") == 0


def test_one_of_many_threads_of_a_peer_gets_in(throttle: LoginThrottle) -> None:
    """Of simultaneous attempts exactly one is checked; the others are refused at once."""
    assert _outcomes(throttle, ["p"] * 16).count("in") == 1
    assert _wait_s(throttle, "alice", "p") == 0


def test_eight_of_many_peers_get_in(throttle: LoginThrottle) -> None:
    """Of simultaneous attempts eight are checked. The others are refused and not counted."""
    peers = [f"p{number}" for number in range(20)]
    outcomes = _outcomes(throttle, peers)
    assert outcomes.count("in") == 8
    assert outcomes.count("too many logins at once; try again in 1 s") == 12
    assert _outcomes(throttle, peers[:8]) == ["in"] * 8


def _outcomes(throttle: LoginThrottle, peers: list[str]) -> list[str]:
    """Let one thread for each peer try at once; a checked attempt lasts until all have tried."""
    start = threading.Barrier(len(peers))
    outcomes: queue.SimpleQueue[str] = queue.SimpleQueue()
    leave = threading.Event()

    def log_in(peer: str) -> None:
        start.wait(GUARD_S)
        try:
            with throttle.attempt("alice", peer):
                outcomes.put("in")
                assert leave.wait(GUARD_S)
        except TooManyLoginsError as error:
            outcomes.put(str(error))

    with ThreadPoolExecutor(len(peers)) as pool:
        done = [pool.submit(log_in, peer) for peer in peers]
        try:
            found = [outcomes.get(timeout=GUARD_S) for _ in peers]
        finally:
            leave.set()
        for each in done:
            each.result(GUARD_S)
    return found


class _Meeting:
    """A lock for a throttle, and a meeting point inside the code that must hold it.

    The first thread that reaches it stays until another one reaches it too, or waits for the
    lock. So if the lock does not keep them apart, they do meet.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_first = threading.Semaphore(1)
        self._others = threading.Semaphore(0)

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._others.release()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def come(self) -> None:
        if self._is_first.acquire(blocking=False):
            assert self._others.acquire(timeout=GUARD_S)
        else:
            self._others.release()


@pytest.mark.parametrize(("inside", "peers"), [(0, ["p", "p"]), (7, ["p", "q"])])
def test_nobody_gets_in_between_another_ones_look_and_step(
    throttle: LoginThrottle, monkeypatch: pytest.MonkeyPatch, inside: int, peers: list[str]
) -> None:
    """Two attempts of a peer, or two for the last free one, arrive before one is admitted."""
    meeting = _Meeting()

    class Peers(set[bytes]):
        def add(self, peer: bytes) -> None:
            meeting.come()
            super().add(peer)

    with contextlib.ExitStack() as others:
        for number in range(inside):
            others.enter_context(throttle.attempt("alice", f"p{number}"))
        monkeypatch.setattr(throttle, "_lock", meeting)
        monkeypatch.setattr(throttle, "_under_way", Peers(throttle._under_way))
        assert _outcomes(throttle, peers).count("in") == 1


def test_failures_of_two_peers_at_once_are_both_counted(
    throttle: LoginThrottle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither count is lost."""
    for number in range(19):
        _fail(throttle, "alice", f"p{number}")
    meeting = _Meeting()
    look = throttle._by_user.get

    def get(key: bytes) -> _Failed:
        failed = look(key)
        meeting.come()
        return failed

    def prepare() -> None:
        monkeypatch.setattr(throttle, "_lock", meeting)
        monkeypatch.setattr(throttle._by_user, "get", get)

    both_are_in = threading.Barrier(2, action=prepare)

    def fail(peer: str) -> None:
        with throttle.attempt("alice", peer) as attempt:
            both_are_in.wait(GUARD_S)
            attempt.succeeded = False

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(fail, peer) for peer in ("p", "q")]:
            each.result(GUARD_S)
    assert _wait_s(throttle, "alice", "p") == 4  # 21 failures, of which 20 are free


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exception_before_the_password_is_checked_counts_nothing(
    throttle: LoginThrottle, kind: type[BaseException]
) -> None:
    """The exception passes unchanged. The peer may try again, and nothing is counted."""
    for _ in range(30):
        error = kind("closing")
        with pytest.raises(kind) as caught, throttle.attempt("alice", "p"):
            raise error
        assert caught.value is error
    assert _outcomes(throttle, [f"p{number}" for number in range(8)]) == ["in"] * 8
    assert _wait_s(throttle, "alice", "p") == 0


def test_exception_after_the_password_was_found_wrong_counts(throttle: LoginThrottle) -> None:
    """An exception in the block does not prevent the count."""

    def fail() -> NoReturn:
        with throttle.attempt("alice", "p") as attempt:
            attempt.succeeded = False
            raise ValueError("wrong")

    for _ in range(3):
        with pytest.raises(ValueError, match="wrong"):
            fail()
    assert _wait_s(throttle, "alice", "p") == 2


def test_attempts_without_an_outcome_count_nothing(throttle: LoginThrottle) -> None:
    """They count neither as a failure nor as a success."""
    for _ in range(30):
        assert _wait_s(throttle, "bob", "p") == 0
    _fail(throttle, "alice", "p", 2)
    assert _wait_s(throttle, "alice", "p") == 0
    _fail(throttle, "alice", "p")
    assert _wait_s(throttle, "alice", "p") == 2


# --- what is kept -----------------------------------------------------------------------


@pytest.mark.parametrize(("pause_s", "wait_s"), [(899, 4), (899.5, 4), (900, 0), (5000, 0)])
def test_pair_is_forgotten_15_minutes_after_its_last_failure(
    throttle: LoginThrottle, clock: Clock, pause_s: float, wait_s: int
) -> None:
    """The time begins again with each failure."""
    _fail(throttle, "alice", "p", 2)
    clock.now += 600
    _fail(throttle, "alice", "p")
    clock.now += pause_s
    _fail(throttle, "alice", "p")
    assert _wait_s(throttle, "alice", "p") == wait_s


@pytest.mark.parametrize(("pause_s", "wait_s"), [(899, 4), (900, 0)])
def test_peer_is_forgotten_15_minutes_after_its_last_failure(
    throttle: LoginThrottle, clock: Clock, pause_s: float, wait_s: int
) -> None:
    """A success does not change that time."""
    for number in range(10):
        _fail(throttle, f"user{number}", "p")
    clock.now += 300
    _log_in(throttle, "mallory", "p", succeeded=True)
    clock.now += pause_s - 300
    _fail(throttle, "alice", "p")
    assert _wait_s(throttle, "new", "p") == wait_s


@pytest.mark.parametrize(("pause_s", "wait_s"), [(899, 4), (900, 0)])
def test_user_is_forgotten_15_minutes_after_the_last_failure(
    throttle: LoginThrottle, clock: Clock, pause_s: float, wait_s: int
) -> None:
    """After the end of the guessing, typing errors are free again."""
    for number in range(20):
        _fail(throttle, "alice", f"p{number}")
    clock.now += pause_s
    _fail(throttle, "alice", "p")
    assert _wait_s(throttle, "alice", "p") == wait_s


def test_tables_have_a_bound_and_drop_who_failed_least_recently(
    throttle: LoginThrottle,
) -> None:
    """Of 20,000 names the later 10,000 stay in each table."""
    for number in range(2 * _MAX_ENTRIES):
        _fail(throttle, f"user{number}", f"p{number}")
    tables = (throttle._by_pair, throttle._by_peer, throttle._by_user)
    assert [len(table._failed) for table in tables] == [_MAX_ENTRIES] * 3
    # The oldest that is left, and the youngest that is not.
    for number, expected in ((_MAX_ENTRIES, 2), (_MAX_ENTRIES - 1, 0)):
        _fail(throttle, f"user{number}", f"p{number}", 2)
        assert _wait_s(throttle, f"user{number}", f"p{number}") == expected


@pytest.mark.parametrize(("others", "kept"), [(_MAX_ENTRIES - 1, True), (_MAX_ENTRIES, False)])
def test_failing_again_makes_a_pair_the_last_to_be_dropped(
    throttle: LoginThrottle, others: int, kept: bool
) -> None:
    """The last failure counts, not the first."""
    _fail(throttle, "alice", "p")
    for number in range(_MAX_ENTRIES - 1):
        _fail(throttle, f"user{number}", f"p{number}")
    _fail(throttle, "alice", "p", 2)
    for number in range(others):
        _fail(throttle, f"other{number}", f"q{number}")
    assert _wait_s(throttle, "alice", "p") == (2 if kept else 0)


@pytest.mark.parametrize(("others", "wait_s"), [(_MAX_ENTRIES - 1, 4), (_MAX_ENTRIES, 0)])
@pytest.mark.parametrize("attack", ["from one peer", "on one user"])
def test_peers_and_users_are_dropped_like_pairs(
    throttle: LoginThrottle, clock: Clock, attack: str, others: int, wait_s: int
) -> None:
    """They stay while the table has room for them."""
    from_one_peer = attack == "from one peer"
    for number in range(10 if from_one_peer else 20):
        _fail(
            throttle,
            f"user{number}" if from_one_peer else "alice",
            "p" if from_one_peer else f"p{number}",
        )
    for number in range(others):
        _fail(throttle, f"other{number}", f"q{number}")
    clock.now += 60
    _fail(throttle, "alice", "p")
    assert _wait_s(throttle, "alice", "p") == wait_s


def test_success_after_the_counts_were_dropped_takes_back_nothing(
    throttle: LoginThrottle,
) -> None:
    """Nor is it an error."""
    _fail(throttle, "alice", "p", 2)
    for number in range(_MAX_ENTRIES):
        _fail(throttle, f"user{number}", f"p{number}")
    _log_in(throttle, "alice", "p", succeeded=True)
    _fail(throttle, "alice", "p", 3)
    assert _wait_s(throttle, "alice", "p") == 2


def test_forgotten_and_cleared_entries_take_no_memory(
    throttle: LoginThrottle, clock: Clock
) -> None:
    """The tables are empty after 15 minutes without failures, and after a success."""
    tables = (throttle._by_pair, throttle._by_peer, throttle._by_user)
    for number in range(100):
        _fail(throttle, f"user{number}", f"p{number}")
    clock.now += _FORGET_AFTER_S
    _fail(throttle, "alice", "p")
    assert [len(table._failed) for table in tables] == [1, 1, 1]
    _log_in(throttle, "alice", "p", succeeded=True)
    assert [len(table._failed) for table in tables] == [0, 0, 0]


def test_long_names_take_no_more_memory_than_short_ones(throttle: LoginThrottle) -> None:
    """The attacker chooses the name, so its digest is kept."""
    tracemalloc.start()
    try:
        for number in range(50):
            _fail(throttle, f"{number}" + "x" * 1_000_000, f"{number}" + "y" * 1_000_000)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1_000_000


# --- what it is for ---------------------------------------------------------------------


def test_guesses_of_a_peer_in_a_day_are_few(throttle: LoginThrottle, clock: Clock) -> None:
    """For any number of guesses before each wait of 15 minutes."""
    per_day = []
    for in_a_row in range(1, 40):
        began = clock.now
        for number in range(in_a_row):
            clock.now += _wait_s(throttle, f"user{number}", "p")
            _fail(throttle, f"user{number}", "p")
        clock.now += _FORGET_AFTER_S
        per_day.append(in_a_row * 86400 / (clock.now - began))
    assert 1300 < max(per_day) < 1350


def test_default_clock_never_goes_back() -> None:
    """A change of the host's clock neither frees nor locks out anybody."""
    assert LoginThrottle()._clock is time.monotonic


# --- one certificate from many addresses --------------------------------------------------------


def _checked(throttle: LoginThrottle, attempts: list[tuple[str, str]]) -> int:
    """Fail with one certificate as these users from these peers; return how many were checked."""
    checked = 0
    for user, peer in attempts:
        with (
            contextlib.suppress(TooManyLoginsError),
            throttle.attempt(user, peer, "certificate") as attempt,
        ):
            attempt.succeeded = False
            checked += 1
    return checked


def test_addresses_give_one_certificate_no_more_guesses(throttle: LoginThrottle) -> None:
    """Of 50 guesses of one user's password, each from another address, 6 are checked at once."""
    assert _checked(throttle, [("alice", f"p{number}") for number in range(50)]) == 6
    with pytest.raises(TooManyLoginsError, match="for this user with your certificate"):
        _log_in_with(throttle, "alice", "another", "certificate")
    _log_in_with(throttle, "bob", "another", "certificate")
    _log_in_with(throttle, "alice", "another", "hers")


def _log_in_with(throttle: LoginThrottle, user: str, peer: str, certificate: str) -> None:
    with throttle.attempt(user, peer, certificate) as attempt:
        attempt.succeeded = True


def test_names_and_addresses_give_one_certificate_no_more_guesses(throttle: LoginThrottle) -> None:
    """Of 50 guesses with another name from another address each, 20 are checked at once."""
    assert _checked(throttle, [(f"user{number}", f"p{number}") for number in range(50)]) == 20
    with pytest.raises(TooManyLoginsError, match="failed logins with your certificate"):
        _log_in_with(throttle, "alice", "another", "certificate")
    _log_in_with(throttle, "alice", "another", "hers")


def test_waits_of_a_certificate_double(throttle: LoginThrottle, clock: Clock) -> None:
    """And a success takes this peer's failures back."""
    waits = []
    for number in range(12):
        with throttle.attempt("alice", f"p{number}", "certificate") as attempt:
            attempt.succeeded = False
        try:
            with throttle.attempt("alice", "next", "certificate"):
                waits.append(0)
        except TooManyLoginsError as error:
            waits.append(error.retry_after_s)
            clock.now += error.retry_after_s
    assert waits == [0] * 5 + [2, 4, 8, 16, 32, 60, 60]
    _log_in_with(throttle, "alice", "p11", "certificate")
    assert throttle._by_certificate.get(_key("certificate")).count == 11


def test_certificate_has_two_places_however_many_addresses(throttle: LoginThrottle) -> None:
    """So one certificate cannot take all places, and an attempt's end gives its place back."""
    for _ in range(3):
        with throttle.attempt("a", "p1", "c"), throttle.attempt("b", "p2", "c"):
            with pytest.raises(TooManyLoginsError, match="other logins with your certificate are"):
                _log_in_with(throttle, "c", "p3", "c")
            _log_in_with(throttle, "c", "p3", "another")
    assert throttle._held == {}


# --- the store ----------------------------------------------------------------------------


def test_restart_forgives_nobody(tmp_path: Path, clock: Clock) -> None:
    """The counts and the waits go on, those of a user, an address and a certificate alike."""
    with Store(tmp_path / "store") as store:
        throttle = LoginThrottle(clock=clock, store=store)
        _fail(throttle, "alice", "here", 3)
        _fail(throttle, "bob", "there")
        _log_in(throttle, "bob", "there", succeeded=True)
    with Store(tmp_path / "store") as store:
        again = LoginThrottle(clock=clock, store=store)
        assert again._by_user._failed.keys() == {_key("alice")}
        for mine, its in zip(throttle._tables().values(), again._tables().values(), strict=True):
            assert mine._failed == its._failed
        assert _wait_s(again, "alice", "here") == 2
        clock.now += _FORGET_AFTER_S
        _fail(again, "carol", "there")
        assert store.query("SELECT count(*) FROM failed_logins") == [(5,)]


def test_failure_that_cannot_be_written_counts_until_the_restart(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The login is answered as always, and the log says why a restart would forgive it."""
    store = Store()
    throttle = LoginThrottle(clock=clock, store=store)
    store.close()
    _fail(throttle, "alice", "here", 3)
    assert _wait_s(throttle, "alice", "here") == 2
    assert "is counted until the next restart only" in caplog.text
