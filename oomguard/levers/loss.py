"""How a trainer's loss on a batch is made up of the losses on its parts.

Flags cannot tell: BERT and T5 accept `**kwargs`, so `model_accepts_loss_kwargs` is true for them,
yet they return plain means. So it is measured once, on two rows, whole against parts.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from oomguard import rng
from oomguard.levers import metrics, trl_losses
from oomguard.levers.activations import base_model, is_checkpointing
from oomguard.levers.batch import (
    IGNORED_LABEL,
    CannotActError,
    count_completion_tokens,
    count_targets,
    is_flat,
    measure,
)
from oomguard.levers.micro_batch import split
from oomguard.levers.sequence import shorten

if TYPE_CHECKING:
    from collections.abc import Iterator

# Columns of the probe. The form of a loss does not depend on the width, and the probe runs where
# memory is short: it must need less than a pass of a single row.
_PROBE_TOKENS = 16
_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit
_SINGLE_ROW = "the batch at hand has a single row, too few to tell how the loss adds up"
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}
_HALF_TOLERANCE = 1e-2  # some losses have 8 bits, and two batch sizes take two kernels


class SplitLoss:
    """The form of a trainer's loss: `"sum"`, `"row"`, or one of the three that end in `"token"`.

    A `sum` (one that is divided by `num_items_in_batch`) adds up over passes; a mean is weighted by
    each pass's share of targets or rows.
    """

    def __init__(self, form: str) -> None:
        """Take the form that `probe` found."""
        self.form = form

    def weights(self, passes: list[dict[str, Any]]) -> list[float] | None:
        """What to multiply each pass's loss by; `None` for a sum."""
        if self.form == "sum":
            return None
        return _shares(passes, self.form) or [1 / len(passes)] * len(passes)


def refusal(trainer: Any) -> str | None:
    """Why no batch of this trainer can be split, without running anything, or `None`."""
    reason = trl_losses.split_refusal(trainer)
    if reason is not None:
        return reason
    model = base_model(trainer)
    config = getattr(model, "config", None)
    if getattr(trainer, "aux_loss_enabled", False) or getattr(
        config, "output_router_logits", False
    ):
        return "the auxiliary loss of its experts (output_router_logits) depends on whole batches"
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name} is a {type(module).__name__}: rows of a batch depend on each other"
    return None


def probe(trainer: Any, compute_loss: Any, batch: Any, num_items: Any) -> SplitLoss:
    """Measure the form of the loss on the first rows of `batch`.

    Args:
        trainer: The live trainer; weights, metrics and random state are left as they were.
        compute_loss: The trainer's own `compute_loss`, not the guard's.
        batch: A collated batch of at least two rows or documents.
        num_items: `num_items_in_batch` of its window.

    Raises:
        CannotActError: The loss is none of the forms, or the batch cannot be split.
    """
    pairs, known = trl_losses.in_pairs(trainer), trl_losses.completion_form(trainer)
    whole = _two_units(batch, pairs)
    parts = split(whole, 1, pairs=pairs)
    if len(parts) < 2:
        raise CannotActError(_SINGLE_ROW)
    with _unnoticed(trainer):
        losses = [_loss(trainer, compute_loss, part, num_items) for part in (whole, *parts)]
    expected, found = losses[0], losses[1:]
    forms = {"sum": sum(found)}
    for form in ("token", "unshifted token", "completion token", "row"):
        shares = _shares(parts, form)
        if shares is not None:
            forms[form] = sum(w * loss for w, loss in zip(shares, found, strict=True))
    scale = max(abs(expected), 1e-6)
    if known is not None:  # advantages of both signs may cancel out
        scale, forms = max(scale, *map(abs, found)), {known: forms.get(known, 0.0)}
    off = {f: abs(value - expected) / scale for f, value in forms.items()}
    near = [form for form in sorted(off, key=off.__getitem__) if off[form] <= _tolerance(trainer)]
    if not near:
        reason = (
            f"the loss of two rows ({expected:.6g}) is neither the sum nor the token or row mean "
            f"of theirs ({', '.join(f'{loss:.6g}' for loss in found)})"
        )
        raise CannotActError(reason)
    if any(_shares(parts, form) != _shares(parts, near[0]) for form in near[1:]):
        reason = (
            f"the losses of its rows ({', '.join(f'{loss:.6g}' for loss in found)}) are too alike "
            f"to tell {' from '.join(near)} mean"
        )
        raise CannotActError(reason)
    return SplitLoss(near[0])


def _two_units(batch: Any, pairs: bool) -> dict[str, Any]:
    """The first two rows, pairs or documents, cut short, with targets by which the forms differ."""
    shape = measure(batch, pairs=pairs)
    if shape is None or shape.units < 2:
        raise CannotActError(_SINGLE_ROW)
    with suppress(CannotActError):  # not causal text: its rows are as long as they are
        batch = shorten(batch, _PROBE_TOKENS, "truncate", 0)
    passes = split(batch, 1, pairs=pairs)
    tokens = sum(found.tokens for found in map(measure, passes[:2]) if found is not None)
    whole = split(batch, tokens, pairs=pairs)[0]
    labels = whole.get("shift_labels", whole.get("labels"))
    if isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        whole = dict(whole)
        key = "shift_labels" if "shift_labels" in whole else "labels"
        whole[key] = _telling_labels(labels, passes[0])
    return whole


def _telling_labels(labels: torch.Tensor, first: dict[str, Any]) -> torch.Tensor:
    """Two targets for the first unit, one of them in column 0, and four others for the second.

    Its share is then 1/5 of the shifted targets, 1/3 of all targets and 1/2 of the rows, whatever
    the batch at hand trains.
    """
    known = labels[labels != IGNORED_LABEL]
    if known.numel() == 0:
        return labels
    width = first["input_ids"].shape[1] if is_flat(first) else labels.shape[1]
    second = (0, width) if is_flat(first) else (1, 0)
    kept = torch.full_like(labels, IGNORED_LABEL)
    kept[0, 0] = known[0]
    for (row, start), count in (((0, 0), 1), (second, 4)):
        inside = labels[row, start + 1 : start + width]
        columns = inside.eq(IGNORED_LABEL).int().argsort(stable=True)[:count]
        values = inside[columns]
        kept[row, start + 1 + columns] = torch.where(values == IGNORED_LABEL, known[0], values)
    return kept


@contextmanager
def _evaluating(trainer: Any) -> Iterator[None]:
    """Without dropout, and without the cache that a checkpointed model makes in eval mode only."""
    training = trainer.model.training
    # In eval mode on a CPU, bitsandbytes repacks 4-bit weights for good, and computes otherwise.
    packing = [m for m in trainer.model.modules() if getattr(m, _PACKS, False)]
    try:
        for module in packing:
            setattr(module, _PACKS, False)
        trainer.model.eval()
        with _without_cache(trainer) if is_checkpointing(trainer) else nullcontext():
            yield
    finally:
        trainer.model.train(training)
        for module in packing:
            setattr(module, _PACKS, True)


@contextmanager
def _without_cache(trainer: Any) -> Iterator[None]:
    config: Any = getattr(base_model(trainer), "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        if cache is not None:
            config.use_cache = False
        yield
    finally:
        if cache is not None:
            config.use_cache = cache


def needs_cache(trainer: Any, compute_loss: Any, batch: Any, num_items: Any) -> str | None:
    """Why the loss of a flat batch would be another without the cache of its model, or `None`.

    With a cache, transformers does not keep the documents of a flat row apart, and checkpointing
    turns the cache off.
    """
    config: Any = getattr(base_model(trainer), "config", None)
    if not is_flat(batch) or not getattr(config, "use_cache", False):
        return None
    with suppress(CannotActError):
        whole = _two_units(batch, pairs=False)
        with _unnoticed(trainer):
            cached = _loss(trainer, compute_loss, whole, num_items)
            with _without_cache(trainer):
                apart = _loss(trainer, compute_loss, whole, num_items)
        if abs(cached - apart) > _tolerance(trainer) * max(abs(cached), 1e-6):
            return (
                "the documents of a packed row see each other while the model's config has "
                "use_cache=True, which checkpointing would end: set use_cache=False before training"
            )
    return None


@contextmanager
def _unnoticed(trainer: Any) -> Iterator[None]:
    """In eval mode; metrics and random state are put back."""
    undo, state = metrics.mark(trainer), rng.snapshot()
    try:
        with _evaluating(trainer):
            yield
    finally:
        rng.restore(state)
        undo()


def _loss(trainer: Any, compute_loss: Any, batch: dict[str, Any], num_items: Any) -> float:
    # Trainers that generate have prepared the batch; once more, and they would generate again.
    known = trl_losses.generates(trainer)
    inputs = dict(batch) if known else trainer._prepare_inputs(dict(batch))
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return float(compute_loss(trainer.model, inputs, num_items_in_batch=num_items))


def _shares(passes: list[dict[str, Any]], form: str) -> list[float] | None:
    """Each pass's share of the targets or rows; `None` where there is none to count."""
    if form == "sum":
        return None
    if form == "completion token":
        if any("completion_ids" not in part for part in passes):
            return None
        counts = [count_completion_tokens(part) for part in passes]
    elif form == "row":
        shapes = [measure(part) for part in passes]
        counts = [0 if shape is None else shape.units for shape in shapes]
    else:
        targets = [count_targets(part, shift=form == "token") for part in passes]
        if any(count is None for count in targets):
            return None
        counts = [count or 0 for count in targets]
    total = sum(counts)
    return [count / total for count in counts] if total else None


def _tolerance(trainer: Any) -> float:
    args = trainer.args
    mixed = args.bf16 or args.fp16 or torch.get_float32_matmul_precision() != "highest"
    dtypes = {p.dtype for p in trainer.model.parameters() if p.is_floating_point()}
    if mixed or not dtypes <= set(_TOLERANCE):
        return _HALF_TOLERANCE
    return max(_TOLERANCE[dtype] for dtype in dtypes)
