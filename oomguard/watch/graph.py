"""What an autograd graph keeps alive, read without running any of its hooks."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_RAW = "_raw_saved_"


def storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of the memory behind a tensor; zeros where it has none of its own."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # sparse, opaque, fake
        return 0, 0


def saved_by(root: Any, nodes: int) -> tuple[dict[int, tuple[int, str]], int]:
    """What the graph that ends in a node saves for a backward pass.

    A graph that went through backward has freed what it saved and is nearly empty.

    Args:
        root: A `grad_fn`.
        nodes: Look at that many nodes at the most.

    Returns:
        Bytes, and the name of the node that saves them, by address; and how many nodes were seen.
    """
    found: dict[int, tuple[int, str]] = {}
    seen = reachable([root], nodes)
    for node in seen:
        for tensor in _tensors_of(node):
            if tensor.is_leaf and tensor.requires_grad:
                continue  # a weight
            address, size_bytes = storage_of(tensor)
            if size_bytes:
                found.setdefault(address, (size_bytes, type(node).__name__))
    return found, len(seen)


def reachable(roots: Iterable[Any], nodes: int) -> list[Any]:
    """The nodes of the graphs that end in `roots`; no more than about `nodes` of them."""
    todo = list(roots)
    seen = dict.fromkeys(todo)
    while todo and len(seen) < nodes:
        for following, _ in todo.pop().next_functions:
            if following is not None and following not in seen:
                seen[following] = None
                todo.append(following)
    return list(seen)


def _tensors_of(node: Any) -> Iterator[torch.Tensor]:
    for name in _raw_names(node.__class__):
        try:
            raw = getattr(node, name)
        except RuntimeError:  # freed
            continue
        for saved in raw if isinstance(raw, (tuple, list)) else (raw,):
            # `data` is what was packed: to unpack it may run a checkpointed forward again.
            yield from _plain(getattr(saved, "data", None))
    # What a `torch.autograd.Function` has put on its `ctx` is not freed by backward.
    for value in getattr(node, "__dict__", {}).values():
        yield from _plain(value)


def _plain(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        yield from (entry for entry in value if isinstance(entry, torch.Tensor))


@cache
def _raw_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith(_RAW))
