"""Where the command line begins: it runs one subcommand, and ends with an exit status.

It imports what a command needs when it is clear which one it is, so that each answers as
soon as it can: grpc takes 60 ms, argparse as long as Python's own start.

Thread safety: all of it is for the one thread of a program.
"""

from __future__ import annotations

import gc
import io
import os
import sys

from client import Client, ClientError
from texts import HELP, printable

TYPE_CHECKING = False  # as typing has it, whose import takes as long as Python's start
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_EXIT_ERROR = 1
_EXIT_SIGINT = 128 + 2  # as a shell tells it
_EXIT_SIGPIPE = 128 + 13


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process; return the exit status.

    Raises SystemExit after --help, and for wrong usage.
    """
    # Errors are one line, ours; gRPC would log a failed handshake on its own.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        return _run(sys.argv[1:] if argv is None else argv, own_process=argv is None)
    except KeyboardInterrupt:
        return _EXIT_SIGINT
    except UnicodeEncodeError as error:
        print(f"client: an argument is not valid UTF-8: {error.object!r}", file=sys.stderr)
        return _EXIT_ERROR
    except OSError as error:
        # What is still to be written cannot be. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read our output has had enough
            return _EXIT_SIGPIPE
        print(f"client: cannot read or write: {error.strerror or error}", file=sys.stderr)
        return _EXIT_ERROR


def _run(argv: Sequence[str], *, own_process: bool) -> int:
    try:
        _prepare_streams()
        if argv and argv[0] in {"-h", "--help"}:
            sys.stdout.write(HELP)
            sys.exit(0)
        _run_subcommand(argv, own_process=own_process)
    except ClientError as error:
        print(f"client: {printable(str(error))}", file=sys.stderr)
        return _EXIT_ERROR
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
    return 0


def _run_subcommand(argv: Sequence[str], *, own_process: bool) -> None:
    if own_process:
        # Nothing of what is imported is ever garbage. To look for some meanwhile, and when
        # the process ends, took a fifth of the time of a call.
        gc.disable()
    from arguments import parse

    arguments = parse(argv, hide=own_process)
    from commands import COMMANDS, find_token

    token = "" if arguments.subcommand == "login" else find_token(arguments)
    with Client(
        arguments.server,
        certs=arguments.certs,
        cert=arguments.cert,
        key=arguments.key,
        ca=arguments.ca,
        token=token,
    ) as client:
        if own_process:
            gc.freeze()
            gc.enable()  # a stream may run for days
        COMMANDS[arguments.subcommand](client, arguments)


def _prepare_streams() -> None:
    if sys.stdin is None or sys.stdout is None:
        raise ClientError("stdin and stdout must be open; use </dev/null or >/dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the terminal has no character for is shown as an escape.
        sys.stdout.reconfigure(errors="backslashreplace")
