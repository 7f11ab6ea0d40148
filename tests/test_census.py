"""Which tensors a census finds, and that looking at them changes nothing."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from oomguard.watch.census import Census
from oomguard.watch.cycles import collect
from oomguard.watch.graph import saved_by

if TYPE_CHECKING:
    from collections.abc import Callable

    from oomguard.watch.holding import Holding


class Keeper:
    """Keeps what it is told to."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.some: list[Any] = []


def holdings(step: Callable[[int], None], steps: int = 12, every: int = 4) -> list[Holding]:
    census = Census("cpu")
    for number in range(1, steps + 1):
        step(number)
        if number % every == 0:
            census.mark()
    assert census.is_complete
    return census.holdings()


def test_a_census_of_steps_that_leave_nothing_is_empty() -> None:
    layer, last = nn.Linear(64, 64), Keeper()

    def step(_: int) -> None:
        last.all = [layer(torch.ones(8, 64))]

    assert holdings(step) == []


def test_a_fake_tensor_is_nothing_that_is_kept() -> None:
    keeper, mode = Keeper(), FakeTensorMode()

    def step(_: int) -> None:
        with mode:
            keeper.all.append(torch.ones(1024, 1024))

    assert holdings(step) == []


def test_what_was_kept_before_the_first_mark_is_no_survivor() -> None:
    keeper = Keeper()

    def step(number: int) -> None:
        if number < 4:
            keeper.all.append(torch.zeros(1000))

    assert holdings(step) == []


def test_every_holder_is_told_the_largest_first_and_small_ones_left_out() -> None:
    keeper = Keeper()

    def step(_: int) -> None:
        keeper.all.append(torch.zeros(100_000))
        keeper.some.append(torch.zeros(50_000))
        keeper.__dict__.setdefault("few", []).append(torch.zeros(100))

    found = holdings(step)
    roots = [holding.chain.root for holding in found if holding.chain is not None]
    assert roots == ["Keeper.all", "Keeper.some"]
    assert [holding.count for holding in found] == [4, 4]
    assert [holding.size_bytes for holding in found] == [4 * 400_384, 4 * 200_192]


def test_many_tiny_tensors_are_told_by_their_number() -> None:
    keeper = Keeper()

    def step(_: int) -> None:
        keeper.all += [torch.zeros(1) for _ in range(100)]
        keeper.some.append(torch.zeros(100_000))

    found = holdings(step)
    assert {h.chain.root for h in found if h.chain is not None} == {"Keeper.all", "Keeper.some"}


def test_a_graph_that_is_kept_counts_with_what_it_saves() -> None:
    layer, keeper = nn.Linear(256, 256), Keeper()

    def step(_: int) -> None:
        keeper.all.append(layer(torch.ones(64, 256)).sigmoid().mean())

    (found,) = holdings(step)
    assert (found.manner, found.node) == ("graph", "SigmoidBackward0")
    assert found.chain is not None
    assert found.chain.root == "Keeper.all"
    assert found.size_bytes >= 4 * 2 * 64 * 256 * 4


def test_a_graph_that_went_through_backward_saves_nothing() -> None:
    layer = nn.Linear(256, 256)
    loss = layer(torch.ones(64, 256)).sigmoid().mean()
    assert sum(size for size, _ in saved_by(loss.grad_fn, 100)[0].values()) > 0
    loss.backward()
    assert saved_by(loss.grad_fn, 100)[0] == {}


def test_looking_at_a_checkpointed_graph_does_not_run_it_again() -> None:
    calls = []

    def block(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return hidden.exp().sin()

    hidden = torch.ones(64, requires_grad=True)
    loss = checkpoint(block, hidden * 2, use_reentrant=False).sum()
    saved_by(loss.grad_fn, 100)
    assert len(calls) == 1


def test_a_cycle_is_collected_and_named() -> None:
    class Node:
        def __init__(self) -> None:
            self.activation = torch.zeros(1000)
            self.itself = self

    gc.collect()  # what other tests have left
    Node()
    found = collect("cpu")
    assert found.objects > 0
    assert found.holder == "Node.activation"
    assert collect("cpu").holder is None
