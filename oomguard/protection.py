"""What the intercepted methods of one trainer work with."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel

from oomguard import saving
from oomguard.callbacks import name_callback
from oomguard.evaluation import Evaluation
from oomguard.feed import Feed
from oomguard.levers.adapter import inner_optimizer
from oomguard.levers.paging import page_again
from oomguard.optimizer_step import AtomicStep
from oomguard.retry import AllocationRetry, RetriedScalar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oomguard.oom import OOMFacts
    from oomguard.outside import Outside
    from oomguard.step import StepTransaction


@dataclass(frozen=True)
class Course:
    """On which plan a training begins.

    Attributes:
        start: Called before it; with whether it resumes.
        resume: Called with the folder of the checkpoint, before that is loaded.
    """

    start: Callable[[bool], None]
    resume: Callable[[Path], None]


class Protection:
    """What the intercepted methods work with, and what they have put on other objects."""

    def __init__(
        self, trainer: Any, transaction: StepTransaction, outside: Outside, course: Course
    ) -> None:
        """Take the trainer, the transaction of its steps, what is around them, and the start."""
        self.transaction = transaction
        self.outside = outside
        self.course = course
        self.evaluation = Evaluation(trainer, outside)
        self.staging = saving.Staging()
        self.feed = Feed(transaction.make_room)
        self.atomic_step = AtomicStep(transaction.make_room, transaction.relieve)
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
        self._intercept(trainer.callback_handler, "call_event", name_callback)
        self._lasting = len(self._undo)  # what stays from one training to the next

    def batches(self, epoch_iterator: Iterator[Any]) -> Iterator[Any]:
        """The epoch's batches made safe; one and the same iterator per epoch."""
        if epoch_iterator is not self._source:
            self._source = epoch_iterator
            self._batches = self.feed.iterate(epoch_iterator)
            page_again(inner_optimizer(self._trainer))
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

    def train(self, train: Callable[[], Any]) -> Any:
        """`train()`; what happens before the first step is protected operation by operation."""
        self.restore()  # a second training prepares the optimizer of the first one again
        self.transaction.phase = "setup"
        saving.clean(Path(self._trainer._get_output_dir(None)))
        with self.setup:
            self.setup.enter_context(AllocationRetry(self.make_room))
            self.train_output = train()
            return self.train_output

    def make_room(self, facts: OOMFacts, failures: int) -> None:
        """Room before the first step, where a checkpoint may be loaded."""
        owner = self.transaction if self.outside.phase is None else self.outside
        owner.make_room(facts, failures)

    def save(self, write: Callable[..., Any], folder: Any, *args: Any, **kwargs: Any) -> None:
        """`write(folder, ...)`, to where the parts of a checkpoint wait for each other."""
        write = functools.partial(write, self.staging.redirect(folder), *args, **kwargs)
        self.outside.protect("save", write, spill=True)

    def load(self, read: Callable[..., Any], *args: Any) -> None:
        """`read(...)`, a part of a checkpoint: what it allocates stays on the device."""
        model = self._trainer.model
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        before = len(self._undo)
        if isinstance(model, PeftModel):
            self._intercept(model, "load_adapter", _through_cpu)
        try:
            self.outside.protect("load", functools.partial(read, *args))
        finally:
            self._undo_to(before)
        for name, p in model.named_parameters():
            # PEFT loads adapters in 16 bits as float32 ones, which train otherwise.
            if p.dtype != dtypes.get(name, p.dtype):
                p.data = p.data.to(dtypes[name])

    def _clip(self, clip: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.protect("clip", functools.partial(clip, *args, **kwargs), spill=True)

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.transaction.phase = "optimizer"
        result = self.atomic_step(
            functools.partial(inner_optimizer, self._trainer),
            functools.partial(step, *args, **kwargs),
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

    def _undo_to(self, count: int) -> None:
        while len(self._undo) > count:
            self._undo.pop()()

    def restore(self) -> None:
        """Leave loader, accelerator and optimizer as they were; the next epoch begins anew."""
        self.feed.detach()
        self._undo_to(self._lasting)
        self._source = None

    def remove(self) -> None:
        """Leave all that has been intercepted as it was, and the loss."""
        self.setup.close()
        self.restore()
        self._undo_to(0)
        self.loss_class.make_room = None
        running_loss = getattr(self._trainer, "_tr_loss", None)
        if isinstance(running_loss, RetriedScalar):
            self._trainer._tr_loss = running_loss.plain()


def _through_cpu(load_adapter: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PEFT would read the file to the device, beside the weights that it is copied to."""
    return load_adapter(*args, **{"torch_device": "cpu", **kwargs})
