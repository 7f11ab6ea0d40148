"""The detector of creep: a reading in at each step, a finding out when memory keeps growing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from oomguard.errors import ConfigurationError
from oomguard.watch.creep import Creep
from oomguard.watch.phases import Phases
from oomguard.watch.readings import CHUNK, RECENT_STEPS, Readings
from oomguard.watch.spans import BLOCKS, Growth, Pace, hinge, judge, pace, without_batches
from oomguard.watch.standing import SHORTEST_FOLLOWED, Standing, full_range

if TYPE_CHECKING:
    from oomguard.watch.phases import Jump
    from oomguard.watch.robust import Floats

__all__ = ["Creep", "CreepDetector"]

PROFILER = "profiler"
SPANS = (64, 128, 256, 512, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 6144, 8192, 16384, 32768)
# Most of what rises for a hundred steps stops. Growth over a span is said at once if that is LONG
# or the growth of so many more such spans fills the card; if it is seen again half a span later and
# the card is full SOON or the span is LASTING.
LONG = 1024
LASTING = 512
PRESSING = 2
SOON = 8
SOONEST_HELD = 128
HOLD = 0.625
SETTLED = 4  # means that tell a floor
MEMORY = 8  # spans before a short one that are searched for earlier heights
NEW_HIGH = 0.25  # of the rise must lie above them
SLOWING = 1.4  # times as fast in the span before: what dies away
LARGEST = 2.0**70  # what is above is no reading


def _number(value: float | None) -> float | None:
    """A reading as a float; `None` if it is none."""
    try:
        number = float(value)  # type: ignore[arg-type]
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
        self._chunks = 0
        self._allocated = 0.0
        self._accounted = 0.0
        self._tokens = 0.0
        self._held: dict[int, tuple[int, int]] = {}
        self._standing: Standing | None = None
        self._fallen = 0.0  # the most that grew, was reported, and fell back

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
        if self._step <= self._warmup_steps or event == PROFILER:
            return None
        unaccounted = allocated - self._accounted
        closed = self._phases.add(self._step, event, unaccounted)
        if self._readings.add(self._step, unaccounted, self._tokens, headroom):
            self._chunks += 1
            return self._follow(self._standing) if self._standing else self._look()
        if closed is not None and self._standing is None:
            jumps = self._phases.staircase(closed, self._at_least())
            return self._report_jumps(closed, jumps) if jumps else None
        return None

    def _at_least(self) -> float:
        """The least growth that matters, bytes."""
        there = self._allocated + max(self._readings.headroom or 0.0, 0.0)
        return max(min(self._min_bytes, there / 64), 1.0)

    def _look(self) -> Creep | None:
        """Judge the spans that are due, shortest first."""
        for span in SPANS:
            if self._chunks * CHUNK < span:
                break
            if self._chunks % max(span // (8 * CHUNK), 1):
                continue
            growth = self._judge(span)
            if growth is None or not self._is_new_high(growth) or self._slows(growth):
                continue
            if self._is_due(growth):
                return self._report(growth)
        return None

    def _judge(self, span: int) -> Growth | None:
        _, values, batches = self._view(span)
        return judge(values, batches, span, self._at_least())

    def _view(self, span: int) -> tuple[Floats, Floats, Floats]:
        """Steps, values and what is known of the batches, over the last `span` readings."""
        known = self._readings.known
        if span <= RECENT_STEPS:
            table = self._readings.recent.last(span)
            return table[0], table[1], np.stack([table[2] ** 2, *table[2:]])[:known]
        table = self._readings.means.last(span // CHUNK)
        return table[0], table[1], table[2 : 2 + known]

    def _is_new_high(self, growth: Growth) -> bool:
        """Whether a short rise leads above what there was before it; another tooth does not."""
        chunks = growth.steps // CHUNK
        earlier = min(len(self._readings.means) - chunks, MEMORY * chunks)
        if growth.steps >= LONG or earlier < 1:
            return True
        if growth.gained < 2 * self._fallen:
            return False
        means = self._readings.means.last(chunks + earlier)[1]
        high = float(np.partition(means[:earlier], (nth := earlier * 9 // 10))[nth])
        return float(means[-max(chunks // 4, 1) :].mean()) >= high + NEW_HIGH * growth.gained

    def _slows(self, growth: Growth) -> bool:
        """Whether memory grew faster in the span before: a cache that fills, not a leak."""
        before = min(self._chunks * CHUNK - growth.steps, growth.steps) // (BLOCKS * CHUNK)
        if before < 1:
            return False
        steps = before * BLOCKS * CHUNK
        both = (growth.steps + steps) // CHUNK
        table = self._readings.means.last(both)[:, : steps // CHUNK]
        return (
            pace(table[1], table[2 : 2 + self._readings.known], steps).per_step
            > SLOWING * growth.pace.per_step
        )

    def _is_due(self, growth: Growth) -> bool:
        """Whether growth over so short a span must be said now, or may wait for a longer one."""
        span, room = growth.steps, self._readings.headroom
        if span >= LONG or (room is not None and room <= PRESSING * growth.gained):
            return True
        first, last = self._held.get(span, (self._step, self._step))
        if self._step - last > span // 4:
            first = self._step
        self._held[span] = first, self._step
        if span < SOONEST_HELD or self._step - first < int(span * HOLD):
            return False
        return span >= LASTING or room is None or room <= SOON * growth.gained

    def _report(self, growth: Growth) -> Creep:
        """A finding of growth that passed."""
        longest = max(span for span in SPANS if span <= self._chunks * CHUNK)
        steps, values, batches = self._view(longest)
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
            creep, span=followed, base=self._base(since), seen=self._step, grown=gained
        )
        return creep

    def _follow(self, standing: Standing) -> Creep | None:
        """Look again at a finding that stands, twice in its span; for a fall, at each mean."""
        recent = self._readings.means.last(min(len(self._readings.means), SETTLED))[1]
        creep = standing.fell(self._step, float(recent.max()))
        if creep is None and self._step - standing.seen >= standing.span // 2:
            if self._chunks * CHUNK < standing.span:
                return None
            _, values, batches = self._view(standing.span)
            now = pace(values, batches, standing.span)
            creep = standing.look(self._step, now, self._readings.headroom)
        if creep is not None and creep.withdrawn:
            if creep.bytes_so_far < standing.creep.bytes_so_far:
                self._fallen = max(self._fallen, float(standing.creep.bytes_so_far))
            self._standing = None
            self._held.clear()
            self._chunks = 0
        return creep

    def _base(self, since: int) -> float:
        """The lowest mean around a step."""
        table = self._readings.means.last(len(self._readings.means))
        at = min(int(np.searchsorted(table[0], since)), table.shape[1] - 1)
        return float(table[1, max(at - 1, 0) : at + SETTLED].min())
