"""Does memory grow over one span of steps, for no reason that the batches give?"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from oomguard.watch.robust import mann_kendall_z, middle, pair_slopes, sigma

if TYPE_CHECKING:
    from oomguard.watch.robust import Floats

BLOCKS = 16
HINGES = 128  # points at which a rise may have begun
RISING = 2  # the row of what is known of batches from which on rows never fall
RISEN = 0.4  # of the least rise that matters, from the first quarter to the last
# What is asked of a rise, set on made-up runs (benchmarks/creep.py).
TREND_T = 5.0  # of the trend beside the batches
LARGEST_JUMP = 0.4  # of the rise, between two blocks
AT_REST = 0.02  # of the rise, between blocks that do not take part in it
FADING = 0.75  # the late slope to the early one
CLARITY = 5.0  # the rise, in standard deviations of the floor around its trend
Z = 3.2  # Mann-Kendall, of the blocks' minima or medians


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast memory grows, bytes a step.

    Attributes:
        per_step: The median of the slopes between blocks.
        low: Their lower quartile.
        high: Their upper quartile.
    """

    per_step: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A rise over one span that passed every test.

    Attributes:
        pace: How fast.
        gained: Bytes over the span.
        clarity: The rise, in standard deviations of what is left after the trend.
        steps: Length of the span.
    """

    pace: Pace
    gained: float
    clarity: float
    steps: int


def rises(values: Floats, at_least: float) -> bool:
    """Whether the last quarter lies above the first: cheap, and most spans end here.

    Args:
        values: As in `judge`, which finds nothing in values that do not rise.
        at_least: The least rise that matters, bytes.
    """
    quarter = len(values) // 4
    higher = float(values[-quarter:].sum() - values[:quarter].sum())
    return higher >= RISEN * at_least * quarter


def without_batches(values: Floats, batches: Floats) -> tuple[Floats, float]:
    """Take from the values what the batches explain beside a trend.

    Args:
        values: Bytes, (n,).
        batches: What is known of each batch, (m, n): squared tokens, tokens, and then what never
            falls (the longest batch so far, the number of sizes so far), which only raises memory.

    Returns:
        The values less that, and the t statistic of the trend with Newey-West errors (1987), which
        hold when neighbouring readings resemble each other.
    """
    count = len(values)
    columns = [np.ones(count), np.linspace(-0.5, 0.5, count)]
    rising = []
    for row, known in enumerate(batches):
        centred = known - known.sum() / count
        norm = math.sqrt(float(centred @ centred) / count)
        if norm > 1e-9 * max(1.0, float(np.abs(known).max())):
            if row >= RISING:
                rising.append(len(columns))
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
    for column in rising:
        weights[column] = max(weights[column], 0.0)
    return values - weights[2:] @ design[2:], t


def judge(values: Floats, batches: Floats, steps: int, at_least: float) -> Growth | None:
    """The growth over one span, or `None`.

    Args:
        values: Unaccounted bytes, evenly spaced over the span; a multiple of `BLOCKS` of them.
        batches: As in `without_batches`.
        steps: How many steps the span covers.
        at_least: The least rise that matters, bytes.
    """
    values, t = without_batches(values, batches)
    if t < TREND_T:
        return None
    blocks = values.reshape(BLOCKS, -1)
    floor, level = blocks.min(1), np.median(blocks, 1)
    floor_slopes, level_slopes = pair_slopes(floor), pair_slopes(level)
    slope, level_slope = middle(floor_slopes), middle(level_slopes)
    gained = slope * BLOCKS
    # A saw-tooth or a wider spread moves one edge only.
    if gained < at_least or level_slope < 0.5 * slope or slope < 0.3 * level_slope:
        return None
    if in_jumps(floor, at_least) or fades(floor, level):
        return None
    spread = sigma(floor - slope * np.arange(BLOCKS))
    if gained < CLARITY * spread:
        return None
    z = max(mann_kendall_z(floor_slopes, BLOCKS), mann_kendall_z(level_slopes, BLOCKS))
    if z < Z:
        return None
    return Growth(
        pace=_pace(floor_slopes, steps),
        gained=gained,
        clarity=gained / max(spread, 1e-3 * gained),
        steps=steps,
    )


def _pace(slopes: Floats, steps: int) -> Pace:
    per_index, quarter = BLOCKS / steps, len(slopes) // 4
    return Pace(
        per_step=middle(slopes) * per_index,
        low=float(slopes[quarter]) * per_index,
        high=float(slopes[-quarter]) * per_index,
    )


def pace(values: Floats, batches: Floats, steps: int) -> Pace:
    """How fast the values rise for no reason that the batches give; arguments as for `judge`.

    Most slopes of a saw-tooth point up, so it is no faster than the floor rises from the first
    quarter to the last.
    """
    blocks = without_batches(values, batches)[0].reshape(BLOCKS, -1)
    found = _pace(pair_slopes(np.median(blocks, 1)), steps)
    floor, quarter = blocks.min(1), BLOCKS // 4
    lift = float(floor[-quarter:].min() - floor[:quarter].min()) / (BLOCKS - quarter)
    return replace(found, per_step=min(found.per_step, lift * BLOCKS / steps))


def in_jumps(floor: Floats, at_least: float) -> bool:
    """Whether one rise between two blocks carries the growth, or three do among blocks at rest."""
    total = float(floor[-2:].sum() - floor[:2].sum()) / 2
    rises = np.diff(floor)
    rises.sort()
    if total < at_least or float(rises[-1]) > LARGEST_JUMP * total:
        return True
    still = float(np.median(np.abs(rises[:-3]))) < AT_REST * total
    return still and float(rises[-3:].sum()) > 0.9 * total


def fades(floor: Floats, level: Floats) -> bool:
    """Whether the growth is dying away, as after a start, or has been undone."""
    third = BLOCKS // 3
    late = middle(pair_slopes(level[-third - 1 :]))
    early = middle(pair_slopes(level[: 2 * third + 1]))
    return late < FADING * early or float(floor[-3:].min()) < float(np.median(floor))


def hinge(values: Floats) -> tuple[int, float]:
    """Where a rise that lasts to the end began: a level, then a line, fitted by least squares.

    Returns:
        The index at which the line leaves the level, and by how much it has risen at the end.
    """
    each = -(-len(values) // HINGES)
    count = len(values) // each
    level = np.median(values[len(values) - count * each :].reshape(count, each), 1)
    level -= level.sum() / count
    ramps = np.clip(np.arange(count) - np.arange(count - count // 8)[:, None], 0, None)
    centred = ramps - ramps.sum(1, keepdims=True) / count
    along = centred @ level
    squares = (centred * centred).sum(1)
    best = int(np.argmax(np.where(along > 0, along * along / squares, 0)))
    rise = float(along[best] / squares[best]) * (count - best)
    return len(values) - (count - best) * each, rise
