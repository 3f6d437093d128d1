"""Tests with the programs that people run: they find an account, a home and room for their files.

The server runs in a mount namespace of its own, where /etc/passwd and /etc/group have accounts for
its users. So the tests change nothing on this host.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from client import Client
from privileges import can_change_user
from testkit import ServerProgram, public_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HOST_UID, _RANGE_UID, _GROUP = 2001, 70_123, 2999
# Mounts "$1" and "$2", and executes the rest.
_WITH_ACCOUNTS = (
    *("unshare", "--mount", "sh", "-c"),
    'mount --bind "$1" /etc/passwd && mount --bind "$2" /etc/group && shift 2 && exec "$@"',
    "sh",
)


@dataclass
class _House:
    """A server. `uid`: of the jobs of `user`, whose `home` this is; `start` begins a job."""

    client: Client
    uid: int
    home: Path

    def run(self, script: str, *args: str) -> str:
        """Run a shell script as a job, which must end with 0; return its output."""
        job_id = self.client.start("sh", ["-euc", script, "sh", *args])
        output = b"".join(self.client.stream(job_id)).decode(errors="replace")
        job = self.client.status(job_id)
        assert job.exit_code == 0, output
        return output


def _accounts(directory: Path, uid: int, home: Path) -> tuple[str, str]:
    """Make a passwd and a group file with accounts for the users; return their paths."""
    lines = [f"user:x:{uid}:{uid}::{home}:/bin/sh", f"admin:x:{uid + 1}:{uid + 1}::/:/bin/sh"]
    passwd, group = directory / "passwd", directory / "group"
    old = [line for line in Path("/etc/passwd").read_text().splitlines() if line.count(":") == 6]
    kept = [line for line in old if line.partition(":")[0] not in {"user", "admin"}]
    passwd.write_text("".join(f"{line}\n" for line in (*kept, *lines)))
    groups = [f"staff-of-jobs:x:{_GROUP}:user", f"user:x:{uid}:", f"admin:x:{uid + 1}:"]
    group.write_text(Path("/etc/group").read_text() + "".join(f"{line}\n" for line in groups))
    for path in (passwd, group):
        path.chmod(0o644)
    return str(passwd), str(group)


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    """A directory on disk that every user can enter; skips the tests without root's rights."""
    if os.geteuid() != 0 or not can_change_user():
        pytest.skip("needs root")
    command = ["unshare", "--mount", "true"]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="module", params=["host", "range"])
def house(
    request: pytest.FixtureRequest,
    ground: Path,
    certs: Path,
    tokens: dict[str, str],
    make_state: Callable[[], Path],
) -> Iterator[_House]:
    """A server whose user has an account: the host's own, or one that was made for the range."""
    # A new one each time: a worker of pytest-xdist may come back to a parameter.
    directory = Path(tempfile.mkdtemp(prefix=request.param, dir=ground))
    directory.chmod(0o755)
    state = directory / "state"
    state.mkdir(0o700, parents=True)
    shutil.copy(make_state() / "token.key", state)
    if request.param == "host":
        uid, home = _HOST_UID, directory / "home" / "user"
        home.mkdir(parents=True)
        os.chown(home, uid, uid)
    else:
        uid, home = _RANGE_UID, state / "homes" / "user"
    files = _accounts(directory, uid, home)
    server = ServerProgram(
        directory / "log",
        *("--listen", "127.0.0.1:0", "--limits", "off", "--certs", str(certs)),
        *("--state-dir", str(state), "--accounts", request.param),
        before=(*_WITH_ACCOUNTS, *files),
    )
    with Client(server.address, certs=certs, token=tokens["user"]) as client:
        yield _House(client, uid, home)
    assert server.end() == 0, server.log.read_text()


def _needs(*programs: str) -> None:
    """Skip the test if a program is missing; where all must be there, fail."""
    for program in programs:
        if shutil.which(program, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin") is None:
            if os.environ.get("JOBWORKER_REQUIRE_PROGRAMS") == "1":
                pytest.fail(f"JOBWORKER_REQUIRE_PROGRAMS=1, but {program} is missing")
            pytest.skip(f"needs {program}")


def test_job_has_the_account(house: _House) -> None:
    """Name, home, shell and uid are those of the account; the group too."""
    script = 'whoami; id -u; id -gn; pwd; echo "$HOME $USER $LOGNAME $SHELL"; echo ~user'
    home = str(house.home)
    told = house.run(script).splitlines()
    assert told[:2] == ["user", str(house.uid)]
    assert told[3:] == [home, f"{home} user user /bin/sh", home]


def test_job_has_the_groups_of_the_host_account(house: _House) -> None:
    """Only if it is the host's own account: a uid of the range has no other group."""
    groups = house.run("id -G").split()
    expected = [str(house.uid), *([str(_GROUP)] if house.uid == _HOST_UID else [])]
    assert groups == expected


def test_python_finds_its_account(house: _House) -> None:
    """As in `python -c "import os, pwd; pwd.getpwuid(os.getuid())"`."""
    code = "import os, pwd; print(pwd.getpwuid(os.getuid()).pw_name, os.path.expanduser('~'))"
    assert house.run('"$1" -c "$2"', public_python(), code) == f"user {house.home}\n"


def test_git_keeps_its_global_configuration(house: _House) -> None:
    """The next job finds it, and commits with it."""
    _needs("git")
    house.run("git config --global user.name Jane; git config --global user.email j@example.org")
    script = """
        rm -rf repository; git init -q repository; cd repository; echo x >file; git add file
        git commit -q -m first; git log --format=%an
    """
    assert house.run(script) == "Jane\n"


_SSHD = r"""
import os, socket, subprocess, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        connection, _ = server.accept()
        command = ["/usr/sbin/sshd", "-i", "-e", "-f", os.path.expanduser("~/sshd/config")]
        subprocess.Popen(command, stdin=connection, stdout=connection)
        connection.close()
"""


def test_git_clones_over_ssh(house: _House) -> None:
    """ssh-keygen makes keys in ~/.ssh, sshd accepts them on loopback, git clones through it."""
    _needs("git", "ssh", "ssh-keygen", "sshd")
    house.run("""
        rm -rf .ssh sshd origin clone; mkdir -p .ssh sshd
        ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519
        ssh-keygen -q -t ed25519 -N '' -f sshd/key
        cp .ssh/id_ed25519.pub .ssh/authorized_keys
        printf '%s\\n' "HostKey $HOME/sshd/key" "UsePAM no" "StrictModes no" >sshd/config
        git -c init.defaultBranch=main init -q origin; cd origin; echo hello >file; git add file
        git -c user.name=x -c user.email=x commit -q -m first
    """)
    daemon = house.client.start(public_python(), ["-c", _SSHD])
    port = next(house.client.stream(daemon)).decode().strip()
    script = """
        export GIT_SSH_COMMAND="ssh -o StrictHostKeyChecking=accept-new -p $1"
        git clone -q "user@127.0.0.1:$HOME/origin" clone; cat clone/file
    """
    try:
        assert house.run(script, port).splitlines()[-1] == "hello"
    finally:
        house.client.stop(daemon)
    assert "ssh-ed25519" in house.run("cat .ssh/known_hosts")


def test_pip_installs_into_a_virtual_environment(house: _House, ground: Path) -> None:
    """It needs a home for its cache, and TMPDIR."""
    python = public_python()
    has_pip = [python, "-c", "import ensurepip"]
    if subprocess.run(has_pip, check=False, capture_output=True).returncode:
        pytest.skip("needs ensurepip (Debian: python3-venv)")
    wheel = ground / "hello_jobs-1.0-py3-none-any.whl"
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: hello-jobs\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("hello_jobs.py", "print('hello from a wheel')\n")
        for name, content in files.items():
            archive.writestr(f"hello_jobs-1.0.dist-info/{name}", content)
    wheel.chmod(0o644)
    script = """
        rm -rf venv; "$1" -m venv venv
        venv/bin/pip install --quiet --disable-pip-version-check --no-index "$2"
        venv/bin/python -c 'import hello_jobs'
    """
    assert house.run(script, python, str(wheel)).splitlines()[-1] == "hello from a wheel"


def test_gcc_compiles(house: _House) -> None:
    """Its temporary files are in TMPDIR."""
    _needs("gcc")
    script = """
        echo 'int main(void) { return 7; }' >seven.c; gcc -save-temps=obj -o seven seven.c
        gcc -o seven seven.c; ./seven || echo $?; ls "$TMPDIR" | wc -l
    """
    assert house.run(script).split() == ["7", "0"]


def test_npm_installs_a_local_package(house: _House) -> None:
    """It keeps its cache and logs in the home."""
    _needs("npm", "node")
    script = """
        rm -rf library program; mkdir library program
        echo '{"name": "greeting", "version": "1.0.0"}' >library/package.json
        echo 'console.log("hello from npm");' >library/index.js
        cd program; echo '{"name": "program", "version": "1.0.0"}' >package.json
        npm install --silent --offline --no-audit --no-fund ../library >/dev/null
        node -e 'require("greeting")'; test -d ~/.npm && echo kept
    """
    assert house.run(script).split("\n")[:2] == ["hello from npm", "kept"]


def test_java_finds_the_home(house: _House) -> None:
    """Java asks for the account, and not for HOME."""
    _needs("java")
    output = house.run("java -XshowSettings:properties -version 2>&1")
    found = [line.split(" = ") for line in output.splitlines() if "user.home" in line]
    assert found == [["    user.home", str(house.home)]]


def test_account_of_this_host_is_what_jobs_without_isolation_have(
    serve: Callable[..., object], connect: Callable[..., Client]
) -> None:
    """Without root, jobs have the server's own account and its home."""
    server = serve()
    client = connect(address=server.address)  # type: ignore[attr-defined]
    account = pwd.getpwuid(os.geteuid())
    job_id = client.start("sh", ["-c", 'id -un; echo "$HOME"; pwd -P'])
    told = b"".join(client.stream(job_id)).decode().splitlines()
    place = account.pw_dir if os.path.isdir(account.pw_dir) else "/"  # nobody has no home
    assert told == [account.pw_name, account.pw_dir, os.path.realpath(place)]
