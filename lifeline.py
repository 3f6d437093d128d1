"""A connection that ends when this process begins to die.

    lifeline = Lifeline()
    send(sock, {...}, [lifeline.fileno()])   # the receiver polls it for POLLIN
    lifeline.close()

A process that was killed may not be able to die, because a job can make one of its threads hang in
the kernel (`buffers.py`). All its descriptors then stay open, and a pidfd of it does not become
readable. So a lifeline belongs to a thread that has a table of descriptors of its own. Only this
thread has the other end of the connection. SIGKILL ends it whatever the other threads do, and the
kernel closes its table.

Thread safety: a lifeline may be used from any thread. Its thread only waits until it is closed.

Source: unshare(2), CLONE_FILES.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import socket
import threading

__all__ = ["Lifeline"]

_CLONE_FILES = 0x400  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


class Lifeline:
    """One end of the connection. `close` ends it as the end of the process does.

    Its thread has what this thread may do, so make it when this process has given up its rights.
    Raises OSError, for example EPERM where unshare(2) is not permitted.
    """

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        ready: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_hold, args=(theirs.fileno(), ready), name="lifeline", daemon=True
        )
        with theirs:
            self._thread.start()
            problem = ready.get()
        if problem is not None:
            self.close()
            raise problem

    def fileno(self) -> int:
        """Return the descriptor to hand over; valid until `close`."""
        return self._ours.fileno()

    def close(self) -> None:
        """End the connection, also for those it was handed over to; idempotent."""
        with contextlib.suppress(OSError):  # it is closed
            self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._ours.close()


def _hold(fd: int, ready: queue.SimpleQueue[OSError | None]) -> None:
    """Keep nothing open in this thread but `fd`; return when the other end is closed."""
    try:
        _close_others(fd)
    except OSError as error:
        ready.put(error)
        return
    ready.put(None)
    os.read(fd, 1)


def _close_others(fd: int) -> None:
    """Give this thread a table of descriptors of its own, with nothing but `fd`."""
    if _libc.unshare(_CLONE_FILES):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")
    # The numbers may have no limit, so this closes those that there are.
    for each in os.listdir("/proc/thread-self/fd"):
        with contextlib.suppress(OSError):  # EBADF: that of the directory itself
            if int(each) != fd:
                os.close(int(each))
