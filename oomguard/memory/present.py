"""The card that is here, with what can be measured of it."""

from __future__ import annotations

from oomguard.memory import device
from oomguard.memory.cards import Card


def present_card() -> Card | None:
    """The first GPU of this process; `None` where there is none.

    Its memory, and CUDA's context once there is one, are measured and stand in place of what the
    table of cards says.
    """
    found = next(iter(device.devices()), None)
    if found is None:
        return None
    return Card.measured(found.name, found.total_bytes, device.context_bytes())
