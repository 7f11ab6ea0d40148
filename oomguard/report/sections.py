"""What each section of the page says, as plain text; the templates give it its form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oomguard.memory.size import format_bytes
from oomguard.report.sparkline import sparkline
from oomguard.report.table import changed, size, taken

if TYPE_CHECKING:
    from oomguard.report.record import Report
    from oomguard.report.run import Run
    from oomguard.watch.findings import Finding, Kind

_MINUTE_S, _HOUR_S = 60, 3600
_KINDS: dict[Kind, str] = {
    "leak": "Leak",
    "cycles": "Reference cycles",
    "fragmentation": "Fragmentation",
    "outside": "Memory outside PyTorch",
    "neighbour": "Another process on the card",
    "thrashing": "Thrashing",
    "spilling": "Spilling to the host",
}


@dataclass(frozen=True)
class Column:
    """A column's name, and how its cells are set."""

    name: str
    numeric: bool = False
    code: bool = False


@dataclass(frozen=True)
class View:
    """A table: a caption, columns, and rows of text."""

    caption: str
    columns: tuple[Column, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Figure:
    """One number that is shown large, and a note below it."""

    name: str
    value: str
    note: str = ""


def duration(seconds: float) -> str:
    """`"42.1 s"`, `"3 min 20 s"` or `"2 h 05 min"`."""
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), _MINUTE_S)
    if seconds < _HOUR_S:
        return f"{minutes} min {rest:02d} s"
    return "{} h {:02d} min".format(*divmod(minutes, _MINUTE_S))


def overview(run: Run) -> dict[str, Any]:
    """Name, state and the figures at the top."""
    report = run.report
    before, after = report.initial_plan.effective_batch_size, report.plan.effective_batch_size
    lost = f"{report.seconds_lost / report.seconds:.1%} of the run" if report.seconds else ""
    figures = [
        Figure("Recoveries", str(len(report.recoveries)), "from running out of memory"),
        Figure("Time lost", duration(report.seconds_lost), lost),
        Figure(
            "Effective batch",
            str(after),
            "unchanged" if before == after else f"changed from {before}",
        ),
    ]
    peak = run.largest("peak_allocated_bytes")
    if peak is not None:
        card = "" if run.card_bytes is None else f"of {format_bytes(run.card_bytes)} on the card"
        figures.append(Figure("Peak allocated", format_bytes(peak), card))
    output = report.train_output
    if output is not None:
        note = f"training loss {output.training_loss:.4g}"
        figures.append(Figure("Steps", f"{output.global_step:,}", note))
    started = report.started.strftime("%Y-%m-%d %H:%M %Z").strip()
    return {
        "name": run.name,
        "status": report.status,
        "good": report.status in {"finished", "running"},
        "when": f"Started {started}, took {duration(report.seconds)}",
        "error": report.error,
        "figures": figures,
    }


def memory(run: Run) -> dict[str, Any]:
    """The words around the timeline, and the peaks as a table."""
    if not run.readings:
        return {
            "missing": "No readings of memory were kept. Add oomguard.VRAMReporter() to the "
            "trainer's callbacks and the next report shows them step by step."
        }
    rows = []
    for phase, name in (("train", "training"), ("eval", "evaluation"), ("save", "saving")):
        of_phase = [reading for reading in run.readings if reading.phase == phase]
        if of_phase:
            allocated, reserved = (
                max((n for n in sizes if n is not None), default=None)
                for sizes in (
                    [reading.peak_allocated_bytes for reading in of_phase],
                    [reading.peak_reserved_bytes for reading in of_phase],
                )
            )
            rows.append((name, size(allocated), size(reserved), f"{len(of_phase):,}"))
    columns = (
        Column("phase"),
        *(Column(name, numeric=True) for name in ("peak allocated", "peak reserved", "readings")),
    )
    peaks = View("The most that was in use at once", columns, rows)
    legend = (
        "Peaks are those since the reading before; neighbouring readings of a long run are merged, "
        "and the higher peak is kept. Drag to zoom, double-click to zoom out, click a name to hide "
        "its line."
    )
    return {
        "summary": f"Memory by optimizer step. {graph_summary(run)}",
        "sparkline": memory_line(run, width=60),
        "peaks": peaks,
        "legend": legend,
    }


def graph_summary(run: Run) -> str:
    """What the timeline shows, for those who cannot see it."""
    parts = [f"{len(run.readings)} readings"]
    peak = run.largest("peak_allocated_bytes")
    if peak is not None:
        parts.append(f"peak allocated {format_bytes(peak)}")
    if run.card_bytes is not None:
        parts.append(f"card {format_bytes(run.card_bytes)}")
    parts.append(f"{len(run.report.recoveries)} recoveries")
    return ", ".join(parts) + "."


def memory_line(run: Run, *, width: int, **options: Any) -> str:
    """Peaks of allocated memory in a line of text; empty where there were no readings."""
    sizes = [n for n in run.column("peak_allocated_bytes") if n is not None]
    if not sizes:
        return ""
    top = max(sizes)
    of = "" if run.card_bytes is None else f" of {format_bytes(run.card_bytes)}"
    line = sparkline(sizes, top=max(top, run.card_bytes or 0), width=width, **options)
    return f"{line}  peak {format_bytes(top)}{of}"


def recoveries(report: Report) -> View:
    """Every recovery with its numbers."""
    rows = []
    for recovery in report.recoveries:
        event = recovery.event
        shape = "-" if event.rows is None else f"{event.rows} x {event.width or '-'}"
        rows.append(
            (
                str(event.step),
                event.phase,
                shape,
                size(event.asked_bytes),
                size(event.free_bytes),
                taken(recovery),
                "-" if recovery.fidelity is None else recovery.fidelity.value,
                changed(recovery),
                f"{recovery.seconds_lost:.1f} s",
            )
        )
    columns = (
        *(Column("step", numeric=True), Column("phase"), Column("rows x width", numeric=True)),
        *(Column("asked", numeric=True), Column("free", numeric=True)),
        *(Column("rung"), Column("fidelity"), Column("change")),
        Column("lost", numeric=True),
    )
    return View("Each time memory ran out, and what was done", columns, rows)


def rungs(report: Report) -> View:
    """The ladder from its top, with how often each rung was taken."""
    names = [recovery.rung for recovery in report.recoveries]
    rows = [(name, str(names.count(name)) if name in names else "-") for name in report.ladder]
    return View(
        "The rungs that were allowed, in order",
        (Column("rung", code=True), Column("times taken", numeric=True)),
        rows,
    )


def settings(report: Report) -> View:
    """The plan, setting by setting, at the start and at the end."""
    start, end = report.initial_plan.to_dict(), report.plan.to_dict()
    rows = [
        (name, _setting(start[name]), _setting(value))
        for name, value in end.items()
        if value is not None or start[name] is not None
    ]
    rows.append(
        (
            "effective batch size",
            str(report.initial_plan.effective_batch_size),
            str(report.plan.effective_batch_size),
        )
    )
    columns = (Column("setting", code=True), Column("at the start"), Column("at the end"))
    return View("Settings that memory depends on", columns, rows)


def growth(run: Run) -> dict[str, Any]:
    """The findings of the leak detector."""
    if run.findings is None:
        nothing = (
            "Not watched. Add oomguard.LeakDetector() to the trainer's callbacks to be told what "
            "grows, how fast, and what holds it."
        )
        return {"findings": [], "nothing": nothing}
    shown = [_finding(finding) for finding in run.findings]
    return {"findings": shown, "nothing": "Watched, and nothing was found."}


def _finding(finding: Finding) -> dict[str, Any]:
    rate = finding.bytes_per_step
    full = finding.full_at_step
    facts = {
        "a step": rate and format_bytes(round(rate)),
        "so far": finding.bytes_so_far and format_bytes(finding.bytes_so_far),
        "since step": finding.since_step,
        "in phase": finding.phase,
        "card full at step": full and f"{full[0]:,} to {full[1]:,}",
        "held by": finding.holder,
    }
    advice = finding.advice or ""
    return {
        "title": _KINDS[finding.kind] + (" (taken back)" if finding.withdrawn else ""),
        "message": finding.message,
        "facts": "; ".join(f"{name} {value}" for name, value in facts.items() if value),
        "advice": "" if advice in finding.message else advice,
        "stacks": finding.stacks,
        "withdrawn": finding.withdrawn,
    }


def environment(run: Run) -> View:
    """Versions and the device."""
    rows = list(run.report.versions.items())
    if run.device is not None:
        rows.append(("device", run.device))
    if run.card_bytes is not None:
        rows.append(("memory of the card", format_bytes(run.card_bytes)))
    return View("Where it ran", (Column("what"), Column("version or name")), rows)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
