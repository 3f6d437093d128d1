"""Property-based tests of the command line: any words lead to one line and no traceback."""

from __future__ import annotations

import contextlib
import io
import os
import string
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
import display
import listing
import workerservice_pb2 as worker_pb
from client import main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_EXAMPLES = settings(
    deadline=None,
    max_examples=300,
    # The fixtures only say where the certificates are and that nothing of ours is set.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# What the kernel can hand to a program: any bytes but NUL, as Python decodes them.
_WORDS = st.one_of(
    st.text(max_size=20).map(lambda text: text.encode(errors="replace").decode()),
    st.binary(max_size=20).map(os.fsdecode),
    st.sampled_from(
        ["", "-", "--", "---", "=", " ", "\x1b[31m", "\u202e", "a\nb", "%s", "{}", "~"]
    ),
).map(lambda text: text.replace("\0", ""))
_PARSERS: dict[str, Any] = dict(cli.make_parsers()[1])


def _takes_a_token(subcommand: str) -> bool:
    return subcommand not in {"login", "completion", "import"}


_SUBCOMMANDS = st.sampled_from(sorted(_PARSERS))
_OPTIONS = st.sampled_from(
    sorted(
        {
            option
            for parser in _PARSERS.values()
            for action in parser._actions
            for option in action.option_strings
        }
        - {"--server"}  # other names would be looked up in the network
    )
)
_NUMBERS = st.one_of(
    st.integers(-(1 << 70), 1 << 70).map(str),
    st.floats().map(str),
    st.sampled_from(["9" * 5000, "0" * 5000, "-0", "+1", "1_0", "1e999", "nan", "٣", "²", "0x1"]),
    st.tuples(st.integers(0, 1 << 66), st.sampled_from(["K", "M", "GiB", "T", "X", " ", "/s"])).map(
        lambda parts: f"{parts[0]}{parts[1]}"
    ),
)
_ARGUMENTS = st.lists(
    st.one_of(
        _WORDS,
        _OPTIONS,
        _NUMBERS,
        st.tuples(_OPTIONS, st.sampled_from(["", "="]), _WORDS).map("".join),
    ),
    max_size=8,
)


@pytest.fixture
def nobodys(certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options with good certificates, for an address where no server listens."""
    for name in ("JOBWORKER_SERVER", "JOBWORKER_CERTS", "JOBWORKER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    # TCPMUX, which nobody has; and do not wait for a server that might be restarting.
    return ["--certs", str(certs), "--server", "127.0.0.1:1", "--retry-for", "0"]


@contextlib.contextmanager
def _streams() -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    """Give this process an empty stdin, and stdout and stderr as strict as a program's."""
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    before = sys.stdin
    sys.stdin = io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            yield stdout, stderr
    finally:
        sys.stdin = before


def _run(argv: list[str]) -> tuple[Any, str, str]:
    """Return exit status, stdout and stderr."""
    with _streams() as (stdout, stderr):
        try:
            status: Any = main(argv)
        except SystemExit as caught:
            status = caught.code
        stderr.flush()
        printed = [stream.buffer.getvalue().decode() for stream in (stdout, stderr)]  # type: ignore[attr-defined]
    return status, printed[0], printed[1]


def _check(argv: list[str]) -> tuple[Any, str]:
    """Run a command line, check what must hold for all; return exit status and stderr."""
    status, stdout, stderr = _run(argv)
    if status == 0:  # help
        assert stdout.startswith("usage: client")
        assert stderr == ""
    else:
        assert status in ({125} if argv[:1] in (["run"], ["wait"]) else {1, 2})
        assert stdout == ""
        assert stderr.startswith("client")
        assert stderr.endswith("\n")
        assert all(c.isprintable() for c in stderr[:-1]), ascii(stderr)
    return status, stderr


@_EXAMPLES
@given(words=_ARGUMENTS)
def test_any_words_are_help_or_an_error_of_one_line(nobodys: list[str], words: list[str]) -> None:
    """Mostly without a subcommand, or with an unknown one."""
    del nobodys
    status, _ = _check(words)
    assert status in {0, 2}


@_EXAMPLES
@given(subcommand=_SUBCOMMANDS, words=_ARGUMENTS)
def test_any_arguments_are_help_or_an_error_of_one_line(
    nobodys: list[str], subcommand: str, words: list[str]
) -> None:
    """After each subcommand."""
    _check([subcommand, *nobodys, *words])


@_EXAMPLES
@given(user=_WORDS, password=_WORDS, joined=st.booleans())
def test_any_user_and_password_are_sent_or_told(
    nobodys: list[str], user: str, password: str, joined: bool
) -> None:
    """The call fails because there is no server. No line repeats the password."""
    secret = f"hunter2{password}"
    words = [f"--password={secret}"] if joined else ["-p", secret]
    status, stderr = _check(["login", *nobodys, f"--user={user}", *words])
    assert status == (2 if user in {"", "--"} else 1)
    assert "hunter2" not in stderr


@_EXAMPLES
@given(subcommand=_SUBCOMMANDS.filter(_takes_a_token), token=_WORDS, size=st.integers(0, 3))
def test_any_token_is_sent_or_told(
    nobodys: list[str], subcommand: str, token: str, size: int
) -> None:
    """The token has any size and characters. No line repeats it."""
    secret = f"hunter2{token * 10 ** (2 * size)}"
    words = {"start": ["true"], "run": ["true"], "list": [], "logout": [], "whoami": []}
    more = words.get(subcommand, ["-j", "x"])
    status, stderr = _check([subcommand, *nobodys, f"--token={secret}", *more])
    assert status == (125 if subcommand in {"run", "wait"} else 1)
    assert "hunter2" not in stderr


@_EXAMPLES
@given(job_id=_WORDS, offset=_NUMBERS)
def test_any_job_and_offset_are_sent_or_told(nobodys: list[str], job_id: str, offset: str) -> None:
    """Only a number of 64 bits is an offset, and no job begins with a dash."""
    status, _ = _check(["stream", *nobodys, "-t", "x", f"--job={job_id}", f"--offset={offset}"])
    is_number = set(offset) <= set(string.digits) and len(offset) <= 20
    is_right = is_number and int(offset) < 1 << 64 and not job_id.startswith("-")
    assert status == (1 if is_right else 2)


@_EXAMPLES
@given(option=st.sampled_from(sorted(cli.LIMIT_OPTIONS)), value=st.one_of(_NUMBERS, _WORDS))
def test_any_limit_is_sent_or_told(nobodys: list[str], option: str, value: str) -> None:
    """An accepted value fits into its field of the message."""
    _check(["start", *nobodys, "-t", "x", f"{option}={value}", "true"])


@_EXAMPLES
@given(words=st.lists(_WORDS, min_size=1, max_size=6))
def test_any_words_of_a_job_are_the_jobs(words: list[str]) -> None:
    """Any words after `-args`, `--args` or `--` belong to the job."""
    for ours in (["-c", "x", "-args"], ["-t", "x", "-c=x", "--args"]):
        assert cli.parse(["start", *ours, *words]).args == words
    parsed = cli.parse(["start", "-t", "x", "--", *words])
    assert [parsed.command, *parsed.args] == words


@_EXAMPLES
@given(
    host=st.one_of(
        _WORDS.map("127.0.0.1:".__add__),
        _WORDS.map("no..such..host".__add__),
        _WORDS.map("unix:/nowhere/".__add__),
        _WORDS.map("[::1".__add__),
        _NUMBERS.map("127.0.0.1:".__add__),
    )
)
def test_any_server_is_an_error_of_one_line(nobodys: list[str], host: str) -> None:
    """An impossible name, or a name without a server."""
    status, _ = _check(["list", *nobodys, "-t", "x", f"--server={host}"])
    assert status == 1


_TEXTS = st.text(max_size=20)


@_EXAMPLES
@given(
    job=st.builds(
        worker_pb.Job,
        job_id=_TEXTS,
        owner=_TEXTS,
        command=_TEXTS,
        args=st.lists(_TEXTS, max_size=3),
        subscribers=st.lists(_TEXTS, max_size=3),
        exit_code=st.integers(-(1 << 31), (1 << 31) - 1),
        signal=st.integers(-(1 << 31), (1 << 31) - 1),
        status=st.integers(0, 9),
        end_reason=st.integers(0, 9),
        output_bytes=st.integers(0, (1 << 64) - 1),
        output_lost_bytes=st.integers(0, (1 << 64) - 1),
        usage=st.builds(worker_pb.Usage, cpu_user_s=st.floats(), source=st.integers(0, 9)),
        limits=st.builds(
            worker_pb.Limits, cpu_cores=st.floats(), memory_bytes=st.integers(0, (1 << 64) - 1)
        ),
    )
)
def test_any_job_is_shown_on_lines_of_its_own(job: worker_pb.Job) -> None:
    """Any job has eleven lines in `status`, and one in `list`. JSON is ASCII."""
    with _streams() as (stdout, _):
        stdout.write(display.describe(job) + "\n")
        stdout.write("\n".join(listing._table([job], None)) + "\n")
        stdout.flush()
        shown = stdout.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert shown.count("\n") == 13
    assert all(c.isprintable() or c == "\n" for c in shown), ascii(shown)
    with _streams() as (stdout, _):
        display.print_json(display.to_dict(job))
        stdout.flush()
        assert stdout.buffer.getvalue().isascii()  # type: ignore[attr-defined]
