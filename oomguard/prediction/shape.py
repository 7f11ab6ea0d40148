"""The shape of a pass."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Of a pass.

    Attributes:
        rows: Of the batch.
        length: Tokens of each.
        chunk_tokens: Tokens that TRL's language-model head takes at once.
        target_share: Of those that are predicted, how many it takes.
    """

    rows: int
    length: int
    chunk_tokens: int
    target_share: float = 1.0

    @property
    def predicted(self) -> int:
        """Tokens that a pass predicts: the last of a row predicts nothing."""
        return self.rows * (self.length - 1)

    @property
    def targets(self) -> int:
        """Those of them that the head takes."""
        return max(1, round(self.target_share * self.predicted))

    @property
    def chunks(self) -> int:
        """How often the head takes some."""
        return -(-self.targets // self.chunk_tokens)
