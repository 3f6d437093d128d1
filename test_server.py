"""Tests of the server: its settings, its start, its certificates, the program and its end.

`test_service.py` tests the calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import workerservice_pb2 as worker_pb
from client import Client, ClientError
from daemon import BROKEN_STATUS
from server import Server
from settings import ConfigError, Settings, SettingsError, load_config
from testkit import (
    FOREVER,
    GUARD_S,
    HTTP2_GREETING,
    JOB_VARIABLES,
    NOBODY,
    call_rpc,
    children_of,
    clean_environment,
    follow,
    fork_server_of,
    make_fifo,
    run_job,
    run_server,
    small_file_system,
    tls_context,
    without_cgroup_name,
)
from tls import CertificateError
from users import SEEDED_USERS, User, make_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from testkit import ServerProgram

    Connect = Callable[..., Client]
    Serve = Callable[..., Server]
    StartServer = Callable[..., ServerProgram]

_HERE = Path(__file__).resolve().parent


# --- mutual TLS -------------------------------------------------------------------------

_SETTINGS_TYPE = 4


def _converse(address: str, context: ssl.SSLContext | None, greeting: bytes) -> bytes:
    """Send a greeting; return the server's first frame, or what it answers before it hangs up."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_connection((host, int(port)), GUARD_S))
        try:
            if context is not None:
                sock = stack.enter_context(context.wrap_socket(sock, server_hostname=host))
                assert isinstance(sock, ssl.SSLSocket)
                assert sock.version() == "TLSv1.3"
            sock.sendall(greeting)
            return sock.recv(9)
        except (ssl.SSLError, ConnectionError):
            return b""


def _is_admitted(answer: bytes) -> bool:
    """Whether the answer is the HTTP/2 frame of settings that a server sends first inside TLS."""
    return answer[3:4] == bytes([_SETTINGS_TYPE])


@pytest.mark.parametrize("name", ["client", "other"])
def test_client_certificate_of_the_client_ca_gets_through_over_tls_1_3(
    program: ServerProgram, certs: Path, name: str
) -> None:
    """So the clients below are refused for their one mistake. test_tls.py has more cases."""
    assert _is_admitted(
        _converse(program.address, tls_context(certs, certs / f"{name}.pem"), HTTP2_GREETING)
    )


def test_client_certificate_of_another_ca_does_not_get_through(
    program: ServerProgram, certs: Path, foreign_certs: Path, connect: Connect
) -> None:
    """The connection ends before any call, and the server continues."""
    context = tls_context(certs, foreign_certs / "client.pem")
    assert not _is_admitted(_converse(program.address, context, HTTP2_GREETING))
    connect().list()


def test_no_client_certificate_does_not_get_through(
    program: ServerProgram, certs: Path, connect: Connect
) -> None:
    """There is no mode without client certificates."""
    assert not _is_admitted(_converse(program.address, tls_context(certs, None), HTTP2_GREETING))
    connect().list()


@pytest.mark.parametrize("in_process", [False, True])
def test_tls_1_2_does_not_get_through(
    program: ServerProgram, serve: Serve, certs: Path, connect: Connect, in_process: bool
) -> None:
    """A client with the right certificate and every suite of OpenSSL has none in common."""
    address = serve().address if in_process else program.address
    context = tls_context(certs, certs / "client.pem")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), GUARD_S) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(sock, server_hostname=host).close()
    connect("user", address).list()


@pytest.mark.parametrize("greeting", [HTTP2_GREETING, os.urandom(5000)])
def test_what_is_not_tls_does_not_get_through(
    program: ServerProgram, connect: Connect, greeting: bytes
) -> None:
    """Plaintext, garbage and silence get no frame, and disturb nobody."""
    host, _, port = program.address.rpartition(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(greeting)
        connect().list()
        silent.shutdown(socket.SHUT_WR)
        silent.settimeout(GUARD_S)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = silent.recv(9)
    assert not _is_admitted(answer)
    connect().list()


def test_idle_connections_hold_up_nobody(program: ServerProgram, connect: Connect) -> None:
    """Connections that never begin a handshake delay nobody."""
    host, _, port = program.address.rpartition(":")
    with contextlib.ExitStack() as idle:
        for _ in range(50):
            idle.enter_context(socket.create_connection((host, int(port))))
        connect().list()


@pytest.mark.parametrize("wrong", ["of another CA", "for another host", "for clients", "expired"])
# --- the program: starting --------------------------------------------------------------


def _assert_one_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Assert that it failed with one line on stderr, which contains all `parts`.

    A warning about isolation may come before it: where the tests do not run as root, or because
    other users cannot reach the directories of the tests.
    """
    assert (result.returncode, result.stdout) == (1, "")
    *log, error = result.stderr.splitlines()
    assert [line for line in log if not _is_about_isolation(line)] == []
    assert error.startswith("server: ")
    for part in parts:
        assert part in error


def _is_about_isolation(line: str) -> bool:
    if os.geteuid() == 0:
        return " WARNING " in line and "is closed to the users of jobs" in line
    return " WARNING jobs run as uid " in line


@pytest.mark.parametrize(
    "listen",
    [
        *("", ":", "localhost", "localhost:", ":50051", "127.0.0.1:x", "127.0.0.1:-1"),
        *(
            "127.0.0.1:65536",
            "::1:50051",
            "[::1]",
            "[127.0.0.1]:0",
            "[]:0",
            "127.0.0.1:1:2",
            "a\nb:0",
        ),
    ],
)
def test_listen_must_be_host_and_port(certs: Path, tmp_path: Path, listen: str) -> None:
    """Any other form is refused with an example, before any file is made."""
    with pytest.raises(SettingsError, match=re.escape(f"--listen {listen!r} is not HOST:PORT")):
        Server(Settings(listen=listen, certs=certs, state_dir=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 300, "a\ud800"])
def test_listen_must_be_a_host_that_there_is(certs: Path, tmp_path: Path, host: str) -> None:
    """Nor is any text a host name."""
    text = re.escape(f"--listen: cannot resolve {host!r}: ")
    with pytest.raises(SettingsError, match=rf"{text}[^\n]+$"):
        Server(Settings(listen=f"{host}:0", certs=certs, state_dir=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("listen", ["localhost:0", "127.0.0.2:0", "[::1]:0"])
def test_any_loopback_address_can_be_listened_on(
    serve: Serve, connect: Connect, listen: str
) -> None:
    """By name and by number; clients can connect to the printed address."""
    if listen.startswith("[") and not _has_ipv6():
        pytest.skip("this host has no IPv6")
    server = serve(listen=listen)
    assert re.fullmatch(re.escape(listen[:-1]) + r"[1-9]\d*", server.address)
    if listen != "127.0.0.2:0":  # not in the certificate
        assert connect("user", server.address).list() == []


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


_EXPOSED = ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "build.example:0"]


def _resolve_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make build.example two addresses, one of them loopback."""
    resolve = socket.getaddrinfo

    def fake(host: str, port: Any) -> Any:
        if host != "build.example":
            return resolve(host, port)
        return [info for number in ("127.0.0.1", "192.0.2.1") for info in resolve(number, port)]

    monkeypatch.setattr(socket, "getaddrinfo", fake)


@pytest.mark.parametrize("listen", _EXPOSED)
def test_users_with_public_passwords_are_not_exposed(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listen: str
) -> None:
    """Outside of loopback the seeded users are refused, with the remedy."""
    _resolve_example(monkeypatch)
    with pytest.raises(SettingsError, match=r"admin and user are public.*--users FILE"):
        Server(Settings(listen=listen, certs=certs, state_dir=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


def _users_file(path: Path, *users: User) -> Path:
    path.write_text("".join(f"{user}\n" for user in users))
    return path


def test_users_file_that_repeats_a_public_password_is_not_exposed(
    certs: Path, tmp_path: Path
) -> None:
    """The password `admin` of admin is public with any salt."""
    users = [make_user("admin", "admin", "admin"), make_user("bob", "user", "bob")]
    path = _users_file(tmp_path / "users", *users)
    settings = Settings(listen="0.0.0.0:0", certs=certs, users=path, state_dir=tmp_path / "state")
    with pytest.raises(SettingsError, match="the passwords of admin are public"):
        Server(settings)


def test_users_of_their_own_may_be_exposed(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """With a users file the server listens anywhere, and only these users can log in."""
    users = _users_file(tmp_path / "users", make_user("admin", "user", "changed"))
    server = serve(listen="0.0.0.0:0", users=users)
    client = connect("", server.address.replace("0.0.0.0", "127.0.0.1"))
    for name in ("admin", "user"):
        assert call_rpc(client, "Login", username=name, password=name)[0] == "UNAUTHENTICATED"
    client.login("admin", "changed")
    assert client.list() == []


@pytest.mark.parametrize("change", ["nothing", "gone", "password", "role"])
def test_token_of_a_user_who_is_not_the_same_in_the_file_is_unauthenticated(
    serve: Serve, connect: Connect, tmp_path: Path, change: str
) -> None:
    """A user who was removed or changed in the file needs a new login after the next start."""
    admin, user = SEEDED_USERS
    changed = {
        "nothing": [user],
        "gone": [],
        "password": [make_user("user", "user", "changed")],
        "role": [replace(user, role=admin.role)],
    }[change]
    address = serve(users=_users_file(tmp_path / "users", admin, *changed)).address
    code = "OK" if change == "nothing" else "UNAUTHENTICATED"
    assert call_rpc(connect("user", address), "ListJobs")[0] == code
    assert call_rpc(connect("admin", address), "ListJobs")[0] == "OK"


def test_bad_users_file_is_told_at_the_start(certs: Path, tmp_path: Path) -> None:
    """The error has the file and the line. The server does not listen."""
    users = tmp_path / "users"
    users.write_text("# ours\nbob:user:secret\n")
    options: list[str | Path] = ["--listen", "127.0.0.1:0", "--limits", "off", "--certs", certs]
    result = run_server(*options, "--users", users, "--state-dir", tmp_path / "state")
    _assert_one_line(result, f"{users}, line 2: not a password hash", "./server user bob")
    assert "secret" not in result.stderr
    assert not (tmp_path / "state").exists()


def test_missing_certificates_name_the_command_that_makes_them(tmp_path: Path) -> None:
    """One line with the missing files."""
    result = run_server("--certs", tmp_path, "--state-dir", tmp_path / "state")
    _assert_one_line(result, "make certs", str(tmp_path / "server-key.pem"), "client-ca.pem")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("server.pem", "not PEM"),
        ("server.pem", "of another"),
        ("server-key.pem", "not PEM"),
        ("server-key.pem", "of another"),
        ("client-ca.pem", "not PEM"),
    ],
)
def test_unusable_certificates_are_refused_at_the_start(
    certs: Path, foreign_certs: Path, tmp_path: Path, name: str, damage: str
) -> None:
    """The server does not wait for the first client to fail."""
    directory = shutil.copytree(certs, tmp_path / "certs")
    good = (foreign_certs / name).read_bytes()
    (directory / name).write_bytes(good if damage == "of another" else b"garbage")
    with pytest.raises(CertificateError, match=r"are not usable: .*generate\.sh"):
        Server(Settings(listen="127.0.0.1:0", certs=directory, state_dir=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


def test_unusable_certificates_are_told_by_the_program(certs: Path, tmp_path: Path) -> None:
    """The program prints one line."""
    directory = shutil.copytree(certs, tmp_path / "certs")
    (directory / "server.pem").write_bytes(b"garbage")
    result = run_server("--certs", directory, "--state-dir", tmp_path / "state")
    _assert_one_line(result, "server.pem is not a certificate in PEM", "certs/generate.sh")


def test_port_in_use_is_an_error(program: ServerProgram, certs: Path, tmp_path: Path) -> None:
    """A second server does not share the port, and leaves no process behind."""
    result = run_server(
        *("--listen", program.address, "--certs", certs, "--state-dir", tmp_path / "state"),
        *("--limits", "off"),
    )
    _assert_one_line(result, f"cannot listen on {program.address}: Address already in use")


def test_state_directory_in_use_is_an_error(
    start_server: StartServer, make_state: Callable[[], Path], certs: Path
) -> None:
    """Two servers would delete each other's output."""
    state = make_state()
    start_server(state=state)
    result = run_server(
        *("--listen", "127.0.0.1:0", "--certs", certs, "--state-dir", state, "--limits", "off")
    )
    _assert_one_line(result, "another process uses the store", str(state))


def test_state_directory_is_private(serve: Serve, tmp_path: Path) -> None:
    """All files in it are private, too."""
    serve(state_dir=tmp_path / "a" / "state")
    modes = {
        str(path.relative_to(tmp_path / "a")): path.stat().st_mode & 0o777
        for path in (tmp_path / "a").rglob("*")
    }
    (next_output,) = (path for path in modes if path.endswith(".out"))
    next_tmp = f"state/tmp/{Path(next_output).stem}"
    assert modes == {
        next_output: 0o600,
        next_tmp: 0o700,
        "state/tmp": 0o700,
        "state": 0o700,
        "state/token.key": 0o600,
        "state/admin.sock": 0o600,
        "state/store": 0o700,
        "state/store/store.made": 0o600,
        "state/store/store.db": 0o600,
        "state/store/store.db-shm": 0o600,
        "state/store/store.db-wal": 0o600,
        "state/audit.log": 0o600,
        "state/output": 0o700,
    }


@pytest.mark.parametrize(
    ("name", "content", "mode", "problem"),
    [
        ("token.key", b"short", 0o600, "is not a token key of 32 bytes"),
        ("token.key", bytes(32), 0o640, "other users may read or change "),
        ("logged-out", b"what\n", 0o600, "line 1 is not ID ENDS_S"),
        ("store", b"", 0o600, "store cannot be used: File exists"),
        ("audit.log", b"", 0o644, "other users may read or write the audit log"),
        ("output", b"", 0o600, "output"),
    ],
)
def test_state_that_is_damaged_or_not_private_is_told_at_the_start(  # noqa: PLR0913
    certs: Path, tmp_path: Path, name: str, content: bytes, mode: int, problem: str
) -> None:
    """The error has the file, which stays unchanged. The server does not listen."""
    path = tmp_path / name
    path.write_bytes(content)
    path.chmod(mode)
    (tmp_path / "uids").touch(0o600)  # otherwise the server misses its store first
    options: list[str | Path] = ["--listen", "127.0.0.1:0", "--limits", "off", "--certs", certs]
    _assert_one_line(run_server(*options, "--state-dir", tmp_path), problem)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (content, mode)


@contextlib.contextmanager
def _full_disk(state: Path) -> Iterator[None]:
    with (state.parent / "filler").open("wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while True:
                filler.write(b" " * 4096)
        yield


def test_full_disk_at_the_first_start_is_told(certs: Path) -> None:
    """The error names the directory and what to do."""
    options: list[str | Path] = ["--listen", "127.0.0.1:0", "--limits", "off", "--certs", certs]
    with small_file_system("64k") as disk, _full_disk(disk / "state"):
        run = run_server(*options, "--state-dir", disk / "state")
        _assert_one_line(run, "full; make room on the disk of the state directory")


def test_full_disk_at_a_later_start_is_told(certs: Path) -> None:
    """The error names the store, or the state directory, and what to do."""
    options: list[str | Path] = ["--listen", "127.0.0.1:0", "--limits", "off", "--certs", certs]
    with small_file_system("256k") as disk:
        state = disk / "state"
        with Server(
            Settings(listen="127.0.0.1:0", certs=certs, state_dir=state, enforcement="off")
        ):
            pass
        with _full_disk(state):
            run = run_server(*options, "--state-dir", state)
            _assert_one_line(run, "full; make room on the disk of the state directory")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "token.key", "uids", "store"])
def test_state_that_belongs_to_somebody_else_is_refused(
    certs: Path, public: Path, name: str
) -> None:
    """Such a directory may have been made in /tmp before the first start."""
    state = public / "state"
    state.mkdir(0o700)
    for each in ("token.key", "uids"):
        (state / each).touch(0o600)
    (state / "store").mkdir(0o700)
    (state / "token.key").write_bytes(bytes(32))
    os.chown(state / name, NOBODY, NOBODY)
    options: list[str | Path] = ["--listen", "127.0.0.1:0", "--limits", "off", "--certs", certs]
    run = run_server(*options, "--state-dir", state)
    _assert_one_line(run, f"{state / name} belongs to uid {NOBODY}")


_as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def _refusal_of(state: Path, certs: Path, *parts: str, options: Sequence[str | Path] = ()) -> None:
    """Assert that a server with users of its own does not start, and gives nothing away."""
    before = {path: path.stat().st_uid for path in state.parent.rglob("*")}
    run = run_server(
        *("--listen", "127.0.0.1:0", "--limits", "off", "--uids", "71000-71009"),
        *("--certs", certs, "--state-dir", state, *options),
    )
    _assert_one_line(run, *parts)
    assert {path: path.stat().st_uid for path in before} == before


@_as_root
@pytest.mark.parametrize("uid", [NOBODY, 71_001])
@pytest.mark.parametrize("name", ["output", "tmp", "homes"])
def test_directory_of_the_state_that_belongs_to_a_user_is_refused(
    certs: Path, public: Path, name: str, uid: int
) -> None:
    """Also to one that jobs run as. The server does not take it from its owner."""
    state = public / "state"
    (state / name).mkdir(mode=0o700, parents=True)
    os.chown(state / name, uid, uid)
    _refusal_of(state, certs, f"{state / name} belongs to uid {uid}", f"chown 0 {state / name}")


@_as_root
@pytest.mark.parametrize("link_owner", [0, NOBODY])
@pytest.mark.parametrize("name", ["output", "tmp", "homes", "store"])
def test_link_of_the_state_to_a_users_directory_is_refused(
    certs: Path, public: Path, name: str, link_owner: int
) -> None:
    """Whoever has made the link."""
    state, target = public / "state", public / "target"
    for each in (state, target):
        each.mkdir(mode=0o700)
    os.chown(target, NOBODY, NOBODY)
    (state / name).symlink_to(target)
    os.lchown(state / name, link_owner, link_owner)
    words = "cannot be used" if name == "store" else f"belongs to uid {NOBODY}"
    _refusal_of(state, certs, words)


@_as_root
def test_state_directory_through_a_users_link_or_open_to_a_group_is_refused(
    certs: Path, public: Path
) -> None:
    """The user could let the link lead elsewhere later."""
    state, link = public / "state", public / "link"
    state.mkdir(mode=0o700)
    link.symlink_to(state)
    os.lchown(link, NOBODY, NOBODY)
    _refusal_of(link, certs, f"{link} belongs to uid {NOBODY}")
    state.chmod(0o770)
    _refusal_of(state, certs, f"chmod g-w {state}")


@_as_root
@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_audit_log_in_a_directory_of_others_is_refused(
    certs: Path, public: Path, mode: int
) -> None:
    """They could put another file in its place. At a reload, the server keeps the old file."""
    place, state = public / "place", public / "state"
    place.mkdir()
    place.chmod(mode)
    os.chown(place, *((0, 0) if mode == 0o777 else (NOBODY, NOBODY)))
    _refusal_of(state, certs, str(place), options=["--audit-log", place / "audit.log"])
    assert not (place / "audit.log").exists()
    place.chmod(0o775)  # like /var/log of Ubuntu
    os.chown(place, 0, 0)
    settings = Settings(
        listen="127.0.0.1:0",
        certs=certs,
        state_dir=state,
        enforcement="off",
        isolation="off",
        audit_log=place / "audit.log",
    )
    with Server(settings) as server:
        os.chown(place, NOBODY, NOBODY)
        assert f"{place} belongs to uid {NOBODY}" in " ".join(server.reload())


@_as_root
def test_output_on_another_disk_is_used_through_a_link(certs: Path, public: Path) -> None:
    """At the second start it belongs to the user that the server becomes."""
    state, target = public / "state", public / "target"
    for each in (state, target):
        each.mkdir(mode=0o700)
    (state / "output").symlink_to(target)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for owner in (0, 71_000):
            assert target.stat().st_uid == owner
            run = run_server(
                *("--listen", address, "--limits", "off", "--uids", "71000-71009"),
                *("--certs", certs, "--state-dir", state),
            )
            _assert_one_line(run, f"cannot listen on {address}")  # all else has worked


@pytest.mark.parametrize("name", ["token.key", "uids", "logged-out", "running-time", "audit.log"])
def test_fifo_in_the_state_directory_does_not_hang_the_start(
    certs: Path, tmp_path: Path, name: str
) -> None:
    """It is not a regular file."""
    (tmp_path / "uids").touch(0o600)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name, 0o600)
    options: list[str | Path] = ["--listen", "127.0.0.1:0", "--limits", "off", "--certs", certs]
    _assert_one_line(run_server(*options, "--state-dir", tmp_path), "not a regular file")


@pytest.mark.parametrize("words", ["--config FIFO check", "--users FIFO user list"])
def test_fifo_as_another_file_hangs_no_command(tmp_path: Path, words: str) -> None:
    """Whoever opens a FIFO for reading waits for a writer."""
    os.mkfifo(tmp_path / "FIFO", 0o600)
    named = [str(tmp_path / word) if word == "FIFO" else word for word in words.split()]
    _assert_one_line(run_server(*named), "not a regular file")


def test_failed_start_leaves_nothing_running(
    program: ServerProgram, certs: Path, tmp_path: Path
) -> None:
    """There is no fork server and no thread, and the next server can use the state directory."""
    settings = Settings(
        listen="127.0.0.1:0", certs=certs, state_dir=tmp_path / "state", enforcement="off"
    )

    def running() -> set[int | threading.Thread]:
        return {*children_of(os.getpid()), *threading.enumerate()}

    before = running()
    with pytest.raises(SettingsError, match="Address already in use"):
        Server(replace(settings, listen=program.address))
    assert running() - before == set()
    with Server(settings):
        pass


def test_server_that_must_enforce_limits_and_cannot_says_how_it_could(
    certs: Path, tmp_path: Path
) -> None:
    """With --limits require, the default, it exits with the remedy."""
    options = ["--listen", "127.0.0.1:0", "--certs", str(certs), "--state-dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, _HERE / "server.py", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        if process.stdout.readline():
            process.terminate()
            process.communicate(timeout=GUARD_S)
            pytest.skip("this host can enforce the limits")
        _, stderr = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1
    log, told = re.split(r"^server: ", stderr, maxsplit=1, flags=re.MULTILINE)
    # It may have swept what others left, or tried to.
    unexpected = [line for line in log.splitlines() if " left-over cgroup " not in line]
    assert [line for line in unexpected if not _is_about_isolation(line)] == []
    first, *failures, last = told.splitlines()
    assert first == "this host cannot enforce every limit:"
    assert last == "or accept weaker limits with --limits auto"
    findings = run_server("check").stdout.splitlines()
    failed = [without_cgroup_name(line) for line in findings if line.startswith("FAILED ")]
    assert [without_cgroup_name(line) for line in failures] == failed != []
    assert list(tmp_path.glob("output/*")) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[defaults]\npids = 0\n", ["line 2: defaults.pids", "at least 1, not 0"]),
        ("[limits]\n", ["line 1: limits", "[defaults], [ceilings]"]),
        ("[defaults\n", ["not TOML", "line 1"]),
        (None, ["No such file"]),
    ],
)
def test_bad_configuration_is_told_at_the_start(
    certs: Path, tmp_path: Path, text: str | None, parts: list[str]
) -> None:
    """The error has the file and the line. The server does not listen."""
    path = tmp_path / "limits.toml"
    if text is not None:
        path.write_text(text)
    options: list[str | Path] = ["--listen", "127.0.0.1:0", "--limits", "off"]
    options += ["--state-dir", tmp_path / "state"]
    result = run_server(*options, "--certs", certs, "--config", path)
    _assert_one_line(result, str(path), *parts)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "options",
    [["--max-streams", "0"], ["--max-streams", "x"], ["--limits", "some"], ["--lis", "x"]],
)
def test_wrong_usage_of_the_server_exits_with_2(options: list[str]) -> None:
    """Abbreviated options are not accepted."""
    result = run_server(*options)
    assert (result.returncode, result.stdout) == (2, "")


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("0", "must be at least 1, not 0; write a whole number"),
        ("100001", "must be at most 100000, not 100001; write a whole number"),
        ("1.5", "cannot be '1.5'; write a whole number"),
    ],
)
def test_max_streams_has_the_bounds_of_the_configuration(
    tmp_path: Path, written: str, problem: str
) -> None:
    """The option has the same range and the same error as the key of the file."""
    path = tmp_path / "limits.toml"
    path.write_text(f"[in_all]\nstreams = {written}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    by_option = run_server("--max-streams", written)
    in_file = problem.replace("'", "")  # there it is a number
    assert str(caught.value).endswith(f": {in_file}")
    assert by_option.returncode == 2
    assert by_option.stderr.endswith(f"argument --max-streams: {problem}; see server --help\n")


# --- the program: users -----------------------------------------------------------------


@pytest.mark.parametrize("line", ["hunter2\n", "\ufeffhunter2\r\n", "hunter2"])
def test_user_command_makes_an_entry_that_can_log_in(
    serve: Serve, connect: Connect, tmp_path: Path, line: str
) -> None:
    """It prints a line for the users file, without the password."""
    result = run_server("user", "carol", "--role", "admin", stdin=line)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"carol:admin:scrypt\$17\$8\$1\$[\w-]+\$[\w-]+\n", result.stdout)
    users = tmp_path / "users"
    users.write_text(result.stdout)
    client = connect("", serve(users=users).address)
    client.login("carol", "hunter2")
    assert client.list() == []


@pytest.mark.parametrize(
    ("arguments", "stdin", "problem"),
    [
        (["a:b"], "x\n", "bad user name"),
        (["bob"], "\n", "must not be empty"),
        (["bob"], "", "empty"),
    ],
)
def test_user_command_refuses_what_the_file_could_not_hold(
    arguments: list[str], stdin: str, problem: str
) -> None:
    """It prints one line and no entry."""
    _assert_one_line(run_server("user", *arguments, stdin=stdin), problem)


@pytest.mark.parametrize("second", ["hunter2", "hunter3"])
def test_user_command_asks_twice_at_a_terminal_without_echo(second: str) -> None:
    """Two different answers make no entry. No answer is shown."""
    ours, terminal = pty.openpty()
    with (
        open(ours, "r+b", buffering=0) as keyboard,
        subprocess.Popen(
            [sys.executable, _HERE / "server.py", "user", "bob"],
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=terminal,
            start_new_session=True,
        ) as process,
    ):
        os.close(terminal)
        shown = _read_until(keyboard.fileno(), b"Password for bob: ")
        keyboard.write(b"hunter2\n")
        shown += _read_until(keyboard.fileno(), b"Once more: ")
        keyboard.write(second.encode() + b"\n")
        stdout, _ = process.communicate(timeout=GUARD_S)
        with contextlib.suppress(OSError):  # EIO: the other side is gone
            shown += keyboard.read(1000) or b""
    assert b"hunter" not in shown + stdout
    if second == "hunter2":
        assert process.returncode == 0
        assert stdout.startswith(b"bob:user:scrypt$")
    else:
        assert (process.returncode, stdout) == (1, b"")
        assert b"server: the two passwords differ" in shown


def _read_until(fd: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        assert select.select([fd], [], [], GUARD_S)[0], data
        data += os.read(fd, 1)
    return data


# --- the program: ending ----------------------------------------------------------------


class _Witness:
    """A FIFO that every process of a job holds open: end-of-file means that all have ended."""

    def __init__(self, path: Path) -> None:
        make_fifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # A child in its group, one in a session of its own, one that nobody waits for.
        # A shell says on stderr that SIGTERM has ended its child, if it gets its own one later.
        script = (
            'exec 3>"$0" 2>/dev/null; sleep infinity & setsid sleep infinity & '
            "(setsid sh -c 'sleep infinity; :' &) ; echo ready; exec sleep infinity"
        )
        self.command = ("sh", ["-c", script, str(path)])

    def assert_all_gone(self) -> None:
        assert select.select([self._fd], [], [], GUARD_S)[0]
        assert os.read(self._fd, 1) == b""

    def assert_alive(self) -> None:
        assert not select.select([self._fd], [], [], 0)[0]

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def witness(public: Path) -> Iterator[_Witness]:
    with contextlib.closing(_Witness(public / "witness")) as witness:
        yield witness


def test_server_says_one_line_on_stdout_and_the_rest_on_stderr(start_server: StartServer) -> None:
    """The line is `listening on HOST:PORT`, with the real port."""
    program = start_server()  # which checks the first line
    assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", program.address)
    assert program.end() == 0  # which checks that there is no second
    assert program.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_server_jobs_and_streams(
    start_server: StartServer, connect: Connect, witness: _Witness, number: signal.Signals
) -> None:
    """The exit status is 0; the watchdog would change it. No process of a job is left."""
    program = start_server()
    client = connect("user", program.address)
    job_id = client.start(*witness.command)
    followers = [follow(client, job_id) for _ in range(5)]
    witness.assert_alive()
    with ThreadPoolExecutor(len(followers)) as pool:
        rests = [pool.submit(next, follower) for follower in followers]
        assert program.end(number) == 0, program.log.read_text()
        for rest in rests:
            with pytest.raises(ClientError, match="the server is shutting down"):
                rest.result(GUARD_S)
    witness.assert_all_gone()
    assert f"{number.name}: shutting down" in program.log.read_text()
    with pytest.raises(ClientError) as caught:
        client.status(job_id)
    assert caught.value.code == "UNAVAILABLE"


# At SIGTERM it says bye, and ends 0.2 s later, or never if it is "deaf".
_ON_SIGTERM = """
    trap 'echo bye; [ $0 = deaf ] || { sleep 0.2; exit; }' TERM
    exec 3<> <(:); echo ready; while :; do read -t 1 -u 3 x; done"""


def test_jobs_have_a_grace_when_the_server_ends(
    start_server: StartServer, connect: Connect
) -> None:
    """A polite job ends by itself, and its stream has all of its output. No time-out is needed."""
    program = start_server()
    client = connect("user", program.address)
    follower = follow(client, client.start("bash", ["-c", _ON_SIGTERM, "polite"]))
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(next, follower)
        assert program.end() == 0, program.log.read_text()
        assert rest.result(GUARD_S) == b"bye\n"
    with pytest.raises(ClientError, match="the server is shutting down"):
        next(follower)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_grace(
    start_server: StartServer, connect: Connect, tmp_path: Path, number: signal.Signals
) -> None:
    """A deaf job does not get the minutes that the configuration allows."""
    config = tmp_path / "config.toml"
    config.write_text('[shutdown]\ngrace = "5m"\n')
    program = start_server("--config", str(config))
    client = connect("user", program.address)
    follower = follow(client, client.start("bash", ["-c", _ON_SIGTERM, "deaf"]))
    program.process.send_signal(signal.SIGTERM)
    assert next(follower) == b"bye\n"
    assert program.end(number) == 0, program.log.read_text()
    assert f"{number.name}: killing the jobs" in program.log.read_text()


# A server with a fault. `no_more_threads`: the system has no room for the stacks of further ones.
_FAULTY = """
import sys, threading
import calls, daemon, server

def no_more_threads():
    threading.stack_size(1 << 46)

{}
sys.exit(server.main(sys.argv[1:]))
"""
_ACCEPTING_THREAD_ENDS = """
def submit(*_):
    {}
    raise MemoryError("a fault of the test")

calls.Calls.submit = submit
"""
_NO_THREADS_FOR_THE_END = """
def await_end(*args, old=daemon._await_end):
    number = old(*args)
    no_more_threads()
    return number

daemon._await_end = await_end
"""


@contextlib.contextmanager
def _faulty_server(
    fault: str, certs: Path, state: Path, log: Path
) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """Run a server with this fault; yield it and a client of it."""
    program = [sys.executable, "-c", _FAULTY.format(fault), "--listen", "127.0.0.1:0"]
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [*program, "--limits", "auto", "--certs", certs, "--state-dir", state],
            cwd=_HERE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=clean_environment(),
        ) as process,
    ):
        assert process.stdout
        address = process.stdout.readline().removeprefix("listening on ").strip()
        with Client(address, certs=certs) as client:
            yield process, client


@pytest.mark.parametrize("also", ["pass", "no_more_threads()"])
def test_server_whose_accepting_thread_has_ended_ends_and_says_why(
    certs: Path, make_state: Callable[[], Path], tmp_path: Path, also: str
) -> None:
    """A service manager can restart it. Without this it would live on and answer no call."""
    fault = _ACCEPTING_THREAD_ENDS.format(also)
    with _faulty_server(fault, certs, make_state(), tmp_path / "log") as (process, client):
        with pytest.raises(ClientError):
            client.login("user", "user")
        assert process.wait(GUARD_S) == 1
    log = (tmp_path / "log").read_text()
    assert "gRPC's accepting thread has ended (MemoryError: a fault of the test)" in log


def test_server_that_can_start_no_threads_ends_as_it_should(
    certs: Path, make_state: Callable[[], Path], tmp_path: Path
) -> None:
    """Its jobs get SIGTERM and their grace, and the followers get all of their output."""
    log = tmp_path / "log"
    with _faulty_server(_NO_THREADS_FOR_THE_END, certs, make_state(), log) as (process, client):
        client.login("user", "user")
        follower = follow(client, client.start("bash", ["-c", _ON_SIGTERM, "bash"]))
        process.terminate()
        assert next(follower) == b"bye\n"
        assert process.wait(GUARD_S) == 0, log.read_text()


def test_server_ends_though_a_client_does_not_read(
    start_server: StartServer, connect: Connect
) -> None:
    """A stream whose client does not read cannot delay the end of the server."""
    program = start_server()
    client = connect("user", program.address)
    stalled = client.stream(client.start("cat", ["/dev/zero"]))
    next(stalled)
    assert program.end() == 0, program.log.read_text()


def test_killed_server_leaves_no_process_of_a_job(
    start_server: StartServer, connect: Connect, witness: _Witness
) -> None:
    """The server cannot clean up after SIGKILL; the fork server does."""
    program = start_server()
    client = connect("user", program.address)
    follow(client, client.start(*witness.command))
    witness.assert_alive()
    assert program.end(signal.SIGKILL) == -signal.SIGKILL
    witness.assert_all_gone()


def test_server_whose_fork_server_dies_ends_with_a_status_that_has_it_restarted(
    start_server: StartServer, connect: Connect
) -> None:
    """Its running job ends as lost, and its last words say why. systemd restarts on failure."""
    program = start_server()
    client = connect("user", program.address)
    stream = follow(client, client.start(*FOREVER))
    os.kill(fork_server_of(program.process.pid), signal.SIGKILL)
    assert list(stream) == []
    assert stream.end is not None
    assert stream.end.end_reason == "LOST"
    assert program.process.wait(GUARD_S) == BROKEN_STATUS
    assert "the fork server has died" in program.log.read_text()


def test_logout_survives_every_end_of_the_server(
    start_server: StartServer, connect: Connect, make_state: Callable[[], Path]
) -> None:
    """A logout is on the disk before its answer. Other tokens stay valid."""
    state = make_state()
    program = start_server(state=state)
    client = connect("", program.address)
    token, _ = client.login("user", "user")
    client.logout()
    for number in (signal.SIGKILL, signal.SIGTERM):
        program.end(number)
        program = start_server(state=state)
        client = connect("", program.address, token=token)
        assert call_rpc(client, "ListJobs")[0] == "UNAUTHENTICATED"
        assert connect("user", program.address).list() == []


def test_tokens_and_finished_jobs_survive_a_restart(
    start_server: StartServer, connect: Connect, make_state: Callable[[], Path]
) -> None:
    """The server keeps the key, the jobs and their output, however it has ended."""
    state = make_state()
    job_ids: list[str] = []
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        program = start_server(state=state)
        client = connect("user", program.address)
        assert [job.job_id for job in client.list()] == job_ids
        assert [b"".join(client.stream(job_id)) for job_id in job_ids] == [b"hi\n"] * len(job_ids)
        job_ids.append(run_job(client, "echo", ["hi"]))
        program.end(number)
    assert {path.stem for path in (state / "output").iterdir()} == set(job_ids)


def test_job_that_ran_when_the_server_was_killed_is_lost_and_is_not_run_again(
    start_server: StartServer, connect: Connect, make_state: Callable[[], Path]
) -> None:
    """Its output is there. Its request ID still means it. A job of a clean end is not LOST."""
    state = make_state()
    ends = {signal.SIGKILL: worker_pb.END_REASON_LOST}
    ends[signal.SIGTERM] = worker_pb.END_REASON_SERVER_SHUTDOWN
    for number, reason in ends.items():
        program = start_server(state=state)
        client = connect("user", program.address)
        argv, request_id = ("sh", ["-c", "echo hi; exec sleep infinity"]), str(uuid.uuid4())
        job_id = client.start(*argv, request_id=request_id)
        assert next(iter(client.stream(job_id))) == b"hi\n"
        program.end(number)
        program = start_server(state=state)
        client = connect("user", program.address)
        job = client.status(job_id)
        assert (job.status == worker_pb.JOB_STATUS_RUNNING, job.end_reason) == (False, reason)
        assert b"".join(client.stream(job_id)) == b"hi\n"
        assert client.start(*argv, request_id=request_id) == job_id
        with pytest.raises(ClientError, match="request ID"):
            client.start("true", request_id=request_id)
        program.end(signal.SIGTERM)


def test_backup_of_a_running_server_is_restored_elsewhere(
    start_server: StartServer, connect: Connect, make_state: Callable[[], Path], tmp_path: Path
) -> None:
    """As docs/security.md says: jobs are back, with the output if that was copied, too."""
    state = make_state()
    program = start_server(state=state)
    client = connect("user", program.address)
    first, second = (run_job(client, "echo", [word]) for word in ("first", "second"))
    backup = tmp_path / "job-worker.db"
    run = run_server("--state-dir", state, "backup", backup)
    assert (run.returncode, run.stderr) == (0, "")
    client.remove(run_job(client, "true"))  # after the backup
    program.end(signal.SIGTERM)
    restored = make_state()
    (restored / "store").mkdir(0o700)
    shutil.copy(backup, restored / "store" / "store.db")
    (restored / "output").mkdir(0o700)
    shutil.copy(state / "output" / f"{first}.out", restored / "output")
    program = start_server(state=restored)
    client = connect("user", program.address)
    assert [job.job_id for job in client.list()] == [first, second]
    assert b"".join(client.stream(first)) == b"first\n"
    with pytest.raises(ClientError, match="7 bytes of output were not kept: the file of the outp"):
        list(client.stream(second))
    client.remove(second)
    _assert_one_line(
        run_server("--state-dir", tmp_path / "none", "backup", backup),
        "none/store/store.db is missing; was the right state directory named?",
    )


# --- secrets ----------------------------------------------------------------------------


def test_job_has_nothing_of_the_servers_environment(connect: Connect) -> None:
    """A job has five variables, and only the three standard descriptors."""
    client = connect()
    job_id = client.start("sh", ["-c", "env; ls /proc/$$/fd"])
    lines = b"".join(client.stream(job_id)).decode().splitlines()
    names = {line.partition("=")[0] for line in lines if "=" in line}
    # PWD and the like are the shell's own.
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == JOB_VARIABLES
    assert f"JOB_ID={job_id}" in lines
    assert [line for line in lines if line.isdecimal()] == ["0", "1", "2"]


def test_passwords_and_tokens_are_in_no_log(
    start_server: StartServer, connect: Connect, make_state: Callable[[], Path]
) -> None:
    """The audit log has each login and a job's arguments. No other log has arguments."""
    state = make_state()
    program = start_server(state=state, env={"A_SECRET_OF_THE_SERVER": "do not tell"})
    client = connect("", program.address)
    call_rpc(client, "Login", username="mallory\nforged", password="hunter2")
    token, _ = client.login("user", "user")
    job_id = run_job(client, "echo", ["hunter3"])
    client.logout()
    call_rpc(client, "ListJobs", metadata=[("authorization", f"Bearer {token}")])
    assert program.end() == 0
    log, audit = program.log.read_text(), (state / "audit.log").read_text()
    calls = [json.loads(line) for line in audit.splitlines()]
    assert [(call["rpc"].rpartition("/")[2], call["user"], call["outcome"]) for call in calls] == [
        ("Login", "mallory\nforged", "UNAUTHENTICATED"),
        ("Login", "user", "OK"),
        ("StartJob", "user", "OK"),
        ("StreamOutput", "user", "OK"),
        ("Logout", "user", "OK"),
        ("ListJobs", None, "UNAUTHENTICATED"),
    ]
    assert all(call["peer"].startswith("ipv4:127.0.0.1:") for call in calls)
    assert (calls[2]["job"], calls[2]["argv"]) == (job_id, ["echo", "hunter3"])
    for secret in ("hunter2", "do not tell", token, *token.split(".")[1:]):
        assert secret not in log + audit
    assert "hunter3" not in log
