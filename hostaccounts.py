"""Accounts of the host, for a server whose jobs run as these: `--accounts host`.

    accounts = HostAccounts(range(1000, 70_000))
    accounts.add({"alice": "alice", "ci": "builder"})      # users, and their accounts
    accounts.uid("ci")

`accounts.py` has the other way: uids of a range, which belong to no account of the host.

Thread safety: one thread at a time may call `add`; other threads may call the rest meanwhile.
"""

from __future__ import annotations

import pwd
from typing import TYPE_CHECKING

from accounts import AccountsError
from environment import Account, account_of
from trustedfiles import PROGRAM_OWNER

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["HostAccounts"]


class HostAccounts:
    """The accounts of the users. `uids`: those that an account for jobs may have."""

    def __init__(self, uids: range) -> None:
        self._uids = uids
        self._by_name: dict[str, tuple[int, Account]] = {}

    def add(self, names: Mapping[str, str]) -> None:
        """Look up the account of each user anew; after an error, all stay as they were.

        Raises `AccountsError` for a user without an account, or with one that jobs may not have.
        """
        self._by_name |= {name: self._find(name, account) for name, account in names.items()}

    def _find(self, name: str, account: str) -> tuple[int, Account]:
        try:
            uid = pwd.getpwnam(account).pw_uid
        except KeyError:
            raise AccountsError(
                f"the host has no account {account} for the user {name}; run: "
                f"useradd -m {account}, or name another in the users file: NAME:ROLE:HASH:ACCOUNT"
            ) from None
        if uid not in self._uids:
            raise AccountsError(
                f"the account {account} of the user {name} has the uid {uid}; jobs run as accounts "
                f"from {self._uids.start} to {self._uids.stop - 1}, below the first of --uids"
            )
        if uid == PROGRAM_OWNER:
            raise AccountsError(
                f"the program belongs to the account {account}, so jobs of the user {name} could "
                "change it; name another account in the users file: NAME:ROLE:HASH:ACCOUNT"
            )
        return uid, account_of(uid)

    def uid(self, name: str) -> int:
        """Return the uid of a user that was added. Raises KeyError."""
        return self._by_name[name][0]

    def account(self, name: str) -> Account:
        """Return what the jobs of a user that was added are told of it. Raises KeyError."""
        return self._by_name[name][1]
