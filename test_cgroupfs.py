"""Tests of the files and directories of cgroups, on real ones."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cgroupfs import remove_tree

if TYPE_CHECKING:
    from pathlib import Path

_DEPTH = 1500


@pytest.mark.kernel
def test_cgroups_below_each_other_are_removed_however_deep_they_are(base: Path) -> None:
    """A job or a main process in hostile hands can nest them deeper than Python can recurse."""
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
