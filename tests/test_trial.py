"""Trials: what they measure, and what cannot be tried."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING

import datasets
import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer

from oomguard.levers.live import read_plan
from oomguard.levers.longest import has_rows, longest_batch, longest_row
from oomguard.testing import VirtualCard
from oomguard.trial import refusal, run_trial
from tests import tiny
from tests.trying import ROOMY, changed, sft, short, tried

if TYPE_CHECKING:
    from pathlib import Path


datasets.disable_progress_bars()


def test_a_trial_measures_the_peak_of_a_run_in_which_every_batch_is_the_longest(
    tmp_path: Path,
) -> None:
    text = max(tiny.texts(), key=len)
    trainer = sft(tmp_path, dataset=Dataset.from_dict({"text": [text] * 16}), max_steps=2)
    trial, _ = tried(trainer)
    with VirtualCard(ROOMY) as card:
        card.track(trainer.model)
        trainer.train()
    assert trial.pass_tokens == 4 * 96
    assert trial.peak_allocated_bytes == pytest.approx(card.peak_bytes, rel=1e-3)


def test_a_trial_runs_the_longest_rows_however_rare_they_are(tmp_path: Path) -> None:
    texts = [text[:60] for text in tiny.texts()[:40]]
    texts[17] = max(tiny.texts(), key=len)
    trainer = tiny.sft_trainer(tmp_path, dataset=Dataset.from_dict({"text": texts}))
    assert tried(trainer)[0].pass_tokens == 4 * 96


def test_a_trial_tells_how_fast_a_step_of_all_passes_is(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    one, _ = tried(trainer, changed(trainer, "one row a pass"))
    assert one.step_s is not None
    assert one.tokens_per_s == pytest.approx(8 * 96 / one.step_s)
    assert one.seconds > one.step_s / 4, "two of the eight passes are run"


def test_a_trial_for_a_smaller_card_than_there_is_does_not_fit_when_it_takes_more(
    tmp_path: Path,
) -> None:
    trainer = sft(tmp_path)
    with VirtualCard(ROOMY) as card:
        card.track(trainer.model)
        plan = read_plan(trainer)
        peak = run_trial(trainer, plan).peak_allocated_bytes
        assert run_trial(trainer, plan, card_bytes=peak).fits
        over = run_trial(trainer, plan, card_bytes=peak - 1)
    assert not over.fits
    assert "were allocated, of" in str(over.error)


def test_a_trial_is_json(tmp_path: Path) -> None:
    trial, _ = tried(short(tmp_path))
    values = trial.to_dict()
    assert values["plan"] == trial.plan.to_dict()
    assert values["fits"] is True


def test_a_trainer_that_cannot_be_tried_says_why(tmp_path: Path) -> None:
    trainer = short(tmp_path)
    plan = read_plan(trainer)
    assert "nothing to measure" in str(refusal(trainer, plan))
    with VirtualCard(ROOMY):
        assert refusal(trainer, plan) is None
        assert "lora_r is 2 here" in str(refusal(trainer, replace(plan, lora_r=8)))
        assert "max_length is 96" in str(refusal(trainer, replace(plan, max_length=None)))
        wider = replace(plan, target_modules=("q_proj", "v_proj"))
        assert "not there" in str(refusal(trainer, wider))
        assert "turned into sgd" in str(refusal(trainer, replace(plan, optim="sgd")))
        trainer.train()
        assert "trained already" in str(refusal(trainer, plan))
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
        assert "stream" in str(refusal(trainer, plan))


def test_adapters_out_of_base_weights_keep_their_rank(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    trainer = tiny.sft_trainer(tmp_path, lora=lora)
    with VirtualCard(ROOMY):
        lower = replace(read_plan(trainer), lora_r=2)
        assert "base weights" in str(refusal(trainer, lower))


def test_the_longest_rows_are_found_in_any_kind_of_data_set() -> None:
    lengths = [3, 9, 1, 9, 4]
    rows = [{"input_ids": list(range(length))} for length in lengths]
    columns = Dataset.from_list(rows)
    shuffled = columns.select([4, 3, 2, 1, 0])
    texts = Dataset.from_dict({"prompt": ["a" * n for n in lengths], "label": [True] * 5})
    for dataset in (rows, columns, shuffled):
        picked = longest_batch(dataset, 3, times=2)
        assert [len(row["input_ids"]) for row in picked] == [9, 9, 4, 9, 9, 4]
        assert longest_row(dataset) == 9
    assert [len(row["prompt"]) for row in longest_batch(texts, 2)] == [9, 9]
    assert [len(row["input_ids"]) for row in longest_batch(rows[:1], 2, times=2)] == [3, 3]
    assert not has_rows(columns.to_iterable_dataset())
    assert not has_rows([])


def test_upstream_still_reads_what_a_double_sets() -> None:
    loader = inspect.getsource(Trainer.get_train_dataloader)
    assert "self._train_batch_size" in loader
    assert "self._get_train_sampler" in loader
    assert "self._memory_tracker = TrainerMemoryTracker(" in inspect.getsource(Trainer.__init__)
    assert "self.control.should_save" in inspect.getsource(Trainer._maybe_log_save_evaluate)
