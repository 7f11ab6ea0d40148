"""A Trainer that was intercepted is put back, and shows callbacks nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

import oomguard
from oomguard.ladder import Ladder
from oomguard.rungs import CheckpointActivations, SplitBatch
from oomguard.testing import VirtualCard
from tests.kinds import HALF, RECOMPUTED, Neighbour, fit, is_left_alone, make
from tests.tiny import largest_difference, weights

if TYPE_CHECKING:
    from pathlib import Path


def test_train_may_be_called_twice_in_one_guard_and_keeps_its_plan(tmp_path: Path) -> None:
    trainer, twin = make(tmp_path), make(tmp_path)
    with VirtualCard("1 GiB") as card:
        card.track(trainer.model)
        trainer.add_callback(Neighbour(card, 2, HALF, "on_step_begin"))
        with oomguard.Guard(trainer, ladder=Ladder(SplitBatch())) as guard:
            trainer.train()
            assert guard.report.status == "running"
            trainer.train()
    twin.train()
    twin.train()
    assert [recovery.rung for recovery in guard.report.recoveries] == ["SplitBatch"]
    assert largest_difference(weights(trainer), weights(twin)) < 1e-6
    assert is_left_alone(trainer)


def test_fit_twice_and_plain_training_after_it_are_three_plain_trainings(tmp_path: Path) -> None:
    trainer, twin = make(tmp_path), make(tmp_path)
    ladder = Ladder(CheckpointActivations())
    first, second = (fit(trainer, leave=RECOMPUTED, ladder=ladder) for _ in range(2))
    assert is_left_alone(trainer)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW), "see Hooks._step"
    trainer.train()
    for _ in range(3):
        twin.train()
    assert [recovery.rung for recovery in first.recoveries] == ["CheckpointActivations"]
    assert second.initial_plan.gradient_checkpointing  # it stays on, and is enough
    assert second.recoveries == []
    assert largest_difference(weights(trainer), weights(twin)) == 0.0


class Recorder(TrainerCallback):
    """Records every event and the step it came in."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda args, state, *_, **__: self.events.append((name, state.global_step))
        return super().__getattribute__(name)


def test_callbacks_see_a_recovered_run_as_they_see_a_plain_one(tmp_path: Path) -> None:
    trainer, twin = make(tmp_path, logging_steps=1), make(tmp_path, logging_steps=1)
    seen, expected = Recorder(), Recorder()
    trainer.add_callback(seen)
    twin.add_callback(expected)
    twin.train()
    before = list(trainer.callback_handler.callbacks)
    assert len(fit(trainer).recoveries) == 2
    assert seen.events == expected.events
    assert trainer.callback_handler.callbacks == before
