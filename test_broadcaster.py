"""Tests of the output log, with real files and real threads.

A test that needs to know that a thread waits uses `_Watched`, never a delay.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadcaster import (
    OffsetError,
    OutputIncompleteError,
    OutputLog,
    Subscription,
)
from budget import Budget
from outputdirectory import OutputDirectory
from outputerrors import OutputLeftError
from testkit import GUARD_S, NOBODY, file_size_limit, make_fifo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ALL_BYTES = bytes(range(256))


class _Waits:
    """Tells when threads begin to wait for output. `timeouts_s`: of each wait."""

    def __init__(self) -> None:
        self.timeouts_s: list[float | None] = []
        self._begun = threading.Semaphore(0)
        self._conditions: list[threading.Condition] = []

    def begin(self, condition: threading.Condition, timeout: float | None) -> None:
        """Note a wait. The calling thread holds the condition's lock until it waits."""
        self.timeouts_s.append(timeout)
        self._conditions.append(condition)
        self._begun.release()

    def await_waiters(self, count: int) -> None:
        """Block until threads have begun to wait `count` times more."""
        for _ in range(count):
            assert self._begun.acquire(timeout=GUARD_S)
        for condition in self._conditions:  # each thread releases the lock only when it waits
            with condition:
                pass


class _Watched(threading.Condition):
    """A condition that tells `waits` of each wait."""

    def __init__(self, lock: threading.RLock, waits: _Waits) -> None:
        super().__init__(lock)
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.begin(self, timeout)
        return super().wait(timeout)


def _descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Every test must close all its descriptors and end all its threads."""
    descriptors, threads = _descriptors(), threading.active_count()
    yield
    # A subset, because gRPC, which tests of other modules have used, may close descriptors late.
    assert set(_descriptors()) <= set(descriptors)
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
def waits(monkeypatch: pytest.MonkeyPatch) -> _Waits:
    """The waits of all subscriptions that this test makes."""
    waits, init = _Waits(), Subscription.__init__

    def watched(subscription: Subscription, log: OutputLog, subscriber: str, offset: int) -> None:
        init(subscription, log, subscriber, offset)
        subscription._changed = _Watched(log._lock, waits)

    monkeypatch.setattr(Subscription, "__init__", watched)
    return waits


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(128) as pool:
        yield pool


def _read(log: OutputLog, offset: int = 0, subscriber: str = "") -> bytes:
    with log.subscribe(subscriber, offset) as subscription:
        return b"".join(subscription)


# --- the same bytes for everyone ------------------------------------------------------


def test_early_middle_and_late_subscribers_get_identical_bytes(log: OutputLog) -> None:
    """Subscribers that begin before, while or after the output is written get the same bytes."""
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
    """A complete log without a byte gives no chunk, not even an empty one."""
    log.append(b"")
    log.complete()
    assert list(log.subscribe()) == []


def test_bytes_arrive_as_they_are_appended(log: OutputLog) -> None:
    """A chunk comes at once; no full line, full buffer or end of the output is needed."""
    with log.subscribe() as subscription:
        for byte in b"ab\n":
            log.append(bytes([byte]))
            assert next(subscription) == bytes([byte])


def test_every_byte_value_and_split_utf8_pass_untouched(log: OutputLog) -> None:
    """NUL, CR, invalid UTF-8 and a character cut in two are delivered unchanged."""
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
    """A megabyte comes in chunks of 1 byte to 256 KiB."""
    log.append(bytes(1024 * 1024 + 1))
    log.complete()
    with log.subscribe() as subscription:
        sizes = [len(chunk) for chunk in subscription]
    assert sum(sizes) == 1024 * 1024 + 1
    assert all(0 < size <= 256 * 1024 for size in sizes)


def test_chunk_has_at_most_the_bytes_that_chunk_bytes_returns(log: OutputLog) -> None:
    """`chunk_bytes` is called once for each chunk, and no byte is lost."""
    data = os.urandom(40)
    sizes = iter([16, 1, 20, 100])
    with log.subscribe() as subscription:
        subscription.chunk_bytes = lambda: next(sizes)
        log.append(data)
        log.complete()
        assert list(subscription) == [data[:16], data[16:17], data[17:37], data[37:]]


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(0, 2500), st.integers(0, 8))
def test_any_subscriber_gets_what_follows_its_offset(
    parts: list[bytes], offset: int, joins_after: int
) -> None:
    """For any output, offset and time of subscribing: the bytes from the offset, or an error."""
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
    """Twenty subscribers, with different times and offsets, read exactly what was written."""
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
    assert [future.result(GUARD_S) for future in early] == expected
    assert [future.result(GUARD_S) for future in late] == expected


# --- offsets --------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 5, 9])
def test_subscription_starts_at_its_offset(log: OutputLog, offset: int, complete: bool) -> None:
    """A subscription with an offset before the end gives exactly the bytes from there on."""
    log.append(b"0123456789")
    if complete:
        log.complete()
    with log.subscribe(offset=offset) as subscription:
        assert next(subscription) == b"0123456789"[offset:]
        assert subscription.offset == 10


def test_offset_at_the_end_of_complete_output_gives_nothing(log: OutputLog) -> None:
    """An offset equal to the size of complete output is not an error."""
    log.append(b"abc")
    log.complete()
    assert _read(log, 3) == b""


def test_offset_past_complete_output_is_refused(log: OutputLog) -> None:
    """The error has the offset and the size, and the subscriber is not listed."""
    log.append(b"abc")
    log.complete()
    with pytest.raises(OffsetError, match=r"offset 4 .* 3 bytes") as caught:
        log.subscribe("alice", 4)
    assert (caught.value.offset, caught.value.size) == (4, 3)
    assert list(log.subscribers) == []


def test_negative_offset_is_refused(log: OutputLog) -> None:
    """An offset below 0 raises ValueError."""
    with pytest.raises(ValueError, match="negative"):
        log.subscribe(offset=-1)


def test_offset_ahead_of_growing_output_waits_for_it(
    log: OutputLog, waits: _Waits, pool: ThreadPoolExecutor
) -> None:
    """A subscriber with an offset past the present end waits until the output exceeds it."""
    log.append(b"abc")
    with log.subscribe(offset=5) as subscription:
        chunk = pool.submit(next, subscription)
        waits.await_waiters(1)
        log.append(b"de")  # ends at the offset
        waits.await_waiters(1)
        assert not chunk.done()
        log.append(b"fg")
        assert chunk.result(GUARD_S) == b"fg"


def test_output_that_ends_before_the_offset_is_an_error(
    log: OutputLog, waits: _Waits, pool: ThreadPoolExecutor
) -> None:
    """A subscriber waits at its offset; if the output ends before it, `OffsetError` is raised."""
    log.append(b"abc")
    with log.subscribe("alice", offset=5) as subscription:
        chunk = pool.submit(next, subscription)
        waits.await_waiters(1)
        log.complete()
        with pytest.raises(OffsetError):
            chunk.result(GUARD_S)
        assert list(log.subscribers) == []


# --- waiting, closing, ending -----------------------------------------------------------


def test_subscriber_that_never_reads_blocks_nobody(
    log: OutputLog, pool: ThreadPoolExecutor
) -> None:
    """A subscriber that stops reading holds up neither the writer nor other subscribers."""
    with log.subscribe("asleep"), log.subscribe("stalled") as stalled:
        reader = pool.submit(_read, log)
        log.append(b"x")
        assert next(stalled) == b"x"
        for _ in range(64):
            log.append(bytes(64 * 1024))
        log.complete()
        assert len(reader.result(GUARD_S)) == 1 + 64 * 64 * 1024
        assert sum(map(len, stalled)) == 64 * 64 * 1024  # it can still read the rest


def test_close_wakes_a_waiting_subscriber(
    log: OutputLog, waits: _Waits, pool: ThreadPoolExecutor
) -> None:
    """`close` in another thread ends the waiting iteration, and no other one."""
    closed, other = log.subscribe("closed"), log.subscribe("other")
    chunks, others = pool.submit(list, closed), pool.submit(list, other)
    waits.await_waiters(2)
    closed.close()
    assert chunks.result(GUARD_S) == []
    assert list(log.subscribers) == ["other"]
    log.append(b"more")
    log.complete()
    assert others.result(GUARD_S) == [b"more"]


def test_close_wakes_no_other_subscriber(
    log: OutputLog, waits: _Waits, pool: ThreadPoolExecutor
) -> None:
    """While 100 waiting subscriptions are closed one by one, no thread begins to wait again."""
    subscriptions = [log.subscribe() for _ in range(100)]
    chunks = [pool.submit(list, subscription) for subscription in subscriptions]
    waits.await_waiters(100)
    for subscription, future in zip(subscriptions, chunks, strict=True):
        subscription.close()
        assert future.result(GUARD_S) == []
    assert len(waits.timeouts_s) == 100


def test_complete_ends_all_waiting_subscribers(
    log: OutputLog, waits: _Waits, pool: ThreadPoolExecutor
) -> None:
    """`complete` wakes twenty subscribers that wait, and their iterations end."""
    waiting = [pool.submit(_read, log) for _ in range(20)]
    waits.await_waiters(20)
    log.complete()
    assert [future.result(GUARD_S) for future in waiting] == [b""] * 20


def test_waiting_subscribers_use_no_cpu(
    log: OutputLog, waits: _Waits, pool: ThreadPoolExecutor
) -> None:
    """While another thread computes, the CPU clocks of a hundred waiting threads stand still."""
    idents = []

    def follow() -> bytes:
        idents.append(threading.get_ident())
        return _read(log)

    followers = [pool.submit(follow) for _ in range(100)]
    waits.await_waiters(100)

    def used_ns() -> list[int]:
        return [time.clock_gettime_ns(time.pthread_getcpuclockid(ident)) for ident in idents]

    def nobody_ran() -> bool:
        before = used_ns()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000)
        return used_ns() == before

    # Several rounds, because at first some threads may still be between the lock and the wait.
    assert any(nobody_ran() for _ in range(10))
    log.complete()
    assert [future.result(GUARD_S) for future in followers] == [b""] * 100


def test_close_is_idempotent_and_final(log: OutputLog) -> None:
    """A closed subscription gives no chunk, also after a second close."""
    log.append(b"abc")
    subscription = log.subscribe()
    subscription.close()
    subscription.close()
    assert list(subscription) == []
    assert list(log.subscribers) == []


def test_close_during_a_read_leaves_the_descriptor_open(
    log: OutputLog, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If `close` comes during a read, the file is closed only after the read."""
    log.append(b"abc")
    log.complete()
    entered, go_on = threading.Event(), threading.Event()
    real, seen = os.pread, []

    def slow_pread(fd: int, count: int, offset: int) -> bytes:
        entered.set()
        assert go_on.wait(GUARD_S)
        seen.append(fd)
        return real(fd, count, offset)

    monkeypatch.setattr(os, "pread", slow_pread)
    before = len(_descriptors())
    subscription = log.subscribe()
    chunk = pool.submit(next, subscription)
    assert entered.wait(GUARD_S)
    subscription.close()
    go_on.set()
    assert chunk.result(GUARD_S) == b"abc"
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(seen[0])
    assert len(_descriptors()) == before
    assert list(subscription) == []


def test_closing_while_reading_never_reads_another_file(
    log: OutputLog, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """Subscriptions are closed while another thread opens files; no byte of those is read."""
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
            assert all(future.result(GUARD_S) for future in clean)
    finally:
        done.set()
    churn.result(GUARD_S)


def test_descriptors_are_closed_with_the_last_subscriber(path: Path) -> None:
    """All subscribers share one descriptor; it is closed after the end and the last subscriber."""
    before = len(_descriptors())
    log = OutputLog(path)
    subscriptions = [log.subscribe() for _ in range(10)]
    assert len(_descriptors()) == before + 1
    log.complete()
    assert len(_descriptors()) == before + 1
    for subscription in subscriptions:
        subscription.close()
    assert len(_descriptors()) == before
    with log.subscribe():  # opens the file again
        assert len(_descriptors()) == before + 1
    assert len(_descriptors()) == before


def test_subscribers_are_listed_while_they_read(log: OutputLog) -> None:
    """Each name is listed once, in order; a subscriber without a name is not listed."""
    with log.subscribe("bob"), log.subscribe("alice"), log.subscribe(""):
        with log.subscribe("bob"):
            assert list(log.subscribers) == ["alice", "bob"]
        assert list(log.subscribers) == ["alice", "bob"]
    assert list(log.subscribers) == []
    log.complete()
    last = log.subscribe("carol")
    assert list(log.subscribers) == ["carol"]
    assert list(last) == []  # a subscription that is read to the end is closed
    assert list(log.subscribers) == []


# --- the file ---------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_file_is_private_whatever_the_umask(path: Path, umask: int) -> None:
    """The file has mode 0600 with any umask."""
    previous = os.umask(umask)
    try:
        log = OutputLog(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    log.remove()


@pytest.mark.parametrize("kind", ["file", "symlink", "dangling symlink"])
def test_existing_file_is_refused_and_left_alone(path: Path, tmp_path: Path, kind: str) -> None:
    """A log never writes to a file or symlink that exists under its name."""
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
    """`remove` deletes the file; present subscribers get every byte, new ones are refused."""
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
    """A complete log does not grow; a second `complete` does nothing."""
    log.append(b"abc")
    log.complete()
    log.complete()
    with pytest.raises(ValueError, match="complete"):
        log.append(b"more")
    assert log.size == 3
    assert _read(log) == b"abc"


def test_when_a_full_disk_has_room_again_the_log_continues_after_a_gap(
    log: OutputLog, waits: _Waits, pool: ThreadPoolExecutor
) -> None:
    """What comes when there is room again is kept, and every subscriber is told of the gap."""
    received: list[bytes] = []

    def follow() -> None:
        with log.subscribe() as subscription:
            received.extend(subscription)

    follower = pool.submit(follow)
    waits.await_waiters(1)
    with file_size_limit(60):
        log.append(b"a" * 50)
        log.append(b"b" * 30)  # ten of these bytes fit
    log.append(b"c" * 5)
    assert (log.size, log.gap) == (65, (60, 20))
    log.complete()
    with pytest.raises(OutputIncompleteError, match="not kept") as caught:
        follower.result(GUARD_S)
    assert str(caught.value) == "20 bytes of output were not kept: File too large"
    assert (caught.value.errno, caught.value.lost_bytes) == (errno.EFBIG, 20)
    assert b"".join(received) == b"a" * 50 + b"b" * 10 + b"c" * 5
    assert _read(log, 80) == b"c" * 5
    with log.subscribe(offset=70) as late:
        assert (next(late), late.gap, late.offset) == (b"c" * 5, (70, 10), 85)
        with pytest.raises(OutputIncompleteError, match="10 bytes"):
            next(late)
    with pytest.raises(OffsetError):
        log.subscribe(offset=86)


def test_truncated_file_is_an_error_and_not_an_endless_loop(log: OutputLog, path: Path) -> None:
    """If the file was truncated from outside, the subscriber gets an OSError."""
    log.append(b"abc")
    os.truncate(path, 0)
    with log.subscribe() as subscription, pytest.raises(OSError, match="truncated"):
        next(subscription)


# --- a directory instead of a path ------------------------------------------------------


def test_log_with_dir_fd_needs_no_path_to_its_directory(tmp_path: Path) -> None:
    """After its directory was renamed, a log is made, read and removed through the descriptor."""
    (tmp_path / "before").mkdir()
    directory = os.open(tmp_path / "before", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (tmp_path / "before").rename(tmp_path / "after")
        log = OutputLog("job.out", dir_fd=directory)
        log.append(b"abc")
        log.complete()
        assert stat.S_IMODE((tmp_path / "after" / "job.out").stat().st_mode) == 0o600
        assert _read(log) == b"abc"  # opens the file again
        log.remove()
        assert list((tmp_path / "after").iterdir()) == []
        assert not (tmp_path / "before").exists()
        assert not Path("job.out").exists()
    finally:
        os.close(directory)


_UNPRIVILEGED = """
import os, sys
from broadcaster import OutputLog

outer, inner = sys.argv[1], sys.argv[1] + "/inner"
directory = os.open(inner, os.O_RDONLY | os.O_DIRECTORY)
if os.geteuid() == 0:
    os.chown(inner, 65534, 65534)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
else:
    os.chmod(outer, 0)
try:
    OutputLog(inner + "/job.out")
except PermissionError:
    print("no way")
log = OutputLog("job.out", dir_fd=directory)
log.append(b"abc")
log.complete()
with log.subscribe() as subscription:
    print(list(subscription))
log.remove()
print(os.listdir(directory))
"""


def test_log_works_where_the_path_may_no_longer_be_walked(tmp_path: Path) -> None:
    """A process that owns the directory, but may not enter its parent, can use the log."""
    outer = tmp_path / "outer"
    (outer / "inner").mkdir(parents=True)
    outer.chmod(0o700)
    try:
        result = subprocess.run(
            [sys.executable, "-c", _UNPRIVILEGED, str(outer)],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
        )
    finally:
        outer.chmod(0o700)
    assert (result.stdout, result.stderr) == ("no way\n[b'abc']\n[]\n", "")


# --- budgets ----------------------------------------------------------------------------


def _together(pool: ThreadPoolExecutor, *calls: Callable[[], object]) -> None:
    """Make all calls at the same time; return when all have returned."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> None:
        barrier.wait(GUARD_S)
        call()

    for future in [pool.submit(run, call) for call in calls]:
        future.result(GUARD_S)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories away")
def test_directory_that_somebody_else_made_is_refused(public: Path) -> None:
    """Made beforehand in /tmp, say: its owner could read and replace all output."""
    public.chmod(0o1777)
    (public / "output").mkdir(0o700)
    os.chown(public / "output", NOBODY, NOBODY)
    with pytest.raises(PermissionError, match=f"it belongs to uid {NOBODY}"):
        OutputDirectory(public / "output")
    public.chmod(0o755)  # nobody but us can have made it here
    OutputDirectory(public / "output").close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_output_directory_of_a_user_of_jobs_is_refused(public: Path) -> None:
    """Even where nobody else could have made it."""
    path = public / "output"
    path.mkdir(mode=0o700)
    os.chown(path, 71_001, 71_001)
    OutputDirectory(path).close()
    with pytest.raises(PermissionError, match="it belongs to uid 71001"):
        OutputDirectory(path, uids=range(71_001, 71_003))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_only_output_is_given_to_another_user(public: Path) -> None:
    """Not a file that has a second name there, nor what a link or a device leads to."""
    path, secret, output = public / "output", public / "secret", str(uuid.uuid4())
    path.mkdir(mode=0o700)
    secret.touch(0o600)
    os.link(secret, path / "second")
    (path / "link").symlink_to(secret)
    make_fifo(path / "fifo")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.bind(str(path / "socket"))
    (path / output).touch(0o600)
    with OutputDirectory(path) as directory:
        directory.give_to(71_001)
    assert secret.stat().st_uid == 0
    assert {path.stat().st_uid, (path / output).stat().st_uid} == {71_001}


@pytest.mark.parametrize("suffix", ["", ".gap", ".times"])
def test_log_does_not_follow_links(tmp_path: Path, suffix: str) -> None:
    """A former owner of the directory could have made them: they lead to files of others."""
    secret, name = tmp_path / "secret", tmp_path / "a.out"
    secret.write_bytes(bytes(4096))
    name.touch(0o600)
    link = tmp_path / f"a.out{suffix}"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    if suffix:
        log = OutputLog(name, lasting=True, resumed=True)
        log.append(b"more")
        log.complete()
        assert log.lost_bytes == (suffix == ".gap")  # what is missing is not known
    else:
        with pytest.raises(OSError, match="symbolic links"):
            OutputLog(name, lasting=True, resumed=True)
    assert secret.read_bytes() == bytes(4096)


def test_budget_gives_what_it_has_and_no_more() -> None:
    """A take beyond the limit gets the rest; bytes that were given back can be taken again."""
    budget = Budget(10, "ten")
    assert budget.take(0) == (0, None)
    assert budget.take(4) == (4, None)
    assert budget.take(6) == (6, None)
    assert budget.is_used_up
    assert budget.take(0) == (0, None)
    assert budget.take(1) == (0, budget)
    budget.give_back(3)
    assert (budget.used, budget.is_used_up) == (7, False)
    assert budget.take(5) == (3, budget)


def test_budget_without_a_limit_is_never_used_up() -> None:
    """A budget without a limit gives any number of bytes, and counts them."""
    budget = Budget(None, "none")
    assert budget.take(1 << 62) == (1 << 62, None)
    assert budget.take(1 << 62) == (1 << 62, None)
    assert (budget.used, budget.is_used_up) == (1 << 63, False)


def test_budget_of_zero_gives_nothing() -> None:
    """A budget of 0 bytes is used up from the start."""
    budget = Budget(0, "zero")
    assert budget.is_used_up
    assert budget.take(1) == (0, budget)


@pytest.mark.parametrize("size", [1, 0, -1])
def test_giving_back_what_was_not_taken_is_an_error(size: int) -> None:
    """Giving back too much, or a negative size, raises ValueError and changes nothing."""
    parent = Budget(9, "parent")
    child, other = Budget(9, "child", parent), Budget(9, "other", parent)
    child.take(3)
    other.take(3)
    with pytest.raises(ValueError, match=r"bytes given back, of 3 taken"):
        child.give_back(3 + size if size > 0 else size - 1)
    assert (child.used, parent.used) == (3, 6)


@pytest.mark.parametrize(
    ("job", "user", "everybody", "refuser"),
    [
        *((5, 9, 9, "job"), (9, 5, 9, "user"), (9, 9, 5, "all"), (None, 5, 9, "user")),
        *((6, 5, 9, "user"), (6, 6, 5, "all"), (5, 6, 6, "job"), (5, 5, 5, "job")),
    ],
)
def test_bytes_are_taken_from_every_parent_or_from_none(
    job: int | None, user: int, everybody: int, refuser: str
) -> None:
    """The smallest budget bounds the take and is returned; all budgets count the same bytes."""
    of_all = Budget(everybody, "all")
    of_user = Budget(user, "user", of_all)
    of_job = Budget(job, "job", of_user)
    taken, refused_by = of_job.take(7)
    assert taken == 5
    assert refused_by is not None
    assert refused_by.what == refuser
    assert [budget.used for budget in (of_job, of_user, of_all)] == [5, 5, 5]
    of_job.give_back(2)
    assert [budget.used for budget in (of_job, of_user, of_all)] == [3, 3, 3]


def test_full_parent_takes_nothing_from_the_child() -> None:
    """If a parent has nothing left, the child counts no byte, and can take when it has again."""
    parent = Budget(5, "parent")
    first, second = Budget(5, "first", parent), Budget(5, "second", parent)
    first.take(5)
    assert second.take(5) == (0, parent)
    assert (second.used, second.is_used_up, parent.is_used_up) == (0, False, True)
    first.give_back(5)
    assert second.take(5) == (5, None)


def test_threads_together_never_take_more_than_there_is(pool: ThreadPoolExecutor) -> None:
    """Eight threads take exactly the limit of their shared parent, and give all of it back."""
    parent = Budget(100_003, "parent")
    children = [Budget(30_000, str(i), parent) for i in range(8)]
    taken = [0] * len(children)

    def take_all(i: int) -> None:
        while size := children[i].take(7)[0]:
            taken[i] += size

    _together(pool, *(lambda i=i: take_all(i) for i in range(8)))
    assert sum(taken) == parent.used == 100_003
    assert [child.used for child in children] == taken
    assert max(taken) <= 30_000

    _together(pool, *(lambda i=i: children[i].give_back(taken[i]) for i in range(8)))
    assert [budget.used for budget in (parent, *children)] == [0] * 9


def test_takes_and_returns_at_the_same_time_agree(pool: ThreadPoolExecutor) -> None:
    """Eight threads take and give back; no take is refused, and in the end nothing is taken."""
    parent = Budget(8 * 3, "parent")
    shared = [Budget(2 * 3, "child", parent) for _ in range(4)]  # by two threads each

    def churn(budget: Budget) -> None:
        for _ in range(2000):
            assert budget.take(3) == (3, None)
            budget.give_back(3)

    _together(pool, *(lambda i=i: churn(shared[i % 4]) for i in range(8)))
    assert [budget.used for budget in (parent, *shared)] == [0] * 5


def test_budget_may_be_given_back_in_the_middle_of_a_take() -> None:
    """`give_back` may be called inside `take`, as when the garbage collector closes a stream."""

    class Collecting(Budget):
        def take(self, size: int) -> tuple[int, Budget | None]:
            child.give_back(4)
            return super().take(size)

    parent = Collecting(None, "parent")
    child = Budget(10, "child")
    child.take(4)
    child._parent = parent
    Budget.take(parent, 4)
    assert child.take(6) == (6, None)
    assert (child.used, parent.used) == (6, 6)


# --- output within a budget -------------------------------------------------------------

_CEILING = "this job's ceiling of 10 bytes"


def _follow(log: OutputLog, offset: int = 0) -> tuple[bytes, str]:
    """Read to the end; return what was read, and the error at the end, "" if there is none."""
    chunks: list[bytes] = []
    try:
        with log.subscribe(offset=offset) as subscription:
            chunks.extend(subscription)
    except OutputIncompleteError as error:
        return b"".join(chunks), str(error)
    return b"".join(chunks), ""


@pytest.mark.parametrize("parts", [[10], [4, 6], [10, 0], [0, 1, 9]])
def test_output_of_exactly_the_budget_is_kept(path: Path, parts: list[int]) -> None:
    """Output as large as the budget is all kept, and the subscription ends without an error."""
    budget = Budget(10, _CEILING)
    log = OutputLog(path, budget=budget)
    for size in parts:
        log.append(b"x" * size)
    log.complete()
    assert _read(log) == b"x" * 10
    assert (log.size, log.lost_bytes, budget.used) == (10, 0, 10)
    log.remove()
    assert budget.used == 0


@pytest.mark.parametrize(
    ("parts", "kept", "lost"),
    [
        ([b"0123456789a"], b"012346789a", 1),
        ([b"0123456789", b"a"], b"012346789a", 1),
        ([b"01234567", b"89ab", b"cdef"], b"01234bcdef", 6),
    ],
)
def test_past_the_budget_the_head_and_the_tail_are_kept_and_the_rest_is_reported(
    path: Path, parts: list[bytes], kept: bytes, lost: int
) -> None:
    """A late subscriber gets exactly the kept bytes, then an error that names the ceiling."""
    log = OutputLog(path, budget=Budget(10, _CEILING))
    for data in parts:
        log.append(data)
    assert (log.size, log.lost_bytes) == (10, lost)
    log.complete()
    error = f"{lost} bytes of output were not kept: this job's ceiling of 10 bytes is reached"
    assert _follow(log) == (kept, error)
    assert _follow(log, 4) == (kept[4:], error)
    assert _follow(log, 5 + lost) == (kept[5:], "")
    with pytest.raises(OffsetError):
        log.subscribe(offset=10 + lost + 1)
    assert path.read_bytes() == kept[:5] + bytes(lost) + kept[5:]
    with log.subscribe() as subscription, pytest.raises(OutputIncompleteError) as caught:
        list(subscription)
    assert (caught.value.errno, caught.value.lost_bytes) == (errno.EDQUOT, lost)
    log.remove()


def test_subscriber_of_a_growing_log_gets_the_error_only_at_its_end(
    path: Path, waits: _Waits, pool: ThreadPoolExecutor
) -> None:
    """Until the log is complete its subscriber waits, because more bytes may be lost."""
    log = OutputLog(path, budget=Budget(1, "one"))
    log.append(b"ab")
    live = pool.submit(_follow, log)
    waits.await_waiters(1)
    log.append(b"c")
    assert not live.done()
    log.complete()
    assert live.result(GUARD_S) == (b"a", "2 bytes of output were not kept: one is reached")
    log.remove()


def test_with_a_budget_of_zero_all_output_is_counted_and_none_kept(path: Path) -> None:
    """With 0 bytes to keep, the subscriber gets only the error with the number of lost bytes."""
    budget = Budget(0, "nothing")
    log = OutputLog(path, budget=budget)
    log.append(b"")
    assert log.lost_bytes == 0
    log.append(b"abc")
    log.complete()
    error = "3 bytes of output were not kept: nothing is reached"
    assert _follow(log) == (b"", error)
    assert (log.size, log.lost_bytes, budget.used) == (0, 3, 0)
    log.remove()


def test_room_that_comes_back_is_used(path: Path, tmp_path: Path) -> None:
    """A tail that had to be small grows when the budget has room again."""
    shared = Budget(6, "shared")
    other = OutputLog(tmp_path / "other.out", budget=shared)
    other.append(b"xxxx")
    log = OutputLog(path, budget=shared)
    log.append(b"abc")
    other.remove()
    assert shared.used == 2
    log.append(b"def")
    log.complete()
    assert (log.size, log.gap, shared.used) == (5, (1, 1), 5)
    assert path.read_bytes() == b"a\0cdef"
    log.remove()


@pytest.mark.parametrize("refuser", ["job", "user", "all"])
def test_error_names_the_budget_that_refused(path: Path, refuser: str) -> None:
    """The error names the budget that was used up: the job's, the user's or that of all."""
    parent = None
    for what in ("all", "user", "job"):
        parent = Budget(3 if what == refuser else 9, f"the {what}'s ceiling", parent)
    log = OutputLog(path, budget=parent)
    log.append(b"abcd")
    log.complete()
    error = f"1 bytes of output were not kept: the {refuser}'s ceiling is reached"
    assert _follow(log) == (b"abd", error)
    log.remove()


@pytest.mark.parametrize("limit", [100, 70, 60])
def test_bytes_that_the_disk_refused_are_given_back_to_the_budget(path: Path, limit: int) -> None:
    """Only stored bytes count; the error is that of the first lost byte, here the disk's."""
    budget = Budget(limit, _CEILING)
    log = OutputLog(path, budget=budget)
    log.append(b"a" * 50)
    with file_size_limit(55):
        log.append(b"b" * 30)
    log.append(b"c" * 4)
    log.complete()
    assert (log.size, log.lost_bytes, budget.used) == (59, 25, 59)
    assert _follow(log)[1] == "25 bytes of output were not kept: File too large"
    log.remove()
    assert budget.used == 0


def test_log_that_cannot_be_made_takes_nothing(path: Path) -> None:
    """A log whose file exists already takes nothing from the budget, nor does an empty log."""
    budget = Budget(10, _CEILING)
    path.touch()
    with pytest.raises(FileExistsError):
        OutputLog(path, budget=budget)
    assert budget.used == 0
    path.unlink()
    log = OutputLog(path, budget=budget)
    assert budget.used == 0
    log.remove()
    assert budget.used == 0


def test_budget_comes_back_when_the_output_is_removed_and_once(
    path: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """`remove` gives the bytes back, `complete` does not; 16 threads give them back once."""
    budget = Budget(10, _CEILING)
    other = OutputLog(tmp_path / "other.out", budget=budget)
    other.append(b"xx")
    log = OutputLog(path, budget=budget)
    log.append(b"abc")
    log.complete()
    assert _read(log) == b"abc"
    assert budget.used == 5
    _together(pool, *[log.remove] * 16)
    log.remove()
    assert budget.used == 2
    other.remove()
    assert budget.used == 0


def test_budget_comes_back_when_the_last_subscriber_has_left(path: Path) -> None:
    """A deleted file keeps its disk space while it is open, so its bytes count until then."""
    budget = Budget(10, _CEILING)
    log = OutputLog(path, budget=budget)
    log.append(b"abc")
    with log.subscribe() as reading, log.subscribe() as idle:
        log.remove()
        assert not path.exists()
        assert budget.used == 3
        assert list(reading) == [b"abc"]  # at the end this subscription is closed
        assert budget.used == 3
        idle.close()
        assert budget.used == 0
        idle.close()
    log.remove()
    assert budget.used == 0


def test_budget_does_not_come_back_under_a_read(
    path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription closed during a read keeps the file open until the read returns."""
    budget = Budget(10, _CEILING)
    log = OutputLog(path, budget=budget)
    log.append(b"abc")
    entered, go_on = threading.Event(), threading.Event()
    real = os.pread

    def slow_pread(fd: int, count: int, offset: int) -> bytes:
        entered.set()
        assert go_on.wait(GUARD_S)
        return real(fd, count, offset)

    monkeypatch.setattr(os, "pread", slow_pread)
    subscription = log.subscribe()
    chunk = pool.submit(next, subscription)
    assert entered.wait(GUARD_S)
    log.remove()
    subscription.close()
    assert budget.used == 3
    go_on.set()
    assert chunk.result(GUARD_S) == b"abc"
    assert budget.used == 0


def test_budget_of_a_file_that_cannot_be_deleted_stays_taken(path: Path) -> None:
    """`remove` raises the error, and the bytes stay taken because the file is still there."""
    budget = Budget(10, _CEILING)
    log = OutputLog(path, budget=budget)
    log.append(b"abc")
    path.rename(path.with_suffix(".moved"))
    path.mkdir()
    with pytest.raises(OSError, match=os.fspath(path)):
        log.remove()
    log.remove()
    assert budget.used == 3


def test_logs_that_share_a_budget_keep_all_of_it_and_no_more(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """Eight logs grow at once; each keeps the head and the tail, and counts the rest."""
    shared = Budget(100_000, "the user's ceiling")
    logs = [
        OutputLog(tmp_path / f"{i}.out", budget=Budget(30_000, "the job's ceiling", shared))
        for i in range(8)
    ]
    data = [os.urandom(40_000) for _ in logs]

    def write(i: int) -> None:
        for at in range(0, 40_000, 999):
            logs[i].append(data[i][at : at + 999])
        logs[i].complete()

    _together(pool, *(lambda i=i: write(i) for i in range(8)))
    assert sum(log.size for log in logs) == shared.used == 100_000
    for log, whole in zip(logs, data, strict=True):
        assert log.size <= 30_000
        assert log.size + log.lost_bytes == 40_000
        kept, error = _follow(log)
        begin = log.gap.offset if log.gap else 0
        assert kept == whole[:begin] + whole[begin + log.lost_bytes :]
        assert error.startswith(f"{log.lost_bytes} bytes of output were not kept: the ")
    _together(pool, *(log.remove for log in logs))
    assert shared.used == 0


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(0, 120))
def test_any_output_within_any_budget_is_kept_up_to_it(parts: list[bytes], limit: int) -> None:
    """For any output and ceiling: head and tail fill it, the rest is counted, the error is last."""
    whole = b"".join(parts)
    with tempfile.TemporaryDirectory() as directory:
        budget = Budget(limit, "the ceiling")
        log = OutputLog(Path(directory, "job.out"), budget=budget)
        for data in parts:
            log.append(data)
        log.complete()
        lost = max(0, len(whole) - limit)
        error = f"{lost} bytes of output were not kept: the ceiling is reached" if lost else ""
        head = (limit + 1) // 2 if lost else len(whole)
        assert _follow(log) == (whole[:head] + whole[head + lost :], error)
        assert (log.lost_bytes, budget.used) == (lost, len(whole) - lost)
        log.remove()
        assert budget.used == 0


# --- another process continues the log --------------------------------------------------------


def _fill(pipe: tuple[int, int], data: bytes) -> None:
    os.set_blocking(pipe[0], False)
    os.write(pipe[1], data)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe as that of a job."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_what_is_in_the_pipe_is_moved_into_the_file(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """At most as much as asked for; the rest stays in the pipe; an empty pipe gives nothing."""
    log = OutputLog(tmp_path / "log", lasting=True)
    _fill(pipe, b"hello world")
    assert (log.move(pipe[0], 5), log.move(pipe[0], 100), log.move(pipe[0], 100)) == (5, 6, 0)
    assert (tmp_path / "log").read_bytes() == b"hello world"
    log.complete()
    assert b"".join(log.subscribe()) == b"hello world"


def test_log_of_a_dead_process_continues_at_the_size_of_its_file(tmp_path: Path) -> None:
    """Readers get all of it; the bytes count for the budget of the new process."""
    former = OutputLog(tmp_path / "log", lasting=True)
    former.append(b"before ")
    with former.subscribe() as reader:
        former.leave()
        assert next(reader) == b"before "
        with pytest.raises(OutputLeftError):
            next(reader)
    log = OutputLog(tmp_path / "log", lasting=True, resumed=True)
    budget = Budget(100, "a ceiling")
    log.charge(budget)
    assert (log.size, budget.used) == (7, 7)
    log.append(b"after")
    log.complete()
    assert b"".join(log.subscribe()) == b"before after"
    log.remove()
    assert (budget.used, list(tmp_path.iterdir())) == (0, [])


@pytest.mark.parametrize("moves", [False, True])
def test_gap_of_a_dead_process_is_continued(
    tmp_path: Path, pipe: tuple[int, int], moves: bool
) -> None:
    """Head, gap and tail are those of one process that wrote everything."""
    text = bytes(random.Random(1).randbytes(300_000))

    def write(log: OutputLog, data: bytes) -> None:
        for begin in range(0, len(data), 50_000):
            part = data[begin : begin + 50_000]
            if moves:
                _fill(pipe, part)
                log.move(pipe[0], len(part))
            else:
                log.append(part)

    def read(log: OutputLog) -> tuple[list[tuple[int, bytes]], str]:
        log.complete()
        found, at = [], log.subscribe()
        try:
            for chunk in at:
                found.append((at.offset, chunk))  # noqa: PERF401 -- keeps what came before an error
        except OutputIncompleteError as error:
            return found, str(error)
        pytest.fail("nothing is missing")

    def make(name: str, *, resumed: bool = False) -> OutputLog:
        return OutputLog(tmp_path / name, lasting=True, resumed=resumed)

    whole, first = make("whole"), make("parts")
    for log in (whole, first):
        log.budget = Budget(100_000, "this ceiling")
        write(log, text[:200_000])
    first.leave()
    second = make("parts", resumed=True)
    second.charge(Budget(100_000, "this ceiling"))
    assert (second.gap, second.size) == (first.gap, first.size)
    for log in (whole, second):
        write(log, text[200_000:])
    assert second.gap is not None
    assert second.gap.length >= 190_000
    assert read(second) == read(whole)
    second.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "whole.gap", "whole.times"]
