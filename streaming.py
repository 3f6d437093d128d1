"""The subcommand `stream`: it writes a job's output to stdout, and what is missing to stderr.

    write_all(client.stream(job_id, timestamps=True), timestamps=True)

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import sys

from cli import warn
from connection import ClientError
from display import state_of

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from datetime import datetime

    from connection import Client, OutputStream

__all__ = ["stream", "tell_loss", "write_all"]

# With these errors a stream breaks off in the middle, and can be continued later.
_MAY_CONTINUE = {"UNAVAILABLE", "UNAUTHENTICATED", "CANCELLED", "INTERNAL", "UNKNOWN"}


def stream(client: Client, arguments: argparse.Namespace) -> None:
    """Write the output that the arguments ask for, from its beginning until the job ends."""
    job_id = client.find(arguments.job[0])
    chunks = client.stream(
        job_id,
        arguments.offset,
        tail_lines=arguments.tail,
        since_s=arguments.since,
        follow=not arguments.no_follow,
        timestamps=arguments.timestamps,
        on_lost=None if arguments.no_retry else tell_loss,
    )
    try:
        write_all(chunks, timestamps=arguments.timestamps)
    except ClientError as error:
        if error.code in _MAY_CONTINUE and chunks.offset is not None:
            message = f"{error}; to continue from here, use --offset {chunks.offset}"
            raise ClientError(message, error.code) from error
        raise
    finally:
        chunks.close()
    if chunks.end is None:
        raise ClientError("the server did not say how the job ended; the output may be incomplete")
    if chunks.end.end_reason != "EXITED" and chunks.end.status not in {"QUEUED", "RUNNING"}:
        state = state_of(vars(chunks.end))
        raise ClientError(f"the job did not exit by itself: {state}; the output may be incomplete")


def tell_loss(error: ClientError, offset: int | None) -> None:
    """Say on stderr that the connection was lost, and that it is being made again."""
    warn(f"{error}; trying to continue at byte {offset or 0}")


def write_all(chunks: OutputStream, *, timestamps: bool = False) -> None:
    """Write the output to stdout, each line after its time if `timestamps`."""
    is_new_line = True
    try:
        for chunk in chunks:
            _tell_gap(chunks)
            data = _dated(chunk, chunks.written_at, is_new_line) if timestamps else chunk
            is_new_line = chunk.endswith(b"\n")
            left = memoryview(data)
            while left:  # with PYTHONUNBUFFERED a write may be partial
                left = left[sys.stdout.buffer.write(left) :]
            sys.stdout.buffer.flush()
    except ClientError:
        _tell_gap(chunks)
        raise


def _tell_gap(chunks: OutputStream) -> None:
    if chunks.gap is not None:
        begin, size = chunks.gap
        chunks.gap = None
        warn(f"... {size} bytes, from byte {begin} on, were not kept ...")


def _dated(data: bytes, moment: datetime | None, is_new_line: bool) -> bytes:
    """Return the data with the time in front of each line that begins in it."""
    text = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z") if moment else "-"
    stamp = f"{text} ".encode()
    dated = data.replace(b"\n", b"\n" + stamp)
    if data.endswith(b"\n"):
        dated = dated[: -len(stamp)]
    return stamp + dated if is_new_line else dated
