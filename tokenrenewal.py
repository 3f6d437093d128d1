"""The token that a client uses, exchanged for a newer one in time.

    renewal = Renewal(token, exchange, on_new=keep)
    metadata = f"Bearer {renewal.current()}"
    renewal.keep_fresh()  # before a stream, which may last longer than the token
    ...
    renewal.close()

A token is exchanged when less than half of its life is left: before a call, and while a stream is
open, in a thread of this module. If that fails, the old token is used, and the exchange is tried
again later. The old token stays valid until its own expiry, so an answer that gets lost loses
nothing.

Thread safety: any thread may call anything. The thread `token` is started by the first `keep_fresh`
and ended by `close`. It is a daemon, because a program may end without closing its client.
"""

from __future__ import annotations

import time

from clienterrors import ClientError
from tokentimes import TokenTimes

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

__all__ = ["Renewal"]

_AGAIN_S = 5.0  # after an exchange that failed
# With these answers the server gives no newer token for this one.
_NEVER = {"UNAUTHENTICATED", "UNIMPLEMENTED", "PERMISSION_DENIED"}


class Renewal:
    """Holds a token and renews it.

    `exchange`: takes a token and returns a newer one, or raises `ClientError`. `on_new`: is called
    with the old and the new token after each exchange, in whatever thread made it.
    """

    def __init__(
        self,
        token: str,
        exchange: Callable[[str], str],
        on_new: Callable[[str, str], object] | None = None,
    ) -> None:
        import threading  # gRPC has imported it

        self._exchange = exchange
        self._on_new = on_new
        # Held during an exchange, so that there is one at a time.
        self._exchanging = threading.Lock()
        # Guards the fields below. Notified when the token changes, and by `close`. Never held
        # during a call.
        self._changed = threading.Condition()
        self._token = token
        self._due_s = _due_s(token)  # by the monotonic clock; None: never
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def token(self) -> str:
        """The token as it is. Setting it replaces the token by any other one."""
        return self._token

    @token.setter
    def token(self, token: str) -> None:
        with self._changed:
            self._token = token
            self._due_s = _due_s(token)
            self._changed.notify_all()

    def current(self) -> str:
        """Return the token; exchange it before if that is due and nobody else does."""
        due_s = self._due_s
        if due_s is not None and time.monotonic() >= due_s and self._exchanging.acquire(False):
            try:
                self._renew()
            finally:
                self._exchanging.release()
        return self._token

    def _renew(self) -> None:
        """Exchange the token. Called by the one that has locked `_exchanging`."""
        with self._changed:
            old, due_s = self._token, self._due_s
        if due_s is None or time.monotonic() < due_s:
            return  # another thread was faster
        new = ""
        try:
            new = self._exchange(old)
        except ClientError as error:
            again_s = None if error.code in _NEVER else time.monotonic() + _AGAIN_S
        else:
            # Counted from now on, so that a clock that is wrong here does no harm.
            again_s = _due_s(new, is_new=True)
        with self._changed:
            if self._token != old:  # replaced meanwhile, by a login or logout
                return
            self._token, self._due_s = new or old, again_s
            self._changed.notify_all()
        if new and self._on_new is not None:
            self._on_new(old, new)

    def keep_fresh(self) -> None:
        """Exchange the token from now on whenever that is due; idempotent."""
        with self._changed:
            if self._thread is None and self._due_s is not None and not self._is_closed:
                import threading

                self._thread = threading.Thread(target=self._run, name="token", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (left_s := self._left_s_locked()) != 0:
                    self._changed.wait(left_s)
                if self._is_closed:
                    return
            with self._exchanging:
                self._renew()

    def _left_s_locked(self) -> float | None:
        """Return how long it is until the next exchange; None if there is none."""
        return None if self._due_s is None else max(0.0, self._due_s - time.monotonic())

    def close(self) -> None:
        """End the thread; idempotent. An exchange that is under way ends by itself."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def _due_s(token: str, *, is_new: bool = False) -> float | None:
    """Return when to exchange the token, by the monotonic clock; None if that makes no sense."""
    times = TokenTimes.read(token)
    if times is None or not times.can_be_refreshed:
        return None
    left_s = times.life_s if is_new else min(times.life_s, times.expires_at - time.time())
    return None if left_s <= 0 else time.monotonic() + left_s - times.life_s / 2
