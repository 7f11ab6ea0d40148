"""Made-up recoveries, and the report of a run that needed all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from transformers.trainer_utils import TrainOutput

from oomguard.event import OOMEvent
from oomguard.plan import Plan
from oomguard.report import Recovery, Report
from oomguard.rungs import CheckpointActivations, HalveSequence, SplitBatch

if TYPE_CHECKING:
    from oomguard.rung import Rung

MIB, GIB = 2**20, 2**30
PLAN = Plan(per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=2048)
EVENT = OOMEvent(
    phase="backward",
    step=12,
    micro_batch=1,
    rows=8,
    width=2048,
    tokens=8 * 2048,
    asked_bytes=3 * GIB // 2,
    free_bytes=512 * MIB,
    total_bytes=12 * GIB,
    message='CUDA out of memory. Tried to allocate [1.50] GiB "\u2026"',
)


def recovery(rung: Rung | None, before: Plan = PLAN, event: OOMEvent = EVENT) -> Recovery:
    after = before if rung is None else rung(before, event)
    assert after is not None
    return Recovery(
        event=event,
        rung=None if rung is None else rung.name,
        fidelity=None if rung is None else rung.fidelity,
        before=before,
        after=after,
        seconds_lost=0.42,
    )


def full_report() -> Report:
    """A run that met an unexplained failure and then took every rung."""
    rows = [recovery(None, event=replace(EVENT, phase="optimizer", free_bytes=None))]
    for rung in (CheckpointActivations(), HalveSequence(), SplitBatch()):
        before = rows[-1].after
        event = replace(EVENT, step=100 + len(rows), width=before.max_length)
        rows.append(recovery(rung, before, replace(event, tokens=8 * (before.max_length or 0))))
    return Report(
        initial_plan=PLAN,
        plan=rows[-1].after,
        ladder=("CheckpointActivations", "HalveSequence", "SplitBatch"),
        recoveries=rows,
        train_output=TrainOutput(200, 1.25, {"train_loss": 1.25, "epoch": 1.0}),
        status="finished",
        seconds=63.5,
    )
