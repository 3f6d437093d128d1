"""The times of a job: timeout, grace and linger (`Ending`); and the wait after its leader's end.

    ending = Ending(timeout=1800, grace=10, linger=2)
    await_others(output_fd, exit_fd, cgroup, time.monotonic() + ending.linger, move=move)

Thread safety: an `Ending` never changes. `await_others` is for the job's thread alone.
"""

from __future__ import annotations

import contextlib
import select
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from cgroups import Cgroup

__all__ = ["MAX_GRACE_S", "Ending", "await_others"]

MAX_GRACE_S: Final = 600.0
"""The longest grace and linger of a job, in seconds."""
_CLOSING_S = 0.05  # between the end of the output and the end of the processes


@dataclass(frozen=True, slots=True)
class Ending:
    """The times that a job is given, in seconds. Raises ValueError for one out of range."""

    timeout: float | None = None
    """How long the leader may run; then the job is stopped. None: as long as it likes."""
    grace: float = 10.0
    """How long a job that has timed out may go on after SIGTERM, before it is killed. 0: it is
    killed at once."""
    linger: float = 2.0
    """How long other processes may hold the job's output after the leader has ended by itself,
    before they are killed. 0: not at all."""

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:  # refuses not-a-number, too
            raise ValueError(f"timeout must be above 0 seconds, not {self.timeout!r}")
        for name, value in (("grace", self.grace), ("linger", self.linger)):
            if not 0 <= value <= MAX_GRACE_S:
                raise ValueError(f"{name} must be 0 to {MAX_GRACE_S:g} seconds, not {value!r}")


def await_others(  # noqa: PLR0913 -- what a job consists of
    output_fd: int,
    exit_fd: int,
    cgroup: Cgroup | None,
    deadline_s: float,
    *,
    move: Callable[[], object],
    holders_only: bool = True,
    leave_fd: int | None = None,
) -> None:
    """Move output until the other processes of a job have ended, or until `deadline_s`.

    `output_fd`, `exit_fd`: the read ends of the job's output pipe and exit pipe. `cgroup`: the
    job's; None without. `deadline_s`: by `time.monotonic`. `move`: stores what is in the output
    pipe. `holders_only`: wait only for processes that hold the output open; the others get 50 ms,
    because many programs close their output right before they end. `leave_fd`: ends the wait when
    it is readable.
    """
    # FileNotFoundError: somebody else has removed the cgroup.
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
        poll = select.poll()
        for fd in (output_fd, *(() if leave_fd is None else (leave_fd,))):
            poll.register(fd, select.POLLIN)
        # Without cgroups the fork server writes to the exit pipe when the others have ended or were
        # killed. With cgroups the pipe only gets end-of-file, when the leader's group is gone.
        poll.register(exit_fd, select.POLLIN)
        events = None
        if cgroup is not None:
            events = opened.enter_context(cgroup.events())
            poll.register(events, select.POLLPRI)
        while events is None or events.is_populated():
            left_ms = (deadline_s - time.monotonic()) * 1000
            ready = dict(poll.poll(left_ms)) if left_ms > 0 else {}
            if left_ms <= 0 or leave_fd in ready:
                return
            output = ready.get(output_fd, 0)
            if output & select.POLLIN:
                move()
            elif output:  # end-of-file
                poll.unregister(output_fd)
                if holders_only:
                    deadline_s = min(deadline_s, time.monotonic() + _CLOSING_S)
            if exit_fd in ready:
                if cgroup is None:
                    return
                poll.unregister(exit_fd)
