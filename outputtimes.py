"""When the bytes of an output were written: a small index beside the output.

    times = TimeIndex("/private/dir/job.out.times")
    times.note(0)            # byte 0 is about to be appended
    times.span(0)            # when byte 0 was written, and up to which byte that holds
    times.first_since(moment)  # the first byte that was written at that moment or later

An entry says that the bytes from an offset on, up to that of the next entry, were written between
two moments. A new entry begins 100 ms after the present one began, so times are exact to that.
When there are some 4096 entries, each two neighbours in the older half become one. So the latest
two thousand are always exact, and the times of the early output of a long job become less so.

An index of up to 16 entries is in memory only, so that most jobs need no file for it. A file that
cannot be written, as on a full disk, makes the index less exact, and is no error.

Thread safety: every method may be called from any thread, but only one thread may call `note`.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["TimeIndex"]

_ENTRY_NS = 100_000_000
_ENTRIES_IN_MEMORY = 16
_ENTRIES_IN_FILE = 4096
_ENTRY = struct.Struct("<QQQ")


class _Entry(NamedTuple):
    """The bytes from `offset` on were written from `first_ns` to `last_ns` (Unix time)."""

    offset: int
    first_ns: int
    last_ns: int


class TimeIndex:
    """The times of one output. `path`, `dir_fd`: of the file, which is made when it is needed.

    `lasting`: every entry is in the file, for `resume` in another process.
    """

    __slots__ = (
        *("_base_ns", "_dir_fd", "_filed", "_first_ns", "_last_ns", "_lasting", "_lock"),
        *("_next_ns", "_offset", "_path", "_recent"),
    )

    def __init__(self, path: str, dir_fd: int | None = None, *, lasting: bool = False) -> None:
        self._path = path
        self._dir_fd = dir_fd
        self._lasting = lasting
        # What is added to `time.monotonic_ns`, so that no step of the clock counts.
        self._base_ns = 0
        # The present entry, with times of `time.monotonic_ns`: `_last_ns` grows, up to before
        # `_next_ns`, when another entry begins.
        self._offset: int | None = None  # before the first byte
        self._first_ns = 0
        self._last_ns = 0
        self._next_ns = 0
        # Guards the two below and the file. Held while the file is read or written: it is small.
        self._lock = threading.Lock()
        self._recent: tuple[_Entry, ...] = ()  # the entries before the present one
        self._filed = 0  # how many earlier ones are in the file

    def load(self, unfiled: bytes, filed: int) -> None:
        """Take over the entries of an output to which nothing more is appended."""
        self._recent = tuple(_Entry._make(each) for each in _ENTRY.iter_unpack(unfiled))
        self._filed = filed

    @property
    def filed(self) -> int:
        """How many entries are in the file."""
        return self._filed

    def unfiled(self) -> bytes:
        """Return the entries that are not in the file, for `load`."""
        with self._lock:
            return b"".join(_ENTRY.pack(*each) for each in self._recent + self._present_locked())

    def note(self, offset: int) -> None:
        """Note that the bytes from `offset` on are written now."""
        now = time.monotonic_ns()
        if now < self._next_ns:
            self._last_ns = now
            return
        with self._lock:
            if self._offset is None:
                self._base_ns = time.time_ns() - now
            else:
                self._recent += self._present_locked()
                if len(self._recent) > _ENTRIES_IN_MEMORY and not self._lasting:
                    self._file_locked()
            self._offset, self._first_ns, self._last_ns = offset, now, now
            self._next_ns = now + _ENTRY_NS
            if self._lasting:
                self._file_locked()

    def span(self, offset: int) -> tuple[int, int | None] | None:
        """Return when the byte at `offset` was written, and the first byte for which it differs.

        The time is in nanoseconds of Unix time; the second number is None if there is no such
        byte yet. None if the time is not known.
        """
        with self._lock, self._entries_locked() as entries:
            after = bisect_right(entries, offset, key=lambda entry: entry.offset)
            if after == 0:
                return None
            end = entries[after].offset if after < len(entries) else None
            return entries[after - 1].first_ns, end

    def first_since(self, moment_ns: int) -> int | None:
        """Return the offset of the first byte written at that moment or later; None if none was.

        The byte may have been written up to 100 ms earlier, or more in the less exact part.
        """
        with self._lock, self._entries_locked() as entries:
            at = bisect_left(entries, moment_ns, key=lambda entry: entry.last_ns)
            return entries[at].offset if at < len(entries) else None

    def resume(self, last_ns: int) -> None:
        """Continue the index of a process that has ended; `last_ns`: when it wrote its last byte.

        A file that the other process was about to change has its entries up to there.
        """
        with self._lock:
            try:
                fd = self._open(os.O_RDWR)
            except OSError:  # it is missing, or not what was written here
                return
            try:
                data = os.pread(fd, os.fstat(fd).st_size, 0)
                found = _ENTRY.iter_unpack(data[: len(data) // _ENTRY.size * _ENTRY.size])
                entries: list[_Entry] = []
                for entry in map(_Entry._make, found):
                    if entries and entry.offset <= entries[-1].offset:
                        break
                    entries.append(entry)
                if entries:  # the time of its last byte was in memory only
                    entries[-1] = entries[-1]._replace(last_ns=max(entries[-1].last_ns, last_ns))
                    _write(fd, len(entries) - 1, entries[-1:])
                self._filed = len(entries)
                os.ftruncate(fd, self._filed * _ENTRY.size)
            finally:
                os.close(fd)

    def remove(self) -> None:
        """Delete the file, if there is one. Raises OSError."""
        with self._lock:
            filed, self._filed = self._filed, 0
        if filed or self._lasting:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path, dir_fd=self._dir_fd)

    @contextlib.contextmanager
    def _entries_locked(self) -> Iterator[_Entries]:
        fd = self._open(os.O_RDONLY) if self._filed else -1
        try:
            yield _Entries(fd, self._filed, self._recent + self._present_locked())
        finally:
            if fd >= 0:
                os.close(fd)

    def _present_locked(self) -> tuple[_Entry, ...]:
        """Return the present entry; nothing before the first byte."""
        if self._offset is None:
            return ()
        base_ns = self._base_ns
        return (_Entry(self._offset, base_ns + self._first_ns, base_ns + self._last_ns),)

    def _file_locked(self) -> None:
        """Move the entries from memory to the file; if that fails, have fewer of them."""
        try:
            fd = self._open(os.O_RDWR | (0 if self._filed else os.O_CREAT | os.O_TRUNC))
            try:
                if self._filed >= _ENTRIES_IN_FILE:
                    self._thin_out_locked(fd)
                # The present one is not complete: the next time it is written again.
                present = self._present_locked() if self._lasting else ()
                _write(fd, self._filed, (*self._recent, *present))
            finally:
                os.close(fd)
        except OSError:
            self._recent = _halved(self._recent)
            return
        self._filed += len(self._recent)
        self._recent = ()

    def _thin_out_locked(self, fd: int) -> None:
        """Halve the number of the older half of the entries in the file. Raises OSError."""
        data = os.pread(fd, self._filed * _ENTRY.size, 0)
        entries = [_Entry._make(fields) for fields in _ENTRY.iter_unpack(data)]
        older = _halved(entries[: self._filed // 2])
        newer = entries[self._filed // 2 :]
        # The entries that move are written over ones that stay behind them: if this fails in the
        # middle, some are there twice.
        _write(fd, 0, (*older, *newer))
        self._filed = len(older) + len(newer)
        os.ftruncate(fd, self._filed * _ENTRY.size)

    def _open(self, flags: int) -> int:
        return os.open(self._path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._dir_fd)


class _Entries:
    """All entries in order: `filed` ones in the file, then `others`. A sequence for `bisect`."""

    def __init__(self, fd: int, filed: int, others: tuple[_Entry, ...]) -> None:
        self._fd = fd
        self._filed = filed
        self._others = others

    def __len__(self) -> int:
        return self._filed + len(self._others)

    def __getitem__(self, i: int) -> _Entry:
        if i >= self._filed:
            return self._others[i - self._filed]
        return _Entry._make(_ENTRY.unpack(os.pread(self._fd, _ENTRY.size, i * _ENTRY.size)))


def _write(fd: int, i: int, entries: Iterable[_Entry]) -> None:
    data = b"".join(_ENTRY.pack(*entry) for entry in entries)
    if os.pwrite(fd, data, i * _ENTRY.size) < len(data):
        raise OSError("the disk is full")


def _halved(entries: Iterable[_Entry]) -> tuple[_Entry, ...]:
    """Make one entry of each two neighbours."""
    rest = iter(entries)
    return tuple(_Entry(entry.offset, entry.first_ns, next(rest, entry).last_ns) for entry in rest)
