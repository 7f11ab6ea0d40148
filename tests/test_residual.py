"""PiSSA and OLoRA at a lower rank: what is loaded again in plain PEFT is what was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from oomguard.levers import adapter, rank
from oomguard.levers.residual import Residuals, _halvings
from tests import tiny
from tests.test_lever_rank import logits, make, product, reloaded

if TYPE_CHECKING:
    from pathlib import Path

KINDS: dict[str, dict[str, Any]] = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "OLoRA, scaling 1": {"init_lora_weights": "olora", "lora_alpha": 8},
    "PiSSA, rsLoRA": {"init_lora_weights": "pissa", "use_rslora": True},
    "PiSSA, DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "PiSSA, rank_pattern": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 6}},
}


def in_force(trainer: Any) -> dict[str, torch.Tensor]:
    """The weight that each adapted module works with."""
    return {
        a.path: a.layer.get_base_layer().weight.detach().double()
        + a.layer.scaling[a.key] * product(a)
        for a in adapter.trained(trainer)
    }


def base_weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        a.path: a.layer.get_base_layer().weight.detach().double().clone()
        for a in adapter.trained(trainer)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_lowered_after_training_loads_in_plain_peft(tmp_path: Path, kind: str) -> None:
    trainer = make(tmp_path, **KINDS[kind])
    residuals = Residuals(trainer)
    trainer.train()
    before, bases = in_force(trainer), base_weights(trainer)
    products = {a.path: product(a) for a in adapter.trained(trainer)}
    lost = rank.lower(trainer, 4, residuals)
    after = in_force(trainer)
    for a in adapter.trained(trainer):
        assert a.rank == 4
        scaling = a.layer.scaling[a.key]
        given = (a.layer.get_base_layer().weight.double() - bases[a.path]) / scaling
        exact = torch.linalg.svdvals(products[a.path] - given)
        change = float((after[a.path] - before[a.path]).norm()) / scaling
        assert change == pytest.approx(float(exact[4:].norm()), abs=1e-5)
        assert lost[a.path] == pytest.approx(change / float(exact.norm()), abs=1e-5)
        # Cutting the product itself would have taken principal parts of the weight away.
        assert change < 0.8 * float(torch.linalg.svdvals(products[a.path])[4:].norm())
    fresh = reloaded(trainer, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(trainer.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_untrained_adapter_becomes_the_one_that_peft_would_have_begun_with(
    tmp_path: Path, init: str
) -> None:
    trainer = make(tmp_path, init_lora_weights=init)
    rank.lower(trainer, 4, Residuals(trainer))
    begun = make(tmp_path, init_lora_weights=init, r=4, lora_alpha=8)
    for a, b in zip(adapter.trained(trainer), adapter.trained(begun), strict=True):
        assert a.layer.scaling == b.layer.scaling
        torch.testing.assert_close(product(a), product(b), rtol=0, atol=1e-6)
        weights = (x.layer.get_base_layer().weight for x in (a, b))
        torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_two_halvings_round_the_base_weight_as_one_way_down_does(tmp_path: Path) -> None:
    bases = []
    for ranks in ([4, 2], [2]):
        trainer = make(tmp_path, init_lora_weights="pissa")
        residuals = Residuals(trainer)
        for lower in ranks:
            rank.lower(trainer, lower, residuals)
        bases.append([a.layer.get_base_layer().weight for a in adapter.trained(trainer)])
    assert all(torch.equal(one, other) for one, other in zip(*bases, strict=True))


@given(st.integers(1, 300), st.integers(1, 300))
@settings(deadline=None)
def test_halvings_lead_from_the_rank_before_to_the_rank_after(rank: int, before: int) -> None:
    ways = list(_halvings(rank, before))
    assert [high for _, high in ways] == [before, *(low for low, _ in ways)][: len(ways)]
    assert all(low < high <= 2 * low + 1 or low == rank for low, high in ways)
    assert (ways[-1][0] if ways else max(rank, before)) == max(rank, min(rank, before))


def test_the_moments_of_a_lowered_adapter_are_those_of_its_gradients(tmp_path: Path) -> None:
    """The learning rate is small: the maps are exact for an adapter that is at its beginning."""
    trainer = make(tmp_path, init_lora_weights="pissa")
    residuals = Residuals(trainer)
    batch = torch.arange(2, 26).reshape(2, 12)

    def gradients() -> list[Any]:
        factors: list[Any] = [p for a in adapter.trained(trainer) for p in a.factors]
        return [p.grad.clone() for p in factors]

    def backward() -> None:
        trainer.model.zero_grad()
        trainer.model(input_ids=batch, labels=batch).loss.backward()

    backward()
    rank.lower(trainer, 4, residuals)
    projected = gradients()
    backward()
    for mapped, measured in zip(projected, gradients(), strict=True):
        torch.testing.assert_close(mapped, measured, rtol=1e-3, atol=1e-6)


def test_the_weight_of_a_conv1d_is_the_other_way_round(tmp_path: Path) -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="pissa")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(get_peft_model(model, lora), args)
    rank.lower(trainer, 4, Residuals(trainer))
    layer = adapter.trained(trainer)[0].layer
    assert layer.r["default"] == 4
    after = layer.get_base_layer().weight + layer.get_delta_weight("default")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa_niter_2", "corda", "loftq", "lora_ga"])
def test_an_init_that_cannot_be_repeated_is_refused_by_name(tmp_path: Path, init: str) -> None:
    trainer = make(tmp_path)
    trainer.model.peft_config["default"].init_lora_weights = init
    residuals = Residuals(trainer)
    assert f"init_lora_weights={init!r} ties the base weight" in str(
        rank.refusal(trainer, 4, residuals)
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_was_trained_before_is_refused(tmp_path: Path, init: str) -> None:
    trainer = make(tmp_path, init_lora_weights=init)
    assert rank.refusal(trainer, 4, Residuals(trainer)) is None
    trainer.train()
    said = str(rank.refusal(trainer, 4, Residuals(trainer)))
    assert f"init_lora_weights={init!r} had changed the base weight before the guard" in said


def test_a_saved_adapter_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    first = make(tmp_path, init_lora_weights="pissa")
    first.train()
    first.model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter", is_trainable=True)
    trainer = tiny.sft_trainer(tmp_path, lora=None, model=model)
    assert "by a training" in str(rank.refusal(trainer, 4, Residuals(trainer)))
