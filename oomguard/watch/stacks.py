"""Which lines of code allocated what has come to stay, by two snapshots of the allocator."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oomguard.watch.naming import is_installed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_FRAMES = 3
_REPORTED = 3

Site = tuple[str, ...]


def allocated_by_site(segments: Iterable[Mapping[str, Any]]) -> Counter[Site]:
    """Bytes of live blocks by the frames that allocated them, innermost first.

    Args:
        segments: As in `torch.cuda.memory_snapshot`, with recorded frames. Blocks that are older
            than the recording have none, nor do those that a backward pass allocates: they are
            left out.
    """
    found: Counter[Site] = Counter()
    for segment in segments:
        for block in segment["blocks"]:
            if block["state"] == "active_allocated" and block.get("frames"):
                found[_site(block["frames"])] += block["size"]
    return found


def growing_sites(before: Counter[Site], after: Counter[Site]) -> tuple[str, ...]:
    """The sites whose live bytes grew the most, as text, the most first."""
    grown = Counter(after)
    grown.subtract(before)
    return tuple(" < ".join(site) for site, size in grown.most_common(_REPORTED) if size > 0)


def _site(frames: Sequence[Mapping[str, Any]]) -> Site:
    own = [frame for frame in frames if not is_installed(frame["filename"])]
    return tuple(
        f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}"
        for frame in (own or frames)[:_FRAMES]
    )
