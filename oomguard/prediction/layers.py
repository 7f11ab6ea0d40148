"""Which layers of a model are alike, so that a few of them can stand for all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PretrainedConfig

# The first unit, one before the cloned one, the cloned one, one behind it, the last.
UNITS = 5
_CLONED = 2
_LONGEST_PERIOD = 8


@dataclass(frozen=True)
class Cut:
    """A shorter model that stands for a deep one.

    Attributes:
        path: Of the list of layers inside the model.
        kept: Indices of the layers that are traced.
        unit: The unit of each of them, from 0.
        cloned: The unit to repeat.
        times: How often the cloned unit stands in the deep model; 1 where nothing is left out.
    """

    path: str
    kept: tuple[int, ...]
    unit: tuple[int, ...]
    cloned: int
    times: int

    def unit_of(self, name: str) -> int | None:
        """The unit that what has this name in the shorter model belongs to."""
        place = within(name, self.path)
        return None if place is None else self.unit[place.layer]

    def deep_name(self, name: str) -> str:
        """The name in the deep model of what has this name in the shorter one."""
        place = within(name, self.path)
        if place is None:
            return name
        return f"{place.layers}.{self.kept[place.layer]}{place.rest}"


class Place(NamedTuple):
    """Where in a list of layers something is.

    Attributes:
        layers: The name of the list.
        layer: The index in it.
        rest: The name inside the layer, a dot before it; empty for the layer itself.
    """

    layers: str
    layer: int
    rest: str


def within(name: str, path: str) -> Place | None:
    """Where in the list of layers at `path`, whatever wraps it, a name is; `None` outside."""
    found = re.match(rf"((?:.+\.)?{re.escape(path)})\.(\d+)((?:\..+)?)$", name)
    return Place(found[1], int(found[2]), found[3]) if found else None


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The list of layers that hold the most parameters, and its path."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _is_outer(name)
    ]
    if not lists:
        return None
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _is_outer(name: str) -> bool:
    return re.search(r"\.\d+\.", f".{name}.") is None


def cut(
    model: nn.Module,
    text: Any,
    every: int = 1,
    trained: Callable[[str], Mapping[int, Any]] | None = None,
) -> Cut | None:
    """How to shorten `model`.

    Args:
        model: On the meta device, of full depth.
        text: The configuration of its language model.
        every: Layers that belong together because they share one checkpoint.
        trained: What is trained of each layer of the list at a path, by index.

    Returns:
        The cut; `None` where the model has no list of layers.
    """
    found = layer_list(model)
    if found is None:
        return None
    path, layers = found
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    told = trained(path) if trained else {}
    signs = [
        (_signature(layer, kind), told.get(index))
        for index, (layer, kind) in enumerate(zip(layers, types, strict=False))
    ]
    depth = len(signs)
    for period in range(every, _LONGEST_PERIOD * every + 1, every):
        lead = _lead(signs, period)
        lead += -lead % every
        units = (depth - lead) // period
        if units <= UNITS:
            continue
        left = (depth - lead) % period
        body = [*range(lead + UNITS * period), *range(depth - left, depth)]
        lone = [*range(lead)]
        unit = [
            i if i < lead else min(lead + (i - lead) // period, lead + UNITS - 1)
            for i in range(len(body))
        ]
        if len(body) < depth:
            return Cut(path, tuple(body), tuple(unit), len(lone) + _CLONED, units - UNITS + 1)
    return Cut(path, tuple(range(depth)), tuple(range(depth)), 0, 1)


def _signature(layer: nn.Module, kind: Any) -> tuple[Any, ...]:
    shapes = tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters())
    return kind, type(layer), shapes


def _lead(signs: list[tuple[Any, ...]], period: int) -> int:
    """Layers at the start that do not repeat themselves."""
    lead = len(signs) - period
    while lead > 0 and signs[lead - 1] == signs[lead - 1 + period]:
        lead -= 1
    return max(lead, 0)


def shorten(model: nn.Module, config: PretrainedConfig, by: Cut) -> None:
    """Leave only the kept layers in `model`."""
    parent, _, name = by.path.rpartition(".")
    layers: Any = model.get_submodule(by.path)
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers[i] for i in by.kept))
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = len(by.kept)
    if kinds:
        text.layer_types = [kinds[i] for i in by.kept]
