"""The gRPC services: they turn requests into calls of the worker, and results into messages.

`gate.py` admits every call before a servicer sees it. `worker.py` defines what a job is, `auth.py`
knows the permissions, `quotas.py` the quotas of a user, and the .proto files explain the messages.

Threads: a servicer's method runs in the thread that `calls.py` gives to the call. A stream keeps
its thread until the stream ends.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import re
import signal
import sys
from typing import TYPE_CHECKING

import auth
import authservice_pb2 as auth_pb
import authservice_pb2_grpc
import inputcalls
import worker
import workerservice_pb2 as worker_pb
import workerservice_pb2_grpc
from durations import ending_of, stop_grace, time_before
from finding import check_name, checked_labels
from gate import SHOWN_CHARACTERS, BadRequestError
from jobmessages import (
    BY_ADMIN,
    BY_OWNER,
    end_metadata,
    gap_message,
    input_message,
    job_message,
    timestamp,
)
from lists import Lists
from metrics import Metrics
from quotas import Quotas
from starts import Starts
from untaken import Untaken
from worker import Ending, EndReason, Job, Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    import grpc

    from budget import Budget
    from gate import Call
    from jobrunner import JobRunner
    from settings import Config

__all__ = ["add_services"]

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)

# The tag of the field `data`: the field's number, and wire type 2, a length and as many bytes.
_DATA_TAG = bytes([worker_pb.StreamOutputResponse.DATA_FIELD_NUMBER << 3 | 2])


class _AuthServicer:
    def __init__(self, authenticator: auth.Authenticator) -> None:
        self._authenticator = authenticator

    def Login(self, request: auth_pb.LoginRequest, call: Call) -> auth_pb.LoginResponse:  # noqa: N802
        call.user = request.username[:SHOWN_CHARACTERS]
        token, expires_at = self._authenticator.login(
            request.username, request.password, call.certificate, call.address
        )
        call.identity = self._authenticator.authenticate(token, call.certificate)
        return auth_pb.LoginResponse(
            access_token=token,
            expires_at=timestamp(expires_at),
            session_expires_at=timestamp(call.identity.session.expires_at),
        )

    def Refresh(  # noqa: N802
        self,
        request: auth_pb.RefreshRequest,  # noqa: ARG002 -- the message has no fields
        call: Call,
    ) -> auth_pb.RefreshResponse:
        token, expires_at = self._authenticator.refresh(call.caller, call.certificate)
        return auth_pb.RefreshResponse(
            access_token=token,
            expires_at=timestamp(expires_at),
            session_expires_at=timestamp(call.caller.session.expires_at),
        )

    def Logout(  # noqa: N802
        self,
        request: auth_pb.LogoutRequest,  # noqa: ARG002 -- the message has no fields
        call: Call,
    ) -> auth_pb.LogoutResponse:
        call.record(alone=True)
        self._authenticator.logout(call.caller)
        return auth_pb.LogoutResponse()


class _WorkerServicer:
    def __init__(
        self,
        jobs: JobRunner,
        authenticator: auth.Authenticator,
        config: Config,
        account_of: Callable[[str], tuple[int | None, worker.Account]],
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._worker = jobs
        self._authenticator = authenticator
        self._config = config
        self._account_of = account_of
        self.quotas = Quotas(
            config.per_user, config.in_all, config.job_output_bytes, make_room=jobs.make_room
        )
        self._starts = Starts(jobs.started_by)
        jobs.charge(self.quotas.output)
        jobs.resume(self._terms)
        self._untaken = Untaken()
        self._lists = Lists(jobs, authenticator, self.quotas, self._untaken)

    def StartJob(  # noqa: N802
        self, request: worker_pb.StartJobRequest, call: Call
    ) -> worker_pb.StartJobResponse:
        user = call.caller.name
        argv = [request.command, *request.args]
        call.argv = argv
        self._check_argv(argv)
        _check_names(request)
        request_id = request.request_id and _uuid(request.request_id, "a request ID")
        asked = {field.name: value for field, value in request.limits.ListFields()}
        ending = ending_of(request, self._config.ending)
        digest = _digest(request) if request_id else b""
        start = functools.partial(
            self._start, request, user, self._config.limits(asked), ending, request_id, digest
        )
        call.check_caller()
        is_new = True
        if request_id:
            job_id, is_new = self._starts.once(user, request_id, digest, start)
        else:
            job_id = start()
            call.undo_if_gone = True
        call.job_id = job_id
        if is_new:
            call.undo = functools.partial(self._undo_start, job_id)
        else:
            call.reason = "a repeated request: this job was started before"
        return worker_pb.StartJobResponse(job_id=job_id)

    def _undo_start(self, job_id: str) -> None:
        self._worker.stop(job_id, reason=BY_OWNER)
        self._worker.remove(job_id)

    def _start(  # noqa: PLR0913 -- what is checked by now
        self,
        request: worker_pb.StartJobRequest,
        user: str,
        limits: Limits,
        ending: Ending,
        request_id: str,
        digest: bytes,
    ) -> str:
        self.quotas.check_output(user)
        argv_bytes = _memory_of([request.command, *request.args], request.name, request.labels)
        uid, account = self._account_of(user)
        release = self.quotas.start(user, argv_bytes=argv_bytes)
        try:
            return self._worker.start(
                request.command,
                list(request.args),
                owner=user,
                limits=limits,
                uid=uid,
                account=account,
                keep_tmp=request.keep_tmp,
                no_queue=request.no_queue,
                env=request.environment,
                cwd=request.working_directory,
                budget=self.quotas.output(user),
                on_end=release,
                stdin=request.stdin,
                name=request.name,
                labels=request.labels,
                ending=ending,
                request_id=request_id,
                digest=digest,
            )
        except BaseException as error:
            # A process that the kernel does not let go counts until it is gone.
            if not (isinstance(error, worker.StartTimeoutError) and error.lives):
                release()
            raise

    def _terms(self, job: Job) -> tuple[Budget, Callable[[], None]]:
        """Count a job of a former server; return its budget and what ends the count."""
        argv_bytes = _memory_of([job.command, *job.args], job.name, job.labels)
        release = self.quotas.resume(job.owner, argv_bytes=argv_bytes)
        return self.quotas.output(job.owner), release

    def _check_argv(self, argv: list[str]) -> None:
        """Raise `BadRequestError` if there are too many arguments, or if one is too long."""
        most, longest = self._config.requests.args, self._config.requests.arg_length
        if len(argv) - 1 > most:
            raise BadRequestError(
                f"{len(argv) - 1} arguments; this server's ceiling is {most} (requests.args); "
                "pass them in a file, or on stdin"
            )
        length = max(len(argument.encode(errors="surrogatepass")) for argument in argv)
        if length > longest:
            raise BadRequestError(
                f"an argument of {length} bytes; this server's ceiling is {longest} "
                "(requests.arg_length); pass it in a file, or on stdin"
            )

    def StopJob(  # noqa: N802
        self, request: worker_pb.StopJobRequest, call: Call
    ) -> worker_pb.StopJobResponse:
        job_id, owner = self._reach(request.job_id, call)
        grace = stop_grace(request)
        is_owner = owner == call.caller.name
        reason = BY_OWNER if is_owner else BY_ADMIN
        # A stop of a job that has ended changes nothing, and anybody may repeat it as they like.
        call.record(alone=not self._has_ended(job_id))
        with contextlib.ExitStack() as at_end:
            if grace:
                # It may take minutes. The caller's other calls, and a stop without grace that ends
                # this one, do not wait for its thread.
                at_end.callback(self.quotas.stream(call.caller.name))
                call.ticket.leave()
            job = self._worker.stop(job_id, reason=reason, grace=grace)
        return worker_pb.StopJobResponse(job=job_message(job))

    def SignalJob(  # noqa: N802
        self, request: worker_pb.SignalJobRequest, call: Call
    ) -> worker_pb.SignalJobResponse:
        job_id, _ = self._reach(request.job_id, call)
        number = _signal_number(request.signal)
        if self._has_ended(job_id):
            # Checked here, because the audit log must not record a signal that is not sent.
            raise worker.SignalError(job_id, "it has ended")
        call.record(reason=f"signal {number} to {'every process' if request.all else 'the leader'}")
        self._worker.signal(job_id, number, everything=request.all)
        return worker_pb.SignalJobResponse()

    def RemoveJob(  # noqa: N802
        self, request: worker_pb.RemoveJobRequest, call: Call
    ) -> worker_pb.RemoveJobResponse:
        job_id, _ = self._reach(request.job_id, call)
        if not self._has_ended(job_id):
            # Checked here, because the audit log must not record a removal that the worker refuses.
            raise worker.JobRunningError(job_id)
        call.record(alone=True)
        try:
            self._worker.remove(job_id)
        except OSError as error:
            problem = f"the job is removed, but its output stays on the disk: {error.strerror}"
            raise worker.ResourceError(problem) from error
        return worker_pb.RemoveJobResponse()

    def GetJobStatus(  # noqa: N802
        self, request: worker_pb.GetJobStatusRequest, call: Call
    ) -> worker_pb.GetJobStatusResponse:
        job_id = call.job_id = _uuid(request.job_id, "a job ID")
        try:
            job = self._worker.status(job_id, owner=call.caller.only_owner)
        except worker.UnknownJobError:
            self._reach(job_id, call)  # has the audit log say if there is such a job
            raise
        return worker_pb.GetJobStatusResponse(job=job_message(job))

    def StreamOutput(  # noqa: N802
        self, request: worker_pb.StreamOutputRequest, call: Call
    ) -> Iterator[bytes]:
        """Subscribe and record the call; return a generator of serialized messages."""
        job_id, _ = self._reach(request.job_id, call)
        job = self._worker.observe(job_id)
        before = self._worker.status(job_id, live_usage=False)
        since = time_before(request, "since")
        with contextlib.ExitStack() as at_end:
            at_end.callback(self.quotas.stream(call.caller.name))
            try:
                chunks = at_end.enter_context(
                    self._worker.stream(
                        job_id,
                        subscriber=call.caller.name,
                        offset=request.offset,
                        tail_lines=request.tail_lines if request.HasField("tail_lines") else None,
                        since=since,
                        follow=not request.no_follow,
                        timestamps=request.timestamps,
                    )
                )
            except worker.OffsetError:
                call.context.set_trailing_metadata(end_metadata(job(), request.offset))
                raise
            call.record()
            return self._stream(chunks, job, before, at_end.pop_all(), call)

    def _stream(
        self,
        chunks: worker.Subscription,
        job: Callable[[], Job],
        before: Job,
        at_end: contextlib.ExitStack,
        call: Call,
    ) -> Iterator[bytes]:
        """Yield the messages. `before`: the job, seen before the subscription began."""
        with at_end:
            # If the client disconnects, gRPC does not wake a generator that waits for output. This
            # callback does.
            if not call.context.add_callback(chunks.close):
                return
            at_end.callback(self._authenticator.watch(call.caller, chunks.close))
            try:
                yield from self._messages(chunks, call)
            except worker.OutputLeftError:
                raise worker.WorkerClosedError from None
            except (worker.OutputIncompleteError, worker.OffsetError):
                yield from _gap_messages(chunks)
                call.context.set_trailing_metadata(end_metadata(job(), chunks.offset))
                raise
            # A job that has ended since may have written more than the output so far. To say that
            # it has ended would mean that this was all.
            state = job() if chunks.follows else before
            # A job that runs: the client has gone, or wanted the output so far.
            if state.status.is_over or not chunks.follows:
                call.context.set_trailing_metadata(end_metadata(state, chunks.offset))
            # It may have been CLOSED by a former server.
            if state.end_reason is EndReason.CLOSED and not before.status.is_over:
                raise worker.WorkerClosedError

    def _messages(self, chunks: worker.Subscription, call: Call) -> Iterator[bytes]:
        """Yield the output. Raises `TokenError` if the caller's token ends meanwhile."""
        chunks.chunk_bytes = self._untaken.room
        for chunk in chunks:
            if self._authenticator.has_expired(call.caller):
                break  # `watch` closes the subscription for every other reason
            yield from _gap_messages(chunks)
            size = len(chunk)
            self._metrics.output_bytes.add(amount=size)
            message = [_serialized(chunk, chunks.offset - size, chunks.written_at)]
            # `yield` blocks while the client does not read. No variable may keep the message
            # alive meanwhile.
            del chunk
            with self._untaken.held(size):
                yield message.pop()
        if not self._authenticator.is_valid(call.caller):
            raise auth.TokenError

    def WriteInput(  # noqa: N802
        self, requests: Iterator[worker_pb.WriteInputRequest], call: Call
    ) -> worker_pb.WriteInputResponse:
        """Write what the caller sends to a job's stdin, until the caller ends it."""
        first = next(requests)
        job_id, _ = self._reach(first.job_id, call)
        job = self._worker.observe(job_id)
        with contextlib.ExitStack() as at_end:
            at_end.callback(self.quotas.stream(call.caller.name))
            call.ticket.leave()
            writer = at_end.enter_context(self._worker.open_input(job_id, first.offset))
            call.record()
            at_end.callback(self._authenticator.watch(call.caller, writer.close))
            if call.context.add_callback(writer.close):
                inputcalls.write_all(
                    itertools.chain([first], requests),
                    writer,
                    may_go_on=lambda: not self._authenticator.has_expired(call.caller),
                )
        if not self._authenticator.is_valid(call.caller):
            raise auth.TokenError
        return worker_pb.WriteInputResponse(stdin=input_message(job()))

    def ListJobs(  # noqa: N802
        self, request: worker_pb.ListJobsRequest, call: Call
    ) -> worker_pb.ListJobsResponse:
        return self._lists.page(request, call)

    def WatchJobs(  # noqa: N802
        self, request: worker_pb.WatchJobsRequest, call: Call
    ) -> Iterator[bytes]:
        return self._lists.watch(request, call)

    def _has_ended(self, job_id: str) -> bool:
        """Whether the job is over. Reads no usage for that."""
        return self._worker.status(job_id, live_usage=False).status.is_over

    def _reach(self, text: str, call: Call) -> tuple[str, str]:
        """Return the job's ID and owner. Raises `UnknownJobError`.

        A job that does not exist and a job that the caller may not see give the same error after
        the same work. The caller therefore cannot find out which IDs exist.
        """
        job_id = call.job_id = _uuid(text, "a job ID")
        owner = self._worker.owner(job_id)
        if call.caller.reaches(owner):
            return job_id, owner
        call.reason = "the job is not theirs" if owner else None
        raise worker.UnknownJobError(job_id)


def _check_names(request: worker_pb.StartJobRequest) -> None:
    """Raise `BadRequestError` if no job can have that name, or those labels."""
    try:
        check_name(request.name)
        checked_labels(request.labels)
    except ValueError as error:
        raise BadRequestError(str(error)) from None


def _uuid(text: str, what: str) -> str:
    """Return the UUID in lower case. Raises `BadRequestError`, which says that it is not `what`."""
    if _UUID.fullmatch(text):
        return text.lower()
    raise BadRequestError(
        f"not {what}: {text[:SHOWN_CHARACTERS]!r}; it looks like "
        "0e4fd4a6-4b0c-4c4e-9f6e-2f1d3c5b7a98"
    )


def _digest(request: worker_pb.StartJobRequest) -> bytes:
    """Return a digest of all that is to be started."""
    what = worker_pb.StartJobRequest()
    what.CopyFrom(request)
    what.ClearField("request_id")
    if not what.limits.ListFields():  # no limits are the same as limits without any
        what.ClearField("limits")
    return hashlib.sha256(what.SerializeToString(deterministic=True)).digest()


def _signal_number(text: str) -> int:
    """Return the number of a signal that is named or numbered. Raises `BadRequestError`."""
    name = text.upper().removeprefix("SIG")
    numbers = {str(int(number)): int(number) for number in signal.valid_signals()}
    numbers |= {known.name.removeprefix("SIG"): int(known) for known in signal.Signals}
    if name in numbers:
        return numbers[name]
    raise BadRequestError(
        f"no such signal: {text[:SHOWN_CHARACTERS]!r}; it is a name like TERM or SIGTERM, or a "
        f"number from 1 to {max(signal.valid_signals())}"
    )


def _gap_messages(chunks: worker.Subscription) -> Iterator[bytes]:
    """Yield the message that tells of bytes missing before the last chunk, or before the end."""
    if chunks.gap is not None:
        yield worker_pb.StreamOutputResponse(
            offset=chunks.gap.offset, gap=gap_message(chunks.gap)
        ).SerializeToString()


def _serialized(data: bytes, offset: int, written_at: datetime | None) -> bytes:
    """Return a serialized `StreamOutputResponse`.

    protobuf would copy `data` twice. This function copies `data` once, and streams are a tenth
    faster. Source: https://protobuf.dev/programming-guides/encoding/.
    """
    length, left = bytearray(), len(data)
    while left >= 1 << 7:  # a varint: a byte has seven bits, and the eighth if more bytes follow
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    rest = worker_pb.StreamOutputResponse(
        offset=offset, written_at=written_at and timestamp(written_at)
    ).SerializeToString()
    return b"".join((_DATA_TAG, length, data, rest))


def _memory_of(argv: Sequence[str], name: str, labels: Mapping[str, str]) -> int:
    """Return how much memory the words of a job take."""
    names = (name, *labels, *labels.values())
    return sum(map(sys.getsizeof, (*argv, *filter(None, names))))


def add_services(  # noqa: PLR0913 -- the parts of a server
    server: grpc.Server,
    jobs: JobRunner,
    authenticator: auth.Authenticator,
    *,
    config: Config,
    account_of: Callable[[str], tuple[int | None, worker.Account]],
    metrics: Metrics | None = None,
) -> Quotas:
    """Add both services to `server`. Its interceptor must be a `Gate` with this authenticator.

    Goes on with the jobs of a former server. Returns what counts the running jobs and the open
    streams. `account_of`: returns the uid of a user's jobs, None for the server's own, and what
    the jobs are told of their user. `metrics`: where bytes of output are counted.
    """
    authservice_pb2_grpc.add_AuthServiceServicer_to_server(_AuthServicer(authenticator), server)
    servicer = _WorkerServicer(jobs, authenticator, config, account_of, metrics or Metrics())
    workerservice_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
    return servicer.quotas
