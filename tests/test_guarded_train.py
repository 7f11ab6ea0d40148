"""Trainings of a supervised script: where they go on after a death. A life here is a call."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from transformers import TrainerCallback
from trl import SFTTrainer

import oomguard
from oomguard.report import Report
from oomguard.testing import VirtualCard
from tests import tiny
from tests.lives import DeathError, Event, die, lives, make, steps_made, undisturbed

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lives(tmp_path / "journal", monkeypatch)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return undisturbed(tmp_path_factory.mktemp("twin"))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_training_that_died_ends_with_the_weights_of_its_twin(
    step: int, tmp_path: Path, life: Any, twin: dict[str, torch.Tensor]
) -> None:
    life()
    with pytest.raises(DeathError):
        make(tmp_path, Event(step, die)).train()
    journal = life()
    trainer = make(tmp_path)
    steps_made(trainer)
    trainer.train()
    assert trainer.made[0] == step // 2 * 2 + 1
    assert tiny.largest_difference(tiny.weights(trainer), twin) == 0
    assert journal.read().step == 6


def test_the_first_life_leaves_checkpoints_of_another_run_alone(
    tmp_path: Path, life: Any, twin: dict[str, torch.Tensor]
) -> None:
    make(tmp_path, learning_rate=1.0).train()
    life()
    with pytest.raises(DeathError):
        make(tmp_path, Event(1, die)).train()
    life()
    trainer = make(tmp_path)
    steps_made(trainer)
    trainer.train()
    assert trainer.made == [1, 2, 3, 4, 5, 6]
    assert tiny.largest_difference(tiny.weights(trainer), twin) == 0


def test_half_a_checkpoint_is_not_resumed_from(
    tmp_path: Path, life: Any, twin: dict[str, torch.Tensor]
) -> None:
    life()
    with pytest.raises(DeathError):
        make(tmp_path, Event(5, die)).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    life()
    trainer = make(tmp_path)
    steps_made(trainer)
    trainer.train()
    assert trainer.made[0] == 3
    assert tiny.largest_difference(tiny.weights(trainer), twin) == 0


def test_the_checkpoint_that_the_script_asks_for_is_that_of_its_first_life(
    tmp_path: Path, life: Any
) -> None:
    with pytest.raises(DeathError):
        make(tmp_path, Event(3, die)).train()
    life()
    with pytest.raises(DeathError):
        make(tmp_path, Event(3, die)).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4").mkdir()  # half of one; `True` would now be this
    life()
    trainer = make(tmp_path)
    steps_made(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.made == [3, 4, 5, 6]


def test_a_finished_training_is_loaded_and_not_made_again(
    tmp_path: Path, life: Any, twin: dict[str, torch.Tensor]
) -> None:
    life()
    output = make(tmp_path / "a").train()
    with pytest.raises(DeathError):
        make(tmp_path / "b", Event(3, die)).train()
    journal = life()
    first = make(tmp_path / "a")
    steps_made(first)
    again = first.train()
    second = make(tmp_path / "b")
    steps_made(second)
    second.train()
    assert (first.made, second.made) == ([], [3, 4, 5, 6])
    assert again == output
    assert first.state.global_step == 6
    assert tiny.largest_difference(tiny.weights(first), twin) == 0
    assert [call.output is not None for call in journal.read().calls.values()] == [True, True]


def test_a_training_that_died_after_its_last_checkpoint_makes_no_step_more(
    tmp_path: Path, life: Any, twin: dict[str, torch.Tensor]
) -> None:
    class DiesAtTheEnd(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            die()

    life()
    trainer = make(tmp_path)
    trainer.add_callback(DiesAtTheEnd())
    with pytest.raises(DeathError):
        trainer.train()
    life()
    trainer = make(tmp_path)
    steps_made(trainer)
    output = trainer.train()
    assert (trainer.made, output.global_step) == ([], 6)
    assert output.training_loss == pytest.approx(6.2, abs=0.1)
    assert tiny.largest_difference(tiny.weights(trainer), twin) == 0


def test_a_finished_training_of_which_nothing_was_kept_is_made_again(
    tmp_path: Path, life: Any, twin: dict[str, torch.Tensor]
) -> None:
    life()
    make(tmp_path).train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    life()
    trainer = make(tmp_path)
    steps_made(trainer)
    trainer.train()
    assert trainer.made == [5, 6]
    assert tiny.largest_difference(tiny.weights(trainer), twin) == 0


@pytest.mark.parametrize("step", [1, 3])
def test_two_trainings_in_one_folder_are_told_apart(step: int, tmp_path: Path, life: Any) -> None:
    life()
    trainer = make(tmp_path)
    trainer.train()
    trainer.train()
    expected = tiny.weights(trainer)
    shutil.rmtree(tmp_path)
    (tmp_path / "journal").mkdir(parents=True)
    life()
    trainer = make(tmp_path)
    trainer.train()
    trainer.add_callback(Event(step, die))
    with pytest.raises(DeathError):
        trainer.train()
    life()
    trainer = make(tmp_path)
    steps_made(trainer)
    trainer.train()
    trainer.train()
    assert trainer.made == list(range(step // 2 * 2 + 1, 7))
    assert tiny.largest_difference(tiny.weights(trainer), expected) == 0


def test_resume_goes_on_from_the_checkpoints_of_an_earlier_run(
    tmp_path: Path, life: Any, twin: dict[str, torch.Tensor]
) -> None:
    life()
    with pytest.raises(DeathError):
        make(tmp_path, Event(3, die)).train()
    other = tmp_path / "other"
    other.mkdir()
    life(resume=True, journal=other)
    trainer = make(tmp_path)
    steps_made(trainer)
    trainer.train()
    assert trainer.made == [3, 4, 5, 6]
    assert tiny.largest_difference(tiny.weights(trainer), twin) == 0


class Announces(SFTTrainer):
    """A train() of its own that calls the Trainer's."""

    announced = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.announced += 1
        return super().train(*args, **kwargs)


class OwnLoop(SFTTrainer):
    """A train() of its own that does not."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        return "its own"


def test_a_train_method_of_the_scripts_own_is_run_once_and_guarded(
    tmp_path: Path, life: Any
) -> None:
    life()
    with VirtualCard(fail_at=900):
        trainer: Any = tiny.sft_trainer(tmp_path, trainer_class=Announces)
        trainer.train()
    assert trainer.announced == 1
    assert len(Report.load(tmp_path / "oomguard.json").recoveries) == 1
    assert type(trainer) is Announces


def test_a_loop_of_the_scripts_own_is_left_alone(tmp_path: Path, life: Any) -> None:
    journal = life()
    trainer: Any = tiny.sft_trainer(tmp_path, trainer_class=OwnLoop)
    assert trainer.train() == "its own"
    assert journal.read().calls == {}


def test_a_script_that_uses_fit_keeps_its_own_ladder_and_is_resumed(
    tmp_path: Path, life: Any, twin: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    life()
    with pytest.raises(DeathError):
        oomguard.fit(make(tmp_path, Event(3, die)), ladder="exact_first")
    life()
    trainer = make(tmp_path)
    steps_made(trainer)
    report = oomguard.fit(trainer, ladder="exact_first")
    assert trainer.made == [3, 4, 5, 6]
    assert report.ladder[1] == "SplitBatch"
    assert "not guarded" not in caplog.text
    assert report.train_output is not None
    assert tiny.largest_difference(tiny.weights(trainer), twin) == 0


def test_a_trainer_that_cannot_be_guarded_trains_with_a_warning(
    tmp_path: Path, life: Any, caplog: pytest.LogCaptureFixture
) -> None:
    life()
    trainer = make(tmp_path, max_steps=1, auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.global_step == 1
    assert "not guarded" in caplog.text
    assert "auto_find_batch_size" in caplog.text
