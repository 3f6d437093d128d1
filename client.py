"""The job-worker client: a command line, and a class for other programs.

    python client.py login -u user
    python client.py start -- ls -l /

    with Client("127.0.0.1:50051", certs="certs", token=token) as client:
        job_id = client.start("ls", ["-l", "/"])
        for data in client.stream(job_id):
            sys.stdout.buffer.write(data)
        print(client.status(job_id).exit_code)

The class is here, the command line begins in `commandline.py`.

Thread safety: a `Client` may be used from several threads at once. grpc takes 60 ms
to import, so it is imported when there is something to call and not before; nor does
anything else stand in the way of `client --help`.

Source: RFC 6750 (Bearer).
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as typing has it, whose import takes as long as Python's start
if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from datetime import datetime
    from typing import Any, Self

    import grpc
    from google.protobuf.message import Message

    import workerservice_pb2 as worker_pb

__all__ = ["DEFAULT_CERTS", "DEFAULT_SERVER", "Client", "ClientError", "main"]

DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_CERTS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "certs")
_CALL_TIMEOUT_S = 30.0  # a stop may take 10
# Ours have some 500; of a call with more than 8 KiB of metadata gRPC refuses some or all.
_MAX_TOKEN_CHARS = 7_500

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # a job server is not reached through a web proxy
    ("grpc.max_receive_message_length", -1),  # a list may be long
    # A stream can be silent for hours; this tells a silent job from a dead server.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class ClientError(Exception):
    """A call did not succeed, or could not be made.

    Attributes: `code`, the name of the gRPC status ("NOT_FOUND"), or "" without a call;
    `retry_after_s`, in how many seconds the server says to try again, or None.
    """

    def __init__(self, message: str, code: str = "", retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class Client:
    """A connection to one server. A context manager; `close` ends it.

    `server`: HOST:PORT. `certs`: the directory of `client.pem`, `client-key.pem` and
    `server-ca.pem`, each of which `cert`, `key` and `ca` can replace. `token`: what
    `login` returned; `login` also sets it, and `logout` clears it.

    Every method blocks until the server answers, 30 s at most (`stream`: as long as
    the job runs), and raises `ClientError`, as the constructor does for missing files.
    It connects with the first call.
    """

    def __init__(  # noqa: PLR0913 -- all but the first are optional
        self,
        server: str = DEFAULT_SERVER,
        *,
        certs: str | os.PathLike[str] = DEFAULT_CERTS,
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
        token: str = "",
    ) -> None:
        credentials = _read_all(
            ca or os.path.join(certs, "server-ca.pem"),
            key or os.path.join(certs, "client-key.pem"),
            cert or os.path.join(certs, "client.pem"),
        )
        # As in the server: leave TLS 1.2 no suite it could use, and so only 1.3.
        os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-AES256-CBC-SHA")
        try:
            import grpc

            import authservice_pb2
            import authservice_pb2_grpc
            import workerservice_pb2
            import workerservice_pb2_grpc
        except ImportError as error:
            raise ClientError(f"{error}; run `make setup`, then use ./client") from error
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
        if not _is_token(response.access_token):
            raise ClientError(f"what {self._server} answered to the login is not a token")
        self.token = response.access_token
        return self.token, response.expires_at.ToDatetime(UTC)

    def logout(self) -> None:
        """Make the token worthless for good; streams that were opened with it end."""
        self._call(self._auth.Logout, self._auth_pb.LogoutRequest())
        self.token = ""

    def start(self, command: str, args: Sequence[str] = (), **limits: Any) -> str:
        """Start a job and return its ID.

        `limits` are fields of the message Limits; the server's default for what is
        absent or None.
        """
        request = self._worker_pb.StartJobRequest(
            command=command, args=args, limits=self._worker_pb.Limits(**limits)
        )
        job_id: str = self._call(self._worker.StartJob, request).job_id
        return job_id

    def stop(self, job_id: str) -> worker_pb.Job:
        """Kill every process of the job; return it as it is then."""
        request = self._worker_pb.StopJobRequest(job_id=job_id)
        job: worker_pb.Job = self._call(self._worker.StopJob, request).job
        return job

    def status(self, job_id: str) -> worker_pb.Job:
        """Return the job as it is now."""
        request = self._worker_pb.GetJobStatusRequest(job_id=job_id)
        job: worker_pb.Job = self._call(self._worker.GetJobStatus, request).job
        return job

    def remove(self, job_id: str) -> None:
        """Forget a finished job and delete its output; those who read it still get all."""
        self._call(self._worker.RemoveJob, self._worker_pb.RemoveJobRequest(job_id=job_id))

    def list(self) -> Sequence[worker_pb.Job]:
        """Return the jobs the user reaches, in the order they were started."""
        jobs: Sequence[worker_pb.Job] = self._call(
            self._worker.ListJobs, self._worker_pb.ListJobsRequest()
        ).jobs
        return jobs

    def stream(self, job_id: str, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the job's output from byte `offset` on, as it comes, until the job ends.

        Closing the generator ends the stream.
        """
        request = self._worker_pb.StreamOutputRequest(job_id=job_id, offset=offset)
        call = self._worker.StreamOutput(request, metadata=self._metadata())
        try:
            for response in call:
                yield response.data
        except self._rpc_error as error:
            raise self._explain(error) from error
        finally:
            call.cancel()

    def close(self) -> None:
        """Disconnect; streams that are open end. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        if not _is_token(self.token):  # gRPC would say so in words of its own
            raise ClientError("the token is not one; log in again, or check -t and JOBWORKER_TOKEN")
        return (("authorization", f"Bearer {self.token}"),)

    def _call(self, method: Any, request: Message, *, with_token: bool = True) -> Any:
        metadata = self._metadata() if with_token else ()
        try:
            return method(request, timeout=_CALL_TIMEOUT_S, metadata=metadata)
        except self._rpc_error as error:
            raise self._explain(error) from error

    def _explain(self, error: grpc.RpcError) -> ClientError:
        """Say in the user's terms what gRPC says in its own."""
        code, details = error.code().name, error.details() or ""
        if code == "UNAVAILABLE":
            for sign, meaning in _CONNECTION_FAILURES:
                if sign in details:
                    return ClientError(f"{meaning.format(server=self._server)}", code)
        if code == "DEADLINE_EXCEEDED" and details == "Deadline Exceeded":
            details = f"{self._server} did not answer within {_CALL_TIMEOUT_S:g} s"
        retry_after_s = None
        for item in error.trailing_metadata() or ():
            if item.key == "retry-after" and _is_seconds(str(item.value)):
                retry_after_s = int(item.value)
        return ClientError(" ".join(details.split()) or code, code, retry_after_s)


_CLOSED = (
    "{server} closed the connection: the server stopped, or it does not accept your "
    "client certificate; see --cert, --key and --certs"
)
_UNTRUSTED = (
    "the certificate of the server at {server} was not signed by your server CA, is not for "
    "that host name, or has expired; see --ca, --certs and certs/generate.sh"
)
# What gRPC's text for a failed connection contains, and what it means. A server that
# does not accept our certificate says so only by closing the connection (TLS 1.3).
_CONNECTION_FAILURES = (
    ("Connection refused", "no server listens on {server}; is it running, and is it there?"),
    ("CERTIFICATE_VERIFY_FAILED", _UNTRUSTED),
    ("WRONG_VERSION_NUMBER", "what listens on {server} does not speak TLS"),
    ("Hostname Verification Check failed", _UNTRUSTED),
    ("errors resolving", "the host name in {server} cannot be resolved"),
    ("DNS resolution failed", "the host name in {server} cannot be resolved"),
    ("ame resolution", "the host name in {server} cannot be resolved"),
    ("ocket closed", _CLOSED),
    ("Connection reset", _CLOSED),
    ("failed to connect to all addresses", "cannot connect to {server}; is it running?"),
)


def _is_token(text: str) -> bool:
    return len(text) <= _MAX_TOKEN_CHARS and text.isascii() and text.isprintable()


def _is_seconds(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9  # noqa: PLR2004 -- 30 years


def _read_all(*paths: str | os.PathLike[str]) -> list[bytes]:
    contents = []
    try:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                contents.append(file.read())
    except FileNotFoundError as error:
        raise ClientError(
            f"no certificate or key {error.filename}; make them with `make certs`, "
            "or name yours with --certs or --cert, --key and --ca"
        ) from error
    except OSError as error:
        raise ClientError(f"cannot read {error.filename}: {error.strerror}") from error
    return contents


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process; return the exit status."""
    import commandline

    return commandline.main(argv)


if __name__ == "__main__":
    sys.exit(main())
