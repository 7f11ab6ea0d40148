"""`optimizer.step` happens wholly or not at all, and its operations are repeated, not the step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bitsandbytes.optim import adamw as bitsandbytes
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from transformers import Adafactor, TrainerCallback

import oomguard
from oomguard import LadderExhaustedError
from oomguard.optimizer_step import AtomicStep
from oomguard.testing import VirtualCard
from tests import tiny
from tests.twin import EXACT, assert_same, run

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.oom import OOMFacts

Groups = list[dict[str, Any]]
MakeOptimizer = Callable[[Groups], Optimizer]
EVERY = range(1, 10**5)  # as `fail_at`: not one allocation succeeds


class Unusual(Optimizer):
    """Counts steps in its groups, keeps lists of moments and decays in place of the gradient.

    Each of it is the way of optimizers in use; none is that of those in torch.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                p.grad.add_(p, alpha=0.1)
                if "moments" not in state:
                    state["moments"] = [torch.zeros_like(p), torch.zeros_like(p)]
                first, second = state["moments"]
                first.lerp_(p.grad, 0.1)
                second.lerp_(p.grad.square(), 0.01)
                p.sub_(first / second.sqrt().add_(1e-8), alpha=group["lr"] / group["step"])


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw fused": partial(AdamW, lr=0.1, fused=True),
    "adamw foreach": partial(AdamW, lr=0.1, foreach=True),
    "adamw one by one": partial(AdamW, lr=0.1, foreach=False),
    "amsgrad": partial(Adam, lr=0.1, amsgrad=True),
    "adafactor": partial(Adafactor, lr=None, warmup_init=True),
    "adafactor with momentum": partial(Adafactor, lr=0.1, relative_step=False, beta1=0.9),
    "sgd": partial(SGD, lr=0.1),
    "sgd with decay": partial(SGD, lr=0.1, weight_decay=0.1, foreach=True),
    "sgd with momentum": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": partial(Adagrad, lr=0.1),
    "rmsprop": partial(RMSprop, lr=0.1, momentum=0.9, centered=True),
    "adamw 8-bit": partial(bitsandbytes.AdamW8bit, lr=0.1, min_8bit_size=256),
    "adamw of bitsandbytes": partial(bitsandbytes.AdamW, lr=0.1),
}
ALLOCATE_NOTHING_LATER = {"adamw fused", "sgd", "adamw 8-bit", "adamw of bitsandbytes"}


def forgive(facts: OOMFacts, failures: int) -> None:
    """Room is there at the next try."""


def give_up(facts: OOMFacts, failures: int) -> None:
    """As at the end of a ladder: one failure is forgiven, since garbage has been collected."""
    if failures > 1:
        raise LadderExhaustedError(facts.message)


@dataclass
class Trained:
    """Weights and optimizer after some steps."""

    weights: list[Parameter]
    optimizer: Optimizer
    card: VirtualCard

    def content(self) -> dict[str, Any]:
        """A copy of all that a step may change."""
        return copy.deepcopy(
            {
                "weights": [p.detach() for p in self.weights],
                "state": [dict(self.optimizer.state.get(p, {})) for p in self.weights],
                "groups": [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in self.optimizer.param_groups
                ],
            }
        )


def train(
    make: MakeOptimizer, groups: int, card: VirtualCard, at: int, steps: int | None = None
) -> Trained:
    """Step three weights, spread over some groups; step `at`, counted from 0, on the card."""
    torch.manual_seed(0)
    weights = [Parameter(torch.randn(24, 16)) for _ in range(3)]
    sets = [weights[:1], weights[1:2], weights[2:]] if groups == 3 else [weights[:2], weights[2:]]
    sets = [weights] if groups == 1 else sets
    optimizer = make([{"params": part} for part in sets])
    atomic_step = AtomicStep(forgive, lambda _: None)
    for index in range(at + 2 if steps is None else steps):
        for p in weights:
            p.grad = torch.sin(p.detach() * (index + 1))
        if index == at:
            with card:
                atomic_step(lambda: optimizer, optimizer.step)
        else:
            atomic_step(lambda: optimizer, optimizer.step)
    return Trained(weights, optimizer, card)


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def twin(make: MakeOptimizer, groups: int, at: int, steps: int | None = None) -> Trained:
    return train(make, groups, VirtualCard(fail_at=10**9), at, steps)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whichever_allocation_of_the_first_step_fails_the_step_is_whole(
    name: str, groups: int
) -> None:
    unharmed = twin(OPTIMIZERS[name], groups, at=0)
    assert unharmed.card.allocations or name == "sgd"
    for k in range(1, unharmed.card.allocations + 1):
        faulted = train(OPTIMIZERS[name], groups, VirtualCard(fail_at=k), at=0)
        assert_equal(faulted.content(), unharmed.content())


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whichever_allocation_of_a_later_step_fails_the_step_is_whole(
    name: str, groups: int
) -> None:
    unharmed = twin(OPTIMIZERS[name], groups, at=2)
    assert (unharmed.card.allocations == 0) == (name in ALLOCATE_NOTHING_LATER)
    for k in range(1, unharmed.card.allocations + 1):
        for fail_at in ((k,), (k, k + 1)):  # repeated on the card; on the host
            faulted = train(OPTIMIZERS[name], groups, VirtualCard(fail_at=fail_at), at=2)
            assert_equal(faulted.content(), unharmed.content())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_later_step_needs_no_memory_at_all(name: str) -> None:
    faulted = train(OPTIMIZERS[name], 1, VirtualCard(fail_at=EVERY), at=2)
    assert_equal(faulted.content(), twin(OPTIMIZERS[name], 1, at=2).content())


# The state of Adagrad is made with it: every step of it is a later one.
@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"adagrad"}))
def test_a_first_step_that_cannot_be_made_has_not_been_begun(name: str) -> None:
    before = twin(OPTIMIZERS[name], 2, at=0, steps=0)
    begun = twin(OPTIMIZERS[name], 2, at=0, steps=1)
    for k in range(1, begun.card.allocations + 1):
        torch.manual_seed(0)
        tried = twin(OPTIMIZERS[name], 2, at=0, steps=0)
        for p in tried.weights:
            p.grad = torch.sin(p.detach())
        atomic_step = AtomicStep(give_up, lambda _: None)
        with pytest.raises(LadderExhaustedError), VirtualCard(fail_at=range(k, 10**4)):
            atomic_step(partial(getattr, tried, "optimizer"), tried.optimizer.step)
        assert_equal(tried.content(), before.content())


def test_what_a_step_changes_besides_weights_and_moments_is_put_back_too() -> None:
    unharmed = twin(Unusual, 2, at=0)
    for k in range(1, unharmed.card.allocations + 1):
        faulted = train(Unusual, 2, VirtualCard(fail_at=k), at=0)
        assert_equal(faulted.content(), unharmed.content())


def test_a_weight_that_is_trained_later_than_the_others_gets_its_state_safely() -> None:
    def later(make: MakeOptimizer, card: VirtualCard) -> Trained:
        trained = train(make, 2, VirtualCard(fail_at=10**9), at=0, steps=0)
        atomic_step = AtomicStep(forgive, lambda _: None)
        for index in range(3):
            for p in trained.weights[: 2 + (index > 0)]:
                p.grad = torch.sin(p.detach() * (index + 1))
            with card if index == 1 else VirtualCard(fail_at=10**9):
                atomic_step(lambda: trained.optimizer, trained.optimizer.step)
        return Trained(trained.weights, trained.optimizer, card)

    for make in OPTIMIZERS["adamw foreach"], OPTIMIZERS["adafactor"], Unusual:
        unharmed = later(make, VirtualCard(fail_at=10**9))
        for k in range(1, unharmed.card.allocations + 1):
            faulted = later(make, VirtualCard(fail_at=k))
            assert_equal(faulted.content(), unharmed.content())


class Neighbour(TrainerCallback):
    """Another process that takes what is free of the card while the optimizer steps."""

    def __init__(self, step: int) -> None:
        self.card = VirtualCard("1GiB")
        self.before: list[torch.Tensor] = []
        self.state_before: list[int] = []
        self._step = step
        self._ballast: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            optimizer = kwargs["optimizer"]
            self.state_before = [len(kept) for kept in optimizer.state.values()]
            self.before = [p.detach().clone() for p in kwargs["model"].parameters()]
            self._ballast = torch.empty(2**30 - self.card.live_bytes, dtype=torch.uint8)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ballast = None


def full_fine_tune(
    make: MakeOptimizer, neighbour: Neighbour | None, folder: Path, **changes: Any
) -> Any:
    """Three steps of a model that is trained whole, with two param groups."""
    model = tiny.llama(num_hidden_layers=1)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = make([{"params": decayed, "weight_decay": 0.1}, {"params": others}])
    trainer = tiny.sft_trainer(
        folder,
        lora=None,
        model=model,
        trainer_arguments={"optimizers": (optimizer, None)},
        dataset=tiny.text_dataset(8),
        per_device_train_batch_size=1,
        max_length=16,
        max_steps=3,
        **changes,
    )
    if neighbour is not None:
        trainer.add_callback(neighbour)
    return trainer


@pytest.mark.parametrize(
    "name",
    [
        "adamw fused",
        "adamw foreach",
        "adafactor with momentum",
        "sgd with momentum",
        "adamw 8-bit",
    ],
)
def test_state_that_does_not_fit_ends_the_training_before_its_first_step(
    name: str, tmp_path: Path
) -> None:
    neighbour = Neighbour(step=1)
    trainer = full_fine_tune(OPTIMIZERS[name], neighbour, tmp_path)
    with neighbour.card, pytest.raises(LadderExhaustedError, match="in optimizer of optimizer"):
        oomguard.fit(trainer)
    assert_equal([p.detach() for p in trainer.model.parameters()], neighbour.before)
    assert not any(trainer.optimizer.state.values())
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", ["adamw foreach", "adamw one by one", "adafactor with momentum"])
def test_temporaries_of_a_later_step_that_do_not_fit_are_computed_on_the_host(name: str) -> None:
    neighbour = Neighbour(step=2)
    build = partial(full_fine_tune, OPTIMIZERS[name], neighbour)
    ladder = oomguard.Ladder(oomguard.CheckpointActivations())
    faulted = run(build, ladder, card=neighbour.card)
    assert {recovery.event.phase for recovery in faulted.recoveries} == {"optimizer"}
    assert all(neighbour.state_before)
    assert_same(faulted, run(partial(full_fine_tune, OPTIMIZERS[name], None)), EXACT)


@pytest.mark.parametrize("packing", [False, True])
def test_looking_for_a_rung_without_any_memory_leaves_a_later_step_whole(packing: bool) -> None:
    # The size of a packed batch, and what a rung would make of any batch, take tensors to tell.
    make = OPTIMIZERS["adamw foreach"]
    neighbour = Neighbour(step=2)
    ladder = oomguard.Ladder(oomguard.HalveSequence(floor=4), oomguard.SplitBatch())
    build = partial(full_fine_tune, make, neighbour, packing=packing)
    faulted = run(build, ladder, card=neighbour.card)
    assert faulted.recoveries
    assert_same(faulted, run(partial(full_fine_tune, make, None, packing=packing)), EXACT)
