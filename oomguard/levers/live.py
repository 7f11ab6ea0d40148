"""The live trainer and the plan: read it, say what cannot be done to it, make it obey."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from oomguard import oom
from oomguard.levers import activations, adapter, loss, optimizer, rank, trl_losses
from oomguard.levers.batch import CannotActError
from oomguard.levers.micro_batch import split
from oomguard.levers.residual import Residuals
from oomguard.levers.sequence import shorten
from oomguard.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

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
    return Plan(
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        world_size=args.world_size,
        max_length=getattr(args, "max_length", None),
        gradient_checkpointing=activations.is_checkpointing(trainer),
        offload_activations=activations.is_offloading(trainer),
        optim=optimizer.optim_name(args),
        target_modules=adapter.targets(trainer),
        lora_r=adapter.largest_rank(trainer),
    )


class Levers:
    """Everything that changes a live trainer on behalf of a plan."""

    def __init__(self, trainer: Any, compute_loss: Any) -> None:
        """Take the trainer and its own `compute_loss`, not the guard's."""
        self._trainer = trainer
        self._compute_loss = compute_loss
        self.pairs = trl_losses.in_pairs(trainer)
        self.split_loss: loss.SplitLoss | None = None
        self._frozen: list[Any] = []
        self._residuals = Residuals(trainer)

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
        changed = set(before.changes(after))
        unknown = changed - _OBEYED.keys() - _IMPLIED.keys()
        unknown |= {name for name, by in _IMPLIED.items() if name in changed and by not in changed}
        if unknown:
            return f"no lever changes {', '.join(sorted(unknown))} of a live trainer"
        for name, question in _OBEYED.items():
            reason = question(self, after, window, index) if name in changed else None
            if reason is not None:
                return reason
        return None

    def refuses_start(self, before: Plan, after: Plan) -> str | None:
        """Why training cannot begin with `after`; limits are tried on the batches themselves."""
        changed = set(before.changes(after)) - _IMPLIED.keys() - _OF_BATCHES
        if changed - _OBEYED.keys():
            return f"no lever changes {', '.join(sorted(changed - _OBEYED.keys()))}"
        reasons = (_OBEYED[name](self, after, Window([]), 0) for name in sorted(changed))
        return next((reason for reason in reasons if reason is not None), None)

    def apply(self, before: Plan, after: Plan) -> None:
        """Make the trainer obey `after`; limits of passes and rows are read from the plan."""
        changed, trainer = before.changes(after), self._trainer
        if "gradient_checkpointing" in changed or "offload_activations" in changed:
            activations.enable(trainer, offload=after.offload_activations)
        if "optim" in changed:
            optimizer.convert(trainer)
        if "target_modules" in changed:
            self._frozen += adapter.freeze(trainer, after.target_modules or ())
        if "lora_r" in changed and after.lora_r is not None:
            rank.lower(trainer, after.lora_r, self._residuals)

    def hold(self) -> None:
        """Keep frozen what was frozen: PEFT unfreezes adapters that are switched off and on."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)

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

    def _refuses_checkpointing(self, after: Plan, window: Window, index: int) -> str | None:
        reason = activations.refusal(self._trainer)
        if reason is None and window.batches:
            batch, items = window[index], window.num_items
            reason = loss.needs_cache(self._trainer, self._compute_loss, batch, items)
        return reason

    def _refuses_passes(self, after: Plan, window: Window, index: int) -> str | None:
        if not window.batches:
            return "no batch has been seen yet"
        return self.refuses_split(window[index], window.num_items)

    def _refuses_rank(self, after: Plan, window: Window, index: int) -> str | None:
        if after.lora_r is None:
            return "a rank cannot be taken away"
        return rank.refusal(self._trainer, after.lora_r, self._residuals)

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


def _ask(question: Callable[..., str | None], *settings: str) -> Callable[..., str | None]:
    """A question that depends on the trainer and the named settings of the coming plan."""

    def ask(levers: Levers, after: Plan, window: Window, index: int) -> str | None:
        return question(levers._trainer, *(getattr(after, name) for name in settings))

    return ask


# Settings that levers change, each with the question whether it can be; the first "no" counts.
# Rows are shortened before they are split, hence the order.
_OBEYED: dict[str, Callable[[Levers, Plan, Window, int], str | None]] = {
    "gradient_checkpointing": Levers._refuses_checkpointing,
    "offload_activations": _ask(activations.refuses_offload),
    "optim": _ask(optimizer.refusal, "optim"),
    "target_modules": _ask(adapter.refusal, "target_modules"),
    "lora_r": Levers._refuses_rank,
    "max_length": Levers._refuses_length,
    "max_pass_tokens": Levers._refuses_passes,
    "cache_released_step": lambda *_: None,
}
# What changes along with another setting: the same limit in rows, the way rows are cut.
_IMPLIED = {"micro_batch_size": "max_pass_tokens", "sequence_mode": "max_length"}
_OF_BATCHES = {"max_length", "max_pass_tokens"}
