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
_STEPS = (1.08, 1.25, 1.6, 2.0)  # how much more than estimated a plan is taken to need that died


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
        tried = {trial.plan for trial in trials}
        plan = search(scale) or smallest
        while plan in tried and plan != smallest and good == math.inf:
            scale *= _STEPS[0]  # rows are few numbers: many scales have one and the same plan
            plan = search(scale) or smallest
        if len(trials) == MOST_TRIALS - 1 and good == math.inf:
            plan = smallest
        if plan in tried:
            break
        trials.append(run(plan))
        if trials[-1].fits:
            good = scale
            scale = max(ratio(trials[-1]) * _MARGIN, math.sqrt(bad * good))
            if scale > good * _CLOSE:
                break
        else:
            bad = scale
            scale = math.sqrt(bad * good) if good < math.inf else bad * _STEPS[len(trials) - 1]
    return trials
