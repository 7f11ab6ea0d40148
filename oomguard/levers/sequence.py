"""Shorten the long texts of one collated batch: into windows, or by dropping their far end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from oomguard.levers.batch import (
    BOUNDARY_KEYS,
    IGNORED_LABEL,
    CannotActError,
    Span,
    describe,
    is_aligned,
    is_flat,
    is_integer,
    is_scalar,
    rebuild_boundaries,
    text_spans,
    token_ids,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

Mode = Literal["windows", "truncate"]


@dataclass(frozen=True)
class _Piece:
    """What is kept of a text: the columns `start` to `stop` of its row.

    Attributes:
        text: The whole text, where the positions of the piece are read.
        start: The first column kept.
        stop: The column after the last one kept.
        context: How many tokens at the start only give context, since another piece trains them.
    """

    text: Span
    start: int
    stop: int
    context: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


def shorten(
    batch: Mapping[str, Any], max_length: int, mode: Mode | None, pad_token_id: int
) -> dict[str, Any]:
    """Cut the rows, or the documents of a flat batch, that are longer than `max_length`.

    `"windows"` cuts a long text into windows that overlap by half their length. Every target is
    trained once, in the window where more tokens precede it; the overlap is context. The number of
    rows grows. Windows without a target are dropped.

    `"truncate"` keeps the first `max_length` tokens; a text with targets, but none in there, keeps
    as many from half of `max_length` before its first target.

    Rows come back padded on the right, as wide as the longest; a flat batch loses its padding.

    Args:
        batch: A collated batch: `(rows, width)` padded, or one flat row of documents.
        max_length: The most tokens that a text keeps, padding not counted. At least 2.
        mode: `None` chooses truncation for a batch with prompts that are not trained, which lead
            far targets astray when windows cut them off, and windows otherwise.
        pad_token_id: Fills `input_ids`; labels are filled with -100, all else with 0.

    Returns:
        The new batch; `batch` itself when no text is longer than `max_length`.

    Raises:
        CannotActError: If something in the batch cannot be cut along with the tokens.
        ValueError: If `max_length` is less than 2, where no token could follow another.
    """
    if max_length < 2:
        msg = f"max_length must be at least 2, or no token is left to predict: {max_length}"
        raise ValueError(msg)
    if token_ids(batch) is None:
        msg = "the batch has no 2-D integer input_ids to shorten"
        raise CannotActError(msg)
    texts = text_spans(batch)
    if max(map(len, texts)) <= max_length:
        # No copy, whatever kind of mapping it is: `is` tells the caller that nothing was cut.
        return cast("dict[str, Any]", batch)
    if mode is None:
        mode = "truncate" if _has_untrained_prompt(batch, texts, pad_token_id) else "windows"
    _check(batch, texts, mode)
    if mode == "windows":
        pieces = _windows(texts, batch["labels"], max_length)
    else:
        pieces = [_truncated(text, batch.get("labels"), max_length) for text in texts]
    return _assemble(batch, pieces, pad_token_id)


def _has_untrained_prompt(batch: Mapping[str, Any], texts: list[Span], pad_token_id: int) -> bool:
    """Return whether the loss skips tokens of a text that it trains, as completion-only losses do.

    Masked and token classification are not meant: their labels are no copies of the tokens. Nor
    are end-of-text tokens that serve as padding too, whose labels collators mask wherever they are.
    """
    ids, labels = batch["input_ids"], batch.get("labels")
    if not is_aligned(labels, batch):
        return False
    trained = labels.ne(IGNORED_LABEL)
    if bool((trained & labels.ne(ids)).any()):
        return False
    skipped = ~trained & ids.ne(pad_token_id)
    # The first token of a text has nothing before it that could predict it.
    return any(
        bool(_of(text, trained)[1:].any()) and bool(_of(text, skipped)[1:].any()) for text in texts
    )


def _check(batch: Mapping[str, Any], texts: list[Span], mode: Mode) -> None:
    """Raise `CannotActError` for the first entry of the batch that cannot be cut."""
    flat = is_flat(batch)
    for key, value in batch.items():
        if not (flat and key in BOUNDARY_KEYS) and not _can_cut(key, value, batch, mode):
            shape = tuple(batch["input_ids"].shape)
            msg = f"{key} is a {describe(value)}: {mode!r} cannot cut it like input_ids of {shape}"
            raise CannotActError(msg)
    if mode == "windows" and not is_aligned(batch.get("labels"), batch):
        msg = "labels are missing, without which 'windows' cannot tell targets from context"
        raise CannotActError(msg)
    if not _labels_are_in(texts, batch):
        msg = "labels train tokens that attention_mask hides"
        raise CannotActError(msg)
    positions = batch.get("position_ids")
    if is_aligned(positions, batch) and not all(
        bool(_of(text, positions).diff().eq(1).all()) for text in texts
    ):
        msg = "position_ids start anew within a row: several documents share it"
        raise CannotActError(msg)


def _labels_are_in(texts: list[Span], batch: Mapping[str, Any]) -> bool:
    """Return whether all targets are real tokens; if not, the labels are those of other texts."""
    labels = batch.get("labels")
    if not is_aligned(labels, batch):
        return True
    inside = sum(int(_of(text, labels).ne(IGNORED_LABEL).sum()) for text in texts)
    return inside == int(labels.ne(IGNORED_LABEL).sum())


def _of(text: Span, values: Tensor) -> Tensor:
    """Return the entries of one text."""
    return values[text.row, text.start : text.stop]


def _can_cut(key: str, value: object, batch: Mapping[str, Any], mode: Mode) -> bool:
    """Return whether one entry of a batch can be cut along with the tokens."""
    # These belong to other tokens, even where their shape is the same.
    if key in ("decoder_input_ids", "shift_labels") and value is not None:
        return False
    if is_scalar(value):
        return True
    if is_aligned(value, batch):
        return is_integer(value)
    # Truncation keeps the rows, so that what there is once a row stays right.
    per_row = mode == "truncate" and not is_flat(batch)
    rows = batch["input_ids"].shape[0]
    if isinstance(value, Tensor):
        return per_row and key == "labels" and value.shape == (rows,)
    return per_row and isinstance(value, (list, tuple)) and len(value) == rows


def _windows(texts: list[Span], labels: Tensor, max_length: int) -> list[_Piece]:
    """Return each text whole or in windows, without the windows that train nothing."""
    trained = labels.ne(IGNORED_LABEL)
    kept = []
    for text in texts:
        if len(text) <= max_length:
            kept.append(_Piece(text, text.start, text.stop))
            continue
        kept += [
            window
            for window in _cover(text, max_length)
            if trained[text.row, window.start + window.context : window.stop].any()
        ]
    # A batch of no text at all cannot be run.
    return kept or [_cover(text, max_length)[0] for text in texts]


def _cover(text: Span, max_length: int) -> list[_Piece]:
    """Return windows over a whole text, each with half of the window before as its context."""
    overlap = max_length // 2
    windows = [_Piece(text, text.start, min(text.stop, text.start + max_length))]
    while windows[-1].stop < text.stop:
        start = windows[-1].stop - overlap
        windows.append(_Piece(text, start, min(text.stop, start + max_length), context=overlap))
    return windows


def _truncated(text: Span, labels: object, max_length: int) -> _Piece:
    """Return the start of a text, or the surroundings of its first target if that is beyond."""
    start = text.start
    if isinstance(labels, Tensor) and labels.dim() == 2:
        targets = _of(text, labels)[1:].ne(IGNORED_LABEL).nonzero()
        first = text.start + 1 + int(targets[0]) if len(targets) else text.start
        if first >= text.start + max_length:
            start = min(first - max_length // 2, text.stop - max_length)
    return _Piece(text, start, min(text.stop, start + max_length))


def _assemble(batch: Mapping[str, Any], pieces: list[_Piece], pad_token_id: int) -> dict[str, Any]:
    """Return the batch whose texts are the pieces."""
    flat = is_flat(batch)
    fill = {"input_ids": pad_token_id, "labels": IGNORED_LABEL}
    shortened: dict[str, Any] = {}
    for key, value in batch.items():
        if not is_aligned(value, batch):
            shortened[key] = value
            continue
        parts = [_part(key, value, piece) for piece in pieces]
        shortened[key] = (
            torch.cat(parts)[None]
            if flat
            else pad_sequence(parts, batch_first=True, padding_value=fill.get(key, 0))
        )
    if flat:
        shortened |= rebuild_boundaries(batch, [len(piece) for piece in pieces])
    return shortened


def _part(key: str, value: Tensor, piece: _Piece) -> Tensor:
    """Return what one piece keeps of one entry."""
    row = value[piece.text.row]
    if key == "position_ids":
        # A piece starts where its text starts: some models number from another position than 0.
        return row[piece.text.start : piece.text.start + len(piece)]
    part = row[piece.start : piece.stop]
    if key == "labels" and piece.context:
        part = part.clone()
        part[: piece.context] = IGNORED_LABEL
    return part
