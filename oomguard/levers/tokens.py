"""Input tokens that a Trainer counts in the body of its loop, as that of transformers 4.57 does.

Later ones count in `_track_num_input_tokens`, which `hooks.py` overrides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

if TYPE_CHECKING:
    from collections.abc import Mapping


def counted_in_the_loop() -> bool:
    """Whether no method counts them, so that the loop has counted a batch before it is run."""
    return not hasattr(Trainer, "_track_num_input_tokens")


def recount(trainer: Any, old: Any, new: Any) -> None:
    """Count `new`, a batch that was cut after it had been counted as `old`."""
    if new is not old:
        trainer.state.num_input_tokens_seen += _seen(trainer, new) - _seen(trainer, old)


def _seen(trainer: Any, batch: Mapping[str, Any]) -> int:
    """What the loop adds for a batch, by `TrainingArguments.include_num_input_tokens_seen`."""
    how = trainer.args.include_num_input_tokens_seen
    ids = batch.get(getattr(trainer.model, "main_input_name", "input_ids"))
    if how == "no" or ids is None:
        return 0
    if how == "non_padding":
        if "attention_mask" in batch:
            return int(batch["attention_mask"].sum())
        pad = getattr(trainer.processing_class, "pad_token_id", None)
        if pad is not None:
            return int((ids != pad).sum())
    return int(ids.numel())
