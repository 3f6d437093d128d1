"""Tests that the documentation tells everything there is, and shows commands that work."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import authservice_pb2
import cli
import server
import settings
import workerservice_pb2
from testkit import GUARD_S, LIBRARY

if TYPE_CHECKING:
    import argparse

    from testkit import ServerProgram

_HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def readme() -> str:
    return (_HERE / "README.md").read_text(encoding="utf-8")


def _subcommands() -> dict[str, Any]:
    return dict(cli.make_parsers()[1])


def _options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings} - {"-h"}


def _is_named(word: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


_CLIENT_OPTIONS = {
    option for parser in _subcommands().values() for option in _options(parser) - {"--help"}
}
# Long forms of what is documented in its short one.
_SYNONYMS = {"--token", "--user", "--password", "--command", "--job", "--args"}


@pytest.mark.parametrize("subcommand", sorted(_subcommands()))
def test_readme_shows_every_subcommand(readme: str, subcommand: str) -> None:
    """As it is typed."""
    assert f"./client {subcommand}" in readme


@pytest.mark.parametrize("option", sorted(_CLIENT_OPTIONS - _SYNONYMS))
def test_readme_names_every_option_of_the_client(readme: str, option: str) -> None:
    """At least in its short form."""
    assert _is_named(option, readme)


def _server_options(capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        server.main(["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z-]+", capsys.readouterr().out))


def test_readme_names_every_option_of_the_server(
    readme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that its help knows, and its other commands."""
    options = _server_options(capsys)
    assert {"--listen", "--users"} <= options
    assert [o for o in sorted(options - {"--help"}) if not _is_named(o, readme)] == []
    assert "./server user" in readme
    assert "./server check" in readme


@pytest.mark.parametrize(
    "method",
    [
        method.name
        for file in (authservice_pb2.DESCRIPTOR, workerservice_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    ],
)
def test_readme_names_every_rpc(readme: str, method: str) -> None:
    """By its name in the .proto."""
    assert _is_named(method, readme)


@pytest.mark.parametrize(
    ("table", "key"),
    [(table, key) for table in settings._TABLES for key in settings._TABLES[table]],
)
def test_readme_names_every_key_of_the_configuration(readme: str, table: str, key: str) -> None:
    """As it stands in the file, where each of the tables is shown, too."""
    assert re.search(rf"^\s*#?\s*{key} = ", readme, re.MULTILINE)
    assert re.search(rf"^\[{table}\]", readme, re.MULTILINE)


def test_retention_that_readme_shows_is_the_default(readme: str, tmp_path: Path) -> None:
    """Of all its numbers."""
    (block,) = re.findall(r"```toml\n(\[retention\].*?)```", readme, re.DOTALL)
    (tmp_path / "retention.toml").write_text(block)
    assert settings.load_config(tmp_path / "retention.toml") == settings.Config()
    assert set(re.findall(r"^(\w+) = ", block, re.MULTILINE)) == set(settings._TABLES["retention"])


def test_configuration_that_readme_shows_is_understood(readme: str, tmp_path: Path) -> None:
    """Each block of TOML is a configuration."""
    blocks = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "limits.toml").write_text(block)
        settings.load_config(tmp_path / "limits.toml")


@pytest.mark.parametrize("name", ["JOBWORKER_SERVER", "JOBWORKER_CERTS", "JOBWORKER_TOKEN"])
def test_readme_names_every_environment_variable(readme: str, name: str) -> None:
    """Those that the client looks at, as its help says."""
    assert name in readme
    assert name in cli.make_parsers()[0].format_help()


def _shown_commands(text: str, program: str) -> list[list[str]]:
    """The arguments of each call of ./PROGRAM in the text's blocks of code, synopses apart."""
    found = []
    for line in re.findall(r"^(?: {4}|\$ )?\s*(.*)$", text, re.MULTILINE):
        for call in re.findall(rf"(?:^|[\s(])\./{program}( .*|$)", line):
            if "[" in call or "..." in call or "`" in call:
                continue
            words = shlex.shlex(call, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            arguments = []
            for word in words:
                if set(word) <= set("();<>|&"):
                    break
                arguments.append(word)
            found.append(arguments)
    return found


def test_commands_that_readme_shows_are_understood(
    readme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each `./client ...` parses, and each `./server ...` uses options that there are."""
    shown = _shown_commands(readme, "client")
    assert {words[0] for words in shown if words} >= {"login", "start", "stream"}
    for words in shown:
        cli.parse(words)
    options = _server_options(capsys) | {"--role"}
    for words in _shown_commands(readme, "server"):
        assert {word for word in words if word.startswith("-")} <= options


@pytest.mark.parametrize(
    "target", ["setup", "demo", "serve", "test", "check", "bench", "bench-long", "certs", "proto"]
)
def test_make_target_exists(target: str) -> None:
    """Those that the documents, the launchers and the errors name."""
    makefile = (_HERE / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("target", ["demo", "serve", "test", "check"])
def test_readme_names_the_make_targets_of_a_user(readme: str, target: str) -> None:
    """What somebody with a fresh clone wants to do."""
    assert f"make {target}" in readme


def _python_example(readme: str, beginning: str) -> str:
    blocks: list[str] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return next(block for block in blocks if beginning in block)


def test_example_of_the_library_runs_where_only_the_library_is(readme: str, tmp_path: Path) -> None:
    """As README has it, next to the copied files, with nothing installed."""
    for module in LIBRARY:
        shutil.copy(_HERE / f"{module}.py", tmp_path)
    (tmp_path / "example.py").write_text(_python_example(readme, "from worker import"))
    result = subprocess.run(
        [sys.executable, "-S", "-W", "error", "example.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # What the job writes goes past what print has in its buffer.
    assert "hello\n" in result.stdout
    assert "Status.FINISHED EndReason.EXITED 3 Limits(" in result.stdout


def test_example_of_the_client_runs(readme: str, program: ServerProgram, certs: Path) -> None:
    """As README has it, but for the address of the server and the place of the certificates."""
    example = _python_example(readme, "from client import")
    example = example.replace("127.0.0.1:50051", program.address).replace(
        'certs="certs"', f"certs={str(certs)!r}"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=_HERE,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("b'hello\\n'\n0\n", "")


@pytest.mark.parametrize("name", ["workerservice.proto", "authservice.proto"])
def test_every_message_field_and_rpc_is_documented_in_the_proto(name: str) -> None:
    """A comment stands right above each."""
    lines = (_HERE / name).read_text(encoding="utf-8").splitlines()
    declaration = re.compile(
        r"\s*(rpc|message|enum) \w|\s*((optional|repeated) )?([\w.]+ )?\w+ = \d+;"
    )
    missing = [
        line
        for above, line in itertools.pairwise(lines)
        if declaration.match(line)
        and not above.strip().startswith("//")
        and not line.strip().endswith("_UNSPECIFIED = 0;")
    ]
    assert missing == []
