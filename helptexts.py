"""What `--help` says beside the options: each subcommand in a line, and how it is used.

`cli.py` makes the parsers with these texts. A new subcommand needs a line in
`SUBCOMMANDS`, a usage in `USAGES` and examples in `EXAMPLES`.
"""

__all__ = ["EPILOG", "EXAMPLES", "SUBCOMMANDS", "USAGES"]

SUBCOMMANDS = {
    "login": "Exchange a password for a token; print the token and keep it",
    "logout": "Make the token invalid for good, and delete the kept one",
    "whoami": "Show user, role, server, and when session, token, certificate end",
    "start": "Start a job and print its ID",
    "run": "Start a job, write its output to stdout, and exit with its exit code",
    "stop": "Kill every process of a job; returns when they are gone",
    "signal": "Send a signal to a job",
    "status": "Show the state of a job",
    "stream": "Write a job's output to stdout, from its start until the job ends",
    "send": "Send stdin to a job started with --stdin, after what it has got",
    "remove": "Forget a finished job and delete its output",
    "list": "List the jobs you may see, the newest last",
    "wait": "Wait until jobs have ended, and exit with the exit code of the last one named",
    "import": "Make a profile of the bundle that the server's operator has made for you",
    "completion": "Print a script with which your shell completes options, subcommands and jobs",
}
EPILOG = """\
"client SUBCOMMAND --help" shows the options of a subcommand. The environment variables
JOBWORKER_SERVER, JOBWORKER_CERTS, JOBWORKER_PROFILE and JOBWORKER_TOKEN are the defaults of
--server, --certs, --profile and -t; without -t and JOBWORKER_TOKEN the client uses the token
that login kept. Exit status: 0 for success; 1 for an error, with one line on stderr; 2 for
wrong usage; 130 after Ctrl-C; 141 when the reader of the output has closed it. "stream" also
exits with 1 if the job was killed, stopped or lost; an exit code of the job is no error. "run"
and "wait" exit like the job.
"""
USAGES = {
    "start": """\
client start [OPTIONS] -c COMMAND [-args A1 A2 ...]
       client start [OPTIONS] [--] COMMAND [A1 A2 ...]""",
    "run": "client run [OPTIONS] [--] COMMAND [A1 A2 ...]",
    "login": "client login [OPTIONS] -u USER",
    "logout": "client logout [OPTIONS]",
    "whoami": "client whoami [OPTIONS]",
    "stop": "client stop [OPTIONS] JOB ... | --all",
    "signal": "client signal [OPTIONS] JOB ...",
    "status": "client status [OPTIONS] JOB ...",
    "stream": "client stream [OPTIONS] JOB",
    "send": "client send [OPTIONS] JOB",
    "remove": "client remove [OPTIONS] JOB ... | --finished",
    "list": "client list [OPTIONS]",
    "wait": "client wait [OPTIONS] JOB ...",
    "import": "client import [--as NAME] [--replace] FILE",
    "completion": "client completion bash|zsh|fish",
}
EXAMPLES = {
    "login": """\
examples:
  client login -u alice                  asks for the password
  client login -u alice -p - <secret     reads it from a file
  client login --profile work            a profile may have server and user
""",
    "logout": """\
example:
  client logout
""",
    "whoami": """\
The client reads this from the token and the certificate; the server is not
asked.

examples:
  client whoami
  client whoami --json | jq -r .token_expires_at
""",
    "start": """\
examples:
  client start -- ls -l /
  client start -c ls -args -l /          the same
  client start --name nightly --label team=data -- make check
  client start --memory 2G --cpus 4 -- make -j4
  client start --cwd src --env CC=clang --env-file job.env -- make
  client start --keep-tmp --env HTTPS_PROXY -- ./report.sh   HTTPS_PROXY as here
  client start --timeout 30m --grace 10s -- make check     SIGTERM after 30 min.
  client start -- sh -c 'du -s * | sort -n'      a shell for pipes and globs
  job=$(client start -- sleep 60); client stop -j $job
""",
    "run": """\
The output is the job's stdout and stderr, in the order of writing.

Exit status: that of the job; 128 + N if signal N ended it; 125, with the
reason on stderr, if it could not be started or its end is unknown. Ctrl-C
sends SIGINT to the job. A second Ctrl-C stops the job, a third one leaves it
as it is.

examples:
  client run -- hostname
  client run --memory 1G -- make -j4
  client run --timeout 30m -- make check
  client run -i -- sh -s < script.sh     the job reads what the client reads
  client run -d -- sleep 60              prints the ID and returns
""",
    "stop": """\
examples:
  client stop nightly                    a name
  client stop 3fa9b1c2 77ab              the beginnings of IDs
  client stop --grace 10s nightly        SIGTERM, and SIGKILL after 10 s
  client stop --all --label team=data
""",
    "signal": """\
examples:
  client signal 3fa9b1c2                 SIGTERM to the command
  client signal -s HUP nightly
  client signal -s KILL --all nightly    to every process of the job
""",
    "status": """\
examples:
  client status 3fa9b1c2
  client status nightly --json | jq .exit_code
""",
    "stream": """\
The output is the job's stdout and stderr, in the order of writing.

Exit status: 1 if the job did not exit by itself, or output is missing.

examples:
  client stream 3fa9b1c2
  client stream 3fa9b1c2 >output.bin    output is bytes, as the job wrote them
  client stream 3fa9b1c2 --offset 1000  all but the first 1000 bytes
  client stream nightly --tail 20       the last 20 lines, and what follows
  client stream nightly --since 10m --timestamps --no-follow
""",
    "send": """\
examples:
  client send JOB --again <input         continue an interrupted "start -i"
  client send JOB -k <part               send a part, and leave the input open
  client send JOB </dev/null             end the input
""",
    "remove": """\
examples:
  client remove 3fa9b1c2
  client remove --finished --name nightly
""",
    "list": """\
examples:
  client list
  client list --status running --label team=data
  client list -q --name nightly --limit 1
  client list --json | jq -r .job_id
  client list --watch                    like top
""",
    "wait": """\
Exit status: the exit code of the job named last; 128 + N if signal N ended it;
125 if its end is unknown; 124 after --timeout.

examples:
  client wait nightly
  client wait --any --timeout 10m 3fa9b1c2 77ab
""",
    "import": """\
examples:
  client import alice.tar                the profile used without --profile
  client import --as work alice.tar      the profile `work`
  client import --replace alice.tar      a new certificate for `default`
""",
    "completion": """\
examples:
  eval "$(client completion bash)"       in ~/.bashrc
  eval "$(client completion zsh)"        in ~/.zshrc, after compinit
  client completion fish | source        in ~/.config/fish/config.fish
""",
}
