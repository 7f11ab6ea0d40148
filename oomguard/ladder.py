"""The ladder: which setting gives way next. Pure decisions; `levers` carries them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

from oomguard.errors import ConfigurationError
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
    """

    fidelity: ClassVar[Fidelity] = Fidelity.SEMANTIC

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


@dataclass(frozen=True)
class CheckpointActivations(Rung):
    """Recompute activations in backward instead of storing them (gradient checkpointing)."""

    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Switch checkpointing on; spent when it is on."""
        return None if plan.gradient_checkpointing else replace(plan, gradient_checkpointing=True)

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        return "gradient_checkpointing is already on"


@dataclass(frozen=True)
class HalveSequence(Rung):
    """Halve the longest row that is trained on.

    Text and packed rows are cut into windows that overlap by half, so that every trained target is
    kept and only far context is lost; rows of completion-only losses lose their tail.

    Attributes:
        floor: Tokens below which `max_length` is not lowered.
        mode: `"windows"` or `"truncate"`; `None` chooses by the kind of loss.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.SEMANTIC
    floor: int = 256
    mode: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.floor, bool) or not isinstance(self.floor, int) or self.floor < 2:
            msg = f"HalveSequence(floor={self.floor!r}): floor must be an int of 2 or more tokens."
            raise ConfigurationError(msg)
        if self.mode not in {None, "windows", "truncate"}:
            msg = f"HalveSequence(mode={self.mode!r}): use 'windows', 'truncate' or None."
            raise ConfigurationError(msg)

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Halve `max_length`, or the width of the batch that failed where that is shorter."""
        longest = self._longest(plan, event)
        if longest is None or max(self.floor, longest // 2) >= longest:
            return None
        length = max(self.floor, longest // 2)
        rows = plan.micro_batch_size or plan.per_device_train_batch_size
        tokens = (event.tokens or rows * longest) * length // longest
        # Overlapping windows hold more tokens than the rows they were cut from: without this
        # limit their one pass would be larger than the one that failed.
        limit = min(max(tokens, length), plan.max_pass_tokens or tokens)
        return replace(
            plan,
            max_length=length,
            max_pass_tokens=max(1, limit),
            sequence_mode=self.mode or plan.sequence_mode,
        )

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        longest = self._longest(plan, event)
        if longest is None:
            return "no batch has been seen yet and max_length is not set"
        return f"rows of {longest} tokens are not above floor={self.floor}"

    @staticmethod
    def _longest(plan: Plan, event: OOMEvent) -> int | None:
        known = [length for length in (plan.max_length, event.width) if length is not None]
        return min(known, default=None)


@dataclass(frozen=True)
class SplitBatch(Rung):
    """Run each loaded batch as several smaller passes, accumulating their gradients.

    Every call halves the pass that failed, down to single rows (or documents of a packed row). The
    limit is kept in padded tokens, so that short batches stay whole.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Halve `micro_batch_size` and `max_pass_tokens`; spent at one row a pass."""
        rows = plan.micro_batch_size or plan.per_device_train_batch_size
        units = event.rows if event.rows is not None else rows
        width = event.width if event.width is not None else plan.max_length
        if units < 2 or width is None:
            return None
        tokens = event.tokens if event.tokens is not None else units * width
        half_units = -(-units // 2)
        padded = tokens % (units * width) == 0  # a unit is a row, or a pair of them
        limit = half_units * (tokens // units) if padded else max(1, -(-tokens // 2))
        return replace(
            plan,
            micro_batch_size=min(rows, half_units) if padded else -(-rows // 2),
            max_pass_tokens=min(limit, plan.max_pass_tokens or limit),
        )

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        if event.width is None and plan.max_length is None:
            return "no batch has been seen yet and max_length is not set"
        return "the pass that failed is already a single row"


RungLike = Rung | Callable[[Plan, OOMEvent], Plan | None]


class Ladder:
    """An ordered, immutable tuple of rungs. The plan is the state; there is no cursor."""

    def __init__(self, *rungs: RungLike) -> None:
        """Take `rungs` in the order in which they may be used.

        Raises:
            ConfigurationError: The ladder is empty, holds something that is not callable, or holds
                two rungs of the same kind.
        """
        if not rungs:
            msg = "A Ladder needs at least one rung, for example Ladder(CheckpointActivations())."
            raise ConfigurationError(msg)
        for rung in rungs:
            if isinstance(rung, type) or not callable(rung):
                hint = f"{rung.__name__}()" if isinstance(rung, type) else "a Rung or a function"
                msg = f"Ladder got {rung!r}; give it {hint}."
                raise ConfigurationError(msg)
        names = [rung_name(rung) for rung in rungs if isinstance(rung, Rung)]
        for name in names:
            if names.count(name) > 1:
                msg = f"Ladder holds {name} {names.count(name)} times; a rung repeats by itself."
                raise ConfigurationError(msg)
        self.rungs: tuple[RungLike, ...] = rungs

    @classmethod
    def of(cls, ladder: Ladder | str) -> Ladder:
        """The ladder itself, or the preset of that name: `"default"` or `"exact_first"`.

        Raises:
            ConfigurationError: No preset has that name.
        """
        if isinstance(ladder, Ladder):
            return ladder
        rungs = (CheckpointActivations(), HalveSequence(), SplitBatch())
        if ladder == "default":
            return cls(*rungs)
        if ladder == "exact_first":
            order = list(Fidelity)
            return cls(*sorted(rungs, key=lambda rung: order.index(rung.fidelity)))
        msg = f"Unknown ladder {ladder!r}; use 'default', 'exact_first' or a Ladder of rungs."
        raise ConfigurationError(msg)

    def __iter__(self) -> Iterator[RungLike]:
        return iter(self.rungs)

    def __len__(self) -> int:
        return len(self.rungs)

    def __repr__(self) -> str:
        return f"Ladder({', '.join(map(repr, self.rungs))})"


def rung_name(rung: RungLike) -> str:
    """The name of a rung or of a plain callable."""
    return rung.name if isinstance(rung, Rung) else getattr(rung, "__name__", repr(rung))


def rung_fidelity(rung: RungLike) -> Fidelity:
    """The fidelity of a rung; a plain callable may do anything, so it counts as SEMANTIC."""
    return rung.fidelity if isinstance(rung, Rung) else Fidelity.SEMANTIC


def rung_spent(rung: RungLike, plan: Plan, event: OOMEvent) -> str:
    """Why `rung` answered `None`."""
    return rung.spent(plan, event) if isinstance(rung, Rung) else "it answered None"
