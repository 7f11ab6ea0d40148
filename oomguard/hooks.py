"""Every point at which a Trainer is intercepted."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from oomguard import saving
from oomguard.levers import tokens, trl_losses
from oomguard.protection import Course, Protection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from oomguard.outside import Outside
    from oomguard.rollout_step import RolloutTransaction
    from oomguard.step import StepTransaction


class GuardedTrainer(Trainer):
    """Stands in front of the trainer's own class while a guard is installed."""

    _oomguard: Protection

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train under protection."""
        hooks, original = self._oomguard, super().train
        hooks.course.start(bool(resume_from_checkpoint))
        return hooks.train(functools.partial(original, resume_from_checkpoint, *args, **kwargs))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; `eval_on_start` does so before the first step."""
        self._oomguard.setup.close()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; a callback may do so before the first step."""
        self._oomguard.setup.close()
        return super().predict(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict, moving what piles up to the host when memory runs out."""
        run = functools.partial(super().evaluation_loop, dataloader, description, *args, **kwargs)
        phase = "predict" if description == "Prediction" else "evaluate"
        return self._oomguard.evaluation.loop(phase, run)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, in passes when memory runs out."""
        original = super().prediction_step
        return self._oomguard.evaluation.step(
            lambda batch: original(model, batch, *args, **kwargs), inputs
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        hooks = self._oomguard
        write = functools.partial(super()._save_checkpoint, model, trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial), name)
        with ExitStack() as stack:
            if saving.can_stage(self):
                stack.enter_context(hooks.staging.checkpoint(folder, self))
            stack.enter_context(hooks.outside.watch("save", spill=True))
            write()

    def save_model(self, output_dir: Any = None, *args: Any, **kwargs: Any) -> None:
        """Save the weights, by way of the host when memory runs out."""
        self._oomguard.save(super().save_model, output_dir, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._oomguard.save(super()._save_optimizer_and_scheduler, output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        self._oomguard.save(super()._save_scaler, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self._oomguard.save(super()._save_rng_state, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._oomguard.course.resume(Path(resume_from_checkpoint))
        self._oomguard.load(super()._load_from_checkpoint, resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._oomguard.load(super()._load_optimizer_and_scheduler, checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        self._oomguard.load(super()._load_scaler, checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self._oomguard.load(super()._load_rng_state, checkpoint)

    def _load_best_model(self) -> None:
        self._oomguard.load(super()._load_best_model)

    def get_train_dataloader(self) -> Any:
        """The trainer's own loader, made to survive an out-of-memory while it is read."""
        return self._oomguard.feed.attach(super().get_train_dataloader())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Begin the transaction of the next optimizer step."""
        hooks = self._oomguard
        hooks.setup.close()
        original = super().get_batch_samples
        return hooks.transaction.begin(
            hooks.batches(epoch_iterator),
            num_batches,
            lambda batches, count: original(batches, count, device),
        )

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run one batch of the window, redoing the window when memory runs out."""
        hooks = self._oomguard
        original, begun = super().training_step, hooks.transaction.begun()
        hooks.running = True
        try:
            loss = hooks.transaction.run(lambda batch, num_items: original(model, batch, num_items))
        finally:
            hooks.running = False
        hooks.transaction.phase = "bookkeeping"
        if tokens.counted_in_the_loop():
            for old, new in zip(begun, hooks.transaction.begun(), strict=False):
                hooks.protect("bookkeeping", functools.partial(tokens.recount, self, old, new))
        return hooks.loss_class.of(loss)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss, times the share of the pass it is computed on."""
        hooks = self._oomguard
        if not hooks.running:
            return super().compute_loss(*args, **kwargs)
        hooks.transaction.phase = "forward"
        loss = hooks.transaction.weighted(super().compute_loss(*args, **kwargs))
        hooks.transaction.phase = "backward"
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Protected bookkeeping between two batches."""
        original, hooks = super().floating_point_ops, self._oomguard
        return sum(
            sign * int(hooks.protect("bookkeeping", functools.partial(original, batch)))
            for batch, sign in hooks.transaction.to_count("flos", inputs)
        )

    def _track_num_input_tokens(self, inputs: Any) -> None:
        original, hooks = super()._track_num_input_tokens, self._oomguard
        for batch, sign in hooks.transaction.to_count("tokens", inputs):
            before = self.state.num_input_tokens_seen
            hooks.protect("bookkeeping", functools.partial(original, batch))
            seen = self.state.num_input_tokens_seen - before
            self.state.num_input_tokens_seen = before + sign * seen


class GuardedRollouts(GuardedTrainer):
    """Stands in front of trainers that sample what they train on inside `training_step`."""

    @property
    def _rollout(self) -> RolloutTransaction:
        return cast("RolloutTransaction", self._oomguard.transaction)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Completions are sampled once for each step, however often it is made again."""
        prepare = super()._prepare_inputs
        if not self._oomguard.running:
            return prepare(generation_batch)
        return self._rollout.prepare(functools.partial(prepare, generation_batch))

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        original: Any = super()  # of the trainer's class: transformers has none
        if self._oomguard.running:
            self._rollout.sampled()
        return original._calculate_rewards(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss in passes: what is split is what the trainer has sampled."""
        compute = super().compute_loss
        if not self._oomguard.running:
            return compute(model, inputs, *args, **kwargs)
        return self._rollout.in_passes(inputs, lambda part: compute(model, part, *args, **kwargs))


INTERCEPTED = tuple(
    name
    for front in (GuardedTrainer, GuardedRollouts)
    for name, value in vars(front).items()
    if callable(value)
)
"""Names that a trainer object must not have itself: they would stand in front of its class."""


def install(
    trainer: Any, transaction: StepTransaction, outside: Outside, course: Course
) -> Protection:
    """Put a guarded class in front of the trainer's."""
    own: Any = type(trainer)
    front = GuardedRollouts if trl_losses.generates(trainer) else GuardedTrainer
    guarded = type(own.__name__, (front, own), {"__doc__": own.__doc__})
    guarded.__module__, guarded.__qualname__ = own.__module__, own.__qualname__
    trainer._oomguard = hooks = Protection(trainer, transaction, outside, course)
    trainer.__class__ = guarded
    return hooks


def is_installed(trainer: Any) -> bool:
    """Whether a guard is on this trainer."""
    return isinstance(trainer, GuardedTrainer)


def train(trainer: Any, action: Callable[[], Any]) -> Any:
    """`action()` in the place of `trainer.train()`, for callers that are inside that already."""
    return trainer._oomguard.train(action)


def own_compute_loss(trainer: Any) -> Callable[..., Any]:
    """The trainer's own `compute_loss`, past the guard's."""
    return functools.partial(type(trainer).compute_loss, trainer)


def uninstall(trainer: Any) -> None:
    """Make the trainer its own class again."""
    trainer._oomguard.remove()
    del trainer._oomguard
    trainer.__class__ = type(trainer).__bases__[1]
