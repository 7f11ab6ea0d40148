"""How well creep is told from harmless growth, beside simpler rules, on made-up runs.

    python -m benchmarks.creep [--runs 300] [--seed 1]

Prints two tables: runs of the families that the detector's limits were set on, and runs of families
that no limit was set on. Recall counts leaky runs that were reported after the leak began; false
alarms are reports in clean runs, and in leaky ones before it began; in time means 32 or more steps
before the leak fills the card, of those that take 128 steps or more to do so.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import rich
from rich.table import Table

from tests import series
from tests.verdicts import Creep, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tests.verdicts import Rule, Score

WINDOW = 512
EVERY = 32
LEAST = 16 * series.MIB


class FiveRises:
    """Five steps in a row that each hold more than the one before, by 1 MiB in all."""

    def __init__(self) -> None:
        """Start without readings."""
        self._last: deque[int] = deque(maxlen=6)
        self._said = False

    def report(self, update: dict[str, Any]) -> bool:
        """Say so when it becomes true."""
        self._last.append(update["allocated_bytes"])
        values = [*self._last]
        rises = len(values) == 6 and all(a < b for a, b in pairwise(values))
        now = rises and values[-1] - values[0] > series.MIB
        before, self._said = self._said, now
        return now and not before


class Windowed:
    """A test of the last 512 readings, every 32 steps, after 32 to warm up."""

    def __init__(self) -> None:
        """Start without readings."""
        self._last: deque[int] = deque(maxlen=WINDOW)
        self._step = 0
        self._said = False

    def report(self, update: dict[str, Any]) -> bool:
        """Say so when it becomes true."""
        self._step += 1
        if self._step <= EVERY:
            return False
        self._last.append(update["allocated_bytes"])
        if self._step % EVERY or len(self._last) < WINDOW // 4:
            return False
        now = self.grows(np.array(self._last, np.float64))
        before, self._said = self._said, now
        return now and not before

    def grows(self, values: NDArray[np.float64]) -> bool:
        """Whether the window grows."""
        raise NotImplementedError


class StraightLine(Windowed):
    """A least-squares line that rises by 16 MiB and explains 95 % of the variance."""

    def grows(self, values: NDArray[np.float64]) -> bool:
        """Whether the window grows."""
        time_ = np.arange(len(values)) - (len(values) - 1) / 2
        slope = float(time_ @ values / (time_ @ time_))
        variance = float(values.var())
        explained = slope**2 * float(time_.var()) / variance if variance else 0.0
        return slope * len(values) > LEAST and explained >= 0.95


class TheilSen(Windowed):
    """Theil-Sen slope worth 16 MiB and Mann-Kendall z above 3.3 (p < .001), of 48 readings."""

    def grows(self, values: NDArray[np.float64]) -> bool:
        """Whether the window grows."""
        values = values[np.linspace(0, len(values) - 1, 48).astype(int)]
        first, second = np.triu_indices(48, 1)
        differences = values[second] - values[first]
        slope = float(np.median(differences / (second - first)))
        _, ties = np.unique(values, return_counts=True)
        tied = float((ties * (ties - 1) * (2 * ties + 5)).sum())
        variance = (48 * 47 * 101 - tied) / 18
        z = float(np.sign(differences).sum()) / math.sqrt(variance) if variance else 0.0
        return slope * 48 > LEAST and z > 3.3


RULES: dict[str, Callable[[], Rule]] = {
    "CreepDetector": Creep,
    "5 rises": FiveRises,
    "R² ≥ .95": StraightLine,
    "Theil-Sen + Mann-Kendall": TheilSen,
}


def table(title: str, scores: dict[str, Score]) -> Table:
    """The scores, one rule a row."""
    result = Table(title=title)
    for name in ("", "recall", "false / 10k steps", "clean alarmed", "in time", "µs / step"):
        result.add_column(name, justify="left" if not name else "right")
    for name, score in scores.items():
        result.add_row(
            name,
            f"{score.recall:.3f}",
            f"{score.false_alarms:.3f}",
            f"{score.clean_alarmed:.1%}",
            f"{score.warned:.1%}",
            f"{score.us_per_step:.1f}",
        )
    return result


def main() -> None:
    """Print both tables, and where the detector erred."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="clean runs, and as many leaky ones")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    base = given.seed * 1_000_000
    for title, runs in (("tuned on", series.tuned), ("held out", series.held_out)):
        scores = measure(runs(given.runs, base), RULES)
        rich.print(table(f"{given.runs} clean and {given.runs} leaky runs, {title}", scores))
        wrong = scores["CreepDetector"].wrong
        rich.print({family: count for family, count in wrong.items() if count})


if __name__ == "__main__":
    main()
