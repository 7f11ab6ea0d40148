"""Every `Trainer.train` of a supervised script: guarded, reported, and resumed after a death."""

from __future__ import annotations

import inspect
import logging
import signal
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from oomguard import hooks
from oomguard.errors import UnsupportedTrainerError
from oomguard.guard import Guard
from oomguard.journal import TrainCall
from oomguard.levers.finished import load_finished, load_optimizer
from oomguard.resumption import last_checkpoint, written

if TYPE_CHECKING:
    from collections.abc import Callable

    from oomguard.journal import Journal
    from oomguard.resumption import Checkpoint

logger = logging.getLogger("oomguard")


class GuardedTrainings:
    """Stands in for `Trainer.train` in one process."""

    def __init__(self, journal: Journal, ladder: str, *, resume: bool) -> None:
        """Take what the command line says; `resume`: also from checkpoints of an earlier run."""
        self._journal = journal
        self._ladder = ladder
        self._resume = resume
        self._before = journal.read().calls
        self._count: Counter[str] = Counter()
        # Where the trainers stand whose finished training was not made again.
        self._loaded: WeakKeyDictionary[Any, Checkpoint] = WeakKeyDictionary()

    def train(self, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        """`original(trainer, ...)` under the guard, from where an earlier process died."""
        bound = inspect.signature(original).bind(trainer, *args, **kwargs)
        if bound.arguments.get("trial") is not None:  # of a search that tries many
            return self._guarded(trainer, lambda: original(*bound.args, **bound.kwargs))
        call = self._begin(trainer, bound.arguments.get("resume_from_checkpoint"))
        checkpoint = last_checkpoint(call.output_dir, call.stale)
        if checkpoint is not None:
            reached = call.output is not None and call.output["global_step"] == checkpoint.step
            if reached or checkpoint.ended:
                result = load_finished(trainer, checkpoint, call.output)
                self._journal.finish(call.key, result._asdict())
                self._loaded[trainer] = checkpoint
                return result
            bound.arguments["resume_from_checkpoint"] = str(checkpoint.path)
        elif call.key in self._before:
            # What the script asks for may be `True`, and the last folder half a checkpoint by now.
            bound.arguments["resume_from_checkpoint"] = call.resume
        loaded = self._loaded.pop(trainer, None)
        if loaded is not None and bound.arguments.get("resume_from_checkpoint") is None:
            load_optimizer(trainer, loaded)
        with StopRequest() as stop, Watch(trainer, self._journal, stop):
            result = self._guarded(trainer, lambda: original(*bound.args, **bound.kwargs))
        self._journal.finish(call.key, result._asdict())
        return result

    def _begin(self, trainer: Any, resume: str | bool | None) -> TrainCall:
        folder = str(Path(trainer.args.output_dir).resolve())
        key = f"{folder}#{self._count[folder]}"
        # Checkpoints of an earlier run are those of the first training that writes there.
        own = self._resume and not self._count[folder]
        self._count[folder] += 1
        call = self._before.get(key) or TrainCall(
            key=key,
            output_dir=folder,
            stale={} if own else written(folder),
            resume=get_last_checkpoint(folder) if resume is True else resume or None,
            saves=_saves(trainer.args),
        )
        self._journal.begin(call)
        return call

    def _guarded(self, trainer: Any, action: Callable[[], Any]) -> Any:
        if hooks.is_installed(trainer):  # by the script itself
            return action()
        try:
            guard = Guard(trainer, ladder=self._ladder)
        except UnsupportedTrainerError as error:
            logger.warning("this training is not guarded against out-of-memory: %s", str(error))
            return action()
        with guard:
            return hooks.train(trainer, action)


class StopRequest:
    """Remembers SIGTERM and Ctrl-C while a training runs; handlers of the script's own stay.

    Attributes:
        number: The signal that asked; `None` before one has.
    """

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.number: int | None = None
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        """Take the signals, where Python's own way of handling them is in force."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                former = signal.getsignal(number)
                if former in (signal.SIG_DFL, signal.default_int_handler):
                    signal.signal(number, self._ask)
                    self._undo.callback(signal.signal, number, former)
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the signals back."""
        self._undo.close()

    def error(self) -> BaseException:
        """What a script gets that was asked to end, now that its training is saved."""
        if self.number == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + signal.SIGTERM)

    def _ask(self, number: int, frame: object) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is None:
            name = signal.Signals(number).name
            logger.warning("%s: saving a checkpoint at the end of this step, then ending", name)
            self.number = number


class Watch(TrainerCallback):
    """Reports every step, and ends the training after the step in which that was asked."""

    def __init__(self, trainer: Any, journal: Journal, stop: StopRequest) -> None:
        """Watch `trainer` for the length of a `with` block."""
        self._trainer = trainer
        self._journal = journal
        self._stop = stop

    def __enter__(self) -> Self:
        """Come after all other callbacks."""
        self._trainer.add_callback(self)
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the trainer's callbacks as they were."""
        self._trainer.remove_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step; where an end was asked, save, and leave out a long evaluation."""
        self._journal.step(state.global_step)
        if self._stop.number is not None:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End where that was asked, now that a checkpoint is written."""
        if self._stop.number is not None:
            raise self._stop.error()


def _saves(args: Any) -> str:
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    steps = f", save_steps={args.save_steps}" if strategy == "steps" else ""
    only_model = ", save_only_model=True" if args.save_only_model else ""
    return f"save_strategy={strategy!r}{steps}{only_model}"
