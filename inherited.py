"""What a job must not inherit from the fork server: keys, priorities, signals, the OOM score.

The fork server calls `set_signals`, `reset` and `refuse_splice` once, before it forks. These change
what is the same for all jobs. Each leader calls `separate` once. This gives a job what no other job
may share. docs/security.md has the whole table: every attribute that fork and exec preserve
(credentials(7), execve(2)), and what a job gets of it.

The rule: a job does not inherit an attribute that gives it something (a key, a priority, somebody's
name). It does inherit one by which the operator takes something from the service and from all that
runs in it (a seccomp filter, a CPU set, an idle priority).

Thread safety: to be called in a process with one thread; most attributes belong to a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal

from privileges import CAP_SYS_RESOURCE, filter_calls, has_capabilities, prctl

__all__ = [
    "OOM_SCORE_ADJ",
    "oom_exemption",
    "refuse_splice",
    "reset",
    "separate",
    "set_signals",
]

OOM_SCORE_ADJ = 500
"""The oom_score_adj of jobs. The kernel's OOM killer counts it as half of the memory that there is,
in addition to what the job uses. So it kills jobs before this program."""

_PR_SET_SECUREBITS = 28
_PR_SET_IO_FLUSHER = 57
_PR_SET_MEMORY_MERGE = 67
_KEYCTL_JOIN_SESSION_KEYRING = 1
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_SHIFT, _IOPRIO_CLASS_RT = 1, 13, 1
_PERSONALITY_QUERY = 0xFFFF_FFFF
_NO_LOGINUID = b"4294967295"
# System calls without a function in the C library, or in some: keyctl, ioprio_set, ioprio_get, tee.
_NUMBERS = {
    "x86_64": (250, 251, 252, 276),
    "aarch64": (219, 30, 31, 77),
    "riscv64": (219, 30, 31, 77),
}.get(os.uname().machine)
# splice, for each ABI that a program can use on one of these: linux/audit.h, asm/unistd.h.
_SPLICE = (
    (0xC000_003E, 275),  # x86_64
    (0xC000_003E, 0x4000_0000 | 275),  # x32
    (0x4000_0003, 313),  # i386
    (0xC000_00B7, 76),  # aarch64
    (0x4000_0028, 340),  # arm
    (0xC000_00F3, 76),  # riscv64
)
# linux/seccomp.h and linux/bpf_common.h: rules for `filter_calls`.
_NUMBER_AT, _ABI_AT = 0, 4  # in struct seccomp_data
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_REFUSE, _ALLOW = 0x0005_0000, 0x7FFF_0000

_libc = ctypes.CDLL(None, use_errno=True)
# Made once and not by each leader: what a leader makes costs it copies of memory pages.
_JOIN_NEW_KEYRING = _NUMBERS and (
    *(ctypes.c_long(each) for each in (_NUMBERS[0], _KEYCTL_JOIN_SESSION_KEYRING)),
    None,
)


def set_signals() -> None:
    """Unblock every signal, and give each its default disposition, for this process and jobs.

    A few signals get a handler that does nothing, because a service manager sends SIGTERM to
    every process at once while only the main process's death may end this one. An exec resets
    a handler to the default; it would not reset an ignored signal. Two signals below SIGRTMIN
    stay as they are: they are the C library's own, and it lets nobody set them.
    """
    handled = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE}
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, _wake if number in handled else signal.SIG_DFL)
    # Last, because a signal that waits must find its handler.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _wake(signum: int, frame: object) -> None:
    """Do nothing: the interpreter has written a byte to the wake-up descriptor."""


def reset() -> None:
    """Give up what no job may inherit; for the fork server, while it still has all its rights."""
    # A key of the session keyring can be read by everybody who has inherited the keyring.
    _join_new_keyring()
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with contextlib.suppress(OSError):  # EPERM: they are locked, or this needs CAP_SETPCAP
        # With SECBIT_NO_SETUID_FIXUP a leader would keep capabilities until the exec.
        prctl(_PR_SET_SECUREBITS, 0)
    _leave_real_time_io()
    if _libc.personality(ctypes.c_ulong(_PERSONALITY_QUERY)) > 0:
        _libc.personality(ctypes.c_ulong(0))  # no address space randomization, for example
    for option in (_PR_SET_MEMORY_MERGE, _PR_SET_IO_FLUSHER):
        # EINVAL before Linux 6.4 and 5.6. EPERM: this needs CAP_SYS_RESOURCE.
        with contextlib.suppress(OSError):
            prctl(option, 0)
    # In the kernel's audit log a job must not appear as the person who started this program. This
    # needs CAP_AUDIT_CONTROL, and a kernel with auditing.
    with contextlib.suppress(OSError):
        _write("/proc/self/loginuid", _NO_LOGINUID)


def separate(*, is_alone: bool) -> None:
    """Take what each job must have for itself.

    For a leader that still has the rights of the fork server. `is_alone`: the job runs as a user
    of its own. Raises OSError.
    """
    # Opened anew, because jobs with one open file share its status flags, offset and locks.
    null_fd = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null_fd, 0)
    os.close(null_fd)
    try:
        _join_new_keyring()
    except OSError as error:
        # EDQUOT: an ordinary user may have 200 keys. Jobs of one user may then share a keyring:
        # that of the fork server, which is new.
        if is_alone or error.errno != errno.EDQUOT:
            raise
    # The kernel does not let an ordinary process go below what a process with CAP_SYS_RESOURCE has
    # set. Without that capability a job can go back to the fork server's own value.
    with contextlib.suppress(PermissionError):  # a fork server with another user's capabilities
        _write("/proc/self/oom_score_adj", str(OOM_SCORE_ADJ).encode())


def refuse_splice() -> None:
    """Refuse splice(2) to this process, and so to jobs, if a filter refuses tee(2) to the service.

    With either call a job can keep the kernel's lock of its pipe. The main process needs splice(2)
    for jobs that go on without it, so a filter of the whole service cannot refuse that call.
    The errno is EINVAL, which the kernel has for files that cannot be spliced. Programs then read
    and write instead; those in Go do so after no other errno. For a process with no_new_privs.
    Raises OSError.
    """
    if _NUMBERS is None or _permits_tee() or not _permits_splice():
        return
    rules = [
        rule
        for abi, number in _SPLICE
        for rule in (
            (_LOAD, 0, 0, _ABI_AT),
            (_IF_EQUAL, 0, 3, abi),
            (_LOAD, 0, 0, _NUMBER_AT),
            (_IF_EQUAL, 0, 1, number),
            (_RETURN, 0, 0, _REFUSE | errno.EINVAL),
        )
    ]
    rules.append((_RETURN, 0, 0, _ALLOW))
    filter_calls(rules)


def _permits_tee() -> bool:
    _call(3, -1, -1, 1, 0)
    return ctypes.get_errno() == errno.EBADF


def _permits_splice() -> bool:
    """False also if this process has refused it to itself, and then executed its program anew."""
    try:
        os.splice(-1, -1, 1)
    except OSError as error:
        return error.errno == errno.EBADF
    return True


def oom_exemption() -> str:
    """Return why jobs could escape the OOM killer; "" if they cannot."""
    with open("/proc/self/oom_score_adj", "rb") as file:
        value = int(file.read())
    if value >= 0 or has_capabilities(CAP_SYS_RESOURCE):
        return ""
    return (
        f"this process has oom_score_adj {value}, and not CAP_SYS_RESOURCE: each job could set the "
        "same for itself, and the kernel would rather kill others"
    )


def _join_new_keyring() -> None:
    """Replace the session keyring by a new, empty one. Raises OSError."""
    # EPERM: a seccomp filter refuses it, as in the unit and in Docker; then it refuses a job, too.
    # ENOSYS: the kernel has no keys.
    if _JOIN_NEW_KEYRING and _libc.syscall(*_JOIN_NEW_KEYRING) < 0:
        number = ctypes.get_errno()
        if number not in (errno.EPERM, errno.ENOSYS):
            raise OSError(number, os.strerror(number))


def _leave_real_time_io() -> None:
    if _call(2, _IOPRIO_WHO_PROCESS, 0) >> _IOPRIO_CLASS_SHIFT == _IOPRIO_CLASS_RT:
        _call(1, _IOPRIO_WHO_PROCESS, 0, 0)


def _call(which: int, *arguments: int) -> int:
    """Make one of the system calls of _NUMBERS; -1 with ENOSYS on other architectures."""
    if _NUMBERS is None:
        ctypes.set_errno(errno.ENOSYS)
        return -1
    return int(_libc.syscall(ctypes.c_long(_NUMBERS[which]), *map(ctypes.c_long, arguments)))


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
