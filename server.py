"""The job-worker server: the services of `service.py` behind mutual TLS, and the program.

    python server.py --listen 127.0.0.1:50051

This module binds what the others are: settings, users, certificates, the worker and
a gRPC server, with the right start and the right end.

Started as root it is root only until it is ready: then the process that talks to the
network becomes an ordinary user, and what needs more is done by the worker's helper.

Threads: the main thread only waits for a signal. gRPC's `_serve` thread accepts
calls; pools handle them, one for each kind of call, so that streams, which keep a thread
each, and calls that wait never take the threads of others.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import getpass
import importlib
import logging
import os
import pkgutil
import resource
import signal
import socket
import stat
import sys
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Self, cast

# gRPC cannot be told a TLS version (grpc#37305). But of TLS 1.2 it is left only a
# suite that needs a pre-shared key, which nobody has; TLS 1.3 has suites of its own,
# all strong. Must be set before grpc is imported; `Gate` checks what came of it.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES256-CBC-SHA"
# gRPC would write to stderr, as they are, some of the bytes that anybody sends it: a server
# name with line ends and terminal escapes, for one. So it writes nothing, unless told to.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

try:
    import grpc

    import auth
    from accounts import Accounts, AccountsError, parse_uids
    from audit import AUDIT_FLAGS, AuditLog
    from calls import Calls
    from gate import Gate
    from service import add_services
    from tls import CertificateError, Certificates, certificate_files
    from users import SEEDED_USERS, User, has_public_password, make_user, parse_users
except ImportError as error:
    sys.exit(f"server: {error}; run `make setup`, then start it with ./server")

import hostcheck
import worker
from privileges import can_change_user
from settings import Config, Settings, SettingsError, load_config, parse_arguments
from units import join_address, parse_address

# gRPC imports some of its modules late. By then this process may be a user who may not read them.
for _module in pkgutil.iter_modules(grpc.__path__, "grpc."):
    importlib.import_module(_module.name)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

__all__ = ["GRPC_OPTIONS", "Server", "main"]

logger = logging.getLogger("server")

_MESSAGE_FACTOR = 2  # what gRPC reads, of what a request may have: see `Gate`
_FDS_PER_STREAM = 2
_FDS_SPARE = 1024

# Without O_NONBLOCK a fifo of that name would stop the helper, and with it every job's start.
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)

_STOP_GRACE_S = 1.0  # for streams to hand over their last chunks
_WATCHDOG_S = 4.5  # then the process ends, whatever it is still doing

# A client that vanished without a word is noticed after the first two of these plus
# the third at most; and clients may ping as often as every 10 s.
GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),  # otherwise a second server silently shares the port
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 9_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A header can take one byte on the wire and a hundred in memory: 16 KiB hold that. gRPC
    # refuses a call that has more.
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
)

_SHARED_UID = (
    "jobs run as uid {uid}, which is the server's own: a job can read the server's keys, its "
    "users file and everybody's output, and can signal the server and other jobs; start the "
    "server as root, or with CAP_SETUID and CAP_SETGID, to give each user an uid of their own"
)


# --- the server ---------------------------------------------------------------------------


class Server:
    """A running server: a context manager. Attribute: `address`, the HOST:PORT it listens on.

    Raises `SettingsError`, `CgroupError` or OSError when it cannot start.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        try:
            self._host, port = parse_address(settings.listen)
        except ValueError as error:
            raise SettingsError(f"--listen {error}") from None
        state = settings.state_dir
        self._audit_path = settings.audit_log or state / "audit.log"
        self._worker: worker.Worker | None = None
        own_uid, uids = _uids(settings)
        self._isolated = uids is not None
        users = self._load_users()
        certificates = Certificates(self._read, settings.certs)
        config = load_config(settings.config) if settings.config else Config()
        if settings.max_streams is not None:
            config = replace(config, in_all=replace(config.in_all, streams=settings.max_streams))
        if self._isolated:
            for path in (*settings.certs.glob("*-key.pem"), state / "token.key"):
                _check_private(path)
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            jobs = undo.enter_context(
                worker.Worker(
                    limits=config.limits({}),
                    enforcement=settings.enforcement,
                    cgroup_root=settings.cgroup_root,
                    output_dir=state / "output",
                    uids=uids,
                    files={str(path): flags for path, flags in self._files().items()},
                    retention=config.retention,
                )
            )
            self._worker = jobs
            self._accounts = undo.enter_context(Accounts(state / "uids", uids)) if uids else None
            if self._accounts is not None:
                self._accounts.add(user.name for user in users)
            revocations = undo.enter_context(auth.Revocations(state / "logged-out"))
            self._authenticator = auth.Authenticator(
                users=users, key=auth.load_key(state / "token.key"), revocations=revocations
            )
            self._audit = undo.enter_context(
                AuditLog(lambda: self._open(self._audit_path), required=settings.audit_required)
            )
            _raise_fd_limit(config.in_all.streams or 0)
            if own_uid is not None:
                # Before anything listens, and before there are threads.
                jobs.drop_privileges(own_uid)
            streams = config.in_all.streams or 0
            calls = undo.enter_context(
                Calls(streams=streams, streams_of_one=config.per_user.streams or streams)
            )
            self._certificates = certificates
            gate = undo.enter_context(
                Gate(
                    self._authenticator,
                    self._audit,
                    calls,
                    request_bytes=config.requests.size,
                )
            )
            self._server = grpc.server(
                cast("ThreadPoolExecutor", calls),  # gRPC uses `submit` alone
                interceptors=[gate],
                options=(
                    *GRPC_OPTIONS,
                    ("grpc.max_receive_message_length", config.requests.size * _MESSAGE_FACTOR),
                    ("grpc.max_concurrent_streams", calls.of_one_connection),
                ),
            )
            add_services(
                self._server, jobs, self._authenticator, config=config, uid_of=self._uid_of
            )
            bound_port = _bind(self._server, self._host, port, certificates.credentials())
            self.address = join_address(self._host, bound_port)
            self._server.start()
            self._undo = undo.pop_all()

    def reload(self) -> None:
        """Take up certificates, users and the audit log's file anew; never raises.

        What is wrong is logged, and what was there before stays in force. Streams go
        on, but for those of users who are gone or have changed.
        """
        self._audit.reopen()
        self._reload_users()
        self._certificates.reload(self.address)  # may take some time

    def _reload_users(self) -> None:
        try:
            users = self._load_users()
            if self._accounts is not None:
                self._accounts.add(user.name for user in users)
            self._authenticator.set_users(users)
        except (
            SettingsError,
            AccountsError,
            ValueError,
            OSError,
            worker.SpawnerDiedError,
        ) as error:
            logger.error("the users stay as they were: %s", error)
        else:
            logger.info("%d users are in force", len(users))

    def stop(self) -> None:
        """Refuse new work, kill the jobs, let the streams end; blocks until all is gone."""
        stopped = self._server.stop(_STOP_GRACE_S)
        self._authenticator.close()
        if self._worker is not None:
            self._worker.close()
        stopped.wait()
        self._undo.close()

    def _uid_of(self, user: str) -> int | None:
        return self._accounts.uid(user) if self._accounts else None

    def _load_users(self) -> tuple[User, ...]:
        users: tuple[User, ...] = SEEDED_USERS
        if path := self._settings.users:
            users = parse_users(self._read(path), str(path))
        _check_exposure(self._host, users)
        return users

    def _files(self) -> dict[Path, int]:
        """What is opened again later, by the worker's helper, and how."""
        files = dict.fromkeys(certificate_files(self._settings.certs), _READ_FLAGS)
        if self._settings.users:
            files[self._settings.users] = _READ_FLAGS
        return {path.absolute(): flags for path, flags in files.items()} | {
            self._audit_path.absolute(): AUDIT_FLAGS
        }

    def _open(self, path: Path) -> int:
        """Open one of `_files`, with the rights we have or, once there is a worker, had."""
        path = path.absolute()
        if self._worker is None:
            return os.open(path, self._files()[path] | os.O_CLOEXEC, 0o600)
        return self._worker.open_file(str(path))

    def _read(self, path: Path) -> bytes:
        if self._isolated:
            _check_private(path)
        with open(self._open(path), "rb") as file:
            os.set_blocking(file.fileno(), True)
            return file.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _check_exposure(host: str, users: Sequence[User]) -> None:
    """Refuse to show the world users whose passwords everybody knows."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"--listen: cannot resolve {host!r}: {reason}") from error
    if all(ip_address(str(address).partition("%")[0]).is_loopback for address in addresses):
        return
    public = [user.name for user in users if has_public_password(user)]
    if public:
        raise SettingsError(
            f"the passwords of {' and '.join(public)} are public, so the server listens on "
            f"loopback only and not on {host}; give it users of your own with --users FILE "
            "(an entry is made by: ./server user NAME --role ROLE)"
        )


def _uids(settings: Settings) -> tuple[int | None, range | None]:
    """Return the uid to become and those for users; None for both without isolation."""
    if settings.isolation == "off":
        return None, None
    uid = os.geteuid()
    if not can_change_user():
        warning = _SHARED_UID.format(uid=uid)
        if settings.isolation == "require":
            raise SettingsError(f"--require-isolation: {warning}")
        logger.warning("%s", warning)
        return None, None
    uids = parse_uids(settings.uids)
    if uid in uids:
        raise SettingsError(f"--uids {settings.uids} includes {uid}, which the server runs as")
    return uid or uids[0], uids[1:]


def _check_private(path: Path) -> None:
    """Refuse what any user of this host, and so a job, could replace, change or, if secret, read.

    Whoever cannot even come to it need not care for its mode.
    """
    public = path.suffix == ".pem" and not path.name.endswith("-key.pem")
    forbidden, remedy = (stat.S_IWOTH, "go-w") if public else (stat.S_IRWXO, "go=")
    try:
        for directory in reversed(path.resolve().parents):
            mode = directory.stat().st_mode
            if not mode & stat.S_IXOTH:
                return
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise SettingsError(
                    f"jobs could replace what is in {directory}; run: chmod o-w {directory}"
                )
        if path.stat().st_mode & forbidden:
            raise SettingsError(f"jobs could get at {path}; run: chmod {remedy} {path}")
    except (PermissionError, FileNotFoundError):
        return  # closed to others, of whom we are one by now; or not there, as its reader will say


def _raise_fd_limit(max_streams: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = max_streams * _FDS_PER_STREAM + _FDS_SPARE
    if hard != resource.RLIM_INFINITY and hard < wanted:
        logger.warning(
            "at most %d open files are allowed; %d streams and their jobs want %d (ulimit -n)",
            hard,
            max_streams,
            wanted,
        )


def _bind(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials) -> int:
    address = join_address(host, port)
    try:
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        reason = "is the address one of this host's?"
        # gRPC does not say why; binding ourselves does.
        with contextlib.suppress(OSError):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                socket.create_server((host, port), family=family).close()
            except OSError as error:
                reason = os.strerror(error.errno or 0)
        raise SettingsError(f"cannot listen on {address}: {reason}") from None


# --- the program ------------------------------------------------------------------------


def _print_user(name: str, role: str) -> None:
    if sys.stdin.isatty():
        password = getpass.getpass(f"Password for {name}: ")
        if getpass.getpass("Once more: ") != password:
            raise SettingsError("the two passwords differ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    try:
        print(make_user(name, role, password))
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _check(cgroup_root: Path | None) -> int:
    findings = hostcheck.check(cgroup_root)
    print(*findings, sep="\n")
    return 0 if all(finding.works for finding in findings) else 1


def _is_not_about_metadata(record: logging.LogRecord) -> bool:
    """Keep out what gRPC logs of metadata that is not UTF-8: the whole value and a traceback.

    The value may be a token, or 1 MiB of anything. The gate records the call anyway.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError))


def _serve(settings: Settings) -> None:
    # Blocked here and so in every thread; a signal that comes early waits for sigwait.
    # The spawner gives the jobs an empty mask.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_not_about_metadata)
    _keep_memory()
    try:
        server = Server(settings)
    except worker.CgroupError as error:
        failures = [str(f) for f in hostcheck.check(settings.cgroup_root) if not f.works]
        lines = [
            "not every limit can be enforced here:",
            *(failures or [str(error)]),
            "or accept weaker limits with --limits auto",
        ]
        raise SettingsError("\n".join(lines)) from error
    print(f"listening on {server.address}", flush=True)
    while (number := signal.sigwait(signals)) == signal.SIGHUP:
        logger.info("SIGHUP: taking up certificates, users and the audit log anew")
        server.reload()
    logger.info("%s: shutting down", signal.Signals(number).name)
    faulthandler.dump_traceback_later(_WATCHDOG_S, exit=True)
    server.stop()
    faulthandler.cancel_dump_traceback_later()


def _keep_memory() -> None:
    """Have malloc keep what the messages of a stream need, instead of asking again for each.

    By itself glibc gives the memory of each message back to the kernel, which then has to
    clear it for the next: measured, a third of the CPU time of a stream. It keeps up to 2 MiB
    more now in each of its arenas, and what is free between messages that nobody takes. So
    there are four arenas, and not eight for each processor.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1024 * 1024)
        mallopt(_M_TRIM_THRESHOLD, 2 * 1024 * 1024)
        mallopt(_M_ARENA_MAX, 4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, 1 for an error (2, by argparse, for usage)."""
    arguments = parse_arguments(argv)
    try:
        if arguments.command == "check":
            return _check(arguments.check_root or arguments.cgroup_root)
        if arguments.command == "user":
            _print_user(arguments.name, arguments.role)
        else:
            _serve(
                Settings(
                    listen=arguments.listen,
                    certs=arguments.certs,
                    users=arguments.users,
                    state_dir=arguments.state_dir,
                    enforcement=arguments.limits,
                    cgroup_root=arguments.cgroup_root,
                    max_streams=arguments.max_streams,
                    config=arguments.config,
                    isolation="require" if arguments.require_isolation else "auto",
                    uids=arguments.uids,
                    audit_log=arguments.audit_log,
                    audit_required=arguments.audit_required,
                )
            )
    except (SettingsError, CertificateError, AccountsError, ValueError, OSError) as error:
        print(f"server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
