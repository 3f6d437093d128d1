"""Tests of removals that take long: nobody else waits for them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from removals import Removals
from testkit import GUARD_S

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Slow:
    """A removal that is under way until `end`. Attribute: `removals`, those it belongs to."""

    def __init__(self) -> None:
        self.removals = Removals()
        self._begun, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self.removals.make, args=(self._take_long,))
        self._thread.start()
        assert self._begun.wait(GUARD_S)

    def _take_long(self) -> None:
        self._begun.set()
        self._ended.wait(GUARD_S)

    def end(self) -> None:
        self._ended.set()
        self._thread.join(GUARD_S)


@pytest.fixture
def slow() -> Iterator[_Slow]:
    """A removal that is under way until the test ends it."""
    slow = _Slow()
    yield slow
    slow.end()


def test_removal_is_made_at_once_if_there_is_no_other() -> None:
    """Its result is returned, and its error is raised."""
    removals = Removals()
    assert removals.make(lambda: "gone") == "gone"
    with pytest.raises(ZeroDivisionError):
        removals.make(lambda: 1 // 0)
    assert removals.make(lambda: True)


def test_removal_does_not_wait_long_for_another(slow: _Slow) -> None:
    """`make` gives up and returns None."""
    assert slow.removals.make(lambda: True) is None


def test_removal_is_made_later_in_a_thread(slow: _Slow, caplog: pytest.LogCaptureFixture) -> None:
    """It waits for its turn, and its error is in the log."""
    made = threading.Semaphore(0)

    def fail() -> None:
        made.release()
        raise OSError("it is busy")

    slow.removals.make_later(made.release)
    slow.removals.make_later(fail)
    threads = [each for each in threading.enumerate() if each.name == "removal"]
    assert len(threads) == 2
    assert not made.acquire(blocking=False)
    slow.end()
    slow.removals.close()
    assert not any(thread.is_alive() for thread in threads)
    assert made.acquire(blocking=False)
    assert made.acquire(blocking=False)
    assert "stays until the next worker: it is busy" in caplog.text


def test_close_waits_for_no_thread_that_is_not_started_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not; the removal is made nevertheless."""
    removals, made, start = Removals(), threading.Event(), threading.Thread.start

    def close_first(thread: threading.Thread) -> None:
        removals.close()
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", close_first)
        removals.make_later(made.set)
    assert made.wait(GUARD_S)
    removals.close()


def test_close_does_not_wait_for_ever(slow: _Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """The removal goes on without it."""
    monkeypatch.setattr("removals._JOIN_S", 0.01)
    made = threading.Event()
    slow.removals.make_later(made.set)
    slow.removals.close()
    assert not made.is_set()
    slow.end()
    assert made.wait(GUARD_S)
