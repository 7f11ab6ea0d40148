"""What watching a run reports of planted trouble with memory on one NVIDIA GPU, and what it costs.

    python -m gpu_checks.watch --out watch.json --markdown watch.md

measures on a GPU of 40 GB or more; with `--tiny` the same code trains tiny models on the CPU, where
only tensors can be watched. Exits with 1 if a section crashed or found something that must not be.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gpu_checks.alternation import compared
from gpu_checks.plant import Alternate, Fragments, Outside, Plant, Tensors
from gpu_checks.report import Check
from gpu_checks.sections import Bench, Result
from gpu_checks.workload import LLAMA_190M, TINY, Job
from oomguard import LeakDetector, VRAMReporter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_checks.card import Session
    from gpu_checks.workload import CheckedTrainer, Scale
    from oomguard.watch.findings import Finding, Kind

_STEPS = 320  # an alarm takes 160 to 224 steps, and a census some more
_OVERHEAD_PCT = 1.0


def job(scale: Scale, steps: int, *, width: int = 256) -> Job:
    """LoRA on a small model, so that steps are short."""
    rows, width = (1, 16) if scale.tiny else (4, width)
    return Job(
        model=TINY if scale.tiny else LLAMA_190M,
        load="fp32" if scale.tiny else "bf16",
        train="fp32" if scale.tiny else "bf16",
        lora=True,
        batches=((width,) * rows,) * steps,
        accumulation=1,
        optim="adamw_torch_fused",
        on_cpu=scale.tiny,
    )


def watch(
    bench: Bench, plant: Callable[[Session], Plant] | None, *, record_history: bool = False
) -> list[Finding]:
    """Train with something planted; what the detector says."""
    detector = LeakDetector(record_history=record_history)
    planted: list[Plant] = []

    def prepare(trainer: CheckedTrainer, session: Session) -> None:
        if plant is not None:
            planted.append(plant(session))
            trainer.add_callback(planted[0])
        trainer.add_callback(detector)

    try:
        trial = bench.run(job(bench.scale, _STEPS), prepare=prepare)
    finally:
        for each in planted:
            each.remove()
    if trial.error is not None:
        raise RuntimeError(trial.error)
    return detector.findings


def judged(found: Sequence[Finding], kind: Kind | None) -> Result:
    """A row for each finding; it fails where `kind` is not the one that there is."""
    rows = [
        {
            "kind": finding.kind,
            "step": finding.step,
            "since_step": finding.since_step,
            "per_step_bytes": finding.bytes_per_step and round(finding.bytes_per_step),
            "so_far_bytes": finding.bytes_so_far,
            "full_at_step": "-".join(map(str, dict.fromkeys(finding.full_at_step or ()))) or None,
            "holder": finding.holder,
            "allocated_at": "; ".join(finding.stacks) or None,
            "message": finding.message,
        }
        for finding in found
    ]
    result = Result(tables={"Findings": rows})
    kinds = [finding.kind for finding in found]
    if kinds != ([] if kind is None else [kind]):
        result.failures.append(f"reported were {kinds or 'nothing'}, planted was {kind}")
    return result


def nothing(bench: Bench) -> Result:
    """A training without anything planted: nothing must be reported."""
    return judged(watch(bench, None), None)


def leak(bench: Bench) -> Result:
    """A callback keeps a tensor of 1 MiB a step; allocations are recorded on a GPU."""
    found = watch(bench, Tensors, record_history=not bench.scale.tiny)
    result = judged(found, "leak")
    for finding in found:
        if not str(finding.holder).startswith("Tensors.kept > list["):
            result.failures.append(f"held by {finding.holder}, not by Tensors.kept")
        if not bench.scale.tiny and not any("plant.py" in site for site in finding.stacks):
            result.failures.append(f"allocated at {finding.stacks}, not in plant.py")
    return result


def outside(bench: Bench) -> Result:
    """64 MiB a step from cudaMalloc, of which PyTorch knows nothing."""
    if bench.scale.tiny:
        return Result()
    return judged(watch(bench, Outside), "outside")


def fragmentation(bench: Bench) -> Result:
    """Live tensors move into segments of their own, 18 MiB of which nothing else can use."""
    if bench.scale.tiny:
        return Result()
    return judged(watch(bench, Fragments), "fragmentation")


def overhead(bench: Bench) -> Result:
    """Seconds of a step with and without VRAMReporter and LeakDetector in one run.

    Blocks of steps alternate, so that both meet the same clocks; the first steps after a change are
    left out. `python -m benchmarks.overhead` times the callbacks themselves.
    """
    block, skipped, blocks = (4, 2, 6) if bench.scale.tiny else (16, 2, 40)
    placed: list[Alternate] = []

    def prepare(trainer: CheckedTrainer, session: Session) -> None:
        placed.append(Alternate(trainer, [VRAMReporter(), LeakDetector()], block))
        trainer.add_callback(placed[0])

    trial = bench.run(job(bench.scale, block * blocks, width=1024), prepare=prepare)
    row = compared(
        trial.step_s, placed[0].is_on, block=block, skipped=skipped, names=("plain", "watched")
    )
    result = Result(tables={"Steps": [row]})
    if not bench.scale.tiny and row["overhead_pct"] > _OVERHEAD_PCT:
        result.failures.append(f"watching costs {row['overhead_pct']:.2f} % of a step")
    return result


SECTIONS: dict[str, Callable[[Bench], Result]] = {
    "nothing": nothing,
    "leak": leak,
    "outside": outside,
    "fragmentation": fragmentation,
    "overhead": overhead,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen sections; returns the exit code."""
    about = (__doc__ or "").partition("\n")[0]
    return Check("gpu_checks.watch", "Watching, measured", about, SECTIONS).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
