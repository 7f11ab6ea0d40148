"""bitsandbytes' 8-bit matrix multiplication and dequantization as they allocate on a card."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Quantized = tuple[Tensor, Tensor, Tensor | None]


def vectorwise_quant(a: Tensor, threshold: float = 0.0) -> Quantized:
    """Rows of int8 with a scale each; columns with outliers are looked for, and none is found."""
    scales = a.new_empty(a.numel() // a.shape[-1], dtype=torch.float32)
    codes = a.new_empty(a.shape, dtype=torch.int8)
    if threshold > 0.0:
        found = a.abs() >= threshold
        del found
    return codes, scales, None


def mixed_scaled_mm(
    a: Tensor,
    codes: Tensor,
    weight: Tensor,
    scales: Tensor,
    weight_scales: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, None]:
    """The product in int32, in float16, and in the type of `a` (backends/default/ops.py)."""
    shape = (*codes.shape[:-1], weight.shape[0])
    product = codes.new_empty(shape, dtype=torch.int32)
    half = product.new_empty(shape, dtype=torch.float16)
    out = half.to(a.dtype)
    del product, half
    return out, None


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    state: Any = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Any:
    """`bitsandbytes.matmul` with its choice for CUDA."""
    from bitsandbytes.autograd._functions import MatMul8bitLt

    return MatMul8bitLt.apply(a, b, out, bias, state)


def dequantized(module: Any) -> Any:
    """`peft.utils.integrations.dequantize_module_weight` of modules with fake weights."""
    state = getattr(module, "quant_state", None)
    if state is not None:
        return torch.empty(tuple(state.shape), dtype=state.dtype)
    codes = getattr(getattr(module, "state", None), "CB", None)
    if codes is not None:
        return torch.empty(codes.shape, dtype=torch.float32)
    return module.weight
