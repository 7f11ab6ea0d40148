"""From AdamW to bitsandbytes' 8-bit AdamW on a live optimizer: what stays and what it costs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim.adamw import AdamW, AdamW8bit
from bitsandbytes.optim.lion import Lion
from torch import nn

from oomguard.levers import moments, optimizer
from oomguard.levers.adapter import inner_optimizer
from oomguard.retry import AllocationRetry, release_at_most
from oomguard.testing import VirtualCard
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TARGET = "paged_adamw_8bit"


def full(folder: Path, **changes: Any) -> Any:
    """A full fine-tune whose larger weights bitsandbytes keeps in 8 bits."""
    return tiny.sft_trainer(
        folder,
        lora=None,
        model=tiny.llama(hidden_size=128, intermediate_size=256, num_hidden_layers=1),
        **{"max_steps": 2, "weight_decay": 0.1, "learning_rate": 1e-3, **changes},
    )


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    """A trainer after two steps."""
    trainer = full(tmp_path)
    trainer.train()
    return trainer


def with_optimizer(folder: Path, make: Callable[[Any], Any]) -> Any:
    trainer = full(folder)
    trainer.optimizers = None
    trainer.optimizer = make([p for p in trainer.model.parameters() if p.requires_grad])
    return trainer


def gradients(trainer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in trainer.model.parameters():
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)


def test_groups_rates_decay_and_step_counts_stay(trained: Any) -> None:
    wrapper, old = trained.optimizer, inner_optimizer(trained)
    keys = ("lr", "initial_lr", "betas", "eps", "weight_decay")
    settings = [[group[key] for key in keys] for group in old.param_groups]
    members = [[id(p) for p in group["params"]] for group in old.param_groups]
    optimizer.convert(trained)
    new = inner_optimizer(trained)
    assert trained.optimizer is wrapper
    assert trained.lr_scheduler.optimizer in (wrapper, new)
    assert isinstance(new, AdamW)
    assert [[group[key] for key in keys] for group in new.param_groups] == settings
    assert [[id(p) for p in group["params"]] for group in new.param_groups] == members
    assert {state["step"] for state in new.state.values()} == {2}
    assert trained.args.optim == "adamw_8bit", "without CUDA nothing is paged"
    assert not old.state


def test_large_moments_have_8_bits_and_embeddings_and_small_ones_32(trained: Any) -> None:
    optimizer.convert(trained)
    state = inner_optimizer(trained).state
    dtypes = {
        name: state[p]["state1"].dtype
        for name, p in trained.model.named_parameters()
        if "embed" in name or "norm" in name or "gate_proj" in name
    }
    assert dtypes.pop("model.layers.0.mlp.gate_proj.weight") == torch.uint8
    assert set(dtypes.values()) == {torch.float32}


def test_moments_are_off_by_no_more_than_the_8_bit_format_itself(trained: Any) -> None:
    old = copy.deepcopy({id(p): s for p, s in inner_optimizer(trained).state.items()})
    optimizer.convert(trained)
    for p, state in inner_optimizer(trained).state.items():
        for name, key in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
            exact, kept = old[id(p)][name], moments.read(state, key)
            if state[key].dtype != torch.uint8:
                assert torch.equal(exact, kept)
                continue
            code = state[f"qmap{key[-1]}"]
            half_gap = float((code[1:] - code[:-1]).max()) / 2
            blocks = exact.reshape(-1, moments.BLOCK).abs().amax(1, keepdim=True)
            off = (exact - kept).reshape(-1, moments.BLOCK).abs()
            zeroed = kept.reshape(-1, moments.BLOCK) == 0
            assert bool(((off <= blocks * half_gap * 1.01) | zeroed).all())


def test_one_step_after_it_is_one_of_the_8_bit_optimizer(trained: Any) -> None:
    """Against the exact step: within what rounding either moment to 8 bits can do to it.

    Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022), section 2: dynamic
    quantization has 256 values a block of 256 numbers, apart by at most 1/64 of the largest one.
    """
    exact = copy.deepcopy(inner_optimizer(trained))
    model, before = trained.model, tiny.weights(trained)
    for group in [*exact.param_groups, *inner_optimizer(trained).param_groups]:
        group["lr"] = 1e-3  # the schedule has ended at 0
    gradients(trained)
    copies = [p for group in exact.param_groups for p in group["params"]]
    originals = [p for g in inner_optimizer(trained).param_groups for p in g["params"]]
    for p, original in zip(copies, originals, strict=True):
        p.grad = original.grad.clone()
    optimizer.convert(trained)
    trained.optimizer.step()
    exact.step()
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()])
    names = {id(p): n for n, p in model.named_parameters()}
    wanted = {
        names[id(o)]: c.detach() - before[names[id(o)]]
        for o, c in zip(originals, copies, strict=True)
    }
    should = torch.cat([wanted[n].flatten() for n, _ in model.named_parameters()])
    assert torch.isfinite(moved).all()
    assert float(nn.functional.cosine_similarity(moved, should, dim=0)) > 0.99


def test_a_second_moment_of_zero_leaves_no_infinite_step() -> None:
    weight = nn.Parameter(torch.zeros(128, 64))
    adam = torch.optim.AdamW([weight], lr=1e-3)
    weight.grad = torch.randn(128, 64)
    weight.grad[::2] = 0
    adam.step()
    adam.state[weight]["exp_avg_sq"][1::2] *= 1e-12
    state: dict[str, Any] = {
        f"state{n}": torch.zeros(128, 64, dtype=torch.uint8) for n in (1, 2)
    } | {f"absmax{n}": torch.zeros(32) for n in (1, 2)}
    state["qmap1"] = functional.create_dynamic_map(signed=True)
    state["qmap2"] = functional.create_dynamic_map(signed=False)
    moments.fill(state, adam.state[weight]["exp_avg"], adam.state[weight]["exp_avg_sq"])
    first, second = moments.read(state, "state1"), moments.read(state, "state2")
    assert bool((first[second == 0] == 0).all())
    assert bool((first != 0).any())


def test_the_conversion_takes_no_more_than_it_frees(trained: Any) -> None:
    gradients(trained)
    with VirtualCard("1GiB") as card:
        card.track(trained.model)
        card.track(*[t for s in inner_optimizer(trained).state.values() for t in s.values()])
        before = card.live_bytes
        optimizer.convert(trained)
        largest = max(p.numel() for p in trained.model.parameters())
        # One weight's new moments stand beside its old ones, and a chunk's temporaries.
        assert card.peak_bytes - before <= 2 * largest + 6 * 4 * largest
        freed = before - card.live_bytes
    assert card.peak_bytes - before < freed


@pytest.mark.parametrize("k", range(1, 40, 3))
def test_any_allocation_of_it_may_fail(tmp_path: Path, k: int) -> None:
    trainer, twin = full(tmp_path), full(tmp_path)
    for each in (trainer, twin):
        each.train()
    optimizer.convert(twin)
    with VirtualCard(fail_at=k) as card, AllocationRetry(release_at_most(1)):  # as the guard does
        optimizer.convert(trainer)
    assert card.allocations >= k
    states = [list(inner_optimizer(t).state.values()) for t in (trainer, twin)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.SGD(p, lr=1.0), "SGD is not an Adam whose moments could be kept"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "Adam adds weight_decay to the gradient"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "bitsandbytes has no amsgrad"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "bitsandbytes has no maximize"),
        (Lion, "bitsandbytes Lion is not Adam"),
        (AdamW8bit, "it has 8 bits already, and without CUDA"),
        (
            lambda p: torch.optim.AdamW([nn.Parameter(q.double()) for q in p]),
            "no weights in torch.float64",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(
    tmp_path: Path, make: Callable[[Any], Any], reason: str
) -> None:
    trainer = with_optimizer(tmp_path, make)
    assert reason in str(optimizer.refusal(trainer, TARGET))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p, foreach=False),
        torch.optim.Adam,
        AdamW,
    ],
)
def test_each_adam_can_be(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    trainer = with_optimizer(tmp_path, make)
    assert optimizer.refusal(trainer, TARGET) is None
    trainer.train()
    before = [moments.to_host(s) for s in inner_optimizer(trainer).state.values()]
    optimizer.convert(trainer)
    after = [moments.to_host(s) for s in inner_optimizer(trainer).state.values()]
    assert len(before) == len(after) > 0
    for old, new in zip(before, after, strict=True):
        exact = old["exp_avg" if "exp_avg" in old else "state1"]
        torch.testing.assert_close(new["state1"], exact, rtol=0, atol=float(exact.abs().max()) / 60)
        assert new["step"] == int(old["step"])
