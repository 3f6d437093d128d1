"""Checks certificates and keys before gRPC sees them, for the server and for the client.

    check_ca("client-ca.pem", client_ca)
    certificate = check_pair("server", "server.pem", chain, "server-key.pem", key)
    certificate.der, certificate.expires_at

gRPC ends the process at an empty file, and reports any other mistake as a failed
connection. The checks here name the file and the mistake: not PEM, a password, the key of
another certificate, a kind of key that gRPC's TLS cannot use, the wrong purpose, not valid
today.

Thread safety: there is no state.

Sources: OpenSSL verify(1), -partial_chain; RFC 5280 section 4.1 (SubjectPublicKeyInfo), RFC
3279 section 2.3 and RFC 5480 section 2.1.1 (its algorithms); proc(5) on /proc/self/fd, which
a process may open even if it is not dumpable.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import time

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

__all__ = ["Certificate", "UnusableError", "check_ca", "check_pair"]

_KINDS = "EC P-256, EC P-384 or RSA"
# The beginnings of the public key in a certificate. These keys were seen to work with gRPC 1.85
# on both sides; P-521, brainpool, secp256k1, Ed25519, Ed448 and RSA-PSS keys were not.
_ALGORITHMS = tuple(
    map(
        bytes.fromhex,
        (
            "301306072a8648ce3d020106082a8648ce3d030107",  # EC P-256
            "301006072a8648ce3d020106052b81040022",  # EC P-384
            "300d06092a864886f70d0101010500",  # RSA
        ),
    )
)
# The same for the certificates of CAs, whose keys sign no handshake.
_CA_ALGORITHMS = (
    *_ALGORITHMS,
    *map(
        bytes.fromhex,
        (
            "301006072a8648ce3d020106052b81040021",  # EC P-224
            "301006072a8648ce3d020106052b81040023",  # EC P-521
            "302a300506032b6570032100",  # Ed25519
        ),
    ),
)
# The extension keyUsage, up to the byte whose first bit permits to sign a handshake.
_KEY_USAGE = re.compile(rb"\x06\x03\x55\x1d\x0f(?:\x01\x01\xff)?\x04.\x03..(.)", re.DOTALL)
_DIGITAL_SIGNATURE = 0x80
# OpenSSL's reasons for the key of another certificate, of the same kind or of another one.
_MISMATCH = ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED", "KEY_TYPE_MISMATCH")
_NOT_YET_VALID = 9  # X509_V_ERR_CERT_NOT_YET_VALID
_KEY_MARK = b"PRIVATE KEY-----"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class UnusableError(Exception):
    """A file cannot be used; the message names the file and the mistake."""


class Certificate:
    """A usable certificate. Attributes: `der`; `expires_at`, in seconds since 1970."""

    def __init__(self, der: bytes, expires_at: int) -> None:
        self.der = der
        self.expires_at = expires_at


def check_ca(name: str, pem: bytes) -> int:
    """Raise `UnusableError` unless the file holds the certificate of a CA that is valid today.

    Returns when the last of the CAs that are valid today expires, in seconds since 1970.
    """
    context = _parse(name, pem)
    cas = context.get_ca_certs()
    if not cas:
        raise UnusableError(f"{name} holds no certificate of a CA")
    now = time.time()
    starts = [ssl.cert_time_to_seconds(str(ca["notBefore"])) for ca in cas]
    ends = [ssl.cert_time_to_seconds(str(ca["notAfter"])) for ca in cas]
    if all(end < now for end in ends):
        raise UnusableError(f"{name} has expired")
    valid = [end for start, end in zip(starts, ends, strict=True) if start <= now <= end]
    if not valid:
        raise UnusableError(f"{name} is not valid yet; check the clock")
    _check_ca_keys(name, context)
    return max(valid)


def check_pair(
    side: Literal["server", "client"], chain_name: str, chain: bytes, key_name: str, key: bytes
) -> Certificate:
    """Check the certificate of a server or client with its key, and return it.

    `chain`: in PEM, the certificate first, then those of intermediate CAs. Raises
    `UnusableError`; OSError if this process cannot make a file in memory.
    """
    _check_ca_keys(chain_name, _parse(chain_name, chain))
    if key.startswith(_BYTE_ORDER_MARK):
        raise UnusableError(f"{key_name} begins with a byte order mark; save it without")
    if _KEY_MARK not in key:
        raise UnusableError(f"{key_name} is not a private key in PEM")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    # Python's ssl reads these two from files only.
    with _in_memory(chain) as chain_path, _in_memory(key) as key_path:
        for context in (server, client):
            try:
                # Without this password OpenSSL would ask for one at the terminal.
                context.load_cert_chain(chain_path, key_path, password="")
            except ssl.SSLError as error:
                raise UnusableError(_explain(error, chain_name, key_name)) from error
    try:
        certificate = _handshake(server, client)[0].getpeercert(binary_form=True) or b""
    except ssl.SSLError as error:
        raise UnusableError(_wrong_kind(key_name)) from error
    if not any(algorithm in certificate for algorithm in _ALGORITHMS):
        raise UnusableError(_wrong_kind(key_name))
    usage = _KEY_USAGE.search(certificate)
    if usage is not None and not usage[1][0] & _DIGITAL_SIGNATURE:
        raise UnusableError(f"{chain_name} has a keyUsage without digitalSignature")
    # The peer gets the certificate as its own CA. So OpenSSL verifies only dates and purpose.
    peer = client if side == "server" else server
    peer.verify_mode = ssl.CERT_REQUIRED
    peer.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    peer.load_verify_locations(cadata=certificate)
    try:
        ours, theirs = _handshake(server, client)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _NOT_YET_VALID:  # not each OpenSSL has the same words for it
            raise UnusableError(f"{chain_name} is not valid yet; check the clock") from error
        raise UnusableError(f"{chain_name}: {error.verify_message}") from error
    # Python's ssl tells the dates only to the side that has verified the certificate.
    verified = (ours if side == "server" else theirs).getpeercert() or {}
    return Certificate(certificate, ssl.cert_time_to_seconds(str(verified["notAfter"])))


def _check_ca_keys(name: str, context: ssl.SSLContext) -> None:
    """Raise `UnusableError` if a CA has a key with which gRPC cannot verify a certificate."""
    for ca in context.get_ca_certs(binary_form=True):
        if not any(algorithm in ca for algorithm in _CA_ALGORITHMS):
            raise UnusableError(
                f"{name} has the certificate of a CA whose key is of a kind that gRPC cannot use; "
                f"use {_KINDS}"
            )


def _wrong_kind(key_name: str) -> str:
    return f"{key_name} is of a kind that gRPC cannot use; use {_KINDS}"


def _explain(error: ssl.SSLError, chain_name: str, key_name: str) -> str:
    if error.reason in _MISMATCH:
        return f"{key_name} is not the key of {chain_name}"
    if not error.reason:
        return f"{key_name} is not a private key in PEM, or needs a password"
    return f"{chain_name} with {key_name}: {error.reason}"


def _parse(name: str, pem: bytes) -> ssl.SSLContext:
    """Load all certificates of a file."""
    if pem.startswith(_BYTE_ORDER_MARK):
        raise UnusableError(f"{name} begins with a byte order mark; save it without")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        # Any text may stand between the certificates.
        context.load_verify_locations(cadata=pem.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise UnusableError(f"{name} is not a certificate in PEM") from error
    return context


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """Provide a file that is on no disk and that other users cannot open."""
    with open(os.memfd_create("certificates"), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _handshake(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Connect the two in memory; return the client's side and the server's."""
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    ours = client.wrap_bio(to_client, to_server)
    for end in (ours, theirs):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    ours.do_handshake()
    theirs.do_handshake()  # verifies the client's certificate
    return ours, theirs
