"""The logged-out tokens, kept on the disk until they end; and the time that decides when they end.

    running = RunningTime(store)
    revocations = Revocations(store, running)
    revocations.add(token_id, ends_s)
    assert token_id in revocations

The clock of a machine can be wrong and is set forward and back. If revoked tokens were forgotten
by that clock, a step forward and back would make them valid again. So a token also ends by the
*running time*: for how many seconds the server has run, over all its starts. It never goes back
while the server runs. After a crash it may go on from an earlier value; tokens and revocations then
end later by the same time.

Both are in the store, the tokens in its table `revoked`. Rows of tokens that have ended are removed
when another one is written.

Thread safety: any thread may call anything. `in` and `RunningTime.now_s` never wait.
"""

from __future__ import annotations

import errno
import heapq
import logging
import threading
import time
from typing import TYPE_CHECKING, Self

from errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from store import Store

__all__ = ["RevocationError", "Revocations", "RunningTime"]

logger = logging.getLogger(__name__)

_RUNNING_TIME = "running_time_s"


class RevocationError(OSError):
    """The record of logouts is closed, so the token is still valid."""


class RunningTime:
    """The running time, kept in the store; None keeps it in memory only.

    `clock`: returns seconds, and never goes back. Raises `StoreError`.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._clock = clock
        self._store = store
        before_s = store.fact(_RUNNING_TIME) if store else None
        self._origin_s = clock() - (before_s or 0)

    def now_s(self) -> int:
        """Return the running time in whole seconds."""
        return int(self.seconds())

    def seconds(self) -> float:
        """Return the running time."""
        return self._clock() - self._origin_s

    def save(self) -> None:
        """Write the running time. A failure is logged; the next call tries again."""
        if self._store is None:
            return
        try:
            self._store.set_fact(_RUNNING_TIME, self.now_s())
        except StoreError as error:
            logger.warning("the running time cannot be written: %s", error)

    def row(self) -> list[tuple[str, int]]:
        """Return the row of the store's table `facts` to write; none without a store."""
        return [] if self._store is None else [(_RUNNING_TIME, self.now_s())]

    def close(self) -> None:
        """Save for the last time; idempotent."""
        self.save()
        self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Revocations:
    """The logged-out tokens in the store; None keeps them in memory only.

    `running`: the running time of the server; None for one that begins now. Raises `StoreError`.
    """

    def __init__(self, store: Store | None, running: RunningTime | None = None) -> None:
        self._running = running or RunningTime()
        # Guards all below. Held during a write to the disk, so logouts wait for each other. Reading
        # `_ends` needs no lock.
        self._lock = threading.Lock()
        self._store = store
        self._closed = False
        self._ends: dict[str, int] = {}  # by token ID
        self._unwritten: dict[str, int] = {}  # those that the disk had no room for
        if store is not None:
            found = "SELECT token_id, ends_s FROM revoked WHERE ends_s > ?"
            self._ends = dict(store.query(found, (self._running.now_s(),)))
        # The same tokens, so that those that have ended are found without a search.
        self._by_end = [(ends_s, token_id) for token_id, ends_s in self._ends.items()]
        heapq.heapify(self._by_end)

    def close(self) -> None:
        """Write what could not be written before; idempotent. A later `add` fails."""
        with self._lock:
            self._write_locked()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, token_id: str) -> bool:
        return token_id in self._ends

    def add(self, token_id: str, ends_s: int) -> None:
        """Revoke a token for good; idempotent. Blocks until it is on the disk.

        `ends_s`: the running time at which the token ends anyway. If the disk cannot be written,
        the token is revoked nevertheless, an error is logged, and the next `add` or `write` tries
        again. Raises `RevocationError` after `close`.
        """
        with self._lock:
            if self._closed:
                raise RevocationError(
                    errno.EBADF, "the server is shutting down; the token is still valid"
                )
            if token_id in self._ends:
                return
            self._ends[token_id] = ends_s
            heapq.heappush(self._by_end, (ends_s, token_id))
            now_s = self._running.now_s()
            while self._by_end[0][0] <= now_s:
                del self._ends[heapq.heappop(self._by_end)[1]]
                if not self._by_end:
                    break
            if self._store is not None:
                self._unwritten[token_id] = ends_s
                self._write_locked()

    def write(self) -> None:
        """Write what could not be written before, if anything; an error is logged again."""
        with self._lock:
            self._write_locked()

    def _write_locked(self) -> None:
        if not self._unwritten or self._store is None or self._closed:
            return
        try:
            self._store.write(
                [
                    ("DELETE FROM revoked WHERE ends_s <= ?", [(self._running.now_s(),)]),
                    ("INSERT OR IGNORE INTO revoked VALUES (?, ?)", self._unwritten.items()),
                    # Otherwise a crash would set it back, and a token whose row is deleted here
                    # would be valid again.
                    ("INSERT OR REPLACE INTO facts VALUES (?, ?)", self._running.row()),
                ],
                durable=True,
            )
        except StoreError as error:
            logger.critical(
                "%d LOGOUTS ARE NOT ON THE DISK: %s. The tokens are invalid until the server "
                "restarts, and then valid again. Remove the cause, and send SIGHUP",
                len(self._unwritten),
                error,
            )
        else:
            self._unwritten = {}
