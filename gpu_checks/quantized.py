"""A model in 4 bits without a checkpoint: as `from_pretrained` loads it, from weights in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

if TYPE_CHECKING:
    import torch


def to_nf4(model: Any, compute: torch.dtype) -> Any:
    """Quantize `model` in place, layer by layer, as transformers does while it loads one.

    Args:
        model: With its weights; the output layer keeps them.
        compute: What the 4-bit layers compute in.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    weights = {name: weight.data for name, weight in model.named_parameters()}
    quantizer = AutoHfQuantizer.from_config(config)
    quantizer.preprocess_model(model=model, device_map=None)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            weight = weights.pop(f"{name}.weight")  # freed once it is quantized
            # Of a layer that has no weight yet: how it is to be quantized.
            fresh: Any = Params4bit(weight, requires_grad=False, **vars(layer.weight))
            layer.weight = fresh.to(weight.device)  # which quantizes it
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model
