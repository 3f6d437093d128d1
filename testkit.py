"""What several test modules share. Fixtures are in conftest.py."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import hashlib
import os
import re
import resource
import select
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import privileges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from google.protobuf.descriptor import MethodDescriptor

    from client import Client
    from connection import OutputStream
    from worker import Worker

_HERE = Path(__file__).resolve().parent
LIBRARY = next(
    line.split()[2:]
    for line in (_HERE / "Makefile").read_text().splitlines()
    if line.startswith("library = ")
)
"""The modules of the library, as the Makefile lists them."""
GUARD_S = 60  # only a hang takes this long
TEST_CONFIG = "JOBWORKER_TEST_CONFIG"
"""The variable with the configuration of servers for which a test names none: cluster_plugin.py."""
NOBODY = 65534  # the uid and gid of Debian's user `nobody`
ABSENT = "0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98"  # the ID of no job
JOB_VARIABLES = {
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "PYTHONUNBUFFERED", "TMPDIR"),
    "JOB_ID",
}
"""The names of the variables of a job that asks for none."""


class Clock:
    """A clock that shows `now`, in seconds, and stands still until the test changes it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Hashing:
    """Stops every hash of a password until `go_on` is set. `begun` counts the hashes that began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self._scrypt = hashlib.scrypt
        monkeypatch.setattr(hashlib, "scrypt", self._blocked)

    def _blocked(self, password: bytes, **options: Any) -> bytes:
        self.begun.release()
        assert self.go_on.wait(GUARD_S)
        return self._scrypt(password, **options)

    def await_begun(self, count: int) -> None:
        """Block until that many more hashes have begun."""
        for _ in range(count):
            assert self.begun.acquire(timeout=GUARD_S)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow past `size`, as on a disk that is full at that byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_file_system(size: str) -> Iterator[Path]:
    """Mount a file system of this size, like "64k"; skip the test where we cannot."""
    with tempfile.TemporaryDirectory() as path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", path]
        if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("this needs root, and the right to mount a file system")
        try:
            yield Path(path)
        finally:
            subprocess.run(["umount", "--lazy", path], check=True)


def descriptors_of(pid: int | str = "self") -> list[str]:
    """Return the numbers of the open descriptors of a process."""
    return sorted(os.listdir(f"/proc/{pid}/fd"))


def status_of(pid: int | str) -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def refuse_call(number: int, error: int) -> None:
    """Have the kernel answer a system call with an errno to this thread, and to what it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    # The call's number; if it is this one, SECCOMP_RET_ERRNO, else SECCOMP_RET_ALLOW.
    refuse, allow = 0x5_0000 | error, 0x7FFF_0000
    rules = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, refuse), (6, 0, 0, allow))
    privileges.prctl(privileges.PR_SET_NO_NEW_PRIVS, 1)
    privileges.filter_calls(rules)
    assert libc.syscall(number, None, 0) == -1
    assert ctypes.get_errno() == error


def refuse_clone3() -> None:
    """Have clone3 refused, as Docker and systemd's RestrictNamespaces= have it."""
    refuse_call(435, errno.ENOSYS)


def without_clone3(function: Callable[[], None]) -> None:
    """Call `function` in a thread that may not use clone3."""

    def run() -> None:
        refuse_clone3()
        function()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def children_of(pid: int) -> list[int]:
    """Return the processes whose parent is `pid`, including zombies."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path("/proc", name, "stat").read_bytes()
            if int(stat.rpartition(b")")[2].split()[1]) == pid:
                found.append(int(name))
    return found


def fork_server_of(main: int) -> int:
    """Return the fork server of the main process `main`, which may have other children."""
    (found,) = [
        pid
        for pid in children_of(main)
        if b"forkserver.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


def job_processes(fork_server: int) -> list[int]:
    """Return the children of a worker's fork server, except the spare process."""
    program = Path(f"/proc/{fork_server}/cmdline").read_bytes()
    found = []
    for pid in children_of(fork_server):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes() != program:
                found.append(pid)
    return found


def job_cgroups(jobs: Path) -> list[Path]:
    """Return the cgroups in the cgroup `jobs`, except the one of the spare process."""
    found = []
    for path in jobs.iterdir():
        if path.is_dir():
            with contextlib.suppress(OSError):
                pids = (path / "cgroup.procs").read_text().split()
                programs = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
                if not programs or not all("forkserver.py" in program for program in programs):
                    found.append(path)
    return found


def settle_spares(worker: Worker) -> None:
    """Block until the worker has the spares that it wants, or has failed to make them."""
    spares = worker._parts.spares
    spares.fill()
    with spares._changed:
        if not spares._changed.wait_for(lambda: spares._due_s is None, GUARD_S):
            pytest.fail("the next job's spare is not made")


def discard_spares(worker: Worker) -> None:
    """Let the next start find no spare."""
    settle_spares(worker)
    if (spare := worker._parts.spares._pop()) is not None:
        spare.discard()


def kill_fork_server(worker: Worker) -> None:
    """SIGKILL the fork server of a worker, and wait for its end: until then it may start jobs."""
    os.kill(worker._spawner.pid, signal.SIGKILL)
    assert select.select([worker._spawner.pidfd], [], [], GUARD_S)[0]


def hold_executions(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Have each start wait, once its command executes, for the second event; the first tells it."""
    from spawner import Process

    execute, executed, goes_on = Process.execute, threading.Event(), threading.Event()

    def execute_slowly(process: Any, *args: Any, **options: Any) -> tuple[int, int]:
        found = execute(process, *args, **options)
        executed.set()
        assert goes_on.wait(GUARD_S)
        return found

    monkeypatch.setattr(Process, "execute", execute_slowly)
    return executed, goes_on


def notice_close(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return what is set when a close of the worker, or a leave, waits for starts that go on."""
    closing, wait_for = threading.Event(), worker._starter._idle.wait_for

    def notice(*args: Any) -> bool:
        closing.set()
        return bool(wait_for(*args))

    monkeypatch.setattr(worker._starter._idle, "wait_for", notice)
    return closing


def find_program(name: str, path: Path | None = None) -> str:
    """Return the path of a program that `make tools` or the system's packages install.

    `path`: where to look before PATH. Without the program the test is skipped; with
    JOBWORKER_REQUIRE_PROGRAMS=1 it fails.
    """
    found = str(path) if path and path.exists() else shutil.which(name)
    if found is None and os.environ.get("JOBWORKER_REQUIRE_PROGRAMS"):
        pytest.fail(f"{name} is not installed; .ci/run installs it")
    if found is None:
        pytest.skip(f"needs {name}: run `make tools`, or install it as .ci/run does")
    return found


@cache
def public_python() -> str:
    """Return a Python that every user may execute; skip the test if there is none."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            user = NOBODY if os.geteuid() == 0 else None
            subprocess.run(
                [path, "-I", "-S", "-c", "import ctypes"], user=user, cwd="/", check=True
            )
            return path
    pytest.skip("needs a Python that every user may execute, like /usr/bin/python3")


def job_files(worker: Worker) -> list[str]:
    """Return the files in the worker's output directory, except the spare's empty one."""
    known = {f"{job.job_id}.out" for job in worker.list()}
    directory = worker._parts.output_dir.path
    return sorted(
        path.name for path in directory.iterdir() if path.name in known or path.stat().st_size
    )


SIGNALLED_TREE = """
import contextlib, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
children = int(sys.argv[1])
name = b"leader\\n"
for number in range(children):
    if os.fork() == 0:
        if "setsid" in sys.argv and number % 2:
            os.setsid()
        name, children = b"child\\n", 0
        break
os.write(1, b"up\\n")
signal.sigwait({signal.SIGUSR1})
os.write(1, name)
if "wait" in sys.argv:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
sys.exit(7)
"""
"""A Python program: a leader and children, each of which writes its name when it gets SIGUSR1.

Arguments: how many children; "setsid": half of them have sessions of their own; "wait": the
leader ends after its children.
"""

WITHOUT_FIRST_THREAD = """
import ctypes, os, sys, threading, time
def go_on():
    while b") Z " not in open("/proc/self/stat", "rb").read():
        time.sleep(0.01)
    os.write(int(sys.argv[1]), b"up" + bytes([10]))
    time.sleep(1_000_000)
threading.Thread(target=go_on).start()
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)  # exit(2)
"""
"""A Python program whose first thread ends. Another then writes a line to descriptor argv[1]."""


def await_lines(worker: Worker, job_id: str, line: bytes, count: int) -> None:
    """Block until the job has written that many such lines."""
    output = b""
    with worker.stream(job_id) as chunks:
        for chunk in chunks:
            output += chunk
            if output.split(b"\n").count(line) >= count:
                return
    pytest.fail(f"the job ended and wrote {output!r}")


def await_output(worker: Worker, job_id: str, text: bytes) -> None:
    """Block until the job has written `text`."""
    output = b""
    with worker.stream(job_id) as chunks:
        for chunk in chunks:
            output += chunk
            if text in output:
                return
    pytest.fail(f"the job ended without writing {text!r}; it wrote {output!r}")


def without_cgroup_name(error: str) -> str:
    """Return an error without the random part of the cgroup that the failed attempt would make."""
    return re.sub(r"job-worker-[0-9a-f]{8}", "job-worker-", error)


def make_fifo(path: Path) -> Path:
    """Make a FIFO that every uid may use, so that jobs can."""
    os.mkfifo(path)
    os.chmod(path, 0o666)
    return path


def make_cgroup() -> Path:
    """Make a cgroup with every controller at the top of the hierarchy.

    Raises OSError or ValueError if this host has no such hierarchy, or does not let us.
    """
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    (top,) = [Path(point) for _, point, kind, *_ in mounts if kind == "cgroup2"]
    (top / "cgroup.subtree_control").write_text("+cpu +io +memory +pids")
    path = top / f"test-{uuid.uuid4()}"
    path.mkdir()
    return path


@contextlib.contextmanager
def joined(path: Path) -> Iterator[None]:
    """Move this process into the cgroup `path`, and back to where it was on exit."""
    top = next(each for each in path.parents if not (each / "cgroup.type").exists())
    before = top / own_cgroup()
    (path / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (before / "cgroup.procs").write_text("0")


def own_cgroup() -> str:
    """Return the cgroup of this process, relative to the top of the hierarchy."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    (path,) = [line.removeprefix("0::/") for line in lines if line.startswith("0::")]
    return path


# --- a server, and calls to it ----------------------------------------------------------
#
# All servers of the fixtures have the same token key, so one login serves for all.

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # tests make handshakes fail on purpose
# As server.py sets it. A test module may import grpc before server.py does.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES256-CBC-SHA"
# Some tests fork this process. Without this, gRPC restarts its threads in the child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables of gRPC and of job-worker.

    With a RUNTIME_DIRECTORY of its own: many servers of the tests have the same uids.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GRPC_", "JOBWORKER_"))}
    return kept | {"RUNTIME_DIRECTORY": f"{_RUN.name}/{uuid.uuid4()}/own"}


_RUN = tempfile.TemporaryDirectory()
atexit.register(_RUN.cleanup)  # its own end would warn
# For servers that have the environment of the tests: other tests run at the same time.
os.environ["RUNTIME_DIRECTORY"] = f"{_RUN.name}/tests/own"


def run_server(
    *words: str | Path, before: Sequence[str] = (), stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the program `server`, which ends by itself. `before`: the command that executes it."""
    return subprocess.run(
        [*before, sys.executable, str(_HERE / "server.py"), *map(str, words)],
        input=stdin,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )


class ServerProgram:
    """`server.py` in a process of its own. Attributes: `process`, `address`, `log` (its stderr).

    `before`: the beginning of a command that runs the rest of its arguments, like `setpriv`.
    """

    def __init__(
        self,
        log: Path,
        *options: str,
        env: dict[str, str] | None = None,
        before: tuple[str, ...] = (),
        program: Path = _HERE / "server.py",
    ) -> None:
        self.log = log
        if (config := os.environ.get(TEST_CONFIG)) and "--config" not in options:
            options = (*options, "--config", config)
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*before, sys.executable, str(program), *options],
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
        """Send the signal, wait for the end and return the status; fails if stdout has more."""
        self.process.send_signal(number)
        stdout, _ = self.process.communicate(timeout=GUARD_S)
        if stdout:
            pytest.fail(f"more than one line on stdout: {stdout!r}")
        return self.process.returncode


class ClientProgram:
    """`client.py` as a program. Attribute: `environment`, which a test may change."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def start(
        self,
        *arguments: str,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        start_new_session: bool = False,
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(_HERE / "client.py"), *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=self.environment,
            start_new_session=start_new_session,
        )

    def run(self, *arguments: str, stdin: bytes | None = None) -> tuple[int, bytes, str]:
        """Return exit status, stdout and stderr. `stdin` comes through a pipe."""
        source = subprocess.DEVNULL if stdin is None else subprocess.PIPE
        with self.start(*arguments, stdin=source) as process:
            stdout, stderr = process.communicate(stdin, timeout=GUARD_S)
        return process.returncode, stdout, stderr.decode()

    def read(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Run a command that must succeed with nothing on stderr; return stdout."""
        status, stdout, stderr = self.run(*arguments, stdin=stdin)
        assert (status, stderr) == (0, "")
        return stdout.decode()

    def fail(self, *arguments: str) -> str:
        """Run a command that must fail with 1, no output and one line; return the line."""
        status, stdout, stderr = self.run(*arguments)
        assert (status, stdout) == (1, b""), stderr
        assert re.fullmatch(r"client: [^\n]+\n", stderr), stderr
        return stderr


# --- the same bytes without gRPC ----------------------------------------------------------


def tls_context(certs: Path, certificate: Path | None) -> ssl.SSLContext:
    """Speak HTTP/2 over TLS with the server's CA, and with a client certificate if one is given.

    The key of `NAME.pem` is `NAME-key.pem` beside it.
    """
    context = ssl.create_default_context(cafile=certs / "server-ca.pem")
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, certificate.with_name(f"{certificate.stem}-key.pem"))
    return context


def http2_frame(
    kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", length: int | None = None
) -> bytes:
    """Make a frame (RFC 9113, 4.1). `length`: what it claims to be, if that is not the truth."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP2_SETTINGS = 4  # the type of the frame that both sides send first
HTTP2_GREETING = HTTP2_PREFACE + http2_frame(HTTP2_SETTINGS)  # all that a client must send


FOREVER = ("sh", ["-c", "echo ready; exec sleep infinity"])  # for `Client.start` and `follow`


@cache
def rpc_methods() -> Mapping[str, MethodDescriptor]:
    """Return all RPCs by name."""
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
    """Call any RPC and wait for its end; return its status code and message.

    A Logout that succeeds revokes the client's token, so never call it with one of `tokens`.
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
    metadata = client._link.metadata() if metadata is None else metadata
    call = rpc(data, metadata=metadata, timeout=GUARD_S)
    with contextlib.suppress(grpc.RpcError):
        list(call)
    return call.code().name, call.details()


def run_job(client: Client, command: str = "true", args: Sequence[str] = (), **limits: Any) -> str:
    """Start a job and wait for its end; return its ID."""
    job_id = client.start(command, args, **limits)
    list(client.stream(job_id))
    return job_id


def follow(client: Client, job_id: str) -> OutputStream:
    """Follow a job that was started with `FOREVER`, from after the only line it writes."""
    chunks = client.stream(job_id)
    if next(chunks) != b"ready\n":
        pytest.fail("the job is not ready")
    return chunks


def kill_with_children(pid: int) -> None:
    """Kill a fork server that is our child, and the leaders of its jobs: nobody else would."""
    children = children_of(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
