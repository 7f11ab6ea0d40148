"""DPO, Reward and KTO: a training that ran out of memory ends as its twin that did not."""

from __future__ import annotations

from functools import partial

import pytest

from oomguard.ladder import Ladder
from oomguard.rungs import CheckpointActivations, SplitBatch
from oomguard.testing import VirtualCard
from tests import tiny
from tests.preferences import dpo, kto, margins, reward
from tests.twin import CHECKPOINT, EXACT, SPLIT, Build, assert_same, run, twin

pytestmark = tiny.needs_rows_of_pairs


CLOSE = dict.fromkeys(
    (
        *("weights", "moments", "loss", "train_loss", "grad_norm", "entropy"),
        *("mean_token_accuracy", "mean_reward", "min_reward", "max_reward", "margin"),
        *("logits/chosen", "logits/rejected", "logps/chosen", "logps/rejected"),
        *("rewards/chosen", "rewards/rejected", "rewards/margins"),
    ),
    1e-6,
)
"""As in `twin`: float order. Accuracies of rewards and counts of tokens are equal."""

KINDS: dict[str, Build] = {
    "dpo": dpo,
    "dpo precomputed": partial(dpo, reference="precomputed"),
    "dpo reference model": partial(dpo, reference="model"),
    "dpo weighted ipo": partial(
        dpo,
        loss_type=["ipo", "bco_pair", "sigmoid_norm"],
        loss_weights=[0.5, 1.0, 2.0],
        use_weighting=True,
        ld_alpha=0.5,
    ),
    "dpo robust": partial(dpo, loss_type=["robust"], label_smoothing=0.2),
    "reward": reward,
    "reward centred": partial(reward, dataset=margins(), center_rewards_coefficient=0.1),
    "kto": kto,
    "kto precomputed": partial(kto, precompute_ref_log_probs=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_in_forward_and_one_in_backward_leave_no_trace(kind: str) -> None:
    recovered = run(KINDS[kind], SPLIT, {("forward", 1): 40, ("backward", 3): 30})
    assert_same(recovered, twin(KINDS[kind]), CLOSE)
    assert [recovery.event.rows for recovery in recovered.recoveries] == [4, 2]
    assert [recovery.after.micro_batch_size for recovery in recovered.recoveries] == [2, 1]
    rows = [made.shape[0] for made in recovered.passes]
    assert min(rows) == rows[-1] == (1 if "kto" in kind else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_any_part_of_the_loss_is_made_good_bit_by_bit(kind: str) -> None:
    # The reference's forward runs with adapters and checkpointing switched off for its time.
    late = 80 if "reward" in kind else 200
    for faults in ({("forward", 2): late}, {("backward", 2): 60}):
        recovered = run(KINDS[kind], CHECKPOINT, faults)
        assert_same(recovered, twin(KINDS[kind]), EXACT)


@pytest.mark.parametrize("build", [dpo, reward, kto])
def test_on_a_card_that_holds_no_whole_batch_the_run_ends_as_on_a_large_one(build: Build) -> None:
    large = VirtualCard(capacity_bytes="1 GiB")
    assert not run(build, "exact_first", card=large).recoveries
    card = VirtualCard(capacity_bytes=int(large.peak_bytes * 0.6))
    recovered = run(build, Ladder(SplitBatch(), CheckpointActivations()), card=card)
    assert "SplitBatch" in recovered.rungs
    assert_same(recovered, twin(build), CLOSE)


def test_rows_that_are_compared_are_not_shortened() -> None:
    recovered = run(dpo, "default", {("forward", 1): 40, ("forward", 3): 40})
    assert recovered.rungs == ["CheckpointActivations", "SplitBatch"]
