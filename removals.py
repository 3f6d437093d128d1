"""Removes directories from one parent, one at a time, so that nobody waits for more than one.

    removals = Removals()
    if removals.make(lambda: os.rmdir(path)) is None:
        removals.make_later(lambda: os.rmdir(path))

While rmdir(2) removes a directory, the kernel keeps the parent locked, and forgets each name that
somebody has looked for in the directory, also names that do not exist. A job can look for millions
of names in its TMPDIR and in its cgroup. The rmdir(2) then takes seconds, and meanwhile nobody can
make or remove another directory of the parent.

Thread safety: every method may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from errors import in_words

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Removals"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_STAYS = "a directory of a job stays until the next worker: %s"
_PATIENCE_S = 0.05  # most removals take some 20 microseconds
_JOIN_S = 0.1  # how long `close` waits for all threads together: a worker must end soon


class Removals:
    """The removals from one parent."""

    def __init__(self) -> None:
        # Held during a removal. A thread for which others wait gives up after _PATIENCE_S.
        self._turn = threading.Lock()
        # Of removals that are made later. Needs no lock: one operation on a set is atomic.
        self._threads: set[threading.Thread] = set()

    def make(self, removal: Callable[[], _T], timeout_s: float | None = _PATIENCE_S) -> _T | None:
        """Return what `removal` does; None if others take longer than `timeout_s`.

        `timeout_s`: None means no bound, for a thread that nobody waits for. Raises as `removal`.
        """
        if not self._turn.acquire(timeout=-1 if timeout_s is None else timeout_s):
            return None
        try:
            return removal()
        finally:
            self._turn.release()

    def make_later(self, removal: Callable[[], object]) -> None:
        """Have a thread make the removal, however long others take. An OSError is logged."""

        def run() -> None:
            try:
                self.make(removal, None)
            except OSError as error:
                logger.error(_STAYS, in_words(error))
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=run, name="removal", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            self._threads.discard(thread)
            logger.error(_STAYS, error)

    def close(self) -> None:
        """Wait for the removals that are made later, but not long: then they go on alone."""
        deadline = time.monotonic() + _JOIN_S
        for thread in tuple(self._threads):
            if thread.is_alive():  # one that is being started just now cannot be joined
                thread.join(max(0.0, deadline - time.monotonic()))
