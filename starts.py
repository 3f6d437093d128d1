"""Remembers which job a start has made, so that a repeated start makes no second one.

A caller who does not receive the answer to a start does not know whether there is a job. The caller
may repeat the start if both have the same request ID, a UUID of the caller's choice.

    starts = Starts(worker.started_by)
    job_id, is_new = starts.once("alice", request_id, digest, start)

The store has the request ID with the job, so it is known as long as the job, also after a restart.
This module knows the starts that are under way.

Thread safety: everything may be called from any thread.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OtherStartError", "Starts"]


class OtherStartError(Exception):
    """The request ID belongs to a start of something else. Attribute: `job_id`."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"this request ID belongs to the start of job {job_id}, which has another command, "
            "other arguments or other options; choose a new UUID for each start"
        )
        self.job_id = job_id


class _Start:
    """One start that is under way. Attributes: `digest`, of the request; `job_id`, its result."""

    __slots__ = ("digest", "job_id")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.job_id: Future[str] = Future()


class Starts:
    """The starts with request IDs.

    `find`: returns the job that a user's request has started, with the digest; None if no such job
    is kept. It must know a job when its start has returned.
    """

    def __init__(self, find: Callable[[str, str], tuple[str, bytes] | None]) -> None:
        self._find = find
        # Guards `_starts`. Held while `find` is called, never while a job is started.
        self._lock = threading.Lock()
        self._starts: dict[tuple[str, str], _Start] = {}

    def once(
        self, user: str, request_id: str, digest: bytes, start: Callable[[], str]
    ) -> tuple[str, bool]:
        """Return the ID of the job of this request, and whether this call has started it.

        Calls `start` unless another call has done so and its job is kept. Blocks while another
        call starts the job, and raises the same error if that start fails. `digest`: of all that
        is to be started. Raises `OtherStartError` if the request ID came with another digest.
        """
        key = (user, request_id)
        mine = _Start(digest)
        with self._lock:
            under_way = self._starts.get(key)
            known = None if under_way else self._find(user, request_id)
            if under_way is None and known is None:
                self._starts[key] = mine
        if under_way is not None:
            known = under_way.job_id.result(), under_way.digest
        if known is None:
            return self._start(key, mine, start), True
        if known[1] != digest:
            raise OtherStartError(known[0])
        return known[0], False

    def _start(self, key: tuple[str, str], mine: _Start, start: Callable[[], str]) -> str:
        try:
            job_id = start()
        except BaseException as error:
            mine.job_id.set_exception(error)
            raise
        else:
            mine.job_id.set_result(job_id)
            return job_id
        finally:
            with self._lock:
                del self._starts[key]
