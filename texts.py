"""What the command line says of itself, and how it shows what others say.

It imports nothing, so that `client --help` answers at once.
"""

from __future__ import annotations

__all__ = ["HELP", "SUBCOMMANDS", "printable"]

# Each subcommand, and what it does.
SUBCOMMANDS = {
    "login": "Exchange a password for a token; print the token and keep it",
    "logout": "Make the token worthless for good, and delete it where login keeps it",
    "start": "Start a job and print its ID",
    "stop": "Kill every process of a job; returns when they are gone",
    "status": "Show how a job is doing",
    "stream": "Write a job's output to stdout, from its start until it ends",
    "remove": "Forget a finished job and delete its output",
    "list": "List the jobs you may see",
}

HELP = """\
usage: client [-h] SUBCOMMAND ...

Run commands on a job-worker server, watch their output, stop them.

subcommands (client SUBCOMMAND --help tells the options of one):
{subcommands}

options:
  -h, --help  show this help message and exit

environment: JOBWORKER_SERVER, JOBWORKER_CERTS, JOBWORKER_TOKEN stand for
--server, --certs and -t. The token is looked for in -t, then JOBWORKER_TOKEN,
then where login keeps it. Exit status: 0; 1 for an error, with one line on
stderr; 2 for wrong usage; 130 after Ctrl-C; 141 when whatever reads the output
has gone.
""".format(subcommands="\n".join(f"  {name:<8}{text}" for name, text in SUBCOMMANDS.items()))


def printable(text: str) -> str:
    """Somebody else chose this text; do not let it steer our terminal.

    Control characters, line ends, what changes the direction of text, and lone
    surrogates become escapes like `\\x1b`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
