"""What a search for a plan has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from oomguard.memory.size import format_bytes
from oomguard.snippet import snippet

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from oomguard.memory.cards import Card
    from oomguard.plan import Plan
    from oomguard.prediction.result import Estimate
    from oomguard.trial import Trial


@dataclass(frozen=True)
class RunnerUp:
    """Another plan that fits.

    Attributes:
        estimate: What it should take.
        measured: What it took; `None` where it was not run.
    """

    estimate: Estimate
    measured: Trial | None = None

    @property
    def plan(self) -> Plan:
        """The plan; of one that was run, as it was run."""
        return self.estimate.plan if self.measured is None else self.measured.plan

    def to_dict(self) -> dict[str, Any]:
        """The plan, its bytes, and its tokens a second where those were measured."""
        measured, estimate = self.measured, self.estimate
        source: Any = estimate if measured is None else measured
        return {
            "plan": self.plan.to_dict(),
            "peak_allocated_bytes": source.peak_allocated_bytes,
            "peak_reserved_bytes": source.peak_reserved_bytes,
            "device_bytes": source.device_bytes,
            "tokens_per_s": None if measured is None else measured.tokens_per_s,
            "measured": measured is not None,
        }


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The largest plan found for a card.

    Attributes:
        plan: The plan. It was run if `measured` is there, and is an estimate if not.
        maximize: What was maximized.
        estimate: What it should take.
        measured: What it took in a trial of its worst case.
        runners_up: Other plans that fit, the largest first.
        trials: All trials, those that ran out of memory too, in their order.
        card: The card.
        notes: What to know of the result.
        lora_alpha: Of the adapter that is there; `None` where none is.
        seconds: What the search took.
    """

    plan: Plan
    maximize: str
    estimate: Estimate
    measured: Trial | None
    runners_up: tuple[RunnerUp, ...]
    trials: tuple[Trial, ...]
    card: Card
    notes: tuple[str, ...] = ()
    lora_alpha: int | None = None
    seconds: float = 0.0

    @property
    def pass_tokens(self) -> int:
        """Tokens of one full-length pass of the plan."""
        return tokens_of(self.plan, self.estimate)

    def snippet(self) -> str:
        """Code that makes the `SFTConfig`, `LoraConfig` and `BitsAndBytesConfig` of the plan."""
        return snippet(self.plan, self.estimate.settings, self.lora_alpha)

    def to_dict(self) -> dict[str, Any]:
        """The plan, its estimate, its trial, the runners-up, the notes and the time, as JSON."""
        return {
            "plan": self.plan.to_dict(),
            "estimate": self.estimate.to_dict(),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "runners_up": [plan.to_dict() for plan in self.runners_up],
            "card": self.card.name,
            "maximize": self.maximize,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table of the plan and the runners-up, the notes, and the code."""
        table = Table(
            "", *COLUMNS, title=escape(self.card.name), title_justify="left", box=box.SIMPLE_HEAD
        )
        table.add_row("found", *row(self.plan, self.estimate, self.measured))
        for other in self.runners_up:
            table.add_row("also", *row(other.plan, other.estimate, other.measured))
        yield table
        yield from (f"note: {escape(note)}" for note in self.notes)
        yield ""
        yield escape(self.snippet())


COLUMNS = ("rows", "length", "tokens", "LoRA r", "ckpt", "bytes", "")
"""Rows a pass times passes a step, tokens of the longest row, tokens of a pass, and so on."""


def row(plan: Plan, estimate: Estimate, measured: Trial | None) -> list[str]:
    """What tables show of a plan, by `COLUMNS`."""
    how = "estimated"
    size_bytes = estimate.device_bytes
    if measured is not None:
        how = "measured"
        size_bytes = measured.device_bytes or measured.peak_allocated_bytes
        if measured.tokens_per_s is not None:
            how = f"measured, {measured.tokens_per_s:,.0f} tokens/s"
    steps = plan.gradient_accumulation_steps
    return [
        f"{plan.per_device_train_batch_size} x {steps}",
        str(estimate.plan.max_length or ""),
        f"{tokens_of(plan, estimate):,}",
        "full" if plan.lora_r is None else str(plan.lora_r),
        "on" if plan.gradient_checkpointing else "off",
        format_bytes(size_bytes),
        how,
    ]


def tokens_of(plan: Plan, estimate: Estimate) -> int:
    """Tokens of one full-length pass."""
    return plan.per_device_train_batch_size * (estimate.plan.max_length or 1)
