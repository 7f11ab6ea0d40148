"""What was predicted before the run, beside what was measured in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oomguard import typed
from oomguard.errors import ConfigurationError
from oomguard.memory.size import format_bytes
from oomguard.plan import Plan
from oomguard.report.table import size
from oomguard.report.view import Column, View

if TYPE_CHECKING:
    from oomguard.report.record import Report
    from oomguard.report.run import Run
    from oomguard.watch.readings import Reading

_SIZES = (
    ("peak_allocated_bytes", "peak_allocated_bytes", "peak allocated"),
    ("peak_reserved_bytes", "peak_reserved_bytes", "peak reserved"),
    ("device_bytes", "process_bytes", "of the device, with the CUDA context"),
)


def prediction(run: Run) -> dict[str, Any] | None:
    """The section on the estimate in the report, or `None` where there is none.

    Only training steps made under the plan that was estimated are compared with it.
    """
    report = run.report
    if report is None or report.estimate is None:
        return None
    estimate = report.estimate
    measured, note = _measured(run, report, estimate.get("plan"))
    rows = []
    for predicted_name, name, label in _SIZES:
        predicted = _whole(estimate.get(predicted_name))
        if predicted is not None:
            known = [n for row in measured if (n := getattr(row, name)) is not None]
            rows.append((label, *_compared(predicted, max(known, default=None))))
    columns = (
        Column("memory"),
        *(Column(name, numeric=True) for name in ("predicted", "measured", "difference")),
    )
    return {
        "sizes": View("Peaks of a training step", columns, rows),
        "breakdown": _breakdown(estimate.get("breakdown")),
        "note": note if measured else "No training step was measured under the estimated plan.",
    }


def _compared(predicted: int, measured: int | None) -> tuple[str, str, str]:
    if not measured:
        return format_bytes(predicted), size(measured), "-"
    return (
        format_bytes(predicted),
        format_bytes(measured),
        f"{(predicted - measured) / measured:+.1%}",
    )


def _breakdown(values: Any) -> View:
    parts = values if isinstance(values, dict) else {}
    known = {str(name): n for name, value in parts.items() if (n := _whole(value))}
    rows = [
        (name.removesuffix("_bytes").replace("_", " "), format_bytes(n))
        for name, n in sorted(known.items(), key=lambda part: -part[1])
    ]
    columns = (Column("part"), Column("predicted", numeric=True))
    return View("What the predicted peak consists of", columns, rows)


def _whole(value: Any) -> int | None:
    return value if typed.fits(value, int) else None


def _measured(run: Run, report: Report, values: Any) -> tuple[list[Reading], str]:
    """The readings of training that were made wholly under a plan, and what they are in words."""
    readings = [row for row in run.readings if row.phase == "train"]
    try:
        plan = Plan.from_dict(dict(values))
    except (ConfigurationError, TypeError, ValueError):
        return readings, "Measured over all training steps, whatever plan they ran under."
    # A step that ran out of memory was made under more than one plan.
    ends = [recovery.event.step for recovery in report.recoveries]
    # A run may begin with another plan than its trainer's own: with that of a run before it.
    first = report.recoveries[0].before if report.recoveries else report.plan
    plans = [first, *(recovery.after for recovery in report.recoveries)]
    spans = [
        (begin, end)
        for begin, end, one in zip([0, *ends], [*ends, None], plans, strict=True)
        if one == plan
    ]
    # A merged reading has the peaks of all steps since the one before it.
    since = [0, *(row.step for row in readings)]
    under = [
        row
        for row, before in zip(readings, since, strict=False)
        if any(begin <= before and (end is None or row.step < end) for begin, end in spans)
    ]
    return under, "Measured over the training steps made under the plan that was estimated."
