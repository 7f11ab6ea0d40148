"""What is done about one alarm: collect garbage, then take a census over the next steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oomguard.watch.census import Census
from oomguard.watch.cycles import Collected, collect
from oomguard.watch.stacks import growing_sites

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from oomguard.watch.creep import Creep
    from oomguard.watch.holding import Holding
    from oomguard.watch.stacks import Site

_APART_STEPS = 8
_URGENT_STEPS = 64
_CYCLES_SHARE = 0.25  # of what has grown: that much freed by a collection makes it one of cycles


@dataclass(frozen=True)
class Conclusion:
    """What an inquiry has found.

    Attributes:
        creep: The growth.
        collected: What a collection freed, where that is the cause.
        holdings: Who holds what stayed, the largest first.
        apart_steps: How many steps these are from; `None` where they are from as many events.
        stacks: Where it was allocated, if that was recorded.
    """

    creep: Creep
    collected: Collected | None = None
    holdings: tuple[Holding, ...] = ()
    apart_steps: int | None = None
    stacks: tuple[str, ...] = ()


class Inquiry:
    """Looks into one alarm, over a few steps or events.

    Args:
        creep: The alarm.
        step: When it was raised.
        device_type: Of the tensors in question.
        read_bytes: Reads what the alarm is about.
        record: Takes the sites of live allocations; `None` where they are not recorded.
    """

    def __init__(
        self,
        creep: Creep,
        step: int,
        device_type: str,
        read_bytes: Callable[[], int],
        record: Callable[[], Counter[Site]] | None,
    ) -> None:
        self.creep = creep
        self._census = Census(device_type)
        self._record = record
        before = read_bytes()
        collected = collect(device_type)
        freed = before - read_bytes()
        self._collected = collected if freed > _CYCLES_SHARE * creep.bytes_so_far else None
        full = creep.full_at_step
        self._apart = 1 if full is not None and full[0] - step < _URGENT_STEPS else _APART_STEPS
        self._by_event = creep.phase != "train"
        self._mark(step)
        self._sites = None if record is None else record()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self._collected is not None or self._census.is_complete

    def look(self, step: int, events: set[str]) -> None:
        """Go on at the end of a step.

        Args:
            step: The step.
            events: What else ran since the last one.
        """
        due = self.creep.phase in events if self._by_event else True
        if due and step >= self._due_step:
            self._mark(step)

    def conclude(self) -> Conclusion:
        """What is known by now; the training may be over."""
        holdings = tuple(self._census.holdings()) if self._census.is_complete else ()
        stacks: tuple[str, ...] = ()
        if self._record is not None and self._sites is not None:
            stacks = growing_sites(self._sites, self._record())
        apart = None if self._by_event else self._apart
        return Conclusion(self.creep, self._collected, holdings, apart, stacks)

    def _mark(self, step: int) -> None:
        self._census.mark()
        self._due_step = step + (1 if self._by_event else self._apart)
