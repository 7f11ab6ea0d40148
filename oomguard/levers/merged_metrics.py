"""One entry for each of TRL's training metrics from those that the passes of a batch made.

Most of these metrics are means, each over something else: tokens, rows, rows of one kind.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from oomguard.levers.batch import count_completion_tokens, count_targets
from oomguard.levers.trl_losses import trl_class

_MASKED_ENTROPY = "per_token_entropy * attention_mask"
_WITH_EXTREMES = frozenset({"RewardTrainer", "GRPOTrainer", "RLOOTrainer"})
Entries = list[tuple[Any, float]]
"""A metric's entries in order, each with the pass that made it."""
_Count = Callable[[Mapping[str, Any]], float]
"""How much of what a metric is a mean over a pass has."""

_EXTREMES: dict[str, Callable[[list[float]], float]] = {
    "min_reward": min,
    "max_reward": max,
    "clip_ratio/low_min": lambda values: min(_numbers(values), default=math.nan),
    "clip_ratio/high_max": lambda values: max(_numbers(values), default=math.nan),
}


def merged(trainer: Any, found: dict[str, Entries]) -> dict[str, float]:
    """What the whole batch would have entered in place of the entries of its passes.

    Args:
        trainer: The trainer that made them.
        found: The new entries of each metric.

    Returns:
        The metrics that need another entry.
    """
    name = trl_class(trainer)
    counts: dict[str, _Count] = _COUNTS.get(name or "", {"": _targets})
    if entropy_counts_prompts(trainer):
        counts = counts | {"entropy": _shown}
    if getattr(trainer, "importance_sampling_level", "token") == "sequence":
        counts = counts | _OF_SEQUENCES
    result = {}
    for key, entries in found.items():
        if len(entries) > 1:
            extreme = _EXTREMES.get(key) if name in _WITH_EXTREMES else None
            if extreme is not None:
                result[key] = extreme([value for _, value in entries])
            else:
                result[key] = _mean(entries, counts[key if key in counts else ""])
    if name == "KTOTrainer":
        chosen, rejected = (
            result.get(key, found[key][0][1] if found.get(key) else None)
            for key in ("rewards/chosen", "rewards/rejected")
        )
        if chosen is not None and rejected is not None:  # a pass may have rows of one kind only
            result["rewards/margins"] = chosen - rejected
    return result


def entropy_counts_prompts(trainer: Any) -> bool:
    """Whether `entropy` is a mean over all tokens shown, as in TRL before 1.3, not over targets.

    Nothing but the arithmetic in `SFTTrainer.compute_loss` has changed with it.
    """
    return any(_MASKED_ENTROPY in _loss_source(cls) for cls in type(trainer).__mro__)


@cache
def _loss_source(cls: type) -> str:
    """The source of TRL's own `compute_loss` in this class; empty for other classes."""
    known = cls.__module__.startswith("trl.") and "compute_loss" in vars(cls)
    return inspect.getsource(vars(cls)["compute_loss"]) if known else ""


def _numbers(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(entries: Entries, count: _Count) -> float:
    weights = [count(part) for part, _ in entries]
    total = sum(weights)
    if not total:
        return sum(value for _, value in entries) / len(entries)
    # A pass without what the metric is over enters 0 or nan for it.
    return sum(w / total * v for w, (_, v) in zip(weights, entries, strict=True) if w)


def _targets(part: Mapping[str, Any]) -> float:
    return count_targets(part, shift=True) or 0


def _shown(part: Mapping[str, Any]) -> float:
    mask = part.get("attention_mask")
    return float(part["input_ids"].numel() if mask is None else mask.sum())


def _rows(part: Mapping[str, Any]) -> float:
    return len(part["completion_ids"] if "completion_ids" in part else part["input_ids"])


def _completion_tokens(part: Mapping[str, Any]) -> float:
    return float(part["completion_mask"][:, 1:].sum())


def _tokens_of_half(half: int) -> _Count:
    return lambda part: float(part["completion_mask"].chunk(2)[half][:, 1:].sum())


def _rows_labelled(chosen: bool) -> _Count:
    return lambda part: float((part["label"].bool() == chosen).sum())


def _tokens_labelled(chosen: bool) -> _Count:
    return lambda part: float(part["completion_mask"][part["label"].bool() == chosen][:, 1:].sum())


_COUNTS: dict[str, dict[str, _Count]] = {
    "DPOTrainer": {
        "": _rows,
        "entropy": _completion_tokens,
        "logits/chosen": _tokens_of_half(0),
        "logits/rejected": _tokens_of_half(1),
        "mean_token_accuracy": _tokens_of_half(0),
    },
    "RewardTrainer": {"": _rows},
    "KTOTrainer": {
        "": _rows,
        "entropy": _completion_tokens,
        "logits/chosen": _tokens_labelled(True),
        "logits/rejected": _tokens_labelled(False),
        "rewards/chosen": _rows_labelled(True),
        "rewards/rejected": _rows_labelled(False),
        "logps/chosen": _rows_labelled(True),
        "logps/rejected": _rows_labelled(False),
    },
    "GRPOTrainer": {"": count_completion_tokens, "vespo/phi_seq_mean": _rows},
    "RLOOTrainer": {"": _rows, "entropy": count_completion_tokens},
}
"""What the metrics of each trainer are means over; `""` stands for those not listed."""
_OF_SEQUENCES = {f"clip_ratio/{name}_mean": _rows for name in ("low", "high", "region")} | {
    "cispo_clip_ratio": _rows
}
"""What replaces these under `importance_sampling_level="sequence"`: one ratio for each row."""
