"""One reading of memory a step, cheap enough to be taken at every step."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple, get_args

from oomguard.memory import device, host, simulated
from oomguard.watch.quiet import Quiet

Phase = Literal["train", "eval", "save"]
PHASES: tuple[Phase, ...] = get_args(Phase)

_DRIVER_EVERY_S = 1.0
_HOST_EVERY_S = 0.1  # on a GPU, whose steps should not wait for the host's kernel


class Reading(NamedTuple):
    """Memory after one optimizer step, one evaluation or one save; `None` where it is not known.

    On a GPU, sizes are those of PyTorch's allocator, named as in `torch.cuda.memory_stats`. Under
    a `VirtualCard` the allocated bytes and their peak are the card's. Else only the host's memory
    is known. A tuple, which is quicker to make at every step than a dataclass.

    Attributes:
        step: Optimizer steps made so far.
        time_s: Seconds since the run began, those of the runs that it resumes included.
        phase: What was done since the last reading.
        allocated_bytes: Live tensors.
        reserved_bytes: What the allocator holds from the device.
        peak_allocated_bytes: The most that was allocated at once since the last reading.
        peak_reserved_bytes: The most that was reserved at once since the last reading.
        active_bytes: Live tensors, and freed ones that another stream may still use.
        inactive_split_bytes: Free pieces of blocks that are partly in use: fragmentation.
        alloc_retries: How often the allocator had to empty its cache to find room, so far.
        process_bytes: What this process uses of the device, by the driver; up to a second old.
        device_used_bytes: What all processes use of the device, by the driver; up to a second old.
        batch_tokens: Padded tokens that the optimizer step was made of.
        host_rss_bytes: The process's memory on the host; on a GPU up to 0.1 s old.
    """

    step: int
    time_s: float
    phase: Phase = "train"
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    active_bytes: int | None = None
    inactive_split_bytes: int | None = None
    alloc_retries: int | None = None
    process_bytes: int | None = None
    device_used_bytes: int | None = None
    batch_tokens: int | None = None
    host_rss_bytes: int | None = None


Peaks = Literal["step", "risen", "none"]


class Meter:
    """Takes readings of one device without waiting for it: the one that is current at the first.

    Args:
        peaks: Which peaks readings have. `"step"`: each its own; the allocator's peak counters are
            started anew every time, so `torch.cuda.max_memory_allocated` tells no more than that.
            `"risen"`: the counters are left alone, so a peak is known only where it rose above all
            before it. `"none"`: none. One meter at most may read the peaks of a `VirtualCard`,
            which has a counter for it beside its `peak_bytes`.
        began_s: Seconds that the run had taken before.
    """

    def __init__(self, *, peaks: Peaks = "none", began_s: float = 0.0) -> None:
        self._peaks = peaks
        self._began = time.perf_counter() - began_s
        self._index: int | None = None
        self._highest: tuple[int, int] = (0, 0)
        self._process: int | None = None
        self._device_used: int | None = None
        self._driver_due_s = 0.0
        self._host: int | None = None
        self._host_due_s = 0.0
        self._nvml_answers = True
        self._quiet = Quiet("The process's memory on the device is not read")

    def take(self, step: int, phase: Phase = "train", batch_tokens: int | None = None) -> Reading:
        """What is read now.

        Args:
            step: As in `Reading`.
            phase: As in `Reading`.
            batch_tokens: As in `Reading`.
        """
        time_s = time.perf_counter() - self._began
        card = simulated.current()
        if card is not None:
            return Reading(
                step,
                time_s,
                phase,
                allocated_bytes=card.allocated_bytes,
                peak_allocated_bytes=None if self._peaks == "none" else card.take_peak(),
                batch_tokens=batch_tokens,
                host_rss_bytes=host.rss_bytes(),
            )
        if self._index is None:
            self._index = device.current_index()
        stats = device.allocator_stats(self._index)
        if stats is None:
            rss = host.rss_bytes()
            return Reading(step, time_s, phase, batch_tokens=batch_tokens, host_rss_bytes=rss)
        peak_allocated, peak_reserved = self._peaks_of(stats)
        if time_s >= self._host_due_s:
            self._read_slow(time_s)
        return Reading(
            step,
            time_s,
            phase,
            stats.allocated_bytes,
            stats.reserved_bytes,
            peak_allocated,
            peak_reserved,
            stats.active_bytes,
            stats.inactive_split_bytes,
            stats.alloc_retries,
            self._process,
            self._device_used,
            batch_tokens,
            self._host,
        )

    def _read_slow(self, time_s: float) -> None:
        """Ask the host's kernel, and from time to time the driver."""
        self._host_due_s = time_s + _HOST_EVERY_S
        self._host = host.rss_bytes()
        if time_s < self._driver_due_s:
            return
        self._driver_due_s = time_s + _DRIVER_EVERY_S
        self._device_used = device.used_bytes(self._index)
        if self._nvml_answers:
            self._nvml_answers = False
            with self._quiet:
                self._process = device.process_bytes(self._index)
                self._nvml_answers = True

    def _peaks_of(self, stats: device.AllocatorStats) -> tuple[int | None, int | None]:
        if self._peaks == "none":
            return None, None
        found = stats.peak_allocated_bytes, stats.peak_reserved_bytes
        if self._peaks == "step":
            device.reset_peaks(self._index)
            return found
        if found == self._highest:
            return None, None
        before, self._highest = self._highest, found
        allocated, reserved = (
            now if now > then else None for now, then in zip(found, before, strict=True)
        )
        return allocated, reserved


def card_total_bytes() -> int | None:
    """What PyTorch may take of the device, or the capacity of the `VirtualCard` in force."""
    card = simulated.current()
    return device.usable_bytes() if card is None else card.capacity_bytes


def allocated_bytes() -> int | None:
    """Live tensors on the device, or on the `VirtualCard` in force; `None` without either."""
    card = simulated.current()
    return device.allocated_and_reserved_bytes()[0] if card is None else card.allocated_bytes


def device_name() -> str:
    """The device's name; `"VirtualCard"` or `"cpu"` without one."""
    if simulated.current() is not None:
        return "VirtualCard"
    return device.current_name() or "cpu"
