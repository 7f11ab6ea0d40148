"""The plan and the settings that a live trainer has."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyarrow import compute

from oomguard.errors import ConfigurationError
from oomguard.levers import activations
from oomguard.levers.live import read_plan
from oomguard.levers.trl_losses import trl_class
from oomguard.memory import device
from oomguard.prediction.losses import Loss
from oomguard.prediction.optimizers import Own
from oomguard.prediction.settings import Settings
from oomguard.prediction.trace import Given
from oomguard.prediction.tuning import Tuning

if TYPE_CHECKING:
    from oomguard.plan import Plan

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def plan_of(trainer: Any) -> Plan:
    """The plan that `trainer` follows, with the length of its longest row as `max_length`."""
    plan = read_plan(trainer)
    lengths = row_lengths(trainer)
    if not lengths:
        return plan
    longest = max(lengths)
    return replace(plan, max_length=min(longest, plan.max_length or longest))


def row_lengths(trainer: Any) -> list[int]:
    """Tokens of every row of the training data; empty where they cannot be read."""
    dataset = getattr(trainer, "train_dataset", None)
    names = getattr(dataset, "column_names", None) or ()
    if dataset is None or "input_ids" not in names:
        return []
    # Arrow knows how long a list is without reading it: a second for millions of rows.
    lists = dataset.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    return [int(length) for length in compute.list_value_length(lists).to_pylist()]


def fetches_ahead(trainer: Any) -> bool:
    """Whether the loader of `trainer` ever holds another batch during a step after the first."""
    args = trainer.args
    try:
        rows = len(trainer.train_dataset)
    except TypeError:  # a stream, or nothing to train on
        return True
    each = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps: int = math.ceil(rows / each)  # of an epoch, whose last one has nothing behind it
    total: int = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
    return steps > 2 or (steps == 2 and total > 2)


def model_of(trainer: Any) -> Any:
    """The model of a trainer, without wrappers and adapters.

    Raises:
        ConfigurationError: It has no language-model head.
    """
    model: Any = activations.base_model(trainer)
    if model.get_output_embeddings() is None:
        msg = (
            f"{type(model).__name__} has no language-model head, and estimates are of causal "
            "language model"
        )
        raise ConfigurationError(msg)
    return model


def untraced_step(trainer: Any) -> str | None:
    """Why the steps of a trainer cannot be traced; `None` where they are SFT's or a Trainer's."""
    name = trl_class(trainer)
    how = getattr(activations.base_model(trainer).config, "quantization_config", None)
    method = getattr(getattr(how, "quant_method", None), "value", None)
    if method not in {None, "bitsandbytes"}:
        return f"a base quantized by {method} is not: its weights are counted as 16 bits"
    if name in {None, "SFTTrainer"}:
        return None
    return f"a step of {name} is not SFTTrainer's: pairs of rows are counted, and no second model"


def given_by(trainer: Any) -> Given:
    """What a live trainer has that neither its plan nor its settings say."""
    loss, notes = Loss.of(trainer), []
    if loss.own is not None:
        notes.append(f"{loss.own} is not traced: a cross entropy of full logits is counted for it")
    notes += [
        f"{name} is not traced: the same training without it is counted"
        for name in ("use_liger_kernel", "torch_compile")
        if getattr(trainer.args, name, False)
    ]
    return Given(Own.of(trainer), Tuning.of(trainer), loss, tuple(notes))


def settings_of(trainer: Any) -> Settings:
    """The settings of a live trainer."""
    args, model = trainer.args, activations.base_model(trainer)
    lora = _lora(trainer)
    lengths = row_lengths(trainer)
    kwargs = getattr(args, "gradient_checkpointing_kwargs", None) or {}
    packing = bool(getattr(args, "packing", False) or getattr(args, "padding_free", False))
    ragged = len(set(lengths)) > 1 and args.per_device_train_batch_size > 1
    quantization, double_quant = _quantization(model)
    sft = trl_class(trainer) == "SFTTrainer"
    return Settings(
        quantization=quantization,
        double_quant=double_quant,
        dtype=_dtype(model),
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        lora_dropout=float(getattr(lora, "lora_dropout", 0.0)),
        use_rslora=bool(getattr(lora, "use_rslora", False)),
        use_dora=bool(getattr(lora, "use_dora", False)),
        attn_implementation=_attention(model),
        padded=ragged and not packing,
        packing=packing,
        trainer="sft" if sft and not Loss.of(trainer).in_place else "trainer",
        checkpoint_every_n_layers=int(kwargs.get("every_n_layers", 1)),
        use_reentrant=bool(kwargs.get("use_reentrant", False)),
        input_require_grads=_input_grads(model),
        expandable_segments=args.device.type == "cuda" and bool(device.expandable_segments()),
        max_grad_norm=float(args.max_grad_norm or 0.0),
    )


def _lora(trainer: Any) -> Any:
    configs = getattr(activations.peft_model(trainer), "peft_config", None) or {}
    return next(iter(configs.values()), None)


def _input_grads(model: Any) -> bool | None:
    """`True` where a hook lets the embeddings' output require gradients."""
    hooks = model.get_input_embeddings()._forward_hooks.values()
    return any("require_grads" in getattr(hook, "__name__", "") for hook in hooks) or None


def _attention(model: Any) -> str:
    return "eager" if getattr(model.config, "_attn_implementation", "") == "eager" else "sdpa"


def _quantization(model: Any) -> tuple[str, bool]:
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8", True
    if not getattr(model, "is_loaded_in_4bit", False):
        return "none", True
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    state = next(state for state in states if state is not None)
    return state.quant_type, bool(state.nested)


def _dtype(model: Any) -> str:
    """Of the unquantized weights; that of the largest of them."""
    frozen = [p for p in model.parameters() if p.dtype in _NAMES]
    return _NAMES[max(frozen, key=lambda p: p.numel()).dtype]
