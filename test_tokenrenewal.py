"""Tests of short tokens: the client exchanges them for newer ones, also during a stream."""

from __future__ import annotations

import argparse
import json
import ssl
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import credentials
import workerservice_pb2 as worker_pb
from auth import Authenticator, Session, load_key
from client import ClientError
from testkit import GUARD_S
from tokentimes import TokenTimes, payload, session_of
from users import SEEDED_USERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from client import Client
    from testkit import ClientProgram, ServerProgram

    Connect = Callable[..., Client]

_HOUR_S = 3600


@pytest.fixture
def connect_options() -> dict[str, Any]:
    """The clients go on after a lost connection, as they do by default."""
    return {}


class _Service:
    """A server with short tokens. `mint` makes a token without a login."""

    def __init__(
        self, start: Callable[..., ServerProgram], state: Path, certs: Path, lifetime_s: int
    ) -> None:
        options = ("--token-lifetime", f"{lifetime_s}s", "--session-lifetime", "12h")
        self.address = start(*options, state=state).address
        key = load_key(state / "token.key")
        self._authenticator = Authenticator(users=SEEDED_USERS, key=key)
        self._lifetime_s = lifetime_s
        self._certificate = ssl.PEM_cert_to_DER_cert((certs / "client.pem").read_text())

    def mint(self, age_s: int = 0, session_id: str = "") -> str:
        """Return a token of `user` that was issued so many seconds ago, in the last login."""
        (user,) = (user for user in SEEDED_USERS if user.name == "user")
        token_id, now = str(uuid.uuid4()), int(time.time())
        session = Session(session_id or token_id, now - age_s, now + 11 * _HOUR_S, 12 * _HOUR_S)
        times = now - age_s, 0, now - age_s + self._lifetime_s
        return self._authenticator._token(user, session, token_id, times, self._certificate)


@pytest.fixture
def serve_with(
    start_server: Callable[..., ServerProgram], make_state: Callable[[], Path], certs: Path
) -> Callable[[int], _Service]:
    """Start a server whose tokens live for so many seconds."""
    return lambda lifetime_s: _Service(start_server, make_state(), certs, lifetime_s)


def _claims(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = json.loads(payload(token))
    return claims


# --- class Client ---------------------------------------------------------------------------


def test_client_exchanges_a_token_with_less_than_half_of_its_life(
    connect: Connect, serve_with: Callable[[int], _Service]
) -> None:
    """Once, before the call. The old token stays valid, and the new one is of the same session."""
    service, told = serve_with(_HOUR_S), list[tuple[str, str]]()
    young, old = service.mint(29 * 60), service.mint(31 * 60)
    client = connect("", service.address, token=young)
    client.list()
    assert client.token == young
    client = connect(
        "", service.address, token=old, on_new_token=lambda *tokens: told.append(tokens)
    )
    for _ in range(3):
        client.list()
    new = client.token
    assert told == [(old, new)]
    assert session_of(new) == session_of(old) is not None
    assert _claims(new)["jti"] != _claims(old)["jti"]
    assert _claims(new)["exp"] > _claims(old)["exp"]
    connect("", service.address, token=old, retry_for=0).list()


def test_refresh_gives_a_new_token_on_demand(
    connect: Connect, serve_with: Callable[[int], _Service]
) -> None:
    """`Client.refresh` uses the new token from then on. After a logout neither is accepted."""
    service = serve_with(_HOUR_S)
    first = service.mint()
    client = connect("", service.address, token=first)
    second, expires_at = client.refresh()
    assert (client.token, _claims(second)["exp"]) == (second, int(expires_at.timestamp()))
    client.logout()
    for token in (first, second):
        for call in (connect("", service.address, token=token).refresh, client.list):
            with pytest.raises(ClientError) as caught:
                call()
            assert caught.value.code in {"UNAUTHENTICATED", ""}


class _Renewals:
    """Counts the renewals of a client: `await_one` blocks until there is another one."""

    def __init__(self) -> None:
        self._happened = threading.Semaphore(0)

    def __call__(self, _old: str, _new: str) -> None:
        self._happened.release()

    def await_one(self) -> None:
        assert self._happened.acquire(timeout=GUARD_S)


def test_stream_input_and_watch_last_longer_than_their_token(
    connect: Connect, serve_with: Callable[[int], _Service]
) -> None:
    """No byte and no event is lost or doubled, although the token of the first calls expires."""
    service, renewals = serve_with(4), _Renewals()
    client = connect("", service.address, token=service.mint(), on_new_token=renewals)
    first = client.token
    events = client.watch()
    job_id = client.start("cat", stdin=True)
    assert next(events).job.job_id == job_id

    def lines() -> Iterator[bytes]:
        for number in range(3):  # the first token expires after two renewals
            yield b"%d\n" % number
            renewals.await_one()

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(client.write_input, job_id, lines())
        assert b"".join(client.stream(job_id)) == b"0\n1\n2\n"
        sent.result(GUARD_S)
    event = next(events)
    assert (event.kind, event.job.job_id) == (worker_pb.JOB_EVENT_KIND_ENDED, job_id)
    events.close()
    assert not _is_accepted(connect, service, first)


def _is_accepted(connect: Connect, service: _Service, token: str) -> bool:
    try:
        connect("", service.address, token=token).list()
    except ClientError as error:
        if error.code != "UNAUTHENTICATED":
            raise
        return False
    return True


def test_input_ends_with_its_token(connect: Connect, serve_with: Callable[[int], _Service]) -> None:
    """A call of WriteInput whose token expires gets UNAUTHENTICATED, and the input stays open."""
    service, renewals = serve_with(4), _Renewals()
    client = connect("", service.address, token=service.mint(), on_new_token=renewals)
    job_id = client.start("cat", stdin=True)
    chunks = client.stream(job_id)  # keeps the client's token fresh
    metadata = client._link.metadata()

    def messages() -> Iterator[worker_pb.WriteInputRequest]:
        yield worker_pb.WriteInputRequest(job_id=job_id, data=b"one\n")
        assert next(chunks) == b"one\n"
        for _ in range(3):  # the token has expired by then
            renewals.await_one()
        yield worker_pb.WriteInputRequest(data=b"too late\n", end=True)

    with pytest.raises(grpc.RpcError) as caught:
        client._worker.WriteInput(messages(), metadata=metadata, timeout=GUARD_S)
    error: Any = caught.value
    assert error.code().name == "UNAUTHENTICATED"
    stdin = client.status(job_id).stdin
    assert (stdin.bytes, stdin.ended) == (4, False)
    client.write_input(job_id, b"two\n", offset=4)
    assert b"".join(chunks) == b"two\n"


def test_token_that_can_be_renewed_no_more_is_used_as_it_is(
    connect: Connect, program: ServerProgram, tokens: dict[str, str]
) -> None:
    """With the default lifetimes a token lasts as long as its session: no call is made for it."""
    times = TokenTimes.read(tokens["user"])
    assert times is not None
    assert not times.can_be_refreshed
    client = connect("user")
    list(client.stream(client.start("true")))
    assert "token" not in {thread.name for thread in threading.enumerate()}
    del program


# --- the command line -----------------------------------------------------------------------


@pytest.fixture
def keep(stranger: ClientProgram, tmp_path: Path) -> Callable[[_Service, str], Path]:
    """Put a token where the command line keeps that of the service; return its file."""

    def keep(service: _Service, token: str) -> Path:
        stranger.environment["JOBWORKER_SERVER"] = service.address
        path = tmp_path / "xdg" / "job-worker" / f"token-{service.address}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(token)
        return path

    return keep


def test_kept_token_is_renewed_by_any_subcommand(
    stranger: ClientProgram,
    serve_with: Callable[[int], _Service],
    keep: Callable[[_Service, str], Path],
) -> None:
    """In its file, whose mode stays 0600. A young one stays as it is."""
    service = serve_with(_HOUR_S)
    old = service.mint(31 * 60)
    path = keep(service, old)
    assert stranger.read("run", "echo", "hello") == "hello\n"
    new = path.read_text()
    assert (session_of(new), path.stat().st_mode & 0o777) == (session_of(old), 0o600)
    assert _claims(new)["exp"] > _claims(old)["exp"]
    stranger.read("list")
    assert path.read_text() == new
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_given_token_does_not_replace_the_kept_one(
    stranger: ClientProgram,
    serve_with: Callable[[int], _Service],
    keep: Callable[[_Service, str], Path],
) -> None:
    """Neither one of JOBWORKER_TOKEN nor one of -t."""
    service = serve_with(_HOUR_S)
    kept = service.mint()
    path = keep(service, kept)
    stranger.read("list", "-t", service.mint(31 * 60))
    stranger.environment["JOBWORKER_TOKEN"] = service.mint(31 * 60)
    stranger.read("list")
    assert path.read_text() == kept


def test_processes_that_renew_at_once_keep_a_valid_token(
    stranger: ClientProgram,
    connect: Connect,
    serve_with: Callable[[int], _Service],
    keep: Callable[[_Service, str], Path],
) -> None:
    """Each of them succeeds, and the file has a newer token at the end."""
    service = serve_with(_HOUR_S)
    old = service.mint(31 * 60)
    path = keep(service, old)
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda _: stranger.run("list"), range(4)))
    assert [(status, stderr) for status, _, stderr in ends] == [(0, "")] * 4
    assert path.read_text() != old
    assert _is_accepted(connect, service, path.read_text())


def test_login_or_logout_meanwhile_is_not_undone_by_a_renewal(
    serve_with: Callable[[int], _Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A new token replaces one of its own session, and neither another one nor none."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    service = serve_with(_HOUR_S)
    arguments = argparse.Namespace(token="", server=service.address, profile=None)
    path = credentials.token_path(arguments)
    path.parent.mkdir()
    keep = credentials.keep_newer(arguments)
    assert keep is not None
    old = service.mint()
    new = service.mint(session_id=_claims(old)["sid"])
    keep(old, new)
    assert not path.exists()
    for kept, expected in ((old, new), (other := service.mint(), other), ("rubbish", "rubbish")):
        path.write_text(kept)
        keep(old, new)
        assert path.read_text() == expected


def test_whoami_shows_the_end_of_the_session(
    stranger: ClientProgram,
    serve_with: Callable[[int], _Service],
    keep: Callable[[_Service, str], Path],
) -> None:
    """And no warning comes for a short token whose session lasts."""
    service = serve_with(_HOUR_S)
    token = service.mint()
    keep(service, token)
    facts = json.loads(stranger.read("whoami", "--json"))
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_claims(token)["session_exp"]))
    assert facts["session_expires_at"] == moment
    assert "\nsession     ends " in stranger.read("whoami")


def test_logout_ends_the_session_and_forgets_its_kept_token(
    stranger: ClientProgram,
    connect: Connect,
    serve_with: Callable[[int], _Service],
    keep: Callable[[_Service, str], Path],
) -> None:
    """Also if another process has renewed the token meanwhile."""
    service = serve_with(_HOUR_S)
    old = service.mint()
    newer = service.mint(session_id=_claims(old)["sid"])
    path = keep(service, newer)
    stranger.read("logout", "-t", old)
    assert not path.exists()
    assert not _is_accepted(connect, service, newer)
