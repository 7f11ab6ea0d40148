"""Whether what was read from a file is of the types that a dataclass says."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Mapping

_WHOLE = 2**63  # beyond is no size, step or count


def check(instance: Any, names: Mapping[str, Any] | None = None) -> None:
    """Look at every field of a dataclass, and at the dataclasses in it.

    Args:
        instance: Of a dataclass whose annotations are plain types.
        names: What stands for names in annotations that are imported for type checkers only.

    Raises:
        TypeError: A value is of another type, a number not finite or larger than any that is read.
    """
    hints = get_type_hints(type(instance), localns=dict(names or {}))
    for field in fields(instance):
        value = getattr(instance, field.name)
        if not fits(value, hints[field.name]):
            wanted = getattr(hints[field.name], "__name__", hints[field.name])
            msg = f"{type(instance).__name__}.{field.name} is {value!r:.80}, not {wanted}"
            raise TypeError(msg)
        for nested in value if isinstance(value, (list, tuple)) else (value,):
            if is_dataclass(nested):
                check(nested)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as an annotation says it."""
    origin, of = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in of)
    if origin is Literal:
        return isinstance(value, str) and value in of
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(name, of[0]) and fits(entry, of[1]) for name, entry in value.items()
        )
    if origin in (list, tuple):
        return isinstance(value, origin) and _each_fits(value, of)
    if hint in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _WHOLE
        return whole or (hint is float and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, NoneType if hint is None else hint)


def _each_fits(values: Any, of: tuple[Any, ...]) -> bool:
    if len(of) == 1 or of[-1] is Ellipsis:
        return all(fits(entry, of[0]) for entry in values)
    return len(values) == len(of) and all(map(fits, values, of))
