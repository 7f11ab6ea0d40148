"""What an estimate says."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from oomguard.memory.cards import Card
from oomguard.memory.replay import cases
from oomguard.memory.size import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions, RenderResult

    from oomguard.memory.replay import Replay
    from oomguard.memory.timeline import Timeline
    from oomguard.plan import Plan
    from oomguard.prediction.settings import Settings

TRACED, CLOSED_FORM = "traced", "closed form"
CATEGORIES = (
    "weights",
    "adapters",
    "gradients",
    "optimizer_state",
    "saved_activations",
    "logits_and_loss",
    "workspaces",
    "fragmentation",
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory that a fine-tune will take on its card.

    Attributes:
        peak_allocated_bytes: As `torch.cuda.max_memory_allocated()` would give it.
        peak_reserved_bytes: As `torch.cuda.max_memory_reserved()`, where there is room. The cache
            shrinks where there is not: `fits` says whether it would.
        device_bytes: What the driver shows for the process: reserved bytes, CUDA's context and the
            kernels that are loaded into it.
        phase: When the peak of allocated bytes is reached: `"load"`, `"forward"`, `"backward"` or
            `"optimizer step"`.
        breakdown: Bytes at that peak by category; with `fragmentation`, which is the rest of
            `peak_reserved_bytes`, they add up to it.
        plan: What was estimated.
        settings: What was estimated, besides the plan.
        card: The card whose constants were used.
        method: `"traced"`, or `"closed form"` where the model could not be traced.
        notes: What could not be traced, and which constants were assumed.
        seconds: What the estimate took.
        timeline: The allocations behind it; `None` for a closed form.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int
    phase: str
    breakdown: dict[str, int]
    plan: Plan
    settings: Settings
    card: Card
    method: str
    notes: tuple[str, ...] = ()
    seconds: float
    timeline: Timeline | None = field(default=None, repr=False, compare=False)

    def fits(self, card: Card | str | int) -> bool:
        """Whether it runs through on `card`, which nothing else uses.

        The allocations are replayed under the limit, under which the allocator gives cached blocks
        back before it fails: in every case that `oomguard.memory.replay` knows.

        Args:
            card: A name such as `"RTX 4090"`, a size such as `"12GiB"`, or bytes.

        Raises:
            ConfigurationError: It is not a card.
        """
        usable_bytes = Card.of(card).usable_bytes
        if usable_bytes is None or self.peak_allocated_bytes > usable_bytes:
            return False
        if self.most_reserved_bytes <= usable_bytes:
            return True
        return self.timeline is not None and all(self._replays(usable_bytes))

    @cached_property
    def most_reserved_bytes(self) -> int:
        """The most that any case reserves where there is room; `fits` says what cases there are."""
        found = [one.peak_reserved_bytes for one in self._replays(None) if one is not None]
        return max(found, default=self.peak_reserved_bytes)

    def _replays(self, limit_bytes: int | None) -> Iterator[Replay | None]:
        if self.timeline is not None:
            expandable = self.settings.expandable_segments
            yield from cases(self.timeline, expandable=expandable, limit_bytes=limit_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, without the timeline."""
        return {
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "device_bytes": self.device_bytes,
            "phase": self.phase,
            "breakdown": dict(self.breakdown),
            "plan": self.plan.to_dict(),
            "settings": self.settings.to_dict(),
            "card": self.card.name,
            "method": self.method,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table of the peak by category, and the notes."""
        table = Table("at the peak", "bytes", "", box=box.SIMPLE_HEAD, show_edge=False)
        for name, size_bytes in self.breakdown.items():
            share = size_bytes / max(1, self.peak_reserved_bytes)
            table.add_row(name.replace("_", " "), format_bytes(size_bytes), f"{share:.0%}")
        table.add_section()
        table.add_row("peak allocated", format_bytes(self.peak_allocated_bytes), self.phase)
        table.add_row("peak reserved", format_bytes(self.peak_reserved_bytes), self.method)
        table.add_row("on the device", format_bytes(self.device_bytes), "with CUDA's context")
        yield table
        yield from self._lines()

    def _verdict(self) -> str:
        if self.fits(self.card):
            return "fits"
        if self.peak_reserved_bytes > (self.card.usable_bytes or 0):
            return "[red]does not fit[/]"
        most = format_bytes(self.most_reserved_bytes)
        return f"[red]may not fit[/]: by where CUDA places blocks, up to {most} are reserved"

    def _lines(self) -> Iterator[str]:
        if self.card.total_bytes is not None:
            yield f"{escape(self.card.name)}: {self._verdict()}"
        yield from (f"note: {escape(note)}" for note in self.notes)
