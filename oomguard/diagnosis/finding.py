"""What `diagnose` answers: findings, the dearest first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from oomguard.memory.size import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA = "oomguard.diagnosis/1"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One pitfall of a training setup.

    Attributes:
        name: Which one, as in `"eager_attention"`.
        what: What it is and does, in a sentence.
        bytes: Memory that it costs: what changing the line saves where the peak is. `None` where
            that is not known, or where it costs something else than memory.
        current: The line as it is now, as code.
        suggested: The line as it should be, as code.
    """

    name: str
    what: str
    bytes: int | None
    current: str
    suggested: str

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Diagnosis:
    """All that was found in one setup; `rich` prints it as a table.

    The bytes of findings do not add up: one change can make another smaller.

    Attributes:
        trainer: The class of the trainer.
        findings: The pitfalls, those that cost most first, those of unknown cost last.
    """

    trainer: str
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, trainer: str, findings: list[Finding]) -> Diagnosis:
        """Findings in the order of their bytes."""
        key = {id(finding): -1 if finding.bytes is None else finding.bytes for finding in findings}
        return cls(trainer, tuple(sorted(findings, key=lambda f: key[id(f)], reverse=True)))

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON types."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"schema": SCHEMA, "trainer": self.trainer, "findings": findings}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table of the findings, or one line where there are none."""
        count = len(self.findings)
        found = {0: "no memory pitfall found", 1: "1 memory pitfall"}
        yield Text(f"{self.trainer}: {found.get(count, f'{count} memory pitfalls')}", style="bold")
        if not count:
            return
        table = Table(
            Column("costs", no_wrap=True, justify="right"),
            Column("pitfall", overflow="fold"),
            Column("change", overflow="fold"),
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            leading=1,
        )
        for finding in self.findings:
            costs = "-" if finding.bytes is None else format_bytes(finding.bytes)
            change = Text.assemble(
                (finding.current, "red"), "\n-> ", (finding.suggested, "green"), overflow="fold"
            )
            table.add_row(costs, Text(f"{finding.name}: {finding.what}"), change)
        yield table
