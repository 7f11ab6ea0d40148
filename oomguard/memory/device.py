"""Every call to the device: readings, the allocator's cache, the device's random state."""

from __future__ import annotations

import ctypes
import gc

import torch


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
