"""Real out-of-memory errors without a GPU."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection
from typing import Any, Self

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass_type,
)

from oomguard.errors import ConfigurationError
from oomguard.memory import simulated
from oomguard.memory.size import format_bytes, parse_bytes
from oomguard.memory.storages import owned_tensors, storages

_BLOCK_BYTES = 512  # kMinBlockSize of CUDACachingAllocator
# Of these ops the first argument says nothing about what was there before: `torch.tensor(...)` and
# `torch.load` make their memory out of sight and only then hand it to such an op.
_ATEN = torch.ops.aten
_BIRTHS = {_ATEN.lift_fresh.default, *(getattr(_ATEN.set_, x) for x in _ATEN.set_.overloads())}
_LEAF = torch.zeros((), requires_grad=True, device="cpu")


class VirtualCard(TorchDispatchMode):
    """Gives the CPU the memory of a card: code inside meets real `torch.OutOfMemoryError`s.

    Every tensor storage that an op returns is counted from there until it is freed, once however
    many tensors share it, in blocks of 512 bytes. In-place ops and views add nothing. Forward,
    backward, activation checkpointing, optimizers, evaluation and saving of an unchanged trainer
    are all followed:

        with VirtualCard(capacity_bytes="2GiB") as card:
            card.track(model)
            trainer.train()

    A failing op raises *after* it ran, and what it returned is freed. An op that only returns new
    tensors leaves no trace, as on a card. One that also writes elsewhere has written: batch
    normalisation has moved its running statistics, dropout has advanced the random generator, and
    a tensor that grew in place (`out=`, `resize_`) stays grown, counted at its old size, and asks
    again whenever an op returns it.

    What differs from a card:

    * Host and card are one memory here: batches count from the moment they are collated.
    * Memory inside one kernel is not seen: temporaries of fused ops, library workspaces, what a
      higher-order operator does inside. Neither are fragmentation and the context of a process.
    * Storages that were there before and are not given to `track` never count.
    * `untyped_storage().resize_` is noticed when an op returns the storage; a smaller size also
      when memory is short and when `live_bytes` is read.
    * Sparse tensors other than COO, and oneDNN's opaque ones, are not seen.
    * Only the thread that entered the card is followed; data-loader workers are not.
    * Allocations under `torch.utils._python_dispatch._disable_current_modes()` are host memory.
    * `torch.compile` runs its functions uncompiled inside, as under every dispatch mode;
      `fullgraph=True`, and flex attention with it, refuses to.
    * The traceback of an error pins the arguments of the op that failed, besides the usual frames.

    Cards nest, each with its own count. A card is entered once.

    Args:
        capacity_bytes: Memory of the card: bytes, or text such as `"2GiB"`. Unlimited if `None`.
        fail_at: Which allocations fail whatever is free: one number or several, counted from 1.

    Raises:
        ConfigurationError: Neither is given, or one of them is not above 0. A `ValueError` too.
    """

    # Those operators would refuse to run under the mode otherwise.
    supports_higher_order_operators = True

    def __init__(
        self,
        capacity_bytes: int | str | None = None,
        fail_at: int | Collection[int] | None = None,
    ) -> None:
        super().__init__()
        self._fail_at = _ordinals(fail_at)
        self._capacity_bytes = None if capacity_bytes is None else parse_bytes(capacity_bytes)
        if self._capacity_bytes == 0:
            msg = f"capacity_bytes={capacity_bytes!r}: a card needs memory, such as '2GiB'"
            raise ConfigurationError(msg)
        if self._capacity_bytes is None and not self._fail_at:
            msg = (
                "a VirtualCard needs (a) capacity_bytes, such as '2GiB', or (b) fail_at, the "
                f"number of an allocation; both are missing (fail_at={fail_at!r})"
            )
            raise ConfigurationError(msg)
        self._state = "new"
        self._held: dict[int, _Held] = {}
        self._live_bytes = 0
        self._peak_bytes = 0
        self._recent_peak_bytes = 0
        self._allocations = 0

    @property
    def live_bytes(self) -> int:
        """Bytes on the card now; after leaving it, those at the moment of leaving."""
        if self._state == "entered":
            self._settle()
        return self._live_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes that were ever on the card at once."""
        return self._peak_bytes

    @property
    def capacity_bytes(self) -> int | None:
        """Memory of the card; `None` if it is unlimited."""
        return self._capacity_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes counted now; unlike `live_bytes` it does not look for what was freed unseen."""
        return self._live_bytes

    def take_peak(self) -> int:
        """Most bytes that were on the card at once since the last call of this method."""
        peak, self._recent_peak_bytes = self._recent_peak_bytes, self._live_bytes
        return peak

    @property
    def allocations(self) -> int:
        """Allocations asked for so far, those that failed included; `track` asks for none."""
        return self._allocations

    def track(self, *items: torch.nn.Module | torch.Tensor) -> None:
        """Count what existed before the card was entered, as if it were loaded now.

        Args:
            items: Modules, of which parameters, buffers and gradients count, and tensors.

        Raises:
            torch.OutOfMemoryError: They do not fit; none of them counts then.
            RuntimeError: The card is not entered.
        """
        if self._state != "entered":
            msg = f"this VirtualCard is {self._state}: call track() inside its `with` block"
            raise RuntimeError(msg)
        loaded: list[int] = []
        for storage in storages(list(owned_tensors(items))):
            nbytes = _rounded(storage)
            if id(storage) in self._held or storage.device.type == "meta":
                continue
            if not self._fits(nbytes):
                refusal = self._refusal(nbytes)
                for key in loaded:
                    self._released(self._held[key])
                raise torch.OutOfMemoryError(refusal)
            self._hold(storage, nbytes)
            loaded.append(id(storage))

    def __enter__(self) -> Self:
        if self._state != "new":
            msg = f"this VirtualCard was {self._state} before: make a new one for every `with`"
            raise RuntimeError(msg)
        self._state = "entered"
        self._pid = os.getpid()
        super().__enter__()
        simulated.enter(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        simulated.leave(self)
        self._state = "left"
        self._held.clear()  # the weak references go, and their callbacks with them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # the wrapper calls back with the plain tensors inside it
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        refusal = self._count(out, (args[1:] if func in _BIRTHS else args, kwargs))
        if refusal is None:
            return out
        del out  # the traceback pins this frame
        raise torch.OutOfMemoryError(refusal)

    def _count(self, out: Any, inputs: Any) -> str | None:
        """Count what an op returned; the text of the error where it does not fit."""
        for storage in storages(out):
            nbytes = _rounded(storage)
            held = self._held.get(id(storage))
            if held is None:
                if storage.device.type == "meta":
                    continue  # fake tensors too
                if any(storage is old for old in storages(inputs)):
                    continue  # older than the card
                if nbytes and (refusal := self._request(nbytes)):
                    return refusal
                self._hold(storage, nbytes)
            elif nbytes != held.nbytes:
                if nbytes > held.nbytes and (refusal := self._request(nbytes)):
                    return refusal
                self._resize(held, nbytes)
        return None

    def _request(self, nbytes: int) -> str | None:
        if os.getpid() != self._pid:
            return None  # a forked data-loader worker: its memory is host memory
        self._allocations += 1
        if self._allocations in self._fail_at or not self._fits(nbytes):
            return self._refusal(nbytes)
        return None

    def _fits(self, nbytes: int) -> bool:
        if self._capacity_bytes is None or self._live_bytes + nbytes <= self._capacity_bytes:
            return True
        self._settle()
        return self._live_bytes + nbytes <= self._capacity_bytes

    def _settle(self) -> None:
        """Notice what a card would have free by now."""
        # Autograd's queue of this thread keeps what a failed backward left in it, graph and
        # gradients, until the next backward, however small; that of a GPU drops it at once.
        with _disable_current_modes():
            torch.autograd.grad(_LEAF, _LEAF)
        for held in list(self._held.values()):
            storage = held()
            if storage is not None and _rounded(storage) < held.nbytes:
                self._resize(held, _rounded(storage))

    def _hold(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        held = _Held(storage, self._released)
        held.key, held.nbytes = id(storage), nbytes
        self._held[held.key] = held
        self._live_bytes += nbytes
        self._rises_to(self._live_bytes)

    def _resize(self, held: _Held, nbytes: int) -> None:
        if nbytes > held.nbytes:
            # A card copies into the larger block before it frees the smaller one.
            self._rises_to(self._live_bytes + nbytes)
        self._live_bytes += nbytes - held.nbytes
        held.nbytes = nbytes

    def _rises_to(self, live_bytes: int) -> None:
        self._peak_bytes = max(self._peak_bytes, live_bytes)
        self._recent_peak_bytes = max(self._recent_peak_bytes, live_bytes)

    def _released(self, held: _Held) -> None:
        del self._held[held.key]
        self._live_bytes -= held.nbytes

    def _refusal(self, nbytes: int) -> str:
        """The message of CUDACachingAllocator.cpp, word for word, with this card's numbers."""
        live = self._live_bytes
        capacity = live if self._capacity_bytes is None else self._capacity_bytes
        return (
            f"CUDA out of memory. Tried to allocate {format_bytes(nbytes)}. "
            f"GPU 0 has a total capacity of {format_bytes(capacity)} "
            f"of which {format_bytes(capacity - live)} is free. "
            f"Including non-PyTorch memory, this process has {format_bytes(live)} memory in use. "
            f"Of the allocated memory {format_bytes(live)} is allocated by PyTorch, "
            "and 0 bytes is reserved by PyTorch but unallocated. "
            "If reserved but unallocated memory is large try setting "
            "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  "
            "See documentation for Memory Management  "
            "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
        )


class _Held(weakref.ref[torch.UntypedStorage]):
    """One storage on the card and the bytes it counts for."""

    __slots__ = ("key", "nbytes")
    key: int
    nbytes: int


def _rounded(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES


def _ordinals(fail_at: int | Collection[int] | None) -> frozenset[int]:
    if fail_at is None:
        return frozenset()
    numbers = fail_at if isinstance(fail_at, Collection) else (fail_at,)
    wrong = [n for n in numbers if not isinstance(n, int) or isinstance(n, bool) or n < 1]
    if wrong:
        msg = f"fail_at={fail_at!r}: {wrong[0]!r} is not the number of an allocation (1, 2, 3, …)"
        raise ConfigurationError(msg)
    return frozenset(numbers)
