"""Timelines of any batch and length from a few traces.

The bytes of an event are a whole multiple of one product of the batch and a length: of the rows, of
their square, of the row without its last token, of the row rounded up to what a kernel wants. Three
traces tell which. Where a size decides what runs (bitsandbytes' choice of a kernel, the tiles of
TRL's head, tokens that a sliding window holds), each way to run is traced for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oomguard.prediction.depth import Deep, NotAlikeError, deepen
from oomguard.prediction.kernels import up
from oomguard.prediction.subject import text_config
from oomguard.prediction.timeline import timeline
from oomguard.prediction.trace import Trace, trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from oomguard.memory.allocator import Timeline
    from oomguard.memory.cards import Card
    from oomguard.plan import Plan
    from oomguard.prediction.settings import Settings

_HEAD_TOKENS = 4096  # TRL's TOKEN_CHUNK_SIZE


class NoFitError(Exception):
    """The model cannot be traced."""


class Fitted:
    """One model under settings that leave only batch and length open."""

    def __init__(
        self, config: PretrainedConfig, plan: Plan, settings: Settings, card: Card
    ) -> None:
        self._given = config, plan, settings, card
        self._card = card
        self._paged_bytes = 0
        self._deep: dict[tuple[int, int], tuple[Trace, Deep]] = {}

    def timeline(self, rows: int, length: int) -> Timeline:
        """The timeline of passes of `rows` x `length` tokens."""
        if (rows, length) not in self._deep:
            self._deep[rows, length] = self._trace(rows, length)
        traced, deep = self._deep[rows, length]
        return timeline(traced, deep, traced.nbytes, self._card)

    def notes(self) -> tuple[str, ...]:
        """What the figures leave out."""
        return ()

    def _trace(self, rows: int, length: int) -> tuple[Trace, Deep]:
        traced = trace(*self._given, rows, length)
        try:
            return traced, deepen(traced)
        except NotAlikeError:
            traced = trace(*self._given, rows, length, whole=True)
            return traced, deepen(traced)
