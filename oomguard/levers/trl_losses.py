"""What TRL's trainers do with a batch, by name: which of their losses add up over parts of one.

Measuring cannot tell: a loss that sorts the rows of a batch, or compares them with an estimate from
the whole batch, equals the mean over its rows wherever the rows are alike, and under adapters that
have learned nothing yet every row of a preference loss is log 2.
"""

from __future__ import annotations

from typing import Any

_BASES = ("_BaseTrainer", "BaseTrainer")
_SFT = "SFTTrainer"
_PAIRED = frozenset({"DPOTrainer", "RewardTrainer"})
_PREFERENCE = _PAIRED | {"KTOTrainer"}
_GENERATING = frozenset({"GRPOTrainer", "RLOOTrainer"})

_SORTS = "sorts the rows of a batch against each other"
ROW_MEANS: dict[str, frozenset[str]] = {
    "DPOTrainer": frozenset(
        {
            "apo_down",
            "apo_zero",
            "bco_pair",
            "discopop",
            "exo_pair",
            "hinge",
            "ipo",
            "nca_pair",
            "robust",
            "sigmoid",
            "sigmoid_norm",
            "sppo_hard",
        }
    ),
    "KTOTrainer": frozenset({"apo_zero_unpaired"}),
}
"""Loss types that are a mean over rows, or over pairs of rows."""
WHOLE_BATCH: dict[str, dict[str, str]] = {
    "DPOTrainer": {
        "aot": _SORTS,
        "aot_unpaired": _SORTS,
        "sft": "is a mean over the tokens of all chosen rows, not over pairs",
    },
    "KTOTrainer": {"kto": "compares each row with a KL divergence estimated from the whole batch"},
}
"""Loss types that need the whole batch, and why."""


COMPLETION_LOSSES: dict[str, dict[str, str]] = {
    "GRPOTrainer": {
        "bnpo": "completion token",
        "cispo": "sum",
        "dapo": "sum",
        "dr_grpo": "row",
        "grpo": "row",
        "luspo": "row",
        "sapo": "row",
        "vespo": "sum",
    },
    "RLOOTrainer": {"": "row"},
}
"""The form of each loss over sampled completions, as `loss.SplitLoss` calls it."""


def trl_class(trainer: Any) -> str | None:
    """The name of the TRL trainer that `trainer` is or derives from; `None` for others."""
    for cls in type(trainer).__mro__:
        if cls.__module__.partition(".")[0] == "trl" and cls.__name__ not in _BASES:
            return cls.__name__
    return None


def in_pairs(trainer: Any) -> bool:
    """Whether the first half of a batch holds the chosen rows and the second the rejected ones."""
    return trl_class(trainer) in _PAIRED


def split_refusal(trainer: Any) -> str | None:
    """Why the batches of this trainer cannot be run in passes, or `None`."""
    name = trl_class(trainer)
    if name is None or name == _SFT:
        return None
    if name in _GENERATING:
        return _completions_refusal(trainer, name)
    if name not in _PREFERENCE:
        return f"the loss of TRL's {name} is not split over passes"
    if name in ROW_MEANS and not hasattr(trainer, "_compute_loss"):
        return f"batches of {name} are laid out otherwise in this version of TRL"
    if getattr(trainer, "_is_vision_dataset", False):
        return f"images of {name} are not divided among the rows of a batch"
    for loss_type in _loss_types(trainer):
        reason = WHOLE_BATCH[name].get(loss_type)
        if reason is not None:
            return f"loss_type={loss_type!r} of {name} {reason}"
        if loss_type not in ROW_MEANS[name]:
            return f"loss_type={loss_type!r} of {name} is not known"
    return None


def generates(trainer: Any) -> bool:
    """Whether the trainer samples the completions it trains on inside `training_step`."""
    return trl_class(trainer) in _GENERATING


def is_unknown(trainer: Any) -> bool:
    """Whether it samples what it trains on in a way that only older versions of TRL have."""
    return generates(trainer) and getattr(trainer, "loss_is_scaled_for_ga", None) is None


def completion_form(trainer: Any) -> str | None:
    """The form of a loss over sampled completions; `None` where it is to be measured."""
    losses = COMPLETION_LOSSES.get(trl_class(trainer) or "", {})
    return losses.get((_loss_types(trainer) or [""])[0])


def _completions_refusal(trainer: Any, name: str) -> str | None:
    if completion_form(trainer) is None:
        return f"loss_type={trainer.loss_type!r} of {name} is not known"
    if getattr(trainer, "_entropy_bonus_enabled", False):
        return f"entropy_coef of {name} adds a mean over other tokens than the loss has"
    if getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        return f"top_entropy_quantile of {name} ranks the tokens of the whole batch"
    return None


def length_refusal(trainer: Any) -> str | None:
    """Why the rows of this trainer's batches cannot be shortened, or `None`."""
    name = trl_class(trainer)
    if name is None or name == _SFT:
        return None
    if name in _PREFERENCE:
        return f"{name} scores a completion by all of its tokens; set a lower max_length instead"
    if name in _GENERATING:
        return f"{name} scores completions as wholes; set a lower max_completion_length instead"
    return f"rows of TRL's {name} are not cut"


def _loss_types(trainer: Any) -> list[str]:
    """`loss_type` of a trainer; none where its class has a single loss."""
    several = getattr(trainer, "loss_types", None)
    if several is not None:
        return list(several)
    single = getattr(trainer, "loss_type", None)
    return [] if single is None else [str(single)]
