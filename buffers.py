"""How a job's output gets out of its pipe: the memory that it passes through, and when to rest.

    buffers = Buffers()
    with buffers.lent() as buffer:
        os.readv(pipe, [buffer])
    pace = Pace(pipe)
    pause_ms = pace.after(size, now)       # of what was just moved

Thread safety: any thread may use a `Buffers`, one thread a `Pace`.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LARGE_PIPE_BYTES", "Buffers", "Pace", "rest_ms"]

LARGE_PIPE_BYTES = 1024 * 1024  # the most that an unprivileged process may ask for (pipe(7))
_BUFFER_BYTES = LARGE_PIPE_BYTES  # so that one read empties a pipe
_BUFFERS = 4
_SMALL_BUFFER_BYTES = 64 * 1024  # a pipe's size before it grows
# For how long a job's pipe is left alone after it was emptied: see rest_ms.
_TINY_BYTES = 4096
_TINY_REST_MS = 4
_REST_MS = 1


class Buffers:
    """The memory that output passes through between a job's pipe and its file.

    All jobs share a few large buffers. With one for each, a thousand jobs would take a gigabyte,
    and most jobs are silent. A job that finds no large buffer free gets a small one of its own
    and does not wait: a read of a pipe can take for ever, because any process that has the pipe
    can keep the kernel's lock of it (splice(2) from an idle socket does).
    """

    def __init__(self) -> None:
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(_BUFFER_BYTES)))

    @contextlib.contextmanager
    def lent(self) -> Iterator[memoryview]:
        """Lend a buffer within this context. Does not block."""
        try:
            buffer = self._free.get_nowait()
        except Empty:
            yield memoryview(bytearray(_SMALL_BUFFER_BYTES))
            return
        try:
            yield buffer
        finally:
            self._free.put(buffer)


class Pace:
    """When a job's pipe is left alone. Makes the pipe of a job that fills it larger.

    `pipe_fd`: the pipe; the caller keeps it open. Attribute: `rests_until_s`, by `time.monotonic`.
    """

    def __init__(self, pipe_fd: int) -> None:
        self._pipe_fd = pipe_fd
        self._pipe_bytes = fcntl.fcntl(pipe_fd, fcntl.F_GETPIPE_SZ)
        self.rests_until_s = self._moved_at = time.monotonic()
        self._moved = 0

    def after(self, size: int, now: float) -> int:
        """Return for how many milliseconds to leave the pipe alone; 0 for not at all.

        `size`: how much was moved out of it. `now`: when that began, by `time.monotonic`.
        """
        pause_ms = rest_ms(size, self._moved, now - self._moved_at, self._pipe_bytes)
        self._moved_at, self._moved = now, size
        self.rests_until_s = now + pause_ms / 1000
        if not pause_ms and self._pipe_bytes < LARGE_PIPE_BYTES:
            # Only for a job that fills its pipe: the pipes of one user share a quota of memory, and
            # beyond the quota a new pipe has 8 KiB (pipe(7)).
            with contextlib.suppress(OSError):  # the quota is used up
                self._pipe_bytes = fcntl.fcntl(self._pipe_fd, fcntl.F_SETPIPE_SZ, LARGE_PIPE_BYTES)
        return pause_ms


def rest_ms(size: int, before: int, time_s: float, pipe_bytes: int) -> int:
    """Return for how many milliseconds to leave a job alone that wrote `size` in `time_s`.

    What the job writes meanwhile is moved, stored and sent in one piece. The fewer pieces, the
    more of the machine is left for the job. `before`: how much was moved when `time_s` began.

    0 if the pipe might be full after such a rest, because the job would have to wait then. That
    is the case if it was half full either time: the job may have spent most of `time_s` waiting
    for room.
    """
    pause_ms = _TINY_REST_MS if size < _TINY_BYTES else _REST_MS
    expected = size * pause_ms / 1000 / max(time_s, 1e-6)
    return pause_ms if max(before, size, expected) <= pipe_bytes / 2 else 0
