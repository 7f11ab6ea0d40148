"""A model without memory: shapes alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from oomguard.prediction.settings import Settings


def meta_model(config: PretrainedConfig, settings: Settings) -> Any:
    """The model of a configuration on the meta device, with a configuration of its own."""
    own = copy.deepcopy(config)
    own.use_cache = False
    with torch.device("meta"), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(
            own,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attn_implementation,
        )
    model.tie_weights()  # which is left out with the initialization
    return model
