"""`optimizer.step` wholly or not at all.

The first step of an optimizer creates its state parameter by parameter while it already updates
others, and a device too small for that state must end in a clean error or another plan: it runs
with host copies of what it may change and is undone if it fails. Every later step allocates
temporaries only: a failed operation is repeated, at last on the host, so that the step completes.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from oomguard import oom
from oomguard.errors import OomguardError
from oomguard.retry import AllocationRetry, MakeRoom, off_card

if TYPE_CHECKING:
    from collections.abc import Callable


class AtomicStep:
    """Runs `optimizer.step` so that no out-of-memory leaves it half done."""

    def __init__(self, make_room: MakeRoom) -> None:
        """Take what to call when an allocation of the step fails."""
        self._make_room = make_room
        self._stepped: set[int] = set()  # ids of parameters, which `_optimizer` keeps alive
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None

    def __call__(self, optimizer: torch.optim.Optimizer, step: Callable[..., Any]) -> Any:
        """`step()`, the bound original method of `optimizer`."""
        if self._optimizer() is not optimizer:
            self._optimizer = weakref.ref(optimizer)
            self._stepped.clear()
        fresh = self._without_state(optimizer)
        if not fresh:
            return self._steady(step)
        # A gradient scaler that finds an infinity leaves the step out, and no state is created.
        hook = optimizer.register_step_post_hook(lambda *_: self._stepped.update(fresh))
        try:
            return self._create_state(optimizer, step)
        finally:
            hook.remove()

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
                    return step()
                except (RuntimeError, MemoryError) as error:
                    facts = oom.classify(error)
                    if facts is None:
                        raise
                    oom.release(error)
                if retry.mutations != mutations:
                    msg = (
                        f"optimizer.step ran out of memory outside any PyTorch operation "
                        f"({facts.message}) after it had updated a part of the weights. They "
                        "cannot be trusted: resume from the last checkpoint."
                    )
                    raise OomguardError(msg)
                self._make_room(facts, 1)

    def _create_state(self, optimizer: torch.optim.Optimizer, step: Callable[..., Any]) -> Any:
        failures = 0
        before = _HostCopy(optimizer)
        while True:
            try:
                return step()
            except (RuntimeError, MemoryError) as error:
                facts = oom.classify(error)
                if facts is None:
                    raise
                oom.release(error)
            before.restore(optimizer)
            failures += 1
            self._make_room(facts, failures)


class _HostCopy:
    """Parameters, state and group settings of an optimizer, copied to the host."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        with off_card(), torch.no_grad():
            self._groups = [
                {key: value for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups
            ]
            self._params = [
                (p, p.detach().to("cpu", copy=True))
                for group in optimizer.param_groups
                for p in group["params"]
                if p.grad is not None
            ]
            self._states = {
                p: {key: _copied(value) for key, value in optimizer.state[p].items()}
                for p, _ in self._params
                if optimizer.state.get(p)
            }

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Put everything back in place; state that was not there is dropped."""
        with off_card(), torch.no_grad():
            for group, settings in zip(optimizer.param_groups, self._groups, strict=True):
                group.update(settings)
            for p, saved in self._params:
                p.copy_(saved)
                known = self._states.get(p)
                if known is None:
                    optimizer.state.pop(p, None)
                    continue
                for key, value in known.items():
                    if isinstance(value, torch.Tensor):
                        optimizer.state[p][key].copy_(value)
                    else:
                        optimizer.state[p][key] = value


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
