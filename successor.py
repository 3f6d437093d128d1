"""Takes jobs over from a main process that has gone: the side of the next main process.

    heritage = take_over("/var/lib/jobs", duties, bases=[None], window_s=300)
    if heritage is not None:
        spawner = Spawner(..., heritage=heritage)

`takeover.py` has the socket. The fork server that waits there executes this process's own
`forkserver.py` in its place, so a new version of the program can take over the jobs of an old one.
A fork server with another `takeover.PROTOCOL`, or with other users, directories or cgroups,
refuses, and nothing is lost.

Thread safety: these functions have no state.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import takeover
from cgroups import Subtree
from errors import TakeoverError, in_words
from messages import receive, send

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from limits import Bounds, Enforcement

__all__ = [
    "PROGRAM",
    "Heritage",
    "Waiting",
    "end_jobs",
    "find_waiting",
    "open_own_pidfd",
    "take_over",
]

# The fork server imports no site-packages and obeys no PYTHON* variables.
PROGRAM = (
    *(sys.executable, "-E", "-s", "-S"),
    os.path.join(os.path.dirname(os.path.abspath(__file__)), "forkserver.py"),
)
"""The command of the fork server, without its arguments."""

_ANSWER_S = 10.0
_ATTEMPTS = 3
_PIDFD_THREAD = os.O_EXCL  # linux/pidfd.h, since Linux 6.9


class Heritage(NamedTuple):
    """A fork server that has accepted this process as its main process."""

    sock: socket.socket
    pid: int
    pidfd: int
    lock_fd: int | None  # of the cgroups: `cgroups.Subtree`
    dismantling: Sequence[Any] | None  # `Subtree.dismantling`; None without cgroups

    def adopt_cgroups(self, enforcement: Enforcement, bounds: Bounds | None) -> Subtree | None:
        """Take over the cgroups of the jobs; None if the jobs have none. Raises `CgroupError`."""
        if self.dismantling is None or self.lock_fd is None:
            return None
        return Subtree.adopt(self.dismantling, self.lock_fd, enforcement, bounds=bounds)

    def close(self) -> None:
        """Leave the fork server to another successor."""
        self.sock.close()
        os.close(self.pidfd)
        if self.lock_fd is not None:
            os.close(self.lock_fd)


def take_over(
    directory: str | os.PathLike[str],
    duties: Mapping[str, Any],
    *,
    bases: Sequence[str | None],
    window_s: float,
) -> Heritage | None:
    """Become the main process of a fork server that waits in the directory; None if there is none.

    `duties`: of `Spawner`. `bases`: the cgroups in which the jobs' cgroups may be; None for jobs
    without. `window_s`: the restart window from now on. Raises `TakeoverError`, OSError.
    """
    problem = ""
    for _ in range(_ATTEMPTS):
        try:
            sock = takeover.connect(directory)
        except PermissionError as error:
            raise TakeoverError(in_words(error)) from error
        if sock is None:
            return None
        try:
            return _ask(sock, duties, bases, window_s)
        except (OSError, EOFError) as error:
            # A fork server without jobs may be about to end. The next attempt then finds nobody.
            problem = in_words(error) if isinstance(error, OSError) else "it hangs up"
    raise TakeoverError(f"the fork server of {directory} does not answer: {problem}")


def _ask(
    sock: socket.socket, duties: Mapping[str, Any], bases: Sequence[str | None], window_s: float
) -> Heritage:
    """Ask on a connection to become the main process. Raises as `take_over`, and EOFError."""
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        sock.settimeout(_ANSWER_S)
        _check_program()
        main_fd = open_own_pidfd()
        try:
            request = {
                "op": "take over",
                "protocol": takeover.PROTOCOL,
                "duties": dict(duties),
                "bases": list(bases),
                "window_s": window_s,
                "program": PROGRAM,
            }
            send(sock, request, [main_fd])
            answer, fds = receive(sock)
        finally:
            os.close(main_fd)
        if "refused" in answer:
            raise TakeoverError(answer["refused"])
        undo.pop_all()
    pidfd, *lock_fds = fds
    lock_fd = lock_fds[0] if lock_fds else None
    return Heritage(sock, answer["pid"], pidfd, lock_fd, answer["dismantle"])


class Waiting(NamedTuple):
    """What a fork server that waits for a successor says."""

    jobs: int  # that run
    until_s: float  # by `time.time`

    def __str__(self) -> str:
        until = time.strftime("%H:%M:%S UTC", time.gmtime(self.until_s))
        jobs = "1 job goes" if self.jobs == 1 else f"{self.jobs} jobs go"
        return f"{jobs} on without it until {until}"


def find_waiting(directory: str | os.PathLike[str]) -> Waiting | None:
    """Ask the fork server that waits in the directory; None if there is none.

    Call it only if no main process runs: the fork server does not answer while one does. Raises
    OSError.
    """
    sock = takeover.connect(directory)
    if sock is None:
        return None
    with sock, contextlib.suppress(EOFError, ConnectionError):  # it has just ended
        sock.settimeout(_ANSWER_S)
        send(sock, {"op": "status"})
        answer, _ = receive(sock)
        return Waiting(answer["jobs"], time.time() + answer["left_s"])
    return None


def end_jobs(directory: str | os.PathLike[str]) -> bool:
    """End the jobs that a fork server keeps for a successor; return whether there was one.

    Blocks until the fork server has ended. Raises OSError.
    """
    sock = takeover.connect(directory)
    if sock is None:
        return False
    with sock, contextlib.suppress(EOFError, ConnectionError):
        send(sock, {"op": "end"})
        while True:
            receive(sock)
    return True


def _check_program() -> None:
    """Raise `TakeoverError` unless the fork server of this program can be executed."""
    found = subprocess.run(
        [*PROGRAM, "--check"], check=False, capture_output=True, text=True, cwd="/"
    )
    if found.stdout.strip() != str(takeover.PROTOCOL):
        raise TakeoverError(f"{PROGRAM[-1]} cannot be executed: {found.stderr.strip()[-200:]}")


def open_own_pidfd() -> int:
    """Open a pidfd that is readable when the first thread of this process has ended.

    Another thread may hang in the kernel, so that the process does not end. Before Linux 6.9 only
    the end of the whole process can be watched.
    """
    try:
        return os.pidfd_open(os.getpid(), _PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.pidfd_open(os.getpid())
