"""The pytest plugin that fails a test which takes too long, and lets the other tests go on.

Set-up, call and tear-down of a test may each take `time_limit_s` (pyproject.toml). When one
takes longer, SIGALRM interrupts the main thread: the stacks of all threads go to the test's
stderr and the test fails. Its fixtures are then torn down as usual, so no server is left.
Only a main thread that no signal interrupts needs `faulthandler_timeout`, which ends the run.

This uses the process's only ITIMER_REAL and its SIGALRM, so tests cannot use them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("time_limit_s", "how long a test, and its set-up, may take", default="120")


@contextlib.contextmanager
def _limited(item: pytest.Item) -> Iterator[None]:
    # A test that waits for a pytest elsewhere has a limit of its own: see kernel_plugin.py.
    limit_s = float(getattr(item, "time_limit_s", item.config.getini("time_limit_s")))

    def fail(*_: object) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        pytest.fail(f"not over after {limit_s:g} s; stderr has the stacks of all threads")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    with _limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    with _limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    with _limited(item):
        return (yield)
