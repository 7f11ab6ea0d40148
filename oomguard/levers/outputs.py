"""Put together what the passes of one evaluated batch gave: losses, logits, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oomguard.levers import loss as losses
from oomguard.levers.activations import base_model
from oomguard.levers.batch import CannotActError, describe, is_flat, is_integer

if TYPE_CHECKING:
    from oomguard.levers.loss import SplitLoss

_FILL = -100  # what the Trainer itself fills outputs of different widths with


def join_losses(parts: Sequence[Any], passes: list[dict[str, Any]], form: SplitLoss) -> Any:
    """The loss of the whole batch: that of every pass times its share.

    Args:
        parts: The loss of each pass.
        passes: The passes.
        form: How the trainer's loss is made up of those of the parts.
    """
    weights = form.weights(passes) or [1.0] * len(parts)
    # A pass without a target has a mean of 0/0, and no share.
    return sum(w * part for w, part in zip(weights, parts, strict=True) if w)


def probe(trainer: Any, own_step: Any, batch: Any) -> SplitLoss:
    """The form of the loss that `prediction_step` returns, measured on two rows of `batch`.

    It need not be the training's: the Trainer divides by the targets of the batch it evaluates.

    Args:
        trainer: The live trainer, its model in eval mode.
        own_step: Called with a batch; the loss of the trainer's own `prediction_step`.
        batch: A collated batch of at least two rows or documents.

    Raises:
        CannotActError: The loss cannot be made up of those of the parts.
    """
    return losses.probe(
        trainer, lambda model, inputs, num_items_in_batch: own_step(inputs), batch, None
    )


def join(parts: Sequence[Any], passes: list[dict[str, Any]], fill: int) -> Any:
    """Concatenate outputs, which are `None`, a tensor, or nested tuples, lists and dicts of them.

    Args:
        parts: The output of each pass, alike in structure.
        passes: The passes: rows, or documents of a flat row.
        fill: What integers of different widths (generated tokens) are filled with.

    Raises:
        CannotActError: An output has no entry for each row or token of its pass.
    """
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        kind: Any = type(first)
        return kind({key: join([part[key] for part in parts], passes, fill) for key in first})
    if isinstance(first, (list, tuple)):
        joined = (join(entries, passes, fill) for entries in zip(*parts, strict=True))
        return type(first)(joined)
    if not isinstance(first, Tensor):
        msg = f"an output is a {describe(first)}, which has no rows to put together"
        raise CannotActError(msg)
    return _concatenate(parts, passes, fill)


def _concatenate(parts: Sequence[Tensor], passes: list[dict[str, Any]], fill: int) -> Tensor:
    sizes = [part["input_ids"].shape for part in passes]
    if is_flat(passes[0]):
        dim, shown = 1, [(1, size[1]) for size in sizes]
        alike = [tuple(part.shape[:2]) for part in parts] == shown
    else:
        dim, alike = (
            0,
            all(
                part.dim() > 0 and part.shape[0] == size[0]
                for part, size in zip(parts, sizes, strict=True)
            ),
        )
    if not alike:
        msg = f"an output is a {describe(parts[0])} for {tuple(sizes[0])} tokens"
        raise CannotActError(msg)
    widths = [part.shape[1] if part.dim() > 1 else 0 for part in parts]
    if dim == 0 and len(set(widths)) > 1:
        parts = [_widened(part, max(widths), fill if is_integer(part) else _FILL) for part in parts]
    return torch.cat(list(parts), dim=dim)


def _widened(part: Tensor, width: int, fill: int) -> Tensor:
    wide = part.new_full((part.shape[0], width, *part.shape[2:]), fill)
    wide[:, : part.shape[1]] = part
    return wide


def fill_token(trainer: Any) -> int:
    """What generated rows that end early are filled with."""
    processing = getattr(trainer, "processing_class", None)
    tokenizer = getattr(processing, "tokenizer", processing)
    generation = getattr(base_model(trainer), "generation_config", None)
    for owner in (generation, tokenizer):
        pad = getattr(owner, "pad_token_id", None)
        if isinstance(pad, int):
            return pad
    return 0
