"""Tests of how the project is laid out: its modules, which module imports which, their sizes.

`_MODULES` is the table to change when a module is added, split or given a new dependency.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from testkit import LIBRARY

_HERE = Path(__file__).resolve().parent

_AUTH_PB = "authservice_pb2 authservice_pb2_grpc"
_WORKER_PB = "workerservice_pb2 workerservice_pb2_grpc"
# By group: each module, and all that it imports beside the standard library. What stands after
# a semicolon is imported for annotations only, so not when the program runs.
_MODULES = {
    "library": {
        "argv": "errors",
        "broadcaster": "holes lastinggap outputdisk outputerrors outputstate outputtimes sources "
        "tails; budget",
        "finishedlog": "broadcaster lastinggap outputtimes; budget outputstate",
        "outputstate": "; outputerrors",
        "lastinggap": "",
        "outputerrors": "",
        "sources": "outputerrors",
        "outputtimes": "",
        "tails": "",
        "holes": "",
        "outputdisk": "",
        "budget": "",
        "outputdirectory": "broadcaster errors finding finishedlog outputdisk; budget outputstate",
        "privileges": "",
        "limits": "",
        "errors": "",
        "store": "errors",
        "environment": "errors",
        "descriptors": "",
        "messages": "",
        "inherited": "privileges",
        "estate": "journal messages",
        "leader": "errors estate inherited messages privileges",
        "processes": "",
        "cgroupfs": "descriptors privileges processes",
        "ending": "; cgroups",
        "leftovers": "messages",
        "children": "processes",
        "buffers": "",
        "others": "children processes",
        "leaders": "children others; estate",
        "unixsockets": "",
        "takeover": "privileges unixsockets",
        "errands": "cgroupfs inherited leader leftovers messages privileges",
        "forkserver": "cgroupfs children errands estate inherited leader leaders leftovers "
        "messages privileges takeover",
        "successor": "cgroups errors messages takeover; limits",
        "lifeline": "",
        "spawner": "descriptors lifeline messages successor takeover",
        "removals": "errors",
        "cgroups": "cgroupfs limits removals",
        "scratch": "finding leftovers messages privileges removals",
        "spares": "cgroups errors limits spawner; broadcaster outputdirectory scratch",
        "inputpipe": "",
        "jobinput": "errors inputpipe",
        "jobstate": "; broadcaster budget ending limits",
        "keeping": "errors messages; spawner",
        "job": "buffers cgroups ending errors jobstate keeping limits outputerrors sources "
        "spawner; jobinput jobtable spares",
        "jobstep": "",
        "slurm": "environment errors; jobstate limits",
        "journal": "holes",
        "slurmreports": "jobstate limits",
        "slurmchannel": "errors journal messages",
        "slurminput": "errors journal slurmreports; jobinput slurmchannel",
        "slurmjob": "buffers errors job jobstate keeping slurmreports spawner; slurm slurmchannel "
        "slurminput spares",
        "slurmworker": "errors jobstate journal limits parts slurm slurmchannel "
        "slurminput slurmjob spawner starting worker; environment jobinput jobtable spares",
        "finding": "; jobstate",
        "watching": "errors finding jobstate",
        "retention": "budget; jobtable",
        "registry": "errors finding outputerrors retention watching; broadcaster budget job "
        "jobstate jobtable outputstate",
        "jobtable": "errors finding jobstate limits outputerrors outputstate; store",
        "starting": "buffers cgroups ending errors inputpipe job jobinput jobstate limits spawner; "
        "broadcaster budget environment jobtable keeping leftovers registry scratch spares",
        "resuming": "messages spares spawner successor takeover; budget jobstate jobtable "
        "outputdirectory starting",
        "parts": "cgroups inherited jobtable keeping leftovers outputdirectory privileges registry "
        "resuming scratch spares spawner starting store; limits retention successor",
        "worker": "argv broadcaster cgroups ending environment errors finding jobinput "
        "jobstate limits outputerrors parts privileges registry resuming retention "
        "spawner watching; budget job store",
    },
    "shared": {  # by the service and the client
        "units": "",
        "version": "",
        "certcheck": "",
        "bundle": "",
        "replacing": "",
        "standardstreams": "replacing",
    },
    "access": {
        "throttle": "errors; store",
        "users": "",
        "trustedfiles": "",
        "revocations": "errors; store",
        "oldfiles": "errors store trustedfiles",
        "memory": "",
        "auth": "jwt memory revocations throttle trustedfiles users; store",
        "accounts": "environment errors privileges store trustedfiles",
        "hostaccounts": "accounts environment trustedfiles",
        "audit": "errors standardstreams",
        "tls": "certcheck errors grpc",
    },
    "service": {
        "gathering": "",
        "calls": "gathering; grpc",
        "quotas": "budget units; settings",
        "starts": "",
        "records": "audit",
        "gate": "audit auth calls google grpc metrics quotas records settings starts tls worker",
        "durations": "gate google worker; workerservice_pb2",
        "jobmessages": "durations worker workerservice_pb2",
        "inputcalls": "gate worker; workerservice_pb2",
        "untaken": "",
        "lists": "auth gate jobmessages worker workerservice_pb2; jobrunner quotas untaken",
        "service": "auth durations finding gate inputcalls jobmessages lists metrics quotas starts "
        f"untaken worker {_AUTH_PB} {_WORKER_PB}; budget grpc jobrunner settings",
        "standardservices": "gate grpc_health grpc_reflection settings authservice_pb2 "
        "workerservice_pb2; grpc",
        "settings": "ending environment limits slurm units worker",
        "serveroptions": "audit serverlog settings trustedfiles units",
        "serverfiles": "errors privileges settings tls trustedfiles units users",
        "invite": "bundle certcheck settings units useradmin users",
        "configreport": "serveroptions settings",
        "servercommands": "adminsocket configreport hostcheck invite messages serverfiles "
        "serveroptions serverstatus settings slurmcheck store successor useradmin users version",
        "fileopener": "privileges",
        "hostcheck": "cgroups errors limits worker",
        "jobrunner": "; budget finding resuming worker",
        "slurmcheck": "errors hostcheck slurmworker worker; slurm",
        "serverlog": "standardstreams",
        "daemon": "errors",
        "localserver": "descriptors errors unixsockets",
        "adminsocket": "localserver unixsockets",
        "metrics": "localserver units",
        "serverstatus": "units version worker; quotas",
        "useradmin": "accounts environment replacing settings standardstreams trustedfiles users",
        "server": "accounts adminsocket audit auth calls daemon descriptors errors fileopener gate "
        "grpc hostaccounts hostcheck metrics oldfiles servercommands serverfiles serverlog "
        "serveroptions serverstatus service settings slurmworker standardservices standardstreams "
        "tls trustedfiles units worker; localserver users",
    },
    "client": {
        "sending": "",
        "clienterrors": "; grpc",
        "tokentimes": "",
        "tokenrenewal": "clienterrors tokentimes",
        "retrying": "; clienterrors",
        "link": "clienterrors retrying; google grpc tokenrenewal",
        "reopening": "; clienterrors link",
        "following": "clienterrors reopening; link workerservice_pb2",
        "jobevents": "reopening workerservice_pb2; clienterrors link",
        "streaming": "cli connection display",
        "connection": f"certcheck clienterrors following grpc jobevents link reopening "
        f"replacing sending tokenrenewal units {_AUTH_PB} {_WORKER_PB}; google",
        "profiles": "connection replacing units",
        "importing": "bundle certcheck connection profiles replacing units",
        "selecting": "units; connection",
        "helptexts": "",
        "wrongusage": "",
        "cli": "connection helptexts profiles selecting units version wrongusage",
        "waiting": "cli connection display; workerservice_pb2",
        "listing": "connection display selecting; jobevents workerservice_pb2",
        "credentials": "cli connection display replacing standardstreams tokentimes",
        "stdin": "connection",
        "commands": "cli connection credentials display listing selecting stdin streaming "
        "variables waiting; workerservice_pb2",
        "variables": "connection replacing",
        "display": "cli units; google workerservice_pb2",
        "completion": "cli connection credentials profiles replacing; workerservice_pb2",
        "hints": "cli credentials units; connection",
        "client": "cli commands completion connection credentials hints importing retrying "
        "standardstreams",
    },
}
# Each group, and the groups whose modules it may import beside its own.
_INWARD = {
    "library": set[str](),
    "shared": set(),
    "access": {"library", "shared"},
    "service": {"access", "library", "shared"},
    "client": {"shared"},
}
_GROUPS = {module: group for group, modules in _MODULES.items() for module in modules}
_GENERATED = {*_AUTH_PB.split(), *_WORKER_PB.split()}

_MAX_MODULE_LINES = 600
_LONGER_MODULES = {"cgroups"}  # one subject: a split would tear its locks apart
_MAX_FUNCTION_LINES = 60

# Modules whose behaviour is tested through the module that uses them, and not in test_NAME.py.
_TESTED_WITH = {
    "connection": "client",
    "clienterrors": "client",
    "link": "reopening",
    "retrying": "reopening",
    "jobevents": "reopening",
    "tokentimes": "tokenrenewal",
    "streaming": "following",
    "lastinggap": "broadcaster",
    "outputerrors": "broadcaster",
    "sources": "broadcaster",
    "others": "spawner",
    "slurm": "slurmworker",
    "jobrunner": "service",
    "slurmcheck": "slurmworker",
    "slurmchannel": "slurmworker",
    "slurmjob": "slurmworker",
    "slurminput": "slurmworker",
    "slurmreports": "slurmworker",
    "journal": "slurmworker",
    "leaders": "spawner",
    "estate": "takeover",
    "successor": "takeover",
    "unixsockets": "adminsocket",
    "cli": "client",
    "commands": "client",
    "display": "client",
    "selecting": "client",
    "wrongusage": "hints",
    "gate": "service",
    "jobmessages": "service",
    "untaken": "service",
    "durations": "service",
    "errors": "worker",
    "argv": "worker",
    "certcheck": "tls",
    "bundle": "importing",
    "replacing": "useradmin",
    "invite": "importing",
    "variables": "environment",
    "version": "client",
    "helptexts": "client",
    "job": "worker",
    "jobstate": "worker",
    "keeping": "worker",
    "parts": "worker",
    "resuming": "restart",
    "ending": "worker",
    "buffers": "worker",
    "inputpipe": "jobinput",
    "children": "spawner",
    "budget": "broadcaster",
    "outputdirectory": "broadcaster",
    "outputstate": "broadcaster",
    "finishedlog": "jobtable",
    "registry": "retention",
    "outputdisk": "holes",
    "tails": "outputtimes",
    "spares": "worker",
    "starting": "worker",
    "errands": "spawner",
    "forkserver": "spawner",
    "leader": "spawner",
    "processes": "spawner",
    "messages": "spawner",
    "privileges": "isolation",
    "localserver": "adminsocket",
    "serverstatus": "adminsocket",
    "serverfiles": "server",
    "servercommands": "server",
    "configreport": "serveroptions",
}

# Modules with a subclass of a class of another module, whose own names the subclass may use.
_INHERITS = {"slurmjob": ["job"], "slurmworker": ["worker", "starting", "parts"]}

# Private parts of gRPC and argparse that this project once relied on or was tempted by.
_PRIVATE_PARTS = re.compile(
    r"\bgrpc\._(?!_)\w+|\b_cython\b|\bcygrpc\b|\bexperimental_\w+|\._actions\b"
)
# Underscored, but documented.
_DOCUMENTED = {"_exit", "_asdict", "_fields", "_make", "_replace"}


@cache
def _text(module: str) -> str:
    return (_HERE / f"{module}.py").read_text(encoding="utf-8")


def _parse(module: str) -> ast.Module:
    return ast.parse(_text(module))


def _may_import(module: str, *, annotations: bool = False) -> set[str]:
    runs, _, annotated = _MODULES[_GROUPS[module]][module].partition(";")
    return {*runs.split(), *(annotated.split() if annotations else ())}


def _imports(tree: ast.AST) -> set[str]:
    """The top-level names of all modules imported anywhere in it, the standard library apart."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names - sys.stdlib_module_names


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


# --- who imports whom -------------------------------------------------------------------


def test_every_module_is_in_the_table() -> None:
    """Tests, their helpers and generated code apart."""
    found = {path.stem for path in _HERE.glob("*.py")}
    helpers = {name for name in found if name.startswith("test") or name.endswith("_plugin")}
    assert found - helpers - {"conftest"} - _GENERATED == set(_GROUPS)


@pytest.mark.parametrize("module", _GROUPS)
def test_module_imports_what_it_may_and_nothing_else(module: str) -> None:
    """An import counts wherever in the file it stands, also inside a function."""
    tree = _parse(module)
    assert _imports(tree) == _may_import(module, annotations=True)
    tree.body = [node for node in tree.body if not _is_type_checking(node)]
    assert _imports(tree) == _may_import(module)


def test_dependencies_point_inward() -> None:
    """A group uses only itself and the groups that are named for it."""
    outward = [
        f"{module} imports {imported}"
        for module, group in _GROUPS.items()
        for imported in _may_import(module, annotations=True) & set(_GROUPS)
        if _GROUPS[imported] not in _INWARD[group] | {group}
    ]
    assert outward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Neither when the program runs nor for annotations."""
    rest = {module: _may_import(module, annotations=True) & set(_GROUPS) for module in _GROUPS}
    while free := {module for module, imported in rest.items() if not imported & set(rest)}:
        rest = {module: imported for module, imported in rest.items() if module not in free}
    assert rest == {}


def test_library_is_what_the_makefile_copies_and_needs_no_package() -> None:
    """What it does by itself is tested in test_worker.py."""
    assert set(LIBRARY) == set(_MODULES["library"])


@pytest.mark.parametrize("module", _MODULES["library"])
def test_library_knows_nothing_of_a_server_its_protocol_and_its_users(module: str) -> None:
    """Neither in its code nor in its comments.

    It may give the reason for what it does: what gRPC does in a fork, and how fast it is.
    """
    text = re.sub(r"(?i)fork[ _-]?servers?|file servers?|admin-guide", "", _text(module))
    words = r"\w*servers?|SERVER_\w+|protobuf|rpcs?|admins?|\w*_ADMIN|tokens?|passwords?"
    assert re.findall(rf"(?i)\b(?:{words})\b", text) == []


# --- sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(_GROUPS.keys() - _LONGER_MODULES))
def test_module_can_be_read_in_one_sitting(module: str) -> None:
    """It has at most 600 lines."""
    assert len(_text(module).splitlines()) <= _MAX_MODULE_LINES


@pytest.mark.parametrize("module", _GROUPS)
def test_functions_are_short(module: str) -> None:
    """None has more than 60 lines, its docstring included and its decorators not."""
    long = [
        f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(_parse(module))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
        if node.end_lineno - node.lineno >= _MAX_FUNCTION_LINES
    ]
    assert long == []


# --- names ------------------------------------------------------------------------------


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in _DOCUMENTED


def _private_names_defined_in(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in {"self", "cls"}
        ):
            names.add(node.attr)
    return set(filter(_is_private, names))


def _private_names_used_in(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"getattr", "setattr", "hasattr"}
            and isinstance(node.args[1], ast.Constant)
        ):
            names.add(str(node.args[1].value))
    return set(filter(_is_private, names))


@pytest.mark.parametrize("module", _GROUPS)
def test_module_uses_no_private_name_of_another(module: str) -> None:
    """Neither of another package nor of another module: what it uses, it defines or inherits."""
    tree = _parse(module)
    defined = _private_names_defined_in(tree)
    for base in _INHERITS.get(module, ()):
        defined |= _private_names_defined_in(_parse(base))
    assert _private_names_used_in(tree) - defined == set()
    assert _PRIVATE_PARTS.findall(_text(module)) == []


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("import grpc._cython", {"_cython"}),
        ("from grpc._cython import cygrpc", {"_cython"}),
        ("from grpc import _server", {"_server"}),
        ("server._state.lock", {"_state"}),
        ("getattr(server, '_state')", {"_state"}),
        ("for action in parser._actions: pass", {"_actions"}),
        ("class A:\n def f(self): self._x = other._y", {"_y"}),
        ("def _f(): os._exit(1); x.__class__; point._replace()\n_f()", set()),
    ],
)
def test_private_names_are_found(source: str, private: set[str]) -> None:
    """However they are reached, so that the test above can fail."""
    tree = ast.parse(source)
    assert _private_names_used_in(tree) - _private_names_defined_in(tree) == private


def _public(tree: ast.Module) -> list[str]:
    """What is in the module's `__all__`."""
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return list(names)


@pytest.mark.parametrize("module", _GROUPS)
def test_what_a_module_uses_of_another_is_public(module: str) -> None:
    """It is in the `__all__` of the other one, but for types that only annotations use."""
    tree = _parse(module)
    tree.body = [node for node in tree.body if not _is_type_checking(node)]
    nodes = list(ast.walk(tree))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    used = [
        (node.module, alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module in _GROUPS
        for alias in node.names
    ] + [
        (node.value.id, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in whole & set(_GROUPS)
    ]
    assert [(other, name) for other, name in used if name not in _public(_parse(other))] == []


@pytest.mark.parametrize("module", _GROUPS)
def test_public_names_exist_and_classes_and_functions_say_what_they_are(module: str) -> None:
    """Everything in `__all__` is defined or imported there, and documented where it is defined."""
    tree = _parse(module)
    assert ast.get_docstring(tree)
    described: dict[str, bool] = {}
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            described[node.name] = bool(ast.get_docstring(node))
        elif isinstance(node, ast.ImportFrom):
            described |= {alias.asname or alias.name: True for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            described |= {ast.unparse(target): True for target in targets}
    public = _public(tree)
    assert sorted(set(public)) == sorted(public)
    assert [name for name in public if not described.get(name)] == []


# --- messages ---------------------------------------------------------------------------

_SYSTEM_ERRORS = {
    name
    for name, each in vars(builtins).items()
    if isinstance(each, type) and issubclass(each, OSError)
}
# The first is a program that sends its stderr to a log; the second logs what the gate has caught.
_RAW_ON_PURPOSE = {"forkserver": 1, "gate": 1}


def _raw_errors(tree: ast.AST) -> list[int]:
    """The lines in which the text of a caught OSError goes into a message as it is."""
    found = []
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or not handler.name or not handler.type:
            continue
        caught = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
        if not caught & (_SYSTEM_ERRORS | {"Exception"}):
            continue
        for node in ast.walk(handler):
            texts: list[ast.expr] = []
            if isinstance(node, ast.FormattedValue):
                texts = [node.value]
            elif isinstance(node, ast.Call) and re.match(r"str$|logger\.", ast.unparse(node.func)):
                texts = node.args
            found += [
                text.lineno
                for text in texts
                if isinstance(text, ast.Name) and text.id == handler.name
            ]
    return found


@pytest.mark.parametrize("module", _GROUPS)
def test_message_of_the_system_does_not_appear_raw(module: str) -> None:
    """As `[Errno 2] ...`: `errors.in_words` has the reason alone, and the path before it."""
    raw = _raw_errors(_parse(module))
    assert len(raw) == _RAW_ON_PURPOSE.get(module, 0), raw


def test_raw_messages_are_found() -> None:
    """So that the test above can fail."""
    for line in ('print(f"{e}")', "str(e)", 'logger.error("%s", e)'):
        assert _raw_errors(ast.parse(f"try: f()\nexcept OSError as e: {line}"))
        assert not _raw_errors(ast.parse(f"try: f()\nexcept KeyError as e: {line}"))


# --- files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml"),
        *("docs/deploy.md", "docs/design.md", "docs/security.md", "docs/benchmarks.md"),
        *("workerservice.proto", "authservice.proto"),
        *("bench/__main__.py", "bench/long.py", "deploy/job-worker.service"),
    ],
)
def test_file_is_where_it_is_looked_for(path: str) -> None:
    """The documents, and what they and the Makefile name."""
    assert (_HERE / path).is_file()


@pytest.mark.parametrize(
    "path",
    [
        "client",
        "server",
        "scripts/demo.sh",
        "scripts/kernel-run",
        "certs/generate.sh",
        ".ci/run",
        "scripts/install.sh",
        "scripts/systemd-guest",
    ],
)
def test_program_can_be_executed(path: str) -> None:
    """By whoever has a clone."""
    assert os.access(_HERE / path, os.X_OK)


def test_every_module_has_its_tests_beside_it() -> None:
    """In test_NAME.py, except for those that `_TESTED_WITH` names."""
    for module in _GROUPS:
        assert (_HERE / f"test_{_TESTED_WITH.get(module, module)}.py").is_file(), module
