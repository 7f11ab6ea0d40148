"""Evaluation and prediction that run out of memory give what they give with enough of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers as tf
from transformers import Trainer, TrainerCallback

import oomguard
from oomguard.testing import VirtualCard
from tests import kinds, tiny
from tests.evaluation import (
    EVALUATED,
    KINDS,
    ROWS,
    Device,
    Short,
    assert_close,
    causal_lm,
    changes,
    logits_are_asked_for,
    numbers,
    shorten,
    summarizer,
)
from tests.twin import assert_same, run, sft

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = logits_are_asked_for


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_evaluation_has_the_metrics_of_a_whole_one(kind: str, tmp_path: Path) -> None:
    plain = KINDS[kind](tmp_path)
    tf.set_seed(1)
    expected = numbers(plain.evaluate())
    after = torch.get_rng_state()
    trainer = shorten(KINDS[kind](tmp_path), most=2)
    tf.set_seed(1)
    with oomguard.Guard(trainer) as guard:
        found = numbers(trainer.evaluate())
    assert trainer.device.met > 0
    assert torch.equal(after, torch.get_rng_state())
    assert_close(found, expected)
    assert [recovery.event.phase for recovery in guard.report.recoveries] == ["evaluate"] * len(
        guard.report.recoveries
    )
    assert any("eval batch" in str(change) for change in changes(guard.report))
    logged = [numbers(line) for line in trainer.state.log_history]
    for one, other in zip(logged, plain.state.log_history, strict=True):
        assert_close(one, numbers(other))


@pytest.mark.parametrize("kind", ["causal", "generated", "rows", "SFT with logits"])
def test_split_predictions_are_those_of_whole_batches(kind: str, tmp_path: Path) -> None:
    plain = KINDS[kind](tmp_path)
    expected = plain.predict(plain.eval_dataset)
    trainer = shorten(KINDS[kind](tmp_path), most=3)
    with oomguard.Guard(trainer) as guard:
        found = trainer.predict(trainer.eval_dataset)
    for one, other in zip(arrays(found.predictions), arrays(expected.predictions), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.label_ids, expected.label_ids)
    assert_close(numbers(found.metrics), numbers(expected.metrics))
    assert {recovery.event.phase for recovery in guard.report.recoveries} == {"predict"}


def arrays(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


def test_the_smaller_batch_is_kept_for_later_batches_and_evaluations(tmp_path: Path) -> None:
    trainer = shorten(causal_lm(tmp_path), most=4)
    with oomguard.Guard(trainer) as guard:
        trainer.evaluate()
        assert trainer.device.met == 1
        trainer.evaluate()
        trainer.predict(trainer.eval_dataset)
    assert trainer.device.met == 1
    assert changes(guard.report) == ["eval batch 8 -> 4"]
    assert "eval batch 8 -> 4, plan unchanged" in guard.report.recoveries[0].log_line()


def test_metrics_computed_batch_by_batch_see_every_batch_once(tmp_path: Path) -> None:
    def build() -> tuple[Any, list[Any]]:
        seen: list[Any] = []

        def compute(prediction: Any, compute_result: bool) -> dict[str, float]:
            seen.append((prediction.predictions.shape, prediction.label_ids.sum().item()))
            total = prediction.predictions.float().mean().item()
            return {"mean": total} if compute_result else {}

        trainer = causal_lm(tmp_path, batch_eval_metrics=True)
        trainer.compute_metrics = compute
        return trainer, seen

    plain, expected = build()
    metrics = numbers(plain.evaluate())
    trainer, seen = build()
    with oomguard.Guard(shorten(trainer, most=2)):
        assert_close(numbers(trainer.evaluate()), metrics)
    assert seen == expected


def test_logits_are_preprocessed_batch_by_batch_as_before(tmp_path: Path) -> None:
    def build() -> Any:
        trainer = causal_lm(tmp_path)
        trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
        return trainer

    expected = numbers(build().evaluate())
    trainer = shorten(build(), most=2)
    with oomguard.Guard(trainer):
        assert_close(numbers(trainer.evaluate()), expected)


def test_logits_that_pile_up_are_moved_to_the_cpu(tmp_path: Path) -> None:
    plain, trainer = causal_lm(tmp_path), causal_lm(tmp_path)
    for each in (plain, trainer):
        each.eval_dataset = kinds.encoded(64)
    expected = numbers(plain.evaluate())
    # One batch of logits has 0.75 MiB; gathered and concatenated there are up to 12 MiB of them.
    with VirtualCard("5MiB") as card:
        card.track(trainer.model)
        with oomguard.Guard(trainer) as guard:
            found = numbers(trainer.evaluate())
    assert found == expected
    assert changes(guard.report)[-1] == "results moved to the CPU"
    assert card.peak_bytes <= 5 * 2**20


def test_logits_of_passes_wait_on_the_cpu_where_they_do_not_fit_together(tmp_path: Path) -> None:
    expected = numbers(causal_lm(tmp_path).evaluate())
    # The first half of the first batch is run once more after the second half has failed.
    trainer = shorten(causal_lm(tmp_path), 4, 3)
    with VirtualCard("1 GiB") as card:
        card.track(trainer.model)
        with oomguard.Guard(trainer) as guard:
            found = numbers(trainer.evaluate())
    assert_close(found, expected)
    moved = ["eval batch 8 -> 4", "logits of passes moved to the CPU", "results moved to the CPU"]
    assert changes(guard.report) == moved


def test_a_single_row_that_does_not_fit_ends_with_what_to_change(tmp_path: Path) -> None:
    trainer = shorten(causal_lm(tmp_path), most=0)
    with (
        oomguard.Guard(trainer) as guard,
        pytest.raises(oomguard.LadderExhaustedError, match="per_device_eval_batch_size") as error,
    ):
        trainer.evaluate()
    assert "Out of memory in evaluate after optimizer step 0" in str(error.value)
    assert "(now 8)" in str(error.value)
    halved = ["eval batch 8 -> 4", "eval batch 4 -> 2", "eval batch 2 -> 1"]
    assert [change for change in changes(guard.report) if change] == halved


def test_a_loss_that_cannot_be_split_is_tried_again_whole(tmp_path: Path) -> None:
    class Odd(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * len(inputs["input_ids"]) ** 2, outputs

    def build() -> Any:
        trainer = kinds.make(tmp_path, Odd, **EVALUATED)
        trainer.eval_dataset = kinds.encoded(ROWS)
        return trainer

    expected = numbers(build().evaluate())
    trainer = shorten(build(), 8, 1, 7)
    with oomguard.Guard(trainer) as guard:
        assert numbers(trainer.evaluate()) == expected
    # Two halves, three calls that find that their losses do not add up, and whole again.
    assert changes(guard.report) == ["eval batch 8 -> 4", None]
    trainer = shorten(build(), 7)
    with oomguard.Guard(trainer), pytest.raises(torch.OutOfMemoryError, match="was not split: the"):
        trainer.evaluate()


def test_training_that_evaluates_on_a_short_device_ends_as_its_twin(tmp_path: Path) -> None:
    build = partial(
        sft,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        eval_on_start=True,
        trainer_arguments={"eval_dataset": tiny.text_dataset(ROWS)},
    )

    def short(folder: Path) -> Any:
        return shorten(build(folder), most=2)

    plain, faulted = run(build), run(short, "default", card=VirtualCard("1 GiB"))
    close = {key: 1e-6 for line in plain.logs for key in line if key.startswith("eval_")}
    assert_same(faulted, plain, close)
    assert {recovery.event.phase for recovery in faulted.recoveries} == {"evaluate"}
    assert faulted.rungs == [None] * len(faulted.rungs)
    assert faulted.report is not None
    assert faulted.report.plan == faulted.report.initial_plan


class Greedy(TrainerCallback):
    """Asks for more than there is, at one event."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.ask)

    def ask(self, *args: Any, **_: Any) -> None:
        with VirtualCard("1KiB"):
            torch.zeros(2**20)


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate", "on_prediction_step"])
def test_a_callback_that_runs_out_of_memory_is_named(event: str, tmp_path: Path) -> None:
    trainer = causal_lm(tmp_path, eval_steps=1, logging_steps=1)
    trainer.args.eval_strategy = tf.IntervalStrategy.STEPS
    trainer.add_callback(Greedy(event))
    guard = oomguard.Guard(trainer)
    with pytest.raises(torch.OutOfMemoryError) as error, guard:
        trainer.train()
    assert f"Greedy.{event}, a callback" in "\n".join(error.value.__notes__)
    assert guard.report.status == "failed"
    assert f"Greedy.{event}" in str(guard.report.error)
    assert "call_event" not in vars(trainer.callback_handler)


def test_a_batch_predicted_by_hand_is_split_too(tmp_path: Path) -> None:
    plain, trainer = causal_lm(tmp_path), shorten(causal_lm(tmp_path), most=2)
    results = []
    for each in (plain, trainer):
        batch = next(iter(each.get_eval_dataloader()))
        each.model.eval()
        with oomguard.Guard(each) as guard:
            results.append(each.prediction_step(each.model, batch, prediction_loss_only=False))
        expected = [] if each is plain else ["eval batch 8 -> 4", "eval batch 4 -> 2"]
        assert changes(guard.report) == expected
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert guard.report.recoveries[0].event.phase == "predict"
    assert guard.report.recoveries[0].event.rows == 8


def test_what_is_sampled_is_the_same_after_a_second_try(tmp_path: Path) -> None:
    def build() -> Any:
        return summarizer(tmp_path, per_device_eval_batch_size=1)

    plain, trainer = build(), shorten(build(), 8, 1, 5)
    trainer.device.at = 900  # when some tokens have been drawn
    results = []
    for each in (plain, trainer):
        tf.set_seed(1)
        with oomguard.Guard(each) as guard:
            results.append(each.predict(each.eval_dataset, do_sample=True).predictions)
        results.append(torch.get_rng_state().numpy())
    assert changes(guard.report) == [None, None]
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[3])
    assert len(np.unique(results[0])) > 10


def test_a_second_try_is_given_the_batch_as_it_was(tmp_path: Path) -> None:
    class Popping(Trainer):
        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs["labels"] = inputs["labels"].roll(1, 0)
            return super().prediction_step(model, inputs, *args, **kwargs)

    results = []
    for failing in ((), (1, 2)):
        trainer = kinds.make(tmp_path, Popping, **EVALUATED)
        trainer.eval_dataset = kinds.encoded(8)
        mutating = type("Mutating", (Popping, Short, Trainer), {})
        trainer.__class__ = mutating
        trainer.device = Device(8, failing)
        with oomguard.Guard(trainer):
            results.append(numbers(trainer.evaluate()))
    assert_close(*results)


def test_a_forward_pass_is_split_not_computed_on_the_cpu(tmp_path: Path) -> None:
    expected = numbers(causal_lm(tmp_path).evaluate())
    trainer = causal_lm(tmp_path)
    with VirtualCard(fail_at=100), oomguard.Guard(trainer) as guard:
        assert_close(numbers(trainer.evaluate()), expected)
    assert changes(guard.report) == ["eval batch 8 -> 4"]
