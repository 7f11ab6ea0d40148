"""Batches on their way from the data loader to the step, none lost and none twice.

An exception that passes through a data loader's iterator ends it, with the samples it had drawn. So
what can run out of memory is made to survive it in place: operation by operation, and where an
error is raised in Python, the dataset's access, the collator and the move to the device as a whole.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from oomguard import oom, rng
from oomguard.retry import again, unwatched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oomguard.retry import MakeRoom

T = TypeVar("T")

_OWN = ("wrapped", "make_room")  # the attributes of a wrapper itself


def fetch(make_room: MakeRoom, batches: Iterator[Any], get: Callable[[Iterator[Any]], T]) -> T:
    """`get(batches)`, repeated over the same batches where memory ran out in `get` itself."""
    taken: list[Any] = []
    over = False

    def recorded() -> Iterator[Any]:
        nonlocal over
        over = True  # unless it yields again: an iterator that raised is over, and so is the epoch
        for batch in batches:
            taken.append(batch)
            over = False
            yield batch
            over = True

    failures = 0
    while True:
        try:
            return get(chain(list(taken), recorded()))
        except (RuntimeError, MemoryError) as error:
            if over:
                raise
            facts = oom.caught(error)
        failures += 1
        make_room(facts, failures)


class _Retried:
    """A collator or a dataset whose calls are repeated after an out-of-memory.

    A data-loader worker gets a copy that only passes calls on: it is another process, whose memory
    is the host's.
    """

    def __init__(self, wrapped: Any, make_room: MakeRoom) -> None:
        self.wrapped = wrapped
        self.make_room: MakeRoom | None = make_room

    def __getstate__(self) -> dict[str, Any]:
        return {"wrapped": self.wrapped, "make_room": None}

    def _call(self, action: Callable[..., T], *args: Any) -> T:
        if self.make_room is None or get_worker_info() is not None:
            return action(*args)
        draw_again = partial(rng.restore, rng.snapshot())
        return again(self.make_room, partial(action, *args), draw_again)


class _RetriedCollator(_Retried):
    def __call__(self, features: list[Any]) -> Any:
        return self._call(self.wrapped, features)


class _RetriedDataset(_Retried, Dataset[Any]):
    def __getattr__(self, name: str) -> Any:
        if name in _OWN:  # not set yet while it is being unpickled
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Workers and callbacks set things on the data set they see, for its methods to read.
        if name in _OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.wrapped, name, value)

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getitem__(self, index: Any) -> Any:
        return self._call(self.wrapped.__getitem__, index)

    def __getitems__(self, indices: list[int]) -> Any:
        return self._call(self._fetch, indices)

    def _fetch(self, indices: list[int]) -> Any:
        if getattr(self.wrapped, "__getitems__", None):
            return self.wrapped.__getitems__(indices)
        return [self.wrapped[index] for index in indices]


class Feed:
    """Makes a data loader's batches survive an out-of-memory on their way to the device."""

    def __init__(self, make_room: MakeRoom) -> None:
        self._make_room = make_room
        self._move: Callable[[Any], Any] = lambda batch: batch
        self._undo: list[Callable[[], None]] = []

    def attach(self, loader: Any) -> Any:
        """Prepare the training data loader until `detach`; returns it."""
        self.detach()
        plain = getattr(loader, "base_dataloader", loader)
        if isinstance(plain, DataLoader):
            if not isinstance(plain.dataset, IterableDataset):
                # DataLoader forbids setting `dataset`, because a sampler was made for the old one;
                # this one has the same length and the same items.
                self._replace(plain, "dataset", _RetriedDataset(plain.dataset, self._make_room))
            collator = _RetriedCollator(plain.collate_fn, self._make_room)
            self._replace(plain, "collate_fn", collator)
        target = getattr(loader, "device", None)
        if isinstance(target, torch.device):
            # accelerate would move the batch inside its generator, where a failure is final.
            non_blocking = getattr(loader, "_non_blocking", False)
            self._replace(loader, "device", None)
            self._move = lambda batch: send_to_device(batch, target, non_blocking=non_blocking)
        return loader

    def detach(self) -> None:
        """Leave the loader as it was."""
        while self._undo:
            self._undo.pop()()
        self._move = lambda batch: batch

    def iterate(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of `batches`, moved to the device; read it under an `AllocationRetry`."""
        host_only = False
        while True:
            try:
                # Collating takes hundreds of small operations, and to watch them takes time.
                with unwatched() if host_only else nullcontext():
                    batch = next(batches)
            except StopIteration:
                return
            host_only = _on_host(batch)
            yield again(self._make_room, partial(self._move, batch))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        original = vars(owner)[name]
        vars(owner)[name] = value
        self._undo.append(lambda: vars(owner).__setitem__(name, original))


def _on_host(batch: Any) -> bool:
    """Whether all its tensors are the host's, so that making the next one takes no device."""
    kinds: set[str] = set()
    recursively_apply(lambda tensor: kinds.add(tensor.device.type), batch)
    return kinds <= {"cpu"}
