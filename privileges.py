"""What this process is allowed to do, and how it gives that up: capabilities(7), prctl(2).

    if can_change_user():
        become_ordinary_user(71_000)    # cannot be undone

Thread safety: the kernel keeps capabilities for each thread. So give them up while the
process has one thread; `become_ordinary_user` refuses to run otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_RESOURCE",
    "PR_SET_CHILD_SUBREAPER",
    "PR_SET_DUMPABLE",
    "PR_SET_NO_NEW_PRIVS",
    "PR_SET_PDEATHSIG",
    "act_as",
    "as_user",
    "become_ordinary_user",
    "can_change_user",
    "can_kill_any",
    "check_can_run_as_others",
    "filter_calls",
    "has_capabilities",
    "keep_capabilities",
    "pass_on_capabilities",
    "pass_on_nothing",
    "prctl",
    "set_process_name",
]

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
_PR_SET_NAME = 15
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
# linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SYS_RESOURCE = 24
_CAPABILITIES = 64  # the highest number there can be, plus one
# Two of struct __user_cap_data_struct, the first with the lower half of each mask: the effective,
# the permitted and the inheritable capabilities.
_CapabilityData = ctypes.c_uint32 * 6
_OF_THIS_THREAD = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)  # struct __user_cap_header_struct

_libc = ctypes.CDLL(None, use_errno=True)


def can_change_user() -> bool:
    """Whether this process may start others as any user: root, or CAP_SETUID and CAP_SETGID."""
    return has_capabilities(CAP_SETUID, CAP_SETGID)


def can_kill_any() -> bool:
    """Whether this process may send signals to processes of other users (CAP_KILL)."""
    return has_capabilities(CAP_KILL)


def check_can_run_as_others(*, has_cgroups: bool) -> None:
    """Raise PermissionError unless this process may start jobs as other users and stop them."""
    if not can_change_user():
        raise PermissionError(
            errno.EPERM, "jobs as other users need root, or CAP_SETUID and CAP_SETGID"
        )
    if not has_cgroups and not can_kill_any():
        raise PermissionError(
            errno.EPERM, "jobs as other users need cgroups, root, or CAP_KILL to be stopped"
        )


def become_ordinary_user(uid: int) -> None:
    """Become the user `uid`, with the group of the same number and no other, for good.

    The process then has no capability and can gain none. Raises OSError; RuntimeError if
    the process has a second thread, because that thread would keep its capabilities.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("privileges can be given up only as long as there is one thread")
    _clear_bounding_set()
    if uid != os.geteuid():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    keep_capabilities()
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)


def keep_capabilities(*capabilities: int, inheritable: bool = False) -> None:
    """Give up every capability except these, and hand none on to executed programs.

    One of `capabilities` that the process does not have is not gained. `inheritable`: children of
    this process, and it itself, can still hand them on: `pass_on_capabilities`. Raises OSError.
    """
    effective, _ = _capabilities()
    kept = sum(1 << each for each in capabilities) & effective
    if inheritable:  # before the bounding set is cleared, because it bounds what can be added
        _set_capabilities(effective, inheritable=kept)
    _clear_bounding_set()
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _set_capabilities(kept, inheritable=kept if inheritable else 0)


def _set_capabilities(effective: int, *, inheritable: int) -> None:
    """Set the effective and permitted ones, and the inheritable ones."""
    words = [(each & 0xFFFF_FFFF, each >> 32) for each in (effective, effective, inheritable)]
    data = _CapabilityData(*(low for low, _ in words), *(high for _, high in words))
    _call_about_capabilities(_libc.capset, data)


def _capabilities() -> tuple[int, int]:
    """Return the effective and the inheritable ones, each as a mask of bits."""
    data = _CapabilityData()
    _call_about_capabilities(_libc.capget, data)
    return data[0] | data[3] << 32, data[2] | data[5] << 32


def _call_about_capabilities(call: Any, data: ctypes.Array[ctypes.c_uint32]) -> None:
    """Call capget(2) or capset(2) for this thread. Raises OSError."""
    if call(_OF_THIS_THREAD, data):
        number = ctypes.get_errno()
        raise OSError(number, f"{call.__name__}: {os.strerror(number)}")


def as_user(uid: int | None, send: Callable[[Any, int], object], process: Any, n: int) -> None:
    """Send a signal with the rights of the user `uid`, who has the right to signal their own jobs.

    This process may have no CAP_KILL. Its real and saved uid stay what they are, so the user
    gets no right over this process.
    """
    if uid is None:
        send(process, n)
        return
    own = os.geteuid()
    os.seteuid(uid)
    try:
        send(process, n)
    finally:
        os.seteuid(own)
        prctl(PR_SET_DUMPABLE, 0)  # a change of the uid resets it


def act_as(uid: int, groups: Sequence[int]) -> None:
    """Have the rights of the user `uid` and of these groups, the user's own first, and no others.

    The real and the saved uid stay those of this process. So no process of the user can stop this
    one by a signal, or trace it. Raises OSError.
    """
    os.setgroups(list(groups))
    os.setresgid(groups[0], groups[0], groups[0])
    os.setresuid(-1, uid, -1)
    keep_capabilities()


def pass_on_capabilities() -> None:
    """Let the program that this process executes next have the capabilities of this process.

    Those are the ones that `keep_capabilities` has kept as `inheritable`. Raises OSError.
    """
    effective, inheritable = _capabilities()
    kept = effective & inheritable
    for capability in range(_CAPABILITIES):  # root gets the inheritable ones without this
        if kept >> capability & 1:
            prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


def pass_on_nothing() -> None:
    """Have no program that this process executes get a capability. Raises OSError."""
    effective, _ = _capabilities()
    _set_capabilities(effective, inheritable=0)


def prctl(option: int, value: int, *more: int) -> None:
    """Call prctl(2). Raises OSError."""
    arguments = [ctypes.c_ulong(each) for each in (value, *more, 0, 0, 0)[:4]]
    if _libc.prctl(option, *arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def filter_calls(rules: Sequence[tuple[int, int, int, int]]) -> None:
    """Have the kernel ask this program of rules at each system call of this thread from now on.

    Each rule has the fields of a `struct sock_filter`: code, jt, jf, k. What this thread forks and
    executes inherits the filter. Needs no_new_privs. Raises OSError.
    Source: seccomp(2).
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in rules))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def set_process_name(name: bytes) -> None:
    """Give this thread a name of up to 15 bytes, which /proc/PID/comm shows."""
    _libc.prctl(_PR_SET_NAME, name)


def has_capabilities(*capabilities: int) -> bool:
    """Whether this process has all of these capabilities."""
    effective, _ = _capabilities()
    return all(effective >> capability & 1 for capability in capabilities)


def _clear_bounding_set() -> None:
    """Let no program that this process executes gain a capability."""
    for capability in range(_CAPABILITIES):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # EINVAL: there are no more. EPERM: this needs CAP_SETPCAP.
            break
