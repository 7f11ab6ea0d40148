"""Steps with and without something, in blocks that alternate within one run."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


def compared(
    step_s: Sequence[float],
    is_on: Callable[[int], bool],
    *,
    block: int,
    skipped: int,
    names: tuple[str, str],
) -> dict[str, Any]:
    """A row: by how much steps with it are longer, and those without it differ among themselves.

    Args:
        step_s: Seconds of each step but the first, which has no start.
        is_on: Whether it is there in the step after so many.
        block: Steps of a block.
        skipped: Steps after a change that are left out.
        names: What the steps without it and with it are called.
    """
    kinds: dict[bool, list[float]] = {False: [], True: []}
    for step, seconds in enumerate(step_s, start=1):
        if step % block >= skipped:
            kinds[is_on(step)].append(seconds)
    without_s, with_s = median(kinds[False]), median(kinds[True])
    half = len(kinds[False]) // 2
    first_s, second_s = median(kinds[False][:half]), median(kinds[False][half:])
    off, on = names
    return {
        "steps_each": len(kinds[True]),
        f"{off}_step_s": without_s,
        f"{on}_step_s": with_s,
        "overhead_pct": 100 * (with_s / without_s - 1),
        f"{off}_second_half_against_first_pct": 100 * (second_s / first_s - 1),
    }
