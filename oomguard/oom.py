"""Tell an out-of-memory error from any other, read its numbers, drop what it holds."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

import torch

from oomguard.errors import LadderExhaustedError
from oomguard.event import OOMEvent
from oomguard.memory import device
from oomguard.memory.size import format_bytes, parse_bytes

# Texts of errors that are an out-of-memory although their type does not say so. They are matched
# in `RuntimeError`s only, whole phrases, case-insensitively.
_TEXTS = (
    "cuda error: out of memory",
    "cuda out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "nccl error: out of memory",
    "failed to cuda calloc",  # NCCL's own allocations
    "error out of memory at line",  # bitsandbytes
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "mps backend out of memory",
    "xpu out of memory",
    "ur_result_error_out_of_device_memory",
    "hip out of memory",
    "hip error: out of memory",
    "hpu out of memory",
    "npu out of memory",
    "pt_devmem allocation failed",  # HPU
)
_NCCL = re.compile(r"nccl.*out of memory", re.IGNORECASE | re.DOTALL)
_SIZE = r"([\d.]+ (?:[KMGT]i?B|bytes|B))"
_ASKED = re.compile(rf"(?:[Tt]ried to allocate|you tried to allocate) {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")
_ALLOWED = re.compile(rf"{_SIZE} allowed")
_LIVE = re.compile(rf"allocated memory {_SIZE} is allocated by PyTorch")
_UNUSED = re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated")
_TOTAL = re.compile(rf"total capacity of {_SIZE}")


@dataclass(frozen=True)
class OOMFacts:
    """What an out-of-memory error says of itself; `None` where it says nothing."""

    message: str
    asked_bytes: int | None
    free_bytes: int | None
    total_bytes: int | None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


def classify(error: BaseException) -> OOMFacts | None:
    """The facts of an out-of-memory error, or `None` for any other error.

    An out-of-memory is a `torch.OutOfMemoryError`, a `MemoryError`, or a `RuntimeError` with one of
    the listed texts of CUDA, cuBLAS, cuDNN, NCCL, bitsandbytes, the CPU allocator or another
    backend. A `LadderExhaustedError` is none: it is the answer to one.
    """
    if isinstance(error, LadderExhaustedError):
        return None
    text = str(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        if not isinstance(error, RuntimeError):
            return None
        lowered = text.lower()
        if not any(known in lowered for known in _TEXTS) and not _NCCL.search(text):
            return None
    first_line = text.strip().split("\n")[0] or type(error).__name__
    message = first_line.partition(" If reserved but unallocated")[0]  # advice, not a fact
    free, allowed, live = _read(_FREE, text), _read(_ALLOWED, text), _read(_LIVE, text)
    unused = _read(_UNUSED, text)
    if free is not None and allowed is not None and live is not None:
        # Under set_per_process_memory_fraction the device's free memory is not the limit.
        free = max(0, min(free, allowed - live - (unused or 0)))
    reserved = None if live is None else live + (unused or 0)
    return OOMFacts(message, _read(_ASKED, text), free, _read(_TOTAL, text), live, reserved)


def release(error: BaseException | None) -> None:
    """Drop the frames that `error` pins, and those of what it was raised from.

    Call it inside the `except` block and leave the block before retrying: while the traceback
    lives, so do the tensors of the failed frames, and collecting garbage frees nothing.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)
        following = error.__cause__ or error.__context__
        error.__traceback__ = error.__cause__ = error.__context__ = None
        error = following


def caught(error: BaseException) -> OOMFacts:
    """The facts of an out-of-memory error, its frames released; raises any other error again.

    For `except` blocks; what they say of `release` goes for this too.
    """
    facts = classify(error)
    if facts is None:
        raise error
    release(error)
    return facts


def event_of(
    facts: OOMFacts,
    *,
    phase: str,
    step: int,
    micro_batch: int | None = None,
    rows: int | None = None,
    width: int | None = None,
    tokens: int | None = None,
) -> OOMEvent:
    """The event of a failure: what the error says, where it was, and what the device reads now."""
    allocated, reserved = device.allocated_and_reserved_bytes()
    return OOMEvent(
        phase=phase,
        step=step,
        micro_batch=micro_batch,
        rows=rows,
        width=width,
        tokens=tokens,
        asked_bytes=facts.asked_bytes,
        free_bytes=facts.free_bytes,
        total_bytes=facts.total_bytes,
        allocated_bytes=facts.allocated_bytes or allocated,
        reserved_bytes=facts.reserved_bytes or reserved,
        message=facts.message,
    )


def sizes(failure: OOMFacts | OOMEvent) -> str:
    """What was asked for, free and there at all, in brackets after a space; what is known of it."""
    known = {"asked": failure.asked_bytes, "free": failure.free_bytes, "of": failure.total_bytes}
    texts = [f"{name} {format_bytes(size)}" for name, size in known.items() if size is not None]
    return f" ({', '.join(texts)})" if texts else ""


def _read(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    if found is None:
        return None
    size = found.group(1)
    return parse_bytes(size.removesuffix(" bytes") if size.endswith(" bytes") else size)
