"""Read a training setup once and ask every check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import Trainer

from oomguard.diagnosis import of_batches, of_model, of_run, setup
from oomguard.diagnosis.finding import Diagnosis, Finding
from oomguard.errors import UnsupportedTrainerError

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKS: tuple[Callable[[setup.Setup], Finding | None], ...] = (
    of_model.float32_weights,
    of_model.kbit_upcast,
    of_model.kbit_preparation_missing,
    of_model.optimizer_state,
    of_model.use_cache,
    of_model.lost_gradients,
    of_model.full_logits,
    of_model.eager_attention,
    of_batches.padding_to_max_length,
    of_batches.packing_without_aware_attention,
    of_batches.batch_larger_than_needed,
    of_batches.wrong_padding_side,
    of_batches.labels_missing,
    of_run.eval_accumulation_unset,
    of_run.fp16_instead_of_bf16,
    of_run.expandable_segments_off,
    of_run.other_process,
)


def diagnose(trainer: Trainer) -> Diagnosis:
    """Find the memory pitfalls of a trainer that is built and not yet trained.

    Some rows of its dataset are collated; weights, random state and data order stay as they are.

    Args:
        trainer: A `transformers.Trainer`, or one of TRL's.

    Returns:
        The findings, the dearest first. `rich` prints them as a table.

    Raises:
        UnsupportedTrainerError: It is no Trainer.
    """
    if not isinstance(trainer, Trainer):
        msg = (
            f"diagnose() needs a transformers Trainer (or a subclass such as TRL's SFTTrainer), "
            f"not {trainer!r}."
        )
        raise UnsupportedTrainerError(msg)
    known = setup.read(trainer)
    return Diagnosis.of(known.trainer, [found for check in CHECKS if (found := check(known))])
