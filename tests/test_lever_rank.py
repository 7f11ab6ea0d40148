"""Freezing adapters and lowering their rank: the function, the moments, the saved adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel

from oomguard.levers import adapter, rank
from oomguard.levers.adapter import inner_optimizer
from oomguard.levers.residual import Residuals
from oomguard.testing import VirtualCard
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "v_proj", "down_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
    "regular expression": {"target_modules": r".*\.(q_proj|v_proj|down_proj)"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def make(folder: Path, optim: str = "adamw_torch", **changes: Any) -> Any:
    values = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if changes.get("lora_bias"):
        model = tiny.llama(attention_bias=True)
        values["target_modules"] = ["q_proj", "v_proj"]
    else:
        model = tiny.llama()
    lora = LoraConfig(**{**values, **changes})
    return tiny.sft_trainer(folder, lora=lora, model=model, max_steps=2, optim=optim)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=tokens).logits
    return out


def reloaded(trainer: Any, folder: Path, **model: Any) -> Any:
    """The saved adapter on a fresh base model, by PEFT alone."""
    trainer.model.save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(tiny.llama(**model), folder / "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_adapters_stay_in_the_function_and_in_what_is_saved(
    tmp_path: Path, kind: str
) -> None:
    trainer = make(tmp_path, **KINDS[kind])
    trainer.train()
    before = logits(trainer.model)
    frozen = adapter.freeze(trainer, {"q_proj", "v_proj"})
    assert torch.equal(logits(trainer.model), before)
    assert adapter.targets(trainer) is not None
    assert set(adapter.targets(trainer) or ()) == {"q_proj", "v_proj"}
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in frozen}
    assert not set(inner_optimizer(trainer).state) & set(frozen)
    bias = {"attention_bias": True} if kind == "lora_bias" else {}
    torch.testing.assert_close(logits(reloaded(trainer, tmp_path, **bias)), before, rtol=0, atol=0)


def test_the_largest_adapters_come_first_in_the_plan(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert adapter.targets(trainer) == (
        "down_proj", "gate_proj", "up_proj", "o_proj", "q_proj", "k_proj", "v_proj",
    )  # fmt: skip


def test_gradients_moments_and_saved_inputs_of_frozen_adapters_are_gone(tmp_path: Path) -> None:
    peaks, held = [], []
    for kept in (None, {"q_proj", "v_proj"}):
        trainer = make(tmp_path)
        trainer.train()
        if kept is not None:
            adapter.freeze(trainer, kept)
        trainer.model.zero_grad()
        batch = {"input_ids": torch.arange(2, 98).reshape(1, 96)}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = trainer.model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        peaks.append(sum(saved.values()))
        state = inner_optimizer(trainer).state
        moments = sum(t.nbytes for s in state.values() for t in s.values())
        grads = sum(p.grad.nbytes for p in trainer.model.parameters() if p.grad is not None)
        held.append((moments, grads))
    kept_share = [adapter_share(make(tmp_path), {"q_proj", "v_proj"})]
    assert held[1][1] == pytest.approx(held[0][1] * kept_share[0])
    assert held[1][0] < held[0][0] * (kept_share[0] + 0.05)
    assert peaks[1] < peaks[0]


def adapter_share(trainer: Any, kept: set[str]) -> float:
    sizes = {
        a.path: (a.target, sum(p.numel() for p in a.parameters)) for a in adapter.trained(trainer)
    }
    whole = sum(n for _, n in sizes.values())
    return sum(n for target, n in sizes.values() if target in kept) / whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_lower_rank_is_the_truncated_svd_and_loads_in_plain_peft(
    tmp_path: Path, kind: str
) -> None:
    trainer = make(tmp_path, **KINDS[kind])
    trainer.train()
    exact = {a.path: product(a) for a in adapter.trained(trainer)}
    scalings = {a.path: a.layer.scaling[a.key] for a in adapter.trained(trainer)}
    lost = rank.lower(trainer, 4, Residuals(trainer))
    for a in adapter.trained(trainer):
        assert a.rank <= 4
        assert a.layer.scaling[a.key] == scalings[a.path]
        values = torch.linalg.svdvals(exact[a.path])
        best = float(values[a.rank :].norm() / values.norm())
        off = float((product(a) - exact[a.path]).norm() / exact[a.path].norm())
        assert off == pytest.approx(best, abs=1e-5)
        assert lost[a.path] == pytest.approx(best, abs=1e-5)
    bias = {"attention_bias": True} if kind == "lora_bias" else {}
    fresh = reloaded(trainer, tmp_path, **bias)
    torch.testing.assert_close(logits(fresh), logits(trainer.model), rtol=0, atol=1e-6)
    assert adapter.largest_rank(trainer) == 4
    trainer.optimizer.zero_grad()
    loss = trainer.model(
        input_ids=torch.ones(1, 8, dtype=torch.long), labels=torch.ones(1, 8).long()
    )
    loss.loss.backward()
    trainer.optimizer.step()


def product(a: Any) -> torch.Tensor:
    factor_a, factor_b = a.factors
    result: torch.Tensor = factor_b.detach().double() @ factor_a.detach().double()
    return result


def test_the_users_own_config_stays_what_it_was(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    model: Any = trainer.model
    users = model.peft_config["default"]
    rank.lower(trainer, 4, Residuals(trainer))
    assert (users.r, model.peft_config["default"].r) == (8, 4)


def test_an_adapter_that_has_not_learned_keeps_rows_of_a(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.create_optimizer()
    before = logits(trainer.model)
    first = adapter.trained(trainer)[0].factors[0].detach().clone()
    assert set(rank.lower(trainer, 4, Residuals(trainer)).values()) == {0.0}
    assert torch.equal(logits(trainer.model), before)
    assert torch.equal(adapter.trained(trainer)[0].factors[0], first[:4])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "sgd"])
def test_moments_are_those_of_the_mapped_gradients(tmp_path: Path, optim: str) -> None:
    """With one gradient only, moments are that gradient and its square up to a factor."""
    trainer = make(tmp_path, optim)
    trainer.train()
    state = inner_optimizer(trainer).state
    for s in state.values():
        s.pop("momentum_buffer", None)
    rank.lower(trainer, 4, Residuals(trainer))
    for a in adapter.trained(trainer):
        for p in a.factors:
            s = inner_optimizer(trainer).state.get(p, {})
            for key, value in s.items():
                if key in {"exp_avg", "exp_avg_sq", "state1", "state2"}:
                    assert value.shape == p.shape
    trainer.model.train()
    batch = torch.arange(2, 26).reshape(2, 12)
    trainer.model(input_ids=batch, labels=batch).loss.backward()
    trainer.optimizer.step()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.integers(0, 12),
    st.integers(0, 2**31),
)  # fmt: skip
def test_the_gradient_of_a_lowered_product_is_the_mapped_gradient(
    r: int, inputs: int, outputs: int, learned: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, inputs, generator=generator, dtype=torch.double)
    b = torch.randn(outputs, r, generator=generator, dtype=torch.double)
    b[:, learned:] = 0
    for k in range(1, r):
        outer, inner, lost = rank.maps(a, b, k)
        assert outer.shape == (r, k)
        assert inner.shape == (k, r)
        values = torch.linalg.svdvals(b @ a)
        best = float(values[k:].norm())
        off = float((b @ outer @ inner @ a - b @ a).norm())
        scale = max(1.0, float(values[0]))
        assert off == pytest.approx(best, abs=1e-9 * scale)
        assert lost * float(values.norm()) == pytest.approx(best, abs=1e-9 * scale)


def test_lowering_takes_less_than_one_layers_worth(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    state = inner_optimizer(trainer).state
    adapters = adapter.trained(trainer)
    layer = max(4 * sum(p.numel() for p in a.parameters) for a in adapters)
    with VirtualCard("1GiB") as card:
        card.track(*trainer.model.parameters())
        card.track(*[t for s in state.values() for t in s.values()])
        before = card.live_bytes
        rank.lower(trainer, 4, Residuals(trainer))
        assert card.peak_bytes - before < layer
        assert card.live_bytes < before


def test_an_optimizer_whose_state_has_no_counterpart_is_refused_by_name(tmp_path: Path) -> None:
    trainer = make(tmp_path, "adafactor")
    trainer.train()
    assert "Adafactor keeps exp_avg_sq_row of a weight" in str(
        rank.refusal(trainer, 4, Residuals(trainer))
    )
    trainer = make(tmp_path)
    trainer.optimizer = torch.optim.Adagrad(adapter.trained(trainer)[0].parameters)
    assert "Adagrad keeps sum of a weight" in refused(trainer)


def refused(trainer: Any) -> str:
    return str(rank.refusal(trainer, 4, Residuals(trainer)))
