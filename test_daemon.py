"""Tests of what the server tells a service manager: a real server, and a socket like systemd's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testkit import GUARD_S, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from testkit import ServerProgram

_HERE = Path(__file__).resolve().parent
_FOREVER_US = str(10**12)


class _Manager:
    """The socket that a service manager listens on. `address`: the value for NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if address.startswith("@"):
            self._socket.bind("\0" + address[1:])
        else:
            self._socket.bind(address)
            os.chmod(address, 0o777)
        self._socket.settimeout(GUARD_S)

    def close(self) -> None:
        self._socket.close()

    def told(self) -> dict[str, str]:
        """Wait for a message; return its assignments."""
        lines = self._socket.recv(4096).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[_Manager]:
    """A manager whose socket every user can reach, as that of systemd."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        by_name = {"file": f"{directory}/notify", "abstract": f"@{directory}"}
        made = _Manager(by_name[request.param])
        yield made
        made.close()


def test_service_manager_is_told_of_each_change(
    start_server: Callable[..., ServerProgram], manager: _Manager
) -> None:
    """READY when the server listens, RELOADING and READY around a reload, STOPPING at the end."""
    program = start_server(env={"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": _FOREVER_US})
    assert manager.told() == {"READY": "1", "STATUS": "0 jobs, 0 streams"}
    program.process.send_signal(signal.SIGHUP)
    # A reload begins the interval of the watchdog anew; so many reloads must not keep it waiting.
    assert manager.told() == {"WATCHDOG": "1", "STATUS": "0 jobs, 0 streams"}
    reloading = manager.told()
    assert (reloading["RELOADING"], int(reloading["MONOTONIC_USEC"]) > 0) == ("1", True)
    assert manager.told() == {"READY": "1"}
    assert program.end() == 0
    assert manager.told()["STOPPING"] == "1"


def test_watchdog_is_told_twice_in_its_time_how_the_server_is(
    start_server: Callable[..., ServerProgram], manager: _Manager
) -> None:
    """Each time with the number of jobs. Another process's watchdog is not told anything."""
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "100000"}
    program = start_server(env=environment)
    assert "READY" in manager.told()
    for _ in range(3):
        assert manager.told() == {"WATCHDOG": "1", "STATUS": "0 jobs, 0 streams"}
    program.end()
    while "STOPPING" not in manager.told():
        pass
    other = start_server(env=environment | {"WATCHDOG_PID": "1"})
    assert "READY" in manager.told()
    other.end()
    assert "STOPPING" in manager.told()


def test_server_that_hangs_leaves_its_stacks_in_the_log(
    start_server: Callable[..., ServerProgram],
) -> None:
    """systemd sends SIGABRT if the watchdog was not told anything in time."""
    program = start_server()
    assert program.end(signal.SIGABRT) == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in program.log.read_text()


def test_manager_that_is_gone_does_no_harm(
    start_server: Callable[..., ServerProgram], tmp_path: Path
) -> None:
    """The server works, and its log says what it could not tell."""
    program = start_server(env={"NOTIFY_SOCKET": str(tmp_path / "absent")})
    assert program.end() == 0
    assert "the service manager cannot be told READY=1" in program.log.read_text()


def test_reason_why_a_server_does_not_start_is_told(
    manager: _Manager, certs: Path, tmp_path: Path
) -> None:
    """`systemctl status` shows it."""
    config = tmp_path / "config.toml"
    config.write_text("[nonsense]\n")
    run = subprocess.run(
        [sys.executable, str(_HERE / "server.py"), "--certs", str(certs), "--config", str(config)],
        env=clean_environment() | {"NOTIFY_SOCKET": manager.address},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert run.returncode == 1
    (told,) = manager.told().values()
    assert told.startswith(f"not started: {config}, line 1: nonsense: unknown")
    assert told.removeprefix("not started: ") in run.stderr
