"""Tests of the record of logouts: real files, real limits of the kernel."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from revocations import RevocationError, Revocations, RunningTime
from testkit import GUARD_S, NOBODY, Clock, small_file_system
from trustedfiles import UntrustedFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Running times. That of a test begins with 0.
_LATER = 1000
_EARLIER = 0
_IDS = [str(uuid.UUID(int=number)) for number in range(40)]


def _line(token_id: str, ends_s: int = _LATER) -> str:
    return f"{token_id} {ends_s}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "revoked"


@pytest.fixture
def kept(path: Path) -> Iterator[Revocations]:
    with Revocations(path) as revocations:
        yield revocations


@contextmanager
def _full_disk(size: int) -> Iterator[None]:
    """Limit the size of all files of this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_revoked_token_is_in_the_file_when_add_returns(path: Path, kept: Revocations) -> None:
    """The file is private, and has a line of the documented form for each token."""
    assert path.read_bytes() == b""
    kept.add(_IDS[0], _LATER)
    kept.add(_IDS[1], _LATER)
    assert path.read_text() == _line(_IDS[0]) + _line(_IDS[1])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [token_id in kept for token_id in _IDS[:3]] == [True, True, False]


def test_revocation_survives_a_process_that_is_killed(path: Path) -> None:
    """After `add` has returned, a kill of the process changes nothing."""
    program = (
        "import os, sys\nfrom revocations import Revocations\n"
        "revocations = Revocations(sys.argv[1])\n"
        "revocations.add(sys.argv[2], int(sys.argv[3]))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    arguments = [str(path), _IDS[0], str(_LATER)]
    ended = subprocess.run(  # -S: nothing but the standard library is needed
        [sys.executable, "-S", "-c", program, *arguments],
        cwd=os.path.dirname(__file__),
        timeout=GUARD_S,
        check=False,
    )
    assert ended.returncode == -9
    with Revocations(path) as again:
        assert _IDS[0] in again


def test_line_is_on_the_disk_before_the_logout_is_answered(
    kept: Revocations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is: memory, one write of the whole line, fsync of the file, the answer."""
    write, fsync = os.write, os.fsync
    calls: list[tuple[object, ...]] = []

    def spy_write(fd: int, data: bytes) -> int:
        calls.append(("write", fd, data))
        return write(fd, data)

    def spy_fsync(fd: int) -> None:
        calls.append(("fsync", fd, _IDS[0] in kept))
        fsync(fd)

    monkeypatch.setattr(os, "write", spy_write)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    kept.add(_IDS[0], _LATER)
    assert calls == [
        ("write", kept._fd, _line(_IDS[0]).encode()),
        ("fsync", kept._fd, True),
    ]


@pytest.mark.parametrize("text", ["", _line(_IDS[0], _EARLIER)])
def test_new_file_is_in_its_directory_on_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A crash of the machine does not remove the new or rewritten file."""
    fsync = os.fsync
    synced: list[tuple[os.stat_result, int]] = []

    def spy(fd: int) -> None:
        synced.append((os.fstat(fd), path.stat().st_ino if path.exists() else 0))
        fsync(fd)

    path.write_text(text)
    if not text:
        path.unlink()
    monkeypatch.setattr(os, "fsync", spy)
    Revocations(path).close()
    directory, inode = synced[-1]
    assert os.path.samestat(directory, path.parent.stat())
    assert inode == path.stat().st_ino


def test_token_is_recorded_once(path: Path, kept: Revocations) -> None:
    """A second logout changes nothing, also after a restart."""
    for _ in range(3):
        kept.add(_IDS[0], _LATER)
    with Revocations(path) as again:
        again.add(_IDS[0], _LATER)
    assert path.read_text() == _line(_IDS[0])


def test_all_who_log_out_at_once_get_a_line_each(path: Path, kept: Revocations) -> None:
    """Lines do not mix. A token that is logged out several times has one line."""
    barrier = threading.Barrier(8)

    def add(index: int) -> None:
        barrier.wait(GUARD_S)
        for token_id in (_IDS[0], *_IDS[index::8]):
            kept.add(token_id, _LATER)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(map(_line, _IDS))
    assert all(token_id in kept for token_id in _IDS)


def test_nothing_is_opened_after_the_start(path: Path, kept: Revocations) -> None:
    """The file may be moved, and its directory closed to the process."""
    moved = path.with_name("moved")
    path.rename(moved)
    kept.add(_IDS[0], _LATER)
    assert moved.read_text() == _line(_IDS[0])
    assert not path.exists()


def test_in_memory_only_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Revocations(None)` forgets its tokens with the object."""
    monkeypatch.chdir(tmp_path)
    with Revocations(None) as revocations:
        revocations.add(_IDS[0], _LATER)
        assert _IDS[0] in revocations
    assert list(tmp_path.iterdir()) == []


# --- expiry -----------------------------------------------------------------------------


def test_what_has_expired_is_dropped_from_the_file_at_the_start(path: Path) -> None:
    """Other tokens stay, and new ones follow. The file is private, and no other file is left."""
    path.write_text(_line(_IDS[0]) + _line(_IDS[1], _EARLIER) + _line(_IDS[2]))
    with Revocations(path) as revocations:
        assert [token_id in revocations for token_id in _IDS[:3]] == [True, False, True]
        assert path.read_text() == _line(_IDS[0]) + _line(_IDS[2])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        revocations.add(_IDS[3], _LATER)
    assert path.read_text() == _line(_IDS[0]) + _line(_IDS[2]) + _line(_IDS[3])
    assert [entry.name for entry in path.parent.iterdir()] == ["revoked"]


def test_file_without_expired_lines_is_not_rewritten(path: Path) -> None:
    """It stays the same file, and becomes private."""
    path.write_text(_line(_IDS[0]))
    path.chmod(0o644)
    before = path.stat().st_ino
    with Revocations(path) as revocations:
        assert _IDS[0] in revocations
    after = path.stat()
    assert (after.st_ino, stat.S_IMODE(after.st_mode)) == (before, 0o600)


def test_left_over_of_a_broken_off_rewriting_is_replaced(path: Path) -> None:
    """A crash between write and rename does no harm."""
    path.write_text(_line(_IDS[0]) + _line(_IDS[1], _EARLIER))
    path.with_name("revoked.new").write_text("half a line" * 100)
    Revocations(path).close()
    assert path.read_text() == _line(_IDS[0])
    assert [entry.name for entry in path.parent.iterdir()] == ["revoked"]


def test_what_ends_meanwhile_is_dropped_from_memory(clock: Clock) -> None:
    """The next logout removes tokens that have ended by the running time from memory."""
    revocations = Revocations(None, RunningTime(clock=clock))
    revocations.add(_IDS[0], 1000)
    revocations.add(_IDS[1], 2000)
    revocations.add(_IDS[2], 500)
    clock.now += 1000
    revocations.add(_IDS[3], 3000)
    assert [token_id in revocations for token_id in _IDS[:4]] == [False, True, False, True]
    assert len(revocations._ends) == len(revocations._by_end) == 2


def test_logout_costs_the_same_however_many_there_were() -> None:
    """After 200,000 logouts, a logout takes less than 50 times as long as after none."""

    def measure(before: int) -> float:
        revocations = Revocations(None)
        for number in range(before):
            revocations.add(str(number), _LATER)
        start = time.thread_time()
        for number in range(200):
            revocations.add(f"new {number}", _LATER)
        return time.thread_time() - start

    assert measure(200_000) < 50 * measure(0)


# --- the running time -------------------------------------------------------------------


def test_running_time_goes_on_over_restarts(path: Path, clock: Clock) -> None:
    """Time in which the server does not run does not count."""
    with RunningTime(path, clock=clock) as running:
        assert running.now_s() == 0
        clock.now += 100
        assert running.now_s() == 100
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    clock.now += 5000
    with RunningTime(path, clock=clock) as running:
        assert running.now_s() == 100
        clock.now += 11
        running.save()
    clock.now = 5  # the machine has booted
    again = RunningTime(path, clock=clock)
    assert again.now_s() == 111
    again.close()
    again.close()


def test_running_time_knows_nothing_of_the_wall_clock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the clock, forward or back, changes nothing."""
    with RunningTime(path) as running:
        for wall in (0.0, 1e12):
            monkeypatch.setattr(time, "time", lambda wall=wall: wall)
            assert running.now_s() < GUARD_S


@pytest.mark.parametrize("text", ["x", "12\n", "-00000000001\n", "000000000001\n1"])
def test_damaged_running_time_is_an_error(path: Path, text: str) -> None:
    """The message says what to do."""
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"not the server's running time.*restore"):
        RunningTime(path)


def test_running_time_that_cannot_be_written_stops_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged."""
    with RunningTime(path) as running, _full_disk(0):
        running.save()
    assert "the running time cannot be written: File too large" in caplog.text


# --- damage and full disks --------------------------------------------------------------


@pytest.mark.parametrize("torn", [_line(_IDS[1])[:-1], _line(_IDS[1])[:20], "\0\0\0", "\ufffd"])
def test_torn_last_line_is_dropped(path: Path, torn: str) -> None:
    """The machine went down during that logout, and nobody got a confirmation."""
    path.write_text(_line(_IDS[0]) + torn)
    with Revocations(path) as revocations:
        assert [token_id in revocations for token_id in _IDS[:2]] == [True, False]
        revocations.add(_IDS[2], _LATER)
    assert path.read_text() == _line(_IDS[0]) + _line(_IDS[2])


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        _IDS[1].encode(),
        f"{_IDS[1]} soon".encode(),
        f"{_IDS[1]} -1".encode(),
        f"{_IDS[1]}  1".encode(),
        f"{_IDS[1]} {'1' * 5000}".encode(),
        f"{_IDS[1].upper()}G 1".encode(),
        f" {_IDS[1]} 1".encode(),
        f"{_IDS[1]} ١".encode(),  # noqa: RUF001 -- a digit, but not one of ours
    ],
)
def test_damaged_file_is_an_error_that_names_the_line(path: Path, line: bytes) -> None:
    """No logout is forgotten silently. The file is left unchanged."""
    data = _line(_IDS[0]).encode() + line + b"\n" + _line(_IDS[2]).encode()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path}, line 2: not TOKEN_ID ENDS_S; restore"):
        Revocations(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("room", [0, 10])
def test_logout_on_a_full_disk_works_and_is_written_later(
    path: Path, kept: Revocations, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A half line is removed again. A loud line says that a restart makes the tokens valid."""
    kept.add(_IDS[0], _LATER)
    with _full_disk(path.stat().st_size + room):
        kept.add(_IDS[1], _LATER)
        kept.add(_IDS[2], _LATER)
        assert path.read_text() == _line(_IDS[0])
    assert [token_id in kept for token_id in _IDS[:3]] == [True] * 3
    assert [record.levelname for record in caplog.records] == ["CRITICAL"] * 2
    reason = "No space left on device" if room else "File too large"
    assert f"2 LOGOUTS ARE NOT ON THE DISK: {reason}." in caplog.text
    kept.write()
    assert path.read_text() == "".join(map(_line, _IDS[:3]))
    kept.write()
    kept.add(_IDS[3], _LATER)
    assert path.read_text() == "".join(map(_line, _IDS[:4]))


def test_unwritten_logouts_are_tried_again_at_the_next_and_at_the_end(path: Path) -> None:
    """The file has each of them once."""
    with Revocations(path) as kept:
        with _full_disk(0):
            kept.add(_IDS[0], _LATER)
        kept.add(_IDS[1], _LATER)
        assert path.read_text() == _line(_IDS[0]) + _line(_IDS[1])
        with _full_disk(0):
            kept.add(_IDS[2], _LATER)
    assert path.read_text() == "".join(map(_line, _IDS[:3]))


def test_logout_that_the_disk_does_not_confirm_is_tried_again(
    path: Path, kept: Revocations, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a failed fsync nothing of it is in the file."""

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error", str(fd))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        kept.add(_IDS[0], _LATER)
    assert "1 LOGOUTS ARE NOT ON THE DISK: Input/output error" in caplog.text
    assert _IDS[0] in kept
    assert path.read_bytes() == b""
    kept.write()
    assert path.read_text() == _line(_IDS[0])


def test_tokens_that_have_ended_do_not_prevent_a_start_on_a_full_disk(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The file stays as it is; a torn last line is cut off without any room."""
    with small_file_system("64k") as disk:
        path = disk / "revoked"
        path.touch(0o600)
        path.write_text(_line(_IDS[0]) + _line(_IDS[1], _EARLIER) + "half a li")
        with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(b" ")
        with Revocations(path) as revocations:
            assert [token_id in revocations for token_id in _IDS[:2]] == [True, False]
        assert path.read_text() == _line(_IDS[0]) + _line(_IDS[1], _EARLIER)
        assert sorted(os.listdir(disk)) == ["filler", "revoked"]
    assert "keeps tokens that have ended" in caplog.text


def test_closed_record_takes_no_logout(path: Path) -> None:
    """A logout after `close` is an error. A second `close` is not."""
    revocations = Revocations(path)
    revocations.add(_IDS[0], _LATER)
    revocations.close()
    revocations.close()
    with pytest.raises(RevocationError):
        revocations.add(_IDS[1], _LATER)
    assert [token_id in revocations for token_id in _IDS[:2]] == [True, False]


def test_record_cannot_be_made_where_there_is_no_directory(tmp_path: Path) -> None:
    """A missing directory is an OSError."""
    with pytest.raises(FileNotFoundError):
        Revocations(tmp_path / "absent" / "revoked")


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_not_a_regular_file_is_refused_at_once(
    path: Path, tmp_path: Path, kind: str
) -> None:
    """The target of a link stays unchanged; nothing waits for the other end of a FIFO."""
    target = tmp_path / "target"
    target.touch()
    {"link": lambda: path.symlink_to(target), "fifo": lambda: os.mkfifo(path)}.get(
        kind, path.mkdir
    )()
    for make in (Revocations, RunningTime):
        with pytest.raises(UntrustedFileError, match="is not a regular file"):
            make(path)


@pytest.mark.parametrize("make", [Revocations, RunningTime])
def test_file_that_others_may_change_is_refused(path: Path, make: Callable[[Path], object]) -> None:
    """Or one that belongs to somebody else."""
    path.touch(0o600)
    path.chmod(0o622)
    with pytest.raises(UntrustedFileError, match=f"chmod 600 {path}"):
        make(path)
    path.chmod(0o600)
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(UntrustedFileError, match=f"{path} belongs to uid {NOBODY}"):
        make(path)
