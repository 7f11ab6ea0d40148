"""Tensors that one holder keeps, put together from groups of tensors alike."""

from __future__ import annotations

import types
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from oomguard.watch.graph import storage_of

if TYPE_CHECKING:
    from weakref import ref

    import torch

    from oomguard.watch.chain import Chain

Manner = Literal["kept", "graph", "grown", "traceback"]

_BLOCK_BYTES = 512  # kMinBlockSize of CUDACachingAllocator: no tensor takes less


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
class Group:
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


def held_by(groups: list[Group]) -> Holding:
    """The holding that groups with one holder make."""
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
