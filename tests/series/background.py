"""A harmless training in the making, to which families of runs add what memory does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


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
