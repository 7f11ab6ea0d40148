"""What `oomguard report` does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from oomguard.report.memory import memory_text
from oomguard.report.page import page
from oomguard.report.picture import picture
from oomguard.report.run import Run
from oomguard.report.stored import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console, ConsoleOptions, RenderResult

PAGE_NAME = "oomguard.html"


@dataclass(frozen=True)
class Written:
    """A run, and the files that were written about it; `rich` prints it.

    Attributes:
        run: The run.
        html: The page.
        png: The picture, if one was asked for.
    """

    run: Run
    html: Path
    png: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The run and the files as JSON types."""
        findings = self.run.findings
        return {
            "report": None if self.run.report is None else self.run.report.to_dict(),
            "findings": None if findings is None else [asdict(finding) for finding in findings],
            "peak_allocated_bytes": self.run.largest("peak_allocated_bytes"),
            "peak_reserved_bytes": self.run.largest("peak_reserved_bytes"),
            "card_bytes": self.run.card_bytes,
            "unreadable": list(self.run.unreadable),
            "html": str(self.html),
            "png": None if self.png is None else str(self.png),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The report's table, what grew, and where the files are."""
        if self.run.report is not None:
            yield self.run.report
        else:
            yield Text(f"{self.run.name}: watched, without a guard", style="bold")
            yield from memory_text(self.run, options)
        yield from map(Text, self._lines())

    def _lines(self) -> Iterator[str]:
        yield from (finding.message for finding in self.run.findings or ())
        yield from (f"left out: {why}" for why in self.run.unreadable)
        yield f"page: {self.html}"
        if self.png is not None:
            yield f"picture: {self.png}"


def write(run_dir: Path, html: Path | None, png: Path | None) -> Written:
    """Read a run's folder and write its page and its picture; on an error, neither.

    Args:
        run_dir: The trainer's `output_dir`.
        html: Where the page goes; `None` for `oomguard.html` in `run_dir`.
        png: Where the picture goes; `None` for no picture.

    Raises:
        ConfigurationError: There is no report in the folder, or what draws is missing.
        OSError: A file cannot be written.
    """
    run = Run.read(run_dir)
    html = run_dir / PAGE_NAME if html is None else html
    text = page(run)
    image = None if png is None else picture(run)
    write_whole(html, text)
    if png is not None and image is not None:
        write_whole(png, image)
    return Written(run, html, png)
