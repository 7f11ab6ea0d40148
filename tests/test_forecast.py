"""What estimates do for a run: rungs passed over, a warning before it, no trace in the result."""

from __future__ import annotations

import copy
import logging
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import masking_utils

import oomguard
from oomguard import jump
from oomguard.event import OOMEvent
from oomguard.forecast import Forecast
from oomguard.ladder import Ladder
from oomguard.levers.live import read_plan
from oomguard.report import Report
from oomguard.rungs import CheckpointActivations, SplitBatch
from oomguard.testing import VirtualCard
from tests import kinds, tiny
from tests.setups import plain, rows, small

if TYPE_CHECKING:
    from pathlib import Path

# Most of a step are logits. It needs 38 MiB; 32 MiB with checkpointing, 25 MiB in half the rows.
CAPACITY = 30 * 2**20
SPLIT = Ladder(SplitBatch())


def wide(folder: Path, dropout: float = 0.0) -> Any:
    """Two steps of 8 x 64 tokens in float32."""
    model = small(vocab_size=4096, num_hidden_layers=2, attention_dropout=dropout)
    return plain(folder, model, bf16=False, per_device_train_batch_size=8, max_steps=2)


def train(trainer: Any, capacity: int, ladder: Ladder = SPLIT, *, estimates: bool = True) -> Report:
    """Train on a card of so many bytes."""
    with VirtualCard(capacity) as card:
        card.track(trainer.model)
        with oomguard.Guard(trainer, ladder=ladder) as guard:
            guard._forecast._given_up = not estimates
            trainer.train()
    return guard.report


def test_a_rung_that_cannot_suffice_is_passed_over(tmp_path: Path, caplog: Any) -> None:
    trainer, twin = wide(tmp_path), wide(tmp_path)
    report = train(trainer, CAPACITY, Ladder(CheckpointActivations(), SplitBatch()))
    (recovery,) = report.recoveries
    (passed,) = recovery.passed_over
    assert (passed.rung, recovery.rung) == ("CheckpointActivations", "SplitBatch")
    assert not report.plan.gradient_checkpointing
    assert passed.plan == replace(recovery.before, gradient_checkpointing=True)
    assert passed.peak_allocated_bytes > passed.usable_bytes == pytest.approx(CAPACITY, abs=2)
    assert "passed over CheckpointActivations (31" in caplog.text
    twin.train()
    assert tiny.largest_difference(tiny.weights(trainer), tiny.weights(twin)) < 1e-6


def test_a_pass_is_split_at_once_as_far_as_it_must_be(tmp_path: Path) -> None:
    (recovery,) = train(wide(tmp_path), int(0.65 * CAPACITY)).recoveries
    assert [(one.rung, one.plan.micro_batch_size) for one in recovery.passed_over] == [
        ("SplitBatch", 4)
    ]
    assert recovery.after.micro_batch_size == 2
    assert recovery.after.effective_batch_size == recovery.before.effective_batch_size


def test_a_rung_that_may_suffice_is_taken(tmp_path: Path) -> None:
    ladder = Ladder(CheckpointActivations(), SplitBatch())
    (recovery,) = train(wide(tmp_path), int(1.15 * CAPACITY), ladder).recoveries
    assert (recovery.rung, recovery.passed_over) == ("CheckpointActivations", ())


def test_the_estimate_is_in_the_report_and_stays_there(tmp_path: Path) -> None:
    report = train(wide(tmp_path), CAPACITY)
    path = tmp_path / "report.json"
    report.save(path)
    loaded = Report.load(path)
    assert report.estimate is not None
    assert loaded.estimate == report.estimate
    assert loaded.recoveries == report.recoveries
    assert report.estimate["plan"] == report.initial_plan.to_dict()
    assert report.estimate["peak_allocated_bytes"] > CAPACITY


def test_a_run_with_estimates_ends_as_one_without(tmp_path: Path) -> None:
    trainer, twin = wide(tmp_path, dropout=0.1), wide(tmp_path, dropout=0.1)
    states = []
    for one, estimates in ((trainer, True), (twin, False)):
        torch.manual_seed(7)
        report = train(one, CAPACITY, estimates=estimates)
        assert [recovery.rung for recovery in report.recoveries] == ["SplitBatch"]
        assert (report.estimate is not None) is estimates
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert tiny.largest_difference(tiny.weights(trainer), tiny.weights(twin)) == 0.0


def world(trainer: Any) -> list[Any]:
    """What an estimate could leave changed."""
    parameters = list(trainer.model.parameters())
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        functional.dropout,
        functional.scaled_dot_product_attention,
        masking_utils.is_tracing,
        sorted(vars(trainer)),
        sorted(vars(trainer.model)),
        trainer.model.training,
        trainer.model.config.to_dict(),
        trainer.args.to_dict(),
        [(p.data_ptr(), p.dtype, p.requires_grad, p.grad) for p in parameters],
    ]


def test_an_estimate_leaves_the_trainer_and_the_world_alone(tmp_path: Path) -> None:
    trainer = wide(tmp_path, dropout=0.1)
    report = Report(initial_plan=read_plan(trainer), plan=read_plan(trainer), ladder=())
    event = OOMEvent(phase="forward", step=1, rows=8, width=64, tokens=512)
    before = world(trainer)
    with VirtualCard(CAPACITY) as card:
        card.track(trainer.model)
        live, asked = card.live_bytes, card.allocations
        assert (Forecast(trainer, report).needs(event, CAPACITY)(report.plan) or 0) > CAPACITY
        assert (card.live_bytes, card.allocations) == (live, asked)
    assert world(trainer) == before


def test_an_estimate_that_fails_is_said_once_and_does_without(tmp_path: Path, caplog: Any) -> None:
    trainer = kinds.token_classes(tmp_path)
    with caplog.at_level(logging.INFO, "oomguard"):
        report = train(trainer, 4 * 2**20, Ladder(CheckpointActivations(), SplitBatch()))
    assert report.recoveries
    assert not any(recovery.passed_over for recovery in report.recoveries)
    assert caplog.text.count("no estimate of this training can be made") == 1


def test_a_card_that_is_full_of_something_else_is_not_asked_about(tmp_path: Path) -> None:
    trainer = wide(tmp_path)
    report = kinds.fit(trainer, leave=CAPACITY - 2 * 2**20, ladder=SPLIT)
    assert [recovery.rung for recovery in report.recoveries] == ["SplitBatch"]
    assert report.estimate is None


def test_what_is_missing_is_said_with_what_to_change(tmp_path: Path) -> None:
    data = [{"input_ids": row["input_ids"]} for row in rows(64)]
    model = small(vocab_size=512)
    trainer = tiny.sft_trainer(
        tmp_path,
        model=model,
        lora=copy.deepcopy(tiny.LORA),
        dataset=tiny.Dataset.from_list(data),
        max_length=64,
        per_device_train_batch_size=8,
    )
    plan = read_plan(trainer)
    report = Report(initial_plan=plan, plan=plan, ladder=())
    forecast = Forecast(trainer, report)
    estimate = forecast._of_longest_row(plan, 2**25)
    assert estimate is not None
    assert report.estimate is not None
    text = forecast._shortage(estimate, estimate.peak_reserved_bytes // 2)
    for part in (
        "is estimated to need",
        "rows of 64 tokens",
        "gradient_checkpointing=True, per_device_train_batch_size=",
    ):
        assert part in text
    assert "nor does one row at a time fit" in forecast._shortage(estimate, 2**20)
    assert jump.is_padded(OOMEvent(phase="forward", step=1, rows=2, width=3, tokens=6))
