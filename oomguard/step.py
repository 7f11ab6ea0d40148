"""The transaction of one optimizer step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from oomguard import oom, rng
from oomguard.feed import fetch
from oomguard.levers import metrics
from oomguard.levers.batch import CannotActError, Shape, measure, tokens_of
from oomguard.levers.live import Levers, Window
from oomguard.levers.merged_metrics import merged
from oomguard.levers.micro_batch import split
from oomguard.memory import device
from oomguard.retry import FORGIVEN, AllocationRetry, release_at_most
from oomguard.rung import Fidelity

if TYPE_CHECKING:
    from oomguard.descent import Descent, Taken
    from oomguard.event import OOMEvent

logger = logging.getLogger("oomguard")

RunBatch = Callable[[Any, Any], torch.Tensor]
"""The trainer's own `training_step` on one batch with `num_items_in_batch`; returns its loss."""
GetBatches = Callable[[Iterator[Any], int], tuple[list[Any], Any]]
"""The trainer's own `get_batch_samples`: from an iterator and a number of batches."""


class StepTransaction:
    """Redoes an optimizer step that ran out of memory, as if it had never been tried.

    Attributes:
        phase: Where the trainer is, as in `OOMEvent.phase`.
    """

    def __init__(self, trainer: Any, levers: Levers, descent: Descent) -> None:
        """Start with no step under way."""
        self.phase = "setup"
        self._trainer = trainer
        self._levers = levers
        self._descent = descent
        self._initial_length = descent.plan.max_length
        self._mentioned: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._window = Window([])
        self._weight: float | None = None
        self._pass: Any = None
        self._running = 0
        self._reported: list[torch.Tensor] = []
        # Before each batch; `None` where nothing has drawn since the batch before it: a replay then
        # lets the numbers flow on, since other passes may draw more or fewer of them.
        self._states: list[rng.RandomState | None] = []
        self._end: rng.RandomState | None = None
        self._restore_metrics: Callable[[], None] = lambda: None
        self._get: GetBatches | None = None
        self._counted: dict[str, list[Any]] = {}
        self._began = time.perf_counter()

    def begin(self, batches: Iterator[Any], count: int, get: GetBatches) -> tuple[list[Any], Any]:
        """Fetch the batches of the next optimizer step.

        Args:
            batches: The epoch's iterator, made safe by a `Feed`.
            count: How many batches the step takes.
            get: The trainer's own `get_batch_samples`.
        """
        self.phase = "fetch"
        with AllocationRetry(self.make_room):
            # Levers judge by the last window while this one is on its way.
            fetched, num_items = fetch(self.make_room, batches, lambda source: get(source, count))
            self._forget()
            self._window, self._get = Window(fetched, num_items), get
            self._levers.hold()
            self._cut_window()
        self.phase = "bookkeeping"
        return self._window.batches, self._window.num_items

    def _cut_window(self) -> None:
        """Obey `Plan.max_length`; truncation changes the number of targets, so count anew."""
        plan = self._descent.plan
        if plan.max_length == self._initial_length or self._get is None:
            return
        batches = self._window.batches
        try:
            cut = [self._levers.shorten(batch, plan) for batch in batches]
        except CannotActError as error:
            self._mention(f"max_length={plan.max_length} is not kept: {error}")
            return
        if any(new is not old for new, old in zip(cut, batches, strict=True)):
            # In place: the Trainer's loop goes on with this very list.
            batches[:] = cut
            _, self._window.num_items = self._get(iter(cut), len(cut))

    def run(self, run_batch: RunBatch) -> torch.Tensor:
        """Run the window's next batch; after an out-of-memory, replay the window up to it.

        Returns:
            The loss to report for this batch. The Trainer has added up the losses that earlier
            batches of the window had before a replay, so this one makes up for the difference.
        """
        index = len(self._reported)
        state = self._random_state()
        self._states.append(None if index > 0 and state == self._end else state)
        if index == 0:
            self._restore_metrics = metrics.mark(self._trainer)
            self._began = time.perf_counter()
        replay = False
        while True:
            try:
                loss = self._replay(index, run_batch) if replay else self._run(index, run_batch)
            except (RuntimeError, MemoryError) as error:
                facts = oom.caught(error)
            else:
                self._reported.append(loss)
                if index + 1 < len(self._window.batches):
                    self._end = self._random_state()
                return loss
            self._undo()
            self._descend(facts, index)
            replay = True

    def _random_state(self) -> rng.RandomState:
        with AllocationRetry(self.make_room):
            return rng.snapshot()

    def _rewind(self, index: int) -> None:
        state = self._states[index]
        if state is not None:
            rng.restore(state)

    def _undo(self) -> None:
        self._weight = None
        for parameter in self._trainer.model.parameters():
            parameter.grad = None
        self._restore_metrics()
        self._rewind(0)
        device.release_cached()

    def _descend(self, facts: oom.OOMFacts, index: int) -> None:
        event = self._event(facts, index)
        taken = self._take(event, index, required=True)
        with AllocationRetry(release_at_most(1)):
            self._cut_window()
        now = time.perf_counter()
        self._descent.record(event, taken, now - self._began)
        self._began = now

    def _take(self, event: OOMEvent, index: int, **how: Any) -> Taken | None:
        # What levers allocate themselves is small: the room that one more collection makes must do.
        with AllocationRetry(release_at_most(1)):
            return self._descent.take(event, self._window, index, **how)

    def _replay(self, index: int, run_batch: RunBatch) -> torch.Tensor:
        correction: torch.Tensor | None = None
        for earlier in range(index):
            self._rewind(earlier)
            new = self._run(earlier, run_batch)
            difference = new - self._reported[earlier]
            correction = difference if correction is None else correction + difference
        self._rewind(index)
        loss = self._run(index, run_batch)
        if correction is None or not bool(correction.isfinite().all()):
            return loss
        return loss + correction

    def _run(self, index: int, run_batch: RunBatch) -> torch.Tensor:
        """One batch, in as many passes as the plan asks for."""
        batch, num_items = self._window.batches[index], self._window.num_items
        self._pass, self._running = batch, index
        passes = self._passes(batch, num_items)
        if passes is None:
            return run_batch(batch, num_items)
        weights = self._levers.split_loss.weights(passes) if self._levers.split_loss else None
        entries = metrics.PassEntries(self._trainer)
        total: torch.Tensor | None = None
        for position, part in enumerate(passes):
            self._pass, self._weight = part, None if weights is None else weights[position]
            if self._weight == 0:  # no target: its mean is 0/0, its share nothing
                continue
            loss = run_batch(part, num_items)
            total = loss if total is None else total + loss
            entries.add(part)
        self._weight = None
        entries.replace(merged)
        assert total is not None  # noqa: S101 - a batch has at least one pass
        return total

    def _passes(self, batch: Any, num_items: Any) -> list[dict[str, Any]] | None:
        """The passes that the plan asks for, or `None` for the batch as it is."""
        limit = self._descent.plan.max_pass_tokens
        if limit is None or not isinstance(batch, Mapping) or tokens_of(batch) <= limit:
            return None
        reason = None
        try:
            passes = split(batch, limit, pairs=self._levers.pairs)
        except CannotActError as error:
            reason = str(error)
        else:
            if len(passes) == 1:
                return None
            if self._levers.split_loss is None:  # the plan came from a batch that needed no passes
                reason = self._levers.refuses_split(batch, num_items)
            if reason is None:
                return passes
        self._mention(f"max_pass_tokens={limit} is not kept: {reason}")
        return None

    def _mention(self, text: str) -> None:
        if text not in self._mentioned:
            logger.warning("%s", text)
        self._mentioned.add(text)

    def to_count(self, name: str, batch: Any) -> list[tuple[Any, int]]:
        """What to add to (1) and take from (-1) the count `name` now that a batch is done.

        A replay under a shorter `max_length` has also cut batches that were counted before.
        """
        counted, batches = self._counted.get(name, []), self._window.batches
        if len(counted) >= len(batches):
            return [(batch, 1)]
        changes = [(batches[len(counted)], 1)]
        for old, new in zip(counted, batches, strict=False):
            if old is not new:
                changes += [(old, -1), (new, 1)]
        self._counted[name] = batches[: len(counted) + 1]
        return changes

    def begun(self) -> list[Any]:
        """The window's batches that have been run, and the one that is next."""
        return self._window.batches[: len(self._reported) + 1]

    def weighted(self, loss: Any) -> Any:
        """A pass's loss, or `(loss, outputs)`, multiplied by its share of the batch."""
        if self._weight is None:
            return loss
        if isinstance(loss, tuple):
            return (loss[0] * self._weight, *loss[1:])
        return loss * self._weight

    def make_room(self, facts: oom.OOMFacts, failures: int) -> None:
        """Release what can be, take a rung, obey it at once.

        The first failures of an operation take exact rungs only, and none where none is left:
        another try may be enough.
        """
        began = time.perf_counter()
        device.release_cached()
        event = self._event(facts, max(0, len(self._reported) - 1))
        taken = self._take(event, event.micro_batch or 0, required=failures > FORGIVEN)
        self._descent.record(event, taken, time.perf_counter() - began)

    def relieve(self, facts: oom.OOMFacts) -> None:
        """Let the next optimizer step fit: this one had to be finished on the host, slowly."""
        began = time.perf_counter()
        event = self._event(facts, max(0, len(self._reported) - 1))
        taken = self._take(event, event.micro_batch or 0, required=False, at_most=Fidelity.NUMERIC)
        if taken is not None:
            self._descent.record(event, taken, time.perf_counter() - began)

    def _shape(self) -> Shape | None:
        """The size of the pass that failed; to tell that of a packed one takes a little memory."""
        known = self._pass if self._pass is not None else next(iter(self._window.batches), None)
        try:
            with AllocationRetry(release_at_most(1)):
                return measure(known, pairs=self._levers.pairs)
        except (RuntimeError, MemoryError) as error:
            oom.caught(error)
        return None

    def _event(self, facts: oom.OOMFacts, index: int) -> OOMEvent:
        shape = self._shape()
        return oom.event_of(
            facts,
            phase=self.phase,
            step=self._trainer.state.global_step + 1,
            micro_batch=index if self._window.batches else None,
            rows=None if shape is None else shape.units,
            width=None if shape is None else shape.width,
            tokens=None if shape is None else shape.tokens,
        )
