"""What a plan would need, estimated for a live training: before its first step, and after an OOM.

A forecast is advice. It leaves the trainer, the random state and the device's memory alone; where
no estimate can be made, that is said once and the training goes on without.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from oomguard import jump, rng
from oomguard.errors import ConfigurationError
from oomguard.levers.trl_losses import trl_class
from oomguard.memory import device
from oomguard.memory.cards import HOST, Card
from oomguard.memory.size import format_bytes
from oomguard.prediction.predictor import Predictor
from oomguard.prediction.trainer import plan_of
from oomguard.retry import off_card

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oomguard.event import OOMEvent
    from oomguard.plan import Plan
    from oomguard.prediction.result import Estimate
    from oomguard.report import Report

logger = logging.getLogger("oomguard")

# Others keep a reference model, make pairs of their rows, or sample what they train on.
_ESTIMATED = (None, "SFTTrainer")


class Forecast:
    """Estimates of the plans of one live trainer, each made once."""

    def __init__(self, trainer: Any, report: Report) -> None:
        """Nothing is estimated yet; the first estimate will be kept in `report`."""
        self._trainer = trainer
        self._report = report
        self._predictor: Predictor | None = None
        self._known: dict[Plan, Estimate | None] = {}
        self._given_up = trl_class(trainer) not in _ESTIMATED

    def warn(self, plan: Plan) -> None:
        """Log how much is missing where a training under `plan` is estimated not to fit."""
        room = device.room_bytes()
        if room is None or self._given_up:
            return
        longest = plan_of(self._trainer).max_length
        estimate = self._estimate(replace(plan, max_length=longest))
        if estimate is None:
            return
        self._keep(estimate, plan)
        if not _fits(estimate, room):
            logger.warning("%s", self._shortage(estimate, room))

    def needs(self, event: OOMEvent, usable_bytes: int) -> Callable[[Plan], int | None]:
        """What plans need for a batch as large as the one that failed: peaks of allocated bytes.

        Args:
            event: The failure.
            usable_bytes: What there was.
        """

        def needed(plan: Plan) -> int | None:
            if not jump.is_padded(event):
                return None  # documents of a packed row are not of one length
            estimate = self._estimate(jump.as_failed(plan, event))
            if estimate is None:
                return None
            self._keep(estimate, plan)
            return estimate.peak_allocated_bytes

        return needed

    def _keep(self, estimate: Estimate, plan: Plan) -> None:
        if self._report.estimate is None:
            self._report.estimate = {**estimate.to_dict(), "plan": plan.to_dict()}

    def _estimate(self, plan: Plan) -> Estimate | None:
        if self._given_up:
            return None
        if plan not in self._known:
            self._known[plan] = self._made(plan)
        return self._known[plan]

    def _made(self, plan: Plan) -> Estimate | None:
        state = rng.snapshot()
        try:
            with off_card():
                if self._predictor is None:
                    self._predictor = Predictor.of(self._trainer)
                return self._predictor.at(plan, _card(self._trainer.args.device.type))
        except Exception as error:  # noqa: BLE001 - advice must not end a training
            self._given_up = True
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
        finally:
            rng.restore(state)
        logger.info("no estimate of this training can be made: %s", reason)
        return None

    def _shortage(self, estimate: Estimate, room: int) -> str:
        text = (
            f"this training is estimated to need {format_bytes(estimate.peak_reserved_bytes)} at "
            f"the peak ({estimate.phase}, with rows of {estimate.plan.max_length} tokens), and "
            f"PyTorch can have {format_bytes(room)} here"
        )
        for plan in _smaller(estimate.plan):
            smaller = self._estimate(plan)
            if smaller is not None and _fits(smaller, room):
                needed = format_bytes(smaller.peak_reserved_bytes)
                return f"{text}. {_as_code(estimate.plan, plan)} is estimated to need {needed}"
        return f"{text}; nor does one row at a time fit. Use shorter rows, fewer bits or less model"


def _fits(estimate: Estimate, room: int) -> bool:
    card = replace(estimate.card, total_bytes=room + estimate.card.context_bytes)
    return estimate.fits(card)


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


def _card(kind: str) -> Card | None:
    """The card whose constants count; `None` for one that is not known."""
    if kind == "cpu":
        return HOST
    name = device.current_name()
    try:
        return None if name is None else Card.of(name)
    except ConfigurationError:
        return None
