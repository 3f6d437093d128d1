"""Tests of the take-over of what versions without a store have kept in files."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

import oldfiles
from accounts import Accounts
from errors import StoreError
from revocations import Revocations, RunningTime
from store import Store
from testkit import ABSENT, NOBODY, Clock
from trustedfiles import UntrustedFileError

if TYPE_CHECKING:
    from pathlib import Path

_UIDS = range(70_001, 70_011)
_FILES = {
    "uids": "alice 70001\nbob 70004\n",
    "uids.highest": "0000070004\n",
    "logged-out": f"{ABSENT} 5000\n",
    "running-time": "000000001234\n",
}


def _write(state: Path, **changes: str) -> None:
    for name, text in (_FILES | changes).items():
        path = state / name
        path.touch(0o600)
        path.write_text(text)


def test_files_are_taken_over_once_and_kept_aside(tmp_path: Path, clock: Clock) -> None:
    """Uids, revoked tokens and the running time go on where they were. Nobody gets an old uid."""
    _write(tmp_path)
    with Store(tmp_path / "store") as store:
        assert oldfiles.are_there(tmp_path)
        oldfiles.move_into_store(store, tmp_path)
        assert not oldfiles.are_there(tmp_path)
        running = RunningTime(store, clock=clock)
        assert running.now_s() == 1234
        assert ABSENT in Revocations(store, running)
        accounts = Accounts(store, _UIDS)
        accounts.add(["carol"])
        assert [accounts.uid(name) for name in ("alice", "bob", "carol")] == [70001, 70004, 70005]
        oldfiles.move_into_store(store, tmp_path)
    assert {name: (tmp_path / f"{name}.old").read_text() for name in _FILES} == _FILES


def test_process_that_was_killed_before_it_renamed_the_files_has_taken_them_over(
    tmp_path: Path,
) -> None:
    """What the store has recorded since is not overwritten."""
    with Store(tmp_path / "store") as store:
        for _ in range(2):
            _write(tmp_path)
            oldfiles.move_into_store(store, tmp_path)
            store.set_fact("running_time_s", 9999)
        assert RunningTime(store).now_s() == 9999


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"uids": "alice 70001\nbob 70004\ncarol 70005\n"}, "uids: it has users"),
        ({"uids": "bob 70001\n"}, "uids: it has users"),
        ({"logged-out": f"{ABSENT[:-1]}0 5000\n"}, "logged-out: it has logouts"),
    ],
)
def test_files_that_an_earlier_version_has_made_since_are_refused(
    tmp_path: Path, changes: dict[str, str], named: str
) -> None:
    """Otherwise somebody would get the uid of another's files, or a token would be valid again."""
    with Store(tmp_path / "store") as store:
        _write(tmp_path)
        oldfiles.move_into_store(store, tmp_path)
        _write(tmp_path, **{"uids.highest": "0\n"} | changes)
        for _ in range(2):
            with pytest.raises(StoreError, match=f"{named} that the store does not have.*move"):
                oldfiles.move_into_store(store, tmp_path)
        assert {name: (tmp_path / f"{name}.old").read_text() for name in _FILES} == _FILES


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("uids", "alice\n", "line 1 is not NAME UID"),
        ("uids", "alice 70001\nbob -1\n", "line 2 is not NAME UID"),
        ("uids", "alice 70001\nbob 7_0001\n", "line 2 is not NAME UID"),
        ("uids", "alice 70001\nalice 70004\n", "a name or uid is repeated"),
        ("uids", "alice 70004\nbob 70004\n", "a name or uid is repeated"),
        ("uids", "alice 70001\n", "its last uid is 70001, but uids.highest says 70004"),
        ("uids", "alice \ufffd\n", "line 1 is not NAME UID"),
        ("logged-out", f"{ABSENT} soon\n", "line 1 is not ID ENDS_S"),
        ("running-time", "-00000000001\n", "line 1 is not 12 digits"),
    ],
)
def test_damaged_file_is_refused_and_left_alone(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    """The error names the file and says what to do. Nothing of any file is taken over."""
    _write(tmp_path, **{name: text})
    with Store(tmp_path / "store") as store:
        with pytest.raises(StoreError, match=rf"{name}: {problem}.*restore the file"):
            oldfiles.move_into_store(store, tmp_path)
        assert store.query("SELECT * FROM uids") == []
    assert (tmp_path / name).read_text() == text


def test_torn_last_line_is_dropped(tmp_path: Path) -> None:
    """The machine went down while it was written, so nobody has had a confirmation."""
    _write(tmp_path, **{"logged-out": f"{ABSENT} 5000\n{ABSENT[:20]}"})
    with Store(tmp_path / "store") as store:
        oldfiles.move_into_store(store, tmp_path)
        assert store.query("SELECT * FROM revoked") == [(ABSENT, 5000)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", _FILES)
def test_file_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    """Its owner could have chosen whose uid is whose."""
    _write(tmp_path)
    os.chown(tmp_path / name, NOBODY, NOBODY)
    with (
        Store(tmp_path / "store") as store,
        pytest.raises(UntrustedFileError, match=f"{name} belongs to uid {NOBODY}"),
    ):
        oldfiles.move_into_store(store, tmp_path)


def test_store_that_is_missing_beside_homes_is_told(tmp_path: Path) -> None:
    """Otherwise somebody else would get the uid that a home belongs to."""
    (tmp_path / "homes").mkdir()
    oldfiles.open_store(tmp_path).close()
    (tmp_path / "homes" / "alice").mkdir()
    oldfiles.open_store(tmp_path).close()
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreError, match="is missing, but this place is not new"):
        oldfiles.open_store(tmp_path)
    _write(tmp_path)  # as a version without a store leaves it
    oldfiles.open_store(tmp_path).close()
