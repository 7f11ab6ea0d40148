"""Timelines of any batch and length from one trace and one more pass.

The bytes of an allocation are a whole multiple of one product of the batch and the length: of the
rows, of their square, of the rows without their last token, of a length rounded up to what a
kernel wants. Two passes of different shape tell which. Where a shape decides what runs
(bitsandbytes' choice of a kernel, a sliding window, the first chunks of TRL's head), each way to
run is traced for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from oomguard.prediction.chunks import CHUNK_TOKENS, TRACED, chunks_of, lengthened
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

_MASK_ALIGNMENT = 16
_STEPS = range(-8, 9)  # every multiple of the alignment modulo what kernels round up to


def _head(rows: int, length: int) -> int:
    return min(rows * (length - 1), CHUNK_TOKENS)


def _last_tile(rows: int, length: int) -> int:
    return (rows * (length - 1) - 1) % CHUNK_TOKENS + 1


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
    chunked: bool
    """Whether the head goes through its tokens in chunks."""

    def at(self, rows: int, length: int) -> tuple[Deep, list[int]] | None:
        """The events at another shape, and the bytes of each id; `None` where it tells nothing."""
        if (rows, length) == self.shapes[0]:
            return self.deep, self.traced.nbytes
        if self.products is None:
            return None
        values = {product: product(rows, length) for product in _PRODUCTS}
        nbytes = [values[product] * unit for product, unit in self.products]
        more = chunks_of(rows, length) - chunks_of(*self.shapes[0]) if self.chunked else 0
        try:
            return (lengthened(self.deep, more) if more else self.deep), nbytes
        except NotAlikeError:
            return None


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

    def timeline(self, rows: int, length: int, *, alone: bool = False) -> Timeline:
        """The timeline of passes of `rows` x `length` tokens, which packing makes one row.

        Args:
            rows: Of a pass.
            length: Tokens of each.
            alone: Whether no other shape will be asked for.
        """
        if self._settings.packing:
            rows, length = 1, rows * length
        key = self._way(rows, length)
        if key not in self._ways:
            shape = self._standing_for(rows, length)
            self._ways[key] = self._trace(shape, alone=alone and shape == (rows, length))
        found = self._ways[key].at(rows, length)
        if found is None:
            self._ways[key] = self._trace((rows, length))
            found = self._ways[key].at(rows, length)
        if found is None:
            msg = f"{rows} x {length} tokens cannot be made of a trace of them"
            raise RuntimeError(msg)
        deep, nbytes = found
        return timeline(self._ways[key].traced, deep, nbytes, self._card)

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
            self._chunks(rows, length),
            self._window is not None and length >= self._window,
            self._masked and length % _MASK_ALIGNMENT == 0,
        )

    def _chunks(self, rows: int, length: int) -> int:
        """Chunks of the head, where their number decides: further ones repeat themselves."""
        if self._settings.trainer != "sft":
            return 0
        chunks = chunks_of(rows, length)
        return chunks if self._card.is_host else min(chunks, TRACED)

    def _standing_for(self, rows: int, length: int) -> Shape:
        """A shape that runs the same way, and whose chunks can all be traced."""
        if self._chunks(rows, length) == chunks_of(rows, length) or not self._chunks(rows, length):
            return rows, length
        most = TRACED * CHUNK_TOKENS
        fewer = most // (length - 1), length
        few = min(rows, 2)
        shorter = most // few + 1
        shapes = (fewer, (few, shorter - (shorter - length) % _MASK_ALIGNMENT))
        key = self._way(rows, length)
        return next((s for s in shapes if self._alike(s, key, rows)), (rows, length))

    def _alike(self, shape: Shape, key: Any, rows: int) -> bool:
        if shape[0] < min(rows, 2) or shape[1] < 2 or self._way(*shape) != key:
            return False
        return chunks_of(*shape) == TRACED

    def _other(self, shape: Shape) -> Shape | None:
        """A shape of other rows and another length that runs the same way.

        Of those at hand the one that tells most products apart.
        """
        rows, length = shape
        key, chunks = self._way(rows, length), chunks_of(rows, length)
        found = []
        for more in (1, 2, 3, -1):
            others = rows + more
            # As many tokens in other rows are as many chunks of the head.
            as_many = length * rows // others if others > 0 else 0
            starts = length, as_many - (as_many - length) % _MASK_ALIGNMENT
            lengths = {start + step * _MASK_ALIGNMENT for start in starts for step in _STEPS}
            found += [(others, one) for one in sorted(lengths) if others > 0 and one > 1]
        alike = [
            other
            for other in found
            if other[1] != length and self._way(*other) == key and self._same(other, chunks)
        ]
        return max(alike, key=lambda other: _told_apart(shape, other), default=None)

    def _same(self, shape: Shape, chunks: int) -> bool:
        return self._settings.trainer != "sft" or chunks_of(*shape) == chunks

    def _trace(self, shape: Shape, *, alone: bool = False) -> _Way:
        other = None if alone else self._other(shape)
        shapes = (shape,) if other is None else (shape, other)
        traced = trace(*self._given, shapes)
        try:
            deep = deepen(traced)
        except NotAlikeError:
            traced = trace(*self._given, shapes, whole=True)
            deep = deepen(traced)
        chunked = self._settings.trainer == "sft"
        return _Way(traced, deep, shapes, _products(traced, shapes), chunked)


def _told_apart(one: Shape, other: Shape) -> int:
    """How many pairs of products change differently between two shapes."""
    values = [(product(*one), product(*other)) for product in _PRODUCTS]
    return sum(a * d != b * c for (a, b), (c, d) in combinations(values, 2))


def _products(
    traced: Trace, shapes: tuple[Shape, ...]
) -> list[tuple[Callable[[int, int], int], int]] | None:
    if len(shapes) < 2 or any(len(probe) != len(traced.sized) for probe in traced.probes):
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
