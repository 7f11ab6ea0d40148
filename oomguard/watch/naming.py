"""Names for the links of a chain: attributes, places in a list, closures, variables of a frame."""

from __future__ import annotations

import sys
import sysconfig
import types
from collections import deque
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# What has no name of its own but leads from one named thing to the next.
_LINKS = (
    *(dict, list, tuple, set, frozenset, deque, BaseException),
    *(types.CellType, types.FrameType, types.TracebackType, types.ModuleType, types.MethodType),
    *(types.BuiltinFunctionType, types.GeneratorType, types.CoroutineType, types.MappingProxyType),
)
_LIBRARIES = frozenset(
    ("oomguard", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
)
_INSTALLED = tuple(
    str(Path(sysconfig.get_path(name)).resolve())
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_OF_MODULES = ("_buffers", "_parameters", "_modules")  # `nn.Module` finds attributes in these too
_PLAIN = (str, int, float, bool, type(None))
_SHOWN = 40  # characters of a key


@cache
def is_users(module: str) -> bool:
    """Whether a module of this name is neither Python's own nor part of an installed package."""
    if module == "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module.partition(".")[0] in _LIBRARIES:
        return False
    return not is_installed(file)


@cache
def is_installed(file: str) -> bool:
    """Whether a source file is Python's own or part of an installed package."""
    path = Path(file).resolve()
    return (
        file.startswith("<")
        or file == "??"
        or str(path).startswith(_INSTALLED)
        or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    )


def owner_of(way: Sequence[Any]) -> type | None:
    """The type of `way[0]` if a chain can begin there: what it holds has a name in it."""
    owner, held = way[0], way[1]
    if isinstance(owner, types.FunctionType):
        parts = (owner.__closure__, owner.__defaults__, owner.__kwdefaults__, owner.__dict__)
        return types.FunctionType if any(part is held for part in parts) else None
    if isinstance(owner, type):
        return owner if len(way) > 2 and _name_in(vars(owner), way[2]) is not None else None
    if isinstance(owner, _LINKS):
        return None
    named = held is _dict_of(owner) or _attribute(owner, held) is not None
    return type(owner) if named else None


def module_of(owner: Any) -> str:
    """The module where an owner's class, or a function, was written."""
    made = owner if isinstance(owner, (type, types.FunctionType)) else type(owner)
    return str(made.__module__)


def render(way: Sequence[Any], variable: str | None = None) -> tuple[str, str]:
    """The chain as text, and its first link.

    Args:
        way: From the owner to what it holds, each holding the next.
        variable: The global variable that the first is.
    """
    links = list(_links(way))
    if variable is not None:
        links.insert(0, (variable, ""))
    text = " > ".join(name + place for name, place in links)
    return text, links[0][0] if links else text


def _links(way: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Name and place of every link that says something."""
    index = 0
    while index < len(way) - 1:
        name, place, taken = _link(way[index : index + 4])
        index += taken
        if name:
            yield name, place


def _link(way: Sequence[Any]) -> tuple[str, str, int]:
    """Name and place of the second in the first, and how many steps of the way that says."""
    holder, held = way[0], way[1]
    kind = type(holder).__name__
    if isinstance(holder, types.FunctionType):
        return _function_link(holder, held, way[2])
    if isinstance(holder, type):
        return f"{holder.__name__}.{_name_in(vars(holder), way[2])}", "", 2
    if isinstance(holder, dict):
        return kind, f"[{_key_in(holder, held)}, one of {len(holder)}]", 1
    if isinstance(holder, (list, tuple, deque)):
        place = next((n for n, entry in enumerate(holder) if entry is held), 0)
        return kind, f"[{place} of {len(holder)}]", 1
    if isinstance(holder, (set, frozenset)):
        return kind, f"[one of {len(holder)}]", 1
    if isinstance(holder, types.FrameType):
        return _frame_link(holder, held)
    if isinstance(holder, (types.TracebackType, types.CellType, types.MethodType)):
        return "", "", 1
    if isinstance(holder, (types.GeneratorType, types.CoroutineType)):
        return f"{holder.__name__}(), which is not finished", "", 1
    if isinstance(holder, BaseException) and isinstance(held, types.TracebackType):
        return f"{kind}.__traceback__", "", 1
    attributes = _dict_of(holder)
    if attributes is None or held is not attributes:
        name = _attribute(holder, held)
        return (kind if name is None else f"{kind}.{name}"), "", 1
    name = _name_in(attributes, way[2])
    if name in _OF_MODULES and isinstance(holder, nn.Module):
        return f"{kind}.{_name_in(way[2], way[3])}", "", 3
    return f"{kind}.{name}", "", 2


def _function_link(function: types.FunctionType, held: Any, after: Any) -> tuple[str, str, int]:
    called = f"{function.__qualname__.replace('<locals>.', '')}()"
    if function.__closure__ is not None and held is function.__closure__:
        names = function.__code__.co_freevars
        place = next((n for n, cell in enumerate(function.__closure__) if cell is after), 0)
        return f"{names[place]} in the closure of {called}", "", 2
    if held is function.__dict__:
        return f"{called}.{_name_in(held, after)}", "", 2
    return f"default argument of {called}", "", 2


def _frame_link(frame: types.FrameType, held: Any) -> tuple[str, str, int]:
    where = f"{frame.f_code.co_name}() at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    return f"{_name_in(frame.f_locals, held) or 'a value'} in {where}", "", 1


def _dict_of(thing: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(thing, "__dict__")
    except (AttributeError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _attribute(thing: Any, value: Any) -> str | None:
    """The attribute of `thing` that is `value`, without running code of its class."""
    name = _name_in(_dict_of(thing) or {}, value)
    if name is not None:
        return name
    for kind in type(thing).__mro__:
        for slot, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    if member.__get__(thing) is value:
                        return slot
                except AttributeError:  # not set
                    continue
    return None


def _name_in(names: Mapping[str, Any], value: Any) -> str | None:
    return next((name for name, entry in list(names.items()) if entry is value), None)


def _key_in(mapping: dict[Any, Any], value: Any) -> str:
    """The key of a value, as text where that is short and runs no code of others."""
    for key, entry in list(dict.items(mapping)):  # past what a subclass makes of it
        if entry is value:
            parts = key if type(key) is tuple else (key,)
            if not all(type(part) in _PLAIN for part in parts):
                return f"a {type(key).__name__}"
            text = repr(key)
            return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return "a key"
