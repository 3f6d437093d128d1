"""Tests of `server invite`, which makes a bundle, and of `client import`, which reads it."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import bundle
from testkit import GUARD_S, ServerProgram, run_server

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testkit import ClientProgram

_HERE = Path(__file__).resolve().parent
_ADDRESS = "127.0.0.1:1"


def _password(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    password = done.stdout.rpartition("which is not in the bundle: ")[2].strip()
    assert re.fullmatch("[0-9a-f]{24}", password)  # -p takes it, because it begins with no dash
    return password


@pytest.fixture(scope="module")
def made(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A bundle for alice."""
    path = tmp_path_factory.mktemp("bundle") / "alice.tar"
    done = run_server("--certs", certs, "invite", "alice", "--address", _ADDRESS, "-o", path)
    assert done.returncode == 0, done.stderr
    return path.read_bytes()


@pytest.fixture
def alice(stranger: ClientProgram, tmp_path: Path) -> ClientProgram:
    """A client that knows no server."""
    for name in ("JOBWORKER_SERVER", "JOBWORKER_CERTS"):
        del stranger.environment[name]
    stranger.environment["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    return stranger


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the profiles of `alice` are."""
    return tmp_path / "config" / "job-worker"


def _refused(client: ClientProgram, *words: str | Path) -> str:
    status, stdout, text = client.run(*map(str, words))
    assert (status, stdout, text.count("\n")) == (1, b"", 1)
    return text


def _tree(path: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in path.rglob("*") if each.is_file()}


# --- the whole way --------------------------------------------------------------------------


def test_invited_user_runs_a_job(certs: Path, public: Path, alice: ClientProgram) -> None:
    """With the bundle and the password, on a server that has been running. Nothing is renamed."""
    users, state, tar = public / "users", public / "state", public / "alice.tar"
    users.touch(0o600)
    options = ("--users", users, "--state-dir", state, "--certs", certs)
    assert (
        run_server(*options, "invite", "root", "--address", _ADDRESS, "-o", public / "x").returncode
        == 0
    )
    server = ServerProgram(
        public / "log", *("--listen", "127.0.0.1:0", "--limits", "off"), *map(str, options)
    )
    before = sorted(os.listdir(certs))
    done = run_server(*options, "invite", "alice", "--address", server.address, "-o", tar)
    password = _password(done)
    assert done.stderr == ""  # so the running server has been told
    assert stat.S_IMODE(tar.stat().st_mode) == 0o600
    assert sorted(os.listdir(certs)) == before  # the key is in the bundle alone
    assert alice.read("import", str(tar)) == (
        "profile default is ready; now log in as alice: client login\n"
    )
    alice.read("login", "-p", password)
    assert alice.read("run", "--", "echo", "hello") == "hello\n"
    # A second invitation keeps the user, and renews the certificate.
    tar.unlink()
    done = run_server(*options, "invite", "alice", "--address", server.address, "-o", tar)
    assert "password" not in done.stdout
    assert "replace its files with --replace" in _refused(alice, "import", tar)
    told = _refused(alice, "import", public / "nosuch.tar")
    assert "nosuch.tar: No such file or directory; check the path" in told
    alice.read("import", "--replace", str(tar))
    alice.read("login", "-p", password)
    facts: dict[str, Any] = json.loads(alice.read("whoami", "--json"))
    assert (facts["user"], facts["profile"]) == ("alice", "default")
    assert server.end() == 0


# --- server invite --------------------------------------------------------------------------


def test_without_a_users_file_only_the_bundle_is_made(made: bytes) -> None:
    """Where the CAs' keys are kept there is no server."""
    files = bundle.unpack(made)
    assert files[bundle.PROFILE] == b'server = "127.0.0.1:1"\nuser = "alice"\n'
    assert set(files) == set(bundle.NAMES)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["invite", "a b", "--address", _ADDRESS], "bad user name 'a b'"),
        (["invite", "alice", "--address", "here"], "--address 'here' is not HOST:PORT"),
        (["invite", "alice", "--address", _ADDRESS, "-o", "{here}/old"], "old exists; remove it"),
        (["invite", "alice", "--address", _ADDRESS, "--ca", "{here}"], "client-ca.pem is missing"),
        (["invite", "server", "--address", _ADDRESS], "the name server is reserved"),
        (["invite", "alice", "--address", _ADDRESS, "-o", "{here}/absent/new"], "absent/new"),
    ],
)
def test_mistake_of_the_operator_makes_nothing(
    certs: Path, tmp_path: Path, words: list[str], text: str
) -> None:
    """Neither a user nor a bundle."""
    (tmp_path / "old").touch()
    users = tmp_path / "users"
    output = [] if "-o" in words else ["-o", str(tmp_path / "new")]
    words = [word.format(here=tmp_path) for word in words]
    done = run_server("--certs", certs, "--users", users, *words, *output)
    assert (done.returncode, done.stdout) == (1, "")
    assert text in done.stderr
    assert os.listdir(tmp_path) == ["old"]


def test_invitation_without_a_users_file_tells_that_it_makes_no_user(
    certs: Path, tmp_path: Path
) -> None:
    """As on a machine that has the keys of the CAs, and no server."""
    new = tmp_path / "new"
    done = run_server("--certs", certs, "invite", "alice", "--address", _ADDRESS, "-o", new)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].endswith("run there: server --users FILE user add alice")


def test_invitation_that_fails_leaves_no_bundle(certs: Path, tmp_path: Path) -> None:
    """Here the users file cannot be made."""
    options = ("--certs", certs, "--users", tmp_path / "absent/users")
    done = run_server(*options, "invite", "alice", "--address", _ADDRESS, "-o", tmp_path / "new")
    assert (done.returncode, done.stdout) == (1, "")
    assert "absent" in done.stderr
    assert os.listdir(tmp_path) == []


# --- client import --------------------------------------------------------------------------


def test_files_of_a_profile_are_its_users_alone(
    alice: ClientProgram, made: bytes, place: Path, tmp_path: Path
) -> None:
    """Other profiles stay; the file of the profiles may be a link."""
    (tmp_path / "a.tar").write_bytes(made)
    place.mkdir(parents=True)
    real = tmp_path / "real.toml"
    real.write_text("[old]\nuser = 'x'")
    (place / "config.toml").symlink_to(real)
    alice.read("import", "--as", "work", str(tmp_path / "a.tar"))
    assert real.read_text() == (
        '[old]\nuser = \'x\'\n\n[work]\nserver = "127.0.0.1:1"\nuser = "alice"\ncerts = "work"\n'
    )
    assert (place / "config.toml").is_symlink()
    assert stat.S_IMODE((place / "work").stat().st_mode) == 0o700
    assert {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (place / "work").iterdir()
    } == {
        bundle.CERTIFICATE: 0o600,
        bundle.KEY: 0o600,
        bundle.CA: 0o600,
    }


def test_bundle_can_come_from_stdin(alice: ClientProgram, made: bytes, place: Path) -> None:
    """Over ssh, for example."""
    process = alice.start("import", "-", stdin=subprocess.PIPE)
    _, said = process.communicate(made, timeout=GUARD_S)
    assert (process.returncode, said) == (0, b"")
    assert (place / "default" / bundle.KEY).exists()


def _tar(files: Mapping[str, bytes], *more: tarfile.TarInfo, **changes: Any) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=changes.pop("mode", "w")) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(changes.get(name, name))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return data.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> Any:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size
    return member


def _headers(kind: bytes) -> bytes:
    """A file of nothing but headers that announce another header."""
    header = _member("x", kind, size=1).tobuf(tarfile.GNU_FORMAT)
    return (header + b"y".ljust(tarfile.BLOCKSIZE, b"\0")) * 1000  # type: ignore[no-any-return]


def _evil(made: bytes, tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    """By name: a file that is no bundle, and a part of the answer."""
    files = bundle.unpack(made)
    key = bundle.KEY
    rest = {name: content for name, content in files.items() if name != key}
    other = {**files, bundle.PROFILE: b'server = "127.0.0.1:1"\nuser = "a"\ncerts = "/etc"\n'}
    return {
        "empty": (b"", "not a tar file"),
        "text": (b"x" * 5000, "not a tar file"),
        "cut": (made[:3000], "cut off|missing|not a tar"),
        "compressed": (_tar(files, mode="w:gz"), "not a tar file"),
        "absolute": (_tar(files, _member(f"{tmp_path}/evil", size=3)), "evil' in it is none of"),
        "parent": (_tar(files, _member("../evil", size=3)), "evil' in it is none of"),
        "here": (_tar(files, **{key: f"./{key}"}), "is none of"),
        "link": (_tar(rest, _member(key, tarfile.SYMTYPE, "/etc/shadow")), "is none of"),
        "hard link": (_tar(rest, _member(key, tarfile.LNKTYPE, bundle.CA)), "is none of"),
        "device": (_tar(rest, _member(key, tarfile.CHRTYPE)), "is none of"),
        "directory": (_tar(rest, _member(key, tarfile.DIRTYPE)), "is none of"),
        "FIFO": (_tar(rest, _member(key, tarfile.FIFOTYPE)), "is none of"),
        "twice": (_tar(files, _member(key, size=3)), "twice"),
        "missing": (_tar(rest), f"{key} is missing"),
        "huge": (_tar(files, _member(key, size=2 << 20)), "larger than"),
        "no key": (_tar({**files, key: b"x"}), "not a private key"),
        "no certificate": (_tar({**files, bundle.CERTIFICATE: b""}), "client.pem"),
        "no CA": (_tar({**files, bundle.CA: b"x"}), "server-ca.pem"),
        "a path in the profile": (_tar(other), "profile.toml is wrong"),
        "no address": (_tar({**files, bundle.PROFILE: b'server = "x"\nuser = "a"'}), "HOST:PORT"),
        "no TOML": (_tar({**files, bundle.PROFILE: b"\xff"}), "profile.toml is wrong"),
        "headers of headers": (_headers(tarfile.GNUTYPE_LONGNAME), "too many headers"),
        "attributes of attributes": (_headers(tarfile.XHDTYPE), "too many headers|invalid header"),
        "deep TOML": (
            _tar({**files, bundle.PROFILE: b"server = " + b"[" * 50_000}),
            "profile.toml is wrong",
        ),
        "an address of escapes": (
            _tar({**files, bundle.PROFILE: b'server = "\\u001b[2J:1"\nuser = "a"'}),
            "profile.toml is wrong",
        ),
        "escapes": (
            _tar({**files, bundle.PROFILE: b'server = "a:1"\nuser = "\\u001b[2J"'}),
            "profile.toml is wrong",
        ),
    }


_EVIL = (
    *("empty", "text", "cut", "compressed", "absolute", "parent", "here", "link", "hard link"),
    *("device", "directory", "FIFO", "twice", "missing", "huge", "no key", "no certificate"),
    *("no CA", "a path in the profile", "no address", "no TOML", "escapes"),
    *("headers of headers", "attributes of attributes", "deep TOML", "an address of escapes"),
)


def test_every_evil_file_is_tried(made: bytes, tmp_path: Path) -> None:
    """The test below has them all."""
    assert set(_evil(made, tmp_path)) == set(_EVIL)


@pytest.mark.parametrize("kind", _EVIL)
def test_file_that_is_no_bundle_writes_nothing(
    alice: ClientProgram, made: bytes, tmp_path: Path, kind: str
) -> None:
    """Neither in the directory of the profiles nor elsewhere."""
    data, text = _evil(made, tmp_path)[kind]
    path = tmp_path / "evil.tar"
    path.write_bytes(data)
    before = _tree(tmp_path)
    told = _refused(alice, "import", path)
    assert any(part in told for part in text.split("|")), told
    assert _tree(tmp_path) == before


def test_profile_can_have_any_character_that_can_be_shown(
    alice: ClientProgram, made: bytes, tmp_path: Path
) -> None:
    """The file of the profiles can be read afterwards, and another profile can be added."""
    files = bundle.unpack(made)
    for number, user in enumerate(("\U0001f600", "é\\\"'#")):
        profile = f'server = "{_ADDRESS}"\nuser = {json.dumps(user, ensure_ascii=False)}\n'
        path = tmp_path / "a.tar"
        path.write_bytes(bundle.pack({**files, bundle.PROFILE: profile.encode()}))
        status, _, told = alice.run("import", "--as", f"p{number}", str(path))
        assert (status, told) == (0, "")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", ".", "a.b", "a]b"])
def test_profile_has_a_plain_name(
    alice: ClientProgram, made: bytes, tmp_path: Path, name: str
) -> None:
    """It is a directory and a table."""
    (tmp_path / "a.tar").write_bytes(made)
    before = _tree(tmp_path)
    assert "cannot name a profile" in _refused(alice, "import", "--as", name, tmp_path / "a.tar")
    assert _tree(tmp_path) == before


def test_links_that_are_in_the_way_are_not_followed(
    alice: ClientProgram, made: bytes, place: Path, tmp_path: Path
) -> None:
    """Nothing outside the profile's directory is written."""
    tar = tmp_path / "a.tar"
    tar.write_bytes(made)
    outside = tmp_path / "outside"
    outside.mkdir()
    place.mkdir(parents=True)
    (place / "work").symlink_to(outside)
    assert "work exists; remove it" in _refused(alice, "import", "--as", "work", tar)
    (place / "work").unlink()
    alice.read("import", "--as", "work", str(tar))
    (place / "work" / bundle.KEY).unlink()
    (outside / "file").touch()
    (place / "work" / bundle.KEY).symlink_to(outside / "file")
    alice.read("import", "--as", "work", "--replace", str(tar))
    assert (outside / "file").read_bytes() == b""
    assert not (place / "work" / bundle.KEY).is_symlink()


def test_profile_of_ones_own_is_not_replaced(
    alice: ClientProgram, made: bytes, place: Path, tmp_path: Path
) -> None:
    """Only one that the same bundle would have made."""
    tar = tmp_path / "a.tar"
    tar.write_bytes(made)
    place.mkdir(parents=True)
    (place / "config.toml").write_text("[default]\nserver = 'a:1'\n[work]\nserver = 'b:1'\n")
    before = _tree(place)
    assert "has a profile default already" in _refused(alice, "import", tar)
    assert "has a profile work already" in _refused(alice, "import", "--as", "work", tar)
    told = _refused(alice, "import", "--as", "work", "--replace", tar)
    assert "is not the profile that this bundle would make" in told
    assert _tree(place) == before
