"""What the bytes of an allocation are a multiple of.

They are a whole multiple of one product of the batch and the length: of the rows, of their square,
of the rows without their last token, of a length rounded up to what a kernel wants. Two passes of
different shape tell which.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from oomguard.prediction.kernels import up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from oomguard.prediction.shape import Shape
    from oomguard.prediction.trace import Trace

    Product = Callable[[Shape], int]

MASK_ALIGNMENT = 16


# What the bytes of an allocation can be a multiple of, the likelier first.
PRODUCTS: tuple[Product, ...] = (
    lambda shape: 1,
    lambda shape: shape.rows * shape.length,
    lambda shape: shape.predicted,
    lambda shape: shape.targets,
    lambda shape: shape.length,
    lambda shape: shape.rows,
    lambda shape: min(shape.targets, shape.chunk_tokens),
    lambda shape: (shape.targets - 1) % shape.chunk_tokens + 1,
    lambda shape: shape.length - 1,
    lambda shape: shape.length**2,
    lambda shape: shape.rows * shape.length**2,
    lambda shape: shape.rows * up(shape.length, 128),
    lambda shape: shape.rows * up(shape.length, 64),
    lambda shape: shape.rows * up(shape.length, 32),
    lambda shape: shape.length * up(shape.length, MASK_ALIGNMENT),
    lambda shape: shape.rows * shape.length * up(shape.length, MASK_ALIGNMENT),
    lambda shape: shape.rows * (shape.length + 1),
)


def told_apart(one: Shape, other: Shape) -> int:
    """How many pairs of products change differently between two shapes."""
    values = [(product(one), product(other)) for product in PRODUCTS]
    return sum(a * d != b * c for (a, b), (c, d) in combinations(values, 2))


def products_of(traced: Trace, shapes: Sequence[Shape]) -> list[tuple[Product, int]] | None:
    """What each id is a multiple of, and the multiple in bytes; `None` where that is not known."""
    if len(shapes) < 2 or any(len(probe) != len(traced.sized) for probe in traced.probes):
        return None
    constant = PRODUCTS[0]
    found = [(constant, nbytes) for nbytes in traced.nbytes]
    known: dict[tuple[int, ...], tuple[Product, int] | None] = {}
    for number, *others in zip(traced.sized, *traced.probes, strict=True):
        sizes = (traced.nbytes[number], *others)
        if sizes not in known:
            known[sizes] = _product(sizes, shapes)
        product = known[sizes]
        if product is None:
            return None
        found[number] = product
    for number, like in traced.alike.items():
        found[number] = found[like]
    return found


def _product(sizes: tuple[int, ...], shapes: Sequence[Shape]) -> tuple[Product, int] | None:
    for product in PRODUCTS:
        values = [product(shape) for shape in shapes]
        unit = sizes[0] // values[0]
        if all(unit * value == size for value, size in zip(values, sizes, strict=True)):
            return product, unit
    return None
