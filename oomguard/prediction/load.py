"""A model as `from_pretrained` leaves it on a card, in fake tensors, in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

try:
    from transformers.quantizers.base import get_keys_to_not_convert
except ImportError:  # transformers 4
    from transformers.integrations.bitsandbytes import (  # type: ignore[attr-defined,no-redef]
        get_keys_to_not_convert,
    )

from oomguard.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from oomguard.prediction.recorder import Recorder
    from oomguard.prediction.settings import Settings

_BLOCK = 64  # bitsandbytes' blocksize on CUDA
_SCALE_BLOCK = 256  # of double quantization
Slot = tuple[str, nn.Module, str, nn.Parameter]
_PACKED = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}


def load(
    model: nn.Module,
    settings: Settings,
    recorder: Recorder,
    layer_of: Callable[[str], int | None],
    warm_bytes: int,
) -> None:
    """Give the meta tensors of `model` fake memory, and quantize what bitsandbytes would.

    Args:
        model: On the meta device.
        settings: How it is loaded.
        recorder: Whose `layer` is kept at the layer that is loaded.
        layer_of: The layer that a parameter's name belongs to.
        warm_bytes: The block by which transformers warms the allocator up before it loads.
    """
    quantized = quantize_modules(model, settings.quantization) if settings.is_quantized else set()
    if warm_bytes:
        recorder.free(recorder.allocate(warm_bytes, "warm-up"))
    made: dict[int, nn.Parameter] = {}
    for path, module, name, parameter in slots(model):
        recorder.layer = layer_of(path)
        if path in quantized:
            weight = _quantized(module, parameter, settings)
        else:
            if id(parameter) not in made:
                data = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(data, requires_grad=False)
            weight = made[id(parameter)]
        module._parameters[name] = weight
    recorder.layer = None
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def slots(model: nn.Module) -> list[Slot]:
    """Every place of a parameter, tied ones too, in the order of `from_pretrained`."""
    found = [
        (f"{path}.{name}" if path else name, module, name, parameter)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    return sorted(found, key=lambda slot: _natural(slot[0]))


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in path.split(".")]


def loaded_bytes(model: Any, settings: Settings) -> int:
    """What `get_total_byte_count` of transformers counts for the whole model."""
    packed = {id(weight) for weight in quantized_weights(model, settings)}
    one = _PACKED.get(settings.quantization, 1.0)
    return int(
        sum(p.numel() * (one if id(p) in packed else p.element_size()) for p in model.parameters())
    )


def quantized_weights(model: Any, settings: Settings) -> list[nn.Parameter]:
    """The weights that are quantized on loading."""
    if not settings.is_quantized:
        return []
    kept = set(get_keys_to_not_convert(model))
    return [
        module.weight for path, module in model.named_modules() if _converts(path, module, kept)
    ]


def _converts(path: str, module: nn.Module, kept: set[str]) -> bool:
    if not (type(module) is nn.Linear or isinstance(module, Conv1D)):
        return False
    return not any(path == name or path.endswith(f".{name}") for name in kept)


def quantize_modules(model: Any, quantization: str) -> set[str]:
    """Put bitsandbytes' modules in; the paths of the weights that are quantized."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        msg = f"quantization={quantization!r} needs bitsandbytes: pip install bitsandbytes"
        raise ConfigurationError(msg) from error
    kept, paths = set(get_keys_to_not_convert(model)), set()
    for path, module in list(model.named_modules()):
        if not _converts(path, module, kept):
            continue
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            module.weight = nn.Parameter(module.weight.T, requires_grad=False)
        else:
            inputs, outputs = module.in_features, module.out_features
        new = _linear_8bit(bnb) if quantization == "int8" else _linear_4bit(bnb, module)
        new.in_features, new.out_features = inputs, outputs
        new.weight, new.bias = module.weight, module.bias
        model.set_submodule(path, new)
        paths.add(f"{path}.weight")
    model.is_quantized = True
    setattr(model, f"is_loaded_in_{8 if quantization == 'int8' else 4}bit", True)
    return paths


def _linear_4bit(bnb: Any, module: Any) -> Any:
    """The real module without its parameter class, which cannot hold fake tensors."""
    new = bnb.nn.Linear4bit.__new__(bnb.nn.Linear4bit)
    nn.Module.__init__(new)
    new.compute_dtype = torch.float16 if module.weight.dtype == torch.float16 else torch.bfloat16
    new.compute_type_is_set, new.quant_storage = True, torch.uint8
    new.support_avx512bf16_for_cpu, new.quant_state = False, None
    return new


def _linear_8bit(bnb: Any) -> Any:
    new = bnb.nn.Linear8bitLt.__new__(bnb.nn.Linear8bitLt)
    nn.Module.__init__(new)
    new.state, new.index = bnb.MatmulLtState(), None
    # llm_int8_threshold and llm_int8_has_fp16_weight of BitsAndBytesConfig, by default.
    new.state.threshold, new.state.has_fp16_weights, new.state.use_pool = 6.0, False, True
    return new


def _quantized(module: Any, parameter: nn.Parameter, settings: Settings) -> nn.Parameter:
    if settings.quantization == "int8":
        return _quantized_8bit(module, parameter)
    return _quantized_4bit(module, parameter, settings)


def _quantized_8bit(module: Any, parameter: nn.Parameter) -> nn.Parameter:
    """Int8Params._quantize: beside what was loaded it in float16, then a scale a row, int8."""
    loaded = torch.empty(parameter.shape, dtype=parameter.dtype)
    half = torch.empty(parameter.shape, dtype=torch.float16)
    scales = torch.empty(parameter.shape[0], dtype=torch.float32)
    codes = torch.empty(parameter.shape, dtype=torch.int8)
    del half
    del loaded
    weight: Any = nn.Parameter(codes, requires_grad=False)
    weight.CB, weight.SCB, weight.has_fp16_weights = None, None, False
    module.state.CB, module.state.SCB = weight.data, scales
    return weight  # type: ignore[no-any-return]


def _quantized_4bit(module: Any, parameter: nn.Parameter, settings: Settings) -> nn.Parameter:
    """`bitsandbytes.functional.quantize_4bit`, in its order of allocations."""
    from bitsandbytes.functional import QuantState

    count, kind = parameter.numel(), settings.quantization
    blocks = -(-count // _BLOCK)
    loaded = torch.empty(parameter.shape, dtype=parameter.dtype)
    absmax = torch.empty(blocks)
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8)
    code = torch.empty(16)
    common: dict[str, Any] = {
        "shape": torch.Size(parameter.shape),
        "code": code,
        "blocksize": _BLOCK,
        "quant_type": kind,
        "dtype": parameter.dtype,
    }
    if settings.double_quant:
        offset, centred = torch.empty(()), torch.empty(blocks)
        scales = torch.empty(-(-blocks // _SCALE_BLOCK))
        codes, code2 = torch.empty(blocks, dtype=torch.uint8), torch.empty(256)
        nested = QuantState(absmax=scales, code=code2, blocksize=_SCALE_BLOCK, dtype=torch.float32)
        state = QuantState(absmax=codes, offset=offset, state2=nested, **common)
        del centred, absmax
    else:
        state = QuantState(absmax=absmax, **common)
    del loaded
    weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.quant_state, weight.blocksize, weight.quant_type = state, _BLOCK, kind
    weight.compress_statistics, weight.quant_storage = settings.double_quant, torch.uint8
    weight.bnb_quantized = True
    module.quant_state = state
    return weight  # type: ignore[no-any-return]
