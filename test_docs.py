"""Tests that the documentation tells everything there is, and shows commands that work."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import authservice_pb2
import cli
import client as client_program
import gate
import server
import settings
import test_layout
import version
import workerservice_pb2
from testkit import GUARD_S, LIBRARY

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from testkit import ServerProgram

_HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def readme() -> str:
    return (_HERE / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reference() -> str:
    return (_HERE / "docs/configuration.md").read_text(encoding="utf-8")


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
def test_every_option_of_the_client_is_described(option: str) -> None:
    """In docs/client.md, at least in its short form. README has those of the connection."""
    text = (_HERE / "docs/client.md").read_text() + (_HERE / "README.md").read_text()
    assert _is_named(option, text)


@pytest.mark.parametrize("subcommand", sorted(_subcommands()))
def test_help_of_every_subcommand_has_examples_that_are_understood(
    subcommand: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What follows two spaces after an example explains it."""
    (tmp_path / "job-worker").mkdir()
    (tmp_path / "job-worker" / "config.toml").write_text("[work]\nuser = 'alice'\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    shown = _subcommands()[subcommand].format_help()
    assert max(map(len, shown.splitlines())) <= 80
    examples = re.findall(
        r"\bclient (.*?)(?:  .*)?$", shown.partition("\nexample")[2], re.MULTILINE
    )
    assert any(example.startswith(subcommand) for example in examples)
    for example in examples:
        cli.parse(_arguments(example))


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


_METHODS = [
    method.name
    for file in (authservice_pb2.DESCRIPTOR, workerservice_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]


@pytest.mark.parametrize("method", _METHODS)
def test_readme_names_every_rpc(readme: str, method: str) -> None:
    """By its name in the .proto."""
    assert _is_named(method, readme)


@pytest.mark.parametrize(
    "code",
    sorted({code.name for _, code, _ in gate._ERRORS} | {grpc.StatusCode.INTERNAL.name}),
)
def test_every_status_that_a_call_can_end_with_is_explained(code: str) -> None:
    """`docs/api.md` has a row for each status of the gate's table of errors."""
    assert code in _explained_statuses()


def test_every_status_that_readme_names_for_an_rpc_is_explained(readme: str) -> None:
    """A status in README's table of RPCs is also in the table of statuses."""
    rows = re.findall(r"^\| `\w+Service\.\w+` \|.*$", readme, re.MULTILINE)
    assert len(rows) == len(_METHODS)
    named = {code for row in rows for code in re.findall(r"[A-Z]{2,}[A-Z_]+", row)}
    assert named
    assert named <= _explained_statuses()


def _explained_statuses() -> set[str]:
    text = (_HERE / "docs" / "api.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ([A-Z_, ]+) \|", text, re.MULTILINE)
    return {code for cell in cells for code in cell.split(", ")}


@pytest.mark.parametrize(
    ("table", "key"),
    [(table, key) for table in settings.TABLES for key in settings.TABLES[table]],
)
def test_every_key_of_the_configuration_is_described(
    readme: str, reference: str, table: str, key: str
) -> None:
    """Each table is shown, and each key in code or in an example; the limits are in README."""
    text = reference + readme
    assert re.search(rf"^{key} = |`{key}`", text, re.MULTILINE)
    assert re.search(rf"^\[{table}\]|`\[{table}\]`", reference, re.MULTILINE)


def test_configuration_that_readme_shows_is_accepted(readme: str, tmp_path: Path) -> None:
    """It is an example: its values differ from the defaults."""
    (block,) = re.findall(r"(?:^    (?:\[|\w+ = ).*\n){3,}", readme, re.MULTILINE)
    (tmp_path / "example.toml").write_text(textwrap.dedent(block))
    assert settings.load_config(tmp_path / "example.toml") != settings.Config()


def test_tables_that_are_shown_in_full_have_the_defaults(reference: str, tmp_path: Path) -> None:
    """[per_job], [requests] and [retention] are shown with each key; all values are defaults."""
    (block,) = re.findall(r"```toml\n(.*?)```", reference, re.DOTALL)
    (tmp_path / "defaults.toml").write_text(block)
    assert settings.load_config(tmp_path / "defaults.toml") == settings.Config()
    tables = tomllib.loads(block)
    for name in ("per_job", "requests", "retention"):
        assert set(tables[name]) == set(settings.TABLES[name])


def test_ceilings_of_users_that_are_shown_are_the_defaults(reference: str, tmp_path: Path) -> None:
    """The rows of the table are all keys of [per_user] and [in_all]."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \|", reference, re.MULTILINE)
    assert {key for key, _, _ in rows} == set(settings.TABLES["per_user"])
    text = "".join(
        f"[{table}]\n"
        + "".join(
            f"{row[0]} = {row[column] if row[column].isdecimal() else repr(row[column])}\n"
            for row in rows
        )
        for column, table in ((1, "per_user"), (2, "in_all"))
    )
    (tmp_path / "ceilings.toml").write_text(text)
    assert settings.load_config(tmp_path / "ceilings.toml") == settings.Config()


def test_limits_that_readme_shows_are_the_defaults(readme: str) -> None:
    """Default and ceiling of each limit, in the row that names its key."""
    shown = {}
    for default, ceiling, keys in re.findall(
        r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \| (`[^|]+`) \| `[^|]+\|$", readme, re.MULTILINE
    ):
        for key in re.findall(r"\w+", keys):
            shown[key] = (_amount(default), _amount(ceiling))
    assert shown == {
        key: (
            getattr(settings.DEFAULTS, kind.field),
            getattr(settings.CEILINGS, kind.field),
        )
        for key, kind in settings.TABLES["defaults"].items()
    }


def _amount(text: str) -> float | None:
    """What a cell of the table of limits means; the ceiling is the limit where it says so."""
    if text == "the ceiling":
        return None
    number, _, unit = text.replace(",", "").partition(" ")
    return int(number) * {"": 1, "MiB": 1024**2, "GiB": 1024**3}[unit]


@pytest.mark.parametrize(
    "name", ["JOBWORKER_SERVER", "JOBWORKER_CERTS", "JOBWORKER_PROFILE", "JOBWORKER_TOKEN"]
)
def test_readme_names_every_environment_variable(readme: str, name: str) -> None:
    """Those that the client looks at, as its help says."""
    assert name in readme
    assert name in cli.make_parsers()[0].format_help()


def test_version_is_that_of_the_project() -> None:
    """`pyproject.toml` has the same one as `--version`."""
    project = tomllib.loads((_HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == version.VERSION


@pytest.mark.parametrize("main", [client_program.main, server.main])
def test_programs_print_their_version(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stdout."""
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"job-worker {version.VERSION}\n")


def _shown_commands(text: str, program: str) -> list[list[str]]:
    """The arguments of each call of ./PROGRAM in the text's blocks of code, synopses apart."""
    found = []
    for line in re.findall(r"^(?: {4}|\$ )?\s*(.*)$", text, re.MULTILINE):
        for call in re.findall(rf"(?:^|[\s(])\./{program}( .*|$)", line):
            if "[" in call or "..." in call or "`" in call:
                continue
            found.append(_arguments(call))
    return found


def _arguments(call: str) -> list[str]:
    """The words up to the end of the command in the shell."""
    words = shlex.shlex(call, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    return list(itertools.takewhile(lambda word: not set(word) <= set("();<>|&"), words))


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


def _is_product(path: Path) -> bool:
    """Whether the module is neither for tests nor generated."""
    return not re.match(r"test|conftest|\w+_plugin|\w+_pb2", path.name)


# --- the map of the modules --------------------------------------------------------------------


def test_map_in_readme_names_modules_of_each_group(readme: str) -> None:
    """It has the same groups in the same order as the list of modules."""
    section = readme[readme.index("## The modules") : readme.index("## The command line")]
    shown: dict[str, set[str]] = {}
    for line in section.splitlines():
        if begin := re.match(r"\| \*\*(\w+)\*\* \|", line):
            shown[begin[1]] = set()
        if shown:
            shown[[*shown][-1]].update(re.findall(r"`(\w+)\.py`", line))
    assert [*shown] == [*test_layout._MODULES]
    for group, modules in shown.items():
        assert modules
        assert modules <= set(test_layout._MODULES[group])


def _rows_of_modules() -> list[tuple[str, str]]:
    listed = (_HERE / "docs/modules.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (\*\*\w+\*\*|`\w+\.py`) \| (.*) \|$", listed, re.MULTILINE)


def test_every_module_is_once_in_the_list_of_modules_in_its_group() -> None:
    """The groups are those of the layout test; there is no module without a group."""
    shown: dict[str, list[str]] = {}
    for first, _ in _rows_of_modules():
        if first.startswith("**"):
            shown[first.strip("*")] = []
        else:
            shown[[*shown][-1]].append(first.strip("`").removesuffix(".py"))
    assert {name: sorted(modules) for name, modules in shown.items()} == {
        name: sorted(modules) for name, modules in test_layout._MODULES.items()
    }
    in_any_group = {module for modules in shown.values() for module in modules}
    assert in_any_group == {path.stem for path in _HERE.glob("*.py") if _is_product(path)}


def test_the_list_of_modules_says_of_each_what_its_docstring_begins_with() -> None:
    """A reader who looks for something finds the module by the words that the module has."""
    for name, words in _rows_of_modules():
        if not name.startswith("**"):
            source = (_HERE / name.strip("`")).read_text(encoding="utf-8")
            begin = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
            assert words == " ".join(begin.split()), name


# --- links, paths, and the places where something new is added --------------------------------

_DOCUMENTS = [
    path.relative_to(_HERE)
    for path in sorted([*_HERE.glob("*.md"), *(_HERE / "docs").glob("*.md")])
]


@pytest.mark.parametrize("document", _DOCUMENTS, ids=str)
def test_links_of_a_document_lead_somewhere(document: Path) -> None:
    """A file that there is, and a heading of it."""
    text = (_HERE / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (_HERE / document).parent / name if name else _HERE / document
        assert path.is_file(), target
        if anchor:
            assert anchor in _anchors(path.read_text(encoding="utf-8")), target


def _anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", _DOCUMENTS, ids=str)
def test_files_that_a_document_names_exist(document: Path) -> None:
    """A word in code that ends like a file of this project is one, but for CHANGELOG's."""
    if document.name == "CHANGELOG.md":
        return
    text = (_HERE / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|proto|md))`", text)) - {
        "x.py",
        "test_x.py",
    }
    places = (_HERE, _HERE / "docs", _HERE / "bench")
    assert [name for name in sorted(named) if not any((p / name).is_file() for p in places)] == []


def test_headlines_of_the_benchmarks_are_those_of_the_run_below() -> None:
    """Six ratios, each in the line of the run that its row names."""
    text = (_HERE / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    run = text[text.index("## One whole run") : text.index("## Tried and dropped")]
    headlines = text[: text.index("## One whole run")]
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| `([^`]+)` \|$", headlines, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| [A-Z]", headlines, re.MULTILINE)) == 6
    for ratio, line in rows:
        assert re.search(rf"^  {re.escape(line)} +{ratio} x ", run, re.MULTILINE), line


def _contributing() -> str:
    return (_HERE / "CONTRIBUTING.md").read_text(encoding="utf-8")


def _places() -> dict[str, tuple[str, set[str]]]:
    """The rows of CONTRIBUTING's table of places: the model, and the files named in the row."""
    rows = re.findall(r"^\| ([^|`]+) \| `([^|`]+)` \| (.+) \|$", _contributing(), re.MULTILINE)
    return {kind: (model, set(re.findall(r"`([\w./]+)`", cell))) for kind, model, cell in rows}


def _product_files_with(word: str) -> set[str]:
    name = word.lstrip("-").replace("-", "[-_]")
    pattern = re.compile(rf"(?<![\w-])(--|END_REASON_)?{name}(?![\w-])")
    documents = [_HERE / name for name in ("README.md", "docs/client.md", "docs/configuration.md")]
    paths = [*_HERE.glob("*.py"), *_HERE.glob("*.proto"), *documents]
    return {
        str(path.relative_to(_HERE))
        for path in paths
        if _is_product(path) and pattern.search(path.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("kind", sorted(_places()))
def test_contributing_names_all_places_for_something_new(kind: str) -> None:
    """They are the files in which the model of that kind stands."""
    model, places = _places()[kind]
    assert places == _product_files_with(model)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("RPC", _METHODS),
        ("limit of a job", [kind.field for kind in settings.TABLES["defaults"].values()]),
        ("ceiling of a user", list(settings.TABLES["per_user"])),
    ],
    ids=["RPC", "limit", "ceiling"],
)
def test_every_existing_one_is_in_all_places(kind: str, names: list[str]) -> None:
    """In all modules, that is; only the client has no option for swap."""
    places = {name for name in _places()[kind][1] if name.endswith(".py")}
    assert places
    for name in names:
        missing = places - _product_files_with(name)
        assert missing == ({"cli.py"} if name == "swap_bytes" else set()), name


@pytest.mark.parametrize("name", sorted(set(re.findall(r"make ([a-z-]+)", _contributing()))))
def test_make_targets_that_contributing_names_exist(name: str) -> None:
    """Each `make TARGET` in the text."""
    makefile = (_HERE / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{name}:", makefile, re.MULTILINE)


def test_attacks_of_the_security_guide_have_tests() -> None:
    """Each row of its tables of attacks names tests, and all of these exist."""
    text = (_HERE / "docs/security.md").read_text(encoding="utf-8")
    section = text.partition("## Attacks, and the tests that try them")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    heads = [row for row in rows if row.endswith(" what happens now | tests |")]
    assert len(heads) == 4
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert bool(named) != (row in heads), row
        for module, name in named:
            assert f"\ndef {name}(" in (_HERE / module).read_text(encoding="utf-8"), name
