"""Keeps descriptors in reserve for what must not fail when the process has no others left.

A process may have as many open files as its soft limit says (RLIMIT_NOFILE, getrlimit(2)). If
connections have used up all of them, a job must nevertheless be killed, and its end recorded:

    fd = with_reserve(lambda: os.open("cgroup.kill", os.O_WRONLY))

The reserve is what lies between the soft limit and the hard limit. `with_reserve` raises the soft
limit for the moment in which it needs a descriptor. `keep_reserve` makes such a reserve.

Thread safety: any thread may call anything.
"""

from __future__ import annotations

import errno
import resource
import sys
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["keep_reserve", "with_reserve"]

_T = TypeVar("_T")

# A job's end opens one file at a time; a request to the fork server takes two descriptors.
_RESERVE = 256
_RESERVE_SHARE = 4  # the reserve is at most this part of a small hard limit

# Held while the soft limit is raised, so that each thread restores the limit it has found.
_lock = threading.Lock()


def with_reserve(make: Callable[[], _T]) -> _T:
    """Return what `make` returns; if it raises OSError with EMFILE, call it again with the reserve.

    `make` should open a few descriptors, which the caller closes soon, and should not block.
    """
    try:
        return make()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    with _lock:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        more = soft + _RESERVE
        if hard != resource.RLIM_INFINITY:
            more = min(more, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        try:
            return make()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def keep_reserve() -> int:
    """Raise the soft limit as far as the hard limit and the reserve allow; return the soft limit.

    Returns sys.maxsize if there is no limit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return sys.maxsize
    soft = hard - min(_RESERVE, hard // _RESERVE_SHARE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
