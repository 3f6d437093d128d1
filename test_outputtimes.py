"""Tests of what a subscriber may ask for beside an offset: the last lines, a time, no following."""

from __future__ import annotations

import os
import resource
import struct
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import outputtimes
from broadcaster import OutputLog
from budget import Budget
from outputdirectory import OutputDirectory
from outputtimes import TimeIndex
from tails import find_tail
from testkit import ABSENT, GUARD_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from broadcaster import Subscription

_MS = 1_000_000
_MIB = 1024 * 1024


class _Clock:
    """Stands in for the module `time` in outputtimes.py; a test moves it."""

    def __init__(self) -> None:
        self.now_ns = 1_800_000_000_000 * _MS

    def time_ns(self) -> int:
        return self.now_ns

    def monotonic_ns(self) -> int:
        return self.now_ns - 1_700_000_000_000 * _MS

    def moment(self, ms: int) -> datetime:
        """Return the time so many milliseconds from now."""
        return datetime.fromtimestamp((self.now_ns // _MS + ms) / 1000, UTC)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(outputtimes, "time", clock)
    return clock


@pytest.fixture
def log(tmp_path: Path) -> Iterator[OutputLog]:
    log = OutputLog(tmp_path / "job.out")
    yield log
    log.remove()
    assert list(tmp_path.iterdir()) == []


def _read(subscription: Subscription) -> bytes:
    with subscription:
        return b"".join(subscription)


# --- lines ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "begin"),
    [(0, 9), (1, 6), (2, 4), (3, 3), (4, 0), (5, 0), (1000, 0)],
)
@pytest.mark.parametrize("complete", [True, False])
def test_tail_begins_with_the_last_lines(
    log: OutputLog, lines: int, begin: int, complete: bool
) -> None:
    """As tail(1) does, with an empty line, and a last line with its newline."""
    whole = b"ab\n\nc\ndef"
    log.append(whole)
    if complete:
        log.complete()
    assert _read(log.subscribe(tail_lines=lines, follow=False)) == whole[begin:]


def test_newline_at_the_end_begins_no_line(log: OutputLog) -> None:
    """The last line is the one before it."""
    log.append(b"a\nb\n")
    assert _read(log.subscribe(tail_lines=1, follow=False)) == b"b\n"


@settings(max_examples=100, deadline=None, database=None)
@given(st.binary(max_size=30).map(lambda data: data.replace(b"a", b"\n")), st.integers(1, 8))
def test_tail_is_that_of_the_lines_of_any_output(whole: bytes, lines: int) -> None:
    """Read in blocks of any size."""
    pieces = whole.split(b"\n")
    kept = [piece + b"\n" for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])
    begin = find_tail(lambda at, size: whole[at : at + size], [(0, len(whole))], lines)
    assert whole[begin:] == b"".join(kept[-lines:])


def test_tail_follows_what_comes_then(log: OutputLog) -> None:
    """First the last lines so far, then the new output."""
    log.append(b"1\n2\n3\n")
    with log.subscribe(tail_lines=2) as live:
        assert next(live) == b"2\n3\n"
        log.append(b"4\n")
        assert next(live) == b"4\n"
    with log.subscribe(tail_lines=0) as live:
        log.append(b"5\n")
        assert next(live) == b"5\n"


def test_tail_that_begins_before_the_gap_counts_the_kept_lines(tmp_path: Path) -> None:
    """And the gap is told in its place."""
    log = OutputLog(tmp_path / "job.out", budget=Budget(80, "eighty"))
    whole = b"".join(b"%07d\n" % i for i in range(40))
    log.append(whole)
    log.complete()
    begin, size = log.gap or (0, 0)
    after = (len(whole) - begin - size) // 8
    with log.subscribe(tail_lines=after + 2) as late:
        assert next(late) == whole[begin - 16 : begin]
        assert next(late) == whole[begin + size :]
        assert late.gap == (begin, size)
    with log.subscribe(tail_lines=after) as late:
        assert list(late) == [whole[begin + size :]]
    log.remove()


def test_tail_of_a_large_output_takes_little_memory(log: OutputLog) -> None:
    """Ten GiB, most of them a hole in the file; a search of 64 MiB reads block by block."""
    log.append(b"first\n")
    size = 10 * 1024 * _MIB
    os.truncate(log._path, size)
    log._end = size
    log.append(b"x\n" * 10)
    log.append(b"y" * (64 * _MIB) + b"\nlast\n")
    tracemalloc.start()
    try:
        with log.subscribe(tail_lines=2, follow=False) as late:
            late.chunk_bytes = lambda: 1000
            assert next(late) == b"y" * 1000
            assert late.offset == size + 20 + 1000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * _MIB


def test_close_ends_a_search(log: OutputLog) -> None:
    """A subscription that is closed beforehand reads nothing."""
    log.append(b"a\nb\n")
    closed = log.subscribe(tail_lines=1)
    closed.close()
    assert list(closed) == []


# --- not following ----------------------------------------------------------------------


def test_without_following_the_output_so_far_is_read(log: OutputLog) -> None:
    """Neither what comes later nor the end of the output is waited for."""
    log.append(b"so far")
    subscription = log.subscribe(follow=False)
    log.append(b", and later")
    assert _read(subscription) == b"so far"
    assert _read(log.subscribe(offset=3, follow=False)) == b"far, and later"
    assert _read(log.subscribe(offset=100, follow=False)) == b""
    assert list(log.subscribers) == []


# --- times ------------------------------------------------------------------------------


def test_each_chunk_has_the_time_of_its_writing(log: OutputLog, clock: _Clock) -> None:
    """Also long after it, and for a live subscriber."""
    begin = clock.moment(0)
    with log.subscribe(timestamps=True) as live:
        for data in (b"one\n", b"two\n", b"three\n"):
            log.append(data)
            assert next(live) == data
            assert live.written_at == clock.moment(0)
            clock.now_ns += 1500 * _MS
    log.complete()
    with log.subscribe(timestamps=True) as late:
        seen = [(chunk, late.written_at) for chunk in late]
    assert seen == [
        (b"one\n", begin),
        (b"two\n", begin + timedelta(seconds=1.5)),
        (b"three\n", begin + timedelta(seconds=3)),
    ]


def test_times_are_of_the_clock(log: OutputLog) -> None:
    """In UTC, between the moment before the append and the moment after it."""
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    log.append(b"x")
    with log.subscribe(timestamps=True) as subscription:
        next(subscription)
        assert subscription.written_at
        assert before <= subscription.written_at <= datetime.now(UTC)
    with log.subscribe() as subscription:
        next(subscription)
        assert subscription.written_at is None


@pytest.mark.parametrize(
    ("ms", "begin"),
    [(-5000, 0), (0, 0), (50, 0), (51, 4), (1000, 4), (1001, 6), (9000, 6), (9001, 8)],
)
def test_since_begins_with_what_was_written_then_or_later(
    log: OutputLog, clock: _Clock, ms: int, begin: int
) -> None:
    """Nothing later is missing, and at most 100 ms of what is earlier comes, too."""
    moment = clock.moment(ms)
    start = clock.now_ns
    for at_ms, data in ((0, b"a\n"), (50, b"b\n"), (1000, b"c\n"), (9000, b"d\n")):
        clock.now_ns = start + at_ms * _MS
        log.append(data)
    assert _read(log.subscribe(since=moment, follow=False)) == b"a\nb\nc\nd\n"[begin:]


def test_since_begins_with_a_whole_line(log: OutputLog, clock: _Clock) -> None:
    """If the line was begun before."""
    log.append(b"old\nbegun ")
    clock.now_ns += 500 * _MS
    moment = clock.moment(0)
    log.append(b"and ended\nnew\n")
    assert _read(log.subscribe(since=moment, follow=False)) == b"begun and ended\nnew\n"
    clock.now_ns += 500 * _MS
    with log.subscribe(since=clock.moment(0)) as live:
        log.append(b"newer\n")
        assert next(live) == b"newer\n"


def test_index_of_a_long_output_stays_small_and_exact_at_its_end(
    tmp_path: Path, clock: _Clock
) -> None:
    """30,000 entries take 100 KiB; the latest thousand are exact, and all are in order."""
    index = TimeIndex(str(tmp_path / "times"))
    start = clock.now_ns
    count = 30_000
    for i in range(count):
        clock.now_ns = start + i * 1000 * _MS
        index.note(i * 10)
    assert (tmp_path / "times").stat().st_size <= 100 * 1024
    for i in range(count - 1000, count):
        assert index.span(i * 10 + 9) == (
            start + i * 1000 * _MS,
            (i + 1) * 10 if i < count - 1 else None,
        )
        assert index.first_since(start + i * 1000 * _MS) == i * 10
    times = [index.span(i * 10) for i in range(0, count, 997)]
    assert all(a and b and a[0] <= b[0] for a, b in pairwise(times))
    for i in range(0, count, 997):
        first, _ = index.span(i * 10) or (0, None)
        assert first <= start + i * 1000 * _MS
        since = index.first_since(start + i * 1000 * _MS)
        assert since is not None
        assert since <= i * 10
    index.remove()
    assert list(tmp_path.iterdir()) == []


def test_short_output_needs_no_file_for_its_times(tmp_path: Path, clock: _Clock) -> None:
    """The first sixteen entries are in memory."""
    index = TimeIndex(str(tmp_path / "times"))
    for i in range(16):
        index.note(i)
        clock.now_ns += 100 * _MS
    assert list(tmp_path.iterdir()) == []
    assert index.span(7) == (clock.now_ns - 900 * _MS, 8)


def test_index_that_cannot_be_written_is_less_exact(tmp_path: Path, clock: _Clock) -> None:
    """Writing output goes on, and old times are still in order."""
    index = TimeIndex(str(tmp_path / "missing" / "times"))
    start = clock.now_ns
    for i in range(1000):
        clock.now_ns = start + i * 1000 * _MS
        index.note(i)
    first, _ = index.span(500) or (0, None)
    assert start <= first <= start + 500 * 1000 * _MS
    assert index.span(999) == (start + 999 * 1000 * _MS, None)


def test_leftover_index_is_deleted_with_the_output(tmp_path: Path) -> None:
    """By the next owner of the directory."""
    home = tmp_path / "output"
    home.mkdir(0o700)
    for name in (f"{ABSENT}.out", f"{ABSENT}.out.times", "other.times"):
        (home / name).write_bytes(b"x")
    with OutputDirectory(home):
        assert [path.name for path in home.iterdir()] == ["other.times"]


def test_times_can_be_read_while_they_are_written(tmp_path: Path) -> None:
    """A reader asks for the time of each byte while the index is written and thinned out."""
    clock = _Clock()
    index = TimeIndex(str(tmp_path / "times"))
    done = threading.Event()

    def read() -> int:
        lookups = 0
        while not done.is_set():
            span = index.span(5000)
            assert span is None or span[1] is None or span[1] > 5000
            index.first_since(time.time_ns())
            lookups += 1
        return lookups

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(outputtimes, "time", clock)
        reading = pool.submit(read)
        for i in range(20_000):
            clock.now_ns += 100 * _MS
            index.note(i)
        done.set()
        assert reading.result(GUARD_S) > 0
    index.remove()


def test_descriptors_are_not_kept(tmp_path: Path, clock: _Clock) -> None:
    """A long output has no more descriptors open than a short one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft > 0
    before = len(os.listdir("/proc/self/fd"))
    index = TimeIndex(str(tmp_path / "times"))
    for i in range(100):
        index.note(i)
        clock.now_ns += 100 * _MS
    index.span(3)
    assert len(os.listdir("/proc/self/fd")) == before
    index.remove()


def test_index_of_a_dead_process_is_continued(tmp_path: Path) -> None:
    """The time of the last entry ends with the last change of the output."""
    path = str(tmp_path / "times")
    first = TimeIndex(path, lasting=True)
    before = time.time_ns()
    first.note(0)
    second = TimeIndex(path, lasting=True)
    written_ns = time.time_ns() + 10**9
    second.resume(written_ns)
    assert second.first_since(written_ns) == 0
    assert second.first_since(written_ns + 1) is None
    second.note(100)
    found = second.span(0)
    assert found is not None
    assert (found[0] >= before, found[1]) == (True, 100)
    assert second.span(100) is not None
    second.remove()
    assert not list(tmp_path.iterdir())


def test_index_that_was_being_thinned_out_is_used_up_to_the_first_entry_that_does_not_fit(
    tmp_path: Path,
) -> None:
    """An entry that the other process was about to overwrite is not taken for a later one."""
    entries = [(0, 1, 2), (10, 3, 4), (20, 5, 6), (10, 3, 4)]
    (tmp_path / "times").write_bytes(b"".join(struct.pack("<QQQ", *each) for each in entries))
    index = TimeIndex(str(tmp_path / "times"), lasting=True)
    index.resume(9)
    assert index.first_since(7) == 20
    assert index.span(15) == (3, 20)
    assert (tmp_path / "times").stat().st_size == 72
