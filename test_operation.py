"""Tests of the whole server: the real program during floods, reloads and full disks, and at its
ceilings. The modules' tests prove the parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

import workerservice_pb2 as worker_pb
from client import Client, ClientError
from store import reading
from testkit import (
    ABSENT,
    FOREVER,
    GUARD_S,
    ServerProgram,
    children_of,
    clean_environment,
    small_file_system,
)
from testproxy import Proxy
from users import SEEDED_USERS, Role, User, make_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from connection import OutputStream

    Connect = Callable[..., Client]
    Start = Callable[..., "_Program"]

_HERE = Path(__file__).resolve().parent
_PEERS = [f"peer{number}" for number in range(10)]
_PASSWORD = "correct horse battery staple"
_AUTH, _WORKER = "/jobworker.v1.AuthService", "/jobworker.v1.WorkerService"
_HASH_BYTES = 128 * 1024 * 1024  # what a scrypt of ours takes


class _Log:
    """The stderr of a program, and a way to wait for a text in it.

    Is given to `ServerProgram` in the place of a file.
    """

    def __init__(self) -> None:
        # Guards the text. Notified when there is more of it, or no more to come.
        self._changed = threading.Condition()
        self._text = ""
        self._ended = False

    def open(self, _: str) -> Any:
        read_fd, write_fd = os.pipe()
        threading.Thread(target=self._read, args=(read_fd,), daemon=True).start()
        return os.fdopen(write_fd, "wb")

    def _read(self, fd: int) -> None:
        with os.fdopen(fd, encoding="utf-8") as lines:
            for line in lines:
                with self._changed:
                    self._text += line
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def read_text(self) -> str:
        with self._changed:
            return self._text

    def await_text(self, pattern: str, start: int = 0) -> str:
        """Block until `pattern` is in the text after position `start`; return that text."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: self._ended or re.search(pattern, self._text[start:]), GUARD_S
            ), self._text
            assert re.search(pattern, self._text[start:]), self._text
            return self._text[start:]


class _Program(ServerProgram):
    """A server program and its log. Attributes: `audit`, `state` (paths)."""

    def __init__(self, state: Path, audit: Path | None, *options: str) -> None:
        self.state = state
        self.audit = audit or state / "audit.log"
        self._log = _Log()
        if audit:
            options = (*options, "--audit-log", str(audit))
        super().__init__(
            cast("Path", self._log),
            *("--listen", "127.0.0.1:0", "--limits", "auto", "--state-dir", str(state)),
            *options,
        )

    def reload(self) -> list[str]:
        """Send SIGHUP; return the errors that are logged until that is done."""
        start = len(self.log.read_text())
        self.process.send_signal(signal.SIGHUP)
        text = self._log.await_text(
            "certificates are in force|certificates have not changed|certificates stay", start
        )
        return [line for line in text.splitlines() if " ERROR " in line]

    def await_log(self, pattern: str) -> str:
        return self._log.await_text(pattern)

    def records(self) -> list[dict[str, Any]]:
        return _records(self.audit)


def _records(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    assert re.fullmatch(rb"[\x20-\x7e\n]*", data)
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture(scope="module")
def peers(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates, with some more for clients."""
    directory = tmp_path_factory.mktemp("peers")
    shutil.copytree(certs, directory, dirs_exist_ok=True)
    command = [str(_HERE / "certs" / "generate.sh"), "--dir", str(directory), *_PEERS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory


@pytest.fixture(scope="module")
def alice() -> User:
    return make_user("alice", "user", _PASSWORD)


@pytest.fixture
def start(certs: Path, make_state: Callable[[], Path], tmp_path: Path) -> Iterator[Start]:
    """Start a server with a configuration, users and more options."""
    with contextlib.ExitStack() as programs:

        def start(
            *options: str,
            config: str = "",
            users: Sequence[User] = (),
            certs: Path = certs,
            audit: Path | None = None,
        ) -> _Program:
            if config:
                path = tmp_path / f"{uuid.uuid4()}.toml"
                path.write_text(config)
                options = (*options, "--config", str(path))
            if users:
                _write_users(tmp_path / "users", users)
                options = (*options, "--users", str(tmp_path / "users"))
            program = _Program(make_state(), audit, "--certs", str(certs), *options)
            programs.enter_context(program.process)
            programs.callback(program.process.kill)
            return program

        yield start


def _write_users(path: Path, users: Sequence[User]) -> None:
    path.touch(0o600)
    path.write_text("".join(f"{user}\n" for user in users))


def _as_root() -> None:
    if os.geteuid() != 0:
        if os.environ.get("JOBWORKER_REQUIRE_KERNEL") == "1":
            pytest.fail("JOBWORKER_REQUIRE_KERNEL=1, but this test needs root")
        pytest.skip("needs root")


def _refusal(call: Callable[..., Any], *arguments: Any) -> ClientError:
    """Make a call that must fail; return its error."""
    with pytest.raises(ClientError) as caught:
        call(*arguments)
    return caught.value


def _finish(client: Client, command: str = "true", args: Sequence[str] = ()) -> str:
    """Run a job to its end; return its ID."""
    job_id = client.start(command, args)
    with contextlib.suppress(ClientError):  # DATA_LOSS
        list(client.stream(job_id))
    return job_id


def _follow(client: Client, job_id: str) -> OutputStream:
    """Open a stream of a job that is `FOREVER`; the server has admitted it when this returns."""
    chunks = client.stream(job_id)
    assert next(chunks) == b"ready\n"
    return chunks


# --- logins -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flooded(
    peers: Path,
    alice: User,
    make_state: Callable[[], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[_Program]:
    """A server with the seeded users and Alice, for the tests of logins."""
    users = tmp_path_factory.mktemp("users") / "users"
    _write_users(users, (*SEEDED_USERS, alice))
    program = _Program(make_state(), None, "--certs", str(peers), "--users", str(users))
    with program.process:
        yield program
        assert program.end() == 0


def _peer(address: str, peers: Path, name: str) -> Client:
    """A client; each name is another peer for the throttle."""
    return Client(address, certs=peers, cert=peers / f"{name}.pem", key=peers / f"{name}-key.pem")


def _memory(pid: int, field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) * 1024


def test_login_flood_neither_stops_the_others_nor_takes_memory(
    flooded: _Program, peers: Path, connect: Connect
) -> None:
    """Every Status is answered meanwhile. One password is hashed at a time."""
    client = connect("user", flooded.address)
    job_id = _finish(client)
    before = _memory(flooded.process.pid, "VmRSS")
    codes: list[str] = []

    def flood(name: str, user: str, password: str) -> None:
        with _peer(flooded.address, peers, name) as attacker:
            try:
                attacker.login(user, password)
                codes.append("OK")
            except ClientError as error:
                codes.append(error.code)

    logins = [("admin", "guess"), ("user", "user"), ("nobody", "guess")]
    answered = 0
    with ThreadPoolExecutor(len(_PEERS) * len(logins)) as pool:
        floods = [pool.submit(flood, name, *login) for login in logins for name in _PEERS]
        while not all(each.done() for each in floods):
            assert client.status(job_id).exit_code == 0
            answered += 1
        for each in floods:
            each.result()
    # On a busy host a login can wait longer than its client does.
    hashed = [code for code in codes if code not in {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}]
    assert set(hashed) <= {"OK", "UNAUTHENTICATED"}
    assert len(hashed) >= 4
    assert answered > len(hashed)
    assert _memory(flooded.process.pid, "VmHWM") - before < 1.5 * _HASH_BYTES


def _guess_until_refused(client: Client, name: str) -> ClientError:
    """Fail until refused: three times, or more if this test was slower than the wait."""
    for tries in range(8):
        error = _refusal(client.login, name, "guess")
        if error.code == "RESOURCE_EXHAUSTED":
            assert tries >= 3
            return error
        assert error.code == "UNAUTHENTICATED"
    raise error


def test_guesser_has_to_wait_while_the_true_user_logs_in_from_elsewhere(
    flooded: _Program, peers: Path
) -> None:
    """The refusal has the same words for an existing and for an unknown user."""
    with (
        _peer(flooded.address, peers, "client") as attacker,
        _peer(flooded.address, peers, "other") as true_user,
    ):
        refusals = [_guess_until_refused(attacker, name) for name in ("alice", "nobody")]
        words = {re.sub(r"\d+ s", "N s", str(error)) for error in refusals}
        assert words == {"too many failed logins for this user from here; try again in N s"}
        assert all(error.retry_after_s for error in refusals)
        stop = threading.Event()

        def go_on() -> None:
            while not stop.is_set():
                assert _refusal(attacker.login, "alice", "guess").code in {
                    "RESOURCE_EXHAUSTED",
                    "UNAUTHENTICATED",
                }

        with ThreadPoolExecutor(1) as pool:
            attack = pool.submit(go_on)
            try:
                true_user.login("alice", _PASSWORD)
            finally:
                stop.set()
            attack.result()
        assert true_user.list() == []


def test_addresses_give_one_certificate_no_more_guesses_and_lock_nobody_out(
    flooded: _Program, peers: Path
) -> None:
    """Of 32 guesses from 16 addresses a few are checked, and another user logs in meanwhile."""
    codes: list[str] = []
    begun = threading.Event()

    def guess(source: str) -> None:
        proxy = Proxy(flooded.address, source=source)
        try:
            with _peer(proxy.address, peers, "peer1") as attacker:
                for _ in range(2):
                    codes.append(_refusal(attacker.login, "alice", "guess").code)
                    begun.set()
        finally:
            proxy.close()

    with _peer(flooded.address, peers, "peer2") as other, ThreadPoolExecutor(16) as pool:
        attacks = [pool.submit(guess, f"127.0.0.{number}") for number in range(1, 17)]
        assert begun.wait(GUARD_S)
        other.login("user", "user")
        for each in attacks:
            each.result()
    assert set(codes) == {"RESOURCE_EXHAUSTED", "UNAUTHENTICATED"}
    # After six failures each further guess has to wait, for 2, 4, 8 and 16 seconds.
    assert codes.count("UNAUTHENTICATED") <= 10
    sources = {json.loads(line)["peer"] for line in flooded.audit.read_text().splitlines()}
    assert {f"127.0.0.{number}" for number in range(1, 17)} <= {
        source.split(":")[1] for source in sources if source.startswith("ipv4:")
    }


def test_passwords_and_tokens_are_written_nowhere(flooded: _Program, peers: Path) -> None:
    """No log, audit log, error or command line has one."""
    guess, forged = "the hunter's second guess", "a.forged.token"
    told = []
    with _peer(flooded.address, peers, _PEERS[0]) as client:
        told.append(str(_refusal(client.login, "mallory", guess)))
        token, _ = client.login("alice", _PASSWORD)
        client.start("sleep", ["infinity"])
        client.logout()
        client.token = token
        told.append(str(_refusal(client.list)))
        client.token = forged
        told.append(str(_refusal(client.list)))
    ours = [flooded.process.pid, *children_of(flooded.process.pid)]
    told += [Path(f"/proc/{pid}/cmdline").read_text() for pid in ours]
    told += [Path(f"/proc/{pid}/environ").read_text() for pid in ours]
    told += [flooded.log.read_text(), flooded.audit.read_text()]
    kept = [path for path in flooded.state.rglob("*") if path.is_file() and path.suffix != ".key"]
    assert "store.db-wal" in [path.name for path in kept]
    told += [path.read_text(errors="replace") for path in kept]
    for secret in (guess, forged, _PASSWORD, token):
        assert not [text for text in told if secret in text]


# --- reloading ---------------------------------------------------------------------------


@pytest.fixture
def live(certs: Path, tmp_path: Path) -> Path:
    """A copy of the certificates that only root may read."""
    directory = tmp_path / "live"
    shutil.copytree(certs, directory)
    _only_for_root(directory)
    return directory


def _only_for_root(directory: Path) -> None:
    directory.chmod(0o700)
    for path in directory.iterdir():
        path.chmod(0o600)


_LINES_FOR_EVER = "i=0; while :; do echo $i; i=$((i + 1)); sleep 0.002; done"


def test_new_certificates_and_users_are_taken_up_under_an_open_stream(  # noqa: PLR0913
    start: Start, live: Path, foreign_certs: Path, connect: Connect, alice: User, tmp_path: Path
) -> None:
    """The stream continues to the last byte. New connections need the new certificates."""
    _as_root()
    program = start(certs=live, users=SEEDED_USERS)
    client = connect("user", program.address)
    job_id = client.start("sh", ["-c", _LINES_FOR_EVER])
    chunks = client.stream(job_id)
    output = next(chunks)
    for name in ("server.pem", "server-key.pem", "client-ca.pem"):
        shutil.copy(foreign_certs / name, live)
    _only_for_root(live)
    _write_users(tmp_path / "users", (*SEEDED_USERS, alice))
    assert program.reload() == []
    output += next(chunks)
    assert client.status(job_id).status == worker_pb.JOB_STATUS_RUNNING  # on the old connection
    assert _refusal(connect("user", program.address).list).code == "UNAVAILABLE"
    newcomer = Client(program.address, certs=foreign_certs)
    newcomer.login("alice", _PASSWORD)
    newcomer_job = newcomer.start("id", ["-u"])
    uid = int(b"".join(newcomer.stream(newcomer_job)))
    newcomer.close()
    with reading(program.state / "store") as store:
        uids = dict(store.execute("SELECT name, uid FROM uids"))
    assert uids.keys() == {"user", "admin", "alice"}
    assert uids["alice"] == uid
    for _ in range(3):  # of what has not changed
        assert program.reload() == []
        output += next(chunks)
    client.stop(job_id)
    output += b"".join(chunks)
    numbers = output.split(b"\n")
    assert numbers == [b"%d" % number for number in range(len(numbers) - 1)] + [b""]
    assert len(output) == client.status(job_id).output_bytes


def _instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def test_broken_files_are_reported_and_the_old_ones_stay_in_force(
    start: Start, live: Path, foreign_certs: Path, connect: Connect, tmp_path: Path
) -> None:
    """One line for each names the file. A FIFO in place of a file delays nobody."""
    audit = tmp_path / "audit.log"
    program = start(certs=live, users=SEEDED_USERS, audit=audit)
    users = tmp_path / "users"
    good = users.read_bytes()
    damages: list[tuple[str, Path, Callable[[Path], object]]] = [
        ("users stay .* No such file", users, Path.unlink),
        ("users stay .* no users in it", users, lambda path: path.write_bytes(b"")),
        ("users, line 3: not NAME:ROLE", users, lambda path: path.write_bytes(good + b"x\n")),
        ("users, line 1: not NAME:ROLE", users, lambda path: path.write_bytes(b"\xff\xfe")),
        ("users, line 3: a second", users, lambda path: path.write_bytes(good + good[:99])),
        ("users stay .* not a regular file", users, lambda path: _instead(path, Path.mkdir)),
        ("users stay .* not a reg", users, lambda path: _instead(path, os.mkfifo)),
        ("server.pem missing", live / "server.pem", Path.unlink),
        ("server.pem is not a cert", live / "server.pem", lambda path: path.write_text("x")),
        ("client-ca.pem is not a cert", live / "client-ca.pem", lambda path: path.write_text("")),
        (
            "server-key.pem is not the key",
            live / "server-key.pem",
            lambda path: shutil.copy(foreign_certs / "server-key.pem", path),
        ),
        ("audit log stays .* other users may read", audit, lambda path: path.chmod(0o644)),
        ("audit log stays .* not a reg", audit, lambda path: _instead(path, Path.mkdir)),
    ]
    for problem, path, damage in damages:
        before = path.read_bytes()
        damage(path)
        (line,) = program.reload()
        assert re.search(problem, line)
        assert connect("user", program.address).list() == []
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.touch(0o600)
        path.write_bytes(before)
        assert program.reload() == []
    assert connect("admin", program.address).list() == []


def test_users_who_change_lose_their_tokens_and_streams_and_others_do_not(
    start: Start, connect: Connect, alice: User, tmp_path: Path
) -> None:
    """One is removed, one gets another role, one another password. Jobs continue.

    The job of somebody who is gone is an admin's to stop; it is theirs again if they come back.
    """
    before = {name: replace(alice, name=name) for name in ("gone", "promoted", "rekeyed")}
    program = start(users=(*SEEDED_USERS, *before.values()))
    clients = {"user": connect("user", program.address)}
    for name in before:
        clients[name] = connect("", program.address)
        clients[name].login(name, _PASSWORD)
    jobs = {name: client.start(*FOREVER) for name, client in clients.items()}
    streams = {name: _follow(client, jobs[name]) for name, client in clients.items()}
    changed = (
        replace(before["promoted"], role=Role.ADMIN),
        replace(before["rekeyed"], password_hash=SEEDED_USERS[0].password_hash),
    )
    _write_users(tmp_path / "users", (*SEEDED_USERS, *changed))
    assert program.reload() == []
    for name in before:
        assert _refusal(next, streams[name]).code == "UNAUTHENTICATED"
        assert _refusal(clients[name].status, jobs[name]).code == "UNAUTHENTICATED"
    assert clients["user"].status(jobs["user"]).subscribers == ["user"]
    admin = connect("admin", program.address)
    assert {job.owner for job in admin.list() if job.status == worker_pb.JOB_STATUS_RUNNING} == {
        "user",
        *before,
    }
    assert admin.stop(jobs["gone"]).end_reason == worker_pb.END_REASON_STOPPED_BY_ADMIN
    clients["user"].stop(jobs["user"])
    assert list(streams["user"]) == []
    _write_users(tmp_path / "users", (*SEEDED_USERS, before["gone"]))
    assert program.reload() == []
    clients["gone"].login("gone", _PASSWORD)
    assert [job.job_id for job in clients["gone"].list()] == [jobs["gone"]]
    ends = [
        (record["user"], record["outcome"])
        for record in program.records()
        if record["rpc"] == f"{_WORKER}/StreamOutput"
    ]
    assert sorted(ends[4:]) == sorted((name, "UNAUTHENTICATED") for name in before)


# --- ceilings ----------------------------------------------------------------------------


def test_running_jobs_and_streams_have_ceilings_that_every_end_gives_back(
    start: Start, connect: Connect
) -> None:
    """The quotas of one user and of all users. A failed or refused call uses up nothing."""
    program = start(
        "--max-streams",
        "3",
        config="[per_user]\nrunning_jobs = 2\nstreams = 2\n"
        "[in_all]\nrunning_jobs = 3\nstreams = 50\n",
    )
    user, admin = connect("user", program.address), connect("admin", program.address)
    jobs = [user.start(*FOREVER) for _ in range(2)]
    for _ in range(30):
        error = _refusal(user.start, "true")
        assert error.code == "RESOURCE_EXHAUSTED"
        assert "user user has 2 running jobs" in str(error)
        assert "(per_user.running_jobs)" in str(error)
        user.stop(jobs.pop(0))
        _finish(user)
        for _ in range(3):
            assert _refusal(user.start, "no-such-command").code == "INVALID_ARGUMENT"
        jobs.append(user.start(*FOREVER))
    admins = admin.start(*FOREVER)
    error = _refusal(admin.start, "true")
    assert error.code == "RESOURCE_EXHAUSTED"
    assert "(in_all.running_jobs)" in str(error)
    user.stop(jobs.pop())
    ended = _finish(admin)

    streams = [_follow(user, jobs[0]) for _ in range(2)]
    for _ in range(30):
        error = _refusal(next, user.stream(jobs[0]))
        assert error.code == "RESOURCE_EXHAUSTED"
        assert "user user has 2 open streams" in str(error)
        assert "(per_user.streams)" in str(error)
        assert _refusal(next, admin.stream(ended, 1)).code == "OUT_OF_RANGE"
        assert list(admin.stream(ended)) == []
    last = _follow(admin, admins)
    error = _refusal(next, admin.stream(admins))
    assert error.code == "RESOURCE_EXHAUSTED"
    assert "all 3 output streams are in use (in_all.streams)" in str(error)
    admin.stop(admins)
    assert list(last) == []
    assert list(admin.stream(ended)) == []
    for _ in range(30):
        streams.pop().close()
        streams.append(_follow_when_admitted(user, jobs[0]))
    user.stop(jobs[0])
    assert [list(each) for each in streams] == [[], []]


def _follow_when_admitted(client: Client, job_id: str) -> OutputStream:
    """Like `_follow`, repeated until the server has noticed that the former client is gone."""
    deadline = time.monotonic() + GUARD_S
    while True:
        try:
            return _follow(client, job_id)
        except ClientError as error:
            if error.code != "RESOURCE_EXHAUSTED" or time.monotonic() > deadline:
                raise


def test_killed_clients_give_their_streams_back(
    start: Start, connect: Connect, certs: Path, tokens: dict[str, str]
) -> None:
    """The clients are processes that die during a silent stream."""
    program = start(config="[per_user]\nstreams = 2\n")
    client = connect("user", program.address)
    job_id = client.start(*FOREVER)
    command = [sys.executable, str(_HERE / "client.py"), "stream", "-j", job_id]
    environment = clean_environment() | {
        "JOBWORKER_SERVER": program.address,
        "JOBWORKER_CERTS": str(certs),
        "JOBWORKER_TOKEN": tokens["user"],
    }
    for _ in range(2):
        with contextlib.ExitStack() as processes:
            for _ in range(2):
                process = processes.enter_context(
                    subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
                )
                assert process.stdout
                assert process.stdout.readline() == b"ready\n"
                processes.callback(process.kill)
            assert _refusal(next, client.stream(job_id)).code == "RESOURCE_EXHAUSTED"
        streams = [_follow_when_admitted(client, job_id) for _ in range(2)]
        for each in streams:
            each.close()
        _follow_when_admitted(client, job_id).close()
        for each in [_follow_when_admitted(client, job_id) for _ in range(2)]:
            each.close()


def test_starts_have_a_rate_of_which_refused_ones_take_nothing(
    start: Start, connect: Connect
) -> None:
    """A user who starts too fast does not slow down another. Both learn when to try again."""
    program = start(
        config="[per_user]\nstarts_per_second = 0.01\nstart_burst = 3\n"
        "[in_all]\nstarts_per_second = 0.02\nstart_burst = 5\n"
    )
    user, admin = connect("user", program.address), connect("admin", program.address)
    for _ in range(3):
        _finish(user)
    for _ in range(20):
        error = _refusal(user.start, "true")
        assert error.code == "RESOURCE_EXHAUSTED"
        assert "more than 0.01 starts per second of user user (per_user.starts_per" in str(error)
        assert error.retry_after_s
        assert 1 < error.retry_after_s <= 100
    for _ in range(2):
        _finish(admin)
    error = _refusal(admin.start, "true")
    assert "more than 0.02 starts per second of all users together (in_all.starts_p" in str(error)
    assert error.retry_after_s
    assert 1 < error.retry_after_s <= 50


_SIX_KIB_LEFT = "[per_job]\nkept_output = '64K'\n[per_user]\nkept_output = '70K'\n"


def test_output_past_a_ceiling_is_counted_and_told_and_blocks_no_job(
    start: Start, connect: Connect, certs: Path, tokens: dict[str, str]
) -> None:
    """The ceilings of a job, a user and all users. Status and streams tell the lost bytes."""
    program = start(config=_SIX_KIB_LEFT + "[in_all]\nkept_output = '80K'\n")
    user, admin = connect("user", program.address), connect("admin", program.address)
    written, kib = 100_003, 1024

    def hold(client: Client, kept: int) -> None:
        """Run a job with that much output, which keeps running: a finished job would make room."""
        script = 'head -c "$1" /dev/zero; exec sleep infinity'
        chunks = client.stream(client.start("sh", ["-c", script, "sh", str(written)]))
        while kept > 0:
            kept -= len(next(chunks))
        chunks.close()

    for name, client, kept in (
        ("this job's ceiling of 64 KiB (per_job.kept_output)", user, 64 * kib),
        ("user user's ceiling of 70 KiB (per_user.kept_output)", user, 6 * kib),
        ("the ceiling of 80 KiB for all users together (in_all.kept_output)", admin, 16 * kib),
    ):
        job_id = _finish(client, "head", ["-c", str(written), "/dev/zero"])
        chunks: list[bytes] = []
        error = _refusal(chunks.extend, client.stream(job_id))
        lost = written - kept
        assert error.code == "DATA_LOSS"
        assert str(error) == f"{lost} bytes of output were not kept: {name} is reached"
        assert b"".join(chunks) == bytes(kept)
        job = client.status(job_id)
        assert (job.exit_code, job.end_reason) == (0, worker_pb.END_REASON_EXITED)
        assert (job.output_bytes, job.output_lost_bytes) == (kept, lost)
        run = subprocess.run(
            [sys.executable, str(_HERE / "client.py"), "stream", "-j", job_id],
            env=clean_environment()
            | {"JOBWORKER_SERVER": program.address, "JOBWORKER_CERTS": str(certs)}
            | {"JOBWORKER_TOKEN": tokens["user" if client is user else "admin"]},
            capture_output=True,
            timeout=GUARD_S,
            check=False,
        )
        assert (run.returncode, run.stdout) == (1, bytes(kept))
        gap = f"client: ... {lost} bytes, from byte {kept // 2} on, were not kept ...\n"
        assert run.stderr.decode() == f"{gap}client: {error}\n"
        client.remove(job_id)
        if "per_job" in name:
            hold(user, 64 * kib)
    hold(user, 6 * kib)
    hold(admin, 10 * kib)
    for client, key in ((user, "per_user.kept_output"), (admin, "in_all.kept_output")):
        error = _refusal(client.start, "true")
        assert error.code == "RESOURCE_EXHAUSTED"
        assert f"({key})" in str(error)


def test_requests_have_a_size_and_arguments_a_number_and_a_length(
    start: Start, connect: Connect
) -> None:
    """The ceiling can be reached but not exceeded. The answer names the ceiling."""
    program = start(config="[requests]\nsize = '8K'\nargs = 5\narg_length = 1000\n")
    client = connect("user", program.address)
    _finish(client, "true", ["x" * 1000] * 5)
    for command, args, key in (
        ("true", ["x"] * 6, "requests.args"),
        ("true", ["x" * 1001], "requests.arg_length"),
        ("true", ["\N{SNOWMAN}" * 334], "requests.arg_length"),  # three bytes each
        ("x" * 1001, [], "requests.arg_length"),
    ):
        error = _refusal(client.start, command, args)
        assert error.code == "INVALID_ARGUMENT"
        assert f"({key})" in str(error)
    for size in (8193, 16_000):
        error = _refusal(client.start, "true", ["x" * size])
        assert error.code == "RESOURCE_EXHAUSTED"
        assert "(requests.size)" in str(error)
    before = len(program.records())
    for _ in range(3):  # gRPC's own refusal
        error = _refusal(client.start, "true", ["x" * 100_000])
        assert error.code == "RESOURCE_EXHAUSTED"
    _finish(client)
    outcomes = [record["outcome"] for record in program.records()[before:]]
    assert len(outcomes) == 5
    assert set(outcomes[:-2]) <= {"CANCELLED", "INVALID_ARGUMENT"}


# --- the audit log -----------------------------------------------------------------------


def _raw(client: Client, method: str, data: bytes, token: str | None = None) -> str:
    """Call any method with any bytes; return the name of the status."""
    rpc: Any = client._channel.unary_stream(method)
    metadata = client._link.metadata() if token is None else (("authorization", f"Bearer {token}"),)
    call = rpc(data, metadata=metadata if token != "" else (), timeout=GUARD_S)
    with contextlib.suppress(grpc.RpcError):
        list(call)
    name: str = call.code().name
    return name


def test_every_call_has_a_line_with_what_was_decided(  # noqa: PLR0915 -- it is every call
    start: Start, connect: Connect, certs: Path, tokens: dict[str, str]
) -> None:
    """The line has user, peer, method, job and, for a refusal, the reason."""
    program = start()
    user, admin = connect("user", program.address), connect("admin", program.address)
    hostile = "mallory\n{}\r\x1b[2J\u2028\u2029\x85\x00\"\\'"
    calls: list[tuple[str, str | None, str | None, list[str] | None, str]] = []

    def expect(rpc: str, by: str | None, job: str | None, outcome: str, *argv: str) -> None:
        calls.append((rpc, by, job, list(argv) or None, outcome))

    absent = worker_pb.GetJobStatusRequest(job_id=ABSENT).SerializeToString()
    argv = ["printf", "%s", hostile.replace("\0", "")]
    begun = datetime.now(UTC)
    job_id = user.start(argv[0], argv[1:])
    expect("StartJob", "user", job_id, "OK", *argv)
    list(user.stream(job_id))
    expect("StreamOutput", "user", job_id, "OK")
    user.status(job_id)
    expect("GetJobStatus", "user", job_id, "OK")
    user.list()
    expect("ListJobs", "user", None, "OK")
    admin.stop(job_id)
    expect("StopJob", "admin", job_id, "OK")
    foreign = _finish(admin)
    expect("StartJob", "admin", foreign, "OK", "true")
    expect("StreamOutput", "admin", foreign, "OK")
    for call, rpc in ((user.status, "GetJobStatus"), (user.stop, "StopJob")):
        assert _refusal(call, foreign).code == "NOT_FOUND"
        expect(rpc, "user", foreign, "NOT_FOUND")
    assert _refusal(next, user.stream(foreign)).code == "NOT_FOUND"
    expect("StreamOutput", "user", foreign, "NOT_FOUND")
    assert _refusal(next, user.stream(job_id, 1 << 40)).code == "OUT_OF_RANGE"
    expect("StreamOutput", "user", job_id, "OUT_OF_RANGE")
    assert _raw(user, f"{_WORKER}/GetJobStatus", absent) == "NOT_FOUND"
    expect("GetJobStatus", "user", ABSENT, "NOT_FOUND")
    assert _refusal(user.status, hostile).code == "INVALID_ARGUMENT"
    expect("GetJobStatus", "user", None, "INVALID_ARGUMENT")
    assert _refusal(user.start, "no such\ncommand").code == "INVALID_ARGUMENT"
    expect("StartJob", "user", None, "INVALID_ARGUMENT", "no such\ncommand")
    for token in ("", "x", tokens["user"][:-1]):
        for rpc in ("StartJob", "StreamOutput"):
            assert _raw(user, f"{_WORKER}/{rpc}", b"", token) == "UNAUTHENTICATED"
            expect(rpc, None, None, "UNAUTHENTICATED")
    assert _raw(user, f"{_WORKER}/StopJob", b"\xff") == "INVALID_ARGUMENT"
    expect("StopJob", "user", None, "INVALID_ARGUMENT")
    large = worker_pb.StartJobRequest(command="x" * (1 << 20)).SerializeToString()
    assert _raw(user, f"{_WORKER}/StartJob", large) == "RESOURCE_EXHAUSTED"
    expect("StartJob", "user", None, "RESOURCE_EXHAUSTED")
    assert _raw(user, f"{_WORKER}/Restart", b"") == "UNIMPLEMENTED"
    expect("Restart", None, None, "UNIMPLEMENTED")
    stranger = connect("", program.address)
    assert _refusal(stranger.login, hostile, "x").code == "UNAUTHENTICATED"
    expect("Login", hostile, None, "UNAUTHENTICATED")
    stranger.login("user", "user")
    expect("Login", "user", None, "OK")
    stranger.logout()
    expect("Logout", "user", None, "OK")

    records = program.records()
    told = [
        (record["rpc"].rpartition("/")[2], *(record[k] for k in ("user", "job", "argv", "outcome")))
        for record in records
    ]
    assert told == calls
    certificate = ssl.PEM_cert_to_DER_cert((certs / "client.pem").read_text())
    for record in records:
        assert list(record) == [
            *("time", "peer", "certificate", "user", "role", "rpc", "job", "argv"),
            *("outcome", "reason"),
        ]
        assert begun <= datetime.fromisoformat(record["time"]) <= datetime.now(UTC)
        assert record["peer"].startswith("ipv4:127.0.0.1:")
        assert record["certificate"] == hashlib.sha256(certificate).hexdigest()
        is_known = record["outcome"] != "UNAUTHENTICATED" and record["user"]
        assert record["role"] == (record["user"] if is_known else None)  # seeded users
        assert bool(record["reason"]) == (record["outcome"] != "OK")
    assert {
        r["reason"] for r in records if r["job"] == foreign and r["outcome"] == "NOT_FOUND"
    } == {"the job is not theirs"}
    assert program.audit.stat().st_mode & 0o777 == 0o600


def test_rotation_loses_no_line_under_load(start: Start, connect: Connect, tmp_path: Path) -> None:
    """Each call is in exactly one of the files."""
    audit = tmp_path / "audit.log"
    program = start(audit=audit)
    client = connect("user", program.address)
    job_ids = [str(uuid.uuid4()) for _ in range(600)]
    files: list[Path] = []
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(_refusal, client.status, job_id) for job_id in job_ids]
        while not all(call.done() for call in calls):
            files.append(tmp_path / f"audit.log.{len(files)}")
            audit.rename(files[-1])
            assert program.reload() == []
    recorded = [record["job"] for path in (*files, audit) for record in _records(path)]
    assert sorted(recorded) == sorted(job_ids)
    assert len([path for path in files if path.stat().st_size]) > 1


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 64 KiB."""
    with small_file_system("64k") as path:
        yield path


def _fill(audit: Path) -> Path:
    """Fill the disk and the last page of the audit log; return a file whose deletion makes room."""
    filler = audit.with_name("filler")
    for path in (filler, audit):
        with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b" ")  # what may stand before a record
    return filler


def test_full_disk_is_reported_once_and_does_not_stop_the_service(
    start: Start, connect: Connect, small_disk: Path
) -> None:
    """The end is reported too, with the number of lost records."""
    program = start(audit=small_disk / "audit.log")
    client = connect("user", program.address)
    client.list()
    filler = _fill(program.audit)
    for _ in range(20):
        job_id = _finish(client)
        client.stop(job_id)
    filler.unlink()
    client.list()
    text = program.await_log("can be written again; 60 records were lost")
    assert text.count("the audit log cannot be written: No space left on device") == 1
    assert [record["rpc"] for record in program.records()] == [f"{_WORKER}/ListJobs"] * 2


def test_what_cannot_be_recorded_is_refused_if_it_must_be(
    start: Start, connect: Connect, small_disk: Path
) -> None:
    """Logins, starts and streams are refused until there is room again.

    Stop, Remove and Logout are not refused: they make room, or end what a token may do.
    """
    program = start("--audit-required", "--max-streams", "1", audit=small_disk / "audit.log")
    client = connect("user", program.address)
    other, third = connect("", program.address), connect("", program.address)
    for each in (other, third):
        each.login("user", "user")
    job_id, to_stop = (client.start(*FOREVER) for _ in range(2))
    filler = _fill(program.audit)
    stranger = connect("", program.address)
    refusals = [
        *(_refusal(next, client.stream(job_id)) for _ in range(3)),
        *(_refusal(client.start, *FOREVER) for _ in range(3)),
        _refusal(client.list),
        _refusal(client.status, ABSENT),
        _refusal(stranger.login, "user", "user"),
    ]
    assert {(error.code, str(error)) for error in refusals} == {
        ("UNAVAILABLE", "the audit log cannot be written; tell the operator")
    }
    assert stranger.token == ""
    assert client.stop(to_stop).status == worker_pb.JOB_STATUS_STOPPED
    client.remove(to_stop)
    third.logout()
    log = program.await_log("NOT IN THE AUDIT LOG.*Logout")
    for rpc, job in (("StopJob", to_stop), ("RemoveJob", to_stop), ("Logout", "null")):
        assert re.search(f"CRITICAL NOT IN THE AUDIT LOG.*{rpc}.*{job}", log)
    filler.unlink()
    assert _refusal(third.list).code == "UNAUTHENTICATED"
    jobs = {job.job_id: job.status for job in client.list()}
    assert jobs == {job_id: worker_pb.JOB_STATUS_RUNNING}
    assert len(other.list()) == 1
    chunks = _follow(client, job_id)
    client.stop(job_id)
    assert list(chunks) == []
    other.logout()
    assert _refusal(other.list).code == "UNAUTHENTICATED"
