"""Lives of a supervised script, one after the other in this process, and trainings that die."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from transformers import Trainer, TrainerCallback

from oomguard.guarded_train import GuardedTrainings
from oomguard.journal import Journal
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest
    import torch

ORIGINAL = Trainer.train


class Event(TrainerCallback):
    """Does something at the start of a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


class DeathError(Exception):
    """Stands for the end of the process."""


def die() -> None:
    raise DeathError


def lives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Journal]:
    """What begins a new life of the process: from there on, its trainings are watched."""
    folder.mkdir()

    def begin(*, resume: bool = False, journal: Path = folder) -> Journal:
        Journal(journal).new_life()
        trainings = GuardedTrainings(Journal(journal), "default", resume=resume)

        @functools.wraps(ORIGINAL)
        def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            return trainings.train(ORIGINAL, trainer, *args, **kwargs)

        monkeypatch.setattr(Trainer, "train", train)
        return Journal(journal)

    return begin


def make(folder: Path, *events: Event, **changes: Any) -> Any:
    # Six steps are one and a half epochs; dropout shows whether random numbers go on.
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **changes}
    trainer: Any = tiny.sft_trainer(folder, lora=lora, **values)
    for event in events:
        trainer.add_callback(event)
    return trainer


def steps_made(trainer: Any) -> None:
    """From now on, `trainer.made` lists the optimizer steps."""
    made: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            made.append(state.global_step)

    trainer.add_callback(Count())
    trainer.made = made


def undisturbed(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the training that does not die."""
    trainer = make(folder)
    trainer.train()
    return tiny.weights(trainer)
