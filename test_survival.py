"""Servers under load are killed, ended and upgraded at random moments. Nothing may be lost.

Several clients start jobs, read, stop and remove them all the time. What each client was told is
compared with what the last server says. By default there are few moments; for a longer run:

    JOBWORKER_MOMENTS=200 .venv/bin/python -m pytest -s -o time_limit_s=3600 test_survival.py

prints what was counted. With `--slurm` the jobs of the first test run on a cluster.
`test_crash.py` has such a test of a program that embeds a `Worker`.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import shutil
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cluster_plugin
from cgroups import bases
from client import Client, ClientError
from testkit import GUARD_S, ServerProgram, children_of, fork_server_of, small_file_system

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import workerservice_pb2 as worker_pb
    from testcluster import Cluster

_HERE = Path(__file__).resolve().parent
_MOMENTS = int(os.environ.get("JOBWORKER_MOMENTS", "5"))
_CLIENTS = 3
_RETRY_S = 120.0
_FDS_SPARE = 16  # what a spare job may take, which is there or not

_KINDS = ("kill main", "kill fork server", "kill both", "SIGTERM", "upgrade")


class _Job:
    """A job, and all that a client was told of it."""

    def __init__(self, tag: str, dice: random.Random, *, may_be_endless: bool) -> None:
        self.tag = tag
        self.lines = dice.choice((1, 3, 20, 20_000))
        self.code = dice.randrange(100)
        self.is_endless = may_be_endless and dice.random() < 0.3  # until it is stopped
        self.has_input = dice.random() < 0.3  # what it writes is its input
        self.job_id = ""
        self.delivered = b""
        self.end: worker_pb.Job | None = None
        self.was_stopped = False
        self.is_removed = False  # or about to be
        self.is_gone = False
        self.has_gap = False  # the disk was full
        self.first_epoch = 0

    def argv(self, marks: Path) -> list[str]:
        if self.has_input:
            rest = "exec sleep infinity" if self.is_endless else f"exit {self.code}"
            return ["-c", f"echo {self.tag} >>{marks}/{self.tag}; cat; {rest}"]
        pause = "" if self.lines > 100 else "sleep 0.05;"
        rest = "exec sleep infinity" if self.is_endless else f"exit {self.code}"
        return [
            "-c",
            (
                f"echo {self.tag} >>{marks}/{self.tag}; i=0; while [ $i -lt {self.lines} ]; do "
                f"echo $i {self.tag}; {pause} i=$((i+1)); done; {rest}"
            ),
        ]

    @property
    def output(self) -> bytes:
        """All that it writes, if it may."""
        return "".join(f"{i} {self.tag}\n" for i in range(self.lines)).encode()


class _Load:
    """Clients that use a server all the time. Attributes: `jobs`; `counts`, of all that was done.

    `epoch`: is odd from before a fork server is killed until no client can use its server any more.
    A job that was started meanwhile may be LOST, too, so it counts as one that was there before.
    `has_endless`: whether some jobs run until they are stopped.
    """

    def __init__(
        self, connect: Callable[[], Client], marks: Path, seed: int, *, has_endless: bool = True
    ) -> None:
        self._connect, self._marks, self._has_endless = connect, marks, has_endless
        # Guards all below. Notified when something was done.
        self._changed = threading.Condition()
        self.jobs: list[_Job] = []
        self.counts: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self.epoch = 0
        self.is_full = False  # the disk of the server, or it was so a moment ago
        self.was_full = False
        self._is_over = False
        self._threads = [
            threading.Thread(target=self._run, args=(n, random.Random(f"{seed}.{n}")), daemon=True)
            for n in range(_CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def await_more(self, count: int) -> None:
        """Block until so much more was done."""
        with self._changed:
            until = self.counts.total() + count
            assert self._changed.wait_for(
                lambda: self.counts.total() >= until or self.errors, GUARD_S * 2
            )
            assert not self.errors, self.errors

    @contextlib.contextmanager
    def nothing_is_noted(self) -> Iterator[None]:
        """Within this context no client goes on after what it does now."""
        with self._changed:
            yield

    def close(self) -> None:
        """Let each client finish what it does."""
        self._is_over = True
        for thread in self._threads:
            thread.join(GUARD_S * 2)
            assert not thread.is_alive()
        assert not self.errors, self.errors

    def _note(self, what: str) -> None:
        with self._changed:
            self.counts[what] += 1
            self._changed.notify_all()

    def _run(self, number: int, dice: random.Random) -> None:
        try:
            with self._connect() as client:
                i = 0
                while not self._is_over:
                    job = _Job(f"{number}.{i}", dice, may_be_endless=self._has_endless)
                    try:
                        self._use(client, job, dice)
                    except ClientError as error:
                        if error.code != "NOT_FOUND" or not self.was_full:
                            raise
                        job.is_removed = True  # it gave way
                    i += 1
        except BaseException as error:  # noqa: BLE001 -- raised by the test's thread
            with self._changed:
                self.errors.append(error)
                self._changed.notify_all()

    def _use(self, client: Client, job: _Job, dice: random.Random) -> None:
        """Start a job, read its output, perhaps in part, stop it or not, remove it or not."""
        self._start(client, job)
        reads_all = dice.random() < 0.7 and not job.is_endless
        self._read(client, job, None if reads_all else dice.randrange(1, len(job.output) + 1))
        if job.is_endless or (not reads_all and dice.random() < 0.5):
            job.was_stopped = True
            job.end = client.stop(job.job_id)
            self._note("stopped")
        elif reads_all:
            job.end = client.status(job.job_id)
            self._note("ended")
        if job.end is not None and dice.random() < 0.3:
            job.is_removed = True
            with contextlib.suppress(ClientError):  # NOT_FOUND, when it was repeated
                client.remove(job.job_id)
            job.is_gone = True
            self._note("removed")

    def _read(self, client: Client, job: _Job, most: int | None) -> None:
        """Read the output, at least so many bytes of it or all."""
        with contextlib.closing(client.stream(job.job_id)) as stream:
            try:
                for chunk in stream:
                    job.has_gap |= stream.gap is not None
                    job.delivered += chunk
                    self._note("read")
                    if most is not None and len(job.delivered) >= most:
                        return
            except ClientError as error:
                if error.code != "DATA_LOSS":
                    raise
                job.has_gap = True
        job.has_gap |= stream.gap is not None

    def _start(self, client: Client, job: _Job) -> None:
        """Start a job, and give it its input."""
        job.first_epoch = self.epoch // 2 * 2
        self.jobs.append(job)
        command = job.argv(self._marks)
        request_id = str(uuid.uuid4())
        while not job.job_id:
            try:
                job.job_id = client.start(
                    "sh", command, stdin=job.has_input, timeout=3600, request_id=request_id
                )
            except ClientError as error:
                # The server is about to end, because its fork server has.
                if "the process that starts jobs has died" not in str(error) and not self.was_full:
                    raise
                self._note("refused")
        self._note("started")
        if job.has_input:
            lines = job.output.splitlines(keepends=True)
            try:
                client.write_input(job.job_id, self._noted(lines))
            except ClientError:
                if self.epoch == job.first_epoch:  # otherwise the job may be LOST
                    raise

    def _noted(self, lines: list[bytes]) -> Iterator[bytes]:
        """Yield all lines, in some pieces."""
        pieces = min(len(lines), 20)
        for i in range(pieces):
            self._note("written")
            yield b"".join(lines[len(lines) * i // pieces : len(lines) * (i + 1) // pieces])


def _send_each(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class _Place:
    """A state directory, and the servers that use it one after the other.

    `cluster`: where the jobs run; None for this machine alone.
    """

    def __init__(
        self,
        directory: Path,
        certs: Path,
        limits: str,
        state: Path | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        self.directory, self.certs, self.cluster = directory, certs, cluster
        self.state = state or directory / "state"
        self.cgroups: set[Path] = set()  # of all servers
        self._limits = limits
        self.marks = directory / "marks"
        self.marks.mkdir()
        self.marks.chmod(0o1777)
        self.port = "0"
        self.program: ServerProgram | None = None
        self.fork_server = 0
        self._code = _HERE
        self._starts = 0
        self._token = ""

    def start(self) -> None:
        self._starts += 1
        self.program = ServerProgram(
            self.directory / f"log{self._starts}",
            *(
                "--listen",
                f"127.0.0.1:{self.port}",
                "--limits",
                self._limits,
                "--uids",
                "78000-78999",
            ),
            *("--certs", str(self.certs), "--state-dir", str(self.state)),
            *("--restart-window", "5m"),
            program=self._code / "server.py",
        )
        self.port = self.program.address.rpartition(":")[2]
        if not self.fork_server or self._has_ended():  # no job ran, so nobody was awaited
            self.fork_server = fork_server_of(self.program.process.pid)
        base = bases("auto", None)[0]
        path = Path(f"/proc/{self.fork_server}/cgroup").read_text()
        for name in re.findall("(?m)^0::.*/(job-worker-[^/]*)/", path):
            assert base is not None
            self.cgroups.add(Path(base, name))

    def connect(self) -> Client:
        client = Client(
            f"127.0.0.1:{self.port}",
            certs=self.certs,
            token=self._token,
            retry_for=_RETRY_S,
            connect_for=_RETRY_S,
        )
        if not self._token:
            self._token, _ = client.login("user", "user")
        return client

    def kill_fork_server(self, *, kills_srun: bool = False) -> None:
        """Kill it; without cgroups also the leaders of its jobs, because nothing else can.

        On a cluster each srun ends its job. `kills_srun`: kill both processes of each; then
        nobody but the next server can end the jobs.
        """
        pid, self.fork_server = self.fork_server, 0
        children = children_of(pid) if not self.cgroups else []
        if self.cluster is not None:
            children += [each for child in children for each in children_of(child)]
            children = children if kills_srun else []
            _send_each(children, signal.SIGSTOP)  # neither notices the end of the other one
        os.kill(pid, signal.SIGKILL)
        _send_each(children, signal.SIGKILL)

    def await_main(self) -> None:
        """Block until the server has ended."""
        assert self.program is not None
        self.program.process.communicate(timeout=GUARD_S)

    def upgrade(self) -> None:
        """Go on with a copy of the program, whose version has another number."""
        self._code = self.directory / f"code{self._starts}"
        self._code.mkdir()
        for path in _HERE.glob("*.py"):
            if not path.name.startswith("test_"):
                shutil.copy(path, self._code)
        version = self._code / "version.py"
        version.write_text(re.sub('"[0-9.]+"', f'"9.{self._starts}"', version.read_text()))

    def moment(self, kind: str, load: _Load) -> None:
        """Let something happen to the server, and start the next one."""
        assert self.program is not None
        main = self.program.process.pid
        kills_fork_server = kind in {"kill fork server", "kill both"}
        load.epoch += kills_fork_server
        if kind == "kill fork server":
            self.kill_fork_server()
        elif kind == "kill both":
            os.kill(main, signal.SIGKILL)
            self.kill_fork_server(kills_srun=True)
        elif kind == "kill main":
            os.kill(main, signal.SIGKILL)
        else:
            os.kill(main, signal.SIGTERM)
        if kind == "upgrade":
            self.upgrade()
        self.await_main()
        load.epoch += kills_fork_server
        self.start()

    def _has_ended(self) -> bool:
        try:
            return (
                Path(f"/proc/{self.fork_server}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
            )
        except FileNotFoundError:
            return True

    def descriptors(self) -> int:
        """How many both processes have open."""
        assert self.program is not None
        pids = self.program.process.pid, self.fork_server
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)

    def end(self) -> None:
        """End the server and all jobs."""
        if self.program is None:
            return
        with contextlib.ExitStack() as undo:
            pidfd = None
            with contextlib.suppress(ProcessLookupError):
                pidfd = undo.enter_context(open(os.pidfd_open(self.fork_server or 0x3FFFFF)))
            if self.program.process.poll() is None:
                self.program.end(signal.SIGINT)
            if pidfd is not None:
                assert select.select([pidfd], [], [], GUARD_S)[0]
        self.program = None


@pytest.fixture
def limits() -> str:
    """The server's --limits; a test may have others."""
    return "off"


@pytest.fixture
def place(
    public: Path, certs: Path, limits: str, request: pytest.FixtureRequest
) -> Iterator[_Place]:
    with contextlib.ExitStack() as undo:
        cluster = None
        if request.config.getoption("--slurm"):
            assert request.getfixturevalue("cluster")  # or the test is skipped
            cluster = undo.enter_context(cluster_plugin.running())  # all its jobs are this test's
            undo.enter_context(cluster_plugin.used_by_servers(cluster))
        made = _Place(public, certs, limits, cluster=cluster)
        yield made
        made.end()


def _stop_rest(place: _Place, load: _Load) -> None:
    """Stop the jobs that nobody waits for."""
    with place.connect() as client:
        running = {job.job_id for job in client.list() if not job.HasField("ended_at")}
        for job in load.jobs:
            job.was_stopped = job.was_stopped or job.job_id in running
        for job_id in running:
            client.stop(job_id)


def _judge(place: _Place, load: _Load, found: Counter[str]) -> None:
    """Compare what the clients were told with what the server says now; count in `found`."""
    with place.connect() as client:
        there = {job.job_id: job for job in client.list()}
        for job in load.jobs:
            state = there.pop(job.job_id, None)
            if job.is_removed:
                found["removed jobs that are back"] += state is not None
                continue
            if state is None:
                # Jobs that have ended give way when the disk is full.
                gave_way = load.was_full
                found["jobs that gave way" if gave_way else "jobs lost"] += 1
                continue
            output, is_whole = _output(client, job.job_id)
            state = client.status(job.job_id)
            if load.was_full and (not is_whole or state.output_lost_bytes or job.has_gap):
                found["jobs with a gap"] += 1
                output = job.output
            else:
                found["delivered bytes missing"] += not output.startswith(job.delivered)
                found["wrong output"] += not job.output.startswith(output)
            if not _is_true(job, state, output, load.epoch):
                found["wrong statuses"] += 1
                sys.stdout.write(
                    f"{state}of {job.code=} {job.was_stopped=} {job.first_epoch=} {load.epoch=}: "
                    f"{len(output)} of {len(job.output)} bytes, {is_whole=}\n"
                )
            found["jobs that ended otherwise than a client was told"] += (
                job.end is not None and job.end.end_reason != state.end_reason
            )
        found["jobs that nobody has started"] += len(there)
    marks = {path.name: len(path.read_text().split()) for path in place.marks.iterdir()}
    found["jobs run twice"] += sum(times > 1 for times in marks.values())
    ended = {job.tag for job in load.jobs if job.end is not None and job.delivered}
    found["jobs that never ran"] += len(ended - marks.keys())


def _output(client: Client, job_id: str) -> tuple[bytes, bool]:
    """Return what is kept of the output, and whether that is all."""
    output = b""
    with contextlib.closing(client.stream(job_id)) as stream:
        try:
            for chunk in stream:
                output += chunk
        except ClientError as error:
            if error.code != "DATA_LOSS":
                raise
            return output, False
    return output, True


def _is_true(job: _Job, state: worker_pb.Job, output: bytes, epoch: int) -> bool:
    """Whether a job may have this end, and has the output that belongs to it."""
    reason = _reason(state)
    if reason == "EXITED":
        return state.exit_code == job.code and not job.is_endless and output == job.output
    if reason == "STOPPED_BY_OWNER":
        return job.was_stopped
    # A job that was killed with its fork server: its own process may still have noticed.
    return reason in {"LOST", "SIGNALLED"} and epoch > job.first_epoch


def _reason(state: worker_pb.Job) -> str:
    from workerservice_pb2 import EndReason

    return EndReason.Name(state.end_reason).removeprefix("END_REASON_")


def _leftovers(place: _Place, found: Counter[str], ids: set[str], kept: set[str]) -> list[Path]:
    """Count what is left of jobs when all have ended; return the files.

    `ids`: of all jobs. `kept`: of the finished jobs that there are.
    """
    if place.cluster is not None:
        assert "JobName=jw-" in place.cluster.run("scontrol", "show", "jobs")  # they ran there
        found["jobs left over on the cluster"] += len(place.cluster.await_no_jobs())
        found["steps left over on the cluster"] += len(place.cluster.step_daemons())
        tmp = {path.name[3:39] for path in Path("/tmp").glob("jw-*")}
        found["TMPDIRs left over on the nodes"] += len(tmp & ids)
    text = str(place.marks).encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if pid != str(os.getpid()) and text in Path(f"/proc/{pid}/cmdline").read_bytes():
                found["processes left over"] += 1
    found["cgroups left over"] += sum(path.exists() for path in place.cgroups)
    left = list((place.state / "tmp").iterdir())
    left += [path for path in (place.state / "output").iterdir() if path.name[:36] not in kept]
    left += place.state.glob("**/*.new")
    found["files left over"] += len(left)
    return left


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have the first test run with cgroups, if the host has them, and in a longer run without."""
    if metafunc.function is test_nothing_is_lost_at_random_moments:
        is_long = "JOBWORKER_MOMENTS" in os.environ and not metafunc.config.getoption("--slurm")
        metafunc.parametrize("limits", ["auto", "off"] if is_long else ["auto"])


def test_nothing_is_lost_at_random_moments(place: _Place) -> None:
    """Kills of the server, of its fork server and of both; ends and upgrades."""
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    place.start()
    place.connect().close()  # logs in
    idle = place.descriptors()
    load = _Load(place.connect, place.marks, seed)
    moments: Counter[str] = Counter()
    begun = time.monotonic()
    for number in range(_MOMENTS):
        kind = _KINDS[number % len(_KINDS)] if _MOMENTS < 50 else dice.choice(_KINDS)
        load.await_more(dice.randrange(1, 30))
        place.moment(kind, load)
        moments[kind] += 1
    load.close()
    found: Counter[str] = Counter()
    _stop_rest(place, load)
    _judge(place, load, found)
    found["descriptors left over"] += max(0, place.descriptors() - idle - _FDS_SPARE)
    with place.connect() as client:
        kept = {job.job_id for job in client.list()}
    place.end()
    left = _leftovers(place, found, {job.job_id for job in load.jobs}, kept)
    told = f"seed {seed}; {time.monotonic() - begun:.0f} s; {dict(moments)}; {dict(load.counts)}"
    sys.stdout.write(f"\n{told}\n" + "".join(f"{what}: {n}\n" for what, n in found.items()))
    assert not found.total(), (told, +found, left)


class _Copy:
    """A state directory as the power cut would have left it, and what clients knew by then."""

    def __init__(
        self, place: _Place, load: _Load, target: Path, dice: random.Random, *, is_cut: bool
    ) -> None:
        assert place.program is not None
        pids = place.program.process.pid, place.fork_server
        self.state = target
        with load.nothing_is_noted():
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            self.ended = {job.job_id: job for job in load.jobs if job.end and not job.is_removed}
            self.removed = {job.job_id for job in load.jobs if job.is_removed}
            self.gone = {job.job_id for job in load.jobs if job.is_gone}
            self.jobs = {job.job_id: job for job in load.jobs}
            self.delivered = {job.job_id: job.delivered for job in load.jobs}
        try:
            shutil.copytree(place.state, target, ignore=shutil.ignore_patterns("*.sock", "homes"))
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        self.wal = target / "store" / "store.db-wal"
        self.is_cut = is_cut and self.wal.exists()
        if self.is_cut:  # the disk had not got the last writes
            size = self.wal.stat().st_size
            os.truncate(self.wal, max(0, size - dice.randrange(40_000)))

    def judge(self, place: _Place, found: Counter[str]) -> None:
        """Start a server on it and look at each job."""
        place.state = self.state
        place.start()
        with place.connect() as client:
            there = {job.job_id: job for job in client.list()}
            for job_id, state in there.items():
                output, _ = _output(client, job_id)
                job = self.jobs.get(job_id)
                if job is None or job_id in self.removed:
                    continue
                reason = _reason(client.status(job_id))
                is_whole = output == job.output
                found["wrong output"] += not job.output.startswith(output)
                found["delivered bytes missing"] += not output.startswith(self.delivered[job_id])
                found["wrong statuses"] += not (
                    reason in {"LOST", "STOPPED_BY_OWNER"}
                    or (reason == "EXITED" and state.exit_code == job.code and is_whole)
                )
                found["known ends lost"] += (
                    job_id in self.ended and not self.is_cut and reason == "LOST"
                )
            found["jobs lost"] += len(self.ended.keys() - there.keys()) if not self.is_cut else 0
            found["removed jobs that are back"] += (
                len(self.gone & there.keys()) if not self.is_cut else 0
            )
            assert client.start("true")  # it works
        place.end()


def test_power_cut_loses_nothing_but_the_last_moments(public: Path, place: _Place) -> None:
    """The state directory is copied while it is written; in half of the copies the end of the log
    of the database is missing. A server goes on with each copy: all jobs that ran are LOST.
    """
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    place.start()
    place.connect().close()
    load = _Load(place.connect, place.marks, seed)
    copies = []
    for number in range(max(2, _MOMENTS // 5)):
        load.await_more(dice.randrange(20, 60))
        target = public / f"copy{number}"
        copies.append(_Copy(place, load, target, dice, is_cut=number % 2 == 1))
    load.close()
    place.end()
    found: Counter[str] = Counter()
    for copy in copies:
        place.fork_server = 0
        copy.judge(place, found)
    cuts = sum(copy.is_cut for copy in copies)
    told = f"seed {seed}; {len(copies)} copies, {cuts} cut; {dict(load.counts)}"
    sys.stdout.write(f"\n{told}\n" + "".join(f"{what}: {n}\n" for what, n in found.items()))
    assert not found.total(), (told, +found)


@pytest.fixture
def small_place(public: Path, certs: Path) -> Iterator[_Place]:
    """A place whose state directory is on a small disk."""
    with small_file_system("32m") as disk:
        disk.chmod(0o755)
        made = _Place(public, certs, "off", disk / "state")
        yield made
        made.end()


def _fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))


def test_full_disk_loses_nothing_but_output(small_place: _Place) -> None:
    """The disk fills at random moments, and the server is killed meanwhile or goes on.

    Starts are refused, output may have gaps, and finished jobs give way to those that run. Whatever
    ends meanwhile has its true end.
    """
    place = small_place
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    place.start()
    place.connect().close()
    # A reader of an endless job could wait for bytes that were not kept.
    load = _Load(place.connect, place.marks, seed, has_endless=False)
    disk, kills = place.state.parent, 0
    for number in range(max(2, _MOMENTS // 5)):
        load.await_more(dice.randrange(1, 30))
        load.is_full = load.was_full = True
        _fill(disk)
        load.await_more(dice.randrange(1, 30))
        if number % 2:
            kills += 1
            assert place.program is not None
            os.kill(place.program.process.pid, signal.SIGKILL)
            place.await_main()
        (disk / "filler").unlink()
        if number % 2:
            place.start()
        load.await_more(5)
        load.is_full = False
    load.close()
    found: Counter[str] = Counter()
    _stop_rest(place, load)
    _judge(place, load, found)
    told = f"seed {seed}; {kills} kills; {dict(load.counts)}"
    sys.stdout.write(f"\n{told}\n" + "".join(f"{what}: {n}\n" for what, n in found.items()))
    # The last: a removal that could not be written.
    for what in ("jobs with a gap", "jobs that gave way", "removed jobs that are back"):
        found.pop(what, None)
    assert not found.total(), (told, +found)
