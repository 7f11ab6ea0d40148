"""A census of tensors: which of those that a step made are still there steps later, and why."""

from __future__ import annotations

import gc
import types
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from weakref import ref

import torch

from oomguard.watch.chain import Chain, find_chains
from oomguard.watch.graph import saved_by, storage_of

if TYPE_CHECKING:
    from collections.abc import Iterator

Manner = Literal["kept", "graph", "grown", "traceback"]

_BLOCK_BYTES = 512  # kMinBlockSize of CUDACachingAllocator: no tensor takes less
_NODES = 20_000  # of autograd graphs, in one census
_ROOTS = 256  # tensors whose graphs are looked at
_GROUPS = 6  # for which a holder is looked for
_REPORTED = 3
_SHARE = 0.1  # of the largest group's bytes: smaller ones are not the cause


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Tensors that one holder keeps from step to step.

    Attributes:
        chain: From the holder to one of them; `None` where nothing in Python holds it.
        manner: `"kept"`: every step leaves tensors behind. `"graph"`: the autograd graph of what is
            kept saves them. `"grown"`: one tensor is replaced by a larger one. `"traceback"`: the
            frames of an exception hold them.
        tensors: What they are, such as `"float32 [4, 16, 512]"`.
        count: How many of them one interval between two marks left behind.
        size_bytes: What these take.
        node: The autograd node that saves them, for `"graph"`.
    """

    chain: Chain | None
    manner: Manner
    tensors: str
    count: int
    size_bytes: int
    node: str | None = None


@dataclass(eq=False)
class _Group:
    """Tensors alike, and what they keep: bytes by address."""

    tensors: list[ref[torch.Tensor]] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    own_bytes: int = 0
    nodes: Counter[str] = field(default_factory=Counter)
    grown: bool = False
    chain: Chain | None = None

    def add(
        self, entry: ref[torch.Tensor], tensor: torch.Tensor, saved: dict[int, tuple[int, str]]
    ) -> None:
        """Count a tensor and what its graph saves."""
        self.tensors.append(entry)
        address, size_bytes = storage_of(tensor)
        self.sizes[address] = size_bytes
        self.own_bytes += size_bytes
        for at, (saved_bytes, node) in saved.items():
            if self.sizes.setdefault(at, saved_bytes) and at != address:
                self.nodes[node] += saved_bytes

    def keep_largest(self, size_bytes: int) -> None:
        """Leave out what is smaller than `size_bytes`."""
        found = [(entry, entry()) for entry in self.tensors]
        self.tensors = [e for e, t in found if t is not None and storage_of(t)[1] >= size_bytes]

    @property
    def size_bytes(self) -> int:
        """What all of it takes."""
        return sum(map(_rounded, self.sizes.values()))

    @property
    def manner(self) -> Manner:
        """See `Holding`."""
        if self.chain is not None and self.chain.leads_through(types.TracebackType):
            return "traceback"
        if self.grown:
            return "grown"
        return "graph" if self.nodes and self.size_bytes > 2 * self.own_bytes else "kept"

    def member(self) -> ref[torch.Tensor]:
        """One from the middle: the first and the last may be held by something else too."""
        return self.tensors[len(self.tensors) // 2]

    def text(self) -> str:
        """Type and shape of a member."""
        tensor = self.member()()
        if tensor is None:
            return "tensors"
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@dataclass(frozen=True)
class _Mark:
    """The tensors that are there, and the bytes of each kind."""

    alive: dict[int, ref[torch.Tensor]]
    totals: Counter[tuple[torch.dtype, int]]

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
    """Marks the live tensors three times, steps apart, and says which stayed and who holds them.

    A tensor that was born after the first mark and lives at both others outlived its step. Only
    weak references are kept between the marks. A mark takes 0.05 s in a process with a million
    objects, the answer 0.2 to 1 s.

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
        for tensor in live_tensors(self._device_type):
            alive[id(tensor)] = ref(tensor)
            address, size_bytes = storage_of(tensor)
            sizes[tensor.dtype, tensor.dim()][address] = size_bytes
        totals = Counter({kind: sum(found.values()) for kind, found in sizes.items()})
        self._marks.append(_Mark(alive, totals))

    def holdings(self) -> list[Holding]:
        """Who holds what stayed, the largest first; call it at the last mark."""
        roots = self._roots()
        groups = [*self._survivors(roots), *self._grown(), *self._running(roots)]
        groups = [group for group in groups if group.size_bytes]
        ranked = sorted(groups, key=lambda group: -group.size_bytes)[: _GROUPS - 1]
        # Thousands of small tensors are a leak too: the most numerous are looked at in any case.
        most = max(groups, key=lambda group: len(group.tensors), default=None)
        ranked += [most] if most is not None and most not in ranked else []
        chains = find_chains([group.member() for group in ranked])
        for group, chain in zip(ranked, chains, strict=True):
            group.chain = chain
        _look_into_graphs([group for group in ranked if group.chain is None], roots)
        return _merged(ranked)

    def _known(self) -> set[int]:
        """Addresses of what is older than the first mark: no graph is to blame for that."""
        old = (entry() for entry in self._marks[0].alive.values())
        return {storage_of(tensor)[0] for tensor in old if tensor is not None}

    def _roots(self) -> list[_Root]:
        """Live tensors with a graph behind them, and what it saves."""
        known, roots, nodes = self._known(), [], _NODES
        for entry in self._marks[-1].alive.values():
            tensor = entry()
            if tensor is None or tensor.grad_fn is None:
                continue
            saved, seen = saved_by(tensor.grad_fn, nodes)
            new = {address: found for address, found in saved.items() if address not in known}
            nodes -= seen
            if new:
                roots.append(_Root(entry, new))
            if nodes <= 0 or len(roots) >= _ROOTS:
                break
        return roots

    def _survivors(self, roots: list[_Root]) -> Iterator[_Group]:
        """What was born between the first two marks and is still there."""
        first, second, third = self._marks
        saved = {id(root.tensor()): root.saved for root in roots}
        groups: dict[tuple[object, ...], _Group] = defaultdict(_Group)
        for key, entry in second.alive.items():
            tensor = entry()
            if tensor is None or first.has(key, tensor) or not third.has(key, tensor):
                continue
            last = tensor.shape[-1] if tensor.dim() else 0
            alike = (type(tensor), tensor.dtype, tensor.dim(), last, type(tensor.grad_fn))
            groups[alike].add(entry, tensor, saved.get(key, {}))
        yield from groups.values()

    def _grown(self) -> Iterator[_Group]:
        """Young tensors of the kinds that take more than before: larger ones replace them."""
        first, second, third = self._marks
        groups: dict[tuple[torch.dtype, int], _Group] = defaultdict(lambda: _Group(grown=True))
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

    def _running(self, roots: list[_Root]) -> Iterator[_Group]:
        """Young tensors whose graph goes back over steps, as that of a running sum does."""
        second = self._marks[1]
        for root in roots:
            tensor = root.tensor()
            if tensor is not None and not second.has(id(tensor), tensor):
                group = _Group()
                group.add(root.tensor, tensor, root.saved)
                yield group


def live_tensors(device_type: str) -> Iterator[torch.Tensor]:
    """Every tensor that Python knows of on devices of a type."""
    kinds: dict[type, bool] = {}
    for found in gc.get_objects():
        kind = type(found)
        is_tensor = kinds.get(kind)
        if is_tensor is None:
            is_tensor = kinds[kind] = issubclass(kind, torch.Tensor)
        if is_tensor and found.device.type == device_type:
            yield found


def _look_into_graphs(groups: list[_Group], roots: list[_Root]) -> None:
    """Name the graph that saves what no Python object holds."""
    blamed: list[tuple[_Group, _Root]] = []
    for group in groups:
        # What lies inside a graph ends a smaller one; the holder is at the end of the largest.
        saving = [root for root in roots if not group.sizes.keys().isdisjoint(root.saved)]
        if saving:
            blamed.append((group, max(saving, key=lambda root: len(root.saved))))
    chains = find_chains([root.tensor for _, root in blamed])
    for (group, root), chain in zip(blamed, chains, strict=True):
        group.chain = chain
        group.nodes += Counter(
            {name: size for at, (size, name) in root.saved.items() if at in group.sizes}
        )


def _merged(groups: list[_Group]) -> list[Holding]:
    """One entry for each holder, without those that hold little."""
    by_holder: dict[str, list[_Group]] = defaultdict(list)
    for group in groups:
        by_holder[group.chain.key if group.chain is not None else ""].append(group)
    holdings = [_holding(held) for held in by_holder.values()]
    holdings.sort(key=lambda holding: -holding.size_bytes)
    most = max((holding.size_bytes for holding in holdings), default=0)
    return [h for h in holdings if h.size_bytes >= _SHARE * most][:_REPORTED]


def _holding(groups: list[_Group]) -> Holding:
    sizes = {address: size for group in groups for address, size in group.sizes.items()}
    largest = max(groups, key=lambda group: group.size_bytes)
    return Holding(
        chain=largest.chain,
        manner=largest.manner,
        tensors=largest.text(),
        count=sum(len(group.tensors) for group in groups),
        size_bytes=sum(map(_rounded, sizes.values())),
        node=next((name for name, _ in largest.nodes.most_common(1)), None),
    )


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
