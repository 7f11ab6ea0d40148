"""`find_plan`: on estimates, and with trials on a card."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import rich
from transformers import LlamaConfig

import oomguard
from oomguard.errors import ConfigurationError, NothingFitsError
from oomguard.levers.live import read_plan
from oomguard.testing import VirtualCard
from tests import tiny, traces, twin

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.search_result import SearchResult

datasets.disable_progress_bars()
gc.freeze()

GIB = 2**30
# Two wide layers: 3 GiB of weights, and quickly traced.
WIDE = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=2048,
    architectures=["LlamaForCausalLM"],
)
# TRL's chunked loss takes tens of MiB from one row a pass on: 14, 28, 57, and 109 for eight rows.
TWO_ROWS, ALL_ROWS = "40 MiB", "1 GiB"


def found_on(capacity: str, trainer: Any, **arguments: Any) -> SearchResult:
    with VirtualCard(capacity) as virtual:
        virtual.track(trainer.model)
        return oomguard.find_plan(trainer, **arguments)


@pytest.mark.parametrize("maximize", ["tokens", "lora_r"])
def test_what_is_found_on_estimates_fits_and_fills_the_card(maximize: str) -> None:
    result = oomguard.find_plan(WIDE, card="12GiB", maximize=maximize, max_length=1024)
    assert result.measured is None
    assert result.estimate.fits("12GiB")
    assert result.estimate.device_bytes >= 0.85 * 12 * GIB
    assert result.pass_tokens > 1024 or (result.plan.lora_r or 0) > 16


def test_the_effective_batch_of_a_model_is_kept_if_it_is_given() -> None:
    result = oomguard.find_plan(
        WIDE, card="8GiB", per_device_train_batch_size=4, gradient_accumulation_steps=6
    )
    assert result.plan.effective_batch_size == 24
    assert 24 % result.plan.per_device_train_batch_size == 0


def test_rows_longer_than_the_model_was_made_for_are_noted() -> None:
    result = oomguard.find_plan(WIDE, card="24GiB", maximize="max_length", max_length=2048)
    assert (result.plan.max_length or 0) > 2048
    assert "2,048 positions" in " ".join(result.notes)


def test_a_freed_setting_is_changed_only_where_that_makes_the_plan_larger() -> None:
    free = ("gradient_checkpointing", "optim")
    arguments: dict[str, Any] = {
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "free": free,
        "maximize": "micro_batch_size",
    }
    small = oomguard.find_plan(WIDE, card="12GiB", **arguments)
    large = oomguard.find_plan(WIDE, card="H200", **arguments)
    assert small.plan.gradient_checkpointing
    assert not large.plan.gradient_checkpointing
    assert large.plan.optim == "adamw_torch_fused"


def test_a_card_too_small_for_the_weights_is_refused_with_the_numbers() -> None:
    with pytest.raises(NothingFitsError) as refused:
        oomguard.find_plan(WIDE, card="2GiB")
    text = str(refused.value)
    assert "nothing fits 2.00 GiB" in text
    assert "weights are" in text
    assert "(a) quantization='nf4', (b) a larger card" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "name a card"),
        ({"card": "huge"}, "neither a size"),
        ({"card": "8GiB", "maximize": "speed"}, "give one of tokens"),
        ({"card": "8GiB", "maximize": "throughput"}, "has to be measured"),
        ({"card": "8GiB", "colour": "red"}, "colour is neither"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        oomguard.find_plan(WIDE, **arguments)


@pytest.mark.parametrize(("card", "rows"), [(TWO_ROWS, 2), (ALL_ROWS, 8)])
def test_on_a_trainer_the_most_rows_that_ran_are_found_and_no_trace_is_left(
    tmp_path: Path, card: str, rows: int
) -> None:
    trainer = tiny.sft_trainer(tmp_path)
    before = traces.of(trainer, tmp_path)
    result = found_on(card, trainer)
    assert result.plan.per_device_train_batch_size == rows
    assert result.plan.effective_batch_size == 8
    assert result.plan.max_length == 96
    assert result.measured is not None
    assert result.measured.fits
    assert 1 <= len(result.trials) <= 4
    assert traces.differences(before, traces.of(trainer, tmp_path)) == []


def test_a_card_smaller_than_the_one_there_is_what_counts(tmp_path: Path) -> None:
    result = found_on(ALL_ROWS, tiny.sft_trainer(tmp_path), card=TWO_ROWS)
    assert result.plan.per_device_train_batch_size == 2


def test_on_a_trainer_nothing_is_longer_than_its_rows(tmp_path: Path) -> None:
    trainer = tiny.sft_trainer(tmp_path)
    result = found_on(ALL_ROWS, trainer, maximize="max_length")
    assert result.plan.max_length == 96


def test_on_a_trainer_a_higher_rank_is_only_estimated(tmp_path: Path) -> None:
    trainer = tiny.sft_trainer(tmp_path)
    result = found_on(ALL_ROWS, trainer, maximize="lora_r")
    assert (result.plan.lora_r or 0) > 4
    assert result.measured is None
    assert "no higher rank" in " ".join(result.notes)


def test_a_freed_setting_that_the_trainer_cannot_change_stays(tmp_path: Path) -> None:
    trainer = tiny.sft_trainer(tmp_path, optim="sgd")
    result = found_on(TWO_ROWS, trainer, free=("optim", "gradient_checkpointing"))
    assert result.plan.optim == "sgd"
    assert result.measured is not None


def test_the_fastest_plan_is_measured(tmp_path: Path) -> None:
    trainer = tiny.sft_trainer(tmp_path)
    result = found_on(ALL_ROWS, trainer, maximize="throughput", free=("gradient_checkpointing",))
    speeds = [trial.tokens_per_s or 0 for trial in result.trials]
    assert len(result.trials) == 4
    assert {trial.plan.gradient_checkpointing for trial in result.trials} == {True, False}
    assert result.measured is not None
    assert result.measured.tokens_per_s == max(speeds)
    assert all(other.measured is not None for other in result.runners_up)


def test_a_trainer_that_cannot_be_run_gets_an_estimate_that_says_so(tmp_path: Path) -> None:
    result = oomguard.find_plan(tiny.sft_trainer(tmp_path), card="8GiB")
    assert result.measured is None
    assert "not run, only estimated: there is nothing to measure" in " ".join(result.notes)


def test_nothing_that_fits_in_any_trial_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NothingFitsError, match="trials ran out of memory: "):
        found_on("1 MiB", tiny.sft_trainer(tmp_path))


def test_a_result_is_json_a_table_and_code(tmp_path: Path) -> None:
    result = found_on(TWO_ROWS, tiny.sft_trainer(tmp_path))
    values = json.loads(json.dumps(result.to_dict()))
    assert values["plan"] == result.plan.to_dict()
    assert values["estimate"]["peak_allocated_bytes"] == result.estimate.peak_allocated_bytes
    assert values["measured"]["fits"] is True
    assert all({"plan", "device_bytes"} <= other.keys() for other in values["runners_up"])
    console = rich.console.Console(width=160, record=True, quiet=False, file=None)
    with console.capture() as printed:
        console.print(result)
    assert "2 x 4" in printed.get()
    made: dict[str, Any] = {}
    exec(result.snippet(), made)  # noqa: S102 - what a user does with it
    assert made["args"].per_device_train_batch_size == 2
    assert made["peft_config"].lora_alpha == 8


def test_fit_searches_and_then_trains_as_if_the_rows_had_been_set_by_hand(tmp_path: Path) -> None:
    rows = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    by_hand: Any = twin.sft(tmp_path / "hand", **rows)
    by_hand.train()
    trainer: Any = twin.sft(tmp_path / "found")
    with VirtualCard(TWO_ROWS) as card:
        card.track(trainer.model)
        report = oomguard.fit(trainer, find=True)
    assert report.status == "finished"
    assert report.recoveries == []
    assert read_plan(trainer).per_device_train_batch_size == 2
    assert trainer.state.global_step == by_hand.state.global_step
    assert tiny.largest_difference(tiny.weights(trainer), tiny.weights(by_hand)) == 0


def test_where_nothing_fits_fit_leaves_it_to_the_ladder(tmp_path: Path) -> None:
    trainer: Any = tiny.sft_trainer(tmp_path, max_steps=1)
    ladder = oomguard.Ladder(oomguard.SplitBatch(), oomguard.HalveSequence(floor=8))
    with VirtualCard("10 MiB") as card:
        card.track(trainer.model)
        report = oomguard.fit(trainer, find=True, ladder=ladder)
    assert report.status == "finished"
    assert "HalveSequence" in [recovery.rung for recovery in report.recoveries]


@pytest.mark.parametrize("other", [{"plan": "last"}, {"resume_from_checkpoint": True}])
def test_a_search_and_another_start_contradict_each_other(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="find=True contradicts"):
        oomguard.fit(tiny.sft_trainer(tmp_path), find=True, **other)
