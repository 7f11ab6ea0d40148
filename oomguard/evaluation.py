"""Evaluation and prediction that run out of memory: smaller batches, outputs moved to the host."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

from oomguard import oom, rng
from oomguard.event import half_of
from oomguard.levers import loss, metrics, outputs
from oomguard.levers.batch import CannotActError, measure
from oomguard.levers.merged_metrics import merged
from oomguard.levers.micro_batch import split
from oomguard.memory import device
from oomguard.retry import FORGIVEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from oomguard.levers.loss import SplitLoss
    from oomguard.outside import Outside
    from oomguard.retry import AllocationRetry

    RunStep = Callable[[Any], tuple[Any, ...]]  # the trainer's own: loss, logits, labels

logger = logging.getLogger("oomguard")


class Evaluation:
    """Runs a batch that does not fit in passes, and keeps to their size for later batches.

    Between two batches single operations are repeated; when one fails again its result goes to the
    host, and what is gathered from there on with it.
    """

    def __init__(self, trainer: Any, outside: Outside) -> None:
        """Start with whole batches."""
        self._trainer = trainer
        self._outside = outside
        self._inside = False
        self._watch: AllocationRetry | None = None
        self._form: SplitLoss | None = None
        self._limit: int | None = None  # padded tokens of a pass
        self._offload = False  # logits of finished passes wait on the host
        self._refusal: str | None = loss.refusal(trainer)

    def loop(self, phase: str, run: Callable[[], Any]) -> Any:
        """`run()`, an evaluation loop.

        Args:
            phase: `"evaluate"` or `"predict"`.
            run: The trainer's own `evaluation_loop`.
        """
        if self._inside:  # metrics that predict by themselves
            return run()
        self._inside, self._form = True, None  # the form of the loss that this loop asks for
        try:
            with self._outside.watch(phase) as self._watch:
                return run()
        finally:
            self._inside, self._watch = False, None

    def step(self, run: RunStep, inputs: Any) -> tuple[Any, ...]:
        """Loss, logits and labels of one batch, as `run(inputs)` would give them."""
        if not self._inside:  # called by hand
            return cast("tuple[Any, ...]", self.loop("predict", lambda: self.step(run, inputs)))
        if self._watch is not None:
            self._watch.spill = True  # what is made from here on is temporary; the model is placed
        tries = 0
        while True:
            undo, began = self._mark(inputs), time.perf_counter()
            done: list[tuple[Any, ...]] = []
            try:
                return self._run(run, inputs, done)
            except CannotActError as error:
                self._refusal = str(error)
                facts = None
            except (RuntimeError, MemoryError) as error:
                facts = oom.caught(error)
            made, held = len(done), any(logits is not None for _, logits, _ in done)
            done.clear()
            undo()
            if facts is None:  # to be run as it is
                continue
            device.release_cached()
            failed, change = self._give_way(inputs, made, held)
            tries = 0 if change else tries + 1
            if tries > FORGIVEN:
                reason = f"the batch was not split: {self._refusal or 'it has a single row'}"
                raise self._outside.spent(facts, reason)
            self._outside.record(facts, began, change, failed)

    def _mark(self, inputs: Any) -> Callable[[], None]:
        """Remember what a step changes: metrics, random numbers, the batch it was given."""
        restore, state = metrics.mark(self._trainer), rng.snapshot()
        entries = dict(inputs) if hasattr(inputs, "update") else None

        def undo() -> None:
            restore()
            rng.restore(state)
            if entries is not None:
                inputs.clear()
                inputs.update(entries)

        return undo

    def _run(self, run: RunStep, inputs: Any, done: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        passes = self._passes(inputs)
        paused = nullcontext if self._watch is None else self._watch.paused
        if len(passes) == 1:
            with paused():
                return run(inputs)
        entries = metrics.PassEntries(self._trainer, "eval")
        for part in passes:
            with paused():
                own, *others = run(dict(part))
            entries.add(part)
            if self._offload and self._watch is not None:
                others = self._watch.to_host(others)
            done.append((own, *others))
        with paused():
            total = self._loss(run, [entry[0] for entry in done], passes, inputs)
        entries.replace(merged)
        fill = outputs.fill_token(self._trainer)
        _, *gathered = zip(*done, strict=True)
        joined = (outputs.join(parts, passes, fill) for parts in gathered)
        return (total, *joined)

    def _passes(self, inputs: Any) -> list[Any]:
        """The passes of a batch: itself where it fits the limit or cannot be cut."""
        if self._limit is None or self._refusal:
            return [inputs]
        shape = measure(inputs)
        if shape is None or shape.tokens <= self._limit:
            return [inputs]
        try:
            return split(inputs, self._limit)
        except CannotActError as error:
            logger.info("An evaluated batch was not split: %s", str(error))
        return [inputs]

    def _loss(self, run: RunStep, parts: list[Any], passes: list[Any], inputs: Any) -> Any:
        if parts[0] is None:
            return None
        if self._form is None:
            self._form = outputs.probe(self._trainer, lambda part: run(part)[0], inputs)
        return outputs.join_losses(parts, passes, self._form)

    def _give_way(self, inputs: Any, made: int, held: bool) -> tuple[Any, str | None]:
        """Ask for less memory the next time.

        Args:
            inputs: The batch.
            made: How many of its passes had been made.
            held: Whether their logits were held meanwhile.

        Returns:
            The pass that failed, and what was changed: `None` where nothing could be.
        """
        passes = self._passes(inputs)
        failed = passes[min(made, len(passes) - 1)]
        if held and not self._offload and self._watch is not None:
            self._offload = True
            return failed, "logits of passes moved to the CPU"
        shape = measure(failed)
        if self._refusal or shape is None or shape.units < 2:
            return failed, None
        try:
            split(failed, 1)
        except CannotActError as error:
            self._refusal = str(error)
            return failed, None
        half, limit, _ = half_of(shape.units, shape.width, shape.tokens)
        self._limit = min(limit, self._limit or limit)
        return failed, f"eval batch {shape.units} -> {half}"
