"""Trouble with a card's memory that is no leak of tensors, told by its readings alone."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from oomguard.memory.size import format_bytes
from oomguard.watch.findings import Finding, Kind
from oomguard.watch.trend import CreepDetector
from oomguard.watch.wording import growth, in_steps_of_run, measured

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oomguard.watch.creep import Creep
    from oomguard.watch.readings import Reading

_NEARLY_FULL = 0.25  # of the card is free: fragments begin to matter
_FULL = 0.03
_RETRY_STEPS, _RETRIES = 8, 6
_SLOWER = 3.0
_SLOW_STEPS = 8
_TIMED_STEPS = 64
_NEIGHBOUR_SHARE = 0.02
_NEIGHBOUR_BYTES = 256 * 2**20
_NEIGHBOUR_READINGS = 4

_ADVICE: dict[Kind, str] = {
    "fragmentation": (
        "set PYTORCH_ALLOC_CONF=expandable_segments:True before the run, or keep batches of one "
        "length together"
    ),
    "outside": (
        "look for libraries with an allocator of their own: paged optimizers of earlier runs, "
        "NCCL communicators, CuPy, TensorRT, CUDA graphs; PyTorch cannot free it"
    ),
    "neighbour": "end the other process (nvidia-smi lists them), or give it another device",
    "thrashing": (
        "leave more room: a smaller batch per pass (oomguard.fit finds one), shorter sequences or "
        "gradient checkpointing"
    ),
    "spilling": (
        "switch off the driver's system-memory fallback, or leave more room: a smaller batch per "
        "pass (oomguard.fit finds one), shorter sequences or gradient checkpointing"
    ),
}


class Room(NamedTuple):
    """The card's memory: all of it, what PyTorch may take, and what no process uses."""

    total_bytes: int
    usable_bytes: int
    free_bytes: int


class Symptoms:
    """Looks at each reading of a GPU; every kind is told once, and again when it grew by half."""

    def __init__(self, first_step: int) -> None:
        """Begin after step `first_step` of the run."""
        self._first_step = first_step
        self._fragments = CreepDetector()
        self._fragments_creep: Creep | None = None
        self._outside = CreepDetector()
        self._outside_bytes: int | None = None
        self._neighbour: deque[int] = deque(maxlen=_NEIGHBOUR_READINGS)
        self._neighbour_at_first: int | None = None
        self._retries: deque[int] = deque(maxlen=_RETRY_STEPS + 1)
        self._times: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._slow = 0
        self._told: set[Kind] = set()

    def look(
        self, reading: Reading, room: Room, step_s: float | None, event: str | None
    ) -> Iterator[Finding]:
        """What one step shows.

        Args:
            reading: After the step.
            room: On the card now.
            step_s: How long the step took; `None` if that is not known.
            event: What else ran since the last step, as `CreepDetector` takes it.
        """
        found = (
            self._fragmentation(reading, room, event),
            self._outside_memory(reading, room, event),
            self._neighbours(reading, room),
            self._thrashing(reading),
            self._spilling(reading, room, step_s),
        )
        return (finding for finding in found if finding is not None)

    def _fragmentation(self, reading: Reading, room: Room, event: str | None) -> Finding | None:
        if reading.reserved_bytes is None or reading.active_bytes is None:
            return None
        gap = reading.reserved_bytes - reading.active_bytes
        free = room.usable_bytes - reading.reserved_bytes
        creep = self._fragments.update(
            gap, batch_tokens=reading.batch_tokens, event=event, headroom_bytes=free
        )
        if creep is not None:
            creep = in_steps_of_run(creep, self._first_step)
            self._fragments_creep = None if creep.withdrawn else creep
            self._told.discard("fragmentation")
        # What the allocator keeps for later is no trouble while there is more to be had.
        if self._fragments_creep is None or free > _NEARLY_FULL * room.usable_bytes:
            return None
        split = reading.inactive_split_bytes
        if split is not None and split < self._fragments_creep.bytes_so_far // 2:
            return None
        text = (
            f"Memory that PyTorch holds without using it grows "
            f"{growth(self._fragments_creep)}: {format_bytes(gap)} of "
            f"{format_bytes(reading.reserved_bytes)} reserved, {format_bytes(max(free, 0))} left "
            "to take. It is in pieces between live tensors."
        )
        return self._tell("fragmentation", reading, text, self._fragments_creep)

    def _outside_memory(self, reading: Reading, room: Room, event: str | None) -> Finding | None:
        if reading.reserved_bytes is None or reading.device_used_bytes is None:
            return None
        whose = "this process"
        if reading.process_bytes is not None:
            self._outside_bytes = reading.process_bytes - reading.reserved_bytes
            self._neighbour.append(reading.device_used_bytes - reading.process_bytes)
        elif not self._neighbour:  # the driver tells of the device only, as in a container
            whose = "this process, or another one on the device,"
            self._outside_bytes = reading.device_used_bytes - reading.reserved_bytes
        if self._outside_bytes is None:
            return None
        creep = self._outside.update(
            self._outside_bytes, event=event, headroom_bytes=room.free_bytes
        )
        if creep is None or creep.withdrawn:
            return None
        creep = in_steps_of_run(creep, self._first_step)
        self._told.discard("outside")
        text = (
            f"Memory outside PyTorch that {whose} holds on the device grows {growth(creep)}: "
            f"{format_bytes(self._outside_bytes)} now, {format_bytes(room.free_bytes)} left."
        )
        return self._tell("outside", reading, text, creep)

    def _neighbours(self, reading: Reading, room: Room) -> Finding | None:
        if len(self._neighbour) < _NEIGHBOUR_READINGS:
            return None
        now = min(self._neighbour)
        if self._neighbour_at_first is None:
            self._neighbour_at_first = now
        grown = now - self._neighbour_at_first
        if grown < max(_NEIGHBOUR_BYTES, _NEIGHBOUR_SHARE * room.total_bytes):
            return None
        text = (
            f"Another process takes {format_bytes(now)} of the device, {format_bytes(grown)} more "
            f"than when the training began; {format_bytes(room.free_bytes)} are left for all."
        )
        return self._tell("neighbour", reading, text)

    def _thrashing(self, reading: Reading) -> Finding | None:
        if reading.alloc_retries is None:
            return None
        self._retries.append(reading.alloc_retries)
        if self._retries[0] == reading.alloc_retries:
            return None
        counts = list(self._retries)
        rising = sum(later > earlier for earlier, later in pairwise(counts))
        if rising < _RETRIES:
            return None
        text = (
            f"The card is full: {rising} of the last {_RETRY_STEPS} steps found no room before "
            "PyTorch had given its unused memory back to the device, which takes long each time "
            f"({counts[-1] - counts[0]} times in these steps)."
        )
        return self._tell("thrashing", reading, text)

    def _spilling(self, reading: Reading, room: Room, step_s: float | None) -> Finding | None:
        if step_s is None or reading.device_used_bytes is None:
            return None
        pace_s = step_s / (reading.batch_tokens or 1)
        full = room.total_bytes - reading.device_used_bytes < _FULL * room.total_bytes
        # No median is needed while there is room, which is nearly always.
        known = full and len(self._times) >= _SLOW_STEPS
        usual_s = median(self._times) if known else None
        if usual_s is None or pace_s < _SLOWER * usual_s:
            self._slow = 0
            self._times.append(pace_s)
            return None
        self._slow += 1
        if self._slow < _SLOW_STEPS:
            return None
        text = (
            f"Steps take {pace_s / usual_s:.1f} times as long since the card is full: the driver "
            "seems to move memory to the host instead of failing."
        )
        return self._tell("spilling", reading, text)

    def _tell(
        self, kind: Kind, reading: Reading, text: str, creep: Creep | None = None
    ) -> Finding | None:
        if kind in self._told:
            return None
        self._told.add(kind)
        advice = _ADVICE[kind]
        return Finding(
            kind=kind,
            message=f"{text} What to do: {advice}.",
            step=reading.step,
            advice=advice,
            **({} if creep is None else measured(creep)),
        )
