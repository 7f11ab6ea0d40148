"""A finding: memory that rises step after step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Creep:
    """Growth that nothing accounts for, as it stands at one step.

    Attributes:
        bytes_per_step: How fast it grows, averaged over the steps it was judged on.
        steps: Over how many steps it has been growing, `since_step` to now.
        bytes_so_far: By how much it has grown in these steps.
        phase: In which phase the floor rises: `"train"` for the steps themselves, else the event
            whose occurrences lift it (`"eval"`, `"save"`, `"recovery"`, ...).
        full_at_step: Between which steps the card is full if it goes on like this, counted like
            `since_step`; `None` if the headroom is not known.
        confidence: 0 to 1, from how clearly the growth stands out of the noise and how long it has
            lasted. It orders findings; it is not a probability.
        withdrawn: Whether this takes an earlier finding back, because the growth stopped.
        since_step: The step at which the growth began, as well as can be told; updates are counted
            from 1.
    """

    bytes_per_step: float
    steps: int
    bytes_so_far: int
    phase: str
    full_at_step: tuple[int, int] | None
    confidence: float
    since_step: int
    withdrawn: bool = False
