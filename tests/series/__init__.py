"""Made-up runs, step by step, of which it is known whether memory leaks.

A run is a background (what a harmless training does to memory) and, if it leaks, a leak on top of
it. Sizes are drawn in MiB over the ranges that real reports show, and handed out in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.series.background import Background
from tests.series.clean import CLEAN, HELD_OUT_CLEAN
from tests.series.leaks import HELD_OUT_LEAKS, LEAKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.series.leaks import Leak

MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One made-up run, as the detector is given it, and the truth about it.

    Attributes:
        family: Names of its background and, if it leaks, of its leak.
        updates: Arguments of `CreepDetector.update`, one a step.
        onset: The first step, counted from 1, that leaks; `None` for a clean run.
        full: The step at which the leak fills the card; `None` if it does not.
    """

    family: str
    updates: list[dict[str, Any]]
    onset: int | None
    full: int | None


def make(seed: int, clean: Callable[[Background], None], leak: Leak | None = None) -> Run:
    """Make the run of one seed."""
    rng = np.random.default_rng(seed)
    run = Background(rng, int(rng.choice([1500, 3000, 6000])))
    clean(run)
    leaked = np.zeros(run.steps) if leak is None else np.cumsum(leak(run))
    activations = run.size(2e3, 3e4) * run.tokens / run.tokens.mean()
    peak = run.accounted + run.held + activations + np.abs(rng.normal(0, 20, run.steps))
    free = float(peak.max()) * rng.uniform(1.03, 1.6) - peak - leaked
    full = np.flatnonzero(free < 0)
    allocated = run.accounted + run.held + leaked
    updates = [
        {
            "allocated_bytes": int(allocated[step] * MIB),
            "accounted_bytes": int(run.accounted[step] * MIB),
            "batch_tokens": int(run.tokens[step]) if run.tells_tokens else None,
            "event": "+".join(name for name, ran in run.events.items() if ran[step]) or None,
            "headroom_bytes": int(free[step] * MIB),
        }
        for step in range(run.steps)
    ]
    return Run(
        family=clean.__name__ + (f" + {leak.__name__}" if leak else ""),
        updates=updates,
        onset=int(np.flatnonzero(leaked)[0]) + 1 if leaked.any() else None,
        full=int(full[0]) + 1 if len(full) else None,
    )


def tuned(count: int, base: int) -> Iterator[Run]:
    """`count` clean and as many leaky runs of the families that limits were set on."""
    return _mixed(count, base, CLEAN, LEAKS, CLEAN)


def held_out(count: int, base: int) -> Iterator[Run]:
    """`count` clean and as many leaky runs of families that no limit was set on."""
    return _mixed(count, base, HELD_OUT_CLEAN, HELD_OUT_LEAKS, CLEAN)


def _mixed(
    count: int,
    base: int,
    clean: tuple[Callable[[Background], None], ...],
    leaks: tuple[Leak, ...],
    under: tuple[Callable[[Background], None], ...],
) -> Iterator[Run]:
    for index in range(count):
        yield make(base + index, clean[index % len(clean)])
    for index in range(count):
        seed = base + count + index
        background = under[int(np.random.default_rng(seed).integers(len(under)))]
        yield make(seed, background, leaks[index % len(leaks)])
