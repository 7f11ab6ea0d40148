"""Memory that each training of a process leaves behind, as that of an old trainer's optimizer."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from oomguard.memory import simulated
from oomguard.memory.size import format_bytes
from oomguard.watch.census import Census
from oomguard.watch.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Callable

_ADVICE = (
    "drop old trainers with their optimizers, and what refers to them (del, then gc.collect()), "
    "before the next one is made"
)
_PARTS = (nn.Module, torch.optim.Optimizer, Trainer, TrainerCallback)  # what holds these is asked
_ALIKE = 4  # the second rise is between a quarter of the first and four times it


class Trainings:
    """What was allocated beyond the new trainer's own when each training began."""

    def __init__(self) -> None:
        self._floors: list[int] = []
        self._where: tuple[str, int] | None = None

    def begin(
        self, device_type: str, read_bytes: Callable[[], int], least_bytes: int
    ) -> Finding | None:
        """Call it when a training begins.

        Args:
            device_type: Of the tensors in question.
            read_bytes: Reads what is allocated beyond the new trainer's own.
            least_bytes: A rise below this is none.

        Returns:
            A finding, where the last two trainings have left about as much.
        """
        where = device_type, id(simulated.current())
        if where != self._where:
            self._where, self._floors = where, []
            self._census = Census(device_type)
        if self._floors:
            gc.collect()  # trainers are full of reference cycles
        self._floors.append(read_bytes())
        self._census.mark()
        if len(self._floors) < Census.MARKS:
            return None
        first, second, third = self._floors[-Census.MARKS :]
        left = second - first, third - second
        if min(left) < least_bytes or max(left) > _ALIKE * min(left):
            return None
        return self._told(sum(left) // 2, len(self._floors) - 1)

    def _told(self, left_bytes: int, trainings: int) -> Finding:
        chains = (holding.chain for holding in self._census.holdings(beyond=_PARTS))
        chain = next((chain for chain in chains if chain is not None), None)
        held = "" if chain is None else f" Held by {chain.text}."
        return Finding(
            kind="leak",
            message=(
                f"Every training of this process leaves {format_bytes(left_bytes)} behind, "
                f"{trainings} so far.{held} What to do: {_ADVICE}."
            ),
            step=0,
            bytes_so_far=left_bytes * trainings,
            phase="training",
            holder=None if chain is None else chain.text,
            advice=_ADVICE,
        )
