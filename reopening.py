"""How a stream, a watch or an input goes on after its call broke off.

    reopening = Reopening(link)
    ...
    except link.rpc_error as error:
        reopening.recover(link.explain(error), call)  # waits; raises the error if it is final

Thread safety: one thread uses a `Reopening`. Any thread may set its event `closed`.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from clienterrors import ClientError
    from link import Link

__all__ = ["Reopening"]


class Reopening:
    """Decides whether and when a call that broke off is made again.

    `tell`, `tell_after_s`: see `Patience`.

    Attribute: `closed`, an event: whoever ends the stream sets it.
    """

    def __init__(
        self,
        link: Link,
        tell: Callable[[ClientError], object] | None = None,
        tell_after_s: float = 0.0,
    ) -> None:
        import threading  # gRPC has imported it

        self._link = link
        self.closed = threading.Event()
        self._patience = link.patience(self.closed, tell, tell_after_s)
        self._was_accepted = False
        self._token = ""  # of the last call

    def metadata(self) -> Any:
        """Return the metadata of the next call."""
        self._link.renewal.keep_fresh()
        metadata = self._link.metadata()
        self._token = self._link.renewal.token
        return metadata

    def succeeded(self) -> None:
        """Note that the call has received something from the server."""
        self._was_accepted = self._link.is_reached = True
        self._patience.succeeded()

    @property
    def has_failed(self) -> bool:
        """Whether the last call broke off."""
        return self._patience.has_failed

    def recover(self, error: ClientError, call: Any, *, most_s: float = math.inf) -> None:
        """Wait until the call may be made again. Raises `error` if it is final.

        `call`: the call that broke off. `most_s`: wait for no longer than that.
        """
        if any(item.key == "accepted" for item in call.initial_metadata() or ()):
            self._was_accepted = self._link.is_reached = True
        if self.closed.is_set() or self._link.closed.is_set():
            raise error
        if error.code == "UNAUTHENTICATED" and self._has_new_token():
            return
        for_s = self._link.retry_s(error, self._patience, is_stream=True)
        if error.retry_after_s is not None and self._was_accepted:
            # The server has ended what it had accepted, or has no room for all who come back.
            for_s = self._link.stream_s
        if not for_s:
            raise error
        self._patience.wait(error, for_s=for_s, most_s=most_s)
        if self._link.closed.is_set():
            raise error

    def _has_new_token(self) -> bool:
        """Whether the call ended because its token did, and there is a newer one."""
        return self._token != self._link.renewal.current()
