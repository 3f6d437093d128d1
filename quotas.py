"""Counts what each user has, and all users together have, and refuses what exceeds a ceiling.

What is counted: running jobs, the memory of their arguments, starts, open streams and kept output.
The ceilings are those of `settings.py`. Above a ceiling a `QuotaError` is raised at once; it names
the ceiling by its key in the configuration. No call waits for room, and a refused call counts for
nothing. Output of finished jobs does not cause a refusal: those jobs are removed first
(`make_room`).

    quotas = Quotas(config.per_user, config.in_all, config.job_output_bytes)
    quotas.check_output("alice")
    job_ended = quotas.start("alice", argv_bytes=500)
    log = OutputLog(path, budget=quotas.output("alice"))
    ...
    job_ended()

Pass only names of authenticated users, because the counts of a name are kept for ever.

Thread safety: every method, and every returned function, may be called from any thread. One lock
guards all counts and is held for a few instructions at a time. The budgets (`budget.py`)
have locks of their own; the lock of this module is not held while one of those is taken.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from budget import Budget
from units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from settings import Quota

__all__ = ["QuotaError", "Quotas", "Use"]

_EVERYBODY = "all users together"


class QuotaError(Exception):
    """A ceiling is reached; the message names it.

    Attribute: `retry_after_s`, in whole seconds, at least 1; None if waiting may not help.
    """

    def __init__(self, what: str, retry_after_s: int | None = None) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


class Use(NamedTuple):
    """How much of a ceiling is used. `ceiling`: None if there is none."""

    user: str | None
    """None: all users together."""
    name: str
    """The key of the configuration."""
    used: int
    ceiling: int | None

    def in_words(self, amount: int) -> str:
        """Return an amount of what is counted here."""
        return format_size(amount) if self.name == "kept_output" else str(amount)


class Quotas:
    """Counts what users have, and compares it with the ceilings `per_user` and `in_all`.

    `job_output_bytes`: how much of one job's output is kept; None for no ceiling.
    `make_room`: `Worker.make_room` or a function like it. It removes finished jobs until a user's
    budget has a byte left, and returns the budget that still has none, or None on success.
    Without `make_room` nothing is removed. `clock`: returns seconds, and never goes back.
    """

    def __init__(
        self,
        per_user: Quota,
        in_all: Quota,
        job_output_bytes: int | None,
        *,
        make_room: Callable[[str, Budget], Budget | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_user = per_user
        self._job_output_bytes = job_output_bytes
        self._job_ceiling = _ceiling("this job's", job_output_bytes, "per_job")
        self._make_room = make_room or _used_up
        self._clock = clock
        # Guards all accounts. Never held while another lock is taken. Reentrant: while a thread
        # holds it, the garbage collector may close an abandoned stream in the same thread, and
        # that takes the lock again.
        self._lock = threading.RLock()
        all_output = Budget(
            in_all.output_bytes, _ceiling("the", in_all.output_bytes, "in_all", _EVERYBODY)
        )
        self._all = _Account(in_all, all_output)
        self._users: dict[str, _Account] = {}

    def start(self, user: str, *, argv_bytes: int = 0) -> Callable[[], None]:
        """Count one start and, from now on, one running job of the user.

        `argv_bytes`: the memory that its command and arguments take.

        Returns a function that ends the count of the running job. Call it when the job has ended
        or could not be started. It does not block, may be called from any thread, and does
        nothing the second time. Raises `QuotaError` if the user, or all users together, have
        reached their ceiling of running jobs, of their arguments or of starts per second.
        """
        with self._lock:
            mine = self._account_locked(user)
            if mine.jobs.is_full:
                raise QuotaError(
                    f"user {user} has {mine.jobs.count} running jobs, "
                    "the ceiling of this server (per_user.running_jobs); stop one first"
                )
            if self._all.jobs.is_full:
                raise QuotaError(
                    f"{_EVERYBODY} have {self._all.jobs.count} running jobs, "
                    "the ceiling of this server (in_all.running_jobs); try again later"
                )
            both = ((mine, f"user {user}", "per_user"), (self._all, _EVERYBODY, "in_all"))
            for account, who, table in both:
                if not account.argv.has_room(argv_bytes):
                    raise QuotaError(
                        f"with this job, the commands and arguments of the running jobs of {who} "
                        f"would take {format_size(account.argv.count + argv_bytes)} of memory; the "
                        f"ceiling is {format_size(account.argv.ceiling or 0)} "
                        f"({table}.running_argv); pass long data in a file"
                    )
            now = self._clock()
            for account, who, table in both:
                wait_s = account.starts.wait_s(now)
                if wait_s:
                    raise QuotaError(
                        f"more than {account.starts.per_second:g} starts per second of {who} "
                        f"({table}.starts_per_second); try again in {wait_s} s",
                        wait_s,
                    )
            mine.starts.take(now)
            self._all.starts.take(now)
            return self._count_job_locked(mine, argv_bytes)

    def resume(self, user: str, *, argv_bytes: int) -> Callable[[], None]:
        """Count a running job that another process has started; returns as `start`.

        Whatever the ceilings are now, the job runs.
        """
        with self._lock:
            return self._count_job_locked(self._account_locked(user), argv_bytes)

    def stream(self, user: str) -> Callable[[], None]:
        """Count one open output stream of the user; return a function that ends the count.

        That function is like the one that `start` returns. Raises `QuotaError` if the user, or
        all users together, have reached their ceiling of open streams.
        """
        with self._lock:
            mine = self._account_locked(user)
            if mine.streams.is_full:
                raise QuotaError(
                    f"user {user} has {mine.streams.count} open streams, "
                    "the ceiling of this server (per_user.streams); close one first"
                )
            if self._all.streams.is_full:
                raise QuotaError(
                    f"all {self._all.streams.count} output streams are in use (in_all.streams); "
                    "try again later"
                )
            return self._count_locked({mine.streams: 1, self._all.streams: 1})

    def in_use(self) -> tuple[int, int]:
        """Return how many jobs run and how many streams are open, of all users."""
        with self._lock:
            return self._all.jobs.count, self._all.streams.count

    def uses(self) -> list[Use]:
        """Return what is counted now: first that of all users together, then that of each user."""
        with self._lock:
            accounts = [(None, self._all), *self._users.items()]
        # Without the lock, because budgets have locks of their own.
        return [use for user, account in accounts for use in account.uses(user)]

    def output(self, user: str) -> Budget:
        """Return a budget for the output of one job of the user."""
        with self._lock:
            mine = self._account_locked(user)
        return Budget(self._job_output_bytes, self._job_ceiling, mine.output, of_one_job=True)

    def check_output(self, user: str) -> None:
        """Make room for one more byte of the user's output; raise `QuotaError` if there is none.

        Removes finished jobs if necessary, and blocks while their files are deleted.
        """
        with self._lock:
            mine = self._account_locked(user)
        if not (mine.output.is_used_up or self._all.output.is_used_up):
            return
        full = self._make_room(user, mine.output)
        if full is not None:
            raise QuotaError(
                f"no more output can be kept: {full.what} is reached; "
                "stop or remove jobs that are no longer needed, or end their streams"
            )

    def _account_locked(self, user: str) -> _Account:
        account = self._users.get(user)
        if account is None:
            limit = self._per_user.output_bytes
            output = Budget(limit, _ceiling(f"user {user}'s", limit, "per_user"), self._all.output)
            account = self._users[user] = _Account(self._per_user, output)
        return account

    def _count_job_locked(self, mine: _Account, argv_bytes: int) -> Callable[[], None]:
        return self._count_locked(
            {mine.jobs: 1, self._all.jobs: 1, mine.argv: argv_bytes, self._all.argv: argv_bytes}
        )

    def _count_locked(self, amounts: Mapping[_Gauge, int]) -> Callable[[], None]:
        """Add each amount to its gauge; return a function that takes this back once."""
        counted = True
        for gauge, amount in amounts.items():
            gauge.count += amount

        def release() -> None:
            nonlocal counted
            with self._lock:
                if counted:
                    counted = False
                    for gauge, amount in amounts.items():
                        gauge.count -= amount

        return release


def _used_up(_user: str, budget: Budget) -> Budget | None:
    """Return the budget that has no byte left, this one or a parent; None if there is none."""
    taken, refuser = budget.take(1)
    budget.give_back(taken)
    return refuser


def _ceiling(whose: str, limit: int | None, table: str, of: str = "") -> str:
    """Return the name of a ceiling of kept output. A `limit` of None is never reached or shown."""
    size = "any size" if limit is None else format_size(limit)
    return f"{whose} ceiling of {size}" + (f" for {of}" if of else "") + f" ({table}.kept_output)"


@dataclass(slots=True, eq=False)
class _Gauge:
    """Counts what exists now. `ceiling`: how much may exist; None for any amount."""

    ceiling: int | None
    count: int = 0

    @property
    def is_full(self) -> bool:
        return not self.has_room(1)

    def has_room(self, amount: int) -> bool:
        return self.ceiling is None or self.count + amount <= self.ceiling


class _Bucket:
    """A token bucket for starts. It holds up to `burst` tokens and gets `per_second` new ones.

    Each start takes one token. If either number is None, there is no ceiling.
    Attribute: `per_second`.
    """

    def __init__(self, per_second: float | None, burst: int | None) -> None:
        self.per_second = per_second
        self._burst = burst
        self._last_start_s = 0.0
        # The tokens left after the last start; None before the first: the bucket is full.
        # Only a start changes it, so rounding errors do not add up over many refusals.
        self._tokens: float | None = None

    def wait_s(self, now: float) -> int:
        """Return after how many seconds, rounded up, there is a token; 0 if there is one now."""
        if self.per_second is None or self._burst is None:
            return 0
        missing = 1 - self._tokens_at(now, self.per_second, self._burst)
        return max(0, math.ceil(missing / self.per_second))

    def take(self, now: float) -> None:
        if self.per_second is None or self._burst is None:
            return
        self._tokens = self._tokens_at(now, self.per_second, self._burst) - 1
        self._last_start_s = now

    def _tokens_at(self, now: float, per_second: float, burst: int) -> float:
        if self._tokens is None:
            return burst
        return min(burst, self._tokens + (now - self._last_start_s) * per_second)


class _Account:
    """The counts of one user or of all users. The lock of `Quotas` guards them."""

    def __init__(self, quota: Quota, output: Budget) -> None:
        self.jobs = _Gauge(quota.running_jobs)
        self.argv = _Gauge(quota.argv_bytes)
        self.starts = _Bucket(quota.starts_per_second, quota.start_burst)
        self.streams = _Gauge(quota.streams)
        self.output = output

    def uses(self, user: str | None) -> tuple[Use, ...]:
        """Return what is counted, but not the rate of starts, which fills up again by itself."""
        return (
            Use(user, "running_jobs", self.jobs.count, self.jobs.ceiling),
            Use(user, "streams", self.streams.count, self.streams.ceiling),
            Use(user, "kept_output", self.output.used, self.output.limit),
        )
