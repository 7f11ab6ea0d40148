"""What each section of the page says, as plain text; the templates give it its form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oomguard.memory.size import format_bytes
from oomguard.report.table import changed, size, taken
from oomguard.report.view import Column, Figure, View, duration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oomguard.report.record import Report
    from oomguard.report.run import Run
    from oomguard.watch.findings import Finding, Kind

_KINDS: dict[Kind, str] = {
    "leak": "Leak",
    "cycles": "Reference cycles",
    "fragmentation": "Fragmentation",
    "outside": "Memory outside PyTorch",
    "neighbour": "Another process on the card",
    "thrashing": "Thrashing",
    "spilling": "Spilling to the host",
}


def overview(run: Run) -> dict[str, Any]:
    """Name, state and the figures at the top."""
    if run.report is None:
        return _watched(run)
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
    figures += _seen(run)
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


def _watched(run: Run) -> dict[str, Any]:
    """The same of a run without a guard."""
    figures = list(_seen(run))
    when = "Watched, without a guard"
    if run.readings:
        last = run.readings[-1]
        figures.append(Figure("Steps", f"{last.step:,}"))
        when += f", for {duration(last.time_s)}"
    return {
        "name": run.name,
        "status": "watched",
        "good": True,
        "when": when,
        "error": None,
        "figures": figures,
    }


def _seen(run: Run) -> Iterator[Figure]:
    peak = run.largest("peak_allocated_bytes")
    if peak is not None:
        card = "" if run.card_bytes is None else f"of {format_bytes(run.card_bytes)} on the card"
        yield Figure("Peak allocated", format_bytes(peak), card)
    standing = [finding for finding in run.findings or () if not finding.withdrawn]
    if standing:
        kinds = dict.fromkeys(_KINDS[finding.kind].lower() for finding in standing)
        yield Figure("Findings", str(len(standing)), ", ".join(kinds))


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
                changed(recovery).replace(" -> ", " \u2192 "),
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
    advice = finding.advice or ""
    return {
        "title": _KINDS[finding.kind] + (" (taken back)" if finding.withdrawn else ""),
        "message": finding.message,
        "advice": "" if advice in finding.message else advice,
        "stacks": finding.stacks,
        "withdrawn": finding.withdrawn,
    }


def environment(run: Run) -> View:
    """Versions and the device."""
    rows = [] if run.report is None else list(run.report.versions.items())
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
