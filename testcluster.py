"""A Slurm cluster for tests: a controller and nodes on this machine, up in about a second.

    with Cluster(directory) as cluster:
        subprocess.run(["srun", "hostname"], env=os.environ | cluster.environment)

By hand, until Ctrl-C:

    python testcluster.py /tmp/cluster          # as root; prints what to put into [slurm]

Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge. Each node is one
`slurmd -N NAME`; all daemons are children of this process, and `close` ends them with their jobs.

Thread safety: one thread uses a `Cluster`.

Sources: slurm.conf(5), cgroup.conf(5), munged(8).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PROGRAMS", "Cluster"]

PROGRAMS = ("slurmctld", "slurmd", "srun", "squeue", "scancel", "scontrol", "munged", "setpriv")
_READY_S = 30

# No other cluster of this machine may have its jobs' numbers: deploy/slurm-epilog removes the
# TMPDIR of the number, in the /tmp that all share.
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}000
SlurmUser=slurm
AuthInfo=socket={directory}/munge/socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool_%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd_%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd_%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=64
SlurmdTimeout=3
KillWait=5
ReturnToService=2
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
{nodes}
{more}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
# More memory than there is: the limits of all jobs together are larger than what they use.
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
    "RealMemory=96000"
)


class Cluster:
    """A controller and nodes. A context manager. Attributes: `conf`, the path of slurm.conf;
    `environment`, which Slurm's programs need; `nodes`, the names.

    `more`: more lines of slurm.conf.
    """

    def __init__(self, directory: Path, *, nodes: int = 2, cpus: int = 64, more: str = "") -> None:
        self.directory = directory
        self.conf = directory / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf)}
        ports = _free_ports(nodes + 1)
        # No other cluster of this machine may have these names: they name the cgroups of the steps,
        # so it would kill ours.
        self.nodes = tuple(f"node{number + 1}-{ports[0]}" for number in range(nodes))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        host = socket.gethostname()
        lines = [
            _NODE.format(name=name, host=host, port=port, cpus=cpus)
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        for name, user in (("munge", "munge"), ("state", "slurm")):
            (directory / name).mkdir()
            shutil.chown(directory / name, user, user)
        (directory / "munge").chmod(0o755)
        for name in self.nodes:
            (directory / f"spool_{name}").mkdir()
        log = directory / "slurmctld.log"
        log.touch()
        shutil.chown(log, "slurm", "slurm")
        key = directory / "munge" / "key"
        key.write_bytes(os.urandom(128))
        shutil.chown(key, "munge", "munge")
        key.chmod(0o400)
        self.conf.write_text(
            _CONF.format(
                host=host,
                port=ports[0],
                directory=directory,
                nodes="\n".join(lines),
                names=",".join(self.nodes),
                more=more,
            )
        )
        (directory / "cgroup.conf").write_text(_cgroup_conf())
        try:
            self._start_munged()
            self.start_controller()
            for name in self.nodes:
                self.start_node(name)
            self.await_nodes()
        except BaseException:
            self.close()
            raise

    def _start_munged(self) -> None:
        directory = self.directory / "munge"
        files = ("key", "pid", "log", "seed")
        options = [
            *("--foreground", "--force", "--socket", f"{directory}/socket"),
            *(f"--{name}-file={directory}/{name}" for name in files),
        ]
        process = self._start("munged", _as("munge", ["munged", *options]))
        # It is ready when its socket answers; it tells nobody. munge(1) encodes a credential.
        _retry(process, ["munge", "-n", "-S", f"{directory}/socket"])

    def start_controller(self) -> None:
        """Start slurmctld, or start it again after `kill`; it recovers its state."""
        self._start("slurmctld", _as("slurm", ["slurmctld", "-D", "-f", str(self.conf)]))

    def start_node(self, name: str) -> None:
        """Start the node's slurmd, or start it again after `kill`."""
        self._start(name, ["slurmd", "-D", "-N", name, "-f", str(self.conf)])

    def kill(self, name: str) -> None:
        """SIGKILL a daemon: "slurmctld" or a node. The steps of a node live on."""
        process = self._daemons.pop(name)
        process.kill()
        process.wait()

    def kill_controller(self) -> None:
        """SIGKILL slurmctld, once it has saved the jobs that there are.

        Otherwise it would give their numbers away again, which the nodes refuse. It saves its
        state every few seconds, and tells nobody.
        """
        marker = self.directory / "marker"
        marker.touch()
        script = (
            'for i in $(seq 300); do [ "$0/state/job_state" -nt "$0/marker" ] && exit 0; '
            "sleep 0.1; done; exit 1"
        )
        subprocess.run(["sh", "-c", script, str(self.directory)], check=True)
        self.kill("slurmctld")

    def kill_node(self, name: str) -> None:
        """Have a node die: its slurmd, its steps and all of their processes."""
        self.kill(name)
        self._kill_steps(name)

    def _kill_steps(self, name: str) -> None:
        """SIGKILL all processes of the steps of a node."""
        for pid in self._step_daemons_of(name):
            for each in (pid, *reversed(_descendants(pid))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)

    def step_daemons(self) -> list[int]:
        """Return the processes that look after the steps of this cluster, not of another."""
        return [pid for name in self.nodes for pid in self._step_daemons_of(name)]

    def _step_daemons_of(self, name: str) -> list[int]:
        log = f"{self.directory.resolve()}/slurmd_{name}.log"
        found = []
        for path in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if (path / "comm").read_text() == "slurmstepd\n" and any(
                    os.readlink(fd) == log for fd in (path / "fd").iterdir()
                ):
                    found.append(int(path.name))
        return found

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's programs as root; return its stdout."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def await_nodes(self) -> None:
        """Block until every node is idle or in use."""
        script = (
            'for i in $(seq 600); do s=$(sinfo -h -N -o "%t"); '
            '[ "$(echo "$s" | grep -c -E "^(idle|mix|alloc)$")" = "$0" ] && exit 0; '
            "sleep 0.05; done; exit 1"
        )
        subprocess.run(
            ["sh", "-c", script, str(len(self.nodes))],
            env=os.environ | self.environment,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=_READY_S,
        )

    def await_no_jobs(self, name: str = "") -> list[str]:
        """Block until no job is left, for up to 60 s; return what squeue(1) then shows of the rest.

        `name`: of the jobs that count; all of them without.
        """
        # Slurm tells nobody when a job has left the queue.
        script = 'for i in $(seq 600); do [ -z "$("$@")" ] && exit; sleep 0.1; done'
        command = ["squeue", "-h", *([f"--name={name}"] if name else [])]
        self.run("sh", "-c", script, "sh", *command)
        return self.run(*command).splitlines()

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._daemons[name] = process
        return process

    def close(self) -> None:
        """End all jobs and daemons; idempotent."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.SubprocessError):
                command = ["scancel", "--signal=KILL", "--state=RUNNING", "--user=root"]
                subprocess.run(
                    command,
                    env=os.environ | self.environment,
                    check=False,
                    capture_output=True,
                    timeout=3,
                )
        # The nodes first: the end of a slurmd takes ten seconds if the controller is gone.
        for name in (*self.nodes, "slurmctld", "munged"):
            process = self._daemons.pop(name, None)
            if process is None:
                continue
            if name in self.nodes:
                self._kill_steps(name)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for top in (path for name in self.nodes for path in _cgroups(name)):
            for directory, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # what was killed is not gone yet
                    os.rmdir(directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cgroups(node: str) -> list[Path]:
    """Return the cgroups in which Slurm has made those of a node's jobs, for v1 and v2."""
    base = Path("/sys/fs/cgroup")
    return [*base.glob(f"*/slurm_{node}"), *base.glob(f"system.slice/{node}_slurmstepd.scope")]


def _cgroup_conf() -> str:
    """Return cgroup.conf for the hierarchy that has the memory controller here."""
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return (
            "CgroupPlugin=cgroup/v2\nIgnoreSystemd=yes\n"
            "ConstrainRAMSpace=yes\nConstrainSwapSpace=yes\n"
        )
    return "CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\n"


def _as(user: str, command: Sequence[str]) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _retry(process: subprocess.Popen[bytes], command: Sequence[str]) -> None:
    """Run a program until it succeeds, as long as `process` lives."""
    pause = threading.Event()
    for _ in range(600):
        done = subprocess.run(command, check=False, capture_output=True)
        if done.returncode == 0:
            return
        if process.poll() is not None:
            break
        pause.wait(0.02)
    raise RuntimeError(f"{process.args!r} does not answer: {done.stderr!r}")


def _descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for each in child.read_text().split():
                found += [*_descendants(int(each)), int(each)]
    return found


def _main(directory: str) -> None:
    with Cluster(Path(directory)) as cluster:
        sys.stdout.write(f'[slurm]\nconf = "{cluster.conf}"\n# SLURM_CONF={cluster.conf}\n')
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    _main(*sys.argv[1:])
