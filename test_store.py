"""Tests of the store: what it keeps, and what it says about a database that it cannot use."""

from __future__ import annotations

import functools
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest

import store as store_module
from errors import StoreError
from store import NAME, Store, back_up, reading
from testkit import GUARD_S, NOBODY, descriptors_of, make_fifo, small_file_system

_HERE = Path(__file__).resolve().parent


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


def _names(store: Store) -> list[str]:
    return [name for (name,) in store.query("SELECT name FROM uids ORDER BY uid")]


def _add(store: Store, name: str, uid: int, *, durable: bool = False) -> None:
    store.write([("INSERT INTO uids VALUES (?, ?)", [(name, uid)])], durable=durable)


def _is_refused(directory: Path, problem: str) -> str:
    """Check that the store cannot be opened, twice; return the message."""
    before = descriptors_of()
    for _ in range(2):
        with pytest.raises(StoreError, match=problem) as caught:
            Store(directory)
    assert descriptors_of() == before
    return str(caught.value)


# --- what is kept -----------------------------------------------------------------------------


def test_store_keeps_what_was_written(directory: Path) -> None:
    """It has the same ID as before, and its files are private under any umask."""
    mask = os.umask(0)
    try:
        with Store(directory) as store:
            _add(store, "alice", 1)
            store.set_fact("number", 7)
            modes = [stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()]
            first = store.instance_id
    finally:
        os.umask(mask)
    assert modes == [0o600] * 4
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    with Store(directory) as store:
        assert (_names(store), store.fact("number"), store.fact("none")) == (["alice"], 7, None)
        assert store.instance_id == first


def test_store_in_memory_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is forgotten when it is closed."""
    monkeypatch.chdir(tmp_path)
    with Store() as store:
        _add(store, "alice", 1, durable=True)
        assert _names(store) == ["alice"]
        assert not store.is_kept
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("durable", [False, True])
def test_write_is_whole_or_not_at_all(directory: Path, durable: bool) -> None:
    """If the last of its statements fails, the first one has changed nothing."""
    with Store(directory) as store:
        with pytest.raises(StoreError, match="UNIQUE constraint failed"):
            store.write(
                [
                    ("INSERT INTO uids VALUES (?, ?)", [("alice", 1), ("bob", 2)]),
                    ("INSERT INTO uids VALUES (?, ?)", [("carol", 2)]),
                ],
                durable=durable,
            )
        assert _names(store) == []
        _add(store, "dave", 1)
        assert _names(store) == ["dave"]


def test_any_thread_may_write(directory: Path) -> None:
    """All writes are there, each once."""
    with Store(directory) as store:
        begin = threading.Barrier(8)

        def write(number: int) -> None:
            begin.wait(GUARD_S)
            for i in range(20):
                _add(store, f"{number}-{i}", number * 100 + i, durable=i % 5 == 0)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GUARD_S)
        assert len(_names(store)) == 160


_KILLED = """
import os, sys
from store import Store
store = Store(sys.argv[1])
print("open", flush=True)
i = 0
while True:
    store.write([("INSERT INTO uids VALUES (?, ?)", [(f"user{i}", i)])], durable=i % 10 == 0)
    os.write(1, b"%d\\n" % i)
    i += 1
"""


def test_write_that_has_returned_survives_sigkill(directory: Path) -> None:
    """Of what the killed process has confirmed nothing is lost, and no more than one is new."""
    program = [sys.executable, "-S", "-c", _KILLED, str(directory)]
    with subprocess.Popen(program, cwd=_HERE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(300):
            process.stdout.readline()
        process.kill()
        rest = process.stdout.read().splitlines()
    confirmed = int(rest[-1]) if rest else 298
    with Store(directory) as store:
        ((count,),) = store.query("SELECT count(*) FROM uids")
    assert confirmed + 1 <= count <= confirmed + 2


def test_copy_made_during_writes_is_a_whole_store(directory: Path, tmp_path: Path) -> None:
    """Like the disk after a power loss: the order of pages is lost, and nothing is half there.

    A file is copied before SQLite's log, so that the log is newer, as after fsync of the log alone.
    """
    done = threading.Event()
    with Store(directory) as store:
        _add(store, "first", 1_000_000, durable=True)

        def write() -> None:
            for i in range(0, 100_000, 2):
                pair = [(f"user{i}", i), (f"user{i + 1}", i + 1)]
                store.write([("INSERT INTO uids VALUES (?, ?)", pair)])
                if done.is_set():
                    return

        writer = threading.Thread(target=write)
        writer.start()
        copies = []
        for number in range(20):
            copy = tmp_path / f"copy{number}"
            copy.mkdir(0o700)
            begun = b""
            # Not if SQLite has begun its log anew meanwhile: on a disk, the file is written first.
            while not begun or begun != _generation(directory):
                begun = _generation(directory)
                for name in (NAME, f"{NAME}-wal"):
                    shutil.copy(directory / name, copy / name)
            copies.append(copy)
        done.set()
        writer.join(GUARD_S)
    for copy in copies:
        with Store(copy) as store:
            names = _names(store)
        assert "first" in names
        assert len(names) % 2 == 1  # both of a pair, or none


def _generation(directory: Path) -> bytes:
    """Return what differs in the log's header each time it begins anew (SQLite's file format)."""
    with (directory / f"{NAME}-wal").open("rb") as log:
        return log.read(32)


# --- moves ------------------------------------------------------------------------------------


def test_second_store_in_the_same_directory_is_refused(directory: Path) -> None:
    """Also one of another process. It can be opened when the first one is closed."""
    program = [sys.executable, "-c", "import sys, store; store.Store(sys.argv[1])", str(directory)]
    with Store(directory):
        _is_refused(directory, "another process uses the store .*; end it, or use another state")
        run = subprocess.run(program, cwd=_HERE, capture_output=True, check=False, timeout=GUARD_S)
        assert b"another process uses the store" in run.stderr
    Store(directory).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_store_is_used_by_a_process_that_can_no_longer_open_it(directory: Path) -> None:
    """All files are open from the start, also for a checkpoint, durable writes and the end."""
    program = """
import os, sys
from store import Store
store = Store(sys.argv[1])
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
try:
    os.listdir(sys.argv[1])
except PermissionError:
    for i in range(5000):
        store.write([("INSERT INTO uids VALUES (?, ?)", [(f"user{i}", i)])], durable=i % 500 == 0)
    store.write([("UPDATE uids SET uid = uid + 100000", [()])], durable=True)
    print(store.query("SELECT count(*) FROM uids ORDER BY uid"))
    store.close()
"""
    run = [sys.executable, "-S", "-c", program, str(directory)]
    output = subprocess.check_output(run, cwd=_HERE, text=True, timeout=GUARD_S)
    assert output == "[(5000,)]\n"
    with Store(directory) as store:
        assert store.query("SELECT count(*), min(uid) FROM uids") == [(5000, 100_000)]


def test_schema_of_an_earlier_version_is_brought_up_to_date(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From each version, with all that is in it; a failed step leaves it as it was."""
    versions = store_module._MIGRATIONS
    for version in range(1, len(versions) + 1):
        shutil.rmtree(directory, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "_MIGRATIONS", versions[:version])
            with Store(directory) as store:
                _add(store, "alice", 1)
                first = store.instance_id
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "_MIGRATIONS", (*versions, "CREATE TABLE x (y); nonsense"))
            _is_refused(directory, "syntax error")
        with Store(directory) as store:
            assert store.query("PRAGMA user_version") == [(len(versions),)]
            assert (_names(store), store.instance_id) == (["alice"], first)
            assert store.query("SELECT name FROM sqlite_master WHERE name = 'x'") == []


def test_store_can_be_read_while_it_is_written(directory: Path) -> None:
    """By another process; what it reads is whole, and the writer does not wait for it."""
    with Store(directory) as store:
        _add(store, "alice", 1)
        with reading(directory) as connection:
            connection.execute("BEGIN")
            assert connection.execute("SELECT count(*) FROM uids").fetchone() == (1,)
            _add(store, "bob", 2)
            assert connection.execute("SELECT count(*) FROM uids").fetchone() == (1,)
    with pytest.raises(StoreError, match="is missing; was the right state directory"):
        reading(directory / "none").__enter__()


def test_backup_of_a_store_that_is_written_is_one_moment_of_it(
    directory: Path, tmp_path: Path
) -> None:
    """It is private, replaces an older one at once, and can be opened where it is restored."""
    target = tmp_path / "backup.db"
    target.write_text("an older one")
    done = threading.Event()
    with Store(directory) as store:
        _add(store, "first", 1_000_000)

        def write() -> None:
            for i in range(0, 1_000_000, 2):
                pair = [(f"user{i}", i), (f"user{i + 1}", i + 1)]
                store.write([("INSERT INTO uids VALUES (?, ?)", pair)])
                if done.is_set():
                    return

        writer = threading.Thread(target=write)
        writer.start()
        # In another process, as closing the file in this one would release the store's locks.
        program = (
            "import sys, pathlib, store; store.back_up(sys.argv[1], pathlib.Path(sys.argv[2]))"
        )
        run = [sys.executable, "-c", program, str(directory), str(target)]
        for number in range(3):
            subprocess.run(run, cwd=_HERE, check=True, timeout=GUARD_S)
            restored = tmp_path / f"restored{number}"
            restored.mkdir(0o700)
            shutil.copy(target, restored / NAME)
            with Store(restored) as copy:
                names = _names(copy)
                assert copy.instance_id == store.instance_id
            assert "first" in names
            assert len(names) % 2 == 1
        done.set()
        writer.join(GUARD_S)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".new"] == []


def test_backup_that_fails_leaves_the_older_one(directory: Path, tmp_path: Path) -> None:
    """The error names the file."""
    with Store(directory) as store:
        store.write([("INSERT INTO uids VALUES (?, ?)", [(f"{i}", i) for i in range(10_000)])])
    with small_file_system("64k") as disk:
        (disk / "backup.db").write_text("an older one")
        with pytest.raises(StoreError, match=r"backup.db cannot grow: the disk is full"):
            back_up(directory, disk / "backup.db")
        assert [(path.name, path.read_text()) for path in disk.iterdir()] == [
            ("backup.db", "an older one")
        ]
    with pytest.raises(StoreError, match=r"none/backup.db: No such file or directory"):
        back_up(directory, tmp_path / "none" / "backup.db")


def test_backup_replaces_no_device_and_nothing_of_the_store(
    directory: Path, tmp_path: Path
) -> None:
    """`backup /dev/stdout` as root would make a file of it for everybody."""
    fifo = make_fifo(tmp_path / "fifo")
    link = tmp_path / "link"
    link.symlink_to(fifo)
    with Store(directory):
        for target in (fifo, link, tmp_path, Path(), Path("/")):
            with pytest.raises(StoreError, match="is not a regular file; name another file"):
                back_up(directory, target)
        (tmp_path / "other name").symlink_to(directory)
        for target in (directory / NAME, directory / "new", tmp_path / "other name" / NAME):
            with pytest.raises(StoreError, match="would be among the files of the store; name"):
                back_up(directory, target)
    assert fifo.is_fifo()


# --- damage -----------------------------------------------------------------------------------


def test_store_that_is_missing_from_an_old_directory_is_told(directory: Path) -> None:
    """A new one would give the uids of lost users to others."""
    with pytest.raises(StoreError, match="is missing, but this place is not new"):
        Store(directory, may_be_new=False)
    Store(directory).close()
    Store(directory, may_be_new=False).close()
    (directory / NAME).unlink()
    _is_refused(directory, "is missing, but this place is not new.*restore it from a backup")


@pytest.mark.parametrize("part", [0, 10, 100, 1000, 4096, 8192, -4096, -1])
def test_truncated_store_is_told(directory: Path, part: int) -> None:
    """At any place. The file is left as it is."""
    with Store(directory) as store:
        _add(store, "alice", 1)
    path = directory / NAME
    size = part if part >= 0 else path.stat().st_size + part
    os.truncate(path, size)
    _is_refused(directory, "truncated.*restore it from a backup: docs/security.md")
    assert path.stat().st_size == size


@pytest.mark.parametrize("page", range(12))
def test_damaged_page_is_told(directory: Path, page: int) -> None:
    """Each of the database; the error comes at the start and not in the middle of a call."""
    with Store(directory) as store:
        store.write([("INSERT INTO uids VALUES (?, ?)", [(f"user{i}", i) for i in range(500)])])
    with (directory / NAME).open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xa5" * 4096)
    _is_refused(directory, "damaged.*restore it from a backup: docs/security.md")


@pytest.mark.parametrize("application", [0, 1])
def test_database_of_another_program_is_told(directory: Path, application: int) -> None:
    """It is left as it is."""
    directory.mkdir(0o700)
    with closing(sqlite3.connect(directory / NAME)) as connection:
        connection.execute("CREATE TABLE uids (name, uid)")
        connection.execute(f"PRAGMA application_id={application}")
    before = (directory / NAME).read_bytes()
    _is_refused(directory, "is a database of another program; move it away, and restore")
    assert (directory / NAME).read_bytes() == before


def test_store_of_a_newer_version_is_told(directory: Path) -> None:
    """The error has both versions. Nothing is changed."""
    Store(directory).close()
    with closing(sqlite3.connect(directory / NAME)) as connection:
        connection.execute("PRAGMA user_version=99")
    message = _is_refused(directory, "was written by a newer version of this program: its schema")
    assert f"is 99, and this version knows those up to {len(store_module._MIGRATIONS)}" in message
    assert "install the newer version again" in message


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_store_without_room_is_told_and_works_again() -> None:
    """A write fails whole, reads go on, and later writes work. So does a start."""
    with small_file_system("512k") as disk:
        filler = disk / "filler"
        with Store(disk / "store") as store:
            _add(store, "alice", 1)
            _fill(filler)
            rows = [(f"user{i}", i + 2) for i in range(10_000)]
            with pytest.raises(StoreError, match="the disk is full; make room on the disk of the"):
                store.write([("INSERT INTO uids VALUES (?, ?)", rows)])
            assert _names(store) == ["alice"]
            filler.unlink()
            _add(store, "bob", 2)
            assert _names(store) == ["alice", "bob"]
        _fill(filler)
        _is_refused(disk / "store", "the disk is full; make room")
        filler.unlink()
        with Store(disk / "store") as store:
            assert _names(store) == ["alice", "bob"]


def test_store_on_a_read_only_disk_is_told() -> None:
    """The error says what to look at."""
    with small_file_system("512k") as disk:
        Store(disk / "store").close()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        _is_refused(disk / "store", "cannot be written: .*not mounted read-only")


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_not_a_regular_file_is_told_at_once(
    directory: Path, tmp_path: Path, kind: str
) -> None:
    """The target of a link stays unchanged; nothing waits for the other end of a FIFO."""
    directory.mkdir(0o700)
    (tmp_path / "target").touch()
    path = directory / NAME
    {"link": lambda: path.symlink_to(tmp_path / "target"), "fifo": lambda: os.mkfifo(path)}.get(
        kind, path.mkdir
    )()
    _is_refused(directory, "is not a regular file")
    assert (tmp_path / "target").read_bytes() == b""


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_other_file_that_is_not_regular_is_told_at_once(directory: Path, suffix: str) -> None:
    """SQLite opens a journal before the database is read, and would wait at a FIFO."""
    Store(directory).close()
    path = directory / f"{NAME}{suffix}"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    _is_refused(directory, f"{path} is not a regular file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("suffix", ["", "-journal"])
def test_file_of_somebody_else_is_refused(directory: Path, suffix: str) -> None:
    """Whoever owns it may have written what it says, or still have it open."""
    Store(directory).close()
    path = directory / f"{NAME}{suffix}"
    path.touch()
    os.chown(path, NOBODY, NOBODY)
    _is_refused(directory, f"{path} belongs to uid {NOBODY}")


def test_directory_that_others_can_enter_is_refused(directory: Path, tmp_path: Path) -> None:
    """Or one that belongs to somebody else, or is a link, or cannot be made."""
    directory.mkdir(0o700)
    directory.chmod(0o750)
    _is_refused(directory, f"others can enter .*; run: chmod 700 {directory}")
    link = tmp_path / "link"
    link.symlink_to(directory)
    _is_refused(link, "cannot be used: Not a directory")
    (tmp_path / "file").touch()
    _is_refused(
        tmp_path / "file" / "store", "cannot be used: Not a directory; use another directory"
    )
    if os.geteuid():
        pytest.skip("only root can give directories away")
    directory.chmod(0o700)
    os.chown(directory, NOBODY, NOBODY)
    _is_refused(directory, f"belongs to uid {NOBODY}, who could change the store")


def test_store_locked_by_another_program_is_told(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an administrator who has left the command sqlite3 in a transaction."""
    Store(directory).close()
    connect = functools.partial(sqlite3.connect, timeout=0)
    monkeypatch.setattr(sqlite3, "connect", connect)
    with closing(connect(directory / NAME, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="is locked by another program, like the command sql"):
            Store(directory)


def test_closed_store_says_so(directory: Path) -> None:
    """A late call of another thread gets an ordinary error. A second `close` is none."""
    store = Store(directory)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.fact("any")
