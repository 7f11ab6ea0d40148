"""One reading of memory a step, cheap enough to be taken at every step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, get_args

from oomguard.memory import device, host, simulated
from oomguard.watch.quiet import Quiet

Phase = Literal["train", "eval", "save"]
PHASES: tuple[Phase, ...] = get_args(Phase)

_DRIVER_EVERY_S = 1.0
_HOST_EVERY_S = 0.1  # on a GPU, whose steps should not wait for the host's kernel


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Memory after one optimizer step, one evaluation or one save; `None` where it is not known.

    On a GPU, sizes are those of PyTorch's allocator, named as in `torch.cuda.memory_stats`. Under
    a `VirtualCard` the allocated bytes and their peak are the card's. Else only the host's memory
    is known.

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
    """Takes readings of the device that PyTorch uses at the moment, without waiting for it.

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
        self._highest: tuple[int, int] = (0, 0)
        self._driver: dict[str, int | None] = {}
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
        readings = self._of_card() or self._of_device(time_s)
        return Reading(
            step=step,
            time_s=time_s,
            phase=phase,
            batch_tokens=batch_tokens,
            host_rss_bytes=self._of_host(time_s, on_gpu="reserved_bytes" in readings),
            **readings,
        )

    def _of_card(self) -> dict[str, int]:
        card = simulated.current()
        if card is None:
            return {}
        found = {"allocated_bytes": card.allocated_bytes}
        if self._peaks != "none":
            found["peak_allocated_bytes"] = card.take_peak()
        return found

    def _of_device(self, time_s: float) -> dict[str, int | None]:
        stats = device.allocator_stats()
        if stats is None:
            return {}
        peak_allocated, peak_reserved = self._peaks_of(stats)
        return {
            "allocated_bytes": stats.allocated_bytes,
            "reserved_bytes": stats.reserved_bytes,
            "peak_allocated_bytes": peak_allocated,
            "peak_reserved_bytes": peak_reserved,
            "active_bytes": stats.active_bytes,
            "inactive_split_bytes": stats.inactive_split_bytes,
            "alloc_retries": stats.alloc_retries,
            **self._of_driver(time_s),
        }

    def _of_host(self, time_s: float, *, on_gpu: bool) -> int | None:
        if not on_gpu or time_s >= self._host_due_s:
            self._host_due_s = time_s + _HOST_EVERY_S
            self._host = host.rss_bytes()
        return self._host

    def _of_driver(self, time_s: float) -> dict[str, int | None]:
        if time_s >= self._driver_due_s:
            self._driver_due_s = time_s + _DRIVER_EVERY_S
            self._driver["device_used_bytes"] = device.used_bytes()
            if self._nvml_answers:
                self._nvml_answers = False
                with self._quiet:
                    self._driver["process_bytes"] = device.process_bytes()
                    self._nvml_answers = True
        return self._driver

    def _peaks_of(self, stats: device.AllocatorStats) -> tuple[int | None, int | None]:
        found = stats.peak_allocated_bytes, stats.peak_reserved_bytes
        if self._peaks == "none":
            return None, None
        if self._peaks == "step":
            device.reset_peaks()
            return found
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
