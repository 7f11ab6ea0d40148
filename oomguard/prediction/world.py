"""A process that looks as if it trained on a card, for the length of a trace."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from oomguard.prediction import autocast, int8
from oomguard.prediction.attention import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oomguard.memory.cards import Card

_MISSING = object()


@contextmanager
def patched(target: Any, **values: Any) -> Iterator[None]:
    """Attributes of `target` have these values inside."""
    before = {name: vars(target).get(name, _MISSING) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                delattr(target, name)
            else:
                setattr(target, name, value)


@contextmanager
def world(
    card: Card, *, padded: bool, packed: bool, on_chunk: Callable[[], None]
) -> Iterator[None]:
    """Code inside decides as it would on `card`, while its fake tensors say that they are host's.

    Fake tensors of a CUDA device cannot go through autograd where PyTorch is built without CUDA;
    those of the host can, everywhere. What would choose by device is answered for the card.

    Args:
        card: Which card.
        padded: Whether masks are in force.
        packed: Whether rows hold several documents.
        on_chunk: Called at the beginning of every chunk of tokens in TRL's language-model head.
    """
    import torch.utils.checkpoint as checkpoint
    from transformers import masking_utils, modeling_utils

    with ExitStack() as stack:

        def put(target: Any, **values: Any) -> None:
            stack.enter_context(patched(target, **values))

        # A fake tensor counts as tracing, under which masks are never left out: right for packed
        # rows, whose documents do not see each other, and for no others.
        if hasattr(masking_utils, "is_tracing"):  # not in transformers 4
            put(masking_utils, is_tracing=lambda *_: packed, fast_all=lambda *_: not padded)
        put(nn.Module, _apply=_apply)
        put(FakeTensor, __deepcopy__=_copy)
        put(checkpoint, get_device_states=lambda *_: ([], []))
        put(checkpoint, set_device_states=lambda *_, **__: None)
        if not card.is_host:
            # Whose autocast a checkpoint brings back; without one, DoRA's passes differ in types.
            device = checkpoint.DefaultDeviceType
            stack.callback(device.set_device_type, device.get_device_type())
            device.set_device_type("cuda")
            put(modeling_utils, save_on_cpu=_OnHost)
            attention = scaled_dot_product_attention(card)
            put(nn.functional, scaled_dot_product_attention=attention, dropout=_dropout)
            put(torch, dropout=_dropout, autocast=Autocast)
            put(torch.amp, autocast=Autocast)
            put(torch.amp.autocast_mode, autocast=Autocast)
            autocast.patch(put)
            if find_spec("trl.kernels") is not None:  # older ones make the whole logits
                _triton(put, _NoKernel(on_chunk))
            if find_spec("bitsandbytes") is not None:
                _quantized(put)
        yield


class Autocast:
    """`torch.autocast` that takes every device; entered, it sets the same state."""

    def __init__(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        self._device, self._enabled, self._cache = device_type, enabled, cache_enabled
        self._dtype = dtype or torch.get_autocast_dtype(device_type)

    def __enter__(self) -> None:
        device, cache = self._device, torch.is_autocast_cache_enabled()
        self._before = (
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            cache,
        )
        torch.set_autocast_enabled(device, self._enabled)
        torch.set_autocast_dtype(device, self._dtype)
        torch.autocast_increment_nesting()
        torch.set_autocast_cache_enabled(cache if self._cache is None else self._cache)

    def __exit__(self, *_: object) -> None:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        enabled, dtype, cache = self._before
        torch.set_autocast_enabled(self._device, enabled)
        torch.set_autocast_dtype(self._device, dtype)
        torch.set_autocast_cache_enabled(cache)


class _OnHost(torch.autograd.graph.saved_tensors_hooks):
    """`save_on_cpu`: what is saved leaves the card, and a copy comes back."""

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        super().__init__(
            lambda tensor: (tensor.shape, tensor.dtype),
            lambda packed: torch.empty(packed[0], dtype=packed[1]),
        )


def _dropout(
    input: Any,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Any:
    """CUDA's fused dropout keeps a mask of one byte for each element."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _copy(tensor: FakeTensor, memo: dict[int, Any]) -> Any:
    """A copy whose views are of its own storage; those of PyTorch's copy are not."""
    data: Any = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        data = nn.Parameter(data, tensor.requires_grad)
    memo[id(tensor)] = data
    return data


def _apply(module: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
    """`Module._apply` without its exchange of tensors, which weak references forbid."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                data = fn(parameter)
            if data is not parameter:
                module._parameters[name] = nn.Parameter(data, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _quantized(put: Callable[..., None]) -> None:
    import bitsandbytes
    import peft.tuners.lora.dora
    import peft.tuners.lora.layer

    put(bitsandbytes, matmul=int8.matmul)
    for module in (peft.tuners.lora.dora, peft.tuners.lora.layer):
        put(module, dequantize_module_weight=int8.dequantized)


class _NoKernel:
    """A Triton kernel that is launched and does nothing."""

    def __init__(self, on_chunk: Callable[[], None]) -> None:
        self._on_chunk = on_chunk

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launched

    def _launched(self, *args: Any, **_: Any) -> None:
        vocab_start = args[-2]  # behind it: how many columns
        if vocab_start == 0:
            self._on_chunk()


def _addmm_fp32(acc: Any, a: Any, b: Any) -> None:
    """`acc += a @ b`, for which cuBLAS reads half precision and writes float32 in place."""


def _triton(put: Callable[..., None], kernel: _NoKernel) -> None:
    """TRL's language-model head as it runs with Triton."""
    import trl.kernels.chunked_logprob as head
    import trl.trainer.utils as utils

    put(head, _forward_kernel=kernel, _backward_kernel=kernel)
    put(head, _use_triton=lambda *_: True, _addmm_fp32=_addmm_fp32)
    put(head, triton=SimpleNamespace(cdiv=lambda one, other: -(-one // other)))
    put(utils, _use_triton=lambda *_: True)
