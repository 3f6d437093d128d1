"""The pytest plugin that fails a test if the test takes too long; the other tests go on.

Set-up, call and tear-down of a test may each take `time_limit_s` (pyproject.toml). After that
time SIGALRM interrupts the main thread. The plugin writes the stacks of all threads to the test's
stderr, and the test fails. pytest tears down the fixtures as usual, and thus ends servers. If no
signal can interrupt the main thread, `faulthandler_timeout` ends the whole run instead.

The plugin uses SIGALRM and the only ITIMER_REAL of the process. Tests cannot use them.
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
    # A test that waits for a guest has a limit of its own; see kernel_plugin.py.
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
