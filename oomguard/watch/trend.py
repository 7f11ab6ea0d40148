"""The detector of creep: a reading in at each step, a finding out when memory keeps growing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from oomguard.watch.creep import Creep
from oomguard.watch.doubt import LONG, Doubt
from oomguard.watch.phases import Phases
from oomguard.watch.spans import Growth, Pace, hinge, judge, pace, rises, without_batches
from oomguard.watch.standing import LATE, SHORTEST_FOLLOWED, Standing, full_range
from oomguard.watch.window import CHUNK, Readings

if TYPE_CHECKING:
    from oomguard.watch.phases import Jump

__all__ = ["Creep", "CreepDetector"]

PROFILER = "profiler"
SPANS = (64, 128, 256, 512, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 6144, 8192, 16384, 32768)
SETTLED = 4  # means that tell a floor
LONG_AT_LEAST = 2  # times the least growth, where a thousand steps and more had time for it
LARGEST = 2.0**70  # what is above is no reading


def _number(value: float | None) -> float | None:
    """A reading as a float; `None` if it is none."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if -LARGEST < number < LARGEST else None


class CreepDetector:
    """Finds memory that keeps growing, in O(1) time a step and bounded memory.

    Give it every step. The bytes are best read where nothing of the step is alive any more, which
    is `torch.cuda.memory_allocated()` in `on_step_end`: reserved memory and the device's own count
    rise for reasons that are no leak.

    Events say what ran since the last update: `None` or `"train"` for a training step and nothing
    else; `"eval"`, `"save"`, `"recovery"`, `"epoch"` or any other word for a phase of which each
    occurrence may leave memory behind, several joined by `"+"`; `"profiler"` while one records,
    which makes the reading count for nothing.

    One finding stands at a time. It is taken back when growth stops, and what is watched then
    begins anew.
    """

    def __init__(self, *, min_bytes: int = 16 * 2**20, warmup_steps: int = 32) -> None:
        """Start watching.

        Args:
            min_bytes: Growth below this is never reported. On small devices it is a 64th of what is
                allocated and free, if that is less.
            warmup_steps: Readings not looked at: optimizer state, workspaces, autotuning.

        Raises:
            ConfigurationError: `min_bytes` is below 1 or `warmup_steps` below 0.
        """
        if min_bytes < 1 or warmup_steps < 0:
            # Imports torch, which the detector does without.
            from oomguard.errors import ConfigurationError

            msg = (
                f"min_bytes={min_bytes} and warmup_steps={warmup_steps}: growth of nothing is "
                "none, and no fewer than 0 steps can be left out. Give min_bytes=1 or more and "
                "warmup_steps=0 or more."
            )
            raise ConfigurationError(msg)
        self._min_bytes = min_bytes
        self._warmup_steps = warmup_steps
        self._readings = Readings()
        self._phases = Phases()
        self._step = 0
        self._doubt = Doubt(self._readings)
        self._looks = 0
        self._allocated = 0.0
        self._accounted = 0.0
        self._tokens = 0.0
        self._standing: Standing | None = None

    @property
    def active(self) -> Creep | None:
        """The finding that stands, as it was last reported; `None` if there is none."""
        return self._standing.creep if self._standing else None

    def update(
        self,
        allocated_bytes: int,
        *,
        accounted_bytes: int | None = None,
        batch_tokens: int | None = None,
        event: str | None = None,
        headroom_bytes: int | None = None,
    ) -> Creep | None:
        """Take the reading of one step. Raises nothing, whatever the reading.

        Args:
            allocated_bytes: Live bytes at the end of the step.
            accounted_bytes: How many of them are parameters, gradients, buffers and optimizer
                state; `None` if not counted at this step, the last count then stands.
            batch_tokens: Padded tokens of the step's batch.
            event: What else ran since the last update, see the class.
            headroom_bytes: What is free on the card at the step's peak.

        Returns:
            A finding that is new, has grown by half since it was reported, or is taken back
            (`withdrawn`); `None` if there is nothing new to say.
        """
        self._step += 1
        allocated = _number(allocated_bytes)
        if allocated is None:
            return None
        accounted = _number(accounted_bytes)
        if accounted is not None:
            self._accounted = accounted
        tokens = _number(batch_tokens)
        if tokens is not None:
            self._tokens = tokens
        headroom = _number(headroom_bytes)
        self._allocated = allocated
        names = self._phases.names(event)
        if self._step <= self._warmup_steps or PROFILER in names:
            return None
        unaccounted = allocated - self._accounted
        closed = self._phases.add(self._step, names, unaccounted)
        if self._readings.add(self._step, unaccounted, self._tokens, headroom):
            self._looks += 1
            return self._follow(self._standing) if self._standing else self._look()
        if closed is not None and self._standing is None:
            staircase = self._phases.staircase(closed, self._at_least())
            return self._report_jumps(*staircase) if staircase else None
        return None

    def _at_least(self) -> float:
        """The least growth that matters, bytes."""
        there = self._allocated + max(self._readings.headroom or 0.0, 0.0)
        return max(min(self._min_bytes, there / 64), 1.0)

    def _look(self) -> Creep | None:
        """Judge the spans that are due, shortest first."""
        available, least = self._readings.available, self._at_least()
        for span in SPANS:
            if available < span:
                break
            if self._looks % max(span // (8 * CHUNK), 1):
                continue
            at_least = least * (LONG_AT_LEAST if span >= LONG else 1)
            if not rises(self._readings.values(span), at_least):
                continue
            _, values, batches = self._readings.view(span)
            growth = judge(values, batches, span, at_least)
            if growth is not None and not self._doubt.holds_back(growth, self._step):
                return self._report(growth)
        return None

    def _report(self, growth: Growth) -> Creep:
        """A finding of growth that passed."""
        steps, values, batches = self._readings.view(self._readings.available)
        values, _ = without_batches(values, batches)
        start, gained = hinge(values)
        since = min(int(steps[start]), self._step - growth.steps // 2)
        return self._found(
            growth.pace,
            since=since,
            gained=max(gained, growth.gained),
            phase=self._phases.of_rise(steps[start:], values[start:]),
            clarity=growth.clarity,
            span=growth.steps,
        )

    def _report_jumps(self, phase: str, jumps: tuple[Jump, ...]) -> Creep:
        """A finding of events that each left something."""
        left = [jump.after - jump.before for jump in jumps]
        apart = (jumps[-1].step - jumps[0].step) / (len(jumps) - 1)
        return self._found(
            Pace(
                per_step=sum(left) / len(left) / apart,
                low=min(left) / apart,
                high=max(left) / apart,
            ),
            since=jumps[0].step,
            gained=jumps[-1].after - jumps[0].before,
            phase=phase,
            clarity=10.0,
            span=int(3 * apart),
        )

    def _found(
        self, pace: Pace, *, since: int, gained: float, phase: str, clarity: float, span: int
    ) -> Creep:
        creep = Creep(
            bytes_per_step=pace.per_step,
            steps=self._step - since,
            bytes_so_far=int(gained),
            phase=phase,
            full_at_step=full_range(self._step, self._readings.headroom, pace),
            confidence=1 - 1 / clarity,
            since_step=since,
        )
        followed = next((s for s in SPANS if s >= max(span, SHORTEST_FOLLOWED)), SPANS[-1])
        self._standing = Standing(
            creep,
            span=followed,
            base=self._base(since),
            seen=self._step,
            grown=gained,
            paced=gained,
        )
        return creep

    def _follow(self, standing: Standing) -> Creep | None:
        """Look again at a finding that stands, twice in its span; for a fall, at each mean."""
        recent = self._readings.means.last(min(len(self._readings.means), SETTLED))[1]
        creep = standing.fell(self._step, float(recent.max()))
        if creep is None and self._step - standing.seen >= standing.span // 2:
            if self._readings.available < standing.span:
                return None
            _, values, batches = self._readings.view(standing.span)
            now = pace(values, batches, standing.span)
            late = max(int(standing.span * LATE) // CHUNK, SETTLED)
            lowest = float(self._readings.means.last(late)[1].min())
            creep = standing.look(self._step, now, lowest, self._readings.headroom)
        if creep is not None and creep.withdrawn:
            if creep.bytes_so_far < standing.creep.bytes_so_far:
                fallen = float(standing.creep.bytes_so_far)
                self._doubt.fallen = max(self._doubt.fallen, fallen)
            self._standing = None
            self._doubt.forget()
            self._readings.begin_anew()
        return creep

    def _base(self, since: int) -> float:
        """The lowest mean around a step."""
        table = self._readings.means.last(len(self._readings.means))
        at = min(int(np.searchsorted(table[0], since)), table.shape[1] - 1)
        return float(table[1, max(at - 1, 0) : at + SETTLED].min())
