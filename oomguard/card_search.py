"""One search on one card: asks for estimates, and runs plans where there is a trainer to run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from oomguard.errors import NothingFitsError
from oomguard.largest_plan import best, fewer_rows
from oomguard.memory import device
from oomguard.memory.size import format_bytes
from oomguard.search_result import RunnerUp, SearchResult
from oomguard.trial import Trial, refusal, run_trial
from oomguard.trials import MOST_TRIALS, settle

if TYPE_CHECKING:
    from collections.abc import Callable

    from oomguard.budget import Budget
    from oomguard.plan import Plan
    from oomguard.prediction.result import Estimate
    from oomguard.search_space import Space

_RUNNERS_UP = 3
_APART = 1.25  # how much larger a plan is than the next, roughly


class CardSearch:
    """A search of one space on one card."""

    def __init__(
        self, space: Space, budget: Budget, estimate: Callable[[Plan], Estimate], subject: Subject
    ) -> None:
        """Take what is searched, what it may take, and who knows what it takes."""
        self._space = space
        self._budget = budget
        self._estimate = estimate
        self._subject = subject
        self._asked: dict[Plan, Estimate] = {}
        self._trials: dict[Plan, Trial] = {}

    def unmeasurable(self) -> str | None:
        """Why nothing can be run, or `None`."""
        if self._subject.trainer is None:
            return "there is no trainer to run"
        here = next(iter(device.devices()), None)
        if not self._budget.simulated and here is not None:
            total, there = self._budget.total_bytes, here.total_bytes
            if total > there:
                return f"the card is larger than the {format_bytes(there)} of this GPU"
        if self._space.maximize == "lora_r":
            return "the adapters are there, and get no higher rank"
        reason = self._refusal(self._space.variants[0])
        if reason is None:
            self._space = self._feasible()
        return reason

    def _refusal(self, plan: Plan) -> str | None:
        return refusal(self._subject.trainer, self._subject.own_limit(plan))

    def _feasible(self) -> Space:
        """The plans that the trainer can be brought to."""
        first, *others = self._space.variants
        variants = (first, *(plan for plan in others if self._refusal(plan) is None))
        axes = tuple(
            axis
            for axis in self._space.axes
            if self._refusal(self._space.at(first, axis.name, axis.values[0])) is None
        )
        return replace(self._space, variants=variants, axes=axes)

    def estimated(self) -> SearchResult:
        """The largest plan by the estimates."""
        plans = best(self._space, lambda plan: self._budget.usually_holds(self._ask(plan)))
        if plans and not self._budget.surely_holds(self._ask(plans[0])):
            plans = best(self._space, lambda plan: self._budget.surely_holds(self._ask(plan)))
        if not plans:
            plans = best(self._space, lambda plan: self._budget.barely_holds(self._ask(plan)))
        if not plans:
            raise NothingFitsError(self._nothing())
        return self._result(plans[0])

    def measured(self) -> SearchResult:
        """The largest plan that ran."""

        def ratio(tried: _Tried) -> float:
            estimate = self._ask(tried.plan)
            return tried.trial.peak_allocated_bytes / estimate.peak_allocated_bytes

        tried = settle(
            lambda scale: next(iter(self._best(scale)), None),
            lambda plan: _Tried(plan, self._run(plan)),
            ratio,
            self._space.smallest,
        )
        fitting = [one for one in tried if one.trial.fits]
        if not fitting:
            raise NothingFitsError(self._nothing())
        return self._result(fitting[-1].plan)

    def fastest(self) -> SearchResult:
        """Of the plans that fit, the one that trains most tokens a second.

        The largest passes of every variant are run, then half of them, as long as trials are left:
        passes of more rows are faster on the whole, but not always.
        """
        waiting = self._best(1.0) or [self._space.smallest]
        while waiting and len(self._trials) < MOST_TRIALS:
            plan = waiting.pop(0)
            if plan in self._trials:
                continue
            self._run(plan)
            fewer = fewer_rows(self._space, plan)
            waiting += [] if fewer is None else [fewer]
        speeds = {plan: t.tokens_per_s or 0.0 for plan, t in self._trials.items() if t.fits}
        if not speeds:
            raise NothingFitsError(self._nothing())
        return self._result(max(speeds, key=lambda plan: speeds[plan]))

    def _best(self, scale: float) -> list[Plan]:
        return best(self._space, lambda plan: self._budget.holds(self._ask(plan), scale))

    def _ask(self, plan: Plan) -> Estimate:
        if plan not in self._asked:
            self._asked[plan] = self._estimate(plan)
        return self._asked[plan]

    def _run(self, plan: Plan) -> Trial:
        card_bytes = self._budget.total_bytes if self._budget.given else None
        own = self._subject.own_limit(plan)
        self._trials[plan] = trial = run_trial(self._subject.trainer, own, card_bytes=card_bytes)
        return trial

    def _result(self, plan: Plan) -> SearchResult:
        return SearchResult(
            plan=self._subject.own_limit(plan),
            maximize=self._space.maximize,
            estimate=self._ask(plan),
            measured=self._trials.get(plan),
            runners_up=self._runners_up(plan),
            trials=tuple(self._trials.values()),
            card=self._budget.card,
        )

    def _runners_up(self, plan: Plan) -> tuple[RunnerUp, ...]:
        """The largest others: those that ran, then those that should."""
        for other in self._trials:
            self._ask(other)
        others = sorted((other for other in self._asked if other != plan), key=self._rank)
        kinds = set() if plan in self._trials else {self._kind(plan)}
        ranked: list[Plan] = []
        for other in others:
            if len(ranked) == _RUNNERS_UP:
                break
            if self._kind(other) not in kinds and self._fits(other, plan):
                kinds.add(self._kind(other))
                ranked.append(other)
        return tuple(RunnerUp(self._ask(other), self._trials.get(other)) for other in ranked)

    def _kind(self, plan: Plan) -> tuple[object, ...]:
        """Plans of one kind are much the same: of a search's last steps one is enough."""
        size = max(1, self._space.size(plan))
        numbers = plan.per_device_train_batch_size, int(math.log(size, _APART))
        return *numbers, plan.gradient_checkpointing, plan.optim, plan.target_modules

    def _fits(self, other: Plan, found: Plan) -> bool:
        trial = self._trials.get(other)
        if trial is not None:
            return trial.fits
        if found in self._trials and self._space.size(other) > self._space.size(found):
            return False  # it would have been run
        return self._budget.surely_holds(self._asked[other])

    def _rank(self, plan: Plan) -> tuple[bool, int]:
        return plan not in self._trials, -self._space.size(plan)

    def _nothing(self) -> str:
        """Why nothing fits, with the numbers, and what to change."""
        smallest, card = self._space.smallest, self._budget.card
        estimate = self._ask(smallest)
        died = sum(not trial.fits for trial in self._trials.values())
        how = f"; trials ran out of memory: {died}" if died else ""
        advice = self._advice(estimate)
        choices = ", ".join(f"({chr(97 + index)}) {text}" for index, text in enumerate(advice))
        return (
            f"nothing fits {format_bytes(self._budget.total_bytes)} ({card.name}): the smallest "
            f"plan, {smallest.per_device_train_batch_size} x {smallest.max_length} tokens, takes "
            f"an estimated {format_bytes(estimate.device_bytes)}, of which weights are "
            f"{format_bytes(estimate.breakdown.get('weights', 0))}{how}. Change: {choices}"
        )

    def _advice(self, estimate: Estimate) -> list[str]:
        plan, advice = estimate.plan, []
        moving = {axis.name for axis in self._space.axes}
        names = [name for name in ("max_length", "lora_r") if name not in moving]
        names = [name for name in names if getattr(plan, name) is not None]
        if not plan.gradient_checkpointing:
            names.insert(0, "gradient_checkpointing")
        if names and estimate.breakdown.get("weights", 0) < self._budget.total_bytes:
            advice.append(f"free={tuple(names)!r}")
        if plan.lora_r is None:
            advice.append("lora_r=16 instead of a full fine-tune")
        elif not estimate.settings.is_quantized:
            advice.append("quantization='nf4'")
        return [*advice, "a larger card"]


@dataclass(frozen=True)
class Subject:
    """What is searched for.

    Attributes:
        trainer: The live trainer; `None` where there is none yet.
        longest: Tokens of its longest row, which is the length of the plans that are estimated.
        max_length: Its own limit of them.
    """

    trainer: Any = None
    longest: int | None = None
    max_length: int | None = None

    def own_limit(self, plan: Plan) -> Plan:
        """`plan` with the trainer's own limit where no row is to be cut."""
        if self.trainer is None or plan.max_length != self.longest:
            return plan
        return replace(plan, max_length=self.max_length)


@dataclass(frozen=True)
class _Tried:
    """A plan as it was searched for, and its trial."""

    plan: Plan
    trial: Trial

    @property
    def fits(self) -> bool:
        return self.trial.fits
