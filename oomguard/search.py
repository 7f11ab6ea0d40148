"""`find_plan`: the largest plan that fits a card."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from oomguard.budget import Budget
from oomguard.card_search import CardSearch, Subject
from oomguard.errors import ConfigurationError
from oomguard.levers.adapter import trained
from oomguard.levers.live import read_plan
from oomguard.prediction.estimate import asked
from oomguard.search_space import Space, space

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from oomguard.memory.cards import Card
    from oomguard.plan import Plan
    from oomguard.prediction.result import Estimate
    from oomguard.search_result import SearchResult


def find_plan(
    trainer_or_model: Any,
    *,
    card: Card | str | int | None = None,
    maximize: str = "tokens",
    free: Sequence[str] = (),
    **settings: Any,
) -> SearchResult:
    """Find the largest plan that fits a card, and run its worst case where that can be done.

    On a trainer the effective batch is kept by accumulation: passes get more or fewer rows, and a
    step trains on the same samples. Of a model that is no trainer yet any number of rows can be
    found, unless `gradient_accumulation_steps` is above 1.

    Where the trainer's own device is a GPU, or a `VirtualCard` is entered, the plan is run: the
    longest rows for two optimizer steps, one evaluation batch, one save, at most four times. The
    trainer is as before afterwards, to the bit.

    Args:
        trainer_or_model: What `estimate` takes: a live Trainer, a configuration, a path, an id.
        card: By name (`"RTX 4090"`) or size (`"12GiB"`, bytes); the one that is here if `None`.
        maximize: `"tokens"` of a pass, `"max_length"`, `"micro_batch_size"`, `"lora_r"`, or
            `"throughput"`: of the plans that fit the one that trains most tokens a second.
        free: Settings that may change besides: `"gradient_checkpointing"`,
            `"offload_activations"`, `"optim"`, `"target_modules"`; `"micro_batch_size"`,
            `"max_length"` and `"lora_r"` give way where nothing fits otherwise, as far as needed.
        **settings: Fields of `Settings` and of `Plan`, as `estimate` takes them.

    Returns:
        The plan, what it takes, and others that fit.

    Raises:
        NothingFitsError: No plan fits.
        ConfigurationError: No card is known, or a setting cannot work.
    """
    return Finder(trainer_or_model, maximize, free, settings).on(card)


class Finder:
    """Searches the same plans on one card after another; what was estimated serves them all."""

    def __init__(
        self, model: Any, maximize: str, free: Sequence[str], settings: Mapping[str, Any]
    ) -> None:
        """As in `find_plan`.

        Raises:
            ConfigurationError: Nothing is known of the model, or a setting cannot work.
        """
        trainer = model if hasattr(model, "accelerator") else None
        self._predictor, start = asked(model, None, settings)
        self._config = self._predictor.config.get_text_config()
        self._space = self._around(start, maximize, free, live=trainer is not None)
        self._subject = Subject()
        if trainer is not None:
            self._subject = Subject(trainer, start.max_length, read_plan(trainer).max_length)
        self._known: dict[tuple[Card, Plan], Estimate] = {}

    def _around(self, start: Plan, maximize: str, free: Sequence[str], *, live: bool) -> Space:
        positions = getattr(self._config, "max_position_embeddings", None)
        return space(
            start,
            maximize,
            free,
            keeps_batch=live or start.gradient_accumulation_steps > 1,
            longest=start.max_length if live else None,
            most_tokens=None if _is_rotary(self._config) else positions,
            largest_rank=self._config.hidden_size,
        )

    def on(self, card: Card | str | int | None = None) -> SearchResult:
        """The largest plan for one card.

        Raises:
            NothingFitsError: No plan fits.
            ConfigurationError: No card is known.
        """
        began = time.perf_counter()
        budget = Budget.of(card)
        search = CardSearch(
            self._space, budget, lambda plan: self._estimate(plan, budget.card), self._subject
        )
        why_not = search.unmeasurable()
        fastest = self._space.maximize == "throughput"
        if why_not is not None and fastest:
            msg = f"throughput has to be measured, and {why_not}; maximize='tokens' needs no GPU"
            raise ConfigurationError(msg)
        if why_not is not None:
            found = search.estimated()
        else:
            found = search.fastest() if fastest else search.measured()
        found = replace(
            found,
            estimate=self._predictor.at(found.estimate.plan, budget.card),
            runners_up=tuple(
                replace(other, estimate=self._under_limit(other.estimate))
                for other in found.runners_up
            ),
        )
        return replace(
            found,
            lora_alpha=self._alpha(),
            notes=self._notes(found, why_not),
            seconds=time.perf_counter() - began,
        )

    def _estimate(self, plan: Plan, card: Card) -> Estimate:
        """What `plan` takes where there is room, which is the same on cards of any size."""
        constants = replace(card, name="", total_bytes=None)
        if (constants, plan) not in self._known:
            self._known[constants, plan] = self._predictor.at(plan, constants)
        return replace(self._known[constants, plan], card=card)

    def _under_limit(self, estimate: Estimate) -> Estimate:
        """What it takes of its own card, whose allocator gives cached blocks back in time."""
        usable_bytes = estimate.card.usable_bytes
        if usable_bytes is None or estimate.peak_reserved_bytes <= usable_bytes:
            return estimate
        return self._predictor.at(estimate.plan, estimate.card)

    def _alpha(self) -> int | None:
        trainer = self._subject.trainer
        adapters = [] if trainer is None else trained(trainer)
        return max((adapter.layer.lora_alpha[adapter.key] for adapter in adapters), default=None)

    def _notes(self, found: SearchResult, why_not: str | None) -> tuple[str, ...]:
        notes = list(found.estimate.notes)
        if why_not is not None and self._subject.trainer is not None:
            notes.append(f"not run, only estimated: {why_not}")
        positions = getattr(self._config, "max_position_embeddings", None)
        if positions is not None and (found.estimate.plan.max_length or 0) > positions:
            notes.append(f"the model was made for {positions:,} positions at the most")
        return tuple(notes)


def _is_rotary(config: Any) -> bool:
    """Whether positions are no weights, so that rows may be longer than the model was made for."""
    return bool(getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None))
