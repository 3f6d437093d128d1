"""Tests of certs/generate.sh: the real script, the real openssl, real TLS connections."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testkit import GUARD_S, NOBODY

if TYPE_CHECKING:
    from collections.abc import Callable

_SCRIPT = Path(__file__).with_name("certs") / "generate.sh"
_DAY_S = 86400
_PAIRS = ("server-ca", "server", "client-ca", "client")
_DEFAULT_NAMES = {"DNS:localhost", "IP Address:127.0.0.1", "IP Address:0:0:0:0:0:0:0:1"}


def _files(*pairs: str) -> list[str]:
    """Return the files of some pairs, in the order in which the script makes them."""
    return [file for pair in pairs for file in (f"{pair}-key.pem", f"{pair}.pem")]


def _run(*argv: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        argv, check=False, capture_output=True, text=True, timeout=GUARD_S, **options
    )


def _generate(directory: Path, *args: str) -> list[str]:
    """Run the script, which must succeed without complaint; return the files that it made."""
    run = _run(_SCRIPT, "--dir", directory, *args)
    assert (run.returncode, run.stderr) == (0, "")
    return _made(run, directory)


def _made(run: subprocess.CompletedProcess[str], directory: Path) -> list[str]:
    return [line.removeprefix(f"made {directory}/") for line in run.stdout.splitlines()]


def _refused(run: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the one line on stderr of a run that must have failed."""
    assert (run.returncode, run.stdout) == (code, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("generate.sh: ")
    return line


def _openssl(*args: str | Path) -> str:
    run = _run("openssl", *args)
    assert run.returncode == 0, run.stderr
    return run.stdout


def _text(directory: Path, name: str, *fields: str) -> str:
    return _openssl("x509", "-noout", "-in", directory / f"{name}.pem", *fields)


def _names(directory: Path) -> set[str]:
    """The subject alternative names of the server's certificate."""
    return set(
        _text(directory, "server", "-ext", "subjectAltName").split("\n")[1].strip().split(", ")
    )


def _verifies(directory: Path, name: str, purpose: str, ca: str) -> bool:
    purpose_option = ("-purpose", f"ssl{purpose}", "-x509_strict")
    trust = ("-trusted", directory / f"{ca}.pem")
    return (
        _run("openssl", "verify", *purpose_option, *trust, directory / f"{name}.pem").returncode
        == 0
    )


def _snapshot(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Return the properties of a file that change if it is replaced or written."""
    return {
        entry.name: (entry.stat().st_ino, entry.stat().st_mtime_ns, entry.stat().st_size)
        for entry in os.scandir(directory)
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all files, which tests only read."""
    directory = tmp_path_factory.mktemp("pristine")
    _generate(directory)
    return directory


@pytest.fixture
def certs(pristine: Path, tmp_path: Path) -> Path:
    """A directory with all files, which a test may change."""
    return shutil.copytree(pristine, tmp_path / "certs")


# --- what is made --------------------------------------------------------------------


def test_fresh_directory_gets_everything(tmp_path: Path) -> None:
    """It makes two CAs, a server and a client, and prints a line for each file."""
    directory = tmp_path / "new"
    assert _generate(directory) == _files(*_PAIRS)
    assert sorted(os.listdir(directory)) == sorted(_files(*_PAIRS))


def test_files_are_made_beside_the_script_by_default(tmp_path: Path) -> None:
    """Without --dir the script uses its own directory, whatever the current one is."""
    directory = tmp_path / "some where"
    directory.mkdir()
    script = shutil.copy(_SCRIPT, directory)
    run = _run(script, cwd="/")
    assert (run.returncode, run.stderr) == (0, "")
    assert _made(run, directory) == _files(*_PAIRS)
    assert set(os.listdir(directory)) == {"generate.sh", *_files(*_PAIRS)}


def test_only_keys_are_private(tmp_path: Path) -> None:
    """Under a lax umask too, keys are 0600 and certificates 0644."""
    assert _run(_SCRIPT, "--dir", tmp_path, umask=0).returncode == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {n: 0o600 if n.endswith("-key.pem") else 0o644 for n in _files(*_PAIRS)}


@pytest.mark.parametrize("leaf", ["server", "client"])
@pytest.mark.parametrize("purpose", ["server", "client"])
@pytest.mark.parametrize("ca", ["server-ca", "client-ca"])
def test_leaf_verifies_for_its_purpose_against_its_ca_alone(
    pristine: Path, leaf: str, purpose: str, ca: str
) -> None:
    """A strict verifier accepts a leaf only for its own side."""
    assert _verifies(pristine, leaf, purpose, ca) == (purpose == leaf and ca == f"{leaf}-ca")


@pytest.mark.parametrize("name", _PAIRS)
def test_every_key_is_p256_and_signature_sha256(pristine: Path, name: str) -> None:
    """Keys are EC P-256, signatures ECDSA with SHA-256, certificates X.509 v3."""
    text = _text(pristine, name, "-text")
    assert "Version: 3 (0x2)" in text
    assert text.count("Signature Algorithm: ecdsa-with-SHA256") == 2
    assert "NIST CURVE: P-256" in text
    ssl.create_default_context().load_cert_chain(
        pristine / f"{name}.pem", pristine / f"{name}-key.pem"
    )


@pytest.mark.parametrize("side", ["server", "client"])
def test_extensions_allow_what_is_needed_and_no_more(pristine: Path, side: str) -> None:
    """A CA signs leaves only; a leaf signs handshakes only, for its own side."""
    ca = _text(pristine, f"{side}-ca", "-ext", "basicConstraints,keyUsage,subjectKeyIdentifier")
    assert "Basic Constraints: critical\n    CA:TRUE, pathlen:0\n" in ca
    assert "Key Usage: critical\n    Certificate Sign, CRL Sign\n" in ca
    assert "Subject Key Identifier" in ca
    leaf = _text(pristine, side, "-text")
    assert "Basic Constraints: critical\n                CA:FALSE\n" in leaf
    assert "Key Usage: critical\n                Digital Signature\n" in leaf
    assert f"TLS Web {side.title()} Authentication\n" in leaf
    assert "Authority Key Identifier" in leaf
    assert _text(pristine, side, "-subject", "-nameopt", "RFC2253") == f"subject=CN={side}\n"


@pytest.mark.parametrize(("name", "days"), [("server-ca", 3650), ("server", 365), ("client", 365)])
def test_lifetimes(pristine: Path, name: str, days: int) -> None:
    """CAs last ten years, leaves one."""
    expires_within = {
        extra: _run(
            *("openssl", "x509", "-noout", "-in", pristine / f"{name}.pem"),
            *("-checkend", str((days + extra) * _DAY_S)),
        ).returncode
        for extra in (-1, 1)
    }
    assert expires_within == {-1: 0, 1: 1}


def test_serial_numbers_differ(pristine: Path) -> None:
    """No two certificates share a serial number."""
    assert len({_text(pristine, name, "-serial") for name in _PAIRS}) == len(_PAIRS)


def test_server_is_named_localhost_by_default(pristine: Path) -> None:
    """The server's certificate is for this machine under its three usual names."""
    assert _names(pristine) == _DEFAULT_NAMES


# --- what is kept, and what is made anew ---------------------------------------------


def test_second_run_does_nothing(certs: Path) -> None:
    """If everything is valid, it changes and prints nothing."""
    before = _snapshot(certs)
    assert _generate(certs) == []
    assert _snapshot(certs) == before


def test_certificates_are_valid_on_a_machine_whose_clock_is_slow(pristine: Path) -> None:
    """By up to an hour. All of them are, CAs too."""
    moment = str(int(time.time()) - 3500)
    for side in ("server", "client"):
        _openssl(
            *("verify", "-purpose", f"ssl{side}", "-attime", moment),
            *("-trusted", pristine / f"{side}-ca.pem", pristine / f"{side}.pem"),
        )


def _expire(directory: Path, name: str, ca: str, days: int = 0) -> None:
    """Replace a certificate by one for the same key that expires in so many days."""
    key, certificate = (directory / file for file in _files(name))
    request, expired = directory.parent / "request", directory.parent / "expired"
    _openssl("x509", "-x509toreq", "-in", certificate, "-signkey", key, "-out", request)
    signer = ("-CA", directory / f"{ca}.pem", "-CAkey", directory / f"{ca}-key.pem")
    signing = ("-signkey", key) if name == ca else (*signer, "-set_serial", "1")
    _openssl("x509", "-req", "-in", request, *signing, "-days", str(days), "-out", expired)
    expired.replace(certificate)


def _replace_by_others(directory: Path, *files: str) -> None:
    other = directory.parent / "other"
    _generate(other)
    for file in files:
        (other / file).replace(directory / file)


def _make_server_a_client(directory: Path) -> None:
    """Replace the server's pair by a client's that the server CA has signed."""
    other = directory.parent / "other"
    other.mkdir()
    for file in _files("ca"):
        shutil.copy(directory / f"server-{file}", other / f"client-{file}")
    _generate(other, "client")
    for theirs, ours in zip(_files("client"), _files("server"), strict=True):
        (other / theirs).replace(directory / ours)


_DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "certificate missing": (lambda d: (d / "client.pem").unlink(), ("client",)),
    "key missing": (lambda d: (d / "server-key.pem").unlink(), ("server",)),
    "certificate garbled": (lambda d: (d / "server.pem").write_text("?"), ("server",)),
    "key garbled": (lambda d: (d / "client-key.pem").write_text("?"), ("client",)),
    "key of another": (lambda d: _replace_by_others(d, "client-key.pem"), ("client",)),
    "of another CA": (lambda d: _replace_by_others(d, *_files("server")), ("server",)),
    "expired": (lambda d: _expire(d, "client", "client-ca"), ("client",)),
    "about to expire": (lambda d: _expire(d, "server", "server-ca", 1), ("server",)),
    "for clients": (_make_server_a_client, ("server",)),
    "CA missing": (lambda d: (d / "client-ca.pem").unlink(), ("client-ca", "client")),
    "CA's key of another": (
        lambda d: _replace_by_others(d, "server-ca-key.pem"),
        ("server-ca", "server"),
    ),
    "CA expired": (lambda d: _expire(d, "server-ca", "server-ca"), ("server-ca", "server")),
    "CA about to expire": (
        lambda d: _expire(d, "client-ca", "client-ca", 1),
        ("client-ca", "client"),
    ),
    "another CA": (lambda d: _replace_by_others(d, *_files("client-ca")), ("client",)),
}


@pytest.mark.parametrize("case", _DAMAGES)
def test_what_is_not_valid_is_made_anew(certs: Path, case: str) -> None:
    """Only what is missing, expired or does not fit is replaced, with what depends on it."""
    damage, pairs = _DAMAGES[case]
    damage(certs)
    before = _snapshot(certs)
    assert _generate(certs) == _files(*pairs)
    after = _snapshot(certs)
    assert {name for name in after if after[name] != before.get(name)} == set(_files(*pairs))
    for side in ("server", "client"):
        assert _verifies(certs, side, side, f"{side}-ca")
    assert _generate(certs) == []


def test_cas_keys_may_be_kept_elsewhere(certs: Path) -> None:
    """Without anything to sign, the CAs' keys are not needed."""
    for side in ("server", "client"):
        (certs / f"{side}-ca-key.pem").unlink()
    before = _snapshot(certs)
    assert _generate(certs) == []
    assert _snapshot(certs) == before


@pytest.mark.parametrize("side", ["server", "client"])
def test_missing_ca_key_is_asked_for_when_something_must_be_signed(certs: Path, side: str) -> None:
    """The error names the key and what it is needed for, and nothing is changed."""
    for file in (f"{side}-ca-key.pem", f"{side}-key.pem"):
        (certs / file).unlink()
    before = _snapshot(certs)
    line = _refused(_run(_SCRIPT, "--dir", certs), 1)
    assert f"{certs}/{side}-ca-key.pem" in line
    assert f"{certs}/{side}.pem" in line
    assert "where the keys of the CAs are kept" in line  # another CA would lock everybody out
    assert _snapshot(certs) == before


def test_key_that_may_not_be_read_is_not_replaced(pristine: Path) -> None:
    """A user who may not read a key gets an error; the key is not replaced as a wrong one."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as parent:  # whose own parents everybody may enter
        directory = shutil.copytree(pristine, Path(parent) / "certs")
        script = shutil.copy(_SCRIPT, parent)
        (directory / "server-ca-key.pem").chmod(0)
        if root:
            for path in (parent, directory):
                os.chown(path, NOBODY, NOBODY)
        before = _snapshot(directory)
        argv = (script, "--dir", directory)
        run = _run(*argv, user=NOBODY, group=NOBODY, extra_groups=[]) if root else _run(*argv)
        assert _refused(run, 1).endswith("server-ca-key.pem is not readable")
        assert _snapshot(directory) == before


# --- further clients and host names --------------------------------------------------


def test_further_client_is_one_more_client(certs: Path) -> None:
    """A name makes that client's pair and changes nothing else. A second run keeps it."""
    before = _snapshot(certs)
    assert _generate(certs, "alice", "b.o_b-2") == _files("alice", "b.o_b-2")
    after = _snapshot(certs)
    assert before.items() <= after.items()
    assert _text(certs, "b.o_b-2", "-subject", "-nameopt", "RFC2253") == "subject=CN=b.o_b-2\n"
    assert _verifies(certs, "alice", "client", "client-ca")
    assert not _verifies(certs, "alice", "server", "client-ca")
    assert _generate(certs, "alice") == []
    assert _generate(certs) == []
    assert _snapshot(certs) == after


def test_client_is_made_without_the_servers_ca(certs: Path) -> None:
    """The server's files may be elsewhere."""
    for file in _files("server-ca", "server"):
        (certs / file).unlink()
    assert _generate(certs, "alice") == _files("alice")


def test_further_clients_of_a_former_ca_are_told_of(certs: Path) -> None:
    """A new client CA invalidates further clients: each is named, save those made in that run."""
    _generate(certs, "alice", "bob")
    (certs / "client-ca.pem").unlink()
    run = _run(_SCRIPT, "--dir", certs, "bob")
    assert (run.returncode, _made(run, certs)) == (0, _files("client-ca", "client", "bob"))
    (line,) = run.stderr.splitlines()
    assert f"{certs}/alice.pem" in line
    assert line.endswith("generate.sh alice")
    assert _generate(certs, "alice") == _files("alice")


@pytest.mark.parametrize("args", [(), ("--hosts", "jobs.example"), ("alice",)])
def test_first_run_makes_everything_whatever_it_is_asked(
    tmp_path: Path, args: tuple[str, ...]
) -> None:
    """Without a CA, every command makes the pairs of a server and of a client."""
    assert set(_files(*_PAIRS)) <= set(_generate(tmp_path, *args))


def test_host_names_are_added_and_survive_renewal(
    certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--hosts adds names and addresses, each as its own kind, and a renewal keeps them."""
    monkeypatch.chdir(certs.parent)
    Path("file.lan").touch()  # not what *.lan stands for
    before = _snapshot(certs)
    hosts = "jobs.example.org,10.0.0.5,2001:db8::7,cafe,*.lan,localhost,127.0.0.1,::1"
    assert _generate(certs, "--hosts", hosts) == _files("server")
    names = _DEFAULT_NAMES | {
        *("DNS:jobs.example.org", "DNS:cafe", "DNS:*.lan"),
        *("IP Address:10.0.0.5", "IP Address:2001:DB8:0:0:0:0:0:7"),
    }
    assert _names(certs) == names
    assert _verifies(certs, "server", "server", "server-ca")
    after = _snapshot(certs)
    assert {name for name in after if after[name] != before[name]} == set(_files("server"))
    assert _generate(certs) == []

    (certs / "server-key.pem").unlink()
    assert _generate(certs) == _files("server")
    assert _names(certs) == names

    assert _generate(certs, "--hosts", "other.example.org") == _files("server")
    assert _names(certs) == _DEFAULT_NAMES | {"DNS:other.example.org"}


@pytest.mark.parametrize("host", ["999.1.1.1", "1.2.3", "jobs:50051", "fe80::1::2", "email:x"])
def test_address_that_is_none_is_refused(certs: Path, host: str) -> None:
    """A mistyped address is named in the error, and the present certificate stays."""
    before = _snapshot(certs)
    assert host in _refused(_run(_SCRIPT, "--dir", certs, "--hosts", host), 1)
    assert _snapshot(certs) == before


# --- misuse and misfortune -----------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        *(("",), (".hidden",), ("..",), ("-x",), ("--",), ("--what",), ("a/b",), ("../a",)),
        *(("a b",), ("a\nb",), ("é",), ("$(id)",), ("x" * 65,)),
        *(("server",), ("server-ca",), ("client-ca",), ("ca",), ("client-key",), ("alice-key",)),
        *(("--dir",), ("--hosts",), ("--hosts", ""), ("--hosts", "a;b"), ("--hosts", "a/b")),
        *(("--hosts", "a b"), ("--hosts", "a\n[ca]"), ("alice", "server")),
    ],
    ids=repr,
)
def test_misuse_is_refused_in_one_line(tmp_path: Path, args: tuple[str, ...]) -> None:
    """Bad, reserved or missing names and values are usage errors, and nothing is made."""
    _refused(_run(_SCRIPT, "--dir", tmp_path, *args), 2)
    assert os.listdir(tmp_path) == []


def test_help_tells_of_every_option() -> None:
    """--help goes to stdout and succeeds."""
    run = _run(_SCRIPT, "--help")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("usage: generate.sh ")
    for word in ("--dir DIR", "--hosts HOST,...", "--help", "NAME"):
        assert word in run.stdout


def test_missing_openssl_is_said_to_be_missing(tmp_path: Path) -> None:
    """Without openssl the error says so."""
    (tmp_path / "bin").mkdir()
    dirname = shutil.which("dirname")
    assert dirname
    (tmp_path / "bin" / "dirname").symlink_to(dirname)
    run = _run(_SCRIPT, "--dir", tmp_path / "certs", env={"PATH": str(tmp_path / "bin")})
    assert _refused(run, 1) == "generate.sh: openssl is not installed"


@pytest.mark.parametrize("directory", ["/proc", "/proc/none", "/dev/null"])
def test_directory_that_cannot_be_used_is_an_error(directory: str) -> None:
    """If the directory cannot be written, the error names it."""
    assert _refused(_run(_SCRIPT, "--dir", directory), 1).endswith(f"directory {directory}")


def test_runs_at_the_same_time_do_the_work_once(tmp_path: Path) -> None:
    """One of several simultaneous runs makes the files, and the others wait."""
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: _generate(tmp_path), range(4)))
    assert sorted(file for made in runs for file in made) == sorted(_files(*_PAIRS))
    assert sorted(os.listdir(tmp_path)) == sorted(_files(*_PAIRS))
    assert _generate(tmp_path) == []


# Becomes the script, with its own pid where the openssl below finds it. A test run in the
# background has SIGINT ignored, and no script can undo that.
_EXEC = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execve(sys.argv[1], sys.argv[1:], {**os.environ, "PID": str(os.getpid())})
"""

# The real openssl, but call number $AT sends $SIGNAL to the script or (GROUP=-) to both.
_OPENSSL = """#!/bin/sh
echo >>"$CALLS"
[ "$(wc -l <"$CALLS")" -ne "$AT" ] || kill -s "$SIGNAL" -- "$GROUP$PID"
exec "$OPENSSL" "$@"
"""


@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, True)],
    ids=["Ctrl-C", "SIGTERM", "SIGKILL"],
)
def test_interrupted_run_leaves_nothing_half_made(
    tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    """An interruption at any step leaves only whole pairs."""
    directory, calls, tools = tmp_path / "certs", tmp_path / "calls", tmp_path / "bin"
    tools.mkdir()
    (tools / "openssl").write_text(_OPENSSL)
    (tools / "openssl").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "OPENSSL": shutil.which("openssl") or "",
        "CALLS": str(calls),
        "SIGNAL": number.name.removeprefix("SIG"),
        "GROUP": "-" if group else "",
    }
    interrupted = 0
    while True:
        calls.write_text("")
        run = _run(
            *(sys.executable, "-ISc", _EXEC, _SCRIPT, "--dir", directory),
            env={**environment, "AT": str(interrupted + 1)},
            start_new_session=True,
        )
        assert run.stderr == ""
        present = {path.name for path in directory.iterdir()} - {".new.pem"}
        pairs = [pair for pair in _PAIRS if f"{pair}.pem" in present]
        assert present == set(_files(*pairs))
        for pair in pairs:  # the context takes only a certificate with its own key
            ssl.create_default_context().load_cert_chain(
                *(directory / f"{pair}.pem", directory / f"{pair}-key.pem")
            )
        for private in (*directory.rglob("*-key.pem"), *directory.glob(".new.pem")):
            assert private.stat().st_mode & 0o077 == 0
        if run.returncode == 0:
            break
        assert run.returncode == (-number if number == signal.SIGKILL else 130)
        if number != signal.SIGKILL:
            assert not (directory / ".new.pem").exists()
        interrupted += 1
    assert interrupted > 2 * len(_PAIRS)
    assert present == set(_files(*_PAIRS))
    assert not (directory / ".new.pem").exists()
    assert _generate(directory) == []


# --- in use --------------------------------------------------------------------------


def _context(directory: Path, side: int, own: str, ca: str) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's default
    context.load_cert_chain(directory / f"{own}.pem", directory / f"{own}-key.pem")
    context.load_verify_locations(directory / f"{ca}.pem")
    return context


def _handshake(directory: Path, host: str, client: str = "client") -> str:
    """Connect over mutual TLS 1.3; return the client's name that the server verified."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.settimeout(GUARD_S)
    server = _context(directory, ssl.PROTOCOL_TLS_SERVER, "server", "client-ca")

    def serve() -> str:
        with theirs, server.wrap_socket(theirs, server_side=True) as connection:
            connection.sendall(b"welcome")
            subject = (connection.getpeercert() or {})["subject"]
            return str(subject[0][0][1])

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        context = _context(directory, ssl.PROTOCOL_TLS_CLIENT, client, "server-ca")
        try:
            with ours, context.wrap_socket(ours, server_hostname=host) as connection:
                assert connection.version() == "TLSv1.3"
                assert connection.recv(16) == b"welcome"
        finally:
            served.exception(timeout=GUARD_S)
    return served.result()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_mutual_tls_works_with_what_was_made(pristine: Path, host: str) -> None:
    """Server and client accept each other under each default name of the server."""
    assert _handshake(pristine, host) == "client"


def test_mutual_tls_works_for_further_clients_and_hosts(certs: Path) -> None:
    """The server knows a further client by its name, the client a further name of the server."""
    _generate(certs, "--hosts", "jobs.example.org", "alice")
    assert _handshake(certs, "jobs.example.org", "alice") == "alice"


def test_client_refuses_another_host_name(pristine: Path) -> None:
    """The certificate must have the host name."""
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        _handshake(pristine, "jobs.example.org")


def test_server_refuses_a_certificate_of_its_own_ca(pristine: Path) -> None:
    """A certificate of the server CA is no client certificate."""
    with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        _handshake(pristine, "localhost", "server")
