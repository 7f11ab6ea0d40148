"""Whether memory that grows only waits for the garbage collector, and what keeps it waiting."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from weakref import ref

from oomguard.watch.census import is_tensor_on
from oomguard.watch.chain import find_chains
from oomguard.watch.graph import storage_of

_NAMED = 4  # tensors whose cycle is looked at


@dataclass(frozen=True)
class Collected:
    """What a collection freed.

    Attributes:
        objects: How many objects were unreachable.
        holder: What in the cycle holds the largest tensor among them; `None` if there was none.
    """

    objects: int
    holder: str | None


def collect(device_type: str) -> Collected:
    """Collect garbage, and name the cycle that held the largest tensors in it.

    Finalizers run and weak references end as in any other collection.

    Args:
        device_type: Of the tensors that are looked for.
    """
    flags, older = gc.get_debug(), len(gc.garbage)
    gc.set_debug(flags | gc.DEBUG_SAVEALL)
    try:
        gc.collect()
    finally:
        gc.set_debug(flags)
    count = len(gc.garbage) - older
    holder = _largest_holder(older, device_type) if count else None
    del gc.garbage[older:]
    gc.collect()
    return Collected(count, holder)


def _largest_holder(older: int, device_type: str) -> str | None:
    # No list of these tensors may be made: it would be found as what holds them.
    sizes = [
        (storage_of(gc.garbage[index])[1], index)
        for index in range(older, len(gc.garbage))
        if is_tensor_on(gc.garbage[index], device_type)
    ]
    largest = sorted(sizes, reverse=True)[:_NAMED]
    chains = find_chains([ref(gc.garbage[index]) for _, index in largest])
    return next((chain.text for chain in chains if chain is not None), None)
