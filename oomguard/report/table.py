"""The report as text: headline, a table of the recoveries, and what is left of the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Column, Table
from rich.text import Text

from oomguard.memory.size import format_bytes

if TYPE_CHECKING:
    from oomguard.plan import Plan
    from oomguard.report.record import Recovery, Report

WIDE = 112  # characters
_UNKNOWN = "-"


def headline(report: Report) -> str:
    """How many recoveries there were, and what became of the effective batch."""
    if not report.recoveries:
        failure = f"failed without a recovery: {report.error or 'no error was recorded'}"
        happened = failure if report.status == "failed" else "no out-of-memory error"
        change = settings(report.initial_plan, report.plan) or "nothing was changed"
        return f"oomguard: {happened}; {change}"
    count = len(report.recoveries)
    before, after = report.initial_plan.effective_batch_size, report.plan.effective_batch_size
    batch = f"{after} unchanged" if before == after else f"changed from {before} to {after}"
    return f"oomguard: {count} recover{'y' if count == 1 else 'ies'}, effective batch {batch}"


def table(report: Report, *, wide: bool) -> Table:
    """A row for each recovery; where it is not `wide`, pairs of columns share one."""
    made = Table(
        *(Column(name, no_wrap=True) for name in _pair("step", "phase", wide)),
        *(Column(name, no_wrap=True, justify="right") for name in _pair("asked", "free", wide)),
        *(Column(name, overflow="fold") for name in _pair("rung", "fidelity", wide)),
        Column("change", overflow="fold"),
        Column("lost", no_wrap=True, justify="right"),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        leading=0 if wide else 1,
    )
    for recovery in report.recoveries:
        made.add_row(*map(Text, _cells(recovery, wide)))
    return made


def summary(report: Report) -> str:
    """What the recoveries cost, the plan that is left, and how a run ended that did not finish."""
    endings = {
        "failed": f"failed: {report.error or 'no error was recorded'}",
        "interrupted": "interrupted before the end",
    }
    steps = "" if report.status == "failed" else ", 0 steps"
    change = settings(report.initial_plan, report.plan) or "as at the start"
    lines = [f"lost: {report.seconds_lost:.1f} s{steps}", f"plan: {change}"]
    return "\n".join([*lines, *filter(None, [endings.get(report.status)])])


def settings(before: Plan, after: Plan) -> str:
    """The change without the words on the effective batch, which the headline has."""
    batch = after.describe_change(after)
    return before.describe_change(after).removesuffix(batch).removesuffix(", ")


def taken(recovery: Recovery) -> str:
    """The rung, or what was done in place of one."""
    return recovery.rung or (_UNKNOWN if recovery.change else "released memory")


def changed(recovery: Recovery) -> str:
    """What the recovery changed, and which rungs it passed over."""
    change = recovery.change or settings(recovery.before, recovery.after) or "plan unchanged"
    return "; ".join(filter(None, (change, recovery.jump())))


def size(size_bytes: int | None) -> str:
    """A size, or a dash for a reading that could not be taken."""
    return _UNKNOWN if size_bytes is None else format_bytes(size_bytes)


def _pair(first: str, second: str, wide: bool) -> tuple[str, ...]:
    """Two cells, or one of two lines where columns are few."""
    return (first, second) if wide else (f"{first}\n{second}",)


def _cells(recovery: Recovery, wide: bool) -> tuple[str, ...]:
    event = recovery.event
    fidelity = _UNKNOWN if recovery.fidelity is None else recovery.fidelity.value
    return (
        *_pair(str(event.step), event.phase, wide),
        *_pair(size(event.asked_bytes), size(event.free_bytes), wide),
        *_pair(taken(recovery), fidelity, wide),
        changed(recovery),
        f"{recovery.seconds_lost:.1f} s",
    )
