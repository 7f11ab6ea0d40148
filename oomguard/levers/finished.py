"""Bring a trainer to the end of a training that an earlier process has finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from oomguard.resumption import OPTIMIZER_NAMES, STATE_NAME, Checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping


def load_finished(
    trainer: Any, checkpoint: Checkpoint, output: Mapping[str, Any] | None
) -> TrainOutput:
    """Load the weights, state and random numbers that `train()` ended with.

    Resuming from the last checkpoint would not do: where the number of steps is no multiple of an
    epoch's, the Trainer makes one step more.

    Args:
        trainer: Takes the weights.
        checkpoint: Of the last step.
        output: What `train()` returned, where it came to that. If it did not, the loss is the mean
            of those logged.
    """
    trainer._load_from_checkpoint(str(checkpoint.path))
    trainer.state = TrainerState.load_from_json(str(checkpoint.path / STATE_NAME))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer._load_rng_state(str(checkpoint.path))
    if output is not None:
        if output["metrics"]:
            trainer.state.log_history.append({**output["metrics"], "step": output["global_step"]})
        return TrainOutput(**output)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    mean = sum(losses) / len(losses) if losses else float("nan")
    return TrainOutput(checkpoint.step, mean, {"train_loss": mean})


def load_optimizer(trainer: Any, checkpoint: Checkpoint) -> None:
    """Give a trainer the optimizer that a training ended with, for another one to go on with."""
    found = [path for name in OPTIMIZER_NAMES if (path := checkpoint.path / name).exists()]
    if found:
        state = torch.load(found[0], map_location=trainer.args.device, weights_only=True)
        trainer.create_optimizer()
        trainer.optimizer.load_state_dict(state)
