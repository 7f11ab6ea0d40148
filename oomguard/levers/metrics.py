"""The running metrics that a trainer keeps in plain Python: roll back, replace those of passes."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Added up by the Trainer's loop between two micro-batches, so no attempt to run one changes it.
_LOOP_OWNS = "current_flos"
LARGEST_DICT = 1000


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
    elif isinstance(value, dict) and len(value) <= LARGEST_DICT:
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


class PassEntries:
    """What the passes of one batch add to TRL's metrics, to be replaced in the end."""

    def __init__(self, trainer: Any, mode: str = "train") -> None:
        """Start before the first pass; `mode` as in `lengths`."""
        self._trainer = trainer
        self._mode = mode
        self._start = self._last = lengths(trainer, mode)
        self._found: dict[str, list[tuple[Any, float]]] = {}

    def add(self, part: Any) -> None:
        """Note what the pass `part` has entered."""
        now = lengths(self._trainer, self._mode)
        for key, length in now.items():
            new = self._trainer._metrics[self._mode][key][self._last.get(key, 0) : length]
            self._found.setdefault(key, []).extend((part, value) for value in new)
        self._last = now

    def replace(
        self, combine: Callable[[Any, dict[str, list[tuple[Any, float]]]], dict[str, float]]
    ) -> None:
        """Put one entry in the place of those of the passes, for each metric that `combine` names.

        Args:
            combine: As `merged_metrics.merged`.
        """
        for key, value in combine(self._trainer, self._found).items():
            entries = self._trainer._metrics[self._mode].setdefault(key, [])
            entries[self._start.get(key, 0) :] = [value]
