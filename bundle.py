"""A bundle: all that a new user needs to reach a server but the password, in one tar file.

    data = pack({name: ... for name in NAMES})
    files = unpack(data)           # by name

The server's operator makes it with `server invite`, the user reads it with `client import`. It has
a private key, so only its user may see it. `unpack` believes nothing that the file says: it returns
the content of the files of `NAMES`, and refuses a file that has anything else.

Thread safety: there is no state.
"""

from __future__ import annotations

import io
import tarfile

TYPE_CHECKING = False  # importing it from typing takes as long as Python's own start
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CA",
    "CERTIFICATE",
    "KEY",
    "MAX_BYTES",
    "NAMES",
    "PROFILE",
    "BundleError",
    "pack",
    "unpack",
]

PROFILE = "profile.toml"  # the keys `server` and `user`
CERTIFICATE = "client.pem"
KEY = "client-key.pem"
CA = "server-ca.pem"
NAMES = (PROFILE, CERTIFICATE, KEY, CA)
MAX_BYTES = 1024 * 1024  # of a bundle; those that `pack` makes have some 10 KiB

_MODE = 0o600


class BundleError(ValueError):
    """The file is no bundle; the message says why."""


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return the tar file."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in NAMES:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(files[name]), _MODE
            tar.addfile(member, io.BytesIO(files[name]))
    return data.getvalue()


def unpack(data: bytes) -> dict[str, bytes]:
    """Return the content of each file of a bundle. Raises `BundleError`."""
    files: dict[str, bytes] = {}
    if len(data) > MAX_BYTES:
        raise BundleError(f"it is larger than {MAX_BYTES} bytes")
    try:
        # Not compressed: a small compressed file can become a huge one.
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.name not in NAMES or not member.isreg() or member.issparse():
                    raise BundleError(f"{member.name!r} in it is none of {', '.join(NAMES)}")
                if member.name in files:
                    raise BundleError(f"it has {member.name} twice")
                content = tar.extractfile(member)
                files[member.name] = content.read() if content else b""
                if len(files[member.name]) != member.size:
                    raise BundleError("it has been cut off")
    except RecursionError:  # headers that each announce another one
        raise BundleError("not a tar file of `server invite`: too many headers") from None
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, BundleError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"not a tar file of `server invite`: {reason}") from None
    missing = [name for name in NAMES if name not in files]
    if missing:
        raise BundleError(f"{', '.join(missing)} is missing in it")
    return files
