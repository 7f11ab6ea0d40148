"""PiSSA and OLoRA: what their adapters began with was taken out of the base weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from oomguard.levers.activations import peft_model
from oomguard.levers.adapter import trained
from oomguard.retry import off_card

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from oomguard.levers.adapter import Adapter

# Loading a saved adapter takes out, for these, what its rank says, from the weight alone. The
# others cannot be brought down: their data, their dice or their quantization is not kept.
_KNOWN = ("pissa", "olora")
_OTHERS = ("pissa_niter_", "corda", "loftq", "lora_ga")
_ROWS = 1024  # of a base weight that are on the host at a time


class Residuals:
    """What each adapter of a trainer had when training began, on the host.

    The base weight under it holds the rest, W - s * B @ A. Loaded again at a lower rank, PEFT takes
    out less, so the base weight in training has to get that part back. PiSSA (Meng et al., 2024)
    and OLoRA (Büyükakyüz, 2024) order the parts by rank, so it is the last rows and columns.
    """

    def __init__(self, trainer: Any) -> None:
        """Copy the factors of adapters that are at their beginning now."""
        self._kept: dict[tuple[Any, str], tuple[Tensor, Tensor]] = {}
        if not hasattr(peft_model(trainer), "peft_config"):
            return
        for adapter in trained(trainer):
            if init_of(trainer, adapter) in _KNOWN and _is_at_its_beginning(adapter):
                a, b = (factor.detach().cpu().clone() for factor in adapter.factors)
                self._kept[adapter.layer, adapter.key] = a, b

    def refusal(self, trainer: Any, adapter: Adapter) -> str | None:
        """Why the rank of `adapter` cannot be lowered, or `None`."""
        init = init_of(trainer, adapter)
        if init.startswith(_OTHERS):
            return f"init_lora_weights={init!r} ties the base weight to the rank it began with"
        if init in _KNOWN and (adapter.layer, adapter.key) not in self._kept:
            return (
                f"init_lora_weights={init!r} had changed the base weight before the guard saw the "
                "adapter, in a quantized weight or by a training"
            )
        return None

    def give_back(self, adapter: Adapter, rank: int) -> tuple[Tensor, Tensor] | None:
        """Give the base weight what PEFT would not take out of it at `rank`.

        Returns:
            The factors of that part, which the adapter no longer has to hold, in float64: A of
            shape `(rank before - rank, inputs)` and B of `(outputs, rank before - rank)`. `None`
            for an adapter that took nothing.
        """
        kept = self._kept.get((adapter.layer, adapter.key))
        if kept is None:
            return None
        a, b = kept
        for low, high in _halvings(rank, len(a)):
            _add(adapter, a[low:high], b[:, low:high])
        self._kept[adapter.layer, adapter.key] = a[:rank].clone(), b[:, :rank].clone()
        return a[rank:].double(), b[:, rank:].double()


def init_of(trainer: Any, adapter: Adapter) -> str:
    """`LoraConfig.init_lora_weights` in small letters."""
    return str(peft_model(trainer).peft_config[adapter.key].init_lora_weights).lower()


def takes_from_base(init: Any) -> bool:
    """Whether an adapter that is loaded with this `init_lora_weights` changes its base weight."""
    return str(init).lower() in _KNOWN


def _halvings(rank: int, before: int) -> Iterator[tuple[int, int]]:
    """The ranks in between: a resumed run then rounds the weights as the first run had."""
    while before > rank:
        yield max(rank, before // 2), before
        before = max(rank, before // 2)


@torch.no_grad()
def _add(adapter: Adapter, a: Tensor, b: Tensor) -> None:
    """Add scaling * b @ a to the base weight, some rows at a time, in float32 as PEFT does."""
    weight = adapter.layer.get_base_layer().weight.data
    scaling = adapter.layer.scaling[adapter.key]
    # Of a Conv1D the weight is (inputs, outputs).
    left, right = (a.T, b.T) if adapter.layer.fan_in_fan_out else (b, a)
    for start in range(0, len(weight), _ROWS):
        rows = weight[start : start + _ROWS]
        with off_card():
            part = left[start : start + _ROWS].float() @ right.float()
            value = (rows.cpu().float() + scaling * part).to(weight.dtype)
            rows.copy_(value)


@torch.no_grad()
def _is_at_its_beginning(adapter: Adapter) -> bool:
    """Whether base weight and adapter still are what either init makes of one matrix.

    With B of orthogonal columns, B^T @ (W - s * B @ A) is 0 for PiSSA; for OLoRA, whose columns
    have the length 1, it is (1 - s) * A.
    """
    layer, key = adapter.layer, adapter.key
    weight = layer.get_base_layer().weight
    if key not in layer.lora_A or not weight.is_floating_point():
        return False
    a, b = (factor.detach().to(weight.dtype) for factor in adapter.factors)
    seen = b.T @ (weight.T if layer.fan_in_fan_out else weight)
    scaling = layer.scaling[key]
    tolerance = max(4 * torch.finfo(weight.dtype).eps, 1e-4) * b.norm() * weight.norm()
    off = min(float(seen.norm()), float((seen - (1 - scaling) * a).norm()))
    return off <= float(tolerance)
