"""Down the ladder: choose the next rung, make the trainer obey it, write down what happened."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from oomguard import jump, oom
from oomguard.checkpoint import Reached
from oomguard.errors import ConfigurationError, LadderExhaustedError
from oomguard.levers.loss import SplitLoss
from oomguard.report import Recovery, Report
from oomguard.rung import (
    Fidelity,
    RungLike,
    rung_fidelity,
    rung_name,
    rung_relieves,
    rung_spent,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oomguard.event import OOMEvent
    from oomguard.forecast import Forecast
    from oomguard.jump import Candidate, PassedOver
    from oomguard.ladder import Ladder
    from oomguard.levers.live import Levers, Window
    from oomguard.plan import Plan

logger = logging.getLogger("oomguard")

_OF_PASSES = frozenset({"forward", "backward"})  # what an estimate of a pass tells of


class Taken(NamedTuple):
    """A rung that was taken.

    Attributes:
        rung: The rung.
        before: The plan before it.
        passed_over: Rungs before it that were not tried.
    """

    rung: RungLike
    before: Plan
    passed_over: tuple[PassedOver, ...] = ()


class Descent:
    """The plan in force, and the way to the next one.

    Attributes:
        plan: What the trainer obeys now.
    """

    def __init__(
        self, ladder: Ladder, levers: Levers, report: Report, forecast: Forecast | None = None
    ) -> None:
        """Start from the report's plan; without a `forecast` no rung is passed over."""
        self.plan = report.plan
        self._ladder = ladder
        self._levers = levers
        self._report = report
        self._forecast = forecast
        self._skipped: dict[str, str] = {}

    def take(
        self,
        event: OOMEvent,
        window: Window,
        index: int,
        *,
        required: bool,
        at_most: Fidelity | None = None,
    ) -> Taken | None:
        """Take the next rung for `event` and make the trainer obey it.

        Args:
            event: The failure.
            window: The batches at hand, which tell what levers can do.
            index: The batch of the window that failed.
            required: Whether trying again without a rung is pointless.
            at_most: How far the rung may change the training. `None`: any rung if one is required,
                else an exact one: what a second try may overcome must not change the training.

        Returns:
            What was taken; `None` when nothing was left and none was required.

        Raises:
            LadderExhaustedError: No rung is left and one was required.
        """
        allowed = at_most or (Fidelity.SEMANTIC if required else Fidelity.EXACT)
        before, choice = self.plan, self._choose(event, window, index, allowed)
        if choice is None:
            if required:
                raise LadderExhaustedError(self._exhausted(event))
            return None
        (rung, after, _), passed_over = choice
        try:
            self._levers.apply(before, after)
        except (RuntimeError, MemoryError) as error:
            oom.caught(error)
            self._skipped[rung_name(rung)] = "it ran out of memory itself"
            raise LadderExhaustedError(self._exhausted(event)) from None
        self.plan = self._report.plan = after
        return Taken(rung, before, passed_over)

    def go_on(self, reached: Reached, source: str) -> None:
        """Begin on the plan that an earlier run had reached.

        Raises:
            ConfigurationError: The trainer cannot follow it.
        """
        plan = reached.over(self.plan)
        reason = _raised_limit(self.plan, plan) or self._levers.refuses_start(self.plan, plan)
        if reason is None and reached.plan.lora_r != plan.lora_r:
            reason = f"lora_r is {self.plan.lora_r} here and was {reached.plan.lora_r} there"
        if reason is not None:
            msg = (
                f"The training cannot go on with the plan of {source}: {reason}. Build the trainer "
                "as the script of that run did."
            )
            raise ConfigurationError(msg)
        if plan != self.plan:
            logger.info("going on with the plan of %s: %s", source, self.plan.describe_change(plan))
            self._levers.apply(self.plan, plan)
        self.plan = self._report.plan = plan
        self._report.recoveries[:0] = reached.recoveries
        if reached.loss_form is not None:
            self._levers.split_loss = SplitLoss(reached.loss_form)

    def reached(self) -> Reached:
        """What a later run needs to go on from here."""
        split_loss, report = self._levers.split_loss, self._report
        form = None if split_loss is None else split_loss.form
        return Reached(report.initial_plan, report.plan, tuple(report.recoveries), form)

    def record(
        self,
        event: OOMEvent,
        taken: Taken | None,
        seconds_lost: float,
        change: str | None = None,
    ) -> None:
        """Add the recovery to the report and log its line."""
        rung, before, passed_over = taken if taken is not None else (None, self.plan, ())
        recovery = Recovery(
            event=event,
            rung=None if rung is None else rung_name(rung),
            fidelity=None if rung is None else rung_fidelity(rung),
            before=before,
            after=self.plan,
            seconds_lost=seconds_lost,
            change=change,
            passed_over=passed_over,
        )
        self._report.recoveries.append(recovery)
        logger.warning("%s", recovery.log_line())

    def _choose(
        self, event: OOMEvent, window: Window, index: int, at_most: Fidelity
    ) -> tuple[Candidate, tuple[PassedOver, ...]] | None:
        candidates = self._candidates(event, window, index, at_most)
        first = next(candidates, None)
        if first is None:
            return None
        choice: tuple[Candidate, tuple[PassedOver, ...]] = first, ()
        usable = jump.usable_bytes(event)
        if self._forecast is not None and usable is not None and event.phase in _OF_PASSES:
            needs = self._forecast.needs(event, usable, self.plan)
            if needs is not None:
                deeper = self._deeper(first, event, window, index)
                choice = jump.choose(first, candidates, deeper, needs, usable)
        if rung_fidelity(choice[0].rung) is Fidelity.SEMANTIC:
            self._mention_exact(choice[0].position, event, window, index)
        return choice

    def _candidates(
        self, event: OOMEvent, window: Window, index: int, at_most: Fidelity
    ) -> Iterator[Candidate]:
        order = list(Fidelity)
        for position, rung in enumerate(self._ladder):
            if order.index(rung_fidelity(rung)) > order.index(at_most):
                continue
            if not rung_relieves(rung, event.phase):
                self._skip(rung, f"it frees nothing in {event.phase}")
                continue
            proposal = self._proposal(rung, event, window, index)
            if proposal is not None:
                yield jump.Candidate(rung, proposal, position)

    def _deeper(
        self, candidate: Candidate, event: OOMEvent, window: Window, index: int
    ) -> Iterator[Candidate]:
        """The same rung taken again and again, as if each time memory had run out once more."""
        while True:
            before = candidate.plan
            event = jump.failing_again(event, before)
            after = candidate.rung(before, event)
            if after is None or after == before or _raised_limit(before, after):
                return
            if self._levers.refusal(self.plan, after, window, index) is not None:
                return
            candidate = candidate._replace(plan=after)
            yield candidate

    def _proposal(self, rung: RungLike, event: OOMEvent, window: Window, index: int) -> Plan | None:
        proposal = rung(self.plan, event)
        if proposal is None or proposal == self.plan:
            self._skip(rung, rung_spent(rung, self.plan, event))
            return None
        if proposal.effective_batch_size != self.plan.effective_batch_size:
            msg = (
                f"{rung_name(rung)} would change the effective batch size from "
                f"{self.plan.effective_batch_size} to {proposal.effective_batch_size}."
            )
            raise ConfigurationError(msg)
        reason = _raised_limit(self.plan, proposal) or self._levers.refusal(
            self.plan, proposal, window, index
        )
        if reason is not None:
            self._skip(rung, reason)
            return None
        return proposal

    def _skip(self, rung: RungLike, reason: str) -> None:
        name = rung_name(rung)
        if self._skipped.get(name) != reason:
            logger.info("%s skipped: %s", name, reason)
        self._skipped[name] = reason

    def _mention_exact(self, position: int, event: OOMEvent, window: Window, index: int) -> None:
        for rung in list(self._ladder)[position + 1 :]:
            if rung_fidelity(rung) is Fidelity.EXACT and self._proposal(rung, event, window, index):
                logger.info(
                    "%s, which is exact, could still act; ladder='exact_first' takes it before "
                    "any rung that changes what is trained on.",
                    rung_name(rung),
                )
                return

    def _exhausted(self, event: OOMEvent) -> str:
        taken = [r.rung for r in self._report.recoveries if r.rung is not None]
        counts = ", ".join(f"{name} x {taken.count(name)}" for name in dict.fromkeys(taken))
        skipped = "; ".join(f"{name}: {reason}" for name, reason in self._skipped.items())
        advice = " ".join(f"({chr(97 + i)}) {text}" for i, text in enumerate(self._advice(event)))
        return (
            f"Out of memory in {event.phase} of optimizer step {event.step}{oom.sizes(event)}, "
            f"and the ladder is spent. "
            f"Taken so far: {counts or 'no rung'}. Left out: {skipped or 'none'}. "
            f"Nothing of step {event.step} was applied; weights and optimizer are those after step "
            f"{event.step - 1}. What to change: {advice} The error was: {event.message}"
        )

    def _advice(self, event: OOMEvent) -> list[str]:
        plan = self.plan
        advice = []
        names = [rung_name(rung) for rung in self._ladder]
        missing = [
            f"{name}()"
            for name in ("CheckpointActivations", "SplitBatch", "HalveSequence")
            if name not in names
        ]
        if missing:
            advice.append(f"add {', '.join(missing)} to the ladder;")
        longest = plan.max_length or event.width
        if longest is not None and "HalveSequence" in names:
            floor = max(2, longest // 2)
            advice.append(f"allow shorter rows with HalveSequence(floor={floor});")
        if plan.optim is not None and "8bit" not in plan.optim:
            advice.append(f"set optim='paged_adamw_8bit' (now {plan.optim!r});")
        if plan.lora_r is None:
            advice.append("train LoRA adapters (peft_config) instead of all weights;")
        else:
            advice.append(f"use fewer target_modules or a lower r (now {plan.lora_r});")
        advice.append("load the base model in 4 bits, or use a larger card.")
        return advice


def _raised_limit(before: Plan, after: Plan) -> str | None:
    """Why going from `before` to `after` would not be a way down: ladders end."""
    for name in ("micro_batch_size", "max_pass_tokens", "max_length", "lora_r"):
        old, new = getattr(before, name), getattr(after, name)
        if old is not None and (new is None or new > old):
            return f"it would raise {name} from {old} to {new}"
    added = set(after.target_modules or ()) - set(before.target_modules or ())
    return f"it would train adapters of {', '.join(sorted(added))} again" if added else None
