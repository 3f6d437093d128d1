"""Tests of `cgroupfs.py` on real cgroups. `test_cgroups.py` has those of what builds on it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cgroupfs import remove_tree

if TYPE_CHECKING:
    from pathlib import Path

_DEPTH = 1500


@pytest.mark.kernel
def test_nested_cgroups_are_removed_however_deep_they_are(base: Path) -> None:
    """Cgroups that a hostile job nested deeper than Python can recurse are removed."""
    fd = os.open(base, os.O_RDONLY)
    try:
        for _ in range(_DEPTH):
            os.mkdir("d", dir_fd=fd)
            inner = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
    finally:
        os.close(fd)
    remove_tree(base / "d")
    assert not (base / "d").exists()
