"""Tests of what jobs can be found by: names, labels and `JobFilter`."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finding import EVERY_JOB, JobFilter, check_name, checked_labels
from jobstate import Status
from testkit import ABSENT
from worker import Worker

_NOW = datetime(2026, 11, 28, tzinfo=UTC)


@dataclass
class _Known:
    """What a filter looks at."""

    job_id: str = ABSENT
    owner: str = "alice"
    name: str = "web"
    labels: dict[str, str] = field(default_factory=lambda: {"team": "data", "run": "7"})
    started_at: datetime = _NOW


@pytest.mark.parametrize(
    "name", ["", "web", "db", "abc", "n" * 64, "nightly-build.2", "2026_11_28", "Z", "0.1", "fee"]
)
def test_names_that_a_job_can_have(name: str) -> None:
    """Letters, digits and `_ . -`; up to three characters may be those of an ID."""
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("-web", ".web", "_web", "w" * 65, "we b", "web\n", "wéb", "a/b", "a:b", "\0", "٣web"),
        *("cafe", "CAFE", "2026-11-28", "deadbeef", ABSENT, ABSENT.upper(), ABSENT[:8], "1234"),
    ],
)
def test_names_that_no_job_can_have(name: str) -> None:
    """Also no text that could be the beginning of an ID, so no name stands for another's job."""
    with pytest.raises(ValueError, match="cannot be the name of a job"):
        check_name(name)


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"a b": "x"},
        {"-a": "x"},
        {"k" * 64: "x"},
        {"a=b": "x"},
        {"a": "x" * 256},
        {"a": "x\ny"},
        {"a": "\x1b[31m"},
        {"a": "\ud800"},
        {f"k{i}": "" for i in range(33)},
    ],
)
def test_labels_that_no_job_can_have(labels: dict[str, str]) -> None:
    """The error says what is wrong with them."""
    with pytest.raises(ValueError, match=r"label"):
        checked_labels(labels)


def test_labels_that_a_job_can_have_are_copied() -> None:
    """So a later change of the caller's dictionary does not reach the job."""
    labels = {"example.org/team": "grün = good", "empty": "", "k" * 63: "v" * 255}
    copied = checked_labels(labels)
    assert copied == labels
    assert copied is not labels


@pytest.mark.parametrize(
    ("conditions", "concerned"),
    [
        ({}, True),
        ({"owner": "alice"}, True),
        ({"owner": "bob"}, False),
        ({"name": "web"}, True),
        ({"name": "we"}, False),
        ({"labels": {"team": "data"}}, True),
        ({"labels": {"team": "data", "run": "7"}}, True),
        ({"labels": {"team": "dat"}}, False),
        ({"labels": {"team": "data", "other": ""}}, False),
        ({"since": _NOW}, True),
        ({"since": _NOW + timedelta(microseconds=1)}, False),
        ({"job_ids": [ABSENT]}, True),
        ({"job_ids": [ABSENT[:1]]}, True),
        ({"job_ids": ["ffff", ABSENT[:10]]}, True),
        ({"job_ids": ["ffff", ABSENT[1:]]}, False),
        ({"name": "web", "owner": "bob"}, False),
    ],
)
def test_filter_concerns_jobs_that_meet_all_conditions(
    conditions: dict[str, Any], concerned: bool
) -> None:
    """A condition that is not given is met by every job."""
    assert JobFilter(**conditions).concerns(_Known()) is concerned


def test_filter_accepts_any_of_its_statuses() -> None:
    """Without statuses it accepts all."""
    assert EVERY_JOB.accepts(Status.RUNNING)
    ended = JobFilter(statuses=[Status.STOPPED, Status.FINISHED])
    assert ended.accepts(Status.STOPPED)
    assert not ended.accepts(Status.RUNNING)
    assert ended.accepts(Status.RUNNING, Status.FINISHED)


@pytest.mark.parametrize("text", ["", "x", ABSENT + "0", ABSENT.upper(), "0e*"])
def test_filter_refuses_what_is_not_the_beginning_of_an_id(text: str) -> None:
    """It would pick no job, and its user would not know why."""
    with pytest.raises(ValueError, match="not an ID of a job"):
        JobFilter(job_ids=[text])


# --- in the library ---------------------------------------------------------------------


def test_worker_lists_the_jobs_that_a_filter_picks() -> None:
    """Running and finished ones, in the order of their starts; a job shows its name and labels."""
    with Worker(enforcement="off") as worker:
        first = worker.start("true", name="build", labels={"team": "data"}, owner="alice")
        second = worker.start("sleep", ["1000000"], name="build", owner="bob")
        third = worker.start("true")
        for job_id in (first, third):
            worker.wait(job_id)

        def found(**conditions: Any) -> list[str]:
            return [job.job_id for job in worker.list(matching=JobFilter(**conditions))]

        assert found() == [first, second, third]
        assert found(name="build") == [first, second]
        assert found(name="build", statuses=[Status.RUNNING]) == [second]
        assert found(labels={"team": "data"}) == [first]
        assert found(owner="bob") == [second]
        assert found(job_ids=[third[:13]]) == [third]
        assert found(since=worker.status(second).started_at) == [second, third]
        assert found(statuses=[Status.FINISHED]) == [first, third]
        job = worker.status(first)
        assert (job.name, job.labels) == ("build", {"team": "data"})
        assert (worker.status(third).name, worker.status(third).labels) == ("", {})


@pytest.mark.parametrize("names", [{"name": "cafe"}, {"labels": {"a b": ""}}])
def test_worker_starts_no_job_with_a_wrong_name_or_label(names: Any) -> None:
    """It raises ValueError, and there is no job."""
    with Worker(enforcement="off") as worker:
        with pytest.raises(ValueError, match=r"cannot be the (name|key)"):
            worker.start("true", **names)
        assert worker.list() == ()
