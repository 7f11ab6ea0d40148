"""The ladder: in which order settings give way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oomguard.errors import ConfigurationError
from oomguard.rung import Fidelity, Rung, RungLike, rung_name
from oomguard.rungs import (
    CheckpointActivations,
    HalveSequence,
    LowerRank,
    NarrowTargets,
    PageOptimizer8bit,
    SplitBatch,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


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
        rungs = (
            CheckpointActivations(),
            HalveSequence(),
            SplitBatch(),
            PageOptimizer8bit(),
            NarrowTargets(),
            LowerRank(),
        )
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
