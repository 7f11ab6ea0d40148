"""Cut one collated batch into smaller passes that hold the same samples."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor, cat

from oomguard.levers.batch import (
    BOUNDARY_KEYS,
    IGNORED_LABEL,
    CannotActError,
    describe,
    document_starts,
    documents,
    is_aligned,
    is_flat,
    is_scalar,
    measure,
    rebuild_boundaries,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


def split(
    batch: Mapping[str, Any], max_tokens: int, *, pairs: bool = False
) -> list[dict[str, Any]]:
    """Cut a batch into passes of at most `max_tokens` padded tokens each.

    Rows, or whole documents of a flat batch, keep their order; none is lost or doubled, and no
    padding is trimmed. A pass never holds less than one row or one document, even where that
    alone is over the limit. Tensors of the passes are views of the batch, those of pairs copies.

    Args:
        batch: A collated batch: `(rows, width)` padded, or one flat row of documents.
        max_tokens: The limit of a pass, padding included.
        pairs: Whether row i and row i + rows/2 belong together: they stay in one pass, and there
            again half the rows lie between them.

    Returns:
        The passes; a single one with everything when the batch fits or cannot be cut further.

    Raises:
        CannotActError: If something in the batch belongs to no row, or a cut would lose a target.
    """
    shape = measure(batch, pairs=pairs)
    if shape is None:
        msg = "the batch has no 2-D integer input_ids to cut"
        raise CannotActError(msg)
    rows = shape.tokens // shape.width
    if pairs and rows % 2:
        msg = f"{rows} rows are not pairs of a chosen and a rejected one"
        raise CannotActError(msg)
    if "num_images" in batch:
        msg = "num_images: images are not divided among the completions of a batch"
        raise CannotActError(msg)
    if shape.tokens <= max_tokens or shape.units == 1:
        return [dict(batch)]
    if is_flat(batch):
        return _split_documents(batch, max_tokens)
    return _split_rows(batch, shape.units, max(1, max_tokens * shape.units // shape.tokens), rows)


def _split_rows(batch: Mapping[str, Any], units: int, most: int, rows: int) -> list[dict[str, Any]]:
    """Cut a padded batch into the fewest passes of at most `most` units, as even as can be."""
    count = -(-units // most)
    even, extra = divmod(units, count)
    sizes = [even + (index < extra) for index in range(count)]
    passes: list[dict[str, Any]] = [{} for _ in sizes]
    for key, value in batch.items():
        for part, piece in zip(passes, _cut_units(key, value, sizes, rows), strict=True):
            part[key] = piece
    return passes


def _cut_units(key: str, value: Any, sizes: list[int], rows: int) -> list[Any]:
    """Return one entry of a padded batch, which is one for each row or each unit, for each pass."""
    units = sum(sizes)
    if units < rows and isinstance(value, Tensor) and value.dim() and len(value) == rows:
        halves = (_cut_rows(key, half, sizes, rows) for half in value.chunk(2))
        return [cat(both) for both in zip(*halves, strict=True)]
    return _cut_rows(key, value, sizes, rows)


def _cut_rows(key: str, value: Any, sizes: list[int], rows: int) -> list[Any]:
    if is_scalar(value):
        return [value] * len(sizes)
    units = sum(sizes)
    # Cumulative lengths may be as many as the rows by chance and still are not one for each row.
    by_row = (isinstance(value, (list, tuple)) and len(value) == units) or (
        isinstance(value, Tensor) and value.shape[0] == units and not key.startswith("cu_seq_lens")
    )
    if by_row:
        return [value[start:stop] for start, stop in pairwise([0, *accumulate(sizes)])]
    msg = f"{key} is a {describe(value)}, which cannot be divided among the {rows} rows"
    raise CannotActError(msg)


def _split_documents(batch: Mapping[str, Any], max_tokens: int) -> list[dict[str, Any]]:
    """Cut a flat batch before whole documents."""
    total = batch["input_ids"].shape[1]
    # The padding at the end stays with the last document: a pass of padding would train nothing.
    ends = [*(document.start for document in documents(batch)[1:]), total]
    bounds = [0]
    for previous, end in pairwise([0, *ends]):
        if end - bounds[-1] > max_tokens and previous > bounds[-1]:
            bounds.append(previous)
    _check_first_labels(batch, bounds[1:])
    starts = document_starts(batch)
    passes = []
    for start, stop in pairwise([*bounds, total]):
        inside = [begin for begin in starts if start <= begin < stop]
        lengths = [after - begin for begin, after in pairwise([*inside, stop])]
        part = {
            key: _cut_columns(key, value, start, stop, total)
            for key, value in batch.items()
            if key not in BOUNDARY_KEYS
        }
        passes.append(part | rebuild_boundaries(batch, lengths))
    return passes


def _cut_columns(key: str, value: object, start: int, stop: int, total: int) -> Any:
    """Return the part of one entry of a flat batch that belongs to columns `start` to `stop`."""
    if is_scalar(value):
        return value
    if isinstance(value, Tensor) and value.shape[:2] == (1, total):
        return value[:, start:stop]
    msg = f"{key} is a {describe(value)}, which cannot be divided among the {total} packed tokens"
    raise CannotActError(msg)


def _check_first_labels(batch: Mapping[str, Any], cuts: list[int]) -> None:
    """Refuse cuts before a trained token: the loss shifts labels, so its target would be lost."""
    labels = batch.get("labels")
    if not is_aligned(labels, batch) or batch.get("shift_labels") is not None:
        return
    for cut in cuts:
        if labels[0, cut] != IGNORED_LABEL:
            msg = (
                f"labels train the first token of a document (column {cut}) from the document "
                "before it, which a cut between them would lose"
            )
            raise CannotActError(msg)
