"""Ladders: they end, never touch the effective batch, and refuse what is no rung."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomguard.errors import ConfigurationError
from oomguard.event import OOMEvent
from oomguard.ladder import Ladder
from oomguard.rung import Fidelity, Rung, rung_fidelity, rung_name, rung_spent
from oomguard.rungs import CheckpointActivations, HalveSequence, SplitBatch
from tests.decisions import (
    BLIND,
    COUNTS,
    FLOORS,
    PHASES,
    PLAN,
    PLANS,
    WIDTHS,
    largest_pass,
    packed_events,
    padded_events,
)

if TYPE_CHECKING:
    from oomguard.plan import Plan

EVENTS = st.one_of(padded_events(), packed_events(), st.builds(OOMEvent, phase=PHASES, step=COUNTS))
RUNGS = st.lists(
    st.one_of(
        st.just(CheckpointActivations()), st.builds(HalveSequence, FLOORS), st.just(SplitBatch())
    ),
    min_size=1,
    unique_by=type,
)


def next_plan(ladder: Ladder, plan: Plan, event: OOMEvent) -> Plan | None:
    answers = (rung(plan, event) for rung in ladder)
    return next((answer for answer in answers if answer is not None), None)


@given(PLANS, RUNGS, st.lists(EVENTS, max_size=20))
def test_no_sequence_of_failures_changes_the_effective_batch(
    plan: Plan, rungs: list[Rung], events: list[OOMEvent]
) -> None:
    ladder, now = Ladder(*rungs), plan
    for event in events:
        now = next_plan(ladder, now, event) or now
    assert now.effective_batch_size == plan.effective_batch_size
    assert now.per_device_train_batch_size == plan.per_device_train_batch_size
    assert now.gradient_accumulation_steps == plan.gradient_accumulation_steps


@given(PLANS, RUNGS, WIDTHS)
def test_a_run_that_always_fails_reaches_the_end_of_its_ladder(
    plan: Plan, rungs: list[Rung], width: int
) -> None:
    ladder, now = Ladder(*rungs), plan
    # Six halvings of 64 rows, thirteen of 8192 tokens, checkpointing.
    for _ in range(6 + 13 + 1):
        event = largest_pass(now, width)
        after = next_plan(ladder, now, event)
        if after is None:
            break
        assert after != now
        now = after
    assert all(rung(now, largest_pass(now, width)) is None for rung in ladder)


@given(PLANS, RUNGS, EVENTS)
def test_a_rung_that_answers_changes_something_and_otherwise_says_why_not(
    plan: Plan, rungs: list[Rung], event: OOMEvent
) -> None:
    for rung in rungs:
        answer = rung(plan, event)
        if answer is None:
            assert rung_spent(rung, plan, event)
        else:
            assert plan.changes(answer)


def test_an_empty_ladder_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs at least one rung"):
        Ladder()


def test_two_rungs_of_a_kind_are_refused_by_name_and_number() -> None:
    with pytest.raises(ConfigurationError, match="holds HalveSequence 2 times"):
        Ladder(HalveSequence(floor=512), SplitBatch(), HalveSequence(floor=128))


@pytest.mark.parametrize("rung", [SplitBatch, "SplitBatch", None, [SplitBatch()]])
def test_what_is_no_rung_is_refused_with_what_to_write(rung: Any) -> None:
    hint = r"SplitBatch\(\)" if rung is SplitBatch else "a Rung or a function"
    with pytest.raises(ConfigurationError, match=f"give it {hint}"):
        Ladder(rung)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="'exact'; use 'default', 'exact_first' or"):
        Ladder.of("exact")


LATER = ["PageOptimizer8bit", "NarrowTargets", "LowerRank"]


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("default", ["CheckpointActivations", "HalveSequence", "SplitBatch", *LATER]),
        (
            "exact_first",
            [
                "CheckpointActivations",
                "SplitBatch",
                "PageOptimizer8bit",
                "HalveSequence",
                "NarrowTargets",
                "LowerRank",
            ],
        ),
    ],
)
def test_a_preset_has_its_documented_order(preset: str, names: list[str]) -> None:
    assert [rung_name(rung) for rung in Ladder.of(preset)] == names


def test_a_ladder_shows_its_rungs_with_their_settings() -> None:
    ladder = Ladder(CheckpointActivations(), HalveSequence(floor=512))
    assert len(ladder) == 2
    assert repr(ladder) == "Ladder(CheckpointActivations(), HalveSequence(floor=512, mode=None))"


def test_a_plain_function_is_a_rung_that_counts_as_semantic() -> None:
    def drop_adapters(plan: Plan, event: OOMEvent) -> Plan | None:
        return None if plan.lora_r == 4 else replace(plan, lora_r=4)

    ladder = Ladder(SplitBatch(), drop_adapters)
    assert rung_name(drop_adapters) == "drop_adapters"
    assert rung_fidelity(drop_adapters) is Fidelity.SEMANTIC
    after = next_plan(ladder, replace(PLAN, micro_batch_size=1), BLIND)
    assert after is not None
    assert after.lora_r == 4
    assert next_plan(ladder, after, BLIND) is None
    assert rung_spent(drop_adapters, after, BLIND) == "it answered None"
