"""Estimates of one model at many plans."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from oomguard.memory.cards import Card
from oomguard.prediction import closed_form
from oomguard.prediction.result import CLOSED_FORM, Estimate
from oomguard.prediction.settings import Settings
from oomguard.prediction.subject import config_of
from oomguard.prediction.trainer import settings_of

if TYPE_CHECKING:
    from oomguard.plan import Plan


class Predictor:
    """Estimates plans of one model; what was traced for one plan serves the next.

    Args:
        model: See `estimate`; not a trainer.
        settings: What no plan changes.

    Raises:
        ConfigurationError: There is no such model, or it has no language-model head.
    """

    def __init__(self, model: Any, settings: Settings | None = None) -> None:
        self.config = config_of(model)
        self.settings = settings or Settings()

    @classmethod
    def of(cls, trainer: Any) -> Predictor:
        """The predictor of a live trainer; `oomguard.prediction.trainer.plan_of` is its plan."""
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        return cls(model.config, settings_of(trainer))

    def under(self, settings: Settings) -> Predictor:
        """The predictor of the same model under other settings."""
        return self if settings == self.settings else Predictor(self.config, settings)

    def at(self, plan: Plan, card: Card | str | int | None = None) -> Estimate:
        """The estimate of `plan`.

        Args:
            plan: What is trained. `max_length` is the length of the longest row; 1024 if `None`.
            card: The card whose constants count: a name, a size or bytes.

        Raises:
            ConfigurationError: The plan contradicts the settings, or `card` is no card.
        """
        began = time.perf_counter()
        self.settings.check(plan)
        on = Card.of(card)
        model = closed_form.meta_model(self.config, self.settings)
        parts = closed_form.peak(self.config, model, plan, self.settings, rows_of(plan))
        allocated = sum(parts.values())
        reserved = int(allocated * 1.05)
        return Estimate(
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            device_bytes=reserved + on.context_bytes,
            phase="backward",
            breakdown={**parts, "fragmentation": reserved - allocated},
            plan=plan,
            settings=self.settings,
            card=on,
            method=CLOSED_FORM,
            notes=(),
            seconds=time.perf_counter() - began,
        )


def rows_of(plan: Plan) -> int:
    """Rows of one full-length pass under `plan`."""
    rows = plan.micro_batch_size or plan.per_device_train_batch_size
    rows = min(rows, plan.per_device_train_batch_size)
    if plan.max_pass_tokens is not None:
        rows = min(rows, max(1, plan.max_pass_tokens // (plan.max_length or 1024)))
    return rows
