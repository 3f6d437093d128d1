"""Slows down whoever guesses passwords, and keeps the others able to log in.

    throttle = LoginThrottle()
    with throttle.attempt(user, peer) as attempt:
        attempt.succeeded = password_is_right(user, password)

A *peer* is where attempts come from, as a string that the caller makes. Users are names
as they were sent; whether there is such a user is not known here, so nothing here can
tell it. What was failed is counted three times:

- by user and peer: somebody guesses one user's password;
- by peer: somebody tries a few passwords with many names;
- by user: somebody guesses from many peers. This slows down only those peers that failed
  for this user themselves, so nobody is locked out by what others do elsewhere.

After some free attempts each further one has to wait, twice as long every time. The wait
counts from the last failure. An attempt that comes earlier is refused unchecked; it is
not counted and extends nothing. At best a peer gets 1,350 guesses a day: some free ones
at a time, and then 15 minutes of silence until they are forgotten.

A success takes back what this user failed from this peer, in all three counts: those were
slips. The rest of a peer's count stays, so that a valid account cannot be used to
wash away the failures for other users' names.

Thread safety: everything may be called from any thread, and nothing waits here. One lock
guards all. It is never held while a password is checked, but for some microseconds, and
for some 10 ms when everything in full tables is forgotten at once.

Sources: OWASP Authentication Cheat Sheet (login throttling), NIST SP 800-63B-3 section
5.2.2 (rate limiting).
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Attempt", "LoginThrottle", "TooManyLoginsError"]

# Those whose password is checked or waits for it. Two are hashed at a time, for some 0.5 s
# each, so the last of eight waits for 2 s. One of each peer: else a single peer could take
# all places, and could have several guesses checked before the first is counted.
_ATTEMPTS_AT_ONCE = 8
_RETRY_WHEN_FULL_S = 1  # about what it takes until a place is free

# Longer than the longest wait, so that waiting it out does not bring free attempts back.
_FORGET_AFTER_S = 15 * 60

# In each of the three tables: some 3 MB. Attackers who have that many names or addresses
# push out the oldest counts, which are those that matter least.
_MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class _Policy:
    """How long an attempt has to wait after so many failures: 0, then 2, 4, 8 ... seconds."""

    free_attempts: int
    longest_wait_s: int

    def wait_s(self, failures: int) -> int:
        if failures < self.free_attempts:
            return 0
        doublings = failures - self.free_attempts + 1
        # The exponent is cut first: a large count must not make a huge number.
        return min(self.longest_wait_s, 1 << min(doublings, self.longest_wait_s.bit_length()))


# People mistype a password or use a wrong one, but seldom three times. Who is known to
# have the right one in the end should not wait for more than a minute.
_BY_PAIR = _Policy(free_attempts=3, longest_wait_s=60)
# Several people may share a peer, so it has more free attempts. But after them hardly
# anybody is left who means well.
_BY_PEER = _Policy(free_attempts=10, longest_wait_s=5 * 60)
# More than one person's slips within the time that is remembered. No longer than a minute:
# it hits true users too, if they mistype while others guess.
_BY_USER = _Policy(free_attempts=20, longest_wait_s=60)


class TooManyLoginsError(Exception):
    """The attempt is refused, unchecked; the message says why and when to try again.

    Attribute: `retry_after_s`, in whole seconds, at least 1.
    """

    def __init__(self, why: str, retry_after_s: int) -> None:
        super().__init__(f"{why}; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Attempt:
    """A login that is under way.

    Attribute: `succeeded`, to be set to whether the password was right. While it is None
    nothing has been found out, and nothing will be counted.
    """

    succeeded: bool | None = None


class LoginThrottle:
    """Decides which attempts to log in may be checked now.

    `clock`: tells seconds and never goes back.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Guards all below. Never held while a password is checked or anything else locked.
        self._lock = threading.Lock()
        self._under_way: set[bytes] = set()  # peers
        self._by_pair = _Failures()
        self._by_peer = _Failures()
        self._by_user = _Failures()

    @contextmanager
    def attempt(self, user: str, peer: str) -> Iterator[Attempt]:
        """Check the password of `user`, any string, within this context.

        Set `succeeded` of what it yields. It counts when the block is left, however that
        happens. An exception before it is set, as when the server closes, counts nothing.
        Raises `TooManyLoginsError` at once when the attempt must not be checked now.
        """
        user_key, peer_key = _key(user), _key(peer)
        attempt = Attempt()
        with self._lock:
            self._check_locked(user_key, peer_key)
            self._under_way.add(peer_key)
        try:
            yield attempt
        finally:
            with self._lock:
                self._under_way.remove(peer_key)
                if attempt.succeeded is not None:
                    self._count_locked(user_key, peer_key, succeeded=attempt.succeeded)

    def _check_locked(self, user: bytes, peer: bytes) -> None:
        """Raise `TooManyLoginsError` if this attempt must not be checked now."""
        now = self._clock()
        for table in (self._by_pair, self._by_peer, self._by_user):
            table.forget(now)
        of_pair, of_peer = self._by_pair.get(user + peer), self._by_peer.get(peer)
        # From this peer's own failure on, for others could prolong it for ever. A peer without
        # one last failed infinitely long ago, so nothing is left of any wait.
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
        if peer in self._under_way:
            raise TooManyLoginsError("another login from here is under way", _RETRY_WHEN_FULL_S)
        if len(self._under_way) >= _ATTEMPTS_AT_ONCE:
            raise TooManyLoginsError("too many logins at once", _RETRY_WHEN_FULL_S)

    def _count_locked(self, user: bytes, peer: bytes, *, succeeded: bool) -> None:
        counts = ((self._by_pair, user + peer), (self._by_peer, peer), (self._by_user, user))
        if succeeded:
            slips = self._by_pair.get(user + peer).count
            for table, key in counts:
                table.take_back(key, slips)
        else:
            now = self._clock()
            for table, key in counts:
                table.add(key, now)


def _key(name: str) -> bytes:
    """Return 32 bytes for a name of any length, for attackers choose how long it is."""
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class _Failed:
    """How often something failed, and when it last did."""

    count: int
    last_s: float


_NEVER = _Failed(0, -math.inf)


class _Failures:
    """A table of failures with a bound. Guarded by the lock of `LoginThrottle`."""

    def __init__(self) -> None:
        self._failed: OrderedDict[bytes, _Failed] = OrderedDict()  # who failed last is last

    def get(self, key: bytes) -> _Failed:
        return self._failed.get(key, _NEVER)

    def add(self, key: bytes, now: float) -> None:
        self._failed[key] = _Failed(self.get(key).count + 1, now)
        self._failed.move_to_end(key)
        if len(self._failed) > _MAX_ENTRIES:
            self._failed.popitem(last=False)

    def take_back(self, key: bytes, count: int) -> None:
        """Count `count` less. It does not change when the rest is forgotten."""
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
