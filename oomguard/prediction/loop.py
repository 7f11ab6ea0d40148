"""What the Trainer's loop holds through an optimizer step, where host and card are one memory.

On a card most of it is not there: the next batch waits on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oomguard.memory.timeline import Event, Mark, Timeline
from oomguard.prediction.trace import BACKWARD, END, FORWARD

if TYPE_CHECKING:
    from oomguard.plan import Plan

_COLUMNS = 3  # input_ids, labels, and attention_mask or position_ids
_INTEGER_BYTES = 8
_SCALAR_BYTES = 4
# _run_epoch keeps the running loss, the loss of the last pass, the last norm of the gradients and
# num_items_in_batch; Accelerator.backward divides the loss once more.
_SCALARS = 4


def held_bytes(plan: Plan, length: int, *, fetches_ahead: bool) -> list[int]:
    """Bytes of each tensor that the loop holds: the batches of a step, and scalars.

    Args:
        plan: What is trained.
        length: Tokens of a row.
        fetches_ahead: Whether another batch waits meanwhile, as DataLoaderShard has it.
    """
    column = plan.per_device_train_batch_size * length * _INTEGER_BYTES
    batches = plan.gradient_accumulation_steps + fetches_ahead
    return [column] * _COLUMNS * batches + [_SCALAR_BYTES] * _SCALARS


def in_loop(timeline: Timeline, held: list[int]) -> Timeline:
    """`timeline` with what the loop holds besides."""
    category, events = list(timeline.category), list[Event]()
    step: list[int] = []
    loss: list[int] = []

    def hold(sizes: list[int]) -> list[int]:
        keys = list(range(len(category), len(category) + len(sizes)))
        category.extend(["workspaces"] * len(sizes))
        events.extend(zip(keys, sizes, strict=True))
        return keys

    def drop(keys: list[int]) -> None:
        events.extend((key, -1) for key in keys)
        keys.clear()

    for event in timeline.events:
        if isinstance(event, Mark):
            drop(loss)
            if event.phase == FORWARD and not step:
                step = hold(held)
            elif event.phase == BACKWARD:
                loss = hold([_SCALAR_BYTES])
            elif event.phase == END:
                drop(step)
        events.append(event)
    return Timeline(events, category)
