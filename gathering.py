"""How threads share the interpreter while they have much to do: on one processor, in short turns.

    gathering = Gathering()
    gathering.begin()        # from now on there is much to do
    gathering.follow()       # each of the threads calls this before a piece of work
    gathering.leave()        # this thread is going to do something else
    gathering.end()

Only one thread at a time has the interpreter. If two threads take turns on two processors, each
turn wakes a processor, and the thread finds its data in the cache of the other one. On one
processor a turn costs less, and nothing is lost. With little to do the threads stay free, because
the next one should go to a processor that is idle. docs/benchmarks.md has the figures.

Thread safety: everything may be called from any thread; only `begin` and `end` must not run at the
same time.

Source: sched_setaffinity(2). The processors of a thread are inherited by the threads and processes
that it starts. So a thread leaves before it starts one that lives long.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading

__all__ = ["Gathering"]

# For how long a thread may keep the interpreter while there is much to do. With Python's 5 ms,
# gRPC's accepting thread falls behind at twice the capacity, and gRPC cancels a fifth of the calls.
# With little to do the interval stays as it is, because a short one costs streams a quarter of
# their rate.
_SHORT_SWITCH_S = 0.0005


class Gathering:
    """Knows where the threads should run. At first that is where this process may run."""

    def __init__(self) -> None:
        self._switch_s = sys.getswitchinterval()
        self._everywhere = os.sched_getaffinity(0)
        self._wanted = self._everywhere  # replaced as a whole
        self._thread = threading.local()  # `processors`: where this thread runs

    def begin(self) -> None:
        """Have the threads gather on the processor on which this thread runs now."""
        sys.setswitchinterval(_SHORT_SWITCH_S)
        if self._wanted is self._everywhere:
            with contextlib.suppress(AttributeError):  # the C library does not have it
                self._wanted = {ctypes.CDLL(None).sched_getcpu()}

    def end(self) -> None:
        """Have the threads run everywhere again."""
        sys.setswitchinterval(self._switch_s)
        self._wanted = self._everywhere

    def follow(self) -> None:
        """Take this thread to where it should run. This is a system call only after a change."""
        self._go(self._wanted)

    def leave(self) -> None:
        """Let this thread run everywhere, until it calls `follow` again."""
        self._go(self._everywhere)

    def _go(self, processors: set[int]) -> None:
        if getattr(self._thread, "processors", self._everywhere) is processors:
            return
        self._thread.processors = processors
        with contextlib.suppress(OSError):  # the system forbids it, or has taken the processor away
            os.sched_setaffinity(0, processors)
