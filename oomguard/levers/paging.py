"""Memory that bitsandbytes pages between device and host: given back when nobody uses it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from oomguard.memory import device

if TYPE_CHECKING:
    from torch import Tensor


def own(tensor: Tensor) -> Tensor:
    """Free a paged tensor with its last reference; any other tensor is left alone.

    bitsandbytes keeps every paged tensor in a list that nothing is ever taken from, and never frees
    the memory behind it.
    """
    if getattr(tensor, "is_paged", False):
        from bitsandbytes.functional import GlobalPageManager

        kept = GlobalPageManager.get_instance().paged_tensors
        kept[:] = [other for other in kept if other is not tensor]
        free = weakref.finalize(tensor.untyped_storage(), device.free_managed, tensor.data_ptr())
        free.atexit = False
    return tensor


def paged_so_far() -> tuple[Tensor, ...]:
    """Every paged tensor that bitsandbytes keeps now."""
    from bitsandbytes.functional import GlobalPageManager

    return tuple(GlobalPageManager.get_instance().paged_tensors)


def own_since(before: tuple[Tensor, ...]) -> None:
    """`own` every paged tensor that was made since `paged_so_far` returned `before`."""
    old = set(map(id, before))
    for tensor in paged_so_far():
        if id(tensor) not in old:
            own(tensor)


def own_all(optimizer: Any) -> None:
    """`own` every paged tensor of an optimizer that somebody else has made."""
    for state in optimizer.state.values():
        for value in state.values():
            if getattr(value, "is_paged", False) and _is_kept(value):
                own(value)


def page_again(optimizer: Any) -> None:
    """Page what loading a checkpoint has moved to the device, and own it all."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            value = state.get(key)
            if value is not None and value.is_cuda and not getattr(value, "is_paged", False):
                state[key] = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                state[key].copy_(value)
    own_all(optimizer)


def _is_kept(tensor: Tensor) -> bool:
    from bitsandbytes.functional import GlobalPageManager

    return any(other is tensor for other in GlobalPageManager.get_instance().paged_tensors)
