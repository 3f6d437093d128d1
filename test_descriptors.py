"""Tests of `descriptors`: the reserve, and a server whose descriptors others try to use up."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import socket
from typing import TYPE_CHECKING

import pytest

import workerservice_pb2 as worker_pb
from client import Client
from descriptors import keep_reserve, with_reserve
from server import _HANDSHAKE_S, _OTHER_CONNECTIONS
from testkit import (
    FOREVER,
    GUARD_S,
    HTTP2_GREETING,
    ServerProgram,
    descriptors_of,
    tls_context,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_LIMIT = 300  # of the server's descriptors
_JOBS = 5

_ENDS_AT_SIGNAL = ("sh", ["-c", "trap 'exit 0' USR1; echo $$; while :; do sleep 1000 & wait; done"])


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    """The limits of open files, which the test may change."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_reserve_is_used_when_all_other_descriptors_are(limits: tuple[int, int]) -> None:
    """The limit is raised for that moment only; a failure for another reason is not repeated."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(OSError):
            while True:
                taken.enter_context(open(os.devnull))
        os.close(with_reserve(lambda: os.open(os.devnull, os.O_RDONLY)))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, limits[1])
        with pytest.raises(FileNotFoundError):
            with_reserve(lambda: os.open("/no/such", os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files") as caught:
            os.open(os.devnull, os.O_RDONLY)
    assert caught.value.errno == errno.EMFILE


def test_reserve_lies_below_the_hard_limit(limits: tuple[int, int]) -> None:
    """A process that may open many files keeps a few of them in reserve."""
    soft = keep_reserve()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, limits[1])
    assert 0 < limits[1] - soft <= limits[1] // 4


@pytest.fixture
def server(certs: Path, make_state: Callable[[], Path], tmp_path: Path) -> Iterator[ServerProgram]:
    """A server that may open few files."""
    program = ServerProgram(
        tmp_path / "server.log",
        *("--listen", "127.0.0.1:0", "--limits", "auto", "--certs", str(certs)),
        *("--state-dir", str(make_state())),
        before=("sh", "-c", f'ulimit -n {_LIMIT}; exec "$@"', "sh"),
    )
    yield program
    assert program.end() == 0


def test_connections_cannot_take_the_descriptors_of_jobs(
    server: ServerProgram, certs: Path
) -> None:
    """Bare TCP connections: jobs end, are stopped and started, and then people can log in.

    The server also closes a connection that does not acknowledge its settings. gRPC enforces no
    limit of headers for such a client.
    """
    host, _, port = server.address.rpartition(":")
    with Client(server.address, certs=certs) as client, contextlib.ExitStack() as connections:
        silent = connections.enter_context(
            tls_context(certs, certs / "client.pem").wrap_socket(
                socket.create_connection((host, int(port)), GUARD_S), server_hostname=host
            )
        )
        silent.sendall(HTTP2_GREETING)
        client.login("admin", "admin")
        run = [client.start(*FOREVER) for _ in range(_JOBS)]
        end = [client.start(*_ENDS_AT_SIGNAL) for _ in range(_JOBS)]
        pids = [int(next(client.stream(job_id))) for job_id in end]
        taken: list[socket.socket] = []
        for _ in range(2 * _LIMIT):
            sock = socket.create_connection((host, int(port)), GUARD_S)
            taken.append(connections.enter_context(sock))
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        for job_id in run:
            assert client.stop(job_id).status == worker_pb.JOB_STATUS_STOPPED
        for job_id in end:
            for _ in client.stream(job_id):
                pass
            job = client.status(job_id)
            assert (job.end_reason, job.exit_code) == (worker_pb.END_REASON_EXITED, 0)
        client.stop(client.start(*FOREVER))
        assert len(descriptors_of(server.process.pid)) < _LIMIT * 3 // 4
        # The server closes a connection that is one too many at once, and each other one that
        # has not begun TLS after a while.
        for sock in taken:
            sock.settimeout(_HANDSHAKE_S + GUARD_S)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        silent.settimeout(_HANDSHAKE_S + GUARD_S)
        farewell = b""
        while received := silent.recv(4096):
            farewell += received
        assert b"settings" in farewell  # the reason: a keepalive ping would end it later
        with Client(server.address, certs=certs) as other:
            other.login("user", "user")
            assert other.list() == []


@pytest.mark.alone
def test_connections_have_a_bound_of_their_own(
    limits: tuple[int, int], certs: Path, make_state: Callable[[], Path], tmp_path: Path
) -> None:
    """1,024 beside one for each stream, even if there are descriptors for many more."""
    streams = 20
    bound, too_many = streams + _OTHER_CONNECTIONS, 30
    if limits[1] < 4 * bound:
        pytest.skip("this process may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    server = ServerProgram(
        tmp_path / "server.log",
        *("--listen", "127.0.0.1:0", "--limits", "auto", "--certs", str(certs)),
        *("--state-dir", str(make_state()), "--max-streams", str(streams)),
    )
    host, _, port = server.address.rpartition(":")
    with contextlib.ExitStack() as connections:
        taken = []
        ended = select.poll()
        for _ in range(bound + too_many):
            sock = socket.create_connection((host, int(port)), GUARD_S)
            taken.append(connections.enter_context(sock).fileno())
            ended.register(sock, select.POLLIN)
        closed: set[int] = set()
        while len(closed) < too_many and (events := ended.poll(GUARD_S * 1000)):
            closed |= {fd for fd, _ in events}
    # Those that came too late. The others have 5 s for their handshake, and end in their order.
    assert closed == set(taken[bound:])
    assert server.end() == 0
