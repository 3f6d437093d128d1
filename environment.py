"""What a job finds around it when it begins: its account, its directory, its environment.

    account = account_of(os.geteuid())
    around = Surroundings("make", account, {"CC": "clang"}, "src")
    around.directory                         # "/home/alice/src"
    around.variables(job_id, {})             # all variables of the job, HOME and PATH included

Nothing of the main process's own environment reaches a job, because it may be secret. The variables
that a job asks for act only when the job's user executes the command. LD_PRELOAD and the like
therefore reach no process with more rights.

Thread safety: there is no shared state.

Sources: environ(7); login(1) and systemd.exec(5) for the variables of a login.
"""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING, Final, NamedTuple

from errors import CommandError, shorten

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_ENVIRONMENT_BYTES", "PATH", "Account", "Surroundings", "account_of", "problem_of"]

MAX_ENVIRONMENT_BYTES: Final = 128 * 1024
"""The most that a job's own variables may have: NAME=VALUE and a terminator for each."""

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHELL = "/bin/sh"
_NO_HOME = "/"
# A job has no terminal. Without PYTHONUNBUFFERED, what a Python program prints stays in the program
# until 8 KiB have come together.
_ALWAYS = {"PATH": PATH, "LANG": "C.UTF-8", "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


class Account(NamedTuple):
    """The user that a job runs as, as the job is told."""

    name: str
    home: str = _NO_HOME
    shell: str = _SHELL


def account_of(uid: int, name: str = "") -> Account:
    """Return the host's account of this uid, or one without a home if the host has none.

    `name`: of the account that the host does not have; default: the number.
    """
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return Account(name or str(uid))
    return Account(user.pw_name, user.pw_dir or _NO_HOME, user.pw_shell or _SHELL)


def problem_of(variables: Mapping[str, str]) -> str:
    """Return why a job cannot have these variables; "" if it can."""
    size = 0
    for name, value in variables.items():
        if not name or "=" in name:
            return f"{shorten(name)!r} cannot be the name of an environment variable"
        if "\0" in name or "\0" in value:
            return f"the environment variable {shorten(name)!r} contains a NUL character"
        try:
            size += len(os.fsencode(name)) + len(os.fsencode(value)) + 2
        except UnicodeEncodeError as error:
            return f"the environment variable {shorten(name)!r} cannot be encoded: {error.reason}"
    if size > MAX_ENVIRONMENT_BYTES:
        return f"the environment has {size} bytes; the limit is {MAX_ENVIRONMENT_BYTES}"
    return ""


class Surroundings:
    """The account, the directory and the variables of one job.

    `own`: the variables that the job asks for. `cwd`: the directory that it asks for; a relative
    path begins at the home; "" is the home. Raises `CommandError` for the job's `command` if the
    job cannot have them. Attributes: `account`; `asked`, the absolute path of the directory that
    the job asks for, or None.
    """

    def __init__(self, command: str, account: Account, own: Mapping[str, str], cwd: str) -> None:
        problem = problem_of(own)
        if not problem and "\0" in cwd:
            problem = "the working directory contains a NUL character"
        try:
            os.fsencode(cwd)
        except UnicodeEncodeError as error:
            problem = f"the working directory cannot be encoded: {error.reason}"
        if problem:
            raise CommandError(command, problem)
        self.account = account
        self.asked = os.path.join(account.home, cwd) if cwd else None
        self._own = own

    @property
    def directory(self) -> str:
        """The absolute path of the job's directory."""
        return self.account.home if self.asked is None else self.asked

    def variables(
        self, job_id: str, configured: Mapping[str, str], tmp: str = ""
    ) -> dict[str, str]:
        """Return the job's whole environment. What the job asks for replaces what is `configured`.

        `configured`: the variables that all jobs get. `tmp`: TMPDIR; "" for /tmp.
        """
        account = self.account
        told = {"HOME": account.home, "USER": account.name, "LOGNAME": account.name}
        told |= {"SHELL": account.shell, "TMPDIR": tmp or "/tmp"}  # noqa: S108 -- as POSIX has it
        return _ALWAYS | told | {**configured} | {**self._own} | {"JOB_ID": job_id}
