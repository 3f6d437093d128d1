"""Tests of the time limit of tests: time_limit_plugin.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from testkit import GUARD_S

_HERE = Path(__file__).resolve().parent
_TESTS = """
import threading
import pytest

never = threading.Event()

@pytest.fixture
def server():
    yield
    print("the fixture was torn down")

@pytest.fixture
def endless_setup():
    never.wait()

@pytest.fixture
def endless_teardown():
    yield
    never.wait()

def test_call(server):
    try:
        never.wait()
    except Exception:
        pass

def test_setup(endless_setup): pass
def test_teardown(endless_teardown): pass
def test_after_them(): pass
"""


def test_test_over_its_time_fails_alone(tmp_path: Path) -> None:
    """In its set-up, call or tear-down; its fixtures are torn down, and the other tests run."""
    tmp_path.joinpath("test_endless.py").write_text(_TESTS)
    tmp_path.joinpath("pytest.ini").write_text("[pytest]\ntime_limit_s = 0.2\n")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "time_limit_plugin", "-p", "no:cacheprovider"),
            *("-rA", "--color=no", "--tb=short", "."),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(_HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert result.returncode == 1, result.stdout
    summary = [line for line in result.stdout.splitlines() if "test_endless.py::" in line]
    outcomes = {
        tuple(line.removeprefix(".").split(" - ")[0].split()[:2])
        for line in summary
        if line.startswith(("PASSED", "FAILED", "ERROR"))
    }
    assert outcomes == {
        ("FAILED", "test_endless.py::test_call"),
        ("ERROR", "test_endless.py::test_setup"),
        ("PASSED", "test_endless.py::test_teardown"),
        ("ERROR", "test_endless.py::test_teardown"),
        ("PASSED", "test_endless.py::test_after_them"),
    }
    assert result.stdout.count("not over after 0.2 s") >= len(
        {name for outcome, name in outcomes if outcome != "PASSED"}
    )
    assert "the fixture was torn down" in result.stdout
    assert "most recent call first" in result.stdout  # the stacks
