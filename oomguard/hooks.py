"""Every point at which a Trainer is intercepted."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

from transformers import Trainer

from oomguard.feed import Feed
from oomguard.levers import trl_losses
from oomguard.optimizer_step import AtomicStep
from oomguard.retry import AllocationRetry, RetriedScalar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from oomguard.rollout_step import RolloutTransaction
    from oomguard.step import StepTransaction


class Hooks:
    """What the intercepted methods work with, and what they have put on other objects."""

    def __init__(self, trainer: Any, transaction: StepTransaction) -> None:
        """Take the trainer and the transaction that its steps run in."""
        self.transaction = transaction
        self.feed = Feed(transaction.make_room)
        self.atomic_step = AtomicStep(transaction.make_room)
        self.setup = ExitStack()
        self.running = False  # inside training_step
        self.train_output: Any = None
        self._trainer = trainer
        self._undo: list[Callable[[], None]] = []
        self._source: Iterator[Any] | None = None
        self._batches: Iterator[Any] = iter(())
        self.loss_class = cast(
            "type[RetriedScalar]",
            type("RetriedScalar", (RetriedScalar,), {"make_room": transaction.make_room}),
        )

    def batches(self, epoch_iterator: Iterator[Any]) -> Iterator[Any]:
        """The epoch's batches made safe; one and the same iterator per epoch."""
        if epoch_iterator is not self._source:
            self._source = epoch_iterator
            self._batches = self.feed.iterate(epoch_iterator)
            self._intercept(self._trainer.accelerator, "clip_grad_norm_", self._clip)
            self._intercept(self._trainer.optimizer, "step", self._step)
        return self._batches

    def protect(self, phase: str, action: Callable[[], Any], *, spill: bool = False) -> Any:
        """`action()`, repeating single operations that run out of memory."""
        self.transaction.phase = phase
        with AllocationRetry(self.transaction.make_room, spill=spill):
            result = action()
        self.transaction.phase = "bookkeeping"
        return result

    def _clip(self, clip: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.protect("clip", functools.partial(clip, *args, **kwargs), spill=True)

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.transaction.phase = "optimizer"
        inner = self._trainer.optimizer
        result = self.atomic_step(
            getattr(inner, "optimizer", inner), functools.partial(step, *args, **kwargs)
        )
        self.transaction.phase = "bookkeeping"
        return result

    def _intercept(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Put `wrapper(original, ...)` in the place of a method of one object."""
        original = getattr(owner, name)
        if getattr(original, "_oomguard", False):
            return
        own = vars(owner).get(name)

        # `wraps` carries over the mark by which lr_scheduler knows the step it has wrapped.
        @functools.wraps(original)
        def intercepted(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        intercepted._oomguard = True  # type: ignore[attr-defined]
        setattr(owner, name, intercepted)
        restore = functools.partial(setattr, owner, name, own)
        self._undo.append(restore if own is not None else functools.partial(delattr, owner, name))

    def remove(self) -> None:
        """Leave loader, accelerator, optimizer and loss as they were."""
        self.setup.close()
        self.feed.detach()
        while self._undo:
            self._undo.pop()()
        self.loss_class.make_room = None
        running_loss = getattr(self._trainer, "_tr_loss", None)
        if isinstance(running_loss, RetriedScalar):
            self._trainer._tr_loss = running_loss.plain()
        self._source = None


class GuardedTrainer(Trainer):
    """Stands in front of the trainer's own class while a guard is installed."""

    _oomguard: Hooks

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what happens before the first step is protected operation by operation."""
        hooks = self._oomguard
        hooks.transaction.phase = "setup"
        with hooks.setup:
            hooks.setup.enter_context(AllocationRetry(hooks.transaction.make_room))
            hooks.train_output = super().train(*args, **kwargs)
            return hooks.train_output

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; `eval_on_start` does so before the first step."""
        self._oomguard.setup.close()
        return super().evaluate(*args, **kwargs)

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
        original = super().training_step
        hooks.running = True
        try:
            loss = hooks.transaction.run(lambda batch, num_items: original(model, batch, num_items))
        finally:
            hooks.running = False
        hooks.transaction.phase = "bookkeeping"
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


def install(trainer: Any, transaction: StepTransaction) -> Hooks:
    """Put a guarded class in front of the trainer's."""
    own: Any = type(trainer)
    front = GuardedRollouts if trl_losses.generates(trainer) else GuardedTrainer
    guarded = type(own.__name__, (front, own), {"__doc__": own.__doc__})
    guarded.__module__, guarded.__qualname__ = own.__module__, own.__qualname__
    trainer._oomguard = hooks = Hooks(trainer, transaction)
    trainer.__class__ = guarded
    return hooks


def is_installed(trainer: Any) -> bool:
    """Whether a guard is on this trainer."""
    return isinstance(trainer, GuardedTrainer)


def own_compute_loss(trainer: Any) -> Callable[..., Any]:
    """The trainer's own `compute_loss`, past the guard's."""
    return functools.partial(type(trainer).compute_loss, trainer)


def uninstall(trainer: Any) -> None:
    """Make the trainer its own class again."""
    trainer._oomguard.remove()
    del trainer._oomguard
    trainer.__class__ = type(trainer).__bases__[1]
