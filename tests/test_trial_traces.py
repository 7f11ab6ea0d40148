"""Trials leave no trace, whatever is tried and wherever they die."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTTrainer

from oomguard.errors import ConfigurationError
from oomguard.levers.live import read_plan
from oomguard.trial import refusal, run_trial
from tests import kinds, preferences, tiny, traces, twin
from tests.trying import CHANGES, ROOMY, changed, sft, short, tried

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


datasets.disable_progress_bars()

SAMPLED = 101  # of so many allocations one fails in the default run
PARTS = 4  # of the exhaustive test, so that all cores take part


class Spy(TrainerCallback):
    """A user's callback, which a trial must not call."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda *_, **__: self.calls.append(name)


@pytest.mark.parametrize("name", CHANGES)
def test_a_trial_of_a_plan_leaves_no_trace(tmp_path: Path, name: str) -> None:
    trainer = sft(tmp_path)
    before = traces.of(trainer, tmp_path)
    trial, _ = tried(trainer, changed(trainer, name))
    assert trial.fits
    assert traces.differences(before, traces.of(trainer, tmp_path)) == []


def given_an_optimizer(folder: Path) -> Any:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    arguments = {"optimizers": (optimizer, schedule)}
    return sft(folder, model=model, lora=None, trainer_arguments=arguments, eval_strategy="no")


class Augmented(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows that are cut at random, by a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(7)
        self.rows = kinds.encoded()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        keep = int(self.generator.integers(8, 48))
        return {key: values[:keep] for key, values in self.rows[index].items()}


def augmented(folder: Path) -> Any:
    return kinds.make(folder, rows=Augmented(), save_strategy="steps")


@pytest.mark.parametrize(
    "build",
    [
        given_an_optimizer,
        augmented,
        kinds.masked_lm,
        kinds.seq2seq,
        partial(preferences.dpo, reference="model"),
        partial(sft, packing=True, activation_checkpointing=True),
        partial(sft, neftune_noise_alpha=5.0, optim="adamw_8bit", bf16=True),
    ],
    ids=["optimizer", "data", "masked", "seq2seq", "dpo", "packed", "neftune"],
)
def test_a_trial_of_any_trainer_leaves_no_trace(
    tmp_path: Path, build: Callable[[Path], Any]
) -> None:
    trainer = build(tmp_path)
    before = traces.of(trainer, tmp_path)
    trial, _ = tried(trainer)
    assert trial.fits
    assert traces.differences(before, traces.of(trainer, tmp_path)) == []


def phases_of_deaths(folder: Path, pick: slice) -> set[str | None]:
    """Where trials died whose allocations `pick` of all failed; fails where one left a trace."""
    trainer = short(folder)
    _, allocations = tried(trainer)
    before = traces.of(trainer, folder)
    phases = set()
    for number in range(1, allocations + 1)[pick]:
        trial, _ = tried(trainer, fail_at=number)
        assert not trial.fits
        assert str(trial.error).startswith("CUDA out of memory")
        phases.add(trial.phase)
        found = traces.differences(before, traces.of(trainer, folder))
        assert found == [], f"allocation {number} of {allocations} failed in {trial.phase}"
    return phases


def test_a_trial_that_dies_leaves_no_trace(tmp_path: Path) -> None:
    assert phases_of_deaths(tmp_path, slice(0, None, SAMPLED)) >= {"setup", "step"}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_trial_that_dies_at_any_allocation_leaves_no_trace(tmp_path: Path, part: int) -> None:
    phases = phases_of_deaths(tmp_path, slice(part, None, PARTS))
    assert phases >= {"step", "evaluate"}


def test_memory_that_a_trial_gave_away_is_asked_for_until_it_is_there(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    plan = changed(trainer, "half the rank")
    _, allocations = tried(trainer, plan)
    before = traces.of(trainer, tmp_path)
    trial, _ = tried(trainer, plan, fail_at=[allocations, allocations + 1])
    assert trial.fits, "the last allocations are those of putting the adapters back"
    assert traces.differences(before, traces.of(trainer, tmp_path)) == []


@pytest.mark.parametrize("card", [{"capacity_bytes": ROOMY}, {"fail_at": 700}], ids=["ran", "died"])
def test_a_training_after_a_trial_is_the_training_without_one(
    tmp_path: Path, card: dict[str, Any]
) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    plain = twin.run(partial(twin.sft, lora=lora))

    def after_a_trial(folder: Path) -> Any:
        trainer: Any = twin.sft(folder, lora=lora)
        tried(trainer, changed(trainer, "checkpointing"), **card)
        return trainer

    assert twin.differences(twin.run(after_a_trial), plain) == {}


def test_a_trial_calls_no_callback_and_no_metrics_of_the_user(tmp_path: Path) -> None:
    spy = Spy()
    measured: list[Any] = []
    arguments = {
        "eval_dataset": tiny.text_dataset(6),
        "callbacks": [spy],
        "compute_metrics": measured.append,
    }
    trainer = sft(tmp_path, trainer_arguments=arguments)
    spy.calls.clear()
    assert tried(trainer)[0].fits
    assert (spy.calls, measured) == ([], [])


def test_rows_that_cannot_be_cut_are_said_to_be(tmp_path: Path) -> None:
    trainer = kinds.seq2seq(tmp_path)
    before = traces.of(trainer, tmp_path)
    with pytest.raises(ConfigurationError, match="max_length cannot be lowered to 8"):
        tried(trainer, replace(read_plan(trainer), max_length=8))
    assert traces.differences(before, traces.of(trainer, tmp_path)) == []


def test_errors_other_than_out_of_memory_go_up_and_leave_no_trace(tmp_path: Path) -> None:
    class Broken(SFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            super().training_step(*args, **kwargs)
            msg = "the user's own mistake"
            raise ConfigurationError(msg)

    trainer = sft(tmp_path, trainer_class=Broken)
    before = traces.of(trainer, tmp_path)
    with pytest.raises(ConfigurationError, match="own mistake"):
        tried(trainer)
    assert traces.differences(before, traces.of(trainer, tmp_path)) == []


@pytest.mark.gpu
def test_on_a_gpu_a_trial_leaves_no_trace_and_a_small_card_kills_it(tmp_path: Path) -> None:
    trainer = sft(tmp_path, use_cpu=False, dataset=tiny.text_dataset(64))
    plan = read_plan(trainer)
    assert refusal(trainer, plan) is None
    before = traces.of(trainer, tmp_path)
    ran = run_trial(trainer, plan)
    assert ran.fits
    assert ran.device_bytes is not None
    assert ran.device_bytes > ran.peak_allocated_bytes
    assert traces.differences(before, traces.of(trainer, tmp_path)) == []
    outside = ran.device_bytes - (ran.peak_reserved_bytes or 0)
    died = run_trial(trainer, plan, card_bytes=outside + ran.peak_allocated_bytes // 2)
    assert not died.fits
    assert traces.differences(before, traces.of(trainer, tmp_path)) == []
