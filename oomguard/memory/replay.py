"""What a run takes from a card, by a model of PyTorch's caching allocator.

Allocated bytes follow from the run. Reserved ones depend on two things more: where CUDA places the
segments, which no process chooses, and whether cuBLAS has its workspaces already, which it takes at
the first product of each thread of a process. So a run that fits must fit in every case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oomguard.memory.allocator import CachingAllocator
from oomguard.memory.timeline import Event, Mark, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Replay:
    """What a timeline took.

    Attributes:
        peak_allocated_bytes: Most bytes in blocks in use.
        peak_reserved_bytes: Most bytes of segments.
        peak_index: The event at which `peak_allocated_bytes` was reached.
        phase: The phase of that event.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_index: int
    phase: str


def replay(
    timeline: Timeline,
    *,
    expandable: bool = False,
    limit_bytes: int | None = None,
    ascending: bool = False,
) -> Replay | None:
    """Run a timeline through the allocator.

    Args:
        timeline: What to run.
        expandable: Whether `expandable_segments` is on.
        limit_bytes: What the card has for the allocator.
        ascending: See `CachingAllocator`.

    Returns:
        What it took, or `None` when the limit was too low.
    """
    pool = CachingAllocator(limit_bytes=limit_bytes, expandable=expandable, ascending=ascending)
    phase, at_phase, peak_index, peak = "load", "load", 0, 0
    malloc, free = pool.malloc, pool.free
    for index, event in enumerate(timeline.events):
        if isinstance(event, Mark):
            if event.phase is None:
                pool.release_cached()
            else:
                phase = event.phase
        elif event[1] < 0:
            free(event[0])
        else:
            if not malloc(event[0], event[1]):
                return None
            if pool.allocated_bytes > peak:
                peak, peak_index, at_phase = pool.allocated_bytes, index, phase
    return Replay(peak, pool.peak_reserved_bytes, peak_index, at_phase)


def cases(
    timeline: Timeline, *, expandable: bool, limit_bytes: int | None = None
) -> Iterator[Replay | None]:
    """Replays of the cases that differ in what they reserve, the usual one first.

    Args:
        timeline: What to run.
        expandable: Whether `expandable_segments` is on, where addresses do not matter.
        limit_bytes: What the card has for the allocator.
    """
    first = first_of_process(timeline)
    for ascending in (False,) if expandable else (False, True):
        for one in (timeline, first) if first is not timeline else (timeline,):
            yield replay(one, expandable=expandable, limit_bytes=limit_bytes, ascending=ascending)


def first_of_process(timeline: Timeline) -> Timeline:
    """The same run where no training was before it in its process."""
    if not timeline.late:
        return timeline
    moved = dict(timeline.late)
    arriving: dict[int, list[Event]] = {}
    for index, where in timeline.late:
        arriving.setdefault(where, []).append(timeline.events[index])
    events: list[Event] = []
    for index, event in enumerate(timeline.events):
        events += arriving.get(index, [])
        if index not in moved:
            events.append(event)
    return Timeline(events, timeline.category)
