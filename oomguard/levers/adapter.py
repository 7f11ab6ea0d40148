"""The LoRA adapters of a live trainer: which are trained, and freezing some of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from peft.tuners.lora import LoraLayer

from oomguard.levers.activations import peft_model

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """One trained LoRA adapter of one module.

    Attributes:
        path: Of the module inside the model, as `named_modules` gives it.
        layer: PEFT's layer.
        key: Name of the adapter, usually `"default"`.
    """

    path: str
    layer: Any
    key: str

    @property
    def target(self) -> str:
        """The module's own name, as `LoraConfig.target_modules` lists it."""
        return self.path.rpartition(".")[2]

    @property
    def rank(self) -> int:
        """Its rank."""
        return int(self.layer.r[self.key])

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A of shape `(rank, inputs)` and B of shape `(outputs, rank)`."""
        if self.key in self.layer.lora_A:
            return self.layer.lora_A[self.key].weight, self.layer.lora_B[self.key].weight
        return self.layer.lora_embedding_A[self.key], self.layer.lora_embedding_B[self.key]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained of it: its factors, DoRA's magnitudes, its bias."""
        return [
            parameter
            for name, parameter in self.layer.named_parameters()
            if parameter.requires_grad
            and name.split(".")[0] in self.layer.adapter_layer_names
            and self.key in name.split(".")
        ]


def trained(trainer: Any) -> list[Adapter]:
    """Every trained LoRA adapter, in the order of the model's modules."""
    adapters = [
        Adapter(path, module, key)
        for path, module in peft_model(trainer).named_modules()
        if isinstance(module, LoraLayer)
        for key in module.r
    ]
    return [adapter for adapter in adapters if adapter.parameters]


def targets(trainer: Any) -> tuple[str, ...] | None:
    """`Plan.target_modules`: names of the modules with trained adapters, largest first."""
    sizes: Counter[str] = Counter()
    for adapter in trained(trainer):
        sizes[adapter.target] += sum(p.numel() for p in adapter.parameters)
    return tuple(sorted(sizes, key=lambda name: (-sizes[name], name))) or None


def largest_rank(trainer: Any) -> int | None:
    """`Plan.lora_r`: the largest rank of a trained adapter."""
    return max((adapter.rank for adapter in trained(trainer)), default=None)


def refusal(trainer: Any, kept: Collection[str]) -> str | None:
    """Why adapters of modules not in `kept` cannot be frozen, or `None`."""
    if hasattr(trainer, "ref_model") and trainer.ref_model is None:
        return (
            f"{type(trainer).__name__} without a ref_model switches all adapters off and on again "
            "for its reference, which would unfreeze them"
        )
    adapters = trained(trainer)
    stay = {id(p) for a in adapters if a.target in kept for p in a.parameters}
    go = {id(p) for a in adapters if a.target not in kept for p in a.parameters}
    if not stay:
        return "no adapter would be left to train"
    if stay & go:
        return "adapters of different modules share weights"
    return None


def freeze(trainer: Any, kept: Collection[str]) -> list[nn.Parameter]:
    """Stop training the adapters of modules not in `kept`; returns their parameters.

    What they learned stays in the model's function and in the saved adapter. Groups of the
    optimizer stay too, even empty ones: learning rates are scheduled group by group.
    """
    frozen = [p for a in trained(trainer) if a.target not in kept for p in a.parameters]
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    optimizer = inner_optimizer(trainer)
    if optimizer is not None:
        _forget(optimizer, frozen)
    return frozen


def inner_optimizer(trainer: Any) -> Any:
    """The optimizer inside accelerate's wrapper; `None` before there is one."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def _forget(optimizer: Any, parameters: Iterable[Tensor]) -> None:
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for parameter in [p for p in cast("Any", optimizer.state) if id(p) in gone]:
        del optimizer.state[parameter]
