"""One call of `train()` that a `LeakDetector` watches: what is read, and what is made of it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import torch

from oomguard.memory import device, host, simulated
from oomguard.watch import live
from oomguard.watch.account import account
from oomguard.watch.batch import TokenCount
from oomguard.watch.inquiry import Conclusion, Inquiry
from oomguard.watch.quiet import Quiet
from oomguard.watch.readings import (
    Meter,
    Reading,
    allocated_bytes,
    card_total_bytes,
)
from oomguard.watch.recorder import VRAMRecorder
from oomguard.watch.stacks import allocated_by_site
from oomguard.watch.symptoms import Room, Symptoms
from oomguard.watch.trend import PROFILER, CreepDetector
from oomguard.watch.wording import in_steps_of_run, tell

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from oomguard.watch.findings import Finding
    from oomguard.watch.stacks import Site
    from oomguard.watch.trainings import Trainings

_LEAST_BYTES = 16 * 2**20
_LEAST_SHARE = 64  # of what there is, on small cards
_ACCOUNT_EVERY = 64  # steps; sooner when the optimizer has a state for another parameter
_HOST_EVERY_S = 5.0
_CARD_EVERY_S = 1.0


@final
class Vigil:
    """Watches from one `on_train_begin` to the next `on_train_end`.

    Attributes:
        events: What ran since the last step, as `CreepDetector` names it.
    """

    def __init__(self, step: int, model: Any, *, count_tokens: bool, record_history: bool) -> None:
        self.events: set[str] = set()
        self._first_step = step
        self._meter = Meter()
        self._tokens = TokenCount()
        self._hook = self._tokens.attach(model) if count_tokens else None
        self._detector = CreepDetector()
        self._symptoms = Symptoms(step)
        self._inquiry: Inquiry | None = None
        self._concluded: dict[str, Conclusion] = {}
        self._asks = Quiet("LeakDetector does not say what holds the memory")
        self._accounted: tuple[int, int] | None = None  # states and step of the last account
        self._step_began: float | None = None
        self._host_room: tuple[float, int] = (0.0, 0)
        self._card: tuple[float, int, int] | None = None
        on_gpu = simulated.current() is None and device.current_name() is not None
        self._device_type = "cuda" if on_gpu else "cpu"
        self._records = record_history and on_gpu
        self._recorder = _recorder()
        self._recoveries = self._count_recoveries()
        if self._records:
            device.record_allocations(enabled=True)

    def begin(self, trainings: Trainings, model: Any, optimizer: Any) -> Finding | None:
        """What the trainings before this one in the process have left."""
        allocated, total = allocated_bytes(), card_total_bytes()
        if allocated is None:
            return None  # the host's memory is not given back when tensors go

        def beyond_own() -> int:
            return (allocated_bytes() or 0) - account(model, optimizer).total_bytes

        least = min(_LEAST_BYTES, (total or allocated) // _LEAST_SHARE)
        return trainings.begin(self._device_type, beyond_own, least)

    def step_begins(self) -> None:
        """Time the step from here."""
        self._step_began = time.perf_counter()

    def look(self, step: int, model: Any, optimizer: Any) -> Iterator[Finding]:
        """Read at the end of a step, and yield what is new."""
        began, self._step_began = self._step_began, None
        step_s = None if began is None else time.perf_counter() - began
        recoveries = self._count_recoveries()
        if recoveries != self._recoveries:
            self._recoveries = recoveries
            self._accounted = step_s = None
            self.events.add("recovery")
        events, self.events = self.events, set()
        if torch.autograd.profiler._is_profiler_enabled:
            events = {PROFILER}
        event = "+".join(sorted(events)) or None
        reading = self._read(step)
        room = self._room(reading)
        yield from self._look_at_tensors(reading, room, model, optimizer, event)
        if room is not None:
            yield from self._symptoms.look(reading, room, step_s, event)
        if self._inquiry is not None:
            over = True
            with self._asks:
                self._inquiry.look(step, events)
                over = self._inquiry.is_over
            if over:
                yield self._conclude(self._inquiry, step)

    def end(self, step: int) -> Iterator[Finding]:
        """What was still being looked into."""
        if self._inquiry is not None:
            yield self._conclude(self._inquiry, step)

    def close(self) -> None:
        """Take away what watches."""
        if self._hook is not None:
            self._hook.remove()
        if self._records:
            device.record_allocations(enabled=False)

    def _read(self, step: int) -> Reading:
        """What the recorder has read at the end of this step; where it has not, a reading."""
        tokens = self._tokens.take()
        reading = None if self._recorder is None else self._recorder.reading_of(step)
        return self._meter.take(step, batch_tokens=tokens) if reading is None else reading

    def _look_at_tensors(
        self, reading: Reading, room: Room | None, model: Any, optimizer: Any, event: str | None
    ) -> Iterator[Finding]:
        creep = self._detector.update(
            reading.allocated_bytes or reading.host_rss_bytes or 0,
            accounted_bytes=self._account(reading.step, model, optimizer),
            batch_tokens=reading.batch_tokens,
            event=event,
            headroom_bytes=self._headroom(reading, room),
        )
        if creep is None:
            return
        creep = in_steps_of_run(creep, self._first_step)
        concluded = self._concluded.get(creep.phase)
        if creep.withdrawn:
            self._inquiry = None
            if concluded is not None:
                finding = tell(concluded, reading.step, self._memory)
                yield replace(finding, withdrawn=True)
                del self._concluded[creep.phase]
        elif concluded is not None:
            yield self._told(replace(concluded, creep=creep), reading.step)
        elif self._inquiry is None:
            record = self._record if self._records else None
            with self._asks:
                self._inquiry = Inquiry(creep, reading.step, self._device_type, _read_bytes, record)
            if self._inquiry is None:
                yield self._told(Conclusion(creep), reading.step)

    def _conclude(self, inquiry: Inquiry, step: int) -> Finding:
        self._inquiry = None
        conclusion = Conclusion(inquiry.creep)
        with self._asks:
            conclusion = inquiry.conclude()
        return self._told(conclusion, step)

    def _told(self, conclusion: Conclusion, step: int) -> Finding:
        self._concluded[conclusion.creep.phase] = conclusion
        return tell(conclusion, step, self._memory)

    def _account(self, step: int, model: Any, optimizer: Any) -> int | None:
        """What the training itself consists of; `None` where it was counted not long ago."""
        states = len(getattr(optimizer, "state", None) or ())
        last = self._accounted
        if last is not None and last[0] == states and step - last[1] < _ACCOUNT_EVERY:
            return None
        self._accounted = states, step
        return account(model, optimizer).total_bytes

    def _headroom(self, reading: Reading, room: Room | None) -> int | None:
        """What is free at a step's peak."""
        if room is not None:
            # Other callbacks may reset the peak counters; what is reserved held the peak too.
            return room.usable_bytes - (reading.reserved_bytes or 0)
        card = simulated.current()
        if card is not None:
            total = card.capacity_bytes
            return None if total is None else total - card.peak_bytes
        read_s, free = self._host_room
        if reading.time_s >= read_s + _HOST_EVERY_S or not free:
            self._host_room = reading.time_s, host.free_bytes()
        return self._host_room[1]

    def _room(self, reading: Reading) -> Room | None:
        """What there is of the device that was read; `None` where none was."""
        used = reading.device_used_bytes
        if used is None:
            return None
        if self._card is None or reading.time_s >= self._card[0]:
            total = device.total_bytes() or 0
            self._card = reading.time_s + _CARD_EVERY_S, total, device.usable_bytes() or total
        _, total, usable = self._card
        return Room(total, usable, total - used)

    def _count_recoveries(self) -> int:
        guarded = None if self._recorder is None else self._recorder.guarded
        return 0 if guarded is None else len(guarded.recoveries)

    @staticmethod
    def _record() -> Counter[Site]:
        return allocated_by_site(device.allocation_segments())

    @property
    def _memory(self) -> str:
        if simulated.current() is not None:
            return "The virtual card's memory"
        return "GPU memory" if self._device_type == "cuda" else "Host memory"


def _read_bytes() -> int:
    """What is watched, read now."""
    allocated = allocated_bytes()
    return host.rss_bytes() if allocated is None else allocated


def _recorder() -> VRAMRecorder | None:
    """The callback that knows the guard; every guarded run has one."""
    handler = live.handler()
    callbacks = () if handler is None else handler.callbacks
    return next((found for found in callbacks if isinstance(found, VRAMRecorder)), None)
