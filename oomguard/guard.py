"""Train a Trainer to its end although memory runs out: `fit` and `Guard`."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from transformers import Trainer

from oomguard import hooks
from oomguard.checkpoint import OomguardState, Reached, read
from oomguard.descent import Descent
from oomguard.errors import ConfigurationError, UnsupportedTrainerError
from oomguard.ladder import Ladder
from oomguard.levers import trl_losses
from oomguard.levers.live import Levers, read_plan
from oomguard.levers.optimizer import optim_name
from oomguard.outside import Outside
from oomguard.plan import Plan
from oomguard.protection import Course
from oomguard.report import REPORT_NAME, Report, Status
from oomguard.rollout_step import transaction_of
from oomguard.rung import rung_name
from oomguard.watch.recorder import recorded

if TYPE_CHECKING:
    from types import TracebackType

logger = logging.getLogger("oomguard")


def fit(
    trainer: Trainer,
    *,
    ladder: Ladder | str = "default",
    plan: Plan | Literal["last"] | None = None,
    find: bool = False,
    **train_arguments: Any,
) -> Report:
    """Call `trainer.train()` and finish it although CUDA runs out of memory.

    Every out-of-memory error takes the next rung of `ladder`; the optimizer step that failed is
    made again from the same samples, and the training goes on.

    Args:
        trainer: A `transformers.Trainer`, `Seq2SeqTrainer`, or TRL's SFT, DPO, Reward, KTO, GRPO or
            RLOO trainer, single process.
        ladder: `"default"`, `"exact_first"`, or a `Ladder` of rungs.
        plan: What a new run begins with instead of the trainer's own settings: `"last"` for the
            plan that an earlier run in the same `args.output_dir` had ended with. A resumed run
            goes on with the plan in its checkpoint by itself.
        find: Whether to search first for the most rows a pass that fit, as `find_plan` does, and
            train with as many; the effective batch is kept by accumulation.
        **train_arguments: Passed to `trainer.train`, for example `resume_from_checkpoint=True`.

    Returns:
        The report; `report.train_output` is what `trainer.train()` returned.

    Raises:
        UnsupportedTrainerError: A setting of the trainer rules out an exact recovery.
        ConfigurationError: The ladder cannot work.
        LadderExhaustedError: Memory ran out and no rung was left.
    """
    if find:
        check(trainer)
        if plan is not None or train_arguments.get("resume_from_checkpoint"):
            msg = (
                "find=True contradicts plan and resume_from_checkpoint: either of them says what "
                "the training begins with. Leave out one."
            )
            raise ConfigurationError(msg)
        from oomguard import starting  # the search: a second to import

        starting.adopt_found(trainer)
    with Guard(trainer, ladder=ladder, plan=plan) as guard:
        trainer.train(**train_arguments)
    return guard.report


class Guard:
    """Guards every `trainer.train()` called inside its `with` block.

    Attributes:
        report: What happened; written to `args.output_dir/oomguard.json` at the end of the block,
            also when training fails.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        ladder: Ladder | str = "default",
        plan: Plan | Literal["last"] | None = None,
    ) -> None:
        """Check what is given, as in `fit`; nothing is changed before the block is entered.

        Raises:
            UnsupportedTrainerError: A setting of the trainer rules out an exact recovery.
            ConfigurationError: The ladder or the plan cannot work.
        """
        check(trainer)
        self._trainer: Any = trainer
        self._ladder = Ladder.of(ladder)
        own = read_plan(trainer)
        names = tuple(rung_name(rung) for rung in self._ladder)
        self.report = Report(initial_plan=own, plan=own, ladder=names)
        self._start = None if plan is None else self._reached(plan)

    def _reached(self, plan: Plan | Literal["last"]) -> Reached:
        if isinstance(plan, Plan):
            return Reached(self.report.plan, plan)
        if plan != "last":
            msg = f"plan={plan!r}: give a Plan, 'last' or None."
            raise ConfigurationError(msg)
        last = Report.load(Path(self._trainer.args.output_dir) / REPORT_NAME)
        return Reached(last.initial_plan, last.plan)

    def __enter__(self) -> Self:
        """Put the guard in front of the trainer's class."""
        from oomguard.forecast import Forecast  # the estimator: seconds to import

        check(self._trainer)
        levers = Levers(self._trainer, hooks.own_compute_loss(self._trainer))
        self._forecast = Forecast(self._trainer, self.report)
        self._descent = Descent(self._ladder, levers, self.report, self._forecast)
        transaction = transaction_of(self._trainer, levers, self._descent)
        outside = Outside(self._trainer, self._descent)
        course = Course(self._begin, self._resume)
        self._hooks = hooks.install(self._trainer, transaction, outside, course)
        self._state = OomguardState.of(self._descent.reached)
        self._trainer.add_callback(self._state)
        self._watch = ExitStack()
        self._watch.enter_context(recorded(self._trainer, self.report))
        self._began = time.perf_counter()
        return self

    def _begin(self, resumed: bool) -> None:
        if self._start is not None:
            self._go_on(resumed, self._start)
        if not resumed:  # a resumed run has shown what it needs
            self._forecast.warn(self._descent.plan)

    def _go_on(self, resumed: bool, start: Reached) -> None:
        if resumed:
            msg = (
                "plan and resume_from_checkpoint contradict each other: a resumed run goes on with "
                "the plan of its checkpoint. Leave plan out."
            )
            raise ConfigurationError(msg)
        if self._trainer.model_init is not None:
            msg = "plan cannot be applied to a trainer with model_init; give it a model."
            raise ConfigurationError(msg)
        self._start = None
        self._descent.go_on(start, "plan=")

    def _resume(self, checkpoint: Path) -> None:
        reached = read(checkpoint)
        if reached is not None:
            self._descent.go_on(reached, checkpoint.name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the trainer its class back; write and show the report."""
        hooks.uninstall(self._trainer)
        self._trainer.remove_callback(self._state)
        self._watch.close()
        self.report.seconds = time.perf_counter() - self._began
        self.report.train_output = self._hooks.train_output
        del self._hooks, self._descent, self._forecast  # they hold the last batches
        self.report.status = _status(error)
        self.report.error = None if error is None else _told(error)
        if not self._trainer.is_world_process_zero():
            return
        path = Path(self._trainer.args.output_dir) / REPORT_NAME
        try:
            self.report.save(path)
        except OSError as failure:  # never in place of the training's own result or error
            logger.warning("The report could not be written to %s: %s", path, failure)
        self.report.show()


def _told(error: BaseException) -> str:
    return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


def _status(error: BaseException | None) -> Status:
    if error is None:
        return "finished"
    return "failed" if isinstance(error, Exception) else "interrupted"


def check(trainer: Any) -> None:
    """Refuse a trainer under which a recovery could not be exact.

    Raises:
        UnsupportedTrainerError: Says which setting, and what to do instead.
    """
    if not isinstance(trainer, Trainer):
        msg = (
            f"fit() needs a transformers Trainer (or a subclass such as TRL's SFTTrainer), not "
            f"{trainer!r}."
        )
        raise UnsupportedTrainerError(msg)
    for reason in _reasons(trainer):
        raise UnsupportedTrainerError(reason)


def _reasons(trainer: Any) -> list[str]:
    args, accelerator = trainer.args, trainer.accelerator
    reasons = []
    if hooks.is_installed(trainer):
        reasons.append("This trainer is inside a Guard already; leave that block first.")
    reasons += [
        f"{name} was set on the trainer object, where it stands in front of the guard's; "
        f"override it in a subclass of {type(trainer).__name__} instead."
        for name in hooks.INTERCEPTED
        if name in vars(trainer)
    ]
    if getattr(args, "auto_find_batch_size", False):
        reasons.append(
            "auto_find_batch_size=True restarts from step 0 with another effective batch size "
            "while weights stay changed; set auto_find_batch_size=False and let oomguard recover."
        )
    if getattr(trainer, "is_deepspeed_enabled", False):
        reasons.append(
            "DeepSpeed steps the optimizer inside backward, so a failed step cannot be undone; "
            "train without args.deepspeed."
        )
    if getattr(trainer, "is_fsdp_enabled", False):
        reasons.append("FSDP shards weights over processes; train without args.fsdp.")
    if trl_losses.is_unknown(trainer):
        reasons.append(
            f"{type(trainer).__name__} is one of TRL {version('trl')}, whose sampling and loss are "
            "not known here; upgrade trl, which the README's versions tell."
        )
    optim = optim_name(args)
    if "lomo" in optim or optim.endswith("_layerwise"):
        reasons.append(
            f"optim={optim!r} updates weights inside backward, so a failed backward cannot be "
            "undone; choose another optim, for example 'paged_adamw_8bit'."
        )
    processes = max(args.world_size, accelerator.num_processes)
    if processes > 1:
        reasons.append(
            f"{processes} processes train together. If one recovers alone the others hang or the "
            "gradients are wrong, and agreeing on a recovery is not supported; use one process."
        )
    if args.n_gpu > 1:
        reasons.append(
            f"{args.n_gpu} GPUs under DataParallel; make one visible (CUDA_VISIBLE_DEVICES=0) or "
            "load the model with a device_map."
        )
    return reasons
