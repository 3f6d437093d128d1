"""The audit log's lines about calls: how long a line may be, and which calls share one.

    with Records(audit) as records:
        records.write("alice", {"user": "alice", "rpc": "StartJob", "outcome": "OK", ...})

A line has at most some 6 KiB, whatever a client sends: of a long argv the line has the beginning
and the SHA-256 of the whole. Each caller has an allowance of bytes (`_ALLOWANCE_BYTES`) for lines
of their own. A caller who has used it up shares lines: the calls of one second with the same RPC
and outcome get one line, which has their number. So no caller can fill the disk with the audit log
in a day. A call that starts, stops or removes a job, or that logs in or out, always has a line of
its own: other ceilings bound these. Signals, input and refreshes share lines.

Threads: any thread may call anything. One thread of this module, `records`, writes the shared
lines.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from audit import AuditError

if TYPE_CHECKING:
    from collections.abc import Callable

    from audit import AuditLog

    Fields = dict[str, Any]

__all__ = ["Records"]

_TOGETHER_S = 1.0  # a shared line is for the calls of this time

_ARGV_CHARACTERS = 4096  # of the line; a character of argv takes up to twelve
_TEXT_CHARACTERS = 1024

# What a caller may write as lines of their own: this much after a pause, and this much per
# second. A line has some 450 bytes. A day's allowance is 1.4 GB.
_ALLOWANCE_BYTES = 4 * 1024 * 1024
_ALLOWANCE_BPS = 16 * 1024
# More callers than this are forgotten, and have their whole allowance again. All are users or
# have a certificate, so nobody can make new ones.
_CALLERS = 10_000


@dataclass(slots=True)
class _Allowance:
    """What one caller may write. Guarded by the lock of `Records`."""

    left: float  # in bytes, at `since_s`
    since_s: float


class Records:
    """Writes lines about calls: a context manager, which calls `close`. It does not close `audit`.

    `clock`: returns seconds, and never goes back.
    """

    def __init__(self, audit: AuditLog, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit = audit
        self._clock = clock
        # Guards the fields below. Notified when the first call is to share a line, and on close.
        # Never held during a write to the audit log.
        self._changed = threading.Condition()
        self._allowances: dict[object, _Allowance] = {}
        # Key: the caller and what the calls have in common. Value: how to get the fields of the
        # line, and the number of calls.
        self._shared: dict[tuple[object, object], tuple[Callable[[], Fields], int]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the shared lines that are not written yet, then end the thread; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self, caller: object, fields: Fields, *, rpc: str | None = None, alone: bool = False
    ) -> None:
        """Write a line about a call, or have the call share one, which is written within a second.

        `fields`: with `rpc` and `outcome`; calls in which these are equal share a line. `rpc`: what
        is compared instead of the field, if a client may have chosen the name in the field.
        `alone`: the call changes something, so the call has a line of its own; once the caller has
        used up the allowance, the line has no arguments.
        Blocks as long as the disk does. Raises `AuditError` as `AuditLog.record` does.
        """
        with self._changed:
            allowance = self._allowance_locked(caller)
            is_in_excess = allowance.left <= 0
        # While the log cannot be written, a line that is written later is a promise in vain.
        if is_in_excess and not alone and self._audit.is_writable:
            first = _shortened(fields, 0)
            self.share(caller, (rpc or fields["rpc"], fields["outcome"]), lambda: first)
            return
        fields = _shortened(fields, 0 if is_in_excess else _ARGV_CHARACTERS)
        size = self._audit.record(**fields)
        with self._changed:
            allowance.left -= size

    def share(self, caller: object, what: object, fields: Callable[[], Fields]) -> None:
        """Count a call of which only the number is to be recorded. Neither raises nor blocks.

        Calls with the same `caller` and `what` share a line. `fields` of the first of them is
        called later, in another thread.
        """
        with self._changed:
            first, count = self._shared.get((caller, what), (fields, 0))
            self._shared[caller, what] = (first, count + 1)
            if not count:
                self._changed.notify()

    def _allowance_locked(self, caller: object) -> _Allowance:
        now_s = self._clock()
        allowance = self._allowances.get(caller)
        if allowance is None:
            if len(self._allowances) >= _CALLERS:
                self._allowances.clear()
            allowance = self._allowances[caller] = _Allowance(_ALLOWANCE_BYTES, now_s)
        gained = (now_s - allowance.since_s) * _ALLOWANCE_BPS
        allowance.left = min(_ALLOWANCE_BYTES, allowance.left + gained)
        allowance.since_s = now_s
        return allowance

    def _run(self) -> None:
        closed = False
        while not closed:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._shared)
                closed = self._changed.wait_for(lambda: self._closed, _TOGETHER_S)
                shared, self._shared = self._shared, {}
            for fields, count in shared.values():
                with contextlib.suppress(AuditError):  # `audit.py` logs it
                    self._audit.record(**_shortened(fields(), 0), calls=count)


def _shortened(fields: Fields, argv_characters: int) -> Fields:
    """Return the fields, with long ones cut, and with a digest of an argv that was cut."""
    short: Fields = {}
    for name, value in fields.items():
        if isinstance(value, str):
            short[name] = _cut(value, _TEXT_CHARACTERS)
        elif isinstance(value, list):
            short |= _beginning(name, value, argv_characters)
        else:
            short[name] = value
    return short


def _beginning(name: str, argv: list[str], room: int) -> Fields:
    """Return the field `name` with as much of `argv` as has room in the line.

    If that is not all, the last item is the number of bytes that are missing, and a further
    field has the SHA-256 of the whole: of every argument with a NUL byte after it, as
    /proc/PID/cmdline has them.
    """
    for number, argument in enumerate(argv):
        if _length(argument) > room:
            encoded = [each.encode(errors="surrogatepass") + b"\0" for each in argv]
            cut = _cut(argument, room)
            missing = sum(map(len, encoded[number:])) - len(cut.encode(errors="surrogatepass"))
            shown = [*argv[:number], *([cut] if cut else [])]
            digest = hashlib.sha256(b"".join(encoded)).hexdigest()
            return {name: [*shown, f"... and {missing} bytes more"], f"{name}_sha256": digest}
        room -= _length(argument)
    return {name: argv}


def _length(text: str) -> int:
    """Return how many characters of the line the text takes, with a comma and a space."""
    return len(json.dumps(text)) + 2


def _cut(text: str, room: int) -> str:
    """Return the beginning of the text that has room in the line."""
    if len(text) * 12 + 4 <= room:
        return text
    beginning = text[:room]
    fits = bisect.bisect_right(
        range(len(beginning) + 1), room, key=lambda count: _length(beginning[:count])
    )
    return beginning[: max(0, fits - 1)]
