"""Tests of how the project is laid out: its files, and which module knows which."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent

# Each module and all it may import beside the standard library. Dependencies point
# to the library, which is the first ten and can be copied by itself.
_IMPORTS = {
    "broadcaster": set[str](),
    "privileges": set(),
    "limits": set(),
    "errors": set(),
    "cgroups": {"limits"},
    "forkserver": {"cgroups", "privileges"},  # cgroups only at its end
    "spawner": {"forkserver"},
    "job": {"cgroups", "errors", "limits", "spawner"},
    "retention": {"errors", "job"},
    "worker": {
        *("broadcaster", "cgroups", "errors", "job", "limits", "privileges", "retention"),
        "spawner",
    },
    "throttle": set(),
    "users": set(),
    "revocations": set(),
    "auth": {"jwt", "revocations", "throttle", "users"},
    "accounts": set(),
    "admission": {"grpc", "quotas"},
    "callpool": {"grpc"},
    "audit": set(),
    "tls": {"grpc"},
    "quotas": {"broadcaster", "units"},
    "gate": {"admission", "audit", "auth", "quotas", "settings", "worker", "grpc", "google"},
    "service": {
        "callpool",
        *("auth", "gate", "quotas", "worker", "google"),
        *("authservice_pb2", "authservice_pb2_grpc"),
        *("workerservice_pb2", "workerservice_pb2_grpc"),
    },
    "units": set(),
    "settings": {"limits", "units", "users", "worker"},
    "hostcheck": {"cgroups", "limits", "worker"},
    "server": {
        *("accounts", "admission", "audit", "auth", "callpool", "gate", "hostcheck"),
        "quotas",
        *("privileges", "service", "settings", "tls", "units", "users", "worker", "grpc"),
    },
    "connection": {
        *("units", "grpc", "authservice_pb2", "authservice_pb2_grpc"),
        *("workerservice_pb2", "workerservice_pb2_grpc"),
    },
    "cli": {"connection", "units"},
    "commands": {"cli", "connection", "units"},
    "client": {"cli", "commands", "connection"},
}
# What a module names in annotations only, and never imports when it runs.
_ANNOTATIONS = {
    "job": {"broadcaster"},
    "retention": {"broadcaster"},
    "admission": {"callpool"},
    "connection": {"google"},
    "commands": {"google", "workerservice_pb2"},
    "quotas": {"settings"},
    "service": {"settings", "grpc"},
}


def _parse(module: str) -> ast.Module:
    return ast.parse((_HERE / f"{module}.py").read_text(encoding="utf-8"))


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


@pytest.mark.parametrize("module", _IMPORTS)
def test_module_imports_what_it_may_and_nothing_else(module: str) -> None:
    """Wherever in the file the import stands: dependencies point inward."""
    tree = _parse(module)
    assert _imports(tree) == _IMPORTS[module] | _ANNOTATIONS.get(module, set())
    tree.body = [node for node in tree.body if not _is_type_checking(node)]
    assert _imports(tree) == _IMPORTS[module]


@pytest.mark.parametrize("module", _IMPORTS)
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
    public = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert sorted(set(public)) == sorted(public)
    assert [name for name in public if not described.get(name)] == []


@pytest.mark.parametrize(
    "path",
    [
        *("worker.py", "spawner.py", "cgroups.py", "broadcaster.py", "auth.py", "server.py"),
        *("client.py", "connection.py", "cli.py", "commands.py"),
        *("forkserver.py", "privileges.py"),
        *("workerservice.proto", "authservice.proto", "certs/generate.sh"),
        *(
            "service.py",
            "gate.py",
            "admission.py",
            "settings.py",
            "units.py",
            "hostcheck.py",
            "scripts/kernel-run",
        ),
        *("throttle.py", "users.py", "revocations.py", "accounts.py", "audit.py", "tls.py"),
        *("quotas.py", "scripts/demo.sh", "deploy/job-worker.service", "docs/security.md"),
        *("bench/__main__.py", "bench/long.py", "bench/harness.py"),
        *("workerservice_pb2.py", "workerservice_pb2_grpc.py"),
        *("authservice_pb2.py", "authservice_pb2_grpc.py"),
        *("Makefile", "pyproject.toml", "README.md", "docs/design.md", "CHANGELOG.md", ".ci/run"),
        *("client", "server"),
    ],
)
def test_file_is_where_it_is_looked_for(path: str) -> None:
    """The layout is flat; what is to be executed is executable."""
    assert (_HERE / path).is_file()
    if path in {"client", "server", "scripts/kernel-run", "certs/generate.sh", ".ci/run"}:
        assert os.access(_HERE / path, os.X_OK)


def test_every_module_has_its_tests_beside_it() -> None:
    """Those of the command line are tested with the client, the gate with the services,
    errors and jobs with the worker, and the fork server with the spawner.
    """
    untested = {"connection", "cli", "commands", "gate", "errors", "job"}
    untested |= {"forkserver", "privileges"}
    for module in set(_IMPORTS) - untested:
        assert (_HERE / f"test_{module}.py").is_file(), module
