"""Tests of the audit log: real files, a full device, a real limit of the file size."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adminsocket import ask
from audit import AUDIT_FLAGS, AuditError, AuditLog
from client import Client, ClientError
from testkit import GUARD_S, clean_environment, descriptors_of, file_size_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HERE = Path(__file__).resolve().parent
_OTHER_UID = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


@pytest.fixture
def log(path: Path) -> Iterator[AuditLog]:
    log = AuditLog(lambda: _open(path))
    yield log
    log.close()


def _open(path: Path) -> int:
    return os.open(path, AUDIT_FLAGS, 0o600)


@contextlib.contextmanager
def _full_disk(log: AuditLog) -> Iterator[None]:
    """Put the device that is always full in place of the log's file: each write fails."""
    kept = os.dup(log._fd)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        os.dup2(full, log._fd, inheritable=False)
        yield
        os.dup2(kept, log._fd, inheritable=False)
    finally:
        os.close(full)
        os.close(kept)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _messages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


# --- a record ---------------------------------------------------------------------------


def test_record_is_a_line_with_the_time_and_the_fields_in_order(log: AuditLog, path: Path) -> None:
    """The time is UTC with microseconds; numbers, absent values and lists keep their types."""
    before = datetime.now(UTC)
    log.record(user="alice", job=None, code=7, argv=["ls", ""], empty=[])
    after = datetime.now(UTC)
    (line,) = path.read_text(encoding="ascii").splitlines()
    record = json.loads(line)
    assert list(record) == ["time", "user", "job", "code", "argv", "empty"]
    time = record.pop("time")
    assert record == {"user": "alice", "job": None, "code": 7, "argv": ["ls", ""], "empty": []}
    moment = datetime.fromisoformat(time)
    assert before <= moment <= after
    assert moment.utcoffset() == timedelta(0)
    assert len(time) == len("2026-11-24T00:01:15.123456+00:00")


def test_times_do_not_run_backwards(log: AuditLog, path: Path) -> None:
    """The lines of several threads are in the order of their times."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: log.record(n=n), range(400)))
    times = [record["time"] for record in _records(path)]
    assert len(times) == 400
    assert times == sorted(times)


# What can come out of UTF-8 and out of os.fsdecode.
_STRINGS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"]),
        st.sampled_from('\n\r\0\t\x1b\x7f\x85\x9b\u2028\u2029\u202e"\\{}'),
    )
)


@given(user=_STRINGS, argv=st.lists(_STRINGS), number=st.integers(), absent=st.none() | _STRINGS)
def test_any_strings_make_one_line_of_printable_ascii_and_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    user: str,
    argv: list[str],
    number: int,
    absent: str | None,
) -> None:
    """No text ends the line or contains a control character, and every text can be read back."""
    path = tmp_path_factory.getbasetemp() / "any-strings.log"
    path.unlink(missing_ok=True)
    log = AuditLog(lambda: _open(path))
    log.record(user=user, argv=argv, number=number, absent=absent)
    log.close()
    data = path.read_bytes()
    assert data.endswith(b"\n")
    assert all(0x20 <= byte <= 0x7E for byte in data[:-1])
    record = json.loads(data)
    assert (record["user"], record["argv"]) == (user, argv)
    assert (record["number"], record["absent"]) == (number, absent)


def test_forged_line_in_an_argument_stays_an_argument(log: AuditLog, path: Path) -> None:
    """A text that looks like the end of a record and the next record stays one string."""
    forged = '"]}\n{"time": "2026-01-01T00:00:00+00:00", "user": "admin"}\n\x1b[2J'
    log.record(user="mallory", argv=["echo", forged])
    (record,) = _records(path)
    assert record["user"] == "mallory"
    assert record["argv"] == ["echo", forged]


def test_longest_command_is_kept_whole(log: AuditLog, path: Path) -> None:
    """An argv of 128 KiB, every byte of it escaped, is one line with all of it."""
    argv = ["\x01" * 1023 + "\n"] * 128
    log.record(argv=argv)
    (record,) = _records(path)
    assert record["argv"] == argv
    assert path.stat().st_size > 6 * 128 * 1024


def test_what_is_not_json_is_a_programming_error_that_writes_nothing(
    log: AuditLog, path: Path
) -> None:
    """It does not count as a lost record, and the log continues."""
    value: Any = b"bytes"
    with pytest.raises(TypeError):
        log.record(user=value)
    log.record(user="alice")
    assert [record["user"] for record in _records(path)] == ["alice"]


# --- several threads, rotation -----------------------------------------------------------


def test_no_record_is_lost_torn_or_doubled_while_the_log_is_rotated(path: Path) -> None:
    """Eight threads write through twenty rotations; every record is in exactly one file."""
    log = AuditLog(lambda: _open(path))
    threads, each, rotations = 8, 500, 20
    written = threading.Semaphore(0)
    leave = threading.Semaphore(0)  # so that no rotation comes after the last record

    def write(thread: int) -> None:
        for n in range(each):
            assert leave.acquire(timeout=GUARD_S)
            log.record(id=f"{thread}-{n}", argv=["x" * (n % 50) * 100, "\n"])
            written.release()

    with ThreadPoolExecutor(threads) as pool:
        writers = [pool.submit(write, thread) for thread in range(threads)]
        portion = threads * each // rotations
        for rotation in range(rotations):
            leave.release(portion)
            # All but half a portion; that is written while the file is rotated.
            for _ in range(portion if rotation else portion // 2):
                assert written.acquire(timeout=GUARD_S)
            path.rename(f"{path}.{rotation}")
            log.reopen()
        for writer in writers:
            writer.result(GUARD_S)
    log.close()
    files = [path, *(Path(f"{path}.{rotation}") for rotation in range(rotations))]
    assert all(Path(f"{path}.{rotation}").stat().st_size for rotation in range(rotations))
    found = [record["id"] for file in files for record in _records(file)]
    assert sorted(found) == sorted(f"{t}-{n}" for t in range(threads) for n in range(each))


def test_records_go_to_the_renamed_file_until_the_log_is_reopened(
    log: AuditLog, path: Path, tmp_path: Path
) -> None:
    """No record is lost between `mv` and SIGHUP."""
    old = tmp_path / "audit.log.1"
    log.record(n=1)
    path.rename(old)
    log.record(n=2)
    assert not path.exists()
    log.reopen()
    log.record(n=3)
    assert [record["n"] for record in _records(old)] == [1, 2]
    assert [record["n"] for record in _records(path)] == [3]


def test_reopening_without_a_rename_goes_on_in_the_same_file(log: AuditLog, path: Path) -> None:
    """Nothing is overwritten."""
    log.record(n=1)
    log.reopen()
    log.record(n=2)
    assert [record["n"] for record in _records(path)] == [1, 2]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EMFILE, "?"), "the audit log cannot be opened: Too many open files"),
        (RuntimeError("no opener"), "no opener"),
    ],
)
def test_file_that_cannot_be_reopened_leaves_the_old_one_in_use(
    path: Path, caplog: pytest.LogCaptureFixture, error: Exception, reason: str
) -> None:
    """Any exception of the opener is logged. No record is lost. The next attempt may succeed."""
    openers: list[Callable[[], int]] = []
    log = AuditLog(lambda: openers.pop()() if openers else _open(path))

    def fail() -> int:
        raise error

    openers.append(fail)
    log.record(n=1)
    log.reopen()
    log.record(n=2)
    assert _messages(caplog) == [("ERROR", f"the audit log stays in the old file: {reason}")]
    log.reopen()
    log.record(n=3)
    log.close()
    assert [record["n"] for record in _records(path)] == [1, 2, 3]


def test_log_keeps_one_descriptor_however_often_it_is_reopened(path: Path) -> None:
    """A closed log has none, and `reopen` does not change that."""
    before = descriptors_of()
    log = AuditLog(lambda: _open(path))
    for _ in range(10):
        log.reopen()
    assert len(descriptors_of()) == len(before) + 1
    log.close()
    log.close()
    log.reopen()
    assert descriptors_of() == before


def test_record_after_the_close_is_one_that_cannot_be_written(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not reach another file that has got the same descriptor number."""
    logs = [AuditLog(lambda: _open(path), required=r) for r in (False, True)]
    for log in logs:
        log.close()
    other = os.open(path, os.O_WRONLY)
    logs[0].record(user="alice")
    with pytest.raises(AuditError):
        logs[1].record(user="alice")
    os.close(other)
    assert path.read_bytes() == b""
    assert [level for level, _ in _messages(caplog)] == ["ERROR", "ERROR"]


# --- a disk that is full ------------------------------------------------------------------


def test_outage_is_logged_once_and_its_end_with_the_number_of_lost_records(
    log: AuditLog, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The service continues. A second outage is logged again."""
    caplog.set_level(logging.INFO)
    log.record(n=1)
    with _full_disk(log):
        for n in (2, 3, 4):
            log.record(n=n)
    ((level, message),) = _messages(caplog)
    assert level == "ERROR"
    assert "No space left on device; records are lost" in message
    log.record(n=5)
    log.record(n=6)
    assert _messages(caplog)[1:] == [
        ("INFO", "the audit log can be written again; 3 records were lost")
    ]
    with _full_disk(log):
        log.record(n=7)
    assert [level for level, _ in _messages(caplog)] == ["ERROR", "INFO", "ERROR"]
    assert [record["n"] for record in _records(path)] == [1, 5, 6]


def test_outage_of_many_threads_is_logged_once_and_every_lost_record_counted(
    log: AuditLog, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Many threads notice the outage at the same time."""
    caplog.set_level(logging.INFO)
    with _full_disk(log), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: log.record(n=n), range(200)))
    log.record(n=200)
    (_, error), (_, info) = _messages(caplog)
    assert "cannot be written" in error
    assert "200 records" in info
    assert [record["n"] for record in _records(path)] == [200]


def test_required_log_refuses_every_record_it_cannot_write(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each refusal says why and what to do. The program's log has one line."""
    with AuditLog(lambda: _open(path), required=True) as log:
        with _full_disk(log):
            for _ in range(3):
                with pytest.raises(AuditError, match=r"No space left on device.*make room") as info:
                    log.record(user="alice", argv=["secret"])
                assert isinstance(info.value, OSError)
                assert "secret" not in str(info.value)
        log.record(user="alice")
    ((level, message),) = _messages(caplog)
    assert level == "ERROR"
    assert "calls are refused" in message
    assert [record["user"] for record in _records(path)] == ["alice"]


@pytest.mark.parametrize("required", [False, True])
def test_record_after_a_torn_one_begins_a_line_of_its_own(
    path: Path, caplog: pytest.LogCaptureFixture, required: bool
) -> None:
    """A disk can fill up within a record. That record counts as lost; all others are whole."""
    refused = []
    with AuditLog(lambda: _open(path), required=required) as log:

        def record(n: int) -> None:
            try:
                log.record(n=n, filling="x" * 300)
            except AuditError:
                refused.append(n)

        record(1)
        with file_size_limit(500):  # the second fits in part, the third not at all
            record(2)
            record(3)
        with file_size_limit(501):  # room for the new line that is missing, and for nothing else
            record(4)
            record(5)
        with file_size_limit(600):  # torn again
            record(6)
        record(7)
        record(8)
    whole, torn, torn_again, *rest = path.read_text().splitlines()
    assert [json.loads(line)["n"] for line in (whole, *rest)] == [1, 7, 8]
    for line, n in ((torn, 2), (torn_again, 6)):
        assert f'"n": {n}' in line
        assert not line.endswith("}")
    assert refused == ([2, 3, 4, 5, 6] if required else [])
    ((level, message),) = _messages(caplog)
    assert level == "ERROR"
    assert "only the beginning of a record could be written" in message


def test_torn_record_of_a_former_process_stays_alone_on_its_line(path: Path) -> None:
    """A record torn by an earlier server spoils no later record.

    Not even if the disk is still full when the next one starts.
    """
    with AuditLog(lambda: _open(path)) as log, file_size_limit(50):
        log.record(filling="x" * 100)
    with AuditLog(lambda: _open(path)) as log:
        with file_size_limit(50):
            log.record(n=1)
        log.record(n=2)
    with AuditLog(lambda: _open(path)) as log:  # now nothing is torn, so nothing is put between
        log.record(n=3)
    _, *rest = path.read_text().splitlines()
    assert [json.loads(line)["n"] for line in rest] == [2, 3]


@pytest.mark.parametrize("renamed", [False, True])
def test_torn_record_and_a_reopened_log_make_no_empty_line(
    log: AuditLog, path: Path, tmp_path: Path, renamed: bool
) -> None:
    """After a rotation during an outage the new file begins with a record."""
    with file_size_limit(50):
        log.record(filling="x" * 100)
    assert path.stat().st_size == 50
    if renamed:
        path.rename(tmp_path / "audit.log.1")
    log.reopen()
    log.record(n=1)
    lines = path.read_text().splitlines()
    assert len(lines) == (1 if renamed else 2)
    assert json.loads(lines[-1])["n"] == 1


# --- the file -----------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
def test_file_is_made_private_under_any_umask(path: Path, umask: int) -> None:
    """0600, and it can be opened again."""
    before = os.umask(umask)
    try:
        AuditLog(lambda: _open(path)).close()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o600
    AuditLog(lambda: _open(path)).close()


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o640, 0o620, 0o644, 0o666])
def test_file_that_others_may_read_or_write_is_refused(path: Path, mode: int) -> None:
    """Other users may have read or written it. The file is left unchanged."""
    path.write_text("{}")
    path.chmod(mode)
    with pytest.raises(AuditError, match=rf"mode {mode:04o}\); run: chmod 600"):
        AuditLog(lambda: _open(path))
    assert path.stat().st_mode & 0o7777 == mode
    assert path.read_text() == "{}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_file_of_somebody_else_is_refused(path: Path) -> None:
    """Its owner could change it."""
    path.touch(0o600)
    os.chown(path, _OTHER_UID, _OTHER_UID)
    with pytest.raises(AuditError, match=f"belongs to uid {_OTHER_UID}.*run: chown 0 "):
        AuditLog(lambda: _open(path))


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def _make_link(path: Path) -> None:
    target = path.with_name("target")
    target.touch(0o600)
    path.symlink_to(target)


_NOT_REGULAR: dict[str, Callable[[Path], object]] = {
    "symbolic link": _make_link,
    "dangling link": lambda path: path.symlink_to("absent"),
    "link to a device": lambda path: path.symlink_to("/dev/full"),
    "directory": lambda path: path.mkdir(),
    "FIFO": lambda path: os.mkfifo(path, 0o600),
    "socket": _make_socket,
}


@pytest.mark.parametrize("kind", _NOT_REGULAR)
def test_what_is_not_a_regular_file_is_refused_at_once(path: Path, kind: str) -> None:
    """A link is not followed. A FIFO is not waited for."""
    _NOT_REGULAR[kind](path)
    before = descriptors_of()
    with pytest.raises(AuditError, match="cannot be opened: it is not a regular file"):
        AuditLog(lambda: _open(path))
    assert descriptors_of() == before
    assert not path.with_name("absent").exists()


def test_fifo_that_somebody_reads_and_a_device_are_refused(path: Path) -> None:
    """They can be opened for writing, but keep no record."""
    os.mkfifo(path, 0o600)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(AuditError, match="not a regular file"):
            AuditLog(lambda: _open(path))
        with pytest.raises(AuditError, match="not a regular file"):
            AuditLog(lambda: _open(Path("/dev/null")))
    finally:
        os.close(reader)


def test_missing_directory_is_told(tmp_path: Path) -> None:
    """The `AuditError` has the path and the reason, and is one line."""
    with pytest.raises(AuditError, match=r"absent/audit\.log cannot be opened: No such file"):
        AuditLog(lambda: _open(tmp_path / "absent" / "audit.log"))


def test_log_only_appends_and_its_descriptor_is_not_inherited(path: Path) -> None:
    """The existing content stays."""
    path.touch(0o600)
    path.write_text("kept\n")
    with AuditLog(lambda: _open(path)) as log:
        assert not os.get_inheritable(log._fd)
        os.lseek(log._fd, 0, os.SEEK_SET)
        log.record(n=1)
    kept, line = path.read_text().splitlines()
    assert kept == "kept"
    assert json.loads(line)["n"] == 1


_GIVE_UP_RIGHTS = """
import os, socket, sys
from audit import AUDIT_FLAGS, AuditLog
path, uid = sys.argv[1], int(sys.argv[2])
opener = socket.socket(fileno=int(sys.argv[3]))
files = [os.open(path, AUDIT_FLAGS, 0o600)]
log = AuditLog(lambda: files.pop() if files else socket.recv_fds(opener, 1, 1)[1][0])
os.setresuid(uid, uid, uid)
log.record(n=1)
opener.send(b"1")
log.reopen()
log.record(n=2)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights")
def test_log_is_reopened_after_the_process_has_given_up_its_rights(path: Path) -> None:
    """The file still belongs to the first user, and another process opens it."""
    opener, theirs = socket.socketpair()
    with opener, theirs:
        argv = [
            sys.executable,
            "-c",
            _GIVE_UP_RIGHTS,
            str(path),
            str(_OTHER_UID),
            str(theirs.fileno()),
        ]
        with subprocess.Popen(argv, cwd=_HERE, pass_fds=[theirs.fileno()]) as server:
            theirs.close()
            assert opener.recv(1) == b"1"
            path.rename(f"{path}.1")
            fd = _open(path)
            socket.send_fds(opener, [b"!"], [fd])
            os.close(fd)
    assert server.returncode == 0
    assert [record["n"] for record in _records(Path(f"{path}.1"))] == [1]
    assert [record["n"] for record in _records(path)] == [2]


# --- streams ----------------------------------------------------------------------------


def _server_with_streams(
    certs: Path, state: Path, *options: str, journal: str = ""
) -> subprocess.Popen[str]:
    """Start a server whose stdout and stderr are pipes; `journal`: which of them is the journal."""
    code = """
import os, sys
if sys.argv[1]:
    status = os.fstat(int(sys.argv[1]))
    os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
    return subprocess.Popen(
        [
            *(sys.executable, "-c", code, journal, str(_HERE / "server.py")),
            *("--listen", "127.0.0.1:0", "--limits", "off", "--certs", str(certs)),
            *("--state-dir", str(state), *options),
        ],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("journal", ["", "1", "2"])
def test_records_go_to_stdout_or_to_the_journal(certs: Path, tmp_path: Path, journal: str) -> None:
    """In the journal with a priority that no other line has; a reload changes nothing."""
    where = "journal" if journal else "stdout"
    with _server_with_streams(
        certs, tmp_path / "state", "--audit-log", where, journal=journal
    ) as process:
        assert process.stdout
        address = process.stdout.readline().removeprefix("listening on ").strip()
        with Client(address, certs=certs) as client:
            client.login("user", "user")
            assert ask(tmp_path / "state", "reload") == {"problems": []}
            client.logout()
        process.terminate()
        stdout, stderr = process.communicate(timeout=GUARD_S)
    assert process.returncode == 0, stderr
    lines = (stderr if journal == "2" else stdout).splitlines()
    prefix = "<5>" if journal else ""
    records = [
        json.loads(line.removeprefix(prefix)) for line in lines if line.startswith(f"{prefix}{{")
    ]
    assert [record["rpc"].rpartition("/")[2] for record in records] == ["Login", "Logout"]
    assert not (tmp_path / "state" / "audit.log").exists()


def test_without_a_journal_the_error_says_what_to_do(certs: Path, tmp_path: Path) -> None:
    with _server_with_streams(certs, tmp_path / "state", "--audit-log", "journal") as process:
        _, stderr = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1
    assert "cannot be in the journal: neither stdout nor stderr" in stderr


def test_required_record_that_a_stream_does_not_take_refuses_the_call(
    certs: Path, tmp_path: Path
) -> None:
    """Whoever read the stream has gone."""
    options = ("--audit-log", "stdout", "--audit-required")
    with _server_with_streams(certs, tmp_path / "state", *options) as process:
        assert process.stdout
        address = process.stdout.readline().removeprefix("listening on ").strip()
        process.stdout.close()
        with (
            Client(address, certs=certs) as client,
            pytest.raises(ClientError, match="the audit log cannot be written"),
        ):
            client.login("user", "user")
        process.terminate()
        assert process.stderr
        assert "Broken pipe; calls are refused until it can be. See what" in process.stderr.read()


@pytest.mark.parametrize("name", ["absent/audit.log", "file/audit.log", "directory"])
def test_path_that_cannot_be_the_log_names_the_remedy(tmp_path: Path, name: str) -> None:
    """Nothing of the system's own form appears, like `[Errno 2]`."""
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(AuditError) as caught:
        AuditLog(lambda: _open(tmp_path / name))
    assert "; name a file in a directory that exists and belongs" in str(caught.value)
    assert "Errno" not in str(caught.value)
