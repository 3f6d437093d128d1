"""Starts jobs: takes a spare, sets the limits, has the command executed.

    starter = Starter(spares, spawner, subtree, registry, table, leftovers, scratch, environment={})
    job_id = starter.start(work, around)
    ...
    starter.close()

`Worker.start` checks what it is asked for and describes the job in a `Work`. A start that fails
leaves nothing.

Thread safety: every method may be called from any thread. Starts do not wait for each other.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buffers import Buffers
from cgroups import CgroupError
from ending import Ending
from errors import DirectoryError, StartTimeoutError, StoreError, WorkerClosedError, exec_error
from inputpipe import InputPipe
from job import RunningJob
from jobinput import JobInput
from jobstate import EndReason, Work
from limits import NO_LIMITS
from spawner import AttachError, EnterError, SpawnerDiedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from broadcaster import OutputLog
    from budget import Budget
    from cgroups import Cgroup, Subtree
    from environment import Surroundings
    from jobtable import JobTable, Row
    from keeping import Keeper
    from leftovers import Leftovers
    from registry import Registry
    from scratch import Scratch
    from spares import Body, Spare, Spares
    from spawner import Adopted, Spawner

__all__ = ["Starter"]

_START_TIMEOUT_S = 10.0
# For how long a start that has begun may hold up the end of this process. The kernel can hold up a
# start for long.
_LEAVE_S = 1.0


class Starter:
    """What a `Worker` starts jobs with.

    `environment`: variables of every job. `subtree`: the cgroups of the jobs; None without.
    """

    _input_place = 1  # where the input's write end stands among the job's `Keeper.keep` descriptors

    def __init__(  # noqa: PLR0913 -- the parts of a worker
        self,
        spares: Spares,
        spawner: Spawner,
        subtree: Subtree | None,
        registry: Registry,
        table: JobTable,
        leftovers: Leftovers | None,
        scratch: Scratch,
        *,
        environment: Mapping[str, str],
        keeper: Keeper | None = None,
    ) -> None:
        self._spares = spares
        self._spawner = spawner
        self._subtree = subtree
        self._registry = registry
        self._table = table
        self._leftovers = leftovers
        self._scratch = scratch
        self._environment = environment
        self._keeper = keeper
        self._buffers = Buffers()
        # Guards the four below. Notified when _busy falls. Never held during I/O.
        self._idle = threading.Condition()
        self._busy = 0  # calls that are starting or removing jobs
        self._executing: dict[str, Spare] = {}  # of those calls, the ones that wait for an exec
        self._closed = False
        self._cut_off: set[str] = set()  # the jobs of starts that `close` has ended

    def start(self, work: Work, around: Surroundings) -> str:
        """Start the job and return its ID. Raises as `Worker.start` does."""
        with self.open():
            if work.uid is None or self._leftovers is None:
                return self._launch(work, around)
            self._leftovers.begin(work.uid)
            try:
                return self._launch(work, around)
            except BaseException as error:
                if not (isinstance(error, StartTimeoutError) and error.lives):
                    self._leftovers.end(work.uid)
                raise

    def _gone(self, work: Work, job_id: str) -> None:
        """Remove what a job has left, now that its processes are gone."""
        if not work.keep_tmp:
            self._scratch.remove(job_id)
        if work.uid is not None and self._leftovers is not None:
            self._leftovers.end(work.uid)
        if work.on_end is not None:
            work.on_end()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold `close` back within this context. Raises `WorkerClosedError` if it has begun."""
        with self._idle:
            if self._closed:
                raise WorkerClosedError
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _launch(self, work: Work, around: Surroundings) -> str:
        with contextlib.ExitStack() as undo:
            spare = self._spares.take()
            undo.push(functools.partial(self._note_what_lives, spare, work))
            undo.callback(self._unrecord, spare, work)  # runs last, when no process is left
            # Already here, because a Ctrl-C (KeyboardInterrupt) may come between the order to
            # execute and its answer.
            undo.callback(self._spawner.kill, spare.job_id)
            undo.callback(spare.discard)
            budget = work.budget or self._registry.budget_for(work.owner)
            self._prepare_output(spare.body.output, work.owner, budget)
            started_at, started_s = datetime.now(UTC), time.monotonic()
            cgroup = None
            if self._subtree is not None and spare.cgroup is not None:
                cgroup = self._subtree.limit(spare.cgroup, work.limits)
            kept_tmp = self._scratch.path_of(spare.job_id) if work.keep_tmp else ""
            # Before the command can run, so that every job that runs is in the store.
            position = self._table.begin(
                spare.job_id,
                work,
                limits=cgroup.limits if cgroup else NO_LIMITS,
                started_at=started_at,
                kept_tmp=kept_tmp,
                has_cgroup=cgroup is not None,
            )
            job_input = self._make_input(spare.job_id, undo) if work.stdin else None
            pid, pidfd = self._execute(work, around, spare, job_input, undo)
            job = RunningJob(
                work._replace(on_end=functools.partial(self._gone, work, spare.job_id)),
                spare.body,
                cgroup,
                spawner=self._spawner,
                pid=pid,
                pidfd=pidfd,
                started_at=started_at,
                started_s=started_s,
                buffers=self._buffers,
                kept_tmp=kept_tmp,
                registry=self._registry,
                job_input=job_input,
                keeper=self._keeper,
            )
            undo.pop_all()
            # Before the job's thread runs, because that thread may finish the job at once.
            job.position = position
            self._registry.add(job)
            spare.body.thread.give(job.job_id, job.run)
            return job.job_id

    def _note_what_lives(
        self, spare: Spare, work: Work, _: object, error: BaseException | None, *__: object
    ) -> None:
        """If the kernel has not let go of the killed process of a start, have a thread wait for it.

        Until the process is gone, the start counts as a running job of the user, and keeps its
        cgroup. Nobody can end that wait, so `close` does not join the thread.
        """
        if spare.cgroup is None or not isinstance(error, StartTimeoutError):
            return
        with contextlib.suppress(CgroupError, RuntimeError):
            try:
                spare.cgroup.wait_empty(0)
            except TimeoutError:
                wait = functools.partial(self._await_its_end, spare.cgroup, work)
                name = f"start-{spare.job_id[:8]}"
                threading.Thread(target=wait, name=name, daemon=True).start()
                error.lives = True

    def _await_its_end(self, cgroup: Cgroup, work: Work) -> None:
        with contextlib.suppress(CgroupError):
            cgroup.wait_empty()
            cgroup.remove()
        if work.uid is not None and self._leftovers is not None:
            self._leftovers.end(work.uid)
        if work.on_end is not None:
            work.on_end()

    def _unrecord(self, spare: Spare, work: Work) -> None:
        """Forget a start that has failed, unless it may be repeated and the command may have run.

        If the fork server has died meanwhile, or `close` has killed the process, nobody knows
        whether the command has run. If such a job were forgotten, whoever repeats the start would
        execute the command twice.
        """
        has_died = self._spawner.has_died
        is_known = not has_died and spare.job_id not in self._cut_off
        if work.request_id and spare.process.was_told and not is_known:
            reason = EndReason.LOST if has_died else EndReason.CLOSED
            with contextlib.suppress(StoreError):  # then the row stays, as that of a job that runs
                self._table.give_up(spare.job_id, reason)
        else:
            self._table.delete(spare.job_id)

    def _make_input(self, job_id: str, undo: contextlib.ExitStack) -> JobInput:
        """Return the input of a new job, kept for a successor, which `undo` ends.

        Raises as `start` does.
        """
        job_input = self._new_input(job_id, undo)
        if self._keeper is not None:
            self._keeper.keep(job_id, job_input.kept_fds)
        return job_input

    def _new_input(self, job_id: str, undo: contextlib.ExitStack) -> JobInput:
        """Return the input of a new job, not kept for a successor yet. `undo` ends it."""
        on_end = self._input_end(job_id)
        job_input = JobInput(job_id, is_kept=self._keeper is not None, on_end=on_end)
        undo.callback(job_input.finish)
        return job_input

    def _adopted_input(self, job_id: str, fds: Sequence[int]) -> JobInput:
        """Return the input of a job that goes on. `fds`: its `JobInput.kept_fds`."""
        return JobInput(job_id, InputPipe.adopt(fds), on_end=self._input_end(job_id))

    def _input_end(self, job_id: str) -> Callable[[], None]:
        return functools.partial(self._spawner.end_input, job_id, self._input_place)

    def resume(
        self,
        row: Row,
        body: Body,
        process: Adopted,
        budget: Budget | None,
        on_end: Callable[[], None] | None,
    ) -> None:
        """Go on with a job that a former worker has started.

        `process`: the leader; its pid is 0 if no fork server has the job any more.
        """
        former, going_on = row.job, row.going_on
        budget = budget or self._registry.budget_for(former.owner)
        work = Work(
            argv=[former.command, *former.args],
            owner=former.owner,
            uid=going_on.uid,
            limits=former.limits,
            budget=budget,
            on_end=on_end,
            directory=former.working_directory,
            name=former.name,
            labels=former.labels,
            ending=Ending(former.timeout, going_on.grace, going_on.linger),
            keep_tmp=bool(former.tmp_directory),
        )
        self._prepare_output(body.output, work.owner, budget)
        body.output.charge(budget)
        if work.uid is not None and self._leftovers is not None:
            self._leftovers.begin(work.uid)
        work = work._replace(on_end=functools.partial(self._gone, work, body.job_id))
        job = self._resumed(work, row, body, process)
        job.position = row.position
        self._registry.add(job)
        body.thread.give(job.job_id, job.run)

    def _resumed(self, work: Work, row: Row, body: Body, process: Adopted) -> RunningJob:
        """Return the job that goes on; see `resume`."""
        former = row.job
        cgroup = None
        if self._subtree is not None and row.going_on.has_cgroup:
            cgroup = self._subtree.find(body.job_id, former.limits)
        return RunningJob(
            work,
            body,
            cgroup,
            kept_tmp=former.tmp_directory,
            job_input=self._resume_input(body.job_id, process),
            **self._going_on(row, process),
        )

    def _going_on(self, row: Row, process: Adopted) -> dict[str, Any]:
        """Return the arguments of a `RunningJob` that are the same for every job that goes on."""
        started_at, started_s = row.job.started_at, row.going_on.started_s
        if not process.pid or started_s is None:
            # By the clock, because another boot may have begun since.
            age = datetime.now(UTC) - started_at
            started_s = time.monotonic() - age.total_seconds()
        return {
            "spawner": self._spawner,
            "pid": process.pid,
            "pidfd": process.pidfd,
            "started_at": started_at,
            "started_s": started_s,
            "buffers": self._buffers,
            "registry": self._registry,
            "keeper": self._keeper,
            "notes": process.notes,
        }

    def _resume_input(self, job_id: str, process: Adopted) -> JobInput | None:
        return self._adopted_input(job_id, process.more_fds) if process.more_fds else None

    def _prepare_output(self, output: OutputLog, owner: str, budget: Budget) -> None:
        output.budget = budget
        output.make_room = functools.partial(self._registry.take, owner, budget)
        output.free_disk = functools.partial(self._registry.give_way, owner, budget)

    def _execute(
        self,
        work: Work,
        around: Surroundings,
        spare: Spare,
        job_input: JobInput | None,
        undo: contextlib.ExitStack,
    ) -> tuple[int, int]:
        """Have the spare's process execute the command.

        Returns its pid and a pidfd, which `undo` closes. Raises as `start` does.
        """
        command = work.argv[0]
        tmp = self._scratch.path_of(spare.job_id)
        env = around.variables(spare.job_id, self._environment, tmp)
        try:
            with self._execution(spare):
                pid, pidfd = spare.process.execute(
                    work.argv,
                    env,
                    uid=work.uid,
                    home=around.account.home,
                    directory=around.asked,
                    stdin_fd=job_input.read_fd if job_input else None,
                    timeout_s=_START_TIMEOUT_S,
                    kill=functools.partial(self._kill, spare),
                )
                undo.callback(os.close, pidfd)
                if job_input is not None:
                    job_input.begin()
        except TimeoutError as error:
            raise StartTimeoutError(command, _START_TIMEOUT_S) from error
        except EnterError as error:
            raise DirectoryError(command, work.directory, error.strerror or str(error)) from error
        except AttachError as error:
            path = spare.cgroup.path / "cgroup.procs" if spare.cgroup else Path()
            raise CgroupError(
                f"a new process cannot enter {path}: {error.strerror}",
                path=path,
                value="0",
                remedy="see the kernel's log",
                code=error.errno or 0,
            ) from error
        except OSError as error:
            raise exec_error(command, error, env["PATH"], work.directory) from error
        return pid, pidfd

    @contextlib.contextmanager
    def _execution(self, spare: Spare) -> Iterator[None]:
        """Within this context `close` may kill the process; then raises `WorkerClosedError`."""
        with self._idle:
            if self._closed:
                raise WorkerClosedError
            self._executing[spare.job_id] = spare
        is_cut_off = False
        try:
            yield
        except WorkerClosedError:
            is_cut_off = True
            raise
        finally:
            with self._idle:
                was_killed = self._executing.pop(spare.job_id, None) is None
                if was_killed or is_cut_off:
                    self._cut_off.add(spare.job_id)
        if was_killed:
            raise WorkerClosedError

    def _kill(self, spare: Spare) -> None:
        """Kill the process of a start that hangs; the start itself then fails."""
        # This also kills a process that is not in its cgroup yet, or that is not forked yet: the
        # fork server does one request after the other.
        with contextlib.suppress(SpawnerDiedError):
            self._spawner.kill(spare.job_id)
        # The command may have begun meanwhile, and have children that left the process group.
        if spare.cgroup is not None:
            with contextlib.suppress(CgroupError):
                spare.cgroup.kill()

    def close(self, *, kills: bool = True) -> bool:
        """End the starts that wait for an exec, and refuse all others; False if called before.

        `kills`: False: starts that have begun may go on for 1 s before they are ended. Blocks until
        no call holds this open, for up to 10 s.
        """
        with self._idle:
            if self._closed:
                return False
            self._closed = True
            if not kills and self._idle.wait_for(lambda: not self._busy, _LEAVE_S):
                return True
            executing, self._executing = self._executing, {}
        for spare in executing.values():
            self._kill(spare)
        with self._idle:
            self._idle.wait_for(lambda: not self._busy, _START_TIMEOUT_S)
        return True
