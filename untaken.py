"""How large the next message of a stream may be, so that clients that do not read take no memory.

    untaken = Untaken()
    size = untaken.room()
    with untaken.held(size):
        yield message

Thread safety: everything may be called from any thread.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Untaken"]

# The size of a stream's messages. Large messages are faster (see `broadcaster.py`), but a message
# stays in the server's memory until its client takes the message. All messages that are not taken
# should therefore have at most _UNTAKEN_BYTES together. The next message may have 1 /
# _UNTAKEN_SHARE of the bytes that remain: about 195 KiB with ten streams, 64 KiB with a hundred.
# A message may always have 64 KiB; therefore more than 128 streams can exceed the sum.
_MESSAGE_BYTES = 256 * 1024
_SMALL_MESSAGE_BYTES = 64 * 1024
_UNTAKEN_BYTES = 8 * 1024 * 1024
_UNTAKEN_SHARE = 32


class Untaken:
    """Counts the bytes of messages that clients have not taken yet, over all streams.

    If a client does not read, two copies of its message stay in the server's memory for as long as
    the client likes. Therefore the next message becomes smaller as this count grows.
    """

    def __init__(self) -> None:
        # Guards _size. Reentrant: while a thread holds the lock, the garbage collector may run in
        # that thread and end an abandoned stream, and the end of a stream takes the lock.
        self._lock = threading.RLock()
        self._size = 0

    def room(self) -> int:
        """Return the number of bytes that the next message may have."""
        left = _UNTAKEN_BYTES - self._size
        return max(_SMALL_MESSAGE_BYTES, min(left // _UNTAKEN_SHARE, _MESSAGE_BYTES))

    @contextlib.contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Count `size` bytes as not taken while the context lasts."""
        with self._lock:
            self._size += size
        try:
            yield
        finally:
            with self._lock:
                self._size -= size
