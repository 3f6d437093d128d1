"""Which uid the jobs of each user run as: given out once, and never to anybody else.

    accounts = Accounts("state/uids", range(70001, 80000))
    accounts.add(["alice", "bob"])
    accounts.uid("alice")

The file has a line `NAME UID` for every user there ever was. Files and processes that
somebody's jobs left behind belong to a number; so it is not given out again, not even
when its user is removed. The gid of a job is the same number.

The file is opened once, so that users can be added after the process has given up its
rights. One process at a time may use it.

Thread safety: `add` may run beside `uid`, but not beside another `add`.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import re
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Accounts", "AccountsError", "parse_uids"]

_UID_MIN = 1000  # below are the system's own accounts
_UID_MAX = (1 << 32) - 2  # the last number means "no user" (setresuid(2))
_READ_BYTES = 64 * 1024


class AccountsError(Exception):
    """The uids cannot be given out; the message says what to change."""


class Accounts:
    """The uids in the file `path`, made with mode 0600, all of them in `uids`.

    Raises OSError; `AccountsError` when the file is damaged or the range has changed.
    """

    def __init__(self, path: str | os.PathLike[str], uids: range) -> None:
        self._path = Path(path)
        self._uids = uids
        self._by_name: dict[str, int] = {}
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o600)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        data = b""
        while chunk := os.pread(self._fd, _READ_BYTES, len(data)):
            data += chunk
        *lines, rest = data.split(b"\n")
        if rest:  # the line was not complete when the machine went down; nobody has had it
            os.ftruncate(self._fd, len(data) - len(rest))
        for number, line in enumerate(lines, start=1):
            name, _, text = line.decode(errors="replace").partition(" ")
            uid = _number(text)
            if not name or uid < 0 or name in self._by_name or uid in self._by_name.values():
                raise AccountsError(
                    f"{self._path}, line {number}: not NAME UID, or a second one; restore the "
                    "file: it says whose files on this host belong to whom"
                )
            if uid not in self._uids:
                raise AccountsError(
                    f"{self._path}, line {number}: {name} has the uid {uid}, which is not in the "
                    f"range {self._uids.start}-{self._uids.stop - 1} any more; widen --uids again"
                )
            self._by_name[name] = uid

    def add(self, names: Iterable[str]) -> None:
        """Give an uid to each of `names` that has none yet; all or, on an error, none.

        Blocks until they are on the disk. Raises `AccountsError` when there is none
        left, OSError.
        """
        free = iter(
            range(max([*self._by_name.values(), self._uids.start - 1]) + 1, self._uids.stop)
        )
        new: dict[str, int] = {}
        for name in names:
            if name not in self._by_name and name not in new:
                uid = next((each for each in free if not _is_taken(each)), None)
                if uid is None:
                    raise AccountsError(
                        f"no uid is left for {name} in the range {self._uids.start}-"
                        f"{self._uids.stop - 1}; widen it with --uids"
                    )
                new[name] = uid
        if not new:
            return
        size = os.fstat(self._fd).st_size
        data = "".join(f"{name} {uid}\n" for name, uid in new.items()).encode()
        try:
            written = os.write(self._fd, data)
            os.fsync(self._fd)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))  # noqa: TRY301 -- undone like the kernel's
        except OSError:
            os.ftruncate(self._fd, size)
            raise
        self._by_name |= new

    def uid(self, name: str) -> int:
        """Return the uid of a user that was added. Raises KeyError."""
        return self._by_name[name]

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_uids(text: str) -> range:
    """Return the range that `FIRST-LAST` says. Raises `AccountsError`.

    At least two of them, none of a system account, and all of them usable in the user
    namespace we are in.
    """
    first, dash, last = text.partition("-")
    if not dash or _number(first) < 0 or _number(last) < 0:
        raise AccountsError(f"--uids {text!r} is not FIRST-LAST, like 70000-79999")
    uids = range(_number(first), _number(last) + 1)
    if not (uids.start >= _UID_MIN and uids.stop - 1 <= _UID_MAX and len(uids) > 1):
        raise AccountsError(f"--uids {text} must be two numbers or more, from {_UID_MIN} up")
    for name in ("uid_map", "gid_map"):
        mapped = [
            range(int(inside), int(inside) + int(count))
            for inside, _, count in map(
                str.split, Path("/proc/self", name).read_text().splitlines()
            )
        ]
        if not any(uids.start in each and uids.stop - 1 in each for each in mapped):
            raise AccountsError(
                f"--uids {text} is not available in this user namespace, which has "
                + (", ".join(f"{each.start}-{each.stop - 1}" for each in mapped) or "none")
            )
    return uids


def _number(text: str) -> int:
    """Return the number that is written in decimal digits; -1 for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,20}", text) else -1  # int() refuses thousands


def _is_taken(uid: int) -> bool:
    """Whether this host has an account or a group of that number."""
    with contextlib.suppress(KeyError):
        pwd.getpwuid(uid)
        return True
    with contextlib.suppress(KeyError):
        grp.getgrgid(uid)
        return True
    return False
