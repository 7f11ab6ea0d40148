"""Out-of-memory outside forward and backward: repeat the one operation that failed.

Between backward and the next batch a step mutates what cannot be recomputed: gradients are clipped,
moments and weights updated, the loader's iterator moves on. An operation that could not allocate
its result has changed nothing yet, so the code that called it waits while memory is made, and then
goes on as if the operation had been slow. Nothing is copied and nothing is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_map_only

from oomguard import oom, rng
from oomguard.memory import device

FORGIVEN = 2
"""Failures of one operation that may pass by themselves."""

T = TypeVar("T")
MakeRoom = Callable[[oom.OOMFacts, int], None]
"""Called with the failure and the number of failed tries of this operation; frees what it can.

Raises when nothing more can be done."""


def off_card() -> Any:
    """A context whose tensors belong to the host: a `VirtualCard` does not see them."""
    return _disable_current_modes()


def unwatched() -> Any:
    """A context outside any `AllocationRetry`, for work that only the host's memory can fail.

    While another mode is entered, a `VirtualCard` for example, the host's memory is its card's.
    """
    stack = _get_current_dispatch_mode_stack()
    if all(isinstance(mode, AllocationRetry) for mode in stack):
        return _disable_current_modes()
    return nullcontext()


def release_at_most(times: int) -> MakeRoom:
    """Makes room by releasing cached memory, so often for one operation and then no more."""

    def make_room(facts: oom.OOMFacts, failures: int) -> None:
        if failures > times:
            raise torch.OutOfMemoryError(facts.message)
        device.release_cached()

    return make_room


def watched() -> bool:
    """Whether operations run inside an `AllocationRetry`."""
    return any(isinstance(mode, AllocationRetry) for mode in _get_current_dispatch_mode_stack())


def again(
    make_room: MakeRoom, action: Callable[[], T], undo: Callable[[], None] = lambda: None
) -> T:
    """`action()`, repeated after every out-of-memory; `undo` takes back what it had done."""
    failures = 0
    while True:
        try:
            return action()
        except (RuntimeError, MemoryError) as error:
            facts = oom.caught(error)
        undo()
        failures += 1
        make_room(facts, failures)


class AllocationRetry(TorchDispatchMode):
    """While entered, an operation that runs out of memory is repeated after `make_room`.

    Args:
        make_room: Frees memory, or raises to give up: at once, or with `spill` when the region is
            left.
        spill: Whether an operation that fails again is computed on the host. Its results stay
            there, and what is computed with them too, until they are written back into a tensor of
            the device. Only for regions whose new tensors are temporary.

    Attributes:
        mutations: How many operations that change one of their arguments have run.
        spill: As given; may be set while entered.
        spilled: Whether something was computed on the host.
        failure: The last failure for which that was done.
    """

    def __init__(self, make_room: MakeRoom, *, spill: bool = False) -> None:
        super().__init__()
        self._make_room = make_room
        self.spill = spill
        self.mutations = 0
        self.spilled = False
        self.failure: oom.OOMFacts | None = None
        self._stopped: BaseException | None = None
        # By id, which lasts as long as the tensor: they tell which later operations follow them.
        self._on_host: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, making room as often as it fails."""
        kwargs = kwargs or {}
        failures = 0
        put_back_random_state = _random_state(func, kwargs)
        while not self._follows_host(args, kwargs):
            try:
                result = func(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                facts = oom.caught(error)
            else:
                self.mutations += func._schema.is_mutable
                return result
            put_back_random_state()
            failures += 1
            if self.spill and (self.spilled or failures > 1):
                # No room for one: not for the next one of this region either.
                self.spilled, self.failure = True, facts
                break
            try:
                # As outside of any operation: what makes room may run a model, which may use vmap.
                with torch._C._ForceDispatchKeyGuard(*self._keys):
                    self._make_room(facts, failures)
            except BaseException as error:
                if not self.spill:
                    raise
                # What is under way is finished first, on the host: it must not stay half done.
                self._stopped, self.spilled, self.failure = error, True, facts
                break
        self.mutations += func._schema.is_mutable
        return self._run_on_host(func, args, kwargs)

    def __enter__(self) -> Any:
        state = torch._C
        self._keys = (
            state._dispatch_tls_local_include_set(),
            state._dispatch_tls_local_exclude_set(),
        )
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> Any:
        self._on_host.clear()
        super().__exit__(*exc_info)
        if self._stopped is not None and exc_info[0] is None:
            raise self._stopped

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which operations run as if this had not been entered."""
        if _get_current_dispatch_mode_stack()[-1:] != [self]:
            yield
            return
        super().__exit__(None, None, None)
        try:
            yield
        finally:
            super().__enter__()

    def to_host(self, value: Any) -> Any:
        """A copy of nested tensors on the host, where what is computed with them is too."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            with off_card():
                copy = tensor.detach().to("cpu", copy=True)
            self._on_host[id(copy)] = copy
            return copy

        self.spilled = True
        return tree_map_only(torch.Tensor, move, value)

    def _follows_host(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not self._on_host:
            return False
        found = False

        def look(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal found
            found = found or id(tensor) in self._on_host
            return tensor

        tree_map_only(torch.Tensor, look, (args, kwargs))
        return found

    def _run_on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in self._on_host:
                return tensor
            if id(tensor) not in copies:
                copies[id(tensor)] = (tensor, tensor.detach().to("cpu", copy=True))
            return copies[id(tensor)][1]

        with off_card():
            host_args, host_kwargs = tree_map_only(torch.Tensor, to_host, (args, kwargs))
            if "device" in host_kwargs:
                host_kwargs["device"] = torch.device("cpu")
            result = func(*host_args, **host_kwargs)
            originals = {id(copy): tensor for tensor, copy in copies.values()}
            if func._schema.is_mutable:
                for tensor, copy in copies.values():
                    tensor.copy_(copy)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in originals:  # an in-place operation returns its argument
                return originals[id(tensor)]
            self._on_host[id(tensor)] = tensor
            return tensor

        return tree_map_only(torch.Tensor, keep, result)


def _random_state(func: Any, kwargs: dict[str, Any]) -> Callable[[], None]:
    """What puts back the generators that an operation draws from.

    A card allocates before it draws; a `VirtualCard` notices the allocation afterwards.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return lambda: None
    generator = kwargs.get("generator")
    own = None if generator is None else generator.get_state()
    state = rng.snapshot()

    def put_back() -> None:
        rng.restore(state)
        if generator is not None:
            generator.set_state(own)

    return put_back


class RetriedScalar(torch.Tensor):
    """The loss as the Trainer sees it: its own small arithmetic on it survives an out-of-memory.

    `Trainer` tests the loss for NaN and adds it up in the body of its loop, where no method can be
    overridden. Results of operations on it are of the same class.
    """

    make_room: ClassVar[MakeRoom | None] = None

    @classmethod
    def of(cls, loss: torch.Tensor) -> torch.Tensor:
        """`loss` itself, seen as this class."""
        return loss.as_subclass(cls)

    def plain(self) -> torch.Tensor:
        """The same tensor as a `torch.Tensor`."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, a single operation, as often as it takes while the guard is there."""
        run = partial(super().__torch_function__, func, types, args, kwargs or {})
        return run() if cls.make_room is None else again(cls.make_room, run)
