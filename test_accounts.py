"""Tests of the accounts: which user has which uid, and that nobody gets another's, ever."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import accounts
from accounts import Accounts, AccountsError, parse_uids
from testkit import GUARD_S, NOBODY, descriptors_of
from trustedfiles import UntrustedFileError

_HERE = Path(__file__).resolve().parent
_UIDS = range(70_001, 70_011)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "uids"


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def _added(path: Path, *names: str, uids: range = _UIDS) -> list[int]:
    """Open the file, add the names, and return their uids."""
    with Accounts(path, uids) as accounts:
        accounts.add(names)
        return [accounts.uid(name) for name in names]


# --- giving out -------------------------------------------------------------------------------


def test_each_user_has_an_uid_of_the_range(path: Path) -> None:
    """From its start on, in the order given, each another; and it is in the file."""
    assert _added(path, "alice", "bob", "carol") == [70_001, 70_002, 70_003]
    assert path.read_text() == "alice 70001\nbob 70002\ncarol 70003\n"


def test_uid_stays_across_restarts(path: Path) -> None:
    """Whatever the order of the users the next time, and whoever is new."""
    assert _added(path, "alice", "bob") == [70_001, 70_002]
    assert _added(path, "new", "bob", "alice") == [70_003, 70_002, 70_001]
    assert _added(path, "alice", "bob", "new") == [70_001, 70_002, 70_003]


def test_uid_of_a_removed_user_is_not_given_out_again(path: Path) -> None:
    """Files may be left that belong to the number. Who comes back has it again."""
    _added(path, "alice", "bob")
    assert _added(path, "carol") == [70_003]  # neither alice nor bob is a user any more
    assert _added(path, "dave", "bob") == [70_004, 70_002]


def test_name_that_is_given_twice_is_one_user(path: Path) -> None:
    """A second time does not cost a second uid."""
    with Accounts(path, _UIDS) as accounts:
        accounts.add(["alice", "alice"])
        accounts.add(["alice"])
    assert path.read_text() == "alice 70001\n"


def test_names_that_differ_in_anything_are_different_users(path: Path) -> None:
    """Case and a common beginning do not make two users one."""
    names = ["alice", "Alice", "alice.", "alic", "alice@example.org"]
    assert len(set(_added(path, *names))) == len(names)
    assert _added(path, *reversed(names)) == sorted(_added(path, *names), reverse=True)


def test_unknown_user_has_no_uid(path: Path) -> None:
    """Nobody gets an uid by being asked for."""
    with Accounts(path, _UIDS) as accounts, pytest.raises(KeyError):
        accounts.uid("nobody")
    assert path.read_text() == ""


def test_uids_of_accounts_of_the_host_are_skipped(
    path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert _added(path, "alice", "bob") == [70_002, 70_004]


def test_real_accounts_are_taken() -> None:
    """The host's own are found: root, and a group without a user of that number, if any."""
    assert accounts._is_taken(0)
    numbers = {entry.pw_uid for entry in pwd.getpwall()}
    for group in grp.getgrall():
        assert accounts._is_taken(group.gr_gid)
        numbers.add(group.gr_gid)
    assert not accounts._is_taken(next(n for n in range(70_000, 2**31) if n not in numbers))


def test_exhausted_range_is_an_error_that_names_the_remedy(path: Path) -> None:
    """Who came too late is named, those before keep theirs, and nothing is half done."""
    names = [f"user{i}" for i in range(len(_UIDS))]
    uids = _added(path, *names)
    before = path.read_text()
    with Accounts(path, _UIDS) as accounts:
        with pytest.raises(AccountsError, match=r"no uid is left for late .* 70001-70010.*--uids"):
            accounts.add(["user0", "late"])
        with pytest.raises(KeyError):
            accounts.uid("late")
        assert [accounts.uid(name) for name in names] == uids
    assert path.read_text() == before


def test_some_that_fit_are_not_given_out_when_others_do_not(path: Path) -> None:
    """All or none: of three names for two uids none has one."""
    with Accounts(path, range(70_001, 70_003)) as accounts:
        with pytest.raises(AccountsError):
            accounts.add(["a", "b", "c"])
        assert path.read_text() == ""
        accounts.add(["c"])
        assert accounts.uid("c") == 70_001


def test_exhausted_range_gives_no_removed_users_uid(path: Path) -> None:
    """Rather an error than a number that was somebody's."""
    _added(path, *(f"gone{i}" for i in range(len(_UIDS))))
    with pytest.raises(AccountsError, match="no uid is left"):
        _added(path, "new")


def test_range_may_grow(path: Path) -> None:
    """The remedy works: with a wider range the next number follows."""
    _added(path, "alice", "bob", uids=range(70_001, 70_003))
    assert _added(path, "carol", "alice") == [70_003, 70_001]


@pytest.mark.parametrize(
    "uids", [range(70_002, 70_011), range(80_000, 80_010), range(70_000, 70_001)]
)
def test_range_that_leaves_somebody_out_is_refused(path: Path, uids: range) -> None:
    """The error has the line, the user, the uid, the range and what to do; the file stays."""
    _added(path, "alice", "bob")
    before = path.read_text()
    line, name, uid = (1, "alice", 70_001)
    with pytest.raises(AccountsError) as caught:
        Accounts(path, uids)
    assert str(caught.value) == (
        f"{path}, line {line}: {name} has the uid {uid}, which the range "
        f"{uids.start}-{uids.stop - 1} does not contain; widen --uids"
    )
    assert path.read_text() == before


def test_users_can_be_added_while_uids_are_asked_for(path: Path) -> None:
    """A call that starts a job never sees a user without an uid who had one."""
    uids = range(70_001, 72_001)
    with Accounts(path, uids) as accounts:
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


# --- the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_file_is_private_under_any_umask(path: Path, umask: int) -> None:
    """Mode 0600 from the moment that it is made."""
    before = os.umask(umask)
    try:
        _added(path, "alice")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("target", ["file", "nowhere"])
def test_symbolic_link_is_refused(path: Path, tmp_path: Path, target: str) -> None:
    """Nothing is written or made at the target of the link."""
    (tmp_path / "file").write_text("precious")
    path.symlink_to(tmp_path / target)
    with pytest.raises(UntrustedFileError, match="uids is not a regular file"):
        Accounts(path, _UIDS)
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "uids"]


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        ("alice\n", 1),
        ("alice \n", 1),
        (" 70001\n", 1),
        ("\n", 1),
        ("alice 70001\n\nbob 70002\n", 2),
        ("alice x\n", 1),
        ("alice -70001\n", 1),
        ("alice +70001\n", 1),
        ("alice 70001.0\n", 1),
        ("alice 0x11171\n", 1),
        ("alice 7_0001\n", 1),
        ("alice  70001\n", 1),
        ("alice 70001 \n", 1),
        ("alice 70001 x\n", 1),
        ("alice 70001\r\n", 1),
        ("alice \u0667\u0660\u0660\u0660\u0661\n", 1),
        ("alice " + "7" * 5000 + "\n", 1),
        ("alice 70001\nalice 70002\n", 2),
        ("alice 70001\nbob 70001\n", 2),
        ("alice 70001\nalice 70001\n", 2),
        ("alice 70001\n\0\0\0\0\n", 2),
    ],
)
def test_damaged_file_is_refused_and_left_alone(path: Path, lines: str, number: int) -> None:
    """No uid is guessed: the error names the line, and the operator decides."""
    _write(path, lines)
    before = descriptors_of()
    with pytest.raises(AccountsError, match=rf"line {number}: not NAME UID.*restore the file"):
        Accounts(path, _UIDS)
    assert descriptors_of() == before
    assert path.read_bytes() == lines.encode()


def test_file_that_is_not_text_is_refused(path: Path) -> None:
    """Bytes that are not UTF-8 are an ordinary error."""
    path.write_bytes(b"alice \xff\xfe\n")
    with pytest.raises(AccountsError, match="line 1: not NAME UID"):
        Accounts(path, _UIDS)


@pytest.mark.parametrize("torn", ["b", "bob", "bob ", "bob 7", "bob 70002"])
def test_torn_last_line_is_dropped(path: Path, torn: str) -> None:
    """Nobody had got the uid of an unfinished line. The next line is whole."""
    _write(path, f"alice 70001\n{torn}")
    with Accounts(path, _UIDS) as accounts:
        with pytest.raises(KeyError):
            accounts.uid("bob")
        accounts.add(["carol"])
        assert (accounts.uid("alice"), accounts.uid("carol")) == (70_001, 70_002)
    assert path.read_text() == "alice 70001\ncarol 70002\n"


@pytest.mark.parametrize("size", [0, 5, 12, 20, 21])
def test_file_that_lost_its_end_is_refused(path: Path, size: int) -> None:
    """Also at the end of a line. Otherwise somebody else would get the uid of the lost user."""
    _added(path, "alice", "bob")
    assert path.read_text() == "alice 70001\nbob 70002\n"
    with path.open("r+b") as file:
        file.truncate(size)
    for _ in range(2):
        with pytest.raises(AccountsError, match=r"uids has lost its end.*restore the file"):
            Accounts(path, _UIDS)
    path.write_text("alice 70001\nbob 70002\n")
    assert _added(path, "carol") == [70_003]


def test_missing_file_of_an_old_directory_is_refused(path: Path) -> None:
    """The message says what to do. An empty file declares that there have been no users."""
    with pytest.raises(AccountsError, match=r"uids is missing.*install -m 600 /dev/null"):
        Accounts(path, _UIDS, is_new=False)
    assert not path.exists()
    path.touch(0o600)
    with Accounts(path, _UIDS, is_new=False) as accounts:
        accounts.add(["alice"])
    path.unlink()
    with pytest.raises(AccountsError, match="uids is missing"):
        Accounts(path, _UIDS)


def test_file_of_an_earlier_version_is_taken_up(path: Path) -> None:
    """There was no `uids.highest` then. The first start makes it."""
    _write(path, "alice 70001\nbob 70002\n")
    assert _added(path, "bob") == [70_002]
    _write(path, "alice 70001\n")
    with pytest.raises(AccountsError, match="lost its end"):
        Accounts(path, _UIDS)


def test_uid_that_the_second_file_does_not_know_yet_is_kept(path: Path) -> None:
    """The machine may go down after the first file was written."""
    _added(path, "alice")
    with path.open("a") as file:
        file.write("bob 70002\n")
    assert _added(path, "bob", "carol") == [70_002, 70_003]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["uids", "uids.highest"])
def test_file_of_somebody_else_is_refused(path: Path, name: str) -> None:
    """Its owner could have chosen whose uid is whose."""
    _added(path, "alice")
    os.chown(path.with_name(name), NOBODY, NOBODY)
    with pytest.raises(UntrustedFileError, match=f"{name} belongs to uid {NOBODY}"):
        Accounts(path, _UIDS)


def test_long_file_is_read_whole(path: Path) -> None:
    """The number of users does not matter."""
    uids = range(70_001, 90_001)
    names = [f"user-with-a-rather-long-name-{i}" for i in range(5_000)]
    given = _added(path, *names, uids=uids)
    assert path.stat().st_size > 2 * accounts._READ_BYTES
    assert _added(path, names[-1], "new", uids=uids) == [given[-1], given[-1] + 1]


_FULL_DISK = """
import os, resource, signal, sys
from accounts import Accounts
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, limit = sys.argv[1], int(sys.argv[2])
with Accounts(path, range(70001, 70011)) as accounts:
    accounts.add(["alice"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        accounts.add(["bob", "carol"])
    except OSError as error:
        print(error.strerror, os.path.getsize(path))
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


@pytest.mark.parametrize(
    ("room", "reason"),
    [
        (0, "File too large"),
        (5, "No space left on device"),
        (len("bob 70002\n"), "No space left on device"),  # one whole line, and not the other
    ],
)
def test_full_disk_gives_nothing_out(path: Path, room: int, reason: str) -> None:
    """If not all lines fit, no user gets a uid, and the file is unchanged. Later it works."""
    size = len("alice 70001\n")
    program = [sys.executable, "-c", _FULL_DISK, str(path), str(size + room)]
    output = subprocess.check_output(program, cwd=_HERE, text=True, timeout=GUARD_S)
    assert output == f"{reason} {size}\n70001 70002\n"
    assert path.read_text() == "alice 70001\ndave 70002\n"


def test_uid_is_on_the_disk_before_it_is_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure another user must not get it."""

    def fail(_: int) -> None:
        assert "bob 70002" in path.read_text()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Accounts(path, _UIDS) as accounts:
        accounts.add(["alice"])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="Input/output error"):
                accounts.add(["bob"])
        with pytest.raises(KeyError):
            accounts.uid("bob")
    assert path.read_text() == "alice 70001\n"


def test_file_is_used_through_its_descriptor(path: Path) -> None:
    """Users can be added when the process may no longer open the path."""
    with Accounts(path, _UIDS) as accounts:
        accounts.add(["alice"])
        moved = path.rename(path.with_name("moved"))
        accounts.add(["bob"])
    assert moved.read_text() == "alice 70001\nbob 70002\n"
    assert not path.exists()


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
    with pytest.raises(AccountsError, match=f"{text} must be a range of two uids or more"):
        parse_uids(text)


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
