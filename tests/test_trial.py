"""Trials: what they measure, and that they leave no trace."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from oomguard.errors import ConfigurationError
from oomguard.levers.live import read_plan
from oomguard.levers.longest import has_rows, longest_batch, longest_row
from oomguard.testing import VirtualCard
from oomguard.trial import Trial, refusal, run_trial
from tests import kinds, preferences, tiny, traces, twin

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from oomguard.plan import Plan

datasets.disable_progress_bars()

ROOMY = "1 GiB"
SAMPLED = 101  # of so many allocations one fails in the default run
PARTS = 4  # of the exhaustive test, so that all cores take part

CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one row a pass": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "all rows in one pass": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "8-bit moments": {"optim": "paged_adamw_8bit"},
    "half the rank": {"lora_r": 2},
    "fewer adapters": {"target_modules": ("q_proj", "v_proj")},
    "shorter rows": {"max_length": 48},
}


class Spy(TrainerCallback):
    """A user's callback, which a trial must not call."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda *_, **__: self.calls.append(name)


def sft(folder: Path, **changes: Any) -> Any:
    """An SFTTrainer with dropout that evaluates, logs and saves."""
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    values = {
        "lora": lora,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "trainer_arguments": {"eval_dataset": tiny.text_dataset(6)},
    }
    return tiny.sft_trainer(folder, **{**values, **changes})


def short(folder: Path) -> Any:
    """One layer, one batch a step: few allocations."""
    return tiny.sft_trainer(
        folder,
        model=tiny.llama(num_hidden_layers=1),
        lora=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1),
        gradient_accumulation_steps=1,
        save_strategy="steps",
        eval_strategy="steps",
        trainer_arguments={"eval_dataset": tiny.text_dataset(4)},
    )


def tried(trainer: Any, plan: Plan | None = None, **card: Any) -> tuple[Trial, int]:
    """A trial on a card, and how many allocations it took."""
    with VirtualCard(**(card or {"capacity_bytes": ROOMY})) as virtual:
        virtual.track(trainer.model)
        before = virtual.live_bytes
        trial = run_trial(trainer, plan or read_plan(trainer))
        assert virtual.live_bytes == before, "something of the trial stays on the card"
        return trial, virtual.allocations


def changed(trainer: Any, name: str) -> Plan:
    return replace(read_plan(trainer), **CHANGES[name])


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
