"""What harmless trainings do to memory, a function for each family of runs.

`CLEAN` was looked at while the detector's limits were set; `HELD_OUT_CLEAN` was not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.series.background import Background


def fixed(run: Background) -> None:
    """Batches of one shape."""
    run.tokens = np.full(run.steps, run.tokens[0])


def variable(run: Background) -> None:
    """Batches of any length, held to the end of the step."""
    run.hold_tokens()


def grouped(run: Background) -> None:
    """Batches sorted within groups, longest first."""
    group = int(run.rng.integers(20, 90))
    for start in range(0, run.steps, group):
        run.tokens[start : start + group] = np.sort(run.tokens[start : start + group])[::-1]
    run.hold_tokens()


def longer_and_longer(run: Background) -> None:
    """A curriculum, smooth or in stages."""
    scale = np.linspace(run.rng.uniform(0.15, 0.5), 1.3, run.steps)
    if run.rng.random() < 0.5:
        scale = np.round(scale * (stages := run.rng.integers(3, 7))) / stages + 0.05
    run.set_lengths(scale)
    run.hold_tokens(10, 400)


def next_batch_on_device(run: Background) -> None:
    """Memory follows the batch that comes."""
    now, run.tokens = run.tokens, np.roll(run.tokens, -1)
    run.hold_tokens()
    run.tokens = now


def warming_up(run: Background) -> None:
    """Workspaces, autotuning, recompilations: growth that dies away."""
    tau = run.size(5, 250)
    shape = 1 - np.exp(-np.arange(run.steps) / tau)
    if run.rng.random() < 0.4:
        shape = np.floor(shape * 8) / 8
    run.held += run.size(5, 1000) * shape


def lazy_experts(run: Background) -> None:
    """Optimizer state of an expert comes with its first gradient, and is accounted."""
    ranks = np.arange(1, run.rng.integers(16, 257))
    chance = ranks ** -run.rng.uniform(0.8, 1.6)
    first = run.rng.geometric(np.clip(chance / chance.sum() * run.rng.integers(2, 32), 1e-4, 1))
    made = np.searchsorted(np.sort(first), np.arange(run.steps), side="right")
    run.accounted += run.size(2, 60) * made


def one_off(run: Background) -> None:
    """A few allocations that come once and stay."""
    for at in run.rng.integers(5, run.steps, run.rng.integers(1, 4)):
        run.held[at:] += run.size(10, 2000)


def first_eval(run: Background) -> None:
    """The first evaluation leaves a cache, each one a trace that goes within some steps."""
    ran = np.flatnonzero(run.every("eval", int(run.rng.integers(40, 400))))
    run.held[ran[0] :] += run.size(1, 500)
    width, height = run.rng.integers(1, 7), run.size(10, 1000)
    for at in ran:
        run.held[at : at + width] += height


def collected(run: Background) -> None:
    """Reference cycles, swept by the collector, ever more rarely in half of the runs."""
    run.held += run.teeth(15, 200, widen=run.rng.choice([1.0, 1.2]))


def wandering(run: Background) -> None:
    """Noise that remembers."""
    memory, spread = run.rng.uniform(0.95, 0.998), run.size(3, 150)
    pushes = run.rng.normal(0, spread * np.sqrt(1 - memory**2), run.steps)
    level = 0.0
    for at, push in enumerate(pushes):
        level = memory * level + push
        run.held[at] += level + 4 * spread


def longest_batch(run: Background) -> None:
    """A buffer that is as large as the longest batch so far."""
    longest = np.maximum.accumulate(run.tokens)
    run.held += run.size(10, 1500) * longest / longest[-1]


def generation_cycle(run: Background) -> None:
    """Rollouts that are made at once and used up, or saved up, over some steps."""
    period = int(run.rng.integers(4, 65))
    part = np.arange(run.steps) % period / period
    run.held += run.size(10, 1000) * (part if run.rng.random() < 0.5 else 1 - part)


def profiled(run: Background) -> None:
    """A profiler records for some steps, now and then, and holds what it records."""
    on = np.arange(run.steps) % run.rng.integers(150, 700) < run.rng.integers(5, 60)
    on[: run.rng.integers(40, 200)] = False
    run.events["profiler"] = on
    since = np.arange(run.steps) - np.maximum.accumulate(np.where(on, 0, np.arange(run.steps)))
    run.held += run.size(0.5, 20) * since


def settling(run: Background) -> None:
    """Memory that falls."""
    run.held += run.size(10, 1000) * np.exp(-np.arange(run.steps) / run.size(50, 800))


def quadratic(run: Background) -> None:
    """Held out: a mask or scores that grow with the square of the length, under a curriculum."""
    run.set_lengths(np.linspace(run.rng.uniform(0.2, 0.6), 1.2, run.steps))
    share = (run.tokens / run.tokens.max()) ** 2
    run.held += run.size(50, 1500) * share


def cache_of_hits(run: Background) -> None:
    """A cache of what was seen, which fills ever more slowly up to its bound."""
    filled = 1 - np.exp(-np.arange(run.steps) / run.size(40, 500))
    run.held += np.floor(run.size(30, 600) * filled / (entry := run.size(0.5, 10))) * entry


def shapes_seen(run: Background) -> None:
    """One workspace or compiled graph for each new bucket of lengths."""
    run.tokens = np.ceil(run.tokens / (width := run.rng.choice([64, 128, 256]))) * width
    _, first = np.unique(run.tokens, return_index=True)
    new = np.zeros(run.steps)
    new[first] = run.size(2, 60)
    run.held += np.cumsum(new)


def never_told(run: Background) -> None:
    """Held out: variable lengths that nobody tells, and heavy-tailed ones."""
    run.held += run.size(5, 60) * run.rng.pareto(2.5, run.steps).clip(max=30)
    run.tells_tokens = False


def swapped_models(run: Background) -> None:
    """Held out: phases with and without a second model on the card."""
    period, on = int(run.rng.integers(10, 120)), run.size(100, 4000)
    run.held += on * (np.arange(run.steps) // period % 2)


def metric_buffer(run: Background) -> None:
    """Outputs kept for a metric and dropped when it is computed, at each epoch's end."""
    every = int(run.rng.integers(60, 300))
    run.every("epoch", every)
    run.held += run.size(0.05, 5) * ((np.arange(run.steps) + 1) % every)


def unfrozen(run: Background) -> None:
    """Held out: layers join at each epoch; gradients and optimizer state are accounted."""
    ran = np.flatnonzero(run.every("epoch", run.steps // int(run.rng.integers(4, 9))))
    for at in ran:
        run.accounted[at:] += run.size(50, 500)


def daily_tide(run: Background) -> None:
    """Held out: memory that swells and falls slowly, as a shared buffer does with its load."""
    period = run.rng.uniform(200, 900)
    phase = run.rng.uniform(0, 2 * np.pi)
    run.held += run.size(10, 300) * (1 + np.sin(2 * np.pi * np.arange(run.steps) / period + phase))


def vocabulary(run: Background) -> None:
    """Held out: one entry for each new word, which come ever more rarely, up to a bound."""
    seen = (1 + np.arange(run.steps)) ** run.rng.uniform(0.3, 0.6)
    run.held += run.size(5, 300) * np.minimum(seen / 1500**0.45, run.rng.uniform(0.5, 2))


def queue(run: Background) -> None:
    """Held out: a queue of samples that is full after some hundred steps."""
    run.held += run.size(5, 400) * np.minimum(np.arange(run.steps) / run.rng.integers(20, 300), 1)


def second_copy(run: Background) -> None:
    """Held out: weights are copied now and then, for some steps; the first time leaves a part."""
    period, height = int(run.rng.integers(50, 800)), run.size(50, 4000)
    on = np.arange(run.steps) % period < run.rng.integers(1, 30)
    on[:period] = False
    run.held += height * on
    run.held[period:] += height * run.rng.uniform(0, 0.3)


CLEAN: tuple[Callable[[Background], None], ...] = (
    *(fixed, variable, grouped, longer_and_longer, next_batch_on_device, warming_up),
    *(lazy_experts, one_off, first_eval, collected, wandering, longest_batch),
    *(generation_cycle, profiled, settling, cache_of_hits, shapes_seen, metric_buffer),
)
HELD_OUT_CLEAN: tuple[Callable[[Background], None], ...] = (
    *(quadratic, never_told, swapped_models, unfrozen, daily_tide),
    *(vocabulary, queue, second_copy),
)
