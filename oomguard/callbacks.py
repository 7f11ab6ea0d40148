"""Out of memory in a callback: say which callback it was."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from oomguard import oom

if TYPE_CHECKING:
    from collections.abc import Callable


def name_callback(call_event: Callable[..., Any], event: str, *args: Any, **kwargs: Any) -> Any:
    """`call_event(event, ...)`; an out-of-memory error that leaves it names the callback.

    Args:
        call_event: The `CallbackHandler`'s own.
        event: The name of the event, such as `"on_step_end"`.
        *args: Go to `call_event`.
        **kwargs: Go to `call_event`.
    """
    try:
        return call_event(event, *args, **kwargs)
    except (RuntimeError, MemoryError) as error:
        if oom.classify(error) is not None:
            callback = _failed(error)
            if callback is not None:
                error.add_note(
                    f"Memory ran out in {type(callback).__name__}.{event}, a callback. What a "
                    "callback does is not repeated; let it use less memory, or remove it with "
                    f"trainer.remove_callback({type(callback).__name__})."
                )
        raise


def _failed(error: BaseException) -> Any:
    """The callback that the handler's loop was calling."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "call_event" and "callback" in frame.f_locals:
            return frame.f_locals["callback"]
    return None
