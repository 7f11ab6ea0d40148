"""A trainer's double: trains its model for two steps on the longest rows, and is thrown away."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import (
    IntervalStrategy,
    SaveStrategy,
    SchedulerType,
    TrainerMemoryTracker,
)

from oomguard.levers import activations
from oomguard.levers.adapter import trained
from oomguard.levers.batch import tokens_of
from oomguard.levers.live import Levers, read_plan
from oomguard.levers.longest import longest_batch, longest_row
from oomguard.levers.micro_batch import split
from oomguard.levers.residual import init_of, takes_from_base

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from oomguard.plan import Plan

_LARGEST = 100_000  # entries of a container that is the trainer's own; what is larger is data
_DATA = ("train_dataset", "eval_dataset")
_SILENT: dict[str, Any] = {
    "eval_strategy": IntervalStrategy.NO,  # evaluation and save are asked for by `watch`
    "save_strategy": SaveStrategy.NO,
    "logging_strategy": IntervalStrategy.NO,
    "logging_first_step": False,
    "report_to": [],
    "push_to_hub": False,
    "disable_tqdm": True,
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "lr_scheduler_type": SchedulerType.CONSTANT,
    "lr_scheduler_kwargs": {},
    "auto_find_batch_size": False,
    "train_sampling_strategy": "sequential",
    "group_by_length": False,  # what transformers 4 has instead
    "dataloader_drop_last": False,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False,
    "dataloader_multiprocessing_context": None,
}

STEPS = 2
"""Optimizer steps: the first makes the optimizer's state, the second has it all along."""
PASSES = 2
"""Batches of a step at the most: the second meets the gradients of the first, as all later do."""


class Double(Trainer):
    """Stands in front of the trainer's own class in its double."""

    _oomguard_trial: Cut

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """In the order of the data set, which is one longest batch several times over."""
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches, cut as the plan of the trial asks for."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        cut = [self._oomguard_trial(batch) for batch in batches]
        if any(new is not old for new, old in zip(cut, batches, strict=True)):
            return super().get_batch_samples(iter(cut), len(cut), device)
        return batches, items


class Cut:
    """Cuts batches to the plan's `max_length`, and keeps what one pass of it holds.

    Attributes:
        tokens: Padded tokens of the largest batch so far; `None` where they cannot be told.
    """

    def __init__(self, levers: Levers, before: Plan, after: Plan) -> None:
        """Cut where `after` has a lower `max_length` than `before`."""
        self.tokens: int | None = None
        self._levers = levers
        self._plan = after
        self._shortens = after.max_length != before.max_length

    def __call__(self, batch: Any) -> Any:
        """What the trainer would make one pass of."""
        length = self._plan.max_length
        if self._shortens and length is not None:
            batch = self._levers.shorten(batch, self._plan)
            limit = self._plan.per_device_train_batch_size * length
            batch = split(batch, limit, pairs=self._levers.pairs)[0]
        if "input_ids" in batch:
            self.tokens = max(self.tokens or 0, tokens_of(batch))
        return batch


def refusal(trainer: Any, before: Plan, after: Plan) -> str | None:
    """Why a double cannot go from `before` to `after`, or `None`; rows are cut as they come."""
    if before.lora_r != after.lora_r and any(
        takes_from_base(init_of(trainer, adapter)) for adapter in trained(trainer)
    ):
        return "a lower rank of adapters that were taken out of base weights changes those"
    begins = replace(
        after,
        per_device_train_batch_size=before.per_device_train_batch_size,
        gradient_accumulation_steps=before.gradient_accumulation_steps,
    )
    if before.gradient_checkpointing and not after.gradient_checkpointing:
        begins = replace(begins, gradient_checkpointing=True)
    return Levers(trainer, type(trainer).compute_loss).refuses_start(before, begins)


def make(trainer: Any, plan: Plan, folder: Path, watch: TrainerCallback) -> Any:
    """A double of `trainer` that follows `plan`; `train()` runs it.

    It shares the model with the trainer, and whatever else `Keepsake` remembers. Attributes set on
    it, lists and dictionaries among its attributes, its arguments, callbacks, accelerator,
    optimizer and state are its own.

    Args:
        trainer: Stays as it is, except for what is shared.
        plan: What to obey.
        folder: Where it writes to.
        watch: The only callback besides the one that ends the training.
    """
    double = copy.copy(trainer)
    own: Any = type(trainer)
    double.__class__ = type(own.__name__, (Double, own), {"__module__": own.__module__})
    vars(double).update({k: _own(v) for k, v in vars(trainer).items() if k not in _DATA})
    before = read_plan(trainer)
    double.args = _arguments(trainer.args, plan, folder)
    double.model_init = None  # the model is there
    double.hp_search_backend = None
    double._memory_tracker = TrainerMemoryTracker(skip_memory_metrics=True)
    double.control, double.state = TrainerControl(), TrainerState()
    double.callback_handler = CallbackHandler(
        [DefaultFlowCallback(), watch],
        trainer.model,
        trainer.processing_class,
        trainer.optimizer,
        trainer.lr_scheduler,
    )
    rows = min(plan.per_device_train_batch_size, len(trainer.train_dataset))
    double._train_batch_size = rows
    batches = STEPS * double.args.gradient_accumulation_steps
    double.train_dataset = longest_batch(trainer.train_dataset, rows, batches)
    if evaluates(trainer):
        double.eval_dataset = longest_batch(
            _largest(trainer.eval_dataset), double.args.eval_batch_size
        )
        if trainer.compute_metrics is not None:
            double.compute_metrics = _no_metrics
    double.create_accelerator_and_postprocess()
    _scale_by_one(double.accelerator.scaler)
    levers = Levers(double, own.compute_loss)
    if before.gradient_checkpointing and not plan.gradient_checkpointing:
        activations.disable(double)
        before = replace(before, gradient_checkpointing=False)
    levers.apply(before, plan)
    double._oomguard_trial = Cut(levers, before, plan)
    return double


def pass_tokens(made: Any) -> int | None:
    """Padded tokens of the largest pass that a double has run; `None` where they are not known."""
    tokens: int | None = made._oomguard_trial.tokens
    return tokens


def evaluates(trainer: Any) -> bool:
    """Whether the trainer's training evaluates."""
    strategy = str(getattr(trainer.args.eval_strategy, "value", trainer.args.eval_strategy))
    asked = strategy != "no" or trainer.args.eval_on_start
    return bool(asked and trainer.eval_dataset is not None)


def _own(value: Any) -> Any:
    """Containers within containers copied, and all else shared."""
    if not isinstance(value, (list, set, deque, dict)) or len(value) > _LARGEST:
        return value
    made: Any = copy.copy(value)
    if isinstance(value, dict):
        made.update({key: _own(inner) for key, inner in value.items()})
    elif isinstance(value, list):
        made[:] = map(_own, value)
    return made


def _arguments(args: Any, plan: Plan, folder: Path) -> Any:
    """The trainer's arguments, for two silent steps of `plan` with one save at their end."""
    made = copy.copy(args)
    keeps_optimizer = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": min(PASSES, plan.gradient_accumulation_steps),
        "save_only_model": args.save_only_model or not keeps_optimizer,
        **_SILENT,
    }
    for name, value in values.items():
        if hasattr(made, name):
            setattr(made, name, value)
    return made


def _largest(datasets: Any) -> Any:
    """Of several evaluation sets the one with the longest row."""
    if not isinstance(datasets, dict):
        return datasets
    return max(datasets.values(), key=longest_row)


def _scale_by_one(scaler: Any) -> None:
    """Have fp16 make every step: one that overflows is skipped, and then moments are missing."""
    if scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 1.0})


def _no_metrics(*args: Any, **kwargs: Any) -> dict[str, float]:
    """Stands in for the user's function: that there is one decides what evaluation keeps."""
    return {}
