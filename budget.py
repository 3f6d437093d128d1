"""Bounds how many bytes of output are kept: by one job, one user, all together.

    everybody = Budget(100 << 30, "the ceiling of all users together")
    alice = Budget(10 << 30, "alice's ceiling", everybody)
    taken, refuser = alice.take(4096)

Thread safety: every method may be called from any thread. Each budget has a lock; the lock of a
budget is taken before that of its parent.
"""

from __future__ import annotations

import threading

__all__ = ["Budget"]


class Budget:
    """Counts how many bytes are kept by one log, or by all logs that share it.

    `limit`: in bytes, at least 0; None for any number. `what`: names the limit in messages,
    like "this job's ceiling of 1 GiB". `parent`: every byte is taken out of this budget, too.
    `of_one_job`: only one log ever uses it, and when that is complete, its parent goes on counting.
    Attributes: `limit`, `what`.
    """

    __slots__ = ("__weakref__", "_lock", "_of_one_job", "_parent", "_used", "limit", "what")

    def __init__(
        self,
        limit: int | None,
        what: str,
        parent: Budget | None = None,
        *,
        of_one_job: bool = False,
    ) -> None:
        self._of_one_job = of_one_job
        self.limit = limit
        self.what = what
        self._parent = parent
        # Guards _used. Held while the parent's is taken, so that all of them agree. Never held
        # during I/O. Reentrant, because the garbage collector may close an abandoned
        # subscription, and so call `give_back`, in the middle of `take`.
        self._lock = threading.RLock()
        self._used = 0

    @property
    def used(self) -> int:
        """How many bytes are taken and not given back."""
        with self._lock:
            return self._used

    @property
    def is_used_up(self) -> bool:
        """Whether not one byte is left in this budget, whatever is left in its parent."""
        return self.limit is not None and self.used >= self.limit

    @property
    def heir(self) -> Budget:
        """The budget that counts the bytes of a log with this budget once the log is complete."""
        return self._parent if self._of_one_job and self._parent is not None else self

    def branch_of(self, ancestor: Budget) -> Budget | None:
        """Return the child of `ancestor` through which this budget takes from it.

        That is this budget or one of its parents; None if this budget takes nothing from
        `ancestor`.
        """
        branch: Budget | None = self
        while branch is not None and branch._parent is not ancestor:
            branch = branch._parent
        return branch

    @property
    def below_root(self) -> Budget:
        """The highest parent but one; this budget if it has fewer than two."""
        branch = self
        while branch._parent is not None and branch._parent._parent is not None:
            branch = branch._parent
        return branch

    def take(self, size: int) -> tuple[int, Budget | None]:
        """Take up to `size` bytes from this budget and from every parent alike.

        Returns how many were taken, and the budget that had no more; None if all were. Does not
        block.
        """
        with self._lock:
            room = size
            if self.limit is not None and self._used + size > self.limit:
                room = max(0, self.limit - self._used)
            refuser = self if room < size else None
            if self._parent is not None:
                room, parents = self._parent.take(room)
                refuser = parents or refuser
            self._used += room
            return room, refuser

    def count(self, size: int) -> None:
        """Count bytes that are there already, also beyond the limit."""
        with self._lock:
            self._used += size
            if self._parent is not None:
                self._parent.count(size)

    def give_back(self, size: int) -> None:
        """Let others take `size` bytes that were taken. Raises ValueError if they were not."""
        with self._lock:
            if not 0 <= size <= self._used:
                raise ValueError(f"{size} bytes given back, of {self._used} taken")
            if self._parent:
                self._parent.give_back(size)
            self._used -= size
