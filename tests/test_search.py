"""`find_plan`: on estimates, and with trials on a card."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
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


def small(folder: Path, **changes: Any) -> Any:
    """Steps of two rows: few plans to estimate."""
    return tiny.sft_trainer(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=1, **changes
    )


@tiny.needs_fused_head
def test_what_is_found_on_estimates_fits_and_fills_the_card() -> None:
    result = oomguard.find_plan(WIDE, card="8GiB", max_length=1024)
    length = result.plan.max_length or 0
    assert result.measured is None
    assert result.estimate.fits("8GiB")
    assert 0.9 * 8 * GIB <= result.estimate.device_bytes <= 8 * GIB
    # It holds whatever the allocator caches, not only if cached blocks are given back in time.
    assert oomguard.estimate(WIDE, result.plan).device_bytes <= 8 * GIB
    assert result.pass_tokens == result.plan.per_device_train_batch_size * length
    assert result.pass_tokens > 1024 <= length
    assert ("2,048 positions" in " ".join(result.notes)) == (length > 2048)


@tiny.needs_fused_head
def test_the_effective_batch_of_a_model_is_kept_if_it_is_given() -> None:
    result = oomguard.find_plan(
        WIDE, card="H200", maximize="micro_batch_size", gradient_accumulation_steps=2
    )
    assert result.plan.per_device_train_batch_size == 2
    assert result.plan.effective_batch_size == 2


@tiny.needs_fused_head
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


@dataclass
class Found:
    """What was found for a card smaller than the one there, and what the search left behind."""

    result: SearchResult
    traces: list[str]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("found")
    trainer = tiny.sft_trainer(folder)
    before = traces.of(trainer, folder)
    result = found_on(ALL_ROWS, trainer, card=TWO_ROWS)
    return Found(result, traces.differences(before, traces.of(trainer, folder)))


@tiny.needs_fused_head
def test_on_a_trainer_the_most_rows_that_ran_are_found(found: Found) -> None:
    result = found.result
    assert result.plan.per_device_train_batch_size == 2
    assert result.plan.effective_batch_size == 8
    assert result.plan.max_length == 96
    assert result.measured is not None
    assert result.measured.fits
    assert 1 <= len(result.trials) <= 4


@tiny.needs_fused_head
def test_a_search_leaves_no_trace(found: Found) -> None:
    assert found.traces == []


@tiny.needs_fused_head
def test_a_result_is_json_a_table_and_code(found: Found) -> None:
    result = found.result
    values = json.loads(json.dumps(result.to_dict()))
    assert values["plan"] == result.plan.to_dict()
    assert values["estimate"]["peak_allocated_bytes"] == result.estimate.peak_allocated_bytes
    assert values["measured"]["fits"] is True
    assert all({"plan", "device_bytes"} <= other.keys() for other in values["runners_up"])
    console = rich.console.Console(width=160)
    with console.capture() as printed:
        console.print(result)
    assert "2 x 4" in printed.get()
    made: dict[str, Any] = {}
    exec(result.snippet(), made)  # noqa: S102 - what a user does with it
    assert made["args"].per_device_train_batch_size == 2
    assert made["peft_config"].lora_alpha == 8


@tiny.needs_fused_head
def test_a_freed_setting_that_the_trainer_cannot_change_stays(tmp_path: Path) -> None:
    result = found_on(ALL_ROWS, small(tmp_path, optim="sgd"), free=("optim",))
    assert result.plan.optim == "sgd"
    assert result.measured is not None


@pytest.mark.slow
def test_the_fastest_plan_is_measured(tmp_path: Path) -> None:
    trainer = small(tmp_path)
    result = found_on(ALL_ROWS, trainer, maximize="throughput", free=("gradient_checkpointing",))
    speeds = [trial.tokens_per_s or 0 for trial in result.trials]
    assert len(result.trials) == 4
    assert {trial.plan.gradient_checkpointing for trial in result.trials} == {True, False}
    assert result.measured is not None
    assert result.measured.tokens_per_s == max(speeds)
    assert all(other.measured is not None for other in result.runners_up)


@tiny.needs_fused_head
def test_a_trainer_that_cannot_be_run_gets_an_estimate_that_says_so(tmp_path: Path) -> None:
    result = oomguard.find_plan(small(tmp_path), card="8GiB")
    assert result.measured is None
    assert "not run, only estimated: there is nothing to measure" in " ".join(result.notes)


@tiny.needs_fused_head
def test_nothing_that_fits_in_any_trial_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NothingFitsError, match="trials ran out of memory: "):
        found_on("1 MiB", small(tmp_path))


@tiny.needs_fused_head
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


@pytest.mark.slow
def test_where_nothing_fits_fit_leaves_it_to_the_ladder(tmp_path: Path) -> None:
    trainer = small(tmp_path, max_steps=1)
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
