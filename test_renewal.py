"""The renewal of certificates, as docs/monitoring.md describes it: its own commands, in order.

Scripts stand for scp, ssh and systemctl: the machine with the CAs and the server are both here.
"""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from client import Client, ClientError
from testkit import FOREVER, GUARD_S, clean_environment, follow

if TYPE_CHECKING:
    from collections.abc import Callable

    from testkit import ServerProgram

_HERE = Path(__file__).resolve().parent


def _blocks() -> list[str]:
    """The commands of the section, a text for each block."""
    text = (_HERE / "docs/monitoring.md").read_text(encoding="utf-8")
    section = text.partition("## Renewing certificates\n")[2].partition("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


class _Host:
    """The server, and the machine with the CAs, whose clone has the directory certs/.

    Attributes: `cas`, that directory; `program`; `clients`, a directory for each client's files.
    """

    def __init__(self, tmp_path: Path, start_server: Callable[..., ServerProgram]) -> None:
        self._path = tmp_path
        self.cas = tmp_path / "clone" / "certs"
        self.cas.mkdir(parents=True)
        shutil.copy(_HERE / "certs/generate.sh", self.cas)
        self.run("certs/generate.sh --hosts jobs.example.org && certs/generate.sh alice")
        etc, state = tmp_path / "etc", tmp_path / "state"
        etc.mkdir()
        for name in ("server.pem", "server-key.pem", "client-ca.pem"):
            shutil.copy(self.cas / name, etc)
        state.mkdir(mode=0o700)
        self.program = start_server("--certs", str(etc), state=state)
        programs = tmp_path / "bin"
        programs.mkdir()
        # The last argument of scp is HOST:PATH. ssh runs here what it would run there.
        for name, script in {
            "scp": f'for last; do :; done; set -- "${{@:1:$#-1}}"; to="{etc}${{last##*/certs}}"\n'
            'cp -- "$@" "$to"',
            "ssh": 'shift; "$@"',
            "systemctl": f'[ "$*" = "reload job-worker" ]; "{_HERE}/server" --state-dir "{state}" '
            "reload",
        }.items():
            (programs / name).write_text(f"#!/bin/bash\nset -eu\n{script}\n")
            (programs / name).chmod(0o755)

    def run(self, commands: str) -> None:
        """Run commands in the clone, like a person who stops at the first error."""
        environment = clean_environment()
        environment["PATH"] = f"{self._path / 'bin'}:{environment['PATH']}"
        run = subprocess.run(
            ["bash", "-euc", commands],
            cwd=self.cas.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
        )
        assert run.returncode == 0, f"{commands}\n{run.stderr}"

    def give(self, name: str, server_ca: str = "server-ca.pem") -> Path:
        """Give alice her files of now; return her directory."""
        directory = self._path / name
        directory.mkdir()
        shutil.copy(self.cas / "alice.pem", directory / "client.pem")
        shutil.copy(self.cas / "alice-key.pem", directory / "client-key.pem")
        shutil.copy(self.cas / server_ca, directory / "server-ca.pem")
        return directory

    def certificate(self) -> str:
        """Return the certificate that the server shows to new connections."""
        host, _, port = self.program.address.rpartition(":")
        return ssl.get_server_certificate((host, int(port)))

    def accepts(self, files: Path) -> bool:
        """Whether alice can log in with these files, over a new connection."""
        with Client(self.program.address, certs=files) as client:
            try:
                client.login("user", "user")
            except ClientError as error:
                if error.code != "UNAVAILABLE":
                    raise
                return False
            return True


@pytest.fixture
def host(tmp_path: Path, start_server: Callable[..., ServerProgram]) -> _Host:
    return _Host(tmp_path, start_server)


def test_certificates_are_renewed_as_the_guide_says(host: _Host) -> None:
    """Nobody is shut out on the way, and what has been replaced is refused in the end."""
    server, client, both_client_cas, new_client_ca, both_server_cas, new_server_ca = _blocks()
    first = host.give("first")
    with Client(host.program.address, certs=first) as alice:
        alice.login("user", "user")
        job_id = alice.start(*FOREVER)
        stream = follow(alice, job_id)

        before = host.certificate()
        host.run(server)
        assert host.certificate() != before
        assert host.accepts(first)

        host.run(client)
        renewed = host.give("renewed")
        assert (renewed / "client.pem").read_bytes() != (first / "client.pem").read_bytes()
        assert host.accepts(renewed)

        host.run(both_client_cas)
        of_new_ca = host.give("of-new-ca")
        assert host.accepts(of_new_ca)
        assert host.accepts(renewed)
        host.run(new_client_ca)
        assert host.accepts(of_new_ca)
        assert not host.accepts(renewed)

        host.run(both_server_cas)
        ready = host.give("ready", "server-cas.pem")
        assert host.accepts(ready)
        host.run(new_server_ca)
        assert host.accepts(ready)
        assert not host.accepts(of_new_ca)  # it does not know the new server CA

        # The connection of the beginning has gone on.
        alice.stop(job_id)
        assert b"".join(stream) == b""


def test_reload_of_half_a_pair_fails_and_changes_nothing(host: _Host) -> None:
    """As the guide says: the command fails, and the server keeps what it had."""
    before = host.certificate()
    host.run("certs/generate.sh --hosts jobs.example.org")
    host.run("scp certs/server.pem root@jobs.example.org:/etc/job-worker/certs/")
    with pytest.raises(AssertionError, match=r"server-key\.pem is not the key of server\.pem"):
        host.run("ssh root@jobs.example.org systemctl reload job-worker")
    assert host.certificate() == before
