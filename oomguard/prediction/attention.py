"""Which attention kernel a card would run, and what a trace runs in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oomguard.prediction.kernels import up

if TYPE_CHECKING:
    from collections.abc import Callable

    from oomguard.memory.cards import Card

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_FLASH_WIDTH = 256  # check_head_dim_size_flash of sdp_utils.cpp
_MASK_ALIGNMENT = 16  # pad_bias of attention.cpp


def scaled_dot_product_attention(card: Card) -> Callable[..., Any]:
    """`F.scaled_dot_product_attention` with the choice of aten's cuda/sdp_utils.cpp."""
    has_flash = card.capability is None or card.capability >= (8, 0)

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        query, key, value = (_autocast(x) for x in (query, key, value))
        width = query.shape[-1]
        grouped = enable_gqa and key.shape[1] != query.shape[1]
        flash = query.dtype in _HALF and attn_mask is None and width % 8 == 0
        if has_flash and flash and width <= _FLASH_WIDTH and value.shape[-1] == width:
            return _ATEN._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if not grouped:
            return _ATEN._scaled_dot_product_efficient_attention(
                query,
                key,
                value,
                _bias(attn_mask, query, key),
                torch.is_grad_enabled(),
                dropout_p,
                is_causal,
                scale=scale,
            )[0]
        return _ATEN._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]

    return attention


def _autocast(value: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return value
    return value.to(torch.get_autocast_dtype("cpu"))


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The additive mask that the memory-efficient kernel takes."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.empty_like(mask, dtype=query.dtype)  # convert_boolean_attn_mask
    length = mask.shape[-1]
    if length % _MASK_ALIGNMENT:
        missing = up(length, _MASK_ALIGNMENT) - length
        mask = torch.nn.functional.pad(mask, (0, missing))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
