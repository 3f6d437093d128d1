"""Tests of where threads run while they have much to do."""

from __future__ import annotations

import contextlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

import pytest

from gathering import Gathering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def gathering() -> Iterator[Gathering]:
    gathering = Gathering()
    yield gathering
    gathering.end()  # the interval is that of the whole program


def _processors_after(act: Callable[[], object]) -> set[int]:
    """Return where the thread may run after `act`."""
    act()
    return os.sched_getaffinity(0)


def test_threads_share_one_processor_until_the_end_or_until_they_leave(
    gathering: Gathering,
) -> None:
    """It is one on which this process may run. Other threads stay where they are."""
    everywhere, interval_s = os.sched_getaffinity(0), sys.getswitchinterval()
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))

        def after(act: Callable[[], object]) -> list[set[int]]:
            return [pool.submit(_processors_after, act).result() for pool in (one, other)]

        assert after(gathering.follow) == [everywhere, everywhere]
        gathering.begin()
        assert sys.getswitchinterval() < interval_s
        gathered, same = after(gathering.follow)
        assert len(gathered) == 1
        assert gathered == same
        assert gathered <= everywhere
        gathering.begin()  # again: they stay there
        assert after(gathering.follow) == [gathered, gathered]
        assert after(gathering.leave) == [everywhere, everywhere]
        assert after(gathering.follow) == [gathered, gathered]
        gathering.end()
        assert sys.getswitchinterval() == interval_s
        assert after(gathering.follow) == [everywhere, everywhere]
    assert os.sched_getaffinity(0) == everywhere


def test_thread_that_the_system_keeps_where_it_is_goes_on(
    gathering: Gathering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seccomp filter may forbid the system call; a processor may be taken away."""

    def forbid(*_: object) -> NoReturn:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", forbid)
    gathering.begin()
    gathering.follow()
    gathering.leave()
