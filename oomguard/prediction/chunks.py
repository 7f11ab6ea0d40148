"""Another number of chunks of TRL's language-model head than a trace has.

The head goes through the tokens in chunks of 4096, and does the same for each. A trace has three,
of which the last is shorter. More of them repeat what happens between the first two; fewer leave
it out, and what was left for a chunk by the one before it is then left by an earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass

from oomguard.prediction.depth import CHUNK, Deep, Event, Key, NotAlikeError

CHUNK_TOKENS = 4096  # TRL's TOKEN_CHUNK_SIZE
TRACED = 3


def with_chunks(deep: Deep, chunks: int) -> Deep:
    """`deep`, whose heads go through `TRACED` chunks, with another number of them.

    Raises:
        NotAlikeError: The chunks of a head do not behave alike.
    """
    events: list[Event] = []
    phase: list[Event] = []
    for event in deep.events:
        if event is None or isinstance(event, str):
            events += _rechunked(phase, chunks)
            events.append(event)
            phase = []
        else:
            phase.append(event)
    return Deep(events + _rechunked(phase, chunks))


def _rechunked(events: list[Event], chunks: int) -> list[Event]:
    """The same for one phase, which has one head or none."""
    at = [index for index, event in enumerate(events) if event is CHUNK]
    if not at:
        return events
    if len(at) != TRACED:
        msg = f"a head of {len(at)} chunks"
        raise NotAlikeError(msg)
    first, second, third = at
    period = _Period.of(events[first + 1 : second], events[second + 1 : third])
    if chunks < TRACED:
        left = events[second + 1 :] if chunks == TRACED - 1 else events[third + 1 :]
        return [*events[: first + 1], *period.without(left, TRACED - chunks)]
    more = chunks - TRACED
    copies = [period.copy(number) for number in range(1, more + 1)]
    rest = [period.renamed(event, more) for event in events[second + 1 :]]
    return [*events[: second + 1], *(event for copy in copies for event in copy), *rest]


@dataclass(frozen=True)
class _Period:
    """What happens between the same points of two chunks.

    Attributes:
        events: Allocations and frees.
        later: Of each key that is freed here and was made in the chunk before, the one made here
            that the chunk behind frees in its place.
        made: The keys that are allocated here, each with the one that the chunk behind has there.
    """

    events: list[tuple[Key, int]]
    made: dict[Key, Key]
    later: dict[Key, Key]

    @classmethod
    def of(cls, events: list[Event], behind: list[Event]) -> _Period:
        """The period of `events`, which happens once more in `behind`."""
        msg = "the chunks of the head are not alike"
        if len(events) != len(behind):
            raise NotAlikeError(msg)
        found, made, later = [], dict[Key, Key](), dict[Key, Key]()
        for one, other in zip(events, behind, strict=True):
            if not isinstance(one, tuple) or not isinstance(other, tuple):
                raise NotAlikeError(msg)
            if (one[1] < 0) != (other[1] < 0):
                raise NotAlikeError(msg)
            found.append(one)
            if one[1] >= 0:
                made[one[0]] = other[0]
            elif one[0] not in made:
                later[one[0]] = other[0]
        left = made.keys() - {key for key, source in found if source < 0}
        if left != set(later.values()):
            raise NotAlikeError(msg)
        return cls(found, made, later)

    def copy(self, number: int) -> list[Event]:
        """The events of the copy of this number, counted from 1."""
        return [(self._key(key, number), source) for key, source in self.events]

    def renamed(self, event: Event, copies: int) -> Event:
        """An event behind all copies: what was left of this period is left of the last copy."""
        if copies and isinstance(event, tuple) and event[0] in self.made:
            return ("copy", copies, event[0]), event[1]
        return event

    def without(self, events: list[Event], missing: int) -> list[Event]:
        """Events behind one or two periods that are missing: what those were left is left."""
        left = {later: key for key, later in self.later.items()}
        if missing > 1:
            left = {self.made[later]: key for later, key in left.items()}
        return [
            (left.get(event[0], event[0]), event[1]) if isinstance(event, tuple) else event
            for event in events
        ]

    def _key(self, key: Key, number: int) -> Key:
        if key in self.later:
            key, number = self.later[key], number - 1
        return ("copy", number, key) if number else key
