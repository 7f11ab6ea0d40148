"""An operation that runs out of memory is repeated, at last on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from oomguard.retry import AllocationRetry, RetriedScalar
from oomguard.testing import VirtualCard
from tests.test_optimizer_step import EVERY, assert_equal, forgive

if TYPE_CHECKING:
    from oomguard.oom import OOMFacts

Groups = list[dict[str, Any]]
MakeOptimizer = Callable[[Groups], Optimizer]


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


def test_what_makes_room_runs_as_outside_of_any_operation() -> None:
    gradients: list[torch.Tensor | None] = []

    def run_a_model(facts: OOMFacts, failures: int) -> None:
        x = torch.arange(4.0, requires_grad=True)
        below = torch.vmap(lambda row: (x <= row).clone(memory_format=torch.contiguous_format))
        below(torch.arange(3.0)).to(x).mul(x).sum().backward()
        gradients.append(x.grad)

    x = torch.ones(300)
    with VirtualCard(fail_at=1) as card, AllocationRetry(run_a_model) as retry:
        y = x.mul(2)
    assert_equal(y, torch.full((300,), 2.0))
    (gradient,) = gradients
    assert gradient is not None
    assert_equal(gradient, torch.tensor([3.0, 2.0, 1.0, 0.0]))
    assert card.allocations > 5  # it is still on the card
    assert retry.mutations == 0


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
