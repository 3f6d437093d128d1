"""Tests of the memory that is left, with the kernel's real files and with made-up ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import memory
from client import Client, ClientError
from testkit import ServerProgram, joined

if TYPE_CHECKING:
    from collections.abc import Iterator

_MIB = 1024 * 1024


def test_what_is_left_is_no_more_than_the_host_has() -> None:
    """On every host, whatever its cgroups are."""
    fields = Path("/proc/meminfo").read_text().split()
    total = int(fields[fields.index("MemTotal:") + 1]) * 1024
    assert memory.left_bytes() <= total


@pytest.mark.kernel
def test_limit_of_the_cgroup_and_of_each_above_counts(base: Path) -> None:
    """What the kernel can drop, as the memory of files that were read, counts as left."""
    (base / "cgroup.subtree_control").write_text("+memory")
    inner = base / "inner"
    inner.mkdir()
    with joined(inner):
        (base / "memory.max").write_text(str(100 * _MIB))
        assert 50 * _MIB < memory.left_bytes() <= 100 * _MIB
        (inner / "memory.max").write_text(str(60 * _MIB))
        before = memory.left_bytes()
        assert before <= 60 * _MIB
        held = bytearray(os.urandom(1)) * (20 * _MIB)
        assert before - memory.left_bytes() > 15 * _MIB
        del held
    inner.rmdir()


@pytest.fixture
def hierarchy() -> Iterator[Path]:
    """A cgroup v1 for memory, where the host has one."""
    for kind, _, top in memory._groups():
        if kind == "cgroup" and os.access(top, os.W_OK) and (top / "tasks").exists():
            path = top / f"test-{os.getpid()}"
            path.mkdir()
            yield path
            path.rmdir()
            return
    pytest.skip("this host has no cgroup v1 for memory that we may use")


def test_limit_of_a_cgroup_v1_counts(hierarchy: Path) -> None:
    """Docker and old systems have these."""
    (hierarchy / "memory.limit_in_bytes").write_text(str(100 * _MIB))
    program = "import memory; print(memory.left_bytes())"
    script = f'echo 0 >"{hierarchy}/cgroup.procs"; exec {sys.executable} -c "{program}"'
    run = subprocess.run(
        ["sh", "-c", script],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 50 * _MIB < int(run.stdout) <= 100 * _MIB


def test_login_under_a_small_limit_is_refused_and_the_server_lives(
    hierarchy: Path, certs: Path, tmp_path: Path
) -> None:
    """Without the refusal, the kernel kills the server for the memory of the hash."""
    (hierarchy / "memory.limit_in_bytes").write_text(str(160 * _MIB))
    log = tmp_path / "server.log"
    script = f'echo 0 >"{hierarchy}/cgroup.procs" && exec "$@"'
    program = ServerProgram(
        log,
        *("--listen", "127.0.0.1:0", "--limits", "off", "--certs", str(certs)),
        *("--state-dir", str(tmp_path / "state")),
        before=("sh", "-c", script, "sh"),
    )
    with Client(program.address, certs=certs) as client:
        for _ in range(2):
            with pytest.raises(ClientError, match="needs 128 MiB of memory") as caught:
                client.login("user", "user")
            assert (caught.value.code, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED", 5)
        (hierarchy / "memory.limit_in_bytes").write_text(str(1024 * _MIB))
        client.login("user", "user")
    assert program.end() == 0
    assert "Login: a login needs 128 MiB of memory" in log.read_text()
