"""What was read at each step, in bounded memory: the last steps as they were, older ones as means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from oomguard.watch.robust import Floats

CHUNK = 16  # steps that become one mean; also how often anything is looked at
RECENT_STEPS = 512
KEPT_MEANS = 2048  # 32,768 steps


class Ring:
    """The last `size` columns of a table, as one contiguous view.

    Holds twice as much as it shows, so that a move of memory comes only every `size` columns.
    """

    def __init__(self, rows: int, size: int) -> None:
        """Make an empty table of `rows` rows."""
        self._table = np.empty((rows, 2 * size))
        self._size = size
        self._end = 0

    def __len__(self) -> int:
        return min(self._end, self._size)

    def extend(self, columns: Floats) -> None:
        """Append columns; at most `size` at once."""
        width = columns.shape[1]
        if self._end + width > self._table.shape[1]:
            keep = self._size - width
            self._table[:, :keep] = self._table[:, self._end - keep : self._end]
            self._end = keep
        self._table[:, self._end : self._end + width] = columns
        self._end += width

    def last(self, count: int) -> Floats:
        """A view of the last `count` columns, which must be there."""
        return self._table[:, self._end - count : self._end]

    def clear(self) -> None:
        """Forget all columns."""
        self._end = 0


class Readings:
    """Per step: its number, unaccounted bytes, tokens of the batch, and the most tokens so far.

    Attributes:
        recent: Rows step, bytes, tokens, longest; one column a step.
        means: Rows step, bytes, tokens, longest, squared tokens; one column for `CHUNK` readings.
    """

    def __init__(self) -> None:
        """Start without readings."""
        self.recent = Ring(4, RECENT_STEPS + CHUNK)
        self.means = Ring(5, KEPT_MEANS)
        self._waiting: list[tuple[float, float, float, float]] = []
        self._longest = 0.0

    def add(self, step: int, unaccounted: float, tokens: float) -> bool:
        """Take one reading; say whether it completed a chunk, which is when views change."""
        self._longest = max(self._longest, tokens)
        self._waiting.append((step, unaccounted, tokens, self._longest))
        if len(self._waiting) < CHUNK:
            return False
        chunk = np.array(self._waiting).T
        self._waiting.clear()
        self.recent.extend(chunk)
        squared = float(chunk[2] @ chunk[2]) / CHUNK
        self.means.extend(np.append(chunk.sum(1) / CHUNK, squared).reshape(5, 1))
        return True

    def forget(self) -> None:
        """Drop what was read; the longest batch stays known, because caches outlive a reading."""
        self.recent.clear()
        self.means.clear()
        self._waiting.clear()
