"""What several test modules share."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections import defaultdict, deque
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from google.protobuf.descriptor import MethodDescriptor

    from client import Client
    from server import Server
    from worker import Worker


_HERE = Path(__file__).resolve().parent
GUARD_S = 60  # only a hang takes this long


def descriptors_of(pid: int | str = "self") -> list[str]:
    """The numbers of the open descriptors of a process."""
    return sorted(os.listdir(f"/proc/{pid}/fd"))


def children_of(pid: int) -> list[int]:
    """The processes whose parent is `pid`, those that have ended and were not reaped included."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path("/proc", name, "stat").read_bytes()
            if int(stat.rpartition(b")")[2].split()[1]) == pid:
                found.append(int(name))
    return found


def job_processes(helper: int) -> list[int]:
    """The children of a worker's helper, but for the process that waits for the next job."""
    program = Path(f"/proc/{helper}/cmdline").read_bytes()
    found = []
    for pid in children_of(helper):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes() != program:
                found.append(pid)
    return found


def job_cgroups(jobs: Path) -> list[Path]:
    """The cgroups in there, but for that of the process that waits for the next job."""
    found = []
    for path in jobs.iterdir():
        if path.is_dir():
            with contextlib.suppress(OSError):
                pids = (path / "cgroup.procs").read_text().split()
                programs = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
                if not programs or not all("spawner.py" in program for program in programs):
                    found.append(path)
    return found


def job_files(worker: Worker) -> list[str]:
    """The files in the worker's output directory, but for the empty one of the next job."""
    known = {f"{job.job_id}.out" for job in worker.list()}
    directory = worker._output_dir.path
    return sorted(
        path.name for path in directory.iterdir() if path.name in known or path.stat().st_size
    )


def await_output(worker: Worker, job_id: str, text: bytes) -> None:
    """Block until the job has written `text`."""
    output = b""
    with worker.stream(job_id) as chunks:
        for chunk in chunks:
            output += chunk
            if text in output:
                return
    pytest.fail(f"the job ended without writing {text!r}: {output!r}")


@pytest.fixture
def leased(public: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A program that the kernel opens for nobody, and what ends that: a write lease, fcntl(2).

    Every user can have that for their own files, for 45 s (/proc/sys/fs/lease-break-time).
    """
    path = public / "leased"
    path.write_text("#!/bin/sh\necho begun; sleep 1000000\n")
    path.chmod(0o755)
    fd = os.open(path, os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # which is ignored, unlike SIGIO
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    yield path, lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    os.close(fd)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody can enter, jobs of other uids too: pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def make_fifo(path: Path) -> Path:
    """Make a FIFO that everybody may use, jobs of other uids too."""
    os.mkfifo(path)
    os.chmod(path, 0o666)
    return path


# --- tests marked `kernel` ---------------------------------------------------------------
#
# Where this host has what they need they run as they are. Elsewhere each is replaced by a
# stand-in of the same name, and the first stand-in boots two kernels (./kernel-run), which
# have one processor each. In each of them another pytest runs half of the tests selected,
# and prints each outcome as a line of JSON.

_OUTCOME = "@@outcome "  # what comes before it on the line is pytest's progress
_GUESTS = pytest.StashKey["list[_Guest]"]()
_INSTALL = "install user-mode-linux and e2fsprogs to run it in a kernel of its own"
_IN_GUEST = "JOBWORKER_IN_KERNEL" in os.environ


@pytest.hookimpl(trylast=True)  # when -k and -m have made their choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("kernel")]
    if not marked or _IN_GUEST:
        return
    problem = _why_not_here()
    if not problem:
        problem = "needs disks to write to, and this host's own are not for that"
        marked = [item for item in marked if "disk" in getattr(item, "fixturenames", ())]
    missing = not shutil.which("linux.uml")
    for item in marked:
        items.remove(item)
        parent = item.parent or item.session
        # Last, so that what the kernel does disturbs no other test.
        items.append(
            _Unavailable.from_parent(parent, of=item, reason=f"{problem}; {_INSTALL}")
            if missing
            else _StandIn.from_parent(parent, of=item)
        )
    tests = [item.nodeid for item in marked]
    config.stash[_GUESTS] = [_Guest(half) for half in (tests[::2], tests[1::2]) if half]


def pytest_unconfigure(config: pytest.Config) -> None:
    for guest in config.stash.get(_GUESTS, []):
        guest.close()


def pytest_configure(config: pytest.Config) -> None:
    if _IN_GUEST:
        config.pluginmanager.register(_OutcomePrinter(config))


def _why_not_here() -> str:
    """Say why a kernel test cannot run on this host; "" if it can."""
    try:
        make_cgroup().rmdir()
    except (OSError, ValueError) as error:
        return f"needs cgroup v2 with cpu, io, memory and pids controllers, and root ({error})"
    return ""


class _OutcomePrinter:
    """In the guest: tells the outcomes to the pytest outside."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        text = report.longreprtext
        if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
            text = report.longrepr[2].removeprefix("Skipped: ")
        for title, content in report.sections:
            text += f"\n--- {title} ---\n{content}"
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        fields = {"test": report.nodeid, "when": report.when, "outcome": report.outcome}
        terminal.write_line(_OUTCOME + json.dumps(fields | {"text": text}))


class _Guest:
    """A kernel in which `tests` run, once it is booted."""

    def __init__(self, tests: list[str]) -> None:
        self.tests = tests
        self._process: subprocess.Popen[str] | None = None
        self._console: deque[str] = deque(maxlen=100)
        self._outcomes: defaultdict[str, list[dict[str, str]]] = defaultdict(list)

    def boot(self) -> None:
        """Boot it and let the tests begin, unless they have."""
        if self._process is None:
            self._process = subprocess.Popen(
                [
                    *(str(_HERE / "kernel-run"), sys.executable, "-m", "pytest"),
                    *("-p", "no:cacheprovider", "--color=no"),
                    # A hang ends all tests after it, and on a busy machine much is slow in there.
                    *("-o", "faulthandler_timeout=600", *self.tests),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )

    def outcomes(self, test: str) -> list[dict[str, str]]:
        """Block until the test has run; return how set-up, call and tear-down ended.

        Not all of them if the kernel, or its pytest, ended before that.
        """
        outcomes = self._outcomes[test]
        while (
            self._process
            and self._process.stdout
            and not (outcomes and outcomes[-1]["when"] == "teardown")
        ):
            line = self._process.stdout.readline()
            if not line:
                break
            printed, is_outcome, fields = line.partition(_OUTCOME)
            if is_outcome:
                outcome = json.loads(fields)
                self._outcomes[outcome["test"]].append(outcome)
            else:
                self._console.append(printed)
        return outcomes

    def console(self) -> str:
        """What was printed last, besides outcomes; told once."""
        text = "".join(self._console)
        self._console.clear()
        return text or "(no more than told above)"

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate()


class _GuestError(Exception):
    """A test failed in the guest; the message is all there is to show."""


class _Placeholder(pytest.Item):
    """Stands where the test `of` was, with its name and place; its marks count in the guest."""

    def __init__(self, *, of: pytest.Item, **rest: Any) -> None:
        super().__init__(name=of.name, **rest)
        self._of = of

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        return self._of.reportinfo()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *_: Any) -> Any:
        if isinstance(excinfo.value, _GuestError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)


class _StandIn(_Placeholder):
    """Passes, fails or is skipped as the test is in the guest."""

    def runtest(self) -> None:
        guests = self.config.stash[_GUESTS]
        for guest in guests:
            guest.boot()
        guest = next(each for each in guests if self.nodeid in each.tests)
        outcomes = guest.outcomes(self.nodeid)
        if failures := [each["text"] for each in outcomes if each["outcome"] == "failed"]:
            raise _GuestError("\n".join(failures))
        for each in outcomes:
            if each["outcome"] == "skipped":
                pytest.skip(each["text"])
        if "call" not in [each["when"] for each in outcomes]:
            raise _GuestError(f"the kernel did not report this test; it said:\n{guest.console()}")


class _Unavailable(_Placeholder):
    """Is skipped, or fails where JOBWORKER_REQUIRE_KERNEL=1 says that it must run."""

    def __init__(self, *, reason: str, **rest: Any) -> None:
        super().__init__(**rest)
        self._reason = reason

    def runtest(self) -> None:
        if os.environ.get("JOBWORKER_REQUIRE_KERNEL") == "1":
            raise _GuestError(f"JOBWORKER_REQUIRE_KERNEL=1, but this test {self._reason}")
        pytest.skip(self._reason)


def make_cgroup() -> Path:
    """Make a cgroup with every controller at the top of the hierarchy.

    Raises OSError or ValueError where that cannot be.
    """
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    (top,) = [Path(point) for _, point, kind, *_ in mounts if kind == "cgroup2"]
    (top / "cgroup.subtree_control").write_text("+cpu +io +memory +pids")
    path = top / f"test-{uuid.uuid4()}"
    path.mkdir()
    return path


@pytest.fixture
def base() -> Iterator[Path]:
    """A cgroup with every controller; after the test nothing may be left in it."""
    from cgroups import kill_tree

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
    """The same, with this process in it; after the test it must be there again."""
    with joined(base):
        yield base
        if own_cgroup() != base.name:
            pytest.fail(f"the process is not back, but in {own_cgroup()}")


@contextlib.contextmanager
def joined(path: Path) -> Iterator[None]:
    """Put this process into the cgroup `path`, and afterwards back."""
    top = next(each for each in path.parents if not (each / "cgroup.type").exists())
    before = top / own_cgroup()
    (path / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (before / "cgroup.procs").write_text("0")


def own_cgroup() -> str:
    """The cgroup this process is in, relative to the top of the hierarchy."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    (path,) = [line.removeprefix("0::/") for line in lines if line.startswith("0::")]
    return path


# --- a server, and calls to it ----------------------------------------------------------
#
# Every server here has the same token key, and so takes the tokens of one login.

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # failed handshakes are meant to be here
# As in server.py: a test module may import grpc before it.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES256-CBC-SHA"
# Some tests fork this process; gRPC would start its threads again in the child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"


def clean_environment() -> dict[str, str]:
    """Our environment without what the programs are to set, or be told, by themselves."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("GRPC_", "JOBWORKER_"))}


class ServerProgram:
    """`server.py` in a process of its own. Attributes: `process`, `address`, `log` (its stderr).

    `before`: a command that executes the one that is appended to it.
    """

    def __init__(
        self,
        log: Path,
        *options: str,
        env: dict[str, str] | None = None,
        before: tuple[str, ...] = (),
    ) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*before, sys.executable, str(_HERE / "server.py"), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=clean_environment() | (env or {}),
            )
        line = self.process.stdout.readline() if self.process.stdout else ""
        self.address = line.removeprefix("listening on ").rstrip("\n")
        if line != f"listening on {self.address}\n":
            self.process.kill()
            self.process.communicate()
            pytest.fail(f"no server: {line!r} {log.read_text()}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal; return the exit status, once it has written nothing more to stdout."""
        self.process.send_signal(number)
        stdout, _ = self.process.communicate(timeout=GUARD_S)
        if stdout:
            pytest.fail(f"more than one line on stdout: {stdout!r}")
        return self.process.returncode


def _make_certificates(directory: Path) -> Path:
    for name in ([], ["other"]):
        command = [str(_HERE / "certs" / "generate.sh"), "--dir", str(directory), *name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything `certs/generate.sh` makes, and a second client, `other`."""
    return _make_certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="session")
def foreign_certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by other CAs."""
    return _make_certificates(tmp_path_factory.mktemp("foreign-certs"))


@pytest.fixture(scope="session")
def make_state(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Make a state directory with the common token key."""
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
    """Start `server.py` with more options; what is still there after the test is killed."""
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
    """The server program that all tests share which do not need one of their own."""
    program = ServerProgram(
        tmp_path_factory.mktemp("log") / "server.log",
        *("--listen", "127.0.0.1:0", "--limits", "auto", "--certs", str(certs)),
        *("--state-dir", str(make_state())),
        env={"A_SECRET_OF_THE_SERVER": "do not tell"},
    )
    yield program
    if program.end() != 0:
        pytest.fail(f"the server did not end well: {program.log.read_text()}")


@pytest.fixture
def serve(certs: Path, make_state: Callable[[], Path]) -> Iterator[Callable[..., Server]]:
    """Run a server in this process, where a test can look inside."""
    from server import Server, Settings

    with contextlib.ExitStack() as servers:

        def start(**settings: Any) -> Server:
            defaults = Settings(
                listen="127.0.0.1:0", certs=certs, state_dir=make_state(), enforcement="off"
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
def connect(
    program: ServerProgram, certs: Path, tokens: dict[str, str]
) -> Iterator[Callable[..., Client]]:
    """Connect as a seeded user ("" for nobody) to the shared server or another."""
    from client import Client

    with contextlib.ExitStack() as clients:

        def connect(user: str = "user", address: str = "", **options: Any) -> Client:
            settings: dict[str, Any] = {"token": tokens.get(user, ""), "certs": certs} | options
            return clients.enter_context(Client(address or program.address, **settings))

        yield connect


FOREVER = ("sh", ["-c", "echo ready; exec sleep infinity"])  # for `Client.start` and `follow`


@cache
def rpc_methods() -> Mapping[str, MethodDescriptor]:
    """Every RPC there is, by its name."""
    import authservice_pb2
    import workerservice_pb2

    return {
        method.name: method
        for file in (authservice_pb2.DESCRIPTOR, workerservice_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }


def call_rpc(
    client: Client,
    name: str,
    *,
    data: bytes | None = None,
    metadata: Sequence[tuple[str, str]] | None = None,
    **fields: Any,
) -> tuple[str, str]:
    """Call any RPC to its end; return its status code and message.

    A Logout that succeeds ends the client's token: do not do it to one of `tokens`.
    """
    import grpc
    from google.protobuf.message_factory import GetMessageClass

    method = rpc_methods()[name]
    if data is None:
        data = GetMessageClass(method.input_type)(**fields).SerializeToString()
    # On the wire a single answer is a stream of one.
    rpc: Any = client._channel.unary_stream(
        f"/{method.containing_service.full_name}/{name}",
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    call = rpc(data, metadata=client._metadata() if metadata is None else metadata, timeout=GUARD_S)
    with contextlib.suppress(grpc.RpcError):
        list(call)
    return call.code().name, call.details()


def run_job(
    client: Client, command: str = "true", args: Sequence[str] = (), **limits: float | None
) -> str:
    """Run a job to its end; return its ID."""
    job_id = client.start(command, args, **limits)
    list(client.stream(job_id))
    return job_id


def follow(client: Client, job_id: str) -> Iterator[bytes]:
    """Open a stream of a job that was started with `FOREVER`, and is silent from then on."""
    chunks = client.stream(job_id)
    if next(chunks) != b"ready\n":
        pytest.fail("the job is not ready")
    return chunks
