"""Tests of the server's options: the command line and the table [server] of the configuration."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from configreport import report
from servercommands import CommandLine, parse_arguments
from serverfiles import config_in_force
from serveroptions import COMMAND_LINE, DEFAULT, OPTIONS, PROGRAM_DEFAULTS, settings_in_force
from settings import TABLES, ConfigError, Settings, load_config
from testkit import GUARD_S, clean_environment
from trustedfiles import UntrustedFileError

if TYPE_CHECKING:
    from collections.abc import Callable

    Read = Callable[..., tuple[Settings, dict[str, str]]]

# For each option a value in the file, the words of the command line that mean the same, and what
# the field is then. {here} is the directory of the file.
_VALUES: dict[str, tuple[str, list[str], Any]] = {
    "listen": ('"[::1]:0"', ["[::1]:0"], "[::1]:0"),
    "certs": ('"c"', ["{here}/c"], "{here}/c"),
    "users": ('"u"', ["{here}/u"], "{here}/u"),
    "state_dir": ('"/var/s"', ["/var/s"], "/var/s"),
    "limits": ('"auto"', ["auto"], "auto"),
    "cgroup_root": ('"/sys/x"', ["/sys/x"], "/sys/x"),
    "max_streams": ("7", ["7"], 7),
    "uids": ('"80000-80009"', ["80000-80009"], "80000-80009"),
    "accounts": ('"host"', ["host"], "host"),
    "require_isolation": ("true", [], "require"),
    "audit_log": ('"a.log"', ["{here}/a.log"], "{here}/a.log"),
    "audit_required": ("true", [], True),
    "token_lifetime": ('"15m"', ["15m"], 900.0),
    "session_lifetime": ("43200", ["12h"], 43_200),
    "restart_window": ('"5m"', ["5m"], 300.0),
    "metrics": ('"unix:/run/m"', ["unix:/run/m"], "unix:/run/m"),
    "health": ('"on"', ["on"], "on"),
    "reflection": ('"off"', ["off"], "off"),
    "log_format": ('"json"', ["json"], "json"),
    "log_level": ('"debug"', ["debug"], "debug"),
}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The settings of a file with this text ("" for no file) and these words."""

    def read(text: str, *words: str) -> tuple[Settings, dict[str, str]]:
        path = tmp_path / "server.toml"
        path.write_text(text)
        config = ["--config", str(path)] if text else []
        return settings_in_force(parse_arguments([*config, *words]))

    return read


def test_without_file_and_words_everything_is_a_default(read: Read) -> None:
    """The program isolates jobs if it can; otherwise its defaults are those of `Settings`."""
    settings, sources = read("")
    assert settings == PROGRAM_DEFAULTS == Settings(isolation="auto")
    assert set(sources.values()) == {DEFAULT}


def test_every_option_is_a_field_and_has_a_case_below() -> None:
    """Each field of `Settings` but the file itself is the field of one option."""
    assert sorted([*(option.field for option in OPTIONS.values()), "config"]) == sorted(
        Settings.__slots__
    )
    assert set(_VALUES) == set(OPTIONS)


@pytest.mark.parametrize("key", OPTIONS)
def test_option_means_the_same_in_the_file_and_on_the_command_line(
    read: Read, tmp_path: Path, key: str
) -> None:
    """A relative path of the file begins in the directory of the file."""
    written, words, expected = _VALUES[key]
    if isinstance(expected, str):
        expected = expected.format(here=tmp_path)
    flag = f"--{key.replace('_', '-')}"
    of_file, sources = read(f"# ours\n[server]\n\n{key} = {written}\n")
    value = getattr(of_file, OPTIONS[key].field)
    assert (str(value) if isinstance(value, Path) else value) == expected
    assert sources.pop(key) == f"{tmp_path / 'server.toml'}, line 4"
    assert set(sources.values()) == {DEFAULT}
    of_words, sources = read("", flag, *(word.format(here=tmp_path) for word in words))
    assert getattr(of_words, OPTIONS[key].field) == value
    assert sources[key] == COMMAND_LINE


def test_command_line_counts_more_than_the_file(read: Read) -> None:
    """What the command line does not say stays as in the file."""
    settings, sources = read('[server]\nuids = "1-2"\nmax_streams = 3', "--max-streams", "4")
    assert (settings.max_streams, settings.uids) == (4, "1-2")
    assert sources["max_streams"] == COMMAND_LINE


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("listn = 'x'", "server.listn: unknown; the keys are listen, certs, "),
        ("config = 'x'", "server.config: unknown; the keys are "),
        ("listen = 1", "server.listen: cannot be 1; write text in quotes"),
        ("users = ''", "server.users: must not be empty"),
        ("limits = 'no'", "server.limits: cannot be 'no'; write one of require, auto, off"),
        ("audit_required = 'yes'", "server.audit_required: cannot be 'yes'; write true or false"),
        ("max_streams = true", "server.max_streams: cannot be True; write a whole number"),
        ("max_streams = 0", "server.max_streams: must be at least 1, not 0; write a whole number"),
    ],
)
def test_mistake_in_the_file_is_told_with_its_line(read: Read, line: str, problem: str) -> None:
    """And with the right form."""
    with pytest.raises(ConfigError, match=rf"server\.toml, line 2: {re.escape(problem)}"):
        read(f"[server]\n{line}\n")


def test_server_that_is_no_table_is_a_mistake(read: Read) -> None:
    """So is [[server]]."""
    for text in ("server = 3", "[[server]]\nlisten = 'x'"):
        with pytest.raises(ConfigError, match=r"line 1: server: not a table; write \[server\]"):
            read(text)


def test_false_is_the_default_of_a_flag(read: Read) -> None:
    """The file may say so."""
    settings, sources = read("[server]\nrequire_isolation = false\naudit_required = false")
    assert settings.isolation == "auto"
    assert not settings.audit_required
    assert sources["require_isolation"].endswith("line 2")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--limits", "no"], "--limits: cannot be 'no'; write one of require, auto, off"),
        (["--max-streams", "x"], "--max-streams: cannot be 'x'; write a whole number"),
        (["--state-dir", ""], "--state-dir: must not be empty"),
        (["--stat=x"], "unrecognized arguments"),
        (
            ["--restart-window", "x"],
            "--restart-window: 'x' is not a time; write a time like \"7d\";",
        ),
        (["bogus"], "argument COMMAND: invalid choice: 'bogus'"),
        (
            ["status", "--state-dir=x"],
            "options of the server stand before the command, like: server --state-dir ... status;",
        ),
        (["backup", "x", "--config", "y"], "like: server --config ... backup;"),
        (["status", "bogus"], "unrecognized arguments: bogus"),
    ],
)
def test_mistake_on_the_command_line_is_told(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, with exit status 2."""
    with pytest.raises(SystemExit) as end:
        parse_arguments(words)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert problem in told
    assert told.endswith("; see server --help\n")
    assert told.count("\n") == 1


def test_file_that_others_could_change_is_not_read(public: Path) -> None:
    """It decides what runs as root."""
    path = public / "server.toml"
    path.write_text("[server]\n")
    arguments = parse_arguments(["--config", str(path)])
    settings_in_force(arguments)
    path.chmod(0o666)
    with pytest.raises(UntrustedFileError, match="chmod go-w"):
        settings_in_force(arguments)


# --- what `server config` prints ----------------------------------------------------------------

_FILE = """
[server]
state_dir = "state"
audit_required = true

[defaults]
memory = "1.5G"
cpu_cores = 0.25
[ceilings]
pids = "unlimited"
[disk]
reserve = 0
[ending]
timeout = "90m"
linger = 0.5
[environment]
"LANG" = "C.UTF-8"
QUOTED = 'a "b" \\ c'
"""


def _report(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    arguments = parse_arguments([*words, "config"])
    settings, sources = settings_in_force(arguments)
    assert arguments.run(CommandLine(settings, sources, arguments)) == 0
    return capsys.readouterr().out


def test_config_into_a_pipe_that_closes_ends_quietly() -> None:
    """Like with `| head -3`: stderr is empty, and the exit status is that of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("server.py")), "config"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
        timeout=GUARD_S,
        env=clean_environment(),
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_config_says_where_each_value_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Default, option, or line of the file."""
    path = tmp_path / "server.toml"
    path.write_text(_FILE)
    shown = _report(capsys, "--config", str(path), "--uids", "5-6", "--max-streams", "9")
    lines = [re.split(" +# ", line) for line in shown.splitlines()]
    for expected in (
        [f'state_dir = "{tmp_path}/state"', f"{path}, line 3"],
        ["audit_required = true", f"{path}, line 4"],
        ["require_isolation = false", "default"],
        ['uids = "5-6"', "--uids"],
        ["max_streams = 9", "--max-streams"],
        ["streams = 9", "max_streams, above"],
        ['memory = "1536M"', f"{path}, line 7"],
        ['pids = "unlimited"', f"{path}, line 10"],
        ['timeout = "90m"', f"{path}, line 14"],
        ["linger = 0.5", f"{path}, line 15"],
        ['grace = "10s"', "default"],
        ['"LANG" = "C.UTF-8"', f"{path}, line 17"],
    ):
        assert expected in lines
    assert "# users is not set" in shown


@pytest.mark.parametrize("text", ["", _FILE])
def test_config_prints_a_configuration_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """With which a server has the same settings. It has every option and every key."""
    path, again = tmp_path / "server.toml", tmp_path / "again.toml"
    path.write_text(text)
    shown = _report(capsys, "--config", str(path))
    again.write_text(shown)
    assert load_config(again) == load_config(path)
    before, after = (
        settings_in_force(parse_arguments(["--config", str(each)]))[0] for each in (path, again)
    )
    assert replace(after, config=None) == replace(
        before, config=None, state_dir=before.state_dir.absolute(), certs=before.certs.absolute()
    )
    for name, table in [("server", OPTIONS), *TABLES.items()]:
        part = shown.partition(f"[{name}]\n")[2].partition("\n[")[0]
        assert set(re.findall(r"^(?:# )?(\w+) (?:=|is not set)", part, re.MULTILINE)) == set(table)


def test_check_takes_the_file_after_its_name(tmp_path: Path) -> None:
    """`check --config FILE` reads also the options of this file."""
    path = tmp_path / "server.toml"
    path.write_text("[server]\nuids = '5-6'")
    arguments = parse_arguments(["check", "--config", str(path)])
    assert settings_in_force(arguments)[0].uids == "5-6"


def test_word_that_stands_for_itself_is_no_path(read: Read) -> None:
    """Neither in the file, whose paths begin in its directory, nor on the command line."""
    for text, words in ('[server]\naudit_log = "stdout"', []), ("", ["--audit-log", "stdout"]):
        settings, sources = read(text, *words)
        assert settings.audit_log == Path("stdout")
        assert 'audit_log = "stdout"' in report(settings, sources, config_in_force(settings))
