"""Timelines of any batch and length from one trace and two more passes.

The bytes of an allocation are a whole multiple of one product of the batch and the length: of the
rows, of their square, of the rows without their last token, of a length rounded up to what a
kernel wants. Three passes of different shape tell which. Where a shape decides what runs
(bitsandbytes' choice of a kernel, the tiles of TRL's head, a sliding window), each way to run is
traced for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from oomguard.prediction.depth import Deep, NotAlikeError, deepen
from oomguard.prediction.kernels import fused_4bit, up
from oomguard.prediction.load import quantized_weights
from oomguard.prediction.model import meta_model
from oomguard.prediction.subject import text_config
from oomguard.prediction.timeline import timeline
from oomguard.prediction.trace import Shape, Trace, trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from oomguard.memory.allocator import Timeline
    from oomguard.memory.cards import Card
    from oomguard.plan import Plan
    from oomguard.prediction.settings import Settings

_HEAD_TOKENS = 4096  # TRL's TOKEN_CHUNK_SIZE
_MASK_ALIGNMENT = 16


def _head(rows: int, length: int) -> int:
    return min(rows * (length - 1), _HEAD_TOKENS)


def _last_tile(rows: int, length: int) -> int:
    return (rows * (length - 1) - 1) % _HEAD_TOKENS + 1


# What the bytes of an allocation can be a multiple of, the likelier first.
_PRODUCTS: tuple[Callable[[int, int], int], ...] = (
    lambda rows, length: 1,
    lambda rows, length: rows * length,
    lambda rows, length: rows * (length - 1),
    lambda rows, length: length,
    lambda rows, length: rows,
    _head,
    _last_tile,
    lambda rows, length: length - 1,
    lambda rows, length: length * length,
    lambda rows, length: rows * length * length,
    lambda rows, length: rows * up(length, 128),
    lambda rows, length: rows * up(length, 64),
    lambda rows, length: rows * up(length, 32),
    lambda rows, length: length * up(length, _MASK_ALIGNMENT),
    lambda rows, length: rows * length * up(length, _MASK_ALIGNMENT),
    lambda rows, length: rows * (length + 1),
)


@dataclass
class _Way:
    """One way to run, as traced."""

    traced: Trace
    deep: Deep
    shapes: tuple[Shape, ...]
    products: list[tuple[Callable[[int, int], int], int]] | None
    """What each id is a multiple of, and the multiple in bytes; `None` where that is not known."""

    def nbytes(self, rows: int, length: int) -> list[int] | None:
        """Bytes of each id at another shape."""
        if (rows, length) == self.shapes[0]:
            return self.traced.nbytes
        if self.products is None:
            return None
        values = {product: product(rows, length) for product in _PRODUCTS}
        return [values[product] * unit for product, unit in self.products]


class Fitted:
    """One model under settings that leave only batch and length open."""

    def __init__(
        self, config: PretrainedConfig, plan: Plan, settings: Settings, card: Card
    ) -> None:
        self._given = config, plan, settings, card
        self._settings, self._card = settings, card
        text = text_config(config)
        self._window = getattr(text, "sliding_window", None)
        self._masked = settings.padded or settings.packing or self._window is not None
        weights = quantized_weights(meta_model(config, settings), settings)
        self._matrices = sorted({tuple(weight.shape) for weight in weights})
        self._ways: dict[Any, _Way] = {}

    def timeline(self, rows: int, length: int) -> Timeline:
        """The timeline of passes of `rows` x `length` tokens, which packing makes one row."""
        if self._settings.packing:
            rows, length = 1, rows * length
        key = self._way(rows, length)
        way = self._ways.get(key)
        nbytes = None if way is None else way.nbytes(rows, length)
        if way is None or nbytes is None:
            way = self._ways[key] = self._trace((rows, length))
            nbytes = way.traced.nbytes
        return timeline(way.traced, way.deep, nbytes, self._card)

    def _way(self, rows: int, length: int) -> Any:
        """What the shape decides."""
        settings, tokens = self._settings, rows * length
        dtype = getattr(torch, settings.dtype)
        fused: tuple[bool, ...] = ()
        if settings.quantization in {"nf4", "fp4"}:
            fused = tuple(
                fused_4bit(self._card, dtype, tokens, outputs, inputs)
                for outputs, inputs in self._matrices
            )
        return (
            fused,
            -(-rows * (length - 1) // _HEAD_TOKENS) if settings.trainer == "sft" else 0,
            self._window is not None and length > self._window,
            self._masked and length % _MASK_ALIGNMENT == 0,
        )

    def _others(self, shape: Shape) -> tuple[Shape, ...]:
        """Two shapes that run the same way, one with other rows and one with another length."""
        rows, length = shape
        key = self._way(rows, length)
        steps = [one * _MASK_ALIGNMENT for one in (1, 3, -1, -3)]
        more = [(rows + one, length) for one in (1, 2, -1)]
        # As many tokens in more rows: as many tiles of the head.
        shorter = length * rows // (rows + 1)
        more.append((rows + 1, shorter - (shorter - length) % _MASK_ALIGNMENT))
        longer = [(rows, length + one) for one in steps]
        found = [
            next((s for s in shapes if s[1] > 1 and self._way(*s) == key), None)
            for shapes in ([s for s in more if s[0] > 0] if rows > 1 else more, longer)
        ]
        return tuple(one for one in found if one is not None)

    def _trace(self, shape: Shape) -> _Way:
        shapes = (shape, *self._others(shape))
        traced = trace(*self._given, shapes)
        try:
            deep = deepen(traced)
        except NotAlikeError:
            traced = trace(*self._given, shapes, whole=True)
            deep = deepen(traced)
        return _Way(traced, deep, shapes, _products(traced, shapes))


def _products(
    traced: Trace, shapes: tuple[Shape, ...]
) -> list[tuple[Callable[[int, int], int], int]] | None:
    if len(shapes) < 3 or any(len(probe) != len(traced.sized) for probe in traced.probes):
        return None
    constant = _PRODUCTS[0]
    found = [(constant, nbytes) for nbytes in traced.nbytes]
    known: dict[tuple[int, ...], tuple[Callable[[int, int], int], int] | None] = {}
    for number, *others in zip(traced.sized, *traced.probes, strict=True):
        sizes = (traced.nbytes[number], *others)
        if sizes not in known:
            known[sizes] = _product(sizes, shapes)
        product = known[sizes]
        if product is None:
            return None
        found[number] = product
    for number, like in traced.alike.items():
        found[number] = found[like]
    return found


def _product(
    sizes: tuple[int, ...], shapes: tuple[Shape, ...]
) -> tuple[Callable[[int, int], int], int] | None:
    for product in _PRODUCTS:
        values = [product(*shape) for shape in shapes]
        unit = sizes[0] // values[0]
        if all(unit * value == size for value, size in zip(values, sizes, strict=True)):
            return product, unit
    return None
