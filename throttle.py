"""Slows down the guessing of passwords, and keeps logins possible for everybody else.

    throttle = LoginThrottle()
    with throttle.attempt(user, peer, certificate) as attempt:
        attempt.succeeded = password_is_right(user, password)

A *peer* is the place that an attempt comes from, and a *certificate* is what proves who may try
from there: both are strings that the user of this module makes. One certificate can come from many
addresses, so from many peers. A user is the name as it was sent. This module does not know which
users exist, so its answers cannot reveal it. A failure is counted five times:

- by user and peer, against guessing one user's password;
- by peer, against trying a few passwords with many names;
- by user and certificate, and by certificate, against the same from many addresses. These two
  have more free attempts, because several people may share a certificate;
- by user, against guessing from many peers. This count slows down only a peer that itself
  failed for the user, so nobody can lock out a user from elsewhere.

After some free attempts each further attempt has to wait, twice as long every time. The wait
begins with the last failure. An earlier attempt is refused without a check of its password;
it is not counted and does not extend the wait. So a peer has at most 1,350 guesses a day: the
free attempts, then 15 minutes without attempts until the failures are forgotten, and again. A
certificate has about 2,300.

A success removes this user's failures from this peer from all counts: they were typing
errors. The peer's other failures stay, so a valid account cannot erase the failures for other
users' names.

The counts are in the table `failed_logins` of the store, so a restart forgives nobody.

Thread safety: any thread may call anything. One lock guards all state. It is never held during the
check of a password. It is held for some microseconds; while a result is written to the store; for
some 10 ms when all entries of full tables are forgotten at once.

Sources: OWASP Authentication Cheat Sheet (login throttling), NIST SP 800-63B-3 section
5.2.2 (rate limiting).
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import Counter, OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from store import Store

__all__ = ["Attempt", "LoginThrottle", "TooManyLoginsError"]

logger = logging.getLogger(__name__)

# Attempts whose password is being checked, or waits for the check. One password is hashed at a
# time, in some 0.5 s, so the last of eight attempts waits 4 s. A peer may have only one, and a
# certificate two: with more they could keep everybody else out, and have guesses checked before
# they are slowed down.
_ATTEMPTS_AT_ONCE = 8
_ATTEMPTS_OF_ONE_CERTIFICATE = 2
_RETRY_WHEN_FULL_S = 1  # an attempt ends about this often

# Longer than the longest wait: after that wait a peer must not have free attempts again.
_FORGET_AFTER_S = 15 * 60

# In each of the five tables, in some 3 MB. An attacker with more names or addresses makes them
# forget the oldest failures, which matter least.
_MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class _Policy:
    """The wait after a number of failures: 0 at first, then 2, 4, 8 ... seconds."""

    free_attempts: int
    longest_wait_s: int

    def wait_s(self, failures: int) -> int:
        if failures < self.free_attempts:
            return 0
        doublings = failures - self.free_attempts + 1
        # The exponent is limited first, so a large count does not make a huge number.
        return min(self.longest_wait_s, 1 << min(doublings, self.longest_wait_s.bit_length()))


# People mistype a password, but seldom three times. An honest user should never wait for more than
# a minute.
_BY_PAIR = _Policy(free_attempts=3, longest_wait_s=60)
# Several people may share a peer, so a peer has more free attempts. After them the peer is most
# likely an attacker.
_BY_PEER = _Policy(free_attempts=10, longest_wait_s=5 * 60)
# The same two for a certificate.
_BY_HELD_PAIR = _Policy(free_attempts=6, longest_wait_s=60)
_BY_CERTIFICATE = _Policy(free_attempts=20, longest_wait_s=5 * 60)
# More failures than one person's typing errors. The wait is at most a minute, because it also
# delays the true user after a typing error while somebody else guesses.
_BY_USER = _Policy(free_attempts=20, longest_wait_s=60)


class TooManyLoginsError(Exception):
    """The attempt is refused without a check; the message says why and when to try again.

    Attribute: `retry_after_s`, whole seconds, at least 1.
    """

    def __init__(self, why: str, retry_after_s: int) -> None:
        super().__init__(f"{why}; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Attempt:
    """A login that is under way.

    Attribute: `succeeded`: whether the password was right, which the user of the context
    sets. Nothing is counted while it is None.
    """

    succeeded: bool | None = None


class LoginThrottle:
    """Decides which attempts to log in may be checked now.

    `clock`: returns seconds, and never goes back. `store`: where the failures are kept; their times
    are those of the clock, which must then go on over restarts. Raises `StoreError`.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, store: Store | None = None
    ) -> None:
        self._clock = clock
        self._store = store
        # Guards all attributes below. Never held while a password is checked. Held while the store
        # is written.
        self._lock = threading.Lock()
        self._under_way: set[bytes] = set()  # peers
        self._held: Counter[bytes] = Counter()  # attempts under way by certificate
        self._by_pair = _Failures("user and peer")
        self._by_peer = _Failures("peer")
        self._by_held_pair = _Failures("user and certificate")
        self._by_certificate = _Failures("certificate")
        self._by_user = _Failures("user")
        if store is not None:
            self._load(store)

    def _tables(self) -> dict[str, _Failures]:
        """Return the tables by the name that each has in the store."""
        return {table.name: table for table, _ in self._counts(b"", b"", b"")}

    def _load(self, store: Store) -> None:
        tables = self._tables()
        rows = "SELECT what, who, count, last_s FROM failed_logins ORDER BY last_s"
        now = self._clock()
        for what, who, count, last_s in store.query(rows):
            # After a crash the clock may have gone back.
            tables[what].put(who, _Failed(count, min(last_s, now)))

    def _save_locked(self, keys: tuple[tuple[_Failures, bytes], ...]) -> None:
        """Write the counts of these keys. A failure is logged; the counts in memory go on."""
        if self._store is None:
            return
        counts = [(table.name, key, table.get(key)) for table, key in keys]
        kept = [(what, who, each.count, each.last_s) for what, who, each in counts if each.count]
        gone = [(what, who) for what, who, each in counts if not each.count]
        too_old = [(self._clock() - _FORGET_AFTER_S,)]
        try:
            self._store.write(
                [
                    ("INSERT OR REPLACE INTO failed_logins VALUES (?, ?, ?, ?)", kept),
                    ("DELETE FROM failed_logins WHERE what = ? AND who = ?", gone),
                    ("DELETE FROM failed_logins WHERE last_s <= ?", too_old),
                ]
            )
        except StoreError as error:
            logger.warning("a failed login is counted until the next restart only: %s", error)

    @contextmanager
    def attempt(self, user: str, peer: str, certificate: str = "") -> Iterator[Attempt]:
        """The context in which a password of `user` (any string) may be checked.

        `certificate`: "" if each peer is to count as one of its own.

        The block sets `succeeded` of the `Attempt` that it gets. The end of the block counts
        the result, also after an exception. Without a result nothing is counted. Raises
        `TooManyLoginsError` at once if this attempt must not be checked now.
        """
        keys = _key(user), _key(peer), _key(certificate or peer)
        _, peer_key, certificate_key = keys
        attempt = Attempt()
        with self._lock:
            self._check_locked(*keys)
            self._under_way.add(peer_key)
            self._held[certificate_key] += 1
        try:
            yield attempt
        finally:
            with self._lock:
                self._under_way.remove(peer_key)
                self._held[certificate_key] -= 1
                if not self._held[certificate_key]:
                    del self._held[certificate_key]
                if attempt.succeeded is not None:
                    self._count_locked(*keys, succeeded=attempt.succeeded)

    def _check_locked(self, user: bytes, peer: bytes, certificate: bytes) -> None:
        """Raise `TooManyLoginsError` if this attempt must not be checked now."""
        now = self._clock()
        for table, _ in self._counts(user, peer, certificate):
            table.forget(now)
        of_pair, of_peer = self._by_pair.get(user + peer), self._by_peer.get(peer)
        # The wait begins with this peer's own failure; others could prolong any other wait for
        # ever. A peer without failures failed infinitely long ago, so it does not wait.
        pair_wait_s = max(
            _BY_PAIR.wait_s(of_pair.count), _BY_USER.wait_s(self._by_user.get(user).count)
        )
        pair_left_s = pair_wait_s - (now - of_pair.last_s)
        peer_left_s = _BY_PEER.wait_s(of_peer.count) - (now - of_peer.last_s)
        if pair_left_s > 0 and pair_left_s >= peer_left_s:
            raise TooManyLoginsError(
                "too many failed logins for this user from here", math.ceil(pair_left_s)
            )
        if peer_left_s > 0:
            raise TooManyLoginsError("too many failed logins from here", math.ceil(peer_left_s))
        of_held_pair = self._by_held_pair.get(user + certificate)
        of_certificate = self._by_certificate.get(certificate)
        for policy, failed, what in (
            (_BY_HELD_PAIR, of_held_pair, "for this user with your certificate"),
            (_BY_CERTIFICATE, of_certificate, "with your certificate"),
        ):
            left_s = policy.wait_s(failed.count) - (now - failed.last_s)
            if left_s > 0:
                raise TooManyLoginsError(f"too many failed logins {what}", math.ceil(left_s))
        if self._held[certificate] >= _ATTEMPTS_OF_ONE_CERTIFICATE:
            raise TooManyLoginsError(
                "other logins with your certificate are under way", _RETRY_WHEN_FULL_S
            )
        if peer in self._under_way:
            raise TooManyLoginsError("another login from here is under way", _RETRY_WHEN_FULL_S)
        if len(self._under_way) >= _ATTEMPTS_AT_ONCE:
            raise TooManyLoginsError("too many logins at once", _RETRY_WHEN_FULL_S)

    def _counts(
        self, user: bytes, peer: bytes, certificate: bytes
    ) -> tuple[tuple[_Failures, bytes], ...]:
        """Return the tables, each with the key under which a failure is counted in it."""
        return (
            (self._by_pair, user + peer),
            (self._by_peer, peer),
            (self._by_held_pair, user + certificate),
            (self._by_certificate, certificate),
            (self._by_user, user),
        )

    def _count_locked(
        self, user: bytes, peer: bytes, certificate: bytes, *, succeeded: bool
    ) -> None:
        counts = self._counts(user, peer, certificate)
        slips = 0
        if succeeded:
            slips = self._by_pair.get(user + peer).count
            for table, key in counts:
                table.take_back(key, slips)
        else:
            now = self._clock()
            for table, key in counts:
                table.add(key, now)
        if not succeeded or slips:
            self._save_locked(counts)


def _key(name: str) -> bytes:
    """Return 32 bytes for a name of any length, because attackers choose the length."""
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class _Failed:
    """The number of failures, and the time of the last one."""

    count: int
    last_s: float


_NEVER = _Failed(0, -math.inf)


class _Failures:
    """A bounded table of failures. Guarded by the lock of `LoginThrottle`.

    Attribute: `name`, of the table in the store.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # In the order of the last failures.
        self._failed: OrderedDict[bytes, _Failed] = OrderedDict()

    def get(self, key: bytes) -> _Failed:
        return self._failed.get(key, _NEVER)

    def add(self, key: bytes, now: float) -> None:
        self.put(key, _Failed(self.get(key).count + 1, now))

    def put(self, key: bytes, failed: _Failed) -> None:
        """Set the failures of a key, which are the latest of all."""
        self._failed[key] = failed
        self._failed.move_to_end(key)
        if len(self._failed) > _MAX_ENTRIES:
            self._failed.popitem(last=False)

    def take_back(self, key: bytes, count: int) -> None:
        """Subtract `count` failures. The others are forgotten at the same time as before."""
        failed = self.get(key)
        if failed.count > count:
            self._failed[key] = _Failed(failed.count - count, failed.last_s)
        else:
            self._failed.pop(key, None)

    def forget(self, now: float) -> None:
        while self._failed:
            key, failed = next(iter(self._failed.items()))
            if now - failed.last_s < _FORGET_AFTER_S:
                return
            del self._failed[key]
