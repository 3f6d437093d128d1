"""The client's own stdin, which `start --stdin`, `run -i` and `send` send to a job.

    send(client, job_id)                      # blocks until the end of stdin
    send_meanwhile(client, job_id, warn)      # in a thread of its own

What is read is sent at once, so a terminal sends line by line, and Ctrl-D ends the job's input.

Thread safety: one thread uses this module. The thread that `send_meanwhile` starts is a daemon,
because nothing can interrupt it while it reads from a terminal.
"""

from __future__ import annotations

import os
import select
import stat

from connection import ClientError

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from connection import Client

__all__ = ["has_data", "send", "send_meanwhile", "send_more"]

_STDIN = 0
_READ_BYTES = 64 * 1024
# After these errors the end of the job's output tells more: the job takes no more input, or is
# gone, or this client was closed.
_TOLD_OTHERWISE = {"FAILED_PRECONDITION", "NOT_FOUND", "CANCELLED"}


def has_data() -> bool:
    """Whether stdin is a pipe, or a file that is not at its end: something to be sent."""
    status = os.fstat(_STDIN)
    if stat.S_ISREG(status.st_mode):
        return os.lseek(_STDIN, 0, os.SEEK_CUR) < status.st_size
    return stat.S_ISFIFO(status.st_mode)


def send(client: Client, job_id: str, *, end: bool = True) -> None:
    """Send all of stdin to the job, and end its input or leave it open. Raises ClientError."""
    client.write_input(job_id, _chunks(), end=end)


def send_more(client: Client, arguments: argparse.Namespace) -> None:
    """Do the subcommand `send`: continue the input of a job where it is.

    With `again`, stdin begins with what the job has got already, which is left out.
    """
    job_id = client.find(arguments.job[0])
    offset = client.status(job_id).stdin.bytes
    chunks = _chunks()
    if arguments.again:
        chunks = _without_beginning(chunks, offset)
    client.write_input(job_id, chunks, offset, end=not arguments.keep_open)


def _without_beginning(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Yield what follows the first `size` bytes. Raises `ClientError` if there are fewer."""
    left = size
    for chunk in chunks:
        if len(chunk) > left:
            yield chunk[left:]
        left = max(0, left - len(chunk))
    if left:
        raise ClientError(
            f"stdin has {size - left} bytes, but the job has got {size}; without --again all of "
            "stdin is sent as what comes next"
        )


def send_meanwhile(
    client: Client, job_id: str, warn: Callable[[str], object], *, end: bool = True
) -> None:
    """Do what `send` does in a thread, which calls `warn` if the job does not get all of stdin.

    The thread ends with the program, because nothing can wake it when it reads stdin.
    """
    import threading

    def run() -> None:
        try:
            send(client, job_id, end=end)
        except ClientError as error:
            if error.code not in _TOLD_OTHERWISE:
                warn(f"the job does not get the rest of its input: {error}")

    threading.Thread(target=run, name="stdin", daemon=True).start()


def _chunks() -> Iterator[bytes]:
    poll = select.poll()
    poll.register(_STDIN, select.POLLIN)
    while True:
        try:
            data = os.read(_STDIN, _READ_BYTES)
        except BlockingIOError:  # whoever gave us this stdin has made it non-blocking
            poll.poll()
            continue
        except OSError as error:
            raise ClientError(
                f"stdin cannot be read: {error.strerror}; the job's input stays open, client send "
                "continues it"
            ) from error
        if not data:
            return
        yield data
