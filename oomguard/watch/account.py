"""What of the allocated bytes is weights, gradients and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes of what a training consists of on one kind of device."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


def account(model: torch.nn.Module, optimizer: Any) -> Account:
    """Add up parameters and buffers, gradients and optimizer state.

    Those on a GPU count if the model has any parameter there, else those on the CPU. Left out is
    what PyTorch's allocator does not hold: the pages of paged optimizer states. What quantised
    weights keep beside their values counts for none of the three.

    Args:
        model: Tied weights count once.
        optimizer: A `torch.optim.Optimizer` or what stands for one; `None` without one.
    """
    parameters = list(model.parameters())
    on_gpu = any(parameter.is_cuda for parameter in parameters)
    states = getattr(optimizer, "state", None) or {}
    found = (
        chain(parameters, model.buffers()),
        (parameter.grad for parameter in parameters if parameter.grad is not None),
        _tensors(states.values()),
    )
    return Account(*(_bytes(tensors, on_gpu) for tensors in found))


def _bytes(tensors: Iterable[torch.Tensor], on_gpu: bool) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in tensors
        if tensor.is_cuda is on_gpu and not getattr(tensor, "is_paged", False)
    )


def _tensors(states: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in states:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
