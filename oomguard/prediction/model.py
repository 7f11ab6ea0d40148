"""A model without memory: shapes alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import (  # type: ignore[attr-defined,no-redef]
        no_init_weights,
    )

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from oomguard.prediction.settings import Settings


def has_sdpa(config: PretrainedConfig) -> bool:
    """Whether the model runs with `attn_implementation="sdpa"`; transformers takes eager else."""
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return True
    return bool(getattr(model_class, "_supports_sdpa", True))


def meta_model(config: PretrainedConfig, settings: Settings) -> Any:
    """The model of a configuration on the meta device, with a configuration of its own."""
    own = copy.deepcopy(config)
    own.use_cache = False
    dtype = getattr(torch, settings.dtype)
    attention = settings.attn_implementation if has_sdpa(config) else "eager"
    with torch.device("meta"), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(
            own, dtype=dtype, attn_implementation=attention
        )
    model.tie_weights()  # which is left out with the initialization
    return model
