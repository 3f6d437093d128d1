"""The class `Client`: a connection to one server, for programs and for the command line.

    with Client("127.0.0.1:50051", certs="certs", token=token) as client:
        job_id = client.start("ls", ["-l", "/"])
        for data in client.stream(job_id):
            sys.stdout.buffer.write(data)
        print(client.status(job_id).exit_code)

Programs may also write `from client import Client`. This module prints nothing and
reads no JOBWORKER_ variable; the command line does both.

`import grpc` takes 60 ms. The constructor imports it, after it has read the certificates,
so the command line reports its own mistakes without that delay.

Thread safety: several threads may use one `Client` at once. `login`, `refresh` and `logout` change
the token for all of them. A thread renews the token while streams are open, see `tokenrenewal.py`.

Source: RFC 6750 (Bearer).
"""

from __future__ import annotations

import os
import re

from clienterrors import ClientError
from following import JobEnd, OutputStream
from link import Link, is_token, token_metadata
from reopening import Reopening
from replacing import read_small
from tokenrenewal import Renewal
from units import parse_address

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime
    from typing import Any, Self

    from google.protobuf.duration_pb2 import Duration

    import workerservice_pb2 as worker_pb
    from certcheck import Certificate
    from jobevents import JobEvents
    from sending import Buffer, Sending

__all__ = [
    "DEFAULT_CERTS",
    "DEFAULT_SERVER",
    "Client",
    "ClientError",
    "JobEnd",
    "OutputStream",
    "check_address",
]

DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_CERTS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "certs")
_PAGE_JOBS = 100  # the most that the server sends at once
_SHOWN_JOBS = 5  # of those that a text can mean
_FILTER_IDS = 1000  # the most that a filter takes
_EXCHANGE_TIMEOUT_S = 10.0
_LEAST_OF_ID = 4  # characters; the server gives no job a name that could be so many of an ID
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
_ID_PART = re.compile(r"[0-9a-f-]{1,36}", re.ASCII | re.IGNORECASE)
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # nobody reaches a job server through a web proxy
    # A job can be silent for hours, so a stream pings the server to notice its death: after 15 s
    # without data, and then 10 s without an answer. gRPC needs both time-outs for that.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC waits between two attempts to connect, by default for up to two minutes, and refuses
    # all calls meanwhile, even if the server is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class Client:
    """A connection to one server: a context manager, which calls `close`.

    `server`: HOST:PORT, or [HOST]:PORT for an IPv6 address. `certs`: the directory of
    `client.pem`, `client-key.pem` and `server-ca.pem`; `cert`, `key` and `ca` name other
    files in their place. `token`: the result of an earlier `login`. `login` also sets the
    attribute `token`, and `logout` clears it. A token with less than half of its life left is
    exchanged for a newer one, as long as its session lasts; `on_new_token` is told the old and the
    new one.

    The first call connects. Every method blocks until the server answers, at most 30 s;
    `stream` blocks as long as the job runs. All of them raise `ClientError`.

    A server that does not answer any more may be restarting. So a call that did not reach the
    server is made again for up to 30 s, and a stream, a watch or an input for up to 5 minutes. A
    call that broke off is repeated only if a second one changes nothing. `retry_for` replaces both
    times, in seconds; 0 makes each lost connection an error. A server that was never reached is
    tried for `connect_for` seconds. `on_wait` is called with the error once a call has been tried
    for 2 s.

    The constructor raises `ClientError` for a wrong address and for files that are missing or
    unusable. It sets the attribute `certificate`: the client certificate, or None where it could
    not be examined.

    The first `Client` of a process limits gRPC to TLS 1.3 in the whole process, unless
    GRPC_SSL_CIPHER_SUITES is set or gRPC has already connected.
    """

    def __init__(  # noqa: PLR0913 -- each is optional
        self,
        server: str = DEFAULT_SERVER,
        *,
        certs: str | os.PathLike[str] = DEFAULT_CERTS,
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
        token: str = "",
        retry_for: float | None = None,
        connect_for: float = 0.0,
        on_wait: Callable[[ClientError], object] | None = None,
        on_new_token: Callable[[str, str], object] | None = None,
    ) -> None:
        check_address(server)
        paths = (
            os.fspath(ca or os.path.join(certs, "server-ca.pem")),
            os.fspath(key or os.path.join(certs, "client-key.pem")),
            os.fspath(cert or os.path.join(certs, "client.pem")),
        )
        credentials = _read_all(paths)
        self.certificate = _check_files(paths, credentials)
        # gRPC has no option for the TLS version. This suite needs a pre-shared key, which nobody
        # has, so TLS 1.2 has no usable suite. TLS 1.3 has its own suites. The server does the same.
        os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-AES256-CBC-SHA")
        try:
            import grpc

            import authservice_pb2
            import authservice_pb2_grpc
            import workerservice_pb2
            import workerservice_pb2_grpc
        except ImportError as error:
            raise ClientError(
                f"{error}; run `make setup`, then ./client, or your program with .venv/bin/python"
            ) from error
        import threading  # gRPC has imported it

        self._auth_pb = authservice_pb2
        self._worker_pb = workerservice_pb2
        self._server = server
        self._pid = os.getpid()
        self._link = Link(
            server,
            grpc.RpcError,
            Renewal(token, self._exchange, on_new_token),
            threading.Event(),
            retry_for=retry_for,
            connect_for=connect_for,
            on_wait=on_wait,
        )
        self._channel = grpc.secure_channel(
            server, grpc.ssl_channel_credentials(*credentials), options=_OPTIONS
        )
        self._auth: Any = authservice_pb2_grpc.AuthServiceStub(self._channel)
        self._worker: Any = workerservice_pb2_grpc.WorkerServiceStub(self._channel)

    @property
    def token(self) -> str:
        """The token that the next call uses."""
        return self._link.renewal.token

    @token.setter
    def token(self, token: str) -> None:
        self._link.renewal.token = token

    def login(self, username: str, password: str) -> tuple[str, datetime]:
        """Exchange a password for a token; return it and when it expires (UTC)."""

        request = self._auth_pb.LoginRequest(username=username, password=password)
        answer = self._link.call(self._auth.Login, request, with_token=False)
        self.token, expires_at = self._checked_token(answer, "login")
        return self.token, expires_at

    def refresh(self) -> tuple[str, datetime]:
        """Exchange the token for a new one of the same session; return it and its expiry (UTC).

        The new token is used from now on. The old one stays valid until its own expiry.
        """
        answer = self._link.call(self._auth.Refresh, self._auth_pb.RefreshRequest())
        self.token, expires_at = self._checked_token(answer)
        return self.token, expires_at

    def _exchange(self, token: str) -> str:
        """Return a newer token of the same session; asks the server once."""
        request = self._auth_pb.RefreshRequest()
        try:
            answer = self._link.begin(
                self._auth.Refresh,
                request,
                timeout=_EXCHANGE_TIMEOUT_S,
                metadata=token_metadata(token),
            )
        except self._link.rpc_error as error:
            raise self._link.explain(error) from error
        return self._checked_token(answer)[0]

    def _checked_token(self, response: Any, call: str = "refresh") -> tuple[str, datetime]:
        from datetime import UTC

        try:
            expires_at = response.expires_at.ToDatetime(UTC)
        except (ValueError, OverflowError):
            expires_at = None
        if expires_at is None or not is_token(response.access_token):
            raise ClientError(
                f"{self._server} answered the {call} with something that is not a token, or does "
                "not expire on a date; is it a job-worker server?"
            )
        return response.access_token, expires_at

    def logout(self) -> None:
        """End the session of the token: the server refuses all its tokens and ends their streams.

        A session begins with a login, and goes on with `refresh`.
        """
        request = self._auth_pb.LogoutRequest()
        self._link.call(self._auth.Logout, request, done_code="UNAUTHENTICATED")
        self.token = ""

    def start(  # noqa: PLR0913 -- all but the first are optional
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        request_id: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        stdin: bool = False,
        name: str = "",
        labels: Mapping[str, str] | None = None,
        keep_tmp: bool = False,
        no_queue: bool = False,
        timeout: float | None = None,
        grace: float | None = None,
        linger: float | None = None,
        **limits: Any,
    ) -> str:
        """Start a job and return its ID.

        `name`, `labels`: what the job can be found by; see `find` and `list`.
        `env`: environment variables beside those that every job has. `cwd`: the directory in which
        the job begins, on the server; a relative path begins at the user's home; "" is the home.
        `keep_tmp`: keep the job's TMPDIR as long as the job; its status names the directory.
        `no_queue`: fail after 10 s if no node of the cluster is free.
        `timeout`, `grace`, `linger`: in seconds; the server's default applies to None. See
        StartJobRequest in the .proto.

        `limits`: fields of the message Limits, like `memory_bytes=1 << 30`. The server's
        default applies to a field that is absent or None. `request_id`: a UUID; default: a new
        one. A second start with the same UUID starts nothing and returns the first one's job. So
        if the connection breaks before the answer, the start is repeated. `stdin`: the
        job's stdin is a pipe and not /dev/null; see `write_input`.
        """
        import uuid

        if isinstance(args, str):  # protobuf would take each character for an argument
            raise TypeError("args must be a sequence of strings, not one string")
        request = self._worker_pb.StartJobRequest(
            command=command,
            args=args,
            limits=self._worker_pb.Limits(**limits),
            request_id=request_id or str(uuid.uuid4()),
            environment=env,
            working_directory=cwd,
            stdin=stdin,
            name=name,
            labels=labels,
            keep_tmp=keep_tmp,
            no_queue=no_queue,
        )
        for field, value in (("timeout", timeout), ("grace", grace), ("linger", linger)):
            if value is not None:
                _set(getattr(request, field), value)
        job_id: str = self._link.call(self._worker.StartJob, request).job_id
        return job_id

    def stop(self, job_id: str, *, grace: float = 0) -> worker_pb.Job:
        """Kill every process of the job; return the job when they are gone.

        `grace`: for how many seconds the job may go on after SIGTERM; 0 kills it at once.
        """
        request = self._worker_pb.StopJobRequest(job_id=job_id)
        if grace:
            _set(request.grace, grace)
        job: worker_pb.Job = self._link.call(self._worker.StopJob, request, more_s=grace).job
        return job

    def signal(self, job_id: str, signal: str | int, *, everything: bool = False) -> None:
        """Send a signal, like "HUP", "SIGHUP" or 1, to the job's leader, or to every process."""
        text = signal if isinstance(signal, str) else str(int(signal))  # a Signals is an int
        request = self._worker_pb.SignalJobRequest(job_id=job_id, signal=text, all=everything)
        self._link.call(self._worker.SignalJob, request, is_repeatable=False)

    def status(self, job_id: str) -> worker_pb.Job:
        """Return the current state of the job."""
        request = self._worker_pb.GetJobStatusRequest(job_id=job_id)
        job: worker_pb.Job = self._link.call(self._worker.GetJobStatus, request).job
        return job

    def remove(self, job_id: str) -> None:
        """Forget a finished job and delete its output; open streams still receive all of it."""
        request = self._worker_pb.RemoveJobRequest(job_id=job_id)
        self._link.call(self._worker.RemoveJob, request, done_code="NOT_FOUND")

    def list(
        self,
        *,
        limit: int | None = None,
        live_usage: bool = False,
        **conditions: Any,
    ) -> Sequence[worker_pb.Job]:
        """Return the jobs that the user may see, in the order of their starts.

        `limit`: only so many, the newest. `live_usage`: also the usage of those that are running.
        `conditions`: only those that meet all of them: `statuses` (like ["RUNNING"]), `owner`,
        `name`, `labels`, `since` (a datetime), `job_ids` (also beginnings of IDs).
        """
        jobs: list[worker_pb.Job] = []
        request = self._worker_pb.ListJobsRequest(
            filter=self._filter(**conditions),
            live_usage=live_usage,
            newest_first=limit is not None,
        )
        while limit is None or len(jobs) < limit:
            request.page_size = 0 if limit is None else min(limit - len(jobs), _PAGE_JOBS)
            page = self._link.call(self._worker.ListJobs, request)
            jobs += page.jobs
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        return jobs if limit is None else jobs[::-1]

    def watch(self, *, timeout_s: float | None = None, **conditions: Any) -> JobEvents:
        """Tell what happens to the jobs that meet the conditions of `list`; see `JobEvents`.

        After `timeout_s` it ends with a `ClientError` of the code DEADLINE_EXCEEDED. The server
        tells that a whole ID of `job_ids` belongs to no job: an event REMOVED with nothing else.
        """
        from jobevents import JobEvents

        request = self._worker_pb.WatchJobsRequest(filter=self._filter(**conditions))
        job_ids = request.filter.job_ids

        def open_call(metadata: Any, left_s: float | None) -> Any:
            return self._link.begin(
                self._worker.WatchJobs, request, metadata=metadata, timeout=left_s
            )

        return JobEvents(self._link, open_call, self._kept, timeout_s, job_ids)

    def _kept(self, job_ids: Sequence[str]) -> Iterable[worker_pb.Job]:
        """Return those of the jobs that the server has."""
        for i in range(0, len(job_ids), _FILTER_IDS):
            yield from self.list(job_ids=job_ids[i : i + _FILTER_IDS])

    def find(self, text: str) -> str:
        """Return the ID of the job that is meant: `text` is an ID, the beginning of one, or a name.

        A text that can be four or more characters of an ID is one; a shorter one is a name first.
        Of several jobs with the same name the only one that is running is meant. Raises
        `ClientError` if there is no such job, or more than one. A whole ID is not looked up.
        """
        if _ID.fullmatch(text):
            return text
        found: Sequence[worker_pb.Job] = ()
        is_part = _ID_PART.fullmatch(text) is not None
        if text and (not is_part or len(text) < _LEAST_OF_ID):
            found = self.list(name=text, limit=_SHOWN_JOBS)
            if len(found) > 1:
                running = self.list(name=text, statuses=["QUEUED", "RUNNING"], limit=2)
                found = running if len(running) == 1 else found
        if is_part and not found:
            found = self.list(job_ids=[text.lower()], limit=_SHOWN_JOBS)
        if len(found) == 1:
            return found[0].job_id
        if not found:
            raise ClientError(
                f"no such job: {text or repr(text)}; a job is named by its ID, the beginning of "
                "its ID, or the name that it was given",
                "NOT_FOUND",
            )
        some = ", ".join(job.job_id for job in found)
        more = ", ..." if len(found) == _SHOWN_JOBS else ""
        raise ClientError(f"{text} can be several jobs: {some}{more}; give the ID of one")

    def _filter(  # noqa: PLR0913 -- each is optional
        self,
        *,
        statuses: Iterable[str] = (),
        owner: str = "",
        name: str = "",
        labels: Mapping[str, str] | None = None,
        since: datetime | None = None,
        job_ids: Iterable[str] = (),
    ) -> worker_pb.JobFilter:
        result = self._worker_pb.JobFilter(
            statuses=[f"JOB_STATUS_{status}" for status in statuses],
            owner=owner,
            name=name,
            labels=labels,
            job_ids=job_ids,
        )
        if since is not None:
            result.since.FromDatetime(since)
        return result

    def stream(  # noqa: PLR0913 -- all but the first are optional
        self,
        job_id: str,
        offset: int = 0,
        *,
        tail_lines: int | None = None,
        since_s: float | None = None,
        follow: bool = True,
        timestamps: bool = False,
        on_lost: Callable[[ClientError, int | None], object] | None = None,
        on_lost_after: float = 0.0,
    ) -> OutputStream:
        """Begin to read the job's output from byte `offset` on; see `OutputStream`.

        `tail_lines`: begin no earlier than with so many last lines of the output so far.
        `since_s`: begin no earlier than with what was written so many seconds ago. `follow`: False
        ends with the output so far. `timestamps`: sets `OutputStream.written_at`. `on_lost`: is
        told of a lost connection, with the error and the offset of the next byte, where the stream
        continues, once the connection has been lost for `on_lost_after` seconds.
        """

        def open_call(metadata: Any, next_offset: int | None) -> Any:
            request = self._worker_pb.StreamOutputRequest(
                job_id=job_id,
                offset=offset if next_offset is None else next_offset,
                no_follow=not follow,
                timestamps=timestamps,
            )
            if next_offset is None:
                if tail_lines is not None:
                    request.tail_lines = tail_lines
                if since_s is not None:
                    _set(request.since, since_s)
            return self._link.begin(self._worker.StreamOutput, request, metadata=metadata)

        return OutputStream(self._link, open_call, on_lost, on_lost_after)

    def write_input(
        self, job_id: str, data: Buffer | Iterable[Buffer], offset: int = 0, *, end: bool = True
    ) -> None:
        """Send all of `data` to the stdin of a job that was started with `stdin`, and end it.

        `end`: False leaves the input open for more. `offset`: how many bytes of input the job has
        got before. Blocks while the job does not read, or `data` yields nothing. After a lost
        connection this continues at the byte that the job has got, and gives up after five minutes
        without a connection. Raises what `data` raises, and leaves the input open then.
        """
        from sending import Sending

        sending, reopening = Sending(data, offset, ends=end), Reopening(self._link)
        has_broken_off = False
        if not self._link.is_reached:
            self.status(job_id)  # tells a server that is away from a connection that is lost later
        while not sending.is_done:
            messages = sending.messages(self._worker_pb.WriteInputRequest, job_id)
            try:
                metadata = reopening.metadata()
                stdin = self._link.begin(self._worker.WriteInput, messages, metadata=metadata).stdin
            except self._link.rpc_error as rpc_error:
                error = self._link.explain(rpc_error)
                least = offset if has_broken_off else offset + 1
                is_over = error.code == "FAILED_PRECONDITION"
                if is_over and self._has_got_all(job_id, sending, least):
                    return
                # The server may have written some more of a call after the connection was lost.
                error.may_pass |= error.code == "OUT_OF_RANGE" and has_broken_off
                reopening.recover(error, rpc_error)
                has_broken_off = True
                try:
                    stdin = self.status(job_id).stdin
                except ClientError:
                    continue  # the next call finds out, too
            try:
                if sending.acknowledge(stdin.bytes, ended=stdin.ended):
                    reopening.succeeded()
            except ValueError as error:
                raise ClientError(f"the input of job {job_id} is not whole: {error}") from error

    def _has_got_all(self, job_id: str, sending: Sending, least: int) -> bool:
        """Whether the job has got all, and `least` bytes or more, although the call failed."""
        stdin = self.status(job_id).stdin
        try:
            sending.acknowledge(stdin.bytes, ended=stdin.ended)
        except ValueError:
            return False
        return sending.is_done and stdin.bytes >= least

    def close(self) -> None:
        """Disconnect and end the open streams. Idempotent.

        Does nothing in a fork of the process that has made the client: gRPC has no threads there.
        """
        if os.getpid() != self._pid:
            return
        self._link.closed.set()
        self._link.renewal.close()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Not "make certs": where there is no CA it makes one, which the server does not accept.
_GET_CERTIFICATE = (
    "ask the server's operator for a valid one (certs/generate.sh NAME on the server's machine "
    "makes one), or name yours with --certs, or with --cert, --key and --ca"
)


def check_address(server: str) -> None:
    """Raise `ClientError` unless `server` is HOST:PORT; without a port gRPC would take 443."""
    try:
        parse_address(server)
    except ValueError as error:
        raise ClientError(f"the server {error}; see --server and JOBWORKER_SERVER") from None


def _set(duration: Duration, seconds: float) -> None:
    # A Duration has no more than some 10,000 years.
    duration.seconds, duration.nanos = int(min(seconds, 1e11)), int(seconds % 1 * 1e9)
    duration.SetInParent()  # or a field of 0 s would be absent


def _read_all(paths: Sequence[str]) -> list[bytes]:
    try:
        return [read_small(path) for path in paths]
    except FileNotFoundError as error:
        raise ClientError(
            f"the certificate or key {error.filename} is missing; {_GET_CERTIFICATE}"
        ) from error
    except OSError as error:
        raise ClientError(
            f"cannot read {error.filename}: {error.strerror}; make it readable for you, or name "
            "another with --certs, or with --cert, --key and --ca"
        ) from error


def _check_files(paths: Sequence[str], contents: Sequence[bytes]) -> Certificate | None:
    """Return the client certificate.

    Raises `ClientError` if gRPC cannot use the server CA, the client key and the certificate.
    """
    # Imported after the files were read, because ssl takes 10 ms. gRPC imports it anyway.
    import ssl

    from certcheck import UnusableError, check_ca, check_pair

    ca, key, cert = contents
    try:
        check_ca(paths[0], ca)
        return check_pair("client", paths[2], cert, paths[1], key)
    except (UnusableError, ssl.SSLError, ValueError) as error:
        raise ClientError(f"{error}; {_GET_CERTIFICATE}") from error
    except OSError:  # no memfd here, or `ulimit -f` forbids to fill it: gRPC decides alone
        return None
