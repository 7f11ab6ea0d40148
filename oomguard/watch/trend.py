"""The detector of creep: one reading a step in, a finding out when memory grows for no good reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from oomguard.watch.creep import Creep
from oomguard.watch.window import CHUNK, RECENT_STEPS, Readings
from oomguard.watch.spans import Growth, Tests, judge

if TYPE_CHECKING:
    from oomguard.watch.robust import Floats

__all__ = ["Creep", "CreepDetector"]

TRAIN = "train"
PROFILER = "profiler"
SPANS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class CreepDetector:
    """Finds memory that keeps growing, in O(1) time a step and bounded memory.

    Give it every step. The bytes are best read where nothing of the step is alive any more, which
    is `torch.cuda.memory_allocated()` in `on_step_end`: reserved memory and the device's own count
    rise for reasons that are no leak.

    Events say what ran since the last update: `None` or `"train"` for a training step and nothing
    else; `"eval"`, `"save"`, `"recovery"`, `"epoch"` or any other word for a phase of which each
    occurrence may leave memory behind, several joined by `"+"`; `"profiler"` while one records,
    which makes the reading count for nothing.

    Attributes:
        active: The finding that stands, as it was last reported; `None` if there is none.
    """

    def __init__(self, *, min_bytes: int = 16 * 2**20, warmup_steps: int = 32) -> None:
        """Start watching.

        Args:
            min_bytes: Growth below this is never reported. On small devices it is a 64th of what is
                allocated and free, if that is less.
            warmup_steps: Readings not looked at: optimizer state, workspaces, autotuning.
        """
        self.active: Creep | None = None
        self._min_bytes = min_bytes
        self._warmup_steps = warmup_steps
        self._readings = Readings()
        self._step = 0
        self._chunks = 0
        self._accounted = 0.0
        self._tokens = 0.0
        self._headroom: float | None = None
        self._tests = Tests()
        self._held: dict[int, tuple[int, int]] = {}

    def update(
        self,
        allocated_bytes: int,
        *,
        accounted_bytes: int | None = None,
        batch_tokens: int | None = None,
        event: str | None = None,
        headroom_bytes: int | None = None,
    ) -> Creep | None:
        """Take the reading of one step.

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
        if accounted_bytes is not None:
            self._accounted = accounted_bytes
        if batch_tokens is not None:
            self._tokens = batch_tokens
        self._headroom = headroom_bytes
        if self._step <= self._warmup_steps or event == PROFILER:
            return None
        if self._readings.add(self._step, allocated_bytes - self._accounted, self._tokens):
            self._chunks += 1
            return self._look()
        return None

    def _look(self) -> Creep | None:
        """Judge the spans that are due, shortest first."""
        for span in SPANS:
            if self._chunks * CHUNK < span:
                break
            if self._chunks % (span // (8 * CHUNK)):
                continue
            growth = self._judge(span)
            if growth is not None and self._is_due(growth):
                return self._report(growth)
        return None

    def _judge(self, span: int) -> Growth | None:
        values, batches = self._view(span)
        return judge(values, batches, span, self._min_bytes, self._tests)

    def _view(self, span: int) -> tuple[Floats, Floats]:
        """Values and what is known of the batches, over the last `span` readings."""
        if span <= RECENT_STEPS:
            table = self._readings.recent.last(span)
            return table[1], np.stack([table[2], table[2] ** 2, table[3]])
        table = self._readings.means.last(span // CHUNK)
        return table[1], table[[2, 4, 3]]

    def _is_due(self, growth: Growth) -> bool:
        """Whether growth over so short a span must be said now, or may wait for a longer one."""
        span = growth.steps
        headroom = self._headroom
        if headroom is not None and headroom > 16 * growth.per_step * span and span < 1024:
            return False
        if span > 256 or (headroom is not None and headroom <= growth.gained):
            return True
        first, last = self._held.get(span, (self._step, self._step))
        if self._step - last > span // 4:
            first = self._step
        self._held[span] = first, self._step
        return self._step - first >= span // 2

    def _report(self, growth: Growth) -> Creep | None:
        steps = growth.steps
        if self.active is not None:
            return None
        full = None
        if self._headroom is not None:
            room = max(self._headroom, 0)
            full = (
                self._step + int(room / max(growth.high, 1e-9)),
                self._step + int(room / max(growth.low, 1e-9)),
            )
        self.active = Creep(
            bytes_per_step=growth.per_step,
            steps=steps,
            bytes_so_far=int(growth.gained),
            phase=TRAIN,
            full_at_step=full,
            confidence=1 - 1 / growth.clarity,
            since_step=self._step - steps,
        )
        return self.active
