"""The running metrics that a trainer keeps in plain Python: roll back, merge over passes."""

from __future__ import annotations

import inspect
from collections import deque
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Added up by the Trainer's loop between two micro-batches, so no attempt to run one changes it.
_LOOP_OWNS = "current_flos"
_LARGEST_DICT = 1000
_MASKED_ENTROPY = "per_token_entropy * attention_mask"


def mark(trainer: Any) -> Callable[[], None]:
    """Remember the trainer's numbers, lists and dicts; the result puts them back.

    Lists are remembered by their length: metrics are appended, and a data set kept as a list must
    not be copied at every step. Of tensors and of objects nothing is remembered.
    """
    undo: list[Callable[[], None]] = []
    for name, value in vars(trainer).items():
        if isinstance(value, (int, float)) and name != _LOOP_OWNS:
            undo.append(partial(setattr, trainer, name, value))
        else:
            _mark(value, undo)

    def restore() -> None:
        for action in undo:
            action()

    return restore


def _mark(value: Any, undo: list[Callable[[], None]]) -> None:
    if isinstance(value, list):
        undo.append(partial(_truncate, value, len(value)))
    elif isinstance(value, dict) and len(value) <= _LARGEST_DICT:
        undo.append(partial(_refill, value, dict(value)))
        for inner in value.values():
            _mark(inner, undo)
    elif isinstance(value, deque):
        undo.append(partial(_refill, value, list(value)))


def _truncate(values: list[Any], length: int) -> None:
    del values[length:]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.update if isinstance(container, dict) else container.extend)(content)


def lengths(trainer: Any, mode: str = "train") -> dict[str, int]:
    """Entries of each of TRL's metrics of `"train"` or `"eval"`; empty for other trainers."""
    metrics = getattr(trainer, "_metrics", None)
    own = metrics.get(mode) if isinstance(metrics, dict) else None
    return {key: len(values) for key, values in own.items()} if isinstance(own, dict) else {}


def merge(
    trainer: Any,
    before: dict[str, int],
    shares: Callable[[str], Sequence[float]],
    mode: str = "train",
) -> None:
    """Turn the entries that the passes of one batch made into the one the whole batch makes.

    Args:
        trainer: The trainer, after the passes.
        before: `lengths` before them.
        shares: The share of each pass, adding up to 1, in the batch's `"token"`s that are targets
            or in its `"shown"` ones.
        mode: As in `lengths`.
    """
    prompts = {"entropy"} if entropy_counts_prompts(trainer) else set()
    for key, length in lengths(trainer, mode).items():
        values = trainer._metrics[mode][key]
        start, weights = before.get(key, 0), shares("shown" if key in prompts else "token")
        if length - start == len(weights) > 1:
            values[start:] = [sum(w * v for w, v in zip(weights, values[start:], strict=True))]


def entropy_counts_prompts(trainer: Any) -> bool:
    """Whether `entropy` is a mean over all tokens shown, as in TRL before 1.3, not over targets.

    Nothing but the arithmetic in `SFTTrainer.compute_loss` has changed with it.
    """
    return any(_MASKED_ENTROPY in _loss_source(cls) for cls in type(trainer).__mro__)


@cache
def _loss_source(cls: type) -> str:
    """The source of TRL's own `compute_loss` in this class; empty for other classes."""
    known = cls.__module__.startswith("trl.") and "compute_loss" in vars(cls)
    return inspect.getsource(vars(cls)["compute_loss"]) if known else ""
