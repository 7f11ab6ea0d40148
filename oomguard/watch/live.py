"""Memory and plan on the progress bar of a terminal."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from transformers import ProgressCallback
from transformers.trainer_callback import CallbackHandler

if TYPE_CHECKING:
    from oomguard.plan import Plan
    from oomguard.watch.readings import Reading

_UNITS = ((2**30, "GiB"), (2**20, "MiB"))


def handler() -> CallbackHandler | None:
    """The handler that calls this callback; `None` where none does.

    A callback is given neither the trainer nor its handler, which alone knows the other callbacks.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "call_event":
            caller = frame.f_locals.get("self")
            if isinstance(caller, CallbackHandler):
                return caller
        frame = frame.f_back
    return None


def bar(callbacks: CallbackHandler | None) -> Any:
    """The progress bar of the running training; `None` where there is none, as in a notebook."""
    for callback in callbacks.callbacks if callbacks is not None else ():
        if isinstance(callback, ProgressCallback):
            return callback.training_bar
    return None


def text(reading: Reading, card_total_bytes: int | None, plan: Plan | None) -> str:
    """What the bar says, as in `vram 10.9/12.0 GiB, plan 4 passes x 2`; empty if nothing is known.

    The memory is what the process holds of the card: what is reserved there, and on a card
    without an allocator of its own the peak of the last step.
    """
    parts = []
    held = reading.reserved_bytes or reading.peak_allocated_bytes or reading.allocated_bytes
    if held is not None:
        size, unit = next((u for u in _UNITS if (card_total_bytes or held) >= u[0]), _UNITS[-1])
        total = f"/{card_total_bytes / size:.1f}" if card_total_bytes is not None else ""
        parts.append(f"vram {held / size:.1f}{total} {unit}")
    if plan is not None:
        parts.append(f"plan {plan.passes_per_step} passes x {plan.rows_per_pass}")
    return ", ".join(parts)
