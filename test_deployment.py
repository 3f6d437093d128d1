"""Tests of the deployment: the systemd units in `deploy/`, and docs/security.md.

The tests read the units with a strict parser of their own, which knows only the forms that the
units use.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import daemon
import server
import workerservice_pb2 as worker_pb
from accounts import parse_uids
from client import Client, ClientError
from servercommands import parse_arguments
from serveroptions import settings_in_force
from settings import Config, Settings
from store import Store
from testkit import GUARD_S, ServerProgram, fork_server_of, status_of
from worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
_UNIT = _HERE / "deploy/job-worker.service"
_UNIT_OF_JOBS = _HERE / "deploy/job-worker-jobs.service"
_UNITS_OF_SYSTEMD = Path("/usr/lib/systemd/system")
_INSTALLED = "opt/job-worker"

# The figure of `systemd-analyze security` for the unit, of 10; systemd 252 says 2.8. The rest is
# what the server needs: a start as root, other uids, cgroups, the network. If the figure rises,
# find the line of the unit that has lost its effect, and do not raise this limit.
_MAX_EXPOSURE = 3.0

_SERVER_UID, _FIRST_UID = 70_000, 70_001
_RLIMITS = {"LimitNOFILE": "nofile", "LimitCORE": "core"}


def _parse(text: str) -> dict[str, list[str]]:
    """Read a unit; return the values of each key, without the sections."""
    values = defaultdict(list)
    for line in text.replace("\\\n", "").splitlines():
        if line and not line.startswith(("#", "[")):
            key, equals, value = line.partition("=")
            assert equals, line
            values[key].append(" ".join(value.split()))
    return dict(values)


@pytest.fixture(scope="session")
def unit() -> dict[str, list[str]]:
    return _parse(_UNIT.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def unit_of_jobs() -> dict[str, list[str]]:
    return _parse(_UNIT_OF_JOBS.read_text(encoding="utf-8"))


def _analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze; skip the test without it, except in CI."""
    if not shutil.which("systemd-analyze"):
        reason = "needs systemd-analyze: install systemd (it need not run)"
        if os.environ.get("JOBWORKER_REQUIRE_KERNEL") == "1":
            pytest.fail(f"JOBWORKER_REQUIRE_KERNEL=1, but this test {reason}")
        pytest.skip(reason)
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )


def _verify(root: Path, text: str) -> tuple[int, str]:
    """Let systemd verify the units in a root directory where the project is installed."""
    for directory in (_INSTALLED, "etc/systemd/system", "usr/bin"):
        (root / directory).mkdir(parents=True)
    shutil.copytree(_UNITS_OF_SYSTEMD, root / "usr/lib/systemd/system", symlinks=True)
    shutil.copy(_HERE / "server", root / _INSTALLED)
    for name in ("kill", "sleep", "sh"):
        shutil.copy("/bin/true", root / "usr/bin" / name)
    (root / "bin").symlink_to("usr/bin")
    shutil.copy(_UNIT_OF_JOBS, root / "etc/systemd/system")
    (root / "etc/systemd/system" / _UNIT.name).write_text(text, encoding="utf-8")
    result = _analyze("--root", root, "verify", _UNIT.name, _UNIT_OF_JOBS.name)
    return result.returncode, result.stdout + result.stderr


# --- the unit as systemd sees it --------------------------------------------------------------


def test_systemd_has_no_complaint(tmp_path: Path) -> None:
    """`systemd-analyze verify` knows every key and value, and finds every program."""
    assert _verify(tmp_path / "good", _UNIT.read_text(encoding="utf-8")) == (0, "")


def test_complaint_of_systemd_would_be_noticed(tmp_path: Path) -> None:
    """The test above notices an unknown key and a missing program."""
    text = _UNIT.read_text(encoding="utf-8")
    _, said = _verify(tmp_path / "key", text.replace("NoNewPrivileges=", "NoNewPrivilege="))
    assert "NoNewPrivilege" in said
    status, said = _verify(tmp_path / "program", text.replace("/job-worker/server", "/server"))
    assert status != 0
    assert "/opt/server is not executable" in said


def _exposure(unit: Path, *, allowed: float) -> tuple[int, float]:
    """Return exit status and figure of `systemd-analyze security`; it fails above `allowed`."""
    threshold = f"--threshold={round(allowed * 10)}"
    result = _analyze("security", "--offline=yes", threshold, unit)
    (figure,) = re.findall(r"Overall exposure level for .*: ([0-9.]+)", result.stdout)
    return result.returncode, float(figure)


def test_exposure_is_low() -> None:
    """`systemd-analyze security` judges the file alone."""
    status, figure = _exposure(_UNIT, allowed=_MAX_EXPOSURE)
    assert (status, figure <= _MAX_EXPOSURE) == (0, True), figure


@pytest.mark.parametrize("key", ["CapabilityBoundingSet", "SystemCallFilter", "RestrictNamespaces"])
def test_exposure_rises_without_a_protection(tmp_path: Path, key: str) -> None:
    """So the figure of the test above depends on these lines."""
    weaker = tmp_path / _UNIT.name
    weaker.write_text(re.sub(rf"^{key}=.*\n", "", _UNIT.read_text(), flags=re.MULTILINE))
    status, figure = _exposure(weaker, allowed=_MAX_EXPOSURE)
    assert status != 0
    assert figure > _MAX_EXPOSURE


@pytest.mark.parametrize("kind", ["tee vmsplice", "shm msg sem", "@keyring"])
def test_unit_refuses_what_jobs_could_hold_up_others_with(
    unit: dict[str, list[str]], kind: str
) -> None:
    """A line that begins with ~ takes system calls from what an earlier line permits."""
    permitted, *refused = unit["SystemCallFilter"]
    assert not permitted.startswith("~")
    assert all(line.startswith("~") for line in refused)
    names = " ".join(refused).replace("~", "").split()
    assert all(any(name.startswith(part) for name in names) for part in kind.split())
    # The server needs it (docs/restarts.md), and refuses it to jobs, as test_restart.py shows.
    assert "splice" not in names


# --- the unit against the program ---------------------------------------------------------------


def _settings(unit: dict[str, list[str]]) -> Settings:
    """The settings of the server that the unit starts, with the file of this clone."""
    (command,) = unit["ExecStart"]
    program, *options = shlex.split(command)
    assert program == f"/{_INSTALLED}/server"
    assert options[:3] == ["--config", "/etc/job-worker/server.toml", "--cgroup-root"]
    return settings_in_force(parse_arguments(["--config", str(_HERE / "deploy/server.toml")]))[0]


def test_server_understands_what_the_unit_starts(unit: dict[str, list[str]]) -> None:
    """The server has every option of the unit. Users, isolation, limits and audit are required."""
    settings = _settings(unit)
    assert settings.enforcement == "require"
    assert settings.isolation == "require"
    assert settings.audit_required
    for path in (settings.users, settings.certs, settings.state_dir):
        assert path
        assert path.is_absolute()
    assert settings.state_dir == Path("/var/lib", *unit["StateDirectory"])
    assert unit["StateDirectoryMode"] == ["0711"]


def test_jobs_outlive_the_service(
    unit: dict[str, list[str]], unit_of_jobs: dict[str, list[str]]
) -> None:
    """systemd kills the server alone, and starts the next one in a cgroup that has none below."""
    assert _settings(unit).restart_window == 300
    assert unit["KillMode"] == ["process"]
    assert "Delegate" not in unit
    assert unit_of_jobs["Delegate"] == ["yes"]
    # With "simple", systemd could put the process back after ExecStartPost= has moved it.
    assert unit_of_jobs["Type"] == ["exec"]
    assert "KillMode" not in unit_of_jobs
    # The server makes the cgroups of the jobs below that of the other unit, which is there before.
    (start,) = unit["ExecStart"]
    root = shlex.split(start)[-1]
    assert root.endswith(f"/{_UNIT_OF_JOBS.name}")
    (make,) = unit_of_jobs["ExecStartPost"]
    assert make.replace("%n", _UNIT_OF_JOBS.name).startswith(f"/bin/sh -ec 'cd {root}; ")
    assert unit["BindsTo"] == [_UNIT_OF_JOBS.name]
    assert _UNIT_OF_JOBS.name in unit["After"]
    # The end of the other unit ends the jobs.
    assert unit_of_jobs["ExecStop"][0].endswith(" stop --jobs")


def test_homes_and_tmpdirs_are_on_disk(unit: dict[str, list[str]]) -> None:
    """They are in the state directory, which is no tmpfs, and jobs may write and execute there."""
    state = Path("/var/lib", *unit["StateDirectory"])
    in_memory = [Path(each.partition(":")[0]) for each in unit["TemporaryFileSystem"]]
    assert in_memory
    assert not [path for path in in_memory if state.is_relative_to(path)]
    assert "NoExecPaths" not in unit


def test_security_md_and_the_unit_agree(unit: dict[str, list[str]]) -> None:
    """The paths and uids in the instructions are those of the unit."""
    settings = _settings(unit)
    text = (_HERE / "docs" / "security.md").read_text(encoding="utf-8")
    for path in (settings.certs, settings.users, settings.state_dir / "audit.log"):
        assert str(path) in text
    assert f"/{_INSTALLED}" in text
    jobs = parse_uids(settings.uids)[1:]
    assert f"skuid {jobs.start}-{jobs.stop - 1} " in text


def test_systemd_waits_longer_than_the_server(unit: dict[str, list[str]]) -> None:
    """The watchdog ends the server before systemd does. The unit sends the right signals."""
    (timeout,) = unit["TimeoutStopSec"]
    assert int(timeout) > daemon.WATCHDOG_S + server._STOP_GRACE_S
    assert unit["KillSignal"] == ["SIGTERM"]
    # With "+": without CAP_KILL root must not signal the server, which is somebody else.
    check, tell = unit["ExecReload"]
    assert tell == "+kill -HUP $MAINPID"
    # The check reads what the server reads.
    (start,) = unit["ExecStart"]
    program, *options = shlex.split(check.removeprefix("+"))
    assert options[-2:] == ["check", "--config"]
    assert start.startswith(" ".join([program, *options[:-2]]))


def test_files_suffice_for_every_stream(unit: dict[str, list[str]]) -> None:
    """The unit allows enough open files for the default quotas."""
    (limit,) = unit["LimitNOFILE"]
    streams = Config().in_all.streams or 0
    assert int(limit) >= streams * server._FDS_PER_STREAM + server._OTHER_FDS


# --- the rights of the unit, in a real kernel -------------------------------------------------


def _capabilities(unit: dict[str, list[str]]) -> set[str]:
    (kept,) = unit["CapabilityBoundingSet"]
    return {name.removeprefix("CAP_").lower() for name in kept.split()}


def _rights(unit: dict[str, list[str]], cgroup: Path, *, without: str = "") -> tuple[str, ...]:
    """Return the command that drops the same rights as the unit and enters the service's cgroup."""
    assert unit["NoNewPrivileges"] == ["yes"]
    (umask,) = unit["UMask"]
    kept = sorted(_capabilities(unit) - {without})
    bounding = ",".join(["-all", *(f"+{name}" for name in kept)])
    limits = [f"--{option}={unit[key][0]}" for key, option in _RLIMITS.items()]
    assert {key for key in unit if key.startswith("Limit")} == set(_RLIMITS)
    enter = f'umask {umask}; echo 0 >"$0/cgroup.procs" && exec "$@"'
    return (
        *("sh", "-c", enter, str(cgroup), "prlimit", *limits),
        *("setpriv", "--no-new-privs", f"--bounding-set={bounding}", "--inh-caps=-all"),
    )


@pytest.fixture
def state(public: Path, unit: dict[str, list[str]]) -> Path:
    """A state directory like the one that systemd makes: jobs can get to their homes in it."""
    path = public / "state"
    path.mkdir()
    path.chmod(int(unit["StateDirectoryMode"][0], 8))
    return path


@contextlib.contextmanager
def _started(
    certs: Path, state: Path, before: tuple[str, ...]
) -> Iterator[tuple[ServerProgram, Client]]:
    """A server with these rights, and a logged-in client; its fork server ends with it."""
    program = ServerProgram(
        state.with_name("log"),
        *("--listen", "127.0.0.1:0", "--limits", "require", "--require-isolation"),
        *("--audit-required", "--certs", str(certs), "--state-dir", str(state)),
        before=before,
    )
    with contextlib.ExitStack() as stack:
        fork_server = fork_server_of(program.process.pid)
        pidfd = stack.enter_context(open(os.pidfd_open(fork_server)))
        stack.callback(select.select, [pidfd], [], [], GUARD_S)
        stack.enter_context(program.process)
        stack.callback(program.process.kill)
        client = stack.enter_context(Client(program.address, certs=certs))
        client.login("user", "user")
        yield program, client


def _run(client: Client, script: str) -> str:
    return b"".join(client.stream(client.start("sh", ["-c", script]))).decode()


@pytest.mark.kernel
def test_rights_of_the_unit_are_enough(
    base: Path, certs: Path, state: Path, unit: dict[str, list[str]]
) -> None:
    """Jobs with limits, a stop, SIGTERM and a second start work, and leave nothing behind."""
    for _ in range(2):  # the second finds a state directory that was in use
        with _started(certs, state, _rights(unit, base)) as (program, user):
            fork_server = fork_server_of(program.process.pid)
            assert status_of(program.process.pid)["Uid"].split() == [str(_SERVER_UID)] * 4
            kept = sum(1 << number for number in (0, 1, 6, 7, 24))  # and SYS_RESOURCE
            assert int(status_of(fork_server)["CapEff"], 16) == kept
            assert int(status_of(fork_server)["CapBnd"], 16) == 0
            script = "cat /proc/self/status; ulimit -Hc; umask; cat /proc/self/cgroup"
            output = _run(user, script)
            job = dict(line.split(":\t") for line in output.splitlines() if ":\t" in line)
            for each in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(job[each], 16) == 0
            assert int(job["Uid"].split()[0]) >= _FIRST_UID
            assert output.splitlines()[-3:-1] == ["0", "0077"]
            assert f"/{base.name}/job-worker-" in output.splitlines()[-1]
            tree = 'trap "" TERM; sleep 1000 & setsid sleep 1000 & echo up; wait'
            running = user.start("sh", ["-c", tree], memory_bytes=32 << 20, pids=8)
            next(user.stream(running))
            assert user.status(running).limits.memory_bytes == 32 << 20
            assert user.stop(running).status == worker_pb.JOB_STATUS_STOPPED
            # A deaf one would have the server wait for the whole grace of its shutdown.
            last = user.start("sh", ["-c", tree.removeprefix('trap "" TERM; ')])
            next(user.stream(last))
            with open(os.pidfd_open(fork_server)) as pidfd:
                assert program.end(signal.SIGTERM) == 0, program.log.read_text()
                assert select.select([pidfd], [], [], GUARD_S)[0]
        assert [each for each in base.iterdir() if each.is_dir()] == []
        assert "Traceback" not in program.log.read_text()
    records = [json.loads(line) for line in (state / "audit.log").read_text().splitlines()]
    rpcs = {each["rpc"].rpartition("/")[2] for each in records}
    assert {"Login", "StartJob", "StopJob"} <= rpcs


# A job tells of a capability that it has, and of a protection from the OOM killer.
_LOOK = """
    grep ^Cap /proc/self/status | grep -v 0000000000000000
    echo 0 2>/dev/null >/proc/self/oom_score_adj && echo protected
"""


def _problem(certs: Path, state: Path, before: tuple[str, ...]) -> str:
    """Return what a server with these rights cannot do; "" if it can do everything."""
    try:
        with _started(certs, state, before) as (program, user):
            output = _run(user, _LOOK)
            program.end()
    except (pytest.fail.Exception, ClientError) as failure:
        return str(failure)
    return output


# What then goes wrong. The last one is that without which a server cannot even tidy up.
_MISSED = {
    "sys_resource": "protected",
    "setuid": "--require-isolation",
    "setgid": "--require-isolation",
    "chown": "Operation not permitted",
    "setpcap": "CapBnd",
    "dac_override": "Permission denied",
}


@pytest.mark.kernel
def test_rights_of_the_unit_are_the_least(
    base: Path, certs: Path, tmp_path: Path, unit: dict[str, list[str]]
) -> None:
    """Without any one of its capabilities the server does not start, or a job goes wrong."""
    assert _capabilities(unit) == set(_MISSED)
    for name, missed in _MISSED.items():
        state = tmp_path / name / "state"
        state.mkdir(0o700, parents=True)
        assert missed in _problem(certs, state, _rights(unit, base, without=name)), name
    with Worker(enforcement="require", cgroup_root=base):
        pass  # sweeps what it had not the right to remove


# --- the other files of deploy/ -----------------------------------------------------------------

_LISTEN = """
import socket, sys
listener = socket.create_server(("10.0.0.1", 50051), backlog=1000)
print("ready", flush=True)
sys.stdin.read()
"""
_CONNECT = """
import socket
made = []
for _ in range(150):
    try:
        made.append(socket.create_connection(("10.0.0.1", 50051), timeout=60))
    except ConnectionRefusedError:
        pass
print(len(made))
"""


class _Network:
    """A network namespace, held by a process; a context manager."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.pid = self._popen("unshare", "--net", "sh", "-c", "echo ready; read _")

    def _popen(self, *argv: str) -> int:
        """Start a program that prints a line when it is ready, and ends when its stdin does."""
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._stack.enter_context(process)
        assert process.stdin
        assert process.stdout
        self._stack.callback(process.stdin.close)
        if process.stdout.readline() != "ready\n":
            pytest.skip("needs the right to make network namespaces")
        return process.pid

    def _within(self, *argv: str) -> tuple[str, ...]:
        return ("nsenter", "--net", "--target", str(self.pid), *argv)

    def start(self, *argv: str) -> None:
        self._popen(*self._within(*argv))

    def run(self, *argv: str) -> str:
        run = subprocess.run(self._within(*argv), check=True, capture_output=True, text=True)
        return run.stdout


@pytest.mark.parametrize(("address", "served"), [("10.0.0.2", 100), ("11.0.0.2", 0)])
def test_firewall_bounds_the_connections_of_one_address(address: str, served: int) -> None:
    """The rules are those of deploy/job-worker.nft. Who is in none of its networks gets none."""
    for program in ("nft", "ip", "unshare", "nsenter"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    with contextlib.ExitStack() as stack:
        server_side, client_side = _Network(stack), _Network(stack)
        try:
            server_side.run("nft", "-f", str(_HERE / "deploy/job-worker.nft"))
            peer = ("type", "veth", "peer", "name", "client", "netns", str(client_side.pid))
            server_side.run("ip", "link", "add", "server", *peer)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs nftables and virtual interfaces in the kernel: {error.stderr}")
        server_side.run("ip", "address", "add", "10.0.0.1/7", "dev", "server")
        server_side.run("ip", "link", "set", "server", "up")
        client_side.run("ip", "address", "add", f"{address}/7", "dev", "client")
        client_side.run("ip", "link", "set", "client", "up")
        server_side.start(sys.executable, "-c", _LISTEN)
        assert client_side.run(sys.executable, "-c", _CONNECT) == f"{served}\n"


def test_logrotate_understands_its_file() -> None:
    """logrotate would rotate the audit log of the unit's state directory."""
    if not shutil.which("logrotate"):
        pytest.skip("needs logrotate")
    file = _HERE / "deploy/job-worker.logrotate"
    run = subprocess.run(
        ["logrotate", "--debug", file], capture_output=True, text=True, check=False
    )
    assert "error" not in run.stderr
    assert "rotating pattern: /var/lib/job-worker/audit.log" in run.stderr


def test_backup_restores_settings_users_store_and_homes(tmp_path: Path) -> None:
    """The former token key is not kept. A file that is no backup changes nothing."""
    etc, state = tmp_path / "etc", tmp_path / "a state"
    for directory in (etc, state / "homes/alice", tmp_path / "bin"):
        directory.mkdir(parents=True)
    (etc / "server.toml").write_text(f'[server]\nstate_dir = "{state}"\n')
    (etc / "users").write_text("of before")
    (state / "homes/alice/kept").write_text("kept")
    with Store(state / "store") as store:
        store.set_fact("of", "before")
    calls = tmp_path / "calls"  # this host has no systemd with our units
    (tmp_path / "bin/systemctl").write_text(f'#!/bin/sh\necho "$*" >>{calls}\n')
    (tmp_path / "bin/systemctl").chmod(0o755)
    environment = {"ETC": str(etc), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def backup(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [_HERE / "deploy/backup.sh", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    file = tmp_path / "saved.tar.gz"
    done = backup("save", file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (etc / "users").write_text("of after")
    (state / "homes/alice/kept").unlink()
    shutil.rmtree(state / "store")
    (state / "token.key").touch()
    done = backup("restore", etc / "users")
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    assert not calls.exists()
    done = backup("restore", file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert calls.read_text() == "stop job-worker-jobs\nstart job-worker\n"
    assert (etc / "users").read_text() == "of before"
    assert (state / "homes/alice/kept").read_text() == "kept"
    assert not (state / "token.key").exists()
    with Store(state / "store") as store:
        assert store.fact("of") == "before"


# --- what `make setup` installs -----------------------------------------------------------------


def _locked(name: str) -> dict[str, list[str]]:
    """Return the packages in a file of requirements, each with its hashes."""
    text = (_HERE / "requirements" / name).read_text().replace("\\\n", " ")
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return {line[0]: line[1:] for line in lines if line}


@pytest.mark.parametrize("name", ["runtime.txt", "dev.txt"])
def test_every_package_has_one_version_and_its_hashes(name: str) -> None:
    """Also those that our packages need. pip refuses the file if one of them is missing."""
    for package, hashes in _locked(name).items():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", package)
        assert hashes
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes)


def test_packages_are_those_of_pyproject() -> None:
    """Otherwise `make lock` was forgotten."""
    project = tomllib.loads((_HERE / "pyproject.toml").read_text())
    assert set(project["project"]["dependencies"]) <= set(_locked("runtime.txt"))
    assert set(project["dependency-groups"]["dev"]) <= set(_locked("dev.txt"))


def test_setup_installs_only_wheels_with_known_hashes() -> None:
    """No rule of the Makefile installs a package for the service or its tests in another way."""
    run = subprocess.run(
        ["make", "--dry-run", "--always-make", "setup", ".venv/dev"],
        cwd=_HERE,
        capture_output=True,
        text=True,
        check=True,
    )
    installs = [line for line in run.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 2
    for line in installs:
        assert "--require-hashes --only-binary :all:" in line
        assert re.search(r" -r requirements/\w+\.txt$", line)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `make setup` needs of a clone; the environment is that of these tests."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "certs").mkdir()
    for name in ("Makefile", "certs/generate.sh", "requirements/runtime.txt", "units.py"):
        shutil.copy(_HERE / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):  # with its own pip: the host's Python may have none
        (tmp_path / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (tmp_path / ".venv/runtime").touch()
    return tmp_path


def _make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],
        cwd=clone,
        # Not as a part of the `make` that runs these tests.
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_makes_no_certificates_where_the_keys_of_the_cas_are_kept_elsewhere(
    clone: Path,
) -> None:
    """A server without these keys can be upgraded. An expired certificate is the operator's."""
    assert "made certs/server.pem" in _make(clone, "setup").stdout
    for key in (clone / "certs").glob("*-key.pem"):
        key.unlink()
    run = _make(clone, "setup")
    assert (run.returncode, run.stdout) == (0, "")
    assert "certs/ stays as it is" in run.stderr
    assert _make(clone, "certs").returncode != 0  # asked for by name, it says what is missing


def test_setup_makes_an_environment_without_python_anew(clone: Path) -> None:
    """So the Python of the host may be replaced by another version."""
    assert "-m venv" not in _make(clone, "--dry-run", "setup").stdout
    (clone / ".venv/bin").unlink()
    assert "-m venv --clear .venv" in _make(clone, "--dry-run", "setup").stdout


def test_package_with_another_content_is_refused(tmp_path: Path) -> None:
    """With a wrong hash nothing is installed. A source package is none of the candidates."""
    text = (_HERE / "requirements" / "runtime.txt").read_text()
    wrong = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, text)
    (tmp_path / "runtime.txt").write_text(wrong)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path)]
    run = subprocess.run(
        [
            *command,
            *("--require-hashes", "--only-binary", ":all:", "--no-cache-dir"),
            *("-r", str(tmp_path / "runtime.txt")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    if "DO NOT MATCH THE HASHES" not in run.stderr:
        pytest.skip("no index of packages can be reached")
    assert [path.name for path in tmp_path.iterdir()] == ["runtime.txt"]
