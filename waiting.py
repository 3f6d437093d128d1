"""The subcommand `wait`: returns when jobs have ended, with the exit status that tells the end.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

from cli import EXIT_UNKNOWN, printable, warn
from connection import ClientError
from display import state_of, to_dict

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse

    import workerservice_pb2 as worker_pb
    from connection import Client

__all__ = ["exit_status", "wait"]

_EXIT_TIMEOUT = 124  # like timeout(1)
_EXIT_SIGNAL = 128  # plus the signal, like a shell
_MOST_EXIT_STATUS = 255


def wait(client: Client, arguments: argparse.Namespace) -> int:
    """Print how each job ends, and return the exit status of the last one named.

    With --any: return when the first one has ended, with its status.
    """
    job_ids = [client.find(text).lower() for text in arguments.job]
    ends: dict[str, worker_pb.Job] = {}
    events = client.watch(job_ids=set(job_ids), timeout_s=arguments.timeout)
    try:
        for event in events:
            job = event.job
            fields = to_dict(job)
            is_over = fields["status"] in {"STOPPED", "FINISHED"}
            # A job that was removed while the server was away is told as it was known last.
            is_gone = not is_over and to_dict(event)["kind"] == "REMOVED"
            if job.job_id in ends or not (is_over or is_gone):
                continue
            ends[job.job_id] = job
            if is_gone:
                warn(f"no such job: {job.job_id}")
            else:
                print(printable(f"{job.job_id} {state_of(fields)}"), flush=True)
            if arguments.any or len(ends) == len(set(job_ids)):
                break
    except ClientError as error:
        if error.code != "DEADLINE_EXCEEDED":
            raise
        left = ", ".join(job_id for job_id in dict.fromkeys(job_ids) if job_id not in ends)
        warn(f"not ended within the time: {left}")
        return _EXIT_TIMEOUT
    finally:
        events.close()
    last = next(iter(ends.values())) if arguments.any else ends[job_ids[-1]]
    return exit_status(
        last.exit_code if last.HasField("exit_code") else None,
        last.signal if last.HasField("signal") else None,
    )


def exit_status(exit_code: int | None, signal: int | None) -> int:
    """Return the exit status that tells how a job ended, as a shell does."""
    if signal is not None:
        return min(_EXIT_SIGNAL + signal, _MOST_EXIT_STATUS)
    if exit_code is None or exit_code > _MOST_EXIT_STATUS:
        return EXIT_UNKNOWN
    return exit_code
