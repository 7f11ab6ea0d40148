"""One way in which a model runs: the timeline of any batch and length that runs like it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from oomguard.prediction.chunks import with_chunks
from oomguard.prediction.depth import Deep, NotAlikeError
from oomguard.prediction.kernels import fused_4bit
from oomguard.prediction.products import PRODUCTS
from oomguard.prediction.timeline import timeline

if TYPE_CHECKING:
    from oomguard.memory.cards import Card
    from oomguard.memory.timeline import Timeline
    from oomguard.prediction.products import Product
    from oomguard.prediction.shape import Shape
    from oomguard.prediction.trace import Trace

_SOFTMAX = frozenset(("_softmax.default", "_safe_softmax.default"))


@dataclass(frozen=True)
class Way:
    """One way to run, as traced.

    Attributes:
        traced: The trace.
        deep: Its events at full depth.
        shapes: Of the passes of the trace.
        products: What each id is a multiple of; `None` where that is not known.
        card: On which it runs.
        chunked: Whether the head goes through its tokens in chunks.
        rank: Of the adapters; `None` in a full fine-tune.
    """

    traced: Trace
    deep: Deep
    shapes: tuple[Shape, ...]
    products: list[tuple[Product, int]] | None
    card: Card
    chunked: bool
    rank: int | None

    def between(self, high: Way, rank: int) -> Way | None:
        """The way at a LoRA rank between this one's and that of `high`, of passes of these shapes.

        What is allocated at both is allocated in between: as much, or a multiple of the rank. What
        is neither, such as one norm for so many gradients, is on the line between the two.

        Returns:
            `None` if they differ in what they allocate.
        """
        if self.products is None or high.products is None or not _allocate_alike(self, high):
            return None
        low_rank, high_rank = self.rank or 0, high.rank or 0
        products = []
        for (product, unit), (other, more) in zip(self.products, high.products, strict=True):
            if product is not other:
                return None
            grown = -(-(more - unit) * (rank - low_rank) // (high_rank - low_rank))
            products.append((product, unit + grown))
        return replace(self, rank=rank, products=products)

    @property
    def multiplies_attention(self) -> bool:
        """Whether attention, or anything else, is made of products and a softmax."""
        return not _SOFTMAX.isdisjoint(self.traced.part)

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
        if not self.chunked or shape.chunks == self.shapes[0].chunks:
            return self.deep
        return with_chunks(self.deep, shape.chunks)

    def _nbytes(self, shape: Shape) -> list[int] | None:
        """The bytes of each id; none of parts of another, and of what is not taken there."""
        if self.products is not None:
            values = {product: product(shape) for product in PRODUCTS}
            nbytes = [values[product] * unit for product, unit in self.products]
        elif shape == self.shapes[0]:
            nbytes = list(self.traced.nbytes)
        else:
            return None
        for block in self.traced.blocks:
            nbytes[block.start] = sum(nbytes[number] for number in block)
            for number in block[1:]:
                nbytes[number] = 0
        tokens, traced = (one.rows * one.length for one in (shape, self.shapes[0]))
        for number, matmul in self.traced.dequantized.items():
            if fused_4bit(self.card, matmul._replace(rows=matmul.rows * tokens // traced)):
                nbytes[number] = 0
        return nbytes


def _allocate_alike(one: Way, other: Way) -> bool:
    """Whether two ways allocate the same in the same order; what is freed at once has no order."""

    def made(trace: Trace) -> tuple[object, ...]:
        return [entry for entry in trace.log if entry[0] != "f"], trace.home, trace.part

    return made(one.traced) == made(other.traced)
