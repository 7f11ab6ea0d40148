"""Trouble with memory that is planted in a training, and callbacks that are there half the time."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_checks.card import Session

_MIB = 2**20
_FROM_STEP = 16


class Plant(TrainerCallback):
    """Does harm at the end of every step from the 16th on, with a limit to what may be taken."""

    room_bytes: int | None = None  # beyond what is in use when it begins

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or go on."""
        if state.global_step == _FROM_STEP:
            self.begin(state.max_steps)
            if self.room_bytes is not None:
                allocated, reserved = self._session.peaks()
                self._session.limit((reserved or allocated) + self.room_bytes)
        elif state.global_step > _FROM_STEP:
            self.harm()

    def begin(self, steps: int) -> None:
        """Make ready."""

    def harm(self) -> None:
        """What is done after a step."""

    def remove(self) -> None:
        """Give back what the end of the training does not."""


class Tensors(Plant):
    """Keeps a tensor of 1 MiB a step."""

    room_bytes = 512 * _MIB

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.kept: list[torch.Tensor] = []

    def harm(self) -> None:
        """See `Plant`."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.kept.append(torch.zeros(_MIB // 4, device=device))


class Outside(Plant):
    """Takes 64 MiB a step from CUDA itself."""

    size_bytes = 64 * _MIB

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        major = (torch.version.cuda or "").partition(".")[0]
        self._runtime = ctypes.CDLL(f"libcudart.so.{major}")  # PyTorch has loaded it
        self._pointers: list[ctypes.c_void_p] = []

    def harm(self) -> None:
        """See `Plant`."""
        pointer = ctypes.c_void_p()
        code = self._runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(self.size_bytes))
        if code:
            msg = f"cudaMalloc of {self.size_bytes} bytes failed with code {code}"
            raise RuntimeError(msg)
        self._pointers.append(pointer)

    def remove(self) -> None:
        """See `Plant`."""
        for pointer in self._pointers:
            self._runtime.cudaFree(pointer)
        self._pointers.clear()


class Fragments(Plant):
    """Moves one live tensor a step into a pool of its own, as captured CUDA graphs have.

    What is live stays the same; of the 20 MiB that the allocator takes for each such tensor, the
    rest lies idle.
    """

    size_bytes = 3 * _MIB // 2

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._live: list[torch.Tensor] = []
        self._pools: list[Any] = []

    def begin(self, steps: int) -> None:
        """See `Plant`."""
        self.room_bytes = 1024 * _MIB + 20 * _MIB * (steps - _FROM_STEP)
        self._live = [self._new() for _ in range(steps)]

    def harm(self) -> None:
        """See `Plant`."""
        self._live.pop(0)
        self._pools.append(torch.cuda.MemPool())
        with torch.cuda.use_mem_pool(self._pools[-1]):
            self._live.append(self._new())

    def remove(self) -> None:
        """See `Plant`."""
        self._live.clear()
        self._pools.clear()

    def _new(self) -> torch.Tensor:
        return torch.empty(self.size_bytes, dtype=torch.uint8, device="cuda")


class Alternate(TrainerCallback):
    """Has other callbacks on the trainer for every other block of steps only."""

    def __init__(self, trainer: Any, watchers: Sequence[TrainerCallback], block: int) -> None:
        self._handler = trainer.callback_handler
        self._watchers = watchers
        self._block = block
        for watcher in watchers:
            trainer.add_callback(watcher)

    def is_on(self, step: int) -> bool:
        """Whether they hear of the step after so many."""
        return step // self._block % 2 == 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """They have heard of it."""
        self._put(on=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change at the end of a block; of the end of the training they hear too."""
        if state.global_step % self._block == 0:
            last = state.global_step == state.max_steps
            self._put(on=last or self.is_on(state.global_step))

    def _put(self, *, on: bool) -> None:
        others = [entry for entry in self._handler.callbacks if entry not in self._watchers]
        # A new list: the handler goes through the old one now.
        self._handler.callbacks = [*self._watchers, *others] if on else others
