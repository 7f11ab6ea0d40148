"""The facts of one out-of-memory failure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OOMEvent:
    """What was known when memory ran out; a reading that could not be taken is `None`.

    Attributes:
        phase: Where: `"fetch"`, `"generate"`, `"forward"`, `"backward"`, `"clip"`, `"optimizer"` or
            `"bookkeeping"`; outside of a step `"setup"`, `"evaluate"`, `"predict"`, `"save"` or
            `"load"`.
        step: The optimizer step that was being made, counted from 1; in `"evaluate"`, `"predict"`,
            `"save"` and `"load"` the last one that was complete.
        micro_batch: Which batch of that optimizer step, counted from 0.
        rows: Rows (or documents of a packed row) of the pass that failed.
        width: Its padded columns (or its longest document).
        tokens: Its padded tokens.
        asked_bytes: What the failed allocation asked for.
        free_bytes: What was free, as the error said.
        total_bytes: The card's capacity, as the error said.
        allocated_bytes: Live bytes of the process when it failed.
        reserved_bytes: Bytes that PyTorch's allocator held from the device.
        message: The first line of the error.
    """

    phase: str
    step: int
    micro_batch: int | None = None
    rows: int | None = None
    width: int | None = None
    tokens: int | None = None
    asked_bytes: int | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON types."""
        return asdict(self)


def half_of(units: int, width: int, tokens: int) -> tuple[int, int, bool]:
    """Half of a pass.

    Args:
        units: What it can be cut between: rows, pairs of rows, documents of a flat row.
        width: Tokens of its longest row.
        tokens: What it holds, padding included.

    Returns:
        Half of the units, rounded up; the tokens that they may hold; and whether the units are all
        of one length, being padded. Those of a flat row are not: half of its tokens is the limit.
    """
    half = -(-units // 2)
    padded = tokens % (units * width) == 0  # a unit is a row, or a pair of them
    return half, half * (tokens // units) if padded else max(1, -(-tokens // 2)), padded
