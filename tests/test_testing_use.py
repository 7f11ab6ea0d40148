from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from oomguard.testing import VirtualCard

if TYPE_CHECKING:
    from collections.abc import Callable

KIB = 1024


def roomy() -> VirtualCard:
    return VirtualCard("1 GiB")


def test_host_memory_is_allocated_with_the_modes_off() -> None:
    with roomy() as card, _disable_current_modes():
        host = torch.zeros(1000)
    assert (card.live_bytes, card.allocations, len(host)) == (0, 0, 1000)


def test_cards_nest_and_count_each_for_itself() -> None:
    with VirtualCard(8 * KIB) as outer:
        first = torch.zeros(1000)
        with VirtualCard(4 * KIB) as inner:
            second = torch.zeros(1000)
            with pytest.raises(torch.OutOfMemoryError, match=r"capacity of 8\.00 KiB"):
                torch.zeros(1)
            assert (outer.live_bytes, inner.live_bytes) == (2 * 4096, 4096)
            del first
            with pytest.raises(torch.OutOfMemoryError, match=r"capacity of 4\.00 KiB"):
                torch.zeros(1)
            assert (outer.live_bytes, inner.live_bytes) == (4096, 4096)
        del second
        assert (outer.live_bytes, inner.live_bytes) == (0, 4096)


def test_a_card_is_entered_once() -> None:
    card = roomy()
    with pytest.raises(RuntimeError, match="is new: call track"):
        card.track(torch.zeros(1))
    with card:
        with pytest.raises(RuntimeError, match="was entered before"):
            card.__enter__()
        torch.zeros(1)
    with pytest.raises(RuntimeError, match="was left before"):
        card.__enter__()
    with pytest.raises(RuntimeError, match="is left: call track"):
        card.track(torch.zeros(1))


@pytest.mark.parametrize(
    ("capacity_bytes", "fail_at"),
    [
        (None, None), (None, ()), (0, None), (-1, None), (True, None), ("much", None),
        (None, 0), (None, True), (None, [1, 0]), (None, "1"), (None, 1.5),
    ],
)  # fmt: skip
def test_a_card_that_makes_no_sense_is_a_value_error(capacity_bytes: Any, fail_at: Any) -> None:
    with pytest.raises(ValueError, match=r"(VirtualCard|capacity_bytes|fail_at|not a size)"):
        VirtualCard(capacity_bytes, fail_at)


def test_nothing_stays_alive_or_followed_after_leaving() -> None:
    card = roomy()
    with card:
        kept = torch.zeros(1000)
        callbacks = weakref.getweakrefcount(kept.untyped_storage())
        assert callbacks == 1
    assert weakref.getweakrefcount(kept.untyped_storage()) == 0
    freed = weakref.ref(kept.untyped_storage())
    card_gone = weakref.ref(card)
    del kept
    assert freed() is None
    assert card.live_bytes == 4096
    del card
    gc.collect()
    assert card_gone() is None


def test_memory_falls_back_once_the_exception_is_dropped() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    with VirtualCard("200 KiB") as card:
        card.track(model)
        level = card.live_bytes
        try:
            model(torch.ones(100, 64)).sum().backward()
        except torch.OutOfMemoryError:
            assert card.live_bytes > level
        assert card.live_bytes == level


def test_a_failed_backward_leaves_nothing_wherever_it_failed() -> None:
    layer = torch.nn.Linear(64, 64)

    def losses() -> torch.Tensor:
        hidden = layer(torch.ones(100, 64))
        return torch.sum(hidden.exp() + layer(hidden))

    with roomy() as card:
        losses()
        forward = card.allocations
        losses().backward()
        whole = card.allocations - forward
        layer.zero_grad()
    assert whole > forward
    for failing in range(forward + 1, whole + 1):
        # Once `live_bytes` is asked, once a card that is full.
        with VirtualCard("1GiB", fail_at=failing) as card:
            with pytest.raises(torch.OutOfMemoryError):
                losses().backward()
            layer.zero_grad()
            assert card.live_bytes == 0, failing
        with VirtualCard("256KiB", fail_at=failing) as card:
            with pytest.raises(torch.OutOfMemoryError):
                losses().backward()
            layer.zero_grad()
            assert torch.zeros(256, 256).shape == (256, 256)


def test_the_count_can_be_read_in_the_middle_of_a_backward() -> None:
    def gradient(read: Callable[[], int]) -> torch.Tensor:
        leaf = torch.linspace(0, 1, 100, requires_grad=True)
        branches = [leaf.exp(), leaf.sin(), checkpoint(torch.tanh, leaf, use_reentrant=False)]
        for branch in branches:
            branch.register_hook(lambda _: [read() for _ in range(3)] and None)
        return torch.autograd.grad(torch.stack(branches).sum(), leaf)[0]

    plain = gradient(lambda: 0)
    with roomy() as card:
        assert torch.equal(gradient(lambda: card.live_bytes), plain)


def peak_of(run: Callable[[], object]) -> int:
    with roomy() as card:
        run()
    return card.peak_bytes


def test_no_grad_and_checkpointing_lower_the_peak_as_on_a_card() -> None:
    layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(6)]

    def forward(*, recompute: bool) -> torch.Tensor:
        hidden = torch.ones(256, 64, requires_grad=True)
        for layer in layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if recompute else layer(hidden)
        return hidden.sum()

    whole = peak_of(lambda: forward(recompute=False).backward())
    recomputed = peak_of(lambda: forward(recompute=True).backward())
    with torch.no_grad():
        inference = peak_of(lambda: forward(recompute=False))
    assert inference < recomputed < whole


@pytest.mark.parametrize("early", [True, False])
def test_compiled_functions_are_followed(early: bool) -> None:
    compiled = torch.compile(lambda x: (x + 1) * 2, backend="aot_eager")
    if early:
        compiled(torch.zeros(1000))
    with roomy() as card:
        result = compiled(torch.zeros(1000))
        assert (card.live_bytes, card.peak_bytes) == (4096, 3 * 4096)
        assert len(result) == 1000


def test_what_a_higher_order_operator_returns_counts() -> None:
    condition, given = torch.tensor(data=True), torch.zeros(1000)
    with roomy() as card:
        result = torch.ops.higher_order.cond(condition, torch.neg, torch.abs, (given,))
        assert (card.live_bytes, card.allocations, len(result)) == (4096, 1, 1000)


class Rows(Dataset[torch.Tensor]):
    """Each row is cut out of something larger than the card."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2000,), index)[:64].clone()


def test_the_memory_of_data_loader_workers_is_not_the_cards() -> None:
    with VirtualCard(4 * KIB) as card:
        total = sum(int(row.sum()) for row in DataLoader(Rows(), num_workers=1))
        assert total == 64 * (0 + 1 + 2 + 3)
        assert 512 <= card.peak_bytes <= 4 * KIB
