"""Tests of the package that `pip install .` installs: the client, as the command `job-worker`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import test_layout
import version
from testkit import GUARD_S, clean_environment

if TYPE_CHECKING:
    from testkit import ServerProgram

_HERE = Path(__file__).resolve().parent


def _pip(python: Path | str, *arguments: str | Path) -> None:
    """Run pip. Without an index of packages the test is skipped, and in CI it fails."""
    run = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        if re.search("No matching distribution|Connection|Temporary failure", run.stderr):
            reason = f"needs an index of packages: {run.stderr[-300:]}"
            if os.environ.get("JOBWORKER_REQUIRE_PROGRAMS") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
        pytest.fail(run.stderr)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made of a copy of this clone."""
    source = tmp_path_factory.mktemp("source")
    for pattern in ("*.py", "*.toml", "README.md", "deploy/*.py"):
        for path in _HERE.glob(pattern):
            target = source / path.relative_to(_HERE)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    made = tmp_path_factory.mktemp("wheel")
    _pip(sys.executable, "wheel", "--quiet", "--no-deps", "--wheel-dir", made, source)
    (path,) = made.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a fresh environment in which the wheel is installed."""
    environment = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    _pip(environment / "bin/python", "install", "--quiet", wheel)
    return environment / "bin/job-worker"


def test_package_is_the_client_and_nothing_else(wheel: Path) -> None:
    """All modules of the client, in one directory, so that no name of theirs is taken away."""
    groups = test_layout._MODULES
    modules = {*groups["client"], *groups["shared"], *test_layout._GENERATED, "main"}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {
        f"job_worker/{module}.py" for module in modules
    }
    assert wheel.name.startswith(f"job_worker-{version.VERSION}-py3-none-any")


def test_build_needs_one_package_of_one_version() -> None:
    """pip fetches it to build the wheel."""
    build = tomllib.loads((_HERE / "pyproject.toml").read_text())["build-system"]
    assert re.fullmatch(r"hatchling==[\d.]+", *build["requires"])


def test_installed_client_runs_jobs(
    installed: Path, program: ServerProgram, certs: Path, tmp_path: Path
) -> None:
    """From any directory, without the clone."""
    environment = clean_environment() | {
        "HOME": str(tmp_path),
        "JOBWORKER_SERVER": program.address,
        "JOBWORKER_CERTS": str(certs),
    }

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [installed, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert run("--version") == (0, f"job-worker {version.VERSION}\n")
    assert run("login", "-u", "user", "-p", "user")[0] == 0
    assert run("run", "--", "sh", "-c", "echo hello; exit 3") == (3, "hello\n")
    status, script = run("completion", "bash")
    assert status == 0
    assert "-F _job_worker_client job-worker\n" in script
    assert f"{installed.resolve()} completion bash" in script
