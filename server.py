"""The server: starts everything in the right order, and ends it in the right order.

    python server.py --listen 127.0.0.1:50051

    with Server(Settings(listen="127.0.0.1:0", enforcement="auto")) as server:
        print(server.address)

The server is the services of `service.py` behind mutual TLS. `settings.py` has its settings,
`serverfiles.py` reads its files, `servercommands.py` has the other commands of the program. A
server started as root gives up root before it listens, and becomes an ordinary user. The worker's
fork server keeps root: it starts the jobs, and opens the files that the server needs again at
SIGHUP.

Threads: `daemon.py` describes those of the process. One of gRPC's threads accepts the calls, and
the threads of `calls.py` handle them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import os
import pkgutil
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, cast

# gRPC has no option for the TLS version (grpc#37305). This suite needs a pre-shared key, which
# nobody has, so TLS 1.2 has no usable suite. TLS 1.3 has its own suites, all of them strong. gRPC
# reads the variable when it is imported. `Gate` checks the version of every connection.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES256-CBC-SHA"
# gRPC's own log repeats bytes that any client sends, like a server name with terminal escapes. So
# gRPC logs nothing, unless the operator sets the variable.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

try:
    import grpc

    import auth
    from accounts import (
        Accounts,
        AccountsError,
        choose_uids,
        let_jobs_through,
        parse_uids,
        reserved,
    )
    from audit import AUDIT_FLAGS, JOURNAL, STDOUT, AuditLog, stream_named
    from calls import Calls
    from gate import Gate
    from hostaccounts import HostAccounts
    from service import add_services
    from standardservices import StandardServices
    from tls import CertificateError, Certificates
except ImportError as error:
    sys.exit(f"server: {error}; run `make setup`, then start it with ./server")

import daemon
import hostcheck
import metrics
import serverfiles
import serverlog
import serverstatus
import slurmworker
import worker
from adminsocket import AdminError, AdminSocket, Command
from descriptors import keep_reserve
from errors import TakeoverError, in_words
from fileopener import FileOpener
from oldfiles import open_store
from servercommands import CommandLine, parse_arguments
from serveroptions import OPTIONS, option_string, settings_in_force
from settings import Config, Settings, SettingsError
from standardstreams import prepare_streams
from trustedfiles import TrustedFiles, UntrustedFileError, check
from units import join_address, parse_address

# gRPC imports some of its modules late. By then this process may be a user that cannot read them.
for _module in pkgutil.iter_modules(grpc.__path__, "grpc."):
    importlib.import_module(_module.name)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from localserver import LocalServer
    from users import User

__all__ = ["GRPC_OPTIONS", "Server", "main"]

logger = logging.getLogger("server")

_STORE_SIZE = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
_MESSAGE_FACTOR = 2  # what gRPC reads, of what a request may have: see `Gate`
_FDS_PER_STREAM = 2
_OTHER_FDS = 1024  # beside those of streams
_OTHER_CONNECTIONS = 1024  # beside one for each stream

_HANDSHAKE_S = 5  # some round trips: for the TLS handshake, and then to acknowledge our settings
_STOP_GRACE_S = 1.0  # for streams to send their last chunks

# A client that vanishes is noticed after `keepalive_time` + `keepalive_timeout` or `ping_timeout`,
# 15 s. Clients may ping every 10 s.
GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),  # otherwise a second server silently shares the port
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 9_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", _HANDSHAKE_S * 1000),
    # A header can take one byte on the wire and 150 in memory. gRPC enforces these limits for
    # clients that have acknowledged its settings, and hangs up on those that have not.
    ("grpc.http2.settings_timeout", _HANDSHAKE_S * 1000),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # What a call may send before its bytes are wanted: input for a job that does not read, say. By
    # default gRPC lets this grow to what the network can carry, here beyond 12 MiB for each call.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 256 * 1024),
)


# Errors whose message is for the operator.
_OURS = AdminError, SettingsError, UntrustedFileError, CertificateError, AccountsError
_EXPLAINED = (*_OURS, TakeoverError, ValueError, OSError)
# What a write to stdout raises. Our own subclasses of OSError are not of it.
_OF_STDOUT = {OSError, BrokenPipeError}


# --- the server ---------------------------------------------------------------------------


class Server:
    """A running server: a context manager, which calls `stop`.

    Attributes: `address`, the HOST:PORT it listens on; `grpc_threads`, the threads in which gRPC
    accepts calls; `shutdown_grace_s`, the jobs' at the end. Raises `SettingsError`,
    `CertificateError`, `UntrustedFileError`, `AccountsError`, `CgroupError`, ValueError or
    OSError when it cannot start.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opener: FileOpener | None = None  # if this process has given up its rights
        # Held during a reload, so that the end of the server waits for it, for a bounded time.
        self._reloading = threading.Lock()
        self._is_stopping = False
        self._started_s = time.time()
        self._metrics = metrics.Metrics()
        try:
            self._host, port = parse_address(settings.listen)
        except ValueError as error:
            raise SettingsError(f"--listen {error}") from None
        own_uid, uids = choose_uids(
            settings.isolation, settings.uids, of_host=settings.accounts == "host"
        )
        where = settings.audit_log or settings.state_dir / "audit.log"
        is_stream = str(where) in (STDOUT, JOURNAL)
        self._audit_stream = stream_named(str(where)) if is_stream else None
        self._audit_path = where
        serverfiles.check_own_code(is_isolated=uids is not None)
        files = serverfiles.read_again(settings) | ({} if is_stream else {where: AUDIT_FLAGS})
        self._files = TrustedFiles(files, private=uids is not None)
        users = self._load_users()
        self._certificates = Certificates(self._files.read, settings.certs)
        config = serverfiles.config_in_force(settings)
        self.shutdown_grace_s = config.shutdown_grace_s
        for path in settings.certs.glob("*-key.pem"):
            check(path, private=uids is not None)
        with contextlib.ExitStack() as undo:
            if uids is not None:
                undo.enter_context(reserved(parse_uids(settings.uids)))
            with serverfiles.told_if_full(settings.state_dir):
                settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                serverfiles.check_state(settings.state_dir, own_uid)
                self._store = undo.enter_context(open_store(settings.state_dir))
                self._worker = self._make_worker(config, uids)
                undo.push(self._end_worker)
                self._open_state(users, uids, undo)
                for_operator = self._make_for_operator(undo)
            connections = _raise_fd_limit(config.in_all.streams or 0)
            if own_uid is not None:
                self._opener = undo.enter_context(FileOpener(self._files.flags))
                self._files.open_with(self._opener.open)
                # Before the server listens, and before it has threads.
                self._worker.drop_privileges(own_uid)
            self._server = self._make_grpc_server(config, connections, undo)
            bound_port = _bind(self._server, self._host, port, self._certificates.credentials())
            self.address = join_address(self._host, bound_port)
            before = set(threading.enumerate())
            self._server.start()
            self.grpc_threads = frozenset(threading.enumerate()) - before
            for each in for_operator:
                each.start()
            self._undo = undo.pop_all()

    def _places(self, *, is_isolated: bool) -> tuple[Path | None, Path | None]:
        """Return where homes and TMPDIRs are; None if jobs cannot get there, or need no homes."""
        state = self._settings.state_dir
        if not is_isolated:
            return None, state / "tmp"
        if not let_jobs_through(state):
            return None, None
        return None if self._settings.accounts == "host" else state / "homes", state / "tmp"

    def _make_worker(self, config: Config, uids: range | None) -> worker.Worker:
        homes, tmp = self._places(is_isolated=uids is not None)
        make: Callable[..., worker.Worker] = functools.partial(
            worker.Worker, bounds=config.all_jobs, cgroup_root=self._settings.cgroup_root
        )
        if config.slurm is not None:
            make = slurmworker.maker(config.slurm, self._settings.state_dir)
            if uids is not None and self._settings.accounts != "host":
                raise SettingsError(
                    "on a cluster, the jobs of a server that was started as root run as accounts "
                    "of the cluster: add --accounts host"
                )
        return make(
            limits=config.limits({}),
            enforcement=self._settings.enforcement,
            output_dir=self._settings.state_dir / "output",
            reserve_bytes=config.disk_reserve_bytes,
            uids=uids,
            retention=config.retention,
            environment=config.environment,
            homes=homes,
            tmp_dir=tmp,
            host_accounts=self._settings.accounts == "host",
            store=self._store,
            restart_dir=self._settings.state_dir,
            restart_window=self._settings.restart_window,
        )

    def _open_state(
        self, users: Sequence[User], uids: range | None, undo: contextlib.ExitStack
    ) -> None:
        """Open what is kept in the state directory, and the audit log."""
        state = self._settings.state_dir
        self._accounts: Accounts | HostAccounts | None = None
        self._own_account = worker.account_of(os.geteuid())
        if uids is not None and self._settings.accounts == "host":
            self._accounts = HostAccounts(uids)
        elif uids is not None:
            self._accounts = Accounts(self._store, uids, homes=self._worker.homes)
        if self._accounts is not None:
            self._accounts.add(_accounts_of(users))
        running = undo.enter_context(auth.RunningTime(self._store))
        self._revocations = undo.enter_context(auth.Revocations(self._store, running))
        self._authenticator = auth.Authenticator(
            users=users,
            key=auth.load_key(state / "token.key"),
            revocations=self._revocations,
            running=running,
            store=self._store,
            token_lifetime=timedelta(seconds=self._settings.token_lifetime),
            session_lifetime=timedelta(seconds=self._settings.session_lifetime),
        )
        self._audit = undo.enter_context(
            AuditLog(
                lambda: self._files.open(self._audit_path),
                required=self._settings.audit_required,
                stream=self._audit_stream,
            )
        )

    def _make_grpc_server(
        self, config: Config, connections: int, undo: contextlib.ExitStack
    ) -> grpc.Server:
        """Return the server with its services, and with the threads that handle its calls."""
        streams = config.in_all.streams or 0
        calls = undo.enter_context(
            Calls(streams=streams, streams_of_one=config.per_user.streams or streams)
        )
        gate = undo.enter_context(
            Gate(
                self._authenticator,
                self._audit,
                calls,
                request_bytes=config.requests.size,
                metrics=self._metrics,
            )
        )
        server = grpc.server(
            cast("ThreadPoolExecutor", calls),  # gRPC uses `submit` alone
            interceptors=[gate],
            options=(
                *GRPC_OPTIONS,
                ("grpc.max_receive_message_length", config.requests.size * _MESSAGE_FACTOR),
                # gRPC closes a connection that is one too many as soon as it has accepted it.
                ("grpc.max_allowed_incoming_connections", connections),
                ("grpc.max_concurrent_streams", calls.of_one_connection),
                ("grpc.server.max_pending_requests", calls.of_core),
                ("grpc.server.max_pending_requests_hard_limit", calls.of_core),
            ),
        )
        self._standard = StandardServices(
            health=self._settings.health, reflection=self._settings.reflection
        )
        self._standard.add_to(server)
        self._quotas = add_services(
            server,
            self._worker,
            self._authenticator,
            config=config,
            account_of=self._account_of,
            metrics=self._metrics,
        )
        return server

    def _make_for_operator(self, undo: contextlib.ExitStack) -> list[AdminSocket | LocalServer]:
        """Return what answers the operator, bound to its addresses and not started yet."""
        state = self._settings.state_dir
        paths = (state,) if self._audit_stream else (state, self._audit_path.parent)
        self._disks = undo.enter_context(serverstatus.Disks(paths))
        commands: dict[str, Command] = {  # what `server COMMAND` asks for
            "status": lambda _: self.status(),
            "reload": lambda _: {"problems": self.reload()},
            "stop": _stop,
        }
        self._admin = AdminSocket(state, commands)
        undo.callback(self._admin.close)
        where = self._settings.metrics
        if where is None:
            return [self._admin]
        try:
            listener = metrics.listen(where)
        except (ValueError, OSError) as error:
            # Python adds the address to the reason.
            reason = in_words(error).partition(" (while attempting")[0]
            raise SettingsError(
                f"--metrics {where}: {reason}; name a free loopback address like 127.0.0.1:9464, "
                "or unix:PATH"
            ) from error
        server = metrics.http_server(
            listener, lambda: metrics.text_of(self._metrics, self.status())
        )
        undo.callback(server.close)
        logger.info("the metrics are at %s", listener.address)
        return [self._admin, server]

    def in_use(self) -> str:
        """Return how many jobs run and how many streams are open, in words."""
        jobs, streams = self._quotas.in_use()
        return f"{jobs} jobs, {streams} streams"

    def status(self) -> dict[str, Any]:
        """Return what `server status` shows."""
        ((store_bytes,),) = self._store.query(_STORE_SIZE)
        return serverstatus.describe(
            store_bytes=store_bytes,
            address=self.address,
            started_s=self._started_s,
            jobs=self._worker.counts(),
            uses=self._quotas.uses(),
            users=self._authenticator.user_count,
            disks=self._disks.look(),
            expiries=self._certificates.expiries,
            warnings=self.warnings(),
            problems=[] if self._audit.is_writable else ["the audit log cannot be written"],
        )

    def is_broken(self) -> bool:
        """Whether no job can start any more, because the worker's fork server has died."""
        return self._worker.is_broken

    def warnings(self) -> list[str]:
        """Return what will need attention, a sentence each."""
        return self._certificates.warnings()

    def reload(self) -> list[str]:
        """Read the certificates and the users again, and reopen the audit log; never raises.

        Returns what was refused. An error is logged, too, and the former content stays in force.
        Open streams continue, except those of users who are gone or have changed. May block for
        20 s.
        """
        with self._reloading:
            steps = (
                self._audit.reopen,
                self._revocations.write,
                self._reload_users,
                lambda: self._certificates.reload(self.address),
            )
            found = [step() for step in steps if not self._is_stopping]
        return [problem for problem in found if problem]

    def _reload_users(self) -> str:
        try:
            users = self._load_users()
            if self._accounts is not None:
                self._accounts.add(_accounts_of(users))
            self._authenticator.set_users(users)
        except (
            SettingsError,
            UntrustedFileError,
            AccountsError,
            ValueError,
            OSError,
        ) as error:
            problem = f"the users stay as they were: {in_words(error)}"
            logger.error("%s", problem)
            return problem
        logger.info("%d users are in force", len(users))
        return ""

    @property
    def fork_server_fd(self) -> int:
        """A pidfd of the worker's fork server."""
        return self._worker.fork_server_fd

    @property
    def leaves_jobs(self) -> bool:
        """Whether the jobs can go on without this server, and wait for the next one."""
        return self._settings.restart_window > 0

    def stop(self, *, leaves_jobs: bool = False) -> None:
        """Refuse new calls, end the jobs, let the streams end; blocks until that is done.

        The jobs get SIGTERM, and what is left after their grace is killed. With `leaves_jobs` they
        go on, and the streams end at once.
        """
        self._is_stopping = True
        self._admin.close()
        self._standard.leave()
        # Streams go on as long as the jobs do. The later call shortens the time.
        with contextlib.suppress(RuntimeError):  # gRPC can start no thread that ends them
            self._server.stop(self.shutdown_grace_s + _STOP_GRACE_S)
        self._authenticator.close()
        if self._opener is not None:
            self._opener.close()  # first, because the worker removes the cgroup that it is in
        if leaves_jobs:
            self._worker.leave()
        else:
            self._worker.close(grace=self.shutdown_grace_s)
        try:
            self._server.stop(_STOP_GRACE_S).wait()
        except RuntimeError:
            self._server.stop(None)
        # A reload uses what is closed now. It has had time to end, unless something hangs.
        with contextlib.ExitStack() as undo:
            if self._reloading.acquire(timeout=_STOP_GRACE_S):
                undo.callback(self._reloading.release)
            self._undo.close()

    def _end_worker(self, error: type[BaseException] | None, *_: object) -> None:
        """End the worker; if the start fails, leave what it has taken over to the next server."""
        if error is not None and self._worker.has_taken_over:
            self._worker.leave()
        else:
            self._worker.close()

    def kill_jobs(self) -> None:
        """Kill every job and start no more; ends the grace of `stop`."""
        self._worker.close()

    def _account_of(self, user: str) -> tuple[int | None, worker.Account]:
        """Return the uid of a user's jobs, None for the server's own, and what they are told."""
        if self._accounts is None:
            return None, self._own_account
        return self._accounts.uid(user), self._accounts.account(user)

    def _load_users(self) -> tuple[User, ...]:
        return serverfiles.load_users(self._files, self._settings.users, self._host)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _stop(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Have this process end; the jobs, too, if that is asked for."""
    number = signal.SIGINT if request.get("jobs") else signal.SIGTERM
    os.kill(os.getpid(), number)
    return {"pid": os.getpid()}


def _accounts_of(users: Sequence[User]) -> dict[str, str]:
    """Return the account of the host that each user has where jobs run as accounts."""
    return {user.name: user.account or user.name for user in users}


def _raise_fd_limit(max_streams: int) -> int:
    """Raise the limit of open files; return how many connections there may be.

    Connections get at most half of the descriptors, so that they do not take those of the jobs.
    """
    limit, wanted = keep_reserve(), max_streams * _FDS_PER_STREAM + _OTHER_FDS
    if limit < wanted:
        logger.warning(
            "this process may have %d open files; %d streams and their jobs need %d; raise "
            "the hard limit (ulimit -Hn, or LimitNOFILE= of the unit)",
            *(limit, max_streams, wanted),
        )
    return min(max_streams + _OTHER_CONNECTIONS, limit // 2)


def _bind(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials) -> int:
    address = join_address(host, port)
    try:
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        reason = "is the address one of this host's?"
        # gRPC does not tell the reason. Binding the address again does.
        with contextlib.suppress(OSError):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                socket.create_server((host, port), family=family).close()
            except OSError as error:
                reason = os.strerror(error.errno or 0)
        raise SettingsError(f"cannot listen on {address}: {reason}; see --listen") from None


# --- the program ------------------------------------------------------------------------


def _serve(settings: Settings) -> int:
    daemon.block_signals()  # the fork server gives the jobs an empty mask
    manager = daemon.ServiceManager()
    daemon.keep_memory()
    try:
        server = _start(settings)
    except Exception as error:
        manager.tell(f"STATUS=not started: {in_words(error)}".replace("\n", "; "))
        raise
    daemon.end_if_grpc_ends(server)
    print(f"listening on {server.address}", flush=True)
    return daemon.serve(server, manager)


def _start(settings: Settings) -> Server:
    try:
        return Server(settings)
    except worker.CgroupError as error:
        failures = [str(f) for f in hostcheck.check(settings.cgroup_root) if not f.works]
        lines = [
            "this host cannot enforce every limit:",
            *(failures or [str(error)]),
            "or accept weaker limits with --limits auto",
        ]
        raise SettingsError("\n".join(lines)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 1 for an error. argparse exits with 2."""
    arguments = parse_arguments(argv)
    status = 0
    options: dict[str, object] = {"config": arguments.config}
    try:
        settings, sources = settings_in_force(arguments)
        options |= {key: getattr(settings, option.field) for key, option in OPTIONS.items()}
        if arguments.run is not None:
            status = arguments.run(CommandLine(settings, sources, arguments))
            sys.stdout.flush()
        else:
            serverlog.configure(settings.log_format, settings.log_level)
            status = _serve(settings)
    except _EXPLAINED as error:
        is_of_stdout = type(error) in _OF_STDOUT and not getattr(error, "filename", None)
        if arguments.run and isinstance(error, OSError) and is_of_stdout:
            # Stdout still holds output. At exit Python would try to write it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return 128 + signal.SIGPIPE
            error = SettingsError(f"cannot write to stdout: {error.strerror or error}")
        print(f"server: {_explain(error, options)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _explain(error: Exception, options: Mapping[str, object]) -> str:
    """Return the message; for a file that the system refuses, name the option and the reason."""
    if isinstance(error, TakeoverError):
        return f"{error}, with: server --state-dir {options['state_dir']} stop --jobs"
    if not isinstance(error, OSError) or not isinstance(error.filename, (str, bytes)):
        return in_words(error)
    path = os.fsdecode(error.filename)
    names = [f"{option_string(key)} " for key, value in options.items() if str(value) == path]
    reason, remedy = error.strerror, "check the path, and whether the server's user may use it"
    if reason == os.strerror(errno.EEXIST):  # of mkdir
        reason, remedy = "it is not a directory", "name another path"
    return f"{''.join(names[:1])}{path}: {reason}; {remedy}"


if __name__ == "__main__":
    prepare_streams(may_be_closed=True)
    sys.exit(main())
