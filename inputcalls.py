"""Writes what a call of WriteInput sends to the stdin of a job.

    write_all(requests, writer, may_go_on=lambda: True)

Two threads serve such a call. The end of the job must end the call, but a thread that waits for the
client's next message is woken by nothing else. So the call's own thread waits for the end of the
input, and a second thread, `input-messages`, reads the messages and writes them. The second thread
holds one message at a time, and asks gRPC for the next one when the job's pipe has taken all of it.
It ends with the call, because gRPC then ends the iterator of the messages.

`gate.py` admits the call, and `jobinput.py` has the pipe.

Thread safety: `write_all` may be called in any thread; it shares nothing.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from gate import BadRequestError
from worker import ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker import InputWriter
    from workerservice_pb2 import WriteInputRequest

__all__ = ["write_all"]

# A message stays in memory for as long as the job does not read.
_MESSAGE_BYTES = 256 * 1024


def write_all(
    requests: Iterator[WriteInputRequest], writer: InputWriter, *, may_go_on: Callable[[], bool]
) -> None:
    """Write the data of all messages, until there are no more, one has `end`, or `writer` closes.

    `may_go_on` is asked before each message is written. Closes `writer`. Raises `InputError` as
    soon as the job gets no more input, and `InputTakenError` as soon as another call takes over;
    `BadRequestError` and what `requests` raises; `ResourceError` if there is no room for a thread.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            _write(requests, writer, may_go_on)
        except Exception as error:  # noqa: BLE001 -- raised by the call's own thread
            errors.append(error)
        finally:
            writer.close()

    thread = threading.Thread(target=run, name="input-messages", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise ResourceError(f"no room for another thread: {error}", retry_after_s=1) from error
    writer.wait()
    if errors:
        raise errors[0]


def _write(
    requests: Iterator[WriteInputRequest], writer: InputWriter, may_go_on: Callable[[], bool]
) -> None:
    job_id = None
    for request in requests:
        job_id = job_id or request.job_id
        if request.job_id not in ("", job_id):
            raise BadRequestError("a call writes to one job, and this message names another one")
        if len(request.data) > _MESSAGE_BYTES:
            raise BadRequestError(
                f"a message with {len(request.data)} bytes of input; the ceiling is "
                f"{_MESSAGE_BYTES}: send them in several messages"
            )
        if not may_go_on() or not writer.write(request.data):
            return
        if request.end:
            writer.end()
            return
