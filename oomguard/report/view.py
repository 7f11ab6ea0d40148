"""Tables and figures as plain text; the templates give them their form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_MINUTE_S, _HOUR_S = 60, 3600


@dataclass(frozen=True)
class Column:
    """A column's name, and how its cells are set."""

    name: str
    numeric: bool = False
    code: bool = False


@dataclass(frozen=True)
class View:
    """A table: a caption, columns, and rows of text."""

    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Figure:
    """One number that is shown large, and a note below it."""

    name: str
    value: str
    note: str = ""


def duration(seconds: float) -> str:
    """`"42.1 s"`, `"3 min 20 s"` or `"2 h 05 min"`."""
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), _MINUTE_S)
    if seconds < _HOUR_S:
        return f"{minutes} min {rest:02d} s"
    return "{} h {:02d} min".format(*divmod(minutes, _MINUTE_S))
