"""What the batches of a trainer look like, from rows that it would train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oomguard import rng
from oomguard.levers.batch import IGNORED_LABEL, is_flat, measure, text_spans, token_ids
from oomguard.levers.trl_losses import in_pairs

ROWS = 256
"""Rows looked at, spread over the dataset."""


@dataclass(frozen=True)
class Batch:
    """One collated batch.

    Attributes:
        rows: Rows that go through the model: a pair of chosen and rejected is two.
        width: Padded columns.
        longest: Real tokens of the longest row; those of the whole row where it is packed.
        ragged: Whether its rows differ in length, so that attention needs a mask.
        documents: Documents of a packed or padding-free row; `None` for padded rows.
        left_padded: Whether a row begins with padding.
        labels: Names of the labels it has, of those that the trainer takes.
        targets: Labels that are trained on; `None` where it has none per token.
    """

    rows: int
    width: int
    longest: int
    ragged: bool
    documents: int | None
    left_padded: bool
    labels: tuple[str, ...]
    targets: int | None

    @property
    def tokens(self) -> int:
        """Padded tokens."""
        return self.rows * self.width


def read(trainer: Any) -> tuple[Batch, ...]:
    """Batches of the rows that `ROWS` are, the longest of them first; none where rows stream.

    Rows are collated as in training. The random state is as it was afterwards.
    """
    rows = _rows(trainer.train_dataset)
    count = trainer.args.per_device_train_batch_size
    if not rows:
        return ()
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    longest = sorted(rows, key=_length, reverse=True)[:count]
    parts = [longest, *(rows[start : start + count] for start in range(0, len(rows), count))]
    state = rng.snapshot()
    try:
        batches = [_batch(trainer, collate([dict(row) for row in part])) for part in parts[:5]]
    finally:
        rng.restore(state)
    return tuple(batch for batch in batches if batch is not None)


def longest_row(dataset: Any) -> int | None:
    """Tokens of the longest of `ROWS` rows that are tokenized; `None` where they are not."""
    lengths = [len(row["input_ids"]) for row in _rows(dataset) if "input_ids" in row]
    return max(lengths, default=None)


def _rows(dataset: Any) -> list[Mapping[str, Any]]:
    if not hasattr(dataset, "__len__"):
        return []  # what has been taken from a stream may be lost to the training
    count = len(dataset)
    taken = min(count, ROWS)
    state = rng.snapshot()
    try:
        rows = [dataset[index * count // taken] for index in range(taken)]
    finally:
        rng.restore(state)
    return [row for row in rows if isinstance(row, Mapping)]


def _length(row: Mapping[str, Any]) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    return sum(len(value) for value in row.values() if isinstance(value, (list, str, Tensor)))


def _batch(trainer: Any, batch: Any) -> Batch | None:
    ids = token_ids(batch)
    if ids is None or measure(batch, pairs=in_pairs(trainer)) is None:
        return None
    spans, flat = text_spans(batch), is_flat(batch)
    labels = batch.get("labels")
    per_token = isinstance(labels, Tensor) and labels.shape == ids.shape
    return Batch(
        rows=ids.shape[0],
        width=ids.shape[1],
        longest=ids.shape[1] if flat else max(len(span) for span in spans),
        ragged=not flat and len({len(span) for span in spans}) > 1,
        documents=len(spans) if flat else None,
        left_padded=not flat and any(span.start > 0 for span in spans),
        labels=tuple(name for name in trainer.label_names if batch.get(name) is not None),
        targets=int(labels.ne(IGNORED_LABEL).sum()) if per_token else None,
    )
