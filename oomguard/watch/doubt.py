"""Growth that was found, and the reasons to wait with it: most of what rises for a while stops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from oomguard.watch.spans import BLOCKS, pace
from oomguard.watch.window import CHUNK

if TYPE_CHECKING:
    from oomguard.watch.spans import Growth
    from oomguard.watch.window import Readings

# Set on made-up runs (benchmarks/creep.py).
LONG = 1024  # steps of growth that are said whatever is free
LASTING = 512  # steps of growth that are said once they were seen again some steps later
HELD = 0.625  # so much of the span later
CLEAR = 50.0  # standard deviations of a rise as straight as a line
HELD_CLEAR = 0.125  # how much later that must be seen again
PRESSING = 2  # spans like this one until the card is full: said at once
SOON = 16  # spans until the card is full: said once seen again
EARLY = 512  # steps of a run in which half of that holds: it may still be warming up
SHORTEST_HELD = 128
REMEMBERED = 8  # spans before a short one that are searched for earlier heights
NEW_HIGH = 0.25  # of the rise must lie above them
SLOWING = 1.4  # times as fast in the span before: growth that dies away


class Doubt:
    """What keeps growth over a span from being reported.

    Attributes:
        fallen: The most bytes of a finding that fell back: collected garbage rises that far again.
    """

    def __init__(self, readings: Readings) -> None:
        """Doubt growth in these readings."""
        self.fallen = 0.0
        self._readings = readings
        self._seen: dict[int, tuple[int, int]] = {}

    def forget(self) -> None:
        """Growth that was seen before counts no more."""
        self._seen.clear()

    def holds_back(self, growth: Growth, step: int) -> bool:
        """Whether there is reason to wait."""
        if self._is_another_tooth(growth) or self._slows(growth):
            return True
        return not self._is_due(growth, step)

    def _is_another_tooth(self, growth: Growth) -> bool:
        """Whether a short rise leads no higher than one before it did."""
        if growth.steps >= LONG:
            return False
        if growth.gained < 2 * self.fallen:
            return True
        chunks = growth.steps // CHUNK
        earlier = min(len(self._readings.means) - chunks, REMEMBERED * chunks)
        if earlier < 1:
            return False
        means = self._readings.means.last(chunks + earlier)[1]
        # Nine tenths: a spike is no height.
        nth = earlier * 9 // 10
        high = float(np.partition(means[:earlier], nth)[nth])
        now = float(means[-max(chunks // 4, 1) :].mean())
        return now < high + NEW_HIGH * growth.gained

    def _slows(self, growth: Growth) -> bool:
        """Whether memory grew faster in the span before, as while a cache fills."""
        before = min(self._readings.available - growth.steps, growth.steps) // (BLOCKS * CHUNK)
        if before < 1:
            return False
        steps = before * BLOCKS * CHUNK
        _, values, batches = self._readings.view(growth.steps + steps, means=True)
        earlier = pace(values[: steps // CHUNK], batches[:, : steps // CHUNK], steps)
        return earlier.per_step > SLOWING * growth.pace.per_step

    def _is_due(self, growth: Growth, step: int) -> bool:
        """Whether it lasts long enough for what is free."""
        span, room = growth.steps, self._readings.headroom
        if span >= LONG or (room is not None and room <= PRESSING * growth.gained):
            return True
        first, last = self._seen.get(span, (step, step))
        if step - last > span // 4:
            first = step
        self._seen[span] = first, step
        lasts = span >= LASTING
        held = HELD_CLEAR if lasts and growth.clarity >= CLEAR else HELD
        if span < SHORTEST_HELD or step - first < held * span:
            return False
        soon = SOON if step > EARLY else SOON / 2
        return lasts or room is None or room <= soon * growth.gained
