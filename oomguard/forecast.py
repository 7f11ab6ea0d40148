"""What a plan would need, estimated for a live training: before its first step, and after an OOM.

A forecast is advice. It leaves the trainer, the random state and the device's memory alone; where
no estimate can be made, that is said once and the training goes on without.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from oomguard import jump, rng
from oomguard.levers.activations import base_model
from oomguard.levers.trl_losses import trl_class
from oomguard.memory import device, simulated
from oomguard.memory.cards import HOST
from oomguard.memory.present import present_card
from oomguard.memory.size import format_bytes
from oomguard.prediction import closed_form
from oomguard.prediction.model import meta_model
from oomguard.prediction.predictor import Predictor, rows_of
from oomguard.prediction.result import TRACED
from oomguard.prediction.trainer import plan_of
from oomguard.retry import off_card

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oomguard.event import OOMEvent
    from oomguard.memory.cards import Card
    from oomguard.plan import Plan
    from oomguard.prediction.result import Estimate
    from oomguard.report import Report

logger = logging.getLogger("oomguard")

T = TypeVar("T")

# Others keep a reference model, make pairs of their rows, or sample what they train on.
_ESTIMATED = (None, "SFTTrainer")
_ROUGHLY = 16  # times what the closed form says, a card is far too large


class Forecast:
    """Estimates of the plans of one live trainer, each made once."""

    def __init__(self, trainer: Any, report: Report) -> None:
        """Nothing is estimated yet; the first estimate will be kept in `report`."""
        self._trainer = trainer
        self._report = report
        self._made: Predictor | None = None
        self._known: dict[Plan, Estimate] = {}
        model = type(base_model(trainer)).__name__
        causal = model in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self._given_up = not causal or trl_class(trainer) not in _ESTIMATED

    def warn(self, plan: Plan) -> None:
        """Log how much is missing where a training under `plan` is estimated not to fit."""
        card = simulated.current()
        room = device.room_bytes() if card is None else card.capacity_bytes
        if room is not None:
            self._advised(lambda: self._warn(plan, room))

    def _warn(self, plan: Plan, room: int) -> None:
        longest = plan_of(self._trainer).max_length
        if longest is None:
            return
        estimate = self._of_plan_in_force(replace(plan, max_length=longest), plan, room)
        if estimate is not None and not _fits(estimate, room):
            logger.warning("%s", self._shortage(estimate, room))

    def needs(
        self, event: OOMEvent, usable_bytes: int, plan: Plan
    ) -> Callable[[Plan], int | None] | None:
        """What plans need for a batch as large as the one that failed: peaks of allocated bytes.

        Args:
            event: The failure.
            usable_bytes: What there was.
            plan: What was in force.

        Returns:
            A function from a plan to its need, `None` for one that is not known. `None` itself
            where `plan` is not estimated to need more than there was: then something else fills
            the card, or the estimate is wrong.
        """
        if not jump.is_padded(event):
            return None  # documents of a packed row are not of one length

        def needed(other: Plan) -> int | None:
            estimate = self._advised(lambda: self._estimate(jump.as_failed(other, event)))
            return None if estimate is None else estimate.peak_allocated_bytes

        failed = jump.as_failed(plan, event)
        current = self._advised(lambda: self._of_plan_in_force(failed, plan, usable_bytes))
        return None if current is None or current.peak_allocated_bytes <= usable_bytes else needed

    def _of_plan_in_force(self, asked: Plan, plan: Plan, there: int) -> Estimate | None:
        """The estimate that the report keeps; none where the card is far too large for it."""
        if _ROUGHLY * self._roughly_bytes(asked) < there:
            return None
        estimate = self._estimate(asked)
        if estimate is not None and self._report.estimate is None:
            self._report.estimate = {**estimate.to_dict(), "plan": plan.to_dict()}
        return estimate

    def _estimate(self, plan: Plan) -> Estimate | None:
        """The estimate, where it is more than arithmetic."""
        if plan not in self._known:
            self._known[plan] = self._predictor().at(plan, self._card())
        known = self._known[plan]
        return known if known.method == TRACED else None

    def _predictor(self) -> Predictor:
        if self._made is None:
            self._made = Predictor.of(self._trainer)
        return self._made

    def _roughly_bytes(self, plan: Plan) -> int:
        predictor = self._predictor()
        config, settings = predictor.config, predictor.settings
        model = meta_model(config, settings)
        parts = closed_form.peak(config, model, plan, settings, rows_of(plan))
        return sum(parts.values()) - (parts["workspaces"] if self._card() is HOST else 0)

    def _card(self) -> Card | None:
        """The card whose constants count; `None` for one that is not known."""
        if self._trainer.args.device.type == "cpu":
            return HOST
        return present_card()

    def _advised(self, action: Callable[[], T]) -> T | None:
        """What `action` returns, off the device and without a trace; `None` where it fails."""
        if self._given_up:
            return None
        state = rng.snapshot()
        try:
            with off_card():
                return action()
        except Exception as error:  # noqa: BLE001 - advice must not end a training
            self._given_up = True
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
        finally:
            rng.restore(state)
        logger.info("no estimate of this training can be made: %s", reason)
        return None

    def _shortage(self, estimate: Estimate, room: int) -> str:
        text = (
            f"this training is estimated to need {format_bytes(_needed(estimate))} at the peak "
            f"({estimate.phase}, with rows of {estimate.plan.max_length} tokens), and PyTorch can "
            f"have {format_bytes(room)} here"
        )
        for plan in _smaller(estimate.plan):
            smaller = self._estimate(plan)
            if smaller is not None and _fits(smaller, room):
                needed, code = format_bytes(_needed(smaller)), _as_code(estimate.plan, plan)
                return f"{text}. With {code}, it is {needed}"
        return f"{text}; nor does one row at a time fit. Use shorter rows, fewer bits or less model"


def _needed(estimate: Estimate) -> int:
    on_host = estimate.card.is_host  # where there is no cache of blocks
    return estimate.peak_allocated_bytes if on_host else estimate.most_reserved_bytes


def _fits(estimate: Estimate, room: int) -> bool:
    if estimate.card.is_host:
        return estimate.peak_allocated_bytes <= room
    return estimate.fits(replace(estimate.card, total_bytes=room + estimate.card.outside_bytes))


def _smaller(plan: Plan) -> Iterator[Plan]:
    """Plans of the same effective batch that need less and less."""
    if not plan.gradient_checkpointing:
        plan = replace(plan, gradient_checkpointing=True)
        yield plan
    rows, steps = plan.per_device_train_batch_size, plan.gradient_accumulation_steps
    while rows % 2 == 0:
        rows, steps = rows // 2, steps * 2
        yield replace(plan, per_device_train_batch_size=rows, gradient_accumulation_steps=steps)


def _as_code(before: Plan, after: Plan) -> str:
    return ", ".join(f"{name}={new!r}" for name, (_, new) in before.changes(after).items())
