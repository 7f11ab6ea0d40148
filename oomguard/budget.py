"""What a plan may take: a card by name or size, the GPU that is here, or a `VirtualCard`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from oomguard.errors import ConfigurationError
from oomguard.memory import simulated
from oomguard.memory.cards import HOST, Card
from oomguard.memory.present import present_card
from oomguard.prediction.result import CLOSED_FORM, TRACED

if TYPE_CHECKING:
    from oomguard.prediction.result import Estimate

_OFF = {TRACED: 1.01, CLOSED_FORM: 1.1}
# Plans found for a card reserved up to 4.6 % more than estimated; where 2 % were left for that, one
# took the whole card (gpu_checks.find).
_RESERVED_OFF = {TRACED: 1.05, CLOSED_FORM: 1.1}


@dataclass(frozen=True)
class Budget:
    """The memory of a card.

    Attributes:
        card: The card; its `total_bytes` is known.
        simulated: Whether it is a `VirtualCard`, which has neither context nor cache.
        given: Whether the user named it.
    """

    card: Card
    simulated: bool
    given: bool

    @classmethod
    def of(cls, card: Card | str | int | None) -> Budget:
        """The budget of a card, or of the one that is here if `None`.

        Raises:
            ConfigurationError: It is no card, or none is named and none is here.
        """
        named, virtual = Card.of(card), simulated.current()
        if virtual is not None and virtual.capacity_bytes is not None:
            total = min(virtual.capacity_bytes, named.total_bytes or virtual.capacity_bytes)
            found = replace(HOST, name="VirtualCard", total_bytes=total)
            return cls(found, simulated=True, given=card is not None)
        if card is None:
            named = present_card() or Card.of(None)
        if named.total_bytes is None:
            msg = (
                "there is no GPU here whose memory could be asked for: name a card, such as "
                "card='12GiB' or card='RTX 4090'"
            )
            raise ConfigurationError(msg)
        return cls(named, simulated=False, given=card is not None)

    @property
    def total_bytes(self) -> int:
        """Memory of the card."""
        return self.card.total_bytes or 0

    def surely_holds(self, estimate: Estimate) -> bool:
        """Whether a plan fits: usually with all that it reserves, and always if that is given back.

        A plan that usually fits only if the allocator gives cached blocks back in time may fail:
        which blocks are cached where depends on more than an estimate knows.
        """
        return self.usually_holds(estimate) and self.barely_holds(estimate)

    def usually_holds(self, estimate: Estimate) -> bool:
        """Whether what a plan usually reserves fits, with what estimates are off by."""
        if self.simulated:
            return self.holds(estimate, _OFF[estimate.method])
        needed = _RESERVED_OFF[estimate.method] * estimate.peak_reserved_bytes
        return needed <= (self.card.usable_bytes or 0)

    def barely_holds(self, estimate: Estimate) -> bool:
        """Whether a plan fits if cached blocks are given back in time.

        Under a lower limit they are given back sooner, after which a plan may fit that does not
        under a higher one: both are asked.
        """
        return self.holds(estimate, _OFF[estimate.method]) and self.holds(estimate)

    def holds(self, estimate: Estimate, scale: float = 1.0) -> bool:
        """Whether a plan fits that takes `scale` times its estimate."""
        total = int(self.total_bytes / scale)
        if self.simulated:
            return estimate.peak_allocated_bytes <= total
        return estimate.fits(replace(self.card, total_bytes=total))
