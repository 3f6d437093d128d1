"""Tests of the programs in examples/, each run as its docstring says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from testkit import GUARD_S, LIBRARY

if TYPE_CHECKING:
    from testkit import ClientProgram

_HERE = Path(__file__).resolve().parent


def _run(
    name: str, *arguments: str, directory: Path = _HERE, env: dict[str, str] | None = None
) -> tuple[int, str, str]:
    result = subprocess.run(
        [sys.executable, str(_HERE / "examples" / name), *arguments],
        cwd=directory,
        env=(os.environ if env is None else env) | {"PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


def test_program_that_embeds_a_worker(tmp_path: Path) -> None:
    """Beside a copy of the library, and nothing else of this project."""
    for module in LIBRARY:
        (tmp_path / f"{module}.py").write_bytes((_HERE / f"{module}.py").read_bytes())
    commands = ["sleep 0.1; echo slow", "echo quick; exit 3", "kill -9 $$"]
    status, stdout, _ = _run("parallel.py", *commands, directory=tmp_path)
    assert status == 2
    assert stdout == (
        "sleep 0.1; echo slow: exit code 0\nslow\n"
        "echo quick; exit 3: exit code 3\nquick\n"
        "kill -9 $$: killed by signal 9\n"
    )


def test_example_of_the_library_is_short() -> None:
    """Embedding a `Worker` takes some 20 lines."""
    text = (_HERE / "examples" / "parallel.py").read_text()
    lines = text.partition('"""\n\n')[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 21


def test_program_that_uses_the_client(cli: ClientProgram, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text('echo "hello $1"; exit 7\n')
    status, stdout, stderr = _run("remote_script.py", str(script), "you", env=cli.environment)
    assert (status, stdout, stderr) == (7, "hello you\n", "")
    cli.environment["JOBWORKER_TOKEN"] = "wrong"
    status, _, stderr = _run("remote_script.py", str(script), "you", env=cli.environment)
    assert status == 1
    assert stderr.startswith("remote_script: ")
