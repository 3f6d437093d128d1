"""The job-worker client: a command line, and a class for other programs.

    python client.py login -u user
    python client.py start -- ls -l /

    with Client("127.0.0.1:50051", certs="certs", token=token) as client:
        job_id = client.start("ls", ["-l", "/"])
        for data in client.stream(job_id):
            sys.stdout.buffer.write(data)
        print(client.status(job_id).exit_code)

Thread safety: a `Client` may be used from several threads at once. grpc takes 60 ms
to import, so it is imported when there is something to call and not before.

Sources: proc(5), `/proc/PID/cmdline` and field 48 of `/proc/PID/stat`; RFC 6750 (Bearer).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import getpass
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self
from urllib.parse import quote

from units import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import grpc
    from google.protobuf.message import Message

    import workerservice_pb2 as worker_pb

__all__ = ["Client", "ClientError", "main"]

DEFAULT_SERVER = "127.0.0.1:50051"
_HERE = Path(__file__).resolve().parent
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

_EXIT_ERROR = 1
_EXIT_USAGE = 2


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
        certs: str | os.PathLike[str] = _HERE / "certs",
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
        token: str = "",
    ) -> None:
        directory = Path(certs)
        credentials = _read_all(
            Path(ca or directory / "server-ca.pem"),
            Path(key or directory / "client-key.pem"),
            Path(cert or directory / "client.pem"),
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
            if item.key == "retry-after" and re.fullmatch(r"[0-9]{1,9}", str(item.value)):
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


def _read_all(*paths: Path) -> list[bytes]:
    try:
        return [path.read_bytes() for path in paths]
    except FileNotFoundError as error:
        raise ClientError(
            f"no certificate or key {error.filename}; make them with `make certs`, "
            "or name yours with --certs or --cert, --key and --ca"
        ) from error
    except OSError as error:
        raise ClientError(f"cannot read {error.filename}: {error.strerror}") from error


# --- showing jobs -----------------------------------------------------------------------


def _to_dict(message: Message) -> dict[str, Any]:
    """A message's fields under their proto names: enums by name, absent ones None."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            result[field.name] = None
        elif field.message_type and field.message_type.full_name == "google.protobuf.Timestamp":
            result[field.name] = value.ToJsonString()
        elif field.message_type:
            result[field.name] = _to_dict(value)
        elif field.enum_type:
            known = field.enum_type.values_by_number.get(value)  # a newer server has more
            result[field.name] = None if value == 0 else known.name if known else str(value)
        else:
            result[field.name] = list(value) if field.is_repeated else value
    return result


def _describe(job: worker_pb.Job) -> str:
    """What `status` prints."""
    fields = _to_dict(job)
    lines = {
        "job": job.job_id,
        "owner": job.owner,
        "command": _command_line(job),
        "status": _state(fields),
        "started": _moment(fields["started_at"]),
        "ended": _moment(fields["ended_at"]),
        "output": _output(job),
        "subscribers": ", ".join(job.subscribers) or "-",
        "limits": _limits(fields["limits"]),
        "used": _usage(fields["usage"]),
    }
    return "\n".join(f"{name:<12}{_printable(value)}" for name, value in lines.items())


def _output(job: worker_pb.Job) -> str:
    lost = f" ({job.output_lost_bytes} more were not kept)" if job.output_lost_bytes else ""
    return f"{job.output_bytes} bytes{lost}"


def _state(fields: dict[str, Any]) -> str:
    status = str(fields["status"])
    if fields["end_reason"] is None:
        return status
    reason = {
        "EXITED": f"exited with code {fields['exit_code']}",
        "SIGNALLED": f"killed by {_signal_name(fields['signal'])}",
    }.get(fields["end_reason"], fields["end_reason"].lower().replace("_", " "))
    return f"{status} ({reason})"


def _signal_name(number: int | None) -> str:
    try:
        return signal.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


def _moment(text: str | None) -> str:
    return text[:19].replace("T", " ") + " UTC" if text else "-"


def _limits(limits: dict[str, Any] | None) -> str:
    texts: dict[str, Callable[[Any], str]] = {
        "cpu_cores": lambda n: f"{n:g} CPU cores",
        "memory_bytes": lambda n: f"{format_size(n)} memory",
        "swap_bytes": lambda n: f"{format_size(n)} swap",
        "io_read_bps": lambda n: f"{format_size(n)}/s read",
        "io_write_bps": lambda n: f"{format_size(n)}/s written",
        "io_read_iops": lambda n: f"{n} reads/s",
        "io_write_iops": lambda n: f"{n} writes/s",
        "pids": lambda n: f"{n} processes",
    }
    return (limits and _join(texts, limits)) or "none in force"


def _usage(usage: dict[str, Any] | None) -> str:
    if usage is None:
        return "-"
    texts: dict[str, Callable[[Any], str]] = {
        "cpu_user_s": lambda n: f"{n:.3g} s CPU user",
        "cpu_system_s": lambda n: f"{n:.3g} s system",
        "cpu_throttled_s": lambda n: f"throttled {n:.3g} s",
        "memory_bytes": lambda n: f"{format_size(n)} memory",
        "memory_peak_bytes": lambda n: f"{format_size(n)} memory at most",
        "io_read_bytes": lambda n: f"{format_size(n)} read in {usage['io_reads']} operations",
        "io_written_bytes": lambda n: f"{format_size(n)} written in {usage['io_writes']}",
        "pids": lambda n: f"{n} processes",
        "pids_peak": lambda n: f"{n} processes at most",
        "oom_kills": lambda n: f"{n} OOM kills",
    }
    note = " (leader and awaited children only)" if usage["source"] == "RUSAGE" else ""
    return _join(texts, usage) + note


def _join(texts: dict[str, Callable[[Any], str]], fields: dict[str, Any]) -> str:
    return ", ".join(text(fields[name]) for name, text in texts.items() if fields[name] is not None)


def _command_line(job: worker_pb.Job) -> str:
    return shlex.join([job.command, *job.args])


def _printable(text: str) -> str:
    """Somebody else chose this text; do not let it steer our terminal.

    Control characters, line ends, what changes the direction of text, and lone
    surrogates become escapes like `\\x1b`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _print_table(jobs: Sequence[worker_pb.Job]) -> None:
    rows: list[tuple[str, ...]] = [("JOB ID", "OWNER", "STARTED", "STATUS", "COMMAND")]
    for job in jobs:
        fields = _to_dict(job)
        started, state = _moment(fields["started_at"]), _state(fields)
        cells = (job.job_id, job.owner, started, state, _command_line(job))
        rows.append(tuple(map(_printable, cells)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    columns = shutil.get_terminal_size((100_000, 24)).columns if sys.stdout.isatty() else None
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*padded, row[-1]])[:columns])


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


# --- the kept token ---------------------------------------------------------------------


def _token_path(server: str) -> Path:
    """One file a server, so that no server is ever sent another's token. Raises OSError."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        message = "no home directory; set XDG_STATE_HOME"
        raise FileNotFoundError(errno.ENOENT, message, "~") from None
    return Path(state) / "job-worker" / f"token-{quote(server, safe=':[]')}"


def _keep_token(server: str, token: str) -> None:
    path = _token_path(server)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp makes it 0600; the name appears with all of the token behind it.
    fd, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(fd, "w") as file:
        file.write(token)
    Path(temporary).replace(path)


def _forget_token(server: str, token: str) -> None:
    """Delete the kept token if it is this one."""
    # What cannot be read is not kept; what cannot be deleted is worthless.
    with contextlib.suppress(OSError):
        if _read_token(server) == token:
            _token_path(server).unlink()


def _read_token(server: str) -> str:
    # What somebody else put there must not stop us before we can say that it is no token.
    return _token_path(server).read_text(encoding="ascii", errors="replace")


def _find_token(arguments: argparse.Namespace) -> str:
    token: str = arguments.token or os.environ.get("JOBWORKER_TOKEN", "")
    if not token:
        try:
            token = _read_token(arguments.server)
        except OSError:
            raise ClientError(
                f"not logged in to {arguments.server}; run: client login -u USER"
            ) from None
    return token


# --- commands ---------------------------------------------------------------------------


def _login(client: Client, arguments: argparse.Namespace) -> None:
    token, _ = client.login(arguments.user, _password(arguments))
    print(token)
    try:
        _keep_token(arguments.server, token)
    except OSError as error:
        print(
            _printable(
                f"client: the token was not kept ({error.filename}: {error.strerror}); use -t"
            ),
            file=sys.stderr,
        )


def _password(arguments: argparse.Namespace) -> str:
    password: str | None = arguments.password
    try:
        if password is None and sys.stdin.isatty():
            password = getpass.getpass(f"Password for {_printable(arguments.user)}: ")
        elif password is None or password == "-":  # noqa: S105 -- not a password
            password = sys.stdin.readline().rstrip("\n")
        password.encode()
    except EOFError:
        raise ClientError("no password was given") from None
    except UnicodeError:  # which has the password in it
        raise ClientError("the password is not valid UTF-8") from None
    return password


def _logout(client: Client, arguments: argparse.Namespace) -> None:
    token = client.token
    try:
        client.logout()
    except ClientError as error:
        if error.code != "UNAUTHENTICATED":
            raise
        # Not a success: with another certificate it may still be good.
        _forget_token(arguments.server, token)
        raise ClientError(
            "the server does not accept this token (any more), or not with this client "
            "certificate; so there was nothing to log out of",
            error.code,
        ) from error
    _forget_token(arguments.server, token)


def _start(client: Client, arguments: argparse.Namespace) -> None:
    limits = {name: getattr(arguments, name) for name, *_ in _LIMIT_OPTIONS.values()}
    print(_printable(client.start(arguments.command, arguments.args, **limits)))


def _stop(client: Client, arguments: argparse.Namespace) -> None:
    print(_state(_to_dict(client.stop(arguments.job))))


def _status(client: Client, arguments: argparse.Namespace) -> None:
    job = client.status(arguments.job)
    if arguments.json:
        _print_json(_to_dict(job))
    else:
        print(_describe(job))


def _stream(client: Client, arguments: argparse.Namespace) -> None:
    offset = arguments.offset
    try:
        for data in client.stream(arguments.job, offset):
            left = memoryview(data)
            while left:  # with PYTHONUNBUFFERED a write may be a partial one
                left = left[sys.stdout.buffer.write(left) :]
            sys.stdout.buffer.flush()
            offset += len(data)
    except ClientError as error:
        if error.code == "UNAVAILABLE" and offset > arguments.offset:
            message = f"{error}; to go on where this broke off: --offset {offset}"
            raise ClientError(message, error.code) from error
        raise


def _remove(client: Client, arguments: argparse.Namespace) -> None:
    client.remove(arguments.job)


def _list(client: Client, arguments: argparse.Namespace) -> None:
    jobs = client.list()
    if arguments.json:
        _print_json([_to_dict(job) for job in jobs])
    else:
        _print_table(jobs)


# --- the command line -------------------------------------------------------------------

_EPILOG = """\
environment: JOBWORKER_SERVER, JOBWORKER_CERTS, JOBWORKER_TOKEN stand for --server,
--certs and -t. The token is looked for in -t, then JOBWORKER_TOKEN, then where
login keeps it. Exit status: 0; 1 for an error, with one line on stderr; 2 for wrong
usage; 130 after Ctrl-C; 141 when whatever reads the output has gone.
"""

_START_USAGE = """\
client start [OPTIONS] -c COMMAND [-args A1 A2 ...]
       client start [OPTIONS] [--] COMMAND [A1 A2 ...]"""


class _Parser(argparse.ArgumentParser):
    """One line on stderr for wrong usage, as for every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(_EXIT_USAGE, f"{self.prog}: {_printable(message)}; see {self.prog} --help\n")


def _parsers() -> tuple[_Parser, _Parser]:
    """Return the parser, and the one of `start`."""
    parser = _Parser(
        prog="client",
        description="Run commands on a job-worker server, watch their output, stop them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="subcommand", metavar="SUBCOMMAND", required=True, parser_class=_Parser
    )

    def add(name: str, run: Callable[..., None], text: str, **more: Any) -> _Parser:
        sub = commands.add_parser(
            name, help=text, description=f"{text}.", allow_abbrev=False, **more
        )
        sub.set_defaults(run=run)
        for option in ("--server", "--certs", "--cert", "--key", "--ca"):
            sub.add_argument(option, **_CONNECTION[option])
        if name != "login":
            sub.add_argument(
                "-t",
                "--token",
                help="the token (default: the one that was kept); others on this machine can see "
                "it for the moment until the client has overwritten it, JOBWORKER_TOKEN not",
            )
        return sub

    sub = add("login", _login, "Exchange a password for a token; print the token and keep it")
    sub.add_argument("-u", "--user", required=True, metavar="USER", help="the user's name")
    sub.add_argument(
        "-p",
        "--password",
        help="the password, which others on this machine can see for the moment until the client "
        "has overwritten it; - reads it from stdin; without -p it is asked for",
    )
    add("logout", _logout, "Make the token worthless for good, and delete it where login keeps it")

    start = add("start", _start, "Start a job and print its ID", usage=_START_USAGE)
    start.add_argument("-c", "--command", metavar="COMMAND", help="the command, not a shell's line")
    for option, (name, convert, metavar, text) in _LIMIT_OPTIONS.items():
        start.add_argument(option, dest=name, type=convert, metavar=metavar, help=text)
    start.add_argument(
        "-args",
        dest="args",
        metavar="A",
        nargs="*",
        default=[],
        help="everything after it is the command's, dashes included",
    )

    sub = add("stop", _stop, "Kill every process of a job; returns when they are gone")
    _add_job(sub)
    sub = add("status", _status, "Show how a job is doing")
    _add_job(sub)
    _add_json(sub)
    sub = add("stream", _stream, "Write a job's output to stdout, from its start until it ends")
    _add_job(sub)
    sub.add_argument(
        "--offset",
        type=_offset,
        default=0,
        metavar="N",
        help="begin with byte N, counted from 0 (default: 0)",
    )
    sub = add("remove", _remove, "Forget a finished job and delete its output")
    _add_job(sub)
    sub = add("list", _list, "List the jobs you may see")
    _add_json(sub)
    return parser, start


_CONNECTION: dict[str, dict[str, Any]] = {
    "--server": {
        "metavar": "HOST:PORT",
        "default": os.environ.get("JOBWORKER_SERVER") or DEFAULT_SERVER,
        "help": "the server (default: %(default)s)",
    },
    "--certs": {
        "metavar": "DIR",
        "default": os.environ.get("JOBWORKER_CERTS") or str(_HERE / "certs"),
        "help": "where client.pem, client-key.pem and server-ca.pem are (default: %(default)s)",
    },
    "--cert": {"metavar": "FILE", "help": "another client certificate"},
    "--key": {"metavar": "FILE", "help": "another client key"},
    "--ca": {"metavar": "FILE", "help": "another server CA"},
}


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not _is_number(text) or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _cores(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of CPU cores") from None


# Each option, the field of Limits it sets, how it is read, and its help.
_LIMIT_OPTIONS: dict[str, tuple[str, Callable[[str], float], str, str]] = {
    "--cpus": ("cpu_cores", _cores, "N", "CPU cores, 0.5 for half of one"),
    "--memory": ("memory_bytes", _size, "SIZE", "memory, like 256M"),
    "--io-read": ("io_read_bps", _size, "SIZE", "bytes per second read from each disk"),
    "--io-write": ("io_write_bps", _size, "SIZE", "bytes per second written to each disk"),
    "--io-read-ops": ("io_read_iops", _count, "N", "reads per second from each disk"),
    "--io-write-ops": ("io_write_iops", _count, "N", "writes per second to each disk"),
    "--pids": ("pids", _count, "N", "processes and threads"),
}


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-j", "--job", required=True, metavar="JOB_ID", help="the job's ID")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, fields as in the .proto")


def _offset(text: str) -> int:
    if not _is_number(text) or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes")
    return int(text)


def _is_number(text: str) -> bool:
    # int() takes other digits than these too, and raises for more than 4300 of them.
    return re.fullmatch(r"[0-9]{1,20}", text) is not None


def _parse(argv: Sequence[str], *, hide: bool = False) -> argparse.Namespace:
    """Parse the command line; the job's own words and secrets never reach argparse.

    `hide`: overwrite the secrets in what others see of this process.
    """
    parser, start = _parsers()
    is_start = bool(argv) and argv[0] == "start"
    ours, command, rest = _split_start(argv, start) if is_start else (argv, None, ())
    secrets = _find_secrets(ours)
    if hide and secrets:
        _hide(argv, secrets)
    masked = list(ours)
    for index, begin in secrets:
        masked[index] = masked[index][:begin] + "***"
    arguments = parser.parse_args(masked)
    for name, value in vars(arguments).items():
        if value == [] and name != "args":  # what Python 3.11 makes of --job=--
            parser.error(f"-- cannot be the value of an option ({name})")
    if secrets:  # all of one kind, as no subcommand takes both; the last one counts
        index, begin = secrets[-1]
        name = "password" if arguments.subcommand == "login" else "token"
        setattr(arguments, name, ours[index][begin:])
    if not is_start:
        return arguments
    if command is not None:
        if arguments.command is not None:
            start.error(f"two commands: {arguments.command!r} and {command!r}")
        arguments.command = command
    if arguments.command is None:
        start.error("which command? Give -c COMMAND, or -- COMMAND ARGUMENTS")
    arguments.args = rest
    return arguments


_SECRET_OPTIONS = {"-p", "--password", "-t", "--token"}
_OPTION_AND_SECRET = re.compile(r"(-[pt]=|-[pt](?=.)|--(?:password|token)=).*", re.DOTALL)
# What is rather the next option, when the value was forgotten.
_LOOKS_LIKE_AN_OPTION = re.compile(r"-[A-Za-z]|-args|--[\w-]*")


def _find_secrets(words: Sequence[str]) -> list[tuple[int, int]]:
    """Find passwords and tokens: the index of the word, and where in it the secret begins."""
    found = []
    previous = ""
    subcommands_own = ("-p", "--p") if words and words[0] == "login" else ("-t", "--t")
    for index, word in enumerate(words):
        if previous in _SECRET_OPTIONS and not _LOOKS_LIKE_AN_OPTION.fullmatch(word):
            found.append((index, 0))
        elif (match := _OPTION_AND_SECRET.fullmatch(word)) and (
            # With a space in it, an option that there is not is an ordinary word to argparse.
            word.startswith(subcommands_own) or " " not in word
        ):
            found.append((index, match.end(1)))
        previous = word
    return found


def _hide(argv: Sequence[str], secrets: Sequence[tuple[int, int]]) -> None:
    """Overwrite secrets in this process's own arguments, which everybody can read.

    `argv` are the last arguments of this process; `secrets` is of `_find_secrets`. Where
    the system does not let us, nothing happens.
    """
    with contextlib.suppress(OSError):
        stat = Path("/proc/self/stat").read_bytes()
        address = int(stat.rpartition(b")")[2].split()[48 - 3])  # after field 2, the name
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
        first = len(words) - len(argv)
        if words[first:] != [os.fsencode(word) for word in argv]:
            return
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            for index, offset in secrets:
                before = sum(len(word) + 1 for word in words[: first + index])
                length = len(words[first + index]) - offset
                memory.seek(address + before + offset)
                memory.write(b"*" * length)


def _split_start(
    argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[Sequence[str], str | None, Sequence[str]]:
    """Split the words of `start` into ours, the job's command, and its arguments."""
    with_value = {
        word
        for option in parser._actions  # noqa: SLF001 -- argparse tells its options nowhere else
        if option.nargs is None  # neither a flag nor -args
        for word in option.option_strings
    }
    index = 1
    while index < len(argv):
        word = argv[index]
        if word in {"-args", "--args"}:
            return argv[:index], None, argv[index + 1 :]
        if word == "--" or not word.startswith("-"):
            command = argv[index + (word == "--") :]
            return argv[:index], *((command[0], command[1:]) if command else (None, []))
        index += 2 if word in with_value else 1
    return argv, None, []


def _prepare_streams() -> None:
    if sys.stdin is None or sys.stdout is None:
        raise ClientError("stdin and stdout must be open; use </dev/null or >/dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the terminal has no character for is shown as an escape.
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(argv: Sequence[str], *, hide: bool) -> int:
    try:
        _prepare_streams()
        arguments = _parse(argv, hide=hide)
        token = "" if arguments.subcommand == "login" else _find_token(arguments)
        with Client(
            arguments.server,
            certs=arguments.certs,
            cert=arguments.cert,
            key=arguments.key,
            ca=arguments.ca,
            token=token,
        ) as client:
            arguments.run(client, arguments)
    except ClientError as error:
        print(f"client: {_printable(str(error))}", file=sys.stderr)
        return _EXIT_ERROR
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process; return the exit status."""
    # Errors are one line, ours; gRPC would log a failed handshake on its own.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        return _run(sys.argv[1:] if argv is None else argv, hide=argv is None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UnicodeEncodeError as error:
        print(f"client: an argument is not valid UTF-8: {error.object!r}", file=sys.stderr)
        return _EXIT_ERROR
    except OSError as error:
        # What is still to be written cannot be. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read our output has had enough
            return 128 + signal.SIGPIPE
        print(f"client: cannot read or write: {error.strerror or error}", file=sys.stderr)
        return _EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
