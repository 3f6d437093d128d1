"""Tests of how the lines of the server's log look. A pipe stands for the journal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testkit import GUARD_S

_HERE = Path(__file__).resolve().parent
_LOG = """
import logging, serverlog, sys
serverlog.configure(sys.argv[1], sys.argv[2])
logging.debug("fine")
logging.info("a line\\nand another")
try:
    1 / 0
except ZeroDivisionError:
    logging.exception("it failed")
logging.critical('with "quotes" and \\N{SNOWMAN}')
"""


def _logged(form: str, level: str = "info", *, stream: str = "") -> list[str]:
    """Return the lines that a process logs. `stream`: its JOURNAL_STREAM; {} stands for stderr."""
    read, write = os.pipe()
    with open(read, encoding="utf-8") as lines:
        status = os.fstat(write)
        environment = {"JOURNAL_STREAM": stream.format(f"{status.st_dev}:{status.st_ino}")}
        try:
            subprocess.run(
                [sys.executable, "-c", _LOG, form, level],
                cwd=_HERE,
                stderr=write,
                env=environment,
                timeout=GUARD_S,
                check=True,
            )
        finally:
            os.close(write)
        return lines.read().splitlines()


def test_text_has_time_and_level() -> None:
    """A line begins with the local time, and the level in words."""
    lines = _logged("text")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO a line", lines[0])
    assert lines[1] == "and another"
    assert "ZeroDivisionError: division by zero" in lines


def test_journal_gets_priorities_and_no_second_time() -> None:
    """Each line has its priority, also those of a traceback."""
    lines = _logged("text", stream="{}")
    assert lines[:3] == ["<6>a line", "<6>and another", "<3>it failed"]
    assert all(line.startswith("<3>") for line in lines[2:-1])
    assert lines[-1].startswith('<2>with "quotes"')


def test_stderr_that_is_not_the_journal_gets_no_priorities() -> None:
    """JOURNAL_STREAM names another file when the unit's stderr was redirected."""
    assert not _logged("text", stream="1:{}")[0].startswith("<")


def test_json_is_one_object_in_a_line() -> None:
    """Also in the journal, whose other lines need no parser. Text of several lines is one field."""
    for stream in "", "{}":
        first, failed, last = map(json.loads, _logged("json", stream=stream))
        assert (first["level"], first["message"]) == ("info", "a line\nand another")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
        assert "ZeroDivisionError" in failed["exception"]
        assert last["message"] == 'with "quotes" and ☃'


@pytest.mark.parametrize(
    ("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("critical", 1)]
)
def test_level_leaves_less_important_lines_out(level: str, count: int) -> None:
    assert len(_logged("json", level)) == count
