"""`optimizer.step` wholly or not at all.

The first step of an optimizer creates its state parameter by parameter while it already updates
others, and a device too small for that state must end in a clean error or another plan: it runs
with host copies of what it may change and is undone if it fails. Every later step allocates
temporaries only: a failed operation is repeated, at last on the host, so that the step completes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from oomguard import oom
from oomguard.errors import OomguardError
from oomguard.retry import AllocationRetry, MakeRoom, off_card

if TYPE_CHECKING:
    from collections.abc import Callable


class AtomicStep:
    """Runs `optimizer.step` so that no out-of-memory leaves it half done."""

    def __init__(self, make_room: MakeRoom, relieve: Callable[[oom.OOMFacts], None]) -> None:
        """Take what to call when an allocation of the step fails.

        Args:
            make_room: Called between two tries; it may put another optimizer in place.
            relieve: Called after a step that was finished on the host.
        """
        self._make_room = make_room
        self._relieve = relieve
        self._stepped: set[int] = set()  # ids of parameters, which `_optimizer` keeps alive
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None

    def __call__(
        self, optimizer: Callable[[], torch.optim.Optimizer], step: Callable[..., Any]
    ) -> Any:
        """`step()`, which steps what `optimizer()` returns at that time."""
        failures = 0
        while True:
            current = optimizer()
            if self._optimizer() is not current:
                self._optimizer = weakref.ref(current)
                self._stepped.clear()
            fresh = self._without_state(current)
            if not fresh:
                return self._steady(step)
            # A gradient scaler that finds an infinity leaves the step out: no state is created.
            hook = current.register_step_post_hook(
                lambda *_, made=fresh: self._stepped.update(made)
            )
            copy = _HostCopy(current)
            try:
                return step()
            except (RuntimeError, MemoryError) as error:
                facts = oom.caught(error)
            finally:
                hook.remove()
            copy.restore(current)
            failures += 1
            self._make_room(facts, failures)

    def _without_state(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """Ids of parameters that the coming step may create state for.

        SGD without momentum never has any, hence the memory of what was stepped before.
        """
        state = optimizer.state
        return {
            id(p)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) not in self._stepped and p.grad is not None and not state.get(p)
        }

    def _steady(self, step: Callable[..., Any]) -> Any:
        with AllocationRetry(self._make_room, spill=True) as retry:
            while True:
                mutations = retry.mutations
                try:
                    result = step()
                    break
                except (RuntimeError, MemoryError) as error:
                    facts = oom.caught(error)
                if retry.mutations != mutations:
                    msg = (
                        f"optimizer.step ran out of memory outside any PyTorch operation "
                        f"({facts.message}) after it had updated a part of the weights. They "
                        "cannot be trusted: resume from the last checkpoint."
                    )
                    raise OomguardError(msg)
                self._make_room(facts, 1)
        if retry.failure is not None:
            self._relieve(retry.failure)
        return result


class _HostCopy:
    """All that a step may change, copied to the host."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        with off_card(), torch.no_grad():
            self._groups = [dict(group) for group in optimizer.param_groups]
            stepped = [p for group in self._groups for p in group["params"] if p.grad is not None]
            # Gradients too: some optimizers add the decay of the weights to them.
            self._tensors = [_saved(tensor) for p in stepped for tensor in (p, p.grad)]
            self._states = {p: tree_map(_saved, dict(optimizer.state.get(p, {}))) for p in stepped}

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Put everything back in place; settings and state that were not there are dropped."""
        with off_card(), torch.no_grad():
            for group, settings in zip(optimizer.param_groups, self._groups, strict=True):
                group.clear()
                group.update(settings)
            tree_map(_put_back, self._tensors)
            for p, state in self._states.items():
                optimizer.state.pop(p, None)
                if state:
                    optimizer.state[p] = tree_map(_put_back, state)


@dataclass(frozen=True)
class _Saved:
    tensor: torch.Tensor
    copy: torch.Tensor


def _saved(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return _Saved(value, value.detach().to("cpu", copy=True))


def _put_back(value: Any) -> Any:
    return value.tensor.copy_(value.copy) if isinstance(value, _Saved) else value
