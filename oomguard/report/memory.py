"""What is said of a run's memory around the timeline, and in one line of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from oomguard.memory.size import format_bytes
from oomguard.report.sparkline import ASCII, BLOCKS, sparkline
from oomguard.report.table import WIDE, size
from oomguard.report.view import Column, View

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import ConsoleOptions

    from oomguard.report.run import Run
    from oomguard.watch.readings import Reading

_MISSING = (
    "No readings of memory were found beside the report. oomguard.fit keeps them in "
    "oomguard_vram.parquet in the trainer's output_dir."
)
_LEGEND = (
    "The peak of a step is the most that was in use since the reading before. In long runs "
    "neighbouring readings are merged, and the higher peak is kept. The names under the plot hide "
    "and show what they name; the plot can be zoomed."
)
_BESIDE = 44  # of the sparkline, its words and two sizes
_PHASES = (("train", "training"), ("eval", "evaluation"), ("save", "saving"))


def memory(run: Run) -> dict[str, Any]:
    """The words around the timeline, the peaks as a table, and what the memory consisted of."""
    return {
        "missing": _MISSING,
        "summary": f"Memory by optimizer step: {_summary(run)}",
        "sparkline": memory_line(run, width=60),
        "peaks": View(
            "The most that was in use at once",
            (
                Column("phase"),
                *(Column(name, numeric=True) for name in ("allocated", "at step", "reserved")),
            ),
            list(_peaks(run)),
        ),
        "parts": _parts(run),
        "legend": _LEGEND,
    }


def memory_line(run: Run, *, width: int, **options: Any) -> str:
    """Allocated memory over the run in a line of text; empty where it was not read.

    Peaks of each step where they are known, else what was allocated after it.
    """
    of_steps = [reading for reading in run.readings if reading.phase == "train"]
    sizes = [reading.peak_allocated_bytes for reading in of_steps]
    if None in sizes:
        sizes = [reading.allocated_bytes for reading in of_steps]
    known = [n for n in sizes if n is not None]
    if not known:
        return ""
    highest = run.largest("peak_allocated_bytes") or max(known)
    card = "" if run.card_bytes is None else f" of {format_bytes(run.card_bytes)}"
    line = sparkline(known, top=run.card_bytes or highest, width=width, **options)
    return f"{line}  peak {format_bytes(highest)}{card}"


def memory_text(run: Run, options: ConsoleOptions) -> Iterator[Text]:
    """The line for a terminal; nothing where memory was not read."""
    marks = ASCII if options.ascii_only else BLOCKS
    line = memory_line(run, width=min(options.max_width, WIDE) - _BESIDE, marks=marks)
    if line:
        yield Text(f"memory: {line}")


def _summary(run: Run) -> str:
    known = {
        "highest peak of allocated memory": run.largest("peak_allocated_bytes"),
        "card": run.card_bytes,
    }
    sizes = [f"{name} {format_bytes(n)}" for name, n in known.items() if n is not None]
    count = len(run.recoveries)
    return ", ".join([*sizes, f"{count} recover{'y' if count == 1 else 'ies'}"])


def _peaks(run: Run) -> Iterator[tuple[str, ...]]:
    def allocated(reading: Reading) -> int:
        return reading.peak_allocated_bytes or reading.allocated_bytes or 0

    for phase, name in _PHASES:
        of_phase = [reading for reading in run.readings if reading.phase == phase]
        if of_phase:
            highest = max(of_phase, key=allocated)
            reserved = [n for reading in of_phase if (n := reading.peak_reserved_bytes) is not None]
            found = allocated(highest)
            step = f"{highest.step:,}" if found else "-"
            yield name, size(found or None), step, size(max(reserved, default=None))


def _parts(run: Run) -> View:
    """The latest breakdown."""
    columns = (Column("part"), Column("allocated", numeric=True))
    if not run.breakdowns:
        return View("", columns, [])
    last = run.breakdowns[-1]
    parts = {
        "weights": last.weights_bytes,
        "gradients": last.gradients_bytes,
        "optimizer": last.optimizer_bytes,
        "other": last.other_bytes,
    }
    rows = [(name, format_bytes(n)) for name, n in parts.items() if n is not None]
    return View(f"What was allocated just after the passes of step {last.step:,}", columns, rows)
