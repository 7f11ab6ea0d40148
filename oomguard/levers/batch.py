"""What a collated batch is: rows or packed documents, their tokens and their targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from numbers import Number
from typing import Any, TypeGuard

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""The label that the losses of torch and transformers leave out."""

BOUNDARY_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What collators say about the documents of a flat batch besides `position_ids`."""


class CannotActError(Exception):
    """A lever cannot act on this batch or trainer; the text names the key or setting and why."""


@dataclass(frozen=True)
class Shape:
    """The size of a batch.

    Attributes:
        units: Rows, pairs of rows, or documents of a flat row: the smallest parts that can be run
            apart.
        width: Padded columns, or the length of the longest document of a flat row.
        tokens: Padded tokens: rows times columns, or the length of the flat row.
    """

    units: int
    width: int
    tokens: int


@dataclass(frozen=True)
class Span:
    """The tokens `start` to `stop` (exclusive) of one row: one text without its padding."""

    row: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def token_ids(batch: object) -> Tensor | None:
    """Return the `(rows, width)` integer `input_ids` of a batch, or `None` when it has none."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not is_integer(ids) or ids.numel() == 0:
        return None
    return ids


def is_integer(tensor: Tensor) -> bool:
    """Return whether a tensor holds integers or booleans."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def is_aligned(value: object, batch: Mapping[str, Any]) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor with one entry for each token."""
    return isinstance(value, Tensor) and value.shape == batch["input_ids"].shape


def is_scalar(value: object) -> bool:
    """Return whether a value is one for all rows: `None`, a number, a text or a 0-dim tensor."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    return value is None or isinstance(value, (Number, str))


def describe(value: object) -> str:
    """Return the kind of a batch entry as error messages show it: its shape, length or type."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of length {len(value)}"
    return type(value).__name__


def is_flat(batch: Mapping[str, Any]) -> bool:
    """Return whether a batch is padding-free or packed: all documents in one row, no padding.

    That is one row, no `attention_mask`, and something that tells its documents apart:
    `position_ids` of the same shape, `cu_seq_lens_q` or `seq_idx`.
    """
    ids = token_ids(batch)
    if ids is None or ids.shape[0] != 1 or batch.get("attention_mask") is not None:
        return False
    if is_aligned(batch.get("position_ids"), batch):
        return True
    return batch.get("cu_seq_lens_q") is not None or batch.get("seq_idx") is not None


def document_starts(batch: Mapping[str, Any]) -> list[int]:
    """Return where the documents of a flat batch start, the first always at 0.

    Read from `cu_seq_lens_q`, else `position_ids`, else `seq_idx`. In `position_ids` a document
    starts where they do not go on by one, as in `transformers.masking_utils`: collators may number
    from another position than 0. Padding of `pad_to_multiple_of` repeats position 0, so that each
    such token counts as a document, here as in TRL's `cu_seq_lens_q` and `seq_idx`.
    """
    total = batch["input_ids"].shape[1]
    bounds, positions = batch.get("cu_seq_lens_q"), batch.get("position_ids")
    if bounds is not None:
        inside = {start for start in torch.as_tensor(bounds).flatten().tolist() if start < total}
        return sorted({0, *inside})
    if is_aligned(positions, batch):
        restarts = positions[0].diff() != 1
    else:
        restarts = batch["seq_idx"][0].diff() != 0
    return [0, *(restarts.nonzero().flatten() + 1).tolist()]


def documents(batch: Mapping[str, Any]) -> list[Span]:
    """Return the documents of a flat batch in order, without the padding at its end.

    Padding is the run of one-token documents at the end that repeat one token and train nothing.
    """
    total = batch["input_ids"].shape[1]
    starts = document_starts(batch)
    tokens = batch["input_ids"][0].tolist()
    labels = batch.get("labels")
    trained = labels[0].ne(IGNORED_LABEL).tolist() if is_aligned(labels, batch) else [False] * total
    end = total
    while len(starts) > 1 and starts[-1] == end - 1:
        if tokens[end - 1] != tokens[-1] or trained[end - 1]:
            break
        starts.pop()
        end -= 1
    return [Span(0, start, stop) for start, stop in pairwise([*starts, end])]


def text_spans(batch: Mapping[str, Any]) -> list[Span]:
    """Return the real tokens of each row, or of each document of a flat batch.

    A row reaches from the first to the last token that `attention_mask` shows, on whichever side
    its padding is; without a mask every token is real. A row of padding alone is an empty span.
    """
    if is_flat(batch):
        return documents(batch)
    rows, width = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    if not is_aligned(mask, batch):
        return [Span(row, 0, width) for row in range(rows)]
    shown = mask.ne(0)
    first = shown.int().argmax(dim=1)
    last = width - shown.flip(1).int().argmax(dim=1)
    stops = torch.where(shown.any(dim=1), last, first)
    return [
        Span(row, start, stop)
        for row, (start, stop) in enumerate(zip(first.tolist(), stops.tolist(), strict=True))
    ]


def measure(batch: object, *, pairs: bool = False) -> Shape | None:
    """Return the size of a batch, or `None` when it has neither tokens nor sampled completions.

    Args:
        batch: A collated batch, or whatever a trainer hands over in its place (trainers that
            generate take a list of examples).
        pairs: Whether row i and row i + rows/2 belong together and are one unit.
    """
    ids = token_ids(batch)
    if not isinstance(batch, Mapping):
        return None
    if ids is None:
        return _measure_completions(batch)
    if is_flat(batch):
        texts = documents(batch)
        return Shape(units=len(texts), width=max(map(len, texts)), tokens=ids.shape[1])
    units = ids.shape[0] // 2 if pairs else ids.shape[0]
    return Shape(units=units, width=ids.shape[1], tokens=ids.numel())


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Return the padded tokens of a batch, 0 if it has none."""
    ids = token_ids(batch)
    shape = _measure_completions(batch) if ids is None else None
    return ids.numel() if ids is not None else 0 if shape is None else shape.tokens


def _measure_completions(batch: Mapping[str, Any]) -> Shape | None:
    """Measure what TRL's trainers make of their batches: prompts, and completions they sampled."""
    prompts, completions = batch.get("prompt_ids"), batch.get("completion_ids")
    if not isinstance(prompts, Tensor) or not isinstance(completions, Tensor):
        return None
    width = prompts.shape[1] + completions.shape[1]
    return Shape(units=len(prompts), width=width, tokens=len(prompts) * width)


def count_completion_tokens(batch: Mapping[str, Any]) -> int:
    """Count the tokens that the loss of sampled completions is over."""
    mask = batch["completion_mask"]
    if batch.get("tool_mask") is not None:
        mask = mask * batch["tool_mask"]
    return int(mask.sum())


def count_targets(batch: Mapping[str, Any], shift: bool) -> int | None:
    """Count the targets of a batch, as the Trainer does for `num_items_in_batch`.

    Args:
        batch: A collated batch.
        shift: Whether the loss shifts the labels, so that the first column is never a target.
            `shift_labels` are shifted already and are counted whole.

    Returns:
        The number of labels that are not -100; `None` without labels per token.
    """
    shifted = batch.get("shift_labels")
    labels = batch.get("labels") if shifted is None else shifted
    if not isinstance(labels, Tensor) or labels.dim() < 2 or not is_integer(labels):
        return None
    if shift and shifted is None:
        labels = labels[..., 1:]
    return int(labels.ne(IGNORED_LABEL).sum())


def rebuild_boundaries(batch: Mapping[str, Any], lengths: list[int]) -> dict[str, Any]:
    """Return the document boundaries of a flat row whose documents have these lengths.

    Only the keys that `batch` has are returned, each with the type, dtype and device it has there.

    Raises:
        CannotActError: If boundaries come in a form that is not known.
    """
    rebuilt: dict[str, Any] = {}
    for key in (key for key in BOUNDARY_KEYS if key in batch):
        value = batch[key]
        if value is None:
            rebuilt[key] = None
        elif key.startswith("max_length"):
            longest = max(lengths)
            rebuilt[key] = torch.full_like(value, longest) if isinstance(value, Tensor) else longest
        elif not isinstance(value, Tensor):
            msg = f"{key} is a {describe(value)}, not a tensor"
            raise CannotActError(msg)
        elif key == "seq_idx":
            order = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            rebuilt[key] = order[None].to(value)
        else:
            rebuilt[key] = value.new_tensor([0, *accumulate(lengths)])
    return rebuilt
