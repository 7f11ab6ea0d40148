"""Completions that a trainer samples for its own training: made once, never shrunk.

TRL's GRPO and RLOO trainers sample and score completions inside `training_step`. What they have
sampled for a batch of a step is kept until the step is over, so that the step can be made again
without sampling, scoring and counting again. No rung makes sampling need less memory: it is tried
again, and then named as what has failed.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oomguard import rng
from oomguard.levers import activations, metrics
from oomguard.levers.journal import Journal
from oomguard.retry import AllocationRetry, MakeRoom, again

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class _Made:
    """What a batch was made into, and what that left behind.

    The random state is `None` where nothing was drawn: the trainer took a part of what it had.
    """

    inputs: Any
    journal: Journal
    state: rng.RandomState | None


class Rollouts:
    """The completions sampled for the batches of one optimizer step."""

    def __init__(self, trainer: Any, make_room: MakeRoom) -> None:
        """Take the trainer, and what to call when memory runs out while sampling."""
        self._trainer = trainer
        self._make_room = make_room
        self._made: dict[int, _Made] = {}
        self._rewards = ExitStack()

    def prepare(self, index: int, prepare: Callable[[], Any]) -> Any:
        """What the trainer makes of batch `index` of the step, from `prepare()` the first time."""
        known = self._made.get(index)
        if known is None:
            return self._prepare(index, prepare)
        known.journal.repeat()
        if known.state is not None:
            rng.restore(known.state)
        return known.inputs

    def _prepare(self, index: int, prepare: Callable[[], Any]) -> Any:
        trainer, before = self._trainer, rng.snapshot()
        undo_metrics, seen = metrics.mark(trainer), trainer.state.num_input_tokens_seen
        switch_on = activations.put_back(trainer)
        journal = Journal(trainer)

        def undo() -> None:
            undo_metrics()
            trainer.state.num_input_tokens_seen = seen
            switch_on()
            rng.restore(before)

        def attempt() -> Any:
            with self._rewards:
                return prepare()

        inputs = again(self._make_room, attempt, undo)
        journal.close()
        after = rng.snapshot()
        self._made[index] = _Made(inputs, journal, None if after == before else after)
        return inputs

    def sampled(self) -> None:
        """From here until the batch is prepared, repeat single operations.

        Reward functions may count their calls, or cost money: they are not asked twice. Sampling
        has many more operations, which to watch would take time.
        """
        self._rewards.enter_context(AllocationRetry(self._make_room))
