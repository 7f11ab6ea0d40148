"""Moments that optimizers keep for a parameter: read them, map them, write them, in any format.

A bitsandbytes optimizer keeps a moment either in float32 or in 8 bits: blocks of 256 values, each
value an index into a map of 256 numbers, times the largest absolute value of its block.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from oomguard import oom
from oomguard.levers import paging
from oomguard.memory import device
from oomguard.retry import FORGIVEN, again, off_card, release_at_most

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

T = TypeVar("T")

BLOCK = 256  # values that share a scale: Optimizer2State.init_state
_CHUNK = 2**20  # values converted at a time, whole blocks: bounds the temporaries

_LINEAR = ("exp_avg", "momentum_buffer", "state1")
_SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "state2")
_SCALES = ("qmap1", "qmap2", "absmax1", "absmax2")


def is_bitsandbytes(optimizer: Any) -> bool:
    """Whether it is one of bitsandbytes, whose states are named differently."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def refusal(optimizer: Any) -> str | None:
    """Why its moments cannot be mapped linearly, or `None`."""
    name = type(optimizer).__name__
    if is_bitsandbytes(optimizer) and getattr(optimizer, "optimizer_name", None) != "adam":
        return f"what bitsandbytes {name} keeps of a weight has no counterpart at another rank"
    known = {*_LINEAR, *_SQUARED, *_SCALES, "step"}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1 and key not in known:
                return f"{name} keeps {key} of a weight, which has no counterpart at another rank"
    return None


def read(state: dict[str, Any], key: str) -> Tensor:
    """A moment on the host in float32."""
    value = state[key].detach()
    with off_card():
        if value.dtype != torch.uint8:
            host: Tensor = value.to("cpu", torch.float32, copy=True)
            return host
        from bitsandbytes import functional

        scale, code = state[f"absmax{key[-1]}"].cpu(), state[f"qmap{key[-1]}"].cpu()
        values: Tensor = functional.dequantize_blockwise(
            value.cpu(), absmax=scale, code=code, blocksize=BLOCK
        )
        return values.float()


def project(
    optimizer: Any,
    parameter: Tensor,
    old: dict[str, Any],
    left: Tensor | None,
    right: Tensor | None,
) -> None:
    """Set the moments of `parameter` to those that `old` holds, mapped to its new shape.

    Args:
        optimizer: The inner optimizer; what it holds for `parameter` is replaced.
        parameter: Has its new shape already.
        old: The state for its former shape, on the host where it is a moment: see `to_host`.
        left: `(new rows, old rows)`: multiplies from the left. `None`: rows stay.
        right: `(old columns, new columns)`: multiplies from the right. `None`: columns stay.
    """
    state: dict[str, Any] = {}
    for key, value in old.items():
        if key in _SCALES:
            continue
        if key in _LINEAR or key in _SQUARED:
            squared = key in _SQUARED
            state[key] = _product(value, left, right, squared=squared)
        else:
            state[key] = value
    optimizer.state[parameter] = {}
    if "state1" in state:
        write(optimizer, parameter, state, quantized="qmap1" in old, like=old)
        return
    for key, value in state.items():
        is_moment = key in _LINEAR or key in _SQUARED
        optimizer.state[parameter][key] = put(value, parameter) if is_moment else value


def to_host(state: dict[str, Any]) -> dict[str, Any]:
    """A state with its moments on the host in float32; the rest as it is."""
    return {k: read(state, k) if k in _LINEAR or k in _SQUARED else v for k, v in state.items()}


def put(value: Tensor, parameter: Tensor) -> Tensor:
    """`value` where `parameter` is and in its type, trying again while memory is released."""
    make = partial(torch.empty, value.shape, dtype=parameter.dtype, device=parameter.device)
    return retried(make).copy_(value)


def write(
    optimizer: Any, parameter: Tensor, moments: dict[str, Any], *, quantized: bool, like: Any
) -> None:
    """Give a bitsandbytes optimizer float32 moments of the host, in 8 bits if `quantized`."""
    dtype = torch.uint8 if quantized else torch.float32
    state = optimizer.state[parameter]
    state["step"] = moments["step"]
    for number in (1, 2):
        buffer = partial(optimizer.get_state_buffer, parameter, dtype=dtype)
        state[f"state{number}"] = paging.own(retried(buffer))
        if quantized:
            blocks = -(-parameter.numel() // BLOCK)
            make = partial(torch.zeros, (blocks,), device=parameter.device)
            state[f"absmax{number}"] = retried(make)
            state[f"qmap{number}"] = like[f"qmap{number}"]
    fill(state, moments["state1"], moments["state2"])


def fill(state: dict[str, Any], first: Tensor, second: Tensor) -> None:
    """Write both moments into the buffers of a bitsandbytes state, whatever their format."""
    if state["state1"].dtype != torch.uint8:
        state["state1"].copy_(first)
        state["state2"].copy_(second)
        return
    first, second = first.reshape(-1), second.reshape(-1)
    for start in range(0, first.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        try:
            _fill_chunk(state, start, first[part], second[part])
        except (RuntimeError, MemoryError) as error:
            oom.caught(error)
        else:
            continue
        device.release_cached()
        _fill_chunk(state, start, first[part].cpu(), second[part].cpu())


def _fill_chunk(state: dict[str, Any], start: int, first: Tensor, second: Tensor) -> None:
    from bitsandbytes import functional

    first, second = first.float(), second.float()
    quantize, dequantize = functional.quantize_blockwise, functional.dequantize_blockwise
    code2 = state["qmap2"].to(second.device)
    rounded, scale = quantize(second, code=code2, blocksize=BLOCK)
    # A second moment that rounds to 0 would leave the whole first one as the update.
    zero = dequantize(rounded, absmax=scale.absmax, code=code2, blocksize=BLOCK) == 0
    _store(state, 2, start, rounded, scale.absmax)
    first = first.masked_fill(zero, 0)
    rounded, scale = quantize(first, code=state["qmap1"].to(first.device), blocksize=BLOCK)
    _store(state, 1, start, rounded, scale.absmax)


def _store(state: dict[str, Any], number: int, start: int, rounded: Tensor, scale: Tensor) -> None:
    values, scales = state[f"state{number}"].view(-1), state[f"absmax{number}"]
    # Paged buffers count as the host's.
    values[start : start + rounded.numel()] = rounded.to(values.device)
    block = start // BLOCK
    scales[block : block + scale.numel()] = scale.to(scales.device)


def _product(value: Tensor, left: Tensor | None, right: Tensor | None, *, squared: bool) -> Tensor:
    """The moment of the mapped gradient; second moments as if its entries were uncorrelated."""
    with off_card():
        result = value.double()
        if left is not None:
            result = (left.square() if squared else left) @ result
        if right is not None:
            result = result @ (right.square() if squared else right)
        return result.float()


def retried(action: Callable[[], T]) -> T:
    """`action()`, tried up to three times, each time from an empty cache."""
    return again(release_at_most(FORGIVEN), action)
