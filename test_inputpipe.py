"""Tests of the pipe that is a job's stdin, and of how its count survives the process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inputpipe import InputPipe
from testkit import descriptors_of

_HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("is_kept", [False, True])
def test_bytes_are_counted_as_the_pipe_takes_them(*, is_kept: bool) -> None:
    """A full pipe takes no more until somebody reads; then every byte comes in order."""
    before = descriptors_of()
    pipe = InputPipe.make(is_kept=is_kept)
    data = memoryview(os.urandom(300_000))
    got = b""
    assert pipe.write(data[:1]) == 1
    while pipe.size < len(data):
        try:
            pipe.write(data[pipe.size :])
        except BlockingIOError:
            got += os.read(pipe.read_fd, 10_000)
    fd = os.dup(pipe.read_fd)
    pipe.close()
    pipe.close()
    pipe.begin()
    while more := os.read(fd, 65536):
        got += more
    os.close(fd)
    assert got == data
    assert descriptors_of() == before


def test_another_process_goes_on_where_the_pipe_is() -> None:
    """The count is that of all processes together, and the end is seen when all have closed it."""
    first = InputPipe.make(is_kept=True)
    first.write(memoryview(b"hello "))
    second = InputPipe.adopt([os.dup(fd) for fd in first.kept_fds])
    first.close()
    assert second.size == 6
    second.write(memoryview(b"world"))
    counter_fd = os.dup(second.kept_fds[0])
    second.close()
    assert os.read(first.read_fd, 100) == b"hello world"
    assert os.read(first.read_fd, 100) == b""
    ended = InputPipe.adopt([counter_fd])
    assert (ended.size, ended.fd) == (11, -1)
    ended.close()
    first.begin()


def test_count_is_right_where_splice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a filter of system calls."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    pipe = InputPipe.make(is_kept=True)
    with monkeypatch.context() as patch:
        patch.setattr("os.splice", refuse)
        pipe.write(memoryview(b"hello "))
    pipe.write(memoryview(b"world"))
    assert os.lseek(pipe.kept_fds[0], 0, os.SEEK_CUR) == 11
    assert os.read(pipe.read_fd, 100) == b"hello world"
    pipe.begin()
    with pytest.raises(BrokenPipeError):
        pipe.write(memoryview(b"x"))
    assert pipe.size == 11
    pipe.close()


_WRITES = """
import sys
from inputpipe import InputPipe
pipe, i = InputPipe.adopt([int(sys.argv[1]), int(sys.argv[2])]), 0
while True:
    pipe.write(memoryview(f"{i}\\n".encode()))
    i += 1
"""


@pytest.mark.parametrize("number", range(5))
def test_count_is_exact_after_a_kill(number: int) -> None:
    """Whatever the process was doing at that moment."""
    pipe = InputPipe.make(is_kept=True)
    os.set_blocking(pipe.fd, True)
    command = [sys.executable, "-S", "-c", _WRITES, *map(str, pipe.kept_fds)]
    got = b""
    with subprocess.Popen(command, cwd=_HERE, pass_fds=pipe.kept_fds) as process:
        while len(got) < 1000 * (number + 1):
            got += os.read(pipe.read_fd, 4096)
        process.kill()
    rest = InputPipe.adopt([os.dup(fd) for fd in pipe.kept_fds])
    rest.write(memoryview(b"."))
    rest.close()
    pipe.close()
    while more := os.read(pipe.read_fd, 65536):
        got += more
    assert rest.size == len(got)
    expected = "".join(f"{i}\n" for i in range(len(got))).encode()
    assert got[:-1] == expected[: len(got) - 1]
    pipe.begin()
