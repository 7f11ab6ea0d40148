"""The sections: what is run, what is read from it, and what must hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_checks.alternation import compared
from gpu_checks.trial import (
    SqueezeOptimizer,
    Toggle,
    Trainable,
    Trial,
    largest_difference,
    losses_apart,
    run,
    update_difference,
)
from oomguard.memory.size import format_bytes
from oomguard.rung import Fidelity

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_checks.card import Session
    from gpu_checks.workload import CheckedTrainer, Scale

    Row = dict[str, Any]

# How far an exact recovery may end from its twin, in parts of what training changed. On a GPU two
# runs of one training differ too, and Adam's first steps turn the sign of a tiny gradient into a
# whole step: several times what two twins differ by is allowed. A lost or doubled gradient is 0.5.
_TOLERANCE = {"bf16": 0.3, "fp16": 0.3, "fp64": 1e-9}
_TIMES_FLOOR = 3
_OVERHEAD_PCT = 1.0
_LEFT_OVER_BYTES = 4 * 2**20


@dataclass
class Result:
    """What a section found.

    Attributes:
        tables: Rows by the title of their table.
        failures: What should have been otherwise, in words.
        seconds: How long it took.
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Bench:
    """Where the sections run: makes sessions, and knows how large the jobs are."""

    new_session: Callable[[], Session]
    scale: Scale

    def run(self, job: Trainable, **how: Any) -> Trial:
        """See `gpu_checks.trial.run`."""
        return run(self.new_session, job, **how)


@dataclass
class Comparison:
    """Trials of one job, each compared with a twin that met no limit.

    Attributes:
        job: What all of them train.
        twin: The trial to compare with.
        floor: How far two such twins are apart, as in `largest_difference`.
        update_floor: The same, as in `update_difference`.
        result: Where failures go.
        runs: A row for each trial.
        recoveries: A row for each recovery.
        loss_floor: How far the losses of two twins are apart at the most.
    """

    job: Trainable
    twin: Trial
    floor: float
    update_floor: float
    result: Result
    runs: list[Row] = field(default_factory=list)
    recoveries: list[Row] = field(default_factory=list)
    loss_floor: float = 0.0

    @classmethod
    def start(cls, bench: Bench, job: Trainable, **how: Any) -> Comparison:
        """Train twice without a guard: how far apart do the two end?"""
        first, twin = bench.run(job, **how), bench.run(job, **how)
        floors = largest_difference(first, twin), update_difference(first, twin)
        comparison = cls(job, twin, *floors, Result(), loss_floor=losses_apart(first, twin))
        comparison.add("no guard", twin)
        if not any((twin.weights[name] != start).any() for name, start in twin.initial.items()):
            comparison.result.failures.append("the training changed no weight: nothing is compared")
        return comparison

    def add(self, name: str, trial: Trial, limit_bytes: int | None = None) -> Row:
        """A row for the trial, and one for each of its recoveries."""
        done = trial.report.recoveries if trial.report is not None else []
        whole = trial.error is None and trial.steps == self.job.steps
        row = {
            "run": name,
            "limit_bytes": limit_bytes,
            "steps": trial.steps,
            "steps_lost": self.job.steps - trial.steps,
            "recoveries": len(done),
            "lost_s": sum(recovery.seconds_lost for recovery in done),
            "peak_allocated_bytes": trial.peak_allocated_bytes,
            "peak_reserved_bytes": trial.peak_reserved_bytes,
            "last_step_peak_bytes": trial.last_peak_allocated_bytes,
            "last_loss": trial.losses[-1] if whole else None,
            "loss_apart": trial.losses[-1] - self.twin.losses[-1] if whole else None,
            "weights_apart": largest_difference(trial, self.twin) if whole else None,
            "weights_floor": self.floor,
            "updates_apart": update_difference(trial, self.twin) if whole else None,
            "updates_floor": self.update_floor,
            "ended_by": trial.error,
        }
        self.runs.append(row)
        self.recoveries += [_recovery_row(name, recovery) for recovery in done]
        return row

    def judge(self, name: str, trial: Trial, limit_bytes: int | None = None) -> Row:
        """`add`, and what a guarded run under a limit must fulfil."""
        row, failures = self.add(name, trial, limit_bytes), self.result.failures
        done = trial.report.recoveries if trial.report is not None else []
        if trial.error is not None or row["steps_lost"]:
            failures.append(f"{name}: {row['steps_lost']} steps lost ({trial.error})")
            return row
        if not done:
            failures.append(f"{name}: memory never ran out")
        most = trial.peak_reserved_bytes or trial.peak_allocated_bytes
        if limit_bytes is not None and most > limit_bytes:
            failures.append(f"{name}: {format_bytes(most)} of {format_bytes(limit_bytes)} in use")
        allowed = max(_TIMES_FLOOR * self.update_floor, _TOLERANCE[self.job.train])
        exact = all(r.fidelity in {None, Fidelity.EXACT} for r in done)
        if exact and not row["updates_apart"] <= allowed:  # not `>`: NaN must fail
            failures.append(f"{name}: updates {row['updates_apart']:.2g} apart, not {allowed:.2g}")
        return row

    def finish(self) -> Result:
        """The tables of all trials."""
        self.result.tables = {"Runs": self.runs, "Recoveries": self.recoveries}
        return self.result


def _recovery_row(name: str, recovery: Any) -> Row:
    event = recovery.event
    return {
        "run": name,
        "step": event.step,
        "micro_batch": event.micro_batch,
        "phase": event.phase,
        "asked_bytes": event.asked_bytes,
        "free_bytes": event.free_bytes,
        "rung": recovery.rung or recovery.change or "released memory",
        "fidelity": None if recovery.fidelity is None else recovery.fidelity.value,
        "change": recovery.before.describe_change(recovery.after),
        "lost_s": recovery.seconds_lost,
    }


def limits(bench: Bench) -> Result:
    """LoRA in bf16 with the process limited to shares of what it took without a limit."""
    job = bench.scale.lora("short full ragged full full ragged full short", accumulation=2)
    compared = Comparison.start(bench, job)
    shares = (0.75, 0.5) if bench.scale.tiny else (0.75, 0.40, 0.15)
    for share in shares:
        limit_bytes = int(share * compared.twin.peak_allocated_bytes)
        if share == shares[0]:
            plain = bench.run(job, limit_bytes=limit_bytes)
            compared.add(f"no guard, {share:.0%}", plain, limit_bytes)
            if plain.error is None:
                compared.result.failures.append(f"{share:.0%} is enough without a guard")
        for ladder in ("exact_first", "default"):
            trial = bench.run(job, ladder=bench.scale.ladder(ladder), limit_bytes=limit_bytes)
            compared.judge(f"{ladder}, {share:.0%}", trial, limit_bytes)
    return compared.finish()


def fp16(bench: Bench) -> Result:
    """LoRA in fp16 with a gradient scaler; memory runs out in backward."""
    compared = Comparison.start(bench, bench.scale.lora("full ragged full full", train="fp16"))

    def squeeze(trainer: CheckedTrainer, session: Session) -> None:
        trainer.after_forward = partial(session.squeeze, bench.scale.loss_bytes)

    trial = bench.run(compared.job, ladder="exact_first", prepare=squeeze)
    compared.judge("no more than forward left", trial)
    phases = [row["phase"] for row in compared.recoveries]
    if "backward" not in phases:
        compared.result.failures.append(f"memory ran out in {phases}, not in backward")
    if trial.loss_scale != compared.twin.loss_scale:
        compared.result.failures.append(
            f"the loss scale ends at {trial.loss_scale}, without limit {compared.twin.loss_scale}"
        )
    compared.runs[0]["loss_scale"] = compared.twin.loss_scale
    compared.runs[1]["loss_scale"] = trial.loss_scale
    return compared.finish()


def optimizer(bench: Bench) -> Result:
    """All weights with AdamW over lists of tensors, whose temporaries do not fit."""

    def foreach(trainer: CheckedTrainer, session: Session, *, squeeze: bool) -> None:
        trainer.add_callback(SqueezeOptimizer(session, squeeze=squeeze))

    job = bench.scale.full(steps=3)
    compared = Comparison.start(bench, job, prepare=partial(foreach, squeeze=False))
    trial = bench.run(job, ladder="exact_first", prepare=partial(foreach, squeeze=True))
    row = compared.judge("half of the temporaries", trial)
    row["operations_moved_to_host"] = trial.host_operations
    if trial.host_operations < 1:
        compared.result.failures.append("no operation of the optimizer went to the host")
    return compared.finish()


def overhead(bench: Bench) -> Result:
    """Seconds of a step with and without the guard in one run, when memory never runs out.

    Blocks of steps alternate, so that both meet the same clocks; the first steps after a change are
    left out.
    """
    block, skipped, blocks = (4, 2, 4) if bench.scale.tiny else (8, 2, 36)

    def toggle(trainer: CheckedTrainer, session: Session) -> None:
        trainer.add_callback(Toggle(trainer, block))

    def is_on(step: int) -> bool:
        return step // block % 2 == 1

    trial = bench.run(bench.scale.lora("full " * block * blocks), prepare=toggle)
    row = compared(trial.step_s, is_on, block=block, skipped=skipped, names=("no_guard", "guard"))
    result = Result(tables={"Overhead": [row]})
    if not bench.scale.tiny and row["overhead_pct"] > _OVERHEAD_PCT:
        result.failures.append(f"the guard costs {row['overhead_pct']:.2f} % of a step")
    return result


def left_over(bench: Bench) -> Result:
    """Bytes that live on after a recovery, with the trainer and without it."""
    job, result, rows = bench.scale.lora("full full"), Result(), []
    plain = bench.run(job)  # libraries take their workspaces in the first run
    limit_bytes = int((0.75 if bench.scale.tiny else 0.40) * plain.peak_allocated_bytes)
    plain = bench.run(job)
    for name in ("no guard", "exact_first", "default"):
        guarded = name != "no guard"
        trial = plain
        if guarded:
            ladder = bench.scale.ladder(name)
            trial = bench.run(job, ladder=ladder, limit_bytes=limit_bytes)
        row: Row = {
            "run": name,
            "recoveries": len(trial.report.recoveries) if trial.report is not None else 0,
            "before_bytes": trial.before_bytes,
            "trained_bytes": trial.trained_bytes,
            "after_bytes": trial.after_bytes,
            "left_over_bytes": trial.after_bytes - trial.before_bytes,
            "more_than_no_guard_bytes": trial.trained_bytes - plain.trained_bytes,
        }
        rows.append(row)
        if guarded and not row["recoveries"]:
            result.failures.append(f"{name}: memory never ran out")
        result.failures += [
            f"{name}: {key} is {row[key]}"
            for key in ("left_over_bytes", "more_than_no_guard_bytes")
            if guarded and row[key] > _LEFT_OVER_BYTES
        ]
    result.tables["Live bytes"] = rows
    return result


SECTIONS: dict[str, Callable[[Bench], Result]] = {
    "limits": limits,
    "fp16": fp16,
    "optimizer": optimizer,
    "overhead": overhead,
    "left-over": left_over,
}
