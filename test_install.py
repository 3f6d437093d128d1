"""Tests of `make install` and `make uninstall`, with a directory that stands for /.

test_systemd.py runs them on a whole system, with packages from wheels and a real systemd.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import version
from testkit import GUARD_S, clean_environment

_HERE = Path(__file__).resolve().parent
_PREFIX = "/srv/jobs"


def _make(target: str, root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = {"PREFIX": _PREFIX, "DESTDIR": str(root), "PYTHON": sys.executable} | variables
    return subprocess.run(
        ["make", target, *(f"{name}={value}" for name, value in words.items())],
        cwd=_HERE,
        # Not as a part of the `make` that runs these tests.
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with an earlier version, whose packages are those of these tests."""
    program = tmp_path / "root" / _PREFIX[1:]
    (program / "requirements").mkdir(parents=True)
    shutil.copy(_HERE / "requirements/runtime.txt", program / "requirements")
    (program / ".venv").symlink_to(Path(sys.prefix))
    (program / "gone.py").touch()
    (program / "server.py").touch()
    return tmp_path / "root"


def _tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def _run(root: Path, *words: str) -> str:
    done = subprocess.run(
        [root / _PREFIX[1:] / words[0], *words[1:]],
        input="secret\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=GUARD_S,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installation_has_all_that_a_server_needs(root: Path) -> None:
    """The program, settings, certificates for the host's name, the unit and logrotate's file."""
    done = _make("install", root, HOSTS="jobs.example.org")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(
        f"installed in {_PREFIX}; the settings are in /etc/job-worker\n"
        f"users are missing: see {_PREFIX}/docs/deploy.md\n"
    )
    program, etc = root / _PREFIX[1:], root / "etc/job-worker"
    assert _run(root, "server", "--version") == f"job-worker {version.VERSION}\n"
    assert _run(root, "client", "--version") == f"job-worker {version.VERSION}\n"
    assert not (program / "gone.py").exists()  # of the earlier version
    assert not [path for path in program.glob("*.py") if re.match("test|conftest", path.name)]
    assert sorted(path.name for path in (etc / "certs").iterdir()) == [
        *("client-ca.pem", "server-key.pem", "server.pem")
    ]
    assert (etc / "ca/client-ca-key.pem").exists()  # for `server invite`
    for path, mode in {"certs": 0o700, "ca": 0o700, "certs/server-key.pem": 0o600}.items():
        assert stat.S_IMODE((etc / path).stat().st_mode) == mode
    subject = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", etc / "certs/server.pem"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "DNS:jobs.example.org" in subject.stdout
    units = root / "etc/systemd/system"
    unit, of_jobs = (
        (units / f"{name}.service").read_text() for name in ("job-worker", "job-worker-jobs")
    )
    assert f"ExecStart={_PREFIX}/server --config /etc/job-worker/server.toml" in unit
    assert f"ExecStop=-{_PREFIX}/server --config /etc/job-worker/server.toml" in of_jobs
    assert "/opt/job-worker" not in unit + of_jobs
    assert (root / "etc/logrotate.d/job-worker").read_text() == (
        _HERE / "deploy/job-worker.logrotate"
    ).read_text()


def test_files_of_the_program_can_be_changed_by_their_owner_alone(root: Path) -> None:
    """Whatever the umask is. Others may read and execute them."""
    before = os.umask(0)
    try:
        assert _make("install", root).returncode == 0
    finally:
        os.umask(before)
    program = root / _PREFIX[1:]
    for path in [program, *program.rglob("*")]:
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode in {0o755, 0o644}, path
            assert mode == 0o755 or not path.is_dir()


def test_upgrade_keeps_what_the_operator_has_made(root: Path) -> None:
    """The same command again. It needs no network, because the packages are the same."""
    assert _make("install", root, HOSTS="one.example.org").returncode == 0
    etc = root / "etc/job-worker"
    _run(root, "server", "--users", str(etc / "users"), "user", "add", "alice")
    (etc / "server.toml").write_text("[server]\n# ours\n")
    (root / "etc/logrotate.d/job-worker").write_text("# ours\n")
    before = {path: path.read_bytes() for path in etc.rglob("*") if path.is_file()}
    tree = _tree(root)
    done = _make("install", root, HOSTS="two.example.org")
    assert (done.returncode, "missing" in done.stdout) == (0, False), done.stderr
    assert {path: path.read_bytes() for path in etc.rglob("*") if path.is_file()} == before
    assert (root / "etc/logrotate.d/job-worker").read_text() == "# ours\n"
    assert _tree(root) == tree  # nothing of the upgrade is left


def test_settings_that_are_installed_are_accepted(root: Path) -> None:
    """`config` reads them. Only the paths are those of a host."""
    assert _make("install", root).returncode == 0
    shown = _run(root, "server", "--config", str(root / "etc/job-worker/server.toml"), "config")
    assert 'state_dir = "/var/lib/job-worker"' in shown
    assert "require_isolation = true" in shown


def test_uninstall_keeps_settings_and_state(root: Path) -> None:
    """It says so."""
    assert _make("install", root, HOSTS="localhost").returncode == 0
    (root / "var/lib/job-worker").mkdir(parents=True)
    done = _make("uninstall", root)
    assert done.returncode == 0, done.stderr
    assert "Kept: /etc/job-worker and /var/lib/job-worker" in done.stdout
    assert not (root / _PREFIX[1:]).exists()
    assert {name for name in _tree(root) if not name.startswith("etc/job-worker/")} == set()
    assert (root / "etc/job-worker/server.toml").exists()
    assert (root / "var/lib/job-worker").exists()
    assert _make("uninstall", root).returncode == 0


@pytest.mark.parametrize("prefix", ["relative", "/"])
def test_prefix_that_makes_no_sense_is_refused(root: Path, prefix: str) -> None:
    """Nothing is written, and nothing removed."""
    tree = _tree(root)
    for target in ("install", "uninstall"):
        done = _make(target, root, PREFIX=prefix)
        assert done.returncode != 0
        assert "PREFIX must be an absolute path" in done.stderr
    assert _tree(root) == tree


def test_installation_that_fails_leaves_the_old_program(root: Path) -> None:
    """Here it gets no packages: these need Python, and there is none."""
    shutil.rmtree(root / _PREFIX[1:] / "requirements")
    tree = _tree(root)
    done = _make("install", root, PYTHON="/bin/false")
    assert done.returncode != 0
    assert "needs Python 3.11" in done.stderr
    assert _tree(root) == tree


def test_uninstall_removes_no_directory_of_something_else(tmp_path: Path) -> None:
    """Where there is no server.py there is nothing of this project."""
    (tmp_path / "srv/jobs").mkdir(parents=True)
    (tmp_path / "srv/jobs/mine").touch()
    assert _make("uninstall", tmp_path).returncode == 0
    assert (tmp_path / "srv/jobs/mine").exists()


@pytest.mark.parametrize("name", ["jobs", "jobs.new", "jobs.old"])
def test_installation_replaces_no_directory_of_something_else(tmp_path: Path, name: str) -> None:
    """Where there are files and no server.py. It says what to do; an empty directory it takes."""
    other = tmp_path / "srv" / name
    other.mkdir(parents=True)
    (other / "mine").touch()
    tree = _tree(tmp_path)
    done = _make("install", tmp_path, PYTHON="/bin/false")
    assert done.returncode != 0
    assert f"{other} exists and has no server.py" in done.stderr
    assert "choose a directory of its own, like PREFIX=/opt/job-worker" in done.stderr
    assert _tree(tmp_path) == tree
    (other / "mine").unlink()
    assert "needs Python 3.11" in _make("install", tmp_path, PYTHON="/bin/false").stderr
