"""Tests of the server's certificates: real certificates, a real gRPC server, real connections."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import Client, ClientError
from testkit import GUARD_S, HTTP2_GREETING, NOBODY, clean_environment, tls_context
from tls import CertificateError, Certificates, certificate_files, expiry

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).resolve().parent
_NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1"
_FOR_SERVERS = f"extendedKeyUsage=serverAuth\n{_NAMES}"
_FOR_CLIENTS = "extendedKeyUsage=clientAuth"
_P256 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
_P521 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-521")
_ED25519 = ("-newkey", "ed25519")
# gRPC's TLS accepts exponents up to 33 bits.
_LARGE_EXPONENT = ("-newkey", "rsa:2048", "-pkeyopt", "rsa_keygen_pubexp:1099511627777")
_BRAINPOOL = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:brainpoolP256r1")


# --- certificates ------------------------------------------------------------------------


def _openssl(*arguments: str | Path) -> None:
    run = subprocess.run(["openssl", *arguments], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def _make(  # noqa: PLR0913
    directory: Path,
    name: str,
    extensions: str,
    *,
    ca: Path | None,
    days: tuple[int, int] = (-1, 1),
    key: tuple[str, ...] = _P256,
) -> Path:
    """Make NAME.pem and NAME-key.pem, signed by the CA (a path without `.pem`) or by itself.

    It is valid between two moments, given in days from now.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir()
    work = directory / f"{name}.work"
    work.mkdir()
    key_path, path = directory / f"{name}-key.pem", directory / f"{name}.pem"
    (work / "index").touch()
    (work / "config").write_text(
        f"[ca]\ndefault_ca=ours\n[ours]\ndatabase={work}/index\nnew_certs_dir={work}\n"
        "default_md=default\nrand_serial=yes\npolicy=any\nunique_subject=no\n"
        "[any]\ncommonName=supplied\n"
    )
    (work / "extensions").write_text(f"{extensions}\n")
    _openssl(
        *("req", "-new", "-nodes", "-subj", f"/CN={name}", *key),
        *("-keyout", key_path, "-out", work / "request"),
    )
    start, end = (f"{datetime.now(UTC) + timedelta(days=n):%Y%m%d%H%M%SZ}" for n in days)
    signer = ("-cert", f"{ca}.pem", "-keyfile", f"{ca}-key.pem") if ca else ("-selfsign",)
    _openssl(
        *("ca", "-batch", "-notext", "-config", work / "config", "-in", work / "request"),
        *("-out", path, "-extfile", work / "extensions", "-startdate", start, "-enddate", end),
        *(signer if ca else (*signer, "-keyfile", key_path)),
    )
    shutil.rmtree(work)
    return path


def _make_ca(
    directory: Path,
    name: str,
    days: tuple[int, int] = (-1, 1),
    key: tuple[str, ...] = _P256,
) -> Path:
    extensions = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign"
    return _make(directory, name, extensions, ca=None, days=days, key=key)


def _der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


@pytest.fixture(scope="module")
def wrong_clients(
    certs: Path, foreign_certs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A right client certificate, and others by the one mistake in them."""
    directory = tmp_path_factory.mktemp("clients")
    ca = certs / "client-ca"
    return {
        "nothing": _make(directory, "right", _FOR_CLIENTS, ca=ca),
        "of another CA": foreign_certs / "client.pem",
        "of the server's CA": _make(directory, "ca", _FOR_CLIENTS, ca=certs / "server-ca"),
        "signed by itself": _make(directory, "self", _FOR_CLIENTS, ca=None),
        "the server's": certs / "server.pem",
        "for servers": _make(directory, "usage", _FOR_SERVERS, ca=ca),
        "expired": _make(directory, "expired", _FOR_CLIENTS, ca=ca, days=(-2, -1)),
        "not yet valid": _make(directory, "early", _FOR_CLIENTS, ca=ca, days=(1, 2)),
    }


@pytest.fixture
def live(certs: Path, tmp_path: Path) -> Path:
    """A directory with a server's certificates, which a test may change."""
    return shutil.copytree(certs, tmp_path / "live")


# --- a server, connections ---------------------------------------------------------------


class _Server:
    """A server with one RPC: it streams the items of `messages` until None."""

    def __init__(self, credentials: grpc.ServerCredentials) -> None:
        self.messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        handler: Any = grpc.unary_stream_rpc_method_handler(self._stream)
        self._grpc = grpc.server(ThreadPoolExecutor(4))
        self._grpc.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("test.Test", {"Stream": handler})]
        )
        self.address = f"127.0.0.1:{self._grpc.add_secure_port('127.0.0.1:0', credentials)}"
        self._grpc.start()

    def _stream(self, *_: Any) -> Iterator[bytes]:
        while (message := self.messages.get()) is not None:
            yield message

    def stop(self) -> None:
        self.messages.put(None)
        self._grpc.stop(0).wait()
        for thread in _handshakes():
            thread.join(GUARD_S)


def _handshakes() -> list[threading.Thread]:
    """The threads that keep handshakes under way after a reload."""
    return [thread for thread in threading.enumerate() if thread.name == "handshake"]


_Serve = Callable[[grpc.ServerCredentials], _Server]


@pytest.fixture
def serve() -> Iterator[_Serve]:
    with contextlib.ExitStack() as servers:

        def start(credentials: grpc.ServerCredentials) -> _Server:
            server = _Server(credentials)
            servers.callback(server.stop)
            return server

        yield start


@pytest.fixture(params=["at the start", "after a reload"])
def server(request: pytest.FixtureRequest, serve: _Serve, certs: Path, live: Path) -> _Server:
    """A server with the certificates `certs`, from its start or after a reload."""
    if request.param == "at the start":
        return serve(Certificates(Path.read_bytes, certs).credentials())
    _make(live, "server", _FOR_SERVERS, ca=live / "server-ca")
    certificates = Certificates(Path.read_bytes, live)
    server = serve(certificates.credentials())
    shutil.copytree(certs, live, dirs_exist_ok=True)
    assert certificates.reload(server.address) == ""
    return server


@contextlib.contextmanager
def _connection(
    address: str, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> Iterator[ssl.SSLSocket]:
    """A TLS connection; the client has sent its greeting."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), GUARD_S) as raw,
        context.wrap_socket(raw, server_hostname=host, session=session) as sock,
    ):
        sock.sendall(HTTP2_GREETING)
        yield sock


def _admits(address: str, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> bool:
    """Whether the server answers. In TLS 1.3 it refuses a client after the client's handshake."""
    try:
        with _connection(address, context, session) as sock:
            return _is_settings(sock.recv(9))
    except (ssl.SSLError, ConnectionError):
        return False


def _is_settings(frame: bytes) -> bool:
    return frame[3:4] == b"\x04"  # of HTTP/2; a server begins with it, if it has a client


def _certificate_shown(address: str) -> bytes:
    host, _, port = address.rpartition(":")
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, int(port))))


# --- who gets in -------------------------------------------------------------------------


def test_right_client_certificate_gets_in_over_tls_1_3(
    server: _Server, certs: Path, wrong_clients: dict[str, Path]
) -> None:
    """So the clients below are refused for their one mistake."""
    for certificate in (certs / "client.pem", wrong_clients["nothing"]):
        with _connection(server.address, tls_context(certs, certificate)) as sock:
            assert sock.version() == "TLSv1.3"
            assert _is_settings(sock.recv(9))


@pytest.mark.parametrize(
    "wrong",
    [
        "of another CA",
        "of the server's CA",
        "signed by itself",
        "the server's",
        "for servers",
        "expired",
        "not yet valid",
    ],
)
def test_wrong_client_certificate_does_not_get_in(
    server: _Server, certs: Path, wrong_clients: dict[str, Path], wrong: str
) -> None:
    """It is refused before any call. Other clients still get in."""
    assert not _admits(server.address, tls_context(certs, wrong_clients[wrong]))
    assert _admits(server.address, tls_context(certs, certs / "client.pem"))


@pytest.mark.parametrize(
    ("days", "extensions"),
    [(400, _FOR_CLIENTS), (10_000, f"{_FOR_CLIENTS}\n{_NAMES}"), (30_000, _FOR_CLIENTS)],
)
def test_expiry_is_what_the_certificate_says(tmp_path: Path, days: int, extensions: str) -> None:
    """From the year 2050 on, the time has another form."""
    path = _make(tmp_path, "client", extensions, ca=None, days=(-1, days))
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-enddate", "-in", path],
        check=True,
        capture_output=True,
        text=True,
    )
    assert expiry(_der(path)) == ssl.cert_time_to_seconds(
        shown.stdout.rstrip().removeprefix("notAfter=")
    )


@pytest.mark.parametrize("end", [b"490230000000Z", b"4901010000+01", b"no date", b""])
def test_expiry_that_cannot_be_read_is_an_error(certs: Path, end: bytes) -> None:
    """The gate refuses such a certificate."""
    der = _der(certs / "client.pem")
    at = der.index(f"{datetime.fromtimestamp(expiry(der), UTC):%y%m%d%H%M%S}Z".encode())
    with pytest.raises((ValueError, IndexError)):
        expiry(der[:at] + end)


@pytest.mark.parametrize(
    "greeting",
    [
        HTTP2_GREETING,
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        os.urandom(5000),
        b"\x16\x03\x01\xff\xff",
    ],
)
def test_what_is_not_tls_does_not_get_in(server: _Server, certs: Path, greeting: bytes) -> None:
    """Plaintext and garbage get no frame, and disturb nobody."""
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), GUARD_S) as sock:
        sock.sendall(greeting)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = sock.recv(9)
    assert not _is_settings(answer)
    assert _admits(server.address, tls_context(certs, certs / "client.pem"))


# --- whom a client trusts ----------------------------------------------------------------


def _server_certificate(wrong: str, directory: Path, certs: Path, foreign_certs: Path) -> Path:
    ca, extensions, days = certs / "server-ca", _FOR_SERVERS, (-1, 1)
    match wrong:
        case "of another CA":
            ca = foreign_certs / "server-ca"
        case "of the clients' CA":
            ca = certs / "client-ca"
        case "for another host":
            extensions = "extendedKeyUsage=serverAuth\nsubjectAltName=DNS:a.test,IP:127.0.0.2"
        case "for clients":
            extensions = f"{_FOR_CLIENTS}\n{_NAMES}"
        case "expired":
            days = (-2, -1)
        case "not yet valid":
            days = (1, 2)
    signer = None if wrong == "signed by itself" else ca
    return _make(directory, "server", extensions, ca=signer, days=days)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("nothing", ""),
        ("of another CA", "was not signed by your server CA"),
        ("of the clients' CA", "was not signed by your server CA"),
        ("signed by itself", "was not signed by your server CA"),
        ("for another host", "is not for that host name"),
        ("for clients", "or is not for servers"),
        ("expired", "has expired"),
        ("not yet valid", "is not valid yet; check the clock of this machine"),
    ],
)
def test_client_trusts_a_right_server_only(  # noqa: PLR0913
    serve: _Serve, certs: Path, foreign_certs: Path, tmp_path: Path, wrong: str, told: str
) -> None:
    """The client reports the true mistake in one line, and sends no token."""
    certificate = _server_certificate(wrong, tmp_path, certs, foreign_certs)
    key = tmp_path / "server-key.pem"
    # Not `Certificates`: that would not take most of these.
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())],
        root_certificates=(certs / "client-ca.pem").read_bytes(),
        require_client_auth=True,
    )
    address = serve(credentials).address
    with (
        Client(address, certs=certs, token="a.b.c") as client,
        pytest.raises(ClientError) as caught,
    ):
        client.list()
    if wrong == "nothing":
        assert caught.value.code == "UNIMPLEMENTED"
    else:
        assert caught.value.code == "UNAVAILABLE"
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("days", "told"),
    [
        ((1, 2), "client.pem is not valid yet; check the clock; "),
        ((-2, -1), "client.pem: certificate has expired; "),
    ],
)
def test_client_tells_that_its_own_certificate_is_not_valid_now(
    live: Path, days: tuple[int, int], told: str
) -> None:
    """Before it connects: the server would only close the connection."""
    _make(live, "client", _FOR_CLIENTS, ca=live / "client-ca", days=days)
    with pytest.raises(ClientError) as caught:
        Client("127.0.0.1:1", certs=live)
    assert told in str(caught.value)


def test_client_tells_that_its_server_ca_is_not_valid_yet(live: Path) -> None:
    """As with its own certificate."""
    _make_ca(live, "server-ca", days=(1, 2))
    with pytest.raises(ClientError, match=r"server-ca.pem is not valid yet; check the clock"):
        Client("127.0.0.1:1", certs=live)


# --- what the server takes ---------------------------------------------------------------

# What may be wrong with the files, and words of the error.
_Damage = Callable[[Path, Path], object]
_DAMAGES: dict[str, tuple[_Damage, str]] = {
    "certificate garbled": (
        lambda d, _: (d / "server.pem").write_text("?"),
        "server.pem is not a certificate in PEM",
    ),
    "certificate empty": (
        lambda d, _: (d / "server.pem").write_bytes(b""),
        "server.pem is not a certificate in PEM",
    ),
    "key garbled": (
        lambda d, _: (d / "server-key.pem").write_bytes(b"\xff\0"),
        "server-key.pem is not a private key in PEM",
    ),
    "key and certificate exchanged": (
        lambda d, _: (
            (d / "server.pem").rename(d / "x"),
            (d / "server-key.pem").rename(d / "server.pem"),
            (d / "x").rename(d / "server-key.pem"),
        ),
        "server.pem is not a certificate in PEM",
    ),
    "key of another": (
        lambda d, foreign: shutil.copy(foreign / "server-key.pem", d),
        "server-key.pem is not the key of server.pem",
    ),
    "certificate of another": (
        lambda d, foreign: shutil.copy(foreign / "server.pem", d),
        "server-key.pem is not the key of server.pem",
    ),
    "key of another kind": (
        lambda d, _: _openssl("genpkey", "-algorithm", "ed25519", "-out", d / "server-key.pem"),
        "server-key.pem is not the key of server.pem",
    ),
    "key too short": (
        lambda d, _: _make(
            d, "server", _FOR_SERVERS, ca=d / "server-ca", key=("-newkey", "rsa:1024")
        ),
        "server.pem with server-key.pem: EE_KEY_TOO_SMALL",
    ),
    "key not for TLS 1.3": (
        lambda d, _: _make(d, "server", _FOR_SERVERS, ca=d / "server-ca", key=_BRAINPOOL),
        "server-key.pem is of a kind that gRPC cannot use; use EC P-256",
    ),
    "key that OpenSSL knows and gRPC does not": (
        lambda d, _: _make(d, "server", _FOR_SERVERS, ca=d / "server-ca", key=_ED25519),
        "server-key.pem is of a kind that gRPC cannot use; use EC P-256",
    ),
    "curve that OpenSSL knows and gRPC does not": (
        lambda d, _: _make(d, "server", _FOR_SERVERS, ca=d / "server-ca", key=_P521),
        "server-key.pem is of a kind that gRPC cannot use; use EC P-256",
    ),
    "byte order mark": (
        lambda d, _: (d / "client-ca.pem").write_bytes(
            b"\xef\xbb\xbf" + (d / "client-ca.pem").read_bytes()
        ),
        "client-ca.pem begins with a byte order mark",
    ),
    "rest of the chain garbled": (
        lambda d, _: (d / "server.pem").write_bytes(
            (d / "server.pem").read_bytes()
            + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        ),
        "server.pem is not a certificate in PEM",
    ),
    "certificate expired": (
        lambda d, _: _make(d, "server", _FOR_SERVERS, ca=d / "server-ca", days=(-2, -1)),
        "server.pem: certificate has expired",
    ),
    "certificate not yet valid": (
        lambda d, _: _make(d, "server", _FOR_SERVERS, ca=d / "server-ca", days=(1, 2)),
        "server.pem is not valid yet; check the clock",
    ),
    "certificate for clients": (
        lambda d, _: _make(d, "server", _FOR_CLIENTS, ca=d / "server-ca"),
        "server.pem: unsuitable certificate purpose",
    ),
    "certificate for encryption only": (
        lambda d, _: _make(
            d,
            "server",
            f"{_FOR_SERVERS}\nkeyUsage=critical,keyEncipherment",
            ca=d / "server-ca",
            key=("-newkey", "rsa:2048"),
        ),
        "server.pem has a keyUsage without digitalSignature",
    ),
    "CA whose key gRPC does not know": (
        lambda d, _: _make_ca(d, "client-ca", key=_BRAINPOOL),
        "client-ca.pem has the certificate of a CA whose key is of a kind that gRPC cannot use",
    ),
    "CA in the chain whose key gRPC does not know": (
        lambda d, _: (d / "server.pem").write_bytes(
            (d / "server.pem").read_bytes() + _make_ca(d, "between", key=_BRAINPOOL).read_bytes()
        ),
        "server.pem has the certificate of a CA whose key is of a kind that gRPC cannot use",
    ),
    "CA garbled": (
        lambda d, _: (d / "client-ca.pem").write_text("?"),
        "client-ca.pem is not a certificate in PEM",
    ),
    "CA empty": (
        lambda d, _: (d / "client-ca.pem").write_bytes(b""),
        "client-ca.pem is not a certificate in PEM",
    ),
    "CA that is none": (
        lambda d, _: shutil.copy(d / "client.pem", d / "client-ca.pem"),
        "client-ca.pem holds no certificate of a CA",
    ),
    "CA expired": (
        lambda d, _: _make_ca(d, "client-ca", days=(-2, -1)),
        "client-ca.pem has expired",
    ),
    "CA not yet valid": (
        lambda d, _: _make_ca(d, "client-ca", days=(1, 2)),
        "client-ca.pem is not valid yet; check the clock",
    ),
    "file missing": (
        lambda d, _: (d / "server-key.pem").unlink(),
        "server-key.pem missing; copy them from the machine with the CAs",
    ),
    "file that is a directory": (
        lambda d, _: os.mkdir((d / "server.pem").rename(d / "x").with_name("server.pem")),
        "server.pem: Is a directory",
    ),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_unusable_certificates_are_refused(live: Path, foreign_certs: Path, damage: str) -> None:
    """The error is one line with the mistake, the file, the directory and the remedy."""
    change, problem = _DAMAGES[damage]
    change(live, foreign_certs)
    with pytest.raises(CertificateError) as caught:
        Certificates(Path.read_bytes, live)
    message = str(caught.value)
    assert problem in message
    assert str(live) in message
    assert "\n" not in message
    assert "PRIVATE" not in message


def test_all_missing_files_are_named(tmp_path: Path) -> None:
    """One error names all of them."""
    with pytest.raises(CertificateError) as caught:
        Certificates(Path.read_bytes, tmp_path)
    for path in certificate_files(tmp_path):
        assert str(path) in str(caught.value)


def test_files_may_hold_text_a_chain_and_further_cas(
    serve: _Serve, live: Path, certs: Path, foreign_certs: Path, wrong_clients: dict[str, Path]
) -> None:
    """`openssl x509 -text` and `cat` make such files. All CAs of the file are trusted."""
    ca, chain = live / "client-ca.pem", live / "server.pem"
    _make_ca(live, "old-ca", days=(-2, -1))
    chain.write_bytes(
        "Größe\n".encode() + chain.read_bytes() + (live / "server-ca.pem").read_bytes()
    )
    ca.write_bytes(
        b"the old one\n"
        + (live / "old-ca.pem").read_bytes()
        + (foreign_certs / "client-ca.pem").read_bytes()
        + ca.read_bytes()
    )
    address = serve(Certificates(Path.read_bytes, live).credentials()).address
    for certificate in (certs / "client.pem", foreign_certs / "client.pem"):
        assert _admits(address, tls_context(certs, certificate))
    assert not _admits(address, tls_context(certs, wrong_clients["of the server's CA"]))


@pytest.mark.parametrize(
    "key",
    [
        _P256,
        ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384"),
        ("-newkey", "rsa:2048"),
    ],
    ids=lambda key: key[-1],
)
def test_usual_kinds_of_keys_work(serve: _Serve, live: Path, key: tuple[str, ...]) -> None:
    """A key that passes the check works."""
    _make(live, "server", _FOR_SERVERS, ca=live / "server-ca", key=key)
    address = serve(Certificates(Path.read_bytes, live).credentials()).address
    context = tls_context(live, live / "client.pem")
    assert _admits(address, context)


_IN_A_TERMINAL = """
import pty, sys
pty.spawn([sys.executable, "-c", '''
import sys
from pathlib import Path
from tls import CertificateError, Certificates
try:
    Certificates(Path.read_bytes, Path(sys.argv[1]))
except CertificateError as error:
    print(error)
''', sys.argv[1]])
"""


def test_key_with_a_password_is_refused_and_nobody_asked_for_it(live: Path) -> None:
    """At a terminal OpenSSL would ask for it, and wait."""
    key = live / "server-key.pem"
    _openssl("ec", "-aes128", "-passout", "pass:secret", "-in", key, "-out", live / "locked")
    (live / "locked").replace(key)
    run = subprocess.run(
        [sys.executable, "-c", _IN_A_TERMINAL, live],
        cwd=_HERE,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=True,
    )
    assert "server-key.pem is not a private key in PEM, or needs a password" in run.stdout
    assert "pass phrase" not in run.stdout


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_damaged_files_are_taken_or_refused_but_raise_nothing_else(
    certs: Path, data: st.DataObject
) -> None:
    """One of the files has arbitrary bytes."""
    contents = {path: path.read_bytes() for path in certificate_files(certs)}
    path = data.draw(st.sampled_from(sorted(contents)))
    good = contents[path]
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(good))] * 2)))
    contents[path] = good[:begin] + data.draw(st.binary(max_size=100)) + good[end:]
    with contextlib.suppress(CertificateError):
        Certificates(contents.__getitem__, certs)


_AFTER_THE_DROP = """
import os, ctypes, sys
from pathlib import Path
from tls import CertificateError, Certificates, certificate_files
where, uid = Path(sys.argv[1]), int(sys.argv[2])
contents = {path: path.read_bytes() for path in certificate_files(where)}
Certificates(contents.__getitem__, where)  # as the server does; loads all it needs
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
else:
    ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE, which the drop implies
print("dumpable", ctypes.CDLL(None).prctl(3))
Certificates(contents.__getitem__, where)
contents[certificate_files(where)[0]] = b""
try:
    Certificates(contents.__getitem__, where)
except CertificateError:
    print("checked")
"""


def test_certificates_are_checked_by_a_process_that_has_given_up_its_rights(certs: Path) -> None:
    """The process may not open the files, and is not dumpable."""
    run = subprocess.run(
        [sys.executable, "-c", _AFTER_THE_DROP, certs, str(NOBODY)],
        cwd=_HERE,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("dumpable 0\nchecked\n", "")


# --- reloading ---------------------------------------------------------------------------


@pytest.fixture
def certificates(live: Path) -> Certificates:
    return Certificates(Path.read_bytes, live)


@pytest.fixture
def running(serve: _Serve, certificates: Certificates) -> _Server:
    """A server with `certificates`, which can be reloaded from `live`."""
    return serve(certificates.credentials())


def _messages(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_next_connection_sees_the_reloaded_certificate(
    running: _Server, certificates: Certificates, live: Path
) -> None:
    """It holds as soon as `reload` has returned, also after several reloads."""
    for _ in range(3):
        certificate = _make(live, "server", _FOR_SERVERS, ca=live / "server-ca")
        assert _certificate_shown(running.address) != _der(certificate)
        assert certificates.reload(running.address) == ""
        assert _certificate_shown(running.address) == _der(certificate)
        assert _admits(running.address, tls_context(live, live / "client.pem"))


def test_open_stream_survives_the_reload(
    running: _Server, certificates: Certificates, live: Path
) -> None:
    """The connection continues, also for new calls, even if the clients' CA has changed."""
    credentials = grpc.ssl_channel_credentials(
        *((live / name).read_bytes() for name in ("server-ca.pem", "client-key.pem", "client.pem"))
    )
    with grpc.secure_channel(running.address, credentials) as channel:
        call: Any = channel.unary_stream("/test.Test/Stream")
        stream = call(b"", timeout=GUARD_S)
        running.messages.put(b"before")
        assert next(stream) == b"before"
        _make_ca(live, "client-ca")
        _make(live, "server", _FOR_SERVERS, ca=live / "server-ca")
        assert certificates.reload(running.address) == ""
        running.messages.put(b"after")
        assert next(stream) == b"after"
        running.messages.put(None)
        assert list(stream) == []
        running.messages.put(None)
        assert list(call(b"", timeout=GUARD_S)) == []


def test_reloaded_client_ca_decides_who_gets_in(
    running: _Server, certificates: Certificates, live: Path, wrong_clients: dict[str, Path]
) -> None:
    """Clients of the old CA do not get in, not even by resuming an earlier TLS session."""
    old = tls_context(live, wrong_clients["nothing"])
    with _connection(running.address, old) as sock:
        assert _is_settings(sock.recv(9))
        session = sock.session
    assert session is not None
    with _connection(running.address, old, session) as sock:
        assert sock.session_reused  # so far it is good for something
        assert _is_settings(sock.recv(9))
        session = sock.session
    _make_ca(live, "client-ca")
    new = tls_context(live, _make(live, "new", _FOR_CLIENTS, ca=live / "client-ca"))
    assert not _admits(running.address, new)
    assert certificates.reload(running.address) == ""
    assert _admits(running.address, new)
    assert not _admits(running.address, old)
    assert not _admits(running.address, old, session)


@pytest.mark.parametrize("damage", _DAMAGES)
def test_broken_certificates_leave_the_old_ones_in_force(  # noqa: PLR0913
    running: _Server,
    certificates: Certificates,
    live: Path,
    certs: Path,
    foreign_certs: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    """The mistake is logged once. Corrected files come into force."""
    change, problem = _DAMAGES[damage]
    change(live, foreign_certs)
    assert certificates.reload(running.address)
    (message,) = _messages(caplog)
    assert message.startswith("the certificates stay as they were: ")
    assert problem in message
    assert _certificate_shown(running.address) == _der(certs / "server.pem")
    assert _admits(running.address, tls_context(certs, certs / "client.pem"))
    shutil.rmtree(live)
    shutil.copytree(foreign_certs, live)
    assert certificates.reload(running.address) == ""
    assert _certificate_shown(running.address) == _der(foreign_certs / "server.pem")


def test_half_replaced_certificates_wait_for_the_other_half(
    running: _Server, certificates: Certificates, live: Path, foreign_certs: Path
) -> None:
    """A reload may come when only one of certificate and key has been replaced."""
    before = _certificate_shown(running.address)
    shutil.copy(foreign_certs / "server.pem", live)
    assert certificates.reload(running.address)
    assert _certificate_shown(running.address) == before
    shutil.copy(foreign_certs / "server-key.pem", live)
    assert certificates.reload(running.address) == ""
    assert _certificate_shown(running.address) == _der(foreign_certs / "server.pem")


def test_reload_of_the_same_files_changes_nothing(
    running: _Server, certificates: Certificates, live: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so. gRPC gets no new certificates, so earlier TLS sessions can be resumed."""
    _make(live, "server", _FOR_SERVERS, ca=live / "server-ca")
    assert certificates.reload(running.address) == ""
    (under_way,) = _handshakes()
    caplog.set_level(logging.INFO)
    context = tls_context(live, live / "client.pem")
    with _connection(running.address, context) as sock:
        sock.recv(9)
        session = sock.session
    assert certificates.reload(running.address) == ""
    with _connection(running.address, context, session) as sock:
        assert sock.session_reused
    assert _messages(caplog, logging.INFO) == ["the certificates have not changed"]
    assert _handshakes() == [under_way]


def test_key_that_grpc_does_not_know_is_told_and_the_old_one_stays(
    running: _Server, certificates: Certificates, live: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server asks itself for the new certificate: gRPC reports nothing, and keeps the old."""
    before = (live / "server.pem").read_bytes()
    _make(live, "server", _FOR_SERVERS, ca=live / "server-ca", key=_LARGE_EXPONENT)
    for _ in range(2):
        assert certificates.reload(running.address)
    first, second = _messages(caplog)
    assert first == second
    assert f"gRPC does not accept {live}/server.pem; use a key of another kind, like EC" in first
    assert _certificate_shown(running.address) == ssl.PEM_cert_to_DER_cert(before.decode())
    new = _make(live, "server", _FOR_SERVERS, ca=live / "server-ca")
    assert certificates.reload(running.address) == ""
    assert _certificate_shown(running.address) == _der(new)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "not for you"), RuntimeError("no fork server")]
)
def test_files_that_cannot_be_read_change_nothing(
    serve: _Serve, live: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The reader raises any exception."""
    errors: list[Exception] = []

    def read(path: Path) -> bytes:
        if errors:
            raise errors.pop()
        return path.read_bytes()

    certificates = Certificates(read, live)
    address = serve(certificates.credentials()).address
    errors.append(error)
    assert certificates.reload(address)
    (message,) = _messages(caplog)
    assert (getattr(error, "strerror", None) or str(error)) in message
    assert _admits(address, tls_context(live, live / "client.pem"))


def test_reload_when_nobody_answers_changes_nothing(
    certificates: Certificates, live: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without an answer the new certificates cannot be tried."""
    _make(live, "server", _FOR_SERVERS, ca=live / "server-ca")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    assert certificates.reload(address)
    assert "Connection refused" in _messages(caplog)[0]


def test_handshake_is_under_way_from_before_a_reload_until_the_server_ends(
    running: _Server, certificates: Certificates, live: Path
) -> None:
    """It prevents a crash of gRPC (see `tls.py`), and admits nobody."""
    _make(live, "server", _FOR_SERVERS, ca=live / "server-ca")
    assert certificates.reload(running.address) == ""
    (thread,) = _handshakes()
    assert thread.daemon
    running.stop()
    assert not thread.is_alive()


_CONNECT_AND_RELOAD = """
import os, socket, ssl, sys, threading
os.environ["GRPC_VERBOSITY"] = "NONE"
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import grpc
from tls import Certificates
sets, turn = [Path(sys.argv[1]), Path(sys.argv[2])], 0
certificates = Certificates(lambda path: (sets[turn % 2] / path.name).read_bytes(), sets[0])
server = grpc.server(ThreadPoolExecutor(1))
port = server.add_secure_port("127.0.0.1:0", certificates.credentials())
server.start()
done = threading.Event()
def connect():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    while not done.is_set():
        with socket.create_connection(("127.0.0.1", port)) as sock:
            with context.wrap_socket(sock):
                pass
with ThreadPoolExecutor(16) as clients:
    running = [clients.submit(connect) for _ in range(16)]
    for turn in range(1, 31):
        assert certificates.reload(f"127.0.0.1:{port}") == ""
    done.set()
    for each in running:
        each.result()
server.stop(0).wait()
"""


def test_server_survives_reloads_while_many_connect(certs: Path, foreign_certs: Path) -> None:
    """Thirty reloads, while sixteen clients keep making handshakes.

    (The crash in gRPC is too rare to show here; what prevents it has the test above.)
    """
    run = subprocess.run(
        [sys.executable, "-c", _CONNECT_AND_RELOAD, certs, foreign_certs],
        cwd=_HERE,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(("days", "told"), [(40, ""), (29, "in 28 days"), (1, "in 0 days")])
def test_certificate_that_expires_within_30_days_is_told(
    live: Path, certs: Path, days: int, told: str
) -> None:
    """The sentence has the file, the day and the remedy."""
    made = _make(live, "new", f"{_FOR_SERVERS}\n{_NAMES}", ca=certs / "server-ca", days=(-1, days))
    made.rename(live / "server.pem")
    (live / "new-key.pem").rename(live / "server-key.pem")
    warnings = Certificates(Path.read_bytes, live).warnings()
    assert len(warnings) == bool(told)
    for warning in warnings:
        assert warning.startswith(f"{live}/server.pem expires on 20")
        assert f"{told}; make new ones with certs/generate.sh" in warning


def test_ca_that_expires_within_30_days_is_told(live: Path) -> None:
    """The CA of the clients is as necessary as the server's certificate."""
    made = _make(live, "new", "basicConstraints=critical,CA:TRUE", ca=None, days=(-1, 10))
    made.rename(live / "client-ca.pem")
    (warning,) = Certificates(Path.read_bytes, live).warnings()
    assert warning.startswith(f"{live}/client-ca.pem expires on 20")


_SHORT_DAYS = """
import sys, daemon, server
daemon._DAY_S = 0.05
sys.exit(server.main(sys.argv[1:]))
"""


def test_server_warns_every_day_before_a_certificate_expires(
    live: Path, make_state: Callable[[], Path]
) -> None:
    """In the log, at the start and then once a day; in this test a day has 50 ms."""
    made = _make(live, "new", "basicConstraints=critical,CA:TRUE", ca=None, days=(-1, 10))
    made.rename(live / "client-ca.pem")
    options = ["--listen", "127.0.0.1:0", "--limits", "off", "--certs", str(live)]
    options += ["--state-dir", str(make_state()), "--uids", "81000-81010"]
    with subprocess.Popen(
        [sys.executable, "-c", _SHORT_DAYS, *options],
        cwd=_HERE,
        env=clean_environment() | {"PYTHONPATH": str(_HERE)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stderr
        warnings = (line for line in program.stderr if "client-ca.pem expires on 20" in line)
        assert len(list(itertools.islice(warnings, 3))) == 3
        program.send_signal(signal.SIGTERM)
        program.communicate(timeout=GUARD_S)
    assert program.returncode == 0


def test_one_missing_file_does_not_suggest_another_ca(certs: Path, tmp_path: Path) -> None:
    """`make certs` would make one, which no client knows. Where nothing is, it is right."""
    for name in ("server.pem", "server-key.pem"):
        shutil.copy(certs / name, tmp_path)
    with pytest.raises(CertificateError, match=r"client-ca\.pem missing; copy them from the mach"):
        Certificates(Path.read_bytes, tmp_path)
    with pytest.raises(CertificateError, match="missing; make them with `make certs`"):
        Certificates(Path.read_bytes, tmp_path / "absent")
