"""What was read, in bounded memory: the last steps as they were, older ones as means."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from oomguard.watch.robust import Floats

CHUNK = 16  # steps that become one mean; also how often anything is looked at
RECENT_STEPS = 512
KEPT_MEANS = 2048  # 32,768 steps
MOST_SIZES = 256  # of batches that are told apart
FEW_SIZES = 0.25  # of the readings, up to which their number tells something


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


class Readings:
    """Per step its number, unaccounted bytes, and what is known of the batches.

    Of these are known the tokens of the batch, the most tokens so far and, while there are few of
    them, how many sizes there were so far: buffers grow with the longest batch, and compiled code
    with each new size.

    Attributes:
        recent: Rows step, bytes, tokens, longest, sizes; one column a step.
        means: Rows step, bytes, squared tokens, tokens, longest, sizes; one for `CHUNK` readings.
    """

    def __init__(self) -> None:
        """Start without readings."""
        self.recent = Ring(5, RECENT_STEPS + CHUNK)
        self.means = Ring(6, KEPT_MEANS)
        self._waiting: list[tuple[float, ...]] = []
        self._longest = 0.0
        self._sizes: set[float] = set()
        self._count = 0
        self._tightest: float | None = None
        self._rooms: deque[float] = deque(maxlen=RECENT_STEPS // CHUNK)

    def add(
        self, step: int, unaccounted: float, tokens: float, headroom: float | None = None
    ) -> bool:
        """Take one reading; say whether it completed a chunk, which is when views change."""
        self._longest = max(self._longest, tokens)
        if len(self._sizes) <= MOST_SIZES:
            self._sizes.add(tokens)
        # Where nothing was free the step failed; what came after it tells how much there is.
        if headroom is not None and 0 < headroom < (self._tightest or math.inf):
            self._tightest = headroom
        self._waiting.append((step, unaccounted, tokens, self._longest, len(self._sizes)))
        if len(self._waiting) < CHUNK:
            return False
        self._count += CHUNK
        chunk = np.array(self._waiting).T
        self._waiting.clear()
        if self._tightest is not None:
            self._rooms.append(self._tightest)
            self._tightest = None
        self.recent.extend(chunk)
        means, column = chunk.sum(1) / CHUNK, np.empty((6, 1))
        column[:2, 0], column[3:, 0] = means[:2], means[2:]
        column[2, 0] = float(chunk[2] @ chunk[2]) / CHUNK
        self.means.extend(column)
        return True

    @property
    def _known(self) -> int:
        """How many rows of what is known of the batches tell anything.

        Where most batches are of a size of their own, the number of sizes is but another clock.
        """
        few = min(MOST_SIZES, len(self.means) * CHUNK * FEW_SIZES)
        return 4 if len(self._sizes) <= few else 3

    @property
    def available(self) -> int:
        """How many readings a view may show."""
        return min(self._count, KEPT_MEANS * CHUNK)

    def values(self, count: int) -> Floats:
        """The values of `view` alone, which are quicker to have."""
        recent = count <= RECENT_STEPS
        table = self.recent.last(count) if recent else self.means.last(count // CHUNK)
        values: Floats = table[1]
        return values

    def view(self, count: int, *, means: bool = False) -> tuple[Floats, Floats, Floats]:
        """The last readings: their steps, values, and what is known of the batches.

        Args:
            count: How many readings, a multiple of `CHUNK`.
            means: Show chunks whatever the count; else only from `RECENT_STEPS` on.
        """
        known = self._known
        if count <= RECENT_STEPS and not means:
            table = self.recent.last(count)
            return table[0], table[1], np.stack([table[2] ** 2, *table[2:]])[:known]
        table = self.means.last(count // CHUNK)
        return table[0], table[1], table[2 : 2 + known]

    def begin_anew(self) -> None:
        """Show only what is read from now on; heights and sizes stay known."""
        self._count = 0

    @property
    def headroom(self) -> float | None:
        """The least room of the last steps, which is that of the longest batch."""
        return min(self._rooms, default=None)
