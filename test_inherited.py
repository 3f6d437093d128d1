"""Tests of what a job inherits: one for each row of the table in docs/security.md.

A main process takes on every attribute that a job must not have, and starts jobs of two users.
All of them look at themselves with the same program.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from inherited import OOM_SCORE_ADJ
from limits import Limits
from privileges import can_change_user, can_kill_any
from testkit import GUARD_S, JOB_VARIABLES, public_python
from worker import EndReason, Worker

if TYPE_CHECKING:
    from collections.abc import Callable

_HERE = Path(__file__).resolve().parent
_UIDS = range(71_001, 71_003)

# What a process can find out about itself. `number` is a system call's number.
_LOOK = r"""
import ctypes, fcntl, json, os, resource, signal, socket, sys

libc = ctypes.CDLL(None, use_errno=True)
long = ctypes.c_long
numbers = {
    "x86_64": (250, 251, 252, 248, 239, 238), "aarch64": (219, 30, 31, 217, 236, 237)
}.get(os.uname().machine)

def keyctl(*arguments):
    return libc.syscall(long(numbers[0]), *arguments)

def get_prctl(option):
    value = ctypes.c_int(-1)
    libc.prctl(option, ctypes.byref(value), 0, 0, 0)
    return value.value

def memory_policy():
    mode = ctypes.c_int(-1)
    if numbers:
        libc.syscall(long(numbers[4]), ctypes.byref(mode), None, long(0), None, long(0))
    return mode.value

def core_cookie():
    cookie = ctypes.c_ulonglong(0)
    libc.prctl(62, 0, 0, 0, ctypes.byref(cookie))
    return cookie.value

def may_bind():
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", 0))
            return True
        except PermissionError:
            return False

def read(name):
    try:
        with open(f"/proc/self/{name}") as file:
            return file.read().strip()
    except OSError:
        return None

def look():
    status = dict(line.split(":\t", 1) for line in read("status").splitlines() if ":\t" in line)
    fields = read("stat").rpartition(") ")[2].split()
    return {
        "status": {name: value.strip() for name, value in status.items()},
        "securebits": libc.prctl(27, 0, 0, 0, 0),
        "pid": os.getpid(), "group": os.getpgrp(), "session": os.getsid(0), "tty": fields[4],
        "cwd": os.getcwd(), "env": dict(os.environ),
        # From Python 3.14 on, ctypes keeps its library open.
        "fds": [fd for fd in sorted(os.listdir("/proc/self/fd"))
                if "/libffi.so" not in os.path.realpath("/proc/self/fd/" + fd)],
        "stdin": [os.readlink("/proc/self/fd/0"), fcntl.fcntl(0, fcntl.F_GETFL) & 0o6000],
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "pdeathsig": get_prctl(2),
        "dumpable": libc.prctl(3, 0, 0, 0, 0), "subreaper": get_prctl(37),
        "rlimits": {name: resource.getrlimit(getattr(resource, name))
                    for name in dir(resource) if name.startswith("RLIMIT_")},
        "oom_score_adj": int(read("oom_score_adj")), "loginuid": read("loginuid"),
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "policy": os.sched_getscheduler(0),
        "affinity": sorted(os.sched_getaffinity(0)),
        "io_priority": libc.syscall(long(numbers[2]), 1, 0) >> 13 if numbers else None,
        "personality": libc.personality(ctypes.c_ulong(0xffffffff)),
        "merge": libc.prctl(68, 0, 0, 0, 0),
        "thp_disabled": libc.prctl(42, 0, 0, 0, 0),
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}")
                       for name in os.listdir("/proc/self/ns")},
        "root": os.readlink("/proc/self/root"), "label": read("attr/current"),
        "timer_slack": libc.prctl(30, 0, 0, 0, 0),
        "memory_policy": memory_policy(), "core_dump_filter": read("coredump_filter"),
        "no_execution": libc.prctl(66, 0, 0, 0, 0), "machine_checks": libc.prctl(34, 0, 0, 0, 0),
        "speculation": [libc.prctl(52, long(each), 0, 0, 0) for each in range(3)],
        "time_stamps": get_prctl(25), "core_cookie": core_cookie(), "may_bind": may_bind(),
        # PF_MEMALLOC_NOIO: PR_GET_IO_FLUSHER tells only processes with CAP_SYS_RESOURCE.
        "io_flusher": int(fields[6]) >> 19 & 1,
        "keyring": keyctl(0, long(-3), 0) if numbers else None,
        "key": keyctl(10, long(-3), b"user", b"secret", 0) > 0 if numbers else None,
    }
"""
_MAIN = (
    _LOOK
    + r"""
import contextlib, subprocess, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
signal.raise_signal(signal.SIGUSR1)
signal.setitimer(signal.ITIMER_REAL, 3600)
os.umask(0)
os.environ["SECRET"] = "x"
os.set_inheritable(os.open("/etc/passwd", os.O_RDONLY), True)
libc.mlockall(1)
libc.prctl(1, signal.SIGUSR2, 0, 0, 0)  # the parent-death signal
libc.prctl(36, 1, 0, 0, 0)  # subreaper
libc.prctl(28, 0x4, 0, 0, 0)  # securebits: a change of the user leaves the capabilities
libc.prctl(67, 1, 0, 0, 0)
libc.prctl(41, 1, 0, 0, 0)  # no huge pages
libc.prctl(29, 12345, 0, 0, 0)  # timer slack, in nanoseconds
libc.prctl(57, 1, 0, 0, 0)  # I/O flusher
libc.prctl(65, long(1), 0, 0, 0)  # no memory that is writable and executable
for each in range(3):
    libc.prctl(53, long(each), long(4), 0, 0)  # no speculation
libc.prctl(62, 1, 0, 0, 0)  # a core-scheduling cookie
libc.prctl(33, 1, 1, 0, 0)  # machine checks: to be killed early
libc.personality(ctypes.c_ulong(0x0040000))  # ADDR_NO_RANDOMIZE
if numbers:
    libc.syscall(long(numbers[5]), long(2), ctypes.byref(ctypes.c_ulong(1)), long(64))  # MPOL_BIND
# Landlock: no TCP port may be bound. Two masks: of accesses to files, and to the network.
ruleset = libc.syscall(long(444), ctypes.byref((ctypes.c_uint64 * 2)(0, 1)), long(16), long(0))
libc.syscall(long(446), long(ruleset), long(0))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
values = {"oom_score_adj": b"-1000", "loginuid": b"12345", "coredump_filter": b"0x7f"}
for name, value in values.items():
    with contextlib.suppress(OSError):
        with open(f"/proc/self/{name}", "wb", buffering=0) as file:
            file.write(value)
with contextlib.suppress(OSError):
    os.setpriority(os.PRIO_PROCESS, 0, -5)
with contextlib.suppress(OSError):
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
with contextlib.suppress(OSError):
    os.setgroups([4, 24])
if numbers:
    libc.syscall(long(numbers[1]), 1, 0, (1 << 13) | 4)  # real-time I/O
    keyctl(1, None)
    libc.syscall(long(numbers[3]), b"user", b"secret", b"x", long(1), long(-3))  # add_key
own = look()
if "popen" in sys.argv:
    import testkit
    testkit.refuse_clone3()
from worker import Worker

python, hold, tell = sys.argv[1:4]
uids = range(*map(int, sys.argv[4:6])) if len(sys.argv) > 5 else None
told = {"main": own}
with Worker(enforcement="off", uids=uids) as worker:
    def start(program, number):
        uid = uids[number] if uids else None
        return worker.start(python, ["-I", "-S", "-c", program], uid=uid)
    first = worker.stream(start(hold, 0))
    told["first"] = json.loads(next(first))
    told["second"] = json.loads(b"".join(worker.stream(start(tell, 1))))
    first.close()
print(json.dumps(told))
"""
)
# The first job changes what it has, and keeps it.
_HOLD = (
    _LOOK
    + r"""
told = look()
fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)
fcntl.flock(0, fcntl.LOCK_EX)
if numbers:
    libc.syscall(long(numbers[3]), b"user", b"secret", b"y", long(1), long(-3))
print(json.dumps(told), flush=True)
signal.pause()
"""
)
# The second job finds traces of the first, or does not; and it wants more than it has.
_TELL = (
    _LOOK
    + r"""
told = look()
try:
    fcntl.flock(0, fcntl.LOCK_EX | fcntl.LOCK_NB)
    told["locked"] = True
except BlockingIOError:
    told["locked"] = False
try:
    with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(b"0")
    told["lowered"] = True
except OSError:
    told["lowered"] = False
print(json.dumps(told), flush=True)
"""
)


@cache
def _jobs(way_to_fork: str) -> dict[str, Any]:
    """What the main process and its two jobs are."""
    arguments = [public_python(), _HOLD, _TELL]
    if can_change_user() and can_kill_any():
        arguments += [str(_UIDS.start), str(_UIDS.stop)]
    program = f"import sys; sys.path.insert(0, {str(_HERE)!r})\n{_MAIN}"
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments, way_to_fork],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def _status(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda process: [process["status"].get(name) for name in names]


def _all_signals(process: dict[str, Any]) -> int:
    """The signals that are blocked, ignored or pending; two of the C library's apart.

    The program that looks ignores two more, because it is a Python program.
    """
    its_own = {signal.SIGPIPE, signal.SIGXFSZ}
    ours = sum(1 << (number - 1) for number in signal.valid_signals() - its_own)
    names = ("SigBlk", "SigIgn", "SigPnd", "ShdPnd")
    found = 0
    for name in names:
        found |= ours & int(process["status"][name], 16)
    return found


def _home() -> str:
    """Return where a job begins: in the home of its user. The users of `_UIDS` have none."""
    if can_change_user() and can_kill_any():
        return "/"
    with contextlib.suppress(KeyError):
        home = pwd.getpwuid(os.geteuid()).pw_dir
        if os.access(home, os.X_OK):
            return home
    return "/"


_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_NONE = "0" * 16
# By the row of the table: what to look at, what a job has, and what the main process must have
# for the row to be tested (None: anything else than the job).
_ROWS: dict[str, tuple[Callable[[dict[str, Any]], Any], Any, Any]] = {
    "no_new_privs": (_status("NoNewPrivs"), ["1"], None),
    "session, process group, terminal": (
        lambda p: (p["group"] == p["pid"], p["session"] == p["pid"], p["tty"]),
        (True, True, "0"),
        None,
    ),
    "working directory": (lambda p: p["cwd"], _home(), None),
    "umask": (_status("Umask"), ["0077"], ["0000"]),
    "environment": (
        lambda p: set(p["env"]) - {"LC_CTYPE"},
        JOB_VARIABLES,
        None,
    ),
    "open descriptors": (lambda p: p["fds"][:3] + p["fds"][4:], ["0", "1", "2"], None),
    "stdin": (lambda p: p["stdin"], ["/dev/null", 0], ...),
    "signals": (_all_signals, 0, None),
    "timers": (lambda p: p["timer"], [0.0, 0.0], None),
    "dumpable flag": (lambda p: p["dumpable"], 1, ...),
    "subreaper": (lambda p: p["subreaper"], 0, 1),
    "core dumps": (lambda p: p["rlimits"]["RLIMIT_CORE"], [0, 0], ...),
    "locked memory": (_status("VmLck"), ["0 kB"], None),
    "oom_score_adj": (lambda p: p["oom_score_adj"], OOM_SCORE_ADJ, -1000),
    "loginuid": (lambda p: p["loginuid"], "4294967295", "12345"),
    "nice value": (lambda p: p["nice"], 0, -5),
    "scheduling policy": (lambda p: p["policy"], os.SCHED_OTHER, os.SCHED_RR),
    "I/O priority": (lambda p: p["io_priority"], 0, 1),
    "I/O flusher": (lambda p: p["io_flusher"], 0, 1),
    "personality": (lambda p: p["personality"], 0, 0x0040000),
    "merging of memory": (lambda p: p["merge"], 0, 1),
    "securebits": (lambda p: p["securebits"], 0, 4),
}
# Those of a job that runs as a user of its own.
_ISOLATED_ROWS: dict[str, tuple[Callable[[dict[str, Any]], Any], Any, Any]] = {
    "user, group": (
        _status("Uid", "Gid"),
        ["\t".join([str(_UIDS[1])] * 4)] * 2,
        None,
    ),
    "other groups": (_status("Groups"), [""], ["4 24"]),
    "capabilities": (_status(*_CAPABILITIES), [_NONE] * 5, None),
    "parent-death signal": (lambda p: p["pdeathsig"], signal.SIGKILL, signal.SIGUSR2),
}
# Those that a job has like the main process: the operator has taken something from the service.
_KEPT_ROWS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "CPU affinity": lambda p: p["affinity"],
    "NUMA memory policy": lambda p: p["memory_policy"],
    "writable and executable memory": lambda p: p["no_execution"],
    "speculation": lambda p: p["speculation"],
    "time-stamp counter": lambda p: p["time_stamps"],  # without it Python itself does not run
    "core scheduling": lambda p: p["core_cookie"],
    "machine checks": lambda p: p["machine_checks"],
    "core dump filter": lambda p: p["core_dump_filter"],
    "Landlock rules": lambda p: p["may_bind"],
    "timer slack": lambda p: p["timer_slack"],
    "huge pages": lambda p: p["thp_disabled"],
    "namespaces": lambda p: p["namespaces"],
    "root directory": lambda p: p["root"],
    "LSM label": lambda p: p["label"],
    "seccomp filters": lambda p: (p["status"].get("Seccomp"), p["status"].get("Seccomp_filters")),
    "other resource limits": lambda p: [
        limit
        for name, limit in p["rlimits"].items()
        if name.removeprefix("RLIMIT_")
        not in {"CORE", "NOFILE", "OFILE", "NPROC", "MEMLOCK", "RTPRIO", "NICE", "MSGQUEUE"}
    ],
}
# Those with tests of their own, here or where the attribute is given.
_BY_THEMSELVES = {"session keyring", "some resource limits", "cgroup"}


@pytest.fixture(params=["clone3", "popen"], scope="module")
def jobs(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _jobs(request.param)


def _check(jobs: dict[str, Any], row: str, rows: dict[str, Any]) -> None:
    look, wanted, needed = rows[row]
    main = look(jobs["main"])
    if needed is None:
        if main == wanted:
            pytest.skip("the main process could not get another one")
    elif needed is not ... and main != needed:
        pytest.skip(f"the main process could not get {needed}, but has {main}")
    for job in ("first", "second"):
        if row != "user, group" or job == "second":
            assert look(jobs[job]) == wanted


@pytest.mark.parametrize("row", _ROWS)
def test_job_does_not_inherit(jobs: dict[str, Any], row: str) -> None:
    """Whatever the main process has, a job has what the table says."""
    if row == "loginuid" and os.geteuid():
        pytest.skip("only a process with CAP_AUDIT_CONTROL can give its loginuid up")
    _check(jobs, row, _ROWS)


@pytest.mark.parametrize("row", _ISOLATED_ROWS)
def test_job_of_another_user_does_not_inherit(jobs: dict[str, Any], row: str) -> None:
    """Whatever the main process has, a job with a uid of its own has what the table says."""
    if not (can_change_user() and can_kill_any()):
        pytest.skip("needs root")
    _check(jobs, row, _ISOLATED_ROWS)


@pytest.mark.parametrize("row", _KEPT_ROWS)
def test_job_inherits(jobs: dict[str, Any], row: str) -> None:
    """What the operator has taken from the service, a job does not have either."""
    look = _KEPT_ROWS[row]
    if row == "seccomp filters" and "0" in look(jobs["main"]):
        pytest.skip("the main process looks before it takes on a filter")
    assert look(jobs["first"]) == look(jobs["second"]) == look(jobs["main"])


def test_each_job_has_a_session_keyring_of_its_own(jobs: dict[str, Any]) -> None:
    """A job finds neither a key of the main process nor one of another job."""
    main, first, second = (jobs[name] for name in ("main", "first", "second"))
    if main["keyring"] is None or main["keyring"] < 0:
        pytest.skip("no keyrings here")
    assert main["key"]
    assert len({main["keyring"], first["keyring"], second["keyring"]}) == 3
    assert not first["key"]
    assert not second["key"]


def test_no_job_sees_what_another_does_with_its_stdin(jobs: dict[str, Any]) -> None:
    """Flags of the first job's stdin are not those of the second, nor is its lock."""
    assert jobs["second"]["stdin"] == ["/dev/null", 0]
    assert not jobs["second"]["locked"]  # one open file would have the lock already


@pytest.mark.kernel
@pytest.mark.parametrize("way_to_fork", ["clone3", "popen"])
def test_job_cannot_escape_the_oom_killer(way_to_fork: str) -> None:
    """A main process that is exempt passes this on to no job, and no job can lower its value."""
    jobs = _jobs(way_to_fork)
    assert jobs["main"]["oom_score_adj"] == -1000
    _check(jobs, "oom_score_adj", _ROWS)
    assert not jobs["second"]["lowered"]


@pytest.mark.kernel
@pytest.mark.parametrize("way_to_fork", ["clone3", "popen"])
def test_job_is_no_io_flusher(way_to_fork: str) -> None:
    """A job's writes do not pass the bound for what waits for the disk."""
    jobs = _jobs(way_to_fork)
    assert jobs["main"]["io_flusher"] == 1
    _check(jobs, "I/O flusher", _ROWS)


@pytest.mark.kernel
def test_job_of_an_exempt_main_process_is_killed_at_its_memory_limit(base: Path) -> None:
    """The kernel spares processes with -1000, whatever their cgroup's limit is."""
    before = Path("/proc/self/oom_score_adj").read_text()
    Path("/proc/self/oom_score_adj").write_text("-1000")
    try:
        with Worker(enforcement="require", cgroup_root=base) as worker:
            limits = Limits(memory_bytes=32 << 20)
            job_id = worker.start("tail", ["/dev/zero"], limits=limits)
            assert worker.wait(job_id, GUARD_S).end_reason is EndReason.OUT_OF_MEMORY
    finally:
        Path("/proc/self/oom_score_adj").write_text(before)


def test_some_resource_limits_are_lowered(jobs: dict[str, Any]) -> None:
    """Descriptors, processes, locked memory and priorities are bounded for each job."""
    limits = jobs["second"]["rlimits"]
    assert limits["RLIMIT_NOFILE"][0] <= 1024
    assert limits["RLIMIT_NOFILE"][1] <= 65_536
    for name, most in {"NPROC": 8192, "MEMLOCK": 8 << 20, "RTPRIO": 0, "NICE": 0}.items():
        assert 0 <= limits[f"RLIMIT_{name}"][1] <= most
    if can_change_user() and can_kill_any() and not os.path.ismount("/dev/mqueue"):
        assert limits["RLIMIT_MSGQUEUE"] == [0, 0]


def test_table_of_the_documents_has_every_row() -> None:
    """Each row of the table in docs/security.md is tested here, and each test has a row."""
    text = (_HERE / "docs/security.md").read_text()
    table = text.partition("## What a job inherits")[2].partition("\n## ")[0]
    rows = set(re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)) - {"attribute", "---"}
    tested = {*_ROWS, *_ISOLATED_ROWS, *_KEPT_ROWS, *_BY_THEMSELVES}
    assert rows == tested
