"""Every loss that TRL offers is either cut into passes or refused with its name."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

from oomguard.ladder import Ladder
from oomguard.levers import trl_losses
from oomguard.levers.batch import CannotActError, measure
from oomguard.levers.live import Levers, read_plan
from oomguard.levers.micro_batch import split
from oomguard.rungs import HalveSequence, SplitBatch
from tests import tiny
from tests.kinds import window
from tests.preferences import VALUES, dpo, kto, reward
from tests.twin import SPLIT, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = tiny.needs_rows_of_pairs


def compared(function: Callable[..., Any], name: str) -> set[str]:
    """The texts that a function compares a name or an attribute of that name with."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        str(constant.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and getattr(node.left, "attr", getattr(node.left, "id", "")) == name
        for other in node.comparators
        for constant in ast.walk(other)
        if isinstance(constant, ast.Constant)
    }


@pytest.mark.parametrize("trainer_class", [DPOTrainer, KTOTrainer])
def test_every_loss_type_that_upstream_computes_is_decided(trainer_class: Any) -> None:
    name = trainer_class.__name__
    offered = compared(trainer_class._compute_loss, "loss_type")
    cut, refused = trl_losses.ROW_MEANS[name], trl_losses.WHOLE_BATCH[name].keys()
    assert not cut & refused
    assert cut | refused == offered, f"{name} computes other losses: see levers/trl_losses.py"


def test_a_reward_model_has_a_single_loss() -> None:
    assert "loss_type" not in inspect.getsource(RewardTrainer), "see levers/trl_losses.py"


def learn(trainer: Any, size: float) -> None:
    """Adapters as they are later: at first all losses of all rows are alike."""
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=size)


def total(trainer: Any, batches: list[dict[str, Any]], weights: list[float]) -> float:
    with torch.no_grad():
        losses = [float(trainer.compute_loss(trainer.model, dict(batch))) for batch in batches]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


@pytest.mark.parametrize("loss_type", sorted(trl_losses.ROW_MEANS["DPOTrainer"]))
def test_a_loss_that_is_cut_is_the_mean_over_pairs_once_something_is_learned(
    tmp_path: Path, loss_type: str
) -> None:
    trainer = dpo(tmp_path, loss_type=[loss_type], beta=0.5, label_smoothing=0.1)
    learn(trainer, 0.2)
    batch = window(trainer).batches[0]
    passes = split(batch, 1, pairs=True)
    whole = total(trainer, [batch], [1.0])
    assert len(passes) == 4
    assert total(trainer, passes, [0.25] * 4) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "sft"])
def test_a_loss_of_the_whole_batch_is_refused_by_name_and_differs_indeed(
    tmp_path: Path, loss_type: str
) -> None:
    trainer = dpo(tmp_path, loss_type=["sigmoid", loss_type], beta=0.5)
    learn(trainer, 1.0)
    batch = window(trainer).batches[0]
    if "aot" in loss_type:  # by length alone, policy and reference would sort alike
        mask = batch["completion_mask"]
        batch["completion_mask"] = mask * (mask.cumsum(1) <= 3)
    whole = total(trainer, [batch], [1.0])
    assert total(trainer, split(batch, 1, pairs=True), [0.25] * 4) != pytest.approx(whole, rel=1e-4)
    assert f"loss_type='{loss_type}' of DPOTrainer" in str(trl_losses.split_refusal(trainer))


def kto_loss(folder: Path) -> Any:
    return kto(folder, loss_type="kto", train_sampling_strategy="sequential")


class OwnDPO(DPOTrainer):
    pass


class Averaged(DPOTrainer):
    """A loss that ties the pairs of a batch to each other."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs) * len(inputs["input_ids"]) ** 2


def with_class(trainer: Any, own: type) -> Any:
    trainer.__class__ = own
    return trainer


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (dpo, None),
        (reward, None),
        (kto, None),
        (lambda folder: with_class(dpo(folder), OwnDPO), None),
        (lambda folder: with_class(dpo(folder), Averaged), "neither the sum nor the token or row"),
        (partial(dpo, loss_type=["sigmoid", "aot"]), "'aot' of DPOTrainer sorts the rows"),
        (kto_loss, "'kto' of KTOTrainer compares each row with a KL divergence"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(
    tmp_path: Path, build: Any, reason: str | None
) -> None:
    trainer = build(tmp_path)
    levers, first = Levers(trainer, trainer.compute_loss), window(trainer)
    found = levers.refuses_split(first.batches[0], first.num_items)
    assert found is None if reason is None else reason in str(found)
    if reason is None:
        assert levers.split_loss is not None
        assert levers.split_loss.form == "row"


def test_a_loss_type_that_is_not_known_is_refused(tmp_path: Path) -> None:
    trainer: Any = dpo(tmp_path)
    trainer.loss_types = ["sigmoid", "of tomorrow"]
    assert trl_losses.split_refusal(trainer) == "loss_type='of tomorrow' of DPOTrainer is not known"


def test_images_of_preferences_are_refused(tmp_path: Path) -> None:
    trainer: Any = dpo(tmp_path)
    trainer._is_vision_dataset = True
    assert "images of DPOTrainer" in str(trl_losses.split_refusal(trainer))


def test_rows_that_are_compared_are_not_shortened(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    levers, plan = Levers(trainer, trainer.compute_loss), read_plan(trainer)
    for mode in (None, "truncate"):
        shorter = HalveSequence(floor=8, mode=mode)
        event = run(dpo, SPLIT, {("forward", 1): 40}).recoveries[0].event
        after = shorter(plan, event)
        assert after is not None
        reason = levers.refusal(plan, after, window(trainer), 0)
        assert "DPOTrainer scores a completion by all of its tokens" in str(reason)


def test_the_default_ladder_passes_on_to_a_split() -> None:
    faults = {("forward", 1): 40, ("forward", 2): 40}
    recovered = run(partial(dpo, max_length=600), "default", faults)
    assert recovered.rungs == ["CheckpointActivations", "SplitBatch"]
    three = Ladder(SplitBatch())
    rows = run(partial(dpo, per_device_train_batch_size=3), three, {("forward", 1): 40}).recoveries
    assert (rows[0].event.rows, rows[0].after.micro_batch_size) == (3, 2)


def test_an_own_class_without_a_loss_of_its_own_is_what_it_derives_from(tmp_path: Path) -> None:
    class Own(SFTTrainer):
        pass

    trainer = tiny.sft_trainer(tmp_path, trainer_class=Own, bf16=VALUES["bf16"])
    assert trl_losses.trl_class(trainer) == "SFTTrainer"
    assert trl_losses.split_refusal(trainer) is None
    assert trl_losses.length_refusal(trainer) is None


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 200))
def test_pairs_stay_together_and_none_is_lost(count: int, width: int, limit: int) -> None:
    ids = torch.arange(2 * count * width).reshape(2 * count, width)
    batch = {
        "input_ids": ids,
        "completion_mask": ids % 2,
        "ref_chosen_logps": torch.arange(count) / 2,
        "margin": list(range(count)),
    }
    passes = split(batch, limit, pairs=True)
    for part in passes:
        chosen, rejected = part["input_ids"].chunk(2)
        assert torch.equal(rejected - chosen, torch.full_like(chosen, count * width))
        assert torch.equal(part["completion_mask"], part["input_ids"] % 2)
        shape = measure(part, pairs=True)
        assert shape is not None
        assert len(part["margin"]) == len(part["ref_chosen_logps"]) == len(chosen) == shape.units
        assert shape.units == 1 or shape.tokens <= limit
        first = part["margin"][0]
        assert torch.equal(chosen[0], ids[first])
    assert [value for part in passes for value in part["margin"]] == batch["margin"]


def test_an_odd_number_of_rows_is_no_batch_of_pairs() -> None:
    with pytest.raises(CannotActError, match="3 rows are not pairs"):
        split({"input_ids": torch.ones(3, 4, dtype=torch.long)}, 4, pairs=True)


def test_what_is_neither_one_for_each_row_nor_for_each_pair_is_named() -> None:
    batch = {"input_ids": torch.ones(4, 4, dtype=torch.long), "weights": torch.ones(3)}
    with pytest.raises(CannotActError, match="weights is a tensor of shape"):
        split(batch, 8, pairs=True)
