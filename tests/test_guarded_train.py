"""Trainings of a supervised script: where they go on after a death. A life here is a call."""

from __future__ import annotations

import functools
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
from peft import LoraConfig
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

import oomguard
from oomguard.guarded_train import GuardedTrainings
from oomguard.journal import Journal
from oomguard.report import Report
from oomguard.testing import VirtualCard
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

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


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins a new life of the process: from here on, its trainings are watched."""
    folder = tmp_path / "journal"
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


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    trainer = make(tmp_path_factory.mktemp("twin"))
    trainer.train()
    return tiny.weights(trainer)


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


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_in_a_checkpoint_from_which_nothing_is_lost(
    number: signal.Signals,
    error: type[BaseException],
    tmp_path: Path,
    life: Any,
    twin: dict[str, torch.Tensor],
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    life()
    trainer = make(tmp_path, Event(2, functools.partial(signal.raise_signal, number)))
    with pytest.raises(error) as raised:
        trainer.train()
    if error is SystemExit:
        assert raised.value.args == (143,)
    assert max(path.name for path in tmp_path.glob("checkpoint-*")) == "checkpoint-3"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    life()
    trainer = make(tmp_path)
    steps_made(trainer)
    trainer.train()
    assert trainer.made == [4, 5, 6]
    assert tiny.largest_difference(tiny.weights(trainer), twin) == 0


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, life: Any) -> None:
    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    life()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Event(1, press_twice)).train()
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_signal_handler_of_the_scripts_own_stays(tmp_path: Path, life: Any) -> None:
    seen: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        life()
        trainer = make(tmp_path, Event(1, lambda: signal.raise_signal(signal.SIGTERM)), max_steps=2)
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, former)
    assert seen == [signal.SIGTERM]
    assert trainer.state.global_step == 2
