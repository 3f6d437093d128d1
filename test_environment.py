"""Tests of what a job finds around it: variables and directory, in the library and over the API."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from client import ClientError, main
from environment import MAX_ENVIRONMENT_BYTES, Account, account_of
from privileges import can_change_user, can_kill_any
from settings import ConfigError, load_config
from testkit import GUARD_S, call_rpc, run_job
from worker import CommandError, CommandNotFoundError, DirectoryError, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from client import Client
    from testkit import ServerProgram

_UIDS = range(71_001, 71_010)
_NO_UID = 0x7FFF_FFF0  # no host has an account of this number


def _output(worker: Worker, job_id: str) -> str:
    with worker.stream(job_id) as chunks:
        return b"".join(chunks).decode()


def _variables(text: str) -> dict[str, str]:
    """Return what `env -0` has printed."""
    return dict(entry.split("=", 1) for entry in text.split("\0")[:-1])


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker without cgroups, whose jobs get two variables of the operator."""
    configured = {"EDITOR": "ed", "TERM": "vt100"}
    with Worker(enforcement="off", environment=configured) as worker:
        yield worker


@pytest.fixture
def isolated() -> Iterator[Worker]:
    """A worker that gives jobs uids of their own; needs root."""
    if not (os.geteuid() == 0 and can_change_user() and can_kill_any()):
        pytest.skip("needs root")
    with Worker(enforcement="off", uids=_UIDS) as worker:
        worker._parts.spares.fill()
        yield worker


# --- variables ------------------------------------------------------------------------------


def test_job_is_told_the_account_that_it_runs_as(worker: Worker) -> None:
    """Name, home and shell are those of the host's account of the worker's own user."""
    found = _variables(_output(worker, worker.start("env", ["-0"])))
    account = pwd.getpwuid(os.geteuid())
    assert (found["USER"], found["LOGNAME"]) == (account.pw_name, account.pw_name)
    assert (found["HOME"], found["SHELL"]) == (account.pw_dir, account.pw_shell or "/bin/sh")
    assert (found["LANG"], found["PYTHONUNBUFFERED"]) == ("C.UTF-8", "1")


def test_job_is_told_the_account_that_its_starter_names(worker: Worker) -> None:
    """It has precedence over the account of the host."""
    job_id = worker.start("env", ["-0"], account=Account("eve", "/srv", "/bin/zsh"))
    found = _variables(_output(worker, job_id))
    names = ("USER", "LOGNAME", "HOME", "SHELL")
    assert [found[name] for name in names] == ["eve", "eve", "/srv", "/bin/zsh"]
    assert worker.status(job_id).working_directory == "/srv"


def test_uid_without_an_account_has_the_owners_name_and_no_home() -> None:
    """Without an owner the name is the number."""
    assert account_of(_NO_UID, "eve") == Account("eve", "/", "/bin/sh")
    assert account_of(_NO_UID).name == str(_NO_UID)


def test_job_gets_its_own_variables_before_those_of_the_worker(worker: Worker) -> None:
    """What a job asks for replaces what the worker has, and that replaces the defaults."""
    own = {"EDITOR": "vi", "HOME": "/nowhere", "EMPTY": "", "ODD": "a=b\n\udcff", "ü": "ß"}
    job_id = worker.start("env", ["-0"], env=own)
    with worker.stream(job_id) as chunks:
        text = b"".join(chunks).decode(errors="surrogateescape")
    found = _variables(text)
    assert {name: found[name] for name in own} == own
    assert found["TERM"] == "vt100"
    plain = _variables(_output(worker, worker.start("env", ["-0"])))
    assert (plain["EDITOR"], plain["TERM"]) == ("ed", "vt100")


def test_job_cannot_replace_its_id(worker: Worker) -> None:
    """A job's name for itself is true."""
    job_id = worker.start("printenv", ["JOB_ID"], env={"JOB_ID": "another"})
    assert _output(worker, job_id) == f"{job_id}\n"


def test_command_is_looked_up_in_the_path_of_the_job(worker: Worker, tmp_path: Path) -> None:
    """Also if PATH comes from the job itself. The error names the path that was searched."""
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    job_id = worker.start("tool", env={"PATH": f"/no/such:{tmp_path}"})
    assert _output(worker, job_id) == "found\n"
    with pytest.raises(CommandNotFoundError, match="not found in /no/such"):
        worker.start("tool", env={"PATH": "/no/such"})
    with Worker(enforcement="off", environment={"PATH": str(tmp_path)}) as other:
        assert _output(other, other.start("tool")) == "found\n"


def test_long_environment_arrives_whole(worker: Worker) -> None:
    """Up to the limit, in one variable."""
    value = "x" * (100 * 1024)
    job_id = worker.start("sh", ["-c", "echo ${#LONG}"], env={"LONG": value})
    assert _output(worker, job_id) == f"{len(value)}\n"


_BAD_VARIABLES: list[tuple[dict[str, str], str]] = [
    ({"": "x"}, "'' cannot be the name"),
    ({"A=B": "x"}, "'A=B' cannot be the name"),
    ({"A": "x\0y"}, "'A' contains a NUL"),
    ({"A\0": "x"}, "contains a NUL"),
    ({"A": "\ud800"}, "'A' cannot be encoded"),
    ({f"A{i}": "x" * 1000 for i in range(200)}, str(MAX_ENVIRONMENT_BYTES)),
]


@pytest.mark.parametrize(("env", "text"), _BAD_VARIABLES)
def test_variables_that_no_process_can_have_are_refused(
    worker: Worker, env: dict[str, str], text: str
) -> None:
    """Before anything is started. The message does not show a value, which may be a secret."""
    with pytest.raises(CommandError, match=re.escape(text)) as caught:
        worker.start("true", env=env)
    assert worker.list() == ()
    assert "x" * 9 not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(text)):
        Worker(enforcement="off", environment=env)


_SPY = r"""
#include <stdio.h>
#include <unistd.h>
__attribute__((constructor)) static void tell(void) {
    FILE *file = fopen("%s", "a");
    if (file) { fprintf(file, "%%d %%d\n", getuid(), geteuid()); fclose(file); }
}
"""


def test_preloaded_library_runs_as_the_jobs_user_only(isolated: Worker, public: Path) -> None:
    """The process that forks, and the leader before its exec, have root's rights and ignore it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    told, source = public / "told", public / "spy.c"
    told.touch()
    told.chmod(0o666)
    source.write_text(_SPY % told)
    library = public / "spy.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    library.chmod(0o755)
    env = {"LD_PRELOAD": str(library), "PYTHONSTARTUP": "/x", "PYTHONPATH": str(public)}
    for uid in _UIDS[:2]:
        job = isolated.wait(isolated.start("true", uid=uid, env=env), GUARD_S)
        assert job.exit_code == 0
    assert told.read_text() == "".join(f"{uid} {uid}\n" for uid in _UIDS[:2])


# --- directory ------------------------------------------------------------------------------


def test_job_begins_in_its_home_or_where_its_starter_says(worker: Worker, tmp_path: Path) -> None:
    """A relative path begins at the home."""
    inner = tmp_path / "a b"
    inner.mkdir()
    account = Account("eve", str(tmp_path))
    for cwd, expected in (("", tmp_path), ("a b", inner), (str(inner), inner), (".", tmp_path)):
        job_id = worker.start("pwd", ["-P"], account=account, cwd=cwd)
        assert _output(worker, job_id) == f"{expected.resolve()}\n"
        assert os.path.samefile(worker.status(job_id).working_directory, expected)


def test_job_with_a_home_that_is_missing_begins_at_the_root(worker: Worker) -> None:
    """As a login does. Otherwise nobody could start the job that makes the home."""
    job_id = worker.start("pwd", account=Account("eve", "/no/such/home"))
    assert _output(worker, job_id) == "/\n"


def test_command_with_a_relative_path_is_looked_up_in_the_jobs_directory(
    worker: Worker, tmp_path: Path
) -> None:
    """As a shell does after cd."""
    script = tmp_path / "run.sh"
    script.write_text("#!/bin/sh\necho ran\n")
    script.chmod(0o755)
    assert _output(worker, worker.start("./run.sh", cwd=str(tmp_path))) == "ran\n"


@pytest.mark.parametrize(
    ("cwd", "problem"),
    [
        ("/no/such/directory", "No such file or directory"),
        ("/etc/passwd", "Not a directory"),
        ("no such/below the home", "No such file or directory"),
        ("/" + "x" * 300, "File name too long"),
    ],
)
def test_directory_that_cannot_be_entered_is_an_error(
    worker: Worker, cwd: str, problem: str
) -> None:
    """It names the directory and the reason. Nothing of the job is left."""
    with pytest.raises(DirectoryError, match=problem) as caught:
        worker.start("true", cwd=cwd)
    assert caught.value.directory.endswith(cwd)
    assert cwd[:200] in str(caught.value)
    assert worker.list() == ()
    assert _output(worker, worker.start("echo", ["next"])) == "next\n"


@pytest.mark.parametrize("cwd", ["/a\0b", "/\ud800"])
def test_directory_that_cannot_be_named_is_an_error(worker: Worker, cwd: str) -> None:
    """Before anything is started."""
    with pytest.raises(CommandError, match="the working directory"):
        worker.start("true", cwd=cwd)


def test_directory_is_entered_with_the_rights_of_the_jobs_user(
    isolated: Worker, public: Path
) -> None:
    """The leader has root's rights before, and does not use them."""
    closed, own = public / "closed", public / "own"
    closed.mkdir(0o700)
    own.mkdir(0o700)
    os.chown(own, _UIDS[0], _UIDS[0])
    with pytest.raises(DirectoryError, match="Permission denied"):
        isolated.start("pwd", uid=_UIDS[0], cwd=str(closed))
    with pytest.raises(DirectoryError, match="Permission denied"):
        isolated.start("pwd", uid=_UIDS[1], cwd=str(own))
    job_id = isolated.start("pwd", uid=_UIDS[0], cwd=str(own))
    assert _output(isolated, job_id) == f"{own}\n"


# --- the service and the client ---------------------------------------------------------------


def test_start_over_the_api_has_variables_and_a_directory(
    connect: Callable[..., Client], public: Path
) -> None:
    """The status shows the directory, and no variable."""
    client = connect()
    job_id = client.start(
        "sh", ["-c", "pwd; echo $SECRET"], env={"SECRET": "xyzzy"}, cwd=str(public)
    )
    assert b"".join(client.stream(job_id)).decode().splitlines() == [str(public), "xyzzy"]
    job = client.status(job_id)
    assert job.working_directory == str(public)
    assert "xyzzy" not in str(job)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"working_directory": "/no/such"}, "'/no/such' cannot be entered: No such file"),
        ({"environment": {"A=B": "x"}}, "'A=B' cannot be the name"),
        ({"environment": {"PATH": "/none"}}, "command not found in /none"),
    ],
)
def test_start_with_bad_surroundings_is_an_invalid_argument(
    connect: Callable[..., Client], fields: dict[str, Any], text: str
) -> None:
    """The message says what is wrong."""
    code, message = call_rpc(connect(), "StartJob", command="true", **fields)
    assert code == "INVALID_ARGUMENT"
    assert text in message


@pytest.mark.parametrize("changed", [{"env": {"A": "2"}}, {"cwd": "/etc"}, {"env": {}}])
def test_repeated_start_with_other_surroundings_is_another_start(
    connect: Callable[..., Client], changed: dict[str, Any]
) -> None:
    """The request ID belongs to the first one; the same surroundings give the same job."""
    first: dict[str, Any] = {"env": {"A": "1", "B": "2"}, "cwd": "/"}
    client, request_id = connect(), str(uuid.uuid4())
    job_id = client.start("true", request_id=request_id, **first)
    again: dict[str, Any] = {"env": {"B": "2", "A": "1"}, "cwd": "/"}
    assert client.start("true", request_id=request_id, **again) == job_id
    with pytest.raises(ClientError) as caught:
        client.start("true", request_id=request_id, **(first | changed))
    assert caught.value.code == "ALREADY_EXISTS"


def test_no_log_has_the_variables_of_a_job(
    start_server: Callable[..., ServerProgram], connect: Callable[..., Client], make_state: Any
) -> None:
    """Neither the audit log nor the server's own log, also if the start fails."""
    state = make_state()
    server = start_server(state=state)
    client = connect(address=server.address)
    run_job(client, env={"PASSWORD": "xyzzy"})
    with pytest.raises(ClientError, match="'B=' cannot be"):
        client.start("true", env={"PASSWORD": "xyzzy", "B=": "xyzzy"})
    audit = (state / "audit.log").read_text()
    assert [json.loads(line)["outcome"] for line in audit.splitlines() if "StartJob" in line] == [
        "OK",
        "INVALID_ARGUMENT",
    ]
    assert "xyzzy" not in audit + server.log.read_text()


@pytest.fixture
def run(
    program: ServerProgram,
    certs: Path,
    tokens: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> Callable[..., tuple[int, str, str]]:
    """Call `client run` in this process; return its exit status, stdout and stderr."""
    monkeypatch.setenv("JOBWORKER_TOKEN", tokens["user"])

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["run", "--server", program.address, "--certs", str(certs), *arguments])
        captured = capfdbinary.readouterr()
        return status, captured.out.decode(), captured.err.decode()

    return run


def test_command_line_gives_variables_and_a_directory(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value comes from --env, from the client's own environment or from a file, in this order."""
    monkeypatch.setenv("FROM_HERE", "here = there")
    file = tmp_path / "job.env"
    file.write_text("# comment\n\nA=1\nB='quoted' \nFROM_HERE\nC=3\n")
    options = ("--env-file", str(file), "--env", "C=4", "--env", "D=", "--env=E=a b=c")
    script = 'printf "%s|" "$A" "$B" "$FROM_HERE" "$C" "$D" "$E"; pwd'
    result = run(*options, "--cwd", "/usr", "--", "sh", "-c", script)
    assert result == (0, "1|'quoted' |here = there|4||a b=c|/usr\n", "")


@pytest.mark.parametrize(
    ("content", "option", "text"),
    [
        ("", ["--env", "NOT_SET_HERE"], "--env: NOT_SET_HERE has no value here"),
        ("", ["--env", "=x"], "--env: the name of the variable is missing"),
        ("A=1\nNOT_SET_HERE\n", [], "job.env, line 2: NOT_SET_HERE has no value here"),
        ("A=1\nB = 2\n", [], "job.env, line 2: the name of the variable"),
        ("A=1\nB=\udcff\n", [], "job.env, line 2: not UTF-8"),
        ("", ["--env", "A=\udcff"], "--env: the value of a variable must be UTF-8"),
        ("", ["--env-file", "/no/such.env"], "/no/such.env"),
        ("", ["--cwd", "/no/such"], "'/no/such' cannot be entered"),
    ],
)
def test_mistake_on_the_command_line_is_told_in_one_line(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    content: str,
    option: list[str],
    text: str,
) -> None:
    """The line names the place, and no value."""
    file = tmp_path / "job.env"
    file.write_text(content, errors="surrogateescape")
    status, out, err = run("--env-file", str(file), *option, "--", "true")
    assert (status, out, err.count("\n")) == (125, "", 1)
    assert text in err


# --- the operator's table -----------------------------------------------------------------------


def test_operator_sets_variables_in_the_configuration(
    start_server: Callable[..., ServerProgram], connect: Callable[..., Client], public: Path
) -> None:
    """The table [environment] also replaces PATH, in which commands are looked up."""
    tool = public / "tools" / "tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho $COLOUR $TERM\n")
    tool.chmod(0o755)
    config = public / "config.toml"
    config.write_text(f'[environment]\nPATH = "{tool.parent}:/usr/bin:/bin"\nCOLOUR = "blue"\n')
    client = connect(address=start_server("--config", str(config)).address)
    assert b"".join(client.stream(client.start("tool"))) == b"blue dumb\n"
    own = client.start("tool", env={"COLOUR": "red"})
    assert b"".join(client.stream(own)) == b"red dumb\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[environment]\nA = 1\n", "line 2: environment.A: cannot be 1"),
        ('[environment]\n"A=B" = "x"\n', "'A=B' cannot be the name"),
        ('[environment]\nA = "x\\u0000"\n', "line 2: environment.A: "),
        ("environment = 3\n", "environment: unknown"),
    ],
)
def test_mistake_in_the_table_is_told_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    """A value must be a text, and a name one that a process can have."""
    config = tmp_path / "config.toml"
    config.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(config)
