"""The uids of the users' jobs: each user gets a uid once, and nobody else ever gets it.

    accounts = Accounts("state/uids", range(70001, 80000))
    accounts.add(["alice", "bob"])
    accounts.uid("alice")

The file has a line `NAME UID` for every user there ever was. Files and processes that a
user's jobs left behind belong to the uid. So a uid is never given out again, not even after
its user was removed. The gid of a job is the same number.

A second file, `uids.highest`, has the highest uid that was ever given out. If the first file is
gone or lost its end, the two do not fit, and the constructor raises an error: otherwise the uids of
the lost users would be given to others.

Both files are opened once, so users can be added after the process has given up root. Only one
process at a time may use them.

While a server runs, it has its range of uids `reserved`, so that no other server of this host gives
one of these uids to another user.

Thread safety: one thread at a time may call `add`; other threads may call `uid` meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import logging
import os
import pwd
import re
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Self

from environment import Account, account_of
from privileges import can_change_user
from trustedfiles import PROGRAM_OWNER, open_private

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

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
_READ_BYTES = 64 * 1024
_RUN = "/run/job-worker"  # what systemd makes for RuntimeDirectory=job-worker
_RESTORE = (
    "restore the file: it says which files on this host belong to which user. Without a backup use "
    "a new state directory and other --uids"
)


_SHARED_UID = (
    "jobs run as uid {uid}, like the server: a job can read the server's keys, its users file "
    "and the output of all jobs, and can signal the server and other jobs; start the server as "
    "root, or with CAP_SETUID and CAP_SETGID, to give each user a uid of their own"
)


class AccountsError(Exception):
    """A user cannot get a uid; the message says what to change."""


class Accounts:
    """The uids in the file `path`, all of them in the range `uids`.

    `homes`: the directory with the users' homes; None if they have none. An account of the host
    that has a user's uid, or the user's name and a uid of the range, is the user's: its name, home
    and shell are told to the user's jobs.
    A missing file is made, with mode 0600, if `is_new`: no server has used this directory before.
    Raises OSError, `UntrustedFileError`; `AccountsError` if the file is missing or damaged, or if
    the range no longer contains a uid of the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        uids: range,
        *,
        is_new: bool = True,
        homes: Path | None = None,
    ) -> None:
        self._homes = homes
        self._accounts: dict[str, Account] = {}
        self._path = Path(path)
        self._uids = uids
        self._by_name: dict[str, int] = {}
        highest = self._path.with_name(f"{self._path.name}.highest")
        if not self._path.exists() and (highest.exists() or not is_new):
            raise AccountsError(
                f"{self._path} is missing, but this state directory is not new; {_RESTORE}. If no "
                f"server with --uids has used it, run: install -m 600 /dev/null {self._path}"
            )
        with contextlib.ExitStack() as undo:
            self._fd = open_private(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, secret=False)
            undo.callback(os.close, self._fd)
            self._highest_fd = open_private(highest, os.O_RDWR | os.O_CREAT, secret=False)
            undo.callback(os.close, self._highest_fd)
            self._load()
            self._check_highest()
            undo.pop_all()

    def _check_highest(self) -> None:
        """Raise `AccountsError` if the file has lost its end."""
        text = os.pread(self._highest_fd, _READ_BYTES, 0).decode(errors="replace").strip()
        highest, last = _number(text) if text else 0, max(self._by_name.values(), default=0)
        if highest < 0 or highest > last:
            raise AccountsError(
                f"{self._path} has lost its end: the last uid in it is {last or 'none'}, but "
                f"{self._path.name}.highest says {text!r}; {_RESTORE}"
            )
        if highest < last:  # a file of an earlier version, or the machine went down in between
            self._write_highest(last)

    def _write_highest(self, uid: int) -> None:
        os.pwrite(self._highest_fd, b"%010d\n" % uid, 0)
        os.fsync(self._highest_fd)

    def _load(self) -> None:
        data = b""
        while chunk := os.pread(self._fd, _READ_BYTES, len(data)):
            data += chunk
        *lines, rest = data.split(b"\n")
        if rest:  # the machine went down during the write, so nobody got this uid
            os.ftruncate(self._fd, len(data) - len(rest))
        for number, line in enumerate(lines, start=1):
            name, _, text = line.decode(errors="replace").partition(" ")
            uid = _number(text)
            if not name or uid < 0 or name in self._by_name or uid in self._by_name.values():
                raise AccountsError(
                    f"{self._path}, line {number}: not NAME UID, or a repeated name or uid; "
                    f"{_RESTORE}"
                )
            if uid not in self._uids:
                raise AccountsError(
                    f"{self._path}, line {number}: {name} has the uid {uid}, which the range "
                    f"{self._uids.start}-{self._uids.stop - 1} does not contain; widen --uids"
                )
            self._by_name[name] = uid

    def add(self, names: Iterable[str]) -> None:
        """Give a uid to each of `names` that has none yet; after an error, to none of them.

        Looks up the accounts of the host anew. Blocks until the uids are on the disk. Raises
        OSError; `AccountsError` if the range has no free uid left.
        """
        free = iter(
            range(max([*self._by_name.values(), self._uids.start - 1]) + 1, self._uids.stop)
        )
        new: dict[str, int] = {}
        names = tuple(names)
        for name in names:
            if name not in self._by_name and name not in new:
                uid = self._uid_of_account(name, new)
                uid = uid or next((each for each in free if not _is_taken(each)), None)
                if uid is None:
                    raise AccountsError(
                        f"no uid is left for {name} in the range {self._uids.start}-"
                        f"{self._uids.stop - 1}; widen it with --uids"
                    )
                new[name] = uid
        self._write(new)
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

    def _write(self, new: Mapping[str, int]) -> None:
        """Add uids that are new."""
        if not new:
            return
        size = os.fstat(self._fd).st_size
        data = "".join(f"{name} {uid}\n" for name, uid in new.items()).encode()
        try:
            written = os.write(self._fd, data)
            os.fsync(self._fd)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))  # noqa: TRY301 -- treated like an error of the kernel
        except OSError:
            os.ftruncate(self._fd, size)
            raise
        self._by_name |= new
        # After the line itself: if the machine goes down in between, nothing is refused.
        with contextlib.suppress(OSError):  # a full disk; the next start writes it
            self._write_highest(max(new.values()))

    def uid(self, name: str) -> int:
        """Return the uid of a user that was added. Raises KeyError."""
        return self._by_name[name]

    def account(self, name: str) -> Account:
        """Return what the jobs of a user that was added are told of it. Raises KeyError."""
        return self._accounts[name]

    def close(self) -> None:
        """Close the files."""
        os.close(self._fd)
        os.close(self._highest_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def reserved(uids: range) -> Iterator[None]:
    """Within this context no other server on this host can have any uid of the range.

    The lock is on a file of /run, which all servers see: on the bytes whose positions are the uids.
    So the kernel finds ranges that overlap. It releases the lock when this process ends, however
    that happens. $RUNTIME_DIRECTORY, which systemd sets, takes the place of /run/job-worker.
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
        # struct flock: kind, whence, start, length, process
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, uids.start, len(uids), 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    except OSError as error:
        os.close(fd)
        raise AccountsError(
            f"another server on this host has uids of --uids {uids.start}-{uids.stop - 1}, and "
            f"would run other users under them ({path} is locked: {error.strerror}); give each "
            "server a range of its own"
        ) from error
    try:
        yield
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
        logger.warning("jobs have no homes: %s", error)
        return False
    return True


def parse_uids(text: str) -> range:
    """Return the range of `--uids FIRST-LAST`. Raises `AccountsError`.

    The range must have two uids or more, none of them below 1000, and the user namespace of
    this process must map them all.
    """
    first, dash, last = text.partition("-")
    if not dash or _number(first) < 0 or _number(last) < 0:
        raise AccountsError(f"--uids {text!r} is not FIRST-LAST, like 70000-79999")
    uids = range(_number(first), _number(last) + 1)
    if not (uids.start >= _UID_MIN and uids.stop - 1 <= _UID_MAX and len(uids) > 1):
        raise AccountsError(
            f"--uids {text} must be a range of two uids or more, from {_UID_MIN} up"
        )
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


def uid_for(name: str, path: Path, uids: range) -> int:
    """Return the uid that the user has in the file `path`, or one that nobody has.

    A server may be using the file. It gives no user a uid that an account of the host has. Raises
    OSError; `AccountsError` if no uid is left.
    """
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    known = {each: _number(uid) for each, _, uid in (line.partition(" ") for line in lines)}
    if name in known:
        return known[name]
    free = range(max([*known.values(), uids.start - 1]) + 1, uids.stop)
    uid = next((each for each in free if not _is_taken(each)), None)
    if uid is None:
        raise AccountsError(f"no uid is left for {name} in --uids; widen it")
    return uid


def _number(text: str) -> int:
    """Return the number of decimal digits; -1 for any other text."""
    return (
        int(text) if re.fullmatch("[0-9]{1,20}", text) else -1
    )  # int() raises for thousands of digits


def _is_taken(uid: int) -> bool:
    """Whether this host has an account or a group of that number."""
    with contextlib.suppress(KeyError):
        pwd.getpwuid(uid)
        return True
    with contextlib.suppress(KeyError):
        grp.getgrgid(uid)
        return True
    return False
