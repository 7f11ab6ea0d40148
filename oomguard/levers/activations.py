"""Activation checkpointing, switched on between two passes of a live trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

# Keys of `activation_checkpointing_kwargs` that choose layers and storage; the rest goes to
# `torch.utils.checkpoint.checkpoint`.
_NOT_FOR_TORCH = ("every_n_layers", "offload")


def base_model(trainer: Any) -> nn.Module:
    """The transformers model inside accelerate's, torch.compile's and PEFT's wrappers."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return cast("nn.Module", model.get_base_model()) if hasattr(model, "get_base_model") else model


def is_checkpointing(trainer: Any) -> bool:
    """Whether every layer that can be checkpointed is, or will be once training begins."""
    flags = [
        module.gradient_checkpointing
        for module in base_model(trainer).modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    if flags and all(flags):
        return True
    asked = getattr(trainer.args, "gradient_checkpointing", False)
    return bool(asked) and _kwargs(trainer).get("every_n_layers", 1) == 1


def refusal(trainer: Any) -> str | None:
    """Why checkpointing cannot be switched on, or `None`."""
    model = base_model(trainer)
    name = type(model).__name__
    if not hasattr(model, "gradient_checkpointing_enable"):
        return f"{name} has no gradient_checkpointing_enable()"
    if not getattr(model, "supports_gradient_checkpointing", True):
        return f"{name} does not support gradient checkpointing"
    return None


def enable(trainer: Any) -> None:
    """Checkpoint every layer, with the keyword arguments that the user's `args` hold."""
    model: Any = base_model(trainer)
    kwargs = {k: v for k, v in _kwargs(trainer).items() if k not in _NOT_FOR_TORCH}
    kwargs = kwargs or {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _kwargs(trainer: Any) -> dict[str, Any]:
    return dict(getattr(trainer.args, "gradient_checkpointing_kwargs", None) or {})
