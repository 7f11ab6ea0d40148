"""An estimate by arithmetic, for models whose code cannot be traced.

Weights, adapters, gradients and optimizer state are counted from the model's own parameters on the
meta device. Activations are the conservative part: what autograd keeps of a layer is taken as the
inputs and outputs of its linear modules and as much again for what lies between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oomguard.prediction.subject import depth_of, text_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from oomguard.plan import Plan
    from oomguard.prediction.settings import Settings

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# A 4-bit weight, one absmax of 1 byte (double quantization) or 4 for every 64 of them.
_QUANTIZED_BYTES = {True: 0.5 + 1 / 64, False: 0.5 + 4 / 64}
_STATE_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "sgd": 0, "adafactor": 0}
RESERVED = 1.05
"""Reserved bytes for one allocated: a little above the mean of the rows of `benchmarks/data`."""
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
    weights = _weights(model, linear, settings)
    adapters = 0
    if plan.lora_r is not None:
        names = plan.target_modules or ()
        chosen = [
            m
            for n, m in linear.items()
            if names == ("all-linear",) or n.rpartition(".")[2] in names
        ]
        size = 2 if settings.trainer == "sft" and settings.is_quantized else 4
        adapters = sum(plan.lora_r * (m.in_features + m.out_features) for m in chosen) * size
        trained, grads = adapters // size, adapters
    else:
        trained = sum(p.numel() for p in model.parameters())
        grads = trained * _BYTES[settings.dtype]
        size = _BYTES[settings.dtype]
    optim = plan.optim or "adamw_torch_fused"
    per_weight = 0 if optim.startswith("paged") else _STATE_BYTES.get(optim, 2 * size)
    return {
        "weights": weights,
        "adapters": adapters,
        "gradients": grads,
        "optimizer_state": trained * per_weight,
        "saved_activations": _activations(config, linear, plan, settings, tokens),
        "logits_and_loss": _logits(config, settings, tokens),
        "workspaces": 2 * 32 * 2**20,
    }


def _is_inner_linear(name: str, module: nn.Module) -> bool:
    return hasattr(module, "in_features") and not name.endswith("lm_head")


def _weights(model: nn.Module, linear: dict[str, Any], settings: Settings) -> int:
    quantized = {id(m.weight) for m in linear.values()} if settings.is_quantized else set()
    one = 1.0 if settings.quantization == "int8" else _QUANTIZED_BYTES[settings.double_quant]
    return int(
        sum(
            p.numel() * (one if id(p) in quantized else _BYTES[settings.dtype])
            for p in model.parameters()
        )
    )


def _activations(
    config: PretrainedConfig, linear: dict[str, Any], plan: Plan, settings: Settings, tokens: int
) -> int:
    text, depth = text_config(config), depth_of(config)
    kept = 2 * sum(m.in_features + m.out_features for m in linear.values()) * 2 * tokens
    if settings.attn_implementation == "eager":
        # Scores in the weights' type and a softmax in float32, both kept.
        kept += 8 * depth * text.num_attention_heads * tokens * (plan.max_length or 1024)
    if not plan.gradient_checkpointing:
        return int(kept)
    every = settings.checkpoint_every_n_layers
    held = 0 if plan.offload_activations else 2 * tokens * text.hidden_size * depth // every
    return int(held + kept * every / depth)


def _logits(config: PretrainedConfig, settings: Settings, tokens: int) -> int:
    words = int(text_config(config).vocab_size)
    if settings.trainer == "sft":
        tile = min(tokens, _HEAD_TILE[0]) * min(words, _HEAD_TILE[1])
        return 2 * tile + 4 * tokens * int(text_config(config).hidden_size)
    return 10 * tokens * words  # in the model's type, and twice in float32
