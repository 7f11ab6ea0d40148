"""A step that goes on under another plan is the one that had begun under it."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from oomguard.ladder import Ladder
from oomguard.rungs import CheckpointActivations, HalveSequence, SplitBatch
from tests import tiny
from tests.twin import (
    CHECKPOINT,
    CLOSE,
    EXACT,
    SPLIT,
    Build,
    Faults,
    Run,
    assert_same,
    differences,
    run,
    sft,
    twin,
)

if TYPE_CHECKING:
    from pathlib import Path

BOTH = Ladder(CheckpointActivations(), SplitBatch())
DROPOUT = LoraConfig(
    r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM"
)


def dropping(folder: Path, **changes: Any) -> Any:
    # All rows have one width, so that the plan does not depend on the batch that failed.
    model = tiny.llama(attention_dropout=0.1)
    return sft(folder, **{"lora": DROPOUT, "model": model, "max_length": 31, **changes})


class DrawsBetweenBatches(TrainerCallback):
    """Takes random numbers where no batch is run."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.rand(7)


def drawing(folder: Path) -> Any:
    trainer = dropping(folder)
    trainer.add_callback(DrawsBetweenBatches())
    return trainer


RANDOM: dict[str, Build] = {
    "dropout": dropping,
    "dropout without LoRA": partial(dropping, lora=None),
    "noise on embeddings": partial(dropping, lora=tiny.LORA, neftune_noise_alpha=5.0),
    "a callback that draws too": drawing,
}


@pytest.mark.parametrize("call", [2, 3, 4])
@pytest.mark.parametrize("kind", RANDOM)
def test_checkpointing_in_mid_step_draws_the_same_random_numbers(kind: str, call: int) -> None:
    recovered = run(RANDOM[kind], CHECKPOINT, {("backward", call): 12})
    assert_same(recovered, twin(RANDOM[kind]), EXACT)


HALF = Ladder(HalveSequence(floor=16))
PASSES = {"SplitBatch": (SPLIT, 1), "both": (BOTH, 2), "HalveSequence": (HALF, 1)}


@cache
def begun(build: Build, ladder: Ladder, rungs: int = 1) -> Run:
    """A run whose second step fails at once, so that it begins under the plan it ends with."""
    return run(build, ladder, {("forward", 3 + rung): 1 for rung in range(rungs)})


@pytest.mark.parametrize("ladder", PASSES)
@pytest.mark.parametrize("call", [3, 4], ids=["first batch", "second batch"])
def test_other_passes_draw_as_if_the_step_had_begun_with_them(call: int, ladder: str) -> None:
    rungs, count = PASSES[ladder]
    start = begun(dropping, rungs, count)
    assert "weights" in differences(start, twin(dropping))  # other masks, by nature
    late: Faults = {("backward", call): 12} | ({("forward", 5): 1} if count > 1 else {})
    recovered = run(dropping, rungs, late)
    assert recovered.recoveries[-1].after == start.recoveries[-1].after
    assert_same(recovered, start, EXACT)


TEXTS = partial(sft, max_length=32, max_steps=4, include_num_input_tokens_seen="all")
PROMPTS = partial(TEXTS, dataset=tiny.prompt_dataset(40))
KINDS = {
    "text": TEXTS,
    "prompts": PROMPTS,
    "shown": partial(TEXTS, include_num_input_tokens_seen="non_padding"),
    "packed wrapped": partial(TEXTS, packing=True, packing_strategy="wrapped"),
    "packed shown": partial(
        TEXTS,
        packing=True,
        packing_strategy="wrapped",
        include_num_input_tokens_seen="non_padding",
    ),
    "packed bfd": partial(
        TEXTS, packing=True, packing_strategy="bfd", dataset=tiny.text_dataset(64)
    ),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prompts"])
def test_windows_keep_every_target_and_the_schedule(kind: str) -> None:
    recovered, whole = begun(KINDS[kind], HALF), twin(KINDS[kind])
    assert recovered.rungs == ["HalveSequence"]
    assert recovered.recoveries[0].after.max_length == 16
    assert {p.longest for p in whole.passes} == {32}
    assert {p.longest for p in recovered.passes[2:]} == {16}
    assert _targets(recovered) == _targets(whole)
    _assert_same_schedule(recovered, whole)


def test_truncation_keeps_the_schedule() -> None:
    recovered = begun(PROMPTS, HALF)
    kept, all_of_them = _targets(recovered), _targets(twin(PROMPTS))
    assert kept[1] == all_of_them[1]
    assert all(0 < kept[step] < all_of_them[step] for step in (2, 3, 4))
    _assert_same_schedule(recovered, twin(PROMPTS))


@pytest.mark.parametrize("call", [3, 4], ids=["first batch", "second batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_halved_in_mid_step_are_halved_in_the_whole_step(kind: str, call: int) -> None:
    start = begun(KINDS[kind], HALF)
    late = run(KINDS[kind], HALF, {("backward", call): 12})
    assert late.recoveries[0].after == start.recoveries[0].after
    assert_same(late, start, {"loss": 1e-6, "train_loss": 1e-6})


def test_rows_truncated_by_the_guard_are_those_that_the_trainer_truncates() -> None:
    truncating = Ladder(HalveSequence(floor=16, mode="truncate"))
    recovered = run(TEXTS, truncating, {("backward", 2): 12})
    assert_same(recovered, twin(partial(TEXTS, max_length=16)), CLOSE | {"order": math.inf})


def _targets(one: Run) -> Counter[int]:
    found: Counter[int] = Counter()
    for part in one.passes:
        found[part.step] += part.targets
    return found


def _assert_same_schedule(one: Run, other: Run) -> None:
    assert one.order == other.order
    assert one.events == other.events
    schedule = ("step", "epoch", "learning_rate")
    assert [[line.get(name) for name in schedule] for line in one.logs] == [
        [line.get(name) for name in schedule] for line in other.logs
    ]
    assert {r.after.effective_batch_size for r in one.recoveries} == {8}
