"""`optimizer.step` happens wholly or not at all, and its operations are repeated, not the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bitsandbytes.optim import adamw as bitsandbytes
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Adafactor, TrainerCallback

import oomguard
from oomguard import LadderExhaustedError
from oomguard.optimizer_step import AtomicStep
from oomguard.retry import AllocationRetry, RetriedScalar
from oomguard.testing import VirtualCard
from tests import tiny
from tests.test_every_allocation import LoggingCard
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
    atomic_step = AtomicStep(forgive)
    for index in range(at + 2 if steps is None else steps):
        for p in weights:
            p.grad = torch.sin(p.detach() * (index + 1))
        if index == at:
            with card:
                atomic_step(optimizer, optimizer.step)
        else:
            atomic_step(optimizer, optimizer.step)
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
        atomic_step = AtomicStep(give_up)
        with pytest.raises(LadderExhaustedError), VirtualCard(fail_at=range(k, 10**4)):
            atomic_step(tried.optimizer, tried.optimizer.step)
        assert_equal(tried.content(), before.content())


def test_what_a_step_changes_besides_weights_and_moments_is_put_back_too() -> None:
    unharmed = twin(Unusual, 2, at=0)
    for k in range(1, unharmed.card.allocations + 1):
        faulted = train(Unusual, 2, VirtualCard(fail_at=k), at=0)
        assert_equal(faulted.content(), unharmed.content())


def test_a_weight_that_is_trained_later_than_the_others_gets_its_state_safely() -> None:
    def later(make: MakeOptimizer, card: VirtualCard) -> Trained:
        trained = train(make, 2, VirtualCard(fail_at=10**9), at=0, steps=0)
        atomic_step = AtomicStep(forgive)
        for index in range(3):
            for p in trained.weights[: 2 + (index > 0)]:
                p.grad = torch.sin(p.detach() * (index + 1))
            with card if index == 1 else VirtualCard(fail_at=10**9):
                atomic_step(trained.optimizer, trained.optimizer.step)
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


class _Ops(TorchDispatchMode):
    """Writes down the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_only_the_operation_that_failed_is_repeated() -> None:
    seen: list[tuple[int | None, int]] = []

    def remember(facts: OOMFacts, failures: int) -> None:
        seen.append((facts.asked_bytes, failures))

    x = torch.ones(300)
    with _Ops() as ops, VirtualCard(fail_at=(2, 3)), AllocationRetry(remember) as retry:
        y = x.mul(2)
        y.add_(1)
        z = y.div(3).neg()
    assert ops.names == ["mul", "add_", "div", "div", "div", "neg"]
    assert seen == [(1536, 1), (1536, 2)]
    assert retry.mutations == 1
    assert_equal(z, torch.full((300,), -1.0))


def test_what_fails_twice_and_all_that_follows_from_it_runs_on_the_host() -> None:
    x, weight, other = torch.arange(4.0), torch.ones(4), torch.ones(4)
    with (
        torch.no_grad(),
        _Ops() as ops,
        VirtualCard(fail_at=EVERY) as card,
        AllocationRetry(forgive, spill=True) as retry,
    ):
        root = x.add(1).square()
        part = root.view(2, 2)[1]  # a view of what is on the host
        part.add_(1)
        weight.addcdiv_(x, root, value=2)
        weight[2:].mul_(part)
        other.copy_(weight)
        other.add_(1)
        assert float(root.sum()) == 32
    # Tried twice; what follows from it is out of sight; what follows from weights is not.
    assert ops.names == ["add", "add", "slice", "copy_", "add_"]
    assert (card.live_bytes, retry.mutations) == (0, 5)
    expected = 1 + 2 * torch.arange(4.0) / torch.tensor([1.0, 4.0, 10.0, 17.0])
    expected[2:] *= torch.tensor([10.0, 17.0])
    assert_equal(weight, expected)
    assert_equal(other, expected + 1)


def test_in_place_operations_on_lists_change_the_tensors_they_were_given() -> None:
    torch.manual_seed(0)
    numbers = [torch.rand(40), torch.rand(3, 7), torch.rand(())]
    expected = [n / n.sqrt().add(0.1) for n in numbers]
    kept = list(numbers)
    with torch.no_grad(), VirtualCard(fail_at=EVERY), AllocationRetry(forgive, spill=True):
        roots = torch._foreach_sqrt(numbers)
        torch._foreach_add_(roots, 0.1)
        torch._foreach_div_(numbers, roots)
        norms = torch.stack(torch._foreach_norm(numbers))
    assert all(now is before for now, before in zip(numbers, kept, strict=True))
    assert_equal(numbers, expected)
    assert_equal(norms, torch.stack([n.norm() for n in expected]))


def test_one_failure_does_not_send_an_operation_to_the_host() -> None:
    x = torch.ones(300)
    with VirtualCard(fail_at=1) as card, AllocationRetry(forgive, spill=True):
        y = x.mul(2)
        assert card.live_bytes == 1536
    assert_equal(y, torch.full((300,), 2.0))


@pytest.mark.parametrize("spill", [False, True])
def test_an_error_while_room_is_made_stops_the_operation(spill: bool) -> None:
    enough = KeyboardInterrupt()

    def stop(facts: OOMFacts, failures: int) -> None:
        raise enough

    x = torch.ones(3)
    with _Ops() as ops, VirtualCard(fail_at=1), pytest.raises(KeyboardInterrupt) as raised:  # noqa: SIM117 - the modes are left by the error
        with AllocationRetry(stop, spill=spill):
            x.neg_().mul(2)
    assert raised.value is enough
    assert ops.names == ["neg_", "mul"]
    # No mode is left behind.
    with VirtualCard("1GiB") as card:
        y = torch.ones(3)
        assert (card.allocations, float(y.sum())) == (1, 3)


def test_an_error_that_is_no_out_of_memory_passes() -> None:
    def never(facts: OOMFacts, failures: int) -> None:
        raise AssertionError

    with AllocationRetry(never, spill=True):
        with pytest.raises(RuntimeError, match="must match the size") as raised:
            torch.ones(2) + torch.ones(3)
        assert raised.value.__traceback__ is not None
        with pytest.raises(IndexError):
            torch.ones(2)[5]


def test_the_numbers_that_a_repeated_operation_draws_are_the_same() -> None:
    own = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    expected = [torch.rand(3), torch.rand(3), torch.randint(9, (3,), generator=own)]
    own.manual_seed(1)
    torch.manual_seed(0)
    with VirtualCard(fail_at=(1, 3, 4, 6)), AllocationRetry(forgive):
        drawn = [torch.rand(3), torch.rand(3), torch.randint(9, (3,), generator=own)]
    assert_equal(drawn, expected)


class _Loss(RetriedScalar):
    make_room = staticmethod(forgive)  # type: ignore[assignment]


def test_what_the_trainer_does_with_its_loss_survives_any_failure() -> None:
    def as_the_trainer(loss: torch.Tensor) -> tuple[Any, ...]:
        total = torch.tensor(2.0)
        bad = bool(torch.isnan(loss) or torch.isinf(loss))
        total += loss
        total += total / (1 + 4 - 2)
        mean = total.detach().mean()
        return bad, loss > 0, float(total), mean.item(), round(loss.item() / 3, 4), -loss + 1

    loss = torch.tensor(0.25)
    with VirtualCard(fail_at=10**9) as card:
        expected = as_the_trainer(loss)
    assert card.allocations > 5
    for k in range(2, card.allocations + 1):  # the first one is none of the loss's
        with VirtualCard(fail_at=k):
            found = as_the_trainer(_Loss.of(loss))
        assert all(bool(one == other) for one, other in zip(found, expected, strict=True))
        assert isinstance(found[-1], _Loss)


def test_a_loss_that_outlives_its_guard_is_a_plain_tensor_in_all_but_name() -> None:
    loss = RetriedScalar.of(torch.tensor(0.25))
    assert isinstance(loss + 1, RetriedScalar)
    with VirtualCard(fail_at=1), pytest.raises(torch.OutOfMemoryError):
        loss + 1


SCALED = ["adamw fused", "adamw foreach", "adamw one by one", "sgd with momentum"]


def train_scaled(
    make: MakeOptimizer,
    card: VirtualCard,
    at: int,
    *,
    overflows: int = 0,
    make_room: Callable[[OOMFacts, int], None] = forgive,
) -> tuple[Trained, torch.amp.GradScaler]:
    """As `train`, under a scaler; the first gradients overflow, so that their steps are skipped."""
    torch.manual_seed(0)
    weights = [Parameter(torch.randn(24, 16)) for _ in range(3)]
    optimizer = make([{"params": weights[:2]}, {"params": weights[2:]}])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    atomic_step = AtomicStep(make_room)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    for index in range(at + 2):
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in weights), torch.tensor(0.0))
        scaler.scale(loss * (torch.inf if index < overflows else 1)).backward()
        # The Trainer does so at every step, for the norm's sake if not to clip.
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if index == at:
            with card:
                atomic_step(optimizer, step)
        else:
            atomic_step(optimizer, step)
    return Trained(weights, optimizer, card), scaler


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("overflows", [0, 1])
@pytest.mark.parametrize("name", SCALED)
def test_a_step_under_a_gradient_scaler_is_whole(name: str, overflows: int, at: int) -> None:
    fault_at = partial(train_scaled, OPTIMIZERS[name], at=at, overflows=overflows)
    unharmed, twin_scaler = fault_at(VirtualCard(fail_at=10**9))
    assert unharmed.card.allocations or overflows > at  # a step that is skipped
    for k in range(1, unharmed.card.allocations + 1):
        faulted, scaler = fault_at(VirtualCard(fail_at=k))
        assert_equal(faulted.content(), unharmed.content())
        assert scaler.state_dict() == twin_scaler.state_dict()


def test_state_is_not_made_on_the_host_after_a_step_that_the_scaler_skipped() -> None:
    make = OPTIMIZERS["adamw one by one"]
    train_once = partial(train_scaled, make, at=1, overflows=1, make_room=give_up)
    needed = train_once(VirtualCard("1GiB"))[0].card.peak_bytes
    with pytest.raises(LadderExhaustedError):
        train_once(VirtualCard(needed // 2))


def fp16_trainer(skipped: bool, folder: Path) -> Any:
    """Mixed precision with a real scaler, put together as accelerate does on a GPU."""
    trainer: Any = tiny.sft_trainer(
        folder,
        dataset=tiny.text_dataset(8),
        per_device_train_batch_size=1,
        max_length=16,
        max_steps=2,
        max_grad_norm=0.05,
        fp16=True,
        optim="adamw_torch" if skipped else "adamw_torch_fused",
    )
    assert trainer.accelerator.mixed_precision == "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**127 if skipped else 2.0**10, backoff_factor=2.0**-117
    )
    return trainer


@pytest.mark.parametrize("skipped", [False, True])
def test_unscaling_clipping_and_stepping_of_a_trainer_survive_a_failure(skipped: bool) -> None:
    build = partial(fp16_trainer, skipped)
    card = LoggingCard(build)
    twin = run(card.build, "default", card=card)
    assert not twin.recoveries
    assert math.isfinite(twin.logs[0]["grad_norm"]) != skipped
    assert math.isfinite(twin.logs[1]["grad_norm"])
    ends = card.numbers("clip", "optimizer")
    for k in (ends[0], *ends[3::17], ends[-1]):
        faulted = run(build, "default", card=VirtualCard(fail_at=k))
        assert_same(faulted, twin, EXACT)
        assert [recovery.event.phase for recovery in faulted.recoveries] == [card.places[k - 1][0]]
