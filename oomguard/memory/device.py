"""Every call to the device: readings, the allocator's cache, the device's random state."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pynvml
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Device:
    """One device that PyTorch can train on.

    Attributes:
        name: As the driver gives it.
        total_bytes: Its memory.
        free_bytes: What no process uses.
        capability: Its compute capability, as in `"9.0"`.
        driver: The version of the driver; `None` where it cannot be read.
    """

    name: str
    total_bytes: int
    free_bytes: int
    capability: str
    driver: str | None


def devices() -> list[Device]:
    """The CUDA devices that this process sees; none without CUDA."""
    if not torch.cuda.is_available():
        return []
    driver = _driver_version()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Device(properties.name, total, free, capability, driver))
    return found


def _driver_version() -> str | None:
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    return None


def capability(index: int | None = None) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, of the current one by default; `None` without."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


def expandable_segments() -> bool | None:
    """Whether the allocator holds expandable segments; `None` before it holds any."""
    segments = torch.cuda.memory_snapshot() if torch.cuda.is_initialized() else []
    return any(segment["is_expandable"] for segment in segments) if segments else None


def others_bytes(index: int | None = None) -> int | None:
    """What other processes hold of a CUDA device; `None` where the driver does not tell.

    In a container the driver may know this process by another number than `os.getpid` gives: then
    its share cannot be told from theirs.
    """
    if not torch.cuda.is_available():
        return None
    with suppress(pynvml.NVMLError):
        at = torch.cuda.current_device() if index is None else index
        handle = _nvml_handle(str(torch.cuda.get_device_properties(at).uuid))
        held = {
            process.pid: process.usedGpuMemory
            for read in (
                pynvml.nvmlDeviceGetComputeRunningProcesses,
                pynvml.nvmlDeviceGetGraphicsRunningProcesses,
            )
            for process in read(handle)
        }
        own = held.pop(os.getpid(), None)
        if None in held.values() or (own is None and torch.cuda.is_initialized() and held):
            return None
        return int(sum(held.values()))
    return None


def release_cached() -> None:
    """Collect reference cycles and give the allocator's unused blocks back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def allocated_and_reserved_bytes() -> tuple[int | None, int | None]:
    """Bytes of live tensors and bytes held from the current device; `None` without CUDA."""
    if not torch.cuda.is_initialized():
        return None, None
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


class AllocatorStats(NamedTuple):
    """What PyTorch's allocator says of a device, named as in `torch.cuda.memory_stats`.

    Sizes are bytes. Peaks are those since `reset_peaks`, or since the process began. A tuple, which
    is quicker to make at every step than a dataclass.
    """

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    active_bytes: int
    inactive_split_bytes: int
    alloc_retries: int


def current_index() -> int | None:
    """The number of the current device; `None` without CUDA."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def allocator_stats(index: int | None = None) -> AllocatorStats | None:
    """The allocator's own counters, without waiting for the device; `None` without CUDA.

    The nested form takes 15 µs (H100); `torch.cuda.memory_allocated` flattens and sorts it first,
    and takes 107 µs.

    Args:
        index: Of the device, the current one by default, which takes longer to find out.
    """
    stats: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(index)
    if not stats:
        return None
    allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
    return AllocatorStats(
        allocated["current"],
        reserved["current"],
        allocated["peak"],
        reserved["peak"],
        stats["active_bytes"]["all"]["current"],
        stats["inactive_split_bytes"]["all"]["current"],
        stats["num_alloc_retries"],
    )


def reset_peaks(index: int | None = None) -> None:
    """Let the peaks of `allocator_stats` begin anew, and `torch.cuda.max_memory_allocated` too."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(index)


def used_bytes(index: int | None = None) -> int | None:
    """What all processes use of a device, by default the current; `None` without CUDA."""
    if not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info(index)
    return total - free


def process_bytes(index: int | None = None) -> int | None:
    """What this process uses of a device, by default the current; `None` where the driver is mute.

    In a container the driver may know the process by another number.

    Raises:
        pynvml.NVMLError: NVML is missing or refuses.
    """
    if not torch.cuda.is_initialized():
        return None
    at = torch.cuda.current_device() if index is None else index
    handle = _nvml_handle(str(torch.cuda.get_device_properties(at).uuid))
    for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
        if process.pid == os.getpid():
            used: int | None = process.usedGpuMemory
            # A process of that number elsewhere may be smaller than what this one holds for sure.
            return used if used and used >= torch.cuda.memory_reserved(at) else None
    return None


@cache
def _nvml_handle(uuid: str) -> Any:
    pynvml.nvmlInit()  # left open: it is asked again and again
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def context_bytes() -> int | None:
    """What this process has of the current device beside PyTorch's allocator, if the driver tells.

    That is CUDA's context and what other libraries of the process allocate.
    """
    with suppress(pynvml.NVMLError):
        used = process_bytes()
        return None if used is None else used - torch.cuda.memory_reserved()
    return None


def current_name() -> str | None:
    """The name of the current device; `None` without CUDA."""
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else None


def room_bytes() -> int | None:
    """What this process can have of the current device, with what it has; `None` without CUDA.

    That is what no process uses, and what PyTorch's allocator holds: without CUDA's context, other
    processes, and what is beyond `torch.cuda.set_per_process_memory_fraction`.
    """
    if not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    return min(free + torch.cuda.memory_reserved(), usable_bytes() or total)


def synchronize() -> None:
    """Wait for what the current device has been given to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def limited(reserved_bytes: int | None) -> Iterator[None]:
    """While entered, PyTorch may take so much of the current device; `None` for no other limit."""
    if reserved_bytes is None or not torch.cuda.is_initialized():
        yield
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    before = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction(min(before, max(0, reserved_bytes) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


def usable_bytes() -> int | None:
    """What PyTorch may take of the current device; `None` without CUDA.

    Less than the device has under `torch.cuda.set_per_process_memory_fraction`.
    """
    total = total_bytes()
    return None if total is None else int(total * torch.cuda.get_per_process_memory_fraction())


def total_bytes() -> int | None:
    """The memory of the current device; `None` without CUDA."""
    if not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def record_allocations(*, enabled: bool) -> None:
    """Have the allocator remember the Python stack of every live block, or no longer."""
    if enabled:
        torch.cuda.memory._record_memory_history(enabled="state", stacks="python")
    else:
        torch.cuda.memory._record_memory_history(enabled=None)


def allocation_segments() -> list[dict[str, Any]]:
    """The allocator's segments and blocks, as in `torch.cuda.memory_snapshot`."""
    return list(torch.cuda.memory._snapshot()["segments"])


def get_rng_states() -> list[torch.Tensor]:
    """The random state of every CUDA device; empty without CUDA."""
    if not torch.cuda.is_initialized():
        return []
    return torch.cuda.get_rng_state_all()


def set_rng_states(states: list[torch.Tensor]) -> None:
    """Put back what `get_rng_states` returned."""
    if states:
        torch.cuda.set_rng_state_all(states)


def free_managed(pointer: int) -> None:
    """Free what `cudaMallocManaged` returned; PyTorch has no call for that."""
    major = (torch.version.cuda or "").partition(".")[0]
    runtime = ctypes.CDLL(f"libcudart.so.{major}")  # PyTorch has loaded it
    runtime.cudaFree(ctypes.c_void_p(pointer))


def is_lost() -> bool:
    """Whether this process cannot use CUDA any more, as after an illegal memory access."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
