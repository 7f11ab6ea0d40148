"""`estimate`: what a fine-tune will take."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from oomguard.errors import ConfigurationError
from oomguard.memory.present import present_card
from oomguard.plan import Plan
from oomguard.prediction.predictor import Predictor
from oomguard.prediction.settings import Settings
from oomguard.prediction.trainer import plan_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from oomguard.memory.cards import Card
    from oomguard.prediction.result import Estimate

_PLAN = frozenset(field.name for field in fields(Plan))
_SFT_PLAN: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "max_length": 1024,
    "optim": "adamw_torch_fused",
    "target_modules": ("all-linear",),
    "lora_r": 16,
}


def estimate(
    model: Any,
    plan: Plan | None = None,
    *,
    card: Card | str | int | None = None,
    **settings: Any,
) -> Estimate:
    """Estimate the peak memory of a fine-tune, without a GPU and without weights.

    Args:
        model: A live Trainer, a `PretrainedConfig`, the path of a folder or of a `config.json`, or
            the id of a model.
        plan: What is trained. If not given, that of the trainer, or LoRA of rank 16 on all linear
            modules in one row of 1024 tokens.
        card: The card whose constants count, by name (`"RTX 4090"`) or size (`"12GiB"`, bytes). If
            not given, that on which a live trainer trains, as it is measured.
        settings: Fields of `Settings` and of `Plan`, in place of what `plan` or the trainer says;
            `lora_r=None` is a full fine-tune.

    Returns:
        Peaks in bytes, and what they consist of.

    Raises:
        ConfigurationError: Nothing is known of the model, or the settings contradict each other.
    """
    began = time.perf_counter()
    predictor, chosen = asked(model, plan, settings)
    if card is None and _on_gpu(model):
        card = present_card()
    result = predictor.at(chosen, card)
    return replace(result, seconds=time.perf_counter() - began)


def asked(model: Any, plan: Plan | None, settings: Mapping[str, Any]) -> tuple[Predictor, Plan]:
    """The predictor and the plan that the arguments of `estimate` name.

    Raises:
        ConfigurationError: As `estimate`.
    """
    predictor, start = _start(model)
    changes = {name: value for name, value in settings.items() if name in _PLAN}
    kept = {name: value for name, value in settings.items() if name not in _PLAN}
    unknown = sorted(kept.keys() - Settings.names())
    if unknown:
        msg = f"{unknown[0]} is neither a field of Plan nor of Settings"
        raise ConfigurationError(msg)
    predictor = predictor.under(replace(predictor.settings, **kept))
    base = plan or start or default_plan(predictor.settings)
    return predictor, replace(base, **_consistent(changes))


def default_plan(settings: Settings) -> Plan:
    """LoRA on all linear modules, one row of 1024 tokens, checkpointing as the trainer has it."""
    return Plan(**_SFT_PLAN, gradient_checkpointing=settings.trainer == "sft")


def _consistent(changes: dict[str, Any]) -> dict[str, Any]:
    if "lora_r" in changes and changes["lora_r"] is None:
        changes.setdefault("target_modules", None)
    return changes


def _on_gpu(model: Any) -> bool:
    return _is_trainer(model) and model.args.device.type == "cuda"


def _is_trainer(model: Any) -> bool:
    return hasattr(model, "accelerator") and hasattr(model, "args")


def _start(model: Any) -> tuple[Predictor, Plan | None]:
    if _is_trainer(model):
        return Predictor.of(model), plan_of(model)
    return Predictor(model), None
