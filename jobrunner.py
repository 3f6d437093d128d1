"""What the services need of whoever runs the jobs: `JobRunner`.

`worker.Worker` runs them on this machine, `slurmworker.SlurmWorker` on a cluster. The services do
not ask which one it is. `worker.py` describes the methods.

Thread safety: any thread may call any method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from budget import Budget
    from finding import JobFilter
    from resuming import Terms
    from worker import Account, Ending, InputWriter, Job, Limits, Subscription, Watch

__all__ = ["JobRunner"]


class JobRunner(Protocol):
    """Starts jobs, knows them, and ends them."""

    def start(  # noqa: PLR0913 -- those of `Worker`
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        owner: str = "",
        limits: Limits | None = None,
        uid: int | None = None,
        account: Account | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        keep_tmp: bool = False,
        budget: Budget | None = None,
        on_end: Callable[[], None] | None = None,
        name: str = "",
        labels: Mapping[str, str] | None = None,
        stdin: bool = False,
        ending: Ending | None = None,
        request_id: str = "",
        digest: bytes = b"",
        no_queue: bool = False,
    ) -> str:
        """Start a job and return its ID."""

    def resume(self, terms: Terms) -> None:
        """Go on with the jobs that a former process has left."""

    def started_by(self, owner: str, request_id: str) -> tuple[str, bytes] | None:
        """Return the job that a request has started, and the digest of the request."""

    def stop(self, job_id: str, *, reason: str = "", grace: float = 0) -> Job:
        """End a job; return its state then."""

    def signal(self, job_id: str, number: int, *, everything: bool = False) -> None:
        """Send a signal to the leader of a job, or to every process."""

    def remove(self, job_id: str) -> None:
        """Forget a finished job and its output."""

    def make_room(self, owner: str, budget: Budget) -> Budget | None:
        """Make room for a byte in a budget, if it is full; return the budget that stays full."""

    def owner(self, job_id: str) -> str | None:
        """Return whose job it is; None if there is no such job."""

    def status(self, job_id: str, *, live_usage: bool = True, owner: str | None = None) -> Job:
        """Return what is known of a job. `owner`: a job of anybody else counts as unknown."""

    def observe(self, job_id: str) -> Callable[[], Job]:
        """Return a function that returns the state of a job, even after the job was removed."""

    def charge(self, budget_for: Callable[[str], Budget]) -> None:
        """Have budgets count the output that former workers have kept."""

    def list_after(
        self,
        position: int,
        *,
        owner: str | None = None,
        matching: JobFilter = ...,
        live_usage: bool = False,
        newest_first: bool = False,
    ) -> Iterator[tuple[int, Job]]:
        """Yield jobs with their positions."""

    def watch(self, matching: JobFilter = ...) -> Watch:
        """Return an iterator of the jobs that are there, and then of what happens to jobs."""

    def stream(  # noqa: PLR0913 -- those of `Worker`
        self,
        job_id: str,
        *,
        subscriber: str = "",
        offset: int = 0,
        tail_lines: int | None = None,
        since: datetime | None = None,
        follow: bool = True,
        timestamps: bool = False,
    ) -> Subscription:
        """Read the output of a job as it comes."""

    def open_input(self, job_id: str, offset: int | None = None) -> InputWriter:
        """Return a writer to the stdin of a job."""
