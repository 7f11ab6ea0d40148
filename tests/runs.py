"""The folder of a run, as the guard and its callbacks leave it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from oomguard.event import OOMEvent
from oomguard.plan import Plan
from oomguard.report import Recovery, Report
from oomguard.rungs import CheckpointActivations, SplitBatch
from oomguard.watch.findings import Finding, save_findings
from oomguard.watch.readings import Reading
from oomguard.watch.series import Breakdown, Series

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from oomguard.watch.readings import Phase

MIB, GIB = 2**20, 2**30
CARD_BYTES = 12 * GIB
PLAN = Plan(
    per_device_train_batch_size=8,
    gradient_accumulation_steps=4,
    max_length=2048,
    optim="adamw_torch_fused",
    target_modules=("q_proj", "v_proj"),
    lora_r=16,
)
EVENT = OOMEvent(
    phase="backward",
    step=12,
    rows=8,
    width=2048,
    tokens=8 * 2048,
    asked_bytes=3 * GIB // 2,
    free_bytes=512 * MIB,
    total_bytes=CARD_BYTES,
)
LEAK = Finding(
    kind="leak",
    message="Allocated memory grows by 2.00 MiB a step since step 20.",
    bytes_per_step=2.0 * MIB,
    since_step=20,
    bytes_so_far=40 * MIB,
    phase="train",
    full_at_step=(2400, 2600),
    holder="Losses.kept > list[20 of 40]",
    advice="Keep loss.item() instead of loss.",
)


def report_of(plan: Plan = PLAN, **changes: Any) -> Report:
    """A run that took two rungs in step 12, one after the other."""
    recoveries, before = [], plan
    for rung in (CheckpointActivations(), SplitBatch()):
        after = rung(before, EVENT)
        assert after is not None
        recoveries.append(
            Recovery(
                event=EVENT,
                rung=rung.name,
                fidelity=rung.fidelity,
                before=before,
                after=after,
                seconds_lost=0.5,
            )
        )
        before = after
    report = Report(
        initial_plan=plan,
        plan=before,
        ladder=("CheckpointActivations", "HalveSequence", "SplitBatch"),
        recoveries=recoveries,
        status="finished",
        seconds=63.5,
    )
    return replace(report, **changes)


def _reading(step: int, phase: Phase, late_s: float, peak: int, reserved: int | None) -> Reading:
    return Reading(
        step=step,
        time_s=1.5 * step + late_s,
        phase=phase,
        allocated_bytes=4 * GIB,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved,
    )


def readings(steps: int = 40) -> list[Reading]:
    """Steps, of which step 12 takes most; an evaluation and a save every ten."""
    found = []
    for step in range(1, steps + 1):
        before, at, after = 11 * GIB, 23 * GIB // 2, 7 * GIB
        peak = (before if step < 12 else at if step == 12 else after) + step * MIB
        found.append(_reading(step, "train", 0.0, peak, peak + 512 * MIB))
        if step % 10 == 0:
            found += [
                _reading(step, "eval", 0.5, 6 * GIB, None),
                _reading(step, "save", 0.6, 4 * GIB, None),
            ]
    return found


def write_run(
    folder: Path,
    *,
    report: Report | None = None,
    rows: Sequence[Reading] | None = None,
    findings: Sequence[Finding] | None = (LEAK,),
    device: str = "NVIDIA Test Card",
) -> Path:
    """Write what a run leaves into `folder`; no series for `rows=()`, no file for `None`."""
    (report or report_of()).save(folder / "oomguard.json")
    series = Series(device, CARD_BYTES)
    rows = readings() if rows is None else rows
    for row in rows:
        series.add(row)
    if rows:
        sizes = {"weights_bytes": 3 * GIB, "gradients_bytes": GIB // 4, "optimizer_bytes": GIB // 2}
        series.add_breakdown(Breakdown(step=16, other_bytes=GIB // 4, **sizes))
        series.save(folder / "oomguard_vram.parquet")
    if findings is not None:
        save_findings(findings, folder / "oomguard_findings.json")
    return folder
