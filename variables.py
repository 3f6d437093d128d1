"""The environment variables that `--env` and `--env-file` give to a job.

    read_variables(["job.env"], ["CC=clang", "LANG"])   # {"CC": "clang", "LANG": "C.UTF-8", ...}

Thread safety: there is no shared state.
"""

from __future__ import annotations

import os

from connection import ClientError
from replacing import read_small

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["read_variables"]


def read_variables(files: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    """Return the variables by their names; a word replaces what is in a file.

    A word, and a line of a file, is NAME=VALUE, or NAME for the value that the client itself has.
    Raises `ClientError`.
    """
    variables: dict[str, str] = {}
    for path in files:
        for number, line in enumerate(_lines(path), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                _add(variables, line, f"{path}, line {number}")
    for word in words:
        _add(variables, word, "--env")
    return variables


def _lines(path: str) -> list[str]:
    try:
        data = read_small(path)
    except OSError as error:
        raise ClientError(
            f"--env-file: cannot read {path}: {error.strerror}; check the path"
        ) from error
    try:
        return data.decode().splitlines()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ClientError(f"{path}, line {line}: not UTF-8; save it as UTF-8") from None


def _add(variables: dict[str, str], text: str, where: str) -> None:
    # The value may be a secret, so no message shows it.
    name, has_value, value = text.partition("=")
    if not name or name != name.strip():
        raise ClientError(f"{where}: the name of the variable is missing, or has spaces around it")
    if not has_value:
        if name not in os.environ:
            raise ClientError(f"{where}: {name} has no value here; write {name}=VALUE, or set it")
        value = os.environ[name]
    try:
        (name + value).encode()
    except UnicodeEncodeError:
        raise ClientError(f"{where}: the value of a variable must be UTF-8") from None
    variables[name] = value
