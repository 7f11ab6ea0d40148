"""The random state of everything a training step draws from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from oomguard.memory import device


@dataclass(frozen=True, eq=False)
class RandomState:
    """State of Python's, numpy's, torch's and every device's generator."""

    python: tuple[Any, ...]
    numpy: Any
    cpu: torch.Tensor
    devices: list[torch.Tensor]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RandomState)
            and self.python == other.python
            and all(map(np.array_equal, self.numpy, other.numpy))
            and all(map(torch.equal, self._tensors(), other._tensors()))
        )

    __hash__ = None  # type: ignore[assignment]

    def _tensors(self) -> list[torch.Tensor]:
        return [self.cpu, *self.devices]


def snapshot() -> RandomState:
    """The state now; the generators are not advanced."""
    return RandomState(
        random.getstate(), np.random.get_state(), torch.get_rng_state(), device.get_rng_states()
    )


def restore(state: RandomState) -> None:
    """Put every generator back.

    States are set, never seeds: `SeedableRandomSampler` reads `torch.initial_seed()`, which a
    `manual_seed` would change.
    """
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    device.set_rng_states(state.devices)
