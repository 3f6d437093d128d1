"""Tasks that take long: the fork server forks a process for each, and goes on meanwhile.

    child = functools.partial(clear_up, sock, uid, groups, None, os.getpid())
    pid, pidfd = clone(None, child)

Such a process has the rights of a user and no more. Another job of this user cannot stop it by a
signal (`act_as`). It ends with the fork server.

Thread safety: `clear_up` and `signal_all` are for a forked process, and never return.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
from typing import TYPE_CHECKING, NoReturn

import inherited
from cgroupfs import signal_tree, terminate_tree
from leader import detach
from leftovers import clear, clear_directory
from messages import failure, send, wait_ready
from privileges import PR_SET_PDEATHSIG, act_as, prctl

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

__all__ = ["clear_up", "signal_all", "signal_cgroup"]


def clear_up(
    sock: socket.socket,
    uid: int | None,
    groups: Sequence[int],
    tmp: str | None,
    parent: int,
    _: int | None,
) -> NoReturn:
    """Remove what the jobs of a user have left, until the other end of `sock` is closed.

    `tmp`: remove only what is in this directory. `parent`: the pid of the fork server.
    """

    def is_wanted() -> bool:
        return not wait_ready(sock.fileno(), select.POLLHUP, 0)

    try:
        if _is_begun(sock, uid, groups, parent):
            if tmp is not None:
                with contextlib.suppress(OSError):
                    os.chmod(tmp, stat.S_IRWXU)
                clear_directory(tmp, None, is_wanted)
            elif uid is not None:
                clear(uid, is_wanted)
    finally:
        os._exit(0)


def signal_all(
    sock: socket.socket,
    cgroup: str,
    number: int | None,
    uid: int | None,
    parent: int,
    _: int | None,
) -> NoReturn:
    """Do what `signal_cgroup` does, and answer on `sock`. `parent`: the pid of the fork server."""
    try:
        try:
            if _is_begun(sock, uid, (), parent):
                signal_cgroup(cgroup, number, signal.pidfd_send_signal)
            send(sock, {})
        except Exception as error:  # noqa: BLE001 -- whoever asked is told
            send(sock, failure(error))
    finally:
        os._exit(0)


def signal_cgroup(cgroup: str, number: int | None, send: Callable[[int, int], object]) -> None:
    """Send a signal to every process in a cgroup; None for SIGTERM and then SIGCONT.

    `send`, and what is raised: see `signal_tree`.
    """
    if number is None:
        terminate_tree(cgroup, send)
    else:
        signal_tree(cgroup, number, send)


def _is_begun(sock: socket.socket, uid: int | None, groups: Sequence[int], parent: int) -> bool:
    """Give up all descriptors of the fork server but `sock`; act as the user, if there is one.

    Returns whether the fork server still lives. Raises OSError.
    """
    detach(os.open(os.devnull, os.O_WRONLY), [sock.fileno()])
    inherited.separate(is_alone=uid is not None)
    if uid is not None:
        act_as(uid, groups or [uid])
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent
