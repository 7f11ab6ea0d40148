"""The oracle: a training that ran out of memory against the same one that did not."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from datasets import Dataset

from oomguard.checkpoint import read
from oomguard.ladder import Ladder
from oomguard.rungs import CheckpointActivations, SplitBatch
from oomguard.testing import VirtualCard
from tests import tiny
from tests.twin import (
    CHECKPOINT,
    CLOSE,
    EXACT,
    SPLIT,
    Build,
    Faults,
    assert_same,
    beyond,
    differences,
    run,
    sft,
    short_texts,
    twin,
)

if TYPE_CHECKING:
    from pathlib import Path

BOTH = Ladder(CheckpointActivations(), SplitBatch())
RUNGS = {"CheckpointActivations": (CHECKPOINT, EXACT), "SplitBatch": (SPLIT, CLOSE)}

# 20 rows make steps of 2, 2 and 1 batches an epoch: calls 1 2, 3 4, 5, and again 6 7.
LORA = partial(sft, max_steps=4)
MODELS: dict[str, Build] = {
    "LoRA": LORA,
    "full fine-tune": partial(sft, max_steps=4, lora=None),
}
PLACES: dict[str, Faults] = {
    "first allocation of all": {("forward", 1): 1},
    "second batch of the first step": {("backward", 2): 12},
    "in the middle of a forward": {("forward", 4): 40},
    "last step of an epoch": {("backward", 5): 12},
    "first step of an epoch": {("backward", 6): 12},
    "last backward of all": {("backward", 7): 60},
    "first optimizer step": {("optimizer", 1): 8},
}


@pytest.mark.parametrize("model", MODELS)
def test_without_an_error_the_guard_changes_nothing(model: str) -> None:
    guarded = run(MODELS[model], "default")
    assert not guarded.recoveries
    assert_same(guarded, twin(MODELS[model]), EXACT)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model", MODELS)
def test_one_oom_leaves_the_training_the_same(model: str, place: str, rung: str) -> None:
    ladder, allowed = RUNGS[rung]
    recovered = run(MODELS[model], ladder, PLACES[place])
    relieves = not any(phase == "optimizer" for phase, _ in PLACES[place])
    assert recovered.rungs == [rung if relieves else None]
    assert_same(recovered, twin(MODELS[model]), allowed)


SEVERAL: dict[str, Faults] = {
    "two steps": {("backward", 2): 12, ("backward", 8): 12},
    "first batch of a replay": {("backward", 4): 12, ("forward", 5): 3},
    "failed batch of a replay": {("backward", 4): 12, ("backward", 6): 12},
    "replay of a replay": {("backward", 4): 12, ("forward", 5): 3, ("backward", 7): 12},
    "optimizer step after a replay": {("backward", 2): 12, ("optimizer", 1): 8},
}


@pytest.mark.parametrize("places", SEVERAL)
def test_several_ooms_leave_the_training_the_same(places: str) -> None:
    recovered = run(LORA, BOTH, SEVERAL[places])
    assert len(recovered.recoveries) == len(SEVERAL[places])
    assert recovered.rungs[0] == "CheckpointActivations"
    assert "optimizer" in places or recovered.rungs[1] == "SplitBatch"
    assert_same(recovered, twin(LORA), CLOSE)


def test_ooms_anywhere_in_a_run_leave_the_training_the_same() -> None:
    fail_at = {5, 700, 1900}
    recovered = run(LORA, BOTH, card=VirtualCard(fail_at=fail_at))
    assert len(recovered.recoveries) == len(fail_at)
    assert_same(recovered, twin(LORA), CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("rung", RUNGS)
def test_an_oom_at_any_of_a_hundred_allocations_leaves_the_training_the_same(rung: str) -> None:
    short: Build = partial(sft, max_length=48)
    ladder, allowed = RUNGS[rung]
    ends = VirtualCard(capacity_bytes="1GiB")
    assert_same(run(short, ladder, card=ends), twin(short), EXACT)
    found = {}
    for fail_at in range(1, ends.allocations, ends.allocations // 100):
        recovered = run(short, ladder, card=VirtualCard(fail_at=fail_at))
        found[fail_at] = beyond(differences(recovered, twin(short)), allowed)
        assert len(recovered.recoveries) == 1
    assert not any(found.values()), {at: off for at, off in found.items() if off}


def test_callbacks_see_every_event_once() -> None:
    recovered = run(LORA, BOTH, SEVERAL["replay of a replay"])
    assert recovered.events == twin(LORA).events
    steps = Counter(name for name, *_ in recovered.events)
    assert steps["on_step_begin"] == steps["on_optimizer_step"] == steps["on_step_end"] == 4
    assert steps["on_substep_end"] == 3
    assert steps["on_train_begin"] == steps["on_train_end"] == 1


def test_batches_are_collated_once_and_in_the_same_order() -> None:
    recovered = run(LORA, SPLIT, PLACES["second batch of the first step"])
    assert len(recovered.order) == len(twin(LORA).order) == 8  # the last epoch is read ahead
    assert recovered.order == twin(LORA).order


@pytest.mark.parametrize("rung", RUNGS)
def test_an_oom_between_two_log_lines_leaves_their_mean_the_same(rung: str) -> None:
    seldom = partial(LORA, logging_steps=3)
    recovered = run(seldom, RUNGS[rung][0], {("backward", 4): 12})
    assert [line["step"] for line in recovered.logs] == [3, 4]
    assert_same(recovered, twin(seldom), RUNGS[rung][1])


@pytest.mark.parametrize("rung", RUNGS)
def test_evaluations_around_an_oom_are_the_same(rung: str) -> None:
    evaluated = partial(
        LORA,
        eval_strategy="steps",
        eval_steps=1,
        trainer_arguments={"eval_dataset": short_texts(6)},
    )
    recovered = run(evaluated, RUNGS[rung][0], {("backward", 4): 12})
    assert sum("eval_loss" in line for line in recovered.logs) == 4
    off = {"eval_loss": 1e-6, "eval_entropy": 1e-6, "eval_mean_token_accuracy": 1e-6}
    assert_same(recovered, twin(evaluated), RUNGS[rung][1] | (off if rung == "SplitBatch" else {}))


def test_only_the_batch_that_is_too_long_is_split() -> None:
    rows = list(short_texts(32, length=60)["text"])
    rows[15] = " ".join(tiny.texts()[:8])
    one_long = partial(sft, dataset=Dataset.from_dict({"text": rows}), max_steps=4, max_length=256)
    card = VirtualCard(capacity_bytes="1GiB")
    whole = run(one_long, card=card)
    long = max(whole.passes, key=lambda p: p.shape[1])
    assert long.shape == (4, 256)

    recovered = run(one_long, SPLIT, card=VirtualCard(capacity_bytes=card.peak_bytes // 2))
    assert {recovery.event.step for recovery in recovered.recoveries} == {long.step}
    assert recovered.rungs == ["SplitBatch", "SplitBatch"]
    shapes = [p.shape for p in recovered.passes]
    assert shapes.count((1, 256)) == 4
    assert [shape for shape in shapes if shape != (1, 256)] == [
        p.shape for p in whole.passes if p is not long
    ]
    assert_same(recovered, whole, CLOSE)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("call", [4, 5], ids=["before the checkpoint", "after the checkpoint"])
def test_a_run_resumed_from_a_checkpoint_of_a_guarded_run_ends_the_same(
    call: int, rung: str, tmp_path: Path
) -> None:
    ladder, allowed = RUNGS[rung]
    saving = partial(LORA, save_strategy="steps", save_steps=2)
    uninterrupted = run(saving, folder=tmp_path / "twin")
    recovered = run(saving, ladder, {("backward", call): 12}, folder=tmp_path / "guarded")
    assert_same(recovered, uninterrupted, allowed)

    resumed = run(saving, **_resuming(tmp_path / "guarded"))
    # It goes on from the rung that was reached, so that it needs another one.
    reached = read(tmp_path / "guarded" / "checkpoint-2")
    assert reached is not None
    earlier = len(reached.recoveries)
    again = run(
        saving, BOTH, {("backward", 2): 12}, earlier=earlier, **_resuming(tmp_path / "guarded")
    )
    assert again.rungs[:earlier] == [rung] * earlier
    assert resumed.order == uninterrupted.order[4:]
    # A resumed trainer begins its own count of tokens, list of events and mean of losses.
    own = dict.fromkeys(("num_tokens", "events", "order", "train_loss"), math.inf)
    assert_same(resumed, uninterrupted, allowed | own)
    assert_same(again, run(saving, **_resuming(tmp_path / "twin")), CLOSE)


def _resuming(folder: Path) -> dict[str, Any]:
    return {"folder": folder, "resume_from_checkpoint": str(folder / "checkpoint-2")}
