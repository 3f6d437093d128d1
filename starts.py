"""Remembers which job a start has made, so that a repeated start makes no second one.

A caller who does not receive the answer to a start does not know whether there is a job. The caller
may repeat the start if both have the same request ID, a UUID of the caller's choice.

    starts = Starts(is_kept)
    job_id, is_new = starts.once("alice", request_id, digest, start)

Thread safety: everything may be called from any thread.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OtherStartError", "Starts"]

_FEW = 256  # so many starts are not searched for jobs that are no longer kept


class OtherStartError(Exception):
    """The request ID belongs to a start of something else. Attribute: `job_id`."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"this request ID belongs to the start of job {job_id}, which has another command, "
            "other arguments or other options; choose a new UUID for each start"
        )
        self.job_id = job_id


class _Start:
    """One start. Attributes: `digest`, of the request; `job_id`, set when the job was started."""

    __slots__ = ("digest", "job_id")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.job_id: Future[str] = Future()


class Starts:
    """The starts of the jobs that are kept, by their users and request IDs.

    `is_kept`: whether there still is a job of this ID. It must not block.
    """

    def __init__(self, is_kept: Callable[[str], bool]) -> None:
        self._is_kept = is_kept
        # Guards the two below. Held while `is_kept` is called, never while a job is started.
        self._lock = threading.Lock()
        self._starts: dict[tuple[str, str], _Start] = {}
        self._too_many = _FEW

    def once(
        self, user: str, request_id: str, digest: bytes, start: Callable[[], str]
    ) -> tuple[str, bool]:
        """Return the ID of the job of this request, and whether this call has started it.

        Calls `start` unless another call has done so and its job is kept. Blocks while another
        call starts the job, and raises the same error if that start fails. `digest`: of all that
        is to be started. Raises `OtherStartError` if the request ID came with another digest.
        """
        key = (user, request_id)
        with self._lock:
            known = self._starts.get(key)
            if known is not None and self._is_over_locked(known):
                known = None
            if known is None:
                self._sweep_locked()
                mine = self._starts[key] = _Start(digest)
        if known is None:
            return self._start(key, mine, start), True
        job_id = known.job_id.result()
        if known.digest != digest:
            raise OtherStartError(job_id)
        return job_id, False

    def _start(self, key: tuple[str, str], mine: _Start, start: Callable[[], str]) -> str:
        try:
            job_id = start()
        except BaseException as error:
            with self._lock:
                del self._starts[key]
            mine.job_id.set_exception(error)
            raise
        mine.job_id.set_result(job_id)
        return job_id

    def _is_over_locked(self, start: _Start) -> bool:
        """Whether the start's job is no longer kept."""
        return start.job_id.done() and not self._is_kept(start.job_id.result())

    def _sweep_locked(self) -> None:
        """Forget the starts whose jobs are gone, each time their number has doubled."""
        if len(self._starts) < self._too_many:
            return
        self._starts = {
            key: start for key, start in self._starts.items() if not self._is_over_locked(start)
        }
        self._too_many = max(_FEW, 2 * len(self._starts))
