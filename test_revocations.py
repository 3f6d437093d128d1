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
    """The order is: one write of the whole line, fsync of the file, then memory."""
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


def test_what_expires_meanwhile_is_dropped_from_memory(
    kept: Revocations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next logout removes expired tokens from memory."""
    kept.add(_IDS[0], _LATER)
    kept.add(_IDS[1], _LATER + timedelta(days=1))
    monkeypatch.setattr(time, "time", _LATER.timestamp)
    kept.add(_IDS[2], _LATER + timedelta(days=2))
    assert [token_id in kept for token_id in _IDS[:3]] == [False, True, True]


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
    with pytest.raises(ValueError, match=f"{path}, line 2: not TOKEN_ID EXPIRES_AT; restore"):
        Revocations(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("room", [0, 10])
def test_token_stays_valid_when_the_disk_is_full(path: Path, kept: Revocations, room: int) -> None:
    """A half line is removed again, and the next line is whole."""
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


def test_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    """The target of the link stays unchanged."""
    target = tmp_path / "target"
    target.touch()
    path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        Revocations(path)
