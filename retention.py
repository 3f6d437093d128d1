"""How long finished jobs are kept: the rule (`Retention`), and what it removes (`FinishedJobs`).

What is too old is removed, and what is too much for the rule. Besides, finished jobs give way when
a budget of output (`budget.Budget`) or the disk has no byte left for a running job.

    finished = FinishedJobs(Retention(jobs=100), table)
    finished.add(row, budget)
    for row in finished.excess():
        table.delete(row.job.job_id)
        finished.discard(row)

The jobs themselves are rows of the store (`jobtable.py`).

Thread safety: a lock of the user of `FinishedJobs` guards it (`registry.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from budget import Budget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jobtable import JobTable, Row

__all__ = ["FinishedJobs", "Retention"]


@dataclass(frozen=True, slots=True)
class Retention:
    """How long finished jobs and their output are kept. None means no bound.

    Jobs that are too old are removed. If there is too much of all jobs together, the owner who
    has the most of it loses jobs, oldest first. So nobody's jobs push out those of an owner who
    has fewer. The job that ended last is never removed for being too much. Running jobs do not
    count. Raises ValueError for numbers that make no sense.
    """

    age_s: float | None = None
    """Seconds since the job's end."""
    jobs: int | None = None
    output_bytes: int | None = None
    """Their stored output."""
    argv_bytes: int | None = None
    """The memory that their commands, arguments, names and labels would take."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            minimum = 1 if field.name == "jobs" else 0
            if value is not None and not value >= minimum:  # refuses not-a-number, too
                raise ValueError(f"{field.name} must be at least {minimum}, not {value!r}")


class _Holding:
    """What one owner has of finished jobs."""

    __slots__ = ("amounts", "budget")

    def __init__(self, budget: Budget) -> None:
        self.amounts = [0, 0, 0]  # see `_amounts`
        self.budget = budget  # which counts the output of most of them


def _amounts(row: Row) -> tuple[int, int, int]:
    """Return what the job counts for each bound of `Retention` but the age."""
    return 1, row.output.size, row.argv_bytes


class FinishedJobs:
    """Which of the finished jobs in the table the rule or a budget wants removed.

    The registry's lock guards it. In memory are a few numbers of each owner. No operation takes
    noticeably longer the more jobs there are; those that choose an owner look at every owner.
    """

    def __init__(self, rule: Retention, table: JobTable) -> None:
        self._age_s = rule.age_s
        self._booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        self._bounds = (rule.jobs, rule.output_bytes, rule.argv_bytes)
        self._table = table
        self._totals = [0, 0, 0]
        self._holdings: dict[str, _Holding] = {}
        # By owner, for jobs without a budget of their own; as long as there are such jobs.
        self._unlimited: WeakValueDictionary[str, Budget] = WeakValueDictionary()
        # By job ID: the budget that counts the job's output, if it is not its owner's in _holdings.
        self._budgets: dict[str, Budget] = {}
        for owner, *amounts, taken in table.amounts():
            holding = self._holding(owner)
            holding.budget.count(taken)
            holding.amounts = amounts
            self._totals = [sum(pair) for pair in zip(self._totals, amounts, strict=True)]

    def add(self, row: Row, budget: Budget) -> None:
        """Count a job that has ended. `budget` counts its output."""
        holding = self._holding(row.job.owner, budget)
        if holding.budget is not budget:
            self._budgets[row.job.job_id] = budget
        self._count(row, 1)

    def discard(self, row: Row) -> None:
        """Stop counting a job."""
        self._budgets.pop(row.job.job_id, None)
        self._count(row, -1)
        if not self._holdings[row.job.owner].amounts[0]:
            del self._holdings[row.job.owner]

    @property
    def count(self) -> int:
        """How many there are."""
        return self._totals[0]

    def budget_of(self, row: Row) -> Budget:
        """Return the budget that counts the output of a job."""
        return self._budgets.get(row.job.job_id) or self._holding(row.job.owner).budget

    def budget_for(self, owner: str) -> Budget:
        """Return the owner's budget without limit, for jobs that are started without one."""
        budget = self._unlimited.get(owner)
        if budget is None:
            budget = self._unlimited[owner] = Budget(None, "no ceiling")
        return budget

    def charge(self, budget_for: Callable[[str], Budget]) -> None:
        """Have budgets count the output of the jobs of former processes."""
        for owner, holding in self._holdings.items():
            taken, holding.budget = holding.budget.used, budget_for(owner).heir
            holding.budget.count(taken)

    def seconds_left(self) -> float | None:
        """Return in how many seconds the oldest job is too old; None for never."""
        oldest = None if self._age_s is None else self._table.oldest()
        if self._age_s is None or oldest is None or oldest.job.ended_at is None:
            return None
        # A step of the clock forward does not count. It may be an error, and would remove jobs.
        now = min(time.time(), self._booted_at + time.clock_gettime(time.CLOCK_BOOTTIME))
        return max(0.0, oldest.job.ended_at.timestamp() + self._age_s - now)

    def excess(self) -> Iterator[Row]:
        """Yield what is too old or too much; the caller discards each before the next."""
        while self.seconds_left() == 0 and (row := self._table.oldest()):
            yield row
        for i, bound in enumerate(self._bounds):
            while bound is not None and self._totals[i] > bound:
                owner = self._who_has_most(i)
                row = self._table.oldest(owner)
                if row is None or row.number == self._table.last_number:
                    break  # it has just ended, and somebody may be about to look at it
                yield row

    def giver(
        self, owner: str, budget: Budget, refuser: Budget | None, read: list[str]
    ) -> Row | None:
        """Return the job whose removal gives `budget` bytes that `refuser` refused; None if none.

        `refuser` is `budget` or a parent of it, and has no bytes left; None means the disk. If
        several owners draw on `refuser`, the one who uses most gives first, and nobody gives to an
        owner who uses more. Each owner gives the oldest job first. Output that somebody reads
        (`read`: the IDs) gives nothing back now, so it stays. The budgets of one owner's jobs are
        expected to have the same parents.
        """
        mine = _branch(budget, refuser)
        givers: list[tuple[int, str]] = []
        for other, holding in self._holdings.items():
            if not holding.amounts[0]:
                continue
            its = holding.budget
            if self._budgets and (oldest := self._table.oldest(other)):
                its = self.budget_of(oldest)
            branch = its if its is refuser and other == owner else _branch(its, refuser)
            if branch is None:
                continue
            used = branch.used
            if other == owner or (mine is not None and used >= mine.used):
                givers.append((used, other))
        givers.sort(key=lambda giver: giver[0], reverse=True)
        rows = (self._table.with_output(other, read) for _, other in givers)
        return next((row for row in rows if row is not None), None)

    def _holding(self, owner: str, budget: Budget | None = None) -> _Holding:
        holding = self._holdings.get(owner)
        if holding is None:
            holding = self._holdings[owner] = _Holding(budget or self.budget_for(owner))
        return holding

    def _count(self, row: Row, sign: int) -> None:
        holding = self._holding(row.job.owner)
        for i, amount in enumerate(_amounts(row)):
            holding.amounts[i] += sign * amount
            self._totals[i] += sign * amount

    def _who_has_most(self, i: int) -> str:
        """Return whose amounts are largest; of several the one whose oldest job is older."""
        most = max(holding.amounts[i] for holding in self._holdings.values())
        owners = [owner for owner, each in self._holdings.items() if each.amounts[i] == most]
        if len(owners) == 1:
            return owners[0]
        oldest = [
            (row.number or 0, owner) for owner in owners if (row := self._table.oldest(owner))
        ]
        return min(oldest)[1] if oldest else owners[0]


def _branch(budget: Budget, refuser: Budget | None) -> Budget | None:
    """Return the budget that counts what the owner of `budget` takes from `refuser`."""
    return budget.branch_of(refuser) if refuser is not None else budget.heir.below_root
