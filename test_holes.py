"""Tests of the gap: what an output log gives up at a ceiling or on a full disk, and who is told."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import holes
from broadcaster import OutputIncompleteError, OutputLog
from budget import Budget
from outputdirectory import OutputDirectory
from testkit import ABSENT, GUARD_S, small_file_system

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from broadcaster import Subscription

_KIB = 1024
_MIB = 1024 * 1024


def _lines(begin: int, end: int) -> bytes:
    """Return numbered lines of 16 bytes, so that each byte tells its place."""
    return b"".join(b"%015d\n" % number for number in range(begin // 16, end // 16))


def _read(subscription: Subscription) -> tuple[bytes, list[tuple[int, int]], int]:
    """Read to the end; return the bytes, the gaps, and how many bytes the error counts."""
    received: list[bytes] = []
    gaps: list[tuple[int, int]] = []
    missed = 0
    try:
        for chunk in subscription:
            received.append(chunk)
            gaps += [subscription.gap] if subscription.gap else []
    except OutputIncompleteError as error:
        missed = error.lost_bytes
    return b"".join(received), gaps, missed


def _on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture
def log(tmp_path: Path) -> Iterator[OutputLog]:
    """A log with a ceiling of 1 MiB."""
    log = OutputLog(tmp_path / "job.out", budget=Budget(_MIB, "the ceiling"))
    yield log
    log.remove()


@pytest.mark.parametrize("piece", [1, 100, 4096, 65_536, _MIB])
def test_head_and_tail_are_kept_at_their_offsets_and_the_middle_takes_no_disk(
    log: OutputLog, tmp_path: Path, piece: int
) -> None:
    """Of 8 MiB, written in pieces of any size, the disk holds about the ceiling."""
    whole = _lines(0, (64 * _KIB + 2 * _MIB if piece == 1 else 8 * _MIB))
    begin = 2 * _MIB if piece == 1 else 0
    log.append(whole[:begin])
    for at in range(begin, len(whole), piece):
        log.append(whole[at : at + piece])
    log.complete()
    gap = log.gap
    assert gap is not None
    assert gap.offset == 512 * _KIB
    assert 512 * _KIB <= log.size <= _MIB
    assert log.size + gap.length == len(whole)
    stored = (tmp_path / "job.out").read_bytes()
    assert stored[: gap.offset] == whole[: gap.offset]
    assert stored[gap.offset + gap.length :] == whole[gap.offset + gap.length :]
    assert _on_disk(tmp_path / "job.out") <= _MIB + 128 * _KIB


def test_budget_counts_what_is_on_the_disk(tmp_path: Path) -> None:
    """While the log grows and at its end, and all of it is given back."""
    everybody = Budget(None, "all")
    budget = Budget(_MIB, "the ceiling", everybody)
    log = OutputLog(tmp_path / "job.out", budget=budget)
    for at in range(0, 4 * _MIB, 64 * _KIB):
        log.append(_lines(at, at + 64 * _KIB))
        assert log.size <= budget.used == everybody.used <= _MIB
        assert _on_disk(tmp_path / "job.out") <= budget.used + 128 * _KIB
    log.complete()
    assert budget.used == everybody.used == log.size
    log.remove()
    assert (budget.used, everybody.used) == (0, 0)


def test_live_subscriber_that_keeps_up_gets_every_byte(log: OutputLog) -> None:
    """Of a hundred times the ceiling, without an error at the end."""
    with log.subscribe() as live:
        for at in range(0, 16 * _MIB, 64 * _KIB):
            data = _lines(at, at + 64 * _KIB)
            log.append(data)
            assert next(live) == data
            assert live.gap is None
        log.complete()
        assert list(live) == []
    assert log.lost_bytes > 14 * _MIB


def test_subscriber_that_fell_behind_is_told_what_it_missed_and_continues(log: OutputLog) -> None:
    """The gap begins where this subscriber had read to; the error at the end counts its bytes."""
    whole = _lines(0, 4 * _MIB)
    with log.subscribe() as slow:
        log.append(whole[: _MIB - 160])
        slow.chunk_bytes = lambda: 768 * _KIB
        received = next(slow)  # past the head, which is half of what was there
        log.append(whole[_MIB - 160 :])
        begin, size = log.gap or (0, 0)
        assert begin < len(received) < begin + size
        log.complete()
        missed = begin + size - len(received)
        assert _read(slow) == (whole[begin + size :], [(len(received), missed)], missed)


def test_late_subscriber_meets_the_gap_once_and_from_behind_it_not_at_all(log: OutputLog) -> None:
    """Also if it begins inside of the gap."""
    whole = _lines(0, 4 * _MIB)
    log.append(whole)
    log.complete()
    begin, size = log.gap or (0, 0)
    for offset, gap in (
        (0, (begin, size)),
        (begin, (begin, size)),
        (begin + 5, (begin + 5, size - 5)),
        (begin + size - 1, (begin + size - 1, 1)),
        (begin + size, None),
    ):
        with log.subscribe(offset=offset) as late:
            assert _read(late) == (
                whole[offset:begin] + whole[max(offset, begin + size) :],
                [gap] if gap else [],
                gap[1] if gap else 0,
            )


def test_reads_beside_the_growing_gap_are_never_zeros(log: OutputLog) -> None:
    """Four subscribers read while the log gives up what they read: each byte has its place."""
    size = 16 * _MIB

    def read() -> int:
        missed = 0
        with log.subscribe() as subscription, contextlib.suppress(OutputIncompleteError):
            for chunk in subscription:
                at = subscription.offset - len(chunk)
                missed += subscription.gap.length if subscription.gap else 0
                first, last = -at % 16, (subscription.offset // 16 * 16) - at
                assert chunk[first:last] == _lines(at + first, at + last)
        assert subscription.offset == size
        return missed

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        for at in range(0, size, 128 * _KIB):
            log.append(_lines(at, at + 128 * _KIB))
        log.complete()
        for reader in readers:
            reader.result(GUARD_S)


def test_where_no_holes_can_be_made_the_head_is_kept(
    log: OutputLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after it is counted, and told at the end."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(holes, "_fallocate", refuse)
    for at in range(0, 3 * _MIB, 64 * _KIB):
        log.append(_lines(at, at + 64 * _KIB))
    log.complete()
    assert log.gap == (_MIB, 2 * _MIB)
    assert (tmp_path / "job.out").read_bytes() == _lines(0, _MIB)
    with log.subscribe() as subscription:
        assert _read(subscription) == (_lines(0, _MIB), [], 2 * _MIB)
        assert subscription.gap == (_MIB, 2 * _MIB)


def test_subscriber_waits_while_output_is_lost_and_gets_what_follows(tmp_path: Path) -> None:
    """A log with no byte to give up loses output until its budget has room."""
    shared = Budget(10, "shared")
    shared.take(10)
    log = OutputLog(tmp_path / "job.out", budget=shared)
    with log.subscribe() as live, ThreadPoolExecutor(1) as pool:
        chunk = pool.submit(next, live)
        log.append(b"lost")
        assert not chunk.done()
        shared.give_back(10)
        log.append(b"kept")
        assert chunk.result(GUARD_S) == b"kept"
        assert live.gap == (0, 4)
    log.remove()


# --- a full disk ------------------------------------------------------------------------


def test_full_disk_is_logged_at_the_start_and_at_the_end_of_the_lack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once each, however many jobs write; both logs continue, each with one gap."""
    caplog.set_level(logging.INFO)
    with small_file_system("16m") as disk, OutputDirectory(disk / "o", reserve_bytes=_MIB) as home:
        logs = [home.make_log(ABSENT), home.make_log(ABSENT.replace("a98", "a99"))]
        for log in logs:
            log.append(_lines(0, _MIB))
        assert caplog.messages == []
        filler = disk / "filler"
        filler.write_bytes(bytes(13 * _MIB))
        for at in range(_MIB, 3 * _MIB, 64 * _KIB):
            for log in logs:
                log.append(_lines(at, at + 64 * _KIB))
        (line,) = caplog.messages
        assert line.startswith(f"output in {disk / 'o'} cannot be kept any more: the disk is full ")
        filler.unlink()
        for at in range(3 * _MIB, 6 * _MIB, 64 * _KIB):
            for log in logs:
                log.append(_lines(at, at + 64 * _KIB))
        lost = sum(log.lost_bytes for log in logs)
        assert caplog.messages[1:] == [
            f"output in {disk / 'o'} is kept again; meanwhile {lost} bytes were not"
        ]
        for log in logs:
            log.complete()
            begin, size = log.gap or (0, 0)
            assert begin >= 512 * _KIB
            assert size >= _MIB
            with log.subscribe() as late:
                received = _lines(0, 6 * _MIB)
                received = received[:begin] + received[begin + size :]
                assert _read(late) == (received, [(begin, size)], size)
            log.remove()


def test_disk_that_other_programs_fill_costs_a_log_no_more_than_its_tail() -> None:
    """What the log gives back may be taken by others at once; the log still ends, and tells."""
    with small_file_system("8m") as disk, OutputDirectory(disk / "o", reserve_bytes=0) as home:
        log = home.make_log(ABSENT)
        log.append(_lines(0, 2 * _MIB))
        done = threading.Event()

        def fill() -> None:
            with open(disk / "filler", "wb", buffering=0) as filler:
                while not done.is_set():
                    try:
                        filler.write(bytes(64 * _KIB))
                    except OSError:
                        continue

        with ThreadPoolExecutor(1) as pool:
            filling = pool.submit(fill)
            whole = _lines(0, 16 * _MIB)
            for at in range(2 * _MIB, 16 * _MIB, 64 * _KIB):
                log.append(whole[at : at + 64 * _KIB])
            done.set()
            filling.result(GUARD_S)
        log.complete()
        begin, size = log.gap or (0, 0)
        assert begin >= _MIB
        with log.subscribe() as late:
            received, _, missed = _read(late)
        assert (missed, log.size) == (size, len(received))
        assert received == whole[:begin] + whole[begin + size :]
        log.remove()


def test_hole_gives_blocks_back_and_changes_nothing_else(tmp_path: Path) -> None:
    """Two adjacent holes with a border inside of a block free that block, too."""
    path = tmp_path / "file"
    whole = os.urandom(_MIB)
    path.write_bytes(whole)
    fd = os.open(path, os.O_RDWR)
    assert holes.can_punch(fd)
    before = _on_disk(path)
    holes.punch(fd, 100_000, 300_001, hole_begin=100_000)
    holes.punch(fd, 300_001, 500_000, hole_begin=100_000)
    os.close(fd)
    assert path.read_bytes() == whole[:100_000] + bytes(400_000) + whole[500_000:]
    assert before - _on_disk(path) >= 400_000 - 2 * 4096


def test_no_holes_in_what_is_no_file() -> None:
    """`can_punch` is False for a pipe and does not raise."""
    read, write = os.pipe()
    assert not holes.can_punch(write)
    os.close(read)
    os.close(write)


def test_blocks_are_gone_for_other_programs_too(log: OutputLog, tmp_path: Path) -> None:
    """`du` counts what the ceiling allows."""
    log.append(_lines(0, 8 * _MIB))
    answer = subprocess.run(
        ["du", "-k", str(tmp_path / "job.out")], capture_output=True, text=True, check=True
    )
    assert int(answer.stdout.split()[0]) <= 1024 + 128
