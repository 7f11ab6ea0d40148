"""Models under `torch.compile`: rungs act on the model inside, and the step is redone the same."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from oomguard import PageOptimizer8bit
from oomguard.ladder import Ladder
from oomguard.rungs import (
    CheckpointActivations,
    HalveSequence,
    LowerRank,
    NarrowTargets,
    SplitBatch,
)
from tests.twin import CLOSE, Build, assert_same, run, sft, twin

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Trainer

EXACT: dict[str, Ladder] = {
    "CheckpointActivations": Ladder(CheckpointActivations()),
    "SplitBatch": Ladder(SplitBatch()),
}
OTHERS: dict[str, Ladder] = {
    "HalveSequence": Ladder(HalveSequence(floor=32)),
    "PageOptimizer8bit": Ladder(PageOptimizer8bit()),
    "NarrowTargets": Ladder(NarrowTargets()),
    "LowerRank": Ladder(LowerRank(floor=2)),
}


def compiled(folder: Path, **changes: Any) -> Trainer:
    return sft(folder, torch_compile=True, torch_compile_backend="aot_eager", **changes)


COMPILED: Build = partial(compiled, max_steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("rung", EXACT)
def test_an_oom_in_a_compiled_model_leaves_the_training_the_same(rung: str) -> None:
    recovered = run(COMPILED, EXACT[rung], {("backward", 4): 12})
    assert recovered.rungs == [rung]
    assert_same(recovered, twin(COMPILED), CLOSE)


SLOW = {"HalveSequence", "NarrowTargets", "LowerRank"}


@pytest.mark.parametrize(
    "rung", [pytest.param(r, marks=pytest.mark.slow) if r in SLOW else r for r in OTHERS]
)
def test_a_compiled_model_obeys_a_rung_that_changes_what_is_trained_with(rung: str) -> None:
    recovered = run(COMPILED, OTHERS[rung], {("backward", 4): 12})
    plain = run(partial(sft, max_steps=3), OTHERS[rung], {("backward", 4): 12})
    assert recovered.rungs == [rung]
    assert recovered.events == plain.events
    assert recovered.order == plain.order
    assert_same(recovered, plain, CLOSE)
