"""The uids of the users' jobs: each user gets a uid once, and nobody else ever gets it.

    accounts = Accounts(store, range(70001, 80000))
    accounts.add(["alice", "bob"])
    accounts.uid("alice")

The table `uids` of the store has a row for every user there ever was. Files and processes that a
user's jobs left behind belong to the uid. So a uid is never given out again, not even after
its user was removed. The gid of a job is the same number.

While a server runs, it has its range of uids `reserved`, so that no other server of this host gives
one of these uids to another user.

Thread safety: one thread at a time may call `add`; other threads may call `uid` meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import logging
import os
import pwd
import re
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from environment import Account, account_of
from errors import in_words
from privileges import can_change_user
from store import reading
from trustedfiles import PROGRAM_OWNER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from store import Store

__all__ = [
    "Accounts",
    "AccountsError",
    "choose_uids",
    "let_jobs_through",
    "parse_uids",
    "reserved",
    "uid_for",
]

logger = logging.getLogger(__name__)

_UID_MIN = 1000  # the accounts of the system are below
_UID_MAX = (1 << 32) - 2  # the next number means "no user" (setresuid(2))
_FLOCK = "hhqqi4x"  # struct flock: kind, whence, start, length, process
_RUN = "/run/job-worker"  # what systemd makes for RuntimeDirectory=job-worker

_SHARED_UID = (
    "jobs run as uid {uid}, like the server: a job can read the server's keys, its users file "
    "and the output of all jobs, and can signal the server and other jobs; start the server as "
    "root, or with CAP_SETUID and CAP_SETGID, to give each user a uid of their own"
)


class AccountsError(Exception):
    """A user cannot get a uid; the message says what to change."""


class Accounts:
    """The uids in the table `uids` of `store`, all of them in the range `uids`.

    `homes`: the directory with the users' homes; None if they have none. An account of the host
    that has a user's uid, or the user's name and a uid of the range, is the user's: its name, home
    and shell are told to the user's jobs.
    Raises `StoreError`; `AccountsError` if the range no longer contains a uid of the table.
    """

    def __init__(self, store: Store, uids: range, *, homes: Path | None = None) -> None:
        self._store = store
        self._homes = homes
        self._accounts: dict[str, Account] = {}
        self._uids = uids
        self._by_name: dict[str, int] = dict(store.query("SELECT name, uid FROM uids"))
        for name, uid in self._by_name.items():
            if uid not in uids:
                raise AccountsError(
                    f"{name} has the uid {uid}, which the range {uids.start}-{uids.stop - 1} does "
                    "not contain; widen --uids"
                )

    def add(self, names: Iterable[str]) -> None:
        """Give a uid to each of `names` that has none yet; after an error, to none of them.

        Looks up the accounts of the host anew. Blocks until the uids are on the disk. Raises
        `StoreError`; `AccountsError` if the range has no free uid left.
        """
        free = _free_uids(self._uids, self._by_name.values())
        new: dict[str, int] = {}
        names = tuple(names)
        for name in names:
            if name not in self._by_name and name not in new:
                uid = self._uid_of_account(name, new) or next(free, None)
                if uid is None:
                    raise AccountsError(
                        f"no uid is left for {name} in the range {self._uids.start}-"
                        f"{self._uids.stop - 1}; widen it with --uids"
                    )
                new[name] = uid
        if new:
            self._store.write([("INSERT INTO uids VALUES (?, ?)", new.items())], durable=True)
            self._by_name |= new
        self._accounts |= {name: self._account_of(name) for name in names}

    def _uid_of_account(self, name: str, new: Mapping[str, int]) -> int | None:
        """Return the uid that an administrator has chosen: that of the host's account `name`."""
        with contextlib.suppress(KeyError):
            uid = pwd.getpwnam(name).pw_uid
            if uid in self._uids and uid not in {*self._by_name.values(), *new.values()}:
                return uid
        return None

    def _account_of(self, name: str) -> Account:
        uid = self._by_name[name]
        with contextlib.suppress(KeyError):
            pwd.getpwuid(uid)
            return account_of(uid)
        return Account(name, f"{self._homes}/{name}") if self._homes else Account(name)

    def uid(self, name: str) -> int:
        """Return the uid of a user that was added. Raises KeyError."""
        return self._by_name[name]

    def account(self, name: str) -> Account:
        """Return what the jobs of a user that was added are told of it. Raises KeyError."""
        return self._accounts[name]


@contextlib.contextmanager
def reserved(uids: range) -> Iterator[None]:
    """Within this context no other server on this host can have any uid of the range.

    The lock is on a file of /run, which all servers see: on the bytes whose positions are the uids.
    So the kernel finds ranges that overlap. It releases the lock when this process ends, however
    that happens. $RUNTIME_DIRECTORY, which systemd sets, takes the place of /run/job-worker. Units
    of several servers may set it differently, so the locks in the directories beside it count, too.
    Raises `AccountsError` if another server has one of the uids. Logs a warning if this user may
    not use the file.
    """
    directory = Path(os.environ.get("RUNTIME_DIRECTORY", _RUN).partition(":")[0])
    path = directory / "uids.lock"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s), so nothing keeps another server from using the same --uids",
            path,
            error.strerror,
        )
        yield
        return
    try:
        lock = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, uids.start, len(uids), 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    except OSError as error:
        os.close(fd)
        raise _is_reserved(uids, path) from error
    try:
        for other in directory.parent.glob(f"*/{path.name}"):
            if _is_locked(other, lock, os.fstat(fd)):
                raise _is_reserved(uids, other)
        yield
    finally:
        os.close(fd)


def _is_reserved(uids: range, path: Path) -> AccountsError:
    return AccountsError(
        f"another server on this host has uids of --uids {uids.start}-{uids.stop - 1}, and "
        f"would run other users under them ({path} is locked); give each server a range of its own"
    )


def _is_locked(path: Path, lock: bytes, own: os.stat_result) -> bool:
    """Whether another process has the lock on a file of root's or ours that is not `own`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        status = os.fstat(fd)
        # Any user can make, and lock, a file in /run/lock.
        if os.path.samestat(status, own) or status.st_uid not in (0, os.geteuid()):
            return False
        kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, lock))
        return bool(kind != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def choose_uids(isolation: str, text: str, *, of_host: bool) -> tuple[int | None, range | None]:
    """Return the uid to become (None: stay), and those of users (None: jobs run as we do).

    `isolation`: "require", "auto" or "off", as in `Settings`. `text`: of `--uids`. `of_host`: jobs
    run as accounts of the host, whose uids lie below that range. Logs a warning if "auto" finds no
    right to change users. Raises `AccountsError`.
    """
    if isolation == "off":
        return None, None
    uid = os.geteuid()
    _range_of(text)  # a mistake is told also where it has no effect
    if not can_change_user():
        warning = _SHARED_UID.format(uid=uid)
        if isolation == "require" or of_host:
            option = "--accounts host" if of_host else "--require-isolation"
            raise AccountsError(f"{option}: {warning}")
        logger.warning("%s", warning)
        return None, None
    uids = parse_uids(text)
    if of_host:
        accounts = range(_UID_MIN, uids.start)
        if uid in accounts or not accounts:
            raise AccountsError(
                f"--accounts host: accounts of jobs have uids from {_UID_MIN} to "
                f"{uids.start - 1}, below --uids, and the server runs as {uid}; start it as root, "
                "with other --uids"
            )
        return uid or uids[0], accounts
    for each, what in ((PROGRAM_OWNER, "to whom this program belongs"), (uid, "which we run as")):
        if each in uids:
            raise AccountsError(f"--uids {text} includes {each}, {what}")
    return uid or uids[0], uids[1:]


def let_jobs_through(directory: Path) -> bool:
    """Let every user pass through a directory of ours, to what is theirs in it, but not list it.

    Returns False if they cannot, because a directory above is closed; then logs a warning.
    """
    try:
        mode = stat.S_IMODE(directory.stat().st_mode)
        directory.chmod(mode | stat.S_IXGRP | stat.S_IXOTH)
        path = directory.resolve()
        for each in (path, *path.parents):
            if not each.stat().st_mode & stat.S_IXOTH:
                logger.warning(
                    "%s is closed to the users of jobs, so jobs have no homes; run: chmod o+x %s, "
                    "or choose another --state-dir",
                    *(each, each),
                )
                return False
    except OSError as error:
        logger.warning("jobs have no homes: %s", in_words(error))
        return False
    return True


def parse_uids(text: str) -> range:
    """Return the range of `--uids FIRST-LAST`. Raises `AccountsError`.

    The range must have two uids or more, none of them below 1000, and the user namespace of
    this process must map them all.
    """
    uids = _range_of(text)
    for name in ("uid_map", "gid_map"):
        mapped = [
            range(int(inside), int(inside) + int(count))
            for inside, _, count in map(
                str.split, Path("/proc/self", name).read_text().splitlines()
            )
        ]
        if not any(uids.start in each and uids.stop - 1 in each for each in mapped):
            raise AccountsError(
                f"--uids {text} is not available in this user namespace; choose from "
                + (", ".join(f"{each.start}-{each.stop - 1}" for each in mapped) or "none")
            )
    return uids


def _range_of(text: str) -> range:
    first, dash, last = text.partition("-")
    if not dash or _number(first) < 0 or _number(last) < 0:
        raise AccountsError(f"--uids {text!r} is not FIRST-LAST, like 70000-79999")
    uids = range(_number(first), _number(last) + 1)
    if not (uids.start >= _UID_MIN and uids.stop - 1 <= _UID_MAX and len(uids) > 1):
        raise AccountsError(
            f"--uids {text} must be a range of two uids or more, from {_UID_MIN} up"
        )
    return uids


def uid_for(name: str, directory: Path, uids: range) -> int:
    """Return the uid that the user has in the store in `directory`, or one that nobody has.

    A server may be using the store. It gives no user a uid that an account of the host has. Raises
    `StoreError`; `AccountsError` if no uid is left.
    """
    known: dict[str, int] = {}
    if directory.exists():
        with reading(directory) as connection:
            known = dict(connection.execute("SELECT name, uid FROM uids"))
    if name in known:
        return known[name]
    uid = next(_free_uids(uids, known.values()), None)
    if uid is None:
        raise AccountsError(f"no uid is left for {name} in --uids; widen it")
    return uid


def _free_uids(uids: range, known: Iterable[int]) -> Iterator[int]:
    """Yield the uids above all `known` ones that no account or group of this host has."""
    above = range(max([*known, uids.start - 1]) + 1, uids.stop)
    return (uid for uid in above if not _is_taken(uid))


def _number(text: str) -> int:
    """Return the number of decimal digits; -1 for any other text."""
    # int() raises for thousands of digits.
    return int(text) if re.fullmatch("[0-9]{1,20}", text) else -1


def _is_taken(uid: int) -> bool:
    """Whether this host has an account or a group of that number."""
    with contextlib.suppress(KeyError):
        pwd.getpwuid(uid)
        return True
    with contextlib.suppress(KeyError):
        grp.getgrgid(uid)
        return True
    return False
