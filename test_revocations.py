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
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from revocations import RevocationError, Revocations
from testkit import GUARD_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LATER = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
_EARLIER = _LATER - timedelta(days=2)
_IDS = [str(uuid.UUID(int=number)) for number in range(40)]


def _line(token_id: str, expires_at: datetime = _LATER) -> str:
    return f"{token_id} {int(expires_at.timestamp())}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "revoked"


@pytest.fixture
def kept(path: Path) -> Iterator[Revocations]:
    with Revocations(path) as revocations:
        yield revocations


@contextmanager
def _full_disk(size: int) -> Iterator[None]:
    """No file of ours may grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_revoked_token_is_in_the_file_when_add_returns(path: Path, kept: Revocations) -> None:
    """One line each, in the documented form, private; other tokens are not in it."""
    assert path.read_bytes() == b""
    kept.add(_IDS[0], _LATER)
    kept.add(_IDS[1], _LATER)
    assert path.read_text() == _line(_IDS[0]) + _line(_IDS[1])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [token_id in kept for token_id in _IDS[:3]] == [True, True, False]


def test_revocation_survives_a_process_that_is_killed(path: Path) -> None:
    """What `add` returned from is there, however the process ends."""
    program = (
        "import os, sys\nfrom datetime import UTC, datetime\nfrom revocations import Revocations\n"
        "revocations = Revocations(sys.argv[1])\n"
        "revocations.add(sys.argv[2], datetime.fromtimestamp(int(sys.argv[3]), UTC))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    arguments = [str(path), _IDS[0], str(int(_LATER.timestamp()))]
    ended = subprocess.run(  # -S: nothing but the standard library is needed
        [sys.executable, "-S", "-c", program, *arguments],
        cwd=os.path.dirname(__file__),
        timeout=GUARD_S,
        check=False,
    )
    assert ended.returncode == -9
    with Revocations(path) as again:
        assert _IDS[0] in again


def test_line_is_on_the_disk_before_the_token_counts_as_revoked(
    kept: Revocations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One write of one whole line, then fsync of the same file, then memory."""
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
        ("fsync", kept._fd, False),
    ]
    assert _IDS[0] in kept


@pytest.mark.parametrize("text", ["", _line(_IDS[0], _EARLIER)])
def test_new_file_is_in_its_directory_on_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A crash does not take away the file itself, made or rewritten, with what is added later."""
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
    """A second logout changes nothing, in the same process and after a restart."""
    for _ in range(3):
        kept.add(_IDS[0], _LATER)
    with Revocations(path) as again:
        again.add(_IDS[0], _LATER)
    assert path.read_text() == _line(_IDS[0])


def test_all_who_log_out_at_once_get_a_line_each(path: Path, kept: Revocations) -> None:
    """Lines do not mix, and whoever logs out several times has one."""
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
    """The file may be moved, and its directory closed to the process: the descriptor remains."""
    moved = path.with_name("moved")
    path.rename(moved)
    kept.add(_IDS[0], _LATER)
    assert moved.read_text() == _line(_IDS[0])
    assert not path.exists()


def test_in_memory_only_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Revocations(None)` revokes for as long as it lives."""
    monkeypatch.chdir(tmp_path)
    with Revocations(None) as revocations:
        revocations.add(_IDS[0], _LATER)
        assert _IDS[0] in revocations
    assert list(tmp_path.iterdir()) == []


# --- expiry -----------------------------------------------------------------------------


def test_what_has_expired_is_dropped_from_the_file_at_the_start(path: Path) -> None:
    """The rest stays, private, and what is added comes after it; nothing else is left there."""
    path.write_text(_line(_IDS[0]) + _line(_IDS[1], _EARLIER) + _line(_IDS[2]))
    with Revocations(path) as revocations:
        assert [token_id in revocations for token_id in _IDS[:3]] == [True, False, True]
        assert path.read_text() == _line(_IDS[0]) + _line(_IDS[2])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        revocations.add(_IDS[3], _LATER)
    assert path.read_text() == _line(_IDS[0]) + _line(_IDS[2]) + _line(_IDS[3])
    assert [entry.name for entry in path.parent.iterdir()] == ["revoked"]


def test_file_without_expired_lines_is_not_rewritten(path: Path) -> None:
    """It is the same file, with private permissions from now on."""
    path.write_text(_line(_IDS[0]))
    path.chmod(0o644)
    before = path.stat().st_ino
    with Revocations(path) as revocations:
        assert _IDS[0] in revocations
    after = path.stat()
    assert (after.st_ino, stat.S_IMODE(after.st_mode)) == (before, 0o600)


def test_left_over_of_a_broken_off_rewriting_is_replaced(path: Path) -> None:
    """A crash between writing and renaming does no harm."""
    path.write_text(_line(_IDS[0]) + _line(_IDS[1], _EARLIER))
    path.with_name("revoked.new").write_text("half a line" * 100)
    Revocations(path).close()
    assert path.read_text() == _line(_IDS[0])
    assert [entry.name for entry in path.parent.iterdir()] == ["revoked"]


def test_what_expires_meanwhile_is_dropped_from_memory(
    kept: Revocations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next logout makes room: memory holds live tokens only."""
    kept.add(_IDS[0], _LATER)
    kept.add(_IDS[1], _LATER + timedelta(days=1))
    monkeypatch.setattr(time, "time", _LATER.timestamp)
    kept.add(_IDS[2], _LATER + timedelta(days=2))
    assert [token_id in kept for token_id in _IDS[:3]] == [False, True, True]


# --- damage and full disks --------------------------------------------------------------


@pytest.mark.parametrize("torn", [_line(_IDS[1])[:-1], _line(_IDS[1])[:20], "\0\0\0", "\ufffd"])
def test_torn_last_line_is_dropped(path: Path, torn: str) -> None:
    """The machine went down during that logout, which nobody was told had succeeded."""
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
    """Logouts are not forgotten in silence, and the file is left as it is."""
    data = _line(_IDS[0]).encode() + line + b"\n" + _line(_IDS[2]).encode()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path}, line 2: not TOKEN_ID EXPIRES_AT; restore"):
        Revocations(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("room", [0, 10])
def test_token_stays_valid_when_the_disk_is_full(path: Path, kept: Revocations, room: int) -> None:
    """Nothing and half a line are the same; there is no rest of it, and the next one is whole."""
    kept.add(_IDS[0], _LATER)
    with (
        _full_disk(path.stat().st_size + room),
        pytest.raises(RevocationError, match=r"cannot be recorded .*still valid") as caught,
    ):
        kept.add(_IDS[1], _LATER)
    assert isinstance(caught.value, OSError)
    assert str(path) not in str(caught.value)
    assert _IDS[1] not in kept
    assert path.read_text() == _line(_IDS[0])
    kept.add(_IDS[1], _LATER)
    assert path.read_text() == _line(_IDS[0]) + _line(_IDS[1])


def test_token_stays_valid_when_the_disk_does_not_confirm(
    path: Path, kept: Revocations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed fsync is a failed logout."""

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error", str(fd))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RevocationError, match="Input/output error"):
            kept.add(_IDS[0], _LATER)
    assert _IDS[0] not in kept
    assert path.read_bytes() == b""


def test_closed_record_takes_no_logout(path: Path) -> None:
    """It is an error and not a logout that a restart forgets; closing twice is none."""
    revocations = Revocations(path)
    revocations.add(_IDS[0], _LATER)
    revocations.close()
    revocations.close()
    with pytest.raises(RevocationError):
        revocations.add(_IDS[1], _LATER)
    assert [token_id in revocations for token_id in _IDS[:2]] == [True, False]


def test_record_cannot_be_made_where_there_is_no_directory(tmp_path: Path) -> None:
    """The operator's mistake is an OSError."""
    with pytest.raises(FileNotFoundError):
        Revocations(tmp_path / "absent" / "revoked")


def test_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    """Nobody can have us write into another file."""
    target = tmp_path / "target"
    target.touch()
    path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        Revocations(path)
