"""Tests of the protos for other languages: their style, and clients in Node and Go.

grpcurl is a Go program. `make tools` installs the programs that these tests need.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import authservice_pb2
import workerservice_pb2
from testkit import GUARD_S, find_program

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor

    from testkit import ServerProgram

_HERE = Path(__file__).resolve().parent
_NODE = _HERE / "examples" / "node"


def _run(*command: str, cwd: Path = _HERE) -> str:
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=GUARD_S, check=False
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    return result.stdout


def _grpcurl() -> str:
    return find_program("grpcurl", Path(sys.prefix, "bin", "grpcurl"))


@pytest.mark.parametrize("file", [authservice_pb2.DESCRIPTOR, workerservice_pb2.DESCRIPTOR])
def test_protos_name_the_packages_of_other_languages(file: FileDescriptor) -> None:
    """So that generated code of Go and Java needs no options of its own."""
    options = file.GetOptions()
    assert options.go_package == "jobworker/v1;jobworkerv1"
    assert options.java_package == file.package == "jobworker.v1"
    assert options.java_multiple_files


def test_buf_lint_passes() -> None:
    """With the rules of `buf.yaml`."""
    assert _run(find_program("buf", _NODE / "node_modules" / ".bin" / "buf"), "lint") == ""


def test_every_exception_of_the_linter_is_justified() -> None:
    """A comment stands right above each rule in `buf.yaml` that is not obeyed."""
    lines = (_HERE / "buf.yaml").read_text().splitlines()
    exceptions = lines[lines.index("  except:") :]
    rules = [i for i, line in enumerate(exceptions) if re.search(r"[A-Z]+_[A-Z_]+$|_NAME:$", line)]
    assert len(rules) == 2
    assert all(exceptions[i - 1].strip().startswith("# ") for i in rules)


def test_client_in_node_logs_in_and_starts_streams_and_stops_jobs(
    program: ServerProgram, certs: Path
) -> None:
    """With @grpc/grpc-js over mutual TLS; after its logout the token is refused."""
    node = find_program("node")
    find_program("@grpc/grpc-js", _NODE / "node_modules" / "@grpc" / "grpc-js" / "package.json")
    # Node warns of an IP address, which it would send as the server's name.
    address = program.address.replace("127.0.0.1", "localhost")
    output = _run(node, "story.mjs", address, str(certs), "user", "user", cwd=_NODE)
    assert output.splitlines() == [
        "hello from Node",
        "JOB_STATUS_FINISHED END_REASON_EXITED 0",
        "JOB_STATUS_STOPPED END_REASON_STOPPED_BY_OWNER",
        "UNAUTHENTICATED",
    ]


def test_commands_with_grpcurl_that_the_document_shows_print_what_it_shows(
    program: ServerProgram, certs: Path, tmp_path: Path
) -> None:
    """The whole story over mutual TLS, but for the address and the place of the certificates."""
    text = (_HERE / "docs" / "other-languages.md").read_text()
    script, shown = re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)
    for proto in ("authservice.proto", "workerservice.proto"):
        shutil.copy(_HERE / proto, tmp_path)
    (tmp_path / "certs").symlink_to(certs)
    script = script.replace("grpcurl", _grpcurl()).replace("127.0.0.1:50051", program.address)
    assert _run("sh", "-euc", "token=; " + script, cwd=tmp_path) == shown


def test_login_with_grpcurl_that_readme_shows_gets_a_token(
    program: ServerProgram, certs: Path
) -> None:
    """It is one command, as README has it."""
    readme = (_HERE / "README.md").read_text()
    (command,) = re.findall(r"^    (grpcurl (?:.*\\\n)*.*)$", readme, re.MULTILINE)
    command = command.replace("grpcurl", _grpcurl(), 1).replace("certs/", f"{certs}/")
    output = _run("sh", "-c", command.replace("127.0.0.1:50051", program.address))
    assert '"accessToken": "ey' in output
