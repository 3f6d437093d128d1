"""Goes on with the jobs of a former worker: those that run, and those that ended without a worker.

    restarts = Restarts("/var/lib/jobs", window_s=300, store=store.instance_id, others=False)
    heritage = restarts.take_over(duties, bases)        # None if no fork server waits
    ...
    restarts.resume(rows, starter, spawner, output_directory, terms)

The worker goes on with each job that the fork server has. Every other job that runs by the store
has ended. If the fork server has not left its end, nobody knows it, and the job is LOST. A job that
has ended gets a thread, too, which finds what the thread of a job always finds: an empty pipe and
an end.

Thread safety: for the thread that makes a worker.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import takeover
from messages import close_all
from spares import Body, JobThread
from spawner import Adopted, Restart
from successor import take_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from budget import Budget
    from jobstate import Job
    from jobtable import Row
    from outputdirectory import OutputDirectory
    from spawner import Spawner
    from starting import Starter
    from successor import Heritage

    Terms = Callable[[Job], tuple[Budget | None, Callable[[], None] | None]]

__all__ = ["Restarts", "no_terms"]

logger = logging.getLogger(__name__)


def no_terms(_: Job) -> tuple[None, None]:
    """Give a job neither a budget nor a function to call at its end."""
    return None, None


class Restarts:
    """The restart directory of a worker; `window_s`: its restart window.

    `store`: the instance ID of the store that has the jobs. `others`: jobs run as other users.
    Raises OSError; PermissionError for a window with `others` unless root has started us.
    """

    def __init__(
        self, directory: str | os.PathLike[str], window_s: float, *, store: str, others: bool
    ) -> None:
        if window_s > 0 and others and os.getuid() != 0:
            # A fork server executes the program of a successor that runs as the same user. Without
            # root the main process, which has given up its capabilities, is such a process: through
            # the fork server it could get them back.
            raise PermissionError(
                errno.EPERM,
                "a restart window with jobs as other users needs root, and not only capabilities; "
                "start as root, or without a window (--restart-window 0)",
            )
        self._directory = Path(directory).absolute()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._window_s = window_s
        self._store = store
        self._ends: dict[str, dict[str, Any]] = {}  # `take_over` reads them

    def take_over(self, duties: Mapping[str, Any], bases: Sequence[str | None]) -> Heritage | None:
        """Become the main process of a fork server that waits; None if none does.

        Raises as `successor.take_over`.
        """
        duties = {**duties, "store": self._store}
        heritage = take_over(self._directory, duties, bases=bases, window_s=self._window_s)
        self._ends = takeover.read_ends(self._directory)
        return heritage

    def for_spawner(self, lock_fd: int | None) -> Restart | None:
        """Return how a new fork server is to keep jobs; None without a restart window."""
        if not self._window_s:
            return None
        return Restart(self._directory, self._window_s, lock_fd, self._store)

    def resume(
        self,
        rows: Iterable[Row],
        starter: Starter,
        spawner: Spawner,
        directory: OutputDirectory,
        terms: Terms,
    ) -> set[str]:
        """Go on with the jobs of these rows; return the IDs of those that the fork server has.

        `terms`: returns the budget of a job's output, and what to call when it has ended. Raises
        OSError, `SpawnerDiedError`.
        """
        alive = set()
        for row in rows:
            job_id = row.job.job_id
            exit_fd, their_exit_fd = os.pipe()
            try:
                with contextlib.ExitStack() as undo:
                    undo.callback(os.close, exit_fd)
                    adopted = self._adopt(job_id, spawner, their_exit_fd)
                    undo.callback(os.close, adopted.output_fd)
                    undo.callback(close_all, (adopted.pidfd, *adopted.more_fds))
                    if adopted.pid:
                        alive.add(job_id)
                    os.set_blocking(adopted.output_fd, False)
                    log = directory.resume_log(job_id)
                    body = Body(job_id, log, adopted.output_fd, exit_fd, JobThread())
                    undo.pop_all()
                    starter.resume(row, body, adopted, *terms(row.job))
            finally:
                os.close(their_exit_fd)
        return alive

    def _adopt(self, job_id: str, spawner: Spawner, exit_fd: int) -> Adopted:
        if spawner.keeps_jobs:
            with contextlib.suppress(ProcessLookupError):
                return spawner.adopt(job_id, exit_fd)
        end = self._ends.get(job_id)
        notes = {}
        if end is not None:
            if reports := end.pop("reports", ""):
                notes["reports"] = reports
            # By the clock, because another boot may have begun since.
            end["ended_s"] = time.monotonic() - (time.time() - end.pop("ended_at"))
            os.write(exit_fd, json.dumps(end).encode() + b"\n")
        logger.info("job %s has ended without a worker: %s", job_id, end or "nobody knows how")
        output_fd, stdout_fd = os.pipe()
        os.close(stdout_fd)
        # The eventfd takes the place of a pidfd. It is readable, like that of an ended process.
        return Adopted(0, output_fd, os.eventfd(1, os.EFD_CLOEXEC), notes)
