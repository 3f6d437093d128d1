"""Tests of the images: `deploy/Containerfile.client` and `deploy/Containerfile.server`.

A linter reads both. With JOBWORKER_CONTAINERS=podman they are built and run, too, which takes
minutes and needs a registry; the variable may have options, as "podman --storage-driver vfs".
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import version
from settings import Settings

_HERE = Path(__file__).resolve().parent
_KINDS = ("client", "server")
_HADOLINT = Path(sys.executable).parent / "hadolint"
_ENGINE = shlex.split(os.environ.get("JOBWORKER_CONTAINERS", ""))


def _instructions(kind: str) -> list[tuple[str, str]]:
    """The instructions of the last stage, each with its words."""
    text = (_HERE / f"deploy/Containerfile.{kind}").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    parts = [line.partition(" ") for line in lines if line]
    stages = [number for number, part in enumerate(parts) if part[0] == "FROM"]
    return [(name, " ".join(words.split())) for name, _, words in parts[stages[-1] :]]


@pytest.mark.parametrize("kind", _KINDS)
def test_linter_has_no_complaint(kind: str) -> None:
    """hadolint, which also reads the shell commands. What it shall ignore is named in the file."""
    run = subprocess.run(
        [_HADOLINT, "--no-color", _HERE / f"deploy/Containerfile.{kind}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "")


def test_complaint_of_the_linter_would_be_noticed(tmp_path: Path) -> None:
    """Of an image whose version is not named, for example."""
    (tmp_path / "Containerfile").write_text("FROM debian\nRUN cd /tmp && ls\n")
    run = subprocess.run([_HADOLINT, tmp_path / "Containerfile"], capture_output=True, check=False)
    assert run.returncode != 0


def test_client_does_not_run_as_root() -> None:
    """The user is a number, so that the engine can see that it is not root."""
    (user,) = [words for name, words in _instructions("client") if name == "USER"]
    uid, gid = user.split(":")
    assert int(uid) > 0
    assert int(gid) > 0


def test_server_of_the_image_is_the_one_that_is_installed() -> None:
    """`make install` puts it there; its state is in a volume, and its port is the default."""
    instructions = dict(_instructions("server"))
    assert "make install PREFIX=/opt/job-worker" in instructions["RUN"]
    assert json.loads(instructions["ENTRYPOINT"]) == [
        *("/opt/job-worker/server", "--config", "/etc/job-worker/server.toml"),
        *("--restart-window", "0"),
    ]
    toml = (_HERE / "deploy/server.toml").read_text()
    assert f'state_dir = "{instructions["VOLUME"]}"' in toml
    assert instructions["EXPOSE"] == Settings().listen.rpartition(":")[2]
    assert "USER" not in instructions  # it gives up root by itself


def test_images_are_made_without_keys() -> None:
    """Neither of the clone's trial certificates nor of its state is anything copied."""
    ignored = (_HERE / ".containerignore").read_text().split("\n")
    assert {".git", ".venv", "state", "build", "certs/*.pem"} <= set(ignored)


# --- with a container engine -------------------------------------------------------------------

_with_engine = pytest.mark.skipif(
    not _ENGINE, reason="takes minutes and needs a registry: JOBWORKER_CONTAINERS=podman"
)


def _engine(*words: str | Path) -> str:
    run = subprocess.run([*_ENGINE, *words], capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.fail(f"{words}: {run.stderr[-2000:]}")
    return run.stdout


def _build(kind: str) -> str:
    options = shlex.split(os.environ.get("JOBWORKER_CONTAINERS_BUILD", ""))
    file = _HERE / f"deploy/Containerfile.{kind}"
    _engine("build", *options, "-f", file, "-t", f"job-worker-{kind}", _HERE)
    return f"job-worker-{kind}"


@_with_engine
def test_client_image_has_the_client_and_no_root() -> None:
    """Without capabilities and with a root directory that cannot be written."""
    image = _build("client")
    run = ("run", "--rm", "--cap-drop=all", "--read-only")
    assert _engine(*run, image, "--version") == f"job-worker {version.VERSION}\n"
    assert _engine(*run, "--entrypoint=id", image, "-u") == "65532\n"


@pytest.fixture
def settings(certs: Path, public: Path) -> Path:
    """What the container has in /etc/job-worker."""
    text = (_HERE / "deploy/server.toml").read_text()
    (public / "server.toml").write_text(text)
    (public / "certs").mkdir(0o700)
    for name in ("server.pem", "server-key.pem", "client-ca.pem"):
        (public / "certs" / name).write_bytes((certs / name).read_bytes())
        (public / "certs" / name).chmod(0o600)
    command = [sys.executable, str(_HERE / "server.py"), "--users", str(public / "users")]
    subprocess.run(
        [*command, "user", "add", "a"], input=b"secret\n", check=True, capture_output=True
    )
    return public


@_with_engine
def test_server_image_starts_a_server(settings: Path) -> None:
    """Privileged, with a cgroup namespace of its own, every limit can be enforced."""
    image = _build("server")
    words = ["run", "--rm", "--privileged", "--cgroupns=private"]
    words += ["-v", f"{settings}:/etc/job-worker", image]
    process = subprocess.Popen([*_ENGINE, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "listening on 0.0.0.0:50051\n"
    process.terminate()
    process.communicate()
