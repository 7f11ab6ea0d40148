"""What estimates do for a run: rungs passed over, a warning before it, no trace in the result."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import masking_utils as masks

import oomguard
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


def wide(folder: Path, dropout: float = 0.0, count: int = 8) -> Any:
    """Two steps of so many rows of 64 tokens in float32."""
    model = small(vocab_size=4096, num_hidden_layers=2, attention_dropout=dropout)
    trainer = plain(folder, model, bf16=False, per_device_train_batch_size=count, max_steps=2)
    trainer.train_dataset = Dataset.from_list(rows(64))
    return trainer


def train(trainer: Any, capacity: int, ladder: Ladder = SPLIT, *, estimates: bool = True) -> Report:
    """Train on a card of so many bytes."""
    with VirtualCard(capacity) as card:
        card.track(trainer.model)
        with oomguard.Guard(trainer, ladder=ladder) as guard:
            guard._forecast._given_up |= not estimates
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
    assert "this training is estimated to need 36" in caplog.text
    assert "passed over CheckpointActivations (31" in caplog.text
    twin.train()
    assert tiny.largest_difference(tiny.weights(trainer), tiny.weights(twin)) < 1e-6
    report.save(tmp_path / "report.json")
    loaded = Report.load(tmp_path / "report.json")
    assert loaded.recoveries == report.recoveries
    assert loaded.estimate == report.estimate
    assert report.estimate is not None
    assert report.estimate["plan"] == report.initial_plan.to_dict()
    assert report.estimate["peak_allocated_bytes"] > CAPACITY


@pytest.mark.slow
def test_a_pass_is_split_at_once_as_far_as_it_must_be(tmp_path: Path) -> None:
    (recovery,) = train(wide(tmp_path), int(0.65 * CAPACITY)).recoveries
    assert [(one.rung, one.plan.micro_batch_size) for one in recovery.passed_over] == [
        ("SplitBatch", 4)
    ]
    assert recovery.after.micro_batch_size == 2
    assert recovery.after.effective_batch_size == recovery.before.effective_batch_size


@pytest.mark.slow
def test_a_rung_that_may_suffice_is_taken(tmp_path: Path) -> None:
    ladder = Ladder(CheckpointActivations(), SplitBatch())
    (recovery,) = train(wide(tmp_path), int(1.15 * CAPACITY), ladder).recoveries
    assert (recovery.rung, recovery.passed_over) == ("CheckpointActivations", ())


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
        vars(masks)["is_tracing"],
        sorted(vars(trainer)),
        sorted(vars(trainer.model)),
        trainer.model.training,
        trainer.model.config.to_dict(),
        trainer.args.to_dict(),
        [(p.data_ptr(), p.dtype, p.requires_grad, p.grad) for p in parameters],
    ]


@tiny.needs_fused_head
def test_an_estimate_leaves_the_trainer_and_the_world_alone(tmp_path: Path) -> None:
    trainer = wide(tmp_path, dropout=0.1)
    report = Report(initial_plan=read_plan(trainer), plan=read_plan(trainer), ladder=())
    event = OOMEvent(phase="forward", step=1, rows=8, width=64, tokens=512)
    before = world(trainer)
    with VirtualCard(CAPACITY) as card:
        card.track(trainer.model)
        live, asked = card.live_bytes, card.allocations
        needs = Forecast(trainer, report).needs(event, CAPACITY, report.plan)
        assert needs is not None
        assert (needs(report.plan) or 0) > CAPACITY
        assert (card.live_bytes, card.allocations) == (live, asked)
    assert world(trainer) == before


def test_an_estimate_that_fails_is_said_once_and_does_without(tmp_path: Path, caplog: Any) -> None:
    trainer = wide(tmp_path)  # with settings that the estimate takes for a contradiction
    trainer.args.gradient_checkpointing_kwargs = {"every_n_layers": 2}
    with caplog.at_level(logging.INFO, "oomguard"):
        report = train(trainer, int(0.65 * CAPACITY))
    assert [recovery.rung for recovery in report.recoveries] == ["SplitBatch", "SplitBatch"]
    assert caplog.text.count("no estimate of this training can be made: Conf") == 1


def test_a_model_of_another_kind_is_not_estimated(tmp_path: Path) -> None:
    ladder = Ladder(CheckpointActivations(), SplitBatch())
    report = train(kinds.token_classes(tmp_path), 1_200_000, ladder)
    assert report.recoveries[0].rung == "CheckpointActivations"
    assert report.estimate is None


def test_a_card_that_is_full_of_something_else_is_not_asked_about(tmp_path: Path) -> None:
    trainer = wide(tmp_path)
    report = kinds.fit(trainer, leave=CAPACITY - 2 * 2**20, ladder=SPLIT)
    assert [recovery.rung for recovery in report.recoveries] == ["SplitBatch"]
    assert report.estimate is None


@pytest.mark.parametrize(
    ("capacity", "count", "said"),
    [
        (CAPACITY, 8, "With per_device_train_batch_size=4, gradient_accumulation_steps=2, grad"),
        (2**20, 1, "nor does one row at a time fit"),
        (2 * CAPACITY, 8, ""),
    ],
)
def test_what_is_missing_is_said_before_the_first_step(
    capacity: int, count: int, said: str, tmp_path: Path, caplog: Any
) -> None:
    trainer = wide(tmp_path, count=count)
    plan = read_plan(trainer)
    report = Report(initial_plan=plan, plan=plan, ladder=())
    with VirtualCard(capacity):
        Forecast(trainer, report).warn(plan)
    assert said in caplog.text
    assert ("this training is estimated to need" in caplog.text) is bool(said)
    assert ("rows of 64 tokens" in caplog.text) is bool(said)


def test_a_device_of_unknown_size_is_not_asked_about(tmp_path: Path, caplog: Any) -> None:
    trainer = wide(tmp_path)
    with caplog.at_level(logging.DEBUG, "oomguard"):
        report = oomguard.fit(trainer)
    assert report.estimate is None
    assert "estimate" not in caplog.text
