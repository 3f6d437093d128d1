"""The pytest plugin that runs the tests marked `kernel`.

Where this host has what they need they run as they are. Elsewhere each is replaced by a
stand-in of the same name, and the first stand-in boots two kernels (scripts/kernel-run), which
have one processor each. In each of them another pytest runs half of the tests selected,
and prints each outcome as a line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import pytest

from testkit import make_cgroup

_HERE = Path(__file__).resolve().parent
_OUTCOME = "@@outcome "  # what comes before it on the line is pytest's progress
_GUESTS = pytest.StashKey["list[_Guest]"]()
_INSTALL = "install user-mode-linux and e2fsprogs to run it in a kernel of its own"
_IN_GUEST = "JOBWORKER_IN_KERNEL" in os.environ


@pytest.hookimpl(trylast=True)  # when -k and -m have made their choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("kernel")]
    if not marked or _IN_GUEST:
        return
    problem = _why_not_here()
    if not problem:
        problem = "needs disks to write to, and this host's own are not for that"
        marked = [item for item in marked if "disk" in getattr(item, "fixturenames", ())]
    missing = not shutil.which("linux.uml")
    for item in marked:
        items.remove(item)
        parent = item.parent or item.session
        # Last, so that what the kernel does disturbs no other test.
        items.append(
            _Unavailable.from_parent(parent, of=item, reason=f"{problem}; {_INSTALL}")
            if missing
            else _StandIn.from_parent(parent, of=item)
        )
    tests = [item.nodeid for item in marked]
    config.stash[_GUESTS] = [_Guest(half) for half in (tests[::2], tests[1::2]) if half]


def pytest_unconfigure(config: pytest.Config) -> None:
    for guest in config.stash.get(_GUESTS, []):
        guest.close()


def pytest_configure(config: pytest.Config) -> None:
    if _IN_GUEST:
        config.pluginmanager.register(_OutcomePrinter(config))


def _why_not_here() -> str:
    """Say why a kernel test cannot run on this host; "" if it can."""
    try:
        make_cgroup().rmdir()
    except (OSError, ValueError) as error:
        return f"needs cgroup v2 with cpu, io, memory and pids controllers, and root ({error})"
    return ""


class _OutcomePrinter:
    """In the guest: tells the outcomes to the pytest outside."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        text = report.longreprtext
        if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
            text = report.longrepr[2].removeprefix("Skipped: ")
        for title, content in report.sections:
            text += f"\n--- {title} ---\n{content}"
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        fields = {"test": report.nodeid, "when": report.when, "outcome": report.outcome}
        terminal.write_line(_OUTCOME + json.dumps(fields | {"text": text}))


class _Guest:
    """A kernel in which `tests` run, once it is booted."""

    def __init__(self, tests: list[str]) -> None:
        self.tests = tests
        self._process: subprocess.Popen[str] | None = None
        self._console: deque[str] = deque(maxlen=100)
        self._outcomes: defaultdict[str, list[dict[str, str]]] = defaultdict(list)

    def boot(self) -> None:
        """Boot it and let the tests begin, unless they have."""
        if self._process is None:
            self._process = subprocess.Popen(
                [
                    *(str(_HERE / "scripts/kernel-run"), sys.executable, "-m", "pytest"),
                    *("-p", "no:cacheprovider", "--color=no"),
                    # A hang ends all tests after it, and on a busy machine much is slow in there.
                    *("-o", "faulthandler_timeout=600", *self.tests),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )

    def outcomes(self, test: str) -> list[dict[str, str]]:
        """Block until the test has run; return how set-up, call and tear-down ended.

        Not all of them if the kernel, or its pytest, ended before that.
        """
        outcomes = self._outcomes[test]
        while (
            self._process
            and self._process.stdout
            and not (outcomes and outcomes[-1]["when"] == "teardown")
        ):
            line = self._process.stdout.readline()
            if not line:
                break
            printed, is_outcome, fields = line.partition(_OUTCOME)
            if is_outcome:
                outcome = json.loads(fields)
                self._outcomes[outcome["test"]].append(outcome)
            else:
                self._console.append(printed)
        return outcomes

    def console(self) -> str:
        """What was printed last, besides outcomes; told once."""
        text = "".join(self._console)
        self._console.clear()
        return text or "(no more than told above)"

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate()


class _GuestError(Exception):
    """A test failed in the guest; the message is all there is to show."""


class _Placeholder(pytest.Item):
    """Stands where the test `of` was, with its name and place; its marks count in the guest."""

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
    """Passes, fails or is skipped as the test is in the guest."""

    def runtest(self) -> None:
        guests = self.config.stash[_GUESTS]
        for guest in guests:
            guest.boot()
        guest = next(each for each in guests if self.nodeid in each.tests)
        outcomes = guest.outcomes(self.nodeid)
        if failures := [each["text"] for each in outcomes if each["outcome"] == "failed"]:
            raise _GuestError("\n".join(failures))
        for each in outcomes:
            if each["outcome"] == "skipped":
                pytest.skip(each["text"])
        if "call" not in [each["when"] for each in outcomes]:
            raise _GuestError(f"the kernel did not report this test; it said:\n{guest.console()}")


class _Unavailable(_Placeholder):
    """Is skipped, or fails where JOBWORKER_REQUIRE_KERNEL=1 says that it must run."""

    def __init__(self, *, reason: str, **rest: Any) -> None:
        super().__init__(**rest)
        self._reason = reason

    def runtest(self) -> None:
        if os.environ.get("JOBWORKER_REQUIRE_KERNEL") == "1":
            raise _GuestError(f"JOBWORKER_REQUIRE_KERNEL=1, but this test {self._reason}")
        pytest.skip(self._reason)
