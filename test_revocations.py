"""Tests of the record of logouts: real files, real limits of the kernel."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from revocations import RevocationError, Revocations, RunningTime
from store import Store, reading
from testkit import GUARD_S, Clock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Running times. That of a test begins with 0.
_LATER = 1000
_IDS = [str(uuid.UUID(int=number)) for number in range(40)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The directory of the store."""
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as store:
        yield store


@pytest.fixture
def kept(store: Store) -> Iterator[Revocations]:
    with Revocations(store) as revocations:
        yield revocations


def _rows(path: Path) -> list[str]:
    """Return the tokens that are in the store now."""
    with reading(path) as connection:
        return [token for (token,) in connection.execute("SELECT token_id FROM revoked ORDER BY 1")]


@contextmanager
def _full_disk(size: int) -> Iterator[None]:
    """Limit the size of all files of this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_revoked_token_is_in_the_store_when_add_returns(path: Path, kept: Revocations) -> None:
    """Another process sees it, and the token is revoked in this one."""
    assert _rows(path) == []
    kept.add(_IDS[0], _LATER)
    kept.add(_IDS[1], _LATER)
    assert _rows(path) == _IDS[:2]
    assert [token_id in kept for token_id in _IDS[:3]] == [True, True, False]


def test_revocation_survives_a_process_that_is_killed(path: Path) -> None:
    """After `add` has returned, a kill of the process changes nothing."""
    program = (
        "import os, sys\nfrom revocations import Revocations\nfrom store import Store\n"
        "revocations = Revocations(Store(sys.argv[1]))\n"
        "revocations.add(sys.argv[2], int(sys.argv[3]))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    arguments = [str(path), _IDS[0], str(_LATER)]
    ended = subprocess.run(  # -S: nothing but the standard library is needed
        [sys.executable, "-S", "-c", program, *arguments],
        cwd=os.path.dirname(__file__),
        timeout=GUARD_S,
        check=False,
    )
    assert ended.returncode == -9
    with Store(path) as store, Revocations(store) as again:
        assert _IDS[0] in again


def test_token_is_recorded_once(path: Path, store: Store, kept: Revocations) -> None:
    """A second logout changes nothing, also after a restart."""
    for _ in range(3):
        kept.add(_IDS[0], _LATER)
    with Revocations(store) as again:
        again.add(_IDS[0], _LATER)
    assert _rows(path) == _IDS[:1]


def test_all_who_log_out_at_once_are_recorded(path: Path, kept: Revocations) -> None:
    """A token that is logged out several times has one row."""
    barrier = threading.Barrier(8)

    def add(index: int) -> None:
        barrier.wait(GUARD_S)
        for token_id in (_IDS[0], *_IDS[index::8]):
            kept.add(token_id, _LATER)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert _rows(path) == _IDS
    assert all(token_id in kept for token_id in _IDS)


def test_in_memory_only_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Revocations(None)` forgets its tokens with the object."""
    monkeypatch.chdir(tmp_path)
    with Revocations(None) as revocations:
        revocations.add(_IDS[0], _LATER)
        assert _IDS[0] in revocations
    assert list(tmp_path.iterdir()) == []


# --- expiry -----------------------------------------------------------------------------


def test_what_has_ended_is_dropped_from_the_store(path: Path, clock: Clock) -> None:
    """At the next logout. A restart does not bring it back before."""
    with Store(path) as store, RunningTime(store, clock=clock) as running:
        with Revocations(store, running) as revocations:
            revocations.add(_IDS[0], 1000)
            revocations.add(_IDS[1], 3000)
        clock.now += 2000
        with Revocations(store, running) as revocations:
            assert [token_id in revocations for token_id in _IDS[:2]] == [False, True]
            revocations.add(_IDS[2], 4000)
    assert _rows(path) == _IDS[1:3]


def test_time_by_which_a_row_is_dropped_survives_a_crash(store: Store, clock: Clock) -> None:
    """Otherwise the dropped token would be valid again."""
    revocations = Revocations(store, RunningTime(store, clock=clock))
    revocations.add(_IDS[0], 1000)
    with _full_disk(0):
        revocations.add(_IDS[1], 5000)
    clock.now += 2000
    revocations.write()
    after_crash = RunningTime(store, clock=clock)
    assert store.query("SELECT token_id FROM revoked") == [(_IDS[1],)]
    assert after_crash.now_s() == 2000


def test_what_ends_meanwhile_is_dropped_from_memory(clock: Clock) -> None:
    """The next logout removes tokens that have ended by the running time from memory."""
    revocations = Revocations(None, RunningTime(clock=clock))
    revocations.add(_IDS[0], 1000)
    revocations.add(_IDS[1], 2000)
    revocations.add(_IDS[2], 500)
    clock.now += 1000
    revocations.add(_IDS[3], 3000)
    assert [token_id in revocations for token_id in _IDS[:4]] == [False, True, False, True]
    assert len(revocations._ends) == len(revocations._by_end) == 2


def test_logout_costs_the_same_however_many_there_were() -> None:
    """After 200,000 logouts, a logout takes less than 50 times as long as after none."""

    def measure(before: int) -> float:
        revocations = Revocations(None)
        for number in range(before):
            revocations.add(str(number), _LATER)
        start = time.thread_time()
        for number in range(200):
            revocations.add(f"new {number}", _LATER)
        return time.thread_time() - start

    assert measure(200_000) < 50 * measure(0)


# --- the running time -------------------------------------------------------------------


def test_running_time_goes_on_over_restarts(path: Path, clock: Clock) -> None:
    """Time in which the server does not run does not count."""
    with Store(path) as store, RunningTime(store, clock=clock) as running:
        assert running.now_s() == 0
        clock.now += 100
        assert running.now_s() == 100
    clock.now += 5000
    with Store(path) as store, RunningTime(store, clock=clock) as running:
        assert running.now_s() == 100
        clock.now += 11
        running.save()
    clock.now = 5  # the machine has booted
    with Store(path) as store:
        again = RunningTime(store, clock=clock)
        assert again.now_s() == 111
        again.close()
        again.close()


def test_running_time_knows_nothing_of_the_wall_clock(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the clock, forward or back, changes nothing."""
    with RunningTime(store) as running:
        for wall in (0.0, 1e12):
            monkeypatch.setattr(time, "time", lambda wall=wall: wall)
            assert running.now_s() < GUARD_S


def test_running_time_that_cannot_be_written_stops_nothing(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged."""
    with RunningTime(store) as running, _full_disk(0):
        running.save()
    assert "the running time cannot be written: the disk of the store" in caplog.text


# --- full disks -------------------------------------------------------------------------


def test_logout_on_a_full_disk_works_and_is_written_later(
    path: Path, kept: Revocations, caplog: pytest.LogCaptureFixture
) -> None:
    """A loud line says that a restart makes the tokens valid."""
    kept.add(_IDS[0], _LATER)
    with _full_disk(0):
        kept.add(_IDS[1], _LATER)
        kept.add(_IDS[2], _LATER)
    assert _rows(path) == _IDS[:1]
    assert [token_id in kept for token_id in _IDS[:3]] == [True] * 3
    assert [record.levelname for record in caplog.records] == ["CRITICAL"] * 2
    assert "2 LOGOUTS ARE NOT ON THE DISK: the disk of the store" in caplog.text
    kept.write()
    assert _rows(path) == _IDS[:3]
    kept.write()
    kept.add(_IDS[3], _LATER)
    assert _rows(path) == _IDS[:4]


def test_unwritten_logouts_are_tried_again_at_the_next_and_at_the_end(
    path: Path, store: Store
) -> None:
    """The store has each of them once."""
    with Revocations(store) as kept:
        with _full_disk(0):
            kept.add(_IDS[0], _LATER)
        kept.add(_IDS[1], _LATER)
        assert _rows(path) == _IDS[:2]
        with _full_disk(0):
            kept.add(_IDS[2], _LATER)
    assert _rows(path) == _IDS[:3]


def test_closed_record_takes_no_logout(store: Store) -> None:
    """A logout after `close` is an error. A second `close` is not."""
    revocations = Revocations(store)
    revocations.add(_IDS[0], _LATER)
    revocations.close()
    revocations.close()
    with pytest.raises(RevocationError):
        revocations.add(_IDS[1], _LATER)
    assert [token_id in revocations for token_id in _IDS[:2]] == [True, False]
