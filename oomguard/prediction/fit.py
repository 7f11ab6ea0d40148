"""Timelines of any batch and length from one trace and one more pass.

The bytes of an allocation are a whole multiple of one product of the batch and the length: of the
rows, of their square, of the rows without their last token, of a length rounded up to what a
kernel wants. Two passes of different shape tell which. What only some shapes allocate (weights that
bitsandbytes dequantizes, chunks of TRL's head) is traced, and left out or repeated where a shape
wants it so. Where a mask decides what runs, each way to run is traced for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from oomguard.prediction.chunks import CHUNK_TOKENS, TRACED, chunks_of, with_chunks
from oomguard.prediction.depth import Deep, NotAlikeError, deepen
from oomguard.prediction.kernels import fused_4bit, up
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

    Product = Callable[[Shape], int]

_MASK_ALIGNMENT = 16
_STEPS = range(-8, 9)  # every multiple of the alignment modulo what kernels round up to
_FEW_TOKENS = 16  # that three chunks can be made of, whichever


def _predicted(shape: Shape) -> int:
    return shape.rows * (shape.length - 1)


# What the bytes of an allocation can be a multiple of, the likelier first.
_PRODUCTS: tuple[Product, ...] = (
    lambda shape: 1,
    lambda shape: shape.rows * shape.length,
    _predicted,
    lambda shape: shape.length,
    lambda shape: shape.rows,
    lambda shape: min(_predicted(shape), shape.chunk_tokens),
    lambda shape: (_predicted(shape) - 1) % shape.chunk_tokens + 1,
    lambda shape: shape.length - 1,
    lambda shape: shape.length**2,
    lambda shape: shape.rows * shape.length**2,
    lambda shape: shape.rows * up(shape.length, 128),
    lambda shape: shape.rows * up(shape.length, 64),
    lambda shape: shape.rows * up(shape.length, 32),
    lambda shape: shape.length * up(shape.length, _MASK_ALIGNMENT),
    lambda shape: shape.rows * shape.length * up(shape.length, _MASK_ALIGNMENT),
    lambda shape: shape.rows * (shape.length + 1),
)


@dataclass
class _Way:
    """One way to run, as traced."""

    traced: Trace
    deep: Deep
    shapes: tuple[Shape, ...]
    products: list[tuple[Product, int]] | None
    """What each id is a multiple of, and the multiple in bytes; `None` where that is not known."""
    card: Card
    chunked: bool
    """Whether the head goes through its tokens in chunks."""

    def at(self, shape: Shape) -> Timeline | None:
        """The timeline of any shape; `None` where the trace tells nothing of it."""
        nbytes = self._nbytes(shape)
        if nbytes is None:
            return None
        try:
            deep = self._deep(shape)
        except NotAlikeError:
            return None
        return timeline(self.traced, deep, nbytes, self.card)

    def _deep(self, shape: Shape) -> Deep:
        chunks = chunks_of(*shape)
        if not self.chunked or chunks == chunks_of(*self.shapes[0]):
            return self.deep
        return with_chunks(self.deep, chunks)

    def _nbytes(self, shape: Shape) -> list[int] | None:
        """The bytes of each id; none of parts of another, and of what is not taken there."""
        if shape == self.shapes[0]:
            nbytes = list(self.traced.nbytes)
        elif self.products is None:
            return None
        else:
            values = {product: product(shape) for product in _PRODUCTS}
            nbytes = [values[product] * unit for product, unit in self.products]
        for block in self.traced.blocks:
            nbytes[block.start] = sum(nbytes[number] for number in block)
            for number in block[1:]:
                nbytes[number] = 0
        tokens, traced = (one.rows * one.length for one in (shape, self.shapes[0]))
        for number, matmul in self.traced.dequantized.items():
            if fused_4bit(self.card, matmul._replace(rows=matmul.rows * tokens // traced)):
                nbytes[number] = 0
        return nbytes


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
        self._chunked = settings.trainer == "sft"
        self._ways: dict[Any, _Way] = {}

    def timeline(self, rows: int, length: int) -> Timeline:
        """The timeline of passes of `rows` x `length` tokens, which packing makes one row."""
        if self._settings.packing:
            rows, length = 1, rows * length
        key = self._way(rows, length)
        own = Shape(rows, length, CHUNK_TOKENS)
        if key not in self._ways:
            self._ways[key] = self._any(own)
        found = self._ways[key].at(own)
        if found is None:
            self._ways[key] = self._trace((own,))
            found = self._ways[key].at(own)
        if found is None:
            msg = f"{rows} x {length} tokens cannot be made of a trace of them"
            raise RuntimeError(msg)
        return found

    def _way(self, rows: int, length: int) -> Any:
        """What the shape decides."""
        host, chunks = self._card.is_host, chunks_of(rows, length)
        return (
            # The head's kernels mark its chunks, and on the host it has none.
            chunks if host and self._chunked else None,
            # Slices of one row are contiguous, and not copied. Only eager attention's copies count.
            rows == 1 if host or self._settings.attn_implementation == "eager" else None,
            self._window is not None and length >= self._window,
            self._masked and length % _MASK_ALIGNMENT == 0,
        )

    def _any(self, own: Shape) -> _Way:
        """A trace for shapes like this one, of three chunks of the head."""
        rows, length, _ = own
        if self._card.is_host:
            return self._traced(own)
        if self._way(1, length) == self._way(2, length) and not self._settings.packing:
            rows = max(rows, 2)
        if rows * (length - 1) < _FEW_TOKENS:
            length += _MASK_ALIGNMENT
        return self._traced(self._shape(rows, length))

    def _traced(self, shape: Shape) -> _Way:
        other = self._other(shape)
        return self._trace((shape,) if other is None else (shape, other))

    def _shape(self, rows: int, length: int) -> Shape:
        if not self._chunked or self._card.is_host:
            return Shape(rows, length, CHUNK_TOKENS)
        return Shape(rows, length, rows * (length - 1) // TRACED + 1)

    def _other(self, shape: Shape) -> Shape | None:
        """A shape of other rows and another length that runs the same way.

        Of those at hand the one that tells most products apart.
        """
        rows, length, _ = shape
        found = set()
        for more in (0, 1, 2, 3, -1):
            others = rows + more
            # As many tokens in other rows are as many chunks of the head.
            as_many = length * rows // others if others > 0 else 0
            starts = length, as_many - (as_many - length) % _MASK_ALIGNMENT
            lengths = {start + step * _MASK_ALIGNMENT for start in starts for step in _STEPS}
            found |= {(others, one) for one in lengths if others > 0 and one != length}
        alike = [
            self._shape(*other)
            for other in sorted(found)
            if _predicted(self._shape(*other)) >= _FEW_TOKENS
            and self._way(*other) == self._way(rows, length)
            and (other[0] > 1) == (rows > 1)
        ]
        return max(alike, key=lambda other: _told_apart(shape, other), default=None)

    def _trace(self, shapes: tuple[Shape, ...]) -> _Way:
        traced = trace(*self._given, shapes)
        try:
            deep = deepen(traced)
        except NotAlikeError:
            traced = trace(*self._given, shapes, whole=True)
            deep = deepen(traced)
        products = _products(traced, shapes)
        return _Way(traced, deep, shapes, products, self._card, self._chunked)


def _told_apart(one: Shape, other: Shape) -> int:
    """How many pairs of products change differently between two shapes."""
    values = [(product(one), product(other)) for product in _PRODUCTS]
    return sum(a * d != b * c for (a, b), (c, d) in combinations(values, 2))


def _products(traced: Trace, shapes: tuple[Shape, ...]) -> list[tuple[Product, int]] | None:
    if len(shapes) < 2 or any(len(probe) != len(traced.sized) for probe in traced.probes):
        return None
    constant = _PRODUCTS[0]
    found = [(constant, nbytes) for nbytes in traced.nbytes]
    known: dict[tuple[int, ...], tuple[Product, int] | None] = {}
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


def _product(sizes: tuple[int, ...], shapes: tuple[Shape, ...]) -> tuple[Product, int] | None:
    for product in _PRODUCTS:
        values = [product(shape) for shape in shapes]
        unit = sizes[0] // values[0]
        if all(unit * value == size for value, size in zip(values, sizes, strict=True)):
            return product, unit
    return None
