"""The largest plan of a space that fits, with as few questions as can be: pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from oomguard.plan import Plan

if TYPE_CHECKING:
    from oomguard.search_space import Axis, Space

Fits = Callable[[Plan], bool]
"""Whether a plan fits: monotone in rows, length and rank."""

_PARTS = 64  # lengths and ranks are found to within this part of themselves


def best(space: Space, fits: Fits) -> list[Plan]:
    """The largest plan of each variant that fits, the largest of all first.

    Lengths and ranks are the largest to within a sixty-fourth. Of equal plans the one that changes
    less comes first. Every plan has been asked for with `fits`.
    """
    known: dict[Plan, bool] = {}

    def asked(plan: Plan) -> bool:
        if plan not in known:
            known[plan] = fits(plan)
        return known[plan]

    found = [_largest_plan(space, variant, asked) for variant in space.variants]
    plans = [plan for plan in found if plan is not None]
    return sorted(plans, key=lambda plan: -space.size(plan))  # stable: less change comes first


def fewer_rows(space: Space, plan: Plan) -> Plan | None:
    """`plan` with passes of half the rows, or the next fewer; `None` where that is not searched."""
    for axis in space.axes:
        half = bisect_right(axis.values, plan.per_device_train_batch_size // 2)
        if axis.name == "micro_batch_size" and half:
            return space.at(plan, axis.name, axis.values[half - 1])
    return None


def largest(
    values: Sequence[int],
    fits: Callable[[int], bool],
    low: int = -1,
    first: int = 0,
    parts: int | None = None,
) -> int:
    """The index of the largest of ascending values that fits, -1 if none does.

    Args:
        values: Ascending.
        fits: True up to some value, and false above.
        low: Index of a value that is known to fit.
        first: Index of the value to ask for first.
        parts: How close to the limit is close enough: a value is taken if the smallest one known
            not to fit is less than this part of it away. `None`: exact.
    """
    high, index = len(values), first
    while high - low > 1:
        index = min(max(index, low + 1), high - 1)
        if fits(values[index]):
            low = index
        else:
            high = index
        known = low >= 0 and high < len(values)
        if parts and known and (values[high] - values[low]) * parts <= values[low]:
            break
        # Where no limit has been seen yet, twice as far.
        index = 2 * low + 1 if high == len(values) else (low + high) // 2
    return low


def _largest_plan(space: Space, variant: Plan, fits: Fits) -> Plan | None:
    plan = variant
    for axis in space.axes:
        plan = space.at(plan, axis.name, axis.current)
    lowered = []
    for axis in space.axes:
        if fits(plan):
            break
        if axis.values[0] < axis.current:
            plan = space.at(plan, axis.name, axis.values[0])
            lowered.append(axis)
    if not fits(plan):
        return None
    for axis in reversed(lowered):
        below = axis.values[: axis.values.index(axis.current)]  # itself does not fit
        plan = _raised(space, plan, axis, below, len(below) // 2, fits)
    grown = None
    while grown != plan:  # a longer row may leave room for more: reserved bytes go up and down
        grown = plan
        for axis in space.axes:
            if axis.grows and axis not in lowered:
                plan = _raised(space, plan, axis, axis.values, _first_guess(axis, plan), fits)
    return plan


def _raised(
    space: Space, plan: Plan, axis: Axis, values: Sequence[int], first: int, fits: Fits
) -> Plan:
    """`plan`, which fits, with the largest of the values of one axis that does."""
    found = largest(
        values,
        lambda value: fits(space.at(plan, axis.name, value)),
        values.index(getattr(plan, axis.name)),
        first,
        None if axis.name == "micro_batch_size" else _PARTS,
    )
    return space.at(plan, axis.name, values[found])


def _first_guess(axis: Axis, plan: Plan) -> int:
    """The index of the value to ask for first."""
    now = getattr(plan, axis.name)
    if axis.name != "max_length":
        return axis.values.index(now) + 1
    # One row more of this length did not fit: about as many tokens in these rows will not either.
    rows = plan.per_device_train_batch_size
    return bisect_right(axis.values, now * (rows + 1) // rows)
