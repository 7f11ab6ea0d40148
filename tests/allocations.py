"""Where a training allocates, and a ladder without an end for failures in a row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import oomguard
from oomguard.ladder import Ladder
from oomguard.rung import Fidelity
from oomguard.testing import VirtualCard

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.event import OOMEvent
    from oomguard.plan import Plan
    from tests.twin import Build


class AnotherTry(oomguard.Rung):
    """A rung that never ends and changes nothing that these trainings read."""

    fidelity = Fidelity.EXACT

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan:
        return replace(plan, max_pass_tokens=(plan.max_pass_tokens or 10**9) - 1)


NEVER_SPENT = Ladder(oomguard.CheckpointActivations(), AnotherTry())


class LoggingCard(VirtualCard):
    """A card with room for everything that writes down where each allocation was made.

    Attributes:
        places: Phase and optimizer step of every allocation; both as in an `OOMEvent`.
    """

    def __init__(self, build: Build) -> None:
        """Take what makes the trainer; call the card's own `build` in its place."""
        super().__init__(fail_at=10**9)
        self.places: list[tuple[str, int]] = []
        self._build = build
        self._trainer: Any = None

    def build(self, folder: Path) -> Any:
        self._trainer = self._build(folder)
        return self._trainer

    def numbers(self, *phases: str) -> list[int]:
        """The numbers of the allocations in these phases, as `fail_at` takes them."""
        return [number for number, (phase, _) in enumerate(self.places, 1) if phase in phases]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        new = self.allocations - len(self.places)
        phase = self._trainer._oomguard.transaction.phase
        self.places += [(phase, self._trainer.state.global_step + 1)] * new
        return out
