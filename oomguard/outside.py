"""Out of memory outside of an optimizer step: in evaluation, prediction, saving and loading.

None of it shrinks the training: what helps is released memory, the host's memory, and smaller
batches of the evaluation's own.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from oomguard import oom
from oomguard.errors import LadderExhaustedError
from oomguard.levers.batch import Shape, measure
from oomguard.memory import device
from oomguard.retry import FORGIVEN, AllocationRetry, again, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oomguard.descent import Descent
    from oomguard.event import OOMEvent

T = TypeVar("T")

_ADVICE = {
    "evaluate": (
        "lower per_device_eval_batch_size (now {args.per_device_eval_batch_size});",
        "set eval_accumulation_steps=1 (now {args.eval_accumulation_steps});",
        "let preprocess_logits_for_metrics keep less than all logits;",
    ),
    "save": ("set save_only_model=True (now {args.save_only_model});",),
    "load": ("free what else this process holds on the device before train();",),
}
_ADVICE["predict"] = _ADVICE["evaluate"]


class Outside:
    """What recoveries outside of a step have in common: where they are, room, record, giving up.

    Attributes:
        phase: As in `OOMEvent.phase`; `None` where none of these is under way.
    """

    def __init__(self, trainer: Any, descent: Descent) -> None:
        """Take the trainer, and what recoveries are recorded with."""
        self.phase: str | None = None
        self._trainer = trainer
        self._descent = descent
        self._last: OOMEvent | None = None

    @contextmanager
    def watch(self, phase: str, *, spill: bool = False) -> Iterator[AllocationRetry | None]:
        """A context in which single operations that run out of memory are repeated.

        Args:
            phase: As in `OOMEvent.phase`.
            spill: As in `AllocationRetry`.
        """
        outer, self.phase = self.phase, phase
        try:
            if watched():  # by an outer one, which would be asked first anyway
                yield None
                return
            self._last = None
            with AllocationRetry(self.make_room, spill=spill) as retry:
                yield retry
            if retry.spilled and self._last is not None:
                self._descent.record(self._last, None, 0.0, "results moved to the CPU")
        finally:
            self.phase = outer

    def protect(self, phase: str, action: Callable[[], T], *, spill: bool = False) -> T:
        """`action()`, which may be repeated, and whose operations are."""
        with self.watch(phase, spill=spill):
            return again(self.make_room, action)

    def make_room(self, facts: oom.OOMFacts, failures: int) -> None:
        """Release what can be.

        Raises:
            LadderExhaustedError: That was not enough, again and again.
        """
        if failures > FORGIVEN:
            raise self.spent(facts, f"tried {failures} times")
        began = time.perf_counter()
        device.release_cached()
        self.record(facts, began)

    def record(
        self, facts: oom.OOMFacts, began: float, change: str | None = None, batch: Any = None
    ) -> None:
        """Add a recovery to the report.

        Args:
            facts: The failure.
            began: `time.perf_counter()` when the work began that is lost.
            change: What was changed; `None` where another try was enough.
            batch: The batch or pass that failed.
        """
        shape: Shape | None = measure(batch)
        self._last = oom.event_of(
            facts,
            phase=self.phase or "bookkeeping",
            step=self._trainer.state.global_step,
            rows=None if shape is None else shape.units,
            width=None if shape is None else shape.width,
            tokens=None if shape is None else shape.tokens,
        )
        self._descent.record(self._last, None, time.perf_counter() - began, change)

    def spent(self, facts: oom.OOMFacts, tried: str) -> LadderExhaustedError:
        """The error that ends it, with what the user can change."""
        texts = [*_ADVICE.get(self.phase or "", ()), "use a larger card."]
        advice = " ".join(
            f"({chr(97 + index)}) {text.format(args=self._trainer.args)}"
            for index, text in enumerate(texts)
        )
        return LadderExhaustedError(
            f"Out of memory in {self.phase} after optimizer step {self._trainer.state.global_step}"
            f"{oom.sizes(facts)}; {tried}. Weights and optimizer are those after that step. "
            f"What to change: {advice} The error was: {facts.message}"
        )
