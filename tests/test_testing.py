from __future__ import annotations

import copy
import io
import re

import pytest
import torch

from oomguard.testing import VirtualCard

KIB = 1024
MESSAGE = re.compile(
    r"CUDA out of memory\. Tried to allocate (?P<asked>[\d.]+ \w+)\. "
    r"GPU 0 has a total capacity of (?P<total>[\d.]+ \w+) of which (?P<free>[\d.]+ \w+) is free\. "
    r"Including non-PyTorch memory, this process has (?P<used>[\d.]+ \w+) memory in use\. "
    r"Of the allocated memory (?P<allocated>[\d.]+ \w+) is allocated by PyTorch, "
    r"and 0 bytes is reserved by PyTorch but unallocated\. "
    r"If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF="
)


def roomy() -> VirtualCard:
    return VirtualCard("1 GiB")


def test_a_tensor_counts_in_blocks_of_512_bytes() -> None:
    with roomy() as card:
        large = torch.zeros(1000)
        assert (card.live_bytes, card.allocations) == (4096, 1)
        small = torch.zeros(1)
        assert (card.live_bytes, card.allocations) == (4096 + 512, 2)
        assert large.shape[0] + small.shape[0] == 1001


def test_an_empty_tensor_is_no_allocation() -> None:
    with roomy() as card:
        empty = torch.empty(0)
        assert (card.live_bytes, card.allocations, empty.numel()) == (0, 0, 0)


def test_views_and_in_place_ops_add_nothing() -> None:
    with roomy() as card:
        tensor = torch.zeros(1000)
        view = tensor.view(10, 100).t()[3:]
        tensor.add_(1).mul_(2)
        assert (card.live_bytes, card.allocations) == (4096, 1)
        del tensor
        assert card.live_bytes == 4096
        del view
        assert card.live_bytes == 0


def test_freed_memory_leaves_the_count_but_not_the_peak() -> None:
    with roomy() as card:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(500)
        assert (card.live_bytes, card.peak_bytes, card.allocations) == (2048, 4096, 2)
        del second
    assert (card.live_bytes, card.peak_bytes, card.allocations) == (0, 4096, 2)


def test_tensors_made_of_python_data_or_of_a_file_count() -> None:
    file = io.BytesIO()
    torch.save(torch.zeros(1000), file)
    file.seek(0)
    with roomy() as card:
        listed = torch.tensor([0.0] * 1000)
        assert (card.live_bytes, card.allocations) == (4096, 1)
        loaded = torch.load(file)
        assert (card.live_bytes, card.allocations) == (2 * 4096, 2)
        copied = copy.deepcopy(loaded)
        assert card.live_bytes == 3 * 4096
        assert len(listed) == len(copied)


def test_what_an_op_returns_in_lists_counts() -> None:
    with roomy() as card:
        roots = torch._foreach_sqrt([torch.ones(128), torch.ones(256)])
        assert (card.live_bytes, card.allocations, len(roots)) == (512 + 1024, 4, 2)


def test_what_was_there_before_the_card_is_not_counted_unless_tracked() -> None:
    weight = torch.nn.Parameter(torch.zeros(1000))
    with roomy() as card:
        view = weight.detach().view(10, 100).t()
        view.add_(1)
        torch.arange(1000, out=weight.detach())
        assert (card.live_bytes, card.allocations) == (0, 0)
        card.track(weight, weight)
        assert (card.live_bytes, card.peak_bytes, card.allocations) == (4096, 4096, 0)
        view.mul_(2)
        assert card.live_bytes == 4096


def test_tracking_a_module_counts_parameters_buffers_and_gradients_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 1), torch.nn.BatchNorm1d(1))
    model.append(model[0])  # shared weights
    model[0].weight.grad = torch.zeros(1, 128)
    with roomy() as card:
        card.track(model, torch.empty(10, device="meta"))
        # weight, its gradient and bias; weight, bias, two statistics and a counter
        assert card.live_bytes == (3 + 5) * 512
        model[0].weight.grad = None
        assert card.live_bytes == 7 * 512


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_fail_at_fails_that_allocation_and_no_other(failing: int) -> None:
    alive: list[torch.Tensor] = []
    with VirtualCard(fail_at=failing) as card:
        for number in (1, 2, 3):
            if number == failing:
                with pytest.raises(torch.OutOfMemoryError):
                    alive.append(torch.zeros(1000))
            else:
                alive.append(torch.zeros(1000))
            assert card.allocations == number
        assert card.live_bytes == 2 * 4096
        # Without a capacity the card is as large as what is on it.
        assert "capacity of 4.00 KiB of which 0 bytes" in refusal_of(VirtualCard(fail_at=2))


def refusal_of(card: VirtualCard) -> str:
    """The message of the second of two allocations of 4096 bytes."""
    with card:
        kept = torch.zeros(1000)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            kept = torch.cat([kept, torch.zeros(1000)])
    return str(caught.value)


def test_several_allocations_can_fail() -> None:
    failed = []
    with VirtualCard("1GiB", fail_at={2, 3}):
        for number in range(1, 6):
            try:
                torch.zeros(1)
            except torch.OutOfMemoryError:
                failed.append(number)
    assert failed == [2, 3]


def test_a_full_card_raises_and_the_failed_tensor_does_not_count() -> None:
    with VirtualCard(10 * KIB) as card:
        kept = torch.zeros(1000)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.zeros(2000)
        # Even while the traceback of the error lives.
        assert (card.live_bytes, card.peak_bytes, card.allocations) == (4096, 4096, 2)
        assert caught.value.__traceback__ is not None
        exact_fit = torch.zeros(6 * KIB // 4)
        assert card.live_bytes == 10 * KIB
        assert len(kept) + len(exact_fit) == 1000 + 6 * KIB // 4


def test_what_an_op_returned_besides_the_tensor_that_failed_is_freed() -> None:
    with VirtualCard(10 * KIB) as card:
        kept = torch.zeros(1000)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.sort(kept)  # values fit, their indices do not
        assert caught.value.__traceback__ is not None
        assert (card.live_bytes, card.peak_bytes, card.allocations) == (4096, 8192, 3)


def test_the_message_reads_like_that_of_cuda() -> None:
    with VirtualCard("3MiB") as card:
        card.track(torch.zeros(0))
        kept = torch.zeros(2**18)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
            torch.zeros(3 * 2**18)
    found = MESSAGE.match(str(caught.value))
    assert found is not None
    assert found.groupdict() == {
        "asked": "3.00 MiB",
        "total": "3.00 MiB",
        "free": "2.00 MiB",
        "used": "1024.00 KiB",
        "allocated": "1024.00 KiB",
    }
    assert len(kept) == 2**18


def test_tracking_more_than_the_card_holds_raises_and_counts_nothing() -> None:
    model = torch.nn.Linear(1024, 3)
    with VirtualCard(12 * KIB) as card:
        with pytest.raises(torch.OutOfMemoryError, match=r"allocate 512 bytes.*12\.00 KiB of whic"):
            card.track(model)
        assert card.live_bytes == 0
        card.track(model.weight)
        assert card.live_bytes == 12 * KIB


def test_a_storage_that_grows_in_place_is_an_allocation() -> None:
    with VirtualCard(8 * KIB) as card:
        tensor = torch.empty(0)
        torch.add(torch.zeros(256), 1, out=tensor)
        assert (card.live_bytes, card.allocations) == (1024, 2)
        tensor.resize_(512)
        # The old kilobyte is copied before it is freed.
        assert (card.live_bytes, card.peak_bytes, card.allocations) == (2048, 3072, 3)
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 8\.00 KiB"):
            tensor.resize_(2048)
        assert card.live_bytes == 2048
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 8\.00 KiB"):
            tensor.zero_()


def test_a_tensor_set_to_another_storage_frees_its_old_one() -> None:
    with roomy() as card:
        tensor = torch.zeros(1000)
        tensor.set_(torch.zeros(128))  # type: ignore[call-overload]
        assert card.live_bytes == 512


def test_a_storage_shrunk_by_hand_is_noticed_when_memory_is_short() -> None:
    with VirtualCard(8 * KIB) as card:
        tensor = torch.zeros(1000)
        tensor.untyped_storage().resize_(0)
        whole = torch.zeros(2 * KIB)
        assert (card.live_bytes, len(whole)) == (8 * KIB, 2 * KIB)
        whole.untyped_storage().resize_(0)
        assert card.live_bytes == 0


def test_meta_and_fake_tensors_take_no_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with roomy() as card:
        meta = torch.zeros(1000, device="meta") + 1
        with FakeTensorMode():
            fake = torch.zeros(1000) @ torch.zeros(1000)
        assert (card.live_bytes, card.allocations) == (0, 0)
        assert (meta.shape[0], fake.dim()) == (1000, 0)


def test_the_parts_of_wrapper_and_sparse_tensors_count() -> None:
    table = torch.nn.Embedding(1000, 128, sparse=True)
    with roomy() as card:
        ragged = torch.nested.nested_tensor([torch.ones(100), torch.ones(156)], layout=torch.jagged)
        before = card.live_bytes
        allocations = card.allocations
        doubled = ragged * 2
        assert doubled.values().numel() == 256
        assert (card.live_bytes, card.allocations) == (before + 1024, allocations + 1)
        before = card.live_bytes
        table(torch.tensor([1, 2])).sum().backward()
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse
        assert card.live_bytes == before + 512 + 1024  # indices and two rows
        del doubled


def test_a_tracked_wrapper_counts_as_the_tensors_inside() -> None:
    ragged = torch.nested.nested_tensor([torch.ones(100), torch.ones(156)], layout=torch.jagged)
    with roomy() as card:
        card.track(ragged)
        assert card.live_bytes == 1024 + 512  # values and offsets
        ragged.values().add_(1)
        assert card.allocations == 0
