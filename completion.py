"""Completion for bash, zsh and fish: the scripts, and the words that fit.

    eval "$(client completion bash)"     # in ~/.bashrc
    client completion fish | source      # in ~/.config/fish/config.fish

A script sends the words of the command line up to the cursor to `client completion SHELL
--candidates`, on stdin, because other users can see the arguments of a process and a word may be
a password. It gets a line for each word that fits at the cursor: the word, a tab, what it means.
Without a line the shell completes the names of files.

Thread safety: only the main thread of the program uses this module.

Sources: bash(1), "Programmable Completion"; zshcompsys(1); complete(1) of fish.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys

from cli import make_parsers, parse_connection, printable
from connection import Client, ClientError, check_address
from profiles import apply_profile, profile_names
from replacing import MOST_BYTES

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    import workerservice_pb2 as worker_pb

__all__ = ["completion"]

_OF_CLONE = os.path.join(os.path.dirname(os.path.realpath(__file__)), "client")
_PATIENCE_S = 3  # nobody waits longer for an answer to the Tab key
_JOB_WORDS = 60  # how much of a job's command line is shown
# The user may press Enter right after Tab, so no word of a server may mean something to the shell.
_SAFE = re.compile(r"[\w.@%+-]+", re.ASCII)

_SCRIPTS = {
    "bash": """\
_job_worker_client() {
    local line=${COMP_LINE:0:COMP_POINT} words found
    read -ra words <<<"$line"
    [[ $line != *[[:space:]] ]] || words+=("")
    mapfile -t found < <(printf '%s\\n' "${words[@]:1}" |
        PROGRAM completion bash --candidates 2>/dev/null)
    COMPREPLY=("${found[@]%%$'\\t'*}")
}
complete -o default -F _job_worker_client NAME
""",
    "zsh": """\
_job_worker_client() {
    local word text found=()
    while IFS=$'\\t' read -r word text; do
        found+=("${word//:/\\\\:}:$text")
    done < <(printf '%s\\n' "${(@)words[2,CURRENT]}" |
        PROGRAM completion zsh --candidates 2>/dev/null)
    if (( $#found )); then _describe client found; else _files; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _job_worker_client NAME
""",
    "fish": """\
function __job_worker_client
    set -l words (commandline -opc) (commandline -ct)
    set -l found (printf '%s\\n' $words[2..] | PROGRAM completion fish --candidates 2>/dev/null)
    if set -q found[1]
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c NAME -f -a '(__job_worker_client)'
""",
}


def completion(arguments: argparse.Namespace) -> int:
    """Print the script for `arguments.shell`, or what fits after the words on stdin."""
    if not arguments.candidates:
        # Without a clone the program is a command that pip has installed.
        program = _OF_CLONE if os.path.exists(_OF_CLONE) else os.path.realpath(sys.argv[0])
        script = _SCRIPTS[arguments.shell].replace("NAME", os.path.basename(program))
        print(script.replace("PROGRAM", shlex.quote(program)), end="")
        return 0
    words = sys.stdin.read(MOST_BYTES).removesuffix("\n").split("\n")
    for word, text in _candidates(words[:-1], words[-1]):
        if word.startswith(words[-1]):
            print(f"{word}\t{printable(text)}")
    return 0


def _candidates(before: Sequence[str], word: str) -> Iterator[tuple[str, str]]:
    """Yield the words that may stand after `before`, each with its meaning.

    `word` is what has been typed of it; words that do not begin so may be among the answers.
    """
    main, subparsers = make_parsers()
    if not before:
        yield from ((name, parser.description or "") for name, parser in subparsers.items())
        yield from _options(main.added)
        return
    name = before[0]
    if name not in subparsers:
        return
    options = {each: action for action in subparsers[name].added for each in action.option_strings}
    wanted = None  # the option whose value comes next
    for each in before[1:]:
        if each in options:
            wanted = None if options[each].nargs == 0 else options[each]
        elif name in {"start", "run"} and wanted is None:
            return  # the job's own words have begun
        elif wanted is not None and wanted.nargs != "+":
            wanted = None
    if word.startswith("-"):
        yield from _options(subparsers[name].added)
        return
    if wanted is None:
        wanted = next((each for each in subparsers[name].added if not each.option_strings), None)
    if wanted is not None:
        yield from _values(wanted, before)


def _options(actions: Sequence[argparse.Action]) -> Iterator[tuple[str, str]]:
    """Yield the long form of each option, which explains itself, or else its short form."""
    for action in actions:
        if action.option_strings:
            yield action.option_strings[-1], (action.help or "").replace("%%", "%")


def _values(action: argparse.Action, before: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what can be the value of an option or stand for itself."""
    if action.choices:
        yield from ((str(choice), "") for choice in action.choices)
    elif action.dest == "profile":
        yield from ((name, "") for name in profile_names() if _SAFE.fullmatch(name))
    elif action.dest == "signal":
        yield from ((each.name.removeprefix("SIG"), "") for each in signal.Signals)
    elif action.dest == "job":
        for job in _jobs(before):
            command = printable(shlex.join([job.command, *job.args]))[:_JOB_WORDS]
            for text in filter(_SAFE.fullmatch, (job.name, job.job_id)):
                yield text, command


def _jobs(before: Sequence[str]) -> Sequence[worker_pb.Job]:
    """Return the jobs that the subcommand can be about, newest first; none if nobody answers."""
    from credentials import find_token

    arguments = parse_connection(before)
    try:
        apply_profile(arguments)
        check_address(arguments.server)
        with Client(
            arguments.server,
            certs=arguments.certs,
            cert=arguments.cert,
            key=arguments.key,
            ca=arguments.ca,
            token=find_token(arguments),
        ) as client:
            # The default action of SIGALRM ends this process, whatever it waits for.
            signal.alarm(_PATIENCE_S)
            jobs = client.list()
            signal.alarm(0)
    except ClientError:
        return []
    running = {"stop": True, "signal": True, "remove": False}.get(before[0])
    return [job for job in reversed(jobs) if running in {None, not job.HasField("ended_at")}]
