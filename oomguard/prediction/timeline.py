"""From a deepened log to a timeline of the allocator: bytes, workspaces and categories."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oomguard.memory.timeline import RELEASE, Event, Mark, Timeline
from oomguard.prediction.depth import PRODUCT, Point
from oomguard.prediction.recorder import HEAD
from oomguard.prediction.trace import BACKWARD, FORWARD, LOAD, STEP

if TYPE_CHECKING:
    from oomguard.memory.cards import Card
    from oomguard.prediction.depth import Deep
    from oomguard.prediction.trace import Trace

_PHASES = {LOAD: LOAD, FORWARD: FORWARD, BACKWARD: BACKWARD, STEP: STEP}


def timeline(trace: Trace, deep: Deep, nbytes: list[int], card: Card) -> Timeline:
    """The events of a run on `card`.

    Args:
        trace: What was traced.
        deep: Its events at full depth.
        nbytes: Bytes of each traced id.
        card: Whose workspaces are added: one of the main thread, one of autograd's. They are there
            from the first step on, as in every later training of a process; `late` says where they
            come in the first.
    """
    numbers: dict[object, int] = {}
    events: list[Event] = []
    category: list[str] = []
    phase, missing = LOAD, 2 if card.workspace_bytes else 0
    waiting: list[int] = []
    late: list[tuple[int, int]] = []
    kinds = _kinds(trace)
    for event in deep.events:
        if isinstance(event, Point):
            if event is PRODUCT and waiting:
                late.append((waiting.pop(0), len(events)))
            continue
        if not isinstance(event, tuple):
            events.append(RELEASE if event is None else Mark(event))
            phase = event or phase
            while missing and phase == FORWARD:
                missing -= 1
                waiting.append(len(events))
                events.append((len(category), card.workspace_bytes))
                category.append("workspaces")
            continue
        key, source = event
        if source < 0:
            events.append((numbers.pop(key), -1))
            continue
        numbers[key] = len(category)
        events.append((len(category), nbytes[source]))
        category.append(kinds[source])
    return Timeline(events, category, tuple(late))


def _kinds(trace: Trace) -> list[str]:
    """The category of each traced id."""
    born: dict[int, str] = {}
    died: dict[int, str] = {}
    phase = LOAD
    for kind, what, _ in trace.log:
        if kind == "m":
            phase = _PHASES.get(what, "end")
        elif kind == "a":
            born[what] = phase
        elif kind == "f":
            died[what] = phase
    return [_kind(trace, i, born.get(i, "end"), died.get(i)) for i in range(len(trace.nbytes))]


def _kind(trace: Trace, number: int, born: str, died: str | None) -> str:
    if number in trace.kind:
        return trace.kind[number]
    if trace.part[number] == HEAD:
        return "logits_and_loss"
    if born == STEP:
        return "workspaces" if died == STEP else "optimizer_state"
    if born == FORWARD and died != FORWARD:
        return "saved_activations"
    if born == LOAD and died is None:
        return "weights"
    return "workspaces"
