"""Run the worst case of a plan on the user's own trainer, and leave no trace of it."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from oomguard import hooks, oom
from oomguard.errors import ConfigurationError
from oomguard.levers import double, trl_losses
from oomguard.levers.adapter import inner_optimizer
from oomguard.levers.batch import CannotActError
from oomguard.levers.keepsake import Keepsake
from oomguard.levers.live import read_plan
from oomguard.levers.longest import has_rows
from oomguard.memory import device, simulated
from oomguard.memory.size import format_bytes

if TYPE_CHECKING:
    from oomguard.plan import Plan

logger = logging.getLogger("oomguard")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of running the worst case of a plan: its longest rows, two optimizer steps.

    Attributes:
        plan: What was run.
        fits: Whether it came to its end within the card.
        phase: Where memory ran out: `"setup"`, `"step"`, `"optimizer"`, `"evaluate"` or `"save"`;
            `None` where it did not.
        error: What the failure said.
        peak_allocated_bytes: The most that tensors took at once.
        peak_reserved_bytes: The most that PyTorch held from the device; `None` on a `VirtualCard`.
        device_bytes: That, and what this process had of the device besides: its context.
        pass_tokens: Padded tokens of one pass; `None` where batches are no rows of tokens.
        step_s: Seconds of a whole optimizer step of such passes, all accumulated ones included.
        tokens_per_s: Padded tokens trained on a second, in such a step.
        seconds: What the trial took.
    """

    plan: Plan
    fits: bool
    phase: str | None
    error: str | None
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    device_bytes: int | None
    pass_tokens: int | None
    step_s: float | None
    tokens_per_s: float | None
    seconds: float

    def log_line(self) -> str:
        """What was run, and what came of it, in one line."""
        rows, steps = self.plan.per_device_train_batch_size, self.plan.gradient_accumulation_steps
        end = "ran" if self.fits else f"ran out of memory in {self.phase or 'the end'}"
        peak = format_bytes(self.peak_allocated_bytes)
        return f"trial of {rows} x {steps} rows: {end}, peak {peak}, {self.seconds:.1f} s"

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON types."""
        return {**asdict(self), "plan": self.plan.to_dict()}


class Watch(TrainerCallback):
    """Follows the trial's training: where it is, and how long its second step takes.

    Attributes:
        phase: As in `Trial.phase`.
        passes_s: Seconds of the second step up to clipping.
        optimizer_s: Seconds of the rest of it.
    """

    def __init__(self, *, evaluates: bool) -> None:
        """Ask for a save after the last step, and before it for an evaluation if `evaluates`."""
        self.phase = "setup"
        self.passes_s = self.optimizer_s = 0.0
        self._evaluates = evaluates
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The passes begin."""
        self.phase, self._began = "step", _now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """All passes are done, and clipping too."""
        self.phase, now = "optimizer", _now()
        self.passes_s, self._began = now - self._began, now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is done; ask for what comes after the last one."""
        self.optimizer_s = _now() - self._began
        self.phase = "step"
        if state.global_step >= double.STEPS:
            control.should_save, control.should_evaluate = True, self._evaluates
            self.phase = "evaluate" if self._evaluates else "save"

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What is left is the save."""
        self.phase = "save"


def _now() -> float:
    device.synchronize()
    return time.perf_counter()


def refusal(trainer: Any, plan: Plan) -> str | None:
    """Why `plan` cannot be tried on `trainer`, or `None`.

    A trial needs memory that it can measure, rows that it can choose from, and a trainer that has
    not begun to train.
    """
    args, name = trainer.args, type(trainer).__name__
    if simulated.current() is None and args.device.type != "cuda":
        return f"there is nothing to measure: it trains on {args.device.type!r}"
    if hooks.is_installed(trainer):
        return "it is inside a Guard"
    if args.world_size > 1 or args.n_gpu > 1:
        return f"{max(args.world_size, args.n_gpu)} devices train together"
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(
        trainer, "is_fsdp_enabled", False
    ):
        return "its weights are sharded"
    if trl_losses.generates(trainer):
        return f"what {name} trains on is sampled, and its longest sample is not known"
    if not has_rows(trainer.train_dataset):
        return "train_dataset is a stream, whose longest rows are not known"
    optimizer = inner_optimizer(trainer)
    if optimizer is not None and optimizer.state:
        return "it has trained already, and its optimizer's state would have to be copied"
    now = read_plan(trainer)
    return _unreachable(now, plan) or double.refusal(trainer, now, plan)


def _unreachable(now: Plan, plan: Plan) -> str | None:
    """Why a live trainer has nothing for `plan`."""
    for name in ("lora_r", "max_length"):
        old, new = getattr(now, name), getattr(plan, name)
        if old is not None and (new is None or new > old):
            return f"{name} is {old} here and cannot be raised to {new} any more"
    if set(plan.target_modules or ()) - set(now.target_modules or ()):
        return "adapters of other target_modules are not there"
    return None


def run_trial(trainer: Any, plan: Plan, *, card_bytes: int | None = None) -> Trial:
    """Train `plan` for two optimizer steps on the longest rows, evaluate a batch, save; undo all.

    Real code runs on the real model: the trainer's own loss, loader, optimizer, evaluation and
    saving. Afterwards weights, gradients, random numbers, the trainer's attributes and everything
    `Keepsake` names are as before, also when memory runs out; the user's callbacks are not called,
    nothing is logged, and what was saved is gone.

    Args:
        trainer: One that `refusal` takes.
        plan: What to run.
        card_bytes: Memory of the card to run it for, where that is less than there is.

    Returns:
        What was measured. A trial that ran out of memory does not raise.

    Raises:
        ConfigurationError: Its rows cannot be cut to the plan's `max_length`.
    """
    began = time.perf_counter()
    keepsake = Keepsake(trainer)
    device.release_cached()
    outside = _outside_bytes()
    watch = Watch(evaluates=double.evaluates(trainer))
    limit = None if card_bytes is None else card_bytes - outside
    facts, tokens = None, None
    try:
        with device.limited(limit), _folder(trainer) as folder:
            _start_peaks()
            facts, tokens = _train(trainer, plan, Path(folder), watch)
            allocated, reserved = _peaks()
    finally:
        device.release_cached()  # the double goes first: what it kept makes room
        keepsake.restore()
    over = card_bytes is not None and reserved is None and allocated > card_bytes
    error = None if facts is None else facts.message
    if over and card_bytes is not None:
        error = f"{format_bytes(allocated)} were allocated, of {format_bytes(card_bytes)}"
    step_s = None if error else _step_s(watch, plan)
    passes = plan.gradient_accumulation_steps
    trial = Trial(
        plan=plan,
        fits=error is None,
        phase=watch.phase if facts is not None else None,
        error=error,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        device_bytes=None if reserved is None else reserved + outside,
        pass_tokens=tokens,
        step_s=step_s,
        tokens_per_s=None if step_s is None or tokens is None else tokens * passes / step_s,
        seconds=time.perf_counter() - began,
    )
    logger.info("%s", trial.log_line())
    return trial


def _train(
    trainer: Any, plan: Plan, folder: Path, watch: Watch
) -> tuple[oom.OOMFacts | None, int | None]:
    """Run the double; the facts of the out-of-memory if there was one, and a pass's tokens."""
    try:
        made = double.make(trainer, plan, folder, watch)
        made.train()
    except CannotActError as error:
        msg = f"max_length cannot be lowered to {plan.max_length}: {error}"
        raise ConfigurationError(msg) from error
    except (RuntimeError, MemoryError) as error:
        return oom.caught(error), None
    return None, double.pass_tokens(made)


def _step_s(watch: Watch, plan: Plan) -> float:
    """Seconds of a step with all its passes, of which the trial has made two at the most."""
    made = min(double.PASSES, plan.gradient_accumulation_steps)
    return watch.passes_s * plan.gradient_accumulation_steps / made + watch.optimizer_s


def _folder(trainer: Any) -> TemporaryDirectory[str]:
    """A folder in the same place as the run's own, whose file system has room for checkpoints."""
    place = Path(trainer.args.output_dir)
    return TemporaryDirectory(prefix=".oomguard-trial-", dir=place if place.is_dir() else None)


def _outside_bytes() -> int:
    """What is used of the device besides PyTorch's own memory; 0 on a `VirtualCard`."""
    used, stats = device.used_bytes(), device.allocator_stats()
    return 0 if used is None or stats is None else used - stats.reserved_bytes


def _start_peaks() -> None:
    card = simulated.current()
    if card is not None:
        card.take_peak()
    device.reset_peaks()


def _peaks() -> tuple[int, int | None]:
    """The most bytes allocated and reserved since `_start_peaks`."""
    card, stats = simulated.current(), device.allocator_stats()
    if card is not None:
        return card.take_peak(), None
    assert stats is not None  # noqa: S101 - `refusal` has seen to it
    return stats.peak_allocated_bytes, stats.peak_reserved_bytes
