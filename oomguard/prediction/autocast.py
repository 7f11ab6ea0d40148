"""Autocast as on CUDA, for fake tensors of the host, whose autocast has other lists of ops."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

_HALF = (torch.bfloat16, torch.float16)
# What code of models calls of AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE of autocast_mode.h.
_FLOAT32: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (torch, ("pow", "rsqrt", "exp", "log", "cumsum", "norm", "layer_norm", "group_norm")),
    (Tensor, ("pow", "__pow__", "rsqrt", "exp", "log", "cumsum", "norm")),
    (functional, ("layer_norm", "group_norm", "softplus")),
    (functional, ("cross_entropy", "nll_loss", "mse_loss")),
)


def patch(put: Callable[..., None]) -> None:
    """Where autocast is on, run in float32 what CUDA's autocast runs in float32."""
    for owner, names in _FLOAT32:
        put(owner, **{name: _in_float32(getattr(owner, name)) for name in names})


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(_float32(item) for item in args)
            kwargs = {name: _float32(item) for name, item in kwargs.items()}
        return function(*args, **kwargs)

    return wrapped


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _HALF:
        return value.float()
    return value
