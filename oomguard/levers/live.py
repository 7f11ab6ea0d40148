"""The live trainer and the plan: read it, say what cannot be done to it, make it obey."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from oomguard import oom
from oomguard.levers import activations, loss, trl_losses
from oomguard.levers.batch import CannotActError
from oomguard.levers.micro_batch import split
from oomguard.levers.sequence import shorten
from oomguard.plan import Plan

# Their labels stand on the tokens themselves, so a window's first label would be a lost target.
_UNSHIFTED = {
    *MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
}


@dataclass
class Window:
    """The batches of one optimizer step, as the Trainer fetched them.

    Attributes:
        batches: Collated batches on the device, shortened to `Plan.max_length`.
        num_items: `num_items_in_batch` of the whole step; `None` where the Trainer counts none.
        inputs: What a trainer that samples completions has made of its batches so far.
    """

    batches: list[Any]
    num_items: Any = None
    inputs: dict[int, Any] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Any:
        """What is trained on of batch `index`, as far as it is known."""
        return self.inputs.get(index, self.batches[index])


def read_plan(trainer: Any) -> Plan:
    """The plan that `trainer` follows now."""
    args = trainer.args
    configs = getattr(trainer.model, "peft_config", None) or {}
    config = configs.get(getattr(trainer.model, "active_adapter", "default"))
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str):
        targets = [targets]
    return Plan(
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        world_size=args.world_size,
        max_length=getattr(args, "max_length", None),
        gradient_checkpointing=activations.is_checkpointing(trainer),
        optim=optim_name(args),
        target_modules=None if targets is None else tuple(sorted(targets)),
        lora_r=_largest_rank(config),
    )


def optim_name(args: Any) -> str:
    """`TrainingArguments.optim` as users write it."""
    return str(getattr(args.optim, "value", args.optim))


def _largest_rank(config: Any) -> int | None:
    rank = getattr(config, "r", None)
    return None if rank is None else max(rank, *(config.rank_pattern or {"": rank}).values())


class Levers:
    """Everything that changes a live trainer on behalf of a plan."""

    def __init__(self, trainer: Any, compute_loss: Any) -> None:
        """Take the trainer and its own `compute_loss`, not the guard's."""
        self._trainer = trainer
        self._compute_loss = compute_loss
        self.pairs = trl_losses.in_pairs(trainer)
        self.split_loss: loss.SplitLoss | None = None

    def refusal(self, before: Plan, after: Plan, window: Window, index: int) -> str | None:
        """Why the trainer cannot go from `before` to `after`, or `None`.

        Finding that out takes a little memory itself; where there is none, that is the reason.

        Args:
            before: The plan in force.
            after: The plan that a rung proposes.
            window: The batches at hand; they may be empty.
            index: The batch that failed.
        """
        try:
            return self._refusal(before, after, window, index)
        except (RuntimeError, MemoryError) as error:
            oom.caught(error)
        return "memory ran out while finding out whether it can act"

    def _refusal(self, before: Plan, after: Plan, window: Window, index: int) -> str | None:
        changed = before.changes(after)
        obeyed = {"gradient_checkpointing", "max_pass_tokens", "max_length"}
        if "max_pass_tokens" in changed:
            obeyed.add("micro_batch_size")  # the same limit in rows, for people
        if "max_length" in changed:
            obeyed.add("sequence_mode")
        unknown = set(changed) - obeyed
        if unknown:
            return f"no lever changes {', '.join(sorted(unknown))} of a live trainer"
        if "gradient_checkpointing" in changed:
            reason = activations.refusal(self._trainer)
            if reason is not None:
                return reason
        if "max_length" in changed:
            return self._refuses_length(after, window, index)
        if "max_pass_tokens" in changed:
            if not window.batches:
                return "no batch has been seen yet"
            return self.refuses_split(window[index], window.num_items)
        return None

    def apply(self, before: Plan, after: Plan) -> None:
        """Make the trainer obey `after`; limits of passes and rows are read from the plan."""
        if after.gradient_checkpointing and not before.gradient_checkpointing:
            activations.enable(self._trainer)

    def shorten(self, batch: Any, plan: Plan) -> Any:
        """`batch` with no row longer than `plan.max_length`."""
        if plan.max_length is None:
            return batch
        mode: Any = plan.sequence_mode
        return shorten(batch, plan.max_length, mode, self._pad_token_id())

    def _pad_token_id(self) -> int:
        processing = getattr(self._trainer, "processing_class", None)
        tokenizer = getattr(processing, "tokenizer", processing)
        pad = getattr(tokenizer, "pad_token_id", None)
        return 0 if pad is None else int(pad)

    def _refuses_length(self, after: Plan, window: Window, index: int) -> str | None:
        model: Any = activations.base_model(self._trainer)
        name, config = type(model).__name__, getattr(model, "config", None)
        if name in _UNSHIFTED or getattr(config, "is_encoder_decoder", False):
            return f"rows of a {name} are not causal text"
        reason = trl_losses.length_refusal(self._trainer)
        if reason is not None:
            return reason
        if not window.batches:
            return "no batch has been seen yet"
        batch = window.batches[index]
        try:
            shorter = self.shorten(batch, after)
        except CannotActError as error:
            return str(error)
        if shorter["input_ids"].numel() <= batch["input_ids"].numel():
            return None
        return self.refuses_split(shorter, window.num_items)

    def refuses_split(self, batch: Any, num_items: Any) -> str | None:
        """Why `batch` cannot be run in passes, or `None`.

        Needs a loss that adds up over parts of a batch; the first call measures that.
        """
        try:
            split(batch, 1, pairs=self.pairs)
            reason = loss.refusal(self._trainer)
            if reason is None and self.split_loss is None:
                probe = loss.probe
                self.split_loss = probe(self._trainer, self._compute_loss, batch, num_items)
        except CannotActError as error:
            return str(error)
        return reason
