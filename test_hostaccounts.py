"""Tests of jobs that run as accounts of the host."""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING

import pytest

from accounts import AccountsError, choose_uids
from environment import account_of
from hostaccounts import HostAccounts
from privileges import can_change_user, can_kill_any
from testkit import GUARD_S
from trustedfiles import PROGRAM_OWNER
from users import UsersFileError, make_user, parse_users
from worker import Worker

if TYPE_CHECKING:
    from pathlib import Path

_UIDS = range(71_001, 71_010)


def _any_account() -> pwd.struct_passwd:
    """Return an account of this host to whom this program does not belong."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    accounts = [pwd.getpwnam(name) for name in sorted(names)]
    return next(each for each in accounts if each.pw_uid != PROGRAM_OWNER)


def test_user_has_the_account_of_the_name_in_the_users_file() -> None:
    """Name, home and shell are those of the account."""
    account = _any_account()
    accounts = HostAccounts(range(1 << 32))
    accounts.add({"ci": account.pw_name})
    assert accounts.uid("ci") == account.pw_uid
    assert accounts.account("ci") == account_of(account.pw_uid)


def test_user_without_an_account_is_an_error_and_changes_nothing() -> None:
    """The message has the command that makes one."""
    account = _any_account()
    accounts = HostAccounts(range(1 << 32))
    accounts.add({"ci": account.pw_name})
    with pytest.raises(AccountsError, match="useradd -m no-such-account"):
        accounts.add({"new": account.pw_name, "bob": "no-such-account"})
    assert accounts.uid("ci") == account.pw_uid
    with pytest.raises(KeyError):
        accounts.uid("new")


def test_account_out_of_the_range_is_an_error() -> None:
    """Root, and the accounts of the system."""
    accounts = HostAccounts(range(1000, 70_000))
    with pytest.raises(AccountsError, match=r"root of the user alice has the uid 0; .* from 1000"):
        accounts.add({"alice": "root"})


def test_account_to_whom_the_program_belongs_is_an_error() -> None:
    """Its jobs could change the program that root executes."""
    accounts = HostAccounts(range(1 << 32))
    try:
        owner = pwd.getpwuid(PROGRAM_OWNER).pw_name
    except KeyError:
        pytest.skip("this program belongs to no account")
    with pytest.raises(AccountsError, match="the program belongs to the account"):
        accounts.add({"alice": owner})


def test_server_becomes_a_uid_above_those_of_the_accounts() -> None:
    """Without root there are no accounts to run jobs as."""
    if not can_change_user():
        with pytest.raises(AccountsError, match="--accounts host: "):
            choose_uids("auto", "70000-79999", of_host=True)
        return
    if os.geteuid() != 0:
        pytest.skip("needs root, or no right to change users")
    assert choose_uids("auto", "70000-79999", of_host=True) == (70_000, range(1000, 70_000))
    with pytest.raises(AccountsError, match="--accounts host: "):
        choose_uids("auto", "1000-1001", of_host=True)


@pytest.mark.parametrize("account", ["", "builder", "_service"])
def test_users_file_names_the_account(account: str) -> None:
    """In a fourth field, which may be absent. A change of the account changes the user's entry."""
    line = f"{make_user('ci', 'user', 'secret')}" + (f":{account}" if account else "")
    (user,) = parse_users(f"{line}\n".encode(), "users")
    assert user.account == account
    assert str(user) == line


def test_users_file_has_no_fifth_field() -> None:
    """It is a mistake."""
    line = f"{make_user('ci', 'user', 'secret')}:builder:more\n"
    with pytest.raises(
        UsersFileError, match="line 1: not NAME:ROLE:HASH or NAME:ROLE:HASH:ACCOUNT"
    ):
        parse_users(line.encode(), "users")


def test_job_as_an_uid_without_an_account_is_refused(public: Path) -> None:
    """The process that forks looks up the groups itself, and starts nothing if it finds none."""
    if not (os.geteuid() == 0 and can_change_user() and can_kill_any()):
        pytest.skip("needs root")
    tmp = public / "tmp"
    with Worker(enforcement="off", uids=_UIDS, host_accounts=True, tmp_dir=tmp) as worker:
        with pytest.raises(ValueError, match="permission denied"):
            worker.start("true", uid=_UIDS[0])
        assert worker.list() == ()


def test_what_a_job_of_an_account_leaves_in_tmp_stays(public: Path) -> None:
    """The account's user may have other processes that need it. TMPDIR is removed."""
    if not (os.geteuid() == 0 and can_change_user() and can_kill_any()):
        pytest.skip("needs root")
    nobody = pwd.getpwnam("nobody")
    uids = range(nobody.pw_uid, nobody.pw_uid + 1)
    script = 'echo "$TMPDIR"; id -u; id -g; id -G; mktemp /tmp/jobXXXXXX'
    tmp = public / "tmp"
    with Worker(enforcement="off", uids=uids, host_accounts=True, tmp_dir=tmp) as worker:
        job_id = worker.start("sh", ["-c", script], uid=nobody.pw_uid)
        with worker.stream(job_id) as chunks:
            told = b"".join(chunks).decode().split()
        worker.wait(job_id, GUARD_S)
    directory, uid, gid, *groups, left = told
    assert (uid, gid) == (str(nobody.pw_uid), str(nobody.pw_gid))
    others = os.getgrouplist("nobody", nobody.pw_gid)
    assert sorted(map(int, groups)) == sorted(others)
    assert not os.path.exists(directory)
    assert os.path.exists(left)
    os.unlink(left)
