"""What a live trainer trains, where a plan cannot say it: a head besides LoRA, some layers, IA3."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from oomguard.levers.activations import base_model, peft_model
from oomguard.levers.adapter import trained
from oomguard.prediction.layers import layer_list, within

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from oomguard.plan import Plan

_PREFIX = "base_model.model."  # of the names inside PEFT's wrapper
_LORA = ".lora_"


@dataclass(frozen=True)
class Tuning:
    """What is trained of a model, and how.

    Attributes:
        config: PEFT's configuration; `None` without adapters.
        adapter: The name of the adapter.
        ranks: Of every module with a trained LoRA adapter, by its path in the model.
        shapes: Of every parameter that is trained, by its name.
    """

    config: Any
    adapter: str
    ranks: dict[str, int]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, trainer: Any) -> Tuning | None:
        """What a live trainer trains; `None` where a plan says it.

        That is LoRA of one rank on the same modules of every layer, or all weights.
        """
        model = peft_model(trainer)
        parameters = dict(model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in parameters.items() if p.requires_grad}
        name, config = next(iter(getattr(model, "peft_config", {}).items()), ("", None))
        ranks = {found.path.removeprefix(_PREFIX): found.rank for found in trained(trainer)}
        if config is None:
            told = len(shapes) == len(parameters)
        else:
            told = len(set(ranks.values())) == 1 and all(_LORA in name for name in shapes)
            told = told and not getattr(config, "target_parameters", None)
            told = told and _in_every_layer(base_model(trainer), shapes)
        return None if told else cls(config, name, ranks, shapes)

    @property
    def one_rank(self) -> bool:
        """Whether its adapters, if any, are of one rank."""
        return len(set(self.ranks.values())) <= 1

    @property
    def others(self) -> int:
        """Trained numbers that are not LoRA's."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if _LORA not in name)

    def layers(self, path: str) -> dict[int, list[Any]]:
        """What is trained of each layer of the list at `path`, by index."""
        return _by_layer(self.shapes, path)

    def wrapped(self, model: Any, plan: Plan, deep_name: Callable[[str], str]) -> Any:
        """`model` with the adapters that `plan` leaves, ready to be trained.

        Args:
            model: The model, shortened or not.
            plan: Of which ranks and targets count.
            deep_name: The name in the whole model of what has a name in `model`.
        """
        if self.config is not None:
            import peft

            config = copy.deepcopy(self.config)
            if isinstance(config, LoraConfig):
                self._place(config, model, plan, deep_name)
            model = peft.get_peft_model(model, config, adapter_name=self.adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(deep_name(name) in self.shapes)
        return model

    def _place(
        self, config: Any, model: nn.Module, plan: Plan, deep_name: Callable[[str], str]
    ) -> None:
        """Name each module of `model` that has an adapter, whichever pattern chose it."""
        largest = max(self.ranks.values())
        most = plan.lora_r or largest

        def lowered(rank: int) -> int:
            return most if rank == largest else min(rank, most)

        # Other values, the same memory: random numbers of fake tensors cost time.
        config.init_lora_weights = False
        config.r = lowered(config.r)
        if getattr(config, "target_parameters", None):  # whose adapters are not of one module each
            ranks = config.rank_pattern.items()
            config.rank_pattern = {pattern: lowered(rank) for pattern, rank in ranks}
            return
        found = {}
        for path, _ in model.named_modules():
            rank = self.ranks.get(deep_name(path))
            if rank is not None and path.rpartition(".")[2] in (plan.target_modules or ()):
                found[path] = lowered(rank)
        config.target_modules, config.rank_pattern, config.alpha_pattern = list(found), found, {}
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _by_layer(shapes: dict[str, tuple[int, ...]], path: str) -> dict[int, list[Any]]:
    found = defaultdict[int, list[Any]](list)
    for name, shape in shapes.items():
        place = within(name, path)
        if place is not None:
            found[place.layer].append((place.rest, shape))
    return found


def _in_every_layer(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the same is trained of every layer, or of none."""
    listed = layer_list(model)
    if listed is None:
        return True
    path, layers = listed
    found = _by_layer(shapes, path)
    return not found or all(found[i] == found[0] for i in range(len(layers)))
