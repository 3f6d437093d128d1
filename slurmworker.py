"""Runs jobs on a Slurm cluster (`SlurmWorker`), with the interface of `worker.Worker`.

    with SlurmWorker(SlurmSettings(), instance="3f2a") as worker:
        job_id = worker.start("hostname")

Records, output, retention and the fork server are those of `Worker`. Only the launching and the
killing differ: the fork server starts one srun for each job (`slurmjob.py`), as the job's user.
Slurm places the job, lets it wait, and enforces its cores, memory and time.

With a restart window the fork server keeps each srun and its pipes for the next worker, which goes
on with the job in `Worker.resume`. What else a former worker of the same instance left behind on
the cluster is ended by `sweep`: at the start, and every minute, because a job whose two srun
processes were killed runs on.

Thread safety: see `Worker`. One more thread sweeps.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from errors import ResourceError, WorkerClosedError, in_words
from jobstate import EndReason
from journal import Journal
from limits import NO_LIMITS
from parts import Parts
from slurm import Cluster, SlurmSettings, step_order
from slurmchannel import Channel
from slurminput import StepInput
from slurmjob import SlurmJob
from spawner import SpawnerDiedError, read_exit
from starting import Starter
from worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from environment import Surroundings
    from jobinput import JobInput
    from jobstate import Work
    from jobtable import Row
    from limits import Enforcement
    from spares import Body, Spare
    from spawner import Adopted

__all__ = ["SlurmSettings", "SlurmWorker", "maker"]

logger = logging.getLogger(__name__)

_SWEEP_S = 60.0
_LAUNCH_S = 10.0  # how long the exec of srun may take
# Where the input's descriptors begin among those that the fork server keeps of a job. Before them
# come those of the channel.
_INPUT_FDS = 3


class SlurmStarter(Starter):
    """Starts jobs on the cluster."""

    _input_place = _INPUT_FDS + 3

    def __init__(self, cluster: Cluster, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._cluster = cluster
        # Guarded by the lock of the base class: the jobs that have not begun.
        self._beginning: dict[str, SlurmJob] = {}

    def starting(self) -> set[str]:
        """Return the IDs of the jobs that are being started."""
        with self._idle:
            return set(self._executing)

    def _launch(self, work: Work, around: Surroundings) -> str:
        if work.keep_tmp:
            raise ResourceError("a job on a cluster cannot keep its TMPDIR, which is on the node")
        with contextlib.ExitStack() as undo:
            spare = self._spares.take()
            undo.callback(self._unrecord, spare, work)  # runs last, when no process is left
            undo.callback(spare.discard)
            budget = work.budget or self._registry.budget_for(work.owner)
            self._prepare_output(spare.body.output, work.owner, budget)
            with self._execution(spare):
                job = self._begin(work, around, spare, undo)
                undo.pop_all()
            return job.job_id

    def _begin(
        self, work: Work, around: Surroundings, spare: Spare, undo: contextlib.ExitStack
    ) -> SlurmJob:
        """Start srun, and wait until the command runs or waits. `undo` then undoes all."""
        started_at, started_s = datetime.now(UTC), time.monotonic()
        position = self._table.begin(
            spare.job_id, work, limits=NO_LIMITS, started_at=started_at, has_cgroup=True
        )
        channel, job_input, step_input = self._make_pipes(work, spare.job_id, undo)
        tmp = f"/tmp/jw-{spare.job_id}"  # noqa: S108 -- the step makes it, with mode 0700
        env = around.variables(spare.job_id, self._environment, tmp)
        order = step_order(
            work,
            env,
            home=around.account.home,
            directory=around.asked,
            tmp=tmp,
            require=self._cluster.required(work.limits),
        )
        pid, pidfd = self._run_srun(work, spare, channel, order)
        undo.callback(os.close, pidfd)
        if job_input is not None:
            job_input.begin()
        job = SlurmJob(
            work._replace(on_end=functools.partial(self._gone, work, spare.job_id)),
            spare.body,
            channel=channel,
            step_input=step_input,
            cluster=self._cluster,
            search_path=env["PATH"],
            publish=self._registry.add,
            changed=self._registry.tell_started,
            spawner=self._spawner,
            pid=pid,
            pidfd=pidfd,
            started_at=started_at,
            started_s=started_s,
            buffers=self._buffers,
            kept_tmp="",
            registry=self._registry,
            job_input=job_input,
            keeper=self._keeper,
        )
        job.position = position
        undo.callback(job.close_channel)
        undo.callback(spare.body.thread.join)
        with self._idle:
            self._beginning[spare.job_id] = job
            is_cut_off = spare.job_id not in self._executing
        try:
            spare.body.thread.give(job.job_id, job.run)
            if is_cut_off:
                job.kill(EndReason.CLOSED)
            job.await_begin()
        finally:
            with self._idle:
                del self._beginning[spare.job_id]
        return job

    def _make_pipes(
        self, work: Work, job_id: str, undo: contextlib.ExitStack
    ) -> tuple[Channel, JobInput | None, StepInput | None]:
        """Make the pipes of a job beside the output, and have the fork server keep them."""
        channel = Channel()
        undo.callback(channel.close)
        job_input = step_input = None
        kept = channel.kept_fds
        if work.stdin:
            job_input = self._new_input(job_id, undo)
            step_input = StepInput.make(channel, job_input)
            undo.callback(step_input.close)
            kept += [*step_input.kept_fds, *job_input.kept_fds]
        if self._keeper is not None:
            self._keeper.keep(job_id, kept)
        return channel, job_input, step_input

    def _resumed(self, work: Work, row: Row, body: Body, process: Adopted) -> SlurmJob:
        channel = Channel(process.more_fds[:_INPUT_FDS])
        channel.begin()
        notes = dict(process.notes)
        channel.add_reports(notes.pop("reports", ""))
        job_input = step_input = None
        if len(process.more_fds) > _INPUT_FDS:
            fd, journal_fd, *input_fds = process.more_fds[_INPUT_FDS:]
            job_input = self._adopted_input(body.job_id, input_fds)
            step_input = StepInput(channel, fd, Journal(journal_fd), is_resumed=True)
        return SlurmJob(
            work,
            body,
            channel=channel,
            step_input=step_input,
            cluster=self._cluster,
            search_path="",
            publish=self._registry.add,
            changed=self._registry.tell_started,
            is_resumed=True,
            kept_tmp="",
            job_input=job_input,
            **self._going_on(row, process) | {"notes": notes},
        )

    def _run_srun(
        self, work: Work, spare: Spare, channel: Channel, order: Mapping[str, str]
    ) -> tuple[int, int]:
        """Have the spare's process execute srun; return its pid and a pidfd."""
        stdin_fd, stderr_fd = channel.their_fds
        try:
            return spare.process.execute(
                self._cluster.srun(work, spare.job_id, variables=len(order)),
                {**self._cluster.environment, **order},
                uid=work.uid,
                stdin_fd=stdin_fd,
                stderr_fd=stderr_fd,
                timeout_s=_LAUNCH_S,
                kill=functools.partial(self._spawner.kill, spare.job_id),
            )
        except OSError as error:
            raise ResourceError(f"srun cannot be executed: {error.strerror}") from error
        finally:
            channel.begin()

    def _kill(self, spare: Spare) -> None:
        with self._idle:
            job = self._beginning.get(spare.job_id)
        if job is not None:
            job.kill(EndReason.CLOSED)

    def run_as(self, uid: int | None, argv: list[str]) -> None:
        """Run a command as the user, with Slurm's environment; return when it has ended.

        Raises OSError, `SpawnerDiedError`.
        """
        name = f"sweep-{uuid.uuid4()}"
        with contextlib.ExitStack() as undo:
            self._scratch.make(name)
            undo.callback(self._scratch.remove, name)
            exit_fd, their_exit_fd = os.pipe()
            undo.callback(os.close, exit_fd)
            with open(os.devnull, "wb") as null:
                try:
                    process = self._spawner.fork(
                        name,
                        stdout_fd=null.fileno(),
                        exit_fd=their_exit_fd,
                        output_fd=null.fileno(),
                    )
                    undo.callback(self._spawner.forget, name)
                finally:
                    os.close(their_exit_fd)
                with process:
                    _, pidfd = process.execute(argv, self._cluster.environment, uid=uid)
            os.close(pidfd)
            while (end := read_exit(exit_fd)) is not None and not end.is_final:
                pass


class _SlurmParts(Parts):
    """The parts of a `SlurmWorker`. Attribute: `slurm_starter`."""

    def __init__(self, cluster: Cluster, **options: Any) -> None:
        self._cluster = cluster
        self.cluster = cluster.settings.conf or "Slurm's own slurm.conf"
        super().__init__(**options)

    def _make_starter(self, environment: Mapping[str, str]) -> Starter:
        self.slurm_starter = SlurmStarter(
            self._cluster,
            self.spares,
            self.spawner,
            None,
            self.registry,
            self.table,
            None,
            self.scratch,
            environment=environment,
            keeper=self.keeper,
        )
        return self.slurm_starter


def maker(settings: SlurmSettings, state_dir: Path) -> Callable[..., Worker]:
    """Return what makes the worker of a program that keeps its state in this directory."""
    # The same after a restart; another one for each program that shares the cluster.
    place = f"{socket.gethostname()}:{state_dir.resolve()}"
    instance = hashlib.sha256(place.encode()).hexdigest()[:12]
    return functools.partial(SlurmWorker, settings, instance)


class SlurmWorker(Worker):
    """Runs jobs on a cluster until it is closed. A context manager.

    `settings`: how the cluster is used. `instance`: the same whenever this worker is made
    again, and another one for every other worker of the cluster. `enforcement`: with "require" a
    job does not run on a node that does not enforce each of its limits; otherwise it does. The
    others are those of `Worker`. With `uids` and `host_accounts` jobs run as users of the cluster.

    `start` returns when the command runs, or when the job waits in the queue. With `no_queue` it
    raises `ResourceError` instead, if no node is free for 10 s.

    Raises as `Worker` does; `ResourceError` if there is no srun.
    """

    def __init__(
        self,
        settings: SlurmSettings,
        instance: str,
        *,
        enforcement: Enforcement = "auto",
        **options: Any,
    ) -> None:
        self.cluster = Cluster(settings, instance, enforcement)
        self.cluster.check()
        # Guards _is_over; notified by `close`. Never held during I/O.
        self._sweeping = threading.Condition()
        self._is_over = False
        super().__init__(enforcement="off", **options)
        self._sweeper = threading.Thread(target=self._sweep_often, name="slurm-sweep", daemon=True)
        if not self.has_taken_over:
            # What Slurm has now comes from a former run. It is ended here, perhaps still as root.
            left = [job.number for job in self.cluster.jobs() if self.cluster.confirms(job)]
            self.cluster.cancel(left)
        if self._uids is None:
            self._sweeper.start()

    def _make_parts(self, **options: Any) -> Parts:
        parts = _SlurmParts(self.cluster, **options)
        self._slurm_starter = parts.slurm_starter
        return parts

    def drop_privileges(self, uid: int) -> None:
        """See `Worker.drop_privileges`."""
        super().drop_privileges(uid)
        self._sweeper.start()  # not before: that needs a process without threads

    def _sweep_often(self) -> None:
        while True:
            with self._sweeping:
                if self._sweeping.wait_for(lambda: self._is_over, _SWEEP_S):
                    return
            try:
                self.sweep()
            except (OSError, SpawnerDiedError, WorkerClosedError) as error:
                logger.warning(
                    "what is left over on the cluster could not be ended: %s", in_words(error)
                )

    def sweep(self) -> list[str]:
        """End the jobs of this instance that Slurm has and this worker has not; return their IDs.

        Raises OSError, `SpawnerDiedError`, `WorkerClosedError`.
        """
        found = self.cluster.jobs()  # before the others: a job is known here before Slurm has it
        known = self._slurm_starter.starting() | self._parts.unresumed
        known |= {job.job_id for job in self._registry.running() if not job.ended()}
        lost = [job for job in found if job.job_id not in known and self.cluster.confirms(job)]
        for uid in {job.uid for job in lost}:
            numbers = [job.number for job in lost if job.uid == uid]
            with self._starter.open():
                if self._uids is None:
                    self.cluster.cancel(numbers)
                elif uid in self._uids:
                    self._slurm_starter.run_as(uid, self.cluster.cancel_command(numbers))
        return [job.job_id for job in lost]

    def leave(self) -> None:
        """See `Worker.leave`."""
        with self._swept_no_more():
            super().leave()

    def close(self, *, grace: float = 0) -> None:
        """See `Worker.close`."""
        with self._swept_no_more():
            super().close(grace=grace)

    @contextlib.contextmanager
    def _swept_no_more(self) -> Iterator[None]:
        """Have the thread that sweeps end, at the latest with this context."""
        with self._sweeping:
            self._is_over = True
            self._sweeping.notify_all()
        yield
        if self._sweeper.ident is not None:
            self._sweeper.join()
