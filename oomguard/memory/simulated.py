"""The card that stands in for a device on the CPU, while there is one."""

from __future__ import annotations

from typing import Protocol


class Card(Protocol):
    """What can be read of a simulated card."""

    @property
    def capacity_bytes(self) -> int | None:
        """Its memory; `None` where it is unlimited."""

    @property
    def allocated_bytes(self) -> int:
        """What lives on it now."""

    @property
    def peak_bytes(self) -> int:
        """The most that ever lived on it at once."""

    def take_peak(self) -> int:
        """The most bytes that lived on it at once since this was last asked."""


_entered: list[Card] = []


def enter(card: Card) -> None:
    """From here on `card` is in force."""
    _entered.append(card)


def leave(card: Card) -> None:
    """`card` is in force no longer."""
    _entered.remove(card)


def current() -> Card | None:
    """The card in force: of nested ones the outermost, which sees everything; `None` without."""
    return _entered[0] if _entered else None
