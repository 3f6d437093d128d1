"""Where the last lines of an output begin.

    find_tail(read, [(0, size)], lines=10)
    line_begin(read, 0, offset)

`read(offset, size)` returns these bytes. The search goes backwards and reads one block at a time.

Thread safety: these functions have no state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["find_tail", "line_begin"]

_BLOCK_BYTES = 256 * 1024


def find_tail(
    read: Callable[[int, int], bytes], parts: Sequence[tuple[int, int]], lines: int
) -> int:
    """Return the offset at which the last `lines` lines begin.

    `parts`: where each part that is kept begins and ends, the last one first; at least one. What
    follows the last newline of a part is a line, too, like what comes before the first newline.
    """
    if lines == 0:
        return parts[0][1]
    for part_begin, part_end in parts:
        at = part_end
        while at > part_begin:
            begin = max(part_begin, at - _BLOCK_BYTES)
            block = read(begin, at - begin)
            # A newline at the very end ends the last line and begins no other.
            searched = len(block) - (at == part_end)
            count = block.count(b"\n", 0, searched)
            if count >= lines:
                for _ in range(lines):
                    searched = block.rfind(b"\n", 0, searched)
                return begin + searched + 1
            lines -= count
            at = begin
        lines -= part_begin < part_end
        if lines == 0:
            return part_begin
    return parts[-1][0]


def line_begin(read: Callable[[int, int], bytes], part_begin: int, offset: int) -> int:
    """Return where the line of the byte at `offset` begins.

    `offset` itself if the line begins before its part of the output, or has more than 256 KiB.
    """
    begin = max(part_begin, offset - _BLOCK_BYTES)
    found = read(begin, offset - begin).rfind(b"\n")
    if found < 0:
        return 0 if begin == 0 else offset
    return begin + found + 1
