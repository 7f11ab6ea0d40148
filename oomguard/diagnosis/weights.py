"""The weights of a model as numbers: what they take, and what training them takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from oomguard.levers.activations import peft_model
from oomguard.levers.adapter import inner_optimizer
from oomguard.levers.optimizer import optim_name

if TYPE_CHECKING:
    from collections.abc import Iterator

# Adam's two moments take the type of the weight, as `torch.zeros_like` gives it.
_ADAMW_OF_TORCH = frozenset({"adamw_torch", "adamw_torch_fused", "adamw_torch_xla"})
# bitsandbytes keeps them in float32, whatever the weight is.
_ADAMW_IN_32_BITS = frozenset({"paged_adamw", "paged_adamw_32bit"})
# What bitsandbytes' optimizers take in 8 bits: blocks of 256 values with one float32 each, in
# tensors of at least 4096 elements (`min_8bit_size`).
_BLOCK, _SMALLEST = 256, 4096


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: As `named_parameters` gives it.
        numel: Its elements; those of a quantized one are packed.
        dtype: Their type.
        trained: Whether it gets a gradient.
        adapter: Whether PEFT has added it.
        embedding: Whether it is the weight of an embedding.
        matrix: Whether it is multiplied with: it has rows and columns and is no embedding.
    """

    name: str
    numel: int
    dtype: torch.dtype
    trained: bool
    adapter: bool
    embedding: bool
    matrix: bool

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.numel * self.dtype.itemsize

    @property
    def eight_bit_state_bytes(self) -> int:
        """What Adam's moments of it take in bitsandbytes' 8-bit AdamW.

        Small tensors and, as the Trainer has it, embeddings stay in float32 (`_BLOCK` above, and
        `Trainer.create_optimizer`).
        """
        if self.embedding or self.numel < _SMALLEST:
            return 8 * self.numel
        return 2 * (self.numel + 4 * -(-self.numel // _BLOCK))


def read(trainer: Any) -> tuple[Weight, ...]:
    """All parameters of the trainer's model, tied ones once."""
    model = peft_model(trainer)
    added = _added_by_peft(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return tuple(
        Weight(
            name=name,
            numel=p.numel(),
            dtype=p.dtype,
            trained=p.requires_grad,
            adapter=any(part in name for part in added),
            embedding=id(p) in embeddings,
            matrix=p.dim() > 1 and id(p) not in embeddings,
        )
        for name, p in model.named_parameters()
    )


def _added_by_peft(model: Any) -> tuple[str, ...]:
    """Parts of the names of the parameters that PEFT has added; none without PEFT."""
    if not hasattr(model, "peft_config"):
        return ()
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)  # as in "lora_"
    return (prefix or "lora_", "modules_to_save", "trainable_tokens", "prompt_encoder")


def moments_itemsize(trainer: Any) -> int | None:
    """Bytes of one number of Adam's moments; 0: that of the weight. `None`: it is no such AdamW."""
    optimizer = inner_optimizer(trainer)
    if optimizer is not None:
        return 0 if type(optimizer) in {torch.optim.Adam, torch.optim.AdamW} else None
    name = optim_name(trainer.args)
    if name in _ADAMW_OF_TORCH:
        return 0
    return 4 if name in _ADAMW_IN_32_BITS else None


def state_bytes(weight: Weight, itemsize: int | None) -> int:
    """What Adam's two moments of a trained weight take; 0 where they are not known."""
    if itemsize is None or not weight.trained:
        return 0
    return 2 * weight.numel * (itemsize or weight.dtype.itemsize)


def base(weights: tuple[Weight, ...]) -> Iterator[Weight]:
    """The weights of the model itself, in the types that are multiplied with."""
    return (weight for weight in weights if not weight.adapter and weight.dtype.is_floating_point)
