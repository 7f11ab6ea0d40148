"""Does memory grow over one span of steps, for no reason that the batches give?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from oomguard.watch.robust import mann_kendall_z, middle, pair_slopes, sigma

if TYPE_CHECKING:
    from oomguard.watch.robust import Floats

BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A rise over one span that passed every test.

    Attributes:
        per_step: Bytes a step.
        low: A slow reading of it, and
        high: a fast one: the quartiles of the slopes between blocks.
        gained: Bytes over the span.
        clarity: The rise, in standard deviations of what is left after the trend.
        steps: Length of the span.
    """

    per_step: float
    low: float
    high: float
    gained: float
    clarity: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Tests:
    """How much is asked of a rise. Each was set on made-up runs (benchmarks/creep.py)."""

    trend_t: float = 8.0
    largest_jump: float = 0.4
    fading: float = 0.6
    clarity: float = 5.0
    z: float = 3.2


def rises(values: Floats, at_least: float) -> bool:
    """Whether the last quarter lies above the first: cheap, and most spans end here."""
    quarter = len(values) // 4
    return float(values[-quarter:].sum() - values[:quarter].sum()) >= at_least * quarter


def without_batches(values: Floats, batches: Floats) -> tuple[Floats, float]:
    """Take from the values what the batches explain beside a trend.

    Args:
        values: Bytes, (n,).
        batches: What is known of each batch, (m, n); the last row is the longest batch so far, whose
            effect can only be to raise memory.

    Returns:
        The values less that, and the t statistic of the trend with Newey-West errors (1987), which
        hold when neighbouring readings resemble each other.
    """
    count = len(values)
    columns = [np.ones(count), np.linspace(-0.5, 0.5, count)]
    monotone = -1
    for row, known in enumerate(batches):
        centred = known - known.sum() / count
        norm = math.sqrt(float(centred @ centred) / count)
        if norm > 1e-9 * max(1.0, float(np.abs(known).max())):
            if row == len(batches) - 1:
                monotone = len(columns)
            columns.append(centred / norm)
    design = np.stack(columns)
    centred = values - values.sum() / count
    inverse = np.linalg.inv(design @ design.T + 1e-6 * count * np.eye(len(columns)))
    weights = inverse @ (design @ centred)
    error = centred - weights @ design
    scores = design * error
    covariance = scores @ scores.T
    lags = int(4 * (count / 100) ** (2 / 9)) + 1
    for lag in range(1, lags + 1):
        cross = scores[:, lag:] @ scores[:, :-lag].T
        covariance += (1 - lag / (lags + 1)) * (cross + cross.T)
    variance = float(inverse[1] @ covariance @ inverse[1])
    t = float(weights[1]) / math.sqrt(max(variance, 1e-12))
    if monotone > 0:
        weights[monotone] = max(weights[monotone], 0.0)
    return values - weights[2:] @ design[2:], t


def judge(
    values: Floats, batches: Floats, steps: int, at_least: float, tests: Tests
) -> Growth | None:
    """The growth over one span, or `None`.

    Args:
        values: Unaccounted bytes, evenly spaced over the span; a multiple of `BLOCKS` of them.
        batches: As in `without_batches`.
        steps: How many steps the span covers.
        at_least: The least rise that matters, bytes.
        tests: What is asked of it.
    """
    if not rises(values, 0.4 * at_least):
        return None
    values, t = without_batches(values, batches)
    if t < tests.trend_t:
        return None
    blocks = values.reshape(BLOCKS, -1)
    floor, level = blocks.min(1), np.median(blocks, 1)
    floor_slopes, level_slopes = pair_slopes(floor), pair_slopes(level)
    slope, level_slope = middle(floor_slopes), middle(level_slopes)
    gained = slope * BLOCKS
    # A saw-tooth or a wider spread moves one edge only.
    if gained < at_least or level_slope < 0.5 * slope or slope < 0.3 * level_slope:
        return None
    if one_jump(floor, at_least, tests) or fades(floor, level, tests):
        return None
    spread = sigma(floor - slope * np.arange(BLOCKS))
    if gained < tests.clarity * spread:
        return None
    z = max(mann_kendall_z(floor_slopes, BLOCKS), mann_kendall_z(level_slopes, BLOCKS))
    if z < tests.z:
        return None
    per_index = BLOCKS / steps
    return Growth(
        per_step=slope * per_index,
        low=float(floor_slopes[len(floor_slopes) // 4]) * per_index,
        high=float(floor_slopes[3 * len(floor_slopes) // 4]) * per_index,
        gained=gained,
        clarity=gained / max(spread, 1e-9 * gained),
        steps=steps,
    )


def one_jump(floor: Floats, at_least: float, tests: Tests) -> bool:
    """Whether a single rise between two blocks carries the growth."""
    total = float(floor[-2:].sum() - floor[:2].sum()) / 2
    return total < at_least or float(np.diff(floor).max()) > tests.largest_jump * total


def fades(floor: Floats, level: Floats, tests: Tests) -> bool:
    """Whether the growth is dying away, as after a start, or has been undone."""
    third = BLOCKS // 3
    late = middle(pair_slopes(level[-third - 1 :]))
    early = middle(pair_slopes(level[: 2 * third + 1]))
    return late < tests.fading * early or float(floor[-3:].min()) < float(np.median(floor))
