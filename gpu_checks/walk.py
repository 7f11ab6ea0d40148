"""Down a ladder one rung at a time, with measurements on each."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from gpu_checks.trial import Meter
from oomguard.levers.live import Levers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpu_checks.card import Session
    from gpu_checks.workload import CheckedTrainer
    from oomguard import Plan

_BELOW = 0.995  # of a plan's peak: too little for it, if only just
_FURTHER = 0.98


@dataclass
class Level:
    """What was measured under one plan.

    Attributes:
        apply_s: How long the trainer took to obey it; `None` for the plan it had from the start.
        step_s: Seconds of each step; the first counts from where the plan came into force.
        peaks: Most bytes allocated and reserved in each step.
    """

    apply_s: float | None = None
    step_s: list[float] = field(default_factory=list)
    peaks: list[tuple[int, int | None]] = field(default_factory=list)

    @property
    def peak_allocated_bytes(self) -> int | None:
        """The most in any step; `None` if no step was made."""
        return max((allocated for allocated, _ in self.peaks), default=None)

    @property
    def peak_reserved_bytes(self) -> int | None:
        """The same of what PyTorch held; `None` without a device too."""
        return max((held for _, held in self.peaks if held is not None), default=None)


class Walk(TrainerCallback):
    """Takes away what a plan needs as soon as it is measured, and gives all back to the next one.

    The limit comes down to just below the peak of the plan, so that the next step runs out of
    memory. It is lifted when a rung has been taken: the rest of that step, which begins anew, is
    the first measurement of the new plan.

    Attributes:
        levels: The plans in their order.
        outside_bytes: The most that was in use outside of PyTorch at the end of a step.
    """

    def __init__(
        self,
        trainer: CheckedTrainer,
        session: Session,
        *,
        enough_s: float = 0.0,
        rungs: int | None = None,
    ) -> None:
        """Start from the trainer's own plan.

        Args:
            trainer: Has a `Meter` among its callbacks.
            session: The card.
            enough_s: A plan is left once its steps have taken that long; one step at least.
            rungs: How many are to be taken; all there are if `None`.
        """
        callbacks: list[Any] = trainer.callback_handler.callbacks
        self._meter = next(callback for callback in callbacks if isinstance(callback, Meter))
        self._session = session
        self._enough_s = enough_s
        self._rungs = rungs
        self._limit_bytes: int | None = None
        self._began = 0.0
        self.levels = [Level()]
        self.outside_bytes: int | None = None
        trainer.add_callback(self)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """What building the model took does not count."""
        self._start()

    def _start(self) -> None:
        self._session.limit(None)
        self._limit_bytes = None
        self._session.peaks()
        self._began = time.perf_counter()

    def taken(self, apply_s: float) -> None:
        """A rung has been taken."""
        self._session.synchronize()
        self.levels.append(Level(apply_s))
        self._start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Measure the plan, or lower the limit; the meter has waited for the device."""
        level, now = self.levels[-1], time.perf_counter()
        outside_bytes = self._session.outside_bytes
        if outside_bytes is not None:
            self.outside_bytes = max(outside_bytes, self.outside_bytes or 0)
        if self._limit_bytes is not None:
            self._lower(int(self._limit_bytes * _FURTHER))
        else:
            level.step_s.append(now - self._began)
            level.peaks.append(self._meter.peaks[-1])
            # The first step of all ends before there is an optimizer's state.
            least = 2 if level.apply_s is None else 1
            left = self._rungs is None or len(self.levels) <= self._rungs
            if left and len(level.step_s) >= least and sum(level.step_s) >= self._enough_s:
                self._lower(int(max(peak for peak, _ in level.peaks) * _BELOW))
        self._began = time.perf_counter()

    def _lower(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._session.collect()
        self._session.limit(limit_bytes)


@contextmanager
def watching(taken: Callable[[float], None], synchronize: Callable[[], None]) -> Iterator[None]:
    """Tell `taken` whenever a trainer has been made to obey a plan, and how long that took."""
    apply = Levers.apply

    def timed(levers: Levers, before: Plan, after: Plan) -> None:
        synchronize()
        began = time.perf_counter()
        apply(levers, before, after)
        synchronize()
        taken(time.perf_counter() - began)

    Levers.apply = timed  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Levers.apply = apply  # type: ignore[method-assign]
