"""The pytest plugin for tests marked `kernel`. These tests need a real cgroup v2.

If the host has a cgroup v2 with all controllers, the tests run on the host like any other test.
Otherwise the plugin replaces each test by a stand-in of the same name, and boots two kernels with
one processor each (scripts/kernel-run), the guests. They run beside the tests of the host, which
have precedence. In each guest another pytest runs half of the tests. That pytest loads this
plugin too, and there the plugin prints the outcome of each test as a line of JSON. A thread of the
host reads the lines of a guest. A stand-in waits for the line of its test, and then passes, fails
or is skipped like the test.

If the program that boots a kernel is missing, the tests are skipped; so they are in a worker of
pytest-xdist (`-n`). With JOBWORKER_REQUIRE_KERNEL=1 in the environment they fail instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import pytest

from testkit import make_cgroup

_HERE = Path(__file__).resolve().parent
_OUTCOME = "@@outcome "  # precedes the JSON; pytest's dots may precede this mark on the line
_GUEST_LIMIT_S = 600  # for one test in a guest: a guest is slow, and slower on a busy host
_GUESTS = pytest.StashKey["list[_Guest]"]()
_INSTALL = "install user-mode-linux and e2fsprogs to run it in a kernel of its own"
_IN_GUEST = "JOBWORKER_IN_KERNEL" in os.environ


@pytest.hookimpl(trylast=True)  # after -k and -m have chosen the tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("kernel")]
    if not marked or _IN_GUEST:
        return
    problem = _why_not_here()
    if not problem:
        problem = "needs a disk to write to, which only a guest has"
        marked = [item for item in marked if "disk" in getattr(item, "fixturenames", ())]
    # Each worker of xdist would boot kernels of its own for all tests.
    remedy = "run it without -n" if hasattr(config, "workerinput") else ""
    if not shutil.which("linux.uml"):
        remedy = _INSTALL
    for item in marked:
        items.remove(item)
        parent = item.parent or item.session
        # Placeholders come last: by then the guests have run most of the tests.
        items.append(
            _Unavailable.from_parent(parent, of=item, reason=f"{problem}; {remedy}")
            if remedy
            else _StandIn.from_parent(parent, of=item)
        )
    if remedy:
        return
    # In turn: so the tests that take long, which are in a few modules, are in both guests.
    tests = [item.nodeid for item in marked]
    cpus = sorted(os.sched_getaffinity(0))
    config.stash[_GUESTS] = [
        _Guest(half, cpu=cpu)
        for half, cpu in zip((tests[::2], tests[1::2]), (cpus[0], cpus[-1]), strict=True)
        if half
    ]


def pytest_runtestloop(session: pytest.Session) -> None:
    if not (session.config.option.collectonly or session.testsfailed):
        for guest in session.config.stash.get(_GUESTS, []):
            guest.boot()


def pytest_unconfigure(config: pytest.Config) -> None:
    for guest in config.stash.get(_GUESTS, []):
        guest.close()


def pytest_configure(config: pytest.Config) -> None:
    if _IN_GUEST:
        config.pluginmanager.register(_OutcomePrinter(config))


def _why_not_here() -> str:
    """Return why kernel tests cannot run on this host; "" if they can."""
    try:
        make_cgroup().rmdir()
    except (OSError, ValueError) as error:
        return f"needs cgroup v2 with cpu, io, memory and pids controllers, and root ({error})"
    return ""


class _OutcomePrinter:
    """Prints, in a guest, the outcome of each test. The pytest on the host reads the lines."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        text = report.longreprtext
        if isinstance(report.longrepr, tuple):  # a skip: (file, line, reason)
            text = report.longrepr[2].removeprefix("Skipped: ")
        for title, content in report.sections:
            text += f"\n--- {title} ---\n{content}"
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        fields = {"test": report.nodeid, "when": report.when, "outcome": report.outcome}
        terminal.write_line(_OUTCOME + json.dumps(fields | {"text": text}))


class _Guest:
    """A kernel in which a pytest runs `tests` (node IDs), on one processor of the host."""

    def __init__(self, tests: list[str], *, cpu: int) -> None:
        self.tests = tests
        self._cpu = cpu
        self._process: subprocess.Popen[str] | None = None
        # Ends with the guest's output. Without it the guest would wait until a stand-in reads.
        self._reader = threading.Thread(target=self._read, name="guest", daemon=True)
        # Guards what follows. Notified of each outcome, and of the end.
        self._changed = threading.Condition()
        self._console: deque[str] = deque(maxlen=100)
        self._outcomes: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        self._has_ended = False

    def boot(self) -> None:
        """Boot the kernel and begin the tests."""
        self._process = subprocess.Popen(
            [
                *("nice", "-n", "10"),  # the tests of the host measure times
                # At each system call of a guest's process the host switches between two processes.
                # On one processor that takes less time.
                *("taskset", "-c", str(self._cpu)),
                *(str(_HERE / "scripts/kernel-run"), sys.executable, "-m", "pytest"),
                *("-p", "no:cacheprovider", "--color=no"),
                *("-o", f"time_limit_s={_GUEST_LIMIT_S}", *self.tests),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader.start()

    def _read(self) -> None:
        assert self._process
        assert self._process.stdout
        for line in self._process.stdout:
            printed, is_outcome, fields = line.partition(_OUTCOME)
            with self._changed:
                if is_outcome:
                    outcome = json.loads(fields)
                    self._outcomes[outcome["test"]].append(outcome)
                    self._changed.notify_all()
                else:
                    self._console.append(printed)
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def outcomes(self, test: str) -> list[dict[str, str]]:
        """Block until the test has run; return the outcomes of its set-up, call and tear-down.

        If the kernel or its pytest ended too early, some outcomes are missing.
        """
        with self._changed:
            outcomes = self._outcomes[test]
            self._changed.wait_for(
                lambda: self._has_ended or (outcomes and outcomes[-1]["when"] == "teardown")
            )
            return outcomes

    def console(self) -> str:
        """Return what the guest printed since the last call: 100 lines at most, no outcomes."""
        with self._changed:
            text = "".join(self._console)
            self._console.clear()
        return text or "(nothing since the failure above)"

    def close(self) -> None:
        """End the kernel if it was booted. Its tests get no more outcomes."""
        if self._process:
            self._process.terminate()
            self._process.wait()
            self._reader.join()


class _GuestError(Exception):
    """A test failed in a guest. The message is the report; no traceback of the host is shown."""


class _Placeholder(pytest.Item):
    """Stands in the list of tests for `of`, with its name. The marks of `of` act in the guest."""

    def __init__(self, *, of: pytest.Item, **rest: Any) -> None:
        super().__init__(name=of.name, **rest)
        self._of = of

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        return self._of.reportinfo()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *_: Any) -> Any:
        if isinstance(excinfo.value, _GuestError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)


class _StandIn(_Placeholder):
    """Passes, fails or is skipped like the same test in the guest."""

    # Longer than the limit in the guest, which normally acts first. This limit is for a guest that
    # no longer runs.
    time_limit_s = 1.2 * _GUEST_LIMIT_S

    def runtest(self) -> None:
        guest = next(each for each in self.config.stash[_GUESTS] if self.nodeid in each.tests)
        try:
            outcomes = guest.outcomes(self.nodeid)
        except pytest.fail.Exception:  # the time limit: the guest's other tests need not wait too
            guest.close()
            raise
        if failures := [each["text"] for each in outcomes if each["outcome"] == "failed"]:
            raise _GuestError("\n".join(failures))
        for each in outcomes:
            if each["outcome"] == "skipped":
                pytest.skip(each["text"])
        if "call" not in [each["when"] for each in outcomes]:
            raise _GuestError(f"the guest did not report this test; it printed:\n{guest.console()}")


class _Unavailable(_Placeholder):
    """Is skipped, or fails if JOBWORKER_REQUIRE_KERNEL=1."""

    def __init__(self, *, reason: str, **rest: Any) -> None:
        super().__init__(**rest)
        self._reason = reason

    def runtest(self) -> None:
        if os.environ.get("JOBWORKER_REQUIRE_KERNEL") == "1":
            raise _GuestError(f"JOBWORKER_REQUIRE_KERNEL=1, but this test {self._reason}")
        pytest.skip(self._reason)
