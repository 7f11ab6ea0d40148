"""What an action added to the numbers, lists and dicts that a trainer keeps, to add it once more.

For an action that must not run again when what followed it is undone and made again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oomguard.levers.metrics import LARGEST_DICT

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class _Kept:
    """A list before the action, and how long it was."""

    value: list[Any]
    length: int


@dataclass(frozen=True)
class _Extended:
    tail: list[Any]


@dataclass(frozen=True)
class _Refilled:
    content: list[Any] | deque[Any]


class Journal:
    """Begun before an action, closed after it; then `repeat` does to the trainer what it did."""

    def __init__(self, trainer: Any) -> None:
        """Remember the trainer's numbers, lists, dicts and deques."""
        self._trainer = trainer
        self._before = _frozen(vars(trainer))
        self._changes: dict[Any, Any] = {}

    def close(self) -> None:
        """Note what has changed."""
        self._changes = _changes(self._before, vars(self._trainer))

    def repeat(self) -> None:
        """Make the same changes again."""
        _apply(vars(self._trainer), self._changes)


def _frozen(values: Mapping[Any, Any]) -> dict[Any, Any]:
    frozen: dict[Any, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            if len(value) <= LARGEST_DICT:
                frozen[key] = _frozen(value)
        elif isinstance(value, list):
            frozen[key] = _Kept(value, len(value))
        elif isinstance(value, deque):
            frozen[key] = list(value)
        elif isinstance(value, (int, float)):
            frozen[key] = value
    return frozen


def _changes(before: Mapping[Any, Any], now: Mapping[Any, Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict):
            if len(value) <= LARGEST_DICT:
                inner = _changes(old if isinstance(old, dict) else {}, value)
                if inner or old is None:
                    found[key] = inner
        elif isinstance(value, deque):  # of a limited length: its start may have gone
            if not isinstance(old, list) or [*map(id, old)] != [*map(id, value)]:
                found[key] = _Refilled(value.copy())
        elif isinstance(value, list):
            same = isinstance(old, _Kept) and old.value is value
            tail = value[old.length :] if isinstance(old, _Kept) and same else []
            if tail or not same:
                found[key] = _Extended(tail) if same else _Refilled(list(value))
        elif isinstance(value, (int, float)) and (old is None or value != old):
            found[key] = value
    return found


def _apply(values: dict[Any, Any], changes: Mapping[Any, Any]) -> None:
    for key, change in changes.items():
        if isinstance(change, dict):
            _apply(values.setdefault(key, {}), change)
        elif isinstance(change, _Extended):
            values.setdefault(key, []).extend(change.tail)
        elif isinstance(change, _Refilled) and isinstance(values.get(key), deque):
            values[key].clear()
            values[key].extend(change.content)
        elif isinstance(change, _Refilled):
            values[key] = change.content.copy()
        else:
            values[key] = change
