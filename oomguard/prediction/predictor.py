"""Estimates of one model at many plans."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from oomguard.errors import ConfigurationError
from oomguard.memory.cards import Card
from oomguard.memory.replay import Replay, replay
from oomguard.memory.size import format_bytes
from oomguard.memory.uncached import count
from oomguard.prediction import closed_form
from oomguard.prediction.fit import Fitted
from oomguard.prediction.loop import held_bytes, in_loop
from oomguard.prediction.model import meta_model
from oomguard.prediction.result import CATEGORIES, CLOSED_FORM, TRACED, Estimate
from oomguard.prediction.settings import Settings, check_trl
from oomguard.prediction.subject import config_of
from oomguard.prediction.trace import NOTHING, Given
from oomguard.prediction.trainer import (
    fetches_ahead,
    given_by,
    model_of,
    settings_of,
    untraced_step,
)

if TYPE_CHECKING:
    from oomguard.memory.timeline import Timeline
    from oomguard.plan import Plan

logger = logging.getLogger("oomguard.prediction")

_TRAINED_BYTES = 16  # of a number in float32, with its gradient and two moments
DEFAULT_LENGTH = 1024  # SFTConfig.max_length


@dataclass(frozen=True)
class _Measured:
    """What an estimate rests on."""

    timeline: Timeline | None
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    phase: str
    breakdown: dict[str, int]
    notes: tuple[str, ...]


class Predictor:
    """Estimates plans of one model; what was traced for one plan serves the next.

    Predictors of the same model and settings share their traces.

    Args:
        model: See `estimate`; not a trainer.
        settings: What no plan changes.
        fetches_ahead: Whether a batch waits while another is trained; it does but in short runs.
        untraced: Why its steps cannot be traced, and a closed form has to do; `None` if they can.
        given: What a live trainer has that no plan names; its optimizer stands for one `optim`.

    Raises:
        ConfigurationError: There is no such model, or it has no language-model head.
    """

    def __init__(
        self,
        model: Any,
        settings: Settings | None = None,
        *,
        fetches_ahead: bool = True,
        untraced: str | None = None,
        given: Given = NOTHING,
    ) -> None:
        self._untraced, self._given = untraced, given
        self.config = config_of(model)
        self.settings = settings or Settings()
        self._fetches_ahead = fetches_ahead
        self._described = f"{type(self.config)} {self.config.to_json_string()} {given}"
        self._failed: dict[Any, str] = {}

    @classmethod
    def of(cls, trainer: Any) -> Predictor:
        """The predictor of a live trainer; `oomguard.prediction.trainer.plan_of` is its plan.

        Raises:
            ConfigurationError: Its model has no language-model head.
        """
        return cls(
            model_of(trainer).config,
            settings_of(trainer),
            fetches_ahead=fetches_ahead(trainer),
            untraced=untraced_step(trainer),
            given=given_by(trainer),
        )

    def under(self, settings: Settings) -> Predictor:
        """The predictor of the same model under other settings."""
        if settings == self.settings:
            return self
        return Predictor(
            self.config,
            settings,
            fetches_ahead=self._fetches_ahead,
            untraced=self._untraced,
            given=self._given,
        )

    def at(self, plan: Plan, card: Card | str | int | None = None) -> Estimate:
        """The estimate of `plan`.

        Args:
            plan: What is trained. `max_length` is the length of the longest row; 1024 if `None`.
            card: The card whose constants count: a name, a size or bytes.

        Raises:
            ConfigurationError: The plan contradicts the settings, `card` is no card, or the loss of
                the installed TRL is not modelled.
        """
        began = time.perf_counter()
        if self._given.tuning is None:
            self.settings.check(plan)
        on = Card.of(card)
        if self.settings.trainer == "sft":
            check_trl()
        found = self._traced(plan, on)
        method = TRACED if found.timeline is not None else CLOSED_FORM
        return Estimate(
            peak_allocated_bytes=found.peak_allocated_bytes,
            peak_reserved_bytes=found.peak_reserved_bytes,
            device_bytes=found.peak_reserved_bytes + on.outside_bytes,
            phase=found.phase,
            breakdown=found.breakdown,
            plan=plan,
            settings=self.settings,
            card=on,
            method=method,
            notes=(*found.notes, *self._given.notes, *_left_out(plan), *_assumed(on)),
            seconds=time.perf_counter() - began,
            timeline=found.timeline,
        )

    def _traced(self, plan: Plan, card: Card) -> _Measured:
        rows, length = rows_of(plan), plan.max_length or DEFAULT_LENGTH
        if self._untraced is not None:
            # Of preferences, each row is a pair.
            return self._counted(plan, 2 * rows, self._untraced)
        key = _key(plan, card)
        if key not in self._failed:
            try:
                fitted = _traces(self._described, self.settings)
                if key not in fitted:
                    fitted[key] = Fitted(
                        self.config, plan, self.settings, card, self._given_with(plan)
                    )
                timeline = fitted[key].timeline(rows, length, plan.lora_r)
                if card.is_host:
                    held = held_bytes(plan, length, fetches_ahead=self._fetches_ahead)
                    return _uncached(in_loop(timeline, held))
                return self._replayed(timeline, card)
            except ConfigurationError:
                raise
            except Exception as error:
                logger.debug("tracing failed", exc_info=True)
                reason = " ".join(str(error).split())[:160]
                self._failed[key] = f"{type(error).__name__}: {reason}"
        return self._counted(plan, rows, self._failed[key])

    def _given_with(self, plan: Plan) -> Given:
        own = self._given.optimizer
        same = own is None or own.optim == plan.optim
        return self._given if same else self._given._replace(optimizer=None)

    def _replayed(self, timeline: Timeline, card: Card) -> _Measured:
        expandable = self.settings.expandable_segments
        free = replay(timeline, expandable=expandable)
        if free is None:
            msg = "a replay without a limit ran out of memory"
            raise RuntimeError(msg)
        under, usable = free, card.usable_bytes
        if usable is not None and free.peak_reserved_bytes > usable:
            under = replay(timeline, expandable=expandable, limit_bytes=usable) or free
        return _measured(timeline, free, under.peak_reserved_bytes)

    def _counted(self, plan: Plan, rows: int, reason: str) -> _Measured:
        try:
            model = meta_model(self.config, self.settings)
        except Exception as error:
            msg = f"{type(self.config).__name__} cannot be made into a model: {error}"
            raise ConfigurationError(" ".join(msg.split())[:300]) from error
        parts = closed_form.peak(self.config, model, plan, self.settings, rows)
        if self._given.tuning is not None:
            parts["adapters"] += self._given.tuning.others * _TRAINED_BYTES
        allocated = sum(parts.values())
        reserved = int(allocated * closed_form.RESERVED)
        parts["fragmentation"] = reserved - allocated
        name = type(model).__name__
        note = f"{name} could not be traced ({reason}); the figures are a closed form"
        return _Measured(None, allocated, reserved, "backward", parts, (note,))


@lru_cache(maxsize=4)
def _traces(config: str, settings: Settings) -> dict[Any, Fitted]:
    """Where what is traced of a model is kept for the next estimate of it."""
    return {}


def _uncached(timeline: Timeline) -> _Measured:
    counted = count(timeline)
    return _measured(timeline, counted, counted.peak_reserved_bytes)


def _measured(timeline: Timeline, at: Replay, reserved_bytes: int) -> _Measured:
    parts = _breakdown(timeline, at)
    parts["fragmentation"] = reserved_bytes - sum(parts.values())
    return _Measured(timeline, at.peak_allocated_bytes, reserved_bytes, at.phase, parts, ())


def _breakdown(timeline: Timeline, at: Replay) -> dict[str, int]:
    """Bytes that live at the peak, by category."""
    live: dict[int, int] = {}
    for event in timeline.events[: at.peak_index + 1]:
        if not isinstance(event, tuple):
            continue
        key, nbytes = event
        if nbytes < 0:
            del live[key]
        else:
            live[key] = nbytes
    parts = dict.fromkeys(CATEGORIES[:-1], 0)
    for key, nbytes in live.items():
        parts[timeline.category[key]] += nbytes
    return parts


def _key(plan: Plan, card: Card) -> Any:
    """What decides which ops run; the rest of a plan decides their sizes alone."""
    neutral = replace(
        plan,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=1,
        micro_batch_size=None,
        max_pass_tokens=None,
        max_length=None,
        lora_r=None if plan.lora_r is None else 1,
        cache_released_step=None,
        sequence_mode=None,
    )
    kernels = (card.capability, card.multiprocessors, card.is_host)
    return neutral, min(2, plan.passes_per_step), kernels


def _left_out(plan: Plan) -> tuple[str, ...]:
    if not plan.offload_activations or hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        return ()
    return ("this transformers cannot offload: the checkpoints are counted on the card",)


def _assumed(card: Card) -> tuple[str, ...]:
    if card.is_host:
        return ()
    notes = []
    if not card.known:
        notes.append(
            f"{card.name}: kernels, workspaces and the context of an H100 are assumed, and that "
            "bitsandbytes dequantizes every weight"
        )
    elif not card.context_measured:
        size = format_bytes(card.context_bytes)
        notes.append(f"{card.name}: the context is that of an H100, {size}")
    return tuple(notes)


def rows_of(plan: Plan) -> int:
    """Rows of one full-length pass under `plan`."""
    rows = plan.micro_batch_size or plan.per_device_train_batch_size
    rows = min(rows, plan.per_device_train_batch_size)
    if plan.max_pass_tokens is not None:
        rows = min(rows, max(1, plan.max_pass_tokens // (plan.max_length or DEFAULT_LENGTH)))
    return rows
