"""Which storages lie behind tensors, and which tensors behind modules and wrapper subclasses."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of the tensors in what an op took or returned, nested as ops nest it.

    Sparse tensors other than COO, and oneDNN's opaque ones, yield none.
    """
    if isinstance(value, torch.Tensor):
        try:
            yield value.untyped_storage()
        except NotImplementedError:  # a sparse or an opaque tensor
            if value.layout is torch.sparse_coo:
                # indices() and values() would refuse uncoalesced tensors: gradients are that.
                yield value._indices().untyped_storage()  # noqa: SLF001
                yield value._values().untyped_storage()  # noqa: SLF001
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from storages(item)
    elif isinstance(value, dict):
        yield from storages(list(value.values()))


def owned_tensors(items: Iterable[torch.nn.Module | torch.Tensor]) -> Iterator[torch.Tensor]:
    """The plain tensors that modules and tensors consist of, gradients included."""
    for item in items:
        if isinstance(item, torch.nn.Module):
            yield from owned_tensors(chain(item.parameters(), item.buffers()))
            continue
        if is_traceable_wrapper_subclass(item):
            names, _ = item.__tensor_flatten__()
            yield from owned_tensors(getattr(item, name) for name in names)
        else:
            yield item
        if item.is_leaf and item.grad is not None:
            yield from owned_tensors([item.grad])
