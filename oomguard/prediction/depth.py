"""The log of a deep model from that of a few of its layers.

A trace holds five units of layers. The middle one, which begins and ends among its like, is
repeated in every phase as often as the deep model has it: in the order of the layers forward, and
the other way round backward. An object is known by the phase that made it, its layer, and its
number among the objects of that layer and phase; a copy that frees its neighbour's object frees
that of its own neighbour.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oomguard.prediction.trace import Trace

# Phases in which layers run one after another; in the others, each event has its object's layer.
RUNNING = ("forward", "backward")
Key = tuple[Any, ...]
"""`(phase, number)` outside the layers, `(phase, layer, number)` inside."""


class Point(Enum):
    """Of a run, not of its memory."""

    CHUNK = auto()
    PRODUCT = auto()


CHUNK = Point.CHUNK
"""The language-model head is at the beginning of a chunk of tokens."""
PRODUCT = Point.PRODUCT
"""A thread multiplies matrices for the first time."""
Event = tuple[Key, int] | str | Point | None
"""`(key, source)` of an allocation, `(key, -1)` of a free, the name of a phase, `CHUNK`, `PRODUCT`,
or `None` for a release of the cache. The source is the traced id with the same bytes."""
_POINTS = {"c": CHUNK, "p": PRODUCT}


@dataclass(frozen=True)
class Deep:
    """Events of the deep model.

    Attributes:
        events: See `Event`.
    """

    events: list[Event]


class NotAlikeError(Exception):
    """The layers of a trace do not behave alike, so that none can stand for the others."""


@dataclass
class _Event:
    kind: str
    number: int
    run: int | None


def deepen(trace: Trace) -> Deep:
    """Repeat the cloned unit of `trace`.

    Raises:
        NotAlikeError: A copy frees what was never made; the full depth must be traced.
    """
    builder = _Builder(trace)
    events: list[Event] = []
    for phase, name, body in _phases(trace):
        events.append(name)
        events.extend(builder.phase(phase, name, body))
    _check(events)
    return Deep(events)


def _phases(trace: Trace) -> Iterator[tuple[int, str | None, list[_Event]]]:
    """Every phase with its events, each with the layer in whose run it happens."""
    index, name, body = -1, "", []  # type: int, str | None, list[_Event]
    for kind, what, layer in trace.log:
        if kind == "m":
            if index >= 0:
                yield index, name, body
            index, name, body = index + 1, what, []
        else:
            body.append(_Event(kind, what, layer))
    yield index, name, body


class _Builder:
    def __init__(self, trace: Trace) -> None:
        cut = trace.cut
        self._home = trace.home
        self._middle = 0 if cut is None else cut.cloned
        self._times = 1 if cut is None else cut.times
        self._born: dict[int, tuple[int, int]] = {}
        self._made: Counter[tuple[int, int | None]] = Counter()
        self._source: dict[Key, int] = {}

    def phase(self, phase: int, name: str | None, body: list[_Event]) -> Iterator[Event]:
        running = name in RUNNING
        for event in body:
            if event.kind == "a":
                home = self._home[event.number]
                count = self._made[phase, home]
                self._made[phase, home] += 1
                self._born[event.number] = phase, count
                if home is not None:
                    self._source[phase, home, count] = event.number
            if not running and event.kind not in _POINTS:
                event.run = self._home[event.number]
        if running:
            _fill(body)
        yield from self._emit(body, running=running)

    def _emit(self, body: list[_Event], *, running: bool) -> Iterator[Event]:
        before, start = None, 0
        while start < len(body):
            run, end = body[start].run, start
            while end < len(body) and body[end].run == run:
                end += 1
            events = body[start:end]
            if run is None:
                yield from self._loose(events)
            elif run == self._middle:
                copies = range(run, run + self._times)
                down = running and before is not None and before > run
                for layer in reversed(copies) if down else copies:
                    yield from (self._one(event, run, layer) for event in events)
            else:
                yield from (self._one(event, run, self._deep(run)) for event in events)
            before, start = run if run is not None else before, end

    def _loose(self, events: list[_Event]) -> Iterator[Event]:
        """Outside the layers: what is freed there is freed of every copy."""
        for event in events:
            if event.kind in _POINTS:
                yield _POINTS[event.kind]
                continue
            home = self._home[event.number]
            if home is None:
                yield self._one(event, 0, 0)
            elif home == self._middle:
                for layer in range(home, home + self._times):
                    yield self._one(event, home, layer)
            else:
                yield self._one(event, home, self._deep(home))

    def _one(self, event: _Event, run: int, layer: int) -> Event:
        """The event as it happens in the run of deep layer `layer`."""
        if event.kind in _POINTS:
            return _POINTS[event.kind]
        phase, count = self._born[event.number]
        home = self._home[event.number]
        key: Key = (phase, event.number)
        source = event.number
        if home is not None:
            there = layer + home - run
            key = (phase, there, count)
            source = self._source.get((phase, self._shallow(there), count), event.number)
        return key, source if event.kind == "a" else -1

    def _deep(self, layer: int) -> int:
        return layer if layer <= self._middle else layer + self._times - 1

    def _shallow(self, layer: int) -> int:
        if layer <= self._middle:
            return layer
        return max(self._middle, layer - self._times + 1)


def _fill(body: list[_Event]) -> None:
    """What happens between two layers belongs to the run of the earlier one."""
    inside = [index for index, event in enumerate(body) if event.run is not None]
    if not inside:
        return
    last = body[inside[0]].run
    for event in body[inside[0] : inside[-1] + 1]:
        last = event.run = last if event.run is None else event.run


def _check(events: list[Event]) -> None:
    live: set[Key] = set()
    for event in events:
        if not isinstance(event, tuple):
            continue
        key, source = event
        if source < 0:
            if key not in live:
                msg = f"{key} is freed and was not allocated"
                raise NotAlikeError(msg)
            live.remove(key)
        elif key in live:
            msg = f"{key} is allocated twice"
            raise NotAlikeError(msg)
        else:
            live.add(key)
