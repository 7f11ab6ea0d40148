"""Every loss over sampled completions is cut into passes or refused with its name."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

import oomguard
from oomguard.levers import trl_losses
from oomguard.levers.batch import CannotActError, measure
from oomguard.levers.live import Levers, read_plan
from oomguard.levers.micro_batch import split
from oomguard.plan import Plan
from tests import tiny
from tests.kinds import window
from tests.sampling import grpo, reward_calls, rloo
from tests.test_trl_losses import compared

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = tiny.needs_rows_of_pairs


def sampled(trainer: Any) -> dict[str, Any]:
    """The first completions that are trained on."""
    trainer.model.train()
    inputs: dict[str, Any] = trainer._prepare_inputs(window(trainer).batches[0])
    return inputs


def test_every_loss_type_that_upstream_computes_is_decided() -> None:
    offered = compared(GRPOTrainer._compute_loss, "loss_type")
    assert trl_losses.COMPLETION_LOSSES["GRPOTrainer"].keys() == offered, "see levers/trl_losses.py"
    assert not compared(RLOOTrainer._compute_loss, "loss_type"), "see levers/trl_losses.py"


class Ranked(GRPOTrainer):
    """A loss that ties the completions of a batch to each other."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs) * len(inputs["advantages"]) ** 2


class OwnGRPO(GRPOTrainer):
    pass


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (grpo, None),
        (rloo, None),
        (partial(grpo, trainer_class=OwnGRPO), None),
        (partial(grpo, trainer_class=Ranked), "the loss of two rows"),
        (
            partial(grpo, entropy_coef=0.1),
            "entropy_coef of GRPOTrainer adds a mean over other tokens",
        ),
        (partial(grpo, top_entropy_quantile=0.5), "top_entropy_quantile of GRPOTrainer ranks"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name_and_nothing_is_sampled_to_find_out(
    tmp_path: Path, build: Any, reason: str | None
) -> None:
    trainer = build(tmp_path)
    levers, inputs = Levers(trainer, trainer.compute_loss), sampled(trainer)
    before = copy.deepcopy((trainer._metrics, trainer._logs)), torch.get_rng_state().tolist()
    found = levers.refuses_split(inputs, None)
    assert found is None if reason is None else reason in str(found)
    assert ((trainer._metrics, trainer._logs), torch.get_rng_state().tolist()) == before
    assert reward_calls(trainer) == 1


def test_a_loss_type_that_is_not_known_is_refused(tmp_path: Path) -> None:
    trainer: Any = grpo(tmp_path)
    trainer.loss_type = "of tomorrow"
    reason = "loss_type='of tomorrow' of GRPOTrainer is not known"
    assert trl_losses.split_refusal(trainer) == reason


def test_a_trainer_that_samples_as_older_versions_did_is_refused(tmp_path: Path) -> None:
    trainer: Any = grpo(tmp_path)
    trainer.loss_is_scaled_for_ga = None
    with pytest.raises(oomguard.UnsupportedTrainerError, match="sampling and loss are not known"):
        oomguard.fit(trainer)


def test_completions_are_not_shortened(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    levers, plan = Levers(trainer, trainer.compute_loss), read_plan(trainer)
    after = Plan.from_dict({**plan.to_dict(), "max_length": 8})
    reason = levers.refusal(plan, after, window(trainer), 0)
    assert "set a lower max_completion_length" in str(reason)


def test_passes_hold_the_completions_in_order(tmp_path: Path) -> None:
    inputs = sampled(grpo(tmp_path, beta=0.1))
    passes = split(inputs, 1)
    assert [measure(part).units for part in passes] == [1] * 4  # type: ignore[union-attr]
    for key in inputs.keys() - {"num_items_in_batch"}:
        assert torch.equal(torch.cat([part[key] for part in passes]), inputs[key])
    assert all(part["num_items_in_batch"] is inputs["num_items_in_batch"] for part in passes)


def test_images_are_refused(tmp_path: Path) -> None:
    inputs = sampled(grpo(tmp_path)) | {"num_images": [1] * 4, "pixel_values": torch.ones(4, 3)}
    with pytest.raises(CannotActError, match="images are not divided"):
        split(inputs, 1)
