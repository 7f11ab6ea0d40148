"""What a rung of a ladder is: a pure decision about the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from oomguard.event import OOMEvent
from oomguard.plan import Plan


class Fidelity(StrEnum):
    """What a rung does to the result of the training."""

    EXACT = "exact"
    """The same mathematics up to the order of float additions."""
    NUMERIC = "numeric"
    """The same training with coarser numbers (8-bit optimizer state)."""
    SEMANTIC = "semantic"
    """Trains on or with less (shorter rows, fewer or smaller adapters)."""


@dataclass(frozen=True)
class Rung:
    """One lever as a pure decision: called with a plan and an event, it answers the next plan.

    Subclasses declare their `fidelity` and implement `__call__`. Any plain callable with the same
    signature can stand in a ladder too; it counts as SEMANTIC.

    Attributes:
        fidelity: What it does to the result.
        relieves_optimizer: Whether it frees memory while gradients are clipped and the optimizer
            steps. Activations are gone by then.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.SEMANTIC
    relieves_optimizer: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The rung's name in logs and reports."""
        return type(self).__name__

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """The plan after this rung, or `None` when it has nothing more to give."""
        raise NotImplementedError(self.name)

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """Why `__call__` answered `None`, for the log."""
        return "it has nothing more to give"


RungLike = Rung | Callable[[Plan, OOMEvent], Plan | None]


def rung_name(rung: RungLike) -> str:
    """The name of a rung or of a plain callable."""
    return rung.name if isinstance(rung, Rung) else getattr(rung, "__name__", repr(rung))


def rung_fidelity(rung: RungLike) -> Fidelity:
    """The fidelity of a rung; a plain callable may do anything, so it counts as SEMANTIC."""
    return rung.fidelity if isinstance(rung, Rung) else Fidelity.SEMANTIC


def rung_spent(rung: RungLike, plan: Plan, event: OOMEvent) -> str:
    """Why `rung` answered `None`."""
    return rung.spent(plan, event) if isinstance(rung, Rung) else "it answered None"


def rung_relieves(rung: RungLike, phase: str) -> bool:
    """Whether `rung` frees memory in a phase of `OOMEvent`; a plain callable may everywhere."""
    if phase not in {"clip", "optimizer"} or not isinstance(rung, Rung):
        return True
    return rung.relieves_optimizer
