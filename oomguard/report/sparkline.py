"""A row of sizes in one line of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-=+*#@"


def sparkline(sizes: Sequence[int], *, top: int, width: int, marks: str = BLOCKS) -> str:
    """Sizes as marks of eight heights, from 0 at the lowest to `top` at the highest.

    Args:
        sizes: In order; where there are more than `width`, each mark is the largest of its share.
        top: What the highest mark stands for; a size above it gets the highest mark too.
        width: Most marks.
        marks: Eight characters, the lowest first.
    """
    count = min(len(sizes), width)
    shares = [
        sizes[at * len(sizes) // count : (at + 1) * len(sizes) // count] for at in range(count)
    ]
    heights = (len(marks) * max(share) // max(top, 1) for share in shares)
    return "".join(marks[min(height, len(marks) - 1)] for height in heights)
