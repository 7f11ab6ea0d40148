"""Leaks, a function for each family: what is left behind at each step, MiB.

`LEAKS` was looked at while the detector's limits were set; `HELD_OUT_LEAKS` was not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.series.background import Background
from tests.series.clean import profiled

if TYPE_CHECKING:
    from tests.series.background import Floats

Leak = Callable[[Background], "Floats"]


def steady(run: Background) -> Floats:
    """The same every step."""
    return run.size(0.1, 20) * run.rng.uniform(0.9, 1.1, run.steps)


def drowned(run: Background) -> Floats:
    """A slow leak under noise that the batches explain in part."""
    noise = run.rng.uniform(60, 200)
    run.held += noise * (4 + run.rng.normal(0, 1, run.steps)).clip(min=0)
    return np.full(run.steps, run.size(0.15, 0.5))


def with_tokens(run: Background) -> Floats:
    """In proportion to the batch."""
    return run.tokens * (run.size(0.2, 20) / float(run.tokens.mean()))


def _at(run: Background, name: str) -> Floats:
    ran = run.events.get(name, np.zeros(run.steps, bool))
    if ran.sum() < 7:
        ran = run.every(name, max(20, run.steps // int(run.rng.integers(8, 30))))
    return np.where(ran, run.size(5, 300) * run.rng.uniform(0.7, 1.3, run.steps), 0.0)


def in_eval(run: Background) -> Floats:
    """Each evaluation leaves something."""
    return _at(run, "eval")


def in_save(run: Background) -> Floats:
    """Each save leaves something."""
    return _at(run, "save")


def late(run: Background) -> Floats:
    """From the middle of the run on."""
    start = int(run.steps * run.rng.uniform(0.3, 0.65))
    return np.where(np.arange(run.steps) < start, 0.0, run.size(0.3, 20))


def now_and_then(run: Background) -> Floats:
    """At random steps."""
    return np.where(run.rng.random(run.steps) < run.size(0.01, 0.2), run.size(5, 100), 0.0)


def in_bursts(run: Background) -> Floats:
    """On for some hundred steps, off for as many."""
    half = int(run.rng.integers(100, 400))
    return np.where(np.arange(run.steps) // half % 2, 0.0, run.size(0.3, 15))


def faster_and_faster(run: Background) -> Floats:
    """Growing with each step."""
    return run.size(0.5, 20) * np.arange(run.steps) / run.steps * 2


def among_teeth(run: Background) -> Floats:
    """Beside garbage that is collected."""
    run.held += run.teeth(15, 200)
    return np.full(run.steps, run.size(0.3, 20))


def each_kth(run: Background) -> Floats:
    """Held out: at every k-th step, when a log is written or an average updated."""
    period = int(run.rng.integers(5, 60))
    return np.where(np.arange(run.steps) % period == 0, run.size(2, 200), 0.0)


def with_squares(run: Background) -> Floats:
    """Held out: attention maps that are kept."""
    squares: Floats = np.square(run.tokens)
    squares *= run.size(0.2, 15) / float(squares.mean())
    return squares


def in_recovery(run: Background) -> Floats:
    """Held out: each recovery from a failed step keeps what the step held."""
    ran = np.zeros(run.steps, bool)
    ran[run.rng.choice(np.arange(20, run.steps), run.rng.integers(8, 25), replace=False)] = True
    run.events["recovery"] = ran
    return np.where(ran, run.size(30, 600), 0.0)


def beside_profiler(run: Background) -> Floats:
    """Held out: steady, while a profiler comes and goes."""
    profiled(run)
    return np.full(run.steps, run.size(0.3, 15))


def two_rates(run: Background) -> Floats:
    """Held out: slow first, then several times as fast, with a pause between."""
    third, rate = run.steps // 3, run.size(0.3, 5)
    slow, pause = np.full(third, rate), np.zeros(third // 2)
    return np.concatenate([slow, pause, np.full(run.steps - third - third // 2, 4 * rate)])


LEAKS: tuple[Leak, ...] = (
    *(steady, drowned, with_tokens, in_eval, in_save, late, now_and_then, in_bursts),
    *(faster_and_faster, among_teeth),
)
HELD_OUT_LEAKS: tuple[Leak, ...] = (
    *(each_kth, with_squares, in_recovery, beside_profiler, two_rates),
)
