"""A leader from its fork to the exec of its command.

Two functions fork. `clone` uses clone3(2), and the process is born in its job's cgroup. `popen`
is for where clone3 is refused, as in most containers: there `subprocess.Popen` forks, and its
`preexec_fn` moves the process into the cgroup. From there on both ways are the same
(`wait_and_execute`): the process detaches itself from the fork server, rehearses its exec, and
waits on a socket for the program. It reports errors on that socket; a successful exec closes it.
`inherited.py` has what fork and exec would pass on to a job.

    pid, pidfd = clone(cgroup_fd, functools.partial(wait_and_execute, sock, stdout_fd, None, ours))

Thread safety: to be called in a process with one thread, because another thread could hold a
lock that the forked process waits for.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pwd
import resource
import select
import signal
import subprocess
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import inherited
from errors import look_at
from estate import note_failure
from messages import (
    AttachError,
    EnterError,
    ExecError,
    close_all,
    failure,
    receive,
    send,
    wait_ready,
)
from privileges import PR_SET_PDEATHSIG, pass_on_nothing, prctl

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

__all__ = [
    "JOB_DESCRIPTORS",
    "Grants",
    "Program",
    "become",
    "clone",
    "clone_works",
    "detach",
    "execute",
    "groups_of",
    "limit",
    "popen",
    "wait_and_execute",
]

JOB_DESCRIPTORS = 1024, 65_536
"""The soft and hard limit of a job's open descriptors; the fork server itself needs more."""

_MAX_PROGRAM_BYTES = 4 * 1024 * 1024  # argv and environment; execve(2) takes less

# linux/sched.h. System calls as new as these have the same number on every architecture.
_SYS_CLONE3 = 435
_SYS_CLOSE_RANGE = 436
_CLONE_PIDFD = 0x1000
_CLONE_INTO_CGROUP = 0x2_0000_0000
_NO_FD = 0x7FFF_FFFF  # larger than any open descriptor can be
_LAST_FD = 0xFFFF_FFFF

_libc = ctypes.CDLL(None, use_errno=True)


def clone_works() -> bool:
    """Whether clone3(2) can fork into a cgroup: since Linux 5.7, unless a filter refuses it."""
    try:
        pid, _ = _clone3(_NO_FD)
    except OSError as error:
        return error.errno == errno.EBADF  # everything else about the call was accepted
    if pid == 0:
        os._exit(0)
    return True


def clone(cgroup_fd: int | None, child: Callable[[int | None], NoReturn]) -> tuple[int, int]:
    """Fork a process that is born in the cgroup and runs `child`; return its pid and a pidfd.

    The pidfd is valid even if the process has ended by then. Raises OSError.
    """
    try:
        pid, pidfd = _clone3(cgroup_fd)
    except OSError as error:
        if cgroup_fd is None or error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE):
            raise
        raise AttachError(error.errno, error.strerror) from error
    if pid == 0:
        child(None)
    return pid, pidfd


def _clone3(cgroup_fd: int | None) -> tuple[int, int]:
    """Return the child's pid and a pidfd; 0 in the child. Raises OSError.

    Neither Python nor the C library does in this child what it does after fork(2). That is
    safe because this process has one thread and the child soon executes a program.
    """
    pidfd = ctypes.c_int(-1)
    flags = _CLONE_PIDFD | (0 if cgroup_fd is None else _CLONE_INTO_CGROUP)
    # flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
    # set_tid_size, cgroup
    arguments = (ctypes.c_uint64 * 11)(
        flags, ctypes.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, cgroup_fd or 0
    )
    pid = _libc.syscall(
        ctypes.c_long(_SYS_CLONE3), arguments, ctypes.c_size_t(ctypes.sizeof(arguments))
    )
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return pid, pidfd.value


def popen(cgroup_fd: int | None, child: Callable[[int | None], NoReturn]) -> tuple[int, int]:
    """Do what `clone` does, where clone3 is refused.

    Popen waits for the exec by reading from a pipe. `child` closes that pipe when it detaches
    itself, so Popen returns then, and `child` itself executes the program later. Raises OSError.
    """
    procs_fd = None
    if cgroup_fd is not None:
        # The kernel checks the rights of whoever opened this file, not of whoever writes.
        try:
            procs_fd = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup_fd)
        except OSError as error:
            raise AttachError(error.errno, error.strerror) from error
    try:
        process = subprocess.Popen(
            ["/"],  # never executed
            close_fds=False,  # `child` does that
            # This process has one thread. So no other thread can hold a lock in the child.
            preexec_fn=lambda: child(procs_fd),  # noqa: PLW1509
        )
    finally:
        if procs_fd is not None:
            os.close(procs_fd)
    try:
        # Valid even if the process has ended by now, because only this thread reaps it.
        pidfd = os.pidfd_open(process.pid)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = 0  # so that Popen does not wait for it
    return process.pid, pidfd


class Grants(NamedTuple):
    """What the main process may ask of a leader; fixed when the fork server starts."""

    uids: range | None  # the users that jobs run as; None if they run as ours
    homes: str | None = None  # a directory of ours, in which homes of these users are made
    tmp: str | None = None  # the job's TMPDIR, which becomes the user's
    host_accounts: bool = False  # whether jobs have the groups of the host's accounts
    failures_fd: int = -1  # for `estate.note_failure`; -1 if nobody wants to know


class Program(NamedTuple):
    """What a process is to execute."""

    argv: list[bytes]
    env: dict[bytes, bytes]
    paths: list[bytes]  # of the file, in the order in which they are tried
    uid: int | None
    home: bytes | None = None  # entered first, if the user may
    directory: bytes | None = None  # entered next; if that fails, the program is not executed
    groups: Sequence[int] = ()  # the user's own first; none for the one with the user's number


def wait_and_execute(
    sock: socket.socket, stdout_fd: int, grants: Grants, parent: int, procs_fd: int | None
) -> NoReturn:
    """Wait for a program on `sock` and execute it.

    `parent`: the pid of the fork server. `procs_fd`: the open cgroup.procs of the cgroup to
    enter; None when this process is there already.
    """
    try:
        try:
            kept_fds = [sock.fileno(), grants.failures_fd, -1 if procs_fd is None else procs_fd]
            detach(stdout_fd, [fd for fd in kept_fds if fd >= 0])
            if procs_fd is not None:
                _attach(procs_fd)
            inherited.separate(is_alone=grants.uids is not None)
            if grants.failures_fd >= 0:
                pass_on_nothing()
            tmp_fd = _open_tmp(grants)
            if not wait_ready(sock.fileno(), select.POLLIN, 0):
                _rehearse(grants, tmp_fd)
            # The fork server may die while this process waits, or have died before the prctl.
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                program = _receive_program(sock, grants.uids)
                if program.uid is not None and grants.host_accounts:
                    program = program._replace(groups=groups_of(program.uid))
                _furnish(program, grants, tmp_fd)
                execute(program)
        except BaseException as error:  # noqa: BLE001 -- nothing may return to the fork server's loop
            note_failure(grants.failures_fd)
            send(sock, failure(error))
    finally:
        os._exit(127)


def detach(stdout_fd: int, kept_fds: Sequence[int]) -> None:
    """Lead a session, write to `stdout_fd`, and close all other descriptors but `kept_fds`.

    An exec can hang, on a network filesystem for example. No other job's descriptor may be
    open here meanwhile. Before Linux 5.9, which has no close_range, they are open until the exec.
    """
    signal.set_wakeup_fd(-1)  # it is the fork server's pipe
    os.dup2(stdout_fd, 1)
    os.dup2(stdout_fd, 2)
    first = 3
    for last in (*(fd - 1 for fd in sorted(kept_fds)), _LAST_FD):
        _libc.syscall(
            ctypes.c_long(_SYS_CLOSE_RANGE),
            ctypes.c_uint(first),
            ctypes.c_uint(last),
            ctypes.c_uint(0),
        )
        first = last + 2
    os.setsid()


def _attach(procs_fd: int) -> None:
    try:
        os.write(procs_fd, b"0")
    except OSError as error:
        raise AttachError(error.errno, error.strerror) from error
    os.close(procs_fd)


def _rehearse(grants: Grants, tmp_fd: int | None) -> None:
    """Do all that the real execution will do, except what cannot be done twice.

    The first write to a memory page shared with the fork server copies that page. After the
    rehearsal, some 200 pages have been copied, which takes longer than the rest of a start.
    """
    here = f"{grants.homes or ''}/."
    work = {"argv": ["/"], "env": {"A": "B"}, "uid": None, "home": here, "directory": "/"}
    program = _parse_program(json.dumps(work).encode(), None)
    with contextlib.suppress(OSError):  # EACCES: "/" is a directory
        _furnish(program._replace(uid=-1), grants, tmp_fd)  # to -1, chown(2) changes nothing
        execute(program)


def _open_tmp(grants: Grants) -> int | None:
    """Open the job's TMPDIR if it has to change its owner. Raises OSError."""
    if grants.uids is None or grants.tmp is None:
        return None
    # The main process can put a link in its place, and we have rights that it has not.
    return os.open(grants.tmp, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _furnish(program: Program, grants: Grants, tmp_fd: int | None) -> None:
    """Give the job's user a TMPDIR and, if it is missing, a home. Raises OSError."""
    if program.uid is None:
        return
    if tmp_fd is not None:
        os.fchown(tmp_fd, program.uid, program.groups[0] if program.groups else program.uid)
    home = program.home and os.fsdecode(program.home)
    if grants.homes and home and os.path.dirname(home) == grants.homes:
        name = os.path.basename(home)
        # Without room for a home the job begins in /.
        if not os.path.lexists(home) and name not in {"", ".", ".."}:
            with contextlib.suppress(OSError):
                _make_home(home, f"{grants.homes}/.new-{os.getpid()}", program.uid)


def _make_home(home: str, new: str, uid: int) -> None:
    """Make a home at once: whoever finds it finds that it belongs to its user. Raises OSError.

    The directory that they are in belongs to us, and nobody else can write there.
    """
    try:
        os.mkdir(new, 0o700)
    except FileExistsError:
        # A process with this pid has left it, because it was killed here. The directory may belong
        # to another user by then. If that user has put something into it, the rmdir fails.
        os.rmdir(new)
        os.mkdir(new, 0o700)
    try:
        os.chown(new, uid, uid, follow_symlinks=False)
        os.rename(new, home)
    except OSError:  # another job of the user was first
        os.rmdir(new)
        raise


def _receive_program(sock: socket.socket, uids: range | None) -> Program:
    """Wait for the program, for the job's stdin if it is not to be /dev/null, and for its stderr.

    Raises EOFError if no program comes, or as `_parse_program` does.
    """
    _, fds = receive(sock)
    try:
        fd, *others = fds  # stdin, or stdin and stderr
        for number, other_fd in zip((0, 2)[: len(others)], others, strict=True):
            os.dup2(other_fd, number)
        size = os.fstat(fd).st_size
        if size > _MAX_PROGRAM_BYTES:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        return _parse_program(os.pread(fd, size, 0), uids)
    finally:
        close_all(fds)


def _parse_program(data: bytes, uids: range | None) -> Program:
    """Raises OSError, ValueError, TypeError, LookupError."""
    program = json.loads(data)
    uid = program["uid"]
    # The type matters: a range contains floats, too.
    if not (uid is None if uids is None else type(uid) is int and uid in uids):
        raise PermissionError(errno.EPERM, "not one of the users named at the start")
    argv = [os.fsencode(argument) for argument in program["argv"]]
    env = {os.fsencode(name): os.fsencode(value) for name, value in program["env"].items()}
    if not argv or any(b"\0" in each for each in (*argv, *env, *env.values())):
        raise ValueError("argv is empty, or a NUL character is in it or in the environment")
    if any(b"=" in name for name in env):
        raise ValueError("a variable's name contains an equals sign")
    if b"/" in argv[0]:
        paths = [argv[0]]
    else:
        path = env.get(b"PATH", os.fsencode(os.defpath))
        paths = [os.path.join(each, argv[0]) for each in path.split(b":")]
    home, directory = (
        os.fsencode(path) if (path := program.get(name)) else None for name in ("home", "directory")
    )
    return Program(argv, env, paths, uid, home, directory)


def execute(program: Program) -> NoReturn:
    """Become the program's user, and execute the first of its paths that can be.

    Raises OSError; `ExecError` with the errno that execvp(3) would set.
    """
    if program.uid is not None:
        become(program.uid, program.groups)
    # If the fork server dies, a main process without rights cannot kill a job of another user.
    # A main process with rights kills the job's group, and needs a living leader for that.
    prctl(PR_SET_PDEATHSIG, 0 if program.uid is None else signal.SIGKILL)
    limit(resource.RLIMIT_NOFILE, *JOB_DESCRIPTORS)
    _enter(program)
    problem = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for path in program.paths:
        try:
            os.execve(path, program.argv, program.env)
        except OSError as error:
            # The error of a file that exists tells more than that of files that do not.
            if problem.errno in (errno.ENOENT, errno.ENOTDIR):
                problem = error
    # Only the job's user can see what is in a home, for example.
    failed = ExecError(problem.errno, problem.strerror)
    failed.found = look_at(program.argv[0])
    raise failed from problem


def _enter(program: Program) -> None:
    """Enter the program's directory. This process is the program's user by now."""
    if program.home is not None:
        with contextlib.suppress(OSError):  # the process is in /, and begins there
            os.chdir(program.home)
    if program.directory is not None:
        try:
            os.chdir(program.directory)
        except OSError as error:
            raise EnterError(error.errno, error.strerror) from error


def groups_of(uid: int) -> list[int]:
    """Return the groups of the host's account of that uid, its own first. Raises OSError.

    The main process does not say which groups a job has: it could name those of root.
    """
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        raise PermissionError(errno.EPERM, "the host has no account of this uid") from None
    others = os.getgrouplist(account.pw_name, account.pw_gid)
    return [account.pw_gid, *(each for each in others if each != account.pw_gid)]


def become(uid: int, groups: Sequence[int] = ()) -> None:
    """Become the user `uid`. Raises OSError.

    `groups`: the user's groups, the user's own first; default: only the one of the same number.
    """
    gid = groups[0] if groups else uid
    os.setgroups(list(groups))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def limit(kind: int, soft: int, hard: int) -> None:
    """Lower a limit; never raise it."""
    _, most = resource.getrlimit(kind)
    lower = hard if most == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(kind, (min(soft, lower), lower))
