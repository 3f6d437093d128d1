"""Tests of profiles: named servers in the configuration file of the command line."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from testkit import ClientProgram, ServerProgram


@pytest.fixture
def config(stranger: ClientProgram, tmp_path: Path) -> Path:
    """The place of the configuration file, for a client that knows a server only from it."""
    for name in ("JOBWORKER_SERVER", "JOBWORKER_CERTS"):
        del stranger.environment[name]
    path = tmp_path / "config" / "job-worker" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def _in_use(client: ClientProgram, *arguments: str) -> dict[str, str]:
    facts: dict[str, str] = json.loads(client.read("whoami", "--json", *arguments))
    return facts


def test_profile_names_server_certificates_and_user(
    stranger: ClientProgram, config: Path, program: ServerProgram, certs: Path
) -> None:
    """So a login needs only the password, and the other commands only the profile."""
    config.write_text(f'[work]\nserver = "{program.address}"\ncerts = "{certs}"\nuser = "admin"\n')
    stranger.read("login", "--profile", "work", "-p", "admin")
    stranger.environment["JOBWORKER_PROFILE"] = "work"
    facts = _in_use(stranger)
    assert (facts["user"], facts["role"], facts["server"], facts["profile"]) == (
        *("admin", "admin"),
        *(program.address, "work"),
    )
    assert stranger.read("list")


def test_profile_called_default_is_used_when_none_is_named(
    stranger: ClientProgram, config: Path, program: ServerProgram, certs: Path
) -> None:
    """Two profiles of one server keep their tokens apart."""
    same = f'server = "{program.address}"\ncerts = "{certs}"\n'
    config.write_text(f'[default]\n{same}user = "user"\n[boss]\n{same}user = "admin"\n')
    stranger.read("login", "-p", "user")
    stranger.read("login", "-p", "admin", "--profile", "boss")
    assert _in_use(stranger)["user"] == "user"
    assert _in_use(stranger, "--profile", "boss")["user"] == "admin"


def test_option_then_environment_then_profile_then_default(
    cli: ClientProgram, config: Path, certs: Path, tmp_path: Path
) -> None:
    """The first of them that gives a server or certificates counts; --profile is an option."""
    others = {name: str(shutil.copytree(certs, tmp_path / name)) for name in ("b", "c", "d")}
    assert _in_use(cli, "--certs", str(certs))["server"] == "127.0.0.1:50051"
    config.write_text(f'[default]\nserver = "profile:1"\ncerts = "{others["b"]}"\n')
    facts = _in_use(cli)
    assert (facts["server"], facts["certificate"]) == ("profile:1", f"{others['b']}/client.pem")
    cli.environment |= {"JOBWORKER_SERVER": "environment:2", "JOBWORKER_CERTS": others["c"]}
    facts = _in_use(cli)
    assert (facts["server"], facts["certificate"]) == ("environment:2", f"{others['c']}/client.pem")
    facts = _in_use(cli, "--profile", "default")
    assert (facts["server"], facts["certificate"]) == ("profile:1", f"{others['b']}/client.pem")
    facts = _in_use(cli, "--server", "option:3", "--certs", others["d"])
    assert (facts["server"], facts["certificate"]) == ("option:3", f"{others['d']}/client.pem")


def test_single_files_of_a_profile_give_way_to_another_directory(
    cli: ClientProgram, config: Path, certs: Path, tmp_path: Path
) -> None:
    """A key belongs to its certificate, so the files of the profile are replaced together."""
    config.write_text(
        f'[default]\ncerts = "{certs}"\ncert = "{certs}/other.pem"\nkey = "{certs}/other-key.pem"\n'
    )
    assert _in_use(cli)["certificate"] == f"{certs}/other.pem"
    copy = shutil.copytree(certs, tmp_path / "copy")
    assert _in_use(cli, "--certs", str(copy))["certificate"] == f"{copy}/client.pem"


def test_paths_may_begin_in_the_directory_of_the_file_or_at_home(
    cli: ClientProgram, config: Path, certs: Path, tmp_path: Path
) -> None:
    """Wherever the client is called."""
    shutil.copytree(certs, config.parent / "mine")
    shutil.copytree(certs, tmp_path / "home" / "mine")
    cli.environment["HOME"] = str(tmp_path / "home")
    config.write_text('[a]\ncerts = "mine"\n[b]\ncerts = "~/mine"\n')
    a, b = (_in_use(cli, "--profile", name)["certificate"] for name in "ab")
    assert a == f"{config.parent}/mine/client.pem"
    assert b == f"{tmp_path}/home/mine/client.pem"


def test_file_is_looked_for_in_the_home_directory(
    cli: ClientProgram, config: Path, tmp_path: Path
) -> None:
    """In `.config/job-worker`, unless XDG_CONFIG_HOME names another place."""
    del cli.environment["XDG_CONFIG_HOME"]
    cli.environment["HOME"] = str(tmp_path / "home")
    shutil.copytree(config.parent, tmp_path / "home" / ".config" / "job-worker")
    path = tmp_path / "home" / ".config" / "job-worker" / "config.toml"
    path.write_text("[a]\nserver = 1\n")
    assert f"client: {path}, [a] server: must be text" in cli.fail("list", "--profile", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[a]\nserver = "h"\n', "{path}, [a] server: 'h' is not HOST:PORT, like 127.0.0.1:50051"),
        ('[a]\nserver = ""\n', '{path}, [a] server: must be text in quotes, like server = "..."'),
        ("[a]\nuser = 7\n", '{path}, [a] user: must be text in quotes, like user = "..."'),
        (
            '[a]\nsrever = "h:1"\n',
            "{path}, [a] srever: there is no such key, only server, certs, cert, key, ca, user",
        ),
        ('server = "h:1"\n', "{path}: server must stand in a profile, below a line like [work]"),
        ("[a\n", "{path} is not TOML: "),
        ("[b]\n[c]\n", "there is no profile 'a': {path} has only b, c; see --profile"),
        ("", "there is no profile 'a': {path} has no profile; see --profile"),
        (None, "there is no profile 'a': {path} does not exist; see --profile"),
    ],
    ids=["address", "empty", "type", "key", "top", "syntax", "name", "no profile", "no file"],
)
def test_mistake_in_the_file_is_told_with_file_and_key(
    stranger: ClientProgram, config: Path, text: str | None, message: str
) -> None:
    """Before anything else is done."""
    if text is not None:
        config.write_text(text)
    line = stranger.fail("list", "--profile", "a")
    assert line.startswith(f"client: {message.format(path=config)}"), line


def test_file_that_cannot_be_read_is_told(stranger: ClientProgram, config: Path) -> None:
    """It may be a directory, or not be UTF-8."""
    config.write_bytes(b'[default]\nuser = "\xff"\n')
    assert stranger.fail("list") == f"client: {config} is not UTF-8; save it as UTF-8\n"
    os.unlink(config)
    config.mkdir()
    assert stranger.fail("list") == (
        f"client: cannot read {config}: Is a directory; make it readable, or move it away\n"
    )


@pytest.mark.parametrize(
    ("words", "variable", "hint"),
    [
        (["--server", "b:2"], None, "--profile default --server b:2"),
        ([], "b:2", "--profile default --server b:2"),
        (["--server", "a:1"], None, "--profile default"),
        ([], None, "--profile default"),
    ],
)
def test_hint_to_log_in_names_a_server_that_is_not_the_profiles(
    stranger: ClientProgram, config: Path, words: list[str], variable: str | None, hint: str
) -> None:
    """Else the user would log in to the profile's server, and get the same hint again."""
    config.write_text('[default]\nserver = "a:1"\nuser = "alice"\n')
    stranger.environment.pop("JOBWORKER_SERVER", None)
    if variable:
        stranger.environment["JOBWORKER_SERVER"] = variable
    assert stranger.fail("list", *words).endswith(f"; run: client login {hint}\n")


def test_login_without_a_user_is_wrong_usage(stranger: ClientProgram, config: Path) -> None:
    """Neither an option nor a profile names one."""
    config.write_text('[default]\nserver = "localhost:1"\n')
    status, _, stderr = stranger.run("login")
    assert status == 2
    assert stderr == (
        "client login: the user is missing; give -u USER, or a profile with a user; see client "
        "login --help\n"
    )
