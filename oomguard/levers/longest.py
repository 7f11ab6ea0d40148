"""The longest rows of a data set, told without collating them."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import IterableDataset, Subset

if TYPE_CHECKING:
    from collections.abc import Iterator

_TOKENS = "input_ids"
_SLICE = 10_000
_MOST_READ = 10_000  # rows of a data set that has to be asked for each single one


def has_rows(dataset: Any) -> bool:
    """Whether rows can be asked for by number; a stream could not be read twice."""
    return (
        isinstance(dataset, Sized)
        and hasattr(dataset, "__getitem__")
        and not isinstance(dataset, (IterableDataset, dict))
        and len(dataset) > 0
    )


def longest_batch(dataset: Any, rows: int, times: int = 1) -> Any:
    """The `rows` longest rows of a data set, `times` over; fewer where it has no more."""
    indices = _by_length(dataset)[:rows] * times
    if isinstance(dataset, Dataset):
        return dataset.select(indices, keep_in_memory=True)
    return Subset(dataset, indices)


def longest_row(dataset: Any) -> int:
    """Tokens of the longest row, or characters where its text is not tokenized yet."""
    return max(_lengths(dataset).values())


def _by_length(dataset: Any) -> list[int]:
    lengths = _lengths(dataset)
    return sorted(lengths, key=lambda index: -lengths[index])


def _lengths(dataset: Any) -> dict[int, int]:
    """By row its length; of a long data set of another kind than `Dataset` some rows only."""
    if isinstance(dataset, Dataset):
        return dict(enumerate(_column_lengths(dataset)))
    every = -(-len(dataset) // _MOST_READ)
    return {index: _length(dataset[index]) for index in range(0, len(dataset), every)}


def _length(row: Any) -> int:
    values = row if isinstance(row, dict) else getattr(row, "data", {})
    if _TOKENS in values:
        return len(values[_TOKENS])
    return sum(len(value) for value in values.values() if isinstance(value, Sized))


def _column_lengths(dataset: Dataset) -> Iterator[int]:
    for table in dataset.with_format("arrow").iter(batch_size=_SLICE):
        columns = [_TOKENS] if _TOKENS in table.column_names else table.column_names
        totals = [0] * len(table)
        for name in columns:
            for index, length in enumerate(_arrow_lengths(table[name])):
                totals[index] += length or 0
        yield from totals


def _arrow_lengths(column: Any) -> list[int | None]:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths: list[int | None] = pc.list_value_length(column).to_pylist()
        return lengths
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts: list[int | None] = pc.utf8_length(column).to_pylist()
        return texts
    return []
