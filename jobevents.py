"""What happens to jobs, as a client sees it, over a connection that may break: `JobEvents`.

    events = JobEvents(link, open_call, kept)
    for event in events:
        print(event.kind, event.job.job_id)

`Client.watch` makes it. The server begins each watch with the jobs that are there. So a watch that
was begun anew tells what happened meanwhile: `JobEvents` compares it with what it told before.

Thread safety: one thread iterates; any thread may `close`.
"""

from __future__ import annotations

import math
import time
from collections import deque

import workerservice_pb2 as worker_pb
from reopening import Reopening

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, Self

    from clienterrors import ClientError
    from link import Link

__all__ = ["JobEvents"]

_LIVE = {worker_pb.JOB_STATUS_QUEUED, worker_pb.JOB_STATUS_RUNNING}


class JobEvents:
    """What happens to jobs: an iterator of the messages `JobEvent`, as it happens.

    First come the jobs that are there, then every change. Each step blocks while nothing happens,
    and may raise `ClientError`. After a lost connection it goes on: then come the ends and removals
    that happened meanwhile, and the jobs that were started meanwhile as jobs that are there. It
    ends only with an error, and by `close`.

    `open_call`: makes the call, with its metadata and the time that it may take, or None. `kept`:
    returns the jobs with these IDs that the server has. `timeout_s`: when to end, with an error of
    the code DEADLINE_EXCEEDED; None: never. `job_ids`: those that the call asks for.
    """

    def __init__(
        self,
        link: Link,
        open_call: Callable[[Any, float | None], Any],
        kept: Callable[[Sequence[str]], Iterable[worker_pb.Job]],
        timeout_s: float | None = None,
        job_ids: Iterable[str] = (),
    ) -> None:
        self._link = link
        self._open_call = open_call
        self._kept = kept
        self._ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._reopening = Reopening(link)
        self._known: dict[str, worker_pb.Job] = {}  # what was told
        self._asked = {job_id.lower() for job_id in job_ids}  # and was not told to be removed
        self._pending: deque[worker_pb.JobEvent] = deque()  # what happened during an outage
        self._is_anew = False  # this is not the first call
        self._call = self._open()

    def _open(self) -> Any:
        return self._open_call(self._reopening.metadata(), self._left_s())

    def _left_s(self) -> float | None:
        return None if self._ends_s is None else max(0.0, self._ends_s - time.monotonic())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> worker_pb.JobEvent:
        while True:
            try:
                if self._pending:
                    return self._pending.popleft()
                event: worker_pb.JobEvent = next(self._call)
            except self._link.rpc_error as error:
                self._begin_anew(self._link.explain(error))
                continue
            self._reopening.succeeded()
            if self._is_news(event):
                return event

    def _begin_anew(self, error: ClientError) -> None:
        """Watch again, and note what happened meanwhile. Raises `error` if it is final."""
        left_s = self._left_s()
        self._reopening.recover(error, self._call, most_s=math.inf if left_s is None else left_s)
        self._is_anew = True
        self._call = self._open()
        if self._reopening.closed.is_set():
            self._call.cancel()
        if any(item.key == "accepted" for item in self._call.initial_metadata() or ()):
            self._find_missed()

    def _find_missed(self) -> None:
        """Note the ends and removals of the outage. The new watch tells later ones."""
        kept = {job.job_id: job for job in self._kept(list(self._known))}
        for job_id, told in list(self._known.items()):
            job = kept.get(job_id)
            if job is None:
                kind, job = worker_pb.JOB_EVENT_KIND_REMOVED, self._known.pop(job_id)
                self._asked.discard(job_id)
            elif job.status != told.status:
                kind = _change(job)
                self._known[job_id] = job
            else:
                continue
            self._pending.append(worker_pb.JobEvent(kind=kind, job=job))

    def _is_news(self, event: worker_pb.JobEvent) -> bool:
        """Whether the event was not told before an outage, or found after it. Notes the event."""
        job = event.job
        told = self._known.get(job.job_id)
        if event.kind == worker_pb.JOB_EVENT_KIND_REMOVED:
            is_asked = job.job_id.lower() in self._asked
            self._asked.discard(job.job_id.lower())
            self._known.pop(job.job_id, None)
            return told is not None or is_asked or not self._is_anew
        is_old = told is not None and (told.status == job.status or told.status not in _LIVE)
        if is_old and self._is_anew:
            return False
        self._known[job.job_id] = job
        if told is not None and self._is_anew:
            event.kind = _change(job)
        return True

    def close(self) -> None:
        """End it; idempotent. A thread that waits for an event gets a `ClientError`."""
        self._reopening.closed.set()
        self._call.cancel()


def _change(job: worker_pb.Job) -> worker_pb.JobEventKind:
    """Return how a job came to its present status."""
    if job.status in _LIVE:
        return worker_pb.JOB_EVENT_KIND_STARTED
    return worker_pb.JOB_EVENT_KIND_ENDED
