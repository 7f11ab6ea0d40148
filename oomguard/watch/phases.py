"""In which phase the floor rises: in the training steps, or each time that something else runs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from oomguard.watch.robust import Floats

TRAIN = "train"
EPOCH = "epoch"  # marks a time, at which other things run
KEPT_EVENTS = 256
MOST_PHASES = 16
NEIGHBOURS = 8  # readings before and after an event whose lowest is the floor
CONFIRMED = 5  # events in a row that each leave something
FEWEST = 3  # events that a rise may be put down to
GAP = 3  # steps between events below which steps and events look alike


@dataclass(frozen=True, kw_only=True)
class Jump:
    """The floor before and after one event."""

    step: int
    before: float
    after: float


@dataclass
class _Phase:
    steps: deque[int]
    jumps: deque[Jump]
    before: float | None = None
    began: int = 0


class Phases:
    """When what ran, and what each occurrence left behind."""

    def __init__(self) -> None:
        """Start with no events."""
        self._phases: dict[str, _Phase] = {}
        self._last: deque[float] = deque(maxlen=NEIGHBOURS)
        self._open: dict[str, _Phase] = {}
        self._splits: dict[str, tuple[str, ...]] = {}

    def names(self, event: str | None) -> tuple[str, ...]:
        """The phases that an event joins with `"+"`, without the training step itself."""
        if not isinstance(event, str):
            return ()
        if event not in self._splits:
            if len(self._splits) >= MOST_PHASES**2:
                return ()
            names = {name.strip() for name in event.split("+")} - {"", TRAIN}
            self._splits[event] = tuple(sorted(names))
        return self._splits[event]

    def add(self, step: int, ran: tuple[str, ...], unaccounted: float) -> str | None:
        """Take one reading, and the names of what ran before it.

        Returns:
            The phase whose floor after an event became known with it, if any.
        """
        for name in ran:
            self._begin(name, step)
        self._last.append(unaccounted)
        closed = None
        if self._open:
            # What the event's own reading shows may have been read before the event.
            due = [name for name, phase in self._open.items() if step - phase.began >= NEIGHBOURS]
            for closed in due:
                self._close(closed)
        return closed

    def _begin(self, name: str, step: int) -> None:
        phase = self._phases.get(name)
        if phase is None:
            if len(self._phases) >= MOST_PHASES:
                return
            phase = _Phase(deque(maxlen=KEPT_EVENTS), deque(maxlen=CONFIRMED + 1))
            self._phases[name] = phase
        phase.steps.append(step)
        if name not in self._open and len(self._last) == NEIGHBOURS:
            phase.before, phase.began = min(self._last), step
            self._open[name] = phase

    def _close(self, name: str) -> None:
        phase = self._open.pop(name)
        if phase.before is not None:
            after = min(self._last)
            phase.jumps.append(Jump(step=phase.began, before=phase.before, after=after))

    def staircase(self, name: str, at_least: float) -> tuple[str, tuple[Jump, ...]] | None:
        """The last events of a phase, if each left much the same and nothing grew between them.

        Returns:
            The phase, with those that always run at the same steps, and the events.
        """
        jumps = tuple(self._phases[name].jumps)[1:]
        if len(jumps) < CONFIRMED:
            return None
        left = np.array([jump.after - jump.before for jump in jumps])
        typical = float(np.median(left))
        between = np.array([later.before - earlier.after for earlier, later in pairwise(jumps)])
        if typical * CONFIRMED < at_least or left.min() < 0.4 * typical:
            return None
        if left.max() > 4 * typical or float(np.abs(between).max()) > 0.3 * typical:
            return None
        return self._together(name, jumps[0].step), jumps

    def of_rise(self, steps: Floats, values: Floats) -> str:
        """The phase that a rise is put down to.

        The rise is fitted as so much a step, so much an event, and so much half-way between events,
        which takes what only bends. A phase is named when its events explain more of the rise than
        the rest does; phases that always ran together are named together.

        Args:
            steps: At which step each value was read, (n,).
            values: Bytes that the batches do not explain, (n,).
        """
        best, smallest = TRAIN, np.inf
        time = (steps - steps[0]) / (steps[-1] - steps[0])
        for names, ran in self._groups(int(steps[0])).items():
            if len(ran) < FEWEST or (steps[-1] - steps[0]) / len(ran) < GAP:
                continue
            half = (ran[-1] - ran[0]) / (len(ran) - 1) / 2
            count, shifted = (np.searchsorted(at, steps, side="right") for at in (ran, ran + half))
            design = np.stack([np.ones_like(time), time, count, shifted], 1)
            weights, *_ = np.linalg.lstsq(design, values, rcond=None)
            error = values - design @ weights
            by_time = max(float(weights[1]), 0.0) + abs(float(weights[3])) * np.ptp(shifted)
            by_events = float(weights[2]) * np.ptp(count)
            squares = float(error @ error)
            if by_events > by_time and squares < smallest:
                best, smallest = names, squares
        return best

    def _groups(self, since: int) -> dict[str, Floats]:
        """Steps of events from a step on, by the phases that ran at exactly these."""
        return {
            self._together(name, since): np.array(self._since(name, since), np.float64)
            for name in self._phases
        }

    def _since(self, name: str, since: int) -> list[int]:
        return [step for step in self._phases[name].steps if step >= since]

    def _together(self, name: str, since: int) -> str:
        """The names of all phases that ran when this one did."""
        ran = self._since(name, since)
        names = [other for other in self._phases if self._since(other, since) == ran]
        return "+".join(sorted(set(names) - {EPOCH} or names))
