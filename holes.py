"""Gives the middle of a file back to the disk.

    if can_punch(fd):
        punch(fd, 4096, 8192, hole_begin=4096)

The bytes in the hole read as zeros. Neither the size of the file nor the offset of any other byte
changes.

Thread safety: these functions have no state.

Source: fallocate(2), FALLOC_FL_PUNCH_HOLE.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["can_punch", "punch"]

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
# The disk gives back only blocks that one call covers whole. No file system has larger blocks.
_BLOCK_BYTES = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


def can_punch(fd: int) -> bool:
    """Whether the file system of this file can make holes. Changes nothing."""
    beyond = os.fstat(fd).st_size // _BLOCK_BYTES * _BLOCK_BYTES + _BLOCK_BYTES
    try:
        _fallocate(fd, beyond, _BLOCK_BYTES)
    except OSError:
        return False
    return True


def punch(fd: int, begin: int, end: int, *, hole_begin: int) -> None:
    """Make a hole of the bytes from `begin` to before `end`. Raises OSError.

    `hole_begin`: where the bytes before `begin` that are a hole already begin; `begin` if there
    are none. The block in which two holes meet is given back with the second one.
    """
    begin = max(hole_begin, begin // _BLOCK_BYTES * _BLOCK_BYTES)
    _fallocate(fd, begin, end - begin)


def _fallocate(fd: int, offset: int, size: int) -> None:
    # off_t has 64 bits in glibc's fallocate64, and in every function of other C libraries.
    function = getattr(_libc, "fallocate64", None) or _libc.fallocate
    flags = ctypes.c_int(_PUNCH_HOLE | _KEEP_SIZE)
    if function(fd, flags, ctypes.c_int64(offset), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
