"""The server as a process: its signals, its memory, and what it tells the service manager.

    daemon.block_signals()          # before there are threads
    manager = daemon.ServiceManager()
    with Server(settings) as server:
        daemon.serve(server, manager)

SIGTERM and SIGINT end the server, SIGHUP makes it reload. With a restart window, SIGTERM leaves the
jobs to the next server, and SIGINT ends them. If the worker's fork server dies, no job can start
any more. The server then ends with status 70, so that its manager starts it again. The service
manager (systemd) is told by the protocol of sd_notify(3), if it asks for that: Type=notify and
WatchdogSec= of the unit.

Threads: the main thread waits for signals, the thread `reload` does what SIGHUP asks for, and the
thread `fork-server` waits for the end of the fork server. While the main thread stops the server,
the thread `hurry` waits for another SIGTERM or SIGINT.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import select
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Protocol

from errors import in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "BROKEN_STATUS",
    "WATCHDOG_S",
    "Servable",
    "ServiceManager",
    "block_signals",
    "end_if_grpc_ends",
    "keep_memory",
    "serve",
]

logger = logging.getLogger("server")

BROKEN_STATUS = os.EX_SOFTWARE  # 70: the exit status of a server that can start no more jobs
WATCHDOG_S = 4.5  # so long after the signal to end, the process ends, even if something hangs

_WATCHDOG_AFTER_GRACE_S = 1.5  # likewise, after the jobs' grace
_ENDS = {signal.SIGTERM, signal.SIGINT}
# SIGCHLD comes when a child ends: the fork server, or the file opener.
_SIGNALS = _ENDS | {signal.SIGHUP, signal.SIGCHLD}
_DAY_S = 24 * 60 * 60
_JOIN_S = 1.0  # for the threads `reload` and `hurry`
_TELL_S = 1.0  # for the service manager to take a message
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)


class Servable(Protocol):
    """What this module needs of a server."""

    address: str
    grpc_threads: frozenset[threading.Thread]
    shutdown_grace_s: float

    @property
    def fork_server_fd(self) -> int:
        """A pidfd of the worker's fork server."""

    @property
    def leaves_jobs(self) -> bool:
        """Whether jobs can go on without the server."""

    def reload(self) -> object:
        """Read again what may have changed."""

    def stop(self, *, leaves_jobs: bool = False) -> None:
        """End the jobs, after their grace, and the streams. `leaves_jobs`: the jobs go on."""

    def kill_jobs(self) -> None:
        """End the jobs alone, at once; also while `stop` waits for their grace."""

    def in_use(self) -> str:
        """Return what is in use, in a few words."""

    def is_broken(self) -> bool:
        """Whether no job can start any more, because the fork server has died."""

    def warnings(self) -> list[str]:
        """Return what will need attention, a sentence each; called once a day."""


class ServiceManager:
    """Whoever started this process, and wants to be told how it is: sd_notify(3).

    Takes the manager's variables out of the environment, so that no child process speaks for this
    one. If the manager has not set them, nothing is told.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        # An address that begins with @ has no file; the kernel wants a zero byte for the @.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        limit_us = os.environ.pop("WATCHDOG_USEC", "")
        is_for_us = os.environ.pop("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self.interval_s: float | None = None
        """How often the manager must be told something; None: never."""
        if self._address and limit_us.isdecimal() and int(limit_us) and is_for_us:
            self.interval_s = int(limit_us) / 1e6 / 2  # sd_watchdog_enabled(3) recommends half

    def tell(self, *assignments: str) -> None:
        """Send assignments like "READY=1". Never raises: the server works without its manager."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_TELL_S)
                sock.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            logger.warning(
                "the service manager cannot be told %s: %s", assignments[0], in_words(error)
            )


def block_signals() -> None:
    """Have signals wait until `serve` takes them. Every thread made from now on blocks them too.

    SIGABRT, which the service manager sends to a server that hangs, leaves the stack of each thread
    in the log.
    """
    faulthandler.enable()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def serve(server: Servable, manager: ServiceManager) -> int:
    """Serve until SIGTERM or SIGINT, then stop the server; reload at SIGHUP.

    Returns the exit status of the program: 0, or `BROKEN_STATUS`.
    """
    manager.tell("READY=1", f"STATUS={server.in_use()}")
    reloader = _Reloader(server.reload, manager)
    with _watched(server.fork_server_fd):
        number = _await_end(server, manager, reloader)
    leaves_jobs = number == signal.SIGTERM and server.leaves_jobs
    if number is None:
        logger.critical(
            "the fork server has died: its jobs end as lost and none can start; ending with status "
            "%d, so that the service manager starts the server again",
            BROKEN_STATUS,
        )
    else:
        left = "; the jobs go on, and wait for the next server" if leaves_jobs else ""
        logger.info("%s: shutting down%s", signal.Signals(number).name, left)
    manager.tell("STOPPING=1", f"STATUS={'leaving' if leaves_jobs else 'ending'} the jobs")
    watchdog_s = max(WATCHDOG_S, server.shutdown_grace_s + _WATCHDOG_AFTER_GRACE_S)
    with contextlib.suppress(RuntimeError):  # no thread can be started
        faulthandler.dump_traceback_later(watchdog_s, exit=True)
    with contextlib.nullcontext() if leaves_jobs else _hurried(server.kill_jobs):
        server.stop(leaves_jobs=leaves_jobs)
    reloader.close()
    faulthandler.cancel_dump_traceback_later()
    return BROKEN_STATUS if number is None else 0


def _await_end(server: Servable, manager: ServiceManager, reloader: _Reloader) -> int | None:
    """Block until a signal is to end the server, and return it; None if the server is broken."""
    warn_at = time.monotonic()
    while not server.is_broken():
        if time.monotonic() >= warn_at:
            warn_at = time.monotonic() + _DAY_S
            for warning in server.warnings():
                logger.warning("%s", warning)
        left_s = max(0.0, warn_at - time.monotonic())
        number = _next_signal(min(left_s, manager.interval_s or left_s))
        if number in _ENDS:
            return number
        if manager.interval_s is not None:
            # Also after a signal: each begins the interval anew. `in_use` takes locks of the
            # server. If one of them is never released, this thread hangs, and the manager
            # restarts the server.
            manager.tell("WATCHDOG=1", f"STATUS={server.in_use()}")
        if number == signal.SIGHUP:
            logger.info("SIGHUP: reading certificates and users again, reopening the audit log")
            reloader.request()
    return None


@contextlib.contextmanager
def _watched(fork_server_fd: int) -> Iterator[None]:
    """Within this context SIGCHLD comes when the fork server ends, even if it is no child of ours.

    That is one whose main process this process has become.
    """
    end_fd = os.eventfd(0, os.EFD_CLOEXEC)
    poll = select.poll()
    poll.register(fork_server_fd, select.POLLIN)
    poll.register(end_fd, select.POLLIN)

    def watch() -> None:
        if end_fd not in dict(poll.poll()):
            os.kill(os.getpid(), signal.SIGCHLD)

    thread = threading.Thread(target=watch, name="fork-server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(end_fd, 1)
        thread.join()
        os.close(end_fd)


def _next_signal(timeout_s: float) -> int | None:
    """Block until a signal comes, or until the time has passed; then return None."""
    taken = signal.sigtimedwait(_SIGNALS, timeout_s)
    return taken.si_signo if taken else None


@contextlib.contextmanager
def _hurried(hurry: Callable[[], None]) -> Iterator[None]:
    """Within this context the first SIGTERM or SIGINT calls `hurry`."""
    is_over = threading.Event()

    def wait() -> None:
        number = signal.sigwait(_ENDS)
        if not is_over.is_set():
            logger.info("%s: killing the jobs", signal.Signals(number).name)
            hurry()

    # A daemon, so that a `hurry` which hangs does not keep the program alive.
    thread = threading.Thread(target=wait, name="hurry", daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread can be started, so nobody hurries
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        if thread.is_alive():
            os.kill(os.getpid(), signal.SIGTERM)  # for `sigwait`; all threads block it
            thread.join(_JOIN_S)


class _Reloader:
    """Reloads in a thread of its own, so that SIGTERM is served while a reload takes its time."""

    def __init__(self, reload: Callable[[], object], manager: ServiceManager) -> None:
        self._reload = reload
        self._manager = manager
        # Guards the two below. Notified when one of them is set. Never held during a reload.
        self._changed = threading.Condition()
        self._is_requested = False
        self._is_closed = False
        # A daemon, so that a reload which hangs does not keep the program alive.
        self._thread = threading.Thread(target=self._run, name="reload", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Have the server reload; requests that come during a reload are served by one more."""
        with self._changed:
            self._is_requested = True
            self._changed.notify()

    def close(self) -> None:
        """End the thread; does not wait for a reload that hangs."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_requested or self._is_closed)
                if self._is_closed:
                    return
                self._is_requested = False
            now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self._manager.tell("RELOADING=1", f"MONOTONIC_USEC={now_us}")
            self._reload()
            self._manager.tell("READY=1")


def end_if_grpc_ends(server: Servable) -> None:
    """Make the program end if an exception ends the thread in which gRPC accepts calls.

    The server would answer no call from then on. The systemd unit restarts a program that ends.
    """

    def on_exception(args: threading.ExceptHookArgs) -> None:
        if args.thread not in server.grpc_threads:
            threading.__excepthook__(args)
            return
        try:
            logger.critical(
                "gRPC's accepting thread has ended (%s: %s), so no call would be answered; "
                "killing the jobs and ending",
                *(args.exc_type.__name__, args.exc_value),
            )
            threading.__excepthook__(args)
            faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
            # Not `server.stop`: it waits for the thread that has ended.
            server.kill_jobs()
        finally:  # also if there is no memory, or no room for the thread of the watchdog
            os._exit(1)

    threading.excepthook = on_exception


def keep_memory() -> None:
    """Make malloc keep the memory of a stream's message for the next message.

    By default glibc returns it to the kernel, and the kernel clears it again for the next
    message. That took a third of the CPU time of a stream. Each arena of malloc now keeps up
    to 2 MiB of free memory. There are only four arenas, so that this stays little.
    """
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1024 * 1024)
        mallopt(_M_TRIM_THRESHOLD, 2 * 1024 * 1024)
        mallopt(_M_ARENA_MAX, 4)
