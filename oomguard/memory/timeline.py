"""The allocations and frees of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """A point of a timeline, not an allocation.

    Attributes:
        phase: What begins here; `None` for a release of the cache.
    """

    phase: str | None


RELEASE = Mark(None)
Event = tuple[int, int] | Mark
"""`(key, bytes)` of an allocation, `(key, -1)` of the free of that key, or a mark."""


@dataclass(frozen=True)
class Timeline:
    """The allocations and frees of a run, in program order.

    Attributes:
        events: See `Event`.
        category: The category of each key, by key.
        late: Allocations that come later in the first training of a process, as `(index, index of
            the event before which)`.
    """

    events: list[Event]
    category: list[str]
    late: tuple[tuple[int, int], ...] = ()
