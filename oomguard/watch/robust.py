"""Trend statistics that a few wild readings cannot bend."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# A normal distribution's standard deviation is this many times its median absolute deviation.
MAD_TO_SIGMA = 1.4826


@cache
def _pairs(count: int) -> tuple[NDArray[Any], NDArray[Any], Floats]:
    """Indices i < j of all pairs of `count` points, and j - i."""
    first, second = np.triu_indices(count, 1)
    return first, second, (second - first).astype(np.float64)


def pair_slopes(values: Floats) -> Floats:
    """The slope per index between every two of a few evenly spaced values, in rising order.

    Their median is the slope of Theil (1950) and Sen (1968), which up to 29 % of wild values leave
    as it is.
    """
    first, second, distance = _pairs(len(values))
    slopes: Floats = (values[second] - values[first]) / distance
    slopes.sort()
    return slopes


def middle(ordered: Floats) -> float:
    """The median of values that are in order already."""
    half = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[half])
    return float(ordered[half - 1] + ordered[half]) / 2


def mann_kendall_z(slopes: Floats, count: int) -> float:
    """How far the pairs that rise outnumber those that fall, in standard deviations.

    Mann (1945), Kendall (1975), without the correction for ties: ties only make it smaller.

    Args:
        slopes: All pair slopes of the values, as `pair_slopes` gives them.
        count: How many values there were.
    """
    excess = float(np.count_nonzero(slopes > 0) - np.count_nonzero(slopes < 0))
    variance = count * (count - 1) * (2 * count + 5) / 18
    return (excess - math.copysign(min(1.0, abs(excess)), excess)) / math.sqrt(variance)


def sigma(values: Floats) -> float:
    """The spread of most of the values, as a standard deviation."""
    return MAD_TO_SIGMA * float(np.median(np.abs(values - np.median(values))))
