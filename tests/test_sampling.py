"""GRPO and RLOO: what was sampled is trained on as it was, however often a step is made."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from oomguard.ladder import Ladder
from oomguard.rungs import CheckpointActivations, SplitBatch
from oomguard.testing import VirtualCard
from tests import tiny
from tests.sampling import grpo, rloo
from tests.twin import CHECKPOINT, EXACT, SPLIT, Build, assert_same, run, twin

pytestmark = tiny.needs_rows_of_pairs


CLOSE = dict.fromkeys(
    (
        *("weights", "moments", "loss", "train_loss", "grad_norm", "entropy", "kl"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
        *("clip_ratio/low_min", "clip_ratio/high_max", "cispo_clip_ratio", "vespo/phi_seq_mean"),
    ),
    1e-6,
)
"""Float order. What was sampled and its rewards are equal."""

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
KINDS: dict[str, Build] = {
    **{loss_type: partial(grpo, loss_type=loss_type) for loss_type in LOSSES},
    "kl": partial(grpo, beta=0.1, num_iterations=2, epsilon=1e-4),  # some ratios are clipped
    "sequence": partial(
        grpo, loss_type="grpo", importance_sampling_level="sequence", num_iterations=2, epsilon=1e-4
    ),
    "off policy": partial(grpo, num_iterations=2, steps_per_generation=1, learning_rate=1e-3),
    "generates twice a step": partial(grpo, steps_per_generation=2, gradient_accumulation_steps=4),
    "generates for two steps": partial(grpo, steps_per_generation=4),
    "masks truncated": partial(grpo, mask_truncated_completions=True, loss_type="bnpo"),
    "rloo": rloo,
    "rloo kl": partial(rloo, beta=0.2, num_iterations=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_in_forward_and_one_in_backward_leave_no_trace(kind: str) -> None:
    recovered = run(KINDS[kind], SPLIT, {("forward", 2): 40, ("backward", 3): 30})
    assert_same(recovered, twin(KINDS[kind]), CLOSE)
    assert [recovery.event.rows for recovery in recovered.recoveries] == [4, 2]
    assert recovered.passes[-1].shape[0] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_leaves_no_trace_at_all(kind: str) -> None:
    recovered = run(KINDS[kind], CHECKPOINT, {("backward", 2): 30})
    assert_same(recovered, twin(KINDS[kind]), EXACT)


LARGE: Any = {"per_device_train_batch_size": 16}


@pytest.mark.parametrize(
    ("build", "share"), [(partial(grpo, **LARGE), 0.8), (partial(rloo, **LARGE), 0.95)]
)
def test_on_a_card_that_holds_no_whole_batch_the_run_ends_as_on_a_large_one(
    build: Build, share: float
) -> None:
    # RLOO scores with as many rows at once as it trains on, and most of that is the fused head's.
    large = VirtualCard(capacity_bytes="1 GiB")
    assert not run(build, "exact_first", card=large).recoveries
    card = VirtualCard(capacity_bytes=int(large.peak_bytes * share))
    recovered = run(build, Ladder(SplitBatch(), CheckpointActivations()), card=card)
    assert "SplitBatch" in recovered.rungs
    assert_same(recovered, twin(build), CLOSE)
