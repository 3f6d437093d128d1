"""What makes running jobs outlive their worker, on the worker's side.

    keeper = Keeper(spawner)
    keeper.keep(job_id, job_input.kept_fds)         # before the job executes
    keeper.leave()                                  # wakes the threads of all jobs

The job itself tells a successor the rest, with `Spawner.note` and `Spawner.forget`.

Thread safety: every method may be called from any thread.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from errors import ResourceError, in_words
from messages import wait_ready

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spawner import Spawner

__all__ = ["Keeper", "LeftError"]


class LeftError(Exception):
    """The worker was left while its jobs go on."""


class Keeper:
    """Keeps the jobs of a worker for its successor.

    Attribute: `leave_fd`, which is readable after `leave`.
    """

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self.leave_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def keep(self, job_id: str, fds: Sequence[int]) -> None:
        """Have the fork server keep copies of these descriptors of a job that is about to execute.

        Raises `ResourceError`, `SpawnerDiedError`.
        """
        try:
            self._spawner.keep(job_id, fds)
        except OSError as error:
            raise ResourceError(f"no room for the files of a new job: {in_words(error)}") from error

    def leave(self) -> None:
        """Have the thread of each job end while the job goes on."""
        os.eventfd_write(self.leave_fd, 1)

    @property
    def is_left(self) -> bool:
        """Whether `leave` was called."""
        return wait_ready(self.leave_fd, select.POLLIN, 0)

    def close(self) -> None:
        """Close the descriptor: no thread of a job is left."""
        os.close(self.leave_fd)
