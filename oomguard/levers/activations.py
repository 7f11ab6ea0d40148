"""Activation checkpointing, switched on between two passes of a live trainer."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def peft_model(trainer: Any) -> Any:
    """The model inside accelerate's and torch.compile's wrappers, with PEFT's around it."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def base_model(trainer: Any) -> nn.Module:
    """The transformers model inside PEFT's wrapper too."""
    model = peft_model(trainer)
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
    if not any(hasattr(module, "gradient_checkpointing") for module in model.modules()):
        return f"{name} has no layer with a gradient_checkpointing switch"
    return None


def is_offloading(trainer: Any) -> bool:
    """Whether what checkpointing keeps goes to the host, or will once training begins."""
    return bool(_kwargs(trainer).get("offload", False))


def refuses_offload(trainer: Any) -> str | None:
    """Why what checkpointing keeps cannot go to the host, or `None`."""
    if trainer.args.device.type == "cpu":
        return "the training is on the host already"
    model = base_model(trainer)
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None or "offload" not in inspect.signature(enable).parameters:
        return f"{type(model).__name__} cannot offload checkpoints in this transformers version"
    return refusal(trainer)


def enable(trainer: Any, *, offload: bool = False) -> None:
    """Checkpoint every layer, with the keyword arguments that the user's `args` hold."""
    model: Any = base_model(trainer)
    kwargs = _kwargs(trainer)
    kwargs.pop("every_n_layers", None)
    offload = kwargs.pop("offload", False) or offload
    kwargs = kwargs or {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kwargs, offload=offload)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        # The other method does so itself: reentrant checkpoints pass gradients on only where what
        # enters them asks for one, and the embeddings of a frozen model do not.
        if kwargs.get("use_reentrant", True) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()


def disable(trainer: Any) -> None:
    """Store activations again, also once training begins."""
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if hasattr(trainer.args, name):
            setattr(trainer.args, name, False)
    base_model(trainer).gradient_checkpointing_disable()  # type: ignore[operator]


def put_back(trainer: Any) -> Callable[[], None]:
    """What switches checkpointing on again if it is on now, as `args` ask for it.

    TRL switches it off while it generates, and an error there leaves it off.
    """
    model: Any = base_model(trainer)
    if not getattr(model, "is_activation_checkpointing", False):
        return lambda: None

    def switch_on() -> None:
        if not model.is_activation_checkpointing:
            model.activation_checkpointing_enable(_kwargs(trainer) or None)

    return switch_on


def _kwargs(trainer: Any) -> dict[str, Any]:
    return dict(getattr(trainer.args, "gradient_checkpointing_kwargs", None) or {})
