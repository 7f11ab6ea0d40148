"""An estimate by arithmetic, for models whose code cannot be traced.

Weights, adapters, gradients and optimizer state are counted from the model's own parameters on
the meta device. Activations are the conservative part: what autograd keeps of a layer is taken as
the inputs and outputs of its linear modules and more than as much for what lies between them. All
is raised by `MARGIN`, with which no measured peak of `benchmarks/data` is underestimated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from oomguard.prediction.subject import depth_of, text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from oomguard.plan import Plan
    from oomguard.prediction.settings import Settings

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# A 4-bit weight, one absmax of 1 byte (double quantization) or 4 for every 64 of them.
_QUANTIZED_BYTES = {True: 0.5 + 1 / 64, False: 0.5 + 4 / 64}
_STATE_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "sgd": 0, "adafactor": 0}
_KEPT = 2.5  # of inputs and outputs of linear modules: GPT-2's activation is many ops
_EMBEDDING_STATE_BYTES = 8  # the Trainer keeps the states of embeddings in 32 bits
_STACKED = 3  # dimensions of the weights of all experts of a layer
_SCORE_BYTES = 12  # of attention that is not fused: scores, a softmax, and their gradient
_ADAFACTOR_COPIES = 4  # float32 temporaries of one weight, at worst of the largest
MARGIN = 1.1
"""What every figure is raised by, for what is not counted."""
RESERVED = 1.1
"""Reserved bytes for one allocated: well above the mean of the rows of `benchmarks/data`."""
# TRL projects at most this many tokens and words at a time.
_HEAD_TILE = (4096, 32768)


def peak(
    config: PretrainedConfig, model: nn.Module, plan: Plan, settings: Settings, rows: int
) -> dict[str, int]:
    """Bytes at the peak, the end of a forward pass, by category.

    Args:
        config: Of the model.
        model: The model on the meta device.
        plan: What is trained.
        settings: What is trained, besides the plan.
        rows: Rows of one pass.
    """
    tokens = rows * (plan.max_length or 1024)
    linear = {n: m for n, m in model.named_modules() if _is_inner_linear(n, m)}
    size = _BYTES[settings.dtype]
    parts = dict.fromkeys(("adapters", "optimizer_state"), 0)
    if plan.lora_r is not None:
        names = plan.target_modules or ()
        chosen = [
            m
            for n, m in linear.items()
            if names == ("all-linear",) or n.rpartition(".")[2] in names
        ]
        size = 2 if settings.trainer == "sft" and settings.is_quantized else 4
        trained = sum(plan.lora_r * sum(m.weight.shape) for m in chosen)
        parts["adapters"] = trained * size
    else:
        trained = sum(p.numel() for p in model.parameters())
    parts |= {
        "weights": _weights(model, linear, settings),
        "gradients": trained * size,
        "optimizer_state": _state(model, plan, trained, size),
        "saved_activations": _activations(config, model, linear, plan, settings, tokens),
        "logits_and_loss": _logits(config, plan, settings, tokens),
        "workspaces": 2 * 32 * 2**20,
    }
    return {name: int(nbytes * MARGIN) for name, nbytes in parts.items()}


def _is_inner_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and not name.endswith("lm_head")


def _weights(model: nn.Module, linear: dict[str, Any], settings: Settings) -> int:
    quantized = {id(m.weight) for m in linear.values()} if settings.is_quantized else set()
    one = 1.0 if settings.quantization == "int8" else _QUANTIZED_BYTES[settings.double_quant]
    other = 4 if settings.prepare_for_kbit else _BYTES[settings.dtype]
    return int(sum(p.numel() * (one if id(p) in quantized else other) for p in model.parameters()))


def _state(model: nn.Module, plan: Plan, trained: int, size: int) -> int:
    """Of the optimizer, and the temporaries of its step, which come while gradients live."""
    optim = plan.optim or "adamw_torch_fused"
    if optim.startswith("paged"):
        return 0
    state = trained * _STATE_BYTES.get(optim, 2 * size)
    if optim == "adafactor":
        return state + _ADAFACTOR_COPIES * 4 * max(p.numel() for p in model.parameters())
    if plan.lora_r is None and "8bit" in optim:
        words = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
        return state + words * (_EMBEDDING_STATE_BYTES - _STATE_BYTES[optim])
    foreach = "fused" not in optim and "8bit" not in optim
    return state + (trained * size if foreach else 0)


def _activations(
    config: PretrainedConfig,
    model: nn.Module,
    linear: dict[str, Any],
    plan: Plan,
    settings: Settings,
    tokens: int,
) -> int:
    text, depth = text_config(config), depth_of(config)
    size = 4 if settings.dtype == "float32" or settings.prepare_for_kbit else 2
    # Experts whose weights are one tensor: every token goes through a few of them.
    chosen = int(getattr(text, "num_experts_per_tok", None) or 1)
    experts = chosen * sum(sum(p.shape[1:]) for p in model.parameters() if p.ndim == _STACKED)
    kept = _KEPT * (experts + sum(sum(m.weight.shape) for m in linear.values())) * size * tokens
    heads = int(getattr(text, "num_attention_heads", 0))  # Mamba has none
    grouped = (getattr(text, "num_key_value_heads", None) or heads) != heads
    unfused = settings.dtype == "float32" and settings.autocast == "no" and grouped
    if settings.attn_implementation == "eager" or unfused:
        kept += _SCORE_BYTES * depth * heads * tokens * (plan.max_length or 1024)
    if not plan.gradient_checkpointing:
        return int(kept)
    # Of every so many layers one is checkpointed and the others keep theirs.
    every = settings.checkpoint_every_n_layers
    held = 0 if plan.offload_activations else size * tokens * text.hidden_size * depth // every
    if settings.quantization == "int8":  # whose inputs live through checkpoints
        held += size * tokens * sum(max(m.weight.shape) for m in linear.values())
    return int(held + kept * ((every - 1) / every + 1 / depth))


def _logits(config: PretrainedConfig, plan: Plan, settings: Settings, tokens: int) -> int:
    words, width = int(text_config(config).vocab_size), int(text_config(config).hidden_size)
    if settings.trainer == "sft":
        tile = min(tokens, _HEAD_TILE[0]) * min(words, _HEAD_TILE[1])
        # The gradient of the head is summed in float32.
        return 2 * tile + 4 * tokens * width + (4 * words * width if plan.lora_r is None else 0)
    return 10 * tokens * words  # in the model's type, and twice in float32
