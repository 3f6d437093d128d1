"""Takes what versions without a store kept in files into the store, once.

    store = open_store(Path("state"))

These files were `uids`, `uids.highest`, `logged-out` and `running-time` in the state directory.
They are kept under a name with `.old` at its end, and nobody reads them again. If an earlier
version has run in between, and has made such files anew, the server does not start.

Thread safety: used once, before there are threads.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from errors import StoreError
from store import Store
from trustedfiles import open_private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["are_there", "move_into_store", "open_store"]

_UID = re.compile(r"(\S+) ([0-9]{1,10})")
_REVOKED = re.compile(r"([0-9a-f-]{36}) ([0-9]{1,12})")
_NUMBER = re.compile(r"([0-9]{1,12})")

_NAMES = ("uids", "uids.highest", "logged-out", "running-time")


def open_store(state: Path) -> Store:
    """Return the store of a state directory. Raises as `Store` and `move_into_store` do."""
    homes = state / "homes"  # which belong to users whose uids the store has
    has_homes = homes.is_dir() and any(homes.iterdir())
    store = Store(state / "store", may_be_new=not has_homes or are_there(state))
    try:
        move_into_store(store, state)
    except BaseException:
        store.close()
        raise
    return store


def are_there(state: Path) -> bool:
    """Whether the state directory is that of a version without a store."""
    return any(os.path.lexists(state / name) for name in _NAMES)


def move_into_store(store: Store, state: Path) -> None:
    """Move the content of the files into the store, and rename them.

    Raises `StoreError` for a file that is damaged, and then changes nothing; OSError,
    `UntrustedFileError`.
    """
    if not are_there(state):
        return
    uids = [(name, int(uid)) for name, uid in _rows(state / "uids", _UID, "NAME UID")]
    revoked = [(token, int(s)) for token, s in _rows(state / "logged-out", _REVOKED, "ID ENDS_S")]
    if store.fact("old_files_taken_over"):
        # By a process that was killed before it renamed them.
        _refuse_others(store, state, dict(uids), dict(revoked))
    else:
        running_s = [(int(s),) for (s,) in _rows(state / "running-time", _NUMBER, "12 digits")]
        highest = [int(uid) for (uid,) in _rows(state / "uids.highest", _NUMBER, "a number")]
        last = max((uid for _, uid in uids), default=0)
        if len(dict(uids)) < len(uids) or len({uid for _, uid in uids}) < len(uids):
            raise _damaged(state / "uids", "a name or uid is repeated")
        if max(highest, default=0) > last:
            raise _damaged(
                state / "uids", f"its last uid is {last}, but uids.highest says {max(highest)}"
            )
        store.write(
            [
                ("INSERT INTO uids VALUES (?, ?)", uids),
                ("INSERT OR IGNORE INTO revoked VALUES (?, ?)", revoked),
                ("INSERT OR REPLACE INTO facts VALUES ('running_time_s', ?)", running_s),
                ("INSERT INTO facts VALUES ('old_files_taken_over', ?)", [(1,)]),
            ],
            durable=True,
        )
    for name in _NAMES:
        with contextlib.suppress(FileNotFoundError):
            (state / name).rename(state / f"{name}.old")


def _refuse_others(
    store: Store, state: Path, uids: dict[str, int], revoked: dict[str, int]
) -> None:
    """Raise `StoreError` if the store lacks anything of these files, which it has taken over."""
    has_uids = uids.items() <= dict(store.query("SELECT name, uid FROM uids")).items()
    has_revoked = revoked.keys() <= dict(store.query("SELECT token_id, ends_s FROM revoked")).keys()
    if not has_uids or not has_revoked:
        name, what = ("logged-out", "logouts") if has_uids else ("uids", "users")
        raise StoreError(
            f"{state / name}: it has {what} that the store does not have, because an earlier "
            f"version has run here after the store was made. To go on with the store, move "
            f"{' and '.join(_NAMES)} away, and what new users have in {state / 'homes'}; to go on "
            f"with these files, move {state / 'store'} away"
        )


def _rows(path: Path, form: re.Pattern[str], words: str) -> Iterator[tuple[str, ...]]:
    """Yield the parts of each line. What follows the last newline was never confirmed."""
    try:
        fd = open_private(path, os.O_RDONLY, secret=False)
    except FileNotFoundError:
        return
    with open(fd, "rb") as file:
        *lines, _ = file.read().decode(errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        parts = form.fullmatch(line)
        if parts is None:
            raise _damaged(path, f"line {number} is not {words}")
        yield parts.groups()


def _damaged(path: Path, problem: str) -> StoreError:
    return StoreError(
        f"{path}: {problem}; restore the file: it says which files on this host belong to which "
        "user, or which tokens were revoked. Without a backup use a new state directory and other "
        "--uids"
    )
