"""A finding that was reported: does it go on, grow by half, or stop?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oomguard.watch.creep import Creep
    from oomguard.watch.spans import Pace

SHORTEST_FOLLOWED = 256
STOPPED = 0.2  # of the reported pace: less is no growth any more
GREW = 1.5
FELL = 0.3  # of the reported growth: what is left after a fall that takes the rest
LATE = 0.25  # of the span: the last readings, of which the lowest is the floor
CHECKS = 2  # looks in a row, half a span apart, that must find growth stopped


def full_range(step: int, headroom: float | None, pace: Pace) -> tuple[int, int] | None:
    """Between which steps growth at this pace uses the headroom up."""
    if headroom is None:
        return None
    room = max(headroom, 0.0)
    slow = max(min(pace.low, pace.per_step), pace.per_step / 4)
    return step + int(room / max(pace.high, pace.per_step)), step + int(room / slow)


@dataclass
class Standing:
    """One finding over time.

    Attributes:
        creep: As it was last reported.
        span: Over how many steps it is looked at.
        base: The floor when it began.
        seen: The step of the last look.
        grown: Bytes up to then.
        paced: The same, as the sum of the paces.
        idle: Looks in a row that found no growth.
    """

    creep: Creep
    span: int
    base: float
    seen: int
    grown: float
    paced: float
    idle: int = 0

    def fell(self, step: int, highest: float) -> Creep | None:
        """The finding withdrawn, if what had grown is gone, given the highest of late readings."""
        if highest - self.base >= FELL * self.creep.bytes_so_far:
            return None
        self.grown = max(highest - self.base, 0.0)
        return self._now(step, withdrawn=True)

    def look(self, step: int, pace: Pace, lowest: float, headroom: float | None) -> Creep | None:
        """What is new.

        Args:
            step: Now.
            pace: Of the last `span` steps, without what the batches explain.
            lowest: The lowest of the last readings, with what they explain.
            headroom: As for `full_range`.
        """
        self.idle = self.idle + 1 if pace.per_step < STOPPED * self.creep.bytes_per_step else 0
        self.paced += pace.per_step * (step - self.seen)
        # A pace over teeth adds up to more than is there, a level takes longer batches for growth.
        level = lowest - self.base + max(pace.per_step, 0.0) * self.span * LATE
        self.grown = max(min(self.paced, level), 0.0)
        self.seen = step
        if self.idle >= CHECKS:
            return self._now(step, withdrawn=True)
        if self.idle or self.grown < GREW * self.creep.bytes_so_far:
            return None
        self.creep = replace(
            self._now(step),
            bytes_per_step=pace.per_step,
            full_at_step=full_range(step, headroom, pace),
        )
        return self.creep

    def _now(self, step: int, *, withdrawn: bool = False) -> Creep:
        return replace(
            self.creep,
            steps=step - self.creep.since_step,
            bytes_so_far=int(self.grown),
            full_at_step=None,
            withdrawn=withdrawn,
        )
