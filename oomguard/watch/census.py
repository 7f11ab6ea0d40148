"""A census of tensors: which of those that a step made are still there steps later, and why."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from weakref import ref

import torch
from torch._subclasses.fake_tensor import FakeTensor

from oomguard.watch.chain import find_chains
from oomguard.watch.graph import reachable, saved_by, storage_of
from oomguard.watch.holding import Group, held_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oomguard.watch.holding import Holding

_NODES = 20_000  # of autograd graphs, in one census
_ROOTS = 256  # tensors whose graphs are looked at
_ENDS = 4  # of the graphs that save the same: some end inside another
_GROUPS = 6  # for which a holder is looked for
_REPORTED = 3
_SHARE = 0.1  # of the largest group's bytes: smaller ones are not the cause


@dataclass(frozen=True)
class _Mark:
    """The tensors that are there, the bytes of each kind, and the nodes of all their graphs."""

    alive: dict[int, ref[torch.Tensor]]
    totals: Counter[tuple[torch.dtype, int]]
    nodes: int

    def has(self, key: int, tensor: torch.Tensor) -> bool:
        """Whether the tensor was there; ids are used again."""
        entry = self.alive.get(key)
        return entry is not None and entry() is tensor


@dataclass(frozen=True)
class _Root:
    """A tensor, and what the graph behind it saves: bytes and node by address."""

    tensor: ref[torch.Tensor]
    saved: dict[int, tuple[int, str]]


class Census:
    """Marks the live tensors, steps apart; the last three say which stayed, and who holds them.

    A tensor that was born after the first mark and lives at both others outlived its step. Only
    weak references are kept between the marks. A mark takes 0.05 to 0.2 s in a process with a
    million objects, the answer 0.2 to 1 s.

    Args:
        device_type: Only tensors on such a device count.
    """

    MARKS = 3

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._marks: list[_Mark] = []

    @property
    def is_complete(self) -> bool:
        """Whether all marks are made."""
        return len(self._marks) >= self.MARKS

    def mark(self) -> None:
        """Remember which tensors are there now."""
        alive: dict[int, ref[torch.Tensor]] = {}
        sizes: dict[tuple[torch.dtype, int], dict[int, int]] = defaultdict(dict)
        roots = []
        for tensor in live_tensors(self._device_type):
            alive[id(tensor)] = ref(tensor)
            address, size_bytes = storage_of(tensor)
            sizes[tensor.dtype, tensor.dim()][address] = size_bytes
            roots += [] if tensor.grad_fn is None else [tensor.grad_fn]
        totals = Counter({kind: sum(found.values()) for kind, found in sizes.items()})
        self._marks = [*self._marks, _Mark(alive, totals, len(reachable(roots, _NODES)))][
            -self.MARKS :
        ]

    def holdings(self, beyond: tuple[type, ...] = ()) -> list[Holding]:
        """Who holds what stayed, the largest first; call it at the last mark.

        Args:
            beyond: Types of objects that are not named, but what holds them is.
        """
        roots = self._roots()
        groups = [*self._survivors(roots), *self._grown(), *self._running(roots)]
        groups = [group for group in groups if group.size_bytes]
        ranked = sorted(groups, key=lambda group: -group.size_bytes)[: _GROUPS - 1]
        # Thousands of small tensors are a leak too: the most numerous are looked at in any case.
        most = max(groups, key=lambda group: len(group.tensors), default=None)
        ranked += [most] if most is not None and most not in ranked else []
        chains = find_chains([group.member() for group in ranked], beyond)
        for group, chain in zip(ranked, chains, strict=True):
            group.chain = chain
        _look_into_graphs([group for group in ranked if group.chain is None], roots)
        return _merged(ranked)

    def _known(self) -> set[int]:
        """Addresses of what is older than the first mark: no graph is to blame for that."""
        old = (entry() for entry in self._marks[0].alive.values())
        return {storage_of(tensor)[0] for tensor in old if tensor is not None}

    def _roots(self) -> list[_Root]:
        """Tensors younger than the first mark with a graph behind them, and what it saves."""
        known, roots, nodes = self._known(), [], _NODES
        for key, entry in self._marks[-1].alive.items():
            tensor = entry()
            if tensor is None or tensor.grad_fn is None or self._marks[0].has(key, tensor):
                continue
            saved, seen = saved_by(tensor.grad_fn, nodes)
            new = {address: found for address, found in saved.items() if address not in known}
            nodes -= seen
            if new:
                roots.append(_Root(entry, new))
            if nodes <= 0 or len(roots) >= _ROOTS:
                break
        return roots

    def _survivors(self, roots: list[_Root]) -> Iterator[Group]:
        """What was born between the first two marks and is still there."""
        first, second, third = self._marks
        saved = {id(root.tensor()): root.saved for root in roots}
        groups: dict[tuple[object, ...], Group] = defaultdict(Group)
        for key, entry in second.alive.items():
            tensor = entry()
            if tensor is None or first.has(key, tensor) or not third.has(key, tensor):
                continue
            last = tensor.shape[-1] if tensor.dim() else 0
            alike = (type(tensor), tensor.dtype, tensor.dim(), last, type(tensor.grad_fn))
            groups[alike].add(entry, tensor, saved.get(key, {}))
        yield from groups.values()

    def _grown(self) -> Iterator[Group]:
        """Young tensors of the kinds that take more than before: larger ones replace them."""
        first, second, third = self._marks
        groups: dict[tuple[torch.dtype, int], Group] = defaultdict(lambda: Group(grown=True))
        for key, entry in third.alive.items():
            tensor = entry()
            if tensor is None or second.has(key, tensor):
                continue
            kind = tensor.dtype, tensor.dim()
            if first.totals[kind] < second.totals[kind] < third.totals[kind]:
                groups[kind].add(entry, tensor, {})
        for kind, group in groups.items():
            growth = third.totals[kind] - second.totals[kind]
            largest = max(group.sizes.values(), default=0)
            if largest > growth:  # else these are one by one what the survivors are
                group.keep_largest(growth)
                yield group

    def _running(self, roots: list[_Root]) -> Iterator[Group]:
        """Young tensors whose graph goes back over steps, as that of a running sum does."""
        first, second, third = self._marks
        if not (first.nodes < second.nodes < third.nodes or third.nodes >= _NODES):
            return
        for root in roots:
            tensor = root.tensor()
            if tensor is not None and not second.has(id(tensor), tensor):
                group = Group()
                group.add(root.tensor, tensor, root.saved)
                yield group


def live_tensors(device_type: str) -> Iterator[torch.Tensor]:
    """Every tensor that Python knows of on devices of a type."""
    return (found for found in gc.get_objects() if is_tensor_on(found, device_type))


def is_tensor_on(found: object, device_type: str) -> bool:
    """Whether an object is a tensor on devices of a type; asks nothing of other objects."""
    kinds = type(found).__mro__
    if torch.Tensor not in kinds or FakeTensor in kinds:  # a fake one has no memory
        return False
    return cast("torch.Tensor", found).device.type == device_type


def _look_into_graphs(groups: list[Group], roots: list[_Root]) -> None:
    """Name the graph that saves what no Python object holds."""
    # What lies inside a graph ends a smaller one; the holder is at the end of the largest.
    roots = sorted(roots, key=lambda root: -len(root.saved))
    blamed = [
        (group, root)
        for group in groups
        for root in [r for r in roots if not group.sizes.keys().isdisjoint(r.saved)][:_ENDS]
    ]
    chains = find_chains([root.tensor for _, root in blamed])
    for (group, root), chain in zip(blamed, chains, strict=True):
        if group.chain is None and chain is not None:
            group.chain = chain
            for at, (size_bytes, name) in root.saved.items():
                group.nodes[name] += size_bytes if at in group.sizes else 0


def _merged(groups: list[Group]) -> list[Holding]:
    """One entry for each holder, without those that hold little."""
    by_holder: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_holder[group.chain.root if group.chain is not None else ""].append(group)
    holdings = [held_by(held) for held in by_holder.values()]
    holdings.sort(key=lambda holding: -holding.size_bytes)
    named = [holding for holding in holdings if holding.chain is not None]
    if holdings[:1] == named[:1]:
        holdings = named  # the rest hangs on the graphs of these, as far as can be told
    return [h for h in holdings if h.size_bytes >= _SHARE * holdings[0].size_bytes][:_REPORTED]
