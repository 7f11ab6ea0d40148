"""Which plans are tried, starting from the estimate: pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from oomguard.plan import Plan

MOST_TRIALS = 4

_CLOSE = 0.97  # an estimate this close to what was measured leaves nothing to win
_MARGIN = 1.02  # what is asked of the next plan above the ratio that was measured
_STEP = 1.1  # how much more than estimated the next plan is taken to need when one died
_LOOKS = 16  # for another plan than those that were run


class Outcome(Protocol):
    """What a trial tells.

    Attributes:
        plan: What was run.
        fits: Whether it ran through.
    """

    @property
    def plan(self) -> Plan:
        """See the class."""

    @property
    def fits(self) -> bool:
        """See the class."""


Tried = TypeVar("Tried", bound=Outcome)


def settle(
    search: Callable[[float], Plan | None],
    run: Callable[[Plan], Tried],
    ratio: Callable[[Tried], float],
    smallest: Plan,
) -> list[Tried]:
    """Run plans until the largest that fits is known well enough, four at the most.

    The first is the best by the estimates. Where it takes less than estimated, a larger one comes
    next; where it dies, smaller ones, and the smallest of all as the last.

    Args:
        search: The best plan if everything takes so many times the estimate; `None` if none fits.
        run: Runs the worst case of a plan.
        ratio: What a plan that fits took, by what it was estimated to take.
        smallest: The plan that needs the least of all.

    Returns:
        The trials in their order. The last that fits is the largest that does.
    """
    trials: list[Tried] = []
    scale, good, bad = 1.0, math.inf, 0.0  # scales whose plan ran, and died
    while len(trials) < MOST_TRIALS:
        plan = search(scale) or smallest
        if len(trials) == MOST_TRIALS - 1 and good == math.inf:
            plan = smallest
        if any(trial.plan == plan for trial in trials):
            break
        trials.append(run(plan))
        if trials[-1].fits:
            good = scale
            scale = ratio(trials[-1]) * _MARGIN
            if scale > good * _CLOSE:
                break
        else:
            bad = scale
        known = {trial.plan: trial.fits for trial in trials}
        scale, good, bad = _between(search, known, smallest, scale, good, bad)
    return trials


def _between(
    search: Callable[[float], Plan | None],
    known: dict[Plan, bool],
    smallest: Plan,
    scale: float,
    good: float,
    bad: float,
) -> tuple[float, float, float]:
    """The next scale whose plan has not been run, and the bounds it lies between.

    Rows are few numbers, so that many scales have one and the same plan.
    """
    if not bad < scale < good:
        scale = _inside(good, bad)
    for _ in range(_LOOKS):
        plan = search(scale) or smallest
        if plan not in known:
            break
        good, bad = (scale, bad) if known[plan] else (good, scale)
        scale = _inside(good, bad)
    return scale, good, bad


def _inside(good: float, bad: float) -> float:
    return bad * _STEP if good == math.inf else math.sqrt(max(bad, good / _STEP**4) * good)
