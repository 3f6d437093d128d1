"""The store: what has to survive the process, in an SQLite database.

    with Store("state/store") as store:
        store.write([("INSERT INTO uids VALUES (?, ?)", [("alice", 70001)])], durable=True)
        store.query("SELECT uid FROM uids WHERE name = ?", ("alice",))

This module opens and locks the database, brings its schema up to date, and says what is wrong with
it. The modules that use a table have its SQL: `jobtable.py`, `accounts.py`, `revocations.py`,
`throttle.py`. `Store()` without a directory keeps everything in memory.

The directory has the file `store.db`, and beside it SQLite's `store.db-wal` and `store.db-shm`. All
three are open when the constructor returns. So the process may give up the right to open them. An
empty file `store.made` says that there was a database, if somebody deletes it.

What survives: a write that has returned survives the death of the process, however it died. A
`durable` write also survives a power loss, because SQLite waits for the disk (some ms). After a
power loss the other writes of the last moments may be missing, the latest ones first; the database
is whole. This is `synchronous=NORMAL` and `FULL` of SQLite's WAL mode.

Thread safety: any thread may call anything. There is one connection, which a lock guards, so calls
wait for each other.

Sources: sqlite.org: wal.html, pragma.html, fileformat2.html (the magic numbers of the header).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import stat
import threading
import uuid
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    Values = Sequence[Any] | Mapping[str, Any]

__all__ = ["NAME", "Store", "back_up", "reading"]

NAME = "store.db"
"""The name of the database in the store's directory."""

_MADE = "store.made"

_APPLICATION = 0x4A6F6257  # "JobW": in the header of each of our databases

# What brings a database from each version of the schema to the next. A published line never
# changes: a new version is a new item.
_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE TABLE uids (name TEXT PRIMARY KEY, uid INTEGER NOT NULL UNIQUE) WITHOUT ROWID;
    CREATE TABLE revoked (token_id TEXT PRIMARY KEY, ends_s INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE failed_logins (
        what TEXT, who BLOB, count INTEGER NOT NULL, last_s REAL NOT NULL, PRIMARY KEY (what, who)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE jobs (
        position INTEGER PRIMARY KEY,
        job_id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        name TEXT NOT NULL,
        labels TEXT NOT NULL,
        status TEXT NOT NULL,
        started_us INTEGER NOT NULL,
        ended_us INTEGER,
        end_number INTEGER,
        output_bytes INTEGER NOT NULL DEFAULT 0,
        argv_bytes INTEGER NOT NULL,
        request_id TEXT,
        digest BLOB,
        start TEXT NOT NULL,
        finish TEXT,
        times BLOB
    );
    CREATE INDEX jobs_of_owner ON jobs (owner, position);
    CREATE INDEX jobs_by_end ON jobs (end_number) WHERE end_number IS NOT NULL;
    CREATE INDEX jobs_of_owner_by_end ON jobs (owner, end_number) WHERE end_number IS NOT NULL;
    CREATE UNIQUE INDEX jobs_of_request ON jobs (owner, request_id) WHERE request_id IS NOT NULL;
    """,
)

_CACHE_KIB = 512  # what SQLite may use for pages

_HEADER_BYTES = 100
_FULL_BYTES = 1024 * 1024  # with less free, a write that fails is taken for that of a full disk

_RESTORE = "restore it from a backup: docs/security.md, Backup"


class Store:
    """A database in `directory`, which is made with mode 0700; None: in memory.

    `may_be_new`: False if there must have been a database before; a missing one is an error then.
    One process at a time may have the directory. Raises `StoreError`, whose message has the remedy.
    Attribute: `instance_id`, a UUID that the database and its copies keep for ever.
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, *, may_be_new: bool = True
    ) -> None:
        # Guards the connection. Held while SQLite reads or writes the disk. No other lock is taken
        # while it is held.
        self._lock = threading.RLock()
        self._path = Path(directory, NAME) if directory is not None else None
        self.instance_id = str(uuid.uuid4())
        with contextlib.ExitStack() as undo:
            if self._path is None:
                self._connection = _connect(":memory:")
                undo.callback(self._connection.close)
                _migrate(self._connection)
                # It can be read until nobody has it: a worker tells of its jobs after its close.
                weakref.finalize(self, self._connection.close)
            else:
                undo.callback(os.close, _lock_directory(self._path.parent))
                with _explained(self._path):
                    if not os.path.lexists(self._path):
                        self._make(self._path, may_be_new=may_be_new)
                    self._connection = self._open(self._path)
                    undo.callback(self._connection.close)
            self._undo = undo.pop_all()

    def _make(self, path: Path, *, may_be_new: bool) -> None:
        """Make an empty database. It appears under its name when it is whole."""
        if not may_be_new or path.with_name(_MADE).exists():
            raise StoreError(
                f"{path} is missing, but this place is not new: the store says which files belong "
                f"to which user, and who has logged out; {_RESTORE}. Without a backup use a new "
                "place, and uids that nobody has had",
                code=errno.ENOENT,
            )
        new = path.with_name(f"{NAME}.new")
        new.unlink(missing_ok=True)
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with contextlib.closing(_connect(str(new))) as connection:
            _migrate(connection)
            connection.execute("INSERT INTO facts VALUES ('instance_id', ?)", (str(uuid.uuid4()),))
        new.rename(path)
        path.with_name(_MADE).touch(0o600)
        _sync(path.parent)

    def _open(self, path: Path) -> sqlite3.Connection:
        """Open, check and migrate a database that exists."""
        _check_files(path)
        size = os.lstat(path).st_size
        if _is_truncated(path, size):
            raise StoreError(
                f"{path} is truncated: it has {size} bytes; {_RESTORE}", code=errno.EIO
            )
        with contextlib.ExitStack() as undo:
            connection = _connect(str(path))
            undo.callback(connection.close)
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if application != _APPLICATION:
                raise StoreError(
                    f"{path} is a database of another program; move it away, and {_RESTORE}"
                )
            if version > len(_MIGRATIONS):
                raise StoreError(
                    f"{path} was written by a newer version of this program: its schema is "
                    f"{version}, and this version knows those up to {len(_MIGRATIONS)}; install "
                    f"the newer version again, or {_RESTORE}"
                )
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                raise StoreError(
                    f"{path}: its file system cannot keep a database that several processes use; "
                    "put the state directory on a local disk"
                )
            (finding,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if finding != "ok":
                raise StoreError(
                    f"{path} is damaged: {finding.splitlines()[-1]}; {_RESTORE}", code=errno.EIO
                )
            _migrate(connection)
            # This write opens the two other files. It fails if the disk is full or read-only.
            connection.execute(
                "INSERT INTO facts VALUES ('opened', 1) "
                "ON CONFLICT (name) DO UPDATE SET value = value + 1"
            )
            found = connection.execute("SELECT value FROM facts WHERE name = 'instance_id'")
            (self.instance_id,) = found.fetchone()
            undo.pop_all()
            return connection

    def query(self, sql: str, values: Values = ()) -> list[Any]:
        """Return the rows that a SELECT finds. Raises `StoreError`."""
        with self._lock, _explained(self._path):
            return self._connection.execute(sql, values).fetchall()

    def execute(self, sql: str, values: Values = ()) -> None:
        """Write by one statement. Raises `StoreError`."""
        with self._lock, _explained(self._path):
            self._connection.execute(sql, values)

    def write(
        self, statements: Iterable[tuple[str, Iterable[Values]]], *, durable: bool = False
    ) -> None:
        """Execute each statement with each of its values: all of it, or nothing.

        Raises `StoreError`.
        """
        with (
            self._lock,
            _explained(self._path),
            self._synchronous_locked(durable),
            _transaction(self._connection),
        ):
            for sql, values in statements:
                self._connection.executemany(sql, values)

    def fact(self, name: str) -> Any:
        """Return a single value that is kept by name; None if there is none."""
        rows = self.query("SELECT value FROM facts WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def set_fact(self, name: str, value: int | str) -> None:
        """Keep a single value by name. Raises `StoreError`."""
        self.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    @property
    def is_kept(self) -> bool:
        """Whether it is on a disk, and not in memory."""
        return self._path is not None

    @contextlib.contextmanager
    def _synchronous_locked(self, durable: bool) -> Iterator[None]:
        """Within this context a commit waits for the disk if `durable`."""
        if not durable or self._path is None:
            yield
            return
        self._connection.execute("PRAGMA synchronous=FULL")
        try:
            yield
        finally:
            self._connection.execute("PRAGMA synchronous=NORMAL")

    def close(self) -> None:
        """Close the files, and let another process have the store; idempotent."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def reading(directory: str | os.PathLike[str]) -> Iterator[sqlite3.Connection]:
    """Within this context the database can be read, also while another process has it.

    Not for the process that has the `Store`: closing a file of the database would release the locks
    that SQLite has on it. Raises `StoreError`.
    """
    path = Path(directory, NAME)
    with _explained(path):
        if not path.exists():
            raise StoreError(
                f"{path} is missing; was the right state directory named?",
                code=errno.ENOENT,
            )
        # SQLite makes store.db-shm if it is missing, also for this connection.
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            yield connection


def back_up(directory: str | os.PathLike[str], target: Path) -> None:
    """Copy the database to the file `target`, also while another process has the store.

    The copy is the database of one moment, with mode 0600. `target` is replaced when the copy is
    whole and on the disk. Not for the process that has the `Store`. Raises `StoreError`.
    """
    with reading(directory) as source, _explained(target):
        _check_target(Path(directory), target)
        new = target.with_name(f".{target.name}.new")
        new.unlink(missing_ok=True)
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            with contextlib.closing(sqlite3.connect(new)) as copy:
                source.backup(copy)
            _sync(new)
            new.replace(target)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        _sync(target.absolute().parent)


def _check_target(directory: Path, target: Path) -> None:
    """Raise `StoreError` if a copy in the place of `target` would do harm; OSError."""
    remedy = "name another file, in a directory of backups"
    if target.exists() and (target.is_symlink() or not target.is_file()):
        # A device, for example: /dev/stdout would be a file from then on.
        raise StoreError(f"{target} is not a regular file; {remedy}", code=errno.EINVAL)
    if target.parent.exists() and target.parent.samefile(directory):
        raise StoreError(f"{target} would be among the files of the store; {remedy}")


def _connect(path: str) -> sqlite3.Connection:
    # No implicit transactions. Our lock takes the place of the check for the thread.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA temp_store=MEMORY")  # no file is opened later
        connection.execute("PRAGMA trusted_schema=OFF")
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema up to date; after an error it is as it was."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == len(_MIGRATIONS):
        return
    with _transaction(connection):
        for script in _MIGRATIONS[version:]:
            for statement in filter(str.strip, script.split(";")):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id={_APPLICATION}")
        connection.execute(f"PRAGMA user_version={len(_MIGRATIONS)}")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # some errors of the disk have ended it already
            connection.execute("ROLLBACK")
        raise


def _is_truncated(path: Path, size: int) -> bool:
    """Whether the file is shorter than its header says. Called before SQLite opens it."""
    if size == 0:  # SQLite would make a new database of it
        return True
    wal = path.with_name(f"{NAME}-wal")
    if wal.exists() and wal.stat().st_size:
        return False  # what is missing may be in there
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(b"SQLite format 3\0"):
        return False  # SQLite says what is wrong
    page_bytes, pages = int.from_bytes(header[16:18]), int.from_bytes(header[28:32])
    return size < pages * page_bytes


def _lock_directory(path: Path) -> int:
    """Make the directory if it is missing, and lock it; return a descriptor to be closed."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be used: {error.strerror}; use another directory", code=error.errno or 0
        ) from error
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        status = os.fstat(fd)
        if status.st_uid not in (0, os.geteuid()):
            raise StoreError(
                f"{path} belongs to uid {status.st_uid}, who could change the store; "
                "use another place",
                code=errno.EPERM,
            )
        if status.st_mode & 0o077:
            raise StoreError(f"others can enter {path}; run: chmod 700 {path}", code=errno.EPERM)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another process uses the store {path}; end it, or use another state directory",
                code=errno.EWOULDBLOCK,
            ) from None
        undo.pop_all()
    return fd


def _check_files(path: Path) -> None:
    """Raise `StoreError` unless all files of a database are regular, and ours or root's."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        file = Path(f"{path}{suffix}")
        try:
            status = os.lstat(file)
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(status.st_mode):  # SQLite would wait at a FIFO for ever
            raise StoreError(f"{file} is not a regular file; remove it, and {_RESTORE}")
        if status.st_uid not in (0, os.geteuid()):
            raise StoreError(
                f"{file} belongs to uid {status.st_uid}, who could have changed it; {_RESTORE}",
                code=errno.EPERM,
            )


def _sync(path: Path) -> None:
    """Make a file, or the names in a directory, survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _explained(path: Path | None) -> Iterator[None]:
    """Raise a `StoreError` with the remedy for each error of SQLite or of the file system."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explain(error, path or Path(":memory:")) from error
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror}; check who may use the directory", code=error.errno or 0
        ) from error


def _explain(error: sqlite3.Error, path: Path) -> StoreError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreError(
            f"{path} is damaged or truncated, or no database: {error}; {_RESTORE}", code=errno.EIO
        )
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _is_full(path.parent)):
        return StoreError(
            f"the store {path} cannot grow: the disk is full; make room on the disk of the state "
            "directory",
            code=errno.ENOSPC,
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StoreError(
            f"the store {path} cannot be written: {error}; check that its disk is not mounted "
            "read-only, and that its files belong to the user that starts this program",
            code=errno.EROFS,
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreError(
            f"the store {path} is locked by another program, like the command sqlite3; end it",
            code=errno.EBUSY,
        )
    if code == sqlite3.SQLITE_IOERR:
        return StoreError(
            f"the disk of the store {path} fails: {error}; see the kernel's log, and {_RESTORE}",
            code=errno.EIO,
        )
    return StoreError(f"the store {path} cannot be used: {error}", code=errno.EIO)


def _is_full(directory: Path) -> bool:
    with contextlib.suppress(OSError):  # this process may not walk the path any more
        disk = os.statvfs(directory)
        return disk.f_bavail * disk.f_frsize < _FULL_BYTES
    return False
