"""How many rows the loader puts into a batch, set before training begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oomguard.plan import Plan


def load_rows(trainer: Any, plan: Plan) -> None:
    """Load batches of the plan's rows, and accumulate as many as make the effective batch.

    Rows come in the same order as before, and an optimizer step trains on the same ones.
    """
    trainer.args.per_device_train_batch_size = plan.per_device_train_batch_size
    trainer.args.gradient_accumulation_steps = plan.gradient_accumulation_steps
    trainer._train_batch_size = trainer.args.train_batch_size  # what the loader is made with
