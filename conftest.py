"""The fixtures that several test modules share. Plain helpers are in testkit.py."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import signal
import subprocess
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from testkit import (
    GUARD_S,
    TEST_CONFIG,
    ClientProgram,
    Clock,
    ServerProgram,
    clean_environment,
    joined,
    make_cgroup,
    own_cgroup,
    without_clone3,
)
from testproxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from client import Client
    from server import Server

pytest_plugins = ["cluster_plugin", "kernel_plugin", "time_limit_plugin"]
_HERE = Path(__file__).resolve().parent


def _interrupt(*_: object) -> None:
    # pytest-xdist interrupts a worker twice: the second time its fixtures are ending their servers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


# A shell has what it runs in the background ignore Ctrl-C, and so would all programs of the tests.
signal.signal(
    signal.SIGINT,
    _interrupt if "PYTEST_XDIST_WORKER" in os.environ else signal.default_int_handler,
)


def pytest_configure(config: pytest.Config) -> None:
    """Let workers of pytest-xdist end their servers before they are killed."""
    if config.getoption("numprocesses", None):
        from xdist.workermanage import NodeManager

        NodeManager.EXIT_TIMEOUT = 60


@pytest.fixture(scope="session", autouse=True)
def temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A directory that stands in for /tmp, because what is killed leaves its files there.

    It is not below pytest's own, because other users cannot enter those.
    """
    tmp_path_factory.getbasetemp()  # outside: pytest keeps it for a while
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        os.chmod(name, 0o1777)
        patch.setenv("TMPDIR", name)
        patch.setattr(tempfile, "tempdir", name)
        yield


@pytest.fixture
def leased(public: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A program under a write lease (fcntl(2)), and a function that gives the lease up.

    An exec of the program blocks until then, or for 45 s (/proc/sys/fs/lease-break-time). Every
    user may take such a lease on files of their own.
    """
    path = public / "leased"
    path.write_text("#!/bin/sh\necho begun; sleep 1000000\n")
    path.chmod(0o755)
    fd = os.open(path, os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default; SIGIO would end us
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    yield path, lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    os.close(fd)


@pytest.fixture
def lease_is_asked_for(leased: object) -> Iterator[Callable[[], bool]]:  # noqa: ARG001 -- sets it
    """A function that waits until the kernel asks for the lease: an exec of `leased` has begun.

    Python runs a handler in the main thread. A signal that another thread has got does not wake the
    main thread, but a byte of the wake-up descriptor does.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    former = signal.signal(signal.SIGURG, lambda *_: None)
    former_fd = signal.set_wakeup_fd(write_fd)
    try:
        yield lambda: bool(select.select([read_fd], [], [], GUARD_S)[0])
    finally:
        signal.set_wakeup_fd(former_fd)
        signal.signal(signal.SIGURG, former)
        os.close(read_fd)
        os.close(write_fd)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every uid can enter, so that jobs can; pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(params=["clone3", "popen"])
def way_to_fork(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which the fork servers made in a test fork: Popen where clone3 is refused."""
    from spawner import Spawner

    make = Spawner.__init__

    def make_without_clone3(self: Spawner, **options: Any) -> None:
        without_clone3(functools.partial(make, self, **options))

    if request.param == "popen":
        monkeypatch.setattr(Spawner, "__init__", make_without_clone3)
    return str(request.param)


@pytest.fixture
def base() -> Iterator[Path]:
    """A cgroup with every controller; the test fails if it leaves anything in the cgroup."""
    from cgroupfs import kill_tree

    path = make_cgroup()
    yield path
    left = [str(each) for each in path.iterdir() if each.is_dir()]
    left += (path / "cgroup.procs").read_text().split()
    if left:
        kill_tree(path)
    for directory, _, _ in os.walk(path, topdown=False):
        os.rmdir(directory)
    if left:
        pytest.fail(f"left in the cgroup: {left}")


@pytest.fixture
def inside(base: Path) -> Iterator[Path]:
    """A cgroup like `base` with this process in it; the test must leave the process there."""
    with joined(base):
        yield base
        if own_cgroup() != base.name:
            pytest.fail(f"the test left this process in {own_cgroup()}")


def _make_certificates(directory: Path) -> Path:
    for name in ([], ["other"]):
        command = [str(_HERE / "certs" / "generate.sh"), "--dir", str(directory), *name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still until the test changes it."""
    return Clock()


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything `certs/generate.sh` makes, and a second client, `other`."""
    return _make_certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="session")
def foreign_certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like `certs`, made by other CAs."""
    return _make_certificates(tmp_path_factory.mktemp("foreign-certs"))


@pytest.fixture(scope="session")
def make_state(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Make a state directory; every one has the same token key, so tokens are valid for all."""
    key = os.urandom(32)

    def make() -> Path:
        directory = tmp_path_factory.mktemp("state")
        directory.joinpath("token.key").touch(0o600)
        directory.joinpath("token.key").write_bytes(key)
        return directory

    return make


@pytest.fixture
def start_server(
    certs: Path, make_state: Callable[[], Path], tmp_path: Path
) -> Iterator[Callable[..., ServerProgram]]:
    """Start `server.py` with further options; a server still there after the test is killed."""
    with contextlib.ExitStack() as programs:

        def start(
            *options: str, state: Path | None = None, env: dict[str, str] | None = None
        ) -> ServerProgram:
            program = ServerProgram(
                tmp_path / f"server-{uuid.uuid4()}.log",
                *("--listen", "127.0.0.1:0", "--limits", "auto", "--certs", str(certs)),
                *("--state-dir", str(state or make_state()), *options),
                env=env,
            )
            programs.enter_context(program.process)
            programs.callback(program.process.kill)
            return program

        yield start


@pytest.fixture(scope="session")
def program(
    certs: Path, make_state: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProgram]:
    """A server that all tests share, except those that need one of their own."""
    program = ServerProgram(
        tmp_path_factory.mktemp("log") / "server.log",
        *("--listen", "127.0.0.1:0", "--limits", "auto", "--certs", str(certs)),
        *("--state-dir", str(make_state())),
        env={"A_SECRET_OF_THE_SERVER": "do not tell"},
    )
    yield program
    if program.end() != 0:
        pytest.fail(f"the server's exit status is not 0: {program.log.read_text()}")


@pytest.fixture
def serve(certs: Path, make_state: Callable[[], Path]) -> Iterator[Callable[..., Server]]:
    """Run a server in this process, where a test can reach its objects."""
    from server import Server
    from settings import Settings

    with contextlib.ExitStack() as servers:

        def start(**settings: Any) -> Server:
            defaults = Settings(
                listen="127.0.0.1:0", certs=certs, state_dir=make_state(), enforcement="off"
            )
            if config := os.environ.get(TEST_CONFIG):
                defaults = replace(
                    defaults, config=Path(config), users=Path(config).parent / "users"
                )
            return servers.enter_context(Server(replace(defaults, **settings)))

        yield start


@pytest.fixture(scope="session")
def tokens(program: ServerProgram, certs: Path) -> dict[str, str]:
    """The token of each seeded user, bound to the certificate `client`."""
    from client import Client

    with Client(program.address, certs=certs) as client:
        return {name: client.login(name, name)[0] for name in ("admin", "user")}


@pytest.fixture
def connect_options() -> dict[str, Any]:
    """What `connect` gives to each client: a lost connection is an error at once."""
    return {"retry_for": 0}


@pytest.fixture
def connect(
    program: ServerProgram, certs: Path, tokens: dict[str, str], connect_options: dict[str, Any]
) -> Iterator[Callable[..., Client]]:
    """Connect as a seeded user ("" for no token) to the shared server, or to `address`."""
    from client import Client

    with contextlib.ExitStack() as clients:

        def connect(user: str = "user", address: str = "", **options: Any) -> Client:
            settings: dict[str, Any] = {"token": tokens.get(user, ""), "certs": certs}
            settings |= connect_options | options
            return clients.enter_context(Client(address or program.address, **settings))

        yield connect


@pytest.fixture
def proxy(program: ServerProgram) -> Iterator[Proxy]:
    """Between clients and the server of `program`; its connections can be cut."""
    proxy = Proxy(program.address)
    yield proxy
    proxy.close()


@pytest.fixture
def stranger(program: ServerProgram, certs: Path, tmp_path: Path) -> ClientProgram:
    """A client that is not logged in."""
    return ClientProgram(
        clean_environment()
        | {"JOBWORKER_SERVER": program.address, "JOBWORKER_CERTS": str(certs)}
        | {"XDG_STATE_HOME": str(tmp_path / "xdg"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    )


@pytest.fixture
def cli(stranger: ClientProgram, tokens: dict[str, str]) -> ClientProgram:
    """A client with the token of `user` in its environment."""
    stranger.environment["JOBWORKER_TOKEN"] = tokens["user"]
    return stranger
