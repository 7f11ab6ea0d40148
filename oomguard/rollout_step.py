"""The transaction of a step whose trainer samples what it trains on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from oomguard import oom
from oomguard.errors import LadderExhaustedError
from oomguard.levers import metrics, trl_losses
from oomguard.levers.merged_metrics import merged
from oomguard.memory import device
from oomguard.rollouts import Rollouts
from oomguard.step import StepTransaction

if TYPE_CHECKING:
    from collections.abc import Callable

    from oomguard.descent import Descent
    from oomguard.event import OOMEvent
    from oomguard.levers.live import Levers
    from oomguard.oom import OOMFacts


def transaction_of(trainer: Any, levers: Levers, descent: Descent) -> StepTransaction:
    """The transaction in which the steps of this trainer run."""
    kind = RolloutTransaction if trl_losses.generates(trainer) else StepTransaction
    return kind(trainer, levers, descent)


class RolloutTransaction(StepTransaction):
    """Samples once for each step, and splits what was sampled."""

    def _forget(self) -> None:
        super()._forget()
        self._rollouts = Rollouts(self._trainer, self._room_to_generate)

    def prepare(self, prepare: Callable[[], Any]) -> Any:
        """What the trainer makes of the batch that is run, from `prepare()` the first time."""
        self.phase = "generate"
        inputs = self._rollouts.prepare(self._running, prepare)
        self._window.inputs[self._running] = self._pass = inputs
        self.phase = "bookkeeping"
        return inputs

    def sampled(self) -> None:
        """The completions are there, and are about to get their rewards."""
        self._rollouts.sampled()

    def in_passes(self, inputs: Any, compute: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """The loss of what was sampled, in as many passes as the plan asks for.

        All passes but the last are run backward here. The loss that is returned has the value of
        all of them, and the graph of the last.
        """
        passes = self._passes(inputs, self._window.num_items)
        if passes is None:
            return compute(inputs)
        weights = self._levers.split_loss.weights(passes) if self._levers.split_loss else None
        entries = metrics.PassEntries(self._trainer)
        done: torch.Tensor | float = 0.0
        for position, part in enumerate(passes):
            self._pass, self._weight = part, None if weights is None else weights[position]
            loss = compute(part)
            entries.add(part)
            if position + 1 < len(passes):
                _backward(self._trainer, loss)
                done = done + loss.detach()
        self._weight = None
        entries.replace(merged)
        return loss + done

    def _room_to_generate(self, facts: OOMFacts, failures: int) -> None:
        """Release what can be, once."""
        began = time.perf_counter()
        device.release_cached()
        event = self._event(facts, self._running)
        if failures > 1:
            raise LadderExhaustedError(_generation_failed(self._trainer.args, event))
        self._descent.record(event, None, time.perf_counter() - began)


def _backward(trainer: Any, loss: torch.Tensor) -> None:
    """Run a pass backward as the end of `Trainer.training_step` would."""
    if not trainer.loss_is_scaled_for_ga:
        loss = loss / trainer.current_gradient_accumulation_steps
    with torch.autocast(loss.device.type, enabled=False):
        trainer.accelerator.backward(loss)


def _generation_failed(args: Any, event: OOMEvent) -> str:
    """What ends a training whose sampling does not fit."""
    return (
        f"Out of memory while completions were generated and scored for optimizer step "
        f"{event.step}{oom.sizes(event)}, again after cached memory had been released. No rung of "
        f"the ladder makes generation need less, so none was taken. Nothing of step {event.step} "
        f"was applied; weights and optimizer are those after step {event.step - 1}. "
        f"What to change: "
        f"(a) a lower generation_batch_size (now {args.generation_batch_size}), by fewer "
        f"num_generations (now {args.num_generations}), of which it is a multiple, by "
        f"steps_per_generation (now {args.steps_per_generation}) or "
        f"per_device_train_batch_size (now {args.per_device_train_batch_size}); "
        f"(b) a lower max_completion_length (now {args.max_completion_length}); "
        f"(c) load the base model in 4 bits, or use a larger card. The error was: {event.message}"
    )
