"""Tests of the output log: real files, real threads.

Where a test must know that a thread waits it uses `_Watched`, never a delay.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import stat
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadcaster import OffsetError, OutputIncompleteError, OutputLog, Subscription

if TYPE_CHECKING:
    from collections.abc import Iterator

_GUARD_S = 60  # only a hang takes this long
_ALL_BYTES = bytes(range(256))


class _Watched(threading.Condition):
    """Tells when a thread waits: `waiting` is released with the lock held, just before."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.waiting.release()
        return super().wait(timeout)

    def await_waiters(self, count: int) -> None:
        """Block until threads have begun to wait `count` times since last asked."""
        for _ in range(count):
            assert self.waiting.acquire(timeout=_GUARD_S)
        with self:  # the last of them holds the lock until it really waits
            pass


def _descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Every test, whatever it does, must give back all descriptors and threads."""
    descriptors, threads = _descriptors(), threading.active_count()
    yield
    assert _descriptors() == descriptors
    assert threading.active_count() == threads


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job.out"


@pytest.fixture
def log(path: Path) -> Iterator[OutputLog]:
    log = OutputLog(path)
    yield log
    log.remove()


@pytest.fixture
def watched(log: OutputLog) -> _Watched:
    """The log's condition, replaced by one that tells of waiters."""
    log._changed = _Watched()
    return log._changed


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(128) as pool:
        yield pool


def _read(log: OutputLog, offset: int = 0, subscriber: str = "") -> bytes:
    with log.subscribe(subscriber, offset) as subscription:
        return b"".join(subscription)


@contextlib.contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow past `size`: a disk that is full at a chosen byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- the same bytes for everyone ------------------------------------------------------


def test_early_middle_and_late_subscribers_get_identical_bytes(log: OutputLog) -> None:
    """Whoever joins before, while or after the output is written reads the same bytes."""
    early = log.subscribe("early")
    log.append(b"one ")
    assert next(early) == b"one "
    middle = log.subscribe("middle")
    log.append(b"two ")
    log.append(b"three")
    log.complete()
    assert b"".join(early) == b"two three"
    assert b"".join(middle) == b"one two three"
    assert _read(log) == b"one two three"
    assert _read(log) == b"one two three"


def test_subscriber_of_empty_output_ends_at_once(log: OutputLog) -> None:
    """A complete log without a byte gives no chunk, and never an empty one."""
    log.append(b"")
    log.complete()
    assert list(log.subscribe()) == []


def test_bytes_arrive_as_they_are_appended(log: OutputLog) -> None:
    """A chunk is delivered without waiting for a line, a buffer or the end."""
    with log.subscribe() as subscription:
        for byte in b"ab\n":
            log.append(bytes([byte]))
            assert next(subscription) == bytes([byte])


def test_every_byte_value_and_split_utf8_pass_untouched(log: OutputLog) -> None:
    """Output is bytes: NUL, CR and invalid UTF-8 pass, and so does a character cut in two."""
    euro = "€".encode()
    written = [_ALL_BYTES, euro[:1], euro[1:], b"\r\n\0", _ALL_BYTES[::-1]]
    with log.subscribe() as subscription:
        received = []
        for data in written:
            log.append(data)
            received.append(next(subscription))
    assert received == written
    log.complete()
    assert _read(log) == b"".join(written)


def test_append_takes_a_view_of_a_reused_buffer(log: OutputLog) -> None:
    """The writer may overwrite its buffer as soon as append has returned."""
    buffer = bytearray(b"first")
    log.append(memoryview(buffer))
    buffer[:] = b"other"
    log.append(memoryview(buffer)[:2])
    log.complete()
    assert _read(log) == b"firstot"


def test_chunks_are_bounded_and_never_empty(log: OutputLog) -> None:
    """A megabyte comes in pieces of at most 256 KiB."""
    log.append(bytes(1024 * 1024 + 1))
    log.complete()
    with log.subscribe() as subscription:
        sizes = [len(chunk) for chunk in subscription]
    assert sum(sizes) == 1024 * 1024 + 1
    assert all(0 < size <= 256 * 1024 for size in sizes)


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(0, 2500), st.integers(0, 8))
def test_any_subscriber_gets_what_follows_its_offset(
    parts: list[bytes], offset: int, joins_after: int
) -> None:
    """For all outputs, offsets and times of joining: the bytes from the offset on, or an error."""
    whole = b"".join(parts)
    with tempfile.TemporaryDirectory() as directory:
        log = OutputLog(Path(directory, "job.out"))
        for data in parts[:joins_after]:
            log.append(data)
        subscription = log.subscribe(offset=offset)
        for data in parts[joins_after:]:
            log.append(data)
        log.complete()
        with subscription:
            if offset > len(whole):
                with pytest.raises(OffsetError):
                    next(subscription)
            else:
                assert b"".join(subscription) == whole[offset:]
        log.remove()


def test_writer_and_many_concurrent_subscribers_agree_byte_for_byte(
    log: OutputLog, pool: ThreadPoolExecutor
) -> None:
    """Twenty subscribers, joining at any time and offset, hash the same as what was written."""
    data = os.urandom(4 * 1024 * 1024)
    offsets = [i * 10_007 % len(data) for i in range(10)]

    def digest(offset: int) -> bytes:
        return hashlib.sha256(_read(log, offset)).digest()

    early = [pool.submit(digest, offset) for offset in offsets]
    late = []
    position = 0
    for i in range(400):
        size = (i * 7919) % 20_000
        log.append(data[position : position + size])
        position += size
        if i % 40 == 0:
            late.append(pool.submit(digest, offsets[i // 40]))
    log.append(data[position:])
    log.complete()
    expected = [hashlib.sha256(data[offset:]).digest() for offset in offsets]
    assert [future.result(_GUARD_S) for future in early] == expected
    assert [future.result(_GUARD_S) for future in late] == expected


# --- offsets --------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 5, 9])
def test_subscription_starts_at_its_offset(log: OutputLog, offset: int, complete: bool) -> None:
    """An offset up to the end gives exactly the bytes that follow it."""
    log.append(b"0123456789")
    if complete:
        log.complete()
    with log.subscribe(offset=offset) as subscription:
        assert next(subscription) == b"0123456789"[offset:]
        assert subscription.offset == 10


def test_offset_at_the_end_of_complete_output_gives_nothing(log: OutputLog) -> None:
    """To resume where the output turned out to end is not an error."""
    log.append(b"abc")
    log.complete()
    assert _read(log, 3) == b""


def test_offset_past_complete_output_is_refused(log: OutputLog) -> None:
    """The error tells the offset and the size, and nobody is left subscribed."""
    log.append(b"abc")
    log.complete()
    with pytest.raises(OffsetError, match=r"offset 4 .* 3 bytes") as caught:
        log.subscribe("alice", 4)
    assert (caught.value.offset, caught.value.size) == (4, 3)
    assert list(log.subscribers) == []


def test_negative_offset_is_refused(log: OutputLog) -> None:
    """There is nothing before byte 0."""
    with pytest.raises(ValueError, match="negative"):
        log.subscribe(offset=-1)


def test_offset_ahead_of_growing_output_waits_for_it(
    log: OutputLog, watched: _Watched, pool: ThreadPoolExecutor
) -> None:
    """A subscriber ahead of the output gets nothing until the output is past its offset."""
    log.append(b"abc")
    with log.subscribe(offset=5) as subscription:
        chunk = pool.submit(next, subscription)
        watched.await_waiters(1)
        log.append(b"de")  # up to the offset, not past it
        watched.await_waiters(1)
        assert not chunk.done()
        log.append(b"fg")
        assert chunk.result(_GUARD_S) == b"fg"


def test_output_that_ends_before_the_offset_is_an_error(
    log: OutputLog, watched: _Watched, pool: ThreadPoolExecutor
) -> None:
    """A subscriber that waits ahead of the output is told when it never gets there."""
    log.append(b"abc")
    with log.subscribe("alice", offset=5) as subscription:
        chunk = pool.submit(next, subscription)
        watched.await_waiters(1)
        log.complete()
        with pytest.raises(OffsetError):
            chunk.result(_GUARD_S)
        assert list(log.subscribers) == []


# --- waiting, closing, ending -----------------------------------------------------------


def test_subscriber_that_never_reads_blocks_nobody(
    log: OutputLog, pool: ThreadPoolExecutor
) -> None:
    """Writer and readers go on while somebody has stopped reading after one chunk."""
    with log.subscribe("asleep"), log.subscribe("stalled") as stalled:
        reader = pool.submit(_read, log)
        log.append(b"x")
        assert next(stalled) == b"x"
        for _ in range(64):
            log.append(bytes(64 * 1024))
        log.complete()
        assert len(reader.result(_GUARD_S)) == 1 + 64 * 64 * 1024
        assert sum(map(len, stalled)) == 64 * 64 * 1024  # and may still catch up


def test_close_wakes_a_waiting_subscriber(
    log: OutputLog, watched: _Watched, pool: ThreadPoolExecutor
) -> None:
    """close from another thread ends an iteration that waits, and only that one."""
    closed, other = log.subscribe("closed"), log.subscribe("other")
    chunks, others = pool.submit(list, closed), pool.submit(list, other)
    watched.await_waiters(2)
    closed.close()
    assert chunks.result(_GUARD_S) == []
    assert list(log.subscribers) == ["other"]
    log.append(b"more")
    log.complete()
    assert others.result(_GUARD_S) == [b"more"]


def test_complete_ends_all_waiting_subscribers(
    log: OutputLog, watched: _Watched, pool: ThreadPoolExecutor
) -> None:
    """Everyone who waits for more learns that there is no more."""
    waiting = [pool.submit(_read, log) for _ in range(20)]
    watched.await_waiters(20)
    log.complete()
    assert [future.result(_GUARD_S) for future in waiting] == [b""] * 20


def test_waiting_subscribers_use_no_cpu(
    log: OutputLog, watched: _Watched, pool: ThreadPoolExecutor
) -> None:
    """While another thread computes, a hundred that wait run for not one nanosecond."""
    idents = []

    def follow() -> bytes:
        idents.append(threading.get_ident())
        return _read(log)

    followers = [pool.submit(follow) for _ in range(100)]
    watched.await_waiters(100)

    def used_ns() -> list[int]:
        return [time.clock_gettime_ns(time.pthread_getcpuclockid(ident)) for ident in idents]

    def nobody_ran() -> bool:
        before = used_ns()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000)
        return used_ns() == before

    # Several rounds, as at first some may be on their way from the lock into the wait.
    assert any(nobody_ran() for _ in range(10))
    log.complete()
    assert [future.result(_GUARD_S) for future in followers] == [b""] * 100


def test_close_is_idempotent_and_final(log: OutputLog) -> None:
    """A closed subscription gives nothing more, however often it is closed."""
    log.append(b"abc")
    subscription = log.subscribe()
    subscription.close()
    subscription.close()
    assert list(subscription) == []
    assert list(log.subscribers) == []


def test_close_during_a_read_leaves_the_descriptor_open(
    log: OutputLog, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last subscriber's close does not close the file under a read that is under way."""
    log.append(b"abc")
    log.complete()
    entered, go_on = threading.Event(), threading.Event()
    real, seen = os.pread, []

    def slow_pread(fd: int, count: int, offset: int) -> bytes:
        entered.set()
        assert go_on.wait(_GUARD_S)
        seen.append(fd)
        return real(fd, count, offset)

    monkeypatch.setattr(os, "pread", slow_pread)
    before = len(_descriptors())
    subscription = log.subscribe()
    chunk = pool.submit(next, subscription)
    assert entered.wait(_GUARD_S)
    subscription.close()
    go_on.set()
    assert chunk.result(_GUARD_S) == b"abc"
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(seen[0])
    assert len(_descriptors()) == before
    assert list(subscription) == []


def test_closing_while_reading_never_reads_another_file(
    log: OutputLog, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """Under a storm of closes and of descriptors reused, no byte of another file appears."""
    log.append(b"A" * (1024 * 1024))
    log.complete()
    decoy = tmp_path / "decoy"
    decoy.write_bytes(b"B" * (1024 * 1024))
    done = threading.Event()

    def reuse_descriptors() -> None:
        while not done.is_set():
            os.close(os.open(decoy, os.O_RDONLY))

    def read(subscription: Subscription) -> bool:
        return all(set(chunk) == {ord("A")} for chunk in subscription)

    churn = pool.submit(reuse_descriptors)
    try:
        for _ in range(150):
            subscriptions = [log.subscribe(), log.subscribe()]
            clean = [pool.submit(read, subscription) for subscription in subscriptions]
            for subscription in subscriptions:
                subscription.close()
            assert all(future.result(_GUARD_S) for future in clean)
    finally:
        done.set()
    churn.result(_GUARD_S)


def test_descriptors_are_closed_with_the_last_subscriber(path: Path) -> None:
    """One descriptor serves all while the log grows or is read, and none afterwards."""
    before = len(_descriptors())
    log = OutputLog(path)
    subscriptions = [log.subscribe() for _ in range(10)]
    assert len(_descriptors()) == before + 1
    log.complete()
    assert len(_descriptors()) == before + 1
    for subscription in subscriptions:
        subscription.close()
    assert len(_descriptors()) == before
    with log.subscribe():  # opened again for a late one
        assert len(_descriptors()) == before + 1
    assert len(_descriptors()) == before


def test_subscribers_are_listed_while_they_read(log: OutputLog) -> None:
    """Names are sorted and appear once; the nameless are not listed."""
    with log.subscribe("bob"), log.subscribe("alice"), log.subscribe(""):
        with log.subscribe("bob"):
            assert list(log.subscribers) == ["alice", "bob"]
        assert list(log.subscribers) == ["alice", "bob"]
    assert list(log.subscribers) == []
    log.complete()
    last = log.subscribe("carol")
    assert list(log.subscribers) == ["carol"]
    assert list(last) == []  # reading to the end is leaving
    assert list(log.subscribers) == []


# --- the file ---------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_file_is_private_whatever_the_umask(path: Path, umask: int) -> None:
    """Nobody but the server may read a job's output."""
    previous = os.umask(umask)
    try:
        log = OutputLog(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    log.remove()


@pytest.mark.parametrize("kind", ["file", "symlink", "dangling symlink"])
def test_existing_file_is_refused_and_left_alone(path: Path, tmp_path: Path, kind: str) -> None:
    """A log never writes to what somebody else put in its place."""
    target = tmp_path / "precious"
    if kind != "dangling symlink":
        target.write_bytes(b"precious")
    if kind == "file":
        target.rename(path)
    else:
        path.symlink_to(target)
    with pytest.raises(FileExistsError):
        OutputLog(path)
    assert target.exists() == (kind == "symlink")
    assert kind == "dangling symlink" or path.read_bytes() == b"precious"


def test_remove_while_reading_loses_nothing(log: OutputLog, path: Path) -> None:
    """The file's name goes at once; who was reading gets every byte, nobody else may join."""
    log.append(bytes(300 * 1024))
    with log.subscribe() as subscription:
        size = len(next(subscription))
        log.remove()
        log.remove()
        assert not path.exists()
        with pytest.raises(ValueError, match="removed"):
            log.subscribe()
        assert size + sum(map(len, subscription)) == 300 * 1024


def test_append_after_complete_is_refused(log: OutputLog) -> None:
    """What has been declared complete never grows, nor does declaring it twice hurt."""
    log.append(b"abc")
    log.complete()
    log.complete()
    with pytest.raises(ValueError, match="complete"):
        log.append(b"more")
    assert log.size == 3
    assert _read(log) == b"abc"


def test_full_disk_is_told_where_the_stored_part_ends(
    log: OutputLog, watched: _Watched, pool: ThreadPoolExecutor
) -> None:
    """Subscribers get all that was kept, then an error that counts what was lost."""
    received: list[bytes] = []

    def follow() -> None:
        with log.subscribe() as subscription:
            received.extend(subscription)

    follower = pool.submit(follow)
    watched.await_waiters(1)
    with _file_size_limit(60):
        log.append(b"a" * 50)
        log.append(b"b" * 30)  # ten of them fit
    log.append(b"c" * 5)  # there is room again, but a hole in the middle would be a lie
    assert log.size == 60
    log.complete()
    with pytest.raises(OutputIncompleteError, match="25 bytes of output were lost") as caught:
        follower.result(_GUARD_S)
    assert (caught.value.errno, caught.value.lost_bytes) == (errno.EFBIG, 25)
    assert b"".join(received) == b"a" * 50 + b"b" * 10
    with log.subscribe(offset=60) as late, pytest.raises(OutputIncompleteError):
        next(late)
    with pytest.raises(OffsetError):
        log.subscribe(offset=61)


def test_truncated_file_is_an_error_and_not_an_endless_loop(log: OutputLog, path: Path) -> None:
    """If somebody meddles with the file, the subscriber is told where."""
    log.append(b"abc")
    os.truncate(path, 0)
    with log.subscribe() as subscription, pytest.raises(OSError, match="truncated"):
        next(subscription)
