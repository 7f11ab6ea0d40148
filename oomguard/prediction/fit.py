"""Timelines of any batch, length and rank from few traces.

A trace is of passes of two shapes, which tell what each allocation is a multiple of. What only some
shapes allocate (weights that bitsandbytes dequantizes, chunks of TRL's head) is traced, and left
out or repeated where a shape wants it so. Where a mask decides what runs, each way to run is traced
for itself. Between two LoRA ranks that allocate alike, so does every rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from oomguard.prediction.chunks import CHUNK_TOKENS, TRACED
from oomguard.prediction.depth import NotAlikeError, deepen
from oomguard.prediction.products import MASK_ALIGNMENT, products_of, told_apart
from oomguard.prediction.shape import Shape
from oomguard.prediction.subject import text_config
from oomguard.prediction.trace import NOTHING, Given, trace
from oomguard.prediction.way import Way

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from oomguard.memory.cards import Card
    from oomguard.memory.timeline import Timeline
    from oomguard.plan import Plan
    from oomguard.prediction.settings import Settings

_STEPS = range(-8, 9)  # every multiple of the alignment modulo what kernels round up to
_FEW_TOKENS = 16  # that three chunks can be made of, whichever
_LARGE_RANK = 1024


class Fitted:
    """One model under settings that leave only batch, length and rank open."""

    def __init__(
        self,
        config: PretrainedConfig,
        plan: Plan,
        settings: Settings,
        card: Card,
        given: Given = NOTHING,
    ) -> None:
        self._config, self._plan, self._settings, self._card = config, plan, settings, card
        self._given = given
        text = text_config(config)
        self._window = getattr(text, "sliding_window", None)
        self._masked = settings.padded or settings.packing or self._window is not None
        self._chunked = settings.trainer == "sft"
        # On the host the head takes every token, and without TRL's there is none.
        self._target_share = settings.target_share if self._chunked and not card.is_host else 1.0
        self._one_rank = given.tuning is None or given.tuning.one_rank
        self._ways: dict[tuple[Any, int | None], Way] = {}

    def timeline(self, rows: int, length: int, rank: int | None) -> Timeline:
        """The timeline of passes of `rows` x `length` tokens, which packing makes one row."""
        if self._settings.packing:
            rows, length = 1, rows * length
        own = Shape(rows, length, CHUNK_TOKENS, self._target_share)
        found = self._of(own, rank).at(own)
        if found is None:
            self._ways[self._way(own), rank] = way = self._trace((own,), rank)
            found = way.at(own)
        if found is None:
            msg = f"{rows} x {length} tokens cannot be made of a trace of them"
            raise RuntimeError(msg)
        return found

    def _of(self, own: Shape, rank: int | None) -> Way:
        """The way of a shape and a rank, made if it is not there."""
        key = self._way(own), rank
        if key not in self._ways:
            self._ways[key] = self._of_rank(own, rank) or self._any(own, rank)
        return self._ways[key]

    def _way(self, shape: Shape) -> Any:
        """What the shape decides."""
        rows, length = shape.rows, shape.length
        return (
            # The head's kernels mark its chunks, and on the host it has none.
            shape.chunks if self._chunked and self._card.is_host else None,
            rows == 1,
            self._window is not None and length >= self._window,
            self._masked and length % MASK_ALIGNMENT == 0,
        )

    def _of_rank(self, own: Shape, rank: int | None) -> Way | None:
        """The way at another rank than was traced; `None` where there is none that it could be of.

        Between two ranks that allocate alike it is made of them, else traced in the same passes.
        """
        kind = self._way(own)
        ways = {way.rank: way for (key, _), way in self._ways.items() if key == kind}
        if rank is None or not ways:
            return None
        shapes = next(iter(ways.values())).shapes
        low = max((one for one in ways if one and one < rank), default=1)
        high = min((one for one in ways if one and one > rank), default=_LARGE_RANK)
        if low < rank < high and self._one_rank:
            for end in {low, high} - ways.keys():
                ways[end] = self._ways[kind, end] = self._trace(shapes, end)
            found = ways[low].between(ways[high], rank)
            if found is not None:
                return found
        return self._trace(shapes, rank)

    def _any(self, own: Shape, rank: int | None) -> Way:
        """A trace for shapes like this one, of three chunks of the head."""
        rows, length = own.rows, own.length
        if self._card.is_host:
            return self._traced(own, rank)
        if rows == 1 and not self._settings.packing:
            # Slices of one row are contiguous, and not copied: only products of attention need it.
            way = self._of(own._replace(rows=2), rank)
            if not way.multiplies_attention:
                return way
        if own.targets < _FEW_TOKENS:
            length += MASK_ALIGNMENT
        return self._traced(self._shape(rows, length), rank)

    def _traced(self, shape: Shape, rank: int | None) -> Way:
        other = self._other(shape)
        return self._trace((shape,) if other is None else (shape, other), rank)

    def _shape(self, rows: int, length: int) -> Shape:
        shape = Shape(rows, length, CHUNK_TOKENS, self._target_share)
        if not self._chunked or self._card.is_host:
            return shape
        return shape._replace(chunk_tokens=shape.targets // TRACED + 1)

    def _other(self, shape: Shape) -> Shape | None:
        """A shape of other rows and another length that runs the same way.

        Of those at hand the one that tells most products apart.
        """
        rows, length = shape.rows, shape.length
        found = set()
        for more in (0, 1, 2, 3, -1):
            others = rows + more
            # As many tokens in other rows are as many chunks of the head, as the host wants them.
            as_many = length * rows // others if others > 0 else 0
            starts = length, as_many - (as_many - length) % MASK_ALIGNMENT
            lengths = {start + step * MASK_ALIGNMENT for start in starts for step in _STEPS}
            found |= {(others, one) for one in lengths if others > 0 and one != length}
        alike = [
            other
            for other in (self._shape(*one) for one in sorted(found))
            if other.targets >= _FEW_TOKENS and self._way(other) == self._way(shape)
        ]
        return max(alike, key=lambda other: told_apart(shape, other), default=None)

    def _trace(self, shapes: tuple[Shape, ...], rank: int | None) -> Way:
        given = self._config, replace(self._plan, lora_r=rank), self._settings, self._card, shapes
        traced = trace(*given, given=self._given)
        try:
            deep = deepen(traced)
        except NotAlikeError:
            traced = trace(*given, given=self._given, whole=True)
            deep = deepen(traced)
        products = products_of(traced, shapes)
        return Way(traced, deep, shapes, products, self._card, self._chunked, rank)
