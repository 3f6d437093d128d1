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

Thread safety: several threads may use one `Client` at once. `login` and `logout` change
the token for all of them.

Source: RFC 6750 (Bearer).
"""

from __future__ import annotations

import os
import time

from units import parse_address

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime
    from typing import Any, Self

    import grpc
    from google.protobuf.message import Message

    import workerservice_pb2 as worker_pb
    from certcheck import Certificate
    from sending import Sending

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
_CALL_TIMEOUT_S = 30.0  # the server may need 10 for a stop
# A token has some 500 characters. gRPC starts to refuse calls with more than 8 KiB of metadata.
_MAX_TOKEN_CHARS = 7_500
_REPEAT_AFTER_S = (0.1, 1.0)  # the pauses before a start is repeated
# Before lost input is continued: the first pause, the longest one, and how long to try.
_FIRST_PAUSE_S, _LAST_PAUSE_S, _GIVE_UP_S = 0.1, 5.0, 60.0

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


class ClientError(Exception):
    """A call failed, or could not be made; the message is one line and says what to do.

    Attributes: `code`, the name of the gRPC status ("NOT_FOUND"), "" if no call was made;
    `retry_after_s`, the seconds after which the server asks to try again, or None;
    `is_open`, whether the server may have done what it was asked for, although no answer came.
    """

    def __init__(
        self,
        message: str,
        code: str = "",
        retry_after_s: int | None = None,
        *,
        is_open: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
        self.is_open = is_open


class JobEnd:
    """How a job ended, in the names of `workerservice.proto`.

    Attributes: `status` ("FINISHED"), `end_reason` ("EXITED"), `exit_code` and `signal` (None
    unless the command exited, or a signal killed it).
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.status = metadata["job-status"]
        self.end_reason = metadata.get("job-end-reason", "")
        self.exit_code = _whole_number(metadata.get("job-exit-code", ""))
        self.signal = _whole_number(metadata.get("job-signal", ""))


class OutputStream:
    """A job's output: an iterator of bytes, which come as the job writes them.

    It ends when the job has ended and all of the output was read. Each step blocks while the job
    writes nothing, and may raise `ClientError`.

    Attributes: `end`, which says how the job ended; None until the stream has ended; it stays None
    if the stream broke off. `gap`: the offset and number of the bytes that the server did not keep
    right before the last data, or before the end; None if it kept them.

    One thread iterates; any thread may `close`.
    """

    def __init__(
        self, call: Any, rpc_error: type[Exception], explain: Callable[[Any], ClientError]
    ) -> None:
        self._call = call
        self._rpc_error = rpc_error
        self._explain = explain
        self.end: JobEnd | None = None
        self.gap: tuple[int, int] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        try:
            message = next(self._call)
            self.gap = None
            while message.HasField("gap"):
                self.gap = message.gap.offset, message.gap.length
                message = next(self._call)
        except StopIteration:
            self._find_end()
            raise
        except self._rpc_error as error:
            self._find_end()
            raise self._explain(error) from error
        data: bytes = message.data
        return data

    def _find_end(self) -> None:
        metadata = {item.key: str(item.value) for item in self._call.trailing_metadata() or ()}
        if "job-status" in metadata:
            self.end = JobEnd(metadata)

    def close(self) -> None:
        """End the stream; idempotent. A thread that waits for output gets a `ClientError`."""
        self._call.cancel()


class Client:
    """A connection to one server: a context manager, which calls `close`.

    `server`: HOST:PORT, or [HOST]:PORT for an IPv6 address. `certs`: the directory of
    `client.pem`, `client-key.pem` and `server-ca.pem`; `cert`, `key` and `ca` name other
    files in their place. `token`: the result of an earlier `login`. `login` also sets the
    attribute `token`, and `logout` clears it.

    The first call connects. Every method blocks until the server answers, at most 30 s;
    `stream` blocks as long as the job runs. All of them raise `ClientError`. The constructor
    raises it for a wrong address and for files that are missing or unusable. It sets the attribute
    `certificate`: the client certificate, or None where it could not be examined.

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
        self._rpc_error = grpc.RpcError
        self._auth_pb = authservice_pb2
        self._worker_pb = workerservice_pb2
        self._server = server
        self.token = token
        self._channel = grpc.secure_channel(
            server, grpc.ssl_channel_credentials(*credentials), options=_OPTIONS
        )
        self._auth: Any = authservice_pb2_grpc.AuthServiceStub(self._channel)
        self._worker: Any = workerservice_pb2_grpc.WorkerServiceStub(self._channel)

    def login(self, username: str, password: str) -> tuple[str, datetime]:
        """Exchange a password for a token; return it and when it expires (UTC)."""
        from datetime import UTC

        request = self._auth_pb.LoginRequest(username=username, password=password)
        response = self._call(self._auth.Login, request, with_token=False)
        try:
            expires_at = response.expires_at.ToDatetime(UTC)
        except (ValueError, OverflowError):
            expires_at = None
        if expires_at is None or not _is_token(response.access_token):
            raise ClientError(
                f"{self._server} answered the login with something that is not a token, or does "
                "not expire on a date; is it a job-worker server?"
            )
        self.token = response.access_token
        return self.token, expires_at

    def logout(self) -> None:
        """Make the token invalid for good; the server ends the streams opened with it."""
        self._call(self._auth.Logout, self._auth_pb.LogoutRequest())
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
        **limits: Any,
    ) -> str:
        """Start a job and return its ID.

        `env`: environment variables beside those that every job has. `cwd`: the directory in which
        the job begins, on the server; a relative path begins at the user's home; "" is the home.
        `limits`: fields of the message Limits, like `memory_bytes=1 << 30`. The server's
        default applies to a field that is absent or None. `request_id`: a UUID; default: a new
        one. A second start with the same UUID starts nothing and returns the first one's job. So
        if the connection breaks before the answer, this method repeats the start. `stdin`: the
        job's stdin is a pipe and not /dev/null; see `write_input`.
        """
        import uuid

        request = self._worker_pb.StartJobRequest(
            command=command,
            args=args,
            limits=self._worker_pb.Limits(**limits),
            request_id=request_id or str(uuid.uuid4()),
            environment=env,
            working_directory=cwd,
            stdin=stdin,
        )
        for pause_s in _REPEAT_AFTER_S:
            try:
                return self._start(request)
            except ClientError as error:
                if not error.is_open or error.code != "UNAVAILABLE":
                    raise
            time.sleep(pause_s)
        return self._start(request)

    def _start(self, request: worker_pb.StartJobRequest) -> str:
        job_id: str = self._call(self._worker.StartJob, request).job_id
        return job_id

    def stop(self, job_id: str) -> worker_pb.Job:
        """Kill every process of the job; return the job when they are gone."""
        request = self._worker_pb.StopJobRequest(job_id=job_id)
        job: worker_pb.Job = self._call(self._worker.StopJob, request).job
        return job

    def signal(self, job_id: str, signal: str | int, *, everything: bool = False) -> None:
        """Send a signal, like "HUP", "SIGHUP" or 1, to the job's leader, or to every process."""
        text = signal if isinstance(signal, str) else str(int(signal))  # a Signals is an int
        request = self._worker_pb.SignalJobRequest(job_id=job_id, signal=text, all=everything)
        self._call(self._worker.SignalJob, request)

    def status(self, job_id: str) -> worker_pb.Job:
        """Return the current state of the job."""
        request = self._worker_pb.GetJobStatusRequest(job_id=job_id)
        job: worker_pb.Job = self._call(self._worker.GetJobStatus, request).job
        return job

    def remove(self, job_id: str) -> None:
        """Forget a finished job and delete its output; open streams still receive all of it."""
        self._call(self._worker.RemoveJob, self._worker_pb.RemoveJobRequest(job_id=job_id))

    def list(self) -> Sequence[worker_pb.Job]:
        """Return the jobs that the user may see, in the order of their starts."""
        jobs: list[worker_pb.Job] = []
        request = self._worker_pb.ListJobsRequest()
        while True:
            page = self._call(self._worker.ListJobs, request)
            jobs += page.jobs
            if not page.next_page_token:
                return jobs
            request.page_token = page.next_page_token

    def stream(self, job_id: str, offset: int = 0) -> OutputStream:
        """Begin to read the job's output from byte `offset` on; see `OutputStream`."""
        request = self._worker_pb.StreamOutputRequest(job_id=job_id, offset=offset)
        call = self._worker.StreamOutput(request, metadata=self._metadata())
        return OutputStream(call, self._rpc_error, self._explain)

    def write_input(self, job_id: str, data: bytes | Iterable[bytes], offset: int = 0) -> None:
        """Send all of `data` to the stdin of a job that was started with `stdin`, and end it.

        `offset`: how many bytes of input the job has got before. Blocks while the job does not
        read, or `data` yields nothing. After a lost connection this continues at the byte that the
        job has got, and gives up after a minute without a connection. Raises what `data` raises,
        and leaves the input open then.
        """
        from sending import Sending

        sending = Sending(data, offset)
        lost_s, pause_s, has_broken_off = 0.0, _FIRST_PAUSE_S, False
        while not sending.is_done:
            try:
                stdin = self._send(job_id, sending)
            except ClientError as error:
                is_lost = error.code == "UNAVAILABLE" or error.retry_after_s is not None
                # The server may have written some more of a call after the connection was lost.
                is_behind = error.code == "OUT_OF_RANGE" and has_broken_off
                has_broken_off, lost_s = True, lost_s or time.monotonic()
                if not (is_lost or is_behind) or time.monotonic() - lost_s > _GIVE_UP_S:
                    raise
                time.sleep(error.retry_after_s or pause_s)
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)
                try:
                    stdin = self.status(job_id).stdin
                except ClientError:
                    continue  # the next call finds out, too
            lost_s = 0.0
            try:
                if sending.acknowledge(stdin.bytes, ended=stdin.ended):
                    pause_s = _FIRST_PAUSE_S
            except ValueError as error:
                raise ClientError(f"the input of job {job_id} is not whole: {error}") from error

    def _send(self, job_id: str, sending: Sending) -> worker_pb.Input:
        """Make one call of WriteInput; return how far the input has come."""
        messages = sending.messages(self._worker_pb.WriteInputRequest, job_id)
        try:
            stdin: worker_pb.Input = self._worker.WriteInput(
                messages, metadata=self._metadata()
            ).stdin
        except self._rpc_error as error:
            raise self._explain(error) from error
        return stdin

    def close(self) -> None:
        """Disconnect and end the open streams. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        if not _is_token(self.token):  # gRPC would refuse it with an obscure message
            raise ClientError("this is not a token; log in again, or check -t and JOBWORKER_TOKEN")
        return (("authorization", f"Bearer {self.token}"),)

    def _call(self, method: Any, request: Message, *, with_token: bool = True) -> Any:
        metadata = self._metadata() if with_token else ()
        try:
            return method(request, timeout=_CALL_TIMEOUT_S, metadata=metadata)
        except self._rpc_error as error:
            raise self._explain(error) from error

    def _explain(self, error: grpc.RpcError) -> ClientError:
        """Translate gRPC's error for the user."""
        code, details = error.code().name, " ".join((error.details() or "").split())
        if code in {"UNAVAILABLE", "CANCELLED"}:
            is_open = not any(sign in details for sign in _NEVER_CONNECTED)
            for sign, meaning in _CONNECTION_FAILURES:
                if sign in details:
                    return ClientError(meaning.format(server=self._server), code, is_open=is_open)
        if code == "CANCELLED" and details in {"", code}:
            message = f"{self._server} ended the call without an answer, perhaps to shut down"
            return ClientError(message, code, is_open=True)
        if code == "DEADLINE_EXCEEDED" and details == "Deadline Exceeded":
            message = f"{self._server} did not answer within {_CALL_TIMEOUT_S:g} s"
            return ClientError(message, code, is_open=True)
        retry_after_s = None
        for item in error.trailing_metadata() or ():
            if item.key == "retry-after":
                retry_after_s = _whole_number(str(item.value))
        return ClientError(details or code, code, retry_after_s)


# Not "make certs": where there is no CA it makes one, which the server does not accept.
_GET_CERTIFICATE = (
    "ask the server's operator for it (certs/generate.sh NAME on the server's machine makes one), "
    "or name yours with --certs, or with --cert, --key and --ca"
)
_CLOSED = (
    "{server} closed the connection: the server stopped, or it does not accept your "
    "client certificate (of another client CA, or by the server's clock not valid now); see "
    "--cert, --key and --certs"
)
_SILENT = (
    "{server} does not answer any more: the network is interrupted, or the server hangs; try "
    "again later"
)
_CERTIFICATE = "the certificate of the server at {server} "
_UNTRUSTED = (
    f"{_CERTIFICATE}was not signed by your server CA, or is not for servers; see --ca, --certs and "
    "certs/generate.sh"
)
_OTHER_HOST = (
    f"{_CERTIFICATE}is not for that host name; see --server, and certs/generate.sh --hosts"
)
_UNRESOLVED = "the host name in {server} cannot be resolved; see --server"
# Parts of gRPC's texts for a call that did not reach the server.
_NEVER_CONNECTED = ("failed to connect", "resol")
# A part of gRPC's text for a failed connection, and its meaning. A server that rejects the client's
# certificate just closes the connection.
_CONNECTION_FAILURES = (
    ("Connection refused", "no server listens on {server}; start the server, or see --server"),
    (
        "certificate is not yet valid",
        f"{_CERTIFICATE}is not valid yet; check the clock of this machine, and that of the server",
    ),
    (
        "certificate has expired",
        f"{_CERTIFICATE}has expired; run certs/generate.sh there, or check this machine's clock",
    ),
    ("CERTIFICATE_VERIFY_FAILED", _UNTRUSTED),
    ("WRONG_VERSION_NUMBER", "what listens on {server} does not speak TLS; see --server"),
    ("Hostname Verification Check failed", _OTHER_HOST),
    ("errors resolving", _UNRESOLVED),
    ("DNS resolution failed", _UNRESOLVED),
    ("ame resolution", _UNRESOLVED),
    ("Cancelling all calls", "{server} is shutting down"),
    ("ping timeout", _SILENT),
    ("keepalive", _SILENT),
    ("timed out", _SILENT),
    ("o route to host", _SILENT),
    ("unreachable", _SILENT),
    ("ocket closed", _CLOSED),
    ("Connection reset", _CLOSED),
    ("roken pipe", _CLOSED),
    (
        "failed to connect to all addresses",
        "cannot connect to {server}; check that the server runs and can be reached from here",
    ),
    ("Stream removed", _CLOSED),
    ("GOAWAY", _CLOSED),
    ("recvmsg", _CLOSED),
    ("Locally cancelled", "this stream was closed"),
    ("Channel closed", "this client was closed"),
)


def check_address(server: str) -> None:
    """Raise `ClientError` unless `server` is HOST:PORT; without a port gRPC would take 443."""
    try:
        parse_address(server)
    except ValueError as error:
        raise ClientError(f"the server {error}; see --server and JOBWORKER_SERVER") from None


def _is_token(text: str) -> bool:
    return len(text) <= _MAX_TOKEN_CHARS and text.isascii() and text.isprintable()


def _whole_number(text: str) -> int | None:
    """Return the number in a server's metadata; None if it is none, or has over 9 digits."""
    is_number = text.isascii() and text.isdecimal() and len(text) <= 9  # noqa: PLR2004
    return int(text) if is_number else None


def _read_all(paths: Sequence[str]) -> list[bytes]:
    contents = []
    try:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                contents.append(file.read())
    except FileNotFoundError as error:
        raise ClientError(
            f"the certificate or key {error.filename} is missing; {_GET_CERTIFICATE}"
        ) from error
    except OSError as error:
        raise ClientError(
            f"cannot read {error.filename}: {error.strerror}; make it readable for you, or name "
            "another with --certs, or with --cert, --key and --ca"
        ) from error
    return contents


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
