"""What runs on a node of a Slurm cluster around the command of one job.

`slurmjob.py` has srun execute this file's text with the node's Python, so a node needs nothing but
Python 3.9 or newer. The program starts the command, passes on its output and its input, kills all
that is left of the job, and tells the worker how the command ended.

    srun ... --export=JW_0 python3 -I -S -c TEXT

`JW_0`, `JW_1`, ...: the parts of a JSON text, the order: `argv`, `env`, `home` (entered if that is
possible), `directory` (must be enterable) or null, `tmp` (the TMPDIR to make; a dot and the number
of Slurm's job are added, for an Epilog), `stdin` (whether the command has an input), `linger`
(seconds that others may hold the output after the command's end), `require` (limits that the node
must enforce).
stdout: the output of the command, and nothing else. srun makes it a terminal, so the command has a
pipe of its own.
stderr: one line of JSON for each event: `refused` (limits that are not enforced), `failed` (the
errno of `stage`), `started`, `ack` (how many bytes of input the command's pipe has taken),
`closed` (nobody reads the input), `end`.
stdin: frames, each a letter, a length of four bytes and as many bytes: I, input; E, its end; S, a
signal: its number, and 1 if every process is to get it; T, SIGTERM to every process, which may then
go on; A, a question: the answer is an `ack`, also with `received`, the bytes that have come here.
Signals: SIGUSR1 kills the job; SIGUSR2 does what the frame T does. SIGTERM comes from Slurm when it
is going to end the job, and is passed on.

It has the uid of the job. So a job can fake its own report, and no other job's. One thread. It is
the subreaper of the command: whatever loses its parents becomes its child.
Sources: prctl(2), proc(5), cgroups(7), pty(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import sys
import termios
import time
import tty

__all__ = ["cgroups", "enforced", "kill_all", "order", "usage"]

TYPE_CHECKING = False  # `typing` takes time to import
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    Places = dict[str, tuple[str, str]]

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_BYTES = 65536
_CLOSING_S = 0.05
_WRITE_S = 0.1  # how long a write to stdout may block
_ROUNDS = 20
_WAKING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM)
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE)

_libc = ctypes.CDLL(None, use_errno=True)


def report(**event: object) -> None:
    """Write one event to the worker, after a newline: a job may have left a line open there."""
    try:
        os.write(2, b"\n" + json.dumps(event).encode() + b"\n")
    except OSError:
        pass  # srun is gone


def order(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the order that the variables JW_0, JW_1, ... have."""
    parts: list[str] = []
    while f"JW_{len(parts)}" in environment:
        parts.append(environment[f"JW_{len(parts)}"])
    found: dict[str, Any] = json.loads("".join(parts))
    return found


# --- the command ----------------------------------------------------------------------------


def start(work: dict[str, Any], output_fd: int, input_fd: int) -> int:
    """Start the command; return its pid. Raises OSError; its `filename` is the failed stage."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        stage = "start"
        try:
            os.close(read_fd)
            for stage in _become_command(work, output_fd, input_fd):  # noqa: B007 -- the last one
                pass
        except OSError as error:
            os.write(write_fd, json.dumps([stage, error.errno]).encode())
        finally:
            os._exit(127)
    os.close(write_fd)
    problem = os.read(read_fd, 4096)  # written at once; nothing after a successful exec
    os.close(read_fd)
    if problem:
        os.waitpid(pid, 0)
        stage, number = json.loads(problem)
        raise OSError(number, os.strerror(number), stage)
    return pid


def _become_command(work: dict[str, Any], output_fd: int, input_fd: int) -> Iterator[str]:
    """Execute the command. Yields the name of each stage before it is tried. Raises OSError."""
    yield "start"
    os.setsid()
    os.dup2(input_fd, 0)
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_DFL)
        except OSError:
            pass  # the C library's own
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        # If memory is lacking, the kernel is to kill the command and not the process that tells it.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass
    os.chdir("/")
    try:
        os.chdir(os.fsencode(work["home"] or "/"))
    except OSError:
        pass
    if work["directory"] is not None:
        yield "enter"
        os.chdir(os.fsencode(work["directory"]))
    yield "exec"
    env = {os.fsencode(key): os.fsencode(value) for key, value in work["env"].items()}
    argv = [os.fsencode(each) for each in work["argv"]]
    paths = [argv[0]]
    if b"/" not in argv[0]:
        places = env.get(b"PATH", b"/usr/bin:/bin").split(b":")
        paths = [os.path.join(each, argv[0]) for each in places]
    problem = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for path in paths:
        try:
            os.execve(path, argv, env)
        except OSError as error:
            # The error of a file that exists tells more than that of files that do not.
            if problem.errno in (errno.ENOENT, errno.ENOTDIR):
                problem = error
    raise problem


# --- its processes --------------------------------------------------------------------------


def descendants() -> dict[int, bool]:
    """Return the living processes that come of this one, as {pid: whether it is about to end}."""
    parents = {}
    ending = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] not in (b"Z", b"X") or int(fields[17]) > 1:  # it has other threads
                parents[int(name)] = int(fields[1])
                if int(fields[6]) & 4:  # PF_EXITING
                    ending.add(int(name))
    found: dict[int, bool] = {}
    new = [os.getpid()]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new and pid not in found]
        found.update((pid, pid in ending) for pid in new)
    return found


def send_all(*numbers: int) -> None:
    """Send signals to every process of the job."""
    for pid in descendants():
        for number in numbers:
            _send(pid, number)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass


def kill_all() -> int:
    """Kill every process of the job; return how many were not about to end by themselves."""
    killed: set[int] = set()
    count = 0
    for _ in range(_ROUNDS):
        found = {pid: ends for pid, ends in descendants().items() if pid not in killed}
        if not found:
            break
        for pid in found:
            _send(pid, signal.SIGSTOP)  # so that none forks while its parent is killed
        killed.update(found)
        count += sum(not ends for ends in found.values())
    for pid in killed:
        _send(pid, signal.SIGKILL)
    return count


def cgroups() -> Places:
    """Return the directories of this process's cgroups, by controller; "" for those of v2."""
    mounts: dict[str, str] = {}
    with open("/proc/self/mounts") as file:
        for line in file:
            _, point, kind, options = line.split()[:4]
            if kind == "cgroup2":
                mounts.setdefault("", point)
            elif kind == "cgroup":
                for option in options.split(","):
                    mounts.setdefault(option, point)
    found = {}
    with open("/proc/self/cgroup") as file:
        for line in file:
            _, names, path = line.rstrip("\n").split(":", 2)
            for name in names.split(","):
                if name in mounts:
                    found[name] = (mounts[name], path.strip("/"))
    return found


def read_up(place: tuple[str, str], name: str) -> Iterator[str]:
    """Yield the text of a file of a cgroup, and of those above it."""
    point, path = place
    while True:
        try:
            with open(os.path.join(point, path, name)) as file:
                yield file.read()
        except OSError:
            pass
        if not path:
            return
        path = os.path.dirname(path)


def _least(places: Places, *files: tuple[str, str]) -> int | None:
    """Return the lowest number that a file of these cgroups has; None if none limits."""
    found = []
    for controller, name in files:
        if controller in places:
            for text in read_up(places[controller], name):
                if text.strip().isdigit() and int(text) < 1 << 62:
                    found.append(int(text))
    return min(found) if found else None


def enforced(places: Places) -> dict[str, float]:
    """Return the limits that this node enforces on the job, as fields of `Limits`."""
    cores = len(os.sched_getaffinity(0))
    limits: dict[str, float | None] = {
        "cpu_cores": cores if cores < (os.cpu_count() or 1) else None,
        "memory_bytes": _least(places, ("memory", "memory.limit_in_bytes"), ("", "memory.max")),
        "swap_bytes": _least(places, ("", "memory.swap.max")),
        "pids": _least(places, ("pids", "pids.max"), ("", "pids.max")),
    }
    names = {"rbps": "io_read_bps", "wbps": "io_write_bps"}
    names.update({"riops": "io_read_iops", "wiops": "io_write_iops"})
    for text in read_up(places[""], "io.max") if "" in places else ():
        for word in text.split():
            key, _, value = word.partition("=")
            if key in names and value.isdigit():
                limits.setdefault(names[key], int(value))
    return {name: value for name, value in limits.items() if value is not None}


def oom_kills(places: Places) -> int | None:
    """Return how many processes of the job the kernel killed because memory was lacking."""
    for controller, name in (("memory", "memory.oom_control"), ("", "memory.events")):
        if controller in places:
            for text in read_up(places[controller], name):
                for line in text.splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
                break
    return None


def usage(places: Places) -> dict[str, Any]:
    """Return what the job has used."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    peaks = ("memory", "memory.max_usage_in_bytes"), ("", "memory.peak")
    texts = [next(read_up(places[key], name), "") for key, name in peaks if key in places]
    peak = max((int(text) for text in texts if text.strip().isdigit()), default=0)
    found: dict[str, Any] = {"cpu_user_s": spent.ru_utime, "cpu_system_s": spent.ru_stime}
    found["memory_peak_bytes"] = peak or spent.ru_maxrss * 1024
    found["oom_kills"] = oom_kills(places)
    return found


class Step:
    """The job from its start to its end."""

    def __init__(self, work: dict[str, Any], places: Places) -> None:
        self.work = work
        self.places = places
        self.kills_before = oom_kills(places) or 0
        self.leader = 0
        self.status: int | None = None  # of the leader, when it has ended
        self.bytes = 0  # of output that stdout has taken
        self.pending = b""  # output that stdout has not taken yet
        self.output_fd = self.input_fd = -1
        self.has_output = self.has_stdin = True  # there may be more
        self.is_killed = self.is_terminated = False  # while the leader lived
        self.is_cancelled = False  # by Slurm
        self.deadline: float | None = None  # when what is left is killed
        self.killed = 0
        self.input = b""
        self.input_bytes = 0
        self.input_ends = False
        self.frames = b""

    def begin(self) -> None:
        """Start the command. Raises OSError."""
        output_fd, their_output = os.pipe()
        if self.work["stdin"]:
            their_input, self.input_fd = os.pipe()
            os.set_blocking(self.input_fd, False)
        else:
            their_input = os.open(os.devnull, os.O_RDONLY)
        try:
            self.leader = start(self.work, their_output, their_input)
        finally:
            os.close(their_output)
            os.close(their_input)
        os.set_blocking(output_fd, False)
        self.output_fd = output_fd

    def run(self, wake_fd: int) -> None:
        """Look after the job until none of its processes lives and all its output is passed on."""
        os.set_blocking(0, False)
        while self.status is None or self.pending or not self.is_alone():
            ready = self.await_something(wake_fd)
            if wake_fd in ready:
                for number in os.read(wake_fd, 4096):
                    self.take_signal(number)
            if 0 in ready:
                self.has_stdin = self.take_frames()
            if self.input_fd in ready:
                self.give_input(ready[self.input_fd])
            if self.output_fd in ready and not self.move():
                self.has_output = False
                if self.status is not None and not self.is_terminated:
                    self.set_deadline(_CLOSING_S)
            if 1 in ready:
                self.pass_on()
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self.kill()

    def await_something(self, wake_fd: int) -> dict[int, int]:
        """Block until a descriptor is ready or what is left is to be killed."""
        poll = select.poll()
        poll.register(wake_fd, select.POLLIN)
        if self.pending:
            poll.register(1, select.POLLOUT)
        elif self.has_output:
            poll.register(self.output_fd, select.POLLIN)
        if self.has_stdin:
            poll.register(0, select.POLLIN)
        if self.input_fd >= 0:
            poll.register(self.input_fd, select.POLLOUT if self.input else 0)
        due = self.deadline
        return dict(poll.poll(None if due is None else max(0.0, due - time.monotonic()) * 1000))

    def is_alone(self) -> bool:
        """Reap what has ended; whether no other process is left."""
        self.reap()
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        return False

    def take_signal(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.is_killed = self.is_killed or self.status is None
            self.kill()
        elif number == signal.SIGUSR2:
            self.is_terminated = self.is_terminated or self.status is None
            self.deadline = None
            send_all(signal.SIGTERM, signal.SIGCONT)
        elif number == signal.SIGTERM:
            self.is_cancelled = self.is_cancelled or self.status is None
            send_all(signal.SIGTERM, signal.SIGCONT)  # Slurm sends it to our process group only
        self.reap()

    def kill(self) -> None:
        killed = kill_all()
        if self.status is not None and not (self.is_killed or self.is_terminated):
            self.killed += killed
        self.deadline = None

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.leader and self.status is None:
                self.status = status
                if not self.is_terminated:
                    self.set_deadline(self.work["linger"])

    def set_deadline(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.deadline = until if self.deadline is None else min(until, self.deadline)

    def move(self) -> bool:
        """Take output from the command's pipe; False at its end."""
        try:
            self.pending = os.read(self.output_fd, _BYTES)
        except BlockingIOError:
            return True
        if not self.pending:
            return False
        self.pass_on()
        return True

    def pass_on(self) -> None:
        # A terminal takes some 4 KiB at a time: a blocking write saves most system calls. A signal
        # ends it, and the alarm if the signal comes right before: see `_interrupt_write`.
        signal.setitimer(signal.ITIMER_REAL, _WRITE_S, _WRITE_S)
        os.set_blocking(1, True)
        try:
            size = os.write(1, self.pending)
        except BlockingIOError:
            return
        except OSError:
            size = len(self.pending)  # srun is gone, and nobody will ask
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.bytes += size
        self.pending = self.pending[size:]

    def drain(self) -> None:
        """Pass on what is in the command's pipe; no process can write more."""
        answer = fcntl.ioctl(self.output_fd, termios.FIONREAD, bytes(4))
        left = int.from_bytes(answer, sys.byteorder)
        while self.pending or left > 0:
            if self.pending:
                self.pass_on()
            else:
                self.pending = os.read(self.output_fd, min(left, _BYTES))
                left -= len(self.pending)
                if not self.pending:
                    return

    def take_frames(self) -> bool:
        """Read from the worker; False at the end."""
        try:
            data = os.read(0, _BYTES)
        except OSError as error:
            return isinstance(error, BlockingIOError)
        self.frames += data
        while len(self.frames) >= 5:
            end = 5 + int.from_bytes(self.frames[1:5], "big")
            if len(self.frames) < end:
                break
            self.take_frame(self.frames[:1], self.frames[5:end])
            self.frames = self.frames[end:]
        self.end_input()
        return bool(data)

    def take_frame(self, kind: bytes, body: bytes) -> None:
        if kind == b"I":
            self.input += body
        elif kind == b"E":
            self.input_ends = True
        elif kind == b"T":
            self.take_signal(signal.SIGUSR2)
        elif kind == b"A":
            report(event="ack", bytes=self.input_bytes, received=self.input_bytes + len(self.input))
        elif kind == b"S":
            number, everything = body
            if everything:
                send_all(number)
            elif self.status is None:
                _send(self.leader, number)

    def give_input(self, events: int) -> None:
        if events & select.POLLERR:
            report(event="closed")
            self.input = b""
            self.input_ends = True
        elif self.input:
            try:
                size = os.write(self.input_fd, self.input)
            except OSError:
                return  # it is full, or the next poll says POLLERR
            self.input = self.input[size:]
            self.input_bytes += size
            report(event="ack", bytes=self.input_bytes)
        self.end_input()

    def end_input(self) -> None:
        if self.input_ends and not self.input and self.input_fd >= 0:
            os.close(self.input_fd)
            self.input_fd = -1

    def end(self) -> None:
        """Report the end."""
        used = usage(self.places)
        if used["oom_kills"] is not None:
            used["oom_kills"] -= self.kills_before
        status = self.status or 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        report(
            event="end",
            exit_code=code,
            signal=os.WTERMSIG(status) if code is None else None,
            bytes=self.bytes,
            is_killed=self.is_killed,
            is_terminated=self.is_terminated,
            is_cancelled=self.is_cancelled,
            killed=self.killed,
            usage=used,
        )


def _interrupt_write(*_: object) -> None:
    """Have a write to stdout that is blocked fail with EAGAIN when Python repeats it."""
    os.set_blocking(1, False)


def _clean(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            import shutil  # here, because it takes time that most jobs do not need

            shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    """Run the job that the environment describes."""
    wake_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in _WAKING:
        signal.signal(number, _interrupt_write)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.isatty(1):
        tty.setraw(1)  # it passes on each byte as it is
    work = order(os.environ)
    places = cgroups()
    limits = enforced(places)
    asked = work["require"]
    missing = [name for name in asked if limits.get(name, asked[name] + 1) > asked[name]]
    if missing:
        report(event="refused", missing=missing)
        return
    os.umask(0o077)
    tmp = used = f"{work['tmp']}.{os.environ.get('SLURM_JOB_ID', '')}"
    try:
        os.mkdir(tmp)
    except OSError:
        used = "/tmp"  # noqa: S108
    if work["env"].get("TMPDIR") == work["tmp"]:
        work["env"]["TMPDIR"] = used
    step = Step(work, places)
    try:
        try:
            step.begin()
        except OSError as error:
            report(event="failed", stage=error.filename or "start", errno=error.errno)
            return
        report(
            event="started",
            node=os.environ.get("SLURMD_NODENAME", ""),
            id=os.environ.get("SLURM_JOB_ID", ""),
            limits=limits,
        )
        step.run(wake_fd)
        step.drain()
        step.end()
    finally:
        _clean(tmp)


if __name__ == "__main__":
    main()
