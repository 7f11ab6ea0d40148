"""One training run and everything that is read from it."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from transformers import TrainerCallback

from oomguard import Guard, OomguardError, oom

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_checks.card import Session
    from gpu_checks.workload import CheckedTrainer
    from oomguard import Ladder, Report

    Weight = np.ndarray[Any, np.dtype[Any]]
    Weights = dict[str, Weight]
    Prepare = Callable[[CheckedTrainer, Session], None]


class Trainable(Protocol):
    """What can be trained here."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def train(self) -> str:
        """Mixed precision, a key of `workload.PRECISION`."""

    def build(self, folder: Path, callbacks: list[TrainerCallback]) -> Any:
        """A trainer with a fresh model; the same weights every time."""


class Meter(TrainerCallback):
    """Reads time and memory once an optimizer step."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.step_s: list[float] = []
        self.peaks: list[tuple[int, int | None]] = []
        self.optimizer_ooms = 0
        self._ooms = 0
        self._ended: float | None = None

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Count the allocations that fail from here."""
        self._ooms = self.session.ooms

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Count them to here."""
        self.optimizer_ooms += self.session.ooms - self._ooms

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """From one end to the next, so that fetching the batches is in it too."""
        self.session.synchronize()
        now = time.perf_counter()
        if self._ended is not None:
            self.step_s.append(now - self._ended)
        self._ended = now
        self.peaks.append(self.session.peaks())


class SqueezeOptimizer(TrainerCallback):
    """After the first optimizer step, leaves room for half of the next one's temporaries.

    AdamW over lists of tensors (`foreach`) makes one more copy of all gradients, whose bytes are
    live once more when the optimizer runs.
    """

    def __init__(self, session: Session, *, squeeze: bool) -> None:
        self._session = session
        self._squeeze = squeeze

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """`foreach` is the default on a GPU only."""
        for group in kwargs["optimizer"].param_groups:
            group["foreach"] = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are still there."""
        if self._squeeze and state.global_step == 0:
            gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            self._session.squeeze(sum(gradient.nbytes for gradient in gradients) // 2)


class Toggle(TrainerCallback):
    """Puts a guard on the trainer for every other block of steps of one and the same run."""

    def __init__(self, trainer: CheckedTrainer, block: int) -> None:
        self._trainer = trainer
        self._block = block
        self._guard: Guard | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change at the end of a block."""
        if state.global_step % self._block:
            return
        if self._guard is None and state.global_step < state.max_steps:
            self._guard = Guard(self._trainer).__enter__()
            # As if the guard had opened the loader itself.
            loader = self._trainer.callback_handler.train_dataloader
            cast("Any", self._trainer)._oomguard.feed.attach(loader)  # noqa: SLF001
        elif self._guard is not None:
            self._guard.__exit__(None, None, None)
            self._guard = None


@dataclass(kw_only=True)
class Trial:
    """What a training run did.

    Attributes:
        steps: Optimizer steps made.
        losses: The loss of each.
        initial: Weights before the training, those that are trained, on the host.
        weights: The same after it.
        step_s: Seconds from each step's end to the next one's.
        peak_allocated_bytes: Most bytes of tensors, and `peak_reserved_bytes` most held for them.
        last_peak_allocated_bytes: Most bytes of tensors in the last step.
        optimizer_ooms: Allocations that failed inside `optimizer.step`.
        loss_scale: Where the gradient scaler ended; `None` without one.
        report: What the guard did; `None` without one.
        error: What ended the run early.
        evaluations: The metrics of each evaluation.
        before_bytes: Live before the model was made; `trained_bytes` when training had ended,
            `after_bytes` when model and trainer were gone.
    """

    steps: int
    losses: list[float]
    initial: Weights = field(repr=False)
    weights: Weights = field(repr=False)
    step_s: list[float]
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    last_peak_allocated_bytes: int
    optimizer_ooms: int
    loss_scale: float | None
    report: Report | None
    error: str | None
    trained_bytes: int
    evaluations: list[dict[str, float]] = field(default_factory=list)
    before_bytes: int = 0
    after_bytes: int = 0

    @property
    def host_operations(self) -> int:
        """Operations of the optimizer that were computed on the host.

        One that fails makes one recovery; if it fails again, it goes to the host.
        """
        recoveries = self.report.recoveries if self.report is not None else []
        return self.optimizer_ooms - sum(r.event.phase == "optimizer" for r in recoveries)


def run(
    new_session: Callable[[], Session],
    job: Trainable,
    *,
    ladder: Ladder | str | None = None,
    limit_bytes: int | None = None,
    prepare: Prepare | None = None,
) -> Trial:
    """Train `job` once, from a fresh model to nothing left.

    Args:
        new_session: Makes the card's session.
        job: What to train.
        ladder: The guard's ladder; without one there is no guard.
        limit_bytes: Memory that the process may have.
        prepare: Called with the trainer before it trains.
    """
    with new_session() as session, TemporaryDirectory() as folder:
        before_bytes = session.live_bytes
        session.limit(limit_bytes)
        trial = _train(session, job, Path(folder), ladder, prepare)
        session.collect()
        trial.before_bytes, trial.after_bytes = before_bytes, session.live_bytes
    return trial


def _train(
    session: Session,
    job: Trainable,
    folder: Path,
    ladder: Ladder | str | None,
    prepare: Prepare | None,
) -> Trial:
    meter = Meter(session)
    trainer = job.build(folder, [meter])
    if prepare is not None:
        prepare(trainer, session)
    initial = _weights(trainer)
    guard = None if ladder is None else Guard(trainer, ladder=ladder)
    error = None
    try:
        with guard or nullcontext():
            trainer.train()
    except (torch.OutOfMemoryError, OomguardError) as failure:
        error = f"{type(failure).__name__}: {str(failure).partition('. ')[0]}"
        oom.release(failure)
    session.collect()
    trained_bytes = session.live_bytes
    session.limit(None)
    peaks = [*meter.peaks, session.peaks()]
    scaler = trainer.accelerator.scaler
    return Trial(
        steps=trainer.state.global_step,
        losses=[line["loss"] for line in trainer.state.log_history if "loss" in line],
        initial=initial,
        weights=_weights(trainer),
        step_s=meter.step_s,
        peak_allocated_bytes=max(allocated for allocated, _ in peaks),
        peak_reserved_bytes=max((held for _, held in peaks if held is not None), default=None),
        last_peak_allocated_bytes=meter.peaks[-1][0] if meter.peaks else peaks[-1][0],
        optimizer_ooms=meter.optimizer_ooms,
        loss_scale=None if scaler is None else scaler.get_scale(),
        report=None if guard is None else guard.report,
        error=error,
        trained_bytes=trained_bytes,
        evaluations=[line for line in trainer.state.log_history if "eval_loss" in line],
    )


def _weights(trainer: CheckedTrainer) -> Weights:
    model: Any = trainer.model
    return {
        name: _exact(parameter.detach().cpu()).numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _exact(values: torch.Tensor) -> torch.Tensor:
    """The same numbers in a type that NumPy has."""
    return values.float() if values.dtype is torch.bfloat16 else values


def largest_difference(one: Trial, other: Trial) -> float:
    """The largest relative difference of any trained tensor: norm(one - other) / norm(other).

    NaN if there is a NaN in any of them.
    """
    return float(
        np.max(
            [
                _distance(one.weights[name], weight) / (_distance(weight) or 1.0)
                for name, weight in other.weights.items()
            ]
        )
    )


def losses_apart(one: Trial, other: Trial) -> float:
    """The largest difference of the losses of any step; NaN if one of them is."""
    return float(np.max(np.abs(np.subtract(one.losses, other.losses))))


def update_difference(one: Trial, other: Trial) -> float:
    """What lies between two trainings, relative to what the other one changed.

    All tensors together: norm(one - other) / norm(other - initial). A lost update shows, however
    small it is beside the weights.
    """
    apart = [_distance(one.weights[name], weight) for name, weight in other.weights.items()]
    moved = [_distance(weight, other.initial[name]) for name, weight in other.weights.items()]
    return math.hypot(*apart) / (math.hypot(*moved) or 1.0)


def _distance(one: Weight, other: Weight | float = 0.0) -> float:
    return float(np.linalg.norm(np.subtract(one, other, dtype=np.float64)))
