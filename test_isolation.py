"""Tests of isolation: what a job tries against the server and other users' jobs, and fails to do;
and what rights the server's processes have left.

The server is the real program, started as root, with two users and an admin. Everything it
keeps is in directories that a job can reach, so that it is the rights that keep a job out.
A script tells "gained" for each attempt that works, and at its end that it came so far.
"""

from __future__ import annotations

import contextlib
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
from privileges import can_change_user, can_kill_any
from testkit import GUARD_S, NOBODY, clean_environment, fork_server_of
from users import make_user
from worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
_SERVER_UID, _FIRST_UID = 70_000, 70_001
_PASSWORDS = {"alice": "alice's password", "bob": "bob's password", "root": "an admin's password"}
_FOREVER = "exec sleep infinity"
# What these scripts do is no harm to this host as long as there is isolation.
_ONLY_AS_A_USER = f'[ "$(id -u)" -ge {_FIRST_UID} ] || {{ echo gained an uid; exit 1; }}'
_KILL_ALL = f"{_ONLY_AS_A_USER}; kill -s KILL -- -1"
_PTRACE, _PROCESS_VM_READV, _PTRACE_ATTACH, _PTRACE_SEIZE = 101, 310, 16, 0x4206  # on x86-64


@pytest.fixture(autouse=True, scope="module")
def _as_root() -> None:
    """Need the right to change users, or say so; in CI it is an error to go without."""
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


class _Program:
    """A server program, started in whatever way. Attributes: `process`, `address`, `log`."""

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
    common = ("--listen", "127.0.0.1:0", "--limits", "auto")
    return _Program(log, *before, sys.executable, _HERE / "server.py", *common, *options)


# As an administrator may start it: with groups, a lax umask and core dumps.
_CARELESS = (
    *("setpriv", "--groups=0,4,24", "sh", "-c"),
    *('umask 0; ulimit -c unlimited; exec "$@"', "sh"),
)


def _status(pid: int | str) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _login(address: str, certs: Path, name: str, password: str | None = None) -> Client:
    client = Client(address, certs=certs)
    client.login(name, password or _PASSWORDS[name])
    return client


def _sh(client: Client, script: str, *args: object) -> str:
    """Start a shell script, whose arguments are $1, $2, ..."""
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
        return _status(pid)["State"][0] not in "ZXT"
    return False


@dataclass(frozen=True)
class _House:
    """A server, its users, and a job of alice's that bob is after."""

    program: _Program
    place: Path
    alice: Client
    bob: Client
    admin: Client
    victim: str
    victim_pid: int

    @property
    def server_pid(self) -> int:
        return self.program.process.pid

    @property
    def helper_pid(self) -> int:
        return fork_server_of(self.server_pid)

    @property
    def targets(self) -> list[int]:
        return [self.server_pid, self.helper_pid, self.victim_pid]

    def attack(self, script: str, *args: object) -> str:
        """Run a script as bob; nothing may be gained, and everybody must be well after that."""
        output = _run(self.bob, f"{_ONLY_AS_A_USER}\n{script}\necho came so far", *args)
        assert "gained" not in output, output
        assert output.endswith("came so far\n"), output
        self.assert_all_is_well()
        return output

    def assert_all_is_well(self) -> None:
        assert [pid for pid in self.targets if not _is_alive(pid)] == []
        assert self.alice.status(self.victim).status == worker_pb.RUNNING


@pytest.fixture(scope="module")
def house(
    certs: Path, entries: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_House]:
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.chmod(0o755)
        shutil.copytree(certs, place / "certs")
        (place / "certs").chmod(0o755)
        users = place / "users"
        users.touch(0o600)
        users.write_text("\n".join(entries.values()) + "\n")
        log = tmp_path_factory.mktemp("log") / "server.log"
        options = ("--certs", place / "certs", "--users", users, "--state-dir", place / "state")
        program = stack.enter_context(
            _server(log, *options, "--require-isolation", before=_CARELESS)
        )
        clients = [
            stack.enter_context(_login(program.address, place / "certs", name))
            for name in ("alice", "bob", "root")
        ]
        victim = _sh(clients[0], f"echo $$ ; echo a secret of alice; {_FOREVER}")
        pid = int(_first_line(clients[0], victim))
        yield _House(program, place, clients[0], clients[1], clients[2], victim, pid)
        assert program.end() == 0, log.read_text()


# --- the server's processes -------------------------------------------------------------------


def test_server_has_no_rights_left_in_any_thread(house: _House) -> None:
    """After its start the process that talks to the network is an ordinary user, for good."""
    _run(house.bob, "true")
    tasks = os.listdir(f"/proc/{house.server_pid}/task")
    assert len(tasks) > 3
    for task in tasks:
        status = _status(f"{house.server_pid}/task/{task}")
        assert status["Uid"].split() == status["Gid"].split() == [str(_SERVER_UID)] * 4
        assert status["Groups"] == ""
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0
        assert status["NoNewPrivs"] == "1"


def test_server_needs_nothing_more_of_a_program_that_only_root_can_read(
    certs: Path, tmp_path: Path
) -> None:
    """As in root's home: all it imports, gRPC too, it imports while it is root."""
    tmp_path.chmod(0o700)
    paths: list[str] = []
    for directory in (_HERE, Path(grpc.__file__).parent.parent):
        link = tmp_path / f"{len(paths)}"
        link.symlink_to(directory)
        paths.append(str(link))
    program = ("env", f"PYTHONPATH={':'.join(paths)}", sys.executable, "-P", "-m", "server")
    options = ("--listen", "127.0.0.1:0", "--limits", "auto", "--require-isolation")
    places = ("--certs", certs, "--state-dir", tmp_path / "state")
    with _Program(tmp_path / "log", *program, *options, *places) as running:
        with _login(running.address, certs, "user", "user") as user:
            assert _run(user, "echo hello") == "hello\n"
            job = _sh(user, _FOREVER)
            assert user.stop(job).status == worker_pb.STOPPED
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


def test_helper_keeps_four_capabilities(house: _House) -> None:
    """CAP_SETUID, CAP_SETGID, CAP_KILL and CAP_DAC_OVERRIDE; it can gain no more."""
    status = _status(house.helper_pid)
    kept = sum(1 << number for number in (1, 5, 6, 7))
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff")} == {kept}
    assert {int(status[name], 16) for name in ("CapInh", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Threads"]) == ("1", "1")


def test_what_the_server_keeps_is_private_file_by_file(house: _House) -> None:
    """Not only because of the directory that it is in."""
    kept = [path for path in (house.place / "state").rglob("*") if path.is_file()]
    names = {path.name for path in kept}
    assert {"token.key", "uids", "audit.log", f"{house.victim}.out"} <= names
    for path in [*kept, house.place / "users", *(house.place / "certs").glob("*-key.pem")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in (house.place / "state", house.place / "state/output"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    # Only the output belongs to the process that talks to the network.
    owners = {path.name: path.stat().st_uid for path in kept if path.suffix != ".out"}
    assert set(owners.values()) == {0}, owners


# --- what a job is ----------------------------------------------------------------------------


def test_job_has_no_rights_at_all(house: _House) -> None:
    """Its own uid and gid, no other group, no capability in any set, no_new_privs, umask 077."""
    output = house.attack("cat /proc/self/status; umask")
    status = dict(line.split(":\t") for line in output.splitlines() if ":\t" in line)
    uids = (house.place / "state/uids").read_text()
    uid = dict(line.split() for line in uids.splitlines())["bob"]
    assert int(uid) >= _FIRST_UID
    assert status["Uid"].split() == status["Gid"].split() == [uid] * 4
    assert status["Groups"].strip() == ""
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert "\n0077\n" in output
    signals = {name: int(status[name], 16) & 0x3FFF_FFFF for name in ("SigBlk", "SigIgn")}
    assert signals == {"SigBlk": 0, "SigIgn": 0}


def test_users_have_uids_of_their_own(house: _House) -> None:
    """Each user's jobs have one uid, and no two users the same."""
    uids = [
        {_run(client, "id -u; id -g; id -G") for _ in range(2)}
        for client in (house.alice, house.bob, house.admin)
    ]
    assert [len(each) for each in uids] == [1, 1, 1]
    texts = [each.pop().split() for each in uids]
    assert all(len(set(each)) == 1 for each in texts)
    numbers = {int(each[0]) for each in texts}
    assert len(numbers) == 3
    assert numbers <= set(range(_FIRST_UID, 80_000))


def test_job_has_its_limits(house: _House) -> None:
    """No core dumps, and bounds on descriptors, processes, locked memory and priority."""
    output = house.attack("cat /proc/self/limits; ulimit -c unlimited && echo gained")
    limits = {line[:26].strip(): line[26:].split()[:2] for line in output.splitlines()}
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max realtime priority"] == limits["Max nice priority"] == ["0", "0"]
    assert int(limits["Max open files"][0]) == 1024
    assert int(limits["Max open files"][1]) <= 65_536
    for name in ("Max processes", "Max locked memory"):
        assert int(limits[name][1]) <= 8 * 1024 * 1024


def test_job_has_three_descriptors_and_can_open_them_again(house: _House) -> None:
    """/dev/stdout and /dev/stderr work, as shell scripts expect; there is nothing else."""
    output = house.attack(
        "ls /proc/self/fd; echo out >/dev/stdout; echo err >/dev/stderr; echo fd >/proc/self/fd/1"
        "; cat </dev/stdin"
    )
    assert output.split() == ["0", "1", "2", "3", "out", "err", "fd", "came", "so", "far"]


def test_job_knows_nothing_of_the_servers_environment(house: _House) -> None:
    """Its own is told in the documentation, whole; USER is the API user."""
    lines = house.attack("exec 2>&1; env").splitlines()
    names = {line.partition("=")[0] for line in lines if "=" in line}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == {"PATH", "HOME", "LANG", "USER", "JOB_ID"}
    assert {"USER=bob", "HOME=/"} <= set(lines)


# --- files ------------------------------------------------------------------------------------

_SECRETS = [
    *("certs/server-key.pem", "certs/server-ca-key.pem", "certs/client-ca-key.pem"),
    *("certs/client-key.pem", "state/token.key", "state/uids", "state/audit.log"),
    *("state/logged-out", "state/output/VICTIM.out", "users"),
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
    """The keys, the users, their uids, the audit log, another user's output."""
    path = house.place / name.replace("VICTIM", house.victim)
    path.open("ab").close()  # one that nothing has been written to yet
    before = path.stat().st_ino, path.stat().st_mode, path.read_bytes()[:10_000]
    output = house.attack(_STEAL, path, *house.targets)
    assert "ermission denied" in output
    assert (path.stat().st_ino, path.stat().st_mode) == before[:2]
    assert path.read_bytes().startswith(before[2])


def test_job_reaches_what_is_public(house: _House) -> None:
    """The attempts above fail for want of rights, and not because nothing can be reached."""
    path = house.place / "certs/server.pem"
    output = _run(house.bob, 'cat "$1" && echo gained; ls "${1%/*}"', path)
    assert "gained" in output
    assert "server-key.pem" in output


@pytest.mark.parametrize("name", ["state", "state/output"])
def test_job_cannot_look_into_the_state_directory(house: _House, name: str) -> None:
    """Nor enter it, nor put something there, nor into the output directory in it."""
    path = house.place / name
    before = sorted(os.listdir(path))
    house.attack(
        """
        ls "$1" && echo gained
        cd "$1" && echo gained
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
    """Nor through the pipe that is another job's stdout, be it by /proc or by /dev."""
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
    """Not the server, one of its threads, the helper, another's job, their groups, or all."""
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
    # Everybody that it may signal at all: itself is spared, and there is nobody else.
    output = _run(house.bob, f"sleep 1000 & {_KILL_ALL}; echo alive")
    assert output == "alive\n"
    house.assert_all_is_well()


def test_kill_of_everybody_reaches_only_ones_own(house: _House) -> None:
    """kill -9 -1 takes along what the same user runs, in whatever job, and nobody else's."""
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
    """The jobs of one user are one uid; this is what the documentation says."""
    own = _sh(house.bob, f"echo $$; {_FOREVER}")
    pid = int(_first_line(house.bob, own))
    assert _run(house.bob, "kill -TERM $1 && echo sent", pid) == "sent\n"
    ended = _end_of(house.bob, own)
    assert (ended.status, ended.signal) == (worker_pb.FINISHED, signal.SIGTERM)


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
    """Environment, memory, descriptors and the like of server, threads, helper and others' jobs."""
    threads = os.listdir(f"/proc/{house.server_pid}/task")
    output = house.attack(_LOOK, *house.targets, threads[-1])
    assert "do not tell" not in output
    # It is the rights: the same works for a process of one's own.
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
    """ptrace(2) and process_vm_readv(2) are refused, but for one's own processes."""
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
        return  # not even the children of others with the same uid
    own = _sh(house.bob, f"echo $$; {_FOREVER}")
    pid = int(_first_line(house.bob, own))
    output = _run(house.bob, 'program=$1; shift; perl -e "$program" "$@" 2>&1', program, pid)
    assert f"gained trace {pid}" in output
    house.bob.stop(own)


# --- privileges -------------------------------------------------------------------------------


def test_set_user_id_program_gives_nothing(house: _House, public: Path) -> None:
    """no_new_privs: a set-uid root program, which works for others, is a program like others."""
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
    """Root of a namespace of one's own is still nobody to what is outside of it."""
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
    path = house.place / "state/token.key"
    house.attack(
        "script=$1; shift; unshare --user --map-root-user --mount --cgroup --pid --fork "
        'sh -c "$script" sh "$@" 2>&1',
        script,
        path,
        *house.targets,
    )
    assert path.stat().st_size == 32


def test_job_cannot_become_somebody_else(house: _House) -> None:
    """Neither root nor the server nor another user, by any of the usual programs."""
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


def test_start_stream_status_and_stop_work_for_every_user(house: _House) -> None:
    """The owner and an admin reach a job whose uid is not the server's; the whole tree ends."""
    for owner, other in ((house.alice, house.admin), (house.bob, house.bob)):
        job = _sh(owner, f"sleep 1000 & setsid sleep 1000 & echo up; {_FOREVER}")
        assert _first_line(other, job) == "up"
        assert other.status(job).status == worker_pb.RUNNING
        assert other.stop(job).status == worker_pb.STOPPED
        assert b"".join(owner.stream(job)) == b"up\n"
    job = _sh(house.bob, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exit 3")
    ended = _end_of(house.bob, job)
    assert (ended.exit_code, ended.status) == (3, worker_pb.FINISHED)
    assert ended.usage.cpu_user_s + ended.usage.cpu_system_s > 0


def test_others_jobs_are_out_of_reach_through_the_api_too(house: _House) -> None:
    """Bob cannot even tell that alice's job is there."""
    for call in (house.bob.status, house.bob.stop, lambda job: next(house.bob.stream(job))):
        with pytest.raises(ClientError, match="no such job"):
            call(house.victim)
    assert house.victim not in [job.job_id for job in house.bob.list()]
    assert house.victim in [job.job_id for job in house.admin.list()]


def test_job_that_cannot_be_executed_by_its_user_is_told(house: _House, public: Path) -> None:
    """A program that only root may execute is an error for the caller, and no job."""
    program = public / "private"
    shutil.copy("/bin/true", program)
    program.chmod(0o700)
    with pytest.raises(ClientError, match="permission denied"):
        house.bob.start(str(program))
    house.assert_all_is_well()


def test_files_of_one_user_are_closed_to_another(house: _House) -> None:
    """What a job makes in a common directory has the umask 077."""
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
def test_job_cannot_write_to_the_cgroup_tree(house: _House) -> None:
    """No file, from the root down to its own cgroup; nor make, move or remove a cgroup."""
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
    """Not for the parent, another's job, a second one of its own, the server's or the root."""
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
    places = {line for line in output.splitlines() if line.startswith("0::")}
    assert len(places) == 1
    assert own in output
    assert house.victim in output
    house.bob.stop(own)


@pytest.mark.kernel
def test_limits_and_usage_of_a_job_of_another_uid(house: _House) -> None:
    """It is in its cgroup, under its limits, from its first instruction; usage is told."""
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
    assert _end_of(house.bob, greedy).end_reason == worker_pb.OUT_OF_MEMORY


# --- uids -------------------------------------------------------------------------------------


def _uid_of(client: Client) -> int:
    return int(_run(client, "id -u"))


def test_uid_is_stable_and_never_anothers(
    certs: Path, entries: dict[str, str], public: Path
) -> None:
    """Across restarts, a changed order, a reload and a removal; a new user has a new one."""
    users, state = public / "users", public / "state"
    options = ("--certs", certs, "--users", users, "--state-dir", state)
    users.touch(0o600)
    users.write_text(f"{entries['alice']}\n{entries['bob']}\n")
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
        # The file is read by the helper now, and the uid of who comes back is the old one.
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
    """Block until the server has logged something; inotify would be no simpler."""
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
    """A FIFO that the processes of jobs hold."""

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
        """Block until no process has it."""
        assert select.select([self._fd], [], [], GUARD_S)[0]
        assert os.read(self._fd, 1) == b""
        os.close(self._fd)
        self._open()

    def _open(self) -> None:
        # Anew for each time: once somebody has had it, it is readable when nobody has.
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def witness(public: Path) -> Iterator[_Witness]:
    with contextlib.closing(_Witness(public)) as witness:
        yield witness


def _subtree_of(pid: int) -> Path | None:
    """The cgroups of the server `pid`, where it has some."""
    (path,) = re.findall(r"^0::(.*)$", Path(f"/proc/{pid}/cgroup").read_text(), re.MULTILINE) or [
        ""
    ]
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    tops = [point for _, point, kind, *_ in mounts if kind == "cgroup2"]
    return Path(tops[0] + path).parent if tops and path.endswith("/server") else None


@contextlib.contextmanager
def _busy(certs: Path, place: Path, witness: _Witness, *options: str | Path) -> Iterator[_Program]:
    """A server with jobs of two users."""
    with _server(
        place / "log", "--certs", certs, "--state-dir", place / "state", *options
    ) as program:
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


def test_death_of_the_server_leaves_nothing(certs: Path, public: Path, witness: _Witness) -> None:
    """SIGKILL: every job of every user dies, the helper ends, and the cgroups go with it."""
    with _busy(certs, public, witness) as program:
        helper, subtree = fork_server_of(program.process.pid), _subtree_of(program.process.pid)
        with open(os.pidfd_open(helper)) as pidfd:
            program.process.kill()
            witness.await_end()
            assert select.select([pidfd], [], [], GUARD_S)[0]
        assert subtree is None or not subtree.exists()


def test_death_of_the_helper_leaves_no_job(certs: Path, public: Path, witness: _Witness) -> None:
    """The jobs die, they are LOST, no further one is started, and the server ends as it should."""
    with _busy(certs, public, witness) as program:
        subtree = _subtree_of(program.process.pid)
        if subtree is None:
            pytest.skip("needs cgroup v2: without, only the leaders die with the helper")
        os.kill(fork_server_of(program.process.pid), signal.SIGKILL)
        witness.await_end()
        with _login(program.address, certs, "admin", "admin") as admin:
            for job in admin.list():
                assert _end_of(admin, job.job_id).end_reason == worker_pb.LOST
            with pytest.raises(ClientError, match="has died; restart the server"):
                _sh(admin, "true")
        assert program.end() == 0
        # Nobody with the right to remove it is left, but for the next server.
        with _server(
            public / "next", "--certs", certs, "--state-dir", public / "state"
        ) as successor:
            assert not subtree.exists()
            assert successor.end() == 0


def test_graceful_stop_leaves_nothing(certs: Path, public: Path, witness: _Witness) -> None:
    """SIGTERM: no process, no cgroup, no output file, and exit status 0."""
    with _busy(certs, public, witness) as program:
        helper, subtree = fork_server_of(program.process.pid), _subtree_of(program.process.pid)
        assert program.end() == 0
        witness.await_end()
        assert not Path(f"/proc/{helper}").exists()
        assert subtree is None or not subtree.exists()
        assert os.listdir(public / "state/output") == []


@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_in_the_cgroup_tree(
    base: Path, certs: Path, public: Path, witness: _Witness, number: signal.Signals
) -> None:
    """With every limit, in a root of its own, where the server itself is: all as it was before."""
    enter = ("sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(base))
    options = ("--limits", "require", "--state-dir", public / "state", "--certs", certs)
    with _server(public / "log", *options, before=enter) as program:
        with _login(program.address, certs, "user", "user") as user:
            _sh(user, witness.script)
            witness.await_up(1)
        helper = fork_server_of(program.process.pid)
        assert (base / "cgroup.procs").read_text() == ""
        with open(os.pidfd_open(helper)) as pidfd:
            program.process.send_signal(number)
            witness.await_end()
            assert select.select([pidfd], [], [], GUARD_S)[0]
        program.process.wait(GUARD_S)
    assert [each for each in base.iterdir() if each.is_dir()] == []
    assert (base / "cgroup.subtree_control").read_text() == ""
    assert wait_event(base, "populated", "0", GUARD_S)


# --- started with fewer rights ------------------------------------------------------------------


def _as_nobody(*capabilities: str) -> tuple[str, ...]:
    """Become an ordinary user with these rights.

    The right to read lets it execute a Python that is, say, in root's home.
    """
    caps = ",".join(f"+{name}" for name in ("dac_read_search", *capabilities))
    return (
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *(f"--inh-caps={caps}", f"--ambient-caps={caps}"),
    )


@pytest.fixture
def state_of_nobody(public: Path) -> Path:
    """A state directory of an ordinary user's."""
    path = public / "state"
    path.mkdir(0o700)
    os.chown(path, NOBODY, NOBODY)
    return path


@pytest.mark.parametrize("capabilities", [(), ("setuid",), ("setgid",), ("kill",)])
def test_ordinary_user_is_warned_that_jobs_share_the_uid(
    certs: Path, public: Path, state_of_nobody: Path, capabilities: tuple[str, ...]
) -> None:
    """The warning says what follows and what to do; jobs run, as the server's own user."""
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
    """One line with what is wrong and what to do; no server, and nothing made."""
    result = subprocess.run(
        [
            *_as_nobody(*capabilities),
            *(sys.executable, str(_HERE / "server.py")),
            *("--listen", "127.0.0.1:0", "--limits", "auto", "--certs", certs),
            *("--state-dir", state_of_nobody, "--require-isolation"),
        ],
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=GUARD_S,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("server: --require-isolation: jobs run as uid 65534, like the server")
    assert "start the server as root, or with CAP_SETUID and CAP_SETGID" in line
    assert os.listdir(state_of_nobody) == []


def test_isolation_with_capabilities_instead_of_root(
    certs: Path, public: Path, state_of_nobody: Path, witness: _Witness
) -> None:
    """An ordinary user with CAP_SETUID, CAP_SETGID and CAP_KILL: all the same, and none left."""
    options = ("--certs", certs, "--state-dir", state_of_nobody, "--require-isolation")
    before = _as_nobody("setuid", "setgid", "kill")
    with _server(public / "log", *options, before=before) as program:
        pid = program.process.pid
        for task in os.listdir(f"/proc/{pid}/task"):
            status = _status(f"{pid}/task/{task}")
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
            assert uids <= set(range(_FIRST_UID - 1, 80_000))
            assert "CapEff:\t0000000000000000" in _run(user, "cat /proc/self/status")
            # Not before a job has run: the fork server gives up its other rights as it starts.
            fork_server = _status(fork_server_of(pid))
            assert int(fork_server["CapEff"], 16) == sum(1 << number for number in (5, 6, 7))
            job = _sh(user, witness.script)
            witness.await_up(1)
            script = 'kill -9 $1 $2 && echo gained; cat "$3/token.key" && echo gained'
            output = _run(user, script, pid, fork_server_of(pid), state_of_nobody)
            assert "gained" not in output
            assert user.stop(job).status == worker_pb.STOPPED
        assert program.end() == 0
        witness.await_end()


@pytest.mark.kernel
def test_isolation_with_two_capabilities_and_a_delegated_cgroup(
    base: Path, certs: Path, public: Path, state_of_nobody: Path, witness: _Witness
) -> None:
    """With a cgroup of its own CAP_SETUID and CAP_SETGID are enough."""
    for path in (base, base / "cgroup.procs", base / "cgroup.subtree_control"):
        os.chown(path, NOBODY, NOBODY)
    enter = ("sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(base))
    options = ("--certs", certs, "--state-dir", state_of_nobody, "--limits", "require")
    before = (*enter, *_as_nobody("setuid", "setgid"))
    with _server(public / "log", *options, "--require-isolation", before=before) as program:
        helper = fork_server_of(program.process.pid)
        with _login(program.address, certs, "user", "user") as user:
            assert _uid_of(user) >= _FIRST_UID - 1
            job = _sh(user, witness.script)
            witness.await_up(1)
            assert user.stop(job).status == worker_pb.STOPPED
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
        with open(os.pidfd_open(helper)) as pidfd:
            program.process.kill()
            witness.await_end()
            assert select.select([pidfd], [], [], GUARD_S)[0]
    assert wait_event(base, "populated", "0", GUARD_S)
    with Worker(enforcement="require", cgroup_root=base):
        pass  # the next one sweeps
    assert [each for each in base.iterdir() if each.is_dir()] == []


# --- where the server may be --------------------------------------------------------------------


def test_server_works_below_a_directory_that_is_closed_to_it(
    certs: Path, entries: dict[str, str], public: Path
) -> None:
    """Source, certificates, users and state below root's own 0700 directory, all its life long."""
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
        *("--users", users, "--state-dir", closed / "state", "--audit-required"),
    )
    with program, _login(program.address, certs, "alice") as alice:
        assert _status(program.process.pid)["Uid"].split()[0] == str(_SERVER_UID)
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
        assert alice.stop(running).status == worker_pb.STOPPED
        assert program.end() == 0
    log = program.log.read_text()
    assert "Traceback" not in log
    assert " ERROR " not in log


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
    """The users file, the keys and the directories they are in; it says what to do about it."""
    name, mode, remedy = bad
    shutil.copytree(certs, public / "certs")
    os.chmod(public / "certs", 0o755)
    users = public / "users"
    users.touch(0o600)
    users.write_text(f"{entries['alice']}\n")
    os.chmod(public / name, mode)
    options = ("--certs", public / "certs", "--users", users, "--state-dir", public / "state")
    run = subprocess.run(
        [sys.executable, _HERE / "server.py", "--listen", "127.0.0.1:0", "--limits=auto", *options],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert f"run: {remedy}{public / name}" in run.stderr
    os.chmod(public, 0o700)  # nobody comes to it now, whatever its mode
    with _server(public / "log", *options) as program:
        assert program.end() == 0


def test_users_file_that_jobs_could_read_is_not_taken_up(
    certs: Path, entries: dict[str, str], public: Path
) -> None:
    """On SIGHUP; the users stay as they were, and the log says why."""
    users = public / "users"
    users.touch(0o600)
    users.write_text(f"{entries['alice']}\n")
    options = ("--certs", certs, "--users", users, "--state-dir", public / "state")
    with _server(public / "log", *options) as program:
        users.write_text(f"{entries['bob']}\n")
        users.chmod(0o644)
        program.process.send_signal(signal.SIGHUP)
        _await_log(program, f"the users stay as they were: jobs could read or change {users}")
        _login(program.address, certs, "alice").close()
        assert program.end() == 0


@pytest.mark.parametrize(
    ("uids", "problem"),
    [
        ("0-10", "must be a range of two uids or more, from 1000 up"),
        ("nonsense", "is not FIRST-LAST"),
        ("70000-70001", "no uid is left for"),
    ],
)
def test_range_that_will_not_do_is_an_error(
    certs: Path, public: Path, uids: str, problem: str
) -> None:
    """One line that names it, and no server; also when there are more users than uids."""
    result = subprocess.run(
        [
            *(sys.executable, _HERE / "server.py", "--listen", "127.0.0.1:0", "--limits", "auto"),
            *("--certs", certs, "--state-dir", public / "state", "--uids", uids),
        ],
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=GUARD_S,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("server: ")
    assert problem in last
