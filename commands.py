"""The subcommands of the command line: what each does and keeps.

A subcommand gets a `Client` and the arguments that `cli.py` has parsed. It prints its
result, and raises ClientError or OSError. A module that only one subcommand needs is
imported inside it, so the others start without that delay.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import stdin
from cli import LIMIT_FIELDS, LIMIT_OPTIONS, TIME_FIELDS, printable, warn
from connection import ClientError
from credentials import login, logout, whoami
from display import describe, print_json, state_of, to_dict
from selecting import labels_of, selected
from streaming import stream, tell_loss, write_all
from waiting import exit_status, wait

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Any, Self

    import workerservice_pb2 as worker_pb
    from connection import Client, JobEnd

__all__ = ["COMMANDS"]

# What happens to the connection is no part of a job's output; a restart of the server takes less.
_TELL_LOSS_AFTER_S = 30.0
_STOPS_AT_ONCE = 16
# The job has ended meanwhile, and perhaps somebody has removed it: its output tells how it ended.
_TOLD_BY_THE_END = {"FAILED_PRECONDITION", "NOT_FOUND"}
_CTRL_C_STOPS = 2  # the first Ctrl-C is passed on, the second stops the job


def _start(client: Client, arguments: argparse.Namespace) -> None:
    job_id = _start_job(client, arguments)
    try:
        print(printable(job_id), flush=True)
    except (KeyboardInterrupt, OSError):
        warn(f"the job was started; its ID is {job_id}")
        raise
    _warn_of_limits(client, arguments, job_id)
    if arguments.stdin:
        stdin.send(client, job_id, end=not arguments.keep_open)


def _start_job(client: Client, arguments: argparse.Namespace) -> str:
    """Start the job that the arguments of `start` or `run` describe; return its ID."""
    import uuid

    from variables import read_variables

    names = (*LIMIT_FIELDS, *TIME_FIELDS)
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    options |= {
        "env": read_variables(arguments.env_files, arguments.env),
        "cwd": arguments.cwd or "",
        "stdin": arguments.stdin,
        "name": arguments.name or "",
        "labels": labels_of(arguments),
        "keep_tmp": arguments.keep_tmp,
        "no_queue": arguments.no_queue,
    }
    request_id = arguments.request_id or str(uuid.uuid4())
    may_be = f"there may be a job: to get its ID, repeat this start with --request-id {request_id}"
    try:
        return client.start(arguments.command, arguments.args, request_id=request_id, **options)
    except ClientError as error:
        if not error.is_open:
            raise
        raise ClientError(f"{error}; {may_be}", error.code) from error
    except KeyboardInterrupt:
        warn(may_be)
        raise


def _warn_of_limits(client: Client, arguments: argparse.Namespace, job_id: str) -> None:
    """Say which of the limits that were asked for are not in force on the job."""
    asked = [field for field in LIMIT_FIELDS if getattr(arguments, field) is not None]
    if not asked:
        return
    with contextlib.suppress(ClientError):  # it has been removed already
        limits = client.status(job_id).limits
        missing = [
            option
            for option, (field, *_) in LIMIT_OPTIONS.items()
            if field in asked and not limits.HasField(field)
        ]
        if missing:
            warn(
                f"not in force, because the server's host cannot enforce it: {', '.join(missing)}; "
                "the server's operator can see with ./server check what is missing"
            )


def _run(client: Client, arguments: argparse.Namespace) -> int:
    """Start a job, write its output to stdout, and return the exit status that tells its end."""
    if arguments.detach:
        _start(client, arguments)
        return 0
    with _Interrupts(client) as interrupts:
        job_id = _start_job(client, arguments)
        interrupts.pass_on(job_id)
        _warn_of_limits(client, arguments, job_id)
        if arguments.stdin:
            stdin.send_meanwhile(client, job_id, warn, end=not arguments.keep_open)
        elif stdin.has_data():
            warn("stdin is not sent to the job; use run -i to send it")
        end = _follow(client, job_id)
        interrupts.end()
        if end is None:
            raise ClientError(f"how the job ended is unknown; see: client status -j {job_id}")
        if end.end_reason != "EXITED":
            warn(f"the job did not exit by itself: {state_of(vars(end))}")
        return exit_status(end.exit_code, end.signal)


def _follow(client: Client, job_id: str) -> JobEnd | None:
    """Write the job's output to stdout; return how the job ended, or None if that is unknown."""
    chunks = client.stream(job_id, on_lost=tell_loss, on_lost_after=_TELL_LOSS_AFTER_S)
    try:
        write_all(chunks)
    except ClientError as error:
        if chunks.end is None:
            raise ClientError(
                f"{error}; how the job ends is unknown; see: client status -j {job_id}",
                error.code,
            ) from error
        warn(f"{error}")
    except (KeyboardInterrupt, OSError) as error:
        if chunks.end is None or isinstance(error, OSError):
            warn(f"the job may go on; see: client status -j {job_id}")
            raise
    finally:
        chunks.close()
    return chunks.end


class _Interrupts:
    """Passes Ctrl-C on to a job: SIGINT, the second time a stop; the third time it ends `run`.

    A context manager, which the main thread uses. In it Ctrl-C raises KeyboardInterrupt only the
    third time. What comes before `pass_on` is passed on then. At its end it closes the client, so
    that it waits for no call.

    The handler runs at any point of the main thread, perhaps in the middle of a call of gRPC.
    Therefore a thread of its own makes the calls. It is a daemon, because a call to a server
    that does not answer lasts 30 s.
    """

    def __init__(self, client: Client) -> None:
        from queue import SimpleQueue

        self._client = client
        self._count = 0
        self._is_over = False
        self._queue: SimpleQueue[int] = SimpleQueue()  # its `put` may be called in a handler
        self._before: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before != signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._queue.put(0)
        self._client.close()
        signal.signal(signal.SIGINT, self._before)

    def end(self) -> None:
        """Ignore Ctrl-C until the context ends: the job has ended, or is left."""
        self._is_over = True

    def pass_on(self, job_id: str) -> None:
        """Pass on what has come and what will come, until the context ends."""
        import threading

        threading.Thread(target=self._serve, args=(job_id,), name="interrupts", daemon=True).start()

    def _note(self, _signum: int, _frame: object) -> None:
        if self._is_over:
            return
        self._count += 1
        if self._count > _CTRL_C_STOPS:
            raise KeyboardInterrupt
        if self._count == _CTRL_C_STOPS:
            # Not with print, which the handler may have interrupted.
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), b"client: stopping the job; Ctrl-C again leaves it\n")
        self._queue.put(self._count)

    def _serve(self, job_id: str) -> None:
        while count := self._queue.get():
            try:
                if count < _CTRL_C_STOPS:
                    self._client.signal(job_id, "INT")
                else:
                    self._client.stop(job_id)
            except ClientError as error:
                if error.code not in _TOLD_BY_THE_END and not self._is_over:
                    warn(str(error))


def _stop(client: Client, arguments: argparse.Namespace) -> None:
    jobs = selected(client, arguments, ["QUEUED", "RUNNING"]) if arguments.all else arguments.job

    def stop(job_id: str) -> None:
        state = state_of(to_dict(client.stop(job_id, grace=arguments.grace)))
        line = state if len(arguments.job) == 1 else f"{printable(job_id)} {state}"
        sys.stdout.write(f"{line}\n")  # at once: print would write the end of the line by itself

    # With a grace each stop takes a while, so they do not wait for each other.
    at_once = _STOPS_AT_ONCE if arguments.grace else 1
    _for_each(client, jobs, stop, may_be_gone=arguments.all, at_once=at_once)


def _signal(client: Client, arguments: argparse.Namespace) -> None:
    _for_each(
        client,
        arguments.job,
        lambda job_id: client.signal(job_id, arguments.signal, everything=arguments.all),
    )


def _status(client: Client, arguments: argparse.Namespace) -> None:
    jobs: list[worker_pb.Job] = []
    try:
        _for_each(client, arguments.job, lambda job_id: jobs.append(client.status(job_id)))
    finally:
        if arguments.json and len(arguments.job) > 1:
            print_json([to_dict(job) for job in jobs])
        elif arguments.json and jobs:
            print_json(to_dict(jobs[0]))
        elif jobs:
            print("\n\n".join(map(describe, jobs)))


def _for_each(
    client: Client,
    jobs: Sequence[str],
    do: Callable[[str], object],
    *,
    may_be_gone: bool = False,
    at_once: int = 1,
) -> None:
    """Call `do` with the ID of every job, also after an error; then raise one ClientError for all.

    A job that is named twice counts once: it cannot be removed twice, and gets one signal.
    `may_be_gone`: it is no error if a job has been removed. `at_once`: for how many jobs `do` is
    called at the same time, in threads.
    """

    jobs = list(dict.fromkeys(jobs))

    def try_one(job: str) -> ClientError | None:
        try:
            do(client.find(job))
        except ClientError as error:
            return None if may_be_gone and error.code == "NOT_FOUND" else error
        return None

    if at_once > 1 and len(jobs) > 1:
        found = _in_threads(client, try_one, jobs, at_once)
    else:
        found = [try_one(job) for job in jobs]
    errors = {job: error for job, error in zip(jobs, found, strict=True) if error is not None}
    if errors and len(jobs) == 1:
        raise errors[jobs[0]]
    if errors:
        text = "; ".join(
            f"{error}" if job in str(error) else f"job {job}: {error}"
            for job, error in errors.items()
        )
        raise ClientError(text, next(iter(errors.values())).code)


def _in_threads(
    client: Client,
    do: Callable[[str], ClientError | None],
    jobs: Sequence[str],
    at_once: int,
) -> list[ClientError | None]:
    """Return what `do` returns for each job; up to `at_once` threads call it."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(at_once, "stop") as pool:
        try:
            return list(pool.map(do, jobs))
        except BaseException:  # Ctrl-C: the calls end with their channel
            client.close()
            raise


def _remove(client: Client, arguments: argparse.Namespace) -> None:
    ended = ["STOPPED", "FINISHED"]
    jobs = selected(client, arguments, ended) if arguments.finished else arguments.job
    _for_each(client, jobs, client.remove, may_be_gone=arguments.finished)


def _list(client: Client, arguments: argparse.Namespace) -> None:
    from listing import list_jobs

    list_jobs(client, arguments)


# Each returns the exit status; None is 0.
COMMANDS: dict[str, Callable[[Client, argparse.Namespace], int | None]] = {
    "login": login,
    "logout": logout,
    "whoami": whoami,
    "start": _start,
    "run": _run,
    "stop": _stop,
    "signal": _signal,
    "status": _status,
    "stream": stream,
    "send": stdin.send_more,
    "remove": _remove,
    "list": _list,
    "wait": wait,
}
