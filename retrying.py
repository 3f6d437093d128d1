"""How a client goes on when its server cannot be reached for a while.

    patience = Patience(closed)
    while True:
        try:
            answer = call()
        except ClientError as error:
            patience.wait(error, for_s=30)  # raises the error when there is nothing to wait for
        else:
            patience.succeeded()

A server that restarts, or a network that is interrupted, is back after some seconds. Until then a
client makes its call again, after longer and longer pauses.

Thread safety: one thread uses a `Patience`. Any thread may set its event `closed`.
"""

from __future__ import annotations

import math
import time

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from clienterrors import ClientError

__all__ = ["CALL_S", "CONNECT_S", "STREAM_S", "Patience"]

CALL_S = 30.0
"""For how long a call with one answer tries a server that was reached before."""
STREAM_S = 300.0
"""The same for a stream, a watch or an input. An upgrade takes some minutes."""
CONNECT_S = 30.0
"""For how long the command line tries a server that it has not reached yet. That server may be
restarting, which takes 20 s on a busy machine; but its address may also be mistyped."""

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 5.0


class Patience:
    """The pauses between the attempts of one call or stream.

    Attribute: `closed_connections`, how many attempts ended one after the other with a connection
    that was made and then closed.

    `closed`: an event that ends a pause. `tell`: is called once in each outage with its first
    error, when the outage has lasted for `tell_after_s`.
    """

    def __init__(
        self,
        closed: threading.Event,
        tell: Callable[[ClientError], object] | None = None,
        tell_after_s: float = 0.0,
    ) -> None:
        self._closed = closed
        self._tell = tell
        self._tell_after_s = tell_after_s
        self._has_told = False
        self._pause_s = _FIRST_PAUSE_S
        self._lost_s: float | None = None
        self.closed_connections = 0

    @property
    def has_failed(self) -> bool:
        """Whether the last attempt failed."""
        return self._lost_s is not None

    def succeeded(self) -> None:
        """Forget the failed attempts: the server has answered."""
        self._lost_s, self._pause_s, self._has_told = None, _FIRST_PAUSE_S, False
        self.closed_connections = 0

    def wait(self, error: ClientError, *, for_s: float, most_s: float = math.inf) -> None:
        """Block before the next attempt, no longer than `most_s`.

        Raises `error` if the attempts have failed for `for_s` seconds, or when `closed` is set.
        """
        now = time.monotonic()
        self.closed_connections = self.closed_connections + 1 if error.was_closed else 0
        if self._lost_s is None:
            self._lost_s = now
        left_s = self._lost_s + for_s - now
        if left_s <= 0 or self._closed.is_set():
            raise error
        if self._tell is not None and not self._has_told:
            if now - self._lost_s >= self._tell_after_s:
                self._has_told = True
                self._tell(error)
            else:
                left_s = min(left_s, self._lost_s + self._tell_after_s - now)
        if self._closed.wait(min(error.retry_after_s or self._pause_s, left_s, most_s)):
            raise error
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
