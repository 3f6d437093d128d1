"""The server's certificates: read, checked, and replaced while the server runs.

    certificates = Certificates(Path.read_bytes, Path("certs"))
    server.add_secure_port("127.0.0.1:50051", certificates.credentials())
    ...
    certificates.reload("127.0.0.1:50051")

New certificates apply to new connections. Open connections continue, also those of clients
whose CA is no longer trusted.

Only files that pass `certcheck.py` come into force. A set of which only some files have been
replaced does not pass, so an operator can replace the files one after the other.

Thread safety: one thread at a time may call `reload`; any thread may call the rest.

Sources: grpc.dynamic_ssl_server_credentials; RFC 5280 section 4.1 (the parts of a certificate).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc

from certcheck import UnusableError, check_ca, check_pair
from errors import in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["CertificateError", "Certificates", "certificate_files", "expiry"]

logger = logging.getLogger(__name__)

_KEY, _CHAIN, _CLIENT_CA = "server-key.pem", "server.pem", "client-ca.pem"
_REMEDY = "make new ones with certs/generate.sh"
_MAKE = "make them with `make certs`"
_DAY_S = 24 * 60 * 60
_WARN_DAYS = 30  # so many days before a certificate expires, the server begins to warn
_VERSION, _UTC_TIME = 0xA0, 0x17  # tags of DER
_LONGEST = 0x7F  # a greater byte says how many bytes of length follow
_CONNECT_S = 10.0  # for a connection to this server, and for each answer on it


class CertificateError(Exception):
    """The certificates cannot be used; the message says which and what to do."""


def expiry(der: bytes) -> float:
    """Return when a certificate that TLS has accepted expires, in seconds since 1970.

    TLS verifies a certificate when a client connects with all of the handshake. A client that
    resumes a session, or never closes its connection, may have one that has expired since.
    """
    _, at, _ = _element(der, 0)
    _, at, _ = _element(der, at)
    if der[at] == _VERSION:
        _, _, at = _element(der, at)
    for _ in range(3):  # the serial number, the algorithm and the issuer
        _, _, at = _element(der, at)
    _, at, _ = _element(der, at)
    _, _, at = _element(der, at)
    kind, begin, end = _element(der, at)
    text = der[begin:end].decode()
    if kind == _UTC_TIME:
        text = f"{'19' if text >= '5' else '20'}{text}"
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return the tag of the element that begins there, and where its content begins and ends."""
    begin, length = at + 2, der[at + 1]
    if length > _LONGEST:
        begin += length - _LONGEST - 1
        length = int.from_bytes(der[at + 2 : begin])
    return der[at], begin, begin + length


def certificate_files(directory: Path) -> tuple[Path, ...]:
    """Return the files in use: the server's key, the server's certificate, the clients' CA."""
    return tuple(directory / name for name in (_KEY, _CHAIN, _CLIENT_CA))


@dataclass(frozen=True, slots=True)
class _Set:
    """The contents of the files, checked."""

    key: bytes = field(repr=False)
    chain: bytes
    client_ca: bytes
    certificate: bytes = field(compare=False, repr=False)
    """The first of `chain`, in DER."""
    expiries: dict[str, int] = field(compare=False)
    """When each file expires, in seconds since 1970."""

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


class Certificates:
    """The certificates in the directory `where`, each file read with `read`.

    Raises `CertificateError` if they cannot be used, and what else `read` raises.
    """

    def __init__(self, read: Callable[[Path], bytes], where: Path) -> None:
        self._read = read
        self._where = where
        # Both are immutable, and replaced as a whole, so they need no lock. gRPC holds a lock of
        # its own when it calls `_fetch`, which uses the second.
        self._in_force = self._load()
        self._given_to_grpc = self._in_force

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials for mutual TLS on one port of one server; call it once.

        gRPC's first credentials start a thread, which keeps the rights that the process has
        at that moment.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._in_force.configuration(),
            self._fetch,  # type: ignore[arg-type]  # the stubs forget None
            require_client_authentication=True,
        )

    def reload(self, address: str) -> str:
        """Read the files again; return "" if they are in force now.

        `address`: the HOST:PORT of the server that uses `credentials`. An error is logged and
        returned, and the former certificates stay in force. Blocks for some ms; if the server
        does not answer, for at most 20 s. Never raises.
        """
        try:
            new = self._load()
            if new == self._in_force:
                logger.info("the certificates have not changed")
                return ""
            self._replace(new, address)
        except Exception as error:  # noqa: BLE001 -- an unforeseen error must not end the server
            problem = f"the certificates stay as they were: {in_words(error)}"
            logger.error("%s", problem)
            return problem
        logger.info("new certificates are in force")
        return ""

    @property
    def expiries(self) -> Mapping[str, int]:
        """When each certificate in force expires, in seconds since 1970, by the file's name."""
        return self._in_force.expiries

    def warnings(self) -> list[str]:
        """Return a sentence for each file in force that expires within 30 days."""
        found = []
        for name, expires_at in self._in_force.expiries.items():
            days = int(expires_at - time.time()) // _DAY_S
            if days < _WARN_DAYS:
                day = time.strftime("%Y-%m-%d", time.gmtime(expires_at))
                when = f"expires on {day}, in {days} days" if days >= 0 else f"expired on {day}"
                found.append(f"{self._where / name} {when}; {_REMEDY}, and reload")
        return found

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return new certificates, if any; gRPC calls this before each handshake."""
        new = self._in_force
        if new is self._given_to_grpc:
            return None
        self._given_to_grpc = new
        return new.configuration()

    def _replace(self, new: _Set, address: str) -> None:
        # gRPC may free the old certificates while another of its threads is about to begin a
        # handshake with them, and then crashes. Seen with gRPC 1.85 in November 2026, once in
        # about 2000 replacements while 16 clients kept connecting. A handshake under way keeps
        # the old certificates alive. So this thread begins one before the replacement and does
        # not end it; gRPC gives it up after 120 s, when those threads have long finished.
        sock, _ = _begin_handshake(address)
        threading.Thread(target=_hold, args=(sock,), name="handshake", daemon=True).start()
        old, self._in_force = self._in_force, new
        with contextlib.suppress(OSError):  # a server too busy to answer proves nothing
            sock, certificate = _begin_handshake(address)
            sock.close()
            if certificate != new.certificate:
                self._in_force = old
                raise CertificateError(
                    f"gRPC does not accept {self._where / _CHAIN}; use a key of another kind, "
                    "like EC P-256"
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
                    f"the certificates in {self._where} cannot be read: {in_words(error)}; "
                    "check who may read them"
                ) from error
        if missing:
            # `make certs` would make new CAs where there are none, which no client would know.
            how = "copy them from the machine with the CAs" if contents else _MAKE
            raise CertificateError(
                f"no certificates: {', '.join(missing)} missing; {how}, or name their directory "
                "with --certs"
            )
        key, chain, client_ca = contents
        try:
            ca_expires_at = check_ca(_CLIENT_CA, client_ca)
            pair = check_pair("server", _CHAIN, chain, _KEY, key)
        except (UnusableError, ssl.SSLError, ValueError) as error:
            raise CertificateError(
                f"the certificates in {self._where} are not usable: {error}; {_REMEDY}"
            ) from error
        expiries = {_CHAIN: pair.expires_at, _CLIENT_CA: ca_expires_at}
        return _Set(key, chain, client_ca, pair.der, expiries)


# --- connections to this server -----------------------------------------------------------


def _begin_handshake(address: str) -> tuple[socket.socket, bytes]:
    """Begin a handshake; return the connection and the server's certificate. Raises OSError."""
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
                    raise ConnectionError(f"{address} closed the connection") from None
                incoming.write(data)
    except BaseException:
        sock.close()
        raise
    # The client's last message stays unsent, so the handshake stays under way for the server.
    return sock, tls.getpeercert(binary_form=True) or b""


def _hold(sock: socket.socket) -> None:
    """Keep a connection open until the server closes it, at the latest when the server ends."""
    with contextlib.suppress(OSError), sock:
        sock.settimeout(None)
        while sock.recv(4096):
            pass
