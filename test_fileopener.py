"""Tests of `fileopener.py`, with the real process. Those that need root are skipped without."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fileopener import FileOpener
from testkit import GUARD_S, descriptors_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
_LOG_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which has rights to keep")


@pytest.fixture
def named(tmp_path: Path) -> str:
    path = tmp_path / "named"
    path.write_text("named")
    (tmp_path / "secret").write_text("secret")
    return str(path)


@pytest.fixture
def log(tmp_path: Path) -> str:
    return str(tmp_path / "log")


@pytest.fixture
def opener(named: str, log: str) -> Iterator[FileOpener]:
    with FileOpener({named: os.O_RDONLY, log: _LOG_FLAGS}) as opener:
        yield opener


def _paths(named: str) -> list[str]:
    """Paths of other files, and other spellings of the named one."""
    directory, name = os.path.split(named)
    return [
        *("/etc/shadow", "/", "", ".", "..", name, f"./{name}", f"{directory}/secret"),
        *(f"{directory}/../{os.path.basename(directory)}/{name}", f"{directory}//{name}"),
        *(f"{named}/", f"/{named}", f"{directory}/./{name}", f"{named}\0", f"{named}/../secret"),
        *("/proc/self/environ", "/proc/self/fd/0"),
    ]


def test_only_the_named_files_are_opened(opener: FileOpener, named: str) -> None:
    """As they were named, character by character."""
    for path in _paths(named):
        with pytest.raises(PermissionError, match="not one of the server's files"):
            opener.open(path)
    with open(opener.open(named)) as file:
        assert file.read() == "named"


def test_process_refuses_what_the_server_must_not_ask_for(opener: FileOpener, named: str) -> None:
    """A server that was taken over speaks to the process without our check."""
    for path in filter(None, _paths(named)):
        opener._socket.send(b"1\0" + os.fsencode(path))
        answer, fds, _, _ = socket.recv_fds(opener._socket, 100, 1)
        assert (answer, fds) == (b"1 1", [])
    opener._socket.send(b"\xff" * 8192)
    assert opener._socket.recv(100) == b"\xff" * 20 + b" 1"
    with open(opener.open(named)) as file:
        assert file.read() == "named"


def test_files_are_opened_for_no_more_than_was_allowed(opener: FileOpener, named: str) -> None:
    """A file to be read cannot be written."""
    with open(opener.open(named)) as file, pytest.raises(OSError, match="Bad file descriptor"):
        os.write(file.fileno(), b"x")


def test_new_file_is_private_and_only_appended_to(opener: FileOpener, log: str) -> None:
    """As the flags say, which are not followed through a symbolic link either."""
    with open(opener.open(log), "ab", buffering=0) as file:
        file.write(b"line\n")
        os.pwrite(file.fileno(), b"LINE", 0)  # appends, because the file was opened for that
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(file.fileno(), 1)
    assert Path(log).read_bytes() == b"line\nLINE"
    assert stat.S_IMODE(Path(log).stat().st_mode) == 0o600
    os.unlink(log)
    os.symlink(Path(log).with_name("secret"), log)
    with pytest.raises(OSError, match="symbolic links"):
        opener.open(log)
    assert Path(log).with_name("secret").read_text() == "secret"


def test_missing_file_is_told_with_its_path(opener: FileOpener, named: str) -> None:
    """And found when it is there again."""
    os.rename(named, f"{named}.away")
    with pytest.raises(FileNotFoundError) as caught:
        opener.open(named)
    assert caught.value.filename == named
    os.rename(f"{named}.away", named)
    os.close(opener.open(named))


_DROPPED = """
import os, sys
from fileopener import FileOpener
import privileges
path, = sys.argv[1:]
with FileOpener({path: os.O_RDONLY}) as opener:
    privileges.become_ordinary_user(71_000)
    try:
        os.open(path, os.O_RDONLY)
    except PermissionError:
        print("refused", open(opener.open(path)).read())
"""


def test_rights_are_kept_that_the_server_gives_up(named: str) -> None:
    """A file of root that nobody else may read, in a directory that nobody else may enter."""
    os.chmod(named, 0o600)
    os.chmod(os.path.dirname(named), 0o700)
    output = subprocess.check_output(
        [sys.executable, "-c", _DROPPED, named], cwd=_HERE, timeout=GUARD_S, text=True
    )
    assert output == "refused named\n"


def test_process_has_one_capability_and_can_gain_none(opener: FileOpener, named: str) -> None:
    """CAP_DAC_OVERRIDE, to open any file; and it cannot be traced by jobs."""
    os.close(opener.open(named))  # it is set up
    status = Path(f"/proc/{opener._process.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 1 << 1
    assert int(fields["CapInh"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"].strip() == "1"
    assert Path(f"/proc/{opener._process.pid}/fd").stat().st_uid == 0  # not dumpable: of root


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_for_the_whole_service_does_not_end_the_process(
    opener: FileOpener, named: str, number: signal.Signals
) -> None:
    """The server ends it, when it does not need it any more."""
    os.close(opener.open(named))  # it is set up
    os.kill(opener._process.pid, number)
    os.close(opener.open(named))


def test_death_of_the_process_is_told(opener: FileOpener, named: str) -> None:
    """With what to do."""
    with open(os.pidfd_open(opener._process.pid)) as pidfd:
        os.kill(opener._process.pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], GUARD_S)[0]
    with pytest.raises(BrokenPipeError, match="has died; restart the server"):
        opener.open(named)


_OWNER = """
import os, signal
from fileopener import FileOpener
opener = FileOpener({"/": os.O_RDONLY})
os.close(opener.open("/"))
print(opener._process.pid, flush=True)
signal.pause()
"""


def test_process_ends_with_the_server_even_if_that_is_killed() -> None:
    """Its end of the socket is closed then."""
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER], cwd=_HERE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        pid = int(owner.stdout.readline())
        with open(os.pidfd_open(pid)) as pidfd:
            owner.kill()
            assert select.select([pidfd], [], [], GUARD_S)[0]


def test_close_is_idempotent_and_leaves_nothing(named: str) -> None:
    """Neither the process nor a descriptor."""
    before = descriptors_of()
    opener = FileOpener({named: os.O_RDONLY})
    os.close(opener.open(named))
    opener.close()
    opener.close()
    assert descriptors_of() == before
    with pytest.raises(ProcessLookupError):
        os.kill(opener._process.pid, 0)


def test_close_ends_a_request_that_a_stopped_process_does_not_answer(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the close nor the request waits for the process, which ends when it goes on."""
    opener = FileOpener({named: os.O_RDONLY})
    with open(os.pidfd_open(opener._process.pid)) as pidfd, ThreadPoolExecutor(1) as pool:
        os.kill(opener._process.pid, signal.SIGSTOP)
        asked, ask = threading.Event(), opener._ask

        def spy(path: str) -> tuple[int, list[int]]:
            asked.set()
            return ask(path)

        monkeypatch.setattr(opener, "_ask", spy)
        request = pool.submit(opener.open, named)
        assert asked.wait(GUARD_S)
        opener.close()
        with pytest.raises(BrokenPipeError):
            request.result(GUARD_S)
        os.kill(opener._process.pid, signal.SIGCONT)
        assert select.select([pidfd], [], [], GUARD_S)[0]
    opener.close()


def test_answer_that_comes_too_late_is_nobodys(
    named: str, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next request gets its own file."""
    monkeypatch.setattr("fileopener._ANSWER_S", 0.01)
    with FileOpener({named: os.O_RDONLY, log: _LOG_FLAGS}) as opener:
        os.kill(opener._process.pid, signal.SIGSTOP)
        for _ in range(2):
            with pytest.raises(TimeoutError, match="does not answer"):
                opener.open(log)
        os.kill(opener._process.pid, signal.SIGCONT)
        opener._socket.settimeout(GUARD_S)
        before = descriptors_of()
        with open(opener.open(named)) as file:
            assert file.read() == "named"
        assert descriptors_of() == before


def test_threads_get_the_file_that_each_asked_for(opener: FileOpener, named: str, log: str) -> None:
    """However their requests come in between each other."""
    Path(log).touch()
    wrong: list[str] = []

    def ask(path: str) -> None:
        for _ in range(200):
            fd = opener.open(path)
            if os.readlink(f"/proc/self/fd/{fd}") != path:
                wrong.append(path)
            os.close(fd)

    threads = [threading.Thread(target=ask, args=(path,)) for path in (named, log) * 4]
    with contextlib.ExitStack() as joined:
        for thread in threads:
            thread.start()
            joined.callback(thread.join)
    assert wrong == []
