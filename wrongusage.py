"""What is wrong with a command line: the words of the errors that end with exit status 2.

    error = describe_first_word("staus", ["start", "status"], [])  # "...; did you mean status?"

`cli.py` parses the command line, and exits with these errors.

Thread safety: there is no state.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Sequence
    from typing import Any

__all__ = ["describe_first_word", "describe_unknown", "describe_wrong_value"]

_OF_THE_JOB = {"args", "words"}  # may be anything
_TOLD_ELSEWHERE = {"command", "env", "job", "password"}  # that these are empty
_REPEATED = {"env", "env_files", "job", "labels", "statuses"}
# What users of other programs type.
_SYNONYMS = {
    "exec": "run",
    "kill": "stop",
    "log": "stream",
    "logs": "stream",
    "ls": "list",
    "ps": "list",
    "rm": "remove",
    "tail": "stream",
}


def describe_first_word(word: str, subcommands: Sequence[str], options: Collection[str]) -> str:
    """Say what is wrong with a first word that is no subcommand; empty if nothing is.

    `options` are those of all subcommands.
    """
    if not word:
        return "the subcommand is missing; begin with: client login -u USER"
    if not word.startswith("-"):
        return f"there is no subcommand {word!r}{_similar(word, subcommands)}"
    if word in {"-h", "--help", "--version"}:
        return ""
    if word.partition("=")[0] in options:
        return "options stand after the subcommand, like: client list --server HOST:PORT"
    return describe_unknown([word], ["--help", "--version"])


def describe_unknown(words: Sequence[str], options: Sequence[str]) -> str:
    """Name the first unknown word, but not a value: a value may be a secret."""
    word = words[0]
    if word.startswith("--"):
        name = word.partition("=")[0]
        return f"unknown option {name}{_similar(name, options)}"
    if word.startswith("-"):
        return f"unknown option {word[:2]}"
    return "there is a word too many, or one whose option is missing"


def describe_wrong_value(actions: Sequence[argparse.Action], arguments: argparse.Namespace) -> str:
    """Say which value is wrong for any option; "" if none is.

    It is `--`, or empty like a shell's variable that is not set, or a label contradicts another. An
    empty --name must not become "any name", nor an empty --token "the kept one".
    """
    for action in actions:
        if action.dest in _OF_THE_JOB:
            continue
        value: Any = vars(arguments).get(action.dest)
        values: Any = value if action.dest in _REPEATED else [value]
        name = action.option_strings[-1] if action.option_strings else action.metavar
        # Python 3.11 reads `--opt=--` as an empty list, 3.13 as `--`.
        if any(each in ([], "--", ["--"]) for each in values):
            return f"-- cannot be the value of {name}"
        if action.dest == "labels" and len(set(value)) > len(dict(value)):
            return f"{name} gives one key two values; a job has one value for a key"
        if "" in values and action.dest not in _TOLD_ELSEWHERE:
            return f"the value of {name} is empty; is it a shell variable that is not set?"
    return ""


def _similar(word: str, known: Sequence[str]) -> str:
    """Return a question about the known word that is meant or most like this one, or nothing."""
    import difflib

    by_name = {each.strip("-"): each for each in known}  # dashes are no likeness
    near = difflib.get_close_matches(word.strip("-"), by_name, 1)
    meant = _SYNONYMS.get(word) or (by_name[near[0]] if near else "")
    return f"; did you mean {meant}?" if meant else ""
