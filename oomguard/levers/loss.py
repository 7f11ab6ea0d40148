"""How a trainer's loss on a batch is made up of the losses on its parts.

Flags cannot tell: BERT and T5 accept `**kwargs`, so `model_accepts_loss_kwargs` is true for them,
yet they return plain means. So it is measured once, on two rows, whole against parts.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from oomguard import rng
from oomguard.levers import metrics
from oomguard.levers.activations import base_model
from oomguard.levers.batch import CannotActError, count_targets, is_flat, measure
from oomguard.levers.micro_batch import split
from oomguard.levers.sequence import shorten

if TYPE_CHECKING:
    from collections.abc import Iterator

# Columns of the probe. The form of a loss does not depend on the width, and the probe runs where
# memory is short: it must need less than a pass of a single row.
_PROBE_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_HALF_TOLERANCE = 5e-3  # two batch sizes take two kernels, which round 8 and 11 bits differently


class SplitLoss:
    """The form of a trainer's loss: `"sum"`, `"token"`, `"unshifted token"` or `"row"`.

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
    for cls in type(trainer).__mro__:
        package = cls.__module__.partition(".")[0]
        if package == "trl" and cls.__name__ not in {"SFTTrainer", "_BaseTrainer"}:
            return f"the loss of TRL's {cls.__name__} is not split over passes"
        if cls.__name__ == "SFTTrainer":
            break
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
    whole = _two_units(batch, trainer)
    parts = split(whole, 1)
    if len(parts) < 2:
        reason = "the batch at hand has a single row, too few to tell how the loss adds up"
        raise CannotActError(reason)
    undo, state = metrics.mark(trainer), rng.snapshot()
    try:
        with _evaluating(trainer):
            losses = [_loss(trainer, compute_loss, part, num_items) for part in (whole, *parts)]
    finally:
        rng.restore(state)
        undo()
    expected, found = losses[0], losses[1:]
    forms = {"sum": sum(found)}
    for form in ("token", "unshifted token", "row"):
        shares = _shares(parts, form)
        if shares is not None:
            forms[form] = sum(w * loss for w, loss in zip(shares, found, strict=True))
    best = min(forms, key=lambda form: abs(forms[form] - expected))
    off = abs(forms[best] - expected) / max(abs(expected), 1e-6)
    if not math.isfinite(off) or off > _tolerance(trainer):
        reason = (
            f"the loss of two rows ({expected:.6g}) is neither the sum nor the token or row mean "
            f"of theirs ({', '.join(f'{loss:.6g}' for loss in found)})"
        )
        raise CannotActError(reason)
    return SplitLoss(best)


def _two_units(batch: Any, trainer: Any) -> dict[str, Any]:
    """The first two rows or documents, cut short, the first with a single target.

    With equal numbers of targets a token mean and a row mean are the same.
    """
    shape = measure(batch)
    if shape is None or shape.units < 2:
        reason = "the batch at hand has a single row, too few to tell how the loss adds up"
        raise CannotActError(reason)
    with suppress(CannotActError):  # not causal text: its rows are as long as they are
        batch = shorten(batch, _PROBE_TOKENS, "truncate", 0)
    passes = split(batch, 1)
    whole = _merge_units(batch, passes)
    labels = whole.get("shift_labels", whole.get("labels"))
    if isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        whole = dict(whole)
        key = "shift_labels" if "shift_labels" in whole else "labels"
        whole[key] = _one_target_first(labels, passes[0])
    return whole


def _merge_units(batch: Any, passes: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = 0
    for part in passes[:2]:
        shape = measure(part)
        tokens += shape.tokens if shape is not None else 0
    return split(batch, tokens)[0]


def _one_target_first(labels: torch.Tensor, first: dict[str, Any]) -> torch.Tensor:
    labels = labels.clone()
    width = labels.shape[1] if not is_flat(first) else first["input_ids"].shape[1]
    targets = (labels[0, :width] != -100).nonzero().flatten()
    targets = targets[targets > 0]  # position 0 is no target where the model shifts
    labels[0, targets[1:]] = -100
    return labels


@contextmanager
def _evaluating(trainer: Any) -> Iterator[None]:
    """Without dropout, and without the cache that a model in eval mode would otherwise make.

    With a cache, transformers does not keep the documents of a flat row apart.
    """
    training = trainer.model.training
    config: Any = getattr(base_model(trainer), "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        trainer.model.eval()
        if cache is not None:
            config.use_cache = False
        yield
    finally:
        trainer.model.train(training)
        if cache is not None:
            config.use_cache = cache


def _loss(trainer: Any, compute_loss: Any, batch: dict[str, Any], num_items: Any) -> float:
    inputs = trainer._prepare_inputs(dict(batch))
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return float(compute_loss(trainer.model, inputs, num_items_in_batch=num_items))


def _shares(passes: list[dict[str, Any]], form: str) -> list[float] | None:
    if form == "row":
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
    mixed = trainer.args.bf16 or trainer.args.fp16
    dtypes = {p.dtype for p in trainer.model.parameters() if p.is_floating_point()}
    if mixed or not dtypes <= set(_TOLERANCE):
        return _HALF_TOLERANCE
    return max(_TOLERANCE[dtype] for dtype in dtypes)
