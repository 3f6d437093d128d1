"""The output log of a job that has ended, made from what the store knows of it.

    state = log.state()                       # of the `OutputLog` of the running job
    log = FinishedLog("job.out", state, dir_fd=directory, budget=budget)

Thread safety: that of `OutputLog`.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from broadcaster import OutputLog
from lastinggap import LastingGap
from outputtimes import TimeIndex

if TYPE_CHECKING:
    from budget import Budget
    from outputstate import OutputState

__all__ = ["FinishedLog"]


class FinishedLog(OutputLog):
    """The complete log in a file that exists, as `state` describes it.

    `budget` counts its bytes already. The file is opened when somebody reads it; if it is missing
    then, nothing of the output is kept.
    """

    def __init__(self, path: str, state: OutputState, *, dir_fd: int, budget: Budget) -> None:
        super().__init__(path, dir_fd=dir_fd, budget=budget)
        self._times = TimeIndex(f"{path}.times", dir_fd)
        self._times.load(state.times, state.filed)
        if state.gap is not None:
            self._gap = state.gap.offset, state.gap.offset + state.gap.length
            self._lasting_gap = LastingGap(f"{path}.gap", dir_fd, lasting=False)
            self._lasting_gap.exists = True
        self._end = state.size + self.lost_bytes
        self._taken = state.taken
        self._failure = OSError(*state.failure) if state.failure else None
        self._complete = True

    def _open(self, flags: int) -> int:
        if flags & os.O_CREAT:  # by the constructor
            return -1
        try:
            return super()._open(flags)
        except FileNotFoundError:
            # Somebody has deleted it, or restored the store without the output.
            self._gap = 0, self._end
            self._failure = OSError(errno.ENOENT, "the file of the output is missing")
            return os.open(os.devnull, flags | os.O_CLOEXEC)
