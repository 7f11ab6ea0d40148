"""When collating is watched for out-of-memory errors: not while only the host takes part."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import BatchEncoding

from oomguard.feed import Feed
from oomguard.retry import AllocationRetry
from oomguard.testing import VirtualCard

if TYPE_CHECKING:
    from collections.abc import Iterator

UNLIMITED = "1TiB"


def raise_it(*_: Any) -> None:
    raise AssertionError


def batches(watched: list[bool], device: str) -> Iterator[Any]:
    """Batches that a loader makes, each with a tensor of the host and one of `device`."""
    for _ in range(4):
        stack = _get_current_dispatch_mode_stack()
        watched.append(any(isinstance(mode, AllocationRetry) for mode in stack))
        yield BatchEncoding(
            {"rows": torch.zeros(2), "more": {"hint": torch.zeros(2, device=device)}}
        )


@pytest.mark.parametrize(
    ("device", "card", "expected"),
    [
        ("cpu", False, [True, False, False, False]),
        ("meta", False, [True] * 4),  # stands for a GPU
        ("cpu", True, [True] * 4),
    ],
)
def test_collating_is_watched_where_a_card_takes_part(
    device: str, card: bool, expected: list[bool]
) -> None:
    watched: list[bool] = []
    with VirtualCard(UNLIMITED) if card else nullcontext(), AllocationRetry(raise_it):
        assert len(list(Feed(raise_it).iterate(batches(watched, device)))) == 4
    assert watched == expected
