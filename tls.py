"""The server's certificates: read, checked, and replaced while the server runs.

    certificates = Certificates(Path.read_bytes, Path("certs"))
    server.add_secure_port("127.0.0.1:50051", certificates.credentials())
    ...
    certificates.reload("127.0.0.1:50051")

New certificates are for new connections. Those that are open go on as they are, those
of clients included whose CA is no longer trusted.

Nothing is in force that was not checked: the key is that of the certificate, which is
one for servers and valid today, and there is a client CA that is valid today. A set of
which half has been replaced does not pass, so the files need not change all at once.

Thread safety: `reload` is called by one thread at a time; the rest by any.

Sources: grpc.dynamic_ssl_server_credentials; OpenSSL verify(1), -partial_chain; proc(5) on
/proc/self/fd, which a process may always open, also one that is not dumpable.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["CertificateError", "Certificates", "certificate_files"]

logger = logging.getLogger(__name__)

_KEY, _CHAIN, _CLIENT_CA = "server-key.pem", "server.pem", "client-ca.pem"
_REMEDY = "make new ones with certs/generate.sh"
_KINDS = "EC P-256 or RSA 2048"
# What OpenSSL says of the key of another certificate, the second if it is of another kind.
_MISMATCH = ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED", "KEY_TYPE_MISMATCH")
_CONNECT_S = 10.0  # for a connection to ourselves and an answer on it


class CertificateError(Exception):
    """The certificates cannot be used; the message says which and what to do."""


def certificate_files(directory: Path) -> tuple[Path, ...]:
    """All that is read in the directory: the server's key and certificate, the clients' CA."""
    return tuple(directory / name for name in (_KEY, _CHAIN, _CLIENT_CA))


@dataclass(frozen=True, slots=True)
class _Set:
    """The contents of the files, checked."""

    key: bytes = field(repr=False)
    chain: bytes
    client_ca: bytes
    certificate: bytes = field(compare=False, repr=False)
    """The first of `chain`, in DER."""

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


class Certificates:
    """The certificates in the directory `where`, each file read with `read`.

    Raises `CertificateError` if they cannot be used, and what else `read` raises.
    """

    def __init__(self, read: Callable[[Path], bytes], where: Path) -> None:
        self._read = read
        self._where = where
        # Both are replaced as a whole and never changed, so they need no lock; the second
        # is used under one of gRPC's.
        self._in_force = self._load()
        self._given_to_grpc = self._in_force

    def credentials(self) -> grpc.ServerCredentials:
        """Make the credentials for mutual TLS on one port of one server; call it once.

        With the first credentials gRPC starts a thread, which has for good what rights the
        process has at that moment.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._in_force.configuration(),
            self._fetch,  # type: ignore[arg-type]  # the stubs forget None
            require_client_authentication=True,
        )

    def reload(self, address: str) -> bool:
        """Take up the files as they are now; whether they are in force then.

        `address`: the HOST:PORT at which the server with our credentials is running. Blocks
        for some ms; for 20 s at most if the server does not answer. What is wrong is logged,
        and what was in force stays so. Never raises.
        """
        try:
            new = self._load()
            if new == self._in_force:
                logger.info("the certificates have not changed")
                return True
            self._replace(new, address)
        except Exception as error:  # noqa: BLE001 -- also what the reader's fault is changes nothing
            logger.error("the certificates stay as they were: %s", error)
            return False
        logger.info("new certificates are in force")
        return True

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """For gRPC, which asks before each handshake whether there is anything new."""
        new = self._in_force
        if new is self._given_to_grpc:
            return None
        self._given_to_grpc = new
        return new.configuration()

    def _replace(self, new: _Set, address: str) -> None:
        # gRPC may free what it made of the old certificates while another of its threads
        # is about to begin a handshake with them, and crashes (seen with 1.85: about once in
        # 2000 replacements, with 16 clients connecting all the time). Handshakes
        # under way keep it from being freed. So one is begun and not ended before the
        # change: gRPC gives it up after 120 s, when those threads are long done.
        sock, _ = _begin_handshake(address)
        threading.Thread(target=_hold, args=(sock,), name="handshake", daemon=True).start()
        old, self._in_force = self._in_force, new
        with contextlib.suppress(OSError):  # too busy to answer is nothing against the new ones
            sock, certificate = _begin_handshake(address)
            sock.close()
            if certificate != new.certificate:
                self._in_force = old
                raise CertificateError(
                    f"gRPC does not take {self._where / _CHAIN}; use a key of another kind, like "
                    f"{_KINDS}"
                )

    def _load(self) -> _Set:
        """Read and check the files."""
        contents, missing = [], []
        for path in certificate_files(self._where):
            try:
                contents.append(self._read(path))
            except FileNotFoundError:
                missing.append(str(path))
            except OSError as error:
                raise CertificateError(
                    f"the certificates in {self._where} cannot be read: {error}"
                ) from error
        if missing:
            raise CertificateError(
                f"no certificates: {', '.join(missing)} missing; make them with `make certs`, "
                "or name their directory with --certs"
            )
        key, chain, client_ca = contents
        try:
            _check_client_ca(client_ca)
            return _Set(key, chain, client_ca, _check_server(key, chain))
        except (_UnusableError, ssl.SSLError, ValueError) as error:
            raise CertificateError(
                f"the certificates in {self._where} are not usable: {error}; {_REMEDY}"
            ) from error


# --- the checks -------------------------------------------------------------------------


class _UnusableError(Exception):
    """What is wrong with one of the files."""


def _check_client_ca(pem: bytes) -> None:
    cas = _parse(_CLIENT_CA, pem).get_ca_certs()
    if not cas:
        raise _UnusableError(f"{_CLIENT_CA} holds no certificate of a CA")
    now = time.time()
    if not any(
        ssl.cert_time_to_seconds(str(ca["notBefore"]))
        <= now
        <= ssl.cert_time_to_seconds(str(ca["notAfter"]))
        for ca in cas
    ):
        raise _UnusableError(f"{_CLIENT_CA} has expired, or is not yet valid")


def _check_server(key: bytes, chain: bytes) -> bytes:
    """Return the certificate, in DER."""
    _parse(_CHAIN, chain)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # The module `ssl` takes these two from files only.
    with _in_memory(chain) as chain_path, _in_memory(key) as key_path:
        try:
            # Without a password given, OpenSSL would ask for one at the terminal.
            server.load_cert_chain(chain_path, key_path, password="")
        except ssl.SSLError as error:
            if error.reason in _MISMATCH:
                problem = f"{_KEY} is not the key of {_CHAIN}"
            elif not error.reason:
                problem = f"{_KEY} is not a private key in PEM, or needs a password"
            else:
                problem = f"{_CHAIN} with {_KEY}: {error.reason}"
            raise _UnusableError(problem) from error
    # What a client will say of it, who trusts it for itself: its dates and its purpose.
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    try:
        certificate = _handshake(server, client)
    except ssl.SSLError as error:
        raise _UnusableError(
            f"{_KEY} is not of a kind for TLS 1.3, like {_KINDS} ({error.reason})"
        ) from error
    client.verify_mode = ssl.CERT_REQUIRED
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=certificate)
    try:
        return _handshake(server, client)
    except ssl.SSLCertVerificationError as error:
        raise _UnusableError(f"{_CHAIN}: {error.verify_message}") from error


def _parse(name: str, pem: bytes) -> ssl.SSLContext:
    """Load all certificates of a file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        # There may be any text between them.
        context.load_verify_locations(cadata=pem.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise _UnusableError(f"{name} is not a certificate in PEM") from error
    return context


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A file that has no name for others and is on no disk."""
    with open(os.memfd_create("certificates"), "wb", buffering=0) as file:
        file.write(data)
        yield f"/proc/self/fd/{file.fileno()}"


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """Let the two meet in memory; return the server's certificate, in DER."""
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    ours = client.wrap_bio(to_client, to_server)
    for end in (ours, theirs):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    ours.do_handshake()
    return ours.getpeercert(binary_form=True) or b""


# --- connections to ourselves ------------------------------------------------------------


def _begin_handshake(address: str) -> tuple[socket.socket, bytes]:
    """Go as far as one can without a certificate; return the connection, the server's certificate.

    Raises OSError.
    """
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing)
    sock = socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S)
    try:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                data = sock.recv(65536)
                if not data:
                    raise ConnectionError(f"{address} hung up") from None
                incoming.write(data)
    except BaseException:
        sock.close()
        raise
    # Our last message stays unsent, so that for the server the handshake is under way.
    return sock, tls.getpeercert(binary_form=True) or b""


def _hold(sock: socket.socket) -> None:
    """Keep a connection until the other side ends it."""
    with contextlib.suppress(OSError), sock:
        sock.settimeout(None)
        while sock.recv(4096):
            pass
