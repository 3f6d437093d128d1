"""Tests of the host check: the program on this host, and the text of each finding."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hostcheck
from hostcheck import Finding, check
from testkit import GUARD_S, run_server, without_cgroup_name
from worker import CgroupError, CommandNotFoundError, Worker

_HERE = Path(__file__).resolve().parent
_ITEMS = ["cgroup v2", "kill", "cpu", "memory", "io", "pids"]
_LINE = re.compile(r"(ok      |FAILED  )([a-z0-9 ]+): ([^;\n]+)(?:; (.+))?")


def test_finding_is_one_line_with_its_remedy() -> None:
    """A working limit says what was proved; a failed one says what to do."""
    assert str(Finding("cpu", works=True, detail="held back")) == "ok      cpu: held back"
    finding = Finding("cpu", works=False, detail="is missing", remedy="get one")
    assert str(finding) == "FAILED  cpu: is missing; get one"


def test_check_has_a_line_for_each_item_and_exits_0_only_if_all_are_well() -> None:
    """Each failure has a remedy. Stderr does not repeat it."""
    result = run_server("check")
    lines = [_LINE.fullmatch(line) for line in result.stdout.splitlines()]
    found = [(line[2], line[1].strip(), line[4]) for line in lines if line]
    assert len(found) == len(lines)
    assert [what for what, _, _ in found] in (_ITEMS, _ITEMS[:1])
    for _, state, remedy in found:
        assert (state == "FAILED") == bool(remedy)
    works = len(found) == len(_ITEMS) and all(state == "ok" for _, state, _ in found)
    assert (result.returncode, result.stderr) == (0 if works else 1, "")


@pytest.mark.parametrize("place", ["ordinary", "absent"])
@pytest.mark.parametrize("after", [True, False])
def test_root_that_is_no_cgroup_fails_the_check(tmp_path: Path, place: str, after: bool) -> None:
    """One line names it. The option may stand before or after `check`."""
    root = tmp_path / place
    (tmp_path / "ordinary").mkdir()
    program = [sys.executable, str(_HERE / "server.py")]
    option = ["--cgroup-root", str(root)]
    words = [*program, "check", *option] if after else [*program, *option, "check"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=GUARD_S, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert re.fullmatch(
        rf"FAILED  cgroup v2: {root} is not a cgroup v2 directory; [^\n]+\n", result.stdout
    )
    assert list((tmp_path / "ordinary").iterdir()) == []


def test_check_says_what_require_would_say() -> None:
    """`--limits require` works if and only if all findings work. Its error is one of theirs."""
    failed = [f"{finding.detail}; {finding.remedy}" for finding in check() if not finding.works]
    if not failed:
        Worker(enforcement="require").close()
        return
    with pytest.raises(CgroupError) as caught:
        Worker(enforcement="require")
    assert without_cgroup_name(str(caught.value)) in map(without_cgroup_name, failed)


def test_check_leaves_nothing_and_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It leaves no cgroup, moves this process back, and restores the log."""
    before = Path("/proc/self/cgroup").read_text()
    check()
    assert Path("/proc/self/cgroup").read_text() == before
    assert caplog.messages == []
    assert hostcheck._hold_back not in logging.getLogger("cgroups").filters


# --- a setting that the kernel takes and does not act on ----------------------------------------


def _seen(_: Worker) -> str:
    return "nothing happened"


def _missing(_: Worker) -> str:
    raise CommandNotFoundError("probe", "no such file")


def _broken(_: Worker) -> str:
    raise PermissionError(13, "Permission denied", "/x/io.max")


@pytest.mark.parametrize(
    ("test", "seen"),
    [(_seen, "nothing happened"), (_missing, "no such file"), (_broken, "/x/io.max")],
)
def test_probe_that_does_not_feel_its_limit_fails(test: object, seen: str) -> None:
    """So does a test that cannot run. The finding has the statement and the observation."""
    with Worker(enforcement="off") as worker:
        finding = hostcheck._prove("cpu", "it is held back", test, worker)  # type: ignore[arg-type]
    assert (finding.what, finding.works) == ("cpu", False)
    assert finding.detail.startswith("the test failed (it is held back): ")
    assert seen in finding.detail
    assert finding.remedy


@pytest.mark.parametrize("what", ["cpu", "memory", "io", "pids"])
def test_probe_finds_out_when_nothing_is_enforced(what: str) -> None:
    """Without cgroups each of the four tests fails."""
    claim, test = hostcheck._TESTS[what]
    with Worker(enforcement="off") as worker:
        finding = hostcheck._prove(what, claim, test, worker)
        assert [job.status.name for job in worker.list() if job.status.name == "RUNNING"] == []
    assert not finding.works


def test_probe_that_fails_makes_the_check_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The behaviour of the test job counts."""
    monkeypatch.setitem(hostcheck._TESTS, "kill", ("it is stopped", _seen))
    findings = check()
    if not findings[0].works:
        pytest.skip(f"this host has no usable cgroup v2 hierarchy: {findings[0].detail}")
    assert str(findings[1]).startswith("FAILED  kill: the test failed (it is stopped): nothing")
