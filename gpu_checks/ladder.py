"""The whole ladder on a Llama-3-8B shape in NF4: what each rung saves, costs, and takes to apply.

    python -m gpu_checks.ladder --out ladder.json --markdown ladder.md

measures on a GPU of 80 GB; with `--tiny` the same code trains tiny models on the CPU.
Exits with 1 if a section crashed or found something that must not be.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpu_checks.report import Check
from gpu_checks.sections import Bench, Comparison, Result
from gpu_checks.trial import losses_apart
from gpu_checks.walk import Level, Walk, watching
from oomguard import (
    CheckpointActivations,
    HalveSequence,
    Ladder,
    LowerRank,
    NarrowTargets,
    OffloadActivations,
    PageOptimizer8bit,
    SplitBatch,
)
from oomguard.memory.size import format_bytes
from oomguard.rung import rung_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_checks.card import Session
    from gpu_checks.trial import Trial
    from gpu_checks.workload import CheckedTrainer, Job
    from oomguard.report import Recovery

    Row = dict[str, Any]

_STEPS = 100  # more than the walk makes
_ENOUGH_S = 2.0
_SAME_LOSS = {"bf16": 1e-2, "fp64": 1e-9}
_TIMES_FLOOR = 3
_LEFT_OVER_BYTES = 32 * 2**20


def descend(
    bench: Bench, job: Job, ladder: Ladder, *, enough_s: float = 0.0, rungs: int | None = None
) -> tuple[Trial, Walk]:
    """Train `job` under a guard, with a limit that takes one rung after another."""
    walks: list[Walk] = []

    def prepare(trainer: CheckedTrainer, session: Session) -> None:
        synchronize[0] = session.synchronize
        walks.append(Walk(trainer, session, enough_s=enough_s, rungs=rungs))

    synchronize: list[Callable[[], None]] = [lambda: None]
    with watching(lambda seconds: walks[0].taken(seconds), lambda: synchronize[0]()):
        trial = bench.run(job, ladder=ladder, prepare=prepare)
    return trial, walks[0]


def ladder(bench: Bench) -> Result:
    """QLoRA r=64 on all linear layers, 4 rows a batch; a limit just below each plan's peak.

    Peaks are those of whole steps. Tokens are those of the batches as they were loaded: windows run
    some of them twice, which shows as fewer of them a second.
    """
    job, result = bench.scale.qlora(_STEPS), Result()
    width, rows = bench.scale.width, len(job.batches[0])
    rungs = Ladder(
        CheckpointActivations(),
        OffloadActivations(),
        HalveSequence(floor=width // 2),
        SplitBatch(),
        PageOptimizer8bit(),
        NarrowTargets(),
        LowerRank(floor=8),
    )
    enough_s = 0.0 if bench.scale.tiny else _ENOUGH_S
    trial, walk = descend(bench, job, rungs, enough_s=enough_s)
    taken = _taken(trial)
    start, *levels = walk.levels
    result.tables["As it was"] = [_speed_and_peak(start, rows * width) | {"loss": trial.losses[0]}]
    result.tables["Rungs"] = [
        _rung_row(recovery, before, after, rows * width)
        for recovery, before, after in zip(taken, walk.levels, levels, strict=False)
    ]
    result.tables["End"] = [
        {"steps": trial.steps, "last_loss": trial.losses[-1], "ended_by": trial.error}
    ]
    missing = {rung_name(rung) for rung in rungs} - {recovery.rung for recovery in taken}
    if bench.scale.tiny:
        missing -= {OffloadActivations().name}  # from the host to the host
    if missing:
        result.failures.append(f"never taken: {', '.join(sorted(missing))}")
    if trial.error is None or not trial.error.startswith("LadderExhaustedError"):
        result.failures.append(f"the ladder did not come to its end: {trial.error}")
    result.failures += _not_finite(trial)
    return result


def paged(bench: Bench) -> Result:
    """All weights with AdamW that becomes paged: device memory outside of PyTorch, run by run.

    The first runs load libraries; after them it must not grow any more.
    """
    job, result, rows = bench.scale.full(steps=6), Result(), []
    job = replace(job, optim="adamw_torch_fused")
    if bench.scale.tiny:  # bitsandbytes has no float64
        job = replace(job, load="fp32", train="fp32")
    names = ("first", "second") if bench.scale.tiny else ("first", "second", "third", "fourth")
    settled_bytes = None
    for name in names:
        before_bytes = _outside_bytes(bench)
        trial, walk = descend(bench, job, Ladder(PageOptimizer8bit()), rungs=1)
        after_bytes, taken = _outside_bytes(bench), _taken(trial)
        rows.append(
            {
                "run": name,
                "rungs": len(taken),
                "steps": trial.steps,
                "first_loss": trial.losses[0],
                "last_loss": trial.losses[-1],
                "tensors_before_bytes": walk.levels[0].peak_allocated_bytes,
                "tensors_after_bytes": walk.levels[-1].peak_allocated_bytes,
                "apply_s": walk.levels[-1].apply_s,
                "outside_before_bytes": before_bytes,
                "outside_most_bytes": walk.outside_bytes,
                "outside_after_bytes": after_bytes,
            }
        )
        result.failures += _not_finite(trial)
        if len(taken) != 1 or trial.steps != job.steps:
            result.failures.append(f"{name}: {len(taken)} rungs, {trial.steps} steps")
        if name == "second":
            settled_bytes = after_bytes
    result.tables["Outside of PyTorch"] = rows
    if settled_bytes is not None and after_bytes is not None:
        kept_bytes = max(0, after_bytes - settled_bytes)
        # The driver holds a few MiB more in one run and less in the next.
        paged_bytes = (walk.outside_bytes or 0) - (before_bytes or 0)
        if kept_bytes > max(_LEFT_OVER_BYTES, paged_bytes // 4):
            result.failures.append(f"{format_bytes(kept_bytes)} were not given back")
    return result


def exact(bench: Bench) -> Result:
    """LoRA in bf16: checkpoints, then offloaded ones, against twins without a guard."""
    job = bench.scale.lora("full " * 5)
    compared = Comparison.start(bench, job)
    rungs = Ladder(CheckpointActivations(), OffloadActivations())
    if bench.scale.tiny:
        rungs = Ladder(CheckpointActivations())
    trial, _ = descend(bench, job, rungs, rungs=len(rungs))
    row = compared.judge("both rungs", trial)
    row["losses_floor"] = compared.loss_floor
    names = [recovery.rung for recovery in _taken(trial)]
    if names != [rung_name(rung) for rung in rungs]:
        compared.result.failures.append(f"taken were {names}")
    if len(trial.losses) == compared.job.steps:
        apart = row["losses_apart"] = losses_apart(trial, compared.twin)
        allowed = max(_TIMES_FLOOR * compared.loss_floor, _SAME_LOSS[compared.job.train])
        if not apart <= allowed:  # not `>`: NaN must fail
            compared.result.failures.append(f"losses {apart:.2g} apart, not {allowed:.2g}")
    return compared.finish()


def _taken(trial: Trial) -> list[Recovery]:
    done = trial.report.recoveries if trial.report is not None else []
    return [recovery for recovery in done if recovery.rung is not None]


def _rung_row(recovery: Recovery, before: Level, after: Level, tokens: int) -> Row:
    old, new = _speed_and_peak(before, tokens), _speed_and_peak(after, tokens)
    return {
        "rung": recovery.rung,
        "change": recovery.before.describe_change(recovery.after).partition(", effective")[0],
        "phase": recovery.event.phase,
        "peak_before_bytes": old["peak_bytes"],
        "peak_after_bytes": new["peak_bytes"],
        "reserved_before_bytes": old["reserved_bytes"],
        "reserved_after_bytes": new["reserved_bytes"],
        "tokens_a_second_before": old["tokens_a_second"],
        "tokens_a_second_after": new["tokens_a_second"],
        "apply_s": after.apply_s,
        "lost_s": recovery.seconds_lost,
        "steps": new["steps"],
    }


def _speed_and_peak(level: Level, tokens: int) -> Row:
    """Of the fastest step: the first after a change also fills the allocator's cache."""
    return {
        "peak_bytes": level.peak_allocated_bytes,
        "reserved_bytes": level.peak_reserved_bytes,
        "tokens_a_second": round(tokens / min(level.step_s)) if level.step_s else None,
        "steps": len(level.step_s),
    }


def _not_finite(trial: Trial) -> list[str]:
    bad = [step for step, loss in enumerate(trial.losses, 1) if not math.isfinite(loss)]
    return [f"the loss is not finite in steps {bad}"] if bad else []


def _outside_bytes(bench: Bench) -> int | None:
    with bench.new_session() as session:
        return session.outside_bytes


SECTIONS: dict[str, Callable[[Bench], Result]] = {"ladder": ladder, "paged": paged, "exact": exact}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen sections; returns the exit code."""
    about = (__doc__ or "").partition("\n")[0]
    return Check("gpu_checks.ladder", "The ladder, measured", about, SECTIONS).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
