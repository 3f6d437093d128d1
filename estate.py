"""What the fork server keeps of each job, so that the next main process can take the job over.

    estate = Estate()
    estate.add("a", pid, output_fd, pidfd)
    estate.note_end("a", {"exit_code": 0})
    kept = estate.jobs["a"]
    estate.forget("a")

For each job the fork server keeps the read end of the output pipe, a pidfd of the leader and,
later, how the leader ended. As long as the read end is open, a job that writes waits when its
output pipe is full, and loses nothing. The main process can add descriptors (`Estate.keep`):

- for a job with an input, the write end of the input pipe, so that the job does not read
  end-of-file, and a descriptor whose offset tells how much that pipe has taken (`inputpipe.py`);
- for a job on a cluster, before these, what belongs to its srun (`slurmchannel.py`).

A leader that executes nothing, because its main process died or the exec failed, writes its pid
into `failures_fd`. Nothing is kept of such a leader: it never was a job.

Thread safety: for the fork server, which has one thread.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from typing import Any

from journal import Journal
from messages import close_all

__all__ = ["Estate", "Kept", "note_failure"]

_FIRST = 2  # the place in `Kept.fds` of the first descriptor that `Estate.keep` was given
_PID = struct.Struct("i")
_READ_BYTES = 64 * 1024


class Kept:
    """What is kept of one job.

    `end`: the last line for the job's exit pipe; None while the job runs. `notes`: what the main
    process has noted about the job for its successor.
    """

    __slots__ = ("end", "fds", "notes", "pid")

    def __init__(
        self,
        pid: int,
        fds: list[int],
        end: dict[str, Any] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.pid = pid
        self.notes: dict[str, Any] = notes or {}
        self.fds = fds  # of the output pipe, the leader's pidfd; then those of `Estate.keep`
        self.end = end


class Estate:
    """What is kept of all jobs.

    Attributes: `jobs`, what is kept of each; `failures_fd`, for leaders; `is_farewell`, whether
    leaders that end from now on have been told to.
    """

    is_farewell = False

    def __init__(self) -> None:
        self.jobs: dict[str, Kept] = {}
        self._failed: set[int] = set()
        self._read_fd, self.failures_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def save(self) -> dict[str, Any]:
        """Return all of it for another program that this process is about to execute."""
        jobs = {job: [kept.pid, kept.fds, kept.end, kept.notes] for job, kept in self.jobs.items()}
        failures = [self._read_fd, self.failures_fd]
        return {"failures": failures, "failed": list(self._failed), "jobs": jobs}

    def load(self, state: dict[str, Any]) -> None:
        """Continue with what `save` returned in another program."""
        for fd in (self._read_fd, self.failures_fd):
            os.close(fd)
        self._read_fd, self.failures_fd = state["failures"]
        self._failed = set(state["failed"])
        self.jobs = {job: Kept(*parts) for job, parts in state["jobs"].items()}

    @property
    def fds(self) -> list[int]:
        """All descriptors."""
        kept = [fd for each in self.jobs.values() for fd in each.fds]
        return [self._read_fd, self.failures_fd, *kept]

    def add(self, job: str, pid: int, output_fd: int, pidfd: int) -> None:
        """Begin to keep a job, with copies of these descriptors. Raises OSError."""
        self._failed.discard(pid)
        kept_fd = os.dup(output_fd)
        try:
            self.jobs[job] = Kept(pid, [kept_fd, os.dup(pidfd)])
        except BaseException:
            os.close(kept_fd)
            raise

    def serve(self, what: str, request: dict[str, Any], fds: list[int]) -> None:
        """Do what a main process asks for. Raises OSError, LookupError, TypeError, ValueError."""
        job = request["job"]
        match what:
            case "note":
                if job in self.jobs:
                    self.jobs[job].notes |= request["notes"]
            case "keep":
                self.keep(job, fds)
            case "end input":
                self.end_input(job, request["place"])
            case "forget":
                self.forget(job)
            case _:
                raise ValueError("unknown request")

    def keep(self, job: str, fds: list[int]) -> None:
        """Keep copies of these descriptors of a job, too. Raises OSError."""
        kept = self.jobs[job]
        for fd in fds:
            kept.fds.append(os.dup(fd))

    def end_input(self, job: str, place: int) -> None:
        """Close the write end of the input of a job; idempotent.

        `place`: where the write end stands among the descriptors that `keep` was given: last.
        """
        if job in self.jobs:
            close_all(self.jobs[job].fds[_FIRST + place :])
            del self.jobs[job].fds[_FIRST + place :]

    def was_executed(self, pid: int) -> bool:
        """Whether a leader that has ended, and is not reaped yet, had executed its command."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._read_fd, _READ_BYTES)
            self._failed.update(pid for (pid,) in _PID.iter_unpack(data))
        was_executed = pid not in self._failed
        self._failed.discard(pid)
        return was_executed

    def note_end(self, job: str, end: dict[str, Any]) -> None:
        """Keep how the leader ended; or forget the job, if it never began."""
        if not end["was_executed"]:
            self.forget(job)
        elif job in self.jobs:
            self.jobs[job].end = end | {"was_killed": self.is_farewell}

    def count_running(self) -> int:
        """Return how many of the jobs have not ended."""
        return sum(kept.end is None for kept in self.jobs.values())

    def forget(self, job: str) -> None:
        """Keep nothing of the job any more; idempotent."""
        kept = self.jobs.pop(job, None)
        for fd in kept.fds if kept else ():
            os.close(fd)

    def ends(self, *, has_reports: bool) -> dict[str, dict[str, Any]]:
        """Return how each job ended, after all that still ran were killed.

        `ended_at`: when that was, by the clock. `reports`: what the step of a job on a cluster has
        reported, if `has_reports`: then `keep` was given the pipe first, and its journal.
        """
        ends = {}
        for job, kept in self.jobs.items():
            end = kept.end or {"was_killed": True, "signal": 9, "ended_s": time.monotonic()}
            ended_at = time.time() - (time.monotonic() - end["ended_s"])
            ends[job] = end | {"ended_at": ended_at}
            if has_reports and len(kept.fds) > _FIRST:
                ends[job]["reports"] = _read_reports(*kept.fds[_FIRST : _FIRST + 2])
        return ends


def _read_reports(pipe_fd: int, journal_fd: int) -> str:
    """Return what was read from the pipe, and what is in it."""
    journal = Journal(journal_fd)
    with contextlib.suppress(BlockingIOError):
        while journal.take(pipe_fd, _READ_BYTES):
            pass
    return b"\n".join(journal.parts()).decode(errors="replace")


def note_failure(failures_fd: int) -> None:
    """Tell the fork server that this process, a leader, executes nothing."""
    with contextlib.suppress(OSError):  # failures_fd is -1 if nobody keeps jobs
        os.write(failures_fd, _PID.pack(os.getpid()))
