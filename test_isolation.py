"""Tests of isolation: jobs attack the server and other users' jobs.

The server is the real program. Root starts it, with two users and an admin. Jobs can enter the
directories in which the server keeps its files, so only the files' rights keep jobs out. A script
prints "gained" for each attack that works, and "came so far" at its end.

Other tests look at the rights that the server's own processes have left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc
import pytest

import workerservice_pb2 as worker_pb
from cgroupfs import wait_event
from client import Client, ClientError
from daemon import BROKEN_STATUS
from jobtable import JobTable
from privileges import can_change_user, can_kill_any
from store import Store, reading
from testkit import (
    GUARD_S,
    JOB_VARIABLES,
    NOBODY,
    SIGNALLED_TREE,
    WITHOUT_FIRST_THREAD,
    children_of,
    clean_environment,
    fork_server_of,
    public_python,
    run_server,
    status_of,
)
from users import make_user
from worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
# Of this process alone: `kill -1` reaches the jobs of every server on this host with the same uids.
_UIDS = range(100_000 + os.getpid() % 10_000 * 100, 100_000 + os.getpid() % 10_000 * 100 + 100)
_SERVER_UID, _FIRST_UID = _UIDS[:2]
_OWN_UIDS = ("--uids", f"{_UIDS[0]}-{_UIDS[-1]}")
_PASSWORDS = {"alice": "alice's password", "bob": "bob's password", "root": "an admin's password"}
_FOREVER = "exec sleep infinity"
# Without isolation these scripts would harm this host, so they check their uid first.
_ONLY_AS_A_USER = f'[ "$(id -u)" -ge {_FIRST_UID} ] || {{ echo gained an uid; exit 1; }}'
_KILL_ALL = f"{_ONLY_AS_A_USER}; kill -s KILL -- -1"
_PTRACE, _PROCESS_VM_READV, _PTRACE_ATTACH, _PTRACE_SEIZE = 101, 310, 16, 0x4206  # on x86-64


@pytest.fixture(autouse=True, scope="module")
def _as_root() -> None:
    """Skip the tests without root's rights; in CI fail them."""
    if not (os.geteuid() == 0 and can_change_user() and can_kill_any()):
        if os.environ.get("JOBWORKER_REQUIRE_KERNEL") == "1":
            pytest.fail("JOBWORKER_REQUIRE_KERNEL=1, but this test needs root")
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def entries() -> dict[str, str]:
    """The line of the users file for each user."""
    roles = {"root": "admin"}
    return {
        name: str(make_user(name, roles.get(name, "user"), password))
        for name, password in _PASSWORDS.items()
    }


def _users_file(directory: Path, *lines: str) -> Path:
    """Make a users file with these lines that nobody else may read."""
    users = directory / "users"
    users.touch(0o600)
    users.write_text("".join(f"{line}\n" for line in lines))
    return users


# The beginning of a command. What it starts may not use clone3, and forks with Popen.
_WITHOUT_CLONE3 = (
    *("env", f"PYTHONPATH={_HERE}", sys.executable, "-c"),
    "import os, sys, testkit; testkit.refuse_clone3(); os.execvp(sys.argv[1], sys.argv[1:])",
)
_ONE_WAY_TO_FORK = pytest.mark.parametrize("way_to_fork", ["clone3"], indirect=True)


@pytest.fixture(scope="module", params=["clone3", "popen"])
def way_to_fork(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The beginning of a server's command, for both ways in which its fork server forks."""
    return _WITHOUT_CLONE3 if request.param == "popen" else ()


class _Program:
    """A server program. Attributes: `process`, `address`, `log` (a file with its stderr)."""

    def __init__(self, log: Path, *command: str | Path) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=clean_environment() | {"A_SECRET_OF_THE_SERVER": "do not tell"},
            )
        assert self.process.stdout
        line = self.process.stdout.readline()
        self.address = line.removeprefix("listening on ").rstrip("\n")
        if not line:
            self.process.communicate()
            pytest.fail(f"no server: {log.read_text()}")

    def end(self) -> int:
        self.process.terminate()
        self.process.communicate(timeout=GUARD_S)
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def _server(log: Path, *options: str | Path, before: tuple[str | Path, ...] = ()) -> _Program:
    common = ("--listen", "127.0.0.1:0", "--limits", "auto", *_OWN_UIDS)
    return _Program(log, *before, sys.executable, _HERE / "server.py", *common, *options)


# A careless administrator starts the server with groups, an open umask and core dumps.
_CARELESS = (
    *("setpriv", "--groups=0,4,24", "sh", "-c"),
    *('umask 0; ulimit -c unlimited; exec "$@"', "sh"),
)


def _login(address: str, certs: Path, name: str, password: str | None = None) -> Client:
    client = Client(address, certs=certs)
    client.login(name, password or _PASSWORDS[name])
    return client


def _sh(client: Client, script: str, *args: object) -> str:
    """Start a shell script with the arguments $1, $2, ...; return the job's ID."""
    return client.start("sh", ["-c", script, "sh", *map(str, args)])


def _run(client: Client, script: str, *args: object) -> str:
    """Run a shell script as a job to its end; return its output."""
    return b"".join(client.stream(_sh(client, script, *args))).decode(errors="replace")


def _first_line(client: Client, job: str) -> str:
    """Block until the job has written a line."""
    output = b""
    for chunk in (chunks := client.stream(job)):
        output += chunk
        if b"\n" in output:
            break
    chunks.close()
    return output.decode().partition("\n")[0]


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return status_of(pid)["State"][0] not in "ZXT"
    return False


@dataclass(frozen=True)
class _House:
    """A server, its users, and the job of alice that bob attacks."""

    program: _Program
    directory: Path
    alice: Client
    bob: Client
    admin: Client
    victim: str
    victim_pid: int

    @property
    def server_pid(self) -> int:
        return self.program.process.pid

    @property
    def fork_server_pid(self) -> int:
        return fork_server_of(self.server_pid)

    @property
    def targets(self) -> list[int]:
        return [self.server_pid, self.fork_server_pid, self.victim_pid]

    def attack(self, script: str, *args: object) -> str:
        """Run a script as bob. It must gain nothing, and every target must be alive afterwards."""
        output = _run(self.bob, f"{_ONLY_AS_A_USER}\n{script}\necho came so far", *args)
        assert "gained" not in output, output
        assert output.endswith("came so far\n"), output
        self.assert_all_is_well()
        return output

    def assert_all_is_well(self) -> None:
        assert [pid for pid in self.targets if not _is_alive(pid)] == []
        assert self.alice.status(self.victim).status == worker_pb.JOB_STATUS_RUNNING


@pytest.fixture(scope="module")
def house(
    certs: Path,
    entries: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    way_to_fork: tuple[str, ...],
) -> Iterator[_House]:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.chmod(0o755)
        shutil.copytree(certs, directory / "certs")
        (directory / "certs").chmod(0o755)
        users = _users_file(directory, *entries.values())
        log = tmp_path_factory.mktemp("log") / "server.log"
        options = (
            *("--certs", directory / "certs", "--users", users),
            *("--state-dir", directory / "state", "--require-isolation"),
        )
        before = (*way_to_fork, *_CARELESS)
        program = stack.enter_context(_server(log, *options, before=before))
        clients = [
            stack.enter_context(_login(program.address, directory / "certs", name))
            for name in ("alice", "bob", "root")
        ]
        victim = _sh(clients[0], f"echo $$ ; echo a secret of alice; {_FOREVER}")
        pid = int(_first_line(clients[0], victim))
        yield _House(program, directory, clients[0], clients[1], clients[2], victim, pid)
        assert program.end() == 0, log.read_text()


# --- the server's processes -------------------------------------------------------------------


def test_server_has_no_rights_left_in_any_thread(house: _House) -> None:
    """The process that talks to the network is an ordinary user, and can gain no right."""
    _run(house.bob, "true")
    statuses = []
    for task in os.listdir(f"/proc/{house.server_pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            statuses.append(status_of(f"{house.server_pid}/task/{task}"))
    assert len(statuses) > 3
    for status in statuses:
        assert status["Uid"].split() == status["Gid"].split() == [str(_SERVER_UID)] * 4
        assert status["Groups"] == ""
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0
        assert status["NoNewPrivs"] == "1"


def test_server_imports_everything_while_it_is_root(certs: Path, tmp_path: Path) -> None:
    """The server works although only root can read its modules and gRPC's."""
    tmp_path.chmod(0o700)
    paths: list[str] = []
    for directory in (_HERE, Path(grpc.__file__).parent.parent):
        link = tmp_path / f"{len(paths)}"
        link.symlink_to(directory)
        paths.append(str(link))
    program = ("env", f"PYTHONPATH={':'.join(paths)}", sys.executable, "-P", "-m", "server")
    options = ("--listen", "127.0.0.1:0", "--limits", "auto", "--require-isolation")
    kept = ("--certs", certs, "--state-dir", tmp_path / "state")
    with _Program(tmp_path / "log", *program, *options, *kept) as running:
        with _login(running.address, certs, "user", "user") as user:
            assert _run(user, "echo hello") == "hello\n"
            job = _sh(user, _FOREVER)
            assert user.stop(job).status == worker_pb.JOB_STATUS_STOPPED
            assert user.status(job).command == "sh"
            user.remove(job)
            with pytest.raises(ClientError, match="no such file"):
                user.start("/there/is/none")
            running.process.send_signal(signal.SIGHUP)
            _await_log(running, "2 users are in force")
            assert len(user.list()) == 1
            user.logout()
        assert running.end() == 0
    assert "Traceback" not in running.log.read_text()


def test_fork_server_keeps_six_capabilities(house: _House) -> None:
    """SETUID, SETGID, KILL, CHOWN, DAC_OVERRIDE and SYS_RESOURCE. It can gain no other."""
    status = status_of(house.fork_server_pid)
    ours = int(status_of("self")["CapEff"], 16)  # a container may lack CAP_SYS_RESOURCE
    kept = ours & sum(1 << number for number in (0, 1, 5, 6, 7, 24))
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff")} == {kept}
    assert {int(status[name], 16) for name in ("CapInh", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Threads"]) == ("1", "1")


def test_what_the_server_keeps_is_private_file_by_file(house: _House) -> None:
    """Each file has the mode 0600. Jobs pass through the directory to their homes."""
    kept = [path for path in (house.directory / "state").rglob("*") if path.is_file()]
    names = {path.name for path in kept}
    assert {"token.key", "store.db", "audit.log", f"{house.victim}.out"} <= names
    for path in [*kept, house.directory / "users", *(house.directory / "certs").glob("*-key.pem")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for name, mode in (("state", 0o711), ("state/homes", 0o711), ("state/output", 0o700)):
        assert stat.S_IMODE((house.directory / name).stat().st_mode) == mode
    # Of these files only the output belongs to the process that talks to the network.
    owners = {path.name: path.stat().st_uid for path in kept if path.suffix != ".out"}
    assert set(owners.values()) == {0}, owners


# --- what a job is ----------------------------------------------------------------------------


def test_job_has_no_rights_at_all(house: _House) -> None:
    """A job has its own uid and gid, no other group, no capability, no_new_privs and umask 077."""
    output = house.attack("cat /proc/self/status; umask")
    status = dict(line.split(":\t") for line in output.splitlines() if ":\t" in line)
    with reading(house.directory / "state/store") as store:
        ((number,),) = store.execute("SELECT uid FROM uids WHERE name = 'bob'")
    assert number >= _FIRST_UID
    uid = str(number)
    assert status["Uid"].split() == status["Gid"].split() == [uid] * 4
    assert status["Groups"].strip() == ""
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert "\n0077\n" in output
    signals = {name: int(status[name], 16) & 0x3FFF_FFFF for name in ("SigBlk", "SigIgn")}
    assert signals == {"SigBlk": 0, "SigIgn": 0}


def test_users_have_uids_of_their_own(house: _House) -> None:
    """All jobs of a user have one uid. No two users have the same uid."""
    uids = [
        {_run(client, "id -u; id -g; id -G") for _ in range(2)}
        for client in (house.alice, house.bob, house.admin)
    ]
    assert [len(each) for each in uids] == [1, 1, 1]
    texts = [each.pop().split() for each in uids]
    assert all(len(set(each)) == 1 for each in texts)
    numbers = {int(each[0]) for each in texts}
    assert len(numbers) == 3
    assert numbers <= set(_UIDS)


def test_job_has_its_limits(house: _House) -> None:
    """A job dumps no core; descriptors, processes, locked memory and priority are bounded."""
    output = house.attack("cat /proc/self/limits; ulimit -c unlimited && echo gained")
    limits = {line[:26].strip(): line[26:].split()[:2] for line in output.splitlines()}
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max realtime priority"] == limits["Max nice priority"] == ["0", "0"]
    assert int(limits["Max open files"][0]) == 1024
    assert int(limits["Max open files"][1]) <= 65_536
    for name in ("Max processes", "Max locked memory"):
        assert int(limits[name][1]) <= 8 * 1024 * 1024


def test_job_has_three_descriptors_and_can_open_them_again(house: _House) -> None:
    """/dev/stdin, /dev/stdout and /dev/stderr work. No other descriptor is open."""
    output = house.attack(
        "ls /proc/self/fd; echo out >/dev/stdout; echo err >/dev/stderr; echo fd >/proc/self/fd/1"
        "; cat </dev/stdin"
    )
    assert output.split() == ["0", "1", "2", "3", "out", "err", "fd", "came", "so", "far"]


def test_job_knows_nothing_of_the_servers_environment(house: _House) -> None:
    """A job has only the documented variables. USER is the API user."""
    lines = house.attack("exec 2>&1; env").splitlines()
    names = {line.partition("=")[0] for line in lines if "=" in line}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == JOB_VARIABLES
    assert {"USER=bob", f"HOME={house.directory / 'state/homes/bob'}"} <= set(lines)


def test_command_in_a_home_that_cannot_be_executed_is_explained(house: _House) -> None:
    """The job's user looks at the file, because the server may not enter a home."""
    files = {
        "crlf": ("#!/bin/sh\\r\\n", "CR LF"),
        "lost": ("#!/no/such/interpreter\\n", "the interpreter its first line names is missing"),
        "bom": ("\\357\\273\\277#!/bin/sh\\n", "byte order mark"),
        "here.sh": ("#!/bin/sh\\n", "for the file in the job's directory write ./here.sh"),
    }
    for name, (content, _) in files.items():
        _run(house.bob, f"cd; printf '{content}' >{name}; chmod 700 {name}")
    for name, (_, problem) in files.items():
        command = name if "." in name else f"./{name}"
        with pytest.raises(ClientError, match=problem):
            house.bob.start(command)
    _run(house.bob, "cd; mkdir directory")
    with pytest.raises(ClientError, match="it is a directory"):
        house.bob.start("./directory")


# --- files ------------------------------------------------------------------------------------

_SECRETS = [
    *("certs/server-key.pem", "certs/server-ca-key.pem", "certs/client-ca-key.pem"),
    *("certs/client-key.pem", "state/token.key", "state/store/store.db", "state/audit.log"),
    *("state/store/store.db-wal", "state/output/VICTIM.out", "users"),
]
_STEAL = """
    for path in "$1" "/proc/$2/root$1" "/proc/$3/root$1" "/proc/$4/root$1"; do
        cat "$path" && echo gained
        2>/dev/null true >>"$path" && echo gained
        chmod 777 "$path" && echo gained
        cp -p "$path" "$JOB_ID" && echo gained
        ln "$path" "/tmp/$JOB_ID" && echo gained && rm -f "/tmp/$JOB_ID"
        mv "$path" "$path.moved" && echo gained
        rm -f "$path" && ! [ -e "$path" ] && [ -r "${path%/*}" ] && echo gained
    done 2>&1"""


@pytest.mark.parametrize("name", _SECRETS)
def test_job_cannot_read_or_change_what_the_server_keeps(house: _House, name: str) -> None:
    """These are the keys, the users file, the uids, the audit log and another user's output."""
    path = house.directory / name.replace("VICTIM", house.victim)
    path.open("ab").close()  # the server makes some of these files at the first write
    before = path.stat().st_ino, path.stat().st_mode, path.read_bytes()[:10_000]
    output = house.attack(_STEAL, path, *house.targets)
    assert "ermission denied" in output
    assert (path.stat().st_ino, path.stat().st_mode) == before[:2]
    assert path.read_bytes().startswith(before[2])


def test_job_reaches_what_is_public(house: _House) -> None:
    """A job reads the server's certificate. So the attacks above fail for want of rights."""
    path = house.directory / "certs/server.pem"
    output = _run(house.bob, 'cat "$1" && echo gained; ls "${1%/*}"', path)
    assert "gained" in output
    assert "server-key.pem" in output


@pytest.mark.parametrize("name", ["state", "state/output"])
def test_job_cannot_look_into_the_state_directory(house: _House, name: str) -> None:
    """A job cannot list, change or move the directory, nor the output directory in it.

    It cannot enter the latter. It passes through the former to its home.
    """
    path = house.directory / name
    before = sorted(os.listdir(path))
    house.attack(
        """
        ls "$1" && echo gained
        case $1 in */output) cd "$1" && echo gained; esac
        true 2>/dev/null >"$1/new" && echo gained
        mkdir "$1/new" && echo gained
        mv "$1" "$1.moved" && echo gained
        for pid in $2 $3 $4; do cd /proc/$pid/cwd && echo gained; ls /proc/$pid/fd && echo gained
        done""",
        path,
        *house.targets,
    )
    names = {each for each in os.listdir(path) if not each.endswith(".out")}
    assert names == {each for each in before if not each.endswith(".out")}


def test_job_reads_other_users_output_through_no_descriptor(house: _House) -> None:
    """/proc/PID/fd opens neither the output log nor the pipe that is another job's stdout."""
    output = house.attack(
        """
        for pid in $1 $2 $3; do
            for fd in 0 1 2 3 4 5 6 7 8 9; do
                cat </proc/$pid/fd/$fd && echo gained
                2>/dev/null true >>/proc/$pid/fd/$fd && echo gained
                cat /proc/$pid/fdinfo/$fd && echo gained
            done
        done 2>&1""",
        *house.targets,
    )
    assert "a secret of alice" not in output


# --- signals, tracing -------------------------------------------------------------------------


def test_job_cannot_signal_anybody(house: _House) -> None:
    """A job signals no server, thread, fork server, other user's job or process group."""
    threads = os.listdir(f"/proc/{house.server_pid}/task")
    house.attack(
        """
        for pid in "$@"; do
            for signal in 0 KILL STOP TERM HUP INT; do
                kill -s $signal $pid && echo gained $signal $pid
                kill -s $signal -- -$pid && echo gained $signal group $pid
            done
        done 2>&1""",
        *house.targets,
        *threads,
    )
    # `kill -1` spares the process that calls it. Bob has no other process that is to survive.
    output = _run(house.bob, f"sleep 1000 & {_KILL_ALL}; echo alive")
    assert output == "alive\n"
    house.assert_all_is_well()


def test_kill_of_everybody_reaches_only_the_same_users_jobs(house: _House) -> None:
    """`kill -9 -1` ends all jobs of the user who runs it, and no other process."""
    own = _sh(house.bob, f"echo up; {_FOREVER}")
    assert _first_line(house.bob, own) == "up"
    assert _run(house.bob, f"{_KILL_ALL}; echo alive") == "alive\n"
    assert _end_of(house.bob, own).signal == signal.SIGKILL
    house.assert_all_is_well()


def _end_of(client: Client, job: str) -> worker_pb.Job:
    """Block until the job has ended."""
    for _ in client.stream(job):
        pass
    return client.status(job)


def test_users_own_second_job_may_be_signalled(house: _House) -> None:
    """The jobs of one user have one uid, so they may signal each other, as documented."""
    own = _sh(house.bob, f"echo $$; {_FOREVER}")
    pid = int(_first_line(house.bob, own))
    assert _run(house.bob, "kill -TERM $1 && echo sent", pid) == "sent\n"
    ended = _end_of(house.bob, own)
    assert (ended.status, ended.signal) == (worker_pb.JOB_STATUS_FINISHED, signal.SIGTERM)


_LOOK = """
    for pid in "$@"; do
        for name in environ mem maps auxv stack syscall io pagemap smaps personality; do
            head -c 1 /proc/$pid/$name 2>/dev/null | grep -q . && echo gained $pid $name
            2>/dev/null true >>/proc/$pid/$name && echo gained $pid $name
        done
        for name in cwd exe root fd/0 fd/1 ns/user; do
            readlink /proc/$pid/$name && echo gained $pid $name
        done
        for name in oom_score_adj coredump_filter clear_refs comm timerslack_ns; do
            2>/dev/null echo 1 >/proc/$pid/$name && echo gained $pid $name
        done
        ls /proc/$pid/fd /proc/$pid/map_files 2>/dev/null && echo gained $pid ls
    done"""


def test_job_cannot_look_into_another_process(house: _House) -> None:
    """/proc hides environment, memory and descriptors of server, fork server and others' jobs."""
    threads = os.listdir(f"/proc/{house.server_pid}/task")
    output = house.attack(_LOOK, *house.targets, threads[-1])
    assert "do not tell" not in output
    # The same script works on bob's own process. So it fails above for want of rights.
    own = _sh(house.bob, f"echo $$; {_FOREVER}")
    pid = int(_first_line(house.bob, own))
    output = _run(house.bob, _LOOK, pid)
    for name in ("environ", "maps", "cwd", "exe", "fd/1", "ls"):
        assert f"gained {pid} {name}\n" in output
    house.bob.stop(own)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("perl"),
    reason="needs perl, and the numbers of the system calls of x86-64",
)
def test_job_cannot_trace_another_process(house: _House) -> None:
    """ptrace(2) and process_vm_readv(2) work only on processes of the same user."""
    program = f"""
        for my $pid (@ARGV) {{
            my $buffer = "x" x 8;
            my $iov = pack("QQ", unpack("Q", pack("P", $buffer)), 8);
            print "gained read $pid\\n" if
                syscall({_PROCESS_VM_READV}, $pid + 0, $iov, 1, $iov, 1, 0) >= 0 or $!{{EFAULT}};
            for my $request ({_PTRACE_SEIZE}, {_PTRACE_ATTACH}) {{
                print "gained trace $pid\\n" if syscall({_PTRACE}, $request, $pid + 0, 0, 0) >= 0;
            }}
        }}"""
    house.attack('program=$1; shift; perl -e "$program" "$@" 2>&1', program, *house.targets)
    if Path("/proc/sys/kernel/yama/ptrace_scope").exists():
        return  # Yama may forbid tracing even a process of the same user
    own = _sh(house.bob, f"echo $$; {_FOREVER}")
    pid = int(_first_line(house.bob, own))
    output = _run(house.bob, 'program=$1; shift; perl -e "$program" "$@" 2>&1', program, pid)
    assert f"gained trace {pid}" in output
    house.bob.stop(own)


# --- privileges -------------------------------------------------------------------------------


def test_set_user_id_program_gives_nothing(house: _House, public: Path) -> None:
    """A set-uid root program runs as the job's own user, because of no_new_privs."""
    program = public / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o6755)
    plain = subprocess.check_output([program, "-u"], user=71_000, group=71_000, text=True)
    if plain != "0\n":
        pytest.skip(f"set-uid programs have no effect in {public}")
    bare = _run(house.bob, "id -u; id -g")
    assert house.attack('"$1" -u; "$1" -g', program) == f"{bare}came so far\n"
    assert "0" not in bare.split()


def test_user_namespace_gives_nothing(house: _House) -> None:
    """A job that is root in its own namespace has no rights outside of it."""
    script = (
        _STEAL
        + "\n"
        + """
        for pid in $2 $3 $4; do kill -9 $pid && echo gained; done
        mount -o remount,rw / && echo gained
        mount -t cgroup2 none /mnt && for file in /mnt/cgroup.* /mnt/*.max; do
            2>/dev/null true >>$file && echo gained $file
        done
        mount -t cgroup2 none /mnt && mkdir /mnt/new && echo gained
        chroot /proc/$2/root true && echo gained
        true"""
    )
    path = house.directory / "state/token.key"
    house.attack(
        "script=$1; shift; unshare --user --map-root-user --mount --cgroup --pid --fork "
        'sh -c "$script" sh "$@" 2>&1',
        script,
        path,
        *house.targets,
    )
    assert path.stat().st_size == 32


def test_job_cannot_become_somebody_else(house: _House) -> None:
    """setpriv, su, chown, chroot and others make a job neither root nor another user."""
    house.attack(
        """
        for uid in 0 $1 $2 65534; do
            setpriv --reuid=$uid true && echo gained
            setpriv --regid=$uid --keep-groups true && echo gained
            setpriv --groups=$uid true && echo gained
        done 2>&1
        su -c true </dev/null && echo gained
        chown $1 /proc/self/fd/1 && echo gained
        renice -n -5 $$ && echo gained
        nice -n -5 sh -c '[ "$(nice)" -lt 0 ]' && echo gained
        chroot / true && echo gained
        mount -t tmpfs none /mnt && echo gained
        hostname gained && echo gained
        unshare --mount true && echo gained
        mknod /tmp/$JOB_ID c 1 3 && echo gained
        true""",
        _SERVER_UID,
        _FIRST_UID,
    )


# --- jobs of other users are jobs like others ---------------------------------------------------


def test_process_without_its_first_thread_is_killed(house: _House) -> None:
    """cgroup.kill misses such a process. The server may not signal it, so the fork server does."""
    job = house.bob.start(public_python(), ["-I", "-S", "-c", WITHOUT_FIRST_THREAD, "1"])
    assert _first_line(house.bob, job) == "up"
    assert house.bob.stop(job).status == worker_pb.JOB_STATUS_STOPPED


def test_start_stream_status_and_stop_work_for_every_user(house: _House) -> None:
    """The owner and an admin stream and stop a job of another uid. A stop ends its whole tree."""
    for owner, other in ((house.alice, house.admin), (house.bob, house.bob)):
        job = _sh(owner, f"sleep 1000 & setsid sleep 1000 & echo up; {_FOREVER}")
        assert _first_line(other, job) == "up"
        assert other.status(job).status == worker_pb.JOB_STATUS_RUNNING
        assert other.stop(job).status == worker_pb.JOB_STATUS_STOPPED
        assert b"".join(owner.stream(job)) == b"up\n"
    job = _sh(house.bob, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exit 3")
    ended = _end_of(house.bob, job)
    assert (ended.exit_code, ended.status) == (3, worker_pb.JOB_STATUS_FINISHED)
    assert ended.usage.cpu_user_s + ended.usage.cpu_system_s > 0


# At SIGTERM it says bye and exits with 3.
_POLITE = """
    trap 'echo bye; exit 3' TERM
    exec 3<> <(:); echo up; while :; do read -t 1 -u 3 x; done"""


def test_grace_timeout_and_linger_hold_for_every_user(house: _House) -> None:
    """The server's process has no right to signal them, and the fork server sends the signals."""
    job = house.alice.start("bash", ["-c", f"setsid sleep 1000 & {_POLITE}"])
    assert _first_line(house.alice, job) == "up"
    stopped = house.admin.stop(job, grace=GUARD_S)
    assert (stopped.exit_code, stopped.status) == (3, worker_pb.JOB_STATUS_STOPPED)
    job = house.bob.start("bash", ["-c", _POLITE], timeout=1.5, grace=GUARD_S)
    ended = _end_of(house.bob, job)
    assert (ended.exit_code, ended.end_reason) == (3, worker_pb.END_REASON_TIMED_OUT)
    assert b"".join(house.bob.stream(job)) == b"up\nbye\n"
    job = house.bob.start("sh", ["-c", "sleep 1000 & exit 4"], linger=0.3)
    ended = _end_of(house.bob, job)
    assert (ended.exit_code, ended.killed_after_exit) == (4, 1)


def test_others_jobs_are_out_of_reach_through_the_api_too(house: _House) -> None:
    """The API answers bob as if alice's job did not exist."""
    for call in (house.bob.status, house.bob.stop, lambda job: next(house.bob.stream(job))):
        with pytest.raises(ClientError, match="no such job"):
            call(house.victim)
    assert house.victim not in [job.job_id for job in house.bob.list()]
    assert house.victim in [job.job_id for job in house.admin.list()]


def test_program_that_the_jobs_user_may_not_execute_is_an_error(
    house: _House, public: Path
) -> None:
    """Start fails with "permission denied" for a program that only root may execute."""
    program = public / "private"
    shutil.copy("/bin/true", program)
    program.chmod(0o700)
    with pytest.raises(ClientError, match="permission denied"):
        house.bob.start(str(program))
    house.assert_all_is_well()


def test_files_of_one_user_are_closed_to_another(house: _House) -> None:
    """A file that a job makes in /tmp is closed to other users, because of the umask 077."""
    path = f"/tmp/{house.victim}"
    assert _run(house.alice, 'echo secret >"$1" && echo made', path) == "made\n"
    try:
        house.attack('cat "$1" && echo gained; rm -f "$1" && echo gained', path)
        assert _run(house.alice, 'cat "$1"', path) == "secret\n"
    finally:
        os.unlink(path)


# --- cgroups ----------------------------------------------------------------------------------

_FIND_TOP = """
    top=$(sed -n 's/[^ ]* \\([^ ]*\\) cgroup2 .*/\\1/p' /proc/self/mounts | head -n 1)
    own=$top$(sed -n s/^0:://p /proc/self/cgroup)
    case $own in */jobs/$JOB_ID) ;; *) echo not gained a cgroup: $own;; esac"""


@pytest.mark.kernel
@_ONE_WAY_TO_FORK  # half a minute; test_job_has_no_rights_at_all covers the other way
def test_job_cannot_write_to_the_cgroup_tree(house: _House) -> None:
    """A job cannot write to any file of the tree, nor make or remove a cgroup."""
    output = house.attack(
        f"""{_FIND_TOP}
        n=0
        for file in $(find $top -type f); do
            2>/dev/null true >>$file && echo gained $file
            n=$((n+1))
        done
        for directory in $(find $top -type d); do
            mkdir $directory/new && echo gained $directory
            chmod 777 $directory && echo gained $directory
            rmdir $directory && echo gained $directory
        done 2>/dev/null
        echo looked at $n"""
    )
    count = re.search(r"looked at (\d+)", output)
    assert count
    assert int(count[1]) > 100


@pytest.mark.kernel
def test_job_cannot_leave_its_cgroup(house: _House) -> None:
    """A job cannot move into any other cgroup, not even that of another job of its user."""
    own = _sh(house.bob, f"echo up; {_FOREVER}")
    assert _first_line(house.bob, own) == "up"
    output = house.attack(
        f"""{_FIND_TOP}
        cat /proc/self/cgroup
        for file in $(find $top -name cgroup.procs -o -name cgroup.threads); do
            2>/dev/null echo 0 >$file && echo gained $file
            2>/dev/null echo $$ >$file && echo gained $file
        done
        ls -d $top/job-worker-*/jobs/*
        cat /proc/self/cgroup"""
    )
    cgroups = {line for line in output.splitlines() if line.startswith("0::")}
    assert len(cgroups) == 1
    assert own in output
    assert house.victim in output
    house.bob.stop(own)


@pytest.mark.kernel
def test_limits_and_usage_of_a_job_of_another_uid(house: _House) -> None:
    """The job runs in its cgroup and under its limits. Its usage is reported."""
    script = f"{_FIND_TOP}\ncat $own/pids.max $own/memory.max; echo up; {_FOREVER}"
    job = house.bob.start("sh", ["-c", script], pids=7, memory_bytes=64 << 20)
    with contextlib.closing(house.bob.stream(job)) as chunks:
        output = b""
        while output.count(b"\n") < 3:
            output += next(chunks)
    assert output == b"7\n%d\nup\n" % (64 << 20)
    status = house.bob.status(job)
    assert (status.limits.pids, status.usage.pids) == (7, 1)
    assert house.bob.stop(job).usage.cpu_user_s >= 0
    greedy = house.bob.start("tail", ["/dev/zero"], memory_bytes=32 << 20)
    assert _end_of(house.bob, greedy).end_reason == worker_pb.END_REASON_OUT_OF_MEMORY


# --- uids -------------------------------------------------------------------------------------


def _uid_of(client: Client) -> int:
    return int(_run(client, "id -u"))


def test_uid_is_stable_and_never_anothers(
    certs: Path, entries: dict[str, str], public: Path
) -> None:
    """A user keeps the uid across restarts, reloads and removals. A new user gets a new uid."""
    users, state = _users_file(public, entries["alice"], entries["bob"]), public / "state"
    options = ("--certs", certs, "--users", users, "--state-dir", state)
    with _server(public / "first", *options) as program:
        with _login(program.address, certs, "alice") as alice:
            first = _uid_of(alice)
        with _login(program.address, certs, "bob") as bob:
            of_bob = _uid_of(bob)
        assert program.end() == 0
    carol = entries["root"].replace("root", "carol", 1)
    users.write_text(f"{carol}\n{entries['bob']}\n")
    with _server(public / "second", *options) as program:
        with _login(program.address, certs, "carol", _PASSWORDS["root"]) as client:
            of_carol = _uid_of(client)
        with _login(program.address, certs, "bob") as bob:
            assert _uid_of(bob) == of_bob
        assert len({first, of_bob, of_carol}) == 3
        # The server reads the file again. Alice comes back and gets her old uid.
        dave = entries["root"].replace("root", "dave", 1)
        users.write_text(f"{dave}\n{entries['alice']}\n")
        program.process.send_signal(signal.SIGHUP)
        _await_log(program, "2 users are in force")
        with _login(program.address, certs, "alice") as alice:
            assert _uid_of(alice) == first
        with _login(program.address, certs, "dave", _PASSWORDS["root"]) as client:
            assert _uid_of(client) not in {first, of_bob, of_carol}
        with pytest.raises(ClientError):
            _login(program.address, certs, "bob")
        assert program.end() == 0


def _await_log(program: _Program, text: str) -> None:
    """Block until the server has logged `text`."""
    with subprocess.Popen(
        ["tail", "-n", "+1", "-f", program.log], stdout=subprocess.PIPE, text=True
    ) as tail:
        assert tail.stdout
        for line in tail.stdout:
            if text in line:
                break
        tail.kill()
        tail.stdout.read()


# --- ends -------------------------------------------------------------------------------------


class _Witness:
    """A FIFO that every process of the test's jobs holds open for writing.

    It reads end-of-file when all of them are dead.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "fifo"
        os.mkfifo(self.path)
        self.path.chmod(0o666)
        self._open()
        self.script = f"""
            exec 9>'{self.path}'
            setsid sh -c 'echo >&9; trap "" TERM HUP INT; while :; do sleep 1000; done' &
            sh -c 'echo >&9; {_FOREVER}' &
            echo >&9; {_FOREVER}"""

    def await_up(self, jobs: int) -> None:
        lines = b""
        while lines.count(b"\n") < 3 * jobs:
            assert select.select([self._fd], [], [], GUARD_S)[0]
            lines += os.read(self._fd, 4096)

    def await_end(self) -> None:
        """Block until no process holds the FIFO."""
        assert select.select([self._fd], [], [], GUARD_S)[0]
        assert os.read(self._fd, 1) == b""
        os.close(self._fd)
        self._open()

    def _open(self) -> None:
        # Opened again after each end-of-file, because a FIFO stays readable after the first one.
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def witness(public: Path) -> Iterator[_Witness]:
    with contextlib.closing(_Witness(public)) as witness:
        yield witness


def _subtree_of(pid: int) -> Path | None:
    """Return the top of the cgroups of the server `pid`; None if it has none."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    paths = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    tops = [point for _, point, kind, *_ in mounts if kind == "cgroup2"]
    if not tops or not paths or not paths[0].endswith("/main"):
        return None
    return Path(tops[0] + paths[0]).parent


@contextlib.contextmanager
def _busy(
    certs: Path, directory: Path, witness: _Witness, way_to_fork: tuple[str, ...]
) -> Iterator[_Program]:
    """Run a server with jobs of two users."""
    options = ("--certs", certs, "--state-dir", directory / "state")
    with _server(directory / "log", *options, before=way_to_fork) as program:
        with (
            _login(program.address, certs, "user", "user") as user,
            _login(program.address, certs, "admin", "admin") as admin,
        ):
            for client in (user, admin, user):
                _sh(client, witness.script)
            witness.await_up(3)
        yield program


def _await_end(pid: int) -> None:
    """Block until a process that is not our child has ended."""
    with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid)) as pidfd:
        assert select.select([pidfd], [], [], GUARD_S)[0]


def test_death_of_the_server_leaves_nothing(
    certs: Path, public: Path, witness: _Witness, way_to_fork: tuple[str, ...]
) -> None:
    """After SIGKILL of the server, all jobs die, the fork server ends and removes the cgroups."""
    with _busy(certs, public, witness, way_to_fork) as program:
        fork_server, subtree = fork_server_of(program.process.pid), _subtree_of(program.process.pid)
        with open(os.pidfd_open(fork_server)) as pidfd:
            program.process.kill()
            witness.await_end()
            assert select.select([pidfd], [], [], GUARD_S)[0]
        assert subtree is None or not subtree.exists()


def test_death_of_the_fork_server_leaves_no_job(
    certs: Path, public: Path, witness: _Witness, way_to_fork: tuple[str, ...]
) -> None:
    """The jobs die, and the server ends with a status that has it restarted."""
    with _busy(certs, public, witness, way_to_fork) as program:
        subtree = _subtree_of(program.process.pid)
        if subtree is None:
            pytest.skip("needs cgroup v2: without, only the leaders die with the fork server")
        os.kill(fork_server_of(program.process.pid), signal.SIGKILL)
        witness.await_end()
        assert program.process.wait(GUARD_S) == BROKEN_STATUS
        # Nobody is left who may remove the cgroups. The next server does.
        with _server(
            public / "next", "--certs", certs, "--state-dir", public / "state"
        ) as successor:
            assert not subtree.exists()
            assert successor.end() == 0


def test_graceful_stop_leaves_nothing(
    certs: Path, public: Path, witness: _Witness, way_to_fork: tuple[str, ...]
) -> None:
    """SIGTERM leaves no process and no cgroup, and only the output of jobs that have ended."""
    with _busy(certs, public, witness, way_to_fork) as program:
        fork_server, subtree = fork_server_of(program.process.pid), _subtree_of(program.process.pid)
        assert program.end() == 0
        witness.await_end()
        assert not Path(f"/proc/{fork_server}").exists()
        assert subtree is None or not subtree.exists()
        with Store(public / "state/store") as store:
            table = JobTable(store)
            assert table.running() == []
            kept = {f"{row.job.job_id}.out" for row in table.page()}
        assert set(os.listdir(public / "state/output")) == kept


@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_in_the_cgroup_tree(
    base: Path,
    certs: Path,
    witness: _Witness,
    number: signal.Signals,
    way_to_fork: tuple[str, ...],
) -> None:
    """A server in a cgroup of its own leaves that cgroup as it was, even after SIGKILL."""
    public = witness.path.parent
    enter = ("sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(base))
    options = ("--limits", "require", "--state-dir", public / "state", "--certs", certs)
    before = (*way_to_fork, *enter)
    with _server(public / "log", *options, before=before) as program:
        with _login(program.address, certs, "user", "user") as user:
            _sh(user, witness.script)
            witness.await_up(1)
        fork_server = fork_server_of(program.process.pid)
        assert (base / "cgroup.procs").read_text() == ""
        with open(os.pidfd_open(fork_server)) as pidfd:
            program.process.send_signal(number)
            witness.await_end()
            assert select.select([pidfd], [], [], GUARD_S)[0]
        program.process.wait(GUARD_S)
    assert [each for each in base.iterdir() if each.is_dir()] == []
    assert (base / "cgroup.subtree_control").read_text() == ""
    assert wait_event(base, "populated", "0", GUARD_S)


# --- started with fewer rights ------------------------------------------------------------------


def _as_nobody(*capabilities: str) -> tuple[str, ...]:
    """Return the beginning of a command that runs as an ordinary user with `capabilities`.

    CAP_DAC_READ_SEARCH is added, because Python may be in root's home.
    """
    caps = ",".join(f"+{name}" for name in ("dac_read_search", *capabilities))
    return (
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *(f"--inh-caps={caps}", f"--ambient-caps={caps}"),
    )


@pytest.fixture
def state_of_nobody(public: Path) -> Path:
    """A state directory that belongs to an ordinary user."""
    path = public / "state"
    path.mkdir(0o700)
    os.chown(path, NOBODY, NOBODY)
    return path


@pytest.mark.parametrize("capabilities", [(), ("setuid",), ("setgid",), ("kill",)])
def test_ordinary_user_is_warned_that_jobs_share_the_uid(
    certs: Path, public: Path, state_of_nobody: Path, capabilities: tuple[str, ...]
) -> None:
    """The warning names the dangers and the remedy. Jobs run as the server's own user."""
    options = ("--certs", certs, "--state-dir", state_of_nobody)
    with _server(public / "log", *options, before=_as_nobody(*capabilities)) as program:
        with _login(program.address, certs, "user", "user") as user:
            assert _run(user, "id -u; grep NoNewPrivs /proc/self/status; umask").split() == [
                *(str(NOBODY), "NoNewPrivs:", "1", "0077")
            ]
        assert program.end() == 0
        (warning,) = [line for line in program.log.read_text().splitlines() if "uid 65534" in line]
    assert " WARNING jobs run as uid 65534, like the server: " in warning
    for part in ("keys", "users file", "output", "signal", "CAP_SETUID and CAP_SETGID"):
        assert part in warning


@pytest.mark.parametrize("capabilities", [(), ("setuid",), ("setgid",), ("kill",)])
def test_require_isolation_makes_it_an_error(
    certs: Path, state_of_nobody: Path, capabilities: tuple[str, ...]
) -> None:
    """The server prints one line with the problem and the remedy, makes nothing and exits."""
    result = run_server(
        *("--listen", "127.0.0.1:0", "--limits", "auto", "--certs", certs),
        *("--state-dir", state_of_nobody, "--require-isolation"),
        before=_as_nobody(*capabilities),
    )
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("server: --require-isolation: jobs run as uid 65534, like the server")
    assert "start the server as root, or with CAP_SETUID and CAP_SETGID" in line
    assert os.listdir(state_of_nobody) == []


def _check_signals(client: Client) -> None:
    """Signals reach the processes of a job that has a uid of its own."""
    for to_all in (False, True):
        tree = ["-c", SIGNALLED_TREE, "2", *(["wait"] if to_all else [])]
        job = client.start(public_python(), tree)
        chunks, output = client.stream(job), b""
        while output.count(b"up") < 3:
            output += next(chunks)
        client.signal(job, "USR1", everything=to_all)
        output += b"".join(chunks)
        assert (output.count(b"leader"), output.count(b"child")) == (1, 2 if to_all else 0)


def test_isolation_with_capabilities_instead_of_root(
    certs: Path,
    public: Path,
    state_of_nobody: Path,
    witness: _Witness,
    way_to_fork: tuple[str, ...],
) -> None:
    """A server started with CAP_SETUID, CAP_SETGID and CAP_KILL isolates jobs and keeps none."""
    options = ("--certs", certs, "--state-dir", state_of_nobody, "--require-isolation")
    before = (*way_to_fork, *_as_nobody("setuid", "setgid", "kill"))
    with _server(public / "log", *options, before=before) as program:
        pid = program.process.pid
        for task in os.listdir(f"/proc/{pid}/task"):
            status = status_of(f"{pid}/task/{task}")
            assert status["Uid"].split() == [str(NOBODY)] * 4
            for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(status[name], 16) == 0
            assert status["NoNewPrivs"] == "1"
        with (
            _login(program.address, certs, "user", "user") as user,
            _login(program.address, certs, "admin", "admin") as admin,
        ):
            uids = {_uid_of(user), _uid_of(admin)}
            assert len(uids) == 2
            assert uids <= set(_UIDS)
            assert "CapEff:\t0000000000000000" in _run(user, "cat /proc/self/status")
            # A job has run, so the fork server has given up its other rights.
            fork_server = status_of(fork_server_of(pid))
            assert int(fork_server["CapEff"], 16) == sum(1 << number for number in (5, 6, 7))
            _check_signals(user)
            job = _sh(user, witness.script)
            witness.await_up(1)
            script = 'kill -9 $1 $2 && echo gained; cat "$3/token.key" && echo gained'
            output = _run(user, script, pid, fork_server_of(pid), state_of_nobody)
            assert "gained" not in output
            assert user.stop(job).status == worker_pb.JOB_STATUS_STOPPED
        assert program.end() == 0
        witness.await_end()


@pytest.mark.kernel
def test_isolation_with_two_capabilities_and_a_delegated_cgroup(
    base: Path,
    certs: Path,
    state_of_nobody: Path,
    witness: _Witness,
    way_to_fork: tuple[str, ...],
) -> None:
    """A server with a delegated cgroup needs only CAP_SETUID and CAP_SETGID to isolate jobs."""
    public = witness.path.parent
    for path in (base, base / "cgroup.procs", base / "cgroup.subtree_control"):
        os.chown(path, NOBODY, NOBODY)
    enter = ("sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(base))
    options = ("--certs", certs, "--state-dir", state_of_nobody, "--limits", "require")
    before = (*way_to_fork, *enter, *_as_nobody("setuid", "setgid"))
    with _server(public / "log", *options, "--require-isolation", before=before) as program:
        fork_server = fork_server_of(program.process.pid)
        with _login(program.address, certs, "user", "user") as user:
            assert _uid_of(user) >= _FIRST_UID - 1
            _check_signals(user)
            job = _sh(user, witness.script)
            witness.await_up(1)
            assert user.stop(job).status == worker_pb.JOB_STATUS_STOPPED
            witness.await_end()
            output = _run(
                user,
                f"""{_FIND_TOP}
                for file in $(find $top -name 'cgroup.*' -o -name '*.max'); do
                    2>/dev/null true >>$file && echo gained $file
                done""",
            )
            assert output == ""
            _sh(user, witness.script)
            witness.await_up(1)
        with open(os.pidfd_open(fork_server)) as pidfd:
            program.process.kill()
            witness.await_end()
            assert select.select([pidfd], [], [], GUARD_S)[0]
    assert wait_event(base, "populated", "0", GUARD_S)
    with Worker(enforcement="require", cgroup_root=base):
        pass  # the next worker removes the cgroups of the last one
    assert [each for each in base.iterdir() if each.is_dir()] == []


# --- where the server may be --------------------------------------------------------------------


def test_server_works_below_a_directory_that_is_closed_to_it(
    certs: Path, entries: dict[str, str], public: Path
) -> None:
    """The server runs, reloads and ends below root's own 0700 directory."""
    closed = public / "closed"
    closed.mkdir(0o700)
    for path in _HERE.glob("*.py"):
        if not path.name.startswith(("test", "conftest", "kernel_plugin", "time_limit_plugin")):
            shutil.copy(path, closed)
    shutil.copytree(certs, closed / "certs")
    users = closed / "users"
    users.write_text(f"{entries['alice']}\n")
    program = _Program(
        public / "log",
        *(sys.executable, closed / "server.py", "--listen", "127.0.0.1:0", "--limits", "auto"),
        *("--users", users, "--state-dir", closed / "state", "--audit-required", *_OWN_UIDS),
    )
    with program, _login(program.address, certs, "alice") as alice:
        assert status_of(program.process.pid)["Uid"].split()[0] == str(_SERVER_UID)
        output = _run(alice, 'ls "$1" && echo gained; id -u', closed)
        assert "gained" not in output
        with pytest.raises(ClientError, match="not found"):
            alice.start("no-such-command")
        running = _sh(alice, f"echo up; {_FOREVER}")
        assert _first_line(alice, running) == "up"
        users.write_text(f"{entries['alice']}\n{entries['bob']}\n")
        (closed / "state/audit.log").rename(closed / "state/audit.log.1")
        subprocess.run(
            [_HERE / "certs/generate.sh", "--dir", closed / "certs", "--hosts", "localhost"],
            check=False,
            stdout=subprocess.DEVNULL,
        )
        program.process.send_signal(signal.SIGHUP)
        _await_log(program, "2 users are in force")
        with _login(program.address, certs, "bob") as bob:
            assert _uid_of(bob) == _FIRST_UID + 1
            bob.logout()
        lines = (closed / "state/audit.log").read_text().splitlines()
        assert {json.loads(line)["user"] for line in lines} == {"bob"}
        assert alice.stop(running).status == worker_pb.JOB_STATUS_STOPPED
        assert program.end() == 0
    log = program.log.read_text()
    assert "Traceback" not in log
    assert " ERROR " not in log


def test_sigterm_ends_a_server_whose_reload_hangs(
    certs: Path, entries: dict[str, str], public: Path
) -> None:
    """The process that opens the files is stopped, so nothing that SIGHUP asks for is done."""
    users = _users_file(public, entries["alice"])
    options = ("--certs", certs, "--users", users, "--state-dir", public / "state")
    with _server(public / "log", *options) as program:
        (opener,) = (
            pid
            for pid in children_of(program.process.pid)
            if b"fileopener.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        with _login(program.address, certs, "alice") as alice:
            os.kill(opener, signal.SIGSTOP)
            program.process.send_signal(signal.SIGHUP)
            _await_log(program, "SIGHUP: reading")
            alice.list()  # the audit log is not held up
            assert program.end() == 0
        os.kill(opener, signal.SIGCONT)


@pytest.mark.parametrize(
    "bad",
    [
        ("users", 0o644, "chmod go= "),
        ("users", 0o602, "chmod go= "),
        ("certs/server-key.pem", 0o644, "chmod go= "),
        ("certs/client-ca-key.pem", 0o604, "chmod go= "),
        ("certs/client-ca.pem", 0o646, "chmod go-w "),
        ("certs", 0o777, "chmod o-w "),
        (".", 0o777, "chmod o-w "),
    ],
)
def test_what_jobs_could_get_at_is_an_error(
    certs: Path, entries: dict[str, str], public: Path, bad: tuple[str, int, str]
) -> None:
    """If jobs could reach these files, the server exits and prints the chmod command."""
    name, mode, remedy = bad
    shutil.copytree(certs, public / "certs")
    os.chmod(public / "certs", 0o755)
    users = _users_file(public, entries["alice"])
    os.chmod(public / name, mode)
    options = ("--certs", public / "certs", "--users", users, "--state-dir", public / "state")
    run = run_server("--listen", "127.0.0.1:0", "--limits=auto", *options)
    assert (run.returncode, run.stdout) == (1, "")
    assert f"run: {remedy}{public / name}" in run.stderr
    os.chmod(public, 0o700)  # now jobs cannot reach it, whatever its mode
    with _server(public / "log", *options) as program:
        assert program.end() == 0


def test_users_file_that_jobs_could_read_is_not_taken_up(
    certs: Path, entries: dict[str, str], public: Path
) -> None:
    """On SIGHUP the server keeps the users as they were and logs the reason."""
    users = _users_file(public, entries["alice"])
    options = ("--certs", certs, "--users", users, "--state-dir", public / "state")
    with _server(public / "log", *options) as program:
        users.write_text(f"{entries['bob']}\n")
        users.chmod(0o644)
        program.process.send_signal(signal.SIGHUP)
        _await_log(program, f"the users stay as they were: jobs could read or change {users}")
        _login(program.address, certs, "alice").close()
        assert program.end() == 0


@pytest.mark.parametrize("second", ["72000-72010", "72010-72020", "71990-72000", "72003-72005"])
def test_second_server_with_the_same_uids_is_refused(
    certs: Path, public: Path, second: str
) -> None:
    """Ranges that overlap count. The range is free as soon as the first server is dead."""
    environment = clean_environment()
    before = ("env", f"RUNTIME_DIRECTORY={environment['RUNTIME_DIRECTORY']}")

    def options(name: str, uids: str) -> tuple[str | Path, ...]:
        return ("--certs", certs, "--state-dir", public / name, "--uids", uids)

    first = _server(public / "log", *options("1", "72000-72010"), before=before)
    with first:
        with _server(public / "log2", *options("2", "72011-72020"), before=before):
            pass  # beside the first
        with pytest.raises(pytest.fail.Exception, match="another server on this host has uids of"):
            _server(public / "log3", *options("3", second), before=before)
        first.process.kill()
        first.process.wait()
        with _server(public / "log4", *options("3", second), before=before) as again:
            assert again.end() == 0


def test_second_server_with_another_runtime_directory_is_refused(certs: Path, public: Path) -> None:
    """Units of several servers set it differently. A file of a user locks nobody out."""
    run = Path(clean_environment()["RUNTIME_DIRECTORY"]).parent

    def options(name: str, uids: str) -> tuple[str | Path, ...]:
        return ("--certs", certs, "--state-dir", public / name, "--uids", uids)

    def before(name: str) -> tuple[str, ...]:
        return ("env", f"RUNTIME_DIRECTORY={run}/{name}")

    (run / "lock").mkdir(parents=True)
    users_file = run / "lock" / "uids.lock"
    with users_file.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.chown(users_file, 73_001, 73_001)
        with _server(public / "log", *options("1", "72000-72010"), before=before("a")):
            with _server(public / "log2", *options("2", "72011-72020"), before=before("b")):
                pass
            with pytest.raises(pytest.fail.Exception, match="another server on this host"):
                _server(public / "log3", *options("3", "72010-72020"), before=before("c"))


@pytest.mark.parametrize(
    ("uids", "problem"),
    [
        ("0-10", "must be a range of two uids or more, from 1000 up"),
        ("nonsense", "is not FIRST-LAST"),
        ("70000-70001", "no uid is left for"),
    ],
)
def test_unusable_range_of_uids_is_an_error(
    certs: Path, public: Path, uids: str, problem: str
) -> None:
    """The server exits and names the problem, also if there are more users than uids."""
    result = run_server(
        *("--listen", "127.0.0.1:0", "--limits", "auto"),
        *("--certs", certs, "--state-dir", public / "state", "--uids", uids),
    )
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("server: ")
    assert problem in last
