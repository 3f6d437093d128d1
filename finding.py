"""What jobs can be found by: their names and labels, and `JobFilter`, which picks jobs.

    check_name("nightly-build")
    labels = checked_labels({"team": "data"})
    nightly = JobFilter(labels={"team": "data"}, statuses={Status.RUNNING})
    nightly.concerns(job)  # all but the status
    nightly.accepts(job.status)

A name is not unique. Where a person writes one text for a job, the text is an ID, the beginning of
an ID, or a name. A name therefore never looks like four or more characters of an ID: otherwise a
user could give a job the beginning of another job's ID as name, and an administrator who copies
that beginning would stop the wrong job. A shorter text is a name first.

Thread safety: there is no state.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from datetime import datetime

    from jobstate import Status

__all__ = [
    "EVERY_JOB",
    "Findable",
    "JobFilter",
    "check_name",
    "check_owner",
    "checked_labels",
    "is_job_id",
]

_MAX_LABELS = 32
_MAX_LABEL_CHARACTERS = 255
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_LIKE_AN_ID = re.compile(r"[0-9A-Fa-f-]{4,}", re.ASCII)
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,62}", re.ASCII)
_ID_PART = re.compile(r"[0-9a-f-]{1,36}", re.ASCII)
_ID_LENGTH = 36


def is_job_id(text: str) -> bool:
    """Whether the text is the whole ID of a job, as a worker writes it."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def check_owner(owner: str) -> None:
    """Raise TypeError unless the owner is a string; "" is nobody."""
    if not isinstance(owner, str):
        raise TypeError(f"an owner must be a string, not {type(owner).__name__}")


def check_name(name: str) -> None:
    """Raise ValueError unless a job can have this name; "" is no name, which is allowed."""
    if not isinstance(name, str):
        raise TypeError(f"a name must be a string, not {type(name).__name__}")
    if not name:
        return
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:64]!r} cannot be the name of a job; a name has 1 to 64 letters, digits, and "
            "the characters _ . - and begins with a letter or a digit"
        )
    if _LIKE_AN_ID.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be the name of a job, because it could be the beginning of a job ID; "
            "use a letter from g to z, a dot or an underscore in it"
        )


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of labels that a job can have. Raises ValueError for others."""
    if len(labels) > _MAX_LABELS:
        raise ValueError(f"{len(labels)} labels; a job can have {_MAX_LABELS}")
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError("the keys and values of labels must be strings")
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"{key[:64]!r} cannot be the key of a label; a key has 1 to 63 letters, digits, "
                "and the characters _ . / - and begins with a letter or a digit"
            )
        if len(value) > _MAX_LABEL_CHARACTERS or not value.isprintable():
            raise ValueError(
                f"the value of the label {key} has {len(value)} characters; it may have up to "
                f"{_MAX_LABEL_CHARACTERS}, and none that cannot be printed"
            )
    return dict(labels)


class Findable(Protocol):
    """What a filter looks at. It never changes during a job."""

    @property
    def job_id(self) -> str: ...
    @property
    def owner(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def started_at(self) -> datetime: ...


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Picks the jobs that meet all of its conditions; a condition that is not given picks all."""

    statuses: Collection[Status] = ()
    """The job has one of these."""
    owner: str | None = None
    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """The job has each of these, and perhaps others."""
    since: datetime | None = None
    """The job started then or later."""
    job_ids: Collection[str] = ()
    """IDs and beginnings of IDs, in lower case; the job's ID is or begins with one of them.
    ValueError if one is not even the beginning of an ID."""
    _beginnings: tuple[str, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        for text in self.job_ids:
            if not _ID_PART.fullmatch(text):
                raise ValueError(f"not an ID of a job, or the beginning of one: {text[:64]!r}")
        parts = tuple(text for text in self.job_ids if len(text) < _ID_LENGTH)
        object.__setattr__(self, "job_ids", frozenset(self.job_ids))
        object.__setattr__(self, "_beginnings", parts)

    def concerns(self, job: Findable) -> bool:
        """Whether the job meets all conditions but that of its status, which can change."""
        return (
            (self.owner is None or job.owner == self.owner)
            and (self.name is None or job.name == self.name)
            and (not self.labels or self.labels.items() <= job.labels.items())
            and (self.since is None or job.started_at >= self.since)
            and (
                not self.job_ids
                or job.job_id in self.job_ids
                or job.job_id.startswith(self._beginnings)
            )
        )

    def accepts(self, *statuses: Status) -> bool:
        """Whether one of these statuses meets the condition of the status."""
        return not self.statuses or any(status in self.statuses for status in statuses)


EVERY_JOB: Final = JobFilter()
