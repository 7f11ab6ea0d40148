"""Memory without a cache of blocks, as `oomguard.testing.VirtualCard` counts it."""

from __future__ import annotations

from oomguard.memory.replay import Replay
from oomguard.memory.timeline import Mark, Timeline

_BLOCK_BYTES = 512  # kMinBlockSize of CUDACachingAllocator.cpp, in which a VirtualCard counts too


def count(timeline: Timeline) -> Replay:
    """The peak of what lives at once; reserved is what is allocated."""
    live: dict[int, int] = {}
    now = peak = peak_index = 0
    phase = at_phase = "load"
    for index, event in enumerate(timeline.events):
        if isinstance(event, Mark):
            phase = event.phase or phase
            continue
        key, nbytes = event
        if nbytes < 0:
            now -= live.pop(key)
            continue
        live[key] = -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES
        now += live[key]
        if now > peak:
            peak, peak_index, at_phase = now, index, phase
    return Replay(peak, peak, peak_index, at_phase)
