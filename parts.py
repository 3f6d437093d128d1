"""What a `Worker` consists of, made and ended in the right order.

    parts = Parts(enforcement="auto", ...)
    parts.begin()
    ...
    parts.close()          # or: parts.leave()

Thread safety: one thread makes it and ends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

import inherited
import privileges
from cgroups import Subtree, bases
from jobtable import JobTable
from keeping import Keeper
from leftovers import Leftovers
from outputdirectory import OutputDirectory
from registry import Registry
from resuming import Restarts
from scratch import Scratch, make_homes
from spares import Spares
from spawner import Spawner, duties_of
from starting import Starter
from store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from limits import Bounds, Enforcement, Limits
    from resuming import Terms
    from retention import Retention
    from successor import Heritage

__all__ = ["Parts"]

logger = logging.getLogger(__name__)

_RESUME_S = 5.0  # how long what is left of a job that has ended may take to be removed
_LEAVE_S = 10.0  # how long the threads of jobs may take to leave them


class Parts:
    """The parameters are those of `Worker`. Raises as `Worker` does.

    Attributes: the parts; `homes`, None without; `cluster`, see `Spawner`; `has_taken_over`,
    whether the fork server comes from a former worker. If that is so and an error is raised, the
    jobs of that worker are left to another one.
    """

    cluster = ""
    has_taken_over = False

    def __init__(  # noqa: PLR0913 -- those of a worker
        self,
        *,
        limits: Limits,
        bounds: Bounds | None,
        enforcement: Enforcement,
        cgroup_root: str | os.PathLike[str] | None,
        output_dir: str | os.PathLike[str] | None,
        reserve_bytes: int | None,
        uids: range | None,
        retention: Retention,
        environment: Mapping[str, str],
        homes: str | os.PathLike[str] | None,
        tmp_dir: str | os.PathLike[str] | None,
        host_accounts: bool,
        store: Store | None,
        restart_dir: str | os.PathLike[str] | None,
        restart_window: float,
    ) -> None:
        self._uids, self._host_accounts = uids, host_accounts
        self._pid = os.getpid()
        with contextlib.ExitStack() as undo:
            self.table = JobTable(store or Store())
            keeps = self.table.has if self.table.is_kept and output_dir else None
            lasting = restart_window > 0
            self.output_dir = OutputDirectory(
                output_dir, reserve_bytes=reserve_bytes, uids=uids, keeps=keeps, lasting=lasting
            )
            undo.callback(self.output_dir.close)
            keeps = self.table.keeps_tmp if self.table.is_kept and tmp_dir else None
            self.scratch = Scratch(tmp_dir, uids=uids, keeps=keeps)
            undo.callback(self.scratch.close)
            self.homes = make_homes(homes) if self.scratch.path else None
            self._restarts = self._make_restarts(restart_dir, restart_window)
            heritage = self._take_over(enforcement, cgroup_root)
            # Before the fork server, which must be born in our leaf.
            if heritage is None:
                self.subtree = Subtree.open(
                    enforcement, root=cgroup_root, limits=limits, bounds=bounds
                )
            else:
                self.subtree = heritage.adopt_cgroups(enforcement, bounds)
            if self.subtree is not None:
                self._at_end(undo, self.subtree.close, self.subtree.leave)
            self.spawner = self._make_spawner(heritage)
            self._at_end(undo, self.spawner.close, self.spawner.leave)
            self.keeper = Keeper(self.spawner) if self.spawner.keeps_jobs else None
            if self.keeper is not None:
                undo.callback(self.keeper.close)
            self._sweep()
            self._at_end(undo, self.scratch.empty, lambda: None)
            self.registry = Registry(
                retention, self.table, self.output_dir.open_log, self.scratch.remove
            )
            self.leftovers = Leftovers(self.spawner.clear)
            undo.callback(self.leftovers.close)
            self.spares = Spares(self.subtree, self.output_dir, self.scratch, self.spawner)
            undo.callback(self.spares.close)
            self.starter = self._make_starter(environment)
            self._undo = undo.pop_all()

    def _at_end(
        self, undo: contextlib.ExitStack, close: Callable[[], None], leave: Callable[[], None]
    ) -> None:
        """Have `undo` call `close`; or `leave` if there is an error and we have taken over."""

        def end(error: type[BaseException] | None, *_: object) -> None:
            (leave if error is not None and self.has_taken_over else close)()

        undo.push(end)

    def _make_restarts(
        self, directory: str | os.PathLike[str] | None, window_s: float
    ) -> Restarts | None:
        if directory is None or not self.table.is_kept:
            return None
        others = self._uids is not None
        return Restarts(directory, window_s, store=self.table.store_id, others=others)

    def _take_over(
        self, enforcement: Enforcement, cgroup_root: str | os.PathLike[str] | None
    ) -> Heritage | None:
        if self._restarts is None:
            return None
        duties = duties_of(
            uids=self._uids,
            homes=self.homes,
            tmp=self.scratch.path,
            host_accounts=self._host_accounts,
            cluster=self.cluster,
        )
        heritage = self._restarts.take_over(duties, bases(enforcement, cgroup_root))
        self.has_taken_over = heritage is not None
        return heritage

    def _make_spawner(self, heritage: Heritage | None) -> Spawner:
        if heritage is not None:
            return Spawner(heritage=heritage)
        if self._uids is not None:
            privileges.check_can_run_as_others(has_cgroups=self.subtree is not None)
        if problem := inherited.oom_exemption():
            logger.warning("%s; start it with another, or with that capability", problem)
        lock_fd = self.subtree.lock_fd if self.subtree else None
        return Spawner(
            jobs_cgroup=self.subtree.jobs if self.subtree else None,
            uids=self._uids,
            dismantle=self.subtree.dismantling if self.subtree else None,
            homes=self.homes,
            tmp=self.scratch.path,
            host_accounts=self._host_accounts,
            restart=self._restarts.for_spawner(lock_fd) if self._restarts else None,
            cluster=self.cluster,
        )

    def _sweep(self) -> None:
        """Remove what a former worker has left, but not of jobs that are to be gone on with."""
        self._former = self.table.running() if self._restarts else []
        if not self._restarts:
            self.table.end_lost(self.output_dir.left_by)
        former = {row.job.job_id for row in self._former}
        self.scratch.sweep(self.spawner.clear, former)
        if self.subtree is not None:
            self.subtree.sweep(former)

    def _make_starter(self, environment: Mapping[str, str]) -> Starter:
        return Starter(
            self.spares,
            self.spawner,
            self.subtree,
            self.registry,
            self.table,
            None if self._host_accounts else self.leftovers,
            self.scratch,
            environment=environment,
            keeper=self.keeper,
        )

    @property
    def unresumed(self) -> set[str]:
        """The IDs of the jobs of a former worker that `resume` has not gone on with yet."""
        return {row.job.job_id for row in self._former}

    def give_to(self, uid: int) -> None:
        """Let this process go on as the user `uid`. Raises as `Worker.drop_privileges`."""
        self.output_dir.give_to(uid)
        self.scratch.give_to(uid)
        if self.subtree is not None:
            self.subtree.delegate(uid)
            self.spawner.dismantle_at_end()

    def are_ours(self) -> bool:
        """Whether this process has made them, and is no fork of that one."""
        return os.getpid() == self._pid

    def begin(self) -> None:
        """Start the threads."""
        self.spawner.hold_lifeline()
        self.spares.fill()
        self.registry.trim()

    def resume(self, terms: Terms) -> None:
        """Go on with the jobs of a former worker. Raises as `Worker.resume`."""
        if self._restarts is None:
            return
        former = self._former
        alive = self._restarts.resume(former, self.starter, self.spawner, self.output_dir, terms)
        self._former = []
        if self.spawner.keeps_jobs:
            self.spawner.forget_others()
        # Nobody is to see a job as running that has ended.
        for job_id in {row.job.job_id for row in former} - alive:
            self.registry.get(job_id).wait(_RESUME_S)

    def leave(self) -> None:
        """Leave the running jobs to another process. Blocks until the threads have ended.

        Nobody may start jobs any more.
        """
        if self.keeper is None:
            raise ValueError("this worker has no restart window")
        self.keeper.leave()
        self.registry.close(time.monotonic() + _LEAVE_S)
        self.spares.close()
        self.leftovers.close()
        self.spawner.leave()
        self.scratch.leave()
        if self.subtree is not None:
            self.subtree.leave()
        self.output_dir.leave()
        # A thread that still hangs waits on the descriptor. Another file must not get its number.
        if not any(job.thread.is_alive() for job in self.registry.running()):
            self.keeper.close()
        self._undo.pop_all()

    def close(self) -> None:
        """End all parts, in the opposite order; idempotent."""
        self._undo.close()
