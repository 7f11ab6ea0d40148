"""What a rule says of made-up runs, counted against the truth."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from oomguard.watch.trend import CreepDetector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.series import Run

IN_TIME = 32  # steps before the card is full
SUDDEN = 128  # steps from the first leak to a full card: too few to ask for a warning


class Rule(Protocol):
    """Anything that takes a reading a step and says whether it reports."""

    def report(self, update: dict[str, Any]) -> bool:
        """Take one reading."""


class Creep:
    """This package's detector."""

    def __init__(self) -> None:
        """Start watching."""
        self._detector = CreepDetector()

    def report(self, update: dict[str, Any]) -> bool:
        """Take one reading; that growth stopped is no alarm."""
        found = self._detector.update(**update)
        return found is not None and not found.withdrawn


@dataclass
class Score:
    """What a rule did on many runs.

    Attributes:
        found: Leaky runs that were reported.
        leaky: Leaky runs.
        in_time: Runs reported 32 or more steps before the leak filled the card.
        filled: Runs whose leak filled the card, but not within 128 steps.
        alarms: False alarms.
        harmless_steps: Steps in which an alarm is false.
        alarmed: Clean runs with an alarm.
        clean: Clean runs.
        steps: All steps.
        seconds: CPU time of all updates.
        wrong: Clean runs alarmed and leaky runs missed, by family.
    """

    found: int = 0
    leaky: int = 0
    in_time: int = 0
    filled: int = 0
    alarms: int = 0
    harmless_steps: int = 0
    alarmed: int = 0
    clean: int = 0
    steps: int = 0
    seconds: float = 0.0
    wrong: Counter[str] = field(default_factory=Counter)

    def add(self, run: Run, reports: list[int]) -> None:
        """Count one run, given the steps at which the rule reported, from 1."""
        onset = len(run.updates) + 1 if run.onset is None else run.onset
        false = sum(step < onset for step in reports)
        after = [step for step in reports if step >= onset]
        self.alarms += false
        self.harmless_steps += onset - 1
        self.steps += len(run.updates)
        if run.onset is None:
            self.clean += 1
            self.alarmed += bool(false)
            self.wrong[run.family] += bool(false)
            return
        self.leaky += 1
        self.found += bool(after)
        self.wrong[run.family] += not after
        if run.full is not None and run.full - onset >= SUDDEN:
            self.filled += 1
            self.in_time += bool(after) and after[0] <= run.full - IN_TIME

    @property
    def recall(self) -> float:
        """Share of leaky runs that were reported."""
        return self.found / max(self.leaky, 1)

    @property
    def false_alarms(self) -> float:
        """False alarms in 10,000 harmless steps."""
        return 1e4 * self.alarms / max(self.harmless_steps, 1)

    @property
    def clean_alarmed(self) -> float:
        """Share of clean runs with an alarm."""
        return self.alarmed / max(self.clean, 1)

    @property
    def warned(self) -> float:
        """Share of the runs whose leak filled the card that were reported in time."""
        return self.in_time / max(self.filled, 1)

    @property
    def us_per_step(self) -> float:
        """Microseconds of CPU time a step."""
        return 1e6 * self.seconds / max(self.steps, 1)


def measure(runs: Iterable[Run], rules: dict[str, Callable[[], Rule]]) -> dict[str, Score]:
    """Give each run to each rule."""
    scores = {name: Score() for name in rules}
    for run in runs:
        for name, make in rules.items():
            rule, reports = make(), []
            began = time.process_time()
            for step, update in enumerate(run.updates, 1):
                if rule.report(update):
                    reports.append(step)
            scores[name].seconds += time.process_time() - began
            scores[name].add(run, reports)
    return scores
