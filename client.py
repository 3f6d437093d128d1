"""The program `client`: runs one subcommand of the command line and ends with an exit status.

    python client.py login -u user
    python client.py start -- ls -l /

Programs import the class from here: `from client import Client`. It is in `connection.py`;
the options are in `cli.py`, the subcommands in `commands.py`.

Thread safety: only the main thread of the program uses this module.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys

from cli import EXIT_UNKNOWN, hide_secrets, parse, warn
from connection import Client, ClientError, check_address
from retrying import CONNECT_S
from standardstreams import prepare_streams

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Client", "ClientError", "main"]

_EXIT_ERROR = 1
_EXIT_SIGINT = 128 + 2  # like a shell
_EXIT_SIGPIPE = 128 + 13

# These subcommands stand in scripts. So they wait for a server that is just being restarted, even
# if they have not reached it before. Others are typed by people, who want to know at once.
_PATIENT = {"run", "start", "stop", "signal", "status", "stream", "wait", "remove", "send"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process; return the exit status.

    Raises SystemExit after --help and for wrong usage.
    """
    # The client reports errors in one line; gRPC would log a failed handshake as well.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if argv is not None:
        return _status_of(argv, own_process=False)
    prepare_streams(may_be_closed=False)
    try:
        return _status_of(sys.argv[1:], own_process=True)
    except KeyboardInterrupt:  # while an error was told
        return _EXIT_SIGINT
    finally:
        # From here on a Ctrl-C changes the exit status no more. Python, which needs a while for its
        # own end, would tell it with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _status_of(argv: Sequence[str], *, own_process: bool) -> int:
    # Any other status would look like the exit code of the job.
    exit_error = EXIT_UNKNOWN if argv[:1] in (["run"], ["wait"]) else _EXIT_ERROR
    try:
        return _run(argv, own_process=own_process)
    except ClientError as error:
        warn(str(error))
        return exit_error
    except KeyboardInterrupt:
        return _EXIT_SIGINT
    except UnicodeEncodeError as error:
        warn(
            f"an argument is not valid UTF-8: {error.object!r}; to send other bytes, put the "
            "command into a script, and: client run -i -- sh -s <SCRIPT"
        )
        return exit_error
    except OSError as error:
        # Stdout still holds output that it cannot write. At exit Python would try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return _EXIT_SIGPIPE
        where = "write to stdout" if error.filename is None else f"use {error.filename}"
        warn(f"cannot {where}: {error.strerror or error}")
        return exit_error


def _run(argv: Sequence[str], *, own_process: bool) -> int:
    if sys.stdin is None or sys.stdout is None:
        raise ClientError("stdin and stdout must be open; use </dev/null or >/dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal does not have is shown as an escape.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run_subcommand(argv, own_process=own_process)
    finally:
        sys.stdout.flush()


def _run_subcommand(argv: Sequence[str], *, own_process: bool) -> int:
    arguments = parse(argv)
    if own_process:
        hide_secrets(argv[: arguments.own_words], arguments.secrets)
        # No imported object ever becomes garbage. Looking for garbage during imports and at
        # exit took a fifth of the time of a call.
        gc.disable()
    if arguments.subcommand == "completion":
        from completion import completion

        return completion(arguments)
    if arguments.subcommand == "import":
        from importing import import_command

        return import_command(arguments)
    from commands import COMMANDS  # here because --help needs neither
    from credentials import find_token, keep_newer, warnings_before_expiry

    check_address(arguments.server)
    token = "" if arguments.subcommand == "login" else find_token(arguments)
    retry_for = 0.0 if getattr(arguments, "no_retry", False) else arguments.retry_for
    connect_for = CONNECT_S if arguments.subcommand in _PATIENT else 0.0
    with Client(
        arguments.server,
        certs=arguments.certs,
        cert=arguments.cert,
        key=arguments.key,
        ca=arguments.ca,
        token=token,
        retry_for=retry_for,
        connect_for=connect_for if retry_for is None else retry_for,
        on_wait=_tell_wait,
        on_new_token=keep_newer(arguments),
    ) as client:
        if own_process:
            gc.freeze()
            gc.enable()  # a stream may run for days
        for warning in warnings_before_expiry(client, arguments):
            warn(warning)
        try:
            return COMMANDS[arguments.subcommand](client, arguments) or 0
        except ClientError as error:
            from hints import explain

            raise ClientError(explain(error, client, arguments), error.code) from error


def _tell_wait(error: ClientError) -> None:
    """Tell somebody at a terminal why nothing happens. A script gets the error at the end."""
    if sys.stderr.isatty():
        warn(f"{error}; trying again, Ctrl-C ends this")


if __name__ == "__main__":
    sys.exit(main())
