"""Who holds an object: the shortest way to it from something that a user has named."""

from __future__ import annotations

import gc
import sys
import time
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oomguard.watch import naming

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from weakref import ref

_DEPTH = 14
_PATIENCE_S = 2.0  # one depth takes 0.03 s for a million objects
_WIDTH = 300  # referrers followed at one depth: further away lies the whole process


@dataclass(frozen=True)
class Chain:
    """The way from a holder to what it holds.

    Attributes:
        text: Such as `"MyCallback.outputs > list[84 of 114]"`.
        root: Where it begins, such as `"MyCallback.outputs"`.
        owner: The object where the chain begins; `None` for a global variable.
        kinds: Types of what lies on the way, the owner's first.
    """

    text: str
    root: str
    owner: type | None
    kinds: tuple[type, ...]

    def leads_through(self, *kinds: type) -> bool:
        """Whether something of these types lies on the way."""
        return any(issubclass(kind, kinds) for kind in self.kinds)


class _Node:
    """An object on the way from a target (the first has no `nearer`) to what holds it."""

    __slots__ = ("nearer", "object", "target")

    def __init__(self, found: Any, nearer: _Node | None, target: int) -> None:
        self.object = found
        self.nearer = nearer
        self.target = target

    def way(self) -> list[Any]:
        """The objects from here to the target."""
        node: _Node | None = self
        way = []
        while node is not None:
            way.append(node.object)
            node = node.nearer
        return way


def find_chains(targets: Sequence[ref[Any]], beyond: tuple[type, ...] = ()) -> list[Chain | None]:
    """The shortest chain to every target that begins at something of the user's own.

    That is an attribute of an object, a closure or a global variable outside of installed
    packages; where there is none, of an installed package. Variables of functions that are running
    are no holders: they let go by themselves.

    Args:
        targets: Weak, so that the caller's own hold on them is not found.
        beyond: Types of objects where no chain begins: what holds them is asked for.

    Returns:
        A chain for each target; `None` where no Python object holds it.
    """
    frontier = [_Node(target(), None, index) for index, target in enumerate(targets)]
    frontier = [node for node in frontier if node.object is not None]
    running = _running_frames()
    seen = {(node.target, id(node.object)) for node in frontier}
    chains: dict[int, Chain] = {}
    second_best: dict[int, Chain] = {}
    until_s = time.perf_counter() + _PATIENCE_S
    for _ in range(_DEPTH):
        if not frontier or time.perf_counter() > until_s:
            break
        for node, module, name in _globals(frontier):
            way = node.way()
            chain = Chain(*naming.render(way, f"{module}.{name}"), None, _kinds(way))
            (chains if naming.is_users(module) else second_best).setdefault(node.target, chain)
        frontier = _referrers(frontier, seen, running)
        for node in frontier:
            way = node.way()
            owner = naming.owner_of(way)
            if owner is not None and not issubclass(owner, beyond):
                chain = Chain(*naming.render(way), owner, _kinds(way))
                users = naming.is_users(naming.module_of(way[0]))
                (chains if users else second_best).setdefault(node.target, chain)
        frontier = [node for node in frontier if node.target not in chains]
    return [chains.get(index) or second_best.get(index) for index in range(len(targets))]


def _kinds(way: list[Any]) -> tuple[type, ...]:
    return tuple(map(type, way))


def _referrers(frontier: list[_Node], seen: set[tuple[int, int]], running: set[int]) -> list[_Node]:
    """The nodes one step further away."""
    nearer: dict[int, list[_Node]] = {}
    for node in frontier:
        nearer.setdefault(id(node.object), []).append(node)
    objects = [nodes[0].object for nodes in nearer.values()]
    modules = {id(vars(module)) for module in _modules()}
    found: list[_Node] = []
    for referrer in gc.get_referrers(*objects):
        if (
            referrer is objects
            or referrer is gc.garbage
            or isinstance(referrer, (_Node, types.ModuleType))
            or id(referrer) in running
            or id(referrer) in modules
        ):
            continue
        for held in gc.get_referents(referrer):
            for node in nearer.get(id(held), ()):
                if (node.target, id(referrer)) in seen or _is_back_link(referrer, held):
                    continue
                seen.add((node.target, id(referrer)))
                found.append(_Node(referrer, node, node.target))
        if len(found) > _WIDTH:
            break
    return found


def _is_back_link(referrer: Any, held: Any) -> bool:
    """A frame knows its caller's, but does not keep what is in there for anybody's use."""
    return isinstance(referrer, types.FrameType) and isinstance(held, types.FrameType)


def _globals(frontier: list[_Node]) -> Iterator[tuple[_Node, str, str]]:
    """Nodes that are global variables, module, name; `gc.get_referrers` sees no frozen modules."""
    nodes: dict[int, list[_Node]] = {}
    for node in frontier:
        nodes.setdefault(id(node.object), []).append(node)
    for module in _modules():
        for name, value in list(vars(module).items()):
            for node in nodes.get(id(value), ()):
                yield node, module.__name__, name


def _modules() -> list[types.ModuleType]:
    return [module for module in list(sys.modules.values()) if type(module) is types.ModuleType]


def _running_frames() -> set[int]:
    """The frames of all threads, by id."""
    running = set()
    for top in sys._current_frames().values():  # noqa: SLF001 - the documented way to them
        frame: types.FrameType | None = top
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
    return running
