"""Made-up runs, step by step, of which it is known whether memory leaks.

A run is a background (what a harmless training does to memory) and, if it leaks, a leak on top of
it. Sizes are drawn in MiB over the ranges that real reports show, and handed out in bytes.
`CLEAN` and `LEAKS` were looked at while the detector's limits were set; `HELD_OUT_CLEAN` and
`HELD_OUT_LEAKS` were not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.random import Generator
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MIB = 2**20


@dataclass
class Background:
    """A run in the making, MiB; a family of clean runs adds to it.

    Attributes:
        rng: What everything is drawn from.
        steps: How many.
        tokens: Padded tokens of each step's batch.
        held: Unaccounted MiB at the end of each step, without a leak.
        accounted: Parameters, gradients, optimizer state.
        events: By name, at which steps it ran.
        tells_tokens: Whether the detector is told the tokens.
    """

    rng: Generator
    steps: int
    tokens: Floats = field(init=False)
    held: Floats = field(init=False)
    accounted: Floats = field(init=False)
    events: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    tells_tokens: bool = True

    def __post_init__(self) -> None:
        """A model, an optimizer that makes its state at the first step, batches, a little noise."""
        rng, steps = self.rng, self.steps
        self.set_lengths(np.ones(steps))
        weights = self.size(1e3, 4e4)
        self.accounted = np.full(steps, weights)
        self.accounted[1:] += weights * rng.choice([0.01, 0.5, 2.0])
        self.held = np.abs(rng.normal(0, rng.choice([0.005, 0.1, 1.5]), steps))
        for name, every in (("eval", (40, 400)), ("save", (100, 600)), ("epoch", (300, 1500))):
            if rng.random() < 0.5:
                self.every(name, int(rng.integers(*every)))

    def size(self, low: float, high: float) -> float:
        """A size between two others, each order of magnitude as likely as the next."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def every(self, name: str, period: int) -> NDArray[np.bool_]:
        """Run an event every `period` steps."""
        self.events[name] = np.arange(self.steps) % period == period - 1
        return self.events[name]

    def set_lengths(self, scale: Floats, spread: float | None = None) -> None:
        """Draw batches, each padded to its longest row; `scale` moves the typical length."""
        rows = int(self.rng.choice([1, 2, 4, 8, 16]))
        limit = int(self.rng.choice([512, 1024, 2048, 4096]))
        spread = self.rng.uniform(0.3, 0.9) if spread is None else spread
        typical = np.log(limit * self.rng.uniform(0.15, 0.45) * scale)
        lengths = np.exp(self.rng.normal(typical[:, None], spread, (self.steps, rows)))
        self.tokens = np.ceil(np.clip(lengths, 16, limit)).max(1) * rows

    def hold_tokens(self, low: float = 5, high: float = 250) -> None:
        """Keep something of the last batch alive at the end of the step, as outputs are."""
        spread = max(float(self.tokens.std()), 0.05 * float(self.tokens.mean()))
        self.held += self.size(low, high) / spread * self.tokens

    def teeth(self, shortest: int, longest: int, *, widen: float = 1.0) -> Floats:
        """Garbage that collects at a constant rate and is swept now and then."""
        period = float(self.rng.integers(shortest, longest))
        height = self.size(5, 1000)
        rate, out, at = height / period, np.zeros(self.steps), 0
        while at < self.steps:
            length = int(period * self.rng.uniform(0.75, 1.25)) + 1
            end = min(at + length, self.steps)
            out[at:end] = rate * np.arange(end - at)
            at = end
            period = min(period * widen, longest)
        return out


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


CLEAN: tuple[Callable[[Background], None], ...] = (
    *(fixed, variable, grouped, longer_and_longer, next_batch_on_device, warming_up),
    *(lazy_experts, one_off, first_eval, collected, wandering, longest_batch),
    *(generation_cycle, profiled, settling, cache_of_hits, shapes_seen, metric_buffer),
)
LEAKS: tuple[Leak, ...] = (
    *(steady, drowned, with_tokens, in_eval, in_save, late, now_and_then, in_bursts),
    *(faster_and_faster, among_teeth),
)
HELD_OUT_CLEAN: tuple[Callable[[Background], None], ...] = (
    *(quadratic, never_told, swapped_models, unfrozen, daily_tide),
    *(vocabulary, queue, second_copy),
)
HELD_OUT_LEAKS: tuple[Leak, ...] = (
    *(each_kth, with_squares, in_recovery, beside_profiler, two_rates),
)


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
