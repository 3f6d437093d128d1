"""Tests of the accounts: which user has which uid, and that nobody gets another's, ever."""

from __future__ import annotations

import contextlib
import grp
import pwd
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import accounts
from accounts import Accounts, AccountsError, parse_uids, uid_for
from store import Store, reading
from testkit import GUARD_S

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
_UIDS = range(70_001, 70_011)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@contextlib.contextmanager
def _opened(directory: Path, uids: range = _UIDS) -> Iterator[Accounts]:
    with Store(directory) as store:
        yield Accounts(store, uids)


def _added(directory: Path, *names: str, uids: range = _UIDS) -> list[int]:
    """Open the store, add the names, and return their uids."""
    with _opened(directory, uids) as accounts:
        accounts.add(names)
        return [accounts.uid(name) for name in names]


def _rows(directory: Path) -> dict[str, int]:
    with reading(directory) as connection:
        return dict(connection.execute("SELECT name, uid FROM uids"))


# --- giving out -------------------------------------------------------------------------------


def test_each_user_has_an_uid_of_the_range(directory: Path) -> None:
    """From its start on, in the order given, each another; and it is in the store."""
    assert _added(directory, "alice", "bob", "carol") == [70_001, 70_002, 70_003]
    assert _rows(directory) == {"alice": 70_001, "bob": 70_002, "carol": 70_003}


def test_uid_stays_across_restarts(directory: Path) -> None:
    """Whatever the order of the users the next time, and whoever is new."""
    assert _added(directory, "alice", "bob") == [70_001, 70_002]
    assert _added(directory, "new", "bob", "alice") == [70_003, 70_002, 70_001]
    assert _added(directory, "alice", "bob", "new") == [70_001, 70_002, 70_003]


def test_uid_of_a_removed_user_is_not_given_out_again(directory: Path) -> None:
    """Files may be left that belong to the number. Who comes back has it again."""
    _added(directory, "alice", "bob")
    assert _added(directory, "carol") == [70_003]  # neither alice nor bob is a user any more
    assert _added(directory, "dave", "bob") == [70_004, 70_002]


def test_name_that_is_given_twice_is_one_user(directory: Path) -> None:
    """A second time does not cost a second uid."""
    with _opened(directory) as accounts:
        accounts.add(["alice", "alice"])
        accounts.add(["alice"])
    assert _rows(directory) == {"alice": 70_001}


def test_names_that_differ_in_anything_are_different_users(directory: Path) -> None:
    """Case and a common beginning do not make two users one."""
    names = ["alice", "Alice", "alice.", "alic", "alice@example.org"]
    assert len(set(_added(directory, *names))) == len(names)
    assert _added(directory, *reversed(names)) == sorted(_added(directory, *names), reverse=True)


def test_unknown_user_has_no_uid(directory: Path) -> None:
    """Nobody gets an uid by being asked for."""
    with _opened(directory) as accounts, pytest.raises(KeyError):
        accounts.uid("nobody")
    assert _rows(directory) == {}


def test_uids_of_accounts_of_the_host_are_skipped(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is somebody's on this host, or some group's, is given to no API user."""
    user, group = pwd.getpwuid(0), grp.getgrgid(0)

    def getpwuid(uid: int) -> pwd.struct_passwd:
        if uid != 70_001:
            raise KeyError(uid)
        return user

    def getgrgid(gid: int) -> grp.struct_group:
        if gid != 70_003:
            raise KeyError(gid)
        return group

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setattr(grp, "getgrgid", getgrgid)
    assert _added(directory, "alice", "bob") == [70_002, 70_004]


def test_real_accounts_are_taken() -> None:
    """The host's own are found: root, and a group without a user of that number, if any."""
    assert accounts._is_taken(0)
    numbers = {entry.pw_uid for entry in pwd.getpwall()}
    for group in grp.getgrall():
        assert accounts._is_taken(group.gr_gid)
        numbers.add(group.gr_gid)
    assert not accounts._is_taken(next(n for n in range(70_000, 2**31) if n not in numbers))


def test_exhausted_range_is_an_error_that_names_the_remedy(directory: Path) -> None:
    """Who came too late is named, those before keep theirs, and nothing is half done."""
    names = [f"user{i}" for i in range(len(_UIDS))]
    uids = _added(directory, *names)
    before = _rows(directory)
    with _opened(directory) as accounts:
        with pytest.raises(AccountsError, match=r"no uid is left for late .* 70001-70010.*--uids"):
            accounts.add(["user0", "late"])
        with pytest.raises(KeyError):
            accounts.uid("late")
        assert [accounts.uid(name) for name in names] == uids
    assert _rows(directory) == before


def test_some_that_fit_are_not_given_out_when_others_do_not(directory: Path) -> None:
    """All or none: of three names for two uids none has one."""
    with _opened(directory, range(70_001, 70_003)) as accounts:
        with pytest.raises(AccountsError):
            accounts.add(["a", "b", "c"])
        assert _rows(directory) == {}
        accounts.add(["c"])
        assert accounts.uid("c") == 70_001


def test_exhausted_range_gives_no_removed_users_uid(directory: Path) -> None:
    """Rather an error than a number that was somebody's."""
    _added(directory, *(f"gone{i}" for i in range(len(_UIDS))))
    with pytest.raises(AccountsError, match="no uid is left"):
        _added(directory, "new")


def test_range_may_grow(directory: Path) -> None:
    """The remedy works: with a wider range the next number follows."""
    _added(directory, "alice", "bob", uids=range(70_001, 70_003))
    assert _added(directory, "carol", "alice") == [70_003, 70_001]


@pytest.mark.parametrize(
    "uids", [range(70_002, 70_011), range(80_000, 80_010), range(70_000, 70_001)]
)
def test_range_that_leaves_somebody_out_is_refused(directory: Path, uids: range) -> None:
    """The error has the user, the uid, the range and what to do; the store stays."""
    _added(directory, "alice", "bob")
    before = _rows(directory)
    with pytest.raises(AccountsError) as caught, _opened(directory, uids):
        pass
    assert str(caught.value) == (
        f"alice has the uid 70001, which the range {uids.start}-{uids.stop - 1} does not contain; "
        "widen --uids"
    )
    assert _rows(directory) == before


def test_users_can_be_added_while_uids_are_asked_for(directory: Path) -> None:
    """A call that starts a job never sees a user without an uid who had one."""
    uids = range(70_001, 72_001)
    with _opened(directory, uids) as accounts:
        accounts.add(["alice"])
        done = threading.Event()
        seen: set[int] = set()

        def ask() -> None:
            while not done.is_set():
                seen.add(accounts.uid("alice"))

        asker = threading.Thread(target=ask)
        asker.start()
        for i in range(200):
            accounts.add([f"user{i}"])
        done.set()
        asker.join(GUARD_S)
        assert not asker.is_alive()
    assert seen == {70_001}


# --- the store --------------------------------------------------------------------------------


_FULL_DISK = """
import resource, sys
from accounts import Accounts
from store import Store
path, log = sys.argv[1], sys.argv[2]
with Store(path) as store:
    accounts = Accounts(store, range(70001, 70011))
    accounts.add(["alice"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        accounts.add(["bob", "carol"])
    except OSError as error:
        print("refused")
    for name in "bob", "carol":
        try:
            accounts.uid(name)
            print(name, "has an uid")
        except KeyError:
            pass
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    accounts.add(["dave"])
    print(accounts.uid("alice"), accounts.uid("dave"))
"""


def test_full_disk_gives_nothing_out(directory: Path) -> None:
    """If the rows cannot be written, no user gets a uid. Later it works."""
    program = [sys.executable, "-c", _FULL_DISK, str(directory), "log"]
    output = subprocess.check_output(program, cwd=_HERE, text=True, timeout=GUARD_S)
    assert output == "refused\n70001 70002\n"
    assert _rows(directory) == {"alice": 70_001, "dave": 70_002}


def test_uid_survives_a_process_that_is_killed(directory: Path) -> None:
    """It is in the store when `add` has returned."""
    program = (
        "import os, sys\nfrom accounts import Accounts\nfrom store import Store\n"
        "Accounts(Store(sys.argv[1]), range(70001, 70011)).add(['alice', 'bob'])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = [sys.executable, "-c", program, str(directory)]
    assert subprocess.run(run, cwd=_HERE, check=False, timeout=GUARD_S).returncode == -9
    assert _added(directory, "carol", "bob") == [70_003, 70_002]


def test_uid_of_a_new_account_is_found_while_a_server_has_the_store(directory: Path) -> None:
    """A known user keeps the uid; a new one gets a uid that nobody has. Nothing is written."""
    with _opened(directory) as accounts:
        accounts.add(["alice", "bob"])
        assert uid_for("bob", directory, _UIDS) == 70_002
        assert uid_for("carol", directory, _UIDS) == 70_003
        assert _rows(directory) == {"alice": 70_001, "bob": 70_002}
    assert uid_for("carol", directory.with_name("none"), _UIDS) == 70_001
    with pytest.raises(AccountsError, match="no uid is left for carol"):
        uid_for("carol", directory, range(70_001, 70_003))


# --- the range --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "uids"),
    [
        ("70000-79999", range(70_000, 80_000)),
        ("1000-1001", range(1_000, 1_002)),
        ("4294967293-4294967294", range(2**32 - 3, 2**32 - 1)),
    ],
)
def test_range_is_first_to_last(text: str, uids: range) -> None:
    """Both ends belong to it. The lowest and the highest possible uid are accepted."""
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        pytest.skip("this user namespace does not have every uid")
    assert parse_uids(text) == uids


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", "70000", "70000-", "-79999", "a-b", "70000-79999-", "70000 - 79999"),
        *("70000--79999", "70000-7999x", "+70000-79999", "70000-79999\n", "70000:79999", "7e4-8e4"),
        *("1-2.5", "\u0667\u0660\u0660\u0660\u0660-79999", "0x11170-0x1387f"),
        *("9" * 5000 + "-" + "9" * 5001, "70000-" + "9" * 5000),
    ],
)
def test_text_that_is_no_range_is_refused(text: str) -> None:
    """The error shows the right form."""
    with pytest.raises(AccountsError, match=r"--uids .* is not FIRST-LAST, like 70000-79999"):
        parse_uids(text)


@pytest.mark.parametrize(
    "text",
    [
        "0-79999",
        "999-79999",
        "70000-70000",
        "79999-70000",
        "70000-4294967295",
        "4294967295-4294967296",
        "70000-99999999999999999999",
    ],
)
def test_range_that_cannot_be_used_is_refused(text: str) -> None:
    """System accounts, a single uid, and the number for "no user" are refused."""
    wrong = pytest.raises(AccountsError, match=f"{text} must be a range of two uids or more")
    with wrong:
        parse_uids(text)
    with wrong:  # also of a server without root, which has no use for it
        accounts.choose_uids("auto", text, of_host=False)


@pytest.mark.parametrize("name", ["uid_map", "gid_map"])
def test_range_outside_of_the_user_namespace_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like in a container: both maps must have the range, and the error shows what they have."""
    real = Path.read_text
    maps = {"uid_map": "0 0 4294967295\n", "gid_map": "0 0 4294967295\n"}
    maps[name] = "         0       1000          1\n         1     100000      65536\n"

    def read_text(path: Path) -> str:
        return maps[path.name] if path.parent == Path("/proc/self") else real(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert parse_uids("60000-65536") == range(60_000, 65_537)
    for text in ("70000-79999", "60000-65537"):
        with pytest.raises(AccountsError) as caught:
            parse_uids(text)
        assert str(caught.value) == (
            f"--uids {text} is not available in this user namespace; choose from 0-0, 1-65536"
        )
