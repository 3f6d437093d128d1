"""Tests of the input of jobs, in the library: `Worker.start(stdin=True)` and `open_input`.

Every test runs with and without cgroups, and with both ways to fork.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import pytest

from inputpipe import InputPipe
from jobinput import JobInput
from testkit import GUARD_S, await_output, descriptors_of, make_fifo, settle_spares
from worker import (
    Enforcement,
    InputError,
    InputOffsetError,
    InputTakenError,
    Worker,
    WorkerError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PIPE_BYTES = 64 * 1024  # pipe(7)
_FOREVER = "exec sleep infinity"


@pytest.fixture(params=["off", "auto"])
def worker(request: pytest.FixtureRequest, way_to_fork: str) -> Iterator[Worker]:  # noqa: ARG001
    with Worker(enforcement=cast("Enforcement", request.param)) as worker:
        yield worker


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A FIFO that a job reads before it goes on."""
    return make_fifo(tmp_path / "fifo")


def _start(worker: Worker, script: str) -> str:
    return worker.start("sh", ["-c", script], stdin=True)


def _output(worker: Worker, job_id: str) -> bytes:
    with worker.stream(job_id) as chunks:
        return b"".join(chunks)


def _await_full(worker: Worker, job_id: str) -> None:
    """Block until the job's pipe is full."""
    job_input = _job_input(worker, job_id)
    with job_input._changed:
        assert job_input._changed.wait_for(lambda: job_input.size == _PIPE_BYTES, GUARD_S)


def _job_input(worker: Worker, job_id: str) -> JobInput:
    job_input: JobInput | None = getattr(worker._job(job_id), "_input")  # noqa: B009 -- of a RunningJob
    assert job_input is not None
    return job_input


def test_job_reads_what_is_written_and_then_the_end(worker: Worker) -> None:
    job_id = _start(worker, "cat")
    assert worker.write_input(job_id, b"one ") == 4
    assert worker.write_input(job_id, b"two", offset=4, end=True) == 7
    assert _output(worker, job_id) == b"one two"
    job = worker.wait(job_id)
    assert (job.input_bytes, job.input_ended, job.exit_code) == (7, True, 0)


def test_input_of_any_bytes_and_length_is_exact(worker: Worker) -> None:
    """Much more than a pipe takes at a time."""
    data = os.urandom(3 * 1024 * 1024 + 1)
    job_id = _start(worker, "cat")
    worker.write_input(job_id, data, end=True)
    assert _output(worker, job_id) == data


def test_writer_that_closes_leaves_the_input_open(worker: Worker) -> None:
    job_id = _start(worker, "cat")
    with worker.open_input(job_id) as writer:
        assert writer.write(b"one ")
    assert not writer.write(b"never")
    writer.wait()  # returns, because the writer is closed
    with worker.open_input(job_id, 4) as writer:
        writer.write(b"two")
        writer.end()
        writer.close()
    assert _output(worker, job_id) == b"one two"


def test_job_without_an_input_has_dev_null_and_no_descriptor_more(worker: Worker) -> None:
    settle_spares(worker)
    before = _open_files()
    job_id = worker.start("sh", ["-c", f"readlink /proc/self/fd/0; {_FOREVER}"])
    await_output(worker, job_id, b"/dev/null\n")
    settle_spares(worker)
    one = _open_files()
    assert worker.status(job_id).input_bytes is None
    with pytest.raises(InputError, match="was started without an input"):
        worker.open_input(job_id)
    other = _start(worker, f"echo up; {_FOREVER}")
    await_output(worker, other, b"up\n")
    settle_spares(worker)
    two = _open_files()
    # The pipe, and what wakes. What earlier tests still close does not count.
    assert (two - one).total() == (one - before).total() + 2


def _open_files() -> Counter[str]:
    """Return what the open descriptors of this process are of."""
    links: Counter[str] = Counter()
    for fd in descriptors_of():
        with contextlib.suppress(FileNotFoundError):  # the directory itself
            links[os.readlink(f"/proc/self/fd/{fd}")] += 1
    return links


def test_job_can_open_dev_stdin(worker: Worker) -> None:
    """As `sh /dev/stdin` and many programs do."""
    job_id = _start(worker, "exec sh /dev/stdin")
    worker.write_input(job_id, b"echo hello\n", end=True)
    assert _output(worker, job_id) == b"hello\n"


def test_no_other_job_has_the_input(worker: Worker) -> None:
    """Not its reading end, which would keep the writer waiting, and not its writing end."""
    job_id = _start(worker, f"echo up; {_FOREVER}")
    await_output(worker, job_id, b"up\n")
    other = worker.start("sh", ["-c", "ls -l /proc/self/fd"])
    inode = f"pipe:[{os.fstat(_job_input(worker, job_id)._pipe.fd).st_ino}]".encode()
    assert inode not in _output(worker, other)
    # The main process has the writing end only: all that reads is the job.
    worker.stop(job_id)
    with pytest.raises(InputError, match="it has ended"):
        worker.write_input(job_id, b"x")


def test_full_pipe_holds_back_the_writer(
    worker: Worker, pool: ThreadPoolExecutor, fifo: Path
) -> None:
    job_id = _start(worker, f"read -r go <{fifo}; exec cat")
    data = bytes(range(256)) * 1024
    writing = pool.submit(worker.write_input, job_id, data, end=True)
    _await_full(worker, job_id)
    assert worker.status(job_id).input_bytes == _PIPE_BYTES
    assert not writing.done()
    fifo.write_bytes(b"\n")
    assert writing.result(GUARD_S) == len(data)
    assert _output(worker, job_id) == data


@pytest.mark.parametrize("end", ["stop", "close", "exit"])
def test_end_of_the_job_or_of_its_stdin_wakes_the_writer(
    worker: Worker, pool: ThreadPoolExecutor, fifo: Path, end: str
) -> None:
    """One that waits for the pipe, and one that waits for the end."""
    action = {"stop": "", "close": "exec <&-;", "exit": "exit;"}[end]
    job_id = _start(worker, f"read -r go <{fifo}; {action} {_FOREVER}")
    writer = worker.open_input(job_id)
    writing = pool.submit(writer.write, bytes(2 * _PIPE_BYTES))
    _await_full(worker, job_id)
    waiting = pool.submit(writer.wait)
    if end == "stop":
        worker.stop(job_id)
    else:
        fifo.write_bytes(b"\n")
    for future in (writing, waiting):
        with pytest.raises(InputError, match="takes no input: it has "):
            future.result(GUARD_S)
    assert worker.status(job_id).input_ended
    with pytest.raises(InputError):
        worker.open_input(job_id)


def test_end_of_the_job_wakes_the_writer_although_a_stranger_has_the_pipe(
    worker: Worker, pool: ThreadPoolExecutor
) -> None:
    """Then the pipe itself does not tell that the job has ended."""
    job_id = _start(worker, f"echo up; {_FOREVER}")
    await_output(worker, job_id, b"up\n")
    stranger = os.open(f"/proc/self/fd/{_job_input(worker, job_id)._pipe.fd}", os.O_RDONLY)
    try:
        writer = worker.open_input(job_id)
        writing = pool.submit(writer.write, bytes(2 * _PIPE_BYTES))
        _await_full(worker, job_id)
        waiting = pool.submit(writer.wait)
        worker.stop(job_id)
        for future in (writing, waiting):
            with pytest.raises(InputError, match="it has ended"):
                future.result(GUARD_S)
    finally:
        os.close(stranger)


class _Noticed(threading.Condition):
    """Attribute `waits`: whether somebody has begun to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.set()
        return super().wait(timeout)


@pytest.mark.parametrize("way", ["finish", "wait"])
def test_who_learns_of_the_end_finds_all_bytes_counted(pool: ThreadPoolExecutor, way: str) -> None:
    """The job may read and end before the thread that has written can count."""
    changed = _Noticed()

    class SlowPipe(InputPipe):
        def write(self, data: memoryview) -> int:
            os.write(self.fd, data)
            assert changed.waits.wait(GUARD_S)
            self.size += len(data)
            return len(data)

    job_input = JobInput("a job", SlowPipe.make(is_kept=False))
    job_input._changed = changed
    writer = job_input.open()
    changed.waits.clear()
    writing = pool.submit(writer.write, b"ab")
    try:
        assert os.read(job_input.read_fd, 2) == b"ab"
        if way == "wait":
            job_input.begin()  # closes the only read end
            with pytest.raises(InputError, match="has closed its stdin"):
                writer.wait()
        else:
            job_input.finish()
        assert job_input.size == 2
    finally:
        changed.waits.set()
        assert writing.result(GUARD_S)
        job_input.finish()


def test_close_wakes_a_writer_that_waits(worker: Worker, pool: ThreadPoolExecutor) -> None:
    job_id = _start(worker, _FOREVER)
    writer = worker.open_input(job_id)
    writing = pool.submit(writer.write, bytes(2 * _PIPE_BYTES))
    _await_full(worker, job_id)
    waiting = pool.submit(writer.wait)
    writer.close()
    assert writing.result(GUARD_S) is False
    assert waiting.result(GUARD_S) is None
    assert writer.size == _PIPE_BYTES


def test_new_writer_takes_over_where_the_former_one_was(
    worker: Worker, pool: ThreadPoolExecutor, fifo: Path
) -> None:
    """The former one waits for the pipe, and its last bytes are not written."""
    job_id = _start(worker, f"read -r go <{fifo}; exec cat")
    former = worker.open_input(job_id)
    writing = pool.submit(former.write, b"a" * 2 * _PIPE_BYTES)
    _await_full(worker, job_id)
    waiting = pool.submit(former.wait)
    with pytest.raises(InputOffsetError, match=f"continue at {_PIPE_BYTES}") as refused:
        worker.open_input(job_id, 1)
    assert (refused.value.offset, refused.value.size) == (1, _PIPE_BYTES)
    for future in (writing, waiting):
        with pytest.raises(InputTakenError):
            future.result(GUARD_S)
    rest = pool.submit(worker.write_input, job_id, b"b", offset=_PIPE_BYTES, end=True)
    fifo.write_bytes(b"\n")
    assert rest.result(GUARD_S) == _PIPE_BYTES + 1
    assert _output(worker, job_id) == b"a" * _PIPE_BYTES + b"b"


def test_of_many_writers_at_a_time_one_writes(worker: Worker, pool: ThreadPoolExecutor) -> None:
    """All others learn that another one took over; no byte is lost, or written twice."""
    job_id = _start(worker, "cat")
    begin = threading.Barrier(8)

    def write() -> int:
        begin.wait(GUARD_S)
        try:
            with worker.open_input(job_id) as writer:
                writer.write(b"x" * 100)
        except InputTakenError:
            return 0
        return 1

    done = sum(pool.map(lambda _: write(), range(8)))
    assert 1 <= done <= 8
    size = worker.write_input(job_id, b"", end=True)
    assert 100 * done <= size <= 800
    assert _output(worker, job_id) == b"x" * size


def test_input_ends_once(worker: Worker) -> None:
    job_id = _start(worker, f"cat; echo ended; {_FOREVER}")
    with worker.open_input(job_id) as writer:
        writer.end()
        assert not writer.write(b"x")
        writer.end()
    await_output(worker, job_id, b"ended\n")
    with pytest.raises(InputError, match="its input was ended"):
        worker.write_input(job_id, b"x")


def test_input_of_a_job_that_has_ended_meanwhile_ends_without_error(worker: Worker) -> None:
    """The job has got all that was written, and gets no more."""
    job_id = _start(worker, "read -r line; echo $line")
    with worker.open_input(job_id) as writer:
        assert writer.write(b"last\n")
        assert worker.wait(job_id, GUARD_S).output_bytes == 5
        writer.end()
        with pytest.raises(InputError):
            writer.write(b"x")


def test_worker_that_closes_ends_the_input(pool: ThreadPoolExecutor) -> None:
    with Worker(enforcement="off") as worker:
        job_id = _start(worker, _FOREVER)
        writing = pool.submit(worker.write_input, job_id, bytes(2 * _PIPE_BYTES))
        _await_full(worker, job_id)
    with pytest.raises(InputError):
        writing.result(GUARD_S)


def test_start_that_fails_leaves_no_pipe(worker: Worker) -> None:
    settle_spares(worker)
    before = descriptors_of()
    with pytest.raises(WorkerError, match="no such file"):
        worker.start("/no/such", stdin=True)
    settle_spares(worker)
    assert len(descriptors_of()) == len(before)


def test_ended_job_keeps_no_descriptor(worker: Worker) -> None:
    settle_spares(worker)
    before = len(descriptors_of())
    for _ in range(3):
        job_id = _start(worker, "exit 3")
        worker.wait(job_id)
    settle_spares(worker)
    assert len(descriptors_of()) == before
