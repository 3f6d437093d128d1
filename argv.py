"""The argv of a job: what a command and its arguments may be.

    argv = checked_argv("echo", ["hello"])

Thread safety: there is no state.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_ARGV_BYTES", "checked_argv"]

MAX_ARGV_BYTES: Final = 128 * 1024
"""The longest argv, in bytes with a terminator each; xargs(1) has the same by default."""


def checked_argv(command: str, args: Sequence[str]) -> list[str]:
    """Return command and arguments as one list. Raises `CommandError`, TypeError."""
    if isinstance(args, (str, bytes)):
        raise TypeError("args must be a sequence of strings, not one string")
    argv = [command, *args]
    for argument in argv:
        if not isinstance(argument, str):
            raise TypeError(f"command and args must be strings, not {type(argument).__name__}")
    if not command:
        raise CommandError(command, "the command is empty")
    if any("\0" in argument for argument in argv):
        raise CommandError(command, "the command or an argument contains a NUL character")
    try:
        size = sum(len(os.fsencode(argument)) + 1 for argument in argv)
    except UnicodeEncodeError as error:
        raise CommandError(command, f"it cannot be encoded: {error}") from error
    if size > MAX_ARGV_BYTES:
        raise CommandError(
            command, f"command and arguments have {size} bytes; the limit is {MAX_ARGV_BYTES}"
        )
    return argv
