"""Tests of the admin socket and of `server status`: a real server, and other processes that ask."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import serverstatus
import unixsockets
from adminsocket import AdminError, AdminSocket, ask
from localserver import bind_unix
from quotas import Use
from serverstatus import Disk, Disks
from testkit import FOREVER, GUARD_S, NOBODY, follow
from users import make_user
from worker import Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from client import Client
    from testkit import ServerProgram

    MakeAdmin = Callable[..., Path]

_HERE = Path(__file__).resolve().parent


@pytest.fixture
def make_admin(tmp_path: Path) -> Iterator[MakeAdmin]:
    """Open an admin socket with some commands; return its directory."""
    made = []

    def fail(_: Mapping[str, Any]) -> Mapping[str, Any]:
        raise AdminError("it is not the time for that")

    def make(**commands: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Path:
        admin = AdminSocket(tmp_path, {"echo": lambda request: request, "fail": fail, **commands})
        made.append(admin)
        admin.start()
        return tmp_path

    yield make
    for admin in made:
        admin.close()


def _raw(state: Path, request: bytes) -> dict[str, Any]:
    """Send bytes to the socket; return the answer."""
    with unixsockets.connect(state / "admin.sock") as sock:
        sock.settimeout(GUARD_S)
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        answer: dict[str, Any] = json.loads(sock.makefile("rb").readline())
        return answer


# --- the socket -------------------------------------------------------------------------


def test_command_gets_its_arguments_and_its_answer_comes_back(make_admin: MakeAdmin) -> None:
    """Of any size up to 64 KiB, and one after the other."""
    state = make_admin()
    for text in "", "ä\n", "x" * 60_000:
        assert ask(state, "echo", text=text) == {"command": "echo", "text": text}


def test_refusal_of_a_command_is_an_error_that_says_why(make_admin: MakeAdmin) -> None:
    state = make_admin()
    with pytest.raises(AdminError, match="it is not the time for that"):
        ask(state, "fail")
    with pytest.raises(AdminError, match="no command 'fly'; there are: echo, fail"):
        ask(state, "fly")


@pytest.mark.parametrize(
    "request_line", [b"", b"\n", b"[]\n", b"7", b"{}\n", b'{"command": []}\n', b"[" * 70_000]
)
def test_what_is_no_request_is_answered(make_admin: MakeAdmin, request_line: bytes) -> None:
    """And the next request is served."""
    state = make_admin()
    assert "a request is a line like" in _raw(state, request_line)["error"]
    assert ask(state, "echo") == {"command": "echo"}


def test_failure_of_a_command_is_logged_and_not_told(
    make_admin: MakeAdmin, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(_: Mapping[str, Any]) -> Mapping[str, Any]:
        raise RuntimeError("a secret")

    state = make_admin(crash=crash)
    with pytest.raises(AdminError, match="internal error"):
        ask(state, "crash")
    assert "a secret" in caplog.text
    assert ask(state, "echo") == {"command": "echo"}


def test_client_that_goes_away_holds_up_nobody(make_admin: MakeAdmin) -> None:
    """Without a request, or without taking its answer."""
    state = make_admin()
    unixsockets.connect(state / "admin.sock").close()
    with unixsockets.connect(state / "admin.sock") as sock:
        sock.sendall(b'{"command": "echo"}\n')
    assert ask(state, "echo") == {"command": "echo"}


def test_socket_is_the_owners_alone(make_admin: MakeAdmin) -> None:
    """Its mode is 0600, whatever the umask."""
    state = make_admin()
    assert (state / "admin.sock").stat().st_mode & 0o777 == 0o600


def test_kernel_tells_who_asks(make_admin: MakeAdmin, public: Path) -> None:
    """Another user gets no answer, even if the file's mode would allow it."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    state = make_admin()
    shutil.move(state / "admin.sock", public / "admin.sock")
    os.chmod(public / "admin.sock", 0o666)
    code = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
try:
    sock.sendall(b'{"command": "echo"}\\n')
    print(sock.recv(100))
except OSError:
    print("nothing")
"""
    python = shutil.which("python3", path="/usr/bin:/bin") or pytest.skip("needs /usr/bin/python3")
    command = [python, "-c", code, str(public / "admin.sock")]
    for uid, answer in (NOBODY, "nothing\n"), (0, 'b\'{"command": "echo"}\\n\'\n'):
        run = subprocess.run(command, user=uid, cwd="/", capture_output=True, text=True, check=True)
        assert run.stdout == answer


def test_without_a_server_the_error_names_the_remedy(tmp_path: Path) -> None:
    """No directory, no socket, or one that a server that was killed has left."""
    for state in tmp_path / "absent", tmp_path:
        with pytest.raises(AdminError, match=r"no server runs with .*; name that of the server"):
            ask(state, "status")
    bind_unix(tmp_path / "admin.sock", 0o600).close()
    with pytest.raises(AdminError, match="no server runs with"):
        ask(tmp_path, "status")


def test_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    bind_unix(path, 0o600).close()
    with bind_unix(path, 0o600):
        with pytest.raises(FileExistsError, match="another server listens here"):
            bind_unix(path, 0o600)
        unixsockets.connect(path).close()


def test_what_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="is not a socket"):
        bind_unix(path, 0o600)
    assert path.read_text() == "precious"


def test_mode_is_never_given_by_name(tmp_path: Path) -> None:
    """The owner of the directory could swap the socket for a link before a chmod, as is done here.

    A process of its own, because an audit hook cannot be removed.
    """
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from localserver import bind_unix\n"
        "path, secret = Path(sys.argv[2], 'metrics.sock'), Path(sys.argv[2], 'secret')\n"
        "secret.touch(0o600)\n"
        "def swap(event, _):\n"
        "    if event == 'os.chmod':\n"
        "        path.unlink(); path.symlink_to(secret)\n"
        "sys.addaudithook(swap)\n"
        "before = os.umask(0o027)\n"
        "bind_unix(path, 0o660)\n"
        "print(oct(secret.stat().st_mode & 0o777), oct(path.lstat().st_mode & 0o777))\n"
        "print(oct(os.umask(before)))\n"
    )
    command = [sys.executable, "-c", code, str(_HERE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "0o600 0o660\n0o27\n"


def test_path_may_be_longer_than_a_socket_address(tmp_path: Path) -> None:
    """sockaddr_un has room for 108 bytes."""
    directory = tmp_path / ("d" * 200)
    directory.mkdir()
    with bind_unix(directory / "admin.sock", 0o600):
        unixsockets.connect(directory / "admin.sock").close()


def test_close_ends_the_thread_and_removes_the_file(tmp_path: Path) -> None:
    admin = AdminSocket(tmp_path, {})
    admin.start()
    admin.close()
    admin.close()
    assert "admin" not in [thread.name for thread in threading.enumerate()]
    assert not (tmp_path / "admin.sock").exists()


def _counts(status: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many jobs run and how many have finished."""
    return status["jobs"]["running"], status["jobs"]["finished"]


# --- the server -------------------------------------------------------------------------


def test_status_of_a_server(
    start_server: Callable[..., ServerProgram],
    make_state: Callable[[], Path],
    connect: Callable[..., Client],
) -> None:
    """What runs, what is open, how long for, and on which disk."""
    state = make_state()
    program = start_server(state=state)
    client = connect("user", program.address)
    job_id = client.start(*FOREVER)
    stream = follow(client, job_id)
    status = ask(state, "status")
    assert (status["pid"], status["address"]) == (program.process.pid, program.address)
    assert _counts(status) == (1, 0)
    assert status["jobs"]["ceiling"] == 2000
    assert status["streams"] == {"open": 1, "ceiling": 2000}
    assert status["users"] == 2
    assert status["problems"] == []
    assert status["store_bytes"] > 0
    (disk, *_) = status["disks"]
    assert 0 < disk["free_bytes"] < disk["size_bytes"]
    stream.close()
    client.stop(job_id)
    assert _counts(ask(state, "status")) == (0, 1)
    assert ask(state, "status")["jobs"]["ended"]["stopped"] == 1
    program.end()
    assert not (state / "admin.sock").exists() or os.geteuid() == 0


def test_reload_answers_what_was_refused(
    start_server: Callable[..., ServerProgram],
    make_state: Callable[[], Path],
    certs: Path,
    tmp_path: Path,
) -> None:
    """And the server goes on with what it had."""
    own = tmp_path / "certs"
    shutil.copytree(certs, own)
    state = make_state()
    start_server("--certs", str(own), state=state)
    assert ask(state, "reload") == {"problems": []}
    (own / "server.pem").write_text("nonsense")
    (problem,) = ask(state, "reload")["problems"]
    assert problem.startswith("the certificates stay as they were: ")
    assert "server.pem is not a certificate in PEM" in problem


# --- what is shown ----------------------------------------------------------------------


def test_program_shows_the_status_and_reloads(
    start_server: Callable[..., ServerProgram], make_state: Callable[[], Path], tmp_path: Path
) -> None:
    """`server status`, `server status --json` and `server reload`; what is refused gives 1."""
    state = make_state()
    users = tmp_path / "users"
    users.write_text(f"{make_user('alice', 'user', 'correct horse battery')}\n")
    users.chmod(0o600)
    program = start_server("--users", str(users), state=state)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(_HERE / "server"), "--state-dir", str(state), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=GUARD_S, check=False)

    shown = run("status")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"address  {program.address}\n" in shown.stdout
    assert json.loads(run("status", "--json").stdout)["users"] == 1
    assert run("reload").returncode == 0
    users.write_text("nonsense\n")
    refused = run("reload")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("server: the users stay as they were: ")
    program.end()
    absent = run("status")
    assert (absent.returncode, absent.stdout) == (1, "")
    assert absent.stderr.startswith(f"server: no server runs with the state directory {state}; ")


def _status(*uses: Use, **changes: Any) -> dict[str, Any]:
    names = ("running_jobs", "streams", "kept_output")
    own = {use.name for use in uses if use.user is None}
    every = [*(Use(None, name, 0, None) for name in names if name not in own), *uses]
    parts: dict[str, Any] = {
        "address": "127.0.0.1:1",
        "started_s": 0.0,
        "users": 1,
        "jobs": Counts(0, 0, {}),
        "store_bytes": 0,
        "disks": (),
        "expiries": {},
        "warnings": (),
        "problems": (),
    }
    return serverstatus.describe(uses=every, **parts | changes)


def test_nearly_full_is_what_has_reached_four_fifths() -> None:
    """Of a ceiling of one user, or of all users together; what has no ceiling is never full."""
    assert _status(Use("bob", "streams", 79, 100), Use("bob", "running_jobs", 10**9, None))[
        "nearly_full"
    ] == [*_status()["nearly_full"]]
    status = _status(Use(None, "streams", 80, 100), Use("bob", "kept_output", 9 << 30, 10 << 30))
    assert status["nearly_full"] == [
        "80 of 100 (in_all.streams) are taken by all users",
        "9 GiB of 10 GiB (per_user.kept_output) are taken by user bob",
    ]


def test_disk_that_is_nearly_full_is_named() -> None:
    """When less than a fifth of it is free."""
    nearly, not_yet = (Disk(f"/{free}", 100 << 30, free << 30) for free in (19, 20))
    (line,) = _status(disks=(nearly, not_yet))["nearly_full"]
    assert line == "the disk of /19: 19 GiB of 100 GiB are free"


def test_two_directories_on_a_disk_count_once(tmp_path: Path) -> None:
    """And stay open, wherever they are moved to."""
    (tmp_path / "a").mkdir()
    with Disks((tmp_path / "a", tmp_path)) as disks:
        (tmp_path / "a").rename(tmp_path / "b")
        (disk,) = disks.look()
    assert disk.path == str(tmp_path / "a")
    assert 0 < disk.free_bytes < disk.size_bytes


def test_words_say_everything() -> None:
    """What will need attention comes last, where the eye is."""
    status = _status(
        Use(None, "streams", 90, 100),
        started_s=time.time() - 25.5 * 3600,
        disks=(Disk("/var", 3 << 30, 2 << 30),),
        warnings=["server.pem expires on 2026-12-01, in 3 days"],
        problems=["the audit log cannot be written"],
    )
    lines = serverstatus.in_words(status)
    assert re.match(r"job-worker \S+, process \d+, up for 1d 1h", lines[0])
    assert "disk     /var: 2 GiB of 3 GiB free" in lines
    assert "streams  90 open of at most 100" in lines
    assert lines[-3:] == [
        "does not work: the audit log cannot be written",
        "nearly full: 90 of 100 (in_all.streams) are taken by all users",
        "expires soon: server.pem expires on 2026-12-01, in 3 days",
    ]
    assert "does not work: nothing" in serverstatus.in_words(_status())
